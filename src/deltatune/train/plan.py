"""What a run would do, before it does it: `deltatune train --dry-run`.

The base is built of fake tensors, so no weight is loaded; the data is read and tokenised for real.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deltatune.cli.common import size
from deltatune.train.memory import MemoryEstimate, estimate_memory
from deltatune.train.rundir import Decision, decide

if TYPE_CHECKING:
    from rich.console import Console

    from deltatune.train.models import ResolvedModel
    from deltatune.train.recipe import Recipe
    from deltatune.train.session import Data

PREVIEWED = 3  # examples whose tokens are shown


@dataclass(frozen=True)
class PatternPlan:
    """One target pattern: the modules it selects and what training them adds."""

    pattern: str
    modules: list[str]
    parameters: int


@dataclass(frozen=True)
class Plan:
    """The whole plan as data. `show` prints it, `to_json` gives it to programs."""

    name: str
    model: str
    source: str
    method: dict[str, Any]
    procedure: dict[str, Any] | None
    patterns: list[PatternPlan]
    tied: list[tuple[str, str]]
    trainable: int
    total: int
    data: str
    train_examples: int
    eval_examples: int
    rows: int
    longest: int
    tokens: int
    trained_tokens: int
    truncated: int
    steps: int
    batch: int
    precision: str
    memory: MemoryEstimate
    output_dir: str
    action: str
    preview: Any
    preview_text: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the coloured preview."""
        values = {key: value for key, value in vars(self).items() if key != "preview"}
        values["patterns"] = [asdict(pattern) for pattern in self.patterns]
        values["memory"] = {**asdict(self.memory), "total": self.memory.total}
        return values

    def show(self, console: Console) -> None:
        """Print the plan as tables."""
        _show(self, console)


def plan(recipe: Recipe, *, resume: bool | None = None, overwrite: bool = False) -> Plan:
    """What `train(recipe)` would do; nothing is written.

    Raises:
        ValueError: whatever would stop the run: a pattern that matches nothing, unusable data, an output
            directory that holds another run.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from deltatune.train.arguments import check_machine
    from deltatune.train.loading import hush
    from deltatune.train.models import load_tokenizer, resolve_model
    from deltatune.train.session import check_length, prepare_data

    hush()
    check_machine(recipe)
    decision = decide(recipe, resume=resume, overwrite=overwrite)
    resolved = resolve_model(recipe.model, revision=recipe.revision)
    tokenizer = load_tokenizer(resolved)
    data = prepare_data(recipe, tokenizer)
    with FakeTensorMode():
        base = _shapes_of(recipe, resolved)
        check_length(recipe, data, base)
        return _plan(recipe, resolved, tokenizer, data, base, decision)


def _plan(recipe: Recipe, resolved: ResolvedModel, tokenizer: Any, data: Data, base: Any, decision: Decision) -> Plan:
    from deltatune import get_peft_config, plan_targets
    from deltatune.inits import loading
    from deltatune.schedules import mark
    from deltatune.train.arguments import resolve_precision, total_steps
    from deltatune.train.data import preview
    from deltatune.train.session import attach, procedures_of

    procedures = procedures_of(recipe, len(data.rows))
    # Before the adapter is attached: the plan is about the base's own modules.
    config: Any = get_peft_config({"task_type": recipe.task, **recipe.method})
    targets = plan_targets(base, config)
    with loading():  # no start is computed, and none needs data
        model = attach(recipe, base)
    mark(model, *procedures)
    trainable, total = model.get_nb_trainable_parameters()
    spec = recipe.train
    shown = preview(data.rows, tokenizer, PREVIEWED)
    return Plan(
        name=recipe.name,
        model=recipe.model,
        source=resolved.source,
        method=recipe.method,
        procedure=recipe.procedure,
        patterns=_patterns(targets.patterns, model),
        tied=targets.tied,
        trainable=trainable,
        total=total,
        data=data.examples.describe,
        train_examples=len(data.examples.train),
        eval_examples=len(data.examples.eval),
        rows=len(data.rows),
        longest=data.longest,
        tokens=sum(len(row) for row in data.encoded),
        trained_tokens=sum(row.trained for row in data.encoded),
        truncated=sum(row.truncated for row in data.encoded),
        steps=total_steps(spec, len(data.rows)),
        batch=spec.batch_size * spec.gradient_accumulation,
        precision=resolve_precision(recipe),
        memory=_memory(recipe, model, data),
        output_dir=str(recipe.run_dir),
        action=decision.action,
        preview=shown,
        preview_text=_as_text(shown),
    )


def _shapes_of(recipe: Recipe, resolved: ResolvedModel) -> Any:
    """The base as it would be loaded, without its numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from deltatune.train.arguments import accelerator, resolve_dtype

    config = AutoConfig.from_pretrained(resolved.path, revision=resolved.revision)
    options = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    with torch.device(accelerator() or "cpu"):
        dtype = getattr(torch, resolve_dtype(recipe))
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def _patterns(patterns: dict[str, list[str]], model: Any) -> list[PatternPlan]:
    """The selected modules with the trainable parameters that live under each."""
    sizes: dict[str, int] = {}
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad:
            sizes[name] = parameter.numel()
    return [
        PatternPlan(pattern, modules, sum(_under(sizes, module) for module in modules))
        for pattern, modules in patterns.items()
    ]


