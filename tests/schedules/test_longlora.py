"""LongLoRA: the card's identities (arXiv 2309.12307)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deltatune import ConfigError, LoraConfig, get_peft_model
from deltatune.schedules import LongLora, attach
from deltatune.schedules.longlora import grouped_attention, interpolate_positions, segments
from schedule_runs import batches
from tiny import bert, llama


def tensors(tokens=16, heads=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, 8, generator=generator) for _ in range(3)]


def explicit(q, k, v, size, offset):
    """Full attention under a mask of segments."""
    tokens = torch.arange(q.shape[2])
    segment = (tokens - offset).div(size, rounding_mode="floor")
    mask = (segment[:, None] == segment[None]) & (tokens[:, None] >= tokens[None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal(tokens, padded=0):
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    mask[1, :, :, :padded] = False
    return mask


@pytest.mark.parametrize("mask", [None, causal(16)], ids=["none", "given"])
def test_one_group_is_full_attention(mask):
    q, k, v = tensors()
    found = grouped_attention(q, k, v, 16, mask, None)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(found[:, :2], full[:, :2], atol=1e-6)
    assert LongLora(groups=1).size(16) == 16


@pytest.mark.parametrize("tokens", [16, 15, 18])
@pytest.mark.parametrize("given", [False, True])
def test_both_halves_equal_an_explicit_mask_of_segments(tokens, given):
    q, k, v = tensors(tokens)
    found = grouped_attention(q, k, v, 4, causal(tokens) if given else None, None)
    assert torch.allclose(found[:, :2], explicit(q, k, v, 4, 0)[:, :2], atol=1e-5)
    assert torch.allclose(found[:, 2:], explicit(q, k, v, 4, 2)[:, 2:], atol=1e-5)


def test_segments_cover_every_token_once():
    assert list(segments(16, 4, 0)) == [(0, 4, 4)]
    assert list(segments(16, 4, 2)) == [(0, 1, 2), (2, 3, 4), (14, 1, 2)]
    assert list(segments(3, 4, 2)) == [(0, 1, 2), (2, 1, 1)]


def long_model(**options):
    torch.manual_seed(1)
    base = llama(initializer_range=0.1, **options)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).train()


def started(model, **options):
    options = {"groups": 2, **options}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return optimizer, attach(model, optimizer, LongLora(**options), total_steps=4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_token_sees_a_later_one_and_inference_is_plain(implementation):
    model = long_model(attn_implementation=implementation)
    x = torch.randint(2, 60, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=x).logits
        _, schedule = started(model, groups=4)
        sparse = model(input_ids=x).logits
        assert (sparse - plain).abs().max() > 1e-3
        assert torch.allclose(sparse[:, :2], plain[:, :2], atol=1e-5)  # the first half group sees all there is
        for t in range(1, 16):
            y = x.clone()
            y[0, t] = (y[0, t] + 1) % 60
            changed = model(input_ids=y).logits
            assert torch.equal(changed[:, :t], sparse[:, :t])
            assert not torch.equal(changed[:, t], sparse[:, t])
        model.eval()
        assert torch.allclose(model(input_ids=x).logits, plain, atol=1e-5)
        model.train()
        schedule.finish()
        assert torch.allclose(model(input_ids=x).logits, plain, atol=1e-5)
    assert model.get_base_model().config._attn_implementation == implementation


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_others(side):
    """What stands in padding is seen by nobody, and no gradient is NaN."""
    model = long_model()
    started(model, group_size=4)
    x = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    pad = slice(0, 5) if side == "left" else slice(7, 12)
    mask[1, pad] = 0
    logits = model(input_ids=x, attention_mask=mask).logits
    y = x.clone()
    y[1, pad] = 1
    other = model(input_ids=y, attention_mask=mask).logits
    assert torch.allclose(logits[mask.bool()], other[mask.bool()], atol=1e-5)
    logits[mask.bool()].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_embeddings_and_norms_train_beside_the_pairs():
    model = long_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, schedule = started(model)
    for i in range(2):
        model(**batches()[i]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "embed" in n or "norm" in n or "lora_" in n}
    assert schedule.finish()["longlora"] == {"factor": 1, "base_parameters": 64 * 32 + 5 * 32}


def test_positions_are_interpolated_for_a_longer_context():
    base, long = (llama(max_position_embeddings=16) for _ in range(2))
    assert interpolate_positions(long, 40) == 3
    assert interpolate_positions(long, 40) == 1  # it reaches that far already
    rotary, plain = long.model.rotary_emb, base.model.rotary_emb
    assert torch.allclose(rotary.inv_freq, plain.inv_freq / 3)
    assert long.config.max_position_embeddings == 48
    x = torch.zeros(1, 4, 32)
    at = torch.tensor([[0, 3, 6, 9]])
    assert torch.allclose(rotary(x, at)[0], plain(x, at // 3)[0], atol=1e-6)
    model = get_peft_model(llama(max_position_embeddings=16), LoraConfig(r=2)).train()
    _, schedule = started(model, context=33)
    assert schedule.report()["longlora"]["factor"] == 3


def test_a_tied_head_follows_its_embedding_into_the_file(tmp_path):
    from deltatune import PeftModel

    model = long_model(tie_word_embeddings=True)
    optimizer, schedule = started(model)
    for i in range(2):
        model(**batches()[i]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    schedule.finish()
    assert schedule.save(tmp_path)
    loaded = PeftModel.from_pretrained(llama(initializer_range=0.1, tie_word_embeddings=True), tmp_path)
    x = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=x).logits, model.eval()(input_ids=x).logits, atol=1e-5)


def prefixed():
    from deltatune import PrefixTuningConfig

    model = long_model()
    model.add_adapter("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LongLora(groups=0), "groups must be a whole number of at least 1"),
        (lambda: LongLora(group_size=1), "group_size must be a whole number of at least 2"),
        (lambda: started(prefixed()), "no place for prefixes"),
        (lambda: started(long_model(), train=["nothing"]), "is part of no parameter's name"),
        (
            lambda: started(get_peft_model(bert(), LoraConfig(target_modules=["query"]))),
            "has none; use a Llama-type model",
        ),
        (
            lambda: interpolate_positions(
                llama(max_position_embeddings=8, rope_scaling={"rope_type": "linear", "factor": 2.0}), 32
            ),
            "not plain rotary ones",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# ---------------------------------------------------------------------- what is saved
LONG = {"initializer_range": 0.1, "max_position_embeddings": 16}


def trained_long(folder, **options):
    """(a model that has trained in a context of 3 times its own, its logits)."""
    model = long_model(max_position_embeddings=16, **options)
    optimizer, schedule = started(model, context=33)
    for i in range(2):
        model(**batches()[i]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    schedule.finish()
    assert schedule.save(folder)
    with torch.no_grad():
        return model, model.eval()(input_ids=TOKENS).logits


TOKENS = torch.randint(2, 60, (1, 30), generator=torch.Generator().manual_seed(3))


def test_the_file_has_pairs_modules_and_the_context(tmp_path):
    trained_long(tmp_path)
    from safetensors.torch import load_file

    values = LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert (values["peft_type"], values["context_length"], values["r"]) == ("LORA", 33, 2)
    assert sorted(values["modules_to_save"]) == ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]
    kinds = {key.split(".")[-2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"lora_A", "lora_B", *values["modules_to_save"]}


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_run_loads_with_the_positions_it_trained_with(tmp_path, tied):
    from deltatune import PeftModel

    _, wanted = trained_long(tmp_path, tie_word_embeddings=tied)
    base = llama(**LONG, tie_word_embeddings=tied)
    with torch.no_grad():
        plain = base(input_ids=TOKENS).logits
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert loaded.get_base_model().config.max_position_embeddings == 48
        assert torch.allclose(loaded(input_ids=TOKENS).logits, wanted, atol=1e-5)
        assert torch.equal(loaded.unload()(input_ids=TOKENS).logits, plain)  # positions go with the adapter
        assert base.config.max_position_embeddings == 16
        merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
        assert merged.config.rope_parameters["factor"] == 3
        assert torch.allclose(merged(input_ids=TOKENS).logits, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_it_as_a_lora_and_says_what_it_ignores(tmp_path, tied):
    import peft

    _, wanted = trained_long(tmp_path, tie_word_embeddings=tied)
    base = llama(**LONG, tie_word_embeddings=tied)
    interpolate_positions(base, 33)
    with pytest.warns(UserWarning, match="context_length"):
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=TOKENS).logits, wanted, atol=1e-5)


def test_a_copy_of_a_long_model_gives_its_own_positions_back():
    import copy

    model = get_peft_model(llama(**LONG), LoraConfig(context_length=33))
    twin = copy.deepcopy(model)
    twin.unload()
    assert twin.get_base_model().config.max_position_embeddings == 16
    assert model.get_base_model().config.max_position_embeddings == 48


def adopted():
    model = get_peft_model(llama(**LONG), LoraConfig())
    model.add_adapter("long", LoraConfig(context_length=33))


def without_lora():
    from deltatune import IA3Config

    started(get_peft_model(llama(**LONG), IA3Config()), context=33)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (adopted, "context_length=33 changes the positions of the whole model"),
        (lambda: LoraConfig(context_length=0), "context_length must be a whole number of at least 1"),
        (without_lora, "context=33 is kept in a LoRA's configuration"),
    ],
)
def test_a_context_that_cannot_be_kept(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("first", ["relora", "longlora"])
def test_what_two_procedures_have_changed_is_saved_together(tmp_path, first):
    from deltatune import PeftModel
    from deltatune.schedules import ReLora

    model = long_model()
    given = [ReLora(cycle=2, restart_warmup=1, train_rest=False), LongLora(groups=2)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    schedule = attach(model, optimizer, *sorted(given, key=lambda p: p.name != first), total_steps=5)
    for i in range(5):
        model(**batches()[i]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    schedule.finish()
    assert schedule.save(tmp_path)
    loaded = PeftModel.from_pretrained(llama(initializer_range=0.1), tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits, atol=1e-5)
