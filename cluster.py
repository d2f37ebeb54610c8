"""Several processes that compute one run together, a process for each device: how they meet, add up, agree and end.

Each process computes the sums over its own share of a meta-batch. One all-reduce of TensorFlow's
MultiWorkerMirroredStrategy adds them up, and then every process takes the same step on weights of its own, so these
stay equal. Process 0 is the chief: it alone prints and writes. Whatever one process has to tell the others travels in
the same sums: a wish to stop, the numbers of an evaluation, an error.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from files import InputError, say

PATIENCE = 60  # seconds in which all processes must have started, and then again
FOLDER_PATIENCE = 10  # seconds in which a new file must be seen by all processes: disks on a network are slow
GONE = 75  # exit code where another process is gone: the same command may go on (EX_TEMPFAIL of sysexits.h)
PRESENT, ABSENT = b"y", b"n"  # the chief's answers
REASONS = ("SIGINT", "SIGTERM", "another process")  # for a stop


class Stop:
    """A request to stop training. Training checks it after every step, and every few tasks of a validation.

    A signal handler, another thread or a notebook may set it.
    """

    def __init__(self):
        self.reason: str | None = None  # such as "SIGTERM"; None: continue training


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM stop training after the current step. A second one ends the program at once."""
    stop = Stop()

    def note(number, frame):
        stop.reason = signal.Signals(number).name
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


