"""One run on several processes, one per device.

Each process sums gradients and losses over its share of a meta-batch. An all-reduce of TensorFlow's
MultiWorkerMirroredStrategy adds up these sums. Every process then takes the same step on its own copy of the weights,
so the copies stay equal. Process 0, the chief, is the only one that prints and writes. Stop requests, evaluation
results and checksums travel through the same all-reduce.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import numpy as np
import tensorflow as tf

from files import InputError, say

resolvers = tf.distribute.cluster_resolver
EXIT_PEER_LOST = 75  # exit code if another process died; the same command resumes (EX_TEMPFAIL of sysexits.h)
REASONS = ("SIGINT", "SIGTERM", "SIGHUP", "another process")  # of a stop request
PEER_LOST = tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError
REMEDIES = {  # by what differs between processes
    "flags": "give all processes the same flags, except for --threads",
    "code": "give all processes the same code, TensorFlow version and GPU model",
    "weights": "give all processes one --logdir on a shared disk, and the same kind of machine",
    "data": "give all processes the same images",
}


class Stop:
    """A request to stop training, which checks it after every step and between chunks of validation tasks.

    Signal handlers, other threads and notebooks may set it.
    """

    def __init__(self):
        self.reason: str | None = None  # such as "SIGTERM"; None: keep training


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """Request a stop at the first Ctrl-C, SIGTERM or SIGHUP. A second Ctrl-C or SIGTERM ends the program at once."""
    stop = Stop()

    def request(number, frame):
        stop.reason = stop.reason or signal.Signals(number).name
        for again in (signal.SIGINT, signal.SIGTERM):  # not SIGHUP, which a closed terminal may send twice
            signal.signal(again, before[again])
        _drop_lost_streams()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop_lost_streams():
    """Discard output to a closed terminal, so that printing cannot fail before the run is saved."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class Cluster:
    """One process's view of the processes of a run. Without arguments: a single process."""

    def __init__(
        self, addresses: Sequence[str] = ("",), rank: int = 0, resolver: resolvers.ClusterResolver | None = None
    ):
        """Initialize from the host:port of every process, the rank of this one, and TensorFlow's resolver of both."""
        self.addresses, self.rank, self._resolver = addresses, rank, resolver
        self._strategy, self._stop, self._agreed = None, Stop(), Stop()
        self._checks_left = 0  # calls of check_same that remain before the first step

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return len(self.addresses)

    @property
    def chief(self) -> bool:
        """Return whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        """Return this process's index among the processes of its host, and their number."""
        hosts = [address.rpartition(":")[0] for address in self.addresses]
        ranks = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        return ranks.index(self.rank), len(ranks)

    def share(self, tasks: int) -> int:
        """Return how many of a meta-batch's tasks each process computes. Raise InputError if not a whole number."""
        if tasks % self.size:
            raise InputError(
                f"--meta_batch_size={tasks}: must be a multiple of the number of processes ({self.size}); change either"
            )
        return tasks // self.size

    def join(self) -> None:
        """Wait for all processes to start. Call this before TensorFlow's first operation.

        Ctrl-C ends the wait. TensorFlow ignores SIGTERM while it waits, and gives up after an hour.
        Raise InputError if this process cannot join.
        """
        if self.size == 1:
            return
        others = [address for rank, address in enumerate(self.addresses) if rank != self.rank]
        say(f"Process {self.rank}: waiting for {len(others)} worker{'s'[: len(others) - 1]} at {', '.join(others)}")
        if not self.chief:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
        # Python's handlers would run only after the wait.
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=self._resolver)
        except PEER_LOST as error:
            self.lost(error)
        except (tf.errors.OpError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(
                f"{self.addresses[self.rank]}: process {self.rank} cannot start there ({error}); give it a free "
                "host:port of its host"
            ) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if strategy.num_replicas_in_sync != self.size:
            raise InputError(
                f"CUDA_VISIBLE_DEVICES: {self.size} processes see {strategy.num_replicas_in_sync} GPUs; start one "
                "process per GPU"
            )
        self._strategy, self._checks_left = strategy, 2
        self._request = tf.Variable(tf.zeros(len(REASONS), tf.float64), trainable=False)
        self._requests = tf.Variable(tf.zeros(len(REASONS), tf.float64), trainable=False)
        self._sum = tf.function(self.all_sum, autograph=False, input_signature=[tf.TensorSpec([None], tf.float64)])

    def all_sum(self, values: tf.Tensor) -> tf.Tensor:
        """Add up a float64 vector [n] over the processes, in a graph. Stop requests share this all-reduce."""

        def of_replica():
            return tf.distribute.get_replica_context().all_reduce("sum", tf.concat([values, self._request], 0))

        total = self._strategy.run(of_replica)
        self._requests.assign(tf.ensure_shape(total[-len(REASONS) :], [len(REASONS)]))
        return total[: -len(REASONS)]

    def together(self, function: Callable, *arguments: object) -> object:
        """Call a function in which every process calls all_sum once. This also exchanges their stop requests."""
        if self.size == 1:
            return function(*arguments)
        if reason := self._stop.reason:
            self._request.assign(np.eye(len(REASONS))[REASONS.index(reason) if reason in REASONS else -1])
        result = function(*arguments)
        if (requests := self._requests.numpy()).any() and not self._agreed.reason:
            self._agreed.reason = REASONS[int(requests.argmax())]
        return result

    def agreed(self, stop: Stop) -> Stop:
        """Share this process's stop request. Return one that is set in all processes after the same `together`."""
        if self.size == 1:
            return stop
        self._stop = stop
        return self._agreed

    def gathered(self, values: np.ndarray | tf.Tensor) -> np.ndarray:
        """Concatenate an array of each process, all of one shape, float32 or float64. -0.0 becomes 0.0."""
        values = np.asarray(values)
        if self.size == 1:
            return values
        rows = np.zeros((self.size, values.size))
        rows[self.rank] = values.ravel()
        return self._added(rows.ravel()).astype(values.dtype).reshape(self.size * len(values), *values.shape[1:])

    def _added(self, vector):
        return self.together(self._sum, tf.constant(vector, tf.float64)).numpy()

    def check_same(self, **checksums: int) -> None:
        """Compare two checksums, named as in REMEDIES, with those of the other processes. All processes must call it.

        If one differs or a process has failed, every process exits; only the chief reports why, as an InputError.
        """
        if self.size == 1:
            return
        self._checks_left = max(self._checks_left - 1, 0)  # --compare calls it three times
        failed, *columns = self.gathered(np.array([[0.0, *checksums.values()]])).T
        problems = [(failed, "failed before the first step; see its output")]
        for name, column in zip(checksums, columns, strict=True):
            problems.append((column != column[0], f"has different {name} from process 0; {REMEDIES[name]}"))
        for ranks, problem in problems:
            if ranks.any():
                self._checks_left, rank = 0, int(ranks.argmax())
                self.leave()
                if self.chief:
                    raise InputError(f"process {rank} at {self.addresses[rank]}: {problem}")
                sys.exit(1)

    def failed(self) -> None:
        """Report a failure to processes that wait in `check_same`. Exit if the chief failed too."""
        if self._checks_left:
            self._checks_left, chief_failed = 0, False
            with contextlib.suppress(tf.errors.OpError):  # another process has died
                chief_failed = self.gathered(np.array([[1.0, 0, 0]]))[0, 0]
                self.leave()
            if chief_failed and not self.chief:
                sys.exit(1)

    def leave(self) -> None:
        """Wait for all processes, so that none exits before the chief has written everything."""
        if self.size > 1:
            self._added(np.zeros(1))
            with contextlib.suppress(tf.errors.OpError):  # the others may need this process to receive the first sum
                self._added(np.zeros(1))

    def lost(self, error: tf.errors.OpError) -> NoReturn:
        """Exit with a one-line message if `error` comes from the death of another process; else raise it."""
        if self.size == 1 or not (isinstance(error, PEER_LOST) or "ollective" in str(error)):
            raise error
        match = re.search(r"/job:(\w+)/replica:0/task:(\d+)", str(error))
        address = self._resolver.cluster_spec().task_address(match[1], int(match[2])) if match else ""
        rank = self.addresses.index(address) if address in self.addresses else self.rank
        name = "another process" if rank == self.rank else f"process {rank} at {address}"
        say(
            f"main.py: {name}: has died, so process {self.rank} exits; run the same command in all processes to resume "
            "from the last checkpoint",
            sys.stderr,
        )
        sys.stdout.flush()
        os._exit(EXIT_PEER_LOST)  # a normal exit may wait for the dead process


def of_environment() -> Cluster:
    """Return the cluster that TF_CONFIG or SLURM's srun describes. Raise InputError if the description is invalid."""
    source = "TF_CONFIG"
    try:
        if os.environ.get("TF_CONFIG", "").strip():
            resolver = resolvers.TFConfigClusterResolver()
        elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            source = "SLURM_STEP_*"
            per_host = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
            resolver = resolvers.SlurmClusterResolver(
                port_base=20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000,
                gpus_per_node=max(map(int, per_host)),  # required even without GPUs; devices.start chooses the GPU
                gpus_per_task=1,
                auto_set_gpu=False,
            )
        else:
            return Cluster()
        jobs = resolver.cluster_spec().as_dict()
        addresses = (*jobs.get("chief", ()), *jobs.get("worker", ()))
        if set(jobs) - {"chief", "worker"} or len(set(addresses)) < len(addresses):
            raise ValueError("each process needs its own address, under chief or worker")
        return Cluster(addresses, addresses.index(jobs[resolver.task_type][resolver.task_id]), resolver)
    except Exception as error:  # the resolvers validate nothing
        raise InputError(
            f'{source}: is invalid ({error!r}); set TF_CONFIG to {{"cluster": {{"worker": '
            '["host:port", ...]}, "task": {"type": "worker", "index": 0}}, or unset it'
        ) from None
