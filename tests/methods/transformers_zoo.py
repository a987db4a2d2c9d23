"""A tiny model of every architecture that block-wise methods are promised on, and an input for it."""

from __future__ import annotations

import torch
import transformers as t

S = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip
GQA = {**S, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {
    "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "decoder_start_token_id": 1, **ENDS,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **ENDS}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64, **ENDS}
OPT = {
    "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "word_embed_proj_dim": 32, "max_position_embeddings": 40, **ENDS,
}  # fmt: skip
VIT = {**S, "image_size": 16, "patch_size": 8}
VIT.pop("vocab_size")
DEBERTA = {**S, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 40}

ROBERTA = {**S, "max_position_embeddings": 40, "pad_token_id": 1}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **ENDS}
BART = {**BOTH, "max_position_embeddings": 40, "forced_eos_token_id": None}
WHISPER = {**BOTH, "num_mel_bins": 8, "max_source_positions": 8}

ZOO: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "qwen": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}),
    "gemma": ("Gemma2ForCausalLM", "Gemma2Config", {**GQA, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**S, **ENDS}),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "bert": ("BertForSequenceClassification", "BertConfig", {**S, "max_position_embeddings": 40}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ROBERTA),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", DEBERTA),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
}


def make(name: str, seed: int = 0) -> torch.nn.Module:
    model, config, options = ZOO[name]
    torch.manual_seed(seed)
    made = getattr(t, model)(getattr(t, config)(**options)).eval()
    with torch.no_grad():  # tiny initial weights would hide what an adapter does
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return made.requires_grad_(False)  # attention takes another path where something trains


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Two rows."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 60, (2, 5), generator=g)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 16, generator=g), "decoder_input_ids": tokens}
    if name in ("t5", "bart"):
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(0)}
    return {"input_ids": tokens}
