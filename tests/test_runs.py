"""The run folder: its name, whose it is, whole checkpoints only, the original's checkpoints, events and results."""

import csv
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import networks
import runs
from maml import MAML
from utils import InputError, accuracy, mse

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
    "num_query": -1,
    "seed": 0,
    "image_size": None,
    "image_channels": None,
}
OMNIGLOT = FLAGS | {"datasource": "omniglot", "meta_batch_size": 32, "update_batch_size": 1, "update_lr": 0.4}
OMNIGLOT |= {"norm": "batch_norm"}


def line_model(norm: str | None = None, hidden: tuple[int, ...] = (3,)) -> MAML:
    return MAML(networks.fc(1, hidden, 1, norm=norm), mse, inner_lr=0.01, inner_steps=1)


def image_model(filters: int = 4, norm: str | None = "batch_norm") -> MAML:
    network = networks.conv4((28, 28), 1, 5, filters, max_pool=False, norm=norm, mean_head=True)
    return MAML(network, mse, accuracy, inner_lr=0.4, inner_steps=1)


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path) -> runs.Run:
    folder = tmp_path / "run"
    folder.mkdir()
    return runs.Run(folder)


# -- the name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        # The original's (SEMANTICS, section 6).
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
    assert runs.run_name(flags) == name


# -- whose it is ------------------------------------------------------------------------------------------------------


def test_claim_makes_the_folder_and_records_the_flags(tmp_path):
    run = runs.Run(tmp_path / "logs" / "sine" / "run")
    run.claim(FLAGS, resume=True)
    assert json.loads((run.folder / "flags.json").read_text()) == FLAGS


def test_claim_of_the_same_run_with_more_iterations(run):
    run.claim(FLAGS, resume=True)
    run.save(line_model_at(70000))
    run.claim(FLAGS | {"metatrain_iterations": 90000}, resume=True)
    assert json.loads((run.folder / "flags.json").read_text())["metatrain_iterations"] == 90000


def test_claim_lists_the_flags_of_another_run(run):
    run.claim(FLAGS, resume=True)
    run.save(line_model_at(100))
    before = contents(run.folder)
    with pytest.raises(InputError) as error:
        run.claim(FLAGS | {"num_query": 3, "datasource": "omniglot", "metatrain_iterations": 7}, resume=True)
    assert str(run.folder) in str(error.value)
    assert "--num_query=-1 there, 3 here" in str(error.value)
    assert "--datasource=sinusoid there, omniglot here" in str(error.value)
    assert "iterations" not in str(error.value)
    assert contents(run.folder) == before


@pytest.mark.parametrize("name", sorted(FLAGS.keys() - {"pretrain_iterations", "metatrain_iterations"}))
def test_every_flag_tells_runs_apart(run, name):
    run.claim(FLAGS, resume=True)
    run.save(line_model_at(100))
    with pytest.raises(InputError, match=f"--{name}={FLAGS[name]} there, another here"):
        run.claim(FLAGS | {name: "another"}, resume=True)


def test_a_folder_without_checkpoints_is_nobodys(run):
    run.claim(FLAGS, resume=True)  # a run that was killed before its first checkpoint
    run.claim(OMNIGLOT, resume=False)
    assert json.loads((run.folder / "flags.json").read_text()) == OMNIGLOT


def test_resume_false_overwrites_nothing(run):
    run.claim(FLAGS, resume=True)
    run.save(line_model_at(100))
    before = contents(run.folder)
    with pytest.raises(InputError, match="holds a run up to model99, and --resume=False would overwrite it"):
        run.claim(FLAGS, resume=False)
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

    run.claim(flags(recorded), resume=True)
    run.save(line_model_at(done))
    if allowed:
        run.claim(flags(now), resume=True)
    else:
        with pytest.raises(InputError, match=rf"\(--pretrain_iterations={recorded[0]} there, {now[0]} here\)"):
            run.claim(flags(now), resume=True)
    run.check_flags(flags(now), training=False)  # a test changes nothing


