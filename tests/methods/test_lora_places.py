"""Where LoRA goes beyond whole layers: fused experts, parts of fused projections, tokens, tied heads, replicas."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltatune import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from deltatune.core.lazy import LowRankWeight
from tiny import gpt2, ids, llama, shake


def mixtral(experts: str = "eager", **options):
    torch.manual_seed(0)
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = transformers.MixtralConfig(**{**values, **options})
    config._experts_implementation = experts
    return transformers.MixtralForCausalLM(config).eval()


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 3}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_live_equals_merged(implementation, tmp_path):
    x = ids()
    base = mixtral(implementation)(x).logits
    model = get_peft_model(mixtral(implementation), LoraConfig(**EXPERTS))
    assert torch.allclose(model(x).logits, base, atol=1e-6)
    shake(model)
    live = model(x).logits
    assert not torch.allclose(live, base, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(model(x).logits, live, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x).logits, live)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(mixtral(implementation), tmp_path)(x).logits, live)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_expert_gradients_are_those_of_the_formed_weight(implementation):
    x = ids()
    grads = []
    for formed in (False, True):
        model = get_peft_model(mixtral(implementation), LoraConfig(**EXPERTS))
        shake(model)
        if formed:
            for delta in model.adapters.deltas("default"):
                delta.ref.__class__ = type("Formed", (type(delta.ref),), {"indexed": False})
        model(x, labels=x).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_only_routed_experts_are_formed(monkeypatch):
    model = get_peft_model(mixtral(), LoraConfig(**EXPERTS))

    def fail(self):
        raise AssertionError("the sum was formed")

    monkeypatch.setattr(LowRankWeight, "dense", fail)
    model(ids(1, 2))


def test_parameters_of_plain_layers_and_misses():
    model = get_peft_model(llama(), LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))
    assert any("q_proj.lora_A.default.weight" in n for n, _ in model.named_parameters())
    with pytest.raises(ValueError, match="matches no parameter; did you mean"):
        get_peft_model(llama(), LoraConfig(target_modules=[], target_parameters=["q_prjo.weight"]))
    with pytest.raises(ValueError, match="a matrix or a stack"):
        get_peft_model(llama(), LoraConfig(target_modules=[], target_parameters=["norm.weight"]))


# ---------------------------------------------------------------------- parts of fused projections
def neox(**options):
    torch.manual_seed(0)
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    }  # fmt: skip
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**values, **options})).eval()


def bloom():
    torch.manual_seed(0)
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    ).eval()


def falcon(new: bool):
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, vocab_size=64,
        new_decoder_architecture=new, multi_query=not new, ffn_hidden_size=64,
    )  # fmt: skip
    return transformers.FalconForCausalLM(config).eval()


def phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize(
    "make", [gpt2, neox, bloom, lambda: falcon(True), lambda: falcon(False), phi3],
    ids=["gpt2", "gpt_neox", "bloom", "falcon_new", "falcon_mq", "phi3"],
)  # fmt: skip
def test_parts_of_a_fused_projection(make, tmp_path):
    x = ids()
    model = get_peft_model(make(), LoraConfig(enable_lora=[True, False, True], r=4))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".")[-3] for n in names} == {"lora_A_q", "lora_B_q", "lora_A_v", "lora_B_v"}
    shake(model)
    live = model(x).logits
    model.merge_adapter()
    assert torch.allclose(model(x).logits, live, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(x).logits, live)


@pytest.mark.parametrize(
    ("make", "flags"), [(neox, [True, False, False]), (lambda: falcon(True), [False, False, True])]
)
def test_rows_of_a_part_are_the_ones_attention_reads(make, flags):
    """Changing q alone leaves the keys and values that the cache holds; changing v alone leaves the keys."""
    x = ids()
    model = get_peft_model(make(), LoraConfig(enable_lora=flags, r=4, layers_to_transform=0))
    shake(model)
    live = model(x, use_cache=True).past_key_values
    base = make()(x, use_cache=True).past_key_values
    assert torch.allclose(live.layers[0].keys, base.layers[0].keys, atol=1e-6)
    assert torch.allclose(live.layers[0].values, base.layers[0].values, atol=1e-6) == (not flags[2])


def test_disabled_parts_keep_the_base_bit_for_bit():
    model = get_peft_model(gpt2(), LoraConfig(enable_lora=[True, False, True], r=4))
    shake(model)
    w = gpt2().transformer.h[0].attn.c_attn.weight
    model.merge_adapter()
    merged = model.get_base_model().transformer.h[0].attn.c_attn.weight
    assert torch.equal(merged[:, 32:64], w[:, 32:64])
    assert not torch.equal(merged[:, :32], w[:, :32])


def test_parts_count_formula():
    model = get_peft_model(gpt2(), LoraConfig(enable_lora=[True, False, True], r=4))
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * 2 * (32 + 32)  # r n_en (in + out / n) per layer


# ---------------------------------------------------------------------- tokens and ties
@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens(tied, tmp_path):
    x = ids()
    x[0, :2] = torch.tensor([5, 9])
    base = llama(tie_word_embeddings=tied)
    table = base.model.embed_tokens.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[9, 5]))
    assert torch.equal(model(x).logits, llama(tie_word_embeddings=tied)(x).logits)
    rows = model.get_parameter("base_model.model.model.embed_tokens.trainable_tokens_delta.default")
    assert torch.equal(rows, table[[9, 5]])
    shake(model)
    live = model(x).logits
    model.merge_adapter()
    assert torch.allclose(model(x).logits, live, atol=1e-5)
    merged = model.get_base_model().model.embed_tokens.weight
    assert torch.equal(merged[[9, 5]], rows)
    keep = [i for i in range(64) if i not in (5, 9)]
    assert torch.equal(merged[keep], table[keep])
    if tied:
        assert torch.equal(model.get_base_model().lm_head.weight, merged)
    model.unmerge_adapter()
    model(x).logits.sum().backward()
    assert rows.grad is not None
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path)
    assert torch.equal(again(x).logits, live)


def test_trainable_tokens_bad_input():
    for tokens, message in (([64], "not in its table of 64 rows"), ([1, 1], "distinct"), ([-1], "not in its table")):
        with pytest.raises(ValueError, match=message):
            get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    with pytest.raises(ValueError, match="no embedding and no head"):
        get_peft_model(gpt2(), TrainableTokensConfig(target_modules=["c_fc"], token_indices=[1]))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "copy"],
)
def test_a_tied_head_follows_when_asked(options, tmp_path):
    x = ids()
    config = LoraConfig(**options, ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    trained = model.get_nb_trainable_parameters()[0]
    shake(model)
    live = model(x).logits
    model.merge_adapter()
    assert torch.allclose(model(x).logits, live, atol=1e-5)
    base = model.get_base_model()
    assert torch.allclose(base.lm_head.weight, base.model.embed_tokens.weight, atol=1e-6)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)(x).logits, live)
    loose = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options))
    assert loose.get_nb_trainable_parameters()[0] == trained


# ---------------------------------------------------------------------- replicas
def test_merging_keeps_the_replicated_layers():
    config = LoraConfig(layer_replication=[[0, 2], [0, 2]], init_lora_weights=False)
    model = get_peft_model(llama(num_hidden_layers=2), config).eval()
    x = torch.randint(2, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=x).logits
        merged = model.merge_and_unload()
        assert merged.config.num_hidden_layers == len(merged.model.layers) == 4
        assert torch.allclose(merged(input_ids=x).logits, wanted, atol=1e-5)


def test_layer_replication_shares_weights_and_is_undone(tmp_path):
    base = llama()
    x = ids()
    plain = base(x).logits
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = get_peft_model(base, config)
    layers = model.get_base_model().model.layers
    assert len(layers) == base.config.num_hidden_layers == 3
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    shake(model)
    live = model(x).logits
    out = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(x)}
    assert torch.equal(model.generate(x, **out), model.generate(x, use_cache=False, **out))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(x).logits, live)
    assert model.unload() is base
    assert len(base.model.layers) == base.config.num_hidden_layers == 2
    assert torch.equal(base(x).logits, plain)
    with pytest.raises(ValueError, match="is not within the"):
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 9]]))
