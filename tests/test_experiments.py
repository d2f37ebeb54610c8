"""The scripts behind the README's results: what they run, what they record, and the tables made of it."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from tensorflow.core.util import event_pb2

import main
import runs
from data_generator import DATASETS

ROOT = Path(main.__file__).parent
SCRIPTS = sorted((ROOT / "experiments").glob("*.sh"))

sys.path.insert(0, str(ROOT / "experiments"))
import publish
import row
import table


def main_program(arguments: list[str], **_) -> subprocess.CompletedProcess:
    """What a process of main.py does, in this one: subprocess.run([python, 'main.py', ...])."""
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()):
        try:
            main._run(main._parse(arguments[1:]))
        except SystemExit as end:
            return subprocess.CompletedProcess(arguments, end.code)
    return subprocess.CompletedProcess(arguments, 0)


def run_main(*arguments: object) -> None:
    assert main_program(["python", "main.py", *map(str, arguments)]).returncode == 0


def called(script: Path, folder: Path, *arguments: str) -> list[list[str]]:
    """What a script, called from `folder`, hands to row.py: the flags of training, then those of each test."""
    printer = folder / "python"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    environment = os.environ | {"PYTHON": str(printer)}
    command = [os.path.relpath(script, folder), *arguments]
    printed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    program, name, *handed = printed.splitlines()
    assert (folder / program).resolve() == ROOT / "experiments" / "row.py"
    assert Path(name).stem == script.stem
    return [part.split() for part in " ".join(handed).split("--\x20")] if False else _parts(handed)


def _parts(arguments):
    parts = [[]]
    for argument in arguments:
        parts.append([]) if argument == "--" else parts[-1].append(argument)
    return parts
