"""Complete runs of main.py on generated images: output, files, flags, resuming, errors."""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.api_pb2 import STATUS_RUNNING, STATUS_UNKNOWN, ListSessionGroupsRequest
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData as PluginData

import devices
import evaluate
import main
import maml as method
import networks
import plot
import recipe
import report
import runs
import train
from data_generator import ImageTasks, SinusoidTasks
from images import SPLITS
from maml import adapt, support_loss
from recipe import DATASETS
from report import Events
from tests.helpers import (
    NUMBER,
    PROGRAM,
    STEP_TIME,
    assert_same_ending,
    contents,
    curve_tags,
    end,
    events,
    maml_of,
    models,
    not_compiled,
    only_run,
    read_csv,
    read_pickle,
    refusal,
    run,
    saved_by,
    scalars,
    small_flags,
    spawn,
    start_main,
    tiny_networks,
    variables,
    without_start_up_lines,
)
from utils import Curve, Tasks, accuracy, mse, xent


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Use networks that are fast to trace. These tests are about the program, not the network."""
    with tiny_networks(), not_compiled():
        yield


PUBLISHED = json.loads((main.ROOT / "data" / "splits" / "omniglot.json").read_text())


# -- printed lines and files ------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    flags: list[str]
    folder: Path
    printed: list[str]


def finished(logdir: Path, *flags: str) -> Finished:
    flags = [f"--logdir={logdir}", *flags]
    printed = run(*flags).splitlines()
    return Finished(flags, only_run(logdir), printed)


@pytest.fixture(scope="module")
def sinusoid_run(tmp_path_factory) -> Finished:
    flags = "--pretrain_iterations=1100", "--metatrain_iterations=902", "--norm=None"
    return finished(tmp_path_factory.mktemp("sine"), *flags)


@pytest.fixture(scope="module")
def photo_run(miniimagenet_like, tmp_path_factory) -> Finished:
    """One step on a folder of photographs, at 16x16 pixels."""
    flags = "--datasource=folder", f"--data_path={miniimagenet_like}", "--image_size=16", "--num_filters=4"
    flags += "--meta_batch_size=1", "--update_batch_size=1", "--num_updates=1", "--metatrain_iterations=1"
    return finished(tmp_path_factory.mktemp("own"), *flags)


@pytest.fixture(scope="module")
def omniglot_run(omniglot, tmp_path_factory) -> Finished:
    flags = *small_flags(omniglot), "--metatrain_iterations=510", "--save_interval=500"
    return finished(tmp_path_factory.mktemp("omniglot5way"), *flags)


def printed_means(folder: Path, tags: tuple[str, str], steps: range) -> str:
    """Return the two tags' means over the summaries at these steps, formatted as in a printed line."""
    points = scalars(folder)
    return ", ".join(f"{np.mean([value for step, value in points[tag] if step in steps]):.6g}" for tag in tags)


def test_a_sinusoid_run_prints_mean_losses_every_1000_iterations(sinusoid_run):
    """Means since the last line. Pretraining iterations are numbered separately."""
    tags = "metatrain_Pre-update_loss", "metatrain_Post-update_loss__step_1"
    started = sinusoid_run.printed.index("Done initializing, starting training.")
    assert sinusoid_run.printed[started + 1 : -1] == [
        f"Pretrain Iteration 1000: {printed_means(sinusoid_run.folder, tags, range(0, 1001))}",
        f"Iteration 900: {printed_means(sinusoid_run.folder, tags, range(1001, 2001))}",
    ]
    for line in sinusoid_run.printed[started + 1 : -1]:
        assert re.fullmatch(rf"(Pretrain )?Iteration \d+: {NUMBER}, {NUMBER}", line)


def test_an_image_run_prints_accuracies(omniglot_run):
    """On training tasks every 100 iterations, on validation tasks every 500."""
    after = "Post-update_accuracy__step_1"
    train, val = (
        functools.partial(printed_means, omniglot_run.folder, (f"{prefix}_Pre-update_accuracy", f"{prefix}_{after}"))
        for prefix in ("metatrain", "metaval")
    )
    started = omniglot_run.printed.index("Done initializing, starting training.")
    assert omniglot_run.printed[started + 1 : -1] == [
        f"Iteration 100: {train(range(0, 101))}",
        *(f"Iteration {last}: {train(range(last, last + 1))}" for last in (200, 300, 400, 500)),
        f"Validation results: {val(range(500, 501))}",
        f"Done: 510 iterations, the last saved in {omniglot_run.folder / 'model509'}.",
    ]
    accuracy = scalars(omniglot_run.folder)[f"metaval_{after}"][0][1]
    assert omniglot_run.printed[-1] == f"Best on validation: model500, accuracy {accuracy:.6g} on 20 tasks."


def test_checkpoints_are_saved_every_1000_iterations_and_at_the_end(sinusoid_run, omniglot_run):
    assert models(sinusoid_run.folder) == ["model1000", "model2000", "model2001"]
    assert models(omniglot_run.folder) == ["model500", "model509"]  # --save_interval=500


def summaries(tag: str, last: int) -> list[int]:
    """Return a tag's iterations in a run with J = 1: every 100, or every 1,000 for more than J updates."""
    return list(range(0, last + 1, 1000 if re.search("__step_([2-9]|10)$", tag) else 100))


def test_a_sinusoid_runs_events(sinusoid_run):
    """They include iteration 0 and pretraining, but neither accuracies nor validation."""
    written = events(sinusoid_run.folder, "scalars")
    assert written.keys() == curve_tags("metatrain", ("loss",), 5) | {"train/gradient_norm", STEP_TIME}
    for tag, points in written.items():
        compiled = {0} if tag == STEP_TIME else set()  # at 1100 there are the times of the 99 steps before
        assert [step for step, _ in points] == [step for step in summaries(tag, 2001) if step not in compiled]
    assert all(milliseconds > 0 for _, milliseconds in written[STEP_TIME])
    ((step, text),) = events(sinusoid_run.folder, "text")["flags"]
    assert step == 0
    for line in ("| --pretrain_iterations | 1100 |", "| --norm | None |", "| --update_lr | 0.001 |"):
        assert line in text.item().decode()
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= events(sinusoid_run.folder, "hparams").keys()
    assert [step for step, _ in events(sinusoid_run.folder, "images")["test/task"]] == [2001]  # drawn by plot.py


def test_an_image_runs_events(omniglot_run):
    written = scalars(omniglot_run.folder)
    train = curve_tags("metatrain", ("loss", "accuracy"), 10) | {"train/gradient_norm"}
    ours = {"Pre-update_mean_loss", "Post-update_mean_loss__step_1"}
    train |= {f"train/{tag}" for tag in ours}
    assert written.keys() == train | curve_tags("metaval", ("loss", "accuracy"), 1) | {
        f"validation/{tag}" for tag in ours
    }
    for tag, points in written.items():
        assert [step for step, _ in points] == (summaries(tag, 509) if tag in train else [500])
    # 5-way 1-shot: the loss is a sum over 5 support, or 5 query, examples.
    for tag in ("metaval_Pre-update_{}", "metaval_Post-update_{}__step_1"):
        ours = tag.format("mean_loss").replace("metaval_", "validation/")
        assert written[ours][0][1] == pytest.approx(written[tag.format("loss")][0][1] / 5)
    pictures = events(omniglot_run.folder, "images")["validation/task"]
    assert [step for step, _ in pictures] == [0, 500, 509]  # the first and last iteration, and the best validation
    for _, picture in pictures:
        assert tf.io.decode_png(picture[2]).shape[0] > 5 * 88  # a row per class


def test_tensorboards_custom_charts_and_hparams_table(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """Every chart finds its curves. The table has a row with the folder's name and the test's result."""
    for run_folder, curves in ((omniglot_run, 4), (sinusoid_run, 2)):
        copy = tmp_path / run_folder.folder.name
        shutil.copytree(run_folder.folder, copy)
        ((_, layout),) = events(copy, "custom_scalars")["custom_scalars__config__"]
        (category,) = layout_pb2.Layout.FromString(layout.item()).category
        tags = events(copy, "scalars")
        charted = [[tag for tag in tags if re.match(chart.multiline.tag[0], tag)] for chart in category.chart]
        assert [len(chart) for chart in charted] == ([curves] if curves == 4 else []) + [curves, 1, 1]
        logdir = next(flag for flag in run_folder.flags if flag.startswith("--logdir="))
        flags = [flag for flag in run_folder.flags if flag != logdir]
        run(*flags, f"--logdir={tmp_path}", "--train=False", "--test_set=True")
        metric = "accuracy" if curves == 4 else "loss"
        (entry,) = json.loads((copy / "results.json").read_text())
        ((_, value),) = events(copy / "test", "scalars")[f"test/{metric}"]
        assert value.item() == pytest.approx(entry["results"][3 if curves == 4 else 10]["mean"], rel=1e-6)
        context = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
        context.Reload()
        sessions = PluginData.FromString(
            context.SummaryMetadata(copy.name, "_hparams_/session_start_info").plugin_data.content
        )
        assert sessions.session_start_info.group_name == ""  # TensorBoard then uses the run's path
        plugin = context.SummaryMetadata(copy.name, "_hparams_/experiment").plugin_data
        columns = PluginData.FromString(plugin.content).experiment
        run_tags = set(tags) | {f"test/{metric}"}
        displayed = [info.display_name for info in columns.metric_infos if info.name.tag in run_tags]
        accuracies = ["test accuracy", "validation accuracy", "training accuracy"]
        losses = ["training loss"] if curves == 4 else ["test loss (sinusoid)", "training loss"]
        assert displayed == (accuracies if curves == 4 else []) + losses
        first = {info.name for info in columns.hparam_infos if info.differs}
        assert first == {"datasource", "num_classes", "update_batch_size", "update_lr", "num_updates"}


def test_tensorboards_hparams_table_has_a_row_per_run(tmp_path):
    """Also for runs of one name in different log directories."""
    for logdir, value in (("a", 0.661), ("b", 0.995)):
        with Events(tmp_path / logdir / "cls_5", 0) as events:
            events.overview(0, recipe.Recipe())
        report.test_scalar(tmp_path / logdir / "cls_5", 0, "loss", value)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    table = Context(TBContext(data_provider=provider))
    request = ListSessionGroupsRequest(allowed_statuses=[STATUS_UNKNOWN, STATUS_RUNNING], slice_size=9)
    groups = Handler(RequestContext(), table, "", request).run().session_groups
    assert [group.name for group in groups] == ["a/cls_5", "b/cls_5"]
    values = [[value.value for value in group.metric_values if value.name.tag == "test/loss"] for group in groups]
    assert values == [[pytest.approx(0.661)], [pytest.approx(0.995)]]


def test_a_summary_has_the_norm_of_its_iterations_meta_gradient(uninterrupted):
    maml = maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1)
    runs.Run(uninterrupted.folder).restore(maml, str(uninterrupted.folder / "model299"))
    tasks = SinusoidTasks(5, 5).draw(0, "train", 25 * 300, 25)
    loss = functools.partial(support_loss, maml.inner)
    gradient, _ = method.meta_gradient(loss, maml.values(), tasks, maml.layout)  # iteration 300 of 330 in pretraining
    norm = np.sqrt(sum(np.sum(np.square(part)) for part in gradient.values()))
    assert dict(scalars(uninterrupted.folder)["train/gradient_norm"])[300] == pytest.approx(norm, rel=1e-4)


