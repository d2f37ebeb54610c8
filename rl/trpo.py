"""MAML whose outer step is TRPO's (paper section 5.3 and Algorithm 3).

The inner step is maml.py's, on the loss of policy.policy_gradient. The outer step goes down the surrogate, through the
inner step, by natural gradient: the direction is that of the conjugate gradient method on the Fisher matrix of the
adapted policies, as a function of the weights before the inner step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml import InnerLoop, adapt, meta_gradient
from parallel import Layout, over_tasks
from rl import curvature
from rl.environments import Environment
from rl.policy import Experience, act, divergence, log_probability
from rl.rollouts import Rollouts, advantages, collect
from utils import Weights

# cbfinn/maml_rl, conjugate_gradient_optimizer.py and krylov.py
CONJUGATE_STEPS = 10
LEAST_RESIDUAL = 1e-10  # squared norm at which they end early
DAMPING = 1e-5  # times the identity, added to the Fisher matrix
BACKTRACKS, RATIO = 15, 0.8  # of the line search


class MetaBatch(NamedTuple):
    """What was done in T tasks (or in one, without the leading axis), before and after the inner step."""

    support_x: tf.Tensor  # [T, n, O], observations under the meta-learned policy
    support_y: Experience
    query_x: tf.Tensor  # [T, m, O], observations under each task's adapted policy
    query_y: Experience
    adapted: Weights  # [T, ...] each


class Update(NamedTuple):
    """What an outer step did."""

    surrogate_before: float  # minus the mean advantage: lower is better
    surrogate: float  # at the weights that were kept
    divergence: float  # of the adapted policies, in nats, mean over tasks of the mean over transitions
    backtracks: int  # of the line search; BACKTRACKS: no step was good, and the weights stayed
    seconds: dict[str, float]  # that its parts took: gradient, fisher_products, line_search


class MetaTRPO(tf.Module):
    """The meta-learned policy and the step: MAML's inner loop with another outer step."""

    def __init__(self, inner: InnerLoop, *, bound: float, seed: int, cores: int = 1):
        """inner: of 1 step, or of 0, which trains one policy for all tasks. bound: on a step's divergence, in nats."""
        super().__init__(name="meta_trpo")
        self.inner, self.bound, self.layout = inner, bound, Layout(cores)
        self.weights = {name: tf.Variable(value, name=name) for name, value in inner.network.init(seed).items()}
        self.step = tf.Variable(0, dtype=tf.int64, name="step")  # outer steps done
        w1, log_std = self.weights["w1"], self.weights["log_std"]

        def spec(*shape):
            return tf.TensorSpec(shape, w1.dtype)

        x = spec(None, None, w1.shape[0])
        did = Experience(spec(None, None, log_std.shape[0]), spec(None, None), spec(None, None))
        weights = {name: spec(*weight.shape) for name, weight in self.weights.items()}
        tasks_weights = {name: spec(None, *weight.shape) for name, weight in self.weights.items()}
        batch = MetaBatch(x, did, x, did, tasks_weights)

        def traced(function, *signature):
            return tf.function(function, autograph=False, input_signature=signature)

        self.adapt_each = traced(self._adapt_each, tasks_weights, x, did, spec())
        self.surrogate_gradient = traced(self._surrogate_gradient, batch)
        self.surrogate_at = traced(self._surrogate_at, weights, batch)

    @property
    def keys(self) -> dict[str, str]:
        """The key of each weight in a checkpoint, by its name."""
        return self.inner.network.keys(self.weights)

    @property
    def state(self) -> dict[str, tf.Variable]:
        """All that a step changes, by its key in a checkpoint."""
        return {key: self.weights[name] for name, key in self.keys.items()} | {"step": self.step}

    def values(self) -> Weights:
        """Read the meta-learned weights."""
        return {name: tf.convert_to_tensor(variable) for name, variable in self.weights.items()}

    # -- the inner loop -----------------------------------------------------------------------------------------------

    def before(self, tasks: int) -> dict[str, np.ndarray]:
        """The meta-learned weights, once for each task, [T, ...]."""
        return {name: np.repeat(weight.numpy()[None], tasks, 0) for name, weight in self.weights.items()}

    def rollouts(
        self, environment: Environment, weights: Weights, goals: np.ndarray, count: int, random: np.random.Generator
    ) -> Rollouts:
        """Those of each task's own weights [T, ...], as rollouts.collect."""
        return collect(environment, lambda observations: act(weights, observations), goals, count, random)

    def inner_step(self, weights: Weights, x: tf.Tensor, did: Experience, factor: float = 1.0) -> dict[str, np.ndarray]:
        """Each task's weights [T, ...] after one step, of size factor * alpha, on what it did under them.

        x: the observations [T, n, O].
        """
        after = self.adapt_each(weights, x, did, tf.constant(factor, x.dtype))
        return {name: weight.numpy() for name, weight in after.items()}

    def curve(
        self,
        environment: Environment,
        goals: np.ndarray,
        count: int,
        sizes: Sequence[float],
        random: np.random.Generator,
    ) -> Iterator[Rollouts]:
        """The tasks' rollouts before any update and after each, which learns from those before it.

        sizes: of the updates, times alpha.
        """
        weights = self.before(len(goals))
        yield (did := self.rollouts(environment, weights, goals, count, random))
        for size in sizes:
            weights = self.inner_step(weights, *self._tensors(did), size)
            yield (did := self.rollouts(environment, weights, goals, count, random))

    def _adapt_each(self, weights, x, did, factor):
        def step(_, task):
            own, x, did = task
            after = adapt(self.inner, own, MetaBatch(x, did, None, None, None), 1)
            return {name: own[name] + factor * (after[name] - own[name]) for name in own}

        dtypes = {name: weight.dtype for name, weight in weights.items()}
        return over_tasks(step, {}, (weights, x, did), dtypes, self.layout)

    def _tensors(self, did):
        """Of Rollouts, the observations and the Experience."""
        parts = did.actions, advantages(did), did.shares
        x, *parts = (tf.constant(part, self.weights["w1"].dtype) for part in (did.observations, *parts))
        return x, Experience(*parts)

    # -- the outer step -----------------------------------------------------------------------------------------------

    def gather(
        self, environment: Environment, goals: np.ndarray, count: int, random: np.random.Generator
    ) -> tuple[MetaBatch, list[Rollouts]]:
        """The tasks' rollouts before and after the inner step: what an outer step learns from.

        Without inner steps the rollouts are one set, and stand for both.
        """
        weights = self.before(len(goals))
        did = [self.rollouts(environment, weights, goals, count, random)]
        support = query = self._tensors(did[0])
        if self.inner.steps:
            weights = self.inner_step(weights, *support)
            did.append(self.rollouts(environment, weights, goals, count, random))
            query = self._tensors(did[1])
        return MetaBatch(*support, *query, tf.nest.map_structure(tf.constant, weights)), did

    def outer_step(self, batch: MetaBatch) -> Update:
        """Moves the weights once, unless no step in the direction improves the surrogate within the bound."""
        times = [time.perf_counter()]
        gradient, before = self.surrogate_gradient(batch)
        gradient = self.flat(gradient)
        times.append(time.perf_counter())
        with self.fisher_product(batch) as product:
            direction, residual = conjugate_gradients(product, gradient)
        times.append(time.perf_counter())
        # The quadratic form of the direction, by what the method knows: product(direction) = gradient - residual.
        length = direction @ (gradient - residual)
        step = np.sqrt(2 * self.bound / (length + 1e-8)) * direction
        old, before = self.flat(self.values()), float(before)
        self.step.assign_add(1)
        for backtracks in range(BACKTRACKS):
            new = self.unflat(old - RATIO**backtracks * step)
            surrogate, moved = (float(value) for value in self.surrogate_at(new, batch))
            if surrogate < before and moved <= self.bound:
                for name, value in new.items():
                    self.weights[name].assign(value)
                break
        else:
            surrogate, moved, backtracks = before, 0.0, BACKTRACKS
        times.append(time.perf_counter())
        parts = ("gradient", "fisher_products", "line_search")
        seconds = {part: end - start for part, (start, end) in zip(parts, pairwise(times), strict=True)}
        return Update(before, surrogate, moved, backtracks, seconds)

    def _surrogate_gradient(self, batch):
        def surrogate(weights, task):
            return self.surrogate_and_divergence(weights, task)[0]

        return meta_gradient(surrogate, self.values(), batch, self.layout)

    def surrogate_and_divergence(self, weights: Weights, task: MetaBatch) -> tuple[tf.Tensor, tf.Tensor]:
        """Of one task, two scalars, differentiable to the weights before the inner step.

        Minus the mean, over its transitions after the inner step, of the advantage times the likelihood ratio of the
        adapted policy to the one that took them; and the mean divergence from that.
        """
        apply = self.inner.network.apply
        own = apply(task.adapted, task.query_x)
        new = apply(adapt(self.inner, weights, task, self.inner.steps), task.query_x)
        did = task.query_y
        ratio = tf.exp(log_probability(new, did.actions) - log_probability(own, did.actions))
        surrogate = -tf.reduce_sum(did.shares * did.advantages * ratio)
        return surrogate, tf.reduce_sum(did.shares * divergence(own, new))

    def _surrogate_at(self, weights, batch):
        dtype = batch.query_x.dtype
        each = over_tasks(self.surrogate_and_divergence, weights, batch, (dtype, dtype), self.layout)
        return tuple(tf.reduce_mean(value) for value in each)

    def fisher_product(self, batch: MetaBatch) -> "_FisherProduct":
        """A context: a function of flat vectors, the tasks' mean Fisher matrix, damped, times the vector.

        With A = I - alpha H the derivative of the inner step, H the Hessian of its loss, and F the Fisher matrix of the
        adapted policy on its own transitions, a task's matrix is A F A. It is the Hessian of the mean divergence at the
        weights where that is 0.
        """
        return _FisherProduct(self, batch)

    # -- weights as one vector ----------------------------------------------------------------------------------------

    def flat(self, weights: Weights) -> np.ndarray:
        """The weights in one vector, float64."""
        return np.concatenate([np.ravel(weights[name]).astype(float) for name in self.weights])

    def unflat(self, vector: np.ndarray) -> Weights:
        """The reverse, in the weights' own precision."""
        weights, first = {}, 0
        for name, weight in self.weights.items():
            last = first + weight.shape.num_elements()
            weights[name] = vector[first:last].reshape(weight.shape).astype(weight.dtype.as_numpy_dtype)
            first = last
        return weights


