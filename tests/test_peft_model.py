"""The public face: what peft's users write runs as written."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import threading
import types
from concurrent import futures
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import deltatune
from deltatune import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    kernels,
    load_peft_weights,
    set_peft_model_state_dict,
)
from tiny import bert, gpt2, ids, llama, shake, t5

CAUSAL = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def test_the_snippet_everyone_knows(tmp_path, capsys):
    base_dir, output_dir = tmp_path / "base", tmp_path / "out"
    t5().save_pretrained(base_dir)
    model = AutoModelForSeq2SeqLM.from_pretrained(base_dir)
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    trainable = 6 * 2 * 8 * (32 + 32)  # q and v of two encoder, two decoder and two cross attentions
    assert f"trainable params: {trainable:,d} ||" in capsys.readouterr().out
    shake(model)
    model.eval()
    x = ids()
    live = model(input_ids=x, labels=x).logits
    model.save_pretrained(output_dir)
    config = PeftConfig.from_pretrained(output_dir)
    assert isinstance(config, LoraConfig)
    assert config.r == 8
    assert config.base_model_name_or_path == str(base_dir)
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path), output_dir)
    assert type(model).__name__ == "PeftModelForSeq2SeqLM"
    assert torch.equal(model(input_ids=x, labels=x).logits, live)
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "T5ForConditionalGeneration"
    assert torch.allclose(merged(input_ids=x, labels=x).logits, live, atol=1e-5)


def test_auto_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**CAUSAL))
    shake(model)
    model.save_pretrained(tmp_path / "out")
    x = ids()
    for auto in (AutoPeftModelForCausalLM, AutoPeftModel):
        again = auto.from_pretrained(tmp_path / "out")
        assert torch.equal(again(x).logits, model(x).logits)
        assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match="is for CAUSAL_LM"):
        deltatune.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    trainable = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_names_are_those_users_know():
    names = dict(get_peft_model(bert(kind="BertModel"), LoraConfig(r=8, target_modules=["query"])).named_parameters())
    stem = "base_model.model.encoder.layer.0.attention.self.query"
    assert f"{stem}.weight" in names
    assert names[f"{stem}.lora_A.default.weight"].shape == (8, 32)
    assert not any("base_layer" in n for n in names)


def test_nothing_of_the_base_moves_or_is_wrapped():
    base = llama()
    before = {n: id(p) for n, p in base.named_parameters()}
    q = base.model.layers[0].self_attn.q_proj
    get_peft_model(base, LoraConfig(**CAUSAL))
    assert base.model.layers[0].self_attn.q_proj is q
    assert isinstance(q, nn.Linear)
    assert type(q).__name__ == "Linear"
    after = {n: id(p) for n, p in base.named_parameters()}
    assert all(after[n] == i for n, i in before.items())


@pytest.mark.parametrize(
    ("task", "kind", "head"),
    [
        ("SEQ_CLS", "BertForSequenceClassification", "classifier"),
        ("TOKEN_CLS", "BertForTokenClassification", "classifier"),
        ("QUESTION_ANS", "BertForQuestionAnswering", "qa_outputs"),
    ],
)
def test_heads_train_and_are_saved(task, kind, head, tmp_path):
    model = get_peft_model(bert(kind=kind), LoraConfig(task_type=task, target_modules=["query"]))
    name = f"base_model.model.{head}.modules_to_save.default.weight"
    assert dict(model.named_parameters())[name].requires_grad
    shake(model)
    live = model(ids())[0]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert f"base_model.model.{head}.weight" in set(file.keys())
    again = PeftModel.from_pretrained(bert(kind=kind), tmp_path)
    assert torch.equal(again(ids())[0], live)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(ids())[0], live, atol=1e-5)


def test_trained_copies_count_once():
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))
    lora, head = 2 * 4 * 64, 32 * 2 + 2
    base = sum(p.numel() for p in bert().parameters())
    assert model.get_nb_trainable_parameters() == (lora + head, base + lora)


def test_several_adapters():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(target_modules="all-linear", r=2))
    shake(model)
    x = ids()
    with model.disable_adapter():
        base = model(x).logits
    outs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        outs[name] = model(x).logits
    names = ["b", "__base__", "default"]
    mixed = model(x, adapter_names=names).logits
    for i, n in enumerate(names):
        assert torch.allclose(mixed[i], outs.get(n, base)[i], atol=1e-5)
    model.rename_adapter("b", "c")
    model.set_adapter("c")
    assert torch.equal(model(x).logits, outs["b"])
    assert any(n.endswith("lora_A.c.weight") for n, _ in model.named_parameters())
    model.delete_adapter("c")
    assert model.active_adapters == ["default"]
    assert torch.equal(model(x).logits, outs["default"])
    assert not any(".c." in n for n, _ in model.named_parameters())
    unhosted = model.get_base_model().model.layers[0].mlp.up_proj
    assert type(unhosted) is nn.Linear


def test_activity_and_training_are_separate():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == 0
    model.add_adapter("b", LoraConfig(**CAUSAL))
    assert all(("lora" in n and ".b." in n) == p.requires_grad for n, p in model.named_parameters())


def test_two_adapters_train_in_one_step():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(**CAUSAL))
    x = ids(2)
    model.train()
    model(x, labels=x, adapter_names=["default", "b"]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_recomputed_blocks_run_under_the_adapters_they_had():
    x = ids(2)
    grads = []
    for options, mode in ((None, "fused"), ({}, "fused"), ({"use_reentrant": True}, "fused"), ({}, "plain")):
        model = get_peft_model(llama(), LoraConfig(**CAUSAL, init_lora_weights=False))
        torch.manual_seed(0)
        model.add_adapter("b", LoraConfig(**CAUSAL))
        shake(model)
        if options is not None:
            model.gradient_checkpointing_enable(options)
        model.train()
        with kernels.use(mode):
            loss = model(x, labels=x).loss + model(x, labels=x, adapter_names=["default", "b"]).loss
        with model.disable_adapter():
            loss = loss + model(x, labels=x).loss
        loss.backward()  # after the calls are over
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][n], g[n], atol=1e-6) for g in grads[1:] for n in g)


@pytest.mark.parametrize("names", [None, ["default", "b"]])
def test_recomputed_blocks_compile_whole(names):
    x, grads = ids(2), []
    model = get_peft_model(llama(use_cache=False), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(**CAUSAL))
    shake(model)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, compiled):
        model.zero_grad()
        run(x, labels=x, adapter_names=names).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, rtol=1e-4, atol=1e-6)


def test_what_is_chosen_while_disabled_runs_afterwards():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(**CAUSAL))
    shake(model)
    x = ids(2)
    with model.disable_adapter():
        base = model(x).logits
        model.set_adapter("b")
        assert torch.equal(model(x).logits, base)
        with model.disable_adapter():
            assert torch.equal(model(x).logits, base)
        assert torch.equal(model(x).logits, base)
    torch.testing.assert_close(model(x).logits, model(x, adapter_names=["b", "b"]).logits)


def test_disabling_in_two_threads_ends_with_the_last():
    plan = get_peft_model(llama(), LoraConfig(**CAUSAL)).adapters.plan
    one, two = plan.disabled(), plan.disabled()
    with one:
        two.__enter__()
    assert not plan.state.names
    two.__exit__(None, None, None)
    assert plan.enabled
    assert plan.state.names == ("default",)


def test_two_threads_generate_at_once():
    """Every step of one meets a step of the other, and a third adapter becomes active in between."""
    model = get_peft_model(llama(), LoraConfig(**CAUSAL)).eval()
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(**CAUSAL))
    shake(model, 0.5)
    x = ids(2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(x)}
    rows = (["default", "b"], ["b", "__base__"])
    alone = [model.generate(x, adapter_names=names, **options) for names in rows]
    assert not torch.equal(*alone)
    barrier = threading.Barrier(2, timeout=30)

    def meet(*_):
        barrier.wait()
        model.set_adapter("c")

    handle = model.get_base_model().register_forward_pre_hook(meet)
    with futures.ThreadPoolExecutor(2) as pool:
        made = [pool.submit(model.generate, x, adapter_names=names, **options) for names in rows]
        for one, two in zip(alone, made, strict=True):
            assert torch.equal(two.result(), one)
    handle.remove()
    assert model.adapters.plan.state.names == ("c",)


class Norm(nn.LayerNorm):
    """Waits a moment for another call between two looks at its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.weight
        if meeting := self.__dict__.get("meeting"):
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.1)
        return super().forward(x) + before


