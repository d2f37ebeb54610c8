"""Few-shot tasks, drawn from image data sets or sinusoids.

A task is a pure function of (seed, split, task number). Seed and split choose a Philox stream, and the task number
chooses a block of random words in it. Tasks therefore do not depend on the meta-batch size, on resuming, on how an
evaluation is divided into chunks, or on the machine.
"""

import zlib
from collections.abc import Mapping
from os import fsencode
from pathlib import Path

import numpy as np

from files import InputError, check_choice
from images import (
    CROP_WORDS,
    SPLITS,
    Classes,
    center_crops,
    count_splits,
    denormalize,
    load_splits,
    normalize,
    random_crops,
)
from recipe import QUERY_SHARES, Images
from utils import Tasks


class SinusoidTasks:
    """Regression tasks y = A sin(x - p), A ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5] (paper section 5.1).

    Inputs are x, [T, K, 1], or with `oracle` x, A and p, [T, K, 3].
    """

    def __init__(self, shot: int, query: int, oracle: bool = False):
        self.shot, self.query, self.oracle = shot, query, oracle

    def draw(self, seed: int, split: str, first: int, count: int) -> Tasks:
        """Return tasks first .. first + count - 1 of a split.

        They are NumPy arrays shaped as in Tasks: T = count, N = 1, K = shot, Q = query, D = [1] or [3], O = 1.
        """
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
    """N-way K-shot image classification tasks (paper section 5.2).

    A task has N * Q queries. query_shares: "balanced", Q per class; "dirichlet", shares drawn from Dir(2, ..., 2) and
    rounded to the same total (Veilleux, Boudiaf, Piantanida, Ben Ayed, NeurIPS 2021).
    """

    def __init__(
        self,
        images: Images,
        classes: dict[str, Classes],
        way: int,
        shot: int,
        query: int,
        query_shares: str = "balanced",
    ):
        """classes: the classes of each split that tasks will be drawn from.

        Raise InputError if query_shares is not one of QUERY_SHARES.
        """
        check_choice("query_shares", query_shares, QUERY_SHARES)
        self.counts = {split: part.sizes for split, part in classes.items()}  # {split: {class: images}}
        self.images, self.classes, self.way, self.shot, self.query = images, classes, way, shot, query
        self.query_shares = query_shares

    @property
    def examples(self) -> int:
        """The maximum number of images that a task can take from one class."""
        return self.shot + self.query * (1 if self.query_shares == "balanced" else self.way)

    @classmethod
    def from_folder(
        cls,
        images: Images,
        folder: Path,
        splits: tuple[str, ...],
        way: int,
        shot: int,
        query: int,
        query_shares: str = "balanced",
        optional: tuple[str, ...] = (),
    ) -> "ImageTasks":
        """Return tasks from the images of a folder.

        optional: splits to count only. No tasks can be drawn from them, and they may be missing or too small.
        Raise InputError if the folder, a split, a class or an image does not match `images`.
        """
        tasks = cls(images, {}, way, shot, query, query_shares)

        def check(counts):
            what, fix = shortage({split: counts[split] for split in splits}, way, tasks.examples)
            if what:
                raise InputError(f"{folder}: has {what}; {fix}")

        tasks.counts = count_splits(images, folder, splits, optional)
        check(tasks.counts)  # before decoding, which may take long
        tasks.classes = load_splits(images, folder, splits)
        check({split: part.sizes for split, part in tasks.classes.items()})  # without unreadable images
        return tasks

    def draw(self, seed: int, split: str, first: int, count: int) -> Tasks:
        """Return tasks first .. first + count - 1 of a split.

        They are NumPy arrays shaped as in Tasks: T = count, D = [height, width, channels], O = N. Pixels are 0 to 1,
        or with augmentation the output of images.normalize.
        """
        pixels, labels = self._pixels(seed, split, first, count)
        x = np.divide(pixels, 255, dtype=np.float32)
        if self.images.invert:
            np.subtract(1, x, out=x)
        if self.images.augment:
            x = normalize(x)
        y = np.eye(self.way, dtype=np.float32)[labels]
        support = self.way * self.shot
        return Tasks(x[:, :support], y[:, :support], x[:, support:], y[:, support:])

    def checksum(self) -> str:
        """Return a checksum of the names and sizes of all classes. If it differs, so do the tasks."""
        sizes = [(split, *part.sizes.items()) for split, part in self.classes.items()]
        return f"{zlib.crc32(fsencode(str(sizes))):08x}"

    def names(self, seed: int, split: str, task: int) -> list[str]:
        """Return the names of a task's classes, in order of their labels, with the angle of each rotated class."""
        ids, quarters, _ = self._draw_classes(seed, split, task, 1)
        angles = [f", {90 * quarter}°" if quarter and self.images.rotations else "" for quarter in quarters[0]]
        return [self.classes[split].names[c] + angle for c, angle in zip(ids[0], angles, strict=True)]

    def _draw_classes(self, seed, split, first, count):
        """Return the tasks' class ids [T, N], their counterclockwise quarter turns [T, N], and the unused words."""
        way = self.way
        words = _words(seed, split, first, count, per_task=sum(self._words_needed(split)))
        sizes = np.full(count, len(self.classes[split].starts))
        return _without_replacement(words[:, :way], sizes), words[:, way : 2 * way] % 4, words[:, 2 * way :]

    def _words_needed(self, split):
        """Return how many random words a task needs for its classes, examples, orders, query shares and crops."""
        images = self.way * self.examples
        shares = 0 if self.query_shares == "balanced" else 2 * self.way
        crops = CROP_WORDS * images if self.images.augment and split == "train" else 0
        return 2 * self.way, images, images, shares, crops

    def colours(self, task: Tasks) -> Tasks:
        """Return a task with colors from 0 to 1, undoing the normalization of augmented images."""
        if not self.images.augment:
            return task
        support_x, query_x = (np.clip(denormalize(part), 0, 1) for part in (task.support_x, task.query_x))
        return task._replace(support_x=support_x, query_x=query_x)

    def _pixels(self, seed, split, first, count):
        """Return pixels, uint8 [T, N * (K + Q), height, width, channels], and labels [T, N * (K + Q)].

        Example 0 of every class comes first, then example 1, and so on, each time in a new order of the classes. The
        first K examples are the support set. With uneven queries, a class's surplus examples are left out.
        """
        classes, way, examples = self.classes[split], self.way, self.examples
        chosen, quarters, words = self._draw_classes(seed, split, first, count)
        members, orders, shares, crops = np.split(words, np.cumsum(self._words_needed(split)[1:-1]), axis=1)

        members = members.reshape(-1, examples)
        members = _without_replacement(members, classes.counts[chosen].ravel()).reshape(count, way, examples)
        ids = (classes.starts[chosen][..., None] + members).transpose(0, 2, 1)  # [T, K + Q, N]
        order = _without_replacement(orders.reshape(-1, way), np.full(count * examples, way)).reshape(ids.shape)

        ids = np.take_along_axis(ids, order, 2)
        quarters = np.take_along_axis(quarters[:, None], order, 2)
        if shares.size:
            class_sizes = self.shot + _query_counts(shares, way * self.query)  # [T, N], examples per class
            used = np.arange(examples)[:, None] < np.take_along_axis(class_sizes[:, None], order, 2)
            ids, quarters, order = ids[used], quarters[used], order[used]
        ids, quarters, order = (part.reshape(count, -1) for part in (ids, quarters, order))

        if self.images.augment:
            return self._crops(classes, ids, crops), order
        pixels = classes.pixels[ids]
        if self.images.rotations:
            for quarter in (1, 2, 3):
                pixels[quarters == quarter] = np.rot90(pixels[quarters == quarter], quarter, axes=(1, 2))
        return pixels, order

    def _crops(self, classes, ids, words):
        """Return crops of the images `ids` [T, n]: random ones if there are words for them, else center crops."""
        pixels, aspects, size = classes.pixels[ids.ravel()], classes.aspects[ids.ravel()], self.images.size
        if words.size:
            crops = random_crops(pixels, aspects, words.reshape(len(pixels), CROP_WORDS), size)
        else:
            crops = center_crops(pixels, aspects, size)
        return crops.reshape(*ids.shape, *crops.shape[1:])


