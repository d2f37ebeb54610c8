"""Time steps of the training loop: drawing tasks, inner loops, meta-gradient, Adam.

    python benchmarks/step_time.py [--configs omniglot_5way ...] [--first_order] [--steps 30] [--json times.json]
    python benchmarks/step_time.py --configs omniglot_5way --flags="--meta_batch_size=64"

For each time the table also has:
  - the floating-point operations of the step's convolutions and matrix products, counted in the traced graph;
  - the time relative to the floor, which is what these operations take at the rate of NumPy's float32 matrix product
    in the same run;
  - the memory of the process after warm-up and at the end (both only on Linux), and its peak.

Images come from the prepared data folders, or are random if there are none. Each configuration runs in its own process.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # isort: skip  sets TensorFlow's environment before the import

import numpy as np

from files import user_path

try:
    import resource
except ImportError:  # Windows
    resource = None

CONFIGS = {  # the paper's commands
    "sinusoid_10shot": "--datasource=sinusoid --norm=None --update_batch_size=10",
    "omniglot_5way": "--datasource=omniglot --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4",
    "omniglot_20way": "--datasource=omniglot --meta_batch_size=16 --update_batch_size=1 --num_classes=20 "
    "--update_lr=0.1 --num_updates=5",
    "omniglot_fc": "--datasource=omniglot --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4 --conv=False",
    "miniimagenet_1shot": "--datasource=miniimagenet --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 "
    "--num_updates=5 --num_filters=32 --max_pool=True",
    "cifarfs_1shot": "--datasource=cifarfs --update_batch_size=1",
    "miniimagenet_5shot": "--datasource=miniimagenet --meta_batch_size=4 --update_batch_size=5 --update_lr=0.01 "
    "--num_updates=5 --num_filters=32 --max_pool=True",
}
MAXRSS_PER_MB = 2**20 if sys.platform == "darwin" else 2**10
PRODUCTS = {"Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul", "BatchMatMulV2", "BatchMatMulV3"}


def matmul_peak() -> float:
    """Return the FLOP/s of NumPy's 1024 x 1024 float32 product, the best of ten."""
    a = np.random.default_rng(0).random((1024, 1024), np.float32)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def product_flops(graph, tasks: int) -> int:
    """Count the FLOP of all products that a traced function's outputs need; a loop over tasks counts `tasks` times."""
    needed, queue = set(), [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    while queue:
        op = queue.pop()
        if op not in needed:
            needed.add(op)
            queue += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    total = 0
    for op in needed:
        if op.type in ("While", "StatelessWhile"):
            body = op.graph._get_function(op.get_attr("body").name)
            total += tasks * product_flops(body.graph, tasks)
        elif "Call" in op.type:
            total += product_flops(op.graph._get_function(op.get_attr("f").name).graph, tasks)
        elif op.type in PRODUCTS:
            total += 2 * _multiplications(op)
    return total


def _multiplications(op) -> int:
    """Count the multiplications of a product: its outputs times the length of the sum for each."""
    import tensorflow as tf

    if op.type.startswith("Conv2D"):
        images = op.outputs[0] if op.type == "Conv2D" else op.inputs[2]  # the smaller side of the stride
        filters = op.inputs[1].shape
        if op.type == "Conv2DBackpropFilter":
            filters = op.outputs[0].shape
        return math.prod(images.shape) * math.prod(filters[:3])
    transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    length = op.inputs[0].shape[-2 if transposed else -1]
    return math.prod(tf.TensorShape(op.outputs[0].shape)) * length


def resident_mb() -> float:
    """Return the current memory of this process in MiB, or NaN if the system does not report it."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if status.exists() else math.nan


def random_images(recipe, count: int = 100, per_class: int = 40):
    """Return tasks of random images, for a data set that is not prepared."""
    from data_generator import ImageTasks
    from images import Classes

    images = recipe.dataset.images
    pixels = np.random.default_rng(0).integers(0, 256, (count * per_class, *images.stored, images.channels), np.uint8)
    starts = np.arange(0, count * per_class, per_class)
    classes = Classes(
        [f"class{i}" for i in range(count)],
        starts,
        np.full(count, per_class),
        pixels,
        np.full(count * per_class, 4 / 3),
    )
    return ImageTasks(images, {"train": classes}, recipe.way, recipe.shot, recipe.query_examples(True))


def measure(name: str, flags: str, steps: int) -> dict:
    """Time a configuration in this process."""
    import main

    main.FLAGS(["main.py", *flags.split()])
    main.choose_kernels(main.FLAGS)
    import recipe as recipes
    import train
    from cluster import Stop
    from files import InputError
    from maml import MAML

    main.start_devices()
    recipe = main.recipe_of(main.FLAGS)
    source = "generated"
    try:
        data = main.open_data(main.trained_data_set(recipe), ("train",), recipe, training=True)
        source = "real" if recipe.dataset.images else "generated"
    except InputError:
        data = random_images(recipe)
    maml = recipes.build(recipe, main.layout())
    with train.Steps(maml, data, recipe, Stop()) as stepper:
        size, batch = stepper.block, recipe.meta_batch
        stepper.advance(2 * size)  # traces and warms up
        resident, times = resident_mb(), []
        for done in range(2 * size, (2 + steps) * size, size):
            start = time.perf_counter()
            stepper.advance(done + size)
            maml.step.numpy()
            times.append((time.perf_counter() - start) / size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MAXRSS_PER_MB if resource else math.nan
        memory = [resident, resident_mb(), peak]
        tasks = stepper.meta_batch(stepper.done)
    # Without inner_apply, which writes products as sums, so that they count as products.
    plain = maml.inner._replace(network=maml.inner.network._replace(inner_apply=None))
    graph = MAML(plain).train_step.get_concrete_function(tasks).graph
    flops, matmul = product_flops(graph, batch), matmul_peak()
    median, floor = float(np.median(times)), flops / matmul
    return {
        "configuration": name,
        "onednn": devices.onednn(),
        "images": source,
        "ms_per_step": 1e3 * median,
        "ms_5th_to_95th_percentile": [1e3 * float(np.percentile(times, q)) for q in (5, 95)],
        "steps_timed": len(times) * size,
        "gflop": flops / 1e9,
        "peak_gflop_per_s": matmul / 1e9,
        "floor_ms": 1e3 * floor,
        "times_floor": median / floor,
        "tasks_per_s": batch / median,
        "memory_mb_warm_end_peak": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--first_order", action="store_true", help="also time each with --stop_grad")
    parser.add_argument("--steps", type=int, default=30, help="timed steps; for the sinusoid, blocks of 100 (30)")
    parser.add_argument("--json", type=user_path, help="also write the table to this file")
    parser.add_argument("--flags", default="", help="additional flags of main.py for all configurations")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a child's name and flags
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.steps)))
        return
    rows = []
    print(f"{devices.instruction_set()}, {devices.cores()} cores, Python {platform.python_version()}")
    print(
        "configuration            oneDNN  ms/step (5..95 %)            GFLOP  peak GFLOP/s  x floor  tasks/s  "
        "MB warm, end, peak"
    )
    for name in args.configs:
        for suffix, more in (("", ""), (" first order", " --stop_grad"))[: 1 + args.first_order]:
            command = [sys.executable, __file__, "--steps", str(args.steps), "--one", name + suffix]
            child = subprocess.run(
                [*command, f"{CONFIGS[name]}{more} {args.flags}"], capture_output=True, text=True, cwd=ROOT
            )
            if child.returncode:
                sys.exit(child.stderr)
            row = json.loads(child.stdout.splitlines()[-1])
            rows.append(row)
            low, high = row["ms_5th_to_95th_percentile"]
            print(
                f"{row['configuration']:25} {'on' if row['onednn'] else 'off':5}"
                f" {row['ms_per_step']:8.3f} ({low:.3f}..{high:.3f})"
                f" {row['gflop']:8.2f} {row['peak_gflop_per_s']:8.0f} {row['times_floor']:8.2f}"
                f" {row['tasks_per_s']:9.0f}  " + " ".join(f"{mb:5.0f}" for mb in row["memory_mb_warm_end_peak"]),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
