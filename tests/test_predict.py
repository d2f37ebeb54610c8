"""predict.py: the command and the library, on the published Omniglot model."""

import csv
import errno
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from PIL import Image, ImageOps

import plot
import predict
import recipe
import runs
from data_generator import ImageTasks
from files import InputError
from images import Classes, read_image
from maml import MAML, adapt
from networks import support_normalized
from recipe import DATASETS
from tests.helpers import unprivileged, without_start_up_lines
from utils import Tasks

PUBLISHED = predict.PUBLISHED / "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm"


@pytest.fixture(scope="module")
def model() -> predict.Model:
    return predict.load(PUBLISHED)


@pytest.fixture(scope="module")
def characters(omniglot_like, tmp_path_factory) -> Path:
    """labeled/<class>/: 1 to 5 drawings of five characters; unlabeled/<class>/: the other drawings.

    A dot at the bottom makes each of them unique.
    """
    root = tmp_path_factory.mktemp("characters")
    for shot, folder in enumerate(sorted(omniglot_like.glob("Alphabet_1/*"))[:5], start=1):
        for place, drawing in enumerate(sorted(folder.iterdir())):
            part = root / ("labeled" if place < shot else "unlabeled") / folder.name
            part.mkdir(parents=True, exist_ok=True)
            with Image.open(drawing) as image:
                image.putpixel((place, 27), 1 - image.getpixel((place, 27)) // 255)
                image.save(part / drawing.name)
    return root


def command(capsys, *arguments: object) -> tuple[str, str]:
    """Run the command, and return what it prints on stdout and on stderr."""
    capsys.readouterr()
    predict.main(list(map(str, arguments)))
    return capsys.readouterr()


def refusal(capsys, *arguments: object) -> str:
    """Run the command on bad input, and return its one-line error. Warnings may precede it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        predict.main(list(map(str, arguments)))
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("predict.py: ")
    return line


def test_command_prints_a_line_and_writes_a_row_for_each_image(characters, capsys, tmp_path):
    """Also, most predictions are right."""
    table = tmp_path / "answers.csv"
    out, err = command(capsys, PUBLISHED, f"--csv={table}", characters / "labeled", characters / "unlabeled")
    assert err == ""
    assert "model59999 of omniglot, 3 updates on 15 " in out
    assert "--normalise_with=support" in out
    header, *rows = csv.reader(io.StringIO(table.read_text()))
    classes = sorted(folder.name for folder in (characters / "labeled").iterdir())
    assert header == ["image", "class", "probability", *classes]
    assert [row[0] for row in rows] == sorted(map(str, (characters / "unlabeled").glob("*/*")))
    for path, answer, probability, *probabilities in rows:
        numbers = list(map(float, probabilities))
        assert sum(numbers) == pytest.approx(1, abs=1e-5)
        assert float(probability) == max(numbers) == numbers[classes.index(answer)]
        second = classes[np.argsort(numbers)[-2]]
        (line,) = (line for line in out.splitlines() if line.startswith(f"{path} "))
        assert line.split()[1] == answer and line.split()[4] == second
    right = [Path(row[0]).parent.name == row[1] for row in rows]
    assert np.mean(right) > 0.9


def test_batch_normalizes_all_images_together(characters, tmp_path):
    """Even if they exceed a chunk. An image that is named twice counts once."""
    labeled, unlabeled, table = characters / "labeled", characters / "unlabeled", tmp_path / "answers.csv"
    queries = sorted(unlabeled.glob("*/*"))
    assert len(queries) > predict.CHUNK
    model = predict.load(PUBLISHED, normalise_with="batch")
    predict.answer(model, str(labeled), [str(unlabeled), str(queries[0])], table)
    _, *rows = csv.reader(io.StringIO(table.read_text()))
    expected = _adapted(model, characters).predict(queries)
    np.testing.assert_allclose(np.array([row[3:] for row in rows], float), expected, atol=1e-6)


@pytest.mark.parametrize("loss", recipe.DEFINITIONS["loss"].accepts)
def test_loss_equals_the_training_loss_for_k_images_per_class(loss):
    trained = recipe.Recipe(data_set="omniglot", shot=2, filters=2, loss=loss)
    logits = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    labels = np.tile(np.eye(5, dtype=np.float32), (2, 1))
    maml = recipe.build(trained)
    expected = maml.inner.loss(logits, labels)
    model = predict.Model(trained, maml, "model0", 1, "support")
    np.testing.assert_allclose(model.inner.loss(logits, labels), expected, rtol=1e-6)


def test_support_makes_predictions_independent_of_other_images(model, characters):
    adapted = _adapted(model, characters)
    queries = sorted((characters / "unlabeled").glob("*/*"))
    together = adapted.predict(queries)
    np.testing.assert_allclose([adapted.predict([path])[0] for path in queries[::10]], together[::10], atol=1e-6)
    model = predict.load(PUBLISHED, normalise_with="batch")
    adapted = _adapted(model, characters)
    assert not np.allclose(adapted.predict(queries[:1])[0], adapted.predict(queries)[0], atol=0.01)
    pixels = model.inputs(model.read(queries))
    scores = [model.maml.inner.network.apply(trajectory[-1], pixels) for trajectory in adapted.trajectories]
    for order, columns, found in zip(scores, adapted.columns, adapted.predict_orders(queries), strict=True):
        np.testing.assert_allclose(found, tf.nn.softmax(order).numpy()[:, columns], atol=1e-6)


def _adapted(model, characters):
    labeled = sorted((characters / "labeled").glob("*/*"))
    return model.adapt(labeled, [path.parent.name for path in labeled])


def test_paths_and_arrays_give_the_same_predictions(model, characters):
    paths = sorted((characters / "labeled").glob("*/*"))
    labels = [path.parent.name for path in paths]
    pixels = np.stack([read_image(path, model.images) for path in paths])
    expected = model.adapt(paths, labels).predict(paths)
    for images in (pixels, pixels[..., 0], pixels / 255, np.float32(pixels / 255), list(pixels), tf.constant(pixels)):
        np.testing.assert_allclose(model.adapt(images, labels).predict(images), expected, atol=1e-5)


def test_preprocessing_is_bitwise_that_of_training(model, characters):
    """Pixels are divided by 255 and inverted."""
    paths = sorted((characters / "labeled").glob("*/*"))[:4]
    pixels = model.read(paths)
    images = DATASETS["omniglot"].images._replace(rotations=False)
    classes = Classes(["a", "b"], np.array([0, 2]), np.array([2, 2]), pixels)
    drawn = ImageTasks(images, {"test": classes}, way=2, shot=1, query=1).draw(0, "test", 0, 1)
    assert {x.tobytes() for x in drawn.support_x[0]} <= {x.tobytes() for x in model.inputs(pixels).numpy()}


def test_predictions_after_any_number_of_updates(model, characters):
    queries = sorted((characters / "unlabeled").glob("*/*"))[:5]
    adapted = _adapted(model, characters)
    one = _adapted(predict.load(PUBLISHED, updates=1), characters)
    assert {len(trajectory) for trajectory in adapted.trajectories} == {4}
    assert {len(trajectory) for trajectory in one.trajectories} == {2}
    np.testing.assert_allclose(adapted.predict(queries, updates=1), one.predict(queries), atol=1e-6)
    assert not np.allclose(adapted.predict(queries, updates=0), one.predict(queries), atol=0.01)
    for wrong in (-1, 4, 1.5, "1"):
        with pytest.raises(InputError, match=f"^updates={wrong}: .* 0 to 3"):
            adapted.predict(queries, wrong)
    for wrong in (-1, 201, 1.5, "1"):
        with pytest.raises(InputError, match=f"^updates={wrong}: .* 200"):
            predict.load(PUBLISHED, updates=wrong)


@pytest.mark.parametrize(
    "images, labels, named",
    [
        (np.zeros((5, 28, 28), np.uint8), "abcd", "^labels: .*4 labels .*5 images"),
        (np.zeros((6, 28, 28), np.uint8), "abcdef", "^labels: .*6 classes.* 5-way .*--num_classes=6"),
        (np.zeros((5, 28, 28), np.uint8), "aaaaa", "^labels: .*1 classes.* 5-way .* 2 to 5"),
        (np.zeros((5, 28, 28), np.uint8), np.eye(5), "^labels: .*ndarray"),
        (np.zeros((5, 28, 28), np.uint8), [0, 1, 2, 3, "e"], "^labels: .*int and str"),
        (np.zeros((5, 84, 84, 3), np.uint8), "abcde", r"^images: .*\[5, 84, 84, 3\].* \[n, 28, 28, 1\]"),
        (np.zeros((28, 28), np.uint8), "abcde", r"^images: .*\[28, 28\].* \[n, 28, 28, 1\]"),
        (np.zeros((0, 28, 28, 1), np.uint8), "", r"^images: .*\[0, 28, 28, 1\]"),
        (np.zeros((5, 28, 28), np.int64), "abcde", "^images: .*int64"),
        (np.full((5, 28, 28), 255.0), "abcde", "^images: .*255 to 255"),
        (np.full((5, 28, 28), np.nan), "abcde", "^images: .*nan to nan"),
        ([np.zeros((28, 28)), np.zeros((29, 28))], "ab", "^images: "),
        ("a.png", "a", "^images: a.png"),
        (7, "a", "^images: .*int"),
        ({"a.png"}, "a", "^images: .*set"),
        (iter(["a.png"]), "a", "^images: .*list_iterator"),
        (["nowhere.png"], "a", "nowhere.png"),
        (["nowhere.png", np.zeros((28, 28))], "ab", "^images: .*paths"),
        (np.zeros((5, 28, 28), np.uint8), 5, "^labels: .*int"),
    ],
)
def test_invalid_images_and_labels_are_refused(model, images, labels, named):
    with pytest.raises(InputError, match=named):
        model.adapt(images, list(labels) if isinstance(labels, str) else labels)


@pytest.mark.parametrize("way", [2, 4])
def test_fewer_classes_use_the_first_outputs(characters, way):
    model = predict.load(PUBLISHED, class_orders=1)
    folders = sorted((characters / "labeled").iterdir())[-way:]
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    labels = [path.parent.name for path in paths]
    queries = [path for folder in folders for path in sorted((characters / "unlabeled" / folder.name).iterdir())]
    adapted = model.adapt(paths, labels)
    assert adapted.classes == [folder.name for folder in folders]

    theta = {name: value[..., :way] if name in ("w5", "b5") else value for name, value in model.maml.values().items()}
    support_x = model.inputs(model.read(paths))
    support_y = tf.one_hot([adapted.classes.index(label) for label in labels], way)
    weights = adapt(model.inner, theta, Tasks(support_x, support_y, support_x, support_y), model.updates)
    scores = support_normalized(model.inner.network, weights, support_x, model.inputs(model.read(queries)))
    found = adapted.predict(queries)
    np.testing.assert_allclose(found, tf.nn.softmax(scores), atol=1e-5)
    right = found.argmax(1) == [adapted.classes.index(path.parent.name) for path in queries]
    assert right.mean() > 0.9


def sensitive(way: int = 5) -> tuple[recipe.Recipe, MAML]:
    """Return an untrained model. The order of the classes changes many of its answers."""
    trained = recipe.Recipe(data_set="omniglot", way=way, filters=4, inner_lr=0.1)
    return trained, recipe.build(trained)


@pytest.mark.parametrize("normalise_with", ["support", "batch"])
@pytest.mark.parametrize("way", [3, 5])
def test_answers_do_not_depend_on_the_names_of_classes_and_files(characters, normalise_with, way):
    """Bit for bit, with all class orders. With one, they do."""
    folders, names = sorted((characters / "labeled").iterdir())[:way], "abcde"[:way]
    queries = sorted((characters / "unlabeled").glob("*/*"))

    def answers(name_of, reverse, class_orders):
        model = predict.Model(*sensitive(), "model0", 3, normalise_with, class_orders)
        labeled = [(path, name) for folder, name in zip(folders, name_of, strict=True) for path in folder.iterdir()]
        adapted = model.adapt(*zip(*sorted(labeled, reverse=reverse), strict=True))
        assert adapted.classes == sorted(name_of)
        assert len(adapted.columns) == (1 if class_orders == 1 else way)
        return adapted.predict(queries)[:, [adapted.classes.index(name) for name in name_of]]

    others = [names[::-1], names[1:] + names[0], names[1] + names[0] + names[2:]]
    expected = answers(names, False, 0)
    for other in others:
        np.testing.assert_array_equal(answers(other, True, 0), expected)
    changed = [(answers(other, False, 1).argmax(1) != answers(names, False, 1).argmax(1)).any() for other in others]
    assert any(changed)


def test_class_orders_are_averaged(characters):
    """Each is one with the names that make it: every class has every output once."""
    paths = sorted((characters / "labeled").glob("*/*"))
    queries = sorted((characters / "unlabeled").glob("*/*"))[::4]
    labels = [path.parent.name for path in paths]
    trained = sensitive()
    adapted = predict.Model(*trained, "model0", 3, "support").adapt(paths, labels)
    found = adapted.predict_orders(queries)
    by_name = predict.Model(*trained, "model0", 3, "support", class_orders=1)
    assert sorted(map(sorted, adapted.columns.T.tolist())) == [list(range(5))] * 5
    for columns, probabilities in zip(adapted.columns, found, strict=True):
        renamed = [int(columns[adapted.classes.index(label)]) for label in labels]
        expected = by_name.adapt(paths, renamed).predict(queries)[:, columns]
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(adapted.predict(queries), found.mean(0), atol=1e-7)
    with pytest.raises(InputError, match=r"^class_orders=2: "):
        predict.load(PUBLISHED, class_orders=2)


def test_command_says_how_many_class_orders_agree(characters, capsys, tmp_path):
    folder, (trained, maml) = tmp_path / "run", sensitive()
    run = runs.Run(folder)
    maml.step.assign(1)
    with run.locked():
        run.record(recipe.to_flags(trained))
        run.save(maml)
    queries = sorted((characters / "unlabeled").glob("*/*"))[::9]
    adapted = _adapted(predict.load(folder), characters)
    orders = adapted.predict_orders(queries)
    agree = (orders.argmax(2) == orders.mean(0).argmax(1)).sum(0)
    assert len(set(agree)) > 1
    arguments = folder, characters / "labeled", *queries
    out, _ = command(capsys, *arguments)
    for path, count in zip(queries, agree, strict=True):
        assert f" {count}/5 " in next(line for line in out.splitlines() if line.startswith(f"{path} "))
    out, _ = command(capsys, *arguments, "--class_orders=1")
    assert "/5 " not in out.replace(str(characters), "")


def test_hold_out_classifies_labeled_images_that_the_model_was_not_adapted_to(characters):
    """One of each class at a time. Classes may have different numbers of images."""
    paths = sorted((characters / "labeled").glob("*/*"))[1:]  # 2, 3, 4 and 5 images of four classes
    labels = [path.parent.name for path in paths]
    model = predict.Model(*sensitive(), "model0", 3, "support")
    expected = []
    for turn in range(5):
        places = {name: [i for i, label in enumerate(labels) if label == name] for name in sorted(set(labels))}
        held = [own[turn] for own in places.values() if turn < len(own)]
        kept = [i for i in range(len(paths)) if i not in held]
        adapted = model.adapt([paths[i] for i in kept], [labels[i] for i in kept])
        answers = adapted.predict([paths[i] for i in held]).argmax(1)
        expected += [adapted.classes[answer] == labels[i] for answer, i in zip(answers, held, strict=True)]
    assert len(expected) == 14 and len(set(expected)) == 2
    assert model.hold_out(paths, labels).tolist() == expected
    assert model.hold_out(paths[1:], labels[1:]).shape == (0,)  # one image of the first class
    many = model.read([path for path in paths for _ in range(6)])
    assert model.hold_out(many, [label for label in labels for _ in range(6)]).shape == (40,)
    with pytest.raises(InputError, match=r"^labels: .*int"):
        model.hold_out(paths, 5)


def test_command_prints_the_accuracy_on_images_held_out(characters, capsys, tmp_path):
    """Before the answers, unless a class has only one image."""
    shutil.copytree(characters / "labeled", tmp_path / "labeled")
    query, labeled = next((characters / "unlabeled").glob("*/*")), tmp_path / "labeled"
    out, _ = command(capsys, PUBLISHED, labeled, query)
    assert "chance" not in out
    shutil.rmtree(min(labeled.iterdir()))
    out, _ = command(capsys, PUBLISHED, labeled, query)
    before, _ = out.split(f"\n{query} ")
    assert " 14 of 14 " in before and "100% (95% interval 78% to 100%; chance 25%)" in before
    out, _ = command(capsys, PUBLISHED, labeled, query, "--no_hold_out")
    assert "chance" not in out


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (50, 100), (9, 20)])
def test_interval_is_wilsons(right, n):
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(predict._interval(np.arange(n) < right), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["step", "weight"])
def test_learned_step_sizes_of_fewer_classes(kind):
    """Those per update stay whole, even if there are as many updates as classes."""
    trained = recipe.Recipe(data_set="omniglot", way=5, inner_steps=5, filters=2, learn_inner_lr=kind)
    maml = recipe.build(trained)
    for number, weight in enumerate(maml.weights.values()):
        weight.assign(np.arange(number, number + weight.shape.num_elements()).reshape(weight.shape))
    narrow = runs.narrowed(trained, maml, 2)
    assert narrow.weights["b5"].numpy().tolist() == maml.weights["b5"].numpy()[:2].tolist()
    sizes = maml.weights["step_size_b5"].numpy()
    np.testing.assert_array_equal(narrow.weights["step_size_b5"], sizes if kind == "step" else sizes[:2])


@pytest.mark.parametrize(
    "run, checkpoint, named",
    [
        (PUBLISHED.parent / "nowhere", -1, "nowhere: "),
        (predict.PUBLISHED / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm", -1, "nonorm: .*sinusoid"),
        (PUBLISHED, 3, "--checkpoint=3"),
    ],
)
def test_missing_models_are_named(run, checkpoint, named):
    with pytest.raises(InputError, match=named):
        predict.load(run, checkpoint=checkpoint)


def test_run_without_flags_json_is_loaded_by_its_name(characters, model, tmp_path):
    """As the original's. The name gives the recipe, and the shapes of the weights give the data set."""
    copy = tmp_path / PUBLISHED.name
    shutil.copytree(PUBLISHED, copy, ignore=shutil.ignore_patterns("flags.json"))
    found = predict.load(copy)
    assert found.recipe.data_set == "omniglot"
    queries = sorted((characters / "unlabeled").glob("*/*"))[:5]
    expected = _adapted(model, characters).predict(queries)
    np.testing.assert_allclose(_adapted(found, characters).predict(queries), expected, atol=1e-6)
    copy.rename(tmp_path / "mine")
    with pytest.raises(InputError, match="mine: "):
        predict.load(tmp_path / "mine")


def test_wrong_arguments_are_refused_in_one_line(characters, capsys, tmp_path):
    """Before anything is written."""
    labeled, unlabeled = characters / "labeled", characters / "unlabeled"
    one, six, empty = tmp_path / "one", tmp_path / "six", tmp_path / "empty"
    shutil.copytree(next(labeled.iterdir()), one / "a")
    shutil.copytree(labeled, six)
    shutil.copytree(one / "a", six / "another")
    shutil.copytree(labeled, empty)
    for image in (victim := min(empty.iterdir())).iterdir():
        image.rename(image.with_suffix(".heic"))
    (nothing := tmp_path / "nothing").mkdir()
    os.mkfifo(pipe := tmp_path / "pipe")
    (photo := tmp_path / "0.HEIC").write_bytes(b"not to be lost")
    for arguments, named in (
        ((one, unlabeled), f"{one}: has 1 class folders: a"),
        ((six, unlabeled), "--num_classes=6"),
        ((nothing, unlabeled), f"{nothing}: has 0 class folders"),
        ((empty, unlabeled), f"{empty}: class folder {victim.name}"),
        ((tmp_path / "absent", unlabeled), f"{tmp_path / 'absent'}: "),
        ((labeled, labeled / victim.name), f"{labeled / victim.name}: overlaps"),
        ((labeled, characters), f"{characters}: overlaps"),
        ((labeled, tmp_path / "absent"), f"{tmp_path / 'absent'}: "),
        ((labeled, nothing), f"{nothing}: "),
        ((labeled, unlabeled, f"--csv={nothing}"), f"--csv={nothing}: "),
        ((labeled, unlabeled, f"--csv={pipe}"), f"--csv={pipe}: "),
        ((labeled, unlabeled, f"--csv={photo}"), f"--csv={photo}: "),
        ((labeled, unlabeled, "--checkpoint=newest"), "--checkpoint=newest: "),
        ((labeled, unlabeled, "--updates=-1"), "updates=-1: "),
        ((labeled, unlabeled, "--updates=201"), "updates=201: "),
    ):
        assert named in refusal(capsys, PUBLISHED, *arguments)
    assert photo.read_bytes() == b"not to be lost"


@pytest.mark.parametrize("table", [None, "a.csv"])
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_closed_output_is_not_an_error_and_the_table_is_complete(characters, tmp_path, table, both):
    """As with `| head`."""
    shutil.copytree(characters / "unlabeled", tmp_path / "queries")
    (tmp_path / "queries" / "zz.png").write_text("not an image")  # reported at the end
    command = [sys.executable, predict.__file__, PUBLISHED, characters / "labeled", tmp_path / "queries"]
    command += [f"--csv={tmp_path / table}"] if table else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if both else subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        process.stdout.close()
        err = b"" if both else process.stderr.read()
    assert process.returncode == 0
    assert all("zz.png" in line for line in without_start_up_lines(err.decode()).splitlines())
    if table:
        assert len((tmp_path / table).read_text().splitlines()) == 86


def test_unreadable_images_are_left_out_and_named(characters, capsys, tmp_path):
    labeled = tmp_path / "labeled"
    shutil.copytree(characters / "labeled", labeled)
    first = min(labeled.iterdir())
    (first / "broken.png").write_text("not an image")
    (labeled / "loose.png").write_bytes(next(first.glob("0*")).read_bytes())
    broken = tmp_path / "broken.png"
    broken.write_text("not an image")
    good = next((characters / "unlabeled").glob("*/*"))
    out, err = command(capsys, PUBLISHED, labeled, broken, good)
    loose, *left_out = err.splitlines()
    assert loose.startswith(f"{labeled}: ignored 1 ")
    for line, path in zip(left_out, (first / "broken.png", broken), strict=True):
        assert line.endswith(f": {path} (cannot identify image file '{path}')")
    assert f"\n{good} " in out and f"\n{broken} " not in out
    assert "UNLABELED: " in refusal(capsys, PUBLISHED, labeled, broken)
    for image in first.iterdir():
        image.write_text("not an image")
    line = refusal(capsys, PUBLISHED, labeled, good)
    assert f"{labeled}: " in line and f"class {first.name} " in line


def test_files_that_are_not_images_are_reported(characters, capsys, tmp_path):
    """A phone's .heic files are images that Pillow does not read."""
    for name in ("labeled", "unlabeled"):
        shutil.copytree(characters / name, tmp_path / name)
    first = min((tmp_path / "labeled").iterdir())
    (first / "IMG_1.HEIC").touch()
    (tmp_path / "unlabeled" / "IMG_2.HEIC").touch()
    (tmp_path / "unlabeled" / "notes.txt").touch()
    _, err = command(capsys, PUBLISHED, tmp_path / "labeled", tmp_path / "unlabeled")
    labeled, unlabeled = err.splitlines()
    assert labeled.startswith(f"{tmp_path}/labeled: ignored 1 ")
    assert labeled.endswith(f": {first.name}/IMG_1.HEIC")
    assert unlabeled.startswith(f"{tmp_path}/unlabeled: ignored 2 ")
    assert unlabeled.endswith(": IMG_2.HEIC, notes.txt")


def test_images_that_may_not_be_read_are_not_called_missing(model, characters, tmp_path):
    hidden = tmp_path / "locked" / "images"
    hidden.mkdir(parents=True)
    hidden.parent.chmod(0)
    with unprivileged():
        for read in (lambda: predict.labeled_files(model, hidden), lambda: predict.unlabeled_files("none", [hidden])):
            with pytest.raises(InputError, match=f"{hidden}.*{os.strerror(errno.EACCES)}"):
                read()
    hidden.parent.chmod(0o755)


def test_system_folders_and_empty_folders_are_no_classes(characters, capsys, tmp_path):
    for name in ("labeled", "unlabeled"):
        shutil.copytree(characters / name, tmp_path / name)
        for folder in ("@eaDir", "empty"):
            (tmp_path / name / folder).mkdir()
        shutil.copy(next((characters / name).glob("*/*")), tmp_path / name / "@eaDir" / "thumbnail.png")
    expected, _ = command(capsys, PUBLISHED, characters / "labeled", characters / "unlabeled")
    out, err = command(capsys, PUBLISHED, tmp_path / "labeled", tmp_path / "unlabeled")
    assert out.replace(str(tmp_path), str(characters)).split() == expected.split()
    for line, name in zip(err.splitlines(), ("labeled", "unlabeled"), strict=True):
        assert line.startswith(f"{tmp_path / name}: ignored 2 ")
        assert line.endswith(": 1 @eaDir, 1 empty")


def test_each_pillow_warning_is_one_line(characters, capsys, monkeypatch):
    transpose = ImageOps.exif_transpose

    def warn(image, **named):
        warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)
        transpose(image, **named)

    monkeypatch.setattr(ImageOps, "exif_transpose", warn)
    queries = sorted((characters / "unlabeled").glob("*/*"))[:3]
    _, err = command(capsys, PUBLISHED, characters / "labeled", *queries)
    assert all("Corrupt EXIF data" in line for line in err.splitlines())
    assert len(err.splitlines()) == 2  # one for the labeled images, one for the others


