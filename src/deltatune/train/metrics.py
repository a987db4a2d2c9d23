"""Scores for generated answers: normalisation, exact match, accuracy, macro F1, token F1.

Pure functions over strings; nothing here knows about models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

CLOSED_SET_LIMIT = 200  # more distinct answers than this are not read as a label set


def normalise(answer: str, reference: str = "") -> str:
    """The answer as it is compared: stripped, blanks collapsed, and cut to its first line.

    A reference of several lines is compared whole: its answer cannot be right after one line.
    """
    text = answer.strip()
    if "\n" not in reference.strip():
        text = text.split("\n", 1)[0]
    return " ".join(text.split())


def infer_labels(references: Sequence[str]) -> list[str] | None:
    """The label set, if the references look like one: few distinct short lines, each seen often.

    "Often" means three times on average, so that free answers (dates, names) are not taken for labels.
    """
    distinct = sorted(set(references))
    short = all(reference and "\n" not in reference and len(reference) <= 80 for reference in distinct)
    if short and 2 <= len(distinct) <= CLOSED_SET_LIMIT and 3 * len(distinct) <= len(references):
        return distinct
    return None


def exact_match(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Share of answers equal to one of their accepted answers after `normalise`, letter case included."""
    return _mean([matches(a, refs) for a, refs in zip(answers, accepted, strict=True)])


def matches(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is one of the accepted ones."""
    return any(normalise(answer, ref) == normalise(ref, ref) for ref in accepted)


def to_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label an answer names, letter case aside, or None when it names none."""
    folded = normalise(answer).casefold()
    return next((label for label in labels if normalise(label).casefold() == folded), None)


def label_metrics(predicted: Sequence[str | None], references: Sequence[str]) -> dict[str, float]:
    """`accuracy`, `macro_f1` and `invalid` (share of answers that name no label) of closed-set answers.

    Macro F1 is the mean over the labels that occur in the references; an answer that names no label
    counts against the label it missed.
    """
    hits = [p == r for p, r in zip(predicted, references, strict=True)]
    return {
        "accuracy": _mean(hits),
        "macro_f1": macro_f1(predicted, references),
        "invalid": _mean([p is None for p in predicted]),
    }


def macro_f1(predicted: Sequence[str | None], references: Sequence[str]) -> float:
    """Mean of 2·TP / (2·TP + FP + FN) over the labels that occur in the references."""
    true_positive = Counter(r for p, r in zip(predicted, references, strict=True) if p == r)
    said, wanted = Counter(predicted), Counter(references)
    return _mean([2 * true_positive[label] / (said[label] + wanted[label]) for label in wanted])


def token_f1(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Mean word-overlap F1 with the best accepted answer (as SQuAD scores free answers), case aside."""
    return _mean([max(_overlap(a, r) for r in refs) for a, refs in zip(answers, accepted, strict=True)])


def _overlap(answer: str, reference: str) -> float:
    said = Counter(normalise(answer, reference).casefold().split())
    wanted = Counter(normalise(reference, reference).casefold().split())
    common = sum((said & wanted).values())
    total = sum(said.values()) + sum(wanted.values())
    return 2 * common / total if total else 1.0


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
