"""LoRA-drop: importance of layers, and LoRAs that layers share (arXiv 2402.07721)."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from deltatune import ConfigError, DeltatuneError, LoraConfig, LoraDropConfig, PeftModel, get_peft_model
from deltatune.methods.lora_drop import Importance, SharedDelta, output_importance
from tiny import ids, llama, shake

FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
LAYERS = 4


def base():
    return llama(num_hidden_layers=LAYERS)


def trained(scale=1.0, **fields):
    """A LoRA on every layer, as after the first stage."""
    model = get_peft_model(base(), LoraConfig(**{**FIELDS, "lora_alpha": 8 * scale, **fields}))
    shake(model)
    return model


def batches(n=2):
    masked = torch.ones(3, 7, dtype=torch.long)
    masked[0, 4:] = 0
    return [{"input_ids": ids() + i, "attention_mask": masked} for i in range(n)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


def path(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


# ---------------------------------------------------------------------- importance
def test_importance_is_the_mean_square_of_the_output():
    model = trained()
    importance = output_importance(model, batches(), progress=False)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        d.host.register_forward_pre_hook(
            lambda module, args, d=d: seen.setdefault(d.host.path, []).append(d.update(args[0], None).detach())
        )
        for d in model.adapters.deltas("default")
    ]
    for batch in batches():
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    mask = batches()[0]["attention_mask"].bool()
    g = {p: torch.cat([c[mask] for c in changes]).double().square().sum(-1).mean() for p, changes in seen.items()}
    for name in ("q_proj", "v_proj"):
        total = sum(g[path(i, name)] for i in range(LAYERS))
        for i in range(LAYERS):
            assert importance.shares[path(i, name)] == pytest.approx(float(g[path(i, name)] / total), rel=1e-5)
        assert sum(importance.shares[path(i, name)] for i in range(LAYERS)) == pytest.approx(1)
    assert set(importance.kinds.values()) == {"q_proj", "v_proj"}


def test_the_order_does_not_depend_on_the_scale():
    # the input of later layers moves with the scale, so one layer's outputs are compared
    def order(scale):
        model = trained(scale)
        with torch.no_grad():
            for d in model.adapters.deltas("default"):
                d.lora_B.weight.mul_(1e-3)
        shares = output_importance(model, batches(), progress=False).shares
        return sorted(shares, key=lambda p: -shares[p])

    assert order(1.0) == order(7.0)


def test_measuring_changes_nothing():
    model = trained(lora_dropout=0.5).train()
    model.add_adapter("other", LoraConfig(**FIELDS))
    model.set_adapter("other")
    before = {n: p.clone() for n, p in model.named_parameters()}
    one = output_importance(model, batches(), progress=False)
    two = output_importance(model, iter(batches(5)), progress=False, max_batches=2)
    assert one == two  # no dropout
    assert model.active_adapters == ["other"]
    assert all(m.training for m in model.get_base_model().modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_shapes_make_kinds_of_their_own():
    net = nn.Sequential()
    for i, width in enumerate((8, 8, 6)):
        block = nn.Module()
        block.proj = nn.Linear(5, width)
        net.add_module(str(i), block)
    net.forward = lambda x: [block.proj(x) for block in net]
    model = get_peft_model(net, LoraConfig(target_modules=["proj"]))
    shake(model)
    importance = output_importance(model, [torch.randn(4, 5)], progress=False)
    assert importance.kinds == {"0.proj": "proj", "1.proj": "proj", "2.proj": "proj_2"}
    assert importance.shares["2.proj"] == 1


# ---------------------------------------------------------------------- the map
SHARES = {path(0, "q_proj"): 0.5, path(1, "q_proj"): 0.1, path(2, "q_proj"): 0.15, path(3, "q_proj"): 0.25}


@pytest.mark.parametrize(
    ("threshold", "kept"), [(1.0, [0, 1, 2, 3]), (0.0, []), (0.5, [0]), (0.7, [0, 3]), (0.76, [0, 2, 3])]
)
def test_the_most_important_layers_keep_their_own(threshold, kept):
    shared = Importance(SHARES, dict.fromkeys(SHARES, "q_proj")).share_rest(threshold)
    assert shared == {path(i, "q_proj"): "q_proj" for i in range(LAYERS) if i not in kept}


def test_from_the_first_stage_to_the_second():
    stage = trained()
    config = LoraDropConfig(**FIELDS, shared=output_importance(stage, batches(), progress=False).share_rest(0.5))
    assert 0 < len(config.shared) < 2 * LAYERS
    stage.delete_adapter("default")
    model = get_peft_model(stage.unload(), config)
    assert torch.equal(logits(model), logits(base()))


# ---------------------------------------------------------------------- sharing
def dropped(shared=((1, "q_proj"), (2, "q_proj"), (0, "v_proj"), (1, "v_proj"), (3, "v_proj")), **fields):
    config = LoraDropConfig(**{**FIELDS, "shared": {path(i, name): name for i, name in shared}, **fields})
    return get_peft_model(base(), config)


def test_nothing_shared_is_lora():
    model, plain = dropped(shared=()), get_peft_model(base(), LoraConfig(**FIELDS))
    shake(model)
    shake(plain)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(logits(model), logits(plain))


def test_everything_shared_is_one_lora_per_kind():
    model = dropped(shared=[(i, n) for i in range(LAYERS) for n in ("q_proj", "v_proj")])
    named = [n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(named) == sorted(f"lora_{x}_{n}.default.weight" for n in ("q_proj", "v_proj") for x in "AB")


def test_count():
    model = dropped()
    q, v = 4 * (32 + 32), 4 * (32 + 16)  # r (in + out)
    assert model.get_nb_trainable_parameters()[0] == (2 + 1) * q + (1 + 1) * v  # (kept + 1) per kind


def test_shared_layers_hold_the_same_tensors_and_their_gradients_add_up():
    model = dropped()
    shake(model)
    deltas = {d.host.path: d for d in model.adapters.deltas("default")}
    shared = [deltas[path(i, "q_proj")] for i in (1, 2)]
    assert all(isinstance(d, SharedDelta) for d in shared)
    assert shared[0].pair[0].weight is shared[1].pair[0].weight
    model(input_ids=ids(), labels=ids()).loss.backward()
    # the same numbers as separate LoRAs
    plain = get_peft_model(base(), LoraConfig(**FIELDS))
    single = {d.host.path: d for d in plain.adapters.deltas("default")}
    with torch.no_grad():
        for place, delta in deltas.items():
            source = delta.pair if isinstance(delta, SharedDelta) else (delta.lora_A, delta.lora_B)
            single[place].lora_A.weight.copy_(source[0].weight)
            single[place].lora_B.weight.copy_(source[1].weight)
    loss = plain(input_ids=ids(), labels=ids()).loss
    assert torch.allclose(loss, model(input_ids=ids(), labels=ids()).loss, atol=1e-6)
    loss.backward()
    for x in range(2):
        parts = [(d.lora_A, d.lora_B)[x].weight.grad for p, d in single.items() if p in (s.host.path for s in shared)]
        assert torch.allclose(shared[0].pair[x].weight.grad, sum(parts), atol=1e-6)


def test_the_map_and_every_tensor_are_saved_once(tmp_path):
    model = dropped(bias="lora_only")
    shake(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["shared"][path(1, "q_proj")] == "q_proj"
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("lora_A" in k for k in keys) == 2 + 1 + 2  # own q, own v, shared
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": {"model.layers.0.self_attn.k_proj": "k"}}, "did you mean"),
        ({"shared": {path(0, "q_proj"): "one", path(0, "v_proj"): "one"}}, "differ in shape"),
        (
            {"shared": {path(0, "q_proj"): "q", path(1, "q_proj"): "q"}, "rank_pattern": {"1.self_attn.q_proj": 2}},
            "rank",
        ),
        ({"shared": {path(0, "q_proj"): "q.0"}}, "letters, digits"),
        ({"shared": {path(0, "q_proj"): "q"}, "init_lora_weights": "pissa"}, "cannot start from one of them"),
        ({"use_dora": True}, "use_dora does not go"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(DeltatuneError, match=message):
        get_peft_model(base(), LoraDropConfig(**{**FIELDS, **fields}))


def test_bad_measurements():
    model = get_peft_model(base(), LoraConfig(**FIELDS))
    with pytest.raises(ConfigError, match="train it briefly"):
        output_importance(model, batches(), progress=False)
    with pytest.raises(ConfigError, match="importance of layers starts from data, and there is no batch"):
        output_importance(model, [], progress=False)
    with pytest.raises(ValueError, match="no adapter named"):
        output_importance(model, batches(), "other")
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        Importance({}, {}).share_rest(1.5)
