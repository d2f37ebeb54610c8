"""Evaluate a model on many tasks; print and write the results of a test."""

import functools
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from os import fsencode
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import devices
from cluster import Cluster
from data_generator import ImageTasks, SinusoidTasks
from files import say
from images import own_name, published_classes
from maml import MAML
from recipe import Recipe
from report import test_scalar
from runs import CHANGED, Run, write_results
from utils import Curve, statistics

TEST_UPDATES = 10  # at least, even if training has fewer (the original's main.py)
GROUPS_PER_CORE = 2  # in memory at once; a stop request waits until they are evaluated
WHOLE_BATCH_GROUP = 32  # tasks per group if training computes a whole meta-batch as one group
MAX_NAME_BYTES = 235  # file systems allow 255; this leaves room for .csv and for what write_whole adds
METRICS = "mean squared error", "accuracy (share of query examples, 0 to 1)"  # of regression, of classification
EXAMPLES = "support set, before any update", "query set"  # of update 0, of the others
SPLIT_NAMES = {"val": "validation", "test": "test"}  # in words
TITLE = "Mean validation accuracy/loss, stddev, and confidence intervals"  # the original's line


class Protocol(NamedTuple):
    """How a trained model is tested: the choices that its training recipe does not make."""

    split: str  # "test" or "val"
    shot: int  # K
    inner_lr: float  # alpha
    query: int = -1  # Q, query examples per class; -1: K
    other_data_set: str | None = None  # draw tasks from this data set instead of the one trained on
    data_folder: str | None = None  # of a user's own images; None: the data set's own folder
    class_split: str | None = None  # such as "64,16,20", if the folders do not define the splits
    tasks: int = 600  # the paper's
    task_seed: int = 0
    query_norm: str = "batch"  # see maml.adaptation_curve
    updates: int = -1  # inner steps; -1: as many as in training, at least TEST_UPDATES
    query_shares: str = "balanced"  # see data_generator.ImageTasks
    way: int | None = None  # N, fewer than in training; None: as in training

    def name(self, recipe: Recipe) -> str:
        """Return the name of the test's files: the original's, plus a suffix for every setting not at its default.

        Image folder names are truncated if the result is too long for a file system.
        """
        name = self._name(recipe, None)
        return name if len(fsencode(name)) <= MAX_NAME_BYTES else self._name(recipe, 10)

    def _name(self, recipe, max_folder_name):
        name = f"{self.split}_ubs{self.shot}_stepsize{self.inner_lr}"
        if self.other_data_set:
            name += f"_{self.other_data_set}{_folder_suffix(self.data_folder, max_folder_name)}"
            if self.class_split:
                name += f"_split{self.class_split}"
            if recipe.data_path:  # runs trained on different folders can have the same name and --results_dir
                name += f"_trained{_folder_suffix(recipe.data_path, max_folder_name)}"
        suffixes = {"query": "query", "tasks": "tasks", "task_seed": "evalseed", "query_norm": "querynorm"}
        suffixes |= {"updates": "updates", "query_shares": "queryshares", "way": "classes"}
        for field, suffix in suffixes.items():
            if getattr(self, field) != self._field_defaults[field]:
                name += f"_{suffix}{getattr(self, field)}"
        return name


def _folder_suffix(folder, max_length):
    """Return the part of a name that identifies a folder. Its checksum distinguishes folders with the same name."""
    return f"-{Path(folder).name[:max_length]}-{zlib.crc32(fsencode(folder)):08x}" if folder else ""


