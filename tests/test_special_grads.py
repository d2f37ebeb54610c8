"""Hand-written gradients to second order, against autodiff and finite differences of the plain formula."""

import numpy as np
import pytest
import tensorflow as tf

import special_grads

KERNEL_SHAPES = [(5, 4, 3, 2), (7, 1, 1, 3), (1, 6, 5, 4)]
SHAPES = [*KERNEL_SHAPES, (12, 3)]  # the last uses the plain formula


def batch(shape, dtype, scale=2.0, offset=1.0, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(offset, scale, shape), dtype)


def plain_batch_norm(x, beta):
    return special_grads.normalize_plain(x) + beta


def library_batch_norm(x, beta):
    mean, variance = getattr(tf.nn, "moments")(x, list(range(x.shape.rank - 1)))  # noqa: B009
    return tf.nn.batch_normalization(x, mean, variance, beta, None, special_grads.EPSILON)


def derivatives(norm, x, beta, g, u):
    """Return y, the first derivatives of sum(relu(y) * g), and their derivatives along u with respect to x, g, beta."""
    with tf.GradientTape() as outer:
        outer.watch([x, beta, g])
        with tf.GradientTape() as inner:
            inner.watch([x, beta])
            y = norm(x, beta)
            total = tf.reduce_sum(tf.nn.relu(y) * g)  # the ReLU makes beta matter to second order
        first_x, first_beta = inner.gradient(total, [x, beta])
        again = tf.reduce_sum(first_x * u) + tf.reduce_sum(first_beta * u[0])
    second = outer.gradient(again, [x, g, beta], unconnected_gradients="zero")
    return [y, first_x, first_beta, *second]


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
@pytest.mark.parametrize("graph", [False, True])
def test_batch_norm_equals_autodiff_of_the_plain_formula(shape, dtype, tolerance, graph):
    x, g, u = batch(shape, dtype), batch(shape, dtype, 1.0, 0.3, 1), batch(shape, dtype, 1.0, 0.0, 2)
    beta = batch(shape[-1:], dtype, 0.5, 0.0, 3)

    def both():
        return derivatives(special_grads.batch_norm, x, beta, g, u), derivatives(plain_batch_norm, x, beta, g, u)

    ours, plain = tf.function(both)() if graph else both()
    for value, expected in zip(ours, plain, strict=True):
        scale = max(1.0, float(tf.norm(expected)))
        assert float(tf.norm(value - expected)) / scale < tolerance


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 5e-5)])
@pytest.mark.parametrize("shape", KERNEL_SHAPES[:2])
def test_gamma_and_epsilon_equal_autodiff_of_the_plain_formula(shape, dtype, tolerance):
    """Gamma is a function of beta here, so the derivatives to beta cover both."""
    x, g, u = batch(shape, dtype), batch(shape, dtype, 1.0, 0.3, 1), batch(shape, dtype, 1.0, 0.0, 2)
    beta = batch(shape[-1:], dtype, 0.5, 0.0, 3)

    def ours(x, beta):
        return special_grads.batch_norm(x, beta, 1.5 + beta**2, 1e-5)

    def plain(x, beta):
        return special_grads.normalize_plain(x, 1e-5) * (1.5 + beta**2) + beta

    for value, expected in zip(*(derivatives(norm, x, beta, g, u) for norm in (ours, plain)), strict=True):
        assert float(tf.norm(value - expected)) / max(1.0, float(tf.norm(expected))) < tolerance
    assert not np.allclose(ours(x, beta), special_grads.batch_norm(x, beta, 1.5 + beta**2), rtol=1e-6)


FIRST, SECOND = 1e-7, 1e-6  # maximum relative errors


def finite_difference_errors(shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the relative errors of batch norm's first derivative and second derivatives along a direction, in float64.

    The reference is the central difference of the value, and of the first derivatives.
    """
    x, g, u = batch(shape, "float64"), batch(shape, "float64", 1.0, 0.3, 1), batch(shape, "float64", 1.0, 0.0, 2)
    beta = batch(shape[-1:], "float64", 0.5, 0.0, 3)

    def first(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(special_grads.batch_norm(x, beta) ** 3 * g)
        return total, tape.gradient(total, x)

    step = 1e-5
    (above, gradient_above), (below, gradient_below) = first(x + step * u), first(x - step * u)
    with tf.GradientTape() as tape:
        tape.watch(x)
        directional = tf.reduce_sum(first(x)[1] * u)
    hessian_times_u = tape.gradient(directional, x)
    first_error = abs((above - below) / (2 * step) / directional - 1)
    difference = (gradient_above - gradient_below) / (2 * step)
    second_error = np.abs(difference - hessian_times_u).max() / np.abs(difference).max()
    return float(first_error), float(second_error)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_agrees_with_finite_differences_to_second_order(shape):
    first, second = finite_difference_errors(shape)
    assert first < FIRST and second < SECOND


def test_output_has_unit_deviation_and_mean_beta():
    x, beta = batch((50, 4, 4, 3), "float32", 3.0, 7.0), tf.constant([0.0, 1.0, -2.0])
    y = special_grads.batch_norm(x, beta).numpy()
    np.testing.assert_allclose(y.mean((0, 1, 2)), beta, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
    assert y.dtype == np.float32


def test_tf_nn_moments_has_wrong_second_derivatives():
    """Why special_grads.py exists: tf.nn.moments stops the gradient through the mean inside the variance."""
    shape = (5, 4, 3, 2)
    x, g, u = batch(shape, "float64"), batch(shape, "float64", 1.0, 0.3, 1), batch(shape, "float64", 1.0, 0.0, 2)
    beta = batch((2,), "float64", 0.5, 0.0, 3)
    ours, theirs = (derivatives(norm, x, beta, g, u) for norm in (special_grads.batch_norm, library_batch_norm))
    for value, expected in zip(theirs[:3], ours[:3], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    assert float(tf.norm(theirs[3] - ours[3]) / tf.norm(ours[3])) > 0.01


@pytest.mark.parametrize("n, inputs, outputs", [(5, 3, 4), (5, 1, 4), (5, 3, 1), (1, 1, 1)])
def test_tiny_matmul_equals_tensorflow_to_second_order(n, inputs, outputs):
    x, w, g = batch((n, inputs), "float64"), batch((inputs, outputs), "float64", seed=1), batch((n, outputs), "float64")
    u, v = batch((n, inputs), "float64", seed=2), batch((inputs, outputs), "float64", seed=3)
    for product in (special_grads.matmul, tf.linalg.matmul):
        with tf.GradientTape() as outer:
            outer.watch([x, w, g])
            with tf.GradientTape() as inner:
                inner.watch([x, w])
                y = product(x, w)
            first = inner.gradient(y, [x, w], output_gradients=g * y)
            again = tf.reduce_sum(first[0] * u) + tf.reduce_sum(first[1] * v)
        values = [y, *first, *outer.gradient(again, [x, w, g])]
        if product is special_grads.matmul:
            ours = values
    for value, expected in zip(ours, values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
