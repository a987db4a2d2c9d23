"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning (arXiv 2206.06522).

    s_0 = D_0 h_0        s ← μ_i s + (1 - μ_i) D_i h_i,   s ← block_i(s)        μ_i = σ(α_i / T), α_i = 0 at the start
    h' = U norm(s)       D: (d/r, d), U: (d, d/r)

A thin transformer of the model's own class, d/r wide, runs beside the frozen one and reads its hidden states h_i. The
base runs without gradient, so nothing in it is kept for backward, however deep it is. The base's head reads h' in the
place of the base's last hidden state; with `residual`, h' is added to it and U starts at zero, so that the model starts
as the base. The paper starts the side network from pruned weights of the base, which is not done here.

Changes the flow of the model and not its weights, so it cannot be merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.combine import refuse_merge
from deltatune.core.copies import CopySlot
from deltatune.core.edits import Args, Edit, Kwargs, ModuleEdit, container_at
from deltatune.core.hosts import base_forward
from deltatune.core.prompts import bind, cache_of, find_stacks, takes
from deltatune.core.sites import Site
from deltatune.core.structure import find_blocks
from deltatune.errors import ConfigError

#: sizes of a model's configuration that shrink with its width
SIZES = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "moe_intermediate_size",
    "word_embed_proj_dim",
    "pooler_hidden_size",
    "head_dim",
)
#: what a side network is called with as its base is
SHARED = ("attention_mask", "position_ids", "cache_position", "use_cache")


