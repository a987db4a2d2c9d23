"""Run by test_prepare_distributed.py under torchrun: two processes with half the data each, one with all of it, and two
that hold half of the base each."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import deltatune.inits.data as data
import deltatune.inits.eva as eva
from deltatune import ConfigError, FishMaskConfig, LoraConfig, get_peft_model, prepare_init
from deltatune.methods.lora_drop import output_importance
from ranks import leave
from tiny import llama


def config_of(init: str) -> LoraConfig:
    options = {"eva_config": {"rho": 2, "tau": 1.0}} if init == "eva" else {}
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=init, **options)


def shard(model: torch.nn.Module) -> torch.nn.Module:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def drop(batches: list[dict[str, torch.Tensor]]) -> None:
    """LoRA-drop's importance, of half the batches each and of all of them."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    shared = output_importance(model, batches[dist.get_rank() :: 2]).shares
    data.world_size = lambda: 1
    alone = output_importance(model, batches).shares
    assert all(abs(shared[path] - share) < 1e-5 for path, share in alone.items())
    if dist.get_rank() == 0:
        print("lora_drop equal")


def fish(batches: list[dict[str, torch.Tensor]]) -> None:
    """FISH Mask's choice, of half the samples each and of all of them; a base that is cut is refused."""
    shared, alone = FishMaskConfig(keep_ratio=0.02), FishMaskConfig(keep_ratio=0.02)
    data.world_size = dist.get_world_size
    prepare_init(llama(), shared, batches[dist.get_rank() :: 2], progress=False)
    data.world_size = lambda: 1
    prepare_init(llama(), alone, batches, progress=False)
    data.world_size = dist.get_world_size
    places = {n: set(index.tolist()) for n, (index, _) in alone.prepared.items()}
    same = sum(len(places[n] & set(index.tolist())) for n, (index, _) in shared.prepared.items())
    assert same >= 0.99 * sum(map(len, places.values()))  # sums in another order
    with pytest.raises(ConfigError, match="choose the mask before the base is sharded"):
        prepare_init(shard(llama()), FishMaskConfig(), batches, progress=False)
    if dist.get_rank() == 0:
        print("fish_mask equal")


def main() -> None:
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 60, (1, 20), generator=generator) for _ in range(4)]
    batches = [{"input_ids": x, "labels": x} for x in rows]
    for init in ("eva", "corda", "lora_ga"):
        shared, alone = config_of(init), config_of(init)
        prepare_init(llama(), shared, batches[dist.get_rank() :: 2])
        everyone = [None, None]
        dist.all_gather_object(everyone, {n: (s.a, s.b) for n, s in shared.prepared.items()})
        for name, (a, b) in everyone[0].items():
            assert torch.equal(a, everyone[1][name][0]), (init, name)
            assert torch.equal(b, everyone[1][name][1]), (init, name)
        data.world_size = eva.world_size = lambda: 1
        prepare_init(llama(), alone, batches)
        data.world_size = eva.world_size = dist.get_world_size
        assert shared.rank_pattern == alone.rank_pattern
        for name, start in alone.prepared.items():
            mine = shared.prepared[name]
            cosines = torch.nn.functional.cosine_similarity(mine.a, start.a, dim=-1).abs()
            assert bool((cosines > 0.98).all()), (init, name, cosines)
        sharded = config_of(init)
        prepare_init(shard(llama()), sharded, batches[dist.get_rank() :: 2])
        for name, start in shared.prepared.items():
            cosines = torch.nn.functional.cosine_similarity(sharded.prepared[name].a, start.a, dim=-1).abs()
            assert bool((cosines > 0.999).all()), (init, name, cosines)
        get_peft_model(shard(llama()), sharded)  # the starts are whole, whatever the base is
        if dist.get_rank() == 0:
            print(init, "equal")
    drop(batches)
    fish(batches)
    leave()


if __name__ == "__main__":
    main()
