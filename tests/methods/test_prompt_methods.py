"""What is particular to each soft prompt: its encoder, its start, its counts, its bad input."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import deltatune
from deltatune import PeftModel, get_peft_model
from deltatune.methods.intrinsic_prompt import fit_subspace
from deltatune.methods.p_tuning import Template
from methods.prompt_models import qwen3
from tiny import bert, gpt2, ids, llama, shake, t5


def on_meta(kind, config):
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


# ---------------------------------------------------------------------- counts
def test_prefix_of_t5_large():
    config = transformers.T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, vocab_size=32128)
    model = on_meta("T5ForConditionalGeneration", config)
    prefix = deltatune.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=20)
    assert get_peft_model(model, prefix).get_nb_trainable_parameters() == (983_040, 738_651_136)


def test_prompt_of_bloom_560m():
    model = on_meta("BloomForCausalLM", transformers.BloomConfig(hidden_size=1024, n_layer=24, n_head=16))
    prompt = deltatune.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    trainable, total = get_peft_model(model, prompt).get_nb_trainable_parameters()
    assert (trainable, total) == (8_192, 559_222_784)
    assert 100 * trainable / total == 0.0014648902430985358


def test_p_tuning_of_roberta_large():
    config = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    model = on_meta("RobertaForSequenceClassification", config)
    prompt = deltatune.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=128)
    assert get_peft_model(model, prompt).get_nb_trainable_parameters() == (1_351_938, 355_662_082)


def test_llama_adapter_of_llama_7b():
    model = on_meta("LlamaForCausalLM", transformers.LlamaConfig())
    config = deltatune.AdaptionPromptConfig(adapter_len=10, adapter_layers=30, gate="tanh")
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == 30 * (10 * 4096 + 32) == 1_229_760


def test_p_tuning_v2_of_roberta_large():
    config = transformers.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    model = on_meta("RobertaModel", config)
    model = get_peft_model(model, deltatune.PTuningV2Config(num_virtual_tokens=128))
    assert model.get_nb_trainable_parameters()[0] == 2 * 24 * 1024 * 128


# ---------------------------------------------------------------------- prompt tuning
@pytest.fixture
def tokenizer(tmp_path):
    words = {w: i for i, w in enumerate(["[UNK]", "classify", "this", "message", "as", "spam", "[CLS]", "[SEP]"])}
    raw = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return fast, str(tmp_path / "tokenizer")


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_a_text_is_cut_or_repeated(tokenizer, rows):
    config = deltatune.PromptTuningConfig(
        num_virtual_tokens=rows, prompt_tuning_init="TEXT", prompt_tuning_init_text="classify this message",
        tokenizer_name_or_path=tokenizer[1],
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    wanted = llama().get_input_embeddings()(torch.tensor([1, 2, 3, 1, 2, 3, 1][:rows]))
    assert torch.equal(model.get_base_model().prompt_encoder.default.embedding.weight, wanted)


def test_sampled_vocabulary_gives_rows_of_the_table():
    model = get_peft_model(
        llama(), deltatune.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")
    )
    table = llama().get_input_embeddings().weight
    for row in model.get_base_model().prompt_encoder.default.embedding.weight:
        assert (table == row).all(1).any()


def test_loading_needs_no_tokenizer(tokenizer, tmp_path):
    import shutil

    config = deltatune.PromptTuningConfig(
        num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="spam",
        tokenizer_name_or_path=tokenizer[1],
    )  # fmt: skip
    get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tokenizer[1])
    PeftModel.from_pretrained(llama(), tmp_path / "adapter", low_cpu_mem_usage=True)


# ---------------------------------------------------------------------- prefix tuning
def test_a_projection_is_discarded_at_save_and_gives_the_same(tmp_path):
    config = deltatune.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=10)
    model = get_peft_model(llama(), config).eval()
    shake(model)
    live = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in state.items()} == {"prompt_embeddings": (4, 64)}  # P, 2 layers x 2 x 2 x 8
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.allclose(again(input_ids=ids()).logits, live, atol=1e-6)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        "base_model.model.prompt_encoder.default.embedding.weight"
    ]


def test_a_prefix_from_text_is_that_text(tokenizer):
    model = get_peft_model(gpt2(), deltatune.PrefixTuningConfig(num_virtual_tokens=3)).eval()
    deltatune.initialize_kv_prefix_from_text(model, tokenizer[0], text="classify this message", use_chat_template=False)
    wanted = gpt2()(input_ids=torch.cat([torch.tensor([[1, 2, 3]] * 3), ids()], 1)).logits[:, 3:]
    assert torch.allclose(model(input_ids=ids()).logits, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="the text has 1 tokens and the prefix 3"):
        deltatune.initialize_kv_prefix_from_text(model, tokenizer[0], text="spam")
    with pytest.raises(ValueError, match="is empty"):
        deltatune.initialize_kv_prefix_from_text(model, tokenizer[0], text=" ")


def test_every_attention_of_an_encoder_decoder_can_have_a_prefix():
    kinds = ["encoder", "decoder", "cross"]
    model = get_peft_model(t5(), deltatune.PrefixTuningConfig(num_virtual_tokens=3, prefix_attention=kinds)).eval()
    assert model.get_nb_trainable_parameters()[0] == 3 * 3 * 2 * 2 * 32
    base = model(input_ids=ids(), decoder_input_ids=ids(3, 5)).logits
    table = model.get_base_model().prompt_encoder.default.embedding.weight
    for i in range(3):
        with torch.no_grad():
            table[:, 128 * i : 128 * (i + 1)] += 1
        now = model(input_ids=ids(), decoder_input_ids=ids(3, 5)).logits
        assert not torch.allclose(now, base, atol=1e-3)
        base = now


def test_a_later_layers_prefix_leaves_earlier_layers_alone():
    model = get_peft_model(llama(), deltatune.PTuningV2Config(num_virtual_tokens=3, prefix_dropout=0.0)).eval()
    options = {"input_ids": ids(), "output_hidden_states": True}
    before = model(**options).hidden_states
    with torch.no_grad():
        model.get_base_model().prompt_encoder.default.embedding.weight[:, 32:] += 1  # the second layer's columns
    after = model(**options).hidden_states
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2], atol=1e-3)


def test_dropout_of_deep_prompts_is_for_training_only():
    model = get_peft_model(bert(), deltatune.PTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=3))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    assert not torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)


# ---------------------------------------------------------------------- p-tuning
HOLE = 999


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_placeholders_may_stand_anywhere(kind, tmp_path):
    config = deltatune.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type=kind, placeholder_token_id=HOLE
    )
    model = get_peft_model(llama(), config).eval()
    shake(model)
    tokens = torch.tensor([[HOLE, HOLE, 8, 9, 10, HOLE, 11, HOLE]])
    live = model(input_ids=tokens).logits
    virtual = model.adapters.edits["default"][0].result()
    x = llama().get_input_embeddings()(tokens.masked_fill(tokens == HOLE, 0)).clone()
    x[0, [0, 1, 5, 7]] = virtual
    assert torch.allclose(llama()(inputs_embeds=x).logits, live, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(again(input_ids=tokens).logits, live, atol=1e-6)
    live.sum().backward()
    grad = model.get_base_model().prompt_encoder.default.embedding.weight.grad
    assert (grad.abs().sum(1) > 0).all()
    said = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(
        said, model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    )
    with pytest.raises(ValueError, match="row 0 holds the placeholder 999 1 times and the prompt has 4"):
        model(input_ids=torch.tensor([[HOLE, 3]]))


def test_order_and_place_of_virtual_tokens_matter():
    config = deltatune.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=6, placeholder_token_id=HOLE)
    model = get_peft_model(llama(), config).eval()
    shake(model, scale=0.5)
    first, last = torch.tensor([[HOLE, HOLE, 5, 6]]), torch.tensor([[HOLE, 5, HOLE, 6]])
    assert not torch.allclose(model(input_ids=first).logits[:, -1], model(input_ids=last).logits[:, -1], atol=1e-4)
    plain = deltatune.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=6)
    front = get_peft_model(llama(), plain).eval()
    front.get_base_model().prompt_encoder.default.load_state_dict(
        model.get_base_model().prompt_encoder.default.state_dict()
    )
    assert torch.allclose(front(input_ids=first[:, 2:]).logits, model(input_ids=first).logits[:, 2:], atol=1e-5)


def test_a_template_is_tokens_with_holes(tokenizer):
    template = Template("<2> {text} as <1>", HOLE)
    assert template.num_virtual_tokens == 3
    assert template.encode(tokenizer[0], text="this message") == [HOLE, HOLE, 2, 3, 4, HOLE]
    with pytest.raises(ValueError, match="has no virtual tokens"):
        Template("{text}", HOLE)


# ---------------------------------------------------------------------- multitask
def test_tasks_by_row_and_their_transfer(tmp_path):
    config = deltatune.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2)
    model = get_peft_model(llama(), config).eval()
    shake(model, scale=0.5)
    tasks = torch.tensor([2, 0, 1])
    together = model(input_ids=ids(), task_ids=tasks).logits
    for i, task in enumerate(tasks.tolist()):
        alone = model(input_ids=ids()[i : i + 1], task_ids=torch.tensor([task])).logits
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "task_ids": tasks, "num_beams": 2}
    said = model.generate(input_ids=ids(), **options)
    assert torch.equal(said, model.generate(input_ids=ids(), use_cache=False, **options))
    with pytest.raises(ValueError, match="this prompt has 3 tasks; give task_ids"):
        model(input_ids=ids())
    with pytest.raises(ValueError, match="task_ids must be between 0 and 2"):
        model(input_ids=ids(), task_ids=torch.tensor([0, 1, 3]))

    model.save_pretrained(tmp_path)
    source = {"num_virtual_tokens": 3, "num_ranks": 2, "prompt_tuning_init_state_dict_path": str(tmp_path)}
    exact = deltatune.MultitaskPromptTuningConfig(
        prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_task=1, **source
    )
    wanted = model(input_ids=ids(), task_ids=torch.tensor([1, 1, 1])).logits
    assert torch.allclose(get_peft_model(llama(), exact)(input_ids=ids()).logits, wanted, atol=1e-5)
    mean = deltatune.MultitaskPromptTuningConfig(prompt_tuning_init="AVERAGE_SOURCE_TASKS", **source)
    encoder = get_peft_model(llama(), mean).get_base_model().prompt_encoder.default
    own = model.get_base_model().prompt_encoder.default
    assert torch.allclose(encoder.prefix_task_cols[0], own.prefix_task_cols.mean(0))
    shared = deltatune.MultitaskPromptTuningConfig(prompt_tuning_init="ONLY_SOURCE_SHARED", **source)
    encoder = get_peft_model(llama(), shared).get_base_model().prompt_encoder.default
    assert torch.equal(encoder.embedding.weight, own.embedding.weight)
    with pytest.raises(ValueError, match="needs prompt_tuning_init_state_dict_path"):
        deltatune.MultitaskPromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="EXACT_SOURCE_TASK")


def test_tasks_of_rows_with_adapters_of_their_own():
    """`generate` sorts rows by adapter only where no task goes with them."""
    config = deltatune.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2)
    model = get_peft_model(llama(), config).eval()
    model.add_adapter("b", config)
    shake(model, scale=2.0)
    names, tasks = ["default", "b", "default"], torch.tensor([2, 0, 1])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids())}
    said = model.generate(input_ids=ids(), adapter_names=names, task_ids=tasks, **options)
    other = model.generate(input_ids=ids(), adapter_names=names, task_ids=tasks[[0, 2, 1]], **options)
    assert not torch.equal(said, other)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, name in enumerate(names):
        alone = model.generate(input_ids=ids()[i : i + 1], adapter_names=[name], task_ids=tasks[i : i + 1], **options)
        assert torch.equal(said[i], alone[0])


# ---------------------------------------------------------------------- intrinsic
def test_a_subspace_is_found_and_searched(tmp_path):
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 3 * 32, generator=generator)
    prompts = [(torch.randn(2, generator=generator) @ basis).view(3, 32) for _ in range(6)]
    options = {"intrinsic_dim": 4, "decoder_hidden_size": 16}
    losses = fit_subspace(prompts, tmp_path / "decoder.safetensors", steps=150, lr=3e-3, **options)
    assert losses[-1] < 0.2 * losses[0]
    config = deltatune.IntrinsicPromptConfig(
        num_virtual_tokens=3, decoder_path=str(tmp_path / "decoder.safetensors"), **options
    )
    model = get_peft_model(llama(), config)
    assert model.get_nb_trainable_parameters()[0] == 4
    decoder = load_file(tmp_path / "decoder.safetensors")
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["base_model.model.prompt_encoder.default.embedding.weight"]
    encoder = model.get_base_model().prompt_encoder.default
    assert torch.equal(encoder.decoder_output.weight, decoder["decoder_output.weight"])
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
    with pytest.raises(ValueError, match="does not fit: decoder_hidden.weight"):
        get_peft_model(llama(), deltatune.IntrinsicPromptConfig(
            num_virtual_tokens=3, intrinsic_dim=5, decoder_path=config.decoder_path))  # fmt: skip
    with pytest.raises(ValueError, match="needs two or more prompts of one shape"):
        fit_subspace(prompts[:1], tmp_path / "x")


# ---------------------------------------------------------------------- LLaMA-Adapter
@pytest.mark.parametrize("gate", ["scalar", "tanh"])
@pytest.mark.parametrize("make", [llama, qwen3])
def test_zero_init_attention(make, gate):
    config = deltatune.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, gate=gate)
    model = get_peft_model(make(), config)
    assert torch.equal(model(input_ids=ids()).logits, make()(input_ids=ids()).logits)
    model(input_ids=ids(), labels=ids()).loss.backward()
    grads = {n.split(".")[-2]: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert (grads["adaption_gate"] != 0).all()
    assert (grads["adaption_prompt"] == 0).all()
    model.eval()
    shake(model, scale=0.5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    said = model.generate(input_ids=ids(), **options)
    assert torch.equal(said, model.generate(input_ids=ids(), use_cache=False, **options))
    hidden = [m(input_ids=ids(), output_hidden_states=True).hidden_states for m in (model, make())]
    assert torch.equal(hidden[0][1], hidden[1][1])  # below the top layer nothing changes
    assert not torch.allclose(hidden[0][2], hidden[1][2], atol=1e-3)


def test_adaption_prompts_by_row():
    model = get_peft_model(llama(), deltatune.AdaptionPromptConfig(adapter_len=3, adapter_layers=2), "a")
    model.add_adapter("b", deltatune.AdaptionPromptConfig(adapter_len=5, adapter_layers=1, gate="tanh"))
    model.add_adapter("l", deltatune.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    shake(model, scale=0.5)
    model.eval()
    mixed = model(input_ids=ids(), adapter_names=["b", "a", "l"]).logits
    for i, name in enumerate(["b", "a", "l"]):
        model.set_adapter(name)
        assert torch.allclose(mixed[i], model(input_ids=ids()[i : i + 1]).logits[0], atol=1e-5)


def test_adaption_prompts_need_separate_keys():
    with pytest.raises(ValueError, match="no attention with separate key and value layers"):
        get_peft_model(gpt2(), deltatune.AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    config = deltatune.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="self_att")
    with pytest.raises(ValueError, match="did you mean 'self_attn'"):
        get_peft_model(llama(), config)
