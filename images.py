"""Image folders to arrays: classes, splits, a cache of decoded pixels, and augmentation.

Augmentation is mmfewshot's: random crops, flips and color changes in training, a center crop at test. A photograph is
kept whole, resized to a square, with its aspect (width / height). A crop is a box of that square: left, top, right,
bottom, from 0 (left, top) to 1. The caller passes all random words, so the same words give the same crop.
Source: open-mmlab/mmfewshot, configs/classification/maml, and the mmcls pipelines that they name.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

from files import InputError, folder_lock, say, write_whole
from recipe import Images

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")  # a split's place is part of the key of its random stream
CACHE_FORMAT = 4
DECODED_AHEAD = 256  # images decoded at most before they are written

CROP_AREA = 0.08, 1.0  # as a fraction of the photograph
CROP_RATIO = 3 / 4, 4 / 3  # width / height
ATTEMPTS = 10  # random boxes to try before taking the largest box in the middle
JITTER = 0.6, 1.4  # factors of brightness, contrast and saturation
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
ORDERS = list(permutations(range(3)))
SHORT_SIDE = 1.15  # of a photograph at test, relative to the crop; rounded down to pixels: 96 for a crop of 84
CROP_WORDS = 2 * ATTEMPTS + 2 + 1 + 3 + 1  # random words per crop: boxes, place, flip, colors and their order
# ImageNet's, of red, green and blue in 0 to 1.
MEAN = np.array([123.675, 116.28, 103.53], np.float32) / 255
STD = np.array([58.395, 57.12, 57.375], np.float32) / 255


class Classes(NamedTuple):
    """The classes of one split, in order of their names: class c is pixels[starts[c] : starts[c] + counts[c]]."""

    names: list[str]
    starts: np.ndarray  # [classes]
    counts: np.ndarray  # [classes]
    pixels: np.ndarray  # uint8 [images, height, width, channels], shared by the splits of one folder
    aspects: np.ndarray | None = None  # [images], width / height before they were resized; None: not augmented

    def check(self, split: str, folder: Path, way: int, examples: int) -> None:
        """Raise InputError unless tasks of `way` classes with K + Q = `examples` images per class can be drawn."""
        if len(self.names) < way:
            raise InputError(
                f"--num_classes={way}: the {split} split of {folder} has {len(self.names)} classes; "
                "lower it, or add classes"
            )
        smallest = int(np.argmin(self.counts))
        if self.counts[smallest] < examples:
            raise InputError(
                f"{folder}: class {self.names[smallest]} ({split}) has {self.counts[smallest]} images, but a task "
                f"takes {examples} per class (support and query); add images, remove that class, or lower "
                "--update_batch_size or --num_query"
            )

    def named(self, names: list[str]) -> "Classes":
        """Return the classes with these names, in order of their names. The pixels stay shared."""
        chosen = set(names)
        index = [i for i, name in enumerate(self.names) if name in chosen]
        names = [self.names[i] for i in index]
        return self._replace(names=names, starts=self.starts[index], counts=self.counts[index])


# -- folders and splits -----------------------------------------------------------------------------------------------


def load_splits(images: Images, folder: Path, splits: tuple[str, ...]) -> dict[str, Classes]:
    """Return the classes of each wanted split, their images decoded.

    Splits that lie in one folder share its pixels.
    Raise InputError if the folder, a split, a class folder or an image is not as `images` says.
    """
    if not os.path.isdir(folder):
        raise InputError(
            f"{folder}: no such data folder; prepare it as {images.prepare} says, or choose another with --data_path"
            " (--test_data_path for --test_datasource)"
        )
    if images.split_sizes is None and images.split_list is None:
        return {split: _load_classes(images, folder, split) for split in splits}
    sizes = ",".join(map(str, images.split_sizes or ()))
    if sizes and (images.split_list or any(os.path.isdir(folder / split) for split in SPLITS)):
        has = "a published split" if images.split_list else "the folders train, val or test"
        raise InputError(f"--split={sizes}: {folder} has {has} already; leave --split out")
    classes = _load_classes(images, folder, ".")
    if sizes:
        if sum(images.split_sizes) != len(classes.names):
            raise InputError(
                f"--split={sizes}: must add up to the {len(classes.names)} classes of {folder}; change the numbers"
            )
        named = _cut(classes.names, images.split_sizes)
    else:
        # Without folders that hold no images, such as __pycache__: an unknown name would change the whole split.
        filled = [name for name, count in zip(classes.names, classes.counts, strict=True) if count]
        named = _published_splits(filled, ROOT / "data" / "splits" / images.split_list, folder)
    return {split: classes.named(named[split]) for split in splits}


def _cut(names: list[str], sizes: tuple[int, int, int]) -> dict[str, list[str]]:
    """Sort class names, shuffle them with seed 1, and cut them into train, val and test.

    The seed is fixed, so that runs with other seeds are tested on the same classes.
    Source: the original's data_generator.py, which also shuffles with seed 1, but does not sort.
    """
    shuffled = sorted(names)
    Random(1).shuffle(shuffled)
    train, val, _ = sizes
    return {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}


def _published_splits(names: list[str], split_list: Path, folder: Path) -> dict[str, list[str]]:
    """Return the class names of each split by the published list. Print a line if the names differ from it."""
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
    cut = "/".join(map(str, sizes))
    say(f"{folder} has {len(names):,} classes, not the {len(known):,} published: split {cut} by a seed-1 shuffle.")
    return _cut(names, sizes)


def _load_classes(images: Images, folder: Path, split: str) -> Classes:
    """Return the classes of folder/split ('.': of the folder itself), decoded once and cached in folder/.cache."""
    root = os.path.normpath(folder / split)
    files = class_folders(root) if os.path.isdir(root) else {}
    if not any(files.values()):
        raise InputError(
            f"{root}: no images; fill it with class folders of images, as {images.prepare} says"
            + ("" if images.split_list or split == "." else f", or give --split if they lie directly in {folder}")
        )
    names = sorted(files)  # Differs: the original's split and tasks depend on the order in which the disk lists files
    paths = [f"{name}/{file}" for name in names for file in files[name]]
    pixels, broken, aspects = _cached(images, folder, root, paths, "all" if split == "." else split)
    if broken:
        listed = ", ".join(broken[:10]) + (f" and {len(broken) - 10:,} more" if len(broken) > 10 else "")
        say(f"Left out of {root}, {len(broken):,} of {len(paths):,} images, which cannot be read: {listed}")
    left_out = Counter(path.rpartition("/")[0] for path in broken)
    counts = np.array([len(files[name]) - left_out[name] for name in names])
    return Classes(names, np.cumsum(counts) - counts, counts, pixels, np.array(aspects) if images.augment else None)


def class_folders(root: str) -> dict[str, list[str]]:
    """Return the class folders below `root`: name, which is the path from there -> sorted file names of its images.

    An empty folder is a class too, so that an error can name it. Raise InputError if a folder cannot be read.
    """
    return {name: images for name, images, _, leaf in _folders(root) if name and (images or leaf)}


def image_files(root: str) -> list[str]:
    """Return the paths of the images in `root` and below, sorted. Raise as class_folders."""
    return sorted(os.path.join(root, name, file) for name, images, _, _ in _folders(root) for file in images)


def other_files(root: str) -> list[str]:
    """Return the paths of the files in `root` and below whose names are not those of images. Raise as class_folders."""
    return sorted(os.path.join(root, name, file) for name, _, others, _ in _folders(root) for file in others)


def _folders(root: str) -> Iterator[tuple[str, list[str], list[str], bool]]:
    """Yield `root`, with an empty name, and all folders below it: name, sorted images, other files, no folders inside.

    Hidden files and folders are passed over, and so is what macOS adds to archives.
    """

    def refuse(error):
        raise InputError(f"{error.filename}: cannot read ({error.strerror}); make it readable, or remove it") from error

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.islink(folder) and os.path.realpath(folder) in map(os.path.realpath, Path(folder).parents):
            raise InputError(f"{folder}: is a link to a folder above it; remove it")
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        images, others = [], []
        for name in sorted(files):
            if name[0] != ".":
                (images if os.path.splitext(name)[1].lower() in _endings() else others).append(name)
        yield folder[len(root) :].replace(os.sep, "/").strip("/"), images, others, not folders


@functools.cache
def _formats() -> list[str]:
    """Return the image formats that Pillow reads itself: not EPS, for which it would start another program."""
    Image.init()
    return [format for format in Image.OPEN if Image.MIME.get(format, "").startswith("image/")]


@functools.cache
def _endings() -> frozenset[str]:
    formats = _formats()
    return frozenset(ending for ending, format in Image.registered_extensions().items() if format in formats)


# -- the cache --------------------------------------------------------------------------------------------------------


def _cached(
    images: Images, folder: Path, root: str, paths: list[str], name: str
) -> tuple[np.ndarray, list[str], list[float]]:
    """Return the images root/path of all paths, from folder/.cache if it is up to date, else decoded and cached.

    They are three things: their pixels, uint8 [paths, height, width, channels], mapped from the disk if the cache can
    be written; the paths that cannot be read; and, for augmentation, the aspects (width / height) of the others.
    Unreadable images have no row: later rows move up, and the last rows are unused.
    Raise InputError as _decode.
    """
    cache = folder / ".cache"
    if images.any_size:
        name += "_{}x{}x{}".format(*images.stored, images.channels) + "_whole" * images.augment
    array_file, index_file = cache / f"{name}.npy", cache / f"{name}.json"
    shape = (len(paths), *images.stored, images.channels)
    index = {"format": CACHE_FORMAT, "shape": list(shape), "files": _digest(root, paths)}

    def up_to_date():
        try:
            found = json.loads(index_file.read_bytes())
            broken, aspects = found.pop("broken"), found.pop("aspects")
            pixels = np.load(array_file, mmap_mode="r", allow_pickle=False)
            same = found == index and (pixels.shape, pixels.dtype) == (shape, np.uint8)
            return (pixels, broken, aspects) if same and (images.skip_broken or not broken) else None
        except Exception:  # a damaged cache raises nearly every kind of error; decode again
            return None

    def fill(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        end = file.tell() + math.prod(shape)
        index["broken"], index["aspects"] = _decode(images, root, paths, file.write)
        file.truncate(end)
        index_file.unlink(missing_ok=True)  # it describes the array that this one replaces

    if found := up_to_date():
        return found
    try:
        cache.mkdir(exist_ok=True)
        with folder_lock(cache, waiting=f"Another process writes to {cache}: waiting for it."):
            if found := up_to_date():
                return found
            write_whole(array_file, fill)
            write_whole(index_file, lambda file: file.write(json.dumps(index).encode()))
            return np.load(array_file, mmap_mode="r", allow_pickle=False), index["broken"], index["aspects"]
    except OSError as error:
        _say_once(f"The image cache {cache} cannot be written ({error.strerror or error}): decoding at every start.")
    pixels = np.zeros(shape, np.uint8)
    rows = iter(pixels)
    return pixels, *_decode(images, root, paths, lambda image: np.copyto(next(rows), image))


_say_once = functools.cache(say)  # for the splits of one folder together


def _digest(root, paths):
    """Return a checksum of the names, sizes and modification times of the files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(f"{root}/{path}")
            digest.update(b"%s %d %d\n" % (os.fsencode(path), status.st_size, status.st_mtime_ns))
        except OSError:  # reported when the image is decoded
            digest.update(b"%s\n" % os.fsencode(path))
    return digest.hexdigest()


