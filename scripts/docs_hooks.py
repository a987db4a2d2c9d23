"""mkdocs hook: the pages that are made from the code when the site is built, so that none can be out of date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import docs_api  # noqa: E402  (the path above comes first)
import docs_cli  # noqa: E402
import docs_methods  # noqa: E402

#: files of the root that are pages too
FROM_ROOT = {"architecture.md": "ARCHITECTURE.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def from_root(name: str) -> str:
    """A file of the root, its links to other such files leading to their pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for page, other in FROM_ROOT.items():
        text = text.replace(f"({other})", f"({page})")
    return text


def pages() -> dict[str, str]:
    """Path below docs/ -> content, of every page that is not a file there."""
    reference = {"reference/cli.md": docs_cli.cli_page(), "reference/recipe.md": docs_cli.recipe_page()}
    root = {page: from_root(name) for page, name in FROM_ROOT.items()}
    return {**root, **docs_methods.pages(), **reference, **docs_api.pages()}


def on_config(config: Any) -> Any:
    """Fills the navigation entry of the methods, and lists pages of docs/ that no entry names under the guide."""
    listed = [{m.title: f"methods/{m.slug}.md"} for m in docs_methods.methods()]
    named = str(config["nav"])
    others = [p.name for p in sorted(Path(config["docs_dir"]).glob("*.md")) if p.name not in named]
    for entry in config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", {"Initialisations": "methods/inits.md"}, *listed]
        elif "Guide" in entry:
            entry["Guide"] += others
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files
