"""A whole run in a second: a tiny model on disk, a tiny data set, a recipe over both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltatune.train.recipe import Recipe, build_recipe
from small_runs import write_base

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def save_model(folder: Path, **options: Any) -> Path:
    """A Llama of two layers that learns quickly, and its tokenizer, as a model directory."""
    return write_base(folder, initializer_range=0.05, **options)


def save_rows(path: Path, count: int, start: int = 0) -> Path:
    """Texts of several lengths, labelled by their first word."""
    rows = []
    for i in range(start, start + count):
        word = WORDS[i % 2]
        text = " ".join([word, *(WORDS[(i * k) % 10] for k in range(2, 4 + i % 5))])
        rows.append({"text": text, "label": "yes" if i % 2 else "no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recipe(folder: Path, model: Path, **sections: dict[str, Any]) -> Recipe:
    """24 training and 8 held-out rows, 12 steps of 2 × 2 rows, a checkpoint every 4 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "method": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        "data": {
            "path": str(save_rows(folder / "rows.jsonl", 24)),
            "eval_path": str(save_rows(folder / "held_out.jsonl", 8, start=100)),
            "max_length": 64,
        },
        "train": {
            "epochs": 2,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 0.01,
            "logging_steps": 2,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": None,
        },
        "eval": {"samples": 2, "batch_size": 4},
        "output_dir": str(folder / "run"),
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return build_recipe(raw, "tests")
