"""The experiment scripts, their records, the tables made from the records, and published models."""

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorflow.core.util import event_pb2

import main
import publish
import row
import table
import verify
from files import InputError

ROOT = Path(main.__file__).parent
SCRIPTS = sorted({*(ROOT / "experiments").glob("*.sh")} - {*(ROOT / "experiments").glob("rl_*.sh")})
TABLES = table.SINUSOID + table.IMAGES + table.FAMILY + table.MMFEWSHOT
PUBLISHED = sorted((ROOT / "logs" / "published").glob("*/flags.json"))


class InProcess:
    """A replacement for subprocess.Popen that runs [python, "main.py", ...] in this process."""

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
    assert InProcess(["python", "main.py", *flags]).wait() == 0


def passed_flags(script: Path, folder: Path, *arguments: str) -> tuple[list[str], list[list[str]]]:
    """Run a script in `folder`; return what it passes to row.py: the flags of training and of each test."""
    printer = folder / "prints its arguments"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    command = [os.path.relpath(script, folder), *arguments]
    environment = os.environ | {"PYTHON": str(printer)}
    printed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    program, name, *flags = printed.splitlines()
    assert (folder / program).resolve() == ROOT / "experiments" / "row.py"
    assert Path(name).stem == script.stem
    return row.split_flags(flags)


def run_folder(flags: list[str]) -> str:
    return str(main.run_folder(main.parsed(flags)).folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_tests_the_model_it_trains(script, tmp_path):
    training, tests = passed_flags(script, tmp_path, "--seed=7")
    assert run_folder(training).endswith(".seed7")
    assert tests
    for flags in tests:
        assert run_folder([*training, *flags, "--train=False", "--test_set=True"]) == run_folder(training)


def test_documented_commands_equal_the_scripts(tmp_path):
    documented = re.findall(r"^    python main\.py (.*metatrain_iterations.*)$", main.__doc__, re.M)
    assert len(documented) == 7
    assert all(command in (ROOT / "docs" / "results.md").read_text() for command in documented)
    trained = {frozenset(passed_flags(script, tmp_path)[0]) for script in SCRIPTS}
    for command in documented:
        if "--train=False" not in command:
            assert frozenset(command.split()) in trained


def test_tables_have_every_test_of_every_script(tmp_path):
    tested = set()
    for script in SCRIPTS:
        training, tests = passed_flags(script, tmp_path)
        for flags in tests:
            recipe = main.recipe_of(main.parsed([*training, *flags]))
            tested.add((script.stem, recipe.shot, recipe.inner_lr))
    trained_rows = [line for line in table.SINUSOID + table.IMAGES + table.MMFEWSHOT if not line.released]
    assert sorted((line.script, line.shot, line.alpha) for line in trained_rows) == sorted(tested)


@pytest.mark.parametrize("method", table.FAMILY, ids=lambda row: f"{row.source} {row.shot}")
def test_scripts_accept_the_flags_of_every_method(method, tmp_path):
    """One of the script's tests is the test of the method's row."""
    flags = [f"--{flag}={value}" for flag, value in method.flags.items()]
    training, tests = passed_flags(ROOT / "experiments" / f"{method.script}.sh", tmp_path, *flags)
    recipes = [main.recipe_of(main.parsed([*training, *more])) for more in tests]
    assert (method.shot, method.alpha) in [(recipe.shot, recipe.inner_lr) for recipe in recipes]
    assert all(recipe.variant for recipe in recipes)


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "mmfewshot" in path.stem], ids=lambda path: path.stem)
def test_mmfewshot_scripts_have_its_recipe(script, tmp_path):
    """Source: open-mmlab/mmfewshot, configs/classification/maml. We take its 100,000 tasks 8 at a time."""
    training, tests = passed_flags(script, tmp_path)
    values = main.parsed(training)
    recipe = main.recipe_of(values)
    _, data_set, network = script.stem.split("_")
    network = {"conv4": "conv4_affine"}.get(network, network)
    assert (recipe.data_set, recipe.network, recipe.loss, recipe.augment) == (data_set, network, "mean", True)
    assert (recipe.way, recipe.shot, recipe.query, recipe.inner_steps, recipe.inner_lr) == (5, 5, 16, 2, 0.01)
    assert (recipe.metatrain_steps * recipe.meta_batch, recipe.meta_batch, recipe.meta_lr) == (100_000, 8, 0.001)
    assert not recipe.first_order and values.val_tasks == 100
    for flags in tests:
        values = main.parsed([*training, *flags])
        assert (values.num_query, values.test_updates, values.test_tasks, values.test_iter) == (15, 5, 2000, "best")


