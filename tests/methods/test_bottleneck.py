"""Bottleneck adapters: the papers' equations, their places in every architecture, and what is refused."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltatune import (
    BottleneckConfig,
    HoulsbyConfig,
    LoraConfig,
    ParallelConfig,
    PeftModel,
    PfeifferConfig,
    get_peft_model,
)
from deltatune.core.sublayers import find_sublayers
from deltatune.errors import CannotMergeError, ConfigError, TargetError
from methods.transformers_zoo import ZOO, inputs, make
from tiny import bert, ids, llama, shake

CONFIGS = {
    "houlsby": HoulsbyConfig,
    "pfeiffer": PfeifferConfig,
    "parallel": ParallelConfig,
    "parallel_both": partial(ParallelConfig, mh_adapter=True, cross_adapter=True),
    "both_sums": partial(PfeifferConfig, mh_adapter=True, cross_adapter=True, residual_before_ln=False),
}


def logits(model: nn.Module, name: str) -> torch.Tensor:
    return model(**inputs(name)).logits


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture(name, kind, tmp_path):
    if kind == "both_sums" and name == "gpt_neox":
        pytest.skip("adds attention and feed-forward to the residual together")
    model = get_peft_model(make(name), CONFIGS[kind](reduction_factor=2 if "both" in kind else 8))
    shake(model)
    live = logits(model, name)
    assert not torch.allclose(live, logits(make(name), name), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(make(name), name))
    live.square().sum().backward()
    for parameter, p in model.named_parameters():
        dead = "deberta" in name and "rel_embeddings" in parameter
        assert not p.requires_grad or dead or (p.grad is not None and p.grad.abs().sum() > 0), parameter
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(make(name), tmp_path)
    assert fresh.load_report.clean
    assert torch.equal(logits(fresh, name), live)


@pytest.mark.parametrize("name", ZOO)
def test_rows_of_a_batch_have_their_own(name):
    model = get_peft_model(make(name), PfeifferConfig(reduction_factor=8))
    model.add_adapter("other", ParallelConfig(reduction_factor=8))
    shake(model)
    first, second = logits(model, name)[:1], None
    model.set_adapter("other")
    second = logits(model, name)[1:]
    mixed = model(**inputs(name), adapter_names=["default", "other"]).logits
    assert torch.allclose(mixed, torch.cat([first, second]), atol=1e-4)


def test_the_sublayers_of_pre_and_post_norm():
    found = {(s.kind, s.output, s.reads, s.norm) for s in find_sublayers(make("bart")) if s.block.index == 0}
    decoder = "model.decoder.layers.0"
    assert (
        "cross",
        f"{decoder}.encoder_attn.out_proj",
        f"{decoder}.encoder_attn",
        f"{decoder}.encoder_attn_layer_norm",
    ) in found
    assert ("feedforward", f"{decoder}.fc2", f"{decoder}.fc1", f"{decoder}.final_layer_norm") in found
    for name in ("llama", "gpt2", "gpt_neox", "bloom", "opt", "t5", "whisper", "vit", "mixtral", "gemma"):
        assert all(s.norm is None for s in find_sublayers(make(name))), name
    for name in ("bert", "roberta", "deberta", "bart"):
        assert all(s.norm is not None for s in find_sublayers(make(name))), name


def block_of(p: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    inner = F.relu(F.linear(h, p["down.weight"], p["down.bias"]))
    return F.linear(inner, p["up.weight"], p["up.bias"])


def tensors_at(model: nn.Module, path: str) -> dict[str, torch.Tensor]:
    start = f"base_model.model.{path}.bottleneck_"
    return {
        n.removeprefix(start).replace(".default", ""): p for n, p in model.named_parameters() if n.startswith(start)
    }


def test_pfeiffer_behind_a_post_norm_layer():
    """out = LN(Ad(LN(f + x1)) + f + x1), against a layer written by hand."""
    model = get_peft_model(bert(), PfeifferConfig(reduction_factor=4))
    shake(model)
    layer = model.get_base_model().bert.encoder.layer[1]
    seen = {}
    layer.intermediate.register_forward_hook(lambda m, a, o: seen.update(x1=a[0]))
    layer.output.register_forward_hook(lambda m, a, o: seen.update(out=o))
    model(input_ids=ids())
    norm = layer.output.LayerNorm
    s = layer.output.dense(layer.intermediate(seen["x1"])) + seen["x1"]
    h = F.layer_norm(s, (32,), norm.weight, norm.bias, norm.eps)
    wanted = F.layer_norm(
        s + block_of(tensors_at(model, "bert.encoder.layer.1.output.LayerNorm"), h),
        (32,),
        norm.weight,
        norm.bias,
        norm.eps,
    )
    assert torch.allclose(seen["out"], wanted, atol=1e-6)


def test_pfeiffer_in_a_pre_norm_layer():
    """out = h + Ad(h), h the sum behind the feed-forward part."""
    model = get_peft_model(llama(), PfeifferConfig(reduction_factor=4, layers_to_transform=[1]))
    shake(model)
    hidden = model(input_ids=ids(), output_hidden_states=True)
    with model.disable_adapter():
        plain = model(input_ids=ids(), output_hidden_states=True)
    h = plain.hidden_states[1]
    layer = model.get_base_model().model.layers[1]
    with model.disable_adapter():
        seen = {}
        handle = layer.register_forward_hook(lambda m, a, o: seen.update(h=o))
        model(input_ids=ids())
        handle.remove()
    h = seen["h"]
    wanted = model.get_base_model().model.norm(h + block_of(tensors_at(model, "model.layers.1"), h))
    assert torch.allclose(hidden.hidden_states[-1], wanted, atol=1e-5)


def at_sums(model: nn.Module, layer: int = 1) -> dict[str, torch.Tensor]:
    """f and x of one layer of a Llama's two sums, and what the sums were."""
    block = model.get_base_model().model.layers[layer]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        block.input_layernorm.register_forward_hook(lambda m, a, o: seen.update(x=a[0])),
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(heads=a[0])),
        block.post_attention_layernorm.register_forward_hook(lambda m, a, o: seen.update(s1=a[0])),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(inner=a[0])),
    ]
    hidden = model(input_ids=ids(), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    seen["s2"] = hidden[layer + 1]
    seen["f1"] = F.linear(seen["heads"], block.self_attn.o_proj.weight)
    seen["f2"] = F.linear(seen["inner"], block.mlp.down_proj.weight)
    return seen


def test_both_sums_of_a_pre_norm_layer():
    """s1 = f1 + x + Ad(f1 + x), s2 = f2 + s1 + Ad(f2 + s1); with residual_before_ln=False, x and s1 once more."""
    for again in (False, True):
        config = PfeifferConfig(reduction_factor=4, mh_adapter=True, residual_before_ln=not again)
        model = get_peft_model(llama(num_hidden_layers=3), config)
        shake(model)
        v = at_sums(model)
        s = v["f1"] + v["x"]
        attention, block = (tensors_at(model, f"model.layers.1.{p}".rstrip(".")) for p in ("self_attn.o_proj", ""))
        block = {k: t for k, t in block.items() if "." in k and not k.startswith("self")}
        assert torch.allclose(v["s1"], s + block_of(attention, s) + again * v["x"], atol=1e-5)
        s = v["f2"] + v["s1"]
        assert torch.allclose(v["s2"], s + block_of(block, s) + again * v["s1"], atol=1e-5)


def granite() -> nn.Module:
    import transformers

    config = transformers.GraniteConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, residual_multiplier=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GraniteForCausalLM(config).eval()


def test_a_norm_behind_the_sub_layer_is_what_is_added():
    """Gemma 2 adds norm(f): the adapter reads x + norm(f)."""
    base = make("gemma")
    subs = {s.kind: s for s in find_sublayers(base) if s.block.index == 0}
    assert subs["attention"].adds == "model.layers.0.post_attention_layernorm"
    assert subs["feedforward"].adds == "model.layers.0.post_feedforward_layernorm"
    model = get_peft_model(base, PfeifferConfig(reduction_factor=4, mh_adapter=True))
    shake(model)
    block, seen = model.get_base_model().model.layers[0], {}
    block.input_layernorm.register_forward_hook(lambda m, a, o: seen.update(x=a[0]))
    block.self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.update(f=o))
    block.pre_feedforward_layernorm.register_forward_hook(lambda m, a, o: seen.update(s=a[0]))
    model(**inputs("gemma"))
    norm = type(block.post_attention_layernorm).__mro__[2].forward
    s = seen["x"] + norm(block.post_attention_layernorm, seen["f"])
    adapter = tensors_at(model, "model.layers.0.post_attention_layernorm")
    assert torch.allclose(seen["s"], s + block_of(adapter, s), atol=1e-4)


