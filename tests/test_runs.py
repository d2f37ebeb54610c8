"""The run folder: its name, whose it is, whole checkpoints only, the original's checkpoints, events and results."""

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

import files
import networks
import recipe
import runs
from files import InputError
from maml import MAML
from tests.helpers import line_model, line_model_at, maml_of
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


def filled(maml: MAML, seed: int, step: int) -> list[np.ndarray]:
    """Random numbers in all that maml holds, which is returned."""
    random = np.random.default_rng(seed)
    for variable in state(maml):
        if variable.dtype.is_floating:
            variable.assign(random.normal(size=variable.shape))
        else:
            variable.assign(random.integers(1, 100))
    maml.step.assign(step)
    return values(maml)


def state(maml: MAML) -> list[tf.Variable]:
    return list({id(variable): variable for variable in maml.variables}.values())  # the optimizers hold the weights too


def values(maml: MAML) -> list[np.ndarray]:
    return [variable.numpy() for variable in state(maml)]


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def claim(run: runs.Run, flags: dict, resume: bool = True) -> None:
    """As main does before it trains."""
    with run.locked():
        run.check(flags, recipe.DEFAULTS, resume)
        run.record(flags)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


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
        # What the original leaves out, and so lets share one folder.
        (
            FLAGS | {"pretrain_iterations": 70000, "metatrain_iterations": 0},
            "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain",
        ),
        (FLAGS | {"pretrain_iterations": 500}, "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain500"),
        (OMNIGLOT | {"conv": False}, "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm.fc"),
        (FLAGS | {"conv": False}, "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm"),  # it has no other network
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
        (FLAGS | {"update_lr": 1e-05}, "cls_5.mbs_25.ubs_10.numstep1.updatelr1e-05nonorm"),  # as Python prints it
    ],
)
def test_run_name(flags, name):
    assert recipe.from_flags(flags).run_name == name


# -- whose it is ------------------------------------------------------------------------------------------------------


def test_claim_makes_the_folder_and_records_the_flags(tmp_path):
    run = runs.Run(tmp_path / "logs" / "sine" / "run")
    claim(run, FLAGS)
    assert json.loads((run.folder / "flags.json").read_text()) == FLAGS


def test_claim_of_the_same_run_with_more_iterations(run):
    claim(run, FLAGS)
    run.save(line_model_at(70000))
    claim(run, FLAGS | {"metatrain_iterations": 90000})
    assert json.loads((run.folder / "flags.json").read_text())["metatrain_iterations"] == 90000


def test_claim_lists_the_flags_of_another_run(run):
    claim(run, FLAGS)
    run.save(line_model_at(100))
    before = contents(run.folder)
    with pytest.raises(InputError) as error:
        claim(run, FLAGS | {"num_query": 3, "datasource": "omniglot", "metatrain_iterations": 7})
    assert str(run.folder) in str(error.value)
    assert "--num_query=-1 there, 3 here" in str(error.value)
    assert "--datasource=sinusoid there, omniglot here" in str(error.value)
    assert "iterations" not in str(error.value)
    assert contents(run.folder) == before


@pytest.mark.parametrize("name", sorted({*recipe.DEFAULTS} - {"pretrain_iterations", "metatrain_iterations"}))
def test_every_flag_tells_runs_apart(run, name):
    claim(run, FLAGS)
    run.save(line_model_at(100))
    with pytest.raises(InputError, match=f"--{name}={FLAGS[name]} there, another here"):
        claim(run, FLAGS | {name: "another"})


def test_a_folder_without_checkpoints_is_nobodys(run):
    claim(run, FLAGS)  # a run that was killed before its first checkpoint
    claim(run, OMNIGLOT, resume=False)
    assert json.loads((run.folder / "flags.json").read_text()) == OMNIGLOT


def test_resume_false_overwrites_nothing(run):
    claim(run, FLAGS)
    run.save(line_model_at(100))
    before = contents(run.folder)
    with pytest.raises(InputError, match="holds a run up to model99, and --resume=False would overwrite it"):
        claim(run, FLAGS, resume=False)
    assert contents(run.folder) == before


