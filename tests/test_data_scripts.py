"""The scripts that prepare the data sets, data/archive.py, and the split lists."""

import bz2
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from files import InputError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
RESIZE = "omniglot_resized/resize_images.py"
PROC = "miniImagenet/proc_images.py"
PARTS = ("train", "val", "test")
SPLITS = {path.stem: json.loads(path.read_text()) for path in (DATA / "splits").glob("*.json")}
OMNIGLOT, MINIIMAGENET = SPLITS["omniglot"], SPLITS["miniimagenet"]
BIRDS = sorted(name for part in PARTS for name in SPLITS["cub"][part])
FINE = sorted(name for part in PARTS for name in SPLITS["cifar_fs"][part])

sys.path[:0] = [str(DATA), str((DATA / RESIZE).parent), str((DATA / PROC).parent)]

import proc_images  # noqa: E402
import resize_images  # noqa: E402

import archive  # noqa: E402


def load(name: str):
    """Import data/<name>/prepare.py; four scripts have that file name."""
    spec = importlib.util.spec_from_file_location(name, DATA / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cifar_fs, fc100, cub, tiered_imagenet = map(load, ("cifar_fs", "fc100", "cub", "tiered_imagenet"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except the scripts' marker. Hidden files are included, to detect leftovers."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != archive.MARKER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != archive.MARKER}


def names(path: Path | str):
    """Expect an InputError that contains this path or flag."""
    return pytest.raises(InputError, match=re.escape(str(path)))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *flags) runs a script's main as the command line does, and returns its output."""

    def run_main(script, *flags: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return run_main


@pytest.fixture
def data(tmp_path) -> Path:
    """A copy of the project's data folder with scripts and lists, without data."""
    for path in (ROOT / "files.py", DATA / "archive.py", DATA / RESIZE, DATA / PROC, *DATA.glob("splits/*.json")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / "data"


def draw(root: Path, *alphabets: str, characters: int = 2, drawings: int = 2) -> Path:
    """Write raw Omniglot in root: <alphabet>/characterNN/*.png, 1-bit 105x105 PNGs of random ink."""
    noise = np.random.default_rng(0)
    for alphabet in alphabets:
        for character in range(characters):
            folder = root / alphabet / f"character{character + 1:02}"
            folder.mkdir(parents=True)
            for drawing in range(drawings):
                pixels = np.kron(noise.integers(0, 2, (21, 21)), np.ones((5, 5))).astype(bool)
                Image.fromarray(pixels).save(folder / f"{character:04}_{drawing:02}.png")
    return root


def photograph(folder: Path, *files: str, mode: str = "RGB", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([len(files), seed])
    for name in files:
        pixels = noise.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((120, 90)).convert(mode).save(folder / name, "JPEG")
    return folder


def write_csv(folder: Path, **splits: dict[str, list[str]]) -> None:
    """Write train.csv, val.csv and test.csv from {label: file names}. Omitted splits are empty."""
    for part in PARTS:
        rows = [f"{name},{label}" for label, files in splits.get(part, {}).items() for name in files]
        (folder / f"{part}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")


def two_classes(root: Path) -> tuple[str | Path, ...]:
    """Write photographs and csv files of two classes in root, and return proc_images' flags for them."""
    photograph(root / "images", "a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg")
    write_csv(root, train={"a": ["a0.jpg", "a1.jpg"]}, test={"b": ["b0.jpg", "b1.jpg"]})
    return "--images", root / "images", "--csv", root, "--out", root / "out"


def pack(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*")):
            packed.write(path, path.relative_to(folder))
    return target


def pack_tar(folder: Path, target: Path, order=None) -> Path:
    modes = {".tar": "w", ".tgz": "w:gz", ".gz": "w:gz", ".xz": "w:xz"}
    with tarfile.open(target, modes[target.suffix]) as packed:
        for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=order):
            packed.add(path, path.relative_to(folder))
    return target


def resized(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB").resize((84, 84), Image.LANCZOS))


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# ------------------------------------------------------------------------------------------------ Omniglot


def test_omniglot_is_resized_in_place_as_in_the_original(data):
    draw(draw(data / "omniglot", "Greek") / "images_background", "Latin", "N_Ko")
    draw(data / "omniglot" / "images_evaluation", "Tengwar")
    raw = contents(data / "omniglot")
    here = data / "omniglot_resized"
    command = f"cp -r ../omniglot/* . && '{sys.executable}' -B resize_images.py"

    done = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True, check=True)

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

    # Copy and run again: the raw copies overwrite the finished drawings or join them.
    finished = contents(here)
    subprocess.run(command, shell=True, cwd=here, capture_output=True, check=True)
    assert contents(here) == finished


def test_omniglot_from_archives_equals_omniglot_from_folders(tmp_path, call):
    """A second run writes only the missing drawings."""
    background = pack(draw(tmp_path / "a", "images_background/Greek"), tmp_path / "images_background.zip")
    evaluation = pack(draw(tmp_path / "b", "images_evaluation/Oriya"), tmp_path / "images_evaluation.zip")
    out = tmp_path / "out"
    assert "2 alphabets, 0 already finished\n" in call(resize_images, background, evaluation, "--out", out)
    call(resize_images, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "from_folders")
    assert contents(out) == contents(tmp_path / "from_folders")
    assert len(contents(out)) == 8

    shutil.rmtree(out / "Oriya" / "character02")
    kept = {path: path.stat().st_ino for path in out.rglob("*.png")}
    assert "2 alphabets, 1 already finished\n" in call(resize_images, background, evaluation, "--out", out)
    assert contents(out) == contents(tmp_path / "from_folders")
    assert {path: path.stat().st_ino for path in kept} == kept

    more = draw(tmp_path / "more", "images_background_small1/Greek", characters=3)
    call(resize_images, pack(more, tmp_path / "small1.zip"), "--out", out)
    assert contents(out).items() > contents(tmp_path / "from_folders").items()
    assert len(contents(out)) == 10


def test_real_omniglot_has_the_published_characters(shared):
    zips = [shared / "data" / "omniglot" / f"images_{part}.zip" for part in ("background", "evaluation")]
    files = [name for source in zips for name, _ in resize_images.find(source)]
    assert len(files) == 32_460
    assert {name.rpartition("/")[0] for name in files} == {name for part in PARTS for name in OMNIGLOT[part]}


@pytest.mark.parametrize("source", ["empty.zip", "empty", "missing.zip"])
def test_source_without_drawings_is_named(tmp_path, call, source):
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "empty", tmp_path / "empty.zip")
    with names(tmp_path / source):
        call(resize_images, tmp_path / source, "--out", tmp_path / "out")


# -------------------------------------------------------------------------------------------- MiniImagenet


def test_miniimagenet_is_prepared_as_in_the_original(data):
    here = data / "miniImagenet"
    listed = {"train": ["a0.jpg", "a1.jpg"], "val": ["b0.jpg", "b1.jpg"], "test": ["c0.jpg", "c1.jpg"]}
    photograph(here / "images", *listed["train"], *listed["val"], "not_in_the_csv.jpg")
    photograph(here / "images", *listed["test"], mode="L")
    write_csv(here, **{part: {listed[part][0][0]: listed[part]} for part in PARTS})
    raw = contents(here / "images")

    def run() -> str:
        return subprocess.run([sys.executable, "proc_images.py"], cwd=here, capture_output=True, text=True).stdout

    output = run()
    assert "3 classes, 0 already finished\n" in output
    assert "train classes: 1 found, 64 expected  <- not the published number\n" in output
    assert "test images: 2 found, 12,000 expected" in output
    assert contents(here / "images") == raw
    for part in PARTS:
        assert contents(here / part).keys() == {f"{name[0]}/{name}" for name in listed[part]}
        for path in (here / part).glob("*/*"):
            with Image.open(path) as image:
                assert (image.size, image.mode, image.format) == ((84, 84), "RGB", "JPEG")
    original = io.BytesIO()
    Image.open(here / "images" / "a0.jpg").resize((84, 84), resample=Image.LANCZOS).save(original, "JPEG")
    assert (here / "train" / "a" / "a0.jpg").read_bytes() == original.getvalue()

    kept = {path: path.stat().st_ino for path in here.glob("t*/*/*.jpg")}
    shutil.rmtree(here / "val")
    assert "3 classes, 2 already finished\n" in run()
    assert {path: path.stat().st_ino for path in kept} == kept
    assert visible(here / "val" / "b") == {"b0.jpg", "b1.jpg"}


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.tar.xz"])
def test_miniimagenet_without_csv_uses_the_class_lists(tmp_path, call, name):
    labels = {part: MINIIMAGENET[part][3] for part in PARTS}
    for label in labels.values():
        photograph(tmp_path / "packed" / "images", f"{label}00000001.jpg", f"{label}00000002.jpg")
    photograph(tmp_path / "packed" / "__MACOSX" / "images", f"._{labels['val']}00000001.jpg")
    images = (pack if name.endswith(".zip") else pack_tar)(tmp_path / "packed", tmp_path / name)

    flags = ("--images", images, "--out", tmp_path / "out")
    with names("--allow_missing"):
        call(proc_images, *flags)
    assert contents(tmp_path / "out") == {}
    output = call(proc_images, *flags, "--allow_missing")
    assert f"val/{labels['val']}: 598 images missing\n" in output
    found = {f"{part}/{label}/{label}0000000{i}.jpg" for part, label in labels.items() for i in (1, 2)}
    assert contents(tmp_path / "out").keys() == found


def test_missing_photographs_are_reported_and_can_be_added_later(tmp_path, call, capsys):
    write_csv(tmp_path, train={"a": ["a0.jpg", "a1.jpg", "a2.jpg"], "b": ["b0.jpg"]}, test={"c": ["c0.jpg"]})
    images = photograph(tmp_path / "images", "a0.jpg", "c0.jpg")
    flags = ("--images", images, "--csv", tmp_path, "--out", tmp_path / "out")
    with names("--allow_missing"):
        call(proc_images, *flags)
    assert capsys.readouterr().out.endswith("\ntrain/a: 2 images missing\ntrain/b: no images\n")

    call(proc_images, *flags, "--allow_missing")
    assert contents(tmp_path / "out").keys() == {"train/a/a0.jpg", "test/c/c0.jpg"}

    photograph(images, "a1.jpg", "a2.jpg", "b0.jpg")
    assert "3 classes, 1 already finished" in call(proc_images, *flags)
    assert len(contents(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    "train", [None, "", "a0.jpg,a\n", *(f"filename,label\n{line}\n" for line in ("a0.jpg", "a0.jpg,../a", "/a0.jpg,a"))]
)
def test_wrong_csv_is_named(tmp_path, call, train):
    flags = two_classes(tmp_path)
    if train is None:
        (tmp_path / "train.csv").unlink()
    else:
        (tmp_path / "train.csv").write_text(train)
    with names(tmp_path / "train.csv"):
        call(proc_images, *flags)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("duplicate", ["a0.jpeg", "more/a0.jpg"])
def test_photographs_with_the_same_name_are_refused(tmp_path, duplicate):
    """They would become one .png."""
    for name in ("a0.jpg", "a1.jpg", duplicate):
        photograph((tmp_path / name).parent, Path(name).name)
    with names(duplicate):
        archive.photographs(tmp_path)


def class_folders(root: Path, names: dict[str, str]) -> set[str]:
    """Write two photographs of the fourth class of each split in <names[split]>/<wnid>/. Return the expected output."""
    for part in PARTS:
        photograph(root / names[part] / MINIIMAGENET[part][3], f"{part}0.jpg", f"{part}1.jpg")
    return {f"{part}/{MINIIMAGENET[part][3]}/{part}{i}.jpg" for part in PARTS for i in (0, 1)}


@pytest.mark.parametrize("packed", ["", "zip", "tar"])
@pytest.mark.parametrize(
    ("names", "moved"),
    [
        ({"train": "train", "val": "val", "test": "test"}, 0),
        ({"train": "mini/Train", "val": "mini/Validation", "test": "mini/Test"}, 0),
        ({"train": "", "val": "", "test": ""}, 0),
        ({"train": "test", "val": "train", "test": "test"}, 2),
    ],
)
def test_miniimagenet_in_class_folders_gets_the_published_split(tmp_path, call, names, moved, packed):
    """By the name of the folder, whatever the names of the photographs and the split in the source."""
    source = tmp_path / "source"
    expected = class_folders(source, names)
    photograph(source / names["train"] / "n99999999", "other.jpg")
    if packed:
        source = (pack if packed == "zip" else pack_tar)(source, tmp_path / f"source.{packed}")
    output = call(proc_images, "--images", source, "--out", tmp_path / "out", "--allow_missing")
    assert contents(tmp_path / "out").keys() == expected
    for name in {"<wnid>/" if not name else f"{name}/<wnid>/" for name in names.values()}:
        assert name in output.splitlines()[0]
    assert ("another split" in output) == (moved > 0)
    assert f"{moved} classes are in another split" in output or not moved
    assert "left out 1 classes" in output
    assert "train images: 2 found, 38,400 expected" in output


def test_a_class_divided_among_split_folders_is_joined(tmp_path, call):
    """As for ordinary classification, where train, val and test have the same classes."""
    wnid = MINIIMAGENET["val"][5]
    for part in PARTS:
        photograph(tmp_path / "source" / part / wnid, f"{part}.jpg")
    flags = "--images", tmp_path / "source", "--out", tmp_path / "out", "--allow_missing"
    call(proc_images, *flags)
    assert contents(tmp_path / "out").keys() == {f"val/{wnid}/{part}.jpg" for part in PARTS}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{wnid}/a.jpg", "copy/{wnid}/b.jpg"),  # two data sets in one folder
        ("train/{wnid}/a.jpg", "test/{wnid}/a.jpg"),  # one would replace the other
        ("{wnid}/a.jpg", "{wnid}/a.jpeg"),
        ("train/{wnid}/a.jpg", "train/{wnid}/n01532829_1.jpg"),  # a photograph of another class
    ],
)
def test_ambiguous_class_folders_are_refused(tmp_path, call, first, second):
    for path in (first, second):
        path = tmp_path / "source" / path.format(wnid=MINIIMAGENET["test"][0])
        photograph(path.parent, path.name)
    with pytest.raises(InputError, match=re.escape(MINIIMAGENET["test"][0])):
        call(proc_images, "--images", tmp_path / "source", "--out", tmp_path / "out", "--allow_missing")
    assert contents(tmp_path / "out") == {}


def test_photographs_without_published_classes_are_refused_in_one_line(tmp_path, call, capsys):
    photograph(tmp_path / "source" / "train" / "house_finch", "bird.jpg")
    with names(tmp_path / "source"):
        call(proc_images, "--images", tmp_path / "source", "--out", tmp_path / "out", "--allow_missing")
    assert "no images" not in capsys.readouterr().out  # not a line per class


@pytest.mark.parametrize("place", ["--csv", "folder", "archive"])
@pytest.mark.parametrize("header", ["filename,label", "image_name,image_label", "\ufeffFile,Class"])
def test_csv_files_define_the_classes(tmp_path, call, header, place):
    """Photographs have any names. A published class gets its published split, even if the csv files have another."""
    root = tmp_path / "source"
    photograph(root / "images", "0.jpg", "1.jpg", "2.jpg", "3.jpg")
    labels = {"train": MINIIMAGENET["train"][0], "validation": MINIIMAGENET["val"][1], "test": MINIIMAGENET["val"][2]}
    listed = root if place != "--csv" else tmp_path
    for i, (part, label) in enumerate(labels.items()):
        (listed / f"{part}.csv").write_text(f"{header}\n{i}.jpg,{label}\n", "utf-8")
    source = pack(root, tmp_path / "source.zip") if place == "archive" else root
    flags = ("--csv", tmp_path) if place == "--csv" else ()
    output = call(proc_images, "--images", source, *flags, "--out", tmp_path / "out")
    parts = ("train", "val", "val")
    assert contents(tmp_path / "out").keys() == {
        f"{part}/{label}/{i}.jpg" for i, (part, label) in enumerate(zip(parts, labels.values(), strict=True))
    }
    assert "validation.csv" in output.splitlines()[0]
    assert "1 classes are in another split" in output


CSV_FORMS = {
    "spaces": "filename, label\n{}.jpg, {}\n",
    "spaces in the lines only": "filename,label\n{}.jpg, {} \n",
    "quotes": '"filename","label"\n"{}.jpg","{}"\n',
    "row numbers": ",filename,label\n7,{}.jpg,{}\n",
    "ids": "id,filename,label\n7,{}.jpg,{}\n",
    "label first": "label,filename\n{1},{0}.jpg\n",
    "empty lines, CRLF": "filename,label\r\n\r\n{}.jpg,{}\r\n\r\n",
}


@pytest.mark.parametrize("form", CSV_FORMS.values(), ids=CSV_FORMS)
def test_csv_files_of_other_programs_name_the_same_classes(tmp_path, call, form):
    photograph(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    for i, part in enumerate(PARTS):
        (tmp_path / f"{part}.csv").write_bytes(form.format(i, MINIIMAGENET[part][i]).encode())
    call(proc_images, "--images", tmp_path / "images", "--csv", tmp_path, "--out", tmp_path / "out")
    expected = {f"{part}/{MINIIMAGENET[part][i]}/{i}.jpg" for i, part in enumerate(PARTS)}
    assert contents(tmp_path / "out").keys() == expected


def test_a_photograph_with_two_labels_is_refused(tmp_path, call):
    """It would be in the training and the test classes."""
    flags = two_classes(tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\na0.jpg,c\n")
    with names(tmp_path / "test.csv"):
        call(proc_images, *flags, "--allow_missing")
    assert contents(tmp_path / "out") == {}


def test_labels_that_are_not_published_are_named(tmp_path, call):
    """The numbers of classes and images alone may be the published ones."""
    label = MINIIMAGENET["train"][0]
    photograph(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    for i, (part, name) in enumerate(zip(PARTS, (label, label.upper(), "goose"), strict=True)):
        (tmp_path / f"{part}.csv").write_text(f"filename,label\n{i}.jpg,{name}\n")
    flags = "--images", tmp_path / "images", "--csv", tmp_path, "--out", tmp_path / "out"
    line = next(line for line in call(proc_images, *flags).splitlines() if "goose" in line)
    assert label.upper() in line and label not in line and "miniimagenet.json" in line


@pytest.mark.parametrize("same", [True, False], ids=["same file names", "different file names"])
def test_a_photograph_outside_the_class_folders_is_named(tmp_path, call, same):
    """And not the photographs in class folders, which may have the same names."""
    for i, part in enumerate(PARTS):
        photograph(tmp_path / "source" / part / MINIIMAGENET[part][0], f"{0 if same else i}.jpg")
    photograph(tmp_path / "source", "preview.jpg")
    with names(tmp_path / "source" / "preview.jpg"):
        call(proc_images, "--images", tmp_path / "source", "--out", tmp_path / "out", "--allow_missing")


IMAGENET = {part: MINIIMAGENET[part][0] for part in PARTS}  # one class per split


def imagenet(root: Path, wnids: list[str], kind: str) -> Path:
    """Write a small ILSVRC 2012 training set: a folder of class folders, a folder of class tars, or a tar of tars."""
    for i, wnid in enumerate(wnids):
        photograph(root / wnid, *(f"{wnid}_{number}.JPEG" for number in (100, 7, 9999, 10)), seed=i)
    if kind == "folders":
        return root
    for wnid in wnids:
        pack_tar(root / wnid, root / f"{wnid}.tar")
        shutil.rmtree(root / wnid)
    return root if kind == "tars" else pack_tar(root, root.parent / "ILSVRC2012_img_train.tar")


@pytest.mark.parametrize("kind", ["folders", "tars", "tar of tars"])
def test_miniimagenet_from_imagenet_numbers_images_by_rank(tmp_path, call, kind):
    raw = imagenet(tmp_path / "raw", list(IMAGENET.values()), "folders")
    source = imagenet(tmp_path / "packed", list(IMAGENET.values()), kind)
    write_csv(tmp_path, **{part: {wnid: [f"{wnid}0000000{i}.jpg" for i in (2, 4)]} for part, wnid in IMAGENET.items()})
    call(proc_images, "--imagenet", source, "--csv", tmp_path, "--out", tmp_path / "out", "--lossless")
    assert len(contents(tmp_path / "out")) == 6
    for part, wnid in IMAGENET.items():
        for rank, number in ((2, 10), (4, 9999)):
            saved = pixels_of(tmp_path / "out" / part / wnid / f"{wnid}0000000{rank}.png")
            assert np.array_equal(saved, resized(raw / wnid / f"{wnid}_{number}.JPEG"))


def test_miniimagenet_from_imagenet_without_csv_uses_the_first_600(tmp_path, call, monkeypatch):
    monkeypatch.setattr(proc_images, "CLASS_SIZE", 3)
    source = imagenet(tmp_path / "raw", [*IMAGENET.values(), "n00000001"], "folders")
    output = call(proc_images, "--imagenet", source, "--out", tmp_path / "out", "--allow_missing")
    assert "left out 3 images after the first 3 " in output
    files = {f"{part}/{wnid}/{wnid}0000000{i}.jpg" for part, wnid in IMAGENET.items() for i in (1, 2, 3)}
    assert contents(tmp_path / "out").keys() == files

    (source / IMAGENET["val"] / "cat.jpg").touch()
    with names("cat.jpg"):
        call(proc_images, "--imagenet", source, "--out", tmp_path / "out", "--allow_missing")


# ------------------------------------------------------------------------------------------------ pickles


class Python2Pickler(pickle._Pickler):
    """Write text and bytes as Python 2, which had one type for both."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        packed = value if isinstance(value, bytes) else value.encode("latin1")
        if len(packed) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(packed)]) + packed)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(packed)) + packed)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


PICKLERS = {
    "Python 2": (Python2Pickler, 2, b"numpy.core"),
    "NumPy 1": (pickle._Pickler, 2, b"numpy.core"),
    "NumPy 2": (pickle._Pickler, 5, b"numpy._core"),
}


def pickled(value: object, how: str) -> bytes:
    written = io.BytesIO()
    pickler, protocol, module = PICKLERS[how]
    pickler(written, protocol=protocol).dump(value)
    return written.getvalue().replace(b"numpy._core", module)


class Evil:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *values):
        self.called = function, values

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("how", PICKLERS)
@pytest.mark.parametrize(
    "evil",
    [
        *(Evil(os.system, "touch evil"), Evil(eval, "open('evil', 'w')"), Evil(getattr, "a", "upper")),
        *(Evil(np.save, "evil.npy", [1]), np.array([1, "a"], object), pickle.PicklingError("any other class")),
    ],
)
def test_pickle_cannot_run_code(tmp_path, call, monkeypatch, evil, how):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cifar(tmp_path / "cifar", how, data=evil)
    mini_caches(tmp_path / "caches", how, image_data=evil)
    for script, flag, source in ((fc100, "--archive", "cifar"), (proc_images, "--pickles", "caches")):
        with names(tmp_path / source):
            call(script, flag, tmp_path / source, "--out", tmp_path / "out", "--allow_missing")
    assert visible(tmp_path / "here") == set()


@pytest.mark.parametrize(
    "change", [{"filenames": ["../../evil.png"] * 100}, {"filenames": 7}, {"fine_labels": [100] * 100}, {"data": [0]}]
)
def test_pickle_that_is_not_cifar_is_named(tmp_path, call, change):
    cifar(tmp_path / "raw", **change)
    with names(tmp_path / "raw" / "cifar-100-python" / "train"):
        call(cifar_fs, "--archive", tmp_path / "raw", "--out", tmp_path / "out", "--allow_missing")


@pytest.mark.parametrize(
    "change", [{"image_data": np.zeros((9, 84, 84), np.uint8)}, {"class_dict": {"n01532829": ["../evil"]}}]
)
def test_pickle_that_is_not_miniimagenet_is_named(tmp_path, call, change):
    mini_caches(tmp_path / "caches", **change)
    with names(tmp_path / "caches" / "mini-imagenet-cache-train.pkl"):
        call(proc_images, "--pickles", tmp_path / "caches", "--out", tmp_path / "out", "--allow_missing")


def test_damaged_pickle_is_named(tmp_path):
    whole = pickle.dumps({"data": np.zeros(100)})
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.pkl").write_bytes(whole[:length])
        with names(tmp_path / "x.pkl"):
            archive.unpickle(tmp_path / "x.pkl")


def mini_caches(folder: Path, how: str = "NumPy 2", **changes) -> dict[str, np.ndarray]:
    """Write mini-imagenet-cache-*.pkl with 2 images in each of the 100 classes, interleaved. Return their pixels."""
    folder.mkdir()
    noise, pixels = np.random.default_rng(0), {}
    for part in PARTS:
        labels = MINIIMAGENET[part]
        pixels[part] = noise.integers(0, 256, (2 * len(labels), 84, 84, 3), np.uint8)
        indices = {label: list(range(i, len(pixels[part]), len(labels))) for i, label in enumerate(labels)}
        cache = {"image_data": pixels[part], "class_dict": indices} | changes
        (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickled(cache, how))
    return pixels


@pytest.mark.parametrize("how", PICKLERS)
def test_miniimagenet_from_pickles_is_lossless(tmp_path, call, how):
    pixels = mini_caches(tmp_path / "caches", how)
    if how == "NumPy 1":  # the other name in circulation
        (tmp_path / "caches" / "mini-imagenet-cache-val.pkl").rename(
            tmp_path / "caches" / "mini-imagenet-cache-validation.pkl"
        )
    output = call(proc_images, "--pickles", tmp_path / "caches", "--out", tmp_path / "out", "--allow_missing")
    assert f"val/{MINIIMAGENET['val'][0]}: 598 images missing\n" in output
    assert "test images: 40 found, 12,000 expected" in output
    for part in PARTS:
        for i, expected in enumerate(pixels[part]):
            label = MINIIMAGENET[part][i % len(MINIIMAGENET[part])]
            assert np.array_equal(pixels_of(tmp_path / "out" / part / label / f"{i:05}.png"), expected)


# ----------------------------------------------------------------------------------------- CIFAR-FS, FC100


def cifar(root: Path, how: str = "NumPy 2", **changes) -> dict[str, np.ndarray]:
    """Write the official cifar-100-python/ in root, with 2 training images and 1 test image per class. Return them."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "file.txt~").touch()  # the published archive has it
    (folder / "meta").write_bytes(pickled({"fine_label_names": FINE}, how))
    noise, found = np.random.default_rng(0), {}
    for part, count in (("train", 200), ("test", 100)):
        labels = [i % 100 for i in range(count)]
        pixels = noise.integers(0, 256, (count, 3072), np.uint8)
        files = [f"{FINE[label]}_{part}_s_{i:06}.png" for i, label in enumerate(labels)]
        batch = {"filenames": files, "batch_label": part, "fine_labels": labels, "data": pixels}
        (folder / part).write_bytes(pickled(batch | changes, how))
        for label, name, row in zip(labels, files, pixels, strict=True):
            # As published: 1,024 red values row by row, then the green values, then the blue.
            found[f"{FINE[label]}/{name}"] = np.stack(np.split(row, 3), axis=-1).reshape(32, 32, 3)
    return found


@pytest.mark.parametrize("how", PICKLERS)
def test_cifar_sets_from_the_official_archive_are_lossless(tmp_path, call, how):
    pixels = cifar(tmp_path / "raw", how)
    packed = pack_tar(tmp_path / "raw", tmp_path / "cifar-100-python.tar.gz")
    for script, sizes in ((cifar_fs, (64, 16, 20)), (fc100, (60, 20, 20))):
        out = tmp_path / script.__name__
        with names("--allow_missing"):
            call(script, "--archive", packed, "--out", out)
        output = call(script, "--archive", packed, "--out", out, "--allow_missing")
        assert "train/orchid: 597 images missing\n" in output
        for part, size in zip(PARTS, sizes, strict=True):
            assert f"{part} classes: {size} found, {size} expected\n" in output
            assert f"{part} images: {3 * size} found, {600 * size:,} expected  <- not" in output
            assert visible(out / part) == set(SPLITS[script.__name__][part])
        written = {f"{path.parent.name}/{path.name}": pixels_of(path) for path in out.glob("*/*/*.png")}
        assert written.keys() == pixels.keys()
        assert all(np.array_equal(written[name], pixels[name]) for name in pixels)


@pytest.mark.parametrize("packed", [True, False])
def test_bertinettos_layout_gives_the_same_cifar_fs(tmp_path, call, packed):
    pixels = cifar(tmp_path / "official")
    call(cifar_fs, "--archive", tmp_path / "official", "--out", tmp_path / "out", "--allow_missing")
    sources = [tmp_path / "raw", tmp_path / "more"]
    for name, image in pixels.items():
        path = sources[name.startswith("otter/")] / "cifar100" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    if packed:
        sources = [pack(source, source.with_suffix(".zip")) for source in sources]
    output = call(cifar_fs, "--archive", *sources, "--out", tmp_path / "out_2", "--allow_missing")
    assert "100 classes, 0 already finished\n" in output
    assert contents(tmp_path / "out_2") == contents(tmp_path / "out")


def test_real_cifar_has_the_published_images(shared):
    folder = shared / "data" / "cifar_fs"
    parts = [folder / f"cifar100_meta_{part}.zip" for part in ("train_100_per_class", "val", "test")]
    whole = {*SPLITS["cifar_fs"]["val"], *SPLITS["cifar_fs"]["test"]}
    counts = {label: len(found) for label, found in archive.cifar100(parts).items()}
    assert counts == {name: 600 if name in whole else 100 for name in FINE}


# ----------------------------------------------------------------------------------- CUB, tieredImageNet


def birds(root: Path, *classes: str) -> Path:
    """Write CUB-200-2011 in its published layout, with one color and one grayscale photograph per class."""
    for i, label in enumerate(classes or BIRDS):
        folder = root / "CUB_200_2011" / "images" / label
        photograph(folder, f"{label[4:]}_0001_1.jpg", seed=i)
        photograph(folder, f"{label[4:]}_0002_2.jpg", seed=i, mode="L")
    (root / "CUB_200_2011" / "images.txt").write_text("a file that is not an image\n")
    return root


@pytest.fixture(scope="module")
def all_birds(tmp_path_factory) -> Path:
    return birds(tmp_path_factory.mktemp("birds"))


def test_cub_archive_is_read_once_from_end_to_end(all_birds, tmp_path, call, monkeypatch):
    """Its images are resized, and its classes split, as documented."""
    # As in the published archive, the classes are not sorted by name.
    packed = pack_tar(all_birds, tmp_path / "CUB.tgz", lambda path: hashlib.md5(path.parent.name.encode()).digest())
    rewinds, rewind = [], gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: rewinds.append(1) or rewind(self))

    output = call(cub, "--archive", packed, "--out", tmp_path / "out", "--allow_missing")

    assert len(rewinds) < 5  # not one rewind per class
    assert "train classes: 100 found, 100 expected\n" in output
    assert "images: 400 found, 11,788 expected  <- not the published number\n" in output
    for i, label in enumerate(BIRDS):
        part = "train" if i % 2 == 0 else "val" if i % 4 == 1 else "test"
        for path in (all_birds / "CUB_200_2011" / "images" / label).iterdir():
            assert np.array_equal(pixels_of(tmp_path / "out" / part / label / f"{path.stem}.png"), resized(path))
    assert len(contents(tmp_path / "out")) == 400


def test_counts_below_the_published_ones_are_an_error(all_birds, tmp_path, call):
    with names("--allow_missing"):  # at the end, because the class sizes are unknown
        call(cub, "--archive", all_birds, "--out", tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 400
    with names("--allow_missing"):
        call(cub, "--archive", birds(tmp_path / "raw", BIRDS[0]), "--out", tmp_path / "out_2")
    assert contents(tmp_path / "out_2") == {}


TIERED = {part: SPLITS["tiered_imagenet"][part][5] for part in PARTS}


@pytest.mark.parametrize("kind", ["folders", "tars", "tar of tars"])
def test_tiered_imagenet_is_prepared_from_imagenet(tmp_path, call, kind):
    raw = imagenet(tmp_path / "raw", list(TIERED.values()), "folders")
    source = imagenet(tmp_path / "packed", [*TIERED.values(), "n00000001"], kind)
    flags = ("--archive", source, "--out", tmp_path / "out")
    with names("--allow_missing"):
        call(tiered_imagenet, *flags)
    output = call(tiered_imagenet, *flags, "--allow_missing")
    assert f"train/{SPLITS['tiered_imagenet']['train'][0]}: no images\n" in output
    assert "train images: 4 found, 448,695 expected" in output
    assert len(contents(tmp_path / "out")) == 12
    for part, wnid in TIERED.items():
        for path in (raw / wnid).iterdir():
            assert np.array_equal(pixels_of(tmp_path / "out" / part / wnid / f"{path.stem}.png"), resized(path))
    (tmp_path / "out" / "val" / TIERED["val"] / f"{TIERED['val']}_7.png").unlink()
    assert "3 classes, 2 already finished\n" in call(tiered_imagenet, *flags, "--allow_missing")
    assert len(contents(tmp_path / "out")) == 12


# ---------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path):
    """The address of a local web server for the files in tmp_path/served."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def published(server: str, path: Path) -> archive.Published:
    return archive.Published(f"{server}/{path.name}", hashlib.md5(path.read_bytes()).hexdigest())


def test_failed_download_leaves_no_files_and_can_be_repeated(tmp_path, call, server, monkeypatch):
    cifar(tmp_path / "raw")
    packed = pack_tar(tmp_path / "raw", tmp_path / "cifar-100-python.tar.gz")
    served, out = tmp_path / "served" / packed.name, tmp_path / "out"
    monkeypatch.setattr(archive, "CIFAR_100", published(server, packed))
    flags = ("--download", "--allow_missing", "--out", out)
    with names(f"{server}/{packed.name}"):  # 404
        call(cifar_fs, *flags)
    served.write_bytes(packed.read_bytes()[:-1])
    with names(f"{server}/{packed.name}"):
        call(cifar_fs, *flags)
    assert contents(out) == {}

    (out / f".{packed.name}.part").write_bytes(b"left by a killed process")
    shutil.copy(packed, served)
    call(cifar_fs, *flags)
    assert visible(out) == {*PARTS, packed.name}
    served.unlink()  # a complete file is not downloaded again
    assert "100 already finished\n" in call(cifar_fs, *flags)

    (out / packed.name).write_bytes(b"the user's own")
    refused(cifar_fs, call, out / packed.name, out, *flags)


def test_omniglot_downloads_both_archives(tmp_path, call, server, monkeypatch):
    for part, alphabet in (("background", "Greek"), ("evaluation", "Oriya")):
        pack(draw(tmp_path / part, f"images_{part}/{alphabet}"), tmp_path / "served" / f"images_{part}.zip")
    archives = sorted((tmp_path / "served").iterdir())
    monkeypatch.setattr(resize_images, "PUBLISHED", [published(server, path) for path in archives])
    assert "alphabets: 2 found" in call(resize_images, "--download", "--out", tmp_path / "out")
    assert visible(tmp_path / "out") == {"Greek", "Oriya", *(path.name for path in archives)}


# ------------------------------------------------------------------------------------- the user's own files


def refused(script, call, path: Path, folder: Path, *flags: str | Path) -> None:
    """Assert that a script's error names the path, and that nothing in the folder changes."""
    before = contents(folder)
    with names(path):
        call(script, *flags)
    assert contents(folder) == before


def test_folder_of_other_files_is_refused(tmp_path, call):
    flags = two_classes(tmp_path)
    raw, out = draw(tmp_path / "raw", "Greek"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").touch()
    refused(resize_images, call, out, out, raw, "--out", out)
    refused(resize_images, call, out, out, "--out", out)
    refused(proc_images, call, out, out, *flags)
    refused(cub, call, out, out, "--archive", birds(tmp_path / "birds"), "--out", out)
    (out / "notes.txt").unlink()
    call(proc_images, *flags)
    refused(cub, call, out, out, "--archive", tmp_path / "birds", "--out", out)  # the folder of a different data set


@pytest.mark.parametrize("photo", ["b0.jpg", "b0.png", "mine.jpg"])
def test_users_photograph_in_a_class_folder_is_never_overwritten(tmp_path, call, monkeypatch, photo):
    """The script stops before it writes anything."""
    flags, out = two_classes(tmp_path), tmp_path / "out"
    monkeypatch.setattr(proc_images, "HERE", out)  # the script's own folder may have other files
    photograph(out / "test" / "b", photo)
    refused(proc_images, call, out / "test" / "b" / photo, out, *flags)


def test_images_of_a_different_size_are_not_replaced(tmp_path, call):
    flags, out = two_classes(tmp_path), tmp_path / "out"
    call(proc_images, *flags)
    refused(proc_images, call, out / "train" / "a" / "a0.jpg", out, *flags, "--short_side=128")
    refused(proc_images, call, out / "train" / "a" / "a0.jpg", out, *flags, "--lossless")


def test_omniglot_in_place_keeps_other_files(tmp_path, call, monkeypatch):
    out = draw(tmp_path / "out", "Greek")
    monkeypatch.setattr(resize_images, "HERE", out)
    raw = draw(tmp_path / "raw", "Latin", "Oriya")
    before = contents(raw)
    (out / "Latin").symlink_to(raw / "Latin")
    draw(out / "images_background", "Oriya")
    (out / "images_evaluation").symlink_to(raw)
    draw(out / "images_backup", "Tengwar")
    (out / "Greek" / "notes.txt").write_text("mine")
    backup = contents(out / "images_backup")

    call(resize_images, "--out", out)
    assert (out / "Greek" / "notes.txt").read_text() == "mine"
    assert contents(out / "images_backup") == backup
    assert contents(raw) == before

    drawing = out / "Greek" / "character01" / "0000_00.png"
    for other in (Image.new("L", (105, 105)), Image.new("1", (106, 105))):
        other.save(drawing)
        refused(resize_images, call, drawing, out, "--out", out)
    for name in ("Latin", "Oriya"):  # a raw drawing at an output path, even behind a link
        shutil.copytree(raw / name, tmp_path / "more" / name)
    refused(resize_images, call, out / "Latin", raw, tmp_path / "more", "--out", out)


# ------------------------------------------------------------------------------------ killed and run again


KILL = """
import os, runpy, signal, sys
left, sys.argv = [int(sys.argv[1])], sys.argv[2:]

def watch(event, args):
    if event == "os.rename":
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("renames", [0, 3])
@pytest.mark.parametrize("how", ["omniglot", "omniglot in place", "miniimagenet"])
def test_killed_script_resumes_when_run_again(data, tmp_path, how, renames):
    """Kill it before it moves a file into place, run it again, and compare with an uninterrupted run."""
    raw = draw(draw(tmp_path / "raw", "Greek") / "images_background", "Greek", "Latin").parent
    if how == "miniimagenet":
        script, *flags, out = data / PROC, *two_classes(tmp_path)
    else:
        script, *flags, out = data / RESIZE, raw, "--out", tmp_path / "out"

    def run(*command: str | Path) -> int:
        return subprocess.run([sys.executable, *map(str, command)], capture_output=True).returncode

    assert run(script, *flags, tmp_path / "expected") == 0
    if how == "omniglot in place":
        out = script.parent
        shutil.copytree(raw, out, dirs_exist_ok=True)
        flags = ["--out"]
    assert run("-c", KILL, renames, script, *flags, out) == -signal.SIGKILL
    assert run(script, *flags, out) == 0
    images = {name: body for name, body in contents(out).items() if name.endswith((".jpg", ".png"))}
    finished = {name: body for name, body in images.items() if "/." not in name}
    assert finished == contents(tmp_path / "expected")
    assert len(images) - len(finished) <= os.cpu_count()  # hidden files of the killed writers


# ------------------------------------------------------------------------------------------ archives, errors


@pytest.mark.parametrize("packed", ["hostile.zip", "hostile.tgz"])
@pytest.mark.parametrize(
    "name", ["../evil.jpg", "images/../../../evil.jpg", "a\\..\\..\\evil.jpg", "/tmp/evil.jpg", "C:\\evil.jpg"]
)
def test_archive_cannot_write_outside_its_folder(tmp_path, call, packed, name):
    path = tmp_path / packed
    if packed == "hostile.zip":
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr(name, b"evil")
    else:
        with tarfile.open(path, "w:gz") as opened:
            opened.addfile(tarfile.TarInfo(name))
    for script, flag in ((cub, "--archive"), (proc_images, "--images")):
        with names(path):
            call(script, flag, path, "--out", tmp_path / "out", "--allow_missing")
    assert contents(tmp_path).keys() == {packed}


def test_damaged_archive_is_named(tmp_path, call):
    raw = birds(tmp_path / "raw", *BIRDS[:5])
    tgz, packed = pack_tar(raw, tmp_path / "birds.tgz").read_bytes(), pack(raw, tmp_path / "birds.zip").read_bytes()
    flipped = bytearray(tgz)
    flipped[len(tgz) // 2] ^= 255
    for name, body in (
        *(("cut.tgz", tgz[:length]) for length in (0, 1, 100, len(tgz) // 2, len(tgz) - 1000)),
        *(("cut.zip", packed[:length]) for length in (0, 1, 100, len(packed) // 2, len(packed) - 1)),
        ("flipped.tgz", flipped),
        ("page.tgz", b"<html>please log in</html>"),
        ("other.tar.bz2", bz2.compress(b"birds")),
        ("empty.tar", bytes(10_240)),
    ):
        (tmp_path / name).write_bytes(body)
        with names(tmp_path / name):
            call(cub, "--archive", tmp_path / name, "--out", tmp_path / "out", "--allow_missing")
        assert contents(tmp_path / "out") == {}


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """Return a tiny PNG file that declares this many pixels."""
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + small.getvalue()[24:29]
    return small.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + small.getvalue()[33:]


@pytest.mark.parametrize("body", [b"", b"<html>", b"GIF89a", bomb(), "half"])
@pytest.mark.parametrize("packed", [True, False])
def test_unreadable_image_is_named(tmp_path, call, body, packed):
    raw = draw(tmp_path / "raw", "Greek", "Latin", "Oriya")
    damaged = raw / "Latin" / "character02" / "0001_00.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2] if body == "half" else body)
    source = pack(raw, tmp_path / "raw.zip") if packed else raw
    with names(source / "Latin" / "character02" / "0001_00.png"):
        call(resize_images, source, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "Latin" / "character02" / "0001_00.png").exists()

    damaged.write_bytes(whole)
    source = pack(raw, tmp_path / "raw.zip") if packed else raw
    assert "3 alphabets, 1 already finished" in call(resize_images, source, "--out", tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 12


@pytest.mark.parametrize("flag", ["--csv=x", "--short_side=100", "--short_side=0", "--short_side=wide"])
def test_flags_that_conflict_with_pickles_are_named(call, capsys, flag):
    with pytest.raises(SystemExit):
        call(proc_images, "--pickles=x", flag)
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_every_error_is_one_line(tmp_path, monkeypatch):
    raw = draw(tmp_path / "raw", "a\n\x1b[2J\x07b")
    (raw / "a\n\x1b[2J\x07b" / "character01" / "0000_00.png").write_bytes(b"<html>")
    (tmp_path / "file").touch()
    for out in ("out", "file"):  # a damaged image, and an --out that is not a folder
        command = [sys.executable, DATA / RESIZE, raw, "--out", tmp_path / out]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
        assert "\x1b" not in done.stderr

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted"):
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


def test_cub_split_alternates_over_the_sorted_classes():
    assert [int(label[:3]) for label in BIRDS] == list(range(1, 201))
    assert [SPLITS["cub"][part] for part in PARTS] == [BIRDS[::2], BIRDS[1::4], BIRDS[3::4]]


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


def test_published_csv_files_match_the_class_lists(shared):
    folder = shared / "data" / "miniimagenet"
    lines = [line for part in PARTS for line in (folder / f"{part}.csv").read_text().splitlines()[1:]]
    photographs = {name: folder / name for name, _ in (line.split(",") for line in lines)}
    by_csv = proc_images.find_classes(photographs, folder)
    assert len(photographs) == 60_000
    assert [one.folder for one in by_csv] == [f"{part}/{label}" for part in PARTS for label in MINIIMAGENET[part]]
    assert {(len(one.images), one.missing) for one in by_csv} == {(600, 0)}
    assert by_csv == proc_images.classes_by_name(photographs)


def test_the_home_folder_is_expanded_in_every_path(tmp_path, call, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    draw(tmp_path / "raw", "Greek")
    call(resize_images, "~/raw", "--out=~/out")
    assert (tmp_path / "out" / "Greek").is_dir()
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--archive", "~/a", "~/b", "--out=~/other"])
    args = archive.arguments("", tmp_path)
    assert (args.archive, args.out) == ([tmp_path / "a", tmp_path / "b"], tmp_path / "other")
