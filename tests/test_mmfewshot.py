"""mmfewshot's networks and loss, against tests/reference.py, against PyTorch if it is installed, and in a whole run."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import networks
import predict
import recipe
import runs
from files import InputError
from maml import MAML
from parallel import Layout
from recipe import Recipe
from tests import reference
from tests.helpers import gradient_and_loss, in_float64, maml_of, random_tasks, refusal, run, trajectory
from utils import Tasks, accuracy, mean_xent, xent

TASKS = Tasks(*map(tf.constant, random_tasks(2, 6, 9, (17, 16, 2), 3)))
WIDTHS = (3, 4, 5, 6)
NETWORKS = {
    "conv4_affine": functools.partial(networks.conv4_affine, (17, 16), 2, 3, 4),
    "resnet12": functools.partial(networks.resnet12, (17, 16), 2, 3, WIDTHS),
}


@pytest.fixture(autouse=True)
def eagerly(request):
    """Run eagerly, because tracing these small models takes longer than running them."""
    tf.config.run_functions_eagerly("whole" not in request.node.name)
    yield
    tf.config.run_functions_eagerly(False)


def model(name: str, **options) -> MAML:
    settings = {"inner_lr": 0.1, "inner_steps": 2} | options
    return maml_of(in_float64(NETWORKS[name]()), mean_xent, accuracy, **settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient_equals_the_reference(name):
    """Every weight adapts, including gamma and beta."""
    maml = model(name)
    gradient, loss = gradient_and_loss(maml, TASKS)
    slow = getattr(reference, name)
    expected_loss, expected = reference.meta_gradient(slow, mean_xent, maml.values(), TASKS, 0.1, 2, norms=True)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
    for weight, value in gradient.items():
        np.testing.assert_allclose(value, expected[weight], rtol=1e-7, atol=1e-10, err_msg=weight)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_equal_one_task_at_a_time(name):
    results = []
    for group in (1, 0):
        maml = model(name, layout=Layout(group=group), inner_steps=1)
        results.append((gradient_and_loss(maml, TASKS)[0], maml.evaluate(TASKS, 1, "support").losses))
    (gradient, losses), (grouped_gradient, grouped_losses) = results
    np.testing.assert_allclose(losses, grouped_losses, rtol=1e-10)
    for name, value in gradient.items():
        np.testing.assert_allclose(grouped_gradient[name], value, rtol=1e-8, atol=1e-11, err_msg=name)


def test_parameter_counts_equal_mmfewshot():
    """Counted in mmfewshot's own networks, 5-way at 84x84."""
    for network, count in (
        (networks.resnet12((84, 84), 3, 5), 12_427_525),
        (networks.conv4_affine((84, 84), 3, 5, 64), 121_093),
    ):
        weights = network.init(0)
        assert sum(int(np.prod(weight.shape)) for weight in weights.values()) == count
        assert set(network.adapted) == set(weights)


