"""data/archive.py, the scripts that prepare the data sets, and the split lists."""

import bz2
import contextlib
import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

DATA = Path(__file__).resolve().parents[1] / "data"
RESIZE = "omniglot_resized/resize_images.py"
PROC = "miniImagenet/proc_images.py"
PARTS = ("train", "val", "test")
SPLITS = {path.stem: json.loads(path.read_text()) for path in (DATA / "splits").glob("*.json")}
OMNIGLOT, MINIIMAGENET = SPLITS["omniglot"], SPLITS["miniimagenet"]

sys.path[:0] = [str(DATA), str((DATA / RESIZE).parent), str((DATA / PROC).parent)]

import proc_images  # noqa: E402
import resize_images  # noqa: E402

import archive  # noqa: E402
import folders  # noqa: E402
from tests.test_pickles import pickled  # noqa: E402


def load(name: str):
    """data/<name>/prepare.py: four scripts have that name, so none can be imported by it."""
    spec = importlib.util.spec_from_file_location(name, DATA / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cifar_fs, fc100, cub, tiered_imagenet = map(load, ("cifar_fs", "fc100", "cub", "tiered_imagenet"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, so that leftovers show; empty folders count as files without bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if not path.is_dir() or not any(path.iterdir())
    }


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def draw(root: Path, *alphabets: str, characters: int = 2, drawings: int = 2) -> Path:
    """Raw Omniglot: 105x105, 1 bit, of coarse random ink, <alphabet>/characterNN/*.png below root."""
    noise = np.random.default_rng(0)
    for alphabet in alphabets:
        for character in range(characters):
            folder = root / alphabet / f"character{character + 1:02}"
            folder.mkdir(parents=True)
            for drawing in range(drawings):
                pixels = np.kron(noise.integers(0, 2, (21, 21)), np.ones((5, 5))).astype(bool)
                Image.fromarray(pixels).save(folder / f"{character:04}_{drawing:02}.png")
    return root


def prepare_photographs(images: Path, csv: Path | None, out: Path, suffix: str) -> None:
    classes = proc_images.find_classes(proc_images.find(images), csv)
    proc_images.prepare(classes, out, suffix, allow_missing=False)


def photograph(folder: Path, *names: str, mode: str = "RGB", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([len(names), seed])
    for name in names:
        pixels = noise.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((120, 90)).convert(mode).save(folder / name, "JPEG")
    return folder


def write_csv(folder: Path, **splits: dict[str, list[str]]) -> None:
    """train.csv, val.csv and test.csv of {label: file names}; a split that is not given has no classes."""
    for part in PARTS:
        rows = [f"{name},{label}" for label, names in splits.get(part, {}).items() for name in names]
        (folder / f"{part}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")


def pack(folder: Path, target: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as packed:
        for path in sorted(folder.rglob("*")):
            packed.write(path, path.relative_to(folder))
    return target


def pack_tar(folder: Path, target: Path, order=None) -> Path:
    with tarfile.open(target, "w" if target.suffix == ".tar" else "w:gz") as packed:
        for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=order):
            packed.add(path, path.relative_to(folder))
    return target


def resized(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB").resize((84, 84), Image.LANCZOS))


def run(script: str | Path, *flags: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *flags], cwd=cwd, capture_output=True, text=True)


def failure(*command, **place) -> str:
    """What a script says when it gives up: one line, exit code 1."""
    done = run(*command, **place)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr
    return done.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *flags) runs a script's main as from the command line and returns what it prints."""

    def run_main(script, *flags: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        capsys.readouterr()
        archive.run(script.main)
        return capsys.readouterr().out

    return run_main


@pytest.fixture
def data(tmp_path) -> Path:
    """A copy of the project's data folder as a checkout has it: scripts and lists, no data."""
    for name in (
        *(path.name for path in DATA.glob("*.py")),
        RESIZE,
        PROC,
        "splits/omniglot.json",
        "splits/miniimagenet.json",
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / name, tmp_path / "data" / name)
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------ Omniglot


COPY_AND_RESIZE = f"cp -r ../omniglot/* . && '{sys.executable}' -B resize_images.py"


def test_omniglot_in_the_originals_way(data):
    draw(draw(data / "omniglot", "Greek") / "images_background", "Latin", "N_Ko")
    draw(data / "omniglot" / "images_evaluation", "Tengwar")
    raw = contents(data / "omniglot")
    here = data / "omniglot_resized"

    done = subprocess.run(COPY_AND_RESIZE, shell=True, cwd=here, capture_output=True, text=True, check=True)

    assert "alphabets: 4 found, 50 expected  <- not the published number\n" in done.stdout
    assert "characters: 8 found, 1,623 expected" in done.stdout
    assert "images: 16 found, 32,460 expected" in done.stdout
    assert contents(data / "omniglot") == raw
    assert visible(here) == {"resize_images.py", "Greek", "Latin", "N_Ko", "Tengwar"}
    for name in raw:
        big = Image.open(data / "omniglot" / name).resize((28, 28), Image.NEAREST)
        with Image.open(here / re.sub("images_[a-z]+/", "", name)) as small:
            assert (small.size, small.mode, small.format) == ((28, 28), "1", "PNG")
            assert np.array_equal(small, big)

    # Copied and started once more: the raw copies lie over and beside the finished alphabets.
    ready = contents(here)
    subprocess.run(COPY_AND_RESIZE, shell=True, cwd=here, capture_output=True, check=True)
    assert contents(here) == ready


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_omniglot_from_its_archives(data, tmp_path, method):
    background, evaluation = tmp_path / "images_background.zip", tmp_path / "images_evaluation.zip"
    pack(draw(tmp_path / "a", "images_background/Greek"), background, method)
    pack(draw(tmp_path / "b", "images_evaluation/Oriya"), evaluation, method)
    here = data / "omniglot_resized"

    first = run(data / RESIZE, background, evaluation, cwd=tmp_path)
    assert "2 alphabets, 0 of them finished before\n" in first.stdout
    resize_images.prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "from_folders")
    for alphabet in ("Greek", "Oriya"):
        assert contents(here / alphabet) == contents(tmp_path / "from_folders" / alphabet)

    shutil.rmtree(here / "Oriya")
    kept = (here / "Greek").stat().st_ino
    second = run(data / RESIZE, background, evaluation, cwd=tmp_path)
    assert "2 alphabets, 1 of them finished before\n" in second.stdout
    assert (here / "Greek").stat().st_ino == kept
    assert visible(here / "Oriya") == {"character01", "character02"}


def test_an_archive_adds_to_an_alphabet_without_losing_what_is_there(tmp_path):
    out = draw(tmp_path / "out", "Greek", characters=3, drawings=3)
    resize_images.prepare([], out)
    before = contents(out)
    more = draw(tmp_path / "more", "images_background_small1/Greek", characters=5)
    resize_images.prepare([pack(more, tmp_path / "small1.zip")], out)
    after = contents(out)
    assert len(after) == 3 * 3 + 2 * 2
    assert set(before) < set(after)


def test_a_linked_folder_of_raw_drawings_is_left_alone(tmp_path):
    raw = draw(tmp_path / "omniglot", "images_background/Greek")
    before = contents(raw)
    out = draw(tmp_path / "out", "Latin")
    (out / "images_background").symlink_to(raw / "images_background")
    (out / "Greek").symlink_to(raw / "images_background" / "Greek")
    resize_images.prepare([], out)
    with pytest.raises(SystemExit, match=r"Greek is a link or a file .*: move it away"):
        resize_images.prepare([raw], out)
    assert contents(raw) == before


def test_a_damaged_drawing_is_named_and_costs_only_its_alphabet(tmp_path):
    raw = draw(tmp_path / "raw", "Greek", "Latin", "Oriya")
    damaged = raw / "Latin" / "character02" / "0001_00.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    message = failure(DATA / RESIZE, raw, "--out", tmp_path / "out")
    assert f"{damaged} is damaged or not a PNG or JPEG image" in message
    assert visible(tmp_path / "out") == {"Greek"}

    archive_message = failure(DATA / RESIZE, pack(raw, tmp_path / "raw.zip"), "--out", tmp_path / "out")
    assert "raw.zip/Latin/character02/0001_00.png is damaged" in archive_message

    damaged.write_bytes(whole)
    resize_images.prepare([raw], tmp_path / "out")
    assert visible(tmp_path / "out") == {"Greek", "Latin", "Oriya"}


def test_without_drawings_the_expected_layout_is_told(data, tmp_path):
    layout = "<alphabet>/<character>/*.png was expected there"
    assert layout in failure(data / RESIZE)
    Image.new("1", (105, 105)).save(data / "omniglot_resized" / "0001_01.png")
    assert layout in failure(data / RESIZE)
    assert layout in failure(data / RESIZE, pack(data, tmp_path / "no_omniglot.zip"))
    assert "nowhere.zip: no such file or folder" in failure(data / RESIZE, "nowhere.zip")


def test_real_omniglot(shared, tmp_path, capsys):
    archives = [shared / "data" / "omniglot" / f"images_{part}.zip" for part in ("background", "evaluation")]
    resize_images.prepare(archives, tmp_path)
    counts = capsys.readouterr().out
    assert "alphabets: 50 found, 50 expected\n" in counts
    assert "characters: 1,623 found, 1,623 expected\n" in counts
    assert "images: 32,460 found, 32,460 expected\n" in counts
    for path in tmp_path.glob("*/*/*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((28, 28), "1"), path
    characters = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert characters == {name for part in PARTS for name in OMNIGLOT[part]}


# -------------------------------------------------------------------------------------------- MiniImagenet


def test_miniimagenet_in_the_originals_way(data):
    here = data / "miniImagenet"
    names = {"train": ["a0.jpg", "a1.jpg"], "val": ["b0.jpg", "b1.jpg"], "test": ["c0.jpg", "c1.jpg"]}
    photograph(here / "images", *names["train"], *names["val"], "not_in_the_csv.jpg")
    photograph(here / "images", *names["test"], mode="L")
    write_csv(here, **{part: {names[part][0][0]: names[part]} for part in PARTS})
    raw = contents(here / "images")

    done = run("proc_images.py", cwd=here)

    assert "3 classes, 0 of them finished before\n" in done.stdout
    assert "train classes: 1 found, 64 expected  <- not the published number\n" in done.stdout
    assert "test images: 2 found, 12,000 expected" in done.stdout
    assert contents(here / "images") == raw
    for part in PARTS:
        assert set(contents(here / part)) == {f"{name[0]}/{name}" for name in names[part]}
        for path in (here / part).glob("*/*"):
            with Image.open(path) as image:
                assert (image.size, image.mode, image.format) == ((84, 84), "RGB", "JPEG")
    original = io.BytesIO()
    Image.open(here / "images" / "a0.jpg").resize((84, 84), resample=Image.LANCZOS).save(original, "JPEG")
    assert (here / "train" / "a" / "a0.jpg").read_bytes() == original.getvalue()

    kept = {path: path.stat().st_ino for path in here.glob("t*/*/*.jpg")}
    shutil.rmtree(here / "val")
    assert "3 classes, 2 of them finished before\n" in run("proc_images.py", cwd=here).stdout
    assert {path: path.stat().st_ino for path in here.glob("t*/*/*.jpg")} == kept
    assert visible(here / "val" / "b") == {"b0.jpg", "b1.jpg"}


def test_miniimagenet_from_an_archive_by_the_class_lists(data, tmp_path):
    labels = {part: MINIIMAGENET[part][3] for part in PARTS}
    for label in labels.values():
        photograph(tmp_path / "packed" / "images", f"{label}00000001.jpg", f"{label}00000002.jpg")
    photograph(tmp_path / "packed" / "__MACOSX" / "images", f"._{labels['val']}00000001.jpg")
    images = pack(tmp_path / "packed", tmp_path / "images.zip")

    flags = ("--images", images, "--out", tmp_path / "out")
    assert "100 classes are not whole: add what is missing" in failure(data / PROC, *flags)
    assert not (tmp_path / "out").exists()
    done = run(data / PROC, *flags, "--allow_missing")
    assert f"val/{labels['val']}: 598 images missing\n" in done.stdout
    assert "no csv files in" in done.stdout
    found = {f"{part}/{label}/{label}0000000{i}.jpg" for part, label in labels.items() for i in (1, 2)}
    assert set(contents(tmp_path / "out")) == found


def test_missing_photographs_are_reported_before_anything_is_written(tmp_path):
    listed = ["a0.jpg", "a1.jpg", "a2.jpg"]
    write_csv(tmp_path, train={"a": listed, "b": ["b0.jpg"]}, test={"c": ["c0.jpg"]})
    images = photograph(tmp_path / "images", "a0.jpg", "c0.jpg")
    flags = ("--images", images, "--csv", tmp_path, "--out", tmp_path / "out")

    done = run(DATA / PROC, *flags)
    assert done.returncode == 1
    assert done.stdout == "train/a: 2 images missing\ntrain/b: no images\n"
    assert done.stderr == "error: 2 classes are not whole: add what is missing, or go on with --allow_missing\n"
    assert not (tmp_path / "out").exists()

    assert run(DATA / PROC, *flags, "--allow_missing").returncode == 0
    assert set(contents(tmp_path / "out")) == {"train/a/a0.jpg", "test/c/c0.jpg"}

    photograph(images, "a1.jpg", "a2.jpg", "b0.jpg")
    assert "3 classes, 1 of them finished before" in run(DATA / PROC, *flags).stdout
    assert visible(tmp_path / "out" / "train" / "a") == set(listed)


def test_lossless_keeps_every_bit_and_takes_the_jpegs_place(tmp_path):
    images = photograph(tmp_path / "images", "a0.jpg", "a1.jpg")
    write_csv(tmp_path, val={"a": ["a0.jpg", "a1.jpg"]})
    for suffix in (".jpg", ".png"):
        prepare_photographs(images, tmp_path, tmp_path / "out", suffix)
        assert set(contents(tmp_path / "out")) == {f"val/a/a0{suffix}", f"val/a/a1{suffix}"}
    with Image.open(images / "a0.jpg") as raw, Image.open(tmp_path / "out" / "val" / "a" / "a0.png") as saved:
        assert np.array_equal(saved, raw.resize((84, 84), Image.LANCZOS))


def test_a_class_folder_with_other_images_is_not_replaced(tmp_path):
    images = photograph(tmp_path / "images", "a0.jpg")
    write_csv(tmp_path, train={"a": ["a0.jpg"]})
    photograph(tmp_path / "out" / "train" / "a", "mine.jpg")
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"train/a has 1 other files, mine.jpg the first: move"):
        prepare_photographs(images, tmp_path, tmp_path / "out", ".jpg")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "train.csv is not there: all of train.csv, val.csv and test.csv are needed"),
        ("", "train.csv does not begin with the line filename,label"),
        ("a0.jpg,a\n", "train.csv does not begin with the line filename,label"),
        ("filename,label\na0.jpg,a\na0.jpg\n", "train.csv, line 3: 'a0.jpg' is no file name and label"),
        ("filename,label\na0.jpg,../../a\n", "line 2: 'a0.jpg,../../a' is no file name and label"),
        ("filename,label\n/etc/a0.jpg,a\n", "line 2: '/etc/a0.jpg,a' is no file name and label"),
    ],
)
def test_a_wrong_csv_is_named_with_its_line(tmp_path, train, message):
    images = photograph(tmp_path / "images", "a0.jpg")
    write_csv(tmp_path)
    if train is None:
        (tmp_path / "train.csv").unlink()
    else:
        (tmp_path / "train.csv").write_text(train)
    said = failure(DATA / PROC, "--images", images, "--csv", tmp_path, "--out", tmp_path / "out")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_photographs_that_cannot_be_used_are_named(data, tmp_path):
    assert "images: put the 60,000 there, or say where with --images" in failure(data / PROC)
    images = photograph(tmp_path / "images", "a0.jpg")
    photograph(images / "more", "a0.jpg")
    write_csv(data / "miniImagenet", test={"a": ["a0.jpg"]})
    assert "more/a0.jpg have one name" in failure(data / PROC, "--images", images)
    shutil.rmtree(images / "more")
    (images / "a0.jpg").write_bytes(b"a page that says: not found")
    assert f"{images}/a0.jpg is damaged or not a PNG or JPEG" in failure(data / PROC, "--images", images)
    assert contents(data / "miniImagenet" / "test") == {}


