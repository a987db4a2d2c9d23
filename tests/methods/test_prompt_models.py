"""Prompts on what is not a plain decoder: classifiers of every kind, masked words, encoder-decoders, rows, caches."""

from __future__ import annotations

import pytest
import torch
import transformers

import deltatune
from deltatune import LoraConfig, get_peft_model
from deltatune.core.prompts import CACHE_NAMES, takes
from deltatune.methods.intrinsic_prompt import Decoded, fit_subspace
from methods.prompt_models import DECODERS, ROWS, bart, mistral, padded, roberta
from methods.test_prompt_methods import tokenizer  # noqa: F401
from tiny import bert, gpt2, ids, llama, shake, t5

PROMPT = {"num_virtual_tokens": 4}
KINDS = {
    "prompt": lambda **o: deltatune.PromptTuningConfig(**PROMPT, **o),
    "prefix": lambda **o: deltatune.PrefixTuningConfig(**PROMPT, **o),
    "p-tuning": lambda **o: deltatune.PromptEncoderConfig(encoder_hidden_size=8, **PROMPT, **o),
    "p-tuning-v2": lambda **o: deltatune.PTuningV2Config(**PROMPT, **o),
    "intrinsic": lambda **o: deltatune.IntrinsicPromptConfig(intrinsic_dim=5, **PROMPT, **o),
    "multitask": lambda **o: deltatune.MultitaskPromptTuningConfig(**PROMPT, **o),
}
TASKS = {
    "SEQ_CLS": ("SequenceClassification", {"labels": torch.tensor([0, 1, 1])}),
    "TOKEN_CLS": ("TokenClassification", {"labels": ids() % 2}),
    "QUESTION_ANS": (
        "QuestionAnswering",
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 6])},
    ),
}


def of_class(make, name):
    """A tiny model of another class than `make`'s, same configuration."""
    torch.manual_seed(0)
    return getattr(transformers, name)(make().config).eval()


# ---------------------------------------------------------------------- tasks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_every_method_serves_every_task_with_a_head(family, task, kind):
    suffix, labels = TASKS[task]
    make = lambda: of_class(bert if family == "Bert" else llama, f"{family}For{suffix}")  # noqa: E731
    base, model = make(), get_peft_model(make(), KINDS[kind](task_type=task))
    shake(model, scale=0.5)
    wanted, got = base(input_ids=ids(), **labels), model.eval()(input_ids=ids(), **labels)
    assert {k: v.shape for k, v in wanted.items() if torch.is_tensor(v)} == {
        k: v.shape for k, v in got.items() if torch.is_tensor(v)
    }
    model.train()
    model(input_ids=ids(), **labels).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    assert any("prompt_encoder" not in n for n in grads)  # the head
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
@pytest.mark.parametrize(
    ("make", "name", "task"),
    [
        (bart, "BartForSequenceClassification", "SEQ_CLS"),
        (bart, "BartForQuestionAnswering", "QUESTION_ANS"),
        (t5, "T5ForSequenceClassification", "SEQ_CLS"),
        (t5, "T5ForTokenClassification", "TOKEN_CLS"),
        (t5, "T5ForQuestionAnswering", "QUESTION_ANS"),
    ],
)
def test_encoder_decoders_with_heads(make, name, task, kind):
    base = of_class(make, name)
    tokens = ids().clone()
    tokens[:, -1] = base.config.eos_token_id  # sentence heads pool there
    model = get_peft_model(of_class(make, name), KINDS[kind](task_type=task)).eval()
    shake(model, scale=0.5)
    wanted, got = base(input_ids=tokens), model(input_ids=tokens)
    keys = ("start_logits", "end_logits") if task == "QUESTION_ANS" else ("logits",)
    assert all(wanted[k].shape == got[k].shape for k in keys)
    assert not torch.allclose(wanted[keys[0]], got[keys[0]], atol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "p-tuning-v2"])
