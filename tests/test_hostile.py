"""What nobody means well with (files, flags, names, surroundings) is one line, or works. docs/safety.md lists it."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

import devices
import files
import images
import main
import publish
import recipe
import report
import runs
from evaluate import MOST_NAME, Protocol
from files import InputError
from parallel import Layout
from recipe import DATASETS
from tests.helpers import (
    PROGRAM,
    end,
    line_model_at,
    not_compiled,
    only_run,
    refusal,
    saved_by,
    spawn,
    start_main,
)

ROOT = Path(main.__file__).parent

NOT_REGULAR = {  # what takes the place of a file
    "a pipe": lambda path: path.unlink() or os.mkfifo(path),
    "an endless device": lambda path: path.unlink() or path.symlink_to("/dev/zero"),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


# -- images -----------------------------------------------------------------------------------------------------------

OWN = DATASETS["folder"].images._replace(size=(4, 4), split_sizes=(2, 0, 0))


def photographs(folder: Path, count: int = 2) -> Path:
    """Two classes of grey images."""
    for number in range(2 * count):
        path = folder / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (9 * number,) * 3).save(path)
    return folder


def pixels(folder: Path, like: images.Images = OWN) -> np.ndarray:
    """All images of the training classes, in order."""
    classes = images.load_splits(like, folder, ("train",))["train"]
    return np.array(classes.pixels[: classes.counts.sum()])


def png(path: Path, width: int, height: int) -> None:
    """A white grey PNG, a thousand times as large in memory as on the disk."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pack, row = zlib.compressobj(9), b"\0" + b"\xff" * width
    rows = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_an_image_whose_resizing_would_fill_the_memory(tmp_path, capsys):
    """Two million pixels, all in one row: the filter of the resizing takes 48 bytes for each."""
    folder = photographs(tmp_path, count=3)
    png(folder / "a" / "2.png", 2_000_000, 1)
    with pytest.raises(
        InputError, match="says that it has 1 x 2,000,000 pixels, too many to decode; replace or delete"
    ):
        pixels(folder)
    assert len(pixels(folder, OWN._replace(skip_broken=True))) == 6
    assert "which cannot be read: a/2.png" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["exif_transpose", "resize"])
def test_memory_that_runs_out_is_told(tmp_path, monkeypatch, step):
    """Wherever it does while an image is read."""
    folder = photographs(tmp_path)

    def run_out(*_, **__):
        raise MemoryError

    Image.new("RGB", (8, 8)).save(folder / "a" / "0.bmp")
    monkeypatch.setattr(*((Image.Image, step) if step == "resize" else (images.ImageOps, step)), run_out)
    with pytest.raises(
        InputError, match=r"cannot read image .*/a/0\.bmp of class a: MemoryError; replace or delete it"
    ):
        pixels(folder)


def test_large_images_are_not_decoded_at_once(tmp_path, monkeypatch):
    """Not more pixels together than one image may have, whatever the number of threads; and small ones side by side."""
    folder = photographs(tmp_path, count=8)
    monkeypatch.setattr(images, "ROOM", images._Room(40))  # two of 4x4, not three
    monkeypatch.setattr(images.os, "cpu_count", lambda: 8)
    at_once, most, counting = 0, 0, threading.Lock()
    transpose = images.ImageOps.exif_transpose

    def slowly(image, **options):
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        transpose(image, **options)
        with counting:
            at_once -= 1

    monkeypatch.setattr(images.ImageOps, "exif_transpose", slowly)
    assert len(pixels(folder)) == 16
    assert most == 2


