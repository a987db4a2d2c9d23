"""LoReFT and DiReFT: equations, positions, padding, generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import DiReftConfig, LoReftConfig, get_peft_model
from deltatune.errors import CannotMergeError, ConfigError
from deltatune.methods.reft import HiddenEdit, orthonormal
from tiny import bert, gpt2, ids, llama, shake, t5

KINDS = [LoReftConfig, DiReftConfig]


def edits(model) -> list[HiddenEdit]:
    return [e for e in model.adapters.edits["default"] if isinstance(e, HiddenEdit)]


def hidden(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(output_hidden_states=True, **kwargs).hidden_states[1]


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8))
    config = kind(target_modules=["0"], r=3, prefix_positions=2, suffix_positions=1)
    model = get_peft_model(net, config)
    shake(model)
    x = torch.randn(2, 5, 6)
    (edit,) = edits(model)
    h = nn.functional.linear(x, net[0].weight, net[0].bias)
    wanted = h.clone()
    for name, places in (("", slice(0, 2)), ("suffix_", slice(4, 5))):
        unit = edit.units[name]
        r, w, b = unit.r.weight, unit.w.weight, unit.b.weight
        if kind is LoReftConfig:
            r = orthonormal(r)
            assert torch.allclose(r @ r.mT, torch.eye(3), atol=1e-5)
            wanted[:, places] += (h[:, places] @ w.mT + b - h[:, places] @ r.mT) @ r
        else:
            wanted[:, places] += (h[:, places] @ w.mT + b) @ r
    assert torch.allclose(model(x), wanted, atol=1e-5)


def test_orthonormal_leaves_what_is():
    r = torch.linalg.qr(torch.randn(9, 4)).Q.mT
    assert torch.allclose(orthonormal(r), r, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    """A row in a padded batch, on either side, is edited where it is alone."""
    model = get_peft_model(llama(), kind(prefix_positions=2, suffix_positions=2))
    shake(model)
    row, pad = ids(1, 5), torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=row).logits
        right = model(input_ids=torch.cat([row, pad], 1), attention_mask=torch.tensor([[1] * 5 + [0] * 3])).logits
        left = model(
            input_ids=torch.cat([pad, row], 1),
            attention_mask=torch.tensor([[0] * 3 + [1] * 5]),
            position_ids=torch.tensor([[0] * 3 + list(range(5))]),
        ).logits
    assert torch.allclose(right[:, :5], alone, atol=1e-5)
    assert torch.allclose(left[:, 3:], alone, atol=1e-5)


def test_only_the_positions_change():
    base = hidden(llama(), input_ids=ids())
    model = get_peft_model(llama(), LoReftConfig(layers_to_transform=[0], prefix_positions=2, suffix_positions=1))
    shake(model)
    moved = (hidden(model, input_ids=ids()) != base).any(-1).any(0)
    assert moved.tolist() == [True, True, False, False, False, False, True]
    short = ids(2, 2)
    assert torch.isfinite(hidden(model, input_ids=short)).all()


def test_a_short_input_is_edited_once():
    model = get_peft_model(llama(), LoReftConfig(prefix_positions=3, suffix_positions=3))
    shake(model)
    only = get_peft_model(llama(), LoReftConfig(prefix_positions=3))
    with torch.no_grad():
        for a, b in zip(edits(only), edits(model), strict=True):
            for slot, other in zip(a.slots, b.slots, strict=False):
                slot.weight.copy_(other.weight)
        assert torch.equal(model(input_ids=ids(2, 3)).logits, only(input_ids=ids(2, 3)).logits)


def test_tied_weights_and_counts():
    for kind in KINDS:
        one = 2 * (2 * 4 * 32 + 4)  # two blocks, R, W and b
        both = get_peft_model(llama(), kind(prefix_positions=1, suffix_positions=1))
        tied = get_peft_model(llama(), kind(prefix_positions=1, suffix_positions=1, tied_weights=True))
        assert both.get_nb_trainable_parameters()[0] == 2 * one
        assert tied.get_nb_trainable_parameters()[0] == one


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_edits_the_prompt(make):
    """With the cache, as the whole sequence gives it when only the prompt is edited."""
    model = get_peft_model(make(), LoReftConfig(prefix_positions=1, suffix_positions=2, task_type="CAUSAL_LM"))
    shake(model, scale=0.5)
    prompt = ids(2, 5)
    made = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, min_new_tokens=4)
    labels = made.clone()
    labels[:, :5] = -100  # training sees the same prompt
    with torch.no_grad():
        logits = model(input_ids=made, labels=labels).logits
    assert torch.equal(logits[:, 4:-1, :63].argmax(-1), made[:, 5:])
    with torch.no_grad():  # without labels the end of the whole sequence is edited
        assert not torch.allclose(model(input_ids=made).logits, logits, atol=1e-4)


def test_generation_of_padded_rows():
    model = get_peft_model(llama(), LoReftConfig(prefix_positions=1, suffix_positions=1, task_type="CAUSAL_LM"))
    shake(model, scale=0.5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 4}
    rows = [ids(1, 3), ids(1, 5)]
    alone = [model.generate(input_ids=row, **options)[:, row.shape[1] :] for row in rows]
    batch = torch.cat([torch.nn.functional.pad(row, (5 - row.shape[1], 0)) for row in rows])
    both = model.generate(input_ids=batch, attention_mask=(batch != 0).long(), **options)[:, 5:]
    assert torch.equal(both, torch.cat(alone))


def test_mixed_batch_of_padded_rows():
    model = get_peft_model(llama(), LoReftConfig(prefix_positions=1, suffix_positions=1), adapter_name="one")
    model.add_adapter("two", DiReftConfig(prefix_positions=2))
    shake(model)
    batch = {
        "input_ids": ids(4, 6),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6, [1] * 5 + [0], [1] * 6]),
    }
    names = ["one", "two", "two", "__base__"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for i, name in enumerate(names[:3]):
            model.set_adapter(name)
            real = batch["attention_mask"][i].bool()
            assert torch.allclose(mixed[i][real], model(**batch).logits[i][real], atol=1e-5)


@pytest.mark.parametrize("make", [bert, t5])
def test_encoders_and_decoders_learn(make):
    task = "SEQ_CLS" if make is bert else "SEQ_2_SEQ_LM"
    model = get_peft_model(make(), LoReftConfig(task_type=task, prefix_positions=1, suffix_positions=1))
    model.activation_checkpointing_enable()
    model.train()
    labels = torch.tensor([0, 1, 1]) if make is bert else ids()
    model(input_ids=ids(), labels=labels).loss.backward()
    assert len(edits(model)) == (2 if make is bert else 4)
    assert all(s.weight.grad is not None for e in edits(model) for s in e.slots)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix_positions": 0}, "are both 0, so no hidden state"),
        ({"suffix_positions": -1}, "must be a number of tokens"),
        ({"r": 0}, "r must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoReftConfig(**fields)


def test_refusals():
    model = get_peft_model(llama(), LoReftConfig())
    with pytest.raises(CannotMergeError, match="changes hidden states at some positions"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="is a convolution, whose output is no sequence"):
        get_peft_model(nn.Sequential(nn.Conv1d(3, 4, 1)), LoReftConfig(target_modules=["0"]))