def _decode(
    images: Images, root: str, paths: list[str], put: Callable[[np.ndarray], object]
) -> tuple[list[str], list[float]]:
    """Decode the images root/path in order, on all cores, and pass each to `put`.

    Return the paths of unreadable images, if --skip_broken allows them, and, for augmentation, the aspects of the
    others. Raise InputError if an image cannot be read or has another size than `images` says.
    """

    def decode(path):
        try:
            return read_whole(f"{root}/{path}", images)
        except UnreadableError as error:
            if images.skip_broken:
                return None
            raise InputError(
                f"{root}/{path}: cannot read image ({error.reason}); replace or delete it, or leave out all such "
                "images with --skip_broken"
            ) from error

    broken, aspects = [], []
    with (
        pillow_warnings(say),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc="Decoding images", total=len(paths), disable=None, unit=" images") as bar,
    ):
        for first in range(0, len(paths), DECODED_AHEAD):
            chunk = paths[first : first + DECODED_AHEAD]
            for path, image in zip(chunk, pool.map(decode, chunk), strict=True):
                bar.update()
                if image is None:
                    broken.append(path)
                else:
                    put(image[0])
                    aspects += [image[1]] * images.augment
    return broken, aspects


# -- reading one image ------------------------------------------------------------------------------------------------