def test_an_enormous_jpeg_is_decoded_smaller(tmp_path, monkeypatch):
    """A photograph of more pixels than Pillow thinks wise: by its own means, and the picture is the same."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    halves = Image.new("RGB", (128, 128), "red")
    halves.paste("lime", (0, 0, 64, 128))
    halves.save(tmp_path / "image.jpg", quality=95)
    decoded = []
    transpose = images.ImageOps.exif_transpose
    monkeypatch.setattr(
        images.ImageOps,
        "exif_transpose",
        lambda image, **options: transpose(image, **options) or decoded.append(image.size),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = images.read_image(tmp_path / "image.jpg", OWN)
    assert decoded == [(16, 16)]
    np.testing.assert_allclose(found[:, [0, 3]], [[(0, 255, 0), (255, 0, 0)]] * 4, atol=30)


def test_what_pillow_warns_of_is_one_line(tmp_path, capsys, monkeypatch):
    folder = photographs(tmp_path)
    transpose = images.ImageOps.exif_transpose

    def warn(image, **options):
        warnings.warn("Truncated File Read", stacklevel=1)
        transpose(image, **options)

    monkeypatch.setattr(images.ImageOps, "exif_transpose", warn)
    pixels(folder)
    printed = capsys.readouterr()
    line = rf"Pillow warns of [a-z]/\d\.bmp and 3 others in {re.escape(str(folder))}: Truncated File Read\n"
    assert re.fullmatch(line, printed.out)  # whichever thread was the first
    assert printed.err == ""


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_the_cache(tmp_path):
    folder = photographs(tmp_path)
    expected = pixels(folder)
    flip(folder / ".cache" / "all_4x4x3.npy", -1)
    np.testing.assert_array_equal(pixels(folder), expected)


def test_an_image_replaced_by_one_of_the_same_size_and_time(tmp_path):
    folder = photographs(tmp_path)
    file = folder / "a" / "0.bmp"
    assert pixels(folder)[0].max() == 0
    before = file.stat()
    Image.new("RGB", (4, 4), (250,) * 3).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert pixels(folder)[0].max() == 250


@pytest.mark.parametrize("name", ["all_4x4x3.npy", "all_4x4x3.json"])
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_a_cache_that_is_no_regular_file(tmp_path, name, kind):
    folder = photographs(tmp_path)
    expected = pixels(folder)
    NOT_REGULAR[kind](folder / ".cache" / name)
    np.testing.assert_array_equal(pixels(folder), expected)
    assert (folder / ".cache" / name).is_file()


@pytest.mark.parametrize("broken", [7, ["no/such.png"], [["a/0.bmp"]], {"a/0.bmp": 1}])
def test_a_strangers_index(tmp_path, broken):
    folder = photographs(tmp_path)
    expected = pixels(folder)
    index = folder / ".cache" / "all_4x4x3.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"broken": broken}))
    np.testing.assert_array_equal(pixels(folder, OWN._replace(skip_broken=True)), expected)


# -- what killed processes leave --------------------------------------------------------------------------------------

WRITER = """
import sys, time, files
from pathlib import Path

def fill(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)

files.write_whole(Path(sys.argv[1]), fill)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that has written a half of the file `here`, and goes on."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "here"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_two_writers_of_one_file_with_one_number(tmp_path, monkeypatch):
    """As in two containers on a shared disk, whose processes have the same number: each file is whole."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "here"

    def fill(file):
        file.write(b"a" * 5)
        file.flush()
        files.write_whole(path, lambda other: other.write(b"b" * 9))
        assert path.read_bytes() == b"b" * 9
        file.write(b"a" * 5)

    files.write_whole(path, fill)
    assert path.read_bytes() == b"a" * 10
    assert os.listdir(tmp_path) == ["here"]


def test_what_a_killed_writer_left_goes_at_the_next_start(writer, tmp_path):
    """What a living one is writing stays, and so does what is another's."""
    (left,) = tmp_path.glob(".here.[0-9]*")
    others = [tmp_path / name for name in (".here.tmp", ".here.1a", "here.12", ".here.12.txt", ".there.12")]
    for path in others:
        path.write_text("mine")
    (begun := tmp_path / ".here.13").touch()  # whose process has not locked it yet
    files.remove_leftovers(tmp_path, "here")
    assert left.read_bytes() == b"half"
    writer.kill()
    writer.wait()
    files.remove_leftovers(tmp_path, "here")
    assert not left.exists()
    assert begun.exists()
    assert all(path.read_text() == "mine" for path in others)


def test_every_start_looks_for_leftovers(tmp_path):
    """Of the cache, of the run folder and of the results; as large as a data set, they may be."""
    folder, run = photographs(tmp_path / "images"), runs.Run(tmp_path / "run")
    pixels(folder)
    run.folder.mkdir()
    (run.folder / ".saving").mkdir()
    left = [folder / ".cache" / ".all_9x9x3.npy.1234567"]
    left += [
        run.folder / name for name in (".flags.json.1234567", ".saving/half", ".test_ubs5_stepsize0.1.csv.1234567")
    ]
    for path in left:
        path.write_text("half")
    pixels(folder)
    with run.locked():
        pass
    assert not any(path.exists() for path in left)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> runs.Run:
    """With the checkpoints model99 and model499, right in all."""
    run = runs.Run(tmp_path / "run")
    run.folder.mkdir()
    for step in (100, 500):
        run.validation = runs.Validation(step - 1, 99, 0.5, 20)
        run.save(line_model_at(step))
    return run


