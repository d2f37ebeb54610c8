"""The method, checked against a derivation by hand, the slow reference and finite differences; the outer step."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import networks
from data_generator import SinusoidTasks
from files import InputError
from maml import MAML, Adam
from parallel import Layout
from tests import reference
from tests.helpers import (
    LINE,
    PROGRAM,
    assert_slope,
    end,
    in_float64,
    maml_of,
    meta_gradient,
    one_task,
    random_tasks,
    spawn,
)
from utils import Tasks, accuracy, mean_xent, mse, statistics, xent


@pytest.mark.parametrize("in_one_operation", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_gradient_equals_derivation_by_hand(steps, first_order, in_one_operation):
    """One weight, one support point (a, y), one query point (b, z), loss (w a - y)^2.

    An inner step maps w to w' = w - 2 alpha a (w a - y), so dw'/dw = 1 - 2 alpha a^2, and after J steps the
    meta-gradient is 2 b (w_J b - z) (1 - 2 alpha a^2)^J. To first order the last factor is 1.
    """
    w, a, y, b, z, alpha = 1.5, 0.8, -0.4, 1.3, 0.7, 0.05
    tasks = one_task([a], [y], [b], [z])
    line = LINE._replace(steps_a_call=2 if in_one_operation else 1)
    maml = maml_of(line, mse, inner_lr=alpha, inner_steps=steps, first_order=first_order)
    for _ in range(steps):
        w = w - 2 * alpha * a * (w * a - y)
    expected = 2 * b * (w * b - z) * (1 if first_order else (1 - 2 * alpha * a**2) ** steps)
    np.testing.assert_allclose(meta_gradient(maml, tasks)["w"], expected, rtol=1e-6)


CASES = {
    "conv": ((17, 16, 2), functools.partial(networks.conv4, (17, 16), 2, 3, 4), functools.partial(reference.conv4)),
    "fc": ((9,), functools.partial(networks.fc, 9, (8, 7), 3, tiny=True), reference.fc),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
@pytest.mark.parametrize("kind, options", [("conv", {"max_pool": False, "mean_head": True}), ("fc", {})])
def test_fast_equals_slow(kind, options, norm, first_order):
    check_against_reference(kind, options, norm, 2, first_order)


@pytest.mark.parametrize("steps", [1, 5])
def test_fast_equals_slow_with_pooling_and_more_steps(steps):
    check_against_reference("conv", {"max_pool": True, "mean_head": False}, "batch_norm", steps, False)


def check_against_reference(kind, options, norm, steps, first_order):
    shape, build, slow = CASES[kind]
    loss = functools.partial(xent, shot=2)
    tasks = random_tasks(2, 6, 9, shape, 3)
    maml = maml_of(
        in_float64(build(norm=norm, **options)), loss, inner_lr=0.05, inner_steps=steps, first_order=first_order
    )
    weights = {name: tf.convert_to_tensor(w) for name, w in maml.weights.items()}
    expected_loss, expected = reference.meta_gradient(
        functools.partial(slow, norm=norm, **options),
        loss,
        weights,
        Tasks(*map(tf.constant, tasks)),
        0.05,
        steps,
        first_order,
    )
    np.testing.assert_allclose(np.mean(maml.evaluate(tasks, steps).losses[:, steps]), expected_loss, rtol=1e-9)
    for name, gradient in meta_gradient(maml, tasks).items():
        # Biases that batch norm cancels have zero gradient in maml.py and rounding noise in the reference.
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("norm", ["batch_norm", None])
def test_meta_gradient_agrees_with_finite_differences(norm):
    network = in_float64(networks.conv4((20, 20), 1, 2, 3, max_pool=False, norm=norm, mean_head=True))
    maml = maml_of(network, functools.partial(xent, shot=5), inner_lr=0.05, inner_steps=2)
    tasks = random_tasks(2, 10, 10, (20, 20, 1), 2)
    gradient = meta_gradient(maml, tasks)
    assert_slope(maml, tasks, gradient)


def small_maml(**options) -> MAML:
    network = networks.conv4((16, 16), 1, 3, 4, max_pool=False, norm="batch_norm", mean_head=True)
    settings = {"inner_lr": 0.4, "inner_steps": 1} | options
    return maml_of(network, functools.partial(xent, shot=1), accuracy, **settings)


SMALL = functools.partial(random_tasks, 4, 3, 6, (16, 16, 1), 3, dtype=np.float32)


def gradient_into_adam(optimizer: Adam) -> dict[str, np.ndarray]:
    """Return the first gradient that entered Adam: ten times its first moment."""
    assert int(optimizer.updates) == 1
    return {name: m.numpy() / 0.1 for name, m in optimizer.m.items()}


def scaled_loss(logits, labels):
    return 1e4 * xent(logits, labels, 1)  # gradients far beyond the clip


def test_meta_gradient_is_clipped_elementwise_before_adam():
    network = networks.conv4((16, 16), 1, 3, 4, max_pool=False, norm="batch_norm", mean_head=True)
    build = functools.partial(maml_of, network, scaled_loss, inner_lr=1e-6, inner_steps=1)
    clipped, free = build(clip=10.0), build()
    gradient = meta_gradient(free, SMALL())
    assert max(np.abs(g).max() for g in gradient.values()) > 1000
    clipped.train_step(SMALL())
    free.train_step(SMALL())
    for name, expected in gradient.items():
        np.testing.assert_allclose(
            gradient_into_adam(clipped.meta_optimizer)[name],
            np.clip(expected, -10, 10),
            rtol=1e-3,
            atol=1e-3,
            err_msg=name,
        )
        np.testing.assert_allclose(
            gradient_into_adam(free.meta_optimizer)[name],
            expected,
            rtol=1e-3,
            atol=1e-3 * np.abs(expected).max(),
            err_msg=name,
        )
    clipped.pretrain_step(SMALL())  # pretraining is never clipped
    assert max(np.abs(g).max() for g in gradient_into_adam(clipped.pretrain_optimizer).values()) > 1000


def test_pretraining_and_meta_training_have_separate_moments():
    maml = small_maml()
    maml.pretrain_step(SMALL())
    assert (int(maml.pretrain_optimizer.updates), int(maml.meta_optimizer.updates), int(maml.step)) == (1, 0, 1)
    maml.train_step(SMALL())
    assert (int(maml.pretrain_optimizer.updates), int(maml.meta_optimizer.updates), int(maml.step)) == (1, 1, 2)


def test_adam_matches_tensorflow_1_formula():
    """lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), with epsilon outside the bias correction."""
    weight = {"w": tf.Variable([1.0, -2.0, 3.0])}
    adam, expected, m, v = Adam(weight, 0.01), np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for t in range(1, 6):
        g = np.array([1e-9, 0.5 * t, -2.0])
        adam.apply({"w": tf.constant(g, tf.float32)})
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = expected - 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(weight["w"], expected, rtol=1e-5)


def sinusoid_maml() -> MAML:
    return maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1)


@pytest.mark.parametrize("pretrain", [False, True])
def test_compiled_steps_equal_single_steps(pretrain):
    """12 of 20 drawn steps, in runs of 5, 5 and 2, equal 12 single steps, with the same step count and one trace."""
    drawn = SinusoidTasks(10, 10).draw(0, "train", 0, 20 * 25)
    stack = Tasks(*(part.reshape(20, 25, *part.shape[1:]) for part in drawn))
    compiled, single = sinusoid_maml(), sinusoid_maml()
    for first, count in ((0, 5), (5, 5), (10, 2)):
        compiled.many_steps(stack, tf.constant(first), tf.constant(count), pretrain)
    for i in range(12):
        (single.pretrain_step if pretrain else single.train_step)(Tasks(*(part[i] for part in stack)))
    assert int(compiled.step) == int(single.step) == 12
    assert compiled.many_steps.experimental_get_tracing_count() == 1
    for name, weight in single.weights.items():
        np.testing.assert_allclose(compiled.weights[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


def test_temporary_model_can_train():
    """With tf.function as a decorator, which holds its object weakly, this would fail."""
    network = networks.conv4((16, 16), 1, 3, 4, max_pool=False, norm="batch_norm", mean_head=True)
    loss, _ = maml_of(network, functools.partial(xent, shot=1), inner_lr=0.4, inner_steps=1).train_step(SMALL())
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("part", "change", "name"),
    [
        ("support_x", lambda x: x.astype(np.float64), "support_x"),
        ("query_x", lambda x: (255 * x).astype(np.uint8), "query_x"),
        ("query_y", lambda y: y.argmax(-1), "query_y"),
        ("support_y", lambda y: y.argmax(-1).astype(np.float32), "support_y"),
        ("support_x", lambda x: x[0], "support_x"),
        ("query_x", lambda x: x[:2], "query_x"),
        ("query_y", lambda y: y[:, :1], "query_y"),
        ("query_y", lambda y: y[..., :1], "labels"),
    ],
)
def test_invalid_tasks_are_reported_by_name(part, change, name):
    tasks = SMALL()
    tasks = tasks._replace(**{part: change(getattr(tasks, part))})
    for step in (small_maml().train_step, functools.partial(small_maml().evaluate, steps=1)):
        with pytest.raises(InputError, match=name):
            step(tasks)


def test_graphs_are_traced_once():
    maml = small_maml()
    for seed in range(3):
        maml.train_step(SMALL(seed=seed))
        maml.pretrain_step(SMALL(seed=seed))
        maml.evaluate(SMALL(seed=seed), 2)
    for graph in (maml.train_step, maml.pretrain_step, maml.evaluate):
        assert graph.experimental_get_tracing_count() == 1


def test_biases_before_batch_norm_stay_zero():
    maml = small_maml()
    for _ in range(3):
        maml.train_step(SMALL())
    for layer in range(1, 5):
        assert not maml.weights[f"b{layer}"].numpy().any()


REPEATED = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count()))  # conftest.py gives a test worker one core
import devices
devices.start(parallel_tasks=8)
import tensorflow as tf
from maml import InnerLoop, query_loss
from networks import conv4
from utils import Tasks, mean_xent

network = conv4((84, 84), 3, 5, 32, max_pool=True, norm="batch_norm", mean_head=False)
inner, theta = InnerLoop(network, mean_xent, 0.01, 1), network.init(0)
labels = tf.one_hot(tf.range(75) % 5, 5)
images = tf.random.stateless_uniform([75, 84, 84, 3], [0, 0])
task = Tasks(images[:5], labels[:5], images, labels)

@tf.function
def gradient():
    with tf.GradientTape() as tape:
        tape.watch(theta)
        loss = query_loss(inner, theta, task)
    return tape.gradient(loss, theta, unconnected_gradients="zero")

print(len({b"".join(g.numpy().tobytes() for g in gradient().values()) for _ in range(8)}))
"""


