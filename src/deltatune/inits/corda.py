"""CorDA: Context-Oriented Decomposition Adaptation (arXiv 2406.05223).

    C = E[x xᵀ] over sampled inputs x of the weight;  W C = U S Vᵀ,  V̂ᵀ = Vᵀ C⁻¹,  so that W = U S V̂ᵀ
    B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V̂_rᵀ,  y = W x + s · (B A - B0 A0) x

Instruction-previewed mode ("ipm") trains the r largest components, those that matter most for the sampled data;
knowledge-preserved mode ("kpm") the r smallest, so that what the data stand for is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core.files import read_json_metadata, read_tensors, write_tensors
from deltatune.errors import ConfigError, hint
from deltatune.inits import Request, Start, options_of, register_init
from deltatune.inits._watch import InputWatch, Spot, attention_mask_of, rows_of
from deltatune.inits.data import (
    COLLECTORS,
    PairCollector,
    as_base,
    check_file_name,
    collector_for,
    finish,
    prepared_start,
    spots_of,
    summed,
)
from deltatune.inits.pissa import split
from deltatune.progress import track

#: in a covariance file: path -> the weight under which its covariance is kept
LEADERS = "deltatune_leaders"


@dataclass
class CordaConfig:
    """Options of `init_lora_weights="corda"`.

    Args:
        cache_file: a .safetensors file for the components found; read instead of any data if it is there.
        covariance_file: a .safetensors file for the covariances, likewise; these serve any rank and both modes.
        corda_method: `"ipm"` or `"kpm"`.
        verbose: show a progress bar over the decompositions.
        use_float16_for_covariance: keep covariances in half the memory.
        prune_temporary_fields: modules carry none here, so only True means something.

    Raises:
        ConfigError: an unknown method, or a file that is no .safetensors.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ConfigError(f'corda_config: corda_method must be "ipm" or "kpm", not {self.corda_method!r}')


@register_init("corda", option="corda_config", options=CordaConfig, needs_data=True, offset=True, derivable=False)
def corda(request: Request) -> Start:
    """The components that the data gave."""
    return prepared_start(request)


