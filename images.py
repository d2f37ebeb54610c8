"""Load image folders as arrays: classes, splits, a cache of decoded pixels, and augmentation.

Augmentation is mmfewshot's: random crops, flips and color changes in training, center crops at test. The cache holds
each photograph whole, resized to a square, with its aspect (width / height). A crop is a box in that square: left, top,
right, bottom, from 0 to 1. The caller passes all random words, so the same words give the same crop.
Source: open-mmlab/mmfewshot, configs/classification/maml, and the mmcls pipelines named there.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

from files import SPELLINGS, InputError, folder_lock, is_folder, nfc, say, unreadable, write_whole
from recipe import Images

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")  # the index of a split is part of the key of its random stream
LAYOUT = "train/<class>/, val/<class>/, test/<class>/"
SYSTEM_NAMES = {  # files and folders of archives, disks and NAS devices, in lower case
    *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "found.000", "lost.dir"),
    *("network trash folder", "temporary items"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),
}
PHOTOGRAPHS = {  # suffixes of photographs that Pillow does not read, or not in every build
    *("", ".icloud", ".heic", ".heif", ".hif", ".avif", ".webp", ".jxl", ".jp2"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
}
CACHE_FORMAT = 4
DECODED_AHEAD = 256  # images to decode before writing them

CROP_AREA = 0.08, 1.0  # as a fraction of the photograph
CROP_RATIO = 3 / 4, 4 / 3  # width / height
ATTEMPTS = 10  # random boxes to try before taking the largest centered box
JITTER = 0.6, 1.4  # factors of brightness, contrast and saturation
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
ORDERS = list(itertools.permutations(range(3)))
SHORT_SIDE = 1.15  # of a photograph at test, relative to the crop; rounded down to pixels: 96 for a crop of 84
CROP_WORDS = 2 * ATTEMPTS + 2 + 1 + 3 + 1  # random words per crop: boxes, position, flip, colors and their order
# ImageNet's, for red, green and blue from 0 to 1
MEAN = np.array([123.675, 116.28, 103.53], np.float32) / 255
STD = np.array([58.395, 57.12, 57.375], np.float32) / 255


class Classes(NamedTuple):
    """The classes of one split, sorted by name. Class c is pixels[starts[c] : starts[c] + counts[c]]."""

    names: list[str]
    starts: np.ndarray  # [classes]
    counts: np.ndarray  # [classes]
    pixels: np.ndarray  # uint8 [images, height, width, channels], shared by the splits of one folder
    aspects: np.ndarray | None = None  # [images], width / height before resizing; None: not augmented
    published: bool = False  # whether these are exactly the published classes of the split
    marks: Mapping[str, str] = {}  # of a user's own images: path from the split's folder -> fingerprint

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images of each class."""
        return dict(zip(self.names, self.counts.tolist(), strict=True))

    def named(self, names: list[str]) -> "Classes":
        """Return the classes with these names, sorted by name. They share the pixels."""
        chosen = set(names)
        index = sorted((i for i, name in enumerate(self.names) if name in chosen), key=self.names.__getitem__)
        names = [self.names[i] for i in index]
        return self._replace(names=names, starts=self.starts[index], counts=self.counts[index])


# -- folders and splits -----------------------------------------------------------------------------------------------


def count_splits(
    images: Images, folder: Path, splits: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, dict[str, int]]:
    """Return the number of image files of each class, {split: {class: images}}, without decoding.

    Print once what is ignored in a user's own folder. optional: further splits, which are empty if they are missing.
    Raise InputError if the folder, a split or a class folder does not match `images`.
    """
    if images.split_list is None and is_folder(folder):
        roots = [os.path.join(folder, name) for name in _split_folders(folder).values()]
        for line in ignored_lines(folder, roots):
            _say_once(line)
    found = load_splits(images, folder, splits, optional, decode=False)
    return {split: found[split].sizes if split in found else {} for split in (*splits, *optional)}


