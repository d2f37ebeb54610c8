"""Write the tables of docs/rl.md and draw its figures from results/rl_*.json. Needs matplotlib.

python rl/report.py
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of rl/

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from plot import BLUE, GRAY, LINES, ORANGE, STYLE, legend, save

END = "<!-- end of table -->"
MODELS = {None: "MAML", "pretrained": "pretrained", "random": "random", "oracle": "oracle"}
ENVIRONMENTS = {
    "point": "2D navigation",
    "cheetah_direction": "Half-cheetah, direction",
    "cheetah_speed": "Half-cheetah, speed",
}
COLUMNS = 4  # 0 to 3 updates, as in the paper's figures
DIRECTIONS = "forward", "backward"  # of half-cheetah direction, also separately
HEADER = ["| | | 0 | 1 | 2 | 3 updates |", "| --- | --- | --- | --- | --- | --- |"]


def records(results: Path, exact: bool = False) -> dict[str, list[dict]]:
    """Return environment -> its records, MAML first, then by seed.

    Records of the exact Fisher product are left out if the model has others. exact: return only those.
    """
    by_environment = {name: [] for name in ENVIRONMENTS}
    for path in results.glob("rl_*.json"):
        record = json.loads(path.read_text())
        if "flags" in record:
            by_environment[record["flags"]["env"]].append(record)
    order = list(MODELS)
    for name, group in by_environment.items():
        group.sort(key=lambda r: (order.index(r["flags"]["baseline"]), r["flags"]["seed"], _setting(r)))
        renewed = {record["flags"]["baseline"] for record in group if not _is_exact(record)}
        by_environment[name] = [
            record
            for record in group
            if (_is_exact(record) if exact else not _is_exact(record) or record["flags"]["baseline"] not in renewed)
        ]
    return by_environment


def _is_exact(record):
    """Return whether a policy was trained with the exact Fisher product, as until November 2026."""
    return record["flags"]["baseline"] != "random" and record["flags"].get("product", "exact") == "exact"


def _setting(record):
    """Return the tasks and rollouts of an outer step, if they are not the defaults of rl/main.py."""
    tasks, rollouts = (record["flags"].get(name) for name in ("meta_batch_size", "num_rollouts"))
    return "" if (tasks, rollouts) in ((40, 20), (None, None)) else f", meta-batch {tasks}, rollouts {rollouts}"


def authors(results: Path) -> dict[str, dict[str, dict]]:
    """Return environment -> model -> the authors' means and intervals."""
    return json.loads((results / "rl_authors.json").read_text())


def table(results: Path) -> str:
    """Return the Markdown table of returns after 0 to 3 updates, ours and the authors'."""
    lines = [*HEADER]
    ours, theirs = records(results), authors(results)
    for environment, title in ENVIRONMENTS.items():
        for baseline, model in MODELS.items():
            runs = [record for record in ours[environment] if record["flags"]["baseline"] == baseline]
            if runs:
                lines += _rows(f"{title}: {model}", runs, theirs[environment].get(baseline or "maml"))
    return "\n".join(lines)


def products(results: Path) -> str:
    """Return the table of 2D navigation with MAML, by how the Fisher products of its outer steps were computed."""
    exact, ours = ([r for r in records(results, only)["point"] if not r["flags"]["baseline"]] for only in (True, False))
    others = [record for record in ours if not _is_exact(record)]
    published = authors(results)["point"]["maml"]
    return "\n".join([*HEADER, *_rows("exact", exact), *_rows("finite difference", others, published)])


def _rows(first, runs, published=None):
    """Return the rows of a model: our runs, then the authors' numbers."""
    lines = []
    for record in runs:
        flags, best = record["flags"], record.get("best", {})
        source = "ours" if flags["baseline"] == "random" else f"ours, {flags['iterations']} iterations"
        source += f", seed {flags['seed']}{_setting(record)}{', exact product' * _is_exact(record)}"
        lines.append((source, _by_update(record["results"])))
        if "results" in best:
            lines.append((f"its best checkpoint, after {best['iterations']} iterations", _by_update(best["results"])))
    if published:
        lines.append((f"authors{published.get('note', '')}", published))
    parts = [part for line in lines for part in _with_directions(*line)]
    return [_row("" if i else first, *part) for i, part in enumerate(parts)]


def _by_update(columns):
    """Return a record's results in the form of the authors' numbers: lists of means and intervals by update."""
    directions = {name: [column[name] for column in columns] for name in DIRECTIONS if name in columns[0]}
    lists = {key: [column[key] for column in columns] for key in ("mean", "ci95")}
    return lists | {name: _by_update(part) for name, part in directions.items()}


