"""Check the claims of README.md ("Why trust it") on this machine, and print them in a table.

    make verify

Each row has the recorded or allowed value, the measured value, and whether the claim holds. The measurements are those
of the tests: the recorded batches of the authors' graph (tests/oracle), finite differences, a run that is killed, and
the published models. Rows whose data are missing are printed as "not measured". The exit status is 1 if
anything that could be measured does not hold.
"""

import argparse
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # noqa: F401, isort: skip (sets TensorFlow's environment before the import)

import numpy as np

import recipe
import runs
from files import InputError, printable, read_json
from images import image_files
from publish import CHECKSUMS, PUBLISHED, checksums
from tests import test_oracle, test_special_grads
from tests.helpers import only_run, run, start_main, train_until_killed
from verify_bits import digest

PROTOCOL = {"update_batch_size": "support_examples_a_class_K", "update_lr": "inner_step_size_alpha"}  # flag: key
# The recorded or allowed value, the measured value, and whether the claim holds; None: cannot be measured here.
Result = tuple[str, str, bool | None]


def parity() -> Iterator[tuple[str, Callable[[], Result]]]:
    """Compare with the authors' graph, by record: losses, accuracies and meta-gradients."""
    paths = test_oracle.RECORDS + test_oracle.SHARED_RECORDS
    records = {test_oracle.ids(path): test_oracle.Record(path) for path in paths}
    curves = functools.cache(lambda: {name: test_oracle.curve_errors(record) for name, record in records.items()})

    def curve(part, most):
        return largest({name: errors[part] for name, errors in curves().items()}, most)

    yield f"losses, {len(records)} records", functools.partial(curve, 0, test_oracle.LOSSES)
    yield "their accuracies", functools.partial(curve, 1, test_oracle.ACCURACIES)

    def meta_gradient(names, most):
        errors = {name: test_oracle.meta_gradient_errors(records[name]) for name in names}
        return largest({name: np.max([*of_weights.values()]) for name, of_weights in errors.items()}, most)

    allowed = {name: test_oracle.tolerances(each.flags)[0] for name, each in records.items() if not each.pretrains}
    for most in sorted({*allowed.values()}):
        names = [name for name in allowed if allowed[name] == most]
        yield f"meta-gradients, {len(names)} records", functools.partial(meta_gradient, names, most)
    if not test_oracle.SHARED_RECORDS:
        yield "larger records", lambda: ("../shared/oracle", "not there", None)


def second_derivatives() -> Iterator[tuple[str, Callable[[], Result]]]:
    """Compare batch norm's second derivatives with finite differences."""
    shapes = test_special_grads.SHAPES
    yield (
        f"batch norm's, {len(shapes)} shapes",
        lambda: largest(
            {str(shape): test_special_grads.finite_difference_errors(shape)[1] for shape in shapes},
            test_special_grads.SECOND,
        ),
    )


def resume() -> Iterator[tuple[str, Callable[[], Result]]]:
    """Compare a run that is killed and started again with one that is not."""

    def digests():
        flags = "--datasource=sinusoid", "--norm=None", "--metatrain_iterations=600", "--save_interval=299"
        with tempfile.TemporaryDirectory() as folder:
            killed, uninterrupted = Path(folder, "killed"), Path(folder, "uninterrupted")
            train_until_killed(500, *flags, f"--logdir={killed}")
            ends = []
            for logdir in (uninterrupted, killed):
                run(*flags, f"--logdir={logdir}")
                ends.append(digest(runs.Run(only_run(logdir)).checkpoint()))
        return ends[0][:16], ends[1][:16], ends[0] == ends[1]

    yield "SHA-256 of the weights of a killed run", digests


def published() -> Iterator[tuple[str, Callable[[], Result]]]:
    """Check the files of each published model, and test it again as in training, if its images are here."""
    for folder in sorted(path for path in PUBLISHED.iterdir() if path.is_dir()):
        yield f"{folder.name}: SHA-256", functools.partial(same_files, folder)
        yield f"{folder.name}: test", functools.partial(same_result, folder)


CLAIMS = {  # as in README.md
    "Parity": parity,
    "Second derivatives": second_derivatives,
    "Bitwise resume": resume,
    "Published models": published,
}


def largest(errors: dict[str, float], most: float) -> Result:
    """Return the result for the largest of some errors, which must be less than `most`."""
    name = list(errors)[int(np.argmax([*errors.values()]))]  # NaN is the largest
    return f"below {most:.0e}", f"{errors[name]:.1e} ({name})", bool(errors[name] < most)


def same_files(folder: Path) -> Result:
    """Compare the checkpoint of a published model with its SHA256SUMS. A difference is shown with the file's name."""
    lines = (folder / CHECKSUMS).read_text().splitlines()
    expected, actual = {name: checksum for checksum, name in map(str.split, lines)}, checksums(folder)
    differing = [name for name in sorted({*expected, *actual}) if expected.get(name) != actual.get(name)]
    name = differing[0] if differing else min(expected)
    where = f" ({name})" if differing else ""
    return expected.get(name, "no record")[:16], actual.get(name, "missing")[:16] + where, not differing


def same_result(folder: Path) -> Result:
    """Test a published model again, with the K and alpha of its training; compare the paper's last column."""
    flags = read_json(folder / "flags.json", dict, "restore it from git")
    tests = read_json(folder / "results.json", list, "restore it from git")
    trained = {key: flags[flag] for flag, key in PROTOCOL.items()}
    test = next(test for test in tests if trained.items() <= test.items())
    column = [column for column in test["results"] if column["the_papers_number"]][-1]
    recorded = f"{column['mean']:.4f} +- {column['ci95']:.4f}"
    images = recipe.from_flags(flags).dataset.images
    if images and not image_files(str(ROOT / images.folder)):
        return recorded, f"no images in {images.folder}", None
    with tempfile.TemporaryDirectory() as results:
        again = repeat_test(folder, test, Path(results))["results"][column["updates"]]["mean"]
    return recorded, f"{again:.4f}", abs(again - column["mean"]) <= column["ci95"]


def repeat_test(folder: Path, test: dict, results: Path, *flags: str) -> dict:
    """Repeat a test that the results.json of a run folder has; return its new entry in that of `results`.

    Raise InputError if main.py fails or warns.
    """
    flags = *flags, *(f"--{flag}={test[key]}" for flag, key in PROTOCOL.items())
    ended = start_main(f"--run={folder}", "--train=False", "--test_set=True", f"--results_dir={results}", *flags)
    if ended.code or ended.err:
        raise InputError(ended.err)
    return json.loads((results / "results.json").read_text())[-1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that each record is traced
    verdicts = []

    def show(*cells):
        print("{:78}  {:18}  {:52}  {}".format(*map(printable, cells)).rstrip(), flush=True)

    show("claim", "recorded", "measured now", "holds")
    for claim, rows in CLAIMS.items():
        print(claim)
        for what, measure in rows():
            try:
                recorded, measured, holds = measure()
            except Exception as error:  # one measurement that fails must not hide the others
                recorded, measured, holds = "", f"{type(error).__name__}: {error}", False
            verdicts.append(holds)
            show(f"  {what}", recorded, measured, {True: "yes", False: "NO", None: "not measured"}[holds])
    failed, unmeasured = verdicts.count(False), verdicts.count(None)
    print(f"{verdicts.count(True)} hold, {failed} do not, {unmeasured} could not be measured here.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
