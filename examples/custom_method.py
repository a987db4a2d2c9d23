"""A method of your own, outside the package: one configuration, one delta. The rest is inherited. No downloads."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune import PeftModel, TargetedConfig, get_peft_model, register
from deltatune.core.edits import Delta, Edit
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef


class RowScaleDelta(Delta):
    """W' = diag(1 + g) W: every output gets a gain, which starts at zero."""

    def __init__(self, ref: WeightRef) -> None:
        super().__init__(ref)
        self.gain = self.tensor("row_gain", torch.zeros(ref.shape[-2]))

    def merged(self, w: Tensor) -> Tensor:
        return w * (1 + self.gain.weight.to(w.dtype)).unsqueeze(-1)


@register
@dataclass
class RowScaleConfig(TargetedConfig):
    method: ClassVar[str] = "ROW_SCALE"

    def build(self, ref: WeightRef, site: Site) -> Edit:
        return RowScaleDelta(ref)


def main(steps: int = 100) -> tuple[float, float]:
    """Finds the gains that make one network's outputs another's; returns the first and the last loss."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False)), torch.randn(256, 8)
    target = net(x).detach() * torch.tensor([0.5, 1.5, 2.0, -1.0])
    model = get_peft_model(net, RowScaleConfig(target_modules=["0", "2"]))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(steps):
        losses.append(nn.functional.mse_loss(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        live = model(x)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(model.unload(), folder)
        print("loaded again, same output:", torch.equal(again(x), live))
        print("merged, same output:", torch.allclose(again.merge_and_unload()(x), live, atol=1e-5))
    return losses[0].item(), losses[-1].item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(**vars(parser.parse_args()))