def crafted(run: runs.Run, iteration: int, validation: tuple = (-1, -1, -np.inf, 0), **parts: tf.Variable) -> None:
    """Writes model<iteration> with right checksums and whatever is in it."""
    state = line_model_at(iteration + 1).state | parts
    validation = tf.Variable(validation, dtype=tf.float64)
    tf.train.Checkpoint(**state, validation=validation).write(run.prefix(iteration))


def renamed(run: runs.Run, iteration: int) -> None:
    for ending in (".index", ".data-00000-of-00001"):
        os.rename(run.prefix(499) + ending, run.prefix(iteration) + ending)


def counted(updates: int) -> tf.Module:
    adam = line_model_at(600).meta_optimizer
    adam.updates.assign(updates)
    return adam


def claiming(run: runs.Run, name: str) -> None:
    """Writes model599 as model499 is, where one array says that it is one part of 8 TB."""
    reader = tf.train.load_checkpoint(run.prefix(499))
    names = list(reader.get_variable_to_shape_map())
    slices = ["1099511627776 0,4" if one.startswith(name) else "" for one in names]
    arrays = [tf.zeros(4, tf.float64) if one.startswith(name) else tf.constant(reader.get_tensor(one)) for one in names]
    tf.raw_ops.SaveV2(prefix=run.prefix(599), tensor_names=names, shape_and_slices=slices, tensors=arrays)


CHECKPOINTS = {
    "negative": lambda run: crafted(run, 599, step=tf.Variable(-5, dtype=tf.int64)),
    "most negative": lambda run: crafted(run, 599, step=tf.Variable(-(2**63), dtype=tf.int64)),
    "enormous": lambda run: crafted(run, 599, step=tf.Variable(2**63 - 1, dtype=tf.int64)),
    "many steps": lambda run: crafted(run, 599, step=tf.Variable([600, 600], dtype=tf.int64)),
    "of a later name": lambda run: renamed(run, 599),
    "no updates": lambda run: crafted(run, 599, meta_optimizer=counted(-7)),
    "validated later": lambda run: crafted(run, 599, (9000, 9000, 0.5, 20)),
    "validated never": lambda run: crafted(run, 599, (-7, -9, 0.5, 20)),
    "no accuracy": lambda run: crafted(run, 599, (500, 500, 17.0, 20)),
    "no number": lambda run: crafted(run, 599, (500, np.nan, 0.5, 20)),
    "many validations": lambda run: crafted(run, 599, (500, 500, 0.5, 20, 1, 2)),
    "huge validation": lambda run: claiming(run, "validation"),
    "huge moments": lambda run: claiming(run, "meta_optimizer/m/w1"),
    "huge step": lambda run: claiming(run, "step"),
    "text": lambda run: crafted(run, 599, step=tf.Variable(b"600")),
    "a pipe": lambda run: crafted(run, 599) or NOT_REGULAR["a pipe"](Path(run.prefix(599) + ".index")),
    "a device": lambda run: (
        crafted(run, 599) or NOT_REGULAR["an endless device"](Path(run.prefix(599) + ".data-00000-of-00001"))
    ),
}


