"""Images on disk: the folders of classes, their splits, and a cache of the decoded pixels beside them."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import augment
import devices
from files import InputError, folder_lock, read_regular, remove_leftovers, say, write_whole
from recipe import Images

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")  # a split's place is part of the key of its random stream
CACHE_FORMAT = 3
DECODED_AT_ONCE = 1000  # images that the decoding threads may be ahead of the file that is written
BYTES_AT_ONCE = 2**28  # the same in bytes
MOST_INDEX = 10**8  # bytes of a cache's index, which names the broken images
MOST_SIDE = 10**6  # pixels: to resize one side takes 48 bytes for each of its pixels, so 48 MB here
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million, Pillow's own limit for one image; here for all threads together
# Why the system does not open a file, where that stays so until the file changes. Of other reasons the next start may
# find nothing: the disk was away, or too many files were open.
LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}


class Classes(NamedTuple):
    """The classes of one split, in order of their names: class c is pixels[starts[c] : starts[c] + counts[c]]."""

    names: list[str]
    starts: np.ndarray  # [classes]
    counts: np.ndarray  # [classes]
    pixels: np.ndarray  # uint8 [images, height, width, channels], shared by the splits of one folder
    aspects: np.ndarray | None = None  # [images], width / height before they were resized; None: not augmented

    def check(self, split: str, folder: Path, way: int, examples: int) -> None:
        """Checks that tasks of `way` classes with K + Q = `examples` images a class can be drawn.

        Raises InputError where they cannot. split and folder are named in its message.
        """
        if len(self.names) < way:
            raise InputError(
                f"--num_classes={way}, but the {split} split of {folder} has {len(self.names)} classes: "
                "lower it, or add classes"
            )
        smallest = int(np.argmin(self.counts))
        if self.counts[smallest] < examples:
            raise InputError(
                f"class {self.names[smallest]} ({split}) in {folder} has {self.counts[smallest]} images, but a task "
                f"takes {examples} of each class (support and query): add images, remove that class, or lower "
                "--update_batch_size or --num_query"
            )

    def named(self, names: list[str]) -> "Classes":
        """Gives the classes of these names alone, in order of their names. The pixels stay shared."""
        chosen = set(names)
        index = [i for i, name in enumerate(self.names) if name in chosen]
        names = [self.names[i] for i in index]
        return self._replace(names=names, starts=self.starts[index], counts=self.counts[index])


def load_splits(images: Images, folder: Path, splits: tuple[str, ...]) -> dict[str, Classes]:
    """Reads the classes of a data set, split by split, their images decoded.

    Args:
        images: what the data set has on disk.
        folder: where it is.
        splits: those that are wanted, of SPLITS.
    Returns the classes of each wanted split. Where one folder holds the classes of all splits, they share its pixels.
    Raises InputError where the folder, a split, a class folder or an image is not as `images` says.
    """
    if not os.path.isdir(folder):
        raise InputError(
            f"no data folder {folder}: prepare it as {images.prepare} says, or name another with --data_path"
            " (--test_data_path for --test_datasource)"
        )
    if images.split_sizes is None and images.split_list is None:
        return {split: _load_classes(images, folder, split) for split in splits}
    if images.split_sizes and (images.split_list or any(os.path.isdir(folder / split) for split in SPLITS)):
        raise InputError(
            f"--split={_listed(images.split_sizes)} is for class folders that are not split yet, but {folder} has "
            f"{'a published split' if images.split_list else 'the folders train, val or test'}: leave --split out"
        )
    classes = _load_classes(images, folder, ".")
    if images.split_sizes:
        if sum(images.split_sizes) != len(classes.names):
            raise InputError(
                f"--split={_listed(images.split_sizes)} is {sum(images.split_sizes)} classes, but {folder} has "
                f"{len(classes.names)}: give three numbers of that sum"
            )
        named = _cut(classes.names, images.split_sizes)
    else:
        # Without those that have no images, such as the __pycache__ of a script in the folder: a name that is not
        # published would split all classes anew.
        filled = [name for name, count in zip(classes.names, classes.counts, strict=True) if count]
        named = _published_splits(filled, ROOT / "data" / "splits" / images.split_list, folder)
    return {split: classes.named(named[split]) for split in splits}


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _cut(names: list[str], sizes: tuple[int, int, int]) -> dict[str, list[str]]:
    """Cuts names of classes into splits of these sizes: train, val, test. They are sorted, and shuffled by seed 1.

    The seed is always that one, so that runs of other seeds are tested on the same classes.
    Source: the original's data_generator.py, which shuffles by seed 1 too, but does not sort.
    """
    shuffled = sorted(names)
    Random(1).shuffle(shuffled)
    train, val, _ = sizes
    return {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}


def _published_splits(names: list[str], split_list: Path, folder: Path) -> dict[str, list[str]]:
    """Finds the names of the classes of each split, by the published list; where they are others, a line says so."""
    published = json.loads(split_list.read_bytes())
    published = {split: published[split] for split in SPLITS}
    known = set().union(*published.values())
    if set(names) == known:
        return published
    if set(names) <= known:
        say(f"{folder} has {len(names):,} of the {len(known):,} published classes: each stays in its published split.")
        return published
    # The published list is itself cut by this rule.
    train, val = (round(len(names) * len(published[split]) / len(known)) for split in ("train", "val"))
    sizes = (train, val, len(names) - train - val)
    shown = "/".join(map(str, sizes))
    say(f"{folder} has {len(names):,} classes, not the {len(known):,} published: split {shown} by a seed-1 shuffle.")
    return _cut(names, sizes)


def _load_classes(images: Images, folder: Path, split: str) -> Classes:
    """Reads the class folders below folder/split ('.': the folder itself), decoded once and kept in folder/.cache."""
    root = os.path.normpath(folder / split)
    files = class_folders(root) if os.path.isdir(root) else {}
    if not any(files.values()):
        raise InputError(
            f"no images in {root}: expected class folders of images there, as {images.prepare} says"
            + ("" if images.split_list or split == "." else f"; if they lie directly in {folder}, give --split")
        )
    names = sorted(files)  # Differs: the original takes the disk's order, and its split and tasks with it
    paths = [f"{name}/{file}" for name in names for file in files[name]]
    pixels, broken, aspects = _cached(images, folder, root, paths, "all" if split == "." else split)
    if broken:
        shown = ", ".join(broken[:10]) + (f" and {len(broken) - 10:,} more" if len(broken) > 10 else "")
        say(f"Left out of {root}, {len(broken):,} of {len(paths):,} images, which cannot be read: {shown}")
    left_out = Counter(path.rpartition("/")[0] for path in broken)
    counts = np.array([len(files[name]) - left_out[name] for name in names])
    return Classes(names, np.cumsum(counts) - counts, counts, pixels, np.array(aspects) if images.augment else None)


def class_folders(root: str) -> dict[str, list[str]]:
    """Finds the class folders below `root`: name, which is the path from there -> sorted file names of its images.

    A class folder holds images, or nothing at all: that its class is too small is told later. Hidden ones are passed
    over. Raises InputError where a folder cannot be read, or is a link to one above it.
    """
    return {name: files for name, files in _folders(root) if name}


def image_files(root: str) -> list[str]:
    """Finds the images in `root` and in the folders below it: their paths, sorted. Raises as class_folders."""
    return sorted(os.path.join(root, name, file) for name, files in _folders(root) for file in files)


def other_files(root: str) -> list[str]:
    """Finds, as image_files does, the files that by their names are no images which can be read."""
    found = _folders(root, lambda entry: entry.is_file() and not _is_image(entry))
    return sorted(os.path.join(root, name, file) for name, files in found for file in files)


def _folders(root: str, wanted: Callable[[os.DirEntry], bool] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Finds `root`, whose name is empty, and all folders below it, of those that hold images or nothing at all.

    wanted: tells which files count, if not images.
    Yields the name of each, and the sorted names of its images. Raises as class_folders.
    """
    pending = [(root, "", frozenset())]
    while pending:
        folder, name, above = pending.pop()
        real = os.path.realpath(folder)
        if real in above:
            raise InputError(f"{folder} is a link to {real}, a folder above it: remove it")
        try:
            entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
            folders = [entry for entry in entries if entry.is_dir()]
            files = sorted(entry.name for entry in entries if (wanted or _is_image)(entry))
        except OSError as error:
            raise InputError(
                f"cannot read {error.filename} ({error.strerror}): make it readable, or remove it"
            ) from error
        if files or not folders:
            yield name, files
        pending += [(entry.path, f"{name}/{entry.name}".lstrip("/"), above | {real}) for entry in folders]


