"""What the data scripts share: archives read safely, folders moved in whole, counts, errors of one line."""

import contextlib
import io
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from PIL import Image

File = Path | zipfile.Path  # both have read_bytes(), and print as a path that a reader can follow

MAX_FILE = 32 * 2**20  # bytes of one unpacked file; the largest photograph of ImageNet has half of it
MAX_TOTAL = 32 * 2**30  # bytes of all files unpacked; MiniImagenet at full size has a quarter of it

# Endings of the two hidden folders that lie beside a place while its new content is written and moved in.
WRITTEN = ".being-written"
REPLACED = ".being-replaced"


def fail(message: str) -> NoReturn:
    """Ends the program: one line on stderr, exit code 1."""
    raise SystemExit(f"error: {message}")


def run(main: Callable[[], None]) -> None:
    """Calls a script's `main`; a file system that refuses, and Ctrl-C, end in one line too."""
    try:
        main()
    except OSError as error:
        fail(f"{error}; what is finished is kept: clear the cause, then give the same command again")
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: the same command goes on from there")


def files(source: Path) -> dict[str, File]:
    """Every file of a folder, or of a zip archive, which is read where it lies and never unpacked.

    Returns the files by relative name, separated by "/", in sorted order. Linked folders are not followed.
    Fails where there is nothing, on a truncated archive, and on an archive with any member whose path is
    absolute or leads out of it, that is a link, or that declares over MAX_FILE bytes (all: MAX_TOTAL).
    """
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.is_file())
        return {path.relative_to(source).as_posix(): path for path in found}
    if not source.exists():
        fail(f"{source}: no such file or folder")
    try:
        opened = zipfile.ZipFile(source)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        fail(f"{source} is not a whole zip archive ({error}): fetch it again")
    members = opened.infolist()
    for member in members:
        if reason := _refusal(member):
            fail(f"{source} is refused, nothing was unpacked: {member.filename!r} {reason}")
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL:
        fail(f"{source} is refused, nothing was unpacked: {total:,} bytes unpacked, limit {MAX_TOTAL:,}")
    names = sorted(member.filename for member in members if not member.is_dir())
    return {name: zipfile.Path(opened, name) for name in names}


def _refusal(member: zipfile.ZipInfo) -> str:
    """Why a member is not to be trusted; empty when it is."""
    name = member.filename.replace("\\", "/")
    if name.startswith("/") or name[1:2] == ":":
        return "is an absolute path"
    if ".." in name.split("/"):
        return "leads out of the archive"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    # Of other methods zipfile unpacks a whole block at once, however much more it holds than was declared.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed by another method than deflate"
    if member.file_size > MAX_FILE:
        return f"has {member.file_size:,} bytes unpacked, limit {MAX_FILE:,}"
    return ""


def read_image(file: File) -> Image.Image:
    """The decoded PNG or JPEG image, in its own mode; fails with the file's name where it cannot be read."""
    try:
        image = Image.open(io.BytesIO(file.read_bytes()), formats=("PNG", "JPEG"))
        image.load()
    except Exception as error:  # on damaged files the decoders and zipfile raise nearly every kind there is
        fail(f"{file} is damaged or not a PNG or JPEG image ({type(error).__name__}): fetch it again")
    return image


def finished(folder: Path, names: Iterable[str], size: tuple[int, int]) -> bool:
    """Whether `folder` has every one of the named images at this (width, height); only headers are read."""

    def fits(path: Path) -> bool:
        with Image.open(path) as image:
            return image.size == size

    try:
        return all(fits(folder / name) for name in names)
    except OSError:
        return False


@contextlib.contextmanager
def moved_in(place: Path) -> Iterator[Path]:
    """Yields an empty folder beside `place`, which takes its place, and all that was there, after the block.

    After an error in the block `place` is as it was. Killed at any point, `place` holds, after `recover`,
    either all that it held before or all that is new.
    """
    if place.is_symlink() or place.is_file():
        fail(f"{place} is a link or a file where a folder of images is to be: move it away")
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
    """Clears up in `folder` after a killed `moved_in`: what is half-written goes, what lay there returns."""
    for replaced in folder.glob(f".*{REPLACED}"):
        place = folder / replaced.name[1 : -len(REPLACED)]
        if place.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, place)
    for written in folder.glob(f".*{WRITTEN}"):
        shutil.rmtree(written)


def print_counts(found: dict[str, int], expected: dict[str, int]) -> None:
    """Prints every count beside the published one; a difference is said aloud, but is no error."""
    for what, number in expected.items():
        remark = "" if found[what] == number else "  <- not the published number"
        print(f"{what}: {found[what]:,} found, {number:,} expected{remark}")
