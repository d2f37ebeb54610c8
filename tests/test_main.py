"""Whole runs: main with the flags of a command line, on generated images, and what a user finds afterwards."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData as PluginData

import devices
import evaluate
import main
import maml as method
import networks
import plot
import recipe
import runs
import train
from data_generator import ImageTasks, SinusoidTasks
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
)
from utils import Curve, Tasks, accuracy, mse, xent


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Networks that are traced in a moment: here it matters what the program does with a network, not which it is."""
    with tiny_networks(), not_compiled():
        yield


# -- what a run prints and writes -------------------------------------------------------------------------------------


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
def own_run(miniimagenet_like, tmp_path_factory) -> Finished:
    """One step on a folder of photographs, at 16x16 pixels."""
    flags = "--datasource=folder", f"--data_path={miniimagenet_like}", "--image_size=16", "--num_filters=4"
    flags += "--meta_batch_size=1", "--update_batch_size=1", "--num_updates=1", "--metatrain_iterations=1"
    return finished(tmp_path_factory.mktemp("own"), *flags)


@pytest.fixture(scope="module")
def omniglot_run(omniglot, tmp_path_factory) -> Finished:
    flags = *small_flags(omniglot), "--metatrain_iterations=510", "--save_interval=500"
    return finished(tmp_path_factory.mktemp("omniglot5way"), *flags)


def printed_means(folder: Path, tags: tuple[str, str], steps: range) -> str:
    """Two means over the summaries at these steps, as a line shows them."""
    found = scalars(folder)
    return ", ".join(f"{np.mean([value for step, value in found[tag] if step in steps]):.6g}" for tag in tags)


def test_the_lines_of_a_sinusoid_run(sinusoid_run):
    """Every 1,000 iterations, the mean of the losses since the last line; pretraining counts in neither number."""
    tags = "metatrain_Pre-update_loss", "metatrain_Post-update_loss__step_1"
    started = sinusoid_run.printed.index("Done initializing, starting training.")
    assert sinusoid_run.printed[started + 1 : -1] == [
        f"Pretrain Iteration 1000: {printed_means(sinusoid_run.folder, tags, range(0, 1001))}",
        f"Iteration 900: {printed_means(sinusoid_run.folder, tags, range(1001, 2001))}",
    ]
    for line in sinusoid_run.printed[started + 1 : -1]:
        assert re.fullmatch(rf"(Pretrain )?Iteration \d+: {NUMBER}, {NUMBER}", line)


def test_the_lines_of_an_image_run(omniglot_run):
    """Every 100 iterations accuracies on training tasks, every 500 on validation tasks."""
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


def test_checkpoints_come_every_1000_iterations_and_at_the_end(sinusoid_run, omniglot_run):
    assert models(sinusoid_run.folder) == ["model1000", "model2000", "model2001"]
    assert models(omniglot_run.folder) == ["model500", "model509"]  # --save_interval=500


def summaries(tag: str, last: int) -> list[int]:
    """Of a run with one update in training: every 100 iterations, those of further updates every 1,000."""
    return list(range(0, last + 1, 1000 if re.search("__step_([2-9]|10)$", tag) else 100))


def test_the_events_of_a_sinusoid_run(sinusoid_run):
    """Iteration 0 and pretraining included; losses alone, and no validation."""
    found = events(sinusoid_run.folder, "scalars")
    assert found.keys() == curve_tags("metatrain", ("loss",), 5) | {"metatrain_gradient_norm", STEP_TIME}
    for tag, points in found.items():
        assert [step for step, _ in points] == summaries(tag, 2001)
    assert all(milliseconds > 0 for _, milliseconds in found[STEP_TIME])
    ((step, text),) = events(sinusoid_run.folder, "text")["flags"]
    assert step == 0
    for line in ("| --pretrain_iterations | 1100 |", "| --norm | None |", "| --update_lr | 0.001 |"):
        assert line in text.item().decode()
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= events(sinusoid_run.folder, "hparams").keys()
    assert [step for step, _ in events(sinusoid_run.folder, "images")["test_task"]] == [2001]  # drawn by plot.py


def test_the_events_of_an_image_run(omniglot_run):
    found = scalars(omniglot_run.folder)
    train = curve_tags("metatrain", ("loss", "accuracy"), 10) | curve_tags("metatrain", ("mean_loss",), 1)
    train |= {"metatrain_gradient_norm"}
    assert found.keys() == train | curve_tags("metaval", ("loss", "accuracy", "mean_loss"), 1)
    for tag, points in found.items():
        assert [step for step, _ in points] == (summaries(tag, 509) if tag in train else [500])
    # 5-way 1-shot: the sum over 5 support, or 5 query, examples.
    for tag in ("metaval_Pre-update_{}", "metaval_Post-update_{}__step_1"):
        assert found[tag.format("mean_loss")][0][1] == pytest.approx(found[tag.format("loss")][0][1] / 5)
    pictures = events(omniglot_run.folder, "images")["validation_task"]
    assert [step for step, _ in pictures] == [0, 500, 509]  # the first and last iteration, and the best validation
    for _, picture in pictures:
        assert tf.io.decode_png(picture[2]).shape[0] > 5 * 88  # a row for each class


