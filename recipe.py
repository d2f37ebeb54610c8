"""The recipe of a run: everything that its numbers depend on, and the model that it describes."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

import devices
from data_generator import DATASETS, Dataset
from files import InputError, printable
from images import Images
from maml import MAML, InnerLoop
from networks import ADAPTED, LEARNED_STEP_SIZES, NETWORKS, adapting, with_step_sizes
from parallel import Layout
from utils import accuracy, mean_xent, mse, xent

NORMS = {"batch_norm": "batchnorm", "layer_norm": "layernorm", None: "nonorm"}  # value -> part of a run folder's name
# The original's folder names, without our suffixes: a folder that has one of those has a flags.json too.
RUN_NAME = re.compile(
    r"cls_(\d+)\.mbs_(\d+)\.ubs_(\d+)\.numstep(\d+)\.updatelr(\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"(?:hidden(\d+))?(maxpool)?(stopgrad)?(oracle)?(batchnorm|layernorm|nonorm)"
)


class Range(NamedTuple):
    """The numbers that a flag can be. The upper bounds are far above any use, and keep slips from taking all memory."""

    least: float
    most: float
    also: tuple[float, ...] = ()  # what means that another value is taken

    def __contains__(self, value: object) -> bool:
        return value in self.also or self.least <= value <= self.most

    def __str__(self) -> str:
        also = "".join(f", or {value}" for value in self.also)
        if isinstance(self.least, float):
            return f"a number above 0, and within float32{also}"
        return f"{self.least} or more, and at most {self.most:,}{also}"


ITERATIONS = Range(0, 10**12)
EXAMPLES = Range(1, 10**6)
QUERIES = EXAMPLES._replace(also=(-1,))
RATE = Range(1e-37, 1e37)
SEED = Range(0, 2**63 - 1)


def _flag(name: str, default: Any, range: Range | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"flag": name, "range": range})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a run's numbers depend on, in the field's words, each beside the flag that sets it.

    The defaults are those of the flags, the original's where it has the flag. They stand for every key that is missing
    from an older flags.json.
    """

    data_set: str = _flag("datasource", "sinusoid")  # of data_generator.DATASETS
    way: int = _flag("num_classes", 5, Range(2, 10**4))  # N, classes in a task
    baseline: str | None = _flag("baseline", None)  # "oracle": the sinusoid's amplitude and phase are inputs too
    pretrain_steps: int = _flag("pretrain_iterations", 0, ITERATIONS)  # outer steps on the support loss, the first ones
    metatrain_steps: int = _flag("metatrain_iterations", 15000, ITERATIONS)  # outer steps of MAML
    meta_batch: int = _flag("meta_batch_size", 25, EXAMPLES)  # T, tasks in an outer step
    meta_lr: float = _flag("meta_lr", 0.001, RATE)  # beta, the rate of Adam
    shot: int = _flag("update_batch_size", 5, EXAMPLES)  # K, support examples a class
    inner_lr: float = _flag("update_lr", 0.001, RATE)  # alpha, the size of an inner step
    inner_steps: int = _flag("num_updates", 1, Range(1, 200))  # J, inner steps in training; 200 compile for minutes
    loss: str = _flag("loss", "sum_over_shot")  # cross-entropy, "sum_over_shot" (xent) or "mean"
    network: str = _flag("network", "paper")  # or one of NETWORKS that another code has: "conv4_affine", "resnet12"
    norm: str | None = _flag("norm", "batch_norm")  # a key of NORMS
    filters: int = _flag("num_filters", 64, Range(1, 10**4))  # of each convolution
    conv: bool = _flag("conv", True)  # else image data has a fully connected network
    max_pool: bool = _flag("max_pool", False)  # else convolutions of stride 2
    first_order: bool = _flag("stop_grad", False)  # no second derivatives
    adapt: str = _flag("adapt", "all")  # what the inner loop changes: "all", "head" (ANIL) or "body" (BOIL)
    learn_inner_lr: str = _flag("learn_update_lr", "none")  # "weight" or "step": step sizes are learned, see MAML
    query: int = _flag("num_query", -1, QUERIES)  # Q, query examples a class; -1: see query_examples
    seed: int = _flag("seed", 0, SEED)  # of the initial weights and the training tasks
    data_path: str | None = _flag("data_path", None)  # folder of a user's own images; None: the data set's name says it
    split: str | None = _flag("split", None)  # "64,16,20": classes in train, val and test, where no folders say it
    image_size: int | None = _flag("image_size", None, Range(1, 10**4))  # pixels; None: the data set's own
    image_channels: int | None = _flag("image_channels", None)  # 1 or 3; None: the data set's own
    augment: bool = _flag("augment", False)  # crops of whole photographs, and ImageNet's mean and std: augment.py

    @property
    def dataset(self) -> Dataset:
        """The data set's row, its images as this recipe has them."""
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
        """Outer steps in all."""
        return self.pretrain_steps + self.metatrain_steps

    def query_examples(self, training: bool) -> int:
        """Q: as many as K, and 15 in the training on photographs and its validation, unless it is given."""
        if self.query != -1:
            return self.query
        images: Images | None = DATASETS[self.data_set].images
        return (training and images and images.train_query) or self.shot

    @property
    def variant(self) -> str:
        """The part of names that says which member of MAML's family it is; empty for MAML."""
        adapt = f".adapt{self.adapt}" if self.adapt != "all" else ""
        return adapt + (f".learnlr{self.learn_inner_lr}" if self.learn_inner_lr != "none" else "")

    @property
    def paper_updates(self) -> tuple[int, ...]:
        """Updates at test behind published numbers; empty where there are none.

        BOIL and learned step sizes are published with as many as in training (Oh et al. 2021, Li et al. 2017, Antoniou
        et al. 2019), MAML and ANIL with those of the data set, and mmfewshot's networks with 5.
        """
        if self.network != "paper":
            return (5,)
        published = self.dataset.paper_updates.get(self.way, ())
        as_trained = self.adapt == "body" or self.learn_inner_lr != "none"
        return (self.inner_steps,) if published and as_trained else published

    @property
    def run_name(self) -> str:
        """The run folder's name: the original's (its main.py), with suffixes for what that leaves out.

        A suffix stands only where a value is not at its default.
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


FIELDS = {field.metadata["flag"]: field for field in dataclasses.fields(Recipe)}  # by the flag's name
FLAG_OF = {field.name: flag for flag, field in FIELDS.items()}  # name of a field -> its flag
SPLIT = "[0-9]{1,9},[0-9]{1,9},[0-9]{1,9}"
RANGES = {flag: field.metadata["range"] for flag, field in FIELDS.items() if field.metadata["range"]}
CHOICES = {
    "datasource": DATASETS,
    "norm": NORMS,
    "baseline": (None, "oracle"),
    "image_channels": (None, 1, 3),
    "adapt": ADAPTED,
    "learn_update_lr": LEARNED_STEP_SIZES,
    "loss": ("sum_over_shot", "mean"),
    "network": ("paper", "conv4_affine", "resnet12"),
}


def from_flags(flags: Mapping[str, Any]) -> Recipe:
    """Makes the recipe of a flags.json. A missing key means its flag's default; keys that are no recipe's are ignored.

    Raises InputError where a value is of another type, or not one that its flag can have.
    """
    values = {field.name: flags[flag] for flag, field in FIELDS.items() if flag in flags}
    recipe = Recipe(**values)
    _check_values(recipe, "flags.json has", "put a right one there")
    sizes_of_split(recipe.split)
    if "\0" in (recipe.data_path or ""):
        raise InputError(
            f"flags.json has --data_path={recipe.data_path}, which no folder is called: put a right one there"
        )
    return recipe


def from_run_name(name: str, data_set: str) -> Recipe:
    """Makes the recipe of a run folder without flags.json, such as the original's released model, from its name.

    The name is the original's, and it does not say the data set. What it leaves out has its default.
    Raises InputError where it is another name, or says a value that its flag cannot have.
    """
    found = RUN_NAME.fullmatch(name)
    if not found:
        raise InputError(
            f"{name} has no flags.json, and its name does not say how it was trained, as the original's do "
            "(cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm): give the folder of a run"
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
    _check_values(recipe, f"the name {name} says", "give the folder of a run")
    return recipe


def _check_values(recipe, source, way_out):
    """Raises InputError where a value is of another type, or not one that its flag can have."""
    for flag, field in FIELDS.items():
        value = getattr(recipe, field.name)
        right = _is_a(value, field.type) and value in CHOICES.get(flag, (value,))
        if not right or (value is not None and flag in RANGES and value not in RANGES[flag]):
            raise InputError(f"{source} --{flag}={printable(value)[:60]}, which that flag cannot be: {way_out}")


def _is_a(value: object, kind: type) -> bool:
    """As isinstance, but a bool is no number, and a whole number may stand for a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def to_flags(recipe: Recipe) -> dict[str, Any]:
    """Makes the content of flags.json, by the flags' names."""
    return {flag: getattr(recipe, field.name) for flag, field in FIELDS.items()}


