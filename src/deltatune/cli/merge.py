"""`deltatune merge`: fold an adapter into its base and write a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.cli import common
from deltatune.cli.common import DeviceOption, Dtype, JsonFlag, ModelOption

if TYPE_CHECKING:
    from deltatune.train.merging import Merged


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "merge",
        epilog=common.examples(
            "deltatune merge runs/quickstart merged/",
            "deltatune merge runs/quickstart merged/ --dtype bfloat16 --prompt 'Message: hi\\nLabel:'",
            "deltatune merge runs/quickstart merged/ --overwrite --json",
            "deltatune merge runs/qlora merged-4bit/ --into same",
        ),
    )(merge_command)


def merge_command(
    target: Annotated[str, typer.Argument(help="A run or an adapter.")],
    output: Annotated[Path, typer.Argument(help="Directory for the merged model.")],
    model: ModelOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the written weights; auto: that of the base.")] = Dtype.auto,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Load what was written and compare it with the live adapter."),
    ] = True,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text to compare on; repeat it.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in the output.")] = False,
    into: Annotated[
        str,
        typer.Option(help="dense: ordinary weights, a quantised base's unpacked; same: the base's own few bits."),
    ] = "dense",
    rounding: Annotated[
        str | None,
        typer.Option(help="With --into same: dithered or nearest; default: as it was trained, else dithered."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Storage of the base in training, if the adapter's run does not say it.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Merge from disk to disk, tensor by tensor; default: if the base is over half of the memory.",
        ),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest size of one file; default: 5GB.")] = None,
    device: DeviceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write base and adapter as one model that needs no adapter library.

    The update is added in fp32 and rounded once. Nothing is written unless it fits the disk and, with
    --verify, keeps what the adapter does (a merge from disk to disk is not compared).
    """
    from deltatune.train.loading import find_target
    from deltatune.train.merging import PROMPTS, merge
    from deltatune.train.streaming import merge_stream, too_large

    if prompt and not verify:
        raise ValueError("--prompt is for the comparison that --no-verify leaves out")
    where = find_target(target, model)
    console = common.err()
    if rounding is not None and into != "same":
        raise ValueError(f"--rounding {rounding} goes with --into same, since ordinary weights keep every change")
    if into == "same" and stream:
        raise ValueError("--stream writes ordinary weights, so --into same does not go with it")
    given = {"--prompt": prompt, "--max-shard-size": max_shard_size, "--device": device}
    if stream or (stream is None and into == "dense" and too_large(where)):
        unused = [option for option, value in given.items() if value]
        if unused:
            raise ValueError(
                f"{unused[0]} is for a merge in memory; from disk to disk the base's files keep their sizes and "
                "nothing is compared: leave it out, or merge with --no-stream"
            )
        with console.status("merging from disk to disk"):
            written = merge_stream(where, output, dtype=dtype.value, overwrite=overwrite, quantization=quantization)
        _show(written, as_json)
        return
    with console.status("merging"):
        done = merge(
            where,
            output,
            dtype=dtype.value,
            overwrite=overwrite,
            prompts=(prompt or PROMPTS) if verify else None,
            max_shard_size=max_shard_size or "5GB",
            device=device,
            quantization=quantization,
            into=into,
            rounding=rounding,
        )
    _show(done, as_json)


def _show(done: Merged, as_json: bool) -> None:
    if as_json:
        common.print_json(done.as_dict())
    else:
        _print(done)


def _print(done: Merged) -> None:
    rows = [["base", done.base], ["adapter", str(done.adapter)], ["type", done.dtype]]
    rows.append(["size", common.size(done.bytes)])
    gap = done.difference
    if gap is not None:
        rows += [
            ["largest logit difference", common.number(gap.max)],
            ["mean logit difference", common.number(gap.mean)],
            ["what the adapter changes (mean)", common.number(gap.adapter_effect)],
            ["same next token", f"{gap.same_next_token:.1%} of positions, {gap.prompts} prompts"],
        ]
    console = common.out()
    console.print(common.facts(rows))
    console.print(f"merged model written to {done.output}", markup=False)
    console.print(f"try: deltatune chat {done.output}", style="dim", markup=False)
