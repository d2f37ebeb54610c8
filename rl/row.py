"""Trains, tests and records one row of docs/rl.md. The scripts experiments/rl_*.sh call it:

    python rl/row.py <script> flags of rl/main.py

A run that was stopped goes on; a finished one is tested again. All is done from the project's root.
Writes results/<script>.json: the run's flags, iterations, hours, machine, versions and commit, and its test. Another
seed than 0 has .seed<n> in the name.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "experiments")]

import row  # experiments/row.py
from files import write_whole
from rl import main


def record(script: Path, arguments: list[str]) -> Path:
    """Does all of the above; returns the path of what it wrote. Ends where rl/main.py fails or is stopped.

    Arguments that rl/main.py takes for wrong, or for a question, it answers, and nothing is recorded.
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
    parser.add_argument("script", type=Path, help="the script of experiments/ that calls this program")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of rl/main.py")
    args = parser.parse_args()
    script = args.script.resolve()
    if script not in (ROOT / "experiments").glob("rl_*.sh"):
        parser.error(f"{args.script} is not one of experiments/rl_*.sh: call one of those")
    os.chdir(ROOT)
    row.leave_stops_to_programs()
    print("Recorded in", record(script, args.flags))
