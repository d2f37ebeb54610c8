"""Image folders: classes, splits, file types, the cache and errors; and crops."""

import errno
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

import images
import main
import predict
from data_generator import ImageTasks
from files import InputError
from images import ROOT, SPLITS, Classes, count_splits, load_splits, read_image
from recipe import DATASETS, Images
from tests.helpers import refusal, run, unprivileged

OMNIGLOT, MINIIMAGENET = DATASETS["omniglot"].images, DATASETS["miniimagenet"].images
PUBLISHED = json.loads((ROOT / "data" / "splits" / "omniglot.json").read_text())
CHARACTERS = [name for split in SPLITS for name in PUBLISHED[split]]
# Not square, so that tests fail if height and width are swapped.
TINY = MINIIMAGENET._replace(size=(3, 2), split_list=None)
OWN = DATASETS["folder"].images._replace(size=TINY.size)


def save_image(path: Path, seed: int, size=TINY.size, **options) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Splits train and test, each with 3 classes of 4 images. All files have the same size and modification time."""
    folder = tmp_path / "tiny"
    for seed, (split, label, image) in enumerate(product(("train", "test"), "abc", range(4))):
        file = folder / split / label / f"{image}.png"
        save_image(file, seed, compress_level=0)
        os.utime(file, (1e9, 1e9))
    return folder


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The image files opened since the test began."""
    files, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest, **named: files.append(path) or real(path, *rest, **named))
    return files


def read(folder: Path, like: Images = TINY) -> Classes:
    """Return the test split with a copy of its pixels, independent of the cache."""
    classes = load_splits(like, folder, ("test",))["test"]
    return classes._replace(pixels=np.array(classes.pixels))


def assert_same(found: Classes, expected: Classes) -> None:
    assert found.names == expected.names
    np.testing.assert_array_equal(found.counts, expected.counts)
    count = expected.counts.sum()
    np.testing.assert_array_equal(found.pixels[:count], expected.pixels[:count])


def uncached(folder: Path) -> Classes:
    """Return the classes of a copy of the folder, read without a cache."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".cache"))
    classes = read(copy)
    shutil.rmtree(copy)
    return classes


def error_of(folder: Path, like: Images = TINY, splits=("test",), way=2, shot=1, query=1) -> str:
    with pytest.raises(InputError) as raised:
        ImageTasks.from_folder(like, folder, splits, way, shot, query)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_junk_of_other_systems_is_ignored(tiny):
    expected = read(tiny)
    test = tiny / "test"
    (test / "__MACOSX" / "a").mkdir(parents=True)
    for name in ("Thumbs.db", ".DS_Store", "a/Thumbs.db", "a/desktop.ini", "a/._0.png", "__MACOSX/a/._0.png"):
        (test / name).write_bytes(b"not an image")
    save_image(test / ".b.being-written" / "0.png", seed=0)
    save_image(test / "stray.png", seed=0)  # outside the class folders
    assert_same(read(tiny), expected)


JUNK = [  # below a class folder, or next to one
    *("__MACOSX/a/._0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir/SYNO.jpg", "#recycle/0.png", "a/._0.png"),
    *("System Volume Information/x", "$RECYCLE.BIN/0.png", "lost+found/x", "a/Thumbs.db", "._a/0.png", "notes/a.txt"),
]


def test_system_files_and_folders_are_neither_classes_nor_images_and_are_counted(tiny, capsys):
    """Once, also if the folder is counted and then loaded. A folder that is empty, or has only text, is no class."""
    expected = read(tiny)
    for name in JUNK:
        (tiny / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny / "test" / name).write_bytes(b"not an image")
    (tiny / "test" / "empty" / "inside").mkdir(parents=True)
    (tiny / "__MACOSX").mkdir()
    tasks = ImageTasks.from_folder(TINY, tiny, ("test",), 3, 1, 1, optional=("train",))
    assert tasks.counts["test"] == dict.fromkeys("abc", 4)
    assert_same(tasks.classes["test"], expected)
    unread, system = capsys.readouterr().out.splitlines()
    assert unread.startswith(f"{tiny}: ") and " 1 files " in unread and unread.endswith(": test/notes/a.txt")
    assert system.startswith(f"{tiny}: ") and f" {len(JUNK) + 2} system " in system  # and __MACOSX, empty/inside
    assert all(part in system for part in ("2 __MACOSX", "2 @eaDir", "2 ._*", "1 #recycle", "empty/inside", "notes"))
    published = MINIIMAGENET._replace(size=TINY.size, skip_broken=True)
    count_splits(published, tiny, ("test",))
    assert capsys.readouterr().out == ""


def test_photographs_that_pillow_does_not_read_are_counted(tiny, capsys):
    """Before an error of a class that is too small without them."""
    for number in range(3):
        (tiny / "test" / "a" / f"{number}.HEIC").touch()
        (tiny / "test" / "d").mkdir(exist_ok=True)
        (tiny / "test" / "d" / f"{number}.heic").touch()
    save_image(tiny / "test" / "b" / "IMG_1", 0, format="JPEG")
    assert "d (test: 0)" in error_of(tiny)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tiny}: ") and " 7 files " in line and "6 .heic" in line and "1 without an ext" in line


def test_photographs_that_are_not_downloaded_are_counted(tiny, capsys):
    """iCloud's placeholders are hidden. A class of them is a class."""
    for name in ("a/.IMG_1.JPG.icloud", "d/.IMG_2.HEIC.icloud"):
        (tiny / "test" / name).parent.mkdir(exist_ok=True)
        (tiny / "test" / name).write_bytes(b"bplist00")
    assert "d (test: 0)" in error_of(tiny)
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 .icloud" in line and "download" in line


def test_a_folder_of_text_without_extensions_is_no_class(tiny, capsys):
    (tiny / "test" / "licenses").mkdir()
    for name in ("LICENSE", "README"):
        (tiny / "test" / "licenses" / name).write_text("\tUse them \u00e9verywhere.\n\n")
    assert count_splits(TINY, tiny, ("test",))["test"] == dict.fromkeys("abc", 4)
    unread, system = capsys.readouterr().out.splitlines()
    assert "licenses/LICENSE" in unread and "licenses" in system


def test_a_pipe_that_is_named_like_an_image_is_unreadable(tiny):
    expected = read(tiny)
    os.mkfifo(tiny / "test" / "a" / "9.jpg")
    assert "a/9.jpg" in error_of(tiny)
    assert_same(read(tiny, TINY._replace(skip_broken=True)), expected)


HEIC = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")
NOT_IMAGES = {
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "git lfs pull"),
    "HEIC": (HEIC, "JPEG"),
    "git-annex": (b"/annex/objects/SHA256E-s99--00.jpg\n", "git annex get"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "again"),
    "empty": (b"", "again"),
}


@pytest.mark.parametrize(("kind", "content", "fix"), [(k, *v) for k, v in NOT_IMAGES.items()], ids=NOT_IMAGES.keys())
def test_a_file_that_is_only_named_like_an_image_is_identified_and_counted(tiny, capsys, kind, content, fix):
    for name in ("a/4.jpg", "b/2.png", "c/0.png"):
        (tiny / "test" / name).write_bytes(content)
    (tiny / "test" / "c" / "1.png").write_text("damaged otherwise")
    message = error_of(tiny, OWN)
    assert str(tiny / "test" / "a" / "4.jpg") in message and kind in message and "3 of 13" in message and fix in message
    with pytest.raises(images.UnreadableError, match=f"{kind}.*{fix}"):
        read_image(tiny / "test" / "a" / "4.jpg", OWN)
    for _ in range(2):  # decoded, and from the cache
        read(tiny, OWN._replace(skip_broken=True))
        line = capsys.readouterr().out
        assert f"(3 {kind}" in line and " 4 unreadable images of 13 " in line


