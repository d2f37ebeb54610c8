"""TensorBoard events of resumed runs and in damaged files; pictures of tasks."""

import os
import pickle

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

import report
from report import ENLARGE_TO, FONT_SIZE, GAP, RIGHT, WHITE, WRONG, Events, task_picture
from utils import Tasks


def write(folder, start, steps, value):
    with Events(folder, start) as events:
        for step in steps:
            events.scalars(step, {"loss": value})


@pytest.mark.parametrize(
    ("starts", "newest"),
    [
        ([(0, [0, 100, 200, 300]), (201, [300, 400]), (301, [400])], {0: 1, 100: 1, 200: 1, 300: 2, 400: 3}),
        ([(0, [0, 100, 200]), (101, [])], {0: 1, 100: 1}),
        ([(0, [0, 100]), (0, [0])], {0: 2}),
    ],
    ids=["resumed twice", "resumed and killed", "started over"],
)
def test_readers_see_the_newest_values_of_a_resumed_run(starts, newest, tmp_path):
    """With our reader and TensorBoard's. TensorBoard's default loader, a separate program, drops older values too."""
    for value, (start, steps) in enumerate(starts, 1):
        write(tmp_path / "run", start, steps, value)
    assert report.scalars(tmp_path / "run") == {"loss": newest}
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    points = [(event.step, tf.make_ndarray(event.tensor_proto)) for event in multiplexer.Tensors("run", "loss")]
    assert points == list(newest.items())


def test_the_originals_values_are_read(tmp_path):
    """TensorFlow 1 wrote simple values. Text is skipped."""
    summary = tf.compat.v1.Summary(value=[tf.compat.v1.Summary.Value(tag="metatrain_Pre-update_loss", simple_value=2)])
    event = tf.compat.v1.Event(step=100, summary=summary)
    with tf.io.TFRecordWriter(str(tmp_path / "events.out.tfevents.1500000000.host")) as writer:
        writer.write(event.SerializeToString())
    with Events(tmp_path, 200) as events:
        events.flags(200, {"seed": 1})
    assert report.scalars(tmp_path) == {"metatrain_Pre-update_loss": {100: 2}}


def test_readers_accept_the_names_that_our_tags_had(tmp_path):
    """The original's tags, and a user's own, keep theirs."""
    names = {
        "metatrain_Post-update_mean_loss__step_5": "train/Post-update_mean_loss__step_5",
        "metaval_Pre-update_mean_loss": "validation/Pre-update_mean_loss",
        "metatrain_gradient_norm": "train/gradient_norm",
        "metatrain_step_milliseconds": "speed/step_milliseconds",
    }
    names |= {tag: tag for tag in ("metaval_Pre-update_loss", "metatrain_Pre-update_loss", "loss", "train/x")}
    with Events(tmp_path, 0) as events:
        events.scalars(0, dict.fromkeys(names, 1.0))
    assert report.scalars(tmp_path) == {tag: {0: 1} for tag in names.values()}
    with Events(tmp_path / "test", 0) as events:
        events.scalars(0, {"loss": 2})
    assert report.scalars(tmp_path / "test") == {"test/loss": {0: 2}}


@pytest.mark.parametrize("cut", [1, 30])
def test_a_killed_process_loses_only_its_last_value(cut, tmp_path):
    write(tmp_path, 0, [0, 100, 200], value=1)
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - cut)
    write(tmp_path, 201, [300], value=1)
    assert report.scalars(tmp_path) == {"loss": {0: 1, 100: 1, 300: 1}}


class Exploit:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_an_event_file_cannot_run_code(tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(pickle.dumps(Exploit(str(tmp_path / "created"))))
    assert report.scalars(tmp_path) == {}
    assert not (tmp_path / "created").exists()


def test_a_task_picture_sorts_and_frames_query_images_by_prediction():
    """2-way 1-shot with gray 42x42 images. Both query images are classified as the first class."""
    support, query = (np.full((2, 42, 42, 1), [[[[0.2]]], [[[0.8]]]]) + shift for shift in (0, 0.1))
    labels, names = np.eye(2), ["a\udcff", "b" * 500]  # the first contains a byte that is not UTF-8
    picture = task_picture(Tasks(support, labels, query, labels), names, scores=np.array([[1, 0], [0.7, 0.3]]))
    side, line = ENLARGE_TO + 4, 2 * FONT_SIZE  # a framed image; a line of text
    height, width, _ = picture.shape
    assert height == line + 2 * (line + side)
    tops, lefts = [2 * line, 3 * line + side], [0, side + GAP, 2 * side + GAP]
    assert lefts[-1] + side <= width < 6 * side  # the width of the images or the legend, not of the name
    colors = [[tuple(map(int, picture[y + side // 2, x + side // 2])) for x in lefts] for y in tops]
    assert colors == [
        [(51,) * 3, (77,) * 3, (230,) * 3],  # class 0: its support image, then the query images classified as it
        [(204,) * 3, WHITE, WHITE],
    ]
    assert tuple(picture[tops[0], lefts[1]]) == RIGHT
    assert tuple(picture[tops[0], lefts[2]]) == WRONG
    for top in tops:
        assert (picture[top - line : top] < 128).any()  # the class name


def test_a_task_picture_has_a_bounded_size():
    """Of many classes, all of whose queries are classified as the first, and of large images."""
    for way, side in ((300, 28), (5, 400)):
        images, labels = np.zeros((2 * way, side, side, 1)), np.tile(np.eye(way), (2, 1))
        scores = np.eye(way)[np.zeros(2 * way, int)]
        task, names = Tasks(images, labels, images, labels), [str(label) for label in range(way)]
        height, width, _ = task_picture(task, names, scores).shape
        assert height <= (20 + 5) * (2 * ENLARGE_TO + 4 + 2 * FONT_SIZE) + 2 * FONT_SIZE
        assert width <= 6 * (2 * ENLARGE_TO + 4) + GAP


def test_a_task_picture_has_five_examples_per_class():
    """Six images a line, so that TensorBoard shows the text large enough: the other queries follow below."""
    images, labels = np.zeros((14, ENLARGE_TO, ENLARGE_TO, 1)), np.tile(np.eye(2), (7, 1))
    picture = task_picture(Tasks(images, labels, images, labels), ["a", "b"], scores=labels)
    side, line = ENLARGE_TO + 4, 2 * FONT_SIZE
    assert picture.shape[0] == line + 2 * (line + 2 * side)
    top = 2 * line + side  # of the first class's second line
    right = (picture[top] == RIGHT).all(-1)
    assert right[: 4 * side].all() and not right[4 * side :].any()
    assert (picture[top - side, 5 * side + GAP : 6 * side + GAP] == RIGHT).all()
