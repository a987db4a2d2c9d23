"""Examples as tokens, with -100 where a token is not trained."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltatune.train.data_chat import ChatCoder
from deltatune.train.data_spec import (
    IGNORE,
    DataError,
    DataSpec,
    Encoded,
    Example,
    Examples,
    NoTrainedTokens,
)

log = logging.getLogger(__name__)
MANY = 2000  # examples from which tokenising takes long enough for a progress bar


def encode(examples: Sequence[Example], tokenizer: Any, spec: DataSpec) -> list[Encoded]:
    """Tokens and labels, one `Encoded` for each example, in order.

    Only the answers are trained (or everything, with `train_on_prompt`), with the token that ends them. Examples
    longer than `max_length` are cut at the end; `Encoded.truncated` marks them and a warning counts them.

    Raises:
        NoTrainedTokens: an example has no token left to train; names it.
        DataError: max_length is beyond the model, or a conversation cannot be written.
    """
    check_max_length(tokenizer, spec)
    encoder = _Encoder(tokenizer, spec)
    encoded = [encoder.encode(example) for example in _progress(examples)]
    cut = sum(row.truncated for row in encoded)
    if cut:
        log.warning("%d of %d examples are longer than max_length %d and were cut", cut, len(encoded), spec.max_length)
    return encoded


def encode_prompt(example: Example, tokenizer: Any, spec: DataSpec) -> list[int]:
    """The tokens to generate from: exactly those before the (last) answer in training.

    Raises:
        DataError: the example is raw text, or its prompt is longer than `max_length`.
    """
    ids = _Encoder(tokenizer, spec).prompt(example)
    if len(ids) >= spec.max_length:
        raise DataError(f"{example.source}: the prompt has {len(ids)} tokens, max_length is {spec.max_length}")
    return ids


def check_max_length(tokenizer: Any, spec: DataSpec) -> None:
    """Compare `max_length` with what the model reads.

    Raises:
        DataError: it is more.
    """
    if spec.max_length > tokenizer.model_max_length:
        raise DataError(
            f"max_length {spec.max_length} is beyond the model, which reads {tokenizer.model_max_length} tokens; "
            f"set data.max_length to {tokenizer.model_max_length} or less"
        )


def describe_encoded(encoded: Sequence[Encoded], spec: DataSpec) -> str:
    """Counts in a sentence: examples, tokens, share that is trained, the longest, how many were cut."""
    if not encoded:
        return "no examples"
    total = sum(len(row) for row in encoded)
    trained = sum(row.trained for row in encoded)
    cut = sum(row.truncated for row in encoded)
    text = (
        f"{len(encoded)} rows, {total} tokens, {trained} of them trained ({trained / total:.1%}), "
        f"longest row {max(len(row) for row in encoded)}"
    )
    return text + (f"; {cut} cut to {spec.max_length} tokens" if cut else "")


def split_texts(examples: Examples, tokenizer: Any, spec: DataSpec) -> Examples:
    """Raw texts longer than `max_length` in pieces that fit, so that none of a long document is lost.

    Other formats come back as they are.
    """
    if examples.format != "text":
        return examples
    train = [piece for example in examples.train for piece in _pieces(example, tokenizer, spec.max_length)]
    held_out = [piece for example in examples.eval for piece in _pieces(example, tokenizer, spec.max_length)]
    grown = len(train) + len(held_out) - len(examples.train) - len(examples.eval)
    note = f"; long texts are cut into pieces of {spec.max_length} tokens ({grown} more rows)" if grown else ""
    return replace(examples, train=train, eval=held_out, describe=examples.describe + note)


def _pieces(example: Example, tokenizer: Any, most: int) -> list[Example]:
    text = example.text or ""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room = most - len(tokenizer("")["input_ids"]) - 1  # special tokens at the start, the end token
    if len(spans) <= room or room < 1:
        return [example]
    cuts = [0, *(spans[i][0] for i in range(room, len(spans), room)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
    return [replace(example, text=part, source=f"{example.source}#{i + 1}") for i, part in enumerate(parts)]


@dataclass
class _Encoder:
    tokenizer: Any
    spec: DataSpec
    chat: ChatCoder | None = None  # made when the first conversation comes

    def encode(self, example: Example) -> Encoded:
        ids, trained = self._tokens(example)
        if self.spec.train_on_prompt:
            trained = [True] * len(ids)
        most = self.spec.max_length
        labels = [i if t else IGNORE for i, t in zip(ids, trained, strict=True)]
        row = Encoded(ids[:most], labels[:most], truncated=len(ids) > most, source=example.source)
        if row.trained == 0:
            raise self._untrained(example, trained, len(ids))
        return row

    def prompt(self, example: Example) -> list[int]:
        if example.messages is not None:
            last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=None)
            return self._chat().prompt(example.messages[:last], example.source)
        if example.prompt is None:
            raise DataError(f"{example.source}: raw text has no prompt to generate from")
        return self._start(example.prompt)

    def _tokens(self, example: Example) -> tuple[list[int], list[bool]]:
        if example.messages is not None:
            return self._chat().encode(example.messages, example.source)
        if example.text is not None:
            ids = [*self._start(example.text), *self._end()]
            return ids, [True] * len(ids)
        if not (example.completion or "").strip():
            raise NoTrainedTokens(f"{example.source}: no token of this example is trained: its answer is empty")
        prompt = self._start(example.prompt or "")
        answer = [*self._answer(prompt, example), *self._end()]
        return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)

    def _answer(self, prompt: list[int], example: Example) -> list[int]:
        """The answer's tokens after exactly the prompt's tokens.

        Taken from prompt and answer written together, which is right for tokenizers that treat the start of a
        text in a special way; where the two melt into one token at the seam, the answer is written alone, because
        generation starts from the prompt's own tokens.
        """
        answer = f"{example.separator}{example.completion}"
        together = self._start(f"{example.prompt}{answer}")
        if together[: len(prompt)] == prompt:
            return together[len(prompt) :]
        return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def _start(self, text: str) -> list[int]:
        """Tokens of a text with what the tokenizer puts before it, but not with an end token."""
        ids = list(self.tokenizer(text)["input_ids"])
        end = self.tokenizer.eos_token_id
        bare = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[:-1] if ids and ids[-1] == end and (not bare or bare[-1] != end) and len(ids) > 1 else ids

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _chat(self) -> ChatCoder:
        if self.chat is None:
            self.chat = ChatCoder.of(self.tokenizer)
        return self.chat

    def _untrained(self, example: Example, trained: list[bool], length: int) -> NoTrainedTokens:
        first = trained.index(True) if True in trained else length
        why = "it has one token, and the first is never predicted"
        if length > self.spec.max_length:
            why = (
                f"its prompt has {first} tokens and max_length is {self.spec.max_length}; raise data.max_length "
                "or shorten it"
            )
        return NoTrainedTokens(f"{example.source}: no token of this example is trained: {why}")


def _progress(examples: Sequence[Example]) -> Iterable[Example]:
    if len(examples) < MANY or not sys.stderr.isatty():
        return examples
    from rich.console import Console
    from rich.progress import track

    return track(examples, "tokenising", console=Console(stderr=True), transient=True)
