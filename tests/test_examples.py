"""The scripts in examples/ run as they are, with few steps, on small models, and without a network."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = sorted(EXAMPLES.glob("*.py"))


def load(name: str) -> types.ModuleType:
    """An example as a module, its `main` not yet run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few messages in place of the built-in data set."""
    import deltatune.train.datasets_builtin as datasets
    from small_runs import ROWS

    small = datasets.BuiltinDataset("sms_spam", ROWS, ROWS, "", "", "", "")
    monkeypatch.setattr(datasets, "builtin_dataset", lambda name: small)


def test_any_module(capsys: pytest.CaptureFixture[str]):
    before, after = load("any_module").main(steps=60)
    assert after > max(before, 0.5)
    assert "first -> first" in capsys.readouterr().out


def test_custom_method(capsys: pytest.CaptureFixture[str]):
    first, last = load("custom_method").main(steps=20)
    assert last < first
    assert capsys.readouterr().out.count("True") == 2


def test_several_adapters(capsys: pytest.CaptureFixture[str]):
    losses = load("several_adapters").main(steps=12)
    assert max(losses) < 4.6  # ln 100 is what a random model has
    assert "adapters left: ['acht']" in capsys.readouterr().out


def test_merge_and_export(tmp_path: Path):
    differences = load("merge_and_export").main(steps=3, output=str(tmp_path))
    assert differences["adapter"] == 0
    assert max(differences.values()) < 1e-5


def test_lora_causal_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from small_runs import write_base

    first, last = load("lora_causal_lm").main(steps=4, model=str(write_base(tmp_path / "base")))
    assert last < first
    assert "tuned:" in capsys.readouterr().out


@pytest.mark.usefixtures("messages")
def test_lora_sequence_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import transformers

    from small_runs import small_tokenizer
    from tiny import bert

    bert(kind="BertModel", vocab_size=400, max_position_embeddings=80).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    transformers.logging.set_verbosity_error()  # the new head is reported as missing
    _, after = load("lora_sequence_classification").main(steps=30, model=str(tmp_path), batch_size=6)
    assert after >= 0.5
    assert "held-out messages" in capsys.readouterr().out


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_every_example_says_what_it_does(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert '"--steps"' in text
    assert "def main(" in text
