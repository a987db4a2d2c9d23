"""EVA: running components, budgets, masks, peft's names."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from deltatune import (
    ConfigError,
    LoraConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_init,
)
from deltatune.inits._pca import RunningPca, top_axes
from deltatune.inits._watch import InputWatch
from deltatune.inits.data import spots_of
from tiny import ids, llama

TARGETS = ["q_proj", "k_proj", "down_proj"]


def config_of(r: int = 4, **options) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, init_lora_weights="eva", eva_config=options)


def batches(n: int = 3, seed: int = 3, most: int = 60) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, most, (4, 12), generator=generator)} for _ in range(n)]


def inputs_of(model: nn.Module, path: str, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


def attached(config: LoraConfig) -> nn.Module:
    with pytest.warns(UserWarning, match="call initialize_lora_eva_weights"):
        return get_peft_model(llama(), config)


# ---------------------------------------------------------------------- components
def test_running_components_are_the_components_of_all_rows():
    x = torch.randn(90, 12) * torch.linspace(3, 0.1, 12) + 5
    running, other = RunningPca(12), RunningPca(12)
    for part in x[:60].split([7, 1, 20, 32]):
        running.add(part)
    other.add(x[60:])
    running.merge(other)
    centred = x - x.mean(0)
    _, s, vt = torch.linalg.svd(centred)
    assert running.n == 90
    assert torch.allclose(running.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(running.singular_values, s, rtol=1e-3)
    assert torch.allclose((running.components * vt).sum(-1).abs(), torch.ones(12), atol=1e-3)
    assert float(running.explained().sum()) == pytest.approx(1, abs=1e-4)
    assert running.total == pytest.approx(float(centred.square().sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (6, 6)])
def test_top_axes(shape):
    x = torch.randn(shape)
    _, s, vt = torch.linalg.svd(x)
    found = top_axes(x, 3)
    assert torch.allclose(found.norm(dim=-1), s[:3], rtol=1e-4)
    assert torch.allclose((found * vt[:3]).sum(-1).abs(), s[:3], rtol=1e-4)


def test_large_matrices_take_the_randomised_way(monkeypatch):
    x = torch.randn(300, 200) * torch.logspace(0, -3, 200)
    exact = top_axes(x, 4)
    monkeypatch.setattr("deltatune.inits._pca.EXACT", 64)
    fast = top_axes(x, 4)
    assert torch.allclose((exact * fast).sum(-1).abs(), exact.square().sum(-1), rtol=1e-3)


# ---------------------------------------------------------------------- budgets
def test_ranks_share_the_budget_and_keep_the_scale():
    model, config, data = llama(), config_of(rho=3, tau=1.0), batches(most=9)
    assert prepare_init(model, config, data) == 3
    adapted = get_peft_model(model, config)
    deltas = adapted.adapters.deltas("default")
    ranks = [d.r for d in deltas]
    assert sum(ranks) == 4 * len(deltas)
    assert len(set(ranks)) > 1
    assert max(ranks) <= 12
    assert {d.scale for d in deltas} == {2.0}
    assert all(torch.count_nonzero(d.lora_B.weight) == 0 for d in deltas)
    # what is kept explains at least as much as what any other choice of as many components would
    x = inputs_of(llama(), "model.layers.0.self_attn.q_proj", data)
    _, _, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    q = next(d for d in deltas if d.host.path.endswith("0.self_attn.q_proj"))
    assert torch.allclose((q.lora_A.weight * vt[: q.r]).sum(-1).abs(), torch.ones(q.r), atol=1e-2)


def test_the_scale_follows_alpha_if_asked():
    model, config = llama(), config_of(rho=3, adjust_scaling_factors=False)
    prepare_init(model, config, batches())
    deltas = get_peft_model(model, config).adapters.deltas("default")
    assert all(d.scale == pytest.approx(8 / d.r) for d in deltas)
    assert config.alpha_pattern == {}


def test_rank_stabilised_scales_stay_too():
    model, config = llama(), config_of(rho=3)
    config.use_rslora = True
    prepare_init(model, config, batches())
    assert {round(d.scale, 6) for d in get_peft_model(model, config).adapters.deltas("default")} == {4.0}


def test_rho_one_leaves_the_ranks():
    model, config = llama(), config_of(rho=1)
    config.rank_pattern = {"q_proj": 2}
    prepare_init(model, config, batches(1))
    assert sorted({d.r for d in get_peft_model(model, config).adapters.deltas("default")}) == [2, 4]


def test_whitened_activations_have_unit_variance():
    model, config, data = llama(), config_of(12, rho=1, whiten=True, tau=1.0), batches()
    prepare_init(model, config, data)
    x = inputs_of(llama(), "model.layers.1.mlp.down_proj", data)
    a = config.prepared["model.layers.1.mlp.down_proj"].a
    assert torch.allclose((x @ a.mT).var(0), torch.ones(12), atol=1e-2)


def test_masked_positions_do_not_count():
    data = batches(2)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, :3] = 0
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, 8:] = -100
    state = get_eva_state_dict(llama(), data, config_of(12, rho=1, tau=1.0), show_progress_bar=False)
    x = inputs_of(llama(), "model.layers.0.self_attn.k_proj", data).view(2, 4, 12, -1)[:, :, 3:8].flatten(0, 2)
    _, _, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    found = state["model.layers.0.self_attn.k_proj"]
    assert torch.allclose((found * vt[:12]).sum(-1).abs(), torch.ones(12), atol=1e-2)
    unmasked = config_of(12, rho=1, tau=1.0, use_label_mask=False)
    other = get_eva_state_dict(llama(), data, unmasked, show_progress_bar=False)["model.layers.0.self_attn.k_proj"]
    assert not torch.allclose((found * other).sum(-1).abs(), torch.ones(12), atol=1e-2)


def test_running_stops_when_the_components_have_settled():
    same = batches(1) * 10
    assert prepare_init(llama(), config_of(rho=1), same) == 2
    assert prepare_init(llama(), config_of(rho=1), same, max_batches=1) == 1
    assert prepare_init(llama(), config_of(rho=1, tau=1.0), batches(4)) == 4


def test_weights_with_one_input_are_watched_once():
    model, config = llama(), config_of()
    seen: list[str] = []
    with InputWatch(spots_of(model, config), lambda spot, args: seen.append(spot.name)) as watch:
        for batch in batches(2):
            model(**batch)
    assert len(seen) == 2 * 4  # two layers: one input for q and k, one for down
    assert watch.leader["model.layers.0.self_attn.k_proj"] == "model.layers.0.self_attn.q_proj"
    assert not any(m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------------- peft's names
def test_an_attached_adapter_is_started_anew():
    config, data = config_of(rho=3), batches()
    model = attached(config)
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    base = llama()(input_ids=ids()).logits
    assert initialize_lora_eva_weights(model, data, show_progress_bar=False) is model
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(model(input_ids=ids()).logits, base)
    deltas = model.adapters.deltas("default")
    assert sum(d.r for d in deltas) == 4 * len(deltas)
    assert all(d.lora_A.weight.requires_grad for d in deltas)
    direct = config_of(rho=3)
    prepare_init(llama(), direct, data)
    assert direct.rank_pattern == config.rank_pattern
    for d in deltas:
        assert torch.allclose(d.lora_A.weight, direct.prepared[d.host.path].a, atol=1e-5)


def test_weights_that_get_nothing_are_no_longer_adapted(tmp_path):
    model = attached(config_of())
    state = get_eva_state_dict(model, batches(), show_progress_bar=False)
    assert all(name.startswith("base_model.model.") for name in state)
    gone = "base_model.model.model.layers.0.self_attn.q_proj"
    state[gone] = state[gone][:0]
    initialize_lora_eva_weights(model, eva_state_dict=state)
    config = model.peft_config["default"]
    assert gone.removeprefix("base_model.model.") not in config.target_modules
    assert len(config.target_modules) == 5
    assert len(model.adapters.deltas("default")) == 5
    model.save_pretrained(tmp_path)
    from deltatune import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_meta_adapters_get_their_memory():
    config = config_of()
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)  # no warning: nothing could run unnoticed
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    assert not any(p.is_meta for p in model.parameters())


def test_custom_readers_of_the_inputs():
    names: set[str] = set()

    def layer_inputs(args, inputs, name):
        names.add(name)
        assert inputs == "mine"
        return args[0][:, 0]

    model, data = llama(), batches(3)
    state = get_eva_state_dict(
        model,
        data,
        config_of(rho=1, tau=1.0),
        forward_fn=lambda m, b: m(b["input_ids"]),
        prepare_model_inputs_fn=lambda batch, config: "mine",
        prepare_layer_inputs_fn=layer_inputs,
        show_progress_bar=False,
    )
    assert names == set(state)
    x = inputs_of(llama(), "model.layers.0.mlp.down_proj", data).view(12, 12, -1)[:, 0]
    _, _, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    found = state["model.layers.0.mlp.down_proj"]
    assert torch.allclose((found * vt[:4]).sum(-1).abs(), torch.ones(4), atol=1e-2)


# ---------------------------------------------------------------------- bad input
def test_what_cannot_be_done_is_said():
    data = batches(1)
    with pytest.raises(ConfigError, match="either a dataloader or an eva_state_dict"):
        initialize_lora_eva_weights(attached(config_of()))
    with pytest.raises(ConfigError, match="needs a model with an adapter"):
        initialize_lora_eva_weights(llama(), eva_state_dict={})
    with pytest.raises(ConfigError, match="needs peft_config"):
        get_eva_state_dict(llama(), data)
    with pytest.raises(ConfigError, match='init_lora_weights="eva"'):
        get_eva_state_dict(llama(), data, LoraConfig())
    with pytest.raises(ConfigError, match="there is no batch"):
        prepare_init(llama(), config_of(), [])
    with pytest.raises(ConfigError, match="needs no data"):
        prepare_init(llama(), LoraConfig(), data)
    with pytest.raises(ConfigError, match="needs more than rho · r = 8 input vectors"):
        prepare_init(llama(), config_of(), [{"input_ids": torch.tensor([[3, 4, 5]])}])
    with pytest.raises(ConfigError, match="vary in fewer than 4 directions"):
        prepare_init(llama(), config_of(rho=1), batches(most=4))
    model = attached(config_of())
    state = get_eva_state_dict(model, data, show_progress_bar=False)
    name, a = next(iter(state.items()))
    with pytest.raises(ConfigError, match="which is not adapted; did you mean"):
        initialize_lora_eva_weights(model, eva_state_dict={**state, f"{name}x": a})
    with pytest.raises(ConfigError, match=r"\(r, 32\) is needed"):
        initialize_lora_eva_weights(model, eva_state_dict={**state, name: a.mT})
    with pytest.raises(ConfigError, match="lacks"):
        initialize_lora_eva_weights(model, eva_state_dict={name: a})
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged"):
        initialize_lora_eva_weights(model, eva_state_dict=state)


def test_ranks_that_were_changed_since_are_noticed():
    model, config = llama(), config_of(rho=1)
    prepare_init(model, config, batches(1))
    config.r = 5
    with pytest.raises(ConfigError, match="r is now 5"):
        get_peft_model(model, config)
    config.r, config.target_modules = 4, {"v_proj"}
    with pytest.raises(ConfigError, match="has seen no"):
        get_peft_model(model, config)


def test_parts_of_one_module_cannot_have_different_ranks():
    from tiny import gpt2

    config = LoraConfig(target_modules=["c_attn"], enable_lora=[True, False, True], init_lora_weights="eva", r=4)
    with pytest.raises(ConfigError, match="set rho=1"):
        prepare_init(gpt2(), config, batches(1))
    config.eva_config = config_of(rho=1).eva_config
    model = gpt2()
    base = model(input_ids=ids()).logits
    prepare_init(model, config, batches(1))
    assert torch.allclose(get_peft_model(model, config)(input_ids=ids()).logits, base, atol=1e-6)
