"""rl/: environments, rollouts, advantages, the inner and outer step, and whole runs."""

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
from rl.environments import ENVIRONMENTS, center_of_mass, half_cheetah, point
from rl.policy import Experience, act, divergence, gaussian, log_probability, policy_gradient
from rl.rollouts import DISCOUNT, RIDGE, Rollouts, advantages, collect, discounted_returns
from rl.trpo import BACKTRACKS, CONJUGATE_STEPS, MetaBatch, MetaTRPO, conjugate_gradients

# -- environments ------------------------------------------------------------------------------------------------------


def test_point_step_and_reward():
    """An action of 1 moves the point by 0.1, the maximum. The reward is minus the distance to the goal afterwards."""
    environment, goal = point(), np.array([0.3, 0.4])
    start = environment.reset(goal, None)
    states, rewards, ends = environment.step(start, goal, np.array([0.5, -7.0]))
    np.testing.assert_allclose(states, [0.05, -0.1])
    np.testing.assert_allclose(rewards, -np.hypot(0.25, 0.5))
    assert not ends
    assert environment.observe(states, goal).tolist() == states.tolist()
    assert point(oracle=True).observe(states, goal).tolist() == [*states, *goal]


@pytest.mark.parametrize(("offset", "reached"), [((0.009, -0.009), True), ((0.0, 0.011), False), ((0.5, 0.0), False)])
def test_point_reaches_its_goal_within_a_hundredth(offset, reached):
    goal = np.array([0.2, -0.1])
    assert point().step(goal + offset, goal, np.zeros(2))[2] == reached


def test_point_goals_are_uniform():
    goals = point().goals(np.random.default_rng(0), 10_000)
    np.testing.assert_allclose([goals.min(0), goals.max(0)], [[-0.5, -0.5], [0.5, 0.5]], atol=1e-3)
    np.testing.assert_allclose(goals.std(0), 1 / 12**0.5, atol=5e-3)


@pytest.fixture(scope="module")
def mujoco():
    return pytest.importorskip("mujoco", reason="the half-cheetah's tests need mujoco: requirements-rl.txt")


@pytest.fixture
def cheetah(mujoco):
    """A MuJoCo model and data of the half-cheetah, for single steps."""
    model = mujoco.MjModel.from_xml_path("rl/half_cheetah.xml")
    mujoco.mj_setTotalmass(model, 14)
    data = mujoco.MjData(model)
    mujoco.mj_setConst(model, data)
    return model, data


def test_center_of_mass_matches_mujoco(mujoco, cheetah):
    model, data = cheetah
    random = np.random.default_rng(0)
    q, v = random.standard_normal((2, 5, 9))
    positions, velocities = center_of_mass(model, q, v)
    for i in range(5):
        data.qpos[:], data.qvel[:] = q[i], v[i]
        mujoco.mj_forward(model, data)
        mujoco.mj_subtreeVel(model, data)
        np.testing.assert_allclose(positions[i], data.subtree_com[1], atol=1e-12)
        np.testing.assert_allclose(velocities[i], data.subtree_linvel[1], atol=1e-12)


@pytest.mark.parametrize(
    ("reward", "run"),
    [("direction", lambda speed, goal: speed if goal >= 1 else -speed), ("speed", lambda v, goal: -abs(v - goal))],
)
def test_half_cheetah_step_matches_mujoco(mujoco, cheetah, reward, run):
    """Each of the parallel states advances by 0.01 s under the clipped action, as in MuJoCo's own step."""
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


@pytest.mark.parametrize(("reward", "targets"), [("direction", [-1, 1]), ("speed", [0.2, 1.7])])
def test_half_cheetah_starts_at_rest_plus_noise(mujoco, reward, targets):
    environment = half_cheetah(reward)
    goals = np.repeat([[[0.2], [1.7]]], 1000, 0)
    states = environment.reset(goals, np.random.default_rng(0))
    np.testing.assert_allclose(states[..., :1], 0)  # the time
    np.testing.assert_allclose(states[..., 1:].mean((0, 1)), np.zeros(18), atol=0.01)
    np.testing.assert_allclose(states[..., 1:].std((0, 1)), np.repeat([0.01, 0.1], 9), rtol=0.1)
    observed = environment.observe(states, goals)
    oracle = half_cheetah(reward, oracle=True).observe(states, goals)
    assert (observed.shape[-1], oracle.shape[-1]) == (20, 21)
    np.testing.assert_array_equal(oracle[..., :20], observed)
    np.testing.assert_array_equal(oracle[..., 20], np.repeat([targets], 1000, 0))


