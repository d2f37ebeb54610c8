"""The tasks: 2D navigation, and the half-cheetah's direction and speed. A task is a goal.

An environment is a set of pure functions on arrays, whose leading axes [...] are any number of parallel rollouts. The
caller holds the states, so writing an initial state into a row restarts that rollout.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import devices
from files import InputError


class Environment(NamedTuple):
    """A family of tasks."""

    observation_size: int  # O
    action_size: int  # A
    horizon: int  # H, maximum steps per rollout
    goals: Callable  # (random, count) -> float64 [count, G], drawn uniformly
    reset: Callable  # (goals [..., G], random) -> initial states [..., S]
    observe: Callable  # (states, goals) -> [..., O]
    step: Callable  # (states, goals, actions [..., A]) -> states, rewards [...], goal reached [...]


def point(oracle: bool = False, threads: int = 0) -> Environment:
    """Return 2D navigation: a point moves to a goal, which it observes only with `oracle`.

    Goals are uniform in [-0.5, 0.5]^2; a rollout begins at the origin. An action of 1 moves the point by 0.1, the
    maximum per coordinate. The reward is minus the distance to the goal after the step. A rollout ends within 0.01 of
    the goal in both coordinates, or after 100 steps. State [..., 2]: the position. `threads` is unused.
    Source: cbfinn/maml_rl, point_env_randgoal.py and normalized_env.py. The paper (section 5.3) specifies minus the
    squared distance, but its code and its returns use the distance.
    """
    reach, near = 0.1, 0.01

    def observe(states, goals):
        return np.concatenate([states, goals], -1) if oracle else states

    def step(states, goals, actions):
        states = states + np.clip(reach * actions, -reach, reach)
        offset = states - goals
        return states, -np.sqrt(np.sum(offset**2, -1)), np.all(np.abs(offset) < near, -1)

    return Environment(
        observation_size=4 if oracle else 2,
        action_size=2,
        horizon=100,
        goals=lambda random, count: random.uniform(-0.5, 0.5, (count, 2)),
        reset=lambda goals, random: np.zeros(goals.shape),
        observe=observe,
        step=step,
    )


def half_cheetah(reward: str, oracle: bool = False, threads: int = 0) -> Environment:
    """Return rllab's planar half-cheetah, which runs forward or backward (reward="direction") or at a goal speed.

    A step lasts 0.01 s; its six torques are clipped to +-1. Observations are the positions except the one along the
    track (8), all velocities (9) and the center of mass (3); with `oracle` also the direction, 1 or -1, or the goal
    speed. A rollout begins at rest plus Gaussian noise, with standard deviation 0.01 in positions and 0.1 in
    velocities, and ends after 200 steps. Goals are uniform in [0, 2]. The reward is a speed term minus 0.05 times the
    sum of squared actions. With v the speed of the center of mass in m/s, the speed term is
      direction  v if the goal is at least 1, else -v;
      speed      -|v - goal|.
    State [..., S]: MuJoCo's (time, positions, velocities). The simulator uses `threads` threads; 0: one per core.
    Source: cbfinn/maml_rl, half_cheetah_env_rand_direc.py, half_cheetah_env_rand.py and mujoco_env.py.
    Raise InputError if the package mujoco is missing.
    """
    simulator = _Simulator(threads or devices.cores())
    model = simulator.model
    positions = slice(1, 1 + model.nq)
    velocities = slice(1 + model.nq, 1 + model.nq + model.nv)

    def target(goals):
        return np.where(goals < 1, -1.0, 1.0) if reward == "direction" else goals

    def reset(goals, random):
        states = np.zeros((*goals.shape[:-1], 1 + model.nq + model.nv))
        states[..., positions] = model.qpos0 + 0.01 * random.standard_normal(states[..., positions].shape)
        states[..., velocities] = 0.1 * random.standard_normal(states[..., velocities].shape)
        return states

    def observe(states, goals):
        q, v = states[..., positions], states[..., velocities]
        observed = [q[..., 1:], v, center_of_mass(model, q, v)[0]]
        return np.concatenate([*observed, target(goals)] if oracle else observed, -1)

    def step(states, goals, actions):
        actions = np.clip(actions, -1, 1)
        states = simulator.step(states, actions)
        speed = center_of_mass(model, states[..., positions], states[..., velocities])[1][..., 0]
        goal = target(goals)[..., 0]
        run = goal * speed if reward == "direction" else -np.abs(speed - goal)
        return states, run - 0.05 * np.sum(actions**2, -1), np.zeros(speed.shape, bool)

    return Environment(
        observation_size=21 if oracle else 20,
        action_size=6,
        horizon=200,
        goals=lambda random, count: random.uniform(0, 2, count)[:, None],
        reset=reset,
        observe=observe,
        step=step,
    )


def center_of_mass(model, q: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position [..., 3] in m and the velocity [..., 3] in m/s of the half-cheetah's center of mass.

    q, v: positions and velocities [..., 9]. The first three are the root's: along the track, up, and pitch.
    Each body rotates about the y axis by the sum of the angles from the root to it. The center of mass is therefore the
    root's position plus, for each body, a constant vector (the mass-weighted offset of the bodies it carries) rotated
    by the body's angle. MuJoCo computes the same in subtree_com and subtree_linvel, but only for the state before a
    step.
    """
    mass = model.body_subtreemass[1]
    levers = model.body_mass[:, None] / mass * model.body_ipos
    for body in range(2, model.nbody):
        levers[model.body_parentid[body]] += model.body_subtreemass[body] / mass * model.body_pos[body]
    chain = np.zeros((model.nbody, model.nv))  # 1 where a joint rotates the body
    for body in range(1, model.nbody):
        chain[body] = chain[model.body_parentid[body]]
        chain[body, 2 if body == 1 else model.body_jntadr[body]] = 1
    angle, turn = q @ chain.T, v @ chain.T
    sine, cosine = np.sin(angle), np.cos(angle)
    x, z = levers[:, 0], levers[:, 2]
    position, velocity = np.zeros((*q.shape[:-1], 3)), np.zeros((*q.shape[:-1], 3))
    root = model.body_pos[1]
    position[..., 0] = root[0] + q[..., 0] + cosine @ x + sine @ z
    position[..., 1] = root[1] + levers[:, 1].sum()
    position[..., 2] = root[2] + q[..., 1] - sine @ x + cosine @ z
    velocity[..., 0] = v[..., 0] + (turn * -sine) @ x + (turn * cosine) @ z
    velocity[..., 2] = v[..., 1] + (turn * -cosine) @ x + (turn * -sine) @ z
    return position, velocity


class _Simulator:
    """MuJoCo on many states in parallel threads. A step depends only on state and action."""

    def __init__(self, threads):
        try:
            import mujoco
            from mujoco import rollout
        except ImportError as error:
            raise InputError(
                f"--env: the half-cheetah needs {error.name}; run pip install -r requirements-rl.txt"
            ) from None
        self.model = mujoco.MjModel.from_xml_path(str(Path(__file__).with_name("half_cheetah.xml")))
        mujoco.mj_setTotalmass(self.model, 14)  # kg, as in rllab
        mujoco.mj_setConst(self.model, mujoco.MjData(self.model))
        self.data = [mujoco.MjData(self.model) for _ in range(threads)]
        self.rollout = rollout.Rollout(nthread=threads)

    def step(self, states, actions):
        after, _ = self.rollout.rollout(
            self.model, self.data, states.reshape(-1, states.shape[-1]), actions.reshape(-1, 1, actions.shape[-1])
        )
        return after[:, 0].reshape(states.shape)


ENVIRONMENTS = {
    "point": point,
    "cheetah_direction": functools.partial(half_cheetah, "direction"),
    "cheetah_speed": functools.partial(half_cheetah, "speed"),
}
