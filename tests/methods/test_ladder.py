"""Ladder side-tuning: the card's tests; nothing is kept for backward in the base, however deep it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import LadderConfig, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import CannotMergeError, ConfigError
from deltatune.methods.ladder import LadderEdit
from tiny import bert, gpt2, ids, llama, shake, t5

FIELDS = {"reduction_factor": 2}


def edit(model) -> LadderEdit:
    return next(e for e in model.adapters.edits["default"] if isinstance(e, LadderEdit))


def kept_bytes(model, **batch) -> int:
    """Bytes that autograd keeps for backward beside the parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(**batch)
    return sum(s.nbytes() for s in kept.values())


def test_nothing_is_kept_in_the_base():
    """With one rung, what is kept for backward does not depend on the base's depth; a LoRA's grows with it."""
    batch = {"input_ids": ids(), "labels": ids()}
    ladders, loras = [], []
    for depth in (2, 6):
        config = LadderConfig(layers_to_transform=[1], **FIELDS)
        ladders.append(kept_bytes(get_peft_model(llama(num_hidden_layers=depth), config), **batch))
        loras.append(kept_bytes(get_peft_model(llama(num_hidden_layers=depth), LoraConfig(r=1)), **batch))
    assert ladders[0] == ladders[1]
    assert loras[1] > 2 * loras[0]
    assert ladders[1] < loras[1] / 3


@pytest.mark.parametrize("make", [llama, gpt2])
def test_only_the_side_network_learns(make):
    model = get_peft_model(make(), LadderConfig(**FIELDS))
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("ladder" in name and "embed_tokens" not in name
                                                           and "wte" not in name), name  # fmt: skip


def test_gates_are_half_open_at_the_start():
    for rung in edit(get_peft_model(llama(), LadderConfig(**FIELDS))).side.rungs():
        assert torch.sigmoid(rung.alpha / rung.temperature).item() == 0.5


def test_an_identity_ladder_is_the_base():
    """r = 1, D = U = I, the last gate shut to s, and the side network's blocks and norm removed."""
    model = get_peft_model(llama(), LadderConfig(reduction_factor=1))
    side = edit(model).side
    with torch.no_grad():
        side.up.weight.copy_(torch.eye(32))
        side.up.bias.zero_()
        for rung in side.rungs():
            rung.down.weight.copy_(torch.eye(32))
            rung.down.bias.zero_()
            rung.alpha.fill_(-1e4)
            rung.block = Through()
        side.net.norm = nn.Identity()
        assert torch.allclose(model(input_ids=ids()).logits, llama()(input_ids=ids()).logits, atol=1e-5)


class Through(nn.Module):
    """A block that does nothing."""

    def forward(self, s, *args, **kwargs):
        return s


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_residual_starts_as_the_base(make):
    model = get_peft_model(make(), LadderConfig(residual=True, **FIELDS))
    with torch.no_grad():
        base = make()(input_ids=ids()).logits
        assert torch.allclose(model(input_ids=ids()).logits, base, atol=1e-6)
        shake(model)
        assert not torch.allclose(model(input_ids=ids()).logits, base, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids()).logits, base)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_with_a_cache(make, beams):
    model = get_peft_model(make(), LadderConfig(residual=True, task_type="CAUSAL_LM", **FIELDS))
    shake(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams, "min_new_tokens": 5}
    padded = {
        "input_ids": torch.cat([ids(1, 5), ids(1, 5) + 1]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
    }
    plain = model.generate(**padded, use_cache=False, **options)
    assert torch.equal(model.generate(**padded, **options), plain)


def test_files(tmp_path):
    for i, make in enumerate((llama, bert)):
        model = get_peft_model(make(), LadderConfig(layers_to_transform=[1], **FIELDS))
        shake(model)
        model.save_pretrained(tmp_path / str(i))
        for low in (False, True):
            again = PeftModel.from_pretrained(make(), tmp_path / str(i), low_cpu_mem_usage=low)
            with torch.no_grad():
                assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_classifiers_pooler_reads_the_side():
    model = get_peft_model(bert(), LadderConfig(task_type="SEQ_CLS", **FIELDS))
    model.train()
    model(input_ids=ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(s.weight.grad is not None for s in edit(model).slots if "position" not in s.key)


def test_a_16_bit_base():
    model = get_peft_model(llama().to(torch.bfloat16), LadderConfig(**FIELDS))
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (llama, {"reduction_factor": 8}, "does not leave an even number of units for each of 4 heads"),
        (llama, {"reduction_factor": 0}, "reduction_factor must be a whole number"),
        (llama, {"temperature": 0}, "temperature must be positive"),
        (llama, {"target_modules": ["q_proj"]}, "beside the whole stack"),
        (llama, {"layers_to_transform": [2], **FIELDS}, "outside of 2 blocks"),
        (t5, FIELDS, "is an encoder and a decoder"),
    ],
)
def test_bad_values(make, fields, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(make(), LadderConfig(**fields))


def test_merging_is_refused():
    with pytest.raises(CannotMergeError, match="runs a network beside the base"):
        get_peft_model(llama(), LadderConfig(**FIELDS)).merge_adapter()
