"""loralib (github.com/microsoft/LoRA): its two helpers, and its checkpoints read and written.

A loralib state dict has `<layer>.lora_A` and `<layer>.lora_B`; the scale and, for a fused projection, which parts
are adapted are known only to the code that made it, so the caller says them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.config import TaskType
from deltatune.core import fused
from deltatune.core.edits import Slot
from deltatune.core.ops import ConvOp, find_op
from deltatune.core.sites import base_modules
from deltatune.errors import AdapterLoadError, ConfigError, hint
from deltatune.mapping import get_peft_model
from deltatune.methods.lora import LoraConfig, LoraDelta
from deltatune.peft_model import PeftModel
from deltatune.state import find_adapters, set_peft_model_state_dict

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freezes everything but LoRA factors and, in place, the base's biases: all, or those of adapted layers.

    Raises:
        ConfigError: `bias` is none of the three.
    """
    adapters = find_adapters(model)
    biases = _biases(model, bias)
    for p in adapters.root.parameters():
        p.requires_grad_(False)
    for name in adapters.configs:
        adapters.set_requires_grad(name, True)
    for bias_vector in biases.values():
        bias_vector.requires_grad_(True)


def lora_state_dict(model: nn.Module, bias: Bias = "none", adapter_name: str = "default") -> dict[str, Tensor]:
    """What loralib's function of this name gives: the factors and, on request, biases.

    The parts of a fused projection are put together as loralib's MergedLinear keeps them. Convolutions are left to
    deltatune's own files: loralib factors a kernel otherwise.
    """
    adapters = find_adapters(model)
    adapters.check(adapter_name)
    found: dict[str, list[LoraDelta]] = {}
    for delta in adapters.deltas(adapter_name):
        if not isinstance(delta, LoraDelta):
            continue
        if isinstance(delta.ref.op, ConvOp) or delta.start is not None or delta.ref.name != "weight":
            raise ConfigError(f"{_path(delta)!r} has no form in loralib; use save_pretrained")
        found.setdefault(_path(delta), []).append(delta)
    state: dict[str, Tensor] = {}
    for path, deltas in found.items():
        state[f"{path}.lora_A"] = torch.cat([d.lora_A.weight.detach() for d in deltas])
        state[f"{path}.lora_B"] = torch.cat([d.lora_B.weight.detach() for d in deltas])
    return state | {k: v.detach() for k, v in _biases(model, bias).items()}


def _path(delta: LoraDelta) -> str:
    return str(getattr(delta.host, "path", ""))


def _biases(model: nn.Module, bias: str) -> dict[str, Tensor]:
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
    adapters = find_adapters(model)
    if bias == "none":
        return {}
    adapted = {_path(d) for n in adapters.configs for d in adapters.deltas(n) if isinstance(d, LoraDelta)}
    found: dict[str, Tensor] = {}
    for path, module in base_modules(adapters.root):
        own = module._parameters.get("bias")
        if own is not None and (bias == "all" or path in adapted):
            found[f"{path}.bias"] = own
    return found


def load_loralib(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    lora_alpha: float,
    enable_lora: list[bool] | None = None,
    task_type: TaskType | str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """A model with the adapter of a loralib checkpoint.

    Args:
        state_dict: loralib's, for instance `torch.load(path, weights_only=True)`; other keys than the factors and
            biases are an error.
        lora_alpha: loralib's `lora_alpha`; the scale is `lora_alpha / r`.
        enable_lora: for fused projections, which of the parts are adapted; all if None.

    Raises:
        AdapterLoadError: keys that are no layer's of this model, or shapes that do not fit.
    """
    modules = dict(base_modules(model))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        path, _, leaf = key.rpartition(".")
        if path not in modules:
            raise AdapterLoadError(f"{key!r} is no layer of this model{hint(path, modules)}")
        if leaf == "bias":
            biases[path] = tensor
        elif leaf == "lora_A" and f"{path}.lora_B" in state_dict:
            pairs[path] = (tensor, state_dict[f"{path}.lora_B"])
        elif leaf != "lora_B" or path not in pairs:
            raise AdapterLoadError(f"{key!r} has no partner, or is no key that loralib writes")
    factors = {path: _factors(model, path, a, b, enable_lora) for path, (a, b) in pairs.items()}
    ranks = {path: parts[0][1].shape[0] for path, parts in factors.items()}
    flags = {path: enable_lora or [True] for path, parts in factors.items() if parts[0][0]}
    alphas = {p: lora_alpha * ranks[p] / _loralib_rank(model, p, *pairs[p]) for p in pairs}
    r = next(iter(ranks.values()))
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=sorted(pairs),
        task_type=task_type,
        rank_pattern={p: k for p, k in ranks.items() if k != r},
        # a convolution's factors get another rank than loralib's r, and keep its scale
        alpha_pattern={p: alpha for p, alpha in alphas.items() if alpha != lora_alpha},
        enable_lora=flags or None,
        inference_mode=not is_trainable,
        bias="none" if not biases else ("lora_only" if set(biases) <= set(pairs) else "all"),
    )
    wrapped = get_peft_model(model, config, adapter_name)
    state: dict[str, Tensor] = {f"{path}.bias": t for path, t in biases.items()}
    for path, parts in factors.items():
        state |= _named(wrapped, adapter_name, path, parts)
    set_peft_model_state_dict(wrapped, state, adapter_name)
    return wrapped