def evaluate(
    maml: MAML,
    data: SinusoidTasks | ImageTasks,
    split: str,
    count: int,
    updates: int,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
    query_norm: str = "batch",
    workers: Cluster | None = None,
) -> Curve | None:
    """Return the curves of tasks 0 .. count - 1 of a split, or None if stopped. The model does not change.

    Args:
        maml: the model.
        data: the data set to draw tasks from.
        split: "val" or "test".
        count: number of tasks, 1 or more.
        updates: inner steps.
        seed: seed of the tasks.
        stopped: called before every chunk of tasks; True stops the evaluation.
        query_norm: see maml.adaptation_curve.
        workers: the processes that share the chunks; None: only this one.
    Return a Curve of arrays: losses [count, 1 + updates], and accuracies of that shape, or [count, 0] for regression.
    """
    workers, chunks = workers or Cluster(), []
    size = _chunk_size(maml, count, -(-count // workers.size))
    size = int(max(workers.gathered([float(size)])))  # hosts may differ in their numbers of cores
    for first in range(0, count, size * workers.size):
        if stopped():
            return None
        tasks = data.draw(seed, split, first + size * workers.rank, size)
        chunks.append(tf.nest.map_structure(workers.gathered, maml.evaluate(tasks, updates, query_norm)))
    # Every chunk has the same size, so one traced graph is enough. Drop the tasks beyond count.
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts)[:count], *chunks)


