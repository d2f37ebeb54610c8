"""The recipe: to and from flags.json, and that nothing in the process remembers an earlier one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import main
import recipe
from files import InputError
from parallel import Layout
from recipe import DATASETS, NORMS, Recipe

ROOT = Path(main.__file__).parent
PUBLISHED = sorted((ROOT / "logs" / "published").glob("*/flags.json"))

whole, numbers = st.integers(1, 10**6), st.floats(1e-6, 1e6)
recipes = st.builds(
    Recipe,
    data_set=st.sampled_from(list(DATASETS)),
    way=st.integers(2, 10**4),
    meta_batch=whole,
    meta_lr=numbers,
    shot=whole,
    inner_lr=numbers,
    norm=st.sampled_from(list(NORMS)),
    adapt=st.sampled_from(recipe.DEFINITIONS["adapt"].accepts),
    learn_inner_lr=st.sampled_from(recipe.DEFINITIONS["learn_update_lr"].accepts),
    loss=st.sampled_from(recipe.DEFINITIONS["loss"].accepts),
    network=st.sampled_from(recipe.DEFINITIONS["network"].accepts),
    conv=st.booleans(),
    query=st.just(-1) | whole,
    data_path=st.none() | st.text(st.characters(exclude_characters="\0")),
    split=st.none() | st.just("64,16,20"),
    image_size=st.none() | st.integers(1, 10**4),
)


@given(recipes)
def test_flags_json_holds_all_of_a_recipe(one):
    assert recipe.from_flags(json.loads(json.dumps(recipe.to_flags(one)))) == one


def test_a_missing_key_means_the_flags_default():
    """So a run that is older than a flag stays what it was."""
    assert recipe.from_flags({}) == Recipe()
    assert recipe.from_flags({"num_classes": 20, "a_flag_of_another_version": 1}) == Recipe(way=20)
    assert {flag: main.FLAGS[flag].default for flag in recipe.DEFAULTS} == recipe.DEFAULTS


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_models_flags_name_its_folder(path):
    assert recipe.from_flags(json.loads(path.read_text())).run_name == path.parent.name


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_classes": "5"},
        {"num_classes": 5.0},
        {"num_classes": True},
        {"num_classes": None},
        {"update_lr": "0.1"},
        {"conv": 1},
        {"norm": "group_norm"},
        {"datasource": "mnist"},
        {"datasource": ["omniglot"]},
        {"baseline": "random"},
        {"adapt": "neck"},
        {"learn_update_lr": "layer"},
        {"loss": "sum"},
        {"network": "omniglot"},
        {"split": "64,16"},
        {"split": "a,b,c"},
        {"data_path": 7},
        {"num_classes": 1},
        {"num_classes": 10**9},
        {"num_filters": 10**6},
        {"num_updates": 1000},
        {"num_updates": 0},
        {"num_query": 0},
        {"num_query": -2},
        {"update_lr": 0.0},
        {"update_lr": float("nan")},
        {"update_lr": -0.1},
        {"meta_lr": 1e40},
        {"meta_batch_size": -1},
        {"metatrain_iterations": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"image_size": 0},
        {"image_channels": 2},
        {"split": "64,16,-20"},
        {"split": "9" * 5000 + ",1,1"},
    ],
    ids=str,
)
def test_a_value_that_its_flag_cannot_have(wrong):
    ((flag, _),) = wrong.items()
    with pytest.raises(InputError, match=flag):
        recipe.from_flags(wrong)


def test_one_resolution_leaves_no_trace_in_the_next():
    """The sinusoid's norm is None; an Omniglot command after it has the original's default again."""
    commands = ["--datasource=sinusoid"], ["--datasource=omniglot"], ["--datasource=cub"], ["--datasource=omniglot"]
    found = [main.recipe_of(main.parsed(arguments)) for arguments in commands]
    assert [one.norm for one in found] == [None, "batch_norm", "batch_norm", "batch_norm"]
    assert [one.meta_batch for one in found] == [25, 25, 4, 25]
    assert found[1] == found[3]
    assert main.FLAGS["norm"].default == "batch_norm"


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda path: path.parent.name)
def test_the_originals_folder_names_say_the_recipe(record):
    """All that the name says is read back, so the name of what is read is the same again."""
    one = recipe.from_flags(json.loads(record.read_text()))
    name = one.run_name.removesuffix(".pretrain")
    assert recipe.from_run_name(name, one.data_set).run_name == name


def test_the_name_of_the_released_model():
    name = "cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm"
    one = recipe.from_run_name(name, "miniimagenet")
    assert one.run_name == name
    assert (one.way, one.shot, one.inner_steps, one.inner_lr, one.filters, one.max_pool) == (5, 1, 5, 0.01, 32, True)
    with pytest.raises(InputError, match="my_model"):
        recipe.from_run_name("my_model", "miniimagenet")


@pytest.mark.parametrize(
    "one",
    [
        Recipe(data_set="omniglot", first_order=True, norm="layer_norm"),
        Recipe(baseline="oracle", norm=None, inner_lr=1e-05),
        Recipe(data_set="omniglot", way=20, meta_batch=16, shot=1, inner_lr=0.1, inner_steps=5, max_pool=True),
    ],
    ids=lambda one: one.run_name,
)
def test_a_name_says_every_value_that_the_original_has_in_it(one):
    assert recipe.from_run_name(one.run_name, one.data_set) == one


@pytest.mark.parametrize(
    "name",
    [
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0.0.1batchnorm",
        "cls_0.mbs_4.ubs_1.numstep5.updatelr0.1batchnorm",
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0.1hidden0batchnorm",
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0batchnorm",
    ],
)
def test_a_name_that_no_run_has_is_refused(name):
    with pytest.raises(InputError, match=name):
        recipe.from_run_name(name, "miniimagenet")


def test_queries_a_class():
    """As many as K; in the training on photographs and its validation 15, the original's; what is given wins."""
    for data_set, training, query in (
        *[("miniimagenet", True, 15), ("miniimagenet", False, 5), ("cub", True, 15), ("cub", False, 5)],
        *[("omniglot", True, 5), ("omniglot", False, 5), ("sinusoid", True, 5), ("sinusoid", False, 5)],
    ):
        assert Recipe(data_set=data_set).query_examples(training) == query
        assert Recipe(data_set=data_set, query=2).query_examples(training) == 2


def test_resnet12_that_fills_the_memory_is_refused():
    resnet = Recipe(data_set="miniimagenet", network="resnet12", shot=5, inner_steps=5, meta_batch=4)
    recipe.check_memory(resnet, Layout(cores=4), 2**40)
    recipe.check_memory(Recipe(data_set="miniimagenet", max_pool=True), Layout(cores=64), 2**20)
    with pytest.raises(InputError, match="--threads"):
        recipe.check_memory(resnet, Layout(cores=4), 4 * 2**30)
    with pytest.raises(InputError, match="--tasks_at_once"):
        recipe.check_memory(resnet, Layout(group=0), 4 * 2**30)
