"""data/archive.py, the scripts that prepare Omniglot and MiniImagenet, and the split lists."""

import io
import json
import random
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "data"
RESIZE = "omniglot_resized/resize_images.py"
PROC = "miniImagenet/proc_images.py"
PARTS = ("train", "val", "test")
OMNIGLOT = json.loads((DATA / "splits" / "omniglot.json").read_text())
MINIIMAGENET = json.loads((DATA / "splits" / "miniimagenet.json").read_text())

sys.path[:0] = [str(DATA), str((DATA / RESIZE).parent), str((DATA / PROC).parent)]

import archive  # noqa: E402
import proc_images  # noqa: E402
import resize_images  # noqa: E402


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, so that leftovers show; empty folders count as files without bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
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


def photograph(folder: Path, *names: str, mode: str = "RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(names))
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


def run(script: str | Path, *flags: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *flags], cwd=cwd, capture_output=True, text=True)


def failure(*command, **place) -> str:
    """What a script says when it gives up: one line, exit code 1."""
    done = run(*command, **place)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr
    return done.stderr


@pytest.fixture
def data(tmp_path) -> Path:
    """A copy of the project's data folder as a checkout has it: scripts and lists, no data."""
    for name in ("archive.py", RESIZE, PROC, "splits/omniglot.json", "splits/miniimagenet.json"):
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
    assert "59,994 images are not in" in failure(data / PROC, *flags)
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
    assert done.stdout == "train/a: 2 images missing\ntrain/b: 1 images missing\n"
    assert done.stderr == f"error: 3 images are not in {images}: add them, or go on with --allow_missing\n"
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
        proc_images.prepare(images, tmp_path, tmp_path / "out", suffix, allow_missing=False)
        assert set(contents(tmp_path / "out")) == {f"val/a/a0{suffix}", f"val/a/a1{suffix}"}
    with Image.open(images / "a0.jpg") as raw, Image.open(tmp_path / "out" / "val" / "a" / "a0.png") as saved:
        assert np.array_equal(saved, raw.resize((84, 84), Image.LANCZOS))


def test_a_class_folder_with_other_images_is_not_replaced(tmp_path):
    images = photograph(tmp_path / "images", "a0.jpg")
    write_csv(tmp_path, train={"a": ["a0.jpg"]})
    photograph(tmp_path / "out" / "train" / "a", "mine.jpg")
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"train/a has 1 other files, mine.jpg the first: move"):
        proc_images.prepare(images, tmp_path, tmp_path / "out", ".jpg", allow_missing=False)
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
    photograph(start / "train" / "a", "a0.jpg")  # not of the right size, to be replaced
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
        ({"name": "Greek/character01", "mode": stat.S_IFLNK}, "is a link or a device"),
        ({"name": "Greek/character01/1.png", "mode": stat.S_IFIFO}, "is a link or a device"),
        ({"name": "Greek/character01/1.png", "method": zipfile.ZIP_BZIP2}, "is packed by another method"),
    ],
)
def test_a_hostile_archive_is_refused_whole(tmp_path, member, message):
    path = hostile(tmp_path, **member)
    for prepare in (
        lambda: resize_images.prepare([path], tmp_path / "out"),
        lambda: proc_images.prepare(path, None, tmp_path / "out", ".jpg", True),
    ):
        with pytest.raises(SystemExit, match=f"hostile.zip is refused, nothing was unpacked: .* {message}"):
            prepare()
    assert visible(tmp_path) == {"hostile.zip"}


def test_an_archive_that_declares_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("Greek/character01/1.png", bytes(archive.MAX_FILE + 1))
    assert path.stat().st_size < 100_000
    with pytest.raises(SystemExit, match=r"1.png' has 33,554,433 bytes unpacked, limit 33,554,432"):
        resize_images.prepare([path], tmp_path / "out")

    path = pack(draw(tmp_path / "raw", "Greek"), tmp_path / "many.zip")
    monkeypatch.setattr(archive, "MAX_TOTAL", 200)
    with pytest.raises(SystemExit, match=r"many.zip is refused, .* bytes unpacked, limit 200"):
        resize_images.prepare([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_cut_short_anywhere_is_refused(tmp_path):
    whole = pack(draw(tmp_path / "raw", "Greek"), tmp_path / "whole.zip").read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(SystemExit, match=r"cut.zip is not a whole zip archive \(.*\): fetch it again"):
            resize_images.prepare([cut], tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_miniimagenet_split_has_100_different_classes():
    assert [len(MINIIMAGENET[part]) for part in PARTS] == [64, 16, 20]
    labels = [label for part in PARTS for label in MINIIMAGENET[part]]
    assert len(set(labels)) == 100
    assert all(re.fullmatch(r"n\d{8}", label) for label in labels)


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
