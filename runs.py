"""The run folder: its flags, lock, checkpoints and results.

<logdir>/<run name>/flags.json                              the flags that this run's numbers depend on
                    model<i>.index, model<i>.data-...       state after i + 1 outer steps: the ten latest and the best
                    events.out.tfevents...                  TensorBoard (report.py)
                    test_ubs<K>_stepsize<alpha>.csv, .pkl   test results in the original's format
                    results.json                            the same results with descriptive keys
                    test/events.out.tfevents...             test results for TensorBoard's HParams table
                    computed.json                           the hardware and settings of the iterations
                    classes.json                            the images of each class: {split: {class: count}}
                    .lock                                   locked while a process trains

An untrusted run folder is safe to load: only JSON, tensors and events are read, and they cannot run code.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf

import devices
import recipe
from files import (
    LFS_POINTER,
    InputError,
    folder_lock,
    lock,
    move_in,
    nfc,
    printable,
    read_json,
    say,
    unreadable,
    write_whole,
    writing,
)
from maml import MAML
from parallel import Layout
from recipe import DATASETS, Recipe
from utils import statistics

KEPT_CHECKPOINTS = 10  # like the original's Saver
ITERATIONS = ("pretrain_iterations", "metatrain_iterations", "iterations")
CHANGED = "train_changed"  # in classes.json: the training classes that were not the same in all iterations
COUNTERS = ("step", "updates", "pretrain/updates", "validation")  # keys of a checkpoint besides weights and moments


class Model(Protocol):
    """The attributes of a model that a checkpoint needs. MAML has them."""

    step: tf.Variable  # outer steps done
    keys: dict[str, str]  # name of a weight -> its key in a checkpoint
    state: dict[str, tf.Variable]  # every variable that a step changes, by its key in a checkpoint


class Validation(NamedTuple):
    """The latest validation and the best one; part of a checkpoint."""

    last: int = -1  # iteration; -1: none yet
    best: int = -1  # iteration; -1: none yet
    accuracy: float = -math.inf  # of the best, 0 to 1
    tasks: int = 0  # of the best

    def then(self, iteration: int, accuracy: float, tasks: int) -> "Validation":
        """Return a copy with a validation added.

        On a tie the earlier one stays the best. If the number of tasks has changed, the comparison starts over.
        """
        if accuracy > (self.accuracy if tasks == self.tasks else -math.inf):
            return Validation(iteration, iteration, accuracy, tasks)
        return self._replace(last=iteration)


class DamagedError(InputError):
    """A checkpoint that cannot be read."""


class Run:
    """A run folder, and the run's validations."""

    def __init__(self, folder: Path):
        """Raise InputError if TensorFlow could write checkpoints to this path but not read them back."""
        path = folder.as_posix()
        if set(path) & set("[\\") or os.fsencode(path) != path.encode(errors="replace"):
            raise InputError(
                f"{folder}: contains [, a backslash or bytes that are not UTF-8, so TensorFlow cannot read checkpoints "
                "there; choose another --logdir"
            )
        self.folder = folder
        self.validation = Validation()
        self._has_lock = False

    # -- identity -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if needed, and keep other processes from training in it."""
        check_writable(self.folder, "--logdir")
        with open(self.folder / ".lock", "ab") as file:
            try:
                lock(file)
            except BlockingIOError:
                raise InputError(
                    f"{self.folder}: another process is training there; stop it, or choose another --logdir"
                ) from None
            except OSError as error:  # some network file systems do not support locks
                say(f"{self.folder}: cannot be locked ({error.strerror}); make sure no other process trains there")
            self._has_lock = True
            yield

    def check(self, flags: Mapping, defaults: Mapping, resume: bool) -> None:
        """Raise InputError if the folder holds a run with different flags, or any run if not `resume`."""
        saved = self.iterations()
        if saved and not resume:
            raise InputError(
                f"--resume=False: would overwrite model{saved[-1]} in {self.folder}; "
                "choose another --logdir, or move the folder away"
            )
        if saved:
            self.check_flags(flags, defaults)

    def record(self, flags: Mapping) -> None:
        """Write flags.json."""
        self._write_json("flags.json", dict(flags))

    def record_computed(self, start: int, computed: Mapping) -> None:
        """Record how iterations from `start` on are computed. Warn if earlier ones were computed differently.

        A run may continue on another machine, so this record is not part of its identity.
        """
        try:
            recorded = read_json(self.folder / "computed.json", list, "move it away")
        except FileNotFoundError:
            recorded = []
        earlier = [record for record in recorded if record.get("from_iteration") in range(start)]
        before = computed
        if earlier:
            unknown = {key: computed.get(key) for key in ("instructions", "onednn")}  # not in older records
            before = {key: value for key, value in (unknown | earlier[-1]).items() if key != "from_iteration"}
        differing = [key for key in {**before, **computed} if before.get(key) != computed.get(key)]
        if differing:
            changes = ", ".join(f"{key} was {before.get(key)}, is now {computed.get(key)}" for key in differing)
            say(
                f"WARNING: {self.folder}: iterations before {start} were computed differently ({changes}), so the "
                "weights will differ by rounding from those of an uninterrupted run.",
                sys.stderr,
            )
        if differing or not earlier:
            earlier.append({"from_iteration": start, **computed})
        self._write_json("computed.json", earlier)  # drops the records of iterations that are now repeated

    def record_classes(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Record the classes, {split: {class: images}}, and earlier training classes. Warn if the latter changed."""
        recorded = self.classes() if self.iterations() else {}
        before, now = recorded.get("train", {}), counts["train"]
        added, missing = {*now} - {*before}, {*before} - {*now}
        resized = [name for name in now if before.get(name) not in (None, now[name])]
        if before and (added or missing or resized):
            say(
                f"WARNING: {self.folder}: {len(missing):,} of its {len(before):,} training classes are now missing, "
                f"{len(added):,} are new, and {len(resized):,} have different counts, so the tasks differ from "
                "those of an uninterrupted run.",
                sys.stderr,
            )
        changed = recorded.get(CHANGED, {}) | (
            {name: before.get(name) for name in (*missing, *added, *resized)} if before else {}
        )
        counts = {**counts, "train": dict(sorted({**before, **now}.items())), CHANGED: dict(sorted(changed.items()))}
        self._write_json("classes.json", {split: part for split, part in counts.items() if part})

    def classes(self) -> dict[str, dict[str, int | None]]:
        """Return the recorded classes, {split: {class: images}}; empty if they were not recorded.

        Until November 2026, only the names of the training classes were recorded: their counts are None.
        """
        path = self.folder / "classes.json"
        try:
            recorded = read_json(path, object, "move it away")
        except FileNotFoundError:
            return {}
        if isinstance(recorded, list) and all(isinstance(name, str) for name in recorded):
            recorded = {"train": dict.fromkeys(recorded)}
        if not isinstance(recorded, dict) or not all(
            isinstance(part, dict) and all(isinstance(count, int | None) for count in part.values())
            for part in recorded.values()
        ):
            raise InputError(f"{path}: is damaged (not {{split: {{class: images}}}}); move it away")
        return {split: {nfc(name): count for name, count in part.items()} for split, part in recorded.items()}

    def has_classes(self, counts: Mapping[str, Mapping[str, int]]) -> bool:
        """Return whether these are the recorded classes, with the recorded numbers of images."""
        recorded = self.classes()
        recorded.pop(CHANGED, None)
        return bool(recorded) and all(counts.get(split) == part for split, part in recorded.items())

    def trained_classes(self) -> list[str]:
        """Return the names of the classes trained on, sorted; an empty list if they were not recorded."""
        return sorted(self.classes().get("train", ()))

    def _write_json(self, name, value):
        path, text = self.folder / name, json.dumps(value, indent=1).encode()
        with writing(self.folder):
            if not (path.is_file() and path.read_bytes() == text):
                write_whole(path, lambda file: file.write(text))

    def check_flags(self, flags: Mapping, defaults: Mapping, training: bool = True) -> None:
        """Raise InputError listing the flags that differ between the folder's run and `flags`.

        A flag missing from flags.json has its default. The numbers of iterations may differ, except that
        pretrain_iterations may not change after pretraining has ended. Without flags.json (the original's released
        model), a run can be tested but not trained further.
        """
        try:
            fix = "restore a copy, or choose another --logdir"
            recorded = {**defaults, **read_json(self.folder / "flags.json", dict, fix)}
        except FileNotFoundError:
            if training:
                raise InputError(
                    f"{self.folder}: has a model but no flags.json, so it cannot be trained further; choose another "
                    "--logdir"
                ) from None
            return
        differing = [name for name in flags if name not in ITERATIONS and recorded.get(name) != flags[name]]
        there, here = recorded.get("pretrain_iterations", 0), flags.get("pretrain_iterations", 0)
        if training and there != here and not (isinstance(there, int) and self.iterations()[-1] < min(there, here)):
            differing.append("pretrain_iterations")
        if differing:
            pairs = [(name, printable(recorded.get(name))[:60], flags[name]) for name in differing]
            changes = ", ".join(f"--{name}={there} there, {here} here" for name, there, here in pairs)
            fix = "give its flags, or choose another --logdir"
            if differing == ["data_path"]:
                fix = f"the images differ; to use these, give --run={self.folder}, or choose another --logdir"
            raise InputError(f"{self.folder}: belongs to a different run ({changes}); {fix}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def iterations(self) -> list[int]:
        """Return the iterations i of the complete checkpoints model<i>, ascending. Raise InputError if unreadable."""
        try:
            indices = [re.fullmatch(r"model(\d+)\.index", name) for name in os.listdir(self.folder)]
            return sorted(int(match[1]) for match in indices if match and self._data(int(match[1])).exists())
        except PermissionError as error:
            raise unreadable(self.folder, error) from None
        except (FileNotFoundError, NotADirectoryError):
            return []

    def prefix(self, iteration: int) -> str:
        """Return the path of a checkpoint without its suffixes, as TensorFlow expects it."""
        return str(self.folder / f"model{iteration}")

    def _data(self, iteration):
        return Path(self.prefix(iteration) + ".data-00000-of-00001")

    def save(self, model: Model) -> str:
        """Write weights, Adam's moments, step and validation to model<step - 1>. Return its prefix.

        Delete all checkpoints except the ten latest and the best on validation. Raise InputError if a value is not
        finite or the checkpoint cannot be written; earlier checkpoints are kept.
        """
        prefix = self.prefix(int(model.step) - 1)
        self._check_finite(model)
        with writing(self.folder):
            if self._has_lock:  # else the folder was moved or deleted, and TensorFlow would create another
                os.stat(self.folder / ".lock")
            # Differs: the original saves only the weights, so a resumed run starts with zero moments.
            write_checkpoint(Path(prefix), {**model.state, "validation": self.validation})
            for old in self.iterations()[:-KEPT_CHECKPOINTS]:
                if old != self.validation.best:
                    os.unlink(self.prefix(old) + ".index")
                    os.unlink(self._data(old))
        return prefix

    def _check_finite(self, model):
        if not all(np.isfinite(variable).all() for variable in model.state.values()):
            raise self.diverged(f"the weights or Adam's moments after iteration {int(model.step) - 1} are not finite")

    def diverged(self, what: str) -> InputError:
        """Return the error for a run with a NaN or infinite loss or weight."""
        saved = self.iterations()
        state = f"latest good checkpoint: {self.prefix(saved[-1])}" if saved else "nothing was saved"
        return InputError(
            f"{self.folder}: training diverged: {what} ({state}); try a smaller --update_lr, or "
            "a smaller --meta_lr in another --logdir"
        )

    def best(self) -> Validation:
        """Return the validations recorded in the newest readable checkpoint."""
        for iteration in reversed(self.iterations()):
            with contextlib.suppress(DamagedError), _reader(self.prefix(iteration)) as reader:
                return _validation(reader, self.prefix(iteration))
        return Validation()

    def checkpoint(self, iteration: int | str = -1, flag: str = "--test_iter") -> str:
        """Return the prefix of model<iteration>; -1: the latest, "best": the best on validation.

        Raise InputError if that checkpoint does not exist. flag: the flag to name in the error.
        """
        saved = self.iterations()
        if not saved:
            what = "has no checkpoint (model<iteration>.index)" if self.folder.is_dir() else "no such folder"
            raise InputError(f"{self.folder}: {what}; {self._where_to_look()}")
        if iteration == "best":
            iteration = self.best().best
            if iteration == -1:
                raise InputError(
                    f"{flag}=best: no validation has chosen a checkpoint of {self.folder} (images only, every 500 "
                    f"iterations, and not with --test_set); leave out {flag} for the latest"
                )
        if iteration not in (-1, *saved):
            listed = ", ".join(map(str, saved))
            raise InputError(
                f"{flag}={iteration}: {self.folder} has checkpoints of iterations {listed}; choose one, or -1 for the "
                "latest"
            )
        return self.prefix(saved[-1] if iteration == -1 else iteration)

    def _where_to_look(self):
        below, siblings = (
            sorted({path.parent.name for path in folder.glob("[!.]*/model*.index")})
            for folder in (self.folder, self.folder.parent)
        )
        if below:
            return f"choose one of the run folders in it: {', '.join(below)}"
        for name in siblings:
            if re.sub(r"^cls_\d+", "", name) == re.sub(r"^cls_\d+", "", self.folder.name):
                return f"{self.folder.parent / name} has one: give its --num_classes"
        if siblings:  # a test with another K or alpha than the training's looks for a folder of another name
            first, listed = self.folder.parent / siblings[0], ", ".join(siblings)
            return f"choose a run of {self.folder.parent} (main.py: --run={first}): {listed}"
        return "train first, or choose a trained run"

    def restore(self, model: Model, prefix: str) -> None:
        """Load a checkpoint into the model. The original's checkpoints hold only weights.

        Raise InputError if the checkpoint belongs to a different network, DamagedError if it cannot be read.
        """
        with _reader(prefix) as reader:
            self.validation = _restore(reader, prefix, model)

    def restore_newest(self, model: Model) -> str:
        """Load the newest readable checkpoint into the model. Warn about each damaged one. Return the prefix."""
        for iteration in reversed(self.iterations()):
            prefix = self.prefix(iteration)
            try:
                self.restore(model, prefix)
                return prefix
            except DamagedError as error:
                say(f"WARNING: {error}. Using the previous one.", sys.stderr)
        raise InputError(f"{self.folder}: all checkpoints are damaged; copy them again, or choose another --logdir")


def load(folder: Path | str, iteration: int | str = -1) -> tuple[Recipe, MAML, str]:
    """Load a trained run, ours or the original's. Return its recipe, its model, and the checkpoint's prefix.

    iteration: of the checkpoint; -1: the latest, "best": the best on validation.
    Raise InputError if the checkpoint does not exist or cannot be loaded.
    """
    folder = Path(folder)
    run = Run(folder)
    prefix = run.checkpoint(iteration, "--checkpoint")
    try:
        flags = read_json(folder / "flags.json", dict, "restore a copy, or choose another run")
        candidates = [recipe.from_flags(flags, str(folder / "flags.json"))]
    except FileNotFoundError:
        candidates = [recipe.from_run_name(folder.resolve().name, data_set) for data_set in DATASETS]
    for trained in candidates:  # the original's folder name omits the data set, but the weight shapes identify it
        maml = recipe.build(trained, Layout(devices.cores()))
        try:
            run.restore(maml, prefix)
            return trained, maml, prefix
        except DamagedError:
            raise
        except InputError:
            if trained is candidates[-1]:
                raise
    raise AssertionError("there is at least one data set")


def narrowed(trained: Recipe, maml: MAML, way: int) -> MAML:
    """Return a trained model for fewer classes: its weights with the first `way` columns of the last layer.

    trained: the model's recipe, of `way` or more classes. The moments of the optimizers are not copied.
    """
    narrow = recipe.build(dataclasses.replace(trained, way=way), maml.layout)
    for name, weight in narrow.weights.items():
        weight.assign(maml.weights[name][..., : weight.shape[-1]])  # the whole weight, except in the last layer
    return narrow


class ReadOnlyRun(Run):
    """A run folder in a process that only reads it, because the chief writes to it (see cluster.py)."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: the chief holds the lock."""
        return contextlib.nullcontext()

    def record(self, flags: Mapping) -> None:
        """Do nothing."""

    def record_computed(self, start: int, computed: Mapping) -> None:
        """Do nothing."""

    def save(self, model: Model) -> str:
        """Return the prefix that the chief's save returns, or raise its error about the weights. Write nothing."""
        self._check_finite(model)
        return self.prefix(int(model.step) - 1)


# Keys of results.json that are present only if the test did not use their defaults.
ONLY_AWAY_FROM_DEFAULTS = ("query_normalised_with", "query_shares", "updates_at_test")


def write_results(
    folder: Path, name: str, values: np.ndarray, entry: Mapping, known: Mapping, paper_updates: tuple[int, ...]
) -> None:
    """Write a test's <name>.csv and <name>.pkl in the original's formats, and its entry in results.json.

    Args:
        folder: where to write.
        name: of the files, without suffix.
        values: [tasks, 1 + updates], accuracies (0 to 1), or losses for regression.
        entry: what was tested. An earlier entry with the same values is replaced.
        known: further keys of the entry. More training may change their values, so they do not identify it.
        paper_updates: the columns that the paper reports.
    Raise InputError if the results cannot be written or results.json is damaged.
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
    with writing(folder), folder_lock(folder):  # concurrent tests must not overwrite each other's entries
        write_whole(folder / f"{name}.csv", lambda file: file.write(text.getvalue().encode()))
        # For scripts written for the original. This project never reads it.
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
    """Create the folder if needed. Raise InputError, naming the flag to change, if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", error)
        raise InputError(f"{folder}: cannot write ({reason}); make it writable, or choose another {flag}") from None


# -- the checkpoint format --------------------------------------------------------------------------------------------


def write_checkpoint(prefix: Path, tensors: Mapping[str, object]) -> None:
    """Write tensors by key to <prefix>.data-00000-of-00001, then .index. TensorFlow 1's Saver can read them."""
    saving = prefix.parent / ".saving"
    shutil.rmtree(saving, ignore_errors=True)  # left by a process that was killed here
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
    """Open a checkpoint for reading. Turn any exception except InputError into a DamagedError."""
    try:
        for path in (f"{prefix}.index", f"{prefix}.data-00000-of-00001"):
            with open(path, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise DamagedError(f"{path}: is a Git LFS pointer; copy the file that it stands for (git lfs pull)")
        yield tf.train.load_checkpoint(prefix)
    except PermissionError as error:
        raise unreadable(error.filename, error) from None
    except InputError:
        raise
    except Exception as error:  # TensorFlow raises many kinds of errors on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{prefix}: checkpoint is damaged ({reason}); copy it again, or choose another") from error


def _restore(reader, prefix, model):
    """Load a checkpoint into the model. Return its Validation. The model does not change if this raises."""
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    stored_key = _stored_keys(reader, model)
    names = {stored_key(key): name for name, key in model.keys.items()}
    stored = {names.get(key, key): shape for key, shape in _weight_shapes(shapes).items()}
    variables = model.state
    expected = {name: list(variables[key].shape) for name, key in model.keys.items()}
    for name in sorted(expected.keys() | stored.keys()):
        here, there = expected.get(name, "none"), stored.get(name, "none")
        if here != there:
            raise InputError(
                f"{prefix}: is a checkpoint of a different network ({name} has shape {there} there, {here} here); "
                "give the flags it was trained with"
            )
    if stored_key("step") not in shapes:  # weights only: the original's, or a published model
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
    """Return the shapes of a checkpoint's weights, given the shapes of all its variables."""
    if OBJECT_GRAPH in shapes:
        return {key: shape for key, shape in shapes.items() if key.startswith("weights/")}
    return {
        key: shape for key, shape in shapes.items() if key not in COUNTERS and not key.endswith(("/Adam", "/Adam_1"))
    }


# A key that only older checkpoints have: until November 2026, tf.train.Checkpoint wrote them, with attributes as keys.
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def _stored_keys(reader, model=None):
    """Return a function that maps a key to the key in this checkpoint. They differ in older run folders."""
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
    if not reader.has_tensor(key):  # written by the original, or by an early version of ours
        return Validation(last=int(re.search(r"[0-9]+$", prefix)[0]))
    last, best, accuracy, tasks = reader.get_tensor(key).tolist()
    return Validation(int(last), int(best), accuracy, int(tasks))