@pytest.mark.parametrize("make", [lambda: bert(kind="BertModel"), lambda: of_class(llama, "LlamaModel")])
def test_features_have_the_width_of_the_text(make, kind):
    model = get_peft_model(make(), KINDS[kind](task_type="FEATURE_EXTRACTION")).eval()
    assert model(input_ids=ids()).last_hidden_state.shape == make()(input_ids=ids()).last_hidden_state.shape


def test_a_masked_word_is_found_in_a_template():
    hole = 999
    base = of_class(roberta, "RobertaForMaskedLM")
    config = deltatune.PromptEncoderConfig(placeholder_token_id=hole, encoder_hidden_size=8, num_virtual_tokens=3)
    model = get_peft_model(of_class(roberta, "RobertaForMaskedLM"), config).eval()
    shake(model, scale=0.5)
    tokens = torch.tensor([[hole, 8, 9, hole, 10, hole], [9, hole, hole, 11, hole, 12]])
    x = base.get_input_embeddings()(tokens.masked_fill(tokens == hole, 0)).clone()
    virtual = model.adapters.edits["default"][0].result()
    for i in range(2):
        x[i, tokens[i] == hole] = virtual
    wanted = base(inputs_embeds=x).logits
    assert torch.allclose(model(input_ids=tokens).logits, wanted, atol=1e-5)


# ---------------------------------------------------------------------- together
ENCODERS = {
    "bert-tokens": lambda: bert(kind="BertForTokenClassification"),
    "bert-sentences": bert,
    "roberta": roberta,
    "roberta-tokens": lambda: of_class(roberta, "RobertaForTokenClassification"),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_batch_of_different_prompts_by_row(name, task, side):
    make = ENCODERS[name]
    if task and "tokens" in name:
        task = "TOKEN_CLS"
    if side == "left" and "roberta" not in name:
        pytest.skip("BERT counts padding at the left as positions, prompt or not")
    model = get_peft_model(make(), deltatune.PromptTuningConfig(num_virtual_tokens=2, task_type=task), "short")
    model.add_adapter("long", KINDS["p-tuning"](task_type=task))
    model.add_adapter("deep", KINDS["p-tuning-v2"](task_type=task))
    model.add_adapter("lora", LoraConfig(target_modules=["query"], init_lora_weights=False))
    shake(model, scale=0.5)
    model.eval()
    names = ["lora", "short", "deep", "long", "short"]
    rows = [ROWS[i % 3] for i in range(len(names))]
    tokens, mask = padded(rows, side)
    if "roberta" in name:
        tokens = tokens.masked_fill(mask == 0, 1)
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, adapter_names=names, output_hidden_states=True)
        for i, adapter in enumerate(names):
            model.set_adapter(adapter)
            alone = model(input_ids=torch.tensor([rows[i]]), output_hidden_states=True)
            if "tokens" in name:
                assert torch.allclose(out.logits[i][mask[i].bool()], alone.logits[0], atol=1e-5), adapter
            elif side == "right":  # their heads read the first position, whatever is there
                assert torch.allclose(out.logits[i], alone.logits[0], atol=1e-5), adapter
            states = out.hidden_states[-1][i][mask[i].bool()]
            assert torch.allclose(states, alone.hidden_states[-1][0], atol=1e-5), adapter