def load_splits(
    images: Images, folder: Path, splits: tuple[str, ...], optional: tuple[str, ...] = (), decode: bool = True
) -> dict[str, Classes]:
    """Return the classes of each given split, with decoded images.

    Splits in one folder share its pixels. Classes of a published data set have their published names, regardless of
    their parent folders. Print a line if they are not the published ones. optional, decode: see count_splits.
    Raise InputError if the folder, a split, a class folder or an image does not match `images`.
    """
    if not is_folder(folder):
        raise InputError(
            f"{folder}: no such data folder; prepare it as described in {images.prepare}, or set --data_path "
            "(--test_data_path for --test_datasource)"
        )
    published, here = published_classes(images), _split_folders(folder)
    if images.split_sizes:
        sizes = ",".join(map(str, images.split_sizes))
        if here:
            raise InputError(
                f"--split={sizes}: {folder} already has folders {_listed(here.values())}; remove the flag, or "
                "rename them if they are classes"
            )
        if published and not images.split_folders:
            raise InputError(f"--split={sizes}: {folder} already has a published split; remove the flag")
    if not here:
        loaded = _split_classes(images, folder, published, (*splits, *optional), decode)
        return _report_unpublished(published, folder, loaded) if decode else loaded
    for split in splits:
        if split not in here:
            raise InputError(
                f"{folder / split}: no such folder, but {folder} has {_listed(_subfolders(folder))}; add it, with "
                f"classes of its own: the layout is {LAYOUT}"
            )
    wanted = [*splits, *(split for split in optional if split in here)]
    files = {split: _class_files(images, folder / here[split], may_be_empty=split in optional) for split in wanted}
    loaded = {
        split: _load_classes(images, folder, folder / here[split], files[split], split, published, decode)
        for split in wanted
    }
    if decode and images.split_list is None:
        known = {
            split: loaded[split].marks if split in loaded else _cached_marks(images, folder, here[split], split)
            for split in SPLITS
            if split in here
        }
        _report_repeats(
            folder,
            [
                (os.path.join(here[split], path), split, _class_of(path), mark)
                for split, marks in known.items()
                for path, mark in marks.items()
            ],
        )
    return _report_unpublished(published, folder, loaded) if decode else loaded


def published_classes(images: Images) -> dict[str, list[str]]:
    """Return the published classes of each split; an empty dict if the data set has no published split."""
    if images.split_list is None:
        return {}
    published = json.loads((ROOT / "data" / "splits" / images.split_list).read_bytes())
    return {split: published[split] for split in SPLITS}


def own_name(path: str, known: Container[str]) -> str:
    """Return the part of a class folder's path that is one of the `known` names; the whole path if there is none.

    Example: Greek/character01 of images_background/Greek/character01.
    """
    parts = path.split("/")
    for last in range(len(parts), 0, -1):
        for first in range(last):
            if (name := "/".join(parts[first:last])) in known:
                return name
    return path


def _split_folders(folder: Path) -> dict[str, str]:
    """Return split -> name of its folder in `folder`. Raise InputError if a split has two folders."""
    names = [name for name in _subfolders(folder) if name.lower() in SPELLINGS]
    found = _splits_among({name: bool(_subfolders(folder / name)) for name in names})
    for two in found.values():
        if len(two) > 1:
            raise InputError(f"{folder}: has both {_listed(two, ' and ')}; keep only one of them")
    return {split: name for split, (name,) in found.items()}


def _splits_among(folders: Mapping[str, bool]) -> dict[str, list[str]]:
    """Return split -> names of its folders, among the given `folders` of one parent.

    folders: name -> whether it has subfolders. A single folder named after a split, without subfolders, is a class,
    such as CIFAR-100's train.
    """
    found = defaultdict(list)
    for name in folders:
        if name.lower() in SPELLINGS:
            found[SPELLINGS[name.lower()]].append(name)
    lone_class = len(found) < 2 and not any(folders[name] for names in found.values() for name in names)
    return {} if lone_class else found


def _class_files(images: Images, root: Path, may_be_empty: bool = False) -> dict[str, list[str]]:
    """Return class_folders of `root`. Raise InputError if it contains no images, or folders of splits."""
    files = class_folders(os.path.normpath(root), empty=images.split_list is not None)
    if not (any(files.values()) or may_be_empty):
        raise InputError(f"{root}: has no class folders with images; fill it as described in {images.prepare}")
    inside = defaultdict(dict)  # parent -> its subfolders -> whether they have subfolders
    for path in sorted(files):
        parts = path.split("/")
        for i, name in enumerate(parts):
            parent = inside["/".join(parts[:i])]
            parent[name] = parent.get(name, False) or i + 1 < len(parts)
    parents = {parent: names for parent, folders in inside.items() if (names := _splits_among(folders))}
    if parents:
        parent, names = next(iter(parents.items()))
        where = f"its folder {parent} has" if parent else "has"
        fix = f"give {root / parent} as the data folder" if parent and len(parents) == 1 else f"use the layout {LAYOUT}"
        raise InputError(f"{root}: {where} folders {_listed(itertools.chain(*names.values()))}; {fix}")
    return files