def test_file_name_extensions_ignore_case(tiny):
    for name in ("4.PNG", "5.jpg", "6.JPEG"):
        save_image(tiny / "test" / "a" / name, seed=0)
    assert list(read(tiny).counts) == [7, 4, 4]


def test_linked_class_folders_are_followed(tiny):
    expected = read(tiny)
    os.rename(tiny / "test" / "b", tiny.with_name("elsewhere"))
    (tiny / "test" / "b").symlink_to(tiny.with_name("elsewhere"), target_is_directory=True)
    assert_same(read(tiny), expected)


@pytest.mark.parametrize(
    "like", [OMNIGLOT, OMNIGLOT._replace(split_list=None, split_sizes=(20, 10, 10))], ids=["published", "split"]
)
def test_file_order_on_disk_does_not_matter(omniglot_like, tmp_path, monkeypatch, like):
    folder = tmp_path / "data"
    shutil.copytree(omniglot_like, folder, ignore=shutil.ignore_patterns(".cache"))
    expected = load_splits(like, folder, ("train", "test"))
    shutil.rmtree(folder / ".cache")
    random, walk = Random(0), os.walk

    def shuffled_walk(*args, **named):
        for folder, folders, files in walk(*args, **named):
            random.shuffle(folders)
            yield folder, folders, random.sample(files, len(files))

    monkeypatch.setattr(os, "walk", shuffled_walk)
    for split, classes in load_splits(like, folder, ("train", "test")).items():
        assert_same(classes, expected[split])


def unsplit(folder: Path) -> None:
    for name in "abc":
        os.rename(folder / "test" / name, folder / name)
    shutil.rmtree(folder / "train")
    (folder / "test").rmdir()


def only_text(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    (folder / "test" / "a").mkdir(parents=True)
    (folder / "test" / "a" / "0.txt").write_text("not an image")


WRONG_FOLDERS = {  # name -> (a function that spoils the folder, required parts of the error)
    "missing": (shutil.rmtree, ["{0}:", TINY.prepare, "--data_path"]),
    "a file": (lambda folder: shutil.rmtree(folder) or folder.write_text(""), ["{0}:", "--data_path"]),
    "empty": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), ["{0}:", TINY.prepare]),
    "only text": (only_text, ["{0}/test:", TINY.prepare]),
    "not split": (unsplit, ["{0}:", "--split", "train/<class>/"]),
    "link to its parent": (lambda folder: (folder / "test" / "a" / "up").symlink_to(".."), ["{0}/test/a/up:"]),
    "dangling link": (lambda folder: (folder / "test" / "a" / "4.png").symlink_to("4.png"), ["{0}/test/a/4.png:"]),
}


@pytest.mark.parametrize(("spoil", "named"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS.keys())
def test_wrong_folder_is_named(tiny, spoil, named):
    spoil(tiny)
    message = error_of(tiny, TINY._replace(any_size=True))
    assert all(part.format(tiny) in message for part in named), message


def test_unreadable_folder_is_named(tiny, monkeypatch):
    def scandir(folder, scandir=os.scandir):
        if folder == str(tiny / "test" / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir)  # permissions do not stop root
    assert str(tiny / "test" / "b") in error_of(tiny)


@pytest.mark.parametrize("hidden", ["", "test", "test/a/0.png"])
def test_what_may_not_be_read_is_not_called_missing_or_removed(hidden, tiny):
    """The folder of the data, one in it, or an image."""
    tiny.parent.chmod(0o755)
    locked = tiny / hidden if hidden else tiny.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny.parent)  # the folders above it are private, too
        folder = Path("tiny")
        locked.chmod(0)
        try:
            with unprivileged():
                message = error_of(folder, OWN)
        finally:
            locked.chmod(0o755)
    assert str(folder / hidden) in message and os.strerror(errno.EACCES) in message
    assert "remove" not in message and "prepare" not in message


def test_missing_classes_and_images_are_named(tiny):
    assert f"{tiny / 'val'}:" in error_of(tiny, splits=("train", "val"))
    assert "--num_classes=4" in error_of(tiny, way=4)
    for file in ("2.png", "3.png"):
        (tiny / "test" / "c" / file).unlink()
    message = error_of(tiny, shot=2, query=2)
    assert all(part in message for part in (str(tiny), "c (test: 2)", "--update_batch_size", "--num_query"))
    ImageTasks.from_folder(TINY, tiny, ("train",), 2, 2, 2)  # this split has enough images, and only it is checked


def test_all_classes_that_are_too_small_are_listed_before_an_image_is_decoded(tiny, opened):
    for split, name, kept in (("train", "a", 1), ("train", "c", 3), ("test", "b", 0)):
        for file in sorted((tiny / split / name).iterdir())[kept:]:
            file.rename(file.with_suffix(".heic"))
    message = error_of(tiny, splits=("train", "test"), shot=2, query=2)
    assert re.findall(r"\w \(\w+: \d\)", message) == ["a (train: 1)", "c (train: 3)", "b (test: 0)"]
    assert "--num_query" not in message  # a class with one image is too small for any
    assert error_of(tiny, splits=("train", "val")).startswith(str(tiny / "val"))
    assert opened == []


def test_optional_splits_are_counted_but_not_required(tiny, opened):
    (tiny / "test" / "b" / "0.png").unlink()
    optional = ("val", "test")
    tasks = ImageTasks.from_folder(TINY, tiny, ("train",), 2, 2, 2, optional=optional)
    assert tasks.counts == {"train": dict.fromkeys("abc", 4), "val": {}, "test": {"a": 4, "b": 3, "c": 4}}
    assert len(opened) == 12  # of train
    assert count_splits(TINY, tiny, (), SPLITS) == tasks.counts


def test_unreadable_images_do_not_count(tiny):
    (tiny / "test" / "b" / "2.png").write_bytes(b"not an image")
    assert "b (test: 3)" in error_of(tiny, TINY._replace(skip_broken=True), shot=2, query=2)


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path) -> Path:
    """One folder of ten classes with two images each."""
    for name, image in product("abcdefghij", range(2)):
        save_image(tmp_path / "letters" / name / f"{image}.png", seed=image)
    return tmp_path / "letters"


def test_shuffled_split_is_pinned(letters):
    """If it changed, new runs would train on the test classes of earlier ones."""

    def names(*sizes):
        classes = load_splits(OWN._replace(split_sizes=sizes), letters, SPLITS)
        return ["".join(classes[split].names) for split in SPLITS]

    assert names(6, 2, 2) == ["dfghij", "ae", "bc"]
    assert names(0, 0, 10) == ["", "", "abcdefghij"]


def test_wrong_splits_are_refused(letters, tiny):
    def named(folder, sizes, *parts, like=OWN):
        message = error_of(folder, like._replace(split_sizes=sizes))
        assert all(part in message for part in parts), message

    named(letters, (6, 2, 1), "--split=6,2,1", str(letters), "10 classes")
    named(letters, (6, 3, 1), "--num_classes=2", str(letters))
    named(tiny, (6, 2, 1), "--split=6,2,1", str(tiny))
    named(letters, (6, 2, 2), "--split=6,2,2", str(letters), like=OMNIGLOT)


