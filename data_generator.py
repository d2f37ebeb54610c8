"""The data sets, and the tasks drawn from them.

A task is a pure function of (seed, split, task number): its random words are a fixed stretch of a Philox stream. Seed
and split choose the stream, the task number the stretch. So the size of the meta-batch, resuming, and evaluation in
pieces agree by construction, on any machine.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import InputError, Tasks, write_whole

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")  # a split's place is part of the key of its random stream
CACHE_FORMAT = 1


class Images(NamedTuple):
    """What an image data set has on disk and how its tasks are made of it."""

    folder: str  # below the project's root, unless --data_path says otherwise
    prepare: str  # the script that fills the folder
    size: tuple[int, int]  # height, width in pixels
    channels: int  # 1 grey, 3 red, green, blue
    rotations: bool  # a class in a task is a class on disk turned by 0, 90, 180 or 270 degrees
    invert: bool  # pixel = 1 - u8 / 255 (ink is 1), else u8 / 255
    train_query: int | None  # query images a class in training and its validation; None: as many as support
    mean_head: bool  # the network's last layer sees the mean over height and width (networks.conv4)
    split_list: str | None  # data/splits/<name>: the classes of each split; None: folders train, val, test


class Dataset(NamedTuple):
    """One row: a data set with the values that the paper and the original's code use for it."""

    hidden: tuple[int, ...]  # widths of the fully connected network
    norm: str | None  # where --norm is not given
    clip: float | None  # bound on each element of the meta-gradient
    curve_steps: int  # a training summary looks at this many updates at least (the original's test_num_updates)
    paper_updates: dict[int, tuple[int, ...]]  # way -> updates at test behind the paper's numbers
    images: Images | None  # None: the sinusoid


DATASETS = {
    # Paper section 5.1. The original's default norm crashes here; its documented commands say --norm=None.
    "sinusoid": Dataset(
        hidden=(40, 40), norm=None, clip=None, curve_steps=5, paper_updates={5: (1, 5, 10)}, images=None
    ),
    # Paper section 5.2 and appendix A.1.
    "omniglot": Dataset(
        hidden=(256, 128, 64, 64),
        norm="batch_norm",
        clip=None,
        curve_steps=10,
        paper_updates={5: (3,), 20: (5,)},
        images=Images(
            folder="data/omniglot_resized",
            prepare="data/omniglot_resized/resize_images.py",
            size=(28, 28),
            channels=1,
            rotations=True,
            invert=True,
            train_query=None,
            mean_head=True,
            split_list="omniglot.json",
        ),
    ),
    "miniimagenet": Dataset(
        hidden=(256, 128, 64, 64),
        norm="batch_norm",
        clip=10.0,
        curve_steps=1,
        paper_updates={5: (10,)},
        images=Images(
            folder="data/miniImagenet",
            prepare="data/miniImagenet/proc_images.py",
            size=(84, 84),
            channels=3,
            rotations=False,
            invert=False,
            train_query=15,
            mean_head=False,
            split_list=None,
        ),
    ),
}


class SinusoidTasks:
    """Regression tasks y = A sin(x - p), A ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5] (paper section 5.1).

    With `oracle`, A and p stand beside every x: inputs [T, K, 3] (x, A, p), else [T, K, 1].
    """

    def __init__(self, shot: int, query: int, oracle: bool = False):
        self.shot, self.query, self.oracle = shot, query, oracle

    def draw(self, seed: int, split: str, first: int, count: int) -> Tasks:
        """Tasks first .. first + count - 1 of a split's stream, NumPy arrays: T = count, K = shot, Q = query, O = 1."""
        words = _words(seed, split, first, count, per_task=2 + self.shot + self.query)
        uniform = (words >> np.uint64(11))[..., None] * 2.0**-53  # [0, 1), [T, 2 + K + Q, 1]
        amplitude, phase = 0.1 + 4.9 * uniform[:, :1], np.pi * uniform[:, 1:2]
        x = -5 + 10 * uniform[:, 2:]
        y = amplitude * np.sin(x - phase)
        if self.oracle:
            x = np.concatenate([x, np.broadcast_to(amplitude, x.shape), np.broadcast_to(phase, x.shape)], -1)
        x, y = x.astype(np.float32), y.astype(np.float32)
        return Tasks(x[:, : self.shot], y[:, : self.shot], x[:, self.shot :], y[:, self.shot :])