def _split_classes(
    images: Images, folder: Path, published: Mapping, splits: tuple[str, ...], decode: bool
) -> dict[str, Classes]:
    """Return the classes of each given split of a folder that has class folders, but no folders of splits."""
    files = _class_files(images, folder)
    known = set().union(*published.values())
    if published:  # Skip folders without images, such as __pycache__: an unknown name would change the whole split.
        files = {name: names for name, names in files.items() if names or images.split_sizes}
    unknown = sorted(name for name in files if own_name(nfc(name), known) not in known)
    if images.split_sizes and not published:
        _refuse_split_like(folder, files)
    if images.split_sizes and sum(images.split_sizes) != len(files):
        raise InputError(
            f"--split={','.join(map(str, images.split_sizes))}: must add up to the {len(files)} classes of {folder}; "
            "change the numbers, or the folders"
        )
    if unknown and images.split_folders and not images.split_sizes:
        if published:
            found = f"{len(unknown):,} of its {len(files):,} classes are not published ones ({_listed(unknown)})"
            fix = f"prepare it as described in {images.prepare}, or use {LAYOUT} or published names in <class>/"
        else:
            found = f"has {len(files):,} class folders ({_listed(sorted(files))}), but no train, val and test"
            fix = f"use the layout {LAYOUT}, or <class>/ with --split"
        raise InputError(f"{folder}: {found}; {fix}")
    classes = _load_classes(images, folder, folder, files, "all", published, decode)
    if images.split_sizes:
        names = _shuffled_split(classes.names, images.split_sizes)
    else:
        readable = [name for name, count in zip(classes.names, classes.counts, strict=True) if count]
        classes, names = classes.named(readable), published
    if unknown and not images.split_sizes:  # the published split was made by the same shuffle
        total = len(classes.names)
        train, val = (round(total * len(published[split]) / len(known)) for split in ("train", "val"))
        sizes = (train, val, total - train - val)
        if decode:
            say(f"{folder}: its {total:,} classes are split {'/'.join(map(str, sizes))} by a seed-1 shuffle.")
        names = _shuffled_split(classes.names, sizes)
    split_of = {name: split for split in SPLITS for name in names[split]}
    _report_repeats(
        folder, [(path, split_of[_class_of(path)], _class_of(path), mark) for path, mark in classes.marks.items()]
    )
    return {split: classes.named(names[split]) for split in splits}


def _refuse_split_like(folder: Path, files: Iterable[str]) -> None:
    """Raise InputError if folders above the classes seem to be splits, such as meta_train/: --split would mix them."""
    parents = sorted({name for path in files for name in path.split("/")[:-1]})
    found = {
        name: SPELLINGS[word] for name in parents for word in re.findall("[a-z]+", name.lower()) if word in SPELLINGS
    }
    if len(set(found.values())) > 1:
        raise InputError(
            f"{folder}: its folders {_listed(found)} seem to be splits; remove --split and use the layout {LAYOUT}, or "
            "rename them if they are not"
        )


def _shuffled_split(names: list[str], sizes: tuple[int, int, int]) -> dict[str, list[str]]:
    """Sort class names, shuffle them with seed 1, and split them into train, val and test.

    The fixed seed gives every run the same test classes.
    Source: the original's data_generator.py, which shuffles with seed 1 but does not sort.
    """
    shuffled = sorted(names)
    Random(1).shuffle(shuffled)
    train, val, _ = sizes
    return {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}


def _report_unpublished(published: Mapping, folder: Path, loaded: dict[str, Classes]) -> dict[str, Classes]:
    """Return the splits with `published` set. Print a line if their classes differ from the published ones."""
    if not published:
        return loaded
    split_of = {name: split for split, names in published.items() for name in names}
    here = [(name, split) for split, classes in loaded.items() for name in classes.names]
    unknown = [name for name, _ in here if name not in split_of]
    moved = [f"{name} (published: {split_of[name]})" for name, split in here if split_of.get(name, split) != split]
    expected = sum(len(published[split]) for split in loaded)
    if unknown:
        say(f"{folder}: {len(unknown):,} of {len(here):,} classes are not published ones: {_listed(unknown)}.")
    if moved:
        say(f"{folder}: {len(moved):,} of {len(here):,} classes belong to another published split: {_listed(moved)}.")
    if not (unknown or moved) and len(here) < expected:
        say(f"{folder} has {len(here):,} of the {expected:,} published classes, each in its published split.")
    return {
        split: classes._replace(published=classes.names == sorted(published[split]))
        for split, classes in loaded.items()
    }


