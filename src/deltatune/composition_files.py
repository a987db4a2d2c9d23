"""A whole composition under one name: a folder with `composition.json` and one folder per adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.core.composition import Fuse, Node, from_json, leaves, nodes, to_json
from deltatune.core.files import write_atomically
from deltatune.errors import AdapterLoadError, ConfigError

if TYPE_CHECKING:
    from deltatune.peft_model import PeftModel

FILE = "composition.json"


def save_composition(
    model: PeftModel, directory: str | os.PathLike[str], composition: Node | None = None, **options: Any
) -> None:
    """Writes the tree and its adapters; the tree last, so that a folder with it is whole.

    Raises:
        ConfigError: nothing is composed, or the path is a file.
    """
    tree = composition if composition is not None else model.adapters.plan.tree
    if tree is None:
        raise ConfigError("no composition is active; give the one to save, or set_adapter(Stack(…)) first")
    if os.path.isfile(directory):
        raise ConfigError(f"{os.fspath(directory)!r} is a file; save_composition needs a directory")
    model.adapters.check_composition(tree)
    folder, folders = Path(directory), {}
    for i, name in enumerate(leaves(tree)):
        folders[name] = f"adapter_{i}"
        # an adapter named "default" goes to the folder itself, any other to one of its name
        model.save_pretrained(folder / folders[name], selected_adapters=[name], **options)
        if name != "default":
            folders[name] += f"/{name}"
    text = json.dumps({"composition": to_json(tree), "adapters": folders}, indent=1) + "\n"
    write_atomically(folder / FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_composition(
    model: PeftModel, directory: str | os.PathLike[str], *, is_trainable: bool = False, activate: bool = True
) -> Node:
    """Loads the adapters that a composition needs, and returns it.

    Raises:
        AdapterLoadError: the folder holds no composition. ConfigError, AdapterLoadError: an adapter does not fit.
    """
    path = Path(directory) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tree, folders = from_json(content["composition"]), content["adapters"]
    except FileNotFoundError as error:
        raise AdapterLoadError(f"{os.fspath(directory)!r} has no {FILE}; save_composition writes one") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterLoadError(f"{path} describes no composition: {error}") from error
    # fusions last: they go where the adapters that they fuse are
    fusions = {node.fusion_name for node in nodes(tree) if isinstance(node, Fuse)}
    for name in sorted(leaves(tree), key=lambda n: n in fusions):
        model.load_adapter(Path(directory) / folders[name], name, is_trainable=is_trainable)
    if activate:
        model.set_adapter(tree)
    return tree
