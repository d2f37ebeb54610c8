"""Damaged files of events, limits of memory and cores, and odd surroundings."""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

import devices
import events
import main
import recipe
import runs
from files import InputError
from parallel import Layout
from tests.helpers import (
    PROGRAM,
    end,
    only_run,
    read_events,
    refusal,
    spawn,
    write_events,
)

ROOT = Path(main.__file__).parent

# -- events -----------------------------------------------------------------------------------------------------------


def event_file(folder: Path) -> Path:
    """Of the events 0, 100 and 200, value 1."""
    write_events(folder, 0, [0, 100, 200], value=1)
    (path,) = folder.iterdir()
    return path


def record(data: bytes, length: int | None = None) -> bytes:
    """A record with right checksums, whatever its length says."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def second_record(path: Path) -> int:
    """Where the record of event 0 begins, behind that of the file's version."""
    return 16 + int.from_bytes(path.read_bytes()[:8], "little")


DAMAGES = {  # name -> (what is done, the steps that can still be read)
    "an enormous length": (lambda path: path.write_bytes(path.read_bytes() + record(b"x", 2**36)), [0, 100, 200]),
    "an absurd length": (lambda path: path.write_bytes(path.read_bytes() + record(b"x", 2**64 - 1)), [0, 100, 200]),
    "no event": (lambda path: path.write_bytes(path.read_bytes() + record(b"\xff" * 9)), [0, 100, 200]),
    "a bit of an event": (lambda path: flip(path, second_record(path) + 20), [100, 200]),
    "a bit of a length": (lambda path: flip(path, second_record(path) + 5), []),
    "text": (lambda path: path.write_text("events\n" * 99), []),
    "a pipe": (lambda path: path.unlink() or os.mkfifo(path), []),
    "an endless device": (lambda path: path.unlink() or path.symlink_to("/dev/zero"), []),
}


@pytest.mark.parametrize(("damage", "steps"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_of_events_is_set_aside(tmp_path, capsys, damage, steps):
    """Under a name that TensorBoard passes over, in one line; what can be read of it stays, and the run goes on."""
    path = event_file(tmp_path)
    damage(path)
    damaged = path.read_bytes() if path.is_file() else None
    write_events(tmp_path, 201, [300], value=2)
    aside = path.with_name(path.name.replace("events.out.tfevents", "damaged-events"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {path} is damaged (")
    assert line.endswith(f"): it is now {aside.name}.")
    assert damaged is None or aside.read_bytes() == damaged
    assert read_events(tmp_path) == [*((step, 1) for step in steps), (300, 2)]
    write_events(tmp_path, 301, [400], value=3)
    assert capsys.readouterr().err == ""


def test_a_reader_of_events_takes_what_it_can(tmp_path, capsys):
    """As plot.py, publish.py and row.py read them."""
    DAMAGES["an enormous length"][0](event_file(tmp_path))
    assert [event.step for event, _ in events.read_all(tmp_path) if event.summary.value] == [0, 100, 200]
    assert "what can be read of it is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (tf.compat.v1.Summary.Value(simple_value=2.0), 2.0),
        (tf.compat.v1.Summary.Value(tensor=tf.make_tensor_proto(3.0)), 3.0),
        (tf.compat.v1.Summary.Value(tensor=tf.make_tensor_proto(b"text")), None),
        (tf.compat.v1.Summary.Value(tensor=tf.make_tensor_proto(0.0, shape=[2**20])), None),  # small in the file
        (tf.compat.v1.Summary.Value(), None),
    ],
    ids=["the original's", "ours", "text", "many", "none"],
)
def test_only_numbers_are_numbers(value, number):
    assert events.number(value) == number


def test_a_clock_that_was_set_back(tmp_path):
    """TensorBoard takes files in the order of their names, which begin with the time."""
    for start in (0, 100):
        write_events(tmp_path, [start], value=1)
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path, hours in zip(paths, (24, 48), strict=True):
        seconds = int(time.time()) + 3600 * hours
        path.rename(path.with_name(f"events.out.tfevents.{seconds}.here.1.1.v2"))
    write_events(tmp_path, 200, [200], value=1)
    assert read_events(tmp_path) == [(0, 1), (100, 1), (200, 1)]
    assert len(list(tmp_path.iterdir())) == 3


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        (["--meta_batch_size=1000000", "--update_batch_size=1000"], "tasks"),
        (["--datasource=omniglot", "--update_batch_size=100000", "--num_updates=100"], "updates"),
        (["--datasource=miniimagenet", "--num_filters=10000"], "weights"),
        (["--datasource=miniimagenet", "--noconv", "--image_size=10000", "--meta_batch_size=1"], "weights"),
    ],
    ids=["tasks", "updates", "weights", "one layer"],
)
def test_what_would_fill_the_memory_is_refused_before_any_work(flags, most, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "memory", lambda: 16 * 2**30)
    line = refusal(f"--logdir={tmp_path / 'logs'}", *flags)
    assert re.search(rf"takes [\d,]+ GB of memory or more, most of it for {most}, and this process may use 16 GB", line)
    assert all(flag in line for flag in flags if re.search(r"=\d", flag))
    assert list(tmp_path.iterdir()) == []


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


def test_a_strangers_flags_fill_no_memory(tmp_path, monkeypatch):
    """Where a model is built of a flags.json, as plot.py and publish.py do."""
    monkeypatch.setattr(devices, "memory", lambda: 16 * 2**30)
    stranger = recipe.from_flags({"datasource": "miniimagenet", "num_filters": 10**4})
    with pytest.raises(InputError, match="most of it for weights, and this process may use 16 GB: lower"):
        recipe.build(stranger)


def test_every_published_command_fits_a_small_machine(monkeypatch):
    """The estimate is from below, so that nothing is refused that would work. ResNet12 takes 2 GB a task."""
    for script in set((ROOT / "experiments").glob("*.sh")) - set((ROOT / "experiments").glob("rl_*.sh")):
        command = re.sub(r"(?m)^#.*", "", script.read_text())  # a comment may have flags of another program
        training = command.replace("\\\n", " ").split(" -- ")[0]
        flags = [word for word in training.split() if re.fullmatch(r"--\w+=?\S*", word)]
        memory = (16 if "resnet12" in script.stem else 4) * 2**30
        monkeypatch.setattr(devices, "memory", lambda memory=memory: memory)
        recipe.check_training(main.recipe_of(main.parsed(flags)), Layout(4))


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
