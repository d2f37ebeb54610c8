"""The paper's networks and two of mmfewshot's: initial weights and forward functions, over a dict of weights.

A forward function computes one task, or a group of G tasks with separate weights. For a group, all weights, inputs and
outputs have a leading axis G. Inside a network, `side_by_side` concatenates the tasks of a group along the channels,
[n, height, width, G * C], so that batch norm, ReLU and pooling work as on one task. Layer norm, which normalizes an
example over all its channels, takes them `apart` again.

Weights have the original's names: convolutions conv1..conv4 (fully connected layers w1, w2, ...), biases b1, b2, ...,
the last layer w5 and b5 (or the next number), and the norms' beta1, ... (and gamma1, ...), one per hidden layer.
"""

import functools
import math
import random
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf

import special_grads
from files import InputError, check_choice
from recipe import ADAPTED, LEARNED_STEP_SIZES
from utils import Weights

LAYER_NORM_EPSILON = 1e-12  # tf.contrib.layers.layer_norm's, which the original uses
TORCH_EPSILON = 1e-5  # PyTorch's batch norm
STEPS_A_CALL = 100  # for networks so small that launching an operation costs more than computing it


class Network(NamedTuple):
    """One model: its initial weights, its outputs, and which weights the inner loop adapts.

    Only `init` and `apply` are required. The other fields configure the inner loop or make it faster.
    """

    init: Callable[[int], Weights]  # seed -> float32 weights
    apply: Callable[[Weights, tf.Tensor], tf.Tensor]  # weights, inputs [n, ...] -> outputs [n, O] of one task
    adapted: tuple[str, ...] | None = None  # weights that the inner loop changes; None: all. Ours exclude the norms
    tf1_names: dict[str, str] | None = None  # our name -> the variable's name in the original's checkpoints
    step_size: Callable[[Weights, str, int | tf.Tensor], tf.Tensor] | None = None  # weights, name, j; None: alpha
    prepare: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # weights, inputs -> features for inner_apply
    inner_apply: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # replaces apply in the inner loop
    batch_statistics: bool = False  # batch norm: an output depends on the other inputs of its batch
    takes_groups: bool = False  # apply also accepts a group of G tasks, with a leading axis G everywhere
    steps_a_call: int = 1  # outer steps per compiled program, all tasks in one operation; above 1 for tiny networks
    head: tuple[str, ...] = ()  # names of the last layer's weights; the others belong to the body
    body: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # weights, inputs -> features
    last_layer: Callable[[Weights, tf.Tensor], tf.Tensor] | None = None  # weights, features -> outputs

    def features(self, weights: Weights, x: tf.Tensor) -> tf.Tensor:
        """Return the inner loop's inputs: features, if it does not change the body (ANIL), or x itself."""
        return self.prepare(weights, x) if self.prepare else x

    def outputs(self, weights: Weights, features: tf.Tensor) -> tf.Tensor:
        """Return the outputs for what `features` returned."""
        return (self.inner_apply or self.apply)(weights, features)

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Return the name of each weight in a checkpoint: the original's, or its own if the original has none."""
        return {name: (self.tf1_names or {}).get(name, name) for name in names}


class Weight(NamedTuple):
    """One array of weights, as a network declares it."""

    shape: tuple[int, ...]
    initial: Callable[[tuple[int, ...], tuple[int, int]], tf.Tensor]  # shape, seed of this array -> float32 values
    tf1_name: str  # the variable's name in the original's checkpoints
    adapted: bool = True  # False: only the outer loop changes it


