"""One cell of a row as the text, the answer, the label or the message that it stands for."""

from __future__ import annotations

import json
from typing import Any

from deltatune.errors import hint
from deltatune.train.data_spec import DataError, template_fields

ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    **{name: name for name in ("system", "user", "assistant", "tool")},
}


def fill(template: str, row: dict[str, Any], place: str) -> str:
    return template.format(**{name: text_of(row, name, place) for name in template_fields(template)})


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if value is None:
        raise DataError(f"{place}: column {column!r} is missing or null in this row")
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: column {column!r} holds {type(value).__name__}, expected text")
    return str(value)


def answer_of(row: dict[str, Any], column: str, place: str) -> tuple[str, tuple[str, ...]]:
    """The answer to train on and all that are accepted: `ref` may be `refs`, a list, in the held-out rows."""
    value = row.get(column)
    if value is None:
        value = row.get(f"{column}s", row.get(column.removesuffix("s")))
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]  # SQuAD
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value[0], tuple(dict.fromkeys(value))
    if isinstance(value, list) and not value:
        raise DataError(f"{place}: column {column!r} has no answer (an empty list); leave such rows out")
    return text_of({column: value}, column, place), ()


def label_of(value: Any, column: str, names: list[str] | None, place: str) -> str:
    if value is None or value == "" or value == -1:
        raise DataError(f"{place}: column {column!r} has no label in this row (found {value!r})")
    if isinstance(value, float) and not value.is_integer():
        raise DataError(f"{place}: label {value} in column {column!r} is not a class; regression is not supported")
    if isinstance(value, float):
        value = int(value)
    number = value if isinstance(value, int) else int(value) if str(value).isdecimal() else None
    if names is not None and number is not None and not isinstance(value, bool):
        if not 0 <= number < len(names):
            raise DataError(f"{place}: label {number} in column {column!r}, but there are {len(names)} label names")
        return names[number]
    return text_of({column: value}, column, place).strip()


def turns_of(value: Any, column: str, place: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV has no other way to hold a list
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: column {column!r} is not valid JSON ({error.msg})") from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: column {column!r} must be a list of messages, found {value!r:.40}")
    return value


def turn_of(turn: Any, place: str) -> dict[str, str]:
    """`{"role", "content"}` from that form or from ShareGPT's `{"from", "value"}`."""
    if not isinstance(turn, dict):
        raise DataError(f"{place}: a message must be an object with role and content, found {turn!r:.40}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(part["text"] for part in content)
    if role not in ROLE_NAMES:
        raise DataError(f"{place}: unknown role {role!r}; known: {', '.join(ROLE_NAMES)}{hint(str(role), ROLE_NAMES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{place}: this conversation holds tool calls, which are not supported")
    if not isinstance(content, str):
        raise DataError(f"{place}: the content of a {role} message must be text, found {content!r:.40}")
    return {"role": ROLE_NAMES[role], "content": content}


def with_system(turns: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]
