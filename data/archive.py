"""Shared by the data scripts: flags, downloads, safe reading of archives and pickles, and class folders."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import sys
import tarfile
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, NamedTuple

import numpy as np
import requests
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files import InputError, printable, say

SPLITS = ("train", "val", "test")
MARKER = ".prepared"  # in an output folder: the name of the data set that a script wrote there
FORMATS = ("PNG", "JPEG")


class Member(NamedTuple):
    """A file in an archive. It reads and prints like a Path; nothing is ever unpacked to the disk."""

    path: str
    opener: Callable[[], BinaryIO]

    def open(self, mode: str = "rb") -> BinaryIO:
        return self.opener()

    def read_bytes(self) -> bytes:
        with self.opener() as file:
            return file.read()

    def __str__(self) -> str:
        return self.path


File = Path | Member
Pixels = np.ndarray  # uint8 [height, width, 3], from a pickle
Images = dict[str, File | Pixels]  # image name -> where to read it
Size = tuple[int, int] | int  # width and height, or the short side of an image that keeps its shape


class Class(NamedTuple):
    folder: str  # train/n01532829
    images: Images | Callable[[], Images]  # a function if the names of all classes would fill the memory
    missing: int  # images that it should have besides


class Published(NamedTuple):
    url: str
    md5: str


# Source: https://www.cs.toronto.edu/~kriz/cifar.html; torchvision 0.29 has the same checksum.
CIFAR_100 = Published("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
CIFAR_LAYOUT = re.compile(r"(?:.*/)?(?P<label>[^/.][^/]*)/(?P<name>[^/.][^/]*\.png)")

OUT_HELP = (
    "where to write (default: the script's folder): a new or empty folder, or one that this script has written to. "
    "Finished images stay, and no other file is replaced or deleted"
)
SHORT_SIDE_HELP = "keep each photograph's shape and resize its short side to this many pixels, for main.py --augment"


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. Bad input, a disk error or Ctrl-C ends it with one line and exit code 1."""
    warnings.filterwarnings("ignore", module="PIL")  # images that cannot be used are errors here
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {printable(error)}; finished images are kept: fix the cause and run the same command again")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; finished images are kept: run the same command again to continue")


