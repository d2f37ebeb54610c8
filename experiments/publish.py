"""Publish a trained model: its weights in the original's layout, flags, results and thinned events.

    python experiments/publish.py <run folder> [--iteration 59999] [--to logs/published]

Test the copy like any run, e.g. with --train=False --test_set=True --logdir=logs/published/. The events keep the curves
(every 1,000 iterations), the flags, the layout of the charts, the last pictures and the test result. SHA256SUMS has the
checksums of the checkpoint's files, for verify.py and sha256sum --check.
"""

import argparse
import hashlib
import itertools
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # noqa: F401, isort: skip (sets TensorFlow's environment before the import)

import tensorflow as tf

import report
import runs
from files import InputError, say, user_path, writing

PUBLISHED = ROOT / "logs" / "published"
CHECKSUMS = "SHA256SUMS"
EVENT_INTERVAL = 1000
CURVES = "metatrain_", "metaval_", "train/", "validation/P", "speed/"  # tags of curves, not of pictures
EVENTS = "events.out.tfevents.0.published"


def publish(folder: Path, to: Path, iteration: int = -1) -> Path:
    """Publish the model of a run folder as a folder of the same name in `to`; return the new folder.

    Raise InputError if the run was not tested at this iteration, or `to` holds the run or another checkpoint of it.
    """
    run, copy = runs.Run(folder), to / Path(os.path.abspath(folder)).name
    if copy.resolve() == folder.resolve():
        raise InputError(f"--to: {folder} is already in {to}; choose another folder")
    prefix = Path(run.checkpoint(iteration, "--iteration"))
    for name in ("flags.json", "results.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: does not exist; train and test the run first")
    tests = runs.read_json(folder / "results.json", list, "test the run again")
    if all(test.get("checkpoint") != prefix.name for test in tests):
        raise InputError(f"{folder / 'results.json'}: has no test of {prefix.name}; test it first")
    others = [other for other in runs.Run(copy).iterations() if f"model{other}" != prefix.name]
    if others:  # a test would use the latest checkpoint, which the published results may not describe
        raise InputError(f"--to: {copy} has another checkpoint, model{others[-1]}; remove it or choose another folder")
    _, maml, _ = runs.load(folder, iteration)
    with writing(copy):
        copy.mkdir(parents=True, exist_ok=True)
        for name in ("flags.json", "results.json", "classes.json"):
            if (folder / name).is_file():  # a sinusoid run has no classes.json
                shutil.copyfile(folder / name, copy / name)
        runs.write_checkpoint(copy / prefix.name, {maml.keys[name]: weight for name, weight in maml.weights.items()})
        (copy / CHECKSUMS).write_text("".join(f"{checksum}  {name}\n" for name, checksum in checksums(copy).items()))
        write_events(folder, copy)
        if (folder / report.TEST_FOLDER).is_dir():
            write_events(folder / report.TEST_FOLDER, copy / report.TEST_FOLDER)
    return copy


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the checkpoints in a folder, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("model*"))}


def write_events(folder: Path, copy: Path) -> None:
    """Write one event file: the curves at every EVENT_INTERVAL-th iteration, and the last event of every other tag."""
    kept = {}  # the last event of each key
    for event in itertools.chain(*report.read(folder)):
        tags = tuple(value.tag for value in event.summary.value)
        curve = bool(tags) and all(tag.startswith(CURVES) for tag in tags)
        if event.file_version or (tags and not (curve and event.step % EVENT_INTERVAL)):
            kept[tags, event.step if curve else None] = event
    copy.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(copy / EVENTS)) as writer:
        for event in sorted(kept.values(), key=lambda event: (not event.file_version, event.step, event.wall_time)):
            writer.write(event.SerializeToString())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="a run folder, trained and tested")
    parser.add_argument("--iteration", type=int, default=-1, help="checkpoint to publish (-1: the latest)")
    parser.add_argument("--to", type=user_path, default=PUBLISHED, help="parent folder of the copy")
    args = parser.parse_args()
    try:
        say(f"Published: {publish(args.folder, args.to, args.iteration)}")
    except InputError as error:
        parser.exit(1, f"publish.py: {error}\n")
