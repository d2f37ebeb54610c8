"""Draws figures from run folders and results. Needs matplotlib: pip install -r requirements-plot.txt

    python plot.py sinusoid MAML=<run folder> Pretrained=<run folder> --output figures/sinusoid
    python plot.py updates MAML=results/sinusoid_maml.json Oracle=results/sinusoid_oracle.json --output figures/updates
    python plot.py training Omniglot=<run folder> --output figures/training
    python plot.py task Omniglot=<run folder> --output figures/task
    python plot.py confusion Characters=answers.csv --output figures/confusion

What is drawn is given as label=path. Each figure is written as <output>.png, .svg and .pdf.
"""

import devices  # noqa: F401, isort: skip (before TensorFlow, which reads what it sets)

import argparse
import csv
import functools
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
except ImportError:
    if __name__ == "__main__":
        sys.exit("plot.py needs matplotlib: pip install -r requirements-plot.txt")
    raise

import predict
import recipe
import report
import runs
from data_generator import ImageTasks, SinusoidTasks
from files import InputError, printable, say, write_whole, writing
from images import ROOT
from maml import InnerLoop, adapt, inner_step, prepare
from utils import Tasks, Weights

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
    "pdf.fonttype": 42,  # letters as letters, which some publishers ask for
    "svg.hashsalt": "maml",  # the same figure is the same file
    "text.parse_math": False,  # a label may have a dollar sign
}
# Paper, figure 2.
LINES = list(zip((BLUE, ORANGE, GREEN, PURPLE, SKY), "osD^v", strict=True))  # colour and marker of each label
UPDATES = {0: ("before any update", ORANGE, ":"), 1: ("1 update", SKY, "--"), 10: ("10 updates", BLUE, "-")}
QUERIES = 5  # query images of each class in the figure of a task
SCREEN = 110  # pixels an inch, for pages
PERCENT_TICKS = [1, 2, 5, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9]
SMOOTHED = 1 / 20  # of the run, in a running mean


@matplotlib.rc_context(STYLE)
def sinusoid_figure(models: Mapping[str, tuple[InnerLoop, Weights]], tasks: Sequence[Tasks]) -> Figure:
    """Paper, figure 2: the true curve, the support points, and the fit before and after 1 and 10 updates.

    models: label -> inner loop and meta-learned weights, one column of panels each.
    tasks: one row of panels each, T = 1, drawn with oracle=True: the true curve is that of their amplitude and phase.
    """
    figure = Figure(figsize=(4.2 * len(models), 0.6 + 2.4 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(models), squeeze=False, sharex=True, sharey="row")
    grid = np.linspace(-5, 5, 201, dtype=np.float32)[:, None]
    for row, task in zip(axes, tasks, strict=True):
        amplitude, phase = task.support_x[0, 0, 1:]
        known = np.concatenate([grid, np.full_like(grid, amplitude), np.full_like(grid, phase)], axis=1)
        for panel, (inner, theta) in zip(row, models.values(), strict=True):
            inputs = theta["w1"].shape[0]  # 3 for an oracle, else 1
            support = Tasks(*(tf.constant(part[0]) for part in task))
            support = support._replace(support_x=support.support_x[:, :inputs])
            support, trajectory = prepare(inner, theta, support), [theta]
            for j in range(max(UPDATES)):
                trajectory.append(inner_step(inner, trajectory[-1], support, j))
            panel.plot(grid, amplitude * np.sin(grid - phase), color=GREY, linewidth=5, label="true curve")
            for updates, (label, colour, line) in UPDATES.items():
                fit = inner.network.apply(trajectory[updates], tf.constant(known[:, :inputs]))
                panel.plot(grid, fit, line, color=colour, linewidth=1.8, label=label)
            x, y = task.support_x[0, :, 0], task.support_y[0, :, 0]
            panel.plot(x, y, "o", color="black", markersize=5, label="support points")
        for panel, label in zip(row, models, strict=True):
            panel.set_title(f"{label}, {task.support_x.shape[1]}-shot")
        row[0].set_ylabel("y")
    for panel in axes[-1]:
        panel.set_xlabel("x")
    columns = 5 if len(models) > 1 else 2
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    return figure


@matplotlib.rc_context(STYLE)
def updates_figure(
    tests: Mapping[str, Sequence[Mapping]], paper: Mapping[str, Mapping[int, tuple[float, float]]] | None = None
) -> Figure:
    """Paper, figure 3: mean squared error or accuracy after every update, with the means' 95 % intervals.

    tests: label -> entries of results.json, one line each. Entries with the same K share a panel. At most five labels.
    paper: label -> K -> the paper's accuracy and the half width of its interval, in percent, drawn as a dashed line.
    """
    if len(tests) > len(LINES):
        raise InputError(f"{len(tests)} labels, but there are colours for {len(LINES)}: give fewer")
    metrics = {label: {test["metric"] for test in entries} for label, entries in tests.items()}
    if len(set().union(*metrics.values())) > 1:
        listed = "; ".join(f"{label}: {', '.join(sorted(found))}" for label, found in metrics.items())
        raise InputError(f"an error and an accuracy do not share an axis ({listed}): draw a figure of each")
    shots = sorted({test["support_examples_a_class_K"] for entries in tests.values() for test in entries})
    figure = Figure(figsize=(0.8 + 3.2 * len(shots), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shots), squeeze=False, sharey=True)[0]
    shown = {}
    for label, (colour, marker) in zip(tests, LINES, strict=False):
        for test in tests[label]:
            panel = axes[shots.index(test["support_examples_a_class_K"])]
            columns = [column for column in test["results"] if column["mean"] is not None]  # None: tasks diverged
            updates, means, ci95 = (np.array([c[key] for c in columns]) for key in ("updates", "mean", "ci95"))
            panel.fill_between(updates, means - ci95, means + ci95, color=colour, alpha=0.2, linewidth=0)
            (shown[label],) = panel.plot(updates, means, marker=marker, color=colour, markersize=4, label=label)
            if theirs := (paper or {}).get(label, {}).get(test["support_examples_a_class_K"]):
                mean, half_width = (percent / 100 for percent in theirs)
                panel.axhspan(mean - half_width, mean + half_width, color=colour, alpha=0.15, linewidth=0)
                panel.axhline(mean, color=colour, linestyle="--", linewidth=1.2)
    for panel, shot in zip(axes, shots, strict=True):
        panel.set_title(f"{shot}-shot")
        panel.set_xlabel("updates (0: support set, before any)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    is_error = "mean squared error" in set().union(*metrics.values())
    (_log_scale if is_error else _accuracy_scale)(axes)
    axes[0].set_ylabel("mean squared error" if is_error else "accuracy, %")
    if paper and any(paper.values()):
        shown["paper, in the same colour"] = Line2D([], [], color="black", linestyle="--", linewidth=1.2)
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown))
    return figure


