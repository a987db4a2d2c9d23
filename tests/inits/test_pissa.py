"""PiSSA, OLoRA, MiCA and the orthogonal start: what the cards say beyond the laws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import LoraConfig, get_peft_model
from deltatune.core.weights import WeightRef
from deltatune.inits import Request, find_init


def started(w: torch.Tensor, init: str, r: int = 8, scale: float = 3.0):
    layer = nn.Linear(w.shape[1], w.shape[0])
    layer.weight.data.copy_(w)
    return find_init(init)[0].make(Request(init, WeightRef(layer), "layer", r, scale))


@pytest.fixture
def w():
    u, _ = torch.linalg.qr(torch.randn(48, 48))
    v, _ = torch.linalg.qr(torch.randn(40, 40))
    return u[:, :40] * torch.exp(-torch.arange(40) / 8) @ v


def test_pissa_is_the_best_approximation(w):
    start = started(w, "pissa")
    rest = w - 3.0 * start.b @ start.a
    tail = torch.linalg.svdvals(w)[8:]
    assert float(rest.norm()) == pytest.approx(float(tail.square().sum().sqrt()), rel=1e-4)
    assert torch.allclose(start.b.norm(dim=0), start.a.norm(dim=1), atol=1e-5)  # the scale is split evenly


def test_fast_pissa_approaches_the_exact_one(w):
    exact = torch.linalg.svdvals(w)[:8]

    def error(iterations: int) -> float:
        torch.manual_seed(1)
        start = started(w, f"pissa_niter_{iterations}", scale=1.0)
        return float((torch.linalg.svdvals(start.b @ start.a)[:8] - exact).abs().max())

    assert error(16) < 1e-2
    assert error(16) < error(0)


def test_olora_is_the_qr_decomposition(w):
    start = started(w, "olora")
    assert torch.allclose(start.b.mT @ start.b, torch.eye(8), atol=1e-5)
    q, r = torch.linalg.qr(w)
    assert torch.allclose(start.b @ start.a, q[:, :8] @ r[:8], atol=1e-5)
    whole = started(w, "olora", r=40)
    assert torch.allclose(whole.b @ whole.a, w, atol=1e-5)


def test_orthogonal_factors_are_not_zero_and_their_product_is():
    start = started(torch.randn(600, 500), "orthogonal")
    assert float((start.b @ start.a).abs().max()) < 1e-6
    for factor in (start.a, start.b):  # normal numbers projected on r/2 of r directions, a tenth of them
        assert float(factor.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.1)
        assert int(torch.linalg.matrix_rank(factor)) == 4


def test_mica_trains_a_alone_in_minor_directions(w):
    start = started(w, "mica")
    u, _, _ = torch.linalg.svd(w, full_matrices=False)
    assert torch.allclose(start.b @ start.b.mT, u[:, -8:] @ u[:, -8:].mT, atol=1e-3)
    assert torch.count_nonzero(start.a) == 0
    model = nn.Sequential(nn.Linear(40, 48))
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="mica"))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.0.lora_A.default.weight"]
    model.set_requires_grad("default", False)
    model.set_requires_grad("default", True)
    assert model.get_nb_trainable_parameters()[0] == 3 * 40


def test_the_update_lives_in_2r_directions(w):
    model = nn.Sequential(nn.Linear(40, 48))
    model[0].weight.data.copy_(w)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa"))
    delta = model.adapters.deltas("default")[0]
    with torch.no_grad():
        delta.lora_A.weight.add_(torch.randn(3, 40))
        delta.lora_B.weight.add_(torch.randn(48, 3))
    a, b = delta.factors()
    assert int(torch.linalg.matrix_rank(b @ a)) == 6
