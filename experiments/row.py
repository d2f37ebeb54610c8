"""Trains, tests and records one row of the tables in docs/results.md. The scripts beside it call it:

    python experiments/row.py <script> flags of training ... -- [flags at test ...] [-- [flags at test ...]] ...

Every `--` begins a test of the trained model on the test classes. The test takes the flags that follow, and those of
training. A run that was stopped goes on; a finished one is tested again. The program works in the project's root, so a
path that a flag gives begins there.

Writes results/<script>.json: the run's flags, iterations, hours, machine, versions and commit, and its tests as they
stand in the run's results.json. Another seed than 0 has .seed<n> in the name, and another method than MAML
(--adapt, --learn_update_lr) its part of the run folder's name. With --results_dir it is written there.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # isort: skip  before TensorFlow, which reads what it sets

import numpy as np
import tensorflow as tf
from absl.flags import Error

import main
import recipe
import report
from files import write_whole


def record(script: Path, training: list[str], tests: list[list[str]]) -> Path:
    """Does all of the above; returns the path of what it wrote. Ends the program where main.py fails or is stopped.

    All flags are read before anything is trained. Those that main.py takes for wrong, or for a question, it answers.
    """
    for flags in (training, *([*training, *more] for more in tests)):
        try:
            main.parsed(flags)
        except Error:
            sys.exit(run_program("main.py", flags))
    run_program("main.py", training)
    values = main.parsed(training)
    run, results_dir = main.run_folder(values), values.results_dir
    flags = json.loads((run.folder / "flags.json").read_text())
    tested = Path(results_dir or run.folder) / "results.json"
    entries = []
    for more in tests:
        run_program("main.py", [*training, *more, "--train=False", "--test_set=True"])
        entries.append([one for one in json.loads(tested.read_text()) if one.get("run") == run.folder.name][-1])
    row = {
        "row": script.stem,
        "flags": flags,
        "iterations": run.iterations()[-1] + 1,
        **circumstances(run.folder),
        "tests": entries,
    }
    seed = f".seed{flags['seed']}" if flags["seed"] else ""
    variant = recipe.from_flags(flags).variant
    path = Path(results_dir or ROOT / "results") / f"{script.stem}{variant}{seed}.json"
    text = json.dumps(row, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def parts(arguments: list[str]) -> tuple[list[str], list[list[str]]]:
    """The flags of training, and those of each test, which a `--` begins."""
    found = [[]]
    for argument in arguments:
        if argument == "--":
            found.append([])
        else:
            found[-1].append(argument)
    return found[0], found[1:]


def run_program(name: str, flags: list[str]) -> None:
    """Runs main.py or another program of the project. Ends this one where that fails or is stopped."""
    program = subprocess.Popen([sys.executable, name, *flags])
    try:
        code = program.wait()
    except SystemExit:  # by SIGTERM
        program.terminate()
        program.wait()
        raise
    if code:
        sys.exit(code)


def leave_stops_to_programs() -> None:
    """A stop is that of the program that runs, which saves and ends, and this one with it.

    Ctrl-C reaches it by itself, SIGTERM does not.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def circumstances(folder: Path) -> dict:
    """How long the training of this run folder took, and where, when and with what it was recorded."""
    return {
        "hours": round(training_hours(folder), 4),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def training_hours(folder: Path) -> float:
    """Return the hours for which the run was at work, by the times of its events.

    Every start of main.py begins a file, with an event before the graph is traced, so the time between a stop and the
    next start does not count. Nor do iterations that a later start repeats. Nor does a gap between two iterations with
    events that is longer than a minute and than ten usual gaps of its file: the machine slept, or the program was
    suspended.
    """
    seconds = 0.0
    for events in report.read(folder):
        times = {event.step: event.wall_time for event in events}  # the last of each: its others come in one moment
        gaps = np.diff(sorted([*(event.wall_time for event in events[:1]), *times.values()]))
        if gaps.size:  # none where the disk was full
            seconds += gaps[gaps <= max(60, 10 * np.median(gaps))].sum()
    return float(seconds) / 3600


def machine() -> dict:
    """What the tests ran on; the training too, unless the run folder came from elsewhere."""
    return {
        "processor": devices.processor(),
        "cores": devices.cores(),
        "gpus": devices.gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of the code, with +changes where a tracked .py file differs from it.

    None outside a git clone, and where git is not installed.
    """
    if not shutil.which("git"):
        return None

    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return None
    changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    return head.stdout.strip() + ("+changes" if changed else "")


def parse(arguments: list[str]) -> tuple[Path, list[str], list[list[str]]]:
    """Reads the command line, and ends the program where it is wrong, before anything is trained.

    Returns:
      The script, the flags of training, and those of each test.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="a script of experiments/, which gives the row its name")
    parser.add_argument("flags", nargs="*", help="flags of main.py, as above")
    script = parser.parse_args(arguments[:1]).script.resolve()  # what follows is main.py's, a --help too
    scripts = ROOT / "experiments"
    known = sorted(set(scripts.glob("*.sh")) - set(scripts.glob("rl_*")))  # which rl/row.py records
    if script not in known:
        names = ", ".join(path.name for path in known)
        parser.error(f"{arguments[0]} is no script of experiments/ for main.py: call one of those, {names}")
    training, tests = parts(arguments[1:])
    if not tests:
        parser.error("no test, so there is nothing to record: begin one with --")
    return script, training, tests


if __name__ == "__main__":
    script, training, tests = parse(sys.argv[1:])
    os.chdir(ROOT)
    leave_stops_to_programs()
    print("Recorded in", record(script, training, tests))