@pytest.mark.parametrize("make", [bart, t5])
def test_an_encoder_decoders_batch_of_different_prompts_by_row(make):
    model = get_peft_model(make(), deltatune.PromptTuningConfig(num_virtual_tokens=2), "short")
    model.add_adapter("long", deltatune.PromptTuningConfig(num_virtual_tokens=5))
    model.add_adapter("deep", deltatune.PrefixTuningConfig(num_virtual_tokens=3, prefix_attention=["encoder", "cross"]))
    model.add_adapter("own", deltatune.PrefixTuningConfig(num_virtual_tokens=3))
    model.add_adapter("both", deltatune.PromptTuningConfig(num_virtual_tokens=2, num_transformer_submodules=2))
    shake(model, scale=0.5)
    model.eval()
    names, target = ["deep", "short", "long", "own"], ids(4, 5)
    rows = [ROWS[i % 3] for i in range(len(names))]
    tokens, mask = padded(rows, "right")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        mixed = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=target, adapter_names=names).logits
        said = model.generate(input_ids=tokens, attention_mask=mask, adapter_names=names, **options)
        for i, name in enumerate(names):
            model.set_adapter(name)
            one = torch.tensor([rows[i]])
            alone = model(input_ids=one, decoder_input_ids=target[i : i + 1]).logits[0]
            assert torch.allclose(mixed[i], alone, atol=1e-4), name
            assert torch.equal(model.generate(input_ids=one, **options)[0], said[i]), name
    if make is bart:  # its decoder counts columns
        with pytest.raises(ValueError, match="BartDecoder takes no position_ids"):
            model(input_ids=tokens[:2], decoder_input_ids=target[:2], adapter_names=["both", "short"])


def test_beams_of_a_mixed_batch():
    model = get_peft_model(llama(), deltatune.PromptTuningConfig(num_virtual_tokens=2), "short")
    model.add_adapter("long", deltatune.PromptTuningConfig(num_virtual_tokens=5))
    model.add_adapter("deep", deltatune.PrefixTuningConfig(num_virtual_tokens=3))
    shake(model, scale=1.0)
    model.eval()
    names, (tokens, mask) = ["short", "long", "deep"], padded(ROWS)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(input_ids=tokens, attention_mask=mask, adapter_names=names, **options)[:, tokens.shape[1] :]
    for i, (name, row) in enumerate(zip(names, ROWS, strict=True)):
        model.set_adapter(name)
        one = torch.tensor([row])
        alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(mixed[i], alone[0, len(row) :]), name


# ---------------------------------------------------------------------- a prefix from text
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_text_beyond_the_window_starts_a_prefix_at_its_beginning(name, tokenizer):  # noqa: F811
    make = DECODERS[name]  # windows of 4
    words = "classify this message as spam spam as message this"
    model = get_peft_model(make(), deltatune.PrefixTuningConfig(num_virtual_tokens=6)).eval()
    got = deltatune.initialize_kv_prefix_from_text(model, tokenizer[0], text=words).clone()
    base = make()
    cache = transformers.DynamicCache()  # without a configuration it keeps all positions
    key = next(n for n in CACHE_NAMES if takes(base.model, n))
    base.model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 5]]), use_cache=True, **{key: cache})
    wanted = [s[0].transpose(0, 1).reshape(6, -1) for layer in cache.layers for s in (layer.keys, layer.values)]
    assert torch.allclose(got, torch.cat(wanted, 1), atol=1e-6)


def test_a_cache_that_forgot_its_beginning_is_refused():
    base = mistral()
    cache = base(input_ids=ids(1, 9), use_cache=True).past_key_values
    model = get_peft_model(mistral(), deltatune.PrefixTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="keeps only the last 3 of 9 positions"):
        deltatune.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def test_a_decoders_cache_of_an_encoder_decoder_starts_its_prefix(tokenizer):  # noqa: F811
    start = torch.tensor([[13, 2, 40]])
    cache = bart()(input_ids=ids(1), decoder_input_ids=start, use_cache=True).past_key_values
    model = get_peft_model(bart(), deltatune.PrefixTuningConfig(num_virtual_tokens=3)).eval()
    deltatune.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    target = ids(1, 5)
    both = torch.cat([start, target], 1)
    wanted = bart()(input_ids=ids(1), decoder_input_ids=both).logits[:, 3:]
    assert torch.allclose(model(input_ids=ids(1), decoder_input_ids=target).logits, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="encoder-decoder"):
        deltatune.initialize_kv_prefix_from_text(model, tokenizer[0], text="classify this message")


