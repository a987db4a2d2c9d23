"""Tiny models for soft prompts, and what every prompt must get right on them."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tiny import gpt2, llama, t5

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63}


def bart(seed: int = 0):
    torch.manual_seed(seed)
    config = BartConfig(
        d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2, vocab_size=64,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=60, pad_token_id=0,
        bos_token_id=1, eos_token_id=63, decoder_start_token_id=63, forced_eos_token_id=None, init_std=0.3,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def mistral(seed: int = 0):
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**SMALL, **ENDS, num_key_value_heads=2, sliding_window=4)).eval()


def gemma2(seed: int = 0):
    torch.manual_seed(seed)
    options = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **ENDS, **options)).eval()


def gemma3(seed: int = 0):
    torch.manual_seed(seed)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SMALL, **ENDS, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=layers)
    return Gemma3ForCausalLM(config).eval()


def qwen3(seed: int = 0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, **ENDS, num_key_value_heads=2, head_dim=8)).eval()


def roberta(seed: int = 0):
    torch.manual_seed(seed)
    config = RobertaConfig(**SMALL, max_position_embeddings=42, pad_token_id=1)
    return RobertaForSequenceClassification(config).eval()


DECODERS = {"llama": llama, "gpt2": gpt2, "mistral": mistral, "gemma2": gemma2, "gemma3": gemma3, "qwen3": qwen3}
SEQ2SEQ = {"t5": t5, "bart": bart}


def padded(rows: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows of different length."""
    n = max(len(r) for r in rows)
    gaps = [n - len(r) for r in rows]
    pads = [([0] * g, [1] * len(r)) for g, r in zip(gaps, rows, strict=True)]
    if side == "left":
        both = [(p + r, p + m) for (p, m), r in zip(pads, rows, strict=True)]
    else:
        both = [(r + p, m + p) for (p, m), r in zip(pads, rows, strict=True)]
    return torch.tensor([i for i, _ in both]), torch.tensor([m for _, m in both])


ROWS = [[5, 9, 22, 41, 8, 17, 30], [12, 44, 3], [7, 7, 51, 33, 20]]
