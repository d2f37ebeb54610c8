"""plot.py: the content of the figures, and the command that writes them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -r requirements-plot.txt")

import plot
import recipe
import report
from data_generator import SinusoidTasks
from files import InputError

ROOT = Path(plot.__file__).parent
RUN = ROOT / "logs" / "published" / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm"
OMNIGLOT = ROOT / "logs" / "published" / "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm"
BASELINE = ROOT / "logs" / "published" / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain"


def lines(panel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): tuple(np.ravel(axis) for axis in line.get_data()) for line in panel.get_lines()}


def test_sinusoid_figure_shows_that_maml_adapts():
    models = {"MAML": plot.trained(RUN), "Pretrained": plot.trained(BASELINE, update_lr=0.01)}
    assert models["Pretrained"][0].alpha == 0.01  # trained with 0.001
    tasks = [SinusoidTasks(shot, shot, oracle=True).draw(0, "test", 10, 1) for shot in (5, 10)]
    figure = plot.sinusoid_figure(models, tasks)
    panels = {panel.get_title(): lines(panel) for panel in figure.axes}
    assert list(panels) == ["MAML, 5-shot", "Pretrained, 5-shot", "MAML, 10-shot", "Pretrained, 10-shot"]
    error = {}
    for title, curves in panels.items():
        x, true = curves["true curve"]
        assert len(curves["support points"][0]) == (10 if "10-shot" in title else 5)
        np.testing.assert_allclose(
            curves["support points"][1], np.interp(curves["support points"][0], x, true), atol=0.01
        )
        for label in ("before any update", "1 update", "10 updates"):
            error[title, label] = np.mean((curves[label][1] - true) ** 2)
    for shot in ("5-shot", "10-shot"):
        before, one, ten = (error[f"MAML, {shot}", label] for label in ("before any update", "1 update", "10 updates"))
        assert before > 5 * one > 5 * ten
        assert error[f"Pretrained, {shot}", "10 updates"] > 5 * ten


def test_sinusoid_figure_gives_an_oracle_amplitude_and_phase():
    """The model here returns the amplitude it is given."""
    flags = json.loads((RUN / "flags.json").read_text()) | {"baseline": "oracle"}
    maml = recipe.build(recipe.from_flags(flags))
    for weight in maml.weights.values():
        weight.assign(tf.zeros_like(weight))
    maml.weights["w1"][1, 0].assign(1.0)
    maml.weights["w2"][0, 0].assign(1.0)
    maml.weights["w3"][0, 0].assign(1.0)
    task = SinusoidTasks(10, 10, oracle=True).draw(0, "test", 3, 1)
    (panel,) = plot.sinusoid_figure({"Oracle": (maml.inner, maml.values())}, [task]).axes
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


def test_help_shows_percent_signs(monkeypatch, capsys):
    for arguments in (["--help"], ["updates", "--help"]):
        with pytest.raises(SystemExit):
            command(monkeypatch, *arguments)
        assert "95% confidence interval" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("updates", [2, 20])
def test_update_axis_spans_the_test(updates):
    (panel,) = plot.updates_figure({"MAML": [entry(5, "accuracy", [0.5] * (updates + 1))]}).axes
    low, high = panel.get_xlim()
    assert -updates / 10 < low < 0 and updates < high < 1.1 * updates
    ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
    assert {0, updates} <= set(ticks) and all(tick == round(tick) for tick in ticks)


def test_latest_test_of_each_shot_is_drawn(tmp_path, monkeypatch):
    """Only tests on the test classes with the given alpha count. Q = K wins, then the latest checkpoint, then entry."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, *_: figures.append(figure))
    tests = [
        entry(5, "accuracy", [mean]) | {"split": split, "inner_step_size_alpha": alpha}
        for mean, split, alpha in ((0.1, "test", 0.4), (0.2, "test", 0.4), (0.3, "test", 0.1), (0.4, "val", 0.4))
    ]
    (path := tmp_path / "results.json").write_text(json.dumps(tests))
    for flags, accuracy in ((["--update_lr=0.4"], 0.2), ([], 0.3)):
        command(monkeypatch, "updates", f"MAML={path}", *flags, "--output", "figure")
        (panel,) = figures.pop().axes
        np.testing.assert_allclose(lines(panel)["MAML"][1], [accuracy])
    path.write_text(
        json.dumps([test | {"query_examples_a_class_Q": q} for test, q in zip(tests, (1, 5, 1, 5), strict=True)])
    )
    command(monkeypatch, "updates", f"MAML={path}", "--output", "figure")
    np.testing.assert_allclose(lines(figures.pop().axes[0])["MAML"][1], [0.2])
    path.write_text(json.dumps([test | {"iteration": 9 - place} for place, test in enumerate(tests)]))
    command(monkeypatch, "updates", f"MAML={path}", "--update_lr=0.4", "--output", "figure")
    np.testing.assert_allclose(lines(figures.pop().axes[0])["MAML"][1], [0.1])


