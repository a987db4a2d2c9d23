"""AutoPeftModel…: the base and its adapter from the adapter's name alone."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from deltatune.config import PeftConfig, TaskType
from deltatune.core.files import split_hub_options
from deltatune.errors import ConfigError
from deltatune.peft_model import PeftModel

#: libraries that an adapter's configuration may ask to import a base class from
IMPORT_ALLOWLIST = ("transformers", "diffusers", "sentence_transformers", "torchvision", "timm")


class _AutoPeftModel:
    """Loads the base that an adapter names, then the adapter.

    The base's class is transformers' `auto_class`, or the one the adapter's `auto_mapping` names.
    """

    auto_class: ClassVar[str] = ""
    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(path)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: tuple[str, ...] = IMPORT_ALLOWLIST,
        **kwargs: Any,
    ) -> PeftModel:
        """The base, loaded with `kwargs` (`dtype`, `device_map`, …), and its adapter.

        Raises:
            ConfigError: the adapter names no base, or is for another task.
        """
        subfolder = kwargs.pop("subfolder", None)
        adapter_options = {k: kwargs.pop(k) for k in ("strict", "key_mapping") if k in kwargs}
        hub, base_options = split_hub_options(kwargs)
        where = {**hub, **({"revision": revision} if revision else {}), "subfolder": subfolder}
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        base = config.base_model_name_or_path
        if not base:
            raise ConfigError(
                f"{os.fspath(pretrained_model_name_or_path)!r} does not say which base it is for; load the base "
                "yourself and use PeftModel.from_pretrained"
            )
        if cls.task is not None and config.task_type not in (None, cls.task):
            raise ConfigError(
                f"this adapter is for {config.task_type}, so {cls.__name__} cannot load it; use AutoPeftModel"
            )
        if config.revision:
            base_options["revision"] = config.revision
        base_options |= {k: v for k, v in hub.items() if k != "revision"}
        model = cls._base_class(config, import_allowlist).from_pretrained(base, **base_options)
        return PeftModel.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **where,
            **adapter_options,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowlist: tuple[str, ...]) -> Any:
        import transformers

        if cls.auto_class:
            return getattr(transformers, cls.auto_class)
        if config.task_type is not None:
            return getattr(transformers, BY_TASK[TaskType(config.task_type)].auto_class)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not library or not name:
            raise ConfigError("this adapter names neither a task_type nor a class of its base (auto_mapping)")
        if library.split(".")[0] not in allowlist:
            raise ConfigError(
                f"this adapter asks to import {library!r}, which is not in import_allowlist {allowlist}; add it if "
                "you trust the adapter"
            )
        return getattr(importlib.import_module(library), name)


class AutoPeftModel(_AutoPeftModel):
    """Any task; the class comes from the adapter's configuration."""


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """Decoder language models."""

    auto_class, task = "AutoModelForCausalLM", TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """Encoder-decoder language models."""

    auto_class, task = "AutoModelForSeq2SeqLM", TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """One label per sequence."""

    auto_class, task = "AutoModelForSequenceClassification", TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """One label per token."""

    auto_class, task = "AutoModelForTokenClassification", TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    """Answer spans."""

    auto_class, task = "AutoModelForQuestionAnswering", TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """Hidden states."""

    auto_class, task = "AutoModel", TaskType.FEATURE_EXTRACTION


BY_TASK: dict[TaskType, type[_AutoPeftModel]] = {
    kind.task: kind
    for kind in (
        AutoPeftModelForCausalLM,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForFeatureExtraction,
    )
    if kind.task is not None
}