def _with_directions(source, numbers):
    """Return (source, numbers), then (direction, its numbers) for each direction they have."""
    return [(source, numbers), *((name, numbers[name]) for name in DIRECTIONS if name in numbers)]


def _row(first, source, numbers):
    cells = [f"{mean:.1f} +- {half:.1f}" for mean, half in zip(numbers["mean"], numbers["ci95"], strict=True)][:COLUMNS]
    return f"| {' | '.join([first, source, *cells, *[''] * (COLUMNS - len(cells))])} |"


TABLES = {"results": table, "products": products}  # between comments in docs/rl.md


def with_tables(text: str, results: Path) -> str:
    """Return the text of docs/rl.md with its tables made from the records."""
    for name, make_table in TABLES.items():
        begin = f"<!-- {name}: written by rl/report.py -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{make_table(results)}\n\n{END}{rest.split(END, 1)[1]}"
    return text


@matplotlib.rc_context(STYLE)
def paths_figure(record: Mapping) -> Figure:
    """Draw the point's paths before and after updates (paper, figure 4, bottom), one panel per recorded goal."""
    goals = record["goals_of_paths"]
    figure = Figure(figsize=(3.1 * len(goals), 3.5), layout="constrained")
    axes = figure.subplots(1, len(goals), squeeze=False, sharex=True, sharey=True)[0]
    looks = {0: ("before any update", ORANGE), 1: ("1 update", LINES[4][0]), 3: ("3 updates", BLUE)}
    for panel, goal, number in zip(axes, goals, range(len(goals)), strict=True):
        for updates, (label, color) in looks.items():
            for path in record["paths"][updates][number][:2]:
                x, y = np.transpose(path)
                panel.plot(x, y, color=color, linewidth=0.9, alpha=0.8, label=label)
                label = None
        panel.plot(*goal, "*", color="black", markersize=13, label="goal")
        panel.plot(0, 0, "o", color="black", markersize=4)
        panel.set_aspect("equal")
        panel.set_xlabel("x")
    axes[0].set_ylabel("y")
    legend(figure, *axes[0].get_legend_handles_labels())
    return figure


@matplotlib.rc_context(STYLE)
def returns_figure(ours: Mapping[str, Sequence[Mapping]], theirs: Mapping[str, Mapping]) -> Figure:
    """Draw returns by update (paper, figures 4, top, and 5): ours solid, the authors' dashed.

    One panel per environment with a record. Bands are 95% confidence intervals over the test goals, for our first seed;
    other seeds are thin lines.
    """
    environments = [environment for environment in ENVIRONMENTS if ours[environment]]
    figure = Figure(figsize=(1.2 + 4.2 * len(environments), 3.9), layout="constrained")
    axes = figure.subplots(1, len(environments), squeeze=False)[0]
    handles = {}
    for panel, environment in zip(axes, environments, strict=True):
        for (baseline, model), (color, marker) in zip(MODELS.items(), LINES, strict=False):
            runs = [record for record in ours[environment] if record["flags"]["baseline"] == baseline]
            for number, record in enumerate(runs):
                mean, half = (
                    np.array([column[key] for column in record["results"][:COLUMNS]]) for key in ("mean", "ci95")
                )
                if len(mean) == 1:  # the oracle needs no update
                    mean, half = np.repeat(mean, COLUMNS), np.repeat(half, COLUMNS)
                updates = np.arange(len(mean))
                style = {"marker": marker, "markersize": 4} if number == 0 else {"linewidth": 0.7}
                (line,) = panel.plot(updates, mean, color=color, **style)
                if number == 0:
                    handles.setdefault(model, line)
                    panel.fill_between(updates, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
            published = theirs[environment].get(baseline or "maml")
            if runs and published:
                mean = np.array(published["mean"][:COLUMNS])
                mean = np.repeat(mean, COLUMNS) if len(mean) == 1 else mean
                (line,) = panel.plot(range(len(mean)), mean, "--", color=color, linewidth=1.2)
        panel.set_title(ENVIRONMENTS[environment])
        panel.set_xlabel("updates")
        panel.set_xticks(range(COLUMNS))
    axes[0].set_ylabel("return")
    (dashed,) = axes[0].plot([], [], "--", color=GRAY)
    handles["the authors'"] = dashed
    legend(figure, handles.values(), handles.keys())
    return figure


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = ROOT / "results"
    ours = records(results)
    save(returns_figure(ours, authors(results)), ROOT / "figures" / "rl_returns")
    save(paths_figure(next(record for record in ours["point"] if "paths" in record)), ROOT / "figures" / "rl_paths")
    document = ROOT / "docs" / "rl.md"
    document.write_text(with_tables(document.read_text(), results))
    print("Written: docs/rl.md, figures/rl_returns.png and figures/rl_paths.png.")