def test_tensorboards_pages_at_a_glance(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """Every chart of the layout finds its curves; the table of runs has a row by the folder's name, with the test."""
    for run_folder, curves in ((omniglot_run, 4), (sinusoid_run, 2)):
        copy = tmp_path / run_folder.folder.name
        shutil.copytree(run_folder.folder, copy)
        ((_, layout),) = events(copy, "custom_scalars")["custom_scalars__config__"]
        (category,) = layout_pb2.Layout.FromString(layout.item()).category
        tags = events(copy, "scalars")
        found = [[tag for tag in tags if re.match(chart.multiline.tag[0], tag)] for chart in category.chart]
        assert [len(one) for one in found] == ([curves] if curves == 4 else []) + [curves, 1, 1]
        logdir = next(flag for flag in run_folder.flags if flag.startswith("--logdir="))
        flags = [flag for flag in run_folder.flags if flag != logdir]
        run(*flags, f"--logdir={tmp_path}", "--train=False", "--test_set=True")
        metric = "accuracy" if curves == 4 else "loss"
        (entry,) = json.loads((copy / "results.json").read_text())
        ((_, value),) = events(copy / "test", "scalars")[metric]
        assert value.item() == pytest.approx(entry["results"][3 if curves == 4 else 10]["mean"], rel=1e-6)
        context = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
        context.Reload()
        sessions = PluginData.FromString(
            context.SummaryMetadata(copy.name, "_hparams_/session_start_info").plugin_data.content
        )
        assert sessions.session_start_info.group_name == copy.name
        plugin = context.SummaryMetadata(copy.name, "_hparams_/experiment").plugin_data
        columns = PluginData.FromString(plugin.content).experiment
        runs_own = {tag for tag in tags if tag != "loss"} | {metric}
        named = [info.display_name for info in columns.metric_infos if info.name.tag in runs_own]
        accuracies = ["test accuracy", "validation accuracy", "training accuracy"]
        assert named == ([*accuracies, "training loss"] if curves == 4 else ["test loss (sinusoid)", "training loss"])
        first = {info.name for info in columns.hparam_infos if info.differs}
        assert first == {"datasource", "num_classes", "update_batch_size", "update_lr", "num_updates"}


def test_the_norm_of_the_meta_gradient(uninterrupted):
    """Of the step that the summary's iteration takes, and of its tasks."""
    maml = maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1)
    runs.Run(uninterrupted.folder).restore(maml, str(uninterrupted.folder / "model299"))
    tasks = SinusoidTasks(5, 5).draw(0, "train", 25 * 300, 25)
    loss = functools.partial(support_loss, maml.inner)
    gradient, _ = method.meta_gradient(loss, maml.values(), tasks, maml.layout)  # of 330 iterations of pretraining
    norm = np.sqrt(sum(np.sum(np.square(part)) for part in gradient.values()))
    assert dict(scalars(uninterrupted.folder)["metatrain_gradient_norm"])[300] == pytest.approx(norm, rel=1e-4)


def evaluated(run: Finished, model: str, split: str, shot: int, inner_lr: float, count: int, steps: int) -> Curve:
    """What main has to find on tasks 0 .. count - 1 of the small Omniglot, put together by hand."""
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


def test_validation_is_of_as_many_tasks_as_said(omniglot_run):
    """--val_tasks=20, always the same ones, and of the state that model500 holds."""
    curve = evaluated(omniglot_run, "model500", "val", shot=1, inner_lr=0.4, count=20, steps=1)
    found = {tag: points[0][1] for tag, points in scalars(omniglot_run.folder).items() if tag.startswith("metaval_")}
    for metric, values in (("loss", curve.losses), ("accuracy", curve.accuracies)):
        means = [found[f"metaval_Pre-update_{metric}"], found[f"metaval_Post-update_{metric}__step_1"]]
        np.testing.assert_allclose(means, np.mean(values, 0), rtol=1e-4)


def test_validation_and_test_have_files_of_their_own(sinusoid_run, tmp_path):
    """600 tasks of the split; --results_dir takes the files, and the run folder is left alone."""
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

    printed = run(*flags, "--test_set=True", "--num_query=3")  # other tasks, so a file of their own
    assert str(results / "test_ubs5_stepsize0.001_query3.csv") in printed
    assert not np.array_equal(read_pickle(results / "test_ubs5_stepsize0.001_query3.pkl"), test)
    np.testing.assert_array_equal(read_pickle(results / "test_ubs5_stepsize0.001.pkl"), test)


def test_another_shot_and_step_size_at_test(omniglot_run, few_test_tasks, tmp_path):
    """K and alpha of the test stand in the file's name and take effect; those of training name the folder."""
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


def test_another_number_of_updates_at_test(omniglot_run, few_test_tasks, tmp_path):
    flags = *omniglot_run.flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path}"
    for given in (["--test_updates=2"], [], ["--test_updates=12"]):
        run(*flags, *given)
    usual, few, many = (
        read_pickle(tmp_path / f"test_ubs1_stepsize0.4{name}.pkl") for name in ("", "_updates2", "_updates12")
    )
    assert (usual.shape[1], few.shape[1], many.shape[1]) == (11, 3, 13)
    np.testing.assert_allclose(few, usual[:, :3], atol=1e-6)
    np.testing.assert_allclose(many[:, :11], usual, atol=1e-6)
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [entry.get("updates_at_test") for entry in entries] == [2, None, 12]
    marked = [[column["updates"] for column in entry["results"] if column["the_papers_number"]] for entry in entries]
    assert marked == [[], [3], [3]]
    assert "--test_updates=0: must be 1 or more, and at most 200, or -1" in refusal(*flags, "--test_updates=0")