def _named(model: Any, adapter: str, path: str, parts: list[tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The factors under this adapter's own keys."""
    deltas = [d for d in model.adapters.deltas(adapter) if isinstance(d, LoraDelta) and _path(d) == path]
    state: dict[str, Tensor] = {}
    for delta, (_, a, b) in zip(deltas, parts, strict=True):
        a, b = delta.ref.op.pack(delta.ref.module, a, b)
        slots: list[tuple[Slot, Tensor]] = [(delta.lora_A, a), (delta.lora_B, b)]
        state |= {slot.key: tensor for slot, tensor in slots}
    return state


def _loralib_rank(model: nn.Module, path: str, a: Tensor, b: Tensor) -> int:
    """loralib's r for a layer: the factors' inner size, over the kernel's for a convolution."""
    module: Any = model.get_submodule(path)
    return b.shape[1] // (module.kernel_size[0] if isinstance(find_op(module), ConvOp) else 1)


def _factors(
    model: nn.Module, path: str, a: Tensor, b: Tensor, enable_lora: list[bool] | None
) -> list[tuple[str, Tensor, Tensor]]:
    """(part, A (r, in), B (out, r)) of a layer; the part is empty for a whole layer.

    Raises:
        AdapterLoadError: the shapes are no pair for this layer.
    """
    module: Any = model.get_submodule(path)
    op = find_op(module)
    if op is None:
        raise AdapterLoadError(f"{path!r} is a {type(module).__name__}, which loralib cannot have adapted")
    if isinstance(op, ConvOp):
        return [("", *_kernel_factors(op, module.weight.shape, a, b))]
    out, inp = op.shape(module.weight.shape)
    r = b.shape[1]
    if a.shape[1] == inp and a.shape[0] == r and b.shape[0] == out:
        return [("", a, b)]
    enabled = a.shape[0] // r
    flags = enable_lora or [True] * enabled
    if a.shape[1] != inp or sum(flags) != enabled or b.shape[0] * len(flags) != out * enabled:
        raise AdapterLoadError(
            f"{path!r} is ({out}, {inp}), which factors of shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit; "
            "say enable_lora=[…] if only parts of a fused projection are adapted"
        )
    rows = fused.parts(model, path, len(flags))
    names = [str(i) for i, (on, _) in enumerate(zip(flags, rows, strict=True)) if on]
    return list(zip(names, a.chunk(enabled), b.chunk(enabled), strict=True))


def _kernel_factors(op: ConvOp, shape: torch.Size, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """loralib views B A as the kernel `(out, in/g, k, k)`; that matrix `(out, in/g·k·k)` in factors of its own rank."""
    if (b.shape[0] * a.shape[1]) != shape.numel():
        raise AdapterLoadError(f"factors of shapes {tuple(a.shape)} and {tuple(b.shape)} are no kernel {tuple(shape)}")
    w = op.matrix((b.double() @ a.double()).view(shape))
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    rank = max(1, int((s > s[0] * 1e-12).sum()))
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).to(a.dtype), (u[:, :rank] * root).to(b.dtype)
