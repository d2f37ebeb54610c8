"""Tasks: their structure, and the uniformity, independence and repeatability of their draws."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import data_generator
from data_generator import ImageTasks, SinusoidTasks, tasks_from_arrays
from files import InputError
from images import ROOT, SPLITS, Classes
from networks import Network
from recipe import DATASETS, Images
from tests.helpers import maml_of
from utils import Tasks, accuracy, xent

OMNIGLOT, MINIIMAGENET = DATASETS["omniglot"].images, DATASETS["miniimagenet"].images
PUBLISHED = json.loads((ROOT / "data" / "splits" / "omniglot.json").read_text())
CHARACTERS = [name for split in SPLITS for name in PUBLISHED[split]]


def assert_same(tasks: Tasks, others: Tasks) -> None:
    for part, other in zip(tasks, others, strict=True):
        np.testing.assert_array_equal(part, other)


def assert_drawn_in_batches(source: ImageTasks | SinusoidTasks, seed, split, first, batches: list[int]) -> None:
    """Assert that tasks drawn in batches, the last batch first, equal those drawn at once."""
    whole = source.draw(seed, split, first, sum(batches))
    for i in reversed(range(len(batches))):
        start, count = sum(batches[:i]), batches[i]
        assert_same(source.draw(seed, split, first + start, count), Tasks(*(p[start : start + count] for p in whole)))


# Random draws. The seeds are fixed, so a test that passes once always passes. The bounds on p are low enough that with
# a different generator, fewer than one run in a hundred would fail by chance.


def assert_uniform(outcomes: np.ndarray, possible: int) -> None:
    """Assert that the rows of `outcomes` take all possible values equally often."""
    _, counts = np.unique(outcomes, axis=0, return_counts=True)
    assert len(counts) == possible
    assert stats.chisquare(counts).pvalue > 1e-4


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    assert stats.chi2_contingency(stats.contingency.crosstab(a, b).count).pvalue > 1e-6


# Tasks of numbered images. The 2x2 pixels of an image encode its number and rotation.


class Drawn(NamedTuple):
    """The images that a task has, in its order; each field is [T, K + Q, N]."""

    classes: np.ndarray
    examples: np.ndarray
    quarters: np.ndarray  # quarter turns, counterclockwise
    labels: np.ndarray

    def by_label(self) -> "Drawn":
        """Return the same with label n in column n."""
        columns = self.labels.argsort(2)
        return Drawn(*(np.take_along_axis(part, columns, 2) for part in self))


def numbered_tasks(counts, way, shot, query, names=None, images=OMNIGLOT) -> ImageTasks:
    """Return tasks whose splits all have counts[c] images of class c, numbered consecutively across classes."""
    counts = np.array(counts)
    number = np.arange(counts.sum())
    corners = [np.full_like(number, 255), number // 100, number % 100, np.zeros_like(number)]
    pixels = np.stack(corners, 1).astype(np.uint8).reshape(-1, 2, 2, 1)
    names = names or [f"class{c:04}" for c in range(len(counts))]
    classes = Classes(names, np.cumsum(counts) - counts, counts, pixels)
    return ImageTasks(images, dict.fromkeys(SPLITS, classes), way, shot, query)


def drawn(tasks: Tasks, counts, way: int, images=OMNIGLOT) -> Drawn:
    """Decode the numbered images of tasks, and their labels."""
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
    """Draw (images per class, way, shot, query): any valid combination, often with no surplus images."""
    way, shot, query = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    spare = draw(st.lists(st.integers(0, 5), min_size=way, max_size=way + 4))
    return [shot + query + more for more in spare], way, shot, query


seeds, splits, firsts = st.integers(0, 2**63), st.sampled_from(SPLITS), st.integers(0, 2**40)


@given(image_tasks(), seeds, splits, firsts)
@settings(deadline=None)
def test_image_task_has_k_and_q_distinct_images_per_class(parameters, seed, split, first):
    counts, way, shot, query = parameters
    tasks = numbered_tasks(*parameters).draw(seed, split, first, 3)
    assert [part.shape for part in tasks] == [
        *((3, way * shot, 2, 2, 1), (3, way * shot, way)),
        *((3, way * query, 2, 2, 1), (3, way * query, way)),
    ]
    assert all(part.dtype == np.float32 for part in tasks)
    for labels in (tasks.support_y, tasks.query_y):
        assert set(np.unique(labels)) == {0, 1}
        assert (labels.sum(2) == 1).all()

    rows = drawn(tasks, counts, way)
    # Each group of N images has every label once, so there are K per class in the support set and Q in the query set.
    np.testing.assert_array_equal(np.sort(rows.labels, 2), np.broadcast_to(np.arange(way), rows.labels.shape))
    label = rows.by_label()
    assert (label.classes == label.classes[:, :1]).all()
    assert (label.quarters == label.quarters[:, :1]).all()
    assert all(len(set(task[0])) == way for task in label.classes)
    examples = np.sort(label.examples, 1)
    assert (examples[:, 1:] > examples[:, :-1]).all()  # no duplicates: support and query are disjoint


@given(image_tasks(), seeds, splits, firsts, st.lists(st.integers(1, 4), min_size=2, max_size=4))
@settings(deadline=None)
def test_image_task_does_not_depend_on_the_meta_batch(parameters, seed, split, first, batches):
    assert_drawn_in_batches(numbered_tasks(*parameters), seed, split, first, batches)


@pytest.mark.parametrize(
    "source", [numbered_tasks([20] * 30, 5, 1, 1), SinusoidTasks(5, 5)], ids=["images", "sinusoid"]
)
def test_tasks_differ_between_seeds_splits_and_numbers(source):
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
def test_uneven_queries_have_the_same_total(parameters, seed, split, first):
    """The support set has K images per class; the N * Q queries are distinct and belong to the task's classes."""
    counts, way, shot, query = parameters
    counts = [count + (way - 1) * query for count in counts]
    tasks = dirichlet_tasks(counts, way, shot, query).draw(seed, split, first, 3)
    assert tasks.support_y.shape == (3, way * shot, way) and tasks.query_y.shape == (3, way * query, way)
    assert (tasks.support_y.sum(1) == shot).all()
    rows = drawn(tasks, counts, 1)
    for classes, examples, quarters, labels in zip(*(part[..., 0] for part in rows), strict=True):
        assert len(set(zip(classes, examples, strict=True))) == way * (shot + query)
        assert len(set(zip(labels, classes, quarters, strict=True))) == way  # a label is a class in one rotation
    assert_drawn_in_batches(dirichlet_tasks(counts, way, shot, query), seed, split, first, [2, 1])


