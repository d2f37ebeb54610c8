"""The policy: a normal distribution of actions, whose mean is a network's output."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from networks import Network
from utils import Weights

LOG_2_PI = float(np.log(2 * np.pi))


def gaussian(observation_size: int, action_size: int, hidden: tuple[int, int] = (100, 100)) -> Network:
    """Two hidden layers of ReLUs, whose linear output is the mean; one log standard deviation for each action.

    apply: observations [n, O] -> [n, 2 * A], means and log standard deviations. Weight matrices begin uniform within
    +-sqrt(6 / (inputs + outputs)) (Xavier), biases and log standard deviations at 0. The inner loop changes all.
    Differs: the original's standard deviations end at 1e-6, which none comes near.
    Source: paper section 5.3; cbfinn/maml_rl, maml_minimal_gauss_mlp_policy.py.
    """
    widths = [observation_size, *hidden, action_size]
    layers = 1, 2, 3

    def init(seed: int) -> Weights:
        weights = {}
        for layer in layers:
            shape = widths[layer - 1], widths[layer]
            limit = (6 / sum(shape)) ** 0.5
            weights[f"w{layer}"] = tf.random.stateless_uniform(shape, (seed, layer), -limit, limit, alg="philox")
            weights[f"b{layer}"] = tf.zeros(shape[1:])
        return weights | {"log_std": tf.zeros(action_size)}

    def apply(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        for layer in (1, 2):
            x = tf.nn.relu(tf.linalg.matmul(x, weights[f"w{layer}"]) + weights[f"b{layer}"])
        means = tf.linalg.matmul(x, weights["w3"]) + weights["b3"]
        return tf.concat([means, tf.broadcast_to(weights["log_std"], tf.shape(means))], -1)

    names = (*(f"{kind}{layer}" for layer in layers for kind in "wb"), "log_std")
    return Network(init, apply, names)


def act(weights: dict[str, np.ndarray], observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The policy of each task in NumPy, for rollouts. A step there is too small for TensorFlow's calls.

    Args: weights with a leading axis T, observations [T, n, O]. Returns means and log standard deviations, [T, n, A]
    and [T, 1, A].
    """
    x = observations
    for layer in (1, 2):
        x = np.maximum(x @ weights[f"w{layer}"] + weights[f"b{layer}"][:, None], 0)
    return x @ weights["w3"] + weights["b3"][:, None], weights["log_std"][:, None]


def log_probability(outputs: tf.Tensor, actions: tf.Tensor) -> tf.Tensor:
    """Log density [n] of actions [n, A] under the policy's outputs [n, 2 * A]."""
    means, log_stds = tf.split(outputs, 2, -1)
    normal = (actions - means) * tf.exp(-log_stds)
    return -tf.reduce_sum(0.5 * tf.square(normal) + log_stds + 0.5 * LOG_2_PI, -1)


def divergence(before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """Kullback-Leibler divergence [n], in nats, of the policy's outputs `after` from those `before`, [n, 2 * A]."""
    (means, log_stds), (new_means, new_log_stds) = tf.split(before, 2, -1), tf.split(after, 2, -1)
    squares = tf.exp(2 * log_stds) + tf.square(means - new_means)
    return tf.reduce_sum(0.5 * squares * tf.exp(-2 * new_log_stds) + new_log_stds - log_stds - 0.5, -1)


class Experience(NamedTuple):
    """What a policy did in T tasks (or in one task, without the leading axis), and what came of it."""

    actions: tf.Tensor  # [T, n, A]
    advantages: tf.Tensor  # [T, n], 0 on padding
    shares: tf.Tensor  # [T, n], 1 / (transitions of the task); 0 on padding


def policy_gradient(outputs: tf.Tensor, experience: Experience) -> tf.Tensor:
    """The loss of the inner loop, a scalar: minus the mean over transitions of advantage * log probability."""
    weights = experience.shares * experience.advantages
    return -tf.reduce_sum(weights * log_probability(outputs, experience.actions))
