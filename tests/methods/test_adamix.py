"""AdaMix: random routing in training, the experts' mean otherwise, and the loss that holds two passes together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deltatune import AdaMixConfig, BottleneckConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError
from deltatune.methods.adamix import consistent_loss, merge_experts
from methods.transformers_zoo import ZOO, inputs, make
from tiny import bert, ids, llama, shake

SMALL = {"reduction_factor": 4}
LABELS = torch.tensor([0, 1, 0])


def parts(model):
    return [part for e in model.adapters.edits["default"] if hasattr(e, "down") for part in (e.down, e.up)]


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name, tmp_path):
    model = get_peft_model(make(name), AdaMixConfig(**SMALL))
    shake(model)
    live = model(**inputs(name)).logits
    live.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(fresh(**inputs(name)).logits, live)


def test_training_draws_one_expert_and_inference_takes_the_mean():
    model = get_peft_model(llama(), AdaMixConfig(**SMALL, share_up=False, layers_to_transform=[1]))
    shake(model)
    (down, up) = parts(model)
    assert tuple(down.weight.weight.shape) == (4, 8, 32)
    assert tuple(up.weight.weight.shape) == (4, 32, 8)
    h = torch.randn(2, 3, 32)
    mean = F.linear(h, down.weight.weight.mean(0), down.bias.weight.mean(0))
    assert torch.equal(down(h), mean)
    model.train()
    singles = [F.linear(h, w, b) for w, b in zip(down.weight.weight, down.bias.weight, strict=True)]
    drawn = [[torch.allclose(out, s, atol=1e-6) for s in singles].index(True) for out in (down(h) for _ in range(60))]
    assert set(drawn) == {0, 1, 2, 3}


def test_merged_experts_are_one_adapter_of_their_mean(tmp_path):
    model = get_peft_model(bert(), AdaMixConfig(**SMALL))
    shake(model)
    before, means = model(input_ids=ids()).logits, [p.weight.weight.detach() for p in parts(model)]
    merge_experts(model)
    for part, w in zip(parts(model), means, strict=True):
        assert torch.equal(part.weight.weight, w.mean(0) if w.ndim == 3 else w)
    assert torch.allclose(model(input_ids=ids()).logits, before, atol=1e-6)
    d, m = 32, 8
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * d * m + m + d)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(bert(), tmp_path)
    assert fresh.peft_config["default"].num_experts == 1
    assert torch.equal(fresh(input_ids=ids()).logits, model(input_ids=ids()).logits)
    with pytest.raises(ConfigError, match="is BOTTLENECK, which has no experts"):
        merge_experts(get_peft_model(bert(), BottleneckConfig(**SMALL)))


def test_one_expert_is_the_plain_adapter():
    options = {**SMALL, "mh_adapter": False, "non_linearity": "gelu"}
    mixed = get_peft_model(llama(), AdaMixConfig(**options, num_experts=1))
    plain = get_peft_model(llama(), BottleneckConfig(**options))
    shake(mixed)
    with torch.no_grad():
        for a, b in zip(plain.adapters.parameters("default"), mixed.adapters.parameters("default"), strict=True):
            a.copy_(b)
    assert torch.equal(mixed.train()(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_the_consistency_is_symmetric_and_zero_for_equal_draws():
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    batch = {"input_ids": ids(), "labels": LABELS}
    model = get_peft_model(bert(**options), AdaMixConfig(**SMALL))
    shake(model, scale=0.5)
    model.train()
    torch.manual_seed(3)
    a, b = model(**batch), model(**batch)
    p, q = a.logits.log_softmax(-1), b.logits.log_softmax(-1)
    wanted = a.loss + 0.5 * ((p.exp() * (p - q)).sum(-1).mean() + (q.exp() * (q - p)).sum(-1).mean())
    assert wanted > a.loss  # the draws differ
    torch.manual_seed(3)
    assert torch.allclose(consistent_loss(model, batch), wanted, atol=1e-6)
    one = get_peft_model(bert(**options), AdaMixConfig(**SMALL, num_experts=1)).train()
    assert torch.allclose(consistent_loss(one, batch), one(**batch).loss, atol=1e-7)
    with pytest.raises(ConfigError, match=r"call model.train\(\)"):
        consistent_loss(model.eval(), batch)


def test_the_consistency_of_a_language_model_counts_trained_tokens_only():
    model = get_peft_model(llama(), AdaMixConfig(**SMALL)).train()
    shake(model, scale=0.5)
    tokens = ids()
    labels = tokens.clone()
    labels[:, :4] = -100
    torch.manual_seed(5)
    a, b = model(input_ids=tokens, labels=labels), model(input_ids=tokens, labels=labels)
    p, q = (out.logits[:, 3:-1].log_softmax(-1) for out in (a, b))
    wanted = a.loss + 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    torch.manual_seed(5)
    assert torch.allclose(consistent_loss(model, {"input_ids": tokens, "labels": labels}), wanted, atol=1e-5)


def test_it_learns():
    torch.manual_seed(0)
    x = torch.randint(2, 60, (16, 6))
    y = (x[:, 0] > 30).long()
    model = get_peft_model(bert(), AdaMixConfig(reduction_factor=2, mh_adapter=True, task_type="SEQ_CLS")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(80):
        loss = consistent_loss(model, {"input_ids": x, "labels": y})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_what_is_refused():
    with pytest.raises(ConfigError, match="num_experts must be a whole number of at least 1, not 0"):
        AdaMixConfig(num_experts=0)