def test_a_folder_without_a_record_is_tested_not_trained(run):
    run.save(line_model_at(60000))
    before = contents(run.folder)
    with pytest.raises(InputError, match=r"can be tested but not trained further: give another --logdir"):
        run.claim(FLAGS, resume=True)
    assert contents(run.folder) == before
    run.check_flags(FLAGS, training=False)


@pytest.mark.parametrize("record", ["", '{"datasource": ', '["sinusoid"]', "7"])
def test_a_damaged_record(run, record):
    run.save(line_model_at(100))
    (run.folder / "flags.json").write_text(record)
    with pytest.raises(InputError, match=r"flags\.json is damaged .* give another --logdir"):
        run.claim(FLAGS, resume=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write to .*file/run \(.+\): give another --logdir"):
        runs.Run(tmp_path / "file" / "run").claim(FLAGS, resume=True)
    assert (tmp_path / "file").read_text() == "mine"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def line_model_at(step: int) -> MAML:
    maml = line_model()
    maml.step.assign(step)
    return maml


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


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        (line_model(hidden=(3,)), line_model(hidden=(4,)), r"weights/b1/\S* has shape \[3\] there, \[4\] here"),
        (line_model(), line_model(norm="layer_norm"), r"weights/beta1/\S* has shape none there, \[3\] here"),
        (line_model(norm="batch_norm"), line_model(), r"weights/beta1/\S* has shape \[3\] there, none here"),
        (line_model(), image_model(), r"weights/b1/\S* has shape \[3\] there, \[4\] here"),
        (line_model(), line_model(hidden=(3, 3)), r"weights/b2/\S* has shape \[1\] there, \[3\] here"),
    ],
)
def test_the_checkpoint_of_another_network(run, saved, here, message):
    saved.step.assign(1)
    prefix = run.save(saved)
    before = values(here)
    with pytest.raises(InputError, match=rf"{re.escape(prefix)} is of another network: {message}; give the flags"):
        run.restore(here, prefix)
    assert_same(values(here), before)


@pytest.mark.parametrize(("ending", "size"), [(".index", 0), (".index", 40), (".data-00000-of-00001", 20)])
def test_a_damaged_checkpoint(run, ending, size):
    prefix = run.save(line_model_at(100))
    os.truncate(prefix + ending, size)
    with pytest.raises(InputError, match=rf"cannot read checkpoint {re.escape(prefix)} \(.+\): delete it to go on"):
        run.restore(line_model(), prefix)


# -- the original's checkpoints ---------------------------------------------------------------------------------------

CONV = ("conv1", "conv2", "conv3", "conv4", "w5", "b5")
VARIABLES = ("Variable", *(f"Variable_{i}" for i in range(1, 10)))
# Our name -> the original's (SEMANTICS, sections 3 and 6).
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
    name = "model/Variable_2"
    if fault == "missing":
        expected = rf"{name} has shape none there, \[.*\] here"
        del tensors[name]
    elif fault == "shape":
        expected = rf"{name} has shape \[7, 7\] there, \[.*\] here"
        tensors[name] = np.zeros([7, 7])
    else:
        expected = r"model/more has shape \[2\] there, none here"
        tensors["model/more"] = np.zeros(2)
    prefix = save_as_the_original(run, 59000, tensors)
    before = values(maml)
    with pytest.raises(InputError, match=expected):
        run.restore(maml, prefix)
    assert_same(values(maml), before)


# -- events -----------------------------------------------------------------------------------------------------------


def write_events(run: runs.Run, start: int, steps: list[int], value: float) -> None:
    writer = run.events(start)
    with writer.as_default():
        for step in steps:
            tf.summary.scalar("loss", value, step=step)
    writer.close()


