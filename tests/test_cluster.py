"""Several processes: the same weights on every number of them, whatever ends one; bad input; launch.py."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tensorflow as tf

import cluster
import devices
import launch as launcher
import main
import runs
import train
from cluster import GONE, Cluster
from files import InputError
from tests.helpers import Ended, assert_same_ending, only_run, refusal, scalars, small_flags

ROOT = Path(main.__file__).parent
STEPS = "--metatrain_iterations=45"
OFTEN = """
import main, report, train
train.SUMMARY_INTERVAL = report.PRINT_INTERVAL = 20
train.VALIDATION_INTERVAL = 10
main.DATASETS["omniglot"] = main.DATASETS["omniglot"]._replace(curve_steps=1)
"""
# Imports TensorFlow once and forks the processes, each of which starts TensorFlow for itself.
SERVER = """
import json, os, sys, traceback
import cluster
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
    cluster.PATIENCE, cluster.FOLDER_PATIENCE = order["patience"], 1
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
    """Starts processes of main.py, each as one of a cluster."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", OFTEN + SERVER]
        self.folder, self.process = folder, subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def ask(self, **order: object) -> int:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self,
        flags: list[list[str]],
        cwd: list[Path] | None = None,
        present: list[int] | None = None,
        patience: int = 300,
    ) -> "Processes":
        """One process for each list of flags; or only for those that are `present`."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(len(flags))]
        numbers, files = [], []
        for index in range(len(flags)) if present is None else present:
            files.append(self.folder / f"{time.time_ns()}")
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            numbers.append(
                self.ask(
                    flags=flags[index],
                    patience=patience,
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
        return [Ended(code, *output) for code, output in zip(codes, outputs, strict=True)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("output"))
    with server.process:  # which closes its pipes, so that it ends
        yield server
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def flags(omniglot) -> list[str]:
    return [*small_flags(omniglot), "--meta_batch_size=4", "--save_interval=5", STEPS]


@pytest.fixture(scope="module")
def whole(server, flags, tmp_path_factory) -> Path:
    """The folder of a run in one process."""
    logdir = tmp_path_factory.mktemp("whole")
    (ended,) = server.start([[*flags, f"--logdir={logdir}"]]).end()
    assert (ended.code, ended.err) == (0, "")
    return only_run(logdir)


def train_on(server: Server, count: int, flags: list[str]) -> list[Ended]:
    """A run in so many processes, each with another number of threads, to a good end. The chief alone prints."""
    ended = server.start([[*flags, f"--threads={rank + 1}"] for rank in range(count)]).end()
    assert [(one.code, one.err) for one in ended] == [(0, "")] * count
    assert [bool(one.out) for one in ended] == [True] + [False] * (count - 1)
    return ended


def wait_for(logdir: Path, iteration: int) -> runs.Run:
    """Waits for a checkpoint."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for folder in logdir.glob("cls_*"):
            if (held := runs.Run(folder).iterations()) and held[-1] >= iteration:
                return runs.Run(folder)
        time.sleep(0.01)
    raise TimeoutError


# -- the same weights -------------------------------------------------------------------------------------------------


def test_two_processes_train_the_same_weights(server, flags, whole, tmp_path):
    """Bit for bit, with Adam's moments, what validation found and TensorBoard's events. Another test has four."""
    chief = train_on(server, 2, [*flags, f"--logdir={tmp_path}"])[0]
    folder = only_run(tmp_path)
    assert "Done: 45 iterations" in chief.out
    assert_same_ending(folder, whole)
    assert scalars(folder) == scalars(whole)
    assert sorted(path.name for path in folder.iterdir() if "tfevents" not in path.name) == sorted(
        path.name for path in whole.iterdir() if "tfevents" not in path.name
    )


@pytest.mark.parametrize(("killed", "others"), [(1, [0]), (0, [1, 2])], ids=["worker", "chief"])
def test_a_killed_process_ends_the_others_and_another_number_goes_on(killed, others, server, flags, whole, tmp_path):
    flags = [*flags, f"--logdir={tmp_path}"]
    count = len(others) + 1
    if count == 3:
        flags.append("--meta_batch_size=6")
    processes = server.start([flags] * count)
    held = wait_for(tmp_path, 4)
    os.kill(processes.numbers[killed], signal.SIGKILL)
    began = time.monotonic()
    ended = processes.end()
    assert time.monotonic() - began < 60
    assert ended[killed].code == -signal.SIGKILL
    for rank in others:
        (line,) = ended[rank].err.splitlines()
        assert ended[rank].code == GONE
        assert f"process {killed} at {processes.addresses[killed]} is gone, so process {rank} ends too." in line
    assert held.iterations()[-1] < 44
    chief = train_on(server, 4 if count == 2 else 2, flags)[0]
    assert "Done: 45 iterations" in chief.out
    if count == 2:  # the whole run has another meta-batch than the three
        assert_same_ending(held.folder, whole)


def test_a_stop_of_one_process_stops_all_after_the_same_step(server, flags, whole, tmp_path):
    flags = [*flags, f"--logdir={tmp_path}"]
    processes = server.start([flags] * 2)
    held = wait_for(tmp_path, 4)
    os.kill(processes.numbers[1], signal.SIGTERM)
    chief, other = processes.end()
    assert (chief.code, chief.err, other.code, other.err) == (128 + signal.SIGTERM, "", 128 + signal.SIGTERM, "")
    stopped = re.search(r"Stopped by SIGTERM after iteration (\d+), saved in ", chief.out)
    assert int(stopped[1]) == held.iterations()[-1] < 44
    train_on(server, 1, flags)
    assert_same_ending(held.folder, whole)


def test_a_test_is_shared_out(server, flags, whole, tmp_path):
    """Its files are those of one process."""
    for count in (1, 2):
        test = "--train=False", "--test_set=True", "--test_tasks=13", f"--results_dir={tmp_path / str(count)}"
        train_on(server, count, [*flags, f"--logdir={whole.parent}", *test])
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 3
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in set(names) - {"results.json"}:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (json.loads((tmp_path / count / "results.json").read_text())[0] for count in "12")
    assert two.pop("processes") == 2
    assert one == two


# -- bad input --------------------------------------------------------------------------------------------------------


def test_other_flags_in_one_process(server, flags, tmp_path):
    flags = [*flags, f"--logdir={tmp_path}"]
    processes = server.start([flags, [*flags, "--update_lr=0.1"]])
    assert_one_line(
        processes.end(), f"--update_lr 0.1 in process 1 at {processes.addresses[1]}, 0.4 in process 0: give all"
    )
    assert list(tmp_path.iterdir()) == []


def test_hosts_with_other_images(server, flags, omniglot, tmp_path):
    """Each has its data on a disk of its own."""
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        shutil.copytree(omniglot, host / "data", symlinks=True, ignore=shutil.ignore_patterns(".cache"))
    min((tmp_path / "b" / "data").glob("*/*")).unlink()
    flags = [flag for flag in flags if not flag.startswith("--data_path")]
    flags += ["--data_path=data", f"--logdir={tmp_path / 'logs'}", "--num_classes=2"]
    message = "in process 0: give all processes the same images"
    assert_one_line(server.start([flags] * 2, cwd=hosts).end(), message)
    assert not any(tmp_path.rglob("model*.index"))
    (alone,) = server.start([[*flags, "--metatrain_iterations=1"]], cwd=hosts[:1]).end()
    assert alone.code == 0
    flags += ["--metatrain_iterations=1", "--train=False", "--test_tasks=4"]
    assert_one_line(server.start([flags] * 2, cwd=hosts).end(), message)


def assert_one_line(ended: list[Ended], message: str) -> None:
    """All are refused, and the chief alone says why."""
    assert [one.code for one in ended] == [1] * len(ended)
    (line,) = "".join(one.err for one in ended).splitlines()
    assert line.startswith("main.py: ") and message in line, line
    assert ended[0].err


@pytest.mark.parametrize(
    ("count", "more", "message"),
    [
        (3, [], "--meta_batch_size=4"),
        (2, ["--tasks_at_once=4"], "--tasks_at_once=4"),
        (2, ["--datasource=sinusoid"], "--datasource=sinusoid"),
    ],
    ids=["uneven", "groups", "tiny network"],
)
def test_a_run_that_cannot_be_shared(count, more, message, server, flags, tmp_path):
    assert_one_line(server.start([[*flags, f"--logdir={tmp_path}", *more]] * count).end(), message)
    assert not any(tmp_path.rglob("model*"))


def test_a_folder_that_is_not_shared(server, flags, tmp_path):
    """The same --logdir, as each host sees it."""
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
    processes = server.start([[*flags, "--logdir=logs"]] * 2, cwd=hosts)
    assert_one_line(processes.end(), f"process 1 at {processes.addresses[1]} does not see what process 0 writes to")


def test_data_that_one_process_lacks(server, flags, tmp_path):
    (tmp_path / "data").symlink_to(next(flag for flag in flags if "data_path" in flag).partition("=")[2])
    (tmp_path / "empty").mkdir()
    flags = [*flags, "--datasource=omniglot", "--data_path=data", f"--logdir={tmp_path / 'logs'}"]
    processes = server.start([flags] * 2, cwd=[tmp_path, tmp_path / "empty"])
    assert_one_line(processes.end(), f"process 1 at {processes.addresses[1]}: ")


@pytest.mark.parametrize(("rank", "absent"), [(0, 1), (1, 0)])
def test_a_process_that_does_not_come(rank, absent, server, flags, tmp_path):
    processes = server.start([[*flags, f"--logdir={tmp_path}"]] * 2, present=[rank], patience=1)
    (ended,) = processes.end()
    assert ended.code == GONE
    (line,) = ended.err.splitlines()
    who = f"process {absent} at {processes.addresses[absent]}"
    assert f"waited 1 seconds for {who}, which did not come or cannot be reached" in line


WORKERS = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "TF_CONFIG in the environment is no JSON"),
        ("[]", "TF_CONFIG in the environment is incomplete"),
        ({"cluster": WORKERS}, "TF_CONFIG in the environment is incomplete (KeyError('task')): write it as "),
        ({"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}, "a is no host:port"),
        ({"cluster": {"worker": ["a:70000"]}, "task": {"type": "worker", "index": 0}}, "a:70000 is no host:port"),
        (
            {"cluster": WORKERS, "task": {"type": "worker", "index": 2}},
            "says that this is worker 2, but its cluster has",
        ),
        ({"cluster": WORKERS, "task": {"type": "chief", "index": 0}}, "says that this is chief 0, but its cluster has"),
        ({"cluster": WORKERS, "task": {"type": ["worker"], "index": 0}}, "says that this is ['worker'] 0, but its"),
        (
            {"cluster": {**WORKERS, "ps": ["c:3"]}, "task": {"type": "worker", "index": 0}},
            "give chief and worker alone",
        ),
        ({"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}, "has an address twice"),
    ],
)
def test_a_wrong_tf_config(config, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    assert message in refusal(f"--logdir={tmp_path}")


def test_an_address_that_another_program_has(monkeypatch):
    with socket.create_server(("", 0)) as other:
        workers = Cluster((f"127.0.0.1:{other.getsockname()[1]}", "127.0.0.1:1"), 0)
        with pytest.raises(InputError, match=r"process 0 cannot listen on 127\.0\.0\.1:.* is it started twice"):
            workers.join()


def test_a_process_of_another_run_calls(monkeypatch):
    """A larger one, at the same addresses. The chief waits for its own process all the same, and answers that."""
    ports = free_ports(2)
    chief = Cluster(tuple(f"127.0.0.1:{port}" for port in ports), 0, lambda: SimpleNamespace(num_replicas_in_sync=0))

    def leave(code):
        raise SystemExit(code)

    def call(rank):
        connection = socket.create_connection(("127.0.0.1", ports[0]), timeout=5)
        connection.sendall(b"%d" % rank)
        return connection

    def others():
        with call(7), socket.create_server(("127.0.0.1", ports[1])):
            time.sleep(0.1)
            with call(1) as own:
                return own.recv(1)

    monkeypatch.setattr(os, "_exit", leave)
    create_server = socket.create_server
    with ThreadPoolExecutor(1) as pool:
        answers = []

        def listen(*arguments, **options):
            listener = create_server(*arguments, **options)
            monkeypatch.setattr(socket, "create_server", create_server)
            answers.append(pool.submit(others))
            return listener

        monkeypatch.setattr(socket, "create_server", listen)
        with pytest.raises(InputError, match="2 processes see 0 GPUs"):  # it has met them
            chief.join()
        assert answers[0].result() == b"y"


# -- which processes there are ----------------------------------------------------------------------------------------


def test_a_chief_and_workers(monkeypatch):
    """As Kubernetes' training operator names them: the chief is process 0."""
    jobs = {"chief": ["a:1"], "worker": ["b:1", "b:2"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": "worker", "index": 1}}))
    found = cluster.of_environment()
    assert (found.addresses, found.rank, found.chief, found.place) == (("a:1", "b:1", "b:2"), 2, False, (1, 2))


def test_the_processes_of_slurm(monkeypatch):
    slurm = {"PROCID": "3", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "n[1-2]", "STEP_TASKS_PER_NODE": "2(x2)"}
    for name, value in {**slurm, "JOB_ID": "70123"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = cluster.of_environment()
    assert (found.addresses, found.rank, found.place) == (("n1:20123", "n1:20124", "n2:20123", "n2:20124"), 3, (1, 2))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[")
    with pytest.raises(InputError, match="SLURM's environment does not say which processes there are"):
        cluster.of_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one process, not several
    assert cluster.of_environment().size == 1


def test_processes_of_a_host_share_its_cores_and_gpus(monkeypatch):
    seen = []
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["GPU 0", "GPU 1"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: seen.append((gpus, kind)))
    for name in ("inter", "intra"):  # which TensorFlow takes once
        monkeypatch.setattr(tf.config.threading, f"set_{name}_op_parallelism_threads", lambda number: None)
    workers = Cluster(("a:1", "b:1", "b:2"), 2)
    assert main.side_by_side(workers) == 4
    assert main.layout(workers)[:2] == (4, 1)
    monkeypatch.setattr(devices, "gpus", lambda: ["a kind"])
    assert main.layout(workers)[:2] == (1, 0)  # one group at a time: a second one may not find memory
    devices.start(place=workers.place)
    assert seen == [(["GPU 1"], "GPU")]


# -- a GPU ------------------------------------------------------------------------------------------------------------


def test_tensor_float_32_is_off():
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_determinism_can_be_asked_for(server, flags, tmp_path):
    """It is recorded, since its kernels have roundings of their own."""
    train_on(server, 1, [*flags, "--deterministic", "--metatrain_iterations=2", f"--logdir={tmp_path}"])
    (computed,) = json.loads((only_run(tmp_path) / "computed.json").read_text())
    assert computed["deterministic"] is True


def test_memory_that_runs_out(monkeypatch, tmp_path):
    def run_out(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[9]\nmore")

    monkeypatch.setattr(train, "train", run_out)
    line = refusal("--norm=None", f"--logdir={tmp_path}")
    assert "OOM when allocating tensor with shape[9]" in line and "--tasks_at_once" in line


# -- launch.py --------------------------------------------------------------------------------------------------------


def launch(tmp_path: Path, program: str, *flags: str, meanwhile: Callable = lambda launcher: None, **more) -> Ended:
    """Runs launch.py on a program that is not main.py, so that it costs little."""
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


def test_launch_starts_a_cluster(tmp_path):
    """Each process finds its place, the flags, and a GPU of its own."""
    program = (
        "config = json.loads(os.environ['TF_CONFIG'])\n"
        "print(config['task'], len(config['cluster']['worker']), os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:])"
    )
    ended = launch(tmp_path, program, CUDA_VISIBLE_DEVICES="4,7")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()) == [
        f"[{rank}] {{'type': 'worker', 'index': {rank}}} 2 {gpu} ['--flag=1']" for rank, gpu in ((0, 4), (1, 7))
    ]


def test_launch_finds_the_gpus_among_their_parts(tmp_path, monkeypatch):
    """As nvidia-smi lists a host whose first GPU is divided (MIG)."""
    lines = "GPU 0: A kind (UUID: GPU-1)", "  MIG 3g.40gb Device  0: (UUID: MIG-2)", "GPU 1: A kind (UUID: GPU-3)"
    (tmp_path / "nvidia-smi").write_text("\n".join(["#!/bin/sh", "cat <<end", *lines, "end", ""]))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launcher.gpus() == ["0", "1"]


def test_launch_needs_a_number_without_a_gpu(tmp_path):
    ended = launch(tmp_path, "")
    assert (ended.code, ended.err) == (
        1,
        "launch.py: no GPU is found here: say how many processes with --processes=N\n",
    )
    refused = (1, "launch.py: --processes must be 1 or more, and --restarts 0 or more\n")
    for wrong in ("--processes=0", "--restarts=-1"):
        ended = launch(tmp_path, "", wrong, CUDA_VISIBLE_DEVICES="0")
        assert (ended.code, ended.err) == refused
    ended = launch(tmp_path, "", "--processes=2", CUDA_VISIBLE_DEVICES="0")
    assert (ended.code, ended.err) == (
        1,
        "launch.py: --processes=2, but here are 1 GPUs: give each process its own\n",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launch_hands_a_stop_on(number, tmp_path):
    """Once, to each, and waits for them. A terminal's Ctrl-C goes to all processes of a group."""
    program = (
        "def note(number, frame):\n    print('stopped by', number, flush=True)\n    time.sleep(0.5)\n"
        "    print('saved', flush=True)\n    sys.exit(128 + number)\n"
        "for number in (2, 15): signal.signal(number, note)\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )

    def stop(launcher):
        assert {launcher.stdout.readline(), launcher.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        os.killpg(launcher.pid, number)

    ended = launch(tmp_path, program, "--processes=2", "--restarts=3", meanwhile=stop)
    assert (ended.code, ended.err) == (128 + number, "")
    expected = [f"[{rank}] {said}" for rank in (0, 1) for said in ("saved", f"stopped by {number:d}")]
    assert sorted(ended.out.splitlines()) == expected


def test_launch_does_not_start_again_what_a_stop_ended(tmp_path):
    """Before main.py could take the signal."""

    def stop(launcher):
        assert {launcher.stdout.readline(), launcher.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(signal.SIGTERM)

    program = "print('ready', flush=True)\ntime.sleep(60)"
    ended = launch(tmp_path, program, "--processes=2", "--restarts=3", meanwhile=stop)
    assert (ended.code, ended.err) == (128 + signal.SIGTERM, "")


def test_launch_ends_a_process_that_does_not_end(monkeypatch, capfd):
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    program = "import json, os, sys, time\nif 'index\": 1' in os.environ['TF_CONFIG']: sys.exit(7)\ntime.sleep(60)"
    assert launcher.run_once([sys.executable, "-c", program], 2, [], []) == [7, -signal.SIGKILL]
    assert capfd.readouterr().err == "launch.py: process 1 ended with code 7, and the others end\n"


def test_launch_starts_again(tmp_path):
    """Where a process is killed the others end; all start again, so often as is said."""
    assert launcher.GONE == GONE
    program = (
        f"os.makedirs({str(tmp_path / 'started')!r}, exist_ok=True)\n"
        f"count = len([name for name in os.listdir({str(tmp_path / 'started')!r}) if name[0] == str(rank)])\n"
        f"open(os.path.join({str(tmp_path / 'started')!r}, f'{{rank}}.{{count}}'), 'w').close()\n"
        "if rank == 1 and count < 2: os.kill(os.getpid(), 9)\n"
        f"if count < 2: time.sleep(1); sys.exit({GONE})"
    )
    ended = launch(tmp_path, program, "--processes=2", "--restarts=1")
    assert ended.code == 128 + signal.SIGKILL
    assert ended.err.splitlines() == [
        "launch.py: process 1 was ended by SIGKILL, and the others end",
        "launch.py: starting again, 1 of 1 times",
        "launch.py: process 1 was ended by SIGKILL, and the others end",
    ]
    assert launch(tmp_path, program, "--processes=2", "--restarts=1").code == 0


def test_launch_does_not_wait_where_nobody_reads(tmp_path):
    """Behind `launch.py ... | head`: more than a pipe holds."""

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
        ("sys.exit(1)", f"time.sleep(1); sys.exit({GONE})"),
        ("time.sleep(1); sys.exit(1)", f"sys.exit({GONE})"),
    ],
)
def test_launch_does_not_repeat_what_is_refused(chief, others, tmp_path):
    """By all processes, or by the chief, which alone meets a full disk. The others may end before it."""
    program = f"if rank == 0: {chief}\n{others}"
    ended = launch(tmp_path, program, "--processes=2", "--restarts=3")
    assert ended.code == 1
    assert "starting again" not in ended.err
