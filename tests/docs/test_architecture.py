"""The examples of ARCHITECTURE.md do what it says they do: everything else is inherited."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from blocks import ROOT, blocks, module, run
from torch import nn

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.config import METHODS, PeftType, _PeftTypes
from deltatune.core.ops import BIASED, OPS
from deltatune.errors import MixedBatchError
from deltatune.inits import INITS
from deltatune.stores import BACKENDS, STORES
from laws import MATRICES, QUANTISED, Net

PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
TABLES: list[dict[str, Any]] = [METHODS, _PeftTypes.names, OPS, BIASED, INITS, STORES]


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The names that the block with this mark defines; what it registers is taken back."""
    for backend in BACKENDS.values():  # registers at its first import, which must not fall between here and the end
        import_module(backend)
    before = [dict(table) for table in TABLES]
    (block,) = [b for b in blocks(PAGE, "python") if b.mark == request.param]
    yield run(block, "ARCHITECTURE.md", module(f"architecture_{request.param}"))
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)
    del sys.modules[f"architecture_{request.param}"]


def random_start(model: PeftModel) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))


@torch.no_grad()
def check_mixes(model: PeftModel, x: torch.Tensor) -> None:
    """Rows choose their adapter."""
    mixed = model(x, adapter_names=["default", "__base__"] * (len(x) // 2))
    assert torch.allclose(mixed[0::2], model(x)[0::2], atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(mixed[1::2], model(x)[1::2], atol=1e-5)


def check_merges(model: PeftModel, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Does something, equals its merged form, restores the base."""
    with torch.no_grad():
        live = model(x)
        with model.disable_adapter():
            base = model(x)
        assert not torch.allclose(live, base, atol=1e-3)
        model.merge_adapter()
        assert torch.allclose(model(x), live, atol=tolerance)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), base)


def test_every_python_block_has_a_test():
    assert [b.mark for b in blocks(PAGE, "python")] == ["method", "layer", "store", "init"]


def test_the_method_is_short():
    (block,) = [b for b in blocks(PAGE, "python") if b.mark == "method"]
    assert len(block.code.splitlines()) < 40


@pytest.mark.parametrize("example", ["method"], indirect=True)
@pytest.mark.parametrize("kind", MATRICES, ids=lambda kind: kind.name)
def test_method(example, kind, tmp_path):
    assert PeftType.ROW_SCALE == "ROW_SCALE"
    model = get_peft_model(kind.net().eval(), example["RowScaleConfig"](target_modules=["layer"]))
    random_start(model)
    x = kind.x()
    check_merges(model, x)
    with pytest.raises(MixedBatchError) if kind.name == "multihead" else contextlib.nullcontext():
        check_mixes(model, x)
    model.save_pretrained(tmp_path)
    model.set_requires_grad("default", False)
    live = model(x)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again(x), live)


@pytest.mark.parametrize("example", ["method"], indirect=True)
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_method_on_a_quantised_base(example, kind, tmp_path):
    model = get_peft_model(kind.net().eval(), example["RowScaleConfig"](target_modules=["layer"]))
    random_start(model)
    x = kind.x()
    check_merges(model, x, tolerance=1e-4 + kind.loose)
    check_mixes(model, x)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        live = model(x)
        torch.manual_seed(0)
        assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), live)


@pytest.mark.parametrize("example", ["layer"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_layer(example, options):
    net = Net(example["HeadLinear"](12, 4, 4), 16).eval()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"], **options))
    random_start(model)
    check_merges(model, torch.randn(6, 3, 12))
    check_mixes(model, torch.randn(6, 3, 12))


@pytest.mark.parametrize("example", ["store"], indirect=True)
def test_store(example):
    net = Net(example["Int8Linear"](12, 16), 16).eval()
    net.layer.weight = example["Int8Weight"].of(net.layer.weight.detach())
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"]))
    random_start(model)
    check_merges(model, torch.randn(6, 3, 12), tolerance=2e-2)  # merging rounds to 8 bits
    check_mixes(model, torch.randn(6, 3, 12))
    model.merge_adapter()
    assert type(net.layer.weight) is example["Int8Weight"]
    assert net.layer.weight.dtype == torch.int8


@pytest.mark.parametrize("example", ["init"], indirect=True)
def test_init(example):
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="first_inputs")
    layer = get_peft_model(nn.Sequential(nn.Linear(5, 3)), config).get_base_model()[0]
    assert torch.equal(layer.lora_A.default.weight, torch.eye(2, 5))
    assert torch.equal(layer.lora_B.default.weight, torch.zeros(3, 2))


def test_the_example_script_has_the_same_method():
    """examples/custom_method.py shows the class of ARCHITECTURE.md."""
    script = (ROOT / "examples" / "custom_method.py").read_text(encoding="utf-8")
    (block,) = [b for b in blocks(PAGE, "python") if b.mark == "method"]
    start, end = block.code.index("class RowScaleDelta"), len(block.code)
    assert block.code[start:end].strip() in script
