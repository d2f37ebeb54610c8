"""Compare a 10-shot sinusoid test with the original's, update by update.

    python experiments/compare_sinusoid.py logs/sine/<run>/results.json

The table has mean squared errors over 600 test tasks; at 0 updates, on the support set. A pretrained network or an
oracle is compared with the original's. results/published.json has the original's numbers and their source.
"""

import argparse
import json
import re
from pathlib import Path

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published.json"
TEST = {"support_examples_a_class_K": 10, "query_examples_a_class_Q": 10, "inner_step_size_alpha": 0.001}
# Part of a run folder's name -> row of published.json.
BASELINES = {r"oracle": "sinusoid_oracle", r"\.pretrain(?!\d)": "sinusoid_pretrained"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=lambda text: Path(text).expanduser(), help="results.json of a run folder")
    path = parser.parse_args().results
    if not path.is_file():
        parser.exit(1, f"{path}: does not exist; test the run with --train=False --test_set=True first\n")
    protocol = TEST | {"data_set": "sinusoid", "split": "test", "tasks": 600, "task_seed": 0}
    try:
        tested = [entry for entry in json.loads(path.read_text()) if protocol.items() <= entry.items()]
    except (ValueError, TypeError, AttributeError):
        parser.exit(1, f"{path}: is not a run's results.json; test the run with --train=False --test_set=True first\n")
    if not tested:
        parser.exit(1, f"{path}: has no 10-shot test; test the run with --train=False --test_set=True first\n")
    run = str(tested[-1].get("run"))
    row = next((row for name, row in BASELINES.items() if re.search(name, run)), "sinusoid_maml")
    known = TEST | {"row": row, "reported_by": "original code"}
    (original,) = [entry for entry in json.loads(PUBLISHED.read_text()) if known.items() <= entry.items()]
    print("Mean squared error, 600 test tasks\n")
    print("updates   this run             the original")
    for column, theirs in zip(tested[-1]["results"], original["results"], strict=False):
        error = "diverged" if column["mean"] is None else f"{column['mean']:.3f} +- {column['ci95']:.3f}"
        print(f"{column['updates']:7}   {error:<20}{theirs['mean']:.3f}")


if __name__ == "__main__":
    main()