IMAGENET = {part: MINIIMAGENET[part][0] for part in PARTS}  # one class of each part


def imagenet(root: Path, wnids: list[str], kind: str) -> Path:
    """A small ILSVRC 2012 training part: a folder of class folders or of class tars, or the tar of tars."""
    for i, wnid in enumerate(wnids):
        photograph(root / wnid, *(f"{wnid}_{number}.JPEG" for number in (100, 7, 9999, 10)), seed=i)
    if kind == "folders":
        return root
    for wnid in wnids:
        pack_tar(root / wnid, root / f"{wnid}.tar")
        shutil.rmtree(root / wnid)
    return root if kind == "tars" else pack_tar(root, root.parent / "ILSVRC2012_img_train.tar")


@pytest.mark.parametrize("kind", ["folders", "tars", "tar of tars"])
def test_miniimagenet_from_imagenet_takes_the_images_by_rank_in_their_class(tmp_path, call, kind):
    raw = imagenet(tmp_path / "raw", list(IMAGENET.values()), "folders")
    source = imagenet(tmp_path / "packed", list(IMAGENET.values()), kind)
    write_csv(tmp_path, **{part: {wnid: [f"{wnid}0000000{i}.jpg" for i in (2, 4)]} for part, wnid in IMAGENET.items()})
    said = call(proc_images, "--imagenet", source, "--csv", tmp_path, "--out", tmp_path / "out", "--lossless")
    assert "the csv files do not say how they number them\n" in said
    assert len(contents(tmp_path / "out")) == 6
    for part, wnid in IMAGENET.items():
        for rank, number in ((2, 10), (4, 9999)):
            with Image.open(tmp_path / "out" / part / wnid / f"{wnid}0000000{rank}.png") as saved:
                assert np.array_equal(saved, resized(raw / wnid / f"{wnid}_{number}.JPEG"))


def test_miniimagenet_from_imagenet_without_csv_takes_the_first_600(tmp_path, call, monkeypatch):
    monkeypatch.setattr(proc_images, "CLASS_SIZE", 3)
    source = imagenet(tmp_path / "raw", [*IMAGENET.values(), "n00000001"], "folders")
    said = call(proc_images, "--imagenet", source, "--out", tmp_path / "out", "--allow_missing")
    assert "3 images after the first 3 of their class are left out: the csv files choose others\n" in said
    names = {f"{part}/{wnid}/{wnid}0000000{i}.jpg" for part, wnid in IMAGENET.items() for i in (1, 2, 3)}
    assert set(contents(tmp_path / "out")) == names

    (source / IMAGENET["val"] / "cat.jpg").touch()
    with pytest.raises(SystemExit, match=f"cat.jpg has no name of ImageNet, {IMAGENET['val']}_<number>.JPEG"):
        call(proc_images, "--imagenet", source, "--out", tmp_path / "out", "--allow_missing")


PICKLERS = {
    "Python 2": ("Python 2, protocol 2", 1),
    "NumPy 1": ("Python 3, protocol 2", 1),
    "NumPy 2": ("Python 3, protocol 5", 2),
}


def mini_caches(folder: Path, how: str = "NumPy 2", **changes) -> dict[str, np.ndarray]:
    """mini-imagenet-cache-*.pkl of 4 images in each of all 100 classes, in turn; returns their pixels."""
    folder.mkdir()
    noise, pixels = np.random.default_rng(0), {}
    for part in PARTS:
        labels = MINIIMAGENET[part]
        pixels[part] = noise.integers(0, 256, (4 * len(labels), 84, 84, 3), np.uint8)
        indices = {label: list(range(i, len(pixels[part]), len(labels))) for i, label in enumerate(labels)}
        cache = {"image_data": pixels[part], "class_dict": indices} | changes
        (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickled(cache, *PICKLERS[how]))
    return pixels


