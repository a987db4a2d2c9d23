"""Adapters combined on ΔW: identity, linearity, the published rules, and what truncation loses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import AdaLoraConfig, BitFitConfig, FullConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from deltatune.combine_adapters import COMBINATIONS, DENSE, elected_mean, keep_largest, keep_random
from deltatune.core.changes import Change, truncate
from deltatune.errors import AdapterNameError, CannotMergeError, ConfigError
from laws import KINDS, METHOD_NAMES, Net, make, refusal
from laws import shake as shake_adapter
from tiny import bert, gpt2, ids, llama, shake

SITES = ["q_proj", "v_proj", "down_proj"]
PLAIN = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=SITES),
    "rslora": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=SITES),
    "patterns": LoraConfig(
        r=4, target_modules=SITES, rank_pattern={"q_proj": 2, "1.mlp.down_proj": 6}, alpha_pattern={"v_proj": 20}
    ),
    "heads": LoraConfig(r=4, target_modules=SITES, modules_to_save=["lm_head"]),
    "lora_bias": LoraConfig(r=4, target_modules=SITES, lora_bias=True),
    "dora": LoraConfig(r=4, target_modules=SITES, use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=SITES),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=SITES),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def change(model, name: str) -> dict[str, torch.Tensor]:
    """parameter -> ΔW of an adapter, by merging it."""
    before = {n: p.clone() for n, p in model.get_base_model().named_parameters() if "lora" not in n}
    model.merge_adapter([name])
    after = dict(model.get_base_model().named_parameters())
    found = {n: (after[n] - p).detach() for n, p in before.items() if n in after and not torch.equal(after[n], p)}
    model.unmerge_adapter()
    return found


def two(first: str = "lora", second: str = "rslora"):
    """A model with two adapters that do something."""
    model = get_peft_model(llama(), PLAIN[first], adapter_name="one")
    model.add_adapter("two", PLAIN[second])
    shake(model)
    return model


# ---------------------------------------------------------------------- identity
@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("config", PLAIN)
def test_one_adapter_of_weight_one_is_itself(config, kind):
    model = get_peft_model(llama(), PLAIN[config], adapter_name="one")
    shake(model)
    wanted = logits(model)
    density = {"density": 1.0} if kind.removesuffix("_svd") in DENSE else {}
    report = model.add_weighted_adapter(["one"], [1.0], "new", kind, **density)
    model.set_adapter("new")
    assert torch.allclose(logits(model), wanted, atol=2e-6)
    assert report.error < 1e-6
    assert not any(p.requires_grad for e in model.adapters.edits["new"] for p in e.trainable())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("base", [bert, gpt2])
def test_biases_and_heads_come_along(base, bias):
    model = get_peft_model(base(), LoraConfig(r=2, bias=bias, task_type="SEQ_CLS" if base is bert else None))
    shake(model)
    wanted = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "new")
    assert model.peft_config["new"].bias == bias
    model.set_adapter("new")
    assert torch.allclose(logits(model), wanted, atol=2e-6)
    assert not torch.allclose(wanted, logits(base()), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_on_every_layer(method, kind, tmp_path):
    reason = refusal(method, kind)
    if reason is not None:
        return
    model, x = make(method, kind)
    shake_adapter(model)
    with torch.no_grad():
        wanted = model(x)
        try:
            model.add_weighted_adapter(["default"], [1.0], "new", "linear")
        except (CannotMergeError, ConfigError):  # prompts and biases have no ΔW of a matrix
            assert list(model.peft_config) == ["default"]
            return
        model.set_adapter("new")
        assert torch.allclose(model(x), wanted, atol=5e-6)
        model.save_pretrained(tmp_path, selected_adapters=["new"])
        torch.manual_seed(0)
        assert torch.equal(PeftModel.from_pretrained(kind.net().eval(), tmp_path / "new")(x), model(x))


# ---------------------------------------------------------------------- sums
@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_sums_are_sums_of_changes(kind):
    model = two("patterns", "dora")
    wanted = {n: 0.7 * a for n, a in change(model, "one").items()}
    for n, b in change(model, "two").items():
        wanted[n] = wanted.get(n, 0) - 1.5 * b
    report = model.add_weighted_adapter(["one", "two"], [0.7, -1.5], "new", kind)
    found = change(model, "new")
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[n], w, atol=1e-5) for n, w in wanted.items())
    assert report.error < 1e-6


def test_cat_has_the_sum_of_the_ranks_and_linear_no_more_than_it_needs():
    model = two()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "cat", "cat")
    assert model.peft_config["cat"].r == 8
    assert not model.peft_config["cat"].rank_pattern
    model.add_weighted_adapter(["one"], [2.0], "twice", "linear")
    report = model.add_weighted_adapter(["one", "twice"], [1.0, 1.0], "triple", "linear")
    assert {site.rank for site in report.sites.values()} == {4}


def test_adapters_of_different_places_and_methods():
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], bias="lora_only"), adapter_name="one")
    model.add_adapter("biases", BitFitConfig())
    model.add_adapter("whole", FullConfig(target_modules=["0.attention.self.value", "0.attention.output.LayerNorm"]))
    model.add_adapter("head", LoraConfig(r=3, target_modules=["key"], modules_to_save=["classifier"]))
    shake(model)
    changes = [change(model, name) for name in ("one", "biases", "whole", "head")]
    weights = [1.0, 0.5, 2.0, -1.0]
    wanted: dict[str, torch.Tensor] = {}
    for w, found in zip(weights, changes, strict=True):
        for n, c in found.items():
            wanted[n] = wanted.get(n, 0) + w * c
    model.add_weighted_adapter(["one", "biases", "whole", "head"], weights, "new", "linear")
    found = change(model, "new")
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[n], c, atol=1e-5) for n, c in wanted.items())
    config = model.peft_config["new"]
    assert config.bias == "all"
    assert set(config.modules_to_save) == {"classifier", "bert.encoder.layer.0.attention.output.LayerNorm"}


def test_half_an_attention_block_leaves_the_other_half_alone():
    net = Net(nn.MultiheadAttention(16, 4, batch_first=True), 16)
    net.hidden = lambda x: net.layer(x, x, x, need_weights=False)[0]
    model = get_peft_model(net.eval(), LoraConfig(r=2, target_modules=["layer.out_proj"]))
    shake(model)
    x = torch.randn(2, 3, 16)
    wanted = model(x)
    model.add_weighted_adapter(["default"], [1.0], "new")
    model.set_adapter("new")
    assert torch.allclose(model(x), wanted, atol=1e-6)


def test_merged_adapters_and_training_mode_do_not_matter():
    model = two("lora", "dora")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "before", "linear")
    wanted = change(model, "before")
    model.merge_adapter(["two"])
    model.train()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "after", "linear")
    model.eval()
    model.unmerge_adapter()
    found = change(model, "after")
    assert all(torch.allclose(found[n], w, atol=1e-6) for n, w in wanted.items())


def test_on_a_sixteen_bit_base():
    model = get_peft_model(llama().bfloat16(), PLAIN["lora"], adapter_name="one")
    shake(model)
    report = model.add_weighted_adapter(["one"], [1.0], "new")
    assert report.error == 0
    a, b = (model.adapters.deltas(n)[0].factors() for n in ("one", "new"))
    assert torch.allclose(a[1] @ a[0], b[1] @ b[0], atol=1e-6)


# ---------------------------------------------------------------------- truncation
def test_truncation_is_the_best_there_is_and_the_report_says_what_is_lost():
    model = two("lora", "dora")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "exact", "linear")
    report = model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", "svd", svd_rank=3)
    exact, found = change(model, "exact"), change(model, "new")
    errors = norms = 0.0
    for name, site in report.sites.items():
        tail = torch.linalg.svdvals(exact[name].double())[3:].square().sum()
        error = (found[name] - exact[name]).double().square().sum()
        assert site.rank == 3
        assert site.error**2 == pytest.approx(float(tail), rel=1e-4)
        assert float(error) == pytest.approx(float(tail), rel=1e-4)
        errors, norms = errors + float(error), norms + float(exact[name].double().square().sum())
    assert report.error == pytest.approx((errors / norms) ** 0.5, rel=1e-4)
    assert "largest" in str(report)


def test_svd_keeps_the_largest_rank_by_default():
    model = get_peft_model(llama(), PLAIN["lora"], adapter_name="one")
    model.add_adapter("two", PLAIN["patterns"])
    shake(model)
    report = model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new")
    ranks = {n.rpartition("layers.")[2]: s.rank for n, s in report.sites.items()}
    assert ranks["0.self_attn.q_proj.weight"] == 4  # 4 and 2
    assert ranks["1.mlp.down_proj.weight"] == 6  # 4 and 6
    assert report.error > 0.01
    assert model.peft_config["new"].rank_pattern == {"model.layers.1.mlp.down_proj": 6}


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
def test_truncate(shape):
    dense = torch.randn(shape, dtype=torch.float64)
    exact = truncate(Change(dense=dense))
    assert torch.allclose(exact.b @ exact.a, dense)
    assert exact.error == 0
    some = truncate(Change(dense=dense), 0.9)
    energy = torch.linalg.svdvals(dense.float()).double().square()
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    assert (share[..., some.rank - 1] >= 0.9).all()
    assert (share[..., some.rank - 2] < 0.9).any()
    assert truncate(Change(dense=dense), 99).rank == 5
    assert truncate(Change(dense=torch.zeros(shape))).rank == 1
    few = torch.zeros(40, 30)
    few[[3, 17]] = torch.randn(2, 30)
    pair = truncate(Change(dense=few))
    assert pair.rank == 2
    assert torch.allclose(pair.b @ pair.a, few, atol=1e-6)


def test_svd_clamp_limits_the_factors():
    model = two()
    report = model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", svd_clamp=0.9)
    loose = model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "loose", svd_clamp=1.0)
    assert report.error > loose.error
    exact = change(model, "one")
    for n, c in change(model, "two").items():
        exact[n] = exact[n] + c
    found = change(model, "new")
    lost = sum(float((found[n] - exact[n]).double().square().sum()) for n in exact)
    assert report.error == pytest.approx((lost / sum(float(c.double().square().sum()) for c in exact.values())) ** 0.5)


# ---------------------------------------------------------------------- the rules
def test_pruning_keeps_what_it_says():
    t = torch.randn(20, 10)
    kept = keep_largest(t, 0.3)
    assert int((kept != 0).sum()) == 60
    assert kept[kept != 0].abs().min() >= t[kept == 0].abs().max()
    many = torch.stack([keep_random(t, 0.25) for _ in range(4000)])
    assert torch.allclose(many.mean(0), t, atol=0.5)
    assert torch.equal(many[0][many[0] != 0], 4 * t[many[0] != 0])


def test_ties_elects_signs():
    stack = torch.tensor([[3.0, -1.0, 2.0], [-1.0, -1.0, 0.0], [-1.0, 4.0, 4.0]])
    ones = torch.ones(3)
    assert torch.equal(elected_mean(stack, ones, "total"), torch.tensor([3.0, 4.0, 3.0]))
    assert torch.equal(elected_mean(stack, ones, "frequency"), torch.tensor([-1.0, -1.0, 3.0]))


@pytest.mark.parametrize("kind", [k for k in COMBINATIONS if k.removesuffix("_svd") in DENSE])
def test_rules_act_on_the_changes(kind):
    model = two("rslora", "dora")
    changes = [change(model, n) for n in ("one", "two")]
    torch.manual_seed(11)
    report = model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "new", kind, density=0.6)
    torch.manual_seed(11)
    found = change(model, "new")
    prune = keep_random if "dare" in kind else keep_largest
    for name in report.sites:
        parts = torch.stack([prune(c[name].double(), 0.6) for c in changes])
        weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
        if "ties" in kind:
            wanted = elected_mean(parts, weights, "total")
        else:
            wanted = parts[0] - 0.5 * parts[1]
        if kind.endswith("_svd"):  # two: full rank, so nothing is cut off
            assert report.sites[name].error == pytest.approx(0, abs=1e-4)
        assert torch.allclose(found[name].double(), wanted, atol=1e-4)


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((["one", "tow"], [1.0, 1.0], "new"), {}, AdapterNameError, "did you mean 'two'"),
        ((["one", "two"], [1.0], "new"), {}, ConfigError, "2 adapters need 2 weights"),
        ((["one", "one"], [1.0, 1.0], "new"), {}, AdapterNameError, "named twice"),
        (([], [], "new"), {}, ConfigError, "at least one"),
        ((["one"], [1.0], "two"), {}, AdapterNameError, "already there"),
        ((["one"], [1.0], "new", "tie"), {}, ConfigError, "did you mean 'ties'"),
        ((["one"], [1.0], "new", "linear"), {"svd_rank": 3}, ConfigError, "svd_rank is for svd"),
        ((["one"], [1.0], "new", "cat"), {"density": 0.3}, ConfigError, "density is for the rules that prune"),
        ((["one"], [1.0], "new", "ties"), {}, ConfigError, "needs density"),
        ((["one"], [1.0], "new", "ties"), {"density": 0.0}, ConfigError, "needs density"),
        ((["one"], [1.0], "new", "svd"), {"svd_rank": 0}, ConfigError, "svd_rank must be"),
        ((["one"], [1.0], "new", "svd"), {"svd_clamp": 2}, ConfigError, "quantile"),
        ((["one"], [1.0], "new", "svd"), {"majority_sign_method": "frequency"}, ConfigError, "elects no signs"),
        ((["one"], [1.0], "new", "ties"), {"density": 1, "majority_sign_method": "x"}, ConfigError, "frequency"),
    ],
)
def test_bad_input(arguments, options, error, message):
    model = two()
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(*arguments, **options)
    assert list(model.peft_config) == ["one", "two"]
