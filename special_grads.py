"""Hand-written gradients, where TensorFlow's are slow or wrong to second order.

Batch norm with the batch's statistics and without gamma, over the n values of one channel:

    mu = mean(x)    s = (mean((x - mu)^2) + epsilon)^(-1/2)    h = (x - mu) s    y = h + beta

First derivative. For an incoming gradient g, the gradient to x is linear in g and symmetric,

    P(g) = s (g - mean(g) - h mean(g h)),

and beta receives sum(g). The kernel FusedBatchNormGradV3 computes P(g), sum(g h) and sum(g).

Second derivative. MAML differentiates P(g) again, as a function of g and x. Let u be the gradient that arrives at P(g).
P is symmetric, so g receives P(u). For x, let a = mean(u h) and b = mean(g h). The differentiated scalar is

    F = sum(u P(g)) = n s c,    c = mean(u g) - mean(u) mean(g) - a b.

The gradient of h is P, so da/dx = P(u) / n and db/dx = P(g) / n. With ds/dx = -s^2 h / n:

    dF/dx = -s (c s h + b P(u) + a P(g)).

This takes one element-wise pass; automatic differentiation of the formulas above takes about fifteen. Do not use
`tf.nn.moments` or Keras' batch norm instead: they stop the gradient through mu inside the variance, so their second
derivatives are wrong (tests/test_special_grads.py).

The matrix product of tiny layers, below, needs no derivation: its two functions are each other's gradients.
"""

from typing import NamedTuple

import tensorflow as tf

EPSILON = 0.001  # tf.contrib.layers.batch_norm's default, which the original uses


def batch_norm(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor | None = None, epsilon: float = EPSILON) -> tf.Tensor:
    """Normalize each channel with the batch's mean and variance, scale by gamma and add beta; exact to second order.

    Args: x [n, width] or [n, height, width, channels]; beta and gamma [channels], gamma None: 1; all float32, or
        float64 for checks. epsilon is added to the variance.
    Return a tensor of x's shape. Statistics are over all axes but the last.
    Source: the original's utils.py (normalize): no gamma, epsilon 0.001, no moving averages.
    """
    # Differs: exact to second order. The original's formula stops a gradient, as tf.nn.moments does.
    # The fused kernels take 4-D inputs only. Small fc networks gain more from XLA, which fuses the plain operations.
    h = _normalize(x, epsilon) if x.shape.rank == 4 else normalize_plain(x, epsilon)
    return (h if gamma is None else h * gamma) + beta


def normalize_plain(x: tf.Tensor, epsilon: float = EPSILON) -> tf.Tensor:
    """Return h in plain operations that TensorFlow differentiates. The tests compare the other forms with this one."""
    axes = list(range(x.shape.rank - 1))
    centered = x - tf.reduce_mean(x, axes)
    return centered * tf.math.rsqrt(tf.reduce_mean(tf.square(centered), axes) + epsilon)


class _Statistics(NamedTuple):
    """The values that the gradients of a normalized batch need.

    mean and scale depend on x, but are not differentiated: the formulas in _project account for that.
    """

    mean: tf.Tensor  # [channels]
    scale: tf.Tensor  # [channels]  s in the formulas
    reserves: tuple  # for the kernel's gradient only; empty in float64, which the kernels lack
    epsilon: float


def _normalize(x, epsilon):
    """Return h [n, height, width, channels], with P as its gradient."""

    @tf.custom_gradient
    def normalize(x):
        if x.dtype == tf.float32:
            channels = x.shape[-1]
            out = tf.raw_ops.FusedBatchNormV3(
                x=x, scale=tf.ones([channels]), offset=tf.zeros([channels]), mean=[], variance=[], epsilon=epsilon
            )
            h, mean, reserves = (
                out.y,
                out.batch_mean,
                (out.reserve_space_1, out.reserve_space_2, out.reserve_space_3),
            )
        else:
            h, mean, reserves = normalize_plain(x, epsilon), tf.reduce_mean(x, [0, 1, 2]), ()
        # The kernel's reserved variance is inverted on a GPU, so s needs a separate reduction.
        scale = tf.math.rsqrt(tf.reduce_mean(tf.square(x - mean), [0, 1, 2]) + epsilon)
        statistics = _Statistics(mean, scale, reserves, epsilon)
        return h, lambda g: _project(g, x, statistics)

    return normalize(x)


def _project(g, x, statistics):
    """Return P(g) [n, height, width, channels], with its gradients to g and x (the second derivative above)."""

    @tf.custom_gradient
    def project(g, x):
        p_g, mean_g, mean_gh = _project_once(g, x, statistics)

        def gradient(u):
            p_u, mean_u, mean_uh = _project_once(u, x, statistics)
            mean, s = statistics.mean, statistics.scale
            c = tf.reduce_mean(u * g, [0, 1, 2]) - mean_u * mean_g - mean_uh * mean_gh
            return p_u, -(c * s * s * s * (x - mean) + s * mean_gh * p_u + s * mean_uh * p_g)

        return p_g, gradient

    return project(g, x)


def _project_once(g, x, statistics):
    """Return P(g), mean(g) and mean(g h), without gradients."""
    mean, s, reserves, epsilon = statistics
    if reserves:
        out = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=g,
            x=x,
            scale=tf.ones_like(s),
            reserve_space_1=reserves[0],
            reserve_space_2=reserves[1],
            reserve_space_3=reserves[2],
            epsilon=epsilon,
        )
        n = tf.cast(tf.size(x[..., 0]), x.dtype)
        return out.x_backprop, out.offset_backprop / n, out.scale_backprop / n
    h = (x - mean) * s
    mean_g, mean_gh = tf.reduce_mean(g, [0, 1, 2]), tf.reduce_mean(g * h, [0, 1, 2])
    return s * (g - mean_g - h * mean_gh), mean_g, mean_gh


@tf.custom_gradient
def matmul(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Multiply x [..., n, inputs] by w [..., inputs, outputs] in compiled tiny networks; differentiable to any order.

    The gradient to w is a sum of outer products, which XLA fuses with the operations on them. As a product with a
    transposed batch it takes twice as long (benchmarks/NOTES.md).
    """
    return tf.linalg.matmul(x, w), lambda g: (matmul(g, tf.linalg.matrix_transpose(w)), _outer_products(x, g))


@tf.custom_gradient
def _outer_products(x, g):
    """Return x transposed times g: the sum over n of outer products of [..., n, inputs] and [..., n, outputs]."""
    if 1 in (x.shape[-1], g.shape[-1]):  # XLA computes vectors of length 1 in a separate loop
        product = tf.linalg.matmul(x, g, transpose_a=True)
    else:
        product = tf.reduce_sum(x[..., :, None] * g[..., None, :], -3)
    return product, lambda u: (matmul(g, tf.linalg.matrix_transpose(u)), matmul(x, u))