@pytest.mark.parametrize("how", PICKLERS)
def test_miniimagenet_from_pickles_keeps_every_bit(tmp_path, call, how):
    pixels = mini_caches(tmp_path / "caches", how)
    said = call(proc_images, "--pickles", tmp_path / "caches", "--out", tmp_path / "out", "--allow_missing")
    assert f"val/{MINIIMAGENET['val'][0]}: 596 images missing\n" in said
    assert "test images: 80 found, 12,000 expected" in said
    for part in PARTS:
        for i, expected in enumerate(pixels[part]):
            label = MINIIMAGENET[part][i % len(MINIIMAGENET[part])]
            with Image.open(tmp_path / "out" / part / label / f"{i:05}.png") as saved:
                assert np.array_equal(saved, expected)


# ----------------------------------------------------------------------------------------- CIFAR-FS, FC100


FINE = sorted(name for part in PARTS for name in SPLITS["cifar_fs"][part])


def cifar(root: Path, how: str = "NumPy 2", **changes) -> dict[str, np.ndarray]:
    """The official cifar-100-python/ below root: in its train 2 images a class, in its test one; returns them."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "file.txt~").touch()  # the published archive has it
    coarse = [f"superclass_{i}" for i in range(20)]
    (folder / "meta").write_bytes(pickled({"fine_label_names": FINE, "coarse_label_names": coarse}, *PICKLERS[how]))
    noise, found = np.random.default_rng(0), {}
    for part, count in (("train", 200), ("test", 100)):
        labels = [i % 100 for i in range(count)]
        data = noise.integers(0, 256, (count, 3072), np.uint8)
        names = [f"{FINE[label]}_{part}_s_{i:06}.png" for i, label in enumerate(labels)]
        batch = {"filenames": names, "batch_label": part, "fine_labels": labels, "coarse_labels": labels, "data": data}
        (folder / part).write_bytes(pickled(batch | changes, *PICKLERS[how]))
        for label, name, row in zip(labels, names, data, strict=True):
            # The publication: 1,024 red values row by row, then the green ones, then the blue.
            found[f"{FINE[label]}/{name}"] = np.stack(np.split(row, 3), axis=-1).reshape(32, 32, 3)
    return found


@pytest.mark.parametrize("how", PICKLERS)
def test_cifar_sets_from_the_official_archive_keep_every_bit(tmp_path, call, how):
    pixels = cifar(tmp_path / "raw", how)
    packed = pack_tar(tmp_path / "raw", tmp_path / "cifar-100-python.tar.gz")
    for script, sizes in ((cifar_fs, (64, 16, 20)), (fc100, (60, 20, 20))):
        out = tmp_path / script.__name__
        with pytest.raises(SystemExit, match="100 classes are not whole"):
            call(script, "--archive", packed, "--out", out)
        assert not out.exists()
        said = call(script, "--archive", packed, "--out", out, "--allow_missing")
        assert "train/orchid: 597 images missing\n" in said
        for part, size in zip(PARTS, sizes, strict=True):
            assert f"{part} classes: {size} found, {size} expected\n" in said
            assert f"{part} images: {3 * size} found, {600 * size:,} expected  <- not" in said
            assert visible(out / part) == set(SPLITS[script.__name__][part])
        for path in out.glob("*/*/*.png"):
            with Image.open(path) as image:
                assert np.array_equal(image, pixels.pop("/".join(path.parts[-2:])))
        assert not pixels
        pixels = {f"{path.parent.name}/{path.name}": np.array(Image.open(path)) for path in out.glob("*/*/*.png")}


@pytest.mark.parametrize("kind", ["zip", "folder", "two zips"])
def test_cifar_from_bertinettos_layout_is_the_same(tmp_path, call, kind):
    pixels = cifar(tmp_path / "official")
    call(cifar_fs, "--archive", tmp_path / "official", "--out", tmp_path / "out", "--allow_missing")
    for name, image in pixels.items():
        (tmp_path / "raw" / "cifar100" / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "raw" / "cifar100" / "data" / name)
    sources = [tmp_path / "raw"]
    if kind == "two zips":
        (tmp_path / "more").mkdir()
        (tmp_path / "raw" / "cifar100" / "data" / "otter").rename(tmp_path / "more" / "otter")
        sources.append(tmp_path / "more")
    if kind != "folder":
        sources = [pack(source, source.with_suffix(".zip")) for source in sources]
    said = call(cifar_fs, "--archive", *sources, "--out", tmp_path / "out_2", "--allow_missing")
    assert "100 classes, 0 of them finished before\n" in said
    assert contents(tmp_path / "out_2") == contents(tmp_path / "out")

    shutil.rmtree(tmp_path / "out_2" / "test" / "bed")
    said = call(cifar_fs, "--archive", *sources, "--out", tmp_path / "out_2", "--allow_missing")
    assert "100 classes, 99 of them finished before\n" in said
    assert contents(tmp_path / "out_2") == contents(tmp_path / "out")


def test_real_cifar(shared, tmp_path, call):
    folder = shared / "data" / "cifar_fs"
    parts = [folder / f"cifar100_meta_{part}.zip" for part in ("train_100_per_class", "val", "test")]
    images = archive.cifar100(parts)
    whole = {*SPLITS["cifar_fs"]["val"], *SPLITS["cifar_fs"]["test"]}
    assert {label: len(found) for label, found in images.items()} == {n: 600 if n in whole else 100 for n in FINE}

    said = call(cifar_fs, "--archive", parts[1], "--out", tmp_path, "--allow_missing")
    assert "val images: 9,600 found, 9,600 expected\n" in said
    with zipfile.ZipFile(parts[1]) as packed:
        for path in tmp_path.glob("val/*/*7.png"):
            with Image.open(path) as saved, packed.open(f"cifar100/data/{path.parent.name}/{path.name}") as raw:
                assert (saved.size, saved.mode) == ((32, 32), "RGB")
                assert np.array_equal(saved, Image.open(raw))


# ----------------------------------------------------------------------------------- CUB, tieredImageNet


BIRDS = sorted(name for part in PARTS for name in SPLITS["cub"][part])


def birds(root: Path, *classes: str) -> Path:
    """CUB-200-2011 as published, with two photographs a class, the second grey."""
    for i, label in enumerate(classes or BIRDS):
        folder = root / "CUB_200_2011" / "images" / label
        photograph(folder, f"{label[4:]}_0001_1.jpg", seed=i)
        photograph(folder, f"{label[4:]}_0002_2.jpg", seed=i, mode="L")
    (root / "CUB_200_2011" / "images.txt").write_text("1 of the files beside the images\n")
    (root / "attributes.txt").touch()
    return root


def test_cub_from_its_archive(tmp_path, call, monkeypatch):
    raw = birds(tmp_path / "raw")
    # As in the published archive, the classes are not in order of their names.
    packed = pack_tar(raw, tmp_path / "CUB.tgz", order=lambda path: hashlib.md5(path.parent.name.encode()).digest())
    rewinds = []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: rewinds.append(1) or rewind(self))

    said = call(cub, "--archive", packed, "--out", tmp_path / "out", "--allow_missing")

    assert len(rewinds) == 1  # it is read twice from end to end, not once a class
    assert "train classes: 100 found, 100 expected\n" in said
    assert "images: 400 found, 11,788 expected  <- not the published number\n" in said
    for i, label in enumerate(BIRDS):
        part = "train" if i % 2 == 0 else "val" if i % 4 == 1 else "test"
        for path in (raw / "CUB_200_2011" / "images" / label).iterdir():
            with Image.open(tmp_path / "out" / part / label / f"{path.stem}.png") as saved:
                assert np.array_equal(saved, resized(path))
    assert len(contents(tmp_path / "out")) == 400


def test_photographs_that_are_missing_end_with_an_error(tmp_path, call, capsys):
    """How many a class has is known at the end alone."""
    raw = birds(tmp_path / "raw")
    with pytest.raises(SystemExit, match="images of the published ones are missing: add them, or go on with --allow_m"):
        call(cub, "--archive", raw, "--out", tmp_path / "out")
    assert "images: 400 found, 11,788 expected  <- not the published number\n" in capsys.readouterr().out
    assert len(contents(tmp_path / "out")) == 400
    call(cub, "--archive", raw, "--out", tmp_path / "out", "--allow_missing")


def test_a_refusal_does_not_unpack_the_archive_for_each_file(tmp_path, call, monkeypatch):
    """A packed archive can only be read forwards; squares of an earlier run are in the way of whole photographs."""
    packed = pack_tar(birds(tmp_path / "raw"), tmp_path / "CUB.tgz")
    flags = "--archive", packed, "--out", tmp_path / "out", "--allow_missing"
    call(cub, *flags)
    rewinds, rewind = [], gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: rewinds.append(1) or rewind(self))
    with pytest.raises(SystemExit, match="out"):
        call(cub, *flags, "--short_side=128")
    assert not rewinds


@pytest.mark.parametrize("twin", ["a0.jpeg", "more/a0.jpg"])
def test_photographs_of_one_name(tmp_path, twin):
    """They would become one .png."""
    for name in ("a0.jpg", "a1.jpg", twin):
        photograph((tmp_path / name).parent, Path(name).name, seed=0)
    with pytest.raises(SystemExit, match=r"a0\.jpe?g and .*a0\.jpe?g have one name: leave only one of them in"):
        archive.photographs(tmp_path)


def test_what_the_pickles_of_miniimagenet_are_given_as(tmp_path, call, capsys):
    (tmp_path / "mini-imagenet.tar.gz").touch()
    with pytest.raises(
        SystemExit, match=r"mini-imagenet\.tar\.gz is no folder: unpack the pickles, and name the folder"
    ):
        call(proc_images, "--pickles", tmp_path / "mini-imagenet.tar.gz")
    with pytest.raises(SystemExit):
        call(proc_images, "--pickles", tmp_path, "--csv", tmp_path)
    assert "the pickles say their classes themselves: leave --csv out" in capsys.readouterr().err


def test_cub_without_some_birds_is_told_before_anything_is_written(tmp_path, call):
    raw = birds(tmp_path / "raw", *BIRDS[:198])
    with pytest.raises(SystemExit, match="2 classes are not whole"):
        call(cub, "--archive", raw, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = call(cub, "--archive", raw, "--out", tmp_path / "out", "--allow_missing")
    assert f"test/{BIRDS[199]}: no images\n" in said
    assert "198 classes, 0 of them finished before\n" in said


TIERED = {part: SPLITS["tiered_imagenet"][part][5] for part in PARTS}


@pytest.mark.parametrize("kind", ["folders", "tars", "tar of tars"])
def test_tiered_imagenet_from_imagenet(tmp_path, call, kind):
    raw = imagenet(tmp_path / "raw", list(TIERED.values()), "folders")
    source = imagenet(tmp_path / "packed", [*TIERED.values(), "n00000001"], kind)
    flags = ("--archive", source, "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="605 classes are not whole"):
        call(tiered_imagenet, *flags)
    assert not (tmp_path / "out").exists()

    said = call(tiered_imagenet, *flags, "--allow_missing")
    assert f"train/{SPLITS['tiered_imagenet']['train'][0]}: no images\n" in said
    assert "train images: 4 found, 448,695 expected" in said
    assert len(contents(tmp_path / "out")) == 12
    for part, wnid in TIERED.items():
        for path in (raw / wnid).iterdir():
            with Image.open(tmp_path / "out" / part / wnid / f"{path.stem}.png") as saved:
                assert np.array_equal(saved, resized(path))
    (tmp_path / "out" / "val" / TIERED["val"] / f"{TIERED['val']}_7.png").unlink()
    assert "3 classes, 2 of them finished before\n" in call(tiered_imagenet, *flags, "--allow_missing")
    assert len(contents(tmp_path / "out")) == 12


def test_a_class_of_imagenet_without_images_is_told(tmp_path, call):
    (tmp_path / "raw" / TIERED["train"]).mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"{TIERED['train']} has no .JPEG images"):
        call(tiered_imagenet, "--archive", tmp_path / "raw", "--out", tmp_path / "out", "--allow_missing")
    with pytest.raises(SystemExit, match="raw has no classes of ImageNet"):
        (tmp_path / "raw" / TIERED["train"]).rename(tmp_path / "raw" / "birds")
        call(tiered_imagenet, "--archive", tmp_path / "raw", "--out", tmp_path / "out", "--allow_missing")


# ---------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server():
    """A web server on this machine; server.reply(request) is what it does with a GET."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.reply(self)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def sends(body: bytes, declared: int | None = None, status: int = 200):
    """A reply of these bytes that declares so many, or as many as there are."""

    def reply(request):
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if declared is None else declared))
        request.end_headers()
        request.wfile.write(body)

    return reply


