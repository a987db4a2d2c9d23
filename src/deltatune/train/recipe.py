"""Recipes: one YAML file that says model, method, data and training, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from deltatune.errors import ConfigError, hint
from deltatune.train.data import DataSpec
from deltatune.train.spec import EvalSpec, ReportSpec, Spec, TrainSpec

__all__ = [
    "DataSpec",
    "EvalSpec",
    "Recipe",
    "RecipeError",
    "ReportSpec",
    "TrainSpec",
    "load_recipe",
    "recipe_schema",
    "shipped_recipes",
]

_SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(ConfigError):
    """A recipe that cannot be read or that asks for something impossible."""


class Recipe(Spec):
    """Everything that reproduces a run. `deltatune recipes --schema` prints this as a JSON schema."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="Short name; the run lands in runs/<name>.")
    description: str = ""
    model: str = Field(min_length=1, description="A directory, a hub id, a .gguf file or a packaged model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    task: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Storage of the base weights; auto is bfloat16 on a GPU that has it, else float32."
    )
    quantization: Literal["4bit", "nf4", "fp4", "8bit", "native"] | None = Field(
        None,
        description="Load the base quantised: 4bit (NF4), fp4 or 8bit by bitsandbytes, or native NF4 in plain PyTorch; "
        "a low-rank method goes to all linear layers then unless it says otherwise.",
    )
    load_in_4bit: bool = Field(False, description="As quantization=4bit.")
    load_in_8bit: bool = Field(False, description="As quantization=8bit.")
    attn_implementation: str | None = None
    method: dict[str, Any] = Field(description="`peft_type` and the fields of that method's config class.")
    procedure: dict[str, Any] | None = Field(
        None, description="`name` and the options of a training procedure (relora, lora_plus, lisa, …)."
    )
    data: DataSpec
    train: TrainSpec = Field(default_factory=lambda: TrainSpec.model_validate({}))
    eval: EvalSpec = Field(default_factory=lambda: EvalSpec.model_validate({}))
    report: ReportSpec = Field(default_factory=lambda: ReportSpec.model_validate({}))
    output_dir: str | None = Field(None, description="Where the run is written; default runs/<name>.")

    @model_validator(mode="before")
    @classmethod
    def _quantised(cls, values: Any) -> Any:
        """`load_in_…` as `quantization`, and QLoRA's places for methods that have a rank."""
        if not isinstance(values, dict):
            return values
        for key, kind in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
            if values.get(key) is True:
                if values.get("quantization") not in (None, kind):
                    raise ValueError(f"{key} and quantization={values['quantization']} contradict each other: set one")
                values = {**values, key: False, "quantization": kind}
        method = values.get("method")
        if values.get("quantization") and isinstance(method, dict) and not method.get("target_modules"):
            _, fields = find_method(str(method.get("peft_type") or ""))
            if {"r", "target_modules"} <= fields and not method.get("target_parameters"):
                values = {**values, "method": {**method, "target_modules": "all-linear"}}
        return values

    @model_validator(mode="after")
    def _merge_aware(self) -> Recipe:
        if self.train.merge_aware is not None and not self.quantization:
            raise ValueError("train.merge_aware rounds to the base's storage: set quantization=4bit or 8bit as well")
        return self

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_method(value)

    @field_validator("procedure")
    @classmethod
    def _known_procedure(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        from deltatune.schedules import find_procedure

        return None if value is None else {**value, "name": find_procedure(value).name}

    @property
    def run_dir(self) -> Path:
        """Where this run is written."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name

    def to_yaml(self, *, brief: bool = False) -> str:
        """The recipe as YAML.

        Args:
            brief: leave out what has its default value. The whole text reproduces a run under later releases
                too, whose defaults may be others.
        """
        plain = self.model_dump(mode="json", exclude_defaults=brief, exclude_none=True)
        return yaml.dump({"name": self.name, **plain}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that keeps the lines of a text of several lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-3 as the number it is (YAML 1.1 wants 2.0e-3) and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """YAML to plain values.

    Raises:
        RecipeError: the text is not YAML; says the line.
    """
    try:
        # _Loader is a SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}{line}: not valid YAML ({problem})") from None


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes inside the package."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors and other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def load_recipe(path_or_name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, and apply `key=value` overrides.

    Args:
        path_or_name: a YAML file, or a name from `shipped_recipes()`.
        overrides: dotted keys with YAML values, such as `train.learning_rate=1e-3`.

    Raises:
        RecipeError: no such recipe, an unknown key (names the nearest one), or a value that cannot be.
    """
    raw = read_recipe(path_or_name)
    for override in overrides or []:
        apply_override(raw, override)
    return build_recipe(raw, str(path_or_name))


def read_recipe(path_or_name: str | Path) -> dict[str, Any]:
    """The plain values of a recipe file or a shipped recipe, named after the file if it has no name.

    Raises:
        RecipeError: no such recipe, or a file that is no YAML mapping.
    """
    path = _find(str(path_or_name))
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this file holds {_kind(raw)}")
    raw.setdefault("name", re.sub(r"[^\w.-]", "-", path.stem))
    return raw


def build_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """A checked recipe from plain values.

    Raises:
        RecipeError: one sentence with the first problem and how many more there are.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error)}") from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in `raw`, in place.

    Raises:
        RecipeError: not of the form key=value, or the key goes through a value that is no mapping.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"--set {override!r} is not of the form key=value, such as train.learning_rate=1e-3")
    if not _is_free(key) and key not in set(_known_keys()):
        raise RecipeError(f"--set {key}: a recipe has no such key{hint(key, _known_keys())}")
    set_value(raw, key, parse_yaml(text, f"--set {key}"))


def set_value(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the value under a dotted key, in place.

    Raises:
        RecipeError: the key goes through a value that is no mapping.
    """
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{key}: {parent} is {_kind(child)} in this recipe, not a mapping")
        node = child
    node[leaf] = value


def check_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """The flat method config, checked against the config class that its `peft_type` names in any case.

    Raises:
        ValueError: no peft_type, a method or a field that does not exist (names the nearest), a bad value.
    """
    from deltatune.config import get_peft_config

    name, fields = find_method(str(method.get("peft_type") or ""))
    for key in method:
        if key not in fields:
            raise ValueError(f"unknown key 'method.{key}': {name} has no such field{hint(key, fields)}")
    checked = {**method, "peft_type": name}
    get_peft_config(checked)
    return checked


def find_method(asked: str) -> tuple[str, set[str]]:
    """The registered name of a method, asked for in any case, and the fields of its config.

    Raises:
        ValueError: there is no such method (names the nearest), or none is named.
    """
    from deltatune.config import known_methods

    methods = known_methods()
    name = next((known for known in methods if known.casefold() == asked.casefold()), None)
    if name is None:
        raise ValueError(
            f"method.peft_type {asked!r} is not a method{hint(asked.upper(), methods)}"
            if asked
            else f"method.peft_type is missing: name one of {', '.join(methods)}"
        )
    return name, {field.name for field in dataclasses.fields(methods[name]) if field.init}


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise RecipeError(f"recipe file {name} does not exist{hint(path.stem, shipped)}")
    raise RecipeError(
        f"no recipe is called {name!r}{hint(name, shipped) or '; shipped recipes: ' + ', '.join(shipped)}"
    )


def _is_free(key: str) -> bool:
    """Whether `key` lies inside a mapping whose keys are the user's (method, data.columns, …)."""
    model: type[BaseModel] = Recipe
    for part in key.split(".")[:-1]:
        field = model.model_fields.get(part)
        if field is None:
            return False
        kinds = [typing.get_origin(kind) for kind in (field.annotation, *typing.get_args(field.annotation))]
        if dict in kinds:
            return True
        section = _section(field.annotation)
        if section is None:
            return False
        model = section
    return False


def _section(kind: Any) -> type[BaseModel] | None:
    """The section that a key holds, or may hold."""
    found = (k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return next(found, None)


def _known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def _sentence(error: ValidationError) -> str:
    """The first problem in words, with the number of those behind it."""
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key {key!r}{hint(key, _known_keys())}"
    elif first["type"] == "missing":
        text = f"{key} is missing"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        text = text if key.split(".")[0] in text or not key else f"{key}: {text}"
    else:
        text = f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
