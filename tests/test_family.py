"""ANIL, BOIL, Meta-SGD and MAML++'s step sizes, against tests/reference.py, finite differences, and in whole runs."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

import networks
import predict
import publish
import recipe
import runs
from data_generator import ImageTasks, SinusoidTasks
from files import InputError
from maml import MAML
from networks import Network
from parallel import Layout
from recipe import Recipe
from tests import reference
from tests.helpers import (
    assert_same_ending,
    assert_slope,
    gradient_and_loss,
    in_float64,
    maml_of,
    random_tasks,
    read_pickle,
    refusal,
    run,
    trajectory,
)
from utils import Tasks, accuracy, mse, xent

LOSS = functools.partial(xent, shot=2)
TASKS = random_tasks(2, 6, 9, (9, 8, 2), 3)
CONV = {"max_pool": False, "mean_head": True, "norm": "batch_norm"}


def variant(kind: str, adapt: str, learned: str, steps: int, **options) -> MAML:
    """Return a model in float64 with random values of the learned step sizes."""
    build = {
        "conv": functools.partial(networks.conv4, (9, 8), 2, 3, 4, **CONV),
        "fc": functools.partial(networks.fc, 9 * 8 * 2, (8, 7), 3, norm="layer_norm"),
        "tiny": functools.partial(networks.fc, 9 * 8 * 2, (8, 7), 3, norm=None, tiny=True),
    }[kind]
    settings = {"inner_lr": 0.05, "inner_steps": steps, "learned": learned} | options
    maml = maml_of(networks.adapting(in_float64(build()), adapt), LOSS, accuracy, **settings)
    random = np.random.default_rng(3)
    for name, weight in maml.weights.items():
        if name.startswith("step_size"):
            weight.assign(random.uniform(0.02, 0.08, weight.shape))
    return maml


VARIANTS = [
    *[("conv", "head", "none", False), ("conv", "body", "none", False), ("conv", "all", "weight", False)],
    *[("conv", "all", "step", False), ("conv", "head", "step", True), ("fc", "body", "weight", True)],
    *[("tiny", "head", "none", False), ("tiny", "head", "weight", False), ("tiny", "all", "step", True)],
]


@pytest.mark.parametrize("kind, adapt, learned, first_order", VARIANTS)
def test_meta_gradient_equals_the_reference(kind, adapt, learned, first_order, eagerly):
    """The meta-gradient includes the step sizes. Losses agree up to one update more than in training."""
    maml = variant(kind, adapt, learned, 2, first_order=first_order)
    slow = functools.partial(reference.conv4, **CONV) if kind == "conv" else reference.fc
    if kind != "conv":
        slow = functools.partial(slow, norm={"fc": "layer_norm", "tiny": None}[kind])
    tasks = Tasks(*map(tf.constant, TASKS))

    def expected(steps):
        return reference.meta_gradient(
            slow, LOSS, maml.values(), tasks, 0.05, steps, first_order, adapt=adapt, learned=learned
        )

    losses = maml.evaluate(tasks, 3).losses
    for steps in (1, 2, 3):
        np.testing.assert_allclose(np.mean(losses[:, steps]), expected(steps)[0], rtol=1e-9)
    fast, reference_gradient = gradient_and_loss(maml, tasks)[0], expected(2)[1]
    assert fast.keys() == reference_gradient.keys()
    for name, value in fast.items():
        np.testing.assert_allclose(value, reference_gradient[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "adapt, learned", [("head", "none"), ("body", "none"), ("all", "weight"), ("all", "step"), ("head", "step")]
)
def test_meta_gradient_equals_finite_differences(adapt, learned, eagerly):
    maml, tasks = variant("conv", adapt, learned, 2), Tasks(*map(tf.constant, TASKS))
    gradient, _ = gradient_and_loss(maml, tasks)
    assert_slope(maml, tasks, gradient)


def test_a_body_that_does_not_adapt_is_computed_once(eagerly):
    """Once for the support set and once for the query set, for any number of updates."""
    batch_sizes = []
    network = variant("conv", "all", "none", 3).inner.network
    body = network.body

    def counted(weights, x):
        batch_sizes.append(x.shape[0])
        return body(weights, x)

    for adapt, sizes in (("head", [6, 9]), ("body", []), ("all", [])):
        adapting = networks.adapting(network._replace(body=counted), adapt)
        maml = maml_of(adapting, LOSS, accuracy, inner_lr=0.05, inner_steps=3)
        batch_sizes.clear()
        maml.evaluate(Tasks(*(part[:1] for part in TASKS)), 5)
        assert batch_sizes == sizes


@pytest.mark.parametrize(
    "kind, adapt, learned", [("conv", "head", "step"), ("fc", "all", "weight"), ("fc", "all", "step")]
)
def test_groups_equal_one_task_at_a_time(kind, adapt, learned, eagerly):
    tasks, results = Tasks(*(tf.constant(np.concatenate([part, part[::-1]])) for part in TASKS)), []
    for group in (1, 2, 0):
        maml = variant(kind, adapt, learned, 2, layout=Layout(group=group))
        results.append((gradient_and_loss(maml, tasks)[0], maml.evaluate(tasks, 3, "support").losses))
    expected_gradient, expected_losses = results[0]
    for gradient, losses in results[1:]:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
        for name, value in expected_gradient.items():
            np.testing.assert_allclose(gradient[name], value, atol=1e-12, rtol=1e-8, err_msg=name)


@pytest.mark.parametrize("adapt, learned", [("head", "weight"), ("body", "step")])
def test_compiled_steps_equal_single_steps(adapt, learned):
    """Three sinusoid steps with learned step sizes, in one program and one by one."""
    settings = Recipe(norm=None, adapt=adapt, learn_inner_lr=learned, inner_steps=2, inner_lr=0.01, meta_batch=4)
    compiled, single = recipe.build(settings), recipe.build(settings)
    drawn = SinusoidTasks(5, 5).draw(0, "train", 0, 12)
    stack = Tasks(*(part.reshape(3, 4, *part.shape[1:]) for part in drawn))
    compiled.many_steps(stack, tf.constant(0), tf.constant(3), False)
    for i in range(3):
        single.train_step(Tasks(*(part[i] for part in stack)))
    for name, weight in single.weights.items():
        np.testing.assert_allclose(compiled.weights[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)
    sizes = [weight for name, weight in single.weights.items() if name.startswith("step_size")]
    assert len(sizes) == len(single.inner.network.adapted)
    assert all(np.any(size != np.float32(0.01)) for size in sizes)


@pytest.mark.parametrize("learned", ["weight", "step"])
def test_step_sizes_begin_as_alpha(learned, eagerly):
    """One per element, or one per array and update, for a user's own network, which has no head or body."""
    network = networks.fc(1, (5,), 1, norm=None)._replace(adapted=None, head=(), body=None, last_layer=None)
    maml = maml_of(network, mse, inner_lr=0.05, inner_steps=3, learned=learned)
    weights = network.init(0)
    for name, weight in weights.items():
        size = maml.weights[f"step_size_{name}"].numpy()
        assert size.shape == (weight.shape if learned == "weight" else (3,))
        assert np.all(size == np.float32(0.05))
    assert len(maml.weights) == 2 * len(weights)
    maml.train_step(SinusoidTasks(5, 5).draw(0, "train", 0, 4))


