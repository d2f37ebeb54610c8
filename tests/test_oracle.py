"""Parity with the original's own graph, on the weights, tasks and numbers that oracle/record.py recorded from it.

oracle/README.md describes the records. Larger records in ../shared/oracle are tested too if they exist.

Tolerances: float32 programs that sum in different orders differ by about 1e-6 in losses and outputs, and by more after
many updates. Meta-gradients differ by 1e-7 to 1e-5 after one update. If rounding flips a ReLU or a maximum, a task's
meta-gradient jumps, by 1e-4 to 1e-2 after five updates, in either program. So ours in float64, where rounding flips
nothing, judges both: in half of a record's tasks, ours in float32 must be as close to it as the record, within FACTOR.
Bounds on outer steps are wide, because Adam's first steps are as large as its learning rate however small the gradient,
so rounding moves weights whose gradients are small.
"""

import functools
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import networks
import recipe
import runs
from maml import MAML, query_loss
from recipe import DATASETS
from tests.conftest import SHARED
from tests.helpers import trajectory
from utils import Tasks

ORACLE = Path(__file__).parent / "oracle"
RECORDS = sorted(path for path in ORACLE.glob("*.npz") if not path.stem.startswith("stock_"))
SHARED_RECORDS = sorted((SHARED / "oracle").glob("*.npz"))

LOSSES, ACCURACIES = 1e-4, 1e-6  # maximum differences from the record, relative and absolute
# Maximum relative L2 distance of a task's meta-gradient from float64, in half of the tasks.
CLOSE = 1e-3  # for the record
FACTOR, ROUNDING = 10, 1e-5  # for ours: FACTOR times the larger of the record's distance and ROUNDING


def tolerances(flags: dict) -> tuple[float, float]:
    """Return the allowed relative L2 distances from the record: meta-gradient, and change by the outer steps."""
    if flags["datasource"] == "sinusoid":
        return 1e-5, 1e-4
    if flags["datasource"] == "omniglot" and flags["num_updates"] < 5:
        return 1e-4, 2e-2
    return 3e-2, 0.3  # with this many outputs, rounding may flip a ReLU, and every update magnifies the change


def build(flags: dict) -> MAML:
    """Build the model of a record's flags, which have the original's names."""
    norm = None if flags["norm"] == "None" else flags["norm"]
    return recipe.build(recipe.from_flags(flags | {"norm": norm}))


class Record:
    """A recorded file: its tasks, and our model with its flags and weights."""

    def __init__(self, path: Path):
        self.name, self.arrays = path.stem, dict(np.load(path))
        self.flags = flags = json.loads(str(self.arrays.pop("flags")))
        images = DATASETS[flags["datasource"]].images
        if images is None:
            support_x, query_x = self.arrays["inputa"], self.arrays["inputb"]
        else:
            support_x, query_x = (
                self.arrays[name].astype(np.float32) / 255 for name in ("inputa_uint8", "inputb_uint8")
            )
            if images.invert:
                support_x, query_x = 1 - support_x, 1 - query_x
        self.tasks = Tasks(support_x, self.arrays["labela"], query_x, self.arrays["labelb"])
        self.pretrains = flags["metatrain_iterations"] == 0
        self.updates = max(flags["num_updates"], flags["test_num_updates"])
        self.maml = build(flags)
        for name, weight in self.maml.weights.items():
            weight.assign(self.recorded("weights", name))
        # Under batch norm the gradient of a hidden layer's bias is exactly zero; the record holds its rounding noise.
        hidden_biases = [f"b{layer}" for layer in range(1, 5)] if flags["norm"] == "batch_norm" else []
        self.compared = [name for name in self.maml.weights if name not in hidden_biases]

    @functools.cached_property
    def task_meta_gradients(self) -> dict[str, np.ndarray]:
        """Our meta-gradient of each task, [T, ...] by name."""
        return task_meta_gradients(self.maml, self.tasks)

    def recorded(self, kind: str, name: str) -> np.ndarray | None:
        return self.arrays.get(f"{kind}/{self.maml.keys[name]}")

    def in_float64(self) -> tuple[MAML, Tasks]:
        """Return the same model, weights and tasks in float64."""
        maml = self.maml
        weights = {name: tf.cast(weight, tf.float64) for name, weight in maml.weights.items()}
        network = maml.inner.network._replace(init=lambda seed: weights)
        maml = MAML(maml.inner._replace(network=network), layout=maml.layout)
        return maml, Tasks(*(part.astype(np.float64) for part in self.tasks))


def ids(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.stem}"


@pytest.fixture(scope="module", params=RECORDS + SHARED_RECORDS, ids=ids)
def record(request) -> Record:
    return Record(request.param)


def relative(value, expected) -> float:
    return float(np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30))