class Cluster:
    """The processes of a run as one of them sees them. Without arguments: a process that is alone."""

    def __init__(self, addresses: tuple[str, ...] = ("",), rank: int = 0, strategy: Callable[[], Any] | None = None):
        """Joins nothing yet.

        Args: host:port of every process; the number of this one among them; strategy() makes their
        MultiWorkerMirroredStrategy.
        """
        self.addresses, self.rank, self._make_strategy = addresses, rank, strategy
        self._strategy, self._stop, self._agreed, self._awaited = None, Stop(), Stop(), True

    @property
    def size(self) -> int:
        """Counts the processes."""
        return len(self.addresses)

    @property
    def chief(self) -> bool:
        """Tells whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        """The number of this process among those of its host, and how many these are."""
        hosts = [address.rpartition(":")[0] for address in self.addresses]
        beside = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        return beside.index(self.rank), len(beside)

    def share(self, tasks: int) -> int:
        """How many of a meta-batch's tasks each process computes. Raises InputError where they cannot be shared."""
        if tasks % self.size:
            raise InputError(
                f"{self.size} processes cannot share --meta_batch_size={tasks} evenly: give a number of processes that "
                "divides it"
            )
        return tasks // self.size

    # -- meeting ------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Waits until all processes have started. It comes before TensorFlow's first operation.

        Raises InputError where that cannot be; where another process does not come, this one ends with a line.
        """
        if self.size == 1:
            return
        if not self.chief:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process
        self._meet()
        strategy = self._make_strategy()
        if strategy.num_replicas_in_sync != self.size:
            raise InputError(
                f"{self.size} processes see {strategy.num_replicas_in_sync} GPUs: start as many on a host as it "
                "has GPUs, or show a process its own with CUDA_VISIBLE_DEVICES"
            )
        self._strategy = strategy
        self._wish = tf.Variable(tf.zeros(len(REASONS), tf.float64), trainable=False)
        self._wishes = tf.Variable(tf.zeros(len(REASONS), tf.float64), trainable=False)
        self._sum = tf.function(self.all_sum, autograph=False, input_signature=[tf.TensorSpec([None], tf.float64)])
        self._added(np.zeros(1))

    def _meet(self):
        """Waits for the others without TensorFlow, which would wait for an hour and not be stopped meanwhile.

        Each listens where TensorFlow will, and calls the chief, which answers once all have called and can be called.
        """
        own, until = self.addresses[self.rank], time.monotonic() + PATIENCE
        try:
            listener = socket.create_server(("", int(own.rpartition(":")[2])), backlog=self.size)
        except OSError as error:
            raise InputError(
                f"process {self.rank} cannot listen on {own}, its address ({error.strerror}): is it started twice, or "
                "is the port another program's?"
            ) from None
        with listener:
            if self.chief:
                self._answer(listener, until)
            else:
                self._call(until)

    def _answer(self, listener, until):
        with contextlib.ExitStack() as stack:
            calls = {}
            while len(calls) < self.size - 1 and (left := until - time.monotonic()) > 0:
                listener.settimeout(left)
                with contextlib.suppress(OSError, ValueError):  # a stranger may call, and time may be up
                    call = stack.enter_context(listener.accept()[0])
                    call.settimeout(5)
                    rank = int(call.recv(20))
                    if 0 < rank < self.size:  # one of an earlier, larger run may call
                        calls[rank] = call
            absent = [rank for rank in range(1, self.size) if rank not in calls or not self._reached(rank)]
            for call in calls.values():
                with contextlib.suppress(OSError):
                    call.sendall(ABSENT if absent else PRESENT)
                    call.recv(1)  # they hang up first, so that the port is free at once
        if absent:
            listed = ", ".join(f"process {rank} at {self.addresses[rank]}" for rank in absent[:3])
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            self._leave(
                f"waited {PATIENCE} seconds for {listed}{more}, which did not come or cannot be reached: start all "
                "processes, on addresses that all of them can reach"
            )

    def _call(self, until):
        host, _, port = self.addresses[0].rpartition(":")
        while time.monotonic() < until:
            answer = b""
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host.strip("[]"), int(port)), timeout=5) as call,
            ):
                call.sendall(b"%d" % self.rank)
                call.settimeout(2 * PATIENCE)  # of the chief, which may have started later
                answer = call.recv(1)
            if answer == PRESENT:
                return
            if answer == ABSENT:
                os._exit(GONE)  # the chief says who
            time.sleep(0.2)
        self._leave(
            f"waited {PATIENCE} seconds for process 0 at {self.addresses[0]}, which did not come or cannot be reached "
            f"from process {self.rank}: start all processes, on addresses that all of them can reach"
        )

    def _reached(self, rank):
        host, _, port = self.addresses[rank].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            return False
        return True

    # -- adding up ----------------------------------------------------------------------------------------------------

    def all_sum(self, values: tf.Tensor) -> tf.Tensor:
        """Adds up a vector [n], float64, over the processes, in a graph. With it go the wishes of `together`."""

        def of_replica():
            return tf.distribute.get_replica_context().all_reduce("sum", tf.concat([values, self._wish], 0))

        total = self._strategy.run(of_replica)
        self._wishes.assign(tf.ensure_shape(total[-len(REASONS) :], [len(REASONS)]))
        return total[: -len(REASONS)]

    def together(self, function: Callable, *arguments: object) -> object:
        """Calls a function in which every process calls all_sum once. Then all know whether one wishes to stop."""
        if self.size == 1:
            return function(*arguments)
        if reason := self._stop.reason:
            self._wish.assign([float(reason == one) for one in REASONS[:-1]] + [float(reason not in REASONS[:-1])])
        result = function(*arguments)
        if (wishes := self._wishes.numpy()).any() and not self._agreed.reason:
            self._agreed.reason = REASONS[int(wishes.argmax())]
        return result

    def agreed(self, stop: Stop) -> Stop:
        """Makes a wish of this process one of all.

        Returns the stop that all processes agree on, each after the same call of `together`.
        """
        if self.size == 1:
            return stop
        self._stop = stop
        return self._agreed

    def gathered(self, values: np.ndarray | tf.Tensor) -> np.ndarray:
        """Puts the arrays of all processes, of one shape and float32 or float64, one after the other.

        It is exact, but that a -0 becomes 0.
        """
        values = np.asarray(values)
        if self.size == 1:
            return values
        rows = np.zeros((self.size, values.size))
        rows[self.rank] = values.ravel()
        return self._added(rows.ravel()).astype(values.dtype).reshape(self.size * len(values), *values.shape[1:])

    def _added(self, vector):
        return self.together(self._sum, tf.constant(vector, tf.float64)).numpy()

    def _told(self, text):
        """The text of every process."""
        data = text.encode()
        length = int(self.gathered(np.array([float(len(data))])).max())
        rows = self.gathered(np.frombuffer(data.ljust(length), np.uint8).astype(float)[None])
        return [row.astype(np.uint8).tobytes().decode().rstrip(" ") for row in rows]

    # -- agreeing -----------------------------------------------------------------------------------------------------

    def check_alike(self, values: Mapping[str, object], way_out: str) -> None:
        """Raises InputError, on the chief, where a value is another on another process. The others end."""
        if self.size == 1:
            return
        told = [json.loads(text) for text in self._told(json.dumps({key: str(one) for key, one in values.items()}))]
        for rank, theirs in enumerate(told):
            for key, value in told[0].items():
                if theirs.get(key) != value:
                    self._refuse(
                        f"{key} {theirs.get(key)} in process {rank} at {self.addresses[rank]}, {value} in process 0: "
                        f"{way_out}"
                    )

    def ready(self, folder: Path | None = None, error: InputError | None = None) -> None:
        """Waits until all processes are ready to begin.

        Args: a folder that all of them must share; why this one cannot begin.
        Raises InputError, on the chief, where one of them cannot. The others end.
        """
        if self.size == 1:
            return
        self._awaited = False
        token = f".token-{secrets.token_hex(8)}"
        told = [json.loads(text) for text in self._told(json.dumps([str(error or ""), token]))]
        for rank, (reason, _) in enumerate(told):
            if reason:
                self._refuse(reason if told[0][0] == reason else f"process {rank} at {self.addresses[rank]}: {reason}")
        if folder:
            self._check_shared(folder / told[0][1])

    def _check_shared(self, token):
        """Has the chief write a file, for which the others look."""
        try:
            if self.chief:
                token.touch()
            self._added(np.zeros(1))  # it is there
            until = time.monotonic() + FOLDER_PATIENCE
            while not (seen := token.exists()) and time.monotonic() < until:
                time.sleep(0.1)
            sees = self.gathered(np.array([float(seen)]))
        finally:
            if self.chief:
                token.unlink(missing_ok=True)
        if not sees.all():
            rank = int(sees.argmin())
            self._refuse(
                f"process {rank} at {self.addresses[rank]} does not see what process 0 writes to {token.parent}: "
                "give a --logdir on a disk that all processes share"
            )

    def _refuse(self, reason):
        """What all processes know is told once."""
        self._awaited = False
        self._part()
        if self.chief:
            raise InputError(reason)
        sys.exit(1)

    # -- ending -------------------------------------------------------------------------------------------------------

    def failed(self, error: InputError) -> InputError:
        """Tells the others of an error, where they wait for this process to be ready.

        Returns the error to print. A process that need not print it ends here.
        """
        if self._strategy and self._awaited:
            try:
                self.ready(error=error)
            except InputError as common:
                return common
            except tf.errors.OpError as gone:
                self.lost(gone)
        return error

    def leave(self) -> None:
        """Waits until all processes have done their work: none ends before what the chief writes is written."""
        if self.size > 1:
            self._added(np.zeros(1))
            self._part()

    def _part(self):
        """Waits, after a sum, until all processes have their result of it: it may come by way of this one.

        Where another process has ended already, it has seen that all have it.
        """
        with contextlib.suppress(tf.errors.OpError):
            self._added(np.zeros(1))

    def lost(self, error: tf.errors.OpError) -> NoReturn:
        """Ends this process, with a line, where an operation failed since another process is gone; else raises it."""
        aborted = isinstance(error, tf.errors.UnavailableError | tf.errors.AbortedError | tf.errors.CancelledError)
        if self.size == 1 or not (aborted or "ollective" in str(error)):
            raise error
        # The first task that it names is the cause, or else this one, which noticed it.
        found = re.search(r"/job:(\w+)/replica:0/task:(\d+)", str(error))
        gone = [self._rank_of(found[1], int(found[2]))] if found else []
        if gone in ([], [self.rank]):
            gone = [rank for rank in range(self.size) if rank != self.rank and not self._reached(rank)]
        listed = ", ".join(f"process {rank} at {self.addresses[rank]}" for rank in gone)
        self._leave(
            f"{listed or 'another process'} is gone, so process {self.rank} ends too. The same command, given for all "
            "processes, goes on from the last checkpoint."
        )

    def _rank_of(self, job, index):
        first = "chief" in self._strategy.cluster_resolver.cluster_spec().jobs and job == "worker"
        return index + first

    def _leave(self, line):
        """TensorFlow may wait for the others at a regular end."""
        say(f"main.py: {line}", sys.stderr)
        sys.stdout.flush()
        os._exit(GONE)


def of_environment() -> Cluster:
    """Reads from the environment which processes compute this run: TF_CONFIG, or what SLURM's srun sets.

    Raises InputError where it cannot be.
    """
    if os.environ.get("TF_CONFIG", "").strip():
        return _of_tf_config(os.environ["TF_CONFIG"])
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _of_slurm()
    return Cluster()


def _of_tf_config(text):
    form = 'as {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    try:
        found = json.loads(text)
        jobs, task = found["cluster"], found["task"]
        kind, index = str(task["type"]), int(task["index"])
        jobs = {job: list(addresses) for job, addresses in jobs.items() if addresses}
        ranked = [address for job in ("chief", "worker") for address in jobs.get(job, [])]
        for address in ranked:
            if not (re.fullmatch(r"\S+:[0-9]{1,5}", address) and int(address.rpartition(":")[2]) < 2**16):
                raise ValueError(f"{address} is no host:port")
    except json.JSONDecodeError as error:
        raise InputError(f"TF_CONFIG in the environment is no JSON ({error}): write it {form}, or unset it") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"TF_CONFIG in the environment is incomplete ({error!r}): write it {form}") from None
    if others := set(jobs) - {"chief", "worker"}:
        raise InputError(f"TF_CONFIG in the environment has {', '.join(sorted(others))}: give chief and worker alone")
    if kind not in jobs or not 0 <= index < len(jobs[kind]):
        known = ", ".join(f"{job} 0 to {len(addresses) - 1}" for job, addresses in jobs.items())
        raise InputError(
            f"TF_CONFIG in the environment says that this is {kind} {index}, but its cluster has {known}: mend one"
        )
    if len(set(ranked)) < len(ranked):
        raise InputError("TF_CONFIG in the environment has an address twice: give each process its own")
    return Cluster(tuple(ranked), ranked.index(jobs[kind][index]), tf.distribute.MultiWorkerMirroredStrategy)


def _of_slurm():
    try:
        per_host = max(
            int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
        )
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000,
            gpus_per_node=per_host,  # it needs numbers also where there is no GPU; devices.start chooses the GPU
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        addresses = tuple(resolver.cluster_spec().job_tasks("worker"))
        rank = resolver.get_task_info()[1]
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"SLURM's environment does not say which processes there are ({error!r}): start them with srun, or set "
            "TF_CONFIG"
        ) from None
    return Cluster(addresses, rank, lambda: tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver))