def read_events(run: runs.Run) -> list[tuple[int, float]]:
    """(step, value) in the order in which TensorBoard reads a folder: by file name."""
    found = []
    # Numbers as numbers: by name alone, the tenth file that one process makes within a second precedes the second.
    paths = sorted(run.folder.glob("*tfevents*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            found += [(event.step, float(tf.make_ndarray(value.tensor).item())) for value in event.summary.value]
    return found


def test_events_of_a_resumed_run_replace_those_past_its_checkpoint(run):
    write_events(run, 0, [0, 100, 200, 300], value=1)
    write_events(run, 201, [300, 400], value=2)
    write_events(run, 301, [400, 500], value=3)
    assert read_events(run) == [(0, 1), (100, 1), (200, 1), (300, 2), (400, 3), (500, 3)]


def test_events_of_another_beginning_all_go(run):
    write_events(run, 0, [0, 100], value=1)
    write_events(run, 0, [0], value=2)
    assert read_events(run) == [(0, 2)]


def test_events_that_stay_are_not_rewritten(run):
    write_events(run, 0, [0, 100], value=1)
    (path,) = run.folder.iterdir()
    before = path.stat()
    write_events(run, 101, [200], value=2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(list(run.folder.iterdir())) == 2


@pytest.mark.parametrize("cut", [1, 5, 30, "all but 1", "all but 9", "all but 12"])
def test_a_kill_cuts_the_last_event(run, cut):
    """The last record is cut by some bytes, down to a part of its 12 bytes of length and checksum."""
    write_events(run, 0, [0, 100], value=1)
    (path,) = run.folder.iterdir()
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(last_record(path))
    cut = cut if isinstance(cut, int) else path.stat().st_size - whole - int(cut.split()[-1])
    os.truncate(path, path.stat().st_size - cut)
    write_events(run, 101, [200], value=2)
    assert read_events(run) == [(0, 1), (100, 1), (200, 2)]


def last_record(path: Path) -> bytes:
    """Length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data = path.read_bytes()
    while True:
        size = 16 + int.from_bytes(data[:8], "little")
        if size == len(data):
            return data
        data = data[size:]


# -- results ----------------------------------------------------------------------------------------------------------

ENTRY = {"data_set": "omniglot", "split": "test", "support_examples_a_class_K": 1, "checkpoint": "model59999"}
ACCURACIES = np.array([[0.2, 0.4, 0.6], [0.2, 0.8, 1.0], [0.2, 0.6, 0.2], [0.2, 0.2, 0.8]])


def test_the_originals_files(tmp_path):
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, (2,))
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
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, (1,))
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
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", values, ENTRY, ())
    (entry,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert entry["results"][2]["mean"] is None
    assert entry["results"][2]["median"] == pytest.approx(0.9)
    assert entry["results"][1]["mean"] == pytest.approx(0.5)


def test_results_replace_their_own_entry_alone(tmp_path):
    others = [ENTRY | {"split": "val"}, ENTRY | {"checkpoint": "model999"}, ENTRY | {"support_examples_a_class_K": 5}]
    for entry in (others[0], ENTRY, *others[1:]):
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, entry, ())
    runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES / 2, ENTRY, ())
    found = json.loads((tmp_path / "results.json").read_text())
    assert [{name: entry[name] for name in ENTRY} for entry in found] == [*others, ENTRY]
    assert [entry["results"][2]["mean"] for entry in found] == pytest.approx([0.65, 0.65, 0.65, 0.325])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "test_ubs1_stepsize0.4.csv",
        "test_ubs1_stepsize0.4.pkl",
    }


@pytest.mark.parametrize("damaged", ["", '[{"data_set"', '{"data_set": "omniglot"}'])
def test_damaged_results_are_not_overwritten(tmp_path, damaged):
    (tmp_path / "results.json").write_text(damaged)
    with pytest.raises(InputError, match=r"results\.json is damaged .*: delete it, or give another --results_dir"):
        runs.write_results(tmp_path, "test_ubs1_stepsize0.4", ACCURACIES, ENTRY, ())
    assert (tmp_path / "results.json").read_text() == damaged