def test_photograph_gradients_are_bitwise_reproducible():
    ended = end(spawn("-c", REPEATED, cwd=PROGRAM.parent))
    assert (ended.code, ended.out) == (0, "1\n")


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_tasks_are_independent(parallel):
    """Permuting tasks permutes results, and any number of parallel tasks gives the same bits."""
    tasks, order = SMALL(), np.array([2, 0, 3, 1])
    maml, one_by_one = small_maml(layout=Layout(parallel)), small_maml()
    curve = maml.evaluate(tasks, 2)
    permuted = one_by_one.evaluate(Tasks(*(part[order] for part in tasks)), 2)
    alone = one_by_one.evaluate(Tasks(*(part[2:3] for part in tasks)), 2)
    np.testing.assert_array_equal(curve.losses.numpy()[order], permuted.losses)
    np.testing.assert_array_equal(curve.accuracies.numpy()[order], permuted.accuracies)
    np.testing.assert_array_equal(curve.losses.numpy()[2:3], alone.losses)


def test_evaluation_changes_nothing_and_training_learns():
    maml = small_maml(meta_lr=0.01)
    before = {name: w.numpy() for name, w in maml.weights.items()}
    losses = maml.evaluate(SMALL(), 3).losses
    for name, weight in maml.weights.items():
        np.testing.assert_array_equal(weight.numpy(), before[name])
    assert losses.shape == (4, 4)
    steps = [float(maml.train_step(SMALL())[0]) for _ in range(40)]
    assert np.mean(steps[-5:]) < 0.8 * np.mean(steps[:5])
    np.testing.assert_allclose(steps[0], np.mean(losses[:, 1]), rtol=1e-5)