class ImageTasks:
    """N-way K-shot classification tasks of the images in a folder (paper section 5.2).

    Raises InputError where the folder, a split, a class or an image is not as `images` says, before anything is drawn.
    """

    def __init__(self, images: Images, folder: Path, splits: tuple[str, ...], way: int, shot: int, query: int):
        self.images, self.way, self.shot, self.query = images, way, shot, query
        self.classes = _load_splits(images, folder, splits)
        for split, classes in self.classes.items():
            classes.check(split, folder, way, shot + query)

    def draw(self, seed: int, split: str, first: int, count: int) -> Tasks:
        """Tasks first .. first + count - 1 of a split's stream, as NumPy arrays.

        T = count, D = [height, width, channels], pixels 0 to 1; O = N.
        """
        pixels, order = self._pixels(seed, split, first, count)
        x = np.divide(pixels.reshape(count, -1, *pixels.shape[3:]), 255, dtype=np.float32)
        if self.images.invert:
            np.subtract(1, x, out=x)
        y = np.eye(self.way, dtype=np.float32)[order].reshape(count, -1, self.way)
        support = self.way * self.shot
        return Tasks(x[:, :support], y[:, :support], x[:, support:], y[:, support:])

    def _pixels(self, seed, split, first, count):
        """uint8 [T, K + Q, N, height, width, channels] and each image's label [T, K + Q, N].

        Example e of every class, the classes in a new order for each e; the first K examples are the support set.
        """
        classes, way, examples = self.classes[split], self.way, self.shot + self.query
        words = _words(seed, split, first, count, per_task=2 * way + 2 * way * examples)
        chosen, turned, words = words[:, :way], words[:, way : 2 * way], words[:, 2 * way :]
        members, orders = np.split(words.reshape(count, 2, way * examples), 2, axis=1)

        chosen = _without_replacement(chosen, np.full(count, len(classes.starts)))  # [T, N]
        members = members.reshape(-1, examples)
        members = _without_replacement(members, classes.counts[chosen].ravel()).reshape(count, way, examples)
        ids = (classes.starts[chosen][..., None] + members).transpose(0, 2, 1)  # [T, K + Q, N]
        order = _without_replacement(orders.reshape(-1, way), np.full(count * examples, way)).reshape(ids.shape)

        pixels = classes.pixels[np.take_along_axis(ids, order, 2)]
        if self.images.rotations:
            quarters = np.take_along_axis((turned % 4)[:, None], order, 2)  # quarter turns, counterclockwise
            for quarter in (1, 2, 3):
                pixels[quarters == quarter] = np.rot90(pixels[quarters == quarter], quarter, axes=(1, 2))
        return pixels, order


