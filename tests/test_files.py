"""Whole-file writes, and errors of the disk in one line."""

import errno
import os

import pytest
import tensorflow as tf

import files
from files import InputError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "here"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=str(tmp_path)), files.writing(tmp_path):
        files.write_whole(path, fail)
    assert path.read_bytes() == b"old"

    def fill(file):
        file.write(b"a" * 5)
        file.flush()
        files.write_whole(path, lambda other: other.write(b"b" * 9))  # a second process
        assert path.read_bytes() == b"b" * 9
        file.write(b"a" * 5)

    files.write_whole(path, fill)
    assert path.read_bytes() == b"a" * 10
    assert os.listdir(tmp_path) == ["here"]


def test_others_can_read_what_is_written(tmp_path):
    (tmp_path / "usual").write_text("x")
    files.write_whole(tmp_path / "here", lambda file: file.write(b"x"))
    assert (tmp_path / "here").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_tensorflows_failures_to_write_name_the_path(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=str(tmp_path)) as error, files.writing(tmp_path):
        tf.io.write_file(str(tmp_path / "file" / "below"), "x")
    assert len(str(error.value).splitlines()) == 1
