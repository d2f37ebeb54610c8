"""The data sets, and the tasks drawn from them.

A task is a pure function of (seed, split, task number): its random words are a fixed stretch of a Philox stream. Seed
and split choose the stream, the task number the stretch. So the size of the meta-batch, resuming, and evaluation in
pieces agree by construction, on any machine.
"""

import zlib
from os import fsencode
from pathlib import Path

import numpy as np

from files import InputError, check_choice
from images import (
    CROP_WORDS,
    SPLITS,
    Classes,
    center_crops,
    denormalize,
    load_splits,
    normalize,
    random_crops,
)
from recipe import QUERY_SHARES, Images
from utils import Tasks


class SinusoidTasks:
    """Regression tasks y = A sin(x - p), A ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5] (paper section 5.1).

    With `oracle`, A and p stand beside every x: inputs [T, K, 3] (x, A, p), else [T, K, 1].
    """

    def __init__(self, shot: int, query: int, oracle: bool = False):
        self.shot, self.query, self.oracle = shot, query, oracle

    def draw(self, seed: int, split: str, first: int, count: int) -> Tasks:
        """Draws tasks first .. first + count - 1 of a split's stream.

        Returns NumPy arrays, shaped as Tasks says: T = count, N = 1, K = shot, Q = query, D = [1] or [3], O = 1.
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
    """N-way K-shot classification tasks of images (paper section 5.2).

    A task has N * Q queries. query_shares: "balanced", Q of each class; "dirichlet", as many of each as its share of
    Dir(2, ..., 2) says, rounded so that the sum fits (Veilleux, Boudiaf, Piantanida, Ben Ayed, NeurIPS 2021).
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
        """Takes the classes of every split that tasks will be drawn from.

        Raises InputError where query_shares is none of QUERY_SHARES.
        """
        check_choice("query_shares", query_shares, QUERY_SHARES)
        self.images, self.classes, self.way, self.shot, self.query = images, classes, way, shot, query
        self.query_shares = query_shares

    @property
    def examples(self) -> int:
        """Images of one class that a task may have."""
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
    ) -> "ImageTasks":
        """Reads the images of a folder.

        Raises InputError where the folder, a split, a class or an image is not as `images` says.
        """
        tasks = cls(images, load_splits(images, folder, splits), way, shot, query, query_shares)
        for split in splits:
            tasks.classes[split].check(split, folder, way, tasks.examples)
        return tasks

    def draw(self, seed: int, split: str, first: int, count: int) -> Tasks:
        """Draws tasks first .. first + count - 1 of a split's stream.

        Returns NumPy arrays, shaped as Tasks says: T = count, D = [height, width, channels], O = N. Pixels are 0 to 1,
        or as images.normalize makes them.
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
        """Makes a checksum of all classes' names and numbers of images. Where it is another, other tasks are drawn."""
        listed = [(split, *zip(one.names, one.counts.tolist(), strict=True)) for split, one in self.classes.items()]
        return f"{zlib.crc32(fsencode(str(listed))):08x}"

    def names(self, seed: int, split: str, task: int) -> list[str]:
        """Gives the names of a task's classes, in order of their labels, with the angle of those that are turned."""
        chosen, quarters, _ = self._chosen(seed, split, task, 1)
        turned = [f", {90 * quarter}°" if quarter and self.images.rotations else "" for quarter in quarters[0]]
        return [self.classes[split].names[c] + angle for c, angle in zip(chosen[0], turned, strict=True)]

    def _chosen(self, seed, split, first, count):
        """The classes of tasks [T, N], their quarter turns counterclockwise [T, N], and the random words left."""
        way = self.way
        words = _words(seed, split, first, count, per_task=sum(self._words_needed(split)))
        sizes = np.full(count, len(self.classes[split].starts))
        return _without_replacement(words[:, :way], sizes), words[:, way : 2 * way] % 4, words[:, 2 * way :]

    def _words_needed(self, split):
        """The random words of a task: for its classes, members, orders, the shares of its queries, and its crops."""
        images = self.way * self.examples
        shares = 0 if self.query_shares == "balanced" else 2 * self.way
        crops = CROP_WORDS * images if self.images.augment and split == "train" else 0
        return 2 * self.way, images, images, shares, crops

    def colours(self, task: Tasks) -> Tasks:
        """Gives a task with colours of 0 to 1, which its images have unless they are augmented."""
        if not self.images.augment:
            return task
        support_x, query_x = (np.clip(denormalize(part), 0, 1) for part in (task.support_x, task.query_x))
        return task._replace(support_x=support_x, query_x=query_x)

    def _pixels(self, seed, split, first, count):
        """uint8 [T, N * (K + Q), height, width, channels] and each image's label [T, N * (K + Q)].

        Example e of every class, the classes in a new order for each e; the first K examples are the support set. Where
        the classes have queries of different numbers, the examples beyond a class's own are left out.
        """
        classes, way, examples = self.classes[split], self.way, self.examples
        chosen, turned, words = self._chosen(seed, split, first, count)
        members, orders, shares, crops = np.split(words, np.cumsum(self._words_needed(split)[1:-1]), axis=1)

        members = members.reshape(-1, examples)
        members = _without_replacement(members, classes.counts[chosen].ravel()).reshape(count, way, examples)
        ids = (classes.starts[chosen][..., None] + members).transpose(0, 2, 1)  # [T, K + Q, N]
        order = _without_replacement(orders.reshape(-1, way), np.full(count * examples, way)).reshape(ids.shape)

        ids = np.take_along_axis(ids, order, 2)
        quarters = np.take_along_axis(turned[:, None], order, 2)
        if shares.size:
            own = self.shot + _query_counts(shares, way * self.query)  # [T, N], examples of each class
            used = np.arange(examples)[:, None] < np.take_along_axis(own[:, None], order, 2)
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
        """The crops of the images ids [T, n], at random where there are words for them."""
        pixels, aspects, size = classes.pixels[ids.ravel()], classes.aspects[ids.ravel()], self.images.size
        if words.size:
            crops = random_crops(pixels, aspects, words.reshape(len(pixels), CROP_WORDS), size)
        else:
            crops = center_crops(pixels, aspects, size)
        return crops.reshape(*ids.shape, *crops.shape[1:])