def test_download_and_what_goes_wrong_with_it(tmp_path, call, server, monkeypatch):
    cifar(tmp_path / "raw")
    whole = pack_tar(tmp_path / "raw", tmp_path / "packed.tar.gz").read_bytes()
    url = f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz"
    monkeypatch.setattr(archive, "CIFAR_100", archive.Published(url, hashlib.md5(whole).hexdigest()))
    out = tmp_path / "out"
    for reply, message in (
        (sends(whole[:1000], declared=len(whole)), "was not fetched .*1000 bytes read"),
        (sends(whole[:1000]), "has the MD5 sum .*, not the published .*: try again later"),
        (sends(b"no such page", status=404), "was not fetched .*404"),
    ):
        server.reply = reply
        with pytest.raises(SystemExit, match=f"{url} {message}"):
            call(cifar_fs, "--download", "--out", out)
        assert contents(tmp_path).keys() & {"out"}  # an empty folder

    server.reply = sends(whole)
    said = call(cifar_fs, "--download", "--out", out, "--allow_missing")
    assert "100 classes, 0 of them finished before\n" in said
    assert visible(out) == {"train", "val", "test", "cifar-100-python.tar.gz"}
    assert (out / "cifar-100-python.tar.gz").read_bytes() == whole

    server.reply = sends(b"gone", status=404)  # not asked again for what is there whole
    assert "100 of them finished before\n" in call(cifar_fs, "--download", "--out", out, "--allow_missing")
    (out / "cifar-100-python.tar.gz").write_bytes(whole[:1000])
    with pytest.raises(SystemExit, match="was not fetched"):
        call(cifar_fs, "--download", "--out", out, "--allow_missing")


def test_a_killed_download_leaves_nothing_under_its_name_and_runs_again(tmp_path, server):
    whole, killed = random.Random(0).randbytes(3 * 2**20), threading.Event()

    def stalls(request):
        sends(whole[: 2 * 2**20], declared=len(whole))(request)
        killed.wait()

    server.reply = stalls
    published = archive.Published(f"http://127.0.0.1:{server.server_port}/images.zip", hashlib.md5(whole).hexdigest())
    fetch = f"import sys, archive, pathlib; archive.download(archive.{published!r}, pathlib.Path(sys.argv[1]))"
    child = subprocess.Popen([sys.executable, "-c", fetch, tmp_path], cwd=DATA)
    while not (found := list(tmp_path.iterdir())) or not found[0].stat().st_size:
        time.sleep(0.01)
    child.kill()
    child.wait()
    killed.set()
    assert not (tmp_path / "images.zip").exists()

    server.reply = sends(whole)
    assert archive.download(published, tmp_path).read_bytes() == whole
    assert contents(tmp_path).keys() == {"images.zip"}


def test_omniglot_downloads_both_its_archives(tmp_path, call, server, monkeypatch):
    packed = {
        f"/images_{part}.zip": pack(
            draw(tmp_path / part, f"images_{part}/{name}"), tmp_path / f"{part}.zip"
        ).read_bytes()
        for part, name in (("background", "Greek"), ("evaluation", "Oriya"))
    }
    server.reply = lambda request: sends(packed[request.path])(request)
    address = f"http://127.0.0.1:{server.server_port}"
    published = [archive.Published(address + path, hashlib.md5(body).hexdigest()) for path, body in packed.items()]
    monkeypatch.setattr(resize_images, "PUBLISHED", published)
    assert "alphabets: 2 found" in call(resize_images, "--download", "--out", tmp_path / "out")
    assert visible(tmp_path / "out") == {"Greek", "Oriya", "images_background.zip", "images_evaluation.zip"}


# --------------------------------------------------------------------------- what lies where is to be written


def touch(root: Path, *names: str) -> None:
    """Files of the user's own, none of them an image that a script could have made."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".jpg")):
            Image.effect_noise((500, 400), 50).convert("RGB").save(root / name)
        else:
            (root / name).write_text(name)


def refused(prepare, *folders: Path) -> str:
    """What a script says that refuses to begin, and changes nothing below the folders."""
    before = [contents(folder) for folder in folders]
    with pytest.raises(SystemExit) as said:
        prepare()
    assert [contents(folder) for folder in folders] == before
    return str(said.value)


@pytest.mark.parametrize("from_archive", [True, False])
@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (["Holiday/Paris/a.png", "Holiday/letter.txt", "Holiday/raw/1.cr2", "Holiday/film.mp4"], "Holiday has 4 other"),
        (["Greek/notes.txt"], "Greek has 1 other files, notes.txt the first"),
        (["Greek/character01/0003_01.png"], "Greek has 1 other files, character01/0003_01.png"),
        (["images_background/Latin/notes.txt"], "images_background/Latin has 1 other files, notes.txt"),
        (["images_evaluation/Holiday/Paris/a.png"], "images_evaluation/Holiday has 1 other"),
    ],
)
def test_omniglot_touches_nothing_of_the_users(tmp_path, from_archive, theirs, named):
    out = draw(draw(tmp_path / "out", "Greek", "Oriya") / "images_background", "Latin").parent
    touch(out, *theirs)
    packed = pack(draw(tmp_path / "raw", "images_background/Greek"), tmp_path / "small1.zip")
    sources = [packed] if from_archive else []
    assert named in refused(lambda: resize_images.prepare(sources, out), out)


@pytest.mark.parametrize("from_archive", [True, False])
def test_omniglot_leaves_alone_what_is_not_in_its_way(tmp_path, from_archive):
    out = draw(tmp_path / "out", "Greek")
    resize_images.prepare([], out)
    touch(out, "images_backup/Greek/notes.txt", "Greek/notes.txt", "letter.txt", "raw/1.cr2", "photo.png")
    draw(out / "images_backup", "Latin")
    before = contents(out)
    packed = pack(draw(tmp_path / "raw", "Oriya"), tmp_path / "small1.zip")
    resize_images.prepare([packed] if from_archive else [], out)
    after = contents(out)
    assert {name: after.get(name) for name in before} == before
    assert len(after) == len(before) + 4 * from_archive


def change(how: str, drawing: Path) -> None:
    """Makes of a raw copy something that no copy of Omniglot has."""
    with Image.open(drawing) as image:
        image.load()
    match how:
        case "grey":
            image.convert("L").save(drawing)
        case "of another size":
            image.resize((106, 105)).save(drawing)
        case "a JPEG":
            image.convert("L").save(drawing, "JPEG")
        case "of another name":
            drawing.rename(drawing.with_name("1.png"))
        case "a linked folder":
            drawing.parent.with_name("character09").symlink_to(drawing.parent)
        case "a named pipe":
            os.mkfifo(drawing.parent / "pipe")


@pytest.mark.parametrize(
    "how", ["grey", "of another size", "a JPEG", "of another name", "a linked folder", "a named pipe"]
)
def test_copies_that_do_not_look_like_omniglot_are_refused(tmp_path, how):
    out = draw(tmp_path / "out", "Greek", "Latin")
    change(how, out / "Latin" / "character02" / "0001_01.png")
    assert "Latin has 1 other files, character0" in refused(lambda: resize_images.prepare([], out), out)


def test_a_source_inside_the_folder_is_no_copy(tmp_path):
    out = tmp_path / "out"
    raw = draw(out / "images_background", "Greek")
    before = contents(raw)
    resize_images.prepare([raw], out)
    assert contents(raw) == before
    assert len(contents(out / "Greek")) == len(before)
    said = refused(lambda: resize_images.prepare([out], raw), raw)  # the other way round: over the source itself
    assert "Greek has 4 other files" in said


def test_copies_by_other_names_must_be_those_of_the_archive(tmp_path):
    for name in ("1.png", "2.png"):
        touch(tmp_path / "raw", f"Greek/alpha/{name}")
    packed = pack(tmp_path / "raw", tmp_path / "own.zip")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "raw", out)
    (out / "Greek" / "alpha" / "2.png").unlink()
    resize_images.prepare([packed], out)
    finished = contents(out)
    assert finished.keys() == {"Greek/alpha/1.png", "Greek/alpha/2.png"}

    (out / "Greek" / "alpha" / "2.png").unlink()  # then what is finished is not made again
    Image.effect_noise((28, 28), 50).save(out / "Greek" / "alpha" / "1.png", compress_level=0)
    kept = contents(out)["Greek/alpha/1.png"]
    resize_images.prepare([packed], out)
    assert contents(out)["Greek/alpha/1.png"] == kept
    assert contents(out)["Greek/alpha/2.png"] == finished["Greek/alpha/2.png"]

    touch(out, "Greek/alpha/1.png")
    assert "Greek has 1 other files, alpha/1.png" in refused(lambda: resize_images.prepare([packed], out), out)


def two_classes(root: Path) -> Path:
    """MiniImagenet's photographs and csv files below root, of two classes of two images."""
    photograph(root / "images", "a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg")
    write_csv(root, train={"a": ["a0.jpg", "a1.jpg"]}, test={"b": ["b0.jpg", "b1.jpg"]})
    return root / "images"


