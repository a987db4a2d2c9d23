"""New adapters out of old ones: weighted sums and model-merging rules on ΔW itself.

    ΔW = rule(w_1, ΔW_1; …; w_n, ΔW_n)      for every weight that one of the adapters changes

The rules see ΔW, whatever the method, scale or rank that made it, and never factors: of factors, sums are not linear.
`linear`, `cat`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` are exact, at the rank that takes; `svd` and
the `…_svd` forms keep `svd_rank`, and the report says what was lost.

TIES: arXiv 2306.01708. DARE: arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltatune.config import TargetedConfig
from deltatune.core.adapters import AdapterSet
from deltatune.core.changes import Change, total
from deltatune.errors import AdapterNameError, ConfigError, hint
from deltatune.plain_lora import Builder, LoraReport

Sign = Literal["total", "frequency"]


@dataclass(frozen=True)
class Options:
    """What the rules need beside the changes.

    Attributes:
        density: share of entries that pruning keeps. sign: how TIES elects signs.
    """

    density: float = 1.0
    sign: Sign = "total"


def keep_largest(t: Tensor, density: float) -> Tensor:
    """`t` with its `density · n` largest entries by magnitude; zeros elsewhere."""
    k = int(density * t.numel())
    mask = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
    return t * mask.index_fill_(0, t.abs().flatten().topk(k).indices, 1).view_as(t)


def keep_random(t: Tensor, density: float) -> Tensor:
    """`t` with each entry kept with probability `density` and divided by it."""
    return t * torch.bernoulli(torch.full_like(t, density)) / density


def elected_mean(stack: Tensor, weights: Tensor, sign: Sign) -> Tensor:
    """TIES: per entry, the weighted mean of the values whose sign won.

    Args:
        stack: (n, …). weights: (n,).
        sign: `"total"` elects by the sum of the values, `"frequency"` by their number.
    """
    votes = stack if sign == "total" else stack.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == elected
    weighted = stack * weights.view(-1, *[1] * (stack.ndim - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


Dense = Callable[[Sequence[Tensor], Tensor, Options], Tensor]


def _ties(tensors: Sequence[Tensor], weights: Tensor, options: Options) -> Tensor:
    return elected_mean(torch.stack([keep_largest(t, options.density) for t in tensors]), weights, options.sign)


def _dare_ties(tensors: Sequence[Tensor], weights: Tensor, options: Options) -> Tensor:
    return elected_mean(torch.stack([keep_random(t, options.density) for t in tensors]), weights, options.sign)


def _dare_linear(tensors: Sequence[Tensor], weights: Tensor, options: Options) -> Tensor:
    return sum_of([keep_random(t, options.density) for t in tensors], weights)


def _magnitude_prune(tensors: Sequence[Tensor], weights: Tensor, options: Options) -> Tensor:
    return sum_of([keep_largest(t, options.density) for t in tensors], weights)


def sum_of(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.einsum("n,n...->...", weights, torch.stack(list(tensors)))


#: rules that see whole matrices, by the name of their exact form
DENSE: dict[str, Dense] = {
    "ties": _ties,
    "dare_ties": _dare_ties,
    "dare_linear": _dare_linear,
    "magnitude_prune": _magnitude_prune,
}
#: every `combination_type`
COMBINATIONS = ("svd", "linear", "cat", *DENSE, *(f"{name}_svd" for name in DENSE))


def _dense(rule: Dense, weights: Sequence[float], options: Options, changes: Sequence[Change | None]) -> Change:
    """A rule on whole matrices; weights that an adapter leaves alone count as zeros."""
    known = next(c for c in changes if c is not None)
    like = known.matrix()
    tensors = [torch.zeros_like(like) if c is None else c.matrix().to(like.dtype) for c in changes]
    return Change(dense=rule(tensors, torch.tensor(weights, dtype=like.dtype, device=like.device), options))


def _weighted_sum(weights: Sequence[float], changes: Sequence[Change | None]) -> Change:
    return total([c.times(w) for c, w in zip(changes, weights, strict=True) if c is not None])


def _ranks(changes: Sequence[Change | None]) -> list[int] | None:
    """The ranks of the changes; None if one has no factors."""
    known = [c.rank for c in changes if c is not None]
    ranks = [r for r in known if r is not None]
    return ranks if len(ranks) == len(known) else None


def _largest_rank(changes: Sequence[Change | None]) -> int | None:
    ranks = _ranks(changes)
    return max(*ranks, 1) if ranks else None


def _sum_of_ranks(changes: Sequence[Change | None]) -> int | None:
    ranks = _ranks(changes)
    return max(sum(ranks), 1) if ranks else None


def add_weighted_adapter(
    adapters: AdapterSet,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Sign = "total",
) -> LoraReport:
    """Adds a plain LoRA, frozen and not active, that does what the rule makes of the adapters.

    Args:
        names: adapters with a ΔW, of any methods. weights: one per adapter, negative ones subtract.
        combination_type: one of `COMBINATIONS`; None: the exact weighted sum as an adapter of their own method, where
            they share one whose sums stay in it (IA³), and `svd` otherwise.
        svd_rank: ranks that `svd` and the `…_svd` forms keep; None: per weight the largest of the adapters', or
            all, where an adapter's ΔW is not low-rank (DoRA).
        svd_clamp: limits the entries of their factors to this quantile, in (0.5, 1].
        svd_driver: of cuSOLVER, on CUDA.
        density: share of entries that the pruning rules keep, in (0, 1].
        majority_sign_method: how the TIES rules elect signs, `"total"` or `"frequency"`.

    Returns:
        the rank and the truncation error of every weight, and the whole error.

    Raises:
        ConfigError: an option is out of range or not one of this rule. AdapterNameError: a name. CannotMergeError:
        an adapter without ΔW. The model is as before.
    """
    _check(adapters, names, weights, new_name)
    if combination_type is None:
        first = adapters.configs[names[0]]
        if isinstance(first, TargetedConfig) and first.add_weighted(adapters, names, weights, new_name):
            return LoraReport()
        combination_type = "svd"
    exact = combination_type.removesuffix("_svd")
    if combination_type not in COMBINATIONS:
        raise ConfigError(f"combination_type {combination_type!r} is unknown{hint(combination_type, COMBINATIONS)}")
    truncated = combination_type == "svd" or combination_type != exact
    _check_svd(combination_type, truncated, svd_rank, svd_clamp, svd_driver)
    options = _pruning(combination_type, exact, density, majority_sign_method)

    def rule(changes: Sequence[Change | None]) -> Change:
        if exact in DENSE:
            return _dense(DENSE[exact], weights, options, changes)
        return _weighted_sum(weights, changes)

    def ranks(changes: Sequence[Change | None]) -> int | None:
        if truncated:
            return svd_rank or _largest_rank(changes)
        return _sum_of_ranks(changes) if exact == "cat" else None

    return Builder(adapters, names, rule, ranks, clamp=svd_clamp, driver=svd_driver).add(new_name)


def _check(adapters: AdapterSet, names: Sequence[str], weights: Sequence[float], new_name: str) -> None:
    if isinstance(names, str) or not names:
        raise ConfigError("adapters must be a list of at least one adapter name")
    adapters.check(*names)
    if len(set(names)) != len(names):
        raise AdapterNameError(f"an adapter is named twice in {list(names)}; add up its weights")
    if len(weights) != len(names):
        raise ConfigError(f"{len(names)} adapters need {len(names)} weights, not {len(weights)}")
    adapters.check_new_name(new_name)


def _check_svd(kind: str, truncated: bool, rank: int | None, clamp: float | None, driver: str | None) -> None:
    if not truncated:
        for option, value in (("svd_rank", rank), ("svd_clamp", clamp), ("svd_driver", driver)):
            if value is not None:
                raise ConfigError(f"{option} is for svd and the …_svd forms; combination_type {kind!r} is exact")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"svd_rank must be a whole number of at least 1, not {rank!r}")
    if clamp is not None and not 0.5 < clamp <= 1:
        raise ConfigError(f"svd_clamp is a quantile in (0.5, 1], not {clamp!r}")


def _pruning(kind: str, exact: str, density: float | None, sign: Sign) -> Options:
    if exact not in DENSE:
        if density is not None:
            raise ConfigError(f"density is for the rules that prune; combination_type {kind!r} does not")
    elif density is None or not 0 < density <= 1:
        raise ConfigError(f"combination_type {kind!r} needs density, the share it keeps, in (0, 1], not {density!r}")
    if sign not in ("total", "frequency"):
        raise ConfigError(f'majority_sign_method must be "total" or "frequency", not {sign!r}')
    if sign != "total" and "ties" not in kind:
        raise ConfigError(f"majority_sign_method is for the ties rules; combination_type {kind!r} elects no signs")
    return Options(1.0 if density is None else density, sign)
