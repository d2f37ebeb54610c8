"""predict.py: the command and the library, on the published Omniglot model."""

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

import plot
import predict
import recipe
import runs
from data_generator import ImageTasks
from files import InputError
from images import Classes, read_image
from recipe import DATASETS
from tests.helpers import without_start_up_lines

PUBLISHED = predict.PUBLISHED / "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm"


@pytest.fixture(scope="module")
def model() -> predict.Model:
    return predict.load(PUBLISHED)


@pytest.fixture(scope="module")
def characters(omniglot_like, tmp_path_factory) -> Path:
    """labelled/<class>/: 1 to 5 drawings of five characters; unlabelled/<class>/: the other drawings."""
    root = tmp_path_factory.mktemp("characters")
    for shot, folder in enumerate(sorted(omniglot_like.glob("Alphabet_1/*"))[:5], start=1):
        for place, drawing in enumerate(sorted(folder.iterdir())):
            part = root / ("labelled" if place < shot else "unlabelled") / folder.name
            part.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawing, part / drawing.name)
    return root


def command(capsys, *arguments: object) -> tuple[str, str]:
    """What the command prints, to a good end: on stdout and on stderr."""
    capsys.readouterr()
    predict.main(list(map(str, arguments)))
    return capsys.readouterr()


def refusal(capsys, *arguments: object) -> str:
    """The one line that refuses bad input; warnings may stand before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        predict.main(list(map(str, arguments)))
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("predict.py: ")
    return line


def test_the_command(characters, capsys, tmp_path):
    """Every image has its line and its row, and most are right."""
    table = tmp_path / "answers.csv"
    out, err = command(capsys, PUBLISHED, f"--csv={table}", characters / "labelled", characters / "unlabelled")
    assert err == ""
    assert "model59999 of omniglot, 3 updates on 15 labelled images of 5 classes.\n" in out
    assert "by itself together with the labelled images: --normalise_with=support.\n" in out
    header, *rows = csv.reader(io.StringIO(table.read_text()))
    classes = sorted(folder.name for folder in (characters / "labelled").iterdir())
    assert header == ["image", "class", "probability", *classes]
    assert [row[0] for row in rows] == sorted(map(str, (characters / "unlabelled").glob("*/*")))
    for path, answer, probability, *probabilities in rows:
        numbers = list(map(float, probabilities))
        assert sum(numbers) == pytest.approx(1, abs=1e-5)
        assert float(probability) == max(numbers) == numbers[classes.index(answer)]
        second = classes[np.argsort(numbers)[-2]]
        (line,) = (line for line in out.splitlines() if line.startswith(f"{path} "))
        assert line.split()[1] == answer and line.split()[3] == second
    right = [Path(row[0]).parent.name == row[1] for row in rows]
    assert np.mean(right) > 0.9


def test_all_images_are_asked_together(characters, tmp_path):
    """As the paper does, more of them than are read at once; and each once, however often it is named."""
    labelled, unlabelled, table = characters / "labelled", characters / "unlabelled", tmp_path / "answers.csv"
    asked = sorted(unlabelled.glob("*/*"))
    assert len(asked) > predict.CHUNK
    model = predict.load(PUBLISHED, normalise_with="batch")
    predict.answer(model, str(labelled), [str(unlabelled), str(asked[0])], table)
    _, *rows = csv.reader(io.StringIO(table.read_text()))
    expected = _adapted(model, characters).predict(asked)
    np.testing.assert_allclose(np.array([row[3:] for row in rows], float), expected, atol=1e-6)


@pytest.mark.parametrize("loss", recipe.DEFINITIONS["loss"].accepts)
def test_the_loss_is_that_of_the_training(loss):
    """With K labelled images of each class."""
    trained = recipe.Recipe(data_set="omniglot", shot=2, filters=2, loss=loss)
    logits = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    labels = np.tile(np.eye(5, dtype=np.float32), (2, 1))
    maml = recipe.build(trained)
    expected = maml.inner.loss(logits, labels)
    model = predict.Model(trained, maml, "model0", 1, "support")
    np.testing.assert_allclose(model.inner.loss(logits, labels), expected, rtol=1e-6)


def test_an_answer_does_not_depend_on_what_else_is_asked(model, characters):
    adapted = _adapted(model, characters)
    asked = sorted((characters / "unlabelled").glob("*/*"))
    together = adapted.predict(asked)
    np.testing.assert_allclose([adapted.predict([path])[0] for path in asked[::10]], together[::10], atol=1e-6)
    model = predict.load(PUBLISHED, normalise_with="batch")
    adapted = _adapted(model, characters)
    assert not np.allclose(adapted.predict(asked[:1])[0], adapted.predict(asked)[0], atol=0.01)
    pixels = model.inputs(model.read(asked))
    scores = model.maml.inner.network.apply(adapted.trajectory[-1], pixels)
    np.testing.assert_allclose(adapted.predict(asked), tf.nn.softmax(scores), atol=1e-6)


def _adapted(model, characters):
    labelled = sorted((characters / "labelled").glob("*/*"))
    return model.adapt(labelled, [path.parent.name for path in labelled])


def test_paths_and_arrays_are_the_same(model, characters):
    paths = sorted((characters / "labelled").glob("*/*"))
    labels = [path.parent.name for path in paths]
    pixels = np.stack([read_image(path, model.images) for path in paths])
    expected = model.adapt(paths, labels).predict(paths)
    for images in (pixels, pixels[..., 0], pixels / 255, np.float32(pixels / 255), list(pixels), tf.constant(pixels)):
        np.testing.assert_allclose(model.adapt(images, labels).predict(images), expected, atol=1e-5)


def test_images_enter_as_in_training(model, characters):
    """Inverted and divided by 255, to the bit."""
    paths = sorted((characters / "labelled").glob("*/*"))[:4]
    pixels = model.read(paths)
    images = DATASETS["omniglot"].images._replace(rotations=False)
    classes = Classes(["a", "b"], np.array([0, 2]), np.array([2, 2]), pixels)
    drawn = ImageTasks(images, {"test": classes}, way=2, shot=1, query=1).draw(0, "test", 0, 1)
    assert {x.tobytes() for x in drawn.support_x[0]} <= {x.tobytes() for x in model.inputs(pixels).numpy()}


def test_updates(model, characters):
    """As many as are asked, and the answers after each of them."""
    asked = sorted((characters / "unlabelled").glob("*/*"))[:5]
    adapted = _adapted(model, characters)
    one = _adapted(predict.load(PUBLISHED, updates=1), characters)
    assert (len(adapted.trajectory), len(one.trajectory)) == (4, 2)
    np.testing.assert_allclose(adapted.predict(asked, updates=1), one.predict(asked), atol=1e-6)
    assert not np.allclose(adapted.predict(asked, updates=0), one.predict(asked), atol=0.01)
    for wrong in (-1, 4, 1.5, "1"):
        with pytest.raises(InputError, match=f"updates={wrong}, but 3 were taken: give 0 to 3"):
            adapted.predict(asked, wrong)
    for wrong in (-1, 201, 1.5, "1"):
        with pytest.raises(InputError, match=f"updates={wrong} must be 0 or more, and at most 200"):
            predict.load(PUBLISHED, updates=wrong)


@pytest.mark.parametrize(
    "images, labels, reason",
    [
        (np.zeros((5, 28, 28), np.uint8), "abcd", "5 images, but 4 labels: give a label to each"),
        (
            np.zeros((5, 28, 28), np.uint8),
            "abcdd",
            "the labels are of 4 classes, but .* is a model of 5: no model of 4 ",
        ),
        (np.zeros((5, 28, 28), np.uint8), np.eye(5), "the labels are ndarray: give numbers or strings, one for each"),
        (np.zeros((5, 28, 28), np.uint8), [0, 1, 2, 3, "e"], "the labels are int and str: give numbers or strings"),
        (np.zeros((5, 84, 84, 3), np.uint8), "abcde", r"shape \[5, 84, 84, 3\], but the model takes \[n, 28, 28, 1\]"),
        (np.zeros((28, 28), np.uint8), "abcde", r"shape \[28, 28\], but the model takes \[n, 28, 28, 1\]"),
        (np.zeros((0, 28, 28, 1), np.uint8), "", r"shape \[0, 28, 28, 1\], but the model takes"),
        (np.zeros((5, 28, 28), np.int64), "abcde", "the images are int64: give uint8 of 0 to 255, or floats of 0 to 1"),
        (np.full((5, 28, 28), 255.0), "abcde", "floats of 255 to 255: divide them to 0 to 1"),
        (np.full((5, 28, 28), np.nan), "abcde", "floats of nan to nan"),
        ([np.zeros((28, 28)), np.zeros((29, 28))], "ab", "the images have different shapes"),
        ("a.png", "a", "a.png is one path: give a list of paths"),
        (7, "a", "the images are of type int: give a list of paths, or an array"),
        ({"a.png"}, "a", "the images are of type set: give a list of paths, or an array"),
        (iter(["a.png"]), "a", "the images are of type list_iterator: give a list of paths, or an array"),
        (["nowhere.png"], "a", "nowhere.png"),
        (["nowhere.png", np.zeros((28, 28))], "ab", "the images are paths and other things: give paths alone, or one"),
        (np.zeros((5, 28, 28), np.uint8), 5, "the labels are of type int: give a list, a label for each"),
    ],
)
def test_wrong_images_and_labels(model, images, labels, reason):
    with pytest.raises(InputError, match=reason):
        model.adapt(images, list(labels) if isinstance(labels, str) else labels)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((PUBLISHED.parent / "nowhere",), "nowhere: "),
        (
            (predict.PUBLISHED / "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm",),
            "a run of the sinusoid",
        ),
        ((PUBLISHED, 3), "--checkpoint=3"),
    ],
)
def test_a_run_without_what_is_asked(arguments, reason):
    run, *checkpoint = arguments
    with pytest.raises(InputError, match=reason):
        predict.load(run, checkpoint=(checkpoint or [-1])[0])


def test_a_run_without_its_flags(characters, model, tmp_path):
    """The original's folders have none: the name says the recipe, the shapes of the weights the data set."""
    copy = tmp_path / PUBLISHED.name
    shutil.copytree(PUBLISHED, copy, ignore=shutil.ignore_patterns("flags.json"))
    found = predict.load(copy)
    assert found.recipe.data_set == "omniglot"
    asked = sorted((characters / "unlabelled").glob("*/*"))[:5]
    expected = _adapted(model, characters).predict(asked)
    np.testing.assert_allclose(_adapted(found, characters).predict(asked), expected, atol=1e-6)
    copy.rename(tmp_path / "mine")
    with pytest.raises(InputError, match="mine: "):
        predict.load(tmp_path / "mine")


