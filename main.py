"""Trains and tests MAML (Finn, Abbeel, Levine, ICML 2017): sinusoid regression and few-shot image classification.

Usage (README.md has every command of the paper):

  Train  python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 \\
             --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/
  Test   the same command plus --train=False --test_set=True

Evaluation is transductive under batch norm, as in the paper: the query images of a task are normalised together.
"""

import functools
import math
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported, which reads it

import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from tqdm import tqdm

import networks
import runs
from data_generator import DATASETS, ROOT, Dataset, ImageTasks, SinusoidTasks
from events import Events, curve_scalars, task_picture
from maml import MAML, Curve
from utils import InputError, Tasks, accuracy, mse, statistics, xent

FLAGS = flags.FLAGS


class _Checkpoint(flags.ArgumentParser):
    """An iteration, -1 or best."""

    syntactic_help = "an integer or best"

    def parse(self, argument):
        if argument == "best":
            return argument
        if int(argument) < -1:
            raise ValueError("must be an iteration, -1 for the latest, or best")
        return int(argument)


# The original's flags, with its names and defaults.
flags.DEFINE_enum(
    "datasource",
    "sinusoid",
    list(DATASETS),
    "Data set that tasks are drawn from; folder: your own images, in --data_path. From cifarfs on, the defaults are "
    "those of MiniImagenet's commands (meta_batch_size=4 update_lr=0.01 num_updates=5 num_filters=32 max_pool=True).",
)
flags.DEFINE_integer("num_classes", 5, "N, classes in a task (way). Paper: 5 and 20. The sinusoid has none.")
flags.DEFINE_enum(
    "baseline",
    None,
    ["oracle"],
    "oracle: the sinusoid's amplitude and phase are inputs too; pretraining only.",
)
flags.DEFINE_integer("pretrain_iterations", 0, "Outer steps on the support loss before any update, done first.")
flags.DEFINE_integer("metatrain_iterations", 15000, "Outer steps of MAML. Paper: 70000 sinusoid, 60000 images.")
flags.DEFINE_integer(
    "meta_batch_size",
    25,
    "Tasks in an outer step. Paper: 25 sinusoid; 32 and 16 Omniglot 5- and 20-way; 4 MiniImagenet.",
)
flags.DEFINE_float("meta_lr", 0.001, "beta, rate of the outer Adam. Paper: 0.001.")
flags.DEFINE_integer("update_batch_size", 5, "K, support examples a class (shot). Paper: 1 and 5; 5, 10, 20 sinusoid.")
flags.DEFINE_float(
    "update_lr",
    0.001,
    "alpha, size of an inner step on the cross-entropy summed over examples and divided by K, or on the mean squared "
    "error. Paper: 0.4 and 0.1 Omniglot 5- and 20-way, 0.01 MiniImagenet; the original's sinusoid commands 0.001.",
)
flags.DEFINE_integer(
    "num_updates", 1, "J, inner steps in training. Paper: 1 sinusoid and Omniglot 5-way, 5 the others."
)
flags.DEFINE_enum(
    "norm",
    "batch_norm",
    ["batch_norm", "layer_norm", "None"],
    "Normalisation. batch_norm takes the statistics of the batch at hand, at test too (transductive). "
    "The sinusoid has None unless this is given.",
)
flags.DEFINE_integer("num_filters", 64, "Filters of each convolution. Paper: 64 Omniglot, 32 MiniImagenet.")
flags.DEFINE_bool(
    "conv",
    True,
    "Convolutional network; --noconv: fully connected (256, 128, 64, 64). The sinusoid's is always 40, 40.",
)
flags.DEFINE_bool("max_pool", False, "Halve by 2x2 max-pooling rather than by stride 2. Paper: MiniImagenet.")
flags.DEFINE_bool("stop_grad", False, "First-order MAML: no second derivatives (paper section 5.2).")
flags.DEFINE_bool("log", True, "Write TensorBoard events.")
flags.DEFINE_string("logdir", "/tmp/data", "Folder in which the run has its own folder, named by its flags.")
flags.DEFINE_bool("resume", True, "Go on from the run folder's latest checkpoint, exactly as if never stopped.")
flags.DEFINE_bool("train", True, "Train; --train=False: test.")
flags.DEFINE(
    _Checkpoint(),
    "test_iter",
    -1,
    "Iteration of the checkpoint to test; -1: the latest; best: the one of the best accuracy on validation tasks, "
    "after J updates. Paper, MiniImagenet: best.",
)
flags.DEFINE_bool(
    "test_set",
    False,
    "Test on the test classes; else on the validation classes. In training: validate on the test classes.",
)
flags.DEFINE_integer(
    "train_update_batch_size", -1, "At test: the K of training, if it was another; it names the run folder."
)
flags.DEFINE_float(
    "train_update_lr", -1.0, "At test: the alpha of training, if it was another; it names the run folder."
)

