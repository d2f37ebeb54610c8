"""Draw figures from run folders and results. Needs matplotlib: pip install -r requirements-plot.txt

    python plot.py sinusoid MAML=<run folder> Pretrained=<run folder> --output figures/sinusoid
    python plot.py updates MAML=results/sinusoid_maml.json Oracle=results/sinusoid_oracle.json --output figures/updates
    python plot.py training Omniglot=<run folder> --output figures/training
    python plot.py training Point=<run folder of rl/main.py> --output figures/rl_training
    python plot.py updates MAML=results/rl_point_exact_maml.json Random=results/rl_point_random.json --output figures/rl
    python plot.py task Omniglot=<run folder> --output figures/task
    python plot.py confusion Characters=answers.csv --output figures/confusion

Give each input as label=path. Each figure is written as <output>.png, .svg and .pdf.
"""

import devices  # noqa: F401, isort: skip (before TensorFlow, which reads the environment it sets)

import argparse
import csv
import functools
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

try:
    import matplotlib
    from matplotlib.artist import Artist
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
from files import InputError, nfc, printable, say, user_path, write_whole, writing
from images import ROOT
from maml import InnerLoop, adapt, inner_step, prepare
from utils import Tasks, Weights

# Okabe and Ito's palette, safe for color-blind readers.
BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7"
GRAY = "#BBBBBB"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",  # for pages with a dark background
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "pdf.fonttype": 42,  # embed TrueType fonts, as some publishers require
    "svg.hashsalt": "maml",  # makes files reproducible
    "text.parse_math": False,  # labels may contain dollar signs
}
LINES = list(zip((BLUE, ORANGE, GREEN, PURPLE, SKY), "osD^v", strict=True))  # color and marker of each label
# Paper, figure 2.
UPDATES = {0: ("before any update", ORANGE, ":"), 1: ("1 update", SKY, "--"), 10: ("10 updates", BLUE, "-")}
QUERIES = 5  # query images per class in a task figure
SCREEN = 110  # pixels per inch, for web pages
PERCENT_TICKS = [1, 2, 5, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9]
SMOOTHED = 1 / 20  # window of the running mean, as a share of the run


