"""The run folder: the flags it was made with, its lock, its checkpoints and results.

<logdir>/<run name>/flags.json                              the flags that this run's numbers depend on
                    model<i>.index, model<i>.data-...       state after i + 1 outer steps;   the ten latest and the best
                    events.out.tfevents...                  TensorBoard (report.py)
                    test_ubs<K>_stepsize<alpha>.csv, .pkl   the original's test results
                    results.json                            the same, named in plain words
                    test/events.out.tfevents...             the number of a test, for TensorBoard's table of runs
                    computed.json                           on what, and how, the iterations were computed
                    classes.json                            the classes that were trained on
                    .lock                                   held while a process trains

Any of these may come from a stranger. Only JSON, checkpoints and events are read, and none of them can run code.
"""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf

import devices
import recipe
from files import (
    InputError,
    folder_lock,
    lock,
    move_in,
    printable,
    read_json,
    remove_leftovers,
    say,
    write_whole,
    writing,
)
from maml import MAML
from parallel import Layout
from recipe import DATASETS, Recipe
from utils import statistics

KEPT_CHECKPOINTS = 10  # as the original's Saver
ITERATIONS = ("pretrain_iterations", "metatrain_iterations", "iterations")
COUNTERS = ("step", "updates", "pretrain/updates", "validation")  # keys of a checkpoint besides weights and moments
WRITTEN = (
    "flags.json",
    "computed.json",
    "classes.json",
    "results.json",
    "*_ubs*_stepsize*.csv",
    "*_ubs*_stepsize*.pkl",
)  # by write_whole


class Model(Protocol):
    """What a checkpoint needs to know about a model. MAML is one."""

    step: tf.Variable  # outer steps done
    keys: dict[str, str]  # name of a weight -> its key in a checkpoint
    state: dict[str, tf.Variable]  # all that a step changes, by its key in a checkpoint


class Validation(NamedTuple):
    """What validation has found so far. Part of what a checkpoint saves."""

    last: int = -1  # the iteration of the latest; -1: none yet
    best: int = -1  # the iteration of the best
    accuracy: float = -math.inf  # of the best, 0 to 1
    tasks: int = 0  # of the best

    def then(self, iteration: int, accuracy: float, tasks: int) -> "Validation":
        """Adds one more. Of equals the first stays the best; one on another number of tasks is compared with none."""
        if accuracy > (self.accuracy if tasks == self.tasks else -math.inf):
            return Validation(iteration, iteration, accuracy, tasks)
        return self._replace(last=iteration)


class DamagedError(InputError):
    """A checkpoint that cannot be read."""