@pytest.mark.parametrize(
    ("recorded", "done", "now", "allowed"),
    [
        ((500, 1000), 400, (450, 1000), True),  # not reached yet
        ((500, 1000), 500, (600, 1000), True),  # reached, and nothing after it done
        ((500, 0), 500, (900, 0), True),
        ((500, 1000), 501, (600, 1000), False),
        ((500, 1000), 700, (600, 1000), False),
        ((500, 1000), 550, (520, 1000), False),
        ((500, 1000), 450, (420, 1000), False),
        ((500, 1000), 700, (500, 2000), True),
    ],
)
def test_pretraining_may_not_end_elsewhere_once_past(run, recorded, done, now, allowed):
    def flags(pair):
        return FLAGS | dict(zip(("pretrain_iterations", "metatrain_iterations"), pair, strict=True))

    claim(run, flags(recorded))
    run.save(line_model_at(done))
    if allowed:
        claim(run, flags(now))
    else:
        with pytest.raises(InputError, match=rf"\(--pretrain_iterations={recorded[0]} there, {now[0]} here\)"):
            claim(run, flags(now))
    run.check_flags(flags(now), recipe.DEFAULTS, training=False)  # a test changes nothing


def test_a_folder_without_a_record_is_tested_not_trained(run):
    run.save(line_model_at(60000))
    before = contents(run.folder)
    with pytest.raises(InputError, match=r"can be tested but not trained further: give another --logdir"):
        claim(run, FLAGS)
    assert contents(run.folder) == before
    run.check_flags(FLAGS, recipe.DEFAULTS, training=False)


@pytest.mark.parametrize(
    "record",
    [
        *(b"", b'{"datasource": ', b'["sinusoid"]', b"7", b"[]", b"\xff\xfe\xfd", b"null"),
        *(b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"{" + b" " * files.MAX_JSON + b"}"),
    ],
    ids=lambda record: str(record[:20]),
)
def test_a_damaged_record(run, record):
    run.save(line_model_at(100))
    (run.folder / "flags.json").write_bytes(record)
    with pytest.raises(InputError, match=r"flags\.json is damaged .* give another --logdir") as error:
        claim(run, FLAGS)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("value", [None, [], {"a": [1]}, "x", 1e400, "two\nlines \x1b[31m", "long" * 1000])
def test_a_record_of_strange_values(run, value):
    run.save(line_model_at(100))
    (run.folder / "flags.json").write_text(json.dumps(FLAGS | {"seed": value, "pretrain_iterations": value}))
    with pytest.raises(InputError, match=r"belongs to another run \(--seed=.* there, 0 here") as error:
        claim(run, FLAGS)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write to .*file/run \(.+\): give another --logdir"):
        claim(runs.Run(tmp_path / "file" / "run"), FLAGS)
    assert (tmp_path / "file").read_text() == "mine"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_everything(run):
    saved = line_model("batch_norm")
    expected = filled(saved, seed=1, step=700)
    prefix = run.save(saved)
    assert prefix == run.checkpoint() == str(run.folder / "model699")
    restored = line_model("batch_norm")
    run.restore(restored, prefix)
    assert len(expected) == 5 * 5 + 3  # w1 b1 w2 b2 beta1 with m and v twice; two counts of updates, and the step
    assert_same(values(restored), expected)


def test_the_ten_latest_checkpoints_stay(run):
    (run.folder / "modelled.index").write_text("not ours")
    for step in (*range(1, 10), 100, 1000, 5000):
        run.save(line_model_at(step))
    latest = [2, 3, 4, 5, 6, 7, 8, 99, 999, 4999]
    assert run.iterations() == latest
    files = {f"model{i}{ending}" for i in latest for ending in (".index", ".data-00000-of-00001")}
    assert {path.name for path in run.folder.iterdir()} == files | {"modelled.index"}


def test_an_index_without_its_data_is_no_checkpoint(run):
    """As in a folder that was copied halfway."""
    for step in (100, 5000):
        run.save(line_model_at(step))
    (run.folder / "model4999.data-00000-of-00001").unlink()
    assert run.checkpoint() == str(run.folder / "model99")


@pytest.mark.parametrize("iteration", [-1, 4999, 99])
def test_checkpoint_by_iteration(run, iteration):
    for step in (100, 5000):
        run.save(line_model_at(step))
    assert run.checkpoint(iteration) == str(run.folder / f"model{4999 if iteration == -1 else iteration}")


def test_a_missing_iteration_lists_those_there_are(run):
    for step in (100, 5000):
        run.save(line_model_at(step))
    with pytest.raises(InputError, match=r"--test_iter=98, but .*run has the iterations 99, 4999: give one of them"):
        run.checkpoint(98)


def test_a_folder_without_checkpoint(run):
    with pytest.raises(InputError, match=r"no checkpoint .* in .*run: train first"):
        run.checkpoint()
    other = runs.Run(run.folder.with_name("other"))
    other.folder.mkdir()
    other.save(line_model_at(1))
    with pytest.raises(InputError, match=r"no checkpoint .* in .*run; .* has runs in other: give the flags of one"):
        run.checkpoint()


