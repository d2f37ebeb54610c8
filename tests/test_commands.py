"""The paper's commands, the authors' model and the real networks, run by main.py."""

import contextlib
import functools
import json
import re

import numpy as np
import pytest

import main
import networks
import runs
from data_generator import ImageTasks
from recipe import DATASETS
from tests.helpers import maml_of, models, only_run, read_csv, read_pickle, refusal, run, tiny_networks, variables
from utils import accuracy, xent

SINUSOID = "--datasource=sinusoid --logdir=logs/sine/ "
MINIIMAGENET = "--datasource=miniimagenet --metatrain_iterations=60000 --meta_batch_size=4 "
DOCUMENTED = {
    SINUSOID + "--metatrain_iterations=70000 --norm=None --update_batch_size=10": (
        "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm",
        "ubs10_stepsize0.001",
        [1, 5, 10],
    ),
    SINUSOID
    + "--pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10 --baseline=oracle": (
        "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001oraclenonorm",
        "ubs10_stepsize0.001",
        [1, 5, 10],
    ),
    # Differs: a suffix. In the original this run has the folder of the first one.
    SINUSOID + "--pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10": (
        "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain",
        "ubs10_stepsize0.001",
        [1, 5, 10],
    ),
    "--datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4 "
    "--num_updates=1 --logdir=logs/omniglot5way/": (
        "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm",
        "ubs1_stepsize0.4",
        [3],
    ),
    "--datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=16 --update_batch_size=1 --num_classes=20 "
    "--update_lr=0.1 --num_updates=5 --logdir=logs/omniglot20way/": (
        "cls_20.mbs_16.ubs_1.numstep5.updatelr0.1batchnorm",
        "ubs1_stepsize0.1",
        [5],
    ),
    MINIIMAGENET + "--update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_classes=5 "
    "--logdir=logs/miniimagenet1shot/ --num_filters=32 --max_pool=True": (
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm",
        "ubs1_stepsize0.01",
        [10],
    ),
    MINIIMAGENET + "--update_batch_size=5 --update_lr=0.01 --num_updates=5 --num_classes=5 "
    "--logdir=logs/miniimagenet5shot/ --num_filters=32 --max_pool=True": (
        "cls_5.mbs_4.ubs_5.numstep5.updatelr0.01hidden32maxpoolbatchnorm",
        "ubs5_stepsize0.01",
        [10],
    ),
}


@pytest.mark.parametrize("command", DOCUMENTED)
@pytest.mark.usefixtures("generated_are_published")
def test_a_documented_command_trains_and_tests(command, few_test_tasks, omniglot, miniimagenet_like, tmp_path):
    name, results, paper = DOCUMENTED[command]
    iterations = 3 if "sinusoid" in command else 1
    flags = re.sub("iterations=[67]0000", f"iterations={iterations}", command)
    flags = flags.replace("--logdir=", f"--logdir={tmp_path}/").split()
    if "sinusoid" not in command:
        flags.append(f"--data_path={omniglot if 'omniglot' in command else miniimagenet_like}")

    slow = "--num_updates=5" in flags  # to trace: test_oracle.py tests these networks
    with tiny_networks() if slow else contextlib.nullcontext():
        assert "\nDone initializing, starting training.\n" in run(*flags)
        printed = run(*flags, "--train=False", "--test_set=True")
    folder = only_run(only_run(tmp_path / "logs"))
    assert folder.name == name
    assert models(folder) == [f"model{iterations - 1}"]

    assert f"Restoring model weights from {folder / f'model{iterations - 1}'}\n" in printed
    title = "Mean validation accuracy/loss, stddev, and confidence intervals"
    assert re.search(rf"^{title}\n\(array\(.*\), array\(.*\), array\(.*\)\)$", printed, re.MULTILINE | re.DOTALL)
    header, (means, stds, ci95) = read_csv(folder / f"test_{results}.csv")
    assert header == [f"update{j}" for j in range(11)]
    values = read_pickle(folder / f"test_{results}.pkl")
    assert values.shape == (4, 11)
    np.testing.assert_allclose(means, values.mean(0))
    np.testing.assert_allclose(stds, values.std(0), atol=1e-12)
    np.testing.assert_allclose(ci95, 1.96 * values.std(0) / 2, atol=1e-12)
    (entry,) = json.loads((folder / "results.json").read_text())
    assert entry["split"] == "test"
    assert entry["checkpoint"] == f"model{iterations - 1}"
    assert [result["updates"] for result in entry["results"] if result["the_papers_number"]] == paper
    np.testing.assert_allclose([result["mean"] for result in entry["results"]], means)