class Run:
    """One run folder on disk, and what validation has found in the run."""

    def __init__(self, folder: Path):
        if set(str(folder)) & set("[\\"):
            raise InputError(
                f"{folder} has a [ or a backslash, which TensorFlow takes for a pattern when it reads checkpoints: "
                "give another --logdir"
            )
        if os.fsencode(folder) != str(folder).encode("utf-8", "replace") or "\0" in str(folder):
            raise InputError(
                f"{folder} has letters that are not UTF-8 on this system, and TensorFlow reads no others: "
                "give another --logdir"
            )
        self.folder = folder
        self.validation = Validation()

    # -- identity -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder if need be, and lets no other process train in it. The lock of a killed process is free."""
        check_writable(self.folder, "--logdir")
        path = self.folder / ".lock"
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file: delete it")
        with open(path, "ab") as file:
            try:
                lock(file)
            except BlockingIOError:
                raise InputError(
                    f"{self.folder} is in use, another process trains in it: stop that one, or give another --logdir"
                ) from None
            except OSError as error:  # some network disks have no locks
                say(f"{self.folder} cannot be locked ({error.strerror}): see that no other process trains in it.")
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)  # of a process that was killed while it saved
            yield

    def check(self, flags: Mapping, defaults: Mapping, resume: bool) -> None:
        """Raises InputError where the folder has a run that is another than that of `flags`, or not to be resumed."""
        held = self.iterations()
        if held and not resume:
            raise InputError(
                f"{self.folder} holds a run up to model{held[-1]}, and --resume=False would overwrite it: "
                "give another --logdir, or delete the folder"
            )
        if held:
            self.check_flags(flags, defaults)

    def record(self, flags: Mapping) -> None:
        """Records in the folder that its run is the one with these flags."""
        path, text = self.folder / "flags.json", json.dumps(dict(flags), indent=1).encode()
        with writing(self.folder):
            if not (path.is_file() and path.stat().st_size == len(text) and path.read_bytes() == text):
                write_whole(path, lambda file: file.write(text))

    def record_computed(self, start: int, computed: Mapping) -> None:
        """Records how the iterations from `start` on are computed, with a warning where the ones before were otherwise.

        It is no part of the run's identity: a run may go on on another machine.
        """
        path = self.folder / "computed.json"
        try:
            recorded = read_json(path, list, "delete it")
        except FileNotFoundError:
            recorded = []
        earlier = [one for one in recorded if one.get("from_iteration") in range(start)]
        before = {key: value for key, value in earlier[-1].items() if key != "from_iteration"} if earlier else computed
        differing = [key for key in {**before, **computed} if before.get(key) != computed.get(key)]
        if differing:
            listed = ", ".join(f"{key} {before.get(key)} there, {computed.get(key)} here" for key in differing)
            say(
                f"WARNING: the iterations before {start} in {self.folder} were computed otherwise ({listed}): "
                "the weights will differ, by roundings, from those of one run.",
                sys.stderr,
            )
        kept = [*earlier, {"from_iteration": start, **computed}] if differing or not earlier else earlier
        if kept != recorded:  # it may tell of later iterations too, which are computed anew now
            text = json.dumps(kept, indent=1)
            with writing(self.folder):
                write_whole(path, lambda file: file.write(text.encode()))

    def record_classes(self, names: Sequence[str]) -> None:
        """Records the names of the classes that are trained on, besides those that were. A line tells of others."""
        before = self.trained_classes() if self.iterations() else []
        new, gone = {*names} - {*before}, {*before} - {*names}
        if before and (new or gone):
            say(
                f"WARNING: of the {len(before):,} classes that were trained on in {self.folder}, {len(gone):,} are not "
                f"there now, and {len(new):,} are new: the tasks are others than those of one run.",
                sys.stderr,
            )
        if new:
            text = json.dumps(sorted({*before, *names}), indent=1)
            with writing(self.folder):
                write_whole(self.folder / "classes.json", lambda file: file.write(text.encode()))

    def trained_classes(self) -> list[str]:
        """The names of the classes that were trained on, sorted; none where the folder has no record of them."""
        try:
            return read_json(self.folder / "classes.json", list, "delete it", items=str)
        except FileNotFoundError:
            return []
        except InputError as error:  # nothing but warnings depends on it
            say(f"WARNING: {error}", sys.stderr)
            return []

    def check_flags(self, flags: Mapping, defaults: Mapping, training: bool = True) -> None:
        """Raises InputError listing the flags in which the folder's run differs from `flags`.

        A flag that the folder's record lacks, since it is older than the flag, has its default there. The number of
        iterations may differ, except that training may not change where pretraining ended once it has. A folder without
        a record (the original's released model) may be tested, not trained into.
        """
        try:
            damaged = "put a copy in its place, or give another --logdir"
            recorded = {**defaults, **read_json(self.folder / "flags.json", dict, damaged)}
        except FileNotFoundError:
            if training:
                raise InputError(
                    f"{self.folder} has a model but no flags.json, so it can be tested but not trained further: "
                    "give another --logdir"
                ) from None
            return
        differing = [name for name in flags if name not in ITERATIONS and recorded.get(name) != flags[name]]
        there, here = recorded.get("pretrain_iterations", 0), flags.get("pretrain_iterations", 0)
        if training and there != here and not (isinstance(there, int) and self.iterations()[-1] < min(there, here)):
            differing.append("pretrain_iterations")
        if differing:
            pairs = [(name, printable(recorded.get(name))[:60], flags[name]) for name in differing]
            listed = ", ".join(f"--{name}={there} there, {here} here" for name, there, here in pairs)
            raise InputError(
                f"{self.folder} belongs to another run ({listed}): give the same flags, or another --logdir"
            )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def iterations(self) -> list[int]:
        """Iterations i of the whole checkpoints model<i> in the folder, ascending."""
        found = [re.fullmatch(r"model(\d+)\.index", path.name) for path in self.folder.glob("model*.index")]
        return sorted(int(match[1]) for match in found if match and self._data(int(match[1])).exists())

    def prefix(self, iteration: int) -> str:
        """Path of a checkpoint without its endings, as TensorFlow wants it."""
        return str(self.folder / f"model{iteration}")

    def _data(self, iteration):
        return Path(self.prefix(iteration) + ".data-00000-of-00001")

    def save(self, model: Model) -> str:
        """Writes model<step - 1>: weights, optimizers, step, validation. Beside its place, the index moved in last.

        Returns its prefix. All checkpoints but the ten latest and the best on validation are removed. Raises InputError
        where something in it is not finite, or it cannot be written; what was saved before stays.
        """
        iteration = int(model.step) - 1
        self._check_finite(model)
        with writing(self.folder):
            # Differs: the original saves the weights alone, so that a resumed run begins with fresh moments.
            write_checkpoint(Path(prefix := self.prefix(iteration)), {**model.state, "validation": self.validation})
            for old in self.iterations()[:-KEPT_CHECKPOINTS]:
                if old != self.validation.best:
                    os.unlink(self.prefix(old) + ".index")
                    os.unlink(self._data(old))
        return prefix

    def _check_finite(self, model):
        if not all(np.isfinite(variable).all() for variable in model.state.values()):
            raise self.diverged(f"after iteration {int(model.step) - 1} the weights, or Adam's moments, are not finite")

    def diverged(self, what: str) -> InputError:
        """Makes the error for a run whose loss or weights are no numbers any more."""
        held = self.iterations()
        kept = f"{self.prefix(held[-1])} is from before that" if held else "nothing was saved"
        return InputError(f"training diverged, {what} ({kept}): try a smaller --meta_lr or --update_lr")

    def best(self) -> Validation:
        """What validation had found by the newest checkpoint that can be read."""
        for iteration in reversed(self.iterations()):
            with contextlib.suppress(DamagedError):
                return self._reading(self.prefix(iteration), _validation)
        return Validation()

    def checkpoint(self, iteration: int | str = -1, flag: str = "--test_iter") -> str:
        """Prefix of model<iteration> (-1: latest; "best": on validation).

        Raises InputError, naming the flag that gave the iteration, where it is not there.
        """
        held = self.iterations()
        if not held:
            raise InputError(f"no checkpoint (model<iteration>.index) in {self.folder}{self._siblings()}")
        if iteration == "best":
            iteration = self.best().best
            if iteration == -1:
                raise InputError(
                    f"{flag}=best, but {self.folder} has no validation yet (of images, on the validation classes, "
                    "every 500 iterations; of the sinusoid never): give an iteration, or -1 for the latest"
                )
        if iteration not in (-1, *held):
            listed = ", ".join(map(str, held))
            raise InputError(
                f"{flag}={iteration}, but {self.folder} has the iterations {listed}: give one of them or -1"
            )
        return self.prefix(held[-1] if iteration == -1 else iteration)

    def restore(self, model: Model, prefix: str) -> None:
        """Reads a checkpoint into the model; of one that the original wrote, the weights, which is all it has.

        Raises InputError where its variables are not those of this network, DamagedError where it cannot be read.
        """
        self.validation = self._reading(prefix, _read_into, model)

    def restore_newest(self, model: Model) -> str:
        """Reads the newest checkpoint that can be read, with a warning for each that cannot. Returns its prefix."""
        for iteration in reversed(self.iterations()):
            prefix = self.prefix(iteration)
            try:
                self.restore(model, prefix)
                return prefix
            except DamagedError as error:
                say(f"WARNING: {error}. The one before it is taken.", sys.stderr)
        raise InputError(f"none of the checkpoints in {self.folder} can be read: delete them to begin anew")

    @staticmethod
    def _reading(prefix, read, *arguments):
        """read(prefix, reader, *arguments), where the reader checks all that it reads against checksums."""
        try:
            for path in Path(prefix).parent.glob(f"{Path(prefix).name}.*"):
                if not path.is_file():
                    raise ValueError(f"{path.name} is not a regular file")
            return read(prefix, tf.train.load_checkpoint(prefix), *arguments)
        except InputError:
            raise
        except Exception as error:  # on a damaged file TensorFlow raises nearly every kind there is
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedError(f"checkpoint {prefix} is damaged ({reason}): delete it, or test another") from error

    def _siblings(self):
        """The way out of a missing run folder: the folders that there are."""
        siblings = sorted(path.parent.name for path in self.folder.parent.glob("*/model*.index"))
        if not siblings:
            return ": train first, or give the --logdir of a trained run"
        for name in siblings:
            if re.sub(r"^cls_\d+", "", name) == re.sub(r"^cls_\d+", "", self.folder.name):
                return (
                    f", but in {self.folder.parent / name}: a model has an output for each class of a training task, "
                    "so it is tested with the --num_classes of its training"
                )
        return f"; {self.folder.parent} has runs in {', '.join(dict.fromkeys(siblings))}: give the flags of one of them"


