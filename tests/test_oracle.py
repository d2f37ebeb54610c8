"""Parity with the original's own graph, on the weights, inputs and numbers recorded from it (../shared/oracle).

The sinusoid's 10-shot record also lies in tests/data, so that anybody can check parity.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import networks
import recipe
import runs
from data_generator import DATASETS
from maml import MAML
from utils import Tasks

SINUSOID = Path(__file__).parent / "data" / "sinusoid_10shot.npz"
RECORDS = (
    "sinusoid_10shot",
    "sinusoid_stopgrad",
    "sinusoid_oracle_pretrain",
    "omniglot_5way_1shot",
    "omniglot_fc",
    "omniglot_layernorm",
    "miniimagenet_5way_1shot",
    "miniimagenet_5way_1shot_test",
)
# Relative L2 per tensor: of the meta-gradient, and of (after - before) the recorded outer steps. Two correct float32
# programs differ by up to 2e-2 and 0.1 on MiniImagenet, where rounding tips a ReLU or a maximum over.
TOLERANCES = {"sinusoid": (1e-5, 1e-4), "omniglot": (1e-4, 2e-2), "miniimagenet": (3e-2, 0.15)}


class Record:
    """One recorded file: the model built from its flags with its weights, and its tasks."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path))
        self.flags = flags = json.loads(str(self.arrays.pop("flags")))
        dataset = DATASETS[flags["datasource"]]
        if dataset.images is None:
            support_x, query_x = self.arrays["inputa"], self.arrays["inputb"]
        else:
            support_x, query_x = (
                self.arrays[name].astype(np.float32) / 255 for name in ("inputa_uint8", "inputb_uint8")
            )
            if dataset.images.invert:
                support_x, query_x = 1 - support_x, 1 - query_x
        self.tasks = Tasks(support_x, self.arrays["labela"], query_x, self.arrays["labelb"])
        norm = None if flags["norm"] == "None" else flags["norm"]
        self.maml = recipe.build(recipe.from_flags(flags | {"norm": norm}))
        for name, weight in self.maml.weights.items():
            weight.assign(self.recorded("weights", name))
        # Under batch norm the gradient of a hidden layer's bias is exactly zero; the record holds its rounding noise.
        hidden_biases = [f"b{layer}" for layer in range(1, 5)] if norm == "batch_norm" else []
        self.compared = [name for name in self.maml.weights if name not in hidden_biases]

    def recorded(self, kind: str, name: str) -> np.ndarray | None:
        return self.arrays.get(f"{kind}/{self.maml.network.tf1_names[name]}")


@pytest.fixture(scope="module", params=RECORDS)
def record(request, shared) -> Record:
    return Record(shared / "oracle" / f"{request.param}.npz")


def relative(value, expected) -> float:
    return float(np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30))


def meta_gradient(maml: MAML, tasks: Tasks) -> dict[str, np.ndarray]:
    gradient, _ = tf.function(lambda tasks: maml.mean_gradient(maml.query_loss, tasks), autograph=False)(tasks)
    return {name: value.numpy() for name, value in gradient.items()}


def check_curve(record: Record):
    arrays, updates = record.arrays, max(record.flags["num_updates"], record.flags["test_num_updates"])
    curve = record.maml.evaluate(record.tasks, updates)
    losses = [arrays["total_loss1"], *arrays["total_losses2"]]
    np.testing.assert_allclose(np.mean(curve.losses, 0), losses, rtol=1e-4)
    if "total_accuracy1" in arrays:
        accuracies = [arrays["total_accuracy1"], *arrays["total_accuracies2"]]
        np.testing.assert_allclose(np.mean(curve.accuracies, 0), accuracies, rtol=1e-6)


def check_meta_gradient(record: Record):
    tolerance, _ = TOLERANCES[record.flags["datasource"]]
    gradient = meta_gradient(record.maml, record.tasks)
    errors = {name: relative(gradient[name], record.recorded("meta_gradient", name)) for name in record.compared}
    assert max(errors.values()) < tolerance, errors
    for name in gradient.keys() - set(record.compared):
        assert not gradient[name].any(), name


def check_outer_steps(record: Record):
    _, tolerance = TOLERANCES[record.flags["datasource"]]
    step = record.maml.pretrain_step if record.flags["metatrain_iterations"] == 0 else record.maml.train_step
    for _ in range(int(record.arrays["steps"])):
        step(record.tasks)
    for name in record.compared:
        before, after = record.recorded("weights", name), record.recorded("after", name)
        assert relative(record.maml.weights[name].numpy() - before, after - before) < tolerance, name


def test_losses_and_accuracies_after_every_update(record):
    check_curve(record)


def test_outputs_of_the_network(record):
    maml, updates = record.maml, max(record.flags["num_updates"], record.flags["test_num_updates"])

    @tf.function(autograph=False)
    def outputs(task):
        before, *after = maml.adapt({name: tf.convert_to_tensor(w) for name, w in maml.weights.items()}, task, updates)
        support = maml.network.apply(before, task.support_x)
        return support, tf.stack([maml.network.apply(weights, task.query_x) for weights in after])

    for i in range(len(record.tasks.support_x)):
        support, query = outputs(Tasks(*(tf.constant(part[i]) for part in record.tasks)))
        assert relative(support, record.arrays["outputas"][i]) < 1e-4
        assert relative(query, record.arrays["outputbs"][:, i]) < 1e-4


@pytest.mark.parametrize("record", [name for name in RECORDS if "pretrain" not in name], indirect=True)
def test_meta_gradient(record):
    check_meta_gradient(record)


def test_weights_after_outer_steps(record):  # last: it moves the weights
    check_outer_steps(record)


def test_sinusoid_parity_for_everybody():
    record = Record(SINUSOID)
    check_curve(record)
    check_meta_gradient(record)
    check_outer_steps(record)


def test_every_record_is_tested(shared):
    assert sorted(path.stem for path in (shared / "oracle").glob("*.npz")) == sorted(RECORDS)


@pytest.mark.parametrize("record", ["miniimagenet_5way_1shot_test"], indirect=True)
def test_released_checkpoint_is_the_recorded_model(record, shared):
    """The recorded weights are the original authors' released model: the checkpoint reader gives them to the bit."""
    (folder,) = (shared / "data" / "maml_checkpoint").iterdir()
    run = runs.Run(folder)
    run.restore(record.maml, run.checkpoint(59000))
    for name, weight in record.maml.weights.items():
        np.testing.assert_array_equal(weight.numpy(), record.recorded("weights", name))
    assert sum(weight.numpy().size for weight in record.maml.weights.values()) == 32_773
    check_curve(record)


def test_parameter_counts():
    """The original's: adapted weights, and those that only the outer loop changes."""
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