def test_too_many_labels_are_refused():
    with pytest.raises(InputError, match="6 labels"):
        plot.updates_figure({str(i): [entry(5, "mean squared error", [3, 0.6])] for i in range(6)})


def test_mixed_metrics_are_refused():
    tests = {"Sine": [entry(5, "mean squared error", [3, 0.6])], "Omniglot": [entry(5, "accuracy", [0.2, 0.9])]}
    with pytest.raises(InputError, match="Sine: mean squared error; Omniglot: accuracy"):
        plot.updates_figure(tests)


@pytest.mark.parametrize(
    ("inputs", "message"), [(["x.json"], "label=x.json"), (["a=x", "a=y"], "two labels are the same")]
)
def test_missing_and_duplicate_labels_are_refused(inputs, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "updates", *inputs, "--output", "figure")
    assert message in capsys.readouterr().err


def test_accuracy_axis_is_in_percent():
    figure = plot.updates_figure({"conv": [entry(1, "accuracy (share of query examples, 0 to 1)", [0.2, 0.95])]})
    (panel,) = figure.axes
    assert panel.get_ylabel() == "accuracy, %"
    np.testing.assert_allclose(lines(panel)["conv"][1], [0.2, 0.95])
    ticks = dict(zip(panel.get_yticks(), [label.get_text() for label in panel.get_yticklabels()], strict=True))
    assert (ticks[0.2], ticks[0.95], ticks[0.995]) == ("20", "95", "99.5")