def network(
    weights: dict[str, Weight],
    body: Callable[[Weights, tf.Tensor], tf.Tensor],
    last_layer: Callable[[Weights, tf.Tensor], tf.Tensor],
    head: tuple[str, ...],
    **more: object,
) -> Network:
    """Build a Network from its weights and its two parts.

    Args:
        weights: name -> weight, in an order that determines their seeds.
        body: weights, inputs -> features.
        last_layer: weights, features -> outputs.
        head: names of the last layer's weights.
        more: other fields of Network.
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
    """Return the network with only some of its weights adapted by the inner loop.

    what: 'all', MAML; 'head', only the last layer, as in ANIL (Raghu, Raghu, Bengio, Vinyals, ICLR 2020), so features
    are computed once per task; 'body', all other layers, as in BOIL (Oh, Yoo, Kim, Yun, ICLR 2021).
    Raise InputError for any other value, or if the network does not name its last layer.
    """
    check_choice("adapt", what, ADAPTED)
    if what == "all":
        return network
    if network.adapted is None or not set(network.head) & set(network.adapted):
        raise InputError(f"adapt={what}: needs a network that names its last layer; set its `adapted` and `head`")
    if what == "body":
        return network._replace(adapted=tuple(name for name in network.adapted if name not in network.head))
    adapted = tuple(name for name in network.adapted if name in network.head)
    return network._replace(adapted=adapted, prepare=network.body, inner_apply=network.last_layer)


def with_step_sizes(network: Network, kind: str, alpha: float, steps: int) -> Network:
    """Return the network with meta-learned inner step sizes as extra weights, step_size_<name>, initially alpha.

    The inner loop does not adapt them. kind: 'none', alpha stays constant; 'weight', one per element of each adapted
    weight, the same at every step (Meta-SGD, Li, Zhou, Chen, Li 2017); 'step', one per adapted weight and step (MAML++,
    Antoniou, Edwards, Storkey, ICLR 2019), with the last reused for later steps.
    Raise InputError for any other value.
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
    """Return the outputs [n, O] for query inputs, each normalized separately, together with the support set.

    An output then does not depend on the other queries, unlike in the paper, where all queries are one batch. This
    matters only for batch norm, which then needs a batch of N * K + 1 inputs for each query.
    Args: weights after the inner steps; support_x [N * K, *D]; query_x [n, *D]. With group_axes=1 these and the result
    have a leading axis G.
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
    """Build four blocks of [3x3 convolution, norm, ReLU], each halving the image, and a linear layer to N scores.

    Inputs are [n, height, width, channels]. They are halved by stride 2 with SAME padding or, with max_pool, by 2x2
    VALID pooling after a stride-1 convolution. All convolutions are initialized Xavier uniform.

    Args:
        size: height and width of an image in pixels.
        channels: per image.
        way: N, the number of scores.
        filters: per convolution.
        max_pool: downsample by pooling instead of strided convolutions.
        norm: 'batch_norm', 'layer_norm' or None.
        mean_head: the last layer takes the mean over height and width, and is initialized from N(0, 1) (Omniglot);
            else it takes all height * width * filters numbers in that order, and is Xavier uniform (MiniImagenet).
    Raise InputError if the images are too small to be halved four times: with max_pool, below 16 pixels.
    Source: paper section 5.2 and appendix A; the original's maml.py (construct_conv_weights, forward_conv).
    """
    # Differs: the original assumes 5 x 5 here, regardless of image size and pooling.
    height, width = _halved(size, max_pool, "--max_pool", ", or --max_pool=False")
    layers = range(1, 5)
    weights = {}
    for layer in layers:
        shape = (3, 3, channels if layer == 1 else filters, filters)
        weights[f"conv{layer}"] = Weight(shape, xavier_uniform, f"model/conv{layer}")
        weights[f"b{layer}"] = Weight((filters,), zeros, _tf1_default_name(layer - 1))
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
            x = _bias_and_norm(x, weights, layer, norm)
            if max_pool:  # before the ReLU: the two commute, and the ReLU then does a quarter of the work
                x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")
            x = tf.nn.relu(x)
        x = tf.reduce_mean(x, [1, 2]) if mean_head else x
        return _flatten(apart(x, group), group, weights["w5"].shape[-2])

    more = {"batch_statistics": norm == "batch_norm", "takes_groups": True}
    return network(weights, body, _linear, ("w5", "b5"), **more)


def conv4_affine(size: tuple[int, int], channels: int, way: int, filters: int) -> Network:
    """Build mmfewshot's Conv4: four blocks of [3x3 convolution, batch norm, ReLU, 2x2 max-pooling], a linear layer.

    Batch norm has gamma and beta, and the inner loop changes all weights. The last layer takes all height * width *
    filters numbers. Args as in conv4; mmfewshot uses 64 filters. Raise InputError for images below 16 pixels.
    Source: open-mmlab/mmfewshot, backbones/conv4.py and heads/linear_head.py.
    """
    features = math.prod(_halved(size, True, "--network=conv4_affine")) * filters
    weights = {}
    for layer in range(1, 5):
        inputs = channels if layer == 1 else filters
        weights[f"b{layer}"] = Weight((filters,), functools.partial(torch_uniform, fan_in=9 * inputs), f"b{layer}")
        weights |= _affine_weights(f"{layer}", (3, 3, inputs, filters))
    weights |= _torch_linear(features, way)

    def body(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        group = group_size(weights["b5"])
        x = side_by_side(x, group)
        for layer in range(1, 5):  # without the bias, which batch norm cancels
            x = tf.nn.max_pool2d(_affine(x, weights, f"{layer}"), ksize=2, strides=2, padding="VALID")
            x = tf.nn.relu(x)
        return _flatten(apart(x, group), group, features)

    return network(weights, body, _linear, ("w5", "b5"), batch_statistics=True, takes_groups=True)


def resnet12(size: tuple[int, int], channels: int, way: int, widths: Sequence[int] = (64, 160, 320, 640)) -> Network:
    """Build mmfewshot's ResNet12: four residual blocks, the mean over height and width, and a linear layer.

    A block has three layers of [3x3 convolution, batch norm], with a leaky ReLU (0.1) after the first two. A shortcut
    (layer 0: a 1x1 convolution of the block's input, batch norm) is added to the third layer's output. A leaky ReLU and
    2x2 max-pooling follow. Batch norm has gamma and beta; the inner loop changes all weights; no dropout.
    Args as in conv4; widths: filters of each block. Raise InputError for images below 16 pixels.
    Source: open-mmlab/mmfewshot, backbones/resnet12.py, taken from MetaOptNet.
    """
    _halved(size, True, "--network=resnet12")
    weights = {}
    for block, (inputs, width) in enumerate(zip((channels, *widths), widths, strict=False), start=1):
        weights |= _affine_weights(f"{block}_0", (1, 1, inputs, width))
        for layer in (1, 2, 3):
            weights |= _affine_weights(f"{block}_{layer}", (3, 3, inputs if layer == 1 else width, width))
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
            x = tf.nn.leaky_relu(x, 0.1)  # after pooling: the two commute, and this is a quarter of the work
        return apart(tf.reduce_mean(x, [1, 2]), group)

    return network(weights, body, _linear, ("w5", "b5"), batch_statistics=True, takes_groups=True)


def fc(inputs: int, hidden: Sequence[int], outputs: int, *, norm: str | None, tiny: bool = False) -> Network:
    """Build fully connected layers, with a norm (if any) and a ReLU after each hidden layer.

    Inputs [n, ...] are flattened to [n, inputs]. Weights are initialized from a normal distribution with standard
    deviation 0.01, truncated at two standard deviations; biases are 0.

    Args:
        inputs: numbers per input.
        hidden: widths of the hidden layers.
        outputs: scores, or predicted numbers.
        norm: 'batch_norm', 'layer_norm' or None.
        tiny: compute all tasks in one operation and a hundred outer steps in one compiled program. On two cores,
            without compilation, a sinusoid step (1,761 weights) took 0.5 ms in one operation and 2.2 ms task by task.
            Omniglot's fully connected network (246,597 weights) gains nothing from it (benchmarks/NOTES.md).
    Source: paper sections 5.1 (hidden 40, 40) and 5.2 (256, 128, 64, 64); the original's maml.py (construct_fc_weights,
    forward_fc).
    """
    widths = [inputs, *hidden, outputs]
    last = len(hidden) + 1
    weights = {}
    for layer in range(1, last + 1):
        shape = (widths[layer - 1], widths[layer])
        weights[f"w{layer}"] = Weight(shape, truncated_normal, _tf1_default_name(2 * layer - 2))
        weights[f"b{layer}"] = Weight((widths[layer],), zeros, _tf1_default_name(2 * layer - 1))
    for layer in range(1, last):
        # The original's norm scopes skip 1: the first hidden layer is '0', the second '2'.
        weights |= _norm_weights(norm, layer, widths[layer], tf1_scope=0 if layer == 1 else layer)

    def body(weights: Weights, x: tf.Tensor, product=tf.linalg.matmul) -> tf.Tensor:
        group = group_size(weights[f"b{last}"])
        x = _flatten(x, group, widths[0])
        for layer in range(1, last):
            x = side_by_side(product(x, weights[f"w{layer}"]), group)
            x = apart(tf.nn.relu(_bias_and_norm(x, weights, layer, norm)), group)
        return x

    def last_layer(weights: Weights, x: tf.Tensor, product=tf.linalg.matmul) -> tf.Tensor:
        return _add_bias(product(x, weights[f"w{last}"]), weights[f"b{last}"])

    def inner_apply(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        return last_layer(weights, body(weights, x, special_grads.matmul), special_grads.matmul)

    more = {"batch_statistics": norm == "batch_norm", "takes_groups": True}
    if tiny:
        more |= {"inner_apply": inner_apply, "steps_a_call": STEPS_A_CALL}
    return network(weights, body, last_layer, (f"w{last}", f"b{last}"), **more)


def from_keras(model: "keras.Model", keep_weights: bool = False, **more: object) -> Network:  # noqa: F821
    """Build a Network from a Keras 3 model.

    Its weights are the model's trainable ones, named after their layers, such as dense_kernel. Everything else, such as
    the weights of frozen layers and the moving statistics of a frozen batch norm, is constant. The network does not
    change the model, and later changes of the model do not change the network.

    Args:
        model: built, with one input [n, *D] and one output [n, O].
        keep_weights: start from the model's weights, whatever the seed; False: draw new ones with its initializers.
        more: other fields of Network.
    Raise InputError for a model that has no trainable weights, or that MAML would compute wrongly.
    """
    shape = _keras_input(model)
    _check_layers(model)
    trained = model.trainable_variables
    names = _keras_names(model)
    ids = {id(variable) for variable in trained}
    places = [place for place, variable in enumerate(model.variables) if id(variable) in ids]
    current = [tf.convert_to_tensor(variable) for variable in model.variables]
    constants = [pair for place, pair in enumerate(zip(model.variables, current, strict=True)) if place not in places]

    def named(values):
        return {name: tf.convert_to_tensor(values[place]) for name, place in zip(names, places, strict=True)}

    def init(seed: int) -> Weights:
        if keep_weights:
            return named(current)
        state = random.getstate()  # an initializer without a seed draws one from Python's `random`
        try:
            random.seed(seed)
            return named(tf.keras.models.clone_model(model).variables)
        except Exception as error:
            problem = f"cannot be copied to draw weights ({_reason(error)})"
            raise _keras_error(model, problem, "give keep_weights=True") from error
        finally:
            random.setstate(state)

    def call(weights, x, training=None):
        # The gradient of a reshape is a tensor; an Embedding's own are IndexedSlices, without arithmetic.
        dense = {name: tf.reshape(weight, weight.shape) for name, weight in weights.items()}
        values = [(variable, dense[name]) for variable, name in zip(trained, names, strict=True)]
        return _call_keras(model, values + constants, x, training)

    def check(weights, x):
        _check_call(model, *call(weights, x, training=True))

    specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, named(current))
    x = tf.TensorSpec([2, *shape], current[places[0]].dtype)
    tf.function(check, autograph=False).get_concrete_function(specs, x)  # computes nothing
    return Network(init, lambda weights, x: call(weights, x)[0][0], **more)


def _keras_error(model, problem, fix, layer=None):
    """Return the InputError for a Keras model or for one of its layers."""
    where = f"layer {layer.name} ({type(layer).__name__}) of " if layer else ""
    return InputError(f"{where}Keras model {model.name}: {problem}; {fix}")


def _reason(error):
    """Return the beginning of Keras' message on one line."""
    text = re.sub(r"\x1b\[\d*m|Exception encountered when calling .*", "", str(error))
    return textwrap.shorten(text, 200, placeholder=" ...") or type(error).__name__


