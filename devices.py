"""How programs start here: whatever their surroundings, without TensorFlow's notices, with a task on each core.

Programs import this module before all others, since TensorFlow reads its settings once, when it is imported.
"""

import contextlib
import importlib.util
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Of several processes that compute one run, one may be gone: TensorFlow tells it in many lines, main.py in one.
SEVERAL = os.environ.get("TF_CONFIG") or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if SEVERAL else "2")

# What TensorFlow's libraries write to stderr at their start, before that level is read, and without a GPU.
NOTICES = "WARNING: All log messages before absl|[IW]0000 |E0000 .*failed call to cuInit"
# A program that prints all that it reads, but the lines that begin as its argument says.
FILTER = """
import re, sys
for line in sys.stdin.buffer:
    if not re.match(sys.argv[1].encode(), line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""

VECTOR_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx512f", "avx2", "avx")  # best first


def _make_ready() -> None:
    """Makes the program independent of what the process was started with.

    Where stdin, stdout or stderr is closed, the next file that is opened takes its number, and what C++ code writes to
    stderr would land in that file. Names may have letters that stdout or stderr has no code for. And Jupyter has the
    processes that it starts use a backend of matplotlib that may not be installed; TensorFlow imports matplotlib.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    kind, _, backend = os.environ.get("MPLBACKEND", "").partition("module://")
    if not kind and backend:
        try:
            found = importlib.util.find_spec(backend)
        except (ImportError, ValueError):
            found = None
        if not found:
            del os.environ["MPLBACKEND"]


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Lets a process read what C++ code writes to stderr, and print all but the notices.

    It outlives this one where TensorFlow aborts, and says why. It needs no disk, which may be full.
    """
    command = [sys.executable, "-I", "-S", "-c", FILTER, NOTICES]
    reader = None
    with contextlib.suppress(OSError, TypeError):  # Python may not know where it is
        # In a session of its own: a terminal's Ctrl-C is not for it.
        reader = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    if reader is None:  # the start is only louder
        yield
        return
    stderr = os.dup(2)
    os.dup2(reader.stdin.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        reader.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # others may hold the pipe, if they were started meanwhile
            reader.wait(10)


_make_ready()
with _without_notices():
    import tensorflow as tf
    from tensorflow.python.framework.config import is_op_determinism_enabled

    tf.config.list_physical_devices()


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Lists the folders of the control groups (cgroups(7), Linux alone) that this process is in, for one controller.

    A group's limit holds for all groups in it, so their folders come, too; many have no file of a limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            folder = root / "sys/fs/cgroup" / group.lstrip("/")
        elif controller in controllers.split(","):  # version 1
            folder = root / "sys/fs/cgroup" / controller / group.lstrip("/")
        else:
            continue
        yield from (folder, *folder.parents)


def cores(root: Path = Path("/")) -> int:
    """Counts the processor cores that this process may use.

    They are the machine's, or fewer where a container or a batch system allows fewer, or a share of their time,
    rounded up.
    root: where the system's own files lie.
    """
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for group in _control_groups("cpu", root):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
            with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit, and so does -1
                quota, period = map(int, " ".join((group / file).read_text() for file in files).split())
                if quota > 0:
                    most = min(most, math.ceil(quota / period))
    return most


MOST_THREADS = max(64, 16 * cores())  # the most that a flag can ask for


def memory(root: Path = Path("/")) -> int:
    """Counts the bytes of memory that this process may use.

    It is the machine's, or less where a container or a batch system such as Slurm sets a limit.
    root: where the system's own files lie.
    """
    if not hasattr(os, "sysconf"):
        return 2**63  # Windows does not say it here
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _control_groups("memory", root):
        for file in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1
            with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
                limits.append(int((group / file).read_text()))
    return min(limits)


def processor() -> str:
    """Names the kind of processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux, where platform knows no more than the architecture
        lines = [line for line in info.read_text(errors="replace").splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].partition(": ")[2]
    return platform.processor()


def instruction_set() -> str:
    """Return the newest vector instructions of this processor that choose TensorFlow's kernels, such as avx512_vnni."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(errors="replace").split()) if info.exists() else set()
    return next((name for name in VECTOR_INSTRUCTIONS if name in flags), platform.machine())


def onednn() -> bool:
    """Tell whether TensorFlow computes with oneDNN: as its variable says, or by default on processors with VNNI."""
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "").lower()
    return setting in ("1", "true") if setting else instruction_set().endswith("_vnni")


def gpus() -> list[str]:
    """Names the kinds of the GPUs that TensorFlow uses."""
    details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.get_visible_devices("GPU")]
    return [one.get("device_name") for one in details]


def computed() -> dict[str, object]:
    """Says how numbers are computed by this process. Another way gives other roundings, so other weights."""
    found = {
        "tensorflow": tf.__version__,
        "processor": processor(),
        "op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
    }
    if names := gpus():
        found["gpus"] = names
        found["tensor_float_32"] = tf.config.experimental.tensor_float_32_execution_enabled()
    if names or is_op_determinism_enabled():
        found["deterministic"] = is_op_determinism_enabled()
    return found


def _take_gpu(number, processes):
    """Where several processes of one host see all its GPUs, each takes its own."""
    gpus = tf.config.list_physical_devices("GPU")
    if processes > 1 and len(gpus) > 1:
        tf.config.set_visible_devices(gpus[number : number + 1], "GPU")


def start(
    parallel_tasks: int | None = None,
    op_threads: int = 1,
    *,
    tensor_float_32: bool = False,
    deterministic: bool = False,
    place: tuple[int, int] = (0, 1),
    join: Callable[[], None] = lambda: None,
) -> None:
    """Makes TensorFlow's settings, which it takes once, before its first operation, and lets it find its devices.

    Args:
        parallel_tasks: tasks that are computed side by side, one a core; None: as many as there are cores.
        op_threads: cores for one operation of a task. Another number gives other roundings, so other weights.
        tensor_float_32: let products on a GPU round their inputs to 10 bits. TensorFlow's own default is to do it.
        deterministic: let a GPU compute the same numbers every time. A CPU does, but this changes its roundings too.
        place: the number of this process among those of its host, and how many there are; each has a GPU of its own.
        join: meets the other processes of the run, between the settings and the first operation.
    """
    tf.config.threading.set_intra_op_parallelism_threads(op_threads)
    tf.config.threading.set_inter_op_parallelism_threads(parallel_tasks or cores())
    tf.config.experimental.enable_tensor_float_32_execution(tensor_float_32)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    _take_gpu(*place)
    join()
    with _without_notices():
        tf.config.list_logical_devices()
        tf.function(lambda: tf.zeros([]), jit_compile=True, autograph=False)()  # XLA looks for a GPU of its own
