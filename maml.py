"""MAML: Algorithms 1 and 2 of Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (ICML 2017).

The inner loop adapts the weights theta to one task by gradient steps on its support set. The outer loop updates theta
with Adam and the gradient of the query loss *after* adaptation: it differentiates through the inner gradients.

The functions take one task, or a group of G tasks (parallel.py). Weights and tasks then have a leading axis G, and a
loss is [G]. Each task's loss depends only on its own weights, so the gradient of their sum is each task's gradient.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from files import check_choice
from networks import Network, support_normalized
from parallel import Layout, mean_over_tasks, over_tasks
from recipe import QUERY_NORMS
from utils import Curve, Tasks, Weights

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # outputs [n, O], labels [n, O] -> scalar


class InnerLoop(NamedTuple):
    """How a task is learned: network, loss, and gradient steps."""

    network: Network
    loss: Loss
    alpha: float  # step size
    steps: int  # J, in training
    first_order: bool = False  # treat inner gradients as constants in the outer gradient (section 5.2)


def prepare(inner: InnerLoop, theta: Weights, task: Tasks) -> Tasks:
    """Return the task for inner_step: its inputs replaced by features if the inner loop does not change the body."""
    return task._replace(support_x=inner.network.features(theta, task.support_x))


def inner_step(inner: InnerLoop, theta: Weights, task: Tasks, j: int | tf.Tensor) -> Weights:
    """Return theta - alpha * gradient of the support loss (Algorithm 2, lines 6 and 7), after j earlier steps."""
    network = inner.network
    phi = {name: theta[name] for name in network.adapted or theta}
    with tf.GradientTape() as tape:
        tape.watch(phi)
        loss = inner.loss(network.outputs(theta | phi, task.support_x), task.support_y)
    gradient = tape.gradient(loss, phi, unconnected_gradients="zero")
    if inner.first_order:
        gradient = tf.nest.map_structure(tf.stop_gradient, gradient)
    alpha = {name: network.step_size(theta, name, j) if network.step_size else inner.alpha for name in phi}
    return theta | {name: phi[name] - alpha[name] * gradient[name] for name in phi}


def adapt(inner: InnerLoop, theta: Weights, task: Tasks, steps: int) -> Weights:
    """Return the weights after `steps` inner steps, differentiable in theta."""
    task = prepare(inner, theta, task)
    for j in range(steps):
        theta = inner_step(inner, theta, task, j)
    return theta


def query_loss(inner: InnerLoop, theta: Weights, task: Tasks) -> tf.Tensor:
    """Return a task's query loss after J inner steps: one term of the outer sum (Algorithm 2, line 10)."""
    return inner.loss(inner.network.apply(adapt(inner, theta, task, inner.steps), task.query_x), task.query_y)


def support_loss(inner: InnerLoop, theta: Weights, task: Tasks) -> tf.Tensor:
    """Return a task's support loss before any inner step, which pretraining minimizes."""
    return inner.loss(inner.network.apply(theta, task.support_x), task.support_y)


def meta_gradient(
    task_loss: Callable[[Weights, Tasks], tf.Tensor], theta: Weights, tasks: Tasks, layout: Layout
) -> tuple[Weights, tf.Tensor]:
    """Return the gradient of the mean task loss with respect to theta, and that loss.

    Each task or group computes its gradient inside the loop over tasks, so no backward pass goes through that loop, and
    memory holds the activations of one group per core.
    """

    def gradient_and_loss(theta, task):
        with tf.GradientTape() as tape:
            tape.watch(theta)
            loss = task_loss(theta, task)
        return tape.gradient(loss, theta, unconnected_gradients="zero"), loss

    shapes = tf.nest.map_structure(tf.TensorSpec.from_tensor, theta), tf.TensorSpec([], tasks.query_x.dtype)
    return mean_over_tasks(gradient_and_loss, theta, tasks, shapes, layout)