def arguments(
    doc: str, here: Path, published: Published | None = None, photographs: bool = False
) -> argparse.Namespace:
    """Parse the flags of the script in the folder `here`, claim --out, and fetch the archive for --download.

    photographs: whether the images have shapes of their own, which --short_side keeps.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", nargs="+", type=Path, help="archives, or folders with their contents")
    if published:
        source.add_argument("--download", action="store_true", help=f"fetch {published.url} into --out")
    parser.add_argument("--out", type=Path, default=here, help=OUT_HELP)
    parser.add_argument("--allow_missing", action="store_true", help="continue if classes or images are missing")
    if photographs:
        parser.add_argument("--short_side", type=short_side, help=SHORT_SIDE_HELP)
    args = parser.parse_args()
    claim(args.out, here)
    if published and args.download:
        args.archive = [download(published, args.out)]
    return args


def short_side(text: str) -> int:
    """Parse a number of pixels."""
    if not (text.isdecimal() and 1 <= int(text) <= 10**4):
        raise argparse.ArgumentTypeError(f"{text} must be from 1 to 10,000 pixels")
    return int(text)


def claim(out: Path, here: Path) -> None:
    """Create and mark the output folder. Refuse one with files that the script in the folder `here` did not write."""
    if out.resolve() == here:
        return
    marker = out / MARKER
    visible = out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
    if visible and not (marker.exists() and marker.read_text() == here.name):
        raise InputError(f"--out={out}: folder has files that this script did not write; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(here.name)


def download(published: Published, folder: Path) -> Path:
    """Fetch a published archive into `folder`, unless it is already there; return its path."""
    place = folder / published.url.rpartition("/")[2]
    if place.exists():
        if _md5(place) != published.md5:
            raise InputError(f"{place}: is not the file that {published.url} serves; move it away")
        return place
    part = place.with_name(f".{place.name}.part")
    try:
        # A server that compresses the file again would change its length and checksum.
        identity = {"Accept-Encoding": "identity"}
        with requests.get(published.url, stream=True, timeout=60, headers=identity) as reply, part.open("wb") as file:
            reply.raise_for_status()
            total = reply.raw.length_remaining  # None if the server does not say
            with tqdm(desc=place.name, total=total, unit="B", unit_scale=True, disable=None) as bar:
                for block in reply.iter_content(2**20):
                    bar.update(file.write(block))
        if (md5 := _md5(part)) != published.md5:
            raise InputError(f"{published.url}: has the MD5 {md5}, not the published {published.md5}; try again later")
        os.replace(part, place)
    except requests.RequestException as error:
        raise InputError(f"{published.url}: download failed ({error}); try again") from error
    finally:
        part.unlink(missing_ok=True)
    return place


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


_opened: list[BinaryIO] = []  # archives stay open, since their members are read later


def list_files(source: File) -> dict[str, File]:
    """Return every file of a folder, or of a zip or tar archive, by its relative name.

    Linked folders are not followed. The files of an archive keep its order, since a compressed tar reads forwards.
    """
    if isinstance(source, Path):
        if source.is_dir():
            paths = sorted(path for path in source.rglob("*") if path.is_file())
            return {path.relative_to(source).as_posix(): path for path in paths}
        if not source.is_file():
            raise InputError(f"{source}: no such file or folder; check the path")
    try:
        if str(source).endswith(".zip"):
            opened = zipfile.ZipFile(source)
            found = {one.filename: partial(opened.open, one) for one in opened.infolist() if not one.is_dir()}
        else:
            _opened.append(source.open("rb"))
            tar = tarfile.open(fileobj=_opened[-1])  # noqa: SIM115  the same
            found = {one.name: partial(tar.extractfile, one) for one in tar if one.isreg()}
            while tar.fileobj.read(2**20):  # to the checksum at the end of a compressed file
                pass
    except Exception as error:  # on damaged archives zipfile and tarfile raise nearly any exception
        raise InputError(f"{source}: is not a whole zip or tar archive ({error}); fetch it again") from error
    for name in found:
        path = PureWindowsPath(name)  # both kinds of slashes, and drives
        if path.anchor or ".." in path.parts or "\0" in name:
            raise InputError(f"{source}: has a file outside its folder, {name!r}; use the published archive")
    return {name.removeprefix("./"): Member(f"{source}/{name}", opener) for name, opener in found.items()}


def _number(name: str, *_: object) -> np.dtype:
    """Return a dtype of numbers. An array of objects could hold any address."""
    found = np.dtype(name, False, True)  # a copy, since the pickle sets its byte order
    if found.kind not in "biuf":
        raise pickle.UnpicklingError(f"it has an array of {name}")
    return found


# All that a pickle may name: NumPy's reconstructors, and what Python 3 writes for bytes that Python 2 is to read.
_ALLOWED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": _number,
    "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "numpy.core.multiarray.scalar": np.int64().__reduce__()[0],
    "numpy.core.numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "__builtin__.bytes": bytes,
    "builtins.bytes": bytes,
}


class _Unpickler(pickle.Unpickler):
    """Refuses a pickle that names anything else."""

    def find_class(self, module: str, name: str) -> object:
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # as NumPy 2 and NumPy 1 call it
        if wanted not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {wanted}")
        return _ALLOWED[wanted]


def unpickle(file: File) -> object:
    """Return the plain values and NumPy arrays of a pickle. It cannot run code."""
    try:
        with file.open("rb") as opened:
            return _Unpickler(opened, encoding="latin1").load()
    except Exception as error:  # on damaged pickles nearly any exception
        raise InputError(f"{file}: is not a pickle of plain values and arrays ({error}); fetch it again") from error


def cifar100(sources: Iterable[Path]) -> dict[str, Images]:
    """Return the images of each class of CIFAR-100 (Krizhevsky 2009): {class: {file name: image}}.

    Each source is an archive or a folder, with the official meta, train and test in Python's format, or
    with Bertinetto's layout of the same images (R2D2, ICLR 2019), <class>/*.png below any folders.
    """
    found: dict[str, Images] = defaultdict(dict)
    for source in sources:
        files = list_files(source)
        official = {path.rpartition("/")[2]: file for path, file in files.items()}
        if {"meta", "train", "test"} <= official.keys():
            images = [one for part in ("train", "test") for one in _cifar100_part(official[part], official["meta"])]
        else:
            matches = [(CIFAR_LAYOUT.fullmatch(path), file) for path, file in files.items()]
            images = [(match["label"], match["name"], file) for match, file in matches if match]
        if not images:
            raise InputError(f"{source}: has no CIFAR-100; expected the files meta, train and test, or <class>/*.png")
        for label, name, image in images:
            found[label][name] = image
    return found


def _cifar100_part(file: File, meta: File) -> list[tuple[str, str, Pixels]]:
    """Return (class, file name, pixels) of every image of the official file train or test."""
    names, batch = unpickle(meta), unpickle(file)
    try:
        names, filenames = names["fine_label_names"], batch["filenames"]
        pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if pixels.dtype != np.uint8 or not all(re.fullmatch(r"\w[^/\\\0]*\.png", name) for name in filenames):
            raise ValueError("expected bytes and names of .png files")
        labels = [names[label] for label in batch["fine_labels"]]
        return list(zip(labels, filenames, pixels, strict=True))
    except Exception as error:  # any value may be in any place
        raise InputError(f"{file}: is not the official CIFAR-100 ({error}); fetch it again") from error


def imagenet(source: Path) -> dict[str, File]:
    """Return the folder or tar of each class of ImageNet, by WordNet id: for `photographs`.

    source: a folder of <wnid>/ or <wnid>.tar, or ILSVRC2012_img_train.tar, a tar of <wnid>.tar.
    """
    folder = {path.name: path for path in sorted(source.glob("n*"))}
    found = {}
    for name, file in (folder or list_files(source)).items():
        if match := re.fullmatch(r"(?:.*/)?(n\d{8})(?:\.tar)?", name):
            found[match[1]] = file
    if not found:
        raise InputError(f"{source}: has no classes of ImageNet; expected <wnid>/ or <wnid>.tar")
    return found


def photographs(source: File) -> dict[str, File]:
    """Return the .jpg and .jpeg files of a folder or archive, at any depth, by name without folders."""
    found: dict[str, File] = {}
    stems: dict[str, File] = {}  # two that differ only by their ending would become one .png
    for path, file in list_files(source).items():
        name = path.rpartition("/")[2]
        if name.startswith(".") or not name.lower().endswith((".jpg", ".jpeg")):
            continue
        other = stems.setdefault(Path(name).stem, file)
        if other is not file:
            raise InputError(f"{file}: has the same name as {other}; keep only one of them")
        found[name] = file
    if not found:
        raise InputError(f"{source}: has no .jpg or .jpeg images; check the path")
    return found


def header(path: Path) -> tuple[str, str, tuple[int, int]] | None:
    """Return (format, mode, (width, height)) of a PNG or JPEG file, or None if it is not one."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format, image.mode, image.size
    except Exception:  # on damaged files Pillow raises nearly any exception
        return None


