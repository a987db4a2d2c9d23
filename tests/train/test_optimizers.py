"""Optimisers of transformers' Trainer, from a recipe: those for any adapter, and those that need whole weights."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tiny_run import make_recipe, save_model

from deltatune.train.recipe import build_recipe
from deltatune.train.run import train

pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")
WHOLE = {"peft_type": "FULL", "in_place": True}
LISA = {"name": "lisa", "layers": 1, "every": 4}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def recipe_for(folder, model_dir, method=None, procedure=None, **section):
    options = {"gradient_accumulation": 1, "save_strategy": "no", "save_steps": None, **section}
    raw = make_recipe(folder, model_dir, train=options).model_dump()
    return build_recipe({**raw, "method": method or raw["method"], "procedure": procedure}, "tests")


@pytest.mark.parametrize(
    "section",
    [
        {"optim": "adamw_8bit"},
        {"optim": "lion_32bit", "learning_rate": 0.001},
        {"optim": "ademamix"},
        {"optim": "schedule_free_adamw", "lr_scheduler": "constant"},
        {"optim": "rmsprop"},
    ],
    ids=lambda s: s["optim"],
)
def test_adapters_learn_with_any_optimiser(section, tmp_path, model_dir):
    result = train(recipe_for(tmp_path, model_dir, **section), console=Console(file=io.StringIO()))
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize("procedure", [None, LISA], ids=["whole", "lisa"])
@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor", "apollo_adamw", "galore_adamw_layerwise"])
def test_whole_weights_learn_with_projected_gradients(optim, procedure, tmp_path, model_dir):
    section = {"optim": optim, "optim_args": "rank=4,update_proj_gap=5", "optim_target_modules": ["self_attn", "mlp"]}
    recipe = recipe_for(tmp_path, model_dir, WHOLE, procedure, learning_rate=0.003, **section)
    if procedure and optim.endswith("layerwise"):
        with pytest.raises(ValueError, match="'lisa' cannot see it: use galore_adamw"):
            train(recipe)
        return
    result = train(recipe, console=Console(file=io.StringIO()))
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize(
    ("method", "section", "says"),
    [
        (WHOLE, {"save_strategy": "epoch"}, "set train.save_strategy=no"),
        (None, {}, "use method FULL with in_place=true"),
        (WHOLE, {"optim": "galore_adamw_layerwise", "gradient_accumulation": 2}, "train.gradient_accumulation=1"),
    ],
)
def test_what_projected_gradients_need(method, section, says, tmp_path, model_dir):
    with pytest.raises(ValueError, match=says):
        train(recipe_for(tmp_path, model_dir, method, **{"optim": "galore_adamw", **section}))


def test_a_schedule_free_optimiser_would_undo_what_is_set(tmp_path, model_dir):
    relora = {"name": "relora", "cycle": 4, "restart_warmup": 1}
    section = {"optim": "schedule_free_adamw", "lr_scheduler": "constant"}
    with pytest.raises(ValueError, match="AdamWScheduleFree keeps its own copies"):
        train(recipe_for(tmp_path, model_dir, None, relora, **section), console=Console(file=io.StringIO()))
