"""Merging: what is written equals the live adapter, and nothing is written when it cannot be."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltatune import LoraConfig, get_peft_model, quantize_model
from deltatune.train import merging
from deltatune.train.loading import find_target, load
from deltatune.train.merging import merge
from deltatune.train.streaming import merge_stream
from quantised import HERE
from small_runs import write_base, write_run
from tiny import llama

IDS = torch.tensor([[5, 9, 40, 7, 100]])
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merge")
    return write_run(root / "run", write_base(root / "base"))


def test_the_written_model_is_the_live_adapter(run: Path, tmp_path: Path) -> None:
    target = find_target(str(run))
    done = merge(target, tmp_path / "merged")
    live = load(target, dtype="float32").model
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, live(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert done.dtype == "float32"
    assert done.difference is not None
    assert done.difference.max < 1e-4 < 1e-2 < done.difference.adapter_effect
    assert done.difference.same_next_token == 1.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert not any(name.startswith("adapter") for name in names)
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]  # no temporary directory is left


def test_the_update_is_rounded_once_to_the_type_asked_for(run: Path, tmp_path: Path) -> None:
    full = merge(find_target(str(run)), tmp_path / "full", prompts=None)
    half = merge(find_target(str(run)), tmp_path / "half", dtype="bfloat16", prompts=None)
    exact = load_file(tmp_path / "full" / "model.safetensors")
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in exact)
    assert half.bytes < full.bytes
    assert half.difference is None


def test_the_card_says_what_was_merged(run: Path, tmp_path: Path) -> None:
    (run / "README.md").write_text("---\nlicense: mit\n---\n# My adapter\nTrained on rows.\n")
    merge(find_target(str(run)), tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    (run / "README.md").unlink()
    for words in ("library_name: transformers", "LORA of rank 4", "logits differ by at most", "## My adapter"):
        assert words in card
    assert "license: mit" not in card  # the adapter's front matter is not the merged model's


def test_where_nothing_may_be_written(run: Path, tmp_path: Path) -> None:
    target = find_target(str(run))
    for output in (run, run / "merged", Path(target.base)):
        with pytest.raises(ValueError, match="overlap; choose another"):
            merge(target, output, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        merge(target, tmp_path / "notes")
    with pytest.raises(ValueError, match="holds something that is no model"):
        merge(target, tmp_path / "notes", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        merge(target, tmp_path / "notes" / "a.txt")
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(find_target(target.base), tmp_path / "x")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_an_older_model_is_replaced_only_when_asked(run: Path, tmp_path: Path) -> None:
    target, output = find_target(str(run)), tmp_path / "merged"
    merge(target, output, prompts=None)
    (output / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="--overwrite"):
        merge(target, output, prompts=None)
    merge(target, output, prompts=None, overwrite=True)
    assert not (output / "old.txt").exists()


def test_a_full_disk_is_seen_before_the_first_byte(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"needs 0\.07 GB, but the disk .* has 0\.00 GB free"):
        merge(find_target(str(run)), tmp_path / "deep" / "merged")
    assert not (tmp_path / "deep").exists()


def test_a_merge_that_lost_the_adapter_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmerged(target, dtype, prompts, *rest):
        loaded = load(target, dtype="float32")
        before = merging._look(loaded, prompts) if prompts else None
        return loaded.model.unload(), loaded.tokenizer, before

    monkeypatch.setattr(merging, "_fold", unmerged)
    with pytest.raises(ValueError, match=r"would lose 100% of what .*; nothing was written"):
        merge(find_target(str(run)), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    assert merge(find_target(str(run)), tmp_path / "merged", prompts=None).difference is None


def test_a_write_that_fails_leaves_the_older_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, output = find_target(str(run)), tmp_path / "merged"
    merge(target, output, prompts=None)
    before = (output / "model.safetensors").read_bytes()

    def full(self, folder, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        merge(target, output, prompts=None, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "tied", tie_word_embeddings=True))
    assert merging.weight_bytes(base) >= 4 * sum(p.numel() for p in base.parameters())
    untied = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "untied"))
    assert merging.weight_bytes(untied) - merging.weight_bytes(base) == 4 * 360 * 32


def test_a_quantised_base_is_merged_as_training_saw_it(run: Path, tmp_path: Path) -> None:
    target = find_target(str(run))
    live = load(target, dtype="float32", quantization="native").model
    merge(target, tmp_path / "merged", quantization="native")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, live(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


def test_merging_into_few_bits_reports_what_it_costs(run: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # bitsandbytes wants whole blocks
    run = write_run(tmp_path / "run", write_base(tmp_path / "base", **sizes))
    done = merge(find_target(str(run)), tmp_path / "merged", quantization="native", into="same")
    assert done.dtype == "native"
    assert done.difference is not None
    assert 1e-4 < done.difference.mean < done.difference.max
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert config.quantization_config.load_in_4bit
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "The weights are quantised (native);" in card
    assert "Stored as native" in card
    for asked in (None, "none"):
        with pytest.raises(ValueError, match="no few-bit storage to merge into: name one with --quantization"):
            merge(find_target(str(run)), tmp_path / "again", into="same", quantization=asked)
    assert not (tmp_path / "again").exists()


def test_a_quantised_run_trains_merge_aware_and_merges_to_what_it_trained(tmp_path: Path) -> None:
    from tiny_run import make_recipe, save_model

    from deltatune.core.rounding import Rounding
    from deltatune.stores.nf4_layer import Nf4Linear
    from deltatune.train.run import train

    recipe = make_recipe(
        tmp_path,
        save_model(tmp_path / "base", hidden_size=64, intermediate_size=128, num_key_value_heads=4),
        quantization="native",
        method={"lora_dropout": 0.0},
        train={"merge_aware": {"start": 0.5, "seed": 3}, "max_steps": 4, "epochs": 2},
        eval={"generate": False, "samples": 0},
    )
    result = train(recipe)
    assert result.after["loss"] < result.before["loss"]
    target = find_target(result.output_dir)
    live = load(target, dtype="float32").model  # in the storage that it was trained in, rounded as it was trained
    assert isinstance(live.get_base_model().model.layers[0].self_attn.q_proj, Nf4Linear)
    assert live.adapters.plan.rounding == Rounding("dithered", 3)
    with torch.no_grad():
        wanted = live(input_ids=IDS).logits
        live.set_merge_aware(False)
        assert not torch.allclose(live(input_ids=IDS).logits, wanted, atol=1e-3)
    assert merge(target, tmp_path / "merged", into="same", dtype="float32").dtype == "native"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():  # in inference bitsandbytes multiplies in bfloat16 on some processors
        torch.testing.assert_close(merged.train()(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    for how in (merge, merge_stream):
        how(target, tmp_path / how.__name__, dtype="float32")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / how.__name__)
        assert type(dense.model.layers[0].self_attn.q_proj) is torch.nn.Linear
        with torch.no_grad():
            torch.testing.assert_close(dense(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    merge_stream(target, tmp_path / "plain", quantization="none")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "The weights are of the types that the base's files have;" in card
    plain = load(target, dtype="float32", quantization="none").model
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert type(plain.get_base_model().model.layers[0].self_attn.q_proj) is not Nf4Linear
    assert plain.adapters.plan.rounding is None
    done = merge(target, tmp_path / "nearest", into="same", dtype="float32", rounding="nearest")
    assert done.difference is not None
    assert done.difference.mean > 1e-3


def test_a_run_that_cannot_be_merge_aware_touches_nothing(tmp_path: Path) -> None:
    from tiny_run import make_recipe, save_model

    from deltatune.errors import ConfigError
    from deltatune.train.run import train

    base = save_model(tmp_path / "base", hidden_size=64, num_key_value_heads=4)
    recipe = make_recipe(tmp_path, base, quantization="native", train={"merge_aware": True})  # with dropout
    with pytest.raises(ConfigError, match="set lora_dropout=0"):
        train(recipe)
    assert not [file for file in recipe.run_dir.rglob("*") if file.name != ".lock"]


def test_numbers_that_are_not_finite_are_not_written(run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    file = broken / "adapter_model.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    next(t for key, t in tensors.items() if "lora_B" in key)[0, 0] = torch.nan
    save_file(tensors, file, metadata=about)
    for prompts in (None, ["hi"]):
        with pytest.raises(ValueError, match="not finite in float32; nothing was written"):
            merge(find_target(str(broken)), tmp_path / "merged", prompts=prompts)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", HERE)
def test_packed_bytes_are_not_taken_for_numbers(kind: str) -> None:
    merging._check_finite(torch.nn.Sequential(HERE[kind](torch.nn.Linear(64, 32))), "float32")


@pytest.mark.parametrize("quantization", [None, "native"])
def test_a_classifier_is_compared_too(run: Path, tmp_path: Path, quantization: str | None) -> None:
    from transformers import AutoModelForSequenceClassification

    base = find_target(str(run)).base
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "adapter"
    )
    target = find_target(str(tmp_path / "adapter"))
    done = merge(target, tmp_path / "merged", quantization=quantization)
    assert done.difference is not None
    assert done.difference.max < 1e-4
    with pytest.raises(ValueError, match="is for SEQ_CLS, and only CAUSAL_LM is streamed"):
        merge_stream(target, tmp_path / "streamed")


def test_merge_aware_from_a_share_of_the_steps_on() -> None:
    from types import SimpleNamespace

    from deltatune.core.rounding import Rounding
    from deltatune.train.callbacks import MergeAwareCallback
    from deltatune.train.spec import MergeAware, TrainSpec

    base = llama()
    quantize_model(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    callback, how = MergeAwareCallback(MergeAware(start=0.5, rounding="nearest")), []
    for step in range(4):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=4), None, model=model)
        how.append(model.adapters.plan.rounding)
    assert how == [None, None, Rounding("nearest"), Rounding("nearest")]
    model.set_merge_aware(False)
    callback.on_train_end(None, SimpleNamespace(global_step=1, max_steps=4), None, model=model)
    assert model.adapters.plan.rounding == Rounding("nearest")
    assert TrainSpec(merge_aware=True).merge_aware == MergeAware()  # type: ignore[arg-type]
    assert TrainSpec(merge_aware=False).merge_aware is None  # type: ignore[arg-type]


def test_a_base_whose_files_are_quantised_already(tmp_path: Path) -> None:
    """transformers reads bitsandbytes' files by a step that it cannot take back, and so does not save such a model."""
    from deltatune.train.streaming import too_large

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    base = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "dense", **sizes))
    quantize_model(base)
    shutil.copytree(tmp_path / "dense", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    merging.write_model(base, tmp_path / "base", "5GB")
    target = find_target(str(write_run(tmp_path / "run", tmp_path / "base")))
    live = load(target, dtype="float32").model.train()  # in inference bitsandbytes rounds its scales
    wanted = live(input_ids=IDS).logits.detach()
    merge(target, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    assert merge(target, tmp_path / "same", into="same", dtype="float32").dtype == "bitsandbytes"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").config.quantization_config.load_in_4bit
    with pytest.raises(ValueError, match=r"are quantised \(bitsandbytes\) already; merge without --stream"):
        merge_stream(target, tmp_path / "streamed")
    assert not too_large(target)
