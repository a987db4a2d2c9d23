"""What all soft prompts must get right: text's own equal, padding, generation, mixed batches, gradients, shapes."""

from __future__ import annotations

import pytest
import torch
import transformers

import deltatune
from deltatune import LoraConfig, PeftModel, get_peft_model
from methods.prompt_models import DECODERS, ROWS, SEQ2SEQ, bart, mistral, padded, roberta
from tiny import bert, gpt2, ids, llama, shake, t5

PROMPT = {"num_virtual_tokens": 4}
KINDS = {
    "prompt": lambda task: deltatune.PromptTuningConfig(task_type=task, **PROMPT),
    "prefix": lambda task: deltatune.PrefixTuningConfig(task_type=task, **PROMPT),
    "p-tuning": lambda task: deltatune.PromptEncoderConfig(task_type=task, encoder_hidden_size=8, **PROMPT),
}


def adapted(make, kind, task="CAUSAL_LM", scale=0.5):
    torch.manual_seed(3)
    model = get_peft_model(make(), KINDS[kind](task)).eval()
    shake(model, scale=scale)
    return model


def set_prompt(model, table):
    with torch.no_grad():
        model.get_base_model().prompt_encoder.default.embedding.weight.copy_(table)


# ---------------------------------------------------------------------- against text
TEXT = [11, 4, 58, 27]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_of_real_tokens_is_those_tokens(name, side):
    make = DECODERS[name]
    model = get_peft_model(make(), KINDS["prompt"]("CAUSAL_LM")).eval()
    base = make()
    set_prompt(model, base.get_input_embeddings()(torch.tensor(TEXT)))
    tokens, mask = padded(ROWS, side)
    with torch.no_grad():
        got = model(input_ids=tokens, attention_mask=mask).logits
        for i, row in enumerate(ROWS):
            wanted = base(input_ids=torch.tensor([TEXT + row])).logits[0, len(TEXT) :]
            assert torch.allclose(got[i][mask[i].bool()], wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_of_real_keys_is_those_tokens(name):
    make = DECODERS[name]
    model = get_peft_model(make(), KINDS["prefix"]("CAUSAL_LM")).eval()
    base = make()
    cache = base(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    deltatune.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    tokens, mask = padded(ROWS)
    with torch.no_grad():
        got = model(input_ids=tokens, attention_mask=mask).logits
        for i, row in enumerate(ROWS):
            wanted = base(input_ids=torch.tensor([TEXT + row])).logits[0, len(TEXT) :]
            assert torch.allclose(got[i][mask[i].bool()], wanted, atol=1e-5)


def test_an_encoder_prompt_of_real_tokens_is_those_tokens():
    base = bert(kind="BertForTokenClassification")
    model = get_peft_model(bert(kind="BertForTokenClassification"), KINDS["prompt"]("TOKEN_CLS")).eval()
    set_prompt(model, base.get_input_embeddings()(torch.tensor(TEXT)))
    tokens, mask = padded(ROWS, "right")
    got = model(input_ids=tokens, attention_mask=mask, token_type_ids=torch.zeros_like(tokens)).logits
    for i, row in enumerate(ROWS):
        wanted = base(input_ids=torch.tensor([TEXT + row])).logits[0, len(TEXT) :]
        assert torch.allclose(got[i][mask[i].bool()], wanted, atol=1e-5)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_prompts_of_both_stacks_are_tokens_of_both(name):
    make = SEQ2SEQ[name]
    config = deltatune.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2, **PROMPT)
    model, base = get_peft_model(make(), config).eval(), make()
    head = [13, 2, 40, 6]
    set_prompt(model, base.get_input_embeddings()(torch.tensor(TEXT + head)))
    tokens, mask = padded(ROWS, "right")
    target = ids(3, 5)
    got = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=target).logits
    for i, row in enumerate(ROWS):
        one = {"input_ids": torch.tensor([TEXT + row]), "decoder_input_ids": torch.tensor([head + target[i].tolist()])}
        assert torch.allclose(got[i], base(**one).logits[0, 4:], atol=1e-5)


