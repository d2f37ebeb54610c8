"""The machine's cores, memory and GPUs, and TensorFlow's settings, which must be applied before it starts.

Programs import this module first: TensorFlow reads the environment when it is imported. This module imports TensorFlow
only in the functions that need it.
"""

import contextlib
import importlib.util
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# If one process of a run dies, TensorFlow logs many lines in each of the others. main.py prints one instead.
SEVERAL = os.environ.get("TF_CONFIG") or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if SEVERAL else "2")

# Jupyter sets a Matplotlib backend that may not be installed here. TensorFlow's import of Matplotlib would then fail.
_backend = re.match(r"module://(\w+)", os.environ.get("MPLBACKEND", ""))
if _backend and not importlib.util.find_spec(_backend[1]):
    del os.environ["MPLBACKEND"]

# TensorFlow imports Keras, which ends the program if it is set to a backend that is too old or not installed. Nothing
# here needs Keras except networks.from_keras, and that needs TensorFlow's.
if "keras" not in sys.modules:
    os.environ["KERAS_BACKEND"] = "tensorflow"  # wins over keras.json
if "TF_USE_LEGACY_KERAS" in os.environ and not importlib.util.find_spec("tf_keras"):
    del os.environ["TF_USE_LEGACY_KERAS"]

for _stream in (sys.stdout, sys.stderr):  # file names may have characters that the terminal cannot encode
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="backslashreplace")

VECTOR_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx512f", "avx2", "avx")  # best first


def _cgroup_limits(file: str, root: Path) -> Iterator[str]:
    """Yield the limits that cgroup v2 (Linux) sets for this process: those of its group and its parents."""
    with contextlib.suppress(OSError):
        group = root / "sys/fs/cgroup" / (root / "proc/self/cgroup").read_text().partition("0::/")[2].strip()
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError):
                yield (folder / file).read_text().strip()


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: its CPU affinity or, if lower, its container's limit, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for limit in _cgroup_limits("cpu.max", root):
        quota, period = limit.split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    return count


def memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: the machine's or, if lower, its container's limit."""
    if not hasattr(os, "sysconf"):
        return 2**63  # Windows
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(int(limit) for limit in _cgroup_limits("memory.max", root) if limit != "max")])


def processor() -> str:
    """Return the name of the processor model."""
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux, where `platform` knows only the architecture
        lines = [line for line in info.read_text(errors="replace").splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].partition(": ")[2]
    return platform.processor()


def instruction_set() -> str:
    """Return this processor's best vector instruction set among those that decide TensorFlow's kernels."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(errors="replace").split()) if info.exists() else set()
    return next((name for name in VECTOR_INSTRUCTIONS if name in flags), platform.machine())


def onednn() -> bool:
    """Return whether TensorFlow uses oneDNN: as TF_ENABLE_ONEDNN_OPTS says, or by default if there is VNNI."""
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "").lower()
    return setting in ("1", "true") if setting else instruction_set().endswith("_vnni")


def prefer_onednn(on: bool) -> None:
    """Turn oneDNN on or off if TensorFlow leaves it off on this processor and TF_ENABLE_ONEDNN_OPTS is not set.

    Call this before TensorFlow is imported; later it has no effect.
    """
    if "tensorflow" not in sys.modules and not instruction_set().endswith("_vnni"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1" if on else "0")


def gpus() -> list[str]:
    """Return the model names of the GPUs that TensorFlow uses."""
    import tensorflow as tf

    details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.get_visible_devices("GPU")]
    return [detail.get("device_name") for detail in details]


def computed() -> dict[str, object]:
    """Return everything that determines the rounding of this process's numbers, and so the bits of the weights."""
    import tensorflow as tf
    from tensorflow.python.framework.config import is_op_determinism_enabled

    settings = {
        "tensorflow": tf.__version__,
        "processor": processor(),
        "instructions": instruction_set(),
        "onednn": onednn(),
        "op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
    }
    if names := gpus():
        settings["gpus"] = names
        settings["tensor_float_32"] = tf.config.experimental.tensor_float_32_execution_enabled()
    if names or is_op_determinism_enabled():
        settings["deterministic"] = is_op_determinism_enabled()
    return settings


def start(
    parallel_tasks: int | None = None,
    op_threads: int = 1,
    *,
    tensor_float_32: bool = False,
    deterministic: bool = False,
    place: tuple[int, int] = (0, 1),
    join: Callable[[], None] = lambda: None,
) -> None:
    """Apply TensorFlow's settings, then start it. Call this before TensorFlow's first operation.

    Args:
        parallel_tasks: tasks computed in parallel, one per core; None: as many as there are cores.
        op_threads: cores per operation. It changes the rounding, and so the weights.
        tensor_float_32: allow TensorFloat-32 on GPUs, as TensorFlow does by default.
        deterministic: make a GPU compute the same bits every time. A CPU always does, but this changes its rounding.
        place: index of this process among those of its host, and their number. Each takes its own GPU.
        join: called once the settings are applied, to join the other processes of the run.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
    from tensorflow.python.eager import context

    tf.config.threading.set_intra_op_parallelism_threads(op_threads)
    tf.config.threading.set_inter_op_parallelism_threads(parallel_tasks or cores())
    tf.config.experimental.enable_tensor_float_32_execution(tensor_float_32)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    # If TensorFlow estimates that a graph needs over 200 MB, its memory optimizer adds three or more gradients of a
    # tensor in whatever order they are ready, so MiniImagenet's bits vary between runs. No public option prevents that.
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.memory_optimization = RewriterConfig.NO_MEM_OPT
    context.context()._config = config
    (index, processes), found = place, tf.config.list_physical_devices("GPU")
    if processes > 1 and len(found) > 1:  # every process sees all GPUs of the host
        tf.config.set_visible_devices(found[index : index + 1], "GPU")
    join()
    tf.config.list_logical_devices()
