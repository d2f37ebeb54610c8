"""Damaged files of events, limits of memory and cores, and odd surroundings."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import devices
import main
import runs
from tests.helpers import (
    PROGRAM,
    end,
    only_run,
    spawn,
)

ROOT = Path(main.__file__).parent

# -- flags ------------------------------------------------------------------------------------------------------------


def write_control_groups(root, groups, files):
    """As Linux shows them: the groups of a process, and their files of limits."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", {"memory.max": "8192\n"}),
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": "8192\n", "slurm/job_7/step_0/memory.max": "max\n"}),
        ("9:cpuset:/\n4:memory:/docker/4f:2\n0::/\n", {"memory/memory.limit_in_bytes": "8192\n"}),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "8192", "memory/memory.limit_in_bytes": str(2**63)}),
    ],
    ids=["container", "Slurm", "container, version 1", "group, version 1"],
)
def test_a_limit_of_memory_counts_as_the_memory(groups, files, tmp_path):
    """Past it the system ends the process without a word, however much the machine has."""
    write_control_groups(tmp_path, groups, files)
    assert devices.memory(tmp_path) == 8192
    shutil.rmtree(tmp_path / "sys")
    assert devices.memory(tmp_path) == devices.memory(tmp_path / "none") > 2**30  # the machine's


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/pod/one\n", {"pod/cpu.max": "50000 100000\n", "pod/one/cpu.max": "300000 100000\n"}, 1),
        (
            "3:cpuacct,cpu:/docker/4f\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
    ids=["container", "no limit", "pod", "container, version 1", "no limit, version 1"],
)
def test_a_limit_of_processor_time_counts_as_the_cores(groups, files, cores, monkeypatch, tmp_path):
    """A container with two of a host's 64 cores must not compute 64 tasks at once, nor take the memory for them."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write_control_groups(tmp_path, groups, files)
    assert devices.cores(tmp_path) == cores


def test_surroundings_that_have_no_code_for_a_letter(tmp_path):
    """An old terminal; and file names are read by another code than UTF-8."""
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


# -- surroundings, and the programs beside main.py ---------------------------------------------------------------------


def test_a_backend_of_matplotlib_that_is_not_installed():
    """Jupyter has what it starts draw by its own means. Matplotlib, which TensorFlow imports, refuses some of these."""
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    ended = end(spawn("-c", "import devices, os; print(os.environ.get('MPLBACKEND'))", cwd=ROOT, env=environment))
    assert (ended.code, ended.err, ended.out) == (0, "", "None\n")


def test_a_link_of_an_editor_beside_the_programs(tmp_path, monkeypatch):
    """Emacs leaves one that leads nowhere while a file has changes that are not saved."""
    (tmp_path / "some.py").write_text("1")
    monkeypatch.setattr(main, "ROOT", tmp_path)
    before = main.identity()
    (tmp_path / ".#some.py").symlink_to("me@here.42")
    assert main.identity() == before


def test_why_tensorflow_aborts_is_told():
    """As on processors without AVX. Notices are not."""
    program = (
        "import os, resource, devices\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "with devices._without_notices():\n"
        "    os.write(2, b'W0000 00:00 a notice\\nF0000 00:00 why\\n')\n    os.abort()"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT
    assert ended.stderr == "F0000 00:00 why\n"


def test_a_start_where_python_does_not_know_where_it_is():
    """As in a program that Python is a part of: nothing reads along, and the start is only louder."""
    for where in ("'/nowhere/python'", "None"):
        program = f"import sys\nsys.executable = {where}\nimport devices\nprint('started')"
        ended = end(spawn("-c", program, cwd=ROOT))
        assert (ended.code, ended.out) == (0, "started\n")


@pytest.mark.skipif(os.name == "nt", reason="a shell that closes them")
def test_closed_streams(tmp_path):
    """The run ends as it should, and no file of its own takes the number of stdout or stderr."""
    flags = "--norm=None", "--metatrain_iterations=1", f"--logdir={tmp_path}"
    command = [sys.executable, PROGRAM, *flags]
    quoted = " ".join(f"'{part}'" for part in command)
    assert subprocess.run(["sh", "-c", f"{quoted} <&- >&- 2>&-"], timeout=300).returncode == 0
    assert runs.Run(only_run(tmp_path)).iterations() == [0]
