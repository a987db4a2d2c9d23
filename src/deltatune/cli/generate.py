"""`deltatune generate`: the answer to one prompt, or to many, streamed or as JSON."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import DeviceOption, Dtype, DtypeOption, JsonFlag, ModelOption, QuantOption

if TYPE_CHECKING:
    from deltatune.train.generation import Reply, Sampling
    from deltatune.train.loading import Loaded, Target, Variant


class Style(str, Enum):
    """How the words of the user become the prompt of the model."""

    auto = "auto"
    raw = "raw"
    chat = "chat"
    template = "template"


TokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length limit of an answer.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
TopKOption = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: no limit.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 makes repeated tokens less likely.")]
SeedOption = Annotated[int | None, typer.Option(help="Same seed, same sampled answer.")]
SystemOption = Annotated[str | None, typer.Option(help="System message of the chat template.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "generate",
        epilog=common.examples(
            'deltatune generate runs/quickstart "You won a prize! Call now"',
            'deltatune generate runs/quickstart --compare "See you at six?"',
            'deltatune generate smollm2-135m-instruct "Name three rivers." -n 60 --temperature 0.7 --seed 1',
            "cat letter.txt | deltatune generate runs/mine --style raw",
            "deltatune generate runs/mine --file prompts.txt --lines --json",
        ),
    )(generate_command)


def generate_command(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a model (directory, hub id, name).")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it, read --file or standard input.")] = None,
    model: ModelOption = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", exists=True, dir_okay=False, help="Read the prompt here.")
    ] = None,
    lines: Annotated[bool, typer.Option(help="Every line of the file or of stdin is a prompt.")] = False,
    style: Annotated[
        Style,
        typer.Option(
            help="raw: the words as they are; chat: the model's chat template; template: that of the run's "
            "recipe; auto: as the run was trained, else chat where the model has a chat template."
        ),
    ] = Style.auto,
    system: SystemOption = None,
    compare: Annotated[bool, typer.Option(help="Answer twice: without and with the adapter.")] = False,
    base_only: Annotated[bool, typer.Option("--base", help="Answer without the adapter.")] = False,
    max_new_tokens: TokensOption = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy: always the likeliest token.")] = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once, with --lines.")] = 16,
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantOption = None,
    device: DeviceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer a prompt from the command line, a file or standard input."""
    from deltatune.train.generation import Sampling
    from deltatune.train.loading import find_target, load

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    prompts = read_prompts(prompt, file, lines)
    where = find_target(target, model)
    forms = _forms(where, compare, base_only)
    loaded = load(where, dtype=dtype.value, quantization=quantization, device=device)
    common.note_unpacked(loaded)
    frame = PromptFrame.of(loaded, style, system)
    common.note(frame.said)
    tokens = [frame.tokens(text) for text in prompts]
    if as_json or lines:
        records = _answer_all(loaded, prompts, tokens, forms, sampling, batch_size)
        _print_records(records, forms, as_json)
    else:
        for form in forms:
            _stream_one(loaded, tokens[0], form, sampling, titled=len(forms) > 1)


def read_prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    """The prompts, from the one place given.

    Raises:
        ValueError: no prompt, an empty one, or two places at once.
    """
    if prompt is not None and (file is not None or lines):
        raise ValueError("a prompt on the command line excludes --file and --lines")
    if prompt is not None:
        text, place = prompt, "the prompt"
    elif file is not None:
        text, place = file.read_text(encoding="utf-8"), str(file)
    elif sys.stdin.isatty():
        raise ValueError("no prompt: give it as an argument, with --file, or on standard input")
    else:
        text, place = sys.stdin.read(), "standard input"
    prompts = [line for line in text.splitlines() if line.strip()] if lines else [text]
    if not prompts or not prompts[0].strip():
        raise ValueError(f"{place} is empty: there is nothing to answer")
    return prompts


def _forms(target: Target, compare: bool, base_only: bool) -> list[Variant]:
    if target.adapter is None and (compare or base_only):
        raise ValueError(f"{target.name} has no adapter to leave out; --compare and --base need one")
    if compare and base_only:
        raise ValueError("--compare and --base exclude each other")
    if compare:
        return ["base", "adapter"]
    return ["base"] if base_only else ["adapter"]


