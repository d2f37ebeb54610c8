"""TensorBoard: what a run writes for it while it trains, and how the events of a resumed run go on.

Tags are the original's (metatrain_ and metaval_, its maml.py), and ours: mean loss per example, norm of the
meta-gradient, milliseconds per step, the run's flags, and pictures of a validation task.
"""

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorflow.core.util.event_pb2 import Event
from tensorflow.python.lib.io.tf_record import tf_record_random_reader

from files import folder_lock, move_in, printable, say, writing
from utils import Curve, Tasks

VALIDATION_TAGS = ("metaval_", "validation_task")  # how the tags of a validation begin
PICTURED = 5  # examples of each class in a picture's support and query part, at most
RIGHT, WRONG, WHITE, BLACK = (40, 170, 60), (220, 50, 40), (255, 255, 255), (0, 0, 0)  # red green blue
TEST_FOLDER = "test"  # in the run folder: the events of its tests
FIRST_COLUMNS = {"datasource", "num_classes", "update_batch_size", "update_lr", "num_updates"}  # of the table of runs
MOST_SIDE = 84  # pixels to which small images are enlarged
LETTERS, GAP = 13, 12  # pixels of a picture: the height of its letters, the space between support and query images
MOST_RECORD = 2**31  # bytes; no protocol buffer is longer
FILES = "events.out.tfevents.*"  # how TensorFlow calls files of events; seconds, host, process and a number follow


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
                _put_before(folder, int(time.time()))
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

    def flags(self, iteration: int, flags: Mapping) -> None:
        """Writes the flags of a run as a table of text."""
        rows = "".join(f"| --{name} | {_printed(value)} |\n" for name, value in flags.items())
        with writing(self.folder), self.writer.as_default(iteration):
            tf.summary.text("flags", f"| flag | value |\n| --- | --- |\n{rows}")

    def overview(self, iteration: int, flags: Mapping, updates: int, images: bool) -> None:
        """Writes what TensorBoard shows of the run as a whole.

        These are its flags as text; a row of the table of runs (HParams), by the folder's name, with its numbers in
        training, validation and test; and a page of few charts (Custom Scalars).
        Args: the flags; J, whose curves are shown; whether it is a run of images.
        """
        self.flags(iteration, flags)
        with writing(self.folder), self.writer.as_default(iteration):
            tf.summary.experimental.write_raw_pb(_table(flags, updates).SerializeToString())
            values = {name: "None" if value is None else _printed(value) for name, value in flags.items()}
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
    training may still write to that. Of two tests at once, one waits for the other.
    """
    with folder_lock(folder), Events(folder / TEST_FOLDER, iteration) as events:
        events.scalars(iteration, {metric: value})


def _printed(value):
    return printable(value) if isinstance(value, str) else value


def _table(flags, updates):
    """The columns of the table of runs, the same for all runs: TensorBoard takes them from one of the runs it shows."""
    metrics = [
        hparams.Metric("accuracy", group=TEST_FOLDER, display_name="test accuracy"),
        hparams.Metric(f"metaval_Post-update_accuracy__step_{updates}", display_name="validation accuracy"),
        hparams.Metric(f"metatrain_Post-update_accuracy__step_{updates}", display_name="training accuracy"),
        hparams.Metric("loss", group=TEST_FOLDER, display_name="test loss (sinusoid)"),
        hparams.Metric(f"metatrain_Post-update_loss__step_{updates}", display_name="training loss"),
    ]
    summary = hparams.hparams_config_pb([hparams.HParam(name) for name in flags], metrics)
    plugin = summary.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(plugin.content)
    for column in columns.experiment.hparam_infos:
        column.differs = column.name in FIRST_COLUMNS  # TensorBoard shows these first, and only five to begin with
    plugin.content = columns.SerializeToString()
    return summary


def _layout(updates, images):
    """Four charts, in place of one for each tag."""
    metric, loss = ("accuracy", "mean_loss") if images else (None, "loss")
    tags = {
        f"{name}: before any update and after {updates}": [
            f"(metatrain|metaval)_(Pre-update_{tag}|Post-update_{tag}__step_{updates})$"
        ]
        for name, tag in (("Accuracy", metric), ("Loss of an example" if images else "Training's loss", loss))
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


def task_picture(task: Tasks, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """Draws a task: for each class its name, its support images, and the query images that were taken for it.

    A query image has a green frame where that is right, and a red one where it is wrong.
    Args: one task of images, the names of its classes, scores [N * Q, N]. Returns uint8 [height, width, 3].
    """
    support_row, query_row, taken_for = (np.argmax(x, -1) for x in (task.support_y, task.query_y, scores))
    shown = PICTURED * scores.shape[1]  # the first examples of every class come first
    rows = []
    for label in range(scores.shape[1]):
        row = [_framed(image, WHITE) for image in task.support_x[support_row == label][:PICTURED]]
        row.append(np.full_like(row[0][:, :GAP], 255))
        query = zip(task.query_x[:shown], query_row, taken_for, strict=False)
        row += [_framed(x, RIGHT if true == label else WRONG) for x, true, guess in query if guess == label]
        rows.append(np.concatenate(row, 1))

    font = ImageFont.load_default(LETTERS)
    legend = [("support, then queries taken for the class:", BLACK), ("right", RIGHT), ("wrong", WRONG)]
    written = round(font.getlength(" ".join(text for text, _ in legend)))
    width, high, line = max(written, *(row.shape[1] for row in rows)), len(rows[0]), 2 * LETTERS
    picture = Image.new("RGB", (width, line + (line + high) * len(rows)), WHITE)
    draw, x = ImageDraw.Draw(picture), 0
    for text, colour in legend:
        draw.text((x, LETTERS), text, colour, font, "lm")
        x += font.getlength(f"{text} ")
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = line + (line + high) * number
        draw.text((0, top + LETTERS), _fitted(printable(name), font, width), BLACK, font, "lm")
        picture.paste(Image.fromarray(row), (0, top + line))
    return np.asarray(picture)


def _fitted(text, font, width):
    """The end of a name that is too long: the names of folders begin alike more often than they end so."""
    while font.getlength(text) > width:
        text = f"…{text[2:]}"
    return text


def _framed(image, colour):
    """Pixels 0 to 1, with 1 or 3 channels, as colours; small ones larger."""
    times = max(1, MOST_SIDE // len(image))
    pixels = np.uint8(255 * image.repeat(times, 0).repeat(times, 1) + 0.5)
    framed = np.empty((pixels.shape[0] + 4, pixels.shape[1] + 4, 3), np.uint8)
    framed[:] = colour
    framed[2:-2, 2:-2] = pixels
    return framed


class Read(NamedTuple):
    """What is read of a file of events."""

    events: list[tuple[Event, bytes]]  # each with its record in the file
    fault: str | None  # what is wrong with the file; None: nothing
    cut: bool  # its last record is not whole, since a process was killed while it wrote that


def read(path: Path) -> Read:
    """Reads a file of events, which may come from anybody.

    A record is 8 bytes of length, their checksum (4), an event, and its checksum (4). One that is damaged is left out.
    Source: TensorFlow's record_reader.cc. It takes any length as it stands, and an enormous one ends the process.
    """
    if not path.is_file():
        return Read([], "not a regular file", cut=False)
    found, fault, at, size = [], None, 0, path.stat().st_size
    reader = tf_record_random_reader(str(path))
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(12)
            if len(header) < 12:
                return Read(found, fault, cut=True)
            length = int.from_bytes(header[:8], "little")
            if masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little") or length >= MOST_RECORD:
                fault = f"no record can be read from byte {at:,} on"
                break
            end = at + 16 + length
            if end > size:
                return Read(found, fault, cut=True)
            try:
                record, _ = reader.read(at)
                found.append((Event.FromString(record), record))
            except (tf.errors.DataLossError, DecodeError):
                fault = fault or f"the record at byte {at:,} cannot be read"
            at = end
    return Read(found, fault, cut=False)


def read_all(folder: Path) -> list[tuple[Event, bytes]]:
    """Reads all events of a run folder, file by file, with a warning for each file that is damaged."""
    found = []
    for path in _in_order(folder):
        one = read(path)
        if one.fault:
            say(f"WARNING: {path} is damaged ({one.fault}): what can be read of it is used.", sys.stderr)
        found += one.events
    return found


def number(value: Summary.Value) -> float | None:
    """Gives the number that a value of an event is; None where it is none. The original's are simple values."""
    if value.HasField("simple_value"):
        return value.simple_value
    tensor = value.tensor
    if tensor.dtype not in (tf.float32, tf.float64) or tensor.tensor_shape.dim or tensor.tensor_shape.unknown_rank:
        return None
    with contextlib.suppress(ValueError, TypeError):  # it holds more than one number, or a part of one
        return tf.make_ndarray(tensor).item()
    return None