# Ours.
flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the initial weights and the training tasks.",
)
flags.DEFINE_integer(
    "num_query",
    -1,
    "Query examples a class. -1, as the original: K; in training and validation on photographs 15.",
)
flags.DEFINE_integer("val_tasks", 200, "Validation tasks every 500 iterations (images), which choose the best.")
flags.DEFINE_integer("save_interval", 1000, "Iterations between checkpoints, of which the ten latest stay.")
flags.DEFINE_integer("threads", 0, "Tasks that are computed side by side, a core each; 0: as many as there are cores.")
flags.DEFINE_integer(
    "op_threads", 1, "Cores for one operation of a task: 2 or more for a few tasks of large images on many cores."
)
flags.DEFINE_string("data_path", None, "Folder of the images, if not the data set's own below data/.")
flags.DEFINE_string(
    "split",
    None,
    "Classes in train, val and test, e.g. 64,16,20, where the images are in DIR/<class>/ and not in "
    "DIR/{train,val,test}/<class>/; drawn at random but always the same. With --test_datasource: of that data set.",
)
flags.DEFINE_integer(
    "image_size",
    None,
    "Height and width in pixels; images of another size are resized, whatever their shape. "
    "Default: the data set's own, 84 for folder.",
)
flags.DEFINE_integer("image_channels", None, "1 grey, 3 colour. Default: the data set's own, 3 for folder.")
flags.DEFINE_bool("skip_broken", False, "Leave out images that cannot be read, and name them, rather than refuse.")
flags.DEFINE_enum(
    "test_datasource",
    None,
    [name for name, dataset in DATASETS.items() if dataset.images],
    "At test: the data set that tasks are drawn from, if not --datasource. Its images are read as the run's: in their "
    "size and channels, for an Omniglot run also inverted (dark ink on white paper is 1).",
)
flags.DEFINE_string("test_data_path", None, "Folder of the --test_datasource, if not its own below data/.")
flags.DEFINE_integer("test_tasks", 600, "Tasks of a test. Paper: 600.")
flags.DEFINE_integer(
    "eval_seed", 0, "Seed of the validation and test tasks: the same for all runs, whatever --seed is."
)
flags.DEFINE_string("results_dir", None, "Folder for a test's files, if not the run folder.")

# What a run's numbers depend on: recorded in its folder, so that another run cannot continue it by mistake.
IDENTITY = (
    "datasource num_classes baseline pretrain_iterations metatrain_iterations meta_batch_size meta_lr "
    "update_batch_size update_lr num_updates norm num_filters conv max_pool stop_grad num_query seed "
    "data_path split image_size image_channels"
).split()

# The original's (its main.py), in iterations, updates and tasks.
SUMMARY_INTERVAL = 100
PRINT_INTERVAL, SINUSOID_PRINT_INTERVAL = 100, 1000
VALIDATION_INTERVAL = 500
TEST_UPDATES = 10  # at least, even where training has fewer

CURVE_INTERVAL = 1000  # of summaries beyond J updates. Differs: every 100 in the original, 3 % of an Omniglot run

EVALUATION_CHUNK = 2  # tasks for each core at once, in memory; a stop signal waits for so many
BLOCK = 100  # steps of a tiny network in one program


def _number(name, test, range_):
    message = f"must be {range_}"
    flags.register_validator(
        name, lambda value: value is None or (math.isfinite(value) and test(value)), message=message
    )