def _is_image(entry: os.DirEntry) -> bool:
    """Tells by its name whether an entry is an image. A link that leads nowhere counts: who reads it tells of it."""
    ending = os.path.splitext(entry.name)[1].lower()
    return ending in _endings() and (entry.is_file() or not os.path.exists(entry.path))


@functools.cache
def _formats() -> list[str]:
    """The image formats that Pillow reads by itself: not EPS, for which it would start another program."""
    Image.init()
    return [format for format in Image.OPEN if Image.MIME.get(format, "").startswith("image/")]


@functools.cache
def _endings() -> frozenset[str]:
    formats = _formats()
    return frozenset(ending for ending, format in Image.registered_extensions().items() if format in formats)


def _cached(
    images: Images, folder: Path, root: str, paths: list[str], name: str
) -> tuple[np.ndarray, list[str], list[float]]:
    """Reads the images root/path of all paths: from folder/.cache where its files are still true, else decoded.

    Returns their pixels, uint8 [paths, height, width, channels], mapped from the disk where the cache can be written;
    the paths that cannot be read; and, where images are augmented, the aspects (width / height) of the others. Images
    that cannot be read have no row: the rows after them have moved up, and the last rows mean nothing.
    Raises InputError as _decode.
    """
    cache = folder / ".cache"
    if images.any_size:
        name += "_{}x{}x{}".format(*images.stored, images.channels) + "_whole" * images.augment
    array_file, index_file = cache / f"{name}.npy", cache / f"{name}.json"
    shape = (len(paths), *images.stored, images.channels)
    index = {"format": CACHE_FORMAT, "shape": list(shape), "files": _digest(root, paths)}

    for pattern in ("*.npy", "*.json"):
        remove_leftovers(cache, pattern)

    def kept():
        """What the cache has; None where there is none yet, or another, or a damaged one: it is made anew."""
        try:
            found = json.loads(read_regular(index_file, MOST_INDEX))
            broken, checksum, aspects = found.pop("broken"), found.pop("checksum"), found.pop("aspects", [])
            whole = len(aspects) == (len(paths) - len(broken)) * images.augment
            if found == index and whole and set(broken) <= set(paths) and (images.skip_broken or not broken):
                pixels = _mapped(array_file, shape)
                if zlib.crc32(pixels[: len(paths) - len(broken)]) == checksum:  # 0.24 s a GB on one core
                    return pixels, broken, _as_aspects(aspects)
        except Exception:  # a damaged one raises nearly every kind there is
            pass
        return None

    if found := kept():
        return found
    try:
        cache.mkdir(exist_ok=True)
        # Of several processes that start at once, one decodes.
        with folder_lock(cache, waiting=f"Another process writes to {cache}: waiting for it."):
            if found := kept():
                return found
            _check_room(cache, math.prod(shape))
            broken, aspects = [], []

            def decode(file):
                index["checksum"] = _write_array(file, images, root, paths, shape, broken, aspects)

            write_whole(array_file, decode)
            record = json.dumps(index | {"broken": broken} | ({"aspects": aspects} if images.augment else {}))
            write_whole(index_file, lambda file: file.write(record.encode()))
            return _mapped(array_file, shape), broken, aspects
    except OSError as error:
        reason = error.strerror or str(error)
    needed, memory = math.prod(shape), devices.memory()
    if needed > memory:
        raise InputError(
            f"the image cache {cache} cannot be written ({reason}), and its {needed / 1e9:,.1f} GB are more than the "
            f"memory, which has {memory / 1e9:,.1f} GB: make room there, and let it be written, or lower --image_size"
        )
    _tell_once(f"The image cache {cache} cannot be written ({reason})")
    pixels = np.zeros(shape, np.uint8)
    row, aspects = iter(pixels), []
    broken = _decode(images, root, paths, lambda image: np.copyto(next(row), image), aspects)
    return pixels, broken, aspects