@pytest.mark.parametrize("craft", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_crafted_checkpoint(run, capfd, craft):
    """With right checksums. The one before is taken, in one line and none of TensorFlow's; the model is left alone."""
    craft(run)
    maml = line_model_at(7)
    with pytest.raises(InputError, match=r"checkpoint .*model599 is damaged \(.*\): delete it, or test another"):
        run.restore(maml, run.prefix(599))
    assert maml.step == 7
    expected = run.prefix(99 if craft is CHECKPOINTS["of a later name"] else 499)
    assert run.restore_newest(maml) == expected
    assert maml.step == run.validation.last + 1 == int(expected.rpartition("model")[2]) + 1
    del maml
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("WARNING: checkpoint ")


def test_text_that_says_it_is_enormous(run):
    """TensorFlow ends the process where it reads it: the description of Python's objects, behind all numbers."""
    path = Path(run.prefix(499) + ".data-00000-of-00001")
    graph = tf.train.load_checkpoint(run.prefix(499)).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    before, _ = path.read_bytes().split(graph)
    length = b"\x80\x80\x80\x80\x80\x40"  # 2**41, as protocol buffers write it
    said = length + struct.pack("<I", masked_crc32c(struct.pack("<Q", 2**41)))
    begin = before[:-6]  # behind it two bytes of the length, and its checksum
    path.write_bytes((begin + said).ljust(path.stat().st_size, b"x"))
    maml = line_model_at(0)
    run.restore(maml, run.prefix(499))
    assert maml.step == 500


def test_a_damaged_checkpoint_is_one_line(run, capfd):
    """TensorFlow wrote four more about values that were not restored."""
    flip(Path(run.prefix(499) + ".data-00000-of-00001"), 20)
    with pytest.raises(InputError, match="is damaged"):
        run.restore(line_model_at(0), run.checkpoint(499))
    assert capfd.readouterr().err == ""


# -- flags ------------------------------------------------------------------------------------------------------------

SLIPS = dict.fromkeys(("meta_batch_size", "update_batch_size", "num_query", "num_classes", "image_size"), 10**7)
SLIPS |= dict.fromkeys(("val_tasks", "test_tasks", "threads", "op_threads", "train_update_batch_size"), 10**7)
SLIPS |= {"num_filters": 10**6, "num_updates": 1000, "save_interval": 10**18, "metatrain_iterations": 10**18}
SLIPS |= {"pretrain_iterations": 10**18, "logdir": "a\0b", "data_path": "a\0b", "results_dir": "a\0b"}


@pytest.mark.parametrize("flag", SLIPS)
def test_a_slip_of_a_flag_is_refused_before_any_work(flag, tmp_path):
    line = refusal(f"--logdir={tmp_path / 'logs'}", f"--{flag}={SLIPS[flag]}")
    assert f"--{flag}={files.printable(SLIPS[flag])}: must" in line
    assert line.isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        (["--meta_batch_size=1000000", "--update_batch_size=1000"], "tasks"),
        (["--datasource=omniglot", "--update_batch_size=100000", "--num_updates=100"], "updates"),
        (["--datasource=miniimagenet", "--num_filters=10000"], "weights"),
        (["--datasource=miniimagenet", "--noconv", "--image_size=10000", "--meta_batch_size=1"], "weights"),
    ],
    ids=["tasks", "updates", "weights", "one layer"],
)
def test_what_would_fill_the_memory_is_refused_before_any_work(flags, most, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "memory", lambda: 16 * 2**30)
    line = refusal(f"--logdir={tmp_path / 'logs'}", *flags)
    assert re.search(rf"takes [\d,]+ GB of memory or more, most of it for {most}, and this process may use 16 GB", line)
    assert all(flag in line for flag in flags if re.search(r"=\d", flag))
    assert list(tmp_path.iterdir()) == []


def write_control_groups(root, groups, files):
    """As Linux shows them: the groups of a process, and their files of limits."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", {"memory.max": "8192\n"}),
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": "8192\n", "slurm/job_7/step_0/memory.max": "max\n"}),
        ("9:cpuset:/\n4:memory:/docker/4f:2\n0::/\n", {"memory/memory.limit_in_bytes": "8192\n"}),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "8192", "memory/memory.limit_in_bytes": str(2**63)}),
    ],
    ids=["container", "Slurm", "container, version 1", "group, version 1"],
)
def test_a_limit_of_memory_counts_as_the_memory(groups, files, tmp_path):
    """Past it the system ends the process without a word, however much the machine has."""
    write_control_groups(tmp_path, groups, files)
    assert devices.memory(tmp_path) == 8192
    shutil.rmtree(tmp_path / "sys")
    assert devices.memory(tmp_path) == devices.memory(tmp_path / "none") > 2**30  # the machine's


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/pod/one\n", {"pod/cpu.max": "50000 100000\n", "pod/one/cpu.max": "300000 100000\n"}, 1),
        (
            "3:cpuacct,cpu:/docker/4f\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
    ids=["container", "no limit", "pod", "container, version 1", "no limit, version 1"],
)
def test_a_limit_of_processor_time_counts_as_the_cores(groups, files, cores, monkeypatch, tmp_path):
    """A container with two of a host's 64 cores must not compute 64 tasks at once, nor take the memory for them."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write_control_groups(tmp_path, groups, files)
    assert devices.cores(tmp_path) == cores


