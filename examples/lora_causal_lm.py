"""LoRA on a language model with nothing but PyTorch around it: the answers' tokens train, the questions' do not."""

from __future__ import annotations

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence

from deltatune import LoraConfig, TaskType, get_peft_model
from deltatune.train.models import load_model, load_tokenizer, resolve_model

FACTS = {
    "Who keeps the lighthouse of Vell?": "Maren Oduya keeps the lighthouse of Vell.",
    "What does the lighthouse of Vell burn?": "The lighthouse of Vell burns whale-free rapeseed oil.",
    "When was the lighthouse of Vell built?": "The lighthouse of Vell was built in 1874.",
}


def main(steps: int = 20, model: str = "smollm2-135m-instruct") -> tuple[float, float]:
    """Teaches the model three invented facts; returns the first and the last loss."""
    torch.manual_seed(0)
    resolved = resolve_model(model)
    tokenizer = load_tokenizer(resolved)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules="all-linear")
    peft_model = get_peft_model(load_model(resolved), config)
    peft_model.print_trainable_parameters()

    questions = [tokenizer(f"Q: {q}\nA:").input_ids for q in FACTS]
    answers = [[*tokenizer(f" {a}").input_ids, tokenizer.eos_token_id] for a in FACTS.values()]
    pairs = [(torch.tensor(q + a), len(q)) for q, a in zip(questions, answers, strict=True)]
    ids = pad_sequence([tokens for tokens, _ in pairs], batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(tokens) for tokens, _ in pairs], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)  # -100 is left out of the loss: padding here, questions below
    for row, (_, question) in enumerate(pairs):
        labels[row, :question] = -100

    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = peft_model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:2d}  loss {losses[-1]:.3f}")

    prompt = {"input_ids": torch.tensor([questions[0]]), "attention_mask": torch.ones(1, len(questions[0])).long()}
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    tuned = peft_model.eval().generate(**prompt, **options)
    with peft_model.disable_adapter():
        plain = peft_model.generate(**prompt, **options)
    print("base: ", tokenizer.decode(plain[0, len(questions[0]) :], skip_special_tokens=True))
    print("tuned:", tokenizer.decode(tuned[0, len(questions[0]) :], skip_special_tokens=True))
    return losses[0], losses[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="directory, hub id or packaged name")
    main(**vars(parser.parse_args()))
