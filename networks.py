"""The paper's networks and two of mmfewshot's: initial weights and forward functions, over a dict of weights.

A forward function computes one task, or a group of G tasks, each with weights of its own: every array of weights then
has a leading axis G, and so have inputs and outputs. In between, the tasks of a group lie side by side in the channels,
[n, height, width, G * C], where batch norm, ReLU and pooling work as they do on one task: `side_by_side`. Layer norm,
which normalises an example over all its channels, takes them `apart` again.

Weights carry the original's names: convolutions conv1..conv4 (fully connected layers w1, w2, ...), biases b1, b2, ...,
the last layer w5 and b5 (or the next number), and the norms' beta1, ... (and gamma1, ...), one for each hidden layer.
"""

import functools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf

import special_grads
from files import InputError, check_choice
from recipe import ADAPTED, LEARNED_STEP_SIZES
from utils import Weights

LAYER_NORM_EPSILON = 1e-12  # tf.contrib.layers.layer_norm's, which the original uses
TORCH_EPSILON = 1e-5  # of PyTorch's batch norm
STEPS_A_CALL = 100  # of a network so small that starting an operation costs more than the operation


class Network(NamedTuple):
    """One model: its initial weights, its outputs, and which weights the inner loop adapts.

    The first two are enough. The rest says what the inner loop does with it, or how it is computed fast.
    """

    init: Callable[[int], Weights]  # seed -> float32 weights
    apply: Callable[[Weights, tf.Tensor], tf.Tensor]  # weights, inputs [n, ...] -> outputs [n, O] of one task
    adapted: tuple[str, ...] | None = None  # names that the inner loop changes; None: all. Ours leave out the norms'
    tf1_names: dict[str, str] | None = None  # our name -> the variable's name in checkpoints of the original
    step_size: Callable[[Weights, str, int | tf.Tensor], tf.Tensor] | None = None  # weights, name, j; None: alpha
    prepare: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # weights, inputs -> what inner_apply takes
    inner_apply: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # apply in the inner loop, if not the same
    batch_statistics: bool = False  # under batch norm: an output depends on the other inputs of its batch
    takes_groups: bool = False  # apply computes a group of G tasks, too: weights, inputs, outputs with a leading axis G
    steps_a_call: int = 1  # outer steps in one compiled program, all tasks in one operation; above 1 for tiny networks
    head: tuple[str, ...] = ()  # names of the last layer's weights; the others are the body's
    body: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # weights, inputs -> features
    last_layer: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # weights, features -> outputs

    def features(self, weights: Weights, x: tf.Tensor) -> tf.Tensor:
        """Return what the inner loop takes: the features of a body that it leaves alone (ANIL), or the inputs."""
        return self.prepare(weights, x) if self.prepare else x

    def outputs(self, weights: Weights, features: tf.Tensor) -> tf.Tensor:
        """Return the outputs of those features."""
        return (self.inner_apply or self.apply)(weights, features)

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Return the name of each weight in a checkpoint: the original's, or its own if the original has none."""
        return {name: (self.tf1_names or {}).get(name, name) for name in names}


class Weight(NamedTuple):
    """One array of weights, as a network declares it."""

    shape: tuple[int, ...]
    initial: Callable[[tuple[int, ...], tuple[int, int]], tf.Tensor]  # shape, seed of this array -> float32 values
    tf1_name: str  # the variable's name in checkpoints of the original
    adapted: bool = True  # the inner loop changes it; else only the outer loop does


def network(
    weights: dict[str, Weight],
    body: Callable[[Weights, tf.Tensor], tf.Tensor],
    last_layer: Callable[[Weights, tf.Tensor], tf.Tensor],
    head: tuple[str, ...],
    **more: object,
) -> Network:
    """Makes the Network of declared weights and its two parts.

    Args: weights by name, in the order that numbers their seeds; body(weights, inputs) -> features;
    last_layer(weights, features) -> outputs; names of the last layer's weights; more fields of Network.
    """

    def init(seed: int) -> Weights:
        return {
            name: weight.initial(weight.shape, (seed, number)) for number, (name, weight) in enumerate(weights.items())
        }

    return Network(
        init=init,
        apply=lambda weights, x: last_layer(weights, body(weights, x)),
        adapted=tuple(name for name, weight in weights.items() if weight.adapted),
        tf1_names={name: weight.tf1_name for name, weight in weights.items()},
        head=head,
        body=body,
        last_layer=last_layer,
        **more,
    )