@pytest.mark.parametrize("page", table.PAGES)
def test_tables_of_pages_match_the_results(page):
    text = (ROOT / page).read_text()
    assert text == table.with_tables(page, text, ROOT / "results"), "run python experiments/table.py"


def write_record(folder: Path, name: str, seed: int, *tests: dict, iterations: int = 60000, **flags: str) -> None:
    """Write results/<name>.json. A test has keys of its protocol, and columns (updates, mean, median, the paper's)."""
    defaults = {"query_examples_a_class_Q": 5, "tasks": 600, "task_seed": 0, "best_on_validation": False}
    defaults |= {"metric": "accuracy (share of query examples, 0 to 1)", "training_seed": seed}
    keys = ("updates", "mean", "median", "the_papers_number")

    def complete(test):
        columns = [dict(zip(keys, column, strict=True)) | {"ci95": 0.0123} for column in test["results"]]
        return defaults | test | {"results": columns}

    record = {"flags": flags, "iterations": iterations, "hours": 1.26, "tests": [complete(test) for test in tests]}
    path = folder / (f"{name}.seed{seed}.json" if seed else f"{name}.json")
    path.write_text(json.dumps(record))


def write_published(folder: Path, *entries: tuple) -> None:
    """Write results/published.json from (row, K, alpha, Q or "null", reported by, metric, columns as JSON)."""
    lines = [
        f'{{"row": "{row}", "support_examples_a_class_K": {shot}, "inner_step_size_alpha": {alpha}, '
        f'"query_examples_a_class_Q": {query}, "reported_by": "{who}", "metric": "{metric}", "results": {columns}}}'
        for row, shot, alpha, query, who, metric, columns in entries
    ]
    (folder / "published.json").write_text(f"[{', '.join(lines)}]")


def test_the_accuracy_table_keeps_published_digits(tmp_path):
    protocol = {"support_examples_a_class_K": 5, "inner_step_size_alpha": 0.1}
    columns = [(1, 0.5, 0.5, False), (5, 0.9576, 0.96, True)]
    for seed in (0, 1):
        write_record(tmp_path, "omniglot_20way_1shot", seed, protocol | {"results": columns})
    reported = '[{"updates": 5, "mean": 99.90, "ci95": 0.10}]', '[{"updates": 5, "mean": 97, "ci95": 1}]'
    write_published(
        tmp_path,
        *(
            ("omniglot_20way_1shot", 5, 0.1, "null", who, "accuracy in %", columns)
            for who, columns in zip(("paper", "original code"), reported, strict=True)
        ),
    )
    rows = [
        table.Row("20-way", "MAML", "omniglot_20way_1shot", 5, 0.1),
        table.Row("20-way", "first order", "omniglot_20way_1shot_first_order", 5, 0.1),
    ]
    assert table.accuracy_table(rows, tmp_path).splitlines() == [
        "| test | model | paper | original code | queries per class | seed | ours | iterations | hours | script |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 20-way | MAML | 99.90 ± 0.10 | 97 ± 1 | 5 | 0 | 95.8 ± 1.2 | 60,000 | 1.3 | `omniglot_20way_1shot.sh` |",
        "|  |  | 99.90 ± 0.10 | 97 ± 1 | 5 | 1 | 95.8 ± 1.2 | 60,000 | 1.3 |  |",
        "|  | first order |  |  |  |  | not run yet |  |  | `omniglot_20way_1shot_first_order.sh` |",
    ]


