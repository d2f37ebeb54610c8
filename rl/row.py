"""Train, test and record one row of docs/rl.md. Called by the scripts experiments/rl_*.sh:

    python rl/row.py <script> <flags of rl/main.py>

A stopped run is resumed; a finished one is tested again. The working folder is the project's root.
The record is results/<script>.json, or <script>.seed<n>.json for a seed other than 0: the run's flags, iterations,
hours, machine, versions, commit and test.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "experiments")]

import row  # experiments/row.py
from files import user_path, write_whole
from rl import main


def record(script: Path, arguments: list[str]) -> Path:
    """Train, test and write the record. Return its path. Exit if rl/main.py fails or is stopped.

    For --help or invalid arguments, rl/main.py answers and nothing is recorded.
    """
    identity = main.asked_for(arguments)
    if identity is None:
        sys.exit(row.run_program("rl/main.py", arguments))
    run = main.run_folder(identity)
    if identity["baseline"] != "random":
        row.run_program("rl/main.py", arguments)
    row.run_program("rl/main.py", [*arguments, "--train=False"])
    record = {
        "row": script.stem,
        **json.loads((run.folder / "results.json").read_text()),
        **row.circumstances(run.folder),
    }
    seed = f".seed{identity['seed']}" if identity["seed"] else ""
    path = ROOT / "results" / f"{script.stem}{seed}.json"
    write_whole(path, lambda file: file.write((json.dumps(record) + "\n").encode()))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=user_path, help="the script in experiments/ that calls this program")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of rl/main.py")
    args = parser.parse_args()
    script = args.script.resolve()
    if script not in (ROOT / "experiments").glob("rl_*.sh"):
        parser.error(f"{args.script}: is not one of experiments/rl_*.sh; call one of those")
    os.chdir(ROOT)
    row.leave_stops_to_programs()
    print("Recorded in", record(script, args.flags))
