"""The run folder: name, flags, checkpoints (ours, older ones, the original's) and results."""

import csv
import errno
import json
import math
import os
import pickle
import re
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import networks
import recipe
import runs
from files import InputError
from maml import MAML
from tests.helpers import contents, line_model, line_model_at, maml_of, unprivileged
from utils import accuracy, mse

FLAGS = {
    "datasource": "sinusoid",
    "num_classes": 5,
    "baseline": None,
    "pretrain_iterations": 0,
    "metatrain_iterations": 70000,
    "meta_batch_size": 25,
    "meta_lr": 0.001,
    "update_batch_size": 10,
    "update_lr": 0.001,
    "num_updates": 1,
    "norm": None,
    "num_filters": 64,
    "conv": True,
    "max_pool": False,
    "stop_grad": False,
    "adapt": "all",
    "learn_update_lr": "none",
    "loss": "sum_over_shot",
    "network": "paper",
    "num_query": -1,
    "seed": 0,
    "data_path": None,
    "split": None,
    "image_size": None,
    "image_channels": None,
    "augment": False,
}
OMNIGLOT = FLAGS | {"datasource": "omniglot", "meta_batch_size": 32, "update_batch_size": 1, "update_lr": 0.4}
OMNIGLOT |= {"norm": "batch_norm"}


def image_model(filters: int = 4, norm: str | None = "batch_norm") -> MAML:
    network = networks.conv4((28, 28), 1, 5, filters, max_pool=False, norm=norm, mean_head=True)
    return maml_of(network, mse, accuracy, inner_lr=0.4, inner_steps=1)


def randomize(maml: MAML, seed: int, step: int) -> list[np.ndarray]:
    """Set all variables to random values, and return these."""
    random = np.random.default_rng(seed)
    for variable in state(maml):
        if variable.dtype.is_floating:
            variable.assign(random.normal(size=variable.shape))
        else:
            variable.assign(random.integers(1, 100))
    maml.step.assign(step)
    return values(maml)


def state(maml: MAML) -> list[tf.Variable]:
    return list(
        {id(variable): variable for variable in maml.variables}.values()
    )  # the optimizers also hold the weights


def values(maml: MAML) -> list[np.ndarray]:
    return [variable.numpy() for variable in state(maml)]


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def claim(run: runs.Run, flags: dict, resume: bool = True) -> None:
    """Prepare the folder as main does before training."""
    with run.locked():
        run.check(flags, recipe.DEFAULTS, resume)
        run.record(flags)


@pytest.fixture
def run(tmp_path) -> runs.Run:
    folder = tmp_path / "run"
    folder.mkdir()
    return runs.Run(folder)


# -- the name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        # The original's (its main.py).
        (FLAGS, "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm"),
        (
            OMNIGLOT
            | {"datasource": "miniimagenet", "meta_batch_size": 4, "num_updates": 5, "update_lr": 0.01}
            | {"num_filters": 32, "max_pool": True},
            "cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm",
        ),
        (OMNIGLOT, "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm"),
        (
            OMNIGLOT | {"stop_grad": True, "max_pool": True, "norm": "layer_norm"},
            "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4maxpoolstopgradlayernorm",
        ),
        (
            FLAGS | {"baseline": "oracle", "pretrain_iterations": 70000, "metatrain_iterations": 0},
            "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001oraclenonorm",
        ),
        # The original omits these flags, so runs that differ in them share a folder.
        (
            FLAGS | {"pretrain_iterations": 70000, "metatrain_iterations": 0},
            "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain",
        ),
        (FLAGS | {"pretrain_iterations": 500}, "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain500"),
        (OMNIGLOT | {"conv": False}, "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm.fc"),
        (
            FLAGS | {"conv": False},
            "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm",
        ),  # the sinusoid has only this network
        (FLAGS | {"meta_lr": 0.01}, "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.metalr0.01"),
        (FLAGS | {"seed": 3}, "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.seed3"),
        (
            OMNIGLOT | {"conv": False, "pretrain_iterations": 5, "meta_lr": 0.01, "seed": 3},
            "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm.fc.pretrain5.metalr0.01.seed3",
        ),
        (
            OMNIGLOT | {"image_size": 64, "image_channels": 3, "seed": 3},
            "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm.size64.channels3.seed3",
        ),
        (FLAGS | {"update_lr": 1e-05}, "cls_5.mbs_25.ubs_10.numstep1.updatelr1e-05nonorm"),  # Python's format
    ],
)
def test_run_name(flags, name):
    assert recipe.from_flags(flags).run_name == name