def is_finished(path: Path, size: Size) -> bool:
    """Return whether an image was written before. Refuse any other file in its place."""
    if not os.path.lexists(path):
        return False
    found = header(path)
    if not found or size not in (found[2], min(found[2])):
        raise InputError(f"{path}: is in the way of an image of another size; move it away, or name another --out")
    return True


def by_lists(images: dict[str, Images], lists: Path, class_size: int) -> list[Class]:
    """Return the classes of a data/splits/*.json, in its order, each of `class_size` images at least."""
    splits = json.loads(lists.read_text())
    return [
        Class(f"{split}/{label}", images.get(label, {}), missing=max(0, class_size - len(images.get(label, {}))))
        for split in SPLITS
        for label in splits[split]
    ]


def refuse_missing(classes: Iterable[Class], allow: bool) -> list[Class]:
    """Print the missing images and fail, or, if that is allowed, return the classes that have images."""
    classes = list(classes)
    short = [one for one in classes if one.missing]
    for one in short:
        say(f"{one.folder}: {f'{one.missing:,} images missing' if one.images else 'no images'}")
    if short and not allow:
        raise InputError(f"{len(short):,} classes are incomplete: add the missing images, or use --allow_missing")
    return [one for one in classes if one.images]


def write_classes(
    classes: Iterable[Class], out: Path, size: Size, suffix: str, expected: dict[str, int], whole: bool = False
) -> None:
    """Write <out>/<class folder>/<name><suffix>, RGB, of this size, and print the counts.

    Finished images stay. Any other file in a class folder is an error, before any work. If `whole`, fewer images than
    the published ones are an error at the end: for data sets whose class sizes are not known before.
    """

    def wanted(one: Class) -> Images:
        images = one.images() if callable(one.images) else one.images
        return {Path(name).with_suffix(suffix).name: file for name, file in images.items()}

    classes, todo = list(classes), []
    if not classes:
        raise InputError(f"{out}: nothing to write, since none of the listed classes was found; check the source")
    for one in classes:
        place = out / one.folder
        present = {path.name for path in place.glob("[!.]*")}
        images = wanted(one) if present else {}
        for name in sorted(present):
            if name not in images or not is_finished(place / name, size):
                raise InputError(f"{place / name}: is not an image of this class; move it away")
        if not present or len(present) < len(images):
            todo.append(one)
    say(f"{len(classes)} classes, {len(classes) - len(todo)} of them finished before")
    for one in tqdm(todo, unit="class", disable=None):
        images = {out / one.folder / name: file for name, file in wanted(one).items()}
        write_images(((place, file) for place, file in images.items() if not place.exists()), size)

    found = {"images": 0}
    for split in SPLITS:
        images = list((out / split).glob(f"[!.]*/[!.]*{suffix}"))
        found |= {f"{split} classes": len({path.parent for path in images}), f"{split} images": len(images)}
        found["images"] += len(images)
    if print_counts(found, expected) and whole:
        raise InputError("the published data set has more images: add them, or use --allow_missing")