def _keras_input(model):
    """Return the shape of one input of a built Keras model, without the batch. None: any size."""
    import keras  # only here: it takes a second, and fails in some environments

    if not isinstance(model, keras.Model):
        raise InputError(f"Keras model {model!r}: is not a Keras 3 model; build it with `import keras`")
    if keras.backend.backend() != "tensorflow":
        raise InputError(f"KERAS_BACKEND: is {keras.backend.backend()}; set it to tensorflow")
    if not model.built:
        raise _keras_error(model, "is not built", "begin it with keras.Input(shape), or call it once")
    inputs = getattr(model, "inputs", None)
    if inputs is None:  # a subclassed model knows only what it was called on
        shape = (model.get_build_config() or {}).get("input_shape")
    else:
        shape = inputs[0].shape if len(inputs) == 1 else None
    if not shape or not all(isinstance(size, int | None) for size in shape):
        raise _keras_error(model, "does not have one input", "concatenate its inputs, and split them in the model")
    if inputs and inputs[0].dtype == "string":
        raise _keras_error(model, "takes text", "apply its text layers to the data, and leave them out")
    return shape[1:]


def _keras_names(model):
    """Return the names of the trainable weights: their paths without the model, numbered if two are the same."""
    names = []
    for variable in model.trainable_variables:
        first = name = variable.path.removeprefix(f"{model.name}/").replace("/", "_")
        number = 2
        while name in names:
            name, number = f"{first}_{number}", number + 1
        names.append(name)
    return names


