"""TensorBoard events: a resumed run's go on where its checkpoint is; the picture of a task."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import events
from events import GAP, LETTERS, MOST_SIDE, RIGHT, TEST_FOLDER, WHITE, WRONG, Events, read, task_picture
from tests.helpers import read_events, write_events
from utils import Tasks


def test_events_of_a_resumed_run_replace_those_past_its_checkpoint(tmp_path):
    write_events(tmp_path, 0, [0, 100, 200, 300], value=1)
    write_events(tmp_path, 201, [300, 400], value=2)
    write_events(tmp_path, 301, [400, 500], value=3)
    assert read_events(tmp_path) == [(0, 1), (100, 1), (200, 1), (300, 2), (400, 3), (500, 3)]


def test_events_of_another_beginning_all_go(tmp_path):
    write_events(tmp_path, 0, [0, 100], value=1)
    write_events(tmp_path, 0, [0], value=2)
    assert read_events(tmp_path) == [(0, 2)]


def test_numbers_of_two_tests_at_once(tmp_path):
    """Both rewrite the folder of tests: one after the other, and the last number stays."""

    def write(process):
        for _ in range(20):
            events.test_scalar(tmp_path, 100, "accuracy", process)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, (1, 2)))
    ((step, value),) = read_events(tmp_path / TEST_FOLDER)
    assert step == 100 and value in (1, 2)


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
    assert not any(read(path).cut for path in tmp_path.iterdir())


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
    labels, names = np.eye(2), ["a\udcff", "b" * 500]  # the first is what a name that is no text becomes
    task = Tasks(support, labels, query, labels)
    picture = task_picture(task, names, scores=np.array([[1, 0], [0.7, 0.3]]))
    side, line = MOST_SIDE + 4, 2 * LETTERS  # a tile with its frame; a line of text
    height, width, _ = picture.shape
    assert height == line + 2 * (line + side)
    tops, lefts = [2 * line, 3 * line + side], [0, side + GAP, 2 * side + GAP]
    assert lefts[-1] + side <= width < lefts[-1] + 2 * side  # as wide as the images or the legend, not as the name
    colours = [[tuple(map(int, picture[y + side // 2, x + side // 2])) for x in lefts] for y in tops]
    assert colours == [
        [(51,) * 3, (77,) * 3, (230,) * 3],  # class 0: its support image; the query images taken for it
        [(204,) * 3, WHITE, WHITE],
    ]
    assert tuple(picture[tops[0], lefts[1]]) == RIGHT
    assert tuple(picture[tops[0], lefts[2]]) == WRONG
    assert {RIGHT, WRONG} <= {tuple(map(int, colour)) for colour in picture[:line].reshape(-1, 3)}  # the legend
    for top in tops:
        assert (picture[top - line : top] < 128).any()  # a name
    other = task_picture(task, ["another", names[1]], scores=np.array([[1, 0], [0.7, 0.3]]))
    changed = np.argwhere((picture != other).any((1, 2)))
    assert line <= changed.min() <= changed.max() < 2 * line


def test_the_picture_of_a_task_of_many_examples():
    """The first five of each class, support and query."""
    images, labels = np.zeros((14, MOST_SIDE, MOST_SIDE, 1)), np.tile(np.eye(2), (7, 1))
    picture = task_picture(Tasks(images, labels, images, labels), ["a", "b"], scores=labels)
    assert picture.shape[1] == 2 * 5 * (MOST_SIDE + 4) + GAP


def test_the_first_picture_stays_where_a_validation_is_made_again(tmp_path):
    """A run whose first validation was cut short: the picture of iteration 0 is no part of that."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    with Events(tmp_path, 0) as events:
        for step in (0, 500):
            events.picture(step, "validation_task", pixels)
    with Events(tmp_path, 501, validated=-1):
        pass
    found = [
        event.step for path in tmp_path.iterdir() for event in EventFileLoader(str(path)).Load() if event.summary.value
    ]
    assert found == [0]
