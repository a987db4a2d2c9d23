"""LoRA+: the card's identities (arXiv 2402.12354)."""

from __future__ import annotations

import pytest
import torch

from deltatune import BitFitConfig, ConfigError, LoraConfig, LoraFAConfig, get_peft_model
from deltatune.schedules import LoraPlus, attach
from deltatune.schedules.lora_plus import lora_plus_groups
from schedule_runs import Loop, batches, largest_difference, model_for, weights
from tiny import llama


def run(model, optimizer, *procedures, steps=4):
    attached = attach(model, optimizer, *procedures) if procedures else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 10)
    rates = []
    if attached is not None:
        optimizer.register_step_pre_hook(lambda o, *_: rates.append([(g["lr"], g["params"]) for g in o.param_groups]))
    for step in range(steps):
        model(**batches()[step]).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return rates


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_a_ratio_of_one_is_lora():
    one, plain = model_for("lora_plus"), model_for("lora_plus")
    run(one, torch.optim.AdamW(trained(one), lr=0.01), LoraPlus(ratio=1))
    run(plain, torch.optim.AdamW(trained(plain), lr=0.01))
    assert largest_difference(weights(one), weights(plain)) == 0


def test_the_step_of_b_is_the_ratio_times_loras_and_as_is_the_same():
    plus, plain = model_for("lora_plus"), model_for("lora_plus")
    start = weights(plain)
    run(plus, torch.optim.SGD(trained(plus), lr=0.1), LoraPlus(ratio=8), steps=1)
    run(plain, torch.optim.SGD(trained(plain), lr=0.1), steps=1)
    for name, p in plain.named_parameters():
        factor = 8 if "lora_B" in name else 1
        moved = plus.get_parameter(name) - start[name]
        assert torch.allclose(moved, factor * (p - start[name]), atol=1e-7), name


def test_the_ratio_holds_at_every_step_of_a_scheduler():
    model = model_for("lora_plus")
    names = {id(p): n for n, p in model.named_parameters()}
    for groups in run(model, torch.optim.AdamW(trained(model), lr=0.01), LoraPlus(ratio=16)):
        found = {("lora_B" in names[id(p)]): lr for lr, params in groups for p in params}
        assert found[True] == pytest.approx(16 * found[False])
        assert sum(len(params) for _, params in groups) == len(trained(model))


def test_groups_give_what_the_procedure_gives():
    """Embeddings at their own rate, vectors of the B side without decay, a head with the rest."""
    fields = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "lora_bias": False}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(llama(), LoraConfig(**fields)))
    attached, grouped = models
    optimizer = torch.optim.AdamW(trained(attached), lr=0.01, weight_decay=0.1)
    run(attached, optimizer, LoraPlus(ratio=4, embedding_lr=0.003))
    groups = lora_plus_groups(grouped, 0.01, 4, weight_decay=0.1, embedding_lr=0.003)
    assert sorted(g["lr"] for g in groups) == [0.003, 0.01, 0.04]
    counted = [id(p) for g in groups for p in g["params"]]
    assert sorted(counted) == sorted(map(id, trained(grouped)))
    run(grouped, torch.optim.AdamW(groups, lr=0.01))
    assert largest_difference(weights(attached), weights(grouped)) < 1e-7


def test_vectors_of_the_b_side_do_not_decay():
    model = get_peft_model(llama(mlp_bias=True), LoraConfig(r=4, target_modules=["up_proj"], lora_bias=True))
    schedule = attach(model, torch.optim.AdamW(trained(model), lr=0.01), LoraPlus(ratio=4))
    rates = {n.split("up_proj.")[1]: schedule.rate(p) for n, p in model.named_parameters() if p.requires_grad}
    assert {n: r.factor for n, r in rates.items()} == {
        "lora_A.default.weight": 1.0,
        "lora_B.default.weight": 4.0,
        "lora_B.default.bias": 4.0,
    }
    assert [n for n, r in rates.items() if not r.decay] == ["lora_B.default.bias"]


def test_an_adapter_without_both_sides_is_refused():
    model = get_peft_model(llama(attention_bias=True), BitFitConfig())
    with pytest.raises(ConfigError, match="this adapter has none"):
        attach(model, torch.optim.AdamW(trained(model)), LoraPlus())
    model = get_peft_model(llama(), LoraFAConfig())
    with pytest.raises(ConfigError, match="A does not train here"):
        attach(model, torch.optim.AdamW(trained(model)), LoraPlus())


def test_it_goes_with_other_procedures():
    from deltatune.schedules import ReLora

    model = model_for("relora")
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    schedule = attach(model, optimizer, ReLora(cycle=2, restart_warmup=1, train_rest=False), LoraPlus(4), total_steps=9)
    for step in range(5):
        model(**batches()[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    b = next(p for n, p in model.named_parameters() if "lora_B" in n)
    assert schedule.rate(b).factor == 4.0  # one step after the restart at 4
    assert list(schedule.state_dict()["schedules"]) == ["relora", "lora_plus"]


def test_the_loop_learns_faster_than_with_equal_rates():
    plus = Loop("lora_plus", lr=0.001).run()
    plain = Loop("lora_plus", lr=0.001)
    plain.schedule.schedules["lora_plus"].rates = {}
    assert plus.losses[-1] < plain.run().losses[-1]
