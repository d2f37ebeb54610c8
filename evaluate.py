"""Evaluation of a model on many tasks, and the files and lines of a test."""

import functools
import sys
import zlib
from collections.abc import Callable, Iterable
from os import fsencode
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import devices
from cluster import Cluster
from data_generator import ImageTasks, SinusoidTasks
from files import say
from maml import MAML
from recipe import Recipe
from report import test_scalar
from runs import Run, write_results
from utils import Curve, statistics

TEST_UPDATES = 10  # at least, even where training has fewer: the original's (its main.py)
CHUNK = 2  # tasks for each core, or groups, that are in memory at once; a stop waits for so many
GROUP = 32  # tasks in a group where training has a whole meta-batch in one
MOST_NAME = 235  # bytes of a name, of the 255 that file systems take: with .csv and what write_whole adds
TITLE = "Mean validation accuracy/loss, stddev, and confidence intervals"  # the original's line


class Protocol(NamedTuple):
    """How a trained model is tested, as far as the recipe of its training leaves that open."""

    split: str  # "test" or "val"
    shot: int  # K
    inner_lr: float  # alpha
    query: int = -1  # Q, query examples a class; -1: as many as K
    other_data_set: str | None = None  # tasks are drawn from this one, not from the one of the training
    data_folder: str | None = None  # of a user's own images; None: the data set's name says it
    class_split: str | None = None  # "64,16,20" where the folders do not say which classes are which
    tasks: int = 600  # the paper's
    task_seed: int = 0
    query_norm: str = "batch"  # with what a query image is normalised: see maml.adaptation_curve
    updates: int = -1  # inner steps; -1: TEST_UPDATES, or as many as in training where those are more
    query_shares: str = "balanced"  # how the queries are shared among the classes: see ImageTasks

    def name(self, recipe: Recipe) -> str:
        """Makes the name of a test's files: the original's, with suffixes for what that leaves out.

        A suffix stands only where a value is not at its default. Where the names of folders of images make the name too
        long for a file system, they are cut.
        """
        name = self._name(recipe, None)
        return name if len(fsencode(name)) <= MOST_NAME else self._name(recipe, 10)

    def _name(self, recipe, letters):
        name = f"{self.split}_ubs{self.shot}_stepsize{self.inner_lr}"
        if self.other_data_set:
            name += f"_{self.other_data_set}{_folder_suffix(self.data_folder, letters)}"
            if self.class_split:
                name += f"_split{self.class_split}"
            if recipe.data_path:  # runs on two folders of images have one name, and may share a --results_dir
                name += f"_trained{_folder_suffix(recipe.data_path, letters)}"
        suffixes = {"query": "query", "tasks": "tasks", "task_seed": "evalseed", "query_norm": "querynorm"}
        for field, suffix in (suffixes | {"updates": "updates", "query_shares": "queryshares"}).items():
            if getattr(self, field) != self._field_defaults[field]:
                name += f"_{suffix}{getattr(self, field)}"
        return name


def _folder_suffix(folder, letters):
    """Makes the part of a name that stands for a folder; it has a checksum of the path, as many are named "images"."""
    return f"-{Path(folder).name[:letters]}-{zlib.crc32(fsencode(folder)):08x}" if folder else ""


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
    """Evaluates tasks 0 .. count - 1 of a split, some at a time.

    Args:
        maml: the model. Nothing of it is changed.
        data: where its tasks are drawn from.
        split: "val" or "test".
        count: number of tasks, 1 or more.
        updates: inner steps.
        seed: of the tasks.
        stopped: asked before every chunk of tasks whether to stop.
        query_norm: with what a query image is normalised, see maml.adaptation_curve.
        workers: the processes that take turns in evaluating chunks, if there are several.
    Returns a Curve of arrays: losses [count, 1 + updates] and accuracies alike, or [count, 0] where there are no
    classes. None where it was stopped.
    """
    workers, chunks = workers or Cluster(), []
    size = _chunk_size(maml, count, -(-count // workers.size))
    size = int(max(workers.gathered([float(size)])))  # hosts may have different numbers of cores
    for first in range(0, count, size * workers.size):
        if stopped():
            return None
        tasks = data.draw(seed, split, first + size * workers.rank, size)
        chunks.append(tf.nest.map_structure(workers.gathered, maml.evaluate(tasks, updates, query_norm)))
    # The last chunks are whole, so that one traced graph serves all; what exceeds count is dropped.
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts)[:count], *chunks)