class UnreadableError(InputError):
    """A damaged image, or one that Pillow does not read. --skip_broken leaves it out."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def pillow_warnings(tell: Callable[[str], object]) -> Iterator[None]:
    """Pass each kind of Pillow's warnings to `tell` once, as one line. Images above Pillow's size limit are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
    for message, count in Counter(str(warning.message) for warning in caught).items():
        tell(f"Pillow warns of {count:,} images: {message}")


def read_image(path: str | Path, images: Images) -> np.ndarray:
    """Return an image as the tasks of a test have it: for augmentation, its center crop.

    uint8 [height, width, channels] of images.size: upright, gray or RGB, and white where it is transparent.
    Raise InputError if it cannot be read, or has another size and may not be resized.
    """
    image, aspect = read_whole(path, images)
    return center_crops(image[None], np.array([aspect]), images.size)[0] if images.augment else image


def read_whole(path: str | Path, images: Images) -> tuple[np.ndarray, float]:
    """Return a whole image, uint8 [height, width, channels] of images.stored, and its aspect before it was resized.

    Raise as read_image.
    """
    height, width = images.stored
    try:
        with Image.open(path, formats=_formats()) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image = _converted(image, images.channels)
            aspect = image.width / image.height
            if images.any_size and image.size != (width, height):
                image = image.resize((width, height), Image.LANCZOS)
    except Exception as error:  # on damaged files the decoders raise nearly every kind of error
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno:  # the system's, not Pillow's: it may succeed at the next start
            raise InputError(f"{path}: cannot read ({error.strerror}); make it readable, or remove it") from error
        raise UnreadableError(f"{path}: cannot read image ({reason}); replace it, or leave it out", reason) from error
    if image.size != (width, height):
        raise InputError(
            f"{path}: is {image.height}x{image.width} pixels, not {height}x{width}; prepare the folder as "
            f"{images.prepare} says, or resize all images with --image_size"
        )
    return np.asarray(image).reshape(*images.stored, images.channels), aspect