for _name in (
    "meta_batch_size update_batch_size num_updates num_filters val_tasks save_interval op_threads test_tasks image_size"
).split():
    _number(_name, lambda value: value >= 1, "1 or more")
for _name in ("pretrain_iterations", "metatrain_iterations", "threads"):
    _number(_name, lambda value: value >= 0, "0 or more")
for _name in ("train_update_batch_size", "num_query"):
    _number(_name, lambda value: value == -1 or value >= 1, "1 or more, or -1")
for _name in ("seed", "eval_seed"):
    _number(_name, lambda value: 0 <= value < 2**63, "0 or more, and below 2 to the 63rd")
_number("image_channels", lambda value: value in (1, 3), "1 or 3")
flags.register_validator(
    "split",
    lambda value: value is None or re.fullmatch(r"\d+,\d+,\d+", value),
    message="must be three numbers of classes, e.g. 64,16,20",
)
_number("num_classes", lambda value: value >= 2, "2 or more")
for _name in ("meta_lr", "update_lr"):
    _number(_name, lambda value: 1e-37 < value < 1e37, "a number above 0, and within float32")
_number("train_update_lr", lambda value: value == -1 or value > 0, "a number above 0, or -1")


def main(argv: list[str]) -> None:
    """Trains, or tests, as the flags say."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]}: flags are written --name=value")
    logging.set_verbosity(logging.WARNING)  # TensorFlow tells about every checkpoint
    set_threads()
    dataset = run_data_set()
    identity = run_identity(dataset)
    run = _run_folder(identity)
    if FLAGS.train:
        maml = build(identity, dataset)
        with run.locked():
            train(run, maml, identity, dataset)
    else:
        test(run, identity, dataset)


def set_threads() -> None:
    """Sets TensorFlow's threads, which it takes once, before it starts: a task a core."""
    tf.config.threading.set_intra_op_parallelism_threads(FLAGS["op_threads"].value)
    tf.config.threading.set_inter_op_parallelism_threads(_parallel_tasks())


def run_of(arguments: list[str]) -> tuple[runs.Run, str | None]:
    """The run that these flags name, and their --results_dir."""
    FLAGS(["main.py", *arguments])
    return _run_folder(run_identity(run_data_set())), FLAGS.results_dir


def _run_folder(identity):
    return runs.Run(Path(FLAGS.logdir) / runs.run_name(identity))


def run_data_set() -> Dataset:
    """The row of --datasource as the flags have it; what they leave open, they take from it."""
    take_defaults(DATASETS[FLAGS.datasource])
    dataset = data_set("datasource", "data_path")
    if dataset.images is None:
        return dataset
    images = dataset.images._replace(size=(FLAGS.image_size, FLAGS.image_size), channels=FLAGS.image_channels)
    if not FLAGS["image_size"].using_default_value:
        images = images._replace(any_size=True)
    return dataset._replace(images=images)


def take_defaults(dataset: Dataset) -> None:
    """Makes the row's values the defaults of the flags, and tells which are taken."""
    for name, value in dataset.defaults.items():
        FLAGS.set_default(name, value)
    if dataset.images:
        FLAGS.set_default("image_size", dataset.images.size[0])
        FLAGS.set_default("image_channels", dataset.images.channels)
    taken = [f"--{name}={value}" for name, value in dataset.defaults.items() if FLAGS[name].using_default_value]
    if taken:
        print(f"Defaults of --datasource={FLAGS.datasource}: {' '.join(taken)}")


def data_set(flag: str, path_flag: str) -> Dataset:
    """The row that `flag` names, with the folder that `path_flag` names, if it does."""
    dataset, path = DATASETS[FLAGS[flag].value], FLAGS[path_flag].value
    if dataset.images is None or (dataset.images.folder and not path):
        return dataset
    if not path:
        raise InputError(f"--{flag}={FLAGS[flag].value} has no folder of its own: name yours with --{path_flag}")
    return dataset._replace(images=dataset.images._replace(folder=os.path.abspath(path)))


def users_folder(name: str, dataset: Dataset) -> str | None:
    """The folder by which a user's own images are told from another's; None: the data set's name is enough."""
    row = DATASETS[name].images
    return dataset.images.folder if row and row.folder is None else None