def components(w: Tensor, c: Tensor, r: int, smallest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """r components of `w: (out, in)` oriented by the covariance `c: (in, in)`: `(out, r)`, `(r,)`, `(r, in)`.

    The covariance gets a hundredth of its mean eigenvalue on its diagonal, doubled until it can be inverted; it is
    the damped one that is decomposed, so that all components together are `w`.
    """
    eye = torch.eye(len(c), device=c.device, dtype=c.dtype)
    damping = 0.01
    for _ in range(40):
        damped = c + damping * c.diagonal().mean() * eye
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and float((damped @ inverse - eye).norm()) < 0.05:
            break
        damping *= 2
    else:
        raise ConfigError("CorDA: a covariance cannot be inverted; its inputs are zero or not finite")
    u, s, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    part = slice(len(s) - r, None) if smallest else slice(r)
    return u[:, part], s[part], vt[part] @ inverse


class CordaCollector(PairCollector):
    """Covariances of every distinct input: the mean over calls of Xᵀ X, X scaled to a largest entry of 1."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)
        self.options: CordaConfig = options_of(config, "corda_config", CordaConfig)
        if not self.options.prune_temporary_fields:
            raise ConfigError("corda_config: prune_temporary_fields=False keeps fields that modules do not have here")
        for name in ("cache_file", "covariance_file"):
            check_file_name(f"corda_config: {name}", getattr(self.options, name))
        for spot in self.spots:
            spot.request(config).weight()  # refuses impossible ranks before the data are run
        self.mask: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def watch(self) -> InputWatch:
        self.watching = InputWatch(self.spots, self._see)
        return self.watching

    def expect(self, batch: Any) -> None:
        self.mask = attention_mask_of(batch)

    @torch.no_grad()
    def _see(self, spot: Spot, args: tuple[Any, ...]) -> None:
        x = rows_of(spot, args[0], self.mask)
        if not torch.isfinite(x).all():
            raise ConfigError(f"CorDA: the input of {spot.name!r} is not finite")
        # the paper's code divides by the largest entry, so that no batch outweighs the others
        x = x / x.max().abs().clamp_min(1e-30)
        dtype = torch.float16 if self.options.use_float16_for_covariance else torch.float32
        product = (x.mT @ x).to(dtype)
        self.sums[spot.name] = self.sums[spot.name] + product if spot.name in self.sums else product
        self.calls[spot.name] = self.calls.get(spot.name, 0) + 1

    def covariances(self) -> dict[str, Tensor]:
        """path -> C, `(in, in)` in float32, over all processes; weights with one input share the tensor.

        Raises:
            ConfigError: a weight was never run.
        """
        means = {}
        for name, total in self.sums.items():
            calls = summed(torch.tensor(float(self.calls[name]), device=total.device))
            means[name] = summed(total.float()) / calls
        for spot in self.spots:
            leader = self.watching.leader.get(spot.name)
            if leader is None:
                raise ConfigError(f"CorDA: no batch ran {spot.name!r}, so its inputs are unknown; leave it out")
            means[spot.name] = means[leader]
        return means

    @torch.no_grad()
    def on_file(self) -> dict[str, Start] | None:
        cache, covariances = self.options.cache_file, self.options.covariance_file
        if cache and Path(cache).is_file():
            return self.starts(read_tensors(Path(cache))[0])
        if covariances and Path(covariances).is_file():
            return self.decompose(self._read_covariances(Path(covariances)))
        return None

    def finish(self) -> dict[str, Start]:
        covariances = self.covariances()
        if self.options.covariance_file:
            leaders = self.watching.leader
            unique = {name: covariances[name] for name in set(leaders.values())}
            write_tensors(Path(self.options.covariance_file), unique, {LEADERS: json.dumps(leaders)})
        return self.decompose(covariances)

    def _read_covariances(self, path: Path) -> dict[str, Tensor]:
        found, metadata = read_tensors(path)
        leaders = read_json_metadata(metadata, LEADERS) or {}
        for spot in self.spots:
            if leaders.get(spot.name) not in found:
                raise ConfigError(f"{path} has no covariance of {spot.name!r}{hint(spot.name, leaders)}; remove it")
        return {spot.name: found[leaders[spot.name]].to(spot.ref.device) for spot in self.spots}

    def decompose(self, covariances: dict[str, Tensor]) -> dict[str, Start]:
        """The starts, from the covariances; writes the components to `cache_file`."""
        found: dict[str, Tensor] = {}
        for spot in track(self.spots, "corda components", show=self.options.verbose, total=len(self.spots)):
            c = covariances[spot.name].float()
            if c.shape != (spot.ref.shape[-1],) * 2:
                raise ConfigError(f"the covariance of {spot.name!r} has shape {tuple(c.shape)}, which does not fit")
            w = spot.request(self.config).weight().to(c.device)
            u, s, vt = components(w, c, spot.r, self.options.corda_method == "kpm")
            found |= {f"{spot.name}:u": u, f"{spot.name}:s": s, f"{spot.name}:vt": vt}
        if self.options.cache_file:
            write_tensors(Path(self.options.cache_file), found, {})
        return self.starts(found)

    def starts(self, found: dict[str, Tensor]) -> dict[str, Start]:
        """The starts, from components `<path>:u`, `:s` and `:vt`."""
        starts = {}
        for spot in self.spots:
            if f"{spot.name}:s" not in found:
                names = [k.removesuffix(":s") for k in found if k.endswith(":s")]
                raise ConfigError(f"the CorDA file has no {spot.name!r}{hint(spot.name, names)}")
            u, s, vt = (found[f"{spot.name}:{part}"].to(spot.ref.device) for part in ("u", "s", "vt"))
            if len(s) != spot.r or u.shape[0] != spot.ref.shape[-2] or vt.shape[-1] != spot.ref.shape[-1]:
                raise ConfigError(
                    f"the CorDA file has rank {len(s)} for {spot.name!r} of shape {(u.shape[0], vt.shape[-1])}; rank "
                    f"{spot.r} of {tuple(spot.ref.shape[-2:])} is needed; remove the file to compute it again"
                )
            starts[spot.name] = split(u, s, vt, spot.scale)
        return starts


COLLECTORS["corda"] = CordaCollector


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Computes CorDA's starts before `get_peft_model`; peft's name for `prepare_init`.

    Args:
        run_model: runs `model` on sample data; may be None if `corda_config` names a file that is there.
        hooked_model: the model that `run_model` runs, if it is another one of the same names.

    Raises:
        ConfigError: there is nothing to run and no file, or the data were not enough.
    """
    collector = collector_for(model, lora_config, "corda")
    assert isinstance(collector, CordaCollector)
    if finish(collector, collector.on_file()):
        return
    if run_model is None:
        raise ConfigError("preprocess_corda needs run_model, or a cache_file or covariance_file that is there")
    watched = spots_of(hooked_model, lora_config) if hooked_model is not None else collector.spots
    collector.watching = InputWatch(watched, collector._see)
    with as_base(hooked_model or model), collector.watching:
        run_model()
    finish(collector, collector.finish())
