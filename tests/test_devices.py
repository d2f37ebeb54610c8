"""The machine's limits, terminals, environment variables, and oneDNN."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import devices
import main
from tests.helpers import PROGRAM, end, spawn

ROOT = Path(main.__file__).parent


@pytest.mark.parametrize("group", ["/", "/pod/one"], ids=["container", "group"])
def test_cgroup_limits_bound_memory_and_cores(group, monkeypatch, tmp_path):
    """cgroup v2's limits of the process's group and of the groups that contain it."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    inner, outer = tmp_path / f"sys/fs/cgroup{group}", tmp_path / "sys/fs/cgroup"
    for folder in (tmp_path / "proc/self", inner):
        folder.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"0::{group}\n")
    for name, limit in (("memory.max", "8192\n"), ("cpu.max", "150000 100000\n")):
        (inner / name).write_text("max\n" if name == "memory.max" else "max 100000\n")
        (outer / name).write_text(limit)
    assert (devices.memory(tmp_path), devices.cores(tmp_path)) == (8192, 2)
    shutil.rmtree(tmp_path / "sys")
    assert devices.memory(tmp_path) > 2**30  # the machine's
    assert devices.cores(tmp_path) == 8


def test_names_that_the_terminal_cannot_encode_cause_no_traceback(tmp_path):
    """An ASCII terminal, and a file system encoding other than UTF-8."""
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
    }
    logdir = tmp_path / "mod\u00e8les \u8a66"
    ended = end(spawn(PROGRAM, "--metatrain_iterations=1", f"--logdir={logdir}", env=environment))
    assert (ended.code, len(ended.err.splitlines())) in ((0, 0), (1, 1))
    assert "Traceback" not in ended.err


def test_a_matplotlib_backend_that_is_not_installed_is_ignored():
    """Jupyter sets one for its subprocesses, and matplotlib, which TensorFlow imports, may refuse it."""
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    ended = end(spawn("-c", "import devices, os; print(os.environ.get('MPLBACKEND'))", cwd=ROOT, env=environment))
    assert (ended.code, ended.err, ended.out) == (0, "", "None\n")


@pytest.mark.parametrize("settings", [("torch", "1", "jax"), ("theano", "", "tensorflow"), (None, "", "theano")])
def test_keras_settings_of_other_projects_are_harmless(settings, tmp_path):
    """Backends that are not installed, or that Keras no longer has, and a legacy Keras that is not installed."""
    backend, legacy, in_file = settings
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment |= {"KERAS_HOME": str(tmp_path), "TF_USE_LEGACY_KERAS": legacy}
    environment |= {"KERAS_BACKEND": backend} if backend else {}
    (tmp_path / "keras.json").write_text(json.dumps({"backend": in_file, "image_dim_ordering": "th"}))
    program = "import predict, report, tensorflow as tf; print(tf.keras.backend.backend())"
    ended = end(spawn("-c", program, cwd=ROOT, env=environment))
    assert (ended.code, ended.err, ended.out) == (0, "", "tensorflow\n")


def test_importing_devices_starts_neither_a_process_nor_tensorflow():
    program = (
        "import sys\nsys.addaudithook(lambda event, _: event in ('subprocess.Popen', 'os.fork') and print(event))\n"
        "import devices\nassert 'tensorflow' not in sys.modules"
    )
    assert end(spawn("-c", program, cwd=ROOT)) == (0, "", "")


# -- oneDNN: on for photographs where TensorFlow leaves it off, and the same for a whole run ---------------------------


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
