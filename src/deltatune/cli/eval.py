"""`deltatune eval`: loss and answers on held-out examples, for base, adapter and merged side by side."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import DeviceOption, Dtype, DtypeOption, JsonFlag, ModelOption, QuantOption

if TYPE_CHECKING:
    from deltatune.train.data import DataSpec, Example, Examples
    from deltatune.train.loading import Loaded, Target

METRICS = {
    "loss": "loss (nats/token)",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "invalid": "answers outside the labels",
    "label_accuracy": "accuracy (likeliest label)",
    "label_macro_f1": "macro F1 (likeliest label)",
    "tokens": "trained tokens",
    "seconds": "seconds",
}
SHARES = {"accuracy", "macro_f1", "exact_match", "token_f1", "invalid", "label_accuracy", "label_macro_f1"}


class Which(str, Enum):
    """The forms of a model that can be measured."""

    base = "base"
    adapter = "adapter"
    merged = "merged"
    all = "all"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "eval",
        epilog=common.examples(
            "deltatune eval runs/quickstart",
            "deltatune eval runs/quickstart --which all --json",
            "deltatune eval runs/quickstart --data mail.csv --samples 5 --predictions answers.jsonl",
            "deltatune eval smollm2-135m-instruct --data sms_spam --limit 50",
        ),
    )(eval_command)


def eval_command(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a model (directory, hub id, name).")],
    model: ModelOption = None,
    which: Annotated[
        list[Which] | None,
        typer.Option("--which", "-w", help="What to measure; repeat it. Default: base and adapter."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, as for train. Default: the run's own held-out examples.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of --data to measure on.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of a recipe's data section, such as template."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many examples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of answers. Default: what the longest reference needs, if short."),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Score answers, or the loss alone.")
    ] = True,
    score_labels: Annotated[bool, typer.Option(help="Also take the likeliest label; one more pass per label.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Show this many examples with their answers.")] = 0,
    predictions: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write every answer to this JSONL file.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantOption = None,
    device: DeviceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a model on held-out examples: loss, perplexity, accuracy, macro F1, exact match.

    Base, adapter and merged are the same loaded model: the adapter switched off, on, or folded in.
    """
    from deltatune.train.loading import find_target, load

    where = find_target(target, model)
    forms = _forms(which, where)
    if (predictions or samples) and not generate:
        raise ValueError("--samples and --predictions show answers, which --no-generate leaves out")
    spec = data_spec(where, data, split, set_ or [], limit)
    rows, about, said = load_rows(spec, held_out=data is None)
    common.note(said)
    loaded = load(where, dtype=dtype.value, quantization=quantization, device=device)
    common.note_unpacked(loaded)
    options = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "labels": about.labels,
        "generate": generate,
        "score_labels": score_labels,
    }
    results = {form: _measure(loaded, form, rows, spec, options) for form in forms}
    if predictions is not None:
        _write_predictions(predictions, rows, results)
    if as_json:
        common.print_json({"target": target, "data": said, "results": results})
    else:
        _print(results, rows, samples)


def _forms(which: list[Which] | None, target: Target) -> list[str]:
    """What to measure, in a fixed order; a model without adapter is measured as it is."""
    if target.adapter is None:
        if which:
            raise ValueError(f"{target.name} has no adapter, so --which has nothing to choose from")
        return ["model"]
    names = {w.value for w in which} if which else {"base", "adapter"}
    return [form for form in ("base", "adapter", "merged") if form in names or "all" in names]


def data_spec(target: Target, data: str | None, split: str | None, settings: list[str], limit: int | None) -> DataSpec:
    """The data to measure on: the run's recipe, changed by the options.

    Raises:
        ValueError: there is neither a recipe nor --data, or a setting is not one of a data section.
    """
    from deltatune.train.recipe import apply_override

    section = _recipe_data(target, data)
    if data is not None:
        for key in ("eval_path", "eval_split", "subset", "limit", "eval_limit"):
            section.pop(key, None)
        section |= {"path": data, "eval_fraction": 0.0, "split": split}
    elif split is not None:
        raise ValueError("--split chooses a part of --data; name the data set as well")
    for setting in settings:
        apply_override({"data": section}, f"data.{setting}")
    if limit is not None:
        section["eval_limit" if data is None else "limit"] = limit
    if data is not None and section["split"] is None:
        section["split"] = held_out_split(data, section.get("subset"))
    return _checked(section)


