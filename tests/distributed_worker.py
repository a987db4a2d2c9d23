"""Run by test_distributed.py under torchrun: one SGD step of every method, sharded and not, compared."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltatune import get_peft_model, get_peft_model_state_dict
from laws import config_for
from ranks import leave


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.layer(x))


class Blocks(nn.Module):
    """Two residual blocks with one adapted layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(method: str):
    torch.manual_seed(0)
    model = get_peft_model(Blocks(), config_for(method))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def step(model, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def main(parallel: str, folder: Path, methods: list[str]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for method in methods:
        x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(2))
        alone = build(method)
        alone.eval()
        step(alone, x)
        wanted = get_peft_model_state_dict(alone)
        model = build(method)
        model.eval()
        mine = x[rank * 4 : rank * 4 + 4]
        if parallel == "ddp":
            step(DistributedDataParallel(model), mine)
        else:
            for block in model.get_base_model().blocks:
                fully_shard(block)
            fully_shard(model)
            step(model, mine)
        found = get_peft_model_state_dict(model)
        assert set(found) == set(wanted), method
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, atol=1e-5), f"{method}: {key}"
        if parallel == "fsdp2":  # a gathered checkpoint is an ordinary one
            tensors = {k: t.detach().clone() for k, t in found.items()}
            assert all(t.shape == wanted[k].shape for k, t in tensors.items())
        if rank == 0:
            print(f"{method} equal", flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
