"""Linear layers that read the same input, called one after the other, run as one at the first of them.

Which layers those are is read from the source of the module above them when an adapter is attached. It is a guess that
each call checks: an output made ahead is used only for the very input it was made for, with the adapter's tensors, all
unchanged, in the same state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import kernels
from deltatune.core.calls import one_input
from deltatune.core.edits import Edit
from deltatune.core.plan import State
from deltatune.kernels.shared_input import Layer, low_rank_linears

#: where the first host of a group keeps the others
ATTRIBUTE = "_same_input"


def find(parents: Iterable[nn.Module]) -> None:
    """Tells the hosts below these modules which of them read one input."""
    for parent in parents:
        for names in one_input(parent):
            hosts: list[Any] = [m for n in names if "_edits" in (m := parent._modules[n]).__dict__]
            if len(hosts) > 1:
                hosts[0].__dict__[ATTRIBUTE] = tuple(hosts[1:])


def run(host: Any, edit: Edit, state: State, x: Tensor) -> Tensor | None:
    """The output of a host that one edit changes: made ahead, or made now with those of its group; None for others."""
    if not kernels.possible() or not torch.is_grad_enabled():
        return None
    held = host.plan.own.ahead.pop(id(host), None)
    if held is not None and held[0] is x and held[1] is state and held[2] == _versions(x, edit):
        made: Tensor = held[3]
        return made
    others = host.__dict__.get(ATTRIBUTE)
    if not others or type(x) is not Tensor or x.is_inference():
        return None
    first = edit.layer(x)
    found = [(other, *plain) for other in others if (plain := _plain(other, state, x)) is not None]
    if first is None or not found:
        return None
    y, *ys = low_rank_linears(x, [first, *(layer for *_, layer in found)])
    ahead = zip(found, ys, strict=True)
    host.plan.own.ahead = {id(other): (x, state, _versions(x, its), made) for (other, its, _), made in ahead}
    return y


def _plain(host: Any, state: State, x: Tensor) -> tuple[Edit, Layer] | None:
    """What a later host of the group will do with the same input, if it is plain enough to be done now."""
    if "_edits" not in host.__dict__ or host._forward_pre_hooks or host._backward_pre_hooks:
        return None
    edits = host.edits_of(state.names)
    layer = edits[0].layer(x) if len(edits) == 1 else None
    return None if layer is None else (edits[0], layer)


def _versions(x: Tensor, edit: Edit) -> list[int]:
    """Changes when the input or a tensor of the edit does."""
    tensors = [x, *(slot.weight for slot in edit.slots)]
    return [0 if t.is_inference() else t._version for t in tensors]  # those of inference mode count none
