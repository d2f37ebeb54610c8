"""Tells which image is of which class, by a trained model and a few labelled images of each class.

    python predict.py RUN LABELLED UNLABELLED [--csv=answers.csv]
    python predict.py RUN --export=DIR

RUN is a run folder, such as one of logs/published/. LABELLED is a folder of class folders: as many as the model has
classes, with one image or more in each, and not the same number in all if you like. UNLABELLED are images, or folders
of images. docs/predict.md says more.

As a library:

    model = predict.load("logs/published/cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm")
    adapted = model.adapt(images, labels)
    probabilities = adapted.predict(other_images)  # [n, 5], columns as in adapted.classes
"""

import devices  # isort: skip  before TensorFlow, which reads what it sets

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from typing import TextIO

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.core.protobuf import saved_model_pb2
from tqdm import tqdm

import recipe as recipes
import runs
from files import InputError, check_choice, printable, say, write_whole, writing
from images import (
    ROOT,
    UnreadableError,
    class_folders,
    image_files,
    normalize,
    other_files,
    pillow_warnings,
    read_image,
)
from maml import MAML, inner_step, prepare
from networks import support_normalized
from recipe import Recipe
from utils import Tasks, Weights, xent

PUBLISHED = ROOT / "logs" / "published"
NORMALISED = {
    "support": "by itself together with the labelled images",
    "batch": "together with all other images that are asked (the paper's way)",
}
UPDATES = recipes.DEFINITIONS["num_updates"].accepts._replace(least=0)  # 0: the meta-learned weights as they are
CHUNK = 64  # images that are read and answered at once, where each is normalised by itself
SLOW = 200  # images; from so many on there is a progress bar
COLUMNS = ("image", "class", "probability")  # of a table of answers; the classes follow


# -- the library -------------------------------------------------------------------------------------------------------


def load(
    run: Path | str, *, checkpoint: int | str = -1, updates: int | None = None, normalise_with: str = "support"
) -> "Model":
    """Loads a trained model of images.

    Args:
        run: the run folder, ours or the original's.
        checkpoint: the iteration, -1 for the latest, or "best" on validation.
        updates: gradient updates on the labelled images, 0 to 200; None: the last of Recipe.paper_updates, or as in
            training where it has none.
        normalise_with: with what an image is normalised under batch norm. "support": the labelled images alone, so that
            an answer does not depend on what else is asked. "batch": all images of a call of predict, as in the paper.
    Raises InputError where there is no such model, it is not one of images, or an argument is none of these.
    """
    recipe, maml, prefix = runs.load(run, checkpoint)
    if recipe.dataset.images is None:
        raise InputError(f"{run} is a run of the {recipe.data_set}, which has no classes: name a run of images")
    check_choice("normalise_with", normalise_with, NORMALISED)
    if updates is not None and not (isinstance(updates, Integral) and updates in UPDATES):
        raise InputError(f"updates={updates} must be {UPDATES}")
    return Model(recipe, maml, prefix, updates, normalise_with)