def adaptation_curve(
    inner: InnerLoop,
    theta: Weights,
    task: Tasks,
    steps: int,
    accuracy: Loss | None = None,
    query_norm: str = "batch",
    unroll: bool = False,
) -> Curve:
    """Return a task's support loss before any inner step, its query loss after each of `steps`, and the accuracies.

    query_norm: 'batch' normalizes a query image with the task's other queries (transductive, as in the paper),
    'support' with the support set (networks.support_normalized). unroll: avoid tf.while_loop (slow when vectorized).
    """
    network, group_axes = inner.network, task.query_y.shape.rank - 2
    prepared, query_x = prepare(inner, theta, task), network.features(theta, task.query_x)

    def measured(outputs, labels):
        return tf.stack([measure(outputs, labels) for measure in (inner.loss, accuracy) if measure], -1)

    def step(j, theta, rows):
        theta = inner_step(inner, theta, prepared, j)
        if query_norm == "support":
            outputs = support_normalized(network, theta, task.support_x, task.query_x, group_axes)
        else:
            outputs = network.outputs(theta, query_x)
        return j + 1, theta, rows.write(j + 1, measured(outputs, task.query_y))

    before = measured(network.apply(theta, task.support_x), task.support_y)
    state = 0, theta, tf.TensorArray(before.dtype, 1 + steps, element_shape=before.shape).write(0, before)
    if unroll:
        for _ in range(steps):
            state = step(*state)
    else:
        state = tf.while_loop(lambda j, *_: j < steps, step, state)
    rows = state[-1].stack()  # [1 + steps, (G,) measures]
    losses = tf.transpose(rows[..., 0])
    return Curve(losses, tf.transpose(rows[..., 1]) if accuracy else losses[..., :0])


class Adam(tf.Module):
    """TensorFlow 1's Adam, with its kernel: w -= rate * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)."""

    def __init__(self, weights: dict[str, tf.Variable], rate: float):
        super().__init__(name="adam")
        self.weights, self.rate = weights, rate
        self.m = {name: tf.Variable(tf.zeros_like(w), name=f"m_{name}") for name, w in weights.items()}
        self.v = {name: tf.Variable(tf.zeros_like(w), name=f"v_{name}") for name, w in weights.items()}
        self.updates = tf.Variable(0, dtype=tf.int64, name="updates")

    def apply(self, gradient: Weights) -> None:
        """Update every weight once. b1 = 0.9, b2 = 0.999, eps = 1e-8: TensorFlow 1's defaults, as in the original."""
        t = tf.cast(self.updates.assign_add(1), tf.float32)
        for name, weight in self.weights.items():
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=self.m[name].handle,
                v=self.v[name].handle,
                beta1_power=tf.cast(tf.pow(0.9, t), weight.dtype),
                beta2_power=tf.cast(tf.pow(0.999, t), weight.dtype),
                lr=tf.constant(self.rate, weight.dtype),
                beta1=tf.constant(0.9, weight.dtype),
                beta2=tf.constant(0.999, weight.dtype),
                epsilon=tf.constant(1e-8, weight.dtype),
                grad=gradient[name],
            )


