"""What a run works on: data as tokens, the model with its adapter. Shared by training and by the dry run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.errors import ConfigError
from deltatune.train.arguments import accelerator, resolve_dtype
from deltatune.train.data import Encoded, Example, Examples, PackingError, check_packing, encode, load_examples, pack
from deltatune.train.generation import context_length

if TYPE_CHECKING:
    from deltatune.train.models import ResolvedModel
    from deltatune.train.recipe import Recipe


@dataclass(frozen=True)
class Data:
    """The examples of a run and their tokens; `rows` are what a batch is made of (packed if asked for)."""

    examples: Examples
    encoded: list[Encoded]
    rows: list[Encoded]

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.rows)


def prepare_data(recipe: Recipe, tokenizer: Any) -> Data:
    """Read, tokenise and, if asked for, pack the examples.

    Raises:
        ValueError: no training example, or one that cannot be used; names the file and row.
    """
    examples = load_examples(recipe.data)
    if not examples.train:
        raise ConfigError(f"data.path {recipe.data.path} holds no training examples")
    encoded = encode(examples.train, tokenizer, recipe.data)
    rows = pack(encoded, recipe.data.max_length) if recipe.data.packing else encoded
    return Data(examples, encoded, rows)


def check_length(recipe: Recipe, data: Data, model: Any) -> None:
    """Every row must fit the model's positions.

    Raises:
        ConfigError: a row is longer than the model reads.
    """
    context = context_length(model)
    if context is not None and data.longest > context:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, but {recipe.model} reads {context} tokens: "
            f"set data.max_length={context} or less"
        )


def check_apart(recipe: Recipe, model: Any) -> None:
    """Examples that share a row must not see each other; tried on the model itself, adapted or not.

    Raises:
        ConfigError: this model does not keep them apart.
    """
    for key, wanted in (("data.packing", recipe.data.packing), ("train.padding_free", recipe.train.padding_free)):
        if not wanted:
            continue
        try:
            check_packing(model)
        except PackingError as error:
            raise ConfigError(
                f"{key} puts several examples into one row, and with {recipe.method['peft_type']} on this model they "
                f"would see each other: set {key}=false, or choose another attn_implementation"
            ) from error


def check_targets(recipe: Recipe, base: Any) -> None:
    """The method must find its places in the base; looked for before anything is measured or written.

    Raises:
        TargetError: a pattern matches nothing.
        ConfigError: the method cannot be trained merge-aware.
    """
    from deltatune import get_peft_config, plan_targets
    from deltatune.core.rounding import refuse_dropout

    config: Any = get_peft_config({"task_type": recipe.task, **recipe.method})
    if recipe.train.merge_aware is not None:
        refuse_dropout(config)
    plan_targets(base, config)


def load_base(recipe: Recipe, resolved: ResolvedModel) -> Any:
    """The base model on the device it trains on."""
    from deltatune.train.models import load_model

    device = accelerator() or "cpu"
    model = load_model(
        resolved,
        task=recipe.task,
        dtype=resolve_dtype(recipe),
        quantization=recipe.quantization,
        device_map={"": device} if recipe.quantization else None,
        attn_implementation=recipe.attn_implementation,
    )
    return model if recipe.quantization else model.to(device)


def attach(recipe: Recipe, base: Any, batches: Iterable[Any] = ()) -> Any:
    """The base with a fresh adapter, initialised from the recipe's seed.

    Args:
        batches: run first where the method's init starts from data.
    """
    from transformers import set_seed

    from deltatune import get_peft_config, get_peft_model, prepare_init
    from deltatune.inits import is_loading
    from deltatune.inits.data import needs_data

    set_seed(recipe.train.seed)
    config = get_peft_config({"task_type": recipe.task, **recipe.method})
    if needs_data(config) and not is_loading():
        prepare_init(base, config, batches)
    model = get_peft_model(base, config)
    aware = recipe.train.merge_aware
    if aware is not None and not is_loading():  # a dry run's base has no bytes to round to
        model.set_merge_aware(rounding=aware.rounding, seed=aware.seed)  # refused now, if at all
        if aware.start > 0:
            model.set_merge_aware(False)
    return model


def procedures_of(recipe: Recipe, rows: int) -> list[Any]:
    """What happens over time in a run over `rows` rows; those that the method brings itself are checked too.

    Raises:
        ConfigError: a procedure does not fit a run of so many steps.
    """
    from deltatune import get_peft_config
    from deltatune.schedules import find_procedure
    from deltatune.train.arguments import total_steps

    chosen = [find_procedure(recipe.procedure)] if recipe.procedure else []
    config = get_peft_config({"task_type": recipe.task, **recipe.method})
    for procedure in [*chosen, *config.procedures()]:
        procedure.check_total(total_steps(recipe.train, rows), config)
    return chosen


def init_batches(recipe: Recipe, data: Data, tokenizer: Any) -> Iterator[Any]:
    """The batches that an init which starts from data sees: of the training set, in an order of the seed's."""
    import torch

    from deltatune.train.data import Collator

    size, rows = recipe.train.batch_size, data.rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.train.seed)).tolist()
    collate = Collator(tokenizer, pad_to_multiple_of=8)
    for start in range(0, min(len(rows), size * recipe.train.init_batches), size):
        yield collate([rows[i] for i in order[start : start + size]])


def pick_samples(examples: Sequence[Example], count: int) -> list[int]:
    """Indices of examples to show: different answers first, then in order; none for raw text."""
    asked = [i for i, example in enumerate(examples) if question_of(example) is not None]
    seen: set[str] = set()
    fresh = []
    for i in asked:
        answer = answer_of(examples[i])
        if answer not in seen:
            seen.add(answer)
            fresh.append(i)
    chosen = [*fresh, *(i for i in asked if i not in set(fresh))][:count]
    return sorted(chosen)


def question_of(example: Example) -> str | None:
    """What the model is asked, as text: the prompt, or the last turn before the answer."""
    if example.prompt is not None:
        return example.prompt
    turns = [turn for turn in example.messages or [] if turn.get("role") == "user"]
    return turns[-1]["content"] if turns else None


def answer_of(example: Example) -> str:
    """The reference answer as text."""
    if example.messages is not None:
        turns = [turn for turn in example.messages if turn.get("role") == "assistant"]
        return turns[-1]["content"] if turns else ""
    return (example.completion or "").strip()
