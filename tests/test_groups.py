"""Groups of tasks give the numbers of one task at a time, in every network, norm and form of the convolution."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import networks
import recipe
from cluster import Cluster
from data_generator import SinusoidTasks
from evaluate import evaluate
from files import InputError
from parallel import Layout, sum_over_tasks
from recipe import Recipe
from tests.helpers import LINE, gradient_and_loss, in_float64, maml_of, meta_gradient, one_task, random_tasks
from utils import Tasks, accuracy, mse, xent

CONV = functools.partial(networks.conv4, (17, 16), 2, 3, 4)
NETWORKS = {
    "strided": ((17, 16, 2), functools.partial(CONV, max_pool=False, mean_head=True)),
    "pooled": ((17, 16, 2), functools.partial(CONV, max_pool=True, mean_head=False)),
    "fc": ((9,), functools.partial(networks.fc, 9, (8, 7), 3)),
}


@pytest.mark.parametrize("form", ["sliced_conv", "grouped_conv"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(5, 5), (6, 7), (1, 2)])
def test_group_convolution_equals_convolution_of_each_task(size, stride, form):
    """Forward and both gradients. XLA, because TensorFlow's CPU kernels cannot differentiate a grouped convolution."""
    random = np.random.default_rng(0)
    x, filters = (tf.constant(random.normal(size=shape)) for shape in ((3, 4, *size, 2), (3, 3, 3, 2, 5)))

    def each(x, filters):
        return tf.stack([tf.nn.conv2d(x[g], filters[g], stride, "SAME") for g in range(3)])

    def group(x, filters):
        return networks.apart(getattr(networks, form)(networks.side_by_side(x, 3), filters, stride), 3)

    def with_gradients(convolve):
        with tf.GradientTape() as tape:
            tape.watch([x, filters])
            y = convolve(x, filters)
            total = tf.reduce_sum(tf.sin(y))
        return y, *tape.gradient(total, [x, filters])

    expected = with_gradients(each)
    found = tf.function(lambda: with_gradients(group), autograph=False, jit_compile=True)()
    for value, expected_value in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, expected_value, atol=1e-12)


# Five steps agreed in all networks and norms, too, but tracing them takes minutes.
@pytest.mark.parametrize(
    ("name", "norm", "steps"),
    [*((name, norm, 1) for name in NETWORKS for norm in ("batch_norm", "layer_norm", None)), ("fc", "batch_norm", 5)],
)
def test_groups_equal_one_task_at_a_time(name, norm, steps, eagerly):
    """The second-order meta-gradient and the whole curve, in groups of 1, 2 and all 4."""
    shape, build = NETWORKS[name]
    tasks = random_tasks(4, 6, 9, shape, 3)
    loss, found = functools.partial(xent, shot=2), {}
    for at_once in (1, 2, 0):
        network = in_float64(build(norm=norm))
        maml = maml_of(network, loss, accuracy, inner_lr=0.05, inner_steps=steps, layout=Layout(group=at_once))
        found[at_once] = meta_gradient(maml, tasks), maml.evaluate(tasks, steps, "support" if norm else "batch")
    expected, curve = found.pop(1)
    for gradient, other in found.values():
        for weight, value in expected.items():
            np.testing.assert_allclose(gradient[weight], value, atol=1e-12, rtol=1e-9, err_msg=weight)
        np.testing.assert_allclose(other.losses, curve.losses, rtol=1e-12)
        np.testing.assert_array_equal(other.accuracies, curve.accuracies)


def test_first_order_groups_equal_one_task_at_a_time(eagerly):
    shape, build = NETWORKS["strided"]
    tasks, found = random_tasks(4, 6, 9, shape, 3), []
    for at_once in (1, 0):
        network, loss = in_float64(build(norm="batch_norm")), functools.partial(xent, shot=2)
        maml = maml_of(network, loss, inner_lr=0.05, inner_steps=2, first_order=True, layout=Layout(group=at_once))
        found.append(meta_gradient(maml, tasks))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-12, rtol=1e-9, err_msg=name)


