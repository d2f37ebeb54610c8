"""Classify images with a trained model, given a few labeled images of each class.

    python predict.py RUN LABELED UNLABELED [--csv=answers.csv]
    python predict.py RUN [LABELED] --export=DIR

RUN is a run folder, such as one in logs/published/. LABELED is a folder with one subfolder of images per class: an
N-way model takes 2 to N classes, and each needs at least one image. UNLABELED is one or more images or folders of
images. See docs/predict.md.

As a library:

    model = predict.load("logs/published/cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm")
    adapted = model.adapt(images, labels)
    probabilities = adapted.predict(other_images)  # [n, 5], columns as in adapted.classes
"""

import devices  # isort: skip  must precede TensorFlow, which reads the environment variables that it sets

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from files import InputError, check_choice, is_folder, nfc, os_error, printable, say, user_path, write_whole, writing
from images import (
    ROOT,
    UnreadableError,
    class_folders,
    fingerprint,
    has_dark_border,
    ignored_lines,
    image_files,
    normalize,
    pillow_warnings,
    read_image,
    repeat_lines,
)
from maml import MAML, inner_step, prepare
from networks import support_normalized
from recipe import Recipe
from utils import Tasks, Weights, xent

PUBLISHED = ROOT / "logs" / "published"
NORMALIZED = {
    "support": "with the labeled images only",
    "batch": "with all images to classify, as in the paper",
}
CLASS_ORDERS = {0: "all cyclic orders, whose probabilities are averaged", 1: "only that of the names"}
UPDATES = recipes.DEFINITIONS["num_updates"].accepts._replace(least=0)  # 0: use the meta-learned weights
CHUNK = 64  # images to read and classify at once with normalise_with=support
MAX_HELD_OUT = 10  # labeled images of each class
PROGRESS_BAR_FROM = 200  # images
COLUMNS = ("image", "class", "probability")  # of the table of predictions; one column per class follows


# -- the library -------------------------------------------------------------------------------------------------------


def load(
    run: Path | str,
    *,
    checkpoint: int | str = -1,
    updates: int | None = None,
    normalise_with: str = "support",
    class_orders: int = 0,
) -> "Model":
    """Return a trained image classifier.

    Args:
        run: run folder, ours or the original's.
        checkpoint: iteration, -1 for the latest, or "best" on validation.
        updates: gradient updates on the labeled images, 0 to 200. None: the last of Recipe.paper_updates, or if that is
            empty, as many as in training.
        normalise_with: which images batch norm normalizes together. "support": each image with the labeled images, so
            that its prediction does not depend on other images. "batch": all images of one call of `predict`, as in
            the paper.
        class_orders: which outputs of the model the classes get. The outputs are not alike, so their order changes the
            answer. 0: all cyclic orders of the classes, sorted by their images; the probabilities are averaged, so they
            do not depend on the labels' names. 1: one order, by name.
    Raise InputError for a missing run or checkpoint, a sinusoid run, or an invalid argument.
    """
    recipe, maml, prefix = runs.load(run, checkpoint)
    if recipe.dataset.images is None:
        raise InputError(f"{run}: is a {recipe.data_set} run, which has no classes; choose a run on images")
    check_choice("normalise_with", normalise_with, NORMALIZED)
    if updates is not None and not (isinstance(updates, Integral) and updates in UPDATES):
        raise InputError(f"updates={updates}: must be {UPDATES}")
    if class_orders not in CLASS_ORDERS:
        raise InputError(f"class_orders={class_orders!r}: must be 0 (all) or 1 (by name)")
    return Model(recipe, maml, prefix, updates, normalise_with, class_orders)


class Reader:
    """Reads images as in the training of a model."""

    def __init__(self, recipe: Recipe):
        self.images = recipe.dataset.images._replace(any_size=True)

    def read(self, paths: Sequence[Path | str]) -> np.ndarray:
        """Return images as in training, uint8 [n, height, width, channels]. Raise InputError if one is unreadable."""
        return self._array([read_image(path, self.images) for path in paths])

    def _array(self, images):
        return np.array(images, np.uint8).reshape(-1, *self.images.size, self.images.channels)

    def _pixels(self, images):
        """Read a list of paths, or check an array. Return pixels [n, height, width, channels], uint8 or float."""
        if isinstance(images, str | Path):
            raise InputError(f"images: {images} is a single path; give a list of paths, or an array")
        try:
            are_paths = len(images) > 0 and isinstance(images[0], str | Path)
        except (TypeError, LookupError):
            raise InputError(f"images: has type {type(images).__name__}; give a list of paths, or an array") from None
        if are_paths:
            if not all(isinstance(image, str | Path) for image in images):
                raise InputError("images: mixes paths with other values; give only paths, or one array")
            return self.read(images)
        try:
            pixels = np.asarray(images)
        except ValueError:
            raise InputError("images: must all have the same shape; resize them, or give their paths") from None
        size, channels = self.images.size, self.images.channels
        if channels == 1 and pixels.shape[1:] == size:
            pixels = pixels[..., None]
        if pixels.shape[1:] != (*size, channels) or not len(pixels):
            raise InputError(
                f"images: has shape {list(pixels.shape)}, but the model takes [n, {size[0]}, {size[1]}, {channels}] "
                "with n of at least 1; resize them, or give their paths"
            )
        if pixels.dtype != np.uint8:
            if not np.issubdtype(pixels.dtype, np.floating):
                raise InputError(f"images: has type {pixels.dtype}; give uint8 from 0 to 255, or floats from 0 to 1")
            if not (pixels.min() >= 0 and pixels.max() <= 1):  # also refuses NaN
                raise InputError(
                    f"images: has floats from {pixels.min():g} to {pixels.max():g}; scale them to 0 to 1, or give "
                    "uint8 from 0 to 255"
                )
        return pixels