def evaluated(run: Finished, model: str, split: str, shot: int, inner_lr: float, count: int, steps: int) -> Curve:
    """Return the curves of tasks 0 .. count - 1 of the small Omniglot, computed without main."""
    (folder,) = (Path(flag.split("=")[1]) for flag in run.flags if flag.startswith("--data_path="))
    tasks = ImageTasks.from_folder(DATASETS["omniglot"].images, folder, (split,), 5, shot, shot).draw(
        0, split, 0, count
    )
    return evaluated_on(tasks, run, model, shot, inner_lr, steps)


def evaluated_on(tasks, run: Finished, model: str, shot: int, inner_lr: float, steps: int) -> Curve:
    network = networks.NETWORKS["omniglot"]((28, 28, 1), 5, "batch_norm", 4, False)
    maml = maml_of(network, functools.partial(xent, shot=shot), accuracy, inner_lr=inner_lr, inner_steps=1)
    runs.Run(run.folder).restore(maml, str(run.folder / model))
    return maml.evaluate(tasks, steps)


def test_validation_evaluates_the_saved_state_on_val_tasks(omniglot_run):
    """With --val_tasks=20, always the same tasks, and the weights of model500."""
    curve = evaluated(omniglot_run, "model500", "val", shot=1, inner_lr=0.4, count=20, steps=1)
    written = {tag: points[0][1] for tag, points in scalars(omniglot_run.folder).items() if tag.startswith("metaval_")}
    for metric, values in (("loss", curve.losses), ("accuracy", curve.accuracies)):
        means = [written[f"metaval_Pre-update_{metric}"], written[f"metaval_Post-update_{metric}__step_1"]]
        np.testing.assert_allclose(means, np.mean(values, 0), rtol=1e-4)


def test_results_of_each_split_have_their_own_files(sinusoid_run, tmp_path):
    """On 600 tasks each. With --results_dir, the run folder does not change."""
    before = contents(sinusoid_run.folder)
    results = tmp_path / "a" / "b"
    flags = *sinusoid_run.flags, "--train=False", f"--results_dir={results}"
    run(*flags)
    run(*flags, "--test_set=True")
    assert sorted(path.name for path in results.iterdir()) == [
        "results.json",
        *("test_ubs5_stepsize0.001.csv", "test_ubs5_stepsize0.001.pkl"),
        *("val_ubs5_stepsize0.001.csv", "val_ubs5_stepsize0.001.pkl"),
    ]
    assert contents(sinusoid_run.folder) == before
    val, test = (read_pickle(results / f"{split}_ubs5_stepsize0.001.pkl") for split in ("val", "test"))
    assert val.shape == test.shape == (600, 11)
    assert not np.array_equal(val, test)
    entries = json.loads((results / "results.json").read_text())
    assert [(entry["split"], entry["tasks"]) for entry in entries] == [("val", 600), ("test", 600)]

    printed = run(*flags, "--test_set=True", "--num_query=3")  # different tasks, so a different file
    assert str(results / "test_ubs5_stepsize0.001_query3.csv") in printed
    assert not np.array_equal(read_pickle(results / "test_ubs5_stepsize0.001_query3.pkl"), test)
    np.testing.assert_array_equal(read_pickle(results / "test_ubs5_stepsize0.001.pkl"), test)


def test_the_test_may_use_a_different_shot_and_step_size(omniglot_run, few_test_tasks, tmp_path):
    """The file's name has the test's K and alpha; the folder's name has those of training."""
    flags = [flag for flag in omniglot_run.flags if not flag.startswith("--update_")]
    flags += ["--train=False", "--test_set=True", f"--results_dir={tmp_path}"]
    flags += ["--update_batch_size=5", "--train_update_batch_size=1", "--update_lr=0.1", "--train_update_lr=0.4"]
    run(*flags)
    values = read_pickle(tmp_path / "test_ubs5_stepsize0.1.pkl")

    curve = evaluated(omniglot_run, "model509", "test", shot=5, inner_lr=0.1, count=4, steps=10)
    np.testing.assert_allclose(values, curve.accuracies, atol=1e-6)
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert (entry["support_examples_a_class_K"], entry["query_examples_a_class_Q"]) == (5, 5)
    assert entry["inner_step_size_alpha"] == 0.1


@pytest.mark.usefixtures("generated_are_published")
def test_test_updates_sets_the_number_of_updates(omniglot_run, few_test_tasks, tmp_path):
    flags = *omniglot_run.flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path}"
    for more in (["--test_updates=2"], [], ["--test_updates=12"]):
        run(*flags, *more)
    default, few, many = (
        read_pickle(tmp_path / f"test_ubs1_stepsize0.4{name}.pkl") for name in ("", "_updates2", "_updates12")
    )
    assert (default.shape[1], few.shape[1], many.shape[1]) == (11, 3, 13)
    np.testing.assert_allclose(few, default[:, :3], atol=1e-6)
    np.testing.assert_allclose(many[:, :11], default, atol=1e-6)
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [entry.get("updates_at_test") for entry in entries] == [2, None, 12]
    marked = [[column["updates"] for column in entry["results"] if column["the_papers_number"]] for entry in entries]
    assert marked == [[], [3], [3]]
    assert "--test_updates=0" in refusal(*flags, "--test_updates=0")


@pytest.mark.usefixtures("generated_are_published")
def test_a_test_with_fewer_classes_uses_the_first_outputs(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """No column is then the paper's."""
    flags = *omniglot_run.flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path}"
    run(*flags, "--test_num_classes=3")
    values = read_pickle(tmp_path / "test_ubs1_stepsize0.4_classes3.pkl")

    data = Path(omniglot_run.flags[2].removeprefix("--data_path="))
    tasks = ImageTasks.from_folder(DATASETS["omniglot"].images, data, ("test",), 3, 1, 1).draw(0, "test", 0, 4)
    network = networks.NETWORKS["omniglot"]((28, 28, 1), 3, "batch_norm", 4, False)
    maml = maml_of(network, functools.partial(xent, shot=1), accuracy, inner_lr=0.4, inner_steps=1)
    reader = tf.train.load_checkpoint(str(omniglot_run.folder / "model509"))
    for name, key in network.tf1_names.items():
        value = reader.get_tensor(key)
        maml.weights[name].assign(value[..., :3] if name in network.head else value)
    np.testing.assert_allclose(values, maml.evaluate(tasks, 10).accuracies, atol=1e-6)

    run(*flags, "--test_num_classes=5")
    few, five = json.loads((tmp_path / "results.json").read_text())
    assert (few["classes_N"], few["classes_N_in_training"], five["classes_N"]) == (3, 5, 5)
    assert "classes_N_in_training" not in five
    marked = [
        [column["updates"] for column in entry["results"] if column["the_papers_number"]] for entry in (few, five)
    ]
    assert marked == [[], [3]]
    assert "--test_num_classes=6: " in refusal(*flags, "--test_num_classes=6")
    assert "--test_num_classes: " in refusal(*sinusoid_run.flags, "--train=False", "--test_num_classes=3")


def test_query_shares_draws_uneven_numbers_of_queries(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """Without --num_query, a task has 75 queries. A class of 20 drawings is too small for that."""
    flags = *omniglot_run.flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path}"
    flags += ("--query_shares=dirichlet",)
    assert "--num_query" in refusal(*flags)
    run(*flags, "--num_query=3")
    values = read_pickle(tmp_path / "test_ubs1_stepsize0.4_query3_querysharesdirichlet.pkl")
    data = Path(omniglot_run.flags[2].removeprefix("--data_path="))
    images = DATASETS["omniglot"].images
    tasks = ImageTasks.from_folder(images, data, ("test",), 5, 1, 3, "dirichlet").draw(0, "test", 0, 4)
    assert {tuple(sorted(counts)) for counts in tasks.query_y.sum(1)} != {(3, 3, 3, 3, 3)}
    curve = evaluated_on(tasks, omniglot_run, "model509", shot=1, inner_lr=0.4, steps=10)
    np.testing.assert_allclose(values, curve.accuracies, atol=1e-6)
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert (entry["query_shares"], entry["query_examples_a_class_Q"]) == ("dirichlet", 3)
    assert "--query_shares" in refusal(*sinusoid_run.flags, "--train=False", "--query_shares=dirichlet")


def test_two_models_have_separate_entries_in_one_results_dir(sinusoid_run, uninterrupted, few_test_tasks, tmp_path):
    """Even with identical protocols."""
    for tested in (sinusoid_run, uninterrupted, sinusoid_run):
        run(*tested.flags, "--train=False", f"--results_dir={tmp_path}")
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [entry["run"] for entry in entries] == [uninterrupted.folder.name, sinusoid_run.folder.name]


def test_two_runs_of_one_name_have_separate_results(photo_run, miniimagenet_like, few_test_tasks, tmp_path):
    """They were trained on different folders of images and are tested on a third data set."""
    moved = shutil.copytree(miniimagenet_like, tmp_path / "moved")
    other = finished(tmp_path / "logs", *photo_run.flags[1:], f"--data_path={moved}")
    assert other.folder.name == photo_run.folder.name
    for tested in (photo_run, other, photo_run):
        flags = (
            "--test_datasource=cub",
            f"--test_data_path={miniimagenet_like}",
            f"--results_dir={tmp_path / 'results'}",
        )
        run(*tested.flags, "--train=False", "--test_set=True", *flags)
    entries = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [entry["trained_on_folder"] for entry in entries] == [str(moved), str(miniimagenet_like)]
    assert len(list((tmp_path / "results").glob("test_ubs1_stepsize0.01_cub_trained-*.csv"))) == 2


def test_classes_in_two_splits_are_reported(photo_run, photos, few_test_tasks, tmp_path):
    """In training and in a test, which records them; also after the training classes have changed."""
    shutil.rmtree(photos / "val")
    shutil.copytree(photos / "train", photos / "val")
    for place in range(2):
        (photos / "test" / f"n{12 + place:08}").rename(photos / "test" / f"n{place:08}")
    flags = *photo_run.flags[:2], f"--data_path={photos}", *photo_run.flags[3:], f"--logdir={tmp_path / 'logs'}"
    ended = start_main(*flags)
    assert re.search("WARNING: 6 of the 6 val .*n00000000", ended.err)
    assert ended.code == 0
    folder = only_run(tmp_path / "logs")
    classes = {f"n{label:08}": 24 for label in range(6)}
    recorded = json.loads((folder / "classes.json").read_text())
    assert runs.CHANGED not in recorded
    assert recorded == {
        "train": classes,
        "val": classes,
        "test": {path.name: 24 for path in (photos / "test").iterdir()},
    }

    (photos / "train" / "n00000000").rename(photos / "train" / "renamed")
    ended = start_main(*flags, "--metatrain_iterations=2")
    assert re.search(rf"WARNING: {re.escape(str(folder))}: 1 of its 6 .*\b1 are new", ended.err)
    assert re.search("WARNING: 6 of the 6 val .*n00000000", ended.err)  # including the class renamed since
    assert ended.code == 0
    changed = start_main(*flags, "--metatrain_iterations=3").err
    assert re.search(rf"WARNING: {re.escape(str(folder))}: 1 of its 7 .*\b0 are new", changed)
    assert json.loads((folder / "classes.json").read_text())["train"] == classes | {"renamed": 24}

    ended = start_main(*flags, "--metatrain_iterations=3", "--train=False", "--test_set=True")
    assert re.search("WARNING: 2 of the 6 test .*n00000000", ended.err)
    (entry,) = json.loads((folder / "results.json").read_text())
    assert entry["classes_also_trained_on"] == 2


