"""Configurations: one dataclass per method on a common base, read and written as `adapter_config.json`.

A configuration is data and, for its method, the builder of the edits: `build` is all the core asks for.
Registering the class makes the method known everywhere: loading, the CLI, the tests' laws, the docs.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from deltatune.errors import ConfigError, hint

if TYPE_CHECKING:
    from torch import nn

    from deltatune.core.adapters import AdapterSet
    from deltatune.core.bank import Bank
    from deltatune.core.edits import Edit
    from deltatune.core.named import Named
    from deltatune.core.sites import Site
    from deltatune.core.weights import WeightRef
    from deltatune.schedules.base import Procedure

CONFIG_NAME = "adapter_config.json"
#: the release of Hugging Face peft whose file format and field names we follow
PEFT_FORMAT = "0.21.2"


class TaskType(str, enum.Enum):
    """What the model is trained to do; chooses the PeftModel class and the heads that train."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


class _PeftTypes(type):
    """Lets registered names be read as attributes and iterated, like an enumeration that stays open."""

    names: ClassVar[dict[str, PeftType]] = {}

    def __getattr__(cls, name: str) -> PeftType:
        if name not in _PeftTypes.names and not name.startswith("_"):
            known_methods()
        try:
            return _PeftTypes.names[name]
        except KeyError:
            raise AttributeError(f"no method {name!r} is registered{hint(name, _PeftTypes.names)}") from None

    def __iter__(cls) -> Any:
        known_methods()
        return iter(_PeftTypes.names.values())

    def __contains__(cls, name: object) -> bool:
        known_methods()
        return name in _PeftTypes.names


class PeftType(str, metaclass=_PeftTypes):
    """The name of a method (`PeftType.LORA == "LORA"`); open: `register` adds to it."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)


#: method name -> configuration class
METHODS: dict[str, type[PeftConfig]] = {}
C = TypeVar("C", bound="type[PeftConfig]")


def register(cls: C) -> C:
    """Class decorator: makes a configuration's method known under its `peft_type`.

    Raises:
        ConfigError: another class has this name.
    """
    name = str(cls.method)
    if not cls.__module__.startswith("deltatune."):
        known_methods()  # so that a name that is taken is refused here
    if METHODS.get(name, cls).__qualname__ != cls.__qualname__:
        raise ConfigError(f"a method named {name!r} is already registered by {METHODS[name].__qualname__}")
    METHODS[name] = cls
    _PeftTypes.names[name] = PeftType(name)
    return cls


def known_methods() -> dict[str, type[PeftConfig]]:
    """method name -> configuration class, the shipped ones loaded."""
    from deltatune.methods import import_all

    import_all()
    return METHODS


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


@dataclass
class PeftConfig:
    """What every adapter says of itself.

    Args:
        task_type: a `TaskType` or its name.
        base_model_name_or_path: where the base came from; filled in when a model is wrapped.
        revision: the base's revision.
        inference_mode: True creates the adapter frozen.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = PEFT_FORMAT
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    #: the method's registered name; a subclass must give it
    method: ClassVar[str] = ""
    #: one line and the paper, for tables and docs
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    #: name -> options that make it another method, for which all laws hold too
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    #: the adapted model equals the base before training
    starts_as_base: ClassVar[bool] = True
    #: code of the method's page, for methods that are not attached by a configuration alone
    usage: ClassVar[str] = ""
    #: in training, chance decides at every call which of its parameters take part
    draws: ClassVar[bool] = False
    #: the model's inputs or attention are changed, not its layers
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType(self.method) if self.method else self.peft_type
        if self.task_type is not None and not isinstance(self.task_type, TaskType):
            names = [t.value for t in TaskType]
            if self.task_type not in names:
                raise ConfigError(
                    f"task_type {self.task_type!r} is not one of {', '.join(names)}{hint(self.task_type, names)}"
                )
            self.task_type = TaskType(self.task_type)

    # ------------------------------------------------------------------ writing
    def to_dict(self) -> dict[str, Any]:
        """The fields as Python values (what `get_peft_config` takes back)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def to_json(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` has them."""
        return {k: _plain(v) for k, v in sorted(self.to_dict().items())}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes `adapter_config.json` into a directory (made if absent), atomically."""
        from deltatune.core.files import write_atomically

        if os.path.isfile(save_directory):
            raise ConfigError(f"{os.fspath(save_directory)!r} is a file; save_pretrained needs a directory")
        content = self.to_json()
        for key, value in kwargs.items():
            if key in content:
                content[key] = _plain(value)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_atomically(Path(save_directory) / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    # ------------------------------------------------------------------ reading
    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "the configuration") -> PeftConfig:
        """The configuration that `values` describe, of the class its `peft_type` names.

        Raises:
            ConfigError: an unknown method, or an unknown key that is set to something.
        """
        name = values.get("peft_type") or cls.method
        if not name:
            raise ConfigError(f"{where} has no peft_type, so its method is unknown")
        methods = known_methods()
        kind = methods.get(str(getattr(name, "value", name)))
        if kind is None:
            raise ConfigError(f"{where} is for the method {name!r}, which is unknown{hint(str(name), methods)}")
        names = {f.name for f in dataclasses.fields(kind) if f.init}
        for key, value in values.items():
            # an empty value of a key that we do not have asks for nothing
            if key not in names and key not in kind.ignored_keys() and value not in (None, False, {}, [], ""):
                raise ConfigError(f"{where} sets {key!r}, which {kind.__name__} does not have{hint(key, names)}")
        return kind(**kind.completed({k: v for k, v in values.items() if k in names}))

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A file's values with what the absence of a field means in it, where that is not the field's default."""
        return values

    @classmethod
    def ignored_keys(cls) -> set[str]:
        """Keys that files may hold and that do not change the mathematics."""
        return {"runtime_config"}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Reads the configuration of an adapter in a directory or on the hub; keywords override fields."""
        from deltatune.core.files import find_file, split_hub_options

        hub, fields = split_hub_options(kwargs)
        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        values = cls.from_json_file(path)
        return cls.from_dict({**values, **fields}, where=f"{os.fspath(path)}")

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The raw content of an `adapter_config.json`."""
        try:
            values = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{os.fspath(path_json_file)} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{os.fspath(path_json_file)} holds no JSON object")
        return {**values, **kwargs}

    def procedures(self) -> list[Procedure]:
        """The training procedures that belong to the method (see `deltatune.schedules`); most have none."""
        return []

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The configuration class is chosen by `peft_type`."""
        return cls.from_dict(kwargs)


#: modules that a task's freshly initialised head is called, trained unless the user says otherwise
TASK_HEADS: dict[TaskType, list[str]] = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}


@dataclass
class TargetedConfig(PeftConfig):
    """A method that goes to chosen modules.

    Args:
        target_modules: a list of name endings, a regular expression over whole paths, `"all-linear"`, or None
            for the attention's query and value.
        exclude_modules: a list or regular expression of modules to leave out.
        modules_to_save: modules of which a whole copy trains and is saved beside the adapter.
        layers_to_transform: layer numbers to adapt; all if None.
        layers_pattern: the name before the layer number, where a model counts layers more than once.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    optional_modules_to_save: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    #: fields that peft's files of this method do not have; they are written only where they are set
    ours: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save must be a list of names, not the string {self.modules_to_save!r}")
        self._add_heads()

    def _add_heads(self) -> None:
        """A task's own head is new, so it trains; names of heads that the model lacks do no harm."""
        if self.task_type not in TASK_HEADS:
            return
        heads = TASK_HEADS[TaskType(self.task_type)]
        mine = list(self.modules_to_save or [])
        self.optional_modules_to_save = {h for h in heads if h not in mine} | set(heads)
        self.modules_to_save = [*mine, *(h for h in heads if h not in mine)]

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k not in self.ours or v}

    def written(self, model: nn.Module) -> dict[str, Any]:
        """Fields as files hold them: what was found in the model's structure is named, for readers with other rules."""
        from deltatune.core.sites import written_targets

        return {"target_modules": written_targets(model, self)}

    @classmethod
    def example(cls, **fields: Any) -> TargetedConfig:
        """A small configuration, for tests and documentation; a method overrides it where it needs more."""
        return cls(**fields)

    def sites(self, model: nn.Module) -> list[Site]:
        """Where this configuration goes in `model`.

        Raises:
            TargetError: a pattern matches nothing or something that cannot be adapted.
        """
        from deltatune.core.sites import targets, weight_sites

        return weight_sites(model, targets(model, self))

    def prepare(self, model: nn.Module) -> Callable[[], None] | None:
        """Changes the base before anything is attached (grown depth); returns what undoes it."""
        return None

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        """Edits that come from no weight site of their own, given those that were made."""
        return []

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        """The edits of one weight."""
        raise NotImplementedError

    def bank(self, weights: Sequence[tuple[WeightRef, Site]]) -> Bank | None:
        """Tensors that all sites share, made before any site's edits; None for methods without."""
        return None

    def build_shared(self, ref: WeightRef, site: Site, bank: Bank) -> Edit | Sequence[Edit]:
        """As `build`, for a method that has a bank."""
        raise NotImplementedError

    def add_weighted(self, adapters: AdapterSet, names: Sequence[str], weights: Sequence[float], name: str) -> bool:
        """Adds the weighted sum of adapters as one of this method, frozen and not active; False if that is none."""
        return False

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        """The edits of a whole module, for sites without a parameter."""
        raise NotImplementedError


