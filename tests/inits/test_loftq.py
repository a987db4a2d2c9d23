"""LoftQ and QPiSSA's alternation: the cards' numbers."""

from __future__ import annotations

import pytest
import torch

from deltatune import ConfigError, LoraConfig, get_peft_model, loftq_weights
from deltatune.inits.loftq import alternate, product
from deltatune.inits.pissa import principal
from deltatune.stores.nf4 import round_trip
from tiny import gpt2, ids, llama, shake


@pytest.fixture(scope="module")
def decaying():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(256, 256))
    v, _ = torch.linalg.qr(torch.randn(256, 256))
    return u * torch.exp(-torch.arange(256) / 40) @ v


def nuclear(w: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(w).sum())


def test_qpissa_leaves_less_with_every_rank_and_round(decaying):
    plain = decaying - round_trip(decaying)
    before = [nuclear(plain), float(plain.norm())]
    for r in (8, 32, 128):
        for rounds in (1, 2, 5):
            low, q = alternate(decaying, r, rounds, round_trip, principal_first=True)
            left = decaying - q - product(low)
            errors = [nuclear(left), float(left.norm())]
            assert errors[0] < before[0]
            assert errors[1] < before[1]
            before = errors
    assert before[0] < 0.03 * nuclear(plain)  # rank 128 holds nearly all of this matrix


def test_one_round_of_qpissa_is_pissa_and_the_rest_quantised(decaying):
    low, q = alternate(decaying, 8, 1, round_trip, principal_first=True)
    assert torch.allclose(product(low), product(principal(decaying, 8)))
    assert torch.equal(q, round_trip(decaying - product(low)))
    low, q = alternate(decaying, 8, 3, lambda w: w, principal_first=True)
    assert torch.allclose(q + product(low), decaying, atol=1e-6)  # a quantiser that does nothing gives PiSSA


def test_loftq_makes_up_for_the_error(decaying):
    plain = float((decaying - round_trip(decaying)).norm())
    errors = []
    for rounds in (1, 2, 5):
        low, q = alternate(decaying, 16, rounds, round_trip)
        errors.append(float((decaying - q - product(low)).norm()))
    assert plain > errors[0] >= errors[1] >= errors[2]
    low, q = alternate(decaying, 16, 1, round_trip)
    assert torch.equal(q, round_trip(decaying))
    assert torch.allclose(product(low), product(principal(decaying - q, 16)), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_weights_and_the_plain_pair_are_near_the_dense_model(bits):
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "up_proj", "down_proj"],
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": bits, "loftq_iter": 4},
    )
    model = get_peft_model(llama(), config)
    quantised = loftq_weights(model)
    assert quantised.keys() == {f"{d.host.path}.weight" for d in model.adapters.deltas("default")}
    naive = ours = 0.0
    for delta in model.adapters.deltas("default"):
        q, w = quantised[f"{delta.host.path}.weight"], delta.ref.load()
        assert torch.equal(round_trip(q, bits), q)  # it is exact in these bits
        a, b = delta.lora_A.weight.detach(), delta.lora_B.weight.detach()
        assert torch.equal(a, delta.start[0].weight)
        ours += float((w - q - 2.0 * b @ a).norm())
        naive += float((w - round_trip(w, bits)).norm())
    assert ours < 0.9 * naive

    shake(model, scale=0.05)
    with torch.no_grad():
        wanted = model(input_ids=ids()).logits
    few = llama()
    few.load_state_dict(quantised, strict=False)
    plain = get_peft_model(few, LoraConfig(r=8, lora_alpha=16, target_modules=config.target_modules))
    for mine, theirs in zip(plain.adapters.deltas("default"), model.adapters.deltas("default"), strict=True):
        mine.lora_A.weight.data.copy_(theirs.lora_A.weight)
        mine.lora_B.weight.data.copy_(theirs.lora_B.weight)
    with torch.no_grad():
        error = float((plain(input_ids=ids()).logits - wanted).norm() / wanted.norm())
    assert error < {2: 0.5, 4: 0.15, 8: 0.02}[bits]


def test_transposed_weights_are_quantised_in_the_order_they_are_stored():
    model = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="loftq"))
    for name, q in loftq_weights(model).items():
        w = dict(gpt2().named_parameters())[name]
        assert q.shape == w.shape
        assert torch.equal(q, round_trip(w))


def test_what_cannot_be_done_is_said():
    with pytest.raises(ConfigError, match="needs a model with an adapter"):
        loftq_weights(llama())
    with pytest.raises(ConfigError, match="does not start by LoftQ"):
        loftq_weights(get_peft_model(llama(), LoraConfig()))