@pytest.mark.parametrize("theirs", ["b0.jpg", "b0.png", "b0.txt", "mine.jpg", "deeper/b0.jpg"])
def test_a_photograph_of_the_users_own_is_refused_before_any_work(tmp_path, theirs):
    images, out = two_classes(tmp_path), tmp_path / "out"
    touch(out / "test" / "b", theirs)
    said = refused(lambda: prepare_photographs(images, tmp_path, out, ".jpg"), out)
    assert f"test/b has 1 other files, {theirs} the first: move that folder away, or give another --out" in said


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_copies_of_what_is_given_and_what_was_made_of_it_are_replaced(tmp_path, suffix):
    images, out = two_classes(tmp_path), tmp_path / "out"
    prepare_photographs(images, tmp_path, tmp_path / "right", suffix)
    for other in (".jpg", ".png"):
        prepare_photographs(images, tmp_path, out, other)
        (out / "train" / "a" / f"a1{other}").unlink()
        shutil.copy(images / "a1.jpg", out / "train" / "a")
        prepare_photographs(images, tmp_path, out, suffix)
        assert contents(out) == contents(tmp_path / "right")


def test_the_only_photographs_there_are_stay(tmp_path):
    two_classes(tmp_path)
    images = photograph(tmp_path / "out" / "train" / "a", "a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg")
    said = refused(lambda: prepare_photographs(images, tmp_path, tmp_path / "out", ".jpg"), tmp_path / "out")
    assert "train/a has 4 other files, a0.jpg the first" in said


def test_an_image_of_the_right_size_stays_as_it_is(tmp_path):
    images, out = two_classes(tmp_path), tmp_path / "out"
    (out / "train" / "a").mkdir(parents=True)
    Image.effect_noise((84, 84), 50).convert("RGB").save(out / "train" / "a" / "a1.jpg")
    before = (out / "train" / "a" / "a1.jpg").read_bytes()
    prepare_photographs(images, tmp_path, out, ".jpg")
    assert visible(out / "train" / "a") == {"a0.jpg", "a1.jpg"}
    assert (out / "train" / "a" / "a1.jpg").read_bytes() == before
    for theirs in (before, before[: len(before) // 2]):  # of another photograph, and with no more than a header
        (out / "train" / "a" / "a1.jpg").write_bytes(theirs)
        said = refused(lambda: prepare_photographs(images, tmp_path, out, ".png"), out)
        assert "train/a has 1 other files, a1.jpg the first" in said


@pytest.mark.parametrize("body", ["link", "file", "pipe"])
def test_a_class_folder_that_is_none_is_refused_before_any_work(tmp_path, body):
    images, out = two_classes(tmp_path), tmp_path / "out"
    (out / "test").mkdir(parents=True)
    match body:
        case "link":
            (out / "test" / "b").symlink_to(images)
        case "file":
            (out / "test" / "b").touch()
        case "pipe":
            os.mkfifo(out / "test" / "b")
    said = refused(lambda: prepare_photographs(images, tmp_path, out, ".jpg"), out)
    assert "test/b is a link or a file where a folder of images is to be: move it away" in said


def test_a_download_replaces_its_own_cut_off_file_and_no_other(tmp_path, server):
    whole = random.Random(0).randbytes(3 * 2**20)
    server.reply = sends(whole)
    published = archive.Published(f"http://127.0.0.1:{server.server_port}/images.zip", hashlib.md5(whole).hexdigest())
    place = tmp_path / "images.zip"
    for theirs in (b"mine", whole[: 2**20] + b"mine", whole + b"mine"):
        place.write_bytes(theirs)
        said = refused(lambda: archive.download(published, tmp_path), tmp_path)
        assert f"{place} is another file than {published.url}: move it away" in said
    for cut_off in (b"", whole[:1000], whole[: 2**21]):
        place.write_bytes(cut_off)
        assert archive.download(published, tmp_path).read_bytes() == whole
    assert visible(tmp_path) == {"images.zip"}


def test_what_killed_scripts_have_left_goes_at_the_next_start(tmp_path):
    images, out = two_classes(tmp_path), tmp_path / "out"
    packed = pack(draw(tmp_path / "raw", "Greek"), tmp_path / "packed.zip")
    for prepare, left in (
        (lambda: prepare_photographs(images, tmp_path, out, ".jpg"), (".CUB.tgz", "train/.a", "test/.gone")),
        (lambda: resize_images.prepare([packed], out), (".images_background.zip", ".Greek", ".Latin")),
    ):
        for name in left:
            place = out / f"{name}.being-written"
            touch(place, "1.jpg") if "." not in name[1:] or "/" in name else touch(place.parent, place.name)
        (out / ".link.being-written").symlink_to(images)
        prepare()
        assert not [name for name in contents(out) if "being" in name]
        assert len(contents(images)) == 4


@pytest.fixture
def held(tmp_path):
    """A folder that another process works in, as far as its lock tells."""
    with folders.locked(tmp_path / "out"):
        yield tmp_path / "out"


def test_a_second_script_in_one_folder_says_so_in_one_line(tmp_path, held, server):
    images = two_classes(tmp_path)
    raw = draw(tmp_path / "raw", "Greek")
    (held / ".Greek.being-written").mkdir()
    before = contents(held)
    for script, *flags in ((RESIZE, raw), (PROC, "--images", images, "--csv", tmp_path)):
        assert failure(DATA / script, *flags, "--out", held) == (
            f"error: {held} is in use, another data script writes into it: wait for that one, or give another --out\n"
        )
    with pytest.raises(SystemExit, match="is in use"):
        archive.download(archive.Published(f"http://127.0.0.1:{server.server_port}/x.zip", ""), held)
    assert contents(held) == before


def test_the_lock_ends_with_the_work_and_is_not_needed(tmp_path, monkeypatch, capsys):
    out = draw(tmp_path / "out", "Greek")
    (out / "Greek" / "notes.txt").touch()
    with pytest.raises(SystemExit, match="notes"):
        resize_images.prepare([], out)
    (out / "Greek" / "notes.txt").unlink()

    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", refuses)
    resize_images.prepare([], out)
    assert f"{out} cannot be locked (No locks available): see that no other" in capsys.readouterr().out
    monkeypatch.setattr(folders, "fcntl", None)  # as on Windows
    resize_images.prepare([pack(draw(tmp_path / "raw", "Latin"), tmp_path / "raw.zip")], out)
    assert visible(out) == {"Greek", "Latin"}


def test_images_that_are_gone_at_the_end_are_an_error(tmp_path, monkeypatch):
    images, out = two_classes(tmp_path), tmp_path / "out"
    raw = draw(tmp_path / "raw", "Greek", "Latin")
    moved_in = folders.moved_in

    @contextlib.contextmanager
    def spoiled(place: Path):
        with moved_in(place) as folder:
            yield folder
        if place.name in ("a", "Greek"):
            next(place.rglob("*.*")).unlink()

    monkeypatch.setattr(archive, "moved_in", spoiled)
    monkeypatch.setattr(folders, "moved_in", spoiled)
    for prepare, name in (
        (lambda: prepare_photographs(images, tmp_path, out, ".jpg"), "train/a"),
        (lambda: resize_images.prepare([raw], out), "Greek"),
    ):
        with pytest.raises(SystemExit, match=f"{out}/{name} has lost images while others were written"):
            prepare()
    monkeypatch.undo()
    resize_images.prepare([raw], out)
    prepare_photographs(images, tmp_path, out, ".jpg")


def test_that_the_input_is_short_is_said(tmp_path, call, monkeypatch):
    raw = draw(tmp_path / "raw", "Greek")
    said = call(resize_images, raw, "--out", tmp_path / "out")
    assert said.endswith("all that was given is there; what is published has more\n")
    monkeypatch.setattr(resize_images, "EXPECTED", {"alphabets": 1, "characters": 2, "images": 4})
    assert "what is published has more" not in call(resize_images, raw, "--out", tmp_path / "out")


@pytest.mark.parametrize("script", [resize_images, proc_images, cifar_fs, fc100, cub, tiered_imagenet])
def test_help_says_what_is_replaced(call, capsys, script):
    with pytest.raises(SystemExit):
        call(script, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "bit for bit" in said


@pytest.mark.parametrize("side", ["0", "-1", "10001", "wide"])
def test_a_short_side_that_is_none_is_told(call, capsys, side):
    with pytest.raises(SystemExit):
        call(cub, "--archive=x", f"--short_side={side}")
    assert f"--short_side: {side} must be 1 or more pixels, and at most 10,000" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ killed and run again


# Forks, for n = 1, 2, ..., a child that works on a fresh copy of the input and is killed just before its n-th
# change of the disk, then one that runs to the end, and must leave what an uninterrupted run leaves.
KILL_AT_EVERY_STEP = """
import itertools, os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_data_scripts import archive, contents, proc_images, resize_images
start, work = Path(sys.argv[3]), Path(sys.argv[4])
main, sys.argv = (proc_images if "--images" in sys.argv else resize_images).main, sys.argv[4:]
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def run(kill_at):
    shutil.copytree(start, work) if not work.exists() else None
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    steps = itertools.count(1)
    def watch(event, args):
        writes = event == "open" and isinstance(args[0], (str, Path)) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout = open(os.devnull, "w")
    sys.addaudithook(watch)
    archive.run(main)
    os._exit(0)

assert run(0) == 0
uninterrupted = contents(work)
for kill_at in itertools.count(1):
    shutil.rmtree(work)
    if run(kill_at) == 0:
        break
    assert run(0) == 0, f"killed at step {kill_at}, it cannot be run again"
    assert contents(work) == uninterrupted, f"killed at step {kill_at}, another result"
print(kill_at - 1)
"""


def assert_survives_kills(start: Path, work: Path, *flags: str | Path) -> None:
    paths = (DATA.parent, Path(__file__).parent, start, work)
    done = run("-c", KILL_AT_EVERY_STEP, *paths, *flags)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10  # else the watch has missed what the script did


def test_omniglot_killed_at_every_step_and_run_again(tmp_path):
    start = draw(tmp_path / "start", "Greek", "N_Ko")
    draw(start / "images_background", "Greek", "Latin", drawings=3)
    assert_survives_kills(start, tmp_path / "work", "--out", tmp_path / "work")


def test_omniglot_from_an_archive_over_raw_copies_killed_at_every_step(tmp_path):
    start = draw(tmp_path / "start", "Greek", drawings=3)
    raw = draw(tmp_path / "raw", "images_background/Greek", "images_background/Latin")
    packed = pack(raw, tmp_path / "packed.zip")
    assert_survives_kills(start, tmp_path / "work", packed, "--out", tmp_path / "work")


def test_miniimagenet_killed_at_every_step_and_run_again(tmp_path):
    names = ["a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg"]
    start = photograph(tmp_path / "start" / "images", *names).parent
    write_csv(start, train={"a": names[:2]}, test={"b": names[2:]})
    (start / "train" / "a").mkdir(parents=True)
    shutil.copy(start / "images" / "a0.jpg", start / "train" / "a")  # not of the right size, to be replaced
    work = tmp_path / "work"
    assert_survives_kills(start, work, "--images", work / "images", "--csv", work, "--out", work)


# ------------------------------------------------------------------------------------------ archives, errors


def hostile(folder: Path, name: str, method: int = zipfile.ZIP_STORED, mode: int = stat.S_IFREG) -> Path:
    """An archive of one good drawing and one member that is not to be trusted."""
    path = pack(draw(folder / "raw", "Greek"), folder / "hostile.zip")
    shutil.rmtree(folder / "raw")
    with zipfile.ZipFile(path, "a", method) as packed:
        member = zipfile.ZipInfo("placeholder")
        member.filename, member.external_attr, member.compress_type = name, mode << 16, method
        packed.writestr(member, b"/etc")
    return path


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"name": "../evil/character01/1.png"}, "leads out of the archive"),
        ({"name": "Greek/../../../evil.png"}, "leads out of the archive"),
        ({"name": "Greek\\..\\..\\evil.png"}, "leads out of the archive"),
        ({"name": "/tmp/evil/character01/1.png"}, "is an absolute path"),
        ({"name": "\\\\host\\evil\\1.png"}, "is an absolute path"),
        ({"name": "C:\\evil\\character01\\1.png"}, "is an absolute path"),
        ({"name": "Greek/character01", "mode": stat.S_IFLNK}, "is not a plain file or folder"),
        ({"name": "Greek/character01/1.png", "mode": stat.S_IFIFO}, "is not a plain file or folder"),
        ({"name": "Greek/character01/1.png", "method": zipfile.ZIP_BZIP2}, "is packed by another method"),
    ],
)
def test_a_hostile_archive_is_refused_whole(tmp_path, member, message):
    path = hostile(tmp_path, **member)
    for prepare in (
        lambda: resize_images.prepare([path], tmp_path / "out"),
        lambda: prepare_photographs(path, None, tmp_path / "out", ".jpg"),
    ):
        with pytest.raises(SystemExit, match=f"hostile.zip is refused: .* {message}"):
            prepare()
    assert visible(tmp_path) == {"hostile.zip"}