def held_out_split(data: str, subset: str | None) -> str | None:
    """The split that training would hold out, so that training examples are not measured by mistake."""
    from deltatune.train.data_load import find_source

    return find_source(data, subset).first("validation", "test")


def _recipe_data(target: Target, data: str | None) -> dict[str, Any]:
    """The data section of the run's recipe, so that prompts look as they did in training."""
    from deltatune.train.loading import read_recipe

    if target.recipe is not None:
        return dict(read_recipe(target.recipe)["data"])
    if data is None:
        raise ValueError(f"{target.name} has no recipe.yaml that says what to measure on; name it with --data")
    return {}


def _checked(section: dict[str, Any]) -> DataSpec:
    from pydantic import ValidationError

    from deltatune.train.data import DataSpec

    try:
        return DataSpec.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("data", *first["loc"]))
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None


def load_rows(spec: DataSpec, held_out: bool) -> tuple[list[Example], Examples, str]:
    """The examples to measure on, all that is known of their set, and a sentence about them.

    Args:
        held_out: take the held-out part of a run's data, not the whole of a named set.

    Raises:
        ValueError: a held-out part is wanted and there is none.
    """
    from deltatune.train.data import load_examples

    about = load_examples(spec)
    rows = about.eval if held_out else about.train
    if not rows:
        raise ValueError("this run held no examples out of its training; name some with --data")
    split = "held-out examples" if held_out else f"examples, split {spec.split}" if spec.split else "examples"
    layout = about.describe.partition("): ")[2] or about.describe
    return rows, about, f"{about.name}, {len(rows)} {split}: {layout}"


def _measure(loaded: Loaded, form: str, rows: list[Example], spec: DataSpec, options: dict[str, Any]) -> dict[str, Any]:
    from deltatune.train.evaluate import evaluate
    from deltatune.train.loading import variant

    args = (loaded.model, loaded.tokenizer, rows, spec)
    if form == "model":
        return evaluate(*args, **options, console=common.err())
    with variant(loaded.model, form):  # type: ignore[arg-type]
        return evaluate(*args, **options, console=common.err())


def _write_predictions(path: Path, rows: list[Example], results: dict[str, dict[str, Any]]) -> None:
    from deltatune.train.files import write_text

    if not all("answers" in result for result in results.values()):
        raise ValueError("these examples have no short answers to write; give --max-new-tokens")
    reference = next(iter(results.values()))["references"]
    records = [
        {
            "source": row.source,
            "prompt": question(row),
            "reference": reference[i],
            "answers": {form: result["answers"][i] for form, result in results.items()},
        }
        for i, row in enumerate(rows)
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(path, "\n".join(lines) + "\n")
    common.note(f"{len(rows)} answers written to {path}")


def question(row: Example) -> str:
    """What an example asks, for people: its prompt, or the last words of the user."""
    if row.prompt is not None:
        return row.prompt
    asked = [m["content"] for m in row.messages or [] if m.get("role") == "user"]
    return asked[-1] if asked else (row.text or "")


def _print(results: dict[str, dict[str, Any]], rows: list[Example], samples: int) -> None:
    console = common.out()
    forms = list(results)
    body = [
        [title, *(_cell(key, results[form].get(key)) for form in forms)]
        for key, title in METRICS.items()
        if any(key in result for result in results.values())
    ]
    console.print(common.table(["", *forms], body))
    if samples and not all("answers" in result for result in results.values()):
        raise ValueError("these examples have no short answers to show; give --max-new-tokens")
    for i in range(min(samples, len(rows))):
        reference = results[forms[0]]["references"][i]
        console.print(f"\n{rows[i].source}", style="dim", markup=False)
        console.print(question(rows[i]).rstrip(), markup=False)
        for name, text in [("reference", reference), *((f, results[f]["answers"][i]) for f in forms)]:
            console.print(f"  {name:>9}  {text!r}", markup=False, style="bold" if name == "reference" else None)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in SHARES:
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else common.number(value)
