"""The held-out examples of a run: measured as a whole, and a few of them shown with their answers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from deltatune.train.evaluate import evaluate
from deltatune.train.session import answer_of, pick_samples, question_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from deltatune.train.data import Example, Examples
    from deltatune.train.recipe import Recipe

SAMPLE_TOKENS = 64  # length of the shown answers where references are too long to be scored


class Measurer:
    """Measures models on the held-out examples as the recipe's `eval` section says.

    Attributes:
        shown: indices of the held-out examples that are shown.
        pause: makes room on the terminal for another progress bar.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, examples: Examples, console: Console) -> None:
        self.recipe, self.tokenizer, self.console = recipe, tokenizer, console
        self.labels, self.examples = examples.labels, examples.eval
        self.shown = pick_samples(self.examples, recipe.eval.samples)
        self.pause: Callable[[], AbstractContextManager[None]] = nullcontext

    def whole(self, model: Any) -> dict[str, Any]:
        """`metrics` over all held-out examples and `answers` to the shown ones; empty without examples."""
        if not self.examples:
            return {}
        result = self._evaluate(model, self.examples, generate=self.recipe.eval.generate)
        return {"metrics": _numbers(result), "answers": self._answers(model, result)}

    def now(self, model: Any) -> dict[str, Any]:
        """Numbers for one evaluation during training."""
        answers = self.recipe.eval.generate and self.recipe.eval.generate_during_training
        with self.pause():
            return _numbers(self._evaluate(model, self.examples, generate=answers))

    def samples_now(self, model: Any) -> list[dict[str, str]]:
        """The shown examples with the model's `answer` as it is now."""
        with self.pause():
            answers = self._answers(model, {})
        return [{**self.sample(i), "answer": answer} for i, answer in zip(self.shown, answers, strict=True)]

    def sample(self, index: int) -> dict[str, str]:
        """One held-out example as `prompt` and `expected`."""
        example = self.examples[index]
        return {"prompt": question_of(example) or "", "expected": answer_of(example)}

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, str]]:
        """The shown examples with the answers of `base` and `tuned`, from two results of `whole`."""
        blank = [""] * len(self.shown)
        answers = zip(self.shown, before.get("answers", blank), after.get("answers", blank), strict=True)
        return [{**self.sample(i), "base": base, "tuned": tuned} for i, base, tuned in answers]

    def _evaluate(self, model: Any, examples: Sequence[Example], *, generate: bool) -> dict[str, Any]:
        spec = self.recipe.eval
        return evaluate(
            model,
            self.tokenizer,
            examples,
            self.recipe.data,
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            labels=self.labels,
            generate=generate,
            score_labels=generate and spec.score_labels,
            console=self.console,
        )

    def _answers(self, model: Any, result: dict[str, Any]) -> list[str]:
        """The shown examples' answers: from an evaluation that has all of them, else generated now."""
        if "answers" in result:
            return [result["answers"][i] for i in self.shown]
        if not self.shown:
            return []
        chosen = [self.examples[i] for i in self.shown]
        limit = self.recipe.eval.max_new_tokens or SAMPLE_TOKENS
        found = evaluate(model, self.tokenizer, chosen, self.recipe.data, max_new_tokens=limit)
        return list(found["answers"])


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if isinstance(value, (int, float))}