def test_wrong_folders(characters, capsys, tmp_path):
    """One line each, before anything is written."""
    labelled, unlabelled = characters / "labelled", characters / "unlabelled"
    one, six, empty = tmp_path / "one", tmp_path / "six", tmp_path / "empty"
    shutil.copytree(next(labelled.iterdir()), one / "a")
    shutil.copytree(labelled, six)
    shutil.copytree(one / "a", six / "another")
    shutil.copytree(labelled, empty)
    for image in (victim := min(empty.iterdir())).iterdir():
        image.unlink()
    (nothing := tmp_path / "nothing").mkdir()
    os.mkfifo(pipe := tmp_path / "pipe")
    (photo := tmp_path / "0.HEIC").write_bytes(b"not to be lost")
    for arguments, reason in (
        ((one, unlabelled), "one has 1 class folders: a, but "),
        ((six, unlabelled), "is a model of 5 classes: no model of 6 is at hand, train one with --num_classes=6"),
        ((nothing, unlabelled), "nothing has 0 class folders, but "),
        ((empty, unlabelled), f"class {victim.name} in {empty} has no image: give it one, or remove the folder"),
        ((tmp_path / "absent", unlabelled), "absent of labelled images: give one with a folder of images for each"),
        ((labelled, labelled / victim.name), "lie one in the other: keep labelled and other images apart"),
        ((labelled, characters), "lie one in the other: keep labelled and other images apart"),
        ((labelled, tmp_path / "absent"), "absent: give images, or folders of images"),
        ((labelled, nothing), "no images in "),
        ((labelled, unlabelled, f"--csv={nothing}"), "nothing is a folder: name a file"),
        ((labelled, unlabelled, f"--csv={pipe}"), "pipe is no regular file: name another, such as answers.csv"),
        ((labelled, unlabelled, f"--csv={photo}"), "0.HEIC is another file than a table of answers: name another"),
        ((labelled, unlabelled, "--checkpoint=newest"), "--checkpoint=newest must be an iteration, -1 for the latest"),
        ((labelled, unlabelled, "--updates=-1"), "updates=-1 must be 0 or more, and at most 200"),
        ((labelled, unlabelled, "--updates=201"), "updates=201 must be 0 or more, and at most 200"),
    ):
        assert reason in refusal(capsys, PUBLISHED, *arguments)
    assert photo.read_bytes() == b"not to be lost"