def test_networks_without_group_support_are_vectorized():
    tasks = Tasks(*(np.concatenate([part, 2 * part]) for part in one_task([0.8], [-0.4], [1.3], [0.7])))
    each, together = (
        meta_gradient(maml_of(LINE, mse, inner_lr=0.05, inner_steps=2, layout=Layout(group=at_once)), tasks)
        for at_once in (1, 0)
    )
    np.testing.assert_allclose(together["w"], each["w"], rtol=1e-6)


def test_tasks_not_divisible_into_groups_are_refused():
    maml = maml_of(LINE, mse, inner_lr=0.05, inner_steps=1, layout=Layout(group=2))
    tasks = Tasks(*(np.repeat(part, 3, 0) for part in one_task([0.8], [-0.4], [1.3], [0.7])))
    with pytest.raises(InputError, match="tasks: 3"):
        maml.train_step(tasks)


def test_evaluation_in_groups_uses_the_same_tasks():
    """Even if groups do not divide the number of tasks: surplus tasks are dropped."""
    found = [
        evaluate(
            recipe.build(Recipe(norm=None, conv=False), Layout(group=at_once)), SinusoidTasks(5, 5), "val", 7, 2, 0
        )
        for at_once in (1, 4, 0)
    ]
    for curve in found:
        assert curve.losses.shape == (7, 3)
        np.testing.assert_allclose(curve.losses, found[0].losses, rtol=1e-5)


class FourProcesses(Cluster):
    """Four processes, all with this process's values."""

    def __init__(self):
        super().__init__(tuple("abcd"))

    def gathered(self, values):
        return np.concatenate([values] * self.size)


@pytest.mark.parametrize(
    ("workers", "at_once", "drawn_count"),
    [(Cluster(), 1, 7), (Cluster(), 4, 8), (FourProcesses(), 1, 2), (FourProcesses(), 2, 2)],
)
def test_evaluation_draws_no_surplus_tasks(workers, at_once, drawn_count):
    """Except to fill up a group. Four processes share 7 tasks."""
    drawn = []

    class Source:
        def draw(self, *which):
            drawn.append(which[-1])
            return SinusoidTasks(5, 5).draw(*which)

    maml = recipe.build(Recipe(norm=None, conv=False), Layout(64, at_once))
    curve = evaluate(maml, Source(), "val", 7, 2, 0, workers=workers)
    assert drawn == [drawn_count]
    assert curve.losses.shape == (7, 3)


@pytest.mark.parametrize("at_once", [1, 4, 0])
def test_sums_over_tasks_are_float64(at_once):
    """Sums between tasks and within a group: in float32 the small numbers would be lost."""
    x = np.full((8, 1, 1), 2.0**-30, np.float32)
    x[::4] = 1
    maml = maml_of(LINE, mse, inner_lr=0.05, inner_steps=1, layout=Layout(group=at_once))
    tasks = Tasks(*[tf.constant(x)] * 4)
    function, outputs = lambda weights, task: tf.reduce_sum(task.query_x), tf.TensorSpec([], tf.float32)
    assert sum_over_tasks(function, maml.values(), tasks, outputs, maml.layout).numpy() == 2 + 6 * 2.0**-30


@pytest.mark.parametrize("at_once", [1, 4])
def test_task_order_does_not_change_the_sum(at_once):
    """Reordered groups, as on other processes, give the same bits of gradient and loss."""
    tasks = random_tasks(16, 6, 9, (9,), 3, dtype=np.float32)
    order = np.random.default_rng(1).permutation(16 // at_once)
    moved = Tasks(*(part.reshape(-1, at_once, *part.shape[1:])[order].reshape(part.shape) for part in tasks))
    loss = functools.partial(xent, shot=2)
    maml = maml_of(
        networks.fc(9, (8, 7), 3, norm="batch_norm"), loss, inner_lr=0.05, inner_steps=1, layout=Layout(group=at_once)
    )
    sums = tf.function(functools.partial(gradient_and_loss, maml), autograph=False)
    (gradient, loss), (other_gradient, other_loss) = sums(tasks), sums(moved)
    for name, value in gradient.items():
        np.testing.assert_array_equal(value, other_gradient[name], err_msg=name)
    np.testing.assert_array_equal(loss, other_loss)
