"""Whole-file writes, and one-line errors for failed ones."""

import errno
import os
from pathlib import Path

import pytest
import tensorflow as tf

import files
from files import InputError


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
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
        files.write_whole(path, lambda other: other.write(b"b" * 9))  # as a concurrent process would
        assert path.read_bytes() == b"b" * 9
        file.write(b"a" * 5)

    files.write_whole(path, fill)
    assert path.read_bytes() == b"a" * 10
    assert os.listdir(tmp_path) == ["file"]


def test_written_files_have_the_default_permissions(tmp_path):
    (tmp_path / "default").write_text("x")
    files.write_whole(tmp_path / "file", lambda file: file.write(b"x"))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "default").stat().st_mode


def test_tensorflows_write_errors_name_the_path(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=str(tmp_path)) as error, files.writing(tmp_path):
        tf.io.write_file(str(tmp_path / "file" / "below"), "x")
    assert len(str(error.value).splitlines()) == 1


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    """At the start of a path. An unknown user's is not an error here: the path does not exist."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert files.user_path("~/a") == tmp_path / "a"
    assert files.user_path("a/~") == Path("a/~")
    assert files.user_path("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