@pytest.mark.parametrize("table", [None, "a.csv"])
@pytest.mark.parametrize("both", [False, True], ids=["of stdout", "of stderr too"])
def test_a_reader_that_has_enough(characters, tmp_path, table, both):
    """Such as head. The command ends well, and the table is whole."""
    shutil.copytree(characters / "unlabelled", tmp_path / "asked")
    (tmp_path / "asked" / "zz.png").write_text("no image")  # which is told at the end
    command = [sys.executable, predict.__file__, PUBLISHED, characters / "labelled", tmp_path / "asked"]
    command += [f"--csv={tmp_path / table}"] if table else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if both else subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        process.stdout.close()
        err = b"" if both else process.stderr.read()
    assert process.returncode == 0
    assert all(line.startswith("Left out, 1 images") for line in without_start_up_lines(err.decode()).splitlines())
    if table:
        assert len((tmp_path / table).read_text().splitlines()) == 86


def test_images_that_cannot_be_read_are_left_out(characters, capsys, tmp_path):
    labelled = tmp_path / "labelled"
    shutil.copytree(characters / "labelled", labelled)
    some = sorted(labelled.iterdir())
    (some[0] / "broken.png").write_text("no image")
    (labelled / "loose.png").write_bytes(next(some[0].glob("0*")).read_bytes())
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    good = next((characters / "unlabelled").glob("*/*"))
    out, err = command(capsys, PUBLISHED, labelled, broken, good)
    assert f"Not used, 1 images in {labelled} that lie in no class folder.\n" in err
    for path in (some[0] / "broken.png", broken):
        reason = f"cannot identify image file '{path}'"
        assert f"Left out, 1 images that cannot be read: {path} ({reason})\n" in err
    assert f"\n{good} " in out and "\n{broken} " not in out
    assert "no image of UNLABELLED can be read" in refusal(capsys, PUBLISHED, labelled, broken)
    for image in some[0].iterdir():
        image.write_text("no image")
    assert f"no image of class {some[0].name} in {labelled} can be read" in refusal(capsys, PUBLISHED, labelled, good)


