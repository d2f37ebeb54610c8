"""Records, losses, accuracy and statistics that two or more modules need."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from files import InputError


class Tasks(NamedTuple):
    """A meta-batch of T tasks, or one task without the leading axis, float32.

    D is [width] for vectors and [height, width, channels] for images. O is 1 for a target and N for class scores.
    """

    support_x: tf.Tensor  # [T, N * K, *D]
    support_y: tf.Tensor  # [T, N * K, O]  one-hot for classification
    query_x: tf.Tensor  # [T, N * Q, *D]
    query_y: tf.Tensor  # [T, N * Q, O]

    def checked(self, theta: "Weights") -> "Tasks":
        """Return the tasks as tensors. The checks run while a graph is traced, so they do not slow a step.

        Raise InputError if a part's dtype differs from the weights' dtype, its rank is wrong, or its numbers of tasks
        and examples do not match the other parts.
        """
        tasks = Tasks(*map(tf.convert_to_tensor, self))
        (dtype,) = {weight.dtype for weight in theta.values()}
        inputs = max(3, tasks.support_x.shape.rank, tasks.query_x.shape.rank)
        ranks = inputs, 3, inputs, 3
        for name, part, rank in zip(self._fields, tasks, ranks, strict=True):
            if part.dtype != dtype:
                raise InputError(f"{name}: is {part.dtype.name}, but the weights are {dtype.name}; convert it")
            if part.shape.rank != rank:
                raise InputError(
                    f"{name}: has shape {list(part.shape)}, but needs axes for tasks [T], examples [n], and values"
                    f"{' (one-hot for classes)' if name.endswith('y') else ''}; reshape it"
                )
        pairs = ("support_y", "support_x", 2), ("query_x", "support_x", 1), ("query_y", "query_x", 2)
        for name, other_name, axes in pairs:
            shape, other = getattr(tasks, name).shape, getattr(tasks, other_name).shape
            if not shape[:axes].is_compatible_with(other[:axes]):
                raise InputError(
                    f"{name}: has shape {list(shape)}, which does not match {list(other)} of {other_name}; give the "
                    "same tasks, and one label or target per example"
                )
        return tasks


Weights = dict[str, tf.Tensor]


class Curve(NamedTuple):
    """The effect of adaptation on each task. Column 0: support set before any update; j: query set after j updates."""

    losses: tf.Tensor  # [T, 1 + steps]
    accuracies: tf.Tensor  # [T, 1 + steps], 0 to 1; [T, 0] in regression


def mse(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Return the mean squared error over all elements of a task (the original's utils.py).

    Args: outputs and targets [n, O], which gives a scalar; or [G, n, O] for a group of tasks, which gives [G].
    Raise InputError if the shapes differ, like the other losses: TensorFlow would broadcast silently.
    """
    _check_same_shape(outputs, targets)
    return tf.reduce_mean(tf.square(outputs - targets), [-2, -1])


def xent(logits: tf.Tensor, labels: tf.Tensor, shot: int | None) -> tf.Tensor:
    """Return softmax cross-entropy in nats, summed over the examples of a task and divided by K: NOT the mean.

    On the support set of an N-way task this is N times the mean. The original's step sizes assume it.
    Args: logits and one-hot labels [n, N], which gives a scalar; or [G, n, N] for a group of tasks, which gives [G].
        shot: K, support examples per class, for support and query sets alike. None: divide each example's loss by the
        number of examples of its class. That is the same if every class has K; otherwise all classes still have the
        same weight, and alpha keeps its scale.
    Source: the original's utils.py, which divides by update_batch_size.
    """
    _check_same_shape(logits, labels)
    losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits)
    if shot is None:
        return tf.reduce_sum(losses / tf.linalg.matvec(labels, tf.reduce_sum(labels, -2)), -1)
    return tf.reduce_sum(losses, -1) / shot


def mean_xent(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return the mean softmax cross-entropy in nats over the examples of a task. Shapes as in xent.

    On a support set with K examples of each of N classes this is xent / N, so mmfewshot's step of 0.01 is a step of
    0.01 / N on xent.
    Source: open-mmlab/mmfewshot.
    """
    _check_same_shape(logits, labels)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, logits), -1)


def accuracy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return the fraction of examples, 0 to 1, whose largest logit is the label's. Shapes as in xent."""
    return tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, -1), tf.argmax(labels, -1)), logits.dtype), -1)


def _check_same_shape(outputs, labels):
    """Raise InputError unless the outputs have the shape of the labels or targets. Not part of a traced graph."""
    if not tf.TensorShape(outputs.shape).is_compatible_with(labels.shape):
        raise InputError(
            f"labels: have shape {list(labels.shape)}, but the network's outputs have shape {list(outputs.shape)}; "
            "give one-hot labels or targets with one column per output"
        )


def statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over tasks, the population standard deviation, and the half-width of the 95% confidence interval.

    Args: values [tasks, ...]. Return three arrays [...], infinite or NaN if a task diverged.
    Source: the half-width is 1.96 * std / sqrt(tasks), as in the original's main.py (test), the source of the paper's
    intervals.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    return mean, std, 1.96 * std / np.sqrt(len(values))
