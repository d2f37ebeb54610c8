"""Train and test MAML (Finn, Abbeel, Levine, ICML 2017) on sinusoid regression and few-shot image classification.

The paper's commands:

  10-shot sinusoid (MAML, the oracle, and the pretrained baseline):
    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 --norm=None --update_batch_size=10
    python main.py --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10 --baseline=oracle
    python main.py --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10

  Omniglot 5-way and 20-way, 1-shot:
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=16 --update_batch_size=1 --num_classes=20 --update_lr=0.1 --num_updates=5 --logdir=logs/omniglot20way/

  MiniImagenet 5-way, 1-shot and 5-shot:
    python main.py --datasource=miniimagenet --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/miniimagenet1shot/ --num_filters=32 --max_pool=True
    python main.py --datasource=miniimagenet --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=5 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/miniimagenet5shot/ --num_filters=32 --max_pool=True

Each command resumes where it stopped. With --train=False --test_set=True it tests the model instead. With --run you can
resume or test a run without repeating its flags:

  python main.py --run=logs/omniglot5way/<run>
  python main.py --run=logs/omniglot5way/<run> --train=False --test_set=True

This tests two runs on the same tasks:

  python main.py --run=logs/omniglot5way/<run> --compare=logs/omniglot5way/<other run> --train=False --test_set=True

Your own images, in DIR/<class>/, with 64 classes to train on, 16 to validate and 20 to test:

  python main.py --datasource=folder --data_path=DIR --split=64,16,20 --update_batch_size=1 --logdir=logs/own/

Batch norm makes evaluation transductive, as in the paper: a task's query images are normalized together, unless
--query_norm=support is given.
"""  # noqa: E501

# Modules that need TensorFlow are imported in functions, so that --help and mistyped flags are answered at once.
import contextlib
import copy
import dataclasses
import errno
import functools
import os
import re
import signal
import sys
import textwrap
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags

import recipe as recipes
from files import InputError, os_error, read_json, say
from recipe import DATASETS, EXAMPLES, GROUPS, QUERY_NORMS, QUERY_SHARES, Dataset, Flag, Range, Recipe

if TYPE_CHECKING:
    import numpy as np

    from cluster import Cluster
    from data_generator import ImageTasks, SinusoidTasks
    from maml import MAML
    from parallel import Layout
    from runs import Run

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parent
THREADS = Range(0, 1024)