def test_the_initial_weights_of_a_network_are_not_modified():
    """If init returned the same dict twice, the second model would have the step sizes of the first as weights."""
    weights = {"w": tf.constant(1.5)}
    network = Network(lambda seed: weights, lambda weights, x: weights["w"] * x)
    for _ in range(2):
        maml = maml_of(network, mse, inner_lr=0.05, inner_steps=1, learned="weight")
        assert list(maml.weights) == ["w", "step_size_w"]
    assert list(weights) == ["w"]


def test_misspelled_options_are_rejected():
    """A typo must not select another method: learned step sizes, BOIL, or the paper's normalization."""
    network = networks.fc(1, (5,), 1, norm=None)
    build = functools.partial(maml_of, network, mse, inner_lr=0.05, inner_steps=1)
    with pytest.raises(InputError, match="learn_inner_lr='weights'"):
        build(learned="weights")
    with pytest.raises(InputError, match="query_norm='suport'"):
        build().evaluate(SinusoidTasks(5, 5).draw(0, "train", 0, 4), 1, "suport")
    with pytest.raises(InputError, match="adapt='last'"):
        networks.adapting(network, "last")
    with pytest.raises(InputError, match="query_shares='uneven'"):
        ImageTasks(None, {}, 5, 1, 1, "uneven")
    for without in (network._replace(adapted=None), network._replace(head=())):
        for what in ("head", "body"):
            with pytest.raises(InputError, match=f"adapt={what}: "):
                networks.adapting(without, what)


def test_adapt_selects_the_adapted_weights():
    for adapt, adapted in (("all", 6), ("head", 2), ("body", 4)):
        assert len(recipe.build(Recipe(norm=None, adapt=adapt)).inner.network.adapted) == adapted


# -- whole runs --------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    flags: list[str]
    folder: Path


def flags_of(folder: Path, logdir: Path, adapt: str, learned: str) -> list[str]:
    return [
        *("--datasource=folder", f"--data_path={folder}", "--image_size=16", "--num_filters=4", "--num_updates=2"),
        *("--meta_batch_size=2", "--update_batch_size=1", "--meta_lr=0.01", f"--adapt={adapt}", f"--logdir={logdir}"),
        *(f"--learn_update_lr={learned}", "--num_query=1"),
    ]


