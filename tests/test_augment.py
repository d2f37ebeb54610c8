"""Augmentation: its boxes and colours, tasks of crops, the store of whole photographs, and a run on them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import augment
import main
import predict
from data_generator import ImageTasks
from images import load_splits, read_image
from recipe import DATASETS
from tests.helpers import refusal, run

IMAGES = DATASETS["folder"].images._replace(size=(16, 16), kept=32, augment=True)


def words(count, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, augment.WORDS), np.uint64)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Five classes a split, of six photographs of several shapes: red grows to the right, green downwards."""
    root = tmp_path_factory.mktemp("photographs")
    for split in ("train", "val", "test"):
        for label in range(5):
            folder = root / split / f"{split}{label}"
            folder.mkdir(parents=True)
            for number, (width, height) in enumerate([(60, 40), (40, 60), (50, 50), (90, 30), (64, 48), (33, 32)]):
                pixels = np.zeros((height, width, 3), np.uint8)
                pixels[..., 0] = np.linspace(0, 255, width)
                pixels[..., 1] = np.linspace(0, 255, height)[:, None]
                pixels[..., 2] = 50 * label
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("aspect", [0.5, 1.0, 1.5, 3.0])
def test_boxes_are_of_the_area_and_shape_that_are_said(aspect):
    aspects, uniform = np.full(20_000, aspect), np.random.default_rng(0).random((20_000, 2 * augment.ATTEMPTS + 2))
    left, top, right, bottom = augment.random_boxes(uniform, aspects).T
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1 + 1e-12
    ratio, area = aspect * (right - left) / (bottom - top), (right - left) * (bottom - top)
    assert ratio.min() >= 3 / 4 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    assert area.min() >= 0.08 and area.max() <= 1 + 1e-9
    tried = 0.08 + 0.92 * uniform[:, : augment.ATTEMPTS]
    tried_ratio = 3 / 4 * (16 / 9) ** uniform[:, augment.ATTEMPTS : 2 * augment.ATTEMPTS]  # its logarithm is uniform
    largest = min(1, aspect / (3 / 4)) * min(aspect, 4 / 3) / aspect
    is_largest = np.isclose(area, largest)
    same = np.isclose(area[:, None], tried) & np.isclose(ratio[:, None], tried_ratio)
    assert (same.any(1) | is_largest).all()
    assert is_largest.mean() < 0.1
    for side, number in ((left, -2), (top, -1)):  # each has a random number of its own
        assert np.corrcoef(side[area < 0.3], uniform[area < 0.3, number])[0, 1] > 0.6


def test_where_no_attempt_lies_inside_the_largest_box_in_the_middle_is_taken():
    uniform = np.ones((2, 2 * augment.ATTEMPTS + 2)) * 0.999
    np.testing.assert_allclose(
        augment.random_boxes(uniform, np.array([4.0, 0.25])), [[1 / 3, 0, 2 / 3, 1], [0, 1 / 3, 1, 2 / 3]], atol=1e-9
    )


def test_the_middle_at_test():
    """84 of a photograph whose short side is 96."""
    boxes = augment.centre_boxes(np.array([1.0, 1.5, 0.5]), (84, 84))
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], [84 / 96, 84 / 144, 84 / 96])
    np.testing.assert_allclose(boxes[:, 3] - boxes[:, 1], [84 / 96, 84 / 96, 84 / 192])
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, 0.5)


def test_colours_are_changed_as_said():
    """Of one-coloured photographs: brightness scales, contrast goes to the mean grey, saturation to its own grey."""
    colours = np.random.default_rng(0).integers(60, 160, (300, 3))
    pixels = np.broadcast_to(colours[:, None, None].astype(np.uint8), (300, 8, 8, 3))
    found = augment.random_crops(pixels, np.ones(300), words(300), (8, 8))
    assert (found == found[:, :1, :1]).all()
    uniform = (words(300) >> np.uint64(11)) * 2.0**-53
    factors, orders = 0.6 + 0.8 * uniform[:, -4:-1], (6 * uniform[:, -1]).astype(int)
    assert set(orders) == set(range(6))
    for colour, expected_factors, order, crop in zip(colours, factors, orders, found, strict=True):
        x = colour.astype(float)
        for which in augment.ORDERS[order]:
            grey = x @ [0.299, 0.587, 0.114]
            towards = (0, grey, grey)[which]
            x = np.clip(towards + expected_factors[which] * (x - towards), 0, 255)
        np.testing.assert_allclose(crop[0, 0], x, atol=4)  # rounded after each


def test_half_of_the_crops_are_flipped():
    ramp = np.broadcast_to(np.linspace(20, 120, 32).astype(np.uint8)[:, None], (32, 32, 3))
    crops = augment.random_crops(np.stack([ramp] * 400), np.ones(400), words(400), (8, 8)).astype(int)
    flipped = crops[:, 4, 0, 0] > crops[:, 4, -1, 0]
    uniform = (words(400) >> np.uint64(11)) * 2.0**-53
    np.testing.assert_array_equal(flipped, uniform[:, -5] < 0.5)
    assert 0.4 < flipped.mean() < 0.6


def test_colours_are_normalised_by_imagenets_mean_and_deviation():
    """0.485, 0.456, 0.406 and 0.229, 0.224, 0.225, as PyTorch's models take them too; and back."""
    black_and_white = np.array([[0, 0, 0], [1, 1, 1]], np.float32)
    found = augment.normalised(black_and_white)
    np.testing.assert_allclose(found, [[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]], atol=1e-4)
    np.testing.assert_allclose(augment.colours(found), black_and_white, atol=1e-6)


