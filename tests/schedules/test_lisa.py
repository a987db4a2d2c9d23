"""LISA: the card's identities (arXiv 2403.17919)."""

from __future__ import annotations

import pytest
import torch

from deltatune import ConfigError, FullConfig, LoraConfig, get_peft_model
from deltatune.schedules import Lisa, attach
from schedule_runs import STEPS, Loop, batches, largest_difference, weights
from tiny import llama


def plain(**options):
    return llama(num_hidden_layers=4, initializer_range=0.1, **options).train()


def start(model, total=STEPS, seed=5, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, attach(
        model, optimizer, Lisa(**{"layers": 1, "every": 3, **options}), total_steps=total, seed=seed
    )


def step(model, optimizer, i):
    model(**batches()[i]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_what_is_awake_moves_and_has_state():
    model = plain()
    optimizer, schedule = start(model)
    lisa = schedule.schedules["lisa"]
    drawn = []
    for i in range(STEPS):
        awake, before = set(lisa.awake), weights(model)
        drawn.append(lisa.awake)
        assert len(awake) == 1
        step(model, optimizer, i)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        ends = {n for n in before if "layers" not in n}
        assert moved == ends | {n for path in awake for n in lisa.blocks[path]}
        if (i + 1) % 3:  # the state of the next window's blocks is not there yet
            names = {id(p): n for n, p in model.named_parameters()}
            assert {names[id(p)] for p in optimizer.state} == moved
    assert all(drawn[i] == drawn[i - i % 3] for i in range(STEPS))
    assert len({tuple(d) for d in drawn}) > 1


def test_every_block_is_drawn_equally_often():
    model = plain()
    _, schedule = start(model, total=10_000, layers=2, every=1)
    windows = 2000
    counts = dict.fromkeys(schedule.schedules["lisa"].blocks, 0)
    for window in range(windows):
        drawn = schedule.schedules["lisa"].drawn(window)
        assert len(set(drawn)) == 2
        for path in drawn:
            counts[path] += 1
    sigma = (windows * 0.5 * 0.5) ** 0.5
    assert all(abs(n - windows / 2) < 3 * sigma for n in counts.values()), counts


def test_the_report_has_the_peak_of_the_optimisers_state():
    """Two moments of 4 bytes for the ends and the blocks that are awake, and never more."""
    model = plain()
    optimizer, schedule = start(model)
    lisa = schedule.schedules["lisa"]
    for i in range(8):
        step(model, optimizer, i)
    block = sum(lisa.params[name].numel() for name in next(iter(lisa.blocks.values())))
    everything = sum(p.numel() for p in lisa.params.values())
    told = schedule.report()["lisa"]
    assert told["state_mb"] == 8 * (everything - 3 * block) / 2**20
    assert told["whole_state_mb"] == pytest.approx(8 * everything / 2**20)


def test_all_blocks_awake_is_full_fine_tuning():
    lisa, full = plain(), plain()
    optimizer, _ = start(lisa, layers=4)
    other = torch.optim.AdamW(full.parameters(), lr=0.01)
    for i in range(4):
        step(lisa, optimizer, i)
        step(full, other, i)
    assert largest_difference(weights(lisa), weights(full)) == 0


def test_training_in_place_is_training_the_plain_model():
    loop = Loop("lisa")
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-3)
    schedule = attach(model, optimizer, Lisa.example(), total_steps=STEPS, seed=5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / (2 * STEPS))
    for i in range(STEPS):
        step(model, optimizer, i)
        scheduler.step()
    loop.run()
    wanted = {f"base_model.model.{n}": p for n, p in weights(model).items()}
    assert largest_difference(weights(loop.model), wanted) == 0
    assert schedule.finish()["lisa"] == loop.schedule.finish()["lisa"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_models_change_is_an_adapter(tied, tmp_path):
    from safetensors.torch import load_file

    from deltatune import PeftModel

    model = plain(tie_word_embeddings=tied)
    optimizer, schedule = start(model, every=8)
    for i in range(5):
        step(model, optimizer, i)
    schedule.finish()
    assert schedule.save(tmp_path)
    assert not hasattr(model, "_deltatune")
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len({k.split("layers.")[1].split(".")[0] for k in names if "layers." in k}) == 1  # one block has trained
    x = batches()[0]["input_ids"]
    loaded = PeftModel.from_pretrained(plain(tie_word_embeddings=tied), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=x).logits, model.eval()(input_ids=x).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(input_ids=x).logits, model(input_ids=x).logits)
        merged = loaded.merge_and_unload()
        assert torch.equal(merged(input_ids=x).logits, model(input_ids=x).logits)


def test_in_place_there_is_no_plain_base():
    model = get_peft_model(plain(), FullConfig(in_place=True))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == total == sum(p.numel() for p in plain().parameters())
    with pytest.raises(ConfigError, match="plain base is not here"), model.disable_adapter():
        pass
    with pytest.raises(ConfigError, match="plain base is not here"):
        model.unload()
    part = get_peft_model(plain(), FullConfig(in_place=True, target_modules=["mlp", "lm_head"]))
    assert {n.split(".")[-2] for n, p in part.named_parameters() if p.requires_grad} == {
        "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    layer = get_peft_model(plain(), FullConfig(in_place=True, layers_to_transform=[1]))
    assert all("layers.1." in n for n, p in layer.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="modules_to_save does not go with it"):
        FullConfig(in_place=True, modules_to_save=["lm_head"])


def test_a_round_trip_of_training_in_place(tmp_path):
    from deltatune import PeftModel

    model = get_peft_model(plain(), FullConfig(in_place=True, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer, 0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(), tmp_path)
    x = batches()[0]["input_ids"]
    with torch.no_grad():
        wanted = model.eval()(input_ids=x).logits
        assert torch.equal(loaded(input_ids=x).logits, wanted)
        assert torch.equal(model.merge_and_unload()(input_ids=x).logits, wanted)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 5}, "more than the 4 blocks that there are; use layers=4"),
        ({"layers": 0}, "layers must be a whole number"),
        ({"every": 12}, "draws only once in a run of 12 steps.*use every=1"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ConfigError, match=says):
        start(plain(), **options)


def test_an_adapter_beside_the_base_is_refused():
    with pytest.raises(ConfigError, match="use method FULL with in_place=true"):
        start(get_peft_model(plain(), LoraConfig()))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="numbered blocks"):
        start(torch.nn.Linear(3, 3))


def test_an_optimiser_that_cannot_free_its_state_is_refused():
    model = plain()
    with pytest.raises(ConfigError, match="Adagrad makes its state once"):
        attach(model, torch.optim.Adagrad(model.parameters()), Lisa(1, 3), total_steps=STEPS)
