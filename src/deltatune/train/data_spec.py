"""What the data part of a recipe says, and the plain records that pass between the data modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deltatune.errors import DeltatuneError, hint

Format = Literal["auto", "messages", "alpaca", "prompt_completion", "text", "classification"]

#: The roles that a column can play in each format; `columns` in a recipe maps a role to a column's name.
ROLES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "input", "output", "system"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "classification": ("text", "label"),
}

IGNORE = -100  # the label that torch's cross entropy leaves out


class DataError(DeltatuneError):
    """Data that cannot be used, said in one sentence that names the place."""


class NoTrainedTokens(DataError):  # noqa: N818 - reads as what is wrong
    """An example that would add nothing to the loss."""


class DataSpec(BaseModel):
    """Which examples to train on and how they become tokens."""

    model_config = ConfigDict(extra="forbid")

    path: str | list[str] = Field(
        description="A file (JSONL, JSON, CSV, TSV, Parquet, text), several files, a directory, a hub data set "
        "or a built-in one such as sms_spam."
    )
    subset: str | None = Field(None, description="The configuration of a hub data set that has several.")
    split: str | None = Field(None, description="The training split; default: train, or all there is.")
    eval_path: str | list[str] | None = Field(None, description="Held-out examples, from another place.")
    eval_split: str | None = Field(None, description="The held-out split; default: validation, else test.")
    eval_fraction: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Share of the training examples to hold out when there is no held-out set; 0 turns it "
        "off; default: a tenth, 200 at most.",
    )
    format: Format = Field("auto", description="The layout of a row; auto looks at the columns.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Role to column name, e.g. {text: review, label: stars}."
    )
    template: str | None = Field(
        None, description='The prompt, with columns in braces, e.g. "Message: {text}\\nLabel:".'
    )
    as_chat: bool = Field(False, description="Put each prompt and completion through the model's chat template.")
    system: str | None = Field(None, description="System message for chats that have none.")
    max_length: int = Field(512, ge=2, description="Longest example, in tokens; longer ones are cut.")
    packing: bool = Field(False, description="Put several examples in one row, kept apart from each other.")
    train_on_prompt: bool = Field(False, description="Train on every token, not on the answers alone.")
    limit: int | None = Field(None, ge=1, description="Use at most this many training examples.")
    eval_limit: int | None = Field(None, ge=1, description="Use at most this many held-out examples.")
    shuffle: bool = Field(True, description="Shuffle before limits and held-out shares are taken.")
    seed: int = Field(0, description="Seed of the shuffle and of the held-out share.")

    @field_validator("path", "eval_path")
    @classmethod
    def _not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and (not value or (isinstance(value, list) and not all(value))):
            raise ValueError("is empty: name a file, a directory, a hub data set or a built-in one")
        return value

    @field_validator("template")
    @classmethod
    def _has_a_field(cls, value: str | None) -> str | None:
        if value is not None:
            template_fields(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        roles = ROLES[self.format] if self.format != "auto" else tuple({r for v in ROLES.values() for r in v})
        for role in self.columns:
            if role not in roles:
                raise ValueError(
                    f"columns: {role!r} is no role of the {self.format} format "
                    f"(roles: {', '.join(sorted(roles))}){hint(role, roles)}"
                )
        if self.eval_fraction and (self.eval_path is not None or self.eval_split is not None):
            raise ValueError("eval_fraction and a held-out set (eval_path, eval_split) exclude each other")
        if self.template is not None and self.format in ("messages", "text"):
            raise ValueError(f"template has no meaning for the {self.format} format; leave it out")
        return self


def template_fields(template: str) -> list[str]:
    """The column names in a template's braces.

    Raises:
        ValueError: a brace is not closed, a field is not a plain name, or there is no field at all.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} cannot be read: {error} (write {{{{ for a brace)") from None
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"template {template!r} must hold at least one column name in braces, such as {{text}}, "
            "and nothing else in braces"
        )
    return names


@dataclass(frozen=True)
class Example:
    """One example, before tokens. Exactly one of (prompt, completion), messages and text is set.

    The text that is trained is `prompt + separator + completion`; the separator, mostly a space, belongs to the
    answer's first token. It is kept apart so that another answer can be put in the place of this one.
    """

    prompt: str | None = None
    separator: str = ""
    completion: str | None = None
    messages: list[dict[str, str]] | None = None
    text: str | None = None
    source: str = ""  # file:row, for errors
    label: str | None = None  # classification: the label's name
    references: tuple[str, ...] = ()  # every accepted answer, where the data gives several


@dataclass(frozen=True)
class Examples:
    """The examples of a run, and what there is to say about them."""

    train: list[Example]
    eval: list[Example]
    format: str
    describe: str  # what was found and how it is read, in a sentence or two
    labels: list[str] | None = None  # classification: the closed set of answers
    licence: str | None = None
    citation: str | None = None
    name: str = ""
    template: str | None = None  # of the prompts, where they have one


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example, or of several packed into one row.

    `labels` has -100 where a token is not trained. `position_ids` is set for packed rows only and starts at 0
    again with each example.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] | None = None
    truncated: bool = False
    source: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """How many tokens count in the loss (the first never does: nothing comes before it)."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass
class Table:
    """Rows as read, before anyone knows what they mean."""

    rows: list[dict[str, Any]]
    sources: list[str]  # file:row of each
    name: str
    label_names: dict[str, list[str]] = field(default_factory=dict)  # column -> names of its integer labels
    licence: str | None = None
    citation: str | None = None
    template: str | None = None
