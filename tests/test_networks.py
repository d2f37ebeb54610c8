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
from tests.helpers import assert_slope, gradient_and_loss, maml_of
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


@pytest.fixture(autouse=True)
def reproducible():
    """Seed Keras' initializers, which draw their seeds from Python's `random`."""
    state = random.getstate()
    random.seed(7)
    yield
    random.setstate(state)


def functional(*layers, shape=(3,), dtype=None):
    """Return a functional Keras model of these layers."""
    inputs = x = keras.Input(shape, dtype=dtype)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


class Subclassed(keras.Model):
    def __init__(self, **more):
        super().__init__(**more)
        self.one, self.two = keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)

    def call(self, x):
        return self.two(self.one(x))


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 3), np.float32))
    return model


def pretrained(train_base=False):
    """Return a model whose base is like MobileNetV2, with moving statistics as after training, and a new last layer."""
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(4, 3, strides=2, use_bias=False)(inputs)))
    y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    y = layers.add([x, layers.Dropout(0.5)(layers.BatchNormalization(name="last_norm")(layers.Conv2D(4, 1)(y)))])
    base = keras.Model(inputs, layers.GlobalAveragePooling2D()(y), name="base")
    random = np.random.default_rng(0)
    for variable in base.weights:
        variable.assign(0.5 + random.random(variable.shape))
    base.trainable = train_base
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Dense(2, name="head")(base(inputs, training=False)))


