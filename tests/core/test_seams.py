"""The seams that later methods use: attention (`KVEdit`), the model's input (`PromptEdit`), out-of-tree methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltatune import PeftModel, TargetedConfig, get_peft_model, register
from deltatune.core.edits import KVEdit, LowRank, PromptEdit
from deltatune.core.sites import Site


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0, eos_token_id=63, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class ToyPrefix(KVEdit):
    """Two learned key-value pairs before the others."""

    def __init__(self, heads: int, d: int) -> None:
        super().__init__()
        self.keys = self.tensor("prefix_k", torch.randn(heads, 2, d))
        self.values = self.tensor("prefix_v", torch.randn(heads, 2, d))

    def pairs(self):
        return self.keys.weight, self.values.weight


@register
@dataclass
class ToyPrefixConfig(TargetedConfig):
    method: ClassVar[str] = "TOY_PREFIX"

    @classmethod
    def example(cls, **fields):
        return cls(**fields)

    def sites(self, model):
        return [Site(n, None) for n, m in model.named_modules() if type(m).__name__ == "LlamaAttention"]

    def build_module(self, module, site):
        return ToyPrefix(module.config.num_key_value_heads, module.head_dim)


class ToyPrompt(PromptEdit):
    """One learned embedding before the input."""

    length = 1

    def __init__(self, d: int) -> None:
        super().__init__()
        self.vector = self.tensor("prompt_vector", torch.randn(1, d))

    def prompt(self, tasks):
        return self.vector.weight


@register
@dataclass
class ToyPromptConfig(TargetedConfig):
    method: ClassVar[str] = "TOY_PROMPT"

    @classmethod
    def example(cls, **fields):
        return cls(**fields)

    def sites(self, model):
        return [Site("model", None)]

    def build_module(self, module, site):
        return ToyPrompt(module.config.hidden_size)


IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(3))


def test_attention_edit_runs_the_same_under_sdpa_and_eager(tmp_path):
    models = [get_peft_model(llama(a), ToyPrefixConfig()) for a in ("sdpa", "eager")]
    models[1].load_state_dict(models[0].state_dict())
    outs = [m(IDS).logits for m in models]
    assert torch.allclose(*outs, atol=1e-5)
    with models[0].disable_adapter():
        assert torch.equal(models[0](IDS).logits, llama()(IDS).logits)
    assert not torch.allclose(outs[0], llama()(IDS).logits, atol=1e-3)
    models[0].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(IDS).logits, outs[0])


def test_attention_edit_generates_alike_with_and_without_cache():
    model = get_peft_model(llama(), ToyPrefixConfig())
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    assert not torch.equal(cached, llama().generate(IDS, **options))


def test_attention_edit_trains_and_leaves_no_trace():
    base = llama()
    model = get_peft_model(base, ToyPrefixConfig())
    model(IDS, labels=IDS).loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grads == {n for n, p in model.named_parameters() if "prefix_" in n}
    assert model.unload() is base
    assert base.config._attn_implementation == "sdpa"
    assert torch.equal(base(IDS).logits, llama()(IDS).logits)


def test_prompt_edit_sees_the_input_and_hides_its_positions():
    model = get_peft_model(llama(), ToyPromptConfig())
    out = model(input_ids=IDS)
    assert out.logits.shape == (2, 7, 64)
    assert not torch.allclose(out.logits, llama()(IDS).logits, atol=1e-3)
    out.logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "base_model.model.model.prompt_vector.default.weight"
    ]


def test_prompts_and_attention_edits_refuse_to_merge():
    for config in (ToyPrefixConfig(), ToyPromptConfig()):
        with pytest.raises(ValueError, match="cannot be merged"):
            get_peft_model(llama(), config).merge_adapter()


# A whole method, outside the package, as its author would write it.
class ToyDelta(LowRank):
    def __init__(self, ref, r):
        super().__init__(ref)
        *_, out, inp = ref.shape
        self.u = self.tensor("toy_u", torch.randn(r, inp) / inp)
        self.v = self.tensor("toy_v", torch.zeros(out, r))

    def factors(self):
        return self.u.weight, self.v.weight


@register
@dataclass
class ToyConfig(TargetedConfig):
    r: int = 2
    method: ClassVar[str] = "TOY"

    def build(self, ref, site):
        return ToyDelta(ref, self.r)


def test_an_out_of_tree_method_is_one_class(tmp_path):
    model = get_peft_model(llama(), ToyConfig(target_modules=["q_proj", "down_proj"]))
    model.add_adapter("b", ToyConfig(target_modules="all-linear", r=3))
    for n, p in model.named_parameters():
        if "toy_v" in n:
            nn.init.normal_(p, std=0.3)
    live = model(IDS).logits
    model.set_adapter("b")
    other = model(IDS).logits
    mixed = model(IDS, adapter_names=["default", "b"]).logits
    assert torch.allclose(mixed[0], live[0], atol=1e-5)
    assert torch.allclose(mixed[1], other[1], atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / "b")(IDS).logits, other)
    assert torch.allclose(model.merge_and_unload()(IDS).logits, other, atol=1e-5)