@matplotlib.rc_context(STYLE)
def sinusoid_figure(models: Mapping[str, tuple[InnerLoop, Weights]], tasks: Sequence[Tasks]) -> Figure:
    """Draw the true curve, the support points, and the fit before and after 1 and 10 updates (paper, figure 2).

    models: label -> inner loop and meta-learned weights, one column of panels each.
    tasks: one row of panels each, T = 1, drawn with oracle=True, which provides the true curve's amplitude and phase.
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
            panel.plot(grid, amplitude * np.sin(grid - phase), color=GRAY, linewidth=5, label="true curve")
            for updates, (label, color, line) in UPDATES.items():
                fit = inner.network.apply(trajectory[updates], tf.constant(known[:, :inputs]))
                panel.plot(grid, fit, line, color=color, linewidth=1.8, label=label)
            x, y = task.support_x[0, :, 0], task.support_y[0, :, 0]
            panel.plot(x, y, "o", color="black", markersize=5, label="support points")
        for panel, label in zip(row, models, strict=True):
            panel.set_title(f"{label}, {task.support_x.shape[1]}-shot")
        row[0].set_ylabel("y")
    for panel in axes[-1]:
        panel.set_xlabel("x")
    legend(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


@matplotlib.rc_context(STYLE)
def updates_figure(
    tests: Mapping[str, Sequence[Mapping]], paper: Mapping[str, Mapping[int, tuple[float, float]]] | None = None
) -> Figure:
    """Draw mean squared error, accuracy or return after each update, with 95% confidence intervals (paper, figure 3).

    tests: label -> entries of results.json, one line each. Entries with the same K share a panel. At most five labels.
    paper: label -> K -> the paper's accuracy and the half-width of its interval, in percent, drawn as a dashed line.
    """
    if len(tests) > len(LINES):
        raise InputError(f"label=path: has {len(tests)} labels; give at most {len(LINES)}")
    metrics = {label: {test["metric"] for test in entries} for label, entries in tests.items()}
    if len(set().union(*metrics.values())) > 1:
        listed = "; ".join(f"{label}: {', '.join(sorted(names))}" for label, names in metrics.items())
        raise InputError(
            f"label=path: errors, accuracies and returns cannot share an axis ({listed}); draw a figure for each"
        )
    is_return = "return" in set().union(*metrics.values())
    shots = sorted({test["support_examples_a_class_K"] for entries in tests.values() for test in entries})
    figure = Figure(figsize=(0.8 + 3.2 * len(shots), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shots), squeeze=False, sharey=True)[0]
    handles = {}
    for label, (color, marker) in zip(tests, LINES, strict=False):
        for test in tests[label]:
            panel = axes[shots.index(test["support_examples_a_class_K"])]
            columns = [column for column in test["results"] if column["mean"] is not None]  # None: tasks diverged
            updates, means, ci95 = (np.array([c[key] for c in columns]) for key in ("updates", "mean", "ci95"))
            panel.fill_between(updates, means - ci95, means + ci95, color=color, alpha=0.2, linewidth=0)
            (handles[label],) = panel.plot(updates, means, marker=marker, color=color, markersize=4, label=label)
            if published := (paper or {}).get(label, {}).get(test["support_examples_a_class_K"]):
                mean, half_width = (percent / 100 for percent in published)
                panel.axhspan(mean - half_width, mean + half_width, color=color, alpha=0.15, linewidth=0)
                panel.axhline(mean, color=color, linestyle="--", linewidth=1.2)
    for panel, shot in zip(axes, shots, strict=True):
        panel.set_title(shot if is_return else f"{shot}-shot")
        panel.set_xlabel("updates" if is_return else "updates (0: support set, before adaptation)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    is_error = "mean squared error" in set().union(*metrics.values())
    if not is_return:
        (_log_scale if is_error else _accuracy_scale)(axes)
    axes[0].set_ylabel("return" if is_return else "mean squared error" if is_error else "accuracy, %")
    if paper and any(paper.values()):
        handles["paper, in the same color"] = Line2D([], [], color="black", linestyle="--", linewidth=1.2)
    legend(figure, handles.values(), handles.keys())
    return figure


@matplotlib.rc_context(STYLE)
def training_figure(folders: Mapping[str, Path]) -> Figure:
    """Draw the training and validation curves of runs from their TensorBoard events, before and after updates.

    folders: label -> run folder, one panel each. Raise InputError if a run has no events.
    """
    figure = Figure(figsize=(0.8 + 5.4 * len(folders), 3.8), layout="constrained")
    axes = figure.subplots(1, len(folders), squeeze=False)[0]
    for panel, (label, folder) in zip(axes, folders.items(), strict=True):
        curves = report.scalars(folder)
        metric = next((name for name in ("return", "accuracy") if f"metatrain_Pre-update_{name}" in curves), "loss")
        rl = metric == "return"
        updates = 1 if rl else recipe.from_flags(_flags(folder), str(folder / "flags.json")).inner_steps
        after = f"Post-update_{metric}__step_{updates}"
        times = f"{updates} update" + "s" * (updates > 1)
        for tag, name, color in (
            (f"metatrain_Pre-update_{metric}", f"training, {'' if rl else 'support set '}before any update", ORANGE),
            (f"metatrain_{after}", f"training, {'' if rl else 'query set '}after {times}", BLUE),
        ):
            if rl and tag not in curves:
                continue  # the oracle and the pretrained policy have no update in training
            if tag not in curves:
                raise InputError(
                    f"{folder}: TensorBoard events of {tag} are missing; choose a run trained without --nolog"
                )
            steps, values = np.transpose(sorted(curves[tag].items()))
            panel.plot(steps, values, _marker(steps), color=color, alpha=0.25, linewidth=0.7)
            window = max(1, round(SMOOTHED * len(values)))
            smooth = np.convolve(values, np.full(window, 1 / window), "valid")
            middle = steps[(window - 1) // 2 :][: len(smooth)]
            panel.plot(middle, smooth, _marker(smooth), color=color, linewidth=1.8, label=name)
        if f"metaval_{after}" in curves:
            steps, values = np.transpose(sorted(curves[f"metaval_{after}"].items()))
            panel.plot(steps, values, _marker(steps), color="black", linewidth=1, label=f"validation, after {times}")
        if not rl:
            (_log_scale if metric == "loss" else _accuracy_scale)([panel])
        panel.set_title(label)
        panel.set_xlabel("outer iteration")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_ylabel({"accuracy": "accuracy, %", "loss": "mean squared error"}.get(metric, metric))
        panel.legend()
    return figure


@matplotlib.rc_context(STYLE)
def task_figure(title: str, names: Sequence[str], task: Tasks, probabilities: np.ndarray) -> Figure:
    """Draw an N-way task: one row per class, with its support images, and its query images with their predicted class.

    names: of the N classes. task: a single task whose images are ready to display, with values from 0 to 1.
    probabilities: of the query images, [N * Q, N].
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
        for panel, image, predicted in zip(
            row[shot + 1 :], task.query_x[of_query == label], probabilities[of_query == label], strict=True
        ):
            _show(panel, image)
            guess = int(np.argmax(predicted))
            color = GREEN if guess == label else ORANGE
            panel.spines[:].set(visible=True, color=color, linewidth=2.5)
            panel.set_xlabel(f"{letters[guess]}, {100 * predicted[guess]:.0f}%", color=color, labelpad=2)
    for place, text in (
        ((shot - 1) // 2, "support"),
        (shot + 1 + (query - 1) // 2, "query: predicted class, probability"),
    ):
        axes[0, place].set_title(text, fontsize=10, fontweight="normal")
    return figure


def _letters(names):
    """Return A, B, C, ... for the classes, or numbers for more than 26."""
    return [chr(ord("A") + label) if len(names) <= 26 else str(label + 1) for label in range(len(names))]


def _short(names):
    """Return the classes' names for an axis: the ends of long ones, which differ more than their beginnings."""
    names = list(map(printable, names))
    ends = [name if len(name) <= 26 else f"…{name[-25:]}" for name in names]
    return ends if len({*ends}) == len(ends) else names


def _show(panel, image):
    panel.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)  # cmap is ignored for color images


@matplotlib.rc_context(STYLE)
def confusion_figure(tables: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """Draw confusion matrices.

    tables: label -> names of the N classes, and numbers of images [true class, predicted class]. One panel each.
    """
    shown = {label: _short(names) for label, (names, _) in tables.items()}
    side, longest = max(map(len, shown.values())), max(len(name) for names in shown.values() for name in names)
    sideways = longest > 5  # characters, in a cell of 0.45 inches
    size = (3.2 + 0.45 * side) * len(tables), 1.2 + 0.45 * side + 0.06 * longest * sideways
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (label, (_, counts)) in zip(axes, tables.items(), strict=True):
        totals = counts.sum(axis=1, keepdims=True)
        shares = counts / np.maximum(totals, 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for true, guess in np.argwhere(counts):
            color = "white" if shares[true, guess] > 0.5 else "black"
            panel.text(guess, true, f"{counts[true, guess]:,}", ha="center", va="center", color=color)
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if sideways else {}
        panel.set_xticks(range(len(counts)), shown[label], **turned)
        panel.set_yticks(range(len(counts)), shown[label])
        panel.tick_params(length=0)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("predicted class")
        panel.set_ylabel("true class")
        panel.set_title(f"{label}\n{np.trace(counts):,} of {counts.sum():,} correct")
    return figure


def legend(figure: Figure, handles: Iterable[Artist], labels: Iterable[str]) -> None:
    """Add a legend above the panels, in as many columns as the figure is wide. Call this last."""
    handles, labels = list(handles), list(labels)
    for columns in range(len(handles), 0, -1):
        box = figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        if columns == 1 or box.get_window_extent().width <= figure.bbox.width:
            return
        box.remove()


def _marker(points):
    """Return the line's format. A single point has no line, so it needs a marker."""
    return "o-" if len(points) == 1 else "-"


def _log_scale(panels):
    """Show errors on a log scale with plain numbers. Ticks are at 1, 2 and 5 per decade if there are few decades."""
    panels[0].set_yscale("log", nonpositive="clip")
    low, high = panels[0].get_ylim()
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e5 * low else (1,)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())


def _accuracy_scale(panels):
    """Show accuracies in percent on a logit scale. 100% is at infinity, so a line leaves the panel there."""
    values = np.concatenate([line.get_ydata() for panel in panels for line in panel.get_lines()])
    values = values[(values > 0) & (values < 1)]
    panels[0].set_yscale("logit", nonpositive="clip")
    panels[0].yaxis.set_major_locator(FixedLocator([percent / 100 for percent in PERCENT_TICKS]))
    panels[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(0.8 * values.min(initial=0.5), 1 - 0.8 * (1 - values.max(initial=0.5)))


def pixels(figure: Figure, dpi: int = SCREEN) -> np.ndarray:
    """Return the figure as uint8 [height, width, 3]."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return np.asarray(Image.open(png).convert("RGB"))


@matplotlib.rc_context(STYLE)
def save(figure: Figure, output: Path, dpi: int = SCREEN) -> None:
    """Write <output>.png (`dpi` pixels per inch), .svg and .pdf. Raise InputError if they cannot be written."""
    if not output.name:
        raise InputError(f"--output={output}: is a folder; add a file name without its extension")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        for ending, metadata in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
            draw = functools.partial(figure.savefig, format=ending, dpi=dpi, metadata=metadata)
            try:
                write_whole(output.with_name(f"{output.name}.{ending}"), draw)
            except (ValueError, MemoryError) as error:
                raise InputError(f"--dpi={dpi}: cannot draw this figure ({error}); choose another value") from None


def trained(folder: Path, update_lr: float | None = None) -> tuple[InnerLoop, Weights]:
    """Return a sinusoid run's inner loop, with its step size replaced if given, and its weights.

    Raise InputError if the run is not a sinusoid run, or if its step sizes are learned and would be replaced.
    """
    trained_with, maml, _ = runs.load(folder)
    if trained_with.data_set != "sinusoid":
        raise InputError(f"{folder}: is a run of {trained_with.data_set}; choose a sinusoid run")
    if update_lr is not None:
        if update_lr not in recipe.RATE:
            raise InputError(f"--update_lr={update_lr}: must be {recipe.RATE}")
        if trained_with.learn_inner_lr != "none":
            raise InputError(
                f"--update_lr={update_lr}: {folder} learned its step sizes "
                f"(--learn_update_lr={trained_with.learn_inner_lr}); leave the flag out, or draw that run separately"
            )
        return maml.inner._replace(alpha=update_lr), maml.values()
    return maml.inner, maml.values()


def answered_task(folder: Path, shot: int, number: int, data_path: Path | None) -> tuple[list[str], Tasks, np.ndarray]:
    """Return a test task of a run's data set and the model's predictions, with QUERIES query images per class.

    Batch norm normalizes the query images together, as in the paper's tests.

    folder: the run. shot: K. number: of the task. data_path: the data set's folder; None: the one used in training.
    Return the class names, the task with images ready to display, and the probabilities of its query images [N * Q, N].
    """
    model = predict.load(folder, normalise_with="batch")
    images = model.recipe.dataset.images
    # A folder named by the user may hold images of any size, as in training.
    any_size = images.any_size or model.recipe.image_size is not None or data_path is not None
    if not (data_path or images.folder):
        raise InputError(f"{folder}: its image folder is not recorded; give --data_path")
    image_folder = data_path or ROOT / images.folder
    images = images._replace(any_size=any_size)
    data = ImageTasks.from_folder(images, image_folder, ("test",), model.recipe.way, shot, QUERIES)
    task = Tasks(*(part[0] for part in data.draw(0, "test", number, 1)))
    weights = adapt(model.inner, model.maml.values(), task, model.updates)
    probabilities = tf.nn.softmax(model.inner.network.apply(weights, task.query_x)).numpy()
    task = data.colours(task)
    if images.invert:
        task = task._replace(support_x=1 - task.support_x, query_x=1 - task.query_x)
    return data.names(0, "test", number), task, probabilities


def confusions(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the class names and the numbers of images, [true class, predicted class], in a predictions table.

    path: written by predict.py --csv. An image's true class is the name of the folder it is in.
    """
    fix = "choose a table that predict.py --csv wrote"
    try:
        with open(path, errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except (ValueError, csv.Error):
        header, rows = [], []
    classes = header[3:]
    if header[:3] != ["image", "class", "probability"] or not all(
        len(row) == len(header) and row[1] in classes for row in rows
    ):
        raise InputError(f"{path}: is not a predictions table; {fix}")
    counts = np.zeros((len(classes), len(classes)), int)
    for image, guess, *_ in rows:
        parent = nfc("/" + Path(image).parent.as_posix())
        true = [name for name in classes if parent.endswith("/" + nfc(name))]
        if not true:
            raise InputError(
                f"{path}: {image} is not in a folder named after a class ({', '.join(classes)}); run predict.py on "
                "folders named like those of LABELED"
            )
        counts[classes.index(max(true, key=len)), classes.index(guess)] += 1
    return classes, counts


def _flags(folder):
    try:
        return runs.read_json(folder / "flags.json", dict, "choose another run folder")
    except FileNotFoundError:
        raise InputError(f"{folder}: flags.json is missing; choose a run folder") from None


def _labeled(text):
    label, _, path = text.rpartition("=")
    if not label:
        raise argparse.ArgumentTypeError(f"{text}: label is missing; write label={text}")
    return label, user_path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, help in (
        ("sinusoid", "fits of sinusoid models before and after updates (paper, figure 2)"),
        (
            "updates",
            "error or accuracy after each update (paper, figure 3), from results/*.json or a run's results.json, "
            "also of rl/main.py. For "
            "results/*.json, a dashed line is the paper's accuracy with its 95% confidence interval",
        ),
        ("training", "training curves of run folders, also of rl/main.py"),
        (
            "task",
            f"a test task of images: support images, and a run's predictions for {QUERIES} query images per class. "
            "Batch norm normalizes the query images together. Needs the run's data set",
        ),
        (
            "confusion",
            "confusion matrices, from tables written by predict.py --csv. The images must be in folders named like "
            "those of the labeled images",
        ),
    ):
        command = figures.add_parser(name, help=help.replace("%", "%%"), description=help)  # argparse expands % in help
        command.add_argument("inputs", nargs="+", type=_labeled, metavar="label=path")
        command.add_argument("--output", type=user_path, required=True, help="path of the figure, without extension")
        command.add_argument("--dpi", type=int, default=300, help="pixels per inch of the PNG (300)")
        if name in ("sinusoid", "updates"):
            alpha = {"sinusoid": "alpha (default: as in training)", "updates": "alpha of the tests to draw"}[name]
            command.add_argument("--update_lr", type=float, help=alpha)
        if name == "sinusoid":
            command.add_argument("--shots", type=int, nargs="+", default=[5, 10], help="K of each row of panels (5 10)")
        if name == "task":
            command.add_argument("--shots", type=int, nargs=1, default=[1], help="K, support images per class (1)")
            command.add_argument(
                "--data_path", type=user_path, help="folder of the data set, if not the one used in training"
            )
        if name in ("sinusoid", "task"):
            command.add_argument("--task", type=int, default=0, help="number of the test task (0)")
    args = parser.parse_args()
    inputs = dict(args.inputs)
    if len(inputs) < len(args.inputs):
        parser.error("label=path: two labels are the same; rename one")
    if args.figure == "task" and len(inputs) > 1:
        parser.error("label=path: task takes one run folder; give only one")
    try:
        save(_draw(args, inputs), args.output, args.dpi)
    except InputError as error:
        parser.exit(1, f"plot.py: {error}\n")
    say(f"Written: {args.output}.png, .svg and .pdf.")


def _draw(args, inputs):
    """Return the requested figure. inputs: label -> path."""
    if args.figure in ("sinusoid", "task"):
        if not all(shot in recipe.EXAMPLES for shot in args.shots):
            raise InputError(f"--shots={' '.join(map(str, args.shots))}: each must be {recipe.EXAMPLES}")
        if args.task not in recipe.SEED:
            raise InputError(f"--task={args.task}: must be {recipe.SEED}")
    if args.figure == "sinusoid":
        models = {label: trained(folder, args.update_lr) for label, folder in inputs.items()}
        tasks = [SinusoidTasks(shot, shot, oracle=True).draw(0, "test", args.task, 1) for shot in args.shots]
        return sinusoid_figure(models, tasks)
    if args.figure == "updates":
        tests = {label: _tests(path, args.update_lr) for label, path in inputs.items()}
        return updates_figure(tests, {label: _published(path) for label, path in inputs.items()})
    if args.figure == "training":
        return training_figure(inputs)
    if args.figure == "confusion":
        return confusion_figure({label: confusions(path) for label, path in inputs.items()})
    ((label, folder),) = inputs.items()
    return task_figure(label, *answered_task(folder, *args.shots, args.task, args.data_path))


def _tests(path, update_lr):
    """Return one test per K from results/<row>.json or a run's results.json, with this alpha if given.

    Prefer a test with as many classes as in training, then one with K queries per class, as in the original's code,
    then the latest checkpoint, then the last entry.
    """
    fix = "choose a file of results/, or a run's results.json"
    try:
        record = runs.read_json(path, object, fix)
        if isinstance(record, dict) and "results" in record:
            return [_of_returns(record, path, fix)]
        tests = record.get("tests", []) if isinstance(record, dict) else record
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; {fix}") from None
    if not (isinstance(tests, list) and all(map(_is_entry, tests))):
        raise InputError(f"{path}: is not a list of test results; {fix}")
    tests = [test for test in tests if test["split"] == "test" and update_lr in (None, test["inner_step_size_alpha"])]
    if not tests:
        alpha = "" if update_lr is None else f" with --update_lr={update_lr}"
        raise InputError(f"{path}: no test{alpha} is recorded; test the run on the test set first")

    def rank(test):
        own_queries = test.get("query_examples_a_class_Q") == test["support_examples_a_class_K"]
        return "classes_N_in_training" not in test, own_queries, test.get("iteration", 0)

    tests.sort(key=rank)
    return list({test["support_examples_a_class_K"]: test for test in tests}.values())


def _of_returns(record, path, fix):
    """Return a test of reinforcement learning, from its results.json or results/rl_<row>.json, as one of those above.

    Its panel is its environment's instead of K's.
    """
    flags = record.get("flags")
    environment = flags.get("env") if isinstance(flags, dict) else None
    test = record | {"metric": "return", "split": "test", "support_examples_a_class_K": 0, "inner_step_size_alpha": 0}
    if not (isinstance(environment, str) and _is_entry(test)):
        raise InputError(f"{path}: is not a list of test results; {fix}")
    return test | {"support_examples_a_class_K": environment}


def _published(path):
    """Return K -> the paper's accuracy and the half-width of its interval, in percent, for results/<row>.json.

    Return an empty dict for methods other than MAML, whose files have longer names.
    """
    published = runs.read_json(ROOT / "results" / "published.json", list, "restore it from git")
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
    """Return whether an untrusted value has every field that is read from an entry of results.json."""

    def is_number(value):
        return isinstance(value, int | float) and abs(value) < 1e100  # excludes NaN

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