def adapting(network: Network, what: str) -> Network:
    """Return the network with only a part of its adapted weights left to the inner loop.

    what: 'all', MAML; 'head', the last layer alone, as in ANIL (Raghu, Raghu, Bengio, Vinyals, ICLR 2020): the features
    are then computed once per task; 'body', all but the last layer, as in BOIL (Oh, Yoo, Kim, Yun, ICLR 2021).
    Raise InputError for another value, or if the network does not name its last layer.
    """
    check_choice("adapt", what, ADAPTED)
    if what == "all":
        return network
    if network.adapted is None or not set(network.head) & set(network.adapted):
        raise InputError(f"adapt={what}: this network does not name its last layer; set its `adapted` and `head`")
    if what == "body":
        return network._replace(adapted=tuple(name for name in network.adapted if name not in network.head))
    adapted = tuple(name for name in network.adapted if name in network.head)
    return network._replace(adapted=adapted, prepare=network.body, inner_apply=network.last_layer)


def with_step_sizes(network: Network, kind: str, alpha: float, steps: int) -> Network:
    """Return the network with its inner step sizes among its weights, as step_size_<name>, each initially alpha.

    They are meta-learned, not adapted. kind: 'none': alpha stays a constant; 'weight': one per element of each adapted
    weight, the same at every step (Meta-SGD, Li, Zhou, Chen, Li 2017); 'step': one per adapted weight and step (MAML++,
    Antoniou, Edwards, Storkey, ICLR 2019), of which the last serves all later steps.
    Raise InputError for another value.
    """
    check_choice("learn_inner_lr", kind, LEARNED_STEP_SIZES)
    if kind == "none":
        return network
    adapted = network.adapted or tuple(network.init(0))

    def init(seed: int) -> Weights:
        weights = network.init(seed)
        shapes = {name: weights[name].shape if kind == "weight" else [steps] for name in adapted}
        dtypes = {name: weights[name].dtype for name in adapted}
        return weights | {f"step_size_{name}": tf.fill(shapes[name], tf.cast(alpha, dtypes[name])) for name in adapted}

    def step_size(weights: Weights, name: str, j: int | tf.Tensor) -> tf.Tensor:
        sizes = weights[f"step_size_{name}"]
        if kind == "weight":
            return sizes
        size = sizes[..., min(j, steps - 1) if isinstance(j, int) else tf.minimum(j, steps - 1)]  # [], or [G]
        ones = [1] * (weights[name].shape.rank - size.shape.rank)
        return tf.reshape(size, [*size.shape, *ones])

    return network._replace(init=init, adapted=adapted, step_size=step_size)


def support_normalized(
    network: Network, weights: Weights, support_x: tf.Tensor, query_x: tf.Tensor, group_axes: int = 0
) -> tf.Tensor:
    """Return the outputs [n, O] of query inputs, each of which is normalized alone with the support set.

    An output then does not depend on the other queries, as it does if all queries are one batch (the paper's way).
    Only batch norm makes a difference. Its statistics differ for every query, so each takes a batch of N * K + 1.
    Args: weights after the inner steps; support_x [N * K, *D]; query_x [n, *D]; with group_axes=1, all with a leading
    axis G, and so is the result.
    """
    if not network.batch_statistics:
        return network.apply(weights, query_x)

    def output(x):
        batch = tf.concat([support_x, tf.expand_dims(x, group_axes)], group_axes)
        return network.apply(weights, batch)[..., -1, :]

    def swapped(x):
        return tf.transpose(x, [1, 0, *range(2, x.shape.rank)]) if group_axes else x

    return swapped(tf.map_fn(output, swapped(query_x), fn_output_signature=query_x.dtype))


