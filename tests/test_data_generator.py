"""The tasks: the sinusoid's, the images', how even and repeatable their draws are; the folders, cache and errors."""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import permutations, product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import data_generator
import files
import images
from data_generator import ImageTasks, SinusoidTasks, tasks_from_arrays
from files import InputError
from images import ROOT, SPLITS, Classes, load_splits, read_image
from networks import Network
from recipe import DATASETS
from tests.helpers import maml_of
from utils import Tasks, accuracy, xent

OMNIGLOT, MINIIMAGENET = DATASETS["omniglot"].images, DATASETS["miniimagenet"].images
PUBLISHED = json.loads((ROOT / "data" / "splits" / "omniglot.json").read_text())
CHARACTERS = [name for split in SPLITS for name in PUBLISHED[split]]


def assert_same(tasks: Tasks, others: Tasks) -> None:
    for part, other in zip(tasks, others, strict=True):
        np.testing.assert_array_equal(part, other)


def assert_drawn_in_batches(source: ImageTasks | SinusoidTasks, seed, split, first, batches: list[int]) -> None:
    """Tasks drawn in batches, the last batch first, are the same as those drawn at once."""
    whole = source.draw(seed, split, first, sum(batches))
    for i in reversed(range(len(batches))):
        start, count = sum(batches[:i]), batches[i]
        assert_same(source.draw(seed, split, first + start, count), Tasks(*(p[start : start + count] for p in whole)))


# Random draws. The seeds are fixed, so a test that passes once always passes. The bounds on p are so low that, with
# another generator, fewer than one run in a hundred would fail by chance.


def assert_uniform(outcomes: np.ndarray, possible: int) -> None:
    """The rows of `outcomes` take all possible values, each equally often."""
    _, counts = np.unique(outcomes, axis=0, return_counts=True)
    assert len(counts) == possible
    assert stats.chisquare(counts).pvalue > 1e-4


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    assert stats.chi2_contingency(stats.contingency.crosstab(a, b).count).pvalue > 1e-6


# Tasks of numbered images: each is 2x2 pixels that tell its number and how it is turned.


class Drawn(NamedTuple):
    """What was drawn, each [T, K + Q, N]: of every image in its row of the task."""

    classes: np.ndarray
    examples: np.ndarray
    quarters: np.ndarray  # quarter turns, counterclockwise
    labels: np.ndarray

    def by_label(self) -> "Drawn":
        """The same with label n in column n."""
        place = self.labels.argsort(2)
        return Drawn(*(np.take_along_axis(part, place, 2) for part in self))


def numbered_tasks(counts, way, shot, query, names=None, images=OMNIGLOT) -> ImageTasks:
    """A source of tasks, every split of which has counts[c] images of class c, numbered through all classes."""
    counts = np.array(counts)
    number = np.arange(counts.sum())
    corners = [np.full_like(number, 255), number // 100, number % 100, np.zeros_like(number)]
    pixels = np.stack(corners, 1).astype(np.uint8).reshape(-1, 2, 2, 1)
    names = names or [f"class{c:04}" for c in range(len(counts))]
    classes = Classes(names, np.cumsum(counts) - counts, counts, pixels)
    return ImageTasks(images, dict.fromkeys(SPLITS, classes), way, shot, query)


def drawn(tasks: Tasks, counts, way: int, images=OMNIGLOT) -> Drawn:
    """Reads numbered images and their labels back."""
    x = np.concatenate([tasks.support_x, tasks.query_x], 1)
    y = np.concatenate([tasks.support_y, tasks.query_y], 1)
    shape = (len(x), -1, way)
    u8 = np.rint(255 * (1 - x if images.invert else x)).astype(int).reshape(-1, 4)
    ring = u8[:, [0, 1, 3, 2]]  # the corners, clockwise: 255, hundreds, 0, ones
    start = ring.argmax(1)
    row = np.arange(len(ring))
    number = 100 * ring[row, (start + 1) % 4] + ring[row, start - 1]
    ends = np.cumsum(counts)
    classes = np.searchsorted(ends, number, "right")
    examples = number - (ends - counts)[classes]
    return Drawn(*(part.reshape(shape) for part in (classes, examples, -start % 4, y.argmax(2))))


@st.composite
def image_tasks(draw):
    """Counts of images a class, way, shot, query: anything that a task can be drawn from, often with none to spare."""
    way, shot, query = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    spare = draw(st.lists(st.integers(0, 5), min_size=way, max_size=way + 4))
    return [shot + query + more for more in spare], way, shot, query


seeds, splits, firsts = st.integers(0, 2**63), st.sampled_from(SPLITS), st.integers(0, 2**40)


@given(image_tasks(), seeds, splits, firsts)
@settings(deadline=None)
def test_image_task_is_made_as_specified(made_of, seed, split, first):
    counts, way, shot, query = made_of
    tasks = numbered_tasks(*made_of).draw(seed, split, first, 3)
    assert [part.shape for part in tasks] == [
        *((3, way * shot, 2, 2, 1), (3, way * shot, way)),
        *((3, way * query, 2, 2, 1), (3, way * query, way)),
    ]
    assert all(part.dtype == np.float32 for part in tasks)
    for labels in (tasks.support_y, tasks.query_y):
        assert set(np.unique(labels)) == {0, 1}
        assert (labels.sum(2) == 1).all()

    rows = drawn(tasks, counts, way)
    # Every N rows have every label once: K of each in the support set, Q in the query set.
    np.testing.assert_array_equal(np.sort(rows.labels, 2), np.broadcast_to(np.arange(way), rows.labels.shape))
    label = rows.by_label()
    assert (label.classes == label.classes[:, :1]).all()
    assert (label.quarters == label.quarters[:, :1]).all()
    assert all(len(set(task[0])) == way for task in label.classes)
    examples = np.sort(label.examples, 1)
    assert (examples[:, 1:] > examples[:, :-1]).all()  # none twice: support and query are disjoint


@given(image_tasks(), seeds, splits, firsts, st.lists(st.integers(1, 4), min_size=2, max_size=4))
@settings(deadline=None)
def test_image_task_does_not_depend_on_the_meta_batch(made_of, seed, split, first, batches):
    assert_drawn_in_batches(numbered_tasks(*made_of), seed, split, first, batches)


@pytest.mark.parametrize(
    "source", [numbered_tasks([20] * 30, 5, 1, 1), SinusoidTasks(5, 5)], ids=["images", "sinusoid"]
)
def test_every_seed_split_and_number_has_a_task_of_its_own(source):
    seen = set()
    for seed, split in product((0, 1, 2, 2**40), SPLITS):
        tasks = source.draw(seed, split, 0, 25)
        seen |= {b"".join(part[t].tobytes() for part in tasks) for t in range(25)}
    assert len(seen) == 4 * 3 * 25


def dirichlet_tasks(counts, way, shot, query, images=OMNIGLOT) -> ImageTasks:
    source = numbered_tasks(counts, way, shot, query, images=images)
    return ImageTasks(images, source.classes, way, shot, query, "dirichlet")


@given(image_tasks(), seeds, splits, firsts)
@settings(deadline=None)
def test_uneven_queries_are_as_many_in_all(made_of, seed, split, first):
    """The support set has K of each class; the queries are N * Q, none twice and of the task's own classes."""
    counts, way, shot, query = made_of
    counts = [count + (way - 1) * query for count in counts]
    tasks = dirichlet_tasks(counts, way, shot, query).draw(seed, split, first, 3)
    assert tasks.support_y.shape == (3, way * shot, way) and tasks.query_y.shape == (3, way * query, way)
    assert (tasks.support_y.sum(1) == shot).all()
    rows = drawn(tasks, counts, 1)
    for classes, examples, quarters, labels in zip(*(part[..., 0] for part in rows), strict=True):
        assert len(set(zip(classes, examples, strict=True))) == way * (shot + query)
        assert len(set(zip(labels, classes, quarters, strict=True))) == way  # a label is a class in one rotation
    assert_drawn_in_batches(dirichlet_tasks(counts, way, shot, query), seed, split, first, [2, 1])


def test_shares_of_the_queries_are_dirichlet():
    """Each share is Beta(2, 2 (N - 1)), two are as correlated as they should be, and rounding moves less than one."""
    words = data_generator._words(0, "test", 0, 4000, per_task=10)
    shares = data_generator._query_counts(words, 10**9) / 10**9
    for share in shares.T:
        assert stats.kstest(share, stats.beta(2, 8).cdf).pvalue > 1e-4
    np.testing.assert_allclose(np.corrcoef(shares.T)[np.triu_indices(5, 1)], -0.25, atol=0.06)
    few = data_generator._query_counts(words, 75)
    assert (few.sum(1) == 75).all() and (few >= 0).all() and (few == 0).any()
    assert np.abs(few - 75 * shares).max() < 1


def test_draws_of_images_are_uniform():
    counts = [5] * 7
    source = numbered_tasks(counts, 3, 1, 1)
    rows = drawn(source.draw(0, "train", 0, 20_000), counts, 3)
    label = rows.by_label()
    assert_uniform(label.classes[:, 0], possible=7 * 6 * 5)
    assert_uniform(label.quarters[:, 0], possible=4**3)
    for n in range(3):
        assert_uniform(label.examples[:, :, n], possible=5 * 4)
    assert_uniform(rows.labels.reshape(-1, 6), possible=6 * 6)  # both orders of the classes: a new one for each example

    # Nothing tells anything about anything else, neither in the same task nor in the next.
    columns = {
        **{("class", 0, n): label.classes[:, 0, n] for n in range(3)},
        **{("quarter", 0, n): label.quarters[:, 0, n] for n in range(3)},
        **{("example", e, n): label.examples[:, e, n] for e, n in product(range(2), range(3))},
        **{("order", e, place): rows.labels[:, e, place] for e, place in product(range(2), range(2))},
    }
    for (one, a), (other, b) in permutations(columns.items(), 2):
        assert_independent(a[:-1], b[1:])
        # In one task, classes are drawn without replacement, so are a class's examples, and an order's places.
        if one < other and (one[0] != other[0] or (one[0] == "example" and one[2] != other[2])):
            assert_independent(a, b)
    for column in columns.values():
        assert_independent(column[:-1], column[1:])


def test_draws_are_uniform_where_classes_differ_in_size():
    counts = [3, 11, 6]
    label = drawn(numbered_tasks(counts, 2, 1, 1).draw(0, "train", 0, 6000), counts, 2).by_label()
    assert_uniform(label.classes[:, 0], possible=6)
    for c, count in enumerate(counts):
        assert_uniform(label.examples[:, 0][label.classes[:, 0] == c], possible=count)
        assert_uniform(label.examples[:, 1][label.classes[:, 1] == c], possible=count)


def test_omniglot_test_tasks_are_pinned():
    """The 600 tasks that every 5-way 1-shot Omniglot accuracy is a mean over: they must never change."""
    names, counts = sorted(PUBLISHED["test"]), [20] * 423
    tasks = numbered_tasks(counts, 5, 1, 1, names).draw(0, "test", 0, 600)
    rows = zip(*(part.ravel() for part in drawn(tasks, counts, 5)), strict=True)
    text = "".join(f"{names[c]} {example} {quarter} {label}\n" for c, example, quarter, label in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "dec14eec586d651150471fb2f53513002813311690132bb2e2a70f68ed32de23"


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if row.images])
def test_only_omniglot_is_turned(name):
    images = DATASETS[name].images
    source = numbered_tasks([4] * 5, 5, 1, 1, images=images)
    assert drawn(source.draw(0, "train", 0, 100), [4] * 5, 5, images).quarters.any() == (name == "omniglot")


