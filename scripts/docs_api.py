"""The API reference: signatures and docstrings of the names listed here, one page per subject."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from docs_text import code, markdown

from deltatune.schedules import PROCEDURES

#: page -> (title, introduction, names: "module:name", or "module" for all that the module defines)
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "models": (
        "Models and adapters",
        "Everything here is imported from `deltatune`.",
        (
            "deltatune:get_peft_model",
            "deltatune:inject_adapter_in_model",
            "deltatune:PeftModel",
            "deltatune.peft_model:BaseTuner",
            "deltatune:AutoPeftModel",
            "deltatune:plan_targets",
            "deltatune:get_layer_status",
            "deltatune:get_model_status",
        ),
    ),
    "files": (
        "Configurations and files",
        "Configuration classes of the methods have [pages of their own](../methods/index.md).",
        (
            "deltatune:PeftConfig",
            "deltatune:TargetedConfig",
            "deltatune:TaskType",
            "deltatune:PeftType",
            "deltatune:get_peft_config",
            "deltatune:get_peft_model_state_dict",
            "deltatune:set_peft_model_state_dict",
            "deltatune:load_peft_weights",
            "deltatune.core.checkpoint:LoadReport",
            "deltatune:convert_to_lora",
            "deltatune:save_as_lora",
            "deltatune.plain_lora:LoraReport",
            "deltatune.formats.loralib",
            "deltatune.errors",
        ),
    ),
    "core": (
        "For people who write methods",
        "The contract is explained in [Architecture](../architecture.md).",
        (
            "deltatune:register",
            *(f"deltatune.core.edits:{n}" for n in ("Edit", "Delta", "LowRank", "ModuleEdit", "KVEdit", "PromptEdit")),
            "deltatune.core.edits:Slot",
            "deltatune.core.weights:WeightRef",
            "deltatune.core.ops:LinearOp",
            "deltatune.core.ops:register_op",
            "deltatune.stores:Store",
            "deltatune.stores:register_store",
            "deltatune.core.sites:Site",
            "deltatune.core.bank:Bank",
            "deltatune.core.adapters:AdapterSet",
            "deltatune.core.plan:Plan",
            "deltatune.inits:Request",
            "deltatune.inits:Start",
            "deltatune.inits:register_init",
        ),
    ),
    "procedures": (
        "Training procedures",
        "What happens over time, from `deltatune.schedules`; see [Training procedures](../procedures.md).",
        (
            "deltatune.schedules:attach",
            "deltatune.schedules:mark",
            "deltatune.schedules:Attached",
            "deltatune.train.procedures:ProcedureCallback",
            *(f"{cls.__module__}:{cls.__name__}" for cls in map(PROCEDURES.get, sorted(PROCEDURES)) if cls),
            "deltatune.schedules.lora_plus:lora_plus_groups",
            "deltatune.methods.lora_fa:project_gradients",
            "deltatune.schedules:interpolate_positions",
            "deltatune.schedules:Procedure",
            "deltatune.schedules:Schedule",
            "deltatune.schedules:Run",
            "deltatune.schedules:Rate",
        ),
    ),
    "train": (
        "Training from Python",
        "What `deltatune train` and `deltatune eval` call. Needs the extra `train`.",
        (
            "deltatune.train.recipe:load_recipe",
            "deltatune.train.run:train",
            "deltatune.train.run:RunResult",
            "deltatune.train.plan:plan",
            "deltatune.train.models:resolve_model",
            "deltatune.train.models:load_model",
            "deltatune.train.models:load_tokenizer",
            "deltatune.train.data_load:load_examples",
            "deltatune.train.data_encode:encode",
            "deltatune.train.data_batch:pack",
            "deltatune.train.data_batch:Collator",
            "deltatune.train.evaluate:evaluate",
        ),
    ),
}


def pages() -> dict[str, str]:
    """Path below docs/ -> content."""
    return {f"reference/{name}.md": _page(*about) for name, about in PAGES.items()}


def _page(title: str, introduction: str, names: tuple[str, ...]) -> str:
    parts = [f"# {title}", introduction]
    for where in names:
        module, _, name = where.partition(":")
        parts += [_entry(module, name)] if name else [_entry(module, n) for n in defined(module)]
    return "\n\n".join(parts) + "\n"


def defined(module: str) -> list[str]:
    """The public classes and functions that a module defines, in its own order."""
    found = vars(import_module(module))
    return [n for n, o in found.items() if n[0] != "_" and getattr(o, "__module__", "") == module and callable(o)]


def _entry(module: str, name: str) -> str:
    thing = getattr(import_module(module), name)
    where = module if module == "deltatune" else thing.__module__
    head = f"## {name}\n\n```python\nfrom {where} import {name}\n"
    if inspect.isclass(thing):
        return f"{head}```\n\n{_doc(thing)}{_members(thing)}"
    return f"{head}\n{signature(name, thing)}\n```\n\n{_doc(thing)}"


def _members(cls: type[Any]) -> str:
    """Public methods and properties that the class itself defines."""
    lines = []
    for name, member in vars(cls).items():
        plain = member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))
        if name.startswith("_") or not inspect.isfunction(plain) or not plain.__doc__:
            continue
        shown = name if isinstance(member, property) else signature(name, plain)
        doc = _doc(plain).replace("\n", "\n    ")
        lines.append(f"- {code(shown)}\n\n    {doc}".rstrip())
    return "\n" + "\n\n".join(lines) + "\n" if lines else ""


class _Text(str):
    """An annotation that prints as it is written in the source."""

    def __repr__(self) -> str:
        return str(self)


def signature(name: str, function: Any) -> str:
    """`name(arguments) -> result` on one line."""
    found = inspect.signature(function)
    shown = [
        p.replace(annotation=p.annotation if p.annotation is p.empty else _Text(p.annotation))
        for i, p in enumerate(found.parameters.values())
        if i or p.name not in ("self", "cls") or p.annotation is not p.empty  # `register(cls: C)` is no method
    ]
    result = found.return_annotation
    result = result if result is found.empty else _Text(result)
    return f"{name}{found.replace(parameters=shown, return_annotation=result)}"


def _doc(thing: Any) -> str:
    return markdown(inspect.getdoc(thing) or "")