def test_files_that_are_no_images_are_told(characters, capsys, tmp_path):
    """A phone's .heic would be images, but not to Pillow."""
    for name in ("labelled", "unlabelled"):
        shutil.copytree(characters / name, tmp_path / name)
    one = min((tmp_path / "labelled").iterdir())
    (one / "IMG_1.HEIC").touch()
    (tmp_path / "unlabelled" / "IMG_2.HEIC").touch()
    (tmp_path / "unlabelled" / "notes.txt").touch()
    _, err = command(capsys, PUBLISHED, tmp_path / "labelled", tmp_path / "unlabelled")
    said = "files that by their names are no images Pillow reads"
    assert err == (
        f"Not used, 1 {said}: {one / 'IMG_1.HEIC'}\n"
        f"Not used, 2 {said}: {tmp_path}/unlabelled/IMG_2.HEIC, {tmp_path}/unlabelled/notes.txt\n"
    )


def test_what_pillow_warns_of_is_one_line(characters, capsys, monkeypatch):
    transpose = ImageOps.exif_transpose

    def warn(image, **named):
        warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)
        transpose(image, **named)

    monkeypatch.setattr(ImageOps, "exif_transpose", warn)
    asked = sorted((characters / "unlabelled").glob("*/*"))[:3]
    _, err = command(capsys, PUBLISHED, characters / "labelled", *asked)
    assert all("Corrupt EXIF data" in line for line in err.splitlines())
    assert len(err.splitlines()) == 2  # of labelled and unlabelled images


