"""The run folder: its name, the flags it was made with, its checkpoints, events and results.

<logdir>/<run name>/flags.json                              the flags that this run's numbers depend on
                    model<i>.index, model<i>.data-...       state after i + 1 outer updates; the ten latest
                    events.out.tfevents...                  TensorBoard
                    test_ubs<K>_stepsize<alpha>.csv, .pkl   the original's test results
                    results.json                            the same, named in plain words
"""

import csv
import io
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf
from tensorflow.core.util import event_pb2

from utils import InputError, statistics, write_whole

if TYPE_CHECKING:
    from maml import MAML

KEPT_CHECKPOINTS = 10  # as the original's Saver
ITERATIONS = ("pretrain_iterations", "metatrain_iterations")


def run_name(flags: Mapping) -> str:
    """The run folder's name: the original's (its main.py), with suffixes for what that leaves out, if not at default.

    flags: the original's flags by name, as in training, and our seed, image_size and image_channels.
    Example: cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm, or the same with .seed3
    """
    name = (
        f"cls_{flags['num_classes']}.mbs_{flags['meta_batch_size']}.ubs_{flags['update_batch_size']}"
        f".numstep{flags['num_updates']}.updatelr{flags['update_lr']}"
    )
    if flags["num_filters"] != 64:
        name += f"hidden{flags['num_filters']}"
    if flags["max_pool"]:
        name += "maxpool"
    if flags["stop_grad"]:
        name += "stopgrad"
    name += flags["baseline"] or ""
    name += {"batch_norm": "batchnorm", "layer_norm": "layernorm", None: "nonorm"}[flags["norm"]]
    if not flags["conv"] and flags["datasource"] != "sinusoid":
        name += ".fc"
    if flags["pretrain_iterations"] and not flags["baseline"]:
        name += f".pretrain{flags['pretrain_iterations']}" if flags["metatrain_iterations"] else ".pretrain"
    if flags["meta_lr"] != 0.001:
        name += f".metalr{flags['meta_lr']}"
    for flag, suffix in (("image_size", "size"), ("image_channels", "channels")):
        if flags[flag]:
            name += f".{suffix}{flags[flag]}"
    if flags["seed"]:
        name += f".seed{flags['seed']}"
    return name


class Run:
    """One run folder on disk."""

    def __init__(self, folder: Path):
        if set(str(folder)) & set("[\\"):
            raise InputError(
                f"{folder} has a [ or a backslash, which TensorFlow takes for a pattern when it reads checkpoints: "
                "give another --logdir"
            )
        self.folder = folder

    # -- identity -----------------------------------------------------------------------------------------------------

    def claim(self, flags: Mapping, resume: bool) -> None:
        """Makes the folder this run's own. Raises InputError where it is another's, or not to be written or resumed."""
        held = self.iterations()
        if held and not resume:
            raise InputError(
                f"{self.folder} holds a run up to model{held[-1]}, and --resume=False would overwrite it: "
                "give another --logdir, or delete the folder"
            )
        check_writable(self.folder, "--logdir")
        if held:
            self.check_flags(flags)
        record = json.dumps(dict(flags), indent=1).encode()
        write_whole(self.folder / "flags.json", lambda file: file.write(record))

    def check_flags(self, flags: Mapping, training: bool = True) -> None:
        """Raises InputError listing the flags in which the folder's run differs from `flags`.

        The number of iterations may differ, except that training may not change where pretraining ended once it has.
        A folder without a record (the original's released model) may be tested, not trained into.
        """
        try:
            recorded = dict(json.loads((self.folder / "flags.json").read_text()))
        except FileNotFoundError:
            if training:
                raise InputError(
                    f"{self.folder} has a model but no flags.json, so it can be tested but not trained further: "
                    "give another --logdir"
                ) from None
            return
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self.folder / 'flags.json'} is damaged ({error}): delete it, or give another --logdir"
            ) from None
        differing = [name for name in flags if name not in ITERATIONS and recorded.get(name) != flags[name]]
        pretraining = sorted({recorded.get("pretrain_iterations", 0), flags["pretrain_iterations"]})
        if training and len(pretraining) > 1 and self.iterations()[-1] >= pretraining[0]:
            differing.append("pretrain_iterations")
        if differing:
            listed = ", ".join(f"--{name}={recorded.get(name)} there, {flags[name]} here" for name in differing)
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

    def save(self, maml: "MAML") -> str:
        """Writes model<step - 1>: weights, optimizers and step. Beside its place, the index moved in last.

        Returns its prefix. All but the ten latest checkpoints are removed.
        """
        iteration = int(maml.step) - 1
        beside, prefix = str(self.folder / ".saving"), self.prefix(iteration)
        _checkpoint(maml).write(beside)
        os.replace(beside + ".data-00000-of-00001", self._data(iteration))
        os.replace(beside + ".index", prefix + ".index")
        for old in self.iterations()[:-KEPT_CHECKPOINTS]:
            os.unlink(self.prefix(old) + ".index")
            os.unlink(self._data(old))
        return prefix

    def checkpoint(self, iteration: int = -1) -> str:
        """Prefix of model<iteration> (-1: the latest). Raises InputError where it is not there."""
        held = self.iterations()
        if not held:
            raise InputError(f"no checkpoint (model<iteration>.index) in {self.folder}{self._siblings()}")
        if iteration not in (-1, *held):
            listed = ", ".join(map(str, held))
            raise InputError(
                f"--test_iter={iteration}, but {self.folder} has the iterations {listed}: give one of them or -1"
            )
        return self.prefix(held[-1] if iteration == -1 else iteration)

    def restore(self, maml: "MAML", prefix: str) -> None:
        """Reads a checkpoint into maml; of one that the original wrote, the weights, which is all it has.

        Raises InputError where its variables are not those of this network, or cannot be read.
        """
        try:
            reader = tf.train.load_checkpoint(prefix)
            stored = reader.get_variable_to_shape_map()
            if "_CHECKPOINTABLE_OBJECT_GRAPH" in stored:
                suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
                names = {name: f"weights/{name}{suffix}" for name in maml.weights}
                stored = {key: shape for key, shape in stored.items() if re.fullmatch(f"weights/[^/]*{suffix}", key)}
                _check_shapes(prefix, {names[name]: weight.shape for name, weight in maml.weights.items()}, stored)
                _checkpoint(maml).read(prefix).assert_existing_objects_matched()
            else:
                names = maml.network.tf1_names
                _check_shapes(prefix, {names[name]: weight.shape for name, weight in maml.weights.items()}, stored)
                for name, weight in maml.weights.items():
                    weight.assign(reader.get_tensor(names[name]))
        except InputError:
            raise
        except Exception as error:  # on a damaged file TensorFlow raises nearly every kind there is
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot read checkpoint {prefix} ({reason}): delete it to go on from the one before"
            ) from error

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

    # -- events -------------------------------------------------------------------------------------------------------

    def events(self, step: int) -> tf.summary.SummaryWriter:
        """A writer of TensorBoard events from `step` on. Later ones, of a killed run that is resumed, are dropped."""
        for path in self.folder.glob("events.out.tfevents.*"):
            kept, dropped = [], False
            try:
                for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                    event = event_pb2.Event.FromString(record)
                    if event.step < step or event.file_version:
                        kept.append(record)
                    else:
                        dropped = True
            except tf.errors.DataLossError:
                dropped = True  # the kill cut the last record
            if dropped:
                beside = str(path.with_name(".events"))
                with tf.io.TFRecordWriter(beside) as writer:
                    for record in kept:
                        writer.write(record)
                os.replace(beside, path)
        return tf.summary.create_file_writer(str(self.folder))


