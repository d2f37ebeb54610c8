"""Record what the original's own graph computes, for tests/test_oracle.py to compare with.

The original is https://github.com/cbfinn/maml. Its maml.py and utils.py build the graph and need Python 3.7:

    git clone https://github.com/cbfinn/maml /tmp/original
    python3.7 -m venv /tmp/py37
    /tmp/py37/bin/pip install -r tests/oracle/requirements-record.txt
    /tmp/py37/bin/python tests/oracle/record.py --original=/tmp/original --out=tests/oracle

Each record has its own seed for weights and tasks; tasks whose meta-gradient depends on rounding are left out. Given a
.npz file, its weights and tasks are used instead. The graph runs in one thread, so the same machine writes
bit-identical files.

One correction is made; --stock omits it. The original's norms take their variance from tf.nn.moments, which stops a
gradient. For the batch norm of a convolution, TensorFlow 1.15 prefers a fused kernel, whose second derivative is wrong
too. First derivatives are right in both, but MAML needs the second. So the variance is computed without a stopped
gradient, with plain operations instead of the fused kernel. This replaces a function and a default of TensorFlow in
this process and leaves the clone unchanged.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import warnings
import zlib
from pathlib import Path

TENSORFLOW = "1.15.5"
# SHA-256 of the files that build the graph, at the original's last commit.
COMMIT = "a7f45f1bcd7457fe97b227a21e89b8a82cc5fa49"
DIGESTS = {
    "maml.py": "f5c686a54ad9ca3f31cc43f395ed672e6d97aebd2fd7c6d7964ad7396d03fffc",
    "utils.py": "5c0d0627a1384912abb064b6a0a8292403ea63554650712a19a2284a3baabfbf",
}

OUTER_STEPS = 3
TASKS = 4
QUERY = {"sinusoid": 10, "omniglot": 1, "miniimagenet": 1}  # query examples per class
TEST_UPDATES = {"sinusoid": 3, "omniglot": 3, "miniimagenet": 1}  # minimum number of updates in the graph

# The original's flags that affect the numbers. RECORDS lists only values that differ from the original's defaults.
FLAGS = (
    "datasource num_classes baseline pretrain_iterations metatrain_iterations meta_batch_size meta_lr "
    "update_batch_size update_lr num_updates norm num_filters conv max_pool stop_grad"
).split()
SINUSOID = {"datasource": "sinusoid", "norm": "None", "update_batch_size": 10}
OMNIGLOT = {"datasource": "omniglot", "update_batch_size": 1, "update_lr": 0.4, "num_filters": 8}
MINIIMAGENET = {
    "datasource": "miniimagenet",
    "update_batch_size": 1,
    "update_lr": 0.01,
    "num_updates": 5,
    "num_filters": 8,
    "max_pool": True,
}
RECORDS = {
    "sinusoid_10shot": SINUSOID,
    "sinusoid_3_updates": dict(SINUSOID, update_lr=0.01, num_updates=3),
    "sinusoid_first_order": dict(SINUSOID, update_lr=0.01, num_updates=3, stop_grad=True),
    "sinusoid_oracle_pretrain": dict(SINUSOID, baseline="oracle", pretrain_iterations=10, metatrain_iterations=0),
    "omniglot_5way_1shot": OMNIGLOT,
    "omniglot_20way_1shot": dict(OMNIGLOT, num_classes=20, update_lr=0.1, num_updates=5),
    "omniglot_first_order": dict(OMNIGLOT, num_updates=2, stop_grad=True),
    "omniglot_max_pool": dict(OMNIGLOT, max_pool=True),
    "omniglot_layer_norm": dict(OMNIGLOT, norm="layer_norm", update_lr=0.1),
    "omniglot_no_norm": dict(OMNIGLOT, norm="None", num_updates=2),
    "omniglot_fc": dict(OMNIGLOT, conv=False, update_lr=0.1),
    "miniimagenet_5way_1shot": MINIIMAGENET,
    # Two classes, because the images of five would take a third of the space of all records.
    "miniimagenet_2way_5shot": dict(MINIIMAGENET, update_batch_size=5, num_classes=2, num_updates=2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, metavar="DIR", help="a clone of cbfinn/maml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the records")
    parser.add_argument(
        "--stock",
        choices=["fused", "moments"],
        help="omit the correction: fused is plain TensorFlow 1.15; moments has plain operations instead of the fused "
        "kernel, and the stopped gradient of tf.nn.moments. Files are named stock_...",
    )
    parser.add_argument(
        "records",
        nargs="*",
        metavar="RECORD",
        help="a .npz file, to record its flags, weights and tasks again, or one of: " + ", ".join(RECORDS) + ". "
        "Default: all of these",
    )
    args = parser.parse_args()
    for name in args.records:
        if name not in RECORDS and not (name.endswith(".npz") and Path(name).is_file()):
            sys.exit(f"{name}: is not a .npz file or a record; choose one of {', '.join(RECORDS)}")
    import_libraries()
    original = import_original(args.original)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.records or RECORDS:
        arrays = (generated if name in RECORDS else again)(original, name, args.stock)
        prefix = f"stock_{args.stock}_" if args.stock else ""
        path = args.out / f"{prefix}{Path(name).stem}.npz"
        unfinished = path.with_name("." + path.name)
        np.savez_compressed(str(unfinished), **arrays)
        os.replace(str(unfinished), str(path))
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


def import_libraries():
    """Import NumPy and TensorFlow, or exit with a line that names the required versions."""
    global np, tf
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if sys.version_info[:2] != (3, 7):
            raise ImportError("this is Python {}.{}".format(*sys.version_info))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import numpy as np
            import tensorflow as tf
        if tf.__version__ != TENSORFLOW:
            raise ImportError(f"this is TensorFlow {tf.__version__}")
    except Exception as error:  # a protobuf that is too new raises TypeError
        reason, needed = str(error).split("\n")[0], Path(__file__).with_name("requirements-record.txt")
        sys.exit(f"record.py: needs TensorFlow {TENSORFLOW} ({reason}); install {needed} in a Python 3.7 environment")
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)


def import_original(folder):
    """Return the original's main.py as a module, with its flags and its class MAML.

    Exit with a one-line message if the folder is not an unchanged clone of the original.
    """
    for name, digest in DIGESTS.items():
        path = folder / name
        if not path.is_file():
            sys.exit(f"--original: {path} does not exist; give a clone of https://github.com/cbfinn/maml")
        if hashlib.sha256(path.read_text().encode()).hexdigest() != digest:
            sys.exit(f"--original: {path} differs from cbfinn/maml at commit {COMMIT}; check out that commit")
    sys.path.insert(0, str(folder))
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):  # hides an irrelevant warning
        module = importlib.import_module("main")
    module.FLAGS(["main.py"])
    return module


def again(original, path, stock):
    """Return the arrays of a record with the flags, weights and tasks of the file at `path`."""
    arrays = dict(np.load(path))
    weights = {key[len("weights/") :]: value for key, value in arrays.items() if key.startswith("weights/")}
    inputs = {key: value for key, value in arrays.items() if key.startswith(("input", "label"))}
    with contextlib.closing(Graph(original, json.loads(str(arrays["flags"])), stock)) as graph:
        return record(graph, weights, inputs, int(arrays["steps"]))


def generated(original, name, stock):
    """Return the arrays of one of RECORDS, with random weights and tasks."""
    defaults = {flag: original.FLAGS[flag].default for flag in FLAGS}
    flags = dict(defaults, **dict({"meta_batch_size": TASKS}, **RECORDS[name]))
    flags["test_num_updates"] = TEST_UPDATES[flags["datasource"]]
    random = np.random.default_rng(zlib.crc32(name.encode()))  # per record, so a new record changes no other
    draw = sinusoid_task if flags["datasource"] == "sinusoid" else image_task
    with contextlib.closing(Graph(original, flags, stock)) as graph:
        weights, drawn = initial_weights(random, flags, graph.shapes), 0
        while True:
            graph.load(weights)
            tasks = []
            while len(tasks) < flags["meta_batch_size"]:
                task, drawn = draw(random, flags), drawn + 1
                if is_steady(graph, task, random):
                    tasks.append(task)
            inputs = {key: np.concatenate([task[key] for task in tasks]) for key in tasks[0]}
            arrays = record(graph, weights, inputs, OUTER_STEPS)
            if are_steps_steady(graph, weights, inputs, arrays, random):
                return dict(arrays, tasks_drawn=np.array(drawn))


def is_steady(graph, task, random):
    """Return whether the meta-gradient of a task changes by less than 0.02% if its inputs change by about 1e-6.

    If a ReLU or a maximum flips, the gradient jumps, and inner updates amplify the jump. Two correct programs may then
    differ by the whole gradient, so such a task cannot test either of them.
    """
    feed = graph.feed(task)

    def gradient(size):
        moved = {key: value * (1 + size * random.standard_normal(value.shape)) for key, value in feed.items()}
        return np.concatenate([value.ravel() for value in graph.gradient(moved).values()])

    if not graph.meta_gradient:
        return True
    at = gradient(0)
    return all(np.linalg.norm(gradient(1e-6) - at) < 2e-4 * np.linalg.norm(at) for _ in range(3))


def are_steps_steady(graph, weights, inputs, arrays, random):
    """Return whether the change of each weight varies by less than 1% if the inputs change by about 1e-6.

    is_steady checks the tasks at the initial weights only. Weights whose gradient is rounding noise are skipped,
    because Adam scales noise up to a full step.
    """
    graph.load(weights)
    feed = {key: value * (1 + 1e-6 * random.standard_normal(value.shape)) for key, value in graph.feed(inputs).items()}
    for _ in range(int(arrays["steps"])):
        graph.step(feed)
    sizes = {name: np.linalg.norm(arrays.get("meta_gradient/" + name, 1.0)) for name in weights}
    return all(
        np.linalg.norm(graph.weight(name) - arrays["after/" + name])
        < 1e-2 * np.linalg.norm(arrays["after/" + name] - weights[name])
        for name in weights
        if sizes[name] > 1e-4 * max(sizes.values())
    )


def sinusoid_task(random, flags):
    """Return points of one sinusoid, float32 [1, K, 1] or, for the oracle, [1, K, 3]: x, amplitude, phase."""
    amplitude, phase = random.uniform(0.1, 5.0), random.uniform(0.0, np.pi)
    task = {}
    for part, points in (("a", flags["update_batch_size"]), ("b", QUERY["sinusoid"])):
        x = random.uniform(-5.0, 5.0, (1, points, 1))
        hints = [np.full_like(x, amplitude), np.full_like(x, phase)] if flags["baseline"] == "oracle" else []
        task["input" + part] = np.concatenate([x, *hints], 2).astype(np.float32)
        task["label" + part] = (amplitude * np.sin(x - phase)).astype(np.float32)
    return task


def image_task(random, flags):
    """Return the images of a task, uint8 [1, n, H, W, C], and one-hot labels [1, n, N].

    Example k of every class comes before example k + 1 of any class; the order of classes is random.
    """
    way, shot = flags["num_classes"], flags["update_batch_size"]
    new_class = new_character if flags["datasource"] == "omniglot" else new_texture
    classes = [new_class(random) for _ in range(way)]
    task = {}
    for part, examples in (("a", shot), ("b", QUERY[flags["datasource"]])):
        labels = np.concatenate([random.permutation(way) for _ in range(examples)])
        task[f"input{part}_uint8"] = np.stack([classes[label]() for label in labels])[None]
        task["label" + part] = np.eye(way, dtype=np.float32)[labels][None]
    return task


def new_character(random):
    """Return a function that draws a character: a line through points that vary slightly. Ink is 0, paper 255."""
    points = random.integers(3, 24, (5, 2))

    def draw():
        image = np.full((28, 28, 1), 255, np.uint8)
        moved = points + random.integers(-2, 3, points.shape)
        for start, end in zip(moved[:-1], moved[1:]):
            for row, column in np.linspace(start, end, 40).round().astype(int):
                image[row : row + 2, column : column + 2] = 0
        return image

    return draw


def new_texture(random):
    """Return a function that draws color images of a class: bright grains on dark, with one density per channel.

    Uniform areas would compress better, but equal pixels tie in a maximum, and rounding decides ties.
    """
    dark, share = random.integers(20, 120), random.uniform(0.2, 0.8, 3)
    return lambda: (dark + 120 * (random.random((84, 84, 3)) < share)).astype(np.uint8)


def initial_weights(random, flags, shapes):
    """Return weights by name: Xavier uniform kernels, biases and betas near 0, gammas near 1, so that all matter.

    To compress well, weights are rounded to half precision, and in the wide layers of the fully connected image network
    15 of 16 units are off: their beta is negative and their input 0, so their gradients are 0.
    MiniImagenet's convolutions are four times as large and its last layer a quarter. Batch norm cancels the former, so
    only the inner updates become smaller, as with the original's 32 filters and after some training.
    """
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = 0.1 * random.standard_normal(shape) + name.endswith("gamma")
        else:
            limit = (6.0 / (np.prod(shape[:-2]) * (shape[-2] + shape[-1]))) ** 0.5
            if flags["datasource"] == "miniimagenet":
                limit *= 4 if len(shape) == 4 else 0.25
            value = random.uniform(-limit, limit, shape)
        for axis, size in enumerate(shape):
            if not flags["conv"] and size in (256, 128, 64):
                np.moveaxis(value, axis, 0)[size // 16 :] = -1.0 if name.endswith("beta") else 0.0
        weights[name] = value.astype(np.float16).astype(np.float32)
    return weights


def record(graph, weights, inputs, steps):
    """Return the arrays of one record; README.md lists the keys."""
    graph.load(weights)
    feed = graph.feed(inputs)
    arrays = dict(inputs)
    arrays.update({key: np.array(value) for key, value in graph.values(feed).items()})
    arrays.update({"meta_gradient/" + name: value for name, value in graph.gradient(feed).items()})
    # The graph always divides by meta_batch_size, even if it is fed one task.
    count = graph.flags["meta_batch_size"]
    each = [graph.gradient({key: value[i : i + 1] for key, value in feed.items()}) for i in range(count)]
    for name in graph.meta_gradient:
        arrays["task_meta_gradient/" + name] = np.stack([task[name] for task in each]) * np.float32(count)
    for _ in range(steps):
        graph.step(feed)
    for name in weights:
        arrays["weights/" + name] = weights[name]
        arrays["after/" + name] = graph.weight(name)
    arrays.update(steps=np.array(steps), flags=np.array(json.dumps(graph.flags)), norms=np.array(graph.norms))
    return arrays


class Graph:
    """The original's graph for given flags, with a single-threaded session."""

    def __init__(self, original, flags, stock=None):
        self.flags, self.norms = flags, stock or "exact"
        for name in FLAGS:
            setattr(original.FLAGS, name, flags[name])
        widths = {
            "sinusoid": 3 if flags["baseline"] == "oracle" else 1,
            "omniglot": 28 * 28,
            "miniimagenet": 84 * 84 * 3,
        }
        inputs, outputs = widths[flags["datasource"]], 1 if flags["datasource"] == "sinusoid" else flags["num_classes"]
        tf.compat.v1.reset_default_graph()
        self.tensors = {
            key: tf.compat.v1.placeholder(tf.float32, [None, None, inputs if key.startswith("input") else outputs])
            for key in ("inputa", "labela", "inputb", "labelb")
        }
        self.model = original.MAML(inputs, outputs, flags["test_num_updates"])
        with norms(stock):
            self.model.construct_model(self.tensors)
        self.variables = {variable.op.name: variable for variable in tf.compat.v1.trainable_variables()}
        self.shapes = {name: tuple(variable.shape.as_list()) for name, variable in self.variables.items()}
        self.pretrains = flags["metatrain_iterations"] == 0
        self.meta_gradient = {} if self.pretrains else {variable.op.name: value for value, variable in self.model.gvs}
        self.session = tf.compat.v1.Session(
            config=tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
        )

    def load(self, weights):
        """Reset the optimizer and set the weights."""
        self.session.run(tf.compat.v1.global_variables_initializer())
        for name, variable in self.variables.items():
            variable.load(weights[name], self.session)

    def close(self):
        """Free the session's memory."""
        self.session.close()

    def weight(self, name):
        """Return the value of a weight."""
        return self.session.run(self.variables[name])

    def feed(self, inputs):
        """Return tasks as the graph's feed: flat images, u / 255, and 1 - u / 255 for Omniglot (data_generator.py)."""
        feed = {}
        for key, value in inputs.items():
            if key.endswith("_uint8"):
                value = value.reshape(value.shape[0], value.shape[1], -1).astype(np.float32) / np.float32(255)
                value = np.float32(1) - value if self.flags["datasource"] == "omniglot" else value
            feed[self.tensors[key.replace("_uint8", "")]] = value
        return feed

    def values(self, feed):
        """Return losses, outputs and, for classification, accuracies, by the original's names."""
        names = ["total_loss1", "total_losses2", "outputas", "outputbs"]
        if self.model.classification:
            names += ["total_accuracy1", "total_accuracies2"]
        return self.session.run({name: getattr(self.model, name) for name in names}, feed)

    def gradient(self, feed):
        """Return the meta-gradient by weight; empty if the flags only pretrain."""
        return self.session.run(self.meta_gradient, feed)

    def step(self, feed):
        """Take one outer step."""
        self.session.run(self.model.pretrain_op if self.pretrains else self.model.metatrain_op, feed)


@contextlib.contextmanager
def norms(stock):
    """Build graphs in this context with exact second derivatives of the norms, or with those of `stock`."""
    from tensorflow.contrib.framework import arg_scope
    from tensorflow.contrib.layers import batch_norm
    from tensorflow.python.ops import nn

    before = nn.moments

    def exact_moments(x, axes, shift=None, name=None, keep_dims=None, keepdims=None):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
        if keep_dims or keepdims:
            return mean, variance
        return tf.squeeze(mean, axes), tf.squeeze(variance, axes)

    nn.moments = before if stock else exact_moments
    try:
        with arg_scope([batch_norm], fused=stock == "fused"):
            yield
    finally:
        nn.moments = before


if __name__ == "__main__":
    main()