def table(printed: str) -> list[tuple[int, list[float]]]:
    """Return the table that a test prints: a row of mean, interval and median for each number of updates."""
    found = re.findall(r"^ +(\d+)-?(\d*) +(\S+) \+- +(\S+) +(\S+) +(?:query|support) set", printed, re.MULTILINE)
    return [(j, [*map(float, row)]) for first, last, *row in found for j in range(int(first), int(last or first) + 1)]


@pytest.mark.parametrize(
    ("accuracies", "printed_rows"),
    [([0.2, 0.5, 0.5, 0.7, 0.7, 0.7], 4), ([0.2, 0.2], 2), ([0.2, 0.3, 0.7, 0.3], 4), ([0.5], 1)],
)
def test_a_table_ends_where_its_rows_stop_changing(accuracies, printed_rows, capsys):
    """Only the last rows are joined. The support set's row stays on its own."""
    evaluate._print_table(np.array([accuracies, accuracies]), "accuracy", evaluate.Protocol("val", 1, 0.1, tasks=2))
    printed = capsys.readouterr().out
    assert [(j, row[0]) for j, row in table(printed)] == list(enumerate(accuracies))
    assert printed.count(" set") == printed_rows


@pytest.mark.usefixtures("generated_are_published")
def test_a_test_prints_a_table_and_the_papers_column(omniglot_run, photo_run, few_test_tasks, tmp_path):
    """The table has a line per update. The paper's column is printed only for the paper's data sets."""
    flags = "--train=False", "--test_set=True", f"--results_dir={tmp_path}"
    printed = run(*omniglot_run.flags, *flags)
    rows = table(printed)
    _, (means, _, ci95) = read_csv(tmp_path / "test_ubs1_stepsize0.4.csv")
    median = np.median(read_pickle(tmp_path / "test_ubs1_stepsize0.4.pkl"), 0)
    assert [update for update, _ in rows] == list(range(11))
    np.testing.assert_allclose(np.transpose([row for _, row in rows]), [means, ci95, median], rtol=1e-2, atol=1e-4)
    assert printed.index("updates  ") < printed.index("Mean validation accuracy/loss")
    assert "test tasks\n\nupdates" in printed
    assert "validation tasks\n\nupdates" in run(*omniglot_run.flags, "--train=False", f"--results_dir={tmp_path}")
    assert "The paper's column, update3: accuracy" in printed
    assert "The paper's column" not in run(*photo_run.flags, *flags)
    photos = photo_run.flags[2].removeprefix("--data_path=")
    cross = "--test_datasource=miniimagenet", f"--test_data_path={photos}"
    assert "The paper's column" not in run(*omniglot_run.flags, *flags, *cross)


def marked(printed: str, results: Path) -> bool:
    """Return whether a test marks a column as the paper's: in print and in results.json, or in neither."""
    *_, entry = json.loads((results / "results.json").read_text())
    marks = {column["the_papers_number"] for column in entry["results"]}
    assert marks == ({True, False} if "The paper's column" in printed else {False})
    return True in marks


def test_a_column_is_the_papers_only_with_its_split(omniglot_run, few_test_tasks, request, tmp_path):
    """Training and test classes must be all of the published ones: here 20 per split, and later 1,100 and 423."""
    tested = *omniglot_run.flags, "--train=False", f"--results_dir={tmp_path / 'results'}"

    def is_marked(*flags) -> bool:
        return marked(start_main(*tested, "--test_set=True", *flags).out, tmp_path / "results")

    assert not is_marked()
    request.getfixturevalue("generated_are_published")
    assert is_marked()
    assert not marked(run(*tested), tmp_path / "results")  # the validation classes
    # Other training classes.
    copy = shutil.copytree(omniglot_run.folder, tmp_path / "runs" / omniglot_run.folder.name)
    names = [*json.loads((copy / "classes.json").read_text())["train"]]
    for trained, whether in ((names[1:], False), ([*names, "another"], False), ([f"a/b/{n}" for n in names], True)):
        (copy / "classes.json").write_text(json.dumps(trained))
        assert is_marked(f"--logdir={copy.parent}") == whether
    (copy / "classes.json").unlink()  # as in the published models
    assert is_marked(f"--logdir={copy.parent}")
    # Training classes that changed meanwhile, other numbers of images, and a choice of the checkpoint on test classes.
    train, val, test = (dict.fromkeys(PUBLISHED[split][:20], 20) for split in SPLITS)
    whole = {"train": train, "val": val}
    for record, whether in (
        (whole, True),
        (whole | {"val": test}, False),
        (whole | {"train": dict.fromkeys(train, 19)}, False),
        (whole | {runs.CHANGED: {names[0]: None}}, False),
    ):
        (copy / "classes.json").write_text(json.dumps(record))
        assert is_marked(f"--logdir={copy.parent}", "--test_iter=best") == whether
    # One test class less, one that is not published, and one that was trained on.
    folder = Path(omniglot_run.flags[2].removeprefix("--data_path="))
    published = PUBLISHED
    for left_out, added in ((1, None), (0, "Klingon/character01"), (1, "Klingon/character01")):
        data = tmp_path / f"{left_out}{added is not None}"
        for name in [*published["train"][:20], *published["val"][:20], *published["test"][left_out:20]]:
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).symlink_to(folder / name)
        if added:
            (data / added).parent.mkdir()
            (data / added).symlink_to(folder / published["test"][0])
        assert not is_marked(f"--data_path={data}")
    # The same classes with fewer images.
    data = shutil.copytree(folder, tmp_path / "fewer")
    for file in (data / published["test"][0]).glob("0[5-9].png"):
        file.unlink()
    assert not is_marked(f"--data_path={data}")


def test_training_classes_below_other_folders_are_recognized(photo_run, photos, few_test_tasks, tmp_path):
    """In a test of a run of one's own images, whose classes have no published names."""
    copy = shutil.copytree(photo_run.folder, tmp_path / "run")
    (copy / "classes.json").write_text(json.dumps({"train": {"birds/n00000012": 24, "n00000013": 24}}))
    (photos / "test" / "fish").mkdir()
    (photos / "test" / "n00000013").rename(photos / "test" / "fish" / "n00000013")
    ended = start_main(f"--run={copy}", "--train=False", "--test_set=True", f"--data_path={photos}")
    assert "WARNING: 2 of the 6 test classes" in ended.err


def test_a_run_without_a_record_warns_of_published_training_classes(omniglot_run, few_test_tasks, tmp_path):
    """Also if they are in other folders, of a data set without a published split."""
    copy = shutil.copytree(omniglot_run.folder, tmp_path / "runs" / omniglot_run.folder.name)
    (copy / "classes.json").unlink()
    published = json.loads((main.ROOT / "data" / "splits" / "omniglot.json").read_text())
    folder = Path(omniglot_run.flags[2].removeprefix("--data_path="))
    for name in [*published["train"][:3], *published["test"][:4]]:
        place = tmp_path / "data" / "images_background" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder / name)
    flags = f"--run={copy}", "--train=False", "--test_set=True", "--test_datasource=folder", "--split=0,0,7"
    ended = start_main(*flags, f"--test_data_path={tmp_path / 'data'}")
    assert ended.code == 0
    assert "WARNING: 3 of the 7 test classes" in ended.err
    (entry,) = json.loads((copy / "results.json").read_text())
    assert entry["classes_also_trained_on"] == 3


def test_unrecorded_training_classes_are_the_published_ones_unless_the_run_was_split(tmp_path):
    """The released model has no flags.json, so --split is only of its test."""
    recipe_of_run, run_of = recipe.Recipe(data_set="miniimagenet", split="64,16,20"), runs.Run(tmp_path)
    trained = evaluate.trained_classes(recipe_of_run, run_of)
    assert len(trained) == 64 and "n01532829" in trained
    (tmp_path / "flags.json").write_text("{}")
    assert evaluate.trained_classes(recipe_of_run, run_of) == set()
    assert len(evaluate.trained_classes(dataclasses.replace(recipe_of_run, split=None), run_of)) == 64


def test_the_warning_of_trained_classes_compares_unicode_forms(photo_run, photos, few_test_tasks, tmp_path):
    copy = shutil.copytree(photo_run.folder, tmp_path / "run")
    (copy / "classes.json").write_text(json.dumps(["cafe\u0301"]))
    (photos / "test" / "n00000012").rename(photos / "test" / "caf\u00e9")
    ended = start_main(f"--run={copy}", "--train=False", "--test_set=True", f"--data_path={photos}")
    assert "WARNING: 1 of the 6 test classes" in ended.err


