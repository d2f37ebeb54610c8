"""Publishes a trained model: its weights alone, in the original's layout, with flags, results and thinned events.

    python experiments/publish.py <run folder> [--iteration 59999] [--to logs/published]

The copy is tested as any run, e.g. with --train=False --test_set=True --logdir=logs/published/. Of the events stay the
curves, every 1,000 iterations, the flags, the layout of the charts, the last pictures and the number of the test.
"""

import argparse
import itertools
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # noqa: F401, isort: skip (before TensorFlow, which reads what it sets)

import tensorflow as tf

import report
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
        if (folder / report.TEST_FOLDER).is_dir():
            write_events(folder / report.TEST_FOLDER, copy / report.TEST_FOLDER)
    return copy


def write_events(folder: Path, copy: Path) -> None:
    """Write one event file: the curves of every 1,000th iteration, and the last event of every other tag.

    The others are the flags, the layout of the charts, pictures, and the result of a test.
    """
    kept = {}  # the last event of each key
    for event in itertools.chain(*report.read(folder)):
        tags = tuple(value.tag for value in event.summary.value)
        curve = bool(tags) and all(tag.startswith(("metatrain_", "metaval_")) for tag in tags)
        if event.file_version or (tags and not (curve and event.step % EVENT_INTERVAL)):
            kept[tags, event.step if curve else None] = event
    copy.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(copy / EVENTS)) as writer:
        for event in sorted(kept.values(), key=lambda event: (not event.file_version, event.step, event.wall_time)):
            writer.write(event.SerializeToString())


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