def _call_keras(model, values, x, training):
    """Call a Keras model with these (variable, value) pairs. Return its outputs, the variables it set, and its losses.

    Raise InputError with Keras' reason.
    """
    import keras

    try:
        with keras.StatelessScope(values, collect_losses=True) as scope:
            before = [scope.get_current_value(variable) for variable, _ in values]
            structure = getattr(model, "_inputs_struct", None)  # private, because Sequential lacks `input`
            inputs = tf.nest.pack_sequence_as(structure, [x]) if isinstance(structure, dict) else x
            outputs = tf.nest.flatten(model(inputs, training=training))
            after = [scope.get_current_value(variable) for variable, _ in values]
    except Exception as error:
        problem = f"cannot be called on an array {list(x.shape)} ({_reason(error)})"
        raise _keras_error(model, problem, "change the model, or the shape of the inputs") from error
    changed = [variable for (variable, _), old, new in zip(values, before, after, strict=True) if old is not new]
    return outputs, changed, scope.losses


def _innermost_first(layer):
    """Return a Keras layer and those nested in it, innermost first, so errors name the innermost layer."""
    layers = layer._flatten_layers()  # private, because `layers` misses those in custom layers
    return sorted(layers, key=lambda layer: len(layer._flatten_layers()) > 1)


def _owner(model, variable):
    """Return the innermost layer that has the variable."""
    return next(layer for layer in _innermost_first(model) if any(variable is each for each in layer.variables))


