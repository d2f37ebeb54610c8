"""The notebook, from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_notebook_runs(tmp_path):
    """In a folder of its own, since it trains a run. Its cells are those that are published, and so are its outputs."""
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
    for done, shown in zip(notebook.cells, published.cells, strict=True):
        if done.cell_type == "code":
            kinds = [[output.output_type for output in cell.outputs] for cell in (done, shown)]
            assert kinds[0] == kinds[1] and "error" not in kinds[0]
    (right,) = re.findall(r"(\d+) of 30 are right", str(notebook.cells))
    assert int(right) >= 27