def test_drawing_leaves_the_images_as_they_are():
    source = numbered_tasks([4] * 5, 5, 1, 1)
    before = source.classes["train"].pixels.copy()
    source.draw(0, "train", 0, 50)
    np.testing.assert_array_equal(source.classes["train"].pixels, before)


# Tasks of image files.


def assert_drawn_from(tasks: Tasks, way: int, images: data_generator.Images, folders: dict[str, Path]) -> None:
    """Every label of every task stands for one of the class folders (by name), at one rotation, to the bit."""
    known: dict[bytes, set] = {}
    for name, folder in folders.items():
        for file in folder.iterdir():
            with Image.open(file) as image:
                u8 = np.asarray(image.convert("L" if images.channels == 1 else "RGB")).reshape(*images.size, -1)
            pixels = u8.astype(np.float32) / np.float32(255)
            for quarter in range(4 if images.rotations else 1):
                turned = np.rot90(1 - pixels if images.invert else pixels, quarter)
                known.setdefault(turned.tobytes(), set()).add((name, quarter))

    x = np.concatenate([tasks.support_x, tasks.query_x], 1)
    labels = np.concatenate([tasks.support_y, tasks.query_y], 1).argmax(2)
    turns = set()
    for t, label in product(range(len(x)), range(way)):
        stands_for = set.intersection(*(known[image.tobytes()] for image in x[t, labels[t] == label]))
        assert len({name for name, _ in stands_for}) == 1
        turns |= {quarter for _, quarter in stands_for}
    assert turns == set(range(4 if images.rotations else 1))


def test_omniglot_pixels_are_those_of_the_files(omniglot_like):
    source = ImageTasks.from_folder(OMNIGLOT, omniglot_like, ("train", "test"), 5, 2, 3)
    for split in ("train", "test"):
        folders = {name: omniglot_like / name for name in source.classes[split].names}
        tasks = source.draw(0, split, 0, 20)
        assert tasks.support_x.shape == (20, 10, 28, 28, 1)
        assert_drawn_from(tasks, 5, OMNIGLOT, folders)


@pytest.mark.parametrize("images", [OMNIGLOT, OMNIGLOT._replace(rotations=False)], ids=["turned", "upright"])
def test_the_names_of_a_tasks_classes(omniglot_like, images):
    source = ImageTasks.from_folder(images, omniglot_like, ("test",), 5, 1, 1)
    angles = set()
    for number in range(7, 12):
        (support,) = source.draw(3, "test", number, 1).support_x
        (label,) = source.draw(3, "test", number, 1).support_y.argmax(2)
        names = source.names(3, "test", number)
        for x, name in zip(support, np.array(names)[label], strict=True):
            name, _, angle = name.partition(", ")
            pixels = [np.asarray(Image.open(file).convert("L")) for file in (omniglot_like / name).iterdir()]
            quarter = int(angle.removesuffix("°") or 0) // 90
            assert any(np.array_equal(np.rot90(1 - file / 255, quarter), x[..., 0]) for file in pixels)
            angles.add(angle)
    assert angles == ({"", "90°", "180°", "270°"} if images.rotations else {""})