# -- identity ---------------------------------------------------------------------------------------------------------


def test_a_new_run_creates_its_folder_and_records_its_flags(tmp_path):
    run = runs.Run(tmp_path / "logs" / "sine" / "run")
    claim(run, FLAGS)
    assert json.loads((run.folder / "flags.json").read_text()) == FLAGS


def test_a_run_may_be_extended(run):
    claim(run, FLAGS)
    run.save(line_model_at(70000))
    claim(run, FLAGS | {"metatrain_iterations": 90000})
    assert json.loads((run.folder / "flags.json").read_text())["metatrain_iterations"] == 90000


def test_the_folder_of_a_different_run_is_refused_and_its_flags_listed(run):
    claim(run, FLAGS)
    run.save(line_model_at(100))
    before = contents(run.folder)
    with pytest.raises(InputError) as error:
        claim(run, FLAGS | {"num_query": 3, "datasource": "omniglot", "metatrain_iterations": 7})
    assert str(run.folder) in str(error.value)
    assert "--num_query=-1 there, 3 here" in str(error.value)
    assert "--datasource=sinusoid there, omniglot here" in str(error.value)
    assert "iterations" not in str(error.value)
    for name in {*recipe.DEFAULTS} - {"pretrain_iterations", "metatrain_iterations"}:
        with pytest.raises(InputError, match=f"--{name}={FLAGS[name]} there, another here"):
            claim(run, FLAGS | {name: "another"})
    assert contents(run.folder) == before


def test_a_run_without_checkpoints_may_change_its_flags(run):
    claim(run, FLAGS)  # then killed before its first checkpoint
    claim(run, OMNIGLOT, resume=False)
    assert json.loads((run.folder / "flags.json").read_text()) == OMNIGLOT


@pytest.mark.parametrize(
    ("recorded", "done", "now", "allowed"),
    [
        ((500, 1000), 400, (450, 1000), True),  # not reached yet
        ((500, 1000), 500, (600, 1000), True),  # reached, but not passed
        ((500, 0), 500, (900, 0), True),
        ((500, 1000), 501, (600, 1000), False),
        ((500, 1000), 700, (600, 1000), False),
        ((500, 1000), 550, (520, 1000), False),
        ((500, 1000), 450, (420, 1000), False),
        ((500, 1000), 700, (500, 2000), True),
    ],
)
def test_a_finished_pretraining_cannot_be_extended_or_shortened(run, recorded, done, now, allowed):
    def flags(pair):
        return FLAGS | dict(zip(("pretrain_iterations", "metatrain_iterations"), pair, strict=True))

    claim(run, flags(recorded))
    run.save(line_model_at(done))
    if allowed:
        claim(run, flags(now))
    else:
        with pytest.raises(InputError, match="--pretrain_iterations"):
            claim(run, flags(now))
    run.check_flags(flags(now), recipe.DEFAULTS, training=False)  # testing is allowed


def test_a_run_without_flags_json_can_be_tested_but_not_trained(run):
    run.save(line_model_at(60000))
    with pytest.raises(InputError, match="--logdir"):
        claim(run, FLAGS)
    assert not (run.folder / "flags.json").exists()
    run.check_flags(FLAGS, recipe.DEFAULTS, training=False)


