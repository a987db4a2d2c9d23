"""LoRA on a vision transformer: which shape is in the picture? The head is new and trains as a whole.

`--model` takes any image classifier of transformers (a directory or a hub id); without it, a small one is made from
nothing, so that the script runs anywhere. The pictures are drawn on the spot.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from deltatune import LoraConfig, get_peft_model

SHAPES = ("square", "cross", "frame", "stripe")
SIZE = 32


def draw(kind: int, generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """A picture `(3, size, size)` of a shape at a place of chance, on noise."""
    picture = 0.3 * torch.randn(3, size, size, generator=generator)
    s = size // 3
    y, x = torch.randint(0, size - s, (2,), generator=generator).tolist()
    part = torch.zeros(s, s)
    if SHAPES[kind] == "square":
        part += 1
    elif SHAPES[kind] == "cross":
        part[s // 2], part[:, s // 2] = 1, 1
    elif SHAPES[kind] == "frame":
        part[[0, -1]], part[:, [0, -1]] = 1, 1
    else:
        part[:, ::3] = 1
    picture[:, y : y + s, x : x + s] += 2 * part
    return picture


def pictures(n: int, seed: int, size: int = SIZE) -> dict[str, torch.Tensor]:
    """`n` pictures and what they show."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (n,), generator=generator)
    return {"pixel_values": torch.stack([draw(int(k), generator, size) for k in labels]), "labels": labels}


def main(steps: int = 150, model: str | None = None, batch_size: int = 16) -> tuple[float, float]:
    """Trains, and returns the accuracy on held-out pictures before and after."""
    torch.manual_seed(0)
    if model is None:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        base = ViTForImageClassification(ViTConfig(**shape, image_size=SIZE, patch_size=4, num_labels=len(SHAPES)))
    else:
        base = AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(SHAPES), ignore_mismatched_sizes=True
        )
    # no task_type: peft's tasks are about text, and a model of any kind can be adapted without one
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
    peft_model = get_peft_model(base, config)
    peft_model.print_trainable_parameters()
    size = base.config.image_size
    held_out = pictures(128, seed=1, size=size)

    @torch.no_grad()
    def accuracy() -> float:
        peft_model.eval()
        return (peft_model(**held_out).logits.argmax(-1) == held_out["labels"]).float().mean().item()

    before = accuracy()
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=3e-3)
    for step in range(steps):
        peft_model.train()
        loss = peft_model(**pictures(batch_size, seed=100 + step, size=size)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    after = accuracy()
    print(f"accuracy on 128 held-out pictures: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--model", help="directory or hub id; a small model from nothing if absent")
    main(**vars(parser.parse_args()))