@pytest.fixture(scope="module", params=[("head", "step"), ("all", "weight")], ids="-".join)
def trained(request, miniimagenet_like, tmp_path_factory) -> Trained:
    """A run trained for four steps."""
    logdir = tmp_path_factory.mktemp("family")
    flags = flags_of(miniimagenet_like, logdir, *request.param)
    run(*flags, "--metatrain_iterations=4")
    (folder,) = logdir.iterdir()
    return Trained(flags, folder)


def learned_and_initial(trained: Trained) -> tuple[MAML, MAML]:
    """Return the trained model, and one with the same weights but the initial step sizes."""
    trained_recipe, maml, _ = runs.load(trained.folder)
    initial = recipe.build(trained_recipe)
    for name, weight in maml.weights.items():
        if not name.startswith("step_size"):
            initial.weights[name].assign(weight)
    return maml, initial


def test_resume_restores_the_learned_step_sizes(trained, miniimagenet_like, tmp_path):
    """A run resumed after two steps ends like an uninterrupted one. The folder's name includes the method."""
    adapt, learned = (flag.partition("=")[2] for flag in trained.flags if flag.startswith(("--adapt", "--learn")))
    flags = flags_of(miniimagenet_like, tmp_path, adapt, learned)
    run(*flags, "--metatrain_iterations=2")
    run(*flags, "--metatrain_iterations=4")
    (folder,) = tmp_path.iterdir()
    assert_same_ending(folder, trained.folder)
    parts = f"{'.adapthead' if adapt == 'head' else ''}.learnlr{learned}"
    assert folder.name == f"cls_5.mbs_2.ubs_1.numstep2.updatelr0.01hidden4maxpoolbatchnorm{parts}.metalr0.01.size16"


def test_a_test_uses_the_learned_step_sizes(trained, tmp_path):
    flags = *trained.flags, "--metatrain_iterations=4", "--train=False", f"--results_dir={tmp_path}", "--test_tasks=3"
    run(*flags, "--test_updates=3")
    values = read_pickle(tmp_path / "val_ubs1_stepsize0.01_query1_tasks3_updates3.pkl")
    maml, initial = learned_and_initial(trained)
    trained_recipe = recipe.from_flags(json.loads((trained.folder / "flags.json").read_text()))
    (folder,) = (flag.partition("=")[2] for flag in trained.flags if flag.startswith("--data_path"))
    images = trained_recipe.dataset.images._replace(folder=folder, any_size=True)
    tasks = ImageTasks.from_folder(images, Path(folder), ("val",), 5, 1, 1).draw(0, "val", 0, 3)
    np.testing.assert_allclose(values, maml.evaluate(tasks, 3).accuracies, atol=1e-6)
    assert not np.allclose(maml.evaluate(tasks, 3).losses[:, 1:], initial.evaluate(tasks, 3).losses[:, 1:], rtol=1e-4)
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert entry["step_sizes_learned"] == trained_recipe.learn_inner_lr
    assert entry.get("adapted") == ("head" if trained_recipe.adapt == "head" else None)
    assert "--update_lr" in refusal(*flags, "--train_update_lr=0.02")


def test_predictions_use_the_learned_step_sizes(trained, tmp_path):
    """From the run folder, its published copy and its export, with one update more than in training."""
    random = np.random.default_rng(0)
    labeled, queries = (random.random((n, 16, 16, 3), np.float32) for n in (10, 7))
    labels = np.arange(10) % 5
    model = predict.load(trained.folder, updates=3, class_orders=1)
    adapted = model.adapt(labeled, labels)
    maml, initial = learned_and_initial(trained)
    task = Tasks(tf.constant(labeled), tf.one_hot(labels, 5), None, None)
    inner = maml.inner._replace(loss=functools.partial(xent, shot=2))
    expected, unlearned = (trajectory(inner, each.values(), task, 3) for each in (maml, initial))
    for weights, expected_weights in zip(adapted.trajectories[0], expected, strict=True):
        for name, value in expected_weights.items():
            np.testing.assert_allclose(weights[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.allclose(adapted.trajectories[0][-1]["w5"], unlearned[-1]["w5"], atol=1e-5)

    answers = adapted.predict(queries)
    predict.export(model, tmp_path / "exported")
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    probabilities = exported.adapt_and_predict(labeled, labels, queries)["probabilities"]
    np.testing.assert_allclose(probabilities, answers, atol=1e-6)
    if not (trained.folder / "results.json").exists():
        run(*trained.flags, "--metatrain_iterations=4", "--train=False", "--test_tasks=3")
    copy = publish.publish(trained.folder, tmp_path / "published")
    published = predict.load(copy, updates=3, class_orders=1).adapt(labeled, labels)
    np.testing.assert_allclose(published.predict(queries), answers, atol=1e-6)