def test_queries_in_shares(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """75 queries of five classes unless --num_query is given, for which a class of 20 drawings is too small."""
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


def test_two_models_in_one_results_dir(sinusoid_run, uninterrupted, few_test_tasks, tmp_path):
    """Each has its entry, also where all of the protocol is the same."""
    for one in (sinusoid_run, uninterrupted, sinusoid_run):
        run(*one.flags, "--train=False", f"--results_dir={tmp_path}")
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [entry["run"] for entry in entries] == [uninterrupted.folder.name, sinusoid_run.folder.name]


def test_two_models_of_own_images_tested_on_other_ones(own_run, miniimagenet_like, few_test_tasks, tmp_path):
    """Their run folders have one name; each test has its entry and its files."""
    moved = shutil.copytree(miniimagenet_like, tmp_path / "moved")
    other = finished(tmp_path / "logs", *own_run.flags[1:], f"--data_path={moved}")
    assert other.folder.name == own_run.folder.name
    for one in (own_run, other, own_run):
        tested = (
            "--test_datasource=cub",
            f"--test_data_path={miniimagenet_like}",
            f"--results_dir={tmp_path / 'results'}",
        )
        run(*one.flags, "--train=False", "--test_set=True", *tested)
    entries = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [entry["trained_on_folder"] for entry in entries] == [str(moved), str(miniimagenet_like)]
    assert len(list((tmp_path / "results").glob("test_ubs1_stepsize0.01_cub_trained-*.csv"))) == 2


def test_classes_that_were_trained_on_are_told(own_run, own_images, few_test_tasks, tmp_path):
    """In training where validation has them, and in a test, which records it; also where the classes changed since."""
    shutil.rmtree(own_images / "val")
    shutil.copytree(own_images / "train", own_images / "val")
    for place in range(2):
        (own_images / "test" / f"n{12 + place:08}").rename(own_images / "test" / f"n{place:08}")
    flags = *own_run.flags[:2], f"--data_path={own_images}", *own_run.flags[3:], f"--logdir={tmp_path / 'logs'}"
    ended = start_main(*flags)
    known = "of the {} split have names of classes that are trained on, such as n00000000: if they are the same classes"
    assert "WARNING: 6 of the 6 classes " + known.format("val") in ended.err
    assert ended.code == 0
    folder = only_run(tmp_path / "logs")
    assert json.loads((folder / "classes.json").read_text()) == [f"n{label:08}" for label in range(6)]

    (own_images / "train" / "n00000000").rename(own_images / "train" / "renamed")
    ended = start_main(*flags, "--metatrain_iterations=2")
    assert re.search(rf"WARNING: .*\b6 classes .*{re.escape(str(folder))}.*\b1 .*\b1 ", ended.err)
    assert "WARNING: 6 of the 6 classes " + known.format("val") in ended.err  # the one, too, that is gone from train
    assert ended.code == 0
    changed = start_main(*flags, "--metatrain_iterations=3").err
    assert re.search(rf"WARNING: .*\b7 classes .*{re.escape(str(folder))}.*\b1 .*\b0 ", changed)
    assert json.loads((folder / "classes.json").read_text()) == [*(f"n{label:08}" for label in range(6)), "renamed"]

    ended = start_main(*flags, "--metatrain_iterations=3", "--train=False", "--test_set=True")
    assert "WARNING: 2 of the 6 classes " + known.format("test") in ended.err
    (entry,) = json.loads((folder / "results.json").read_text())
    assert entry["classes_also_trained_on"] == 2


def test_a_test_prints_one_table(omniglot_run, own_run, few_test_tasks, tmp_path):
    """A line for every update, beside the original's line; the paper's column only where the paper has the data."""
    flags = "--train=False", "--test_set=True", f"--results_dir={tmp_path}"
    printed = run(*omniglot_run.flags, *flags)
    rows = re.findall(r"^ +(\d+) +(\S+) \+- +(\S+) +(\S+) +(query|support) set", printed, re.MULTILINE)
    _, (means, _, ci95) = read_csv(tmp_path / "test_ubs1_stepsize0.4.csv")
    median = np.median(read_pickle(tmp_path / "test_ubs1_stepsize0.4.pkl"), 0)
    assert [int(row[0]) for row in rows] == list(range(11))
    np.testing.assert_allclose(np.array(rows)[:, 1:4].astype(float).T, [means, ci95, median], rtol=1e-2, atol=1e-4)
    assert "The paper's column, update3: accuracy" in printed
    assert "The paper's column" not in run(*own_run.flags, *flags)
    own_images = own_run.flags[2].removeprefix("--data_path=")
    cross = "--test_datasource=miniimagenet", f"--test_data_path={own_images}"
    assert "The paper's column" not in run(*omniglot_run.flags, *flags, *cross)


def test_other_tasks_at_test(omniglot_run, miniimagenet_like, tmp_path):
    """An Omniglot model on photographs, which are read as its own images: 28x28, grey and inverted.

    What is not at its default stands in the names of the files and in results.json.
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


def test_queries_normalised_with_the_support_set(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """What a test says of each query image does not depend on the others; its files say that it is so."""
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


def test_omniglot_tasks_for_a_model_of_photographs(omniglot, own_run, few_test_tasks):
    """They keep their rotations, and are read as photographs: in colour, and paper is 1."""
    flags = *own_run.flags, "--train=False", "--test_datasource=omniglot", f"--test_data_path={omniglot}"
    assert f"Images of {omniglot}, read as 16x16x3: val " in run(*flags)
    images = DATASETS["omniglot"].images._replace(size=(16, 16), channels=3, invert=False, any_size=True)
    network = networks.NETWORKS["miniimagenet"]((16, 16, 3), 5, "batch_norm", 4, True)
    maml = maml_of(network, functools.partial(xent, shot=1), accuracy, inner_lr=0.01, inner_steps=1)
    runs.Run(own_run.folder).restore(maml, str(own_run.folder / "model0"))
    tasks = ImageTasks.from_folder(images, omniglot, ("val",), 5, 1, 1).draw(0, "val", 0, 4)
    (path,) = own_run.folder.glob("val_ubs1_stepsize0.01_omniglot_trained-*.pkl")
    found = read_pickle(path)
    np.testing.assert_allclose(found, maml.evaluate(tasks, 10).accuracies, atol=1e-6)


def test_an_earlier_checkpoint(sinusoid_run, few_test_tasks, tmp_path):
    means = {}
    for iteration in (1000, 2001, -1):
        results = tmp_path / str(iteration)
        flags = "--train=False", "--test_set=True", f"--test_iter={iteration}", f"--results_dir={results}"
        assert f"model{2001 if iteration == -1 else iteration}\n" in run(*sinusoid_run.flags, *flags)
        means[iteration] = read_csv(results / "test_ubs5_stepsize0.001.csv")[1][0]
    np.testing.assert_array_equal(means[2001], means[-1])  # and the tasks are always the same ones
    assert not np.array_equal(means[1000], means[-1])


def test_the_best_checkpoint(omniglot_run, sinusoid_run, few_test_tasks, tmp_path):
    """--test_iter=best; results.json says which checkpoint it was, and what validation found."""
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
def test_defaults_of_a_data_set(name, omniglot, miniimagenet_like, tmp_path):
    """A flag that is given, then the data set's row, then the original's default; told, and recorded."""
    flags = f"--datasource={name}", "--metatrain_iterations=0", "--image_size=28"
    flags += (f"--data_path={omniglot if name == 'omniglot' else miniimagenet_like}",)
    printed = run(*flags, f"--logdir={tmp_path / 'a'}")
    expected = ORIGINAL if name in ("sinusoid", "omniglot", "miniimagenet") else PHOTOGRAPHS
    recorded = json.loads((only_run(tmp_path / "a") / "flags.json").read_text())
    assert {flag: recorded[flag] for flag in expected} == expected
    assert recorded["norm"] == (None if name == "sinusoid" else "batch_norm")
    told = re.findall(rf"^Defaults of --datasource={name}: (.*)$", printed, re.MULTILINE)
    expected = {"norm": None} if name == "sinusoid" else {} if expected is ORIGINAL else expected
    assert " ".join(told).split() == [f"--{flag}={value}" for flag, value in expected.items()]

    given = [f"--{flag}={value}" for flag, value in ORIGINAL.items()]
    assert "Defaults" not in run(*flags, *given, "--norm=batch_norm", f"--logdir={tmp_path / 'b'}")
    recorded = json.loads((only_run(tmp_path / "b") / "flags.json").read_text())
    assert {flag: recorded[flag] for flag in ORIGINAL} == ORIGINAL


def test_the_data_sets_own_size_is_no_other_run(omniglot, tmp_path):
    flags = "--datasource=omniglot", f"--data_path={omniglot}", "--metatrain_iterations=0", f"--logdir={tmp_path}"
    run(*flags)
    run(*flags, "--image_size=28", "--image_channels=1")
    assert only_run(tmp_path).name == "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm"
    run(*flags, "--image_size=32", "--image_channels=3")
    assert {path.name for path in tmp_path.iterdir()} == {
        "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm",
        "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001batchnorm.size32.channels3",
    }


# -- killed, stopped, resumed -----------------------------------------------------------------------------------------

BOTH_PHASES = "--pretrain_iterations=330", "--metatrain_iterations=270", "--norm=None", "--save_interval=299"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Finished:
    return finished(tmp_path_factory.mktemp("uninterrupted"), *BOTH_PHASES)


def signal_at(monkeypatch, iteration: int, *numbers: int, when: str = "scalars") -> None:
    """These signals arrive while the summary of an iteration is written; or when="flags": before any."""

    original = getattr(Events, when)

    def write(events, at, values):
        if at == iteration:
            for number in numbers:
                signal.raise_signal(number)
        original(events, at, values)

    monkeypatch.setattr(Events, when, write)


@pytest.mark.parametrize(("number", "iteration"), [(signal.SIGTERM, 100), (signal.SIGINT, 400)])
def test_stop_and_resume(uninterrupted, monkeypatch, tmp_path, number, iteration):
    """Stopped in pretraining and in meta-training: saved at once, and the same command goes on."""
    flags = f"--logdir={tmp_path}", *BOTH_PHASES
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, iteration, number)
        prefix = saved_by(number, start_main(*flags))
    assert signal.getsignal(number) is before
    folder = only_run(tmp_path)
    assert str(prefix) == runs.Run(folder).checkpoint()
    assert prefix.name in (f"model{iteration - 1}", f"model{iteration + 99}")  # a hundred steps are one program
    assert f"Restoring model weights from {prefix}\n" in run(*flags)
    assert_same_ending(folder, uninterrupted.folder)
    assert scalars(folder) == scalars(uninterrupted.folder)


def test_stop_before_the_first_step(uninterrupted, monkeypatch, tmp_path):
    """Where most time passes before anything is done: while the first programs are compiled."""
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


def test_stop_before_the_only_step(monkeypatch, tmp_path):
    """The last iteration is always saved, but not if it was not taken."""
    signal_at(monkeypatch, 0, signal.SIGINT, when="flags")
    stopped = start_main("--norm=None", "--metatrain_iterations=1", f"--logdir={tmp_path}")
    assert "before the first step, nothing to save." in stopped.out
    assert not list(only_run(tmp_path).glob("model*"))


def test_stop_and_resume_on_images(omniglot_run, monkeypatch, tmp_path):
    flags = *omniglot_run.flags, f"--logdir={tmp_path}"
    with monkeypatch.context() as patch:
        signal_at(patch, 400, signal.SIGTERM)
        prefix = saved_by(signal.SIGTERM, start_main(*flags))
    assert f"Restoring model weights from {prefix}\n" in run(*flags)
    assert_same_ending(only_run(tmp_path), omniglot_run.folder)
    assert scalars(only_run(tmp_path)) == scalars(omniglot_run.folder)


def test_stop_in_a_validation(omniglot_run, monkeypatch, tmp_path):
    """It is broken off, so that the signal does not wait for it, and made by the process that goes on."""
    flags = *omniglot_run.flags, f"--logdir={tmp_path}"
    drawn = []

    def draw(data, seed, split, first, count, draw=ImageTasks.draw):
        if split == "val" and count > 1:  # of one task pictures are drawn
            drawn.append(first)
            if len(drawn) == 1:
                signal.raise_signal(signal.SIGTERM)
        return draw(data, seed, split, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTasks, "draw", draw)
        assert saved_by(signal.SIGTERM, start_main(*flags)).name == "model500"
    assert drawn == [0]
    assert "Validation results" in run(*flags)
    assert_same_ending(only_run(tmp_path), omniglot_run.folder)  # what is the best is a part of it
    assert scalars(only_run(tmp_path)) == scalars(omniglot_run.folder)


def test_a_second_ctrl_c_ends_at_once(monkeypatch, tmp_path):
    signal_at(monkeypatch, 100, signal.SIGINT, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        ended = start_main(f"--logdir={tmp_path}", *BOTH_PHASES)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.err) == (128 + signal.SIGINT, "")
    assert models(only_run(tmp_path)) == []


def test_a_finished_run_says_so(omniglot_run):
    before = contents(omniglot_run.folder)
    printed = run(*omniglot_run.flags)
    assert "Nothing left to do: 510 of 510 iterations are done." in printed
    assert "--metatrain_iterations" in printed
    assert contents(omniglot_run.folder) == before


def test_more_iterations_go_on(uninterrupted, tmp_path):
    """As one run: the shorter one's end leaves no trace but its checkpoint."""
    flags = f"--logdir={tmp_path}", *BOTH_PHASES
    run(*flags, "--metatrain_iterations=50")
    folder = only_run(tmp_path)
    assert f"Restoring model weights from {folder / 'model379'}\n" in run(*flags)
    assert models(folder) == ["model299", "model379", "model598", "model599"]
    assert_same_ending(folder, uninterrupted.folder)
    assert scalars(folder) == scalars(uninterrupted.folder)


def test_zero_iterations(tmp_path):
    assert "Nothing left to do: 0 of 0 iterations are done." in run(f"--logdir={tmp_path}", "--metatrain_iterations=0")


# -- a run by its folder ----------------------------------------------------------------------------------------------


def test_run_resumes_and_tests_as_the_flags_do(uninterrupted, few_test_tasks, tmp_path):
    run(f"--logdir={tmp_path}", *BOTH_PHASES, "--metatrain_iterations=50")
    folder = only_run(tmp_path)
    named = f"--run={folder}"
    assert "Nothing left to do" in run(named)
    run(named, "--metatrain_iterations=270", "--save_interval=299")
    assert_same_ending(folder, uninterrupted.folder)

    for name, flags in ("typed", [f"--logdir={tmp_path}", *BOTH_PHASES]), ("run", [named]):
        run(*flags, "--train=False", "--test_set=True", f"--results_dir={tmp_path / 'results' / name}")
    typed, by_folder = (contents(tmp_path / "results" / name) for name in ("typed", "run"))
    assert {path.name: content for path, content in typed.items()} == {
        path.name: content for path, content in by_folder.items()
    }


def test_run_finds_its_images_and_takes_the_flags_of_a_test(own_run, own_images, few_test_tasks, tmp_path):
    folder = shutil.copytree(own_run.folder, tmp_path / "renamed")
    run(f"--run={folder}", "--train=False", "--update_batch_size=2", "--num_query=1", "--test_updates=3")
    entry = json.loads((folder / "results.json").read_text())[-1]
    assert (entry["support_examples_a_class_K"], entry["query_examples_a_class_Q"]) == (2, 1)
    assert len(entry["results"]) == 4
    assert "Images of " + str(own_images) in run(f"--run={folder}", "--train=False", f"--data_path={own_images}")


@pytest.mark.parametrize(
    "flag", ["--update_lr=0.2", "--num_classes=3", "--logdir=elsewhere", "--datasource=omniglot", "--seed=1"]
)
def test_a_flag_that_contradicts_the_run_is_refused(flag, own_run):
    assert flag.partition("=")[0] in refusal(f"--run={own_run.folder}", flag)
    if flag != "--update_lr=0.2":  # a test may have another alpha
        assert flag.partition("=")[0] in refusal(f"--run={own_run.folder}", "--train=False", flag)


def test_run_remembers_where_a_published_data_set_is(omniglot_run, few_test_tasks, tmp_path):
    folder = shutil.copytree(omniglot_run.folder, tmp_path / "run")
    assert "Images of " in run(f"--run={folder}", "--train=False")


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


def test_a_test_of_a_published_model_leaves_it_as_it_was(few_test_tasks, monkeypatch, sinusoid_run, tmp_path):
    published = tmp_path / "logs" / "published"
    folder = shutil.copytree(sinusoid_run.folder, published / sinusoid_run.folder.name)
    monkeypatch.setattr(main, "ROOT", tmp_path)
    before = contents(folder)
    run(f"--run={folder}", "--train=False", "--test_set=True")
    assert contents(folder) == before
    assert (tmp_path / "logs" / "tests" / folder.name / "results.json").exists()


# -- flags take effect ------------------------------------------------------------------------------------------------


def test_the_bare_command_trains(tmp_path):
    """The original's crashes: its default norm does not work on the sinusoid. Ours takes None, and says so."""
    printed = run("--metatrain_iterations=2", f"--logdir={tmp_path}")
    assert "norm=None" in printed
    assert only_run(tmp_path).name == "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm"
    assert models(only_run(tmp_path)) == ["model1"]


def test_a_norm_that_is_asked_for_on_the_sinusoid(few_test_tasks, tmp_path):
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
def test_a_flag_reaches_the_training(flag, three_steps, tmp_path):
    iterations = 2 if flag.startswith("pretrain") else 3
    folder = finished(tmp_path, f"--{flag}", f"--metatrain_iterations={iterations}").folder
    w1 = "model/Variable"
    assert not np.array_equal(variables(folder, "model2")[w1], three_steps[w1])


def test_a_step_takes_the_next_tasks_of_the_stream(tmp_path):
    """Iteration t is of tasks t * T .. t * T + T - 1: put together by hand."""
    found = variables(finished(tmp_path, "--metatrain_iterations=3", "--seed=3").folder, "model2")
    maml = maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1, seed=3)
    for t in range(3):
        maml.train_step(SinusoidTasks(5, 5).draw(3, "train", 25 * t, 25))
    for name, weight in maml.weights.items():
        np.testing.assert_allclose(found[maml.keys[name]], weight, atol=1e-6)