def test_an_archive_that_declares_too_much_is_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("Greek/character01/1.png", bytes(archive.PHOTOGRAPHS.file + 1))
    assert path.stat().st_size < 100_000
    with pytest.raises(SystemExit, match=r"1.png' has 33,554,433 bytes unpacked, limit 33,554,432"):
        resize_images.prepare([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()

    path = pack(draw(tmp_path / "raw", "Greek"), tmp_path / "many.zip")
    with pytest.raises(SystemExit, match=r"many.zip is refused: .* bytes unpacked, limit 400"):
        archive.files(path, archive.Limits(file=400, total=400))


def test_an_archive_cut_short_anywhere_is_refused(tmp_path):
    whole = pack(draw(tmp_path / "raw", "Greek"), tmp_path / "whole.zip").read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(SystemExit, match=r"cut.zip is not a whole zip archive \(.*\): fetch it again"):
            resize_images.prepare([cut], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"name": "CUB_200_2011/images/../../../evil.jpg"}, "is refused: .* leads out of the archive"),
        ({"name": "/tmp/evil.jpg"}, "is refused: .* is an absolute path"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is refused: .* is not a plain file or folder"),
        ({"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}, "is refused: .* is not a plain file or folder"),
        ({"type": tarfile.FIFOTYPE}, "is refused: .* is not a plain file or folder"),
        ({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "is refused: .* is not a plain file or folder"),
        ({"type": tarfile.GNUTYPE_SPARSE, "size": 512}, "is refused: .* is not a plain file or folder"),
        ({"size": 2**25 + 1}, "is refused: .* has 33,554,433 bytes unpacked, limit 33,554,432"),
        ({"size": -512}, "is refused: .* has -512 bytes unpacked"),
        ({"type": tarfile.XHDTYPE, "size": 2**40}, r"is not a whole .* \(a header declares 1,099,511,627,776 bytes\)"),
        ({"type": tarfile.GNUTYPE_LONGNAME, "size": -512}, r"is not a whole .* \(a header declares -512 bytes\)"),
    ],
)
@pytest.mark.parametrize("name", ["hostile.tar", "hostile.tgz"])
def test_a_hostile_tar_is_refused_whole(tmp_path, call, name, member, message):
    folder = "CUB_200_2011/images/001.Black_footed_Albatross"
    header = tarfile.TarInfo(f"{folder}/2.jpg")  # alone: what it declares need not be there
    for key, value in member.items():
        setattr(header, key, value)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(photograph(tmp_path / "raw", "1.jpg") / "1.jpg", f"{folder}/1.jpg")
        packed.write(header.tobuf(tarfile.GNU_FORMAT))
    shutil.rmtree(tmp_path / "raw")
    whole = packed.getvalue()
    (tmp_path / name).write_bytes(gzip.compress(whole) if name.endswith(".tgz") else whole)
    with pytest.raises(SystemExit, match=f"error: {tmp_path / name} {message}"):
        call(cub, "--archive", tmp_path / name, "--out", tmp_path / "out", "--allow_missing")
    assert visible(tmp_path) == {name}


def test_a_tar_that_declares_too_much_in_all_is_refused(tmp_path):
    path = pack_tar(birds(tmp_path / "raw", *BIRDS[:6]), tmp_path / "many.tgz")
    with pytest.raises(SystemExit, match=r"many\.tgz is refused: .* brings the archive to .* limit 9,000"):
        archive.files(path, archive.Limits(file=9000, total=9000))


@pytest.mark.parametrize("name", ["cut.tar", "cut.tgz"])
def test_a_tar_cut_short_anywhere_is_refused(tmp_path, name):
    whole = pack_tar(photograph(tmp_path / "raw", "1.jpg", "2.jpg"), tmp_path / f"whole{name[3:]}").read_bytes()
    cut = tmp_path / name
    end = len(whole.rstrip(b"\0")) if name == "cut.tar" else len(whole)  # a plain tar's end is zeros
    for length in {*range(0, end, 101), *range(0, end, 512), end - 1}:
        cut.write_bytes(whole[:length])
        with pytest.raises(SystemExit, match=rf"{name} is not a whole tar archive \(.*\): fetch it again"):
            archive.files(cut)


def test_damage_inside_a_packed_tar_is_found_before_anything_is_written(tmp_path, call):
    packed = pack_tar(birds(tmp_path / "raw"), tmp_path / "birds.tgz")
    shutil.rmtree(tmp_path / "raw")
    damaged = bytearray(packed.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    packed.write_bytes(damaged)
    with pytest.raises(SystemExit, match=r"birds\.tgz is not a whole tar archive"):
        call(cub, "--archive", packed, "--out", tmp_path / "out")
    assert visible(tmp_path) == {"birds.tgz"}


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("birds.tar.bz2", bz2.compress(b"birds"), "only a folder, .zip, .tar, .tar.gz or .tgz can be read"),
        ("birds.tgz", bz2.compress(b"birds"), "is not a whole tar archive"),
        ("birds.tgz", gzip.compress(b"birds", mtime=0), "is not a whole tar archive"),
        ("birds.tgz", b"<html>please log in</html>", "is not a whole tar archive"),
        ("birds.tgz", b"", "is not a whole tar archive"),
        ("birds.zip", gzip.compress(b"birds", mtime=0), "is not a whole zip archive"),
        ("birds.tar", bytes(10_240), "has no birds: images/001.Black_footed_Albatross/"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path, call, name, body, message):
    (tmp_path / name).write_bytes(body)
    for script in (cub, cifar_fs, tiered_imagenet):
        about = message if script is cub else message.partition("birds:")[0]  # an empty archive: has no ...
        with pytest.raises(SystemExit, match=f"{name}:? {about}"):
            call(script, "--archive", tmp_path / name, "--out", tmp_path / "out", "--allow_missing")
    assert visible(tmp_path) == {name}


class Evil:
    """A pickle of it names a function and calls it when it is read."""

    def __init__(self, function, *values):
        self.called = function, values

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, "touch evil"), "(posix|nt).system"),
        (Evil(eval, "open('evil', 'w')"), "(builtins|__builtin__).eval"),
        (Evil(getattr, "a", "upper"), "(builtins|__builtin__).getattr"),
        (Evil(np.fromfile, "/etc/passwd", np.uint8), "numpy.*fromfile"),
        (Evil(np.save, "evil.npy", [1]), "numpy.*save"),
    ],
)
def test_a_pickle_that_names_other_functions_is_refused(tmp_path, call, monkeypatch, evil, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for how in ("NumPy 1", "NumPy 2"):
        cifar(tmp_path / how / "cifar", how, data=evil)
        mini_caches(tmp_path / how / "caches", how, image_data=evil)
        for script, flag, source in ((fc100, "--archive", "cifar"), (proc_images, "--pickles", "caches")):
            with pytest.raises(SystemExit, match=rf"is not a pickle of plain values and arrays \(it names {name}\)"):
                call(script, flag, tmp_path / how / source, "--out", "out", "--allow_missing")
    assert visible(tmp_path / "here") == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filenames": ["../../evil.png"] * 100}, "ValueError: no bytes, or no names of .png files"),
        ({"filenames": ["/tmp/evil.png"] * 100}, "ValueError: no bytes, or no names"),
        ({"filenames": ["a\0.png"] * 100}, "ValueError: no bytes, or no names"),
        ({"filenames": ["a.png"]}, "ValueError: zip"),
        ({"filenames": 7}, "TypeError"),
        ({"fine_labels": [100] * 100}, "IndexError"),
        ({"data": np.zeros((100, 3072))}, "ValueError: no bytes"),
        ({"data": np.zeros((100, 3000), np.uint8)}, "ValueError: cannot reshape"),
        ({"data": [0]}, "AttributeError"),
    ],
)
def test_a_pickle_that_is_not_cifar_is_refused(tmp_path, call, change, message):
    cifar(tmp_path / "raw", **change)
    with pytest.raises(SystemExit, match=rf"cifar-100-python/train is not the official CIFAR-100 \({message}"):
        call(cifar_fs, "--archive", tmp_path / "raw", "--out", tmp_path / "out", "--allow_missing")
    assert visible(tmp_path) == {"raw"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_data": np.zeros((9, 84, 84), np.uint8)}, "has not the arrays .* image_data is uint8 \\(9, 84, 84\\)"),
        ({"image_data": np.zeros((9, 84, 84, 3), np.float32)}, "has not the arrays .* image_data is float32"),
        ({"class_dict": {"n01532829": [10**6]}}, "has not the arrays .*IndexError"),
        ({"class_dict": {"n01532829": ["../../evil"]}}, "has not the arrays .*ValueError"),
        ({"class_dict": {"../../evil": [0]}}, "none of the listed classes was found"),
        ({"class_dict": [0]}, "has not the arrays .*AttributeError"),
    ],
)
def test_a_pickle_that_is_not_miniimagenet_is_refused(tmp_path, call, change, message):
    mini_caches(tmp_path / "caches", **change)
    with pytest.raises(SystemExit, match=message):
        call(proc_images, "--pickles", tmp_path / "caches", "--out", tmp_path / "out", "--allow_missing")
    assert visible(tmp_path) == {"caches"}


