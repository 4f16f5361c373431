"""`mnemic demo`: what a memory does, on a small model."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for what the demo trains and draws.")] = Path("mnemic-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Train less: seconds instead of minutes.")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
) -> None:
    """Show what a memory does: a small model with and without one, trained and asked on this machine.

    \b
    Examples:
      mnemic demo
      mnemic demo --quick /tmp/demo

    \b
    Reads:   nothing; needs no network and no GPU.
    Writes:  FOLDER, run folders as of mnemic train.
    """
    from ..benchmarks import demo as shown
    from ._shared import quiet

    quiet()
    shown.run(folder, quick=quick, threads=threads)