def _listed(names: Iterable[str], separator: str = ", ") -> str:
    """Return the first ten names, and the number of the others."""
    names = list(names)
    return separator.join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _class_of(path):
    return nfc(path.rpartition("/")[0])


def _report_repeats(folder: Path, marked: list[tuple[str, str, str, str]]) -> None:
    for line in repeat_lines(folder, marked, "two splits"):
        say(line)


def repeat_lines(where: str | Path, marked: Iterable[tuple[str, str, str, str]], two_parts: str) -> Iterator[str]:
    """Yield warnings that count blank images, and images that are identical to an earlier one.

    marked: path, part of the data (such as its split), class, and fingerprint of each image. two_parts: what to call
    two parts.
    """
    first, repeats = {}, defaultdict(list)
    for path, part, name, mark in marked:
        first_path, first_part, first_name = first.setdefault(mark, (path, part, name))
        if not mark:
            repeats["blank images"].append(path)
        elif first_path != path:
            place = two_parts if first_part != part else "one class" if first_name == name else "two classes"
            repeats[f"identical images in {place}"].append(f"{path} = {first_path}")
    for what, paths in repeats.items():
        yield f"WARNING: {where}: has {len(paths):,} {what}; remove or replace them: {_listed(paths)}"


def _counts(kinds: Iterable[str]) -> str:
    """Return how often each kind occurs, such as "12 .heic, 1 .txt"."""
    return _listed(f"{count:,} {kind}" for kind, count in Counter(kinds).most_common())


def _load_classes(
    images: Images,
    folder: Path,
    root: Path,
    files: dict[str, list[str]],
    name: str,
    published: Mapping,
    decode: bool,
) -> Classes:
    """Return the classes in `files` of `root`, decoded once and cached in folder/.cache under `name`."""
    root = os.path.normpath(root)
    # Differs: the original's split and tasks depend on the order of files on the disk.
    folders = sorted(files, key=nfc)
    known = set().union(*published.values())
    names = [own_name(nfc(path), known) for path in folders]
    first = {}
    for path, own in zip(folders, names, strict=True):
        if first.setdefault(own, path) != path:
            raise InputError(f"{root}: {first[own]} and {path} are both class {own}; remove one of them")
    paths = [f"{path}/{file}" for path in folders for file in files[path]]
    pixels, broken, aspects, marks = np.empty(0), [], [], {}
    if decode:
        pixels, broken, aspects, marks = _cached(images, folder, root, paths, name)
    if broken:
        kinds = _counts(filter(None, (_identified(f"{root}/{path}")[0] for path in broken)))
        known = f" ({kinds})" if kinds else ""
        say(f"{root}: left out {len(broken):,} unreadable images of {len(paths):,}{known}: {_listed(broken)}")
    broken_counts = Counter(path.rpartition("/")[0] for path in broken)
    counts = np.array([len(files[path]) - broken_counts[path] for path in folders], int)
    aspects = np.array(aspects) if images.augment else None
    return Classes(names, np.cumsum(counts) - counts, counts, pixels, aspects, marks=marks).named(names)


def class_folders(root: str, empty: bool = False) -> dict[str, list[str]]:
    """Return the class folders below `root`: path relative to it -> sorted file names of its images.

    Include folders whose photographs Pillow cannot read, so that errors can name them. empty: also include leaf
    folders without photographs.
    Raise InputError if a folder cannot be read, or if two have the same name in different Unicode forms.
    """
    found, spelled = {}, {}
    for name, images, others, _, leaf in _folders(root):
        if name and (images or _are_photographs(root, name, others) or (empty and leaf)):
            found[name] = images
            if spelled.setdefault(nfc(name), name) != name:
                raise InputError(f"{root}: has two folders {name} that differ only in Unicode form; rename one of them")
    return found