class Model:
    """A trained model of images, which learns new classes from a few labelled images of each."""

    def __init__(self, recipe: Recipe, maml: MAML, checkpoint: str, updates: int | None, normalise_with: str):
        """Takes what load makes."""
        self.recipe, self.maml, self.checkpoint, self.normalise_with = recipe, maml, checkpoint, normalise_with
        if updates is None:
            updates = (recipe.paper_updates or (recipe.inner_steps,))[-1]
        self.updates = updates
        self.images = recipe.dataset.images._replace(any_size=True)
        self.inner = maml.inner._replace(loss=self._loss)
        self._images_spec = tf.TensorSpec([None, *self.images.size, self.images.channels])
        self._weights_spec = {name: tf.TensorSpec(weight.shape) for name, weight in maml.weights.items()}

    def read(self, paths: Sequence[Path | str]) -> np.ndarray:
        """Reads images as training does, uint8 [n, height, width, channels]. Raises InputError where one cannot be."""
        return self._array([read_image(path, self.images) for path in paths])

    def adapt(self, images: object, labels: Sequence[str] | Sequence[int]) -> "Adapted":
        """Learns N classes from labelled images.

        Args:
            images: paths, or an array [n, height, width, channels] of the model's size, uint8 (0 to 255) or floats (0
                to 1); of a grey model also [n, height, width]. Any number a class.
            labels: the class of each, numbers or strings.
        Raises InputError where images or labels are not as said.
        """
        pixels = self._pixels(images)
        try:
            labels = list(labels)
        except TypeError:
            raise InputError(f"the labels are of type {type(labels).__name__}: give a list, a label for each") from None
        try:
            classes, way = sorted(set(labels)), self.recipe.way
        except TypeError:  # of a row of a one-hot array, or of a number beside a string
            kinds = " and ".join(sorted({type(label).__name__ for label in labels}))
            raise InputError(f"the labels are {kinds}: give numbers or strings, one for each image") from None
        if len(labels) != len(pixels):
            raise InputError(f"{len(pixels)} images, but {len(labels)} labels: give a label to each")
        if len(classes) != way:
            raise InputError(
                f"the labels are of {len(classes)} classes, but {self.checkpoint} is a model of {way}: "
                f"{_models_of(len(classes), Path(self.checkpoint).parent)}"
            )
        support_x = self.inputs(pixels)
        support_y = tf.one_hot([classes.index(label) for label in labels], way)
        trajectory = [self.maml.values()]
        for j in range(self.updates):
            trajectory.append(self._one_update(trajectory[-1], support_x, support_y, tf.constant(j)))
        return Adapted(self, classes, support_x, trajectory)

    def _loss(self, logits, labels):
        """The recipe's, with as many labelled images of a class as there are."""
        loss = xent(logits, labels, shot=None)
        return loss / self.recipe.way if self.recipe.loss == "mean" else loss

    def inputs(self, pixels: np.ndarray | tf.Tensor) -> tf.Tensor:
        """Makes of pixels, uint8 or floats of 0 to 1, what the network takes: float32, as training's were made."""
        x = tf.cast(pixels, tf.float32) / 255 if pixels.dtype == np.uint8 else tf.cast(pixels, tf.float32)
        x = 1 - x if self.images.invert else x
        return normalize(x) if self.images.augment else x

    def probabilities(self, weights: Weights, support_x: tf.Tensor, query_x: tf.Tensor) -> tf.Tensor:
        """Computes the probability of each class, [n, N], with the weights after the updates."""
        if self.normalise_with == "support":
            return tf.nn.softmax(support_normalized(self.inner.network, weights, support_x, query_x))
        return tf.nn.softmax(self.inner.network.apply(weights, query_x))

    @functools.cached_property
    def _one_update(self):
        """The graph of (weights, support_x, support_y, j) -> weights after one more inner step; j were taken before."""

        def update(weights, support_x, support_y, j):
            task = Tasks(support_x, support_y, support_x, support_y)
            return inner_step(self.inner, weights, prepare(self.inner, weights, task), j)

        labels_spec = tf.TensorSpec([None, self.recipe.way])
        return tf.function(update, autograph=False).get_concrete_function(
            self._weights_spec, self._images_spec, labels_spec, tf.TensorSpec([], tf.int32)
        )

    @functools.cached_property
    def _answers(self):
        """The graph of probabilities."""
        return tf.function(self.probabilities, autograph=False).get_concrete_function(
            self._weights_spec, self._images_spec, self._images_spec
        )

    def _array(self, images):
        return np.array(images, np.uint8).reshape(-1, *self.images.size, self.images.channels)

    def _pixels(self, images):
        """The images of a call: paths are read, arrays are checked."""
        if isinstance(images, str | Path):
            raise InputError(f"{images} is one path: give a list of paths, or an array")
        try:
            are_paths = len(images) > 0 and isinstance(images[0], str | Path)
        except (TypeError, LookupError):
            raise InputError(
                f"the images are of type {type(images).__name__}: give a list of paths, or an array"
            ) from None
        if are_paths:
            if not all(isinstance(image, str | Path) for image in images):
                raise InputError("the images are paths and other things: give paths alone, or one array")
            return self.read(images)
        try:
            pixels = np.asarray(images)
        except ValueError:
            raise InputError("the images have different shapes: resize them, or give their paths") from None
        size, channels = self.images.size, self.images.channels
        if channels == 1 and pixels.shape[1:] == size:
            pixels = pixels[..., None]
        if pixels.shape[1:] != (*size, channels) or not len(pixels):
            raise InputError(
                f"the images have the shape {list(pixels.shape)}, but the model takes "
                f"[n, {size[0]}, {size[1]}, {channels}], n of 1 or more: resize them, or give their paths"
            )
        if pixels.dtype != np.uint8:
            if not np.issubdtype(pixels.dtype, np.floating):
                raise InputError(f"the images are {pixels.dtype}: give uint8 of 0 to 255, or floats of 0 to 1")
            if not (pixels.min() >= 0 and pixels.max() <= 1):  # a nan is neither
                raise InputError(
                    f"the images are floats of {pixels.min():g} to {pixels.max():g}: divide them to 0 to 1, or give "
                    "uint8 of 0 to 255"
                )
        return pixels


