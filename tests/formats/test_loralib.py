"""loralib's helpers and checkpoints, against loralib itself."""

from __future__ import annotations

import loralib
import pytest
import torch
from torch import nn

from deltatune import LoraConfig, get_peft_model
from deltatune.formats.loralib import load_loralib, lora_state_dict, mark_only_lora_as_trainable
from tiny import gpt2, ids, shake


def randomise(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_" in name:
                p.normal_()
    return layer


def plain_of(layer: nn.Module, kind: type, *args, **kwargs) -> nn.Sequential:
    """The base layer with the same weights."""
    plain = kind(*args, **kwargs)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora_" not in k and "conv." not in k})
    return nn.Sequential(plain)


@pytest.mark.parametrize("flags", [[True, False, True], [True, True, True], [False, True, False]])
def test_merged_linear(flags):
    layer = randomise(loralib.MergedLinear(12, 24, r=4, lora_alpha=6, enable_lora=flags, merge_weights=False))
    x = torch.randn(2, 3, 12)
    net = plain_of(layer, nn.Linear, 12, 24)
    state = {f"0.{k}": v for k, v in loralib.lora_state_dict(layer).items()}
    model = load_loralib(net, state, lora_alpha=6, enable_lora=flags)
    assert torch.allclose(model(x), layer(x), atol=1e-5)
    back = lora_state_dict(model)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(back[k], v) for k, v in state.items())
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x), layer(x), atol=1e-5)


def test_linear_embedding_and_biases():
    x = torch.randn(2, 3, 12)
    layer = randomise(loralib.Linear(12, 24, r=4, lora_alpha=6, merge_weights=False))
    net = plain_of(layer, nn.Linear, 12, 24)
    state = {f"0.{k}": v + 1 if k == "bias" else v for k, v in loralib.lora_state_dict(layer, "lora_only").items()}
    model = load_loralib(net, state, lora_alpha=6)
    assert torch.allclose(model(x), layer(x) + 1, atol=1e-5)
    table = randomise(loralib.Embedding(20, 8, r=3, lora_alpha=5, merge_weights=False))
    tokens = torch.randint(0, 20, (2, 5))
    net = plain_of(table, nn.Embedding, 20, 8)
    model = load_loralib(net, {f"0.{k}": v for k, v in loralib.lora_state_dict(table).items()}, lora_alpha=5)
    assert torch.allclose(model(tokens), table(tokens), atol=1e-5)


def test_convolution():
    layer = randomise(loralib.Conv2d(6, 8, 3, r=2, lora_alpha=4, merge_weights=False))
    plain = nn.Conv2d(6, 8, 3)
    plain.weight.data, plain.bias.data = layer.conv.weight.data, layer.conv.bias.data
    x = torch.randn(2, 6, 5, 5)
    state = {"0.lora_A": layer.lora_A.detach(), "0.lora_B": layer.lora_B.detach()}
    model = load_loralib(nn.Sequential(plain), state, lora_alpha=4)
    assert torch.allclose(model(x), layer(x), atol=1e-4)
    with pytest.raises(ValueError, match="has no form in loralib"):
        lora_state_dict(model)


def test_gpt2_round_trip_and_helpers():
    model = get_peft_model(gpt2(), LoraConfig(enable_lora=[True, False, True], r=4, lora_alpha=8))
    shake(model)
    state = lora_state_dict(model)
    assert state["transformer.h.0.attn.c_attn.lora_A"].shape == (8, 32)
    assert state["transformer.h.0.attn.c_attn.lora_B"].shape == (64, 4)
    again = load_loralib(gpt2(), state, lora_alpha=8, enable_lora=[True, False, True])
    assert torch.allclose(again(ids()).logits, model(ids()).logits, atol=1e-6)
    mark_only_lora_as_trainable(model, "lora_only")
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {f"transformer.h.{i}.attn.c_attn.bias" for i in (0, 1)}
    assert len(lora_state_dict(model, "all")) > len(state)
    mark_only_lora_as_trainable(model)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_bad_input():
    good = {"0.lora_A": torch.zeros(4, 12), "0.lora_B": torch.zeros(24, 4)}
    for state, message in (
        ({"1.lora_A": good["0.lora_A"]}, "is no layer of this model"),
        ({"0.lora_A": good["0.lora_A"]}, "has no partner"),
        ({**good, "0.weight": torch.zeros(1)}, "no key that loralib writes"),
        ({**good, "0.lora_A": torch.zeros(4, 13)}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            load_loralib(nn.Sequential(nn.Linear(12, 24)), state, lora_alpha=1)
