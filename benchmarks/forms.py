"""MAML training steps in PyTorch and JAX, as people usually write them, for peers.py and gpu.py.

This module does not import TensorFlow. On a GPU all forms run in full float32, without TensorFloat-32.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
EPSILON = 0.001  # batch norm's (special_grads.py)
BETA1 = 0.9  # Adam's; after one step its first moment is (1 - BETA1) * gradient


class Problem(NamedTuple):
    """The work that all forms do, in NumPy."""

    weights: dict[str, np.ndarray]  # initial weights, as in networks.py; no biases under batch norm
    batches: list[tuple]  # (support_x, support_y, query_x, query_y) of a step: [T, n, ...], labels one-hot
    inner_lr: float
    inner_steps: int
    meta_lr: float
    clip: float | None  # bound on each element of the meta-gradient
    shot: int | None  # divisor of the summed cross-entropy; None: mean squared error
    max_pool: bool  # instead of stride 2
    mean_head: bool  # average over height and width before the last layer

    @property
    def adapted(self) -> list[str]:
        return [name for name in self.weights if not name.startswith("beta")]

    def in_float64(self) -> "Problem":
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        return self._replace(weights=weights, batches=[[part.astype(np.float64) for part in self.batches[0]]])

    @property
    def watched(self) -> str:
        """The name of the weight whose meta-gradient is compared."""
        return "conv2" if "conv2" in self.weights else "w2"


def random_images(size, channels, tasks, way, shot, query):
    """Return tasks with a random image per class and noise per example."""
    rng = np.random.default_rng(0)
    classes = rng.random((tasks, 1, way, *size, channels), np.float32)
    x = (classes + rng.random((tasks, shot + query, way, *size, channels), np.float32)) / 2
    x = x.reshape(tasks, -1, *size, channels)
    y = np.tile(np.eye(way, dtype=np.float32), (tasks, shot + query, 1))
    return x[:, : way * shot], y[:, : way * shot], x[:, way * shot :], y[:, way * shot :]


# PyTorch


class Torch:
    """Tensors, network, loss and Adam of the PyTorch forms.

    A strided SAME convolution pads an even image only at its far end; PyTorch's padding=1 in effect pads its near end.
    So images and filters are mirrored. Unlike explicit padding, this costs nothing during a step.
    """

    def __init__(self, problem: Problem, threads: int | None):
        import torch

        if threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # True by default, unlike that of matrix products
        self.torch, self.problem = torch, problem
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mirrored = (-2, -1) if "conv1" in problem.weights and not problem.max_pool else ()
        self.weights = {name: torch.nn.Parameter(self.weight(name)) for name in problem.weights}
        self.adapted = problem.adapted
        self.batches = [tuple(map(self.part, batch)) for batch in problem.batches]
        self.adam = torch.optim.Adam(self.weights.values(), lr=problem.meta_lr, eps=1e-8, fused=True)

    def weight(self, name):
        value = self.torch.tensor(self.problem.weights[name], device=self.device)
        if name.startswith("conv"):
            value = value.permute(3, 2, 0, 1).flip(self.mirrored)
        elif name == "w5" and not self.problem.mean_head:  # row order: height, width, filter -> filter, height, width
            filters = len(self.problem.weights["beta4"])
            value = value.reshape(-1, filters, value.shape[1]).transpose(0, 1).reshape(value.shape)
        return value.contiguous()

    def part(self, value):
        value = self.torch.tensor(value, device=self.device)
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
        """Return (step, moment), given backward(batch), which sets .grad to the meta-gradient and returns the loss."""

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
            return (value.flip(self.mirrored).permute(2, 3, 1, 0) if value.dim() == 4 else value).cpu().numpy()

        return step, moment


def torch_loop(problem, threads=None, cores=1):
    """Plain autograd, task by task, in as many Python threads as cores."""
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
            weight.grad = (sum(parts) / len(parts)).contiguous()  # the fused Adam assumes matching strides
        return sum(losses) / len(losses)

    return t.steps(backward)


def torch_func(problem, threads=None, compiled=False):
    """torch.func: the gradient of the mean loss over a vmap of tasks, with grad in the inner loop."""
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
    """Return the network as a module for the libraries, without the betas, because they adapt every parameter of it."""

    class Network(t.torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in t.adapted:
                setattr(self, name, t.weights[name])

        def forward(self, x, y):
            return t.loss(t.weights | {name: getattr(self, name) for name in t.adapted}, x, y)

    return Network()


def higher_loop(problem, threads=None):
    """higher's innerloop_ctx, as in its MAML example."""
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
    """TorchOpt's MetaSGD, as in its MAML example."""
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


# JAX


def jax_form(problem, over_tasks, threads=None):
    """A step compiled by JAX.

    Args:
      over_tasks: "vmap" or "map" within one compiled step; "threads" for one compiled task per core; or a function
        (weights, batch) -> (loss, gradient), which is compiled together with Adam.
    """
    if threads:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    import jax
    from jax import lax
    from jax import numpy as jnp

    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU the default is TensorFloat-32
    jax.config.update("jax_enable_x64", problem.weights[problem.watched].dtype == np.float64)
    if over_tasks == "threads":
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # a task runs in the calling thread

    def conv4(w, x):
        stride = 1 if problem.max_pool else 2
        for layer in range(1, 5):
            filters = w[f"conv{layer}"]
            x = lax.conv_general_dilated(
                x, filters, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            centered = x - x.mean((0, 1, 2))
            x = centered * lax.rsqrt(jnp.square(centered).mean((0, 1, 2)) + EPSILON) + w[f"beta{layer}"]
            if problem.max_pool:
                # Faster than lax.reduce_window. A compiled max over reshaped axes has a wrong second derivative.
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
        if callable(over_tasks):
            return over_tasks(weights, batch)
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
        return one_step(state, tuple(part[0] for part in batches))  # convolutions are slow in XLA loops

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
    calls = {}  # count -> batches of a call, as JAX arrays
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


class NoTime(Exception):
    """The reason why a form cannot be timed."""


def check(losses, gradient, expected) -> None:
    """Raise NoTime if a form does not do the same work as ours.

    Args:
      losses, gradient: the form's first two losses and first meta-gradient of the watched weight, in float64.
      expected: (losses, gradient) of ours.
    """
    our_losses, our_gradient = expected
    cosine = np.vdot(gradient, our_gradient) / np.linalg.norm(gradient) / np.linalg.norm(our_gradient)
    if not np.allclose(losses, our_losses, rtol=1e-3) or not cosine > 0.999:
        raise NoTime(f"differs from ours: losses {losses} and {our_losses}; cosine of meta-gradients {cosine:.5f}")
