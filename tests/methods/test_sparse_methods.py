"""SHiRA, FISH Mask, diff pruning and FAR: the cards' tests beyond the laws."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltatune import (
    DiffPruningConfig,
    FarConfig,
    FishMaskConfig,
    PeftModel,
    ShiraConfig,
    get_peft_model,
    prepare_init,
)
from deltatune.core.sparse import SparseDelta, SparseLinear, dense, largest
from deltatune.errors import ConfigError, TargetError
from deltatune.methods.diff_pruning import HIGH, LOW, diff_groups, expected_l0, hard_concrete, open_probability, prune
from deltatune.methods.far import reconfigure
from tiny import bert, ids, llama, shake

FFN = {"target_modules": ["up_proj", "gate_proj", "down_proj"]}


def batches(n: int = 4, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = [torch.randint(2, 60, (rows, 6), generator=generator) for _ in range(n)]
    return [{"input_ids": x, "labels": x} for x in found]


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits


def train(model, steps: int = 3, lr: float = 1e-2, params=None, extra=None) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(params or [p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for k in range(steps):
        batch = batches()[k % 4]
        loss = model(**batch).loss
        losses.append(loss.item())
        (loss if extra is None else loss + extra()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def changed(model, before) -> int:
    """How many numbers of the base a merge changes; merges."""
    merged = dict(model.merge_and_unload().named_parameters())
    return sum(int((merged[n] != p).sum()) for n, p in before.named_parameters())


# ---------------------------------------------------------------------- the sparse change itself
def test_nothing_of_the_weights_size_is_kept_for_backward():
    layer = nn.Linear(64, 64)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), layer), ShiraConfig(target_modules=["1"], r=2))
    x = torch.randn(2, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    # positions as int64 and values, the inputs of the layers; not the 64 · 64 · 4 bytes of a weight
    assert sum(n for pointer, n in storages.items() if pointer not in own) < 64 * 64 * 4 / 2


def test_gradients_of_the_sparse_product():
    x, values = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    flat = torch.tensor([3, 17, 40, 62])
    inputs = (x.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, v: SparseLinear.apply(x, v, flat, (9, 7)), inputs)
    wanted = x @ dense(values, flat, (9, 7)).mT
    assert torch.allclose(SparseLinear.apply(x, values, flat, (9, 7)), wanted)


def test_largest_over_all():
    found = largest({"a": torch.tensor([[5.0, 1.0], [0.0, 9.0]]), "b": torch.tensor([7.0, 2.0])}, 3)
    assert {k: v.tolist() for k, v in found.items()} == {"a": [0, 3], "b": [0]}


def test_files_hold_positions_and_values_only(tmp_path):
    model = get_peft_model(llama(), ShiraConfig(r=2, target_modules=["q_proj"]))
    shake(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    n = 2 * (32 + 32)
    assert {k.split(".")[-1]: (tuple(t.shape), t.dtype) for k, t in state.items()} == {
        "shira_weight": ((n,), torch.float32),
        "shira_indices": ((2, n), torch.int32),
    }


def test_two_sparse_adapters_swap_without_residue():
    model = get_peft_model(llama(), ShiraConfig(r=2, random_seed=1), adapter_name="one")
    model.add_adapter("two", ShiraConfig(r=3, random_seed=2))
    shake(model)
    base = llama()
    for _ in range(2):
        for name in ("one", "two"):
            model.set_adapter(name)
            live = logits(model)
            model.merge_adapter()
            assert torch.allclose(logits(model), live, atol=1e-5)
            model.unmerge_adapter()
    plain = model.unload()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), base.parameters(), strict=True))


# ---------------------------------------------------------------------- SHiRA
def test_shira_changes_exactly_its_entries():
    model = get_peft_model(llama(), ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    shake(model)
    count = model.get_nb_trainable_parameters()[0]
    assert count == 2 * (2 * (32 + 32) + 2 * (48 + 32))
    assert changed(model, llama()) == count


def test_shira_masks():
    def positions(**fields):
        model = get_peft_model(llama(), ShiraConfig(**{"r": 1, "target_modules": ["q_proj"], **fields}))
        return [d.indices.weight for d in model.adapters.deltas("default")]

    same, other = positions(random_seed=4), positions(random_seed=5)
    assert all(torch.equal(a, b) for a, b in zip(same, positions(random_seed=4), strict=True))
    assert not torch.equal(same[0], other[0])
    assert not torch.equal(same[0], same[1])  # layers have masks of their own
    first = positions(mask_type="magnitude")[0]
    w = llama().model.layers[0].self_attn.q_proj.weight.abs()
    assert w[first[0].long(), first[1].long()].min() >= w.flatten().topk(64).values[-1]


def test_shira_mask_of_ones_own(tmp_path):
    def diagonal(layer, r, **kwargs):
        assert kwargs == {"random_seed": 3}
        mask = torch.zeros_like(layer.weight)
        mask.view(-1)[: r * sum(mask.shape)] = 1
        return mask

    config = ShiraConfig(r=1, target_modules=["q_proj"], mask_type="mine", random_seed=3)
    config.mask_fn = diagonal
    model = get_peft_model(llama(), config)
    shake(model)
    assert model.adapters.deltas("default")[0].flat().tolist() == list(range(64))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    config.mask_fn = lambda layer, r, **kwargs: torch.ones_like(layer.weight)
    with pytest.raises(ConfigError, match="mask_fn chose 1024 entries of .* r=1 asks for 64"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": 20}, "asks for 1280 entries of .* which has 1024; lower r"),
        ({"r": 2, "mask_type": "randon"}, "did you mean 'random'"),
    ],
)
def test_shira_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(llama(), ShiraConfig(**fields))


# ---------------------------------------------------------------------- FISH Mask
def fisher(net: nn.Module, rows) -> dict[str, torch.Tensor]:
    """By hand: squared gradients of one sample at a time."""
    sums = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for x, y in rows:
        net.zero_grad()
        nn.functional.mse_loss(net(x[None]), y[None]).backward()
        for n, p in net.named_parameters():
            sums[n] += p.grad.square()
    return sums


def regression(batch_size: int):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    data = [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, 8, batch_size)]
    return net, data, [(a, b) for a, b in zip(x, y, strict=True)]


def loss(model, batch) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def chosen(config: FishMaskConfig) -> dict[str, list[int]]:
    return {name: index.tolist() for name, (index, _) in config.prepared.items()}


def test_fisher_by_hand_whatever_the_batch():
    """Per sample and without dropout: batches of one and of four give what a loop over samples gives."""
    net, _, rows = regression(1)
    scores = fisher(net.eval(), rows)
    flat = torch.cat([scores[n].flatten() for n in ("0.weight", "3.weight", "0.bias", "3.bias")])
    keep = int(51 * 0.3)
    wanted = flat.topk(keep).indices.sort().values.tolist()
    for size in (1, 4):
        net, data, _ = regression(size)
        net.train()
        config = FishMaskConfig(target_modules=["0", "3"], keep_ratio=0.3)
        assert prepare_init(net, config, data, loss=loss, progress=False) == len(data)
        assert net.training
        assert net[2].training
        found, start = [], 0
        for name, n in (("0", 24), ("3", 18), ("0.bias", 6), ("3.bias", 3)):
            found += [start + i for i in chosen(config)[name]]
            start += n
        assert sorted(found) == wanted
        assert sum(config.kept.values()) == keep


def test_order_is_independent_of_the_number_of_samples():
    first, second = FishMaskConfig(keep_ratio=0.1), FishMaskConfig(keep_ratio=0.1)
    data = batches(2)
    prepare_init(llama(), first, data, progress=False)
    prepare_init(llama(), second, data + data, progress=False)
    assert chosen(first) == chosen(second)


def test_only_the_mask_moves(tmp_path):
    config = FishMaskConfig(keep_ratio=0.01, task_type="CAUSAL_LM")
    prepare_init(llama(), config, batches(), progress=False)
    model = get_peft_model(llama(), config)
    base = llama()
    assert torch.equal(logits(model), logits(base))
    inside = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 5 * 32  # the linear layers of the blocks, the norms
    assert model.get_nb_trainable_parameters()[0] == int(inside * 0.01) == sum(config.kept.values())
    losses = train(model, 12)
    assert losses[-4:] < losses[:4]
    live = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), live)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for k, t in state.items() if "values" in k) == int(inside * 0.01)
    assert torch.allclose(logits(again.merge_and_unload()), live, atol=1e-5)
    assert changed(model, base) == int(inside * 0.01)


def test_ratio_one_is_everything():
    config = FishMaskConfig(target_modules=["q_proj"], keep_ratio=1.0, vectors=False)
    prepare_init(llama(), config, batches(1), progress=False)
    model = get_peft_model(llama(), config)
    assert [len(d.values.weight) for d in model.adapters.deltas("default")] == [1024, 1024]


def test_a_head_trains_beside_it_and_does_not_compete():
    config = FishMaskConfig(task_type="SEQ_CLS", keep_ratio=0.005)
    data = [{"input_ids": ids(), "labels": torch.tensor([0, 1, 1])}]
    prepare_init(bert(), config, data, progress=False)
    assert not any("classifier" in name for name in config.kept)
    model = get_peft_model(bert(), config)
    assert any("classifier.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    assert any(name.endswith(".bias") for name in config.kept)


def test_absolute_gradients_are_another_score():
    """One outlier of a gradient weighs more when squared."""
    configs = {score: FishMaskConfig(keep_ratio=0.02, score=score) for score in ("square", "absolute")}
    for config in configs.values():
        prepare_init(llama(), config, batches(), progress=False)
    assert chosen(configs["square"]) != chosen(configs["absolute"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "looks at data first: call prepare_init"),
        ({"keep_ratio": 0.0}, r"share in \(0, 1\]"),
        ({"score": "cubic"}, "score must be"),
        ({"kept": {"q_proj": -1}}, "must be a number of entries"),
        ({"kept": {"q_proj": 2000}}, "asks for 2000 entries of .* which has 1024"),
        ({"kept": {"nothing": 3}}, "kept key 'nothing' matches no adapted module"),
    ],
)
def test_fish_bad_values(fields, message):
    with pytest.raises((ConfigError, TargetError), match=message):
        get_peft_model(llama(), FishMaskConfig(**fields))


def test_fish_without_a_loss_or_data():
    with pytest.raises(ConfigError, match="returned no loss"):
        prepare_init(llama(), FishMaskConfig(), [{"input_ids": ids()}], progress=False)
    with pytest.raises(ConfigError, match="FISH Mask starts from data, and there is no batch"):
        prepare_init(llama(), FishMaskConfig(), [], progress=False)


# ---------------------------------------------------------------------- diff pruning
def test_hard_concrete():
    alpha = torch.full((200_000,), 0.3)
    z = hard_concrete(alpha, sample=True)
    assert 0 <= z.min() <= z.max() <= 1
    assert abs((z > 0).float().mean() - open_probability(alpha[0])) < 0.01
    assert (z == 0).any()
    assert (z == 1).any()
    assert float(hard_concrete(torch.tensor([50.0]), sample=True)) == 1
    # u = ½ outside training
    s = torch.sigmoid(torch.tensor(0.3))
    assert torch.allclose(hard_concrete(alpha[:1], sample=False), LOW + (HIGH - LOW) * s)
    assert math.log(-LOW / HIGH) == 0


@pytest.mark.parametrize("structured", [False, True])
def test_gradients_of_diff_pruning(structured):
    """g z z_g to w; g w z_g dz to α; their sum over the weight to the gate; dz = (r - l) s (1 - s)."""
    net = nn.Sequential(nn.Linear(5, 4, bias=False))
    model = get_peft_model(net, DiffPruningConfig(target_modules=["0"], structured=structured, alpha_init=0.4))
    (delta,) = model.adapters.deltas("default")
    with torch.no_grad():
        delta.diff.weight.normal_()
    g = torch.randn(4, 5)
    model.eval()
    torch.autograd.backward(delta.change(), g)
    s = torch.sigmoid(torch.tensor(0.4))
    z, dz = LOW + (HIGH - LOW) * s, (HIGH - LOW) * s * (1 - s)
    gate = z if structured else 1.0
    assert torch.allclose(delta.diff.weight.grad, g * z * gate)
    assert torch.allclose(delta.alpha.weight.grad, g * delta.diff.weight * gate * dz)
    if structured:
        assert torch.allclose(delta.group_alpha.weight.grad, (g * delta.diff.weight * z * dz).sum())


def test_masks_are_drawn_anew_in_training_only():
    model = get_peft_model(llama(), DiffPruningConfig(alpha_init=0.5))
    shake(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_search_prune_and_train_on(tmp_path):
    base = llama()
    model = get_peft_model(llama(), DiffPruningConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    competing = sum(d.diff.weight.numel() for d in model.adapters.deltas("default"))
    gates = len(model.adapters.deltas("default"))
    assert float(expected_l0(model).detach()) == pytest.approx((competing + gates) * torch.sigmoid(torch.tensor(5.0)))
    groups = diff_groups(model, lr=1e-2)
    assert [g["lr"] for g in groups] == [1e-2, 0.1]
    assert sum(p.numel() for p in groups[1]["params"]) == competing + gates
    train(model, 4, params=groups, extra=lambda: 1e-4 * expected_l0(model))
    head = model.get_base_model().lm_head.modules_to_save.default.weight.clone()
    changes = torch.cat([d.change().detach().flatten() for d in model.adapters.deltas("default")])
    keep = prune(model, keep_ratio=0.05)
    assert keep == int(competing * 0.05)
    deltas = model.adapters.deltas("default")
    assert all(isinstance(d, SparseDelta) for d in deltas)
    values = torch.cat([d.values.weight.detach() for d in deltas])
    assert len(values) == keep
    assert torch.allclose(values.abs().sort().values, changes.abs().sort().values[-keep:])
    assert torch.equal(model.get_base_model().lm_head.modules_to_save.default.weight, head)
    assert model.active_adapters == ["default"]
    train(model, 4)
    live = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), live)
    moved = changed(model, base) - int((model.get_base_model().lm_head.weight != base.lm_head.weight).sum())
    assert moved == keep


def test_diff_pruning_bad_values():
    with pytest.raises(ConfigError, match='stage="fixed" and kept belong together'):
        DiffPruningConfig(stage="fixed")
    with pytest.raises(ConfigError, match="stage must be"):
        DiffPruningConfig(stage="found")
    model = get_peft_model(llama(), DiffPruningConfig())
    with pytest.raises(ConfigError, match=r"keep_ratio is a share in \(0, 1\]"):
        prune(model, 2.0)
    shake(model)
    prune(model)
    for function in (prune, expected_l0):
        with pytest.raises(ConfigError, match="learns no mask: it is no DiffPruningConfig, or pruned already"):
            function(model)


# ---------------------------------------------------------------------- FAR
def test_far_primes_and_reconfigures(tmp_path):
    base = llama()
    model = get_peft_model(llama(), FarConfig(task_type="CAUSAL_LM", **FFN))
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * 32 * 48
    train(model, 3)
    moved = {
        d.host.path: (d.value.weight - d.ref.load()).abs().sum(1).detach() for d in model.adapters.deltas("default")
    }
    primed = {d.host.path: d.value.weight.detach().clone() for d in model.adapters.deltas("default")}
    learners = reconfigure(model, share=0.25)
    assert {p: len(rows) for p, rows in learners.items()} == {p: round(0.25 * len(m)) for p, m in moved.items()}
    for path, rows in learners.items():
        assert sorted(moved[path].topk(len(rows)).indices.tolist()) == rows
    for delta in model.adapters.deltas("default"):
        assert torch.equal(delta.value.weight, primed[delta.host.path][learners[delta.host.path]])
    train(model, 3)
    live = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), live)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), live, atol=1e-5)
    for path, rows in learners.items():
        w, w0 = merged.get_submodule(path).weight, base.get_submodule(path).weight
        frozen = [i for i in range(len(w)) if i not in rows]
        assert torch.equal(w[frozen], w0[frozen])
        assert not torch.equal(w[rows], w0[rows])


def test_far_before_training_is_the_base():
    model = get_peft_model(llama(), FarConfig(**FFN))
    assert torch.allclose(logits(model), logits(llama()), atol=1e-6)
    shake(model)
    reconfigure(model, 0.5, start="base")
    assert torch.allclose(logits(model), logits(llama()), atol=1e-6)


def test_far_learners_cost_what_they_weigh():
    """No product of the whole weight's size: the learners are a layer of their own."""
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), FarConfig(target_modules=["0"], learners={"0": [1, 5]}))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 64))
    assert counter.get_total_flops() == 2 * 2 * 64 * (64 + 2)


