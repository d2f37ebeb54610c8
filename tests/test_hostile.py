"""What nobody means well with (files, flags, names, surroundings) is one line, or works. docs/safety.md lists it."""

import os
import struct
import time
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

import events
from tests.test_events import read_events, write_events

# -- events -----------------------------------------------------------------------------------------------------------


def event_file(folder: Path) -> Path:
    """Of the events 0, 100 and 200, value 1."""
    write_events(folder, 0, [0, 100, 200], value=1)
    (path,) = folder.iterdir()
    return path


def record(data: bytes, length: int | None = None) -> bytes:
    """A record with right checksums, whatever its length says."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def second_record(path: Path) -> int:
    """Where the record of event 0 begins, behind that of the file's version."""
    return 16 + int.from_bytes(path.read_bytes()[:8], "little")


DAMAGES = {  # name -> (what is done, the steps that can still be read)
    "an enormous length": (lambda path: path.write_bytes(path.read_bytes() + record(b"x", 2**36)), [0, 100, 200]),
    "an absurd length": (lambda path: path.write_bytes(path.read_bytes() + record(b"x", 2**64 - 1)), [0, 100, 200]),
    "no event": (lambda path: path.write_bytes(path.read_bytes() + record(b"\xff" * 9)), [0, 100, 200]),
    "a bit of an event": (lambda path: flip(path, second_record(path) + 20), [100, 200]),
    "a bit of a length": (lambda path: flip(path, second_record(path) + 5), []),
    "text": (lambda path: path.write_text("events\n" * 99), []),
    "a pipe": (lambda path: path.unlink() or os.mkfifo(path), []),
    "an endless device": (lambda path: path.unlink() or path.symlink_to("/dev/zero"), []),
}


@pytest.mark.parametrize(("damage", "steps"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_of_events_is_set_aside(tmp_path, capsys, damage, steps):
    """Under a name that TensorBoard passes over, in one line; what can be read of it stays, and the run goes on."""
    path = event_file(tmp_path)
    damage(path)
    damaged = path.read_bytes() if path.is_file() else None
    write_events(tmp_path, 201, [300], value=2)
    aside = path.with_name(path.name.replace("events.out.tfevents", "damaged-events"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {path} is damaged (")
    assert line.endswith(f"): it is now {aside.name}.")
    assert damaged is None or aside.read_bytes() == damaged
    assert read_events(tmp_path) == [*((step, 1) for step in steps), (300, 2)]
    write_events(tmp_path, 301, [400], value=3)
    assert capsys.readouterr().err == ""


def test_a_reader_of_events_takes_what_it_can(tmp_path, capsys):
    """As plot.py, publish.py and row.py read them."""
    DAMAGES["an enormous length"][0](event_file(tmp_path))
    assert [event.step for event, _ in events.read_all(tmp_path) if event.summary.value] == [0, 100, 200]
    assert "what can be read of it is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (tf.compat.v1.Summary.Value(simple_value=2.0), 2.0),
        (tf.compat.v1.Summary.Value(tensor=tf.make_tensor_proto(3.0)), 3.0),
        (tf.compat.v1.Summary.Value(tensor=tf.make_tensor_proto(b"text")), None),
        (tf.compat.v1.Summary.Value(tensor=tf.make_tensor_proto(0.0, shape=[2**20])), None),  # small in the file
        (tf.compat.v1.Summary.Value(), None),
    ],
    ids=["the original's", "ours", "text", "many", "none"],
)
def test_only_numbers_are_numbers(value, number):
    assert events.number(value) == number


def test_a_clock_that_was_set_back(tmp_path):
    """TensorBoard takes files in the order of their names, which begin with the time."""
    for start in (0, 100):
        write_events(tmp_path, start, [start], value=1)
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path, hours in zip(paths, (24, 48), strict=True):
        seconds = int(time.time()) + 3600 * hours
        path.rename(path.with_name(f"events.out.tfevents.{seconds}.here.1.1.v2"))
    write_events(tmp_path, 200, [200], value=1)
    assert read_events(tmp_path) == [(0, 1), (100, 1), (200, 1)]
    assert len(list(tmp_path.iterdir())) == 3
