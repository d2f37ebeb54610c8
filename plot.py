"""Draws figures from run folders and results. Needs matplotlib: pip install -r requirements-plot.txt

    python plot.py sinusoid MAML=<run folder> Pretrained=<run folder> --output figures/sinusoid
    python plot.py updates MAML=results/sinusoid_maml.json Oracle=results/sinusoid_oracle.json --output figures/updates
    python plot.py training Omniglot=<run folder> --output figures/training

What is drawn is given as label=path. Each figure is written as <output>.png and <output>.svg.
"""

import devices  # noqa: F401, isort: skip (it comes first, since it imports TensorFlow without its notices)

import argparse
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
except ImportError:
    if __name__ == "__main__":
        sys.exit("plot.py needs matplotlib: pip install -r requirements-plot.txt")
    raise

import events
import recipe
import runs
from data_generator import SinusoidTasks
from maml import MAML
from utils import InputError, Tasks, say, write_whole, writing

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7"
GREY = "#BBBBBB"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",  # pages with a dark background too
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "svg.hashsalt": "maml",  # the same figure is the same file
    "text.parse_math": False,  # a label may have a dollar sign
}
# Paper, figure 2.
LINES = list(zip((BLUE, ORANGE, GREEN, PURPLE, SKY), "osD^v", strict=True))  # colour and marker of each label
UPDATES = {0: ("before any update", ORANGE, ":"), 1: ("1 update", SKY, "--"), 10: ("10 updates", BLUE, "-")}
MOST_PANELS = 20
SMOOTHED = 1 / 20  # of the run, in a running mean


