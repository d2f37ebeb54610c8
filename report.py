"""Everything a run reports: printed lines, a progress bar, and TensorBoard event files.

The original's tags (metatrain_ and metaval_, its maml.py) are flat. Ours are in groups: train/, validation/, test/ and
speed/. They are the mean loss per example, the norm of the meta-gradient, the milliseconds per step, the result of a
test, and pictures of tasks. The run's flags are text.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorflow.python.ops.summary_ops_v2 import import_event
from tqdm import tqdm

from files import printable, say, writing
from recipe import Recipe, to_flags
from utils import Curve, Tasks

PRINT_INTERVAL, SINUSOID_PRINT_INTERVAL = 100, 1000  # iterations (the original's main.py)
REFRESH_SECONDS = 3  # of the progress line, if a step takes longer
FILES = "events.out.tfevents.*"  # TensorFlow's name for event files
TEST_FOLDER = "test"  # in the run folder, for the events of tests
OUR_GROUPS = {"metatrain": "train", "metaval": "validation"}
OLD_TAGS = {  # of ours until December 2026 -> now
    "metatrain_gradient_norm": "train/gradient_norm",
    "metatrain_step_milliseconds": "speed/step_milliseconds",
    "validation_task": "validation/task",
    "test_task": "test/task",
}
FIRST_COLUMNS = {"datasource", "num_classes", "update_batch_size", "update_lr", "num_updates"}  # of the HParams table
MAX_PICTURED = 5  # support images per class, and query images per class, in a picture
MAX_CLASSES = 20  # in a picture
MAX_QUERIES = 25  # of a class in a picture
A_LINE = 6  # images; TensorBoard reduces pictures to the width of its cards, so wider ones have illegible text
ENLARGE_TO = 84  # pixels; small images are enlarged up to this side, large ones reduced to less than twice that
FONT_SIZE, GAP = 18, 12  # pixels; GAP separates support and query images
RIGHT, WRONG, WHITE, BLACK = (40, 170, 60), (220, 50, 40), (255, 255, 255), (0, 0, 0)  # RGB


def tell(line: str) -> None:
    """Print a line above the progress bar, if there is one."""
    with tqdm.external_write_mode():
        say(line)


class Events:
    """TensorBoard events of a folder. Its methods append, and raise InputError if they cannot write."""

    def __init__(self, folder: Path, start: int, log: bool = True):
        """Open a new event file.

        Args:
            folder: the run folder.
            start: the first iteration that will be written. Readers, including TensorBoard, drop the events that older
                files have from there on.
            log: False: write nothing.
        """
        self.folder, self.writer = folder, tf.summary.create_noop_writer()
        if log:
            with writing(folder):
                self.writer = tf.summary.create_file_writer(str(folder))
            mark = Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START))
            with self._at(start):
                import_event(mark.SerializeToString())

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *exception):
        with writing(self.folder):
            self.writer.close()

    @contextlib.contextmanager
    def _at(self, iteration: int) -> Iterator[None]:
        # as_default flushes at its end. A run that resumes from a later checkpoint does not write these events again.
        with writing(self.folder), self.writer.as_default(iteration):
            yield

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write values by tag as one event: ten times as fast as one tf.summary.scalar per tag."""
        summary = Summary()
        for tag, value in values.items():
            summary.MergeFrom(scalar_pb(tag, value))
        with self._at(iteration):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString())

    def flags(self, iteration: int, flags: Mapping) -> None:
        """Write the flags of a run as a text table."""
        rows = "".join(f"| --{name} | {printable(value)} |\n" for name, value in flags.items())
        with self._at(iteration):
            tf.summary.text("flags", f"| flag | value |\n| --- | --- |\n{rows}")

    def overview(self, iteration: int, recipe: Recipe) -> None:
        """Write the run's flags as text, its row of the HParams table, and a Custom Scalars page with a few charts."""
        flags = to_flags(recipe)
        self.flags(iteration, flags)
        values = {name: value if isinstance(value, int | float) else printable(value) for name, value in flags.items()}
        with self._at(iteration):
            for summary in (
                _table(flags, recipe.inner_steps),
                hparams.hparams_pb(values, trial_id=""),  # TensorBoard then names the row after the run's path
                custom_scalar.pb(_layout(recipe.inner_steps, recipe.dataset.images is not None)),
            ):
                tf.summary.experimental.write_raw_pb(summary.SerializeToString())

    def picture(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        """Write an image, uint8 [height, width, 3]."""
        with self._at(iteration):
            tf.summary.image(tag, pixels[None])


class Report(Events):
    """A training run's printed lines (the original's), progress bar, and TensorBoard curves."""

    def __init__(self, folder: Path, start: int, recipe: Recipe, log: bool = True, show_progress: bool = True):
        super().__init__(folder, start, log)
        self.recipe, self.images = recipe, recipe.dataset.images is not None
        self.unprinted = []  # (before, after) of each summary since the last printed line
        disable = None if show_progress else True  # None: enable on terminals only
        self.progress = tqdm(total=recipe.steps, initial=start, unit=" iterations", disable=disable)
        self.closed = threading.Event()
        if not self.progress.disable:
            threading.Thread(target=self._refresh, daemon=True).start()

    def _refresh(self):
        """Redraw the progress line, which tqdm does only after a step, so that it shows the time while a step runs."""
        while not self.closed.wait(REFRESH_SECONDS):
            self.progress.refresh()

    def __exit__(self, *exception):
        self.closed.set()
        self.progress.close()
        super().__exit__(*exception)

    def training(self, iteration: int, curve: Curve, gradient_norm: float, milliseconds: float | None) -> None:
        """Report the curve of an iteration's training tasks, and its step's gradient norm and duration if known."""
        values = {"train/gradient_norm": gradient_norm}
        if milliseconds is not None:
            values["speed/step_milliseconds"] = milliseconds
        self.scalars(iteration, self._curve_scalars("metatrain", curve) | values)
        values = before_and_after(curve, self.recipe.inner_steps)
        form = "acc {:.2f} -> {:.2f}" if curve.accuracies.shape[1] else "loss {:.4g} -> {:.4g}"
        self.progress.set_postfix_str(form.format(*values), refresh=False)
        self.unprinted.append(values)
        if iteration and iteration % (PRINT_INTERVAL if self.images else SINUSOID_PRINT_INTERVAL) == 0:
            pretrain = self.recipe.pretrain_steps
            name = f"Iteration {iteration - pretrain}" if iteration >= pretrain else f"Pretrain Iteration {iteration}"
            tell("{}: {:.6g}, {:.6g}".format(name, *np.mean(self.unprinted, axis=0)))
            self.unprinted = []

    def validation(self, iteration: int, curve: Curve) -> None:
        """Report the curve of the validation tasks."""
        self.scalars(iteration, self._curve_scalars("metaval", curve))
        tell("Validation results: {:.6g}, {:.6g}".format(*before_and_after(curve, self.recipe.inner_steps)))

    def _curve_scalars(self, prefix, curve):
        """Return a curve's means over tasks by the original's tags, and its means per example by ours."""
        values = {}
        for metric, columns in (("loss", curve.losses), ("accuracy", curve.accuracies)):
            for updates, mean in enumerate(np.mean(columns, axis=0)):
                tag = f"Post-update_{metric}__step_{updates}" if updates else f"Pre-update_{metric}"
                values[f"{prefix}_{tag}"] = float(mean)
        if self.images:  # the sinusoid's loss is already a mean over examples
            tags = "Pre-update_mean_loss", f"Post-update_mean_loss__step_{self.recipe.inner_steps}"
            values |= {
                f"{OUR_GROUPS[prefix]}/{tag}": mean for tag, mean in zip(tags, self._mean_losses(curve), strict=True)
            }
        return values

    def _mean_losses(self, curve):
        """Return the mean losses per example, before any update and after J."""
        before, after = (float(np.mean(curve.losses[:, j])) for j in (0, self.recipe.inner_steps))
        if self.images and self.recipe.loss == "sum_over_shot":  # a sum over examples, divided by K
            before /= self.recipe.way
            after *= self.recipe.shot / (self.recipe.way * self.recipe.query_examples(training=True))
        return before, after


def before_and_after(curve: Curve, updates: int) -> tuple[float, float]:
    """Return the mean accuracies, or losses in regression, before any update and after `updates`."""
    values = curve.accuracies if curve.accuracies.shape[1] else curve.losses
    return float(np.mean(values[:, 0])), float(np.mean(values[:, updates]))


def test_scalar(folder: Path, iteration: int, metric: str, value: float) -> None:
    """Write a test's result, "accuracy" or "loss", for the HParams table.

    It is written to a separate folder, because TensorBoard stops reading an event file once its folder has a newer one,
    and training may still append to the older one.
    """
    with Events(folder / TEST_FOLDER, iteration) as events:
        events.scalars(iteration, {f"{TEST_FOLDER}/{metric}": value})


def read(folder: Path) -> list[list[Event]]:
    """Return the events of each event file in a folder, oldest file first.

    Events that a later file replaces are left out, and tags that had another name are renamed. A file is read up to its
    first truncated or damaged record.
    """
    files = filter(None, (list(EventFileLoader(str(path)).Load()) for path in folder.glob(FILES)))
    kept = []
    for events in sorted(files, key=lambda events: events[-1].wall_time):
        for start in (event.step for event in events if event.session_log.status == SessionLog.START):
            kept = [[event for event in older if event.step < start] for older in kept]
        kept.append(events)
    for event in chain(*kept):
        for value in event.summary.value:
            value.tag = _today(value.tag, folder.name == TEST_FOLDER)
    return kept


def _today(tag, of_test):
    """Return today's name of a tag of the original or of ours. of_test: it is from the folder of a test."""
    if of_test and tag in ("accuracy", "loss"):
        return f"{TEST_FOLDER}/{tag}"
    prefix, _, rest = tag.partition("_")
    return f"{OUR_GROUPS[prefix]}/{rest}" if prefix in OUR_GROUPS and "mean_loss" in rest else OLD_TAGS.get(tag, tag)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the numbers in a folder's event files: tag -> iteration -> latest value."""
    by_tag = {}
    for event in chain(*read(folder)):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars" and not value.tensor.tensor_shape.dim:
                by_tag.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor).item()
    return by_tag