def test_a_weight_that_is_put_in_place_is_no_other_threads():
    norm = Norm(8)
    model = get_peft_model(nn.Sequential(norm), LNTuningConfig(target_modules=["0"]))
    model.add_adapter("b", LNTuningConfig(target_modules=["0"]))
    shake(model)
    x, weight = torch.randn(2, 3, 8), norm.weight
    rows = (["default", "b"], ["b", "default"])
    alone = [model(x, adapter_names=names) for names in rows]
    norm.__dict__["meeting"] = threading.Barrier(2)
    with futures.ThreadPoolExecutor(2) as pool:
        made = [pool.submit(model, x, adapter_names=names) for names in rows]
        for one, two in zip(alone, made, strict=True):
            assert torch.equal(two.result(), one)
    assert norm.weight is weight


def test_generation_with_one_adapter_per_row_and_beams():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(**CAUSAL))
    shake(model, 0.5)
    x = ids(2)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(x)}
        alone = []
        for i, name in enumerate(("default", "b")):
            model.set_adapter(name)
            part = {**options, "attention_mask": options["attention_mask"][:1]}
            alone.append(model.generate(x[i : i + 1], **part)[0])
        mixed = model.generate(x, adapter_names=["default", "b"], **options)
        for row, one in zip(mixed, alone, strict=True):
            assert torch.equal(row[: len(one)], one)