def image_files(root: str) -> list[str]:
    """Return the paths of the images in `root` and below, sorted. Raise the same errors as class_folders."""
    return sorted(os.path.join(root, name, file) for name, images, *_ in _folders(root) for file in images)


def ignored_lines(folder: str | Path, roots: Iterable[str] = ()) -> list[str]:
    """Return lines that count the ignored files: those of types that Pillow does not read, and system files.

    Folders without photographs are ignored, too. Other hidden files are not counted. roots: folders in `folder` to
    search instead of all of it. Raise the same errors as class_folders.
    """
    unread, system = [], [name for name in os.listdir(folder) if roots and _is_system(name)]
    for root in roots or [str(folder)]:
        for name, images, others, skipped, leaf in _folders(root):
            unread += [os.path.join(root, name, file) for file in others]
            system += skipped
            if leaf and name and not images and not _are_photographs(root, name, others):
                system.append(name)
    lines = []
    if unread:
        kinds = _counts(_suffix(path) or "without an extension" for path in unread)
        download = "download .icloud files, " if any(_suffix(path) == ".icloud" for path in unread) else ""
        lines.append(
            f"{folder}: ignored {len(unread):,} files whose type Pillow does not read "
            f"({kinds}); convert photographs to JPEG, {download}and add missing extensions: "
            + _listed(os.path.relpath(path, folder) for path in sorted(unread))
        )
    if system:
        lines.append(
            f"{folder}: ignored {len(system):,} system files and folders, and folders without images: "
            + _counts("._*" if name.startswith("._") else name for name in sorted(system))
        )
    return lines


def _folders(root: str) -> Iterator[tuple[str, list[str], list[str], list[str], bool]]:
    """Yield (relative path, sorted images, other files, system files and folders, whether it is a leaf) of each folder.

    The first is `root`. Skip hidden files and folders, and those of SYSTEM_NAMES.
    """
    suffixes = _suffixes()
    for folder, folders, files in os.walk(root, onerror=_fail, followlinks=True):
        if os.path.islink(folder) and os.path.realpath(folder) in map(os.path.realpath, Path(folder).parents):
            raise InputError(f"{folder}: is a link to a parent folder; remove it")
        system = [name for name in folders + files if _is_system(name)]
        folders[:] = filter(_is_visible, folders)
        images, others = [], []
        for name in sorted(sorted(files), key=nfc):
            placeholder = _suffix(name) == ".icloud"  # .IMG_1.JPG.icloud is a photograph that is not downloaded
            if (name[0] != "." or placeholder) and name not in system:
                (images if _suffix(name) in suffixes else others).append(name)
        yield folder[len(root) :].replace(os.sep, "/").strip("/"), images, others, system, not folders


def _subfolders(folder: str | Path) -> list[str]:
    """Return the sorted names of the folders in `folder` that _folders does not skip."""
    _, folders, _ = next(os.walk(folder, onerror=_fail))
    return sorted(filter(_is_visible, folders))


def _is_visible(name):
    return name[0] != "." and not _is_system(name)


def _is_system(name):
    return name.lower() in SYSTEM_NAMES or name[:2] == "._"


def _suffix(name):
    return os.path.splitext(name)[1].lower()


def _are_photographs(root, folder, others):
    """Return whether these files, whose type Pillow does not read, include photographs."""
    return any(
        _suffix(name) in PHOTOGRAPHS and (_suffix(name) or not _is_text(os.path.join(root, folder, name)))
        for name in others
    )


def _is_text(path):
    """Return whether a file, such as LICENSE, is text. A file that cannot be read is not."""
    try:
        if not os.path.isfile(path):  # a pipe, for example
            return not os.path.islink(path)
        with open(path, encoding="utf-8") as file:
            return file.read(512).replace("\n", "").replace("\t", "").replace("\r", "").isprintable()
    except (OSError, UnicodeDecodeError):
        return False


def _fail(error):
    if isinstance(error, PermissionError):
        raise unreadable(error.filename, error) from error
    raise InputError(f"{error.filename}: cannot read ({error.strerror}); make it readable, or remove it") from error


@functools.cache
def _formats() -> list[str]:
    """Return the image formats that Pillow reads without an external program, so not EPS."""
    Image.init()
    return [format for format in Image.OPEN if Image.MIME.get(format, "").startswith("image/")]


@functools.cache
def _suffixes() -> frozenset[str]:
    formats = _formats()
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in formats)


