"""The networks: their initial weights, shapes, and that what is left out changes nothing."""

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
    """Weights with noise on all, so that biases, betas and gammas take part."""
    random = np.random.default_rng(1)
    return {name: w + 0.1 * random.normal(size=w.shape).astype(np.float32) for name, w in weights.items()}


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("mean_head", [False, True])
def test_conv4_computes_what_the_reference_does(norm, max_pool, mean_head):
    network = networks.conv4((20, 17), 2, 3, 4, max_pool=max_pool, norm=norm, mean_head=mean_head)
    weights, x = jittered(network.init(0)), images(6, 20, 17, 2)
    expected = reference.conv4(weights, x, max_pool=max_pool, norm=norm, mean_head=mean_head)
    np.testing.assert_allclose(network.apply(weights, x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
def test_fc_computes_what_the_reference_does(norm):
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
def test_last_layer_takes_its_width_from_the_image(size, max_pool, width):
    network = networks.conv4(size, 3, 5, 8, max_pool=max_pool, norm="batch_norm", mean_head=False)
    weights = network.init(0)
    assert weights["w5"].shape == (width * 8, 5)
    assert network.apply(weights, images(2, *size, 3)).shape == (2, 5)


@pytest.mark.parametrize("size", [(15, 15), (84, 15), (15, 84)])
def test_images_too_small_to_pool_four_times(size):
    with pytest.raises(InputError, match=r"images of \d+x\d+ pixels are too small for --max_pool.* --image_size=16"):
        networks.conv4(size, 3, 5, 8, max_pool=True, norm="batch_norm", mean_head=False)


def test_initial_weights_are_distributed_as_the_original_s():
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


def test_each_weight_and_each_seed_draws_its_own_numbers():
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
def test_a_network_says_whether_an_answer_depends_on_the_batch(row, norm):
    """Else --query_norm=support would silently be the paper's way."""
    if norm != "batch_norm" and row in ("conv4_affine", "resnet12"):
        return  # they have no other
    shape = (1,) if row == "sinusoid" else (16, 16, 1)
    network = networks.NETWORKS[row](shape, 5, norm, 4, False)
    weights, x = jittered(network.init(0)), images(3, *shape)
    together, apart = network.apply(weights, x), network.apply(weights, x[:2])
    assert network.batch_statistics == (norm == "batch_norm")
    assert np.allclose(together[:2], apart, rtol=1e-3, atol=1e-4) != network.batch_statistics


def test_names_of_the_original_s_variables():
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


def test_a_keras_model_computes_what_ours_does():
    """The paper's sinusoid network from Keras: with our weights, our meta-gradient; and a seed says its weights."""
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


@pytest.mark.parametrize(
    "layer, reason",
    [
        ("BatchNormalization", "has moving averages, .*special_grads.batch_norm"),
        ("LayerNormalization", "stops a gradient, so that its second derivatives are wrong"),
        ("GroupNormalization", "stops a gradient, so that its second derivatives are wrong"),
        ("Dropout", "has state, or weights that are not trained .*: leave it out"),
    ],
)
def test_keras_layers_that_would_be_wrong(layer, reason):
    arguments = {"Dropout": {"rate": 0.5}, "GroupNormalization": {"groups": 2}}.get(layer, {})
    inner = keras.Sequential([keras.Input((4,)), getattr(keras.layers, layer)(name="it", **arguments)])
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), inner, keras.layers.Dense(1)])
    with pytest.raises(InputError, match=rf"layer it \({layer}\) of the Keras model .* {reason}"):
        networks.from_keras(model)


class Block(keras.layers.Layer):
    """A layer of a user's own, which has others inside."""

    def __init__(self, inside, **more):
        super().__init__(**more)
        self.inside = inside

    def call(self, x):
        return self.inside(x)


@pytest.mark.parametrize("around", [keras.layers.TimeDistributed, Block, lambda inside: Block(Block(inside))])
@pytest.mark.parametrize("layer", ["LayerNormalization", "BatchNormalization"])
def test_keras_layers_that_would_be_wrong_inside_others(around, layer):
    model = keras.Sequential(
        [keras.Input((3, 4)), around(getattr(keras.layers, layer)(name="it")), keras.layers.Flatten()]
    )
    with pytest.raises(InputError, match=rf"layer it \({layer}\) of the Keras model"):
        networks.from_keras(model)


def test_keras_models_without_weights_or_shape():
    with pytest.raises(InputError, match="is not built: begin it with keras"):
        networks.from_keras(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(InputError, match="has no weights"):
        networks.from_keras(keras.Sequential([keras.Input((3,)), keras.layers.ReLU()]))


def test_why_keras_layer_norms_are_refused():
    """Their second derivatives are off by a tenth. Where this fails, Keras has mended it, and they may be let in."""
    random = np.random.default_rng(0)
    x, u, v = (tf.constant(random.normal(size=(4, 6)).astype(np.float32)) for _ in range(3))
    layer = keras.layers.LayerNormalization()

    def ours(x):
        centred = x - tf.reduce_mean(x, -1, keepdims=True)
        return centred * tf.math.rsqrt(tf.reduce_mean(centred**2, -1, keepdims=True) + layer.epsilon)

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
