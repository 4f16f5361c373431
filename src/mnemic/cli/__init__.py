"""The command line: one file a command.

Command files import torch and transformers inside their functions, so that help comes at once.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mnemic

from . import chat, compare, demo, evaluate, inspect, new, prepare, reproduce, serve, show, stream, systems, train


class _Commands(TyperGroup):
    """Errors that mnemic raises on purpose, and files that cannot be used, are one line on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not _expected(error):
                raise
            typer.echo(f"mnemic: {_message(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mnemic {mnemic.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Give any Transformer a memory: look, train, measure, stream, serve.

    \b
    First steps:
      mnemic demo                                       what a memory does, on a small model
      mnemic systems                                    all memories
      mnemic show lm2                                   one of them: paper, options, size
      mnemic train --memory lm2 --task recall --output runs/recall
      mnemic eval runs/recall                           accuracy, with intervals
      mnemic inspect runs/recall                        what its memory holds, reads and writes
      mnemic compare CONFIG.toml --output DIR           several memories alike, and a leaderboard
      mnemic stream runs/recall --ask "? Mary"          talk to a model that remembers
      mnemic serve runs/recall                          the same for many, over HTTP

    `mnemic COMMAND --help` has examples and says which files are read and written.
    """


app.command("systems", short_help="List all memories.")(systems.systems)
app.command("show", short_help="Explain one memory.")(show.show)
app.command("prepare", short_help="Tokenise texts once, for training.")(prepare.prepare)
app.command("train", short_help="Train a host with a memory.")(train.train)
app.command("eval", short_help="Measure a trained model.")(evaluate.evaluate)
app.command("inspect", short_help="Look inside a trained model.")(inspect.inspect)
app.command("compare", short_help="Train and measure several memories alike.")(compare.compare)
app.command("reproduce", short_help="Make a paper's tables again.")(reproduce.reproduce)
app.command("stream", short_help="Read, ask, save, resume.")(stream.stream)
app.command("serve", short_help="Serve sessions over HTTP.")(serve.serve)
app.command("chat", short_help="Talk to a session of a server.")(chat.chat)
app.command("new", short_help="Begin a new memory.")(new.new)
app.command("demo", short_help="See what a memory does.")(demo.demo)


def main() -> None:
    """The entry point `mnemic`."""
    app(prog_name="mnemic")


def _expected(error: Exception) -> bool:
    # Not imported here: errors that mnemic raised have loaded the module, and it would load torch.
    errors = sys.modules.get("mnemic.core.errors")
    return (errors is not None and isinstance(error, errors.MnemicError)) or (
        isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
    )


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