# Flags on which a run's numbers do not depend. The others are the fields of Recipe.
OTHER_FLAGS = (
    Flag(
        "run",
        None,
        "A run folder to resume, or to test with --train=False. Its flags.json sets all other flags. Flags given with "
        "--run must agree with it, except K, alpha, Q and the other test flags, the --data_path of a moved folder, and "
        "the numbers of iterations.",
        "run",
    ),
    Flag("logdir", "/tmp/data", "Folder in which the run gets its own folder, named after its flags.", "run"),
    Flag(
        "resume",
        True,
        "Continue from the run's latest checkpoint, as if it had never stopped.",
        "run",
        bool,
    ),
    Flag("train", True, "Train; --train=False: test.", "run", bool),
    Flag("log", True, "Write TensorBoard events.", "run", bool),
    Flag(
        "save_interval",
        1000,
        "Iterations between checkpoints; the latest ten are kept.",
        "run",
        int,
        recipes.ITERATIONS._replace(least=1),
    ),
    Flag(
        "threads",
        0,
        "Tasks to compute in parallel, one per core; 0: as many as there are cores. On a GPU: groups to compute in "
        "parallel; 0: one.",
        "run",
        int,
        THREADS,
    ),
    Flag(
        "op_threads",
        1,
        "Cores per operation. Use 2 or more if a step has fewer tasks than the machine has cores. Changes rounding.",
        "run",
        int,
        THREADS._replace(least=1),
    ),
    Flag(
        "tasks_at_once",
        0,
        "Tasks per group. Each operation computes all tasks of a group together. Must divide meta_batch_size. A CPU "
        "computes one group per core; a GPU, by default, one group at a time. 0: one task on a CPU, the whole "
        "meta-batch on a GPU. Lower it if memory runs out.",
        "run",
        int,
        Range(0, EXAMPLES.most),
    ),
    Flag(
        "tensor_float_32",
        False,
        "Allow TensorFloat-32 on GPUs (faster, but less accurate meta-gradients).",
        "run",
        bool,
    ),
    Flag(
        "deterministic",
        False,
        "Make results on a GPU bitwise reproducible, as they are on a CPU. May be slower.",
        "run",
        bool,
    ),
    Flag("skip_broken", False, "Leave out unreadable images and list them, instead of stopping.", "data", bool),
    Flag(
        "val_tasks",
        200,
        "Number of validation tasks, tested every 500 iterations (images only). They decide which checkpoint is best.",
        "data",
        int,
        EXAMPLES,
    ),
    Flag(
        "test_set",
        False,
        "Test on the test classes instead of the validation classes. In training: validate on the test classes.",
        "test",
        bool,
    ),
    Flag(
        "test_iter",
        -1,
        "Iteration of the checkpoint to test; -1: the latest; best: the most accurate on validation tasks, after J "
        "updates. Paper, MiniImagenet: best.",
        "test",
    ),
    Flag(
        "train_update_batch_size",
        -1,
        "At test time without --run: the K of training, if different. It is part of the run folder's name.",
        "test",
        int,
        recipes.QUERIES,
    ),
    Flag(
        "train_update_lr",
        -1.0,
        "At test time without --run: the alpha of training, if different. It is part of the run folder's name.",
        "test",
        float,
        recipes.RATE._replace(also=(-1,)),
    ),
    Flag(
        "test_num_classes",
        -1,
        "Classes per test task, 2 to the num_classes of training: the test uses the first outputs of the model. -1: as "
        "in training.",
        "test",
        int,
        Range(2, 10**6, also=(-1,)),
    ),
    Flag("test_tasks", 600, "Number of test tasks. Paper: 600.", "test", int, EXAMPLES),
    Flag(
        "eval_seed",
        0,
        "Seed of the validation and test tasks, independent of --seed.",
        "test",
        int,
        recipes.SEED,
    ),
    Flag(
        "test_datasource",
        None,
        "At test time: the data set to draw tasks from, if not --datasource. Its images are read like the run's: with "
        "the same size and channels, and inverted for an Omniglot run (dark ink on white paper becomes 1).",
        "test",
        accepts=(None, *(name for name, dataset in DATASETS.items() if dataset.images)),
    ),
    Flag("test_data_path", None, "Image folder of --test_datasource, if not its default in data/.", "test"),
    Flag(
        "query_norm",
        "batch",
        "At test time, under batch norm: normalize a query image with its task's other query images (batch; "
        "transductive, as in the paper), or with the support set only (support).",
        "test",
        accepts=QUERY_NORMS,
    ),
    Flag(
        "test_updates",
        -1,
        "Updates at test time. -1, as in the original: 10, or num_updates if that is more.",
        "test",
        int,
        recipes.DEFINITIONS["num_updates"].accepts._replace(also=(-1,)),
    ),
    Flag(
        "query_shares",
        "balanced",
        "At test time: num_query queries per class (balanced), or the same total, divided among the classes at "
        "random by a Dirichlet distribution with concentration 2 (dirichlet). num_query then defaults to 15.",
        "test",
        accepts=QUERY_SHARES,
    ),
    Flag("results_dir", None, "Folder for the result files of a test, if not the run folder.", "test"),
    Flag(
        "compare",
        None,
        "At test time: the folder of a second run. Test it and --run on the same tasks, print both results and the "
        "paired difference, and write no files. The flags of a test apply to both runs.",
        "test",
    ),
)
ALL_FLAGS = {flag.name: flag for flag in (*recipes.DEFINITIONS.values(), *OTHER_FLAGS)}
PATHS = {"run", "compare", "logdir", "data_path", "test_data_path", "results_dir"}
UNEVEN_QUERY = (
    15  # queries per class, on average, under --query_shares: 75 of 5 classes (Veilleux et al., NeurIPS 2021)
)
# Flags of the recipe that may be given next to --run: in training, and at test.
TRAIN_OVERRIDES = {"pretrain_iterations", "metatrain_iterations", "data_path"}
TEST_OVERRIDES = {"update_batch_size", "update_lr", "num_query", "split", "data_path"}

# OS errors that the user can fix. Any other OSError is a bug, and is printed with its traceback.
FIXABLE = {
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOSPC EDQUOT EIO EMFILE ENFILE ENAMETOOLONG ELOOP ENOTDIR EISDIR ESTALE".split()
    if hasattr(errno, name)
}


# -- flags ------------------------------------------------------------------------------------------------------------


class _Checkpoint(flags.ArgumentParser):
    """An iteration, -1, or best."""

    syntactic_help = "an integer or best"

    def parse(self, argument):
        if argument == "best":
            return argument
        if int(argument) < -1:
            raise ValueError("must be an iteration, -1 for the latest, or best")
        return int(argument)


class _Path(flags.ArgumentParser):
    """A path. `~` is the home folder."""

    def parse(self, argument):
        return os.path.expanduser(argument)


def define(flag: Flag) -> None:
    """Make absl's flag of a definition."""
    name, default, help, _, kind, accepts = flag
    if name == "test_iter":
        flags.DEFINE(_Checkpoint(), name, default, help)
    elif name in PATHS:
        flags.DEFINE(_Path(), name, default, help)
    elif kind is str and accepts is not None:
        flags.DEFINE_enum(name, default, [str(one) for one in accepts if one is not None or default is not None], help)
    else:
        {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}[kind](
            name, default, help
        )
        if accepts is not None:
            message = f"must be {accepts if isinstance(accepts, Range) else ' or '.join(map(str, accepts[1:]))}"
            flags.register_validator(name, lambda value: value is None or value in accepts, message=message)
        elif name == "split":
            flags.register_validator(
                name,
                lambda value: value is None or re.fullmatch(recipes.SPLIT, value),
                message="must be three numbers of classes, e.g. 64,16,20",
            )


