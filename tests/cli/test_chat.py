"""`deltatune chat` through a pipe: conversations, commands, JSON lines. The look of it is checked by eye."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from deltatune.cli.talk import Talk
from deltatune.train.generation import Sampling
from deltatune.train.loading import find_target, load
from small_runs import small_tokenizer


@pytest.fixture
def say(cli, monkeypatch: pytest.MonkeyPatch):
    """`say(lines, *arguments)`: a chat with these input lines."""

    def call(lines: list[str], *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        return cli("chat", *arguments, "--temperature", 0, "-n", 8)

    return call


def turns(done) -> list[dict]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_every_line_is_a_turn_and_stdout_has_the_answers_alone(say, world: Path) -> None:
    told = turns(say(["see you", "", "call now"], world / "run", "--json"))
    assert [turn["user"] for turn in told] == ["see you", "call now"]
    plain = say(["see you", "call now"], world / "run")
    assert plain.out == "".join(turn["answers"]["adapter"]["text"] + "\n" for turn in told)


def test_a_turn_remembers_the_ones_before_it_until_reset(say, world: Path) -> None:
    run = world / "run"
    alone = turns(say(["home"], run, "--json"))[0]
    later = turns(say(["see you", "home", "/reset", "home"], run, "--json"))
    assert later[1]["answers"] != alone["answers"]
    assert later[2]["answers"] == alone["answers"]


def test_adapter_and_compare_switch_the_form(say, world: Path) -> None:
    lines = ["/adapter off", "home", "/adapter on", "home", "/reset", "/compare on", "home"]
    base, adapter, both = turns(say(lines, world / "run", "--json"))
    assert list(base["answers"]) == ["base"]
    assert list(adapter["answers"]) == ["adapter"]
    assert both["answers"] == base["answers"] | adapter["answers"]  # each form kept its own conversation
    start = turns(say(["home"], world / "run", "--json", "--compare"))[0]
    assert start["answers"] == both["answers"]
    assert turns(say(["home"], world / "run", "--json", "--base"))[0]["answers"] == base["answers"]


def test_in_a_pipe_compared_answers_are_named(say, world: Path) -> None:
    done = say(["home"], world / "run", "--compare")
    assert [line.split(":")[0] for line in done.out.splitlines()] == ["base", "adapter"]


def test_save_writes_training_data(say, world: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    done = say(["/system You are", "home", f"/save {file}", f"/save {file}"], world / "run")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[0]["messages"][2]["content"] == done.out.strip()
    assert "exists already" in done.err


def test_the_end_of_the_conversation(say, world: Path) -> None:
    assert turns(say(["/exit", "home"], world / "run", "--json")) == []


def test_a_backslash_continues_a_message_and_two_slashes_are_one(say, world: Path) -> None:
    told = turns(say(["see \\", "you", "//help"], world / "run", "--json"))
    assert [turn["user"] for turn in told] == ["see \nyou", "/help"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/rest", "did you mean /reset?"),
        ("/adapter maybe", "/adapter needs on or off"),
        ("/set heat=1", "one of temperature"),
        ("/set top_k=many", "'many' is no number"),
        ("/set temperature=-1", "temperature is -1.0"),
        ("/save", "needs a file name"),
        ("/save x.jsonl", "nothing has been said"),
    ],
)
def test_a_wrong_command_is_said_and_the_talk_goes_on(say, world: Path, command: str, message: str) -> None:
    done = say([command, "home"], world / "run", "--json")
    assert message in done.err
    assert len(turns(done)) == 1


def test_help_history_and_set(say, world: Path) -> None:
    done = say(["/help", "/set max_new_tokens=1", "home", "/history"], world / "run", "--json")
    assert "/adapter on|off" in done.err
    assert turns(done)[0]["answers"]["adapter"]["tokens"] == 1
    assert "user: home" in done.err


def test_who_cannot_be_talked_to(say, cli, world: Path) -> None:
    assert "has no adapter to leave out" in cli("chat", world / "base", "--compare").err
    assert "has no adapter to switch" in say(["/adapter off"], world / "base").err
    assert "exclude each other" in cli("chat", world / "run", "--compare", "--base").err


def test_the_oldest_turns_leave_when_the_context_is_full(world: Path) -> None:
    loaded = load(find_target(str(world / "run")))
    loaded.model.config.max_position_embeddings = 100
    talk = Talk(loaded, Sampling(max_new_tokens=10), None)
    for _ in range(8):
        talk.answer("see you at home tonight", "adapter", lambda text: None)
    assert talk.dropped > 0
    history = talk.histories["adapter"]
    assert len(history) == 16 - talk.dropped
    assert [m["role"] for m in history[:2]] == ["user", "assistant"]
    with pytest.raises(ValueError, match="but the model reads 100"):
        talk.answer("free prize " * 200, "adapter", lambda text: None)
    assert talk.histories["adapter"] == history  # a message that was refused is not remembered


def test_words_wrap_where_a_terminal_would_break_them(capsys: pytest.CaptureFixture[str]) -> None:
    from deltatune.cli.common import WordWrap

    wrap = WordWrap(12)
    for piece in ("one two ", "three four\n", "five ", "sixteenletters ", "seven"):
        wrap(piece)
    assert capsys.readouterr().out == "one two \nthree four\nfive \nsixteenletters\nseven"


def test_the_chat_template_is_the_prompt(world: Path) -> None:
    loaded = load(find_target(str(world / "run")))
    talk = Talk(loaded, Sampling(), "You are")
    text = small_tokenizer().decode(talk._tokens([{"role": "user", "content": "home"}]))
    assert text == "<|im_start|>system\nYou are<|im_end|>\n<|im_start|>user\nhome<|im_end|>\n<|im_start|>assistant\n"