def test_query_shares_follow_the_dirichlet_distribution():
    """A share is Beta(2, 2 (N - 1)), two shares have correlation -1 / (N - 1), and rounding moves less than one."""
    words = data_generator._words(0, "test", 0, 4000, per_task=10)
    shares = data_generator._query_counts(words, 10**9) / 10**9
    for share in shares.T:
        assert stats.kstest(share, stats.beta(2, 8).cdf).pvalue > 1e-4
    np.testing.assert_allclose(np.corrcoef(shares.T)[np.triu_indices(5, 1)], -0.25, atol=0.06)
    few = data_generator._query_counts(words, 75)
    assert (few.sum(1) == 75).all() and (few >= 0).all() and (few == 0).any()
    assert np.abs(few - 75 * shares).max() < 1


def test_image_draws_are_uniform_and_independent():
    counts = [5] * 7
    source = numbered_tasks(counts, 3, 1, 1)
    rows = drawn(source.draw(0, "train", 0, 20_000), counts, 3)
    label = rows.by_label()
    assert_uniform(label.classes[:, 0], possible=7 * 6 * 5)
    assert_uniform(label.quarters[:, 0], possible=4**3)
    for n in range(3):
        assert_uniform(label.examples[:, :, n], possible=5 * 4)
    assert_uniform(rows.labels.reshape(-1, 6), possible=6 * 6)  # the order of the classes is new for each example

    # Draws are independent, within a task and between successive tasks.
    columns = {
        **{("class", 0, n): label.classes[:, 0, n] for n in range(3)},
        **{("quarter", 0, n): label.quarters[:, 0, n] for n in range(3)},
        **{("example", e, n): label.examples[:, e, n] for e, n in product(range(2), range(3))},
        **{("order", e, place): rows.labels[:, e, place] for e, place in product(range(2), range(2))},
    }
    for (one, a), (other, b) in permutations(columns.items(), 2):
        assert_independent(a[:-1], b[1:])
        # Within a task, the classes, a class's examples and an order's places are drawn without replacement.
        if one < other and (one[0] != other[0] or (one[0] == "example" and one[2] != other[2])):
            assert_independent(a, b)
    for column in columns.values():
        assert_independent(column[:-1], column[1:])


def test_draws_are_uniform_if_class_sizes_differ():
    counts = [3, 11, 6]
    label = drawn(numbered_tasks(counts, 2, 1, 1).draw(0, "train", 0, 6000), counts, 2).by_label()
    assert_uniform(label.classes[:, 0], possible=6)
    for c, count in enumerate(counts):
        assert_uniform(label.examples[:, 0][label.classes[:, 0] == c], possible=count)
        assert_uniform(label.examples[:, 1][label.classes[:, 1] == c], possible=count)


