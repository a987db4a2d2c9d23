"""QPiSSA and LoftQ with their base, QDoRA, and QA-LoRA's group-wise adapters."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from deltatune import LoraConfig, get_peft_model, quantize_and_adapt
from deltatune.errors import ConfigError
from deltatune.inits.loftq import alternate, product
from deltatune.inits.pissa import principal
from deltatune.stores import quantised
from deltatune.stores.nf4 import round_trip
from quantised import HERE, stored
from tiny import shake


def decaying(n: int = 256) -> torch.Tensor:
    u, _ = torch.linalg.qr(torch.randn(n, n))
    v, _ = torch.linalg.qr(torch.randn(n, n))
    return u * torch.exp(-torch.arange(n) / 40) @ v


class Net(nn.Module):
    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(w.shape[1], w.shape[0])
        self.layer.weight.data = w.clone()
        self.other = nn.Linear(w.shape[0], w.shape[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(torch.tanh(self.layer(x)))


def test_the_card_numbers_of_the_alternation():
    w = decaying()

    def error(r: int, rounds: int) -> float:
        low, q = alternate(w, r, rounds, round_trip, principal_first=True)
        return float(torch.linalg.svdvals(w - q - product(low)).sum())

    plain = float(torch.linalg.svdvals(w - round_trip(w)).sum())
    for r, one, five in ((8, 4.00, 3.58), (32, 2.35, 1.67), (128, 0.22, 0.09)):  # of 4.68; ours is another matrix
        assert error(r, 1) / plain == pytest.approx(one / 4.68, abs=0.08)
        assert error(r, 5) / plain == pytest.approx(five / 4.68, abs=0.08)
    low, q = alternate(w, 8, 1, round_trip, principal_first=True)
    assert torch.allclose(q, round_trip(w - product(principal(w, 8))), atol=1e-6)  # PiSSA, then quantise the rest
    low, q = alternate(w, 8, 3, lambda x: x, principal_first=True)  # a quantiser that loses nothing
    assert torch.allclose(product(low), product(principal(w, 8)), atol=1e-5)


@pytest.mark.parametrize("start", ["qpissa", "loftq"])
def test_base_and_adapter_make_up_the_weight(start):
    w, x = decaying(128), torch.randn(3, 128)
    model = quantize_and_adapt(Net(w), LoraConfig(r=16, target_modules=["layer"]), start)
    layer = model.get_base_model().layer
    assert quantised(model.get_base_model().other) is not None
    assert len(model.adapters.edits["default"][0].slots) == 2  # a plain LoRA: nothing is subtracted
    near = model.adapters.edits["default"][0].merged(layer.weight)
    near = near.detach()
    assert float((near - w).norm()) < 0.8 * float((round_trip(w) - w).norm())
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, near, layer.bias), atol=1e-5)
    before, live = stored(layer), model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), live, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, stored(layer), strict=True))
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_it_refuses():
    config = LoraConfig(r=4, target_modules=["layer"])
    with pytest.raises(ConfigError, match='start must be "qpissa" or "loftq"'):
        quantize_and_adapt(Net(torch.randn(64, 64)), config, "pissa")
    with pytest.raises(ConfigError, match="init_lora_weights must be True"):
        quantize_and_adapt(Net(torch.randn(64, 64)), LoraConfig(target_modules=["layer"], init_lora_weights="pissa"))
    net = Net(torch.randn(64, 64))
    with pytest.raises(ConfigError, match="fills a plain pair of factors, which DoraDelta does not have"):
        quantize_and_adapt(net, LoraConfig(r=4, target_modules=["layer"], use_dora=True))
    assert all(type(layer) is torch.nn.Linear for layer in (net.layer, net.other))  # as they were


def test_qdora_starts_at_the_norms_of_the_unpacked_weight():
    net = Net(torch.randn(64, 64))
    net.layer = HERE["nf4"](net.layer)
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["layer"], use_dora=True))
    ratio = model.adapters.edits["default"][0].ratio()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-6)
    x = torch.randn(2, 64)
    with model.disable_adapter():
        assert torch.allclose(model(x), base := model(x))
    assert torch.allclose(model(x), base, atol=1e-5)


def grouped(kind: str, group: int = 64):
    torch.manual_seed(0)
    net = Net(torch.randn(64, 128) / 8)
    net.layer = HERE[kind](net.layer)
    options = {"use_qalora": True, "qalora_group_size": group, "r": 4, "target_modules": ["layer"]}
    model = get_peft_model(net, LoraConfig(**options))
    shake(model)
    return model


def test_qalora_is_constant_within_groups_and_sums_its_inputs():
    model, x = grouped("nf4", 32), torch.randn(3, 128)
    delta = model.adapters.edits["default"][0]
    assert delta.lora_A.weight.shape == (4, 4)
    w = torch.zeros(64, 128)
    change = delta.merged(w).view(64, 4, 32)
    assert torch.equal(change, change[..., :1].expand_as(change))
    pooled = x.view(3, 4, 32).sum(-1)  # the paper's pool(x) · g
    wanted = delta.scale * pooled @ delta.lora_A.weight.T @ delta.lora_B.weight.T
    assert torch.allclose(delta.update(x, x), wanted, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="needs hqq")
def test_qalora_merges_exactly_into_zero_points():
    model, x = grouped("hqq_4"), torch.randn(3, 128)
    layer, live = model.get_base_model().layer, model(x)
    codes = layer.W_q.clone()
    model.merge_adapter(into="same")
    assert torch.equal(layer.W_q, codes)
    assert torch.allclose(model(x), live, atol=1e-4)
    assert type(layer).__name__ == "HQQLinear"


def test_what_qalora_refuses():
    with pytest.raises(ConfigError, match="qalora_group_size=48 does not divide the 128 inputs"):
        grouped("nf4", 48)
    with pytest.raises(ConfigError, match="random A and a zero B"):
        get_peft_model(
            Net(torch.randn(64, 64)),
            LoraConfig(r=4, target_modules=["layer"], use_qalora=True, init_lora_weights="pissa"),
        )
    net = nn.Sequential(nn.Conv2d(4, 4, 1))
    with pytest.raises(ConfigError, match="groups the inputs of a linear layer"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], use_qalora=True, qalora_group_size=2))
