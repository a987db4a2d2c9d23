"""Blocks and feed-forward layers of every architecture, from structure; the methods that rely on them run there."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn

import deltatune
from deltatune import get_peft_model
from deltatune.core.structure import attention_layers, feedforward, feedforward_outputs, find_blocks, fused_experts
from deltatune.core.sublayers import find_sublayers
from deltatune.errors import TargetError
from tiny import shake

S = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**S, "num_key_value_heads": 2}
PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VIT = {"image_size": 8, "patch_size": 4, **{k: v for k, v in S.items() if "token" not in k and k != "vocab_size"}}
#: name -> (class, options of its configuration, the ends of a block's feed-forward outputs, does it have biases)
MODELS = {
    "Llama": ("LlamaForCausalLM", GQA, "mlp.down_proj", False),
    "Qwen2": ("Qwen2ForCausalLM", GQA, "mlp.down_proj", True),
    "Qwen3": ("Qwen3ForCausalLM", {**GQA, "head_dim": 8}, "mlp.down_proj", False),
    "Gemma2": ("Gemma2ForCausalLM", {**GQA, "head_dim": 8}, "mlp.down_proj", False),
    "GPT2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
        "mlp.c_proj",
        True,
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", S, "mlp.dense_4h_to_h", True),
    "Bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "pad_token_id": 0},
        "mlp.dense_4h_to_h",
        True,
    ),
    "OPT": ("OPTForCausalLM", {**S, "ffn_dim": 48, "word_embed_proj_dim": 32}, "fc2", True),
    "Bert": ("BertForSequenceClassification", S, "output.dense", True),
    "Roberta": ("RobertaForSequenceClassification", S, "output.dense", True),
    "DebertaV2": ("DebertaV2ForSequenceClassification", S, "output.dense", True),
    "T5": ("T5ForConditionalGeneration", T5, "DenseReluDense.wo", False),
    "Bart": ("BartForConditionalGeneration", PAIR, "fc2", True),
    "Whisper": ("WhisperForConditionalGeneration", {**PAIR, "num_mel_bins": 4, "max_source_positions": 8}, "fc2", True),
    "ViT": ("ViTForImageClassification", VIT, "mlp.fc2", True),
    "Mixtral": ("MixtralForCausalLM", {**GQA, "num_local_experts": 4}, "", False),
}
names = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    kind, options, *_ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(T, f"{name}Config")(**options)
    return getattr(T, kind)(config).eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    x = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    if name == "Whisper":
        return {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": x}
    return {"input_ids": x, "decoder_input_ids": x} if name in ("T5", "Bart") else {"input_ids": x}


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@names
def test_blocks(name):
    model = make(name)
    blocks = find_blocks(model)
    both = name in ("T5", "Bart", "Whisper")
    assert len(blocks) == (4 if both else 2)
    assert [b.index for b in blocks] == [0, 1] * (2 if both else 1)
    for block in blocks:
        if name == "Mixtral":
            assert fused_experts(model, block) == [f"{block.path}.mlp.experts.down_proj"]
            continue
        (output,) = feedforward_outputs(model, block)
        assert output.endswith(MODELS[name][2])
        assert "attention" not in output.removeprefix(block.path)
        assert len(feedforward(model, block)) in (2, 3)
    fused = name in ("GPT2", "GPTNeoX", "Bloom")
    crossing = 2 * 2 if both else 0
    assert len(attention_layers(model, ("k", "v"))) == len(blocks) * (1 if fused else 2) + crossing


METHODS = {
    "IA3Config": {},
    "LNTuningConfig": {},
    "BitFitConfig": {},
    "ShiraConfig": {"r": 1, "target_modules": "all-linear"},
    "FarConfig": {},
    "LoReftConfig": {"prefix_positions": 1, "suffix_positions": 1},
    "DiReftConfig": {},
    "LadderConfig": {"reduction_factor": 2, "residual": True},
}
#: models that a method says it cannot change, and a word of the reason
REFUSED = {
    ("BitFitConfig", "Llama"): "has a bias",
    ("BitFitConfig", "Qwen3"): "has a bias",
    ("BitFitConfig", "Gemma2"): "has a bias",
    ("BitFitConfig", "T5"): "has a bias",
    ("BitFitConfig", "Mixtral"): "has a bias",
    ("FarConfig", "Mixtral"): "have no linear feed-forward layer",
    ("LadderConfig", "ViT"): "embeds no tokens",
}


@names
@pytest.mark.parametrize("method", METHODS)
def test_methods_run_everywhere(method, name, tmp_path):
    config = getattr(deltatune, method)(**METHODS[method])
    if (method, name) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, name]):
            get_peft_model(make(name), config)
        return
    model, inputs = get_peft_model(make(name), config), batch(name)
    base = logits(make(name), inputs)
    assert torch.allclose(logits(model, inputs), base, atol=1e-5)
    shake(model)
    live = logits(model, inputs)
    assert not torch.allclose(live, base, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = deltatune.PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.allclose(logits(again, inputs), live, atol=1e-6)
    if method not in ("LoReftConfig", "DiReftConfig", "LadderConfig"):
        assert torch.allclose(logits(model.merge_and_unload(), inputs), live, atol=1e-4)


def test_a_model_without_blocks():
    with pytest.raises(TargetError, match="no block is found in this Sequential"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_what_a_sub_layer_reads_is_behind_the_blocks_norm_and_not_the_querys():
    """Qwen 3 norms queries and keys inside its attention."""
    from methods.transformers_zoo import make

    subs = {s.kind: s for s in find_sublayers(make("qwen")) if s.block.index == 1}
    assert subs["attention"].residual == "model.layers.1.input_layernorm"
    assert subs["feedforward"].residual == "model.layers.1.post_attention_layernorm"
    assert {s.kind: s.adds for s in subs.values()} == {
        "attention": "model.layers.1.self_attn.o_proj",
        "feedforward": "model.layers.1.mlp.down_proj",
    }
    assert all(s.adds is None for s in find_sublayers(make("gpt_neox")) if s.kind == "attention")
