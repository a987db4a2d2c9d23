"""`deltatune inspect`: norms are those of the tensors, and damaged files are one sentence."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatune.cli.adapter_report import layer_of, lora_scale, product_norm, report
from small_runs import write_adapter

QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def test_norms_ranks_and_shapes(cli, world: Path) -> None:
    done = cli("inspect", world / "adapter", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    tensors = load_file(world / "adapter" / "adapter_model.safetensors")
    a, b = tensors[f"{QUERY}.lora_A.weight"], tensors[f"{QUERY}.lora_B.weight"]
    module = next(m for m in found["modules"] if m["name"] == QUERY.removeprefix("base_model.model."))
    assert (module["rank"], module["shape"], module["scale"]) == (4, [32, 32], 2.0)
    assert module["parameters"] == a.numel() + b.numel()
    assert module["a_norm"] == pytest.approx(float(a.norm()), rel=1e-5)
    assert module["b_norm"] == pytest.approx(float(b.norm()), rel=1e-5)
    assert module["update_norm"] == pytest.approx(float((2 * b @ a).norm()), rel=1e-5)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == (world / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (found["method"], found["base"], found["dtypes"]) == ("LORA", str(world / "base"), ["float32"])
    assert found["fingerprint"]["architecture"] == "LlamaForCausalLM"
    mine = [m["update_norm"] for m in found["modules"] if ".layers.1." in m["name"]]
    assert found["layers"]["model.layers.1"] == pytest.approx(math.hypot(*mine))
    assert len(mine) == 2


def test_the_update_norm_is_what_merging_changes(world: Path) -> None:
    from deltatune.train.loading import find_target, load

    model = load(find_target(str(world / "adapter")), dtype="float32").model
    name = QUERY.removeprefix("base_model.model.")
    module = model.get_base_model().get_submodule(name)
    before = module.weight.detach().clone()
    model.merge_adapter()
    change = float((module.weight.detach() - before).norm())
    found = next(m for m in report(world / "adapter").modules if m.name == name)
    assert found.update_norm == pytest.approx(change, rel=1e-4)


def test_tables(cli, world: Path) -> None:
    done = cli("inspect", world / "run")
    assert done.code == 0, done.err
    assert "modules by kind, mean norms (--modules lists each), in model.layers.*" in done.out
    assert done.out.count("q_proj") == 2  # in the targets, and one row for both layers
    assert "█" * 30 in done.out
    every = cli("inspect", world / "run", "--modules")
    assert "1.self_attn.q_proj" in every.out
    assert "0.mlp.up_proj" in every.out


def test_one_file_without_its_config(cli, world: Path, tmp_path: Path) -> None:
    shutil.copy(world / "adapter" / "adapter_model.safetensors", tmp_path / "x.safetensors")
    done = cli("inspect", tmp_path / "x.safetensors", "--json")
    found = json.loads(done.out)
    assert found["method"] is None
    assert {m["scale"] for m in found["modules"]} == {1.0}
    assert "the scale is unknown" in found["remarks"][0]


def test_patterns_and_rslora_set_the_scale() -> None:
    config = {"lora_alpha": 16, "alpha_pattern": {"up_proj": 4}, "use_rslora": True}
    assert lora_scale("model.layers.0.mlp.up_proj", 4, config) == 4 / 2
    assert lora_scale("model.layers.0.self_attn.q_proj", 4, config) == 16 / 2
    assert lora_scale("x", 4, {"lora_alpha": 16}) == 4.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(3, 7), torch.randn(5, 3)),
        (torch.randn(3, 2, 3, 3), torch.randn(5, 3, 1, 1)),  # convolution
        (torch.randn(4, 3, 7), torch.randn(4, 5, 3)),  # experts
    ],
)
def test_the_norm_of_a_product_without_the_product(a: torch.Tensor, b: torch.Tensor) -> None:
    full = b.flatten(1) @ a.flatten(1) if a.dim() != 3 else b @ a
    assert product_norm(a, b) == pytest.approx(float(full.norm()), rel=1e-5)


def test_parts_that_are_no_pair_are_listed_by_name(cli, world: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", world / "base", modules_to_save=["lm_head"])
    found = report(tmp_path / "a")
    head = next(m for m in found.modules if m.name == "lm_head")
    assert (head.rank, head.kind, head.parameters) == (None, "weight", 360 * 32)
    assert found.layers["other"] == pytest.approx(head.norm)
    assert "lm_head" in cli("inspect", tmp_path / "a").out


def test_layers_are_named_by_their_path() -> None:
    assert layer_of("model.layers.12.mlp.experts.3.up") == "model.layers.12"
    assert layer_of("encoder.block.0") == "encoder.block.0"
    assert layer_of("lm_head") == "other"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or cut off"),
        (b"\x00" * 100, "is damaged or cut off"),
        ("half", "is damaged or cut off"),
    ],
)
def test_damaged_files(cli, world: Path, tmp_path: Path, content: bytes | str, message: str) -> None:
    whole = (world / "adapter" / "adapter_model.safetensors").read_bytes()
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    for path in (file, tmp_path):
        done = cli("inspect", path)
        assert (done.code, done.out) == (1, "")
        assert message in done.err
        assert done.err.count("\n") == 1


def test_what_is_no_adapter(cli, world: Path, tmp_path: Path) -> None:
    assert "does not exist" in cli("inspect", tmp_path / "nothing").err
    assert "holds no saved adapter" in cli("inspect", tmp_path).err
    assert "there is one in" in cli("inspect", world).err or cli("inspect", world).code == 0
    (tmp_path / "notes.txt").write_text("x")
    assert "is no safetensors file" in cli("inspect", tmp_path / "notes.txt").err
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        done = cli("inspect", path)
        assert done.code == 1
        assert "is a pickle file" in done.err
        assert "save_file(torch.load" in done.err


def test_a_damaged_config_is_said(cli, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "adapter", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": ')
    assert "adapter_config.json is damaged" in cli("inspect", tmp_path / "a").err


def test_the_header_is_shown(cli, world: Path, tmp_path: Path) -> None:
    tensors = load_file(world / "adapter" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", metadata={"trained_by": "me"})
    done = cli("inspect", tmp_path / "x.safetensors")
    assert "trained_by" in done.out
    assert "me" in done.out
