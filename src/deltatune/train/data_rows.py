"""What the columns of a table mean: the layout is found from their names, and rows become examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltatune.errors import hint
from deltatune.train.data_spec import DataError, DataSpec, Example, Table, template_fields
from deltatune.train.data_values import answer_of, fill, label_of, text_of, turn_of, turns_of, with_system

MESSAGES = ("messages", "conversations", "conversation", "chat")
TEXTS = ("text", "sentence", "message", "sms", "review", "utterance", "query", "tweet", "comment", "content")
TEXT_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
# Names before numbers: a set that has both means the same thing by them, and a model writes words better.
LABELS = (
    *("label_text", "label_name", "intent", "category", "class_name", "sentiment", "emotion", "topic"),
    *("label", "labels", "class", "coarse_label", "target"),
)
OUTPUTS = ("output", "response", "completion", "answer")
#: Columns of the prompt, column of the answer, in the order they are looked for.
PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    *((("prompt",), answer) for answer in ("completion", "response", "canonical_solution", "output")),
    *((("context", "question"), answer) for answer in ("answers", "answer")),
    (("passage", "question"), "answer"),
    *((("question",), answer) for answer in ("answer", "answers", "response")),
    *((("mr",), answer) for answer in ("ref", "refs")),
    *(((text,), "summary") for text in ("document", "dialogue", "article", "text")),
    (("article",), "highlights"),
    (("source",), "target"),
    (("input",), "output"),
)
TITLES = {"mr": "Meaning", "ref": "Sentence", "refs": "Sentence", "answers": "Answer"}
ALPACA = (
    "Below is an instruction that describes a task{input_too}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Layout:
    """How the rows of a data set become examples."""

    format: str
    convert: Callable[[dict[str, Any], str], Example]
    describe: str
    labels: list[str] | None = None
    template: str | None = None  # of the prompt, given or made from the column names


def understand(train: Table, held_out: Table | None, spec: DataSpec) -> Layout:
    """The layout of a data set, from the recipe where it says so and from the column names otherwise.

    Raises:
        DataError: a named column is not there, or nothing known fits the columns.
    """
    columns = list(dict.fromkeys(key for row in train.rows[:100] for key in row))
    _check_columns(spec, columns, train.name)
    template = spec.template or train.template
    format_ = spec.format if spec.format != "auto" else _detect(columns, spec, train)
    tables = [train] if held_out is None else [train, held_out]
    make = {
        "messages": _messages,
        "alpaca": _alpaca,
        "prompt_completion": _pair,
        "text": _raw_text,
        "classification": _classification,
    }[format_]
    layout = make(columns, tables, spec, template)
    if layout.format == "text" and (spec.as_chat or spec.template):
        raise DataError(f"as_chat and template need prompts and answers, but {train.name} is raw text")
    if layout.format != "messages" and spec.system is not None and not spec.as_chat:
        raise DataError(
            f"system is for chats, but {train.name} is read as {layout.format}; set as_chat: true to put it "
            "through the model's chat template"
        )
    return replace(layout, convert=_as_chat(layout.convert, spec.system)) if spec.as_chat else layout


# ---- finding out ----


def _check_columns(spec: DataSpec, columns: list[str], name: str) -> None:
    for role, column in spec.columns.items():
        if column not in columns:
            raise DataError(
                f"column {column!r} (columns.{role}) is not in {name}; it has {_list(columns)}{hint(column, columns)}"
            )
    for column in template_fields(spec.template) if spec.template else []:
        if column not in columns:
            raise DataError(
                f"template uses {{{column}}}, which is not a column of {name}; it has {_list(columns)}"
                f"{hint(column, columns)}"
            )


def _detect(columns: list[str], spec: DataSpec, table: Table) -> str:
    if spec.columns:
        return _format_of_roles(set(spec.columns))
    if _first(MESSAGES, columns):
        return "messages"
    if {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{table.name} holds preference pairs (chosen, rejected), which this trainer does not learn from; to "
            "train on the chosen answers alone, set columns: {prompt: prompt, completion: chosen}"
        )
    if "tokens" in columns and _first(("tags", "ner_tags", "pos_tags", "labels"), columns):
        raise DataError(
            f"{table.name} is for token classification (a tag for each of its tokens); a causal language model is "
            "not trained on tags, so it is not supported here"
        )
    if "instruction" in columns and _first(OUTPUTS, columns):
        return "alpaca"
    if any({*prompt, answer} <= set(columns) for prompt, answer in PAIRS):
        return "prompt_completion"
    label = _first(LABELS, columns)
    if label and (spec.template or _text_columns(columns)):
        return "classification" if _is_closed_set(table, label) else "prompt_completion"
    if _first(TEXTS, columns):
        return "text"
    raise DataError(
        f"the columns of {table.name} ({_list(columns)}) have no layout that is known; name them, e.g. "
        "columns: {prompt: <column>, completion: <column>} or columns: {text: <column>, label: <column>}"
    )


def _format_of_roles(roles: set[str]) -> str:
    if "messages" in roles:
        return "messages"
    if roles & {"prompt", "completion"}:
        return "prompt_completion"
    if "label" in roles:
        return "classification"
    return "alpaca" if roles & {"instruction", "input", "output", "system"} else "text"


def _is_closed_set(table: Table, column: str) -> bool:
    """Whether a label column holds few distinct values, as labels do, or free text."""
    values = [row.get(column) for row in table.rows]
    if not all(isinstance(value, str) for value in values):
        return True
    return len(set(values)) <= max(20, len(values) // 2)


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _text_columns(columns: list[str]) -> tuple[str, ...] | None:
    pair = next((pair for pair in TEXT_PAIRS if set(pair) <= set(columns)), None)
    text = _first(TEXTS, columns)
    return pair or ((text,) if text else None)


def _column(role: str, names: Sequence[str], columns: list[str], spec: DataSpec, table: Table) -> str:
    """The column that plays a role: the one the recipe names, or the first usual name that is there."""
    found = spec.columns.get(role) or _first(names, columns)
    if found is None:
        near = next((h for h in (hint(name, columns) for name in names) if h), "")
        raise DataError(
            f"{table.name} has no column for {role!r} (looked for {_list(list(names)[:6])}); it has "
            f"{_list(columns)}; name it: columns: {{{role}: <column>}}{near}"
        )
    return found


# ---- one function per format: columns -> Layout ----


def _messages(columns: list[str], tables: list[Table], spec: DataSpec, _: str | None) -> Layout:
    column = _column("messages", MESSAGES, columns, spec, tables[0])

    def convert(row: dict[str, Any], place: str) -> Example:
        turns = [turn_of(turn, place) for turn in turns_of(row.get(column), column, place)]
        return Example(messages=with_system(turns, spec.system), source=place)

    return Layout("messages", convert, f"conversations in column {column!r}, trained on the assistant's turns")


def _alpaca(columns: list[str], tables: list[Table], spec: DataSpec, template: str | None) -> Layout:
    instruction = _column("instruction", ("instruction",), columns, spec, tables[0])
    output = _column("output", OUTPUTS, columns, spec, tables[0])
    extra = spec.columns.get("input") or _first(("input",), columns)
    system = spec.columns.get("system") or _first(("system",), columns)

    def convert(row: dict[str, Any], place: str) -> Example:
        asked = text_of(row, instruction, place)
        more = text_of(row, extra, place) if extra and row.get(extra) else ""
        before = text_of(row, system, place) if system and row.get(system) else spec.system
        answer, references = answer_of(row, output, place)
        if spec.as_chat:
            turns = [{"role": "user", "content": f"{asked}\n\n{more}" if more else asked}]
            turns.append({"role": "assistant", "content": answer})
            return Example(messages=with_system(turns, before), references=references, source=place)
        prompt = fill(template, row, place) if template else _alpaca_prompt(asked, more)
        prompt = f"{before}\n\n{prompt}" if before else prompt
        separator = "" if prompt[-1:].isspace() else " "
        return Example(prompt, separator, answer, references=references, source=place)

    names = _list([name for name in (instruction, extra, output) if name])
    return Layout(
        "alpaca", convert, f"instructions and answers (columns {names}), in the Alpaca prompt", template=template
    )


def _alpaca_prompt(instruction: str, more: str) -> str:
    too = ", paired with an input that provides further context" if more else ""
    return ALPACA.format(input_too=too, instruction=instruction, input=f"### Input:\n{more}\n\n" if more else "")


def _pair(columns: list[str], tables: list[Table], spec: DataSpec, template: str | None) -> Layout:
    prompts, answer = _pair_columns(columns, spec, tables[0])
    plain = prompts == (spec.columns.get("prompt") or "prompt",)
    shape = template or (None if plain else generic_template(prompts, answer))

    def convert(row: dict[str, Any], place: str) -> Example:
        prompt = fill(shape, row, place) if shape else text_of(row, prompts[0], place)
        text, references = answer_of(row, answer, place)
        stripped = text.lstrip(" \t\n") if text.strip() else ""
        space = text[: len(text) - len(stripped)] if stripped else ""
        if shape and not space and not prompt[-1:].isspace():
            space = " "
        return Example(prompt, space, stripped, references=references, source=place)

    how = f"prompt {shape!r}" if shape else f"prompt in column {prompts[0]!r}, as it is"
    describe = f"prompts and answers: {how}, answer in column {answer!r}"
    return Layout("prompt_completion", convert, describe, template=shape)


def _pair_columns(columns: list[str], spec: DataSpec, table: Table) -> tuple[tuple[str, ...], str]:
    known = next((pair for pair in PAIRS if {*pair[0], pair[1]} <= set(columns)), None)
    text, label = _text_columns(columns), _first(LABELS, columns)
    if known is None and text and label:
        known = (text, label)
    prompt = spec.columns.get("prompt")
    answer = spec.columns.get("completion") or (known[1] if known else None)
    if answer is None:
        answer = _column("completion", [pair[1] for pair in PAIRS], columns, spec, table)
    if prompt is not None:
        return (prompt,), answer
    if spec.template is not None:
        return tuple(template_fields(spec.template)), answer
    if known is None:
        return (_column("prompt", [pair[0][0] for pair in PAIRS], columns, spec, table),), answer
    return known[0], answer


def _raw_text(columns: list[str], tables: list[Table], spec: DataSpec, _: str | None) -> Layout:
    column = _column("text", TEXTS, columns, spec, tables[0])

    def convert(row: dict[str, Any], place: str) -> Example:
        return Example(text=text_of(row, column, place), source=place)

    return Layout("text", convert, f"raw text in column {column!r}, trained on every token")


def _classification(columns: list[str], tables: list[Table], spec: DataSpec, template: str | None) -> Layout:
    table = tables[0]
    label = _column("label", LABELS, columns, spec, table)
    if template is None:
        named = spec.columns.get("text")
        texts = (named,) if named else _text_columns(columns)
        template = generic_template(texts or (_column("text", TEXTS, columns, spec, table),), label)
    shape = template
    names = [t.label_names.get(label) or t.label_names.get("*") or table.label_names.get(label) for t in tables]
    known = names[0] or next((n for n in names if n), None)

    def convert(row: dict[str, Any], place: str) -> Example:
        prompt, name = fill(shape, row, place), label_of(row.get(label), label, known, place)
        separator = "" if prompt[-1:].isspace() else " "
        return Example(prompt, separator, name, label=name, source=place)

    # The closed set is what occurs, in the order of the numbers where there are numbers.
    found = {convert(row, p).label or "" for t in tables for row, p in zip(t.rows, t.sources, strict=True)}
    labels = [n for n in known if n in found] if known and found <= set(known) else sorted(found)
    if len(labels) < 2:
        raise DataError(f"column {label!r} of {table.name} has the one value {labels[0]!r}: nothing to tell apart")
    shown = ", ".join(labels[:4]) + (", …" if len(labels) > 4 else "")
    describe = f"classification: prompt {shape!r}, answer one of {len(labels)} labels in column {label!r} ({shown})"
    return Layout("classification", convert, describe, labels, shape)


# ---- wording ----


def generic_template(prompts: Sequence[str], answer: str) -> str:
    """`Context: {context}\\nQuestion: {question}\\nAnswer:` from the column names."""
    lines = [f"{_title(column)}: {{{column}}}" for column in prompts]
    return "\n".join([*lines, f"{_title(answer)}:"])


def _title(column: str) -> str:
    return TITLES.get(column) or column.replace("_", " ").capitalize()


def _as_chat(convert: Callable[[dict[str, Any], str], Example], system: str | None) -> Callable[..., Example]:
    """The same examples as conversations of one question and one answer."""

    def chat(row: dict[str, Any], place: str) -> Example:
        example = convert(row, place)
        if example.messages is not None:
            return example
        turns = [{"role": "user", "content": (example.prompt or "").strip()}]
        turns.append({"role": "assistant", "content": example.completion or ""})
        return replace(example, prompt=None, completion=None, separator="", messages=with_system(turns, system))

    return chat


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
