"""Compositions: what each block means, on adapters of several methods, and what makes no sense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import (
    Average,
    BatchSplit,
    Fuse,
    FusionConfig,
    HoulsbyConfig,
    IA3Config,
    LoraConfig,
    Parallel,
    ParallelConfig,
    PeftModel,
    PfeifferConfig,
    PrefixTuningConfig,
    Split,
    Stack,
    get_peft_model,
)
from deltatune.core.composition import from_json, to_json
from deltatune.errors import AdapterLoadError, AdapterNameError, ConfigError
from tiny import bert, ids, llama, shake

LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}


@pytest.fixture
def model() -> PeftModel:
    """Adapters a (Pfeiffer), b (LoRA), c (parallel), d (IA3), p (prefix) on a tiny Llama, none active yet."""
    made = get_peft_model(llama(), PfeifferConfig(reduction_factor=4), adapter_name="a")
    made.add_adapter("b", LoraConfig(**LORA))
    made.add_adapter("c", ParallelConfig(reduction_factor=4))
    made.add_adapter("d", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    made.add_adapter("p", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    shake(made)
    return made.requires_grad_(False).eval()


def run(model: PeftModel, setup, x: torch.Tensor | None = None, **options) -> torch.Tensor:
    model.set_adapter(setup)
    return model(input_ids=ids() if x is None else x, **options).logits


def test_a_stack_of_one_is_the_adapter(model):
    for name in "abcdp":
        assert torch.equal(run(model, Stack(name)), run(model, name))


def test_a_stack_passes_on_what_it_made():
    net = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(
        net, HoulsbyConfig(reduction_factor=2, target_modules=["0"], train_layer_norms=False), adapter_name="a"
    )
    model.add_adapter("b", HoulsbyConfig(reduction_factor=2, target_modules=["0"], train_layer_norms=False))
    shake(model, 1.0)
    x = torch.randn(3, 8)
    a, b = (model.adapters.edits[n][0] for n in "ab")
    with model.disable_adapter():
        y = model(x)
    model.set_adapter(Stack("a", "b"))
    after_a = y + a.change(y)
    assert torch.allclose(model(x), after_a + b.change(after_a), atol=1e-6)
    model.set_adapter(["a", "b"])
    assert torch.allclose(model(x), y + a.change(y) + b.change(y), atol=1e-6)
    model.set_adapter(Stack("b", "a"))
    assert not torch.allclose(model(x), after_a + b.change(after_a), atol=1e-4)


def test_adapters_at_different_places_stack_as_they_add_up(model):
    assert torch.allclose(run(model, Stack("p", "b", "c")), run(model, ["p", "b", "c"]), atol=1e-5)


def test_an_average_of_equals_is_one_of_them(model):
    model.add_adapter("twin", LoraConfig(**LORA))
    with torch.no_grad():
        for new, old in zip(model.adapters.parameters("twin"), model.adapters.parameters("b"), strict=True):
            new.copy_(old)
    assert torch.allclose(run(model, Average("b", "twin")), run(model, "b"), atol=1e-5)
    assert torch.allclose(run(model, Average("b", "a", weights=[1.0, 0.0])), run(model, "b"), atol=1e-5)


def test_an_average_of_loras_is_their_weighted_sum():
    model = get_peft_model(llama(), LoraConfig(**LORA), adapter_name="a")
    model.add_adapter("b", LoraConfig(**LORA))
    shake(model)
    model.base_model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "mean", combination_type="cat")
    assert torch.allclose(run(model, Average("a", "b", weights=[1, 3])), run(model, "mean"), atol=1e-5)


def test_rows_of_a_batch_split(model):
    setup = BatchSplit("a", Stack("b", "c"), batch_sizes=[1, 2])
    wanted = torch.cat([run(model, "a")[:1], run(model, Stack("b", "c"))[1:]])
    assert torch.allclose(run(model, setup), wanted, atol=1e-5)
    nested = Stack("c", BatchSplit("a", "b", batch_sizes=[2, 1]))
    wanted = torch.cat([run(model, Stack("c", "a"))[:2], run(model, Stack("c", "b"))[2:]])
    assert torch.allclose(run(model, nested), wanted, atol=1e-5)


def test_parallel_runs_the_batch_through_each(model):
    out = run(model, Parallel("a", Stack("b", "c")))
    assert out.shape[0] == 2 * len(ids())
    assert torch.allclose(out, torch.cat([run(model, "a"), run(model, Stack("b", "c"))]), atol=1e-5)
    out = run(model, Stack("p", Parallel("a", "b")))
    assert torch.allclose(out, torch.cat([run(model, ["p", "a"]), run(model, ["p", "b"])]), atol=1e-5)
    model.set_adapter(Parallel("a", "b"))
    both = model.generate(input_ids=ids(), max_new_tokens=4, do_sample=False)
    model.set_adapter("b")
    assert torch.equal(both[3:], model.generate(input_ids=ids(), max_new_tokens=4, do_sample=False))
    model.set_adapter(Parallel("a", "b"))
    loss = model(input_ids=ids(), labels=ids()).loss
    assert torch.isfinite(loss)


def test_positions_of_a_split():
    model = get_peft_model(bert(), PfeifferConfig(reduction_factor=4, layers_to_transform=[1]), adapter_name="a")
    model.add_adapter("b", LoraConfig(target_modules=["output.dense"], layers_to_transform=[1]))
    shake(model)
    hidden = {"output_hidden_states": True}
    x = ids(2, 6)

    def last(setup):
        model.set_adapter(setup)
        return model(input_ids=x, **hidden).hidden_states[-1]

    wanted = torch.cat([last("a")[:, :2], last("a")[:, 2:]], 1)
    assert torch.allclose(last(Split("a", "a", splits=[2, 4])), wanted, atol=1e-6)
    mixed = last(Split("a", Stack("a"), splits=[5, 1]))
    assert torch.allclose(mixed, wanted, atol=1e-6)
    with pytest.raises(ConfigError, match=r"sizes for 5 positions, and .* is called with 6"):
        last(Split("a", "a", splits=[2, 3]))


def test_compositions_per_row(model):
    names = [Stack("a", "b"), "c", "__base__"]
    with model.disable_adapter():
        base = model(input_ids=ids()).logits
    wanted = torch.cat([run(model, names[0])[:1], run(model, "c")[1:2], base[2:]])
    assert torch.allclose(model(input_ids=ids(), adapter_names=names).logits, wanted, atol=1e-5)


def test_gradients_reach_every_adapter_of_a_nest(model):
    for name in "abcd":
        model.set_requires_grad(name, True)
    setup = Stack("d", Average("b", Stack("a", "c")))
    run(model, setup).square().sum().backward()
    for name in "abcd":
        assert all(p.grad is not None for p in model.adapters.parameters(name) if p.requires_grad), name


def test_a_composition_under_one_name(model, tmp_path):
    setup = Stack("d", Average("b", Stack("a", "c"), weights=[1, 3]))
    live = run(model, setup)
    assert from_json(to_json(setup)) == setup
    model.save_composition(tmp_path)
    fresh = get_peft_model(llama(), LoraConfig(target_modules=["o_proj"]), adapter_name="other").eval()
    assert fresh.load_composition(tmp_path) == setup
    assert torch.equal(fresh(input_ids=ids()).logits, live)
    with pytest.raises(AdapterLoadError, match=r"has no composition\.json"):
        fresh.load_composition(tmp_path / "adapter_0")


def test_compiled_and_checkpointed(model):
    model.set_adapter(Stack("d", Average("b", Stack("a", "c"))))
    live = model(input_ids=ids()).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(input_ids=ids()).logits, live, atol=1e-5)


# ---------------------------------------------------------------------- fusion
def fused(make=bert, **options) -> PeftModel:
    model = get_peft_model(make(), PfeifferConfig(reduction_factor=4), adapter_name="a")
    model.add_adapter("b", PfeifferConfig(reduction_factor=8))
    shake(model)
    model.set_requires_grad(["a", "b"], False)
    model.add_adapter("a,b", FusionConfig(adapters=["a", "b"], **options))
    return model.eval()


@pytest.mark.parametrize("make", [bert, llama])
def test_fusion_with_equal_keys_is_the_mean(make):
    model = fused(make)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "fusion_key" in n:
                p.zero_()
    wanted = run(model, Average("a", "b"))
    assert torch.allclose(run(model, Fuse("a", "b")), wanted, atol=1e-4)
    weights = model.adapters.edits["a,b"][0]
    with torch.no_grad():
        run(model, Fuse("a", "b"))
    assert torch.allclose(weights.weights, torch.tensor([0.5, 0.5]))


def test_fusion_against_the_equation():
    model = fused()
    shake(model, 0.5)
    fusion, a, b = (model.adapters.edits[n][0] for n in ("a,b", "a", "b"))
    s = torch.randn(2, 5, 32)
    h = a.query(s)
    z = torch.stack([a.change(h), b.change(h)], 2)
    q = h @ fusion.q.weight.weight.T + fusion.q.bias.weight
    k = z @ fusion.k.weight.weight.T + fusion.k.bias.weight
    p = torch.einsum("btd,btnd->btn", q, k).softmax(-1)
    wanted = torch.einsum("btn,btnd->btd", p, z @ fusion.v.weight.weight.T)
    assert torch.allclose(fusion.mix(h, [z[:, :, 0], z[:, :, 1]]), wanted, atol=1e-5)
    # permuting the adapters permutes p only
    assert torch.allclose(fusion.mix(h, [z[:, :, 1], z[:, :, 0]]), wanted, atol=1e-5)


def test_training_a_fusion_leaves_its_adapters_alone():
    from deltatune.schedules import attach

    model = fused(task_type="SEQ_CLS")
    before = [p.clone() for n in "ab" for p in model.adapters.parameters(n)]
    model.set_adapter(Fuse("a", "b"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedules = attach(model, optimizer, total_steps=20, adapter_name="a,b")
    x = torch.randint(2, 60, (12, 6), generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 30).long()
    losses = []
    for _ in range(20):
        loss = model(input_ids=x, labels=y).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    schedules.finish()
    assert losses[-1] < 0.8 * losses[0]
    after = [p for n in "ab" for p in model.adapters.parameters(n)]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_the_regulariser_at_the_start():
    from deltatune.schedules.base import Run
    from deltatune.schedules.fusion import FusionPenalty

    model = fused()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = FusionPenalty().start(Run(model.get_base_model(), model.adapters, "a,b", optimizer))
    assert schedule.penalty().item() == pytest.approx(0.01 * 2 * (32**2 - 32) * 1e-12, rel=1e-3)


def test_a_fusion_is_saved_with_its_adapters(tmp_path):
    model = fused()
    shake(model)
    live = run(model, Fuse("a", "b"))
    model.save_composition(tmp_path)
    fresh = get_peft_model(bert(), LoraConfig(target_modules=["query"]), adapter_name="other").eval()
    fresh.load_composition(tmp_path)
    assert torch.equal(fresh(input_ids=ids()).logits, live)


def test_a_prefix_in_a_stack_with_a_composition(model, tmp_path):
    alone = run(model, Stack("p", "a"))
    assert torch.allclose(run(model, Stack("p", Average("a", "a"))), alone, atol=1e-6)
    tree = Stack("p", Average("b", Stack("a", "d"), weights=[1, 3]))
    live = run(model, tree)
    assert not torch.allclose(live, run(model, Average("b", Stack("a", "d"), weights=[1, 3])), atol=1e-3)
    rows = run(model, BatchSplit("c", tree, batch_sizes=[1, 2]))
    assert torch.allclose(rows[1:], live[1:], atol=1e-5)
    assert torch.allclose(rows[:1], run(model, "c")[:1], atol=1e-5)
    model.save_composition(tmp_path, tree)
    fresh = get_peft_model(llama(), LoraConfig(**LORA), adapter_name="other").eval()
    fresh.load_composition(tmp_path)
    assert torch.equal(fresh(input_ids=ids()).logits, live)


# ---------------------------------------------------------------------- what makes no sense
def test_what_is_refused(model):
    with pytest.raises(ConfigError, match="Fuse needs at least 2 adapters, not 1"):
        Fuse("a")
    with pytest.raises(ConfigError, match="Split has 2 adapters and 3 splits"):
        Split("a", "b", splits=[1, 2, 3])
    with pytest.raises(ConfigError, match="must be whole numbers of at least 1"):
        BatchSplit("a", "b", batch_sizes=[0, 3])
    with pytest.raises(ConfigError, match="add up to 5 rows, and the batch has 3"):
        run(model, BatchSplit("a", "b", batch_sizes=[2, 3]))
    with pytest.raises(AdapterNameError, match="no adapter named 'e'"):
        run(model, Stack("a", "e"))
    with pytest.raises(AdapterNameError, match=r"has no fusion adapter: add_adapter\('a,c'"):
        run(model, Fuse("a", "c"))
    with pytest.raises(ConfigError, match=r"'p' cannot stand in Average.*only Stack takes it"):
        run(model, Average("p", "a"))
    with pytest.raises(ConfigError, match="'p' cannot stand in"):
        run(model, Stack("p", Average("p", "a")))
    with pytest.raises(ConfigError, match="none of b, d is a bottleneck adapter"):
        model.add_adapter("b,d", FusionConfig(adapters=["b", "d"]))
    with pytest.raises(ConfigError, match="Parallel cannot stand inside Average"):
        run(model, Average("a", Parallel("b", "c")))
    with pytest.raises(ConfigError, match="takes adapters' names and compositions, not 3"):
        Stack("a", 3)
