"""`mnemic demo`: what a memory does, on a small model."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder to write.", show_default="mnemic-demo")
    ] = Path("mnemic-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that everything runs.")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
) -> None:
    """Ask the model that comes with mnemic; train a small one with and without a memory; save a stream and resume it.

    \b
    Examples:
      mnemic demo
      mnemic demo --quick /tmp/demo

    \b
    Reads:   nothing; needs no network and no GPU.
    Writes:  DIR: demo.json (scores), accuracy.png, alice.mnemic (a stream), and a run folder for each memory.
    """
    from ..benchmarks import demo as shown
    from ._shared import quiet

    quiet()
    shown.run(folder, quick=quick, threads=threads)
