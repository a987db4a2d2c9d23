"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning (arXiv 2206.06522).

    s_0 = D_0 h_0        s ← μ_i s + (1 - μ_i) D_i h_i,   s ← block_i(s)        μ_i = σ(α_i / T), α_i = 0 at the start
    h' = U norm(s)       D: (d/r, d), U: (d, d/r)

A thin transformer of the model's own class, d/r wide, runs beside the frozen one and reads its hidden states h_i. The
base runs without gradient, so nothing in it is kept for backward, however deep it is. The base's head reads h' in the
place of the base's last hidden state; with `residual`, h' is added to it and U starts at zero, so that the model starts
as the base. In an encoder-decoder model both stacks have a side network; the decoder's attends to what the encoder's
gives, and only it has U. The side network starts at random, or as the base's weights cut down by their
importance, as in the paper (`_ladder_start.py`).

Changes the flow of the model and not its weights, so it cannot be merged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import StructuredConfig, register
from deltatune.core.combine import refuse_merge
from deltatune.core.copies import CopySlot
from deltatune.core.edits import Args, Edit, Kwargs, ModuleEdit, container_at
from deltatune.core.hosts import base_forward
from deltatune.core.named import Named
from deltatune.core.prompts import bind, cache_of, find_stacks, takes
from deltatune.core.sites import Site
from deltatune.core.structure import Block, find_blocks
from deltatune.errors import ConfigError, hint
from deltatune.inits import is_loading
from deltatune.inits.data import COLLECTORS
from deltatune.methods._ladder_start import Cut, SideCollector

