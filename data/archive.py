"""What the data scripts share: their flags, downloads, archives and images read safely, class folders, counts."""

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import threading
import warnings
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import requests
from PIL import Image
from tqdm import tqdm

import pickles
from folders import (
    WRITTEN,
    below,
    fail,
    locked,
    moved_in,
    open_regular,
    recover,
    refuse_others,
    remove,
    say,
)

SPLITS = ("train", "val", "test")

# How large an image may be that is decoded: in all, where Pillow warns; on one side, as the largest JPEG. Above LARGE,
# images are decoded one at a time.
MOST_PIXELS = Image.MAX_IMAGE_PIXELS
LONGEST_SIDE = 65_535
LARGE = 2**24
FORMATS = ("PNG", "JPEG")


class ZipMember(NamedTuple):
    """A file in a zip archive."""

    zip: zipfile.ZipFile
    member: zipfile.ZipInfo

    @property
    def size(self) -> int:
        return self.member.file_size

    def open(self) -> BinaryIO:
        return self.zip.open(self.member)

    def read_bytes(self) -> bytes:
        # zipfile silently cuts off what goes beyond the declared size, so it is told of one byte more.
        member = copy.copy(self.member)
        member.file_size += 1
        with self.zip.open(member) as file:
            found = file.read(member.file_size)
        if len(found) != self.size:
            raise ValueError(f"{'more' if len(found) > self.size else 'less'} than the {self.size:,} bytes declared")
        return found

    def __str__(self) -> str:
        return f"{self.zip.filename}/{self.member.filename}"


class TarMember(NamedTuple):
    """A file in a tar archive."""

    tar: tarfile.TarFile
    member: tarfile.TarInfo

    @property
    def size(self) -> int:
        return self.member.size

    def open(self) -> BinaryIO:
        return self.tar.extractfile(self.member)

    def read_bytes(self) -> bytes:
        return self.open().read()

    def __str__(self) -> str:
        return f"{self.tar.name}/{self.member.name}"


File = Path | ZipMember | TarMember  # each prints as a path that a reader can follow
Pixels = np.ndarray  # uint8 [height, width, 3], of an image that was never a file
Images = dict[str, File | Pixels]  # an image's name -> where to read it
Size = tuple[int, int] | int  # of a written image: width and height, or its short side, where it keeps its shape


class Class(NamedTuple):
    folder: str  # train/n01532829
    images: Images | Callable[[], Images]  # a function where the names of all classes would fill the memory
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
LARGEST_PICKLE = 2 * 2**30  # MiniImagenet's training part: 813 million bytes, or 1,219 as Python 3 writes protocol 2
CLASS_TARS = Limits(2 * 2**30, 256 * 2**30)  # ILSVRC2012_img_train.tar: 1,000 tars, 138 billion bytes

