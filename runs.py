"""The run folder: the flags it was made with, its lock, its checkpoints and results.

<logdir>/<run name>/flags.json                              the flags that this run's numbers depend on
                    model<i>.index, model<i>.data-...       state after i + 1 outer steps: the ten latest, and the best
                    events.out.tfevents...                  TensorBoard (report.py)
                    test_ubs<K>_stepsize<alpha>.csv, .pkl   the original's test results
                    results.json                            the same, named in plain words
                    test/events.out.tfevents...             the result of a test, for TensorBoard's table of runs
                    computed.json                           what the iterations were computed on, and how
                    classes.json                            the classes trained on
                    .lock                                   locked while a process trains

A stranger's run folder is safe to use: only JSON, tensors and events are read, and none of them can run code.
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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf

import devices
import recipe
from files import InputError, folder_lock, lock, move_in, printable, read_json, say, write_whole, writing
from maml import MAML
from parallel import Layout
from recipe import DATASETS, Recipe
from utils import statistics

KEPT_CHECKPOINTS = 10  # like the original's Saver
ITERATIONS = ("pretrain_iterations", "metatrain_iterations", "iterations")
COUNTERS = ("step", "updates", "pretrain/updates", "validation")  # keys of a checkpoint besides weights and moments


class Model(Protocol):
    """What a checkpoint needs to know about a model. MAML is one."""

    step: tf.Variable  # outer steps done
    keys: dict[str, str]  # name of a weight -> its key in a checkpoint
    state: dict[str, tf.Variable]  # all that a step changes, by its key in a checkpoint


class Validation(NamedTuple):
    """The validations so far. Part of a checkpoint."""

    last: int = -1  # iteration of the latest; -1: none yet
    best: int = -1  # iteration of the best
    accuracy: float = -math.inf  # of the best, 0 to 1
    tasks: int = 0  # of the best

    def then(self, iteration: int, accuracy: float, tasks: int) -> "Validation":
        """Add a validation. The first of equals is the best; results on different numbers of tasks do not compare."""
        if accuracy > (self.accuracy if tasks == self.tasks else -math.inf):
            return Validation(iteration, iteration, accuracy, tasks)
        return self._replace(last=iteration)


class DamagedError(InputError):
    """A checkpoint that cannot be read."""


class Run:
    """One run folder on disk, and the validations of the run."""

    def __init__(self, folder: Path):
        """Raise InputError if TensorFlow could save checkpoints to this path but not read them."""
        path = folder.as_posix()
        if set(path) & set("[\\") or os.fsencode(path) != path.encode(errors="replace"):
            raise InputError(
                f"{folder}: has a [, a backslash or bytes that are not UTF-8, so TensorFlow cannot read checkpoints "
                "there; choose another --logdir"
            )
        self.folder = folder
        self.validation = Validation()

    # -- identity -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if it is missing, and keep other processes from training in it."""
        check_writable(self.folder, "--logdir")
        with open(self.folder / ".lock", "ab") as file:
            try:
                lock(file)
            except BlockingIOError:
                raise InputError(
                    f"{self.folder}: another process is training there; stop it, or choose another --logdir"
                ) from None
            except OSError as error:  # some network disks have no locks
                say(f"{self.folder} cannot be locked ({error.strerror}): make sure no other process trains there.")
            yield

    def check(self, flags: Mapping, defaults: Mapping, resume: bool) -> None:
        """Raise InputError if the folder holds a run that has other flags or must not be resumed."""
        saved = self.iterations()
        if saved and not resume:
            raise InputError(
                f"--resume=False: would overwrite the run in {self.folder}, which has model{saved[-1]}; "
                "choose another --logdir, or delete the folder"
            )
        if saved:
            self.check_flags(flags, defaults)

    def record(self, flags: Mapping) -> None:
        """Record the flags of the run in the folder."""
        self._write_json("flags.json", dict(flags))

    def record_computed(self, start: int, computed: Mapping) -> None:
        """Record how the iterations from `start` on are computed, with a warning if earlier ones were not alike.

        It is not part of the run's identity: a run may continue on another machine.
        """
        recorded = self._recorded("computed.json", dict)
        earlier = [record for record in recorded if record.get("from_iteration") in range(start)]
        before = computed
        if earlier:
            unknown = {key: computed.get(key) for key in ("instructions", "onednn")}  # not in older records
            before = {key: value for key, value in (unknown | earlier[-1]).items() if key != "from_iteration"}
        differing = [key for key in {**before, **computed} if before.get(key) != computed.get(key)]
        if differing:
            changes = ", ".join(f"{key} {before.get(key)} there, {computed.get(key)} here" for key in differing)
            say(
                f"WARNING: the iterations before {start} in {self.folder} were computed differently ({changes}): the "
                "weights will differ by rounding from those of an uninterrupted run.",
                sys.stderr,
            )
        if differing or not earlier:
            earlier.append({"from_iteration": start, **computed})
        self._write_json("computed.json", earlier)  # without records of later iterations, which are now repeated

    def record_classes(self, names: Sequence[str]) -> None:
        """Add the classes trained on to those recorded. Warn if they have changed."""
        before = self.trained_classes() if self.iterations() else []
        new, gone = {*names} - {*before}, {*before} - {*names}
        if before and (new or gone):
            say(
                f"WARNING: of the {len(before):,} classes trained on in {self.folder}, {len(gone):,} are missing now, "
                f"and {len(new):,} are new, so the tasks are not those of an uninterrupted run.",
                sys.stderr,
            )
        self._write_json("classes.json", sorted({*before, *names}))

    def trained_classes(self) -> list[str]:
        """Return the names of the classes trained on, sorted. Empty in a folder that does not record them."""
        return self._recorded("classes.json", str)

    def _recorded(self, name, items):
        try:
            return read_json(self.folder / name, list, "delete it", items)
        except FileNotFoundError:
            return []

    def _write_json(self, name, value):
        path, text = self.folder / name, json.dumps(value, indent=1).encode()
        with writing(self.folder):
            if not (path.is_file() and path.read_bytes() == text):
                write_whole(path, lambda file: file.write(text))

    def check_flags(self, flags: Mapping, defaults: Mapping, training: bool = True) -> None:
        """Raise InputError listing the flags in which the folder's run differs from `flags`.

        A flag that is newer than the folder's record has its default there. The number of iterations may differ, except
        that training may not move the end of a pretraining that has passed. A folder without a record (the original's
        released model) may be tested but not trained further.
        """
        try:
            fix = "restore it from a copy, or choose another --logdir"
            recorded = {**defaults, **read_json(self.folder / "flags.json", dict, fix)}
        except FileNotFoundError:
            if training:
                raise InputError(
                    f"{self.folder}: has a model but no flags.json, so it can be tested but not trained further; "
                    "choose another --logdir"
                ) from None
            return
        differing = [name for name in flags if name not in ITERATIONS and recorded.get(name) != flags[name]]
        there, here = recorded.get("pretrain_iterations", 0), flags.get("pretrain_iterations", 0)
        if training and there != here and not (isinstance(there, int) and self.iterations()[-1] < min(there, here)):
            differing.append("pretrain_iterations")
        if differing:
            pairs = [(name, printable(recorded.get(name))[:60], flags[name]) for name in differing]
            changes = ", ".join(f"--{name}={there} there, {here} here" for name, there, here in pairs)
            raise InputError(
                f"{self.folder}: belongs to another run ({changes}); give the same flags, or choose another --logdir"
            )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def iterations(self) -> list[int]:
        """Return the iterations i of the complete checkpoints model<i> in the folder, ascending."""
        indices = [re.fullmatch(r"model(\d+)\.index", path.name) for path in self.folder.glob("model*.index")]
        return sorted(int(match[1]) for match in indices if match and self._data(int(match[1])).exists())

    def prefix(self, iteration: int) -> str:
        """Return the path of a checkpoint without its endings, as TensorFlow expects it."""
        return str(self.folder / f"model{iteration}")

    def _data(self, iteration):
        return Path(self.prefix(iteration) + ".data-00000-of-00001")

    def save(self, model: Model) -> str:
        """Write model<step - 1>: weights, optimizers, step, validation. Return its prefix.

        Remove all checkpoints except the ten latest and the best on validation. Raise InputError if a value is not
        finite, or the checkpoint cannot be written; earlier checkpoints stay.
        """
        prefix = self.prefix(int(model.step) - 1)
        self._check_finite(model)
        with writing(self.folder):
            # Differs: the original saves only the weights, so that a resumed run begins with fresh moments.
            write_checkpoint(Path(prefix), {**model.state, "validation": self.validation})
            for old in self.iterations()[:-KEPT_CHECKPOINTS]:
                if old != self.validation.best:
                    os.unlink(self.prefix(old) + ".index")
                    os.unlink(self._data(old))
        return prefix

    def _check_finite(self, model):
        if not all(np.isfinite(variable).all() for variable in model.state.values()):
            raise self.diverged(f"after iteration {int(model.step) - 1} the weights or Adam's moments are not finite")

    def diverged(self, what: str) -> InputError:
        """Return the error for a run whose loss or weights are NaN or infinite."""
        saved = self.iterations()
        state = f"{self.prefix(saved[-1])} is from before that" if saved else "nothing was saved"
        return InputError(f"training diverged: {what} ({state}); try a smaller --meta_lr or --update_lr")

    def best(self) -> Validation:
        """Return the validations up to the newest checkpoint that can be read."""
        for iteration in reversed(self.iterations()):
            with contextlib.suppress(DamagedError), _reader(self.prefix(iteration)) as reader:
                return _validation(reader, self.prefix(iteration))
        return Validation()

    def checkpoint(self, iteration: int | str = -1, flag: str = "--test_iter") -> str:
        """Return the prefix of model<iteration>; -1: the latest, "best": the best on validation.

        Raise InputError, naming the flag that gave the iteration, if there is no such checkpoint.
        """
        saved = self.iterations()
        if not saved:
            raise InputError(f"{self.folder}: no checkpoint (model<iteration>.index) there; {self._where_to_look()}")
        if iteration == "best":
            iteration = self.best().best
            if iteration == -1:
                raise InputError(
                    f"{flag}=best: {self.folder} has no validation yet; give an iteration, or -1 for the latest"
                )
        if iteration not in (-1, *saved):
            listed = ", ".join(map(str, saved))
            raise InputError(f"{flag}={iteration}: {self.folder} has only the iterations {listed}; give one, or -1")
        return self.prefix(saved[-1] if iteration == -1 else iteration)

    def _where_to_look(self):
        inside, beside = (
            sorted({path.parent.name for path in folder.glob("[!.]*/model*.index")})
            for folder in (self.folder, self.folder.parent)
        )
        if inside:
            return f"choose one of the run folders in it: {', '.join(inside)}"
        for name in beside:
            if re.sub(r"^cls_\d+", "", name) == re.sub(r"^cls_\d+", "", self.folder.name):
                return f"{self.folder.parent / name} has one, so give the --num_classes that it was trained with"
        if beside:
            return f"{self.folder.parent} has runs in {', '.join(beside)}: give the flags of one of them"
        return "train first, or choose a trained run"

    def restore(self, model: Model, prefix: str) -> None:
        """Read a checkpoint into the model. One that the original wrote has only weights.

        Raise InputError if it belongs to another network, DamagedError if it cannot be read.
        """
        with _reader(prefix) as reader:
            self.validation = _restore(reader, prefix, model)

    def restore_newest(self, model: Model) -> str:
        """Read the newest checkpoint that can be read, with a warning for each that cannot. Return its prefix."""
        for iteration in reversed(self.iterations()):
            prefix = self.prefix(iteration)
            try:
                self.restore(model, prefix)
                return prefix
            except DamagedError as error:
                say(f"WARNING: {error}. Using the previous one.", sys.stderr)
        raise InputError(f"{self.folder}: none of its checkpoints can be read; delete them to start again")