def test_paper_accuracy_is_a_dashed_line_with_a_band(tmp_path, monkeypatch):
    """The file name, without its seed, selects the paper's row. Each K of the paper gets a line."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, *_: figures.append(figure))
    results = json.loads((ROOT / "results" / "omniglot_5way_1shot.json").read_text())
    path = tmp_path / "omniglot_5way_1shot.seed1.json"
    path.write_text(json.dumps(results))
    command(monkeypatch, "updates", f"conv={path}", "--output", "figure")
    for panel, mean, ci95 in zip(figures[0].axes, (0.987, 0.999), (0.004, 0.001), strict=True):
        (line,) = [line for line in panel.get_lines() if line.get_linestyle() == "--"]
        np.testing.assert_allclose(line.get_ydata(), [mean, mean])
        np.testing.assert_allclose([band.get_y() for band in panel.patches], [mean - ci95])
        np.testing.assert_allclose([band.get_height() for band in panel.patches], [2 * ci95])
    (path := tmp_path / "mine.json").write_text(json.dumps(results))
    command(monkeypatch, "updates", f"conv={path}", "--output", "figure")
    assert all(line.get_linestyle() == "-" for panel in figures[1].axes for line in panel.get_lines())


def test_logit_axis_separates_accuracies_near_100_percent():
    """95% to 99.9% takes at least a third of the axis. 100%, infinite on a logit scale, is outside it."""
    metric = "accuracy (share of query examples, 0 to 1)"
    (panel,) = plot.updates_figure({"conv": [entry(1, metric, [0.2, 0.95, 0.999, 1.0])]}).axes

    def height(accuracy):
        return panel.transData.transform((0, accuracy))[1]

    assert height(0.999) - height(0.95) > 0.33 * panel.bbox.height
    inside = [height(accuracy) for accuracy in (0.2, 0.5, 0.9, 0.995, 0.999)]
    assert panel.bbox.y0 <= inside[0] and inside == sorted(inside) and inside[-1] <= panel.bbox.y1 < height(1)


def test_task_figure_shows_images_and_predictions(omniglot_like, monkeypatch):
    """Uses the published Omniglot model on generated characters."""
    names, task, probabilities = plot.answered_task(OMNIGLOT, 2, 1, omniglot_like)
    assert len(names) == 5 and task.support_x.shape == (10, 28, 28, 1) and probabilities.shape == (25, 5)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert np.mean(task.query_x) > 0.5  # ink is dark
    true = task.query_y.argmax(1)
    assert np.mean(probabilities.argmax(1) == true) > 0.8
    probabilities[np.argmax(true == 1)] = [0, 0, 0.75, 0.25, 0]
    figure = plot.task_figure("Characters", names, task, probabilities)
    panels = [[panel for panel in figure.axes[8 * row : 8 * row + 8] if panel.images] for row in range(5)]
    assert [len(row) for row in panels] == [7] * 5  # 2 + 5, without the gap
    for label, row in enumerate(panels):
        assert row[0].get_ylabel() == "\n".join(["ABCDE"[label], *names[label].split("/")])
        of_class = np.concatenate([task.support_x[task.support_y.argmax(1) == label], task.query_x[true == label]])
        np.testing.assert_array_equal([panel.images[0].get_array() for panel in row], of_class[..., 0])
        for panel, predicted in zip(row[2:], probabilities[true == label], strict=True):
            guess = predicted.argmax()
            assert panel.get_xlabel() == f"{'ABCDE'[guess]}, {100 * predicted[guess]:.0f}%"
            assert panel.xaxis.label.get_color() == (plot.GREEN if guess == label else plot.ORANGE)
    assert panels[1][2].get_xlabel() == "C, 75%"


def predictions_table(path: Path, rows: list[str], classes: str = "a,b") -> Path:
    path.write_text("\n".join([f"image,class,probability,{classes}", *rows]) + "\n")
    return path


def test_confusions_are_counted_by_folder(tmp_path):
    """The folder may be at any depth, and one class name may be a suffix of another."""
    rows = ["u/b/1.png,b", "u/b/2.png,x/b", "u/x/b/1.png,x/b", "/u/x/b/2.png,x/b", "u/x/b/3.png,b"]
    path = predictions_table(tmp_path / "answers.csv", [f"{row},1,1,0" for row in rows], "b,x/b")
    names, counts = plot.confusions(path)
    assert names == ["b", "x/b"]
    np.testing.assert_array_equal(counts, [[1, 1], [1, 2]])
    (panel,) = plot.confusion_figure({"Letters": (names, counts)}).axes
    assert panel.get_title() == "Letters\n3 of 5 correct"
    cells = {tuple(map(int, text.get_position())): text.get_text() for text in panel.texts}
    assert cells == {(0, 0): "1", (1, 0): "1", (0, 1): "1", (1, 1): "2"}
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("predicted class", "true class")
    for labels in (panel.get_xticklabels(), panel.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["b", "x/b"]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_names_in_a_confusion_matrix_are_complete_inside_the_figure_and_apart(count):
    """Long ones are cut at their beginning, unless they would then be the same."""
    names = [f"Alphabet_of_the_Magi/character{number:02}" for number in range(count)]
    figure = plot.confusion_figure({"Letters": (names, np.eye(count, dtype=int)), "Short": (["a", "b"], np.eye(2))})
    figure.draw_without_rendering()
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        assert [label.get_text() for label in labels] == [f"…{name[-25:]}" for name in names]
        for label in labels:
            box = label.get_window_extent()
            assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    same = [f"{start}/photographs/of_the_same_place_in_1998" for start in ("north", "south")]
    (panel,) = plot.confusion_figure({"Places": (same, np.eye(2, dtype=int))}).axes
    assert [label.get_text() for label in panel.get_xticklabels()] == same


@pytest.mark.parametrize("labels", [("MAML", "Pretrained", "Oracle"), ("A fairly long label", "B", "C", "D", "E")])
def test_legend_is_inside_the_figure(labels):
    """The first entry was outside it, so that the second, of another color, looked like the first."""
    tests = {label: [entry(1, "accuracy", [0.2, 0.9])] for label in labels}
    figure = plot.updates_figure(tests, {labels[0]: {1: (90.0, 1.0)}})
    figure.draw_without_rendering()
    (box,) = figure.legends
    assert [text.get_text() for text in box.get_texts()] == [*labels, "paper, in the same color"]
    outline = box.get_window_extent()
    assert outline.x0 >= 0 and outline.x1 <= figure.bbox.x1 and outline.y1 <= figure.bbox.y1
    assert outline.y0 >= figure.axes[0].bbox.y1  # above the panel


def test_a_single_point_is_visible(tmp_path):
    """A run with one validation, after iteration 500, or with one summary. More points are a line."""
    (tmp_path / "flags.json").write_bytes((OMNIGLOT / "flags.json").read_bytes())
    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        for step in (0, 100):
            tf.summary.scalar("metatrain_Post-update_accuracy__step_1", 0.5, step=step)
        tf.summary.scalar("metatrain_Pre-update_accuracy", 0.2, step=0)
        tf.summary.scalar("metaval_Post-update_accuracy__step_1", 0.8, step=500)
    (panel,) = plot.training_figure({"Omniglot": tmp_path}).axes
    marked = {len(line.get_xdata()): line.get_marker() != "None" for line in panel.get_lines()}
    assert marked == {1: True, 2: False}
    assert sum(len(line.get_xdata()) == 1 for line in panel.get_lines()) == 3  # raw, smoothed, and validation


@pytest.mark.parametrize(
    ("rows", "classes", "message"),
    [
        (["1.png,a,1,1,0"], "a,b", "answers.csv: 1.png .*a, b"),
        (["u/ba/1.png,a,1,1,0"], "a,b", "answers.csv: u/ba/1.png"),
        (["a/1.png,c,1,1,0"], "a,b", "answers.csv"),
        (["a/1.png,a,1"], "a,b", "answers.csv"),
        (['"a'], "a,b", "answers.csv"),
    ],
)
def test_invalid_predictions_tables_are_refused(rows, classes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        plot.confusions(predictions_table(tmp_path / "answers.csv", rows, classes))


def test_training_figure_plots_the_events(tmp_path):
    """It adds a running mean over a twentieth of the run, and validation if the run has any."""
    (tmp_path / "flags.json").write_bytes((OMNIGLOT / "flags.json").read_bytes())
    training, steps = np.tile([0.5, 0.9], 30), np.arange(0, 6000, 100)
    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        for step, accuracy in zip(steps, training, strict=True):
            tf.summary.scalar("metatrain_Pre-update_accuracy", 0.2, step=step)
            tf.summary.scalar("metatrain_Post-update_accuracy__step_1", accuracy, step=step)
        for step in (0, 5000):
            tf.summary.scalar("metaval_Post-update_accuracy__step_1", 0.8, step=step)
    (panel,) = plot.training_figure({"Omniglot": tmp_path}).axes
    curves = lines(panel)
    before, after = (f"training, {data}" for data in ("support set before any update", "query set after 1 update"))
    assert {label for label in curves if label[0] != "_"} == {before, after, "validation, after 1 update"}
    np.testing.assert_allclose(curves[before][1], np.full(58, 0.2), rtol=1e-6)
    np.testing.assert_allclose(curves[after][0], steps[1:-1])
    np.testing.assert_allclose(curves[after][1], np.tile([1.9 / 3, 2.3 / 3], 29), rtol=1e-6)  # means of three values
    np.testing.assert_allclose(curves["validation, after 1 update"], [[0, 5000], [0.8, 0.8]], rtol=1e-6)
    ((_, unsmoothed),) = [line for label, line in curves.items() if label[0] == "_" and np.ptp(line[1]) > 0]
    np.testing.assert_allclose(unsmoothed, training, rtol=1e-6)
    assert (panel.get_title(), panel.get_ylabel()) == ("Omniglot", "accuracy, %")
    (panel,) = plot.training_figure({"Sine": RUN}).axes
    assert (panel.get_ylabel(), panel.get_yscale()) == ("mean squared error", "log")


def test_training_figure_plots_returns(tmp_path):
    """Of reinforcement learning. A run without an update in training has one curve."""
    for name, tags in (
        ("maml", ["Pre-update_return", "Post-update_return__step_1"]),
        ("oracle", ["Pre-update_return"]),
    ):
        with report.Events(tmp_path / name, 0) as events:
            for step in range(3):
                events.scalars(step, {f"metatrain_{tag}": -10.0 * (step + number) for number, tag in enumerate(tags)})
    panels = plot.training_figure({name: tmp_path / name for name in ("maml", "oracle")}).axes
    assert [panel.get_ylabel() for panel in panels] == ["return"] * 2
    curves = [{label: y for label, (_, y) in lines(panel).items() if label[0] != "_"} for panel in panels]
    np.testing.assert_allclose(curves[0]["training, after 1 update"], [-10, -20, -30])
    np.testing.assert_allclose(curves[1]["training, before any update"], [0, -10, -20])
    assert [len(curve) for curve in curves] == [2, 1]


def test_updates_figure_plots_returns(tmp_path):
    """From a run's results.json. Other records are refused in one line."""
    columns = [{"updates": j, "mean": -40 + 10 * j, "ci95": 1} for j in range(3)]
    record = {"flags": {"env": "point"}, "metric": "return, a sum", "results": columns}
    (tmp_path / "results.json").write_text(json.dumps(record))
    tests = plot._tests(tmp_path / "results.json", None)
    (panel,) = plot.updates_figure({"mine": tests}).axes
    ((x, y),) = lines(panel).values()
    np.testing.assert_array_equal([x, y], [[0, 1, 2], [-40, -30, -20]])
    assert (panel.get_title(), panel.get_ylabel(), panel.get_yscale()) == ("point", "return", "linear")
    for damaged in ({"flags": {}}, {"flags": 3}, {"results": [3]}, {"results": 3}):
        (tmp_path / "results.json").write_text(json.dumps(record | damaged))
        with pytest.raises(InputError, match=r"results\.json: "):
            plot._tests(tmp_path / "results.json", None)