def conv4(
    size: tuple[int, int],
    channels: int,
    way: int,
    filters: int,
    *,
    max_pool: bool,
    norm: str | None,
    mean_head: bool,
) -> Network:
    """Builds four times [3x3 convolution, norm, ReLU], halved each time, and a linear layer to N scores.

    Inputs are [n, height, width, channels]. They are halved by stride 2 with SAME padding, or with max_pool by 2x2
    VALID pooling after a convolution of stride 1. With mean_head the last layer sees the mean over height and width,
    and its weights begin as N(0, 1) (Omniglot). Without, it sees all height * width * filters numbers in that order,
    and its weights begin Xavier uniform, as those of all convolutions (MiniImagenet).

    Args:
        size: height and width of an image in pixels.
        channels: of an image.
        way: N, the number of scores.
        filters: of each convolution.
        norm: 'batch_norm', 'layer_norm' or None.
    Raises InputError where pooling leaves nothing: with max_pool, below 16 pixels.
    Source: paper section 5.2 and appendix A; the original's maml.py (construct_conv_weights, forward_conv).
    """
    # Differs: the original assumes 5 x 5 here, whatever the image and the pooling.
    height, width = _halved(size, max_pool, "--max_pool", ", or --max_pool=False")
    layers = range(1, 5)
    weights = {}
    for layer in layers:
        shape = (3, 3, channels if layer == 1 else filters, filters)
        weights[f"conv{layer}"] = Weight(shape, xavier_uniform, f"model/conv{layer}")
        weights[f"b{layer}"] = Weight((filters,), zeros, _unnamed(layer - 1))
    if mean_head:
        weights["w5"] = Weight((filters, way), normal, "model/w5")
    else:
        weights["w5"] = Weight((height * width * filters, way), xavier_uniform, "model/w5")
    weights["b5"] = Weight((way,), zeros, "model/b5")
    for layer in layers:
        weights |= _norm_weights(norm, layer, filters, tf1_scope=layer - 1)

    def body(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        group = group_size(weights["b5"])
        x = side_by_side(x, group)
        for layer in layers:
            x = conv(x, weights[f"conv{layer}"], stride=1 if max_pool else 2)
            x = _normalized(x, weights, layer, norm)
            if max_pool:  # before the ReLU: the two commute, and the ReLU is left a quarter of the work
                x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")
            x = tf.nn.relu(x)
        x = tf.reduce_mean(x, [1, 2]) if mean_head else x
        return _flat(apart(x, group), group, weights["w5"].shape[-2])

    more = {"batch_statistics": norm == "batch_norm", "takes_groups": True}
    return network(weights, body, _linear, ("w5", "b5"), **more)


def conv4_affine(size: tuple[int, int], channels: int, way: int, filters: int) -> Network:
    """Builds mmfewshot's Conv4: four times [3x3 convolution, batch norm, ReLU, 2x2 max-pooling], and a linear layer.

    Batch norm has gamma and beta, and the inner loop changes all weights. The last layer takes all height * width *
    filters numbers. Args as of conv4; mmfewshot has 64 filters. Raises InputError for images below 16 pixels.
    Source: open-mmlab/mmfewshot, backbones/conv4.py and heads/linear_head.py.
    """
    features = math.prod(_halved(size, True, "--network=conv4_affine")) * filters
    weights = {}
    for layer in range(1, 5):
        inputs = channels if layer == 1 else filters
        weights[f"b{layer}"] = Weight((filters,), functools.partial(torch_uniform, fan_in=9 * inputs), f"b{layer}")
        weights |= _affine_layer(f"{layer}", (3, 3, inputs, filters))
    weights |= _torch_linear(features, way)

    def body(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        group = group_size(weights["b5"])
        x = side_by_side(x, group)
        for layer in range(1, 5):  # the bias cancels in batch norm, so it is not added
            x = tf.nn.max_pool2d(_affine(x, weights, f"{layer}"), ksize=2, strides=2, padding="VALID")
            x = tf.nn.relu(x)
        return _flat(apart(x, group), group, features)

    return network(weights, body, _linear, ("w5", "b5"), batch_statistics=True, takes_groups=True)


def resnet12(size: tuple[int, int], channels: int, way: int, widths: Sequence[int] = (64, 160, 320, 640)) -> Network:
    """Builds mmfewshot's ResNet12: four residual blocks, the mean over height and width, and a linear layer.

    A block is three times [3x3 convolution, batch norm], with a leaky ReLU (0.1) after the first two; the block's input
    by a 1x1 convolution and a batch norm (layer 0) is added, and a leaky ReLU and 2x2 max-pooling follow. Batch norm
    has gamma and beta, the inner loop changes all weights, and there is no dropout.
    Args as of conv4; the filters of each block. Raises InputError for images below 16 pixels.
    Source: open-mmlab/mmfewshot, backbones/resnet12.py, which it has of MetaOptNet.
    """
    _halved(size, True, "--network=resnet12")
    weights = {}
    for block, (inputs, width) in enumerate(zip((channels, *widths), widths, strict=False), start=1):
        weights |= _affine_layer(f"{block}_0", (1, 1, inputs, width))
        for layer in (1, 2, 3):
            weights |= _affine_layer(f"{block}_{layer}", (3, 3, inputs if layer == 1 else width, width))
    weights |= _torch_linear(widths[-1], way)

    def body(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        group = group_size(weights["b5"])
        x = side_by_side(x, group)
        for block in range(1, len(widths) + 1):
            shortcut = _affine(x, weights, f"{block}_0")
            for layer in (1, 2):
                x = tf.nn.leaky_relu(_affine(x, weights, f"{block}_{layer}"), 0.1)
            x = shortcut + _affine(x, weights, f"{block}_3")
            x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")
            x = tf.nn.leaky_relu(x, 0.1)  # after the pooling: the two commute, and it is left a quarter of the work
        return apart(tf.reduce_mean(x, [1, 2]), group)

    return network(weights, body, _linear, ("w5", "b5"), batch_statistics=True, takes_groups=True)


def fc(inputs: int, hidden: Sequence[int], outputs: int, *, norm: str | None, tiny: bool = False) -> Network:
    """Builds fully connected layers, with a norm (if any) and a ReLU after each hidden one.

    Inputs are [n, ...], and are flattened to [n, inputs]. Weights begin as normals of stddev 0.01 cut at two stddevs,
    biases at 0.

    Args:
        inputs: numbers in one input.
        hidden: widths of the hidden layers.
        outputs: scores, or numbers that are predicted.
        norm: 'batch_norm', 'layer_norm' or None.
        tiny: compute all tasks in one operation and a hundred outer steps in one compiled program. On two cores a step
            of the sinusoid's 1,761 weights took 0.5 ms in one operation and 2.2 task by task, before it was compiled.
            Omniglot's 246,597 weights gain nothing in one operation (benchmarks/NOTES.md).
    Source: paper sections 5.1 (hidden 40, 40) and 5.2 (256, 128, 64, 64); the original's maml.py (construct_fc_weights,
    forward_fc).
    """
    widths = [inputs, *hidden, outputs]
    last = len(hidden) + 1
    weights = {}
    for layer in range(1, last + 1):
        shape = (widths[layer - 1], widths[layer])
        weights[f"w{layer}"] = Weight(shape, truncated_normal, _unnamed(2 * layer - 2))
        weights[f"b{layer}"] = Weight((widths[layer],), zeros, _unnamed(2 * layer - 1))
    for layer in range(1, last):
        # The original's norm scopes skip 1: its first hidden layer is '0', the second '2'.
        weights |= _norm_weights(norm, layer, widths[layer], tf1_scope=0 if layer == 1 else layer)

    def body(weights: Weights, x: tf.Tensor, product=tf.linalg.matmul) -> tf.Tensor:
        group = group_size(weights[f"b{last}"])
        x = _flat(x, group, widths[0])
        for layer in range(1, last):
            x = side_by_side(product(x, weights[f"w{layer}"]), group)
            x = apart(tf.nn.relu(_normalized(x, weights, layer, norm)), group)
        return x

    def last_layer(weights: Weights, x: tf.Tensor, product=tf.linalg.matmul) -> tf.Tensor:
        return _plus(product(x, weights[f"w{last}"]), weights[f"b{last}"])

    def inner_apply(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        return last_layer(weights, body(weights, x, special_grads.matmul), special_grads.matmul)

    more = {"batch_statistics": norm == "batch_norm", "takes_groups": True}
    if tiny:
        more |= {"inner_apply": inner_apply, "steps_a_call": STEPS_A_CALL}
    return network(weights, body, last_layer, (f"w{last}", f"b{last}"), **more)


def from_keras(model: "tf.keras.Model", **more: object) -> Network:
    """Makes a Network of a Keras 3 model, whose layers have no state but their weights.

    The names of the weights are those of the layers and their variables, as in dense_kernel. A seed initialises a copy
    of the model, so its initialisers are used; the values at hand and the model itself are left alone.
    Args: a built Sequential or functional model, of one input and one output; more fields of Network.
    Raises InputError for a model that is not built, has no weights, or has a layer that would be wrong here.
    """
    if not model.built:
        raise InputError(f"the Keras model {model.name} is not built: begin it with keras.Input(shape)")
    _refuse_layers(model)
    names = ["_".join(variable.path.split("/")[1:]) for variable in model.trainable_variables]
    if not names or len(set(names)) < len(names):
        raise InputError(f"the Keras model {model.name} has no weights, or two of one name: name its layers")

    def init(seed: int) -> Weights:
        state = random.getstate()  # an initialiser without a seed of its own draws one there
        try:
            random.seed(seed)
            variables = tf.keras.models.clone_model(model).trainable_variables
        finally:
            random.setstate(state)
        return {name: tf.convert_to_tensor(variable) for name, variable in zip(names, variables, strict=True)}

    def apply(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        return model.stateless_call([weights[name] for name in names], [], x)[0]

    return Network(init, apply, **more)


def _layers(model):
    """The layers of a Keras model, and all those inside them; first the innermost, which an error shall name."""
    layers = model._flatten_layers(include_self=False)  # Keras' own; `layers` leaves out those in a user's layers
    return sorted(layers, key=lambda layer: len(layer._flatten_layers()) > 1)


def _refuse_layers(model):
    """Refuses layers with state, and two whose second derivatives are wrong: Keras' tf.nn.moments stops a gradient.

    Raises InputError, which names the first of them.
    """
    keras = tf.keras.layers
    for layer in _layers(model):
        if isinstance(layer, keras.BatchNormalization):
            why = "has moving averages, which adaptation to one task must not change for the others"
            way_out = "write the network as two functions with special_grads.batch_norm (docs/predict.md)"
        elif isinstance(layer, keras.LayerNormalization | keras.GroupNormalization):
            why = "stops a gradient, so that its second derivatives are wrong"
            way_out = "take RMSNormalization, or write the network as two functions (docs/predict.md)"
        elif layer.non_trainable_variables:
            held = ", ".join(variable.name for variable in layer.non_trainable_variables)
            why, way_out = f"has state, or weights that are not trained ({held})", "leave it out"
        else:
            continue
        kind = type(layer).__name__
        raise InputError(f"layer {layer.name} ({kind}) of the Keras model {model.name} {why}: {way_out}")


def _conv_row(mean_head: bool) -> Callable[..., Network]:
    def build(shape, outputs, norm, filters, max_pool):
        *size, channels = shape
        return conv4(tuple(size), channels, outputs, filters, max_pool=max_pool, norm=norm, mean_head=mean_head)

    return build


def _fc_row(hidden: tuple[int, ...], tiny: bool = False) -> Callable[..., Network]:
    def build(shape, outputs, norm, filters, max_pool):  # it has no filters, and nothing to pool
        return fc(math.prod(shape), hidden, outputs, norm=norm, tiny=tiny)

    return build


def _mmfewshot_row(network: str) -> Callable[..., Network]:
    def build(shape, outputs, norm, filters, max_pool):  # it is pooled always
        if norm != "batch_norm":
            raise InputError(f"--network={network} has batch norm: leave --norm={norm} out")
        *size, channels = shape
        if network == "resnet12":
            return resnet12(tuple(size), channels, outputs)
        return conv4_affine(tuple(size), channels, outputs, filters)

    return build


# name -> function of (shape of one input, outputs, norm, filters, max_pool). The paper's, sections 5.1 and 5.2, and
# those of --network.
NETWORKS = {
    "sinusoid": _fc_row((40, 40), tiny=True),
    "omniglot": _conv_row(mean_head=True),
    "miniimagenet": _conv_row(mean_head=False),
    "no_conv": _fc_row((256, 128, 64, 64)),
    "conv4_affine": _mmfewshot_row("conv4_affine"),
    "resnet12": _mmfewshot_row("resnet12"),
}


# How weights may begin: functions of the shape of an array and its seed, float32. They name Philox, since TensorFlow's
# default algorithm gives other numbers in a compiled program.


def zeros(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.zeros(shape)


def ones(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.ones(shape)


def normal(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.random.stateless_normal(shape, seed, alg="philox")


def truncated_normal(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.random.stateless_truncated_normal(shape, seed, 0.0, 0.01, alg="philox")


def xavier_uniform(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    """Uniform within sqrt(6 / (fan in + fan out)), where a filter's fans count its pixels too."""
    limit = (6.0 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1]))) ** 0.5
    return tf.random.stateless_uniform(shape, seed, -limit, limit, alg="philox")


def kaiming_fan_out(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    """Normal with the variance 2 / fan out, where a filter's fan counts its pixels too."""
    stddev = (2.0 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5
    return tf.random.stateless_normal(shape, seed, 0.0, stddev, alg="philox")


def torch_uniform(shape: tuple[int, ...], seed: tuple[int, int], fan_in: int) -> tf.Tensor:
    """Uniform within 1 / sqrt(fan in), as PyTorch begins linear layers and biases."""
    return tf.random.stateless_uniform(shape, seed, -(fan_in**-0.5), fan_in**-0.5, alg="philox")


def _halved(size: tuple[int, int], max_pool: bool, flag: str, other_way_out: str = "") -> tuple[int, int]:
    """Halves height and width four times: pooling rounds down, strided SAME convolutions round up.

    Raises InputError where nothing is left. It names the flag that asks for the pooling.
    """
    height, width = size
    for _ in range(4):
        height, width = (side // 2 if max_pool else -(-side // 2) for side in (height, width))
    if not (height and width):
        raise InputError(
            f"images of {size[0]}x{size[1]} pixels are too small for {flag}, which halves them four times: "
            f"give --image_size=16 or more{other_way_out}"
        )
    return height, width


def _unnamed(number: int) -> str:
    """What TensorFlow 1 calls a variable that the original gave no name: Variable, Variable_1, ..."""
    return f"model/Variable_{number}" if number else "model/Variable"


def _norm_weights(norm: str | None, layer: int, width: int, tf1_scope: int) -> dict[str, Weight]:
    """The weights of one hidden layer's norm, which are meta-learned and not adapted."""
    begin = {None: {}, "batch_norm": {"beta": zeros}, "layer_norm": {"beta": zeros, "gamma": ones}}[norm]
    return {
        f"{name}{layer}": Weight((width,), initial, f"model/{tf1_scope}/{name}", adapted=False)
        for name, initial in begin.items()
    }


def _affine_layer(layer: str, shape: tuple[int, int, int, int]) -> dict[str, Weight]:
    """The weights of a convolution and its batch norm, which the original does not have: their names are its own."""
    each = {"conv": (shape, kaiming_fan_out), "gamma": (shape[-1:], ones), "beta": (shape[-1:], zeros)}
    return {f"{name}{layer}": Weight(*one, f"{name}{layer}") for name, one in each.items()}


def _affine(x: tf.Tensor, weights: Weights, layer: str) -> tf.Tensor:
    """A convolution and its batch norm, of one task or of a group side by side."""
    x = conv(x, weights[f"conv{layer}"], stride=1)
    beta, gamma = (tf.reshape(weights[f"{name}{layer}"], [-1]) for name in ("beta", "gamma"))
    return special_grads.batch_norm(x, beta, gamma, TORCH_EPSILON)


def _torch_linear(inputs: int, way: int) -> dict[str, Weight]:
    """The weights of the last layer, as PyTorch begins them."""
    initial = functools.partial(torch_uniform, fan_in=inputs)
    return {"w5": Weight((inputs, way), initial, "w5"), "b5": Weight((way,), initial, "b5")}


def _linear(weights: Weights, x: tf.Tensor) -> tf.Tensor:
    """The last layer of the convolutional networks."""
    return _plus(tf.linalg.matmul(x, weights["w5"]), weights["b5"])


def conv(x: tf.Tensor, filters: tf.Tensor, stride: int) -> tf.Tensor:
    """Convolves with SAME padding: one task's images, or a group's, of which each task has filters of its own.

    Args: x [n, height, width, C] and filters [k, k, C, F] of any size k; or, of G tasks side by side,
        x [n, height, width, G * C] and filters [G, k, k, C, F]; stride, 1 or 2.
    Returns [n, height / stride, width / stride, F], rounded up, or G * F channels.

    A group's convolution is a matrix product with a batch axis G, on the k * k shifted slices of its images. That takes
    k * k times the memory of the images, but only matrix products, forward and in both gradients. `grouped_conv` takes
    no more memory, but grouped convolutions are slow on many GPUs, and XLA computes the input gradient of one with
    stride 2 on an input padded with zeros inside, which is four times the products.
    """
    if filters.shape.rank == 4:
        return tf.nn.conv2d(x, filters, strides=stride, padding="SAME")
    return grouped_conv(x, filters, stride) if GROUPED_CONV else sliced_conv(x, filters, stride)


# Which form a group's convolution has. No GPU has timed the two; the reasons for this one stand above.
GROUPED_CONV = False


def grouped_conv(x: tf.Tensor, filters: tf.Tensor, stride: int) -> tf.Tensor:
    """Computes conv of a group as one grouped convolution. Shapes as in conv."""
    group, height, width, inputs, outputs = filters.shape
    filters = tf.reshape(tf.transpose(filters, [1, 2, 3, 0, 4]), [height, width, inputs, group * outputs])
    return tf.nn.conv2d(x, filters, strides=stride, padding="SAME")


def sliced_conv(x: tf.Tensor, filters: tf.Tensor, stride: int) -> tf.Tensor:
    """Computes conv of a group as a batched matrix product on shifted slices. Shapes as in conv."""
    group, *kernel, inputs, outputs = filters.shape
    n, size = x.shape[0], x.shape[1:3]
    out = [-(-extent // stride) for extent in size]
    padding = [
        max((count - 1) * stride + taps - extent, 0) for count, taps, extent in zip(out, kernel, size, strict=True)
    ]
    x = tf.pad(x, [[0, 0], *([pad // 2, pad - pad // 2] for pad in padding), [0, 0]])
    slices = [
        x[:, i : i + stride * (out[0] - 1) + 1 : stride, j : j + stride * (out[1] - 1) + 1 : stride]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    x = tf.reshape(tf.stack(slices, 3), [n * out[0] * out[1], len(slices), group, inputs])
    x = tf.reshape(tf.transpose(x, [2, 0, 1, 3]), [group, -1, len(slices) * inputs])
    x = tf.linalg.matmul(x, tf.reshape(filters, [group, len(slices) * inputs, outputs]))
    return tf.reshape(tf.transpose(x, [1, 0, 2]), [n, *out, group * outputs])


def group_size(bias: tf.Tensor) -> int | None:
    """Finds G of a group's weights, by a bias [G, width]. None: they are the weights [width] of one task."""
    return bias.shape[0] if bias.shape.rank == 2 else None


def side_by_side(x: tf.Tensor, group: int | None) -> tf.Tensor:
    """Lays the tasks of a group beside each other in the channels: [G, n, ..., C] becomes [n, ..., G * C]."""
    if group is None:
        return x
    rank = x.shape.rank
    x = tf.transpose(x, [*range(1, rank - 1), 0, rank - 1])
    return tf.reshape(x, [*x.shape[:-2], group * x.shape[-1]])


def apart(x: tf.Tensor, group: int | None) -> tf.Tensor:
    """Gives each task of a group its own place again: [n, ..., G * C] becomes [G, n, ..., C]."""
    if group is None:
        return x
    x = tf.reshape(x, [*x.shape[:-1], group, x.shape[-1] // group])
    rank = x.shape.rank
    return tf.transpose(x, [rank - 2, *range(rank - 2), rank - 1])


def _flat(x, group, width):
    """Makes of inputs [n, ...] vectors [n, width], or of a group's, [G, n, ...], [G, n, width]."""
    return tf.reshape(x, [-1, width] if group is None else [group, -1, width])


def _plus(x, bias):
    """Adds to the last layer's scores [n, N] their bias [N], or to [G, n, N] that of each task, [G, N]."""
    return x + (bias if bias.shape.rank == 1 else bias[:, None])


def _normalized(x: tf.Tensor, weights: Weights, layer: int, norm: str | None) -> tf.Tensor:
    """A hidden layer's bias and norm, of one task or of a group side by side.

    Under batch norm the bias cancels: it is not added, and its gradient is exactly 0.
    """

    def each_channel(name):
        values = weights[f"{name}{layer}"]
        return values if values.shape.rank == 1 else tf.reshape(values, [-1])

    if norm == "batch_norm":
        return special_grads.batch_norm(x, each_channel("beta"))
    x = x + each_channel("b")
    if norm == "layer_norm":
        group = group_size(weights[f"b{layer}"])
        x = apart(x, group)
        axes = list(range(1 if group is None else 2, x.shape.rank))  # all of one example of one task
        centred = x - tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        x = side_by_side(centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON), group)
        x = x * each_channel("gamma") + each_channel("beta")
    return x
