"""Tiny random models of real architectures."""

from __future__ import annotations

import torch


def llama(seed: int = 0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 63, "bos_token_id": 1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **options})).eval()


def bert(seed: int = 0, kind: str = "BertForSequenceClassification", **options):
    import transformers

    torch.manual_seed(seed)
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 64, "max_position_embeddings": 40,
    }  # fmt: skip
    return getattr(transformers, kind)(transformers.BertConfig(**{**values, **options})).eval()


def t5(seed: int = 0, **options):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    values = {
        "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 63,
    }  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**{**values, **options})).eval()


def gpt2(seed: int = 0, **options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    values = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 40, "eos_token_id": 63}
    return GPT2LMHeadModel(GPT2Config(**{**values, **options})).eval()


def ids(rows: int = 3, columns: int = 7, vocabulary: int = 60) -> torch.Tensor:
    return torch.randint(2, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(5))


def shake(model, scale: float = 0.2, seed: int = 1) -> None:
    """Moves everything that trains away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * scale)