class Model(Reader):
    """A trained image classifier that learns new classes from a few labeled images of each. Returned by `load`."""

    def __init__(
        self,
        recipe: Recipe,
        maml: MAML,
        checkpoint: str,
        updates: int | None,
        normalise_with: str,
        class_orders: int = 0,
    ):
        super().__init__(recipe)
        self.recipe, self.maml, self.checkpoint = recipe, maml, checkpoint
        self.normalise_with, self.class_orders = normalise_with, class_orders
        if updates is None:
            updates = (recipe.paper_updates or (recipe.inner_steps,))[-1]
        self.updates = updates
        self.inner = maml.inner._replace(loss=self._loss)
        self._images_spec = tf.TensorSpec([None, *self.images.size, self.images.channels])
        self._weights_spec = {name: tf.TensorSpec(weight.shape) for name, weight in maml.weights.items()}
        self._narrower = {}  # number of classes -> this model for so many

    def adapt(self, images: object, labels: Sequence[str] | Sequence[int]) -> "Adapted":
        """Return the model adapted to 2 to N classes. For fewer than N, it uses its first outputs.

        Args:
            images: paths, or an array [n, height, width, channels] of the model's size, uint8 (0 to 255) or float (0
                to 1). A gray model also takes [n, height, width]. Any number of images per class.
            labels: one number or string per image.
        Raise InputError if images or labels are invalid.
        """
        pixels, labels, classes = self._labeled(images, labels)
        way = self.recipe.way
        if len(classes) < way:
            return self._for(len(classes)).adapt(pixels, labels)
        numbers, columns = np.array([classes.index(label) for label in labels]), np.arange(way)[None]
        if self.class_orders == 0:
            order, places = _ordered_by_images(pixels, numbers)
            pixels, numbers = pixels[order], numbers[order]
            columns = (places + np.arange(way)[:, None]) % way
        support_x, trajectories = self.inputs(pixels), []
        for column_of in columns:
            support_y, trajectory = tf.one_hot(column_of[numbers], way), [self.maml.values()]
            for j in range(self.updates):
                trajectory.append(self._one_update(trajectory[-1], support_x, support_y, tf.constant(j)))
            trajectories.append(trajectory)
        return Adapted(self, classes, support_x, columns, trajectories)

    def hold_out(self, images: object, labels: Sequence[str] | Sequence[int]) -> np.ndarray:
        """Return whether the model is right about labeled images that it was not adapted to, bool [n].

        Hold out one image of each class, adapt the model to the others, and classify those held out; then the next one
        of each class, up to ten. Arguments and errors as in adapt. Return [0] if a class has only one image.
        """
        pixels, labels, classes = self._labeled(images, labels)
        places = [[place for place, label in enumerate(labels) if label == name] for name in classes]
        right = []
        for turn in range(min(MAX_HELD_OUT, max(map(len, places))) if min(map(len, places)) > 1 else 0):
            held = [own[turn] for own in places if turn < len(own)]
            others = [place for place in range(len(labels)) if place not in held]
            answers = self.adapt(pixels[others], [labels[place] for place in others]).predict(pixels[held]).argmax(1)
            right += [classes[answer] == labels[place] for answer, place in zip(answers, held, strict=True)]
        return np.array(right, bool)

    def _labeled(self, images, labels):
        """Check labeled images. Return the pixels, the labels as a list, and the sorted classes."""
        pixels, way = self._pixels(images), self.recipe.way
        try:
            labels = list(labels)
        except TypeError:
            raise InputError(f"labels: has type {type(labels).__name__}; give a list, one label per image") from None
        try:
            classes = sorted(set(labels))
        except TypeError:  # rows of a one-hot array, or numbers mixed with strings
            kinds = " and ".join(sorted({type(label).__name__ for label in labels}))
            raise InputError(f"labels: has elements of type {kinds}; give all numbers or all strings") from None
        if len(labels) != len(pixels):
            raise InputError(f"labels: has {len(labels)} labels for {len(pixels)} images; give one per image")
        if not 2 <= len(classes) <= way:
            raise InputError(
                f"labels: has {len(classes)} classes, but {self.checkpoint} is a {way}-way model; "
                f"{_other_models(len(classes), self)}"
            )
        return pixels, labels, classes

    def _for(self, way):
        """Return this model for fewer classes."""
        if way not in self._narrower:
            maml, recipe = runs.narrowed(self.recipe, self.maml, way), dataclasses.replace(self.recipe, way=way)
            settings = self.checkpoint, self.updates, self.normalise_with, self.class_orders
            self._narrower[way] = Model(recipe, maml, *settings)
        return self._narrower[way]

    def _loss(self, logits, labels):
        """Return the recipe's loss, for any number of labeled images per class."""
        loss = xent(logits, labels, shot=None)
        return loss / self.recipe.way if self.recipe.loss == "mean" else loss

    def inputs(self, pixels: np.ndarray | tf.Tensor) -> tf.Tensor:
        """Convert pixels, uint8 or floats from 0 to 1, to network input, float32, as in training."""
        x = tf.cast(pixels, tf.float32) / 255 if pixels.dtype == np.uint8 else tf.cast(pixels, tf.float32)
        x = 1 - x if self.images.invert else x
        return normalize(x) if self.images.augment else x

    def probabilities(self, weights: Weights, support_x: tf.Tensor, query_x: tf.Tensor) -> tf.Tensor:
        """Return the probability of each class, [n, N], given the weights after the updates."""
        if self.normalise_with == "support":
            return tf.nn.softmax(support_normalized(self.inner.network, weights, support_x, query_x))
        return tf.nn.softmax(self.inner.network.apply(weights, query_x))

    @functools.cached_property
    def _one_update(self):
        """The graph of (weights, support_x, support_y, j) -> weights after inner step j, where j counts from 0."""

        def update(weights, support_x, support_y, j):
            task = Tasks(support_x, support_y, support_x, support_y)
            return inner_step(self.inner, weights, prepare(self.inner, weights, task), j)

        labels_spec = tf.TensorSpec([None, self.recipe.way])
        return tf.function(update, autograph=False).get_concrete_function(
            self._weights_spec, self._images_spec, labels_spec, tf.TensorSpec([], tf.int32)
        )

    @functools.cached_property
    def _probabilities(self):
        """The graph of `probabilities`."""
        return tf.function(self.probabilities, autograph=False).get_concrete_function(
            self._weights_spec, self._images_spec, self._images_spec
        )