@matplotlib.rc_context(STYLE)
def training_figure(folders: Mapping[str, Path]) -> Figure:
    """What TensorBoard shows of a run: before any update and after J, in training and, of images, validation.

    folders: label -> run folder, one panel each.
    """
    figure = Figure(figsize=(0.8 + 5.4 * len(folders), 3.8), layout="constrained")
    axes = figure.subplots(1, len(folders), squeeze=False)[0]
    for panel, (label, folder) in zip(axes, folders.items(), strict=True):
        curves = report.scalars(folder)
        updates = recipe.from_flags(_flags(folder), str(folder / "flags.json")).inner_steps
        metric = "accuracy" if "metatrain_Pre-update_accuracy" in curves else "loss"
        after = f"Post-update_{metric}__step_{updates}"
        times = f"{updates} update" + "s" * (updates > 1)
        for tag, shown, colour in (
            (f"metatrain_Pre-update_{metric}", "training, support set before any update", ORANGE),
            (f"metatrain_{after}", f"training, query set after {times}", BLUE),
        ):
            if tag not in curves:
                raise InputError(f"{folder}: has no TensorBoard events of {tag}; name a run trained without --nolog")
            steps, values = np.transpose(sorted(curves[tag].items()))
            panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
            window = max(1, round(SMOOTHED * len(values)))
            smooth = np.convolve(values, np.full(window, 1 / window), "valid")
            middle = (window - 1) // 2
            panel.plot(steps[middle : middle + len(smooth)], smooth, color=colour, linewidth=1.8, label=shown)
        if f"metaval_{after}" in curves:
            steps, values = np.transpose(sorted(curves[f"metaval_{after}"].items()))
            panel.plot(steps, values, color="black", linewidth=1, label=f"validation, after {times}")
        (_log_scale if metric == "loss" else _accuracy_scale)([panel])
        panel.set_title(label)
        panel.set_xlabel("outer iteration")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_ylabel("accuracy, %" if metric == "accuracy" else "mean squared error")
        panel.legend()
    return figure