for _flag in ALL_FLAGS.values():
    define(_flag)


def parse(argv: list[str]) -> list[str]:
    """Read the flags. Report wrong ones in one line; --help prints the flags in groups."""
    if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
        try:
            print(help_text(), flush=True)
        except BrokenPipeError:
            discard_stdout()
        sys.exit(0)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(f"{' '.join(str(error).split())} (python main.py --help lists the flags)")


def help_text() -> str:
    """Return what --help prints."""
    lines = [__doc__]
    for group, title in GROUPS.items():
        lines.append(f"{title}:\n")
        for flag in (FLAGS[name] for name, definition in ALL_FLAGS.items() if definition.group == group):
            default = "none" if flag.default is None else flag.default_as_str.strip("'")
            lines.append(f"  --{'[no]' * flag.boolean}{flag.name}: (default: {default})")
            lines.append(textwrap.fill(flag.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
        lines.append("")
    return "\n".join(lines)


def parsed(arguments: list[str]) -> flags.FlagValues:
    """Return a command's flags, without changing those of this process."""
    values = copy.deepcopy(FLAGS)
    for name in values:
        values[name].unparse()
    values(["main.py", *arguments])
    return values


# -- from flags to records --------------------------------------------------------------------------------------------


def recipe_of(values: flags.FlagValues) -> Recipe:
    """Return the recipe that flags describe: the flag given, else the data set's value, else the original's default.

    It changes no flag. Raise InputError if flags contradict each other.
    """
    if values["run"].value:
        return _recipe_of_run(values)
    name = values["datasource"].value
    row = DATASETS[name]
    fields = {field: _value(values, flag, row.images) for flag, field in recipes.FIELDS.items()}
    for flag, field in recipes.FIELDS.items():
        if field in row.defaults and values[flag].using_default_value:
            fields[field] = row.defaults[field]
    fields["data_path"] = users_folder(name, data_set(name, "datasource", values["data_path"]))
    for flag in ("loss", "network"):
        if not row.images and fields[flag] != recipes.DEFAULTS[flag]:
            raise InputError(f"--{flag}={fields[flag]}: is for images, not for --datasource={name}; leave it out")
    if fields["augment"] and not (row.images and (fields["image_channels"] or row.images.channels) == 3):
        raise InputError(f"--augment: is for color photographs, not for --datasource={name}; leave it out")
    if fields["network"] != "paper" and not fields["conv"]:
        raise InputError(f"--network={fields['network']}: is convolutional; leave out --conv=False")
    if fields["baseline"] == "oracle":
        if row.images:
            raise InputError(f"--baseline=oracle: is for the sinusoid, not for --datasource={name}; leave it out")
        # The oracle needs no adaptation, so all its iterations are pretraining (the original's main.py).
        fields["pretrain_steps"] += fields["metatrain_steps"]
        fields["metatrain_steps"] = 0
    return Recipe(**fields)


def _value(values, flag, images):
    """Return a flag's value; --norm=None is None, and so is the data set's own image size and number of channels."""
    value = values[flag].value
    own = images and {"image_size": images.size[0], "image_channels": images.channels}.get(flag)
    return None if value == own or (flag == "norm" and value == "None") else value


def recorded(values: flags.FlagValues) -> dict:
    """Return the flags.json of the folder of --run; for the authors' released model, the flags in its folder's name."""
    folder = Path(values["run"].value)
    try:
        return read_json(folder / "flags.json", dict, "put a copy in its place, or choose another run")
    except FileNotFoundError:
        if not folder.is_dir():
            raise InputError(f"--run={folder}: no such folder; choose a run folder") from None
        if below := sorted(path.parent.name for path in folder.glob("[!.]*/flags.json")):
            raise InputError(f"--run={folder}: holds runs; choose one of them: {', '.join(below)}") from None
        if not values["datasource"].present:
            raise InputError(f"--run={folder}: has no flags.json; give its data set as --datasource") from None
        return recipes.to_flags(recipes.from_run_name(folder.resolve().name, values["datasource"].value))


def _recorded_recipe(values):
    """Return the recipe in the flags.json of --run."""
    return recipes.from_flags(recorded(values), str(Path(values["run"].value) / "flags.json"))


def _recipe_of_run(values):
    """Return the recipe of --run, with the flags given next to it that may differ. Refuse the others."""
    trained, folder = _recorded_recipe(values), values["run"].value
    images = DATASETS[trained.data_set].images
    allowed, changed = TRAIN_OVERRIDES if values["train"].value else TEST_OVERRIDES, {}
    for name in ("logdir", "train_update_batch_size", "train_update_lr"):
        if values[name].present:
            raise InputError(f"--{name}: is known from --run; leave it out")
    for flag, field in recipes.FIELDS.items():
        if not values[flag].present or (value := _value(values, flag, images)) == getattr(trained, field):
            continue
        if flag not in allowed:
            fix = (
                f"give --test_updates={value}"
                if flag == "num_updates" and not values["train"].value
                else "leave it out"
            )
            raise InputError(f"--{flag}={value}: the run in {folder} has {getattr(trained, field)}; {fix}")
        if flag != "data_path":  # the folder of the images may have moved; it is the same run
            changed[field] = value
    if values["test_datasource"].value and not values["split"].present:
        changed["split"] = None  # that of training does not apply to a different data set
    if trained.baseline == "oracle" and "metatrain_steps" in changed:  # see recipe_of
        changed["pretrain_steps"] = changed.get("pretrain_steps", 0) + changed.pop("metatrain_steps")
    return dataclasses.replace(trained, **changed)


def images_folder(values: flags.FlagValues) -> str | None:
    """Return the folder of a run's images: --data_path, or the folder that --run records, if it still exists."""
    if values["data_path"].value:
        return os.path.abspath(values["data_path"].value)
    if not values["run"].value:
        return None
    folder = recorded(values).get("data", {}).get("folder")
    return folder if folder and os.path.isdir(folder) else None


def images_record() -> dict[str, object]:
    """Return what flags.json says about the images beyond the recipe, so that --run finds them again."""
    folder = images_folder(FLAGS)
    return ({"folder": folder} if folder else {}) | ({"skip_broken": True} if skips_broken() else {})


def skips_broken() -> bool:
    """Return whether unreadable images are left out, as the flag or the run's record says."""
    return FLAGS.skip_broken or bool(FLAGS.run and recorded(FLAGS).get("data", {}).get("skip_broken"))


def trained_recipe(recipe: Recipe, values: flags.FlagValues) -> Recipe:
    """Return the recipe of the training, given that of a test, which may have a different K and alpha."""
    if values["run"].value:
        return _recorded_recipe(values)
    shot, inner_lr = values["train_update_batch_size"].value, values["train_update_lr"].value
    return dataclasses.replace(
        recipe,
        shot=recipe.shot if shot == -1 else shot,
        inner_lr=recipe.inner_lr if inner_lr == -1 else inner_lr,
    )


def defaults_taken(values: flags.FlagValues) -> list[str]:
    """Return the flags, as --name=value, that have the data set's value because they are not given."""
    if values["run"].value:
        return []
    flag_of = {field: flag for flag, field in recipes.FIELDS.items()}
    named = {flag_of[field]: value for field, value in DATASETS[values["datasource"].value].defaults.items()}
    return [f"--{flag}={value}" for flag, value in named.items() if values[flag].using_default_value]


def run_path(values: flags.FlagValues) -> Path:
    """Return the path of the run folder that flags name, whether it exists or not."""
    if values["run"].value:
        return Path(values["run"].value)
    recipe = recipe_of(values)
    trained = recipe if values.train else trained_recipe(recipe, values)
    return Path(values.logdir) / trained.run_name


def run_folder(values: flags.FlagValues, kind: "type[Run] | None" = None) -> "Run":
    """Return the run folder that flags name."""
    import runs

    return (kind or runs.Run)(run_path(values))


def data_set(name: str, name_flag: str, path: flags.Flag) -> Dataset:
    """Return the data set of this name, with its images in the folder that the flag `path` names, if any."""
    row = DATASETS[name]
    if row.images is None or (row.images.folder and not path.value):
        return row
    if not path.value:
        raise InputError(f"--{name_flag}={name}: has no folder of its own; give yours as --{path.name}")
    return row._replace(images=row.images._replace(folder=os.path.abspath(path.value)))


def users_folder(name: str, dataset: Dataset) -> str | None:
    """Return the folder that identifies a user's own images, or None for a data set that its name identifies."""
    images = DATASETS[name].images
    return dataset.images.folder if images and images.folder is None else None


def trained_data_set(recipe: Recipe) -> Dataset:
    """Return the data set of a training, read as the recipe and the flags say."""
    dataset = recipe.dataset
    if dataset.images is None:
        return dataset
    folder = images_folder(FLAGS) or dataset.images.folder
    any_size = dataset.images.any_size or FLAGS.image_size is not None or recipe.image_size is not None
    return dataset._replace(images=dataset.images._replace(folder=folder, any_size=any_size))


def tested_data_set(recipe: Recipe) -> Dataset:
    """Return the data set of a test: that of the training, or --test_datasource, with images read as the training's."""
    if not FLAGS.test_datasource:
        if FLAGS.test_data_path:
            raise InputError("--test_data_path: is the folder of --test_datasource; give that, too, or --data_path")
        return trained_data_set(recipe)
    own = recipe.dataset.images
    if own is None:
        raise InputError(
            f"--test_datasource={FLAGS.test_datasource}: is for image runs, not {recipe.data_set} runs; leave it out"
        )
    other = data_set(FLAGS.test_datasource, "test_datasource", FLAGS["test_data_path"])
    any_size = other.images.any_size or FLAGS.image_size is not None or other.images.size != own.size
    images = other.images._replace(size=own.size, channels=own.channels, invert=own.invert, any_size=any_size)
    images = images._replace(augment=own.augment, any_size=any_size or own.augment)
    return other._replace(images=images._replace(split_sizes=own.split_sizes))


def unmoved(recipe: Recipe, run: "Run") -> Recipe:
    """Return the recipe with the image folder that its run records, if --data_path holds the same images.

    They are the same if the classes and their numbers of images are. A moved folder thus does not change the run.
    """
    from images import SPLITS, count_splits

    if FLAGS.run or not recipe.data_path or not run.iterations():
        return recipe
    path = run.folder / "flags.json"
    try:
        there = recipes.from_flags(read_json(path, dict, "restore a copy, or choose another --logdir"), str(path))
    except FileNotFoundError:
        return recipe
    if not there.data_path or there.data_path == recipe.data_path:
        return recipe
    counts = count_splits(there.dataset.images, Path(recipe.data_path), (), SPLITS)
    return dataclasses.replace(recipe, data_path=there.data_path) if run.has_classes(counts) else recipe


def open_data(
    dataset: Dataset, splits: tuple[str, ...], recipe: Recipe, training: bool, query_shares: str = "balanced"
) -> "SinusoidTasks | ImageTasks":
    """Open the tasks of a recipe, check their folder, and print the classes found. Training counts all splits."""
    from data_generator import ImageTasks, SinusoidTasks
    from images import SPLITS

    query = recipe.query_examples(training)
    if dataset.images is None:
        return SinusoidTasks(recipe.shot, query, oracle=recipe.baseline == "oracle")
    images, folder = dataset.images._replace(skip_broken=skips_broken()), ROOT / dataset.images.folder
    others = tuple(split for split in SPLITS if split not in splits) if training else ()
    data = ImageTasks.from_folder(images, folder, splits, recipe.way, recipe.shot, query, query_shares, others)
    found = "; ".join(
        f"{split} {len(classes.names):,} classes, {classes.counts.sum():,} images"
        for split, classes in data.classes.items()
    )
    say("Images of {}, read as {}x{}x{}: {}.".format(folder, *images.size, images.channels, found))
    return data


# -- the machine ------------------------------------------------------------------------------------------------------


def choose_kernels(values: flags.FlagValues) -> None:
    """Choose TensorFlow's kernels, before it is imported: oneDNN for photographs, which halves the time of a step.

    A run keeps the kernels it began with. If its folder does not record them, it began with TensorFlow's default.
    """
    import devices

    folder = run_path(values)
    images = DATASETS[recipe_of(values).data_set].images
    onednn = images is not None and images.channels == 3
    if any(folder.glob("model*.index")):
        records = []
        with contextlib.suppress(FileNotFoundError):
            records = read_json(folder / "computed.json", list, "move it away", dict)
        onednn = bool(records and records[-1].get("onednn"))
    devices.prefer_onednn(onednn)


def start_devices(workers: "Cluster | None" = None) -> None:
    """Start TensorFlow with the settings of the flags, and join the other processes of the run."""
    import devices
    from cluster import Cluster

    workers = workers or Cluster()
    devices.start(
        side_by_side(workers),
        FLAGS["op_threads"].value,
        tensor_float_32=FLAGS["tensor_float_32"].value,
        deterministic=FLAGS["deterministic"].value,
        join=workers.join,
        place=workers.place,
    )


def layout(workers: "Cluster | None" = None) -> "Layout":
    """Return the placement of tasks that the flags ask for. A GPU computes one group at a time, which may fill it."""
    import devices
    from cluster import Cluster
    from parallel import Layout

    workers = workers or Cluster()
    all_sum = workers.all_sum if workers.size > 1 else None
    if devices.gpus():
        return Layout(FLAGS["threads"].value or 1, FLAGS["tasks_at_once"].value, all_sum)
    return Layout(side_by_side(workers), FLAGS["tasks_at_once"].value or 1, all_sum)


def side_by_side(workers: "Cluster") -> int:
    """Return how many groups of tasks this process computes in parallel: the processes of a host share its cores."""
    import devices

    return FLAGS["threads"].value or max(1, devices.cores() // workers.place[1])


def identity() -> dict[str, int]:
    """Return checksums of what all processes of a run must have in common: the flags except --threads, and the code."""
    import tensorflow as tf

    import devices

    given = {name: FLAGS[name].value for name in ALL_FLAGS if name != "threads"}
    code = [path.read_bytes() for path in sorted(ROOT.glob("[!.]*.py"))], tf.__version__, devices.gpus()
    return {"flags": zlib.crc32(repr(given).encode()), "code": zlib.crc32(repr(code).encode())}


# -- the program ------------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> None:
    """Run main. Print an error that the user can fix on one line; any other error is a bug and keeps its traceback."""
    workers = None
    try:
        choose_kernels(FLAGS)  # wrong flags are reported here, before TensorFlow is imported, which takes seconds
        import cluster

        workers = cluster.Cluster()
        workers = cluster.of_environment()
        main(argv, workers)
        sys.stdout.flush()
    except InputError as error:
        if workers:
            workers.failed()
        fail(error)
    except BrokenPipeError as error:
        discard_stdout()
        fail(f"stdout: {error.strerror}; run the same command again to continue from the last checkpoint")
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        if workers:
            workers.failed()
        fail(os_error(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        errors = sys.modules["tensorflow"].errors if "tensorflow" in sys.modules else None
        if errors and isinstance(error, errors.ResourceExhaustedError):
            fail(f"out of memory ({error.message.splitlines()[0]}); lower --tasks_at_once, or --threads on a CPU")
        if not (errors and isinstance(error, errors.OpError)):
            raise
        workers.lost(error)


def fail(error: object) -> NoReturn:
    """End the program with one line on stderr."""
    with contextlib.suppress(OSError):  # a full disk
        say(f"main.py: {error}", sys.stderr)
    sys.exit(1)


def discard_stdout() -> None:
    """Discard further output, because the reader of stdout, such as head, has closed the pipe."""
    with contextlib.suppress(OSError):  # a notebook's stdout is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str], workers: "Cluster") -> None:
    """Train or test, as the flags say, in one process or as one of several."""
    from absl import logging

    import devices

    if len(argv) > 1:
        raise InputError(f"{argv[1]}: unexpected argument; flags are written --name=value")
    logging.set_verbosity(logging.WARNING)  # TensorFlow reports every checkpoint
    start_devices(workers)
    workers.check_same(**identity())
    if workers.size > 1:
        print(f"{workers.size} processes compute this run. This is process 0, which alone prints and writes.")
    if devices.gpus():
        settings = [
            f"{name} {'on' if devices.computed()[name] else 'off'}" for name in ("tensor_float_32", "deterministic")
        ]
        say(f"Computed on {', '.join(devices.gpus())}: {', '.join(settings)}.")
    else:
        cores = FLAGS.threads or devices.cores()
        print(f"Computed on {devices.processor() or 'CPU'}, {cores} core{'s' * (cores > 1)}.")
    recipe = recipe_of(FLAGS)
    if taken := defaults_taken(FLAGS):
        print(f"Defaults of --datasource={recipe.data_set}: {' '.join(taken)}")
    if FLAGS.compare:
        compare_runs(recipe, workers)
    elif FLAGS.train:
        train_run(recipe, workers)
    else:
        test_run(recipe, workers)


def train_run(recipe: Recipe, workers: "Cluster") -> None:
    """Train the run of a recipe. Exit with the signal's code if a signal stopped it."""
    import devices
    import runs
    import train
    from cluster import stopping_on_signals

    run, dataset = run_folder(FLAGS, runs.Run if workers.chief else runs.ReadOnlyRun), trained_data_set(recipe)
    share, placed = workers.share(recipe.meta_batch), layout(workers)
    if placed.group and share % placed.group:
        shared = f", shared by {workers.size} processes" if workers.size > 1 else ""
        raise InputError(
            f"--tasks_at_once={placed.group}: must divide the meta-batch size ({recipe.meta_batch}{shared})"
        )
    if not devices.gpus():
        recipes.check_memory(dataclasses.replace(recipe, meta_batch=share), placed, devices.memory())
        if FLAGS.op_threads == 1 and placed.cores >= 2 * share and dataset.images:
            threads = placed.cores // share
            print(
                f"A step has {share} tasks for {placed.cores} cores; --op_threads={threads} uses more of them, but "
                "changes rounding."
            )
    maml = recipes.build(recipe, placed)
    if maml.inner.network.steps_a_call > 1 and workers.size > 1:
        raise InputError(
            f"--datasource={recipe.data_set}: its network is so small that {workers.size} processes would be slower "
            "than one; start one"
        )
    settings = train.Settings(
        val_split="test" if FLAGS.test_set else "val",
        val_tasks=FLAGS.val_tasks,
        eval_seed=FLAGS.eval_seed,
        save_interval=FLAGS.save_interval,
        log=FLAGS.log,
        data=images_record(),
    )
    with run.locked():
        recipe = unmoved(recipe, run)
        run.check(recipes.to_flags(recipe), recipes.DEFAULTS, FLAGS.resume)
        data = open_data(dataset, ("train", settings.val_split), recipe, training=True)
        if workers.chief and dataset.images:
            warn_about_test(data, dataset.images.folder, recipe)
            warn_about_step_size(recipe)
        with stopping_on_signals() as own_stop:
            stop = workers.agreed(own_stop)
            picture = functools.partial(fit_picture, shot=recipe.shot) if dataset.images is None else None
            finished = train.train(recipe, run, maml, data, settings, stop, picture, workers)
            workers.leave()
    if not finished:
        sys.exit(128 + signal.Signals[stop.reason])


def warn_about_test(data: "ImageTasks", folder: str, recipe: Recipe) -> None:
    """Warn if the run could not be tested on its test classes, with the flags of its training."""
    from data_generator import shortage

    query = recipe.query_examples(training=False)
    what, fix = shortage({"test": data.counts["test"]}, recipe.way, recipe.shot + query)
    if what:
        say(f"WARNING: {folder}: has {what}, so a test of this run will be refused; {fix}", sys.stderr)


def warn_about_step_size(recipe: Recipe) -> None:
    """Warn if a data set of the original is trained with the sinusoid's alpha, the default, as the original does."""
    commands = re.findall(rf"main\.py (--datasource={recipe.data_set} .*)", __doc__)
    if commands and recipe.metatrain_steps and recipe.inner_lr == recipes.DEFAULTS["update_lr"]:
        documented = " or ".join(re.sub(r" --logdir=\S+", "", command) for command in commands)
        say(
            f"WARNING: --update_lr={recipe.inner_lr}: is the sinusoid's default, and not a published value for "
            f"{recipe.data_set}; the documented commands have {documented}",
            sys.stderr,
        )


def fit_picture(maml: "MAML", shot: int) -> "np.ndarray | None":
    """Return plot.py's picture of the first sinusoid test task, before and after updates; None without matplotlib."""
    try:
        import plot
    except ImportError:
        return None
    from data_generator import SinusoidTasks

    task = SinusoidTasks(shot, shot, oracle=True).draw(FLAGS.eval_seed, "test", 0, 1)
    return plot.pixels(plot.sinusoid_figure({"This run": (maml.inner, maml.values())}, [task]))


def test_run(recipe: Recipe, workers: "Cluster") -> None:
    """Test a checkpoint on --test_tasks tasks, always the same ones. recipe: with the K and alpha of the test."""
    import evaluate
    import runs

    run = run_folder(FLAGS)
    trained = unmoved(trained_recipe(recipe, FLAGS), run)
    check_test_flags(recipe, trained)
    run.checkpoint(FLAGS.test_iter)
    if not FLAGS.run:
        expected = recipes.to_flags(trained)
        del expected["num_query"]  # may differ at test, and so may --split with --test_datasource
        if FLAGS.test_datasource:
            del expected["split"]
        run.check_flags(expected, recipes.DEFAULTS, training=False)
    results = results_folder(run)
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
        class_split=recipe.split,
        tasks=FLAGS.test_tasks,
        task_seed=FLAGS.eval_seed,
        query_norm=FLAGS.query_norm,
        updates=FLAGS.test_updates,
        query_shares=FLAGS.query_shares,
        way=None if tested_way(recipe) == recipe.way else tested_way(recipe),
    )
    data = open_test_data(dataset, recipe)
    maml, prefix = tested_model(run, recipe, workers)
    evaluate.check_same_start(maml, data, workers)
    evaluate.test(maml, data, trained, protocol, run, prefix, results, workers)
    workers.leave()


def tested_way(recipe: Recipe) -> int:
    """Return the number of classes of a test task. recipe: with the number in training."""
    return recipe.way if FLAGS.test_num_classes == -1 else FLAGS.test_num_classes


def check_test_flags(recipe: Recipe, trained: Recipe) -> None:
    """Raise InputError if a flag of the test does not apply to the run. trained: the recipe of its training."""
    if FLAGS.query_norm != "batch" and recipe.norm != "batch_norm":
        raise InputError(f"--query_norm={FLAGS.query_norm}: changes nothing with --norm={recipe.norm}; leave it out")
    if recipe.learn_inner_lr != "none" and recipe.inner_lr != trained.inner_lr:
        raise InputError(
            f"--update_lr={recipe.inner_lr}: this run learned its step sizes; give {trained.inner_lr}, as in training"
        )
    for name in ("query_shares", "test_num_classes"):
        if FLAGS[name].value != FLAGS[name].default and not recipe.dataset.images:
            raise InputError(f"--{name}: applies only to classification; the {recipe.data_set} task is regression")
    if tested_way(recipe) > recipe.way:
        raise InputError(
            f"--test_num_classes={FLAGS.test_num_classes}: is more than the {recipe.way} of training; give 2 to "
            f"{recipe.way}, or test a run with more"
        )


def open_test_data(dataset: Dataset, recipe: Recipe) -> "SinusoidTasks | ImageTasks":
    """Open the source of the tasks of a test."""
    uneven = FLAGS.query_shares != "balanced"
    query = UNEVEN_QUERY if uneven and FLAGS.num_query == -1 else FLAGS.num_query
    asked = dataclasses.replace(recipe, query=query, way=tested_way(recipe))
    split = "test" if FLAGS.test_set else "val"
    return open_data(dataset, (split,), asked, training=False, query_shares=FLAGS.query_shares)


def tested_model(run: "Run", recipe: Recipe, workers: "Cluster") -> "tuple[MAML, str]":
    """Return a run's model with the weights of the checkpoint to test, and the checkpoint's prefix."""
    import runs

    maml = recipes.build(recipe, layout(workers))
    if FLAGS.test_iter == -1:
        prefix = run.restore_newest(maml)
    else:
        prefix = run.checkpoint(FLAGS.test_iter)
        run.restore(maml, prefix)
    say(f"Restoring model weights from {prefix}")
    if tested_way(recipe) != recipe.way:
        maml = runs.narrowed(recipe, maml, tested_way(recipe))
    return maml, prefix


def compare_runs(recipe: Recipe, workers: "Cluster") -> None:
    """Test the runs of --run and --compare on the same tasks, and print the paired difference. Write nothing.

    recipe: of --run, with the K and alpha of the test. Raise InputError if the runs have different test tasks.
    """
    import evaluate

    if FLAGS.train or not FLAGS.run:
        raise InputError("--compare: is for a test of two runs; add --run=FOLDER --train=False")
    if FLAGS.results_dir:
        raise InputError("--results_dir: --compare writes no files; leave it out")
    if not Path(FLAGS.compare).is_dir():
        raise InputError(f"--compare={FLAGS.compare}: no such folder; choose a run folder")
    other_flags = copy.deepcopy(FLAGS)
    other_flags["run"].value = FLAGS.compare
    other = recipe_of(other_flags)
    check_same_tasks(recipe, other)
    tested = [(recipe, run_folder(FLAGS)), (other, run_folder(other_flags))]
    for (tested_recipe, run), values in zip(tested, (FLAGS, other_flags), strict=True):
        check_test_flags(tested_recipe, trained_recipe(tested_recipe, values))
        run.checkpoint(FLAGS.test_iter)

    split, updates = "test" if FLAGS.test_set else "val", FLAGS.test_updates
    if updates == -1:
        updates = max(recipe.inner_steps, other.inner_steps, evaluate.TEST_UPDATES)
    data, names, curves = open_test_data(tested_data_set(recipe), recipe), [], []
    for tested_recipe, run in tested:
        if recipe.dataset.images is None:  # an oracle sees the same sinusoids with their amplitudes and phases
            data = open_test_data(tested_recipe.dataset, tested_recipe)
        maml, prefix = tested_model(run, tested_recipe, workers)
        evaluate.check_same_start(maml, data, workers)
        trained = evaluate.trained_classes(tested_recipe, run)
        known = evaluate.known_classes(data, split, trained) if workers.chief else 0
        names.append(prefix + (f" (trained on {known:,} classes with names of {split} classes)" if known else ""))
        options = {"query_norm": FLAGS.query_norm, "workers": workers}
        curves.append(evaluate.evaluate(maml, data, split, FLAGS.test_tasks, updates, FLAGS.eval_seed, **options))
    if workers.chief:
        evaluate.print_comparison(names, curves, split)
    workers.leave()


def check_same_tasks(recipe: Recipe, other: Recipe) -> None:
    """Raise InputError if tests of the runs of --run and --compare, under the same flags, have different tasks."""
    here, there = tasks_identity(recipe), tasks_identity(other)
    differing = [name for name in here if here[name] != there[name]]
    if "datasource" in differing:
        differing = ["datasource"]  # the others follow from it
    if differing:
        changes = ", ".join(f"{name}={there[name]} there, {here[name]} here" for name in differing)
        fix = "choose a run that has the same ones"
        if TEST_OVERRIDES.issuperset(differing):
            fix = f"give {' and '.join(f'--{name}' for name in differing)} for both runs"
        raise InputError(f"--compare={FLAGS.compare}: is tested on different tasks than --run ({changes}); {fix}")


def tasks_identity(recipe: Recipe) -> dict[str, object]:
    """Return everything that a run's test tasks depend on, except the flags of the test; keys are mostly flags."""
    images, own = recipe.dataset.images, FLAGS.test_datasource is None
    return {
        "datasource": recipe.data_set if own else FLAGS.test_datasource,
        "num_classes": images and tested_way(recipe),
        "update_batch_size": recipe.shot,
        "split": recipe.split,
        "data_path": recipe.data_path if own and not FLAGS["data_path"].present else None,
        "image_size": images and images.size[0],
        "image_channels": images and images.channels,
        "augment": images and images.augment,
        "inverted colors": images and images.invert,
    }


def results_folder(run: "Run") -> Path:
    """Return the folder for the files of a test. A published model's own folder must not change."""
    published = ROOT / "logs" / "published"
    if FLAGS.results_dir:
        return Path(FLAGS.results_dir)
    return ROOT / "logs" / "tests" / run.folder.name if run.folder.resolve().parent == published else run.folder


if __name__ == "__main__":
    app.run(run, flags_parser=parse)
