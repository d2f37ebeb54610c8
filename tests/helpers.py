"""Helpers that several test modules use."""

import contextlib
import csv
import functools
import io
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import main
import maml as method
import networks
import recipe as recipes
import runs
from maml import MAML, InnerLoop
from networks import Network, with_step_sizes
from parallel import Layout
from utils import Tasks, mse

LINE = Network(  # y = w x, one weight
    init=lambda seed: {"w": tf.constant(1.5)},
    apply=lambda weights, x: weights["w"] * x,
    adapted=("w",),
    tf1_names={"w": "model/Variable"},
)


def maml_of(
    network: Network,
    loss: method.Loss,
    accuracy: method.Loss | None = None,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool = False,
    learned: str = "none",
    layout: Layout = Layout(),  # noqa: B008  a constant
    **options: object,
) -> MAML:
    """Return a MAML with these inner-loop settings."""
    network = with_step_sizes(network, learned, inner_lr, inner_steps)
    return MAML(InnerLoop(network, loss, inner_lr, inner_steps, first_order), accuracy, layout=layout, **options)


def gradient_and_loss(maml: MAML, tasks: Tasks) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
    """Return the meta-gradient and the mean query loss."""
    loss = functools.partial(method.query_loss, maml.inner)
    tasks = Tasks(*tasks).checked(maml.weights)
    return method.meta_gradient(loss, maml.values(), tasks, maml.layout)


def meta_gradient(maml: MAML, tasks: Tasks) -> dict[str, np.ndarray]:
    """Return the meta-gradient, computed in a graph."""
    gradient, _ = tf.function(functools.partial(gradient_and_loss, maml), autograph=False)(tasks)
    return {name: value.numpy() for name, value in gradient.items()}


def trajectory(inner: InnerLoop, theta: dict, task: Tasks, steps: int) -> list[dict]:
    """Return the weights before and after each inner step."""
    path, task = [theta], method.prepare(inner, theta, task)
    for j in range(steps):
        path.append(method.inner_step(inner, path[-1], task, j))
    return path


def one_task(support_x, support_y, query_x, query_y) -> Tasks:
    """Return a meta-batch of one task whose inputs and outputs are scalars."""
    return Tasks(*(np.array(part, np.float32).reshape(1, -1, 1) for part in (support_x, support_y, query_x, query_y)))


def random_tasks(count, support, query, shape, way, seed=0, dtype=np.float64) -> Tasks:
    """Return tasks of uniform noise whose labels cycle through the classes."""
    random = np.random.default_rng(seed)

    def labels(n):
        return np.eye(way)[np.tile(np.arange(way), (count, n // way))].astype(dtype)

    support_x = random.random((count, support, *shape)).astype(dtype)
    return Tasks(support_x, labels(support), random.random((count, query, *shape)).astype(dtype), labels(query))


def in_float64(network: Network) -> Network:
    """Return the network with jittered float64 weights, so that biases, betas and gammas are tested, too."""
    random = np.random.default_rng(7)

    def init(seed):
        return {
            name: tf.constant(value.numpy() + 0.1 * random.normal(size=value.shape), tf.float64)
            for name, value in network.init(seed).items()
        }

    return network._replace(init=init)


def assert_slope(maml: MAML, tasks: Tasks, gradient: dict) -> None:
    """Compare the gradient of the loss after two updates with finite differences in a random direction."""
    random = np.random.default_rng(5)
    direction = {name: random.normal(size=w.shape) for name, w in maml.weights.items()}

    def loss_at(distance):
        for name, weight in maml.weights.items():
            weight.assign_add(distance * direction[name])
        loss = np.mean(maml.evaluate(tasks, 2).losses[:, 2])
        for name, weight in maml.weights.items():
            weight.assign_sub(distance * direction[name])
        return loss

    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, sum(np.sum(gradient[name] * direction[name]) for name in gradient), rtol=1e-5)


def line_model(norm: str | None = None, hidden: tuple[int, ...] = (3,)) -> MAML:
    return maml_of(networks.fc(1, hidden, 1, norm=norm), mse, inner_lr=0.01, inner_steps=1)


def line_model_at(step: int) -> MAML:
    maml = line_model()
    maml.step.assign(step)
    return maml


# -- the program, run in this process or in another --------------------------------------------------------------

PROGRAM = Path(main.__file__)
NUMBER = r"-?\d\S*"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


MODELS = {}  # (recipe, layout, networks, how many equal ones this program has built) -> model and its initial state


@contextlib.contextmanager
def reused_models():
    """Give a program the models of earlier ones, with their initial state: tracing takes longer than most tests."""
    build, built = recipes.build, Counter()

    def reuse(recipe, layout=None):
        settings = recipe, layout, *networks.NETWORKS.values()
        key = (*settings, built[settings])
        built[settings] += 1
        if key not in MODELS:
            maml = build(recipe, layout)
            MODELS[key] = maml, {name: variable.numpy() for name, variable in maml.state.items()}
        maml, initial = MODELS[key]
        for name, variable in maml.state.items():
            variable.assign(initial[name])
        return maml

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "build", reuse)
        yield


def start_main(*arguments: object) -> Ended:
    """Run `python main.py <arguments>` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        flagsaver.flagsaver(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        reused_models(),
    ):
        try:
            main.run(main.parse(["main.py", *map(str, arguments)]))
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def run(*arguments: object) -> str:
    """Run main.py in this process and return its output. It must succeed."""
    ended = start_main(*arguments)
    assert (ended.code, ended.err) == (0, ""), ended.err
    return ended.out


def refusal(*arguments: object) -> str:
    """Run main.py in this process and return its one-line error. It must fail."""
    ended = start_main(*arguments)
    assert ended.code in (1, 2)
    (line,) = ended.err.splitlines()
    assert line.startswith("main.py: ")
    return line


def spawn(*command: object, **options) -> subprocess.Popen:
    """Start a Python process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, **options)


