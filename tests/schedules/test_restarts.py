"""PeriodicLoRA, Chain of LoRA, Delta-LoRA: the cards' identities."""

from __future__ import annotations

import pytest
import torch

from deltatune import ConfigError, LoraConfig, PeftModel, get_peft_model
from deltatune.schedules import Cola, DeltaLora, PeriodicLora, attach
from deltatune.schedules._restart import course
from schedule_runs import STEPS, batches, largest_difference, weights
from tiny import llama

S, PATH = 2.0, "base_model.model.model.layers.0.mlp.up_proj"


def model_of(**fields):
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], **fields}
    return get_peft_model(llama(initializer_range=0.1), LoraConfig(**options)).train()


def start(model, *procedures, total=STEPS, optimizer=torch.optim.AdamW, lr=0.02):
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    return made, attach(model, made, *procedures, total_steps=total) if procedures else None


def step(model, optimizer, i):
    model(**batches()[i]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model):
    with torch.no_grad():
        return model(**batches()[0]).logits


def pair(model):
    layer = model.get_submodule(PATH)
    return layer.lora_A.default.weight.detach().clone(), layer.lora_B.default.weight.detach().clone()


def base_weight(model):
    return model.get_submodule(PATH).weight.detach().clone()


def total_change(model, first):
    model.merge_adapter()
    return base_weight(model) - first


def rank(change):
    return int(torch.linalg.matrix_rank(change, atol=1e-5))


def halfway(model, procedure, steps=4):
    """A run just before the end of its first stage, and its schedule."""
    optimizer, attached = start(model, procedure)
    schedule = attached.schedules[procedure.name]
    act = "tie" if procedure.name == "cola" else "unload"
    setattr(schedule, act, lambda number: None)
    for i in range(steps):
        step(model, optimizer, i)
    delattr(schedule, act)
    return optimizer, schedule


# ---------------------------------------------------------------------- PeriodicLoRA
@pytest.mark.parametrize(("m", "keeps"), [(1.0, "function"), (1.0, "momentum"), (0.3, "function"), (0.3, "momentum")])
def test_an_unloading_moves_the_function_by_the_formula(m, keeps):
    model = model_of()
    optimizer, schedule = halfway(model, PeriodicLora(stage=4, unload=m, keeps=keeps))
    before, (a, b), weight = logits(model), pair(model), base_weight(model)
    assert optimizer.state
    schedule.unload(1)
    assert not optimizer.state
    new_a, new_b = pair(model)
    now = base_weight(model)
    assert torch.allclose(now, weight + m * S * b @ a, atol=1e-6)
    jump = (now + S * new_b @ new_a) - (weight + S * b @ a)
    wanted = -m * (1 - m) * S * b @ a if keeps == "momentum" else torch.zeros_like(jump)
    assert torch.allclose(jump, wanted, atol=1e-6)
    if m == 1:
        assert not new_b.any()
        assert new_a.abs().min() > 0  # a pair of zeros would never train again
        assert not torch.equal(new_a, a)
    if m == 1 or keeps == "function":
        assert (logits(model) - before).abs().max() < 1e-5
    else:
        assert (logits(model) - before).abs().max() > 1e-3


def test_the_rank_of_all_stages():
    model = model_of()
    first = base_weight(model)
    optimizer, schedule = start(model, PeriodicLora(stage=4, curve="given"))
    for i in range(STEPS):
        step(model, optimizer, i)
    assert schedule.finish()["periodic_lora"] == {"unloadings": 2, "max_rank": 6}
    assert 2 < rank(total_change(model, first)) <= 6


def test_every_stage_has_a_whole_course():
    model = model_of()
    optimizer, schedule = start(model, PeriodicLora(stage=4, warmup=1))
    p = next(p for p in model.parameters() if p.requires_grad)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(schedule.rate(p).factor))
    for i in range(8):
        step(model, optimizer, i)
    assert found == pytest.approx([0.5, 1, 2 / 3, 1 / 3] * 2)
    assert course(3, 6, "cosine", 0) == pytest.approx(0.5)
    assert course(5, 6, "given", 2) == 1