@matplotlib.rc_context(STYLE)
def task_figure(title: str, names: Sequence[str], task: Tasks, probabilities: np.ndarray) -> Figure:
    """An N-way task: a row for each class, with its support images and what its query images are taken for.

    names: of the N classes. task: one, of images as they look, 0 to 1. probabilities: of the query images, [N * Q, N].
    """
    letters = _letters(names)
    of_support, of_query = np.argmax(task.support_y, -1), np.argmax(task.query_y, -1)
    shot, query = (len(y) // len(names) for y in (task.support_y, task.query_y))
    figure = Figure(figsize=(1.9 + 0.95 * (shot + query), 0.8 + 1.15 * len(names)), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots(
        len(names), shot + 1 + query, squeeze=False, gridspec_kw={"width_ratios": [1] * shot + [0.15] + [1] * query}
    )
    for label, row in enumerate(axes):
        for panel in row:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        lines = [line if len(line) <= 24 else f"{line[:23]}…" for line in printable(names[label]).split("/")]
        row[0].set_ylabel("\n".join([letters[label], *lines]), rotation=0, ha="right", va="center")
        for panel, image in zip(row, task.support_x[of_support == label], strict=False):
            _show(panel, image)
        for panel, image, found in zip(
            row[shot + 1 :], task.query_x[of_query == label], probabilities[of_query == label], strict=True
        ):
            _show(panel, image)
            guess = int(np.argmax(found))
            colour = GREEN if guess == label else ORANGE
            panel.spines[:].set(visible=True, color=colour, linewidth=2.5)
            panel.set_xlabel(f"{letters[guess]}, {100 * found[guess]:.0f} %", color=colour, labelpad=2)
    for place, text in (
        ((shot - 1) // 2, "support"),
        (shot + 1 + (query - 1) // 2, "query: taken for, and its probability"),
    ):
        axes[0, place].set_title(text, fontsize=10, fontweight="normal")
    return figure


def _letters(names):
    """A, B, C, ... for the classes, or numbers where those do not reach."""
    return [chr(ord("A") + label) if len(names) <= 26 else str(label + 1) for label in range(len(names))]


def _show(panel, image):
    panel.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)  # a photograph brings its colours


@matplotlib.rc_context(STYLE)
def confusion_figure(tables: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """How often images of each class are taken for each other class.

    tables: label -> names of the N classes, and numbers of images [true class, class taken for]. One panel each.
    """
    side = max(len(names) for names, _ in tables.values())
    figure = Figure(figsize=((3.2 + 0.45 * side) * len(tables), 1.2 + 0.45 * side), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (label, (names, counts)) in zip(axes, tables.items(), strict=True):
        asked = counts.sum(axis=1, keepdims=True)
        shares = counts / np.maximum(asked, 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for true, guess in np.argwhere(counts):
            colour = "white" if shares[true, guess] > 0.5 else "black"
            panel.text(guess, true, f"{counts[true, guess]:,}", ha="center", va="center", color=colour)
        letters = _letters(names)
        ends = [name if len(name) <= 26 else f"…{name[-25:]}" for name in map(printable, names)]
        panel.set_xticks(range(len(names)), letters)
        panel.set_yticks(range(len(names)), [f"{end}  {letter}" for end, letter in zip(ends, letters, strict=True)])
        panel.tick_params(length=0)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("taken for")
        panel.set_title(f"{label}\n{np.trace(counts):,} of {counts.sum():,} right")
    return figure


def _log_scale(panels):
    """Show errors on a log scale: ticks at 0.1, 0.2, 0.5, 1 if it has few decades, and plain numbers."""
    panels[0].set_yscale("log", nonpositive="clip")
    low, high = panels[0].get_ylim()
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e5 * low else (1,)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())


def _accuracy_scale(panels):
    """Show accuracies on a logit scale in percent. 100 % is infinitely far up: a line leaves its panel there."""
    values = np.concatenate([line.get_ydata() for panel in panels for line in panel.get_lines()])
    values = values[(values > 0) & (values < 1)]
    panels[0].set_yscale("logit", nonpositive="clip")
    panels[0].yaxis.set_major_locator(FixedLocator([percent / 100 for percent in PERCENT_TICKS]))
    panels[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(0.8 * values.min(initial=0.5), 1 - 0.8 * (1 - values.max(initial=0.5)))


def pixels(figure: Figure, dpi: int = SCREEN) -> np.ndarray:
    """The figure, uint8 [height, width, 3]."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    return np.asarray(Image.open(drawn).convert("RGB"))


@matplotlib.rc_context(STYLE)
def save(figure: Figure, output: Path, dpi: int = SCREEN) -> None:
    """Write <output>.png at this many pixels per inch, .svg and .pdf. Raise InputError if they cannot be written."""
    if not output.name:
        raise InputError(f"--output={output}: is a folder; name the files in it, without .png and the like")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        for ending, metadata in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
            draw = functools.partial(figure.savefig, format=ending, dpi=dpi, metadata=metadata)
            try:
                write_whole(output.with_name(f"{output.name}.{ending}"), draw)
            except (ValueError, MemoryError) as error:
                raise InputError(f"--dpi={dpi}: is not possible for this figure ({error}); change it") from None


def trained(folder: Path, update_lr: float | None = None) -> tuple[InnerLoop, Weights]:
    """The model in a run folder, its inner step size replaced if given; learned step sizes are never replaced."""
    trained_with, maml, _ = runs.load(folder)
    if trained_with.data_set != "sinusoid":
        raise InputError(f"{folder} is a run of {trained_with.data_set}: name one of the sinusoid")
    if update_lr is not None:
        if update_lr not in recipe.RATE:
            raise InputError(f"--update_lr={update_lr} must be {recipe.RATE}")
        if trained_with.learn_inner_lr != "none":
            raise InputError(
                f"--update_lr={update_lr} changes nothing in {folder}, whose step sizes are learned "
                f"(--learn_update_lr={trained_with.learn_inner_lr}): leave it out, or draw that run by itself"
            )
        return maml.inner._replace(alpha=update_lr), maml.values()
    return maml.inner, maml.values()


def answered_task(folder: Path, shot: int, number: int, data_path: Path | None) -> tuple[list[str], Tasks, np.ndarray]:
    """Draws a test task of a run's data set, and lets the run's model answer it, with QUERIES query images a class.

    Under batch norm they are normalised together, as in the paper's tests.

    Args: the run folder; K; the number of the task; where the data set lies, None: where training has it.
    Returns the names of the classes; the task, its images as they look; the probabilities of its query images.
    """
    model = predict.load(folder, normalise_with="batch")
    images = model.recipe.dataset.images
    # As in training, which may have resized the images of a folder that was named.
    any_size = images.any_size or model.recipe.image_size is not None or data_path is not None
    if not (data_path or images.folder):
        raise InputError(f"{folder} does not say where its images lie: name their folder with --data_path")
    lies_in = data_path or ROOT / images.folder
    images = images._replace(any_size=any_size)
    data = ImageTasks.from_folder(images, lies_in, ("test",), model.recipe.way, shot, QUERIES)
    task = Tasks(*(part[0] for part in data.draw(0, "test", number, 1)))
    weights = adapt(model.inner, model.maml.values(), task, model.updates)
    probabilities = tf.nn.softmax(model.inner.network.apply(weights, task.query_x)).numpy()
    task = data.colours(task)
    if images.invert:
        task = task._replace(support_x=1 - task.support_x, query_x=1 - task.query_x)
    return data.names(0, "test", number), task, probabilities


def confusions(path: Path) -> tuple[list[str], np.ndarray]:
    """Counts what predict.py took the images of each class for.

    Args: what predict.py --csv wrote, where every image lies in a folder of its class' name.
    Returns the names of the classes, and the numbers of images, [true class, class taken for].
    """
    way_out = "name what predict.py --csv=FILE wrote"
    try:
        with open(path, errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {way_out}") from None
    except (ValueError, csv.Error):
        header, rows = [], []
    classes = header[3:]
    if header[:3] != ["image", "class", "probability"] or not all(
        len(row) == len(header) and row[1] in classes for row in rows
    ):
        raise InputError(f"{path}: is not a table of answers; {way_out}")
    counts = np.zeros((len(classes), len(classes)), int)
    for image, guess, *_ in rows:
        parent = "/" + Path(image).parent.as_posix()
        true = [name for name in classes if parent.endswith("/" + name)]
        if not true:
            raise InputError(
                f"image {image} in {path} lies in no folder of its class' name ({', '.join(classes)}): ask predict.py "
                "for folders that are named as those of LABELLED"
            )
        counts[classes.index(max(true, key=len)), classes.index(guess)] += 1
    return classes, counts


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
        (
            "updates",
            "error or accuracy after each update (paper, figure 3), of results/*.json or a run's results.json; the "
            "paper's accuracy beside that of results/*.json, a dashed line with its 95 % interval",
        ),
        ("training", "training curves of run folders"),
        (
            "task",
            "a test task of images: its support images, and what the model of a run folder takes its query images for, "
            f"{QUERIES} of each class, which batch norm normalises together; it needs the run's data set",
        ),
        (
            "confusion",
            "how often images of each class are taken for another, of the table of predict.py --csv; the images that "
            "predict.py was asked lie in folders with the same names as those of the labelled images",
        ),
    ):
        one = figures.add_parser(name, help=help.replace("%", "%%"), description=help)  # argparse expands one of them
        one.add_argument("what", nargs="+", type=_labelled, metavar="label=path")
        one.add_argument("--output", type=Path, required=True, help="path without .png, .svg and .pdf")
        one.add_argument("--dpi", type=int, default=300, help="pixels an inch of the PNG (300)")
        if name in ("sinusoid", "updates"):
            one.add_argument("--update_lr", type=float, help="alpha of the updates, where there are several")
        if name == "sinusoid":
            one.add_argument("--shots", type=int, nargs="+", default=[5, 10], help="K of each row of panels (5 10)")
        if name == "task":
            one.add_argument("--shots", type=int, nargs=1, default=[1], help="K, support images of each class (1)")
            one.add_argument("--data_path", type=Path, help="folder of the data set, if not where training has it")
        if name in ("sinusoid", "task"):
            one.add_argument("--task", type=int, default=0, help="number of the test task (0)")
    args = parser.parse_args()
    what = dict(args.what)
    if len(what) < len(args.what):
        parser.error("two of the labels are the same")
    if args.figure == "task" and len(what) > 1:
        parser.error("a figure of a task is of one run folder")
    try:
        save(_drawn(args, what), args.output, args.dpi)
    except InputError as error:
        parser.exit(1, f"plot.py: {error}\n")
    say(f"Written: {args.output}.png, .svg and .pdf.")


def _drawn(args, what):
    """The figure that the flags ask for, of label -> path."""
    if args.figure in ("sinusoid", "task"):
        if not all(shot in recipe.EXAMPLES for shot in args.shots):
            raise InputError(f"--shots={' '.join(map(str, args.shots))}: each must be {recipe.EXAMPLES}")
        if args.task not in recipe.SEED:
            raise InputError(f"--task={args.task} must be {recipe.SEED}")
    if args.figure == "sinusoid":
        models = {label: trained(folder, args.update_lr) for label, folder in what.items()}
        tasks = [SinusoidTasks(shot, shot, oracle=True).draw(0, "test", args.task, 1) for shot in args.shots]
        return sinusoid_figure(models, tasks)
    if args.figure == "updates":
        tests = {label: _tests(path, args.update_lr) for label, path in what.items()}
        return updates_figure(tests, {label: _papers(path) for label, path in what.items()})
    if args.figure == "training":
        return training_figure(what)
    if args.figure == "confusion":
        return confusion_figure({label: confusions(path) for label, path in what.items()})
    ((label, folder),) = what.items()
    return task_figure(label, *answered_task(folder, *args.shots, args.task, args.data_path))


def _tests(path, update_lr):
    """Of results/<row>.json or a run's results.json, one test of each K, with this alpha if one is named.

    It is the one of the latest checkpoint with K queries a class, as in the original's code, or else the latest; of
    several, the last one.
    """
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
        raise InputError(f"{path} has no test" + ("" if update_lr is None else f" with alpha {update_lr}"))

    def rank(test):
        own_queries = test.get("query_examples_a_class_Q") == test["support_examples_a_class_K"]
        return own_queries, test.get("iteration", 0)

    tests.sort(key=rank)
    return list({test["support_examples_a_class_K"]: test for test in tests}.values())


def _papers(path):
    """K -> the paper's accuracy and the half width of its interval, in percent, for the row of results/<row>.json.

    Only for MAML itself: the records of other methods have longer names.
    """
    published = runs.read_json(ROOT / "results" / "published.json", list, "take the project's")
    return {
        entry["support_examples_a_class_K"]: (entry["results"][-1]["mean"], entry["results"][-1]["ci95"])
        for entry in published
        if entry["reported_by"] == "paper"
        and entry["metric"] == "accuracy in %"
        and entry["row"] == re.sub(r"(\.seed\d+)?\.json$", "", path.name)
        and not entry.get("flags")
        and "ci95" in entry["results"][-1]
    }


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