def test_a_parallel_adapter_reads_what_attention_reads():
    """The normed state, also in T5, whose attention part holds its norm."""
    for name, path in (("t5", "encoder.block.1.layer.0.SelfAttention"), ("llama", "model.layers.1.self_attn")):
        model = get_peft_model(make(name), ParallelConfig(reduction_factor=4, mh_adapter=True))
        shake(model)
        here, seen = model.get_base_model().get_submodule(path), []
        normed = path.replace("SelfAttention", "layer_norm").replace("self_attn", "input_layernorm")
        model.get_base_model().get_submodule(normed).register_forward_hook(lambda m, a, o, s=seen: s.append(o))
        end = here.get_submodule("o" if name == "t5" else "o_proj")
        end.register_forward_hook(lambda m, a, o, s=seen: s.append(o))
        here.register_forward_hook(lambda m, a, o, s=seen: s.append(o[0]))
        model(**inputs(name))
        x, plain, out = seen
        assert torch.allclose(out, plain + 4 * block_of(tensors_at(model, path), x), atol=1e-4)


def test_the_sums_of_a_mixed_batch_and_in_generation():
    model = get_peft_model(llama(), PfeifferConfig(reduction_factor=4, mh_adapter=True))
    model.add_adapter("other", PfeifferConfig(reduction_factor=8, mh_adapter=True, residual_before_ln=False))
    shake(model)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model(input_ids=ids()).logits)
    mixed = model(input_ids=ids(), adapter_names=["other", "default", "other"]).logits
    assert torch.allclose(mixed, torch.stack([alone[1][0], alone[0][1], alone[1][2]]), atol=1e-4)
    model.set_adapter("default")
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(input_ids=ids(), **options, use_cache=True)
    assert torch.equal(cached, model.generate(input_ids=ids(), **options, use_cache=False))


