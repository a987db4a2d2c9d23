"""LoRA on a small encoder: is a text message spam? A plain PyTorch loop, about a minute on two CPU cores."""

from __future__ import annotations

import argparse

import torch

from deltatune import LoraConfig, TaskType, get_peft_model
from deltatune.train.datasets_builtin import builtin_dataset
from deltatune.train.models import load_model, load_tokenizer, resolve_model

LABELS = {"ham": 0, "spam": 1}


def main(steps: int = 60, model: str = "minilm", batch_size: int = 16) -> tuple[float, float]:
    """Trains, and returns the accuracy on held-out messages before and after."""
    torch.manual_seed(0)
    resolved = resolve_model(model)
    tokenizer = load_tokenizer(resolved)
    base = load_model(resolved, task="SEQ_CLS", num_labels=len(LABELS))
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
    peft_model = get_peft_model(base, config)  # the new classification head trains and is saved as well
    peft_model.print_trainable_parameters()

    def batch(rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens = tokenizer([r["text"] for r in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([LABELS[r["label"]] for r in rows])}

    @torch.no_grad()
    def accuracy(rows: list[dict]) -> float:
        peft_model.eval()
        batches = [batch(rows[i : i + 50]) for i in range(0, len(rows), 50)]
        right = sum((peft_model(**b).logits.argmax(-1) == b["labels"]).sum().item() for b in batches)
        return right / len(rows)

    data = builtin_dataset("sms_spam")
    before = accuracy(data.test)
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(steps):
        peft_model.train()
        rows = torch.randint(len(data.train), (batch_size,)).tolist()
        loss = peft_model(**batch([data.train[i] for i in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    after = accuracy(data.test)
    print(f"accuracy on {len(data.test)} held-out messages: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="minilm", help="directory, hub id or packaged name")
    main(**vars(parser.parse_args()))
