"""Trains and tests MAML (Finn, Abbeel, Levine, ICML 2017): sinusoid regression and few-shot image classification.

Train an Omniglot model as the paper does, and test it (README.md has every command of the paper):

  python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 \\
      --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/
  the same command plus --train=False --test_set=True

Train on your own images, which lie in DIR/<class>/, with 64 classes to train, 16 to validate and 20 to test:

  python main.py --datasource=folder --data_path=DIR --split=64,16,20 --update_batch_size=1 --logdir=logs/own/

Evaluation is transductive under batch norm, as in the paper: the query images of a task are normalised together, unless
--query_norm=support is given.
"""

import devices  # isort: skip  it comes first, since it imports TensorFlow without its notices

import copy
import dataclasses
import errno
import functools
import hashlib
import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import cluster
import evaluate
import recipe as recipes
import runs
import train
from cluster import Cluster, stopping_on_signals
from data_generator import DATASETS, QUERY_SHARES, Dataset, ImageTasks, SinusoidTasks
from files import InputError, say
from images import ROOT
from maml import MAML, QUERY_NORMS
from parallel import Layout
from recipe import Range, Recipe

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
flags.DEFINE_enum(
    "adapt",
    "all",
    recipes.CHOICES["adapt"],
    "What the inner loop changes. all: every layer (MAML). head: the last layer alone (ANIL). body: all but the last "
    "layer (BOIL).",
)
flags.DEFINE_enum(
    "learn_update_lr",
    "none",
    recipes.CHOICES["learn_update_lr"],
    "Meta-learn the sizes of the inner steps too; they begin as update_lr. weight: one for each element of each "
    "weight (Meta-SGD). step: one for each array of weights and update (as MAML++); at test, updates beyond "
    "num_updates go on with the last one's.",
)
flags.DEFINE_enum(
    "loss",
    "sum_over_shot",
    recipes.CHOICES["loss"],
    "Cross-entropy of classes: summed over the examples and divided by K (sum_over_shot, the original's), or their "
    "mean. On a support set the first is num_classes times the second, and so is the step of the same update_lr.",
)
flags.DEFINE_enum(
    "network",
    "paper",
    recipes.CHOICES["network"],
    "The paper's network of the data set, or one of mmfewshot's, whose batch norm has a gamma and a beta that the "
    "inner loop changes too: conv4_affine (with num_filters) or resnet12. Their meta-gradient is not clipped.",
)
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
    "Q, query examples a class. -1, as the original: K; in training and validation on photographs 15.",
)
flags.DEFINE_integer("val_tasks", 200, "Validation tasks every 500 iterations (images), which choose the best.")
flags.DEFINE_integer("save_interval", 1000, "Iterations between checkpoints, of which the ten latest stay.")
flags.DEFINE_integer(
    "threads",
    0,
    "Tasks that are computed side by side, a core each; 0: as many as there are cores. On a GPU: groups; 0: 1.",
)
flags.DEFINE_integer(
    "tasks_at_once",
    0,
    "Tasks in a group, which one operation computes together; it divides meta_batch_size. On a CPU there is a group "
    "on each core, on a GPU one after the other. 0: one task on a CPU, the whole meta-batch on a GPU. Lower it where "
    "memory runs out.",
)
flags.DEFINE_integer(
    "op_threads", 1, "Cores for one operation of a task: 2 or more for a few tasks of large images on many cores."
)
flags.DEFINE_bool(
    "tensor_float_32",
    False,
    "Let a GPU round what it multiplies to 10 bits. It is faster, and meta-gradients are less exact.",
)
flags.DEFINE_bool(
    "deterministic", False, "Have a GPU compute the same bits every time, as a CPU does anyway. It may be slower."
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
flags.DEFINE_bool(
    "augment",
    False,
    "Train as mmfewshot on random crops of whole photographs, half of them flipped, with other brightness, contrast "
    "and saturation; test on the middle. Colours are less ImageNet's mean, divided by its deviation. docs/data.md.",
)
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
flags.DEFINE_enum(
    "query_norm",
    "batch",
    QUERY_NORMS,
    "At test, under batch norm: a query image is normalised together with its task's other query images (batch, the "
    "paper's transductive way), or by itself together with the support set (support).",
)
flags.DEFINE_integer(
    "test_updates",
    -1,
    "Updates at test. -1, as the original: 10, or num_updates where that is more.",
)
flags.DEFINE_enum(
    "query_shares",
    "balanced",
    QUERY_SHARES,
    "At test: num_query queries of each class (balanced), or as many in all, of which each class has a random share, "
    "by a Dirichlet distribution of concentration 2 (dirichlet). num_query is then 15 unless it is given.",
)
flags.DEFINE_string("results_dir", None, "Folder for a test's files, if not the run folder.")


RANGES = recipes.RANGES | {
    "val_tasks": recipes.EXAMPLES,
    "test_tasks": recipes.EXAMPLES,
    "save_interval": Range(1, recipes.ITERATIONS.most),
    "threads": Range(0, devices.MOST_THREADS),
    "op_threads": Range(1, devices.MOST_THREADS),
    "tasks_at_once": Range(0, recipes.RANGES["meta_batch_size"].most),
    "eval_seed": recipes.SEED,
    "test_updates": recipes.RANGES["num_updates"]._replace(also=(-1,)),
    "train_update_batch_size": recipes.EXAMPLES._replace(also=(-1,)),
    "train_update_lr": recipes.RATE._replace(also=(-1,)),
}
for _name, _range in RANGES.items():
    flags.register_validator(
        _name, lambda value, range=_range: value is None or value in range, message=f"must be {_range}"
    )
flags.register_validator("image_channels", recipes.CHOICES["image_channels"].__contains__, message="must be 1 or 3")
flags.register_validator(
    "split",
    lambda value: value is None or re.fullmatch(recipes.SPLIT, value),
    message="must be three numbers of classes, e.g. 64,16,20",
)
for _name in ("logdir", "data_path", "test_data_path", "results_dir"):
    flags.register_validator(_name, lambda value: "\0" not in (value or ""), message="must not have a zero byte")


# How --help groups the flags. Those of the original come first in each group.
GROUPS = {
    "The run": "datasource logdir resume train log save_interval seed threads op_threads tasks_at_once tensor_float_32 "
    "deterministic",
    "The method": "meta_batch_size meta_lr update_batch_size update_lr num_updates metatrain_iterations "
    "pretrain_iterations baseline stop_grad adapt learn_update_lr loss network norm num_filters conv max_pool",
    "The data": "num_classes num_query data_path split image_size image_channels augment skip_broken val_tasks",
    "The test": "test_set test_iter train_update_batch_size train_update_lr test_tasks eval_seed test_datasource "
    "test_data_path query_norm test_updates query_shares results_dir",
}

UNEVEN_QUERY = 15  # queries a class, on average, under --query_shares: 75 of 5 classes (Veilleux et al., NeurIPS 2021)

# What the system may refuse and the user can mend. Any other OSError is a fault of this program, and has its traceback.
MENDABLE = {
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOSPC EDQUOT EIO EMFILE ENFILE ENAMETOOLONG ELOOP ENOTDIR EISDIR ESTALE".split()
    if hasattr(errno, name)
}


def start_devices(workers: Cluster | None = None) -> None:
    """Starts TensorFlow as the flags say, and meets the other processes of the run."""
    workers = workers or Cluster()
    devices.start(
        side_by_side(workers),
        FLAGS["op_threads"].value,
        tensor_float_32=FLAGS["tensor_float_32"].value,
        deterministic=FLAGS["deterministic"].value,
        join=workers.join,
        place=workers.place,
    )


# -- from flags to records ---------------------------------------------------------------------------------------------


def recipe_of(values: flags.FlagValues) -> Recipe:
    """Makes the recipe that flags describe: a value that is given, else the data set's, else the original's default.

    It changes no flag. Raises InputError where flags contradict each other.
    """
    name = values["datasource"].value
    row = DATASETS[name]
    fields = {field.name: values[flag].value for flag, field in recipes.FIELDS.items()}
    for flag, field in recipes.FIELDS.items():
        if field.name in row.defaults and values[flag].using_default_value:
            fields[field.name] = row.defaults[field.name]
    if fields["norm"] == "None":
        fields["norm"] = None
    fields["data_path"] = users_folder(name, data_set(name, "datasource", values["data_path"]))
    if row.images:
        for field, own in (("image_size", row.images.size[0]), ("image_channels", row.images.channels)):
            if fields[field] == own:
                fields[field] = None  # given or not, it is the data set's own
    for flag in ("loss", "network"):
        if not row.images and fields[flag] != recipes.DEFAULTS[flag]:
            raise InputError(f"--{flag}={fields[flag]} is for images, not for --datasource={name}: leave it out")
    if fields["augment"] and not (row.images and (fields["image_channels"] or row.images.channels) == 3):
        raise InputError(f"--augment is for photographs in colour, not for --datasource={name}: leave it out")
    if fields["network"] != "paper" and not fields["conv"]:
        raise InputError(f"--network={fields['network']} has convolutions: leave --conv=False out")
    if fields["baseline"] == "oracle":
        if row.images:
            raise InputError(f"--baseline=oracle is the sinusoid's, not for --datasource={name}: leave it out")
        # The oracle needs no adaptation, so all its iterations are pretraining (the original's main.py).
        fields["pretrain_steps"] += fields["metatrain_steps"]
        fields["metatrain_steps"] = 0
    return Recipe(**fields)


def trained_recipe(recipe: Recipe, values: flags.FlagValues) -> Recipe:
    """Makes the recipe of the training from that of a test, whose K and alpha may be others."""
    shot, inner_lr = values["train_update_batch_size"].value, values["train_update_lr"].value
    return dataclasses.replace(
        recipe,
        shot=recipe.shot if shot == -1 else shot,
        inner_lr=recipe.inner_lr if inner_lr == -1 else inner_lr,
    )


def defaults_taken(values: flags.FlagValues) -> list[str]:
    """Lists the flags, as --name=value, that have the data set's value since they are not given."""
    named = {recipes.FLAG_OF[field]: value for field, value in DATASETS[values["datasource"].value].defaults.items()}
    return [f"--{flag}={value}" for flag, value in named.items() if values[flag].using_default_value]


def parsed(arguments: list[str]) -> flags.FlagValues:
    """Reads a command's arguments, as another program has them. No flag of this process is changed."""
    values = copy.deepcopy(FLAGS)
    for name in values:
        values[name].unparse()
    values(["main.py", *arguments])
    return values


def run_folder(values: flags.FlagValues, kind: type[runs.Run] = runs.Run) -> runs.Run:
    """Finds the run folder that flags name."""
    recipe = recipe_of(values)
    trained = recipe if values.train else trained_recipe(recipe, values)
    return kind(Path(values.logdir) / trained.run_name)


def data_set(name: str, name_flag: str, path: flags.Flag) -> Dataset:
    """The data set of this name, its images in the folder that the flag `path` names, if it does."""
    row = DATASETS[name]
    if row.images is None or (row.images.folder and not path.value):
        return row
    if not path.value:
        raise InputError(f"--{name_flag}={name} has no folder of its own: name yours with --{path.name}")
    return row._replace(images=row.images._replace(folder=os.path.abspath(path.value)))


def users_folder(name: str, dataset: Dataset) -> str | None:
    """The folder by which a user's own images are told from another's; None: the data set's name is enough."""
    images = DATASETS[name].images
    return dataset.images.folder if images and images.folder is None else None


def trained_data_set(recipe: Recipe) -> Dataset:
    """The data set of a training, read as the recipe and the flags say."""
    dataset = recipe.dataset
    if dataset.images is None:
        return dataset
    folder = data_set(recipe.data_set, "datasource", FLAGS["data_path"]).images.folder
    any_size = dataset.images.any_size or FLAGS.image_size is not None
    return dataset._replace(images=dataset.images._replace(folder=folder, any_size=any_size))


def tested_data_set(recipe: Recipe) -> Dataset:
    """The data set of a test: that of the training, or --test_datasource, whose images are read as the training's."""
    if not FLAGS.test_datasource:
        if FLAGS.test_data_path:
            raise InputError("--test_data_path is the folder of --test_datasource: give that too, or --data_path")
        return trained_data_set(recipe)
    own = recipe.dataset.images
    if own is None:
        raise InputError(
            f"--test_datasource={FLAGS.test_datasource} has images, which a run of the {recipe.data_set} cannot take: "
            "leave it out"
        )
    other = data_set(FLAGS.test_datasource, "test_datasource", FLAGS["test_data_path"])
    any_size = other.images.any_size or FLAGS.image_size is not None or other.images.size != own.size
    images = other.images._replace(size=own.size, channels=own.channels, invert=own.invert, any_size=any_size)
    images = images._replace(augment=own.augment, any_size=any_size or own.augment)
    return other._replace(images=images._replace(split_sizes=own.split_sizes))


def open_data(
    dataset: Dataset, splits: tuple[str, ...], recipe: Recipe, training: bool, query_shares: str = "balanced"
) -> SinusoidTasks | ImageTasks:
    """Opens the source of tasks of a recipe, its folder checked, and prints what is there."""
    query = recipe.query_examples(training)
    if dataset.images is None:
        return SinusoidTasks(recipe.shot, query, oracle=recipe.baseline == "oracle")
    images = dataset.images._replace(skip_broken=FLAGS.skip_broken)
    folder = ROOT / images.folder
    data = ImageTasks.from_folder(images, folder, splits, recipe.way, recipe.shot, query, query_shares)
    found = "; ".join(
        f"{split} {len(classes.names):,} classes, {classes.counts.sum():,} images"
        for split, classes in data.classes.items()
    )
    say("Images of {}, read as {}x{}x{}: {}.".format(folder, *images.size, images.channels, found))
    return data


def layout(workers: Cluster | None = None) -> Layout:
    """Return the placement of tasks that the flags ask for. A GPU computes one group at a time, which may fill it."""
    workers = workers or Cluster()
    all_sum = workers.all_sum if workers.size > 1 else None
    if devices.gpus():
        return Layout(FLAGS["threads"].value or 1, FLAGS["tasks_at_once"].value, all_sum)
    return Layout(side_by_side(workers), FLAGS["tasks_at_once"].value or 1, all_sum)


def side_by_side(workers: Cluster) -> int:
    """How many groups of tasks this process computes side by side: the processes of a host share its cores."""
    return FLAGS["threads"].value or max(1, devices.cores() // workers.place[1])


def identity() -> dict[str, object]:
    """What must be alike in all processes of a run: the flags, but for --threads, and the code."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("[!.]*.py")))).hexdigest()[:16]
    names = " ".join(GROUPS.values()).split()
    given = {f"--{name}": FLAGS[name].value for name in names if name != "threads"}
    return given | {"code with the checksum": code, "TensorFlow": tf.__version__, "GPUs": devices.gpus()}


# -- how the program starts and ends -----------------------------------------------------------------------------------


def run(argv: list[str]) -> None:
    """Runs main. What the user can mend is told in one line; any other error is a fault here, and has its traceback."""
    workers = Cluster()
    try:
        workers = cluster.of_environment()
        main(argv, workers)
    except InputError as error:
        fail(workers.failed(error))
    except BrokenPipeError as error:  # the reader of what is printed, such as head, has enough
        with open(os.devnull, "w") as sys.stdout:  # else Python writes what is left there, once more, at its end
            fail(
                f"nobody reads what is printed ({error.strerror}): give the same command again, and training goes on "
                "from the last checkpoint"
            )
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        fail(workers.failed(error))
    except tf.errors.ResourceExhaustedError as error:
        fail(
            f"the memory is too small ({error.message.splitlines()[0]}): compute fewer tasks at once, with a small "
            "--tasks_at_once, such as 1"
        )
    except tf.errors.OpError as error:
        workers.lost(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags. Wrong ones are told in one line; --help prints the flags in groups."""
    if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(help_text())
        sys.exit(0)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(f"{' '.join(str(error).split())} (python main.py --help lists the flags)")


def fail(error: object) -> NoReturn:
    """Ends the program with one line on stderr."""
    say(f"main.py: {error}", sys.stderr)
    sys.exit(1)


def help_text() -> str:
    """What --help prints."""
    lines = [__doc__]
    for group, names in GROUPS.items():
        lines.append(f"{group}:\n")
        for name in names.split():
            flag = FLAGS[name]
            default = "none" if flag.default is None else flag.default_as_str.strip("'")
            lines.append(f"  --{'[no]' * flag.boolean}{name}: (default: {default})")
            lines.append(textwrap.fill(flag.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
        lines.append("")
    return "\n".join(lines)


def fit_picture(maml: MAML, shot: int) -> np.ndarray | None:
    """The first test task of the sinusoid, before and after updates, as plot.py draws it; None without matplotlib."""
    try:
        import plot
    except ImportError:
        return None
    task = SinusoidTasks(shot, shot, oracle=True).draw(FLAGS.eval_seed, "test", 0, 1)
    return plot.pixels(plot.sinusoid_figure({"This run": (maml.inner, maml.values())}, [task]))


# -- the program -------------------------------------------------------------------------------------------------------


def train_run(recipe: Recipe, workers: Cluster) -> None:
    """Trains the run of a recipe. Exits with the signal's code where a signal stopped it."""
    run, dataset = run_folder(FLAGS, runs.Run if workers.chief else runs.ReadOnlyRun), trained_data_set(recipe)
    share, at_once = workers.share(recipe.meta_batch), layout(workers).group
    if at_once and share % at_once:
        shared = f", shared by {workers.size} processes" if workers.size > 1 else ""
        raise InputError(
            f"--tasks_at_once={at_once} does not divide --meta_batch_size={recipe.meta_batch}{shared}: give a number "
            "that does"
        )
    recipes.check_training(dataclasses.replace(recipe, meta_batch=share), layout(workers))
    maml = recipes.build(recipe, layout(workers))
    if maml.inner.network.steps_a_call > 1 and workers.size > 1:
        raise InputError(
            f"the network of --datasource={recipe.data_set} is so small that {workers.size} processes would be slower "
            "than one: start one"
        )
    settings = train.Settings(
        val_split="test" if FLAGS.test_set else "val",
        val_tasks=FLAGS.val_tasks,
        eval_seed=FLAGS.eval_seed,
        save_interval=FLAGS.save_interval,
        log=FLAGS.log,
    )
    with run.locked():
        run.check(recipes.to_flags(recipe), recipes.DEFAULTS, FLAGS.resume)
        data = open_data(dataset, ("train", settings.val_split), recipe, training=True)
        workers.ready(run.folder)
        with stopping_on_signals() as own_stop:
            stop = workers.agreed(own_stop)
            picture = functools.partial(fit_picture, shot=recipe.shot) if dataset.images is None else None
            finished = train.train(recipe, run, maml, data, settings, stop, picture, workers)
            workers.leave()
    if not finished:
        sys.exit(128 + signal.Signals[stop.reason])


def test_run(recipe: Recipe, workers: Cluster) -> None:
    """Tests a checkpoint on --test_tasks tasks, always the same ones. recipe: with the K and alpha of the test."""
    trained, run = trained_recipe(recipe, FLAGS), run_folder(FLAGS)
    if FLAGS.query_norm != "batch" and recipe.norm != "batch_norm":
        raise InputError(
            f"--query_norm={FLAGS.query_norm} is for batch norm, and with --norm={recipe.norm} it changes nothing: "
            "leave it out"
        )
    if recipe.learn_inner_lr != "none" and FLAGS.train_update_lr != -1:
        raise InputError(
            f"--train_update_lr is for a test with another alpha, and with --learn_update_lr={recipe.learn_inner_lr} "
            "the learned step sizes are taken: leave it out, and give the --update_lr of the training"
        )
    uneven = FLAGS.query_shares != "balanced"
    if uneven and not recipe.dataset.images:
        raise InputError(f"--query_shares={FLAGS.query_shares} is for classes, which the {recipe.data_set} has not")
    prefix = run.checkpoint(FLAGS.test_iter)
    expected = recipes.to_flags(trained)
    del expected["num_query"]  # at test it is the test's own, and so is --split where other data are tested
    if FLAGS.test_datasource:
        del expected["split"]
    run.check_flags(expected, recipes.DEFAULTS, training=False)
    results = Path(FLAGS.results_dir) if FLAGS.results_dir else run.folder
    if workers.chief:
        runs.check_writable(results, "--results_dir")
    dataset = tested_data_set(recipe)
    protocol = evaluate.Protocol(
        split="test" if FLAGS.test_set else "val",
        shot=recipe.shot,
        inner_lr=recipe.inner_lr,
        query=FLAGS.num_query,
        other_data_set=FLAGS.test_datasource,
        data_folder=users_folder(FLAGS.test_datasource or recipe.data_set, dataset),
        class_split=FLAGS.split,
        tasks=FLAGS.test_tasks,
        task_seed=FLAGS.eval_seed,
        query_norm=FLAGS.query_norm,
        updates=FLAGS.test_updates,
        query_shares=FLAGS.query_shares,
    )
    asked = dataclasses.replace(recipe, query=UNEVEN_QUERY if uneven and FLAGS.num_query == -1 else FLAGS.num_query)
    groups, at_once, *_ = layout(workers)
    recipes.check_test(asked, min(groups * at_once or evaluate.GROUP, FLAGS.test_tasks))
    data = open_data(dataset, (protocol.split,), asked, training=False, query_shares=FLAGS.query_shares)
    maml = recipes.build(recipe, layout(workers))
    if FLAGS.test_iter == -1:
        prefix = run.restore_newest(maml)
    else:
        run.restore(maml, prefix)
    say(f"Restoring model weights from {prefix}")
    workers.ready()
    workers.check_alike({"the checkpoint": Path(prefix).name}, "give all processes one --logdir that they share")
    evaluate.check_same_classes(data, workers)
    evaluate.test(maml, data, trained, protocol, run, prefix, results, workers)
    workers.leave()


def main(argv: list[str], workers: Cluster) -> None:
    """Trains, or tests, as the flags say, in one process or as one of several."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]}: flags are written --name=value")
    logging.set_verbosity(logging.WARNING)  # TensorFlow tells about every checkpoint
    start_devices(workers)
    workers.check_alike(identity(), "give all processes the same flags and files, except for --threads")
    if workers.size > 1:
        print(f"{workers.size} processes compute this run. This one is process 0, which alone prints and writes.")
    if devices.gpus():
        settings = [
            f"{name} {'on' if devices.computed()[name] else 'off'}" for name in ("tensor_float_32", "deterministic")
        ]
        say(f"Computed on {', '.join(devices.gpus())}: {', '.join(settings)}.")
    recipe = recipe_of(FLAGS)
    if taken := defaults_taken(FLAGS):
        print(f"Defaults of --datasource={recipe.data_set}: {' '.join(taken)}")
    if FLAGS.train:
        train_run(recipe, workers)
    else:
        test_run(recipe, workers)


if __name__ == "__main__":
    app.run(run, flags_parser=parse)
