"""Trainable tokens: chosen rows of an embedding train, and the head that is tied to it follows.

    E'[i] = v_i for the chosen tokens i, E'[j] = E[j] for all others

The rows start at the base's own. Merging writes them into the table, exactly. peft calls the rows
`trainable_tokens_delta`; they are values and not differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.edits import Delta, Edit
from deltatune.core.ops import EmbeddingOp, LinearOp
from deltatune.core.sites import Site, base_modules, targets, tied_heads, weight_sites
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError


class TokenRows(Delta):
    """The chosen rows of one table `(V, d)`: an embedding's, or a head's.

    Args:
        tokens: the chosen rows, distinct.
        tied: the rows of the embedding that this head shares; they are one tensor then.
    """

    few_rows = True

    def __init__(self, ref: WeightRef, tokens: Sequence[int], tied: TokenRows | None = None) -> None:
        super().__init__(ref)
        #: sorted tokens, and where each stands in the saved order
        self.tokens, self.order = torch.tensor(tokens, device=ref.device).sort()
        if tied is None:
            rows = ref.store.load(ref.param)[torch.tensor(tokens, device=ref.device)].clone()
            self.rows = self.tensor(
                "trainable_tokens_delta", rows, leaf=None, file_name="token_adapter.trainable_tokens_delta"
            )
        else:
            self.rows = tied.rows

    def merged(self, w: Tensor) -> Tensor:
        rows = self.rows.weight[self.order].to(w.dtype)
        if self.ref.op.looks_up:  # the matrix is (d, V)
            return w.index_copy(-1, self.tokens, rows.mT)
        return w.index_copy(-2, self.tokens, rows)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        table = self.ref.store.load(self.ref.param)
        change = (self.rows.weight[self.order] - table[self.tokens]).to(y.dtype)  # (k, d)
        if not self.ref.op.looks_up:
            few = F.linear(x, change.to(x.dtype))  # (…, k)
            return few.new_zeros(*few.shape[:-1], table.shape[0]).index_copy(-1, self.tokens, few)
        place = torch.searchsorted(self.tokens, x).clamp(max=len(self.tokens) - 1)
        hit = (self.tokens[place] == x).unsqueeze(-1)
        moved: Tensor = change[place] * hit * self.ref.op.gain(self.ref.module)
        return moved


def token_sites(model: nn.Module, chosen: list[int] | dict[str, list[int]]) -> list[tuple[Site, list[int]]]:
    """(site, tokens) of the embeddings; a list goes to the model's input embedding.

    Raises:
        ConfigError: tokens that are repeated or not in the table.
    """
    if not isinstance(chosen, dict):
        table = model.get_input_embeddings()  # type: ignore[operator]
        names = [path for path, module in base_modules(model) if module is table]
        chosen = {names[0]: list(chosen)}
    found = []
    for name, tokens in chosen.items():
        config = TargetedConfig(target_modules=[name])
        for site in weight_sites(model, targets(model, config)):
            ref = WeightRef(model.get_submodule(site.path), site.parameter or "weight")
            if not ref.bypass or type(ref.op) not in (LinearOp, EmbeddingOp):
                raise ConfigError(f"{site.path!r} is no embedding and no head, so it has no rows of tokens")
            rows = ref.param.shape[0]
            if len(set(tokens)) != len(tokens) or not tokens:
                raise ConfigError(f"the trainable tokens of {name!r} must be distinct and at least one: {tokens}")
            bad = [t for t in tokens if not 0 <= t < rows]
            if bad:
                raise ConfigError(f"trainable token {bad[0]} of {name!r} is not in its table of {rows} rows")
            found.append((site, list(tokens)))
    return found


def build_tokens(model: nn.Module, chosen: list[int] | dict[str, list[int]]) -> list[tuple[Site, list[Edit]]]:
    """The edits of every table, and of the heads tied to them."""
    made: list[tuple[Site, list[Edit]]] = []
    placed: dict[int, TokenRows] = {}
    for site, tokens in token_sites(model, chosen):
        ref = WeightRef(model.get_submodule(site.path), "weight")
        first = placed.get(id(ref.param))
        if first is not None:
            if sorted(tokens) != first.tokens.tolist():
                raise ConfigError(f"{site.path!r} is tied to another table whose trainable tokens differ")
            continue
        placed[id(ref.param)] = edit = TokenRows(ref, tokens)
        made.append((site, [edit]))
        for path in tied_heads(model, site.path):
            head = WeightRef(model.get_submodule(path), "weight")
            made.append((Site(path, pattern=site.pattern), [TokenRows(head, tokens, tied=edit)]))
    return made


@register
@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Trains only the rows `token_indices` of embeddings.

    Args:
        token_indices: the tokens, at least one.
        target_modules: the embeddings; the model's input embedding if None.
        init_weights: rows start at the base's own; False is refused.
    """

    token_indices: list[int] | None = None
    init_weights: bool = True

    method: ClassVar[str] = "TRAINABLE_TOKENS"
    summary: ClassVar[str] = "chosen rows of the embedding train"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token_indices:
            raise ConfigError("TrainableTokensConfig needs token_indices: the tokens whose rows train")
        if not self.init_weights:
            raise ConfigError("init_weights=False (random rows) is not supported: rows start at the base's own")

    @classmethod
    def example(cls, **fields: Any) -> TrainableTokensConfig:
        return cls(**{"token_indices": [3, 1, 7], **fields})

    def _chosen(self) -> list[int] | dict[str, list[int]]:
        tokens = list(self.token_indices or [])
        if not self.target_modules:
            return tokens
        names = [self.target_modules] if isinstance(self.target_modules, str) else sorted(self.target_modules)
        return dict.fromkeys(names, tokens)

    def sites(self, model: nn.Module) -> list[Site]:
        return [site for site, _ in token_sites(model, self._chosen())]

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        return build_tokens(model, self._chosen())

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        return []  # `extras` makes them, since tied tables share one tensor