def test_miniimagenet_pixels_are_those_of_the_files(miniimagenet_like):
    source = ImageTasks.from_folder(MINIIMAGENET, miniimagenet_like, ("train", "test"), 5, 1, 4)
    for split in ("train", "test"):
        folders = {folder.name: folder for folder in (miniimagenet_like / split).iterdir()}
        tasks = source.draw(0, split, 0, 4)
        assert tasks.query_x.shape == (4, 20, 84, 84, 3)
        assert_drawn_from(tasks, 5, MINIIMAGENET, folders)


@pytest.mark.parametrize("invert", [False, True])
def test_every_grey_value(tmp_path, invert):
    folder = tmp_path / "train" / "greys"
    folder.mkdir(parents=True)
    for name in ("0.png", "1.png"):
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(folder / name)
    shutil.copytree(folder, folder.with_name("other"))
    images = MINIIMAGENET._replace(size=(16, 16), channels=1, invert=invert)
    x = ImageTasks.from_folder(images, tmp_path, ("train",), 2, 1, 1).draw(0, "train", 0, 1).support_x
    assert x.dtype == np.float32
    expected = [np.float32(u8) / np.float32(255) for u8 in range(256)]
    expected = [np.float32(1) - value for value in expected] if invert else expected
    np.testing.assert_array_equal(x[0, 0].ravel(), expected)


def test_ink_is_one(omniglot_like):
    x = ImageTasks.from_folder(OMNIGLOT, omniglot_like, ("train",), 5, 1, 1).draw(0, "train", 0, 20).support_x
    assert set(np.unique(x)) == {0, 1}
    assert 0 < x.mean() < 0.2


@pytest.mark.parametrize(
    "images", [OMNIGLOT, OMNIGLOT._replace(split_list=None, split_sizes=(20, 10, 10))], ids=["published", "split"]
)
def test_order_of_the_listing_does_not_matter(omniglot_like, tmp_path, monkeypatch, images):
    folder = tmp_path / "data"
    shutil.copytree(omniglot_like, folder, ignore=shutil.ignore_patterns(".cache"))
    source = ImageTasks.from_folder(images, folder, ("train", "test"), 5, 1, 1)
    expected = [source.draw(0, split, 0, 50) for split in ("train", "test")]
    shutil.rmtree(folder / ".cache")

    random = Random(0)

    class Entries(list):
        """Of os.scandir, which may stand in a with statement."""

        def __enter__(self):
            return iter(self)

        def __exit__(self, *exception):
            pass

    def shuffled(listing, *args):
        entries = list(listing(*args))
        return Entries(random.sample(entries, len(entries)))

    for function in ("walk", "listdir", "scandir"):
        monkeypatch.setattr(os, function, functools.partial(shuffled, getattr(os, function)))
    source = ImageTasks.from_folder(images, folder, ("train", "test"), 5, 1, 1)
    for split, tasks in zip(("train", "test"), expected, strict=True):
        assert_same(source.draw(0, split, 0, 50), tasks)


# Small folders of 3x2 images (not square, so that height and width are not mixed up), 3 classes of 4 images a split.

TINY = MINIIMAGENET._replace(size=(3, 2))


def save_image(path: Path, seed: int, size=TINY.size, **options) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A data folder with the splits train and test. Its files are of one length and one time, as if just unpacked."""
    folder = tmp_path / "tiny"
    for seed, (split, label, image) in enumerate(product(("train", "test"), "abc", range(4))):
        file = folder / split / label / f"{image}.png"
        save_image(file, seed, compress_level=0)
        os.utime(file, (1e9, 1e9))
    return folder


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The image files that are opened from here on."""
    files, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest, **named: files.append(path) or real(path, *rest, **named))
    return files


def tiny_tasks(folder: Path, images=TINY, way=2) -> Tasks:
    return ImageTasks.from_folder(images, folder, ("test",), way, 1, 1).draw(0, "test", 0, 40)