def _words(seed: int, split: str, first: int, count: int, per_task: int) -> np.ndarray:
    """uint64 [count, per_task], the random words of tasks first .. first + count - 1."""
    blocks = -(-per_task // 4)  # Philox makes four words a counter
    stream = np.random.Philox(key=[seed, SPLITS.index(split)], counter=int(first) * blocks)
    return stream.random_raw(count * blocks * 4).reshape(count, -1)[:, :per_task]


def _without_replacement(words: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """k different numbers below sizes[row] in every row, by the first k steps of a Fisher-Yates shuffle.

    words [rows, k] are random 64-bit ones: modulo a size of some thousands they are uneven by less than 1e-15.
    """
    rows, k = words.shape
    pool = np.tile(np.arange(sizes.max()), (rows, 1))
    row = np.arange(rows)
    for i in range(k):
        j = i + (words[:, i] % (sizes - i).astype(np.uint64)).astype(np.int64)
        pool[row, i], pool[row, j] = pool[row, j], pool[row, i]
    return pool[:, :k]


class Classes(NamedTuple):
    """The classes of one split, in order of their names: class c is pixels[starts[c] : starts[c] + counts[c]]."""

    names: list[str]
    starts: np.ndarray  # [classes]
    counts: np.ndarray  # [classes]
    pixels: np.ndarray  # uint8 [images, height, width, channels], shared by the splits of one folder

    def check(self, split: str, folder: Path, way: int, examples: int) -> None:
        """Raises InputError where an N-way task of K + Q = `examples` images a class cannot be drawn."""
        if len(self.names) < way:
            raise InputError(
                f"--num_classes={way}, but the {split} split of {folder} has {len(self.names)} classes: "
                "lower it, or add classes"
            )
        smallest = int(np.argmin(self.counts))
        if self.counts[smallest] < examples:
            raise InputError(
                f"class {self.names[smallest]} ({split}) in {folder} has {self.counts[smallest]} images, but a task "
                f"takes {examples} of each class (support and query): add images, or lower --update_batch_size or "
                "--num_query"
            )

    def named(self, names: list[str]) -> "Classes":
        """These classes alone, in order of their names."""
        chosen = set(names)
        index = [i for i, name in enumerate(self.names) if name in chosen]
        return Classes([self.names[i] for i in index], self.starts[index], self.counts[index], self.pixels)


def _load_splits(images: Images, folder: Path, splits: tuple[str, ...]) -> dict[str, Classes]:
    if not folder.is_dir():
        raise InputError(f"no data folder {folder}: prepare it with {images.prepare}, or name another with --data_path")
    if images.split_list is None:
        return {split: _load_classes(images, folder, split) for split in splits}
    classes = _load_classes(images, folder, ".")
    named = _named_splits(classes.names, ROOT / "data" / "splits" / images.split_list, folder)
    return {split: classes.named(named[split]) for split in splits}


def _named_splits(names: list[str], split_list: Path, folder: Path) -> dict[str, list[str]]:
    """Which class belongs to which split; another set of classes than the published one is said aloud."""
    published = json.loads(split_list.read_text())
    published = {split: published[split] for split in SPLITS}
    known = set().union(*published.values())
    if set(names) == known:
        return published
    if set(names) <= known:
        print(
            f"{folder} has {len(names):,} of the {len(known):,} published classes: each stays in its published split."
        )
        return published
    # The published list is itself the sorted names, shuffled by seed 1 and cut so (the original's data_generator.py).
    shuffled = sorted(names)
    Random(1).shuffle(shuffled)
    train, val = (round(len(names) * len(published[split]) / len(known)) for split in ("train", "val"))
    cut = {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}
    sizes = "/".join(str(len(cut[split])) for split in SPLITS)
    print(f"{folder} has {len(names):,} classes, not the {len(known):,} published: split {sizes} by a seed-1 shuffle.")
    return cut


def _load_classes(images: Images, folder: Path, split: str) -> Classes:
    """The class folders below folder/split ('.': the folder itself), decoded once and kept in folder/.cache."""
    files = dict(_class_folders(folder / split))
    if not files:
        raise InputError(
            f"no images in {folder / split}: expected class folders of .png or .jpg files there, "
            f"as {images.prepare} makes them"
        )
    names = sorted(files)  # Differs: the original takes the disk's order, and its split and tasks with it
    counts = np.array([len(files[name]) for name in names])
    paths = [path for name in names for path in files[name]]
    pixels = _cached(images, folder, paths, "all" if split == "." else split)
    return Classes(names, np.cumsum(counts) - counts, counts, pixels)


def _class_folders(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """(name, sorted image files) of every folder below root that holds images; hidden ones are passed over."""

    def refuse(error):
        if not isinstance(error, FileNotFoundError):  # no folder at all is told by the caller
            raise InputError(f"cannot read folder {error.filename} ({error.strerror}): make it readable, or remove it")

    for here, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        chosen = sorted(name for name in files if name.lower().endswith((".png", ".jpg", ".jpeg")) and name[0] != ".")
        if chosen and Path(here) != root:
            yield Path(here).relative_to(root).as_posix(), [Path(here) / name for name in chosen]


def _cached(images: Images, folder: Path, paths: list[Path], name: str) -> np.ndarray:
    """Pixels of all paths, uint8 [n, height, width, channels], from folder/.cache where still true, else decoded."""
    cache = folder / ".cache"
    array_file, index_file = cache / f"{name}.npy", cache / f"{name}.json"
    shape = (len(paths), *images.size, images.channels)
    listing = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:  # a link that leads nowhere
            raise _unreadable(path, error) from error
        listing.update(f"{path.relative_to(folder).as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode())
    index = {"format": CACHE_FORMAT, "shape": list(shape), "files": listing.hexdigest()}

    try:
        if json.loads(index_file.read_text()) == index:
            pixels = np.load(array_file, mmap_mode="r", allow_pickle=False)
            if pixels.shape == shape and pixels.dtype == np.uint8:
                return pixels
    except Exception:  # no cache yet, or a damaged one, which raises nearly every kind there is: it is made anew
        pass

    pixels = _decode(images, paths, shape)
    try:
        cache.mkdir(exist_ok=True)
        index_file.unlink(missing_ok=True)  # never an index beside an array that it does not describe
        write_whole(array_file, lambda file: np.save(file, pixels))
        write_whole(index_file, lambda file: file.write(json.dumps(index).encode()))
    except OSError as error:
        _tell_once(f"The image cache {cache} cannot be written ({error.strerror or error})")
    return pixels


@functools.cache
def _tell_once(reason):
    """One line, though each split has an array of its own."""
    print(f"{reason}: the images are decoded anew at every start.")


def _decode(images, paths, shape):
    pixels = np.empty(shape, np.uint8)

    def decode(i):
        pixels[i] = _image(paths[i], images)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(decode, range(len(paths))), "Decoding images", len(paths), disable=None, unit=" images"):
            pass
    return pixels


def _unreadable(path, error):
    return InputError(f"cannot read image {path} of class {path.parent.name}: {error}; replace or delete it")


def _image(path, images):
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            decoded = np.asarray(image.convert("L" if images.channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if decoded.shape[:2] != images.size:
        height, width = images.size
        raise InputError(
            f"image {path} is {decoded.shape[0]}x{decoded.shape[1]} pixels, not {height}x{width}: "
            f"prepare the folder with {images.prepare}"
        )
    return decoded.reshape(*images.size, images.channels)
