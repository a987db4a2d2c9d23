"""HQQ: groups of numbers with a scale and a zero-point that half-quadratic optimisation has chosen.

Writing runs HQQ's own quantiser with the layer's own settings.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.stores import Packed, register_layer
from deltatune.stores.grid import in_units, stepped


class HqqStore:
    """The weight of an `HQQLinear`: `W_q` and the dictionary `meta`."""

    exact = False
    dense_layer: ClassVar[type[nn.Module]] = nn.Linear
    leftovers = ("meta", "quant_config", "linear_layer")

    def shape(self, packed: Packed) -> torch.Size:
        return torch.Size(packed.about["meta"]["shape"])

    def dtype(self, packed: Packed) -> torch.dtype:
        dtype: torch.dtype = packed.about["dtype"]
        return dtype

    def load(self, packed: Packed) -> Tensor:
        from hqq.core.quantize import Quantizer

        meta = {**packed.about["meta"], "compute_dtype": torch.float32}
        for name in ("scale", "zero"):
            meta[name] = meta[name].float()
        numbers: Tensor = Quantizer.dequantize(packed.tensors["W_q"].detach(), meta)
        return numbers.to(self.dtype(packed))

    def save(self, packed: Packed, value: Tensor) -> Packed:
        from hqq.core.quantize import Quantizer

        shifted = self._shifted(packed, value)
        if shifted is not None:
            return shifted
        codes, meta = Quantizer.quantize(
            value.float(),
            device=str(packed.device),
            compute_dtype=self.dtype(packed),
            **packed.about["options"],
        )
        meta |= {k: v for k, v in packed.about["meta"].items() if k not in meta}
        for name in ("scale", "zero"):
            old = packed.about["meta"][name]
            meta[name] = meta[name].to(old.device, old.dtype)
        made = nn.Parameter(codes.to(packed.device), requires_grad=False)
        return Packed(self, {"W_q": made}, {**packed.about, "meta": meta})

    def move(self, packed: Packed, change: Tensor, draw: Tensor, *, clip: bool = False) -> Packed:
        from hqq.core.quantize import Quantizer

        meta = packed.about["meta"]
        shifted = self._shifted(packed, self.load(packed).float() + change.float())
        if shifted is not None:
            return shifted
        q = self._codes(packed)  # (groups, n) if axis is 1, else (n, groups)
        by = in_units(change.float().reshape(q.shape), meta["scale"].float())
        new = stepped(q, by, draw.reshape(q.shape), 0, round(2 ** meta["nbits"] - 1), clip=clip)
        words = Quantizer.pack[meta["packing"]](new.to(torch.uint8)) if meta["packing"] else new
        old = packed.tensors["W_q"]
        made = nn.Parameter(words.to(old.device).view(old.dtype), requires_grad=False)
        return Packed(self, {"W_q": made}, packed.about)

    def _codes(self, packed: Packed) -> Tensor:
        """The integers, in groups."""
        from hqq.core.quantize import Quantizer

        plain = {**packed.about["meta"], "scale": 1.0, "zero": 0.0, "compute_dtype": torch.float32}
        numbers: Tensor = Quantizer.dequantize(packed.tensors["W_q"].detach(), plain)
        size = packed.about["options"]["group_size"]
        if not size:
            return numbers
        return numbers.reshape((-1, size) if packed.about["options"]["axis"] == 1 else (size, -1))

    def _shifted(self, packed: Packed, value: Tensor) -> Packed | None:
        """The same integers under other zero-points, if the change is constant within every group; else None."""
        meta, options = packed.about["meta"], packed.about["options"]
        size = options["group_size"]
        if options["axis"] != 1 or not size:
            return None
        change = (value.float() - self.load(packed).float()).reshape(-1, size)
        mean = change.mean(1, keepdim=True)
        if float((change - mean).abs().max()) > 1e-6 * float(change.abs().max()) + 1e-7:
            return None
        zero = meta["zero"].float() - mean / meta["scale"].float()
        new = {**meta, "zero": zero.to(meta["zero"].dtype)}
        return Packed(self, dict(packed.tensors), {**packed.about, "meta": new})

    def gather(self, layer: Any) -> Packed:
        options = layer.quant_config["weight_quant_params"]
        about = {"meta": layer.meta, "dtype": layer.compute_dtype, "options": options}
        return Packed(self, {"W_q": layer.W_q}, about)

    def scatter(self, layer: Any, packed: Packed) -> None:
        layer.__dict__.pop("W_q", None)
        layer._parameters["W_q"] = packed.tensors["W_q"]
        layer.meta = packed.about["meta"]


register_layer("hqq.core.quantize.HQQLinear", HqqStore())