def test_a_damaged_pickle_is_refused(tmp_path, call):
    cifar(tmp_path / "raw")
    part = tmp_path / "raw" / "cifar-100-python" / "train"
    whole = part.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:length])
        with pytest.raises(SystemExit, match=r"train is not a pickle of plain values and arrays \(.*fetch it again"):
            call(cifar_fs, "--archive", tmp_path / "raw", "--out", tmp_path / "out", "--allow_missing")
    with pytest.raises(SystemExit, match=r"mini-imagenet-cache-train.pkl is not a pickle .*No such file"):
        call(proc_images, "--pickles", tmp_path, "--out", tmp_path / "out", "--allow_missing")
    assert visible(tmp_path) == {"raw"}


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes that declares so many pixels."""
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + small.getvalue()[24:29]
    return small.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + small.getvalue()[33:]


@pytest.mark.parametrize("body", [b"", b"<html>", bomb(), b"GIF89a"])
def test_an_image_that_is_none_is_named_and_costs_only_its_class(tmp_path, call, body):
    for name in ("apple", "bed", "otter"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "raw" / name / "1.png")
    (tmp_path / "raw" / "otter" / "2.png").write_bytes(body)  # of val, between apple's train and bed's test
    for source in (tmp_path / "raw", pack(tmp_path / "raw", tmp_path / "raw.zip")):
        with pytest.raises(SystemExit, match=r"otter/2\.png is damaged or not a PNG or JPEG image"):
            call(cifar_fs, "--archive", source, "--out", tmp_path / "out", "--allow_missing")
        assert contents(tmp_path / "out").keys() == {"train/apple/1.png", "val"}


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (1, 80_000_000, "1 x 80,000,000 pixels"),
        (80_000_000, 1, "80,000,000 x 1 pixels"),
        (10_000, 10_000, "10,000 x 10,000 pixels|DecompressionBombWarning"),
        (60_000, 60_000, "DecompressionBombError"),
    ],
)
def test_an_image_small_on_disk_and_huge_in_memory_is_refused(tmp_path, call, width, height, said):
    raw = draw(tmp_path / "raw", "Greek")
    (raw / "Greek" / "character02" / "0001_01.png").write_bytes(bomb(width, height))
    for source in (raw, pack(raw, tmp_path / "raw.zip")):
        with pytest.raises(SystemExit, match=rf"0001_01\.png is damaged or not a PNG or JPEG image \(({said})\)"):
            call(resize_images, source, "--out", tmp_path / "out")
    for label in ("apple", "bed"):
        (tmp_path / "cifar" / label).mkdir(parents=True)
        (tmp_path / "cifar" / label / "1.png").write_bytes(bomb(width, height))
    with pytest.raises(SystemExit, match=rf"apple/1\.png is damaged or not a PNG or JPEG image \(({said})\)"):
        call(cifar_fs, "--archive", tmp_path / "cifar", "--out", tmp_path / "out_2", "--allow_missing")


def test_pillow_warns_of_nothing_by_itself(tmp_path):
    raw = draw(tmp_path / "raw", "Greek")
    (raw / "Greek" / "character02" / "0001_01.png").write_bytes(bomb(10_000, 10_000))
    assert "(10,000 x 10,000 pixels)" in failure(DATA / RESIZE, raw, "--out", tmp_path / "out")


def test_hostile_images_where_finished_ones_are_to_be(tmp_path):
    images, out = two_classes(tmp_path), tmp_path / "out"
    (out / "train" / "a").mkdir(parents=True)
    for body in (bomb(), b"", b"<html>"):
        (out / "train" / "a" / "a0.jpg").write_bytes(body)
        said = refused(lambda: prepare_photographs(images, tmp_path, out, ".jpg"), out)
        assert "train/a has 1 other files, a0.jpg the first" in said


def test_large_images_do_not_add_up_in_memory(tmp_path, monkeypatch):
    names = [f"a{i}.jpg" for i in range(40)]
    images = photograph(tmp_path / "images", *names)
    write_csv(tmp_path, train={"a": names})
    monkeypatch.setattr(archive, "LARGE", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    now, most = {"read": 0, "decoded": 0}, {"read": 0, "decoded": 0}
    read_bytes, load, save = archive.read_bytes, JpegImageFile.load, Image.Image.save

    def add(what: str, number: int) -> None:
        now[what] += number
        most[what] = max(most[what], now[what])

    def slow_load(image):
        add("decoded", 1)
        time.sleep(0.002)
        found = load(image)
        add("decoded", -1)
        return found

    monkeypatch.setattr(archive, "read_bytes", lambda file: add("read", 1) or read_bytes(file))
    monkeypatch.setattr(JpegImageFile, "load", slow_load)
    monkeypatch.setattr(Image.Image, "save", lambda *values: save(*values) or add("read", -1))
    prepare_photographs(images, tmp_path, tmp_path / "out", ".jpg")
    assert len(contents(tmp_path / "out")) == 40
    assert most["decoded"] == 1
    assert most["read"] < 20


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("more", "checksum_of", "said"),
    [
        (-4, "what is declared", "Bad CRC-32"),
        (-4, "all", "Bad CRC-32"),
        (-1, "all", "more than the 500 bytes declared"),
        (-(10**7), "what is declared", "Bad CRC-32"),
        (4, "all", "less than the 500 bytes declared"),
    ],
)
def test_a_zip_that_lies_about_a_size_is_an_error(tmp_path, method, more, checksum_of, said):
    drawing = next(draw(tmp_path / "raw", "Greek").rglob("*.png")).read_bytes()
    body = drawing + bytes(500 - len(drawing) - more)  # a PNG, whatever follows it
    packed = tmp_path / "lies.zip"
    with zipfile.ZipFile(packed, "w", method) as opened:
        opened.writestr("Greek/character01/0001_01.png", body)
        (member,) = opened.infolist()
        member.file_size = 500
        member.CRC = zlib.crc32(body if checksum_of == "all" else body[:500])
    with pytest.raises(SystemExit, match=rf"0001_01\.png is damaged or not a PNG or JPEG image \({said}"):
        resize_images.prepare([packed], tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_an_encrypted_zip_is_called_so(tmp_path):
    packed = pack(draw(tmp_path / "raw", "Greek"), tmp_path / "packed.zip", zipfile.ZIP_STORED)
    body = bytearray(packed.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # APPNOTE.TXT, 4.3.7 and 4.3.12
        at = -1
        while (at := body.find(mark, at + 1)) >= 0:
            body[at + flags] |= 1
    packed.write_bytes(body)
    with pytest.raises(SystemExit, match=r"packed\.zip is refused: .* is encrypted: unpack the archive"):
        resize_images.prepare([packed], tmp_path / "out")


@pytest.fixture
def at_once():
    """Fails a test that waits for a named pipe, or reads a device without end."""

    def late(*args):
        raise TimeoutError("it waits for what never comes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", ["a pipe", "a device", "a link to a pipe", "a link to a device"])
@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz", "x"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, call, at_once, what, name):
    odd = tmp_path / name
    match what:
        case "a pipe":
            os.mkfifo(odd)
        case "a device":
            odd = Path("/dev/zero")
        case "a link to a pipe":
            os.mkfifo(tmp_path / "pipe")
            odd.symlink_to(tmp_path / "pipe")
        case "a link to a device":
            odd.symlink_to("/dev/zero")
    out, refusal = tmp_path / "out", "is a device, a named pipe or the like: only a folder or an archive can be read"
    for script, *flags in ((resize_images, odd), (proc_images, "--images", odd), (proc_images, "--imagenet", odd)):
        with pytest.raises(SystemExit, match=f"{odd} {refusal}"):
            call(script, *flags, "--out", out)
    for script in (cifar_fs, cub, tiered_imagenet):
        with pytest.raises(SystemExit, match=f"{odd} {refusal}"):
            call(script, "--archive", odd, "--out", out)
    if what != "a device":
        os.rename(odd, tmp_path / "mini-imagenet-cache-train.pkl")
        with pytest.raises(SystemExit, match=r"train\.pkl is not a pickle .*not a regular file"):
            call(proc_images, "--pickles", tmp_path, "--out", out)
        os.rename(tmp_path / "mini-imagenet-cache-train.pkl", tmp_path / "images.zip")
        with pytest.raises(OSError, match=r"not a regular file.*images\.zip"):
            archive.download(archive.Published("http://127.0.0.1:9/images.zip", ""), tmp_path)
    assert not out.exists()


def test_odd_files_in_a_folder_of_images_are_passed_over(tmp_path, at_once):
    images, out = two_classes(tmp_path), tmp_path / "out"
    os.mkfifo(images / "c0.jpg")
    (images / "c1.jpg").symlink_to("/dev/zero")
    (images / "a0.jpg").rename(tmp_path / "elsewhere.jpg")
    (images / "a0.jpg").symlink_to(tmp_path / "elsewhere.jpg")  # as good as the photograph
    (images / "more").symlink_to(images)
    prepare_photographs(images, tmp_path, out, ".jpg")
    assert contents(out).keys() == {"train/a/a0.jpg", "train/a/a1.jpg", "test/b/b0.jpg", "test/b/b1.jpg"}


def test_files_larger_than_any_photograph_are_not_read(tmp_path):
    images = two_classes(tmp_path)
    for path in (images / "a1.jpg", tmp_path / "val.csv"):
        with path.open("r+b") as file:
            file.truncate(2**40)
        with pytest.raises(SystemExit, match=rf"{path} has more than 33,554,432 bytes"):
            prepare_photographs(images, tmp_path, tmp_path / "out", ".jpg")
        with path.open("r+b") as file:
            file.truncate(1000)
    with (tmp_path / "mini-imagenet-cache-train.pkl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SystemExit, match="it has 1,099,511,627,776 bytes, limit 2,147,483,648"):
        proc_images.classes_of_pickles(tmp_path)


STEERING = "a\n\x1b[2J\x07\u202eb"


def test_what_a_name_holds_does_not_reach_the_terminal(tmp_path, capsys, monkeypatch):
    raw = draw(tmp_path / "raw", "Greek", STEERING)
    damaged = raw / STEERING / "character01" / f"{STEERING}.png"
    damaged.write_bytes(b"<html>")
    said = failure(DATA / RESIZE, raw, "--out", tmp_path / "out")
    assert r"/a\n\x1b[2J\x07\u202eb/character01/a\n\x1b[2J\x07\u202eb.png is damaged" in said

    packed = pack(raw, tmp_path / f"{STEERING}.zip")
    packed.write_bytes(packed.read_bytes()[:99])
    assert r"/a\n\x1b[2J\x07\u202eb.zip is not a whole zip archive" in failure(DATA / RESIZE, packed)

    folders.say(f"{STEERING} caf\xe9")
    assert capsys.readouterr().out == "a\\n\\x1b[2J\\x07\\u202eb caf\xe9\n"
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    folders.say("caf\xe9 \udcff")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"caf\\xe9 \\udcff\n"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_names_that_are_no_utf8_work_and_are_shown_as_escapes(tmp_path):
    raw = draw(tmp_path / os.fsdecode(b"\xff"), os.fsdecode(b"Gr\xe9ek"))
    for source in (raw, pack_tar(raw, tmp_path / os.fsdecode(b"\xff.tar"))):
        out = tmp_path / os.fsdecode(b"out\xff")
        done = run(DATA / RESIZE, source, "--out", out)
        assert (done.returncode, len(contents(out))) == (0, 4)
        shutil.rmtree(out)
    (raw / os.fsdecode(b"Gr\xe9ek") / "character01" / "0000_00.png").write_bytes(b"")
    assert r"\udcff/Gr\udce9ek/character01/0000_00.png is damaged" in failure(DATA / RESIZE, raw, "--out", out)


def test_a_nul_in_a_name_is_refused(tmp_path, call):
    header = tarfile.TarInfo("images/001.Black_footed_Albatross/x.jpg")
    header.pax_headers = {"path": "images/001.Black_footed_Albatross/x\0.jpg"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header)
    with pytest.raises(SystemExit, match="has a NUL in its name"):
        call(cub, "--archive", tmp_path / "x.tar", "--out", tmp_path / "out", "--allow_missing")
    images = two_classes(tmp_path)
    (tmp_path / "train.csv").write_text("filename,label\na0.jpg,a\0b\n")
    with pytest.raises(SystemExit, match=r"train.csv, line 2: 'a0.jpg,a\\x00b' is no file name and label"):
        prepare_photographs(images, tmp_path, tmp_path / "out", ".jpg")


def test_a_place_that_cannot_be_written_and_ctrl_c_end_in_one_line(tmp_path):
    raw = draw(tmp_path / "raw", "Greek")
    (tmp_path / "file").write_text("")
    said = failure(DATA / RESIZE, raw, "--out", tmp_path / "file")
    assert f"'{tmp_path / 'file'}'; what is finished is kept" in said

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted; what is finished is kept: the same command goes on"):
        archive.run(interrupted)


# ------------------------------------------------------------------------------------------------- splits


def test_omniglot_split_is_the_seed_1_shuffle_of_the_sorted_characters():
    assert [len(OMNIGLOT[part]) for part in PARTS] == [1100, 100, 423]
    listed = [name for part in PARTS for name in OMNIGLOT[part]]
    characters = sorted(set(listed))
    assert len(characters) == 1623
    assert len({name.split("/")[0] for name in characters}) == 50
    random.Random(1).shuffle(characters)
    assert listed == characters


@pytest.mark.parametrize(
    ("name", "sizes", "label"),
    [
        ("miniimagenet", [64, 16, 20], r"n\d{8}"),
        ("tiered_imagenet", [351, 97, 160], r"n\d{8}"),
        ("cub", [100, 50, 50], r"\d{3}\.[A-Z]\w+"),
        ("cifar_fs", [64, 16, 20], r"[a-z_]+"),
        ("fc100", [60, 20, 20], r"[a-z_]+"),
    ],
)
def test_split_lists_have_different_classes(name, sizes, label):
    assert [len(SPLITS[name][part]) for part in PARTS] == sizes
    labels = [one for part in PARTS for one in SPLITS[name][part]]
    assert len(set(labels)) == sum(sizes)
    assert all(re.fullmatch(label, one) for one in labels)


def test_cub_split_is_by_place_in_the_sorted_list():
    assert BIRDS[0] == "001.Black_footed_Albatross"
    assert [int(label[:3]) for label in BIRDS] == list(range(1, 201))
    for part, chosen in (
        ("train", lambda i: i % 2 == 0),
        ("val", lambda i: i % 4 == 1),
        ("test", lambda i: i % 4 == 3),
    ):
        assert SPLITS["cub"][part] == [label for i, label in enumerate(BIRDS) if chosen(i)]


@pytest.mark.parametrize("part", PARTS)
def test_split_lists_are_the_published_ones(shared, part):
    data = shared / "data"
    pairs = [
        pair
        for one in PARTS
        for pair in json.loads((data / "cifar_fs" / "splits" / f"{one}.superclass_class.json").read_text())
    ]
    superclasses = json.loads((data / "fc100" / f"{part}.json").read_text())
    tiered = (data / "tiered_imagenet" / f"{part}.csv").read_text().splitlines()
    published = {
        "cifar_fs": sorted((data / "cifar_fs" / "splits" / "bertinetto" / f"{part}.txt").read_text().split()),
        "fc100": sorted(label for superclass, label in pairs if superclass in superclasses),
        "cub": json.loads((data / "cub" / f"{part}.json").read_text()),
        "tiered_imagenet": [line.split(",")[0] for line in tiered],
    }
    assert {name: SPLITS[name][part] for name in published} == published


def test_the_published_csv_files_and_the_class_lists_agree(shared):
    folder = shared / "data" / "miniimagenet"
    lines = [line for part in PARTS for line in (folder / f"{part}.csv").read_text().splitlines()[1:]]
    photographs = {name: folder / name for name, _ in (line.split(",") for line in lines)}
    by_csv = proc_images.find_classes(photographs, folder)
    assert len(photographs) == 60_000
    folders = [f"{part}/{label}" for part in PARTS for label in MINIIMAGENET[part]]
    assert [one.folder for one in by_csv] == folders
    assert {(len(one.images), one.missing) for one in by_csv} == {(600, 0)}
    assert by_csv == proc_images.classes_by_name(photographs)