# -- the cache --------------------------------------------------------------------------------------------------------


def _cached(
    images: Images, folder: Path, root: str, paths: list[str], name: str
) -> tuple[np.ndarray, list[str], list[float], dict[str, str]]:
    """Return pixels, unreadable paths, aspects and marks of images root/path; from folder/.cache if it is up to date.

    Pixels are uint8 [paths, height, width, channels], memory-mapped if the cache can be written. Unreadable images get
    no row, so the last rows are unused. Aspects (width / height) are of the readable images, and only for augmentation.
    Marks (path -> fingerprint) are of readable images, and only for a user's own folder.
    Raise the same errors as _decode.
    """
    cache, own = folder / ".cache", images.split_list is None
    index_file = _index_file(images, folder, name)
    array_file = index_file.with_suffix(".npy")
    shape = (len(paths), *images.stored, images.channels)
    index = {"format": CACHE_FORMAT, "shape": list(shape), "files": _digest(root, paths)}

    def up_to_date():
        try:
            stored = json.loads(index_file.read_bytes())
            broken, aspects, marks = stored.pop("broken"), stored.pop("aspects"), stored.pop("marks") if own else {}
            pixels = np.load(array_file, mmap_mode="r", allow_pickle=False)
            same = stored == index and (pixels.shape, pixels.dtype) == (shape, np.uint8)
            return (pixels, broken, aspects, marks) if same and (images.skip_broken or not broken) else None
        except Exception:  # a damaged cache can raise nearly any exception; decode again
            return None

    def fill(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        end = file.tell() + math.prod(shape)
        index["broken"], index["aspects"], marks = _decode(images, root, paths, file.write)
        index.update({"marks": marks} if own else {})
        file.truncate(end)
        index_file.unlink(missing_ok=True)  # it describes the array that this one replaces

    if cached := up_to_date():
        return cached
    try:
        cache.mkdir(exist_ok=True)
        with folder_lock(cache, waiting=f"Waiting for another process that is writing to {cache}."):
            if cached := up_to_date():
                return cached
            write_whole(array_file, fill)
            write_whole(index_file, lambda file: file.write(json.dumps(index).encode()))
            pixels = np.load(array_file, mmap_mode="r", allow_pickle=False)
            return pixels, index["broken"], index["aspects"], index.get("marks", {})
    except OSError as error:
        _say_once(f"{cache}: cannot write ({error.strerror or error}); images will be decoded at every start.")
    pixels = np.zeros(shape, np.uint8)
    rows = iter(pixels)
    return pixels, *_decode(images, root, paths, lambda image: np.copyto(next(rows), image))


def _index_file(images, folder, name):
    if images.any_size:
        name += (
            "_{}x{}x{}".format(*images.stored, images.channels) + "_whole" * images.augment + "_binary" * images.invert
        )
    return folder / ".cache" / f"{name}.json"


def _cached_marks(images, folder, root, name):
    """Return a split's cached marks, if any, without loading it: a test compares its images with those of training."""
    try:
        marks = json.loads(_index_file(images, folder, name).read_bytes())["marks"]
        return {path: mark for path, mark in marks.items() if os.path.isfile(folder / root / path)}
    except Exception:  # as in _cached
        return {}


_say_once = functools.cache(say)  # once for all splits of a folder


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
) -> tuple[list[str], list[float], dict[str, str]]:
    """Decode the images root/path on all cores, and pass each to `put` in order.

    Return the paths of unreadable images (with --skip_broken), the aspects of the others (for augmentation), and their
    marks (in a user's own folder).
    Raise InputError if an image is unreadable without --skip_broken, or does not have the size in `images`.
    """

    def decode(path):
        try:
            image, aspect = read_whole(f"{root}/{path}", images)
            return image, aspect, fingerprint(image) if images.split_list is None else None
        except UnreadableError as error:
            return error

    broken, aspects, marks = [], [], {}
    with (
        pillow_warnings(say),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc="Decoding images", total=len(paths), disable=None, unit=" images") as bar,
    ):
        for first in range(0, len(paths), DECODED_AHEAD):
            chunk = paths[first : first + DECODED_AHEAD]
            for path, image in zip(chunk, pool.map(decode, chunk), strict=True):
                bar.update()
                if isinstance(image, UnreadableError):
                    if not images.skip_broken:
                        raise _with_count(image, root, path, paths) from image
                    broken.append(path)
                else:
                    pixels, aspect, mark = image
                    put(pixels)
                    aspects += [aspect] * images.augment
                    if mark is not None:
                        marks[path] = mark
    return broken, aspects, marks


