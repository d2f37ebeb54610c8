"""Reinforcement learning: environments, rollouts, advantages, the inner and the outer step, and whole runs."""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from files import InputError
from maml import InnerLoop
from networks import Network
from rl import main, trpo
from rl.environments import ENVIRONMENTS, centre_of_mass, half_cheetah, point
from rl.policy import Experience, act, divergence, gaussian, log_probability, policy_gradient
from rl.rollouts import DISCOUNT, RIDGE, Rollouts, advantages, collect, discounted_returns
from rl.trpo import BACKTRACKS, CONJUGATE_STEPS, DAMPING, MetaBatch, MetaTRPO, conjugate_gradients

# -- environments ------------------------------------------------------------------------------------------------------


def test_a_step_of_the_point():
    """An action of 1 moves by 0.1 and no further; the reward is minus the distance to the goal after the step."""
    environment, goal = point(), np.array([0.3, 0.4])
    start = environment.reset(goal, None)
    states, rewards, ends = environment.step(start, goal, np.array([0.5, -7.0]))
    np.testing.assert_allclose(states, [0.05, -0.1])
    np.testing.assert_allclose(rewards, -np.hypot(0.25, 0.5))
    assert not ends
    assert environment.observe(states, goal).tolist() == states.tolist()
    assert point(oracle=True).observe(states, goal).tolist() == [*states, *goal]


@pytest.mark.parametrize(("offset", "reached"), [((0.009, -0.009), True), ((0.0, 0.011), False), ((0.5, 0.0), False)])
def test_the_point_is_at_its_goal_within_a_hundredth(offset, reached):
    goal = np.array([0.2, -0.1])
    assert point().step(goal + offset, goal, np.zeros(2))[2] == reached


def test_goals_are_uniform():
    goals = point().goals(np.random.default_rng(0), 10_000)
    np.testing.assert_allclose([goals.min(0), goals.max(0)], [[-0.5, -0.5], [0.5, 0.5]], atol=1e-3)
    np.testing.assert_allclose(goals.std(0), 1 / 12**0.5, atol=5e-3)


@pytest.fixture(scope="module")
def mujoco():
    return pytest.importorskip("mujoco", reason="the half-cheetah's tests need mujoco: requirements-rl.txt")


@pytest.fixture
def cheetah(mujoco):
    """A model and data of the half-cheetah, to be stepped one by one."""
    model = mujoco.MjModel.from_xml_path("rl/half_cheetah.xml")
    mujoco.mj_setTotalmass(model, 14)
    data = mujoco.MjData(model)
    mujoco.mj_setConst(model, data)
    return model, data


def test_the_half_cheetahs_centre_of_mass_is_mujocos(mujoco, cheetah):
    model, data = cheetah
    random = np.random.default_rng(0)
    q, v = random.standard_normal((2, 5, 9))
    places, velocities = centre_of_mass(model, q, v)
    for i in range(5):
        data.qpos[:], data.qvel[:] = q[i], v[i]
        mujoco.mj_forward(model, data)
        mujoco.mj_subtreeVel(model, data)
        np.testing.assert_allclose(places[i], data.subtree_com[1], atol=1e-12)
        np.testing.assert_allclose(velocities[i], data.subtree_linvel[1], atol=1e-12)


@pytest.mark.parametrize(
    ("reward", "run"),
    [("direction", lambda speed, goal: speed if goal >= 1 else -speed), ("speed", lambda v, goal: -abs(v - goal))],
)
def test_a_step_of_the_half_cheetah(mujoco, cheetah, reward, run):
    """Each of the states side by side goes on as MuJoCo's own step takes it, 0.01 s under the clipped action."""
    model, data = cheetah
    environment, random = half_cheetah(reward), np.random.default_rng(0)
    goals = np.array([[[0.2], [1.7]], [[1.2], [0.9]]])
    states, actions = environment.reset(goals, random), 2 * random.standard_normal((2, 2, 6))
    after, rewards, ends = environment.step(states, goals, actions)
    observed = environment.observe(after, goals)
    assert not ends.any()
    for i in np.ndindex(2, 2):
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:], data.ctrl[:] = states[i][1:10], states[i][10:], np.clip(actions[i], -1, 1)
        mujoco.mj_step(model, data)
        mujoco.mj_forward(model, data)
        mujoco.mj_subtreeVel(model, data)
        assert data.time == pytest.approx(0.01)
        np.testing.assert_allclose(observed[i], [*data.qpos[1:], *data.qvel, *data.subtree_com[1]], atol=1e-12)
        cost = 0.05 * np.sum(np.clip(actions[i], -1, 1) ** 2)
        assert rewards[i] == pytest.approx(run(data.subtree_linvel[1][0], goals[i][0]) - cost)