def test_a_strangers_flags_fill_no_memory(tmp_path, monkeypatch):
    """Where a model is built of a flags.json, as plot.py and publish.py do."""
    monkeypatch.setattr(devices, "memory", lambda: 16 * 2**30)
    stranger = recipe.from_flags({"datasource": "miniimagenet", "num_filters": 10**4})
    with pytest.raises(InputError, match="most of it for weights, and this process may use 16 GB: lower"):
        recipe.build(stranger)


def test_every_published_command_fits_a_small_machine(monkeypatch):
    """The estimate is from below, so that nothing is refused that would work. ResNet12 takes 2 GB a task."""
    for script in set((ROOT / "experiments").glob("*.sh")) - set((ROOT / "experiments").glob("rl_*.sh")):
        command = re.sub(r"(?m)^#.*", "", script.read_text())  # a comment may have flags of another program
        training = command.replace("\\\n", " ").split(" -- ")[0]
        flags = [word for word in training.split() if re.fullmatch(r"--\w+=?\S*", word)]
        memory = (16 if "resnet12" in script.stem else 4) * 2**30
        monkeypatch.setattr(devices, "memory", lambda memory=memory: memory)
        recipe.check_training(main.recipe_of(main.parsed(flags)), Layout(4))


def test_a_trillion_iterations_cost_no_memory(tmp_path, monkeypatch):
    """They are not listed: what is due when is computed."""

    def stop(kept, at, values):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(report.Events, "scalars", stop)
    flags = "--norm=None", "--metatrain_iterations=1000000000000", "--save_interval=1", f"--logdir={tmp_path}"
    with not_compiled():
        assert saved_by(signal.SIGTERM, start_main(*flags)).parent == only_run(tmp_path)


# -- how numbers were computed ----------------------------------------------------------------------------------------


def test_how_a_run_was_computed_is_recorded(tmp_path, monkeypatch, capsys):
    """Beside its flags, which do not change: a run may go on otherwise, with a warning."""
    flags = "--norm=None", f"--logdir={tmp_path}"
    with not_compiled():
        start_main(*flags, "--metatrain_iterations=2")
        folder = only_run(tmp_path)
        identity = json.loads((folder / "flags.json").read_text())
        computed = devices.computed()
        assert computed["op_threads"] == 1
        assert computed["tensorflow"] == tf.__version__
        ended = start_main(*flags, "--metatrain_iterations=3")
        assert (ended.code, ended.err) == (0, "")
        monkeypatch.setattr(devices, "computed", lambda: computed | {"op_threads": 2})
        ended = start_main(*flags, "--metatrain_iterations=4")
    (line,) = ended.err.splitlines()
    assert f"WARNING: the iterations before 3 in {folder} were computed otherwise (op_threads 1 there, 2 here)" in line
    assert ended.code == 0
    recorded = json.loads((folder / "computed.json").read_text())
    assert recorded == [{"from_iteration": 0, **computed}, {"from_iteration": 3, **computed, "op_threads": 2}]
    assert json.loads((folder / "flags.json").read_text()).keys() == identity.keys()
    start_main(*flags, "--metatrain_iterations=4", "--train=False", "--test_tasks=2")
    (entry,) = json.loads((folder / "results.json").read_text())
    assert entry["computed"]["op_threads"] == 2


def test_a_run_that_is_older_than_the_record_goes_on(run, capsys):
    run.record_computed(500, {"op_threads": 1})
    assert capsys.readouterr().err == ""
    assert json.loads((run.folder / "computed.json").read_text()) == [{"from_iteration": 500, "op_threads": 1}]


def test_iterations_that_are_computed_anew_are_recorded_anew(run, capsys):
    """Another machine began at 500, and was killed before it saved anything."""
    here, there = {"op_threads": 1}, {"op_threads": 2}
    run.record_computed(0, here)
    run.record_computed(500, there)
    assert "op_threads 1 there, 2 here" in capsys.readouterr().err
    run.record_computed(500, here)
    run.record_computed(1000, here)
    assert capsys.readouterr().err == ""
    assert json.loads((run.folder / "computed.json").read_text()) == [{"from_iteration": 0, **here}]