def task_meta_gradients(maml: MAML, tasks: Tasks) -> dict[str, np.ndarray]:
    """Return the meta-gradient of each task, [T, ...] by name. Runs eagerly: tracing costs more for a few tasks."""
    weights = {name: tf.convert_to_tensor(weight) for name, weight in maml.weights.items()}
    each = []
    for task in each_task(tasks):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = query_loss(maml.inner, weights, task)
        each.append(tape.gradient(loss, weights, unconnected_gradients="zero"))
    return {name: np.stack([gradient[name] for gradient in each]) for name in weights}


def each_task(tasks: Tasks) -> list[Tasks]:
    return [Tasks(*map(tf.constant, parts)) for parts in zip(*tasks, strict=True)]


def lower_median(errors: list[float]) -> float:
    """Return the median; of an even number, the lower of the middle two."""
    return float(np.quantile(errors, 0.5, method="lower"))


def distances(record: Record) -> dict[str, tuple[float, float]]:
    """Return, per weight, the relative L2 distances of ours and the record from float64, in half of the tasks."""
    exact = task_meta_gradients(*record.in_float64())

    def distance(gradients, name):
        return lower_median([relative(*pair) for pair in zip(gradients, exact[name], strict=True)])

    return {
        name: (
            distance(record.task_meta_gradients[name], name),
            distance(record.recorded("task_meta_gradient", name), name),
        )
        for name in record.compared
    }


def curve_errors(record: Record) -> tuple[float, float]:
    """Return the largest relative difference of a loss and the largest difference of an accuracy from the record."""
    arrays = record.arrays
    curve = record.maml.evaluate(record.tasks, record.updates)
    losses = np.array([arrays["total_loss1"], *arrays["total_losses2"]])
    of_losses = np.max(np.abs(np.mean(curve.losses, 0) / losses - 1))
    if "total_accuracy1" not in arrays:
        return float(of_losses), 0.0
    accuracies = np.array([arrays["total_accuracy1"], *arrays["total_accuracies2"]])
    return float(of_losses), float(np.max(np.abs(np.mean(curve.accuracies, 0) - accuracies)))


def check_curve(record: Record):
    of_losses, of_accuracies = curve_errors(record)
    assert of_losses < LOSSES and of_accuracies < ACCURACIES


def meta_gradient_errors(record: Record) -> dict[str, float]:
    """Return relative L2 distances from the record, per weight: in half of the tasks, or of the mean if only it exists.

    The median over tasks is robust: on another processor, rounding may flip a ReLU in one task, which shifts the mean.
    """
    errors = {}
    for name, ours in record.task_meta_gradients.items():
        each = record.recorded("task_meta_gradient", name)
        if name not in record.compared:
            assert not ours.any(), name
        elif each is None:
            errors[name] = relative(np.mean(ours, 0), record.recorded("meta_gradient", name))
        else:
            errors[name] = lower_median([relative(*pair) for pair in zip(ours, each, strict=True)])
    return errors


def check_meta_gradient(record: Record):
    tolerance, _ = tolerances(record.flags)
    errors = meta_gradient_errors(record)
    assert max(errors.values()) < tolerance, errors


def check_against_float64(record: Record):
    measured = distances(record)
    ours, recorded = np.max(list(measured.values()), 0)
    print(f"{record.name}: largest distance of a weight from float64: ours {ours:.1e}, the record's {recorded:.1e}")
    for name, (ours, recorded) in measured.items():
        assert recorded < CLOSE, (name, recorded)
        assert ours < FACTOR * max(recorded, ROUNDING), (name, ours, recorded)


def test_losses_and_accuracies_equal_the_record(record):
    check_curve(record)


def test_network_outputs_equal_the_record(record):
    maml, arrays = record.maml, record.arrays
    weights = {name: tf.convert_to_tensor(weight) for name, weight in maml.weights.items()}
    for i, task in enumerate(each_task(record.tasks)):
        before, *after = trajectory(maml.inner, weights, task, record.updates)
        assert relative(maml.inner.network.apply(before, task.support_x), arrays["outputas"][i]) < 1e-4
        query = [maml.inner.network.apply(adapted, task.query_x) for adapted in after]
        assert relative(np.stack(query), arrays["outputbs"][:, i]) < 1e-4


META_TRAINING = [path for path in RECORDS + SHARED_RECORDS if "pretrain" not in path.stem]


@pytest.mark.parametrize("record", META_TRAINING, ids=ids, indirect=True)
def test_meta_gradient_equals_the_record(record):
    check_meta_gradient(record)


@pytest.mark.parametrize("record", [path for path in META_TRAINING if path in RECORDS], ids=ids, indirect=True)
def test_meta_gradient_is_as_close_to_float64_as_the_record(record):
    check_against_float64(record)