def test_learned_step_sizes_are_not_replaced(monkeypatch):
    learned = recipe.Recipe(norm=None, learn_inner_lr="step")
    monkeypatch.setattr(plot.runs, "load", lambda folder: (learned, recipe.build(learned), None))
    with pytest.raises(InputError, match=r"--update_lr=0\.5"):
        plot.trained(RUN, update_lr=0.5)


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
        ("confusion", "Letters={table}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_writes_png_svg_and_pdf(arguments, tmp_path, monkeypatch):
    table = predictions_table(tmp_path / "answers.csv", ["u/a/1.png,a,0.9,0.9,0.1"])
    arguments = [argument.format(table=table) for argument in arguments]
    command(monkeypatch, *arguments, "--output", tmp_path / "new folder" / "v1.0")
    written = sorted((tmp_path / "new folder").iterdir())
    assert [path.name for path in written] == ["v1.0.pdf", "v1.0.png", "v1.0.svg"]
    assert written[0].read_bytes().startswith(b"%PDF-")
    with Image.open(written[1]) as image:
        assert image.width > 1200
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert "</svg>" in written[2].read_text()


def refusal(monkeypatch, capsys, *arguments: object) -> str:
    """Run the command, which must fail, and return its one line of error."""
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sinusoid", "MAML=nowhere"), "nowhere"),
        (("updates", f"MAML={RUN}/results.json", "--update_lr=0.5"), f"{RUN}/results.json"),
        (("updates", f"MAML={RUN}/results.json", "--update_lr=0"), f"{RUN}/results.json"),
        (("updates", f"MAML={RUN}"), str(RUN)),
        (("updates", "MAML=nowhere.json"), "nowhere.json"),
        (("sinusoid", f"MAML={RUN}/results.json"), f"{RUN}/results.json"),
        (("training", "empty=tests/data"), "tests/data"),
        (("training", f"MAML={RUN}", "--dpi=0"), "--dpi=0"),
        (("task", f"MAML={RUN}"), str(RUN)),
        (("task", f"Omniglot={OMNIGLOT}", "--data_path=nowhere"), "nowhere"),
        (("task", f"Omniglot={OMNIGLOT}", "--shots", "0"), "--shots=0"),
        (("confusion", "Letters=nowhere.csv"), "nowhere.csv"),
        (("confusion", "Letters=README.md"), "README.md"),
    ],
)
def test_errors_are_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert named in refusal(monkeypatch, capsys, *arguments, "--output", tmp_path / "figure")
    assert not list(tmp_path.iterdir())