def test_the_originals_flags_keep_their_defaults():
    defaults = {
        **{"datasource": "sinusoid", "num_classes": 5, "baseline": None, "pretrain_iterations": 0},
        **{"metatrain_iterations": 15000, "meta_batch_size": 25, "meta_lr": 0.001, "update_batch_size": 5},
        **{"update_lr": 1e-3, "num_updates": 1, "norm": "batch_norm", "num_filters": 64, "conv": True},
        **{"max_pool": False, "stop_grad": False, "log": True, "logdir": "/tmp/data", "resume": True, "train": True},
        **{"test_iter": -1, "test_set": False, "train_update_batch_size": -1, "train_update_lr": -1},
    }
    assert len(defaults) == 23
    assert {name: main.FLAGS[name].default for name in defaults} == defaults


def test_the_released_model_is_found_and_tested(shared, miniimagenet_like, few_test_tasks, tmp_path):
    """The original's TensorFlow 1 checkpoint has no `checkpoint` file."""
    models = shared / "data" / "maml_checkpoint"
    flags = (
        *("--datasource=miniimagenet", "--update_batch_size=1", "--num_updates=5", "--update_lr=0.01"),
        *("--meta_batch_size=4", "--num_filters=32", "--max_pool", f"--logdir={models}"),
        *(f"--data_path={miniimagenet_like}", "--train=False", f"--results_dir={tmp_path}"),
    )
    assert "updatelr0.01hidden32maxpoolbatchnorm/model59000\n" in run(*flags, "--test_iter=59000")
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert entry["checkpoint"] == "model59000"
    network = networks.conv4((84, 84), 3, 5, 32, norm="batch_norm", max_pool=True, mean_head=False)
    maml = maml_of(network, functools.partial(xent, shot=1), accuracy, inner_lr=0.01, inner_steps=5)
    runs.Run(only_run(models)).restore(maml, str(only_run(models) / "model59000"))
    tasks = ImageTasks.from_folder(DATASETS["miniimagenet"].images, miniimagenet_like, ("val",), 5, 1, 1).draw(
        0, "val", 0, 4
    )
    means = [column["mean"] for column in entry["results"]]
    np.testing.assert_allclose(means, np.mean(maml.evaluate(tasks, 10).accuracies, 0), rtol=1e-6)


def test_noconv_trains_the_fully_connected_network_on_images(small, tmp_path):
    run(*small, "--noconv", "--metatrain_iterations=1", f"--logdir={tmp_path}")
    assert only_run(tmp_path).name.endswith("batchnorm.fc")
    assert variables(only_run(tmp_path), "model0")["model/Variable"].shape == (784, 256)


def test_miniimagenet_trains_without_max_pool(miniimagenet_like, tmp_path):
    """The original's last layer assumes max-pooling. Ours has the width after four strides of 2: 84 -> 6."""
    flags = "--datasource=miniimagenet", f"--data_path={miniimagenet_like}", "--num_filters=4", "--update_batch_size=1"
    run(*flags, "--update_lr=0.01", "--meta_batch_size=1", "--metatrain_iterations=1", f"--logdir={tmp_path}")
    stored = variables(only_run(tmp_path), "model0")
    assert stored["model/w5"].shape == (6 * 6 * 4, 5)


def test_images_too_small_for_the_network_are_refused(miniimagenet_like, tmp_path):
    line = refusal("--datasource=cub", f"--data_path={miniimagenet_like}", "--image_size=15", f"--logdir={tmp_path}")
    assert "15x15" in line and "--max_pool" in line and "--image_size" in line
    assert list(tmp_path.iterdir()) == []
