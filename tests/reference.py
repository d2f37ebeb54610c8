"""A slow and obvious MAML: the executable specification that maml.py is tested against.

One task after the other, in plain operations, with automatic differentiation, eagerly, in float64. Independent of
maml.py, networks.py and special_grads.py.
"""

import tensorflow as tf

BATCH_NORM_EPSILON = 0.001
LAYER_NORM_EPSILON = 1e-12
TORCH_EPSILON = 1e-5


def normalize(x, axes, epsilon):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean((x - mean) ** 2, axes, keepdims=True)
    return (x - mean) / tf.sqrt(variance + epsilon)


def hidden(x, weights, layer, norm):
    """Apply bias and norm. The caller adds ReLU and pooling."""
    x = x + weights[f"b{layer}"]
    if norm == "batch_norm":
        return normalize(x, list(range(len(x.shape) - 1)), BATCH_NORM_EPSILON) + weights[f"beta{layer}"]
    if norm == "layer_norm":
        x = normalize(x, list(range(1, len(x.shape))), LAYER_NORM_EPSILON)
        return x * weights[f"gamma{layer}"] + weights[f"beta{layer}"]
    return x


def conv4(weights, x, *, max_pool, norm, mean_head):
    for layer in range(1, 5):
        x = tf.nn.conv2d(x, weights[f"conv{layer}"], strides=1 if max_pool else 2, padding="SAME")
        x = tf.nn.relu(hidden(x, weights, layer, norm))
        if max_pool:
            x = tf.nn.max_pool2d(x, 2, 2, "VALID")
    x = tf.reduce_mean(x, [1, 2]) if mean_head else tf.reshape(x, [x.shape[0], -1])
    return x @ weights["w5"] + weights["b5"]


def fc(weights, x, *, norm):
    x = tf.reshape(x, [x.shape[0], -1])
    last = sum(name.startswith("w") for name in weights)
    for layer in range(1, last):
        x = tf.nn.relu(hidden(x @ weights[f"w{layer}"], weights, layer, norm))
    return x @ weights[f"w{last}"] + weights[f"b{last}"]


def affine(x, weights, layer):
    """Apply a convolution, its bias if it has one, and batch norm with gamma and beta."""
    x = tf.nn.conv2d(x, weights[f"conv{layer}"], strides=1, padding="SAME") + weights.get(f"b{layer}", 0)
    return weights[f"gamma{layer}"] * normalize(x, [0, 1, 2], TORCH_EPSILON) + weights[f"beta{layer}"]


def conv4_affine(weights, x):
    for layer in range(1, 5):
        x = tf.nn.max_pool2d(tf.nn.relu(affine(x, weights, layer)), 2, 2, "VALID")
    return tf.reshape(x, [x.shape[0], -1]) @ weights["w5"] + weights["b5"]


def resnet12(weights, x):
    for block in range(1, 5):
        inputs = x
        for layer in (1, 2, 3):
            x = affine(x, weights, f"{block}_{layer}")
            x = tf.nn.leaky_relu(x, 0.1) if layer < 3 else x
        x = tf.nn.leaky_relu(x + affine(inputs, weights, f"{block}_0"), 0.1)
        x = tf.nn.max_pool2d(x, 2, 2, "VALID")
    return tf.reduce_mean(x, [1, 2]) @ weights["w5"] + weights["b5"]


def step_size(weights, name, update, learned, inner_lr):
    """Return the step size for an adapted weight: alpha, one per element (Meta-SGD), or one per update (MAML++)."""
    if learned == "none":
        return inner_lr
    sizes = weights[f"step_size_{name}"]
    return sizes if learned == "weight" else sizes[min(update, len(sizes) - 1)]


def adapted_names(weights, what, norms):
    """Return the names that the inner loop changes: the last layer's (ANIL), the others (BOIL) or all.

    norms: include gammas and betas.
    """
    excluded = ("step_size",) if norms else ("beta", "gamma", "step_size")
    names = [name for name in weights if not name.startswith(excluded)]
    if what == "all":
        return names
    last = max(int(name[-1]) for name in names)
    return [name for name in names if (int(name[-1]) == last) == (what == "head")]


def task_loss(apply, loss, weights, task, inner_lr, inner_steps, first_order, adapt="all", learned="none", norms=False):
    """Return the query loss of one task after the inner loop (paper, Algorithm 2, lines 5 to 7; a term of line 10)."""
    weights = dict(weights)
    for update in range(inner_steps):
        adapted = adapted_names(weights, adapt, norms)
        with tf.GradientTape() as tape:
            tape.watch([weights[name] for name in adapted])
            support_loss = loss(apply(weights, task.support_x), task.support_y)
        gradients = tape.gradient(support_loss, [weights[name] for name in adapted])
        for name, gradient in zip(adapted, gradients, strict=True):
            gradient = tf.stop_gradient(gradient) if first_order else gradient
            weights[name] = weights[name] - step_size(weights, name, update, learned, inner_lr) * gradient
    return loss(apply(weights, task.query_x), task.query_y)


def meta_gradient(apply, loss, weights, tasks, inner_lr, inner_steps, first_order=False, **variant):
    """Return the mean query loss over tasks, and its gradient with respect to the meta-learned weights."""
    with tf.GradientTape() as tape:
        tape.watch(weights)
        losses = [
            task_loss(apply, loss, weights, task, inner_lr, inner_steps, first_order, **variant)
            for task in (type(tasks)(*(part[i] for part in tasks)) for i in range(tasks.support_x.shape[0]))
        ]
        mean = tf.add_n(losses) / len(losses)
    return mean, tape.gradient(mean, weights, unconnected_gradients="zero")
