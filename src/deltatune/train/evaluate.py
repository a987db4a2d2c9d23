"""How good is a model on held-out examples: loss, perplexity, and the answers it gives.

One teacher-forced pass gives the loss. It also tells which answers greedy decoding would get exactly
right: where the likeliest token is the reference's token at every position, greedy decoding writes the
reference. Only the other examples are generated, so a good model costs one pass instead of two.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from deltatune.train.data import Collator, DataSpec, Encoded, Example, encode
from deltatune.train.generation import Sampling, context_length, device_of, generate_batch, stop_ids
from deltatune.train.metrics import exact_match, infer_labels, label_metrics, normalise, to_label, token_f1

if TYPE_CHECKING:
    from rich.console import Console

SHORT_ANSWER = 64  # tokens; longer references are measured by their loss alone unless asked for


@dataclass(frozen=True)
class RowScore:
    """What one teacher-forced row says about its trained tokens, in order; both tensors have shape (n,)."""

    nll: torch.Tensor  # -log p(token), in fp32
    hit: torch.Tensor  # whether the token is the likeliest one


@dataclass(frozen=True)
class Question:
    """The last answer of an example: the tokens before it, its tokens, its text, every accepted text."""

    prompt: list[int]
    answer: list[int]
    reference: str
    accepted: tuple[str, ...]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    spec: DataSpec,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    labels: Sequence[str] | None = None,
    generate: bool = True,
    score_labels: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure `model` as it stands (adapters that are on stay on) on `examples`.

    Args:
        batch_size: rows in one forward pass, of the loss and of the generation.
        max_new_tokens: length limit of an answer. Default: what the longest reference or label needs.
            Given, answers are generated even where the references are long.
        labels: the closed set of answers, as `Examples.labels` has it. Default: found from the references
            (`infer_labels`).
        generate: whether to score answers at all; only examples with a prompt or messages have them.
        score_labels: also choose, for each example, the label with the highest likelihood.
            Costs one more pass for each label.
        console: where to show progress bars; none without it.

    Returns:
        `examples`, `tokens` (trained ones), `loss` (mean over tokens, nats), `perplexity`, `seconds`; with
        answers also `exact_match`, `answers`, `references`; for a closed set `accuracy`, `macro_f1`,
        `invalid`, `labels` (and `label_accuracy`, `label_macro_f1` with `score_labels`); for free answers
        `token_f1`.

    Raises:
        ValueError: no examples, an example without a trained token, or one longer than the model's context.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate on; name a held-out file or split")
    start = time.perf_counter()
    plain = spec.model_copy(update={"packing": False})
    encoded = encode(list(examples), tokenizer, plain)
    _check_context(encoded, examples, model)
    with _evaluating(model):
        scores = score_rows(model, tokenizer, encoded, batch_size=batch_size, console=console)
        result = _loss(scores) | {"examples": len(examples)}
        questions = ask(examples, encoded, tokenizer, plain) if generate else []
        limit = _answer_length(questions, labels, tokenizer, max_new_tokens)
        if questions and limit is not None:
            stops = set(stop_ids(model, tokenizer))
            right = [_proved(s, q, stops, limit) for s, q in zip(scores, questions, strict=True)]
            answers = _answers(model, tokenizer, questions, right, batch_size, limit, console)
            result |= _answer_metrics(answers, questions, labels)
        if questions and score_labels:
            if "labels" not in result:
                raise ValueError("score_labels needs a closed set of labels, and these answers have none")
            result |= _label_scores(model, tokenizer, examples, questions, plain, result["labels"], batch_size, console)
    return result | {"seconds": time.perf_counter() - start}


@torch.inference_mode()
def score_rows(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    console: Console | None = None,
    title: str = "loss",
) -> list[RowScore]:
    """Teacher-forced scores of the trained tokens of each row, in the order given."""
    collate = Collator(tokenizer, pad_to_multiple_of=8)
    forward = _Forward(model)
    scores: dict[int, RowScore] = {}
    with _progress(console, title, len(encoded)) as advance:
        for chunk in _by_length([len(row.input_ids) for row in encoded], batch_size):
            batch = collate([encoded[i] for i in chunk])
            for i, score in zip(chunk, _score_batch(forward, batch), strict=True):
                scores[i] = score
            advance(len(chunk))
    return [scores[i] for i in range(len(encoded))]


def _score_batch(forward: _Forward, batch: dict[str, torch.Tensor]) -> Iterator[RowScore]:
    """One right-padded batch: labels (B, T), logits for the last T - first positions only."""
    labels = batch["labels"][:, 1:]  # the logits at t predict token t + 1
    trained = labels != -100
    first = int(trained.any(dim=0).float().argmax())
    logits = forward(batch, keep=batch["labels"].shape[1] - first)[:, :-1]
    labels, trained = labels[:, first:].to(logits.device), trained[:, first:].to(logits.device)
    for row_logits, row_labels, row_trained in zip(logits, labels, trained, strict=True):
        wanted, rows = row_labels[row_trained], row_logits[row_trained].float()  # (n,), (n, vocabulary)
        nll = F.cross_entropy(rows, wanted, reduction="none")
        yield RowScore(nll.cpu(), (rows.argmax(dim=-1) == wanted).cpu())


class _Forward:
    """Logits of the last positions of a batch, without computing the others where the model allows it.

    At 150,000 words a full (B, T, vocabulary) tensor is most of the memory of an evaluation.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model = model
        self.can_keep = "logits_to_keep" in inspect.signature(base.forward).parameters

    def __call__(self, batch: dict[str, torch.Tensor], keep: int) -> torch.Tensor:
        device = device_of(self.model)
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        if self.can_keep:
            logits: torch.Tensor = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
            if logits.shape[1] == keep:
                return logits
            self.can_keep = False  # an adapter that adds positions of its own: ask for all of them
        logits = self.model(**inputs, use_cache=False).logits
        return logits[:, -keep:]


