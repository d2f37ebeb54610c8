"""Time our compiled meta-gradient against PyTorch and JAX on a GPU, which does not need TensorFlow.

    python benchmarks/gpu.py export FOLDER [--configs omniglot_5way ...] [--tasks 64] [--platform cpu]
    python benchmarks/gpu.py run FOLDER [--json gpu.json]

`export` needs TensorFlow and JAX, but no GPU. For each configuration it writes the meta-gradient of a meta-batch, all
tasks in one group, as a JAX program, once per form of a group's convolution (networks.py). It also writes the initial
weights and reference losses and meta-gradients in float64.

`run` needs JAX and NumPy, and PyTorch to time it. It first compares our programs with the reference, task by task, and
the first two losses and the first meta-gradient of the other forms in float64 (forms.py). Then it times all forms in
turns: the meta-gradient of a meta-batch and an Adam step, with the tasks in GPU memory. TFLOP/s count the convolutions
and matrix products of one task at a time, without a form's extra work. The peak is what JAX's product of two
8192 x 8192 float32 matrices reaches in the same run. TensorFloat-32 is off everywhere.

It has not run on a GPU yet (2026-11-21). Both commands ran on a CPU, with --platform=cpu and few tasks.
"""

import argparse
import functools
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from forms import BETA1, Problem, check, jax_form, torch_func, torch_loop

from files import user_path

CONFIGS = ("omniglot_5way", "omniglot_20way", "miniimagenet_1shot", "miniimagenet_5shot")
FORMS = {"sliced": "ours, slices and matrix products", "grouped": "ours, grouped convolutions"}
PEERS = {
    "jax_vmap": ("JAX, jit and vmap", jax_form, {"over_tasks": "vmap"}),
    "torch_func": ("PyTorch, torch.func vmap", torch_func, {}),
    "torch_loop": ("PyTorch, loop over tasks", torch_loop, {}),
}
COMPARED = 4  # tasks whose meta-gradients are compared with float64
ROUNDS, STEPS, SECONDS = 5, 10, 2.0  # turns; timed steps in each; seconds after which a turn ends early


# With TensorFlow


def export(folder: Path, configs: list[str], tasks: int | None, target: str, forms: list[str]) -> None:
    """Write <configuration>.npz and <configuration>.<form>.jaxexport to the folder."""
    from peers import built, reference, task_gradients
    from step_time import CONFIGS as FLAGS
    from step_time import product_flops

    folder.mkdir(parents=True, exist_ok=True)
    for name in configs:
        more = f" --meta_batch_size={tasks}" if tasks else ""
        maml, problem = built(FLAGS[name] + more)
        each = task_gradients(
            maml,
            {key: value.numpy().astype(float) for key, value in maml.weights.items()},
            [part[:COMPARED] for part in problem.in_float64().batches[0]],
        )
        losses, gradient = reference(maml, problem)
        header = problem._replace(weights=None, batches=None)._asdict() | {
            "shapes": [part.shape for part in problem.batches[0]],
            "flop": product_flops(maml.train_step.get_concrete_function(specs(problem)).graph, tasks_of(problem)),
            "losses": losses,
        }
        arrays = {f"weights/{key}": value for key, value in problem.weights.items()}
        arrays |= {f"task_gradient/{key}": np.stack([task[key] for task, _ in each]) for key in problem.weights}
        np.savez_compressed(
            folder / f"{name}.npz",
            header=np.array(json.dumps(header)),
            task_losses=np.array([loss for _, loss in each]),
            gradient=gradient,
            **arrays,
        )
        for form in forms:
            path = folder / f"{name}.{form}.jaxexport"
            path.write_bytes(compiled(maml, problem, form, target))
            print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


def tasks_of(problem: Problem) -> int:
    return len(problem.batches[0][0])


def specs(problem: Problem):
    import tensorflow as tf

    from utils import Tasks

    return Tasks(*(tf.TensorSpec(part.shape, part.dtype) for part in problem.batches[0]))


def compiled(maml, problem: Problem, form: str, target: str) -> bytes:
    """Return the program (weights, support_x, support_y, query_x, query_y) -> (loss, meta-gradient), for JAX."""
    import jax
    import tensorflow as tf
    from jax.experimental import jax2tf

    import networks
    from maml import meta_gradient, query_loss
    from utils import Tasks

    def gradient_and_loss(weights, *tasks):
        theta = {name: tf.constant(value) for name, value in fixed.items()} | weights
        layout = maml.layout._replace(group=0)
        gradient, loss = meta_gradient(functools.partial(query_loss, maml.inner), theta, Tasks(*tasks), layout)
        return loss, {name: gradient[name] for name in weights}

    tf.config.experimental.enable_tensor_float_32_execution(False)
    fixed = {name: w.numpy() for name, w in maml.weights.items() if name not in problem.weights}
    networks.GROUPED_CONV = form == "grouped"
    try:
        call = jax2tf.call_tf(gradient_and_loss, has_side_effects=False)  # the default cannot be deserialized
        arguments = problem.weights, *problem.batches[0]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        return jax.export.export(jax.jit(call), platforms=[target])(*shapes).serialize()
    finally:
        networks.GROUPED_CONV = False


# Without TensorFlow