@pytest.mark.parametrize(("reward", "seen"), [("direction", [-1, 1]), ("speed", [0.2, 1.7])])
def test_rollouts_of_the_half_cheetah_begin_at_rest_but_for_noise(mujoco, reward, seen):
    environment = half_cheetah(reward)
    goals = np.repeat([[[0.2], [1.7]]], 1000, 0)
    states = environment.reset(goals, np.random.default_rng(0))
    np.testing.assert_allclose(states[..., :1], 0)  # the time
    np.testing.assert_allclose(states[..., 1:].mean((0, 1)), np.zeros(18), atol=0.01)
    np.testing.assert_allclose(states[..., 1:].std((0, 1)), np.repeat([0.01, 0.1], 9), rtol=0.1)
    observed, told = (one.observe(states, goals) for one in (environment, half_cheetah(reward, oracle=True)))
    assert (observed.shape[-1], told.shape[-1]) == (20, 21)
    np.testing.assert_array_equal(told[..., :20], observed)
    np.testing.assert_array_equal(told[..., 20], np.repeat([seen], 1000, 0))


def test_the_half_cheetah_without_mujoco(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(InputError, match=r"needs mujoco: pip install -r requirements-rl\.txt"):
        half_cheetah("direction")


# -- rollouts ----------------------------------------------------------------------------------------------------------


def straight(observations):
    """A policy without noise, which walks along the first axis."""
    means = np.zeros_like(observations)
    means[..., 0] = 1
    return means, np.full_like(observations, -np.inf)


def test_rollouts_begin_anew_at_the_goal_and_none_is_cut_short():
    """A goal three steps away is reached 34 times by each of two rollouts side by side: the last ends at step 102."""
    goals = np.array([[0.3, 0.0], [0.0, 0.5]])
    did = collect(point(), straight, goals, 2, np.random.default_rng(0))
    assert did.ends.sum(1).tolist() == [68, 2]
    assert (did.shares > 0).sum(1).tolist() == [204, 200]
    np.testing.assert_allclose(did.shares.sum(1), 1)
    np.testing.assert_allclose(did.shares[1, 200:], 0)
    np.testing.assert_allclose(did.mean_returns()[0], -(0.2 + 0.1 + 0.0), atol=1e-6)
    np.testing.assert_allclose(did.observations[0, :6, 0], [0, 0.1, 0.2, 0, 0.1, 0.2], atol=1e-6)
    assert did.times[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    assert did.times[1, :200].tolist() == [*range(100), *range(100)]
    assert did.rounds[0, [0, 3, 101, 102, 203]].tolist() == [0, 1, 33, 0, 33]
    did.rewards[0, :3] = [-7, 0, -2]  # a first rollout, which stands apart from those that follow it
    np.testing.assert_allclose(did.mean_returns(first=True)[0], -(9 + 0.3) / 2, atol=1e-6)
    assert [len(path) for path in did.paths(0, 2)] == [3, 3]


def some_rollouts() -> Rollouts:
    """Rollouts of different lengths, of a policy with a little noise: one goal is near, one far."""

    def policy(observations):
        return straight(observations)[0], np.full_like(observations, -3.0)

    goals = np.array([[0.1, 0.0], [0.5, 0.5]])
    return collect(point()._replace(horizon=7), policy, goals, 3, np.random.default_rng(0))


def test_advantages_are_those_of_the_obvious_loop():
    did = some_rollouts()
    did = did._replace(observations=30 * did.observations)  # the baseline sees those beyond 10 as 10
    ours, returns = advantages(did), discounted_returns(did)
    assert len(set((did.shares > 0).sum(1))) == 2  # there is padding
    assert np.abs(did.observations).max() > 10
    for task in range(2):
        rollouts, one = [], []
        for i in np.flatnonzero(did.shares[task]):
            one.append(i)
            if did.ends[task, i]:
                rollouts.append(one)
                one = []
        assert not one
        features, expected = [], []
        for rollout in rollouts:
            for step, i in enumerate(rollout):
                later = [DISCOUNT**k * did.rewards[task, j] for k, j in enumerate(rollout[step:])]
                expected.append(sum(later))
                o, t = np.clip(did.observations[task, i].astype(float), -10, 10), step / 100
                features.append([*o, *(o * o), t, t**2, t**3, 1])
        features, expected = np.array(features), np.array(expected)
        np.testing.assert_allclose(returns[task][did.shares[task] > 0], expected)
        weights = np.linalg.inv(features.T @ features + RIDGE * np.eye(8)) @ features.T @ expected
        surprise = expected - features @ weights
        surprise = (surprise - surprise.mean()) / surprise.std()
        np.testing.assert_allclose(ours[task][did.shares[task] > 0], surprise, atol=1e-5)
        assert not ours[task][did.shares[task] == 0].any()


# -- the policy --------------------------------------------------------------------------------------------------------


def test_rollouts_and_gradients_are_of_one_policy():
    """NumPy's policy, which acts, and TensorFlow's, which learns."""
    network, x = gaussian(3, 2), np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    weights = [network.init(seed) | {"log_std": tf.constant([0.5, -0.5])} for seed in range(2)]
    means, log_stds = act({name: np.stack([w[name] for w in weights]) for name in weights[0]}, x)
    for task in range(2):
        outputs = network.apply(weights[task], x[task])
        np.testing.assert_allclose(outputs[:, :2], means[task], atol=1e-6)
        np.testing.assert_allclose(outputs[:, 2:], np.broadcast_to(log_stds[task], (5, 2)), atol=1e-6)


def test_initial_weights_are_xaviers():
    """Uniform, and of each layer and seed other draws."""
    weights = {(seed, name): w.numpy() for seed in (0, 1) for name, w in gaussian(100, 100).init(seed).items()}
    drawn = [weights.pop((seed, f"w{layer}")) for seed in (0, 1) for layer in (1, 2, 3)]
    for i, w in enumerate(drawn):
        limit = (6 / 200) ** 0.5
        assert 0.99 * limit < np.abs(w).max() <= limit
        np.testing.assert_allclose(w.std(), limit / 3**0.5, rtol=0.05)
        assert not any(np.array_equal(w, other) for other in drawn[:i])
    assert not any(w.any() for w in weights.values())


def test_log_probability_and_divergence():
    """Against the density's definition, and against the mean of log density ratios over many draws."""
    before, after = tf.constant([[0.3, -0.2, 0.1, -0.4]]), tf.constant([[0.5, 0.1, -0.1, -0.2]])
    actions = tf.constant([[1.0, 0.5]])
    mean, std = before[0, :2].numpy(), np.exp(before[0, 2:].numpy())
    density = np.prod(np.exp(-(((actions[0] - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi)))
    np.testing.assert_allclose(log_probability(before, actions), [np.log(density)], rtol=1e-5)
    draws = (mean + std * np.random.default_rng(0).standard_normal((400_000, 2))).astype(np.float32)
    ratios = log_probability(before, draws) - log_probability(after, draws)
    np.testing.assert_allclose(divergence(before, after)[0], np.mean(ratios), atol=2e-3)


# -- the inner and the outer step --------------------------------------------------------------------------------------


def one_parameter_learner(inner_lr) -> MetaTRPO:
    """The mean of every action is the weight, its standard deviation 1."""
    network = Network(
        lambda seed: {"w1": tf.constant([[0.3]], tf.float64), "log_std": tf.zeros(1, tf.float64)},
        lambda weights, x: tf.concat([x @ weights["w1"], tf.zeros_like(x)], -1),
        ("w1",),
        {},
    )
    return MetaTRPO(InnerLoop(network, policy_gradient, inner_lr, 1), bound=0.01, seed=0)


def test_the_gradient_of_a_one_parameter_policy_by_hand():
    """w' = w + alpha sum c (a - w); the surrogate's gradient is -(1 - alpha sum c) mean of A (a - w'), at ratio 1."""
    alpha, w = 0.5, 0.3
    learner = one_parameter_learner(alpha)
    a, advantage = np.array([0.1, 0.9, -0.4]), np.array([2.0, 1.0, -1.0])
    b, later = np.array([0.7, -0.2]), np.array([-0.5, 1.5])
    c = advantage / 3

    def did(actions, advantages):
        return np.ones((1, len(actions), 1)), Experience(
            actions[None, :, None], advantages[None], np.full((1, len(actions)), 1 / len(actions))
        )

    x, support = did(a, advantage)
    adapted = w + alpha * np.sum(c * (a - w))
    after = learner.adapt_each({"w1": np.full((1, 1, 1), w), "log_std": np.zeros((1, 1))}, x, support, np.float64(1))
    np.testing.assert_allclose(after["w1"], [[[adapted]]])
    half = learner.inner_step({"w1": np.full((1, 1, 1), w), "log_std": np.zeros((1, 1))}, x, support, 0.5)
    np.testing.assert_allclose(half["w1"], [[[(w + adapted) / 2]]])

    batch = MetaBatch(x, support, *did(b, later), after)
    gradient, surrogate = learner.surrogate_gradient(tf.nest.map_structure(tf.convert_to_tensor, batch))
    np.testing.assert_allclose(surrogate, -np.mean(later))
    np.testing.assert_allclose(
        gradient["w1"], [[-(1 - alpha * np.sum(c)) * np.mean(later * (b - adapted))]], rtol=1e-12
    )


def float64_learner(environment, inner_steps, seed=0) -> MetaTRPO:
    """A policy of few weights, all of them away from 0, in float64."""
    network = gaussian(environment.observation_size, environment.action_size, hidden=(3, 4))

    def init(seed):
        random = np.random.default_rng(seed)
        return {name: tf.constant(0.5 * random.standard_normal(w.shape)) for name, w in network.init(seed).items()}

    inner = InnerLoop(network._replace(init=init), policy_gradient, 0.5, inner_steps)
    return MetaTRPO(inner, bound=0.01, seed=seed, cores=2)


@pytest.fixture(scope="module")
def traced():
    """A learner, its initial weights, and what it has gathered: made once, since tracing takes most of the time."""
    environment, random = point()._replace(horizon=20), np.random.default_rng(0)
    learner = float64_learner(environment, inner_steps=1)
    batch, _ = learner.gather(environment, environment.goals(random, 3), 10, random)
    return learner, learner.flat(learner.weights), batch


@pytest.fixture
def gathered(traced):
    """The same learner, with its initial weights."""
    learner, weights, batch = traced
    for name, value in learner.unflat(weights).items():
        learner.weights[name].assign(value)
    learner.step.assign(0)
    return learner, batch


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_fisher_products_are_the_hessian_of_the_mean_divergence(inner_steps):
    """By automatic differentiation, through the inner step, of all weights at once."""
    environment, random = point()._replace(horizon=5), np.random.default_rng(0)
    learner = float64_learner(environment, inner_steps)
    batch, _ = learner.gather(environment, environment.goals(random, 2), 4, random)
    old = tf.constant(learner.flat(learner.weights))

    def mean_divergence(vector):
        weights, first = {}, 0
        for name, weight in learner.weights.items():
            size = weight.shape.num_elements()
            weights[name] = tf.reshape(vector[first : first + size], weight.shape)
            first += size
        tasks = [tf.nest.map_structure(lambda x, task=task: x[task], batch) for task in range(2)]
        return tf.add_n([learner.surrogate_and_divergence(weights, task)[1] for task in tasks]) / 2

    @tf.function(autograph=False)
    def derivatives():
        with tf.GradientTape() as outer:
            outer.watch(old)
            with tf.GradientTape() as inner:
                inner.watch(old)
                value = mean_divergence(old)
            gradient = inner.gradient(value, old)
        return value, gradient, outer.jacobian(gradient, old, experimental_use_pfor=False)

    value, gradient, hessian = (x.numpy() for x in derivatives())
    assert abs(value) < 1e-12
    np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-12)
    with learner.fisher_product(batch) as product:
        ours = np.stack([product(row) for row in np.eye(len(old))])
    np.testing.assert_allclose(ours - DAMPING * np.eye(len(old)), hessian, atol=1e-10)
    assert np.abs(hessian).max() > 0.1


def test_conjugate_gradients_solve_and_tell_what_is_left():
    random = np.random.default_rng(0)
    root = random.standard_normal((CONJUGATE_STEPS, CONJUGATE_STEPS))
    matrix, b = root @ root.T + np.eye(len(root)), random.standard_normal(len(root))
    x, residual = conjugate_gradients(lambda vector: matrix @ vector, b)
    np.testing.assert_allclose(matrix @ x, b, atol=1e-6)
    np.testing.assert_allclose(residual, b - matrix @ x, atol=1e-10)
    solved, nothing = conjugate_gradients(lambda vector: 2 * vector, np.ones(3))  # in one step
    assert (solved.tolist(), nothing.tolist()) == ([0.5] * 3, [0] * 3)


def test_an_outer_step_improves_the_surrogate_within_the_bound(gathered):
    learner, batch = gathered
    update = learner.outer_step(batch)
    surrogate, moved = learner.surrogate_at(learner.unflat(learner.flat(learner.weights)), batch)
    assert (update.surrogate, update.divergence) == (float(surrogate), float(moved))
    assert update.surrogate < update.surrogate_before
    assert 0.001 < update.divergence <= 0.01
    assert learner.step == 1


def test_a_small_step_is_as_long_as_the_bound(gathered, monkeypatch):
    """There the divergence is its quadratic form, and the line search takes the first step or the second."""
    learner, batch = gathered
    monkeypatch.setattr(learner, "bound", 1e-6)
    assert 0.6e-6 < learner.outer_step(batch).divergence <= 1e-6


@pytest.mark.parametrize(
    "found",
    [
        lambda direction, g, turned: (-direction, g + turned),
        lambda direction, g, turned: (40 * direction, g - turned / 40),
        lambda direction, g, turned: (np.nan * direction, g),
    ],
    ids=["uphill", "too far", "not a number"],
)
def test_a_step_that_is_not_good_is_not_taken(gathered, monkeypatch, found):
    """It would not improve the surrogate, or is beyond the bound however often it is shortened: the old weights stay.

    found: the (direction, residual) to be taken, of the right direction, the gradient and the direction's product.
    """
    learner, batch = gathered
    before, solve = learner.flat(learner.weights), trpo.conjugate_gradients

    def misled(product, gradient):
        direction, residual = solve(product, gradient)
        return found(direction, gradient, gradient - residual)

    monkeypatch.setattr(trpo, "conjugate_gradients", misled)
    update = learner.outer_step(batch)
    assert update.backtracks == BACKTRACKS
    assert update.surrogate == update.surrogate_before
    assert np.array_equal(learner.flat(learner.weights), before)
    assert learner.step == 1


# -- whole runs --------------------------------------------------------------------------------------------------------

TINY = "--env=point --meta_batch_size=4 --num_rollouts=10".split()


@pytest.fixture
def program():
    """rl/main.py as a program, in this process: its flags begin anew at every call."""

    def run(*arguments):
        for name in main.FLAGS:
            main.FLAGS[name].unparse()
        main.program(["rl/main.py", *map(str, arguments)])

    return run


def final_weights(folder) -> np.ndarray:
    """Those of the newest checkpoint below the folder."""
    (path,) = folder.glob("*")
    run = main.runs.Run(path)
    learner = main.build({"update_lr": 0.5, "meta_step_size": 0.01, "baseline": None, "seed": 0}, point(), 2)
    run.restore_newest(learner)
    return learner.flat(learner.weights)


@pytest.fixture
def short_test(monkeypatch):
    """A test on fewer goals and transitions than the authors'."""
    monkeypatch.setattr(main, "TEST_GOALS", 8)
    monkeypatch.setattr(main, "TEST_TRANSITIONS", 1000)


def test_updates_at_test_are_the_authors(program, short_test, tmp_path, monkeypatch):
    """One of size alpha, then three of half of it."""
    sizes = []
    monkeypatch.setattr(MetaTRPO, "inner_step", lambda _, weights, x, did, size: sizes.append(size) or weights)
    program(*TINY, "--baseline=random", f"--logdir={tmp_path}", "--train=False")
    assert sizes == [1, 0.5, 0.5, 0.5]


def test_five_iterations_improve_the_return_after_one_update(program, short_test, tmp_path, capsys):
    program(*TINY, "--iterations=0", f"--logdir={tmp_path}")
    assert "Nothing left to do" in capsys.readouterr().out
    program(*TINY, "--iterations=5", f"--logdir={tmp_path}")
    program(*TINY, "--iterations=5", f"--logdir={tmp_path}", "--train=False")
    program(*TINY, "--baseline=random", f"--logdir={tmp_path}", "--train=False")
    trained, random = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/results.json")))
    assert (trained["flags"]["iterations"], random["flags"]["iterations"]) == (5, 0)
    assert [len(row) for row in trained["returns"]] == [5] * 8
    np.testing.assert_allclose(trained["goals_of_paths"][0], [-0.083, 0.22])  # RandomState(1), as the authors'
    # by update, goal and rollout: positions, all from the origin
    assert [len(rollouts) for goals in trained["paths"] for rollouts in goals] == [3] * (5 * 4)
    assert {tuple(rollout[0]) for goals in trained["paths"] for rollouts in goals for rollout in rollouts} == {(0, 0)}
    means = [result["mean"] for result in trained["results"]]
    assert means[1] > means[0] + 5
    assert means[1] > random["results"][1]["mean"] + 3


def test_goals_are_of_the_seed_and_the_iteration():
    class Drawn(Exception):
        pass

    def goals(random, count):
        raise Drawn(*random.uniform(size=count))

    def drawn(seed, iteration):
        main.FLAGS(["rl/main.py", f"--seed={seed}"])
        with pytest.raises(Drawn) as found:
            main.outer_iteration(None, point()._replace(goals=goals), iteration)
        return found.value.args

    assert drawn(1, 2) == drawn(1, 2)
    assert len({drawn(seed, iteration) for seed in (0, 1) for iteration in (0, 1)}) == 4


def test_a_run_that_was_stopped_goes_on_bit_for_bit(program, tmp_path, monkeypatch, capsys):
    program(*TINY, "--iterations=4", f"--logdir={tmp_path / 'whole'}")
    step = main.outer_iteration

    def stopped(learner, environment, iteration):
        if iteration == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(learner, environment, iteration)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(main, "outer_iteration", stopped)
        program(*TINY, "--iterations=4", f"--logdir={tmp_path / 'parts'}")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM" in capsys.readouterr().out
    program(*TINY, "--iterations=4", f"--logdir={tmp_path / 'parts'}")
    assert "iterations 2 to 3" in capsys.readouterr().out
    assert np.array_equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))


def test_threads_change_no_number(program, tmp_path, monkeypatch):
    monkeypatch.setattr(main.devices, "start", lambda *threads: None)  # TensorFlow takes its settings once
    for threads in (1, 3):
        program(*TINY, "--iterations=2", f"--threads={threads}", f"--logdir={tmp_path / str(threads)}")
    assert np.array_equal(final_weights(tmp_path / "1"), final_weights(tmp_path / "3"))


@pytest.mark.parametrize("baseline", ["pretrained", "oracle"])
def test_baselines_train_without_an_inner_step(program, short_test, tmp_path, monkeypatch, baseline):
    program(*TINY, "--iterations=1", f"--baseline={baseline}", f"--logdir={tmp_path}")
    program(*TINY, f"--baseline={baseline}", f"--logdir={tmp_path}", "--train=False")
    (path,) = tmp_path.glob("*/results.json")
    assert len(json.loads(path.read_text())["results"]) == (1 if baseline == "oracle" else 5)

    def refuse(folder, flag):
        raise InputError(f"{folder} cannot be written: give another {flag}")

    monkeypatch.setattr(main.runs, "check_writable", refuse)
    monkeypatch.setattr(MetaTRPO, "curve", None)  # it is refused before any work
    with pytest.raises(SystemExit, match="cannot be written: give another --logdir"):
        program(*TINY, f"--baseline={baseline}", f"--logdir={tmp_path}", "--train=False")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env=ant"], "value should be one of"),
        (["--meta_batch_size=0"], "must be 1 or more"),
        (["--num_rollouts=10000000"], "must be 1 or more, and at most 1,000,000"),
        (["--threads=1000000"], "must be 0 or more, and at most "),
        (["--update_lr=-1"], "must be a number above 0"),
        (["--meta_step_size=nan"], "must be a number above 0"),
        (["--iteration=3"], "Unknown command line flag 'iteration'"),
        (["iterations=3"], "unexpected argument iterations=3"),
        (["--baseline=random"], "give --train=False to test it"),
        (["--train=False"], "no checkpoint"),
    ],
)
def test_bad_flags_are_told_in_one_line(program, tmp_path, flags, message):
    with pytest.raises(SystemExit) as refused:
        program(f"--logdir={tmp_path}", *flags)
    assert message in refused.value.code
    assert refused.value.code.startswith("rl/main.py: ")
    assert "\n" not in refused.value.code