class Adapted:
    """A model adapted to the classes of labeled images. Returned by Model.adapt."""

    def __init__(
        self,
        model: Model,
        classes: list,
        support_x: tf.Tensor,
        columns: np.ndarray,
        trajectories: list[list[Weights]],
    ):
        """Store the weights of R class orders.

        columns: [R, N], the output that each class has in each order. trajectories: for each order, the weights before
        the first update and after each one.
        """
        self.model, self.classes, self.support_x = model, classes, support_x
        self.columns, self.trajectories = columns, trajectories

    def predict(self, images: object, updates: int | None = None) -> np.ndarray:
        """Return the probability of each class, float32 [n, N]; column c is classes[c]. Arguments as in predict_orders.

        It is the mean over the class orders.
        """
        return self.predict_orders(images, updates).mean(0)

    def predict_orders(self, images: object, updates: int | None = None) -> np.ndarray:
        """Return the probability of each class in each of the R class orders, float32 [R, n, N].

        Args:
            images: as in Model.adapt.
            updates: use the weights after this many updates; None: after all.
        Raise InputError if the images are invalid, if fewer updates were taken, or if the updates diverged.
        """
        taken = len(self.trajectories[0]) - 1
        if updates is not None and not (isinstance(updates, Integral) and 0 <= updates <= taken):
            raise InputError(f"updates={updates}: the model took {taken} updates; give 0 to {taken}")
        pixels, update = self.model._pixels(images), taken if updates is None else updates
        size = CHUNK if self.model.normalise_with == "support" else len(pixels)
        parts = []
        try:
            for first in range(0, len(pixels), size):
                query_x = self.model.inputs(pixels[first : first + size])
                weights = (trajectory[update] for trajectory in self.trajectories)
                parts.append([self.model._probabilities(each, self.support_x, query_x) for each in weights])
        except tf.errors.ResourceExhaustedError:
            raise InputError(
                f"images: {len(pixels):,} at once do not fit in memory; classify fewer at once, or use "
                "--normalise_with=support"
            ) from None
        probabilities = np.take_along_axis(np.concatenate(parts, 1), self.columns[:, None], 2)
        if not np.isfinite(probabilities).all():
            raise InputError(
                "--updates: the updates on the labeled images diverged, so the probabilities are NaN; take fewer "
                "updates, or use images that are more like the training images"
            )
        return probabilities

    def save(self, folder: Path | str) -> None:
        """Write the adapted model as a SavedModel, which TensorFlow runs without this project.

        Its one function, predict(images) -> {"probabilities": [n, N], "classes": [N]}, includes preprocessing and
        normalization, but neither updates nor gradients. Images are [n, height, width, channels], all uint8 (0 to 255)
        or all float32 (0 to 1); column c is classes[c]. The signature predict takes uint8, predict_float takes float32.
        load_adapted reads it.
        Raise InputError if the folder exists or cannot be written.
        """
        model, module = self.model, tf.Module()
        module.weights = [
            {name: tf.Variable(weight) for name, weight in trajectory[-1].items()} for trajectory in self.trajectories
        ]
        module.support_x = tf.Variable(self.support_x)

        def predict(images):
            support_x, query_x, orders = tf.convert_to_tensor(module.support_x), model.inputs(images), []
            for weights, column_of in zip(module.weights, self.columns, strict=True):
                orders.append(tf.gather(model.probabilities(weights, support_x, query_x), column_of, axis=1))
            classes = [str(name).encode(errors="surrogateescape") for name in self.classes]
            return {"probabilities": tf.reduce_mean(orders, 0), "classes": tf.constant(classes)}

        module.predict = tf.function(predict, autograph=False)
        signatures = {
            name: module.predict.get_concrete_function(tf.TensorSpec(model._images_spec.shape, dtype, "images"))
            for name, dtype in (("predict", tf.uint8), ("predict_float", tf.float32))
        }
        classes = [name.item() if isinstance(name, np.generic) else name for name in self.classes]
        record = {
            "classes": classes,
            "normalise_with": model.normalise_with,
            "recipe": recipes.to_flags(model.recipe),
        }
        orders = "one class order" if model.class_orders == 1 else f"the mean of {len(self.columns)} class orders"
        made = f"{_made(model)} on {len(self.support_x)} labeled images; {orders}"
        listed = f"The classes are {printable(', '.join(map(str, classes)))}."
        read_me = _read_me(model, made, ADAPTED_CALL, listed)
        texts = {"adapted.json": json.dumps(record, indent=1), "README.md": read_me}
        _write_saved_model(module, signatures, Path(folder), texts)