def test_updates_that_diverge_are_no_answer(characters, tmp_path):
    """Else the first class would be the answer to all."""
    folder = tmp_path / "cls_5.mbs_25.ubs_1.numstep1.updatelr0.01hidden4nonorm"
    trained = recipe.Recipe(data_set="cifarfs", inner_lr=1e30, filters=4, norm=None)
    run, maml = runs.Run(folder), recipe.build(trained)
    maml.step.assign(1)
    with run.locked():
        run.record(recipe.to_flags(trained))
        run.save(maml)
    adapted = _adapted(predict.load(folder, updates=10), characters)
    with pytest.raises(InputError, match=r"no numbers, since the updates .* diverged: give fewer --updates"):
        adapted.predict(sorted((characters / "unlabelled").glob("*/*"))[:3])


def test_the_same_image_in_two_classes(characters, capsys, tmp_path):
    shutil.copytree(characters / "labelled", tmp_path / "labelled")
    one, other, *_ = sorted((tmp_path / "labelled").iterdir())
    shutil.copy(next(one.iterdir()), other / "twin.png")
    good = next((characters / "unlabelled").glob("*/*"))
    _, err = command(capsys, PUBLISHED, tmp_path / "labelled", good)
    assert err == f"WARNING: {other / 'twin.png'} and {next(one.iterdir())} are the same image.\n"


def test_images_of_another_size_and_colour(characters, capsys, tmp_path):
    """A photograph of a drawing: large, in colour, not square."""
    for name in ("labelled", "unlabelled"):
        for path in sorted((characters / name).glob("*/*")):
            target = tmp_path / name / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").resize((112, 140)).save(target)
    command(capsys, PUBLISHED, tmp_path / "labelled", tmp_path / "unlabelled", f"--csv={tmp_path / 'a.csv'}")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert np.mean([Path(row["image"]).parent.name == row["class"] for row in rows]) > 0.9


def test_grey_images_for_a_model_of_colours(characters, tmp_path):
    """Grey, black and white, and of a palette: as the same images in colour. The model is a new one."""
    folder = tmp_path / "cls_5.mbs_25.ubs_1.numstep1.updatelr0.01hidden4batchnorm"
    colours = recipe.Recipe(data_set="cifarfs", inner_lr=0.01, filters=4)
    run, maml = runs.Run(folder), recipe.build(colours)
    maml.step.assign(1)
    with run.locked():
        run.record(recipe.to_flags(colours))
        run.save(maml)
    model, found = predict.load(folder, updates=1), []
    for mode in ("RGB", "L", "1", "P"):
        for path in characters.glob("*/*/*"):
            target = tmp_path / mode / path.relative_to(characters)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert(mode).save(target)
        adapted = _adapted(model, tmp_path / mode)
        found.append(adapted.predict(sorted((tmp_path / mode / "unlabelled").glob("*/*"))))
    assert np.shape(found) == (4, 85, 5)
    for grey in found[1:]:
        np.testing.assert_array_equal(grey, found[0])


def test_a_folder_of_runs_names_them(characters, capsys):
    line = refusal(capsys, predict.PUBLISHED, characters / "labelled", characters / "unlabelled")
    assert f"{predict.PUBLISHED}: " in line and PUBLISHED.name in line


def test_a_run_without_a_checkpoint(characters, capsys, tmp_path):
    run = tmp_path / "runs" / "mine"  # runs beside it would be named
    run.mkdir(parents=True)
    shutil.copy(PUBLISHED / "flags.json", run)
    line = refusal(capsys, run, characters / "labelled", characters / "unlabelled")
    assert f"{run}: " in line


def test_a_file_name_that_is_no_text(characters, capsys, tmp_path):
    name, table = b"\xff\n.png".decode(errors="surrogateescape"), tmp_path / "a.csv"
    one = next((characters / "unlabelled").glob("*/*"))
    for other in (name, "with\rreturn.png"):
        (path := tmp_path / one.parent.name / other).parent.mkdir(exist_ok=True)
        shutil.copy(one, path)
    out, _ = command(capsys, PUBLISHED, characters / "labelled", tmp_path / one.parent.name, f"--csv={table}")
    assert "\\udcff\\n.png" in out
    assert b"\xff\n.png" in table.read_bytes()
    names, counts = plot.confusions(table)
    assert counts[names.index(one.parent.name)].sum() == 2