def run_identity(dataset: Dataset) -> dict:
    """The values of the IDENTITY flags that this run trains, or was trained, with."""
    identity = {name: FLAGS[name].value for name in IDENTITY}
    if identity["norm"] == "None":
        identity["norm"] = None
    identity["data_path"] = users_folder(FLAGS.datasource, dataset)
    for name in ("image_size", "image_channels"):
        if FLAGS[name].value == FLAGS[name].default:
            identity[name] = None  # given or not, it is the data set's own
    if FLAGS.baseline == "oracle":
        if dataset.images is not None:
            raise InputError(
                f"--baseline=oracle is the sinusoid's, not for --datasource={FLAGS.datasource}: leave it out"
            )
        # The oracle needs no adaptation, so all its iterations are pretraining (the original's main.py).
        identity["pretrain_iterations"] += identity["metatrain_iterations"]
        identity["metatrain_iterations"] = 0
    if not FLAGS.train:
        if FLAGS.train_update_batch_size != -1:
            identity["update_batch_size"] = FLAGS.train_update_batch_size
        if FLAGS.train_update_lr != -1:
            identity["update_lr"] = FLAGS.train_update_lr
        del identity["num_query"]  # at test it is the test's own
        if FLAGS.test_datasource:
            del identity["split"]
    return identity


def build(flags: Mapping, dataset: Dataset) -> MAML:
    """The model with its initial weights. Here the flags' names become the field's (README.md, How it works).

    flags: those of IDENTITY, with the K and alpha at hand. dataset: the row of their datasource.
    """
    way, shot, norm, images = flags["num_classes"], flags["update_batch_size"], flags["norm"], dataset.images
    if images is None:
        network, loss, score = networks.fc(3 if flags["baseline"] else 1, dataset.hidden, 1, norm=norm), mse, None
    else:
        loss, score = functools.partial(xent, shot=shot), accuracy
        size = (flags["image_size"],) * 2 if flags["image_size"] else images.size
        channels = flags["image_channels"] or images.channels
        if flags["conv"]:
            network = networks.conv4(
                size,
                channels,
                way,
                flags["num_filters"],
                max_pool=flags["max_pool"],
                norm=norm,
                mean_head=images.mean_head,
            )
        else:
            network = networks.fc(math.prod(size) * channels, dataset.hidden, way, norm=norm)
    return MAML(
        network,
        loss,
        score,
        inner_lr=flags["update_lr"],
        inner_steps=flags["num_updates"],
        meta_lr=flags["meta_lr"],
        first_order=flags["stop_grad"],
        clip=dataset.clip,
        seed=flags["seed"],
        parallel_tasks=_parallel_tasks(),
    )


def open_data(dataset: Dataset, splits: tuple[str, ...], training: bool) -> SinusoidTasks | ImageTasks:
    """The source of tasks, its folder checked."""
    query = FLAGS.num_query
    if query == -1:
        query = (training and dataset.images and dataset.images.train_query) or FLAGS.update_batch_size
    if dataset.images is None:
        return SinusoidTasks(FLAGS.update_batch_size, query, oracle=FLAGS.baseline == "oracle")
    images = dataset.images._replace(skip_broken=FLAGS.skip_broken)
    if FLAGS.split:
        images = images._replace(split_sizes=tuple(map(int, FLAGS.split.split(","))))
    folder = ROOT / images.folder
    data = ImageTasks(images, folder, splits, FLAGS.num_classes, FLAGS.update_batch_size, query)
    found = "; ".join(
        f"{split} {len(classes.names):,} classes, {classes.counts.sum():,} images"
        for split, classes in data.classes.items()
    )
    print("Images of {}, read as {}x{}x{}: {}.".format(folder, *images.size, images.channels, found))
    return data