class MAML(tf.Module):
    """All training state: the meta-learned weights, the moments of both optimizers, and the step.

    train_step(tasks) takes one Adam step on the tasks' mean query_loss, clipped if `clip` is set. pretrain_step(tasks)
    takes one on their mean support_loss, with separate moments and no clipping. Both return that loss and the norm of
    its gradient before clipping. They are tf.functions, and so are many_steps and evaluate (see below).
    """

    def __init__(
        self,
        inner: InnerLoop,
        accuracy: Loss | None = None,
        *,
        meta_lr: float = 0.001,
        clip: float | None = None,
        seed: int = 0,
        layout: Layout = Layout(),  # noqa: B008  a constant
    ):
        """Initialize the weights from `seed`, and the moments and the step to 0.

        accuracy: (outputs [n, O], labels [n, O]) -> scalar; None in regression. meta_lr: beta, Adam's learning rate.
        clip: bound on the absolute value of each element of the meta-gradient, or None.
        """
        super().__init__(name="maml")
        self.inner, self.accuracy, self.clip = inner, accuracy, clip
        self.layout = layout._replace(vectorize=not inner.network.takes_groups, fused=inner.network.steps_a_call > 1)
        self.weights = {name: tf.Variable(value, name=name) for name, value in inner.network.init(seed).items()}
        self.meta_optimizer = Adam(self.weights, meta_lr)
        self.pretrain_optimizer = Adam(self.weights, meta_lr)
        self.step = tf.Variable(0, dtype=tf.int64, name="step")  # outer steps done, pretraining included
        # Not decorators: those hold their object weakly, so MAML(...).train_step(tasks) would fail.
        graph = functools.partial(tf.function, autograph=False)
        self.train_step = graph(functools.partial(self._step, pretrain=False))
        self.pretrain_step = graph(functools.partial(self._step, pretrain=True))
        self.many_steps = graph(self._many_steps, jit_compile=True)
        self.evaluate = graph(self._evaluate)

    @property
    def state(self) -> dict[str, tf.Variable]:
        """The variables that a step changes, by checkpoint key; weights have the original's names."""
        state = {key: self.weights[name] for name, key in self.keys.items()} | {"step": self.step}
        for prefix, adam in (("", self.meta_optimizer), ("pretrain/", self.pretrain_optimizer)):
            for name, key in self.keys.items():
                state |= {f"{prefix}{key}/Adam": adam.m[name], f"{prefix}{key}/Adam_1": adam.v[name]}
            state[f"{prefix}updates"] = adam.updates
        return state

    @property
    def keys(self) -> dict[str, str]:
        """The checkpoint key of each weight, by name."""
        return self.inner.network.keys(self.weights)

    def values(self) -> Weights:
        """Return the meta-learned weights as tensors."""
        return {name: tf.convert_to_tensor(variable) for name, variable in self.weights.items()}

    def _step(self, tasks: Tasks, pretrain: bool) -> tuple[tf.Tensor, tf.Tensor]:
        theta = self.values()
        loss_of = functools.partial(support_loss if pretrain else query_loss, self.inner)
        gradient, loss = meta_gradient(loss_of, theta, Tasks(*tasks).checked(theta), self.layout)
        norm = tf.linalg.global_norm(list(gradient.values()))
        if self.clip is not None and not pretrain:
            gradient = {name: tf.clip_by_value(g, -self.clip, self.clip) for name, g in gradient.items()}
        (self.pretrain_optimizer if pretrain else self.meta_optimizer).apply(gradient)
        self.step.assign_add(1)
        return loss, norm

    def _many_steps(self, tasks: Tasks, first: tf.Tensor, count: tf.Tensor, pretrain: bool) -> tf.Tensor:
        """Take a step on each meta-batch first .. first + count - 1 of a stack, in one program, for tiny networks.

        tasks: with an extra leading axis. first, count: integer scalar tensors, so that the program is compiled once.
        Return the norm of the first step's gradient, a scalar.
        """

        def body(i, norm):
            meta_batch = tf.nest.map_structure(lambda x: x[first + i], tasks)
            _, this_norm = self._step(meta_batch, pretrain)
            return i + 1, tf.where(i == 0, this_norm, norm)

        start = tf.zeros([], count.dtype), tf.zeros([], tasks.query_x.dtype)
        return tf.while_loop(lambda i, _: i < count, body, start)[1]

    def _evaluate(self, tasks: Tasks, steps: int, query_norm: str = "batch") -> Curve:
        """Return every task's adaptation_curve, stacked: losses and accuracies [T, 1 + steps]. No state changes."""
        check_choice("query_norm", query_norm, QUERY_NORMS)
        theta, dtype = self.values(), tasks.query_x.dtype
        unroll = self.layout.fused or (self.layout.vectorize and self.layout.group != 1)

        def curve(theta, task):
            return adaptation_curve(self.inner, theta, task, steps, self.accuracy, query_norm, unroll)

        return over_tasks(curve, theta, Tasks(*tasks).checked(theta), Curve(dtype, dtype), self.layout)
