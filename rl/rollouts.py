"""Rollouts, their returns, the linear baseline and the advantages."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rl.environments import Environment

DISCOUNT = 0.99  # cbfinn/maml_rl, batch_maml_polopt.py; with its lambda of 1 an advantage is return minus baseline
RIDGE = 1e-5  # linear_feature_baseline.py


class Rollouts(NamedTuple):
    """The transitions of T tasks. Each row holds a task's rollouts one after another.

    n is the largest number of transitions in any task; shorter rows are padded with transitions of share 0.
    """

    observations: np.ndarray  # [T, n, O] float32, before the step
    actions: np.ndarray  # [T, n, A] float32, before clipping
    rewards: np.ndarray  # [T, n] float64
    times: np.ndarray  # [T, n] int, steps since the start of the rollout
    ends: np.ndarray  # [T, n] bool, the last transition of a rollout
    rounds: np.ndarray  # [T, n] int, 0 in each parallel slot's first rollout, then 1, 2, ...
    shares: np.ndarray  # [T, n] float64, 1 / (the task's number of transitions); 0 on padding

    def mean_returns(self, first: bool = False) -> np.ndarray:
        """Return the mean undiscounted return of each task's rollouts, [T]. first: only each slot's first rollout."""
        counted = (self.rounds == 0) if first else np.ones_like(self.ends)
        return np.sum(self.rewards * counted, 1) / np.sum(self.ends & counted, 1)

    def paths(self, task: int, count: int) -> list[list[list[float]]]:
        """Return the observations of a task's first `count` rollouts, each [steps, O], rounded to three decimals."""
        ends = np.flatnonzero(self.ends[task])[:count] + 1
        return [np.round(path, 3).tolist() for path in np.split(self.observations[task].astype(float), ends)[:count]]


def collect(
    environment: Environment, policy: Callable, goals: np.ndarray, count: int, random: np.random.Generator
) -> Rollouts:
    """Collect rollouts of each task in `count` parallel slots, restarting finished ones until H steps are done.

    No rollout is cut short: those unfinished after H steps run to their end. A task therefore has at least count * H
    transitions and at least `count` rollouts, more if they reach the goal early.
    policy: observations [T, count, O] -> means and log standard deviations of Gaussian actions, which broadcast to
    [T, count, A]. goals: [T, G].
    Differs: cbfinn/maml_rl's sampler (vectorized_sampler.py) stops when the finished rollouts have enough transitions,
    and drops the unfinished ones. docs/rl.md reports the effect.
    """
    horizon = environment.horizon
    tasks = np.repeat(goals[:, None], count, 1)
    states = environment.reset(tasks, random)
    ages = rounds = np.zeros((len(goals), count), int)
    running, steps = np.ones((len(goals), count), bool), []
    for clock in range(2 * horizon):
        observations = environment.observe(states, tasks).astype(np.float32)
        means, log_stds = policy(observations)
        actions = means + np.exp(log_stds) * random.standard_normal(means.shape, np.float32)
        states, rewards, ends = environment.step(states, tasks, actions.astype(float))
        ends = ends | (ages == horizon - 1)
        steps.append((observations, actions, rewards, ages, ends, rounds, running))
        ages, rounds = np.where(ends, 0, ages + 1), rounds + ends
        if clock >= horizon - 1:
            running = running & ~ends
            if not running.any():
                break
        elif ends.any():
            states = np.where(ends[..., None], environment.reset(tasks, random), states)
    return _in_rows(*(np.stack(parts, 2) for parts in zip(*steps, strict=True)))


def _in_rows(observations, actions, rewards, times, ends, rounds, valid):
    """Return Rollouts of the `valid` transitions in arrays [T, count, steps, ...]."""
    tasks = len(valid)
    valid = valid.reshape(tasks, -1)
    numbers = valid.sum(1)
    order = np.argsort(~valid, 1, kind="stable")[:, : numbers.max()]
    real = np.take_along_axis(valid, order, 1)

    def rows(parts):
        parts = parts.reshape(tasks, valid.shape[1], -1)
        return np.take_along_axis(parts, order[..., None], 1) * real[..., None]

    return Rollouts(
        rows(observations),
        rows(actions),
        rows(rewards)[..., 0],
        rows(times)[..., 0],
        rows(ends)[..., 0],
        rows(rounds)[..., 0],
        real / numbers[:, None],
    )


def advantages(rollouts: Rollouts) -> np.ndarray:
    """Return each transition's advantage, [T, n] float64, normalized to mean 0 and standard deviation 1 per task.

    The baseline predicts the discounted return as a linear function of observation and time, fitted to the same
    rollouts by ridge regression. Padding has advantage 0.
    Source: cbfinn/maml_rl, rllab/sampler/base.py and linear_feature_baseline.py.
    """
    real = rollouts.shares > 0
    returns = discounted_returns(rollouts)
    features = baseline_features(rollouts) * real[..., None]
    gram = features.transpose(0, 2, 1) @ features + RIDGE * np.eye(features.shape[2])
    weights = np.linalg.solve(gram, features.transpose(0, 2, 1) @ returns[..., None])
    residuals = (returns - (features @ weights)[..., 0]) * real
    residuals -= np.sum(rollouts.shares * residuals, 1, keepdims=True)
    deviation = np.sqrt(np.sum(rollouts.shares * residuals**2, 1, keepdims=True))
    return residuals * real / (deviation + 1e-8)


def discounted_returns(rollouts: Rollouts) -> np.ndarray:
    """Return the discounted sum of rewards from each transition to the end of its rollout, [T, n]."""
    returns = np.array(rollouts.rewards)
    for i in reversed(range(returns.shape[1] - 1)):
        returns[:, i] += DISCOUNT * ~rollouts.ends[:, i] * returns[:, i + 1]
    return returns


def baseline_features(rollouts: Rollouts) -> np.ndarray:
    """Return the features of the baseline, float64 [T, n, 2 * O + 4]: o, o^2, t, t^2, t^3, 1.

    o is the observation clipped to +-10, t the time in hundreds of steps.
    """
    o = np.clip(rollouts.observations.astype(float), -10, 10)
    t = rollouts.times[..., None] / 100
    return np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], -1)