def test_omniglot_test_tasks_are_pinned():
    """The 600 tasks behind every 5-way 1-shot Omniglot accuracy must never change."""
    names, counts = sorted(PUBLISHED["test"]), [20] * 423
    tasks = numbered_tasks(counts, 5, 1, 1, names).draw(0, "test", 0, 600)
    rows = zip(*(part.ravel() for part in drawn(tasks, counts, 5)), strict=True)
    text = "".join(f"{names[c]} {example} {quarter} {label}\n" for c, example, quarter, label in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "dec14eec586d651150471fb2f53513002813311690132bb2e2a70f68ed32de23"


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if row.images])
def test_only_omniglot_is_rotated(name):
    images = DATASETS[name].images
    source = numbered_tasks([4] * 5, 5, 1, 1, images=images)
    assert drawn(source.draw(0, "train", 0, 100), [4] * 5, 5, images).quarters.any() == (name == "omniglot")


def test_drawing_does_not_modify_the_images():
    source = numbered_tasks([4] * 5, 5, 1, 1)
    before = source.classes["train"].pixels.copy()
    source.draw(0, "train", 0, 50)
    np.testing.assert_array_equal(source.classes["train"].pixels, before)


# Tasks of image files.


def assert_drawn_from(tasks: Tasks, way: int, images: Images, folders: dict[str, Path]) -> None:
    """Assert that each label of each task is one class folder (by name) at one rotation, bit for bit."""
    known: dict[bytes, set] = {}
    for name, folder in folders.items():
        for file in folder.iterdir():
            with Image.open(file) as image:
                u8 = np.asarray(image.convert("L" if images.channels == 1 else "RGB")).reshape(*images.size, -1)
            pixels = u8.astype(np.float32) / np.float32(255)
            for quarter in range(4 if images.rotations else 1):
                rotated = np.rot90(1 - pixels if images.invert else pixels, quarter)
                known.setdefault(rotated.tobytes(), set()).add((name, quarter))

    x = np.concatenate([tasks.support_x, tasks.query_x], 1)
    labels = np.concatenate([tasks.support_y, tasks.query_y], 1).argmax(2)
    quarters = set()
    for t, label in product(range(len(x)), range(way)):
        matches = set.intersection(*(known[image.tobytes()] for image in x[t, labels[t] == label]))
        assert len({name for name, _ in matches}) == 1
        quarters |= {quarter for _, quarter in matches}
    assert quarters == set(range(4 if images.rotations else 1))


def test_omniglot_pixels_match_the_files(omniglot_like):
    source = ImageTasks.from_folder(OMNIGLOT, omniglot_like, ("train", "test"), 5, 2, 3)
    for split in ("train", "test"):
        folders = {name: omniglot_like / name for name in source.classes[split].names}
        tasks = source.draw(0, split, 0, 20)
        assert tasks.support_x.shape == (20, 10, 28, 28, 1)
        assert_drawn_from(tasks, 5, OMNIGLOT, folders)


@pytest.mark.parametrize("images", [OMNIGLOT, OMNIGLOT._replace(rotations=False)], ids=["rotated", "upright"])
def test_names_give_the_class_and_angle_of_each_label(omniglot_like, images):
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


def test_miniimagenet_pixels_match_the_files(miniimagenet_like):
    source = ImageTasks.from_folder(MINIIMAGENET, miniimagenet_like, ("train", "test"), 5, 1, 4)
    for split in ("train", "test"):
        folders = {folder.name: folder for folder in (miniimagenet_like / split).iterdir()}
        tasks = source.draw(0, split, 0, 4)
        assert tasks.query_x.shape == (4, 20, 84, 84, 3)
        assert_drawn_from(tasks, 5, MINIIMAGENET, folders)


@pytest.mark.parametrize("invert", [False, True])
def test_every_gray_value_is_scaled_exactly(tmp_path, invert):
    folder = tmp_path / "train" / "grays"
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


def test_tasks_of_real_omniglot(shared, tmp_path, capsys):
    """Five alphabets from the published archive, prepared by the script."""
    archive, folder = shared / "data" / "omniglot" / "images_background_small1.zip", tmp_path / "omniglot"
    subprocess.run([sys.executable, ROOT / OMNIGLOT.prepare, archive, "--out", folder], check=True, capture_output=True)
    source = ImageTasks.from_folder(OMNIGLOT, folder, SPLITS, 5, 1, 1)
    assert "136 of the 1,623 published classes" in capsys.readouterr().out
    assert [len(source.classes[split].names) for split in SPLITS] == [93, 10, 33]
    for split in SPLITS:
        assert set(source.classes[split].names) <= set(PUBLISHED[split])
        assert set(source.classes[split].counts) == {20}
        tasks = source.draw(0, split, 0, 20)
        assert set(np.unique(tasks.support_x)) == {0, 1}  # binary, as published
        assert 0 < tasks.support_x.mean() < 0.3  # ink is 1
        assert_drawn_from(tasks, 5, OMNIGLOT, {name: folder / name for name in source.classes[split].names})


