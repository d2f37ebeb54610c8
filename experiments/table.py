"""Write the tables of README.md and docs/ from results/*.json, each between its two comment marks.

    python experiments/table.py

Our numbers come from results/<script>.json and, for other methods and seeds, results/<script>.<...>.json; row.py writes
both. Published numbers come from published.json, and step times from speed.json. Both name their sources.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end of table -->"
TASKS, TASK_SEED = 600, 0  # the defaults of a test
BEST = "best on validation"  # the tested checkpoint, if not the last
TABLE_UPDATES = (1, 5, 10)  # of the sinusoid (paper, table 2)

Json = Mapping[str, Any]


class Row(NamedTuple):
    """A test of the model that experiments/<script>.sh trains: one line of a table per protocol and seed."""

    test: str
    model: str
    script: str
    shot: int  # K at test
    alpha: float  # at test
    flags: Mapping[str, str] = MappingProxyType({})  # passed to the script
    released: str = ""  # where to find weights that others trained and we only tested

    @property
    def source(self) -> str:
        """The command that trains the model, or where its weights are."""
        command = " ".join([f"{self.script}.sh", *(f"--{flag}={value}" for flag, value in self.flags.items())])
        return self.released or f"`{command}`"

    @property
    def published_row(self) -> str:
        """The row of published.json with the published numbers of this model."""
        return self.script.removesuffix("_released")


SINUSOID = [
    Row(f"{shot}-shot, alpha {alpha}", model, script, shot, alpha)
    for alpha, maml in ((0.01, "sinusoid_maml_alpha0.01"), (0.001, "sinusoid_maml"))
    for shot in (5, 10, 20)
    for model, script in (("MAML", maml), ("pretrained", "sinusoid_pretrained"), ("oracle", "sinusoid_oracle"))
]
IMAGES = [
    Row("Omniglot 5-way 1-shot", "MAML", "omniglot_5way_1shot", 1, 0.4),
    Row("Omniglot 5-way 1-shot", "no convolutions", "omniglot_5way_1shot_fc", 1, 0.4),
    Row("Omniglot 5-way 1-shot", "first order", "omniglot_5way_1shot_first_order", 1, 0.4),
    Row("Omniglot 5-way 5-shot", "MAML", "omniglot_5way_1shot", 5, 0.4),
    Row("Omniglot 5-way 5-shot", "no convolutions", "omniglot_5way_1shot_fc", 5, 0.4),
    Row("Omniglot 5-way 5-shot", "no convolutions, trained 5-shot", "omniglot_5way_5shot_fc", 5, 0.4),
    Row("Omniglot 5-way 5-shot", "first order", "omniglot_5way_1shot_first_order", 5, 0.4),
    Row("Omniglot 20-way 1-shot", "MAML", "omniglot_20way_1shot", 1, 0.1),
    Row("Omniglot 20-way 1-shot", "first order", "omniglot_20way_1shot_first_order", 1, 0.1),
    Row("Omniglot 20-way 5-shot", "MAML", "omniglot_20way_1shot", 5, 0.1),
    Row("Omniglot 20-way 5-shot", "first order", "omniglot_20way_1shot_first_order", 5, 0.1),
    Row("MiniImagenet 5-way 1-shot", "MAML", "miniimagenet_1shot", 1, 0.01),
    Row(
        "MiniImagenet 5-way 1-shot",
        "the authors' released model, tested here",
        "miniimagenet_1shot_released",
        1,
        0.01,
        released="[cbfinn/maml](https://github.com/cbfinn/maml/tree/master/logs/miniimagenet1shot)",
    ),
    Row("MiniImagenet 5-way 1-shot", "first order", "miniimagenet_1shot_first_order", 1, 0.01),
    Row("MiniImagenet 5-way 5-shot", "MAML", "miniimagenet_5shot", 5, 0.01),
    Row("MiniImagenet 5-way 5-shot", "first order", "miniimagenet_5shot_first_order", 5, 0.01),
    Row("CIFAR-FS 5-way 1-shot", "MAML", "cifarfs_1shot", 1, 0.01),
    Row("CIFAR-FS 5-way 1-shot", "trained on 100 images per class", "cifarfs_1shot_reduced", 1, 0.01),
]
METHOD = {"adapt": "all", "learn_update_lr": "none"}  # the flags that select a method, with MAML's values
ANIL, SIZES, META_SGD = {"adapt": "head"}, {"learn_update_lr": "step"}, {"learn_update_lr": "weight"}
BOIL = {"adapt": "body"}
# Oh et al. 2021 use alpha 0.5 with the mean loss. In a 5-way task our loss is 5 times the mean, so alpha is 0.1.
BOIL_PUBLISHED = BOIL | {"num_updates": "1", "update_lr": "0.1", "num_filters": "64", "metatrain_iterations": "30000"}
META_SGD_PUBLISHED = META_SGD | {"num_updates": "1"}  # Li et al. 2017
FAMILY = [
    Row("Omniglot 5-way 1-shot", "ANIL", "omniglot_5way_1shot", 1, 0.4, ANIL),
    Row("Omniglot 5-way 1-shot", "BOIL", "omniglot_5way_1shot", 1, 0.4, BOIL),
    Row("Omniglot 5-way 1-shot", "Meta-SGD", "omniglot_5way_1shot", 1, 0.4, META_SGD),
    Row("Omniglot 5-way 1-shot", "step sizes", "omniglot_5way_1shot", 1, 0.4, SIZES),
    Row("Omniglot 5-way 5-shot", "Meta-SGD", "omniglot_5way_1shot", 5, 0.4, META_SGD),
    Row("Omniglot 20-way 1-shot", "ANIL", "omniglot_20way_1shot", 1, 0.1, ANIL),
    Row("Omniglot 20-way 1-shot", "BOIL", "omniglot_20way_1shot", 1, 0.1, BOIL),
    Row("Omniglot 20-way 1-shot", "Meta-SGD", "omniglot_20way_1shot", 1, 0.1, META_SGD),
    Row("Omniglot 20-way 1-shot", "step sizes", "omniglot_20way_1shot", 1, 0.1, SIZES),
    Row("Omniglot 20-way 5-shot", "ANIL", "omniglot_20way_1shot", 5, 0.1, ANIL),
    Row("MiniImagenet 5-way 1-shot", "ANIL", "miniimagenet_1shot", 1, 0.01, ANIL),
    Row("MiniImagenet 5-way 1-shot", "BOIL", "miniimagenet_1shot", 1, 0.1, BOIL_PUBLISHED),
    Row("MiniImagenet 5-way 1-shot", "Meta-SGD", "miniimagenet_1shot", 1, 0.01, META_SGD_PUBLISHED),
    Row("MiniImagenet 5-way 5-shot", "ANIL", "miniimagenet_5shot", 5, 0.01, ANIL),
    Row("MiniImagenet 5-way 5-shot", "BOIL", "miniimagenet_5shot", 5, 0.1, BOIL_PUBLISHED),
    Row("MiniImagenet 5-way 5-shot", "Meta-SGD", "miniimagenet_5shot", 5, 0.01, META_SGD_PUBLISHED),
    Row("CIFAR-FS 5-way 1-shot", "ANIL", "cifarfs_1shot", 1, 0.01, ANIL),
    Row("CIFAR-FS 5-way 1-shot", "BOIL", "cifarfs_1shot", 1, 0.01, BOIL),
    Row("CIFAR-FS 5-way 1-shot", "Meta-SGD", "cifarfs_1shot", 1, 0.01, META_SGD),
    Row("CIFAR-FS 5-way 1-shot", "step sizes", "cifarfs_1shot", 1, 0.01, SIZES),
]
MMFEWSHOT = [
    Row(f"{title} 5-way {shot}-shot", network, f"mmfewshot_{data}_{network}", shot, 0.01)
    for data, title in (("cub", "CUB"), ("miniimagenet", "MiniImagenet"))
    for shot in (1, 5)
    for network in ("conv4", "resnet12")
]
SUMMARY = {  # title -> row
    "Sinusoid 10-shot, error after 1 update": Row("", "MAML", "sinusoid_maml", 10, 0.001),
    "Omniglot 5-way 1-shot": Row("", "MAML", "omniglot_5way_1shot", 1, 0.4),
    "Omniglot 5-way 5-shot": Row("", "MAML", "omniglot_5way_1shot", 5, 0.4),
    "Omniglot 5-way 1-shot, no convolutions": Row("", "MAML", "omniglot_5way_1shot_fc", 1, 0.4),
    "Omniglot 5-way 5-shot, no convolutions": Row("", "MAML", "omniglot_5way_1shot_fc", 5, 0.4),
    "Omniglot 20-way 1-shot": Row("", "MAML", "omniglot_20way_1shot", 1, 0.1),
    "Omniglot 20-way 5-shot": Row("", "MAML", "omniglot_20way_1shot", 5, 0.1),
    "MiniImagenet 5-way 1-shot, the authors' released model": next(row for row in IMAGES if row.released),
}
RETURNS = {"point": "2D navigation", "cheetah_direction": "Half-cheetah direction"}  # rl/; by updates 0 to 3
SPEED = {
    "sinusoid_10shot": "sinusoid 10-shot",
    "omniglot_5way": "Omniglot 5-way 1-shot",
    "omniglot_20way": "Omniglot 20-way 1-shot",
    "omniglot_fc": "Omniglot 5-way 1-shot, `--conv=False`",
    "miniimagenet_1shot": "MiniImagenet 5-way 1-shot",
    "miniimagenet_5shot": "MiniImagenet 5-way 5-shot",
}


# Our numbers and published numbers.


def ours(row: Row, results: Path) -> dict[str, list[tuple[Json, Json]]]:
    """Return the recorded tests of a row by protocol, the original's protocol first.

    Returns:
      protocol -> (record, test) of each seed. A protocol is the number of queries per class, then everything that
      differs from the original's test.
    """
    tested = []
    for path in sorted([*results.glob(f"{row.script}.json"), *results.glob(f"{row.script}.*.json")]):
        record = json.loads(path.read_text())
        flags = METHOD | record.get("flags", {})
        if any(str(flags.get(flag)) != value for flag, value in {**METHOD, **row.flags}.items()):
            continue
        for test in record["tests"]:
            if (test["support_examples_a_class_K"], test["inner_step_size_alpha"]) == (row.shot, row.alpha):
                tested.append((record, test))
    by_protocol = defaultdict(list)
    for record, test in sorted(tested, key=lambda pair: _protocol_order(row, pair[1])):
        by_protocol[_protocol(test)].append((record, test))
    return dict(by_protocol)


def _protocol_order(row, test):
    query = test["query_examples_a_class_Q"]
    by_image = "query_normalised_with" in test
    return query != row.shot, query, test["tasks"], test["task_seed"], by_image, test["best_on_validation"]


def _protocol(test):
    parts = [str(test["query_examples_a_class_Q"])]
    if test.get("query_shares"):
        parts.append(f"on average, in {test['query_shares']} shares")
    if test.get("query_normalised_with"):
        parts.append(f"each normalized with the {test['query_normalised_with']} set")
    if (test["tasks"], test["task_seed"]) != (TASKS, TASK_SEED):
        parts.append(f"{test['tasks']:,} tasks of seed {test['task_seed']}")
    if test.get("updates_at_test"):
        parts.append(f"at most {test['updates_at_test']} updates")
    if test["best_on_validation"]:
        parts.append(BEST)
    return ", ".join(parts)


def published(row: Row, reported_by: str, results: Path, protocol: str = "") -> str:
    """Return the published numbers of a row to their published digits, or an empty string.

    Leaves out a number whose query count is known and differs from the protocol's.
    """
    for entry in json.loads((results / "published.json").read_text(), parse_float=str):
        of_row = entry["row"], entry["support_examples_a_class_K"], float(entry["inner_step_size_alpha"])
        query = entry["query_examples_a_class_Q"]
        if of_row != (row.published_row, row.shot, row.alpha) or entry["reported_by"] != reported_by:
            continue
        if METHOD | entry.get("flags", {}) != {flag: row.flags.get(flag, usual) for flag, usual in METHOD.items()}:
            continue
        if protocol and query and query != int(protocol.split(",")[0]):
            continue
        columns = entry["results"]
        if _is_error(entry):
            return " / ".join(column["mean"] for column in columns if column["updates"] in TABLE_UPDATES)
        who = f" ({entry['shown_as']})" if "shown_as" in entry else ""
        return (
            ", ".join(" +- ".join(str(column[key]) for key in ("mean", "ci95") if key in column) for column in columns)
            + who
        )
    return ""


def _reported(test):
    """Return the columns that the paper reports, as text."""
    columns = _paper_columns(test)
    if not _is_error(test):
        return ", ".join(f"{100 * column['mean']:.1f} +- {100 * column['ci95']:.1f}" for column in columns)
    means, ci95, medians = ([column[key] for column in columns] for key in ("mean", "ci95", "median"))
    return (
        f"{_joined(means)}, medians {_joined(medians)}" if _diverges(test) else f"{_joined(means)} +- {_joined(ci95)}"
    )


def _paper_columns(test):
    return [column for column in test["results"] if column["the_papers_number"]]


def _is_error(test):
    return test["metric"] == "mean squared error"


def _diverges(test):
    """Return whether diverging tasks dominate a mean, so that medians are needed."""
    return any(column["mean"] is None or column["mean"] > 10 * column["median"] for column in _paper_columns(test))


def _joined(numbers):
    return " / ".join(map(_error, numbers))


def _error(number):
    return "diverged" if number is None else f"{number:.3f}" if number < 1000 else f"{number:.0e}"


# The tables.


def accuracy_table(rows: list[Row], results: Path) -> str:
    """Return a table of accuracies with a line for each protocol and seed that a row was tested with."""
    lines = []
    for row in rows:
        for protocol, tests in (ours(row, results) or {"": []}).items():
            shared = {"test": row.test, "model": row.model, "queries per class": protocol, "script": row.source}
            for reported_by in ("paper", "original code"):
                shared[reported_by] = published(row, reported_by, results, protocol).replace("+-", "±")
            lines += [shared | _accuracy_cells(record, test) for record, test in tests] or [
                shared | {"ours": "not run yet"}
            ]
    order = ("test", "model", "paper", "original code", "queries per class", "seed", "ours", "iterations", "hours")
    return _markdown((*order, "script"), lines)


def _accuracy_cells(record, test):
    cells = {"ours": _reported(test).replace("+-", "±")}
    if "hours" not in record:  # others trained the weights
        return cells
    cost = {"iterations": f"{record['iterations']:,}", "hours": f"{record['hours']:.1f}"}
    return cells | cost | {"seed": str(test["training_seed"])}


def error_table(rows: list[Row], results: Path) -> str:
    """Return a table of errors after TABLE_UPDATES, with a line for each publication and each seed of a row."""
    columns = [f"after {updates}" for updates in TABLE_UPDATES]
    lines = []
    for row in rows:
        for protocol, tests in (ours(row, results) or {"": []}).items():
            shared = {"test": row.test, "model": row.model, "script": row.source}
            for reported_by in ("paper", "original code"):
                means = published(row, reported_by, results, protocol)
                if means:
                    lines.append(shared | {"source": reported_by} | dict(zip(columns, means.split(" / "), strict=True)))
            for _, test in tests:
                source = {"source": f"seed {test['training_seed']}", "query points": protocol}
                lines.append(shared | source | dict(zip(columns, _error_cells(test), strict=True)))
            if not tests:
                lines.append(shared | {"source": "not run yet"})
    return _markdown(("test", "model", "source", "query points", *columns, "script"), lines)


def _error_cells(test):
    second = "median" if _diverges(test) else "ci95"
    separator = ", median " if _diverges(test) else " ± "
    return [separator.join(_error(column[key]) for key in ("mean", second)) for column in _paper_columns(test)]


def _markdown(columns, lines):
    """Return a Markdown table without empty columns. A cell that repeats the row of the line above is left empty."""
    columns = [name for name in columns if any(line.get(name) for line in lines)]
    printed, above = [columns, ["---"] * len(columns)], {}
    for line in lines:
        same_test = line["test"] == above.get("test")
        same_row = same_test and (line["model"], line["script"]) == (above["model"], above["script"])
        hidden = ("test", "model", "script") if same_row else ("test",) if same_test else ()
        printed.append(["" if name in hidden else line.get(name, "") for name in columns])
        above = line
    return "\n".join(f"| {' | '.join(cells)} |" for cells in printed)


def summary(results: Path) -> str:
    """Write one line per row: the paper's number, and the mean of ours over the seeds with the lowest and the highest.

    A single seed has the half-width of its test's 95% interval. Use the last checkpoint or, if that was not tested, the
    best on validation. Ours is by the original's protocol (Q = K); the last column has one query per class.
    """
    lines = ["| test | paper | ours | ours, Q = 1 |", "| --- | --- | --- | --- |"]
    for title, row in SUMMARY.items():
        tested = ours(row, results)
        mine, one_query = (_over_seeds(tested.get(f"{q}", tested.get(f"{q}, {BEST}"))) for q in (row.shot, 1))
        if row.shot == 1 or row.script.startswith("sinusoid"):
            one_query = ""
        records = [record for tests in tested.values() for record, _ in tests]
        mine += next(filter(None, (_cut_short(row, record) for record in records)), "")
        paper = published(row, "paper", results)
        if not paper:  # the paper shows the sinusoid's errors as a curve
            paper = f"{published(row, 'original code', results).split(' / ')[0]} (its code)"
        lines.append(f"| {title} | {paper.replace('+-', '±')} | {mine} | {one_query} |")
    return "\n".join([*lines, *returns(results)])


def _over_seeds(tests):
    """Write the mean over seeds of the first column that the paper reports."""
    tests = [(record, test) for record, test in tests or () if _paper_columns(test)]
    if not tests:
        return "not run yet"
    columns = [next(column for column in test["results"] if column["the_papers_number"]) for _, test in tests]
    digits = ".3f" if _is_error(tests[0][1]) else ".1%"
    return _spread([column["mean"] for column in columns], columns[0]["ci95"], digits).replace("%", "")


def _spread(means, half, digits):
    mean = sum(means) / len(means)
    if len(means) == 1:
        return f"{mean:{digits}} ± {half:{digits}}"
    return f"{mean:{digits}} ({min(means):{digits}} to {max(means):{digits}}, {len(means)} seeds)"


def _cut_short(row, record):
    """Return a remark if a run stopped before the last iteration of its script, else an empty string."""
    if row.released:
        return ""
    script = (ROOT / "experiments" / f"{row.script}.sh").read_text()
    whole = sum(int(number) for number in re.findall(r"--(?:pre|meta)train_iterations=(\d+)", script))
    done = record["iterations"]
    return f" (stopped at {done:,} of {whole:,} iterations)" if done < whole else ""


def returns(results: Path) -> list[str]:
    """Write the returns of MAML after three updates in reinforcement learning, the authors' next to ours."""
    lines = []
    for environment, title in RETURNS.items():
        every = [json.loads(path.read_text()) for path in sorted(results.glob(f"rl_{environment}_*maml*.json"))]
        records = [record for record in every if "product" in record["flags"]] or every  # older ones: the exact product
        if records:
            theirs = json.loads((results / "rl_authors.json").read_text())[environment]["maml"]
            columns = [record["results"][3] for record in records]
            mine = _spread([column["mean"] for column in columns], columns[0]["ci95"], ".1f")
            done = min(record["flags"]["iterations"] for record in records)
            remarks = [f"stopped at {done} of 100 iterations"] if done < 100 else []
            remarks += ["exact Fisher product"] if "product" not in records[0]["flags"] else []
            remark = f" ({'; '.join(remarks)})" if remarks else ""
            paper = f"{theirs['mean'][3]:.1f} ± {theirs['ci95'][3]:.1f}"
            lines.append(f"| {title}, return after 3 updates | {paper} | {mine}{remark} | |")
    return lines


