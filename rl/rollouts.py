"""What a policy does in its tasks: rollouts, their returns, the linear baseline and the advantages."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rl.environments import Environment

DISCOUNT = 0.99  # cbfinn/maml_rl, batch_maml_polopt.py; its lambda of 1 makes an advantage return minus baseline
RIDGE = 1e-5  # linear_feature_baseline.py


class Rollouts(NamedTuple):
    """The transitions of T tasks, n of each, in rows of rollouts that follow one another.

    Tasks have different numbers of transitions, n is the most of any, and the rest is padding of share 0.
    """

    observations: np.ndarray  # [T, n, O] float32, before the step
    actions: np.ndarray  # [T, n, A] float32, not clipped
    rewards: np.ndarray  # [T, n] float64
    times: np.ndarray  # [T, n] int, steps since the rollout began
    ends: np.ndarray  # [T, n] bool, the last transition of a rollout
    rounds: np.ndarray  # [T, n] int, rollouts before this one among those side by side: 0 is the first
    shares: np.ndarray  # [T, n] float64, 1 / (transitions of the task); 0 on padding

    def mean_returns(self, first: bool = False) -> np.ndarray:
        """Sum of the rewards, undiscounted, of a rollout: the mean over each task's, [T], or over the first ones."""
        counted = (self.rounds == 0) if first else np.ones_like(self.ends)
        return np.sum(self.rewards * counted, 1) / np.sum(self.ends & counted, 1)

    def paths(self, task: int, count: int) -> list[list[list[float]]]:
        """The observations of a task's first rollouts, each [steps, O], rounded to three decimals."""
        ends = np.flatnonzero(self.ends[task])[:count] + 1
        return [np.round(path, 3).tolist() for path in np.split(self.observations[task].astype(float), ends)[:count]]


def collect(
    environment: Environment, policy: Callable, goals: np.ndarray, count: int, random: np.random.Generator
) -> Rollouts:
    """Rollouts of every task, `count` at any time, each of which begins anew when it has ended, for H steps in all.

    So a task has at least count * H transitions and count rollouts, and more rollouts where they reach the goal early.
    None is cut short: those that run after H steps run to their end, and are followed by none.
    Args: policy(observations [T, count, O]) -> means and log standard deviations of normal actions, [T, count, A] or
    alike in shape; goals [T, G].
    Differs: cbfinn/maml_rl's sampler (vectorized_sampler.py) ends when the finished rollouts have enough transitions,
    and drops those under way. docs/rl.md has what that changes.
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


def _in_rows(observations, actions, rewards, times, ends, rounds, taken):
    """Rollouts of arrays [T, count, steps, ...], of which those that were `taken` are kept."""
    tasks = len(taken)
    taken = taken.reshape(tasks, -1)
    numbers = taken.sum(1)
    kept = np.argsort(~taken, 1, kind="stable")[:, : numbers.max()]
    real = np.take_along_axis(taken, kept, 1)

    def rows(parts):
        parts = parts.reshape(tasks, taken.shape[1], -1)
        return np.take_along_axis(parts, kept[..., None], 1) * real[..., None]

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
    """How much better than the baseline's guess each transition was, [T, n] float64: mean 0, deviation 1 in each task.

    The baseline guesses the discounted return by a linear function of observation and time, fitted to the very
    rollouts by least squares with a small ridge. Padding has advantage 0.
    Source: cbfinn/maml_rl, rllab/sampler/base.py and linear_feature_baseline.py.
    """
    real = rollouts.shares > 0
    returns = discounted_returns(rollouts)
    features = baseline_features(rollouts) * real[..., None]
    gram = features.transpose(0, 2, 1) @ features + RIDGE * np.eye(features.shape[2])
    weights = np.linalg.solve(gram, features.transpose(0, 2, 1) @ returns[..., None])
    surprise = (returns - (features @ weights)[..., 0]) * real
    surprise -= np.sum(rollouts.shares * surprise, 1, keepdims=True)
    deviation = np.sqrt(np.sum(rollouts.shares * surprise**2, 1, keepdims=True))
    return surprise * real / (deviation + 1e-8)


def discounted_returns(rollouts: Rollouts) -> np.ndarray:
    """What each transition and those after it in its rollout earn, discounted, [T, n]."""
    returns = np.array(rollouts.rewards)
    for i in reversed(range(returns.shape[1] - 1)):
        returns[:, i] += DISCOUNT * ~rollouts.ends[:, i] * returns[:, i + 1]
    return returns


def baseline_features(rollouts: Rollouts) -> np.ndarray:
    """What the baseline is linear in, float64 [T, n, 2 * O + 4]: o, o^2, t, t^2, t^3, 1.

    o is the observation, clipped to +-10, and t the time in hundreds of steps.
    """
    o = np.clip(rollouts.observations.astype(float), -10, 10)
    t = rollouts.times[..., None] / 100
    return np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], -1)