def test_initial_weights_have_the_distribution_of_mmfewshot():
    """Convolutions depend on their fan-out, their biases on their fan-in, the last layer on its own fan-in."""
    conv4, resnet = networks.conv4_affine((84, 84), 3, 5, 64).init(0), networks.resnet12((84, 84), 3, 5).init(0)
    for values, fan_out in (
        *[(conv4["conv1"], 9 * 64), (conv4["conv2"], 9 * 64)],
        *[(resnet["conv1_1"], 9 * 64), (resnet["conv2_0"], 160), (resnet["conv2_1"], 9 * 160)],
    ):
        assert stats.kstest(values.numpy().ravel(), stats.norm(0, np.sqrt(2 / fan_out)).cdf).pvalue > 1e-3
    for values, fan_in in (
        *[(conv4["b1"], 9 * 3), (conv4["b2"], 9 * 64), (np.r_[np.ravel(conv4["w5"]), conv4["b5"]], 25 * 64)],
        *[(np.r_[np.ravel(resnet["w5"]), resnet["b5"]], 640)],
    ):
        limit = fan_in**-0.5
        assert stats.kstest(np.ravel(values), stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3
    for weights in (conv4, resnet):
        for name, value in weights.items():
            if name.startswith(("gamma", "beta")):
                assert np.all(value.numpy() == name.startswith("gamma")), name


def test_the_mean_loss_is_the_original_loss_divided_by_way():
    logits, labels = TASKS.support_x[0, :, 0, :3, 0], TASKS.support_y[0]
    np.testing.assert_allclose(mean_xent(logits, labels), xent(logits, labels, shot=2) / 3, rtol=1e-12)


def test_networks_reject_incompatible_options():
    for name in NETWORKS:
        with pytest.raises(InputError, match=f"--network={name}"):
            recipe.build(Recipe(data_set="cub", network=name, norm="layer_norm"))
        with pytest.raises(InputError, match=f"--network={name}"):
            recipe.build(Recipe(data_set="cub", network=name, image_size=15))
        assert recipe.build(Recipe(data_set="cub", network=name, image_size=16)).clip is None  # MiniImagenet's is 10
    assert "--loss=mean" in refusal("--loss=mean")
    assert "--network=resnet12" in refusal("--datasource=cub", "--network=resnet12", "--noconv")


def test_a_whole_run_and_predict_use_the_mean_loss(miniimagenet_like, tmp_path):
    """predict.py adapts to the mean over classes of each class's mean loss."""
    flags = "--datasource=folder", f"--data_path={miniimagenet_like}", "--image_size=16", "--num_filters=4"
    flags += "--network=conv4_affine", "--loss=mean", "--update_batch_size=2", "--num_updates=1", "--num_query=2"
    flags += "--meta_batch_size=2", f"--logdir={tmp_path}"
    run(*flags, "--metatrain_iterations=1")
    run(*flags, "--metatrain_iterations=1", "--train=False", "--test_tasks=2")
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("batchnorm.conv4_affine.lossmean.size16")
    (entry,) = json.loads((Path(folder) / "results.json").read_text())
    assert (entry["loss"], entry["network"]) == ("mean", "conv4_affine")
    images, labels = np.random.default_rng(0).random((10, 16, 16, 3), np.float32), np.arange(10) % 5
    _, maml, _ = runs.load(folder)
    task = Tasks(tf.constant(images), tf.one_hot(labels, 5), None, None)
    adapted = predict.load(folder, updates=1, class_orders=1).adapt(images, labels)
    for name, value in trajectory(maml.inner, maml.values(), task, 1)[1].items():
        np.testing.assert_allclose(adapted.trajectories[0][1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def torch_apply(torch, name: str, weights: dict, x):
    """The same networks in PyTorch, images [n, channels, height, width]."""
    functional = torch.nn.functional
    leaky = functools.partial(functional.leaky_relu, negative_slope=float(np.float32(0.1)))  # float32 in TensorFlow

    def layer(x, number):
        conv, gamma, beta = (weights[f"{part}{number}"] for part in ("conv", "gamma", "beta"))
        x = functional.conv2d(x, conv, weights.get(f"b{number}"), padding=conv.shape[-1] // 2)
        return functional.batch_norm(x, None, None, gamma, beta, training=True)

    for block in range(1, 5):
        if name == "conv4_affine":
            x = functional.relu(layer(x, block))
        else:
            out = layer(leaky(layer(leaky(layer(x, f"{block}_1")), f"{block}_2")), f"{block}_3")
            x = leaky(out + layer(x, f"{block}_0"))
        x = functional.max_pool2d(x, 2)
    if name == "resnet12":
        x = x.mean((2, 3))
    return functional.linear(x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x, weights["w5"], weights["b5"])


@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_agrees(name):
    """Outputs, loss and meta-gradient after two updates, first and second order, agree within 1e-10."""
    torch = pytest.importorskip("torch")

    def theirs(array):
        array = torch.tensor(np.asarray(array))
        return array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T.contiguous() if array.ndim == 2 else array

    def ours(tensor):
        array = tensor.numpy()
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array

    for first_order in (False, True):
        maml = model(name, first_order=first_order)
        task = Tasks(*(part[0] for part in TASKS))
        weights = {key: theirs(value).requires_grad_() for key, value in maml.values().items()}
        images = [torch.tensor(part.numpy()).permute(0, 3, 1, 2) for part in (task.support_x, task.query_x)]
        labels = [torch.tensor(part.numpy().argmax(-1)) for part in (task.support_y, task.query_y)]
        loss, fast = torch.nn.functional.cross_entropy, weights
        np.testing.assert_allclose(
            torch_apply(torch, name, weights, images[0]).detach(),
            maml.inner.network.apply(maml.values(), task.support_x),
            atol=1e-10,
        )
        for _ in range(2):
            support = loss(torch_apply(torch, name, fast, images[0]), labels[0])
            gradient = torch.autograd.grad(support, list(fast.values()), create_graph=not first_order)
            fast = {key: value - 0.1 * g for (key, value), g in zip(fast.items(), gradient, strict=True)}
        query = loss(torch_apply(torch, name, fast, images[1]), labels[1])
        expected = torch.autograd.grad(query, list(weights.values()))
        gradient, our_loss = gradient_and_loss(maml, Tasks(*(part[None] for part in task)))
        np.testing.assert_allclose(our_loss, query.item(), atol=1e-10)
        for (key, value), g in zip(gradient.items(), expected, strict=True):
            np.testing.assert_allclose(value, ours(g), atol=1e-10, err_msg=key)
