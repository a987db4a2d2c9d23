"""`deltatune chat`: a conversation in the terminal or through a pipe, with and without the adapter.

In a terminal it prompts, streams and shows remarks; through a pipe every input line is a message and
stdout holds the answers alone (with `--json`, one JSON object a line).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import DeviceOption, Dtype, DtypeOption, ModelOption, QuantOption
from deltatune.cli.generate import (
    PenaltyOption,
    SeedOption,
    SystemOption,
    TokensOption,
    TopKOption,
    run_data,
)
from deltatune.cli.talk import NAMES, Screen, Talk


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "chat",
        epilog=common.examples(
            "deltatune chat runs/assistant",
            "deltatune chat runs/assistant --compare --temperature 0",
            'deltatune chat smollm2-135m-instruct --system "Answer in one sentence."',
            "printf 'Hello!\\nAnd in French?\\n' | deltatune chat runs/assistant --json",
        ),
    )(chat_command)


def chat_command(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a model (directory, hub id, name).")],
    model: ModelOption = None,
    system: SystemOption = None,
    compare: Annotated[bool, typer.Option(help="Answer every message without and with the adapter.")] = False,
    base_only: Annotated[bool, typer.Option("--base", help="Start with the adapter off.")] = False,
    max_new_tokens: TokensOption = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy: always the likeliest token.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this total probability; default 0.9.")
    ] = None,
    top_k: TopKOption = 0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantOption = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per turn, for programs.")] = False,
) -> None:
    """Talk to a model. Type /help inside for the commands; Ctrl-C stops an answer, Ctrl-D ends."""
    from deltatune.train.generation import Sampling
    from deltatune.train.loading import find_target, load

    nucleus = top_p if top_p is not None else (1.0 if temperature == 0 else 0.9)
    sampling = Sampling(max_new_tokens, temperature, nucleus, top_k, repetition_penalty, seed)
    where = find_target(target, model)
    if where.adapter is None and (compare or base_only):
        raise ValueError(f"{target} has no adapter to leave out; --compare and --base need one")
    if compare and base_only:
        raise ValueError("--compare and --base exclude each other")
    loaded = load(where, dtype=dtype.value, quantization=quantization, device=device)
    common.note_unpacked(loaded)
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise ValueError(f"{target} has no chat template to talk through; use deltatune generate --style raw")
    data = run_data(where)
    if data.get("template") and not data.get("as_chat"):
        common.note(
            f"{target} was trained on prompts of the form {data['template']!r}, not on chats; "
            "deltatune generate puts your words into that form"
        )
    talk = Talk(loaded, sampling, system or data.get("system"))
    talk.forms = ["base", "adapter"] if compare else ["base"] if base_only else ["adapter"]
    Session(talk, Screen.of(as_json), target).run()


class Session:
    """Reads messages and commands until the end. Commands are the methods named `do_…`."""

    def __init__(self, talk: Talk, screen: Screen, name: str) -> None:
        self.talk = talk
        self.screen = screen
        self.name = name
        self.adapted = talk.loaded.target.adapter is not None
        self.commands: dict[str, Callable[[str], bool]] = {
            key.removeprefix("do_"): getattr(self, key) for key in dir(self) if key.startswith("do_")
        }

    def run(self) -> None:
        """The loop: one message or command a turn."""
        if self.screen.terminal:
            base = self.talk.loaded.resolved.name
            on = f" with adapter {self.talk.loaded.target.adapter}" if self.adapted else ""
            self.screen.remark(f"{base}{on}\n/help for commands, Ctrl-C stops an answer, Ctrl-D ends")
        going = True
        while going:
            try:
                text = self.screen.read()
            except KeyboardInterrupt:
                self.screen.remark("\nCtrl-D or /exit ends the conversation")
                continue
            if text is None:
                break
            going = self._turn(text)

    def _turn(self, text: str) -> bool:
        """One turn; False ends the session. A mistake in a command is said and the session goes on."""
        if not text.strip():
            return True
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text[1:])
        self._say(text[1:] if text.startswith("//") else text)
        return True

    def _command(self, text: str) -> bool:
        word, _, rest = text.partition(" ")
        word = {"quit": "exit", "q": "exit", "clear": "reset", "?": "help"}.get(word, word)
        command = self.commands.get(word)
        if command is None:
            near = get_close_matches(word, self.commands, n=1)
            meant = f"; did you mean /{near[0]}?" if near else ""
            self.screen.remark(f"there is no command /{word}{meant} (/help lists them; //text sends /text)")
            return True
        try:
            return command(rest.strip())
        except (ValueError, OSError) as error:
            self.screen.remark(str(error))
            return True

    def _say(self, text: str) -> None:
        replies = {}
        dropped = self.talk.dropped
        for form in self.talk.forms:
            self.screen.title(form, len(self.talk.forms) > 1, self.adapted)
            try:
                replies[form] = self.talk.answer(text, form, self.screen.words)
            except ValueError as error:  # a message longer than the context
                self.screen.remark(str(error))
                return
            self.screen.end(replies[form])
        if self.talk.dropped > dropped:
            self.screen.remark(f"the context is full: {self.talk.dropped} of the oldest messages are forgotten so far")
        if self.screen.json:
            answers = {f: {"text": r.text.strip(), "tokens": r.tokens} for f, r in replies.items()}
            common.write_now(json.dumps({"user": text, "answers": answers}, ensure_ascii=False) + "\n")

    def do_help(self, rest: str) -> bool:
        """/help: the commands"""
        for _, command in sorted(self.commands.items()):
            self.screen.remark(str(command.__doc__))
        return True

    def do_exit(self, rest: str) -> bool:
        """/exit: end the conversation"""
        return False

    def do_reset(self, rest: str) -> bool:
        """/reset: forget everything said so far"""
        self.talk.reset()
        self.screen.remark("forgotten")
        return True

    def do_adapter(self, rest: str) -> bool:
        """/adapter on|off: answer with or without the adapter"""
        self.talk.forms = ["adapter"] if self._switch("adapter", rest) else ["base"]
        self.screen.remark(f"answers come {NAMES[self.talk.forms[0]]}; each form keeps its own conversation")
        return True

    def do_compare(self, rest: str) -> bool:
        """/compare on|off: answer every message without and with the adapter"""
        self.talk.forms = ["base", "adapter"] if self._switch("compare", rest) else ["adapter"]
        self.screen.remark("answers come " + " and ".join(NAMES[form] for form in self.talk.forms))
        return True

    def do_system(self, rest: str) -> bool:
        """/system TEXT: set the system message (no text: none) and start over"""
        self.talk.system = rest or None
        self.talk.reset()
        self.screen.remark("system message set, conversation started over" if rest else "no system message")
        return True

    def do_set(self, rest: str) -> bool:
        """/set NAME=VALUE: change temperature, top_p, top_k, max_new_tokens, repetition_penalty or seed"""
        name, equals, value = (part.strip() for part in rest.partition("="))
        kinds: dict[str, type] = {
            "temperature": float,
            "top_p": float,
            "top_k": int,
            "max_new_tokens": int,
            "repetition_penalty": float,
            "seed": int,
        }
        if not equals or name not in kinds:
            raise ValueError(f"/set needs NAME=VALUE with one of {', '.join(kinds)}")
        try:
            number = kinds[name](value)
        except ValueError:
            raise ValueError(f"/set {name}: {value!r} is no number") from None
        changes: dict[str, Any] = {name: number}
        if name == "temperature" and number == 0:
            changes |= {"top_p": 1.0, "top_k": 0}
        self.talk.sampling = replace(self.talk.sampling, **changes)
        self.screen.remark(f"{name} is now {number}")
        return True

    def do_history(self, rest: str) -> bool:
        """/history: show the conversation so far"""
        for form, messages in self.talk.transcript().items():
            if len(self.talk.transcript()) > 1:
                self.screen.remark(f"-- {NAMES[form]}")
            for message in messages:
                self.screen.remark(f"{message['role']}: {message['content']}")
        return True

    def do_save(self, rest: str) -> bool:
        """/save FILE: write the conversation as chat training data (JSONL of messages)"""
        from deltatune.train.files import write_text

        if not rest:
            raise ValueError("/save needs a file name, such as /save talk.jsonl")
        said = self.talk.transcript()
        if not said:
            raise ValueError("nothing has been said yet")
        path = Path(rest).expanduser()
        if path.exists():
            raise ValueError(f"{path} exists already; choose another name")
        rows = [{"messages": messages, "form": form} for form, messages in said.items()]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(path, "\n".join(lines) + "\n")
        self.screen.remark(f"saved to {path}")
        return True

    def _switch(self, name: str, rest: str) -> bool:
        if not self.adapted:
            raise ValueError(f"{self.name} has no adapter to switch")
        if rest not in ("on", "off"):
            raise ValueError(f"/{name} needs on or off")
        return rest == "on"
