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
        {"optim": "lomo", "learning_rate": 0.1},
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


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"optim": "adam_torch"}, "is no optimiser of transformers.*adamw_torch"),
        ({"optim": "paged_adamw_8bit"}, "there is no GPU: use adamw_8bit, or adamw_torch"),
        ({"optim": "paged_adamw_32bit"}, "there is no GPU: use adamw_torch"),
        ({"optim": "galore_adamw_8bit"}, "keeps its state on a GPU, and there is none: use galore_adamw, or"),
        ({"optim": "adalomo"}, "keeps its state on a GPU, and there is none: use adamw_torch"),
        ({"optim": "lomo", "gradient_accumulation": 2}, "train.gradient_accumulation=1"),
        ({"optim": "galore_adafactor_layerwise"}, "it refuses"),
        ({"optim": "adamw_torch_xla"}, "it runs on TPUs"),
    ],
    ids=lambda v: v["optim"] if isinstance(v, dict) else "",
)
def test_an_optimiser_that_cannot_run_here(section, says, tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("deltatune.train.arguments.accelerator", lambda: None)
    with pytest.raises(ValueError, match=says):
        train(recipe_for(tmp_path, model_dir, WHOLE, **section))


def test_every_optimiser_is_taken_or_refused_with_what_to_do(monkeypatch):
    """None of transformers' names falls through; a missing package is named with its command."""
    from transformers.training_args import OptimizerNames

    from deltatune.errors import ConfigError
    from deltatune.train import arguments

    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(arguments, "accelerator", lambda: "cuda")
    taken, refused = [], []
    for optim in OptimizerNames:
        try:
            arguments._check_optimizer(str(optim.value))
            taken.append(str(optim.value))
        except ConfigError as error:
            refused.append(str(error))
    assert all("pip install" in said or "; use adamw_torch" in said for said in refused)
    assert taken == ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]


def test_a_budget_cannot_see_steps_inside_the_backward_pass(tmp_path, model_dir):
    adalora = {"peft_type": "ADALORA", "tinit": 1, "tfinal": 1}
    with pytest.raises(ValueError, match="procedure 'adalora' cannot see it: use adamw_torch"):
        train(recipe_for(tmp_path, model_dir, adalora, optim="lomo"))


def test_a_schedule_free_optimiser_would_undo_what_is_set(tmp_path, model_dir):
    relora = {"name": "relora", "cycle": 4, "restart_warmup": 1}
    section = {"optim": "schedule_free_adamw", "lr_scheduler": "constant"}
    with pytest.raises(ValueError, match="AdamWScheduleFree keeps its own copies"):
        train(recipe_for(tmp_path, model_dir, None, relora, **section), console=Console(file=io.StringIO()))
