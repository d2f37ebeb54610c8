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
from rl.trpo import BACKTRACKS, CONJUGATE_STEPS, DAMPING, MetaBatch, MetaTRPO, conjugate_gradients

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

    batch = MetaBatch(x, support, *experience(b, later), after)
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
def test_fisher_products_match_the_hessian_of_the_mean_divergence(inner_steps):
    """Autodiff computes the Hessian in all weights, through the inner step."""
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


def test_conjugate_gradients_return_solution_and_residual():
    random = np.random.default_rng(0)
    root = random.standard_normal((CONJUGATE_STEPS, CONJUGATE_STEPS))
    matrix, b = root @ root.T + np.eye(len(root)), random.standard_normal(len(root))
    x, residual = conjugate_gradients(lambda vector: matrix @ vector, b)
    np.testing.assert_allclose(matrix @ x, b, atol=1e-6)
    np.testing.assert_allclose(residual, b - matrix @ x, atol=1e-10)
    x, residual = conjugate_gradients(lambda vector: 2 * vector, np.ones(3))  # done in one step
    assert (x.tolist(), residual.tolist()) == ([0.5] * 3, [0] * 3)


def test_outer_step_improves_the_surrogate_within_the_bound(gathered):
    learner, batch = gathered
    update = learner.outer_step(batch)
    surrogate, kl = learner.surrogate_at(learner.unflat(learner.flat(learner.weights)), batch)
    assert (update.surrogate, update.divergence) == (float(surrogate), float(kl))
    assert update.surrogate < update.surrogate_before
    assert 0.001 < update.divergence <= 0.01
    assert learner.step == 1


def test_small_steps_nearly_reach_the_bound(gathered, monkeypatch):
    """For a small bound the divergence is nearly quadratic, so the line search accepts its first or second step."""
    learner, batch = gathered
    monkeypatch.setattr(learner, "bound", 1e-6)
    assert 0.6e-6 < learner.outer_step(batch).divergence <= 1e-6


@pytest.mark.parametrize(
    "distort",
    [
        lambda direction, g, product: (-direction, g + product),
        lambda direction, g, product: (40 * direction, g - product / 40),
        lambda direction, g, product: (np.nan * direction, g),
    ],
    ids=["uphill", "too far", "NaN"],
)
def test_failed_line_search_keeps_the_weights(gathered, monkeypatch, distort):
    """No step improves the surrogate within the bound.

    distort: from the correct direction, the gradient and the direction's product to the (direction, residual) to use.
    """
    learner, batch = gathered
    before, solve = learner.flat(learner.weights), trpo.conjugate_gradients

    def distorted(product, gradient):
        direction, residual = solve(product, gradient)
        return distort(direction, gradient, gradient - residual)

    monkeypatch.setattr(trpo, "conjugate_gradients", distorted)
    update = learner.outer_step(batch)
    assert update.backtracks == BACKTRACKS
    assert update.surrogate == update.surrogate_before
    assert np.array_equal(learner.flat(learner.weights), before)
    assert learner.step == 1


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
    """Its name gives environment and model. Its caller may add flags such as --seed."""
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
    assert script.stem == f"rl_{main.FLAGS.env}_{main.FLAGS.baseline or 'maml'}"
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
    table = (ROOT / "docs" / "rl.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
    assert table.strip() == report.table(ROOT / "results").strip(), "to update it, run python rl/report.py"


def test_table_and_figures_show_records_and_authors(tmp_path):
    """The oracle has one column, because it needs no update."""
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

    for row in (record(None, -40, -9, -4, -3, -3), record("oracle", -2)):
        (tmp_path / f"rl_{row['flags']['baseline']}.json").write_text(json.dumps(row))
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