def _check_room(cache, needed):
    """Raises OSError where the disk has not so many bytes: what will not fit is not decoded twice."""
    disk = shutil.disk_usage(cache)
    if disk.free < needed and disk.total:  # some network disks say that they have nothing at all
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:,.1f} GB, and the disk has {disk.free / 1e9:,.1f} GB left")


def _as_aspects(found):
    """Gives the aspects of a cache's index, which anybody may have written. Raises ValueError where one is none."""
    if not all(isinstance(one, float | int) and 1 / MOST_SIDE <= one <= MOST_SIDE for one in found):
        raise ValueError("an aspect is none")
    return found


def _digest(root, paths):
    """Makes a checksum of the names, sizes and times of all files.

    The time of change is among them, which no program can set. So a file that was replaced by one of the same size and
    time of modification is noticed. In a copy of the folder those times are others, and it is decoded anew.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(f"{root}/{path}")
            times = status.st_mtime_ns, status.st_ctime_ns
            digest.update(b"%s %d %d %d\n" % (os.fsencode(path), status.st_size, *times))
        except OSError:  # told where it is decoded
            digest.update(b"%s\n" % os.fsencode(path))
    return digest.hexdigest()


def _mapped(file, shape):
    """Maps the array of a cache from the disk, uint8 of this shape. Raises ValueError where it is another file."""
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    pixels = np.load(file, mmap_mode="r", allow_pickle=False)
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(f"{file} is another array")
    return pixels


@functools.cache
def _tell_once(reason):
    """Says it in one line, and once, though each split has an array of its own."""
    say(f"{reason}: the images are decoded anew at every start.")


def _write_array(file, images, root, paths, shape, broken, aspects):
    """Writes an .npy file of the images, one image at a time, since a data set may be larger than the memory.

    Adds to the lists `broken` and `aspects` as _decode. Returns the checksum of the images that are written.
    """
    checksum = 0

    def put(image):
        nonlocal checksum
        checksum = zlib.crc32(image, checksum)
        file.write(image)

    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    end = file.tell() + math.prod(shape)
    broken += _decode(images, root, paths, put, aspects)
    file.truncate(end)
    return checksum


class UnreadableError(InputError):
    """An image that cannot be read by a fault of its own; --skip_broken leaves it out."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


