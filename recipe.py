"""A run's recipe: everything that its numbers depend on, each value with its flag. Imports no TensorFlow."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from files import InputError, printable

if TYPE_CHECKING:
    from maml import MAML
    from parallel import Layout

# -- flags ------------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """The numbers that a flag accepts. The upper bounds are far above any practical value, and catch typos."""

    least: float
    most: float
    also: tuple[float, ...] = ()  # special values outside the range, such as -1

    def __contains__(self, value: object) -> bool:
        return value in self.also or self.least <= value <= self.most

    def __str__(self) -> str:
        also = "".join(f", or {value}" for value in self.also)
        if isinstance(self.least, float):
            return f"a positive number within the range of float32{also}"
        return f"{self.least} or more, and at most {self.most:,}{also}"


class Flag(NamedTuple):
    """The one definition of a flag. main.py makes absl's flag, --help, and the checks from it."""

    name: str
    default: Any
    help: str
    group: str  # of --help, a key of GROUPS
    kind: type = str
    accepts: Range | Iterable[Any] | None = None  # a range of numbers, or the values to choose from; None: any


GROUPS = {"run": "The run", "method": "The method", "data": "The data", "test": "The test"}
ITERATIONS = Range(0, 10**12)
EXAMPLES = Range(1, 10**6)
QUERIES = EXAMPLES._replace(also=(-1,))
RATE = Range(1e-37, 1e37)
SEED = Range(0, 2**63 - 1)
NORMS = {"batch_norm": "batchnorm", "layer_norm": "layernorm", None: "nonorm"}  # value -> part of a run folder's name
ADAPTED = ("all", "head", "body")  # see networks.adapting
LEARNED_STEP_SIZES = ("none", "weight", "step")  # see networks.with_step_sizes
LOSSES = ("sum_over_shot", "mean")  # utils.xent, utils.mean_xent
QUERY_NORMS = ("batch", "support")  # see maml.adaptation_curve
QUERY_SHARES = ("balanced", "dirichlet")  # see data_generator.ImageTasks


# -- data sets --------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """The files of an image data set, and how tasks are made from them."""

    folder: str | None  # relative to the project's root, or absolute; None: --data_path names it
    prepare: str  # the script that fills the folder, or the page that explains how
    size: tuple[int, int]  # height, width in pixels
    channels: int  # 1 gray, 3 red, green, blue
    rotations: bool  # a class in a task is a class on disk rotated by 0, 90, 180 or 270 degrees
    invert: bool  # pixel = 1 - u8 / 255 (ink is 1), else u8 / 255
    train_query: int | None  # query images per class in training and its validation; None: as many as support
    split_list: str | None  # data/splits/<name>: the published classes of each split; None: no published split
    class_images: int | None = None  # images of each published class; None: they differ, or nothing is published
    split_folders: bool = True  # prepared as folders train, val and test; else as one folder of classes
    any_size: bool = False  # resize images of a different size, else refuse them
    split_sizes: tuple[int, int, int] | None = None  # classes of train, val and test, unless folders set them
    skip_broken: bool = False  # leave out unreadable images, else refuse them
    augment: bool = False  # train on random crops
    kept: int = 128  # with augment: height and width in pixels at which a whole image is kept

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width in pixels at which images are kept."""
        return (max(self.kept, *self.size),) * 2 if self.augment else self.size


class Dataset(NamedTuple):
    """One data set, with the values that the paper and the original's code use for it."""

    defaults: dict[str, Any]  # field of a Recipe -> value, if not the original's default
    network: str  # of networks.NETWORKS
    clip: float | None  # bound on each element of the meta-gradient
    curve_steps: int  # least number of updates in a summary of the whole curve (the original's test_num_updates)
    paper_updates: dict[int, tuple[int, ...]]  # way -> numbers of updates at test in published results
    images: Images | None  # None: the sinusoid


