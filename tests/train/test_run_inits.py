"""Runs whose adapter starts from data or away from zero: prepared by themselves, resumed exactly."""

from __future__ import annotations

import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import make_recipe, save_model

from deltatune.train.plan import plan
from deltatune.train.run import train
from deltatune.train.rundir import RESULTS


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa_niter_4", "fish_mask"])
def test_a_run_with_an_init(init, tmp_path, model_dir):
    method = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": init}
    sections = {"method": method, "train": {"init_batches": 3}}
    if init == "fish_mask":  # a method that looks at data goes the same way
        fish = {"method": {"peft_type": "FISH_MASK", "keep_ratio": 0.2}}
        recipe = make_recipe(tmp_path, model_dir, train={"init_batches": 3}).model_copy(update=fish)
    else:
        recipe = make_recipe(tmp_path, model_dir, **sections)
    planned = plan(recipe)
    console = Console(file=StringIO(), width=200)
    result = train(recipe, console=console)
    assert result.after["loss"] < result.before["loss"]
    if init == "fish_mask":  # one threshold for all: rounded once, not weight by weight
        assert abs(planned.trainable - result.trainable) < 50
    elif init != "eva":  # EVA decides on ranks when it has seen the data
        assert planned.trainable == result.trainable
    whole = load_file(recipe.run_dir / "adapter_model.safetensors")

    (recipe.run_dir / RESULTS).unlink()  # as if it had been killed after its first checkpoint
    for step in (8, 12):
        shutil.rmtree(recipe.run_dir / f"checkpoint-{step}")
    console = Console(file=StringIO(), width=200)
    train(recipe, console=console)
    assert "from checkpoint-4" in console.file.getvalue()
    again = load_file(recipe.run_dir / "adapter_model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[k], whole[k]) for k in whole)