def test_the_error_table_shows_medians_if_tasks_diverge(tmp_path):
    protocol = {"support_examples_a_class_K": 20, "inner_step_size_alpha": 0.001, "query_examples_a_class_Q": 20}
    protocol["metric"] = "mean squared error"
    for seed, means in enumerate(((0.5, 0.45, 0.41), (4e7, 0.5, None))):
        columns = [(updates, mean, 0.4, True) for updates, mean in zip(table.TABLE_UPDATES, means, strict=True)]
        write_record(tmp_path, "sinusoid_oracle", seed, protocol | {"results": columns})
    reported = ", ".join(f'{{"updates": {updates}, "mean": 0.{updates}0}}' for updates in (0, *table.TABLE_UPDATES))
    write_published(
        tmp_path,
        ("sinusoid_oracle", 20, 0.001, 20, "original code", "mean squared error", f"[{reported}]"),
        ("sinusoid_oracle", 20, 0.01, 20, "paper", "mean squared error", f"[{reported}]"),
    )
    rows = [
        table.Row("20-shot", "oracle", "sinusoid_oracle", 20, 0.001),
        table.Row("20-shot", "MAML", "sinusoid_maml", 20, 0.001),
    ]
    assert table.error_table(rows, tmp_path).splitlines()[2:] == [
        "| 20-shot | oracle | original code |  | 0.10 | 0.50 | 0.100 | `sinusoid_oracle.sh` |",
        "|  |  | seed 0 | 20 | 0.500 ± 0.012 | 0.450 ± 0.012 | 0.410 ± 0.012 |  |",
        "|  |  | seed 1 | 20 | 4e+07, median 0.400 | 0.500, median 0.400 | diverged, median 0.400 |  |",
        "|  | MAML | not run yet |  |  |  |  | `sinusoid_maml.sh` |",
    ]


def test_the_accuracy_table_has_a_line_per_protocol(tmp_path):
    """The original's protocol is first. Published numbers with a different Q are left out."""
    keys = {"support_examples_a_class_K": 5, "inner_step_size_alpha": 0.4}

    def test(mean, **protocol):
        return keys | protocol | {"results": [(3, mean, mean, True)]}

    single = {"query_examples_a_class_Q": 1}
    write_record(tmp_path, "row", 0, test(0.999, **single), test(0.996), test(0.5, inner_step_size_alpha=0.1))
    other_tasks = single | {"tasks": 2000, "task_seed": 1}
    write_record(tmp_path, "row", 1, test(0.995), test(0.998, **other_tasks), test(0.997, best_on_validation=True))
    uneven = {"query_examples_a_class_Q": 15, "updates_at_test": 5, "query_shares": "drawn"}
    write_record(tmp_path, "row", 2, test(0.8, **uneven), test(0.9, query_normalised_with="support"))
    write_published(
        tmp_path,
        ("row", 5, 0.4, "null", "paper", "accuracy in %", '[{"updates": 3, "mean": 99.9, "ci95": 0.1}]'),
        ("row", 5, 0.4, 5, "original code", "accuracy in %", '[{"updates": 3, "mean": 99.5, "ci95": 0.2}]'),
    )
    lines = table.accuracy_table([table.Row("5-shot", "MAML", "row", 5, 0.4)], tmp_path).splitlines()[2:]
    assert [line.split(" | ")[2:7] for line in lines] == [
        ["99.9 ± 0.1", "99.5 ± 0.2", "5", "0", "99.6 ± 1.2"],
        ["99.9 ± 0.1", "99.5 ± 0.2", "5", "1", "99.5 ± 1.2"],
        ["99.9 ± 0.1", "99.5 ± 0.2", "5, best on validation", "1", "99.7 ± 1.2"],
        ["99.9 ± 0.1", "99.5 ± 0.2", "5, each normalized with the support set", "2", "90.0 ± 1.2"],
        ["99.9 ± 0.1", "", "1", "0", "99.9 ± 1.2"],
        ["99.9 ± 0.1", "", "1, 2,000 tasks of seed 1", "1", "99.8 ± 1.2"],
        ["99.9 ± 0.1", "", "15, on average, in drawn shares, at most 5 updates", "2", "80.0 ± 1.2"],
    ]