def test_zero_up_is_the_base_and_equal_tensors_are_equal():
    model = get_peft_model(bert(), PfeifferConfig(reduction_factor=4))
    base = model(input_ids=ids()).logits
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "bottleneck_up" in n:
                p.zero_()
    with model.disable_adapter():
        plain = model(input_ids=ids()).logits
    assert torch.equal(model(input_ids=ids()).logits, plain)
    assert not torch.equal(base, plain)  # N(0, 0.02) starts near the base, not at it
    assert torch.allclose(base, plain, atol=1e-2)
    model.add_adapter("twin", PfeifferConfig(reduction_factor=4))
    for a, b in zip(model.adapters.parameters("default"), model.adapters.parameters("twin"), strict=True):
        with torch.no_grad():
            a.add_(torch.randn_like(a))
            b.copy_(a)
    first = model(input_ids=ids()).logits
    model.set_adapter("twin")
    assert torch.equal(model(input_ids=ids()).logits, first)


def test_houlsby_starts_near_the_base_and_counts():
    model = get_peft_model(bert(), HoulsbyConfig(reduction_factor=4))
    with model.disable_adapter():
        plain = model(input_ids=ids()).logits
    assert (model(input_ids=ids()).logits - plain).abs().max() < 1e-2
    layers, d, m = 2, 32, 8
    norms = 2 * d * (2 * layers + 1)  # the embedding's too
    assert model.get_nb_trainable_parameters()[0] == layers * 2 * (2 * d * m + m + d) + norms