def write_results(folder: Path, name: str, values: np.ndarray, entry: Mapping, paper_updates: tuple[int, ...]) -> None:
    """Writes a test's files: <name>.csv and .pkl as the original's, and its entry in results.json.

    Args:
        values: [tasks, 1 + updates], accuracies (0 to 1), or losses for regression.
        entry: what was tested, in plain words; an earlier entry alike in all of it is replaced.
        paper_updates: the columns that the paper reports.
    """
    means, stds, ci95 = statistics(values)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow([f"update{j}" for j in range(values.shape[1])])
    rows.writerows([means, stds, ci95])
    write_whole(folder / f"{name}.csv", lambda file: file.write(text.getvalue().encode()))
    # For programs that read the original's results; nothing here reads it.
    write_whole(folder / f"{name}.pkl", lambda file: pickle.dump({"mses": values}, file))

    def number(value):
        return float(value) if np.isfinite(value) else None  # a task diverged: JSON has no NaN

    updates = [
        {
            "updates": j,
            "set": "query" if j else "support, before any update",
            "mean": number(means[j]),
            "ci95": number(ci95[j]),
            "std": number(stds[j]),
            "median": number(np.median(values[:, j])),
            "the_papers_number": j in paper_updates,
        }
        for j in range(values.shape[1])
    ]
    path = folder / "results.json"
    try:
        earlier = [dict(one) for one in json.loads(path.read_text())]
    except FileNotFoundError:
        earlier = []
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, or give another --results_dir") from None
    kept = [one for one in earlier if any(one.get(key) != value for key, value in entry.items())]
    results = json.dumps([*kept, {**entry, "results": updates}], indent=1).encode()
    write_whole(path, lambda file: file.write(results))


def check_writable(folder: Path, flag: str) -> None:
    """Makes the folder and a file in it. Raises InputError naming the flag to change where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", lambda file: None)
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): give another {flag}") from None


def _checkpoint(maml):
    # Differs: the original saves the weights alone, so that a resumed run begins with fresh moments.
    return tf.train.Checkpoint(
        weights=maml.weights,
        meta_optimizer=maml.meta_optimizer,
        pretrain_optimizer=maml.pretrain_optimizer,
        step=maml.step,
    )


def _check_shapes(prefix, expected, stored):
    """Raises InputError unless the stored variables are the expected ones, names and shapes."""
    for name in sorted(expected.keys() | stored.keys()):
        here, there = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, stored))
        if here != there:
            raise InputError(
                f"checkpoint {prefix} is of another network: {name} has shape {there} there, {here} here; "
                "give the flags that it was trained with"
            )
