"""Times a MAML training step beside the same step in PyTorch, higher, TorchOpt and JAX.

    python benchmarks/peers.py [--configs omniglot_5way ...] [--peers torch_func jax_map ...] [--json peers.json]

The same inner loops, second-order meta-gradient and Adam, from the same initial weights on the same generated tasks,
which lie in memory as each framework's own tensors: drawing tasks is left out on all sides. Every form runs in a
process of its own, in turns with ours; a ratio above 1 says that ours is faster.

Before a form is timed, its own code runs in float64: its first two losses and its first meta-gradient must agree with
ours, computed in float64 by MAML.query_loss. The last column is how far apart the first losses of the timed float32
programs are: five inner steps from untrained weights amplify rounding to percents, in every framework.

Needs benchmarks/requirements-peers.txt; nothing else should run.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # isort: skip  it comes first, since it imports TensorFlow without its notices

import numpy as np
from step_time import CONFIGS

CORES = devices.cores()
COMPARED = ("sinusoid_10shot", "omniglot_5way", "omniglot_20way", "miniimagenet_1shot", "miniimagenet_5shot")
BLOCK = 100  # steps of the sinusoid in one call, as main.py takes them
ROUNDS, STEPS = 5, 4  # turns, and timed calls in each
SLOW = 2.0  # seconds; of longer calls one is timed in each turn
EPSILON = 0.001  # batch norm's (special_grads.py)
BETA1 = 0.9  # Adam's: its first moment after one step is (1 - BETA1) * gradient


class Problem(NamedTuple):
    """The work, in NumPy: what ours hands to a peer."""

    weights: dict[str, np.ndarray]  # initial, with networks.py's names and layouts; no biases under batch norm
    batches: list[tuple]  # (support_x, support_y, query_x, query_y) of a step: [T, n, ...], labels one-hot
    inner_lr: float
    inner_steps: int
    meta_lr: float
    clip: float | None  # bound on each element of the meta-gradient
    shot: int | None  # divisor of the summed cross-entropy; None: mean squared error
    max_pool: bool  # else stride 2
    mean_head: bool  # the last layer sees the mean over height and width

    @property
    def adapted(self) -> list[str]:
        return [name for name in self.weights if not name.startswith("beta")]

    def in_float64(self) -> "Problem":
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        return self._replace(weights=weights, batches=[[part.astype(np.float64) for part in self.batches[0]]])

    @property
    def watched(self) -> str:
        """The weight whose meta-gradient is compared."""
        return "conv2" if "conv2" in self.weights else "w2"


# Ours: MAML as main.py builds it, with main.py's threads.


def ours(flags: str):
    """(step, problem, reference) of a command of main.py."""
    import tensorflow as tf

    import main
    import recipe as recipes
    from data_generator import SinusoidTasks
    from utils import Tasks

    main.FLAGS(["main.py", *flags.split()])
    main.start_devices()
    recipe = main.recipe_of(main.FLAGS)
    dataset, maml = recipe.dataset, recipes.build(recipe, *main.layout())
    tasks, way, shot, images = recipe.meta_batch, recipe.way, recipe.shot, dataset.images
    if images:
        batches = [random_images(images.size, images.channels, tasks, way, shot, recipe.query_examples(True))]
    else:
        drawn = SinusoidTasks(shot, shot).draw(0, "train", 0, BLOCK * tasks)
        batches = list(zip(*(part.reshape(BLOCK, tasks, *part.shape[1:]) for part in drawn), strict=True))
    cancelled = [f"b{layer}" for layer in range(1, 5)] if dataset.images else []  # by batch norm
    problem = Problem(
        weights={name: value.numpy() for name, value in maml.weights.items() if name not in cancelled},
        batches=batches,
        inner_lr=recipe.inner_lr,
        inner_steps=recipe.inner_steps,
        meta_lr=recipe.meta_lr,
        clip=dataset.clip,
        shot=shot if images else None,
        max_pool=recipe.max_pool,
        mean_head=dataset.network == "omniglot",
    )
    first = Tasks(*map(tf.constant, batches[0]))
    stacked = Tasks(*(tf.constant(np.stack(part)) for part in zip(*batches, strict=True)))

    def step(count):
        if count == 1:
            return float(maml.train_step(first)[0])
        maml.many_steps(stacked, tf.constant(0), tf.constant(count), False)
        maml.step.numpy()  # waits
        return None

    return step, problem, reference(maml, problem)


def reference(maml, problem: Problem):
    """In float64: the first two losses, and the first meta-gradient to the watched weight."""
    import tensorflow as tf

    from utils import Tasks

    @tf.function(autograph=False)
    def gradient_and_loss(weights, task):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = maml.query_loss(weights, task)
        return tape.gradient(loss, weights, unconnected_gradients="zero"), loss

    precise = problem.in_float64()
    weights, losses, gradients = {name: value.numpy().astype(float) for name, value in maml.weights.items()}, [], []
    for _ in range(2):
        held = {name: tf.constant(value) for name, value in weights.items()}
        tasks = [Tasks(*map(tf.constant, task)) for task in zip(*precise.batches[0], strict=True)]
        each = [gradient_and_loss(held, task) for task in tasks]
        losses.append(float(np.mean([loss for _, loss in each])))
        gradients.append({name: np.mean([gradient[name] for gradient, _ in each], 0) for name in weights})
        # Adam's first step: the gradient over its absolute value.
        weights = {name: value - problem.meta_lr * np.sign(gradients[0][name]) for name, value in weights.items()}
    gradient, bound = gradients[0][problem.watched], problem.clip or np.inf
    return losses, np.clip(gradient, -bound, bound)


def random_images(size, channels, tasks, way, shot, query):
    """Tasks of a random image a class, each example under noise of its own."""
    rng = np.random.default_rng(0)
    classes = rng.random((tasks, 1, way, *size, channels), np.float32)
    x = (classes + rng.random((tasks, shot + query, way, *size, channels), np.float32)) / 2
    x = x.reshape(tasks, -1, *size, channels)
    y = np.tile(np.eye(way, dtype=np.float32), (tasks, shot + query, 1))
    return x[:, : way * shot], y[:, : way * shot], x[:, way * shot :], y[:, way * shot :]


# PyTorch.


class Torch:
    """What the PyTorch forms share: tensors, network, loss and Adam.

    A strided SAME convolution pads an even image at its far end only, PyTorch's padding=1 in effect at its near end.
    So images and filters are laid out mirrored, which costs nothing in a step, where padding by hand would.
    """

    def __init__(self, problem: Problem, threads: int | None):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.torch, self.problem = torch, problem
        self.mirrored = (-2, -1) if "conv1" in problem.weights and not problem.max_pool else ()
        self.weights = {name: torch.nn.Parameter(self.weight(name)) for name in problem.weights}
        self.adapted = problem.adapted
        self.batches = [tuple(map(self.part, batch)) for batch in problem.batches]
        self.adam = torch.optim.Adam(self.weights.values(), lr=problem.meta_lr, eps=1e-8, fused=True)

    def weight(self, name):
        value = self.torch.tensor(self.problem.weights[name])
        if name.startswith("conv"):
            value = value.permute(3, 2, 0, 1).flip(self.mirrored)
        elif name == "w5" and not self.problem.mean_head:  # rows by height, width, filter -> filter, height, width
            filters = len(self.problem.weights["beta4"])
            value = value.reshape(-1, filters, value.shape[1]).transpose(0, 1).reshape(value.shape)
        return value.contiguous()

    def part(self, value):
        value = self.torch.tensor(value)
        if value.dim() == 5:  # images [T, n, height, width, channels]
            return value.permute(0, 1, 4, 2, 3).flip(self.mirrored).contiguous()
        return value.argmax(-1) if self.problem.shot else value

    def loss(self, weights, x, y):
        functional = self.torch.nn.functional
        outputs = self.conv4(weights, x) if self.problem.shot else self.fc(weights, x)
        if self.problem.shot is None:
            return functional.mse_loss(outputs, y)
        return functional.cross_entropy(outputs, y, reduction="sum") / self.problem.shot

    def fc(self, w, x):
        x = self.torch.relu(x @ w["w1"] + w["b1"])
        x = self.torch.relu(x @ w["w2"] + w["b2"])
        return x @ w["w3"] + w["b3"]

    def conv4(self, w, x):
        functional = self.torch.nn.functional
        for layer in range(1, 5):
            x = functional.conv2d(x, w[f"conv{layer}"], stride=1 if self.problem.max_pool else 2, padding=1)
            x = functional.batch_norm(x, None, None, bias=w[f"beta{layer}"], training=True, eps=EPSILON)
            if self.problem.max_pool:
                x = functional.max_pool2d(x, 2)
            x = functional.relu(x)
        x = x.mean((2, 3)) if self.problem.mean_head else x.flatten(1)
        return x @ w["w5"] + w["b5"]

    def steps(self, backward):
        """(step, moment), where backward(batch) leaves the meta-gradient in .grad and returns the loss."""

        def step(count):
            for batch in self.batches[:count]:
                loss = backward(batch)
                if self.problem.clip:
                    for weight in self.weights.values():
                        weight.grad.clamp_(-self.problem.clip, self.problem.clip)
                self.adam.step()
                self.adam.zero_grad()
            return float(loss)

        def moment():
            value = self.adam.state[self.weights[self.problem.watched]]["exp_avg"]
            return (value.flip(self.mirrored).permute(2, 3, 1, 0) if value.dim() == 4 else value).numpy()

        return step, moment


def torch_loop(problem, threads=None, cores=1):
    """Plain autograd, task by task; with more cores than one, in as many Python threads."""
    t = Torch(problem, threads)
    pool = ThreadPoolExecutor(cores, initializer=t.torch.set_num_threads, initargs=(1,)) if cores > 1 else None

    def task_gradient(task):
        support_x, support_y, query_x, query_y = task
        weights = t.weights
        for _ in range(problem.inner_steps):
            adapted = [weights[name] for name in t.adapted]
            gradient = t.torch.autograd.grad(t.loss(weights, support_x, support_y), adapted, create_graph=True)
            moved = [w - problem.inner_lr * g for w, g in zip(adapted, gradient, strict=True)]
            weights = weights | dict(zip(t.adapted, moved, strict=True))
        loss = t.loss(weights, query_x, query_y)
        return loss.detach(), t.torch.autograd.grad(loss, list(t.weights.values()))

    def backward(batch):
        losses, gradients = zip(*(pool.map if pool else map)(task_gradient, zip(*batch, strict=True)), strict=True)
        for weight, *parts in zip(t.weights.values(), *gradients, strict=True):
            weight.grad = (sum(parts) / len(parts)).contiguous()  # the fused Adam takes its strides for granted
        return sum(losses) / len(losses)

    return t.steps(backward)


def torch_func(problem, threads=None, compiled=False):
    """torch.func: the gradient of the mean over a vmap of tasks, each with grad inside."""
    t = Torch(problem, threads)
    func = t.torch.func

    def task_loss(weights, support_x, support_y, query_x, query_y):
        def support_loss(adapted):
            return t.loss(weights | adapted, support_x, support_y)

        adapted = {name: weights[name] for name in t.adapted}
        for _ in range(problem.inner_steps):
            gradient = func.grad(support_loss)(adapted)
            adapted = {name: adapted[name] - problem.inner_lr * gradient[name] for name in adapted}
        return t.loss(weights | adapted, query_x, query_y)

    def mean_loss(weights, batch):
        return func.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(weights, *batch).mean()

    gradient_and_loss = func.grad_and_value(mean_loss)
    if compiled:
        gradient_and_loss = t.torch.compile(gradient_and_loss)

    def backward(batch):
        gradient, loss = gradient_and_loss({name: weight.detach() for name, weight in t.weights.items()}, batch)
        for name, weight in t.weights.items():
            weight.grad = gradient[name].contiguous()
        return loss

    return t.steps(backward)


def torch_module(t: Torch):
    """The network as the libraries want it. The betas stay outside: what is inside, they adapt."""

    class Network(t.torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in t.adapted:
                setattr(self, name, t.weights[name])

        def forward(self, x, y):
            return t.loss(t.weights | {name: getattr(self, name) for name in t.adapted}, x, y)

    return Network()


def higher_loop(problem, threads=None):
    """higher's innerloop_ctx, as in its own MAML example."""
    import higher

    t = Torch(problem, threads)
    network = torch_module(t)
    sgd = t.torch.optim.SGD(network.parameters(), lr=problem.inner_lr)

    def backward(batch):
        total = 0
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(network, sgd, copy_initial_weights=False) as (adapting, inner):
                for _ in range(problem.inner_steps):
                    inner.step(adapting(support_x, support_y))
                loss = adapting(query_x, query_y) / len(batch[0])
                loss.backward()
                total += loss.detach()
        return total

    return t.steps(backward)


