"""The task guides (examples/task_*.py) run as they are: few steps, small models, no network."""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path

import pytest
import transformers

from small_runs import ROWS, small_tokenizer, write_base
from tiny import bert, t5

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> types.ModuleType:
    """A guide as a module, its `main` not yet run."""
    spec = importlib.util.spec_from_file_location(f"guide_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few messages in place of the built-in data set."""
    import deltatune.train.datasets_builtin as datasets

    small = datasets.BuiltinDataset("sms_spam", ROWS, ROWS, "", "", "", "")
    monkeypatch.setattr(datasets, "builtin_dataset", lambda name: small)


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A small BERT and its tokenizer in a directory."""
    bert(kind="BertModel", vocab_size=400, max_position_embeddings=120).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    transformers.logging.set_verbosity_error()  # the new head is reported as missing
    return str(tmp_path)


def test_prompt_tuning_of_a_decoder(tmp_path: Path):
    base, data = str(write_base(tmp_path / "base")), tmp_path / "messages.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS * 6))
    before, after = load("task_prompt_causal_lm").main(steps=8, model=base, lr=0.05, data=str(data))
    assert after < before


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_prefix_tuning_for_generation(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if kind == "decoder":
        path = write_base(tmp_path / "base")
    else:
        path = tmp_path / "t5"
        t5(vocab_size=400).save_pretrained(path)
        small_tokenizer().save_pretrained(path)
    first, last = load("task_prefix_generation").main(steps=12, model=str(path), lr=0.1)
    assert last < first
    assert "name[Aromi], food[Indian], area[city] -> " in capsys.readouterr().out


@pytest.mark.usefixtures("messages")
def test_p_tuning_for_classification(encoder: str, capsys: pytest.CaptureFixture[str]):
    _, after = load("task_p_tuning_sequence_classification").main(steps=30, model=encoder, batch_size=6, tokens=4)
    assert after >= 0.5
    assert "loaded" in capsys.readouterr().out


def test_lora_for_images():
    before, after = load("task_lora_image_classification").main(steps=40)
    assert after > before


def test_lora_for_segmentation():
    before, after = load("task_lora_semantic_segmentation").main(steps=12, batch_size=4)
    assert after > before


def test_lora_for_tokens(encoder: str):
    before, after = load("task_lora_token_classification").main(steps=80, model=encoder, lr=2e-2)
    assert after > before
