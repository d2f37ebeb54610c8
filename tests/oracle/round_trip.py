"""Record how our program and the original read each other's checkpoints; README.md lists the files.

    python -m tests.oracle.round_trip
    /tmp/py37/bin/python tests/oracle/round_trip.py --original=/tmp/original

The first command needs our environment: it trains each model for a few outer steps and saves it as a run folder. The
second needs the environment of record.py: the original restores those checkpoints with its own Saver, computes losses
and accuracies, and saves its variables again. tests/test_round_trip.py compares both sides.
"""

import argparse
import contextlib
import json
from pathlib import Path

ORACLE = Path(__file__).parent
FOLDER = ORACLE / "round_trip"
RECORDING = FOLDER / "original.json"
RECORDS = "sinusoid_10shot sinusoid_oracle_pretrain omniglot_5way_1shot omniglot_layer_norm miniimagenet_5way_1shot"
OUTER_STEPS = 3
MODEL = f"model{OUTER_STEPS - 1}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, metavar="DIR", help="a clone of cbfinn/maml; default: write ours")
    args = parser.parse_args()
    if args.original:
        read_with_the_original(args.original)
    else:
        write_ours()


def write_ours():
    """Save each record's model after a few outer steps on the record's tasks, as <record>/ours."""
    import recipe
    import runs
    from tests.test_oracle import Record

    for name in RECORDS.split():
        record = Record(ORACLE / f"{name}.npz")
        step = record.maml.pretrain_step if record.pretrains else record.maml.train_step
        for _ in range(OUTER_STEPS):
            step(record.tasks)
        run = runs.Run(FOLDER / name / "ours")
        run.folder.mkdir(parents=True, exist_ok=True)
        norm = None if record.flags["norm"] == "None" else record.flags["norm"]
        run.record(recipe.to_flags(recipe.from_flags({**record.flags, "norm": norm})))
        print(run.save(record.maml))


def read_with_the_original(clone):
    """Restore our checkpoints in the original's graph, record its losses and accuracies, and save its weights again."""
    import record as recorder

    recorder.import_libraries()
    import numpy as np
    from tensorflow.compat import v1 as tf

    original = recorder.import_original(clone)
    computed = {}
    for name in RECORDS.split():
        arrays = dict(np.load(str(ORACLE / f"{name}.npz")))
        inputs = {key: value for key, value in arrays.items() if key.startswith(("input", "label"))}
        with contextlib.closing(recorder.Graph(original, json.loads(str(arrays["flags"])))) as graph:
            # As in the original's main.py. Nothing initializes the variables, so restore must set them all.
            saver = tf.train.Saver(tf.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES), max_to_keep=10)
            saver.restore(graph.session, str(FOLDER / name / "ours" / MODEL))
            values = graph.values(graph.feed(inputs))
            computed[name] = {key: np.array(value).tolist() for key, value in values.items() if "total" in key}
            folder = FOLDER / name / "original"
            folder.mkdir(exist_ok=True)
            # The graph's description would take a megabyte; neither side reads it.
            saver.save(graph.session, str(folder / MODEL), write_meta_graph=False, write_state=False)
            print(folder / MODEL, computed[name], flush=True)
    recording = {"tensorflow": recorder.TENSORFLOW, "commit": recorder.COMMIT, "computed": computed}
    RECORDING.write_text(json.dumps(recording, indent=1) + "\n")


if __name__ == "__main__":
    main()