def torchopt_loop(problem, threads=None):
    """TorchOpt's MetaSGD, as in its own MAML example."""
    import torchopt

    t = Torch(problem, threads)
    network = torch_module(t)
    inner = torchopt.MetaSGD(network, lr=problem.inner_lr)
    start = [torchopt.extract_state_dict(each, by="reference") for each in (network, inner)]

    def backward(batch):
        total = 0
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            for _ in range(problem.inner_steps):
                inner.step(network(support_x, support_y))
            loss = network(query_x, query_y) / len(batch[0])
            loss.backward()
            total += loss.detach()
            torchopt.recover_state_dict(network, start[0])
            torchopt.recover_state_dict(inner, start[1])
        return total

    return t.steps(backward)


# JAX.


def jax_form(problem, over_tasks, threads=None):
    """over_tasks: 'vmap' or 'map' inside one compiled step, or 'threads', a compiled task a core."""
    if threads:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    import jax
    from jax import lax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", problem.weights[problem.watched].dtype == np.float64)
    if over_tasks == "threads":
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # a task runs in the thread that asks for it

    def conv4(w, x):
        stride = 1 if problem.max_pool else 2
        for layer in range(1, 5):
            filters = w[f"conv{layer}"]
            x = lax.conv_general_dilated(
                x, filters, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            centred = x - x.mean((0, 1, 2))
            x = centred * lax.rsqrt(jnp.square(centred).mean((0, 1, 2)) + EPSILON) + w[f"beta{layer}"]
            if problem.max_pool:
                # Faster than lax.reduce_window. A max over reshaped axes has a wrong second derivative once compiled.
                x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
                x = jnp.maximum(x[:, ::2], x[:, 1::2])
                x = jnp.maximum(x[:, :, ::2], x[:, :, 1::2])
            x = jax.nn.relu(x)
        x = x.mean((1, 2)) if problem.mean_head else x.reshape(len(x), -1)
        return x @ w["w5"] + w["b5"]

    def fc(w, x):
        x = jax.nn.relu(x @ w["w1"] + w["b1"])
        x = jax.nn.relu(x @ w["w2"] + w["b2"])
        return x @ w["w3"] + w["b3"]

    def loss(weights, x, y):
        if problem.shot is None:
            return jnp.square(fc(weights, x) - y).mean()
        return -(y * jax.nn.log_softmax(conv4(weights, x))).sum() / problem.shot

    def task_loss(weights, task):
        support_x, support_y, query_x, query_y = task
        adapted = {name: weights[name] for name in problem.adapted}
        for _ in range(problem.inner_steps):
            gradient = jax.grad(lambda adapted: loss(weights | adapted, support_x, support_y))(adapted)
            adapted = {name: adapted[name] - problem.inner_lr * gradient[name] for name in adapted}
        return loss(weights | adapted, query_x, query_y)

    def mean_gradient(weights, batch):
        if over_tasks == "vmap":
            return jax.value_and_grad(lambda w: jax.vmap(lambda task: task_loss(w, task))(batch).mean())(weights)
        each = lax.map(lambda task: jax.value_and_grad(task_loss)(weights, task), batch)
        return jax.tree.map(lambda x: x.mean(0), each)

    def adam(state, gradient):
        weights, m, v, t = state
        t = t + 1
        if problem.clip:
            gradient = jax.tree.map(lambda g: jnp.clip(g, -problem.clip, problem.clip), gradient)
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)
        rate = problem.meta_lr * jnp.sqrt(1 - 0.999**t) / (1 - BETA1**t)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-8), weights, m, v)
        return weights, m, v, t

    def one_step(state, batch):
        value, gradient = mean_gradient(state[0], batch)
        return adam(state, gradient), value

    @jax.jit
    def compiled(state, batches):
        if len(batches[0]) > 1:
            return lax.scan(one_step, state, batches)
        return one_step(state, tuple(part[0] for part in batches))  # convolutions are slow inside XLA's loops

    task_gradient = jax.jit(jax.value_and_grad(task_loss))

    @jax.jit
    def from_tasks(state, each):
        value, gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *each)
        return adam(state, gradient), value

    pool = ThreadPoolExecutor(CORES)

    def by_threads(state, batches):
        for tasks in batches:
            each = list(pool.map(lambda task: jax.block_until_ready(task_gradient(state[0], task)), tasks))  # noqa: B023
            state, value = from_tasks(state, each)
        return state, value

    weights = jax.tree.map(jnp.asarray, problem.weights)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = weights, zeros, zeros, jnp.zeros([])
    calls = {}  # count -> the batches of a call, ready in memory
    for count in {1, len(problem.batches)}:
        if over_tasks == "threads":
            tasks = [list(zip(*batch, strict=True)) for batch in problem.batches[:count]]
            calls[count] = jax.tree.map(jnp.asarray, tasks)
        else:
            calls[count] = tuple(jnp.asarray(np.stack(part)) for part in zip(*problem.batches[:count], strict=True))

    def step(count):
        nonlocal state
        state, values = (by_threads if over_tasks == "threads" else compiled)(state, calls[count])
        jax.block_until_ready(state)
        return float(values.ravel()[-1])

    return step, lambda: np.asarray(state[1][problem.watched])


