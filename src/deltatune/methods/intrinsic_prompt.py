"""Exploring Universal Intrinsic Task Subspace via Prompt Tuning (IPT, arXiv 2110.07867).

    prompt = W3 tanh(W2 v)        v: (k,) trained, W2: (h, k), W3: (P d, h) frozen

Stage 1, `fit_subspace`, finds W2 and W3 as the decoder of an auto-encoder over the trained prompts of many tasks.
Stage 2 is this method: a new task trains the k numbers of v alone. The decoder goes into the file beside v, so an
adapter is whole by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import register
from deltatune.errors import ConfigError
from deltatune.methods._prompts import PromptLearningConfig, Table, waits_for_file

HIDDEN, OUTPUT = "decoder_hidden", "decoder_output"


class Decoded(Table):
    """`embedding` holds v, `(1, k)`; the decoder makes `(rows, d)` of it."""

    def __init__(self, rows: int, d: int, k: int, hidden: int) -> None:
        super().__init__(1, k)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.decoder_hidden = nn.Linear(k, hidden)
        self.decoder_output = nn.Linear(hidden, rows * d)
        self.size = rows, d

    def table(self, tasks: Tensor | None = None) -> Tensor:
        flat: Tensor = self.decoder_output(torch.tanh(self.decoder_hidden(self.embedding.weight)))
        return flat.view(self.size)

    def file_names(self) -> dict[str, str]:
        names = [n for n, _ in self.named_parameters()]
        return {n: "intrinsic_vector" if n == "embedding.weight" else n for n in names}


@register
@dataclass
class IntrinsicPromptConfig(PromptLearningConfig):
    """Intrinsic Prompt Tuning's configuration (its second stage).

    Args:
        intrinsic_dim: k. decoder_hidden_size: h; token_dim if None.
        decoder_path: the safetensors file that `fit_subspace` wrote; None takes a random decoder, which is prompt
            tuning in a random subspace.

    Raises:
        ConfigError: a value is out of range, or the decoder does not fit.
    """

    intrinsic_dim: int = 250
    decoder_hidden_size: int | None = None
    decoder_path: str | None = None

    method: ClassVar[str] = "INTRINSIC_PROMPT"
    summary: ClassVar[str] = "a prompt in the subspace that many tasks share"
    paper: ClassVar[str] = "arXiv 2110.07867"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("intrinsic_dim", "decoder_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"{part}.{leaf}" for part in (HIDDEN, OUTPUT) for leaf in ("weight", "bias"))

    def encoder(self, model: nn.Module) -> Table:
        assert self.token_dim is not None
        hidden = self.decoder_hidden_size or self.token_dim
        table = Decoded(self.rows, self.token_dim, self.intrinsic_dim, hidden)
        if self.decoder_path is not None and not waits_for_file():
            load_decoder(table, self.decoder_path)
        return table


@torch.no_grad()
def load_decoder(table: Decoded, path: str) -> None:
    """Fills the decoder from a file of `fit_subspace`."""
    from deltatune.core.files import read_tensors

    if not os.path.isfile(path):
        raise ConfigError(f"decoder_path {path!r} is no file; fit_subspace writes one")
    state, _ = read_tensors(Path(path), "cpu")
    for name, param in table.named_parameters():
        if name == "embedding.weight":
            continue
        if name not in state or state[name].shape != param.shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise ConfigError(
                f"decoder_path {path!r} does not fit: {name} is {found} there and {tuple(param.shape)} here; use its "
                "num_virtual_tokens, intrinsic_dim and decoder_hidden_size"
            )
        param.copy_(state[name])


class AutoEncoder(nn.Module):
    """Stage 1: prompts `(n, P d)` → z `(n, k)` → prompts again."""

    def __init__(self, width: int, k: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, k)
        self.decoder_hidden = nn.Linear(k, hidden)
        self.decoder_output = nn.Linear(hidden, width)

    def forward(self, prompts: Tensor) -> Tensor:
        z = self.encoder(prompts)
        result: Tensor = self.decoder_output(torch.tanh(self.decoder_hidden(z)))
        return result


def fit_subspace(
    prompts: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    intrinsic_dim: int = 250,
    decoder_hidden_size: int | None = None,
    steps: int = 1000,
    lr: float = 1e-3,
    task_loss: Callable[[int, Tensor], Tensor] | None = None,
    reconstruction_weight: float = 200.0,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Trains the auto-encoder on the prompts of many tasks and writes its decoder; returns the loss of each step.

    Args:
        prompts: one trained prompt `(P, d)` per task (`get_peft_model_state_dict(model)["prompt_embeddings"]`).
        task_loss: (task, its reconstructed prompt `(P, d)`) → that task's own loss; one task a step, in turn, is added
            to the reconstruction's mean square, as the paper has it. None trains on the reconstruction alone.

    Raises:
        ConfigError: fewer than two prompts, or prompts of different shapes.
    """
    from deltatune.core.files import write_tensors

    if len(prompts) < 2 or len({tuple(p.shape) for p in prompts}) != 1:
        raise ConfigError(
            f"fit_subspace needs two or more prompts of one shape, not {[tuple(p.shape) for p in prompts]}"
        )
    shape = prompts[0].shape
    flat = torch.stack([p.detach().float().flatten() for p in prompts])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoEncoder(flat.shape[1], intrinsic_dim, decoder_hidden_size or int(shape[-1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in _counted(steps, progress):
        again = model(flat)
        loss = reconstruction_weight * F.mse_loss(again, flat)
        if task_loss is not None:
            task = step % len(prompts)
            loss = loss + task_loss(task, again[task].view(shape))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    state = {k: v.detach() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    write_tensors(Path(path), state, {})
    return losses


def _counted(steps: int, progress: bool) -> Any:
    if not progress:
        return range(steps)
    from rich.progress import track

    return track(range(steps), description="Fitting the subspace")
