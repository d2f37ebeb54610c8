"""Whole-file writes, locks, and errors that a user can fix. Imports no TensorFlow."""

import contextlib
import errno
import json
import os
import secrets
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class InputError(Exception):
    """An error that the user can fix, in one line: `<flag or path>: <what is wrong>; <what to do>`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(value: object) -> str:
    """Return the value on one line, with newlines, terminal commands and undecodable bytes escaped."""

    def escaped(character):
        if character.isprintable() or unicodedata.category(character) == "Zs":  # any kind of space
            return character
        return character.encode("unicode_escape").decode()

    return "".join(map(escaped, str(value)))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError unless the value of `name` is one of the choices."""
    if value not in choices:
        raise InputError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line, to stdout unless `file` is given, with the names in it escaped."""
    print(printable(line), file=file, flush=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write at or below `path`, such as a full disk, into an InputError."""
    try:
        yield
        return
    except OSError as error:
        cause, reason = error, error.strerror or error
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if not (tensorflow and isinstance(error, tensorflow.errors.OpError)):
            raise
        # "...<file>; No space left on device [Op:...]", sometimes with more lines
        cause, reason = error, error.message.splitlines()[0].rpartition("; ")[2].partition(" [Op:")[0]
    raise InputError(f"{path}: cannot write ({reason}); free space there, then run the same command again") from cause


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file under a hidden name and move it into place, so that `path` is never half a file.

    A process that is killed here may leave the hidden file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp, whose files only the owner reads
    try:
        with open(temporary, "xb") as file:
            fill(file)
        move_in(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_in(temporary: Path, path: Path) -> None:
    """Move a finished file into place, so that even a power cut leaves the old file or the new one, whole."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path, kind: type, fix: str, items: type = dict) -> list | dict:
    """Return the dict, or the list of `items`, in a JSON file.

    Raise FileNotFoundError, or InputError with the way to fix a damaged file.
    """
    try:
        found = json.loads(path.read_bytes())
        if not (isinstance(found, kind) and all(isinstance(item, items) for item in found if kind is list)):
            raise ValueError(f"not a {kind.__name__}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged ({error}); {fix}") from None
    return found


def lock(file: BinaryIO | int, wait: bool = False) -> None:
    """Lock an open file for this process. Raise BlockingIOError if another has it, OSError if there are no locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no file locks")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def folder_lock(folder: Path, waiting: str = "") -> Iterator[None]:
    """Lock a folder, or do nothing if the system has no locks. Print `waiting` before waiting for another process."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                lock(descriptor)
            except BlockingIOError:
                if waiting:
                    say(waiting)
                lock(descriptor, wait=True)
        yield