@pytest.mark.parametrize("record", [b"", b'{"datasource": ', b'["sinusoid"]', b"\xff\xfe\xfd", b"[" * 100_000])
def test_a_damaged_flags_json_is_reported(run, record):
    run.save(line_model_at(100))
    (run.folder / "flags.json").write_bytes(record)
    with pytest.raises(InputError, match=r"flags\.json") as error:
        claim(run, FLAGS)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["runs [1]", "back\\slash", "not text \udcff"])
def test_a_path_that_tensorflow_cannot_read_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="--logdir"):
        runs.Run(tmp_path / name)


def test_repeated_iterations_replace_the_record_of_how_they_were_computed(run, capsys):
    """A second machine resumed at 500 and was killed before it saved anything."""
    first, second = {"op_threads": 1}, {"op_threads": 2}
    run.record_computed(0, first)
    run.record_computed(500, second)
    assert re.search("op_threads.*1.*2", capsys.readouterr().err)
    run.record_computed(500, first)
    run.record_computed(1000, first)
    assert capsys.readouterr().err == ""
    assert json.loads((run.folder / "computed.json").read_text()) == [{"from_iteration": 0, **first}]


def test_training_classes_are_recorded_and_changes_reported(run, capsys):
    counts = {"train": {"a": 20, "b": 20}, "val": {"d": 5}, "test": {}}
    run.record_classes(counts)
    run.save(line_model_at(100))
    run.record_classes(counts)
    assert capsys.readouterr().err == ""
    for train, reported in (
        ({"b": 20, "c": 20}, "1 of its 2 .*1 are new.* 0 have"),
        ({"b": 19}, "2 of its 3.* 1 have"),
    ):
        run.record_classes({**counts, "train": train})
        assert re.search(f"WARNING: .*{reported}", capsys.readouterr().err)
    assert json.loads((run.folder / "classes.json").read_text()) == {
        "train": {"a": 20, "b": 19, "c": 20},
        "val": {"d": 5},
        runs.CHANGED: {"a": 20, "b": 20, "c": 20},
    }
    assert run.trained_classes() == ["a", "b", "c"]
    assert run.has_classes({"train": {"a": 20, "b": 19, "c": 20}, "val": {"d": 5}})
    run.record_classes({**counts, "train": {"a": 20, "b": 19, "c": 20}})  # unchanged since
    assert run.classes()[runs.CHANGED].keys() == {"a", "b", "c"}


def test_a_list_of_training_classes_is_read(run, capsys):
    """As written until November 2026. Its counts are unknown, so no folder is known to hold the same images."""
    (run.folder / "classes.json").write_text('["a", "b"]')
    run.save(line_model_at(100))
    assert run.trained_classes() == ["a", "b"]
    assert not run.has_classes({"train": {"a": 20, "b": 20}})
    run.record_classes({"train": {"a": 20, "b": 20}})
    assert capsys.readouterr().err == ""
    assert run.has_classes({"train": {"a": 20, "b": 20}, "test": {"c": 1}})
    assert not run.has_classes({"train": {"a": 20, "b": 19}})


@pytest.mark.parametrize("content", ["", "7", "[7]", '{"train": ["a"]}', '{"train": {"a": "many"}}'])
def test_a_damaged_record_of_classes_is_named(run, content):
    (run.folder / "classes.json").write_text(content)
    with pytest.raises(InputError, match=r"classes\.json"):
        run.trained_classes()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_every_variable(run):
    saved = line_model("batch_norm")
    expected = randomize(saved, seed=1, step=700)
    prefix = run.save(saved)
    assert prefix == run.checkpoint() == str(run.folder / "model699")
    restored = line_model("batch_norm")
    run.restore(restored, prefix)
    assert len(expected) == 5 * 5 + 3  # w1 b1 w2 b2 beta1 with m and v twice; two update counts; the step
    assert_same(values(restored), expected)


