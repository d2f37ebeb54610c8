"""What two or more modules need: records, losses, accuracy, statistics, files written whole, the user's error."""

import contextlib
import errno
import fnmatch
import glob
import os
import re
import secrets
import signal
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import tensorflow as tf

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class InputError(Exception):
    """Bad input: one line that names the thing, its value and the way out. main.py prints it and exits with 1."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(value: object) -> str:
    """Writes a value on one line. Newlines, a terminal's commands and bytes that are no text are escaped."""

    def shown(character):
        if character.isprintable() or unicodedata.category(character) == "Zs":  # any kind of space
            return character
        return character.encode("unicode_escape").decode()

    return "".join(map(shown, str(value)))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises InputError where a value is none of the choices that `name` has."""
    if value not in choices:
        raise InputError(f"{name}={value!r}: it is one of {', '.join(choices)}")


def say(line: str, file: TextIO | None = None) -> None:
    """Prints one line, whatever names are in it, to stdout unless `file` is given."""
    print(printable(line), file=file, flush=True)


class Stop:
    """A wish that training ends. Training looks at it after every step, and every few tasks of a validation.

    Anybody may set it: a signal handler, another thread, a notebook.
    """

    def __init__(self):
        self.reason: str | None = None  # such as "SIGTERM"; None: training goes on


class Tasks(NamedTuple):
    """A meta-batch of T tasks (or one task, without the leading axis), float32.

    D is [width] for vectors and [height, width, channels] for images; O is one target or N class scores.
    """

    support_x: tf.Tensor  # [T, N * K, *D]
    support_y: tf.Tensor  # [T, N * K, O]  one-hot for classification
    query_x: tf.Tensor  # [T, N * Q, *D]
    query_y: tf.Tensor  # [T, N * Q, O]

    def checked(self, theta: "Weights") -> "Tasks":
        """Return the tasks as tensors. It runs while a graph is traced, so it costs a step nothing.

        Raise InputError if a part has another dtype or rank than the weights need, or another number of tasks or
        examples than the part it belongs to.
        """
        tasks = Tasks(*map(tf.convert_to_tensor, self))
        (dtype,) = {weight.dtype for weight in theta.values()}
        inputs = max(3, tasks.support_x.shape.rank, tasks.query_x.shape.rank)
        ranks = inputs, 3, inputs, 3
        for name, part, rank in zip(self._fields, tasks, ranks, strict=True):
            if part.dtype != dtype:
                raise InputError(f"{name}: is {part.dtype.name}, but the weights are {dtype.name}; convert it")
            if part.shape.rank != rank:
                raise InputError(
                    f"{name}: has shape {list(part.shape)}, but tasks [T], examples [n], and at least one more axis "
                    f"are needed{', one-hot for classes' if name.endswith('y') else ''}; reshape it"
                )
        pairs = ("support_y", "support_x", 2), ("query_x", "support_x", 1), ("query_y", "query_x", 2)
        for name, beside, axes in pairs:
            shape, other = getattr(tasks, name).shape, getattr(tasks, beside).shape
            if not shape[:axes].is_compatible_with(other[:axes]):
                raise InputError(
                    f"{name}: has shape {list(shape)}, which does not match {list(other)} of {beside}; give the same "
                    "tasks, and one label or target per example"
                )
        return tasks


Weights = dict[str, tf.Tensor]


class Curve(NamedTuple):
    """What adaptation does to each task. Column 0: support set before any update; j: query set after j updates."""

    losses: tf.Tensor  # [T, 1 + steps]
    accuracies: tf.Tensor  # [T, 1 + steps], 0 to 1; [T, 0] where there are no classes


def mse(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Mean squared error over every element of a task (the original's utils.py).

    Args: outputs and targets [n, O], which gives a scalar, or [G, n, O] of a group of tasks, which gives [G].
    Raises InputError where their shapes differ, as do the other losses: TensorFlow would repeat one to fit the other.
    """
    _check_alike(outputs, targets)
    return tf.reduce_mean(tf.square(outputs - targets), [-2, -1])


def xent(logits: tf.Tensor, labels: tf.Tensor, shot: int | None) -> tf.Tensor:
    """Softmax cross-entropy in nats, summed over the examples of a task and divided by K: NOT the mean.

    On the support set of an N-way task it is N times the mean; the original's step sizes are meant for it.
    Args: logits [n, N] and labels one-hot [n, N], which give a scalar, or [G, n, N] of a group of tasks, which give
        [G]; shot K, support examples a class, for support and query alike. None: every example is divided by the number
        of examples that its own class has here. With K of each class that is the same number; with uneven ones every
        class still weighs as much as every other, and alpha keeps its scale.
    Source: the original's utils.py, where update_batch_size is the divisor.
    """
    _check_alike(logits, labels)
    losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits)
    if shot is None:
        return tf.reduce_sum(losses / tf.linalg.matvec(labels, tf.reduce_sum(labels, -2)), -1)
    return tf.reduce_sum(losses, -1) / shot