class SavedAdapted(Reader):
    """An adapted model that Adapted.save wrote. Returned by load_adapted."""

    def __init__(self, module: object, recipe: Recipe, classes: list, normalise_with: str):
        super().__init__(recipe)
        self.module, self.classes, self.normalise_with = module, classes, normalise_with

    def predict(self, images: object) -> np.ndarray:
        """Return the probability of each class, float32 [n, N]; column c is classes[c]. Images as in Model.adapt.

        Raise InputError if the images are invalid.
        """
        pixels = self._pixels(images)
        pixels = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
        size = CHUNK if self.normalise_with == "support" else len(pixels)
        chunks = [pixels[first : first + size] for first in range(0, len(pixels), size)]
        return np.concatenate([self.module.predict(tf.constant(chunk))["probabilities"] for chunk in chunks])


def load_adapted(folder: Path | str) -> SavedAdapted:
    """Return the adapted model that Adapted.save, or `predict.py RUN LABELED --export`, wrote.

    Load only folders that you trust: a SavedModel is a program. Raise InputError if it is not such a folder.
    """
    folder, fix = Path(folder), "choose a folder that `predict.py RUN LABELED --export=DIR` wrote"
    try:
        record = runs.read_json(folder / "adapted.json", dict, fix)
        recipe = recipes.from_flags(record["recipe"], str(folder / "adapted.json"))
        module = tf.saved_model.load(str(folder))
        return SavedAdapted(module, recipe, record["classes"], record["normalise_with"])
    except (OSError, KeyError):
        raise InputError(f"{folder}: is not a saved adapted model; {fix}") from None


def _ordered_by_images(pixels, numbers):
    """Sort labeled images and their classes by the checksums of the pixels, so that their names do not matter.

    Args: pixels [n, ...]; numbers, the class of each image, int [n]. Return the images' order, and each class's place.
    """
    if pixels.dtype != np.uint8:
        pixels = np.uint8(np.round(255 * pixels))
    checksums = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    images = [sorted(np.array(checksums)[numbers == c]) for c in range(numbers.max() + 1)]
    places = np.argsort(sorted(range(len(images)), key=images.__getitem__))
    return sorted(range(len(pixels)), key=lambda i: (places[numbers[i]], checksums[i])), places