def test_the_latest_checkpoints_and_the_best_are_kept(run, monkeypatch):
    assert runs.KEPT_CHECKPOINTS == 10
    monkeypatch.setattr(runs, "KEPT_CHECKPOINTS", 3)
    (run.folder / "modelled.index").write_text("not ours")
    for step in (1, 2, 3, 9, 10, 100, 5000):
        run.validation = run.validation.then(step - 1, 0.9 if step == 3 else 0.5, 200)
        run.save(line_model_at(step))
    saved = [2, 9, 99, 4999]
    assert run.iterations() == saved
    names = {f"model{i}{ending}" for i in saved for ending in (".index", ".data-00000-of-00001")}
    assert {path.name for path in run.folder.iterdir()} == names | {"modelled.index"}
    assert run.checkpoint("best") == str(run.folder / "model2")
    reopened = runs.Run(run.folder)
    assert reopened.best() == run.validation == (4999, 2, 0.9, 200)
    reopened.restore_newest(line_model())
    assert reopened.validation == run.validation


def test_the_best_validation_is_the_first_of_ties_on_the_same_number_of_tasks():
    best = runs.Validation().then(500, 0.3, 200).then(1000, 0.5, 200).then(1500, 0.5, 200).then(2000, 0.4, 200)
    assert best == (2000, 1000, 0.5, 200)
    assert best.then(2500, 0.45, 20) == (2500, 2500, 0.45, 20)
    assert best.then(2500, -math.inf, 20) == (2500, 1000, 0.5, 200)


def test_a_checkpoint_is_chosen_by_its_iteration(run):
    for step in (100, 5000):
        run.save(line_model_at(step))
    assert [run.checkpoint(i) for i in (-1, 4999, 99)] == [run.prefix(i) for i in (4999, 4999, 99)]
    for missing in (98, "best"):
        with pytest.raises(InputError, match=f"--test_iter={missing}"):
            run.checkpoint(missing)
    (run.folder / "model4999.data-00000-of-00001").unlink()  # an interrupted copy
    assert run.checkpoint() == run.prefix(99)


def test_a_folder_without_checkpoints_is_reported_with_run_folders_nearby(run):
    with pytest.raises(InputError, match=str(run.folder)):
        run.checkpoint()
    sibling = runs.Run(run.folder.with_name("sibling"))
    sibling.folder.mkdir()
    sibling.save(line_model_at(1))
    for folder in (run.folder, run.folder.parent):
        with pytest.raises(InputError, match=rf"{folder}: .*\bsibling\b"):
            runs.load(folder)


@pytest.mark.parametrize("name", ["", "flags.json", "model0.index", "model0.data-00000-of-00001"])
def test_a_folder_that_may_not_be_read_is_not_called_damaged_or_empty(name, public_folder):
    """The error has the system's reason and the path. The previous checkpoint does not replace an unreadable one."""
    run = runs.Run(public_folder / "theirs")
    run.folder.mkdir()
    run.record(recipe.to_flags(recipe.Recipe()))
    run.save(line_model_at(1))
    (path := run.folder / name).chmod(0)
    with unprivileged():
        with pytest.raises(InputError, match=rf"^{path}: .*{os.strerror(errno.EACCES)}") as error:
            runs.load(run.folder)
        assert not isinstance(error.value, runs.DamagedError)
        if name != "flags.json":
            with pytest.raises(InputError, match=rf"^{path}: "):
                run.restore_newest(line_model())
    path.chmod(0o755)


def test_a_git_lfs_pointer_is_named_and_the_previous_checkpoint_used(run, capsys):
    earlier = run.save(line_model_at(1))
    newest = Path(run.save(line_model_at(2)) + ".data-00000-of-00001")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    newest.write_text(pointer)
    assert run.restore_newest(line_model()) == earlier
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest}: " in line and "Git LFS" in line
    Path(earlier + ".index").write_text(pointer)
    with pytest.raises(InputError, match=f"^{run.folder}: "):
        run.restore_newest(line_model())
    (run.folder / "flags.json").write_text(pointer)
    with pytest.raises(InputError, match=r"flags\.json: .*Git LFS"):
        run.check_flags({}, {})


