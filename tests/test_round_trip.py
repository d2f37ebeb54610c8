"""Our program and the original read each other's checkpoints.

oracle/round_trip.py ran the original and recorded the results; oracle/README.md lists the files.
"""

import json
import shutil

import numpy as np
import pytest

import recipe
import runs
from maml import MAML
from tests.helpers import variables
from tests.oracle.round_trip import FOLDER, MODEL, OUTER_STEPS, RECORDING, RECORDS
from tests.test_oracle import ORACLE, Record, check_curve

COMPUTED = json.loads(RECORDING.read_text())["computed"]


@pytest.fixture(params=RECORDS.split())
def name(request) -> str:
    return request.param


def load_ours(name: str) -> tuple[recipe.Recipe, MAML]:
    """Return the recipe and the model of our run folder."""
    trained, maml, _ = runs.load(FOLDER / name / "ours")
    return trained, maml


def test_the_recording_has_every_record():
    assert list(COMPUTED) == RECORDS.split()


def test_the_original_computes_our_losses_and_accuracies(name):
    record = Record(ORACLE / f"{name}.npz")
    before = [record.arrays["total_loss1"], *record.arrays["total_losses2"]]
    _, record.maml = load_ours(name)
    record.arrays |= COMPUTED[name]
    check_curve(record)
    losses = [record.arrays["total_loss1"], *record.arrays["total_losses2"]]
    # Training changed every loss by ten times the tolerance, so untrained weights would fail the check above.
    assert np.all(np.abs(np.divide(losses, before) - 1) > 1e-3)


def test_todays_checkpoint_has_every_variable_the_original_read(name, tmp_path):
    _, maml = load_ours(name)
    runs.Run(tmp_path).save(maml)
    today, read = variables(tmp_path, MODEL), variables(FOLDER / name / "original", MODEL)
    assert read.keys() == set(maml.keys.values())
    for key, value in read.items():
        np.testing.assert_array_equal(today[key], value, err_msg=key, strict=True)


def test_the_checkpoint_that_the_original_read_has_adams_moments(name):
    """The original's Saver ignores variables that are not in its graph."""
    trained, maml = load_ours(name)
    adam = maml.pretrain_optimizer if trained.pretrain_steps else maml.meta_optimizer
    assert maml.step == adam.updates == OUTER_STEPS
    for moments in (adam.m, adam.v):
        assert any(moment.numpy().any() for moment in moments.values())


def test_a_checkpoint_of_the_original_restores_bit_for_bit(name, tmp_path):
    trained, ours = load_ours(name)
    folder = shutil.copytree(FOLDER / name / "original", tmp_path / trained.run_name)  # its name gives the flags
    _, theirs, _ = runs.load(folder)
    assert ours.weights.keys() == theirs.weights.keys()
    for key, weight in ours.weights.items():
        np.testing.assert_array_equal(theirs.weights[key], weight, err_msg=key)
