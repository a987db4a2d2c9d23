"""`deltatune generate`: where prompts come from, how they are put, what is printed."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from deltatune.cli.generate import fill
from small_runs import small_tokenizer


def prompt_tokens(done) -> int:
    return json.loads(done.out)[0]["prompt_tokens"]


def count(text: str) -> int:
    return len(small_tokenizer()(text)["input_ids"])


def test_prompt_from_argument_file_and_stdin_are_the_same(
    cli, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("see you")
    options = ["--json", "-n", 6]
    argument = cli("generate", world / "run", "see you", *options)
    file = cli("generate", world / "run", "--file", tmp_path / "prompt.txt", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO("see you"))
    stdin = cli("generate", world / "run", *options)
    assert argument.code == 0, argument.err
    assert argument.out == file.out == stdin.out


def test_how_the_prompt_is_put(cli, world: Path) -> None:
    chat = [{"role": "user", "content": "see you"}]
    told = [{"role": "system", "content": "You are"}, *chat]
    written = small_tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    longer = small_tokenizer().apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    options = ["--json", "-n", 2]
    assert prompt_tokens(cli("generate", world / "run", "see you", *options)) == count("Message: see you\nLabel:")
    assert prompt_tokens(cli("generate", world / "adapter", "see you", *options)) == count(written)
    raw = cli("generate", world / "run", "see you", "--style", "raw", *options)
    assert prompt_tokens(raw) == count("see you")
    system = cli("generate", world / "run", "see you", "--style", "chat", "--system", "You are", *options)
    assert prompt_tokens(system) == count(longer)


def test_with_and_without_the_adapter(cli, world: Path) -> None:
    both = json.loads(cli("generate", world / "run", "see you", "--compare", "--json", "-n", 8).out)[0]["answers"]
    base = json.loads(cli("generate", world / "run", "see you", "--base", "--json", "-n", 8).out)[0]["answers"]
    assert both["base"] == base["base"]
    assert both["base"]["text"] != both["adapter"]["text"]
    streamed = cli("generate", world / "run", "see you", "--compare", "-n", 8)
    assert both["base"]["text"] in streamed.out
    assert both["adapter"]["text"] in streamed.out
    assert "per second" in streamed.err


def test_every_line_is_a_prompt(cli, world: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("see you\n\ncall now\nhome\n")
    records = json.loads(cli("generate", world / "run", "-f", file, "--lines", "--json", "--batch-size", 2).out)
    assert [r["prompt"] for r in records] == ["see you", "call now", "home"]
    alone = json.loads(cli("generate", world / "run", "call now", "--json").out)[0]
    assert records[1]["answers"] == alone["answers"]
    plain = cli("generate", world / "run", "-f", file, "--lines", "-n", 3)
    assert len(plain.out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "x", "--lines"], "excludes --file and --lines"),
        (["run", "  "], "the prompt is empty"),
        (["base", "x", "--compare"], "has no adapter to leave out"),
        (["run", "x", "--compare", "--base"], "exclude each other"),
        (["adapter", "x", "--style", "template"], "has no recipe with a prompt template"),
        (["run", "x", "--system", "You"], "add --style chat"),
        (["run", "x", "--top-p", "0.5"], "set temperature above 0"),
        (["run", "free " * 900], r"tokens, but the model reads 512"),
        (["nowhere/at/all", "x"], "does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(
    cli, world: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(world)
    done = cli("generate", *arguments)
    assert done.code == 1
    assert message in done.err
    assert done.out == ""


def test_a_model_without_chat_template_is_given_the_words_as_they_are(cli, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    small_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    done = cli("generate", tmp_path / "base", "see you", "--json", "-n", 2)
    assert prompt_tokens(done) == count("see you")
    assert "has no chat template" in cli("generate", tmp_path / "base", "see you", "--style", "chat").err


def test_a_template_of_several_fields_cannot_be_filled_with_one_text() -> None:
    assert fill("Q: {q}\nA:", "why {not}?") == "Q: why {not}?\nA:"
    with pytest.raises(ValueError, match=r"has 2 fields \(a, b\)"):
        fill("{a} {b}", "x")