def test_no_error_about_a_damaged_folder_advises_to_delete(run, capsys):
    """The user may have the only copy."""
    errors = []

    def refused(function, *arguments):
        with pytest.raises(InputError) as error:
            function(*arguments)
        errors.append(str(error.value))

    os.truncate(run.save(line_model_at(1)) + ".index", 40)
    refused(run.restore, line_model(), run.prefix(0))
    refused(run.restore_newest, line_model())
    refused(run.check, {}, {}, False)
    for name in ("computed.json", "classes.json", "flags.json"):
        (run.folder / name).write_text("{")
    refused(run.record_computed, 1, {})
    refused(run.classes)
    refused(run.check_flags, {}, {})
    for line in [*errors, capsys.readouterr().err]:
        assert not re.search("delet|remov|eras|overwrite it", line)


class Crash(Exception):
    pass


@pytest.mark.parametrize(("function", "calls"), [("replace", 0), ("replace", 1), ("unlink", 0), ("unlink", 1)])
def test_an_interrupted_save_leaves_only_complete_checkpoints(run, monkeypatch, function, calls):
    """The process dies before the data or index file is moved into place, or before either old file is deleted."""
    monkeypatch.setattr(runs, "KEPT_CHECKPOINTS", 2)
    expected = {}
    for step in (1, 2):
        maml = line_model()
        expected[step - 1] = randomize(maml, seed=step, step=step)
        run.save(maml)

    original, completed = getattr(os, function), []

    def crash(*arguments):
        if len(completed) == calls:
            raise Crash
        completed.append(arguments)
        original(*arguments)

    maml = line_model()
    expected[2] = randomize(maml, seed=3, step=3)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(runs.os, function, crash)
        run.save(maml)

    saved = run.iterations()
    assert {path.name for path in run.folder.glob("model*.index")} == {f"model{i}.index" for i in saved}
    assert saved == ([0, 1] if function == "replace" else [1, 2] if calls else [0, 1, 2])
    for iteration in saved:
        restored = line_model()
        run.restore(restored, run.checkpoint(iteration))
        assert_same(values(restored), expected[iteration])
    run.save(maml)  # the next attempt succeeds
    restored = line_model()
    run.restore(restored, run.checkpoint())
    assert_same(values(restored), expected[2])
    assert run.iterations() == [1, 2]
    assert not list(run.folder.glob(".*"))


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (line_model(hidden=(3,)), line_model(hidden=(4,))),
        (line_model(), line_model(norm="layer_norm")),
        (line_model(norm="batch_norm"), line_model()),
        (line_model(), image_model()),
        (line_model(), line_model(hidden=(3, 3))),
    ],
)
def test_a_checkpoint_of_a_different_network_is_refused(run, saved, here):
    saved.step.assign(1)
    prefix = run.save(saved)
    before = values(here)
    with pytest.raises(InputError, match=re.escape(prefix)) as error:
        run.restore(here, prefix)
    assert not isinstance(error.value, runs.DamagedError)  # so no earlier checkpoint is tried
    assert_same(values(here), before)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 10] ^= 4
    path.write_bytes(data)


def rewritten(**changes: tf.Tensor) -> Callable[[Path], None]:
    """Rewrite a checkpoint with different values for some keys, and valid checksums."""

    def rewrite(path):
        prefix = path.with_suffix("")
        reader = tf.train.load_checkpoint(str(prefix))
        stored = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
        runs.write_checkpoint(prefix, {key: tf.constant(value) for key, value in stored.items()} | changes)

    return rewrite


DAMAGES = {
    "index, empty": (".index", lambda path: path.write_bytes(b"")),
    "index, truncated": (".index", lambda path: os.truncate(path, 40)),
    "index, garbage": (".index", lambda path: path.write_bytes(os.urandom(path.stat().st_size))),
    "index, a pickle": (".index", lambda path: path.write_bytes(pickle.dumps(path))),
    "data, truncated": (".data-00000-of-00001", lambda path: os.truncate(path, 20)),
    "data, a bit": (".data-00000-of-00001", flip_a_bit),
    "moments of another shape": (".index", rewritten(**{"model/Variable/Adam": tf.zeros([7, 7])})),
    "a step that is text": (".index", rewritten(step=tf.constant(b"600"))),
    "five validation numbers": (".index", rewritten(validation=tf.zeros(5, tf.float64))),
}


