"""ReLoRA: the card's identities (arXiv 2307.05695)."""

from __future__ import annotations

import math

import pytest
import torch

from deltatune import ConfigError, LoraConfig, get_peft_model
from deltatune.schedules import ReLora, attach
from deltatune.schedules.relora import jagged_cosine
from schedule_runs import STEPS, batches
from tiny import llama


def model_of(**fields):
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], **fields}
    return get_peft_model(llama(initializer_range=0.1), LoraConfig(**options)).train()


def start(model, total=STEPS, optimizer=torch.optim.AdamW, lr=0.02, **options):
    options = {"cycle": 4, "restart_warmup": 2, "train_rest": False, **options}
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    return made, attach(model, made, ReLora(**options), total_steps=total)


def step(model, optimizer, i):
    loss = model(**batches()[i]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def pairs(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def base(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("reset", ["zero", "random", "magnitude"])
def test_a_restart_leaves_the_function_and_begins_anew(reset):
    model = model_of()
    optimizer, schedule = start(model, reset=reset)
    for i in range(4):
        if i == 3:
            schedule.schedules["relora"].restart = lambda number: None  # look before it
        step(model, optimizer, i)
    before, old, base_before = model(**batches()[0]).logits.detach(), pairs(model), base(model)
    steps_before = [int(s["step"]) for s in optimizer.state.values()]
    del schedule.schedules["relora"].restart
    schedule.schedules["relora"].restart(1)
    assert (model(**batches()[0]).logits - before).abs().max() < 1e-5
    for name, p in pairs(model).items():
        if "lora_B" in name:
            assert not p.any()
        else:
            assert not torch.equal(p, old[name])
    moved = [n for n, p in base(model).items() if not torch.equal(p, base_before[n])]
    assert all("q_proj" in n or "up_proj" in n for n in moved)
    assert len(moved) == 4
    share = {"zero": 1.0, "random": 0.999, "magnitude": 0.9}[reset]
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            zeros = float((state[key] == 0).float().mean())
            assert zeros == pytest.approx(share, abs=0.02)
    assert steps_before == [int(s["step"]) for s in optimizer.state.values()]


def test_magnitude_keeps_the_largest():
    model = model_of()
    optimizer, schedule = start(model, reset="magnitude", prune=0.5)
    step(model, optimizer, 0)
    p = next(p for n, p in model.named_parameters() if "lora_B" in n)
    before = optimizer.state[p]["exp_avg"].clone()
    schedule.schedules["relora"].restart(1)
    after = optimizer.state[p]["exp_avg"]
    assert before[after == 0].abs().max() <= after[after != 0].abs().min()


def test_the_rate_is_zero_at_a_restart_and_on_its_course_after_the_warm_up():
    model = model_of()
    optimizer, _ = start(model, lr=1.0, restart_warmup=2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    plain, found = [], []
    optimizer.register_step_pre_hook(lambda o, *_: found.append(o.param_groups[0]["lr"]))
    for i in range(STEPS):
        plain.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer, i)
        scheduler.step()
    assert found[:4] == plain[:4]
    for restart in (4, 8):
        assert found[restart] == 0
        assert found[restart + 1] == pytest.approx(plain[restart + 1] / 2)
        assert found[restart + 2] == plain[restart + 2]


def test_the_papers_jagged_cosine():
    options = ReLora(cycle=20, restart_warmup=5, curve="cosine", first_warmup=10, min_ratio=0.1)
    course = [jagged_cosine(t, 100, t // 20 * 20, options) for t in range(101)]

    def cosine(t):
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 10) / 90))

    assert course[0] == 0
    assert course[5] == 0.5
    assert course[10] == 1
    assert course[19] == pytest.approx(cosine(19))
    assert course[20] == 0
    assert course[23] == pytest.approx(3 / 5 * cosine(25))
    assert course[25] == pytest.approx(cosine(25))
    assert course[99] == pytest.approx(cosine(99))


def test_the_rank_of_the_whole_change_is_above_one_pairs():
    model = model_of()
    weight = model.base_model.model.model.layers[0].mlp.up_proj.weight
    first = weight.detach().clone()
    optimizer, schedule = start(model)
    for i in range(STEPS):
        step(model, optimizer, i)
    schedule.finish()
    assert schedule.report()["relora"] == {"restarts": 2, "max_rank": 6}
    model.merge_adapter()
    change = model.base_model.model.model.layers[0].mlp.up_proj.weight.detach() - first
    rank = int(torch.linalg.matrix_rank(change, atol=1e-5))
    assert 2 < rank <= 6


@pytest.mark.parametrize("reset", ["zero", "random", "magnitude"])
def test_no_moment_is_left_without_the_other(reset):
    """A first moment whose second is gone would move its weight by m / epsilon; the run stays where it was."""
    model = model_of()
    optimizer, _ = start(model, reset=reset)
    for i in range(STEPS):
        step(model, optimizer, i)
        for state in optimizer.state.values():
            assert not (state["exp_avg"][state["exp_avg_sq"] == 0] != 0).any()
    assert max(float(p.abs().max()) for p in pairs(model).values()) < 2


def test_a_model_trains_from_scratch():
    """Embeddings, norms and the head train in full; the first steps train everything."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    before = base(model)
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    attach(model, made, ReLora(cycle=4, restart_warmup=1, warm_start=3), total_steps=STEPS)
    for i in range(3):
        step(model, made, i)
    assert all(not torch.equal(p, before[n]) for n, p in base(model).items())
    assert not any(p.any() for n, p in pairs(model).items() if "lora_B" in n)
    middle = base(model)
    step(model, made, 3)
    step(model, made, 4)
    moved = {n for n, p in base(model).items() if not torch.equal(p, middle[n])}
    assert moved == {n for n in middle if "embed" in n or "norm" in n or "lm_head" in n}
    assert all(p.any() for n, p in pairs(model).items() if "lora_B" in n)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert not any(p in made.state for p in frozen)  # their optimiser state is freed


def test_there_is_no_plain_base_any_more():
    model = model_of()
    optimizer, _ = start(model)
    for i in range(4):
        with model.disable_adapter():
            pass
        step(model, optimizer, i)
    with pytest.raises(ConfigError, match="ReLoRA has changed the base's own weights"), model.disable_adapter():
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cycle": 12}, "leaves no restart in a run of 12 steps; use cycle=3"),
        ({"cycle": 8, "warm_start": 6}, "after warm_start=6 steps leaves no restart"),
        ({"reset": "all"}, "reset must be one of zero, random, magnitude"),
        ({"reset": "zero", "prune": 0.5}, "reset='zero' drops all"),
        ({"prune": 1.5}, r"prune must be a number in \[0, 1\]"),
        ({"first_warmup": 5}, "belongs to curve='cosine'"),
        ({"curve": "jagged"}, "curve must be"),
        ({"curve": "cosine", "total": None}, "needs the number of optimiser steps"),
    ],
)
def test_bad_options(options, says):
    total = options.pop("total", STEPS)
    with pytest.raises(ConfigError, match=says):
        start(model_of(), total=total, **options)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_what_cannot_be_drawn_anew_is_refused(fields):
    with pytest.raises(ConfigError, match="ReLoRA re-draws a plain LoRA"):
        start(model_of(**fields))


def test_8_bit_moments_are_dropped_and_not_pruned():
    bnb = pytest.importorskip("bitsandbytes")
    model = get_peft_model(
        llama(hidden_size=128, intermediate_size=128), LoraConfig(r=64, target_modules=["up_proj"])
    ).train()

    def adam(params, lr):
        return bnb.optim.AdamW8bit(params, lr=lr, min_8bit_size=1024)

    optimizer, _ = start(model, optimizer=adam, reset="magnitude")
    with pytest.raises(ConfigError, match="keeps them in 8 bits: use reset='zero'"):
        step(model, optimizer, 0)
    model = get_peft_model(
        llama(hidden_size=128, intermediate_size=128), LoraConfig(r=64, target_modules=["up_proj"])
    ).train()
    optimizer, _ = start(model, optimizer=adam, reset="zero")
    for i in range(4):
        step(model, optimizer, i)
    assert not optimizer.state
    step(model, optimizer, 4)
    assert optimizer.state


def test_a_bfloat16_base_is_warned_about():
    model = get_peft_model(llama().bfloat16(), LoraConfig(r=2))
    with pytest.warns(UserWarning, match="bfloat16"):
        start(model)


def test_a_tasks_head_is_saved_with_the_base(tmp_path):
    from deltatune import PeftModel
    from tiny import bert, ids

    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="lora_only")
    model = get_peft_model(bert(), config).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    schedule = attach(model, made, ReLora(cycle=2, restart_warmup=1, train_rest=False), total_steps=5)
    head = next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n and p.ndim > 1)
    for _ in range(5):
        model(input_ids=ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
        made.step()
        made.zero_grad()
        assert made.state[head]["exp_avg"].all()  # only the pair's moments are pruned
    schedule.finish()
    schedule.save(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits, atol=1e-6)


def test_restarts_are_counted_as_they_happen():
    model = model_of()
    optimizer, schedule = start(model)
    counts = []
    for i in range(STEPS):
        step(model, optimizer, i)
        counts.append(schedule.run.logs["restarts"])
    assert counts == [0] * 3 + [1] * 4 + [2] * 5
