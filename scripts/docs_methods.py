"""The table of methods and one page per method, all from the registry and the methods' own files."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from docs_probe import KINDS, Abilities, abilities
from docs_text import code, link, named, prose, sections, table

import deltatune
from deltatune.config import PeftConfig, known_methods
from deltatune.errors import DeltatuneError
from deltatune.inits import INITS

#: fields that every file has and nobody sets
FROM_FILES = {
    "peft_type": "set by the class",
    "auto_mapping": "the base's class, written into files without a task_type",
    "peft_version": "the release of peft whose file format is followed",
}
HEAD = ("Method", "Configuration", "What changes", "Layers", "Merges", "Mixed batches", "Paper")


@dataclass(frozen=True)
class Method:
    """One line of the table: a registered method, or an option that makes another method of it.

    Attributes:
        title: its name as people write it. slug: the name of its page.
        config: the configuration class. options: what makes it this method.
        module: the file with its mathematics. summary, paper: one line each.
    """

    title: str
    slug: str
    config: type[PeftConfig]
    options: tuple[tuple[str, Any], ...]
    module: str
    summary: str
    paper: str

    @property
    def call(self) -> str:
        """The configuration as code."""
        return f"{self.config.__name__}({', '.join(f'{k}={v!r}' for k, v in self.options)})".removesuffix("()")

    @property
    def file(self) -> str:
        return f"src/{self.module.replace('.', '/')}.py"

    @property
    def doc(self) -> str:
        return inspect.getdoc(import_module(self.module)) or ""


def first_line(module: str) -> str:
    return (inspect.getdoc(import_module(module)) or "").partition("\n")[0].rstrip(".")


def title_of(module: str, kind: type | None = None) -> str:
    """`LoRA` of `LoRA: Low-Rank Adaptation … (arXiv …).`; else the words of the configuration's name."""
    line = first_line(module)
    if ":" in line or kind is None:
        return line.partition(":")[0]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__.removesuffix("Config"))


def methods() -> list[Method]:
    """Every shipped method, by name."""
    found = []
    for kind in known_methods().values():
        module = kind.__module__
        if not module.startswith("deltatune."):
            continue
        slug = str(kind.method).lower()
        found.append(Method(title_of(module, kind), slug, kind, (), module, kind.summary, kind.paper))
        found += _variants(kind)
    return sorted(found, key=lambda m: m.title.lower())


def _variants(kind: type[PeftConfig]) -> list[Method]:
    """Options that have a mathematics file of their own (`VARIANTS` in the method's file)."""
    table_of = getattr(sys.modules[kind.__module__], "VARIANTS", {})
    found = []
    for option, where in table_of.items():
        module = where.partition(":")[0]
        papers = re.findall(r"arXiv \d{4}\.\d+|openreview \w+", first_line(module))
        summary = re.sub(r"^[^:]*: | \([^)]*\)$", "", first_line(module))
        slug = module.rpartition(".")[2]
        found.append(Method(title_of(module), slug, kind, ((option, True),), module, summary, ", ".join(papers)))
    return found


def layers_of(can: Abilities) -> str:
    return "all" if can.layers == tuple(KINDS) else ", ".join(can.layers)


def method_table(link_to: str = "{file}") -> str:
    """The table of all methods; `link_to` is where a title leads, `{file}` or `{slug}` filled in."""
    rows = []
    for m in methods():
        can = abilities(m.config, dict(m.options))
        where = link_to.format(file=m.file, slug=m.slug)
        flags = ["yes" if flag else "no" for flag in (can.merges, can.mixed)]
        rows.append([f"[{m.title}]({where})", code(m.call), m.summary, layers_of(can), *flags, link(m.paper)])
    return table(HEAD, rows)


# ---------------------------------------------------------------------- pages
def descriptions(kind: type) -> dict[str, str]:
    """field -> description, from the `Args:` of a configuration class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base) and base.__dict__.get("__doc__"):
            found |= named(sections(base.__doc__ or "")[1].get("Args", ""))
    options_of_inits = {init.option: name for name, init in INITS.items() if init.option}
    found |= {option: f"options of `init_lora_weights={name!r}`" for option, name in options_of_inits.items()}
    return found | FROM_FILES


def refused(kind: type) -> set[str]:
    """The fields that the class has for peft's sake and refuses to be set."""
    return {name for names in ("not_yet", "not_here") for name in getattr(kind, names, ())}


