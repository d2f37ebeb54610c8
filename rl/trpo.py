"""MAML with TRPO as the outer step (paper section 5.3 and Algorithm 3).

The inner step is maml.py's, with the loss policy.policy_gradient. The outer step is a natural-gradient step on the
surrogate. Conjugate gradients compute its direction from products with the Fisher matrix of the adapted policies with
respect to the weights before the inner step. As in the original, a product is a finite difference of gradients of the
mean divergence, over a step so wide that units switch on and off within it (docs/rl.md compares it with the exact one).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml import InnerLoop, adapt, meta_gradient
from parallel import Layout, over_tasks
from rl.environments import Environment
from rl.policy import Experience, act, divergence, log_probability
from rl.rollouts import Rollouts, advantages, collect
from utils import Weights

# cbfinn/maml_rl, conjugate_gradient_optimizer.py and krylov.py
CONJUGATE_STEPS = 10
LEAST_RESIDUAL = 1e-10  # stop early if the squared norm of the residual is lower
DAMPING = 1e-5  # times the identity, added to the Fisher matrix
BACKTRACKS, RATIO = 15, 0.8  # of the line search: number of tries, and factor between them


class MetaBatch(NamedTuple):
    """Experience in T tasks before and after the inner step. For one task there is no leading axis."""

    support_x: tf.Tensor  # [T, n, O], under the meta-learned policy
    support_y: Experience
    query_x: tf.Tensor  # [T, m, O], under each task's adapted policy
    query_y: Experience
    acted: tf.Tensor  # [T, m, 2 * A], that policy's outputs


class Update(NamedTuple):
    """The outcome of an outer step."""

    surrogate_before: float  # minus the mean advantage: lower is better
    surrogate: float  # the same at the new weights
    divergence: float  # KL of the adapted policies in nats, mean over each task's transitions, then over tasks
    backtracks: int  # of the line search; BACKTRACKS: it failed, and the weights did not change
    seconds: dict[str, float]  # by part: gradient, fisher_products, line_search


class MetaTRPO(tf.Module):
    """The meta-learned policy: MAML's inner loop with a TRPO outer step."""

    def __init__(self, inner: InnerLoop, *, bound: float, seed: int, cores: int = 1):
        """Initialize the weights from `seed`.

        inner: the inner loop, with 1 step, or with 0 to train one policy for all tasks. bound: maximum divergence of an
        outer step, in nats. cores: tasks computed in parallel.
        """
        super().__init__(name="meta_trpo")
        self.inner, self.bound, self.layout = inner, bound, Layout(cores)
        self.weights = {name: tf.Variable(value, name=name) for name, value in inner.network.init(seed).items()}
        self.step = tf.Variable(0, dtype=tf.int64, name="step")  # outer steps done
        w1, log_std = self.weights["w1"], self.weights["log_std"]

        def spec(*shape):
            return tf.TensorSpec(shape, w1.dtype)

        x = spec(None, None, w1.shape[0])
        experience = Experience(spec(None, None, log_std.shape[0]), spec(None, None), spec(None, None))
        weights = {name: spec(*weight.shape) for name, weight in self.weights.items()}
        tasks_weights = {name: spec(None, *weight.shape) for name, weight in self.weights.items()}
        batch = MetaBatch(x, experience, x, experience, spec(None, None, 2 * log_std.shape[0]))

        def traced(function, *signature):
            return tf.function(function, autograph=False, input_signature=signature)

        self.adapt_each = traced(self._adapt_each, tasks_weights, x, experience, spec())
        self.apply_each = traced(self._apply_each, tasks_weights, x)
        self.surrogate_gradient = traced(self._surrogate_gradient, batch)
        self.surrogate_at = traced(self._surrogate_at, weights, batch)
        self.divergence_gradient = traced(self._divergence_gradient, weights, batch)

    @property
    def keys(self) -> dict[str, str]:
        """Weight name -> its key in a checkpoint."""
        return self.inner.network.keys(self.weights)

    @property
    def state(self) -> dict[str, tf.Variable]:
        """Key in a checkpoint -> variable, for everything a step changes."""
        return {key: self.weights[name] for name, key in self.keys.items()} | {"step": self.step}

    def values(self) -> Weights:
        """Return the meta-learned weights."""
        return {name: tf.convert_to_tensor(variable) for name, variable in self.weights.items()}

    # -- the inner loop -----------------------------------------------------------------------------------------------

    def before(self, tasks: int) -> dict[str, np.ndarray]:
        """Return the meta-learned weights repeated for each task, [T, ...]."""
        return {name: np.repeat(weight.numpy()[None], tasks, 0) for name, weight in self.weights.items()}

    def rollouts(
        self, environment: Environment, weights: Weights, goals: np.ndarray, count: int, random: np.random.Generator
    ) -> Rollouts:
        """Return rollouts collected with each task's own weights [T, ...]."""
        return collect(environment, lambda observations: act(weights, observations), goals, count, random)

    def inner_step(
        self, weights: Weights, x: tf.Tensor, experience: Experience, factor: float = 1.0
    ) -> dict[str, np.ndarray]:
        """Return each task's weights [T, ...] after one step of size factor * alpha.

        x: observations [T, n, O]. experience: collected with `weights`.
        """
        after = self.adapt_each(weights, x, experience, tf.constant(factor, x.dtype))
        return {name: weight.numpy() for name, weight in after.items()}

    def curve(
        self,
        environment: Environment,
        goals: np.ndarray,
        count: int,
        sizes: Sequence[float],
        random: np.random.Generator,
    ) -> Iterator[Rollouts]:
        """Yield rollouts before any update and after each one. An update learns from the previous rollouts.

        sizes: size of each update, in units of alpha.
        """
        weights = self.before(len(goals))
        yield (rollouts := self.rollouts(environment, weights, goals, count, random))
        for size in sizes:
            weights = self.inner_step(weights, *self._tensors(rollouts), size)
            yield (rollouts := self.rollouts(environment, weights, goals, count, random))

    def _adapt_each(self, weights, x, experience, factor):
        def step(_, task):
            own, x, experience = task
            after = adapt(self.inner, own, MetaBatch(x, experience, None, None, None), 1)
            return {name: own[name] + factor * (after[name] - own[name]) for name in own}

        dtypes = {name: weight.dtype for name, weight in weights.items()}
        return over_tasks(step, {}, (weights, x, experience), dtypes, self.layout)

    def _apply_each(self, weights, x):
        return over_tasks(lambda _, task: self.inner.network.apply(*task), {}, (weights, x), x.dtype, self.layout)

    def _tensors(self, rollouts):
        """Return the observations and the Experience of Rollouts."""
        parts = rollouts.actions, advantages(rollouts), rollouts.shares
        x, *parts = (tf.constant(part, self.weights["w1"].dtype) for part in (rollouts.observations, *parts))
        return x, Experience(*parts)

    # -- the outer step -----------------------------------------------------------------------------------------------

    def gather(
        self, environment: Environment, goals: np.ndarray, count: int, random: np.random.Generator
    ) -> tuple[MetaBatch, list[Rollouts]]:
        """Collect rollouts before and after the inner step: the input of an outer step.

        Without inner steps, one set of rollouts serves as both.
        """
        weights = self.before(len(goals))
        rollouts = [self.rollouts(environment, weights, goals, count, random)]
        support = query = self._tensors(rollouts[0])
        if self.inner.steps:
            weights = self.inner_step(weights, *support)
            rollouts.append(self.rollouts(environment, weights, goals, count, random))
            query = self._tensors(rollouts[1])
        return MetaBatch(*support, *query, self.apply_each(weights, query[0])), rollouts

    def outer_step(self, batch: MetaBatch) -> Update:
        """Update the weights, unless no step of the line search improves the surrogate within the bound."""
        times = [time.perf_counter()]
        gradient, before = self.surrogate_gradient(batch)
        gradient, before = self.flat(gradient), float(before)
        times.append(time.perf_counter())
        product = self.fisher_product(batch)
        direction = conjugate_gradients(product, gradient)
        with np.errstate(invalid="ignore"):
            size = np.sqrt(2 * self.bound / (direction @ product(direction) + 1e-8))
        # As in the original, NaN if direction @ product(direction) is negative: the product is not linear.
        step = direction if np.isnan(size) else size * direction
        times.append(time.perf_counter())
        old = self.flat(self.values())
        self.step.assign_add(1)
        for backtracks in range(BACKTRACKS):
            new = self.unflat(old - RATIO**backtracks * step)
            surrogate, kl = (float(value) for value in self.surrogate_at(new, batch))
            if surrogate < before and kl <= self.bound:
                for name, value in new.items():
                    self.weights[name].assign(value)
                break
        else:
            surrogate, kl, backtracks = before, 0.0, BACKTRACKS
        times.append(time.perf_counter())
        parts = ("gradient", "fisher_products", "line_search")
        seconds = {part: end - start for part, (start, end) in zip(parts, pairwise(times), strict=True)}
        return Update(before, surrogate, kl, backtracks, seconds)

    def _surrogate_gradient(self, batch):
        def surrogate(weights, task):
            return self.surrogate_and_divergence(weights, task)[0]

        return meta_gradient(surrogate, self.values(), batch, self.layout)

    def surrogate_and_divergence(self, weights: Weights, task: MetaBatch) -> tuple[tf.Tensor, tf.Tensor]:
        """Return one task's surrogate and mean divergence, two scalars differentiable in `weights`.

        weights: before the inner step. The surrogate is minus the mean, over the query transitions, of the advantage
        times the likelihood ratio of the newly adapted policy to the policy that acted. The divergence is between these
        two policies.
        """
        query = task.query_y
        new = self.inner.network.apply(adapt(self.inner, weights, task, self.inner.steps), task.query_x)
        ratio = tf.exp(log_probability(new, query.actions) - log_probability(task.acted, query.actions))
        surrogate = -tf.reduce_sum(query.shares * query.advantages * ratio)
        return surrogate, tf.reduce_sum(query.shares * divergence(task.acted, new))

    def _surrogate_at(self, weights, batch):
        dtype = batch.query_x.dtype
        each = over_tasks(self.surrogate_and_divergence, weights, batch, (dtype, dtype), self.layout)
        return tuple(tf.reduce_mean(value) for value in each)

    def _divergence_gradient(self, weights, batch):
        def mean_divergence(weights, task):
            return self.surrogate_and_divergence(weights, task)[1]

        return meta_gradient(mean_divergence, weights, batch, self.layout)

    def fisher_product(self, batch: MetaBatch) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function v -> (mean Fisher matrix of the tasks + DAMPING * I) v, approximately.

        v is a flat vector, float64. With G the gradient of the tasks' mean divergence, the product with the matrix is
        (G(theta + eps v) - G(theta - eps v)) / (2 eps), where eps = 1 / |theta|.
        Source: cbfinn/maml_rl, conjugate_gradient_optimizer.py. Its FiniteDifferenceHvp(num_slices) passes 1, meant as
        the number of slices, as base_eps, which is 1e-8 by default.
        """
        theta = self.flat(self.values())
        epsilon = 1 / (np.linalg.norm(theta) + 1e-8)

        def gradient(vector):
            return self.flat(self.divergence_gradient(self.unflat(vector), batch)[0])

        def product(v):
            difference = gradient(theta + epsilon * v) - gradient(theta - epsilon * v)
            return difference / (2 * epsilon) + DAMPING * v

        return product

    # -- weights as one vector ----------------------------------------------------------------------------------------

    def flat(self, weights: Weights) -> np.ndarray:
        """Return the weights as one vector, float64."""
        return np.concatenate([np.ravel(weights[name]).astype(float) for name in self.weights])

    def unflat(self, vector: np.ndarray) -> Weights:
        """Return the weights stored in a vector, cast to their own dtypes: the inverse of `flat`."""
        weights, first = {}, 0
        for name, weight in self.weights.items():
            last = first + weight.shape.num_elements()
            weights[name] = vector[first:last].reshape(weight.shape).astype(weight.dtype.as_numpy_dtype)
            first = last
        return weights


def conjugate_gradients(product: Callable, b: np.ndarray) -> np.ndarray:
    """Return the solution x of product(x) = b after CONJUGATE_STEPS steps from 0."""
    x, residual, direction = np.zeros_like(b), b.copy(), b.copy()
    squared = residual @ residual
    for _ in range(CONJUGATE_STEPS):
        applied = product(direction)
        size = squared / (direction @ applied)
        x += size * direction
        residual -= size * applied
        before, squared = squared, residual @ residual
        if squared < LEAST_RESIDUAL:
            break
        direction = residual + squared / before * direction
    return x
