"""Several processes: equal weights on any number of them, signals, killed processes, mismatches, launch.py."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tensorflow as tf

import cluster
import devices
import launch as launcher
import main
import runs
import train
from cluster import EXIT_PEER_LOST, Cluster, stopping_on_signals
from files import InputError
from tests.helpers import (
    Ended,
    assert_same_ending,
    only_run,
    refusal,
    scalars,
    small_flags,
    without_start_up_lines,
)

ROOT = Path(main.__file__).parent
STEPS = "--metatrain_iterations=45"
SHORT_INTERVALS = """
import main, report, train
train.SUMMARY_INTERVAL = report.PRINT_INTERVAL = 20
train.VALIDATION_INTERVAL = 10
main.DATASETS["omniglot"] = main.DATASETS["omniglot"]._replace(curve_steps=1)
"""
# Import TensorFlow once, then fork the processes. Each starts TensorFlow itself.
SERVER = """
import json, os, signal, sys, traceback
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    if process := os.fork():
        print(process, flush=True)
        continue
    for number, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore SIGINT
    code = 0
    try:
        main.run(main.parse(["main.py", *order["flags"]]))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)
"""


class Server:
    """A process that forks main.py processes, which form a cluster."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", SHORT_INTERVALS + SERVER]
        self.folder, self.process = folder, subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def ask(self, **order: object) -> int:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self,
        flags: list[list[str]],
        cwd: list[Path] | None = None,
        present: list[int] | None = None,
        ports: list[int] | None = None,
    ) -> "Processes":
        """Start one process for each list of flags, or only those that are `present`."""
        addresses = [f"127.0.0.1:{port}" for port in ports or free_ports(len(flags))]
        numbers, files = [], []
        for index in range(len(flags)) if present is None else present:
            files.append(self.folder / f"{time.time_ns()}")
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            numbers.append(
                self.ask(
                    flags=flags[index],
                    environment={"TF_CONFIG": json.dumps(config)} if len(flags) > 1 else {},
                    cwd=str(cwd[index] if cwd else ROOT),
                    out=f"{files[-1]}.out",
                    err=f"{files[-1]}.err",
                )
            )
        return Processes(self, numbers, files, addresses)


class Processes(NamedTuple):
    server: Server
    numbers: list[int]
    files: list[Path]
    addresses: list[str]

    def end(self) -> list[Ended]:
        codes = [self.server.ask(wait=number) for number in self.numbers]
        outputs = [[Path(f"{file}.{kind}").read_text() for kind in ("out", "err")] for file in self.files]
        return [Ended(code, out, without_start_up_lines(err)) for code, (out, err) in zip(codes, outputs, strict=True)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("output"))
    with server.process:  # closes its pipes at the end, so that it exits
        yield server
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def flags(omniglot) -> list[str]:
    return [*small_flags(omniglot), "--meta_batch_size=4", "--save_interval=5", STEPS]


@pytest.fixture(scope="module")
def single(server, flags, tmp_path_factory) -> Path:
    """The folder of the run in a single process."""
    logdir = tmp_path_factory.mktemp("single")
    (ended,) = server.start([[*flags, f"--logdir={logdir}"]]).end()
    assert (ended.code, ended.err) == (0, "")
    return only_run(logdir)


def train_on(server: Server, count: int, flags: list[str]) -> list[Ended]:
    """Run in `count` processes with different numbers of threads. All must succeed, and only the chief print."""
    ended = server.start([[*flags, f"--threads={rank + 1}"] for rank in range(count)]).end()
    assert [(process.code, process.err) for process in ended] == [(0, "")] * count
    assert ["waiting for" in process.out for process in ended] == [count > 1] * count
    assert [len(process.out.splitlines()) for process in ended[1:]] == [1] * (count - 1)
    return ended


def wait_for(logdir: Path, iteration: int) -> runs.Run:
    """Wait for a checkpoint at or after `iteration`. Return its run."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for folder in logdir.glob("cls_*"):
            if (saved := runs.Run(folder).iterations()) and saved[-1] >= iteration:
                return runs.Run(folder)
        time.sleep(0.01)
    raise TimeoutError


# -- equal weights ----------------------------------------------------------------------------------------------------


def test_two_processes_train_bitwise_identical_weights(server, flags, single, tmp_path):
    """Adam's moments, validation results and TensorBoard events are identical too. Another test has four processes."""
    chief = train_on(server, 2, [*flags, f"--logdir={tmp_path}"])[0]
    folder = only_run(tmp_path)
    assert "Done: 45 iterations" in chief.out
    assert_same_ending(folder, single)
    assert scalars(folder) == scalars(single)
    assert sorted(path.name for path in folder.iterdir() if "tfevents" not in path.name) == sorted(
        path.name for path in single.iterdir() if "tfevents" not in path.name
    )