def test_a_crop_is_the_box_of_the_photograph(photographs):
    """Red and green tell where a pixel was: in the middle at test, whatever the photograph's shape."""
    for path in sorted((photographs / "train" / "train0").iterdir()):
        with Image.open(path) as image:
            width, height = image.size
        crop = read_image(path, IMAGES._replace(any_size=True)).astype(float)
        short = min(width, height)
        for channel, axis, side in ((0, 1, width), (1, 0, height)):
            line = crop[..., channel].mean(1 - axis)
            part = (16 / 18) * short / side
            expected = 255 * (0.5 + part * (np.arange(16) + 0.5 - 8) / 16)
            np.testing.assert_allclose(line, expected, atol=5)


def test_tasks_of_crops(photographs):
    """A function of seed, split and number; the whole photographs stay with their aspects, also from the cache."""
    images = IMAGES._replace(any_size=True)
    for _ in range(2):
        source = ImageTasks.from_folder(images, photographs, ("train", "val"), 5, 1, 2)
        np.testing.assert_allclose(source.classes["train"].aspects[:6], [1.5, 2 / 3, 1, 3, 4 / 3, 33 / 32])
        assert source.classes["train"].pixels.shape == (30, 32, 32, 3)
    (cached,) = (photographs / ".cache").glob("train*.json")
    assert cached.stem == "train_32x32x3_whole"
    whole = source.draw(3, "train", 7, 3)
    assert whole.support_x.shape == (3, 5, 16, 16, 3)
    for first in (0, 1, 2):
        for part, other in zip(whole, source.draw(3, "train", 7 + first, 1), strict=True):
            np.testing.assert_array_equal(part[first : first + 1], other)
    assert len(np.unique(whole.support_x.reshape(15, -1), axis=0)) == 15
    # Every image of every task has random words of its own: red, which grows to the right, tells which are flipped.
    red = np.concatenate([whole.support_x, whole.query_x], 1)[..., 0].mean(2)  # [T, N * (K + Q), width]
    flipped = red[..., 0] > red[..., -1]
    assert flipped.any(1).all() and not flipped.all(1).any()
    assert len(np.unique(flipped, axis=0)) == 3
    # At test a photograph is always the same; its mean colours are ImageNet's units.
    seen = {x.tobytes() for first in range(0, 60, 20) for x in source.draw(0, "val", first, 20).query_x[0]}
    assert len(seen) <= 30
    x = source.draw(0, "val", 0, 1).query_x
    colours = augment.colours(x)
    assert colours.min() > -1e-5 and colours.max() < 1 + 1e-5
    plain = load_splits(images._replace(augment=False), photographs, ("train",))["train"]
    assert plain.aspects is None and plain.pixels.shape == (30, 16, 16, 3)


def test_a_cache_with_wrong_aspects_is_made_anew(photographs):
    images = IMAGES._replace(any_size=True)
    load_splits(images, photographs, ("test",))
    index = photographs / ".cache" / "test_32x32x3_whole.json"
    for wrong in (["1.5"] * 30, [0] * 30, [1.5] * 29, []):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"aspects": wrong}))
        classes = load_splits(images, photographs, ("test",))["test"]
        np.testing.assert_allclose(classes.aspects[:3], [1.5, 2 / 3, 1])


def test_a_run_on_crops(photographs, tmp_path):
    """Trained with a picture of a validation task, tested, and asked."""
    flags = "--datasource=folder", f"--data_path={photographs}", "--image_size=16", "--num_filters=4", "--augment"
    flags += "--meta_batch_size=1", "--update_batch_size=1", "--num_updates=1", "--num_query=1", f"--logdir={tmp_path}"
    run(*flags, "--metatrain_iterations=1")
    run(*flags, "--metatrain_iterations=1", "--train=False", "--test_tasks=2")
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith(".size16.augment")
    model = predict.load(folder, updates=1)
    paths = sorted((photographs / "test").glob("*/0.png"))
    crops = model.read(paths)
    assert crops.shape == (5, 16, 16, 3)
    task = ImageTasks.from_folder(model.images, photographs, ("test",), 5, 1, 1)
    stored = task.classes["test"]
    centre = augment.centre_crops(stored.pixels[::6], stored.aspects[::6], (16, 16))
    np.testing.assert_array_equal(crops, centre)
    np.testing.assert_allclose(model.inputs(crops), augment.normalised(np.float32(crops) / 255), atol=1e-6)
    assert model.adapt(paths, range(5)).predict(paths).shape == (5, 5)
    assert "--augment is for photographs in colour, not for --datasource=omniglot" in refusal(
        "--datasource=omniglot", "--augment"
    )


def test_photographs_keep_their_shapes_when_they_are_prepared(tmp_path):
    """By a script, with --short_side; a second start finds them finished."""
    archive = tmp_path / "CUB_200_2011" / "images" / "001.Black_footed_Albatross"
    archive.mkdir(parents=True)
    for number, size in enumerate([(200, 100), (100, 151)]):
        Image.effect_noise(size, 50).convert("RGB").save(archive / f"bird{number}.jpg")
    program = Path(main.__file__).parent / "data" / "cub" / "prepare.py"
    command = [sys.executable, program, f"--archive={tmp_path / 'CUB_200_2011'}", f"--out={tmp_path / 'out'}"]
    command += ["--short_side=64", "--allow_missing"]
    for finished in (0, 1):
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"1 classes, {finished} of them finished before" in printed
        sizes = []
        for path in sorted((tmp_path / "out").glob("*/*/*.png")):
            with Image.open(path) as image:
                sizes.append(image.size)
        assert sizes == [(128, 64), (64, 97)]