class Rung(nn.Module):
    """One block of the side network behind its gate.

    Args:
        block: the thin block. d, small: the widths. temperature: T.
    """

    def __init__(self, block: nn.Module, d: int, small: int, temperature: float) -> None:
        super().__init__()
        self.block, self.temperature = block, temperature
        self.down = nn.Linear(d, small)
        self.alpha = nn.Parameter(torch.zeros(1))
        #: the base's hidden state behind its block, during a call
        self.state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # what a stack asks its blocks for

    def forward(self, s: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.state is not None
        mu = torch.sigmoid(self.alpha / self.temperature)
        return self.block(mu * s + (1 - mu) * self.down(self.state.to(s.dtype)), *args, **kwargs)


class Side(nn.Module):
    """The side network.

    Args:
        stack: the base's, whose class and configuration it has.
        d: the base's width. kept: numbers of the base's blocks that have a rung. config: the method's.
    """

    def __init__(self, stack: nn.Module, d: int, kept: list[int], config: LadderConfig) -> None:
        super().__init__()
        thin = thin_config(stack.config, d, config.reduction_factor, kept)
        small = d // config.reduction_factor
        kind = getattr(stack, "_plain", type(stack))
        self.net = kind(thin)
        table: Any = self.net.get_input_embeddings()  # type: ignore[operator]
        table.weight.requires_grad_(False)  # it is never looked at
        if hasattr(self.net, "pooler"):
            self.net.pooler = None
        self.kept = kept
        self.first = nn.Linear(d, small)
        self.up = nn.Linear(small, d)
        if config.residual:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        blocks = find_blocks(self.net)
        for block in blocks:
            parent = self.net.get_submodule(block.path.rpartition(".")[0])
            rung = Rung(self.net.get_submodule(block.path), d, small, config.temperature)
            parent._modules[block.path.rpartition(".")[2]] = rung

    def rungs(self) -> list[Rung]:
        return [m for m in self.net.modules() if isinstance(m, Rung)]

    def forward(self, states: tuple[Tensor, ...], **call: Any) -> Tensor:
        """h' of the base's hidden states, that of the embeddings first."""
        dtype = self.first.weight.dtype
        for rung, i in zip(self.rungs(), self.kept, strict=True):
            rung.state = states[i + 1]
        try:
            out = self.net(inputs_embeds=self.first(states[0].to(dtype)), **call)
        finally:
            for rung in self.rungs():
                rung.state = None
        last: Tensor = self.up(out[0])
        return last


def thin_config(config: Any, d: int, factor: int, kept: list[int]) -> Any:
    """A configuration `factor` times as thin, with as many heads, for these blocks only.

    Raises:
        ConfigError: the width does not divide.
    """
    heads = int(config.num_attention_heads)
    if d % (factor * heads) or (d // (factor * heads)) % 2:
        raise ConfigError(
            f"reduction_factor={factor} does not leave an even number of units for each of {heads} heads of a model "
            f"{d} wide; take a divisor of {d // heads // 2}"
        )
    thin = copy.deepcopy(config)
    thin.hidden_size = d // factor
    for name in SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(thin, name, max(2, value // factor))
    thin.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        thin.layer_types = [config.layer_types[i] for i in kept]
    # its table of tokens is never looked at; positions may start behind the padding's number
    thin.vocab_size = 2 + (config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0)
    return thin


class LadderEdit(ModuleEdit):
    """Runs the base without gradient, and the side network on what it gave."""

    no_merge = "runs a network beside the base and does not change a weight"

    def __init__(self, side: Side, residual: bool) -> None:
        super().__init__()
        self.side, self.residual = side, residual
        for path, part in side.named_modules():
            prefix = f"{path}." if path else ""
            for name, param in part._parameters.items():
                if param is not None and param.requires_grad:
                    self.slots.append(CopySlot(part, name, f"ladder.{prefix}{name}", buffer=False))

    def place(self, host: nn.Module, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        super().place(host, home, path, adapter, tag)
        self.side.train(host.training)
        container_at(home, "ladder").add_module(adapter, self.side)

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        call = bind(self.host, args, kwargs)
        wanted = bool(call.get("output_hidden_states", False))
        with torch.no_grad():
            out = base_forward(self.host)(**{**call, "output_hidden_states": True, "return_dict": True})
        shared = {k: call[k] for k in SHARED if k in call and takes(self.side.net, k)}
        cache = cache_of(call)
        cache = cache_of(out) if cache is None else cache
        if cache is not None:  # the argument's new name, or the old one
            shared["cache" if takes(self.side.net, "cache") else "past_key_values"] = side_cache(cache)
        states = tuple(h.detach() for h in out.hidden_states)
        last = self.side(states, **shared).to(states[-1].dtype)
        if self.residual:
            last = last + out[0].detach()
        values = {**out, "last_hidden_state": last}
        pooler: Any = getattr(self.host, "pooler", None)
        if pooler is not None and "pooler_output" in out:
            values["pooler_output"] = pooler(last)
        if not wanted:
            values.pop("hidden_states")
        out = type(out)(**values)
        return out if call.get("return_dict", True) else out.to_tuple()

    def replacements(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        raise refuse_merge(self, str(getattr(self.host, "path", "")))


def side_cache(cache: Any) -> Any:
    """The side network's own cache, kept at the base's and reordered with it (beams)."""
    found = cache.__dict__.get("_ladder")
    if found is None:
        from transformers import DynamicCache

        cache._ladder = found = DynamicCache()
        cache.reorder_cache = partial(_reorder, cache)
    return found


def _reorder(cache: Any, beams: Tensor) -> None:
    type(cache).reorder_cache(cache, beams)
    cache._ladder.reorder_cache(beams)


@register
@dataclass
class LadderConfig(TargetedConfig):
    """Ladder side-tuning. It goes beside the stack of a model, so `target_modules` means nothing here.

    Args:
        reduction_factor: r; the side network is d/r wide.
        layers_to_transform: numbers of the blocks that have a rung; all if None.
        temperature: T of the gates.
        residual: add h' to the base's last hidden state, and start as the base.

    Raises:
        ConfigError: a value is out of range, or the model is no single stack of blocks that embeds tokens.
    """

    reduction_factor: int = 8
    temperature: float = 0.1
    residual: bool = False

    method: ClassVar[str] = "LADDER"
    summary: ClassVar[str] = "a thin network beside the base, which runs without gradient"
    paper: ClassVar[str] = "arXiv 2206.06522"
    starts_as_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reduction_factor, int) or self.reduction_factor < 1:
            raise ConfigError(f"reduction_factor must be a whole number of at least 1, not {self.reduction_factor!r}")
        if not isinstance(self.temperature, (int, float)) or not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, not {self.temperature!r}")

    def sites(self, model: nn.Module) -> list[Site]:
        if self.target_modules or self.exclude_modules:
            raise ConfigError(
                "a ladder goes beside the whole stack of a model and not to single modules; leave target_modules and "
                "exclude_modules out, and choose rungs with layers_to_transform"
            )
        stacks = find_stacks(model)
        if len(stacks) > 1 or stacks[0].role != "only":
            raise ConfigError(
                f"{type(model).__name__} is an encoder and a decoder; a ladder is built beside one stack of blocks only"
            )
        find_blocks(stacks[0].module)
        return [Site(stacks[0].path, None, pattern="stack")]

    def written(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def build_module(self, module: nn.Module, site: Site) -> Edit:
        count = len(find_blocks(module))
        wanted = self.layers_to_transform
        kept = list(range(count)) if wanted is None else sorted({wanted} if isinstance(wanted, int) else set(wanted))
        if not kept or not 0 <= kept[0] <= kept[-1] < count:
            raise ConfigError(f"layers_to_transform={wanted!r} names no rung, or one outside of {count} blocks")
        weight = next(p for p in module.parameters() if p.is_floating_point())
        d = int(module.config.hidden_size)  # type: ignore[union-attr,arg-type]
        # real numbers on any device and while loading: its buffers are in no file
        with torch.device("cpu" if weight.is_meta else weight.device):
            side = Side(module, d, kept, self)
        return LadderEdit(side, self.residual)