# name -> (words, make, options). make(problem, **options) returns (step, moment): step(count) takes the steps of the
# first `count` batches and returns the last one's loss; moment() is Adam's first moment of problem.watched, as ours.
FORMS = {
    "torch_loop": ("PyTorch, loop over tasks", torch_loop, {}),
    "torch_loop_1": ("PyTorch, loop over tasks, 1 thread", torch_loop, {"threads": 1}),
    "torch_tasks": ("PyTorch, a task a core in Python threads", torch_loop, {"threads": 1, "cores": CORES}),
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
    "jax_tasks": ("JAX, a jitted task a core in threads", jax_form, {"over_tasks": "threads", "threads": 1}),
}


# Processes, turns and the table.


def serve(pipe, form: str, given) -> None:
    """A form's process: what there is to compare, then times as they are asked for."""
    try:
        if form == "ours":
            step, problem, expected = ours(given)
            pipe.send((problem, expected, step(1)))
        else:
            _, make, options = FORMS[form]
            step, moment = make(given, **options)
            problem, first, gradient = given, step(1), moment() / (1 - BETA1)
            pipe.send(([first, step(1)], gradient))
        block = len(problem.batches)
        while True:
            calls = pipe.recv()
            step(block)  # the caches were another process's
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                step(block)
                times.append((time.perf_counter() - start) / block)
            pipe.send(times)
    except EOFError:  # no more questions
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")