def _with_count(error, root, path, paths):
    """Return the error of an unreadable image with the number of images of the same kind, if the kind is known."""
    reason, fix = _identified(f"{root}/{path}")
    if reason:
        alike = sum(_identified(f"{root}/{other}")[0] == reason for other in paths)
        reason = f"{reason}, as are {alike:,} of {len(paths):,} images"
    return InputError(
        f"{root}/{path}: cannot read image ({reason or error.reason}); {fix or 'replace or delete it'}, or use "
        "--skip_broken"
    )


def has_dark_border(image: np.ndarray) -> bool:
    """Return whether the outermost pixels of an image, uint8 [height, width, channels], are dark on average."""
    border = image[0], image[-1], image[1:-1, 0], image[1:-1, -1]
    return np.concatenate(border).mean() < 128


def fingerprint(image: np.ndarray) -> str:
    """Return a checksum of an image's pixels, or an empty string if it is blank: all its pixels have one color."""
    return "" if (image == image[0, 0]).all() else hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest()


# -- reading one image ------------------------------------------------------------------------------------------------


class UnreadableError(InputError):
    """An image is damaged, or Pillow does not support it. --skip_broken leaves it out."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def pillow_warnings(report: Callable[[str], object]) -> Iterator[None]:
    """Pass each distinct Pillow warning to `report` once, as one line. Turn its size-limit warning into an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
    for message, count in Counter(str(warning.message) for warning in caught).items():
        report(f"Pillow warning for {count:,} images: {message}")


def read_image(path: str | Path, images: Images) -> np.ndarray:
    """Return an image as test tasks use it (for augmentation, its center crop), uint8 [height, width, channels].

    It has size images.size, is upright and gray or RGB; transparent pixels are white.
    Raise UnreadableError if the image cannot be decoded, or InputError if it has the wrong size and may not be resized.
    """
    image, aspect = read_whole(path, images)
    return center_crops(image[None], np.array([aspect]), images.size)[0] if images.augment else image


def read_whole(path: str | Path, images: Images) -> tuple[np.ndarray, float]:
    """Return a whole image, uint8 [height, width, channels] of size images.stored, and its aspect before resizing.

    Raise the same errors as read_image.
    """
    height, width = images.stored
    try:
        if Path(path).is_fifo():  # opening it would wait
            raise ValueError("a pipe")
        with Image.open(path, formats=_formats()) as image:
            image.filename = ""  # else Pillow maps the file, and turns a gray TIFF wrongly
            deep = ";16" in image.mode + str(image.tile[:1])  # 16 bits per channel; Pillow keeps the upper 8 of colors
            image.load()
            with contextlib.suppress(Exception):  # a damaged EXIF block; Pillow rewrites it after it turned the image
                ImageOps.exif_transpose(image, in_place=True)
            if deep:
                _check_range(image)
            if images.invert and images.any_size and not images.augment and image.mode == "1":
                # Omniglot's drawings stay binary, as resize_images.py writes them.
                image = image.resize((width, height))
            image = _converted(image, images.channels)
            aspect = image.width / image.height
            if images.any_size and image.size != (width, height):
                image = image.resize((width, height), Image.LANCZOS)
    except Exception as error:  # the decoder of a damaged file can raise nearly any exception
        if isinstance(error, PermissionError):
            raise unreadable(path, error) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno:  # the system's error, not Pillow's; it may be temporary
            raise InputError(f"{path}: cannot read ({error.strerror}); make it readable, or remove it") from error
        kind, fix = _identified(path)
        reason, fix = kind or reason, fix or "replace or remove it"
        raise UnreadableError(f"{path}: cannot read image ({reason}); {fix}", reason) from error
    if image.size != (width, height):
        raise InputError(
            f"{path}: is {image.height}x{image.width} pixels, not {height}x{width}; prepare the folder as "
            f"described in {images.prepare}, or use --image_size"
        )
    return np.asarray(image).reshape(*images.stored, images.channels), aspect