def test_missing_mujoco_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(InputError, match=r"mujoco.*requirements-rl\.txt"):
        half_cheetah("direction")


# -- rollouts ----------------------------------------------------------------------------------------------------------


def straight(observations):
    """A policy without noise that moves along the first axis."""
    means = np.zeros_like(observations)
    means[..., 0] = 1
    return means, np.full_like(observations, -np.inf)


def test_rollouts_restart_at_the_goal_and_none_is_cut_short():
    """Each of two slots reaches a goal three steps away 34 times, the last time at step 102."""
    goals = np.array([[0.3, 0.0], [0.0, 0.5]])
    rollouts = collect(point(), straight, goals, 2, np.random.default_rng(0))
    assert rollouts.ends.sum(1).tolist() == [68, 2]
    assert (rollouts.shares > 0).sum(1).tolist() == [204, 200]
    np.testing.assert_allclose(rollouts.shares.sum(1), 1)
    np.testing.assert_allclose(rollouts.shares[1, 200:], 0)
    np.testing.assert_allclose(rollouts.mean_returns()[0], -(0.2 + 0.1 + 0.0), atol=1e-6)
    np.testing.assert_allclose(rollouts.observations[0, :6, 0], [0, 0.1, 0.2, 0, 0.1, 0.2], atol=1e-6)
    assert rollouts.times[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    assert rollouts.times[1, :200].tolist() == [*range(100), *range(100)]
    assert rollouts.rounds[0, [0, 3, 101, 102, 203]].tolist() == [0, 1, 33, 0, 33]
    rollouts.rewards[0, :3] = [-7, 0, -2]  # change a first rollout only
    np.testing.assert_allclose(rollouts.mean_returns(first=True)[0], -(9 + 0.3) / 2, atol=1e-6)
    assert [len(path) for path in rollouts.paths(0, 2)] == [3, 3]


def mixed_rollouts() -> Rollouts:
    """Return rollouts of different lengths: one goal is near, one is far, and the policy has a little noise."""

    def policy(observations):
        return straight(observations)[0], np.full_like(observations, -3.0)

    goals = np.array([[0.1, 0.0], [0.5, 0.5]])
    return collect(point()._replace(horizon=7), policy, goals, 3, np.random.default_rng(0))


def test_advantages_match_the_plain_loop():
    collected = mixed_rollouts()
    collected = collected._replace(observations=30 * collected.observations)  # the baseline clips them to 10
    ours, returns = advantages(collected), discounted_returns(collected)
    assert len(set((collected.shares > 0).sum(1))) == 2  # there is padding
    assert np.abs(collected.observations).max() > 10
    for task in range(2):
        rollouts, rollout = [], []
        for i in np.flatnonzero(collected.shares[task]):
            rollout.append(i)
            if collected.ends[task, i]:
                rollouts.append(rollout)
                rollout = []
        assert not rollout
        features, expected = [], []
        for rollout in rollouts:
            for step, i in enumerate(rollout):
                later = [DISCOUNT**k * collected.rewards[task, j] for k, j in enumerate(rollout[step:])]
                expected.append(sum(later))
                o, t = np.clip(collected.observations[task, i].astype(float), -10, 10), step / 100
                features.append([*o, *(o * o), t, t**2, t**3, 1])
        features, expected = np.array(features), np.array(expected)
        np.testing.assert_allclose(returns[task][collected.shares[task] > 0], expected)
        weights = np.linalg.inv(features.T @ features + RIDGE * np.eye(8)) @ features.T @ expected
        residuals = expected - features @ weights
        residuals = (residuals - residuals.mean()) / residuals.std()
        np.testing.assert_allclose(ours[task][collected.shares[task] > 0], residuals, atol=1e-5)
        assert not ours[task][collected.shares[task] == 0].any()


# -- the policy --------------------------------------------------------------------------------------------------------


def test_numpy_and_tensorflow_policies_agree():
    network, x = gaussian(3, 2), np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    weights = [network.init(seed) | {"log_std": tf.constant([0.5, -0.5])} for seed in range(2)]
    means, log_stds = act({name: np.stack([w[name] for w in weights]) for name in weights[0]}, x)
    for task in range(2):
        outputs = network.apply(weights[task], x[task])
        np.testing.assert_allclose(outputs[:, :2], means[task], atol=1e-6)
        np.testing.assert_allclose(outputs[:, 2:], np.broadcast_to(log_stds[task], (5, 2)), atol=1e-6)


def test_initial_weights_are_xavier_uniform():
    """Each layer and seed gives different draws."""
    weights = {(seed, name): w.numpy() for seed in (0, 1) for name, w in gaussian(100, 100).init(seed).items()}
    drawn = [weights.pop((seed, f"w{layer}")) for seed in (0, 1) for layer in (1, 2, 3)]
    for i, w in enumerate(drawn):
        limit = (6 / 200) ** 0.5
        assert 0.99 * limit < np.abs(w).max() <= limit
        np.testing.assert_allclose(w.std(), limit / 3**0.5, rtol=0.05)
        assert not any(np.array_equal(w, other) for other in drawn[:i])
    assert not any(w.any() for w in weights.values())


def test_log_probability_and_divergence():
    """Compare with the definition of the density, and with the mean log density ratio of many draws."""
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
    """Return a learner whose actions have the weight as mean and standard deviation 1."""
    network = Network(
        lambda seed: {"w1": tf.constant([[0.3]], tf.float64), "log_std": tf.zeros(1, tf.float64)},
        lambda weights, x: tf.concat([x @ weights["w1"], tf.zeros_like(x)], -1),
        ("w1",),
        {},
    )
    return MetaTRPO(InnerLoop(network, policy_gradient, inner_lr, 1), bound=0.01, seed=0)


def test_one_parameter_gradient_matches_hand_derivation():
    """w' = w + alpha sum c (a - w). At ratio 1 the surrogate's gradient is -(1 - alpha sum c) mean of A (a - w')."""
    alpha, w = 0.5, 0.3
    learner = one_parameter_learner(alpha)
    a, advantage = np.array([0.1, 0.9, -0.4]), np.array([2.0, 1.0, -1.0])
    b, later = np.array([0.7, -0.2]), np.array([-0.5, 1.5])
    c = advantage / 3

    def experience(actions, advantages):
        return np.ones((1, len(actions), 1)), Experience(
            actions[None, :, None], advantages[None], np.full((1, len(actions)), 1 / len(actions))
        )

    x, support = experience(a, advantage)
    adapted = w + alpha * np.sum(c * (a - w))
    after = learner.adapt_each({"w1": np.full((1, 1, 1), w), "log_std": np.zeros((1, 1))}, x, support, np.float64(1))
    np.testing.assert_allclose(after["w1"], [[[adapted]]])
    half = learner.inner_step({"w1": np.full((1, 1, 1), w), "log_std": np.zeros((1, 1))}, x, support, 0.5)
    np.testing.assert_allclose(half["w1"], [[[(w + adapted) / 2]]])

    query_x, query = experience(b, later)
    batch = MetaBatch(x, support, query_x, query, learner.apply_each(after, query_x))
    gradient, surrogate = learner.surrogate_gradient(tf.nest.map_structure(tf.convert_to_tensor, batch))
    np.testing.assert_allclose(surrogate, -np.mean(later))
    np.testing.assert_allclose(
        gradient["w1"], [[-(1 - alpha * np.sum(c)) * np.mean(later * (b - adapted))]], rtol=1e-12
    )


def float64_learner(environment, inner_steps, seed=0) -> MetaTRPO:
    """Return a learner with a small float64 policy whose weights are all nonzero."""
    network = gaussian(environment.observation_size, environment.action_size, hidden=(3, 4))

    def init(seed):
        random = np.random.default_rng(seed)
        return {name: tf.constant(0.5 * random.standard_normal(w.shape)) for name, w in network.init(seed).items()}

    inner = InnerLoop(network._replace(init=init), policy_gradient, 0.5, inner_steps)
    return MetaTRPO(inner, bound=0.01, seed=seed, cores=2)


@pytest.fixture(scope="module")
def traced():
    """A learner, its initial weights and a meta-batch, made once because tracing is slow."""
    environment, random = point()._replace(horizon=20), np.random.default_rng(0)
    learner = float64_learner(environment, inner_steps=1)
    batch, _ = learner.gather(environment, environment.goals(random, 3), 10, random)
    return learner, learner.flat(learner.weights), batch


@pytest.fixture
def gathered(traced):
    """The traced learner, reset to its initial weights, and its meta-batch."""
    learner, weights, batch = traced
    for name, value in learner.unflat(weights).items():
        learner.weights[name].assign(value)
    learner.step.assign(0)
    return learner, batch


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_fisher_product_is_the_original_finite_difference(inner_steps):
    """Autodiff without our loops over tasks computes the gradients at theta +- v / |theta|, and the Hessian."""
    environment, random = point()._replace(horizon=5), np.random.default_rng(0)
    learner = float64_learner(environment, inner_steps)
    batch, _ = learner.gather(environment, environment.goals(random, 2), 4, random)
    theta = learner.flat(learner.weights)

    def mean_divergence(vector):
        weights, first = {}, 0
        for name, weight in learner.weights.items():
            size = weight.shape.num_elements()
            weights[name] = tf.reshape(vector[first : first + size], weight.shape)
            first += size
        tasks = [tf.nest.map_structure(lambda x, task=task: x[task], batch) for task in range(2)]
        return tf.add_n([learner.surrogate_and_divergence(weights, task)[1] for task in tasks]) / 2

    def gradient(vector):
        with tf.GradientTape() as tape:
            tape.watch(vector)
            value = mean_divergence(vector)
        return tape.gradient(value, vector)

    gradient_at = tf.function(gradient, autograph=False)

    @tf.function(autograph=False)
    def hessian_times(v):
        old = tf.constant(theta)
        with tf.GradientTape() as tape:
            tape.watch(old)
            slope = tf.reduce_sum(gradient(old) * v)
        return tape.gradient(slope, old)

    product, v = learner.fisher_product(batch), random.standard_normal(len(theta))
    step = v / np.linalg.norm(theta)
    difference = (gradient_at(tf.constant(theta + step)) - gradient_at(tf.constant(theta - step))).numpy()
    expected = difference * np.linalg.norm(theta) / 2 + 1e-5 * v
    np.testing.assert_allclose(product(v), expected, rtol=1e-6, atol=1e-9)
    exact = hessian_times(tf.constant(v)).numpy() + 1e-5 * v
    assert np.abs(exact - expected).max() > 0.01 * np.abs(exact).max()  # the step is wide
    np.testing.assert_allclose(product(1e-4 * v) / 1e-4, exact, atol=1e-4 * np.abs(exact).max())


def test_conjugate_gradients_solve_the_system():
    random = np.random.default_rng(0)
    root = random.standard_normal((CONJUGATE_STEPS, CONJUGATE_STEPS))
    matrix, b = root @ root.T + np.eye(len(root)), random.standard_normal(len(root))
    np.testing.assert_allclose(matrix @ conjugate_gradients(lambda vector: matrix @ vector, b), b, atol=1e-6)
    calls = []
    x = conjugate_gradients(lambda vector: calls.append(0) or 2 * vector, np.ones(3))
    assert (x.tolist(), len(calls)) == ([0.5] * 3, 1)  # done in one step


def test_outer_step_improves_the_surrogate_within_the_bound(gathered):
    learner, batch = gathered
    update = learner.outer_step(batch)
    surrogate, kl = learner.surrogate_at(learner.unflat(learner.flat(learner.weights)), batch)
    assert (update.surrogate, update.divergence) == (float(surrogate), float(kl))
    assert update.surrogate < update.surrogate_before
    assert 0.001 < update.divergence <= 0.01
    assert learner.step == 1


def test_small_steps_nearly_reach_the_bound(gathered, monkeypatch):
    """For a small bound and a short direction the divergence is nearly quadratic: the first or second step is taken."""
    learner, batch = gathered
    monkeypatch.setattr(learner, "bound", 1e-6)
    monkeypatch.setattr(trpo, "conjugate_gradients", lambda product, gradient: 1e-2 * gradient)
    assert 0.6e-6 < learner.outer_step(batch).divergence <= 1e-6


@pytest.mark.parametrize(
    ("of_gradient", "of_product"), [(-1, 1), (1, 1 / 1600), (np.nan, 1)], ids=["uphill", "too far", "NaN"]
)
def test_failed_line_search_keeps_the_weights(gathered, monkeypatch, of_gradient, of_product):
    """No step improves the surrogate within the bound.

    of_gradient: the direction, in gradients. of_product: factor of the product in the step's length: 1/1600 makes it 40
    times as long.
    """
    learner, batch = gathered
    before, product = learner.flat(learner.weights), learner.fisher_product(batch)
    monkeypatch.setattr(trpo, "conjugate_gradients", lambda product, gradient: of_gradient * gradient)
    monkeypatch.setattr(learner, "fisher_product", lambda batch: lambda v: of_product * product(v))
    update = learner.outer_step(batch)
    assert update.backtracks == BACKTRACKS
    assert update.surrogate == update.surrogate_before
    assert np.array_equal(learner.flat(learner.weights), before)
    assert learner.step == 1


def test_a_direction_of_negative_length_is_the_step(gathered, monkeypatch):
    """As in the original: the square root of its length is NaN."""
    learner, batch = gathered
    before, direction = learner.flat(learner.weights), 1e-3 * learner.flat(learner.surrogate_gradient(batch)[0])
    monkeypatch.setattr(trpo, "conjugate_gradients", lambda product, gradient: direction)
    monkeypatch.setattr(learner, "fisher_product", lambda batch: lambda v: -v)
    assert learner.outer_step(batch).backtracks == 0
    np.testing.assert_allclose(learner.flat(learner.weights), before - direction, rtol=1e-12)


# -- whole runs --------------------------------------------------------------------------------------------------------

TINY = "--env=point --meta_batch_size=4 --num_rollouts=10".split()


@pytest.fixture
def program():
    """A function that runs rl/main.py in this process with fresh flags."""

    def run(*arguments):
        for name in main.FLAGS:
            main.FLAGS[name].unparse()
        main.program(["rl/main.py", *map(str, arguments)])

    return run


def final_weights(folder) -> np.ndarray:
    """Return the weights in the newest checkpoint of the only run in the folder."""
    (path,) = folder.glob("*")
    run = main.runs.Run(path)
    learner = main.build({"update_lr": 0.5, "meta_step_size": 0.01, "baseline": None, "seed": 0}, point(), 2)
    run.restore_newest(learner)
    return learner.flat(learner.weights)


@pytest.fixture
def short_test(monkeypatch):
    """Shrink the test to fewer goals and transitions than the authors'."""
    monkeypatch.setattr(main, "TEST_GOALS", 8)
    monkeypatch.setattr(main, "TEST_TRANSITIONS", 1000)


def test_update_sizes_at_test_match_the_authors(program, short_test, tmp_path, monkeypatch):
    """The first is alpha, the next three are half of it."""
    sizes = []
    monkeypatch.setattr(MetaTRPO, "inner_step", lambda _, weights, x, experience, size: sizes.append(size) or weights)
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
    np.testing.assert_allclose(trained["goals_of_paths"][0], [-0.083, 0.22])  # from RandomState(1), like the authors'
    # [update, goal, rollout, step, coordinate], all from the origin
    assert [len(rollouts) for goals in trained["paths"] for rollouts in goals] == [3] * (5 * 4)
    assert {tuple(rollout[0]) for goals in trained["paths"] for rollouts in goals for rollout in rollouts} == {(0, 0)}
    means = [result["mean"] for result in trained["results"]]
    assert means[1] > means[0] + 5
    assert means[1] > random["results"][1]["mean"] + 3


def test_goals_depend_on_seed_and_iteration():
    class Drawn(Exception):
        pass

    def goals(random, count):
        raise Drawn(*random.uniform(size=count))

    def drawn(seed, iteration):
        main.FLAGS(["rl/main.py", f"--seed={seed}"])
        with pytest.raises(Drawn) as raised:
            main.outer_iteration(None, point()._replace(goals=goals), iteration)
        return raised.value.args

    assert drawn(1, 2) == drawn(1, 2)
    assert len({drawn(seed, iteration) for seed in (0, 1) for iteration in (0, 1)}) == 4


def test_resume_is_bitwise_identical(program, tmp_path, monkeypatch, capsys):
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


@pytest.fixture
def fast_iterations(monkeypatch):
    """Replace outer steps by ones that only count, with the returns of a list, and measure nothing in tests."""
    returns = []

    def iterate(learner, environment, iteration):
        learner.step.assign_add(1)
        return {"Pre-update_return": -99.0, "Post-update_return__step_1": returns[iteration], "rollouts_seconds": 0.1}

    def measured(learner, environment, goals):
        return {"results": [{"mean": float(learner.step)}], "returns": []}

    monkeypatch.setattr(main, "outer_iteration", iterate)
    monkeypatch.setattr(main, "measured", measured)
    return returns


@pytest.mark.parametrize("stop_at", [None, 24])
def test_the_best_checkpoint_is_kept_and_tested(program, fast_iterations, tmp_path, stop_at):
    """Its return is averaged over the ten iterations up to it, also over those before a resume."""
    fast_iterations[:] = [*[-20.0] * 20, *[-10.0 - i for i in range(10)], *[-3.0] * 5, *[-30.0] * 200]
    for total in filter(None, (stop_at, 200)):
        program(*TINY, f"--iterations={total}", f"--logdir={tmp_path}")
    (folder,) = tmp_path.glob("*")
    validation = main.runs.Run(folder).best()
    assert (validation.best, validation.accuracy) == (29, -14.5)
    assert main.runs.Run(folder).iterations() == [29, *range(109, 200, 10)]
    program(*TINY, f"--logdir={tmp_path}", "--train=False")
    entry = json.loads((folder / "results.json").read_text())
    assert entry["flags"]["product"] == "finite_difference"
    assert (entry["flags"]["iterations"], entry["results"]) == (200, [{"mean": 200}])
    assert entry["best"] == {"iterations": 30, "training_return": -14.5, "results": [{"mean": 30}], "returns": []}


def test_runs_with_the_exact_product_are_only_tested(program, fast_iterations, tmp_path):
    """They did not record the product."""
    fast_iterations[:] = [-1.0] * 3
    program(*TINY, "--iterations=2", f"--logdir={tmp_path}")
    (folder,) = tmp_path.glob("*")
    flags = json.loads((folder / "flags.json").read_text())
    assert flags.pop("product") == "finite_difference"
    (folder / "flags.json").write_text(json.dumps(flags))
    for arguments in ([*TINY, "--iterations=3", f"--logdir={tmp_path}"], [f"--run={folder}", "--iterations=3"]):
        with pytest.raises(SystemExit, match=f"{folder}: "):
            program(*arguments)
    program(f"--run={folder}", "--train=False")
    assert json.loads((folder / "results.json").read_text())["flags"]["product"] == "exact"
    assert json.loads((folder / "flags.json").read_text()) == flags


def test_directions_are_also_recorded_separately(monkeypatch):
    """A goal of at least 1 is forward."""
    returns = np.array([[1.0, 10], [3, 30], [-5, 50]])
    main.FLAGS(["rl/main.py", "--env=cheetah_direction"])
    curve = [
        Rollouts(None, None, column[:, None], None, *[np.full((3, 1), kind) for kind in (True, 0, 1.0)])
        for column in returns.T
    ]
    monkeypatch.setattr(MetaTRPO, "curve", lambda *arguments: curve)
    learner = MetaTRPO(InnerLoop(gaussian(1, 1), policy_gradient, 0.1, 1), bound=0.01, seed=0)
    entry = main.measured(learner, point(), np.array([[1.0], [1.5], [0.99]]))
    assert [result["forward"]["mean"] for result in entry["results"]] == [2, 20]
    assert entry["results"][0]["forward"]["ci95"] == pytest.approx(1.96 / 2**0.5)
    assert [result["backward"]["mean"] for result in entry["results"]] == [-5, 50]


def test_thread_count_does_not_change_the_weights(program, tmp_path, monkeypatch):
    monkeypatch.setattr(main.devices, "start", lambda *threads: None)  # TensorFlow accepts its settings only once
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
        raise InputError(f"{flag}={folder}: is not writable; choose another")

    monkeypatch.setattr(main.runs, "check_writable", refuse)
    monkeypatch.setattr(MetaTRPO, "curve", None)  # refused before any work
    with pytest.raises(SystemExit, match="--logdir"):
        program(*TINY, f"--baseline={baseline}", f"--logdir={tmp_path}", "--train=False")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--env=ant"], "--env=ant"),
        (["--meta_batch_size=0"], "--meta_batch_size=0"),
        (["--num_rollouts=10000000"], "--num_rollouts=10000000"),
        (["--threads=1000000"], "--threads=1000000"),
        (["--update_lr=-1"], "--update_lr=-1"),
        (["--meta_step_size=nan"], "--meta_step_size=nan"),
        (["--iteration=3"], "'iteration'"),
        (["iterations=3"], "iterations=3"),
        (["--baseline=random"], "--train=False"),
        (["--train=False"], "point.mbs_40"),  # the run folder, which has no checkpoint
    ],
)
def test_invalid_flags_are_refused_in_one_line(program, tmp_path, flags, named):
    with pytest.raises(SystemExit) as refused:
        program(f"--logdir={tmp_path}", *flags)
    assert named in refused.value.code
    assert refused.value.code.startswith("rl/main.py: ")
    assert "\n" not in refused.value.code