@pytest.mark.parametrize(("iteration", "updates"), [(0, 5), (300, 1)])
def test_a_summary_is_of_the_tasks_at_hand(uninterrupted, iteration, updates):
    """Of its iteration's tasks, by the weights that the steps before left; the whole curve every 1,000 iterations."""
    maml = maml_of(networks.fc(1, (40, 40), 1, norm=None, tiny=True), mse, inner_lr=0.001, inner_steps=1)
    if iteration:
        runs.Run(uninterrupted.folder).restore(maml, str(uninterrupted.folder / f"model{iteration - 1}"))
    tasks = SinusoidTasks(5, 5).draw(0, "train", 25 * iteration, 25)
    before, *after = np.mean(maml.evaluate(tasks, updates).losses, 0)
    expected = {"metatrain_Pre-update_loss": before}
    expected |= {f"metatrain_Post-update_loss__step_{j}": loss for j, loss in enumerate(after, 1)}
    points = {tag: dict(points) for tag, points in scalars(uninterrupted.folder).items()}
    found = {tag: points[tag][iteration] for tag in points if "update_loss" in tag and iteration in points[tag]}
    assert found == pytest.approx(expected, rel=1e-5)


def test_threads_change_no_number(small, monkeypatch, tmp_path):
    """Tasks side by side are computed as one after the other. (--op_threads does change numbers, and says so.)"""
    # TensorFlow has started, and takes no other number.
    monkeypatch.setattr(devices, "start", lambda *threads, **settings: None)
    folders = [finished(tmp_path / n, *small, "--metatrain_iterations=3", f"--threads={n}").folder for n in "14"]
    assert_same_ending(*folders)


