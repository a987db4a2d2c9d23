"""Run by test_schedules_distributed.py under torchrun: whole runs of every procedure, in two processes and in one."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deltatune.schedules as schedules
from deltatune.core.sharded import whole
from ranks import leave
from schedule_runs import STEPS, batches, model_for, options_of


def sharded(model):
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def run(name, model, wrap, rows):
    given = options_of(name)
    schedules.mark(model, *given)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.004, eps=1e-3)
    schedule = schedules.attach(wrapped, optimizer, *given, total_steps=STEPS, seed=5)
    for step in range(STEPS):
        batch = {k: v[rows] for k, v in batches()[step].items()}
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 6:  # what a checkpoint would hold is whole, wherever the parts are
            state = schedule.state_dict()
            schedule.load_state_dict(state)
    return {n: whole(p.detach()).clone() for n, p in model.named_parameters()}, schedule


def main(parallel, names):
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def wrap(model):
        if parallel == "ddp":
            return DistributedDataParallel(model, find_unused_parameters=True)
        return sharded(model)

    for name in names:
        wanted, alone = run(name, model_for(name), lambda model: model, slice(0, 4))
        found, together = run(name, model_for(name), wrap, slice(rank * 2, rank * 2 + 2))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, atol=2e-5), f"{name}: {key} {(found[key] - tensor).abs().max()}"
        assert together.report() == alone.report(), name
        if rank == 0:
            print(name, "equal", flush=True)
    if parallel == "ddp" and rank == 0:
        refused()
    leave()


def refused():
    """What DDP would get wrong is said before the first step."""
    from deltatune import ConfigError

    for name, marked, text in (("lisa", True, "find_unused_parameters=True"), ("relora", False, "call mark")):
        model = model_for(name)
        if marked:
            schedules.mark(model, *options_of(name))
        alone = dist.new_group([0], use_local_synchronization=True)
        wrapped = DistributedDataParallel(model, process_group=alone, find_unused_parameters=not marked)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ConfigError, match=text):
            schedules.attach(wrapped, optimizer, *options_of(name), total_steps=STEPS)
        print(name, "refused", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