def _chunk_size(maml, count, share):
    """Finds how many tasks are evaluated in one call: whole groups, so that one traced graph serves all.

    count: of all tasks. share: of those that this process computes.
    """
    cores, group, *_ = maml.layout
    if group == 0:
        return min(count, GROUP)  # whatever the share: groups of other sizes have other roundings
    return group * min(CHUNK * cores, -(-share // group))


def check_same_start(maml: MAML, data: SinusoidTasks | ImageTasks, workers: Cluster) -> None:
    """Raise InputError if processes differ in the model, Adam's state, the step, or the classes of the data."""
    if workers.size > 1:
        weights = functools.reduce(lambda crc, array: zlib.crc32(array.numpy().tobytes(), crc), maml.state.values(), 0)
        classes = int(data.checksum(), 16) if isinstance(data, ImageTasks) else 0
        workers.check_same(weights=weights, data=classes)


def known_classes(data: SinusoidTasks | ImageTasks, split: str, trained: Iterable[str]) -> int:
    """Counts the classes of a split that were trained on, by their names. A line tells of them where there are any."""
    if not isinstance(data, ImageTasks) or split not in data.classes:
        return 0
    trained, names = set(trained), data.classes[split].names
    known = [name for name in names if name in trained]
    if known:
        say(
            f"WARNING: {len(known):,} of the {len(names):,} classes of the {split} split have names of classes that "
            f"are trained on, such as {known[0]}: if they are the same classes, this is no test on new ones.",
            sys.stderr,
        )
    return len(known)


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
    """Tests a model, prints its numbers, and writes the original's files and results.json.

    Args:
        maml: the model, with the weights of the checkpoint.
        data: where the tasks are drawn from.
        recipe: of the model's training.
        protocol: how it is tested, and on what.
        run: the folder of the training.
        prefix: path of the checkpoint in it, such as <run folder>/model59000.
        results: folder of the results.
        workers: the processes that do it. The chief alone prints and writes.
    Raises InputError where a file cannot be written.
    """
    also_trained = known_classes(data, protocol.split, run.trained_classes()) if workers.chief else 0
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
    print(TITLE)
    print(statistics(values))
    metric = "accuracy (share of query examples, 0 to 1)" if dataset.images else "mean squared error"
    _print_table(values, metric, protocol)

    best, iteration = run.best(), int(Path(prefix).name.removeprefix("model"))
    is_best = iteration == best.best
    paper = () if protocol.other_data_set not in (None, recipe.data_set) else recipe.paper_updates
    paper = tuple(update for update in paper if update <= updates)
    entry = {
        "run": run.folder.name,
        "data_set": protocol.other_data_set or recipe.data_set,
        "data_folder": protocol.data_folder,
        "classes_train_val_test": protocol.class_split,
        "trained_on": recipe.data_set,
        "trained_on_folder": recipe.data_path,
        "split": protocol.split,
        "metric": metric,
        "classes_N": recipe.way if dataset.images else None,
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
        # A task's query examples are normalised together.
        "transductive": recipe.norm == "batch_norm" and protocol.query_norm == "batch",
    }
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
    usual = protocol.split == "test" and protocol.shot == recipe.shot
    usual &= (protocol.query_norm, protocol.updates, protocol.query_shares) == ("batch", -1, "balanced")
    logged = any(run.folder.glob("events.out.tfevents.*"))  # else it was trained without TensorBoard's events
    for update in paper:
        shown = f"{means[update]:.4f} +- {ci95[update]:.4f}"
        if dataset.images:
            shown = f"{100 * means[update]:.2f} +- {100 * ci95[update]:.2f} %"
        print(f"The paper's column, update{update}: {metric} {shown} over {protocol.tasks} {protocol.split} tasks.")
    say(f"Written: {results / name}.csv, .pkl and results.json.")
    if results == run.folder and logged and usual and not protocol.other_data_set:
        column = paper[-1] if paper else recipe.inner_steps
        test_scalar(run.folder, iteration, "accuracy" if dataset.images else "loss", means[column])


def _print_table(values, metric, protocol):
    """Prints a line for every number of updates, for people. values: [tasks, 1 + updates]."""
    means, _, ci95 = statistics(values)
    medians = np.median(np.nan_to_num(values, nan=np.inf), axis=0)
    print(f"\n{metric}, {protocol.tasks} {protocol.split} tasks\n")
    print("updates       mean       95 %     median   of")
    for update, (mean, half_width, median) in enumerate(zip(means, ci95, medians, strict=True)):
        examples = "query set" if update else "support set, before any update"
        print(f"{update:7} {mean:10.4g} +- {half_width:7.3g} {median:10.4g}   {examples}")
    print()