DEFAULTS = to_flags(Recipe())


def build(recipe: Recipe, layout: Layout = Layout()) -> MAML:  # noqa: B008  a constant
    """Return the model with its initial weights.

    recipe: with the K and alpha of what it is built for, which may differ between training and test.
    Raise InputError if its images are too small for its network, or its weights too many for the memory.
    """
    row, network = recipe.dataset, _network(recipe)
    _check_memory(recipe, {"weights": 5 * _size(_weights(network))})
    return MAML(
        InnerLoop(
            with_step_sizes(network, recipe.learn_inner_lr, recipe.inner_lr, recipe.inner_steps),
            _loss(recipe),
            alpha=recipe.inner_lr,
            steps=recipe.inner_steps,
            first_order=recipe.first_order,
        ),
        accuracy if row.images else None,
        meta_lr=recipe.meta_lr,
        clip=row.clip if recipe.network == "paper" else None,
        seed=recipe.seed,
        layout=layout,
    )


def _input_and_outputs(recipe):
    """The shape of one input, and the number of outputs."""
    images = recipe.dataset.images
    if images is None:
        return (3 if recipe.baseline else 1,), 1
    return (*images.size, images.channels), recipe.way


def _loss(recipe):
    if recipe.dataset.images is None:
        return mse
    return mean_xent if recipe.loss == "mean" else functools.partial(xent, shot=recipe.shot)


