"""The scripts behind the README's results: what they run and record, the tables made of it, published models."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import tensorflow as tf
from absl.testing import flagsaver
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorflow.core.util import event_pb2

import main
import publish
import row
import table
from utils import InputError

ROOT = Path(main.__file__).parent
SCRIPTS = sorted((ROOT / "experiments").glob("*.sh"))
PUBLISHED = sorted((ROOT / "logs" / "published").glob("*/flags.json"))


class InThisProcess:
    """subprocess.Popen([python, "main.py", ...]), without a process of its own."""

    def __init__(self, command: list[str]):
        self.command = command

    def wait(self) -> int:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()):
            try:
                main.run(main.parse(self.command[1:]))
            except SystemExit as end:
                return end.code
        return 0


def run_main(*flags: str) -> None:
    assert InThisProcess(["python", "main.py", *flags]).wait() == 0


def called(script: Path, folder: Path, *arguments: str) -> tuple[list[str], list[list[str]]]:
    """What a script that is called from `folder` hands to row.py: the flags of training, and those of each test."""
    printer = folder / "prints its arguments"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    command = [os.path.relpath(script, folder), *arguments]
    environment = os.environ | {"PYTHON": str(printer)}
    printed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    program, name, *handed = printed.splitlines()
    assert (folder / program).resolve() == ROOT / "experiments" / "row.py"
    assert Path(name).stem == script.stem
    return row.parts(handed)


def run_folder(flags: list[str]) -> str:
    return str(main.run_folder(main.parsed(flags)).folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_tests_the_model_that_it_trains(script, tmp_path):
    training, tests = called(script, tmp_path, "--seed=7")
    assert run_folder(training).endswith(".seed7")
    assert tests
    for flags in tests:
        assert run_folder([*training, *flags, "--train=False", "--test_set=True"]) == run_folder(training)


def test_documented_commands_are_those_of_scripts(tmp_path):
    section = (ROOT / "README.md").read_text().split("\n## The commands of the paper\n")[1].split("\n## ")[0]
    documented = re.findall(r"^    python main\.py (.*metatrain_iterations.*)$", section, re.M)
    assert len(documented) >= 7
    trained = {frozenset(called(script, tmp_path)[0]) for script in SCRIPTS}
    for command in documented:
        if "--train=False" not in command:
            assert frozenset(command.split()) in trained


def test_tables_have_every_test_of_every_script(tmp_path):
    tested = set()
    for script in SCRIPTS:
        training, tests = called(script, tmp_path)
        for flags in tests:
            recipe = main.recipe_of(main.parsed([*training, *flags]))
            tested.add((script.stem, recipe.shot, recipe.inner_lr))
    rows = [(one.script, one.shot, one.alpha) for one in table.SINUSOID + table.IMAGES]
    assert sorted(rows) == sorted(tested)


def test_readme_is_in_step_with_results():
    begin, end = (re.escape(marker) for marker in (table.BEGIN, table.END))
    (shown,) = re.findall(f"{begin}(.*?){end}", (ROOT / "README.md").read_text(), re.S)
    assert shown.strip() == table.tables(ROOT / "results").strip(), "python experiments/table.py writes it anew"


def test_table_cells(tmp_path):
    """Several seeds, diverged tasks, accuracies, and what nobody has run."""

    def write(name, shot, alpha, seed, *columns):
        keys = ("updates", "mean", "median", "the_papers_number")
        results = [dict(zip(keys, column, strict=True)) | {"ci95": 0.0123} for column in columns]
        test = {"support_examples_a_class_K": shot, "inner_step_size_alpha": alpha, "training_seed": seed}
        record = {"iterations": 60000, "hours": 1.26, "tests": [test | {"results": results}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    write("omniglot_20way_1shot", 5, 0.1, 0, (1, 0.5, 0.5, False), (5, 0.9576, 0.96, True))
    for seed, mean in ((0, 0.5), (1, 4e7)):
        name = "sinusoid_oracle" + ".seed1" * seed
        write(name, 20, 0.001, seed, (1, mean, 0.4, True), (10, None, 0.6, True))
    lines = "\n".join(
        table._line(one, tmp_path, shown)
        for one, shown in (
            (table.Row("20-way", "MAML", "omniglot_20way_1shot", 5, 0.1, "99", "97"), table._accuracy),
            (table.Row("20-shot", "oracle", "sinusoid_oracle", 20, 0.001), table._errors),
            (table.Row("20-shot", "MAML", "sinusoid_maml", 20, 0.001), table._errors),
        )
    )
    assert lines == (
        "| 20-way | MAML | 99 | 97 | seed 0: 95.8 +- 1.2 (60,000 iterations, 1.3 hours) | `omniglot_20way_1shot.sh` |\n"
        "| 20-shot | oracle |  |  | seed 0: 0.500 / diverged, medians 0.400 / 0.600<br>"
        "seed 1: 4e+07 / diverged, medians 0.400 / 0.600 | `sinusoid_oracle.sh` |\n"
        "| 20-shot | MAML |  |  | not run yet | `sinusoid_maml.sh` |"
    )


def test_record_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(row.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(row, "commit", lambda: "abc")
    training = f"--datasource=sinusoid --metatrain_iterations=3 --seed=4 --logdir={tmp_path}/logs/ --norm=None".split()
    with flagsaver.flagsaver():
        path = row.record(
            Path("experiments/some row.sh"),
            [*training, f"--results_dir={tmp_path}/results"],
            [[], ["--update_batch_size=2", "--train_update_batch_size=5"]],
        )
    assert path == tmp_path / "results" / "some row.seed4.json"
    record = json.loads(path.read_text())
    assert (record["row"], record["iterations"], record["flags"]["seed"]) == ("some row", 3, 4)
    assert 0 < record["hours"] < 0.1
    assert [test["support_examples_a_class_K"] for test in record["tests"]] == [5, 2]
    assert all(len(test["results"]) == 11 for test in record["tests"])


def test_failed_training_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(row.subprocess, "Popen", InThisProcess)
    flags = [f"--results_dir={tmp_path}", "--baseline=oracle", "--datasource=omniglot"]
    with pytest.raises(SystemExit) as ended:
        row.record(Path("row.sh"), flags, [[]])
    assert ended.value.code == 1
    assert not list(tmp_path.iterdir())


def test_sigterm_reaches_the_training(monkeypatch):
    program = unittest.mock.Mock()
    program.wait.side_effect = [SystemExit(143), 143]
    monkeypatch.setattr(row.subprocess, "Popen", lambda command: program)
    with pytest.raises(SystemExit) as ended:
        row._main_program([])
    assert ended.value.code == 143
    assert [call[0] for call in program.method_calls] == ["wait", "terminate", "wait"]


def test_hours_leave_out_the_time_between_two_starts(tmp_path):
    for name, times in (("1.first", (1000, 1900, 2800)), ("2.second", (90_000, 91_800))):
        with tf.io.TFRecordWriter(str(tmp_path / f"events.out.tfevents.{name}")) as writer:
            for time in times:
                writer.write(event_pb2.Event(wall_time=time).SerializeToString())
    (tmp_path / "events.out.tfevents.3.full_disk").touch()
    assert row.training_hours(tmp_path) == pytest.approx(1.0)


def test_published_model_tests_as_the_run(tmp_path):
    flags = "--datasource=sinusoid --metatrain_iterations=2001 --norm=None --update_batch_size=3".split()
    test = ["--train=False", "--test_set=True"]
    run_main(*flags, f"--logdir={tmp_path}/logs")
    (folder,) = (tmp_path / "logs").iterdir()
    with pytest.raises(InputError, match=r"no results.json in .*: train and test the run first"):
        publish.publish(folder, tmp_path / "published")
    run_main(*flags, f"--logdir={tmp_path}/logs", *test)
    copy = publish.publish(folder, tmp_path / "published")
    run_main(*flags, f"--logdir={tmp_path}/published", f"--results_dir={tmp_path}/again", *test)

    (name,) = [path.name for path in folder.glob("*.csv")]
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    # The original's network has these and no others.
    assert tf.train.load_checkpoint(str(copy / "model2000")).get_variable_to_shape_map() == {
        "model/Variable": [1, 40],
        "model/Variable_1": [40],
        "model/Variable_2": [40, 40],
        "model/Variable_3": [40],
        "model/Variable_4": [40, 1],
        "model/Variable_5": [1],
    }
    assert (copy / "flags.json").read_bytes() == (folder / "flags.json").read_bytes()
    events = EventFileLoader(str(copy / "events.out.tfevents.0.published")).Load()
    points = {(value.tag, event.step) for event in events for value in event.summary.value}
    assert {step for tag, step in points if tag == "metatrain_Post-update_loss__step_1"} == {0, 1000, 2000}
    assert {"flags", "_hparams_/session_start_info", "custom_scalars__config__", "test_task"} <= {
        tag for tag, _ in points
    }


@pytest.fixture(scope="module")
def real_omniglot(shared, tmp_path_factory) -> Path:
    folder, archives = tmp_path_factory.mktemp("omniglot"), shared / "data" / "omniglot"
    names = [archives / f"images_{part}.zip" for part in ("background", "evaluation")]
    command = [sys.executable, ROOT / "data" / "omniglot_resized" / "resize_images.py", *names, "--out", folder]
    subprocess.run(command, capture_output=True, check=True)
    return folder


@pytest.mark.parametrize("flags", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_models_give_their_results_again(flags, tmp_path, request):
    training = json.loads(flags.read_text())
    given = {name: value for name, value in training.items() if value is not None or name == "norm"} | {
        "train_update_batch_size": training["update_batch_size"],
        "train_update_lr": training["update_lr"],
        "train": False,
        "test_set": True,
        "logdir": flags.parents[1],
        "results_dir": tmp_path,
    }
    if training["datasource"] == "omniglot":
        given["data_path"] = request.getfixturevalue("real_omniglot")
    entries = json.loads((flags.parent / "results.json").read_text())
    for entry in entries:
        protocol = {
            "update_batch_size": entry["support_examples_a_class_K"],
            "update_lr": entry["inner_step_size_alpha"],
        }
        run_main(*(f"--{name}={value}" for name, value in (given | protocol).items()))
    for again, entry in zip(json.loads((tmp_path / "results.json").read_text()), entries, strict=True):
        for column, published in zip(again["results"], entry["results"], strict=True):
            assert column["mean"] == pytest.approx(published["mean"], rel=1e-3)
