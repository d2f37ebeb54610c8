"""The training loop: its schedule, its steps, and its use as a library."""

import functools
import io
import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recipe
import report
import runs
import train
from cluster import Stop
from data_generator import ImageTasks, SinusoidTasks
from recipe import DATASETS, Recipe
from utils import Curve, mean_xent, xent


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 60), st.integers(-3, 70))
def test_a_clock_finds_its_next_iteration(first, interval, end, iteration):
    """Compare with a list of all due iterations."""
    clock = train.Clock(first, interval, end)
    due = list(range(first, end, interval))
    assert [i for i in range(-3, 70) if clock.due(i)] == due
    assert clock.next(iteration) == min((i for i in due if i >= iteration), default=float("inf"))


def test_the_schedule_is_the_originals():
    """Summaries include iteration 0; validation and checkpoints do not. The sinusoid has no validation."""
    schedule = train.Schedule.of(2001, save_interval=1000, validates=True)
    at = {name: [i for i in range(2001) if clock.due(i)] for name, clock in schedule._asdict().items()}
    assert at["summary"] == list(range(0, 2001, 100))
    assert at["validation"] == [500, 1000, 1500, 2000]
    assert at["checkpoint"] == [1000, 2000]
    assert not any(train.Schedule.of(2001, 1000, validates=False).validation.due(i) for i in range(2001))


@pytest.mark.parametrize("block", [1, 10])
def test_each_step_has_its_own_tasks_and_pretraining_comes_first(block):
    """Step t takes tasks t * T to t * T + T - 1, however the steps are divided among calls."""
    example = Recipe(norm=None, pretrain_steps=15, metatrain_steps=10, meta_batch=4)
    data, taken = SinusoidTasks(5, 5), []

    def many_steps(tasks, first, count, pretrain):
        for place in range(int(first), int(first) + int(count)):
            taken.append((pretrain, tasks.query_x[place]))
        return 0.0

    def one_step(tasks, pretrain):
        taken.append((pretrain, tasks.query_x))
        return 0.0, 0.0

    maml = types.SimpleNamespace(
        step=0,
        inner=types.SimpleNamespace(network=types.SimpleNamespace(steps_a_call=block)),
        many_steps=many_steps,
        train_step=functools.partial(one_step, pretrain=False),
        pretrain_step=functools.partial(one_step, pretrain=True),
    )
    with train.Steps(maml, data, example, Stop()) as steps:
        timed = []
        for end in (3, 17, 25):
            steps.advance(end)
            assert steps.done == len(taken) == end
            timed.append(steps.timed)
            assert (steps.milliseconds() is None) == (timed[-1] == 0)
    # The first call of pretraining, and that of meta-training, compile, so their steps are not timed.
    assert timed == ([2, 13, 8] if block == 1 else [0, 12, 8])
    assert [pretrain for pretrain, _ in taken] == [True] * 15 + [False] * 10
    for t, (_, query_x) in enumerate(taken):
        np.testing.assert_array_equal(query_x, data.draw(example.seed, "train", 4 * t, 4).query_x)


@pytest.mark.parametrize(
    ("loss", "function"), [("sum_over_shot", functools.partial(xent, shot=2)), ("mean", mean_xent)]
)
def test_mean_losses_are_per_example(loss, function, tmp_path, capsys):
    """For any loss and number of queries: ln 5 if all five classes are equally likely."""
    example = Recipe(data_set="cub", shot=2, query=3, loss=loss)
    losses = [function(np.zeros((5 * n, 5), np.float32), np.tile(np.eye(5, dtype=np.float32), (n, 1))) for n in (2, 3)]
    with report.Report(tmp_path, 0, example) as reporter:
        reporter.validation(500, Curve(np.array([losses]), np.array([[0.25, 0.5]])))
    for tag in ("validation/Pre-update_mean_loss", "validation/Post-update_mean_loss__step_1"):
        assert report.scalars(tmp_path)[tag] == {500: pytest.approx(np.log(5), rel=1e-6)}
    assert capsys.readouterr().out == "Validation results: 0.25, 0.5\n"