def uncached_tasks(folder: Path) -> Tasks:
    """The tasks of a copy that never had a cache."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".cache"))
    tasks = tiny_tasks(copy)
    shutil.rmtree(copy)
    return tasks


def test_what_is_no_image_is_passed_over(tiny):
    tasks = tiny_tasks(tiny)
    (tiny / "test" / "notes.txt").write_text("not an image")
    (tiny / "test" / "a" / "Thumbs.db").write_bytes(b"not an image")
    (tiny / "test" / "a" / "._0.png").write_bytes(b"what a Mac leaves beside 0.png")
    save_image(tiny / "test" / ".b.being-written" / "0.png", seed=0)
    assert_same(tiny_tasks(tiny), tasks)


@pytest.mark.parametrize("name", ["4.PNG", "4.jpg", "4.JPEG"])
def test_other_endings_are_images_too(tiny, name):
    save_image(tiny / "test" / "a" / name, seed=0)
    assert list(ImageTasks.from_folder(TINY, tiny, ("test",), 2, 1, 1).classes["test"].counts) == [5, 4, 4]


def test_a_stray_image_beside_the_class_folders_is_no_class(tiny):
    expected = tiny_tasks(tiny)
    shutil.copy(tiny / "test" / "b" / "2.png", tiny / "test" / "stray.png")
    assert_same(tiny_tasks(tiny), expected)


def test_linked_class_folders_are_followed(tiny):
    tasks = tiny_tasks(tiny)
    os.rename(tiny / "test" / "b", tiny.with_name("elsewhere"))
    (tiny / "test" / "b").symlink_to(tiny.with_name("elsewhere"), target_is_directory=True)
    assert_same(tiny_tasks(tiny), tasks)


# The cache.


def test_second_start_decodes_nothing(tiny, opened, capsys):
    tasks = tiny_tasks(tiny)
    assert len(opened) == 12
    assert_same(tiny_tasks(tiny), tasks)
    os.rename(tiny, tiny.with_name("moved"))
    assert_same(tiny_tasks(tiny.with_name("moved")), tasks)
    assert len(opened) == 12
    assert sorted(os.listdir(tiny.with_name("moved") / ".cache")) == ["test.json", "test.npy"]
    assert capsys.readouterr().out == ""


def other_pixels(folder):
    file = folder / "a" / "0.png"
    before = file.stat()
    save_image(file, seed=99, compress_level=0)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert file.stat().st_size == before.st_size


def other_length(folder):
    file = folder / "a" / "0.png"
    before = file.stat()
    save_image(file, seed=99, compress_level=9)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size != before.st_size


CHANGES = {
    "other pixels": other_pixels,
    "other length, same time": other_length,
    "image added": lambda folder: save_image(folder / "a" / "00.png", seed=99),
    "image removed": lambda folder: (folder / "a" / "0.png").unlink(),
    "image renamed": lambda folder: os.rename(folder / "a" / "0.png", folder / "a" / "9.png"),
    "image moved": lambda folder: os.rename(folder / "a" / "3.png", folder / "b" / "00.png"),
    "class added": lambda folder: shutil.copytree(folder / "a", folder / "aa"),
    "class removed": lambda folder: shutil.rmtree(folder / "a"),
    "class renamed": lambda folder: os.rename(folder / "a", folder / "d"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_folder_is_noticed(tiny, change):
    before = tiny_tasks(tiny)
    change(tiny / "test")
    expected = uncached_tasks(tiny)
    assert any(not np.array_equal(*parts) for parts in zip(before, expected, strict=True))
    for _ in range(2):
        assert_same(tiny_tasks(tiny), expected)


def test_cache_of_another_size_or_colour_is_not_used(tiny):
    tiny_tasks(tiny)
    assert tiny_tasks(tiny, TINY._replace(channels=1)).support_x.shape[2:] == (3, 2, 1)
    with pytest.raises(InputError, match="3x2 pixels, not 2x3"):
        tiny_tasks(tiny, TINY._replace(size=(2, 3)))


def shortened(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "array gone": ("test.npy", os.remove),
    "array empty": ("test.npy", lambda file: file.write_bytes(b"")),
    "array cut short": ("test.npy", shortened),
    "array cut in its header": ("test.npy", lambda file: file.write_bytes(file.read_bytes()[:50])),
    "array's header unreadable": ("test.npy", lambda file: file.write_bytes(file.read_bytes().replace(b"}", b"("))),
    "array no array": ("test.npy", lambda file: file.write_bytes(b"no array" * 100)),
    "array of another shape": ("test.npy", lambda file: np.save(file, np.zeros((11, 3, 2, 3), np.uint8))),
    "array of another kind": ("test.npy", lambda file: np.save(file, np.zeros((12, 3, 2, 3), np.int8))),
    "array of pickles": ("test.npy", lambda file: np.save(file, np.array([{}]), allow_pickle=True)),
    "index gone": ("test.json", os.remove),
    "index empty": ("test.json", lambda file: file.write_bytes(b"")),
    "index cut short": ("test.json", shortened),
    "index no text": ("test.json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
    "index of another kind": ("test.json", lambda file: file.write_text("[1]")),
    "index of another format": ("test.json", lambda file: file.write_text(file.read_text().replace(": 3,", ": 2,", 1))),
}


@pytest.mark.parametrize("name, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_cache_is_made_anew(tiny, opened, name, damage):
    expected = tiny_tasks(tiny)
    file = tiny / ".cache" / name
    before = file.read_bytes()
    damage(file)
    opened.clear()
    assert_same(tiny_tasks(tiny), expected)
    assert len(opened) == 12
    assert file.read_bytes() == before
    assert_same(tiny_tasks(tiny), expected)
    assert len(opened) == 12


def refuse(error: OSError):
    def refused(*_args, **_named):
        raise error

    return refused


REFUSALS = {
    "folder": (Path, "mkdir", PermissionError(errno.EACCES, "Permission denied")),
    "file": (files, "open", OSError(errno.EROFS, "Read-only file system")),
    "full disk": (np.lib.format, "write_array_header_1_0", OSError(errno.ENOSPC, "No space left on device")),
    "moving in": (os, "replace", OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("module, function, error", REFUSALS.values(), ids=REFUSALS.keys())
def test_unwritable_cache_is_told_in_one_line(tiny, monkeypatch, capsys, module, function, error):
    expected = [uncached_tasks(tiny), uncached_tasks(tiny)]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(module, function, refuse(error), raising=False)
        source = ImageTasks.from_folder(TINY, tiny, ("train", "test"), 2, 1, 1)
    assert_same(source.draw(0, "test", 0, 40), expected[0])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert str(tiny / ".cache") in printed
    assert (error.strerror or str(error)) in printed
    assert not list(tiny.glob(".cache/*"))
    assert_same(tiny_tasks(tiny), expected[1])


@pytest.mark.parametrize("disk", [0, 2**40], ids=["full", "read-only"])
def test_images_that_fit_nowhere(tiny, monkeypatch, opened, disk):
    """Neither on the disk nor in the memory: one line, before all are decoded into it."""
    monkeypatch.setattr(images.devices, "memory", lambda: 200)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2**40, free=disk))
    if disk:
        monkeypatch.setattr(Path, "mkdir", refuse(OSError(errno.EROFS, "Read-only file system")))
    line = error_of(tiny)
    assert f"the image cache {tiny / '.cache'} cannot be written (" in line
    assert "are more than the memory, which has 0.0 GB: make room there, and let it be written, or lower" in line
    assert not opened


def test_a_full_disk_is_noticed_before_anything_is_decoded(tiny, monkeypatch, opened, capsys):
    expected = uncached_tasks(tiny)
    del opened[:]
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2**40, free=100))
    assert_same(tiny_tasks(tiny), expected)
    assert len(opened) == 12  # once, into the memory
    assert (
        "cannot be written (it needs 0.0 GB, and the disk has 0.0 GB left): the images are" in capsys.readouterr().out
    )


def test_of_two_starts_at_once_one_decodes(tiny, monkeypatch, opened, capsys):
    expected = uncached_tasks(tiny)
    del opened[:]
    decode, second = images._decode, []

    def slow(*arguments):
        """The second start begins when the first has begun to decode, and has time to do the same."""
        if not second:
            second.append(ThreadPoolExecutor().submit(tiny_tasks, tiny))
            wait(second, timeout=1)
        return decode(*arguments)

    monkeypatch.setattr(images, "_decode", slow)
    assert_same(tiny_tasks(tiny), expected)
    assert_same(second[0].result(), expected)
    assert len(opened) == 12
    assert capsys.readouterr().out == f"Another process writes to {tiny / '.cache'}: waiting for it.\n"


def test_file_in_the_cache_s_place(tiny, capsys):
    expected = uncached_tasks(tiny)
    (tiny / ".cache").write_text("a file of the user's")
    assert_same(tiny_tasks(tiny), expected)
    assert capsys.readouterr().out.count("\n") == 1
    assert (tiny / ".cache").read_text() == "a file of the user's"


@pytest.mark.parametrize("moved", [0, 1], ids=["before the array", "between array and index"])
def test_killed_while_the_cache_is_written(tiny, monkeypatch, moved):
    """The kill falls where the array is of other images than the last index; then those images return."""
    expected = tiny_tasks(tiny)
    original = tiny.with_name("original")
    shutil.copytree(tiny / "test", original)
    CHANGES["other pixels"](tiny / "test")

    class Killed(BaseException):
        pass

    replace, done = os.replace, []

    def replace_until_killed(source, target):
        if len(done) == moved:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_until_killed)
        tiny_tasks(tiny)
    assert len(done) == moved
    changed = tiny.with_name("changed")
    shutil.copytree(tiny, changed)
    assert_same(tiny_tasks(changed), uncached_tasks(changed))

    shutil.rmtree(tiny / "test")
    shutil.copytree(original, tiny / "test")  # with the times of its files
    assert_same(tiny_tasks(tiny), expected)


# Errors: one line that names the thing, its value and the way out.


def error_of(folder: Path, images=TINY, splits=("test",), way=2, shot=1, query=1) -> str:
    with pytest.raises(InputError) as raised:
        ImageTasks.from_folder(images, folder, splits, way, shot, query)
    message = str(raised.value)
    assert "\n" not in message
    return message


ROWS = {name: dataset.images for name, dataset in DATASETS.items() if dataset.images}


@pytest.mark.parametrize("images", ROWS.values(), ids=ROWS.keys())
def test_no_folder(tmp_path, images):
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("a file where a folder is to be")
        message = error_of(folder, images)
        assert f"no data folder {folder}" in message
        assert images.prepare in message
        assert "--data_path" in message
        assert (ROOT / images.prepare.split(" (")[0]).is_file()


@pytest.mark.parametrize("images", [OMNIGLOT, MINIIMAGENET], ids=["omniglot", "miniimagenet"])
def test_empty_folder(tmp_path, images):
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("no image")
    message = error_of(tmp_path, images)
    assert f"no images in {tmp_path if images.split_list else tmp_path / 'test'}:" in message
    assert "expected class folders of images there" in message
    assert images.prepare in message


def test_split_without_a_folder(tiny):
    assert f"no images in {tiny / 'val'}:" in error_of(tiny, splits=("train", "val"))


def test_too_few_classes(tiny):
    message = error_of(tiny, way=4)
    assert "--num_classes=4" in message
    assert f"the test split of {tiny} has 3 classes" in message
    assert "lower it" in message
    tiny_tasks(tiny, way=3)


def test_too_few_images_in_a_class(tiny):
    for file in ("1.png", "2.png", "3.png"):
        (tiny / "test" / "c" / file).unlink()
    (tiny / "test" / "b" / "3.png").unlink()
    message = error_of(tiny, shot=2, query=2)
    assert f"class c (test) in {tiny} has 1 images, but a task takes 4 of each class" in message
    assert "--update_batch_size" in message
    assert "--num_query" in message
    ImageTasks.from_folder(TINY, tiny, ("train",), 2, 2, 2)  # 4 are enough, and the split with too few is not asked for
    assert "class a (train)" in error_of(tiny, splits=("train", "test"), shot=2, query=3)


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_truncated_image_is_never_taken_for_a_whole_one(tmp_path, ending):
    file = tmp_path / "test" / "a" / f"0{ending}"
    save_image(file, seed=0, size=(16, 16))
    with Image.open(file) as image:
        whole = np.asarray(image).ravel()
    content = file.read_bytes()
    images = TINY._replace(size=(16, 16))
    refused = 0
    for length in range(len(content)):
        file.write_bytes(content[:length])
        try:
            pixels = read_image(file, images)
        except InputError as error:
            refused += 1
            assert f"cannot read image {file}: " in str(error)
            assert "\n" not in str(error)
        else:  # only what follows the pixels was missing
            np.testing.assert_array_equal(pixels.ravel(), whole)
    assert refused >= len(content) - 20  # the checksums and the end of a PNG


def test_image_of_another_size(tiny):
    file = tiny / "test" / "b" / "2.png"
    save_image(file, seed=0, size=(2, 3))
    message = error_of(tiny)
    assert f"image {file} is 2x3 pixels, not 3x2" in message
    assert TINY.prepare in message


# A folder of the user's own images, in the splits train and test, resized to 3x2.

OWN = DATASETS["folder"].images._replace(size=TINY.size)


def squares(*colours: tuple[int, ...], mode: str | None = None) -> Image.Image:
    """A row of 2x2 squares."""
    row = np.array(colours, np.uint8).repeat(2, 0)
    return Image.fromarray(np.stack([row, row])).convert(mode)


WHITE, BLACK, RED, GREEN, HALF_RED = (255,) * 3, (0,) * 3, (255, 0, 0), (0, 255, 0), (255, 127, 127)


def held(orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def palette_with_transparency() -> Image.Image:
    image = squares(RED, GREEN).quantize(2)
    image.info["transparency"] = image.getpixel((2, 0))  # green
    return image


RGBA = squares((*RED, 255), (*GREEN, 0), (*RED, 128))
SIXTEEN_BITS = Image.fromarray(np.array([[0, 300, 65535 // 2, 65535]], np.uint16))
UPRIGHT = squares(RED, GREEN)
KINDS = {
    "grey": ("png", squares(WHITE, RED, mode="L"), {}, [WHITE, (76,) * 3]),
    "1-bit": ("png", squares(WHITE, BLACK, mode="1"), {}, [WHITE, BLACK]),
    "palette": ("gif", squares(RED, GREEN, mode="P"), {}, [RED, GREEN]),
    "palette with transparency": ("png", palette_with_transparency(), {}, [RED, WHITE]),
    "alpha": ("png", RGBA, {}, [RED, WHITE, HALF_RED]),
    "alpha, lossless webp": ("webp", RGBA, {"lossless": True}, [RED, WHITE, HALF_RED]),
    "grey with alpha": ("png", RGBA.convert("LA"), {}, [(76,) * 3, WHITE, (165,) * 3]),
    "CMYK": (
        "tif",
        Image.merge("CMYK", squares(BLACK, RED).split() + squares(BLACK, BLACK, mode="L").split()),
        {},
        [WHITE, (0, 255, 255)],
    ),
    "turned": ("png", UPRIGHT.rotate(90, expand=True), held(6), [RED, GREEN]),
    "mirrored": ("tif", squares(GREEN, RED), held(2), [RED, GREEN]),
    "jpeg 2000": ("jp2", UPRIGHT, {}, [RED, GREEN]),
    "bitmap": ("BMP", UPRIGHT, {}, [RED, GREEN]),
    "wrong ending": ("jpg", UPRIGHT, {"format": "PNG"}, [RED, GREEN]),
}


@pytest.mark.parametrize(("ending", "image", "options", "colours"), KINDS.values(), ids=KINDS.keys())
def test_kinds_of_images(tmp_path, ending, image, options, colours):
    """What is transparent is white; a photograph is turned as its camera was held."""
    file = tmp_path / f"image.{ending}"
    image.save(file, **options)
    shape = OWN._replace(size=(2, 2 * len(colours)))
    np.testing.assert_array_equal(read_image(file, shape), np.asarray(squares(*colours)))
    grey = read_image(file, shape._replace(channels=1))
    np.testing.assert_array_equal(grey[:, :, 0], squares(*colours, mode="L"))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits(tmp_path, ending):
    SIXTEEN_BITS.save(tmp_path / f"image.{ending}")
    grey = read_image(tmp_path / f"image.{ending}", OWN._replace(size=(1, 4), channels=1))
    assert list(grey.ravel()) == [0, 1, 127, 255]


def test_images_of_any_size_are_resized(tiny):
    """Whatever their shape, all of each; and beside the cache of another size."""
    for name, size in (("wide", (40, 10)), ("high", (10, 40)), ("small", (2, 2))):
        (tiny / "test" / name).mkdir()
        halves = Image.new("RGB", size, "red")
        halves.paste("lime", (0, 0, size[0] // 2, size[1]))
        halves.save(tiny / "test" / name / "0.png")
        halves.save(tiny / "test" / name / "1.png")
    classes = ImageTasks.from_folder(OWN._replace(size=(2, 2)), tiny, ("test",), 2, 1, 1).classes["test"]
    for name in ("wide", "high", "small"):
        pixels = classes.pixels[classes.starts[classes.names.index(name)]]
        np.testing.assert_allclose(pixels, [[GREEN, RED]] * 2, atol=30)
    assert_same(tiny_tasks(tiny, OWN), tiny_tasks(tiny, OWN))
    assert sorted(os.listdir(tiny / ".cache")) == [
        *("test_2x2x3.json", "test_2x2x3.npy", "test_3x2x3.json", "test_3x2x3.npy")
    ]


def test_decoded_images_stay_on_the_disk(tiny, monkeypatch):
    """From the first start on; they may be more than the memory holds."""
    monkeypatch.setattr(images, "DECODED_AT_ONCE", 5)  # so that 12 come in three parts
    source = ImageTasks.from_folder(TINY, tiny, ("test",), 2, 1, 1)
    assert isinstance(source.classes["test"].pixels, np.memmap)
    np.testing.assert_array_equal(source.classes["test"].pixels, np.load(tiny / ".cache" / "test.npy"))
    assert_same(source.draw(0, "test", 0, 40), uncached_tasks(tiny))


def png_of_enormous_size() -> bytes:
    """A PNG that says it is 60,000 pixels wide and high: refused by Pillow before it fills the memory."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def truncated_jpeg(file: Path) -> None:
    save_image(file, 0, size=(64, 64), format="JPEG")
    os.truncate(file, file.stat().st_size // 2)


BROKEN = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no image at all\n" * 20),
    "bomb": lambda file: file.write_bytes(png_of_enormous_size()),
    "truncated": truncated_jpeg,
    "floats": lambda file: Image.new("F", (2, 3)).save(file, format="TIFF"),
    "link to nowhere": lambda file: file.unlink() or file.symlink_to("gone.png"),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN.keys())
