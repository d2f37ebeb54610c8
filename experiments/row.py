"""Train, test and record one row of the tables in docs/results.md. The scripts in experiments/ call this program:

    python experiments/row.py <script> <training flags> -- [test flags] [-- [test flags]] ...

Each `--` starts a test of the trained model on the test classes, with the training flags and the flags that follow. A
stopped run continues; a finished run is tested again. The program works in the project's root, so relative paths in
flags start there.

The record results/<script>.json holds the run's flags, iterations, hours, machine, versions and commit, and its tests
from the run's results.json. A seed other than 0 adds .seed<n> to the name, and a method other than MAML (--adapt,
--learn_update_lr) adds its part of the run folder's name. --results_dir sets another folder.
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

import devices  # isort: skip  sets TensorFlow's environment before the import

import numpy as np
import tensorflow as tf
from absl.flags import Error

import main
import recipe
import report
from files import user_path, write_whole


def record(script: Path, training: list[str], tests: list[list[str]]) -> Path:
    """Train and test, and return the path of the record. Exit if main.py fails or is stopped.

    Check all flags before training. If main.py rejects them, or they contain --help, run it once to print its answer.
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
        results = json.loads(tested.read_text())
        entries.append([entry for entry in results if entry.get("run") == run.folder.name][-1])
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


def split_flags(arguments: list[str]) -> tuple[list[str], list[list[str]]]:
    """Split arguments at each `--`; return the flags of training, and those of each test."""
    groups = [[]]
    for argument in arguments:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    return groups[0], groups[1:]


def run_program(name: str, flags: list[str]) -> None:
    """Run a program of the project, such as main.py. Exit if it fails or is stopped."""
    program = subprocess.Popen([sys.executable, name, *flags])
    try:
        code = program.wait()
    except SystemExit:  # SIGTERM
        program.terminate()
        program.wait()
        raise
    if code:
        sys.exit(code)


def leave_stops_to_programs() -> None:
    """Let the running child save and exit on a stop, and then exit.

    The terminal sends Ctrl-C to the child too. run_program forwards SIGTERM.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def circumstances(folder: Path) -> dict:
    """Return the training hours of a run folder, and the machine, versions, commit and date of the record."""
    return {
        "hours": round(training_hours(folder), 4),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def training_hours(folder: Path) -> float:
    """Return the hours that a run spent training, from the times of its events.

    Excluded are:
      - the time between a stop and the next start, because each start of main.py begins an event file, with an event
        before the graph is traced;
      - iterations that a later start repeats;
      - gaps between events that exceed both a minute and ten median gaps of the file: the machine slept, or the program
        was suspended.
    """
    seconds = 0.0
    for events in report.read(folder):
        times = {event.step: event.wall_time for event in events}  # the last event of each step
        gaps = np.diff(sorted([*(event.wall_time for event in events[:1]), *times.values()]))
        if gaps.size:  # a full disk leaves an empty file
            seconds += gaps[gaps <= max(60, 10 * np.median(gaps))].sum()
    return float(seconds) / 3600


def machine() -> dict:
    """Describe this machine. It ran the tests, and the training unless the run folder came from elsewhere."""
    return {
        "processor": devices.processor(),
        "cores": devices.cores(),
        "gpus": devices.gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """Return the commit of the code, plus "+changes" if a tracked .py file differs from it.

    Return None outside a git clone or without git.
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
    """Parse the command line; return the script, the training flags, and the flags of each test.

    Exit with status 2 if it is invalid.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=user_path, help="script in experiments/ that names the row")
    parser.add_argument("flags", nargs="*", help="flags of main.py, as above")
    script = parser.parse_args(arguments[:1]).script.resolve()  # the rest, even --help, goes to main.py
    scripts = ROOT / "experiments"
    known = sorted(set(scripts.glob("*.sh")) - set(scripts.glob("rl_*")))  # rl/row.py records the latter
    if script not in known:
        names = ", ".join(path.name for path in known)
        parser.error(f"{arguments[0]}: is not a script of main.py in experiments/; choose one of {names}")
    training, tests = split_flags(arguments[1:])
    if not tests:
        parser.error(f"{arguments[0]}: has no test to record; start a test with --")
    return script, training, tests


if __name__ == "__main__":
    script, training, tests = parse(sys.argv[1:])
    os.chdir(ROOT)
    leave_stops_to_programs()
    print("Recorded in", record(script, training, tests))
