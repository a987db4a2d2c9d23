"""LoKr: what the laws do not cover."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import LoKrConfig, get_peft_model
from deltatune.core.ops import kronecker
from deltatune.methods.lokr import split
from tiny import shake


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), LoKrConfig(target_modules=["0"], **options)).eval()
    shake(model)
    return model, model.adapters.edits["default"][0]


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {n.split(".")[-2]: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("size", "factor", "pair"),
    [
        (48, -1, (6, 8)), (48, 24, (24, 2)), (48, 5, (4, 12)), (48, 100, (6, 8)), (7, -1, (1, 7)), (2, 2, (2, 1)),
        (1, -1, (1, 1)), (576, -1, (24, 24)),
    ],
)  # fmt: skip
def test_split(size, factor, pair):
    assert split(size, factor) == pair


@pytest.mark.parametrize("init", [True, "lycoris"])
def test_which_factor_starts_at_zero(init):
    model = get_peft_model(
        nn.Sequential(nn.Linear(48, 60)), LoKrConfig(target_modules=["0"], r=2, init_weights=init, decompose_both=True)
    )
    zero = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and not p.any()}
    assert zero == ({"lokr_w1_a"} if init is True else {"lokr_w2_b"})
    model(torch.randn(3, 48)).square().sum().backward()
    live = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and p.grad.any()}
    assert live == zero


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"r": 2}, {"lokr_w1": (6, 6), "lokr_w2_a": (10, 2), "lokr_w2_b": (2, 8)}),
        ({"r": 5}, {"lokr_w1": (6, 6), "lokr_w2": (10, 8)}),
        (
            {"r": 2, "decompose_both": True},
            {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (10, 2), "lokr_w2_b": (2, 8)},
        ),
        ({"r": 1, "decompose_factor": 4}, {"lokr_w1": (4, 4), "lokr_w2_a": (15, 1), "lokr_w2_b": (1, 12)}),
    ],
)
def test_shapes(options, wanted):
    assert shapes(adapted(nn.Linear(48, 60), **options)[0]) == wanted


def test_is_the_kronecker_product():
    model, delta = adapted(nn.Linear(48, 60), r=2, alpha=6)
    x = torch.randn(5, 48)
    w1, w2 = delta.factors()
    assert torch.equal(w1, 3 * delta.w1[0].weight)
    base = model.get_base_model()[0]
    with torch.no_grad():
        assert torch.allclose(model(x), x @ (base.weight + torch.kron(w1, w2)).T + base.bias, atol=1e-4)
        rank = torch.linalg.matrix_rank
        assert rank(kronecker(w1, w2)) == rank(w1) * rank(w2) == 12


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("r", [1, 9])
@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d"])
def test_convolutions_live_as_merged(layer, r, effective):
    makes = {
        "conv1d": (lambda: nn.Conv1d(12, 20, 3, padding=1), (2, 12, 6)),
        "conv2d": (lambda: nn.Conv2d(12, 20, 3, stride=2), (2, 12, 7, 7)),
        "conv3d": (lambda: nn.Conv3d(12, 20, 2), (2, 12, 3, 3, 3)),
    }
    make, shape = makes[layer]
    model, delta = adapted(make(), r=r, use_effective_conv2d=effective)
    assert (delta.core is not None) == (effective and r == 1)
    x = torch.randn(shape)
    with torch.no_grad():
        live = model(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), live, atol=1e-3)
        model.merge_adapter()
        assert torch.allclose(model(x), live, atol=1e-4)


@pytest.mark.parametrize("rescale", [False, True])
def test_rank_dropout(rescale):
    model, _ = adapted(nn.Linear(24, 200), r=2, rank_dropout=0.25, rank_dropout_scale=rescale)
    x = torch.randn(7, 24)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        full = model(x) - base
        model.train()
        part = model(x) - base
    kept = (part != 0).any(0)
    assert 0.55 < kept.float().mean() < 0.92
    share = kept.float().mean() if rescale else 1
    assert torch.allclose(part[:, kept] * share, full[:, kept], atol=1e-5)


def test_a_draw_that_keeps_nothing_gives_zero():
    model, _ = adapted(nn.Linear(4, 1), rank_dropout=0.9, rank_dropout_scale=True)
    model.train()
    assert all(torch.isfinite(model(torch.randn(2, 4))).all() for _ in range(20))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decompose_factor": 0}, "decompose_factor must be -1 or at least 1, not 0"),
        ({"decompose_factor": 2.5}, "decompose_factor"),
        ({"init_weights": "pissa"}, "init_weights must be True or False or 'lycoris', not 'pissa'"),
        ({"r": -1}, "at least 1"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        adapted(nn.Linear(4, 4), **options)