def test_diverged_updates_are_an_error(characters, tmp_path):
    """Without it, every image would be assigned to the first class."""
    folder = tmp_path / "cls_5.mbs_25.ubs_1.numstep1.updatelr0.01hidden4nonorm"
    trained = recipe.Recipe(data_set="cifarfs", inner_lr=1e30, filters=4, norm=None)
    run, maml = runs.Run(folder), recipe.build(trained)
    maml.step.assign(1)
    with run.locked():
        run.record(recipe.to_flags(trained))
        run.save(maml)
    adapted = _adapted(predict.load(folder, updates=10), characters)
    with pytest.raises(InputError, match=r"^--updates: "):
        adapted.predict(sorted((characters / "unlabeled").glob("*/*"))[:3])


def test_identical_and_blank_images_are_reported_and_counted(characters, capsys, tmp_path):
    shutil.copytree(characters / "labeled", tmp_path / "labeled")
    first, second, *_ = sorted((tmp_path / "labeled").iterdir())
    image = next(first.iterdir())
    copies = [second / "copy.png", second / "same.png", first / "again.png", tmp_path / "asked.png"]
    for copy in copies:
        shutil.copy(image, copy)
    ink = Image.new("RGBA", (28, 28), (255, 255, 255, 0))
    ink.paste((255, 255, 255, 255), (5, 5, 20, 8))  # white on transparency
    for blank in (blanks := [second / "blank.png", tmp_path / "blank.png"]):
        ink.save(blank)
    good = next((characters / "unlabeled").glob("*/*"))
    _, err = command(capsys, PUBLISHED, tmp_path / "labeled", good, copies[-1], blanks[1])
    ends = [f": {copies[2]} = {image}", f": {blanks[0]}", f": {copies[0]} = {image}, {copies[1]} = {image}"]
    ends += [f": {copies[3]} = {image}", f": {blanks[1]}"]
    found = err.splitlines()
    assert [line.endswith(end) for line, end in zip(found, ends, strict=True)] == [True] * 5, found
    assert [line.partition(": has ")[2].split()[0] for line in found] == ["1", "1", "2", "1", "1"]


