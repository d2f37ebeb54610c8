"""Whole-file writes, locks, and errors that a user can fix. Imports no TensorFlow."""

import contextlib
import errno
import json
import os
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

SPELLINGS = {  # spelling of a split, in lower case, in names of folders and files -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not downloaded


class InputError(Exception):
    """A one-line error that the user can fix: `<flag or path>: <what is wrong>; <what to do>`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(value: object) -> str:
    """Return the value on one line, with newlines, terminal commands and undecodable bytes escaped."""

    def escaped(character):
        if character.isprintable() or unicodedata.category(character) == "Zs":  # any kind of space
            return character
        return character.encode("unicode_escape").decode()

    return "".join(map(escaped, str(value)))


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form, so that spellings of one name sort and compare alike.

    macOS and archives made there write "é" as two characters, most other systems as one.
    """
    return unicodedata.normalize("NFC", name)


def user_path(text: str) -> Path:
    """Return the path of a flag. `~` is the home folder, which shells do not expand in --flag=~/folder."""
    return Path(os.path.expanduser(text))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError unless the value of `name` is one of the choices."""
    if value not in choices:
        raise InputError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line to `file` (default: stdout), with unprintable characters escaped."""
    print(printable(line), file=file, flush=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write at or below `path`, such as on a full disk, into an InputError."""
    try:
        yield
        return
    except OSError as error:
        cause, reason = error, error.strerror or error
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if not (tensorflow and isinstance(error, tensorflow.errors.OpError)):
            raise
        # "...<file>; No space left on device [Op:...]", sometimes followed by more lines
        cause, reason = error, error.message.splitlines()[0].rpartition("; ")[2].partition(" [Op:")[0]
    raise InputError(f"{path}: cannot write ({reason}); {_remedy(reason)}, then run the same command again") from cause


def os_error(error: OSError) -> str:
    """Return the line for an OSError: the path, or the stream that cannot be written, and the system's reason."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream:
                print(file=stream, flush=True)  # fails again
        except OSError as again:
            with contextlib.suppress(OSError):  # a notebook's stream is no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python reports it again when it exits
            return (
                f"{name}: cannot write ({again.strerror}); {_remedy(again.strerror)}, then run the same command again"
            )
    return error.strerror or str(error)


def _remedy(reason):
    """Return what to do about the system's reason for a failed write."""
    if reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
        return "free space there"
    if reason == os.strerror(errno.ENOENT):
        return "put it back"
    return "make it writable"


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file under a hidden name, then move it into place, so `path` is never partially written.

    A process that is killed meanwhile may leave the hidden file behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp: only the owner can read its files
    try:
        with open(temporary, "xb") as file:
            fill(file)
        move_in(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_in(temporary: Path, path: Path) -> None:
    """Move a finished file into place. Even a power cut leaves either the old file or the new one, complete."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path, kind: type, fix: str, items: type = dict) -> list | dict:
    """Return the dict, or the list of `items`, in a JSON file.

    Raise FileNotFoundError, or InputError if the file cannot be read or is damaged. Then it ends in `fix`.
    """
    content = b""
    try:
        content = path.read_bytes()
        value = json.loads(content)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, items) for item in value)):
            raise ValueError(f"not a {kind.__name__}")
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # the folder is a file
        raise FileNotFoundError(error.errno, error.strerror, error.filename) from None
    except PermissionError as error:
        raise unreadable(path, error) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except (ValueError, RecursionError) as error:
        what = "is a Git LFS pointer" if content.startswith(LFS_POINTER) else f"is damaged ({error})"
        raise InputError(f"{path}: {what}; {fix}") from None
    return value


def unreadable(path: Path | str, error: PermissionError) -> InputError:
    """Return the error for a file or folder that may not be read."""
    return InputError(f"{path}: cannot be read ({error.strerror}); ask its owner for permission to read it")


def is_folder(path: Path | str) -> bool:
    """Return whether a path is a folder. Raise InputError if permissions hide that."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return False


def lock(file: BinaryIO | int, wait: bool = False) -> None:
    """Lock an open file. Raise BlockingIOError if another process holds the lock, OSError if locks are unsupported."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "file locks are not supported on this system")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def folder_lock(folder: Path, waiting: str = "") -> Iterator[None]:
    """Lock a folder, if locks are supported. Print `waiting` before waiting for another process."""
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