def ask(examples: Sequence[Example], encoded: Sequence[Encoded], tokenizer: Any, spec: DataSpec) -> list[Question]:
    """The examples as questions, or an empty list if some have no answer to give (raw text).

    Prompt and answer are cut out of the training rows, so that a model is asked with exactly the tokens
    it was trained on.
    """
    if any(example.text is not None for example in examples):
        return []
    if spec.train_on_prompt:
        encoded = encode(list(examples), tokenizer, spec.model_copy(update={"train_on_prompt": False}))
    return [_question(row, example) for row, example in zip(encoded, examples, strict=True)]


def _question(row: Encoded, example: Example) -> Question:
    trained = [label != -100 for label in row.labels]
    end = len(trained) - trained[::-1].index(True)
    begin = end
    while begin > 0 and trained[begin - 1]:
        begin -= 1
    reference = (example.completion or _last_message(example)).strip()
    reference = example.label if example.label is not None else reference
    return Question(row.input_ids[:begin], row.input_ids[begin:end], reference, example.references or (reference,))


def _last_message(example: Example) -> str:
    messages = example.messages or []
    spoken = [str(m.get("content") or "") for m in messages if m.get("role") == "assistant"]
    return spoken[-1] if spoken else ""


def _answer_length(
    questions: Sequence[Question], labels: Sequence[str] | None, tokenizer: Any, asked: int | None
) -> int | None:
    """Tokens an answer may have, or None when the references are too long to be compared word for word."""
    if asked is not None or not questions:
        return asked
    longest = max(len(question.answer) for question in questions)
    if labels:
        longest = max(longest, *(len(tokenizer(" " + label)["input_ids"]) + 1 for label in labels))
    return longest if longest <= SHORT_ANSWER else None


def _proved(score: RowScore, question: Question, stops: set[int], limit: int) -> bool:
    """Whether greedy decoding writes the reference: every token up to its end is the likeliest one."""
    end = next((i + 1 for i, token in enumerate(question.answer) if token in stops), None)
    if end is None or end > limit:
        return False
    return bool(score.hit[-len(question.answer) :][:end].all())