@pytest.mark.parametrize(("ending", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_if_the_newest_checkpoint_is_damaged_the_previous_one_is_used(run, ending, damage, capfd):
    """This prints one line, without TensorFlow's. Restoring a damaged checkpoint by name fails and changes nothing."""
    before = line_model()
    expected = randomize(before, seed=1, step=100)
    run.validation = runs.Validation(50, 40, 0.5, 200)
    earlier = run.save(before)
    run.validation = runs.Validation(150, 150, 0.7, 200)
    prefix = run.save(line_model_at(200))
    damage(Path(prefix + ending))

    restored = line_model_at(7)
    with pytest.raises(runs.DamagedError, match=re.escape(prefix)):
        run.restore(restored, prefix)
    assert restored.step == 7
    assert run.restore_newest(restored) == earlier
    assert_same(values(restored), expected)
    assert run.validation.best == 40
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("WARNING: ") and prefix in line


def test_a_folder_with_only_damaged_checkpoints_is_reported(run):
    for step in (1, 2):
        os.truncate(run.save(line_model_at(step)) + ".index", 40)
    with pytest.raises(InputError, match=str(run.folder)):
        run.restore_newest(line_model())
    assert run.best() == runs.Validation()


@pytest.mark.parametrize(("part", "value"), [("weights", np.nan), ("meta_optimizer", -np.inf)])
def test_nan_and_infinity_are_never_saved(run, part, value):
    maml = line_model_at(100)
    prefix = run.save(maml)
    maml.step.assign(200)
    (maml.weights if part == "weights" else maml.meta_optimizer.v)["b2"].assign([value])
    with pytest.raises(InputError, match=re.escape(prefix)):
        run.save(maml)
    assert run.iterations() == [99]


def test_a_full_disk_loses_no_checkpoint(run):
    """A file size limit acts as the full disk. Once it is lifted, the save succeeds."""
    expected = randomize(maml := line_model(hidden=(40, 40)), seed=1, step=100)
    run.save(maml)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        maml.step.assign(200)
        with pytest.raises(InputError, match=rf"{run.folder}: .*File too large"):
            run.save(maml)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    restored = line_model(hidden=(40, 40))
    run.restore_newest(restored)
    assert_same(values(restored), expected)
    assert run.save(maml) == run.checkpoint()
    assert not list(run.folder.glob(".*"))


def write_old_format(maml: MAML, run: runs.Run, **more: tf.Variable) -> None:
    """Write a checkpoint with tf.train.Checkpoint, as the program did until November 2026."""
    tf.train.Checkpoint(
        weights=maml.weights,
        meta_optimizer=maml.meta_optimizer,
        pretrain_optimizer=maml.pretrain_optimizer,
        step=maml.step,
        **more,
    ).write(run.prefix(int(maml.step) - 1))


def test_a_checkpoint_in_the_old_format_restores_to_the_same_bits(run):
    maml = line_model("batch_norm")
    expected = randomize(maml, seed=1, step=1001)
    write_old_format(maml, run, validation=tf.Variable(runs.Validation(1000, 500, 0.5, 20), dtype=tf.float64))
    restored = line_model("batch_norm")
    assert run.restore_newest(restored) == run.prefix(1000)
    assert_same(values(restored), expected)
    assert run.validation == runs.Validation(1000, 500, 0.5, 20)
    with pytest.raises(InputError, match=re.escape(run.prefix(1000))):
        run.restore(line_model("layer_norm"), run.prefix(1000))


def test_an_old_checkpoint_without_validations_is_restored(run):
    maml = line_model()
    randomize(maml, seed=1, step=1001)
    write_old_format(maml, run)
    run.restore_newest(line_model())
    assert run.validation == runs.Validation(last=1000)  # iteration 1000 was validated


# -- the original's checkpoints ---------------------------------------------------------------------------------------

CONV = ("conv1", "conv2", "conv3", "conv4", "w5", "b5")
VARIABLES = ("Variable", *(f"Variable_{i}" for i in range(1, 10)))
# Our name -> the name in the original's released checkpoint.
CONV_NAMES = {name: f"model/{name}" for name in CONV} | {f"b{i + 1}": f"model/{VARIABLES[i]}" for i in range(4)}
FC_NAMES = {f"{'wb'[i % 2]}{i // 2 + 1}": f"model/{VARIABLES[i]}" for i in range(10)}
LINE_NAMES = {"w1": "model/Variable", "b1": "model/Variable_1", "w2": "model/Variable_2", "b2": "model/Variable_3"}


def norm_names(norm, scopes):
    return {f"{norm}{layer}": f"model/{scope}/{norm}" for layer, scope in enumerate(scopes, 1)}


ORIGINALS = {
    "conv, batch norm": (image_model, "batch_norm", CONV_NAMES | norm_names("beta", "0123")),
    "conv, layer norm": (
        image_model,
        "layer_norm",
        CONV_NAMES | norm_names("beta", "0123") | norm_names("gamma", "0123"),
    ),
    "conv": (image_model, None, CONV_NAMES),
    "fc": (line_model, None, LINE_NAMES),
    "fc, batch norm": (
        lambda norm: line_model(norm, hidden=(6, 5, 4, 3)),
        "batch_norm",
        FC_NAMES | norm_names("beta", "0234"),
    ),
}


def save_as_the_original(run: runs.Run, iteration: int, tensors: dict[str, np.ndarray]) -> str:
    """Write model<iteration> with only these variables, as TensorFlow 1's Saver does."""
    prefix = str(run.folder / f"model{iteration}")
    names = list(tensors)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(tensors[name], tf.float32) for name in names],
    )
    return prefix


