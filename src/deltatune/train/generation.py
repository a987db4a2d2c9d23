"""Text from a causal language model: settings, batched greedy answers, one streamed answer.

Used by the evaluation and by the `generate` and `chat` verbs, so that all of them stop at the same
tokens, pad the same way and refuse the same things.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature=0` is greedy decoding: always the likeliest token.

    Raises:
        ValueError: a value is out of its range, or shapes sampling while decoding is greedy.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 is none)"),
        }
        for name, (ok, rule) in rules.items():
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be {rule}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("top_p and top_k need sampling; set temperature above 0 (0.7 is a usual value)")

    def config(self, model: Any, tokenizer: Any) -> Any:
        """The same as a `transformers.GenerationConfig`.

        Every value that changes the choice of tokens is set, because transformers fills unset ones from
        the model's own file: a repetition penalty there would make "greedy" something else.
        """
        from transformers import GenerationConfig

        greedy = self.temperature == 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=0,
            do_sample=not greedy,
            num_beams=1,
            temperature=1.0 if greedy else self.temperature,
            top_p=self.top_p,
            top_k=50 if greedy else self.top_k,  # 50 is the library's neutral value for greedy decoding
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=0,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=stop_ids(model, tokenizer) or None,
            use_cache=True,
        )


@dataclass(frozen=True)
class Reply:
    """One generated answer. `finished` is "stop", "length" or "interrupted"."""

    text: str
    tokens: int
    seconds: float
    finished: str


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def pad_id(tokenizer: Any) -> int:
    """Id to pad with; padding is always masked, so any id is right when the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def device_of(model: Any) -> torch.device:
    """Where the inputs of `model` belong: the device of its first parameter."""
    return next(iter(model.parameters())).device  # type: ignore[no-any-return]


def context_length(model: Any) -> int | None:
    """Most positions the model was built for, or None if its config does not say."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def fit(prompt_tokens: int, sampling: Sampling, model: Any) -> int:
    """New tokens that still fit after the prompt.

    Raises:
        ValueError: the prompt alone fills the model's context.
    """
    context = context_length(model)
    if context is None:
        return sampling.max_new_tokens
    if prompt_tokens >= context:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, but the model reads {context}; "
            "shorten it or use a model with a longer context"
        )
    return min(sampling.max_new_tokens, context - prompt_tokens)


def left_pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (rows, longest), padded on the left so that answers line up."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def generate_batch(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
    """One answer for each tokenised prompt, in one left-padded batch.

    Raises:
        ValueError: a prompt is empty or alone fills the model's context.
    """
    _check_not_empty(prompts)
    fit(max(len(prompt) for prompt in prompts), sampling, model)
    ids, mask = left_pad(prompts, pad_id(tokenizer), device_of(model))
    _seed(sampling)
    start = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling.config(model, tokenizer))
    seconds = time.perf_counter() - start
    stops = set(stop_ids(model, tokenizer))
    return [_reply(row[ids.shape[1] :].tolist(), stops, tokenizer, seconds) for row in out]


def _reply(new: list[int], stops: set[int], tokenizer: Any, seconds: float) -> Reply:
    """Cut at the first stop token: what follows it is the padding of a shorter row."""
    end = next((i for i, token in enumerate(new) if token in stops), None)
    text = tokenizer.decode(new[:end], skip_special_tokens=True)
    return Reply(text, len(new) if end is None else end + 1, seconds, "length" if end is None else "stop")


@torch.inference_mode()
def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    on_text: Callable[[str], None],
) -> Reply:
    """One answer, given to `on_text` word by word as it is made. Ctrl-C ends the answer, not the program.

    Raises:
        ValueError: the prompt is empty or alone fills the model's context.
    """
    from dataclasses import replace

    from transformers import TextStreamer

    _check_not_empty([prompt])
    settings = replace(sampling, max_new_tokens=fit(len(prompt), sampling, model))
    device = device_of(model)
    ids = torch.tensor([list(prompt)], device=device)
    parts: list[str] = []
    counter = _Counter(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), parts, on_text)
    _seed(sampling)
    start = time.perf_counter()
    finished = "interrupted"
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings.config(model, tokenizer),
            streamer=counter,
        )
        finished = "stop" if int(out[0, -1]) in stop_ids(model, tokenizer) else "length"
    except KeyboardInterrupt:
        counter.end()
    return Reply("".join(parts), counter.tokens, time.perf_counter() - start, finished)


class _Counter:
    """A streamer for `generate` that counts tokens and passes finished words on."""

    def __init__(self, inner: Any, parts: list[str], on_text: Callable[[str], None]) -> None:
        self.inner = inner
        self.tokens = 0
        self._prompt_seen = False
        self._parts = parts
        self._on_text = on_text
        inner.on_finalized_text = self._finalized

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.numel() if self._prompt_seen else 0
        self._prompt_seen = True
        self.inner.put(value)

    def end(self) -> None:
        self.inner.end()

    def _finalized(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._parts.append(text)
            self._on_text(text)


def _check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i + 1} of {len(prompts)} is empty: there is nothing to continue")


def _seed(sampling: Sampling) -> None:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