def _table(flags, updates):
    """Return the columns of the HParams table. All runs have the same ones: TensorBoard reads them from any run."""
    metrics = [
        hparams.Metric("test/accuracy", group=TEST_FOLDER, display_name="test accuracy"),
        hparams.Metric(f"metaval_Post-update_accuracy__step_{updates}", display_name="validation accuracy"),
        hparams.Metric(f"metatrain_Post-update_accuracy__step_{updates}", display_name="training accuracy"),
        hparams.Metric("test/loss", group=TEST_FOLDER, display_name="test loss (sinusoid)"),
        hparams.Metric(f"metatrain_Post-update_loss__step_{updates}", display_name="training loss"),
    ]
    summary = hparams.hparams_config_pb([hparams.HParam(name) for name in flags], metrics)
    plugin = summary.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(plugin.content)
    for column in columns.experiment.hparam_infos:
        column.differs = column.name in FIRST_COLUMNS  # sorts these first; TensorBoard initially shows five
    plugin.content = columns.SerializeToString()
    return summary


def _layout(updates, images):
    """Return the Custom Scalars page: at most four charts."""
    curves = {"Accuracy": "accuracy", "Loss per example": "mean_loss"} if images else {"Training loss": "loss"}
    groups = "(metatrain_|metaval_|train/|validation/)"
    charts = {
        f"{name} before any update and after {updates}": (
            f"{groups}(Pre-update_{metric}|Post-update_{metric}__step_{updates})$"
        )
        for name, metric in curves.items()
    }
    charts |= {  # with the old tags
        "Milliseconds per step": "(speed/|metatrain_)step_milliseconds",
        "Norm of the meta-gradient": "(train/|metatrain_)gradient_norm",
    }
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[regex]))
        for title, regex in charts.items()
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="The run at a glance", chart=charts)])


