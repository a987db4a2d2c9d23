"""Conversations as tokens, and which of them the assistant said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from deltatune.train.data_spec import DataError, NoTrainedTokens

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatCoder:
    """Renders conversations with a tokenizer's own chat template.

    A template that marks the assistant's words with `{% generation %}` says itself what is trained. For any
    other, the conversation is rendered up to each turn: what an assistant turn adds to the rendering before it,
    generation prompt included, is what the assistant said.
    """

    tokenizer: Any
    marked: bool  # the template has {% generation %}
    special: frozenset[int]  # ids that end a turn, among others

    @classmethod
    def of(cls, tokenizer: Any) -> ChatCoder:
        """The coder of a tokenizer.

        Raises:
            DataError: it has no chat template.
        """
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                "the tokenizer of this model has no chat template, so conversations cannot be written; use an "
                "instruction-tuned model, or prompt and completion columns"
            ) from None
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        return cls(tokenizer, marked, special_ids(tokenizer))

    def prompt(self, messages: Messages, place: str) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks."""
        return self._ids(self._render(messages, place, ask=True))

    def encode(self, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
        """(ids, trained) of a whole conversation; the token that ends each assistant turn is trained too.

        Raises:
            NoTrainedTokens: the assistant says nothing.
            DataError: the template refuses the conversation, or does not keep earlier turns as they were.
        """
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            raise NoTrainedTokens(f"{place}: no token of this conversation is trained: the assistant says nothing")
        ids, trained = self._by_mask(messages, place) if self.marked else self._by_prefix(messages, place)
        last = max((i for i, t in enumerate(trained) if t), default=-1)
        if last == len(ids) - 1 and last >= 0 and ids[last] not in self.special:
            # A template without an end of turn: the model must still learn to stop.
            ids, trained = [*ids, self.tokenizer.eos_token_id], [*trained, True]
        return ids, trained

    # ---- the two ways ----

    def _by_mask(self, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
        out = self._apply(messages, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
        for i in range(1, len(ids)):
            ends_turn = ids[i] in self.special and ids[i - 1] not in self.special
            if trained[i - 1] and not trained[i] and ends_turn:
                trained[i] = True
        return ids, trained

    def _by_prefix(self, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
        whole = self._render(messages, place)
        ids = self._ids(whole)
        trained = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = self._length(messages[:i], whole, ids, place, ask=True)
            end = self._length(messages[: i + 1], whole, ids, place, ask=False)
            end = self._end_of_turn(ids, begin, end)
            trained[begin:end] = [True] * (end - begin)
        return ids, trained

    def _length(self, messages: Messages, whole: str, ids: list[int], place: str, *, ask: bool) -> int:
        """How many tokens of the whole conversation the rendering of its first messages takes."""
        text = self._render(messages, place, ask=ask)
        if not whole.startswith(text):
            raise DataError(
                f"{place}: the chat template rewrites earlier turns, so the assistant's words cannot be told apart; "
                "use a template with {% generation %} marks, or conversations of one question and one answer"
            )
        part = self._ids(text)
        if ids[: len(part)] != part:
            raise DataError(
                f"{place}: message {len(messages)} melts into one token with what comes before it, so training and "
                "generation would read it differently; take the blanks off its beginning"
            )
        return len(part)

    def _end_of_turn(self, ids: list[int], begin: int, end: int) -> int:
        """Without blanks after the token that ends the turn: generation stops before them."""
        for i in range(end - 1, begin, -1):
            if ids[i] in self.special:
                return i + 1
            if self.tokenizer.decode([ids[i]]).strip():
                return end
        return end

    # ---- the tokenizer ----

    def _ids(self, text: str) -> list[int]:
        # The template writes the special tokens itself.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, place: str, *, ask: bool = False) -> str:
        return str(self._apply(messages, place, tokenize=False, add_generation_prompt=ask))

    def _apply(self, messages: Messages, place: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"{place}: the chat template refuses this conversation ({roles}): {error}") from None


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all tokens that are marks and not text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))
