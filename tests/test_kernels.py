"""oneDNN: on for photographs where TensorFlow leaves it off, and the same for all of a run."""

import json
import os
import sys

import pytest

import devices
import main


@pytest.fixture
def without_vnni(monkeypatch):
    """A processor on which TensorFlow leaves oneDNN off, and a program that has not imported TensorFlow."""
    monkeypatch.setattr(devices, "instruction_set", lambda: "avx2")
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    monkeypatch.delitem(sys.modules, "tensorflow")
    yield
    os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)  # monkeypatch then restores what was there


def chosen(*flags: str) -> bool:
    main.choose_kernels(main.parsed(list(flags)))
    return devices.onednn()


def test_photographs_have_onednn(without_vnni, tmp_path):
    assert chosen("--datasource=miniimagenet", f"--logdir={tmp_path}")


@pytest.mark.parametrize("data", ["omniglot", "sinusoid"])
def test_the_bits_of_other_tasks_stay(data, without_vnni, tmp_path):
    assert not chosen(f"--datasource={data}", f"--logdir={tmp_path}")


def test_the_environment_decides(without_vnni, monkeypatch, tmp_path):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert not chosen("--datasource=miniimagenet", f"--logdir={tmp_path}")


@pytest.mark.parametrize("record", [{"onednn": True}, {"onednn": False}, {}, None])
def test_a_run_keeps_its_kernels(record, without_vnni, tmp_path):
    flags = "--datasource=miniimagenet", f"--logdir={tmp_path}"
    folder = main.run_path(main.parsed(list(flags)))
    folder.mkdir()
    (folder / "model0.index").touch()
    if record is not None:
        (folder / "computed.json").write_text(json.dumps([{"from_iteration": 0, **record}]))
    assert chosen(*flags) == bool(record and record.get("onednn"))


def test_nothing_changes_where_tensorflow_has_onednn_on(without_vnni, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "instruction_set", lambda: "avx512_vnni")
    assert chosen("--datasource=omniglot", f"--logdir={tmp_path}")
    assert "TF_ENABLE_ONEDNN_OPTS" not in os.environ
