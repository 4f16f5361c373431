"""`mnemic inspect`: what a model's memory holds, reads and writes, on one page."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

TOKENS = 1024
"""Read for the reports over many tokens: samples until there are so many."""


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Written by mnemic train or mnemic.save; or lm2-babilong.", show_default=False
        ),
    ],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to read; its last 8 tokens are the answer.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Task whose samples are read; by default what was trained.")
    ] = None,
    length: Annotated[
        str | None, typer.Option(metavar="L", help="Length of the sample, in the task's unit; by default its second.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=1, help="Seed of the sample.")] = 1,
    reports: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Reports, such as slots,gates; by default all that apply.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Samples of each point of the capacity curve.")] = 64,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with data sets; by default the run's, or $MNEMIC_DATA.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the figures as PNG files too.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="[RUN/inspect.html]")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the reports that apply to the model, and exit.")] = False,
) -> None:
    """Look inside a trained model: slots, reads before and after updates, gates, importance, capacity.

    Which reports apply follows from what the memory declares; the page names those that do not, and why. Asking for one
    of them with --reports is an error.

    \b
    Examples:
      mnemic inspect lm2-babilong -o lm2.html
      mnemic inspect runs/lm2
      mnemic inspect runs/lm2 --task qa1 --length 1k --figures figures -o lm2.html
      mnemic inspect runs/lm2 --text story.txt --reports slots,read_maps
      mnemic inspect runs/rmt --list

    \b
    Reads:   RUN (model, tokenizer, experiment.toml); FILE; DIR, if given: the data sets.
    Writes:  FILE (one HTML page that needs nothing else); DIR/*.png.
    """
    from ..analysis import inspect as look_inside
    from ..analysis.drawing import check_plots, save_drawings
    from ..analysis.page import drawings, inspection_page
    from ..analysis.reports import applying, require
    from ..benchmarks.facts import fact_curve
    from ..benchmarks.shipped import open_trained
    from ..core.errors import InputError
    from ..core.files import replace_atomically
    from ..hosts import base_model
    from ._shared import check_output, quiet, words

    quiet()
    if text is not None and (task is not None or length is not None):
        raise InputError("Give a text or a task, not both.")
    check_plots()
    if not listed:
        check_output(folder, output)
    trained = open_trained(folder)
    memory = base_model(trained.model).memory
    if listed:
        return _list(memory)
    asked = None if reports is None else words(reports, "--reports")
    for name in asked or ():
        require(memory, name)
    prompt, answer, more, source = _read(trained, text, task, length, seed, data)
    capacity = fact_curve(trained, samples=samples) if "capacity" in (asked or applying(memory)) else []
    found = look_inside(
        trained.model, prompt, answer, _text(trained.tokenizer), more=more, reports=asked, capacity=capacity
    )
    page = inspection_page(found, f"Inside {folder.resolve().name}", _facts(trained, source))
    place = folder / "inspect.html" if output is None else output
    place.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(place, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    written = [place, *(save_drawings(drawings(found), figures) if figures is not None else [])]
    for name, reason in found.missing.items():
        typer.echo(f"Not shown: {name}: {reason}.", err=True)
    typer.echo(f"Written: {', '.join(str(path) for path in written)}", err=True)


def _read(
    trained: Any, text: Path | None, task: str | None, length: str | None, seed: int, data: str | None
) -> tuple[list[int], list[int], list[list[int]], str]:
    """Ids of the prompt, of the answer and of other texts, and what they are."""
    from ..benchmarks.catalog import entry
    from ..benchmarks.first_samples import LAST, first_samples
    from ..core.errors import ConfigError, InputError

    if text is not None:
        content = text.read_text(encoding="utf-8")
        try:
            ids = trained.tokenizer(content)["input_ids"]
        # The tokenizers library raises bare exceptions, for example on a word without a token.
        except Exception as error:
            raise InputError(f"The model's tokenizer cannot read {text}: {error}") from error
        if len(ids) <= LAST:
            raise InputError(f"{text} has {len(ids)} tokens; expected more than {LAST}, which are the answer.")
        return ids[:-LAST], ids[-LAST:], [], f"{text.name}, {len(ids):,} tokens, the last {LAST} as answer"
    name = task if task is not None else next(iter(trained.tasks), None)
    if name is None:
        raise ConfigError(f"{trained.folder} does not say what it was trained on; give --text FILE or --task NAME.")
    known = entry(name).lengths
    size = known[min(1, len(known) - 1)] if length is None else length
    folder = data or (trained.experiment.data if trained.experiment is not None else None)
    (prompt, answer), *others = first_samples(trained, name, size, TOKENS, seed=seed, data=folder)
    source = f"{name} at length {size}, seed {seed}: the first sample, {len(prompt) + len(answer):,} tokens"
    source += f", and {len(others)} more for slots and explanations" if others else ""
    return prompt, answer, [[*one, *said] for one, said in others], source


def _text(tokenizer: Any) -> Callable[[int], str]:
    def text(i: int) -> str:
        said = tokenizer.decode([i])
        return said.strip() or repr(said)

    return text


def _facts(trained: Any, source: str) -> dict[str, str]:
    from .. import __version__
    from ..hosts import base_model, parameter_report

    base = base_model(trained.model)
    parameters = parameter_report(trained.model)
    return {
        "memory": base.memory.name,
        "host": base.mnemic.host_class.__name__,
        "parameters": f"{parameters['host']['total']:,} of the host, {parameters['memory']['total']:,} of the memory",
        "segment": f"{base.mnemic.layout.segment} tokens, a write every {base.mnemic.layout.every}",
        "read": source,
        "mnemic": __version__,
    }


def _list(memory: Any) -> None:
    from ..analysis import REPORTS, lacking
    from ._shared import console, table

    missing = lacking(memory)
    shown = table(f"Reports of {memory.name}", "report", "what it says", "applies")
    for name, what in REPORTS.items():
        shown.add_row(name, what, f"no: {missing[name]}" if name in missing else "yes")
    console().print(shown)
