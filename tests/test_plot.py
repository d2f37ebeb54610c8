"""Figures: that they show what they say, and that the command writes them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -r requirements-plot.txt")

import plot
import recipe
from data_generator import SinusoidTasks
from utils import InputError

ROOT = Path(plot.__file__).parent
RUN = ROOT / "logs" / "published" / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm"
BASELINE = ROOT / "logs" / "published" / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain"


def lines(panel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): tuple(np.ravel(axis) for axis in line.get_data()) for line in panel.get_lines()}


def test_sinusoid_figure_shows_that_maml_adapts():
    models = {"MAML": plot.trained(RUN), "Pretrained": plot.trained(BASELINE, update_lr=0.01)}
    tasks = [SinusoidTasks(shot, shot, oracle=True).draw(0, "test", 10, 1) for shot in (5, 10)]
    figure = plot.sinusoid_figure(models, tasks)
    panels = {panel.get_title(): lines(panel) for panel in figure.axes}
    assert list(panels) == ["MAML, 5-shot", "Pretrained, 5-shot", "MAML, 10-shot", "Pretrained, 10-shot"]
    error = {}
    for title, drawn in panels.items():
        x, true = drawn["true curve"]
        assert len(drawn["support points"][0]) == (10 if "10-shot" in title else 5)
        np.testing.assert_allclose(
            drawn["support points"][1], np.interp(drawn["support points"][0], x, true), atol=0.01
        )
        for label in ("before any update", "1 update", "10 updates"):
            error[title, label] = np.mean((drawn[label][1] - true) ** 2)
    for shot in ("5-shot", "10-shot"):
        before, one, ten = (error[f"MAML, {shot}", label] for label in ("before any update", "1 update", "10 updates"))
        assert before > 5 * one > 5 * ten
        assert error[f"Pretrained, {shot}", "10 updates"] > 5 * ten


def test_sinusoid_figure_of_an_oracle():
    """Its model sees amplitude and phase; here a model that reads the amplitude alone from them, before any update."""
    flags = json.loads((RUN / "flags.json").read_text()) | {"baseline": "oracle"}
    maml = recipe.build(recipe.from_flags(flags))
    for weight in maml.weights.values():
        weight.assign(tf.zeros_like(weight))
    maml.weights["w1"][1, 0].assign(1.0)
    maml.weights["w2"][0, 0].assign(1.0)
    maml.weights["w3"][0, 0].assign(1.0)
    task = SinusoidTasks(10, 10, oracle=True).draw(0, "test", 3, 1)
    (panel,) = plot.sinusoid_figure({"Oracle": maml}, [task]).axes
    np.testing.assert_allclose(lines(panel)["before any update"][1], task.support_x[0, 0, 1], rtol=1e-6)


def entry(shot: int, metric: str, means: list[float | None]) -> dict:
    results = [{"updates": j, "mean": mean, "ci95": mean and 0.1 * mean} for j, mean in enumerate(means)]
    return {"support_examples_a_class_K": shot, "metric": metric, "results": results}


def test_updates_figure_has_a_panel_for_each_shot():
    error = "mean squared error"
    figure = plot.updates_figure(
        {
            "MAML": [entry(10, error, [3, 0.4, 0.1]), entry(5, error, [3, 0.6, 0.3])],
            "Oracle": [entry(5, error, [0.1, None])],
        }
    )
    five, ten = figure.axes
    assert (five.get_title(), ten.get_title()) == ("5-shot", "10-shot")
    np.testing.assert_array_equal(lines(five)["MAML"], [[0, 1, 2], [3, 0.6, 0.3]])
    np.testing.assert_array_equal(lines(five)["Oracle"], [[0], [0.1]])  # its tasks diverged after that
    band = five.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.27, 3.3])
    np.testing.assert_array_equal(lines(ten)["MAML"], [[0, 1, 2], [3, 0.4, 0.1]])


def test_more_labels_than_colours_are_refused():
    with pytest.raises(InputError, match="6 labels, but there are colours for 5"):
        plot.updates_figure({str(i): [entry(5, "mean squared error", [3, 0.6])] for i in range(6)})


def test_an_error_and_an_accuracy_do_not_share_an_axis():
    tests = {"Sine": [entry(5, "mean squared error", [3, 0.6])], "Omniglot": [entry(5, "accuracy", [0.2, 0.9])]}
    with pytest.raises(InputError, match="Sine: mean squared error; Omniglot: accuracy"):
        plot.updates_figure(tests)


@pytest.mark.parametrize(
    ("what", "message"),
    [(["x.json"], "x.json has no label: write label=x.json"), (["a=x", "a=y"], "two of the labels are the same")],
)
def test_labels_tell_lines_apart(what, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "updates", *what, "--output", "figure")
    assert message in capsys.readouterr().err


def test_accuracies_are_shown_in_percent():
    figure = plot.updates_figure({"conv": [entry(1, "accuracy (share of query examples, 0 to 1)", [0.2, 0.95])]})
    (panel,) = figure.axes
    assert panel.get_ylabel() == "accuracy, %"
    np.testing.assert_allclose(lines(panel)["conv"][1], [20, 95])


def test_scalars_of_a_run_that_was_resumed(tmp_path):
    """Two event files, the later one first by name, and a tag that is no curve."""
    for name, steps in (("9.first", (0, 100)), ("10.second", (200, 300))):
        with tf.summary.create_file_writer(str(tmp_path), filename_suffix=name).as_default():
            for step in steps:
                tf.summary.scalar("metaval_Post-update_accuracy__step_1", step / 1000, step=step)
                tf.summary.text("flags", "--seed=1", step=step)
    found = plot.scalars(tmp_path)
    assert list(found) == ["metaval_Post-update_accuracy__step_1"]
    steps, values = found["metaval_Post-update_accuracy__step_1"]
    np.testing.assert_array_equal(steps, [0, 100, 200, 300])
    np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.3])


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sinusoid", f"MAML={RUN}", "--shots", "10"),
        (
            "updates",
            f"MAML={RUN / 'results.json'}",
            f"Oracle={ROOT / 'results' / 'sinusoid_oracle.json'}",
            "--update_lr=0.01",
        ),
        ("training", f"with = in it={RUN}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_writes_png_and_svg(arguments, tmp_path, monkeypatch):
    command(monkeypatch, *arguments, "--output", tmp_path / "new folder" / "v1.0")
    written = sorted((tmp_path / "new folder").iterdir())
    assert [path.name for path in written] == ["v1.0.png", "v1.0.svg"]
    with Image.open(written[0]) as image:
        assert image.width > 400
    assert "</svg>" in written[1].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sinusoid", "MAML=nowhere"), "plot.py: no flags.json in nowhere: name a run folder"),
        (("updates", f"MAML={RUN}/results.json", "--update_lr=0.5"), "results.json has no test with alpha 0.5"),
        (("updates", f"MAML={RUN}"), "numstep1.updatelr0.01nonorm is damaged ("),
        (("updates", "MAML=nowhere.json"), "plot.py: no nowhere.json: name a file of results/"),
        (("sinusoid", f"MAML={RUN}/results.json"), "results.json/flags.json is damaged ("),
        (("training", "empty=tests/data"), "no TensorBoard events of training"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments, "--output", tmp_path / "figure")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