def _answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    right: Sequence[bool],
    batch_size: int,
    limit: int,
    console: Console | None,
) -> list[str]:
    """Greedy answers; those already proved right are not generated again."""
    answers = {i: question.reference for i, question in enumerate(questions) if right[i]}
    todo = [i for i in range(len(questions)) if not right[i]]
    sampling = Sampling(max_new_tokens=limit)
    with _progress(console, "answers", len(todo)) as advance:
        for chunk in _by_length([len(questions[i].prompt) for i in todo], batch_size):
            rows = [todo[i] for i in chunk]
            replies = generate_batch(model, tokenizer, [questions[i].prompt for i in rows], sampling)
            answers |= {i: reply.text.strip() for i, reply in zip(rows, replies, strict=True)}
            advance(len(chunk))
    return [answers[i] for i in range(len(questions))]


def _answer_metrics(answers: list[str], questions: Sequence[Question], labels: Sequence[str] | None) -> dict[str, Any]:
    references = [question.reference for question in questions]
    accepted = [question.accepted for question in questions]
    known = list(labels) if labels else infer_labels([normalise(r, r) for r in references])
    result: dict[str, Any] = {"exact_match": exact_match(answers, accepted)}
    if known:
        wanted = [to_label(r, known) or r for r in references]
        result |= label_metrics([to_label(a, known) for a in answers], wanted) | {"labels": known}
    else:
        result["token_f1"] = token_f1(answers, accepted)
    return result | {"answers": answers, "references": references}


def _label_scores(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    questions: Sequence[Question],
    spec: DataSpec,
    labels: Sequence[str],
    batch_size: int,
    console: Console | None,
) -> dict[str, float]:
    """Accuracy of the label with the highest log-likelihood, end-of-answer token included."""
    spec = spec.model_copy(update={"train_on_prompt": False})
    totals = []
    for label in labels:
        rows = encode([_with_answer(example, label) for example in examples], tokenizer, spec)
        scores = score_rows(model, tokenizer, rows, batch_size=batch_size, console=console, title=f"label {label}")
        # A conversation trains several answers; only the last one is the label.
        asked = [_question(row, example) for row, example in zip(rows, examples, strict=True)]
        totals.append([float(s.nll[-len(q.answer) :].sum()) for s, q in zip(scores, asked, strict=True)])
    best = torch.tensor(totals).argmin(dim=0).tolist()
    wanted = [to_label(question.reference, labels) or question.reference for question in questions]
    scored = label_metrics([labels[i] for i in best], wanted)
    return {"label_accuracy": scored["accuracy"], "label_macro_f1": scored["macro_f1"]}


def _with_answer(example: Example, answer: str) -> Example:
    if example.messages is None:
        return replace(example, completion=answer)
    messages = [dict(message) for message in example.messages]
    last = max(i for i, message in enumerate(messages) if message.get("role") == "assistant")
    messages[last]["content"] = answer
    return replace(example, messages=messages[: last + 1])


def _loss(scores: Sequence[RowScore]) -> dict[str, Any]:
    nll = torch.cat([score.nll for score in scores]).double()
    loss = float(nll.mean())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": nll.numel()}


def _check_context(encoded: Sequence[Encoded], examples: Sequence[Example], model: Any) -> None:
    context = context_length(model)
    if context is None:
        return
    for row, example in zip(encoded, examples, strict=True):
        if len(row.input_ids) > context:
            raise ValueError(
                f"{example.source}: the example has {len(row.input_ids)} tokens, but the model reads "
                f"{context}; set max_length to {context} or less"
            )


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that running out of memory happens at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in range(0, len(order), batch_size):
        yield order[i : i + batch_size]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout inside; each module's own mode comes back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _progress(console: Console | None, title: str, total: int) -> Iterator[Any]:
    if console is None or total == 0:
        yield lambda n: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)