def _check_layers(model):
    """Raise InputError if nothing is trainable, or for penalties, constraints, float16 or wrong second derivatives."""
    layers = tf.keras.layers
    if not model.trainable_variables:
        raise _keras_error(model, "has no trainable weights", "add a layer with weights, or set its trainable = True")
    dtypes = sorted({variable.dtype for variable in model.trainable_variables})
    if len(dtypes) > 1:
        raise _keras_error(
            model, f"has trained weights of types {', '.join(dtypes)}", "build all layers with one dtype"
        )
    for variable in model.trainable_variables:
        kind = "regularizer" if variable.regularizer else "constraint" if variable.constraint else None
        if kind:
            problem = f"has a {kind} on its {variable.name}, which MAML does not apply"
            fix = f"remove it ({variable.name}.{kind} = None)"
            raise _keras_error(model, problem, fix, _owner(model, variable))
    # Layers are in the order of computation, so derivatives go through those after the first that is trained, except
    # in a subclassed model, whose order is unknown.
    derived = not getattr(model, "inputs", None)
    for outer in model.layers:
        derived = derived or bool(outer.trainable_variables)
        for layer in _innermost_first(outer):
            if not isinstance(layer, layers.InputLayer) and layer.compute_dtype in ("float16", "bfloat16"):
                problem = f"computes in {layer.compute_dtype}, in which gradients of gradients underflow"
                raise _keras_error(model, problem, "build it with keras.config.set_dtype_policy('float32')", layer)
            if derived and isinstance(layer, layers.LayerNormalization | layers.GroupNormalization):
                problem = "stops a gradient, so its second derivatives are wrong"
                fix = "use RMSNormalization, or write the network as two functions (docs/library.md)"
                raise _keras_error(model, problem, fix, layer)
            if derived and getattr(layer, "use_cudnn", False) and tf.config.list_physical_devices("GPU"):
                raise _keras_error(model, "has no second derivatives in cuDNN", "build it with use_cudnn=False", layer)


