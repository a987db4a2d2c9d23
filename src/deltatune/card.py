"""The model card written beside an adapter, if the folder has none."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.config import PeftConfig
from deltatune.core.files import write_atomically
from deltatune.version import __version__


def write_card(folder: Path, model: nn.Module, config: PeftConfig) -> None:
    """Writes `README.md` with the hub's metadata; a card that is there already is left alone."""
    path = folder / "README.md"
    if path.exists():
        return
    base = config.base_model_name_or_path
    lines = ["---", "library_name: peft", *([f"base_model: {base}"] if base else []), "tags:"]
    lines += [f"- {config.method.lower()}", "- deltatune", "---", ""]
    lines += [f"# {config.method} adapter for {base or type(model).__name__}", ""]
    lines += [
        f"Made with deltatune {__version__}. Load it with deltatune or with Hugging Face peft:",
        "",
        "```python",
        "from deltatune import PeftModel",
        "model = PeftModel.from_pretrained(base_model, path_of_this_folder)",
        "```",
        "",
    ]
    write_atomically(path, lambda p: p.write_text("\n".join(lines), encoding="utf-8"))
