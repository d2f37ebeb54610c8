"""What the data scripts share: archives read safely, downloads, class folders moved in whole, counts, short errors."""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import stat
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import requests
from PIL import Image
from tqdm import tqdm

SPLITS = ("train", "val", "test")

# Endings of the two hidden names that lie beside a place while its new content is written and moved in.
WRITTEN = ".being-written"
REPLACED = ".being-replaced"


class TarMember(NamedTuple):
    """A file in a tar archive, with the methods of a Path that are used here."""

    tar: tarfile.TarFile
    member: tarfile.TarInfo

    def open(self, mode: str = "rb") -> BinaryIO:
        return self.tar.extractfile(self.member)

    def read_bytes(self) -> bytes:
        return self.open().read()

    def __str__(self) -> str:
        return f"{self.tar.name}/{self.member.name}"


File = Path | zipfile.Path | TarMember  # all have read_bytes(), and print as a path that a reader can follow
Pixels = np.ndarray  # uint8 [height, width, 3], of an image that was never a file
Images = dict[str, File | Pixels]  # an image's name -> where to read it


class Class(NamedTuple):
    folder: str  # train/n01532829
    images: Images
    missing: int  # images that it should have besides


class Published(NamedTuple):
    url: str
    md5: str


class Limits(NamedTuple):
    """Bytes that an archive may declare for one unpacked file, and for all of them."""

    file: int
    total: int


# The largest photograph of ImageNet has half of the first; MiniImagenet at full size a quarter of the second.
PHOTOGRAPHS = Limits(32 * 2**20, 32 * 2**30)
PICKLES = Limits(256 * 2**20, 2**30)  # CIFAR-100's training part has 155 million bytes
CLASS_TARS = Limits(2 * 2**30, 256 * 2**30)  # ILSVRC2012_img_train.tar: 1,000 tars, 138 billion bytes