def _check_call(model, outputs, changed, losses):
    """Raise InputError for what a traced call in training mode shows: several outputs, state, losses, or a softmax."""
    if len(outputs) != 1 or outputs[0].shape.rank != 2:
        shapes = [list(output.shape) for output in outputs]
        raise _keras_error(model, f"has outputs of shapes {shapes} for 2 inputs", "end it with one output [n, O]")
    for variable in changed:
        layer = _owner(model, variable)
        if not layer.trainable:  # Keras passes training=True on to frozen layers, too; `apply` does not
            continue
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            problem = "has moving averages, which adapting to one task would change for the others"
            fix = (
                "freeze it (trainable = False), or write two functions with special_grads.batch_norm (docs/library.md)"
            )
        else:
            problem, fix = f"has state that training changes ({variable.name})", "leave it out, or freeze it"
        raise _keras_error(model, problem, fix, layer)
    if losses:
        raise _keras_error(model, "adds losses, which MAML does not apply", "remove add_loss and activity_regularizer")
    operation = outputs[0].op
    while operation.type in ("Identity", "Reshape"):
        operation = operation.inputs[0].op
    if operation.type == "Softmax":
        raise _keras_error(model, "ends with a softmax, but the losses take logits", "remove its last activation")


def _conv_row(mean_head: bool) -> Callable[..., Network]:
    def build(shape, outputs, norm, filters, max_pool):
        *size, channels = shape
        return conv4(tuple(size), channels, outputs, filters, max_pool=max_pool, norm=norm, mean_head=mean_head)

    return build


def _fc_row(hidden: tuple[int, ...], tiny: bool = False) -> Callable[..., Network]:
    def build(shape, outputs, norm, filters, max_pool):  # without convolutions: ignores filters, max_pool
        return fc(math.prod(shape), hidden, outputs, norm=norm, tiny=tiny)

    return build


def _mmfewshot_row(network: str) -> Callable[..., Network]:
    def build(shape, outputs, norm, filters, max_pool):  # always pools, so it ignores max_pool
        if norm != "batch_norm":
            raise InputError(f"--norm={norm}: --network={network} always has batch norm; omit --norm")
        *size, channels = shape
        if network == "resnet12":
            return resnet12(tuple(size), channels, outputs)
        return conv4_affine(tuple(size), channels, outputs, filters)

    return build


# name -> function of (shape of one input, outputs, norm, filters, max_pool). The networks of the paper (sections 5.1
# and 5.2) and those of --network.
NETWORKS = {
    "sinusoid": _fc_row((40, 40), tiny=True),
    "omniglot": _conv_row(mean_head=True),
    "miniimagenet": _conv_row(mean_head=False),
    "no_conv": _fc_row((256, 128, 64, 64)),
    "conv4_affine": _mmfewshot_row("conv4_affine"),
    "resnet12": _mmfewshot_row("resnet12"),
}


# Initializers: functions of an array's shape and seed, float32. They use Philox because TensorFlow's default algorithm
# gives different numbers in a compiled program.


