"""Time a MAML training step against the same step in PyTorch, higher, TorchOpt and JAX.

    python benchmarks/peers.py [--configs omniglot_5way ...] [--peers torch_func jax_map ...] [--json peers.json]

All forms compute the same inner loops, second-order meta-gradient and Adam steps, from the same initial weights on the
same generated tasks. The tasks are in memory as each framework's tensors, so drawing them is not timed. Each form runs
in its own process, in turns with ours. A ratio above 1 means that ours is faster.

Before a form is timed, it runs in float64: its first two losses and its first meta-gradient must agree with ours in
float64 (maml.query_loss). The last column is the relative difference between the first losses of the float32 programs.
It reaches percents in every framework, because five inner steps from untrained weights amplify rounding.

Install benchmarks/requirements-peers.txt, and run nothing else meanwhile.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # isort: skip  before TensorFlow, which reads what it sets

import numpy as np
from forms import (
    BETA1,
    CORES,
    NoTime,
    Problem,
    check,
    higher_loop,
    jax_form,
    random_images,
    torch_func,
    torch_loop,
    torchopt_loop,
)
from step_time import CONFIGS

from files import user_path

COMPARED = tuple(name for name in CONFIGS if name != "omniglot_fc")
BLOCK = 100  # sinusoid steps per call, as in main.py
ROUNDS, STEPS = 5, 4  # turns; timed calls in each
SLOW = 2.0  # seconds; only one longer call is timed per turn


# Ours: MAML and threads as in main.py


def built(flags: str):
    """Return (maml, problem) for flags of main.py."""
    import main

    main.FLAGS(["main.py", *flags.split()])
    main.choose_kernels(main.FLAGS)
    import recipe as recipes
    from data_generator import SinusoidTasks

    main.start_devices()
    recipe = main.recipe_of(main.FLAGS)
    dataset, maml = recipe.dataset, recipes.build(recipe, main.layout())
    tasks, way, shot, images = recipe.meta_batch, recipe.way, recipe.shot, dataset.images
    if images:
        batches = [random_images(images.size, images.channels, tasks, way, shot, recipe.query_examples(True))]
    else:
        drawn = SinusoidTasks(shot, shot).draw(0, "train", 0, BLOCK * tasks)
        batches = list(zip(*(part.reshape(BLOCK, tasks, *part.shape[1:]) for part in drawn), strict=True))
    canceled = [f"b{layer}" for layer in range(1, 5)] if dataset.images else []  # by batch norm
    return maml, Problem(
        weights={name: value.numpy() for name, value in maml.weights.items() if name not in canceled},
        batches=batches,
        inner_lr=recipe.inner_lr,
        inner_steps=recipe.inner_steps,
        meta_lr=recipe.meta_lr,
        clip=dataset.clip,
        shot=shot if images else None,
        max_pool=recipe.max_pool,
        mean_head=dataset.network == "omniglot",
    )


def ours(flags: str):
    """Return (step, problem, reference) for flags of main.py."""
    maml, problem = built(flags)
    import tensorflow as tf

    from utils import Tasks

    first = Tasks(*map(tf.constant, problem.batches[0]))
    stacked = Tasks(*(tf.constant(np.stack(part)) for part in zip(*problem.batches, strict=True)))

    def step(count):
        if count == 1:
            return float(maml.train_step(first)[0])
        maml.many_steps(stacked, tf.constant(0), tf.constant(count), False)
        maml.step.numpy()  # waits
        return None

    return step, problem, reference(maml, problem)


def reference(maml, problem: Problem):
    """Return the first two losses and the first meta-gradient of the watched weight, in float64."""
    weights, losses, gradients = {name: value.numpy().astype(float) for name, value in maml.weights.items()}, [], []
    for _ in range(2):
        each = task_gradients(maml, weights, problem.in_float64().batches[0])
        losses.append(float(np.mean([loss for _, loss in each])))
        gradients.append({name: np.mean([gradient[name] for gradient, _ in each], 0) for name in weights})
        # Adam's first step is meta_lr times the sign of the gradient.
        weights = {name: value - problem.meta_lr * np.sign(gradients[0][name]) for name, value in weights.items()}
    gradient, bound = gradients[0][problem.watched], problem.clip or np.inf
    return losses, np.clip(gradient, -bound, bound)


def task_gradients(maml, weights: dict[str, np.ndarray], batch) -> list[tuple]:
    """Return (meta-gradient by name, loss) of each task, in the dtype of the arguments."""
    import tensorflow as tf

    from maml import query_loss
    from utils import Tasks

    @tf.function(autograph=False)
    def gradient_and_loss(weights, task):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = query_loss(maml.inner, weights, task)
        return tape.gradient(loss, weights, unconnected_gradients="zero"), loss

    weights = {name: tf.constant(value) for name, value in weights.items()}
    return [gradient_and_loss(weights, Tasks(*map(tf.constant, task))) for task in zip(*batch, strict=True)]


# name -> (words, make, options). make(problem, **options) returns (step, moment). step(count) takes a step on each of
# the first `count` batches and returns the last loss. moment() is Adam's first moment of problem.watched in our layout.
FORMS = {
    "torch_loop": ("PyTorch, loop over tasks", torch_loop, {}),
    "torch_loop_1": ("PyTorch, loop over tasks, 1 thread", torch_loop, {"threads": 1}),
    "torch_tasks": ("PyTorch, one task per core in Python threads", torch_loop, {"threads": 1, "cores": CORES}),
    "torch_func": ("PyTorch, torch.func vmap", torch_func, {}),
    "torch_func_1": ("PyTorch, torch.func vmap, 1 thread", torch_func, {"threads": 1}),
    "torch_compile": ("PyTorch, torch.func vmap, torch.compile", torch_func, {"compiled": True}),
    "higher": ("higher, innerloop_ctx", higher_loop, {}),
    "higher_1": ("higher, innerloop_ctx, 1 thread", higher_loop, {"threads": 1}),
    "torchopt": ("TorchOpt, MetaSGD", torchopt_loop, {}),
    "torchopt_1": ("TorchOpt, MetaSGD, 1 thread", torchopt_loop, {"threads": 1}),
    "jax_vmap": ("JAX, jit and vmap", jax_form, {"over_tasks": "vmap"}),
    "jax_vmap_1": ("JAX, jit and vmap, 1 thread", jax_form, {"over_tasks": "vmap", "threads": 1}),
    "jax_map": ("JAX, jit and lax.map", jax_form, {"over_tasks": "map"}),
    "jax_tasks": ("JAX, one jitted task per core in threads", jax_form, {"over_tasks": "threads", "threads": 1}),
}


# Processes, turns and the table


def serve(pipe, form: str, work) -> None:
    """Run a form in its process: send what check() needs, then times for each requested number of calls.

    Args:
      work: flags of main.py for "ours", else a Problem.
    """
    try:
        if form == "ours":
            step, problem, expected = ours(work)
            pipe.send((problem, expected, step(1), devices.onednn()))
        else:
            _, make, options = FORMS[form]
            step, moment = make(work, **options)
            problem, first, gradient = work, step(1), moment() / (1 - BETA1)
            pipe.send(([first, step(1)], gradient))
        block = len(problem.batches)
        while True:
            calls = pipe.recv()
            step(block)  # fills the caches, which another process used
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                step(block)
                times.append((time.perf_counter() - start) / block)
            pipe.send(times)
    except EOFError:  # the other end is closed
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")


class Worker:
    """A context manager that runs a form in its own process."""

    def __init__(self, form: str, work, limit: float):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process, self.limit = context.Process(target=serve, args=(theirs, form, work)), limit
        self.process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def answer(self, calls: int = 1):
        """Return the next message of the process. Raise NoTime if it fails, or exceeds the limit per call."""
        if not self.pipe.poll(calls * self.limit):
            raise NoTime(f"timeout: over {self.limit:.0f} s to compile or step")
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise NoTime("its process died (out of memory?)") from None
        if isinstance(answer, str):
            raise NoTime(answer)
        return answer

    def times(self, calls: int) -> list[float]:
        """Return the seconds per step of each of `calls` calls."""
        self.pipe.send(calls)
        return self.answer(1 + calls)


def compare(configuration: str, peers: list[str], limit: float) -> list[dict]:
    """Time each peer against ours; print and return a row for each."""
    rows = []
    with Worker("ours", CONFIGS[configuration], 10 * limit) as our_worker:
        problem, expected, our_loss, onednn = our_worker.answer()
        for peer in peers:
            row = {"configuration": configuration, "peer": peer, "form": FORMS[peer][0], "our_onednn": onednn}
            try:
                with Worker(peer, problem, limit) as worker:
                    losses, _ = worker.answer()
                    with Worker(peer, problem.in_float64(), 5 * limit) as precise:  # float64 kernels are slower
                        check(*precise.answer(), expected)
                    calls = 1 if worker.times(1)[0] * len(problem.batches) > SLOW else STEPS
                    theirs, our = [], []
                    for _ in range(ROUNDS):
                        our += our_worker.times(calls)
                        theirs += worker.times(calls)
                row |= {"ms": 1e3 * float(np.median(theirs)), "ours_ms": 1e3 * float(np.median(our))}
                row |= {"ratio": row["ms"] / row["ours_ms"], "steps": len(theirs) * len(problem.batches)}
                row |= {"float32_loss": losses[0], "our_float32_loss": our_loss, "float64_loss": expected[0][0]}
                loss = abs(losses[0] / our_loss - 1)
                printed = "{ms:10.3f} {ours_ms:10.3f} {ratio:7.2f} {steps:6} {loss:9.5%}".format(**row, loss=loss)
            except NoTime as reason:
                row["why"] = printed = str(reason)
            print(f"{configuration:19} {row['form']:44} {printed}", flush=True)
            rows.append(row)
    timed = [row for row in rows if "ratio" in row]
    if timed:
        best = min(timed, key=lambda row: row["ratio"])
        print(
            f"{configuration:19} best: {best['form']}, {best['ratio']:.2f} times ours "
            f"(oneDNN {'on' if onednn else 'off'})\n",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=COMPARED, default=COMPARED, metavar="NAME", help=str(COMPARED))
    peers = "; ".join(f"{name}: {form[0]}" for name, form in FORMS.items())
    parser.add_argument("--peers", nargs="+", choices=FORMS, default=list(FORMS), metavar="NAME", help=peers)
    parser.add_argument("--limit", type=float, default=60, help="timeout in seconds for a peer's start or step (60)")
    parser.add_argument("--json", type=user_path, help="also write the table to this file")
    args = parser.parse_args()
    packages = ("tensorflow", "torch", "higher", "torchopt", "jax")
    try:
        versions = {name: version(name) for name in packages}
    except PackageNotFoundError as error:
        sys.exit(f"peers.py: {error.name} is not installed; run pip install -r benchmarks/requirements-peers.txt")
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{devices.instruction_set()}, {CORES} cores, Python {platform.python_version()}",
        "versions": versions,
    }
    print(machine["date"], machine["machine"], ", ".join(f"{k} {v}" for k, v in machine["versions"].items()), sep=", ")
    print(f"{'configuration':19} {'form':44} {'ms/step':>10} {'ours':>10} {'ratio':>7} {'steps':>6} {'loss':>9}")
    rows = [row for name in args.configs for row in compare(name, args.peers, args.limit)]
    if args.json:
        args.json.write_text(json.dumps(machine | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
