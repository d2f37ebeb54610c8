"""The training loop's schedule, and training as a library calls it."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recipe
import runs
import train
from data_generator import SinusoidTasks
from recipe import Recipe
from utils import Stop


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 60), st.integers(-3, 70))
def test_a_clock_finds_its_next_iteration(first, interval, end, iteration):
    """As the obvious list of all that is due."""
    clock = train.Clock(first, interval, end)
    due = list(range(first, end, interval))
    assert [i for i in range(-3, 70) if clock.due(i)] == due
    assert clock.next(iteration) == min((i for i in due if i >= iteration), default=float("inf"))


def test_the_schedule_is_the_originals():
    """Summaries with iteration 0, validation and checkpoints without; the sinusoid has no validation."""
    schedule = train.Schedule.of(2001, save_interval=1000, validates=True)
    at = {name: [i for i in range(2001) if clock.due(i)] for name, clock in schedule._asdict().items()}
    assert at["summary"] == list(range(0, 2001, 100))
    assert at["validation"] == [500, 1000, 1500, 2000]
    assert at["checkpoint"] == [1000, 2000]
    assert not any(train.Schedule.of(2001, 1000, validates=False).validation.due(i) for i in range(2001))


@pytest.mark.parametrize("from_thread", [False, True])
def test_training_is_called_without_main_and_stopped_from_outside(from_thread, tmp_path, capsys):
    """By a notebook, say, in any thread: no signal handler, no flag, and it is saved."""
    one = Recipe(norm=None, metatrain_steps=10**8, shot=5)
    maml, run, stop = recipe.build(one), runs.Run(tmp_path / one.run_name), Stop()
    finished = []

    def stop_after_some_steps():
        while int(maml.step) < 200:
            time.sleep(0.01)
        stop.reason = "the user"

    threading.Thread(target=stop_after_some_steps).start()

    def call():
        with run.locked():
            settings = train.Settings(save_interval=1000, log=False)
            finished.append(train.train(one, run, maml, SinusoidTasks(5, 5), settings, stop))

    if from_thread:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert finished == [False]
    assert run.iterations()[-1] == int(maml.step) - 1
    assert "Stopped by the user after iteration " in capsys.readouterr().out