# ---------------------------------------------------------------------- Chain of LoRA
def test_tying_leaves_the_function_and_begins_anew():
    model = model_of()
    optimizer, schedule = halfway(model, Cola(links=3))
    before, (a, b) = logits(model), pair(model)
    schedule.tie(1)
    new_a, new_b = pair(model)
    assert (logits(model) - before).abs().max() < 1e-5
    assert not new_b.any()
    assert not torch.equal(new_a, a)
    assert b.any()
    assert not optimizer.state


@pytest.mark.parametrize("ranks", [None, [2, 2, 1]])
def test_the_final_merge_is_the_sum_of_the_links(ranks):
    model = model_of()
    first = base_weight(model)
    optimizer, attached = start(model, Cola(links=3, ranks=ranks, curve="given"))
    schedule = attached.schedules["cola"]
    for i in range(STEPS):
        step(model, optimizer, i)
    assert attached.finish()["cola"] == {"links": 3, "max_rank": 6 if ranks is None else 5}
    links = [next(v for k, v in link.items() if "layers.0.mlp.up_proj" in k) for link in schedule.tied]
    links.append(pair(model))
    assert all(b.any() for _, b in links)
    stacked = S * torch.cat([b for _, b in links], 1) @ torch.cat([a for a, _ in links], 0)
    change = total_change(model, first)
    assert torch.allclose(change, stacked, atol=1e-5)
    assert change.abs().max() > 0.01
    assert 2 < rank(change) <= (6 if ranks is None else 5)
    if ranks:
        assert not links[2][0][1:].any()
        assert not links[2][1][:, 1:].any()


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}, {"bias": "all"}])
@pytest.mark.parametrize("ranks", [None, [2, 2, 1]])
def test_a_chain_is_saved_as_one_lora_of_the_summed_rank(ranks, fields, tmp_path):
    model = model_of(**fields)
    optimizer, attached = start(model, Cola(links=3, ranks=ranks))
    for i in range(STEPS):
        step(model, optimizer, i)
    attached.finish()
    assert attached.save(tmp_path)
    saved = LoraConfig.from_pretrained(tmp_path)
    assert (str(saved.peft_type), saved.r) == ("LORA", 6 if ranks is None else 5)
    loaded = PeftModel.from_pretrained(model_of().unload(), tmp_path)
    x = batches()[0]["input_ids"]
    with torch.no_grad():
        wanted = model.eval()(input_ids=x).logits
        assert torch.allclose(loaded(input_ids=x).logits, wanted, atol=1e-5)
        with loaded.disable_adapter():
            assert (loaded(input_ids=x).logits - wanted).abs().max() > 0.01


def test_a_chain_of_one_is_lora():
    one, plain = model_of(), model_of()
    chained, schedule = start(one, Cola(links=1, curve="given"))
    alone, _ = start(plain)
    for i in range(STEPS):
        step(one, chained, i)
        step(plain, alone, i)
    assert largest_difference(weights(one), weights(plain)) == 0
    assert not schedule.save("nowhere")  # the adapter's own saving does


# ---------------------------------------------------------------------- Delta-LoRA
@pytest.mark.parametrize("after", [0, 4])
def test_the_whole_change_has_the_closed_form(after):
    """(1 + λ) s B_T A_T - λ s B_K A_K."""
    model = model_of()
    first = base_weight(model)
    optimizer, schedule = start(model, DeltaLora(ratio=2.0, after=after))
    kept = torch.zeros_like(first)
    for i in range(STEPS):
        step(model, optimizer, i)
        if i + 1 <= after:
            assert torch.equal(base_weight(model), first)
        if i + 1 == after:
            a, b = pair(model)
            kept = S * b @ a
    a, b = pair(model)
    assert schedule.finish()["delta_lora"] == {"moves": STEPS - after, "max_rank": 4 if after else 2}
    change = total_change(model, first)
    assert torch.allclose(change, 3 * S * b @ a - 2 * kept, atol=1e-5)
    assert rank(change) <= (4 if after else 2)
    assert rank(change) > (2 if after else 1)


