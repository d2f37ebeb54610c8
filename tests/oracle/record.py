"""Records what the original's own graph computes: the numbers that tests/test_oracle.py compares ours with.

The original is https://github.com/cbfinn/maml. Its maml.py and utils.py build the graph; they need Python 3.7:

    git clone https://github.com/cbfinn/maml /tmp/original
    python3.7 -m venv /tmp/py37
    /tmp/py37/bin/pip install -r tests/oracle/requirements-record.txt
    /tmp/py37/bin/python tests/oracle/record.py --original=/tmp/original --out=tests/oracle

Weights and tasks are generated here, with a seed for each record; tasks whose meta-gradient hangs on rounding are left
out. Where a .npz file is named, weights and tasks are that file's. One thread computes, so that the same machine writes
the same files again, to the bit.

One correction is made to what the original computes; --stock leaves it out. The original's norms take their variance
from tf.nn.moments, which stops a gradient inside it. For the batch norm of a convolution, TensorFlow 1.15 prefers a
fused kernel, whose second derivative is wrong too. First derivatives are right in both, but MAML needs the second. So
the variance is computed without a stopped gradient, by plain operations where TensorFlow would take the fused kernel.
This replaces a function and a default of TensorFlow in this process; the clone is not touched.
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
# SHA-256 of the files that build the graph, as they are at the original's last commit.
COMMIT = "a7f45f1bcd7457fe97b227a21e89b8a82cc5fa49"
DIGESTS = {
    "maml.py": "f5c686a54ad9ca3f31cc43f395ed672e6d97aebd2fd7c6d7964ad7396d03fffc",
    "utils.py": "5c0d0627a1384912abb064b6a0a8292403ea63554650712a19a2284a3baabfbf",
}

OUTER_STEPS = 3
TASKS = 4
QUERY = {"sinusoid": 10, "omniglot": 1, "miniimagenet": 1}  # examples a class
TEST_UPDATES = {"sinusoid": 3, "omniglot": 3, "miniimagenet": 1}  # computed whatever --num_updates is

# The original's flags that a number depends on. A record names those that are not the original's defaults.
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
    # Two classes, because the pictures of five would be a third of all that is recorded.
    "miniimagenet_2way_5shot": dict(MINIIMAGENET, update_batch_size=5, num_classes=2, num_updates=2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, metavar="DIR", help="a clone of cbfinn/maml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files, one a record")
    parser.add_argument(
        "--stock",
        choices=["fused", "moments"],
        help="leave the correction out: fused is what TensorFlow 1.15 computes by itself; moments has plain operations "
        "for the fused kernel, and the stopped gradient of tf.nn.moments. The files are named stock_...",
    )
    parser.add_argument(
        "records",
        nargs="*",
        metavar="RECORD",
        help="a .npz file, whose flags, weights and tasks are recorded again, or one of: " + ", ".join(RECORDS) + ". "
        "Default: all of these",
    )
    args = parser.parse_args()
    for name in args.records:
        if name not in RECORDS and not (name.endswith(".npz") and Path(name).is_file()):
            sys.exit(f"{name} is neither a .npz file nor one of the records {', '.join(RECORDS)}")
    import_libraries()
    original = import_original(args.original)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.records or RECORDS:
        arrays = (generated if name in RECORDS else again)(original, name, args.stock)
        prefix = f"stock_{args.stock}_" if args.stock else ""
        path = args.out / f"{prefix}{Path(name).stem}.npz"
        beside = path.with_name("." + path.name)
        np.savez_compressed(str(beside), **arrays)
        os.replace(str(beside), str(path))
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


def import_libraries():
    """Imports NumPy and TensorFlow, or ends with one line that says which are needed."""
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
    except Exception as error:  # a protobuf that is too new raises a TypeError
        reason, needed = str(error).split("\n")[0], Path(__file__).with_name("requirements-record.txt")
        sys.exit(f"TensorFlow {TENSORFLOW} is needed, but {reason}: use a Python 3.7 that has what {needed} lists")
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)


def import_original(folder):
    """The original's main.py as a module: it has the flags and the class MAML.

    Ends with one line where the folder is not a clone of the original, or was changed.
    """
    for name, digest in DIGESTS.items():
        path = folder / name
        if not path.is_file():
            sys.exit(f"{path} is not there: --original needs a clone of https://github.com/cbfinn/maml")
        if hashlib.sha256(path.read_text().encode()).hexdigest() != digest:
            sys.exit(f"{path} is not that of cbfinn/maml at commit {COMMIT}: check that commit out")
    sys.path.insert(0, str(folder))
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):  # a warning that changes nothing
        module = importlib.import_module("main")
    module.FLAGS(["main.py"])
    return module


def again(original, path, stock):
    """The arrays of a record with the flags, weights and tasks of the file at `path`."""
    arrays = dict(np.load(path))
    weights = {key[len("weights/") :]: value for key, value in arrays.items() if key.startswith("weights/")}
    inputs = {key: value for key, value in arrays.items() if key.startswith(("input", "label"))}
    with contextlib.closing(Graph(original, json.loads(str(arrays["flags"])), stock)) as graph:
        return record(graph, weights, inputs, int(arrays["steps"]))


def generated(original, name, stock):
    """The arrays of one of RECORDS, with weights and tasks drawn at random."""
    defaults = {flag: original.FLAGS[flag].default for flag in FLAGS}
    flags = dict(defaults, **dict({"meta_batch_size": TASKS}, **RECORDS[name]))
    flags["test_num_updates"] = TEST_UPDATES[flags["datasource"]]
    random = np.random.default_rng(zlib.crc32(name.encode()))  # its own, so that a new record changes no other
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
    """Whether the task's meta-gradient stays within 0.02 % where rounding, or a little more, moves its inputs.

    Where a ReLU or a maximum tips over, the gradient jumps, and inner updates amplify the jump: two right programs may
    then differ by all that the gradient has. Such a task tells nothing about either.
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
    """Whether the outer steps move each weight by the same, within 1 %, where rounding moves the inputs.

    The tasks were steady at the first weights alone. A weight whose gradient is zero but for rounding is left out:
    Adam scales that up to a whole step.
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
    """Points of one sinusoid, float32 [1, K, 1] or, for the oracle, [1, K, 3]: x, amplitude, phase."""
    amplitude, phase = random.uniform(0.1, 5.0), random.uniform(0.0, np.pi)
    task = {}
    for part, points in (("a", flags["update_batch_size"]), ("b", QUERY["sinusoid"])):
        x = random.uniform(-5.0, 5.0, (1, points, 1))
        given = [np.full_like(x, amplitude), np.full_like(x, phase)] if flags["baseline"] == "oracle" else []
        task["input" + part] = np.concatenate([x, *given], 2).astype(np.float32)
        task["label" + part] = (amplitude * np.sin(x - phase)).astype(np.float32)
    return task


def image_task(random, flags):
    """Images of one task, uint8 [1, n, H, W, C], and one-hot labels [1, n, N]: example k of every class, shuffled."""
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
    """A class of drawings: a line through some points, each drawing of it a little different. Ink 0, paper 255."""
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
    """A class of colour pictures: bright grains on a dark ground, in each colour as many as the class has.

    A picture of areas would take less room, but equal pixels make maxima that tie, and rounding decides ties.
    """
    dark, share = random.integers(20, 120), random.uniform(0.2, 0.8, 3)
    return lambda: (dark + 120 * (random.random((84, 84, 3)) < share)).astype(np.uint8)


def initial_weights(random, flags, shapes):
    """Weights by name: kernels Xavier uniform, biases and betas near 0 and gammas near 1, so that all take part.

    Rounded to half precision, so that they compress. Of the wide layers of the fully connected image network fifteen
    units in sixteen are shut, for the same reason: their beta is negative and their input 0, so their gradients are 0.
    MiniImagenet's convolutions are four times as large, its last layer a quarter: batch norm cancels the first, so
    that only the inner updates are smaller, as with the original's 32 filters and after some training.
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
    """The arrays of one record; README.md beside this file has their keys."""
    graph.load(weights)
    feed = graph.feed(inputs)
    arrays = dict(inputs)
    arrays.update({key: np.array(value) for key, value in graph.values(feed).items()})
    arrays.update({"meta_gradient/" + name: value for name, value in graph.gradient(feed).items()})
    # The graph divides by meta_batch_size, whatever the number of tasks that it is fed.
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
    """The original's graph for some flags, with a session that has one thread."""

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
        """Begins anew, from these weights."""
        self.session.run(tf.compat.v1.global_variables_initializer())
        for name, variable in self.variables.items():
            variable.load(weights[name], self.session)

    def close(self):
        """Gives the session's memory back."""
        self.session.close()

    def weight(self, name):
        """The value of one weight."""
        return self.session.run(self.variables[name])

    def feed(self, inputs):
        """Tasks as the graph takes them: images flattened, u8 / 255, of Omniglot 1 - u8 / 255 (data_generator.py)."""
        feed = {}
        for key, value in inputs.items():
            if key.endswith("_uint8"):
                value = value.reshape(value.shape[0], value.shape[1], -1).astype(np.float32) / np.float32(255)
                value = np.float32(1) - value if self.flags["datasource"] == "omniglot" else value
            feed[self.tensors[key.replace("_uint8", "")]] = value
        return feed

    def values(self, feed):
        """Losses, outputs and, of a classification, accuracies, by the names of the original."""
        names = ["total_loss1", "total_losses2", "outputas", "outputbs"]
        if self.model.classification:
            names += ["total_accuracy1", "total_accuracies2"]
        return self.session.run({name: getattr(self.model, name) for name in names}, feed)

    def gradient(self, feed):
        """The meta-gradient by the names of the weights; none where the flags only pretrain."""
        return self.session.run(self.meta_gradient, feed)

    def step(self, feed):
        """One outer step."""
        self.session.run(self.model.pretrain_op if self.pretrains else self.model.metatrain_op, feed)


@contextlib.contextmanager
def norms(stock):
    """While a graph is built: exact second derivatives of the norms, or those that `stock` names."""
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
