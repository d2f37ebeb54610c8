"""Prints a 10-shot sinusoid test beside the original's, update by update.

    python experiments/compare_sinusoid.py logs/sine/<run>/results.json

The original's numbers: cbfinn/maml on TensorFlow 1.15, its documented 70,000 iterations, mean squared error over 600
test tasks (intervals 0.038 after one update, 0.017 after ten). Column 0 is the support set before any update.
"""

import argparse
import json
from pathlib import Path

ORIGINAL = (3.10, 0.431, 0.255, 0.203, 0.182, 0.165, 0.157, 0.151, 0.148, 0.145, 0.142)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a run folder")
    path = parser.parse_args().results
    if not path.is_file():
        parser.exit(1, f"{path}: no such file; test the run with --train=False --test_set=True first\n")
    protocol = {"data_set": "sinusoid", "split": "test", "tasks": 600, "task_seed": 0}
    protocol |= {"support_examples_a_class_K": 10, "inner_step_size_alpha": 0.001}
    tested = [entry for entry in json.loads(path.read_text()) if protocol.items() <= entry.items()]
    if not tested:
        parser.exit(1, f"{path} has no 10-shot test; test the run with --train=False --test_set=True first\n")
    print("Mean squared error, 600 test tasks\n")
    print("updates   this run             the original")
    for column, original in zip(tested[-1]["results"], ORIGINAL, strict=False):
        print(f"{column['updates']:7}   {column['mean']:.3f} +- {column['ci95']:.3f}      {original:.3f}")


if __name__ == "__main__":
    main()
