"""Builds the command from one module per verb and turns errors that users cause into one sentence."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import Annotated

import typer

from deltatune.version import __version__

#: the verbs in the order of `--help`; each is a module of this package with a `register` function
VERBS = ("train", "eval", "generate", "chat", "merge", "inspect", "recipes", "env")
DEBUG = "--debug"


def build_app() -> typer.Typer:
    """The whole command."""
    app = typer.Typer(
        name="deltatune",
        help="Fine-tune transformers with small adapters: train, measure, talk to, merge.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Start with: deltatune train quickstart",
    )
    app.callback()(_options)
    for name in VERBS:
        importlib.import_module(f"deltatune.cli.{name}").register(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deltatune {__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of errors; works anywhere on the line.")
    ] = False,
) -> None:
    """Options of the command itself."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = DEBUG in given
    try:
        with warnings.catch_warnings():
            if not debug:
                _quiet_warnings()
            build_app()(args=[argument for argument in given if argument != DEBUG])
    except Exception as error:
        sentence = None if debug else explain(error)
        if sentence is None:
            raise
        _complain(sentence)
        sys.exit(1)


def explain(error: Exception) -> str | None:
    """One sentence for an error that a user can cause and mend; None for a defect of ours.

    The last kind keeps its traceback, which is what a bug report needs.
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            "out of memory: lower train.batch_size (and raise train.gradient_accumulation), shorten "
            "data.max_length, or set train.gradient_checkpointing=true"
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = {"bitsandbytes": "quant"}.get(error.name.split(".")[0], "train")
        return f'{error.name} is not installed: pip install "deltatune[{extra}]"'
    if isinstance(error, (ValueError, OSError, ImportError)) and not isinstance(error, UnicodeError):
        return text or kind
    return None


def _quiet_warnings() -> None:
    """Warnings for people in one line; those for programmers are shown with --debug only."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        sys.stderr.write(f"Note: {' '.join(str(message).split())}\n")

    warnings.showwarning = show
    # On CPUs with bfloat16 it tells everyone who imports it of an optional kernel package.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _complain(sentence: str) -> None:
    from rich.console import Console
    from rich.text import Text

    # soft_wrap: a sentence that is piped or pasted keeps its paths in one piece.
    Console(stderr=True, highlight=False).print(Text(f"Error: {sentence}", style="red"), soft_wrap=True)