def inverted(source: Path, target: Path) -> Path:
    for path in sorted(source.glob("*/*")):
        (copy := target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            ImageOps.invert(image.convert("L")).save(copy)
    return target


def test_light_ink_on_a_dark_ground_is_reported_once(characters, capsys, tmp_path):
    labeled, unlabeled = (inverted(characters / name, tmp_path / name) for name in ("labeled", "unlabeled"))
    _, err = command(capsys, PUBLISHED, characters / "labeled", unlabeled)
    assert err.startswith("WARNING: UNLABELED: ") and len(err.splitlines()) == 1
    for asked in (unlabeled, characters / "unlabeled"):
        _, err = command(capsys, PUBLISHED, labeled, asked)
        assert err.startswith(f"WARNING: {labeled}: 15 of 15 images ") and len(err.splitlines()) == 1


def test_large_color_images_are_converted(characters, capsys, tmp_path):
    """As a photograph of a drawing: large, in color, not square."""
    for name in ("labeled", "unlabeled"):
        for path in sorted((characters / name).glob("*/*")):
            target = tmp_path / name / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").resize((112, 140)).save(target)
    command(capsys, PUBLISHED, tmp_path / "labeled", tmp_path / "unlabeled", f"--csv={tmp_path / 'a.csv'}")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert np.mean([Path(row["image"]).parent.name == row["class"] for row in rows]) > 0.9


def test_gray_images_work_with_a_color_model(characters, tmp_path):
    """Gray, 1-bit and palette images give the predictions of the same images in RGB."""
    folder = tmp_path / "cls_5.mbs_25.ubs_1.numstep1.updatelr0.01hidden4batchnorm"
    trained = recipe.Recipe(data_set="cifarfs", inner_lr=0.01, filters=4)
    run, maml = runs.Run(folder), recipe.build(trained)
    maml.step.assign(1)
    with run.locked():
        run.record(recipe.to_flags(trained))
        run.save(maml)
    model, predictions = predict.load(folder, updates=1), []
    for mode in ("RGB", "L", "1", "P"):
        for path in characters.glob("*/*/*"):
            target = tmp_path / mode / path.relative_to(characters)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert(mode).save(target)
        adapted = _adapted(model, tmp_path / mode)
        predictions.append(adapted.predict(sorted((tmp_path / mode / "unlabeled").glob("*/*"))))
    assert np.shape(predictions) == (4, 85, 5)
    for gray in predictions[1:]:
        np.testing.assert_array_equal(gray, predictions[0])


def test_given_a_folder_of_runs_the_error_names_them(characters, capsys):
    line = refusal(capsys, predict.PUBLISHED, characters / "labeled", characters / "unlabeled")
    assert f"{predict.PUBLISHED}: " in line and PUBLISHED.name in line


def test_a_run_without_a_checkpoint_is_refused(characters, capsys, tmp_path):
    run = tmp_path / "runs" / "mine"  # a folder of its own: the error would name other runs there
    run.mkdir(parents=True)
    shutil.copy(PUBLISHED / "flags.json", run)
    line = refusal(capsys, run, characters / "labeled", characters / "unlabeled")
    assert f"{run}: " in line


def test_undecodable_file_names_survive_in_the_table(characters, capsys, tmp_path):
    undecodable, table = b"\xff\n.png".decode(errors="surrogateescape"), tmp_path / "a.csv"
    image = next((characters / "unlabeled").glob("*/*"))
    for name in (undecodable, "with\rreturn.png"):
        (path := tmp_path / image.parent.name / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, path)
    out, _ = command(capsys, PUBLISHED, characters / "labeled", tmp_path / image.parent.name, f"--csv={table}")
    assert "\\udcff\\n.png" in out
    assert b"\xff\n.png" in table.read_bytes()
    names, counts = plot.confusions(table)
    assert counts[names.index(image.parent.name)].sum() == 2


def test_error_suggests_models_with_the_right_number_of_classes(model, tmp_path):
    """Or with more: from the model's parent folder and the published runs, without damaged records."""
    folder = tmp_path / PUBLISHED.name
    shutil.copytree(PUBLISHED, folder)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "flags.json").write_text("{")
    other = tmp_path / "cls_7"
    other.mkdir()
    flags = json.loads((PUBLISHED / "flags.json").read_text())
    (other / "flags.json").write_text(json.dumps(flags | {"num_classes": 7}))
    with pytest.raises(InputError, match=r"^labels: .*cls_7$"):
        predict.load(folder).adapt(np.zeros((6, 28, 28), np.uint8), range(6))


