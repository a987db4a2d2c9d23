"""LoRA on a segmentation model: which pixels are the shape? The decoding head is new and trains as a whole.

`--model` takes a SegFormer (a directory or a hub id); without it, a small one is made from nothing, so that the script
runs anywhere. The pictures are drawn on the spot.
"""

from __future__ import annotations

import argparse

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from deltatune import LoraConfig, get_peft_model

SIZE = 64


def scenes(n: int, seed: int) -> dict[str, torch.Tensor]:
    """`n` noisy pictures `(3, 64, 64)` with a disc and a bar, and the class of every pixel: 0 ground, 1 disc, 2 bar."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pictures, labels = [], []
    for _ in range(n):
        cy, cx, row = torch.randint(12, SIZE - 12, (3,), generator=generator).tolist()
        label = torch.zeros(SIZE, SIZE, dtype=torch.long)
        label[row - 3 : row + 3] = 2
        label[(y - cy) ** 2 + (x - cx) ** 2 < 100] = 1
        colours = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.0, 0.5], [0.0, 1.5, 0.5]])
        pictures.append(colours[label].permute(2, 0, 1) + 0.4 * torch.randn(3, SIZE, SIZE, generator=generator))
        labels.append(label)
    return {"pixel_values": torch.stack(pictures), "labels": torch.stack(labels)}


def mean_iou(logits: torch.Tensor, labels: torch.Tensor, classes: int = 3) -> float:
    """Intersection over union, averaged over the classes; `logits` (B, classes, h, w) are made as large as `labels`."""
    large = torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    given = large.argmax(1)
    shares = [
        ((given == k) & (labels == k)).sum() / ((given == k) | (labels == k)).sum().clamp(min=1) for k in range(classes)
    ]
    return float(torch.stack(shares).mean())


def main(steps: int = 60, model: str | None = None, batch_size: int = 8) -> tuple[float, float]:
    """Trains, and returns the mean intersection over union on held-out pictures before and after."""
    torch.manual_seed(0)
    if model is None:
        sizes = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
        base = SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=3))
    else:
        base = SegformerForSemanticSegmentation.from_pretrained(model, num_labels=3, ignore_mismatched_sizes=True)
    # attention's projections by their names, found from the structure; the whole head trains beside them
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, modules_to_save=["decode_head"])
    peft_model = get_peft_model(base, config)
    peft_model.print_trainable_parameters()
    held_out = scenes(32, seed=1)

    @torch.no_grad()
    def score() -> float:
        peft_model.eval()
        return mean_iou(peft_model(pixel_values=held_out["pixel_values"]).logits, held_out["labels"])

    before = score()
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=3e-3)
    for step in range(steps):
        peft_model.train()
        loss = peft_model(**scenes(batch_size, seed=100 + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    after = score()
    print(f"mean intersection over union on 32 held-out pictures: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", help="directory or hub id of a SegFormer; a small one from nothing if absent")
    main(**vars(parser.parse_args()))
