"""The block that every bottleneck adapter is made of, and the places in a transformer where one stands.

Ad(h) = s · g(h) · (U f(D h + b_D) + b_U)          D: (m, d), U: (d, m), m = d / reduction_factor
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.edits import Args, Edit, Kwargs, Slot, Witness
from deltatune.core.sublayers import SubLayer
from deltatune.errors import ConfigError, hint


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "linear": _same,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The non-linearity of this name; raises ConfigError with the nearest one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"non_linearity {name!r} is not known{hint(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Dense:
    """An affine map `(…, in) -> (…, out)` of an edit: `<name>.weight`, `<name>.bias`."""

    def __init__(self, edit: Edit, name: str, weight: Tensor, bias: bool = True) -> None:
        self.weight = edit.tensor(name, weight)
        self.bias: Slot | None = edit.tensor(name, weight.new_zeros(weight.shape[0]), leaf="bias") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.weight
        return F.linear(x, self.weight.weight, bias)


def initial(kind: str, out: int, inp: int, up: bool) -> Tensor:
    """A weight as the papers start it: `bert` N(0, 0.02), `houlsby` a truncated N(0, 0.001), `mam_adapter` kaiming
    for D and zero for U.

    Raises:
        ConfigError: no such start.
    """
    w = torch.empty(out, inp)
    if kind == "bert":
        return nn.init.normal_(w, std=0.02)
    if kind == "houlsby":
        return nn.init.trunc_normal_(w, std=1e-3, a=-2e-3, b=2e-3)
    if kind == "mam_adapter":
        return nn.init.zeros_(w) if up else nn.init.kaiming_uniform_(w, a=math.sqrt(5))
    raise ConfigError(f"init_weights {kind!r} is not one of bert, houlsby, mam_adapter")


class Bottleneck(Edit):
    """D, f, U and what may stand around them; subclasses say what it reads.

    Args:
        config: options of the block. size: d. m: units. read: features of the input, `size` if None.
    """

    no_merge = "has a non-linearity between its two maps"
    #: where it stands, for readers of other libraries' files
    sublayer: SubLayer | None = None

    def __init__(self, config: Any, size: int, m: int, read: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.inside = config.adapter_residual_before_ln
        self.act, self.dropout, self.depth = activation(config.non_linearity), config.dropout, config.stochastic_depth
        self.down, self.up = config.maps(self, read or size, m, size)
        self.scale: float | Slot = config.scaling
        if isinstance(config.scaling, str):
            count = size if config.scaling == "channel" else 1
            self.scale = self.tensor("bottleneck_scaling", torch.ones(count), leaf=None)
        gate = config.use_gating
        self.gate = Dense(self, "bottleneck_gate", initial("bert", 1, read or size, False)) if gate else None
        self.causal_gate = gate == "token"
        self.before = self._norm("bottleneck_norm_before", read or size) if config.ln_before else None
        self.after = self._norm("bottleneck_norm_after", size) if config.ln_after else None

    def _norm(self, name: str, size: int) -> tuple[Slot, Slot]:
        return self.tensor(name, torch.ones(size)), self.tensor(name, torch.zeros(size), leaf="bias")

    def change(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """Ad(h), in the block's own precision; `h: (…, d)`.

        Args:
            residual: what the block's own norm behind U takes in beside U's output.
        """
        training = self.host.training
        h = h.to(self.slots[0].weight.dtype)
        gate = None if self.gate is None else torch.sigmoid(self.gate(h))
        if gate is not None and not self.causal_gate:
            gate = gate.mean(-2, keepdim=True)
        x = h if self.before is None else _layer_norm(h, *self.before)
        x = self.up(self.act(self.down(x)))
        scale = self.scale.weight if isinstance(self.scale, Slot) else self.scale
        x = x * scale if gate is None else x * scale * gate
        if self.dropout:
            x = F.dropout(x, self.dropout, training)
        if self.after is not None:
            x = _layer_norm(x if residual is None else x + residual.to(x.dtype), *self.after)
        if self.depth and training:  # a whole row's update is left out by chance (arXiv 1603.09382)
            keep = (torch.rand(x.shape[0], device=x.device) >= self.depth).to(x.dtype) / (1 - self.depth)
            x = x * keep.view(-1, *([1] * (x.ndim - 1)))
        return x


class AfterOutput(Bottleneck):
    """Reads what its host gives and adds to it, on a sub-layer's end: f + Ad(f)."""

    reads_output = True

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.change(y, y) - y if self.inside else self.change(y)

    def query(self, value: Tensor) -> Tensor:
        """What a fusion asks with."""
        return value


