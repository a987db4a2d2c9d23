"""Preparing a quantised model: frozen, checkpointed, and no number cast."""

from __future__ import annotations

import pytest
import torch

from deltatune import LoraConfig, get_peft_model, prepare_model_for_kbit_training, quantize_model
from deltatune.errors import ConfigError
from deltatune.stores.nf4_layer import Nf4Linear
from tiny import bert, ids, llama, shake


def test_nothing_is_cast_and_training_goes_through_checkpoints():
    base = llama(hidden_size=64, intermediate_size=128).bfloat16()
    assert len(quantize_model(base)) == 14
    assert type(base.lm_head) is torch.nn.Linear
    types = {n: p.dtype for n, p in base.named_parameters()}
    model = get_peft_model(prepare_model_for_kbit_training(base), LoraConfig(target_modules="all-linear"))
    assert {n: p.dtype for n, p in base.named_parameters() if n in types} == types
    shake(model)
    model.train()
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_mixed_compute_types_are_refused():
    base = llama(hidden_size=64, intermediate_size=128)
    quantize_model(base)
    base.model.layers[1].mlp.up_proj.to(torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"'model.layers.0.self_attn.q_proj' computes in float32 and .*up_proj' in bfl"
    ):
        prepare_model_for_kbit_training(base)


def test_a_model_without_checkpointing():
    with pytest.raises(ConfigError, match="Sequential has no gradient checkpointing; set use_gradient_checkpointing"):
        prepare_model_for_kbit_training(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_native_layers_in_files_and_types(tmp_path):
    import bitsandbytes as bnb

    layer = Nf4Linear.of(torch.nn.Linear(128, 64))
    x = torch.randn(3, 128)
    state = layer.state_dict()
    assert {"weight", "weight.absmax", "weight.nested_absmax", "bias"} <= set(state)
    fresh = Nf4Linear.of(torch.nn.Linear(128, 64))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    read = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.allclose(read, layer.weight, atol=1e-6)
    packed, absmax2 = layer.packed.clone(), layer.absmax2.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.absmax2, absmax2)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16


def test_native_bytes_are_the_formulas():
    from deltatune.train.qlora_memory import LLAMAS, terms

    base = llama(hidden_size=256, intermediate_size=512)
    quantize_model(base)
    layers = [m for m in base.modules() if isinstance(m, Nf4Linear)]
    n = sum(m.in_features * m.out_features for m in layers)
    assert sum(m.packed.nbytes for m in layers) == n // 2
    scales = sum(m.absmax.nbytes + m.absmax2.nbytes + m.offset.nbytes for m in layers)
    assert scales == n // 64 + 4 * n // (64 * 256) + 4 * len(layers)
    total = {name: sum(terms(shape).values()) for name, shape in LLAMAS.items()}
    assert total["65B"] < 48e9
    paged = sum(v for k, v in terms(LLAMAS["7B"]).items() if k != "optimizer")
    assert paged < 6e9
    assert list(total.values()) == sorted(total.values())


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "BertForSequenceClassification"])
def test_the_head_of_a_classifier_stays_trainable(kind):
    import transformers

    model = bert() if kind.startswith("Bert") else transformers.LlamaForSequenceClassification(llama().config)
    done = quantize_model(model)
    assert len(done) > 10
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    head = "classifier" if kind.startswith("Bert") else "score"
    assert not any(path.startswith(head) for path in done)
    assert any(head in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_what_quantize_model_refuses():
    with pytest.raises(ConfigError, match="block must be an even number"):
        quantize_model(llama(), block=7)
    with pytest.raises(ConfigError, match="has no linear layer"):
        quantize_model(torch.nn.Sequential(torch.nn.Tanh()))


@pytest.mark.parametrize("name", ["7B"])  # 65B has passed too, and takes ten seconds
def test_the_formula_counts_what_a_real_llama_has(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltatune.train.qlora_memory import LLAMAS, terms

    shape = LLAMAS[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=shape.hidden,
                intermediate_size=shape.feed_forward,
                num_hidden_layers=shape.blocks,
                num_attention_heads=shape.hidden // 128,
                vocab_size=shape.vocabulary,
            )
        )
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    found = terms(shape, r=64)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
    assert found["codes"] == sum(m.weight.numel() for m in linear) // 2
    assert found["adapter"] == 2 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in model.parameters() if not p.requires_grad) - sum(m.weight.numel() for m in linear)
    assert found["rest"] == 2 * rest


def test_merge_aware_calls_are_recomputed_as_they_were():
    base = llama(hidden_size=64, intermediate_size=128)
    quantize_model(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    shake(model, 0.1)
    model.train()
    model.set_merge_aware()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        out = model(input_ids=ids(), labels=ids())
        grads = torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])
        found.append([out.logits, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model.set_merge_aware(False)
    assert not torch.allclose(model(input_ids=ids()).logits, found[0][0], atol=1e-3)