def shortage(counts: Mapping[str, Mapping[str, int]], way: int, examples: int) -> tuple[str, str]:
    """Return what splits lack for tasks of `way` classes with K + Q = `examples` images each, and what to do.

    counts: {split: {class: images}}. All classes that are too small are listed. If nothing is lacking, both are empty.
    """
    what, fix = [], []
    splits = [f"{split} ({len(part):,})" for split, part in counts.items() if len(part) < way]
    classes = [
        f"{name} ({split}: {count:,})"
        for split, part in counts.items()
        for name, count in part.items()
        if count < examples
    ]
    if splits:
        what.append(f"fewer classes than --num_classes={way} in {', '.join(splits)}")
        fix.append("add classes, or train with fewer --num_classes")
    if classes:
        what.append(f"fewer images than the {examples} that a task takes from a class (K + Q) in {', '.join(classes)}")
        fix.append("add images, or leave these classes out before training")
        if min(count for part in counts.values() for count in part.values()) > 1:  # K and Q are 1 or more
            fix[-1] += ", or lower --update_batch_size or --num_query"
    return ", and ".join(what), ", and ".join(fix)


def tasks_from_arrays(
    support_x: np.ndarray, support_y: np.ndarray, query_x: np.ndarray, query_y: np.ndarray, way: int | None = None
) -> Tasks:
    """Check a user's arrays, and return them as a meta-batch for MAML: float32, with one-hot labels if `way` is given.

    Args:
        support_x, query_x: numbers [T, n, *D]; n may differ between support and query.
        support_y, query_y: numeric targets [T, n, O], or with `way` class numbers [T, n] from 0 to way - 1.
        way: N, for classification.
    Raise InputError for an invalid shape, type or value.
    """
    x, y = {}, {}
    for part, inputs, targets in (("support", support_x, support_y), ("query", query_x, query_y)):
        inputs, targets = _array(f"{part}_x", inputs), _array(f"{part}_y", targets)
        one_task = targets.ndim == (2 if way is None else 1) and len(inputs) == len(targets)
        if one_task and targets.shape != inputs.shape[:2]:
            raise InputError(
                f"{part}_x and {part}_y: have shapes {list(inputs.shape)} and {list(targets.shape)}, without an axis "
                "for tasks; stack your tasks (np.stack), or add the axis to a single one (x[None])"
            )
        if inputs.ndim < 3 or inputs.dtype.kind not in "fiub" or not inputs.size:
            raise InputError(
                f"{part}_x: has type {inputs.dtype} and shape {list(inputs.shape)}; give a "
                "non-empty numeric array [tasks, examples, ...]"
            )
        if way is not None:
            wrong = targets.ndim != 2 or targets.dtype.kind not in "iu" or not targets.size
            if wrong or not 0 <= targets.min() <= targets.max() < way:
                raise InputError(
                    f"{part}_y: has type {targets.dtype} and shape {list(targets.shape)}, or values out of range; give "
                    f"class numbers from 0 to {way - 1}, [tasks, examples]"
                )
            targets = np.eye(way)[targets]
        if targets.ndim != 3 or targets.dtype.kind not in "fiub" or targets.shape[:2] != inputs.shape[:2]:
            raise InputError(
                f"{part}_y: has type {targets.dtype} and shape {list(targets.shape)}, but {part}_x has shape "
                f"{list(inputs.shape)}; give targets [tasks, examples, outputs], or class numbers and way"
            )
        x[part], y[part] = inputs.astype(np.float32), targets.astype(np.float32)
        for name, values in ((f"{part}_x", x[part]), (f"{part}_y", y[part])):
            if not np.isfinite(values).all():
                raise InputError(f"{name}: contains NaN, or infinity in float32; remove it")
    if len(x["support"]) != len(x["query"]) or x["support"].shape[2:] != x["query"].shape[2:]:
        raise InputError(
            f"support_x and query_x: shapes {list(x['support'].shape)} and {list(x['query'].shape)} differ in the "
            "number of tasks or the shape of an example; give both for the same tasks"
        )
    if y["support"].shape[2] != y["query"].shape[2]:
        raise InputError(
            f"support_y and query_y: shapes {list(y['support'].shape)} and {list(y['query'].shape)} differ in the "
            "number of outputs; give the same number in both"
        )
    return Tasks(x["support"], y["support"], x["query"], y["query"])


