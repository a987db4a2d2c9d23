"""Norms before, after and inside the residual, told from the order of calls and the module's own flags."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from deltatune import HoulsbyConfig, PfeifferConfig, get_peft_model
from deltatune.core.calls import SUM, calls
from deltatune.core.sublayers import find_sublayers
from tiny import shake

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
WIDE = {"hidden_size": 32, "intermediate_size": 48, **HEADS}
OPT = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40, **HEADS}
BEFORE = {
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**WIDE, pad_token_id=0)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(hidden_size=32, **HEADS)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**WIDE)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**WIDE, use_parallel_residual=False)),
    "torch": lambda: stack(norm_first=True),
}
AFTER = {
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, do_layer_norm_before=False)),
    "torch": lambda: stack(norm_first=False),
}
NORMS = {"opt": ["self_attn_layer_norm", "final_layer_norm"], "torch": ["norm1", "norm2"]}


def stack(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("name", BEFORE)
def test_norms_that_are_not_on_the_sum(name):
    assert [s.norm for s in find_sublayers(BEFORE[name]())] == [None] * 4


@pytest.mark.parametrize("name", AFTER)
def test_norms_on_the_sum(name):
    subs = find_sublayers(AFTER[name]())
    assert [s.norm for s in subs] == [f"{s.block.path}.{n}" for s, n in zip(subs, NORMS[name] * 2, strict=True)]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("config", [HoulsbyConfig, PfeifferConfig])
def test_every_adapter_of_torchs_own_layers_runs(norm_first, config):
    model = get_peft_model(stack(norm_first), config(reduction_factor=4))
    shake(model)
    model(torch.randn(2, 3, 16)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead


def test_the_order_of_a_block():
    block = BEFORE["opt"]().model.decoder.layers[0]
    parts = ["self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc1", "fc2"]
    found = [e for e in calls(block, "b", {f"b.{p}" for p in parts}) if e != SUM]
    assert found == [f"b.{p}" for p in parts]