def export(model: Model, folder: Path | str) -> None:
    """Write the model as a SavedModel, which TensorFlow runs without this project.

    Its one function, adapt_and_predict(support_x, support_y, query_x) -> probabilities [n, N], includes preprocessing,
    updates and normalization. Images are [n, height, width, channels], all uint8 (0 to 255) or all float32 (0 to 1).
    support_y has class numbers from 0 to N - 1, int64, each at least once. Column c is class c. The signature
    adapt_and_predict takes uint8, adapt_and_predict_float takes float32.
    Raise InputError if the folder exists or cannot be written.
    """
    way, module = model.recipe.way, tf.Module()
    module.weights = {name: tf.Variable(weight) for name, weight in model.maml.weights.items()}

    def adapt_and_predict(support_x, support_y, query_x):
        for images in (support_x, query_x):
            if images.dtype != tf.uint8:
                tf.debugging.assert_greater_equal(tf.reduce_min(images), 0.0, "float images must be from 0 to 1")
                tf.debugging.assert_less_equal(tf.reduce_max(images), 1.0, "float images must be from 0 to 1")
        labels = tf.one_hot(support_y, way)  # all zeros for a number outside 0 to N - 1
        tf.debugging.assert_equal(tf.reduce_sum(labels, 1), 1.0, f"support_y must be from 0 to {way - 1}")
        tf.debugging.assert_positive(tf.reduce_sum(labels, 0), f"support_y must have each class from 0 to {way - 1}")
        support, query = model.inputs(support_x), model.inputs(query_x)
        weights = {name: tf.convert_to_tensor(weight) for name, weight in module.weights.items()}
        for j in range(model.updates):
            weights = model._one_update(weights, support, labels, tf.constant(j))
        return {"probabilities": model._probabilities(weights, support, query)}

    def concrete(dtype):
        shape = [None, *model.images.size, model.images.channels]
        support_x, query_x = (tf.TensorSpec(shape, dtype, name) for name in ("support_x", "query_x"))
        labels = tf.TensorSpec([None], tf.int64, "support_y")
        return module.adapt_and_predict.get_concrete_function(support_x, labels, query_x)

    module.adapt_and_predict = tf.function(adapt_and_predict, autograph=False)
    signatures = {"adapt_and_predict": concrete(tf.uint8), "adapt_and_predict_float": concrete(tf.float32)}
    labels = f"`support_y` has the class number of each labeled image, int64 from 0 to {way - 1}, each at least once."
    text = _read_me(model, _made(model) + " in each call", EXPORTED_CALL, labels)
    _write_saved_model(module, signatures, Path(folder), {"README.md": text})


ADAPTED_CALL = """model = tf.saved_model.load("DIR")
answer = model.predict(images)
probabilities, classes = answer["probabilities"], answer["classes"]  # [n, N], [N]"""
EXPORTED_CALL = """model = tf.saved_model.load("DIR")
probabilities = model.adapt_and_predict(support_x, support_y, query_x)["probabilities"]  # [n, N]"""


def check_new_folder(folder: Path) -> None:
    """Raise InputError if an export cannot be written to this folder."""
    if folder.exists():
        raise InputError(f"--export={folder}: already exists; choose another folder")
    runs.check_writable(folder.parent, "--export")


def _write_saved_model(module, signatures, folder, texts):
    """Write a module as a SavedModel, with text files by name, or nothing if it fails."""
    check_new_folder(folder)
    with writing(folder.parent), tempfile.TemporaryDirectory(prefix=".export", dir=folder.parent) as temporary:
        tf.saved_model.save(module, f"{temporary}/model", signatures)
        _remove_gradient_names(Path(temporary) / "model" / "saved_model.pb")
        for name, text in texts.items():
            (Path(temporary) / "model" / name).write_text(text + "\n", encoding="utf-8")
        os.replace(f"{temporary}/model", folder)


def _made(model):
    """Return how a model was made, without the paths of this machine."""
    checkpoint = Path(model.checkpoint)
    run = f"{checkpoint.absolute().parent.name}/{checkpoint.name} of {model.recipe.data_set}"
    normalized = f", normalized {NORMALIZED[model.normalise_with]}" if model.inner.network.batch_statistics else ""
    return f"{run}{normalized}, {model.updates} updates"


def _read_me(model, made, call, more):
    """Return the README.md of an exported model: inputs, outputs, how it was made, and how to read images for it."""
    (height, width), channels = model.images.size, model.images.channels
    if model.images.augment:  # center crops, which take more than a few lines
        reading = "images = predict.load(RUN).read(paths)  # predict.py of the project that trained the model"
    elif model.images.invert:
        reading = (
            'image = ImageOps.exif_transpose(Image.open("drawing.png"))  # Pillow; dark ink on a light ground\n'
            'image = (image if image.mode == "1" else image.convert("L")).resize('
            f'({width}, {height}), Image.LANCZOS).convert("L")\n'
            f"images = np.asarray(image).reshape(1, {height}, {width}, {channels})"
        )
    else:
        mode = "L" if channels == 1 else "RGB"
        reading = (
            f'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")  # Pillow\n'
            f"image = image.resize(({width}, {height}), Image.LANCZOS)\n"
            f"images = np.asarray(image).reshape(1, {height}, {width}, {channels})"
        )
    return f"""# A few-shot image classifier

A SavedModel for TensorFlow, made from {printable(made)}.

```python
{call}
```

Images are arrays [n, {height}, {width}, {channels}], all uint8 from 0 to 255 or all float32 from 0 to 1. {more}
Column c of the probabilities is class c.

Read files as in training, or the answers get worse:

```python
{reading}
```"""