def train(run: runs.Run, maml: MAML, identity: dict, dataset: Dataset) -> None:
    """Pretrains and meta-trains from where the run folder stands, with the original's printed lines and files."""
    images, updates = dataset.images, identity["num_updates"]
    pretrain = identity["pretrain_iterations"]
    total = pretrain + identity["metatrain_iterations"]
    val_split = "test" if FLAGS.test_set else "val"
    run.check(identity, FLAGS.resume)
    data = open_data(dataset, ("train", val_split), training=True)
    if run.iterations():
        prefix = run.restore_newest(maml)
        if maml.step == 0:
            raise InputError(
                f"{prefix} holds weights alone, to be tested and not trained further: give another --logdir"
            )
        print("Restoring model weights from", prefix)
    start = saved = int(maml.step)
    if start <= total:  # else the folder has more than these flags say
        run.record(identity)
    validations = {*range(VALIDATION_INTERVAL, total, VALIDATION_INTERVAL)} if images else set()
    saves = {*range(FLAGS.save_interval, total, FLAGS.save_interval), total - 1}
    # The iterations at which more is done than a step, and start - 1 where a stop cut its validation short.
    visits = {*range(start, total)} & {*range(0, total, SUMMARY_INTERVAL), *validations, *saves}
    visits |= {start - 1} & validations - {run.validation.last}
    if not visits:
        more = "--metatrain_iterations" if identity["metatrain_iterations"] else "--pretrain_iterations"
        print(f"Nothing left to do: {start} of {total} iterations are done. To go on, give more {more}.")
        return

    print(f"Run folder {run.folder}, iterations {start} to {total - 1}.")
    value = "accuracy" if images else "mean squared error"
    print(f"Printed: {value} on support sets before any update, {value} on query sets after {updates}.")
    print("Done initializing, starting training.", flush=True)
    with (
        _StopSignal() as stop,
        Events(run.folder, start, FLAGS.log) as events,
        tqdm(total=total, initial=start, unit=" iterations", disable=None) as progress,
        _Steps(maml, data, identity, stop, progress) as steps,
    ):
        events.flags(start, identity)
        report = _Report(data, identity, events, progress)
        for iteration in sorted(visits):
            steps.advance(iteration)
            curve = None
            if iteration % SUMMARY_INTERVAL == 0 and steps.done == iteration and not stop.signal:
                further = 0 if iteration % CURVE_INTERVAL else dataset.curve_steps
                curve = maml.evaluate(steps.meta_batch(iteration), max(updates, further))
                loss = float(np.mean(curve.losses[:, updates if iteration >= pretrain else 0]))  # that is minimised
                if not math.isfinite(loss):
                    raise run.diverged(f"the loss at iteration {iteration} is {loss}")
            steps.advance(iteration + 1)
            if curve and steps.done > iteration:
                report.training(iteration, curve, steps)
            if iteration in validations and steps.done > iteration:
                # Differs: the original validates on one meta-batch.
                curve = evaluate(maml, data, val_split, FLAGS.val_tasks, updates, stop)
                if curve:
                    report.validation(iteration, curve)
                    # The test classes choose no best.
                    accuracy = _before_after(curve, updates)[1] if val_split == "val" else -math.inf
                    run.validation = run.validation.then(iteration, accuracy, FLAGS.val_tasks)
            best = run.validation.best == iteration
            if best:
                events.picture(iteration, "validation_task", _picture(maml, data, updates))
            if best or (steps.done > saved and (iteration in saves or stop.signal)):
                events.flush()  # a run that goes on from this checkpoint will not write them again
                prefix, saved = run.save(maml), steps.done
            if stop.signal:
                told = "before the first step, nothing to save"
                if saved > start:
                    told = f"after iteration {saved - 1}, saved in {prefix}"
                _tell(f"Stopped by {stop.signal.name} {told}. The same command goes on from there.")
                sys.exit(128 + stop.signal)
        if FLAGS.log and images is None and (fit := _fit(maml, data.shot)) is not None:
            events.picture(total - 1, "test_task", fit)
    print(f"Done: {total} iterations, the last saved in {prefix}.")
    if (found := run.validation).best >= 0:
        print(f"Best on validation: model{found.best}, accuracy {found.accuracy:.6g} on {found.tasks} tasks.")