def test_far_biases_belong_to_rows():
    model = get_peft_model(bert(), FarConfig(target_modules=["intermediate.dense"], task_type="SEQ_CLS"))
    shake(model)
    reconfigure(model, 0.1)
    counts = {s.name: s.weight.numel() for d in model.adapters.deltas("default") for s in d.slots}
    assert counts == {"far_rows": 5 * 32, "far_bias": 5}


def test_all_rows_is_full_tuning_of_the_layer():
    model = get_peft_model(llama(), FarConfig(**FFN))
    shake(model)
    live = logits(model)
    reconfigure(model, 1.0)
    assert torch.allclose(logits(model), live, atol=1e-5)
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * 32 * 48


@pytest.mark.parametrize(
    ("learners", "message"),
    [
        ({"up_proj": [0, 48]}, "names row 48 of a layer of 48 rows"),
        ({"up_proj": [-1]}, "names row -1"),
        ({"up_proj": [3, 3]}, "names a row twice"),
        ({"q_proj": [3]}, "learners key 'q_proj' matches no adapted module"),
    ],
)
def test_far_bad_rows(learners, message):
    with pytest.raises((ConfigError, TargetError), match=message):
        get_peft_model(llama(), FarConfig(learners=learners, **FFN))


def test_far_bad_stages():
    model = get_peft_model(llama(), FarConfig(**FFN))
    with pytest.raises(ConfigError, match="has not moved .* yet; prime it"):
        reconfigure(model)
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\]"):
        reconfigure(model, 0)
    shake(model)
    reconfigure(model)
    with pytest.raises(ConfigError, match="is not priming"):
        reconfigure(model)
