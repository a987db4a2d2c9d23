"""Writing a merged weight back into few bits, and merge-aware training, which computes with what such a merge leaves.

A quantised weight lies on its grid exactly, so a merge to the nearest code undoes every change below half a step, which
is nearly all of a fine-tune. `"dithered"` rounds each number up or down by a draw of its own (`stores.grid`): the mean
of the merged weight is `W + ΔW`, a weight without a change keeps its bytes, and so do the scales. The draws come from a
seed and the weight's path, so that every merge of one adapter gives the same bytes. `"nearest"` quantises the sum anew,
and a weight whose change leads well beyond its grid gets scales anew, on which it is dithered.

Merge-aware training runs a merged weight as it will be written:

    W' = load(write(merged(W)))        forward: y + (W' - W) x

    backward, the straight-through estimator (arXiv 1308.3432): dL/dW' is taken for dL/d merged(W), which is what the
    adapters' own updates give for the same dL/dy; dL/dx is that of W'

What such training ends with is the merged model itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from deltatune.core.edits import Delta, Edit
from deltatune.errors import CannotMergeError, ConfigError
from deltatune.stores.grid import BeyondGridError

#: draws in the table that all weights read, each from a place of its own; a prime, so that rows do not line up
TABLE = 1_048_583
KINDS = ("dithered", "nearest")


@dataclass(frozen=True)
class Rounding:
    """How numbers are written into few bits.

    Attributes:
        kind: `"dithered"` or `"nearest"`. seed: of the draws.

    Raises:
        ConfigError: another kind.
    """

    kind: str = "dithered"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f'rounding must be "dithered" or "nearest", not {self.kind!r}')

    def write(self, ref: Any, value: Tensor) -> Any:
        """A parameter of the base's storage for `value`, which is in the layout of the base's own.

        Raises:
            CannotMergeError: the storage cannot be written so.
        """
        return self.put(ref.store, ref.param, value, ref.module.path, ref.name)

    def put(self, store: Any, param: Any, value: Tensor, path: str, name: str) -> Any:
        """`value` in the storage of `param`, which is the parameter `name` of the module at `path`.

        Raises:
            CannotMergeError: the storage cannot be written so.
        """
        if self.kind == "nearest":
            return store.save(param, value)
        if not hasattr(store, "move"):
            raise CannotMergeError(
                f"{type(store).__name__} has no `move`, so the weight of {path!r} cannot be rounded with dither; "
                'ask for rounding="nearest"'
            )
        base = store.load(param)
        draw = draws(f"{path}.{name}", base.numel(), self.seed, base.device).view(base.shape)
        value = value.to(base.device)
        try:
            return store.move(param, value - base.to(value.dtype), draw)
        except BeyondGridError:
            anew = store.save(param, value)
            return store.move(anew, value - store.load(anew).to(value.dtype), draw, clip=True)

    @torch.no_grad()
    def change(self, ref: Any, value: Tensor) -> Tensor:
        """What `write` will have changed of the base's numbers, as they are read then."""
        there: Tensor = ref.store.load(self.write(ref, value)).to(value.dtype)
        base: Tensor = ref.store.load(ref.param).to(value.dtype)
        return (there - base).add_(value, alpha=0)  # NaN where the value is no finite number: codes have none


@lru_cache(maxsize=4)
def _table(seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 2**12, (TABLE,), generator=generator, device="cpu")
    return ((steps.float() + 0.5) / 2**12).to(device)  # never 0 or 1, also when added to a number below 1024


def draws(name: str, n: int, seed: int, device: torch.device) -> Tensor:
    """One number in (0, 1) for each of a weight's, `(n,)` float32; the same on every device and at every call."""
    table, start = _table(seed, device), zlib.crc32(name.encode()) % TABLE
    parts = [table[start : start + n]]
    have = len(parts[0])
    while have < n:
        parts.append(table[: n - have])
        have += len(parts[-1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Rounded(Delta):
    """The deltas of one quantised parameter as one, rounded together."""

    def __init__(self, deltas: Sequence[Delta], how: Rounding) -> None:
        super().__init__(deltas[0].ref)
        self.deltas, self.how = deltas, how
        self.host = deltas[0].host

    def apart(self, x: Tensor) -> Tensor:
        return self._with_gradients(x, lambda delta: delta.apart(x.detach()))

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        # what reads the base's output tells of more than the weight (a bias), which is no part of this
        still, out = x.detach(), y.detach()
        return self._with_gradients(x, lambda d: d.apart(still) if d.reads_output else d.update(still, out))

    def _with_gradients(self, x: Tensor, update: Callable[[Delta], Tensor | None]) -> Tensor:
        """The rounded update; its gradient for the input is its own, and for the deltas that of their updates."""
        rounded = self._rounded(x)
        if not torch.is_grad_enabled():
            return rounded
        smooth = [made for delta in self.deltas if (made := update(delta)) is not None]
        return sum((made - made.detach() for made in smooth), rounded)

    def _rounded(self, x: Tensor) -> Tensor:
        from deltatune.core.combine import fold

        ref = self.ref

        def change() -> Tensor:
            with torch.no_grad():
                return ref.op.matrix(self.how.change(ref, fold(self.deltas)))

        plan: Any = cast(Any, self.host).plan
        delta = plan.remember((Rounded, *map(id, self.deltas)), change)
        return ref.op.apply(ref.module, x, delta.to(x.dtype if x.is_floating_point() else ref.dtype))


class _Apart(Delta):
    """A delta beside a rounded one: its update may not count on what the other's update of `y` holds."""

    def __init__(self, delta: Delta) -> None:
        super().__init__(delta.ref)
        self.delta = delta
        self.host = delta.host

    def apart(self, x: Tensor) -> Tensor:
        return self.delta.apart(x)


def refuse_dropout(config: Any) -> None:
    """Raises ConfigError for an adapter that drops inputs at random, which a rounded weight has none of."""
    for name, chance in vars(config).items():
        if name.endswith("dropout") and chance:
            raise ConfigError(
                f"merge-aware training folds the adapter into the weight, so {name}={chance} has no input to act on; "
                f"set {name}=0"
            )


def join(edits: Sequence[Edit], how: Rounding) -> list[Edit]:
    """The edits with those of every quantised weight put together as one `Rounded`; others stay as they are."""
    groups: dict[tuple[int, str], list[Delta]] = {}
    rest: list[Edit] = []
    for edit in edits:
        if isinstance(edit, Delta) and edit.ref.bypass and not edit.ref.store.exact:
            groups.setdefault((id(edit.ref.owner), edit.ref.leaf), []).append(edit)
        else:
            rest.append(edit)
    if groups:
        rest = [_Apart(e) if isinstance(e, Delta) and e.ref.bypass and e.reads_output else e for e in rest]
    return [*(Rounded(deltas, how) for deltas in groups.values()), *rest]