def run(folder: Path, peers: list[str], json_path: Path | None) -> None:
    """Compare, time and print each form of each configuration in the folder."""
    import jax

    device = jax.devices()[0].device_kind
    peak = matmul_peak()
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "peak_tflop_per_s": peak / 1e12,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(f"{machine['date']}, {device}, JAX {jax.__version__}; float32 matrix product: {peak / 1e12:.1f} TFLOP/s")
    print(f"{'configuration':19} {'form':35} {'ms/step':>9} {'tasks/s':>9} {'TFLOP/s':>8} {'of peak':>8}  agreement")
    rows = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            rows += configuration(path, dict(arrays), peers, peak)
    if not rows:
        sys.exit(f"{folder}: has no programs; run `gpu.py export {folder}` on a machine with TensorFlow")
    if json_path:
        json_path.write_text(json.dumps(machine | {"rows": rows}, indent=1))


def configuration(path: Path, arrays: dict, peers: list[str], peak: float) -> list[dict]:
    """Return the rows of one configuration."""
    problem, header = problem_of(arrays)
    expected = header["losses"], arrays["gradient"]
    forms, steps = {}, {}
    for form, words in FORMS.items():
        program = path.with_name(f"{path.stem}.{form}.jaxexport")
        if program.exists():
            forms[words] = lambda program=program: ours(program, problem, arrays)
    for peer in peers:
        words, make, options = PEERS[peer]
        forms[words] = lambda make=make, options=options: theirs(make, options, problem, expected)
    rows = []
    for words, start in forms.items():
        row = {"configuration": path.stem, "form": words, "tasks": tasks_of(problem)}
        try:
            step, row["agreement"] = start()
            step(1)
            steps[words] = step
        except Exception as error:  # e.g. a missing package or too little memory; continue with the other forms
            row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        rows.append(row)
    times = {words: [] for words in steps}
    for _ in range(ROUNDS):
        for words, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                start = time.perf_counter()
                step(1)
                times[words].append(time.perf_counter() - start)
                if time.perf_counter() - began > SECONDS:
                    break
    for row in rows:
        printed = row.get("why")
        if not printed:
            median = float(np.median(times[row["form"]]))
            row |= {
                "ms": 1e3 * median,
                "tasks_per_s": row["tasks"] / median,
                "tflop_per_s": header["flop"] / median / 1e12,
            }
            row["share_of_peak"] = 1e12 * row["tflop_per_s"] / peak
            printed = "{ms:9.3f} {tasks_per_s:9.0f} {tflop_per_s:8.2f} {share_of_peak:8.1%}  {agreement}".format(**row)
        print(f"{row['configuration']:19} {row['form']:35} {printed}", flush=True)
    return rows


def problem_of(arrays: dict) -> tuple[Problem, dict]:
    """Return the exported problem, with its tasks drawn again from the same seed, and its header."""
    from forms import random_images

    header = json.loads(str(arrays["header"]))
    support, labels, query, _ = header["shapes"]
    tasks, _, *size, channels = support
    way = labels[-1]
    batch = random_images(size, channels, tasks, way, support[1] // way, query[1] // way)
    fields = {name: header[name] for name in Problem._fields if name not in ("weights", "batches")}
    weights = {name.removeprefix("weights/"): w for name, w in arrays.items() if name.startswith("weights/")}
    return Problem(weights=weights, batches=[batch], **fields), header


def ours(path: Path, problem: Problem, arrays: dict):
    """Return (step, agreement) of an exported program.

    The program averages over a meta-batch, so a meta-batch of one repeated task gives that task's meta-gradient.
    """
    import jax

    program = jax.export.deserialize(bytearray(path.read_bytes())).call
    distances = []
    for i, loss in enumerate(arrays["task_losses"]):
        task = [np.repeat(part[i : i + 1], len(part), 0) for part in problem.batches[0]]
        our_loss, gradient = program(problem.weights, *task)
        flat, exact = (
            np.concatenate([np.ravel(values[name]).astype(float) for name in problem.weights])
            for values in (gradient, {name: arrays[f"task_gradient/{name}"][i] for name in problem.weights})
        )
        distance = np.linalg.norm(flat - exact) / np.linalg.norm(exact)
        distances.append((abs(float(our_loss) / loss - 1), distance))
    loss, gradient = np.median(distances, 0)
    step, _ = jax_form(problem, lambda weights, batch: program(weights, *batch))
    return step, f"distance from float64, median of {len(distances)} tasks: loss {loss:.1e}, gradient {gradient:.1e}"


def theirs(make, options, problem: Problem, expected):
    """Return (step, agreement) of a peer. Raise NoTime if it disagrees with ours in float64."""
    precise, moment = make(problem.in_float64(), **options)
    losses = [precise(1)]
    gradient = moment() / (1 - BETA1)
    losses.append(precise(1))
    check(losses, gradient, expected)
    step, _ = make(problem, **options)
    return step, "in float64"


def matmul_peak() -> float:
    """Return the FLOP/s of JAX's product of two float32 matrices without TensorFloat-32, the best of ten."""
    import jax
    from jax import numpy as jnp

    size = 8192 if jax.devices()[0].platform == "gpu" else 1024
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    times = []
    for _ in range(11):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["export", "run"])
    parser.add_argument("folder", type=user_path, help="folder of the exported programs")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS, metavar="NAME", help=str(CONFIGS))
    parser.add_argument("--tasks", type=int, help="tasks per meta-batch (default: the configuration's)")
    parser.add_argument(
        "--platform", choices=["cuda", "rocm", "cpu"], default="cuda", help="target of export (default: cuda)"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of a group's convolution (all)")
    peers = "; ".join(f"{name}: {peer[0]}" for name, peer in PEERS.items())
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="NAME", help=peers)
    parser.add_argument("--json", type=user_path, help="also write the table to this file")
    args = parser.parse_args()
    if args.what == "export":
        export(args.folder, args.configs, args.tasks, args.platform, args.forms)
    else:
        run(args.folder, args.peers, args.json)


if __name__ == "__main__":
    main()