@matplotlib.rc_context(STYLE)
def sinusoid_figure(models: Mapping[str, MAML], tasks: Sequence[Tasks]) -> Figure:
    """Paper, figure 2: the true curve, the support points, and the fit before and after 1 and 10 updates.

    models: label -> model, one column of panels each.
    tasks: one row of panels each, T = 1, drawn with oracle=True: the true curve is that of their amplitude and phase.
    """
    figure = Figure(figsize=(4.2 * len(models), 0.6 + 2.4 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(models), squeeze=False, sharex=True, sharey="row")
    grid = np.linspace(-5, 5, 201, dtype=np.float32)[:, None]
    for row, task in zip(axes, tasks, strict=True):
        amplitude, phase = task.support_x[0, 0, 1:]
        known = np.concatenate([grid, np.full_like(grid, amplitude), np.full_like(grid, phase)], axis=1)
        for panel, maml in zip(row, models.values(), strict=True):
            inputs = maml.weights["w1"].shape[0]  # 3 for an oracle, else 1
            support = Tasks(*(tf.constant(part[0]) for part in task))
            support = support._replace(support_x=support.support_x[:, :inputs])
            weights = {name: tf.convert_to_tensor(value) for name, value in maml.weights.items()}
            path = maml.adapt(weights, support, max(UPDATES))
            panel.plot(grid, amplitude * np.sin(grid - phase), color=GREY, linewidth=5, label="true curve")
            for updates, (label, colour, line) in UPDATES.items():
                fit = maml.network.apply(path[updates], tf.constant(known[:, :inputs]))
                panel.plot(grid, fit, line, color=colour, linewidth=1.8, label=label)
            x, y = task.support_x[0, :, 0], task.support_y[0, :, 0]
            panel.plot(x, y, "o", color="black", markersize=5, label="support points")
        for panel, label in zip(row, models, strict=True):
            panel.set_title(f"{label}, {task.support_x.shape[1]}-shot")
        row[0].set_ylabel("y")
    for panel in axes[-1]:
        panel.set_xlabel("x")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


@matplotlib.rc_context(STYLE)
def updates_figure(tests: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Paper, figure 3: mean squared error or accuracy after every update, with the means' 95 % intervals.

    tests: label -> entries of results.json, one line each. Entries with the same K share a panel. At most five labels.
    """
    if len(tests) > len(LINES):
        raise InputError(f"{len(tests)} labels, but there are colours for {len(LINES)}: give fewer")
    metrics = {label: {test["metric"] for test in entries} for label, entries in tests.items()}
    if len(set().union(*metrics.values())) > 1:
        listed = "; ".join(f"{label}: {', '.join(sorted(found))}" for label, found in metrics.items())
        raise InputError(f"an error and an accuracy do not share an axis ({listed}): draw a figure of each")
    shots = sorted({test["support_examples_a_class_K"] for entries in tests.values() for test in entries})
    if len(shots) > MOST_PANELS:
        raise InputError(f"{len(shots):,} numbers of shots, of {MOST_PANELS} at most a figure can be drawn: give fewer")
    figure = Figure(figsize=(0.8 + 3.2 * len(shots), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shots), squeeze=False, sharey=True)[0]
    shown = {}
    for label, (colour, marker) in zip(tests, LINES, strict=False):
        for test in tests[label]:
            panel = axes[shots.index(test["support_examples_a_class_K"])]
            percent = 1 if test["metric"] == "mean squared error" else 100
            columns = [column for column in test["results"] if column["mean"] is not None]  # None: tasks diverged
            updates, means, ci95 = (np.array([c[key] for c in columns]) for key in ("updates", "mean", "ci95"))
            means, ci95 = percent * means, percent * ci95
            panel.fill_between(updates, means - ci95, means + ci95, color=colour, alpha=0.2, linewidth=0)
            (shown[label],) = panel.plot(updates, means, marker=marker, color=colour, markersize=4, label=label)
    for panel, shot in zip(axes, shots, strict=True):
        panel.set_title(f"{shot}-shot")
        panel.set_xlabel("updates (0: support set, before any)")
        panel.set_xticks(range(0, 11, 2))
    if percent == 1:
        _log_scale(axes[0])
    axes[0].set_ylabel("mean squared error" if percent == 1 else "accuracy, %")
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(tests))
    return figure


@matplotlib.rc_context(STYLE)
def training_figure(folders: Mapping[str, Path]) -> Figure:
    """What TensorBoard shows of a run: before any update and after J, in training and, of images, validation.

    folders: label -> run folder, one panel each.
    """
    figure = Figure(figsize=(0.8 + 5.4 * len(folders), 3.8), layout="constrained")
    axes = figure.subplots(1, len(folders), squeeze=False)[0]
    for panel, (label, folder) in zip(axes, folders.items(), strict=True):
        curves, updates = scalars(folder), recipe.from_flags(_flags(folder)).inner_steps
        metric, percent = ("accuracy", 100) if "metatrain_Pre-update_accuracy" in curves else ("loss", 1)
        after = f"Post-update_{metric}__step_{updates}"
        times = f"{updates} update" + "s" * (updates > 1)
        for tag, shown, colour in (
            (f"metatrain_Pre-update_{metric}", "training, support set before any update", ORANGE),
            (f"metatrain_{after}", f"training, query set after {times}", BLUE),
        ):
            if tag not in curves:
                raise InputError(f"{folder} has no events of {tag}: its flags.json is of another run")
            steps, values = curves[tag]
            panel.plot(steps, percent * values, color=colour, alpha=0.25, linewidth=0.7)
            window = max(1, round(SMOOTHED * len(values)))
            smooth = np.convolve(values, np.full(window, 1 / window), "valid")
            middle = (window - 1) // 2
            panel.plot(steps[middle : middle + len(smooth)], percent * smooth, color=colour, linewidth=1.8, label=shown)
        if f"metaval_{after}" in curves:
            steps, values = curves[f"metaval_{after}"]
            panel.plot(steps, percent * values, color="black", linewidth=1, label=f"validation, after {times}")
        if metric == "loss":
            _log_scale(panel)
        panel.set_title(label)
        panel.set_xlabel("outer iteration")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_ylabel("accuracy, %" if metric == "accuracy" else "mean squared error")
        panel.legend()
    return figure


def scalars(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """tag -> (iterations, values) of a run's event files, in order of the iterations. metatrain_ and metaval_ alone."""
    found = {}
    for event, _ in events.read_all(folder):
        for value in event.summary.value:
            if value.tag.startswith(("metatrain_", "metaval_")) and (number := events.number(value)) is not None:
                found.setdefault(value.tag, {})[event.step] = number
    if not found:
        raise InputError(f"{folder} has no TensorBoard events of training: name a run folder, trained without --nolog")
    return {tag: tuple(map(np.array, zip(*sorted(points.items()), strict=True))) for tag, points in found.items()}


def _log_scale(panel):
    """Marked 0.1, 0.2, 0.5, 1 where there are few decades, and as numbers rather than powers of ten."""
    panel.set_yscale("log", nonpositive="clip")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e5 * low else (1,)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


def pixels(figure: Figure) -> np.ndarray:
    """The figure, uint8 [height, width, 3]."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return np.asarray(Image.open(drawn).convert("RGB"))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, of 64 colours: a third of the size."""
    small = io.BytesIO()
    Image.fromarray(pixels(figure)).quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


@matplotlib.rc_context(STYLE)
def save(figure: Figure, output: Path) -> None:
    """Writes <output>.png and <output>.svg. Raises InputError where they cannot be written."""
    if not output.name:
        raise InputError(f"--output={output} is a folder: name the files in it, without .png and .svg")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output.with_name(output.name + ".png"), lambda file: file.write(png(figure)))
        write_whole(
            output.with_name(output.name + ".svg"),
            lambda file: figure.savefig(file, format="svg", metadata={"Date": None}),
        )


def trained(folder: Path, update_lr: float | None = None) -> MAML:
    """The model in a run folder, its inner step size replaced if given."""
    trained_with = recipe.from_flags(_flags(folder))
    if trained_with.data_set != "sinusoid":
        raise InputError(f"{folder} is a run of {trained_with.data_set}: name one of the sinusoid")
    if update_lr is not None:
        if update_lr not in recipe.RATE:
            raise InputError(f"--update_lr={update_lr} must be {recipe.RATE}")
        trained_with = dataclasses.replace(trained_with, inner_lr=update_lr)
    maml = recipe.build(trained_with)
    run = runs.Run(folder)
    run.restore(maml, run.checkpoint())
    return maml


def _flags(folder):
    try:
        return runs.read_json(folder / "flags.json", dict, "name another run folder")
    except FileNotFoundError:
        raise InputError(f"no flags.json in {folder}: name a run folder") from None


def _labelled(text):
    label, _, path = text.rpartition("=")
    if not label:
        raise argparse.ArgumentTypeError(f"{text} has no label: write label={text}")
    return label, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, help in (
        ("sinusoid", "fits of sinusoid models before and after updates (paper, figure 2)"),
        ("updates", "error or accuracy after each update (paper, figure 3), of results/*.json or a run's results.json"),
        ("training", "training curves of run folders"),
    ):
        one = figures.add_parser(name, help=help, description=help)
        one.add_argument("what", nargs="+", type=_labelled, metavar="label=path")
        one.add_argument("--output", type=Path, required=True, help="path without .png and .svg")
        if name != "training":
            one.add_argument("--update_lr", type=float, help="alpha of the updates, where there are several")
        if name == "sinusoid":
            one.add_argument("--shots", type=int, nargs="+", default=[5, 10], help="K of each row of panels (5 10)")
            one.add_argument("--task", type=int, default=0, help="number of the test task (0)")
    args = parser.parse_args()
    what = dict(args.what)
    if len(what) < len(args.what):
        parser.error("two of the labels are the same")
    try:
        if args.figure == "sinusoid":
            if not all(shot in recipe.EXAMPLES for shot in args.shots):
                raise InputError(f"--shots={' '.join(map(str, args.shots))}: each must be {recipe.EXAMPLES}")
            if args.task not in recipe.SEED:
                raise InputError(f"--task={args.task} must be {recipe.SEED}")
            models = {label: trained(folder, args.update_lr) for label, folder in what.items()}
            tasks = [SinusoidTasks(shot, shot, oracle=True).draw(0, "test", args.task, 1) for shot in args.shots]
            figure = sinusoid_figure(models, tasks)
        elif args.figure == "updates":
            figure = updates_figure({label: _tests(path, args.update_lr) for label, path in what.items()})
        else:
            figure = training_figure(what)
        save(figure, args.output)
    except InputError as error:
        parser.exit(1, f"plot.py: {error}\n")
    say(f"Written: {args.output}.png and .svg.")


def _tests(path, update_lr):
    """Of results/<row>.json or a run's results.json, the last test of each K, with this alpha if one is named."""
    way_out = "name a file of results/, or a run's results.json"
    try:
        if path.name == "results.json":
            tests = runs.read_json(path, list, way_out)
        else:
            tests = runs.read_json(path, dict, way_out).get("tests", [])
    except FileNotFoundError:
        raise InputError(f"no {path}: {way_out}") from None
    if not (isinstance(tests, list) and all(map(_is_entry, tests))):
        raise InputError(f"{path} has what is no result of a test: {way_out}")
    tests = [test for test in tests if test["split"] == "test" and update_lr in (None, test["inner_step_size_alpha"])]
    if not tests:
        raise InputError(f"{path} has no test" + (f" with alpha {update_lr}" if update_lr else ""))
    return list({test["support_examples_a_class_K"]: test for test in tests}.values())


def _is_entry(test):
    """Whether this, which anybody may have written, has all that is read of an entry of results.json."""

    def is_number(value):
        return isinstance(value, int | float) and abs(value) < 1e100  # not nan either

    try:
        numbers = [test["support_examples_a_class_K"], test["inner_step_size_alpha"]]
        for column in test["results"]:
            numbers.append(column["updates"])
            if column["mean"] is not None:
                numbers += [column["mean"], column["ci95"]]
        return isinstance(test["metric"], str) and isinstance(test["split"], str) and all(map(is_number, numbers))
    except (TypeError, KeyError):
        return False


if __name__ == "__main__":
    main()