def test_published_split_is_the_originals():
    """That of its data_generator.py on a sorted listing: shuffle with seed 1, split at 1,100 and 1,200."""
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 1623
    assert [len(PUBLISHED[split]) for split in SPLITS] == [1100, 100, 423]
    shuffled = sorted(CHARACTERS)
    Random(1).shuffle(shuffled)
    assert shuffled == CHARACTERS


def test_published_split_has_the_published_characters(shared):
    names = set()
    for archive in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(shared / "data" / "omniglot" / f"{archive}.zip") as opened_archive:
            drawings = [Path(name) for name in opened_archive.namelist() if name.endswith(".png")]
        names |= {f"{path.parts[-3]}/{path.parts[-2]}" for path in drawings}
    assert names == set(CHARACTERS)


def blank_omniglot(folder: Path, names) -> Path:
    """Make character folders with two drawings each, all hard links to one blank image."""
    folder.mkdir()
    blank = folder / "blank"
    Image.new("1", OMNIGLOT.size, 1).save(blank, "png")
    for name in names:
        (folder / name).mkdir(parents=True)
        for drawing in ("0.png", "1.png"):
            os.link(blank, folder / name / drawing)
    return folder


def names_of(folder: Path) -> dict[str, list[str]]:
    return {split: classes.names for split, classes in load_splits(OMNIGLOT, folder, SPLITS).items()}


def test_complete_omniglot_has_the_published_split(tmp_path, capsys):
    """Folders without images are ignored."""
    folder = blank_omniglot(tmp_path / "omniglot", CHARACTERS)
    for name in ("__pycache__", "strokes_background/Greek/character01", "old"):
        (folder / name).mkdir(parents=True)
    (folder / "__pycache__" / "resize_images.cpython-311.pyc").write_bytes(b"code")
    assert names_of(folder) == {split: sorted(PUBLISHED[split]) for split in SPLITS}
    assert all(classes.published for classes in load_splits(OMNIGLOT, folder, SPLITS).values())
    assert capsys.readouterr().out == ""


def test_part_of_omniglot_keeps_its_splits(tmp_path, capsys):
    part = {split: [name for name in PUBLISHED[split] if name < "C"] for split in SPLITS}
    folder = blank_omniglot(tmp_path / "omniglot", itertools.chain(*part.values()))
    assert names_of(folder) == {split: sorted(part[split]) for split in SPLITS}
    assert str(folder) in capsys.readouterr().out
    shutil.rmtree(folder)
    blank_omniglot(folder, PUBLISHED["train"][:10])
    assert "test (0)" in error_of(folder, OMNIGLOT, ("train", "test"), way=5)


@pytest.mark.parametrize("unknown", ["Klingon/character01", "another"])
def test_unknown_class_causes_a_new_shuffled_split(tmp_path, capsys, unknown):
    names = [*PUBLISHED["train"][:28], unknown, *PUBLISHED["test"][:11]]
    folder = blank_omniglot(tmp_path / "omniglot", names)
    shuffled = sorted(names)
    Random(1).shuffle(shuffled)
    assert (
        names_of(folder)
        == {  # 40 * 1,100 / 1,623
            split: sorted(part)
            for split, part in zip(SPLITS, (shuffled[:27], shuffled[27:29], shuffled[29:]), strict=True)
        }
    )
    assert str(folder) in capsys.readouterr().out


# -- names and layouts ------------------------------------------------------------------------------------------------

WNIDS = {split: images.published_classes(MINIIMAGENET)[split] for split in SPLITS}
FLAT = [wnid for split in SPLITS for wnid in WNIDS[split]]
PHOTOS = MINIIMAGENET._replace(size=(3, 2))


def fill(folder: Path, names, images=2) -> Path:
    """Make class folders with hard links to images whose colors differ between, but not within, classes."""
    for seed, name in enumerate(names):
        save_image(folder / name / "0.png", seed)
        for image in range(1, images):
            os.link(folder / name / "0.png", folder / name / f"{image}.png")
    return folder


def colors(classes: Classes) -> dict[str, bytes]:
    """Return the first image of each class."""
    return {name: classes.pixels[start].tobytes() for name, start in zip(classes.names, classes.starts, strict=True)}


def splits_of(like: Images, folder: Path) -> dict[str, Classes]:
    return load_splits(like, folder, SPLITS)


@pytest.mark.parametrize("prefix", ["", "images_background/", "a/python/images_evaluation/"])
def test_omniglot_is_recognized_below_other_folders(tmp_path, capsys, prefix):
    """By the classes' own names; each keeps its published split and its images."""
    part = {split: PUBLISHED[split][:3] for split in SPLITS}
    names = [name for split in SPLITS for name in part[split]]
    places = {name: f"{prefix if place % 2 else ''}{name}" for place, name in enumerate(names)}
    folder = fill(tmp_path / "data", places.values())
    like = OMNIGLOT._replace(size=(3, 2), channels=3)
    expected = {places[name]: name for name in names}
    for split, classes in splits_of(like, folder).items():
        assert classes.names == sorted(part[split])
        for place, name in expected.items():
            if name in part[split]:
                with Image.open(folder / place / "0.png") as image:
                    assert colors(classes)[name] == np.asarray(image).tobytes()
    assert "9 of the 1,623" in capsys.readouterr().out  # and not shuffled


def test_one_class_in_two_folders_is_refused(tmp_path):
    folder = fill(
        tmp_path / "data", ["images_background/Greek/character01", "images_background_small1/Greek/character01"]
    )
    assert "Greek/character01" in error_of(folder, OMNIGLOT)


@pytest.mark.parametrize("layout", ["{wnid}", "images/{wnid}", "{wnid}/images", "{split}/{wnid}", "{split}/x/{wnid}"])
def test_miniimagenet_in_any_layout_has_the_published_split(tmp_path, capsys, layout):
    names = [layout.format(split=split, wnid=wnid) for split in SPLITS for wnid in WNIDS[split]]
    loaded = splits_of(PHOTOS, fill(tmp_path / "data", names))
    assert {split: classes.names for split, classes in loaded.items()} == {s: sorted(WNIDS[s]) for s in SPLITS}
    assert all(classes.published for classes in loaded.values())
    assert capsys.readouterr().out == ""


def test_only_exactly_the_published_classes_are_published(tmp_path, capsys):
    """The line printed names the others. --split is not advised where there is a published split."""
    folder = fill(tmp_path / "flat", FLAT)
    asked = splits_of(PHOTOS._replace(split_sizes=(64, 16, 20)), folder)
    assert not any(classes.published for classes in asked.values())
    moved = [name for split in SPLITS for name in asked[split].names if name not in WNIDS[split]]
    printed = capsys.readouterr().out
    assert f"{len(moved)} of 100" in printed and moved[0] in printed

    (folder / FLAT[0]).rename(folder / "n99999999")
    message = error_of(folder, PHOTOS)
    assert "n99999999" in message and "--split" not in message and PHOTOS.prepare in message
    unknown = splits_of(PHOTOS._replace(split_sizes=(64, 16, 20)), folder)
    assert not any(classes.published for classes in unknown.values())
    assert "n99999999" in capsys.readouterr().out

    for name, names in {
        "another": [*WNIDS["test"][1:], "n99999999"],
        "one less": WNIDS["test"][1:],
        "one more": [*WNIDS["test"], WNIDS["train"][0]],
    }.items():
        folder = fill(tmp_path / name, [f"test/{wnid}" for wnid in names])
        assert not load_splits(PHOTOS, folder, ("test",))["test"].published
        assert str(folder) in capsys.readouterr().out
    folder = fill(tmp_path / "whole", [f"test/{wnid}" for wnid in WNIDS["test"]])
    assert load_splits(PHOTOS, folder, ("test",))["test"].published
    assert not load_splits(PHOTOS._replace(split_list=None), folder, ("test",))["test"].published
    fc100 = DATASETS["fc100"].images._replace(size=(3, 2))
    cifar = images.published_classes(DATASETS["cifarfs"].images)
    folder = fill(tmp_path / "cifar", [f"{split}/{name}" for split in SPLITS for name in cifar[split]])
    assert not any(classes.published for classes in splits_of(fc100, folder).values())


