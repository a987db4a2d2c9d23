"""Targets: what a name means, what it loads, and the forms of a loaded model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from deltatune.train.loading import find_target, load, variant
from small_runs import small_tokenizer, write_adapter, write_base, write_run

IDS = torch.tensor([[5, 9, 40, 7, 100]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter` (for base) and `run` (with a recipe)."""
    root = tmp_path_factory.mktemp("world")
    base = write_base(root / "base")
    write_adapter(root / "adapter", base)
    write_run(root / "run", base)
    return root


def test_what_a_name_means(world: Path) -> None:
    plain = find_target(str(world / "base"))
    assert (plain.base, plain.adapter) == (str(world / "base"), None)
    adapter = find_target(str(world / "adapter"))
    assert (adapter.base, adapter.adapter, adapter.recipe) == (str(world / "base"), world / "adapter", None)
    run = find_target(str(world / "run"))
    assert run.recipe == world / "run" / "recipe.yaml"
    assert find_target(str(world / "run" / "adapter_model.safetensors")).adapter == world / "run"
    assert find_target(str(world / "adapter"), model="elsewhere").base == "elsewhere"


def test_a_checkpoint_belongs_to_the_run_above_it(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "adapter", tmp_path / "run" / "checkpoint-5")
    target = find_target(str(tmp_path / "run" / "checkpoint-5"))
    assert target.adapter == tmp_path / "run" / "checkpoint-5"
    assert target.recipe == tmp_path / "run" / "recipe.yaml"


def test_the_recipe_names_the_base_unless_it_is_gone(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(json.dumps({"model": "smollm2-135m", "data": {}}))
    assert find_target(str(tmp_path / "run")).base == "smollm2-135m"
    recipe.write_text(json.dumps({"model": str(tmp_path / "gone"), "data": {}}))
    assert find_target(str(tmp_path / "run")).base == str(world / "base")


def test_a_packaged_base_is_found_by_its_cache_directory(world: Path, tmp_path: Path) -> None:
    from deltatune.train.packaged import PACKAGED

    shutil.copytree(world / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    elsewhere = f"/home/other/.cache/deltatune/{PACKAGED[0].place}"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": elsewhere}))
    assert find_target(str(tmp_path / "adapter")).base == PACKAGED[0].name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./bse", r"bse does not exist; did you mean 'base'"),
        ("./empty", r"holds neither adapter_config.json"),
        ("./damaged", r"adapter_config.json is damaged"),
        ("./list", r"holds a list"),
        ("./nameless", r"names no base model; say which one with --model"),
    ],
)
def test_what_is_no_target_is_said(world: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    contents = {"damaged": "{", "list": "[]", "nameless": '{"peft_type": "LORA"}'}
    for folder in ("empty", *contents):
        (world / folder).mkdir(exist_ok=True)
    for folder, text in contents.items():
        (world / folder / "adapter_config.json").write_text(text)
    monkeypatch.chdir(world)
    try:
        with pytest.raises(ValueError, match=message):
            find_target(name)
    finally:
        for folder in ("empty", *contents):
            shutil.rmtree(world / folder)


def test_the_newest_adapters_below_a_directory_are_named(world: Path, tmp_path: Path) -> None:
    for age, name in enumerate(("newer", "older")):
        shutil.copytree(world / "adapter", tmp_path / name)
        os.utime(tmp_path / name / "adapter_config.json", (10**9 - age, 10**9 - age))
    with pytest.raises(ValueError, match=r"holds no adapter itself; did you mean .*/newer or .*/older\?"):
        find_target(str(tmp_path))


def test_a_base_for_a_whole_model_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="has no meaning here"):
        find_target(str(world / "base"), model="other")


def test_the_forms_of_a_loaded_adapter(world: Path) -> None:
    base = load(find_target(str(world / "base")), dtype="float32").model
    loaded = load(find_target(str(world / "adapter")), dtype="float32")
    assert not loaded.model.training

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=IDS).logits

    live = logits(loaded.model)
    assert not torch.allclose(live, logits(base))
    with variant(loaded.model, "base"):
        assert torch.equal(logits(loaded.model), logits(base))
    with variant(loaded.model, "merged"):
        torch.testing.assert_close(logits(loaded.model), live, atol=1e-5, rtol=1e-5)
    with variant(loaded.model, "adapter"):
        assert torch.equal(logits(loaded.model), live)


def test_tokens_that_neither_base_nor_adapter_embeds_are_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "adapter", tmp_path / "adapter")
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(50)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the base embeds 360"):
        load(find_target(str(tmp_path / "adapter")))