def type_of(field: dataclasses.Field[Any]) -> str:
    return str(field.type).replace(" | ", " or ")


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def option_tables(kind: type[PeftConfig]) -> str:
    """The fields of a configuration class: its own first, then those that all methods have."""
    said, gone = descriptions(kind), refused(kind)
    common = {f.name for f in dataclasses.fields(deltatune.TargetedConfig)}
    groups: dict[str, list[list[str]]] = {"Options": [], "Options of every method": []}
    for field in dataclasses.fields(kind):
        if field.init and field.name not in gone:
            group = "Options of every method" if field.name in common else "Options"
            row = [code(field.name), code(type_of(field)), code(default_of(field)), prose(said.get(field.name, ""))]
            groups[group].append(row)
    head = ("Field", "Type", "Default", "Meaning")
    text = "\n".join(f"## {title}\n\n{table(head, rows)}" for title, rows in groups.items() if rows)
    names = ", ".join(code(name) for name in sorted(gone))
    return text + (
        f"\nFields of peft's configuration that this method refuses when they are set: {names}.\n" if gone else ""
    )


def page(m: Method) -> str:
    """The page of one method."""
    can = abilities(m.config, dict(m.options))
    body = m.doc.partition("\n")[2].strip("\n")
    facts = [
        ["Configuration", code(m.call)],
        ["`peft_type`", code(m.config.method)],
        ["Paper", link(m.paper) or "none"],
        ["Layers", ", ".join(can.layers)],
        ["Merges into the base", "yes" if can.merges else "no"],
        ["Rows of a batch may use different adapters", "yes" if can.mixed else "no"],
        ["Starts as the base", "yes" if m.config.starts_as_base else "no"],
        ["Source", code(m.file)],
    ]
    return (
        f"# {m.title}\n\n{link(first_line(m.module))}.\n\n{link(prose(body))}\n\n{table(['', ''], facts)}\n"
        f"```python\n{snippet(m)}```\n\n"
        f"{option_tables(m.config)}"
    )


def snippet(m: Method) -> str:
    """How the method is attached, as code; its own where options alone do not say it."""
    if m.config.usage:
        return inspect.cleandoc(m.config.usage) + "\n"
    name = m.config.__name__
    text = ", ".join(f"{k}={v!r}" for k, v in (_usual(m.config) | dict(m.options)).items()).replace("'", '"')
    imports = (
        f"from deltatune import {', '.join(sorted([name, 'get_peft_model']))}\n"
        if name in deltatune.__all__
        else f"from deltatune import get_peft_model\nfrom {m.config.__module__} import {name}\n"
    )
    return f"{imports}\nconfig = {name}({text})\nmodel = get_peft_model(base, config)\n"


def _usual(kind: Any) -> dict[str, Any]:
    """Options of a first try: the task, where it goes, and what the class cannot do without."""
    fields = kind.__dataclass_fields__
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "num_virtual_tokens" in fields:
        options["num_virtual_tokens"] = 20
    elif not kind.is_adaption_prompt and "conv" in abilities(kind).layers:  # others find the tables they are for
        options["target_modules"] = ["q_proj", "v_proj"]
    try:
        given = kind.example(target_modules=["q_proj"])
    except DeltatuneError:  # it finds its places by itself
        given = kind.example()
    empty = {None, ""}
    for name, field in fields.items():
        value = getattr(given, name)
        needed = field.default in (*empty, dataclasses.MISSING) and field.default_factory is dataclasses.MISSING
        if needed and field.init and isinstance(value, (int, list)) and name not in options:
            options[name] = value
    return options


def inits_page() -> str:
    """Every `init_lora_weights`, from its own file."""
    lines = ["# Initialisations\n", (inspect.getdoc(sys.modules["deltatune.inits"]) or "").strip() + "\n"]
    for name, init in sorted(INITS.items()):
        doc = inspect.getdoc(init.make) or ""
        lines += [f"## `init_lora_weights={name!r}`\n", f"{doc}\n"]
        if init.needs_data:
            lines += ["Starts from data: call `deltatune.inits.data.prepare_init` first.\n"]
        module = init.make.__module__
        if module.rpartition(".")[2] == name:
            lines += [f"{link(prose(inspect.getdoc(import_module(module)) or ''))}\n"]
        if init.options is not None:
            fields = dataclasses.fields(init.options)
            said = named(sections(init.options.__doc__ or "")[1].get("Args", ""))
            rows = [[code(f.name), code(type_of(f)), code(default_of(f)), prose(said.get(f.name, ""))] for f in fields]
            lines += [f"`{init.option}`:\n", table(("Field", "Type", "Default", "Meaning"), rows)]
    return "\n".join(lines)


def index_page() -> str:
    """The table, leading to the pages."""
    return (
        "# Methods\n\nGenerated from the registry. *Layers*, *merges* and *mixed batches* were found by trying each "
        "method on small networks: `conv` stands for convolutions of 1 to 3 dimensions with groups, `attention` for "
        "`nn.MultiheadAttention`, `Conv1D` for transformers' transposed linear layer.\n\n"
        + method_table("{slug}.md")
        + "\nHow low-rank factors can start is on the page of [initialisations](inits.md).\n"
    )


def pages() -> dict[str, str]:
    """Path below docs/ -> content."""
    made = {f"methods/{m.slug}.md": page(m) for m in methods()}
    return {"methods/index.md": index_page(), **made, "methods/inits.md": inits_page()}
