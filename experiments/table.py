"""Writes the tables of README.md and docs/ from results/*.json, each between its two comment marks.

    python experiments/table.py

Our numbers come from results/<script>.json and, for other methods and seeds, <script>.<...>.json, which row.py writes.
What others report comes from published.json, and the times of a step from speed.json. Both say who measured what, and
how.
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
TASKS, TASK_SEED = 600, 0  # of a test, unless its flags say otherwise
BEST = "best on validation"  # the checkpoint that was tested; else the last
TABLE_UPDATES = (1, 5, 10)  # of the sinusoid: paper, table 2

Json = Mapping[str, Any]


class Row(NamedTuple):
    """A test of the model that experiments/<script>.sh trains: one line of a table, or one for each protocol."""

    test: str
    model: str
    script: str
    shot: int  # K at test
    alpha: float  # at test
    flags: Mapping[str, str] = MappingProxyType({})  # that the script is given
    released: str = ""  # where others' weights are, which are only tested here; then no script trained the record

    @property
    def source(self) -> str:
        """The command that trained the model, or where its weights are."""
        command = " ".join([f"{self.script}.sh", *(f"--{flag}={value}" for flag, value in self.flags.items())])
        return self.released or f"`{command}`"

    @property
    def trained_by(self) -> str:
        """The script whose published numbers are this row's, too."""
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
    Row("CIFAR-FS 5-way 1-shot", "trained on 100 images a class", "cifarfs_1shot_reduced", 1, 0.01),
]
METHOD = {"adapt": "all", "learn_update_lr": "none"}  # the flags that make another method of MAML, as MAML has them
ANIL, SIZES, META_SGD = {"adapt": "head"}, {"learn_update_lr": "step"}, {"learn_update_lr": "weight"}
BOIL = {"adapt": "body"}
# As Oh et al. 2021: a step of 0.5 on the mean loss is 0.1 on ours, which is 5 times the mean in a 5-way task.
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


# Ours and others' numbers.


def ours(row: Row, results: Path) -> dict[str, list[tuple[Json, Json]]]:
    """The recorded tests of a row, by protocol, the original's first.

    Returns:
      protocol -> (record, test) of each seed. The protocol is the queries a class, and what else is not the original's.
    """
    found = []
    for path in sorted([*results.glob(f"{row.script}.json"), *results.glob(f"{row.script}.*.json")]):
        record = json.loads(path.read_text())
        flags = METHOD | record.get("flags", {})
        if any(str(flags.get(flag)) != value for flag, value in {**METHOD, **row.flags}.items()):
            continue
        for test in record["tests"]:
            if (test["support_examples_a_class_K"], test["inner_step_size_alpha"]) == (row.shot, row.alpha):
                found.append((record, test))
    by_protocol = defaultdict(list)
    for record, test in sorted(found, key=lambda pair: _protocol_order(row, pair[1])):
        by_protocol[_protocol(test)].append((record, test))
    return dict(by_protocol)


def _protocol_order(row, test):
    query = test["query_examples_a_class_Q"]
    normalised = "query_normalised_with" in test
    return query != row.shot, query, test["tasks"], test["task_seed"], normalised, test["best_on_validation"]


def _protocol(test):
    parts = [str(test["query_examples_a_class_Q"])]
    if test.get("query_shares"):
        parts.append(f"on average, in {test['query_shares']} shares")
    if test.get("query_normalised_with"):
        parts.append(f"each normalised with the {test['query_normalised_with']} set")
    if (test["tasks"], test["task_seed"]) != (TASKS, TASK_SEED):
        parts.append(f"{test['tasks']:,} tasks of seed {test['task_seed']}")
    if test.get("updates_at_test"):
        parts.append(f"{test['updates_at_test']} updates at most")
    if test["best_on_validation"]:
        parts.append(BEST)
    return ", ".join(parts)