@pytest.mark.parametrize("content", ["[7]", "{}", '[{"from_iteration": "x"}]', '[{"from_iteration": [1]}]', "[{}]"])
def test_a_strangers_record_of_how_it_was_computed(run, content):
    (run.folder / "computed.json").write_text(content)
    try:
        run.record_computed(500, {"op_threads": 1})
    except InputError as error:
        assert str(error).endswith("delete it")


# -- names ------------------------------------------------------------------------------------------------------------

NAMES = {"newline": "a\nb", "a terminal's commands": "a\x1b[31mb", "no text": "a\udcff", "direction": "a\u202eb"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_any_name_is_printed_on_one_line(name, tmp_path, capsys):
    """Of a class, an image and the folder, which are read whatever they are called."""
    folder = photographs(tmp_path / name)
    os.rename(folder / "a", folder / name)
    (folder / name / f"{name}.png").write_text("no image")
    expected = pixels(folder, OWN._replace(skip_broken=True))
    printed = capsys.readouterr().out
    assert printed.startswith(f"Left out of {files.printable(folder)}, 1 of 5 images")
    assert printed.removesuffix("\n").isprintable()
    with pytest.raises(InputError, match="cannot read image") as error:
        pixels(folder)
    assert str(error.value).isprintable()
    assert len(expected) == 4


def test_a_folder_of_images_whose_name_is_no_text(tmp_path):
    """A run on it is recorded, goes on and is tested."""
    folder = photographs(tmp_path / "images \udcff\n", count=3)
    for name, other in zip("ab", "cd", strict=True):
        shutil.copytree(folder / name, folder / other)
    flags = f"--data_path={folder}", "--datasource=folder", "--split=2,2,0", "--num_classes=2", "--image_size=16"
    flags += "--num_query=1", "--update_batch_size=1", "--num_filters=2", "--norm=None", "--meta_batch_size=1"
    flags += "--num_updates=1", f"--logdir={tmp_path / 'logs'}", "--test_tasks=2"
    for more in ("--metatrain_iterations=1", "--metatrain_iterations=2", "--train=False"):
        ended = start_main(*flags, more)
        assert (ended.code, ended.err) == (0, "")
        assert f"Images of {files.printable(folder)}, read as 16x16x3: " in ended.out
    (entry,) = json.loads((only_run(tmp_path / "logs") / "results.json").read_text())
    assert entry["trained_on_folder"] == str(folder)


@pytest.mark.parametrize("name", ["logs \udcff", "logs\0"])
def test_a_run_folder_whose_name_tensorflow_cannot_read(name, tmp_path):
    with pytest.raises(
        InputError, match=r"has letters that are not UTF-8 on this system, and TensorFlow reads no others"
    ):
        runs.Run(tmp_path / name)


def test_surroundings_that_have_no_code_for_a_letter(tmp_path):
    """An old terminal; and file names are read by another code than UTF-8."""
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
    }
    logdir = tmp_path / "mod\u00e8les \u8a66"
    ended = end(spawn(PROGRAM, "--metatrain_iterations=1", f"--logdir={logdir}", env=environment))
    assert (ended.code, len(ended.err.splitlines())) in ((0, 0), (1, 1))
    assert "Traceback" not in ended.err


def test_a_folder_name_of_240_letters_in_the_name_of_a_file():
    """Shorter ones have the names that they always had."""
    trained = recipe.Recipe(data_set="folder", data_path="/" + "t" * 240, split="64,16,20")
    protocol = Protocol(
        "test", 5, 1e-05, query=15, other_data_set="folder", data_folder="/" + "\u8a66" * 80, class_split="100,100,100"
    )
    name = protocol._replace(tasks=10**6, task_seed=2**63 - 1).name(trained)
    assert len(os.fsencode(f".{name}.csv.4194304")) <= 255
    assert re.match(
        r"test_ubs5_stepsize1e-05_folder-\u8a66{10}-[0-9a-f]{8}_split100,100,100_trained-t{10}-[0-9a-f]{8}_", name
    )
    short = protocol._replace(data_folder="/" + "d" * 60).name(dataclasses.replace(trained, data_path="/" + "t" * 60))
    assert "d" * 60 in short
    assert "t" * 60 in short
    assert len(short) < MOST_NAME


