"""The paper's networks: initial weights and forward functions, as pure functions over a dict of weights.

Weights carry the original's names: convolutions conv1..conv4 (fully connected layers w1, w2, ...), biases b1, b2, ...,
the last layer w5 and b5 (or the next number), and the norms' beta1, ... (and gamma1, ...), one a hidden layer.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import tensorflow as tf

import special_grads
from utils import InputError, Network, Weights

LAYER_NORM_EPSILON = 1e-12  # tf.contrib.layers.layer_norm's, which the original uses


def conv4(
    size: tuple[int, int],
    channels: int,
    way: int,
    filters: int,
    *,
    max_pool: bool,
    norm: str | None,
    mean_head: bool,
) -> Network:
    """Four times [3x3 convolution, norm, ReLU], halved each time by stride or pooling; then a linear layer to N scores.

    Inputs [n, height, width, channels]. Halving: stride 2 with SAME padding, or with max_pool stride 1 and 2x2 VALID
    pooling. The last layer sees the mean over height and width (mean_head: Omniglot, its weights ~ N(0, 1)), or all
    height * width * filters numbers in that order (MiniImagenet, Xavier uniform, as all convolutions).
    Args: size (height, width) in pixels; norm 'batch_norm', 'layer_norm' or None.
    Raises InputError where pooling leaves nothing: with max_pool, below 16 pixels.
    Source: paper section 5.2 and appendix A; the original's maml.py (construct_conv_weights, forward_conv).
    """
    # Differs: the original assumes 5 x 5 here, whatever the image and the pooling.
    height, width = (_halved(pixels, max_pool) for pixels in size)
    if not (height and width):
        raise InputError(
            f"images of {size[0]}x{size[1]} pixels are too small for --max_pool, which halves them four times: "
            "give --image_size=16 or more, or --max_pool=False"
        )
    shapes = {}
    for layer in range(1, 5):
        shapes[f"conv{layer}"] = (3, 3, channels if layer == 1 else filters, filters)
        shapes[f"b{layer}"] = (filters,)
    shapes["w5"] = (filters if mean_head else height * width * filters, way)
    shapes["b5"] = (way,)
    norms = _norm_shapes([filters] * 4, norm)

    def init(seed: int) -> Weights:
        weights = {}
        for index, (name, shape) in enumerate(shapes.items()):
            if name.startswith("b"):
                weights[name] = tf.zeros(shape)
            elif name == "w5" and mean_head:
                weights[name] = tf.random.stateless_normal(shape, (seed, index), alg="philox")
            else:
                weights[name] = _xavier_uniform(shape, (seed, index))
        return weights | _norm_init(norms)

    def apply(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        for layer in range(1, 5):
            x = tf.nn.conv2d(x, weights[f"conv{layer}"], strides=1 if max_pool else 2, padding="SAME")
            x = _normalized(x, weights, layer, norm)
            if max_pool:  # before the ReLU: the two commute, and the ReLU is left a quarter of the work
                x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")
            x = tf.nn.relu(x)
        x = tf.reduce_mean(x, [1, 2]) if mean_head else tf.reshape(x, [-1, shapes["w5"][0]])
        return tf.linalg.matmul(x, weights["w5"]) + weights["b5"]

    anonymous = [f"b{layer}" for layer in range(1, 5)]
    tf1_names = _tf1_names(shapes, anonymous, norms, norm_scopes=[0, 1, 2, 3])
    return Network(init, apply, tuple(shapes), tf1_names, batched=False)


def fc(inputs: int, hidden: Sequence[int], outputs: int, *, norm: str | None) -> Network:
    """Fully connected layers with a norm (if any) and a ReLU after each hidden one.

    Inputs [n, ...], flattened to [n, inputs]. Weights begin as normals of stddev 0.01 cut at two stddevs, biases at 0.
    Source: paper sections 5.1 (hidden 40, 40) and 5.2 (256, 128, 64, 64); the original's maml.py (construct_fc_weights,
    forward_fc).
    """
    widths = [inputs, *hidden, outputs]
    layers = range(1, len(widths))
    shapes = {}
    for layer in layers:
        shapes[f"w{layer}"] = (widths[layer - 1], widths[layer])
        shapes[f"b{layer}"] = (widths[layer],)
    norms = _norm_shapes(hidden, norm)

    def init(seed: int) -> Weights:
        weights = {}
        for index, (name, shape) in enumerate(shapes.items()):
            if name.startswith("b"):
                weights[name] = tf.zeros(shape)
            else:
                weights[name] = tf.random.stateless_truncated_normal(shape, (seed, index), 0.0, 0.01, alg="philox")
        return weights | _norm_init(norms)

    def apply(weights: Weights, x: tf.Tensor, product=tf.linalg.matmul) -> tf.Tensor:
        x = tf.reshape(x, [-1, inputs])
        for layer in layers[:-1]:
            x = tf.nn.relu(_normalized(product(x, weights[f"w{layer}"]), weights, layer, norm))
        return product(x, weights[f"w{layers[-1]}"]) + weights[f"b{layers[-1]}"]

    # The original's norm scopes skip 1: its first hidden layer is '0', the second '2'.
    tf1_names = _tf1_names(shapes, list(shapes), norms, norm_scopes=[0, *range(2, len(hidden) + 1)])
    # All tasks in one operation, or task by task, in ms a step on two cores: the sinusoid's 1,761 weights 0.5 or 2.2,
    # without XLA; Omniglot's 246,597 weights 17 or 13. The bound lies between.
    batched = sum(before * after for before, after in pairwise(widths)) < 10_000
    inner_apply = functools.partial(apply, product=special_grads.matmul) if batched else None
    return Network(init, apply, tuple(shapes), tf1_names, batched, inner_apply)


def _halved(pixels: int, max_pool: bool) -> int:
    """Height or width after four halvings: pooling rounds down, strided SAME convolutions round up."""
    for _ in range(4):
        pixels = pixels // 2 if max_pool else -(-pixels // 2)
    return pixels


def _xavier_uniform(shape, seed):
    receptive_field = 1
    for extent in shape[:-2]:
        receptive_field *= extent
    limit = (6.0 / (receptive_field * (shape[-2] + shape[-1]))) ** 0.5
    return tf.random.stateless_uniform(shape, seed, -limit, limit, alg="philox")


def _norm_shapes(widths, norm):
    names = {None: (), "batch_norm": ("beta",), "layer_norm": ("beta", "gamma")}[norm]
    return {f"{name}{layer}": (width,) for layer, width in enumerate(widths, 1) for name in names}


def _norm_init(norms):
    return {name: tf.ones(shape) if name.startswith("gamma") else tf.zeros(shape) for name, shape in norms.items()}


def _normalized(x, weights, layer, norm):
    """A hidden layer's bias and norm. Under batch norm the bias cancels: it is not added, its gradient is exactly 0."""
    if norm == "batch_norm":
        return special_grads.batch_norm(x, weights[f"beta{layer}"])
    x = x + weights[f"b{layer}"]
    if norm == "layer_norm":
        axes = list(range(1, x.shape.rank))  # all but the batch
        centred = x - tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        normal = centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON)
        x = normal * weights[f"gamma{layer}"] + weights[f"beta{layer}"]
    return x


def _tf1_names(shapes, anonymous, norms, norm_scopes):
    """`anonymous` are those that the original left unnamed; TensorFlow 1 called them Variable, Variable_1, ..."""
    names = {name: f"model/{name}" for name in shapes}
    for index, name in enumerate(anonymous):
        names[name] = f"model/Variable_{index}" if index else "model/Variable"
    for name in norms:
        names[name] = f"model/{norm_scopes[int(name[-1]) - 1]}/{name[:-1]}"
    return names
