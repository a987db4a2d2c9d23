"""The start of a ladder's side network: the base's weights, cut down by structure (arXiv 2206.06522, section 3.3).

importance of a dimension = Σ of g² (Fisher) or of w² over all rows and columns that belong to it
hidden states         the d/r most important, the same in every matrix of the stack
a feed-forward part   the f/r most important, of every block its own
a head                of every r neighbouring dimensions the best, one choice for all heads of a block, so that
                      queries fit keys, and rotated pairs stay pairs and keep about their frequency
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.core.named import UNNAMED, Named
from deltatune.core.roles import role_of
from deltatune.core.sites import base_modules, is_linear
from deltatune.core.structure import Block, attention_parts, feedforward, feedforward_outputs, fused_experts, out_in
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits._watch import GradientWatch
from deltatune.inits.data import Collector, evaluated, rows_of_batch, summed

if TYPE_CHECKING:
    from deltatune.methods.ladder import LadderConfig

#: (what the dimensions belong to, how many make one set): the rows of a fused projection are several sets
Space = tuple[str, int]
HIDDEN = "hidden"


class Cut:
    """Which rows and columns of a stack's tensors belong together.

    Args:
        stack: the base's. blocks: its blocks. d, head: widths of hidden states and of a head.
    """

    def __init__(self, stack: nn.Module, blocks: Sequence[Block], d: int, head: int, named: Named = UNNAMED) -> None:
        self.stack, self.blocks, self.d, self.head = stack, blocks, d, head
        #: name of a parameter -> the spaces of its matrix's rows and columns
        self.spaces: dict[str, tuple[Space | None, Space | None]] = {}
        #: space -> importance of its dimensions
        self.scores: dict[str, Tensor] = {}
        inside = {block.path: self._block(block, named) for block in blocks}
        for path, module in base_modules(stack):
            block = next((b for b in inside if f"{path}.".startswith(f"{b}.")), None)
            rows, columns = inside[block].get(path, (None, None)) if block is not None else (None, None)
            for leaf in module._parameters:
                name = f"{path}.{leaf}".lstrip(".")
                self.spaces[name] = inside[block].get(name, (rows, columns)) if block else (rows, columns)

    def _block(self, block: Block, named: Named) -> dict[str, tuple[Space | None, Space | None]]:
        """path of a layer, or name of a parameter -> the spaces of its rows and columns."""
        hidden, head = (HIDDEN, self.d), (f"{block.path} head", self.head)
        found: dict[str, tuple[Space | None, Space | None]] = {}
        for part in attention_parts(self.stack, block, named):
            for path, module in base_modules(self.stack.get_submodule(part)):
                leaf = path.rpartition(".")[2]
                inward = role_of(leaf) is not None or leaf.startswith("pos")
                full = f"{part}.{path}".rstrip(".")
                if is_linear(module):
                    found[full] = (head, hidden) if inward else (hidden, head)
                elif leaf.startswith(("q_", "k_", "query_", "key_")):  # norms of queries and keys
                    found[full] = (head, None)
        ends = feedforward_outputs(self.stack, block, named)
        experts = fused_experts(self.stack, block)
        inner = (f"{block.path} feed-forward", self._width(ends, experts))
        for path in feedforward(self.stack, block, named):
            found[path] = (hidden, inner) if path in ends else (inner, hidden)
        for name in experts:
            module = self.stack.get_submodule(name.rpartition(".")[0])
            for leaf, param in module._parameters.items():
                if param is not None and param.ndim == 3:
                    here = f"{name.rpartition('.')[0]}.{leaf}"
                    found[here] = (hidden, inner) if here == name else (inner, hidden)
        return found

    def _width(self, ends: Sequence[str], experts: Sequence[str]) -> int:
        """Units of a feed-forward part."""
        if experts:
            path, _, leaf = experts[0].rpartition(".")
            return int(WeightRef(self.stack.get_submodule(path), leaf).shape[-1])
        return out_in(self.stack.get_submodule(ends[0]))[1] if ends else self.d

    def _fitting(self, name: str, shape: Sequence[int]) -> list[Space | None]:
        """The space of each axis of a matrix; what no layer says is told by its size."""
        known = self.spaces[name]
        if known == (None, None):
            known = ((HIDDEN, self.d), (HIDDEN, self.d))
        return [s if s is not None and n % s[1] == 0 else None for s, n in zip(known, shape[-2:], strict=True)]

    # ------------------------------------------------------------------ importance
    def add(self, name: str, importance: Tensor) -> None:
        """Counts a tensor's importance, `(*batch, out, in)` as its weight's matrix is, for its rows and columns."""
        importance = importance.float().cpu()
        for axis, space in zip((-2, -1), self._fitting(name, importance.shape), strict=True):
            if space is not None:
                key, n = space
                total = importance.movedim(axis, 0).flatten(1).sum(1).view(-1, n).sum(0)
                self.scores[key] = self.scores.get(key, torch.zeros(n)) + total

    def weigh(self) -> None:
        """Importance by magnitude: w²."""
        for name in self.spaces:
            path, _, leaf = name.rpartition(".")
            module = self.stack.get_submodule(path)
            if module._parameters.get(leaf) is not None and not getattr(_ref(module, leaf).op, "looks_up", False):
                self.add(name, _matrix(module, leaf).square())

    # ------------------------------------------------------------------ cutting
    def chosen(self, key: str, m: int) -> Tensor:
        """The `m` dimensions of a space that stay, rising."""
        score = self.scores[key]
        if not key.endswith(" head"):
            return score.topk(m).indices.sort().values
        half, kept = len(score) // 2, m // 2
        both = (score[:half] + score[half : 2 * half])[: kept * (half // kept)].view(kept, -1)
        one = both.argmax(1) + torch.arange(kept) * both.shape[1]
        return torch.cat([one, one + half])

    @torch.no_grad()
    def fill(self, thin: nn.Module, names: Mapping[str, str]) -> None:
        """Fills a thin network's tensors; `names`: path of a block of its -> that of the base's.

        Raises:
            ConfigError: one does not fit.
        """
        for path, module in base_modules(thin):
            for leaf, param in module._parameters.items():
                if param is None or not param.requires_grad:
                    continue
                name = self._source(f"{path}.{leaf}".lstrip("."), names)
                owner, _, _ = name.rpartition(".")
                w, wanted = _matrix(self.stack.get_submodule(owner), leaf), _ref(module, leaf).op.matrix(param).shape
                for axis, space in zip((-2, -1), self._fitting(name, w.shape), strict=True):
                    n, m = w.shape[axis], wanted[axis]
                    if space is not None and n != m:
                        index = self.chosen(space[0], m * space[1] // n)
                        index = (torch.arange(n // space[1])[:, None] * space[1] + index).flatten()
                        w = w.index_select(axis, index.to(w.device))
                if w.shape != wanted:
                    raise ConfigError(
                        f"{name!r} of shape {tuple(w.shape)} cannot be cut down to {tuple(wanted)}; take start='random'"
                    )
                param.copy_(_ref(module, leaf).op.stored(w, param.shape))

    def _source(self, name: str, names: Mapping[str, str]) -> str:
        """The base's parameter for one of the thin network; a part that one block has for all may be in another."""
        here = next((b for b in names if name.startswith(f"{b}.")), None)
        if here is None:
            return name
        rest = name.removeprefix(here)
        wanted = [names[here] + rest, *(b.path + rest for b in self.blocks)]
        return next((n for n in wanted if n in self.spaces), wanted[0])