@pytest.fixture(params=ORIGINALS)
def original(request):
    """Return a model, and random weights for it by our names and by the original's."""
    build, norm, names = ORIGINALS[request.param]
    maml = build(norm=norm)
    assert names.keys() == maml.weights.keys()
    random = np.random.default_rng(3)
    weights = {name: random.normal(size=weight.shape).astype(np.float32) for name, weight in maml.weights.items()}
    return maml, weights, {names[name]: value for name, value in weights.items()}


def test_the_originals_checkpoint_is_restored(run, original):
    maml, weights, tensors = original
    save_as_the_original(run, 59000, tensors)
    assert run.iterations() == [59000]  # by file name: there is no `checkpoint` file
    run.restore(maml, run.checkpoint(59000))
    for name, value in weights.items():
        np.testing.assert_array_equal(maml.weights[name], value)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_an_originals_checkpoint_of_a_different_network_is_refused(run, fault):
    tensors = {key: np.zeros(line_model().weights[name].shape) for name, key in LINE_NAMES.items()}
    if fault == "missing":
        del tensors["model/Variable_2"]
    else:
        tensors["model/extra" if fault == "extra" else "model/Variable_2"] = np.zeros([7, 7])
    maml, prefix = line_model(), save_as_the_original(run, 59000, tensors)
    before = values(maml)
    with pytest.raises(InputError, match=re.escape(prefix)):
        run.restore(maml, prefix)
    assert_same(values(maml), before)


# -- results ----------------------------------------------------------------------------------------------------------

ENTRY = {"data_set": "omniglot", "split": "test", "support_examples_a_class_K": 1, "checkpoint": "model59999"}
ACCURACIES = np.array([[0.2, 0.4, 0.6], [0.2, 0.8, 1.0], [0.2, 0.6, 0.2], [0.2, 0.2, 0.8]])


