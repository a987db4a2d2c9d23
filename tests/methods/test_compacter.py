"""Compacter's cards, MAD-X's invertible adapters and AdapterDrop."""

from __future__ import annotations

import pytest
import torch

from deltatune import CompacterConfig, CompacterPlusPlusConfig, HoulsbyConfig, LoraConfig, PeftModel, PfeifferConfig
from deltatune import get_peft_model as wrap
from deltatune.errors import ConfigError
from deltatune.schedules import AdapterDrop, attach
from methods.transformers_zoo import ZOO, inputs, make
from tiny import bert, ids, llama, shake

OPTIONS = {"reduction_factor": 4, "phm_dim": 2}


def test_the_sum_equals_explicit_kronecker_products():
    model = wrap(bert(), CompacterConfig(**OPTIONS))
    shake(model)
    edit = next(e for e in model.adapters.edits["default"] if hasattr(e, "down"))
    rule, left, right = edit.down.rule.weight, edit.down.left.weight, edit.down.right.weight
    wanted = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(2))
    assert torch.allclose(edit.down.matrix(), wanted, atol=1e-5)


def test_counts_and_one_rule_for_all():
    model = wrap(bert(), CompacterPlusPlusConfig(**OPTIONS, train_layer_norms=False))
    d, m, n, layers = 32, 8, 2, 2
    assert model.get_nb_trainable_parameters()[0] == layers * 3 * (d + m) + n**3
    maps = [e for e in model.adapters.edits["default"] if hasattr(e, "down")]
    assert len({id(e.down.rule.weight) for e in maps} | {id(e.up.rule.weight) for e in maps}) == 1
    own = wrap(bert(), CompacterPlusPlusConfig(**OPTIONS, train_layer_norms=False, shared_phm_rule=False))
    assert own.get_nb_trainable_parameters()[0] == layers * (3 * (d + m) + 2 * n**3)


def test_the_rule_gathers_the_gradients_of_all_maps():
    model = wrap(bert(), CompacterPlusPlusConfig(**OPTIONS, train_layer_norms=False))
    shake(model)
    (rule,) = [p for n, p in model.named_parameters() if "phm_rule" in n]
    loss = model(input_ids=ids()).logits.square().sum()
    (whole,) = torch.autograd.grad(loss, rule)
    edits = [e for e in model.adapters.edits["default"] if hasattr(e, "down")]
    parts = []
    for chosen in [m for e in edits for m in (e.down, e.up)]:
        matrices = {m: m.matrix().detach() for e in edits for m in (e.down, e.up) if m is not chosen}
        for m, w in matrices.items():
            m.matrix = lambda w=w: w
        parts.append(torch.autograd.grad(model(input_ids=ids()).logits.square().sum(), rule)[0])
        for m in matrices:
            del m.matrix
    assert torch.allclose(sum(parts), whole, rtol=1e-3, atol=1e-4)


def test_it_starts_near_the_base_and_n_must_divide():
    model = wrap(bert(), CompacterConfig(**OPTIONS))
    with model.disable_adapter():
        base = model(input_ids=ids()).logits
    assert torch.allclose(model(input_ids=ids()).logits, base, atol=1e-2)
    with pytest.raises(ConfigError, match="phm_dim=3 does not divide 32"):
        wrap(bert(), CompacterConfig(reduction_factor=4, phm_dim=3))


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name, tmp_path):
    model = wrap(make(name), CompacterConfig(**OPTIONS))
    shake(model)
    live = model(**inputs(name)).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(name), tmp_path)(**inputs(name)).logits, live)


# ---------------------------------------------------------------------- invertible adapters
@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_an_invertible_adapter_is_undone(kind, tmp_path):
    options = {"reduction_factor": 4, "inv_adapter": kind}
    model = wrap(llama(), PfeifferConfig(**options, leave_out=[0]))
    shake(model)
    edit = next(e for e in model.adapters.edits["default"] if hasattr(e, "undo"))
    x = torch.randn(3, 32)
    assert not torch.allclose(edit.do(x), x, atol=1e-2)
    assert torch.allclose(edit.undo(edit.do(x)), x, atol=1e-5)
    live = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(input_ids=ids()).logits, live)
    head, body = model.get_base_model().lm_head, model.get_base_model().model
    hidden = body(input_ids=ids()).last_hidden_state
    assert torch.allclose(torch.nn.functional.linear(edit.undo(hidden), head.weight), live, atol=1e-5)
    with pytest.raises(ConfigError, match='inv_adapter must be "nice" or "glow"'):
        PfeifferConfig(inv_adapter="rnn")


def test_bert_is_mapped_behind_its_embeddings_norm():
    model = wrap(bert(), PfeifferConfig(reduction_factor=4, inv_adapter="nice"))
    assert {n.split(".invertible")[0] for n, _ in model.named_parameters() if "invertible" in n} == {
        "base_model.model.bert.embeddings"
    }


# ---------------------------------------------------------------------- AdapterDrop
@pytest.mark.parametrize(
    "config", [PfeifferConfig(reduction_factor=4), LoraConfig(r=4), HoulsbyConfig(reduction_factor=4)]
)
def test_layers_are_dropped(config):
    model = wrap(llama(), config)
    shake(model)
    full = model(input_ids=ids(), output_hidden_states=True)
    with model.disable_adapter():
        base = model(input_ids=ids(), output_hidden_states=True)
    with model.drop_layers(0):
        assert torch.equal(model(input_ids=ids()).logits, full.logits)
    with model.drop_layers(1):
        one = model(input_ids=ids(), output_hidden_states=True)
    assert torch.equal(one.hidden_states[1], base.hidden_states[1])  # the lower layer is the base's, bit for bit
    assert not torch.allclose(one.logits, base.logits, atol=1e-3)
    assert torch.equal(model(input_ids=ids()).logits, full.logits)
    with model.drop_layers(2), torch.no_grad():
        last = model(input_ids=ids()).logits
    if not isinstance(config, HoulsbyConfig):  # its final norm lies above all layers
        assert torch.equal(last, base.logits)


def test_no_gradient_below_the_first_adapter():
    model = wrap(llama(), PfeifferConfig(reduction_factor=4))
    shake(model)
    with model.drop_layers(1):
        out = model(input_ids=ids(), output_hidden_states=True)
    assert not out.hidden_states[1].requires_grad
    out.logits.sum().backward()
    below = [p for n, p in model.named_parameters() if "layers.0" in n and p.requires_grad]
    assert below
    assert all(p.grad is None for p in below)
    mixed = model(input_ids=ids(), adapter_names=["default", "__base__", "default"]).logits
    with model.drop_layers(1):
        dropped = model(input_ids=ids(), adapter_names=["default", "__base__", "default"]).logits
    assert torch.equal(mixed[1], dropped[1])
    assert not torch.allclose(mixed[0], dropped[0], atol=1e-3)


def test_training_drops_layers_by_chance():
    model = wrap(llama(num_hidden_layers=6), PfeifferConfig(reduction_factor=8))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attached = attach(model, optimizer, AdapterDrop(), total_steps=600)
    seen = []
    for _ in range(600):
        seen.append(model.adapters.plan.dropped)
        optimizer.step()
    attached.finish()
    counts = torch.bincount(torch.tensor(seen), minlength=6).float()
    assert model.adapters.plan.dropped == 0
    assert set(seen) == set(range(6))
    assert ((counts - 100).abs() < 3 * (600 * 1 / 6 * 5 / 6) ** 0.5 + 5).all()
    with pytest.raises(ConfigError, match="leaves out 9 layers, and the adapter is in 6"):
        attach(
            model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), AdapterDrop(layers=9)
        )