class NoTime(Exception):
    """Why a form has no time."""


class Worker:
    """A form in a process of its own, ended with the `with`."""

    def __init__(self, form: str, given, limit: float):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process, self.limit = context.Process(target=serve, args=(theirs, form, given)), limit
        self.process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def answer(self, calls: int = 1):
        """The next thing that the process says. Raises NoTime."""
        if not self.pipe.poll(calls * self.limit):
            raise NoTime(f"given up: over {self.limit:.0f} s to compile or step")
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise NoTime("its process died (memory?)") from None
        if isinstance(answer, str):
            raise NoTime(answer)
        return answer

    def times(self, calls: int) -> list[float]:
        """Seconds a step, of each of so many calls."""
        self.pipe.send(calls)
        return self.answer(1 + calls)


def check(losses, gradient, expected) -> None:
    """Raises NoTime where a peer does not do the same work."""
    our_losses, our_gradient = expected
    cosine = np.vdot(gradient, our_gradient) / np.linalg.norm(gradient) / np.linalg.norm(our_gradient)
    if not np.allclose(losses, our_losses, rtol=1e-3) or not cosine > 0.999:
        raise NoTime(f"differs: losses {losses}, ours {our_losses}; cosine of the meta-gradients {cosine:.5f}")


def compare(configuration: str, peers: list[str], limit: float) -> list[dict]:
    """A row for each peer, printed as it comes."""
    rows = []
    with Worker("ours", CONFIGS[configuration], 10 * limit) as we:
        problem, expected, our_loss = we.answer()
        for peer in peers:
            row = {"configuration": configuration, "peer": peer, "form": FORMS[peer][0]}
            try:
                with Worker(peer, problem, limit) as worker:
                    losses, _ = worker.answer()
                    with Worker(peer, problem.in_float64(), 5 * limit) as precise:  # has slower kernels
                        check(*precise.answer(), expected)
                    calls = 1 if worker.times(1)[0] * len(problem.batches) > SLOW else STEPS
                    theirs, our = [], []
                    for _ in range(ROUNDS):
                        our += we.times(calls)
                        theirs += worker.times(calls)
                row |= {"ms": 1e3 * float(np.median(theirs)), "ours_ms": 1e3 * float(np.median(our))}
                row |= {"ratio": row["ms"] / row["ours_ms"], "steps": len(theirs) * len(problem.batches)}
                row |= {"float32_loss": losses[0], "our_float32_loss": our_loss, "float64_loss": expected[0][0]}
                apart = abs(losses[0] / our_loss - 1)
                shown = "{ms:10.3f} {ours_ms:10.3f} {ratio:7.2f} {steps:6} {apart:9.5%}".format(**row, apart=apart)
            except NoTime as reason:
                row["why"] = shown = str(reason)
            print(f"{configuration:19} {row['form']:41} {shown}", flush=True)
            rows.append(row)
    timed = [row for row in rows if "ratio" in row]
    if timed:
        best = min(timed, key=lambda row: row["ratio"])
        print(f"{configuration:19} best: {best['form']}, {best['ratio']:.2f} times ours\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=COMPARED, default=COMPARED, metavar="NAME", help=str(COMPARED))
    listed = "; ".join(f"{name}: {form[0]}" for name, form in FORMS.items())
    parser.add_argument("--peers", nargs="+", choices=FORMS, default=list(FORMS), metavar="NAME", help=listed)
    parser.add_argument("--limit", type=float, default=60, help="seconds until a peer's start or step is given up (60)")
    parser.add_argument("--json", type=Path, help="write the table there too")
    args = parser.parse_args()
    packages = ("tensorflow", "torch", "higher", "torchopt", "jax")
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
    }
    print(machine["date"], machine["machine"], ", ".join(f"{k} {v}" for k, v in machine["versions"].items()), sep=", ")
    print(f"{'configuration':19} {'form':41} {'ms/step':>10} {'ours':>10} {'ratio':>7} {'steps':>6} {'loss':>9}")
    rows = [row for name in args.configs for row in compare(name, args.peers, args.limit)]
    if args.json:
        args.json.write_text(json.dumps(machine | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
