"""The networks: their initial weights, shapes, and that what is left out changes nothing."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import networks
from tests import reference
from utils import InputError


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
