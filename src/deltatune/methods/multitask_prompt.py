"""Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning (arXiv 2303.02861).

    prompt of task t:  E ∘ (C_t R_t)        E: (P, d) shared, C_t: (P, r), R_t: (r, d) of each task, all trained

The tasks of a batch are given with the call: `model(**batch, task_ids=...)`, one number per row. A target task starts
from the sources' trained prompts by `prompt_tuning_init`: their mean, one of them, or the shared table alone.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import register
from deltatune.errors import ConfigError
from deltatune.methods._prompts import FILE_NAME, Table, waits_for_file
from deltatune.methods.prompt_tuning import PromptTuningConfig, start

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(str, enum.Enum):
    """Where the prompt starts; the last three read what was trained on source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class TaskTable(Table):
    """A shared table and a low-rank factor for every task."""

    def __init__(self, rows: int, d: int, tasks: int, rank: int) -> None:
        super().__init__(rows, d)
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, rows, rank).normal_(std=0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, rank, d).normal_(std=0.02))

    def table(self, tasks: Tensor | None = None) -> Tensor:
        count = self.prefix_task_cols.shape[0]
        if tasks is None:
            if count > 1:
                raise ConfigError(f"this prompt has {count} tasks; give task_ids, one number per row of the batch")
            return self.embedding.weight * (self.prefix_task_cols[0] @ self.prefix_task_rows[0])
        if int(tasks.max()) >= count or int(tasks.min()) < 0:
            raise ConfigError(f"task_ids must be between 0 and {count - 1}, not {tasks.tolist()}")
        tasks = tasks.to(self.prefix_task_cols.device).view(-1)
        return self.embedding.weight * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])  # (B, rows, d)

    def file_names(self) -> dict[str, str]:
        return {"embedding.weight": FILE_NAME, COLS: COLS, ROWS: ROWS}


@register
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning's configuration.

    Args:
        prompt_tuning_init: see `MultitaskPromptTuningInit`.
        prompt_tuning_init_state_dict_path: the source tasks' adapter: its directory or safetensors file.
        prompt_tuning_init_task: which of the source tasks, for EXACT_SOURCE_TASK.
        num_ranks: r. num_tasks: how many tasks.

    Raises:
        ConfigError: a value is out of range, or a start from source tasks without their file.
    """

    prompt_tuning_init: enum.Enum | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1

    method: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    summary: ClassVar[str] = "one shared prompt and a low-rank factor per task"
    paper: ClassVar[str] = "arXiv 2303.02861"
    inits: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_ranks", "num_tasks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self._from_sources() and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"prompt_tuning_init={self._init!r} needs prompt_tuning_init_state_dict_path, "
                "where the source tasks' prompts are"
            )

    @property
    def _init(self) -> str:
        return str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))

    def _from_sources(self) -> bool:
        return self._init not in ("TEXT", "RANDOM")

    def encoder(self, model: nn.Module) -> Table:
        assert self.token_dim is not None
        table = TaskTable(self.rows, self.token_dim, self.num_tasks, self.num_ranks)
        if not self._from_sources():
            start(model, table, self)
        elif not waits_for_file():
            self._start_from_sources(table)
        return table

    @torch.no_grad()
    def _start_from_sources(self, table: TaskTable) -> None:
        """Fills the table from the source tasks' file; every task here starts alike."""
        state = read_sources(str(self.prompt_tuning_init_state_dict_path))
        shared = state[FILE_NAME]
        if shared.shape != table.embedding.weight.shape:
            raise ConfigError(
                f"the source tasks' prompt has shape {tuple(shared.shape)}, and this one "
                f"{tuple(table.embedding.weight.shape)}; take the same num_virtual_tokens and model"
            )
        table.embedding.weight.copy_(shared)
        init = MultitaskPromptTuningInit(self._init)
        if init is MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return
        cols, rows = state[COLS], state[ROWS]
        if cols.shape[-1] != self.num_ranks:
            raise ConfigError(f"the source tasks have num_ranks={cols.shape[-1]}, and this adapter {self.num_ranks}")
        if init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
            cols, rows = cols.mean(0), rows.mean(0)
        else:
            task = self.prompt_tuning_init_task or 0
            if not 0 <= task < len(cols):
                raise ConfigError(f"prompt_tuning_init_task={task}, but there are {len(cols)} source tasks")
            cols, rows = cols[task], rows[task]
        table.prefix_task_cols.copy_(cols.expand_as(table.prefix_task_cols))
        table.prefix_task_rows.copy_(rows.expand_as(table.prefix_task_rows))


def read_sources(path: str) -> dict[str, Tensor]:
    """The source tasks' tensors, from an adapter's directory or its safetensors file."""
    from deltatune.core.files import SAFETENSORS_NAME, find_file, read_tensors

    file: Any = path if os.path.isfile(path) else find_file(path, SAFETENSORS_NAME)
    state, _ = read_tensors(file, "cpu")
    missing = [n for n in (FILE_NAME, COLS, ROWS) if n not in state]
    if missing:
        raise ConfigError(f"{path!r} holds no multitask prompt: {missing[0]!r} is missing")
    return state