def tasks_from_arrays(
    support_x: np.ndarray, support_y: np.ndarray, query_x: np.ndarray, query_y: np.ndarray, way: int | None = None
) -> Tasks:
    """Makes a meta-batch of your own arrays, checked, as MAML takes it.

    Args:
        support_x, query_x: [T, n, *D], numbers; n may be another for support and query.
        support_y, query_y: targets [T, n, O], numbers, O the same in both; or, with `way`, class numbers [T, n] from 0
            to way - 1.
        way: N, for classification.
    Returns Tasks, float32, with one-hot labels for classification.
    Raises InputError where a shape or a value is another.
    """
    x, y = {}, {}
    for part, inputs, targets in (("support", support_x, support_y), ("query", query_x, query_y)):
        inputs, targets = np.asarray(inputs), np.asarray(targets)
        if inputs.ndim < 3 or inputs.dtype.kind not in "fiub" or not inputs.size:
            raise InputError(
                f"{part}_x is {inputs.dtype}, of the shape {list(inputs.shape)}: give numbers [tasks, examples, ...], "
                "at least one of each"
            )
        if way is not None:
            wrong = targets.ndim != 2 or targets.dtype.kind not in "iu" or not targets.size
            if wrong or not 0 <= targets.min() <= targets.max() < way:
                raise InputError(
                    f"{part}_y is {targets.dtype}, of the shape {list(targets.shape)}: give class numbers from 0 to "
                    f"{way - 1}, [tasks, examples]"
                )
            targets = np.eye(way)[targets]
        if targets.ndim != 3 or targets.dtype.kind not in "fiub" or targets.shape[:2] != inputs.shape[:2]:
            raise InputError(
                f"{part}_y is {targets.dtype}, of the shape {list(targets.shape)}, beside {part}_x of "
                f"{list(inputs.shape)}: give a target [tasks, examples, outputs] for each, or class numbers and way"
            )
        x[part], y[part] = inputs.astype(np.float32), targets.astype(np.float32)
        if not (np.isfinite(x[part]).all() and np.isfinite(y[part]).all()):
            raise InputError(f"{part}_x or {part}_y has a value that is no number, or infinite in float32: mend it")
    if len(x["support"]) != len(x["query"]) or x["support"].shape[2:] != x["query"].shape[2:]:
        raise InputError(
            f"support_x of {list(x['support'].shape)} and query_x of {list(x['query'].shape)} differ in the number of "
            "tasks or in the shape of an example: give both for the same tasks"
        )
    if y["support"].shape[2] != y["query"].shape[2]:
        raise InputError(
            f"support_y of {list(y['support'].shape)} and query_y of {list(y['query'].shape)} differ in the number of "
            "targets of an example: give as many in both"
        )
    return Tasks(x["support"], y["support"], x["query"], y["query"])


def _words(seed: int, split: str, first: int, count: int, per_task: int) -> np.ndarray:
    """uint64 [count, per_task], the random words of tasks first .. first + count - 1."""
    blocks = -(-per_task // 4)  # Philox makes four words a counter
    stream = np.random.Philox(key=[seed, SPLITS.index(split)], counter=int(first) * blocks)
    return stream.random_raw(count * blocks * 4).reshape(count, -1)[:, :per_task]


def _query_counts(words: np.ndarray, total: int) -> np.ndarray:
    """Each class's number of queries, [T, N] of sum `total`: shares of Dir(2, ..., 2), and random words [T, 2 N].

    A share is Gamma(2) distributed over the sum of all, and Gamma(2) is the sum of two exponentials. The shares of
    `total` are rounded down, and those with the largest remainders get one more.
    """
    uniform = ((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]
    gamma = -np.log(uniform).reshape(len(words), -1, 2).sum(2)
    exact = total * gamma / gamma.sum(1, keepdims=True)
    counts = np.floor(exact).astype(int)
    place = (counts - exact).argsort(1, kind="stable").argsort(1)  # 0: the largest remainder
    return counts + (place < total - counts.sum(1, keepdims=True))


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