def test_checksum_changes_with_the_classes():
    """The processes of a run compare it, to know that they draw the same tasks."""
    names = ["a", "b", "c"]
    checksums = [
        numbered_tasks(counts, 2, 1, 1, names).checksum()
        for counts, names in (([4, 4, 4], names), ([4, 4, 4], names), ([4, 4, 4], ["a", "b", "d"]), ([4, 3, 4], names))
    ]
    assert checksums[0] == checksums[1] and len(set(checksums)) == 3


# The sinusoid.


def sines(tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Return x (with the oracle's inputs) and y of all points, float64 [T, K + Q, width]."""
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


def test_sinusoid_draws_are_uniform_and_independent():
    x, _ = sines(SinusoidTasks(2, 2, oracle=True).draw(0, "train", 0, 20_000))
    columns = {"amplitude": (x[:, 0, 1], 0.1, 5), "phase": (x[:, 0, 2], 0, np.pi)}
    columns |= {f"x{i}": (x[:, i, 0], -5, 5) for i in range(4)}
    for values, low, high in columns.values():
        margin = (high - low) / 1000
        assert low - 1e-6 <= values.min() < low + margin
        assert high - margin < values.max() <= high + 1e-6
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    for (one, (a, *_)), (other, (b, *_)) in product(columns.items(), repeat=2):
        if one < other:
            assert stats.spearmanr(a, b).pvalue > 1e-5
        assert stats.spearmanr(a[:-1], b[1:]).pvalue > 1e-5  # successive tasks are independent, too


@given(st.integers(1, 6), st.integers(1, 6), seeds, splits, firsts, st.lists(st.integers(1, 4), min_size=2, max_size=4))
@settings(deadline=None)
def test_sinusoid_does_not_depend_on_the_meta_batch(shot, query, seed, split, first, batches):
    assert_drawn_in_batches(SinusoidTasks(shot, query, oracle=True), seed, split, first, batches)


def test_sinusoid_test_tasks_are_pinned():
    """The first of the 600 tasks behind every sinusoid error; they must never change."""
    x, y = sines(SinusoidTasks(10, 10, oracle=True).draw(0, "test", 0, 4))
    digits = np.rint(np.concatenate([x, y], 2) * 1e4).astype(int)
    digest = hashlib.sha256(" ".join(map(str, digits.ravel())).encode()).hexdigest()
    assert digest == "0d06b8830fe123464a5513670b63862ab2278131d56a02bea33e0d6afaa475fc"


def test_own_arrays_train_a_network_of_two_functions():
    """tasks_from_arrays gives float32 and one-hot labels."""
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
    "changed, way, named",
    [
        ({"support_x": np.zeros((4, 6))}, 3, "support_x"),
        ({"query_x": np.full((4, 9, 5), "a")}, 3, "query_x"),
        ({"query_x": np.full((4, 9, 5), np.nan)}, 3, "query_x"),
        ({"query_x": np.zeros((4, 0, 5)), "query_y": np.zeros((4, 0), int)}, 3, "query_x"),
        ({"query_x": np.zeros((4, 9, 6))}, 3, "support_x .* query_x"),
        ({"support_y": np.full((4, 6), 3)}, 3, "support_y"),
        ({"support_y": np.full((4, 6), 1.0)}, 3, "support_y"),
        ({"query_y": np.zeros((4, 8), int)}, 3, "query_y"),
        ({}, None, "support_y"),
        ({"support_x": [[[1, 2], [3]]]}, 3, "support_x"),
        ({"query_y": [[0, 1], [2]]}, 3, "query_y"),
        ({"support_x": np.zeros((6, 5)), "support_y": np.zeros(6, int)}, 3, "support_x .*axis"),
        ({"support_x": np.zeros((6, 28, 28)), "support_y": np.zeros(6, int)}, 3, "support_x .*axis"),
        ({"support_x": np.zeros((6, 5)), "support_y": np.zeros((6, 1))}, None, "support_x .*axis"),
        ({"support_y": np.zeros((4, 6, 2)), "query_y": np.zeros((4, 9, 1))}, None, "support_y .* query_y"),
    ],
)
def test_invalid_arrays_are_named(changed, way, named):
    arrays = {
        "support_x": np.zeros((4, 6, 5)),
        "support_y": np.zeros((4, 6), int),
        "query_x": np.zeros((4, 9, 5)),
        "query_y": np.zeros((4, 9), int),
    }
    with pytest.raises(InputError, match=named):
        tasks_from_arrays(**arrays | changed, way=way)
