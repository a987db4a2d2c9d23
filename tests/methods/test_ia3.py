"""IA³: the card's tests beyond the laws."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from deltatune import IA3Config, LoraConfig, get_peft_model
from deltatune.errors import ConfigError, TargetError
from tiny import bert, gpt2, ids, llama, shake, t5

PAPER = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def gains(model, name="default"):
    return {d.host.path: d for d in model.adapters.deltas(name) if d.slots}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def test_equation():
    """`l ∘ (W x + b)` and `W (l ∘ x) + b`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5))
    x = torch.randn(4, 6)
    model = get_peft_model(net, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    shake(model)
    one, two = (model.get_base_model()[i].ia3_l.default for i in (0, 1))
    assert (one.shape, two.shape) == ((9, 1), (1, 9))
    wanted = net[1].weight @ (two.mT * (one * (net[0].weight @ x.T + net[0].bias[:, None]))) + net[1].bias[:, None]
    assert torch.allclose(model(x), wanted.T, atol=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_keys_of_zero_make_attention_uniform(make):
    names = {"target_modules": ["k_proj"]} if make is llama else {"target_modules": ["c_attn"]}
    model = get_peft_model(make(attn_implementation="eager"), IA3Config(**names))
    with torch.no_grad():
        for path, delta in gains(model).items():
            d = delta.l.weight.shape[0]
            delta.l.weight[slice(None) if "k_proj" in path else slice(d // 3, 2 * d // 3)] = 0
        seen = model(input_ids=ids(), output_attentions=True).attentions[0]
    rows = torch.tril(torch.ones(7, 7))
    assert torch.allclose(seen, (rows / rows.sum(1, keepdim=True)).expand_as(seen), atol=1e-6)


def test_count_of_t0_3b():
    config = transformers.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, num_decoder_layers=24,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    model = get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))
    # encoder layer: 2 d_attn + d_ff; decoder layer: 4 d_attn + d_ff
    assert model.get_nb_trainable_parameters()[0] == 24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120) == 540_672


@pytest.mark.parametrize("make", [llama, t5])
def test_all_gains_learn_from_the_first_step(make):
    model = get_peft_model(make(), IA3Config())
    model(input_ids=ids(), labels=ids()).loss.backward()
    for path, delta in gains(model).items():
        assert delta.l.weight.grad.abs().min() > 0, path


def test_input_scaling_costs_one_product():
    """The base's own product runs on the scaled input: no second one with the frozen weight."""
    model = get_peft_model(llama(), IA3Config(**PAPER))
    from torch.utils.flop_counter import FlopCounterMode

    def flops(run):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(input_ids=ids())
        return counter.get_total_flops()

    with model.disable_adapter():
        base = flops(model)
    assert flops(model) == base


def test_beside_other_adapters_each_is_relative_to_the_base():
    """W diag(l) - W and ΔW of a LoRA add up on one layer, with the LoRA before or behind, live or merged."""
    lora = LoraConfig(r=2, target_modules=["down_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), IA3Config(**PAPER), adapter_name="ia3")
    model.add_adapter("lora", lora)
    shake(model, scale=0.1)
    model.set_adapter(["ia3", "lora"])
    wanted = logits(model)
    model.set_adapter(["lora", "ia3"])
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    for names in (["ia3"], ["lora"], ["ia3", "lora"]):
        model.merge_adapter(names)
        assert torch.allclose(logits(model), wanted, atol=1e-5), names
        model.unmerge_adapter()


def test_weighted_sum_is_the_sum_of_changes():
    model = get_peft_model(llama(), IA3Config(**PAPER), adapter_name="one")
    model.add_adapter("two", IA3Config(**PAPER))
    shake(model)
    model.add_weighted_adapter(["one", "two"], [0.8, 0.5], "new")
    found = zip(*(gains(model, n).values() for n in ("one", "two", "new")), strict=True)
    for one, two, new in found:
        change = 0.8 * (one.l.weight - 1) + 0.5 * (two.l.weight - 1)
        assert torch.allclose(new.l.weight, 1 + change, atol=1e-6)
        assert not new.l.weight.requires_grad
    model.add_weighted_adapter(["one", "two"], [0.8, 0.5], "lora", "linear")  # asked for by name: a LoRA
    model.set_adapter("new")
    wanted = logits(model)
    model.set_adapter("lora")
    assert torch.allclose(logits(model), wanted, atol=1e-4)


def test_adapters_of_other_places_become_a_lora():
    model = get_peft_model(llama(), IA3Config(**PAPER), adapter_name="one")
    model.add_adapter("two", IA3Config(target_modules=["q_proj"]))
    shake(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new")
    assert isinstance(model.peft_config["new"], LoraConfig)


def test_bias_is_scaled_and_merged():
    model = get_peft_model(bert(), IA3Config(target_modules=["key", "value"]))
    shake(model)
    before = {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    live = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), live, atol=1e-5)
    path = "bert.encoder.layer.0.attention.self.value.bias"
    gain = model.get_base_model().get_submodule(path.removesuffix(".bias")).ia3_l.default.flatten()
    assert torch.allclose(model.get_base_model().get_parameter(path), before[path] * gain)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().get_parameter(path), before[path])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"feedforward_modules": ["down_proj"]}, ConfigError, "target_modules must be given too"),
        ({**PAPER, "feedforward_modules": ["up_proj"]}, TargetError, "feedforward_modules 'up_proj' matches no module"),
        ({"target_modules": ["embed_tokens"], "feedforward_modules": ["embed_tokens"]}, ConfigError, "token ids"),
    ],
)
def test_bad_values(fields, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(llama(), IA3Config(**fields))