class _Steps:
    """Takes the outer steps, on tasks that are drawn while the step before runs.

    One step at a time, or BLOCK of a tiny network, which then runs as one program.
    """

    def __init__(
        self, maml: MAML, data: SinusoidTasks | ImageTasks, identity: Mapping, stop: "_StopSignal", progress: tqdm
    ):
        self.maml, self.data, self.stop, self.progress, self.done = maml, data, stop, progress, int(maml.step)
        self.seed, self.batch, self.pretrain = map(identity.get, ("seed", "meta_batch_size", "pretrain_iterations"))
        self.size = BLOCK if maml.network.batched else 1
        self.drawn = {}  # first iteration -> a Future of the tasks from there on
        self.gradient_norm = None  # of the last step, before the clip
        self.timed, self.seconds = 0, 0.0  # steps, and what they took, since the last call of milliseconds()

    def __enter__(self):
        self.background = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *exception):
        self.background.shutdown(cancel_futures=True)

    def meta_batch(self, iteration: int) -> Tasks:
        """The meta-batch of an iteration."""
        return Tasks(*(part[0] for part in self._tasks(iteration)))

    def milliseconds(self) -> float:
        """Mean time of a step, since the last call."""
        mean = 1000 * self.seconds / self.timed
        self.timed, self.seconds = 0, 0.0
        return mean

    def _tasks(self, first):
        """The meta-batches of `size` iterations from `first` on: Tasks with one more leading axis."""
        if first not in self.drawn:
            self.drawn = {first: self.background.submit(self._draw, first)}
        return self.drawn[first].result()

    def _draw(self, first):
        tasks = self.data.draw(self.seed, "train", first * self.batch, self.size * self.batch)
        return Tasks(*(part.reshape(self.size, self.batch, *part.shape[1:]) for part in tasks))

    def advance(self, end: int) -> None:
        """Takes the steps up to iteration end - 1, unless a stop signal comes."""
        while self.done < end and not self.stop.signal:
            began = time.perf_counter()
            pretrain, tasks = self.done < self.pretrain, self._tasks(self.done)
            following = min(self.done + self.size, end, self.pretrain if pretrain else end)
            self.drawn = {following: self.background.submit(self._draw, following)}
            if self.maml.network.batched:
                self.gradient_norm = self.maml.many_steps(tasks, tf.constant(following - self.done), pretrain)
            else:
                step = self.maml.pretrain_step if pretrain else self.maml.train_step
                _, self.gradient_norm = step(Tasks(*(part[0] for part in tasks)))
            self.timed += following - self.done
            self.seconds += time.perf_counter() - began
            self.progress.update(following - self.done)
            self.done = following


class _Report:
    """What a training run tells: the original's lines, the progress line, and TensorBoard."""

    def __init__(self, data: SinusoidTasks | ImageTasks, identity: Mapping, events: Events, progress: tqdm):
        self.data, self.identity, self.events, self.progress = data, identity, events, progress
        self.images = isinstance(data, ImageTasks)
        self.sampled = []  # (before, after) of each summary since the last print

    def training(self, iteration: int, curve: Curve, steps: _Steps) -> None:
        """The summary of an iteration: the curve is from before its step, and this is called after it."""
        updates, pretrain = self.identity["num_updates"], self.identity["pretrain_iterations"]
        values = {
            **self._scalars("metatrain", curve),
            "metatrain_gradient_norm": float(steps.gradient_norm),
            "metatrain_step_milliseconds": steps.milliseconds(),
        }
        self.events.scalars(iteration, values)
        self.progress.set_postfix_str("loss {:.4g} -> {:.4g}".format(*self._mean_losses(curve)), refresh=False)
        self.sampled.append(_before_after(curve, updates))
        if iteration and iteration % (PRINT_INTERVAL if self.images else SINUSOID_PRINT_INTERVAL) == 0:
            shown = f"Pretrain Iteration {iteration}"
            if iteration >= pretrain:
                shown = f"Iteration {iteration - pretrain}"
            _tell("{}: {:.6g}, {:.6g}".format(shown, *np.mean(self.sampled, axis=0)))
            self.sampled = []

    def validation(self, iteration: int, curve: Curve) -> None:
        """The curve of the validation tasks."""
        self.events.scalars(iteration, self._scalars("metaval", curve))
        _tell("Validation results: {:.6g}, {:.6g}".format(*_before_after(curve, self.identity["num_updates"])))

    def _scalars(self, prefix, curve):
        values = curve_scalars(prefix, curve)
        if self.images:  # the mean squared error is a mean as it is
            tags = "Pre-update_mean_loss", f"Post-update_mean_loss__step_{self.identity['num_updates']}"
            values |= {f"{prefix}_{tag}": mean for tag, mean in zip(tags, self._mean_losses(curve), strict=True)}
        return values

    def _mean_losses(self, curve):
        """Losses per example, before any update and after J."""
        before, after = (float(np.mean(curve.losses[:, j])) for j in (0, self.identity["num_updates"]))
        if self.images:  # xent is a sum over N * K support or N * Q query examples, divided by K
            before /= self.data.way
            after *= self.data.shot / (self.data.way * self.data.query)
        return before, after