def test_before_its_first_move_it_is_lora_and_w_has_no_optimiser_state():
    moved, plain = model_of(), model_of()
    optimizer, _ = start(moved, DeltaLora(after=5))
    alone, _ = start(plain)
    for i in range(5):
        step(moved, optimizer, i)
        step(plain, alone, i)
    assert largest_difference(weights(moved), weights(plain)) == 0
    step(moved, optimizer, 5)
    weight = moved.get_submodule(PATH).weight
    assert not torch.equal(weight, plain.get_submodule(PATH).weight)
    assert weight not in optimizer.state
    assert weight.grad is None
    assert not any(weight is p for g in optimizer.param_groups for p in g["params"])


# ---------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PeriodicLora(stage=12), "stage=12 leaves no unloading in a run of 12 steps; use stage=3"),
        (lambda: PeriodicLora(stage=4, unload=0), "unload=0 would leave the base as it is"),
        (lambda: PeriodicLora(stage=4, warmup=4), "warmup=4 fills the whole stage=4"),
        (lambda: PeriodicLora(keeps="both"), "keeps must be 'function' or 'momentum'"),
        (lambda: PeriodicLora(curve="flat"), "curve must be 'given', 'linear' or 'cosine'"),
        (lambda: Cola(links=20), "links=20 leaves 0 of 12 steps for a link.*use links=6"),
        (lambda: Cola(links=3, warmup=4), "links=3 leaves 4 of 12 steps for a link.*use links=1"),
        (lambda: Cola(links=2, ranks=[2]), "ranks has 1 values for links=2"),
        (lambda: Cola(links=2, ranks=[1, 2]), "rises along the chain"),
        (lambda: Cola(links=2, ranks=[4, 2]), "goes above the adapter's r=2"),
        (lambda: DeltaLora(after=12), "after=12 steps leave the base as it is in a run of 12 steps; use after=2"),
        (lambda: DeltaLora(ratio=0), "ratio=0 would leave the base as it is"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ConfigError, match=says):
        start(model_of(), make())


def test_cola_needs_to_know_the_length_of_the_run():
    with pytest.raises(ConfigError, match="needs the number of optimiser steps"):
        start(model_of(), Cola(), total=None)


@pytest.mark.parametrize(
    ("procedure", "fields", "says"),
    [
        (PeriodicLora(stage=4), {"init_lora_weights": "pissa"}, "PeriodicLoRA re-draws a plain LoRA"),
        (Cola(), {"use_dora": True}, "COLA re-draws a plain LoRA"),
        (DeltaLora(after=3), {"lora_dropout": 0.1}, "no dropout in front of A.*set lora_dropout=0"),
    ],
)
def test_adapters_that_do_not_go_with_it(procedure, fields, says):
    with pytest.raises(ConfigError, match=says):
        start(model_of(**fields), procedure)


@pytest.mark.parametrize("procedure", [PeriodicLora(stage=4), Cola(), DeltaLora(after=3)])
def test_a_weight_that_another_module_shares(procedure):
    base = llama(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="lm_head and model.embed_tokens share that weight"):
        start(get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"])), procedure)


@pytest.mark.parametrize("procedure", [PeriodicLora(stage=4), Cola(), DeltaLora(after=3)])
def test_a_base_of_few_bits(procedure):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="bfloat16"):
        start(get_peft_model(llama().bfloat16(), LoraConfig(r=2)), procedure)
    with pytest.raises(ConfigError, match="float16 overflows and rounds"):
        start(get_peft_model(llama().half(), LoraConfig(r=2)), procedure)