def _in_order(folder):
    """Its files of events in the order of their names, numbers as numbers, so in that of their times."""
    return sorted(folder.glob(FILES), key=lambda path: [int(number) for number in re.findall(r"[0-9]+", path.name)])


def _drop_from(folder, start, validated):
    """Rewrites the files that have events from iteration `start` on, or of validations after `validated`.

    A damaged one is set aside under a name that TensorBoard passes over, and what can be read of it stays.
    """
    beside = folder / ".events"
    for path in _in_order(folder):
        one, kept = read(path), []
        for event, record in one.events:
            validation = any(value.tag.startswith(VALIDATION_TAGS) for value in event.summary.value)
            # At iteration 0 there is a picture, and no validation.
            if event.file_version or (event.step < start and not (validation and event.step > max(validated, 0))):
                kept.append(record)
        if one.fault:
            aside = _free(folder / path.name.replace("events.out.tfevents", "damaged-events"))
            say(f"WARNING: {path} is damaged ({one.fault}): it is now {aside.name}.", sys.stderr)
        if one.fault or one.cut or len(kept) < len(one.events):
            with tf.io.TFRecordWriter(str(beside)) as writer:
                for record in kept:
                    writer.write(record)
            if one.fault:
                os.rename(path, aside)
            move_in(beside, path)
    beside.unlink(missing_ok=True)  # of a process that was killed here


def _free(path):
    """This path, or one with a number behind it, where nothing is yet."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _put_before(folder, now):
    """Renames the files of times to come, which a clock that was set back leaves, so that the next is the last.

    TensorBoard takes the files in the order of their names.
    """
    found = [(path, re.match(r"events\.out\.tfevents\.([0-9]+)", path.name)) for path in _in_order(folder)]
    if any(name and int(name[1]) > now for _, name in found):
        for path, name in reversed(found):
            if name and int(name[1]) >= now:
                os.rename(path, _free(folder / f"events.out.tfevents.{now - 1:010}{path.name[name.end() :]}"))
            now = min(now - 1, int(name[1])) if name else now