SPELLED = [
    ("Train", "Val", "Test"),
    ("TRAIN", "VAL", "TEST"),
    ("train", "validation", "test"),
    ("training", "valid", "testing"),
    ("Train", "Validation", "test"),
]


@pytest.mark.parametrize("spelled", SPELLED, ids="-".join)
def test_every_spelling_of_the_splits_is_accepted(tmp_path, spelled):
    names = [f"{split}/{split}{label}" for split in spelled for label in "ab"]
    loaded = splits_of(OWN, fill(tmp_path / "data", names))
    assert [classes.names for classes in loaded.values()] == [[f"{name}a", f"{name}b"] for name in spelled]
    assert "--split=2,2,2" in error_of(tmp_path / "data", OWN._replace(split_sizes=(2, 2, 2)))


WRONG_LAYOUTS = {  # name -> (class folders, required parts of the error)
    "one folder too deep": (["my/train/a", "my/val/b", "my/test/c"], ["{0}/my as"]),
    "one folder too deep, other spelling": (["my/Train/a", "my/valid/b", "my/TEST/c"], ["{0}/my as"]),
    "without val": (["train/a", "test/b"], ["{0}/val:", "test, train", "train/<class>/"]),
    "an unknown spelling": (["train/a", "dev/b", "test/c"], ["{0}/val:", "dev"]),
    "two spellings": (["train/a", "val/b", "validation/c", "test/d"], ["{0}:", "val and validation"]),
    "splits in classes": (["a/train", "a/test", "b/train", "b/test"], ["{0}:", "train/<class>/"]),
    "splits in a split": (["train/train/a", "train/test/b", "val/c", "test/d"], ["{0}/train:", "test, train"]),
    "images without classes": (["train", "val", "test"], ["{0}/train:", OWN.prepare]),
    "classes alone": (["a", "b", "c"], ["{0}:", "a, b, c", "train/<class>/", "--split"]),
}


@pytest.mark.parametrize(("names", "named"), WRONG_LAYOUTS.values(), ids=WRONG_LAYOUTS.keys())
def test_wrong_layouts_are_refused(tmp_path, opened, names, named):
    """In one line that says what was found, before any image is read. --split does not mix the user's own splits."""
    folder = fill(tmp_path / "data", names)
    message = error_of(folder, OWN, splits=SPLITS)
    assert all(part.format(folder) in message for part in named), message
    if any("/" in name or name in SPLITS for name in names):
        assert "--split" not in message
        error_of(folder, OWN._replace(split_sizes=(1, 1, len(names) - 2)), splits=SPLITS)
    assert not opened


def test_a_class_may_be_called_train(tmp_path):
    """As in CIFAR-100."""
    names = ["apple", "train", "whale"]
    folder = fill(tmp_path / "flat", names)
    assert load_splits(OWN._replace(split_sizes=(0, 0, 3)), folder, ("test",))["test"].names == names
    cifar = fill(tmp_path / "cifar", [f"test/{name}" for name in names])
    assert load_splits(OWN, cifar, ("test",))["test"].names == names