def _network(recipe):
    shape, outputs = _input_and_outputs(recipe)
    row = recipe.dataset
    network = row.network if recipe.conv or row.images is None else "no_conv"
    if recipe.network != "paper":
        network = recipe.network
    return adapting(NETWORKS[network](shape, outputs, recipe.norm, recipe.filters, recipe.max_pool), recipe.adapt)


# -- what would fill the memory ----------------------------------------------------------------------------------------


def check_training(recipe: Recipe, layout: Layout) -> None:
    """Raises InputError where a step of training certainly needs more memory than there is. Computes nothing.

    Counted are two blocks of tasks, since one is drawn while the steps on the other are taken; weights with Adam's
    moments, a gradient for each task that is computed at once, and their sum in float64; and the layers' outputs, which
    second derivatives need of every update.
    """
    network = _network(recipe)
    together = network.steps_a_call > 1 or layout.group == 0
    at_once = recipe.meta_batch if together else min(recipe.meta_batch, layout.cores * layout.group)
    held = 1 if recipe.first_order or recipe.adapt == "head" else recipe.inner_steps
    _check_tasks(
        recipe,
        drawn=2 * network.steps_a_call * recipe.meta_batch,
        gradients=at_once + 2,
        at_once=at_once,
        updates=held,
        query=recipe.query_examples(training=True),
    )


def check_test(recipe: Recipe, at_once: int) -> None:
    """The same of a test, of so many tasks at once. recipe: with the K and Q of the test."""
    query = recipe.query_examples(training=False)
    _check_tasks(recipe, drawn=at_once, gradients=at_once, at_once=at_once, updates=1, query=query)


def _check_tasks(recipe, drawn, gradients, at_once, updates, query):
    network, (shape, outputs) = _network(recipe), _input_and_outputs(recipe)
    way = 1 if recipe.dataset.images is None else recipe.way
    support, query, weights = way * recipe.shot, way * query, _weights(network)
    apply = tf.function(network.apply, autograph=False).get_concrete_function(weights, tf.TensorSpec((1, *shape)))
    layers = [one.outputs[0] for one in apply.graph.get_operations() if one.type in ("Conv2D", "MatMul")]
    numbers = {
        "weights": (5 + gradients) * _size(weights),
        "tasks": drawn * (support + query) * (math.prod(shape) + outputs),
    }
    if not devices.gpus():  # they have a memory of their own
        numbers["updates"] = at_once * (updates * support + query) * sum(math.prod(layer.shape) for layer in layers)
    _check_memory(recipe, numbers)


def _weights(network):
    """The shapes of a network's weights, of which none is made."""
    made = tf.function(network.init, autograph=False).get_concrete_function(0).structured_outputs
    return {name: tf.TensorSpec(weight.shape, weight.dtype) for name, weight in made.items()}


def _size(weights):
    return sum(math.prod(weight.shape) for weight in weights.values())


def _check_memory(recipe, numbers):
    """numbers: what -> how many float32 numbers of it are in memory."""
    needed, memory = 4 * sum(numbers.values()), devices.memory()
    if needed > memory:
        flags = "meta_batch_size num_classes update_batch_size num_query num_updates num_filters image_size".split()
        listed = " ".join(f"--{flag}={getattr(recipe, FIELDS[flag].name)}" for flag in flags)
        raise InputError(
            f"this takes {needed / 2**30:,.0f} GB of memory or more, most of it for {max(numbers, key=numbers.get)}, "
            f"and this process may use {memory / 2**30:,.0f} GB: lower what is large of {listed}"
        )


def sizes_of_split(split: str | None) -> tuple[int, int, int] | None:
    """Reads numbers of classes in train, val and test, as "64,16,20". Raises InputError on anything else."""
    if split is None:
        return None
    if not re.fullmatch(SPLIT, split):
        raise InputError(f"--split={printable(split)[:60]} must be three numbers of classes, e.g. 64,16,20")
    return tuple(map(int, split.split(",")))