def speed(results: Path) -> str:
    """Return a table of step times (ours, the floor, the original's, the best peer's), then their sources."""
    measured = json.loads((results / "speed.json").read_text())
    mine, original, peers = (measured[key] for key in ("ours", "original", "peers"))
    of_ours, of_original = ({row["configuration"]: row for row in part["rows"]} for part in (mine, original))
    lines = [
        "| | ours | floor | x floor | first order | original | best peer's time / ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in SPEED.items():
        step, first_order = of_ours[name], of_ours[f"{name} first order"]
        timed = [row for row in peers["rows"] if row["configuration"] == name and "ratio" in row]
        best = min(timed, key=itemgetter("ratio"), default=None)
        cells = [
            title,
            _milliseconds(step["ms_per_step"]),
            _milliseconds(step["floor_ms"]),
            f"{step['times_floor']:.3g}",
            _milliseconds(first_order["ms_per_step"]),
            _milliseconds(of_original[name]["ms_per_step"]) if name in of_original else "",
            f"{round(best['ratio'], 2)}: {best['form']}" if best else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for who, part in (("Ours", mine), ("Peers", peers)):
        lines += ["", f"{who}: `{part['command']}`, {part['date']}, {part['machine']}, {part['versions']}."]
    lines += ["", f"The original: {original['source']}, {original['machine']}."]
    return "\n".join(lines)


def _milliseconds(ms):
    return f"{ms:.2f}" if ms < 1 else f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"


PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"summary": summary},
    "docs/results.md": {
        "sinusoid": partial(error_table, SINUSOID),
        "images": partial(accuracy_table, IMAGES),
        "family": partial(accuracy_table, FAMILY),
        "mmfewshot": partial(accuracy_table, MMFEWSHOT),
    },
    "docs/design.md": {"speed": speed},
}


def with_tables(page: str, text: str, results: Path) -> str:
    """Return the text of a page with its tables made from the results."""
    for name, make_table in PAGES[page].items():
        begin = f"<!-- {name}: written by experiments/table.py -->"
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n\n{make_table(results)}\n\n{END}{after}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(), ROOT / "results"))
        print("Written:", page)