def test_training_is_the_same_every_time(three_steps, tmp_path):
    again = variables(finished(tmp_path, "--metatrain_iterations=3").folder, "model2")
    for name, value in three_steps.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_without_log_there_are_no_events(tmp_path):
    run("--log=False", "--metatrain_iterations=2", f"--logdir={tmp_path / 'not' / 'there' / 'yet'}")
    folder = only_run(tmp_path / "not" / "there" / "yet")
    assert models(folder) == ["model1"]
    assert not list(folder.glob("*tfevents*"))


@pytest.mark.parametrize("name", ["my models/model7.index \u00e9 \u8a66", "*? {a,b}"])
def test_any_folder_name_will_do(name, few_test_tasks, tmp_path):
    """To train, resume and test in. The original looks for "model" in the whole path."""
    logdir = tmp_path / name
    folder = finished(logdir, "--metatrain_iterations=2").folder
    printed = run("--metatrain_iterations=3", f"--logdir={logdir}")
    assert f"Restoring model weights from {folder / 'model1'}\n" in printed
    run("--train=False", f"--logdir={logdir}")
    assert models(folder) == ["model1", "model2"]
    assert (folder / "val_ubs5_stepsize0.001.csv").exists()
    assert {step for points in scalars(folder).values() for step, _ in points} == {0}


@pytest.mark.parametrize("name", ["runs [1]", "back\\slash"])
def test_a_folder_name_that_tensorflow_cannot_read_from(name, tmp_path):
    """It writes checkpoints there, but takes the path for a pattern when it reads them: said before any work."""
    line = refusal("--metatrain_iterations=2", f"--logdir={tmp_path / name}")
    assert str(tmp_path / name) in line
    assert "--logdir" in line
    assert list(tmp_path.iterdir()) == []