def _decode(
    images: Images, root: str, paths: list[str], put: Callable[[np.ndarray], object], aspects: list[float]
) -> list[str]:
    """Decodes the images root/path in order, on all cores, and gives each to `put`.

    Where images are augmented, their aspects are added to the list `aspects`.
    Returns the paths of the images that cannot be read, if --skip_broken allows them. Raises InputError otherwise, and
    where an image has another size than `images` says.
    """

    def decode(path):
        at.path = path
        try:
            return read_whole(f"{root}/{path}", images)
        except UnreadableError as error:
            if images.skip_broken:
                return None
            raise InputError(
                f"cannot read image {root}/{path} of class {os.path.basename(os.path.dirname(f'{root}/{path}'))}: "
                f"{error.reason}; replace or delete it, or leave out all such images with --skip_broken"
            ) from error

    broken, at = [], threading.local()
    ahead = max(1, min(DECODED_AT_ONCE, BYTES_AT_ONCE // (math.prod(images.stored) * images.channels)))
    with (
        warnings_in_a_line(at, say, f" in {root}"),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc="Decoding images", total=len(paths), disable=None, unit=" images") as bar,
    ):
        for first in range(0, len(paths), ahead):
            some = paths[first : first + ahead]
            for path, image in zip(some, pool.map(decode, some), strict=True):
                bar.update()
                if image is None:
                    broken.append(path)
                else:
                    put(image[0])
                    if images.augment:
                        aspects.append(image[1])
    return broken


@contextlib.contextmanager
def warnings_in_a_line(at: threading.local, tell: Callable[[str], object], where: str = "") -> Iterator[None]:
    """Tells in one line each thing that Pillow warns of, however many images it is.

    at.path: what a thread reads. tell: what prints a line. where: stands behind the path.
    """
    warned = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image has limits of its own
        warnings.showwarning = lambda message, *_: warned[str(message)].append(getattr(at, "path", "?"))
        yield
    for message, paths in warned.items():
        others = f" and {len(paths) - 1:,} others" if len(paths) > 1 else ""
        tell(f"Pillow warns of {paths[0]}{others}{where}: {message}")


class _Room:
    """An amount that threads share. A thread takes a part, waits if so much is not there, and gives it back."""

    def __init__(self, size: int):
        self.left, self.changed = size, threading.Condition()

    @contextlib.contextmanager
    def taken(self, part: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: part <= self.left)
            self.left -= part
        try:
            yield
        finally:
            with self.changed:
                self.left += part
                self.changed.notify_all()


ROOM = _Room(MOST_PIXELS)  # so that many large images at once are no more than one


def read_image(path: str | Path, images: Images) -> np.ndarray:
    """Reads an image as the tasks of a test have it.

    Returns uint8 [height, width, channels] of images.size: upright, grey or RGB, and white where it is transparent;
    where tasks are augmented, its centre crop.
    Raises InputError where it cannot be read, or has another size and may not be resized.
    """
    image, aspect = read_whole(path, images)
    if not images.augment:
        return image
    return augment.centre_crops(image[None], np.array([aspect]), images.size)[0]


def read_whole(path: str | Path, images: Images) -> tuple[np.ndarray, float]:
    """Reads an image whole, as the cache keeps it.

    Returns uint8 [height, width, channels] of images.stored, and its aspect, width / height, before it is resized.
    Raises InputError as read_image.
    """
    height, width = images.stored
    try:
        with Image.open(path, formats=_formats()) as image:
            pixels = math.prod(image.size)
            if pixels > MOST_PIXELS or max(image.size) > MOST_SIDE:
                raise ValueError(f"it says that it has {image.height:,} x {image.width:,} pixels, too many to decode")
            with ROOM.taken(pixels):
                if images.any_size and pixels > Image.MAX_IMAGE_PIXELS:  # a JPEG can be decoded smaller
                    image.draft(None, (4 * width, 4 * height))
                ImageOps.exif_transpose(image, in_place=True)
                image = _in_colours(image, images.channels)
                aspect = image.width / image.height
                if images.any_size and image.size != (width, height):
                    image = image.resize((width, height), Image.LANCZOS)
    except Exception as error:  # on damaged files the decoders raise nearly every kind there is
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno not in {None, *LASTING}:  # Pillow's own have no number
            raise InputError(
                f"cannot read image {path} ({error.strerror}), which is no fault of the image: see to the disk, or to "
                "the limit of open files, and give the same command again"
            ) from error
        message = f"cannot read image {path}: {reason}; replace it, or leave it out"
        raise UnreadableError(message, reason) from error
    if image.size != (width, height):
        raise InputError(
            f"image {path} is {image.height}x{image.width} pixels, not {height}x{width}: prepare the folder as "
            f"{images.prepare} says, or have all images resized with --image_size"
        )
    return np.asarray(image).reshape(*images.stored, images.channels), aspect


def _in_colours(image, channels):
    """Makes an image grey (1 channel) or RGB (3), and white where it is transparent. Raises ValueError if it cannot."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow's own conversion would cut at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no white; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