def write_images(images: Iterable[tuple[Path, File | Pixels]], size: Size, mode: str | None = "RGB") -> None:
    """Write (place, image) pairs in threads. Only this thread reads, in order, for compressed tars."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_write_image, place, image, _read(image), size, mode) for place, image in images]
        for job in jobs:
            job.result()  # raises what the thread has raised


def _read(image: File | Pixels) -> bytes | Pixels:
    try:
        return image if isinstance(image, Pixels) else image.read_bytes()
    except Exception as error:  # on damaged archives nearly any exception
        raise InputError(f"{image}: cannot be read ({error}); fetch it again") from error


def _write_image(place: Path, source: File | Pixels, content: bytes | Pixels, size: Size, mode: str | None) -> None:
    """Write an image, whole or not at all: resized, and in this mode or its own."""
    try:
        is_array = isinstance(content, Pixels)
        image = Image.fromarray(content) if is_array else Image.open(io.BytesIO(content), formats=FORMATS)
        short = min(image.size)
        target = size if isinstance(size, tuple) else tuple(round(size * side / short) for side in image.size)
        image = (image.convert(mode) if mode else image).resize(target, Image.LANCZOS)
    except Exception as error:  # on damaged images Pillow raises nearly any exception
        raise InputError(f"{source}: is damaged or not a PNG or JPEG image; fetch it again") from error
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{secrets.token_hex(4)}{place.suffix}")
    try:
        image.save(beside)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def published_counts(**splits: tuple[int, int]) -> dict[str, int]:
    """Return the published numbers of classes and images of each split, for write_classes."""
    found = {}
    for split, (classes, images) in splits.items():
        found |= {f"{split} classes": classes, f"{split} images": images}
    return found


def print_counts(found: dict[str, int], expected: dict[str, int]) -> bool:
    """Print every count beside the published one. Return whether any is lower, which is also printed."""
    for what, number in expected.items():
        remark = "" if found[what] == number else "  <- not the published number"
        say(f"{what}: {found[what]:,} found, {number:,} expected{remark}")
    fewer = any(found[what] < number for what, number in expected.items())
    if fewer:
        say("all images that were given are there; the published data set has more")
    return fewer