def test_counts_of_the_cards():
    import transformers

    with torch.device("meta"):
        base = transformers.BertModel(transformers.BertConfig())
    model = get_peft_model(base, PfeifferConfig(reduction_factor=16))
    assert model.get_nb_trainable_parameters()[0] == 894_528
    model.delete_adapter("default")
    model.add_adapter("par", ParallelConfig(reduction_factor=48))
    assert model.adapters.count()[0] == 12 * (2 * 768 * 16 + 16 + 768)


def test_a_parallel_adapter_without_non_linearity_is_a_lora():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16))
    model = get_peft_model(
        net, ParallelConfig(target_modules=["0"], non_linearity="linear", reduction_factor=4, scaling=3.0)
    )
    x = torch.randn(5, 12)
    assert torch.equal(model(x), net(x))  # U = 0
    grads = torch.autograd.grad(model(x).sum(), [p for p in model.parameters() if p.requires_grad])
    assert [bool(g.abs().sum()) for g in grads] == [False, False, True, True]
    shake(model)
    tensors = tensors_at(model, "0")
    with torch.no_grad():
        tensors["down.bias"].zero_()
        tensors["up.bias"].zero_()
    live = model(x)
    lora = get_peft_model(nn.Sequential(nn.Linear(12, 16)), LoraConfig(target_modules=["0"], r=4, lora_alpha=12))
    with torch.no_grad():
        plain = lora.get_base_model()[0]
        plain.load_state_dict({"weight": net[0].weight, "bias": net[0].bias}, strict=False)
        plain.lora_A.default.weight.copy_(tensors["down.weight"])
        plain.lora_B.default.weight.copy_(tensors["up.weight"])
    assert torch.allclose(lora(x), live, atol=1e-5)


def test_options_that_add_tensors_do_what_they_say():
    options = {"use_gating": True, "scaling": "channel", "ln_before": True, "ln_after": True, "dropout": 0.1}
    model = get_peft_model(llama(), BottleneckConfig(reduction_factor=4, stochastic_depth=0.2, **options))
    names = {n.split(".bottleneck_")[1] for n, _ in model.named_parameters() if "bottleneck_" in n}
    assert {"gate.default.weight", "scaling.default", "norm_before.default.bias", "norm_after.default.weight"} <= names
    shake(model)
    model.train()
    assert not torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_gate_per_token_does_not_see_the_future():
    x = ids()
    for gate, leaks in ((True, True), ("token", False)):
        model = get_peft_model(llama(), BottleneckConfig(reduction_factor=4, use_gating=gate))
        shake(model)
        ahead = torch.cat([x[:, :-1], (x[:, -1:] + 7) % 60], 1)
        same = torch.allclose(model(input_ids=x).logits[:, :-1], model(input_ids=ahead).logits[:, :-1], atol=1e-6)
        assert same != leaks


def test_reduction_by_layer_and_layers_left_out():
    model = get_peft_model(llama(), PfeifferConfig(reduction_factor={"0": 4, "default": 16}))
    assert tensors_at(model, "model.layers.0")["down.weight"].shape == (8, 32)
    assert tensors_at(model, "model.layers.1")["down.weight"].shape == (2, 32)
    model = get_peft_model(llama(), PfeifferConfig(leave_out=[0]))
    assert not tensors_at(model, "model.layers.0")
    assert tensors_at(model, "model.layers.1")