@pytest.mark.parametrize(("make", "task"), [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_sorts_the_rows_once_and_gives_them_back_in_order(make, task, options, monkeypatch):
    model = get_peft_model(make(), LoraConfig(task_type=task))
    model.add_adapter("b", LoraConfig(task_type=task))
    shake(model, 0.5)
    x, seen = ids(4), []
    x[0, :2] = 0
    rows = model.adapters.rows

    def looked_at(names, positions):
        seen.append([name for name, _ in itertools.groupby(names)])
        return rows(names, positions)

    monkeypatch.setattr(model.adapters, "rows", looked_at)
    options = {
        **options,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "attention_mask": (x > 0).long(),
    }
    names = ["default", "b", "__base__", "b"]
    found = model.generate(input_ids=x, adapter_names=names, **options)
    assert seen == [["default", "b", "__base__"]]
    kept = model.generate(
        input_ids=x, adapter_names=names, logits_processor=transformers.LogitsProcessorList(), **options
    )
    assert torch.equal(found, kept)
    assert torch.equal(model.generate(x, adapter_names=names, **options), kept)
    assert not torch.equal(found, model.generate(x, adapter_names=["default"] * 4, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_rows_of_an_encoder_decoder_with_beams(options):
    model = get_peft_model(t5(), LoraConfig(task_type="SEQ_2_SEQ_LM"))
    model.add_adapter("b", LoraConfig(task_type="SEQ_2_SEQ_LM"))
    shake(model, 0.5)
    x = ids(2)
    options = {**options, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = []
    for i, name in enumerate(("default", "b")):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=x[i : i + 1], **options))
    mixed = model.generate(input_ids=x, adapter_names=["default", "b"], **options)
    assert torch.equal(mixed, torch.cat(alone))


def test_merged_and_live_adapters_go_together():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(target_modules="all-linear"))
    shake(model)
    model.set_adapter(["default", "b"])
    x = ids()
    both = model(x).logits
    for first in ("default", "b"):
        model.merge_adapter([first])
        assert torch.allclose(model(x).logits, both, atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(x).logits, both, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(x).logits, llama()(x).logits)
        model.unmerge_adapter()
        assert torch.equal(model(x).logits, both)


def test_unload_gives_the_base_bit_for_bit():
    base = llama()
    model = get_peft_model(base, LoraConfig(**CAUSAL, modules_to_save=["lm_head"]))
    shake(model)
    plain = model.unload()
    assert plain is base
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in llama().named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), llama().parameters(), strict=True))


def test_merging_a_tied_embedding_unties_it(tmp_path):
    model = get_peft_model(
        llama(tie_word_embeddings=True), LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    )
    shake(model)
    x = ids()
    live = model(x).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x).logits, live, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(again(x).logits, live, atol=1e-5)


def test_state_dict_functions(tmp_path):
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    shake(model)
    state = get_peft_model_state_dict(model)
    assert len(state) == 8
    assert all(k.startswith("base_model.model.") and "default" not in k for k in state)
    fresh = get_peft_model(llama(), LoraConfig(**CAUSAL))
    assert set_peft_model_state_dict(fresh, state).clean
    assert torch.equal(fresh(ids()).logits, model(ids()).logits)
    model.save_pretrained(tmp_path)
    assert {k: v.shape for k, v in load_peft_weights(tmp_path).items()} == {k: v.shape for k, v in state.items()}


def test_injection_without_a_wrapper():
    base = llama()
    same = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base)
    assert same is base
    shake(base)
    state = get_peft_model_state_dict(base)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    again = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama(), state_dict=state)
    assert torch.equal(again(ids()).logits, base(ids()).logits)


