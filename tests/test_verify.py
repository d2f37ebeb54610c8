"""make verify fails if a claim does not hold, and names what differs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import runs
import special_grads
import verify
from publish import PUBLISHED
from tests import test_oracle
from tests.helpers import only_run, run, variables
from tests.test_special_grads import library_batch_norm

SINUSOID = PUBLISHED / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm"
OMNIGLOT = PUBLISHED / "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm"


@pytest.fixture
def check(monkeypatch, capsys):
    """Run the program for one claim; return its exit status, and the verdict of each row."""

    def run_program(claim: str) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr("sys.argv", ["verify.py"])
        monkeypatch.setattr(verify, "CLAIMS", {claim: verify.CLAIMS[claim]})
        with pytest.raises(SystemExit) as ended:
            verify.main()
        _, _, *rows, _ = capsys.readouterr().out.splitlines()  # the header, the claim; the summary
        cells = [re.split(" {2,}", row.strip()) for row in rows]
        return ended.value.code, {what: verdict for what, *_, verdict in cells}

    return run_program


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """Copy a published model, and let the copy be the only one."""

    def copy(folder: Path) -> Path:
        monkeypatch.setattr(verify, "PUBLISHED", tmp_path / "published")
        return shutil.copytree(folder, tmp_path / "published" / folder.name)

    return copy


def change_a_weight(folder: Path) -> None:
    weights = variables(folder, "model69999")
    weights["model/Variable_2"][3, 5] = np.nextafter(weights["model/Variable_2"][3, 5], np.float32(np.inf))
    runs.write_checkpoint(folder / "model69999", weights)


@pytest.mark.parametrize(
    "change",
    [
        change_a_weight,
        lambda folder: (folder / "SHA256SUMS").unlink(),
        lambda folder: shutil.copy(folder / "model69999.index", folder / "model70000.index"),
    ],
    ids=["a weight", "no record", "another file"],
)
def test_a_changed_checkpoint_fails_by_name(check, copied, change):
    name = copied(SINUSOID).name
    assert check("Published models") == (0, {f"{name}: SHA-256": "yes", f"{name}: test": "yes"})
    change(verify.PUBLISHED / name)
    assert check("Published models") == (1, {f"{name}: SHA-256": "NO", f"{name}: test": "yes"})


def test_a_missing_checkpoint_fails_by_name(check, copied):
    folder = copied(SINUSOID)
    (folder / "model69999.index").unlink()
    assert check("Published models") == (1, {f"{folder.name}: SHA-256": "NO", f"{folder.name}: test": "NO"})


@pytest.mark.parametrize("intervals, code", [(-2, 1), (-0.9, 0), (0.9, 0), (2, 1)])
def test_a_result_outside_the_interval_fails(check, copied, intervals, code):
    folder = copied(SINUSOID)
    tests = json.loads((folder / "results.json").read_text())
    for column in (column for test in tests for column in test["results"]):
        column["mean"] += intervals * column["ci95"]
    (folder / "results.json").write_text(json.dumps(tests))
    ended, verdicts = check("Published models")
    assert (ended, verdicts[f"{folder.name}: test"]) == (code, "NO" if code else "yes")


def test_without_images_a_model_is_not_tested(check, copied, monkeypatch, tmp_path):
    name = copied(OMNIGLOT).name
    (tmp_path / "data" / "omniglot_resized" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    assert check("Published models") == (0, {f"{name}: SHA-256": "yes", f"{name}: test": "not measured"})


@pytest.mark.parametrize("name", sorted(path.name for path in PUBLISHED.iterdir()))
def test_published_models_have_their_checksums(name):
    _, _, same = verify.same_files(PUBLISHED / name)
    assert same


@pytest.mark.parametrize(
    "changed, failing",
    [
        (None, []),
        ("total_losses2", ["losses, 1 records"]),
        ("task_meta_gradient/model/Variable_2", ["meta-gradients, 1 records"]),
    ],
)
def test_a_difference_from_the_authors_graph_fails(check, monkeypatch, tmp_path, changed, failing):
    arrays = dict(np.load(test_oracle.ORACLE / "sinusoid_10shot.npz"))
    if changed:
        arrays[changed] = arrays[changed] * 1.001
    np.savez(tmp_path / "record.npz", **arrays)
    monkeypatch.setattr(test_oracle, "RECORDS", [tmp_path / "record.npz"])
    monkeypatch.setattr(test_oracle, "SHARED_RECORDS", [])
    code, verdicts = check("Parity")
    assert verdicts.pop("larger records") == "not measured"
    assert len(verdicts) == 3
    assert [what for what, verdict in verdicts.items() if verdict != "yes"] == failing
    assert code == bool(failing)


def test_wrong_second_derivatives_fail(check, monkeypatch):
    assert check("Second derivatives")[0] == 0
    monkeypatch.setattr(special_grads, "batch_norm", library_batch_norm)
    assert check("Second derivatives")[0] == 1


def test_a_resume_without_adams_moments_fails(check, monkeypatch):
    def train_until_stopped(iteration, *flags):
        run(*flags, "--metatrain_iterations=300")
        if lost:
            folder = only_run(Path(flags[-1].removeprefix("--logdir=")))
            state = variables(folder, "model299")
            moments = {name: 0 * value for name, value in state.items() if name.endswith(("/Adam", "/Adam_1"))}
            runs.write_checkpoint(folder / "model299", state | moments)

    monkeypatch.setattr(verify, "train_until_killed", train_until_stopped)
    for lost in (False, True):
        assert check("Bitwise resume")[0] == int(lost)


def test_an_error_in_one_measurement_hides_no_other(check, monkeypatch):
    claims = {"claim": lambda: [("fails", lambda: {}["key"]), ("works", lambda: ("1", "1", True))]}
    monkeypatch.setattr(verify, "CLAIMS", claims)
    assert check("claim") == (1, {"fails": "NO", "works": "yes"})


def test_the_readme_lists_the_claims():
    section = (verify.ROOT / "README.md").read_text().split("\n## Why trust it\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| \*\*(.+?)\.\*\*", section, re.M) == list(verify.CLAIMS)