@pytest.mark.parametrize(
    "parents", [("meta_train", "meta_test"), ("x/train ", "x/2. Testing"), ("images-val", "TRAIN_1")]
)
def test_folders_that_seem_to_be_splits_are_not_mixed(tmp_path, opened, parents):
    names = [f"{parent}/{label}" for parent in parents for label in "abc"]
    folder = fill(tmp_path / "data", names)
    message = error_of(folder, OWN._replace(split_sizes=(2, 2, 2)), splits=SPLITS)
    assert all(parent.rpartition("/")[2] in message for parent in parents)
    assert not opened
    flat = fill(tmp_path / "flat", ["train station", "test tube", "birds/constrained/valley", "training-shoe"])
    splits_of(OWN._replace(split_sizes=(2, 1, 1)), flat)


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("sizes", [(2, 1, 1), None], ids=["split", "folders"])
def test_nfc_and_nfd_names_give_the_same_classes(tmp_path, sizes):
    """Sorted alike, as are the images of a class: a composed é is after z, a decomposed one between e and f."""
    loaded, tasks = [], []
    for form, accented in (("nfc", NFC), ("nfd", NFD)):
        names = [accented, "cafz", "cafez", "a"]
        folder = fill(tmp_path / form, names if sizes else [f"{s}/{name}" for s in SPLITS for name in names])
        parent = folder if sizes else folder / "test"
        for seed, file in enumerate(("cafz", accented, "cafez")):
            save_image(parent / "a" / f"{file}.png", 100 + seed)
        like = OWN._replace(split_sizes=sizes)
        loaded.append(splits_of(like, folder))
        way = 1 if sizes else 3
        tasks.append(ImageTasks(like, loaded[-1], way, 1, 1).draw(0, "test", 0, 50))
    for split in SPLITS:
        assert loaded[0][split].names == loaded[1][split].names == sorted(loaded[0][split].names)
        assert_same(loaded[1][split], loaded[0][split])
    assert NFC in {name for split in SPLITS for name in loaded[1][split].names}
    for one, other in zip(*tasks, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_name_in_two_unicode_forms_is_refused(tmp_path):
    names = [f"test/{name}" for name in (NFC, NFD, "b")]
    folder = fill(tmp_path / "data", names)
    if len(os.listdir(folder / "test")) == 3:  # a file system may merge them
        assert f"{folder / 'test'}:" in error_of(folder, OWN)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_second_start_decodes_nothing(tiny, opened, capsys):
    expected = read(tiny)
    assert len(opened) == 12
    os.rename(tiny, tiny.with_name("moved"))
    assert_same(read(tiny.with_name("moved")), expected)
    assert len(opened) == 12
    assert sorted(os.listdir(tiny.with_name("moved") / ".cache")) == ["test.json", "test.npy"]
    assert capsys.readouterr().out == ""


def other_pixels(folder):
    file = folder / "a" / "0.png"
    before = file.stat()
    save_image(file, seed=99, compress_level=0)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert file.stat().st_size == before.st_size


def other_length(folder):
    file = folder / "a" / "0.png"
    save_image(file, seed=99, compress_level=9)
    os.utime(file, (1e9, 1e9))


CHANGES = {
    "other pixels": other_pixels,
    "other length, same time": other_length,
    "image added": lambda folder: save_image(folder / "a" / "00.png", seed=99),
    "image removed": lambda folder: (folder / "a" / "0.png").unlink(),
    "image renamed": lambda folder: os.rename(folder / "a" / "0.png", folder / "a" / "9.png"),
    "image moved": lambda folder: os.rename(folder / "a" / "3.png", folder / "b" / "00.png"),
    "class renamed": lambda folder: os.rename(folder / "a", folder / "d"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_folder_is_noticed(tiny, change):
    read(tiny)
    change(tiny / "test")
    expected = uncached(tiny)
    for _ in range(2):
        assert_same(read(tiny), expected)


def test_each_size_and_color_has_its_own_cache(tiny):
    """Without --image_size, a different size is an error, even if the folder is cached."""
    read(tiny)
    assert read(tiny, TINY._replace(channels=1)).pixels.shape[1:] == (3, 2, 1)
    with pytest.raises(InputError, match=str(tiny)):
        read(tiny, TINY._replace(size=(2, 3)))
    for size in ((3, 2), (2, 2)):
        assert read(tiny, OWN._replace(size=size)).pixels.shape[1:3] == size
    names = {path.stem for path in (tiny / ".cache").iterdir()}
    assert names == {"test", "test_3x2x3", "test_2x2x3"}


class Hostile:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


DAMAGES = {
    "array missing": ("test.npy", os.remove),
    "array truncated": ("test.npy", lambda file: os.truncate(file, file.stat().st_size - 1)),
    "array header damaged": ("test.npy", lambda file: file.write_bytes(file.read_bytes().replace(b"}", b"("))),
    "array of a different shape": ("test.npy", lambda file: np.save(file, np.zeros((11, 3, 2, 3), np.uint8))),
    "array of pickles": ("test.npy", lambda file: np.save(file, [Hostile(file.with_name("made"))], allow_pickle=True)),
    "array is a pickle": ("test.npy", lambda file: file.write_bytes(pickle.dumps(Hostile(file.with_name("made"))))),
    "index missing": ("test.json", os.remove),
    "index truncated": ("test.json", lambda file: os.truncate(file, file.stat().st_size - 1)),
    "index is a list": ("test.json", lambda file: file.write_text("[1]")),
    "index of an old format": (
        "test.json",
        lambda file: file.write_text(file.read_text().replace(": 4,", ": 3,", 1)),
    ),
}


@pytest.mark.parametrize("name, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_cache_is_rebuilt(tiny, opened, name, damage):
    expected = read(tiny)
    file = tiny / ".cache" / name
    before = file.read_bytes()
    damage(file)
    opened.clear()
    assert_same(read(tiny), expected)
    assert len(opened) == 12
    assert file.read_bytes() == before
    assert sorted(os.listdir(file.parent)) == ["test.json", "test.npy"]


def failing(error: OSError):
    def fail(*_args, **_named):
        raise error

    return fail


WRITE_ERRORS = {
    "folder": (Path, "mkdir", OSError(errno.EROFS, "Read-only file system")),
    "full disk": (np.lib.format, "write_array_header_1_0", OSError(errno.ENOSPC, "No space left on device")),
    "moving in": (os, "replace", OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("module, function, error", WRITE_ERRORS.values(), ids=WRITE_ERRORS.keys())
def test_unwritable_cache_causes_one_warning(tiny, monkeypatch, capsys, module, function, error):
    """The arrays stay in memory."""
    (tiny / "test" / "a" / "0.png").write_text("not an image")
    skipping = OWN._replace(skip_broken=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, failing(error))
        found = load_splits(skipping, tiny, ("train", "test"))
    lines = capsys.readouterr().out.splitlines()
    assert [str(tiny / ".cache") in line for line in lines] == [True, False]
    assert "a/0.png" in lines[1]
    assert not list(tiny.glob(".cache/*"))
    assert_same(found["test"], read(tiny, skipping))


def test_only_one_of_two_processes_decodes(tiny, monkeypatch, opened, capsys):
    """The second waits for the cache. A thread plays its part."""
    decode, second = images._decode, []

    def slow(*arguments):
        """Start the second reader while the first decodes, and give it time to decode, too."""
        if not second:
            second.append(ThreadPoolExecutor().submit(read, tiny))
            wait(second, timeout=0.3)
        return decode(*arguments)

    monkeypatch.setattr(images, "_decode", slow)
    assert_same(read(tiny), second[0].result())
    assert len(opened) == 12
    assert str(tiny / ".cache") in capsys.readouterr().out


@pytest.mark.parametrize("moved", [0, 1], ids=["before the array", "between array and index"])
def test_kill_while_writing_the_cache_does_no_harm(tiny, monkeypatch, moved):
    """Even if the images described by the old index are restored."""
    expected = read(tiny)
    original = tiny.with_name("original")
    shutil.copytree(tiny / "test", original)
    other_pixels(tiny / "test")

    class Killed(BaseException):
        pass

    replace, done = os.replace, []

    def replace_until_killed(source, target):
        if len(done) == moved:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_until_killed)
        read(tiny)
    shutil.rmtree(tiny / "test")
    shutil.copytree(original, tiny / "test")  # keeps modification times
    assert_same(read(tiny), expected)


def test_decoded_images_are_memory_mapped(tiny, monkeypatch):
    """A data set may be larger than the memory."""
    monkeypatch.setattr(images, "DECODED_AHEAD", 5)  # three chunks for 12 images
    classes = load_splits(TINY, tiny, ("test",))["test"]
    assert isinstance(classes.pixels, np.memmap)
    np.testing.assert_array_equal(classes.pixels, np.load(tiny / ".cache" / "test.npy"))
    with Image.open(tiny / "test" / "c" / "3.png") as image:
        np.testing.assert_array_equal(classes.pixels[-1], image)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image_is_complete_or_refused(tmp_path, suffix):
    file = tmp_path / "test" / "a" / f"0{suffix}"
    save_image(file, seed=0, size=(16, 16))
    like = TINY._replace(size=(16, 16))
    whole, content, refused = read_image(file, like), file.read_bytes(), 0
    lengths = [*range(0, len(content) - 40, 7), *range(len(content) - 40, len(content))]
    for length in lengths:
        file.write_bytes(content[:length])
        try:
            np.testing.assert_array_equal(read_image(file, like), whole)  # only bytes after the pixels were missing
        except InputError as error:
            refused += 1
            assert str(file) in str(error)
            assert "\n" not in str(error)
    assert refused >= len(lengths) - 20  # a PNG ends with checksums and an end marker


def test_image_of_a_wrong_size_is_named(tiny):
    file = tiny / "test" / "b" / "2.png"
    save_image(file, seed=0, size=(2, 3))
    message = error_of(tiny)
    assert str(file) in message
    assert TINY.prepare in message


def squares(*colors: tuple[int, ...], mode: str | None = None) -> Image.Image:
    """Return a row of 2x2 squares."""
    row = np.array(colors, np.uint8).repeat(2, 0)
    return Image.fromarray(np.stack([row, row])).convert(mode)


WHITE, BLACK, RED, GREEN, HALF_RED = (255,) * 3, (0,) * 3, (255, 0, 0), (0, 255, 0), (255, 127, 127)


def orientation_tag(orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def palette_with_transparency() -> Image.Image:
    image = squares(RED, GREEN).quantize(2)
    image.info["transparency"] = image.getpixel((2, 0))  # green
    return image


RGBA = squares((*RED, 255), (*GREEN, 0), (*RED, 128))
UPRIGHT = squares(RED, GREEN)
KINDS = {
    "gray": ("png", squares(WHITE, RED, mode="L"), {}, [WHITE, (76,) * 3]),
    "1-bit": ("png", squares(WHITE, BLACK, mode="1"), {}, [WHITE, BLACK]),
    "palette": ("gif", squares(RED, GREEN, mode="P"), {}, [RED, GREEN]),
    "palette with transparency": ("png", palette_with_transparency(), {}, [RED, WHITE]),
    "alpha": ("png", RGBA, {}, [RED, WHITE, HALF_RED]),
    "alpha, lossless webp": ("webp", RGBA, {"lossless": True}, [RED, WHITE, HALF_RED]),
    "gray with alpha": ("png", RGBA.convert("LA"), {}, [(76,) * 3, WHITE, (165,) * 3]),
    "CMYK": (
        "tif",
        Image.merge("CMYK", squares(BLACK, RED).split() + squares(BLACK, BLACK, mode="L").split()),
        {},
        [WHITE, (0, 255, 255)],
    ),
    "turned": ("png", UPRIGHT.rotate(90, expand=True), orientation_tag(6), [RED, GREEN]),
    "mirrored": ("tif", squares(GREEN, RED), orientation_tag(2), [RED, GREEN]),
    "jpeg 2000": ("jp2", UPRIGHT, {}, [RED, GREEN]),
    "bitmap": ("BMP", UPRIGHT, {}, [RED, GREEN]),
    "wrong ending": ("jpg", UPRIGHT, {"format": "PNG"}, [RED, GREEN]),
}


@pytest.mark.parametrize(("suffix", "image", "options", "colors"), KINDS.values(), ids=KINDS.keys())
def test_every_image_type_is_read_upright_on_white(tmp_path, suffix, image, options, colors):
    file = tmp_path / f"image.{suffix}"
    image.save(file, **options)
    shape = OWN._replace(size=(2, 2 * len(colors)))
    np.testing.assert_array_equal(read_image(file, shape), np.asarray(squares(*colors)))
    gray = read_image(file, shape._replace(channels=1))
    np.testing.assert_array_equal(gray[:, :, 0], squares(*colors, mode="L"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_scaled(tmp_path, suffix):
    Image.fromarray(np.array([[0, 300, 65535 // 2, 65535]], np.uint16)).save(tmp_path / f"image.{suffix}")
    gray = read_image(tmp_path / f"image.{suffix}", OWN._replace(size=(1, 4), channels=1))
    assert list(gray.ravel()) == [0, 1, 127, 255]


RAMP, EXPECTED = [0, 21845, 43690, 65535], [0, 85, 170, 255]


def png_with_transparent_black(file: Path) -> None:
    Image.fromarray(np.array([RAMP], np.uint16)).save(file)
    content = file.read_bytes()
    chunk = b"tRNS" + bytes(2)
    file.write_bytes(content[:33] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])


def tiff_whose_white_is_0(file: Path) -> None:
    Image.fromarray(np.array([RAMP], np.uint16)).save(file)
    entry = struct.pack("<HHI", 262, 3, 1)
    content = file.read_bytes()
    assert content.count(entry + b"\1") == 1
    file.write_bytes(content.replace(entry + b"\1", entry + b"\0"))


def pgm_of_12_bits(file: Path) -> None:
    file.write_bytes(b"P5 4 1 4095\n" + np.array([0, 1365, 2730, 4095], ">u2").tobytes())


@pytest.mark.parametrize(
    ("suffix", "write", "expected"),
    [
        ("png", png_with_transparent_black, [255, *EXPECTED[1:]]),
        ("tif", tiff_whose_white_is_0, EXPECTED[::-1]),
        ("pgm", pgm_of_12_bits, EXPECTED),
    ],
    ids=["transparent", "inverted", "scaled"],
)
def test_16_bit_gray_arrives_as_a_viewer_shows_it(tmp_path, suffix, write, expected):
    file = tmp_path / f"image.{suffix}"
    write(file)
    assert list(read_image(file, OWN._replace(size=(1, 4), channels=1)).ravel()) == expected


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_a_gray_tiff_is_turned(tmp_path, dtype, white):
    file = tmp_path / "image.tif"
    Image.fromarray(np.array([[white, white, 0, 0]] * 2, dtype)).save(file, tiffinfo={274: 6})
    turned = read_image(file, OWN._replace(size=(4, 2), channels=1))
    np.testing.assert_array_equal(turned[..., 0], [[255, 255]] * 2 + [[0, 0]] * 2)


def shallow(mode: str, bits: int, suffix: str, file: Path) -> Path:
    """Write an image of the values that `bits` bits can have, stored in 16 bits per channel."""
    values = np.linspace(0, 2**bits - 1, 4).astype(np.uint16)
    if mode == "gray":
        Image.fromarray(values[None]).save(file.with_suffix(suffix))
    else:  # Pillow cannot write 16 bits per color
        row = b"\0" + np.repeat(values, 3).astype(">u2").tobytes()
        chunks = (b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")
        content = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        file.with_suffix(suffix).write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return file.with_suffix(suffix)


@pytest.mark.parametrize(("mode", "suffix"), [("gray", ".png"), ("gray", ".tif"), ("gray", ".jp2"), ("color", ".png")])
def test_16_bit_images_of_fewer_bits_are_refused(tmp_path, mode, suffix):
    """A viewer cannot know their white, and they would be nearly black."""
    like = OWN._replace(size=(1, 4))
    for bits in (10, 12, 14):
        with pytest.raises(images.UnreadableError, match="16 bits"):
            read_image(shallow(mode, bits, suffix, tmp_path / f"{bits}"), like)
    whole = read_image(shallow(mode, 16, suffix, tmp_path / "16"), like)
    np.testing.assert_array_equal(whole[0, :, 0], [0, 85, 170, 255])
    black = shallow(mode, 0, suffix, tmp_path / "black")
    assert not read_image(black, like).any()


def exif_of(*entries: bytes, count: int | None = None) -> bytes:
    """Return a big-endian EXIF block with these 12-byte entries, and 8 zero bytes for a value."""
    count = len(entries) if count is None else count
    return b"MM\0*" + struct.pack(">IH", 8, count) + b"".join(entries) + bytes(12)


TURNED = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
EXIF = {  # name -> (block, whether the rotation can be read)
    "truncated": (b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03", False),
    "without a header": (bytes.fromhex("0008000201120003"), False),
    "text": (b"not an EXIF block", False),
    "too many entries": (exif_of(TURNED, count=999), True),
    "signed resolution": (exif_of(TURNED, struct.pack(">HHII", 0x011A, 10, 1, 10 + 24)), True),
    "negative resolution": (
        exif_of(TURNED, struct.pack(">HHII", 0x011A, 10, 1, 10 + 24))[:-12] + struct.pack(">iiI", -72, 1, 0),
        True,
    ),
}


@pytest.mark.parametrize(("block", "turned"), EXIF.values(), ids=EXIF.keys())
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_damaged_exif_block_costs_at_most_the_rotation(tmp_path, suffix, block, turned):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2] = 255
    file = tmp_path / f"image.{suffix}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}, "png": {}}[suffix]
    Image.fromarray(pixels).save(file, exif=(b"Exif\0\0" if suffix == "jpg" else b"") + block, **options)
    expected = np.rot90(pixels, -1) if turned else pixels
    with images.pillow_warnings(str):
        found = read_image(file, OWN._replace(size=expected.shape[:2]))
    np.testing.assert_allclose(found, expected, atol=3)


def test_any_size_is_resized_without_cropping(tmp_path):
    for size in ((40, 10), (10, 40), (2, 2)):
        halves = Image.new("RGB", size, "red")
        halves.paste("lime", (0, 0, size[0] // 2, size[1]))
        halves.save(tmp_path / "image.png")
        found = read_image(tmp_path / "image.png", OWN._replace(size=(2, 2)))
        np.testing.assert_allclose(found, [[GREEN, RED]] * 2, atol=30)


def test_omniglot_is_resized_as_its_script_does(tmp_path):
    """1-bit drawings stay binary; others are resized smoothly."""
    drawing = Image.fromarray(np.random.default_rng(0).integers(0, 2, (105, 105)).astype(bool))
    drawing.save(tmp_path / "image.png")
    like = OMNIGLOT._replace(any_size=True)
    expected = np.asarray(drawing.resize((28, 28), Image.LANCZOS).convert("L"))
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", like)[..., 0], expected)
    drawing.convert("L").save(tmp_path / "image.png")
    assert len(np.unique(read_image(tmp_path / "image.png", like))) > 2


def bomb(file: Path) -> None:
    """Write a PNG that declares 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))


def truncated_jpeg(file: Path) -> None:
    save_image(file, 0, size=(64, 64), format="JPEG")
    os.truncate(file, file.stat().st_size // 2)


BROKEN = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not an image\n" * 20),
    "PostScript": lambda file: file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 3\n"),  # can run code
    "bomb": bomb,
    "truncated": truncated_jpeg,
    "floats": lambda file: Image.new("F", (2, 3)).save(file, format="TIFF"),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN.keys())
def test_unreadable_image_is_reported_by_name(tiny, capsys, opened, spoil):
    """As an error, or with --skip_broken as left out."""
    file = tiny / "test" / "b" / "2.png"
    spoil(file)
    message = error_of(tiny, OWN)
    assert str(file) in message
    assert "--skip_broken" in message

    skipping = OWN._replace(skip_broken=True)
    expected = read(tiny, skipping)
    count = len(opened)
    assert str(file) in error_of(tiny, OWN)  # although the cache leaves it out
    failed = len(opened)
    assert_same(read(tiny, skipping), expected)
    assert count < failed == len(opened)  # the error does not affect the cache
    assert [line.endswith(": b/2.png") for line in capsys.readouterr().out.splitlines()] == [True, True]

    file.unlink()
    assert_same(read(tiny), expected)
    assert capsys.readouterr().out == ""


def test_images_above_pillows_limit_are_unreadable(tiny, monkeypatch, capsys):
    save_image(tiny / "test" / "b" / "2.png", seed=0, size=(5, 5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow only warns up to twice the limit
    assert list(read(tiny, OWN._replace(skip_broken=True)).counts) == [4, 3, 4]
    assert "b/2.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["EIO", "EMFILE", "ENOENT"])
def test_system_error_is_not_skipped(tiny, monkeypatch, name):
    """Even with --skip_broken: the image may be readable at the next start."""
    skipping, number = OWN._replace(skip_broken=True), getattr(errno, name)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", failing(OSError(number, os.strerror(number))))
        assert str(tiny / "test" / "a") in error_of(tiny, skipping)
    assert list(read(tiny, skipping).counts) == [4, 4, 4]


def test_repeated_pillow_warnings_become_one_line(tiny, capsys, monkeypatch):
    transpose = images.ImageOps.exif_transpose

    def warn(image, **options):
        warnings.warn("Truncated File Read", stacklevel=1)
        transpose(image, **options)

    monkeypatch.setattr(images.ImageOps, "exif_transpose", warn)
    read(tiny)
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert "Truncated File Read" in line
    assert printed.err == ""


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\udcff"], ids=["newline", "terminal command", "undecodable"])
def test_any_file_name_is_printed_on_one_line(name, tiny, capsys):
    folder = tiny.rename(tiny.with_name(name))
    os.rename(folder / "test" / "a", folder / "test" / name)
    (folder / "test" / name / f"{name}.png").write_text("not an image")
    assert read(folder, OWN._replace(skip_broken=True)).counts.sum() == 12
    assert capsys.readouterr().out.removesuffix("\n").isprintable()
    assert error_of(folder, OWN).isprintable()


def test_identical_and_blank_images_are_reported_with_their_numbers(tiny, capsys):
    """Decoded or from the cache; in a test also those of the training split, as far as they are cached."""
    shutil.copytree(tiny / "train", tiny / "val")
    for place, file in enumerate(sorted((tiny / "val").glob("*/*"))):
        save_image(file, 100 + place)
    a, b, blank = tiny / "train" / "a", tiny / "train" / "b", Image.new("LA", (2, 3), (255, 0))
    shutil.copy(a / "0.png", a / "4.png")
    shutil.copy(a / "1.png", b / "4.png")
    shutil.copy(a / "1.png", b / "5.png")
    shutil.copy(b / "2.png", tiny / "val" / "c" / "4.png")
    shutil.copy(b / "3.png", tiny / "test" / "b" / "4.png")
    for name in ("train/a/5.png", "train/b/6.png", "val/a/4.png"):
        blank.save(tiny / name)
    for _ in range(2):
        load_splits(OWN, tiny, ("train", "val"))
        found = {
            what: (int(count.replace(",", "")), paths.split(", "))
            for count, what, paths in re.findall(rf"{tiny}: has (\S+) ([^;]+); [^:]+: (.*)", capsys.readouterr().out)
        }
        assert found == {
            "identical images in one class": (1, ["train/a/4.png = train/a/0.png"]),
            "identical images in two classes": (2, [f"train/b/{name}.png = train/a/1.png" for name in (4, 5)]),
            "identical images in two splits": (1, ["val/c/4.png = train/b/2.png"]),
            "blank images": (3, ["train/a/5.png", "train/b/6.png", "val/a/4.png"]),
        }
    load_splits(OWN, tiny, ("test",))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "test/" in line)
    assert "two splits" in line and line.endswith("test/b/4.png = train/b/3.png")
    (tiny / "test" / "b" / "4.png").unlink()
    load_splits(OWN, tiny, ("test",))
    assert "test/" not in capsys.readouterr().out


def test_identical_images_of_a_shuffled_split_are_reported(letters, capsys):
    load_splits(OWN._replace(split_sizes=(6, 2, 2)), letters, ("train", "val"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "two splits" in line)
    assert "b/0.png" in line  # of test


def test_published_data_sets_are_not_searched_for_identical_images(tmp_path, capsys):
    """Nor do their caches change."""
    folder = fill(tmp_path / "data", FLAT)
    splits_of(PHOTOS, folder)
    assert capsys.readouterr().out == ""
    (index,) = (folder / ".cache").glob("*.json")
    assert json.loads(index.read_text()).keys() == {"format", "shape", "files", "broken", "aspects"}


# -- crops ------------------------------------------------------------------------------------------------------------

CROPS = OWN._replace(size=(16, 16), kept=32, augment=True)


def words(count, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, images.CROP_WORDS), np.uint64)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Five classes per split with six photographs each, in several shapes. Red grows to the right, green downward."""
    root = tmp_path_factory.mktemp("photographs")
    for split, label in product(SPLITS, range(5)):
        folder = root / split / f"{split}{label}"
        folder.mkdir(parents=True)
        for number, (width, height) in enumerate([(60, 40), (40, 60), (50, 50), (90, 30), (64, 48), (33, 32)]):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[..., 0] = np.linspace(0, 255, width)
            pixels[..., 1] = np.linspace(0, 255, height)[:, None]
            pixels[..., 2] = 50 * label
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("aspect", [0.5, 1.0, 3.0])
def test_random_boxes_have_the_documented_areas_and_shapes(aspect):
    aspects, uniform = np.full(20_000, aspect), np.random.default_rng(0).random((20_000, 2 * images.ATTEMPTS + 2))
    left, top, right, bottom = images.random_boxes(uniform, aspects).T
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1 + 1e-12
    ratio, area = aspect * (right - left) / (bottom - top), (right - left) * (bottom - top)
    assert ratio.min() >= 3 / 4 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    assert area.min() >= 0.08 and area.max() <= 1 + 1e-9
    tried = 0.08 + 0.92 * uniform[:, : images.ATTEMPTS]
    tried_ratio = 3 / 4 * (16 / 9) ** uniform[:, images.ATTEMPTS : 2 * images.ATTEMPTS]  # its logarithm is uniform
    largest = min(1, aspect / (3 / 4)) * min(aspect, 4 / 3) / aspect
    is_largest = np.isclose(area, largest)
    same = np.isclose(area[:, None], tried) & np.isclose(ratio[:, None], tried_ratio)
    assert (same.any(1) | is_largest).all()
    assert is_largest.mean() < 0.1
    for side, column in ((left, -2), (top, -1)):  # each position has its own random number
        assert np.corrcoef(side[area < 0.3], uniform[area < 0.3, column])[0, 1] > 0.6


def test_centered_boxes():
    """If no attempt fits, the largest centered box; at test, 84 pixels of a photograph whose short side is 96."""
    uniform = np.ones((2, 2 * images.ATTEMPTS + 2)) * 0.999
    np.testing.assert_allclose(
        images.random_boxes(uniform, np.array([4.0, 0.25])), [[1 / 3, 0, 2 / 3, 1], [0, 1 / 3, 1, 2 / 3]], atol=1e-9
    )
    boxes = images.center_boxes(np.array([1.0, 1.5, 0.5]), (84, 84))
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], [84 / 96, 84 / 144, 84 / 96])
    np.testing.assert_allclose(boxes[:, 3] - boxes[:, 1], [84 / 96, 84 / 96, 84 / 192])
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, 0.5)


def test_colors_are_jittered_as_documented():
    """On a uniform photograph: brightness scales, contrast moves to the mean gray, saturation to the pixel's gray."""
    colors = np.random.default_rng(0).integers(60, 160, (300, 3))
    pixels = np.broadcast_to(colors[:, None, None].astype(np.uint8), (300, 8, 8, 3))
    crops = images.random_crops(pixels, np.ones(300), words(300), (8, 8))
    assert (crops == crops[:, :1, :1]).all()
    uniform = (words(300) >> np.uint64(11)) * 2.0**-53
    factors, orders = 0.6 + 0.8 * uniform[:, -4:-1], (6 * uniform[:, -1]).astype(int)
    assert set(orders) == set(range(6))
    for color, expected_factors, order, crop in zip(colors, factors, orders, crops, strict=True):
        x = color.astype(float)
        for which in images.ORDERS[order]:
            gray = x @ [0.299, 0.587, 0.114]
            target = (0, gray, gray)[which]
            x = np.clip(target + expected_factors[which] * (x - target), 0, 255)
        np.testing.assert_allclose(crop[0, 0], x, atol=4)  # Pillow rounds after each step


def test_half_of_random_crops_are_flipped():
    ramp = np.broadcast_to(np.linspace(20, 120, 32).astype(np.uint8)[:, None], (32, 32, 3))
    crops = images.random_crops(np.stack([ramp] * 400), np.ones(400), words(400), (8, 8)).astype(int)
    flipped = crops[:, 4, 0, 0] > crops[:, 4, -1, 0]
    uniform = (words(400) >> np.uint64(11)) * 2.0**-53
    np.testing.assert_array_equal(flipped, uniform[:, -5] < 0.5)
    assert 0.4 < flipped.mean() < 0.6


def test_normalization_uses_imagenet_statistics():
    """Mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225, as in PyTorch's models; denormalize inverts it."""
    black_and_white = np.array([[0, 0, 0], [1, 1, 1]], np.float32)
    normalized = images.normalize(black_and_white)
    np.testing.assert_allclose(normalized, [[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]], atol=1e-4)
    np.testing.assert_allclose(images.denormalize(normalized), black_and_white, atol=1e-6)


def test_center_crop_keeps_the_aspect_ratio(photographs):
    """Red and green encode the position of a pixel."""
    for path in sorted((photographs / "train" / "train0").iterdir()):
        with Image.open(path) as image:
            width, height = image.size
        crop = read_image(path, CROPS).astype(float)
        for channel, axis, side in ((0, 1, width), (1, 0, height)):
            part = (16 / 18) * min(width, height) / side
            expected = 255 * (0.5 + part * (np.arange(16) + 0.5 - 8) / 16)
            np.testing.assert_allclose(crop[..., channel].mean(1 - axis), expected, atol=5)


def test_crop_tasks_depend_only_on_seed_split_and_number(photographs):
    """The cache keeps whole photographs and their aspects."""
    for _ in range(2):
        source = ImageTasks.from_folder(CROPS, photographs, ("train", "val"), 5, 1, 2)
        np.testing.assert_allclose(source.classes["train"].aspects[:6], [1.5, 2 / 3, 1, 3, 4 / 3, 33 / 32])
        assert source.classes["train"].pixels.shape == (30, 32, 32, 3)
    (cached,) = (photographs / ".cache").glob("train*.json")
    assert cached.stem == "train_32x32x3_whole"
    whole = source.draw(3, "train", 7, 3)
    assert whole.support_x.shape == (3, 5, 16, 16, 3)
    for first in (0, 1, 2):
        for part, other in zip(whole, source.draw(3, "train", 7 + first, 1), strict=True):
            np.testing.assert_array_equal(part[first : first + 1], other)
    # Each image of each task has its own random words. Red, which grows to the right, shows which are flipped.
    red = np.concatenate([whole.support_x, whole.query_x], 1)[..., 0].mean(2)  # [T, N * (K + Q), width]
    flipped = red[..., 0] > red[..., -1]
    assert flipped.any(1).all() and not flipped.all(1).any()
    assert len(np.unique(flipped, axis=0)) == 3
    # A photograph has only one center crop.
    crops = {x.tobytes() for first in range(0, 60, 20) for x in source.draw(0, "val", first, 20).query_x[0]}
    assert len(crops) <= 30
    colors = images.denormalize(source.draw(0, "val", 0, 1).query_x)
    assert colors.min() > -1e-5 and colors.max() < 1 + 1e-5


def test_run_on_crops_trains_tests_and_predicts(photographs, tmp_path):
    """Training also draws a picture of a validation task."""
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
    stored = load_splits(model.images, photographs, ("test",))["test"]
    np.testing.assert_array_equal(crops, images.center_crops(stored.pixels[::6], stored.aspects[::6], (16, 16)))
    np.testing.assert_allclose(model.inputs(crops), images.normalize(np.float32(crops) / 255), atol=1e-6)
    assert model.adapt(paths, range(5)).predict(paths).shape == (5, 5)
    assert "--augment" in refusal("--datasource=omniglot", "--augment")


def test_short_side_keeps_the_shapes_of_photographs(tmp_path):
    """A second run of the script finds them finished."""
    archive = tmp_path / "CUB_200_2011" / "images" / "001.Black_footed_Albatross"
    archive.mkdir(parents=True)
    for number, size in enumerate([(200, 100), (100, 151)]):
        Image.effect_noise(size, 50).convert("RGB").save(archive / f"bird{number}.jpg")
    program = Path(main.__file__).parent / "data" / "cub" / "prepare.py"
    command = [sys.executable, program, f"--archive={tmp_path / 'CUB_200_2011'}", f"--out={tmp_path / 'out'}"]
    command += ["--short_side=64", "--allow_missing"]
    for finished in (0, 1):
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"1 classes, {finished} " in printed
        sizes = []
        for path in sorted((tmp_path / "out").glob("*/*/*.png")):
            with Image.open(path) as image:
                sizes.append(image.size)
        assert sizes == [(128, 64), (64, 97)]