def _remove_gradient_names(graph):
    """Remove the names of our custom gradients from a SavedModel, because TensorFlow warns of them at every load.

    They are not needed: the graph already contains the gradients of the updates as operations.
    """
    saved = saved_model_pb2.SavedModel.FromString(graph.read_bytes())
    for function in saved.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            node.attr.pop("_gradient_op_type", None)
    graph.write_bytes(saved.SerializeToString(deterministic=True))


def _other_models(way, model):
    """Return the advice for an error: models for so many classes or more, next to the model or published."""
    if way < 2:
        return f"give 2 to {model.recipe.way} classes"
    models, siblings = [], Path(model.checkpoint).parent.resolve().parent
    for record in sorted({*siblings.glob("*/flags.json"), *PUBLISHED.glob("*/flags.json")}):
        with contextlib.suppress(InputError, FileNotFoundError):  # skip damaged records
            flags = runs.read_json(record, dict, "remove it")
            has = flags.get("num_classes")
            if isinstance(has, int) and has >= way and flags.get("datasource") not in (None, "sinusoid"):
                models.append(os.path.relpath(record.parent))
    if models:
        return f"use a model for {way} classes or more: {', '.join(models)}"
    return f"train a {way}-way model (--num_classes={way}), on {way} or more other classes, and {way} more to validate"


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Errors that the user can fix are printed on one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = {"type": os.path.expanduser}
    parser.add_argument("run", **path, metavar="RUN", help="folder of a trained model")
    parser.add_argument(
        "labeled", **path, metavar="LABELED", nargs="?", help="folder with one subfolder of images per class"
    )
    parser.add_argument("unlabeled", **path, metavar="UNLABELED", nargs="*", help="images, or folders of images")
    parser.add_argument(
        "--csv", type=user_path, metavar="FILE", help="write all probabilities to FILE, one row per image"
    )
    parser.add_argument(
        "--updates", type=int, metavar="J", help="updates on the labeled images (default: as in the paper's tests)"
    )
    parser.add_argument(
        "--checkpoint",
        default="-1",
        help="an iteration, -1 for the latest, or best for the best on validation (default: -1)",
    )
    parser.add_argument(
        *("--normalise_with", "--query_norm"),
        default="support",
        choices=list(NORMALIZED),
        help="how batch norm normalizes an image; "
        + "; ".join(f"{value}: {images}" for value, images in NORMALIZED.items())
        + " (default: support)",
    )
    parser.add_argument(
        "--class_orders",
        type=int,
        default=0,
        choices=list(CLASS_ORDERS),
        help="orders of the classes in the model's last layer, which change its answers; "
        + "; ".join(f"{value}: {orders}" for value, orders in CLASS_ORDERS.items())
        + " (default: 0)",
    )
    parser.add_argument(
        "--no_hold_out",
        action="store_true",
        help="do not measure the accuracy by holding out labeled images, which needs two or more of each class",
    )
    parser.add_argument(
        "--export",
        **path,
        metavar="DIR",
        help="write the model, adapted to LABELED if given, to DIR as a SavedModel instead of classifying images",
    )
    args = parser.parse_intermixed_args(arguments)
    if bool(args.export) == bool(args.unlabeled) or (args.export and args.csv):
        parser.error("give RUN LABELED UNLABELED to classify images, or RUN [LABELED] --export=DIR")
    logging.set_verbosity(logging.WARNING)
    devices.start()
    try:
        model = load(
            args.run,
            checkpoint=args.checkpoint if args.checkpoint == "best" else _iteration(args.checkpoint),
            updates=args.updates,
            normalise_with=args.normalise_with,
            class_orders=args.class_orders,
        )
        if args.export:
            check_new_folder(Path(args.export))
            if args.labeled:
                label_of = labeled_files(model, args.labeled)
                adapted, *_ = adapt_to_files(model, args.labeled, label_of, not args.no_hold_out)
                adapted.save(args.export)
            else:
                export(model, args.export)
            say(f"Wrote {args.export}, a SavedModel of {model.checkpoint} with {model.updates} updates.")
        else:
            answer(model, args.labeled, args.unlabeled, args.csv, not args.no_hold_out)
        sys.stdout.flush()
    except BrokenPipeError:  # for example, from `| head`
        _discard_output(sys.stdout)
        sys.exit(1 if args.csv else 0)
    except (InputError, OSError) as error:
        say(f"predict.py: {os_error(error) if isinstance(error, OSError) else error}", sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def answer(model: Model, labeled: str, unlabeled: Sequence[str], table: Path | None, hold_out: bool = True) -> None:
    """Adapt the model to the labeled images, and print the class of every other image.

    Args:
        labeled: folder with one folder of images per class.
        unlabeled: images, or folders of images.
        table: file to write all probabilities to, or None.
        hold_out: first print the accuracy on labeled images held out, if each class has two or more.
    """
    label_of, paths = labeled_files(model, labeled), unlabeled_files(labeled, unlabeled)
    if table:
        _check_table(table)
    # With a table, a closed stdout does not stop the work.
    printing = functools.partial(_closed_stream_allowed, sys.stdout) if table else contextlib.nullcontext
    adapted, known, warned = adapt_to_files(model, labeled, label_of, hold_out, printing)
    asked, originals = [], {row[3]: row for row in reversed(known) if row[3]}  # fingerprint -> first labeled image
    path_width = min(60, max(len("image"), *(len(printable(path)) for path in paths)))
    class_width = max(len("class"), *(len(printable(name)) for name in adapted.classes))
    orders, heading = len(adapted.columns), "" if model.class_orders == 1 else "  orders"
    with printing():
        if heading:
            print("The column orders says how many of them give the class.")
        print(f"\n{'image':{path_width}}  {'class':{class_width}}  probability{heading}  runner-up", flush=True)
    rows, dark = [], []
    with tqdm(total=len(paths), unit=" images", disable=None if len(paths) >= PROGRESS_BAR_FROM else True) as bar:
        size = CHUNK if model.normalise_with == "support" else len(paths)
        for first in range(0, len(paths), size):
            images = _read_all(model, paths[first : first + size])
            chunk = [(path, image) for path, _, image in images if image is not None]
            if chunk:
                dark += [has_dark_border(image) for _, image in chunk]
                asked += [(path, "unlabeled", "", fingerprint(image)) for path, image in chunk]
                predicted = adapted.predict_orders(np.stack([image for _, image in chunk]))
                agreeing = (predicted.argmax(2) == predicted.mean(0).argmax(1)).sum(0)
                for (path, _), probabilities, agree in zip(chunk, predicted.mean(0), agreeing, strict=True):
                    best, second = np.argsort(-probabilities, kind="stable")[:2]
                    share = f"{agree}/{orders}".rjust(len(heading)) if heading else ""
                    rows.append([path, adapted.classes[best], probabilities[best], *probabilities])
                    with printing(), tqdm.external_write_mode():
                        print(
                            f"{printable(path):{path_width}}  {printable(adapted.classes[best]):{class_width}}"
                            f"  {probabilities[best]:11.2f}{share}"
                            f"  {printable(adapted.classes[second])} {probabilities[second]:.2f}",
                            flush=True,
                        )
            bar.update(len(paths[first : first + size]))
    if not warned:
        _warn_of_dark_borders(model, "UNLABELED", dark)
    asked = [row for row in asked if not row[3] or row[3] in originals]
    _report_repeats("UNLABELED", [*originals.values(), *asked])
    if not rows:
        raise InputError("UNLABELED: all images are unreadable; choose other images")
    if table:
        text = "".join(map(_csv_line, [[*COLUMNS, *adapted.classes], *rows]))
        # A file name may have bytes that are not text; keep them.
        write_whole(table, lambda file: file.write(text.encode(errors="surrogateescape")))
        with printing():
            say(f"Wrote {table}.")


def adapt_to_files(
    model: Model,
    labeled: str,
    label_of: dict[str, str],
    hold_out: bool,
    printing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Adapted, list[tuple[str, str, str, str]], bool]:
    """Adapt the model to the labeled images, and print how, and its accuracy on labeled images held out.

    Args:
        labeled: their folder.
        label_of: path -> class.
        hold_out: print the accuracy, if each class has two or more images.
        printing: a context for what is printed.
    Return the adapted model, the labeled images as images.repeat_lines takes them, and whether they look inverted.
    """
    support = [row for row in _read_all(model, list(label_of), list(label_of.values())) if row[2] is not None]
    unreadable = set(label_of.values()) - {label for _, label, _ in support}
    if unreadable:
        raise InputError(f"{labeled}: all images of class {min(unreadable)} are unreadable; replace them")
    known = [(path, "labeled", label, fingerprint(image)) for path, label, image in support]
    _report_repeats(labeled, known)
    warned = _warn_of_dark_borders(model, labeled, [has_dark_border(image) for *_, image in support])
    images, labels = np.stack([image for *_, image in support]), [label for _, label, _ in support]
    adapted, right = model.adapt(images, labels), model.hold_out(images, labels) if hold_out else np.array([], bool)
    with printing():
        say(
            f"{model.checkpoint} of {model.recipe.data_set}, {model.updates} updates on {len(support)} labeled images "
            f"of {len(adapted.classes)} classes."
        )
        if model.inner.network.batch_statistics:
            together = NORMALIZED[model.normalise_with]
            print(f"Each image is normalized {together} (--normalise_with={model.normalise_with}).")
        if right.size:
            low, high = _interval(right)
            print(
                f"Labeled images held out, one of each class at a time: {right.sum()} of {right.size} are right, "
                f"{right.mean():.0%} (95% interval {low:.0%} to {high:.0%}; chance {1 / len(adapted.classes):.0%})."
            )
        if model.class_orders == 0:
            print(f"Probabilities are means over {len(adapted.columns)} class orders (--class_orders=0).")
    return adapted, known, warned


def _interval(right):
    """Return the 95% confidence interval (Wilson's) of the accuracy, given bool [n]."""
    n, z = right.size, 1.96
    center, half = (right.sum() + z**2 / 2) / (n + z**2), z * np.sqrt(n * right.mean() * (1 - right.mean()) + z**2 / 4)
    return center - half / (n + z**2), center + half / (n + z**2)


def _check_table(table):
    """Raise InputError if the --csv file exists and is not a table of predictions, or cannot be written."""
    if table.is_dir():
        raise InputError(f"--csv={table}: is a folder; choose a file name")
    if table.exists():
        if not table.is_file():
            raise InputError(f"--csv={table}: is not a regular file; choose another name, such as answers.csv")
        # `--csv photo*.png` would overwrite the first photograph.
        header = ",".join(COLUMNS).encode()
        with table.open("rb") as file:
            if file.read(len(header)) not in (b"", header):
                raise InputError(f"--csv={table}: file exists but is not a predictions table; choose another name")
    runs.check_writable(table.parent, "--csv")


def _csv_line(row):
    """Return a CSV line that ends in \\n. Writing it with \\r\\n first makes the writer quote \\r."""
    line = io.StringIO()
    csv.writer(line).writerow(row)
    return line.getvalue().removesuffix("\r\n") + "\n"


@contextlib.contextmanager
def _closed_stream_allowed(stream: TextIO) -> Iterator[None]:
    """Stop printing, without an error, once the reader of the stream has closed it, as head does."""
    try:
        yield
    except BrokenPipeError:
        _discard_output(stream)


def _discard_output(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _remark(line):
    """Print a line to stderr, so that it stays separate from the predictions."""
    with _closed_stream_allowed(sys.stderr):
        say(line, sys.stderr)


def labeled_files(model: Model, folder: str) -> dict[str, str]:
    """Return path -> class of the labeled images. Raise InputError unless 2 to N classes have images."""
    if not is_folder(folder):
        raise InputError(f"{folder}: no such folder; give a folder with one subfolder of images per class")
    classes, way = class_folders(folder), model.recipe.way
    if loose := len(image_files(folder)) - sum(map(len, classes.values())):
        _remark(f"{folder}: ignored {loose:,} images outside class folders")
    _report_ignored(folder)
    if not 2 <= len(classes) <= way:
        raise InputError(
            f"{folder}: has {len(classes)} class folders{_first_ten(sorted(classes))}, but {model.checkpoint} is a "
            f"{way}-way model; {_other_models(len(classes), model)}"
        )
    for name, files in classes.items():
        if not files:
            raise InputError(
                f"{folder}: class folder {name} has no images that Pillow can read; convert its files to JPEG"
            )
    return {os.path.join(folder, name, file): nfc(name) for name in sorted(classes, key=nfc) for file in classes[name]}


def unlabeled_files(labeled: str, unlabeled: Sequence[str]) -> list[str]:
    """Return the images to classify, each once. Raise InputError if one is missing or overlaps the labeled folder."""
    labeled_path, paths = os.path.realpath(labeled), []
    for path in unlabeled:
        real = os.path.realpath(path)
        if not (is_folder(path) or os.path.exists(path)):
            raise InputError(f"{path}: no such image or folder; check the path")
        if os.path.commonpath([real, labeled_path]) in (real, labeled_path):
            raise InputError(f"{path}: overlaps {labeled}; keep labeled and unlabeled images in separate folders")
        images = [path]
        if os.path.isdir(path):
            images = image_files(path)
            _report_ignored(path)
        if not images:
            raise InputError(f"{path}: contains no images; give images, or folders of images")
        paths += images
    return list(dict.fromkeys(paths))


def _report_ignored(folder):
    for line in ignored_lines(folder):
        _remark(line)


def _read_all(model, paths, labels=None) -> Iterator[tuple[str, str | None, np.ndarray | None]]:
    """Return (path, label, pixels) of every image, with None as the pixels of unreadable ones, which are reported."""

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
        listed = _first_ten([broken[path] for path in paths if path in broken])
        _remark(f"Left out {len(broken):,} unreadable images{listed}")
    return zip(paths, labels or [None] * len(paths), images, strict=True)


def _report_repeats(where, marked):
    for line in repeat_lines(where, marked, "LABELED and UNLABELED"):
        _remark(line)


def _warn_of_dark_borders(model, where, dark):
    """Warn if images look like light ink, but the model was trained on dark ink. Return whether they do.

    dark: for each image, whether its border is dark.
    """
    wrong = model.images.invert and any(dark)
    if wrong:
        _remark(
            f"WARNING: {where}: {sum(dark):,} of {len(dark):,} images have dark borders, but the model was trained on "
            "dark ink on a light background; invert those with light ink"
        )
    return wrong


def _iteration(text):
    try:
        if int(text) >= -1:
            return int(text)
    except ValueError:
        pass
    raise InputError(f"--checkpoint={text}: must be an iteration, -1 for the latest, or best")


def _first_ten(names):
    """Return a colon and the first ten names, or nothing if there are none."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f": {', '.join(names[:10])}{more}" if names else ""


if __name__ == "__main__":
    main()
