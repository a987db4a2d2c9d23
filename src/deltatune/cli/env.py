"""`deltatune env`: versions, devices, memory, cache and hub, for bug reports and for "why is it slow"."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import JsonFlag

PACKAGES = (
    "deltatune",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
)
VARIABLES = (
    "DELTATUNE_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "CUDA_VISIBLE_DEVICES",
)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("env", epilog=common.examples("deltatune env", "deltatune env --no-hub --json"))(env_command)


def env_command(
    hub: Annotated[bool, typer.Option("--hub/--no-hub", help="Ask whether the model hub answers.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Show versions, devices, memory, threads, the cache and whether the hub answers."""
    facts = {
        "python": f"{platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}",
        "packages": {name: version_of(name) for name in PACKAGES},
        "devices": devices(),
        "memory": memory(),
        "threads": threads(),
        "cache": cache(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "hub": hub_state() if hub else "not asked",
    }
    if as_json:
        common.print_json(facts)
    else:
        common.out().print(common.facts(_rows(facts)))


def version_of(package: str) -> str | None:
    """Installed version, without importing the package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Accelerators that torch can use, then the CPU."""
    import torch

    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
            name = torch.cuda.get_device_name(i)
            found.append({"device": f"cuda:{i}", "name": name, "free": free, "total": total, "capability": capability})
    elif torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        found.append({"device": str(accelerator), "name": str(accelerator)})
    return [*found, {"device": "cpu", "name": cpu_name(), "cores": os.cpu_count()}]


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory() -> dict[str, int]:
    """Bytes of main memory."""
    import psutil

    state = psutil.virtual_memory()
    return {"total": int(state.total), "available": int(state.available)}


def threads() -> dict[str, Any]:
    """How many threads torch computes with, of how many this process may use."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"torch": torch.get_num_threads(), "usable_cores": usable}


def cache() -> dict[str, Any]:
    """Where fetched models and data are kept, and how many bytes they take."""
    from deltatune.train.fetch import cache_dir

    path = cache_dir()
    total = sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())
    return {"path": str(path), "bytes": total}


def hub_state() -> str:
    """Whether the hub answers, within a few seconds."""
    from deltatune.train.fetch import FetchError, ask_hub

    try:
        ask_hub(lambda api: api.model_info("HuggingFaceTB/SmolLM2-135M-Instruct"))
    except FetchError as error:
        return str(error)
    return "reachable"


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    rows = [["python", facts["python"]]]
    rows += [[name, version or "not installed"] for name, version in facts["packages"].items()]
    rows += [[d["device"], _device(d)] for d in facts["devices"]]
    memory_ = facts["memory"]
    rows.append(["memory", f"{common.size(memory_['available'])} free of {common.size(memory_['total'])}"])
    rows.append(["threads", f"{facts['threads']['torch']} of {facts['threads']['usable_cores']} usable cores"])
    rows.append(["cache", f"{facts['cache']['path']} ({common.size(facts['cache']['bytes'])})"])
    rows += [[name, value] for name, value in facts["environment"].items()]
    return [*rows, ["hub", facts["hub"]]]


def _device(device: dict[str, Any]) -> str:
    text = str(device["name"])
    if "total" in device:
        text += f", {common.size(device['free'])} free of {common.size(device['total'])}"
        text += f", compute capability {device['capability']}"
    return text + (f", {device['cores']} cores" if "cores" in device else "")