def test_broken_image_is_told_or_left_out(tiny, capsys, opened, spoil):
    file = tiny / "test" / "b" / "2.png"
    spoil(file)
    message = error_of(tiny, OWN)
    assert f"cannot read image {file} of class b: " in message
    assert message.endswith("; replace or delete it, or leave out all such images with --skip_broken")

    skipping = OWN._replace(skip_broken=True)
    tasks = tiny_tasks(tiny, skipping)
    count = len(opened)
    assert_same(tiny_tasks(tiny, skipping), tasks)
    assert len(opened) == count  # not even the broken one is tried again
    told = f"Left out of {tiny / 'test'}, 1 of 12 images, which cannot be read: b/2.png\n"
    assert capsys.readouterr().out == 2 * told
    assert f"cannot read image {file}" in error_of(tiny, OWN)  # a cache that leaves it out does not hide it
    count = len(opened)
    tiny_tasks(tiny, skipping)
    assert len(opened) == count  # and outlives the error
    capsys.readouterr()

    file.unlink()
    assert_same(tiny_tasks(tiny), tasks)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["EIO", "ENOTCONN", "EMFILE"])
def test_a_failure_of_the_disk_leaves_no_image_out(tiny, monkeypatch, name):
    """Not even with --skip_broken: the image may be read at the next start."""
    skipping, expected = OWN._replace(skip_broken=True), tiny_tasks(tiny, OWN)
    shutil.rmtree(tiny / ".cache")
    with monkeypatch.context() as patch:
        number = getattr(errno, name)
        patch.setattr(Image, "open", refuse(OSError(number, os.strerror(number))))
        line = error_of(tiny, skipping)
    assert f"({os.strerror(number)}), which is no fault of the image: see to the disk, or to the limit of" in line
    assert_same(tiny_tasks(tiny, skipping), expected)