#: sizes of a model's configuration that shrink with its width
SIZES = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "moe_intermediate_size",
    "word_embed_proj_dim",
    "pooler_hidden_size",
    "head_dim",
)
#: names for the number of blocks
DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
#: what a side network is called with as its base is
SHARED = ("attention_mask", "position_ids", "cache_position", "use_cache", "encoder_attention_mask")
STARTS = ("random", "magnitude", "fisher")


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
        stack: the base's, whose class and configuration it has. blocks: the base's, in the stack.
        kept: numbers of those that have a rung. config: the method's. cut: how the base's weights are cut down to its
            start; None for a random one.
        ends: it gives h', and not the thin hidden states that a decoder's attends to.
        alone: it attends to an encoder that has no side network of its own.
    """

    def __init__(
        self, stack: nn.Module, blocks: Sequence[Block], kept: list[int], config: LadderConfig, cut: Cut | None,
        ends: bool, alone: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        d = width_of(stack)
        thin = thin_config(stack.config, d, config.reduction_factor, kept)
        small = d // config.reduction_factor
        kind = getattr(stack, "_plain", type(stack))
        self.net = kind(thin)
        table: Any = self.net.get_input_embeddings()  # type: ignore[operator]
        table.weight = nn.Parameter(table.weight[:1].detach().clone(), requires_grad=False)  # it is never looked at
        if hasattr(self.net, "pooler"):
            self.net.pooler = None
        self.kept = kept
        self.first = nn.Linear(d, small)
        self.up = nn.Linear(small, d) if ends else None
        self.bridge = nn.Linear(d, small) if alone else None
        if self.up is not None and config.residual:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        own = [block.path for block in blocks[: len(kept)]]  # the thin stack has its blocks where the base's are
        if cut is not None:
            cut.fill(self.net, {path: blocks[i].path for path, i in zip(own, kept, strict=True)})
        for path in own:
            parent, _, leaf = path.rpartition(".")
            rung = Rung(self.net.get_submodule(path), d, small, config.temperature)
            self.net.get_submodule(parent)._modules[leaf] = rung

    def rungs(self) -> list[Rung]:
        return [m for m in self.net.modules() if isinstance(m, Rung)]

    def forward(self, states: tuple[Tensor, ...], **call: Any) -> Tensor:
        """h' of the base's hidden states, that of the embeddings first; the thin state where there is no U."""
        dtype = self.first.weight.dtype
        for rung, i in zip(self.rungs(), self.kept, strict=True):
            rung.state = states[i + 1]
        try:
            out = self.net(inputs_embeds=self.first(states[0].to(dtype)), **call)
        finally:
            for rung in self.rungs():
                rung.state = None
        last: Tensor = out[0] if self.up is None else self.up(out[0])
        return last


def width_of(stack: nn.Module) -> int:
    config: Any = stack.config
    return int(config.hidden_size)


def head_of(config: Any) -> int:
    """Features of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def thin_config(config: Any, d: int, factor: int, kept: list[int]) -> Any:
    """A configuration `factor` times as thin, with as many heads, for these blocks only.

    Raises:
        ConfigError: the width does not divide.
    """
    heads, head = int(config.num_attention_heads), head_of(config)
    if d % factor or head % (2 * factor):
        raise ConfigError(
            f"reduction_factor={factor} does not leave an even number of units for each of {heads} heads of a model "
            f"{d} wide; take a divisor of {head // 2}"
        )
    thin = copy.deepcopy(config)
    thin.hidden_size = d // factor
    for name in SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(thin, name, max(2, value // factor))
    for name in DEPTHS:
        if getattr(config, name, None) is not None:
            setattr(thin, name, len(kept))
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
        #: beside the encoder, for a decoder's
        self.encoder: LadderEdit | None = None
        #: of the last call of an encoder's: (the base's last hidden states, the thin ones)
        self.gave: tuple[Tensor, Tensor] | None = None
        for path, part in side.named_modules():
            prefix = f"{path}." if path else ""
            for name, param in part._parameters.items():
                if param is not None and param.requires_grad:
                    self.slots.append(CopySlot(part, name, f"ladder.{prefix}{name}", buffer=False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "gave": None}  # of the last call, which a copy of the model has not had

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
        if call.get("encoder_hidden_states") is not None:
            shared["encoder_hidden_states"] = self._encoded(call["encoder_hidden_states"])
        states = tuple(h.detach() for h in out.hidden_states)
        last = self.side(states, **shared)
        if self.side.up is None:
            self.gave = (out[0], last)
            last = out[0]
        elif self.residual:
            last = last.to(out[0].dtype) + out[0].detach()
        last = last.to(states[-1].dtype)
        values = {**out, "last_hidden_state": last}
        pooler: Any = getattr(self.host, "pooler", None)
        if pooler is not None and "pooler_output" in out:
            values["pooler_output"] = pooler(last)
        if not wanted:
            values.pop("hidden_states")
        out = type(out)(**values)
        return out if call.get("return_dict", True) else out.to_tuple()

    def _encoded(self, states: Tensor) -> Tensor:
        """The thin hidden states that go with an encoder's `(B, T, d)`; generation repeats rows for its beams.

        Raises:
            ConfigError: they are not of the encoder's last call.
        """
        if self.side.bridge is not None:
            return self.side.bridge(states.detach().to(self.side.bridge.weight.dtype))  # type: ignore[no-any-return]
        gave = self.encoder.gave if self.encoder is not None else None
        if gave is not None:
            times = max(1, len(states) // len(gave[0]))
            if states.shape == (times * len(gave[0]), *gave[0].shape[1:]) and torch.equal(states[::times], gave[0]):
                return gave[1].repeat_interleave(times, 0)
        raise ConfigError(
            "a ladder's decoder was given encoder_outputs that are not of its encoder's last call, so there is no side "
            "network's state to go with them; pass the encoder's input"
        )

    def replacements(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        raise refuse_merge(self, str(getattr(self.host, "path", "")))


def side_cache(cache: Any) -> Any:
    """The side network's own cache, kept at the base's and reordered with it (beams)."""
    found = cache.__dict__.get("_ladder")
    if found is None:
        from transformers import DynamicCache, EncoderDecoderCache

        both = isinstance(cache, EncoderDecoderCache)
        cache._ladder = found = EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()
        cache.reorder_cache = partial(_reorder, cache)
    return found


def _reorder(cache: Any, beams: Tensor) -> None:
    type(cache).reorder_cache(cache, beams)
    cache._ladder.reorder_cache(beams)


@register
@dataclass
class LadderConfig(StructuredConfig):
    """Ladder side-tuning. It goes beside the stacks of a model, so `target_modules` means nothing here.

    Args:
        reduction_factor: r; the side network is d/r wide.
        layers_to_transform: numbers of the blocks (of each stack) that have a rung; all if None.
        temperature: T of the gates.
        residual: add h' to the base's last hidden state, and start as the base.
        start: of the side network: `"random"`, or the base's weights, cut down to the dimensions that matter most by
            `"magnitude"` or, as in the paper, by Fisher information (`"fisher"`), which `prepare_init` takes of data.

    Raises:
        ConfigError: a value is out of range, or the model has no stack of blocks that embeds tokens.
    """

    reduction_factor: int = 8
    temperature: float = 0.1
    residual: bool = False
    start: str = "random"
    #: what `prepare_init` left: path of a stack -> importance of its dimensions
    prepared: dict[str, dict[str, Tensor]] | None = field(default=None, init=False, repr=False, compare=False)
    _stacks: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _blocks: dict[str, list[Block]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _cuts: dict[str, Cut] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        if self.start not in STARTS:
            raise ConfigError(f"start {self.start!r} is not one of {', '.join(STARTS)}{hint(str(self.start), STARTS)}")

    @property
    def settled(self) -> bool:
        """No data is needed."""
        return self.start != "fisher"

    def sites(self, model: nn.Module) -> list[Site]:
        if self.target_modules or self.exclude_modules:
            raise ConfigError(
                "a ladder goes beside the whole stack of a model and not to single modules; leave target_modules and "
                "exclude_modules out, and choose rungs with layers_to_transform"
            )
        stacks = find_stacks(model)
        named = self.named(model)
        self._stacks = {stack.path: stack.role for stack in stacks}
        self._blocks = {path: blocks_in(model, path, named) for path in self._stacks}
        return [Site(path, None, pattern="stack") for path in self._stacks]

    def written(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def cut(self, model: nn.Module, path: str) -> Cut:
        """What of a stack belongs together; `sites` has found the stacks."""
        stack: Any = model.get_submodule(path)
        inside = {
            role: [p for p in paths if p.startswith(prefix(path))] for role, paths in self.named(model).found.items()
        }
        named = Named({role: tuple(p.removeprefix(prefix(path)) for p in paths) for role, paths in inside.items()})
        return Cut(stack, self._blocks[path], width_of(stack), head_of(stack.config), named)

    def prepare(self, model: nn.Module) -> Callable[[], None] | None:
        self._cuts = {}
        if self.start == "random" or is_loading():
            return None
        if self.start == "fisher" and self.prepared is None:
            raise ConfigError(
                "start='fisher' looks at data: call prepare_init(model, config, batches) before the adapter is attached"
            )
        for site in self.sites(model):
            cut = self._cuts[site.path] = self.cut(model, site.path)
            if self.prepared is not None:
                cut.scores = self.prepared[site.path]
            else:
                cut.weigh()
        return None

    def build_module(self, module: nn.Module, site: Site) -> Edit:
        blocks, role = self._blocks[site.path], self._stacks[site.path]
        count, wanted = len(blocks), self.layers_to_transform
        kept = list(range(count)) if wanted is None else sorted({wanted} if isinstance(wanted, int) else set(wanted))
        if not kept or not 0 <= kept[0] <= kept[-1] < count:
            raise ConfigError(f"layers_to_transform={wanted!r} names no rung, or one outside of {count} blocks")
        weight = next(p for p in module.parameters() if p.is_floating_point())
        alone = role == "decoder" and "encoder" not in self._stacks.values()
        # real numbers on any device and while loading: its buffers are in no file
        with torch.device("cpu" if weight.is_meta else weight.device):
            side = Side(module, blocks, kept, self, self._cuts.get(site.path), role != "encoder", alone)
        return LadderEdit(side, self.residual)

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        edits = {self._stacks[s.path]: e for s, es in made for e in es if isinstance(e, LadderEdit)}
        if "decoder" in edits:
            edits["decoder"].encoder = edits.get("encoder")
        return []


def prefix(path: str) -> str:
    return f"{path}." if path else ""


def blocks_in(model: nn.Module, path: str, named: Named) -> list[Block]:
    """The blocks of a stack, by paths in it."""
    blocks = [b for b in find_blocks(model, named) if b.path.startswith(prefix(path))]
    return [Block(b.path.removeprefix(prefix(path)), b.index, None) for b in blocks]


COLLECTORS[LadderConfig.method] = SideCollector