class Reader(Witness):
    """Notes the input of a sub-layer that starts in one module and ends in another."""

    no_merge = Bottleneck.no_merge

    def __init__(self) -> None:
        super().__init__()
        self.noted: Tensor | None = None

    def see(self, args: Args, kwargs: Kwargs) -> None:
        self.noted = args[0] if args else next(iter(kwargs.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "noted": None}  # of the last call, which a copy of the model has not had

    def rows(self, edit: Edit, like: Tensor) -> Tensor:
        """What was noted for those rows of a mixed batch that are an edit's; `like` has their shape.

        Raises:
            ConfigError: the rows cannot be told apart.
        """
        noted, host = self.noted, edit.host
        assert noted is not None, "the start of a sub-layer runs before its end"
        plan: Any = host.plan
        if plan.state.rows is not None:
            name = next(n for n, edits in host._edits.items() if edit in edits)  # type: ignore[union-attr,operator]
            noted = noted[plan.state.rows.index(plan.state.rows_of(name), noted.shape[0], noted.device, str(host.path))]
        if noted.shape[:-1].numel() == like.shape[:-1].numel():  # a part may run with batch and positions flattened
            noted = noted.view(*like.shape[:-1], -1)
        if noted.shape[:-1] != like.shape[:-1]:
            raise ConfigError(f"an adapter that reads one module and changes another cannot be split at {host.path!r}")
        return noted


class AtSum(Bottleneck):
    """Reads the residual sum s = f + x, as h, and replaces f by r + Ad(h); subclasses say where.

        r = f (`residual_before_ln=True`), h (False), or s (`"post_add"`)

    Args:
        reader: notes x; None where it is not needed.
    """

    def __init__(self, config: Any, size: int, m: int, reader: Reader | None) -> None:
        super().__init__(config, size, m)
        self.around, self.reader = config.residual_before_ln, reader

    def changed(self, s: Tensor, h: Tensor) -> Tensor:
        """What the sum becomes: x + r + Ad(h), or x + LN(r + U f(D h)) with the residual inside the adapter's norm."""
        if self.around is True and not self.inside:
            return s + self.change(h).to(s.dtype)
        assert self.reader is not None
        x = self.reader.rows(self, s)
        r = s - x if self.around is True else h if self.around is False else s
        return x + (self.change(h, r) if self.inside else r + self.change(h)).to(s.dtype)

    def query(self, value: Tensor) -> Tensor:
        """What a fusion asks with: what the adapters read."""
        return value


class OnSum(AtSum):
    """At the norm behind a residual sum, which is what the adapter reads: h = norm(s)."""

    def pre(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        (s,) = args if args else kwargs.values()
        return (self.changed(s, self.query(s)),), {}

    def query(self, value: Tensor) -> Tensor:
        from deltatune.core.hosts import base_forward

        out: Tensor = base_forward(self.host)(value)
        return out


class OnBlock(AtSum):
    """At a block that ends with the sum: h = s."""

    reads_output = True

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.change(y) if self.reader is None else self.changed(y, y) - y


class BeforeSum(AtSum):
    """At the end of a sub-layer whose output f goes into a sum inside of a block: h = s."""

    reads_output = True

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        s = self.query(y)
        return self.change(s) if self.around is True and not self.inside else self.changed(s, s) - s

    def query(self, value: Tensor) -> Tensor:
        assert self.reader is not None
        return value + self.reader.rows(self, value)


class Beside(Bottleneck):
    """Parallel: reads the input of its host, a whole sub-layer, and adds to its output."""

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.change(x)


class BesideReader(Bottleneck):
    """Parallel, where the sub-layer starts in another module, whose input `reader` notes."""

    def __init__(self, reader: Reader, *args: Any) -> None:
        super().__init__(*args)
        self.reader = reader

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.change(self.reader.rows(self, y))


def _layer_norm(x: Tensor, gain: Slot, bias: Slot) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain.weight, bias.weight)