def published(row: Row, reported_by: str, results: Path, protocol: str = "") -> str:
    """What others report for a row, with the digits that they give; empty where they report nothing.

    A number that is known to be of another count of queries a class than the protocol's is left out.
    """
    for entry in json.loads((results / "published.json").read_text(), parse_float=str):
        of_row = entry["row"], entry["support_examples_a_class_K"], float(entry["inner_step_size_alpha"])
        query = entry["query_examples_a_class_Q"]
        if of_row != (row.trained_by, row.shot, row.alpha) or entry["reported_by"] != reported_by:
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
    """The columns of a test that the paper reports, as text."""
    columns = [column for column in test["results"] if column["the_papers_number"]]
    if not _is_error(test):
        return ", ".join(f"{100 * column['mean']:.1f} +- {100 * column['ci95']:.1f}" for column in columns)
    means, ci95, medians = ([column[key] for column in columns] for key in ("mean", "ci95", "median"))
    if any(mean is None or mean > 10 * median for mean, median in zip(means, medians, strict=True)):
        return f"{_joined(means)}, medians {_joined(medians)}"  # a few tasks diverge, and the means with them
    return f"{_joined(means)} +- {_joined(ci95)}"


def _is_error(test):
    return test["metric"] == "mean squared error"


def _joined(numbers):
    return " / ".join("diverged" if n is None else f"{n:.3f}" if n < 1000 else f"{n:.0e}" for n in numbers)


# The tables.


def table(rows: list[Row], queries: str, results: Path) -> str:
    """Paper, the original's code, ours: a line for each protocol that a row was tested by.

    Args:
      queries: the heading of the column of protocols.
      results: the folder of the records.
    """
    lines = [
        f"| test | model | paper | original code | {queries} | ours | script |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    above = ""
    for row in rows:
        for protocol, tests in (ours(row, results) or {"": []}).items():
            others = [published(row, reported_by, results, protocol) for reported_by in ("paper", "original code")]
            mine = "<br>".join(_seed(record, test) for record, test in tests) or "not run yet"
            cells = ["" if row.test == above else row.test, row.model, *others, protocol, mine, row.source]
            lines.append(f"| {' | '.join(cells)} |")
            above = row.test
    return "\n".join(lines)


def _seed(record, test):
    if "hours" not in record:  # the weights are others'
        return _reported(test)
    cost = f" ({record['iterations']:,} iterations, {record['hours']:.1f} hours)"
    return f"seed {test['training_seed']}: {_reported(test)}{'' if _is_error(test) else cost}"


def summary(results: Path) -> str:
    """Write one line per row: the paper's number, and the mean of ours over the seeds with the lowest and the highest.

    A single seed has the half-width of its test's 95 % interval. The last checkpoint counts, or if that was not tested
    the best on validation. Ours is by the original's protocol (Q = K); the last column has one query per class.
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
        if not paper:  # the paper has the sinusoid as a curve
            paper = f"{published(row, 'original code', results).split(' / ')[0]} (its code)"
        lines.append(f"| {title} | {paper.replace('+-', '±')} | {mine} | {one_query} |")
    return "\n".join([*lines, *returns(results)])


def _over_seeds(tests):
    """Write the mean over seeds of the first column that the paper reports."""
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
    """Says how far a run went that was not trained for all the iterations of its script."""
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
        records = [json.loads(path.read_text()) for path in sorted(results.glob(f"rl_{environment}_maml*.json"))]
        if records:
            theirs = json.loads((results / "rl_authors.json").read_text())[environment]["maml"]
            columns = [record["results"][3] for record in records]
            mine = _spread([column["mean"] for column in columns], columns[0]["ci95"], ".1f")
            done = min(record["flags"]["iterations"] for record in records)
            cut = f" (stopped at {done} of 100 iterations)" if done < 100 else ""
            paper = f"{theirs['mean'][3]:.1f} ± {theirs['ci95'][3]:.1f}"
            lines.append(f"| {title}, return after 3 updates | {paper} | {mine}{cut} | |")
    return lines


def speed(results: Path) -> str:
    """Milliseconds of a training step beside the floor, the original's and the best peer's; then who measured them."""
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
        "sinusoid": partial(table, SINUSOID, "query points"),
        "images": partial(table, IMAGES, "queries a class"),
        "family": partial(table, FAMILY, "queries a class"),
        "mmfewshot": partial(table, MMFEWSHOT, "queries a class"),
    },
    "docs/design.md": {"speed": speed},
}


def written(page: str, text: str, results: Path) -> str:
    """The text of a page with its tables as the results have them now."""
    for name, made in PAGES[page].items():
        begin = f"<!-- {name}: written by experiments/table.py -->"
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n\n{made(results)}\n\n{END}{after}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(page, path.read_text(), ROOT / "results"))
        print("Written:", page)