def test_the_accuracy_table_separates_methods(tmp_path):
    """The flags of a record, and of a published number, select its method."""
    test = {"support_examples_a_class_K": 5, "inner_step_size_alpha": 0.1}
    write_record(tmp_path, "row", 0, test | {"results": [(5, 0.9, 0.9, True)]})
    write_record(tmp_path, "row.adapthead", 1, test | {"results": [(5, 0.8, 0.8, True)]}, adapt="head")
    entry = {"row": "row", "support_examples_a_class_K": 5, "inner_step_size_alpha": 0.1, "metric": "accuracy in %"}
    entry |= {"query_examples_a_class_Q": None, "reported_by": "paper", "results": [{"updates": 5, "mean": 70}]}
    other = entry | {"flags": {"adapt": "head"}, "shown_as": "X", "results": [{"updates": 5, "mean": 60, "ci95": 1}]}
    (tmp_path / "published.json").write_text(json.dumps([entry, other]))
    methods = {"MAML": {}, "ANIL": {"adapt": "head"}, "BOIL": {"adapt": "body", "num_updates": "1"}}
    rows = [table.Row("test", name, "row", 5, 0.1, flags) for name, flags in methods.items()]
    assert table.accuracy_table(rows, tmp_path).splitlines()[2:] == [
        "| test | MAML | 70 | 5 | 0 | 90.0 ± 1.2 | 60,000 | 1.3 | `row.sh` |",
        "|  | ANIL | 60 ± 1 (X) | 5 | 1 | 80.0 ± 1.2 | 60,000 | 1.3 | `row.sh --adapt=head` |",
        "|  | BOIL |  |  |  | not run yet |  |  | `row.sh --adapt=body --num_updates=1` |",
    ]


def test_the_summary_has_one_line_per_row_with_the_mean_over_seeds(tmp_path):
    """It has the checkpoint that is best on validation only if no last checkpoint was tested."""
    (tmp_path / "published.json").write_bytes((ROOT / "results" / "published.json").read_bytes())
    test = {"support_examples_a_class_K": 1, "inner_step_size_alpha": 0.4, "query_examples_a_class_Q": 1}
    worse, better = (test | {"results": [(3, mean, 1, True)]} for mean in (0.98, 0.99))
    best = test | {"results": [(3, 0.5, 1, True)], "best_on_validation": True}
    write_record(tmp_path, "omniglot_5way_1shot", 0, worse, best)
    write_record(tmp_path, "omniglot_5way_1shot", 1, better)
    write_record(tmp_path, "omniglot_5way_1shot_fc", 0, best, iterations=3000)
    five_shot = test | {"support_examples_a_class_K": 5}
    five_queries = five_shot | {"query_examples_a_class_Q": 5, "results": [(3, 0.97, 1, True)]}
    write_record(tmp_path, "omniglot_5way_1shot", 2, five_queries, five_shot | {"results": [(3, 0.96, 1, True)]})
    lines = table.summary(tmp_path).splitlines()
    for line in (
        "| Omniglot 5-way 1-shot | 98.7 ± 0.4 | 98.5 (98.0 to 99.0, 2 seeds) |  |",
        "| Omniglot 5-way 5-shot | 99.9 ± 0.1 | 97.0 ± 1.2 | 96.0 ± 1.2 |",
        "| Omniglot 5-way 1-shot, no convolutions | 89.7 ± 1.1 "
        "| 50.0 ± 1.2 (stopped at 3,000 of 60,000 iterations) |  |",
        "| Omniglot 20-way 1-shot | 95.8 ± 0.3 | not run yet |  |",
    ):
        assert line in lines


def test_the_speed_table_rounds_times_and_picks_the_best_peer(tmp_path):
    names = [f"{name}{order}" for name in table.SPEED for order in ("", " first order")]
    ours = [{"configuration": n, "ms_per_step": 61.2345, "floor_ms": 0.0381, "times_floor": 1.5512} for n in names]
    peers = [
        {"configuration": "omniglot_5way", "form": form, "ratio": ratio} for form, ratio in (("A", 3.0), ("B", 1.98765))
    ]
    peers.append({"configuration": "omniglot_5way", "form": "C", "why": "out of time"})
    who = {"command": "python x.py", "date": "today", "machine": "here", "versions": "all", "source": "theirs"}
    original = [{"configuration": "omniglot_5way", "ms_per_step": 3030}]
    parts = {"ours": who | {"rows": ours}, "original": who | {"rows": original}, "peers": who | {"rows": peers}}
    (tmp_path / "speed.json").write_text(json.dumps(parts))
    lines = table.speed(tmp_path).splitlines()
    assert "| Omniglot 5-way 1-shot | 61.2 | 0.04 | 1.55 | 61.2 | 3,030 | 1.99: B |" in lines
    assert "| sinusoid 10-shot | 61.2 | 0.04 | 1.55 | 61.2 |  |  |" in lines
    assert "Ours: `python x.py`, today, here, all." in lines