def test(run: runs.Run, identity: dict, dataset: Dataset) -> None:
    """Tests a checkpoint on --test_tasks, always the same ones; writes the original's files and results.json."""
    split = "test" if FLAGS.test_set else "val"
    prefix = run.checkpoint(FLAGS.test_iter)
    run.check_flags(identity, training=False)
    results = Path(FLAGS.results_dir) if FLAGS.results_dir else run.folder
    runs.check_writable(results, "--results_dir")
    tested = tested_data_set(dataset)
    data = open_data(tested, (split,), training=False)
    maml = build(identity | {"update_batch_size": FLAGS.update_batch_size, "update_lr": FLAGS.update_lr}, dataset)
    if FLAGS.test_iter == -1:
        prefix = run.restore_newest(maml)
    else:
        run.restore(maml, prefix)
    print("Restoring model weights from", prefix)

    updates = max(identity["num_updates"], TEST_UPDATES)
    curve = evaluate(maml, data, split, FLAGS.test_tasks, updates)
    values = np.asarray(curve.accuracies if dataset.images else curve.losses, float)
    print("Mean validation accuracy/loss, stddev, and confidence intervals")
    means, stds, ci95 = statistics(values)
    print((means, stds, ci95))

    tested_name = FLAGS.test_datasource or FLAGS.datasource
    folder = users_folder(tested_name, tested)
    best, iteration = run.best(), int(Path(prefix).name.removeprefix("model"))
    is_best = iteration == best.best
    paper = dataset.paper_updates.get(FLAGS.num_classes, ())
    metric = "accuracy (share of query examples, 0 to 1)" if dataset.images else "mean squared error"
    entry = {
        "run": run.folder.name,
        "data_set": tested_name,
        "data_folder": folder,
        "classes_train_val_test": FLAGS.split,
        "trained_on": FLAGS.datasource,
        "split": split,
        "metric": metric,
        "classes_N": FLAGS.num_classes if dataset.images else None,
        "support_examples_a_class_K": FLAGS.update_batch_size,
        "query_examples_a_class_Q": data.query,
        "inner_step_size_alpha": FLAGS.update_lr,
        "inner_updates_in_training_J": identity["num_updates"],
        "checkpoint": Path(prefix).name,
        "iteration": iteration,
        "training_seed": identity["seed"],
        "tasks": FLAGS.test_tasks,
        "task_seed": FLAGS.eval_seed,
        "norm": identity["norm"],
        "transductive": identity["norm"] == "batch_norm",  # a task's query examples are normalised together
    }
    known = {
        "best_on_validation": is_best,
        "validation_accuracy": best.accuracy if is_best else None,
        "validation_tasks": best.tasks if is_best else None,
    }
    name = results_name(split, folder)
    runs.write_results(results, name, values, entry, known, paper)
    for update in paper:
        shown = f"{means[update]:.4f} +- {ci95[update]:.4f}"
        if dataset.images:
            shown = f"{100 * means[update]:.2f} +- {100 * ci95[update]:.2f} %"
        print(f"The paper's column, update{update}: {metric} {shown} over {FLAGS.test_tasks} {split} tasks.")
    print(f"Written: {results / name}.csv, .pkl and results.json.")