def test_another_run_is_not_continued_by_mistake(program, tmp_path):
    program(*TINY, "--iterations=1", f"--logdir={tmp_path}")
    (path,) = tmp_path.glob("*/flags.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(SystemExit, match="--seed=3 there, 0 here"):
        program(*TINY, "--iterations=2", f"--logdir={tmp_path}")


def test_every_environment_has_defaults():
    assert set(main.DEFAULTS) == set(ENVIRONMENTS)


# -- what is recorded --------------------------------------------------------------------------------------------------

ROOT = Path(main.__file__).parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("rl_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_hands_its_flags_to_the_recorder(script, tmp_path):
    """Its name says environment and model; --seed and others may follow."""
    printer = tmp_path / "prints its arguments"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    printed = subprocess.run(
        [script, "--seed=7"], env=os.environ | {"PYTHON": str(printer)}, capture_output=True, text=True, check=True
    )
    program, name, *handed = printed.stdout.splitlines()
    assert (Path(program).resolve(), Path(name).stem) == (ROOT / "rl" / "row.py", script.stem)
    for name in main.FLAGS:
        main.FLAGS[name].unparse()
    main.FLAGS(["rl/main.py", *handed])
    assert script.stem == f"rl_{main.FLAGS.env}_{main.FLAGS.baseline or 'maml'}"
    assert main.FLAGS.seed == 7


@pytest.fixture
def recorder(monkeypatch):
    """rl/row.py as a module, and the programs that it calls, which are not run."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    recorder, called = importlib.import_module("rl.row"), []
    for name in main.FLAGS:
        main.FLAGS[name].unparse()
    monkeypatch.setattr(recorder.row, "run_program", lambda program, flags: called.append((program, *flags)))
    return recorder, called


@pytest.mark.parametrize(("flags", "seed"), [(["--seed=3"], ".seed3"), (["--baseline=random"], "")])
def test_what_is_recorded(recorder, monkeypatch, tmp_path, flags, seed):
    recorder, called = recorder
    monkeypatch.setattr(recorder, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(main, "run_folder", lambda identity: main.runs.Run(tmp_path))
    (tmp_path / "results.json").write_text('{"flags": {}, "results": []}')
    path = recorder.record(Path("experiments/rl_x.sh"), [*flags, f"--logdir={tmp_path}"])
    assert path == tmp_path / "results" / f"rl_x{seed}.json"
    assert {"row": "rl_x", "flags": {}, "results": [], "hours": 0}.items() <= json.loads(path.read_text()).items()
    tested = ("rl/main.py", *flags, f"--logdir={tmp_path}", "--train=False")
    assert called == ([tested] if "random" in flags[0] else [tested[:-1], tested])


@pytest.mark.parametrize("script", ["experiments/omniglot_5way_1shot.sh", "rl_point_maml.sh"])
def test_a_script_of_another_program_is_refused(script, monkeypatch, capsys):
    """Before its record is replaced by one of another form."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["rl/row.py", script, "--help"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "rl" / "row.py"), run_name="__main__")
    assert refused.value.code == 2
    assert f"{script} is not one of experiments/rl_*.sh: call one of those" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--help"], ["--iteration=3"], ["iterations=3"]])
def test_a_question_or_a_slip_is_not_recorded(recorder, flags):
    recorder, called = recorder
    with pytest.raises(SystemExit):
        recorder.record(Path("rl_x.sh"), flags)
    assert called == [("rl/main.py", *flags)]


def test_the_document_is_in_step_with_results():
    report = pytest.importorskip(
        "rl.report", reason="matplotlib is not installed: pip install -r requirements-plot.txt"
    )
    shown = (ROOT / "docs" / "rl.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == report.table(ROOT / "results").strip(), "python rl/report.py writes it anew"


def test_figures_of_records(tmp_path):
    """Of one environment, the authors' beside ours; an oracle has one column."""
    report = pytest.importorskip(
        "rl.report", reason="matplotlib is not installed: pip install -r requirements-plot.txt"
    )

    def record(baseline, *means):
        return {
            "flags": {"env": "point", "baseline": baseline, "seed": 0, "iterations": 9},
            "results": [{"mean": mean, "ci95": 1.0} for mean in means],
            "goals_of_paths": [[0.1, 0.2], [-0.3, 0.4]],
            "paths": [[[[[0, 0], [0.1, 0.1]], [[0, 0], [0.1, 0.2]]]] * 2] * 4,
        }

    for one in (record(None, -40, -9, -4, -3, -3), record("oracle", -2)):
        (tmp_path / f"rl_{one['flags']['baseline']}.json").write_text(json.dumps(one))
    (tmp_path / "rl_authors.json").write_bytes((ROOT / "results" / "rl_authors.json").read_bytes())
    ours = report.records(tmp_path)
    assert report.table(tmp_path).splitlines()[2:] == [
        "| 2D navigation: MAML | ours, 9 iterations, seed 0 | -40.0 +- 1.0 | -9.0 +- 1.0 | -4.0 +- 1.0 | -3.0 +- 1.0 |",
        "|  | authors | -40.4 +- 4.0 | -11.7 +- 2.2 | -3.3 +- 0.6 | -3.2 +- 0.6 |",
        "| 2D navigation: oracle | ours, 9 iterations, seed 0 | -2.0 +- 1.0 |  |  |  |",
        "|  | authors | -2.3 +- 0.1 |  |  |  |",
    ]
    (panel,) = report.returns_figure(ours, report.authors(tmp_path)).axes
    assert [list(line.get_ydata()) for line in panel.lines[:4]] == [
        [-40, -9, -4, -3],
        [-40.407, -11.68, -3.328, -3.23],
        [-2] * 4,
        [-2.288] * 4,
    ]
    assert len(report.paths_figure(ours["point"][0]).axes) == 2