def test_every_published_number_has_a_source_and_a_row(tmp_path):
    for entry in json.loads((ROOT / "results" / "published.json").read_text()):
        (tmp_path / "published.json").write_text(json.dumps([entry]))
        cells = [table.published(line, who, tmp_path) for line in TABLES for who in ("paper", "original code")]
        assert any(cells), "no table shows it"
        assert entry["source"]


def exit_code(program: Path, arguments: list[str], monkeypatch) -> int:
    """Run a program of experiments/ that must exit before it does any work; return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    for work in ("subprocess.Popen", "pathlib.Path.write_text", "pathlib.Path.mkdir"):
        monkeypatch.setattr(work, unittest.mock.Mock(side_effect=AssertionError(f"{work} was called")))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(program), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("program", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_help_does_no_work(program, monkeypatch, capsys):
    assert exit_code(program, ["--help"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"usage: {program.name}")
    assert exit_code(program, ["--no_such_flag"], monkeypatch) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: script"),
        (["nowhere.sh", "--norm=None", "--"], "nowhere.sh: "),
        (["experiments/row.py", "--"], "experiments/row.py: "),
        (["experiments/rl_point_maml.sh", "--"], "experiments/rl_point_maml.sh: "),
        (["experiments/sinusoid_maml.sh", "--norm=None"], "experiments/sinusoid_maml.sh: "),
    ],
)
def test_a_row_without_a_script_or_a_test_is_refused(arguments, reason, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert exit_code(ROOT / "experiments" / "row.py", arguments, monkeypatch) == 2
    assert reason in capsys.readouterr().err


def test_a_script_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = os.path.relpath(SCRIPTS[0], tmp_path)
    assert row.parse([script, "--help", "--", "--num_query=1"]) == (SCRIPTS[0], ["--help"], [["--num_query=1"]])


def test_compare_sinusoid_prints_the_original_of_each_baseline(tmp_path, monkeypatch, capsys):
    test = {"data_set": "sinusoid", "split": "test", "tasks": 600, "task_seed": 0, "inner_step_size_alpha": 0.001}
    test |= {"support_examples_a_class_K": 10, "query_examples_a_class_Q": 10}
    columns = [{"updates": j, "mean": 1 / (1 + j), "ci95": 0.01} for j in range(11)]
    columns[9] |= {"mean": None, "ci95": None}  # tasks diverged
    path = tmp_path / "results.json"
    path.write_text(json.dumps([test | {"query_examples_a_class_Q": 1, "results": []}, test | {"results": columns}]))
    monkeypatch.setattr(sys, "argv", ["compare_sinusoid.py", str(path)])
    runpy.run_path(str(ROOT / "experiments" / "compare_sinusoid.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 11
    assert lines[3:5] == ["      0   1.000 +- 0.010      3.100", "      1   0.500 +- 0.010      0.431"]
    assert lines[-2:] == ["      9   diverged            0.145", "     10   0.091 +- 0.010      0.142"]
    name = "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001"
    for run, original in (
        (f"{name}nonorm.pretrain.seed1", "3.090"),
        (f"{name}oraclenonorm", "0.003"),
        (f"{name}nonorm.pretrain1000", "3.100"),
    ):
        path.write_text(json.dumps([test | {"run": run, "results": columns}]))
        runpy.run_path(str(ROOT / "experiments" / "compare_sinusoid.py"), run_name="__main__")
        assert capsys.readouterr().out.splitlines()[3].split() == ["0", "1.000", "+-", "0.010", original]
    for damaged in ("{", "[1]"):
        path.write_text(damaged)
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "experiments" / "compare_sinusoid.py"), run_name="__main__")
        assert f"{path}: " in capsys.readouterr().err


@pytest.mark.parametrize(("done", "remark"), [(66, " (stopped at 66 of 100 iterations)"), (100, ""), (200, "")])
def test_the_summary_marks_a_reinforcement_learning_run_that_stopped_early(done, remark, tmp_path):
    """Records of the exact Fisher product count only if there are no others, and are marked."""
    theirs = {"point": {"maml": {"mean": [0.0] * 4, "ci95": [0.5] * 4}}}
    (tmp_path / "rl_authors.json").write_text(json.dumps(theirs))

    def line_with(name, mean, **flags):
        columns = [{"mean": mean, "ci95": 0.5}] * 4
        (tmp_path / name).write_text(json.dumps({"flags": flags, "results": columns}))
        (line,) = table.returns(tmp_path)
        return line

    exact = line_with("rl_point_exact_maml.json", 9.0, iterations=100)
    assert exact.endswith("| 0.0 ± 0.5 | 9.0 ± 0.5 (exact Fisher product) | |")
    line = line_with("rl_point_maml.json", 3.0, iterations=done, product="finite_difference")
    assert line.endswith(f"| 0.0 ± 0.5 | 3.0 ± 0.5{remark} | |")


def test_a_record_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert row.commit() is None


def test_a_record_has_the_run_and_every_test(tmp_path, monkeypatch):
    monkeypatch.setattr(row.subprocess, "Popen", InProcess)
    monkeypatch.setattr(row, "commit", lambda: "abc")
    training = f"--datasource=sinusoid --metatrain_iterations=3 --seed=4 --logdir={tmp_path}/logs/ --norm=None".split()
    training += ["--learn_update_lr=step"]
    with flagsaver.flagsaver():
        path = row.record(
            Path("experiments/some row.sh"),
            [*training, f"--results_dir={tmp_path}/results"],
            [[], ["--update_batch_size=2", "--train_update_batch_size=5"]],
        )
    assert path == tmp_path / "results" / "some row.learnlrstep.seed4.json"
    record = json.loads(path.read_text())
    assert (record["row"], record["iterations"], record["flags"]["seed"]) == ("some row", 3, 4)
    assert 0 < record["hours"] < 0.1
    assert [test["support_examples_a_class_K"] for test in record["tests"]] == [5, 2]
    assert all(len(test["results"]) == 11 for test in record["tests"])


@pytest.mark.parametrize(
    ("training", "test", "invalid"),
    [(["--help"], [], ["--help"]), ([], ["--test_task=9"], ["--test_task=9"]), (["--sed=1"], [], ["--sed=1"])],
)
def test_flags_are_checked_before_training(training, test, invalid, monkeypatch):
    """main.py runs once, with the flags that it rejects or answers."""
    commands = []
    monkeypatch.setattr(row, "run_program", lambda *program: commands.append(program))
    with pytest.raises(SystemExit):
        row.record(Path("row.sh"), training, [[], test])
    assert commands == [("main.py", invalid)]


def test_failed_training_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(row.subprocess, "Popen", InProcess)
    flags = [f"--results_dir={tmp_path}", "--baseline=oracle", "--datasource=omniglot"]
    with pytest.raises(SystemExit) as end:
        row.record(Path("row.sh"), flags, [[]])
    assert end.value.code == 1
    assert not list(tmp_path.iterdir())


def test_sigterm_reaches_the_training_process(monkeypatch):
    program = unittest.mock.Mock()
    program.wait.side_effect = [SystemExit(143), 143]
    monkeypatch.setattr(row.subprocess, "Popen", lambda command: program)
    with pytest.raises(SystemExit) as end:
        row.run_program("main.py", [])
    assert end.value.code == 143
    assert [call[0] for call in program.method_calls] == ["wait", "terminate", "wait"]


def test_hours_exclude_stops_and_suspension(tmp_path):
    starts = {"1.first": (1000, 1900, 2800), "2.second": (90_000, 90_900, 91_800, 140_000, 140_001, 140_901, 141_801)}
    for name, times in starts.items():
        with tf.io.TFRecordWriter(str(tmp_path / f"events.out.tfevents.{name}")) as writer:
            for step, time in enumerate(times):
                writer.write(event_pb2.Event(wall_time=time, step=step).SerializeToString())
    (tmp_path / "events.out.tfevents.3.full_disk").touch()
    assert row.training_hours(tmp_path) == pytest.approx((1800 + 1800 + 1801) / 3600)


def test_hours_include_start_up_and_validation(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "events.out.tfevents.1")) as writer:
        for step, time in ((0, 0), (0, 5), (1, 5.02), (2, 5.04), (3, 45.0), (4, 45.02)):
            writer.write(event_pb2.Event(wall_time=time, step=step).SerializeToString())
    assert row.training_hours(tmp_path) == pytest.approx(45.02 / 3600)


def test_a_published_model_has_the_results_of_its_run(tmp_path):
    flags = "--datasource=sinusoid --metatrain_iterations=2001 --norm=None --update_batch_size=3".split()
    test = ["--train=False", "--test_set=True"]
    run_main(*flags, f"--logdir={tmp_path}/logs")
    (folder,) = (tmp_path / "logs").iterdir()
    with pytest.raises(InputError, match=r"results\.json: "):
        publish.publish(folder, tmp_path / "published")
    run_main(*flags, f"--logdir={tmp_path}/logs", *test)
    copy = publish.publish(folder, tmp_path / "published")
    with pytest.raises(InputError, match=r"results\.json: .*model1000"):
        publish.publish(folder, tmp_path / "published", iteration=1000)
    later = [copy / f"model9000.{ending}" for ending in ("index", "data-00000-of-00001")]
    for path in later:
        path.touch()
    with pytest.raises(InputError, match=r"--to: .*model9000"):
        publish.publish(folder, tmp_path / "published")
    for path in later:
        path.unlink()
    assert publish.publish(folder, tmp_path / "published") == copy
    run_main(*flags, f"--logdir={tmp_path}/published", f"--results_dir={tmp_path}/again", *test)

    (name,) = [path.name for path in folder.glob("*.csv")]
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    # Exactly the variables of the original's network.
    assert tf.train.load_checkpoint(str(copy / "model2000")).get_variable_to_shape_map() == {
        "model/Variable": [1, 40],
        "model/Variable_1": [40],
        "model/Variable_2": [40, 40],
        "model/Variable_3": [40],
        "model/Variable_4": [40, 1],
        "model/Variable_5": [1],
    }
    assert (copy / "flags.json").read_bytes() == (folder / "flags.json").read_bytes()
    lines = [line.split("  ") for line in (copy / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in lines] == ["model2000.data-00000-of-00001", "model2000.index"]
    for checksum, name in lines:
        assert checksum == hashlib.sha256((copy / name).read_bytes()).hexdigest()
    events = EventFileLoader(str(copy / "events.out.tfevents.0.published")).Load()
    points = {(value.tag, event.step) for event in events for value in event.summary.value}
    assert {step for tag, step in points if tag == "metatrain_Post-update_loss__step_1"} == {0, 1000, 2000}
    assert {"flags", "_hparams_/session_start_info", "custom_scalars__config__", "test/task"} <= {
        tag for tag, _ in points
    }
    (tested,) = json.loads((copy / "results.json").read_text())
    assert events_of_test(copy) == {"test/loss": pytest.approx(tested["results"][10]["mean"])}


def test_publishing_a_run_into_its_own_folder_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(PUBLISHED[0].parent)
    for folder in (PUBLISHED[0].parent, tmp_path / "link"):
        with pytest.raises(InputError, match="--to: "):
            publish.publish(folder, folder.parent)


RUN = ROOT / "logs" / "published" / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("flags.json", content) for content in ("", "[]", '{"num_filters": "64"}', '{"seed": -1}')),
        *(("results.json", content) for content in ("", "{}", "[7]")),
    ],
)
def test_publishing_a_damaged_record_is_refused(name, content, tmp_path):
    folder = shutil.copytree(RUN, tmp_path / RUN.name)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=r"flags\.json|results\.json"):
        publish.publish(folder, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_publishing_to_a_file_or_a_missing_iteration_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=str(tmp_path / "file")):
        publish.publish(RUN, tmp_path / "file")
    with pytest.raises(InputError, match="--iteration=3"):
        publish.publish(RUN, tmp_path / "to", iteration=3)
    monkeypatch.chdir(RUN)
    assert publish.publish(Path("."), tmp_path / "to") == tmp_path / "to" / RUN.name  # not `to` itself


def events_of_test(folder: Path) -> dict[str, float]:
    """Return the values in the events of a published run's test."""
    events = EventFileLoader(str(folder / "test" / "events.out.tfevents.0.published")).Load()
    return {value.tag: tf.make_ndarray(value.tensor).item() for event in events for value in event.summary.value}


