"""Run by test_distributed.py under torchrun: one SGD step of every method, sharded and not, compared."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltatune import (
    AdaMixConfig,
    Fuse,
    FusionConfig,
    IA3Config,
    LadderConfig,
    LoraConfig,
    PfeifferConfig,
    S4Config,
    Stack,
    get_peft_model,
    get_peft_model_state_dict,
)
from laws import config_for
from ranks import leave
from tiny import ids, llama


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


def stacked():
    model = get_peft_model(llama(), PfeifferConfig(reduction_factor=4), adapter_name="default")
    model.add_adapter("other", LoraConfig(r=4))
    model.set_adapter(Stack("default", "other"))
    return model


def fused():
    model = get_peft_model(llama(), PfeifferConfig(reduction_factor=4), adapter_name="a")
    model.add_adapter("b", PfeifferConfig(reduction_factor=4))
    model.set_requires_grad(["a", "b"], False)
    model.add_adapter("a,b", FusionConfig(adapters=["a", "b"]))
    model.set_adapter(Fuse("a", "b"))
    return model


#: adapters in the blocks of a transformer, and compositions of them
IN_BLOCKS = {
    "s4": lambda: get_peft_model(llama(num_hidden_layers=4), S4Config(budget=3000)),
    "adamix": lambda: get_peft_model(llama(), AdaMixConfig(reduction_factor=4, share_up=False)),
    "ia3": lambda: get_peft_model(llama(), IA3Config()),
    "both_sums": lambda: get_peft_model(llama(), PfeifferConfig(reduction_factor=4, mh_adapter=True)),
    "ladder": lambda: get_peft_model(llama(), LadderConfig(reduction_factor=2)),
    "stack": stacked,
    "fuse": fused,
}
#: adapters whose tensors a case trains, where they are not the default one's
TRAINED = {"fuse": ["a,b"], "stack": ["default", "other"]}


def build(method: str):
    torch.manual_seed(0)
    model = IN_BLOCKS[method]() if method in IN_BLOCKS else get_peft_model(Blocks(), config_for(method))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def step(model, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    out = model(x)
    getattr(out, "logits", out).square().mean().backward()
    optimizer.step()


def tensors(model, method: str) -> dict[str, torch.Tensor]:
    found = {}
    for name in TRAINED.get(method, ["default"]):
        found |= {f"{name}:{k}": v for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
    return found


def blocks_of(model):
    base = model.get_base_model()
    return base.blocks if isinstance(base, Blocks) else base.model.layers


def main(parallel: str, folder: Path, methods: list[str]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for method in methods:
        x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(2))
        x = ids(8, 5) if method in IN_BLOCKS else x
        training = method == "adamix"  # which draws its experts in training
        alone = build(method).train(training)
        torch.manual_seed(9)
        step(alone, x)
        wanted = tensors(alone, method)
        model = build(method).train(training)
        torch.manual_seed(9 + rank)  # what is drawn for the batch is the first rank's draw
        mine = x[rank * 4 : rank * 4 + 4]
        if parallel == "ddp":
            step(DistributedDataParallel(model), mine)
        else:
            for block in blocks_of(model):
                fully_shard(block)
            fully_shard(model)
            step(model, mine)
        found = tensors(model, method)
        assert set(found) == set(wanted), method
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, atol=1e-5), f"{method}: {key}"
        if parallel == "fsdp2":  # a gathered checkpoint is an ordinary one
            gathered = {k: t.detach().clone() for k, t in found.items()}
            assert all(t.shape == wanted[k].shape for k, t in gathered.items())
        if rank == 0:
            print(f"{method} equal", flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