ENTRY = {
    **{"split": "test", "support_examples_a_class_K": 5, "inner_step_size_alpha": 0.01, "metric": "mean squared error"},
    "results": [{"updates": 0, "mean": 1.0, "ci95": 0.1}],
}


@pytest.mark.parametrize(
    "entry",
    [
        *({}, ENTRY | {"results": [7]}, ENTRY | {"support_examples_a_class_K": "5"}, ENTRY | {"metric": ["x"]}),
        ENTRY | {"results": [{"updates": 0, "mean": 10**400, "ci95": 0.1}]},
        ENTRY | {"results": [{"updates": 0, "mean": 1.0, "ci95": None}]},
    ],
)
def test_untrusted_results_are_refused_by_path(entry, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([entry]))
    line = refusal(monkeypatch, capsys, "updates", f"theirs={path}", f"--output={tmp_path / 'figure'}")
    assert str(path) in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flags", [{"num_updates": 9}, {"num_updates": 10**9}, {"num_filters": [1]}], ids=str)
def test_untrusted_flags_are_refused_by_path(flags, tmp_path, monkeypatch, capsys):
    shutil.copytree(RUN, tmp_path, dirs_exist_ok=True)
    flags = json.loads((tmp_path / "flags.json").read_text()) | flags
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    line = refusal(monkeypatch, capsys, "training", f"theirs={tmp_path}", f"--output={tmp_path / 'figure'}")
    assert str(tmp_path) in line


def test_invalid_flags_and_unwritable_outputs_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    sinusoid = "sinusoid", f"MAML={RUN}", f"--output={tmp_path / 'figure'}"
    updates = "updates", f"$MAML_$={RUN}/results.json", "--update_lr=0.01"
    for arguments, named in (
        ((*sinusoid, "--shots", "5", "0"), "--shots=5 0"),
        ((*sinusoid, "--task=-1"), "--task=-1"),
        ((*sinusoid, "--update_lr=nan"), "--update_lr=nan"),
        ((*updates, f"--output={tmp_path}/file/figure"), f"{tmp_path}/file"),
        ((*updates, "--output=."), "--output=."),
    ):
        assert named in refusal(monkeypatch, capsys, *arguments)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "results.json").symlink_to(RUN / "results.json")
    command(monkeypatch, "updates", "MAML=~/results.json", "--update_lr=0.01", "--output=~/figure")
    assert (tmp_path / "figure.png").is_file()