WITHOUT_THE_PROJECT = """
import sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)  # as predict.py; rounding depends on the number
assert not any("maml" in str(getattr(module, "__file__", "")) for module in list(sys.modules.values()))
loaded = tf.saved_model.load(sys.argv[1])
given = dict(np.load(sys.argv[2]))
found = {"uint8": loaded.adapt_and_predict(**given)["probabilities"]}
tensors = {name: tf.constant(value) for name, value in given.items()}
found["signature"] = loaded.signatures["adapt_and_predict"](**tensors)["probabilities"]
tensors |= {name: tf.cast(tensors[name], tf.float32) / 255 for name in ("support_x", "query_x")}
found["float"] = loaded.signatures["adapt_and_predict_float"](**tensors)["probabilities"]
np.savez(sys.argv[3], **found)
for name, wrong, reason in (
    ("support_y", tensors["support_y"] % 4, "support_y must have each class from 0 to 4"),
    ("support_y", tf.concat([[5], tensors["support_y"][1:]], 0), "support_y must be from 0 to 4"),
    ("query_x", tensors["query_x"] * 255, "float images must be from 0 to 1"),
):
    try:
        loaded.adapt_and_predict(**tensors | {name: wrong})
    except tf.errors.InvalidArgumentError as error:
        assert reason in error.message, error.message
    else:
        raise AssertionError(reason)
"""