def _array(name, values):
    """Return values as an array. Raise InputError if they are ragged."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name}: is ragged, so it is not an array; pad it to one shape per example") from error


def _words(seed: int, split: str, first: int, count: int, per_task: int) -> np.ndarray:
    """Return the random words of tasks first .. first + count - 1, uint64 [count, per_task]."""
    blocks = -(-per_task // 4)  # Philox yields four words per counter value
    stream = np.random.Philox(key=[seed, SPLITS.index(split)], counter=int(first) * blocks)
    return stream.random_raw(count * blocks * 4).reshape(count, -1)[:, :per_task]


def _query_counts(words: np.ndarray, total: int) -> np.ndarray:
    """Return the number of queries per class [T, N], Dir(2, ..., 2) shares of `total`, given random words [T, 2 N].

    Shares are Gamma(2) variables divided by their sum; a Gamma(2) variable is the sum of two exponentials. Shares of
    `total` are rounded down, and those with the largest remainders get one more.
    """
    uniform = ((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]
    gamma = -np.log(uniform).reshape(len(words), -1, 2).sum(2)
    exact = total * gamma / gamma.sum(1, keepdims=True)
    counts = np.floor(exact).astype(int)
    rank = (counts - exact).argsort(1, kind="stable").argsort(1)  # 0: the largest remainder
    return counts + (rank < total - counts.sum(1, keepdims=True))


def _without_replacement(words: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return k distinct numbers below sizes[row] in each row, from the first k steps of a Fisher-Yates shuffle.

    words: random 64-bit words [rows, k]. The bias of their remainders is below 1e-15 for sizes of a few thousand.
    """
    rows, k = words.shape
    pool = np.tile(np.arange(sizes.max()), (rows, 1))
    row = np.arange(rows)
    for i in range(k):
        j = i + (words[:, i] % (sizes - i).astype(np.uint64)).astype(np.int64)
        pool[row, i], pool[row, j] = pool[row, j], pool[row, i]
    return pool[:, :k]