@pytest.mark.parametrize("flag", ["run", "logdir", "data_path", "test_data_path", "results_dir"])
def test_the_home_folder_is_expanded_in_every_path(flag, monkeypatch, tmp_path):
    """Shells leave ~ in --flag=~/folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for text, path in (("~/a", str(tmp_path / "a")), ("~", str(tmp_path)), ("a~", "a~"), ("a/~/b", "a/~/b")):
        assert main.parsed([f"--{flag}={text}"])[flag].value == path
        assert main.parsed([f"--{flag}", text])[flag].value == path


def test_a_run_at_home_is_trained_and_tested(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    run("--logdir=~/logs", "--metatrain_iterations=1", "--meta_batch_size=1")
    (folder,) = (tmp_path / "logs").iterdir()
    run(f"--run=~/logs/{folder.name}", "--train=False", "--test_tasks=2", "--results_dir=~/results")
    assert (tmp_path / "results" / "results.json").is_file()


def test_an_omniglot_model_is_tested_on_photographs(omniglot_run, miniimagenet_like, tmp_path):
    """They are read like the model's own images: 28x28, gray and inverted.

    Every setting not at its default is in the file names and in results.json.
    """
    flags = *omniglot_run.flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path / 'results'}"
    flags += "--test_datasource=folder", "--split=0,0,6", "--test_tasks=6", "--eval_seed=3", "--num_query=2"
    written = []
    for folder, split in ((tmp_path / "a" / "images", "train"), (tmp_path / "b" / "images", "test")):
        shutil.copytree(miniimagenet_like / split, folder)
        printed = run(*flags, f"--test_data_path={folder}")
        assert f"Images of {folder}, read as 28x28x1: test 6 classes, 144 images.\n" in printed
        written += re.findall(r"^Written: (.*)\.csv, ", printed, re.MULTILINE)
    name = re.escape(str(tmp_path / "results" / "test_ubs1_stepsize0.4_folder-images-"))
    for path in written:
        assert re.fullmatch(rf"{name}[0-9a-f]{{8}}_split0,0,6_query2_tasks6_evalseed3", path)
    assert written[0] != written[1]

    images = DATASETS["folder"].images._replace(size=(28, 28), channels=1, invert=True, split_sizes=(0, 0, 6))
    tasks = ImageTasks.from_folder(images, tmp_path / "a" / "images", ("test",), 5, 1, 2).draw(3, "test", 0, 6)
    curve = evaluated_on(tasks, omniglot_run, "model509", shot=1, inner_lr=0.4, steps=10)
    np.testing.assert_allclose(read_pickle(Path(f"{written[0]}.pkl")), curve.accuracies, atol=1e-6)
    entries = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [entry["data_folder"] for entry in entries] == [
        str(tmp_path / "a" / "images"),
        str(tmp_path / "b" / "images"),
    ]
    for entry in entries:
        assert (entry["data_set"], entry["trained_on"]) == ("folder", "omniglot")
        assert (entry["tasks"], entry["task_seed"], entry["query_examples_a_class_Q"]) == (6, 3, 2)


def test_query_norm_support_classifies_each_query_alone(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """The result for one query image does not depend on the others. The result files record the setting."""
    flags = *omniglot_run.flags, "--train=False", "--test_set=True", "--num_query=2", f"--results_dir={tmp_path}"
    run(*flags, "--query_norm=support")
    values = read_pickle(tmp_path / "test_ubs1_stepsize0.4_query2_querynormsupport.pkl")
    data = Path(omniglot_run.flags[2].removeprefix("--data_path="))
    tasks = ImageTasks.from_folder(DATASETS["omniglot"].images, data, ("test",), 5, 1, 2).draw(0, "test", 0, 4)
    network = networks.NETWORKS["omniglot"]((28, 28, 1), 5, "batch_norm", 4, False)
    maml = maml_of(network, functools.partial(xent, shot=1), accuracy, inner_lr=0.4, inner_steps=1)
    runs.Run(omniglot_run.folder).restore(maml, str(omniglot_run.folder / "model509"))
    for t in range(4):
        task = Tasks(*(part[t] for part in tasks))
        after = adapt(maml.inner, maml.values(), task, 1)
        alone = [
            maml.inner.network.apply(after, np.concatenate([task.support_x, image[None]]))[-1].numpy().argmax()
            for image in task.query_x
        ]
        assert values[t, 1] == pytest.approx(np.mean(alone == task.query_y.argmax(1)))
    run(*flags)
    support, batch = json.loads((tmp_path / "results.json").read_text())
    assert (support["transductive"], support["query_normalised_with"]) == (False, "support")
    assert batch["transductive"] and "query_normalised_with" not in batch
    assert "--query_norm=support" in refusal(*sinusoid_run.flags, "--train=False", "--query_norm=support")


def test_a_photograph_model_is_tested_on_omniglot(omniglot, photo_run, few_test_tasks):
    """Its tasks keep their rotations and are read like photographs: in color, with paper as 1."""
    flags = *photo_run.flags, "--train=False", "--test_datasource=omniglot", f"--test_data_path={omniglot}"
    assert f"Images of {omniglot}, read as 16x16x3: val " in run(*flags)
    images = DATASETS["omniglot"].images._replace(size=(16, 16), channels=3, invert=False, any_size=True)
    network = networks.NETWORKS["miniimagenet"]((16, 16, 3), 5, "batch_norm", 4, True)
    maml = maml_of(network, functools.partial(xent, shot=1), accuracy, inner_lr=0.01, inner_steps=1)
    runs.Run(photo_run.folder).restore(maml, str(photo_run.folder / "model0"))
    tasks = ImageTasks.from_folder(images, omniglot, ("val",), 5, 1, 1).draw(0, "val", 0, 4)
    (path,) = photo_run.folder.glob("val_ubs1_stepsize0.01_omniglot_trained-*.pkl")
    np.testing.assert_allclose(read_pickle(path), maml.evaluate(tasks, 10).accuracies, atol=1e-6)


def test_test_iter_chooses_the_checkpoint(sinusoid_run, few_test_tasks, tmp_path):
    means = {}
    for iteration in (1000, 2001, -1):
        results = tmp_path / str(iteration)
        flags = "--train=False", "--test_set=True", f"--test_iter={iteration}", f"--results_dir={results}"
        assert f"model{2001 if iteration == -1 else iteration}\n" in run(*sinusoid_run.flags, *flags)
        means[iteration] = read_csv(results / "test_ubs5_stepsize0.001.csv")[1][0]
    np.testing.assert_array_equal(means[2001], means[-1])  # on the same tasks
    assert not np.array_equal(means[1000], means[-1])


def test_test_iter_best_chooses_the_best_on_validation(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """results.json has the checkpoint and its validation accuracy."""
    for name in ("best", "-1"):
        run(*omniglot_run.flags, "--train=False", f"--test_iter={name}", f"--results_dir={tmp_path}")
    accuracy = scalars(omniglot_run.folder)["metaval_Post-update_accuracy__step_1"][0][1]
    names = "checkpoint", "iteration", "best_on_validation", "validation_accuracy", "validation_tasks"
    best, latest = ([entry[name] for name in names] for entry in json.loads((tmp_path / "results.json").read_text()))
    assert best == ["model500", 500, True, pytest.approx(accuracy, abs=1e-6), 20]
    assert latest == ["model509", 509, False, None, None]
    assert "--test_iter=best" in refusal(*sinusoid_run.flags, "--train=False", "--test_iter=best")


ORIGINAL = {"meta_batch_size": 25, "update_lr": 0.001, "num_updates": 1, "num_filters": 64, "max_pool": False}
PHOTOGRAPHS = {"meta_batch_size": 4, "update_lr": 0.01, "num_updates": 5, "num_filters": 32, "max_pool": True}


@pytest.mark.parametrize("name", DATASETS)
def test_flags_override_the_data_sets_defaults_which_override_the_originals(
    name, omniglot, miniimagenet_like, tmp_path
):
    """The data set's defaults are printed, and all values are recorded."""
    flags = f"--datasource={name}", "--metatrain_iterations=0", "--image_size=28"
    flags += (f"--data_path={omniglot if name == 'omniglot' else miniimagenet_like}",)
    printed = run(*flags, f"--logdir={tmp_path / 'a'}")
    expected = ORIGINAL if name in ("sinusoid", "omniglot", "miniimagenet") else PHOTOGRAPHS
    recorded = json.loads((only_run(tmp_path / "a") / "flags.json").read_text())
    assert {flag: recorded[flag] for flag in expected} == expected
    assert recorded["norm"] == (None if name == "sinusoid" else "batch_norm")
    printed_defaults = re.findall(rf"^Defaults of --datasource={name}: (.*)$", printed, re.MULTILINE)
    expected = {"norm": None} if name == "sinusoid" else {} if expected is ORIGINAL else expected
    assert " ".join(printed_defaults).split() == [f"--{flag}={value}" for flag, value in expected.items()]

    explicit = [f"--{flag}={value}" for flag, value in ORIGINAL.items()]
    assert "Defaults" not in run(*flags, *explicit, "--norm=batch_norm", f"--logdir={tmp_path / 'b'}")
    recorded = json.loads((only_run(tmp_path / "b") / "flags.json").read_text())
    assert {flag: recorded[flag] for flag in ORIGINAL} == ORIGINAL


def test_the_default_image_size_adds_no_suffix_to_the_run_name(omniglot, tmp_path):
    flags = "--datasource=omniglot", f"--data_path={omniglot}", "--metatrain_iterations=0", f"--logdir={tmp_path}"
    run(*flags)
    run(*flags, "--image_size=28", "--image_channels=1")
    assert only_run(tmp_path).name == "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm"
    run(*flags, "--image_size=32", "--image_channels=3")
    assert {path.name for path in tmp_path.iterdir()} == {
        "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm",
        "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm.size32.channels3",
    }


# -- stopping and resuming --------------------------------------------------------------------------------------------

BOTH_PHASES = "--pretrain_iterations=330", "--metatrain_iterations=270", "--norm=None", "--save_interval=299"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Finished:
    return finished(tmp_path_factory.mktemp("uninterrupted"), *BOTH_PHASES)


def signal_at(monkeypatch, iteration: int, *numbers: int, when: str = "scalars") -> None:
    """Raise signals while the summary of an iteration is written; with when="flags", before any summary."""
    original = getattr(Events, when)

    def write(events, at, values):
        if at == iteration:
            for number in numbers:
                signal.raise_signal(number)
        original(events, at, values)

    monkeypatch.setattr(Events, when, write)


@pytest.mark.parametrize(("number", "iteration"), [(signal.SIGTERM, 100), (signal.SIGINT, 400)])
def test_resume_after_a_signal_is_bitwise_identical(uninterrupted, monkeypatch, tmp_path, number, iteration):
    """Stopped in pretraining or in meta-training. The same command resumes."""
    flags = f"--logdir={tmp_path}", *BOTH_PHASES
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, iteration, number)
        prefix = saved_by(number, start_main(*flags))
    assert signal.getsignal(number) is before
    folder = only_run(tmp_path)
    assert str(prefix) == runs.Run(folder).checkpoint()
    assert prefix.name in (f"model{iteration - 1}", f"model{iteration + 99}")  # one call takes a hundred steps
    assert f"Restoring model weights from {prefix}\n" in run(*flags)
    assert_same_ending(folder, uninterrupted.folder)
    assert scalars(folder) == scalars(uninterrupted.folder)


def test_a_stop_before_the_first_step_saves_nothing(uninterrupted, monkeypatch, tmp_path):
    """A likely moment: compiling the first program takes a while."""
    flags = f"--logdir={tmp_path}", *BOTH_PHASES
    with monkeypatch.context() as patch:
        signal_at(patch, 0, signal.SIGINT, when="flags")
        stopped = start_main(*flags)
    assert (stopped.code, stopped.err) == (128 + signal.SIGINT, "")
    assert "Stopped by SIGINT before the first step, nothing to save." in stopped.out
    assert not list(only_run(tmp_path).glob("model*"))
    run(*flags)
    assert_same_ending(only_run(tmp_path), uninterrupted.folder)
    assert scalars(only_run(tmp_path)) == scalars(uninterrupted.folder)


def test_a_stop_before_the_only_step_saves_nothing(monkeypatch, tmp_path):
    """The last iteration is saved only if its step was taken."""
    signal_at(monkeypatch, 0, signal.SIGINT, when="flags")
    stopped = start_main("--norm=None", "--metatrain_iterations=1", f"--logdir={tmp_path}")
    assert "before the first step, nothing to save." in stopped.out
    assert not list(only_run(tmp_path).glob("model*"))