def test_generation_with_a_cache_and_checkpointed_gradients():
    model = get_peft_model(llama(), HoulsbyConfig(reduction_factor=4))
    shake(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(input_ids=ids(), **options, use_cache=True)
    assert torch.equal(cached, model.generate(input_ids=ids(), **options, use_cache=False))
    params = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(input_ids=ids()).logits.square().mean(), params)
    model.gradient_checkpointing_enable()
    model.train()
    again = torch.autograd.grad(model(input_ids=ids()).logits.square().mean(), params)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_it_learns():
    torch.manual_seed(0)
    x = torch.randint(2, 60, (16, 6))
    y = (x[:, 0] > 30).long()
    for config in (HoulsbyConfig, PfeifferConfig, ParallelConfig):
        model = get_peft_model(bert(), config(reduction_factor=2, task_type="SEQ_CLS"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(40):
            loss = model(input_ids=x, labels=y).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0], config


def test_what_is_refused():
    with pytest.raises(ConfigError, match="leaves no unit of the 32 features"):
        get_peft_model(llama(), PfeifferConfig(reduction_factor=64))
    with pytest.raises(ConfigError, match=r"non_linearity 'reluu' is not known.*relu"):
        PfeifferConfig(non_linearity="reluu")
    with pytest.raises(ConfigError, match="reduction_factor must be a number, or one for each layer, not '16'"):
        PfeifferConfig(reduction_factor="16")
    with pytest.raises(TargetError, match="reduction_factor names layer '2', which is not"):
        get_peft_model(llama(), PfeifferConfig(reduction_factor={0: 4, 1: 4, 2: 4}))
    with pytest.raises(ConfigError, match="inv_adapter_reduction_factor must be positive, not 0"):
        BottleneckConfig(inv_adapter="nice", inv_adapter_reduction_factor=0)
    with pytest.raises(TargetError, match="leave_out names layer 7, and the model has layers 0 to 1"):
        get_peft_model(llama(), PfeifferConfig(leave_out=[7]))
    with pytest.raises(TargetError, match="layers_to_transform names layer 5"):
        get_peft_model(llama(), PfeifferConfig(layers_to_transform=[5]))
    with pytest.raises(TargetError, match="no block is found"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PfeifferConfig())
    with pytest.raises(ConfigError, match="no entry for layer 1"):
        get_peft_model(llama(), PfeifferConfig(reduction_factor={"0": 4}))
    with pytest.raises(ConfigError, match="reads the sub-layer's input"):
        BottleneckConfig(is_parallel=True, original_ln_before=True)
    for base in (make("gpt_neox"), granite()):
        with pytest.raises(ConfigError, match="is scaled, or added together with other parts"):
            get_peft_model(base, PfeifferConfig(mh_adapter=True))
    with pytest.raises(ConfigError, match='residual_before_ln must be True, False or "post_add"'):
        PfeifferConfig(residual_before_ln="pre_add")
    with pytest.raises(ConfigError, match="residual_before_ln is about the sum.*needs original_ln_before"):
        HoulsbyConfig(residual_before_ln=False)
    for bad in ({}, {"ln_after": True, "stochastic_depth": 0.1}):
        with pytest.raises(ConfigError, match="it needs ln_after=True, is_parallel=False and stochastic_depth=0"):
            PfeifferConfig(adapter_residual_before_ln=True, **bad)
    with pytest.raises(CannotMergeError, match="non-linearity"):
        get_peft_model(llama(), PfeifferConfig()).merge_and_unload()


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_a_model_is_copied_and_pickled_after_a_call(name):
    """What an adapter noted in the last call has a graph, which no copy can have."""
    config = {"bart": ParallelConfig(reduction_factor=4), "llama": PfeifferConfig(reduction_factor=4, mh_adapter=True)}
    model = get_peft_model(make(name), config[name])
    shake(model)
    live = logits(model, name)
    assert torch.equal(logits(copy.deepcopy(model), name), live)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), name), live)


def test_invertible_adapters_need_tokens():
    with pytest.raises(ConfigError, match="ViTForImageClassification embeds no tokens, so inv_adapter has no place"):
        get_peft_model(make("vit"), PfeifferConfig(reduction_factor=4, inv_adapter="nice"))