class PromptFrame:
    """Turns the user's words into prompt tokens, as the run's training data did where that is known.

    Attributes:
        said: one sentence for the user about what is done.
    """

    def __init__(self, tokenizer: Any, style: Style, said: str, **parts: str | None) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.said = said
        self.template = parts.get("template")
        self.system = parts.get("system")

    @classmethod
    def of(cls, loaded: Loaded, style: Style, system: str | None) -> PromptFrame:
        """Choose the frame for a loaded target.

        Raises:
            ValueError: the style asked for needs a template that is not there, or ignores `system`.
        """
        data = run_data(loaded.target)
        template, chat = data.get("template"), bool(getattr(loaded.tokenizer, "chat_template", None))
        as_chat = bool(data.get("as_chat")) or data.get("format") == "messages"
        if style is Style.auto:
            style = _auto(template, as_chat, chat, known=bool(data))
        if style is Style.chat and not chat:
            raise ValueError(f"{loaded.target.name} has no chat template; use --style raw")
        if style is Style.template and not template:
            raise ValueError(f"{loaded.target.name} has no recipe with a prompt template; use --style raw or chat")
        if system is not None and style is not Style.chat:
            raise ValueError("--system needs the chat template: add --style chat")
        said = {
            Style.raw: "the prompt is given to the model as it is",
            Style.chat: "the prompt is put into the model's chat template (--style raw: as it is)",
            Style.template: f"the prompt is put into the run's template {template!r} (--style raw: as it is)",
        }[style]
        system = system or (data.get("system") if style is Style.chat else None)
        return cls(loaded.tokenizer, style, said, template=template, system=system)

    def tokens(self, text: str) -> list[int]:
        """Ids of the whole prompt."""
        if self.style is Style.chat:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return chat_tokens(self.tokenizer, [*system, {"role": "user", "content": text}])
        if self.style is Style.template:
            text = fill(str(self.template), text)
        return list(self.tokenizer(text)["input_ids"])


def _auto(template: str | None, as_chat: bool, has_chat: bool, known: bool) -> Style:
    if template and not as_chat:
        return Style.template
    return Style.chat if has_chat and (as_chat or not known) else Style.raw


def chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation up to where the assistant is to speak."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def fill(template: str, text: str) -> str:
    """The template with the user's words in its one field.

    Raises:
        ValueError: the template has several fields.
    """
    from deltatune.train.data_spec import template_fields

    fields = list(dict.fromkeys(template_fields(template)))
    if len(fields) > 1:
        raise ValueError(
            f"the run's template {template!r} has {len(fields)} fields ({', '.join(fields)}); "
            "write the whole prompt yourself and add --style raw"
        )
    return template.format(**{fields[0]: text})


def run_data(target: Target) -> dict[str, Any]:
    """The data section of the run's recipe, with the template that the run made if it names none; else empty."""
    from deltatune.train.loading import read_recipe
    from deltatune.train.rundir import recorded_template

    if target.recipe is None:
        return {}
    data = dict(read_recipe(target.recipe).get("data") or {})
    template = data.get("template") or recorded_template(target.recipe.parent)
    return {**data, "template": template} if template else data


def _answer_all(
    loaded: Loaded,
    prompts: list[str],
    tokens: list[list[int]],
    forms: list[Variant],
    sampling: Sampling,
    batch_size: int,
) -> list[dict[str, Any]]:
    """One record for each prompt, with the answers of every form."""
    from rich.progress import track

    from deltatune.train.generation import generate_batch

    answers: dict[str, list[Reply]] = {form: [] for form in forms}
    jobs = [(form, i) for form in forms for i in range(0, len(tokens), batch_size)]
    console = common.err()
    for form, i in track(
        jobs, "answers", console=console, transient=True, disable=not console.is_terminal or len(jobs) < 2
    ):
        with _as(loaded, form):
            chunk = tokens[i : i + batch_size]
            answers[form] += generate_batch(loaded.model, loaded.tokenizer, chunk, sampling)
    return [
        {
            "prompt": prompt,
            "prompt_tokens": len(tokens[i]),
            "answers": {form: _record(answers[form][i]) for form in forms},
        }
        for i, prompt in enumerate(prompts)
    ]


def _record(reply: Reply) -> dict[str, Any]:
    return {"text": reply.text.strip(), "tokens": reply.tokens, "finished": reply.finished}


def _print_records(records: list[dict[str, Any]], forms: list[Variant], as_json: bool) -> None:
    if as_json:
        common.print_json(records)
        return
    for record in records:
        for form in forms:
            text = record["answers"][form]["text"].replace("\n", "\\n")
            print(f"{form}\t{text}" if len(forms) > 1 else text)


def _stream_one(loaded: Loaded, tokens: list[int], form: Variant, sampling: Sampling, *, titled: bool) -> None:
    from deltatune.train.generation import stream

    if titled:
        common.out().rule(form, align="left")
    with _as(loaded, form):
        reply = stream(loaded.model, loaded.tokenizer, tokens, sampling, common.write_now)
    sys.stdout.write("\n")
    sys.stdout.flush()
    common.note(speed(reply))


def speed(reply: Reply) -> str:
    """Length, rate and end of an answer, for people."""
    why = {"stop": "", "length": ", cut at --max-new-tokens", "interrupted": ", interrupted"}[reply.finished]
    rate = reply.tokens / reply.seconds if reply.seconds > 0 else 0.0
    tokens = "1 token" if reply.tokens == 1 else f"{reply.tokens} tokens"
    empty = "" if reply.text.strip() else "no words: the model ended its answer at once; "
    return f"{empty}{tokens}, {rate:.1f} per second{why}"


def _as(loaded: Loaded, form: Variant) -> Any:
    from contextlib import nullcontext

    from deltatune.train.loading import variant

    return variant(loaded.model, form) if loaded.target.adapter is not None else nullcontext()
