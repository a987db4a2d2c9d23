"""The NF4 codec against its construction, the card's numbers, and bitsandbytes bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from deltatune.stores.nf4 import (
    NF4,
    dequantize_nf4,
    dynamic_map,
    from_codes,
    normal_float,
    pack,
    quantize_nf4,
    round_trip,
    to_codes,
    unpack,
)

SHAPES = [(32, 128), (7, 9), (129,), (2, 3, 50)]


def test_codes_are_the_normal_quantiles():
    assert torch.allclose(normal_float(4), NF4, atol=2e-7, rtol=0)
    assert [len(normal_float(b)) for b in (2, 4, 8)] == [4, 16, 256]
    assert all(normal_float(b).max() == 1 and normal_float(b).min() == -1 and 0 in normal_float(b) for b in (2, 4, 8))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert float(dynamic_map()[0]) == pytest.approx(-0.99296875)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact_with_bitsandbytes(shape, dtype):
    w = (torch.randn(shape) * torch.rand(shape)).to(dtype)
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    ours = quantize_nf4(w)
    assert torch.equal(ours.packed, theirs)
    assert torch.equal(ours.absmax, state.absmax)
    index = unpack(ours.packed, w.numel())
    wanted = from_codes(index, state.absmax, state.code, 64).view(shape).to(dtype)
    assert torch.equal(dequantize_nf4(ours), wanted)
    # their CPU kernel misreads rows that are no multiple of the block, and is compiled anew for every shape
    if shape == SHAPES[0]:
        assert torch.equal(dequantize_nf4(ours), bnb.dequantize_4bit(theirs, state))


def test_midpoints_go_to_the_lower_code_as_in_bitsandbytes():
    middle = (NF4[1:] + NF4[:-1]) / 2
    for x in (middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))):
        w = torch.cat([torch.ones(1), x, torch.zeros(48)])
        theirs, _ = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
        assert torch.equal(quantize_nf4(w).packed, theirs)


def test_double_quantisation():
    w = torch.randn(256, 256)
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    ours = quantize_nf4(w, double=True)
    assert torch.equal(ours.packed, theirs)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.absmax2, state.state2.absmax)
    apart = (ours.absmax.int() - state.absmax.int()).abs()
    assert apart.max() <= 1  # see the module's docstring
    assert (apart > 0).float().mean() < 0.01
    from dataclasses import replace

    read = dequantize_nf4(replace(ours, absmax=state.absmax))
    assert torch.equal(read, bnb.dequantize_4bit(theirs, state))
    exact = dequantize_nf4(quantize_nf4(w))
    assert float((dequantize_nf4(ours) - exact).norm() / exact.norm()) < 0.01


def test_codes_survive_and_errors_are_bounded():
    absmax = torch.rand(8, 1) + 0.5
    w = NF4[torch.randint(0, 16, (8, 64))] * absmax
    w[:, 3] = absmax[:, 0]  # every block has its largest magnitude
    assert torch.equal(round_trip(w), w)
    w = torch.randn(40, 64)
    error = (round_trip(w) - w).abs()
    assert bool((error <= w.abs().amax(1, keepdim=True) * 0.1519037).all())
    largest = w.abs().argmax(1, keepdim=True)
    assert torch.equal(round_trip(w).gather(1, largest), w.gather(1, largest))


def test_mean_square_error_of_a_unit_gaussian():
    w = torch.randn(512, 512)
    assert float((round_trip(w) - w).square().mean()) == pytest.approx(0.0085, abs=3e-4)
    assert float((round_trip(w, 8) - w).square().mean()) < 1e-4
    assert 0.02 < float((round_trip(w, 2) - w).square().mean()) < 0.5


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65])
def test_packing_is_undone(n):
    index = torch.randint(0, 16, (n,), dtype=torch.uint8)
    packed = pack(index)
    assert packed.shape == ((n + 1) // 2, 1)
    assert torch.equal(unpack(packed, n), index)


def test_zeros_and_bytes():
    q = quantize_nf4(torch.zeros(3, 64))
    assert torch.equal(dequantize_nf4(q), torch.zeros(3, 64))
    q = quantize_nf4(torch.randn(256, 256), double=True)
    stored = q.packed.numel() + q.absmax.numel() + 4 * q.absmax2.numel()
    assert stored == 256 * 256 // 2 + 1024 + 4 * 4  # 4.127 bits per weight and the mean
    index, absmax = to_codes(torch.ones(5), NF4, 64)
    assert index.tolist() == [15] * 5
    assert absmax.tolist() == [1.0]
