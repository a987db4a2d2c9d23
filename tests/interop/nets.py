"""Networks with every kind of layer that peft's vision-born methods adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Embedding, 1-d, 2-d, 3-d and grouped convolutions, a linear layer; sizes that do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.seq = nn.Conv1d(12, 20, 3, padding=1)
        self.image = nn.Conv2d(20, 30, 3, padding=1, stride=2, dilation=1)
        self.point = nn.Conv2d(30, 24, 1)
        self.grouped = nn.Conv2d(24, 12, 3, padding=1, groups=2)
        self.cube = nn.Conv3d(12, 8, 2, padding=1)
        self.head = nn.Linear(8, 15)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.seq(self.embed(tokens).mT)  # (B, 20, T)
        h = self.image(torch.stack([h, h.flip(-1)], -1))  # (B, 30, T/2, 1)
        h = torch.tanh(self.grouped(self.point(torch.tanh(h))))  # (B, 12, T/2, 1)
        h = self.cube(h.unsqueeze(-1))
        return self.head(h.flatten(2).mean(-1))


def conv_net() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(5)),)