def load(folder: Path | str, iteration: int | str = -1) -> tuple[Recipe, MAML, str]:
    """Open a trained run, ours or the original's: return its recipe, its model, and the prefix of the checkpoint.

    iteration: of the checkpoint; -1, the latest, or "best" on validation.
    Raise InputError if there is no such model.
    """
    folder = Path(folder)
    run = Run(folder)
    prefix = run.checkpoint(iteration, "--checkpoint")
    try:
        flags = read_json(folder / "flags.json", dict, "restore it from a copy, or choose another run")
        possible = [recipe.from_flags(flags, str(folder / "flags.json"))]
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
    """A run folder that another process, the chief, writes to (see cluster.py). This one reads its checkpoints."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: the chief has the lock."""
        return contextlib.nullcontext()

    def record(self, flags: Mapping) -> None:
        """Do nothing."""

    def record_computed(self, start: int, computed: Mapping) -> None:
        """Do nothing."""

    def save(self, model: Model) -> str:
        """Write nothing. Return and raise what the chief's does."""
        self._check_finite(model)
        return self.prefix(int(model.step) - 1)


# Keys that an entry of results.json has only if the test was not at their defaults.
ONLY_AWAY_FROM_DEFAULTS = ("query_normalised_with", "query_shares", "updates_at_test")


