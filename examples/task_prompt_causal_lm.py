"""Prompt tuning of a decoder: 8 trained embeddings that start as a sentence and say what to do with a message.

Nothing in the model changes; the adapter is one small tensor. A learning rate that suits weights will not move
embeddings: take one that is ten to a hundred times larger.
"""

from __future__ import annotations

import argparse

import torch

from deltatune import PromptTuningConfig, TaskType, get_peft_model
from deltatune.train.data import Collator, DataSpec, encode, load_examples
from deltatune.train.models import load_model, load_tokenizer, resolve_model

INSTRUCTION = "Is this message spam or ham?"
TEMPLATE = "Message: {text}\nLabel:"


def main(
    steps: int = 60,
    model: str = "smollm2-135m-instruct",
    batch_size: int = 4,
    lr: float = 1e-2,
    data: str = "sms_spam",
) -> tuple[float, float]:
    """Trains, and returns the loss on held-out messages before and after."""
    torch.manual_seed(0)
    resolved = resolve_model(model)
    tokenizer = load_tokenizer(resolved)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=8,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=INSTRUCTION,
        tokenizer_name_or_path=str(resolved.path),
    )
    peft_model = get_peft_model(load_model(resolved, dtype="float32"), config)
    peft_model.print_trainable_parameters()

    spec = DataSpec(path=data, max_length=384, eval_limit=32, template=None if data == "sms_spam" else TEMPLATE)
    examples = load_examples(spec)
    train, held_out = (encode(rows, tokenizer, spec) for rows in (examples.train, examples.eval))
    collate = Collator(tokenizer)

    @torch.no_grad()
    def loss_now() -> float:
        peft_model.eval()
        batches = [collate(held_out[i : i + 8]) for i in range(0, len(held_out), 8)]
        return sum(peft_model(**b).loss.item() for b in batches) / len(batches)

    before = loss_now()
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    for step in range(steps):
        peft_model.train()
        rows = torch.randint(len(train), (batch_size,)).tolist()
        loss = peft_model(**collate([train[i] for i in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    after = loss_now()
    print(f"loss on {len(held_out)} held-out messages: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="directory, hub id or packaged name")
    parser.add_argument("--data", default="sms_spam", help="a file of rows with 'text' and 'label'")
    main(**vars(parser.parse_args()))
