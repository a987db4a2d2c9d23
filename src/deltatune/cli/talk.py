"""The parts of a chat: the conversation with the model, and the screen it is shown on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.cli import common
from deltatune.cli.generate import chat_tokens, speed

if TYPE_CHECKING:
    from deltatune.train.generation import Reply, Sampling
    from deltatune.train.loading import Loaded, Variant

NAMES = {"base": "without adapter", "adapter": "with adapter"}


class Talk:
    """The conversation itself: one history for each form of the model, so that they never mix."""

    def __init__(self, loaded: Loaded, sampling: Sampling, system: str | None) -> None:
        self.loaded = loaded
        self.sampling = sampling
        self.system = system
        self.forms: list[Variant] = ["adapter"]
        self.histories: dict[str, list[dict[str, str]]] = {"base": [], "adapter": []}
        self.dropped = 0  # messages forgotten because the context was full

    def reset(self) -> None:
        """Forget everything that was said."""
        self.histories = {"base": [], "adapter": []}
        self.dropped = 0

    def answer(self, text: str, form: Variant, on_text: Callable[[str], None]) -> Reply:
        """Say `text`, stream the answer of one form, and remember both."""
        from deltatune.train.generation import stream
        from deltatune.train.loading import variant

        history = [*self.histories[form], {"role": "user", "content": text}]
        history, tokens = self._fitting(history)
        adapted = self.loaded.target.adapter is not None
        with variant(self.loaded.model, form) if adapted else nullcontext():
            reply = stream(self.loaded.model, self.loaded.tokenizer, tokens, self.sampling, on_text)
        self.histories[form] = [*history, {"role": "assistant", "content": reply.text.strip()}]
        return reply

    def _fitting(self, history: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The latest part of the conversation that leaves room for an answer, and its tokens."""
        from deltatune.train.generation import context_length

        context = context_length(self.loaded.model)
        room = min(self.sampling.max_new_tokens, context // 2) if context else 0
        tokens = self._tokens(history)
        while context and len(tokens) + room > context and len(history) > 2:
            history = history[2:]  # a question and its answer
            self.dropped += 2
            tokens = self._tokens(history)
        return history, tokens

    def _tokens(self, history: list[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return chat_tokens(self.loaded.tokenizer, [*system, *history])

    def transcript(self) -> dict[str, Any]:
        """Everything said, as chat data: one list of messages for each form that was talked to."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {form: [*system, *said] for form, said in self.histories.items() if said}


@dataclass
class Screen:
    """How a session looks: a terminal, a plain pipe, or JSON lines."""

    terminal: bool
    json: bool
    prompt: str = ""
    words: Callable[[str], None] = common.write_now  # what a piece of an answer is given to

    @classmethod
    def of(cls, as_json: bool) -> Screen:
        """The form that fits stdin, stdout and the options."""
        terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
        if terminal:
            _line_editing()
        words = (lambda text: None) if as_json else common.write_now
        return cls(terminal, as_json, "you › " if terminal else "", words)

    def read(self) -> str | None:
        """The next message, over several lines if they end in a backslash; None at the end of input."""
        lines: list[str] = []
        prompt = self.prompt
        while True:
            try:
                line = input(prompt)
            except EOFError:
                if self.terminal:
                    common.write_now("\n")  # the shell's prompt starts a line of its own
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
            prompt = "    … " if self.terminal else ""

    def title(self, form: str, several: bool, adapted: bool) -> None:
        """What comes before an answer."""
        if self.terminal:
            self.words = common.WordWrap(common.out().width)
        if self.json or not (self.terminal or several):
            return
        name = NAMES[form] if adapted else "model"
        if self.terminal:
            common.out().rule(f"[bold]{name}[/bold]", align="left", style="cyan" if form == "base" else "green")
        else:
            common.write_now(f"{form}: ")

    def end(self, reply: Reply) -> None:
        """What comes after an answer."""
        if not self.json:
            common.write_now("\n")
        if self.terminal:
            common.note(speed(reply))

    def remark(self, text: str) -> None:
        """Something that is not an answer: stderr, so that piped answers stay clean."""
        common.note(text)


def _line_editing() -> None:
    """Arrow keys and history in the prompt, where Python has readline (not on Windows)."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
