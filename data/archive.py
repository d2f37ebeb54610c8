"""Shared code of the data scripts: flags, downloads, safe reading of archives and pickles, and class folders."""

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

from files import InputError, printable, say, user_path

SPLITS = ("train", "val", "test")
MARKER = ".prepared"  # a file in the output folder with the name of its data set
FORMATS = ("PNG", "JPEG")


class Member(NamedTuple):
    """A file in an archive. It reads and prints like a Path, and is never unpacked to disk."""

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
Size = tuple[int, int] | int  # width and height, or the short side of an image that keeps its aspect ratio


class Class(NamedTuple):
    folder: str  # train/n01532829
    images: Images | Callable[[], Images]  # a function if all names together would fill the memory
    missing: int  # number of images it lacks


class Published(NamedTuple):
    url: str
    md5: str


# Source: https://www.cs.toronto.edu/~kriz/cifar.html; torchvision 0.29 has the same checksum.
CIFAR_100 = Published("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
CIFAR_LAYOUT = re.compile(r"(?:.*/)?(?P<label>[^/.][^/]*)/(?P<name>[^/.][^/]*\.png)")

OUT_HELP = (
    "output folder (default: the script's): new, empty, or written by this script before. Finished images are kept, "
    "and no other file is replaced or deleted"
)
SHORT_SIDE_HELP = "keep aspect ratios, and resize the short side of each photograph to this many pixels (for --augment)"


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. On bad input, a disk error or Ctrl-C, print one line and exit with status 1."""
    warnings.filterwarnings("ignore", module="PIL")  # unusable images are errors here
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {printable(error)}; fix the cause and run the same command again (finished images are kept)")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; run the same command again to continue (finished images are kept)")


def arguments(
    doc: str, here: Path, published: Published | None = None, photographs: bool = False
) -> argparse.Namespace:
    """Parse the flags of the script in folder `here`, claim --out, and download the archive for --download.

    photographs: add --short_side.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", nargs="+", type=user_path, help="archives, or folders with their contents")
    if published:
        source.add_argument("--download", action="store_true", help=f"download {published.url} into --out")
    parser.add_argument("--out", type=user_path, default=here, help=OUT_HELP)
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
        raise argparse.ArgumentTypeError(f"{text}: must be from 1 to 10,000 pixels")
    return int(text)


def claim(out: Path, here: Path) -> None:
    """Create and mark the output folder. Raise InputError if it has files that the script in `here` did not write."""
    if out.resolve() == here:
        return
    marker = out / MARKER
    visible = out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
    if visible and not (marker.exists() and marker.read_text() == here.name):
        raise InputError(f"--out={out}: contains files that this script did not write; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(here.name)


def download(published: Published, folder: Path) -> Path:
    """Download a published archive into `folder`, unless it is already there; return its path."""
    path = folder / published.url.rpartition("/")[2]
    if path.exists():
        if _md5(path) != published.md5:
            raise InputError(f"{path}: does not have the checksum of {published.url}; move it away")
        return path
    part = path.with_name(f".{path.name}.part")
    try:
        # If a server compressed the file again, its length and checksum would change.
        identity = {"Accept-Encoding": "identity"}
        with requests.get(published.url, stream=True, timeout=60, headers=identity) as reply, part.open("wb") as file:
            reply.raise_for_status()
            total = reply.raw.length_remaining  # None if the server does not say
            with tqdm(desc=path.name, total=total, unit="B", unit_scale=True, disable=None) as bar:
                for block in reply.iter_content(2**20):
                    bar.update(file.write(block))
        if (md5 := _md5(part)) != published.md5:
            raise InputError(f"{published.url}: has MD5 {md5}, not the published {published.md5}; try again later")
        os.replace(part, path)
    except requests.RequestException as error:
        raise InputError(f"{published.url}: download failed ({error}); try again") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


_opened: list[BinaryIO] = []  # archives stay open because their members are read later


def list_files(source: File) -> dict[str, File]:
    """Return the files of a folder, or of a zip or tar archive, by their relative names.

    Do not follow links to folders. Keep the order of an archive, because a compressed tar is read sequentially.
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
            openers = {
                member.filename: partial(opened.open, member) for member in opened.infolist() if not member.is_dir()
            }
        else:
            _opened.append(source.open("rb"))
            tar = tarfile.open(fileobj=_opened[-1])  # noqa: SIM115  stays open
            openers = {member.name: partial(tar.extractfile, member) for member in tar if member.isreg()}
            while tar.fileobj.read(2**20):  # verifies the checksum at the end of a compressed file
                pass
    except Exception as error:  # a damaged archive can raise nearly any exception
        raise InputError(f"{source}: is not a complete zip or tar archive ({error}); fetch it again") from error
    for name in openers:
        path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
        if path.anchor or ".." in path.parts or "\0" in name:
            raise InputError(f"{source}: contains a path outside its folder, {name!r}; use the published archive")
    return {name.removeprefix("./"): Member(f"{source}/{name}", opener) for name, opener in openers.items()}


def _number(name: str, *_: object) -> np.dtype:
    """Return a numeric dtype. An array of objects could contain arbitrary pointers."""
    dtype = np.dtype(name, False, True)  # a copy, because the pickle sets its byte order
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"it has an array of {name}")
    return dtype


# The only names allowed in a pickle: NumPy's reconstructors, and Python 3's encoding of bytes for Python 2.
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
    """Refuse pickles that use names outside _ALLOWED."""

    def find_class(self, module: str, name: str) -> object:
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # NumPy 2's name and NumPy 1's
        if full_name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it uses {full_name}")
        return _ALLOWED[full_name]


def unpickle(file: File) -> object:
    """Return the plain values and NumPy arrays of a pickle, which cannot run code."""
    try:
        with file.open("rb") as opened:
            return _Unpickler(opened, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise InputError(f"{file}: is not a pickle of plain values and arrays ({error}); fetch it again") from error


def cifar100(sources: Iterable[Path]) -> dict[str, Images]:
    """Return the images of each class of CIFAR-100 (Krizhevsky 2009): {class: {file name: image}}.

    Each source is an archive or a folder with the official Python files meta, train and test, or with Bertinetto's
    layout of the same images (R2D2, ICLR 2019), <class>/*.png at any depth.
    """
    classes: dict[str, Images] = defaultdict(dict)
    for source in sources:
        files = list_files(source)
        official = {path.rpartition("/")[2]: file for path, file in files.items()}
        if {"meta", "train", "test"} <= official.keys():
            images = [row for part in ("train", "test") for row in _cifar100_part(official[part], official["meta"])]
        else:
            matches = [(CIFAR_LAYOUT.fullmatch(path), file) for path, file in files.items()]
            images = [(match["label"], match["name"], file) for match, file in matches if match]
        if not images:
            raise InputError(
                f"{source}: does not contain CIFAR-100; give a source with meta, train and test, or <class>/*.png"
            )
        for label, name, image in images:
            classes[label][name] = image
    return classes


def _cifar100_part(file: File, meta: File) -> list[tuple[str, str, Pixels]]:
    """Return (class, file name, pixels) of every image of the official file train or test."""
    names, batch = unpickle(meta), unpickle(file)
    try:
        names, filenames = names["fine_label_names"], batch["filenames"]
        pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if pixels.dtype != np.uint8 or not all(re.fullmatch(r"\w[^/\\\0]*\.png", name) for name in filenames):
            raise ValueError("pixels must be bytes, and file names must end in .png")
        labels = [names[label] for label in batch["fine_labels"]]
        return list(zip(labels, filenames, pixels, strict=True))
    except Exception as error:  # the pickle may have any structure
        raise InputError(f"{file}: is not the official CIFAR-100 ({error}); fetch it again") from error


def imagenet(source: Path) -> dict[str, File]:
    """Return the folder or tar of each ImageNet class by WordNet ID. `photographs` reads it.

    source: a folder of <wnid>/ or <wnid>.tar, or ILSVRC2012_img_train.tar, which is a tar of <wnid>.tar.
    """
    folder = {path.name: path for path in sorted(source.glob("n*"))}
    classes = {}
    for name, file in (folder or list_files(source)).items():
        if match := re.fullmatch(r"(?:.*/)?(n\d{8})(?:\.tar)?", name):
            classes[match[1]] = file
    if not classes:
        raise InputError(f"{source}: contains no ImageNet classes; give a folder or tar of <wnid>/ or <wnid>.tar")
    return classes


def photographs(source: File) -> dict[str, File]:
    """Return the .jpg and .jpeg files of a folder or archive, at any depth, by their names without folders."""
    return by_name(jpegs(list_files(source), source))


def jpegs(files: dict[str, File], source: File) -> dict[str, File]:
    """Return the .jpg and .jpeg files among those of a source. Raise InputError if there are none."""
    images = {}
    for path, file in files.items():
        name = path.rpartition("/")[2]
        if not name.startswith(".") and name.lower().endswith((".jpg", ".jpeg")):
            images[path] = file
    if not images:
        raise InputError(f"{source}: contains no .jpg or .jpeg images; check the path")
    return images


def by_name(files: dict[str, File]) -> dict[str, File]:
    """Return files by their names without folders. Raise InputError if two have the same name."""
    images: dict[str, File] = {}
    stems: dict[str, File] = {}  # two files that differ only in their suffix would become one .png
    for path, file in files.items():
        name = path.rpartition("/")[2]
        other = stems.setdefault(Path(name).stem, file)
        if other is not file:
            raise InputError(f"{file}: has the same name as {other}; keep only one of them")
        images[name] = file
    return images


def header(path: Path) -> tuple[str, str, tuple[int, int]] | None:
    """Return (format, mode, (width, height)) of a PNG or JPEG file, or None for any other file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format, image.mode, image.size
    except Exception:  # a damaged file can raise nearly any exception
        return None


def is_finished(path: Path, size: Size) -> bool:
    """Return whether the image at `path` is already written. Raise InputError if it is a different file."""
    if not os.path.lexists(path):
        return False
    properties = header(path)
    if not properties or size not in (properties[2], min(properties[2])):
        raise InputError(f"{path}: is not an image of the size to write; move it away, or choose a new --out")
    return True


def by_lists(images: dict[str, Images], lists: Path, class_size: int) -> list[Class]:
    """Return the classes listed in a data/splits/*.json, in its order, each expected to have `class_size` images."""
    splits = json.loads(lists.read_text())
    return [
        Class(f"{split}/{label}", images.get(label, {}), missing=max(0, class_size - len(images.get(label, {}))))
        for split in SPLITS
        for label in splits[split]
    ]


def refuse_missing(classes: Iterable[Class], allow: bool) -> list[Class]:
    """Print incomplete classes, and return the classes that have images. Raise InputError unless that is allowed."""
    classes = list(classes)
    incomplete = [entry for entry in classes if entry.missing]
    for entry in incomplete:
        say(f"{entry.folder}: {f'{entry.missing:,} images missing' if entry.images else 'no images'}")
    if incomplete and not allow:
        raise InputError(f"{len(incomplete):,} classes are incomplete; add the missing images, or use --allow_missing")
    return [entry for entry in classes if entry.images]


def write_classes(
    classes: Iterable[Class], out: Path, size: Size, suffix: str, expected: dict[str, int], whole: bool = False
) -> None:
    """Write <out>/<class folder>/<name><suffix>, RGB, of this size, and print the counts.

    Keep finished images. Raise InputError, before writing anything, if a class folder has other files. With `whole`,
    for data sets of unknown class sizes, also raise it at the end if there are fewer images than published.
    """

    def outputs(entry: Class) -> Images:
        images = entry.images() if callable(entry.images) else entry.images
        return {Path(name).with_suffix(suffix).name: file for name, file in images.items()}

    classes, todo = list(classes), []
    if not classes:
        raise InputError(f"{out}: none of the listed classes exists; check the source")
    for entry in classes:
        folder = out / entry.folder
        present = {path.name for path in folder.glob("[!.]*")}
        images = outputs(entry) if present else {}
        for name in sorted(present):
            if name not in images or not is_finished(folder / name, size):
                raise InputError(f"{folder / name}: is not an image of this class; move it away")
        if not present or len(present) < len(images):
            todo.append(entry)
    say(f"{len(classes)} classes, {len(classes) - len(todo)} already finished")
    for entry in tqdm(todo, unit="class", disable=None):
        images = {out / entry.folder / name: file for name, file in outputs(entry).items()}
        write_images(((path, file) for path, file in images.items() if not path.exists()), size)

    counts = {"images": 0}
    for split in SPLITS:
        images = list((out / split).glob(f"[!.]*/[!.]*{suffix}"))
        counts |= {f"{split} classes": len({path.parent for path in images}), f"{split} images": len(images)}
        counts["images"] += len(images)
    if print_counts(counts, expected) and whole:
        raise InputError("the published data set has more images; add them, or use --allow_missing")


def write_images(images: Iterable[tuple[Path, File | Pixels]], size: Size, mode: str | None = "RGB") -> None:
    """Write (path, image) pairs in threads. Only the calling thread reads, in order, because of compressed tars."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_write_image, path, image, _read(image), size, mode) for path, image in images]
        for job in jobs:
            job.result()  # re-raises a thread's exception


def _read(image: File | Pixels) -> bytes | Pixels:
    try:
        return image if isinstance(image, Pixels) else image.read_bytes()
    except Exception as error:  # a damaged archive can raise nearly any exception
        raise InputError(f"{image}: cannot read ({error}); fetch it again") from error


def _write_image(path: Path, source: File | Pixels, content: bytes | Pixels, size: Size, mode: str | None) -> None:
    """Write a resized image atomically, in this Pillow mode or its own."""
    try:
        is_array = isinstance(content, Pixels)
        image = Image.fromarray(content) if is_array else Image.open(io.BytesIO(content), formats=FORMATS)
        short = min(image.size)
        target = size if isinstance(size, tuple) else tuple(round(size * side / short) for side in image.size)
        image = (image.convert(mode) if mode else image).resize(target, Image.LANCZOS)
    except Exception as error:  # a damaged image can raise nearly any exception
        raise InputError(f"{source}: is damaged or not a PNG or JPEG image; fetch it again") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        image.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def published_counts(**splits: tuple[int, int]) -> dict[str, int]:
    """Return the published numbers of classes and images per split, for write_classes."""
    counts = {}
    for split, (classes, images) in splits.items():
        counts |= {f"{split} classes": classes, f"{split} images": images}
    return counts


def print_counts(counts: dict[str, int], expected: dict[str, int]) -> bool:
    """Print each count next to the published one. Print and return whether any is lower."""
    for what, number in expected.items():
        remark = "" if counts[what] == number else "  <- not the published number"
        say(f"{what}: {counts[what]:,} found, {number:,} expected{remark}")
    fewer = any(counts[what] < number for what, number in expected.items())
    if fewer:
        say("all images of the source have been written; the published data set has more")
    return fewer