def test_batch_norm_makes_query_scores_transductive():
    """Changing another query changes an example's score under batch norm (on purpose), but not without a norm."""
    tasks = SMALL()
    other = tasks._replace(query_x=np.concatenate([tasks.query_x[:, :5], tasks.query_x[:, :1]], 1))
    for norm, same in (("batch_norm", False), (None, True)):
        network = networks.conv4((16, 16), 1, 3, 4, max_pool=False, norm=norm, mean_head=True)
        weights = network.init(0)
        scores = [network.apply(weights, tf.constant(each.query_x[0]))[:5] for each in (tasks, other)]
        assert np.allclose(*scores, atol=1e-6) == same


def test_cross_entropy_is_summed_over_examples_and_divided_by_the_shot():
    logits, labels = (
        tf.constant([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]),
        tf.constant([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    )
    each = [np.log1p(np.exp(-2)), np.log1p(np.exp(1)), np.log1p(np.exp(2))]
    np.testing.assert_allclose(xent(logits, labels, 2), sum(each) / 2, rtol=1e-6)
    np.testing.assert_allclose(accuracy(logits, labels), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("loss", [mse, mean_xent, functools.partial(xent, shot=2), functools.partial(xent, shot=None)])
def test_labels_of_wrong_width_are_refused(loss):
    """TensorFlow would broadcast class numbers [n, 1] given instead of one-hot labels, for a wrong loss."""
    with pytest.raises(InputError, match="labels"):
        loss(tf.ones([6, 3]), tf.ones([6, 1]))


def test_statistics_match_the_original():
    values = np.array([[0.0], [1.0], [1.0], [0.0]])
    np.testing.assert_allclose(statistics(values), [[0.5], [0.5], [1.96 * 0.5 / 2]])


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
@pytest.mark.parametrize("tiny", [False, True])
def test_support_normalized_scores_do_not_depend_on_other_queries(norm, tiny):
    """Each query is normalized with the support set; asking for fewer queries gives the same scores."""
    network = networks.fc(6, (8, 5), 3, norm=norm, tiny=tiny)
    task = Tasks(*(part[0] for part in random_tasks(1, 3, 9, (6,), 3, dtype=np.float32)))
    maml = maml_of(network, functools.partial(xent, shot=1), accuracy, inner_lr=0.1, inner_steps=1)
    scores = networks.support_normalized(network, maml.weights, task.support_x, task.query_x)
    for query, score in zip(task.query_x, scores, strict=True):
        alone = network.apply(maml.weights, np.concatenate([task.support_x, query[None]]))[-1]
        np.testing.assert_allclose(score, alone, rtol=1e-5, atol=1e-7)
    few = networks.support_normalized(network, maml.weights, task.support_x, task.query_x[4:6])
    np.testing.assert_allclose(few, scores[4:6], rtol=1e-5, atol=1e-7)
    tasks = Tasks(*(part[None] for part in task))
    together, apart = (maml.evaluate(tasks, 1, query_norm) for query_norm in ("batch", "support"))
    assert np.allclose(together.losses, apart.losses) == (norm != "batch_norm")


def test_uneven_classes_have_equal_weight_in_the_loss():
    """With K examples per class the loss is the sum divided by K; repeating a class does not change its weight."""
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    np.testing.assert_allclose(xent(logits, labels, shot=None), xent(logits, labels, shot=2), rtol=1e-6)
    again = [0, 1, 2, 3, 4, 5, 0, 3, 0, 3]  # class 0 three times
    np.testing.assert_allclose(xent(logits[again], labels[again], shot=None), xent(logits, labels, shot=2), rtol=1e-6)