@pytest.mark.parametrize("way", ["support", "batch"])
def test_export_runs_without_the_project(characters, capsys, tmp_path, way):
    """In a process that cannot import the project, TensorFlow gives the same numbers."""
    out, _ = command(capsys, PUBLISHED, f"--export={tmp_path / 'exported'}", f"--normalise_with={way}")
    assert str(tmp_path / "exported") in out
    model = predict.load(PUBLISHED, normalise_with=way, class_orders=1)
    adapted = _adapted(model, characters)
    queries = sorted((characters / "unlabeled").glob("*/*"))
    labeled = sorted((characters / "labeled").glob("*/*"))
    labels = np.array([adapted.classes.index(path.parent.name) for path in labeled])
    np.savez(tmp_path / "given.npz", support_x=model.read(labeled), support_y=labels, query_x=model.read(queries))
    ended = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PROJECT, "exported", "given.npz", "found.npz"],
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "WARNING:absl" not in ended.stderr
    with np.load(tmp_path / "found.npz") as found:
        for kind in ("uint8", "signature", "float"):
            np.testing.assert_allclose(found[kind], adapted.predict(queries), atol=1e-6)
    flag = f"--export={tmp_path / 'exported'}"
    assert f"{flag}: " in refusal(capsys, PUBLISHED, flag)