def zeros(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.zeros(shape)


def ones(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.ones(shape)


def normal(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.random.stateless_normal(shape, seed, alg="philox")


def truncated_normal(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    return tf.random.stateless_truncated_normal(shape, seed, 0.0, 0.01, alg="philox")


def xavier_uniform(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    """Draw uniformly within sqrt(6 / (fan in + fan out)). A filter's fans include its pixels."""
    limit = (6.0 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1]))) ** 0.5
    return tf.random.stateless_uniform(shape, seed, -limit, limit, alg="philox")


def kaiming_fan_out(shape: tuple[int, ...], seed: tuple[int, int]) -> tf.Tensor:
    """Draw from a normal distribution with variance 2 / fan out. A filter's fan includes its pixels."""
    stddev = (2.0 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5
    return tf.random.stateless_normal(shape, seed, 0.0, stddev, alg="philox")


def torch_uniform(shape: tuple[int, ...], seed: tuple[int, int], fan_in: int) -> tf.Tensor:
    """Draw uniformly within 1 / sqrt(fan in), as PyTorch initializes linear layers and biases."""
    return tf.random.stateless_uniform(shape, seed, -(fan_in**-0.5), fan_in**-0.5, alg="philox")


def _halved(size: tuple[int, int], max_pool: bool, flag: str, alternative: str = "") -> tuple[int, int]:
    """Return height and width halved four times: pooling rounds down, strided SAME convolutions round up.

    Raise InputError if nothing is left. flag: the flag that requests pooling, for the error message.
    """
    height, width = size
    for _ in range(4):
        height, width = (side // 2 if max_pool else -(-side // 2) for side in (height, width))
    if not (height and width):
        raise InputError(
            f"--image_size: images of {size[0]}x{size[1]} pixels are too small for {flag}, which halves them four "
            f"times; give --image_size=16 or more{alternative}"
        )
    return height, width


def _tf1_default_name(number: int) -> str:
    """Return TensorFlow 1's name for a variable that the original leaves unnamed: Variable, Variable_1, ..."""
    return f"model/Variable_{number}" if number else "model/Variable"


def _norm_weights(norm: str | None, layer: int, width: int, tf1_scope: int) -> dict[str, Weight]:
    """Return the weights of one hidden layer's norm, which are meta-learned but not adapted."""
    initial_values = {None: {}, "batch_norm": {"beta": zeros}, "layer_norm": {"beta": zeros, "gamma": ones}}[norm]
    return {
        f"{name}{layer}": Weight((width,), initial, f"model/{tf1_scope}/{name}", adapted=False)
        for name, initial in initial_values.items()
    }


def _affine_weights(layer: str, shape: tuple[int, int, int, int]) -> dict[str, Weight]:
    """Return the weights of a convolution and its batch norm. The original lacks them, so checkpoints use our names."""
    arrays = {"conv": (shape, kaiming_fan_out), "gamma": (shape[-1:], ones), "beta": (shape[-1:], zeros)}
    return {f"{name}{layer}": Weight(*array, f"{name}{layer}") for name, array in arrays.items()}


def _affine(x: tf.Tensor, weights: Weights, layer: str) -> tf.Tensor:
    """Apply a convolution and its batch norm to one task, or to a group side by side."""
    x = conv(x, weights[f"conv{layer}"], stride=1)
    beta, gamma = (tf.reshape(weights[f"{name}{layer}"], [-1]) for name in ("beta", "gamma"))
    return special_grads.batch_norm(x, beta, gamma, TORCH_EPSILON)


def _torch_linear(inputs: int, way: int) -> dict[str, Weight]:
    """Return the weights of the last layer, initialized as in PyTorch."""
    initial = functools.partial(torch_uniform, fan_in=inputs)
    return {"w5": Weight((inputs, way), initial, "w5"), "b5": Weight((way,), initial, "b5")}


def _linear(weights: Weights, x: tf.Tensor) -> tf.Tensor:
    """Apply the last layer of a convolutional network."""
    return _add_bias(tf.linalg.matmul(x, weights["w5"]), weights["b5"])


def conv(x: tf.Tensor, filters: tf.Tensor, stride: int) -> tf.Tensor:
    """Convolve with SAME padding: the images of one task, or of a group whose tasks have separate filters.

    Args: x [n, height, width, C] and filters [k, k, C, F] of any size k; or, for G tasks side by side,
        x [n, height, width, G * C] and filters [G, k, k, C, F]; stride, 1 or 2.
    Return [n, height / stride, width / stride, F], rounded up; for a group, with G * F channels.

    `sliced_conv` computes a group as a matrix product with a batch axis G, on k * k shifted slices of the images. That
    takes k * k times the memory of the images, but uses only matrix products, forward and in both gradients.
    `grouped_conv` takes no extra memory, but grouped convolutions are slow on many GPUs, and for stride 2 XLA computes
    the input gradient on an input with zeros inserted, which takes four times as many products.
    """
    if filters.shape.rank == 4:
        return tf.nn.conv2d(x, filters, strides=stride, padding="SAME")
    return grouped_conv(x, filters, stride) if GROUPED_CONV else sliced_conv(x, filters, stride)


GROUPED_CONV = False  # see conv; not timed on a GPU


def grouped_conv(x: tf.Tensor, filters: tf.Tensor, stride: int) -> tf.Tensor:
    """Compute conv for a group as one grouped convolution. Shapes as in conv."""
    group, height, width, inputs, outputs = filters.shape
    filters = tf.reshape(tf.transpose(filters, [1, 2, 3, 0, 4]), [height, width, inputs, group * outputs])
    return tf.nn.conv2d(x, filters, strides=stride, padding="SAME")


def sliced_conv(x: tf.Tensor, filters: tf.Tensor, stride: int) -> tf.Tensor:
    """Compute conv for a group as a batched matrix product on shifted slices. Shapes as in conv."""
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
    """Return G for a bias [G, width] of a group, or None for a bias [width] of one task."""
    return bias.shape[0] if bias.shape.rank == 2 else None


def side_by_side(x: tf.Tensor, group: int | None) -> tf.Tensor:
    """Concatenate the tasks of a group along the channels: [G, n, ..., C] becomes [n, ..., G * C]."""
    if group is None:
        return x
    rank = x.shape.rank
    x = tf.transpose(x, [*range(1, rank - 1), 0, rank - 1])
    return tf.reshape(x, [*x.shape[:-2], group * x.shape[-1]])


def apart(x: tf.Tensor, group: int | None) -> tf.Tensor:
    """Undo side_by_side: [n, ..., G * C] becomes [G, n, ..., C]."""
    if group is None:
        return x
    x = tf.reshape(x, [*x.shape[:-1], group, x.shape[-1] // group])
    rank = x.shape.rank
    return tf.transpose(x, [rank - 2, *range(rank - 2), rank - 1])


def _flatten(x, group, width):
    """Flatten inputs [n, ...] to [n, width], or a group's, [G, n, ...], to [G, n, width]."""
    return tf.reshape(x, [-1, width] if group is None else [group, -1, width])


def _add_bias(x, bias):
    """Add a bias [N] to the last layer's scores [n, N], or [G, N] to a group's, [G, n, N]."""
    return x + (bias if bias.shape.rank == 1 else bias[:, None])


def _bias_and_norm(x: tf.Tensor, weights: Weights, layer: int, norm: str | None) -> tf.Tensor:
    """Apply a hidden layer's bias and norm to one task, or to a group side by side.

    Batch norm cancels the bias, so it is not added and its gradient is exactly 0.
    """

    def per_channel(name):
        values = weights[f"{name}{layer}"]
        return values if values.shape.rank == 1 else tf.reshape(values, [-1])

    if norm == "batch_norm":
        return special_grads.batch_norm(x, per_channel("beta"))
    x = x + per_channel("b")
    if norm == "layer_norm":
        group = group_size(weights[f"b{layer}"])
        x = apart(x, group)
        axes = list(range(1 if group is None else 2, x.shape.rank))  # everything in one example
        centered = x - tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centered), axes, keepdims=True)
        x = side_by_side(centered * tf.math.rsqrt(variance + LAYER_NORM_EPSILON), group)
        x = x * per_channel("gamma") + per_channel("beta")
    return x
