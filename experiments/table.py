"""Writes the README's results from results/*.json: the lines between its two `results` comments.

python experiments/table.py
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by experiments/table.py -->", "<!-- end of results -->"
HEADER = "| test | model | paper | original code | ours | script |\n| --- | --- | --- | --- | --- | --- |"


class Row(NamedTuple):
    """One line of a table: a test of the model that experiments/<script>.sh trains, and what others report for it."""

    test: str
    model: str
    script: str
    shot: int  # K at test
    alpha: float  # at test
    paper: str = ""
    original: str = ""  # the original's code, run


# Paper: Finn, Abbeel, Levine (ICML 2017), section 5.1. Original: cbfinn/maml on TensorFlow 1.15, documented commands.
SINUSOID = [
    Row("5-shot, alpha 0.01", "MAML", "sinusoid_maml_alpha0.01", 5, 0.01, "0.67 / 0.38 / 0.35"),
    Row("", "pretrained", "sinusoid_pretrained", 5, 0.01, "2.41 / 2.23 / 2.19"),
    Row("", "oracle", "sinusoid_oracle", 5, 0.01),
    Row("10-shot, alpha 0.01", "MAML", "sinusoid_maml_alpha0.01", 10, 0.01),
    Row("", "pretrained", "sinusoid_pretrained", 10, 0.01),
    Row("", "oracle", "sinusoid_oracle", 10, 0.01),
    Row("20-shot, alpha 0.01", "MAML", "sinusoid_maml_alpha0.01", 20, 0.01),
    Row("", "pretrained", "sinusoid_pretrained", 20, 0.01),
    Row("", "oracle", "sinusoid_oracle", 20, 0.01),
    Row("5-shot, alpha 0.001", "MAML", "sinusoid_maml", 5, 0.001),
    Row("", "pretrained", "sinusoid_pretrained", 5, 0.001),
    Row("", "oracle", "sinusoid_oracle", 5, 0.001),
    Row("10-shot, alpha 0.001", "MAML", "sinusoid_maml", 10, 0.001, original="0.431 / 0.165 / 0.142"),
    Row("", "pretrained", "sinusoid_pretrained", 10, 0.001, original="2.87 / 2.59 / 2.42"),
    Row("", "oracle", "sinusoid_oracle", 10, 0.001, original="0.005 / 1.3 / 1.5"),
    Row("20-shot, alpha 0.001", "MAML", "sinusoid_maml", 20, 0.001),
    Row("", "pretrained", "sinusoid_pretrained", 20, 0.001),
    Row("", "oracle", "sinusoid_oracle", 20, 0.001),
]
# Paper: table 1. CIFAR-FS: Bertinetto et al. (ICLR 2019), table 1; the original's code as rerun by others.
IMAGES = [
    Row("Omniglot 5-way 1-shot", "MAML", "omniglot_5way_1shot", 1, 0.4, "98.7 +- 0.4"),
    Row("", "no convolutions", "omniglot_5way_1shot_fc", 1, 0.4, "89.7 +- 1.1"),
    Row("", "first order", "omniglot_5way_1shot_first_order", 1, 0.4),
    Row("Omniglot 5-way 5-shot", "MAML", "omniglot_5way_1shot", 5, 0.4, "99.9 +- 0.1"),
    Row("", "no convolutions", "omniglot_5way_1shot_fc", 5, 0.4, "97.5 +- 0.6"),
    Row("", "first order", "omniglot_5way_1shot_first_order", 5, 0.4),
    Row("Omniglot 20-way 1-shot", "MAML", "omniglot_20way_1shot", 1, 0.1, "95.8 +- 0.3"),
    Row("Omniglot 20-way 5-shot", "MAML", "omniglot_20way_1shot", 5, 0.1, "98.9 +- 0.2"),
    Row("MiniImagenet 5-way 1-shot", "MAML", "miniimagenet_1shot", 1, 0.01, "48.70 +- 1.84"),
    Row("", "first order", "miniimagenet_1shot_first_order", 1, 0.01, "48.07 +- 1.75"),
    Row("MiniImagenet 5-way 5-shot", "MAML", "miniimagenet_5shot", 5, 0.01, "63.11 +- 0.92"),
    Row("", "first order", "miniimagenet_5shot_first_order", 5, 0.01, "63.15 +- 0.91"),
    Row("CIFAR-FS 5-way 1-shot", "MAML", "cifarfs_1shot", 1, 0.01, "58.9 +- 1.9 (Bertinetto et al.)", "56.8 (others)"),
]


def tables(results: Path) -> str:
    """Both tables, of the records results/<script>.json and, of other seeds, <script>.seed<n>.json."""
    return "\n".join(
        [
            "Sinusoid: mean squared error after 1 / 5 / 10 updates; after +- the half width of its 95 % interval.\n",
            HEADER,
            *(_line(row, results, _errors) for row in SINUSOID),
            "\nImages: test accuracy in %, after the updates that the paper counts.\n",
            HEADER,
            *(_line(row, results, _accuracy) for row in IMAGES),
        ]
    )


def _line(row, results, shown):
    ours = []
    for path in sorted([*results.glob(f"{row.script}.json"), *results.glob(f"{row.script}.seed*.json")]):
        record = json.loads(path.read_text())
        protocol = {"support_examples_a_class_K": row.shot, "inner_step_size_alpha": row.alpha}
        (test,) = [test for test in record["tests"] if protocol.items() <= test.items()]
        reported = [column for column in test["results"] if column["the_papers_number"]]
        ours.append(f"seed {test['training_seed']}: {shown(reported, record)}")
    cell = "<br>".join(ours) or "not run yet"
    return f"| {row.test} | {row.model} | {row.paper} | {row.original} | {cell} | `{row.script}.sh` |"


def _errors(columns, record):
    means, ci95, medians = ([column[key] for column in columns] for key in ("mean", "ci95", "median"))
    if any(mean is None or mean > 10 * median for mean, median in zip(means, medians, strict=True)):
        return f"{_joined(means)}, medians {_joined(medians)}"  # a few tasks diverge, and the means with them
    return f"{_joined(means)} +- {_joined(ci95)}"


def _accuracy(columns, record):
    value = ", ".join(f"{100 * column['mean']:.1f} +- {100 * column['ci95']:.1f}" for column in columns)
    return f"{value} ({record['iterations']:,} iterations, {record['hours']:.1f} hours)"


def _joined(numbers):
    return " / ".join("diverged" if n is None else f"{n:.3f}" if n < 1000 else f"{n:.0e}" for n in numbers)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{tables(ROOT / 'results')}\n\n{END}{after}")
    print("Written:", readme.name)
