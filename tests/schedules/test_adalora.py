"""AdaLoRA's budget: the card's identities (arXiv 2303.10512)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from deltatune import AdaLoraConfig, ConfigError, PeftModel, get_peft_model
from deltatune.methods.adalora import orthogonality
from deltatune.schedules import attach
from deltatune.schedules._ranks import draw_ranks, table
from deltatune.schedules.adalora import budget
from schedule_runs import STEPS, Loop, batches
from tiny import llama


def alive(loop):
    return sum(int((d.lora_E.weight != 0).sum()) for d in loop.schedule.schedules["adalora"].deltas.values())


def config(**fields):
    options = {"init_r": 4, "target_r": 2, "target_modules": ["q_proj", "v_proj"], **fields}
    return AdaLoraConfig(**options)


def test_the_budget_goes_from_one_end_to_the_other_and_never_up():
    fields = config(total_step=100, tinit=10, tfinal=20)
    values = [budget(fields, t, 96, 48) for t in range(101)]
    assert values[:11] == [96] * 11
    assert values[80:] == [48] * 21
    assert all(a >= b for a, b in pairwise(values))
    assert values[45] == int(48 + 48 * 0.5**3)


def test_as_many_triplets_live_as_the_budget_says():
    loop = Loop("adalora")
    schedule = loop.schedule.schedules["adalora"]
    assert schedule.config.total_step == STEPS  # taken from attach
    for step in range(1, STEPS + 1):
        loop.run(step)
        allowed = budget(schedule.config, step, schedule.first, schedule.last)
        if step % 2 == 0 or step >= STEPS - 2:  # masked at this step
            assert alive(loop) == allowed
    assert alive(loop) == schedule.last == 2 * 8


def test_the_same_triplets_are_masked_in_the_last_phase():
    loop = Loop("adalora").run(STEPS - 2)
    deltas = loop.schedule.schedules["adalora"].deltas
    before = {k: d.lora_E.weight.detach() != 0 for k, d in deltas.items()}
    loop.run()
    for key, d in deltas.items():
        assert torch.equal(before[key], d.lora_E.weight.detach() != 0)


def test_importance_follows_the_formula():
    loop = Loop("adalora").run(1)
    schedule = loop.schedule.schedules["adalora"]
    mean, spread = (t.clone() for t in next(iter(schedule.averages.values())))
    key, delta = next(iter(schedule.deltas.items()))
    seen = {}
    loop.optimizer.register_step_post_hook(lambda *_: seen.update(grad=delta.lora_A.weight.grad.clone()))
    loop.run(2)
    now = (delta.lora_A.weight.detach() * seen["grad"]).abs()
    mean = 0.85 * mean + 0.15 * now
    spread = 0.85 * spread + 0.15 * (now - mean).abs()
    found = schedule.averages[f"{key}/A"]
    assert torch.allclose(found[0], mean)
    assert torch.allclose(found[1], spread)
    pairs = {part: schedule.averages[f"{key}/{part}"] for part in "AEB"}
    s = {part: m * u for part, (m, u) in pairs.items()}
    assert torch.allclose(schedule.scores()[key], s["E"][:, 0] + s["A"].mean(1) + s["B"].mean(0))


def test_the_orthogonality_term_joins_the_loss_by_itself():
    """The step is that of `loss + c · orthogonality`, also with accumulated gradients."""
    by_itself, by_hand = Loop("adalora", optimizer=sgd), Loop("adalora", optimizer=sgd)
    schedule = by_hand.schedule.schedules["adalora"]
    weight, schedule.config.orth_reg_weight = schedule.config.orth_reg_weight, 0.0
    by_itself.run(1, parts=2)
    loss = by_hand.model(**batches()[0]).loss + weight * orthogonality(schedule.deltas.values())
    loss.backward()
    by_hand.optimizer.step()
    for (name, a), b in zip(by_itself.model.named_parameters(), by_hand.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7), name


def sgd(params, lr, **_):
    return torch.optim.SGD(params, lr=lr)


def test_the_finished_adapter_has_dropped_what_is_masked(tmp_path):
    loop = Loop("adalora").run()
    with torch.no_grad():
        before = loop.model.eval()(**batches()[0]).logits
    report = loop.schedule.finish()["adalora"]
    assert sum(report["ranks"].values()) == report["budget"] == 16
    for delta in loop.schedule.schedules["adalora"].deltas.values():
        assert delta.lora_A.weight.shape[0] == report["ranks"][delta.lora_A.key.rpartition(".")[0]]
    loop.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=4, initializer_range=0.1), tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(**batches()[0]).logits, before, atol=1e-5)
    assert loaded.get_nb_trainable_parameters()[1] < loop.model.get_nb_trainable_parameters()[1] + 1


def test_the_heat_map_has_layers_across_and_modules_down(tmp_path):
    ranks = {f"model.layers.{i}.self_attn.{m}": i for i in range(3) for m in ("q_proj", "v_proj")}
    del ranks["model.layers.1.self_attn.v_proj"]
    modules, layers, rows = table(ranks)
    assert (modules, layers) == (["self_attn.q_proj", "self_attn.v_proj"], ["0", "1", "2"])
    assert rows == [[0, 1, 2], [0, None, 2]]
    many = {f"h.{i}.q": i for i in (10, 2, 1)}
    assert table(many)[1:] == (["1", "2", "10"], [[1, 2, 10]])
    path = draw_ranks(ranks, 4, tmp_path / "ranks.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "total", "says"),
    [
        ({}, None, "needs the number of optimiser steps"),
        ({"tinit": 6, "tfinal": 6}, 12, "leave no step of total_step=12"),
        ({"rank_pattern": None, "total_step": 30}, None, ""),
    ],
)
def test_what_cannot_be_planned_is_said(fields, total, says):
    model = get_peft_model(llama(), config(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if not says:  # the configuration knows
        assert attach(model, optimizer, total_steps=total).schedules["adalora"].config.total_step == 30
        return
    with pytest.raises(ConfigError, match=says):
        attach(model, optimizer, total_steps=total)


def test_a_weight_without_a_gradient_is_named():
    loop = Loop("adalora")
    loop.model.base_model.model.model.layers[1].self_attn.q_proj.lora_A.default.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.lora_E has no gradient"):
        loop.run(1)
