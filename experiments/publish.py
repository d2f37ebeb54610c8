"""Publishes a trained model: its weights alone, in the original's layout, with flags, results and thinned events.

    python experiments/publish.py <run folder> [--iteration 59999] [--to logs/published]

The copy is tested as any run, e.g. with --train=False --test_set=True --logdir=logs/published/. Of the events stay the
curves, every 1,000 iterations, the flags, the layout of the charts, the last pictures and the number of the test.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # noqa: F401, isort: skip (it comes first, since it imports TensorFlow without its notices)

import tensorflow as tf

import events
import runs
from files import InputError, say, writing

EVENT_INTERVAL = 1000
EVENTS = "events.out.tfevents.0.published"


def publish(folder: Path, to: Path, iteration: int = -1) -> Path:
    """Writes the model of a run folder to a folder of the same name below `to`, and returns that."""
    run, copy = runs.Run(folder), to / Path(os.path.abspath(folder)).name
    if copy.resolve() == folder.resolve():
        raise InputError(f"{folder} lies in {to} already: give another --to")
    prefix = Path(run.checkpoint(iteration, "--iteration"))
    for name in ("flags.json", "results.json"):
        if not (folder / name).is_file():
            raise InputError(f"no {name} in {folder}: train and test the run first")
    tests = runs.read_json(folder / "results.json", list, "test the run again")
    if all(test.get("checkpoint") != prefix.name for test in tests):
        raise InputError(f"{folder / 'results.json'} has no test of {prefix.name}: test it first")
    others = [other for other in runs.Run(copy).iterations() if f"model{other}" != prefix.name]
    if others:  # the latest of them would be tested, beside results that are not its own
        raise InputError(f"{copy} has another checkpoint, model{others[-1]}: remove it, or give another --to")
    _, maml, _ = runs.load(folder, iteration)
    with writing(copy):
        copy.mkdir(parents=True, exist_ok=True)
        for name in ("flags.json", "results.json", "classes.json"):
            if (folder / name).is_file():  # there is no list of classes where there are none
                shutil.copyfile(folder / name, copy / name)
        runs.write_checkpoint(copy / prefix.name, {maml.keys[name]: weight for name, weight in maml.weights.items()})
        write_events(folder, copy)
        if (folder / events.TEST_FOLDER).is_dir():
            write_events(folder / events.TEST_FOLDER, copy / events.TEST_FOLDER)
    return copy


def write_events(folder: Path, copy: Path) -> None:
    """The metatrain_ and metaval_ events of every 1,000th iteration, and of all others the last of each tag, in a file.

    The others are the flags, the layout of the charts, pictures, and the number of a test.
    """
    kept, others = [], {}
    for event, record in events.read_all(folder):
        curve = all(value.tag.startswith(("metatrain_", "metaval_")) for value in event.summary.value)
        if curve and event.step % EVENT_INTERVAL == 0:
            kept.append((event.step, event.wall_time, record))
        elif not curve:
            tags = tuple(value.tag for value in event.summary.value)
            found = (event.step, event.wall_time, record)
            others[tags] = max(found, others.get(tags, found))
    kept += others.values()
    copy.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(copy / EVENTS)) as writer:
        for _, _, record in sorted(kept):
            writer.write(record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="run folder, trained and tested")
    parser.add_argument("--iteration", type=int, default=-1, help="of the checkpoint; -1: the latest")
    parser.add_argument("--to", type=Path, default=ROOT / "logs" / "published")
    args = parser.parse_args()
    try:
        say(f"Published: {publish(args.folder, args.to, args.iteration)}")
    except InputError as error:
        parser.exit(1, f"publish.py: {error}\n")