@pytest.mark.parametrize(("killed", "others"), [(1, [0]), (0, [1, 2])], ids=["worker", "chief"])
def test_if_a_process_is_killed_all_exit_and_a_different_number_resumes(
    killed, others, server, flags, single, tmp_path
):
    flags = [*flags, f"--logdir={tmp_path}"]
    count = len(others) + 1
    if count == 3:
        flags.append("--meta_batch_size=6")
    processes = server.start([flags] * count)
    started = wait_for(tmp_path, 4)
    os.kill(processes.numbers[killed], signal.SIGKILL)
    ended = processes.end()
    assert ended[killed].code == -signal.SIGKILL
    for rank in others:
        (line,) = ended[rank].err.splitlines()
        assert ended[rank].code == EXIT_PEER_LOST
        assert f"process {killed} at {processes.addresses[killed]}" in line or "another process" in line
    assert started.iterations()[-1] < 44
    chief = train_on(server, 4 if count == 2 else 2, flags)[0]
    assert "Done: 45 iterations" in chief.out
    if count == 2:  # three processes have a different meta-batch size
        assert_same_ending(started.folder, single)


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGHUP)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(rank, number, server, flags, single, tmp_path):
    """Joining must not leave TensorFlow's SIGTERM handler in place."""
    flags = [*flags, f"--logdir={tmp_path}"]
    processes = server.start([flags] * 2)
    started = wait_for(tmp_path, 4)
    os.kill(processes.numbers[rank], number)
    ended = processes.end()
    assert [(process.code, process.err) for process in ended] == [(128 + number, "")] * 2
    stopped = re.search(rf"Stopped by {number.name} after iteration (\d+), saved in ", ended[0].out)
    assert int(stopped[1]) == started.iterations()[-1] < 44
    train_on(server, 1, flags)
    assert_same_ending(started.folder, single)


def test_a_test_on_two_processes_writes_the_same_files_as_on_one(server, flags, single, tmp_path):
    for count in (1, 2):
        test = "--train=False", "--test_set=True", "--test_tasks=13", f"--results_dir={tmp_path / str(count)}"
        train_on(server, count, [*flags, f"--logdir={single.parent}", *test])
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 3
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in set(names) - {"results.json"}:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (json.loads((tmp_path / count / "results.json").read_text())[0] for count in "12")
    assert two.pop("processes") == 2
    assert one == two


# -- mismatches and bad input ------------------------------------------------------------------------------------------


def assert_refused(ended: list[Ended], *words: str) -> None:
    """All processes exit with code 1, and only the chief reports why, in one line."""
    assert [process.code for process in ended] == [1] * len(ended)
    (line,) = ended[0].err.splitlines()
    assert line.startswith("main.py: ") and all(word in line for word in words), line
    assert [process.err for process in ended[1:]] == [""] * (len(ended) - 1)


def test_processes_with_different_flags_are_refused(server, flags, tmp_path):
    flags = [*flags, f"--logdir={tmp_path}"]
    processes = server.start([flags, [*flags, "--seed=1"]])
    assert_refused(processes.end(), f"process 1 at {processes.addresses[1]}", "flags")
    assert list(tmp_path.iterdir()) == []


def test_processes_with_different_data_are_refused(server, flags, omniglot, tmp_path):
    """In training and at test, on hosts with separate disks."""
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        shutil.copytree(omniglot, host / "data", symlinks=True, ignore=shutil.ignore_patterns(".cache"))
    min((tmp_path / "b" / "data").glob("*/*")).unlink()
    flags = [flag for flag in flags if not flag.startswith("--data_path")]
    flags += ["--data_path=data", f"--logdir={tmp_path / 'logs'}", "--num_classes=2"]
    assert_refused(server.start([flags] * 2, cwd=hosts).end(), "process 1", "data")
    assert not any(tmp_path.rglob("model*.index"))
    (process,) = server.start([[*flags, "--metatrain_iterations=1"]], cwd=hosts[:1]).end()
    assert process.code == 0
    flags += ["--metatrain_iterations=1", "--train=False", "--test_tasks=4"]
    assert_refused(server.start([flags] * 2, cwd=hosts).end(), "process 1", "data")


