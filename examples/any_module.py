"""Any nn.Module can be adapted: a convolutional network, pre-trained on one task, learns another. No downloads."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import torch
from torch import Tensor, nn

from deltatune import LoraConfig, get_peft_model, plan_targets


def images(n: int, level: float) -> tuple[Tensor, Tensor]:
    """Noise with one corner brighter (or darker) than the rest by `level`; the corner is the label."""
    x, y = torch.randn(n, 1, 12, 12), torch.randint(4, (n,))
    corners = torch.eye(4).view(4, 1, 2, 2).repeat_interleave(6, -2).repeat_interleave(6, -1)
    return x + level * corners[y], y


def fit(net: nn.Module, steps: int, lr: float, level: float) -> None:
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=lr)
    for _ in range(steps):
        x, y = images(64, level)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(net: nn.Module, level: float) -> float:
    x, y = images(1000, level)
    return (net(x).argmax(-1) == y).float().mean().item()


def main(steps: int = 150) -> tuple[float, float]:
    """Teaches which corner is brighter, adapts to darker ones; returns the accuracy there before and after."""
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(1, 16, 3), "relu": nn.ReLU(), "second": nn.Conv2d(16, 32, 3, stride=2, groups=2)}
    net = nn.Sequential(OrderedDict(**layers, relu2=nn.ReLU(), flat=nn.Flatten(), head=nn.Linear(32 * 4 * 4, 4)))
    fit(net, 150, 1e-2, level=0.8)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second", "head"])
    for pattern, paths in plan_targets(net, config).patterns.items():  # what would be adapted, before anything is
        print(f"{pattern} -> {', '.join(paths)}")
    model = get_peft_model(net, config)
    model.print_trainable_parameters()
    before = accuracy(model, level=-0.8)
    fit(model, steps, 1e-2, level=-0.8)
    after = accuracy(model, level=-0.8)
    print(f"dark corners: {before:.3f} before, {after:.3f} after")
    with model.disable_adapter():
        print(f"bright corners, adapter off: {accuracy(model, level=0.8):.3f}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    main(**vars(parser.parse_args()))