def test_resume_on_images_is_bitwise_identical(omniglot_run, monkeypatch, tmp_path):
    flags = *omniglot_run.flags, f"--logdir={tmp_path}"
    with monkeypatch.context() as patch:
        signal_at(patch, 400, signal.SIGTERM)
        prefix = saved_by(signal.SIGTERM, start_main(*flags))
    assert f"Restoring model weights from {prefix}\n" in run(*flags)
    assert_same_ending(only_run(tmp_path), omniglot_run.folder)
    assert scalars(only_run(tmp_path)) == scalars(omniglot_run.folder)


def test_a_stop_interrupts_validation_and_the_resumed_run_repeats_it(omniglot_run, monkeypatch, tmp_path):
    flags = *omniglot_run.flags, f"--logdir={tmp_path}"
    drawn = []

    def draw(data, seed, split, first, count, draw=ImageTasks.draw):
        if split == "val" and count > 1:  # pictures need one task
            drawn.append(first)
            if len(drawn) == 1:
                signal.raise_signal(signal.SIGTERM)
        return draw(data, seed, split, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTasks, "draw", draw)
        assert saved_by(signal.SIGTERM, start_main(*flags)).name == "model500"
    assert drawn == [0]
    assert "Validation results" in run(*flags)
    assert_same_ending(only_run(tmp_path), omniglot_run.folder)  # including the best validation
    assert scalars(only_run(tmp_path)) == scalars(omniglot_run.folder)


def test_a_second_ctrl_c_exits_at_once(monkeypatch, tmp_path):
    signal_at(monkeypatch, 100, signal.SIGINT, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore it
    try:
        ended = start_main(f"--logdir={tmp_path}", *BOTH_PHASES)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.err) == (128 + signal.SIGINT, "")
    assert models(only_run(tmp_path)) == []


def test_a_finished_run_reports_that_and_does_not_change(omniglot_run):
    before = contents(omniglot_run.folder)
    printed = run(*omniglot_run.flags)
    assert "510 of 510 iterations" in printed and "--metatrain_iterations" in printed
    assert contents(omniglot_run.folder) == before


def test_an_extended_run_is_bitwise_identical_to_a_long_one(uninterrupted, tmp_path):
    """Except that it also has the checkpoint of the shorter run's end."""
    flags = f"--logdir={tmp_path}", *BOTH_PHASES
    run(*flags, "--metatrain_iterations=50")
    folder = only_run(tmp_path)
    assert f"Restoring model weights from {folder / 'model379'}\n" in run(*flags)
    assert models(folder) == ["model299", "model379", "model598", "model599"]
    assert_same_ending(folder, uninterrupted.folder)
    assert scalars(folder) == scalars(uninterrupted.folder)


def test_zero_iterations_are_accepted(tmp_path):
    assert "0 of 0 iterations" in run(f"--logdir={tmp_path}", "--metatrain_iterations=0")


# -- --run=<folder> ---------------------------------------------------------------------------------------------------


def test_run_resumes_and_tests_like_the_full_flags(uninterrupted, few_test_tasks, tmp_path):
    run(f"--logdir={tmp_path}", *BOTH_PHASES, "--metatrain_iterations=50")
    folder = only_run(tmp_path)
    run_flag = f"--run={folder}"
    assert "Nothing left to do" in run(run_flag)
    run(run_flag, "--metatrain_iterations=270", "--save_interval=299")
    assert_same_ending(folder, uninterrupted.folder)

    for name, flags in ("flags", [f"--logdir={tmp_path}", *BOTH_PHASES]), ("run", [run_flag]):
        run(*flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path / 'results' / name}")
    by_flags, by_folder = (contents(tmp_path / "results" / name) for name in ("flags", "run"))
    assert {path.name: content for path, content in by_flags.items()} == {
        path.name: content for path, content in by_folder.items()
    }


def test_run_finds_its_images_and_accepts_test_flags(photo_run, photos, few_test_tasks, tmp_path):
    folder = shutil.copytree(photo_run.folder, tmp_path / "renamed")
    run(f"--run={folder}", "--train=False", "--update_batch_size=2", "--num_query=1", "--test_updates=3")
    entry = json.loads((folder / "results.json").read_text())[-1]
    assert (entry["support_examples_a_class_K"], entry["query_examples_a_class_Q"]) == (2, 1)
    assert len(entry["results"]) == 4
    assert "Images of " + str(photos) in run(f"--run={folder}", "--train=False", f"--data_path={photos}")


@pytest.mark.parametrize(
    "flag", ["--update_lr=0.2", "--num_classes=3", "--logdir=elsewhere", "--datasource=omniglot", "--seed=1"]
)
def test_a_flag_that_contradicts_the_run_is_refused(flag, photo_run):
    assert flag.partition("=")[0] in refusal(f"--run={photo_run.folder}", flag)
    if flag != "--update_lr=0.2":  # a test may have another alpha
        assert flag.partition("=")[0] in refusal(f"--run={photo_run.folder}", "--train=False", flag)


def test_run_remembers_where_a_published_data_set_is(omniglot_run, few_test_tasks, tmp_path):
    folder = shutil.copytree(omniglot_run.folder, tmp_path / "run")
    assert "Images of " in run(f"--run={folder}", "--train=False")
    assert "Images of " in run(f"--run={folder}", "--train=False", "--image_size=28")  # Omniglot's own size


def test_more_iterations_of_an_oracle_run_are_pretraining(tmp_path):
    run("--baseline=oracle", "--norm=None", "--metatrain_iterations=2", f"--logdir={tmp_path}")
    folder = only_run(tmp_path)
    run(f"--run={folder}", "--metatrain_iterations=4")
    flags = json.loads((folder / "flags.json").read_text())
    assert (flags["pretrain_iterations"], flags["metatrain_iterations"]) == (4, 0)


def test_idle_cores_are_reported(small, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "start", lambda *args, **kwargs: None)  # TensorFlow takes its threads once
    flags = *small, "--metatrain_iterations=1", "--meta_batch_size=4"
    assert "--op_threads=2" in run(*flags, "--threads=8", f"--logdir={tmp_path / 'idle'}")
    assert "--op_threads" not in run(*flags, "--threads=7", f"--logdir={tmp_path / 'busy'}")


def test_run_of_a_missing_folder_is_refused(tmp_path):
    assert str(tmp_path / "none") in refusal(f"--run={tmp_path / 'none'}", "--train=False")
    (tmp_path / "flags.json").touch()
    message = refusal(f"--run={tmp_path / 'flags.json'}", "--train=False")
    assert "flags.json/" not in message and "copy" not in message


def test_testing_a_published_model_does_not_change_its_folder(few_test_tasks, monkeypatch, sinusoid_run, tmp_path):
    published = tmp_path / "logs" / "published"
    folder = shutil.copytree(sinusoid_run.folder, published / sinusoid_run.folder.name)
    monkeypatch.setattr(main, "ROOT", tmp_path)
    before = contents(folder)
    run(f"--run={folder}", "--train=False", "--test_set=True")
    assert contents(folder) == before
    assert (tmp_path / "logs" / "tests" / folder.name / "results.json").exists()


# -- --compare=<folder> -----------------------------------------------------------------------------------------------


def compared(one: Path, other: Path, *flags: str) -> np.ndarray:
    """Return the rows that --compare prints: updates, A, B and B - A, each with its interval."""
    before = contents(one), contents(other)
    printed = run(f"--run={one}", f"--compare={other}", "--train=False", "--test_set=True", *flags)
    assert (contents(one), contents(other)) == before
    assert f"A: {one}/model" in printed and f"B: {other}/model" in printed
    rows = re.findall(r"^ +(\d+)" + r" +(\S+) \+- +(\S+)" * 3 + " +(?:query|support) set", printed, re.MULTILINE)
    return np.array(rows, float)


def assert_compared(one: Path, other: Path, results: Path, *flags: str) -> None:
    """Each row has the statistics of the two runs' own tests, and of the differences of their values task by task."""
    rows, values = compared(one, other, *flags), []
    for folder in (one, other):
        run(f"--run={folder}", "--train=False", "--test_set=True", f"--results_dir={results / folder.name}", *flags)
        (path,) = (results / folder.name).glob("*.pkl")
        values.append(read_pickle(path).astype(float))
    a, b = values
    expected = [
        statistic
        for column in (a, b, b - a)
        for statistic in (column.mean(0), 1.96 * column.std(0) / np.sqrt(len(column)))
    ]
    np.testing.assert_array_equal(rows[:, 0], range(11))
    np.testing.assert_allclose(rows[:, 1:].T, expected, rtol=1e-2, atol=1e-6)
    assert (b != a).any()


@pytest.fixture(scope="module")
def first_order_run(omniglot, tmp_path_factory) -> Finished:
    flags = "--stop_grad", "--seed=3", "--num_updates=2", "--num_filters=8", "--update_lr=0.2", "--update_batch_size=2"
    flags = *small_flags(omniglot), *flags, "--metatrain_iterations=2"
    return finished(tmp_path_factory.mktemp("first_order"), *flags)


def test_two_runs_are_compared_task_by_task(omniglot_run, first_order_run, tmp_path):
    """Runs of different methods and shots, on tasks of one shot, each with its own step size."""
    flags = "--update_batch_size=1", "--test_tasks=30"
    assert_compared(omniglot_run.folder, first_order_run.folder, tmp_path, *flags)


def test_a_run_does_not_differ_from_itself(omniglot_run, few_test_tasks, tmp_path):
    copied = shutil.copytree(omniglot_run.folder, tmp_path / "copy")
    rows = compared(omniglot_run.folder, copied)
    assert (rows[:, 5:] == 0).all() and (rows[:, 1] > 0).all()


def test_an_oracle_is_compared_on_the_same_sinusoids(sinusoid_run, tmp_path):
    run("--baseline=oracle", "--norm=None", "--metatrain_iterations=2", f"--logdir={tmp_path / 'oracle'}")
    assert_compared(sinusoid_run.folder, only_run(tmp_path / "oracle"), tmp_path, "--test_tasks=30")


@pytest.mark.parametrize(
    ("flag", "value", "can_be_given"),
    [
        *(("datasource", "miniimagenet", False), ("num_classes", 4, False), ("update_batch_size", 2, True)),
        *(("image_size", 20, False), ("image_channels", 3, False), ("split", "20,20,20", True)),
    ],
)
def test_a_run_with_other_tasks_is_not_compared(flag, value, can_be_given, omniglot_run, tmp_path):
    other = shutil.copytree(omniglot_run.folder, tmp_path / "other")
    flags = json.loads((other / "flags.json").read_text()) | {flag: value}
    (other / "flags.json").write_text(json.dumps(flags))
    line = refusal(f"--run={omniglot_run.folder}", f"--compare={other}", "--train=False")
    problem, _, fix = line.rpartition(";")
    assert f"--compare={other}: " in problem and (f"--{flag}" in fix) == can_be_given
    assert set(re.findall(r"(\w+)=", problem)) == {"compare", flag}  # and no other flag


