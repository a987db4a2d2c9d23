"""Merging from disk to disk: the same files as a merge in memory, little memory, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from deltatune import LoraConfig, get_peft_model
from deltatune.train import streaming
from deltatune.train.loading import Target
from deltatune.train.streaming import merge_stream
from tiny import llama, shake


@pytest.fixture
def places(tmp_path):
    """(target, base directory with several shards, output)."""
    base = tmp_path / "base"
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    options = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(r=4, use_dora=True, **options))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    return Target("adapter", str(base), adapter=tmp_path / "adapter"), base, tmp_path / "out", adapted


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_same_as_in_memory(places):
    from transformers import AutoModelForCausalLM

    target, base, out, adapted = places
    merge_stream(target, out)
    plain = adapted.merge_and_unload()
    wanted = plain.state_dict()
    written = tensors(out)
    assert sorted(written) == sorted(tensors(base))
    assert all(torch.allclose(written[k], wanted[k], atol=1e-6) for k in written)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(2, 60, (2, 7))
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    assert model.config.dtype == torch.float32
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert not list(out.parent.glob(".*partial"))


def saved_with(tmp_path, **options):
    """(target, output, the adapted model) of a LoRA that changes the model's configuration."""
    base = llama(tie_word_embeddings=False, max_position_embeddings=16)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    return Target("adapter", str(tmp_path / "base"), adapter=tmp_path / "adapter"), tmp_path / "out", adapted


def test_a_longer_context_is_in_the_configuration(tmp_path):
    from transformers import AutoModelForCausalLM

    target, out, adapted = saved_with(tmp_path, context_length=33)
    merge_stream(target, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.max_position_embeddings == 48
    ids = torch.randint(2, 60, (1, 30))
    assert torch.allclose(model(ids).logits, adapted(ids).logits, atol=1e-5)


def test_replicated_layers_are_not_in_the_files(tmp_path):
    target, out, _ = saved_with(tmp_path, layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(ValueError, match="layer_replication makes layers that the base's files lack"):
        merge_stream(target, out)


def test_goes_on_after_the_last_whole_shard(places, monkeypatch):
    target, _, out, _ = places
    written, real = [], streaming.write_shard

    def dies_at_the_third(shard, path, change):
        if len(written) == 2:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        real(shard, path, change)

    monkeypatch.setattr(streaming, "write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge_stream(target, out)
    assert not out.exists()
    again = []
    monkeypatch.setattr(streaming, "write_shard", lambda s, p, c: (again.append(p.name), real(s, p, c)))
    merge_stream(target, out)
    assert set(again).isdisjoint(written)
    shutil.move(out, out.with_name("first"))
    monkeypatch.setattr(streaming, "write_shard", real)
    merge_stream(target, out)
    one, two = tensors(out), tensors(out.with_name("first"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_nothing_is_kept_of_a_merge_that_rounded_otherwise(places, monkeypatch):
    target, base, out, _ = places
    recipe = out.parent / "recipe.yaml"
    target, real = replace(target, recipe=recipe), streaming.write_shard

    def dies_at_the_end(shard, path, change):
        if len(list(path.parent.glob("*.safetensors"))) == len(list(base.glob("*.safetensors"))) - 1:
            raise KeyboardInterrupt
        real(shard, path, change)

    def run_was(seed):
        recipe.write_text(f"train: {{merge_aware: {{seed: {seed}}}}}")

    run_was(0)
    monkeypatch.setattr(streaming, "write_shard", dies_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        merge_stream(target, out, quantization="4bit")
    monkeypatch.setattr(streaming, "write_shard", real)
    run_was(1)
    merge_stream(target, out, quantization="4bit")
    merge_stream(target, out.with_name("unbroken"), quantization="4bit")
    one, two = tensors(out), tensors(out.with_name("unbroken"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_another_type_and_a_quantised_base(places, tmp_path):
    target, base, out, _ = places
    merge_stream(target, out, dtype="bfloat16", quantization="4bit")
    written = tensors(out)
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    from deltatune.stores.nf4 import dequantize_nf4, quantize_nf4

    name = "model.layers.0.self_attn.k_proj.weight"  # not adapted, but what training saw was rounded
    w = tensors(base)[name]
    assert torch.equal(written[name], dequantize_nf4(quantize_nf4(w, double=True)).bfloat16())


def test_another_base(places):
    target, base, out, _ = places
    llama(seed=3, tie_word_embeddings=False).save_pretrained(base, max_shard_size="20KB")
    with pytest.raises(ValueError, match="made for another base: the numbers of model.layers.0"):
        merge_stream(target, out)
    assert not out.exists()


def test_what_is_refused_before_the_first_byte(places, monkeypatch):
    target, base, out, _ = places
    with pytest.raises(ValueError, match="overlap; choose another output directory"):
        merge_stream(target, base)
    with pytest.raises(ValueError, match="is no adapter"):
        merge_stream(Target("base", str(base)), out)
    with pytest.raises(ValueError, match="cannot be rounded tensor by tensor"):
        merge_stream(target, out, quantization="8bit")
    monkeypatch.setattr("deltatune.train.merging.shutil.disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="has 0.00 GB free; choose another disk"):
        merge_stream(target, out)
    assert not out.exists()
    assert not list(out.parent.glob(".*partial"))


def test_a_tied_weight_is_not_split(tmp_path):
    base = tmp_path / "base"
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match="shares its weight with another module; merge without --stream"):
        merge_stream(Target("adapter", str(base), adapter=tmp_path / "adapter"), tmp_path / "out")