def test_the_csv_and_pickle_have_the_originals_format(tmp_path):
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, {}, (2,))
    header, *rows = csv.reader((tmp_path / "test_ubs1_stepsize0.4.csv").read_text().splitlines())
    assert header == ["update0", "update1", "update2"]
    means, stds, ci95 = np.array(rows, float)
    np.testing.assert_allclose(means, [0.2, 0.5, 0.65])
    np.testing.assert_allclose(stds, [0, np.sqrt(0.05), np.sqrt(0.0875)], atol=1e-12)
    np.testing.assert_allclose(ci95, 1.96 * stds / 2)  # four tasks
    with (tmp_path / "test_ubs1_stepsize0.4.pkl").open("rb") as file:
        pickled = pickle.load(file)
    assert list(pickled) == ["mses"]
    np.testing.assert_array_equal(pickled["mses"], ACCURACIES)


def test_results_json_describes_every_update(tmp_path):
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, {}, (1,))
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    results = entry.pop("results")
    assert entry == ENTRY
    assert [result["updates"] for result in results] == [0, 1, 2]
    assert [result["set"].split(",")[0] for result in results] == ["support", "query", "query"]
    assert [result["the_papers_number"] for result in results] == [False, True, False]
    assert results[2]["mean"] == pytest.approx(0.65)
    assert results[2]["median"] == pytest.approx(0.7)
    assert results[2]["std"] == pytest.approx(np.sqrt(0.0875))
    assert results[2]["ci95"] == pytest.approx(0.98 * np.sqrt(0.0875))


def test_a_diverged_task_is_written_as_valid_json(tmp_path):
    values = ACCURACIES.copy()
    values[0, 2] = np.inf
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", values, ENTRY, {}, ())
    (entry,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert entry["results"][2]["mean"] is None
    assert entry["results"][2]["median"] == pytest.approx(0.9)
    assert entry["results"][1]["mean"] == pytest.approx(0.5)


def test_results_replace_only_the_entry_of_the_same_test(tmp_path):
    others = [ENTRY | {"split": "val"}, ENTRY | {"checkpoint": "model999"}, ENTRY | {"support_examples_a_class_K": 5}]
    # An entry without these keys is of a test at their defaults, so it is a different test.
    others += [ENTRY | {"updates_at_test": 5}, ENTRY | {"query_shares": "dirichlet"}]
    others += [ENTRY | {"query_normalised_with": "support"}]
    for entry in (others[0], ENTRY, *others[1:]):
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, entry, {}, ())
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES / 2, ENTRY, {}, ())
    entries = json.loads((tmp_path / "results.json").read_text())
    means = [entry.pop("results")[2]["mean"] for entry in entries]
    assert entries == [*others, ENTRY]
    assert means == pytest.approx([0.65] * 6 + [0.325])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "test_ubs1_stepsize0.4.csv",
        "test_ubs1_stepsize0.4.pkl",
    }


@pytest.mark.parametrize("damaged", ["", '[{"data_set"', '{"data_set": "omniglot"}', "[[1]]"])
def test_damaged_results_are_not_overwritten(tmp_path, damaged):
    (tmp_path / "results.json").write_text(damaged)
    with pytest.raises(InputError, match=r"results\.json: .*--results_dir"):
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, {}, ())
    assert (tmp_path / "results.json").read_text() == damaged
    assert (tmp_path / "test_ubs1_stepsize0.4.csv").exists()  # the results are not lost


def test_values_that_more_training_changes_do_not_identify_an_entry(tmp_path):
    for best in (True, False):
        known = {"best_on_validation": best}
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, known, ())
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert entry["best_on_validation"] is False


def test_concurrent_tests_keep_each_others_results(tmp_path):

    def write(process):
        for i in range(10):
            runs.write_results(tmp_path, f"test{process}", ACCURACIES, ENTRY | {"task_seed": (process, i)}, {}, ())

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    assert len(json.loads((tmp_path / "results.json").read_text())) == 20
