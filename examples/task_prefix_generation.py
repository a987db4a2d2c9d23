"""Prefix tuning for conditional generation: facts about a restaurant in, a sentence out.

Works with decoders and with encoder-decoder models: `--model` may be either. Give a JSONL file of `{"mr": facts,
"ref": sentence}` rows (the E2E NLG data, for one) with `--data`; without it, a few facts are made up.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from deltatune import PrefixTuningConfig, TaskType, get_peft_model
from deltatune.train.models import resolve_model


def facts() -> list[dict[str, str]]:
    """Every combination of a name, a kind of food and a place."""
    names, foods, places = ("Aromi", "Cotto", "The Mill"), ("Indian", "French", "Fast food"), ("city", "river")
    return [
        {"mr": f"name[{n}], food[{f}], area[{p}]", "ref": f"{n} serves {f} food near the {p}."}
        for n, f, p in itertools.product(names, foods, places)
    ]


def load(path: str, seq2seq: bool) -> tuple[Any, Any]:
    """(model, tokenizer) of either kind."""
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return kind.from_pretrained(path, dtype=torch.float32), tokenizer


def make_batch(tokenizer: Any, rows: list[dict[str, str]], seq2seq: bool) -> dict[str, torch.Tensor]:
    """Facts as input, the sentence as labels; a decoder reads both and is trained on the sentence alone."""
    end = tokenizer.eos_token
    if seq2seq:
        inputs = tokenizer([r["mr"] for r in rows], padding=True, return_tensors="pt")
        labels = tokenizer([r["ref"] + end for r in rows], padding=True, return_tensors="pt")
        wanted = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": wanted}
    pairs = [(tokenizer(r["mr"] + "\n")["input_ids"], tokenizer(r["ref"] + end)["input_ids"]) for r in rows]
    n = max(len(a) + len(b) for a, b in pairs)
    pads = [n - len(a) - len(b) for a, b in pairs]
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([a + b + [pad] * p for (a, b), p in zip(pairs, pads, strict=True)]),
        "attention_mask": torch.tensor([[1] * (n - p) + [0] * p for p in pads]),
        "labels": torch.tensor([[-100] * len(a) + b + [-100] * p for (a, b), p in zip(pairs, pads, strict=True)]),
    }


def main(
    steps: int = 60,
    model: str = "smollm2-135m-instruct",
    data: str | None = None,
    lr: float = 1e-2,
    batch_size: int = 4,
) -> tuple[float, float]:
    """Trains, prints a sentence, and returns the first and the last loss."""
    torch.manual_seed(0)
    path = str(resolve_model(model).path)
    seq2seq = AutoConfig.from_pretrained(path).is_encoder_decoder
    base, tokenizer = load(path, seq2seq)
    task = TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM
    peft_model = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=10, init_weights="zero"))
    peft_model.print_trainable_parameters()

    rows = facts() if data is None else [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (batch_size,)).tolist()]
        loss = peft_model(**make_batch(tokenizer, chosen, seq2seq)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    peft_model.eval()
    start = tokenizer(rows[0]["mr"] + ("" if seq2seq else "\n"), return_tensors="pt")
    inputs = {"input_ids": start["input_ids"], "attention_mask": start["attention_mask"]}
    answer = peft_model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0]
    print(f"{rows[0]['mr']} -> {tokenizer.decode(answer if seq2seq else answer[start['input_ids'].shape[1] :])}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="directory, hub id or packaged name")
    parser.add_argument("--data", help="JSONL rows with 'mr' and 'ref'")
    main(**vars(parser.parse_args()))
