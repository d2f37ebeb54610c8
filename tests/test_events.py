"""TensorBoard events: a resumed run's go on where its checkpoint is; the picture of a task."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from events import MOST_SIDE, RIGHT, WRONG, Events, task_picture
from utils import Tasks


def write_events(folder: Path, start: int, steps: list[int], value: float) -> None:
    with Events(folder, start) as events:
        for step in steps:
            events.scalars(step, {"loss": value})


def read_events(folder: Path) -> list[tuple[int, float]]:
    """(step, value) in the order in which TensorBoard reads a folder: by file name."""
    found = []
    # Numbers as numbers: by name alone, the tenth file that one process makes within a second precedes the second.
    paths = sorted(folder.glob("*tfevents*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            found += [(event.step, float(tf.make_ndarray(value.tensor).item())) for value in event.summary.value]
    return found


def test_events_of_a_resumed_run_replace_those_past_its_checkpoint(tmp_path):
    write_events(tmp_path, 0, [0, 100, 200, 300], value=1)
    write_events(tmp_path, 201, [300, 400], value=2)
    write_events(tmp_path, 301, [400, 500], value=3)
    assert read_events(tmp_path) == [(0, 1), (100, 1), (200, 1), (300, 2), (400, 3), (500, 3)]


def test_events_of_another_beginning_all_go(tmp_path):
    write_events(tmp_path, 0, [0, 100], value=1)
    write_events(tmp_path, 0, [0], value=2)
    assert read_events(tmp_path) == [(0, 2)]


def test_events_that_stay_are_not_rewritten(tmp_path):
    write_events(tmp_path, 0, [0, 100], value=1)
    (path,) = tmp_path.iterdir()
    before = path.stat()
    write_events(tmp_path, 101, [200], value=2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("cut", [1, 5, 30, "all but 1", "all but 9", "all but 12"])
def test_a_kill_cuts_the_last_event(tmp_path, cut):
    """The last record is cut by some bytes, down to a part of its 12 bytes of length and checksum."""
    write_events(tmp_path, 0, [0, 100], value=1)
    (path,) = tmp_path.iterdir()
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(last_record(path))
    cut = cut if isinstance(cut, int) else path.stat().st_size - whole - int(cut.split()[-1])
    os.truncate(path, path.stat().st_size - cut)
    write_events(tmp_path, 101, [200], value=2)
    assert read_events(tmp_path) == [(0, 1), (100, 1), (200, 2)]


def last_record(path: Path) -> bytes:
    """Length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data = path.read_bytes()
    while True:
        size = 16 + int.from_bytes(data[:8], "little")
        if size == len(data):
            return data
        data = data[size:]


def test_the_picture_of_a_task():
    """Two grey classes of 42x42 images, 1-shot: one query image recognised, the other taken for the first class."""
    support, query = (np.full((2, 42, 42, 1), [[[[0.2]]], [[[0.8]]]]) + shift for shift in (0, 0.1))
    labels = np.eye(2)
    picture = task_picture(Tasks(support, labels, query, labels), scores=np.array([[1, 0], [0.7, 0.3]]))
    side = MOST_SIDE + 4  # with its frame
    assert picture.shape == (2 * side, 4 * side, 3)
    tiles = picture.reshape(2, side, 4, side, 3).swapaxes(1, 2)
    colours = [[tuple(int(x) for x in tile[side // 2, side // 2]) for tile in row] for row in tiles]
    white = (255,) * 3
    assert colours == [
        [(51,) * 3, white, (77,) * 3, (230,) * 3],  # class 0: its support image; the query images taken for it
        [(204,) * 3, white, white, white],
    ]
    assert tuple(tiles[0, 2, 0, 0]) == RIGHT
    assert tuple(tiles[0, 3, 0, 0]) == WRONG