@pytest.mark.parametrize("content", ["[7]", "{}", "[[]]", "[", None])
def test_a_strangers_record_of_classes(run, capsys, content):
    """It is warned of, and training makes it anew."""
    if content is None:
        os.mkfifo(run.folder / "classes.json")
    else:
        (run.folder / "classes.json").write_text(content)
    assert run.trained_classes() == []
    assert re.fullmatch(r"WARNING: .*classes\.json is damaged \(.*\): delete it\n", capsys.readouterr().err)
    run.record_classes(["a", "b"])
    assert run.trained_classes() == ["a", "b"]


# -- not regular files ------------------------------------------------------------------------------------------------


NO_FILES = [  # name, how it is met, the one line, what it is
    (".lock", "more", r"\.lock is not a regular file: delete it", "an endless device"),
    ("flags.json", "more", r"flags\.json is damaged \(not a regular file\)", "an endless device"),
    ("flags.json", "test", r"flags\.json is damaged \(not a regular file\)", "a pipe"),
    ("computed.json", "more", r"computed\.json is damaged \(not a regular file\): delete it", "a pipe"),
    ("results.json", "test", r"results\.json is damaged \(not a regular file\): move it away", "an endless device"),
    ("model0.index", "asked", r"model0 is damaged \(model0\.index is not a regular file\)", "a pipe"),
]


def test_a_run_folder_with_no_regular_files(tmp_path):
    """Each is told in one line, and nothing hangs."""
    commands = {"more": ["--metatrain_iterations=2"], "test": ["--train=False"]}
    commands["asked"] = ["--train=False", "--test_iter=0"]
    flags = "--norm=None", "--test_tasks=2", f"--logdir={tmp_path / 'logs'}"
    with not_compiled():
        assert start_main(*flags, "--metatrain_iterations=1").code == 0
        folder, kept = only_run(tmp_path / "logs"), tmp_path / "kept"
        assert start_main(*flags, *commands["test"]).code == 0
        for name, met, message, kind in NO_FILES:
            shutil.copy(folder / name, kept)
            NOT_REGULAR[kind](folder / name)
            assert re.search(message, refusal(*flags, *commands[met]))
            (folder / name).unlink()
            shutil.copy(kept, folder / name)
        assert start_main(*flags, *commands["more"]).code == 0


# -- surroundings, and the programs beside main.py ---------------------------------------------------------------------


def test_a_backend_of_matplotlib_that_is_not_installed():
    """Jupyter has what it starts draw by its own means. Matplotlib, which TensorFlow imports, refuses some of these."""
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    ended = end(spawn("-c", "import devices, os; print(os.environ.get('MPLBACKEND'))", cwd=ROOT, env=environment))
    assert (ended.code, ended.err, ended.out) == (0, "", "None\n")


def test_a_link_of_an_editor_beside_the_programs(tmp_path, monkeypatch):
    """Emacs leaves one that leads nowhere while a file has changes that are not saved."""
    (tmp_path / "some.py").write_text("1")
    monkeypatch.setattr(main, "ROOT", tmp_path)
    before = main.identity()
    (tmp_path / ".#some.py").symlink_to("me@here.42")
    assert main.identity() == before


