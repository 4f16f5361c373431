"""`mnemic prepare`: documents -> a folder of token shards."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


def prepare(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE...", help="Files, folders, patterns, or hf:OWNER/NAME.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", file_okay=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tokenizer: a folder, or the name of a model on the hub.")
    ] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(metavar="N", help="Or train one on the documents: byte-level BPE of N tokens.")
    ] = None,
    column: Annotated[str, typer.Option(metavar="NAME", help="Where the text is, in sources with columns.")] = "text",
    validation_fraction: Annotated[
        float, typer.Option(metavar="X", help="Share of the documents kept apart for mnemic eval.")
    ] = 0.0,
    on_error: Annotated[str, typer.Option(metavar="WHAT", help="At a bad row: stop, or skip it and count.")] = "stop",
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that tokenise.")] = 1,
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Check every file of a prepared folder, and do nothing else.")
    ] = None,
) -> None:
    """Tokenise documents once, into shards that training maps into memory.

    A .txt file is one document; in .jsonl, .jsonl.gz, .parquet and data sets of the Hugging Face hub
    (hf:OWNER/NAME[:CONFIG[:SPLIT]], streamed) every row is. Folders and patterns are read by name. Borders between
    documents are kept, each document ends with the tokenizer's end token.

    Interrupted? Run the same command again: finished shards are kept, and the folder comes out the same, byte for
    byte, with any number of workers.

    \b
    Examples:
      mnemic prepare texts/ --train-tokenizer 8000 --validation-fraction 0.05 --output data/texts
      mnemic prepare 'dumps/*.jsonl.gz' --column body --tokenizer gpt2 --workers 8 --output data/dumps
      mnemic prepare hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2 --tokenizer HuggingFaceTB/SmolLM-135M \\
          --output data/cosmopedia
      mnemic prepare --check data/texts

    \b
    Reads:   SOURCE...; the tokenizer.
    Writes:  DIR/manifest.json (counts, checksums), train-*.tokens and .index, validation-*, tokenizer/, prepare.json.
             `mnemic train --task text --data DIR` and `mnemic eval` read them.
    """
    from ..core.errors import ConfigError
    from ..training.prepare import Preparation
    from ..training.prepare import check as checked
    from ..training.prepare import prepare as run
    from ._shared import quiet

    quiet()
    if check is not None:
        if sources or output is not None:
            raise ConfigError("--check looks at one prepared folder; give no sources and no --output with it.")
        _summarise(checked(check), check, "intact")
        return
    if not sources or output is None:
        raise ConfigError("Give sources and --output DIR; mnemic prepare --help has examples.")
    preparation = Preparation(
        sources=tuple(sources),
        column=column,
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        validation_fraction=validation_fraction,
        on_error=on_error,
    )
    started = time.perf_counter()
    with _progress() as progress:
        manifest = run(preparation, output, workers=workers, progress=progress)
    _summarise(manifest, output, f"{time.perf_counter() - started:.1f} s")
    typer.echo(f"Next: mnemic train --task text --data {output} --output runs/{output.name}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], object]]:
    """A line with what is done so far; how much there is, a stream does not say."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("reading")
        yield lambda documents, tokens: shown.update(task, description=f"{documents:,} documents, {tokens:,} tokens")


def _summarise(manifest: dict[str, Any], folder: Path, what: str) -> None:
    from ._shared import console, table

    columns = ("documents", "tokens", "shards", "bytes")
    shown = table(f"{folder}: {what}", "split", *columns, right=columns)
    for split, shards in manifest["splits"].items():
        documents, tokens = (sum(shard[key] for shard in shards) for key in ("documents", "tokens"))
        size = sum((folder / f"{shard['name']}.{kind}").stat().st_size for shard in shards for kind in shard["sha256"])
        shown.add_row(split, f"{documents:,}", f"{tokens:,}", f"{len(shards):,}", f"{size:,}")
    console().print(shown)
    typer.echo(f"Tokenizer of {manifest['vocabulary']:,} tokens, stored as {manifest['dtype'].lstrip('<')}.")
    if manifest["skipped"]:
        typer.echo(f"{manifest['skipped']:,} bad rows were left out, the first: {manifest['first_skipped']}", err=True)