def task_picture(task: Tasks, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """Draw a task: for each class its name, its support images, and the query images classified as it.

    Correctly classified query images have a green frame, the others a red one. The size is bounded: only the first
    MAX_CLASSES classes are drawn, with at most MAX_QUERIES query images each, in lines of A_LINE images.

    Args: one task of images, the names of its classes, scores [N * Q, N]. Return uint8 [height, width, 3].
    """
    support_row, query_row, guesses = (np.argmax(x, -1) for x in (task.support_y, task.query_y, scores))
    way = scores.shape[1]
    count = MAX_PICTURED * way  # examples are ordered so that these are MAX_PICTURED of each class
    blocks, names = [], names[:MAX_CLASSES]
    for label in range(len(names)):
        support = [_framed(image, WHITE) for image in task.support_x[support_row == label][:MAX_PICTURED]]
        query = zip(task.query_x[:count], query_row, guesses, strict=False)
        query = [(x, RIGHT if true == label else WRONG) for x, true, guess in query if guess == label][:MAX_QUERIES]
        query = [_framed(x, color) for x, color in query]
        first = max(0, A_LINE - len(support))  # queries next to the support images
        lines = [[*support, np.full_like(support[0][:, :GAP], 255), *query[:first]]]
        lines += [query[start : start + A_LINE] for start in range(first, len(query), A_LINE)]
        blocks.append([np.concatenate(images, 1) for images in lines])

    font = ImageFont.load_default(FONT_SIZE)
    classes = f"{len(names)} of {way:,} classes: " if len(names) < way else ""
    legend = [(f"{classes}support, then queries classified as it:", BLACK), ("right", RIGHT), ("wrong", WRONG)]
    legend_width = round(font.getlength(" ".join(text for text, _ in legend)))
    width, high, line = max(legend_width, *(row.shape[1] for row in chain(*blocks))), len(blocks[0][0]), 2 * FONT_SIZE
    height = line + sum(line + high * len(block) for block in blocks)
    picture = Image.new("RGB", (width, height), WHITE)
    draw, x = ImageDraw.Draw(picture), 0
    for text, color in legend:
        draw.text((x, FONT_SIZE), text, color, font, "lm")
        x += font.getlength(f"{text} ")
    top = line
    for name, block in zip(map(printable, names), blocks, strict=True):
        while font.getlength(name) > width:
            name = f"…{name[2:]}"  # the end of a folder's name identifies it better
        draw.text((0, top + FONT_SIZE), name, BLACK, font, "lm")
        top += line
        for row in block:
            picture.paste(Image.fromarray(row), (0, top))
            top += high
    return np.asarray(picture)


def _framed(image, color):
    """Return an image (pixels 0 to 1, 1 or 3 channels) as framed RGB, enlarged if small, reduced if large."""
    every = max(1, len(image) // ENLARGE_TO)
    image = image[::every, ::every]
    times = max(1, ENLARGE_TO // len(image))
    pixels = np.uint8(255 * image.repeat(times, 0).repeat(times, 1) + 0.5)
    framed = np.empty((pixels.shape[0] + 4, pixels.shape[1] + 4, 3), np.uint8)
    framed[:] = color
    framed[2:-2, 2:-2] = pixels
    return framed