def write_results(
    folder: Path, name: str, values: np.ndarray, entry: Mapping, known: Mapping, paper_updates: tuple[int, ...]
) -> None:
    """Write a test's files: <name>.csv and .pkl like the original's, and its entry in results.json.

    Args:
        values: [tasks, 1 + updates], accuracies (0 to 1), or losses for regression.
        entry: what was tested, in plain words; replaces an earlier entry that agrees in all of it.
        known: what else the entry says, which more training may change.
        paper_updates: the columns that the paper reports.
    """
    means, stds, ci95 = statistics(values)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow([f"update{j}" for j in range(values.shape[1])])
    rows.writerows([means, stds, ci95])

    def number(value):
        return float(value) if np.isfinite(value) else None  # JSON has no NaN

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
    with writing(folder), folder_lock(folder):  # two tests at once both stay in results.json
        write_whole(folder / f"{name}.csv", lambda file: file.write(text.getvalue().encode()))
        # For programs that read the original's results; nothing here reads it.
        write_whole(folder / f"{name}.pkl", lambda file: pickle.dump({"mses": values}, file))
        try:
            earlier = read_json(path, list, "move it away, or choose another --results_dir")
        except FileNotFoundError:
            earlier = []
        identity = {*entry, *ONLY_AWAY_FROM_DEFAULTS}
        kept = [other for other in earlier if any(other.get(key) != entry.get(key) for key in identity)]
        results = json.dumps([*kept, {**entry, **known, "results": updates}], indent=1).encode()
        write_whole(path, lambda file: file.write(results))