def _ref(module: nn.Module, leaf: str) -> WeightRef:
    return WeightRef(module, leaf)


def _matrix(module: nn.Module, leaf: str) -> Tensor:
    """A parameter as a matrix, in float32."""
    ref = _ref(module, leaf)
    found: Tensor = ref.op.matrix(ref.store.load(ref.param).detach()).float()
    return found


class SideCollector(Collector):
    """Sums squared gradients of single rows for the dimensions of every stack, in evaluation."""

    backward = True

    def __init__(self, model: nn.Module, config: LadderConfig) -> None:
        super().__init__(model, config)
        if config.start != "fisher":
            raise ConfigError(f"start={config.start!r} needs no data; attach the adapter as it is")
        self.cuts = {site.path: config.cut(self.root, site.path) for site in config.sites(self.root)}
        self.names: dict[int, tuple[Cut, str, WeightRef]] = {}
        for cut in self.cuts.values():
            for name in cut.spaces:
                path, _, leaf = name.rpartition(".")
                module = cut.stack.get_submodule(path)
                if module._parameters.get(leaf) is None or getattr(_ref(module, leaf).op, "looks_up", False):
                    continue
                ref = _ref(module, leaf)
                if not ref.store.exact or not ref.param.is_floating_point():
                    raise ConfigError(
                        f"start='fisher' needs the gradient of {name!r}, whose weight is quantised; take 'magnitude'"
                    )
                self.names[id(ref.param)] = (cut, name, ref)

    @property
    def title(self) -> str:
        return "a ladder's start"

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return evaluated(model)

    def watch(self) -> GradientWatch:
        return GradientWatch(self.root, (ref.param for _, _, ref in self.names.values()), self._add)

    def parts(self, batch: Any) -> Iterable[Any]:
        return rows_of_batch(batch)

    def _add(self, key: int, grad: Tensor) -> None:
        cut, name, ref = self.names[key]
        cut.add(name, ref.op.matrix(grad.square()))

    def finish(self) -> dict[str, dict[str, Tensor]]:
        return {path: {key: summed(score) for key, score in cut.scores.items()} for path, cut in self.cuts.items()}
