"""Networks: initial weights, shapes, and equality with the reference and with Keras."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import networks
from data_generator import SinusoidTasks
from files import InputError
from tests import reference
from tests.helpers import gradient_and_loss, maml_of
from utils import Tasks, mse


def images(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).random(shape, np.float32))


def jittered(weights):
    """Return the weights with noise, so that biases, betas and gammas are tested, too."""
    random = np.random.default_rng(1)
    return {name: w + 0.1 * random.normal(size=w.shape).astype(np.float32) for name, w in weights.items()}


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("mean_head", [False, True])
def test_conv4_equals_reference(norm, max_pool, mean_head):
    network = networks.conv4((20, 17), 2, 3, 4, max_pool=max_pool, norm=norm, mean_head=mean_head)
    weights, x = jittered(network.init(0)), images(6, 20, 17, 2)
    expected = reference.conv4(weights, x, max_pool=max_pool, norm=norm, mean_head=mean_head)
    np.testing.assert_allclose(network.apply(weights, x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
def test_fc_equals_reference(norm):
    network = networks.fc(12, (8, 6, 5), 3, norm=norm)
    weights, x = jittered(network.init(0)), images(7, 2, 3, 2)
    np.testing.assert_allclose(network.apply(weights, x), reference.fc(weights, x, norm=norm), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "size, max_pool, width",
    [
        *[((84, 84), True, 5 * 5), ((84, 84), False, 6 * 6), ((28, 28), False, 2 * 2), ((28, 28), True, 1)],
        *[((32, 32), True, 2 * 2), ((16, 16), True, 1), ((15, 15), False, 1), ((2, 1), False, 1)],
    ],
)
def test_last_layer_width_follows_from_image_size(size, max_pool, width):
    network = networks.conv4(size, 3, 5, 8, max_pool=max_pool, norm="batch_norm", mean_head=False)
    weights = network.init(0)
    assert weights["w5"].shape == (width * 8, 5)
    assert network.apply(weights, images(2, *size, 3)).shape == (2, 5)


@pytest.mark.parametrize("size", [(15, 15), (84, 15), (15, 84)])
def test_images_too_small_to_pool_are_refused(size):
    with pytest.raises(InputError, match=r"--image_size.*--max_pool"):
        networks.conv4(size, 3, 5, 8, max_pool=True, norm="batch_norm", mean_head=False)


def test_initial_weights_have_the_original_distributions():
    conv = networks.conv4((28, 28), 1, 5, 64, max_pool=False, norm="layer_norm", mean_head=True).init(0)
    limit = np.sqrt(6 / (9 * (64 + 64)))
    assert stats.kstest(conv["conv2"].numpy().ravel(), stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3
    assert stats.kstest(conv["w5"].numpy().ravel(), stats.norm(0, 1).cdf).pvalue > 1e-3
    flat = networks.conv4((84, 84), 3, 5, 32, max_pool=True, norm=None, mean_head=False).init(0)["w5"].numpy()
    limit = np.sqrt(6 / (800 + 5))
    assert stats.kstest(flat.ravel(), stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3
    full = networks.fc(784, (256, 128, 64, 64), 5, norm="batch_norm").init(0)
    cut = stats.truncnorm(-2, 2, scale=0.01)
    assert stats.kstest(full["w1"].numpy().ravel()[:20_000], cut.cdf).pvalue > 1e-3
    for weights in (conv, full):
        for name, value in weights.items():
            if name.startswith(("b", "gamma")):
                assert np.all(value.numpy() == name.startswith("gamma")), name


def test_initial_weights_differ_by_name_and_seed():
    network = networks.conv4((28, 28), 1, 5, 8, max_pool=False, norm=None, mean_head=True)
    first, again, other = network.init(0), network.init(0), network.init(1)
    np.testing.assert_array_equal(first["conv2"], again["conv2"])
    assert not np.array_equal(first["conv2"], other["conv2"])
    assert not np.array_equal(first["conv2"], first["conv3"])


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_norms_are_not_adapted(norm):
    for network in (
        networks.conv4((28, 28), 1, 5, 8, max_pool=False, norm=norm, mean_head=True),
        networks.fc(4, (3, 3), 1, norm=norm),
    ):
        meta_only = network.init(0).keys() - set(network.adapted)
        assert meta_only == {name for name in network.init(0) if name.startswith(("beta", "gamma"))}
        assert meta_only


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
@pytest.mark.parametrize("row", networks.NETWORKS)
def test_batch_statistics_is_set_exactly_under_batch_norm(row, norm):
    """Otherwise --query_norm=support would silently do what --query_norm=batch does."""
    if norm != "batch_norm" and row in ("conv4_affine", "resnet12"):
        return  # always batch norm
    shape = (1,) if row == "sinusoid" else (16, 16, 1)
    network = networks.NETWORKS[row](shape, 5, norm, 4, False)
    weights, x = jittered(network.init(0)), images(3, *shape)
    together, apart = network.apply(weights, x), network.apply(weights, x[:2])
    assert network.batch_statistics == (norm == "batch_norm")
    assert np.allclose(together[:2], apart, rtol=1e-3, atol=1e-4) != network.batch_statistics


def test_variables_have_the_original_names():
    conv = networks.conv4((84, 84), 3, 5, 32, max_pool=True, norm="layer_norm", mean_head=False).tf1_names
    assert [conv[name] for name in ("conv1", "b1", "b4", "w5", "b5", "beta1", "gamma4")] == [
        *("model/conv1", "model/Variable", "model/Variable_3", "model/w5", "model/b5"),
        *("model/0/beta", "model/3/gamma"),
    ]
    full = networks.fc(784, (256, 128, 64, 64), 5, norm="batch_norm").tf1_names
    assert [full[name] for name in ("w1", "b1", "w5", "b5", "beta1", "beta2", "beta4")] == [
        *("model/Variable", "model/Variable_1", "model/Variable_8", "model/Variable_9"),
        *("model/0/beta", "model/2/beta", "model/4/beta"),
    ]


def test_keras_model_equals_our_network():
    """The paper's sinusoid network in Keras has our meta-gradient for our weights, and reproducible initial weights."""
    initial = keras.initializers.TruncatedNormal(stddev=0.01)
    layers = [
        keras.layers.Dense(40, activation="relu", kernel_initializer=initial, name="one"),
        keras.layers.Dense(40, activation="relu", kernel_initializer="glorot_uniform", name="two"),
        keras.layers.Dense(1, name="last"),
    ]
    theirs = networks.from_keras(keras.Sequential([keras.Input((1,)), *layers]))
    drawn = random.getstate()
    weights, again, other = theirs.init(3), theirs.init(3), theirs.init(4)
    assert random.getstate() == drawn
    assert list(weights) == [f"{layer}_{part}" for layer in ("one", "two", "last") for part in ("kernel", "bias")]
    for name in weights:
        np.testing.assert_array_equal(weights[name], again[name])
        assert "bias" in name or not np.array_equal(weights[name], other[name])
    ours = networks.fc(1, (40, 40), 1, norm=None)
    tasks = Tasks(*map(tf.constant, SinusoidTasks(5, 5).draw(0, "train", 0, 4)))
    found, expected = (maml_of(network, mse, inner_lr=0.01, inner_steps=2) for network in (theirs, ours))
    values = [jittered(ours.init(0))[name] for name in ("w1", "b1", "w2", "b2", "w3", "b3")]
    for maml in (found, expected):
        for variable, value in zip(maml.weights.values(), values, strict=True):
            variable.assign(value)
    found, expected = (list(gradient_and_loss(maml, tasks)[0].values()) for maml in (found, expected))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", ["BatchNormalization", "LayerNormalization", "GroupNormalization", "Dropout"])