def test_outer_steps_equal_the_record(record):  # the last test of a record, because it changes the weights
    maml, arrays, (of_gradient, tolerance) = record.maml, record.arrays, tolerances(record.flags)
    step = maml.pretrain_step if record.pretrains else maml.train_step
    for i in range(int(arrays["steps"])):
        loss, norm = step(record.tasks)
        if i == 0 and not record.pretrains:
            np.testing.assert_allclose(loss, arrays["total_losses2"][record.flags["num_updates"] - 1], rtol=1e-4)
            gradient = [record.recorded("meta_gradient", name) for name in record.compared]
            expected = np.sqrt(sum(np.sum(np.square(value)) for value in gradient))
            np.testing.assert_allclose(norm, expected, rtol=min(10 * of_gradient, 3e-2))
    for name in record.compared:
        before, after = record.recorded("weights", name), record.recorded("after", name)
        assert relative(maml.weights[name].numpy() - before, after - before) < tolerance, name


@pytest.mark.parametrize("stock, off", [("moments", 0.05), ("fused", 0.5)])
def test_the_uncorrected_original_fails_the_comparison(stock, off):
    """Its losses are right. Its second derivatives are wrong, which only the meta-gradient shows."""
    record = Record(ORACLE / f"stock_{stock}_omniglot_5way_1shot.npz")
    check_curve(record)
    for check in (check_meta_gradient, check_against_float64):
        with pytest.raises(AssertionError):
            check(record)
    errors = meta_gradient_errors(record)
    assert min(errors[f"conv{layer}"] for layer in range(1, 5)) > off


@pytest.mark.parametrize("record", [SHARED / "oracle" / "miniimagenet_5way_1shot_test.npz"], ids=ids, indirect=True)
def test_released_checkpoint_is_the_recorded_model(record, shared):
    """The checkpoint reader returns the weights of the authors' released model bit for bit."""
    (folder,) = (shared / "data" / "maml_checkpoint").iterdir()
    run = runs.Run(folder)
    run.restore(record.maml, run.checkpoint(59000))
    for name, weight in record.maml.weights.items():
        np.testing.assert_array_equal(weight.numpy(), record.recorded("weights", name))
    assert sum(weight.numpy().size for weight in record.maml.weights.values()) == 32_773
    check_curve(record)


def test_parameter_counts_equal_the_original():
    """Counts of adapted weights, and of weights that only the outer loop changes."""
    conv = functools.partial(networks.conv4, norm="batch_norm")
    counts = {
        (32_645, 128): conv((84, 84), 3, 5, 32, max_pool=True, mean_head=False),
        (111_749, 256): conv((28, 28), 1, 5, 64, max_pool=False, mean_head=True),
        (112_724, 256): conv((28, 28), 1, 20, 64, max_pool=False, mean_head=True),
        (246_597, 512): networks.NETWORKS["no_conv"]((28, 28, 1), 5, "batch_norm", 64, False),
        (1_761, 0): networks.NETWORKS["sinusoid"]((1,), 1, None, 64, False),
        (1_841, 0): networks.NETWORKS["sinusoid"]((3,), 1, None, 64, False),
    }
    for (adapted, meta_only), network in counts.items():
        sizes = {name: math.prod(value.shape) for name, value in network.init(0).items()}
        assert sum(sizes[name] for name in network.adapted) == adapted
        assert sum(sizes.values()) == adapted + meta_only


@pytest.fixture(scope="module")
def recorder():
    """Import oracle/record.py, without TensorFlow 1.15."""
    spec = importlib.util.spec_from_file_location("record", ORACLE / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_record_files_match_record_py(recorder):
    assert [path.stem for path in RECORDS] == sorted(recorder.RECORDS)
    for path in RECORDS:
        with np.load(path) as arrays:
            flags = json.loads(str(arrays["flags"]))
            assert flags.items() >= recorder.RECORDS[path.stem].items()
            assert (str(arrays["norms"]), int(arrays["steps"])) == ("exact", recorder.OUTER_STEPS)
    assert len(SHARED_RECORDS) in (0, 8)  # all of ../shared/oracle or none


def test_record_py_reports_missing_requirements_in_one_line(recorder, tmp_path):
    command = [sys.executable, ORACLE / "record.py", f"--original={tmp_path}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1
    assert "TensorFlow 1.15.5" in done.stderr and "requirements-record.txt" in done.stderr
    with pytest.raises(SystemExit, match=r"--original: .*maml.py"):
        recorder.import_original(tmp_path)
    (tmp_path / "maml.py").write_text("changed")
    with pytest.raises(SystemExit, match=r"--original: .*maml.py .*a7f45f1"):
        recorder.import_original(tmp_path)