@pytest.mark.parametrize("folder", [path.parent for path in PUBLISHED], ids=lambda folder: folder.name)
def test_published_runs_have_everything_tensorboard_shows(folder):
    events = EventFileLoader(str(folder / "events.out.tfevents.0.published")).Load()
    values = {value.tag: value for event in events for value in event.summary.value}
    assert {
        "flags",
        "_hparams_/session_start_info",
        "_hparams_/experiment",
        "custom_scalars__config__",
    } <= values.keys()
    flags = json.loads((folder / "flags.json").read_text())
    flags_table = tf.make_ndarray(values["flags"].tensor).item().decode()
    assert all(f"| --{name} | {value} |" in flags_table for name, value in flags.items())
    picture = "test/task" if flags["datasource"] == "sinusoid" else "validation/task"
    assert tf.io.decode_png(values[picture].tensor.string_val[2]).shape[2] == 3
    ((metric, number),) = events_of_test(folder).items()
    assert metric == ("test/loss" if flags["datasource"] == "sinusoid" else "test/accuracy")
    (recorded,) = [  # the last column that the paper reports
        [column["mean"] for column in entry["results"] if column["the_papers_number"]][-1]
        for entry in json.loads((folder / "results.json").read_text())
        if entry["support_examples_a_class_K"] == flags["update_batch_size"]
        and entry["inner_step_size_alpha"] == flags["update_lr"]
    ]
    assert number == pytest.approx(recorded)