def test_folder_with_other_flags_is_refused(program, tmp_path):
    program(*TINY, "--iterations=1", f"--logdir={tmp_path}")
    (path,) = tmp_path.glob("*/flags.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(SystemExit, match="--seed=3"):
        program(*TINY, "--iterations=2", f"--logdir={tmp_path}")


def test_every_environment_has_defaults():
    assert set(main.DEFAULTS) == set(ENVIRONMENTS)


# -- records ----------------------------------------------------------------------------------------------------------

ROOT = Path(main.__file__).parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("rl_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_passes_its_flags_to_the_recorder(script, tmp_path):
    """Its name gives environment, model and other numbers of transitions. Its caller may add flags such as --seed."""
    printer = tmp_path / "prints its arguments"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    printed = subprocess.run(
        [script, "--seed=7"], env=os.environ | {"PYTHON": str(printer)}, capture_output=True, text=True, check=True
    )
    program, name, *passed = printed.stdout.splitlines()
    assert (Path(program).resolve(), Path(name).stem) == (ROOT / "rl" / "row.py", script.stem)
    for name in main.FLAGS:
        main.FLAGS[name].unparse()
    main.FLAGS(["rl/main.py", *passed])
    batch = "_1000" if main.FLAGS.meta_batch_size * main.FLAGS.num_rollouts * 100 == 1000 else ""
    assert script.stem == f"rl_{main.FLAGS.env}_{main.FLAGS.baseline or 'maml'}{batch}"
    assert main.FLAGS.seed == 7


@pytest.fixture
def recorder(monkeypatch):
    """rl/row.py as a module, and a list of the commands it would run."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    recorder, commands = importlib.import_module("rl.row"), []
    for name in main.FLAGS:
        main.FLAGS[name].unparse()
    monkeypatch.setattr(recorder.row, "run_program", lambda program, flags: commands.append((program, *flags)))
    return recorder, commands


@pytest.mark.parametrize(("flags", "seed"), [(["--seed=3"], ".seed3"), (["--baseline=random"], "")])
def test_record_trains_then_tests(recorder, monkeypatch, tmp_path, flags, seed):
    recorder, commands = recorder
    monkeypatch.setattr(recorder, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(main, "run_folder", lambda identity: main.runs.Run(tmp_path))
    (tmp_path / "results.json").write_text('{"flags": {}, "results": []}')
    path = recorder.record(Path("experiments/rl_x.sh"), [*flags, f"--logdir={tmp_path}"])
    assert path == tmp_path / "results" / f"rl_x{seed}.json"
    assert {"row": "rl_x", "flags": {}, "results": [], "hours": 0}.items() <= json.loads(path.read_text()).items()
    test = ("rl/main.py", *flags, f"--logdir={tmp_path}", "--train=False")
    assert commands == ([test] if "random" in flags[0] else [test[:-1], test])


@pytest.mark.parametrize("script", ["experiments/omniglot_5way_1shot.sh", "rl_point_maml.sh"])
def test_scripts_of_other_programs_are_refused(script, monkeypatch, capsys):
    """Otherwise a record of another format would replace theirs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["rl/row.py", script, "--help"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "rl" / "row.py"), run_name="__main__")
    assert refused.value.code == 2
    assert script in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--help"], ["--iteration=3"], ["iterations=3"]])
def test_help_and_invalid_flags_are_not_recorded(recorder, flags):
    recorder, commands = recorder
    with pytest.raises(SystemExit):
        recorder.record(Path("rl_x.sh"), flags)
    assert commands == [("rl/main.py", *flags)]


def test_docs_table_matches_the_records():
    report = pytest.importorskip(
        "rl.report", reason="matplotlib is not installed: pip install -r requirements-plot.txt"
    )
    page = (ROOT / "docs" / "rl.md").read_text()
    assert page == report.with_tables(page, ROOT / "results"), "to update it, run python rl/report.py"


def test_table_and_figures_show_records_and_authors(tmp_path):
    """The oracle has one column, because it needs no update. Runs with the exact product serve a comparison only."""
    report = pytest.importorskip(
        "rl.report", reason="matplotlib is not installed: pip install -r requirements-plot.txt"
    )

    def record(baseline, *means, **flags):
        return {
            "flags": {"env": "point", "baseline": baseline, "seed": 0, "iterations": 9, **flags},
            "results": [{"mean": mean, "ci95": 1.0} for mean in means],
            "goals_of_paths": [[0.1, 0.2], [-0.3, 0.4]],
            "paths": [[[[[0, 0], [0.1, 0.1]], [[0, 0], [0.1, 0.2]]]] * 2] * 4,
        }

    maml = record(None, -40, -9, -4, -3, -3, product="finite_difference")
    maml["best"] = {"iterations": 5, "results": record(None, -41, -8, -3, -2, -2)["results"]}
    exact = record(None, -40, -11, -7, -6, -6)
    batch = {"meta_batch_size": 10, "num_rollouts": 1}
    for number, row in enumerate((maml, exact, record("oracle", -2), record("oracle", -3, **batch))):
        (tmp_path / f"rl_{number}.json").write_text(json.dumps(row))
    (tmp_path / "rl_authors.json").write_bytes((ROOT / "results" / "rl_authors.json").read_bytes())
    ours = report.records(tmp_path)
    assert report.table(tmp_path).splitlines()[2:] == [
        "| 2D navigation: MAML | ours, 9 iterations, seed 0 | -40.0 +- 1.0 | -9.0 +- 1.0 | -4.0 +- 1.0 | -3.0 +- 1.0 |",
        "|  | its best checkpoint, after 5 iterations | -41.0 +- 1.0 | -8.0 +- 1.0 | -3.0 +- 1.0 | -2.0 +- 1.0 |",
        "|  | authors | -40.4 +- 4.0 | -11.7 +- 2.2 | -3.3 +- 0.6 | -3.2 +- 0.6 |",
        "| 2D navigation: oracle | ours, 9 iterations, seed 0, exact product | -2.0 +- 1.0 |  |  |  |",
        "|  | ours, 9 iterations, seed 0, meta-batch 10, rollouts 1, exact product | -3.0 +- 1.0 |  |  |  |",
        "|  | authors | -2.3 +- 0.1 |  |  |  |",
    ]
    assert [row.split(" | ")[:4] for row in report.products(tmp_path).splitlines()[2:]] == [
        ["| exact", "ours, 9 iterations, seed 0, exact product", "-40.0 +- 1.0", "-11.0 +- 1.0"],
        ["| finite difference", "ours, 9 iterations, seed 0", "-40.0 +- 1.0", "-9.0 +- 1.0"],
        ["| ", "its best checkpoint, after 5 iterations", "-41.0 +- 1.0", "-8.0 +- 1.0"],
        ["| ", "authors", "-40.4 +- 4.0", "-11.7 +- 2.2"],
    ]
    (panel,) = report.returns_figure(ours, report.authors(tmp_path)).axes
    assert [list(line.get_ydata()) for line in panel.lines[:4]] == [
        [-40, -9, -4, -3],
        [-40.407, -11.68, -3.328, -3.23],
        [-2] * 4,
        [-3] * 4,
    ]
    panels = report.paths_figure(ours["point"][0]).axes
    assert [(panel.get_xlabel(), panel.get_ylabel()) for panel in panels] == [("x", "y"), ("x", "")]


def test_the_home_folder_is_expanded_in_every_path(program, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(SystemExit) as refused:
        program("--run=~/nowhere")
    assert str(tmp_path / "nowhere") in refused.value.code
    with pytest.raises(SystemExit) as refused:
        program("--logdir=~/logs", "--train=False")
    assert str(tmp_path / "logs") in refused.value.code