class _FisherProduct:
    """See MetaTRPO.fisher_product. Tasks side by side, one on each core."""

    def __init__(self, learner: MetaTRPO, batch: MetaBatch):
        self.learner, self.batch = learner, tf.nest.map_structure(lambda x: x.numpy(), batch)

    def __enter__(self) -> Callable[[np.ndarray], np.ndarray]:
        self.pool = ThreadPoolExecutor(self.learner.layout.cores)
        self.tasks = list(self.pool.map(self._curvatures, range(len(self.batch.query_x))))
        return self

    def __exit__(self, *exception):
        self.pool.shutdown()

    def _curvatures(self, task):
        """(of the inner loss, or None without inner steps; of the adapted policy)"""
        own = tf.nest.map_structure(lambda x: x[task], self.batch)
        after = curvature.fisher(own.adapted, own.query_x, own.query_y.shares)
        if not self.learner.inner.steps:
            return None, after
        c = own.support_y.shares * own.support_y.advantages
        weights = {name: weight.numpy() for name, weight in self.learner.weights.items()}
        return curvature.inner_loss(weights, own.support_x, own.support_y.actions, c), after

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        direction = self.learner.unflat(vector)
        products = self.pool.map(lambda task: self._product(*task, direction), self.tasks)
        return sum(map(self.learner.flat, products)) / len(self.tasks) + DAMPING * vector

    def _product(self, inner, after, direction):
        return self._through(inner, curvature.product(after, self._through(inner, direction)))

    def _through(self, inner, direction):
        """The derivative of the inner step, which is symmetric, times the direction."""
        if inner is None:
            return direction
        turned = curvature.product(inner, direction)
        return {name: direction[name] - self.learner.inner.alpha * turned[name] for name in direction}


def conjugate_gradients(product: Callable, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The solution x of product(x) = b after CONJUGATE_STEPS steps from 0, and what is left, b - product(x)."""
    x, residual, direction = np.zeros_like(b), b.copy(), b.copy()
    squared = residual @ residual
    for _ in range(CONJUGATE_STEPS):
        turned = product(direction)
        size = squared / (direction @ turned)
        x += size * direction
        residual = residual - size * turned
        before, squared = squared, residual @ residual
        if squared < LEAST_RESIDUAL:
            break
        direction = residual + squared / before * direction
    return x, residual
