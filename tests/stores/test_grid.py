"""Numbers on a grid: which code a change leads to, against the definition, one number at a time."""

from __future__ import annotations

import bisect
import math

import pytest
import torch

from deltatune import LoraConfig, get_peft_model
from deltatune.core.rounding import Rounding
from deltatune.errors import ConfigError
from deltatune.stores import find_store, put_weight, quantised
from deltatune.stores.grid import CUT, BeyondGridError, in_blocks, moved, stepped
from deltatune.stores.nf4 import NF4, dequantize_nf4, move_nf4, quantize_nf4
from quantised import HERE, stored

FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0625, -8, -12, -4, -6, -2, -3]) / 12


def by_hand(code: int, change: float, draw: float, levels: list[float]) -> float:
    """The level that the docstring of `grid` gives."""
    ordered = sorted(levels)
    at = torch.tensor(levels[code]) + change
    low = min(max(bisect.bisect_right(ordered, float(at)) - 1, 0), len(levels) - 2)
    below, above = ordered[low], ordered[low + 1]
    return above if float((at - below) / (above - below)) > draw else below


@pytest.mark.parametrize("levels", [NF4, FP4, torch.arange(-8.0, 8)], ids=["nf4", "fp4", "whole"])
@pytest.mark.parametrize("size", [0.02, 0.3, 5.0])
def test_as_defined(levels, size):
    code = torch.randint(0, len(levels), (400,), dtype=torch.uint8)
    change, draw = torch.randn(400) * size * float(levels.sort().values.diff().max()), torch.rand(400) * 0.998 + 0.001
    cut = 0.99 * CUT * float(levels.max() - levels.min())
    change = (levels[code.int()] + change).clamp(levels.min() - cut, levels.max() + cut) - levels[code.int()]
    new = moved(code, change, draw, levels)
    wanted = [by_hand(*row, levels.tolist()) for row in zip(code.tolist(), change.tolist(), draw.tolist(), strict=True)]
    assert new.dtype == torch.uint8
    assert levels[new.int()].tolist() == pytest.approx(wanted)
    assert torch.equal(moved(code, torch.zeros(400), draw, levels), code)


def test_whole_levels_are_a_sum_and_a_floor():
    code, levels = torch.randint(0, 16, (400,), dtype=torch.uint8), torch.arange(16.0)
    change, draw = torch.randn(400).clamp(-0.9, 0.9), (torch.randint(0, 4096, (400,)) + 0.5) / 4096
    assert torch.equal(stepped(code, change, draw, 0, 15).to(torch.uint8), moved(code, change, draw, levels))
    high = torch.full((4096,), 255.0)  # the largest draw of all leaves the largest code where it is
    every = (torch.arange(4096) + 0.5) / 4096
    assert torch.equal(stepped(high, torch.zeros(4096), every, 0, 255), high)
    assert torch.equal(stepped(high - 1, torch.zeros(4096), every, 0, 255), high - 1)


def test_blocks_that_are_short_and_blocks_of_zeros():
    units = in_blocks(torch.ones(2, 5), torch.tensor([2.0, 0.0, 4.0]), 4)
    assert units.tolist() == [0.5] * 4 + [math.inf] * 4 + [0.25] * 2
    assert in_blocks(torch.zeros(2, 5), torch.tensor([2.0, 0.0, 1e-40]), 4).tolist() == [0.0] * 10
    code = torch.full((10,), 7, dtype=torch.uint8)
    with pytest.raises(BeyondGridError):
        moved(code, units, torch.full((10,), 0.5), NF4)
    assert moved(code, units, torch.full((10,), 0.5), NF4, clip=True)[4:8].tolist() == [15] * 4
    w = torch.randn(7, 19)
    q = quantize_nf4(w, double=True)
    base, draw = dequantize_nf4(q), torch.rand(7, 19) * 0.99 + 0.005
    assert torch.equal(dequantize_nf4(move_nf4(q, torch.zeros(7, 19), draw)), base)
    got = dequantize_nf4(move_nf4(q, torch.full((7, 19), 0.02), draw)) - base
    assert 0 < int((got > 0).sum()) < 60
    assert float(got.min()) == 0


@pytest.mark.parametrize("name", HERE)
def test_a_few_changes_beyond_the_grid_do_not_decide_for_the_rest(name):
    """One far number, or rows of zeros, and all other changes are there in the mean still."""
    if name == "ao_float8":
        pytest.skip("torchao's float8 gives rows of zeros no number")
    layer = torch.nn.Linear(64, 128)
    with torch.no_grad():
        layer.weight[:8] = 0
    layer = HERE[name](layer)
    weight = quantised(layer)
    store, change = find_store(weight), torch.randn(128, 64) * 0.003
    base = store.load(weight).float()
    for rows, far in ((slice(8, None), 0.0), (slice(None), 0.05)):
        wanted = torch.zeros(128, 64)
        wanted[rows] = change[rows]
        wanted[9, 9] += far
        got = torch.zeros(128, 64)
        for seed in range(16):
            new = Rounding(seed=seed).put(store, weight, base + wanted, "layer", "weight")
            got += (store.load(new).float() - base) / 16
        live = slice(10, None)
        assert 0.85 < float((got[live] * wanted[live]).sum() / wanted[live].square().sum()) < 1.1


@pytest.mark.parametrize("name", [n for n in HERE if n not in ("gptq", "awq", "ao_int4", "ao_nf4", "hqq_4", "hqq_8")])
def test_no_change_of_a_weight_of_odd_size(name):
    layer = HERE[name](torch.nn.Linear(7, 5))
    weight, before = quantised(layer), stored(layer)
    store = find_store(weight)
    put_weight(layer, "weight", Rounding().put(store, weight, store.load(weight).float(), "layer", "weight"))
    assert all(torch.equal(a, b) for a, b in zip(before, stored(layer), strict=True))


@pytest.mark.parametrize("name", HERE)
def test_what_is_not_finite_is_refused_and_shows(name):
    layer = torch.nn.Sequential(HERE[name](torch.nn.Linear(64, 64)))
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"]))
    before, x = stored(layer[0]), torch.randn(2, 64)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[3, 0] = torch.nan
    with pytest.raises(ConfigError, match="would give numbers that are not finite"):
        model.merge_adapter(into="same")
    assert all(torch.equal(a, b) for a, b in zip(before, stored(layer[0]), strict=True))
    model.set_merge_aware()
    with torch.no_grad():
        assert model(x)[:, 3].isnan().all()
