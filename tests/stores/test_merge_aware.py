"""Merge-aware calls under every method that changes a quantised weight: live equals merged, and all of it trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Linear, Sequential

from deltatune import LoraConfig, get_peft_model
from deltatune.core.bank import Bank
from deltatune.core.edits import Delta
from deltatune.errors import ConfigError, DeltatuneError
from deltatune.stores.nf4_layer import Nf4Linear
from laws import METHOD_NAMES, QUANTISED, make, shake

KIND = next(kind for kind in QUANTISED if kind.name == "linear_nf4")


def applies(method: str) -> bool:
    """Whether all that the method does here is a change of weights, without dropout."""
    try:
        model, _ = make(method, KIND)
        model.set_merge_aware()
    except DeltatuneError:
        return False
    return all(isinstance(edit, (Delta, Bank)) for edit in model.adapters.edits["default"])


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
@pytest.mark.parametrize("method", [m for m in METHOD_NAMES if applies(m)])
def test_live_is_what_a_merge_leaves(method, rounding):
    model, x = make(method, KIND)
    shake(model, scale=0.03)
    params = [p for p in model.parameters() if p.requires_grad]

    def reached() -> list[bool]:
        found = torch.autograd.grad(model(x).square().sum(), params, allow_unused=True)
        return [g is not None and bool(g.any()) for g in found]

    wanted, plain = reached(), model(x)
    model.set_merge_aware(rounding=rounding)
    assert reached() == wanted
    live = model(x)
    assert not torch.equal(live, plain)
    for into in ("same", "dense"):
        model.merge_adapter(into=into)
        assert torch.allclose(model(x), live, atol=2e-5)
        model.unmerge_adapter()
        assert torch.allclose(model(x), live, atol=2e-5)


def test_an_adapter_with_dropout_is_refused_later_too():
    model = get_peft_model(Sequential(Nf4Linear.of(Linear(64, 64))), LoraConfig(r=2, target_modules=["0"]))
    model.set_merge_aware()
    with pytest.raises(ConfigError, match=r"lora_dropout=0.1 has no input to act on; set lora_dropout=0"):
        model.add_adapter("late", LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1))
    assert list(model.peft_config) == ["default"]
    model.set_merge_aware(False)
    model.add_adapter("late", LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1))


def test_most_methods_are_here():
    assert {"LORA", "LORA+dora", "VERA", "LOHA", "SHIRA", "HIRA", "ADALORA"} <= set(filter(applies, METHOD_NAMES))