def test_the_progress_line_shows_accuracies_and_moves_during_a_step(monkeypatch, tmp_path):
    """It is drawn again and again although no step ends."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(report, "REFRESH_SECONDS", 0.01)
    with report.Report(tmp_path, 0, Recipe(data_set="cub", inner_steps=1), log=False) as reporter:
        reporter.training(0, Curve(np.full((1, 2), 1.6), np.array([[0.224, 0.371]])), 1.0, 1.0)
        drawn, end = terminal.getvalue().count("\r"), time.monotonic() + 30
        while terminal.getvalue().count("\r") < drawn + 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert terminal.getvalue().count("\r") >= drawn + 3
    assert "acc 0.22 -> 0.37" in terminal.getvalue()


@pytest.mark.parametrize("from_thread", [False, True])
def test_training_as_a_library_can_be_stopped_and_saves(from_thread, tmp_path, capsys):
    """A notebook can do this in any thread, without main.py, signal handlers or flags."""
    example = Recipe(norm=None, metatrain_steps=10**8, shot=5)
    maml, run, stop = recipe.build(example), runs.Run(tmp_path / example.run_name), Stop()
    finished = []

    def stop_after_some_steps():
        while int(maml.step) < 200:
            time.sleep(0.01)
        stop.reason = "the user"

    threading.Thread(target=stop_after_some_steps).start()

    def call():
        with run.locked():
            settings = train.Settings(save_interval=1000, log=False)
            finished.append(train.train(example, run, maml, SinusoidTasks(5, 5), settings, stop))

    if from_thread:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert finished == [False]
    assert run.iterations()[-1] == int(maml.step) - 1
    assert "Stopped by the user after iteration " in capsys.readouterr().out


@pytest.mark.parametrize("custom", [True, False], ids=["custom object", "train split only"])
def test_training_needs_only_an_object_that_draws_tasks(custom, omniglot_like, tmp_path):
    """A training too short for a validation also runs without validation classes."""
    example = Recipe(data_set="omniglot", filters=2, metatrain_steps=2, meta_batch=1, way=5, shot=1)
    images = DATASETS["omniglot"].images._replace(split_list=None, split_sizes=(20, 10, 10))
    data = ImageTasks.from_folder(images, omniglot_like, ("train",), 5, 1, 1)
    if custom:
        data = types.SimpleNamespace(draw=data.draw, way=5, shot=1, query=1)
    run = runs.Run(tmp_path / example.run_name)
    with run.locked():
        assert train.train(example, run, recipe.build(example), data, train.Settings(log=False))
    assert len(run.trained_classes()) == (0 if custom else 20)


@pytest.mark.parametrize(("owner", "function"), [(train, "task_picture"), (report.Report, "picture")])
def test_a_picture_that_fails_does_not_end_the_training(owner, function, omniglot_like, monkeypatch, tmp_path, capsys):
    """Whether it cannot be drawn or cannot be written. One line says so."""

    def fail(*_):
        raise ValueError("too large\nwith details")

    monkeypatch.setattr(owner, function, fail)
    example = Recipe(data_set="omniglot", filters=2, metatrain_steps=1, meta_batch=1, way=5, shot=1)
    images = DATASETS["omniglot"].images._replace(split_list=None, split_sizes=(20, 10, 10))
    data = ImageTasks.from_folder(images, omniglot_like, ("train", "val"), 5, 1, 1)
    run = runs.Run(tmp_path / example.run_name)
    with run.locked():
        assert train.train(example, run, recipe.build(example), data, train.Settings())
    assert run.iterations() == [0]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: validation/task")]
    assert len(warnings) == 2 and all("too large" in line and "details" not in line for line in warnings)