@pytest.mark.parametrize("way", ["support", "batch"])
def test_adapted_model_is_exported_saved_and_loaded(characters, capsys, tmp_path, way):
    """It gives the same probabilities, for paths and arrays, without computing gradients."""
    labeled, flag = characters / "labeled", f"--export={tmp_path / 'exported'}"
    out, _ = command(capsys, PUBLISHED, labeled, flag, f"--normalise_with={way}")
    assert str(tmp_path / "exported") in out
    adapted = _adapted(predict.load(PUBLISHED, normalise_with=way), characters)
    queries = sorted((characters / "unlabeled").glob("*/*"))
    expected, pixels = adapted.predict(queries), adapted.model.read(queries)
    module = tf.saved_model.load(str(tmp_path / "exported"))
    floats = tf.cast(pixels, tf.float32) / 255
    answers = [module.predict(pixels), module.predict(floats)]
    answers.append(module.signatures["predict"](images=tf.constant(pixels)))
    answers.append(module.signatures["predict_float"](images=floats))
    for answer in answers:
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-6)
        assert [name.decode() for name in answer["classes"].numpy()] == adapted.classes
    operations = module.signatures["predict"].graph.as_graph_def(add_shapes=False)
    names = {node.op for function in operations.library.function for node in function.node_def}
    assert "Conv2D" in names and not [name for name in names if "Backprop" in name or name.endswith("Grad")]
    loaded = predict.load_adapted(tmp_path / "exported")
    assert loaded.classes == adapted.classes
    for images in (queries, pixels, pixels / 255):
        np.testing.assert_allclose(loaded.predict(images), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"^images: .*\[1, 5, 5\]"):
        loaded.predict(np.zeros((1, 5, 5), np.uint8))
    assert f"{flag}: " in refusal(capsys, PUBLISHED, labeled, flag)
    assert "absent: " in refusal(capsys, PUBLISHED, tmp_path / "absent", f"--export={tmp_path / 'new'}")