def test_runs_of_different_folders_are_not_compared(photo_run, miniimagenet_like, few_test_tasks, tmp_path):
    """Unless the folder to test is given."""
    other = shutil.copytree(photo_run.folder, tmp_path / "other")
    flags = json.loads((other / "flags.json").read_text()) | {"data_path": str(tmp_path)}
    (other / "flags.json").write_text(json.dumps(flags))
    line = refusal(f"--run={photo_run.folder}", f"--compare={other}", "--train=False")
    assert "data_path" in line and str(tmp_path) in line
    assert len(compared(photo_run.folder, other, f"--data_path={miniimagenet_like}")) == 11


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        *((["--run={run}"], "--train=False"), (["--train=False"], "--run=FOLDER")),
        (["--run={run}", "--train=False", "--results_dir=x"], "--results_dir"),
        (["--run={run}", "--train=False", "--compare=missing"], "--compare=missing"),
    ],
)
def test_compare_needs_two_runs_and_a_test(flags, named, run_copy):
    flags = [flag.format(run=run_copy.folder) for flag in flags]
    assert named in refusal(f"--compare={run_copy.folder}", *flags)


# -- flags take effect ------------------------------------------------------------------------------------------------


def test_the_command_without_flags_trains(tmp_path):
    """The original's default norm crashes on the sinusoid. Ours is None there, and is printed."""
    printed = run("--metatrain_iterations=2", f"--logdir={tmp_path}")
    assert "norm=None" in printed
    assert only_run(tmp_path).name == "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm"
    assert models(only_run(tmp_path)) == ["model1"]


def test_an_explicit_norm_on_the_sinusoid_is_used(few_test_tasks, tmp_path):
    flags = "--norm=batch_norm", "--metatrain_iterations=2", f"--logdir={tmp_path}"
    assert "norm=None" not in run(*flags)
    assert only_run(tmp_path).name == "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm"
    run(*flags, "--train=False", "--test_set=True")
    assert np.isfinite(read_pickle(only_run(tmp_path) / "test_ubs5_stepsize0.001.pkl")).all()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> dict[str, np.ndarray]:
    run = finished(tmp_path_factory.mktemp("three_steps"), "--metatrain_iterations=3")
    return variables(run.folder, "model2")


@pytest.mark.parametrize(
    "flag",
    [
        *("pretrain_iterations=1", "meta_batch_size=24", "meta_lr=0.002", "update_batch_size=4", "update_lr=0.002"),
        *("num_updates=2", "norm=layer_norm", "stop_grad", "num_query=4"),
    ],
)
def test_a_flag_changes_the_weights(flag, three_steps, tmp_path):
    iterations = 2 if flag.startswith("pretrain") else 3
    folder = finished(tmp_path, f"--{flag}", f"--metatrain_iterations={iterations}").folder
    w1 = "model/Variable"
    assert not np.array_equal(variables(folder, "model2")[w1], three_steps[w1])


def test_a_step_takes_the_next_tasks_of_the_stream(tmp_path):
    """Iteration t takes tasks t * T .. t * T + T - 1."""
    trained = variables(finished(tmp_path, "--metatrain_iterations=3", "--seed=3").folder, "model2")
    maml = maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1, seed=3)
    for t in range(3):
        maml.train_step(SinusoidTasks(5, 5).draw(3, "train", 25 * t, 25))
    for name, weight in maml.weights.items():
        np.testing.assert_allclose(trained[maml.keys[name]], weight, atol=1e-6)


@pytest.mark.parametrize(("iteration", "updates"), [(0, 5), (300, 1)])
def test_a_summary_evaluates_its_iterations_tasks_before_the_step(uninterrupted, iteration, updates):
    """Every 1,000 iterations, for the whole curve."""
    maml = maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1)
    if iteration:
        runs.Run(uninterrupted.folder).restore(maml, str(uninterrupted.folder / f"model{iteration - 1}"))
    tasks = SinusoidTasks(5, 5).draw(0, "train", 25 * iteration, 25)
    before, *after = np.mean(maml.evaluate(tasks, updates).losses, 0)
    expected = {"metatrain_Pre-update_loss": before}
    expected |= {f"metatrain_Post-update_loss__step_{j}": loss for j, loss in enumerate(after, 1)}
    points = {tag: dict(points) for tag, points in scalars(uninterrupted.folder).items()}
    written = {tag: points[tag][iteration] for tag in points if "update_loss" in tag and iteration in points[tag]}
    assert written == pytest.approx(expected, rel=1e-5)


def test_threads_do_not_change_the_weights(small, monkeypatch, tmp_path):
    """Unlike --op_threads."""
    # TensorFlow has started and no longer accepts settings.
    monkeypatch.setattr(devices, "start", lambda *threads, **settings: None)
    folders = [finished(tmp_path / n, *small, "--metatrain_iterations=3", f"--threads={n}").folder for n in "14"]
    assert_same_ending(*folders)


def test_training_is_reproducible(three_steps, monkeypatch, tmp_path):
    monkeypatch.setattr("tests.helpers.MODELS", {})  # initialize again, too
    repeated = variables(finished(tmp_path, "--metatrain_iterations=3").folder, "model2")
    for name, value in three_steps.items():
        np.testing.assert_array_equal(value, repeated[name], err_msg=name)


def test_without_log_there_are_no_events(tmp_path):
    run("--log=False", "--metatrain_iterations=2", f"--logdir={tmp_path / 'new' / 'logs'}")
    folder = only_run(tmp_path / "new" / "logs")
    assert models(folder) == ["model1"]
    assert not list(folder.glob("*tfevents*"))


@pytest.mark.parametrize("name", ["my models/model7.index \u00e9 \u8a66", "*? {a,b}"])
def test_unusual_folder_names_are_accepted(name, few_test_tasks, tmp_path):
    """For training, resuming and testing. The original searches the whole path for "model"."""
    logdir = tmp_path / name
    folder = finished(logdir, "--metatrain_iterations=2").folder
    printed = run("--metatrain_iterations=3", f"--logdir={logdir}")
    assert f"Restoring model weights from {folder / 'model1'}\n" in printed
    run("--train=False", f"--logdir={logdir}")
    assert models(folder) == ["model1", "model2"]
    assert (folder / "val_ubs5_stepsize0.001.csv").exists()
    assert {step for points in scalars(folder).values() for step, _ in points} == {0}


@pytest.mark.parametrize("name", ["runs [1]", "back\\slash"])
def test_a_folder_name_that_tensorflow_cannot_read_is_refused(name, tmp_path):
    """TensorFlow can write checkpoints there, but interprets the path as a pattern when it reads them."""
    line = refusal("--metatrain_iterations=2", f"--logdir={tmp_path / name}")
    assert str(tmp_path / name) in line
    assert "--logdir" in line
    assert list(tmp_path.iterdir()) == []