def test_why_tensorflow_aborts_is_told():
    """As on processors without AVX. Notices are not."""
    program = (
        "import os, resource, devices\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "with devices._without_notices():\n"
        "    os.write(2, b'W0000 00:00 a notice\\nF0000 00:00 why\\n')\n    os.abort()"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT
    assert ended.stderr == "F0000 00:00 why\n"


def test_a_start_where_python_does_not_know_where_it_is():
    """As in a program that Python is a part of: nothing reads along, and the start is only louder."""
    for where in ("'/nowhere/python'", "None"):
        program = f"import sys\nsys.executable = {where}\nimport devices\nprint('started')"
        ended = end(spawn("-c", program, cwd=ROOT))
        assert (ended.code, ended.out) == (0, "started\n")


@pytest.mark.skipif(os.name == "nt", reason="a shell that closes them")
def test_closed_streams(tmp_path):
    """The run ends as it should, and no file of its own takes the number of stdout or stderr."""
    flags = "--norm=None", "--metatrain_iterations=1", f"--logdir={tmp_path}"
    command = [sys.executable, PROGRAM, *flags]
    quoted = " ".join(f"'{part}'" for part in command)
    assert subprocess.run(["sh", "-c", f"{quoted} <&- >&- 2>&-"], timeout=300).returncode == 0
    assert runs.Run(only_run(tmp_path)).iterations() == [0]


PLOT_ENTRY = {
    **{"split": "test", "support_examples_a_class_K": 5, "inner_step_size_alpha": 0.01, "metric": "mean squared error"},
    "results": [{"updates": 0, "mean": 1.0, "ci95": 0.1}],
}
STRANGE_ENTRIES = [
    *([{}], [{"split": "test"}], [PLOT_ENTRY | {"results": 7}], [PLOT_ENTRY | {"results": [7]}]),
    *([PLOT_ENTRY | {"support_examples_a_class_K": "5"}], [PLOT_ENTRY | {"support_examples_a_class_K": [5]}]),
    *([PLOT_ENTRY | {"metric": ["x"]}], [PLOT_ENTRY | {"inner_step_size_alpha": None}]),
    [PLOT_ENTRY | {"results": [{"updates": 0, "mean": 10**400, "ci95": 0.1}]}],
    [PLOT_ENTRY | {"results": [{"updates": 0, "mean": 1.0, "ci95": None}]}],
    [PLOT_ENTRY | {"results": [{"updates": 0, "mean": float("nan"), "ci95": 1.0}]}],
]


def plot_refusal(*arguments: object) -> str:
    """The one line with which plot.py ends, in this process."""
    plot = pytest.importorskip("plot", reason="matplotlib is not installed")
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        plot.main()
    assert ended.value.code == 1
    (line,) = err.getvalue().splitlines()
    assert line.startswith("plot.py: ")
    return line


@pytest.mark.parametrize("entries", STRANGE_ENTRIES, ids=range(len(STRANGE_ENTRIES)))
def test_plot_of_a_strangers_results(entries, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    line = plot_refusal("updates", f"theirs={path}", f"--output={tmp_path / 'figure'}")
    assert str(path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


SINUSOID = ROOT / "logs" / "published" / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm"


def test_plot_with_wrong_flags(tmp_path):
    drawn = "sinusoid", f"MAML={SINUSOID}", f"--output={tmp_path / 'figure'}"
    assert "--shots=5 0: each must be 1 or more" in plot_refusal(*drawn, "--shots", "5", "0")
    assert "--task=-1 must be 0 or more" in plot_refusal(*drawn, "--task=-1")
    assert "--update_lr=nan must be a number above 0" in plot_refusal(*drawn, "--update_lr=nan")
    entries = "updates", f"$MAML_$={SINUSOID}/results.json", "--update_lr=0.01"
    (tmp_path / "file").write_text("mine")
    assert f"cannot write to {tmp_path}/file (" in plot_refusal(*entries, f"--output={tmp_path}/file/figure")
    assert "--output=." in plot_refusal(*entries, "--output=.")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_updates": 9}, "metatrain_Post-update_loss__step_9"),
        ({"num_updates": 10**9}, "flags.json has --num_updates=1000000000, which that flag cannot be"),
        ({"num_filters": [1]}, "flags.json has --num_filters=[1], which that flag cannot be"),
    ],
    ids=str,
)
def test_plot_of_a_strangers_flags(flags, message, tmp_path):
    shutil.copytree(SINUSOID, tmp_path, dirs_exist_ok=True)
    flags = json.loads((tmp_path / "flags.json").read_text()) | flags
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert message in plot_refusal("training", f"theirs={tmp_path}", f"--output={tmp_path / 'figure'}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("flags.json", content) for content in ("", "[]", '{"num_filters": "64"}', '{"seed": -1}')),
        *(("results.json", content) for content in ("", "{}", "[7]")),
    ],
)
def test_publishing_a_strangers_run(name, content, tmp_path):
    folder = shutil.copytree(SINUSOID, tmp_path / SINUSOID.name)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=r"flags\.json|results\.json"):
        publish.publish(folder, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_publishing_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write to .*file/"):
        publish.publish(SINUSOID, tmp_path / "file")
    with pytest.raises(InputError, match=r"--iteration=3, but .* has the iterations 69999: give one of them or -1"):
        publish.publish(SINUSOID, tmp_path / "to", iteration=3)
    monkeypatch.chdir(SINUSOID)
    assert publish.publish(Path("."), tmp_path / "to") == tmp_path / "to" / SINUSOID.name  # and not to `to` itself


def test_every_promise_names_its_test():
    promises = (ROOT / "docs" / "safety.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", promises)
    assert named
    assert all(f"def {name}(" in tests for name in named)
    here = re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE)
    assert len(set(here)) == len(here)