def test_keras_layers_that_would_be_wrong_are_refused(layer):
    arguments = {"Dropout": {"rate": 0.5}, "GroupNormalization": {"groups": 2}}.get(layer, {})
    inner = keras.Sequential([keras.Input((4,)), getattr(keras.layers, layer)(name="it", **arguments)])
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), inner, keras.layers.Dense(1)])
    with pytest.raises(InputError, match=rf"layer it \({layer}\)"):
        networks.from_keras(model)


class Block(keras.layers.Layer):
    """A custom layer that contains another."""

    def __init__(self, inside, **more):
        super().__init__(**more)
        self.inside = inside

    def call(self, x):
        return self.inside(x)


@pytest.mark.parametrize("around", [keras.layers.TimeDistributed, Block, lambda inside: Block(Block(inside))])
@pytest.mark.parametrize("layer", ["LayerNormalization", "BatchNormalization"])
def test_nested_keras_layers_that_would_be_wrong_are_refused(around, layer):
    model = keras.Sequential(
        [keras.Input((3, 4)), around(getattr(keras.layers, layer)(name="it")), keras.layers.Flatten()]
    )
    with pytest.raises(InputError, match=rf"layer it \({layer}\)"):
        networks.from_keras(model)


def test_keras_models_without_weights_or_shape_are_refused():
    with pytest.raises(InputError, match=r"Keras model .*keras\.Input"):
        networks.from_keras(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(InputError, match=r"Keras model .*weights"):
        networks.from_keras(keras.Sequential([keras.Input((3,)), keras.layers.ReLU()]))


def test_keras_layer_norm_has_wrong_second_derivatives():
    """Their second derivatives are off by a tenth. If this test fails, Keras has fixed them: accept these layers."""
    random = np.random.default_rng(0)
    x, u, v = (tf.constant(random.normal(size=(4, 6)).astype(np.float32)) for _ in range(3))
    layer = keras.layers.LayerNormalization()

    def ours(x):
        centered = x - tf.reduce_mean(x, -1, keepdims=True)
        return centered * tf.math.rsqrt(tf.reduce_mean(centered**2, -1, keepdims=True) + layer.epsilon)

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                total = tf.reduce_sum(function(x) * u)
            along = tf.reduce_sum(inner.gradient(total, x) * v)
        return outer.gradient(along, x)

    np.testing.assert_allclose(layer(x), ours(x), atol=1e-5)
    assert tf.norm(second(layer) - second(ours)) > 0.05 * tf.norm(second(ours))