class Adapted:
    """A model that has learnt the classes of some labelled images."""

    def __init__(self, model: Model, classes: list, support_x: tf.Tensor, trajectory: list[Weights]):
        """Takes what Model.adapt makes. trajectory: the weights before and after each update."""
        self.model, self.classes, self.support_x, self.trajectory = model, classes, support_x, trajectory

    def predict(self, images: object, updates: int | None = None) -> np.ndarray:
        """Computes the probabilities of images, float32 [n, N]; the columns are `classes`.

        Args: images as of Model.adapt, any number; after how many updates, None: all.
        Raises InputError where images are not as said, so many updates were not taken, or they diverged.
        """
        if updates is not None and not (isinstance(updates, Integral) and 0 <= updates < len(self.trajectory)):
            taken = len(self.trajectory) - 1
            raise InputError(f"updates={updates}, but {taken} were taken: give 0 to {taken}")
        pixels, weights = self.model._pixels(images), self.trajectory[-1 if updates is None else updates]
        size = CHUNK if self.model.normalise_with == "support" else len(pixels)
        try:
            parts = [
                self.model._answers(weights, self.support_x, self.model.inputs(pixels[first : first + size]))
                for first in range(0, len(pixels), size)
            ]
        except tf.errors.ResourceExhaustedError:
            raise InputError(
                f"{len(pixels):,} images at once need more memory than there is: ask fewer in a call, or normalise "
                "each with the labelled images alone (normalise_with=support)"
            ) from None
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise InputError(
                "the answers are no numbers, since the updates on the labelled images diverged: give fewer --updates, "
                "or images that are more like those of the training"
            )
        return found


