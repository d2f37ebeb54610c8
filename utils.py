"""Records, losses, accuracy and statistics that two or more modules need."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from files import InputError


class Tasks(NamedTuple):
    """A meta-batch of T tasks (or one task, without the leading axis), float32.

    D is [width] for vectors and [height, width, channels] for images; O is one target or N class scores.
    """

    support_x: tf.Tensor  # [T, N * K, *D]
    support_y: tf.Tensor  # [T, N * K, O]  one-hot for classification
    query_x: tf.Tensor  # [T, N * Q, *D]
    query_y: tf.Tensor  # [T, N * Q, O]

    def checked(self, theta: "Weights") -> "Tasks":
        """Return the tasks as tensors. It runs while a graph is traced, so it costs a step nothing.

        Raise InputError if a part has another dtype or rank than the weights need, or another number of tasks or
        examples than the part it belongs to.
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
                    f"{name}: has shape {list(part.shape)}, but tasks [T], examples [n], and at least one more axis "
                    f"are needed{', one-hot for classes' if name.endswith('y') else ''}; reshape it"
                )
        pairs = ("support_y", "support_x", 2), ("query_x", "support_x", 1), ("query_y", "query_x", 2)
        for name, beside, axes in pairs:
            shape, other = getattr(tasks, name).shape, getattr(tasks, beside).shape
            if not shape[:axes].is_compatible_with(other[:axes]):
                raise InputError(
                    f"{name}: has shape {list(shape)}, which does not match {list(other)} of {beside}; give the same "
                    "tasks, and one label or target per example"
                )
        return tasks


Weights = dict[str, tf.Tensor]


class Curve(NamedTuple):
    """What adaptation does to each task. Column 0: support set before any update; j: query set after j updates."""

    losses: tf.Tensor  # [T, 1 + steps]
    accuracies: tf.Tensor  # [T, 1 + steps], 0 to 1; [T, 0] where there are no classes


def mse(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Mean squared error over every element of a task (the original's utils.py).

    Args: outputs and targets [n, O], which gives a scalar, or [G, n, O] of a group of tasks, which gives [G].
    Raises InputError where their shapes differ, as do the other losses: TensorFlow would repeat one to fit the other.
    """
    _check_alike(outputs, targets)
    return tf.reduce_mean(tf.square(outputs - targets), [-2, -1])


def xent(logits: tf.Tensor, labels: tf.Tensor, shot: int | None) -> tf.Tensor:
    """Softmax cross-entropy in nats, summed over the examples of a task and divided by K: NOT the mean.

    On the support set of an N-way task it is N times the mean; the original's step sizes are meant for it.
    Args: logits [n, N] and labels one-hot [n, N], which give a scalar, or [G, n, N] of a group of tasks, which give
        [G]; shot K, support examples a class, for support and query alike. None: every example is divided by the number
        of examples that its own class has here. With K of each class that is the same number; with uneven ones every
        class still weighs as much as every other, and alpha keeps its scale.
    Source: the original's utils.py, where update_batch_size is the divisor.
    """
    _check_alike(logits, labels)
    losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits)
    if shot is None:
        return tf.reduce_sum(losses / tf.linalg.matvec(labels, tf.reduce_sum(labels, -2)), -1)
    return tf.reduce_sum(losses, -1) / shot


def mean_xent(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Softmax cross-entropy in nats, the mean over the examples of a task.

    On a support set, K examples of each of N classes, it is xent / N. So mmfewshot's step of 0.01 on it is a step of
    0.01 / N on xent. Shapes as in xent.
    Source: open-mmlab/mmfewshot.
    """
    _check_alike(logits, labels)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, logits), -1)


def accuracy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Computes the share of examples, 0 to 1, whose largest logit is the label's. Shapes as in xent."""
    return tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, -1), tf.argmax(labels, -1)), logits.dtype), -1)


def _check_alike(outputs, labels):
    """Checks that outputs and labels, or targets, have one shape. It runs while a graph is traced: a step is as fast.

    Raises InputError where they have not.
    """
    if not tf.TensorShape(outputs.shape).is_compatible_with(labels.shape):
        raise InputError(
            f"the network's outputs have the shape {list(outputs.shape)} and the labels or targets "
            f"{list(labels.shape)}: give one-hot labels of as many classes, or as many targets"
        )


def statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes mean, population standard deviation, and half width of the mean's 95 % interval, over tasks.

    Args: values [tasks, ...].
    Returns three arrays [...]. Where a task diverged they are infinite or nan.
    Source: the half width is 1.96 * std / sqrt(tasks) in the original's main.py (test), where published intervals come
    from.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    return mean, std, 1.96 * std / np.sqrt(len(values))