def test_adapted_models_keep_the_type_of_their_labels(model, tmp_path):
    drawings = np.uint8(np.random.default_rng(0).random((3, 28, 28)) > 0.8) * 255
    for labels in ([7, 9, 8], np.array([7, 9, 8]), ["b", "a", "caf\u00e9"]):
        adapted = model.adapt(drawings, labels)
        adapted.save(folder := tmp_path / str(len(list(tmp_path.iterdir()))))
        loaded = predict.load_adapted(folder)
        assert loaded.classes == sorted(labels)
        np.testing.assert_allclose(loaded.predict(drawings), adapted.predict(drawings), atol=1e-6)
    for wrong in (tmp_path / "absent", PUBLISHED):
        with pytest.raises(InputError, match=f"^{re.escape(str(wrong))}.*: "):
            predict.load_adapted(wrong)


@pytest.mark.parametrize("way", ["support", "batch"])
def test_exported_model_converts_to_tflite_with_built_in_operations(characters, tmp_path, way):
    if not hasattr(lite := getattr(tf, "lite", None), "TFLiteConverter"):
        pytest.skip("this TensorFlow has no TFLite converter")
    adapted = _adapted(predict.load(PUBLISHED, normalise_with=way), characters)
    adapted.save(tmp_path / "exported")
    converter = lite.TFLiteConverter.from_saved_model(str(tmp_path / "exported"), signature_keys=["predict"])
    converter.target_spec.supported_ops = [lite.OpsSet.TFLITE_BUILTINS]
    queries = adapted.model.read(sorted((characters / "unlabeled").glob("*/*"))[::4])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\\s*Warning: tf.lite.Interpreter is deprecated")
        interpreter = lite.Interpreter(model_content=converter.convert())
    answer = interpreter.get_signature_runner("predict")(images=queries)
    np.testing.assert_allclose(answer["probabilities"], adapted.predict(queries), atol=1e-5)
    assert [name.decode() for name in answer["classes"]] == adapted.classes