def export(model: Model, folder: Path | str) -> None:
    """Writes the model as a SavedModel, which TensorFlow runs without this project.

    Its one function is adapt_and_predict(support_x, support_y, query_x) -> probabilities [n, N], for any number of
    images, all uint8 (0 to 255) or all float32 (0 to 1), [n, height, width, channels]; support_y holds class numbers
    from 0 to N - 1, int64, each of them once or more. Column c is class c. The signature of the same name takes uint8,
    adapt_and_predict_float takes float32. Preprocessing, updates and how an image is normalised are inside.
    Raises InputError where the folder exists or cannot be written.
    """
    folder, way = Path(folder), model.recipe.way
    if folder.exists():
        raise InputError(f"{folder} exists: remove it, or give another folder")
    runs.check_writable(folder.parent, "folder to export to")
    module = tf.Module()
    module.weights = {name: tf.Variable(weight) for name, weight in model.maml.weights.items()}

    def adapt_and_predict(support_x, support_y, query_x):
        for images in (support_x, query_x):
            if images.dtype != tf.uint8:
                tf.debugging.assert_greater_equal(tf.reduce_min(images), 0.0, "float images are of 0 to 1")
                tf.debugging.assert_less_equal(tf.reduce_max(images), 1.0, "float images are of 0 to 1")
        labels = tf.one_hot(support_y, way)  # of no class where a number is not one of 0 to N - 1
        tf.debugging.assert_equal(tf.reduce_sum(labels, 1), 1.0, f"support_y is from 0 to {way - 1}")
        tf.debugging.assert_positive(tf.reduce_sum(labels, 0), f"support_y has each of the classes 0 to {way - 1}")
        support, query = model.inputs(support_x), model.inputs(query_x)
        weights = {name: tf.convert_to_tensor(weight) for name, weight in module.weights.items()}
        for j in range(model.updates):
            weights = model._one_update(weights, support, labels, tf.constant(j))
        return {"probabilities": model._answers(weights, support, query)}

    def concrete(dtype):
        shape = [None, *model.images.size, model.images.channels]
        support_x, query_x = (tf.TensorSpec(shape, dtype, name) for name in ("support_x", "query_x"))
        labels = tf.TensorSpec([None], tf.int64, "support_y")
        return module.adapt_and_predict.get_concrete_function(support_x, labels, query_x)

    module.adapt_and_predict = tf.function(adapt_and_predict, autograph=False)
    signatures = {"adapt_and_predict": concrete(tf.uint8), "adapt_and_predict_float": concrete(tf.float32)}
    with writing(folder.parent), tempfile.TemporaryDirectory(prefix=".export", dir=folder.parent) as beside:
        tf.saved_model.save(module, f"{beside}/model", signatures)
        _forget_gradients(Path(beside) / "model" / "saved_model.pb")
        os.replace(f"{beside}/model", folder)


def _forget_gradients(graph):
    """Takes the names of our gradients by hand out of a SavedModel: else TensorFlow warns, each time it loads it.

    The updates' gradients are operations of the graph already, and nobody differentiates those once more.
    """
    saved = saved_model_pb2.SavedModel.FromString(graph.read_bytes())
    for function in saved.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            node.attr.pop("_gradient_op_type", None)
    graph.write_bytes(saved.SerializeToString(deterministic=True))


