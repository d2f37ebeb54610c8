"""Files written whole, locks, and errors that a user can fix. It imports no TensorFlow."""

import contextlib
import errno
import fnmatch
import glob
import json
import os
import re
import secrets
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


MAX_JSON = 10_000_000  # bytes; ours have thousands


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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written below `folder`, as on a full disk, becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error.strerror or error) from error
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if not (tensorflow and isinstance(error, tensorflow.errors.OpError)):
            raise
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


def read_json(path: Path, kind: type, way_out: str, items: type = dict) -> list | dict:
    """A dict, or a list of `items`, in a file that anybody may have written.

    Raises InputError, or FileNotFoundError.
    """
    try:
        found = json.loads(read_regular(path, MAX_JSON))
        if not (isinstance(found, kind) and all(isinstance(one, items) for one in found if kind is list)):
            raise ValueError(f"not a {kind.__name__}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {way_out}") from None
    return found