def end(process: subprocess.Popen) -> Ended:
    """Wait for a process and return its exit code and output."""
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, without_start_up_lines(err))


def train_until_killed(iteration: int, *flags: str) -> None:
    """Train in another process, and kill -9 it when it is about to write the summary of this iteration."""
    program = (
        "import os, signal, sys, main, report\n"
        "scalars = report.Events.scalars\n"
        "def kill(events, iteration, values):\n"
        f"    if iteration == {iteration}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    scalars(events, iteration, values)\n"
        "report.Events.scalars = kill\n"
        "main.run(main.parse(sys.argv))\n"
    )
    ended = end(spawn("-c", program, *flags, cwd=PROGRAM.parent))
    assert ended.code == -signal.SIGKILL, ended.err


def without_start_up_lines(err: str) -> str:
    """Remove TensorFlow's startup lines from a process's stderr."""
    startup = re.compile(r"WARNING: All log messages before absl|[IWE]0000 ")
    return "\n".join(line for line in err.splitlines() if not startup.match(line))


@contextlib.contextmanager
def unprivileged():
    """Act as a user other than root, whom permissions do not stop."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def only_run(logdir: Path) -> Path:
    (folder,) = logdir.iterdir()
    return folder


def models(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.index"))


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def variables(folder: Path, model: str) -> dict[str, np.ndarray]:
    """Return the variables of a checkpoint: weights, both optimizers' moments and counts, and the step."""
    reader = tf.train.load_checkpoint(str(folder / model))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_same_ending(one: Path, other: Path) -> None:
    """Assert that the last checkpoints of two runs are bitwise identical."""
    model, other_model = (Path(runs.Run(folder).checkpoint()).name for folder in (one, other))
    assert model == other_model
    left, right = (variables(folder, model) for folder in (one, other))
    assert left.keys() == right.keys()
    assert {"step", "updates", "pretrain/updates", "validation"} <= left.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


STEP_TIME = "speed/step_milliseconds"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return tag -> [(step, last value)], sorted by step, without the step times."""
    kept = {tag: dict(points) for tag, points in events(folder, "scalars").items() if tag != STEP_TIME}
    return {tag: [(step, value.item()) for step, value in sorted(points.items())] for tag, points in kept.items()}


def events(folder: Path, plugin: str) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return tag -> [(step, value)] of the events for one TensorBoard plugin."""
    found = defaultdict(list)
    # Sort numerically: by name, a process's tenth file within a second would precede its second.
    paths = sorted(folder.glob("*tfevents*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == plugin:
                    found[value.tag].append((event.step, tf.make_ndarray(value.tensor)))
    return dict(found)


def curve_tags(prefix: str, metrics: tuple[str, ...], updates: int) -> set[str]:
    """Return the original's tags for a curve (its maml.py)."""
    after = {f"{prefix}_Post-update_{metric}__step_{j}" for metric in metrics for j in range(1, updates + 1)}
    return after | {f"{prefix}_Pre-update_{metric}" for metric in metrics}


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    header, *rows = csv.reader(path.read_text().splitlines())
    return header, np.array(rows, float)


def read_pickle(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return pickle.load(file)["mses"]


@contextlib.contextmanager
def not_compiled():
    """Turn off XLA, for runs of a few steps: compiling would take longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        function = tf.function
        patch.setattr(tf, "function", lambda *args, jit_compile=None, **options: function(*args, **options))
        yield


@contextlib.contextmanager
def tiny_networks():
    """Replace the image networks by one hidden layer with batch norm."""

    def build(shape, outputs, norm, filters, max_pool):
        return networks.fc(math.prod(shape), (filters,), outputs, norm=norm)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("omniglot", "miniimagenet"):
            patch.setitem(networks.NETWORKS, name, build)
        yield


def small_flags(omniglot: Path) -> list[str]:
    return [
        *("--datasource=omniglot", f"--data_path={omniglot}", "--num_filters=4", "--meta_batch_size=2"),
        *("--update_batch_size=1", "--update_lr=0.4", "--val_tasks=20"),
    ]


def saved_by(number: signal.Signals, stopped: Ended) -> Path:
    """Return the checkpoint that a stopped run names. Check the exit code, and that it says how to continue."""
    assert (stopped.code, stopped.err) == (128 + number, "")
    message = rf"Stopped by {number.name}.*, saved in (\S+)\. To continue: .*"
    return Path(re.fullmatch(message, stopped.out.splitlines()[-1])[1])