# Both stand on https://www.cs.toronto.edu/~kriz/cifar.html; torchvision 0.29 has the same checksum.
CIFAR_100 = Published("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
CIFAR_LAYOUT = re.compile(r"(?:.*/)?(?P<label>[^/.][^/]*)/(?P<name>[^/.][^/]*\.png)")


def run(main: Callable[[], None]) -> None:
    """Calls a script's `main`; a file system that refuses, and Ctrl-C, end in one line too."""
    warnings.filterwarnings("ignore", module="PIL")  # what cannot be used is refused here, in our own words
    try:
        main()
    except OSError as error:
        fail(f"{error}; what is finished is kept: clear the cause, then give the same command again")
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: the same command goes on from there")


OUT_HELP = (
    "where to write (default: script's folder). Of the class folders there, finished images stay. Replaced is only "
    "what this script made, or a copy, bit for bit, of what it is given; anything else in its way is an error"
)
SHORT_SIDE_HELP = "keep the shape of each photograph, its short side of so many pixels, for main.py --augment"


def arguments(doc: str, out: Path, published: Published | None = None, photographs: bool = False) -> argparse.Namespace:
    """The command line of a script that makes a data set; with --download, `archive` is what was fetched.

    photographs: they have shapes of their own, which --short_side keeps.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", nargs="+", type=Path, help="archives, or folders of what was in them")
    if published:
        source.add_argument("--download", action="store_true", help=f"fetch {published.url} into --out")
    parser.add_argument("--out", type=Path, default=out, help=OUT_HELP)
    parser.add_argument("--allow_missing", action="store_true", help="go on without what is missing")
    if photographs:
        parser.add_argument("--short_side", type=short_side, help=SHORT_SIDE_HELP)
    args = parser.parse_args()
    if published and args.download:
        args.archive = [download(published, args.out)]
    return args


def short_side(text: str) -> int:
    """A number of pixels of the command line."""
    if not (text.isdecimal() and 1 <= int(text) <= 10**4):
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more pixels, and at most 10,000")
    return int(text)


# ------------------------------------------------------------------------------------------ reading


def download(published: Published, folder: Path) -> Path:
    """Fetches a published archive into `folder`, unless it is there whole; returns where it lies.

    Killed or cut off, it leaves nothing under the archive's name. A file there that was cut off is replaced, any
    other is an error, as is another checksum.
    """
    place = folder / published.url.rpartition("/")[2]
    with locked(folder):
        if os.path.lexists(place) and _md5(place) == published.md5:
            return place
        written = place.with_name(f".{place.name}{WRITTEN}")
        remove(written)  # of a killed process
        try:
            # Asked for as it is: a server that packs it once more would change its length and checksum.
            reply = requests.get(published.url, stream=True, timeout=60, headers={"Accept-Encoding": "identity"})
            with reply, written.open("xb") as file, contextlib.ExitStack() as stack:
                reply.raise_for_status()
                there = stack.enter_context(open_regular(place) if os.path.lexists(place) else io.BytesIO())
                total = reply.raw.length_remaining  # None where the server does not say
                with tqdm(desc=place.name, total=total, unit="B", unit_scale=True, disable=None) as bar:
                    for block in reply.iter_content(2**20):
                        if not block.startswith(there.read(len(block))):
                            fail(f"{place} is another file than {published.url}: move it away")
                        file.write(block)
                        bar.update(len(block))
            if (md5 := _md5(written)) != published.md5:
                fail(f"{published.url} has the MD5 sum {md5}, not the published {published.md5}: try again later")
            if place.exists() and place.stat().st_size > written.stat().st_size:
                fail(f"{place} is another file than {published.url}: move it away")
            os.replace(written, place)
        except requests.RequestException as error:
            fail(f"{published.url} was not fetched ({error}): try again, or fetch it by other means")
        finally:
            remove(written)
    return place


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open_regular(path) as file:
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
    if not isinstance(source, Path):
        return _tar_files(source.open(), str(source), limits)
    if source.is_dir():
        found = {name: path for name, path in below(source) if path.is_file()}
        return {name: found[name] for name in sorted(found, key=lambda name: name.split("/"))}
    if not source.exists():
        fail(f"{source}: no such file or folder")
    if not source.is_file():
        fail(f"{source} is a device, a named pipe or the like: only a folder or an archive can be read")
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
    except Exception as error:  # on damaged archives zipfile raises nearly every kind there is
        fail(f"{source} is not a whole zip archive ({error}): fetch it again")
    total = 0
    for member in opened.infolist():
        total += member.file_size
        plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        reason = _refusal(member.filename, plain, member.file_size, total, limits)
        # Of other methods zipfile unpacks a whole block at once, however much more it holds than was declared.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "is packed by another method than deflate"
        if member.flag_bits & 1:
            reason = "is encrypted: unpack the archive with its password, and give the folder"
        if reason:
            fail(f"{source} is refused: {member.filename!r} {reason}")
    found = {member.filename: ZipMember(opened, member) for member in opened.infolist() if not member.is_dir()}
    return dict(sorted(found.items()))


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
    if "\0" in name:
        return "has a NUL in its name"
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


def unpickle(file: File) -> object:
    """What a pickle of plain Python values and NumPy arrays holds; one that holds anything else is refused."""
    try:
        with open_regular(file) if isinstance(file, Path) else file.open() as opened:
            size = file.stat().st_size if isinstance(file, Path) else file.size
            if size > LARGEST_PICKLE:
                raise ValueError(f"it has {size:,} bytes, limit {LARGEST_PICKLE:,}")
            return pickles.load(opened, size)
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
        names, filenames = names["fine_label_names"], batch["filenames"]
        pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if pixels.dtype != np.uint8 or not all(re.fullmatch(r"\w[^/\\\0]*\.png", name) for name in filenames):
            raise ValueError("no bytes, or no names of .png files")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("the classes have no names")
        labels = [names[label] for label in batch["fine_labels"]]
        return list(zip(labels, filenames, pixels, strict=True))
    except Exception as error:  # whatever is in the place of what belongs there
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
    """The .jpg or .jpeg files of a folder or archive, at any depth; two of one name, ending aside, are an error."""
    found: dict[str, File] = {}
    stems: dict[str, File] = {}
    for path, file in files(source).items():
        name = path.rpartition("/")[2]
        if name.startswith(".") or not name.lower().endswith((".jpg", ".jpeg")):
            continue
        other = stems.setdefault(_stem(name), file)
        if other is not file:
            fail(f"{other} and {file} have one name: leave only one of them in {source}")
        found[name] = file
    return found


@contextlib.contextmanager
def _readable(file: File | Pixels) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on damaged files the decoders and archives raise nearly every kind there is
        reason = error if isinstance(error, ValueError | zipfile.BadZipFile) else type(error).__name__
        fail(f"{file} is damaged or not a PNG or JPEG image ({reason}): fetch it again")


def read_bytes(file: File) -> bytes:
    """The bytes of a photograph, or of another file; fails where it is larger than photographs are."""
    if not isinstance(file, Path):
        return file.read_bytes()
    with open_regular(file) as opened:
        found = opened.read(PHOTOGRAPHS.file + 1)
    if len(found) > PHOTOGRAPHS.file:
        fail(f"{file} has more than {PHOTOGRAPHS.file:,} bytes")
    return found


def _read(file: File | Pixels) -> bytes | Pixels:
    with _readable(file):
        return file if isinstance(file, Pixels) else read_bytes(file)


_large = threading.Lock()


def _target(size: Size, found: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that an image of the (width, height) `found` becomes."""
    if isinstance(size, tuple):
        return size
    return tuple(size if side == min(found) else round(size * side / min(found)) for side in found)


def _resized(file: File | Pixels, read: bytes | Pixels, size: Size, mode: str | None) -> Image.Image:
    if isinstance(read, Pixels):
        image = Image.fromarray(read).convert(mode)
        return image.resize(_target(size, image.size), Image.LANCZOS)
    with _readable(file):
        image = Image.open(io.BytesIO(read), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
            raise ValueError(f"{width:,} x {height:,} pixels")
        with _large if width * height > LARGE else contextlib.nullcontext():
            image.load()
            return (image.convert(mode) if mode else image).resize(_target(size, image.size), Image.LANCZOS)


def read_image(file: File | Pixels, size: Size, mode: str | None = None) -> Image.Image:
    """The PNG or JPEG image at this Size, in this mode or its own; fails, naming it, if it is damaged."""
    return _resized(file, _read(file), size, mode)


class Header(NamedTuple):
    format: str
    mode: str
    size: tuple[int, int]  # width, height


def header(path: Path) -> Header | None:
    """What a PNG or JPEG file says of itself; None where it is no such file."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return Header(image.format, image.mode, image.size)
    except Exception:  # on damaged files the decoders raise nearly every kind there is
        return None


def has_size(path: Path, size: Size) -> bool:
    """Whether this is an image of this Size; only its header is read."""
    found = header(path)
    return found is not None and (found.size == size if isinstance(size, tuple) else min(found.size) == size)


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
        say(f"{one.folder}: {f'{one.missing:,} images missing' if one.images else 'no images'}")
    if short and not allow:
        fail(f"{len(short):,} classes are not whole: add what is missing, or go on with --allow_missing")
    return [one for one in classes if one.images]


def write_classes(
    classes: Iterable[Class], out: Path, size: Size, suffix: str, expected: dict[str, int], whole: bool = False
) -> None:
    """Makes <out>/<class folder>/<name><suffix>, RGB, of this Size, and prints the counts.

    Images finished before stay; a folder with anything that is not to be replaced is an error, before any work.
    suffix: ".png", or ".jpg" at Pillow's default quality. expected: the published numbers of "train classes",
    "train images", ..., and of all "images", those that are known. whole: that there are fewer is an error, at the
    end, since how many a class has was not known before.
    """

    def wanted(one: Class) -> Images:
        images = one.images() if callable(one.images) else one.images
        return {Path(name).with_suffix(suffix).name: file for name, file in images.items()}

    classes = list(classes) or fail("none of the listed classes was found")
    with locked(out):
        for folder in (out, *(out / split for split in SPLITS)):
            recover(folder)
        counts, todo = {}, []
        for one in classes:
            place = out / one.folder
            images = wanted(one) if os.path.lexists(place) else {}
            if images and finished(place, images, size):
                counts[place] = len(images)
            else:
                refuse_others(place, replaceable(images, size))
                todo.append(one)
        say(f"{len(classes)} classes, {len(counts)} of them finished before")
        for one in tqdm(todo, unit="class", disable=None):
            images = wanted(one)
            _write_class(images, out / one.folder, size)
            counts[out / one.folder] = len(images)

        for place, count in counts.items():
            if sum(1 for _ in place.glob(f"*{suffix}")) < count:
                fail_lost(place)
        found = {"images": 0}
        for split in SPLITS:
            images = list((out / split).glob(f"[!.]*/*{suffix}"))
            found |= {f"{split} classes": len({path.parent for path in images}), f"{split} images": len(images)}
            found["images"] += len(images)
        if print_counts(found, expected) and whole:
            fail("images of the published ones are missing: add them, or go on with --allow_missing")


def replaceable(images: Images, size: Size) -> Callable[[str, Path], bool]:
    """Whether a file, by its name and path, may be replaced where these images are to be written.

    It may if it is a finished image by one of their names, that is, of this Size; if it is bit for bit
    what one of them is made of; and if it is what one of them was made into, in another format.
    """
    sources = {_stem(name): file for name, file in images.items()}

    def one_may_be(name: str, path: Path) -> bool:
        if name in images and has_size(path, size):
            return True
        source = sources.get(_stem(name))
        return source is not None and (_is_copy(path, source) or _is_made_of(path, source, size))

    return one_may_be


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def is_source(path: Path, source: File | Pixels | None) -> bool:
    """Whether this is the source itself, of which there may be no other, and not a copy of it."""
    return isinstance(source, Path) and path.resolve() == source.resolve()


def _is_copy(path: Path, source: File | Pixels) -> bool:
    if isinstance(source, Pixels) or not path.is_file() or is_source(path, source):
        return False
    size = source.stat().st_size if isinstance(source, Path) else source.size
    return path.stat().st_size == size <= PHOTOGRAPHS.file and read_bytes(path) == _read(source)


def _is_made_of(path: Path, source: File | Pixels, size: Size) -> bool:
    """Whether the image is what the source becomes, RGB, of this Size, in the image's own format."""
    found = header(path)
    if not has_size(path, size):
        return False
    made = io.BytesIO()
    read_image(source, size, "RGB").save(made, found.format)
    with Image.open(made) as one, Image.open(path, formats=FORMATS) as other, contextlib.suppress(OSError):
        return one.mode == other.mode and one.tobytes() == other.tobytes()
    return False  # its header is all that can be read


def _write_class(images: Images, place: Path, size: Size) -> None:
    """Writes one class's images, RGB, resized, into the folder `place`, all at once; finished ones stay."""

    def write(name: str, file: File | Pixels, read: bytes | Pixels) -> None:
        _resized(file, read, size, "RGB").save(folder / name)

    workers = os.cpu_count() or 1
    with moved_in(place) as folder, ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for name, file in images.items():
            if has_size(place / name, size):
                shutil.copyfile(place / name, folder / name)
                continue
            if len(waiting) > 2 * workers:  # else all of the class would be read before the first is written
                waiting.popleft().result()  # raises what the thread has raised
            # Read by this thread alone, in order, as a compressed tar can only be read forwards.
            waiting.append(pool.submit(write, name, file, _read(file)))
        for one in waiting:
            one.result()


def finished(folder: Path, names: Iterable[str], size: Size) -> bool:
    """Whether `folder` has every one of the named images at this Size."""
    return all(has_size(folder / name, size) for name in names)


def fail_lost(place: Path) -> NoReturn:
    """Ends the program: images that were written are gone."""
    fail(f"{place} has lost images while others were written: let no other program work there, and start again")


def print_counts(found: dict[str, int], expected: dict[str, int]) -> bool:
    """Prints every count beside the published one. Returns whether there are fewer, which is said aloud."""
    for what, number in expected.items():
        remark = "" if found[what] == number else "  <- not the published number"
        say(f"{what}: {found[what]:,} found, {number:,} expected{remark}")
    fewer = any(found[what] < number for what, number in expected.items())
    if fewer:
        say("all that was given is there; what is published has more")
    return fewer