class Crash(Exception):
    pass


@pytest.mark.parametrize(("function", "calls"), [("replace", 0), ("replace", 1), ("unlink", 0), ("unlink", 1)])
def test_a_save_cut_short_leaves_whole_checkpoints_only(run, monkeypatch, function, calls):
    """The process ends before the data, or the index, is moved in; or before either file of the oldest is removed."""
    expected = {}
    for step in range(1, 11):
        maml = line_model()
        expected[step - 1] = filled(maml, seed=step, step=step)
        run.save(maml)

    original, done = getattr(os, function), []

    def cut_short(*arguments):
        if len(done) == calls:
            raise Crash
        done.append(arguments)
        original(*arguments)

    maml = line_model()
    expected[10] = filled(maml, seed=11, step=11)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(runs.os, function, cut_short)
        run.save(maml)

    held = run.iterations()
    assert {path.name for path in run.folder.glob("model*.index")} == {f"model{i}.index" for i in held}
    assert held == (list(range(10)) if function == "replace" else list(range(1 if calls else 0, 11)))
    for iteration in held:
        restored = line_model()
        run.restore(restored, run.checkpoint(iteration))
        assert_same(values(restored), expected[iteration])
    run.save(maml)  # and the next attempt succeeds
    restored = line_model()
    run.restore(restored, run.checkpoint())
    assert_same(values(restored), expected[10])
    assert run.iterations() == list(range(1, 11))


def test_what_a_killed_save_leaves_is_removed(run):
    left = run.folder / ".saving" / "model_temp" / "part-00000-of-00001.data-00000-of-00001.tempstate1234"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    prefix = Path(run.save(line_model_at(1)))
    assert sorted(contents(run.folder)) == [f"{prefix.name}.data-00000-of-00001", f"{prefix.name}.index"]


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
def test_the_checkpoint_of_another_network_is_refused(run, saved, here):
    saved.step.assign(1)
    prefix = run.save(saved)
    before = values(here)
    with pytest.raises(InputError, match=rf"{re.escape(prefix)} is of another network"):
        run.restore(here, prefix)
    assert_same(values(here), before)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 10]


def flipped(at: float) -> Callable[[bytes], bytes]:
    """One bit is another."""

    def flip(data):
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return flip


