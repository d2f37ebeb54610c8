"""make verify fails if a claim does not hold, and names what differs."""

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
from tests.helpers import not_compiled, only_run, run, variables
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


def test_a_changed_weight_fails_by_name(check, copied):
    folder = copied(SINUSOID)
    assert verify.same_files(folder)[2]
    change_a_weight(folder)
    assert check("Published models") == (1, {f"{folder.name}: SHA-256": "NO", f"{folder.name}: test": "yes"})


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: shutil.copy(folder / "model69999.index", folder / "model70000.index"),
        lambda folder: (folder / "model69999.index").unlink(),
        lambda folder: (folder / "SHA256SUMS").write_text(""),
        lambda folder: (folder / "SHA256SUMS").unlink(),
    ],
    ids=["another file", "a missing file", "an empty record", "no record"],
)
def test_other_files_than_recorded_fail_by_name(check, copied, monkeypatch, change):
    folder = copied(SINUSOID)
    monkeypatch.setattr(verify, "same_result", lambda folder: ("", "", True))
    change(folder)
    assert check("Published models") == (1, {f"{folder.name}: SHA-256": "NO", f"{folder.name}: test": "yes"})


@pytest.mark.parametrize("intervals, within", [(-1.1, False), (-0.9, True), (0.9, True), (1.1, False)])
def test_a_result_outside_the_interval_fails(monkeypatch, intervals, within):
    def changed(folder, test, results):
        columns = [column | {"mean": column["mean"] + intervals * column["ci95"]} for column in test["results"]]
        return test | {"results": columns}

    monkeypatch.setattr(verify, "repeat_test", changed)
    _, _, holds = verify.same_result(SINUSOID)
    assert holds == within


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


def test_a_resume_without_adams_moments_fails(monkeypatch):
    def train_until_stopped(iteration, *flags):
        run(*flags, "--metatrain_iterations=300")
        folder = only_run(Path(flags[-1].removeprefix("--logdir=")))
        state = variables(folder, "model299")
        moments = {name: 0 * value for name, value in state.items() if name.endswith(("/Adam", "/Adam_1"))}
        runs.write_checkpoint(folder / "model299", state | moments)

    monkeypatch.setattr(verify, "train_until_killed", train_until_stopped)
    ((_, measure),) = verify.resume()
    with not_compiled():
        recorded, measured, holds = measure()
    assert recorded != measured and not holds


def test_an_error_in_one_measurement_hides_no_other(check, monkeypatch):
    claims = {"claim": lambda: [("fails", lambda: {}["key"]), ("works", lambda: ("1", "1", True))]}
    monkeypatch.setattr(verify, "CLAIMS", claims)
    assert check("claim") == (1, {"fails": "NO", "works": "yes"})


def test_the_readme_lists_the_claims():
    section = (verify.ROOT / "README.md").read_text().split("\n## Why trust it\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| \*\*(.+?)\.\*\*", section, re.M) == list(verify.CLAIMS)