@pytest.fixture
def float64():
    """Let Keras build float64 models, whose gradients finite differences can check."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)


def cell(layer):
    return lambda: functional(layer(3), keras.layers.Dense(2), shape=(4, 3))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "build",
    [
        lambda: functional(keras.layers.Dense(4, activation="tanh", name="a"), keras.layers.Dense(2, name="b")),
        cell(keras.layers.LSTM),
        cell(keras.layers.GRU),
        lambda: functional(
            keras.layers.Embedding(5, 3, mask_zero=True), keras.layers.SimpleRNN(3), keras.layers.Dense(2), shape=(4,)
        ),
        lambda: functional(
            keras.layers.Embedding(5, 3), keras.layers.Flatten(), keras.layers.Dense(2), shape=(4,), dtype="int32"
        ),
        lambda: functional(keras.layers.LayerNormalization(trainable=False), keras.layers.Dense(2)),
        subclassed,
        pretrained,
    ],
    ids="functional lstm gru embedding_masked embedding_int layer_norm_frozen_first subclassed frozen_base".split(),
)
def test_meta_gradient_of_keras_models_is_a_slope(build):
    model = build()
    shape = (3,) if isinstance(model, Subclassed) else model.inputs[0].shape[1:]
    random = np.random.default_rng(0)

    def inputs():
        integers = any(isinstance(layer, keras.layers.Embedding) for layer in model.layers)
        return random.integers(0, 5, (2, 4, *shape)).astype(float) if integers else random.random((2, 4, *shape))

    tasks = Tasks(inputs(), random.random((2, 4, 2)), inputs(), random.random((2, 4, 2)))
    maml = maml_of(networks.from_keras(model, keep_weights=True), mse, inner_lr=0.1, inner_steps=2)
    gradient, _ = gradient_and_loss(maml, tasks)
    assert all(tf.reduce_max(tf.abs(value)) > 0 for value in gradient.values())
    assert_slope(maml, tasks, gradient)


def test_keras_weights_are_named_after_their_layers():
    dense = keras.layers.Dense
    flat = networks.from_keras(functional(dense(4, name="one"), dense(2, name="two")))
    assert list(flat.init(0)) == ["one_kernel", "one_bias", "two_kernel", "two_bias"]
    again = [functional(dense(3, name="same", use_bias=False)) for _ in range(2)]
    assert list(networks.from_keras(functional(*again)).init(0)) == ["same_kernel", "same_kernel_2"]


def test_pretrained_weights_are_kept():
    """Every seed starts from them, frozen layers included. Training does not change the model, nor the model theirs."""
    model, x = pretrained(), images(5, 8, 8, 3)
    expected, values = model(x), [variable.numpy() for variable in model.variables]
    network = networks.from_keras(model, keep_weights=True)
    for seed in (0, 1):
        weights = network.init(seed)
        assert list(weights) == ["head_kernel", "head_bias"]
        np.testing.assert_allclose(network.apply(weights, x), expected, rtol=1e-5, atol=1e-5)
    maml = maml_of(network, mse, inner_lr=0.1, inner_steps=1)
    labels = tf.zeros([1, 5, 2])
    maml.train_step(Tasks(x[None], labels, x[None], labels))
    assert not np.array_equal(maml.weights["head_kernel"], weights["head_kernel"])
    for variable, value in zip(model.variables, values, strict=True):
        np.testing.assert_array_equal(variable, value)
        variable.assign(tf.zeros_like(value))
    np.testing.assert_allclose(network.apply(network.init(0), x), expected, rtol=1e-5, atol=1e-5)


def test_new_weights_are_drawn_only_for_layers_that_are_trained():
    model, x = pretrained(), images(5, 8, 8, 3)
    network = networks.from_keras(model)
    weights = network.init(0)
    assert not np.array_equal(weights["head_kernel"], model.get_layer("head").kernel)
    expected = model.get_layer("base")(x) @ weights["head_kernel"] + weights["head_bias"]
    np.testing.assert_allclose(network.apply(weights, x), expected, rtol=1e-5, atol=1e-5)


def test_keras_inputs_and_outputs_may_be_dictionaries_of_one():
    inputs = keras.Input((3,), name="x")
    model, x = keras.Model({"x": inputs}, {"y": keras.layers.Dense(2)(inputs)}), images(4, 3)
    network = networks.from_keras(model, keep_weights=True)
    np.testing.assert_allclose(network.apply(network.init(0), x), model({"x": x})["y"], rtol=1e-5, atol=1e-5)


def test_frozen_keras_batch_norm_is_affine():
    norm = keras.layers.BatchNormalization(trainable=False)
    model = functional(keras.layers.Dense(2, name="one", use_bias=False), norm)
    gamma, beta, mean, variance = (np.array(pair, np.float32) for pair in ((2, 3), (4, 5), (6, 7), (8, 9)))
    norm.set_weights([gamma, beta, mean, variance])
    network, x = networks.from_keras(model, keep_weights=True), images(4, 3)
    weights = network.init(0)
    expected = (x @ weights["one_kernel"] - mean) / np.sqrt(variance + norm.epsilon) * gamma + beta
    np.testing.assert_allclose(network.apply(weights, x), expected, rtol=1e-5, atol=1e-5)


def two_inputs():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.concatenate(inputs)))


def two_outputs():
    inputs = keras.Input((3,))
    return keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(2)(inputs)])


def text():
    layers = [keras.layers.StringLookup(vocabulary=["a"]), keras.layers.Embedding(2, 3), keras.layers.Flatten()]
    return functional(*layers, keras.layers.Dense(2), shape=(3,), dtype="string")


def dense_then(*layers, **more):
    return lambda: functional(keras.layers.Dense(4, name="it", **more), *layers)


@pytest.mark.parametrize(
    "build, named",
    [
        (two_inputs, "Keras model"),
        (two_outputs, "Keras model"),
        (lambda: functional(keras.layers.Dense(2), shape=(5, 3)), "Keras model"),  # a sequence
        (lambda: pretrained(train_base=True), r"BatchNormalization"),
        (lambda: functional(keras.layers.LSTM(3, dropout=0.1), keras.layers.Dense(2), shape=(4, 3)), "LSTM"),
        (lambda: functional(keras.layers.RandomFlip(), keras.layers.Flatten(), shape=(4, 4, 1)), "Keras model"),
        (lambda: functional(keras.layers.GaussianNoise(0.1, name="it"), keras.layers.Dense(2)), "layer it "),
        (dense_then(kernel_regularizer="l2"), "layer it .*kernel"),
        (dense_then(bias_constraint="non_neg"), "layer it .*bias"),
        (dense_then(activity_regularizer="l2"), "activity_regularizer"),
        (dense_then(activation="softmax"), "softmax"),
        (dense_then(keras.layers.Softmax(), keras.layers.Reshape((4,))), "softmax"),
        (dense_then(keras.layers.Dense(2, dtype="float32"), dtype="mixed_float16"), "layer it .*float16"),
        (dense_then(keras.layers.Dense(2, dtype="float64")), "float32.*float64"),
        (dense_then(trainable=False), "trainable"),
        (lambda: keras.layers.Dense(2), "Keras model"),
        (Subclassed, "built"),
        (text, "Keras model"),
    ],
)
def test_keras_models_that_would_be_wrong_are_refused(build, named):
    with pytest.raises(InputError, match=named) as error:
        networks.from_keras(build(), keep_weights=True)
    assert len(str(error.value)) < 350


def test_subclassed_keras_models_draw_weights_or_say_why():
    network = networks.from_keras(subclassed())
    weights, again, other = network.init(0), network.init(0), network.init(1)
    assert [name.split("_")[-1] for name in weights] == ["kernel", "bias"] * 2
    for name in weights:
        np.testing.assert_array_equal(weights[name], again[name])
        assert name.endswith("bias") or not np.array_equal(weights[name], other[name])

    class Opaque(Subclassed):
        def __init__(self):  # takes no configuration, so Keras cannot copy it
            super().__init__()

    model = Opaque()
    model(np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match="keep_weights"):
        networks.from_keras(model).init(0)


def test_inputs_of_another_shape_are_refused():
    network = networks.from_keras(functional(keras.layers.Dense(2)))
    with pytest.raises(InputError, match=r"\[4, 5\]"):
        network.apply(network.init(0), tf.zeros([4, 5]))


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
