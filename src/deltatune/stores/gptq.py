"""GPTQ and AWQ, as gptqmodel's layers hold them: integers packed in int32, a scale and a zero-point per group.

    W[o, i] = s[g(i), o] · (q[i, o] - z[g(i), o])        g(i) = g_idx[i] (GPTQ), i // group_size (AWQ)

GPTQ packs q along the input, low bits first, and z along the output (z - 1 in the first version of the format); AWQ
packs both along the output, eight numbers in the order 0 2 4 6 1 3 5 7. Writing keeps the grid: scales and zero-points
stay, and every number goes to the nearest q.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import CannotMergeError
from deltatune.stores import Packed, register_layer
from deltatune.stores.grid import in_units, stepped

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """`(n / k, m)` int32 -> `(n, m)`, k = 32 / bits numbers per word, low bits first."""
    shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
    q: Tensor = (packed.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)
    return q.flatten(0, 1)


def pack_rows(q: Tensor, bits: int) -> Tensor:
    """Undoes `unpack_rows`."""
    shifts = torch.arange(0, 32, bits, device=q.device, dtype=torch.int64)
    words = (q.long().view(-1, 32 // bits, q.shape[1]) << shifts.view(1, -1, 1)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _order(columns: int, bits: int, device: torch.device) -> Tensor:
    """Where AWQ keeps column j: index into the columns as they are packed."""
    at = torch.arange(columns, device=device)
    if bits != 4:
        return at
    inverse = torch.tensor(AWQ_ORDER, device=device).argsort()
    return at - at % 8 + inverse[at % 8]


def unpack_columns(packed: Tensor, bits: int, *, awq: bool = False) -> Tensor:
    """`(n, m / k)` int32 -> `(n, m)`."""
    q = unpack_rows(packed.mT, bits).mT
    return q[:, _order(q.shape[1], bits, q.device)] if awq else q


def pack_columns(q: Tensor, bits: int, *, awq: bool = False) -> Tensor:
    """Undoes `unpack_columns`."""
    if awq:
        q = q[:, _order(q.shape[1], bits, q.device).argsort()]
    return pack_rows(q.mT, bits).mT.contiguous()


class _GridStore:
    """What GPTQ and AWQ share: numbers on a grid of their group."""

    exact = False
    leftovers = ("g_idx", "wf_unsqueeze_zero", "wf_unsqueeze_neg_one")
    own_dtype = False  # scales are float16 whatever the rest of the model is in
    dense_layer: ClassVar[type[nn.Module]] = nn.Linear
    names: ClassVar[tuple[str, ...]] = ()
    awq = False

    def shape(self, packed: Packed) -> torch.Size:
        shape: torch.Size = packed.about["shape"]
        return shape

    def dtype(self, packed: Packed) -> torch.dtype:
        return packed.tensors["scales"].dtype

    def load(self, packed: Packed) -> Tensor:
        scale, zero = self.grid(packed)
        q = self.codes(packed)
        return (scale * (q - zero)).mT.contiguous()

    def save(self, packed: Packed, value: Tensor) -> Packed:
        scale, zero = self.grid(packed)
        q = (value.float().mT / scale + zero).round().clamp(0, 2 ** packed.about["bits"] - 1)
        return self._made(packed, q)

    def move(self, packed: Packed, change: Tensor, draw: Tensor, *, clip: bool = False) -> Packed:
        by, highest = in_units(change.float().mT, self.grid(packed)[0]), 2 ** packed.about["bits"] - 1
        return self._made(packed, stepped(self.codes(packed), by, draw.mT, 0, highest, clip=True))  # no other grid

    def _made(self, packed: Packed, q: Tensor) -> Packed:
        bits = packed.about["bits"]
        words = pack_columns(q.int(), bits, awq=True) if self.awq else pack_rows(q.int(), bits)
        return Packed(packed.store, {**packed.tensors, "qweight": words}, packed.about)

    def codes(self, packed: Packed) -> Tensor:
        """q, `(in, out)`."""
        words, bits = packed.tensors["qweight"], packed.about["bits"]
        return unpack_columns(words, bits, awq=True) if self.awq else unpack_rows(words, bits)

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """(s, z) of every number, `(in, out)` each."""
        t, bits = packed.tensors, packed.about["bits"]
        group = self.groups(packed)
        zero = unpack_columns(t["qzeros"], bits, awq=self.awq)[:, : t["scales"].shape[1]] + packed.about["shift"]
        scale = t["scales"].float()[group]
        return torch.where(scale == 0, 1e-8, scale), zero[group].float()

    def groups(self, packed: Packed) -> Tensor:
        raise NotImplementedError

    def gather(self, layer: Any) -> Packed:
        bits = int(layer.bits)
        if 32 % bits:
            raise CannotMergeError(
                f"a weight in {bits} bits does not fill 32-bit words evenly and cannot be read; use 2, 4 or 8 bits"
            )
        tensors = {name: getattr(layer, name) for name in self.names}
        about = {
            "bits": bits,
            "shape": torch.Size([layer.out_features, layer.in_features]),
            "group_size": int(getattr(layer, "group_size", -1)),
            "shift": self.shift(layer),
        }
        return Packed(self, tensors, about)

    def shift(self, layer: Any) -> int:
        return 0

    def scatter(self, layer: Any, packed: Packed) -> None:
        for name in self.names:
            layer._buffers[name] = packed.tensors[name]
        getattr(layer, "clear_weight_cache", lambda: None)()  # gptqmodel keeps unpacked copies between calls


class GptqStore(_GridStore):
    names = ("qweight", "qzeros", "scales", "g_idx")

    def groups(self, packed: Packed) -> Tensor:
        return packed.tensors["g_idx"].long()

    def shift(self, layer: Any) -> int:
        version = getattr(layer, "qzero_format", 2)
        return 1 if (version() if callable(version) else version) == 1 else 0


class AwqStore(_GridStore):
    names = ("qweight", "qzeros", "scales")
    awq = True

    def groups(self, packed: Packed) -> Tensor:
        size = packed.about["group_size"]
        inputs = packed.about["shape"][1]
        group: Tensor = torch.arange(inputs, device=packed.device) // (size if size > 0 else inputs)
        return group


register_layer("gptqmodel.nn_modules.qlinear.GPTQQuantLinear", GptqStore())
register_layer("gptqmodel.nn_modules.qlinear.AWQuantLinear", AwqStore())
