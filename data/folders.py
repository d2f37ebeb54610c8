"""Folders on a disk: read without surprises, locked, replaced whole or not at all; and what is said on the terminal.

The rule for a folder that a data script writes into: it replaces only what it made itself, and what is bit for bit
what it was given. Anything else in its way is named, and nothing is written.
"""

import contextlib
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Endings of the two hidden names that lie beside a place while its new content is written and moved in.
WRITTEN = ".being-written"
REPLACED = ".being-replaced"


def _shown(message: object) -> str:
    """The message on one line; what could steer a terminal, as parts of a file's name could, stands as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))


def say(message: str) -> None:
    """Prints one line."""
    encoding = sys.stdout.encoding or "utf-8"
    print(_shown(message).encode(encoding, "backslashreplace").decode(encoding))


def fail(message: str) -> NoReturn:
    """Ends the program: one line on stderr, exit code 1."""
    raise SystemExit(f"error: {_shown(message)}")


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Named pipes, devices and links to them, which may have no end, raise an OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb")


def below(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of all at any depth below `folder` that is no folder, in no order.

    Linked folders are not followed, and are given as they are, as are those that may not be read.
    """
    waiting = [str(folder)]
    while waiting:
        current = waiting.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        yield Path(entry.path).relative_to(folder).as_posix(), Path(entry.path)
        except PermissionError:
            yield Path(current).relative_to(folder).as_posix(), Path(current)


def is_folder(path: Path) -> bool:
    """Whether this is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def refuse_others(place: Path, replaceable: Callable[[str, Path], bool]) -> None:
    """Fails where `place`, if it is there, is no folder, or has a file whose name and path are not `replaceable`."""
    if not os.path.lexists(place):
        return
    if not is_folder(place):
        fail(f"{place} is a link or a file where a folder of images is to be: move it away")
    if others := sorted(name for name, path in below(place) if not replaceable(name, path)):
        which = f"{len(others):,} other files, {others[0]} the first"
        fail(f"{place} has {which}: move that folder away, or give another --out")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and lets no other data script write into it. A killed process's lock is free."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)  # the folder itself: a file for the lock would lie about afterwards
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder} is in use, another data script writes into it: wait for that one, or give another --out")
        except OSError as error:  # some network disks have no locks
            say(f"{folder} cannot be locked ({error.strerror}): see that no other data script writes into it")
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def moved_in(place: Path) -> Iterator[Path]:
    """Yields an empty folder beside `place`. After the block it replaces `place`; what was there is deleted.

    After an error in the block `place` is as it was. Killed at any point, `place` holds, after `recover`,
    either all that it held before or all that is new.
    """
    written, replaced = (place.with_name(f".{place.name}{ending}") for ending in (WRITTEN, REPLACED))
    written.mkdir(parents=True)
    try:
        yield written
        if place.exists():
            os.rename(place, replaced)
        os.rename(written, place)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    if replaced.exists():
        shutil.rmtree(replaced)


def recover(folder: Path) -> None:
    """Clears up in `folder` after a killed process: what is half-written goes, what lay there returns."""
    for replaced in folder.glob(f".*{REPLACED}"):
        place = folder / replaced.name[1 : -len(REPLACED)]
        if place.exists():
            remove(replaced)
        else:
            os.rename(replaced, place)
    for written in folder.glob(f".*{WRITTEN}"):
        remove(written)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there."""
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