# ---------------------------------------------------------------------- intrinsic prompts
def test_an_identity_decoder_is_prompt_tuning():
    config = deltatune.IntrinsicPromptConfig(num_virtual_tokens=2, intrinsic_dim=64, decoder_hidden_size=64)
    model = get_peft_model(llama(), config).eval()
    encoder = model.get_base_model().prompt_encoder.default
    assert isinstance(encoder, Decoded)
    prompt = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoder.decoder_hidden.weight.copy_(1e-3 * torch.eye(64))  # where tanh is the identity
        encoder.decoder_output.weight.copy_(1e3 * torch.eye(64))
        encoder.decoder_hidden.bias.zero_()
        encoder.decoder_output.bias.zero_()
        encoder.embedding.weight.copy_(prompt.view(1, -1))
    plain = get_peft_model(llama(), deltatune.PromptTuningConfig(num_virtual_tokens=2)).eval()
    with torch.no_grad():
        plain.get_base_model().prompt_encoder.default.embedding.weight.copy_(prompt)
    assert torch.allclose(model(input_ids=ids()).logits, plain(input_ids=ids()).logits, atol=1e-4)


def test_the_tasks_own_losses_shape_the_subspace(tmp_path):
    prompts = [torch.randn(2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    goal = torch.randn(2, 8, generator=torch.Generator().manual_seed(9))
    seen = []

    def task_loss(task, prompt):
        seen.append(task)
        assert prompt.shape == (2, 8)
        return (prompt - goal).square().mean()

    options = {"intrinsic_dim": 4, "decoder_hidden_size": 8, "steps": 60, "lr": 1e-2, "reconstruction_weight": 0.0}
    losses = fit_subspace(prompts, tmp_path / "d.safetensors", task_loss=task_loss, **options)
    assert seen[:4] == [0, 1, 2, 0]
    assert losses[-1] < 0.5 * losses[0]


def test_the_decoders_shape_is_the_papers():
    config = transformers.BartConfig(encoder_layers=1, decoder_layers=1, d_model=768, vocab_size=64)
    with torch.device("meta"):
        base = transformers.BartForConditionalGeneration(config)
    model = get_peft_model(base, deltatune.IntrinsicPromptConfig(num_virtual_tokens=100))
    assert model.get_base_model().prompt_encoder.default.table().shape == (100, 768)
    assert model.get_nb_trainable_parameters()[0] == 250


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "p-tuning-v2"])
@pytest.mark.parametrize("make", [llama, gpt2, roberta, t5, bart], ids=lambda m: m.__name__)
def test_tokens_and_embeddings_together_are_refused(make, kind):
    model = get_peft_model(make(), KINDS[kind]())
    x = model.get_base_model().get_input_embeddings()(ids())
    with pytest.raises(ValueError, match="input_ids and inputs_embeds are both given|specify exactly one of input_ids"):
        model(input_ids=ids(), inputs_embeds=x, labels=ids() if make is not roberta else None)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "p-tuning-v2"])
@pytest.mark.parametrize(("make", "room"), [(roberta, 40), (bert, 40), (bart, 60)], ids=["roberta", "bert", "bart"])
def test_no_table_of_positions_is_overrun(make, room, kind):
    model = get_peft_model(make(), KINDS[kind]()).eval()
    room = getattr(model.config, "max_position_embeddings", room) - (2 if make is roberta else 0)
    decoder = make is bart and kind in ("prefix", "p-tuning-v2")
    side = "decoder_input_ids" if decoder else "input_ids"
    rest = {"input_ids": ids(1, 3)} if decoder else {"decoder_input_ids": ids(1, 3)} if make is bart else {}
    fits, over = (torch.full((1, n), 5) for n in (room - 4, room - 3))
    model(**{side: fits, **rest})
    with pytest.raises(ValueError, match=f"takes {room + 1} positions with the prompt's 4, and the model has {room}"):
        model(**{side: over, **rest})
