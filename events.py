"""TensorBoard: what a run writes for it while it trains, and how the events of a resumed run go on.

Tags are the original's (metatrain_ and metaval_, its maml.py), and ours: mean loss per example, norm of the
meta-gradient, milliseconds per step, the run's flags, and pictures of a validation task.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorflow.core.util import event_pb2

from utils import Curve, Tasks, writing

VALIDATION_TAGS = ("metaval_", "validation_task")  # how the tags of a validation begin
PICTURED = 5  # examples of each class in a picture's support and query part, at most
RIGHT, WRONG, WHITE = (40, 170, 60), (220, 50, 40), (255, 255, 255)  # frames, red green blue
TEST_FOLDER = "test"  # in the run folder: the events of its tests
MOST_SIDE = 84  # pixels to which small images are enlarged


class Events:
    """Writes a run folder's events from some iteration on. Raises InputError where they cannot be written."""

    def __init__(self, folder: Path, start: int, log: bool = True, validated: int | None = None):
        """Opens a new file of events, and removes the events that a resumed run will write again.

        Args:
            folder: the run folder.
            start: the first iteration that will be written.
            log: False writes nothing.
            validated: the latest iteration whose validation the run knows of; None: all that it has had. The events of
                a later validation are removed too, since the run makes that validation again.
        """
        self.folder, self.writer = folder, tf.summary.create_noop_writer()
        if log:
            with writing(folder):
                _drop_from(folder, start, math.inf if validated is None else validated)
                self.writer = tf.summary.create_file_writer(str(folder))

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *exception):
        with writing(self.folder):
            self.writer.close()

    def flush(self) -> None:
        """Hands all events to the file system. A run that goes on from a later checkpoint keeps them."""
        with writing(self.folder):
            self.writer.flush()

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes values by tag, in one event: a call of tf.summary.scalar for each would take ten times as long."""
        summary = Summary()
        for tag, value in values.items():
            summary.MergeFrom(scalar_pb(tag, value))
        with writing(self.folder), self.writer.as_default(iteration):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString())

    def overview(self, iteration: int, flags: Mapping, updates: int, images: bool) -> None:
        """Writes what TensorBoard shows of the run as a whole.

        These are its flags as text; a row of the table of runs (HParams), by the folder's name, with the accuracies, or
        of regression the losses, in training, validation and test; and a page of few charts (Custom Scalars).
        Args: the flags; J, whose curves are shown; whether it is a run of images.
        """
        rows = "".join(f"| --{name} | {value} |\n" for name, value in flags.items())
        metric = "accuracy" if images else "loss"
        after = f"Post-update_{metric}__step_{updates}"
        metrics = [hparams.Metric(f"metatrain_{after}", display_name=f"training {metric}")]
        if images:
            metrics.append(hparams.Metric(f"metaval_{after}", display_name=f"validation {metric}"))
        metrics.append(hparams.Metric(metric, group=TEST_FOLDER, display_name=f"test {metric}"))
        with writing(self.folder), self.writer.as_default(iteration):
            tf.summary.text("flags", f"| flag | value |\n| --- | --- |\n{rows}")
            hparams.hparams_config([hparams.HParam(name) for name in flags], metrics)
            values = {name: "None" if value is None else value for name, value in flags.items()}
            hparams.hparams(values, trial_id=self.folder.name)
            page = custom_scalar.pb(_layout(updates, images)).SerializeToString()
            tf.summary.experimental.write_raw_pb(page)

    def picture(self, iteration: int, tag: str, pixels: np.ndarray) -> None:
        """Writes an image, uint8 [height, width, 3]."""
        with writing(self.folder), self.writer.as_default(iteration):
            tf.summary.image(tag, pixels[None])


def test_scalar(folder: Path, iteration: int, metric: str, value: float) -> None:
    """Writes a test's number for the table of runs, "accuracy" or "loss".

    It has a folder of its own, since TensorBoard leaves a file of events once there is a newer one beside it, and
    training may still write to that.
    """
    with Events(folder / TEST_FOLDER, iteration) as events:
        events.scalars(iteration, {metric: value})


def _layout(updates, images):
    """Four charts, in place of one for each tag."""
    metric, loss = ("accuracy", "mean_loss") if images else (None, "loss")
    tags = {
        f"{name}: before any update and after {updates}": [
            f"(metatrain|metaval)_(Pre-update_{tag}|Post-update_{tag}__step_{updates})$"
        ]
        for name, tag in (("Accuracy", metric), ("Loss of an example", loss))
        if tag
    }
    tags |= {
        "Milliseconds a step": ["metatrain_step_milliseconds"],
        "Norm of the meta-gradient": ["metatrain_gradient_norm"],
    }
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=regexes))
        for title, regexes in tags.items()
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="The run at a glance", chart=charts)])


def curve_scalars(prefix: str, curve: Curve) -> dict[str, float]:
    """Names the means of a curve over its tasks by the original's tags."""
    values = {}
    for metric, columns in (("loss", curve.losses), ("accuracy", curve.accuracies)):
        for updates, mean in enumerate(np.mean(columns, axis=0)):
            tag = f"Post-update_{metric}__step_{updates}" if updates else f"Pre-update_{metric}"
            values[f"{prefix}_{tag}"] = float(mean)
    return values


def task_picture(task: Tasks, scores: np.ndarray) -> np.ndarray:
    """Draws a task: a row for each class, with its support images, a gap, and the query images that were taken for it.

    A query image has a green frame where that is right, and a red one where it is wrong.
    Args: one task of images, scores [N * Q, N]. Returns uint8 [height, width, 3].
    """
    support_row, query_row, taken_for = (np.argmax(x, -1) for x in (task.support_y, task.query_y, scores))
    shown = PICTURED * scores.shape[1]  # the first examples of every class come first
    rows = []
    for label in range(scores.shape[1]):
        row = [_framed(image, WHITE) for image in task.support_x[support_row == label][:PICTURED]]
        row.append(blank := np.full_like(row[0], 255))
        query = zip(task.query_x[:shown], query_row, taken_for, strict=False)
        row += [_framed(x, RIGHT if true == label else WRONG) for x, true, guess in query if guess == label]
        rows.append(row)
    longest = max(map(len, rows))
    return np.concatenate([np.concatenate(row + [blank] * (longest - len(row)), 1) for row in rows])


def _framed(image, colour):
    """Pixels 0 to 1, with 1 or 3 channels, as colours; small ones larger."""
    times = max(1, MOST_SIDE // len(image))
    pixels = np.uint8(255 * image.repeat(times, 0).repeat(times, 1) + 0.5)
    framed = np.empty((pixels.shape[0] + 4, pixels.shape[1] + 4, 3), np.uint8)
    framed[:] = colour
    framed[2:-2, 2:-2] = pixels
    return framed


def _drop_from(folder, start, validated):
    """Rewrites the files that have events from iteration `start` on, or of validations after `validated`."""
    for path in folder.glob("events.out.tfevents.*"):
        kept, dropped = [], False
        try:
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                event = event_pb2.Event.FromString(record)
                validation = any(value.tag.startswith(VALIDATION_TAGS) for value in event.summary.value)
                if event.file_version or (event.step < start and not (validation and event.step > validated)):
                    kept.append(record)
                else:
                    dropped = True
        except tf.errors.DataLossError:
            dropped = True  # a kill cut the last record
        if dropped:
            beside = str(path.with_name(".events"))
            with tf.io.TFRecordWriter(beside) as writer:
                for record in kept:
                    writer.write(record)
            os.replace(beside, path)