def mean_xent(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Softmax cross-entropy in nats, the mean over the examples of a task.

    On a support set, K examples of each of N classes, it is xent / N. So mmfewshot's step of 0.01 on it is a step of
    0.01 / N on xent. Shapes as in xent.
    Source: open-mmlab/mmfewshot.
    """
    _check_alike(logits, labels)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, logits), -1)


def accuracy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Computes the share of examples, 0 to 1, whose largest logit is the label's. Shapes as in xent."""
    return tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, -1), tf.argmax(labels, -1)), logits.dtype), -1)


def _check_alike(outputs, labels):
    """Checks that outputs and labels, or targets, have one shape. It runs while a graph is traced: a step is as fast.

    Raises InputError where they have not.
    """
    if not tf.TensorShape(outputs.shape).is_compatible_with(labels.shape):
        raise InputError(
            f"the network's outputs have the shape {list(outputs.shape)} and the labels or targets "
            f"{list(labels.shape)}: give one-hot labels of as many classes, or as many targets"
        )


def statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes mean, population standard deviation, and half width of the mean's 95 % interval, over tasks.

    Args: values [tasks, ...].
    Returns three arrays [...]. Where a task diverged they are infinite or nan.
    Source: the half width is 1.96 * std / sqrt(tasks) in the original's main.py (test), where published intervals come
    from.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    return mean, std, 1.96 * std / np.sqrt(len(values))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written below `folder`, as on a full disk, becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error.strerror or error) from error
    except tf.errors.OpError as error:
        # "...<file>; No space left on device [Op:...]", and sometimes more lines
        reason = error.message.splitlines()[0].rpartition("; ")[2].partition(" [Op:")[0]
        raise _unwritable(folder, reason) from error


def _unwritable(folder, reason):
    return InputError(f"cannot write to {folder} ({reason}): make room there, then give the same command again")


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes the whole file or none: `fill` writes it beside its place, and it is moved in.

    The file beside it is locked until then, so that one whose process was killed is known by its lack of a lock.
    """
    remove_leftovers(path.parent, glob.escape(path.name))
    # Not the process's number: on a shared disk processes in other containers have the same.
    beside = path.with_name(f".{path.name}.{secrets.randbelow(10**10)}")
    try:
        with contextlib.ExitStack() as held:
            with open(beside, "wb") as file:
                with contextlib.suppress(OSError):  # some disks have no locks
                    lock(file)
                    held.callback(os.close, os.dup(file.fileno()))  # with it, the lock outlives `file`
                fill(file)
            move_in(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Removes what write_whole left beside the files of this name, a glob pattern, when its process was killed.

    Where there are no locks nothing is removed. An empty file is left too: its process may be about to lock it.
    """
    with contextlib.suppress(OSError):
        for left in fnmatch.filter(os.listdir(folder), f".{name}.*"):
            path = folder / left
            with contextlib.suppress(OSError):
                status = path.lstat()
                if re.fullmatch(r"\.[0-9]+", path.suffix) and stat.S_ISREG(status.st_mode) and status.st_size:
                    with open(path, "r+b") as file:
                        lock(file)
                        path.unlink()


def lock(file: BinaryIO | int, wait: bool = False) -> None:
    """Locks an open file for this process. Raises BlockingIOError where another has it, OSError without locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no file locks")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def folder_lock(folder: Path, waiting: str = "") -> Iterator[None]:
    """Waits for others that hold it, and says so if it may take long. Where the system has no locks, there is none.

    waiting: the line that it says then.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            held = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, held)
            try:
                lock(held, wait=not waiting)
            except BlockingIOError:
                say(waiting)
                lock(held, wait=True)
        yield


def read_regular(path: Path, most: int) -> bytes:
    """Reads a file that anybody may have put there: a pipe would never end, and so would a device.

    Raises FileNotFoundError, other OSErrors, or ValueError where it is no regular file or has more than `most` bytes.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most:,} bytes")
    return data


def move_in(beside: Path, path: Path) -> None:
    """Moves a finished file into its place, so that a power cut leaves the old one or the new one, whole."""
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    with contextlib.suppress(OSError):  # some systems cannot open a folder, and some disks cannot flush one
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """Lets the first Ctrl-C or SIGTERM stop training after the step at hand. A second one ends the program at once."""
    stop = Stop()

    def note(number, frame):
        stop.reason = signal.Signals(number).name
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
