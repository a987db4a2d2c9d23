"""P-tuning of an encoder: is a text message spam? Virtual tokens from a small network, and a new head.

Saved, the adapter is the virtual tokens and the head; the network that made them is gone.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

from deltatune import PeftModel, PromptEncoderConfig, TaskType, get_peft_model
from deltatune.train.datasets_builtin import builtin_dataset
from deltatune.train.models import load_model, load_tokenizer, resolve_model

LABELS = {"ham": 0, "spam": 1}


def main(steps: int = 80, model: str = "minilm", batch_size: int = 16, tokens: int = 20) -> tuple[float, float]:
    """Trains, saves and loads, and returns the accuracy on held-out messages before and after."""
    torch.manual_seed(0)
    resolved = resolve_model(model)
    tokenizer = load_tokenizer(resolved)
    config = PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=tokens, encoder_hidden_size=128)
    peft_model = get_peft_model(load_model(resolved, task="SEQ_CLS", num_labels=len(LABELS)), config)
    peft_model.print_trainable_parameters()

    def batch(rows: list[dict]) -> dict[str, torch.Tensor]:
        inputs = tokenizer([r["text"] for r in rows], padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([LABELS[r["label"]] for r in rows])}

    data = builtin_dataset("sms_spam")

    @torch.no_grad()
    def accuracy(tested: torch.nn.Module) -> float:
        tested.eval()
        batches = [batch(data.test[i : i + 50]) for i in range(0, len(data.test), 50)]
        right = sum((tested(**b).logits.argmax(-1) == b["labels"]).sum().item() for b in batches)
        return right / len(data.test)

    before = accuracy(peft_model)
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
    after = accuracy(peft_model)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(load_model(resolved, task="SEQ_CLS", num_labels=len(LABELS)), folder)
        again = accuracy(loaded)
    print(f"accuracy on {len(data.test)} messages: {before:.3f} before, {after:.3f} after, {again:.3f} loaded")
    return before, again


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--model", default="minilm", help="directory, hub id or packaged name")
    main(**vars(parser.parse_args()))