# Both stand on https://www.cs.toronto.edu/~kriz/cifar.html; torchvision 0.29 has the same checksum.
CIFAR_100 = Published("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
CIFAR_LAYOUT = re.compile(r"(?:.*/)?(?P<label>[^/.][^/]*)/(?P<name>[^/.][^/]*\.png)")


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


def arguments(doc: str, out: Path, published: Published | None = None) -> argparse.Namespace:
    """The command line of a script that makes a data set; with --download, `archive` is what was fetched."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", nargs="+", type=Path, help="archives, or folders of what was in them")
    if published:
        source.add_argument("--download", action="store_true", help=f"fetch {published.url} into --out")
    parser.add_argument("--out", type=Path, default=out, help="where to write (default: script's folder)")
    parser.add_argument("--allow_missing", action="store_true", help="go on without what is missing")
    args = parser.parse_args()
    if published and args.download:
        args.archive = [download(published, args.out)]
    return args


# ------------------------------------------------------------------------------------------ reading


def download(published: Published, folder: Path) -> Path:
    """Fetches a published archive into `folder`, unless it is there whole; returns where it lies.

    Killed or cut off, it leaves nothing under the archive's name. Fails where the checksum is another.
    """
    place = folder / published.url.rpartition("/")[2]
    if place.exists() and _md5(place) == published.md5:
        return place
    written = place.with_name(f".{place.name}{WRITTEN}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Asked for as it is: a server that packs it once more would change its length and checksum.
        reply = requests.get(published.url, stream=True, timeout=60, headers={"Accept-Encoding": "identity"})
        with reply, written.open("wb") as file:
            reply.raise_for_status()
            total = reply.raw.length_remaining  # None where the server does not say
            with tqdm(desc=place.name, total=total, unit="B", unit_scale=True, disable=None) as bar:
                for block in reply.iter_content(2**20):
                    file.write(block)
                    bar.update(len(block))
        if (md5 := _md5(written)) != published.md5:
            fail(f"{published.url} has the MD5 sum {md5}, not the published {published.md5}: try again later")
        os.replace(written, place)
    except requests.RequestException as error:
        fail(f"{published.url} was not fetched ({error}): try again, or fetch it by other means")
    finally:
        written.unlink(missing_ok=True)
    return place


def _md5(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def files(source: File, limits: Limits = PHOTOGRAPHS) -> dict[str, File]:
    """Every file of a folder, or of a zip or tar archive, which is read where it lies and never unpacked.

    Returns the files by relative name, separated by "/", sorted; those of a tar in its own order, in which
    a compressed one is to be read. Linked folders are not followed. Fails where there is nothing, on a
    truncated archive, and on an archive with any member whose path is absolute or leads out of it, that is
    a link or other special file, or that declares more bytes than `limits` allow.
    """
    if isinstance(source, TarMember):
        return _tar_files(source.open(), str(source), limits)
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.is_file())
        return {path.relative_to(source).as_posix(): path for path in found}
    if not source.exists():
        fail(f"{source}: no such file or folder")
    if source.name.endswith(".zip"):
        return _zip_files(source, limits)
    if not source.name.endswith((".tar", ".tar.gz", ".tgz")):
        fail(f"{source}: only a folder, .zip, .tar, .tar.gz or .tgz can be read")
    with source.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"  # gzip's first bytes (RFC 1952)
    return _tar_files(gzip.open(source) if compressed else source.open("rb"), str(source), limits)


def _zip_files(source: Path, limits: Limits) -> dict[str, File]:
    try:
        opened = zipfile.ZipFile(source)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        fail(f"{source} is not a whole zip archive ({error}): fetch it again")
    total = 0
    for member in opened.infolist():
        total += member.file_size
        plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        reason = _refusal(member.filename, plain, member.file_size, total, limits)
        # Of other methods zipfile unpacks a whole block at once, however much more it holds than was declared.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "is packed by another method than deflate"
        if reason:
            fail(f"{source} is refused: {member.filename!r} {reason}")
    names = sorted(member.filename for member in opened.infolist() if not member.is_dir())
    return {name: zipfile.Path(opened, name) for name in names}


class _Guarded:
    """An open file for tarfile, which reads as much at once as a header says: at most `limit` bytes here."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._limit = file, limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._limit:
            raise tarfile.ReadError(f"a header declares {size:,} bytes")
        return self._file.read(size)

    def __del__(self):
        self._file.close()


def _tar_files(file: BinaryIO, source: str, limits: Limits) -> dict[str, File]:
    found, total = {}, 0
    guarded = _Guarded(file, limits.file)
    try:
        tar = tarfile.TarFile(source, "r", guarded)
        for member in tar:
            total += member.size
            plain = member.isdir() or (member.isreg() and not member.issparse())
            if reason := _refusal(member.name, plain, member.size, total, limits):
                fail(f"{source} is refused: {member.name!r} {reason}")
            if member.isreg():
                found[member.name.removeprefix("./")] = TarMember(tar, member)
        guarded.seek(tar.offset)
        if guarded.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark")  # tarfile takes what it cannot read for the end
        while guarded.read(tarfile.BLOCKSIZE):  # to gzip's checksum, which stands at the very end
            pass
    except Exception as error:  # on damaged archives tarfile and gzip raise nearly every kind there is
        fail(f"{source} is not a whole tar archive ({error}): fetch it again")
    return found


def _refusal(name: str, plain: bool, size: int, total: int, limits: Limits) -> str:
    """Why an archive's member is not to be trusted, `total` bytes with those before it; empty when it is."""
    slashed = name.replace("\\", "/")
    if slashed.startswith("/") or slashed[1:2] == ":":
        return "is an absolute path"
    if ".." in slashed.split("/"):
        return "leads out of the archive"
    if not plain:
        return "is not a plain file or folder"
    if not 0 <= size <= limits.file:
        return f"has {size:,} bytes unpacked, limit {limits.file:,}"
    if total > limits.total:
        return f"brings the archive to {total:,} bytes unpacked, limit {limits.total:,}"
    return ""


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


# All that a pickle may name: what NumPy 1 and 2 name for arrays, and what Python 3 names for the bytes in
# them where Python 2 is to read it. NumPy's functions are not public: an array says which they are.
_PICKLED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "multiarray.scalar": np.int64().__reduce__()[0],
    "numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
    "_codecs.encode": _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        wanted = f"{module}.{name}".removeprefix("numpy._core.").removeprefix("numpy.core.")
        if wanted not in _PICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _PICKLED[wanted]


def unpickle(file: File) -> object:
    """What a pickle of plain Python values and NumPy arrays holds; one that names anything else is refused."""
    try:
        with file.open("rb") as opened:
            return _Unpickler(opened, encoding="latin1").load()  # as NumPy asks for arrays of Python 2
    except Exception as error:  # on damaged pickles nearly every kind there is
        fail(f"{file} is not a pickle of plain values and arrays ({error}): fetch it again")


def cifar100(sources: Iterable[Path]) -> dict[str, Images]:
    """CIFAR-100 (Krizhevsky 2009), the images of each class: {class: {file name: image}}.

    Each source is an archive or a folder, with the official meta, train and test in Python's format, or
    with Bertinetto's layout of the same images (R2D2, ICLR 2019), <class>/*.png below any folders.
    """
    found: dict[str, Images] = defaultdict(dict)
    for source in sources:
        here = files(source, PICKLES)
        official = {path.rpartition("/")[2]: file for path, file in here.items()}
        if {"meta", "train", "test"} <= official.keys():
            images = [one for part in ("train", "test") for one in _cifar100_part(official[part], official["meta"])]
        else:
            matches = [(CIFAR_LAYOUT.fullmatch(path), file) for path, file in here.items()]
            images = [(match["label"], match["name"], file) for match, file in matches if match]
        if not images:
            fail(f"{source} has no CIFAR-100: expected the files meta, train and test, or <class>/*.png")
        for label, name, image in images:
            found[label][name] = image
    return found


def _cifar100_part(file: File, meta: File) -> list[tuple[str, str, Pixels]]:
    """(class, file name, pixels) of every image of the official file train or test."""
    names, batch = unpickle(meta), unpickle(file)
    try:
        names = names["fine_label_names"]
        pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [str(names[label]) for label in batch["fine_labels"]]
        if pixels.dtype != np.uint8 or not all(re.fullmatch(r"\w[^/\\\0]*\.png", name) for name in batch["filenames"]):
            raise ValueError("no bytes, or no names of .png files")
        return list(zip(labels, batch["filenames"], pixels, strict=True))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        fail(f"{file} is not the official CIFAR-100 ({type(error).__name__}: {error}): fetch it again")


def imagenet(source: Path) -> dict[str, File]:
    """Where each class of ImageNet lies, by WordNet id: for `photographs`.

    source: a folder of <wnid>/ or <wnid>.tar, or ILSVRC2012_img_train.tar, a tar of <wnid>.tar.
    """
    folder = {path.name: path for path in sorted(source.glob("n*"))}
    found = {}
    for name, file in (folder or files(source, CLASS_TARS)).items():
        if match := re.fullmatch(r"(?:.*/)?(n\d{8})(?:\.tar)?", name):
            found[match[1]] = file
    return found or fail(f"{source} has no classes of ImageNet: <wnid>/ or <wnid>.tar were expected there")


def photographs(source: File) -> dict[str, File]:
    """The .jpg or .jpeg files of a folder or archive, at any depth; two of one name are an error."""
    found: dict[str, File] = {}
    for path, file in files(source).items():
        name = path.rpartition("/")[2]
        if name.startswith(".") or not name.lower().endswith((".jpg", ".jpeg")):
            continue
        if name in found:
            fail(f"{found[name]} and {file} have one name: leave only one of them in {source}")
        found[name] = file
    return found


@contextlib.contextmanager
def _readable(file: File | Pixels) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on damaged files the decoders and archives raise nearly every kind there is
        fail(f"{file} is damaged or not a PNG or JPEG image ({type(error).__name__}): fetch it again")


def _read(file: File | Pixels) -> bytes | Pixels:
    with _readable(file):
        return file if isinstance(file, Pixels) else file.read_bytes()


def _decode(file: File | Pixels, read: bytes | Pixels) -> Image.Image:
    if isinstance(read, Pixels):
        return Image.fromarray(read)
    with _readable(file):
        image = Image.open(io.BytesIO(read), formats=("PNG", "JPEG"))
        image.load()
        return image


def read_image(file: File) -> Image.Image:
    """The decoded PNG or JPEG image, in its own mode; fails with the file's name where it cannot be read."""
    return _decode(file, _read(file))


# ------------------------------------------------------------------------------------------ writing


def by_lists(images: dict[str, Images], lists: Path, class_size: int) -> list[Class]:
    """The classes of a data/splits/*.json, in its order, each of `class_size` images at least."""
    splits = json.loads(lists.read_text())
    return [
        Class(f"{split}/{label}", images.get(label, {}), missing=max(0, class_size - len(images.get(label, {}))))
        for split in SPLITS
        for label in splits[split]
    ]


def refuse_missing(classes: Iterable[Class], allow: bool) -> list[Class]:
    """Prints what is missing and fails, or, if allowed, returns the classes that have any images."""
    classes = list(classes)
    short = [one for one in classes if one.missing]
    for one in short:
        print(f"{one.folder}: {f'{one.missing:,} images missing' if one.images else 'no images'}")
    if short and not allow:
        fail(f"{len(short):,} classes are not whole: add what is missing, or go on with --allow_missing")
    return [one for one in classes if one.images]


def write_classes(
    classes: Iterable[Class],
    out: Path,
    size: tuple[int, int],
    suffix: str,
    expected: dict[str, int],
    total: int | None = None,
) -> None:
    """Makes <out>/<class folder>/<name><suffix>, RGB, of this (width, height), and prints the counts.

    Classes finished before are skipped. suffix: ".png", or ".jpg" at Pillow's default quality. expected: the
    published numbers of "train classes", "train images", ..., and of all "images", those that are known.
    total: how many classes there are, where they are an iterator.
    """
    for split in SPLITS:
        recover(out / split)
    number = skipped = 0
    for one in tqdm(classes, total=total, unit="class", disable=None):
        names = {Path(name).with_suffix(suffix).name: file for name, file in one.images.items()}
        number += 1
        if finished(out / one.folder, names, size):
            skipped += 1
        else:
            _refuse_to_drop(out / one.folder, names)
            _write_class(names, out / one.folder, size)
    if not number:
        fail("none of the listed classes was found")
    print(f"{number} classes, {skipped} of them finished before")

    found = {"images": 0}
    for split in SPLITS:
        images = list((out / split).glob(f"[!.]*/*{suffix}"))
        found |= {f"{split} classes": len({path.parent for path in images}), f"{split} images": len(images)}
        found["images"] += len(images)
    print_counts(found, expected)


def _refuse_to_drop(place: Path, names: Iterable[str]) -> None:
    """Fails where `place` has images that would be gone once the named ones replace its content."""
    kept = {Path(name).stem for name in names}
    if lost := sorted(path.name for path in place.glob("*") if path.stem not in kept):
        fail(f"{place} has {len(lost):,} other files, {lost[0]} the first: move that folder away")


def _write_class(images: Images, place: Path, size: tuple[int, int]) -> None:
    """Writes one class's images, RGB, resized, into the folder `place`, all at once."""

    def write(name: str, file: File | Pixels, read: bytes | Pixels) -> None:
        _decode(file, read).convert("RGB").resize(size, Image.LANCZOS).save(folder / name)

    with moved_in(place) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        # Read by this thread alone, in order, as a compressed tar can only be read forwards.
        done = pool.map(write, images, images.values(), map(_read, images.values()))
        for _ in done:  # raises what a thread has raised
            pass


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