def _converted(image, channels):
    """Return an image in gray (1 channel) or RGB (3), white where it is transparent. Raise ValueError if it cannot."""
    if image.mode.startswith("I;16"):  # 16-bit gray, which Pillow's own conversion would cut at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no white; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


# -- augmentation -----------------------------------------------------------------------------------------------------


def random_crops(pixels: np.ndarray, aspects: np.ndarray, words: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop photographs at random, flip half of them, and change their colors.

    Args:
        pixels: uint8 [n, S, S, 3], photographs in squares.
        aspects: [n], width / height of each before it was a square.
        words: uint64 [n, CROP_WORDS], random.
        size: height and width of a crop in pixels.
    Returns: uint8 [n, height, width, 3].
    """
    uniform = (words >> np.uint64(11)) * 2.0**-53  # [0, 1)
    boxes = random_boxes(uniform[:, : 2 * ATTEMPTS + 2], aspects)
    flips = uniform[:, -5] < 0.5
    factors = JITTER[0] + (JITTER[1] - JITTER[0]) * uniform[:, -4:-1]
    orders = (6 * uniform[:, -1]).astype(int)

    def crop(i):
        image = _crop(pixels[i], boxes[i], size)
        if flips[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for which in ORDERS[orders[i]]:
            image = ENHANCERS[which](image).enhance(factors[i, which])
        return np.asarray(image)

    return _stack(crop, len(pixels))


def center_crops(pixels: np.ndarray, aspects: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop the middle of photographs whose short side is SHORT_SIDE times the crop's. Shapes as in random_crops."""
    boxes = center_boxes(aspects, size)
    return _stack(lambda i: np.asarray(_crop(pixels[i], boxes[i], size)), len(pixels))


def normalize(x: np.ndarray) -> np.ndarray:
    """Convert colors [..., 3] from 0 to 1 to network input: subtract MEAN and divide by STD."""
    return (x - MEAN) / STD


def denormalize(x: np.ndarray) -> np.ndarray:
    """Return the colors from 0 to 1 that `normalize` converted to x [..., 3]."""
    return x * STD + MEAN


def random_boxes(uniform: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Choose a box in each photograph, like mmcls' RandomResizedCrop.

    Areas are uniform within CROP_AREA, and logarithms of width / height within those of CROP_RATIO. The first attempt
    that lies inside the photograph is taken.
    Args:
        uniform: [n, 2 * ATTEMPTS + 2], random, 0 to 1: the area of each attempt, then the shape of each, then the place
            of the box, from left to right and from top to bottom.
        aspects: [n], width / height of the photographs.
    Returns: [n, 4]: left, top, right, bottom, 0 to 1.
    """
    area = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * uniform[:, :ATTEMPTS]
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + (high - low) * uniform[:, ATTEMPTS : 2 * ATTEMPTS])
    # In units of the photograph's height.
    width = np.sqrt(area * aspects[:, None] * ratio)
    height = width / ratio
    inside = (width <= aspects[:, None]) & (height <= 1)
    first = np.arange(len(aspects)), inside.argmax(1)
    any_inside = inside.any(1)
    width = np.where(any_inside, width[first], np.minimum(aspects, CROP_RATIO[1])) / aspects
    height = np.where(any_inside, height[first], np.minimum(1, aspects / CROP_RATIO[0]))
    place = np.where(any_inside[:, None], uniform[:, -2:], 0.5)
    left, top = place[:, 0] * (1 - width), place[:, 1] * (1 - height)
    return np.stack([left, top, left + width, top + height], 1)


def center_boxes(aspects: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the boxes of center_crops, for photographs with these aspects [n]. Shapes as in random_boxes."""
    short = np.array([int(SHORT_SIDE * side) for side in size])
    height, width = (side / max(short) for side in size)  # of a photograph whose short side is 1
    width, height = width / np.maximum(aspects, 1), height * np.minimum(aspects, 1)
    left, top = (1 - width) / 2, (1 - height) / 2
    return np.stack([left, top, left + width, top + height], 1)


def _crop(pixels, box, size):
    """Return a box [4] of a photograph [S, S, 3], resized with Pillow's bilinear filter, which averages."""
    side = len(pixels)
    box = np.clip(box * side, 0, side)
    return Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR, tuple(box.tolist()))


def _stack(crop, count):
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(crop, range(count))))