def results_name(split: str, folder: str | None) -> str:
    """The original's name for a test's files, with suffixes for what that leaves out, if not at default."""
    name = f"{split}_ubs{FLAGS.update_batch_size}_stepsize{FLAGS.update_lr}"
    if FLAGS.test_datasource:
        name += f"_{FLAGS.test_datasource}"
        if folder:  # with a checksum of the whole path, since many a folder has the name "images"
            name += f"-{Path(folder).name}-{zlib.crc32(os.fsencode(folder)):08x}"
        if FLAGS.split:
            name += f"_split{FLAGS.split}"
    for flag, suffix in (("num_query", "query"), ("test_tasks", "tasks"), ("eval_seed", "evalseed")):
        if FLAGS[flag].value != FLAGS[flag].default:
            name += f"_{suffix}{FLAGS[flag].value}"
    return name


def tested_data_set(dataset: Dataset) -> Dataset:
    """The row that a test's tasks come from: the run's, or that of --test_datasource, read as the run's images are."""
    if not FLAGS.test_datasource:
        if FLAGS.test_data_path:
            raise InputError("--test_data_path is the folder of --test_datasource: give that too, or --data_path")
        return dataset
    if dataset.images is None:
        raise InputError(
            f"--test_datasource={FLAGS.test_datasource} has images, which a run of the {FLAGS.datasource} cannot take: "
            "leave it out"
        )
    other, own = data_set("test_datasource", "test_data_path"), dataset.images
    any_size = other.images.any_size or other.images.size != own.size
    images = other.images._replace(size=own.size, channels=own.channels, invert=own.invert, any_size=any_size)
    return other._replace(images=images)


def evaluate(
    maml: MAML,
    data: SinusoidTasks | ImageTasks,
    split: str,
    count: int,
    updates: int,
    stop: "_StopSignal | None" = None,
) -> Curve | None:
    """maml.evaluate on tasks 0 .. count - 1 of a split: a Curve of arrays [count, 1 + updates]. None where stopped."""
    size, chunks = min(count, EVALUATION_CHUNK * maml.parallel_tasks), []
    for first in range(0, count, size):
        if stop and stop.signal:
            return None
        tasks = data.draw(FLAGS.eval_seed, split, first, size)
        chunks.append(tf.nest.map_structure(lambda x: x.numpy(), maml.evaluate(tasks, updates)))
    # The last chunk is whole, so that one traced graph serves all; what exceeds count is dropped.
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts)[:count], *chunks)


def _picture(maml, data, updates):
    """The first validation task, and what its query images are taken for after so many updates."""
    task = Tasks(*(part[0] for part in data.draw(FLAGS.eval_seed, "val", 0, 1)))
    adapted = maml.adapt(maml.weights, task, updates)[-1]
    return task_picture(task, maml.network.apply(adapted, task.query_x).numpy())


def _fit(maml, shot):
    """The first test task of the sinusoid, before and after updates, as plot.py draws it; None without matplotlib."""
    try:
        import plot
    except ImportError:
        return None
    task = SinusoidTasks(shot, shot, oracle=True).draw(FLAGS.eval_seed, "test", 0, 1)
    return plot.pixels(plot.sinusoid_figure({"This run": maml}, [task]))


def _before_after(curve, updates):
    """Mean over tasks before any update and after `updates`: accuracies where there are classes, else losses."""
    values = curve.accuracies if curve.accuracies.shape[1] else curve.losses
    return float(np.mean(values[:, 0])), float(np.mean(values[:, updates]))


def _tell(line):
    """Prints a line, above the progress line where there is one."""
    with tqdm.external_write_mode():
        print(line, flush=True)


class _StopSignal:
    """Notes the first Ctrl-C or SIGTERM, so that the iteration at hand is finished and saved. A second ends at once."""

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _parallel_tasks():
    return FLAGS["threads"].value or cores()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _run(argv):
    """main, with bad input, or what the system refuses, told in one line."""
    try:
        main(argv)
    except (InputError, OSError) as error:
        print(f"main.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _parse(argv):
    try:
        return FLAGS(argv)
    except flags.Error as error:
        print(
            f"main.py: {' '.join(str(error).split())} (python main.py --help lists the flags)",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    app.run(_run, flags_parser=_parse)
