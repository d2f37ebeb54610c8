"""Recipes: conversion to and from flags.json and run names, defaults, limits."""

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
def test_a_recipe_survives_flags_json(example):
    assert recipe.from_flags(json.loads(json.dumps(recipe.to_flags(example)))) == example


def test_a_missing_key_means_the_flags_default():
    """A run that is older than a flag keeps its meaning."""
    assert recipe.from_flags({}) == Recipe()
    assert recipe.from_flags({"num_classes": 20, "a_flag_of_another_version": 1}) == Recipe(way=20)
    assert {flag: main.FLAGS[flag].default for flag in recipe.DEFAULTS} == recipe.DEFAULTS


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_models_flags_give_its_folders_name(path):
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
def test_an_invalid_value_is_refused_by_flag(wrong):
    ((flag, _),) = wrong.items()
    with pytest.raises(InputError, match=flag):
        recipe.from_flags(wrong)


def test_a_data_sets_defaults_do_not_affect_the_next_command():
    """The sinusoid's norm is None. An Omniglot command after it has the original's default again."""
    commands = ["--datasource=sinusoid"], ["--datasource=omniglot"], ["--datasource=cub"], ["--datasource=omniglot"]
    parsed = [main.recipe_of(main.parsed(arguments)) for arguments in commands]
    assert [each.norm for each in parsed] == [None, "batch_norm", "batch_norm", "batch_norm"]
    assert [each.meta_batch for each in parsed] == [25, 25, 4, 25]
    assert parsed[1] == parsed[3]
    assert main.FLAGS["norm"].default == "batch_norm"


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_recipe_read_from_a_published_run_name_has_that_name(record):
    published = recipe.from_flags(json.loads(record.read_text()))
    name = published.run_name.removesuffix(".pretrain")
    assert recipe.from_run_name(name, published.data_set).run_name == name


def test_the_released_models_name_is_read():
    name = "cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm"
    released = recipe.from_run_name(name, "miniimagenet")
    assert released == Recipe(
        data_set="miniimagenet", way=5, meta_batch=4, shot=1, inner_steps=5, inner_lr=0.01, filters=32, max_pool=True
    )
    with pytest.raises(InputError, match="my_model"):
        recipe.from_run_name("my_model", "miniimagenet")


@pytest.mark.parametrize(
    "example",
    [
        Recipe(data_set="omniglot", first_order=True, norm="layer_norm"),
        Recipe(baseline="oracle", norm=None, inner_lr=1e-05),
        Recipe(data_set="omniglot", way=20, meta_batch=16, shot=1, inner_lr=0.1, inner_steps=5, max_pool=True),
    ],
    ids=lambda example: example.run_name,
)
def test_a_run_name_holds_every_value_of_the_originals_names(example):
    assert recipe.from_run_name(example.run_name, example.data_set) == example


@pytest.mark.parametrize(
    "name",
    [
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0.0.1batchnorm",
        "cls_0.mbs_4.ubs_1.numstep5.updatelr0.1batchnorm",
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0.1hidden0batchnorm",
        "cls_5.mbs_4.ubs_1.numstep5.updatelr0batchnorm",
    ],
)
def test_an_invalid_run_name_is_refused(name):
    with pytest.raises(InputError, match=name):
        recipe.from_run_name(name, "miniimagenet")


def test_queries_per_class_default_to_k_or_to_15_when_training_on_photographs():
    """15 is the original's number, and also holds for the validation in training. An explicit number wins."""
    for data_set, training, query in (
        *[("miniimagenet", True, 15), ("miniimagenet", False, 5), ("cub", True, 15), ("cub", False, 5)],
        *[("omniglot", True, 5), ("omniglot", False, 5), ("sinusoid", True, 5), ("sinusoid", False, 5)],
    ):
        assert Recipe(data_set=data_set).query_examples(training) == query
        assert Recipe(data_set=data_set, query=2).query_examples(training) == 2


def test_resnet12_is_refused_if_it_does_not_fit_in_memory():
    resnet = Recipe(data_set="miniimagenet", network="resnet12", shot=5, inner_steps=5, meta_batch=4)
    recipe.check_memory(resnet, Layout(cores=4), 2**40)
    recipe.check_memory(Recipe(data_set="miniimagenet", max_pool=True), Layout(cores=64), 2**20)
    with pytest.raises(InputError, match="--threads"):
        recipe.check_memory(resnet, Layout(cores=4), 4 * 2**30)
    with pytest.raises(InputError, match="--tasks_at_once"):
        recipe.check_memory(resnet, Layout(group=0), 4 * 2**30)