def _models_of(way, folder):
    """The way out of a wrong number of classes."""
    if way < 2:
        return "give images of as many classes as it has"
    found = []
    for record in sorted({*folder.resolve().parent.glob("*/flags.json"), *PUBLISHED.glob("*/flags.json")}):
        with contextlib.suppress(InputError, FileNotFoundError):  # a damaged one is not what was asked for
            flags = runs.read_json(record, dict, "remove it")
            if flags.get("num_classes") == way and flags.get("datasource") not in (None, "sinusoid"):
                found.append(os.path.relpath(record.parent))
    if found:
        return f"models of {way} are {', '.join(found)}"
    return f"no model of {way} is at hand, train one with --num_classes={way}"


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers what the command line asks. What the user can mend is told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a trained model")
    parser.add_argument("labelled", metavar="LABELLED", nargs="?", help="folder of class folders of images")
    parser.add_argument("unlabelled", metavar="UNLABELLED", nargs="*", help="images, or folders of images")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all probabilities there, one image a row")
    parser.add_argument(
        "--updates", type=int, metavar="J", help="updates on the labelled images (as in published tests)"
    )
    parser.add_argument(
        "--checkpoint", default="-1", help="an iteration; -1: the latest; best: the best on validation (-1)"
    )
    parser.add_argument(
        *("--normalise_with", "--query_norm"),
        default="support",
        choices=list(NORMALISED),
        help="under batch norm, each image is normalised: " + "; ".join(f"{k}: {v}" for k, v in NORMALISED.items()),
    )
    parser.add_argument("--export", metavar="DIR", help="write the model there as a SavedModel, instead of answers")
    args = parser.parse_intermixed_args(arguments)
    if bool(args.export) == bool(args.unlabelled) or (args.export and (args.labelled or args.csv)):
        parser.error("give RUN LABELLED UNLABELLED for answers, or RUN --export=DIR")
    logging.set_verbosity(logging.WARNING)
    devices.start()
    try:
        model = load(
            args.run,
            checkpoint=args.checkpoint if args.checkpoint == "best" else _iteration(args.checkpoint),
            updates=args.updates,
            normalise_with=args.normalise_with,
        )
        if args.export:
            export(model, args.export)
            say(f"Written: {args.export}, a SavedModel of {model.checkpoint} with {model.updates} updates.")
        else:
            answer(model, args.labelled, args.unlabelled, args.csv)
    except BrokenPipeError:  # nobody reads the answers any more
        _print_no_more(sys.stdout)
        sys.exit(1 if args.csv else 0)
    except (InputError, OSError) as error:
        say(f"predict.py: {error}", sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def answer(model: Model, labelled: str, unlabelled: Sequence[str], table: Path | None) -> None:
    """Adapts the model to the labelled images, and prints the class of every other image.

    Args: the model; a folder of class folders; images or folders of them; where the probabilities are written, if so.
    """
    files, paths = labelled_files(model, labelled), unlabelled_files(labelled, unlabelled)
    if table:
        _check_table(table)
    read = functools.partial(_read_all, model)
    # A table is finished though nobody reads the answers any more.
    printing = functools.partial(_reader_may_leave, sys.stdout) if table else contextlib.nullcontext
    shown = [one for one in read(list(files), list(files.values())) if one[2] is not None]
    lost = set(files.values()) - {label for _, label, _ in shown}
    if lost:
        raise InputError(f"no image of class {min(lost)} in {labelled} can be read: give it one, or remove the class")
    _warn_of_twins(shown)
    adapted = model.adapt(np.stack([image for *_, image in shown]), [label for _, label, _ in shown])
    width = min(60, max(len("image"), *(len(printable(path)) for path in paths)))
    most = max(len("class"), *(len(printable(name)) for name in adapted.classes))
    with printing():
        say(
            f"{model.checkpoint} of {model.recipe.data_set}, {model.updates} updates on {len(shown)} labelled images "
            f"of {len(adapted.classes)} classes."
        )
        if model.inner.network.batch_statistics:
            way = NORMALISED[model.normalise_with]
            print(f"Each image is normalised {way}: --normalise_with={model.normalise_with}.")
        print(f"\n{'image':{width}}  {'class':{most}}  probability  runner-up", flush=True)
    rows = []
    with tqdm(total=len(paths), unit=" images", disable=None if len(paths) >= SLOW else True) as bar:
        size = CHUNK if model.normalise_with == "support" else len(paths)
        for first in range(0, len(paths), size):
            some = [(path, image) for path, _, image in read(paths[first : first + size]) if image is not None]
            if some:
                found = adapted.predict(np.stack([image for _, image in some]))
                for (path, _), probabilities in zip(some, found, strict=True):
                    best, second = np.argsort(-probabilities, kind="stable")[:2]
                    rows.append([path, adapted.classes[best], probabilities[best], *probabilities])
                    with printing(), tqdm.external_write_mode():
                        print(
                            f"{printable(path):{width}}  {printable(adapted.classes[best]):{most}}"
                            f"  {probabilities[best]:11.4f}"
                            f"  {printable(adapted.classes[second])} {probabilities[second]:.4f}",
                            flush=True,
                        )
            bar.update(len(paths[first : first + size]))
    if not rows:
        raise InputError("no image of UNLABELLED can be read: give others")
    if table:
        text = "".join(map(_csv_line, [[*COLUMNS, *adapted.classes], *rows]))
        # A file's name may be no text: its bytes are written as they are.
        write_whole(table, lambda file: file.write(text.encode(errors="surrogateescape")))
        with printing():
            say(f"Written: {table}.")


def _check_table(table):
    """Raises InputError where the file of --csv is another thing than a table, or cannot be written."""
    if table.is_dir():
        raise InputError(f"--csv={table} is a folder: name a file")
    if table.exists():
        if not table.is_file():
            raise InputError(f"--csv={table} is no regular file: name another, such as answers.csv")
        # --csv photo*.png names photographs, of which the first would be lost.
        begin = ",".join(COLUMNS).encode()
        with table.open("rb") as file:
            if file.read(len(begin)) not in (b"", begin):
                raise InputError(f"--csv={table} is another file than a table of answers: name another")
    runs.check_writable(table.parent, "--csv")


def _csv_line(row):
    """A line of a table, which ends with a newline alone; the writer has to know of carriage returns to quote them."""
    line = io.StringIO()
    csv.writer(line).writerow(row)
    return line.getvalue().removesuffix("\r\n") + "\n"


@contextlib.contextmanager
def _reader_may_leave(stream: TextIO) -> Iterator[None]:
    """Prints no more where the reader of what is printed, such as head, has enough."""
    try:
        yield
    except BrokenPipeError:
        _print_no_more(stream)


def _print_no_more(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _remark(line):
    """Says what is no answer where the answers are not. Whoever reads it may leave before the end."""
    with _reader_may_leave(sys.stderr):
        say(line, sys.stderr)


def labelled_files(model: Model, folder: str) -> dict[str, str]:
    """Finds the labelled images: path -> class. Raises InputError where they are not N classes of images."""
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder} of labelled images: give one with a folder of images for each class")
    classes, way = class_folders(folder), model.recipe.way
    if loose := len(image_files(folder)) - sum(map(len, classes.values())):
        _remark(f"Not used, {loose:,} images in {folder} that lie in no class folder.")
    _tell_of_others(folder)
    if len(classes) != way:
        raise InputError(
            f"{folder} has {len(classes)} class folders{_some(sorted(classes))}, but {model.checkpoint} is a model of "
            f"{way} classes: {_models_of(len(classes), Path(model.checkpoint).parent)}"
        )
    for name, files in classes.items():
        if not files:
            raise InputError(f"class {name} in {folder} has no image: give it one, or remove the folder")
    return {os.path.join(folder, name, file): name for name in sorted(classes) for file in classes[name]}


def unlabelled_files(labelled: str, given: Sequence[str]) -> list[str]:
    """Finds the images that are asked, each once. Raises InputError where one is missing or labelled."""
    known, paths = os.path.realpath(labelled), []
    for path in given:
        real = os.path.realpath(path)
        if not os.path.exists(path):
            raise InputError(f"no image or folder {path}: give images, or folders of images")
        if os.path.commonpath([real, known]) in (real, known):
            raise InputError(f"{path} and {labelled} lie one in the other: keep labelled and other images apart")
        found = [path]
        if os.path.isdir(path):
            found = image_files(path)
            _tell_of_others(path)
        if not found:
            raise InputError(f"no images in {path}: give images, or folders of images")
        paths += found
    return list(dict.fromkeys(paths))


def _tell_of_others(folder):
    """Tells of files that are passed over: a camera's, such as .heic, may be images that Pillow does not read."""
    if others := other_files(folder):
        _remark(f"Not used, {len(others):,} files that by their names are no images Pillow reads{_some(others)}")


def _read_all(model, paths, labels=None) -> Iterator[tuple[str, str | None, np.ndarray | None]]:
    """(path, label, pixels) of all; the images that cannot be read are named, and have no pixels."""

    broken = {}

    def read(path):
        try:
            return read_image(path, model.images)
        except UnreadableError as error:
            broken[path] = f"{path} ({error.reason})"
            return None

    with pillow_warnings(_remark), ThreadPoolExecutor(devices.cores()) as pool:
        images = list(pool.map(read, paths))
    if broken:
        listed = _some([broken[path] for path in paths if path in broken])
        _remark(f"Left out, {len(broken):,} images that cannot be read{listed}")
    return zip(paths, labels or [None] * len(paths), images, strict=True)


def _warn_of_twins(shown):
    """Labelled images with the same pixels in two classes teach nothing, and are most often a mistake."""
    seen = {}
    for path, label, image in shown:
        other, its_label = seen.setdefault(hashlib.sha256(image.tobytes()).digest(), (path, label))
        if its_label != label:
            _remark(f"WARNING: {path} and {other} are the same image.")


def _iteration(text):
    try:
        if int(text) >= -1:
            return int(text)
    except ValueError:
        pass
    raise InputError(f"--checkpoint={text} must be an iteration, -1 for the latest, or best")


def _some(names):
    """The first ten names, behind a colon."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f": {', '.join(names[:10])}{more}" if names else ""


if __name__ == "__main__":
    main()