# Paper section 5.2 and appendix A.1. The original's defaults are for the sinusoid; its documented commands give the
# other values.
MINIIMAGENET = Dataset(
    defaults={},
    network="miniimagenet",
    clip=10.0,
    curve_steps=1,
    paper_updates={5: (10,)},
    images=Images(
        folder="data/miniImagenet",
        prepare="data/miniImagenet/proc_images.py",
        size=(84, 84),
        channels=3,
        rotations=False,
        invert=False,
        train_query=15,
        split_list="miniimagenet.json",
        class_images=600,
    ),
)


def _photographs(
    folder: str | None,
    prepare: str,
    split_list: str | None,
    size: int = 84,
    any_size: bool = False,
    published: bool = False,
    kept: int = 128,
) -> Dataset:
    """Return a data set of square RGB photographs, with the values of MiniImagenet's commands as defaults.

    published: papers report MAML on this data set by the same protocol. split_list, kept: see Images.
    """
    images = MINIIMAGENET.images._replace(
        folder=folder, prepare=prepare, size=(size, size), any_size=any_size, kept=kept, split_list=split_list
    )._replace(class_images=600 if published else None)
    defaults = {"meta_batch": 4, "inner_lr": 0.01, "inner_steps": 5, "filters": 32, "max_pool": True}
    paper_updates = MINIIMAGENET.paper_updates if published else {}
    return MINIIMAGENET._replace(defaults=defaults, images=images, paper_updates=paper_updates)


DATASETS = {
    # Paper section 5.1. The original's default norm crashes here; its documented commands say --norm=None.
    "sinusoid": Dataset(
        defaults={"norm": None},
        network="sinusoid",
        clip=None,
        curve_steps=5,
        paper_updates={5: (1, 5, 10)},
        images=None,
    ),
    # Paper section 5.2 and appendix A.1.
    "omniglot": Dataset(
        defaults={},
        network="omniglot",
        clip=None,
        curve_steps=10,
        paper_updates={5: (3,), 20: (5,)},
        images=Images(
            folder="data/omniglot_resized",
            prepare="data/omniglot_resized/resize_images.py",
            size=(28, 28),
            channels=1,
            rotations=True,
            invert=True,
            train_query=None,
            split_list="omniglot.json",
            class_images=20,
            split_folders=False,
        ),
    ),
    "miniimagenet": MINIIMAGENET,
    "cifarfs": _photographs(
        "data/cifar_fs", "data/cifar_fs/prepare.py", "cifar_fs.json", size=32, published=True, kept=32
    ),
    "fc100": _photographs("data/fc100", "data/fc100/prepare.py", "fc100.json", size=32, published=True, kept=32),
    "cub": _photographs("data/cub", "data/cub/prepare.py", "cub.json"),
    "tieredimagenet": _photographs("data/tiered_imagenet", "data/tiered_imagenet/prepare.py", "tiered_imagenet.json"),
    "folder": _photographs(None, "docs/data.md (Your own images)", None, any_size=True),
}


# -- the recipe -------------------------------------------------------------------------------------------------------