@dataclass
class StructuredConfig(TargetedConfig):
    """A method that finds its places in a model's structure.

    Args:
        roles: names for what the structure does not show, as `{"blocks": r"net\\.stage_\\d+", "attention": ["mixer"]}`;
            values are patterns as in `target_modules`, and an empty list says that there is no such part. They describe
            the model and not the method, so one table serves all methods. The roles are those of `core/named.py`.
    """

    roles: dict[str, Any] = field(default_factory=dict)

    ours: ClassVar[tuple[str, ...]] = ("roles",)
    #: `roles` still says something where `target_modules` is given
    names_targets_too: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.roles or {}
        if not isinstance(given, dict):
            raise ConfigError(f'roles must be a table, as {{"attention": ["mixer"]}}, not {given!r}')
        self.roles = {k: sorted(v) if isinstance(v, (set, tuple)) else v for k, v in given.items()}
        for role, value in self.roles.items():
            names = value if isinstance(value, list) else [value]
            if not all(isinstance(name, str) for name in names):
                raise ConfigError(
                    f"roles[{role!r}] must be a list of name endings or a regular expression, not {value!r}"
                )

    def written(self, model: nn.Module) -> dict[str, Any]:
        values = super().written(model)
        if values["target_modules"] is not None and not self.names_targets_too:
            values["roles"] = {}  # what they named is among the targets
        return values

    def named(self, model: nn.Module) -> Named:
        """The modules that `roles` name in a model.

        Raises:
            ConfigError: an unknown role. TargetError: a pattern that matches nothing.
        """
        from deltatune.core.named import Named

        if self.roles and self.target_modules is not None and not self.names_targets_too:
            raise ConfigError("target_modules names the places itself, so roles means nothing beside it; choose one")
        return Named.of(model, self.roles)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dictionary with `peft_type` describes."""
    return PeftConfig.from_dict(config_dict)
