"""How the tasks of a meta-batch are placed on cores, in groups, and on processes, independent of the method."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from files import InputError
from utils import Weights


class Layout(NamedTuple):
    """The placement of tasks. It changes results by rounding at most.

    The same operations compute all G tasks of a group, on weights and tasks with a leading axis G. Groups are computed
    in parallel. A group of one is a task, without that axis.
    """

    cores: int = 1  # groups in parallel; on a CPU, one per core is fastest
    group: int = 1  # G; 1 on a CPU; 0: all tasks of a meta-batch
    all_sum: Callable[[tf.Tensor], tf.Tensor] | None = (
        None  # sums a float64 vector [n] over processes; None: one process
    )
    vectorize: bool = False  # for functions of one task: compute a group with tf.vectorized_map
    fused: bool = False  # tiny networks: vectorize all tasks at once, and sum in the function's dtype


def over_tasks(function: Callable, weights: Weights, tasks: object, outputs: object, layout: Layout) -> object:
    """Return function(weights, task) for each task, stacked [T, ...].

    outputs: the dtypes of the function's results, in their structure.
    """
    of_group, groups, size = _grouped(function, weights, tasks, layout)
    if groups is None:
        return of_group(tasks)
    stacked = tf.map_fn(of_group, groups, fn_output_signature=outputs, parallel_iterations=layout.cores)
    if size == 1:
        return stacked
    return tf.nest.map_structure(lambda x: tf.reshape(x, [-1, *x.shape[2:]]), stacked)


def mean_over_tasks(function: Callable, weights: Weights, tasks: object, outputs: object, layout: Layout) -> object:
    """Return the mean of function(weights, task) over the tasks of all processes.

    outputs: TensorSpecs of the function's results for one task, in their structure.

    Sums are float64 and are rounded once, to the dtypes of `outputs`, so the mean has the same bits for any placement
    of tasks on cores and processes. A float64 sum of float32 numbers is exact in any order if the largest is less than
    2^29 / T times the smallest nonzero one. Otherwise the order may change the sum by 2^-53 of its largest partial sum,
    which changes the rounded result for about one in 2^28 sums without cancellation.
    """
    if layout.fused:
        # XLA fuses the products of all tasks' gradients with this sum, but not in float64 (4.4 times slower).
        each = over_tasks(function, weights, tasks, None, layout)
        return tf.nest.map_structure(lambda x: tf.reduce_mean(x, 0), each)
    sums = sum_over_tasks(function, weights, tasks, outputs, layout)
    count = tf.cast(tf.shape(tf.nest.flatten(tasks)[-1])[0], tf.float64)
    if layout.all_sum:
        *sums, count = _as_one_vector(layout.all_sum, [*tf.nest.flatten(sums), count])
        sums = tf.nest.pack_sequence_as(outputs, sums)
    return tf.nest.map_structure(lambda total, like: tf.cast(total / count, like.dtype), sums, outputs)


def sum_over_tasks(function: Callable, weights: Weights, tasks: object, outputs: object, layout: Layout) -> object:
    """Return the sum of function(weights, task) over the tasks of this process, in float64.

    Groups are computed in parallel; only the additions are sequential. Memory does not grow with T.
    """
    of_group, groups, size = _grouped(function, weights, tasks, layout)

    def total(values):
        return tf.nest.map_structure(lambda x: tf.reduce_sum(tf.cast(x, tf.float64), 0), values)

    if groups is None:
        return total(of_group(tasks))

    def body(i, sums):
        values = of_group(tf.nest.map_structure(lambda x: x[i], groups))
        values = tf.nest.map_structure(lambda x: tf.cast(x, tf.float64), values) if size == 1 else total(values)
        return i + 1, tf.nest.map_structure(tf.add, sums, values)

    count = tf.shape(tf.nest.flatten(groups)[0])[0]
    start = tf.constant(0), tf.nest.map_structure(lambda x: tf.zeros(x.shape, tf.float64), outputs)
    return tf.while_loop(lambda i, _: i < count, body, start, parallel_iterations=layout.cores)[1]


def _grouped(function, weights, tasks, layout):
    """Return a function that computes a group, the groups [T / G, G, ...] (None for a single group), and G."""
    count = tf.nest.flatten(tasks)[0].shape[0]
    if count is None and layout.group != 1:
        raise InputError("tasks: first dimension is unknown, but groups need a fixed number of tasks; set it")
    size = layout.group or count

    def of_task(task):
        return function(weights, task)

    def of_group(group):
        if layout.vectorize:
            return tf.vectorized_map(of_task, group)
        return function({name: tf.broadcast_to(w, [size, *w.shape]) for name, w in weights.items()}, group)

    if layout.fused:
        return functools.partial(tf.vectorized_map, of_task), None, count
    if size == count > 1:
        return of_group, None, count
    if size == 1:
        return of_task, tasks, 1
    if count % size:
        raise InputError(f"tasks: {count} cannot be divided into groups of {size}; choose a divisor as the group size")
    return of_group, tf.nest.map_structure(lambda x: tf.reshape(x, [-1, size, *x.shape[1:]]), tasks), size


def _as_one_vector(function, tensors):
    """Call function on all tensors, concatenated into one vector [n], and return its result in their shapes."""
    shapes = [tensor.shape for tensor in tensors]
    vector = function(tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0))
    parts = tf.split(vector, [shape.num_elements() for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