def _field(name: str, default: Any, group: str, help: str, accepts: Range | Iterable[Any] | None = None) -> Any:
    """Declare a field of Recipe with the flag that sets it. The field's type is the flag's."""
    return dataclasses.field(default=default, metadata={"flag": Flag(name, default, help, group, accepts=accepts)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a run's numbers depend on, in standard terms, each field with its flag.

    The defaults are the original's if it has the flag. They also apply to keys that an older flags.json lacks.
    """

    data_set: str = _field(
        "datasource",
        "sinusoid",
        "run",
        "Data set to draw tasks from; folder: your own images, in --data_path. For cifarfs and those listed after it, "
        "the defaults are those of MiniImagenet's commands (meta_batch_size=4 update_lr=0.01 num_updates=5 "
        "num_filters=32 max_pool=True).",
        DATASETS,
    )
    way: int = _field(
        "num_classes",
        5,
        "data",
        "N, classes per task (way). Paper: 5 and 20. Does not apply to the sinusoid.",
        Range(2, 10**4),
    )
    baseline: str | None = _field(
        "baseline",
        None,
        "method",
        "The oracle also gets the sinusoid's amplitude and phase as inputs; pretraining only.",
        (None, "oracle"),
    )
    pretrain_steps: int = _field(
        "pretrain_iterations",
        0,
        "method",
        "Outer steps of pretraining, which minimize the support loss without inner steps. They precede meta-training.",
        ITERATIONS,
    )
    metatrain_steps: int = _field(
        "metatrain_iterations", 15000, "method", "Outer steps of MAML. Paper: 70000 sinusoid, 60000 images.", ITERATIONS
    )
    meta_batch: int = _field(
        "meta_batch_size",
        25,
        "method",
        "T, tasks per outer step. Paper: 25 sinusoid; 32 and 16 Omniglot 5- and 20-way; 4 MiniImagenet.",
        EXAMPLES,
    )
    meta_lr: float = _field("meta_lr", 0.001, "method", "beta, learning rate of the outer Adam. Paper: 0.001.", RATE)
    shot: int = _field(
        "update_batch_size",
        5,
        "method",
        "K, support examples per class (shot). Paper: 1 and 5; 5, 10, 20 sinusoid.",
        EXAMPLES,
    )
    inner_lr: float = _field(
        "update_lr",
        0.001,
        "method",
        "alpha, size of an inner step on the cross-entropy summed over examples and divided by K, or on the mean "
        "squared error. Paper: 0.4 and 0.1 Omniglot 5- and 20-way, 0.01 MiniImagenet. The original's sinusoid "
        "commands: 0.001.",
        RATE,
    )
    inner_steps: int = _field(
        "num_updates",
        1,
        "method",
        "J, inner steps in training. Paper: 1 sinusoid and Omniglot 5-way; 5 otherwise.",
        Range(1, 200),  # 200 compile for minutes
    )
    loss: str = _field(
        "loss",
        "sum_over_shot",
        "method",
        "Cross-entropy for classification: summed over the examples and divided by K (sum_over_shot, as in the "
        "original), or averaged over them (mean). On a support set, sum_over_shot is num_classes times mean, so the "
        "same update_lr takes a step num_classes times as large.",
        LOSSES,
    )
    network: str = _field(
        "network",
        "paper",
        "method",
        "The paper's network for the data set (paper), or one of mmfewshot's: conv4_affine (which uses num_filters) or "
        "resnet12. Their batch norm has a gamma and a beta, which the inner loop also adapts, and their meta-gradient "
        "is not clipped.",
        ("paper", "conv4_affine", "resnet12"),
    )
    norm: str | None = _field(
        "norm",
        "batch_norm",
        "method",
        "Normalization. batch_norm uses the statistics of the current batch, at test time too (transductive). The "
        "sinusoid uses None unless this flag is given.",
        NORMS,
    )
    filters: int = _field(
        "num_filters", 64, "method", "Filters per convolution. Paper: 64 Omniglot, 32 MiniImagenet.", Range(1, 10**4)
    )
    conv: bool = _field(
        "conv",
        True,
        "method",
        "Convolutional network; --noconv: fully connected (256, 128, 64, 64). The sinusoid's is always fully "
        "connected (40, 40).",
    )
    max_pool: bool = _field(
        "max_pool", False, "method", "Downsample by 2x2 max-pooling rather than by stride 2. Paper: MiniImagenet."
    )
    first_order: bool = _field(
        "stop_grad", False, "method", "First-order MAML: no second derivatives (paper section 5.2)."
    )
    adapt: str = _field(
        "adapt",
        "all",
        "method",
        "The layers that the inner loop adapts: all (MAML), only the last, the head (ANIL), or all but the last, the "
        "body (BOIL).",
        ADAPTED,
    )
    learn_inner_lr: str = _field(
        "learn_update_lr",
        "none",
        "method",
        "Meta-learn the inner step sizes, which start at update_lr: one per element of each weight (weight, Meta-SGD), "
        "or one per array of weights and update (step, as in MAML++). At test time, updates beyond num_updates reuse "
        "the last update's step sizes.",
        LEARNED_STEP_SIZES,
    )
    query: int = _field(
        "num_query",
        -1,
        "data",
        "Q, query examples per class. -1, as in the original: K, but 15 in training and validation on photographs.",
        QUERIES,
    )
    seed: int = _field("seed", 0, "run", "Seed of the initial weights and of the training tasks.", SEED)
    # Recorded only for a user's own images; data_set identifies all others.
    data_path: str | None = _field(
        "data_path", None, "data", "Folder of the images, if not the data set's default in data/."
    )
    split: str | None = _field(
        "split",
        None,
        "data",
        "Number of classes in train, val and test, e.g. 64,16,20, for images in DIR/<class>/ rather than in "
        "DIR/{train,val,test}/<class>/. The split is random, but the same in every run. With --test_datasource: the "
        "split of that data set.",
    )
    image_size: int | None = _field(
        "image_size",
        None,
        "data",
        "Height and width in pixels. Images of any other size or shape are resized to it. Default: the data set's own; "
        "84 for folder.",
        Range(1, 10**4),
    )
    image_channels: int | None = _field(
        "image_channels",
        None,
        "data",
        "1: gray, 3: color. Default: the data set's own; 3 for folder.",
        (None, 1, 3),
    )
    augment: bool = _field(
        "augment",
        False,
        "data",
        "As in mmfewshot: train on random crops of whole photographs, randomly flipped, with random brightness, "
        "contrast and saturation; test on center crops. Normalize pixels with the ImageNet mean and standard "
        "deviation. See docs/data.md.",
    )

    @property
    def dataset(self) -> Dataset:
        """The run's entry of DATASETS, with this recipe's settings of the images."""
        row = DATASETS[self.data_set]
        if row.images is None:
            return row
        own = row.images
        return row._replace(
            images=own._replace(
                folder=self.data_path or own.folder,
                size=(self.image_size,) * 2 if self.image_size else own.size,
                channels=self.image_channels or own.channels,
                augment=self.augment,
                any_size=own.any_size or self.augment,
                split_sizes=sizes_of_split(self.split),
            )
        )

    @property
    def steps(self) -> int:
        """All outer steps."""
        return self.pretrain_steps + self.metatrain_steps

    def query_examples(self, training: bool) -> int:
        """Return Q: the flag's value if given; else 15 in training and its validation on photographs; else K."""
        if self.query != -1:
            return self.query
        images = DATASETS[self.data_set].images
        return (training and images and images.train_query) or self.shot

    @property
    def variant(self) -> str:
        """The part of a run's name that identifies the member of MAML's family; empty for MAML."""
        adapt = f".adapt{self.adapt}" if self.adapt != "all" else ""
        return adapt + (f".learnlr{self.learn_inner_lr}" if self.learn_inner_lr != "none" else "")

    @property
    def paper_updates(self) -> tuple[int, ...]:
        """The numbers of updates at test in published results; empty if there are none.

        Published results of BOIL and learned step sizes use as many updates as in training (Oh et al. 2021, Li et al.
        2017, Antoniou et al. 2019), those of MAML and ANIL use the data set's, and those of mmfewshot's networks use 5.
        """
        if self.network != "paper":
            return (5,)
        published = self.dataset.paper_updates.get(self.way, ())
        as_trained = self.adapt == "body" or self.learn_inner_lr != "none"
        return (self.inner_steps,) if published and as_trained else published

    @property
    def run_name(self) -> str:
        """The run folder's name: the original's (its main.py), with suffixes for flags that it leaves out.

        A suffix appears only if a value is not the default.
        Example: cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm, or the same with .seed3
        """
        name = f"cls_{self.way}.mbs_{self.meta_batch}.ubs_{self.shot}.numstep{self.inner_steps}.updatelr{self.inner_lr}"
        if self.filters != 64:
            name += f"hidden{self.filters}"
        if self.max_pool:
            name += "maxpool"
        if self.first_order:
            name += "stopgrad"
        name += (self.baseline or "") + NORMS[self.norm]
        if not self.conv and self.data_set != "sinusoid":
            name += ".fc"
        if self.pretrain_steps and not self.baseline:
            name += f".pretrain{self.pretrain_steps}" if self.metatrain_steps else ".pretrain"
        name += self.variant
        if self.network != "paper":
            name += f".{self.network}"
        if self.loss != "sum_over_shot":
            name += f".loss{self.loss}"
        if self.meta_lr != 0.001:
            name += f".metalr{self.meta_lr}"
        if self.image_size:
            name += f".size{self.image_size}"
        if self.image_channels:
            name += f".channels{self.image_channels}"
        if self.augment:
            name += ".augment"
        if self.seed:
            name += f".seed{self.seed}"
        return name


def _flag_of(field: dataclasses.Field) -> Flag:
    (kind,) = {*(get_args(field.type) or (field.type,))} - {NoneType}
    return field.metadata["flag"]._replace(kind=kind)


FIELDS = {field.metadata["flag"].name: field.name for field in dataclasses.fields(Recipe)}  # flag -> field
DEFINITIONS = {flag.name: flag for flag in map(_flag_of, dataclasses.fields(Recipe))}
DEFAULTS = {name: flag.default for name, flag in DEFINITIONS.items()}
SPLIT = "[0-9]{1,9},[0-9]{1,9},[0-9]{1,9}"
# The original's folder names, without our suffixes: a folder with one of those also has a flags.json.
RUN_NAME = re.compile(
    r"cls_(\d+)\.mbs_(\d+)\.ubs_(\d+)\.numstep(\d+)\.updatelr(\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"(?:hidden(\d+))?(maxpool)?(stopgrad)?(oracle)?(batchnorm|layernorm|nonorm)"
)


def to_flags(recipe: Recipe) -> dict[str, Any]:
    """Return the content of flags.json, by the flags' names."""
    return {flag: getattr(recipe, field) for flag, field in FIELDS.items()}


def from_flags(flags: Mapping[str, Any], source: str = "flags.json") -> Recipe:
    """Return the recipe of a flags.json. A missing key means its flag's default; other keys are ignored.

    Raise InputError for a value that its flag does not accept. source: the origin of the values, for the error message.
    """
    recipe = Recipe(**{field: flags[flag] for flag, field in FIELDS.items() if flag in flags})
    for field in dataclasses.fields(Recipe):
        flag, value = _flag_of(field), getattr(recipe, field.name)
        if value is None:
            accepted = NoneType in get_args(field.type)
        else:
            accepted = _is_a(value, flag.kind) and (flag.accepts is None or value in flag.accepts)
        if not accepted:
            raise InputError(f"{source}: --{flag.name}={printable(value)[:60]} is invalid; correct it")
    sizes_of_split(recipe.split)
    return recipe


def from_run_name(name: str, data_set: str) -> Recipe:
    """Return the recipe of a run folder without flags.json, such as the original's released model, from its name.

    The name has the original's format, which omits the data set. Values that it omits have their defaults.
    Raise InputError for a name in any other format, or for a value that its flag does not accept.
    """
    found = RUN_NAME.fullmatch(name)
    if not found:
        raise InputError(
            f"{name}: has no flags.json, and its name is not in the original's format "
            "(cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm); choose a run folder"
        )
    way, meta_batch, shot, inner_steps, inner_lr, filters, max_pool, first_order, baseline, norm = found.groups()
    recipe = Recipe(
        data_set=data_set,
        way=int(way),
        baseline=baseline,
        meta_batch=int(meta_batch),
        shot=int(shot),
        inner_lr=float(inner_lr),
        inner_steps=int(inner_steps),
        norm={part: norm for norm, part in NORMS.items()}[norm],
        filters=int(filters or 64),
        max_pool=bool(max_pool),
        first_order=bool(first_order),
    )
    return from_flags(to_flags(recipe), name)


def _is_a(value: object, kind: type) -> bool:
    """Check as isinstance does, except that a bool is not a number, and an integer is also accepted as a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def sizes_of_split(split: str | None) -> tuple[int, int, int] | None:
    """Return the numbers of classes in train, val and test of a value such as "64,16,20"."""
    if split is None:
        return None
    if not re.fullmatch(SPLIT, split):
        raise InputError(f"--split={printable(split)[:60]}: must be three numbers of classes, e.g. 64,16,20")
    return tuple(map(int, split.split(",")))


# -- the model --------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, layout: "Layout | None" = None) -> "MAML":
    """Return the model with its initial weights.

    recipe: its K and alpha may differ between training and test.
    Raise InputError if its images are too small for its network.
    """
    # Recipe is a leaf of the imports. This function is above the method, and needs TensorFlow.
    from maml import MAML, InnerLoop  # tach-ignore
    from networks import NETWORKS, adapting, with_step_sizes  # tach-ignore
    from parallel import Layout  # tach-ignore
    from utils import accuracy, mean_xent, mse, xent  # tach-ignore

    row = recipe.dataset
    name = row.network if recipe.conv or row.images is None else "no_conv"
    name = name if recipe.network == "paper" else recipe.network
    network = NETWORKS[name](*input_and_outputs(recipe), recipe.norm, recipe.filters, recipe.max_pool)
    network = with_step_sizes(
        adapting(network, recipe.adapt), recipe.learn_inner_lr, recipe.inner_lr, recipe.inner_steps
    )
    loss = mean_xent if recipe.loss == "mean" else functools.partial(xent, shot=recipe.shot)
    return MAML(
        InnerLoop(network, loss if row.images else mse, recipe.inner_lr, recipe.inner_steps, recipe.first_order),
        accuracy if row.images else None,
        meta_lr=recipe.meta_lr,
        clip=row.clip if recipe.network == "paper" else None,
        seed=recipe.seed,
        layout=layout or Layout(),
    )


def input_and_outputs(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """Return the shape of one input, and the number of outputs."""
    images = recipe.dataset.images
    if images is None:
        return (3 if recipe.baseline else 1,), 1
    return (*images.size, images.channels), recipe.way


def check_memory(recipe: Recipe, layout: "Layout", memory: int) -> None:
    """Raise InputError if a training step of ResNet-12 certainly needs more than `memory` bytes of activations.

    The system would otherwise kill the program without a message. For each pixel, the network's convolutions have about
    512 outputs, and a second derivative keeps those of every inner step.
    """
    images = recipe.dataset.images
    if recipe.network != "resnet12":
        return
    tasks = recipe.meta_batch if layout.group == 0 else min(recipe.meta_batch, layout.cores * layout.group)
    updates = 1 if recipe.first_order or recipe.adapt == "head" else recipe.inner_steps
    examples = recipe.way * (updates * recipe.shot + recipe.query_examples(training=True))
    needed = 4 * tasks * examples * 512 * math.prod(images.size)
    if needed > memory:
        flags = "--tasks_at_once" if layout.group != 1 else "--threads"
        raise InputError(
            f"{flags}: {tasks} tasks of ResNet-12 at once need at least {needed / 2**30:,.0f} GB, but only "
            f"{memory / 2**30:,.0f} GB are available; lower {flags}, --image_size or --num_query"
        )
