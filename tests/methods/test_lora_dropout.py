"""LoRA Dropout: what the laws do not cover (arXiv 2404.09610)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import CannotMergeError, ConfigError, LoraConfig, LoraDropoutConfig, PeftModel, get_peft_model
from deltatune.core.weights import WeightRef
from deltatune.methods.adalora import AdaLoraDelta
from deltatune.methods.lora_dropout import RowColumnDropout
from tiny import ids, llama, shake


def adapted(config=LoraDropoutConfig, **fields):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    model = get_peft_model(llama(), config(**options))
    shake(model)
    return model


def deltas(model):
    return [d for d in model.adapters.deltas("default") if isinstance(d, RowColumnDropout)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("training", [True, False])
def test_without_masks_it_is_lora(training):
    model, plain = adapted(mask_dropout=0.0), adapted(LoraConfig)
    model.train(training)
    plain.train(training)
    assert torch.equal(logits(model), logits(plain))


def test_outside_training_there_are_no_masks():
    model, plain = adapted(mask_dropout=0.9), adapted(LoraConfig)
    assert torch.equal(logits(model), logits(plain))
    model.train()
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)


@pytest.mark.parametrize("rescale", [False, True])
def test_masks_take_whole_rows_and_columns_and_never_ranks(rescale):
    delta = deltas(adapted(mask_dropout=0.5, rescale=rescale).train())[0]
    full_a, full_b = delta.inner.factors()
    a, b = delta.factors()
    columns, rows = (a != 0).any(0), (b != 0).any(1)
    assert 0 < columns.sum() < len(columns)
    assert 0 < rows.sum() < len(rows)
    kept = 2.0 if rescale else 1.0
    assert torch.equal(a, full_a * columns * kept)
    assert torch.equal(b, full_b * rows[:, None] * kept)
    change = b @ a
    assert torch.equal(change != 0, rows[:, None] & columns)
    assert torch.linalg.matrix_rank(change) <= 4


def test_expected_sparsity_is_2p_minus_p_squared():
    p, n = 0.3, 400
    ref = WeightRef(nn.Linear(60, 50))
    delta = RowColumnDropout(AdaLoraDelta(ref, 2, 2, 2.0, 0.0, zero=False), p)
    delta.host = ref.module.train()
    zeros = torch.stack([(delta.factors()[1] @ delta.factors()[0] == 0).double().mean() for _ in range(n)])
    # an entry survives if its row and its column do; draws of one change are not independent
    wanted, sigma = 2 * p - p * p, float(zeros.std()) / n**0.5
    assert abs(float(zeros.mean()) - wanted) < 3 * sigma


def test_the_triplets_of_adalora_lose_no_singular_value():
    torch.manual_seed(3)
    ref = WeightRef(nn.Linear(30, 20))
    inner = AdaLoraDelta(ref, 3, 3, 2.0, 0.0, zero=False)
    delta = RowColumnDropout(inner, 0.5)
    delta.place(ref.module.train(), ref.module, "", "default")
    a, b = delta.factors()
    assert (a != 0).any(1).all()  # every triplet keeps some input
    assert (b != 0).any(0).all()


def test_every_call_draws_anew_and_every_site_its_own():
    model = adapted(mask_dropout=0.5).train()
    assert not torch.equal(logits(model), logits(model))
    one, two = deltas(model)[0].factors()[0], deltas(model)[2].factors()[0]
    assert not torch.equal(one != 0, two != 0)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_starts_as_the_base_under_any_mask(p):
    model = get_peft_model(llama(), LoraDropoutConfig(mask_dropout=p, target_modules=["q_proj"])).train()
    for _ in range(3):
        assert torch.equal(logits(model), logits(llama()))


def test_merging_in_training_mode_has_no_masks():
    model = adapted(mask_dropout=0.9)
    wanted = logits(model)
    model.train()
    model.merge_adapter()
    assert model.training
    assert torch.allclose(logits(model), wanted, atol=1e-5)


def test_ensemble_is_the_mean_of_its_draws_and_settles():
    single = adapted(mask_dropout=0.3, ensemble_seed=None).train()
    torch.manual_seed(0)
    draws = torch.stack([logits(single) for _ in range(3)])
    model = adapted(mask_dropout=0.3, ensemble=3, ensemble_seed=None)
    torch.manual_seed(0)
    assert torch.allclose(logits(model), draws.mean(0), atol=1e-6)
    spread = []
    for n in (2, 32):
        ensemble = adapted(mask_dropout=0.3, ensemble=n, ensemble_seed=None)
        spread.append((logits(ensemble) - logits(ensemble)).std())
    assert spread[1] < spread[0] / 2  # 1 / sqrt(16), with room


def test_a_seeded_ensemble_repeats_and_leaves_the_generator_alone():
    model = adapted(ensemble=3)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(torch.rand(3), wanted)
    assert not torch.equal(logits(model), logits(adapted(ensemble=3, ensemble_seed=1)))
    assert torch.equal(model.base_model(input_ids=ids()).logits, logits(model))


def test_training_loss_is_the_mean_over_draws():
    model = adapted(mask_dropout=0.5, train_samples=3).train()
    torch.manual_seed(0)
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    plain = adapted(mask_dropout=0.5).train()
    torch.manual_seed(0)
    singles = torch.stack([plain(input_ids=ids(), labels=ids()).loss for _ in range(3)])
    assert torch.allclose(loss, singles.mean())
    singles.mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)
    model.merge_adapter()  # draws in training are no matter for merging


def test_an_ensemble_cannot_merge_nor_share_a_cache_nor_split_its_batch(tmp_path):
    model = adapted(ensemble=2)
    with pytest.raises(CannotMergeError, match="mean of several runs"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="use_cache=False"):
        model.generate(input_ids=ids(), max_new_tokens=2)
    assert model.generate(input_ids=ids(), max_new_tokens=2, do_sample=False, use_cache=False).shape == (3, 9)
    with pytest.raises(ValueError, match="one by one"):
        model(input_ids=ids(), adapter_names=["default", "__base__", "default"])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    assert type(model.unload()).forward is type(llama()).forward


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_dropout": 1.0}, "mask_dropout must be in"),
        ({"ensemble": 0}, "ensemble must be"),
        ({"train_samples": 1.5}, "train_samples must be"),
        ({"use_dora": True}, "use_dora does not go with"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        adapted(**fields)