def load(folder: Path | str, iteration: int | str = -1) -> tuple[Recipe, MAML, str]:
    """Open a trained run, ours or the original's: return its recipe, its model, and the prefix of the checkpoint.

    iteration: of the checkpoint; -1, the latest, or "best" on validation.
    Raise InputError if there is no such model.
    """
    folder = Path(folder)
    run = Run(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; train a model first, or choose one in logs/published")
    runs_inside = sorted({path.parent.name for path in folder.glob("[!.]*/model*.index")})
    if runs_inside and not run.iterations():
        raise InputError(f"{folder}: is not a run folder, but contains some; choose one of {', '.join(runs_inside)}")
    prefix = run.checkpoint(iteration, "--checkpoint")
    try:
        flags = read_json(folder / "flags.json", dict, "put a copy in its place, or take another run")
        possible = [recipe.from_flags(flags)]
    except FileNotFoundError:
        possible = [recipe.from_run_name(folder.resolve().name, data_set) for data_set in DATASETS]
    for trained in possible:  # the original's folder name does not say the data set; the shapes of the weights do
        maml = recipe.build(trained, Layout(devices.cores()))
        try:
            run.restore(maml, prefix)
            return trained, maml, prefix
        except DamagedError:
            raise
        except InputError:
            if trained is possible[-1]:
                raise
    raise AssertionError("there is at least one data set")


class ReadOnlyRun(Run):
    """A run folder that another process, the chief, writes to: see cluster.py. This one reads its checkpoints."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the chief has the lock."""
        return contextlib.nullcontext()

    def record(self, flags: Mapping) -> None:
        """Does nothing."""

    def record_computed(self, start: int, computed: Mapping) -> None:
        """Does nothing."""

    def save(self, model: Model) -> str:
        """Writes nothing. Returns and raises what the chief's does."""
        self._check_finite(model)
        return self.prefix(int(model.step) - 1)


# Keys that an entry of results.json has only where the test was not at its defaults. Without one it is another test's.
ONLY_AWAY_FROM_DEFAULTS = ("query_normalised_with", "query_shares", "updates_at_test")


def write_results(
    folder: Path, name: str, values: np.ndarray, entry: Mapping, known: Mapping, paper_updates: tuple[int, ...]
) -> None:
    """Writes a test's files: <name>.csv and .pkl as the original's, and its entry in results.json.

    Args:
        values: [tasks, 1 + updates], accuracies (0 to 1), or losses for regression.
        entry: what was tested, in plain words; an earlier entry alike in all of it is replaced.
        known: what else the entry says, which may be another after more training.
        paper_updates: the columns that the paper reports.
    """
    means, stds, ci95 = statistics(values)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow([f"update{j}" for j in range(values.shape[1])])
    rows.writerows([means, stds, ci95])

    def number(value):
        return float(value) if np.isfinite(value) else None  # a task diverged: JSON has no NaN

    updates = [
        {
            "updates": j,
            "set": "query" if j else "support, before any update",
            "mean": number(means[j]),
            "ci95": number(ci95[j]),
            "std": number(stds[j]),
            "median": number(np.median(np.nan_to_num(values[:, j], nan=np.inf))),
            "the_papers_number": j in paper_updates,
        }
        for j in range(values.shape[1])
    ]
    path = folder / "results.json"
    with writing(folder), folder_lock(folder):  # of two tests at once, both stay in results.json
        write_whole(folder / f"{name}.csv", lambda file: file.write(text.getvalue().encode()))
        # For programs that read the original's results; nothing here reads it.
        write_whole(folder / f"{name}.pkl", lambda file: pickle.dump({"mses": values}, file))
        try:
            earlier = read_json(path, list, "move it away, or give another --results_dir")
        except FileNotFoundError:
            earlier = []
        told_by = {*entry, *ONLY_AWAY_FROM_DEFAULTS}
        kept = [one for one in earlier if any(one.get(key) != entry.get(key) for key in told_by)]
        results = json.dumps([*kept, {**entry, **known, "results": updates}], indent=1).encode()
        write_whole(path, lambda file: file.write(results))


def check_writable(folder: Path, flag: str) -> None:
    """Makes the folder and a file in it, and removes what killed processes left there.

    Raises InputError naming the flag to change where that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", lambda file: None)
        (folder / ".writable").unlink(missing_ok=True)  # another process may try the same
        for name in WRITTEN:
            remove_leftovers(folder, name)
    except (OSError, ValueError) as error:  # a name may have a zero byte
        raise InputError(
            f"cannot write to {folder} ({getattr(error, 'strerror', error)}): give another {flag}"
        ) from None


def write_checkpoint(prefix: Path, tensors: Mapping[str, object]) -> None:
    """Write tensors by their keys to <prefix>.index and .data-00000-of-00001, the index last.

    TensorFlow 1's Saver reads the file.
    """
    beside = prefix.parent / ".saving"
    shutil.rmtree(beside, ignore_errors=True)  # from a process that was killed here
    tf.raw_ops.SaveV2(
        prefix=str(beside / prefix.name),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(t, tf.float64) if isinstance(t, tuple) else t for t in tensors.values()],
    )
    for ending in (".data-00000-of-00001", ".index"):
        move_in(beside / (prefix.name + ending), Path(f"{prefix}{ending}"))
    beside.rmdir()


def _read_into(prefix, reader, model):
    """Read the weights into the model and, if they are there, moments and step. Return the Validation.

    No value is read before its shape and dtype are known to be right, and the model does not change before all are
    read. Text is never read: a file that claims to hold a huge one would end the process.
    """
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    state, stored_key = model.state, _stored_keys(reader, model)
    names = {stored_key(key): name for name, key in model.keys.items()}
    found = {names.get(key, key): shape for key, shape in _weights_in(shapes).items()}
    _check_shapes(prefix, {name: list(state[key].shape) for name, key in model.keys.items()}, found)
    trained = stored_key("step") in shapes  # else weights alone: the original's, or a published model
    wanted = state if trained else {key: state[key] for key in model.keys.values()}
    for key, variable in wanted.items():
        found = shapes.get(stored_key(key)), dtypes.get(stored_key(key))
        if found != (list(variable.shape), variable.dtype):
            raise ValueError(f"{key} has shape and dtype {found}, not {(list(variable.shape), variable.dtype)}")
    values = {key: reader.get_tensor(stored_key(key)) for key in wanted}
    validation = _validation(prefix, reader)
    if trained:
        _check_counts(prefix, values, validation)
    for key, variable in wanted.items():
        variable.assign(values[key])
    return validation


def _weights_in(shapes):
    """Return the shapes of the weights among those of all variables in a checkpoint."""
    if OBJECT_GRAPH in shapes:
        return {key: shape for key, shape in shapes.items() if key.startswith("weights/")}
    return {
        key: shape for key, shape in shapes.items() if key not in COUNTERS and not key.endswith(("/Adam", "/Adam_1"))
    }


# Until November 2026, tf.train.Checkpoint wrote run folders, with this key and with names of Python objects.
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def _stored_keys(reader, model=None):
    """Return a function from a key to the key in this checkpoint, which is another one in older run folders."""
    if not reader.has_tensor(OBJECT_GRAPH):
        return lambda key: key
    names = {key: name for name, key in model.keys.items()} if model else {}

    def older(key):
        optimizer = "pretrain_optimizer" if key.startswith("pretrain/") else "meta_optimizer"
        key = key.removeprefix("pretrain/")
        weight, _, second = key.rpartition("/Adam")
        if key in names:
            key = f"weights/{names[key]}"
        elif weight:
            key = f"{optimizer}/{'v' if second else 'm'}/{names[weight]}"
        elif key == "updates":
            key = f"{optimizer}/updates"
        return f"{key}/.ATTRIBUTES/VARIABLE_VALUE"

    return older


def _check_counts(prefix, values, validation):
    """Raises ValueError where the step is not that of the checkpoint's name, or a count is none."""
    iteration, step = _iteration(prefix), values["step"]
    if step != iteration + 1:
        raise ValueError(f"it is the state after {step} steps, and its name says {iteration + 1}")
    for key, value in values.items():
        if value.dtype.kind == "i" and value < 0:
            raise ValueError(f"{key} is {value}, and counts steps")
    last, best, accuracy, tasks = validation
    if not (-1 <= best <= last <= iteration and accuracy <= 1 and tasks >= 0):
        raise ValueError(f"its validation is {tuple(validation)}, after iteration {iteration}")


def _iteration(prefix):
    return int(re.search(r"[0-9]+$", prefix)[0])


def _validation(prefix, reader):
    key = _stored_keys(reader)("validation")
    if not reader.has_tensor(key):  # the original's, or an early one of ours
        return Validation(last=_iteration(prefix))
    if (reader.get_variable_to_shape_map()[key], reader.get_variable_to_dtype_map()[key]) != ([4], tf.float64):
        raise ValueError("validation is not four numbers")
    last, best, accuracy, tasks = reader.get_tensor(key).tolist()
    return Validation(int(last), int(best), accuracy, int(tasks))


def _check_shapes(prefix, expected, stored):
    """Raises InputError unless the stored variables are the expected ones, names and shapes."""
    for name in sorted(expected.keys() | stored.keys()):
        here, there = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, stored))
        if here != there:
            raise InputError(
                f"checkpoint {prefix} is of another network: {name} has shape {there} there, {here} here; "
                "give the flags that it was trained with"
            )