def test_models_that_would_do(model, tmp_path):
    """The run folders beside the model, and the published ones, that have as many classes. A damaged one is none."""
    folder = tmp_path / PUBLISHED.name
    shutil.copytree(PUBLISHED, folder)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "flags.json").write_text("{")
    other = tmp_path / "cls_7"
    other.mkdir()
    flags = json.loads((PUBLISHED / "flags.json").read_text())
    (other / "flags.json").write_text(json.dumps(flags | {"num_classes": 7}))
    with pytest.raises(InputError, match=r"labels are of 7 classes, but .* is a model of 5: models of 7 are .*cls_7$"):
        predict.load(folder).adapt(np.zeros((7, 28, 28), np.uint8), range(7))


STRANGER = """
import sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)  # as predict.py; another number rounds in another way
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
    ("support_y", tensors["support_y"] % 4, "support_y has each of the classes 0 to 4"),
    ("support_y", tf.concat([[5], tensors["support_y"][1:]], 0), "support_y is from 0 to 4"),
    ("query_x", tensors["query_x"] * 255, "float images are of 0 to 1"),
):
    try:
        loaded.adapt_and_predict(**tensors | {name: wrong})
    except tf.errors.InvalidArgumentError as error:
        assert reason in error.message, error.message
    else:
        raise AssertionError(reason)
"""


@pytest.mark.parametrize("way", ["support", "batch"])
def test_export(characters, capsys, tmp_path, way):
    """TensorFlow alone, in a process that cannot import the project, gives the same numbers."""
    out, _ = command(capsys, PUBLISHED, f"--export={tmp_path / 'exported'}", f"--normalise_with={way}")
    assert out.startswith(f"Written: {tmp_path / 'exported'}, a SavedModel of ")
    model = predict.load(PUBLISHED, normalise_with=way)
    adapted = _adapted(model, characters)
    asked = sorted((characters / "unlabelled").glob("*/*"))
    labelled = sorted((characters / "labelled").glob("*/*"))
    labels = np.array([adapted.classes.index(path.parent.name) for path in labelled])
    np.savez(tmp_path / "given.npz", support_x=model.read(labelled), support_y=labels, query_x=model.read(asked))
    ended = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, "exported", "given.npz", "found.npz"],
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "WARNING:absl" not in ended.stderr
    with np.load(tmp_path / "found.npz") as found:
        for kind in ("uint8", "signature", "float"):
            np.testing.assert_allclose(found[kind], adapted.predict(asked), atol=1e-6)
    assert "exported exists: remove it, or give another folder" in refusal(
        capsys, PUBLISHED, f"--export={tmp_path / 'exported'}"
    )


@pytest.mark.parametrize("arguments", [["--export=a", "labelled", "b"], ["labelled"], []])
def test_answers_or_an_export(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main([str(PUBLISHED), *arguments])
    assert ended.value.code == 2
    assert "give RUN LABELLED UNLABELLED for answers, or RUN --export=DIR" in capsys.readouterr().err


def test_omniglots_test_characters(shared, model):
    """One labelled drawing of each of five test characters: 90 of the other 95 or more are right, asked in any way."""
    test = json.loads((predict.ROOT / "data" / "splits" / "omniglot.json").read_text())["test"]
    drawings, labels = {"labelled": [], "unlabelled": []}, {"labelled": [], "unlabelled": []}
    folder = shared / "data" / "omniglot"
    archives = [zipfile.ZipFile(folder / f"images_{part}.zip") for part in ("background", "evaluation")]
    for name in random.Random(0).sample(test, 5):
        listed = ((file, archive) for archive in archives for file in archive.namelist())
        files = sorted((file, archive) for file, archive in listed if f"/{name}/" in file and file.endswith(".png"))
        assert len(files) == 20
        for place, (file, archive) in enumerate(files):
            part = "unlabelled" if place else "labelled"
            drawing = Image.open(archive.open(file)).resize((28, 28), Image.NEAREST)  # as resize_images.py
            drawings[part].append(np.uint8(drawing.convert("L"))[..., None])
            labels[part].append(name)
    adapted = model.adapt(np.stack(drawings["labelled"]), labels["labelled"])
    asked, true = np.stack(drawings["unlabelled"]), np.array([adapted.classes.index(n) for n in labels["unlabelled"]])
    right = adapted.predict(asked).argmax(1) == true
    assert right.sum() >= 90
    for label in range(5):  # a folder of one class only
        alone = adapted.predict(asked[true == label]).argmax(1) == label
        assert alone.sum() == right[true == label].sum()
