"""README.md and docs/: links, files and flags exist, and programs accept the documented commands."""

import argparse
import copy
import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver

import main
import rl.main
from maml import MAML, adapt

ROOT = Path(main.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^    (.+)$|`([^`\n]+)`", re.M)  # a line of a code block, or a code span


def code(page: Path) -> list[str]:
    return [block or span for block, span in CODE.findall(page.read_text())]


def commands() -> list[str]:
    """Return each `python ...` command of the pages, with its <placeholders> filled in."""
    lines = (line for page in PAGES for line in code(page) if re.match(r"python3? ", line))
    return sorted({re.sub(r"<[^>]+>", "placeholder", line) for line in lines})


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_link_targets_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        assert not path or (page.parent / path).exists(), target
        if anchor:
            assert anchor in anchors((page.parent / path).resolve() if path else page), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_in_code_exist(page):
    for text in code(page):
        for path in re.findall(r"(?<![\w/.<>*-])[\w./-]+\.(?:py|sh|md|txt)\b", text):
            places = (ROOT, ROOT / "experiments", ROOT / "rl", *ROOT.glob("data/*/"))
            assert any((place / path).exists() for place in places), f"{path} in `{text}`"


def test_flags_in_code_exist():
    programs = "".join(path.read_text() for files in ("*.py", "*/*.py", "data/*/*.py") for path in ROOT.glob(files))
    for page in PAGES:
        for text in code(page):
            for flag in re.findall(r"(?<![\w-])--(\w+)", text):
                known = flag in main.FLAGS or flag in rl.main.FLAGS
                assert known or f'"--{flag}"' in programs, f"--{flag} in `{text}`"


class Accepted(Exception):
    """A program has parsed its command line."""


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command, monkeypatch):
    program, *arguments = shlex.split(command, comments=True)[1:]
    if program == "-m":
        check_module(*arguments)
    elif program == "main.py":
        flags = [argument for argument in arguments if argument != "--help"]
        with flagsaver.flagsaver():
            assert main.FLAGS(["main.py", *flags]) == ["main.py"]
    elif program == "rl/main.py":
        assert copy.deepcopy(rl.main.FLAGS)([program, *arguments]) == [program]
    else:
        check_program(ROOT / program, arguments, monkeypatch)


def check_module(module: str, *arguments: str) -> None:
    assert importlib.util.find_spec(module), module
    if module == "pytest":
        tests, _, word = " ".join(arguments).partition(" -k ")
        (path,) = [ROOT / tests]
        files = path.glob("test_*.py") if path.is_dir() else [path]
        assert re.search(rf"^def test_\w*{word}", "".join(file.read_text() for file in files), re.M), tests


def check_program(path: Path, arguments: list[str], monkeypatch) -> None:
    """Run the program up to the point where its parser accepts the arguments."""
    parse = argparse.ArgumentParser.parse_known_args

    def accept(*positional):
        parse(*positional)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", accept)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises((Accepted, SystemExit)) as end:
        runpy.run_path(str(path), run_name="__main__")
    if end.type is SystemExit:
        assert arguments == ["--help"] and not end.value.code


def run_example(number: int) -> dict:
    """Run a Python example of docs/library.md for a few steps in the current folder, and return its variables."""
    example = (ROOT / "docs" / "library.md").read_text().split("```python\n")[1:][number].split("```")[0]
    variables = {}
    exec(re.sub(r"range\(\d+\)", "range(3)", example), variables)
    return variables


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_tmp_path")
def test_the_example_of_a_network_runs():
    assert run_example(0)["maml"].step.numpy() == 3


@pytest.mark.usefixtures("in_tmp_path")
def test_the_example_of_a_keras_model_loads_and_exports_what_it_learned():
    names = run_example(1)
    maml = MAML(names["maml"].inner, seed=1)
    tf.train.Checkpoint(maml=maml).read("sines").assert_consumed()
    for name, weight in names["maml"].weights.items():
        np.testing.assert_array_equal(maml.weights[name], weight)
    task = names["task"]
    expected = maml.inner.network.apply(adapt(maml.inner, maml.values(), task, steps=5), task.query_x)
    exported = tf.saved_model.load("adapted")
    np.testing.assert_allclose(exported.serve(task.query_x), expected, atol=1e-5)


@pytest.mark.usefixtures("in_tmp_path")
def test_the_example_of_a_pretrained_network_learns_its_last_layer(monkeypatch):
    def small(shape, include_top, pooling):  # instead of a download
        layers = keras.layers
        norm = layers.BatchNormalization(moving_mean_initializer="ones")
        return keras.Sequential([keras.Input(shape), layers.Conv2D(2, 3), norm, layers.GlobalAveragePooling2D()])

    monkeypatch.setattr(keras.applications, "MobileNetV2", small)
    names = run_example(2)
    assert [weight.shape for weight in names["maml"].weights.values()] == [(2, 5), (5,)]
    x = np.random.default_rng(0).random((3, 96, 96, 3), np.float32)
    np.testing.assert_allclose(names["network"].apply(names["maml"].values(), x), names["model"](x), rtol=1e-4)


def test_the_readme_lists_every_module():
    section = (ROOT / "README.md").read_text().split("\n## Layout\n")[1].split("\n## ")[0]
    mapped = set(re.findall(r"`(\w+\.py)`", section))
    assert mapped == {path.name for path in ROOT.glob("*.py")}
    folders = set(re.findall(r"`([\w/]+)/`", section))
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_numbers_in_prose_equal_the_records():
    readme = (ROOT / "README.md").read_text()
    speed = json.loads((ROOT / "results" / "speed.json").read_text())
    step, original = (
        next(row["ms_per_step"] for row in speed[who]["rows"] if row["configuration"] == "omniglot_5way")
        for who in ("ours", "original")
    )
    assert f"an Omniglot 5-way step takes {step:.0f} ms; the original's [took {original:.0f} ms]" in readme
    ranges = speed["peers"]["one_task_after_the_other"]
    images, sinusoid = ("{} to {} times".format(*ranges[kind]) for kind in ("images", "sinusoid"))
    prose = " ".join((ROOT / "docs" / "design.md").read_text().split())
    assert f"{images} our time on images, and {sinusoid} on the sinusoid" in prose
    test = json.loads((ROOT / "results" / "omniglot_5way_1shot.json").read_text())["tests"][0]
    (column,) = [column for column in test["results"] if column["the_papers_number"]]
    assert f"prints {100 * column['mean']:.2f} ± {100 * column['ci95']:.2f}" in readme


def test_library_page_shows_the_real_row_and_script():
    diff = (ROOT / "docs" / "library.md").read_text().split("```diff\n")[1].split("```")[0]
    row, script = (re.findall(r"^\+(?!\+)(.*)$", part, re.M) for part in diff.split("--- /dev/null\n"))
    assert row[0] in (ROOT / "recipe.py").read_text().splitlines()
    assert script == (ROOT / "data" / "fc100" / "prepare.py").read_text().splitlines()


def test_figures_are_used_and_small():
    figures = {path.resolve() for path in (ROOT / "figures").glob("*.png")}
    links = ((page, path) for page in PAGES for path in re.findall(r"\((\S+\.png)\)", page.read_text()))
    assert {(page.parent / path).resolve() for page, path in links} == figures
    assert sum(path.stat().st_size for path in figures) < 1_000_000


def test_the_tests_of_every_guarantee_exist():
    names = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "safety.md").read_text())
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert names
    assert not [name for name in names if f"def {name}(" not in tests]