def _chunk_size(maml, count, share):
    """Return how many tasks one call evaluates: a whole number of groups, so one traced graph is enough.

    count: all tasks. share: the tasks of this process.
    """
    cores, group, *_ = maml.layout
    if group == 0:
        return min(count, WHOLE_BATCH_GROUP)  # not the share: the size of a group changes the rounding
    return group * min(GROUPS_PER_CORE * cores, -(-share // group))


def check_same_start(maml: MAML, data: SinusoidTasks | ImageTasks, workers: Cluster) -> None:
    """Raise InputError if processes differ in weights, Adam's moments, step, or the classes of the data."""
    if workers.size > 1:
        weights = functools.reduce(lambda crc, array: zlib.crc32(array.numpy().tobytes(), crc), maml.state.values(), 0)
        classes = int(data.checksum(), 16) if isinstance(data, ImageTasks) else 0
        workers.check_same(weights=weights, data=classes)


def known_classes(data: SinusoidTasks | ImageTasks, split: str, trained: Iterable[str]) -> int:
    """Return how many classes of a split have the name of a class trained on. Warn if there are any."""
    if not isinstance(data, ImageTasks) or split not in data.classes:
        return 0
    trained, names = set(trained), data.classes[split].names
    # Either name may begin with parent folders.
    inside = {own_name(name, set(names)) for name in trained}
    known = [name for name in names if own_name(name, trained) in trained or name in inside]
    if known:
        say(
            f"WARNING: {len(known):,} of the {len(names):,} {split} classes have the same names as training classes, "
            f"such as {known[0]}. If they are the same classes, the accuracy does not measure learning of new ones.",
            sys.stderr,
        )
    return len(known)


def trained_classes(recipe: Recipe, run: Run) -> set[str]:
    """Return the names of the classes that a run was trained on; the published ones if it did not record them."""
    published = published_classes(recipe.dataset.images).get("train", []) if recipe.dataset.images else []
    if recorded := run.trained_classes():
        return {own_name(name, published) for name in recorded}
    split_of_its_own = recipe.split and (run.folder / "flags.json").exists()  # else --split is only the test's
    return set() if split_of_its_own else set(published)


def has_published_split(
    data: SinusoidTasks | ImageTasks, split: str, recipe: Recipe, run: Run, best: bool = False
) -> bool:
    """Return whether a split is the published test split, and the run was trained on the published classes throughout.

    Both must have the published number of images. best: the checkpoint is the best on the validation classes, which
    must then be the published ones, too.
    """
    if not isinstance(data, ImageTasks):
        return True  # the sinusoid has no classes
    images, recorded = recipe.dataset.images, run.classes()
    published = published_classes(images)
    if split != "test" or not published or not data.classes[split].published or CHANGED in recorded:
        return False
    if trained_classes(recipe, run) != set(published["train"]):
        return False
    if best and "val" in recorded:
        known = set(published["val"])
        if {own_name(name, known) for name in recorded["val"]} != known:
            return False
    counts = {*data.classes[split].counts.tolist(), *recorded.get("train", {}).values()} - {None}
    return images.class_images is None or counts == {images.class_images}


def test(
    maml: MAML,
    data: SinusoidTasks | ImageTasks,
    recipe: Recipe,
    protocol: Protocol,
    run: Run,
    prefix: str,
    results: Path,
    workers: Cluster,
) -> None:
    """Test a model, print the results, and write the original's files and results.json.

    Args:
        maml: the model, with the weights of the checkpoint.
        data: the data set to draw tasks from.
        recipe: the recipe that the model was trained with.
        protocol: how to test the model.
        run: the run that trained the model.
        prefix: path of the checkpoint, such as <run folder>/model59000.
        results: folder to write the results to.
        workers: the processes that share the tasks. Only the chief prints and writes.
    Raise InputError if a file cannot be written.
    """
    trained = trained_classes(recipe, run)
    also_trained = known_classes(data, protocol.split, trained) if workers.chief else 0
    updates = max(recipe.inner_steps, TEST_UPDATES) if protocol.updates == -1 else protocol.updates
    curve = evaluate(
        maml,
        data,
        protocol.split,
        protocol.tasks,
        updates,
        protocol.task_seed,
        query_norm=protocol.query_norm,
        workers=workers,
    )
    if not workers.chief:
        return
    dataset = recipe.dataset
    values = np.asarray(curve.accuracies if dataset.images else curve.losses, float)
    metric = METRICS[dataset.images is not None]
    _print_table(values, metric, protocol)
    print(TITLE)
    print(statistics(values))

    best, iteration = run.best(), int(Path(prefix).name.removeprefix("model"))
    is_best = iteration == best.best
    as_published = protocol.other_data_set in (None, recipe.data_set) and protocol.way is None
    reported = recipe.paper_updates if as_published else ()
    reported = tuple(update for update in reported if update <= updates)
    paper = reported if has_published_split(data, protocol.split, recipe, run, is_best) else ()
    entry = {
        "run": run.folder.name,
        "data_set": protocol.other_data_set or recipe.data_set,
        "data_folder": protocol.data_folder,
        "classes_train_val_test": protocol.class_split,
        "trained_on": recipe.data_set,
        "trained_on_folder": recipe.data_path,
        "split": protocol.split,
        "metric": metric,
        "classes_N": (protocol.way or recipe.way) if dataset.images else None,
        "support_examples_a_class_K": protocol.shot,
        "query_examples_a_class_Q": data.query,
        "inner_step_size_alpha": protocol.inner_lr,
        "inner_updates_in_training_J": recipe.inner_steps,
        "checkpoint": Path(prefix).name,
        "iteration": iteration,
        "training_seed": recipe.seed,
        "tasks": protocol.tasks,
        "task_seed": protocol.task_seed,
        "norm": recipe.norm,
        # Batch norm normalizes the query examples of a task together.
        "transductive": recipe.norm == "batch_norm" and protocol.query_norm == "batch",
    }
    if protocol.way is not None:
        entry["classes_N_in_training"] = recipe.way
    if protocol.query_norm != "batch":
        entry["query_normalised_with"] = protocol.query_norm
    if protocol.query_shares != "balanced":
        entry["query_shares"] = protocol.query_shares
    if protocol.updates != -1:
        entry["updates_at_test"] = protocol.updates
    if recipe.adapt != "all":
        entry["adapted"] = recipe.adapt
    if recipe.learn_inner_lr != "none":
        entry["step_sizes_learned"] = recipe.learn_inner_lr
    if recipe.network != "paper":
        entry["network"] = recipe.network
    if recipe.loss != "sum_over_shot":
        entry["loss"] = recipe.loss
    known = {
        "best_on_validation": is_best,
        "validation_accuracy": best.accuracy if is_best else None,
        "validation_tasks": best.tasks if is_best else None,
        "computed": devices.computed(),
    }
    if workers.size > 1:
        known["processes"] = workers.size
    if also_trained:
        known["classes_also_trained_on"] = also_trained
    name = protocol.name(recipe)
    write_results(results, name, values, entry, known, paper)
    means, _, ci95 = statistics(values)
    standard = protocol.split == "test" and protocol.shot == recipe.shot and protocol.way is None
    standard &= (protocol.query_norm, protocol.updates, protocol.query_shares) == ("batch", -1, "balanced")
    logged = any(run.folder.glob("events.out.tfevents.*"))  # False after training with --log=False
    measure = "accuracy" if dataset.images else metric  # a percentage, so without METRICS' range
    for update in paper:
        result = f"{means[update]:.4f} +- {ci95[update]:.4f}"
        if dataset.images:
            result = f"{100 * means[update]:.2f} +- {100 * ci95[update]:.2f} %"
        tasks = f"{protocol.tasks} {SPLIT_NAMES[protocol.split]} tasks"
        print(f"The paper's column, update{update}: {measure} {result} over {tasks}.")
    if reported and not paper:
        print("No column is the paper's: the classes, or their numbers of images, are not exactly the published ones.")
    say(f"Written: {results / name}.csv, .pkl and results.json.")
    if results == run.folder and logged and standard and not protocol.other_data_set:
        column = reported[-1] if reported else recipe.inner_steps
        test_scalar(run.folder, iteration, "accuracy" if dataset.images else "loss", means[column])


def print_comparison(names: Sequence[str], curves: Sequence[Curve], split: str) -> None:
    """Print the results of two models on the same tasks, and the paired difference, one line per number of updates.

    Args:
        names: of the two models.
        curves: of the same tasks in the same order, as `evaluate` returns them for the same data, split and seed.
        split: "test" or "val".
    The interval is that of the mean over tasks of (second - first). If both models find the same tasks hard, it is
    narrower than the interval for two independent samples of tasks.
    """
    images = curves[0].accuracies.size > 0
    first, second = (np.asarray(curve.accuracies if images else curve.losses, float) for curve in curves)
    with np.errstate(invalid="ignore"):
        columns = [statistics(values) for values in (first, second, second - first)]
    for letter, name in zip("AB", names, strict=True):
        say(f"{letter}: {name}")
    print(f"\n{METRICS[images]}, the same {len(first)} {SPLIT_NAMES[split]} tasks\n")
    print("updates          A       95 %          B       95 %      B - A       95 %   of")
    for update in range(first.shape[1]):
        (mean, _, ci95), (other, _, other_ci95), (difference, _, its_ci95) = (
            [part[update] for part in column] for column in columns
        )
        print(
            f"{update:7} {mean:10.4g} +- {ci95:7.3g} {other:10.4g} +- {other_ci95:7.3g} {difference:+10.4g} +- "
            f"{its_ci95:7.3g}   {EXAMPLES[update > 0]}"
        )
    print()


def _print_table(values, metric, protocol):
    """Print a readable table, one line per number of updates. values: [tasks, 1 + updates].

    The last lines are one, such as "6-10", if they would read the same.
    """
    means, _, ci95 = statistics(values)
    medians = np.median(np.nan_to_num(values, nan=np.inf), axis=0)
    rows = [
        f"{mean:10.4g} +- {half_width:7.3g} {median:10.4g}   {EXAMPLES[update > 0]}"
        for update, (mean, half_width, median) in enumerate(zip(means, ci95, medians, strict=True))
    ]
    last = len(rows) - 1
    same = last
    while same and rows[same - 1] == rows[last]:
        same -= 1
    print(f"\n{metric}, {protocol.tasks} {SPLIT_NAMES[protocol.split]} tasks\n")
    print("updates       mean       95 %     median   of")
    for update, row in enumerate(rows[: same + 1]):
        print(f"{f'{same}-{last}' if update == same < last else update:>7} {row}")
    print()