def test_other_classes_have_another_checksum(tiny):
    """By which several processes of a run know that they draw the same tasks."""

    def checksum():
        return ImageTasks.from_folder(TINY, tiny, ("train", "test"), 2, 1, 1).checksum()

    found = [checksum(), checksum()]
    (tiny / "test" / "a").rename(tiny / "test" / "d")
    found.append(checksum())
    (tiny / "train" / "b" / "3.png").unlink()
    found.append(checksum())
    assert found[0] == found[1] and len(set(found)) == 3


def test_broken_images_without_a_cache(tiny, capsys):
    (tiny / ".cache").write_text("a file of the user's")
    BROKEN["text"](tiny / "test" / "a" / "0.png")
    BROKEN["text"](tiny / "test" / "c" / "3.png")
    tasks = tiny_tasks(tiny, OWN._replace(skip_broken=True))
    assert "2 of 12 images, which cannot be read: a/0.png, c/3.png\n" in capsys.readouterr().out
    (tiny / "test" / "a" / "0.png").unlink()
    (tiny / "test" / "c" / "3.png").unlink()
    assert_same(tiny_tasks(tiny), tasks)


def unsplit(folder: Path) -> None:
    for name in "abc":
        os.rename(folder / "test" / name, folder / name)
    shutil.rmtree(folder / "train")
    (folder / "test").rmdir()


def link(folder: Path, *links: tuple[str, str]) -> None:
    for name, target in links:
        (folder / name).symlink_to(target)


def of_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only_text(folder: Path) -> None:
    of_nothing(folder)
    (folder / "test" / "a").mkdir(parents=True)
    (folder / "test" / "a" / "0.txt").write_text("no image")


