"""quickstart.ipynb: the notebook runs from top to bottom."""

import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("address", ["", "ssh://somewhere/maml.git"])
def test_notebook_without_a_clone_needs_an_address(address, tmp_path, monkeypatch, capsys):
    """With one it clones and installs the project."""
    cells = json.loads((ROOT / "quickstart.ipynb").read_text())["cells"]
    first = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    assert 'ADDRESS = ""  #' in first
    commands = []

    def run(command, check):
        commands.append(command[:2] + command[3:4] if command[0] == "git" else command[1:4])
        Path("maml").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    first = first.replace('ADDRESS = ""', f"ADDRESS = {address!r}")
    if address:
        exec(first)
        assert commands == [["git", "clone", address], ["-m", "pip", "install"]]
        assert Path.cwd() == tmp_path / "maml" and sys.path[0] == str(tmp_path / "maml")
        assert not capsys.readouterr().out
    else:
        with pytest.raises(AssertionError, match="ADDRESS"):
            exec(first)
        assert not commands


def test_notebook_asks_for_a_restart_if_another_numpy_is_imported(tmp_path, monkeypatch, capsys):
    """After the restart the clone is there, and is not made again."""
    cells = json.loads((ROOT / "quickstart.ipynb").read_text())["cells"]
    first = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    (tmp_path / "maml").mkdir()
    (tmp_path / "maml" / "maml.py").touch()
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command[0]))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    monkeypatch.setitem(sys.modules, "numpy", types.SimpleNamespace(__version__="0.2"))
    monkeypatch.chdir(tmp_path)
    exec(first)
    assert commands == [sys.executable]
    assert "numpy" in capsys.readouterr().out


def test_notebook_runs_and_gives_the_published_kinds_of_output(tmp_path):
    """It runs in a folder of its own, because it trains a run."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -r requirements-dev.txt")
    import nbformat

    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "published").symlink_to(ROOT / "logs" / "published")
    published = nbformat.read(ROOT / "quickstart.ipynb", as_version=4)
    notebook = nbformat.from_dict(published)
    for cell in notebook.cells:
        if "15000" in cell.source:
            cell.source = cell.source.replace("15000", "200")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cells in zip(notebook.cells, published.cells, strict=True):
        if cells[0].cell_type == "code":
            # Live output arrives in several pieces, which a saved notebook joins.
            kinds = [[kind for kind, _ in itertools.groupby(out.output_type for out in cell.outputs)] for cell in cells]
            assert kinds[0] == kinds[1] and "error" not in kinds[0]
    (right,) = re.findall(r"(\d+) of 30 are right", str(notebook.cells))
    assert int(right) >= 27
