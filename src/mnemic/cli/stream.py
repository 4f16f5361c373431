"""`mnemic stream`: read text of any length, ask, save, resume."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

BLOCK = 1 << 16
LIMIT = 1 << 20
HELP = "A line is asked. /save FILE  /load FILE  /reset  /stats  /quit"


def stream(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Saved by mnemic; lm2-babilong; or any host, with --memory.")
    ],
    memory: Annotated[str | None, typer.Option(metavar="NAME", help="Attach this memory to the host MODEL.")] = None,
    segment: Annotated[int | None, typer.Option(metavar="N", min=1, help="With --memory: tokens of a segment.")] = None,
    load: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from a saved stream.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the stream at the end.")] = None,
    feed: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Read a text file first; repeatable.")] = None,
    ask: Annotated[str | None, typer.Option(metavar="TEXT", help="Print how this text goes on, and end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 64,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Tokenizer, if MODEL has none.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Feed a model text of any length at constant memory, ask it, and keep what it remembers in a file.

    In order: --load, --feed, text on stdin (when it is no terminal), --ask, --save. On a terminal without --ask a
    prompt opens: each line is read and answered; /save FILE, /load FILE, /reset, /stats, /quit. Answers go to
    stdout, everything else to stderr. Ctrl-C during an answer stops it; at the prompt it leaves without saving.

    \b
    Examples:
      cat book.txt | mnemic stream runs/lm2 --save book.mnemic
      mnemic stream lm2-babilong --feed story.txt --ask "Where is Mary? "
      mnemic stream runs/lm2 --load book.mnemic --ask "Where is Mary?" < /dev/null
      mnemic stream runs/lm2 --feed a.txt --feed b.txt
      mnemic stream path/to/host --memory lm2 --segment 512

    \b
    Reads:   MODEL, --load, --feed, stdin. Long text is cut at line ends into pieces of 64 KiB.
    Writes:  --save and /save: one safetensors file with state and open segment, atomically; it fits this model only.
    """
    import torch

    from ..core.errors import InputError
    from ._shared import quiet

    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    for path in (load, *(feed or ())):
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is no file.")
    if save is not None and not save.parent.is_dir():
        raise InputError(f"{save.parent} does not exist; --save names a file in a folder that does.")
    attached = open_model(model, memory, segment)
    words = tokenizer_for(model, attached, tokenizer)
    running = attached.stream(tokenizer=words, load=load)
    for path in feed or ():
        with open(path, encoding="utf-8") as file:
            _feed(running, file, str(path))
    fed, terminal = bool(feed), _terminal()
    if not terminal:
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # pyright: ignore[reportAttributeAccessIssue]
        fed = _feed(running, sys.stdin, "stdin") or fed
    if terminal and ask is None:
        running = _prompt(running, max_new_tokens)
    elif ask is not None:
        _answer(running, ask, max_new_tokens)
    elif not fed:
        raise InputError("Nothing to do: give text on stdin, --feed FILE or --ask TEXT.")
    if save is not None:
        running.save(save)
        typer.echo(f"saved {save}", err=True)
    typer.echo(_stats(running), err=True)


def _terminal() -> bool:
    return sys.stdin.isatty()


def pieces(file: TextIO) -> Iterator[str]:
    """The text of a file in pieces, cut behind a line end, else before a space, so that words stay whole."""
    kept = ""
    while block := file.read(BLOCK):
        kept += block
        if len(kept) < BLOCK:
            continue
        at = kept.rfind("\n") + 1 or max(kept.rfind(" "), 0)
        if not at and len(kept) >= LIMIT:
            at = len(kept)
        if at:
            yield kept[:at]
            kept = kept[at:]
    if kept:
        yield kept


def open_model(model: str, memory: str | None, segment: int | None) -> Any:
    import mnemic

    from ..benchmarks.shipped import is_shipped, open_shipped
    from ..benchmarks.trained import check_folder
    from ..core.errors import ConfigError
    from ..hosts.saving import ADAPTER, HEADER
    from ._shared import host_config, placed

    saved = is_shipped(model) or any((Path(model) / name).is_file() for name in (ADAPTER, HEADER))
    if memory is None:
        if segment is not None:
            raise ConfigError("--segment goes with --memory; a saved model keeps its own.")
        if not is_shipped(model):
            check_folder(Path(model))
        attached = open_shipped(model).model if is_shipped(model) else mnemic.load(model)
    elif saved:
        raise ConfigError(f"{model} has a memory already; leave --memory out.")
    else:
        if not Path(model).is_dir():
            host_config(model)
        attached = mnemic.attach(model, memory, segment=segment)
    return placed(attached)


def tokenizer_for(model: str, attached: Any, given: str | None) -> Any:
    from ..benchmarks.shipped import MODELS, is_shipped
    from ..hosts import base_model
    from ..training.tokenizer import find_tokenizer

    if given is not None:
        return find_tokenizer(given)
    place = MODELS / model if is_shipped(model) else model
    return find_tokenizer(place, getattr(base_model(attached).config, "_name_or_path", None))


def _feed(running: Any, file: TextIO, name: str) -> bool:
    """Read a file to its end; whether there was anything in it."""
    from ..core.errors import InputError

    parts = pieces(file)
    try:
        first = next((part for part in parts if part.strip()), None)
        if first is None:
            return False
        running.feed(_joined(first, parts), progress=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    return True


def _joined(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    # A piece of white space may be no token at all, which a stream refuses.
    yield from (part for part in rest if part.strip())


def _answer(running: Any, text: str | None, max_new_tokens: int) -> None:
    """Print the continuation as it comes."""
    words = running.tokenizer
    end = words.eos_token_id
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": end}
    answer = running.iterate(text, pad_token_id=end if words.pad_token_id is None else words.pad_token_id, **options)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def _prompt(running: Any, max_new_tokens: int) -> Any:
    """The prompt, until /quit or the end of input; returns the stream, which /load may have replaced."""
    from ..core.errors import MnemicError

    typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo("", err=True)
            return running
        if line == "/quit":
            return running
        try:
            if line.startswith("/"):
                running = _command(running, line)
            elif line:
                _answer(running, line, max_new_tokens)
        except MnemicError as error:
            typer.echo(f"mnemic: {error}", err=True)
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)


def _command(running: Any, line: str) -> Any:
    from ..core.errors import InputError

    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load") and not argument:
        raise InputError(f"{name} needs a file.")
    if name == "/save":
        running.save(argument)
    elif name == "/load":
        running = running.model.stream(tokenizer=running.tokenizer, load=argument)
    elif name == "/reset":
        running.reset()
    elif name != "/stats":
        raise InputError(f"There is no {name}. {HELP}")
    typer.echo(_stats(running), err=True)
    return running


def _stats(running: Any) -> str:
    return (
        f"{running.tokens_seen:,} tokens read, {running.state_bytes:,} bytes carried, "
        f"of them {running.state.nbytes:,} of state"
    )
