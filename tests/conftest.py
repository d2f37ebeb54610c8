"""Shared fixtures and test settings."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's setting would reach the programs under test
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):  # one core per worker
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from PIL import Image

import evaluate
import images
import main
from evaluate import Protocol
from images import ROOT, SPLITS
from recipe import DATASETS
from tests.helpers import small_flags

main.start_devices()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data and the original's recorded numbers. Skip the test if it is missing."""
    if not SHARED.is_dir():
        pytest.skip("../shared: is missing; it has real data and the original's recorded numbers")
    return SHARED


@pytest.fixture(scope="session")
def omniglot_like(tmp_path_factory) -> Path:
    """Generate a folder like the resized Omniglot: 4 alphabets of 10 characters of 20 binary 28x28 drawings.

    A character is a set of strokes, jittered in each drawing, so a model can learn it.
    """
    root = tmp_path_factory.mktemp("omniglot_resized")
    random = np.random.default_rng(0)
    for alphabet in range(4):
        for character in range(10):
            folder = root / f"Alphabet_{alphabet}" / f"character{character:02}"
            folder.mkdir(parents=True)
            strokes = random.integers(4, 20, (3, 2))
            for drawing in range(20):
                pixels = np.full((28, 28), 255, np.uint8)
                for index, (row, column) in enumerate(strokes + random.integers(-1, 2, (3, 2))):
                    height, width = (7, 2) if index % 2 else (2, 7)
                    pixels[row : row + height, column : column + width] = 0
                Image.fromarray(pixels).convert("1").save(folder / f"{drawing:02}.png")
    return root


@pytest.fixture(scope="session")
def miniimagenet_like(tmp_path_factory) -> Path:
    """Generate a folder like MiniImagenet: per split, 6 classes of 24 84x84 images. A class is a color.

    The classes are n00000000 to n00000005 in train, the next six in val, and the next six in test.
    """
    root = tmp_path_factory.mktemp("miniImagenet")
    random = np.random.default_rng(0)
    for number, split in enumerate(("train", "val", "test")):
        for label in range(6 * number, 6 * number + 6):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            color = random.integers(40, 216, 3)
            for image in range(24):
                pixels = np.clip(color + random.integers(-40, 40, (84, 84, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{image:03}.jpg")
    return root


@pytest.fixture(scope="session")
def omniglot(omniglot_like, tmp_path_factory) -> Path:
    """Link the generated characters under published names, 20 per split, enough for 20-way tasks."""
    root = tmp_path_factory.mktemp("omniglot")
    published = json.loads((ROOT / "data" / "splits" / "omniglot.json").read_text())
    drawn = sorted(omniglot_like.glob("[!.]*/*"))  # without another test's cache
    for split in SPLITS:
        for name, folder in zip(published[split][:20], drawn, strict=False):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).symlink_to(folder)
    return root


@pytest.fixture
def generated_are_published(monkeypatch):
    """Take the classes of `omniglot` and `miniimagenet_like` for all of the published ones."""
    published = json.loads((ROOT / "data" / "splits" / "omniglot.json").read_text())
    lists = {
        "omniglot.json": {split: published[split][:20] for split in SPLITS},
        "miniimagenet.json": {
            split: [f"n{label:08}" for label in range(6 * number, 6 * number + 6)]
            for number, split in enumerate(SPLITS)
        },
    }
    photos = DATASETS["miniimagenet"]
    monkeypatch.setitem(DATASETS, "miniimagenet", photos._replace(images=photos.images._replace(class_images=24)))
    for module in (images, evaluate):
        monkeypatch.setattr(module, "published_classes", lambda of: lists.get(of.split_list, {}))


@pytest.fixture
def few_test_tasks():
    """Test on 4 tasks, not 600."""
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        main.FLAGS.set_default("test_tasks", 4)
        patch.setitem(Protocol._field_defaults, "tasks", 4)
        yield


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user of this machine may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def small(omniglot) -> list[str]:
    """Return the flags of Omniglot 5-way 1-shot with a small network and meta-batch."""
    return small_flags(omniglot)


@pytest.fixture
def eagerly():
    """Run graphs eagerly: tracing a small model takes longer than computing it."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