@pytest.fixture(scope="module")
def real_omniglot(shared, tmp_path_factory) -> Path:
    folder, archives = tmp_path_factory.mktemp("omniglot"), shared / "data" / "omniglot"
    names = [archives / f"images_{part}.zip" for part in ("background", "evaluation")]
    command = [sys.executable, ROOT / "data" / "omniglot_resized" / "resize_images.py", *names, "--out", folder]
    subprocess.run(command, capture_output=True, check=True)
    return folder


@pytest.mark.parametrize("flags", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_models_reproduce_their_results(flags, tmp_path, request):
    """The first test of each: the others take as long, and differ only in K or Q."""
    entry, more = json.loads((flags.parent / "results.json").read_text())[0], ()
    if json.loads(flags.read_text())["datasource"] == "omniglot":
        more = (f"--data_path={request.getfixturevalue('real_omniglot')}",)
    reproduced = verify.repeat_test(flags.parent, entry, tmp_path, *more)
    for column, published in zip(reproduced["results"], entry["results"], strict=True):
        assert column["mean"] == pytest.approx(published["mean"], rel=1e-3, abs=2e-4)


def test_gpu_py_runs_without_tensorflow():
    """`gpu.py run` is for a GPU machine that has JAX but not TensorFlow."""
    code = "import sys; sys.modules['tensorflow'] = None; sys.path.insert(0, 'benchmarks'); import gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_gpu_py_draws_the_exported_tasks_again(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import forms
    import gpu

    for way, shot, query, channels in ((5, 1, 1, 1), (5, 5, 15, 3)):
        batch = forms.random_images((8, 9), channels, 3, way, shot, query)
        problem = forms.Problem({"w": np.ones(2)}, [batch], 0.4, 1, 0.001, None, shot, max_pool=True, mean_head=False)
        header = problem._replace(weights=None, batches=None)._asdict() | {"shapes": [part.shape for part in batch]}
        redrawn, _ = gpu.problem_of({"header": np.array(json.dumps(header)), "weights/w": np.ones(2)})
        assert redrawn[2:] == problem[2:] and list(redrawn.weights) == ["w"]
        for redrawn_part, part in zip(redrawn.batches[0], batch, strict=True):
            np.testing.assert_array_equal(redrawn_part, part)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_scripts_keep_their_line_ends_in_a_checkout_for_windows(tmp_path):
    """Under core.autocrlf=true, which Git for Windows asks for. Bash refuses scripts with CRLF."""
    settings = "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@example.com"

    def git(*arguments):
        subprocess.run(["git", *settings, *map(str, arguments)], check=True, capture_output=True)

    shutil.copytree(
        ROOT / "experiments", tmp_path / "here" / "experiments", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / ".gitattributes", tmp_path / "here")
    git("init", tmp_path / "here")
    git("-C", tmp_path / "here", "add", ".")
    git("-C", tmp_path / "here", "commit", "--message=all")
    git("clone", tmp_path / "here", tmp_path / "there")
    scripts = sorted((ROOT / "experiments").glob("*.sh"))
    assert scripts
    for script in scripts:
        assert (tmp_path / "there" / "experiments" / script.name).read_bytes() == script.read_bytes()