def check_writable(folder: Path, flag: str) -> None:
    """Make the folder if it is missing. Raise InputError naming the flag to change if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", error)
        raise InputError(f"{folder}: cannot write ({reason}); choose another {flag}") from None


# -- the checkpoint format --------------------------------------------------------------------------------------------


def write_checkpoint(prefix: Path, tensors: Mapping[str, object]) -> None:
    """Write tensors by their keys to <prefix>.index and .data-00000-of-00001, the index last.

    TensorFlow 1's Saver reads the file.
    """
    saving = prefix.parent / ".saving"
    shutil.rmtree(saving, ignore_errors=True)  # from a process that was killed here
    tf.raw_ops.SaveV2(
        prefix=str(saving / prefix.name),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(t, tf.float64) if isinstance(t, tuple) else t for t in tensors.values()],
    )
    for ending in (".data-00000-of-00001", ".index"):
        move_in(saving / (prefix.name + ending), Path(f"{prefix}{ending}"))
    saving.rmdir()


@contextlib.contextmanager
def _reader(prefix):
    """Open a checkpoint for reading. What is raised meanwhile becomes a DamagedError, unless it is an InputError."""
    try:
        yield tf.train.load_checkpoint(prefix)
    except InputError:
        raise
    except Exception as error:  # on a damaged file TensorFlow raises nearly every kind of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{prefix}: checkpoint is damaged ({reason}); delete it, or choose another") from error


def _restore(reader, prefix, model):
    """Read a checkpoint into the model, unless it raises. Return the Validation."""
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    stored_key = _stored_keys(reader, model)
    names = {stored_key(key): name for name, key in model.keys.items()}
    found = {names.get(key, key): shape for key, shape in _weight_shapes(shapes).items()}
    variables = model.state
    expected = {name: list(variables[key].shape) for name, key in model.keys.items()}
    for name in sorted(expected.keys() | found.keys()):
        here, there = expected.get(name, "none"), found.get(name, "none")
        if here != there:
            raise InputError(
                f"{prefix}: is a checkpoint of another network ({name} has shape {there} there, {here} here); "
                "give the flags that it was trained with"
            )
    if stored_key("step") not in shapes:  # only weights: the original's, or a published model
        variables = {key: variables[key] for key in model.keys.values()}
    for key, variable in variables.items():
        if (shapes.get(stored_key(key)), dtypes.get(stored_key(key))) != (list(variable.shape), variable.dtype):
            raise ValueError(f"{key} is not {variable.dtype.name} of shape {list(variable.shape)}")
    values = {key: reader.get_tensor(stored_key(key)) for key in variables}
    validation = _validation(reader, prefix)
    for key, variable in variables.items():
        variable.assign(values[key])
    return validation


def _weight_shapes(shapes):
    """Return the shapes of the weights among those of all variables in a checkpoint."""
    if OBJECT_GRAPH in shapes:
        return {key: shape for key, shape in shapes.items() if key.startswith("weights/")}
    return {
        key: shape for key, shape in shapes.items() if key not in COUNTERS and not key.endswith(("/Adam", "/Adam_1"))
    }


# Until November 2026, tf.train.Checkpoint wrote run folders, with this key and with names of Python attributes.
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


def _validation(reader, prefix):
    key = _stored_keys(reader)("validation")
    if not reader.has_tensor(key):  # the original's, or an early one of ours
        return Validation(last=int(re.search(r"[0-9]+$", prefix)[0]))
    last, best, accuracy, tasks = reader.get_tensor(key).tolist()
    return Validation(int(last), int(best), accuracy, int(tasks))