DAMAGES = {
    "index, empty": (".index", lambda data: b""),
    "index, truncated": (".index", truncated),
    "index, garbage": (".index", lambda data: os.urandom(len(data))),
    "index, a bit": (".index", flipped(0.5)),
    "data, empty": (".data-00000-of-00001", lambda data: b""),
    "data, truncated": (".data-00000-of-00001", truncated),
    "data, the first bit": (".data-00000-of-00001", flipped(0)),
    "data, a bit": (".data-00000-of-00001", flipped(0.1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(run, damage, capsys):
    """Every number is checked when it is read. The one before is used, aloud; one that is asked for is not replaced."""
    before = line_model()
    expected = filled(before, seed=1, step=100)
    run.validation = runs.Validation(50, 40, 0.5, 200)
    earlier = run.save(before)
    run.validation = runs.Validation(150, 150, 0.7, 200)
    prefix = run.save(line_model_at(200))
    ending, spoil = DAMAGES[damage]
    path = Path(prefix + ending)
    path.write_bytes(spoil(path.read_bytes()))

    message = rf"checkpoint {re.escape(prefix)} is damaged \(.+\): delete it, or test another"
    with pytest.raises(InputError, match=message):
        run.restore(line_model(), prefix)
    restored = line_model()
    assert run.restore_newest(restored) == earlier
    assert_same(values(restored), expected)
    assert run.validation.best == 40
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"WARNING: {message}\. The one before it is taken\.", line)


def test_no_checkpoint_can_be_read(run):
    for step in (1, 2):
        os.truncate(run.save(line_model_at(step)) + ".index", 40)
    with pytest.raises(InputError, match=r"none of the checkpoints in .*run can be read: delete them to begin anew"):
        run.restore_newest(line_model())
    assert run.best() == runs.Validation()


def test_moments_of_another_shape(run):
    """A stranger's file: weights as they should be, the optimizer's not."""
    maml = line_model_at(100)
    maml.meta_optimizer.m["w1"] = tf.Variable(np.zeros([7, 7], np.float32))
    with pytest.raises(InputError, match="is damaged"):
        run.restore(line_model(), run.save(maml))


@pytest.mark.parametrize("spoilt", ["weights", "meta_optimizer", "pretrain_optimizer"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_not_saved(run, spoilt, value):
    maml = line_model_at(100)
    prefix = run.save(maml)
    maml.step.assign(200)
    spoil = maml.weights if spoilt == "weights" else getattr(maml, spoilt).v
    spoil["b2"].assign([value])
    with pytest.raises(InputError, match=rf"diverged, after iteration 199 .* \({prefix} is from before that\): try a"):
        run.save(maml)
    assert run.iterations() == [99]


def test_a_disk_that_takes_no_more(run):
    """As where it is full: the system refuses to let files grow. What is there stays, and later the save succeeds."""
    expected = filled(maml := line_model(hidden=(40, 40)), seed=1, step=100)
    run.save(maml)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        maml.step.assign(200)
        with pytest.raises(InputError, match=r"cannot write to .*run \(File too large\): make room there"):
            run.save(maml)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    restored = line_model(hidden=(40, 40))
    run.restore_newest(restored)
    assert_same(values(restored), expected)
    assert run.save(maml) == run.checkpoint()
    assert sorted(path.name for path in run.folder.glob(".*")) == []


def test_the_best_stays_beside_the_ten_latest(run):
    for step in range(1, 16):
        run.validation = run.validation.then(step - 1, 0.9 if step == 3 else 0.5, 200)
        run.save(line_model_at(step))
    assert run.iterations() == [2, *range(5, 15)]
    assert run.checkpoint("best") == str(run.folder / "model2")
    again = runs.Run(run.folder)
    assert again.best() == run.validation == (14, 2, 0.9, 200)
    again.restore_newest(line_model())
    assert again.validation == run.validation


def test_which_is_best():
    """The first of equals; and accuracies on different numbers of tasks are not compared."""
    found = runs.Validation().then(500, 0.3, 200).then(1000, 0.5, 200).then(1500, 0.5, 200).then(2000, 0.4, 200)
    assert found == (2000, 1000, 0.5, 200)
    assert found.then(2500, 0.45, 20) == (2500, 2500, 0.45, 20)
    assert found.then(2500, -math.inf, 20) == (2500, 1000, 0.5, 200)


def test_no_best_without_validation(run):
    run.save(line_model_at(100))
    with pytest.raises(InputError, match=r"--test_iter=best, but .*run has no validation yet .*: give an iteration"):
        run.checkpoint("best")


def write_as_before(maml: MAML, run: runs.Run, **more: tf.Variable) -> None:
    """Write a checkpoint as our program did until November 2026, with tf.train.Checkpoint."""
    tf.train.Checkpoint(
        weights=maml.weights,
        meta_optimizer=maml.meta_optimizer,
        pretrain_optimizer=maml.pretrain_optimizer,
        step=maml.step,
        **more,
    ).write(run.prefix(int(maml.step) - 1))


def test_an_older_checkpoint_restores_to_the_same_bits(run):
    maml = line_model("batch_norm")
    expected = filled(maml, seed=1, step=1001)
    write_as_before(maml, run, validation=tf.Variable(runs.Validation(1000, 500, 0.5, 20), dtype=tf.float64))
    restored = line_model("batch_norm")
    assert run.restore_newest(restored) == run.prefix(1000)
    assert_same(values(restored), expected)
    assert run.validation == runs.Validation(1000, 500, 0.5, 20)
    with pytest.raises(InputError, match="is of another network"):
        run.restore(line_model("layer_norm"), run.prefix(1000))


def test_the_oldest_checkpoints_have_no_validation(run):
    maml = line_model()
    filled(maml, seed=1, step=1001)
    write_as_before(maml, run)
    run.restore_newest(line_model())
    assert run.validation == runs.Validation(last=1000)  # that of iteration 1000 was done


def test_a_folder_in_use(run):
    with run.locked():
        with pytest.raises(InputError, match=r"run is in use, another process trains in it: stop that one, or give"):
            claim(runs.Run(run.folder), FLAGS)
        run.save(line_model_at(1))
        assert runs.Run(run.folder).restore_newest(line_model()) == run.prefix(0)  # to test is allowed
    (run.folder / "model0.index").unlink()
    claim(runs.Run(run.folder), FLAGS)  # and again when the other process has ended


def test_a_disk_without_locks(run, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    claim(run, FLAGS)
    assert "cannot be locked (Function not implemented): see that no other process trains" in capsys.readouterr().out


# -- the original's checkpoints ---------------------------------------------------------------------------------------

CONV = ("conv1", "conv2", "conv3", "conv4", "w5", "b5")
VARIABLES = ("Variable", *(f"Variable_{i}" for i in range(1, 10)))
# Our name -> that of the original's released checkpoint.
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
    """Writes model<iteration> with these variables and nothing else, as TensorFlow 1's Saver does."""
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
    """A model, and random weights for it under our names and under the original's."""
    build, norm, names = ORIGINALS[request.param]
    maml = build(norm=norm)
    assert names.keys() == maml.weights.keys()
    random = np.random.default_rng(3)
    weights = {name: random.normal(size=weight.shape).astype(np.float32) for name, weight in maml.weights.items()}
    return maml, weights, {names[name]: value for name, value in weights.items()}


def test_the_originals_checkpoint(run, original):
    maml, weights, tensors = original
    save_as_the_original(run, 59000, tensors)
    assert run.iterations() == [59000]  # found by its file name: there is no `checkpoint` file
    run.restore(maml, run.checkpoint(59000))
    for name, value in weights.items():
        np.testing.assert_array_equal(maml.weights[name], value)


@pytest.mark.parametrize("fault", ["missing", "too many", "shape"])
def test_a_checkpoint_of_the_original_that_is_not_of_this_network(run, original, fault):
    maml, _, tensors = original
    if fault == "missing":
        del tensors["model/Variable_2"]
    elif fault == "shape":
        tensors["model/Variable_2"] = np.zeros([7, 7])
    else:
        tensors["model/more"] = np.zeros(2)
    prefix = save_as_the_original(run, 59000, tensors)
    before = values(maml)
    with pytest.raises(InputError, match=re.escape(prefix)):
        run.restore(maml, prefix)
    assert_same(values(maml), before)


# -- results ----------------------------------------------------------------------------------------------------------

ENTRY = {"data_set": "omniglot", "split": "test", "support_examples_a_class_K": 1, "checkpoint": "model59999"}
ACCURACIES = np.array([[0.2, 0.4, 0.6], [0.2, 0.8, 1.0], [0.2, 0.6, 0.2], [0.2, 0.2, 0.8]])


def test_the_originals_files(tmp_path):
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


def test_results_in_plain_words(tmp_path):
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


def test_a_diverged_task_leaves_json_that_any_reader_takes(tmp_path):
    values = ACCURACIES.copy()
    values[0, 2] = np.inf
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", values, ENTRY, {}, ())
    (entry,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert entry["results"][2]["mean"] is None
    assert entry["results"][2]["median"] == pytest.approx(0.9)
    assert entry["results"][1]["mean"] == pytest.approx(0.5)


def test_results_replace_their_own_entry_alone(tmp_path):
    others = [ENTRY | {"split": "val"}, ENTRY | {"checkpoint": "model999"}, ENTRY | {"support_examples_a_class_K": 5}]
    # A test at its defaults has none of these keys, and is another test all the same.
    others += [ENTRY | {"updates_at_test": 5}, ENTRY | {"query_shares": "dirichlet"}]
    others += [ENTRY | {"query_normalised_with": "support"}]
    for entry in (others[0], ENTRY, *others[1:]):
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, entry, {}, ())
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES / 2, ENTRY, {}, ())
    found = json.loads((tmp_path / "results.json").read_text())
    means = [entry.pop("results")[2]["mean"] for entry in found]
    assert found == [*others, ENTRY]
    assert means == pytest.approx([0.65] * 6 + [0.325])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "test_ubs1_stepsize0.4.csv",
        "test_ubs1_stepsize0.4.pkl",
    }


@pytest.mark.parametrize("damaged", ["", '[{"data_set"', '{"data_set": "omniglot"}', "[[1]]", "[" * 100_000])
def test_damaged_results_are_not_overwritten(tmp_path, damaged):
    (tmp_path / "results.json").write_text(damaged)
    with pytest.raises(InputError, match=r"results\.json is damaged .*: move it away, or give another --results_dir"):
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, {}, ())
    assert (tmp_path / "results.json").read_text() == damaged
    assert (tmp_path / "test_ubs1_stepsize0.4.csv").exists()  # the test was not in vain


def test_what_more_training_changes_tells_no_entries_apart(tmp_path):
    for best in (True, False):
        known = {"best_on_validation": best}
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, known, ())
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert entry["best_on_validation"] is False


def test_results_of_two_tests_at_once(tmp_path):
    """Each process adds its entry to what the other wrote."""

    def write(process):
        for i in range(20):
            runs.write_results(tmp_path, f"test{process}", ACCURACIES, ENTRY | {"task_seed": (process, i)}, {}, ())

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    assert len(json.loads((tmp_path / "results.json").read_text())) == 40