def test_processes_with_different_weights_are_refused(server, flags, single, tmp_path):
    """For example, hosts that do not share --logdir: only the chief's has the checkpoints."""
    hosts = [tmp_path / "a", tmp_path / "b"]
    shutil.copytree(single, hosts[0] / "logs" / single.name)
    hosts[1].mkdir()
    processes = server.start([[*flags, "--logdir=logs", "--metatrain_iterations=50"]] * 2, cwd=hosts)
    assert_refused(processes.end(), f"process 1 at {processes.addresses[1]}", "weights")


@pytest.mark.parametrize(
    ("count", "more", "named"),
    [
        (3, [], "--meta_batch_size=4"),
        (2, ["--tasks_at_once=4"], "--tasks_at_once=4"),
        (2, ["--datasource=sinusoid"], "--datasource=sinusoid"),
    ],
    ids=["uneven", "groups", "tiny network"],
)
def test_a_run_that_the_processes_cannot_share_is_refused(count, more, named, server, flags, tmp_path):
    assert_refused(server.start([[*flags, f"--logdir={tmp_path}", *more]] * count).end(), named)
    assert not any(tmp_path.rglob("model*"))


def test_an_error_in_one_process_ends_all(server, flags, tmp_path):
    """One host lacks the data. Its process reports that; the chief names the process."""
    (tmp_path / "data").symlink_to(next(flag for flag in flags if "data_path" in flag).partition("=")[2])
    (tmp_path / "empty").mkdir()
    flags = [*flags, "--data_path=data", f"--logdir={tmp_path / 'logs'}"]
    processes = server.start([flags] * 2, cwd=[tmp_path, tmp_path / "empty"])
    chief, other = processes.end()
    assert (chief.code, other.code) == (1, 1)
    (line,), (reason,) = chief.err.splitlines(), other.err.splitlines()
    assert f"process 1 at {processes.addresses[1]}" in line
    assert "data" in reason


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_the_wait_for_other_processes(rank, server, flags, tmp_path):
    processes = server.start([[*flags, f"--logdir={tmp_path}"]] * 2, present=[rank])
    printed, deadline = Path(f"{processes.files[0]}.out"), time.monotonic() + 60
    while not (printed.exists() and "waiting for" in printed.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # until TensorFlow waits
    os.kill(processes.numbers[0], signal.SIGINT)
    assert processes.end()[0].code == -signal.SIGINT


def test_a_port_in_use_is_refused(server, flags, tmp_path):
    with socket.create_server(("", 0)) as other:
        ports = [other.getsockname()[1], *free_ports(1)]
        processes = server.start([[*flags, f"--logdir={tmp_path}"]] * 2, present=[0], ports=ports)
        (ended,) = processes.end()
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert processes.addresses[0] in line


def test_unsaved_changes_in_an_editor_do_not_change_the_code_checksum(tmp_path, monkeypatch):
    """Meanwhile Emacs keeps a dangling symlink next to the file."""
    (tmp_path / "module.py").write_text("1")
    monkeypatch.setattr(main, "ROOT", tmp_path)
    before = main.identity()
    (tmp_path / ".#module.py").symlink_to("me@here.42")
    assert main.identity() == before


WORKERS = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        {"cluster": WORKERS},
        {"cluster": WORKERS, "task": {"type": "worker", "index": 2}},
        {"cluster": WORKERS, "task": {"type": "chief", "index": 0}},
        {"cluster": {**WORKERS, "ps": ["c:3"]}, "task": {"type": "worker", "index": 0}},
        {"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}},
    ],
    ids=["not JSON", "list", "no task", "missing index", "missing type", "parameter server", "duplicate"],
)
def test_an_invalid_tf_config_is_refused(config, monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    assert "TF_CONFIG" in refusal(f"--logdir={tmp_path}")


# -- the processes of the environment ---------------------------------------------------------------------------------


def test_a_chief_in_tf_config_is_process_0(monkeypatch):
    """Kubernetes' training operator writes such a TF_CONFIG."""
    jobs = {"chief": ["a:1"], "worker": ["b:1", "b:2"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": "worker", "index": 1}}))
    workers = cluster.of_environment()
    assert (workers.addresses, workers.rank, workers.chief, workers.place) == (("a:1", "b:1", "b:2"), 2, False, (1, 2))


def test_slurm_describes_the_processes(monkeypatch):
    slurm = {"PROCID": "3", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "n[1-2]", "STEP_TASKS_PER_NODE": "2(x2)"}
    for name, value in {**slurm, "JOB_ID": "70123"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    workers = cluster.of_environment()
    assert workers.addresses == ("n1:20123", "n1:20124", "n2:20123", "n2:20124")
    assert (workers.rank, workers.place) == (3, (1, 2))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[")
    with pytest.raises(InputError, match="SLURM"):
        cluster.of_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a single process
    assert cluster.of_environment().size == 1


def test_processes_of_a_host_share_its_cores_and_gpus(monkeypatch):
    seen = []
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["GPU 0", "GPU 1"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: seen.append((gpus, kind)))
    for name in ("inter", "intra"):  # TensorFlow allows setting them once
        monkeypatch.setattr(tf.config.threading, f"set_{name}_op_parallelism_threads", lambda number: None)
    workers = Cluster(("a:1", "b:1", "b:2"), 2)
    assert main.side_by_side(workers) == 4
    assert main.layout(workers)[:2] == (4, 1)
    monkeypatch.setattr(devices, "gpus", lambda: ["a model"])
    assert main.layout(workers)[:2] == (1, 0)  # one group at a time: two might not fit in memory
    devices.start(place=workers.place)
    assert seen == [(["GPU 1"], "GPU")]


# -- signals of one process -------------------------------------------------------------------------------------------


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_saves_the_run(tmp_path):
    """Printing to it fails, and SIGHUP may arrive twice."""
    program = "import sys, main, report; report.SINUSOID_PRINT_INTERVAL = 100; main.run(main.parse(sys.argv))"
    flags = "--norm=None", "--metatrain_iterations=1000000", "--save_interval=1000000", f"--logdir={tmp_path}"
    terminal, far_end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program, *flags], cwd=ROOT, stdout=far_end, stderr=far_end)
    os.close(far_end)
    printed = b""
    while b"Iteration 100:" not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    assert process.wait(300) == 128 + signal.SIGHUP
    assert len(runs.Run(only_run(tmp_path)).iterations()) == 1


# -- a GPU ------------------------------------------------------------------------------------------------------------


def test_tensor_float_32_is_off_by_default():
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_deterministic_is_recorded(server, flags, tmp_path):
    """Deterministic kernels round differently."""
    train_on(server, 1, [*flags, "--deterministic", "--metatrain_iterations=2", f"--logdir={tmp_path}"])
    (computed,) = json.loads((only_run(tmp_path) / "computed.json").read_text())
    assert computed["deterministic"] is True


def test_out_of_memory_names_the_flag_to_lower(monkeypatch, tmp_path):
    def run_out(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[9]\nmore")

    monkeypatch.setattr(train, "train", run_out)
    assert "--tasks_at_once" in refusal("--norm=None", f"--logdir={tmp_path}")


# -- launch.py --------------------------------------------------------------------------------------------------------


def launch(tmp_path: Path, program: str, *flags: str, meanwhile: Callable = lambda launcher: None, **more) -> Ended:
    """Run launch.py on a small program instead of main.py."""
    path = tmp_path / "program.py"
    path.write_text(
        f"import json, os, signal, sys, time\nrank = 0\nif 'TF_CONFIG' in os.environ:\n"
        f"    rank = json.loads(os.environ['TF_CONFIG'])['task']['index']\n{program}"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **more}
    command = [sys.executable, "launch.py", *flags, str(path), "--flag=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    meanwhile(launcher)
    out, err = launcher.communicate(timeout=120)
    return Ended(launcher.returncode, out, err)


def test_launch_gives_each_process_its_rank_flags_and_gpu(tmp_path):
    program = (
        "config = json.loads(os.environ['TF_CONFIG'])\n"
        "print(config['task'], len(config['cluster']['worker']), os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:])"
    )
    ended = launch(tmp_path, program, CUDA_VISIBLE_DEVICES="4,7")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()) == [
        f"[{rank}] {{'type': 'worker', 'index': {rank}}} 2 {gpu} ['--flag=1']" for rank, gpu in ((0, 4), (1, 7))
    ]


def test_launch_does_not_count_mig_partitions_as_gpus(tmp_path, monkeypatch):
    """nvidia-smi's output on a host whose first GPU is partitioned."""
    lines = "GPU 0: Model (UUID: GPU-1)", "  MIG 3g.40gb Device  0: (UUID: MIG-2)", "GPU 1: Model (UUID: GPU-3)"
    (tmp_path / "nvidia-smi").write_text("\n".join(["#!/bin/sh", "cat <<end", *lines, "end", ""]))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launcher.gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("flags", "gpus", "named"),
    [
        ([], "", "--processes"),
        (["--processes=0"], "0", "--processes"),
        (["--processes=2"], "0", "--processes=2"),
        (["--restarts=-1"], "0", "--restarts"),
    ],
    ids=["missing", "zero", "more than GPUs", "negative"],
)
def test_launch_refuses_numbers_out_of_range(flags, gpus, named, tmp_path):
    ended = launch(tmp_path, "", *flags, CUDA_VISIBLE_DEVICES=gpus)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert named in line


def when_ready(number: signal.Signals, group: bool = False) -> Callable:
    """Once both processes are ready, send a signal to the launcher, or to its group as a terminal does."""

    def send(launcher):
        assert {launcher.stdout.readline(), launcher.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        (os.killpg if group else os.kill)(launcher.pid, number)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_launch_forwards_a_signal_once_and_waits(number, tmp_path):
    program = (
        "def note(number, frame):\n    print('stopped by', number, flush=True)\n    time.sleep(0.5)\n"
        "    print('saved', flush=True)\n    sys.exit(128 + number)\n"
        "for number in (1, 2, 15): signal.signal(number, note)\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    ended = launch(tmp_path, program, "--processes=2", "--restarts=3", meanwhile=when_ready(number, group=True))
    assert (ended.code, ended.err) == (128 + number, "")
    expected = [f"[{rank}] {line}" for rank in (0, 1) for line in ("saved", f"stopped by {number:d}")]
    assert sorted(ended.out.splitlines()) == expected


def test_launch_does_not_restart_after_a_signal(tmp_path):
    """Even if the signal arrives before main.py handles signals."""
    program = "print('ready', flush=True)\ntime.sleep(60)"
    ended = launch(tmp_path, program, "--processes=2", "--restarts=3", meanwhile=when_ready(signal.SIGTERM))
    assert (ended.code, ended.err) == (128 + signal.SIGTERM, "")


def test_launch_kills_a_process_that_does_not_exit(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    program = "import json, os, sys, time\nif 'index\": 1' in os.environ['TF_CONFIG']: sys.exit(7)\ntime.sleep(60)"
    assert launcher.run_once([sys.executable, "-c", program], 2, [], []) == [7, -signal.SIGKILL]


def test_launch_restarts_all_processes_if_one_is_killed(tmp_path):
    assert launcher.EXIT_PEER_LOST == EXIT_PEER_LOST
    program = (
        f"os.makedirs({str(tmp_path / 'started')!r}, exist_ok=True)\n"
        f"count = len([name for name in os.listdir({str(tmp_path / 'started')!r}) if name[0] == str(rank)])\n"
        f"open(os.path.join({str(tmp_path / 'started')!r}, f'{{rank}}.{{count}}'), 'w').close()\n"
        "if rank == 1 and count < 2: os.kill(os.getpid(), 9)\n"
        f"if count < 2: time.sleep(1); sys.exit({EXIT_PEER_LOST})"
    )
    assert launch(tmp_path, program, "--processes=2", "--restarts=1").code == 128 + signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "started").iterdir()) == ["0.0", "0.1", "1.0", "1.1"]
    assert launch(tmp_path, program, "--processes=2", "--restarts=1").code == 0


def test_launch_ends_when_its_output_pipe_is_closed(tmp_path):
    """Like `launch.py ... | head`, with more output than a pipe holds."""

    def stop_reading(launcher):
        assert launcher.stdout.readline() == "[0] 0\n"
        launcher.stdout.close()

    ended = launch(tmp_path, "for i in range(9**5): print(i, flush=True)", "--processes=1", meanwhile=stop_reading)
    assert ended.code == 1
    assert [line for line in ended.err.splitlines() if not line.startswith("[0] ")] == []


@pytest.mark.parametrize(
    ("chief", "others"),
    [
        ("sys.exit(1)", "sys.exit(1)"),
        ("sys.exit(1)", f"time.sleep(1); sys.exit({EXIT_PEER_LOST})"),
        ("time.sleep(1); sys.exit(1)", f"sys.exit({EXIT_PEER_LOST})"),
    ],
    ids=["all", "chief first", "others first"],
)
def test_launch_does_not_restart_after_an_error(chief, others, tmp_path):
    program = f"if rank == 0: {chief}\nprint('started')\n{others}"
    ended = launch(tmp_path, program, "--processes=2", "--restarts=3")
    assert ended.code == 1
    assert ended.out.count("[1] started") == 1