def _under(sizes: dict[str, int], module: str) -> int:
    return sum(size for name, size in sizes.items() if name == module or name.startswith(f"{module}."))


def _memory(recipe: Recipe, model: Any, data: Data) -> MemoryEstimate:
    """For the largest batch that the data can make."""
    from deltatune.train.arguments import autocast_dtype

    spec = recipe.train
    largest = sorted(map(len, data.rows), reverse=True)[: spec.batch_size]
    rows, length = (1, sum(largest)) if spec.padding_free else (spec.batch_size, largest[0])
    trained = spec.batch_size * max(row.trained for row in data.rows)
    return estimate_memory(
        model,
        optim=spec.optim,
        rows=rows,
        length=-(-length // 8) * 8,  # the collator pads to a multiple of 8
        trained=trained,
        checkpointing=spec.gradient_checkpointing,
        autocast=autocast_dtype(recipe),
        quantization=recipe.quantization,
    )


def _as_text(renderable: Any) -> str:
    """A rich renderable as plain text."""
    from rich.console import Console

    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def _show(plan: Plan, console: Console) -> None:
    """A dry run's plan: what would be trained where, on which tokens, in how much memory."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"Plan for {plan.name}: nothing is trained or written.", style="bold"))
    console.print(Text(f"Model: {plan.source}"))
    console.print(Text(f"Method: {', '.join(f'{key}={value}' for key, value in plan.method.items())}"))
    if plan.procedure:
        console.print(Text(f"Procedure: {', '.join(f'{key}={value}' for key, value in plan.procedure.items())}"))
    targets = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (("pattern", "left"), ("modules", "right"), ("trains", "right"), ("for example", "left")):
        targets.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in plan.patterns:
        cells = (row.pattern, str(len(row.modules)), f"{row.parameters:,}", _abridged(row.modules))
        targets.add_row(*(Text(cell) for cell in cells))
    console.print(targets)
    share = 100 * plan.trainable / max(plan.total, 1)
    console.print(Text(f"Trains {plan.trainable:,} of {plan.total:,} parameters ({share:.3f} %)."))
    for weight, other in plan.tied:
        console.print(Text(f"Tied: {weight} shares its numbers with {other}.", style="yellow"))
    console.print(Text(f"Data: {plan.data}"))
    console.print(Text(_tokens(plan)))
    console.print(plan.preview)
    _show_memory(plan, console)
    verb = {"start": "be written to", "resume": "continue in", "finished": "not run: it is finished in"}
    console.print(Text(f"The run would {verb[plan.action]} {plan.output_dir}."))


def _tokens(plan: Plan) -> str:
    cut = f", {plan.truncated} cut to fit" if plan.truncated else ""
    packed = f" packed into {plan.rows} rows" if plan.rows != plan.train_examples else ""
    return (
        f"{plan.train_examples} training examples{packed}{cut}, {plan.eval_examples} held out; "
        f"{plan.tokens:,} tokens, {plan.trained_tokens:,} of them trained, longest row {plan.longest}; "
        f"{plan.steps} steps of {plan.batch} rows in {plan.precision}."
    )


def _show_memory(plan: Plan, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    memory = plan.memory
    working = "not known" if memory.working is None else size(memory.working)
    rows = (
        ("base weights", size(memory.base)),
        ("adapter", size(memory.adapter)),
        ("optimiser state", size(memory.optimizer)),
        (f"activations and gradients, {memory.rows} × {memory.length} tokens", working),
        *([("this program itself", size(memory.process))] if memory.process else []),
        ("estimated peak", size(memory.total)),
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)
    if memory.note:
        console.print(Text(f"({memory.note})", style="dim"))


def _abridged(modules: list[str]) -> str:
    return modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}"