def test_exported_read_me_reads_files_as_training_does(characters, tmp_path):
    """Upright photographs, and 1-bit and gray drawings."""
    random, python = np.random.default_rng(0), re.compile("```python\n(.*?)```", re.S)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    pixels = random.integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    for kind, filters, name in (("cifarfs", 4, "photo.jpg"), ("omniglot", 4, "1"), ("omniglot", 4, "L")):
        trained = recipe.Recipe(data_set=kind, filters=filters)
        if name != "photo.jpg":
            Image.fromarray(pixels).convert(name).save(tmp_path / "drawing.png")
        model = predict.Model(trained, recipe.build(trained), "model0", 1, "support")
        predict.export(model, tmp_path / f"{kind}{name}")
        model.adapt(np.zeros((2, *model.images.size, model.images.channels)), [0, 1]).save(tmp_path / f"{kind}{name}2")
        for folder in (f"{kind}{name}", f"{kind}{name}2"):
            _, reading = python.findall((tmp_path / folder / "README.md").read_text())
            scope = {"Image": Image, "ImageOps": ImageOps, "np": np}
            file = "photo.jpg" if name == "photo.jpg" else "drawing.png"
            exec(reading.replace(file, str(tmp_path / file)), scope)
            np.testing.assert_array_equal(scope["images"], model.read([tmp_path / file]))


@pytest.mark.parametrize("arguments", [["--export=a", "labeled", "b"], ["labeled"], []])
def test_images_and_export_exclude_each_other(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main([str(PUBLISHED), *arguments])
    assert ended.value.code == 2
    assert "RUN LABELED UNLABELED" in capsys.readouterr().err.splitlines()[-1]


def test_published_model_classifies_omniglot_test_characters(shared, model):
    """Given one labeled drawing of each of five characters, at least 90 of the other 95 are right.

    Classifying one class alone does not change the predictions.
    """
    test = json.loads((predict.ROOT / "data" / "splits" / "omniglot.json").read_text())["test"]
    drawings, labels = {"labeled": [], "unlabeled": []}, {"labeled": [], "unlabeled": []}
    folder = shared / "data" / "omniglot"
    archives = [zipfile.ZipFile(folder / f"images_{part}.zip") for part in ("background", "evaluation")]
    for name in random.Random(0).sample(test, 5):
        listed = ((file, archive) for archive in archives for file in archive.namelist())
        files = sorted((file, archive) for file, archive in listed if f"/{name}/" in file and file.endswith(".png"))
        assert len(files) == 20
        for place, (file, archive) in enumerate(files):
            part = "unlabeled" if place else "labeled"
            drawing = Image.open(archive.open(file)).resize((28, 28), Image.NEAREST)  # as resize_images.py
            drawings[part].append(np.uint8(drawing.convert("L"))[..., None])
            labels[part].append(name)
    adapted = model.adapt(np.stack(drawings["labeled"]), labels["labeled"])
    queries, true = np.stack(drawings["unlabeled"]), np.array([adapted.classes.index(n) for n in labels["unlabeled"]])
    right = adapted.predict(queries).argmax(1) == true
    assert right.sum() >= 90
    for label in range(5):
        alone = adapted.predict(queries[true == label]).argmax(1) == label
        assert alone.sum() == right[true == label].sum()


def test_the_home_folder_is_expanded_in_every_path(characters, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "run").symlink_to(PUBLISHED)
    shutil.copytree(characters, tmp_path / "characters")
    predict.main(["~/run", "~/characters/labeled", "~/characters/unlabeled", "--csv=~/table.csv"])
    assert (tmp_path / "table.csv").is_file()
    predict.main(["~/run", "--export=~/exported"])
    assert (tmp_path / "exported" / "saved_model.pb").is_file()


def test_labels_and_their_order_do_not_depend_on_unicode_forms(model, tmp_path):
    labels = []
    for form, accented in (("nfc", "caf\u00e9"), ("nfd", "cafe\u0301")):
        for name in (accented, "cafz", "a", "b", "c"):
            (tmp_path / form / name).mkdir(parents=True)
            Image.new("1", (28, 28)).save(tmp_path / form / name / "0.png")
        labels.append(list(predict.labeled_files(model, str(tmp_path / form)).values()))
    assert labels[0] == labels[1] == ["a", "b", "c", "cafz", "caf\u00e9"]
