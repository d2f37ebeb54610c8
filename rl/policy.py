"""The policy: a Gaussian over actions whose mean is a network's output."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from networks import Network
from utils import Weights

LOG_2_PI = float(np.log(2 * np.pi))


def gaussian(observation_size: int, action_size: int, hidden: tuple[int, int] = (100, 100)) -> Network:
    """Return a policy network: two hidden ReLU layers, a linear mean, and one log standard deviation per action.

    apply: observations [n, O] -> [n, 2 * A], means and log standard deviations. Weight matrices are initialized
    uniformly within +-sqrt(6 / (inputs + outputs)) (Xavier), biases and log standard deviations to 0. The inner loop
    adapts all weights.
    Differs: the original has a floor of 1e-6 on standard deviations, which is never reached.
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
    """Return means [T, n, A] and log standard deviations [T, 1, A] of each task's policy.

    In NumPy, because one step of a rollout is too small to pay for a TensorFlow call.
    weights: with a leading axis T. observations: [T, n, O].
    """
    x = observations
    for layer in (1, 2):
        x = np.maximum(x @ weights[f"w{layer}"] + weights[f"b{layer}"][:, None], 0)
    return x @ weights["w3"] + weights["b3"][:, None], weights["log_std"][:, None]


def log_probability(outputs: tf.Tensor, actions: tf.Tensor) -> tf.Tensor:
    """Return the log density [n] of actions [n, A] under the policy's outputs [n, 2 * A]."""
    means, log_stds = tf.split(outputs, 2, -1)
    normal = (actions - means) * tf.exp(-log_stds)
    return -tf.reduce_sum(0.5 * tf.square(normal) + log_stds + 0.5 * LOG_2_PI, -1)


def divergence(before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """Return KL(before || after) [n], in nats, for policy outputs [n, 2 * A]."""
    (means, log_stds), (new_means, new_log_stds) = tf.split(before, 2, -1), tf.split(after, 2, -1)
    squares = tf.exp(2 * log_stds) + tf.square(means - new_means)
    return tf.reduce_sum(0.5 * squares * tf.exp(-2 * new_log_stds) + new_log_stds - log_stds - 0.5, -1)


class Experience(NamedTuple):
    """Actions in T tasks and their advantages. For one task there is no leading axis."""

    actions: tf.Tensor  # [T, n, A]
    advantages: tf.Tensor  # [T, n], 0 on padding
    shares: tf.Tensor  # [T, n], 1 / (the task's number of transitions); 0 on padding


def policy_gradient(outputs: tf.Tensor, experience: Experience) -> tf.Tensor:
    """Return the inner loss, a scalar: minus the mean over transitions of advantage * log probability."""
    weights = experience.shares * experience.advantages
    return -tf.reduce_sum(weights * log_probability(outputs, experience.actions))
