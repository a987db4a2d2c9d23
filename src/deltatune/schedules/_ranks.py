"""The ranks that a run has ended with, as a heat map: layers across, kinds of modules down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def table(ranks: Mapping[str, int]) -> tuple[list[str], list[str], list[list[int | None]]]:
    """(modules, layers, rows): a rank for every module in every layer, None where there is no such weight."""
    cells: dict[str, dict[str, int]] = {}
    layers: dict[str, None] = {}
    for path, rank in ranks.items():
        found = re.match(r"(.*?)\.?(\d+)\.(.*)", path)
        layer, module = (f"{_last(found[1])}{found[2]}", found[3]) if found else ("", path)
        layers[layer] = None
        cells.setdefault(module, {})[layer] = rank
    order = sorted(layers, key=lambda x: (re.sub(r"\d+$", "", x), int(re.search(r"\d*$", x)[0] or 0)))  # type: ignore[index]
    stacks = {re.sub(r"\d+$", "", layer) for layer in layers if layer}
    names = {layer: re.sub(r"^\D*", "", layer) if len(stacks) < 2 else layer for layer in layers}
    return list(cells), [names[x] for x in order], [[row.get(x) for x in order] for row in cells.values()]


def _last(path: str) -> str:
    """The stack that a layer is in: the part before its number, of the encoder or decoder if there are both."""
    parts = path.split(".")
    return f"{parts[0]}." if parts[0] in ("encoder", "decoder") else f"{parts[-1]}."


def draw_ranks(ranks: Mapping[str, int], top: int, path: Path) -> Path:
    """Writes the heat map as a PNG; `top` is the rank that every weight started with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modules, layers, rows = table(ranks)
    figure = Figure(figsize=(2.5 + 0.42 * len(layers), 1.3 + 0.42 * len(modules)), layout="constrained")
    axes = figure.add_subplot()
    numbers = [[float("nan") if r is None else r for r in row] for row in rows]
    image = axes.imshow(numbers, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xlabel("layer")
    for y, row in enumerate(rows):
        for x, rank in enumerate(row):
            if rank is not None:
                color = "black" if rank > 0.6 * top else "white"
                axes.text(x, y, str(rank), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="rank")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return path