def test_any_module_can_be_adapted(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    shake(model)
    x = torch.randn(3, 4)
    live = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert torch.equal(PeftModel.from_pretrained(net, tmp_path)(x), live)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fused", [False, True])
def test_torch_encoder_layers_have_no_silent_fast_path(fused):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if fused else None
    with torch.no_grad():
        base = encoder(x, src_key_padding_mask=pad)
    model = get_peft_model(encoder, LoraConfig(target_modules=["linear1", "self_attn"]))
    shake(model)
    model.set_requires_grad("default", False)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=pad)
        assert not torch.allclose(out[0], base[0], atol=1e-3)
        restored = model.unload()(x, src_key_padding_mask=pad)
    assert torch.equal(restored, base)
    assert encoder.layers[0].activation_relu_or_gelu == 1


def test_sixteen_bit_bases_get_float32_adapters():
    model = get_peft_model(llama().bfloat16(), LoraConfig(**CAUSAL))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ids()).logits.dtype == torch.bfloat16
    model = get_peft_model(llama().bfloat16(), LoraConfig(**CAUSAL), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_meta_adapters_are_filled_by_loading(tmp_path):
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_status_tells_what_is_where():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    model.merge_adapter()
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.merged_adapters, status.peft_types) == (
        4, ["default"], {"default": "LORA"},
    )  # fmt: skip
    layer = model.get_layer_status()[0]
    assert layer.name == "model.model.layers.0.self_attn.q_proj"
    assert layer.requires_grad == {"default": True}
    assert deltatune.get_model_status(model).trainable_params == 4 * 8 * (32 + (32 + 16) // 2)


def test_configurations_round_trip(tmp_path):
    config = LoraConfig(r=3, target_modules=["a", "b"], rank_pattern={"x": 2}, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert get_peft_config(config.to_dict()) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]
    assert config.peft_type == PeftType.LORA == "LORA"
    assert "LORA" in PeftType
    assert PeftConfig.from_pretrained(tmp_path, r=5).r == 5


def test_deepcopy_is_independent():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    twin = copy.deepcopy(model)
    shake(twin)
    assert torch.equal(model(ids()).logits, llama()(ids()).logits)
    assert not torch.equal(twin(ids()).logits, model(ids()).logits)


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    import huggingface_hub

    pushed = {}

    class Hub:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            return types.SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            files = {p.name: p.stat().st_size for p in Path(folder_path).iterdir()}
            pushed.update(repo_id=repo_id, files=files, **options)
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    assert model.push_to_hub("tuned", token="secret", revision="v1") == "commit"
    assert set(pushed.pop("files")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert pushed == {
        "token": "secret",
        "repo_id": "me/tuned",
        "commit_message": "Upload adapter",
        "revision": "v1",
        "create_pr": False,
    }
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no route\nto host")))
    with pytest.raises(ValueError, match="could not push to 'tuned': no route$"):
        model.push_to_hub("tuned")


def test_gpt2_transposed_storage_is_detected():
    model = get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM"))
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    assert model.get_parameter(f"{stem}.lora_B.default.weight").shape == (96, 8)
    shake(model)
    live = model(ids()).logits
    assert torch.allclose(model.merge_and_unload()(ids()).logits, live, atol=1e-5)


def test_forward_signatures_name_the_inputs():
    from transformers.utils.generic import find_labels

    assert find_labels(deltatune.PeftModelForCausalLM) == ["labels"]
    assert find_labels(deltatune.PeftModelForQuestionAnswering) == ["start_positions", "end_positions"]


def test_lazy_names_and_types_agree():
    import ast

    tree = ast.parse(Path(deltatune.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == {k: v for k, v in deltatune._WHERE.items() if k in typed}
    assert set(deltatune._WHERE) == set(typed)
    assert all(getattr(deltatune, name) is not None for name in deltatune._WHERE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_for_good_writes_where_weights_stand_and_gives_the_same_numbers(dtype):
    def adapted():
        model = get_peft_model(llama().to(dtype), LoraConfig(target_modules="all-linear", init_lora_weights=False))
        torch.manual_seed(3)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.1)
        return model

    model = adapted()
    model.merge_adapter()
    wanted = {n: p.clone() for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    model = adapted()
    places = {n: p.data_ptr() for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    merged = model.merge_and_unload()
    assert {n: p.data_ptr() for n, p in merged.named_parameters()} == places
    assert all(torch.equal(p, wanted[n]) for n, p in merged.named_parameters())
    safe = adapted().merge_and_unload(safe_merge=True)
    assert all(torch.equal(p, wanted[n]) for n, p in safe.named_parameters())


def test_merging_for_good_leaves_a_shared_weight_to_its_other_reader():
    base = llama(tie_word_embeddings=True)
    embeddings = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        want = model(ids()).logits
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert torch.allclose(merged(ids()).logits, want, atol=1e-5)