def test_training_with_test_set_does_not_read_the_validation_classes(miniimagenet_like, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(miniimagenet_like / split)
    flags = "--datasource=miniimagenet", f"--data_path={tmp_path / 'data'}", "--metatrain_iterations=0"
    assert "Nothing left to do" in run(*flags, "--test_set=True", f"--logdir={tmp_path / 'logs'}")
    line = refusal(*flags, f"--logdir={tmp_path / 'logs'}")
    assert str(tmp_path / "data" / "val") in line


def test_the_test_classes_never_choose_the_best_checkpoint(small, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "VALIDATION_INTERVAL", 1)
    printed = run(*small, "--test_set=True", "--metatrain_iterations=3", f"--logdir={tmp_path}")
    assert printed.count("Validation results: ") == 2
    assert "Best" not in printed
    assert models(only_run(tmp_path)) == ["model2"]


# -- bad input --------------------------------------------------------------------------------------------------------


WRONG_FLAGS = """
update_lr=nan update_lr=-0.1 update_lr=0 update_lr=inf update_lr=1e-50 train_update_lr=0
meta_lr=0 meta_lr=nan meta_lr=1e+40 meta_lr=fast
meta_batch_size=0 update_batch_size=0 train_update_batch_size=0 num_query=0 num_updates=0 num_filters=0
num_classes=1 num_classes=-5 val_tasks=0 test_tasks=0 save_interval=0 threads=-1 op_threads=0
pretrain_iterations=-1 metatrain_iterations=-1 metatrain_iterations=ten
seed=-1 seed=9223372036854775808 eval_seed=-1
image_size=0 image_channels=2 split=64,16 split=a,b,c split=64,16,-20
test_iter=-2 test_iter=worst test_iter=1.5 log=maybe
datasource=omniglott test_datasource=sinusoid norm=batchnorm baseline=orcale
"""


@pytest.mark.parametrize("flag", WRONG_FLAGS.split())
def test_an_invalid_flag_value_is_refused(flag, tmp_path):
    line = refusal(f"--logdir={tmp_path}", f"--{flag}")
    name, value = flag.split("=")
    assert name in line and value in line
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_is_refused_with_a_suggestion(tmp_path):
    line = refusal(f"--logdir={tmp_path}", "--metatrain_iteration=5")
    assert re.search(r"\bmetatrain_iteration\b.*\bmetatrain_iterations\b", line)


def test_a_value_without_an_equals_sign_is_refused(tmp_path):
    """`--train False` means --train=True plus an argument, which absl would ignore."""
    line = refusal(f"--logdir={tmp_path}", "--train", "False")
    assert "False: " in line


def test_the_oracle_is_refused_on_images(small, tmp_path):
    line = refusal(*small, "--baseline=oracle", f"--logdir={tmp_path}")
    assert "--baseline=oracle" in line


def test_a_missing_data_folder_is_reported(small, tmp_path):
    line = refusal(*small, f"--data_path={tmp_path / 'none'}", f"--logdir={tmp_path}")
    assert f"{tmp_path / 'none'}: " in line
    assert "data/omniglot_resized/resize_images.py" in line
    assert "--data_path" in line
    assert not list(only_run(tmp_path).glob("[!.]*"))  # nothing is recorded before all checks


def test_an_empty_data_folder_is_reported(small, tmp_path):
    (tmp_path / "data").mkdir()
    line = refusal(*small, f"--data_path={tmp_path / 'data'}", f"--logdir={tmp_path}")
    assert f"{tmp_path / 'data'}: " in line


def test_more_ways_than_classes_are_refused(small, omniglot, tmp_path):
    line = refusal(*small, "--num_classes=21", f"--logdir={tmp_path}")
    assert "--num_classes=21" in line and str(omniglot) in line


@pytest.fixture
def photos(miniimagenet_like, tmp_path) -> Path:
    """A copy of the photographs, to modify."""
    shutil.copytree(miniimagenet_like, tmp_path / "data")
    return tmp_path / "data"


def small_miniimagenet(folder: Path, logdir: Path) -> list[str]:
    return [
        *("--datasource=miniimagenet", f"--data_path={folder}", f"--logdir={logdir}", "--num_filters=4"),
        *("--update_batch_size=1", "--update_lr=0.01", "--metatrain_iterations=1", "--meta_batch_size=1"),
    ]


def test_a_class_with_too_few_images_is_reported(photos, tmp_path):
    for path in sorted((photos / "val" / "n00000008").iterdir())[5:]:
        path.unlink()
    line = refusal(*small_miniimagenet(photos, tmp_path / "logs"))
    assert all(part in line for part in (str(photos), "n00000008 (val: 5)", "--update_batch_size", "--num_query"))


@pytest.mark.parametrize("kept", [1, None], ids=["one image", "no test classes"])
def test_test_classes_that_are_too_small_cause_one_warning(kept, photos, tmp_path):
    """Before the first step. The run can still be trained."""
    for folder in sorted((photos / "test").iterdir())[: 2 if kept else None]:
        for path in sorted(folder.iterdir())[kept:]:
            path.unlink()
    ended = start_main(*small_miniimagenet(photos, tmp_path / "logs"))
    (line,) = ended.err.splitlines()
    assert ended.code == 0 and line.startswith(f"WARNING: {photos}: ")
    small = re.findall(r"n\d+ \(test: \d+\)", line)
    assert small == [f"n{label:08} (test: {kept or 0})" for label in range(12, 14 if kept else 18)]
    shutil.rmtree(photos / "test")
    ended = start_main(*small_miniimagenet(photos, tmp_path / "logs"), "--metatrain_iterations=2")
    assert ended.code == 0 and "test (0)" in ended.err and len(ended.err.splitlines()) == 1


def test_the_sinusoids_step_size_on_images_causes_one_warning(photos, omniglot, tmp_path):
    """It lists the values of the documented commands. Other data sets have a default of their own."""
    flags = "--metatrain_iterations=1", "--meta_batch_size=1", "--num_filters=4"
    for name, folder, values in (("omniglot", omniglot, ("0.4", "0.1")), ("miniimagenet", photos, ("0.01",))):
        ended = start_main(*flags, f"--datasource={name}", f"--data_path={folder}", f"--logdir={tmp_path / name}")
        (line,) = ended.err.splitlines()
        assert ended.code == 0 and line.startswith("WARNING: --update_lr=0.001: ")
        assert {*re.findall(r"--update_lr=(\S+)", line)} == {"0.001:", *values}
    run(*flags, "--datasource=folder", f"--data_path={photos}", "--num_updates=1", f"--logdir={tmp_path / 'own'}")


def test_an_unreadable_image_is_reported(photos, tmp_path):
    image = photos / "train" / "n00000003" / "007.jpg"
    os.truncate(image, 500)
    line = refusal(*small_miniimagenet(photos, tmp_path / "logs"))
    assert f"{image}: " in line and "--skip_broken" in line


def test_an_image_of_the_wrong_size_is_refused_without_image_size(photos, tmp_path):
    image = photos / "train" / "n00000003" / "007.jpg"
    Image.new("RGB", (80, 64)).save(image)
    line = refusal(*small_miniimagenet(photos, tmp_path / "logs"))
    assert f"{image}: " in line and "--image_size" in line
    flags = *small_miniimagenet(photos, tmp_path / "logs"), "--metatrain_iterations=0"
    assert "Nothing left to do" in run(*flags, "--image_size=84")


def test_test_images_of_the_wrong_size_are_refused_without_image_size(
    photos, miniimagenet_like, few_test_tasks, tmp_path
):
    """--image_size resizes them, even if it is the data set's default and does not change the run's name."""
    for image in sorted((photos / "test").glob("*/*.jpg"))[::7]:
        Image.new("RGB", (80, 64)).save(image)
    flags = small_miniimagenet(miniimagenet_like, tmp_path / "logs")
    run(*flags)
    flags += "--train=False", "--test_set=True", "--test_datasource=cub", f"--test_data_path={photos}"
    assert "--image_size" in refusal(*flags)
    assert f"Images of {photos}, read as 84x84x3: test 6 classes, 144 images." in run(*flags, "--image_size=84")
    names, task, _ = plot.answered_task(only_run(tmp_path / "logs"), 1, 0, photos)
    assert len(names) == 5 and task.query_x.shape == (25, 84, 84, 3)


def test_images_that_moved_since_training_are_accepted(photo_run, photos, few_test_tasks, tmp_path):
    """The run continues as the same run, to the same bits, and its tests have the same files."""
    copies = []
    for name, moved in (("stayed", []), ("moved", [f"--data_path={photos}"])):
        shutil.copytree(photo_run.folder, tmp_path / name / photo_run.folder.name)
        flags = *photo_run.flags, f"--logdir={tmp_path / name}", *moved, "--metatrain_iterations=3"
        run(*flags)
        run(*flags, "--train=False", "--test_set=True")
        copies.append(only_run(tmp_path / name))
    assert_same_ending(*copies)
    stayed, moved = (json.loads((copy / "flags.json").read_text()) for copy in copies)
    assert moved.pop("data") == {"folder": str(photos)} != stayed.pop("data")
    assert moved == stayed
    stayed, moved = (read_csv(copy / "test_ubs1_stepsize0.01.csv")[1] for copy in copies)
    np.testing.assert_array_equal(stayed, moved)
    run(*flags[:-2], "--metatrain_iterations=4")  # back to where they were


@pytest.mark.parametrize("split", SPLITS)
def test_a_run_with_different_data_is_refused(split, photo_run, miniimagenet_like, photos):
    next((photos / split).glob("*/*.jpg")).unlink()
    assert_refused(
        photo_run,
        f"--data_path={miniimagenet_like} there, {photos} here",
        *photo_run.flags,
        f"--data_path={photos}",
    )
    assert_refused(photo_run, "--split=None there, 2,2,2 here", "--split=2,2,2")


def test_data_flags_that_do_not_fit_together_are_refused(small, sinusoid_run, tmp_path):
    line = refusal("--datasource=folder", f"--logdir={tmp_path}")
    assert "--datasource=folder" in line and "--data_path" in line
    flags = *sinusoid_run.flags, "--train=False"
    assert "--test_data_path" in refusal(*flags, "--test_data_path=images")
    line = refusal(*flags, "--test_datasource=cub")
    assert "--test_datasource=cub" in line


def test_a_different_way_at_test_is_refused(omniglot_run):
    """The last layer has one output per class."""
    line = refusal(*omniglot_run.flags, "--train=False", "--num_classes=4")
    assert str(omniglot_run.folder) in line
    assert "--num_classes" in line


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Finished:
    with not_compiled():
        return finished(tmp_path_factory.mktemp("two_steps"), "--metatrain_iterations=2", "--norm=None")


@pytest.fixture
def run_copy(two_steps, tmp_path) -> Finished:
    """A copy of a short run, to modify."""
    folder = shutil.copytree(two_steps.folder, tmp_path / "logs" / two_steps.folder.name)
    return Finished([f"--logdir={tmp_path / 'logs'}", *two_steps.flags[1:]], folder, two_steps.printed)


def assert_refused(run: Finished, message: str, *flags: object) -> None:
    """The error has this text and names the run, and the run does not change."""
    before = contents(run.folder)
    line = refusal(*run.flags, *flags)
    assert message in line
    assert str(run.folder) in line
    assert contents(run.folder) == before


def test_the_folder_of_a_different_run_is_refused_by_flag(run_copy, small):
    assert_refused(run_copy, "--num_query=-1 there, 7 here", "--num_query=7")
    same_name = "--norm=None", "--num_filters=64", "--meta_batch_size=25", "--update_batch_size=5", "--update_lr=0.001"
    assert_refused(run_copy, "--datasource=sinusoid there, omniglot here", *small, *same_name)
    assert_refused(run_copy, "--datasource=sinusoid there, omniglot here", *small, *same_name, "--train=False")


def test_resume_false_does_not_overwrite_a_run(run_copy):
    assert_refused(run_copy, "--resume=False", "--resume=False")


def test_a_missing_test_iter_is_refused(run_copy):
    assert_refused(run_copy, "--test_iter=0", "--train=False", "--test_iter=0")


def test_a_test_without_a_checkpoint_is_refused(run_copy, tmp_path):
    """The original silently tests random weights."""
    line = refusal("--norm=None", "--update_lr=0.5", "--train=False", *run_copy.flags[:1])
    assert f"{run_copy.folder.parent / 'cls_5.mbs_25.ubs_5.numstep1'}" in line
    assert run_copy.folder.name in line
    assert str(tmp_path / "none") in refusal("--train=False", f"--logdir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_a_test_finds_its_run_by_following_the_errors(run_copy, few_test_tasks):
    """A test with another K, and another J, than the run's."""
    line = refusal(*run_copy.flags, "--train=False", "--update_batch_size=2", "--num_updates=3")
    there = f"--run={run_copy.folder.parent}/"
    assert there in line and run_copy.folder.name in line
    flags = f"--run={run_copy.folder}", "--train=False", "--update_batch_size=2"
    (fix,) = re.findall(r"--test_\w+=3", refusal(*flags, "--num_updates=3"))
    run(*flags, fix)
    header, _ = read_csv(run_copy.folder / "val_ubs2_stepsize0.001_updates3.csv")
    assert header[-1] == "update3"
    assert run_copy.folder.name in refusal(f"--run={run_copy.folder.parent}", "--train=False")


def test_without_flags_json_the_checkpoints_shapes_are_checked(run_copy, small):
    """As for the released model."""
    (run_copy.folder / "flags.json").unlink()
    same_name = "--norm=None", "--num_filters=64", "--meta_batch_size=25", "--update_batch_size=5", "--update_lr=0.001"
    assert_refused(run_copy, str(run_copy.folder / "model1"), *small, *same_name, "--train=False")
    assert_refused(run_copy, "--logdir", "--metatrain_iterations=3")


def test_if_the_newest_checkpoint_is_damaged_the_run_resumes_from_the_previous_one(
    run_copy, few_test_tasks, three_steps
):
    """It prints a warning and ends in the same weights. A damaged checkpoint chosen by --test_iter is refused."""
    run(*run_copy.flags, "--metatrain_iterations=3")
    os.truncate(run_copy.folder / "model2.data-00000-of-00001", 50)
    assert_refused(run_copy, f"{run_copy.folder / 'model2'}: ", "--train=False", "--test_iter=2")
    for flags in (["--train=False"], ["--metatrain_iterations=3"]):
        ended = start_main(*run_copy.flags, *flags)
        assert ended.code == 0
        assert ended.err.startswith(f"WARNING: {run_copy.folder / 'model2'}: ")
        assert f"Restoring model weights from {run_copy.folder / 'model1'}\n" in ended.out
    for name, value in variables(run_copy.folder, "model2").items():
        np.testing.assert_array_equal(value, three_steps[name], err_msg=name)


def test_a_nan_loss_stops_the_run(tmp_path):
    line = refusal("--update_lr=1e30", "--metatrain_iterations=3", f"--logdir={tmp_path}")
    assert "the loss at iteration 0 is" in line and "--meta_lr" in line
    assert models(only_run(tmp_path)) == []


def test_nan_weights_are_never_saved(run_copy, monkeypatch):
    """Even if no summary has shown them."""

    def restore_newest(run, maml, restore_newest=runs.Run.restore_newest):
        prefix = restore_newest(run, maml)
        maml.weights["w1"].assign(np.nan * maml.weights["w1"])
        return prefix

    monkeypatch.setattr(runs.Run, "restore_newest", restore_newest)
    line = refusal(*run_copy.flags, "--metatrain_iterations=9")
    assert str(run_copy.folder / "model1") in line
    assert models(run_copy.folder) == ["model1"]


def test_a_second_training_process_in_a_folder_is_refused(run_copy, few_test_tasks):
    with runs.Run(run_copy.folder).locked():
        assert_refused(run_copy, "--logdir", "--metatrain_iterations=3")
        run(*run_copy.flags, "--train=False")
    run(*run_copy.flags, "--metatrain_iterations=3")


class Exploit:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_training_works_without_file_locks_and_warns(tmp_path):
    """Python on Windows has no fcntl."""
    program = "import sys\nsys.modules['fcntl'] = None\nimport main\nmain.run(main.parse(sys.argv))"
    flags = "--metatrain_iterations=0", f"--logdir={tmp_path}"
    ended = end(spawn("-c", program, *flags, cwd=PROGRAM.parent))
    assert (ended.code, ended.err) == (0, "")
    assert f"{only_run(tmp_path)}: cannot be locked" in ended.out


@pytest.mark.parametrize(("error", "one_line"), [(errno.ENOSPC, True), (errno.EACCES, True), (errno.ENOENT, False)])
def test_os_errors_that_the_user_can_fix_are_one_line(monkeypatch, error, one_line):
    """A bug keeps its traceback, even if it is an OSError."""

    def main_(*arguments):
        raise OSError(error, os.strerror(error), "somewhere")

    monkeypatch.setattr(main, "main", main_)
    if one_line:
        assert "somewhere" in refusal()
    else:
        with pytest.raises(OSError, match="somewhere"):
            start_main()


def test_a_closed_output_pipe_is_reported_in_one_line(monkeypatch):
    """As with `| head`."""

    def main_(*arguments):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(main, "main", main_)
    assert "stdout" in refusal()


def test_a_full_disk_behind_stdout_is_named(tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--metatrain_iterations=1", f"--logdir={tmp_path}"],
            **{"stdout": full, "stderr": subprocess.PIPE, "text": True},
        )
        (line,) = without_start_up_lines(process.communicate(timeout=300)[1]).splitlines()
    assert process.returncode == 1
    assert line.startswith("main.py: stdout: ") and os.strerror(errno.ENOSPC) in line


@pytest.mark.parametrize("vanish", [lambda folder: folder.rename(folder.with_name("moved")), shutil.rmtree])
def test_a_run_folder_that_disappears_ends_the_run(vanish, monkeypatch, tmp_path):
    """TensorFlow would create another, without flags.json, that cannot be resumed. A moved folder can be."""
    flags = "--norm=None", "--metatrain_iterations=302", "--save_interval=100"

    def disappear(events, iteration, values, scalars=Events.scalars):
        scalars(events, iteration, values)
        if iteration == 200:
            vanish(events.folder)

    monkeypatch.setattr(Events, "scalars", disappear)
    line = refusal(*flags, f"--logdir={tmp_path / 'logs'}")
    monkeypatch.undo()
    assert str(tmp_path / "logs") in line and os.strerror(errno.ENOENT) in line
    (moved,) = [*(tmp_path / "logs").iterdir()] or [None]
    if moved:
        assert models(moved) == ["model100"]
        run(f"--run={moved}")
        assert_same_ending(moved, finished(tmp_path / "whole", *flags).folder)


def test_events_are_written_before_each_checkpoint(monkeypatch, tmp_path):
    """A run that resumes from a checkpoint does not write earlier events again."""
    steps_written = {}

    def save(run, model, save=runs.Run.save):
        steps_written[int(model.step)] = [step for step, _ in scalars(run.folder).get("metatrain_Pre-update_loss", [])]
        return save(run, model)

    monkeypatch.setattr(runs.Run, "save", save)
    run("--metatrain_iterations=202", "--save_interval=100", f"--logdir={tmp_path}")
    assert steps_written == {101: [0, 100], 201: [0, 100, 200], 202: [0, 100, 200]}


def test_an_untrusted_run_folder_cannot_run_code(run_copy, few_test_tasks, tmp_path):
    for name in ("val_ubs5_stepsize0.001.pkl", "model5.pkl", "model5.index", "model5.data-00000-of-00001"):
        (run_copy.folder / name).write_bytes(pickle.dumps(Exploit(tmp_path / "created")))
    for flags in (["--train=False"], ["--metatrain_iterations=3"]):
        ended = start_main(*run_copy.flags, *flags)
        assert ended.code == 0
        assert f"{run_copy.folder / 'model5'}: " in ended.err
    for name in ("results.json", "flags.json"):
        (run_copy.folder / name).write_bytes(pickle.dumps(Exploit(tmp_path / "created")))
        assert name in start_main(*run_copy.flags, "--train=False").err
    assert not (tmp_path / "created").exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A separate disk of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("full and read-only disks need permission to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_reported_in_one_line_and_loses_nothing_saved(small_disk, two_steps, few_test_tasks, tmp_path):
    """While a run is recorded, saved or tested. With space freed, the run resumes."""
    flags = "--norm=None", "--metatrain_iterations=16", "--save_interval=2"
    logdir = f"--logdir={small_disk / 'logs'}"
    line = refusal(*flags, logdir)
    folder = only_run(small_disk / "logs")
    assert f"{folder}: " in line and "No space left on device" in line
    assert models(folder) != []

    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'more'}"], capture_output=True)  # fill the disk
    before = contents(small_disk)
    line = refusal(*two_steps.flags, "--train=False", f"--results_dir={small_disk}")
    assert f"{small_disk}: " in line and "No space left on device" in line
    assert "(No space left on device)" in refusal(*flags, logdir)
    after = contents(small_disk)
    assert before.items() <= after.items()
    assert not any(data for path, data in after.items() if path not in before)  # new event files are empty

    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert "Restoring model weights from" in run(*flags, logdir)
    assert_same_ending(folder, finished(tmp_path / "whole", *flags).folder)


def test_a_read_only_disk_is_refused_by_flag(small_disk, run_copy, few_test_tasks):
    folder = shutil.copytree(run_copy.folder, small_disk / run_copy.folder.name)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    flags = *run_copy.flags, f"--logdir={small_disk}"
    line = refusal(*flags, "--metatrain_iterations=3")
    assert f"{folder}: " in line and "--logdir" in line
    assert "--results_dir" in refusal(*flags, "--train=False")
    run(*flags, "--train=False", f"--results_dir={run_copy.folder}")
    assert (run_copy.folder / "val_ubs5_stepsize0.001.csv").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_progress_bar_with_losses(tmp_path):
    """On stderr. The lines on stdout do not change."""
    flags = "--norm=None", "--metatrain_iterations=3", f"--logdir={tmp_path}"
    out, err = io.StringIO(), Terminal()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main.run(main.parse(["main.py", *flags]))
    last = err.getvalue().strip().split("\r")[-1]
    assert re.search(r"100%.* 3/3 \[00:\d\d<00:00, .*(iterations/s|s/ iterations), loss [\d.]+ -> [\d.]+\]", last)
    assert out.getvalue().splitlines()[-1].startswith("Done: 3 iterations")
    assert "\r" not in out.getvalue()


def test_unwritable_folders_are_refused_by_flag(run_copy, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    line = refusal("--norm=None", f"--logdir={file}")
    assert re.search(rf"{re.escape(str(file))}/cls_\S+: .* --logdir$", line)
    message = refusal(*run_copy.flags, "--train=False", f"--results_dir={file / 'below'}")
    assert re.search(rf"{re.escape(str(file))}/below: .* --results_dir$", message)
    assert file.read_text() == "x"


TYPOS = dict.fromkeys(("meta_batch_size", "update_batch_size", "num_query", "num_classes", "image_size"), 10**7)
TYPOS |= dict.fromkeys(("val_tasks", "test_tasks", "threads", "op_threads", "train_update_batch_size"), 10**7)
TYPOS |= {"num_filters": 10**6, "num_updates": 1000, "save_interval": 10**18, "metatrain_iterations": 10**18}
TYPOS |= {"pretrain_iterations": 10**18}


@pytest.mark.parametrize("flag", TYPOS)
def test_an_absurd_flag_value_is_refused_before_any_work(flag, tmp_path):
    line = refusal(f"--logdir={tmp_path / 'logs'}", f"--{flag}={TYPOS[flag]}")
    assert f"--{flag}=" in line
    assert line.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_trillion_iterations_need_no_memory(tmp_path, monkeypatch):
    """The schedule is computed, not listed."""

    def stop(events, at, values):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Events, "scalars", stop)
    flags = "--norm=None", "--metatrain_iterations=1000000000000", "--save_interval=1", f"--logdir={tmp_path}"
    with not_compiled():
        assert saved_by(signal.SIGTERM, start_main(*flags)).parent == only_run(tmp_path)


def test_how_a_run_was_computed_is_recorded(tmp_path, monkeypatch):
    """A change causes a warning and does not affect flags.json."""
    flags = "--norm=None", f"--logdir={tmp_path}"
    with not_compiled():
        start_main(*flags, "--metatrain_iterations=2")
        folder = only_run(tmp_path)
        identity = json.loads((folder / "flags.json").read_text())
        computed = devices.computed()
        assert computed["op_threads"] == 1
        assert computed["tensorflow"] == tf.__version__
        ended = start_main(*flags, "--metatrain_iterations=3")
        assert (ended.code, ended.err) == (0, "")
        monkeypatch.setattr(devices, "computed", lambda: computed | {"op_threads": 2})
        ended = start_main(*flags, "--metatrain_iterations=4")
    (line,) = ended.err.splitlines()
    assert str(folder) in line and "op_threads was 1, is now 2" in line
    assert ended.code == 0
    recorded = json.loads((folder / "computed.json").read_text())
    assert recorded == [{"from_iteration": 0, **computed}, {"from_iteration": 3, **computed, "op_threads": 2}]
    assert json.loads((folder / "flags.json").read_text()).keys() == identity.keys()
    start_main(*flags, "--metatrain_iterations=4", "--train=False", "--test_tasks=2")
    (entry,) = json.loads((folder / "results.json").read_text())
    assert entry["computed"]["op_threads"] == 2


def test_long_folder_names_are_truncated_in_file_names():
    """Names of usual length are not."""
    trained = recipe.Recipe(data_set="folder", data_path="/" + "t" * 240, split="64,16,20")
    protocol = evaluate.Protocol(
        "test", 5, 1e-05, query=15, other_data_set="folder", data_folder="/" + "\u8a66" * 80, class_split="100,100,100"
    )
    name = protocol._replace(tasks=10**6, task_seed=2**63 - 1).name(trained)
    assert len(os.fsencode(f".{name}.csv.12345678")) <= 255
    assert re.match(
        r"test_ubs5_stepsize1e-05_folder-\u8a66{10}-[0-9a-f]{8}_split100,100,100_trained-t{10}-[0-9a-f]{8}_", name
    )
    short = protocol._replace(data_folder="/" + "d" * 60).name(dataclasses.replace(trained, data_path="/" + "t" * 60))
    assert "d" * 60 in short
    assert "t" * 60 in short
    assert len(short) < evaluate.MAX_NAME_BYTES