HOSTILE = {
    "gone": (shutil.rmtree, "no data folder {0}: prepare it as docs/data.md .*--data_path"),
    "a file": (lambda folder: shutil.rmtree(folder) or folder.write_text(""), "no data folder {0}: .*--data_path"),
    "empty": (of_nothing, "no images in {0}/test: expected class folders of images there"),
    "only text": (only_text, "no images in {0}/test: expected class folders of images there"),
    "not split": (unsplit, "no images in {0}/test: .*; if they lie directly in {0}, give --split"),
    "class without images": (lambda folder: (folder / "test" / "d").mkdir(), r"class d \(test\) in {0} has 0 images"),
    "link to a folder above": (
        lambda folder: link(folder, ("test/a/up", "..")),
        "{0}/test/a/up is a link to {0}/test, a folder above it: remove it",
    ),
    "folders that link to each other": (
        lambda folder: link(folder, ("test/a/b", "../b"), ("test/b/a", "../a")),
        "{0}/test/././. is a link to {0}/test/., a folder above it: remove it",
    ),
    "link to itself": (
        lambda folder: link(folder, ("test/d", "d")),
        r"cannot read {0}/test/d \(Too many levels of symbolic links\): make it readable, or remove it",
    ),
    "image that links to itself": (
        lambda folder: link(folder, ("test/a/4.png", "4.png")),
        r"cannot read {0}/test/a/4.png \(Too many levels of symbolic links\): make it readable, or remove it",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_folder(tiny, spoil, message):
    spoil(tiny)
    assert re.search(message.format(re.escape(str(tiny))), error_of(tiny, OWN))


def test_folder_that_may_not_be_read(tiny, monkeypatch):
    def scandir(folder, scandir=os.scandir):
        if folder == str(tiny / "test" / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir)  # permissions alone do not keep root out
    message = error_of(tiny, OWN)
    assert message == f"cannot read {tiny / 'test' / 'b'} (Permission denied): make it readable, or remove it"


def test_what_could_never_end_is_no_image(tiny):
    """A pipe, which would be waited for, and PostScript, for which Pillow starts Ghostscript."""
    expected = tiny_tasks(tiny)
    os.mkfifo(tiny / "test" / "a" / "pipe.png")
    (tiny / "test" / "a" / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (tiny / "test" / "b" / "2.png").rename(tiny / "test" / "b" / "2.jpg")
    assert_same(tiny_tasks(tiny), expected)
    (tiny / "test" / "b" / "2.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 3\n")
    assert "cannot identify image file" in error_of(tiny)


# Class folders that --split splits.


@pytest.fixture
def letters(tmp_path) -> Path:
    """Ten classes of two images in one folder."""
    for name in "abcdefghij":
        for image in range(2):
            save_image(tmp_path / "letters" / name / f"{image}.png", seed=image)
    return tmp_path / "letters"


def test_split_is_always_the_same_shuffle(letters):
    """Pinned: another one would train on what an earlier run was tested on."""

    def names(*sizes):
        images = OWN._replace(split_sizes=sizes)
        classes = load_splits(images, letters, SPLITS)
        return ["".join(classes[split].names) for split in SPLITS]

    assert names(6, 2, 2) == ["dfghij", "ae", "bc"]
    assert names(0, 0, 10) == ["", "", "abcdefghij"]


def test_wrong_splits(letters, tiny):
    wrong = OWN._replace(split_sizes=(6, 2, 1))
    assert error_of(letters, wrong) == (
        f"--split=6,2,1 is 9 classes, but {letters} has 10: give three numbers of that sum"
    )
    assert f"--num_classes=2, but the test split of {letters} has 1 classes" in error_of(
        letters, OWN._replace(split_sizes=(6, 3, 1))
    )
    assert f"{tiny} has the folders train, val or test: leave --split out" in error_of(tiny, wrong)
    assert f"{letters} has a published split: leave --split out" in error_of(
        letters, OMNIGLOT._replace(split_sizes=(6, 2, 2))
    )


# Omniglot's splits.


def test_published_split_is_the_rule_s():
    """The original's data_generator.py, its listing sorted: shuffled by seed 1, cut at 1,100 and 1,200."""
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 1623
    assert [len(PUBLISHED[split]) for split in SPLITS] == [1100, 100, 423]
    shuffled = sorted(CHARACTERS)
    Random(1).shuffle(shuffled)
    assert shuffled == CHARACTERS


def test_published_split_has_the_published_characters(shared):
    names = set()
    for archive in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(shared / "data" / "omniglot" / f"{archive}.zip") as opened_archive:
            drawings = [Path(name) for name in opened_archive.namelist() if name.endswith(".png")]
        names |= {f"{path.parts[-3]}/{path.parts[-2]}" for path in drawings}
    assert names == set(CHARACTERS)


def blank_omniglot(folder: Path, names) -> Path:
    """Character folders of two drawings each, all of them links to one blank image."""
    folder.mkdir()
    blank = folder / "blank"
    Image.new("1", OMNIGLOT.size, 1).save(blank, "png")
    for name in names:
        (folder / name).mkdir(parents=True)
        for drawing in ("0.png", "1.png"):
            os.link(blank, folder / name / drawing)
    return folder


def test_complete_omniglot_has_the_published_split(tmp_path, capsys):
    folder = blank_omniglot(tmp_path / "omniglot", CHARACTERS)
    classes = ImageTasks.from_folder(OMNIGLOT, folder, SPLITS, 20, 1, 1).classes
    assert {split: classes[split].names for split in SPLITS} == {split: sorted(PUBLISHED[split]) for split in SPLITS}
    assert capsys.readouterr().out == ""


def test_folders_without_images_split_nothing_anew(tmp_path, capsys):
    """Such as the __pycache__ of the script that lies there, and what was unpacked and not prepared."""
    folder = blank_omniglot(tmp_path / "omniglot", CHARACTERS)
    for name in ("__pycache__", "strokes_background/Greek/character01", "old"):
        (folder / name).mkdir(parents=True)
    (folder / "__pycache__" / "resize_images.cpython-311.pyc").write_bytes(b"code")
    classes = ImageTasks.from_folder(OMNIGLOT, folder, SPLITS, 20, 1, 1).classes
    assert {split: classes[split].names for split in SPLITS} == {split: sorted(PUBLISHED[split]) for split in SPLITS}
    assert capsys.readouterr().out == ""


def test_part_of_omniglot_keeps_its_places_and_says_so(tmp_path, capsys):
    part = {split: [name for name in PUBLISHED[split] if name < "C"] for split in SPLITS}
    total = sum(map(len, part.values()))
    folder = blank_omniglot(tmp_path / "omniglot", [name for split in SPLITS for name in part[split]])
    classes = ImageTasks.from_folder(OMNIGLOT, folder, SPLITS, 5, 1, 1).classes
    assert {split: classes[split].names for split in SPLITS} == {split: sorted(part[split]) for split in SPLITS}
    assert capsys.readouterr().out == (
        f"{folder} has {total} of the 1,623 published classes: each stays in its published split.\n"
    )


def test_split_without_classes(tmp_path):
    folder = blank_omniglot(tmp_path / "omniglot", PUBLISHED["train"][:10])
    ImageTasks.from_folder(OMNIGLOT, folder, ("train",), 5, 1, 1)
    assert "the test split of" in error_of(folder, OMNIGLOT, ("train", "test"), way=5)


@pytest.mark.parametrize("stranger", ["Klingon/character01", "another"])
def test_one_foreign_name_splits_all_by_the_rule(tmp_path, capsys, stranger):
    names = [*PUBLISHED["train"][:28], stranger, *PUBLISHED["test"][:11]]
    folder = blank_omniglot(tmp_path / "omniglot", names)
    classes = ImageTasks.from_folder(OMNIGLOT, folder, SPLITS, 2, 1, 1).classes
    shuffled = sorted(names)
    Random(1).shuffle(shuffled)
    assert classes["train"].names == sorted(shuffled[:27])  # 40 * 1,100 / 1,623
    assert classes["val"].names == sorted(shuffled[27:29])
    assert classes["test"].names == sorted(shuffled[29:])
    assert capsys.readouterr().out == (
        f"{folder} has 40 classes, not the 1,623 published: split 27/2/11 by a seed-1 shuffle.\n"
    )
    assert ImageTasks.from_folder(OMNIGLOT, folder, ("test",), 2, 1, 1).classes["test"].names == classes["test"].names


def test_tasks_of_real_omniglot(shared, tmp_path, capsys):
    """Five alphabets from the published archive, through the script that prepares them."""
    archive, folder = shared / "data" / "omniglot" / "images_background_small1.zip", tmp_path / "omniglot"
    subprocess.run([sys.executable, ROOT / OMNIGLOT.prepare, archive, "--out", folder], check=True, capture_output=True)
    source = ImageTasks.from_folder(OMNIGLOT, folder, SPLITS, 5, 1, 1)
    assert "has 136 of the 1,623 published classes" in capsys.readouterr().out
    assert [len(source.classes[split].names) for split in SPLITS] == [93, 10, 33]
    for split in SPLITS:
        assert set(source.classes[split].names) <= set(PUBLISHED[split])
        assert set(source.classes[split].counts) == {20}
        tasks = source.draw(0, split, 0, 20)
        assert set(np.unique(tasks.support_x)) == {0, 1}  # binary as published
        assert 0 < tasks.support_x.mean() < 0.3  # ink is 1
        assert_drawn_from(tasks, 5, OMNIGLOT, {name: folder / name for name in source.classes[split].names})


# The sinusoid.


def sines(tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """x (with what the oracle adds) and y of all points, [T, K + Q, width], in float64."""
    x = np.concatenate([tasks.support_x, tasks.query_x], 1).astype(float)
    return x, np.concatenate([tasks.support_y, tasks.query_y], 1).astype(float)


@pytest.mark.parametrize("shot, query", [(1, 1), (5, 5), (10, 10), (3, 8)])
def test_sinusoid_is_a_sine(shot, query):
    oracle = SinusoidTasks(shot, query, oracle=True).draw(3, "train", 7, 50)
    assert [part.shape for part in oracle] == [(50, shot, 3), (50, shot, 1), (50, query, 3), (50, query, 1)]
    assert all(part.dtype == np.float32 for part in oracle)
    x, y = sines(oracle)
    amplitude, phase = x[:, :, 1], x[:, :, 2]
    assert (amplitude == amplitude[:, :1]).all()
    assert (phase == phase[:, :1]).all()
    np.testing.assert_allclose(y[:, :, 0], amplitude * np.sin(x[:, :, 0] - phase), atol=1e-5)

    plain = SinusoidTasks(shot, query).draw(3, "train", 7, 50)
    assert_same(plain, Tasks(oracle.support_x[..., :1], oracle.support_y, oracle.query_x[..., :1], oracle.query_y))


def test_draws_of_the_sinusoid_are_uniform():
    x, _ = sines(SinusoidTasks(2, 2, oracle=True).draw(0, "train", 0, 20_000))
    columns = {"amplitude": (x[:, 0, 1], 0.1, 5), "phase": (x[:, 0, 2], 0, np.pi)}
    columns |= {f"x{i}": (x[:, i, 0], -5, 5) for i in range(4)}
    for values, low, high in columns.values():
        near = (high - low) / 1000
        assert low - 1e-6 <= values.min() < low + near
        assert high - near < values.max() <= high + 1e-6
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    for (one, (a, *_)), (other, (b, *_)) in product(columns.items(), repeat=2):
        if one < other:
            assert stats.spearmanr(a, b).pvalue > 1e-5
        assert stats.spearmanr(a[:-1], b[1:]).pvalue > 1e-5  # nor does the next task depend on this one


@given(st.integers(1, 6), st.integers(1, 6), seeds, splits, firsts, st.lists(st.integers(1, 4), min_size=2, max_size=4))
@settings(deadline=None)
def test_sinusoid_does_not_depend_on_the_meta_batch(shot, query, seed, split, first, batches):
    assert_drawn_in_batches(SinusoidTasks(shot, query, oracle=True), seed, split, first, batches)


def test_sinusoid_test_tasks_are_pinned():
    """The first of the 600 tasks that every sinusoid error is a mean over: they must never change."""
    x, y = sines(SinusoidTasks(10, 10, oracle=True).draw(0, "test", 0, 4))
    digits = np.rint(np.concatenate([x, y], 2) * 1e4).astype(int)
    digest = hashlib.sha256(" ".join(map(str, digits.ravel())).encode()).hexdigest()
    assert digest == "0d06b8830fe123464a5513670b63862ab2278131d56a02bea33e0d6afaa475fc"


def test_tasks_of_ones_own_arrays():
    """Float32 and one-hot, ready for a step; two functions are a network."""
    random = np.random.default_rng(0)
    labels = np.tile([0, 1, 2], (4, 2))
    tasks = tasks_from_arrays(
        random.normal(size=(4, 6, 5)), labels, random.normal(size=(4, 9, 5)), labels[:, :1].repeat(9, 1), way=3
    )
    assert {part.dtype for part in tasks} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(tasks.support_y.argmax(-1), labels)
    network = Network(
        init=lambda seed: {"w": tf.random.stateless_normal([5, 3], [seed, 0])},
        apply=lambda weights, x: x @ weights["w"],
    )
    maml = maml_of(network, functools.partial(xent, shot=2), accuracy, inner_lr=0.1, inner_steps=1)
    before = float(maml.train_step(tasks)[0])
    for _ in range(20):
        loss = float(maml.train_step(tasks)[0])
    assert loss < before
    assert maml.keys == {"w": "w"}
    regression = tasks_from_arrays(labels[..., None], labels[..., None], labels[..., None], labels[..., None])
    assert regression.query_y.shape == (4, 6, 1)


@pytest.mark.parametrize(
    "changed, way, reason",
    [
        ({"support_x": np.zeros((4, 6))}, 3, r"support_x is float64, of the shape \[4, 6\]: give numbers \[tasks"),
        ({"query_x": np.full((4, 9, 5), "a")}, 3, "query_x is <U1, of the shape"),
        ({"support_y": np.full((4, 6), 3)}, 3, "support_y is int64, .* class numbers from 0 to 2, "),
        ({"support_y": np.full((4, 6), 1.0)}, 3, "support_y is float64, .* class numbers from 0 to 2, "),
        (
            {"query_y": np.zeros((4, 8), int)},
            3,
            r"query_y is float64, of the shape \[4, 8, 3\], beside query_x of \[4, 9, 5\]",
        ),
        ({}, None, r"support_y is int64, of the shape \[4, 6\], beside .* or class numbers and way"),
        ({"query_x": np.full((4, 9, 5), np.nan)}, 3, "query_x or query_y has a value that is no number"),
        ({"query_x": np.zeros((4, 0, 5)), "query_y": np.zeros((4, 0), int)}, 3, r"of the shape \[4, 0, 5\]: .* one"),
        (
            {"support_y": np.zeros((4, 6, 2)), "query_y": np.zeros((4, 9, 1))},
            None,
            r"support_y of \[4, 6, 2\] and query_y of \[4, 9, 1\] differ in the number of targets",
        ),
        ({"query_x": np.zeros((4, 9, 6))}, 3, r"support_x of \[4, 6, 5\] and query_x of \[4, 9, 6\] differ"),
    ],
)
def test_wrong_arrays(changed, way, reason):
    arrays = {
        "support_x": np.zeros((4, 6, 5)),
        "support_y": np.zeros((4, 6), int),
        "query_x": np.zeros((4, 9, 5)),
        "query_y": np.zeros((4, 9), int),
    }
    with pytest.raises(InputError, match=reason):
        tasks_from_arrays(**arrays | changed, way=way)