# ---------------------------------------------------------------------- generation
def generate(model, tokens, mask, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(input_ids=tokens, attention_mask=mask, **options)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_the_same_with_cache_padding_and_alone(name, kind):
    model = adapted(DECODERS[name], kind, scale=1.0)
    tokens, mask = padded(ROWS)
    n = tokens.shape[1]
    wanted = generate(model, tokens, mask)[:, n:]
    assert torch.equal(wanted, generate(model, tokens, mask, use_cache=False)[:, n:])
    for i, row in enumerate(ROWS):
        alone = torch.tensor([row])
        assert torch.equal(generate(model, alone, torch.ones_like(alone))[0, len(row) :], wanted[i])
    with model.disable_adapter():
        assert not torch.equal(generate(model, tokens, mask)[:, n:], wanted)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beams_do_not_depend_on_the_cache(name, kind):
    model = adapted(DECODERS[name], kind, scale=1.0)
    tokens, mask = padded(ROWS)
    wanted = generate(model, tokens, mask, num_beams=3)
    assert torch.equal(wanted, generate(model, tokens, mask, num_beams=3, use_cache=False))


@pytest.mark.parametrize("kind", ["prompt", "prefix", "cross", "both"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_sequence_to_sequence_generation(name, kind):
    config = {
        "prompt": lambda: deltatune.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", **PROMPT),
        "both": lambda: deltatune.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2, **PROMPT),
        "prefix": lambda: deltatune.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **PROMPT),
        "cross": lambda: deltatune.PrefixTuningConfig(
            task_type="SEQ_2_SEQ_LM", prefix_attention=["encoder", "decoder", "cross"], **PROMPT
        ),
    }[kind]()
    model = get_peft_model(SEQ2SEQ[name](), config).eval()
    shake(model, scale=1.0)
    tokens, mask = padded(ROWS, "right")
    for options in ({}, {"num_beams": 3}):
        wanted = generate(model, tokens, mask, **options)
        assert torch.equal(wanted, generate(model, tokens, mask, use_cache=False, **options))
    alone = generate(model, torch.tensor([ROWS[1]]), torch.ones(1, 3, dtype=torch.long))
    assert torch.equal(alone[0], generate(model, tokens, mask)[1])


def test_a_fixed_size_cache_serves_a_prefix_and_refuses_a_prompt():
    tokens, mask = padded(ROWS)
    model = adapted(llama, "prefix", scale=1.0)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, tokens, mask, **static), generate(model, tokens, mask))
    with pytest.raises(ValueError, match="fixed-size cache"):
        generate(adapted(llama, "prompt"), tokens, mask, **static)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when inductor is imported
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "bert"])
def test_a_prefix_is_the_same_in_every_attention_implementation(name):
    make = {**DECODERS, "bert": lambda: bert(kind="BertForTokenClassification")}[name]
    tokens, mask = padded(ROWS)
    outs = []
    for implementation in ("sdpa", "eager", "flex_attention"):
        base = make()
        base.set_attn_implementation(implementation)
        model = get_peft_model(base, deltatune.PrefixTuningConfig(**PROMPT)).eval()
        width = base.prompt_encoder.default.embedding.embedding_dim
        set_prompt(model, torch.randn(4, width, generator=torch.Generator().manual_seed(1)))
        with torch.no_grad():
            outs.append(model(input_ids=tokens, attention_mask=mask).logits[mask.bool()])
    assert torch.allclose(outs[0], outs[1], atol=1e-5)
    assert torch.allclose(outs[0], outs[2], atol=1e-5)


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "t5", "bart", "bert"])
def test_checkpointing_gives_the_same_gradients(name, kind):
    make, task = {
        "llama": (llama, "CAUSAL_LM"), "t5": (t5, "SEQ_2_SEQ_LM"), "bart": (bart, "SEQ_2_SEQ_LM"),
        "bert": (lambda: bert(kind="BertForTokenClassification"), "TOKEN_CLS"),
    }[name]  # fmt: skip
    labels = ids() % 2 if name == "bert" else ids()
    grads = []
    for checkpointing in (False, True):
        model = adapted(make, kind, task)
        if checkpointing:
            model.gradient_checkpointing_enable()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        model.train()
        torch.manual_seed(0)
        model(input_ids=ids(), labels=labels).loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.abs().sum() > 0 for g in grads[0].values()), name
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("task", "name", "labels"),
    [
        ("SEQ_CLS", "BertForSequenceClassification", {"labels": torch.tensor([0, 1, 1])}),
        ("TOKEN_CLS", "BertForTokenClassification", {"labels": ids() % 2}),
        ("QUESTION_ANS", "BertForQuestionAnswering", {
            "start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 6])}),
        ("FEATURE_EXTRACTION", "BertModel", {}),
    ],
)  # fmt: skip
def test_every_task_has_outputs_of_the_callers_shape(task, name, labels, kind):
    base, model = bert(kind=name), adapted(lambda: bert(kind=name), kind, task)
    options = {"output_hidden_states": True, **labels}
    wanted, got = base(input_ids=ids(), **options), model(input_ids=ids(), **options)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        shapes = [v.shape for v in value] if isinstance(value, tuple) else value.shape
        assert shapes == ([v.shape for v in got[key]] if isinstance(value, tuple) else got[key].shape)
    if labels:
        got.loss.backward()
        heads = [n for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder" not in n]
        assert heads
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loss_with_a_prompt_is_that_of_the_text_alone():
    model = adapted(llama, "prompt")
    out = model(input_ids=ids(), labels=ids())
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    assert torch.allclose(out.loss, wanted)
    tuples = model(input_ids=ids(), labels=ids(), return_dict=False)
    assert torch.equal(tuples[1], out.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_that_pool_the_last_token_find_it(kind):
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 3
    make = lambda: transformers.LlamaForSequenceClassification(config).eval()  # noqa: E731
    torch.manual_seed(0)
    model = get_peft_model(make(), KINDS[kind]("SEQ_CLS")).eval()
    tokens, mask = padded(ROWS, "right")
    together = model(input_ids=tokens, attention_mask=mask).logits
    for i, row in enumerate(ROWS):
        assert torch.allclose(model(input_ids=torch.tensor([row])).logits[0], together[i], atol=1e-5)


def test_embeddings_may_be_given_in_place_of_tokens():
    model = adapted(llama, "prompt")
    x = model.get_base_model().get_input_embeddings()(ids())
    assert torch.equal(model(inputs_embeds=x).logits, model(input_ids=ids()).logits)
    with pytest.raises(ValueError, match="input_ids and inputs_embeds are both given"):
        model.get_base_model().model(input_ids=ids(), inputs_embeds=x)


def test_packed_rows_see_a_prefix_and_are_refused_with_a_prompt():
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    tokens = ids(1, 7)
    model = adapted(llama, "prefix", scale=1.0)
    together = model(input_ids=tokens, position_ids=packed, use_cache=False).logits
    assert torch.allclose(together[:, :4], model(input_ids=tokens[:, :4]).logits, atol=1e-5)
    assert torch.allclose(together[:, 4:], model(input_ids=tokens[:, 4:]).logits, atol=1e-5)
    model = adapted(llama, "prompt")
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=tokens, position_ids=packed, use_cache=False)
    rising = torch.arange(7)[None]
    assert torch.equal(model(input_ids=tokens, position_ids=rising).logits, model(input_ids=tokens).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])  # padding's positions may be anything
    padded_positions = torch.tensor([[1, 1, 0, 1, 2, 3, 4]])
    wanted = model(input_ids=tokens[:, 2:]).logits
    given = model(input_ids=tokens, attention_mask=mask, position_ids=padded_positions).logits[:, 2:]
    assert torch.allclose(given, wanted, atol=1e-5)


# ---------------------------------------------------------------------- together
def company(make=llama, **lengths):
    """A model with a prompt, a longer prompt, a prefix, a longer prefix and a LoRA."""
    model = get_peft_model(make(), deltatune.PromptTuningConfig(num_virtual_tokens=2), "short")
    model.add_adapter("long", deltatune.PromptTuningConfig(num_virtual_tokens=5))
    model.add_adapter("prefix", deltatune.PrefixTuningConfig(num_virtual_tokens=3))
    model.add_adapter("deep", deltatune.PrefixTuningConfig(num_virtual_tokens=6))
    model.add_adapter("lora", LoraConfig(r=2, init_lora_weights=False))
    shake(model, scale=0.5)
    return model.eval()


NAMES = ["short", "__base__", "long", "prefix", "lora", "deep", "short"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_batch_of_different_prompts_by_row(name):
    model = company(DECODERS[name])
    rows = [ROWS[i % 3] for i in range(len(NAMES))]
    tokens, mask = padded(rows)
    mixed = model(input_ids=tokens, attention_mask=mask, adapter_names=NAMES).logits
    answers = generate(model, tokens, mask, adapter_names=NAMES)[:, tokens.shape[1] :]
    for i, (adapter, row) in enumerate(zip(NAMES, rows, strict=True)):
        one = torch.tensor([row])
        if adapter == "__base__":
            with model.disable_adapter():
                alone, said = model(input_ids=one).logits[0], generate(model, one, torch.ones_like(one))
        else:
            model.set_adapter(adapter)
            alone, said = model(input_ids=one).logits[0], generate(model, one, torch.ones_like(one))
        assert torch.allclose(mixed[i][mask[i].bool()], alone, atol=2e-5), adapter
        assert torch.equal(answers[i], said[0, len(row) :]), adapter


def test_a_mixed_batch_without_a_mask_and_its_gradients():
    model = company()
    names = ["short", "long", "prefix"]
    model.train()
    model(input_ids=ids(), adapter_names=names).logits.square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, name in enumerate(names):
        model.set_adapter(name)
        model(input_ids=ids()[i : i + 1]).logits.square().sum().backward()
    alone = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    assert all(torch.allclose(mixed[n], alone[n], rtol=1e-3, atol=1e-4) for n in mixed)


def test_prompts_of_an_encoder_decoder_by_row():
    model = get_peft_model(t5(), deltatune.PromptTuningConfig(num_virtual_tokens=2), "short")
    model.add_adapter("long", deltatune.PromptTuningConfig(num_virtual_tokens=5, num_transformer_submodules=2))
    shake(model, scale=0.5)
    model.eval()
    target = ids(3, 4)
    mixed = model(input_ids=ids(), decoder_input_ids=target, adapter_names=["short", "long", "__base__"]).logits
    for i, name in enumerate(["short", "long"]):
        model.set_adapter(name)
        alone = model(input_ids=ids()[i : i + 1], decoder_input_ids=target[i : i + 1]).logits
        assert torch.allclose(mixed[i], alone[0], atol=1e-4)
    with model.disable_adapter():
        assert torch.allclose(mixed[2], model(input_ids=ids(), decoder_input_ids=target).logits[2], atol=1e-4)


def test_a_prompt_and_a_lora_stack():
    model = company()
    tokens, mask = padded(ROWS)
    model.set_adapter(["short", "lora"])
    both = model(input_ids=tokens, attention_mask=mask).logits
    model.set_adapter("lora")
    model.merge_adapter(["lora"])
    model.set_adapter("short")
    assert torch.allclose(model(input_ids=tokens, attention_mask=mask).logits, both, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter(["short", "long"])  # two prompts stand one after the other
    x = model.adapters.edits
    joined = torch.cat([x[n][0].encoder.embedding.weight for n in ("short", "long")])
    alone = get_peft_model(llama(), deltatune.PromptTuningConfig(num_virtual_tokens=7)).eval()
    set_prompt(alone, joined)
    wanted = alone(input_ids=tokens, attention_mask=mask).logits
    assert torch.allclose(model(input_ids=tokens, attention_mask=mask).logits, wanted, atol=1e-5)


def test_prompts_come_and_go_without_a_trace(tmp_path):
    base = llama()
    wanted = base(input_ids=ids()).logits
    names = [n for n, _ in base.named_parameters()]
    model = get_peft_model(base, deltatune.PromptTuningConfig(num_virtual_tokens=2), "a")
    model.add_adapter("b", deltatune.PrefixTuningConfig(num_virtual_tokens=2))
    assert "base_model.model.prompt_encoder.a.embedding.weight" in dict(model.named_parameters())
    model.rename_adapter("a", "c")
    assert "base_model.model.prompt_encoder.c.embedding.weight" in dict(model.named_parameters())
    model.set_adapter(["c", "b"])
    live = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "c", adapter_name="c")
    again.load_adapter(tmp_path / "b", "b")
    again.set_adapter(["c", "b"])
    assert torch.equal(again(input_ids=ids()).logits, live)
    model.delete_adapter("b")
    plain = model.unload()
    assert [n for n, _ in plain.named_parameters()] == names
    assert torch.equal(plain(input_ids=ids()).logits, wanted)
    assert plain.config._attn_implementation == "sdpa"


def test_sliding_windows_never_hide_a_prefix():
    model = adapted(mistral, "prefix", scale=1.0)
    tokens = ids(1, 12)
    first = model(input_ids=tokens).logits[0, -1]
    shake(model, scale=1.0, seed=9)
    assert not torch.allclose(model(input_ids=tokens).logits[0, -1], first, atol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_compiled_without_a_break(kind):
    model = adapted(llama, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=ids()).logits, model(input_ids=ids()).logits, atol=1e-5)


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (llama, lambda: deltatune.PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens must be 1 or more"),
        (llama, lambda: deltatune.PrefixTuningConfig(num_virtual_tokens=-1), "num_virtual_tokens must be 1 or more"),
        (llama, deltatune.PromptTuningConfig, "needs num_virtual_tokens"),
        (gpt2, lambda: deltatune.PromptTuningConfig(num_virtual_tokens=40), "leaves no room for input"),
        (llama, lambda: deltatune.PromptTuningConfig(task_type="SEQ_CLS", **PROMPT), "not what LlamaForCausalLM does"),
        (roberta, lambda: deltatune.PromptTuningConfig(task_type="CAUSAL_LM", **PROMPT), "it is a model for SEQ_CLS"),
        (llama, lambda: deltatune.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **PROMPT), "not what LlamaForCausalLM"),
        (llama, lambda: deltatune.PromptTuningConfig(token_dim=5, **PROMPT), "token_dim=5 was given"),
        (lambda: torch.nn.Linear(2, 2), lambda: deltatune.PromptTuningConfig(**PROMPT), "Linear embeds no tokens"),
        (llama, lambda: deltatune.PromptTuningConfig(prompt_tuning_init="TEXTS", **PROMPT), "did you mean 'TEXT'"),
        (llama, lambda: deltatune.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text=" ", **PROMPT),
         "prompt_tuning_init_text, and it is empty"),
        (llama, lambda: deltatune.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="x", **PROMPT),
         "needs tokenizer_name_or_path"),
        (llama, lambda: deltatune.PromptTuningConfig(
            prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="/nowhere/at/all", **PROMPT),
         "no tokenizer that can be loaded"),
        (llama, lambda: deltatune.PrefixTuningConfig(prefix_attention=["cross"], **PROMPT), "has no place in"),
        (llama, lambda: deltatune.AdaptionPromptConfig(adapter_len=2, adapter_layers=3), "the model has 2 layers"),
        (llama, lambda: deltatune.AdaptionPromptConfig(adapter_len=2), "needs adapter_layers"),
        (llama, lambda: deltatune.PromptEncoderConfig(encoder_reparameterization_type="LSTMS", **PROMPT), "'LSTM'"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused_in_a_sentence(make, config, message):
    base = make()
    with pytest.raises(ValueError, match=message) as caught:
        get_peft_model(base, config())
    assert "\n" not in str(caught.value)
    assert not hasattr(base, "prompt_encoder")


def test_an_input_that_is_too_long_with_its_prompt_is_refused():
    for kind in KINDS:
        model = adapted(gpt2, kind)
        model(input_ids=ids(1, 36))
        with pytest.raises(ValueError, match="takes 41 positions with the prompt's 4, and the model has 40"):
            model(input_ids=ids(1, 37))