def _identified(path: str | Path) -> tuple[str, str]:
    """Return the real type of a file named like an image, and how to fix it; empty strings if it may be an image."""
    if not os.path.isfile(path):  # a pipe, for example
        return "", ""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(64)
        if not head:
            return "empty file", "copy it again"
        if head.startswith(b"version https://git-lfs"):
            return "Git LFS pointer", "fetch the images with git lfs pull"
        if head.startswith(b"/annex/objects/"):
            return "git-annex pointer", "fetch the images with git annex get"
        heic = head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1") and b"avif" not in head
        if head[4:8] == b"ftyp" and heic:
            return "HEIC photograph", "convert it to JPEG"
        if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "web page", "download it again"
    return "", ""


def _check_range(image):
    """Raise ValueError if a 16-bit image leaves its upper 2 bits unused (12-bit camera): its white level is unknown."""
    if image.mode == "CMYK":  # white is 0
        return
    bands = [band for band in image.getbands() if band != "A"]
    highest = max(np.asarray(image if len(bands) == 1 else image.getchannel(band)).max() for band in bands)
    if 0 < highest < (1 << 14 if image.mode.startswith("I") else 1 << 6):
        raise ValueError("its values use less than a quarter of 16 bits; scale them to 0 to 65535")


def _converted(image, channels):
    """Convert an image to gray (1 channel) or RGB (3) on white. Raise ValueError if it has 32 bits per channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # 16-bit gray, which Pillow's own conversion clips at 255, and which may be transparent or inverted
        values, clear = np.asarray(image), image.info.get("transparency")
        gray = (values >> 8).astype(np.uint8)
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # 0 is white
            gray = 255 - gray
        image = Image.fromarray(np.where(values == clear, 255, gray) if isinstance(clear, int) else gray)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not define white; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


# -- augmentation -----------------------------------------------------------------------------------------------------


def random_crops(pixels: np.ndarray, aspects: np.ndarray, words: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return random crops of photographs, uint8 [n, height, width, 3], randomly flipped and with random color changes.

    Args:
        pixels: uint8 [n, S, S, 3], photographs resized to squares.
        aspects: [n], width / height of each before resizing.
        words: uint64 [n, CROP_WORDS], random.
        size: height and width of a crop in pixels.
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
    """Return center crops, after resizing to a short side of SHORT_SIDE times the crop's. Args: see random_crops."""
    boxes = center_boxes(aspects, size)
    return _stack(lambda i: np.asarray(_crop(pixels[i], boxes[i], size)), len(pixels))


def normalize(x: np.ndarray) -> np.ndarray:
    """Convert colors [..., 3] from 0 to 1 to network input: subtract MEAN and divide by STD."""
    return (x - MEAN) / STD


def denormalize(x: np.ndarray) -> np.ndarray:
    """Invert `normalize`: convert x [..., 3] back to colors from 0 to 1."""
    return x * STD + MEAN


def random_boxes(uniform: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Return a random box in each photograph, [n, 4]: left, top, right, bottom, 0 to 1.

    As in mmcls' RandomResizedCrop, an attempt's area is uniform in CROP_AREA, and its log(width / height) is uniform
    between the logs of CROP_RATIO. The box is the first attempt that fits in the photograph, or the largest centered
    box if none fits.
    Args:
        uniform: [n, 2 * ATTEMPTS + 2], random, 0 to 1: the area of each attempt, then the shape of each, then the
            box's horizontal and vertical position.
        aspects: [n], width / height of the photographs.
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
    position = np.where(any_inside[:, None], uniform[:, -2:], 0.5)
    left, top = position[:, 0] * (1 - width), position[:, 1] * (1 - height)
    return np.stack([left, top, left + width, top + height], 1)


def center_boxes(aspects: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the boxes of center_crops, [n, 4] as in random_boxes, for photographs with these aspects [n]."""
    short = np.array([int(SHORT_SIDE * side) for side in size])
    height, width = (side / max(short) for side in size)  # of a photograph whose short side is 1
    width, height = width / np.maximum(aspects, 1), height * np.minimum(aspects, 1)
    left, top = (1 - width) / 2, (1 - height) / 2
    return np.stack([left, top, left + width, top + height], 1)


def _crop(pixels, box, size):
    """Return a box [4] of a photograph [S, S, 3], resized with Pillow's antialiasing bilinear filter."""
    side = len(pixels)
    box = np.clip(box * side, 0, side)
    return Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR, tuple(box.tolist()))


def _stack(crop, count):
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(crop, range(count))))