def test_validation_on_the_test_classes(miniimagenet_like, tmp_path):
    """--test_set=True while training: the validation classes are not even looked at."""
    for split in ("train", "test"):
        (tmp_path / "data" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(miniimagenet_like / split)
    flags = "--datasource=miniimagenet", f"--data_path={tmp_path / 'data'}", "--metatrain_iterations=0"
    assert "Nothing left to do" in run(*flags, "--test_set=True", f"--logdir={tmp_path / 'logs'}")
    line = refusal(*flags, f"--logdir={tmp_path / 'logs'}")
    assert str(tmp_path / "data" / "val") in line


def test_the_test_classes_choose_no_best(small, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "VALIDATION_INTERVAL", 1)
    printed = run(*small, "--test_set=True", "--metatrain_iterations=3", f"--logdir={tmp_path}")
    assert printed.count("Validation results: ") == 2
    assert "Best" not in printed
    assert models(only_run(tmp_path)) == ["model2"]


# -- bad input --------------------------------------------------------------------------------------------------------


WRONG_FLAGS = {
    "above 0": "update_lr=nan update_lr=-0.1 update_lr=0 update_lr=inf meta_lr=0 meta_lr=nan train_update_lr=0",
    "within float32": "meta_lr=1e+40 update_lr=1e-50",
    "1 or more": "meta_batch_size=0 update_batch_size=0 num_updates=0 num_filters=0 val_tasks=0 save_interval=0 "
    "op_threads=0 num_query=0 train_update_batch_size=0 test_tasks=0 image_size=0",
    "2 or more": "num_classes=1 num_classes=-5",
    "0 or more": "pretrain_iterations=-1 metatrain_iterations=-1 threads=-1",
    "must be": "seed=-1 seed=9223372036854775808 eval_seed=-1",
    "1 or 3": "image_channels=2",
    "e.g. 64,16,20": "split=64,16 split=a,b,c split=64,16,-20",
    "-1 for the latest, or best": "test_iter=-2",
    "invalid literal": "metatrain_iterations=ten test_iter=worst test_iter=1.5",
    "could not convert": "meta_lr=fast",
    "boolean": "log=maybe",
    "<sinusoid|omniglot|miniimagenet|cifarfs|fc100|cub|tieredimagenet|folder>": "datasource=omniglott",
    "<omniglot|miniimagenet|cifarfs|fc100|cub|tieredimagenet|folder>": "test_datasource=sinusoid",
    "<batch_norm|layer_norm|None>": "norm=batchnorm",
    "<oracle>": "baseline=orcale",
}
REASONS = [(flag, reason) for reason, flags in WRONG_FLAGS.items() for flag in flags.split()]


@pytest.mark.parametrize(("flag", "reason"), REASONS)
def test_a_wrong_flag(flag, reason, tmp_path):
    line = refusal(f"--logdir={tmp_path}", f"--{flag}")
    name, value = flag.split("=")
    for part in (name, value, reason):
        assert part in line
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag(tmp_path):
    line = refusal(f"--logdir={tmp_path}", "--metatrain_iteration=5")
    assert "Unknown command line flag 'metatrain_iteration'. Did you mean: metatrain_iterations" in line


def test_a_flag_without_its_equals_sign(tmp_path):
    """`--train False` means --train=True and an argument; absl would ignore the argument."""
    line = refusal(f"--logdir={tmp_path}", "--train", "False")
    assert "False: " in line


def test_the_oracle_is_the_sinusoids(small, tmp_path):
    line = refusal(*small, "--baseline=oracle", f"--logdir={tmp_path}")
    assert "--baseline=oracle" in line


def test_no_data_folder(small, tmp_path):
    line = refusal(*small, f"--data_path={tmp_path / 'none'}", f"--logdir={tmp_path}")
    assert f"{tmp_path / 'none'}: " in line
    assert "data/omniglot_resized/resize_images.py" in line
    assert "--data_path" in line
    assert not list(only_run(tmp_path).glob("[!.]*"))  # nothing is recorded before all is checked


def test_an_empty_data_folder(small, tmp_path):
    (tmp_path / "data").mkdir()
    line = refusal(*small, f"--data_path={tmp_path / 'data'}", f"--logdir={tmp_path}")
    assert f"{tmp_path / 'data'}: " in line


def test_more_ways_than_classes(small, omniglot, tmp_path):
    line = refusal(*small, "--num_classes=21", f"--logdir={tmp_path}")
    assert "--num_classes=21" in line and str(omniglot) in line


@pytest.fixture
def own_images(miniimagenet_like, tmp_path) -> Path:
    """A copy to spoil."""
    shutil.copytree(miniimagenet_like, tmp_path / "data")
    return tmp_path / "data"


def small_miniimagenet(folder: Path, logdir: Path) -> list[str]:
    return [
        *("--datasource=miniimagenet", f"--data_path={folder}", f"--logdir={logdir}", "--num_filters=4"),
        *("--update_batch_size=1", "--metatrain_iterations=1", "--meta_batch_size=1"),
    ]


def test_a_class_with_too_few_images(own_images, tmp_path):
    for path in sorted((own_images / "val" / "n00000008").iterdir())[5:]:
        path.unlink()
    line = refusal(*small_miniimagenet(own_images, tmp_path / "logs"))
    assert all(part in line for part in (str(own_images), "n00000008", "--update_batch_size", "--num_query"))


def test_an_image_that_cannot_be_read(own_images, tmp_path):
    image = own_images / "train" / "n00000003" / "007.jpg"
    os.truncate(image, 500)
    line = refusal(*small_miniimagenet(own_images, tmp_path / "logs"))
    assert f"{image}: " in line and "--skip_broken" in line


def test_an_image_of_another_size(own_images, tmp_path):
    image = own_images / "train" / "n00000003" / "007.jpg"
    Image.new("RGB", (80, 64)).save(image)
    line = refusal(*small_miniimagenet(own_images, tmp_path / "logs"))
    assert f"{image}: " in line and "--image_size" in line
    flags = *small_miniimagenet(own_images, tmp_path / "logs"), "--metatrain_iterations=0"
    assert "Nothing left to do" in run(*flags, "--image_size=84")


def test_other_images_of_another_size_at_test(own_images, miniimagenet_like, few_test_tasks, tmp_path):
    """They are refused, and --image_size is the way out, also where it is the data set's own and names no other run."""
    for image in sorted((own_images / "test").glob("*/*.jpg"))[::7]:
        Image.new("RGB", (80, 64)).save(image)
    flags = small_miniimagenet(miniimagenet_like, tmp_path / "logs")
    run(*flags)
    flags += "--train=False", "--test_set=True", "--test_datasource=cub", f"--test_data_path={own_images}"
    assert "--image_size" in refusal(*flags)
    assert f"Images of {own_images}, read as 84x84x3: test 6 classes, 144 images." in run(*flags, "--image_size=84")
    names, task, _ = plot.answered_task(only_run(tmp_path / "logs"), 1, 0, own_images)
    assert len(names) == 5 and task.query_x.shape == (25, 84, 84, 3)


def test_another_folder_is_another_run(own_run, miniimagenet_like, tmp_path):
    (tmp_path / "moved").symlink_to(miniimagenet_like)
    assert_refused(
        own_run,
        f"--data_path={miniimagenet_like} there, {tmp_path / 'moved'} here",
        *own_run.flags,
        f"--data_path={tmp_path / 'moved'}",
    )
    assert_refused(own_run, "--split=None there, 2,2,2 here", "--split=2,2,2")


def test_a_folder_without_its_path(small, sinusoid_run, tmp_path):
    line = refusal("--datasource=folder", f"--logdir={tmp_path}")
    assert "--datasource=folder" in line and "--data_path" in line
    flags = *sinusoid_run.flags, "--train=False"
    assert "--test_data_path" in refusal(*flags, "--test_data_path=images")
    line = refusal(*flags, "--test_datasource=cub")
    assert "--test_datasource=cub" in line


def test_another_way_at_test(omniglot_run):
    """The last layer has as many outputs as training had classes."""
    line = refusal(*omniglot_run.flags, "--train=False", "--num_classes=4")
    assert str(omniglot_run.folder) in line
    assert "--num_classes" in line


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Finished:
    with not_compiled():
        return finished(tmp_path_factory.mktemp("two_steps"), "--metatrain_iterations=2", "--norm=None")


@pytest.fixture
def held(two_steps, tmp_path) -> Finished:
    """A run to refuse, or to spoil."""
    folder = shutil.copytree(two_steps.folder, tmp_path / "logs" / two_steps.folder.name)
    return Finished([f"--logdir={tmp_path / 'logs'}", *two_steps.flags[1:]], folder, two_steps.printed)


def assert_refused(run: Finished, message: str, *flags: object) -> None:
    """By this message; and of the run nothing is changed."""
    before = contents(run.folder)
    line = refusal(*run.flags, *flags)
    assert message in line
    assert str(run.folder) in line
    assert contents(run.folder) == before


def test_another_runs_folder(held, small):
    assert_refused(held, "--num_query=-1 there, 7 here", "--num_query=7")
    same_name = "--norm=None", "--num_filters=64", "--meta_batch_size=25", "--update_batch_size=5", "--update_lr=0.001"
    assert_refused(held, "--datasource=sinusoid there, omniglot here", *small, *same_name)
    assert_refused(held, "--datasource=sinusoid there, omniglot here", *small, *same_name, "--train=False")


def test_resume_false_on_a_run(held):
    assert_refused(held, "--resume=False", "--resume=False")


def test_a_missing_test_iter(held):
    assert_refused(held, "--test_iter=0", "--train=False", "--test_iter=0")


def test_no_checkpoint_at_test(held, tmp_path):
    """The original tests random weights silently."""
    line = refusal("--norm=None", "--update_lr=0.5", "--train=False", *held.flags[:1])
    assert f"{held.folder.parent / 'cls_5.mbs_25.ubs_5.numstep1'}" in line
    assert held.folder.name in line
    assert str(tmp_path / "none") in refusal("--train=False", f"--logdir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_the_checkpoint_of_another_network(held, small):
    """A folder without a record, as the released model's: variables and shapes are asserted."""
    (held.folder / "flags.json").unlink()
    same_name = "--norm=None", "--num_filters=64", "--meta_batch_size=25", "--update_batch_size=5", "--update_lr=0.001"
    assert_refused(held, str(held.folder / "model1"), *small, *same_name, "--train=False")
    assert_refused(held, "--logdir", "--metatrain_iterations=3")


def test_a_damaged_checkpoint(held, few_test_tasks, three_steps):
    """The one before is used, aloud, and the end is the same; one that is asked for by its iteration is refused."""
    run(*held.flags, "--metatrain_iterations=3")
    os.truncate(held.folder / "model2.data-00000-of-00001", 50)
    assert_refused(held, f"{held.folder / 'model2'}: ", "--train=False", "--test_iter=2")
    for flags in (["--train=False"], ["--metatrain_iterations=3"]):
        ended = start_main(*held.flags, *flags)
        assert ended.code == 0
        assert ended.err.startswith(f"WARNING: {held.folder / 'model2'}: ")
        assert f"Restoring model weights from {held.folder / 'model1'}\n" in ended.out
    for name, value in variables(held.folder, "model2").items():
        np.testing.assert_array_equal(value, three_steps[name], err_msg=name)


def test_a_loss_that_is_no_number(tmp_path):
    line = refusal("--update_lr=1e30", "--metatrain_iterations=3", f"--logdir={tmp_path}")
    assert "the loss at iteration 0 is" in line and "--meta_lr" in line
    assert models(only_run(tmp_path)) == []


def test_weights_that_are_no_numbers(held, monkeypatch):
    """Between two summaries: they are looked at before they are saved."""

    def restore_newest(run, maml, restore_newest=runs.Run.restore_newest):
        prefix = restore_newest(run, maml)
        maml.weights["w1"].assign(np.nan * maml.weights["w1"])
        return prefix

    monkeypatch.setattr(runs.Run, "restore_newest", restore_newest)
    line = refusal(*held.flags, "--metatrain_iterations=9")
    assert str(held.folder / "model1") in line
    assert models(held.folder) == ["model1"]


def test_a_run_in_use(held, few_test_tasks):
    with runs.Run(held.folder).locked():
        assert_refused(held, "--logdir", "--metatrain_iterations=3")
        run(*held.flags, "--train=False")
    run(*held.flags, "--metatrain_iterations=3")


class Stranger:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_system_without_file_locks(tmp_path):
    """As Windows, whose Python has no fcntl: training and testing work, and say that nothing is locked."""
    program = "import sys\nsys.modules['fcntl'] = None\nimport main\nmain.run(main.parse(sys.argv))"
    flags = "--metatrain_iterations=0", f"--logdir={tmp_path}"
    ended = end(spawn("-c", program, *flags, cwd=PROGRAM.parent))
    assert (ended.code, ended.err) == (0, "")
    assert "cannot be locked (this system has no file locks)" in ended.out


@pytest.mark.parametrize(("error", "one_line"), [(errno.ENOSPC, True), (errno.EACCES, True), (errno.ENOENT, False)])
def test_only_what_the_user_can_mend_is_one_line(monkeypatch, error, one_line):
    """A fault of the program itself has its traceback, also where it is an OSError."""

    def main_(*arguments):
        raise OSError(error, os.strerror(error), "somewhere")

    monkeypatch.setattr(main, "main", main_)
    if one_line:
        assert "somewhere" in refusal()
    else:
        with pytest.raises(OSError, match="somewhere"):
            start_main()


def test_a_reader_of_the_lines_who_has_enough(monkeypatch):
    """Such as head, behind a pipe."""

    def main_(*arguments):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(main, "main", main_)
    assert "stdout" in refusal()


def test_events_are_written_before_the_checkpoint_that_counts_on_them(monkeypatch, tmp_path):
    """A run that goes on from a checkpoint does not write the events before it again."""
    kept = {}

    def save(run, model, save=runs.Run.save):
        kept[int(model.step)] = [step for step, _ in scalars(run.folder).get("metatrain_Pre-update_loss", [])]
        return save(run, model)

    monkeypatch.setattr(runs.Run, "save", save)
    run("--metatrain_iterations=202", "--save_interval=100", f"--logdir={tmp_path}")
    assert kept == {101: [0, 100], 201: [0, 100, 200], 202: [0, 100, 200]}


def test_a_strangers_files_run_no_code(held, few_test_tasks, tmp_path):
    for name in ("val_ubs5_stepsize0.001.pkl", "model5.pkl", "model5.index", "model5.data-00000-of-00001"):
        (held.folder / name).write_bytes(pickle.dumps(Stranger(tmp_path / "made")))
    for flags in (["--train=False"], ["--metatrain_iterations=3"]):
        ended = start_main(*held.flags, *flags)
        assert ended.code == 0
        assert f"{held.folder / 'model5'}: " in ended.err
    for name in ("results.json", "flags.json"):
        (held.folder / name).write_bytes(pickle.dumps(Stranger(tmp_path / "made")))
        assert name in start_main(*held.flags, "--train=False").err
    assert not (tmp_path / "made").exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own, of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a disk that is full, or read-only, needs the right to mount one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk, two_steps, few_test_tasks, tmp_path):
    """While a run is recorded, saved or tested: one line, what is there stays, and with room again it goes on."""
    flags = "--norm=None", "--metatrain_iterations=16", "--save_interval=2"
    logdir = f"--logdir={small_disk / 'logs'}"
    line = refusal(*flags, logdir)
    folder = only_run(small_disk / "logs")
    assert f"{folder}: " in line and "No space left on device" in line
    assert models(folder) != []

    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'more'}"], capture_output=True)  # to the last byte
    before = contents(small_disk)
    line = refusal(*two_steps.flags, "--train=False", f"--results_dir={small_disk}")
    assert f"{small_disk}: " in line and "No space left on device" in line
    assert "(No space left on device)" in refusal(*flags, logdir)
    left = contents(small_disk)
    assert before.items() <= left.items()
    assert not any(data for path, data in left.items() if path not in before)  # an event file was begun

    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert "Restoring model weights from" in run(*flags, logdir)
    assert_same_ending(folder, finished(tmp_path / "whole", *flags).folder)


