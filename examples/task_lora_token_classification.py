"""LoRA for token classification: which words are a place? The head is new and trains beside the adapter.

Give JSONL rows of `{"tokens": [...], "tags": [...]}` (WNUT-2017, CoNLL-2003) with `--data`; without it, sentences are
put together from a few words. A word's first token carries its tag; the others are not trained.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from deltatune import LoraConfig, TaskType, get_peft_model
from deltatune.train.models import load_model, load_tokenizer, resolve_model

PLACES = ("Paris", "Rome", "New York", "Lima", "Cape Town", "Oslo", "Kyoto", "San Jose")
FRAMES = ("She flew to {} on Monday .", "My friends in {} are late .", "Is {} far from here ?", "Nobody told us .")


def sentences(n: int = 400, seed: int = 0) -> list[dict[str, list[str]]]:
    """Sentences with the places in them tagged."""
    chance = random.Random(seed)
    rows = []
    for _ in range(n):
        before, hole, after = chance.choice(FRAMES).partition("{}")
        place = chance.choice(PLACES).split() if hole else []
        tags = ["B-place", *["I-place"] * (len(place) - 1)] if place else []
        ends = before.split(), after.split()
        rows.append(
            {"tokens": [*ends[0], *place, *ends[1]], "tags": ["O"] * len(ends[0]) + tags + ["O"] * len(ends[1])}
        )
    return rows


def make_batch(tokenizer: Any, rows: list[dict[str, list[str]]], tags: list[str]) -> dict[str, torch.Tensor]:
    """Token ids and, at each word's first token, the number of its tag."""
    words = [r["tokens"] for r in rows]
    batch = tokenizer(
        words, is_split_into_words=True, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for i, row in enumerate(rows):
        last = None
        for j, word in enumerate(batch.word_ids(i)):
            if word is not None and word != last:
                labels[i, j] = tags.index(row["tags"][word])
            last = word
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def f1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Micro F1 over the words inside entities (tag 0 is outside)."""
    given = logits.argmax(-1)
    hit = ((given == labels) & (labels > 0)).sum()
    return float(2 * hit / (((given > 0) & (labels >= 0)).sum() + (labels > 0).sum()).clamp(min=1))


def main(
    steps: int = 60, model: str = "minilm", data: str | None = None, batch_size: int = 16, lr: float = 2e-3
) -> tuple[float, float]:
    """Trains, and returns the F1 on held-out sentences before and after."""
    torch.manual_seed(0)
    resolved = resolve_model(model)
    tokenizer = load_tokenizer(resolved)
    rows = sentences() if data is None else [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    tags = ["O", *sorted({t for r in rows for t in r["tags"]} - {"O"})]
    base = load_model(resolved, task="TOKEN_CLS", num_labels=len(tags))
    config = LoraConfig(task_type=TaskType.TOKEN_CLS, r=16, lora_alpha=16, lora_dropout=0.1)
    peft_model = get_peft_model(base, config)
    peft_model.print_trainable_parameters()
    train, held_out = rows[: -len(rows) // 5], make_batch(tokenizer, rows[-len(rows) // 5 :][:100], tags)

    @torch.no_grad()
    def score() -> float:
        peft_model.eval()
        return f1(peft_model(**held_out).logits, held_out["labels"])

    before = score()
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=lr)
    for step in range(steps):
        peft_model.train()
        chosen = [train[i] for i in torch.randint(len(train), (batch_size,)).tolist()]
        loss = peft_model(**make_batch(tokenizer, chosen, tags)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    after = score()
    print(f"F1 on held-out sentences: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="minilm", help="directory, hub id or packaged name")
    parser.add_argument("--data", help="JSONL rows with 'tokens' and 'tags'")
    main(**vars(parser.parse_args()))
