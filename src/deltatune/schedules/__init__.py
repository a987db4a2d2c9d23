"""WHEN it changes: training procedures, one file each. Importing this registers all.

    model = get_peft_model(base, LoraConfig(...))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = attach(model, optimizer, ReLora(cycle=500), total_steps=5000)     # once, before the loop
    ...                                                                          # the loop as it was
    schedule.finish()                                                            # once, after it

A procedure acts inside `optimizer.step()`, through the optimiser's own hooks. So whatever the loop does around the
step (gradient accumulation, loss scaling, clipping, activation checkpointing, sharding) it sees what the optimiser
sees: the gradients of a whole step, unscaled, and nothing at all for a step that was skipped.
"""

from importlib import import_module
from pkgutil import iter_modules

from deltatune.core.positions import interpolate_positions
from deltatune.schedules.attach import Attached, attach, mark
from deltatune.schedules.base import PROCEDURES, Procedure, Rate, Run, Schedule, find_procedure, procedure

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

from deltatune.schedules.adalora import AdaLora  # noqa: E402
from deltatune.schedules.adapter_drop import AdapterDrop  # noqa: E402
from deltatune.schedules.cola import Cola  # noqa: E402
from deltatune.schedules.delta_lora import DeltaLora  # noqa: E402
from deltatune.schedules.full_then_lora import FullThenLora  # noqa: E402
from deltatune.schedules.fusion import FusionPenalty  # noqa: E402
from deltatune.schedules.lisa import Lisa  # noqa: E402
from deltatune.schedules.longlora import LongLora  # noqa: E402
from deltatune.schedules.lora_fa import LoraFA  # noqa: E402
from deltatune.schedules.lora_plus import LoraPlus  # noqa: E402
from deltatune.schedules.lora_pro import LoraPro  # noqa: E402
from deltatune.schedules.periodic_lora import PeriodicLora  # noqa: E402
from deltatune.schedules.relora import ReLora  # noqa: E402
from deltatune.schedules.riemannian import Riemannian  # noqa: E402

__all__ = [
    "PROCEDURES",
    "AdaLora",
    "AdapterDrop",
    "Attached",
    "Cola",
    "DeltaLora",
    "FullThenLora",
    "FusionPenalty",
    "Lisa",
    "LongLora",
    "LoraFA",
    "LoraPlus",
    "LoraPro",
    "PeriodicLora",
    "Procedure",
    "Rate",
    "ReLora",
    "Riemannian",
    "Run",
    "Schedule",
    "attach",
    "find_procedure",
    "interpolate_positions",
    "mark",
    "procedure",
]