def test_a_read_only_disk(small_disk, held, few_test_tasks):
    folder = shutil.copytree(held.folder, small_disk / held.folder.name)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    flags = *held.flags, f"--logdir={small_disk}"
    line = refusal(*flags, "--metatrain_iterations=3")
    assert f"{folder}: " in line and "--logdir" in line
    assert "--results_dir" in refusal(*flags, "--train=False")
    run(*flags, "--train=False", f"--results_dir={held.folder}")
    assert (held.folder / "val_ubs5_stepsize0.001.csv").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line_on_a_terminal(tmp_path):
    """How far, how fast, how long still, the last losses. The other lines are as they are without it."""
    flags = "--norm=None", "--metatrain_iterations=3", f"--logdir={tmp_path}"
    out, err = io.StringIO(), Terminal()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main.run(main.parse(["main.py", *flags]))
    last = err.getvalue().strip().split("\r")[-1]
    assert re.search(r"100%.* 3/3 \[00:\d\d<00:00, .*(iterations/s|s/ iterations), loss [\d.]+ -> [\d.]+\]", last)
    assert out.getvalue().splitlines()[-1].startswith("Done: 3 iterations")
    assert "\r" not in out.getvalue()


def test_folders_that_cannot_be_written(held, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    line = refusal("--norm=None", f"--logdir={file}")
    assert re.search(rf"{re.escape(str(file))}/cls_\S+: .* --logdir$", line)
    message = refusal(*held.flags, "--train=False", f"--results_dir={file / 'below'}")
    assert re.search(rf"{re.escape(str(file))}/below: .* --results_dir$", message)
    assert file.read_text() == "mine"


SLIPS = dict.fromkeys(("meta_batch_size", "update_batch_size", "num_query", "num_classes", "image_size"), 10**7)
SLIPS |= dict.fromkeys(("val_tasks", "test_tasks", "threads", "op_threads", "train_update_batch_size"), 10**7)
SLIPS |= {"num_filters": 10**6, "num_updates": 1000, "save_interval": 10**18, "metatrain_iterations": 10**18}
SLIPS |= {"pretrain_iterations": 10**18}


@pytest.mark.parametrize("flag", SLIPS)
def test_a_slip_of_a_flag_is_refused_before_any_work(flag, tmp_path):
    line = refusal(f"--logdir={tmp_path / 'logs'}", f"--{flag}={SLIPS[flag]}")
    assert f"--{flag}=" in line
    assert line.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_trillion_iterations_cost_no_memory(tmp_path, monkeypatch):
    """They are not listed: what is due when is computed."""

    def stop(kept, at, values):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Events, "scalars", stop)
    flags = "--norm=None", "--metatrain_iterations=1000000000000", "--save_interval=1", f"--logdir={tmp_path}"
    with not_compiled():
        assert saved_by(signal.SIGTERM, start_main(*flags)).parent == only_run(tmp_path)


def test_how_a_run_was_computed_is_recorded(tmp_path, monkeypatch):
    """Beside its flags, which do not change: a run may go on otherwise, with a warning."""
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
    assert str(folder) in line and "op_threads 1 there, 2 here" in line
    assert ended.code == 0
    recorded = json.loads((folder / "computed.json").read_text())
    assert recorded == [{"from_iteration": 0, **computed}, {"from_iteration": 3, **computed, "op_threads": 2}]
    assert json.loads((folder / "flags.json").read_text()).keys() == identity.keys()
    start_main(*flags, "--metatrain_iterations=4", "--train=False", "--test_tasks=2")
    (entry,) = json.loads((folder / "results.json").read_text())
    assert entry["computed"]["op_threads"] == 2


def test_long_folder_names_are_cut_in_file_names():
    """Shorter ones have the names that they always had."""
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
    assert len(short) < evaluate.MOST_NAME
