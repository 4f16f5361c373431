"""`mnemic new`: the files of a new system, ready to be changed."""

from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the system, such as gated-deltanet.")],
    family: Annotated[
        str, typer.Option("--family", metavar="FAMILY", help="Folder under memories/; found for systems with a card.")
    ] = "",
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Checkout of mnemic.")] = Path("."),
) -> None:
    """Write a new memory and its test, as a small example that works.

    The registry finds the file by its place, and the contract tests, the command line, saving, training and the table
    of systems follow. Change the example step by step; its tests tell when it stops holding a rule.

    \b
    Examples:
      mnemic new hopfield --family recurrent
      mnemic new landmark-attention

    \b
    Writes:  src/mnemic/memories/FAMILY/NAME.py
             tests/memories/test_NAME.py
             tests/contract/variants/NAME.py
    """
    from ..core.catalogue import catalogue
    from ..core.errors import ConfigError, InputError
    from ..core.registry import memory_names

    module = name.replace("-", "_")
    if not module.isidentifier() or name != name.lower() or "_" in name:
        raise ConfigError(f"NAME = {name!r}, expected lower-case words joined by '-', such as 'gated-deltanet'.")
    if name in memory_names():
        raise ConfigError(f"There is a memory {name!r} already; mnemic show {name} explains it.")
    known = catalogue().get(name)
    family = family or (known.family if known else "")
    if not family.isidentifier():
        families = ", ".join(sorted({entry.family for entry in catalogue().values()}))
        raise ConfigError(f"--family = {family!r}; give the folder that the system belongs to, one of: {families}.")
    if not (root / "src/mnemic/memories").is_dir():
        raise InputError(f"{root.resolve()} is no checkout of mnemic (no src/mnemic/memories); give --root.")
    title = known.title if known else f"The title of the paper of {name}"
    cited = f" ({known.year}, arXiv {known.arxiv})" if known and known.arxiv else ""
    words = {
        "name": name,
        "title": "".join(word.capitalize() for word in name.split("-")),
        "system": known.system if known else name,
        "cited": cited,
        "paper": f"{title}{cited}".replace('"', "'"),
    }
    templates = Path(__file__).parent / "templates"
    files = {
        f"src/mnemic/memories/{family}/{module}.py": (templates / "system.py.txt").read_text("utf-8").format(**words),
        f"tests/memories/test_{module}.py": (templates / "test.py.txt").read_text("utf-8").format(**words),
        f"tests/contract/variants/{module}.py": f'"""{words["system"]}: settings that change how it runs."""\n\n'
        f'VARIANTS = {{"{module}": {{}}}}\n',
    }
    for path in files:
        if (root / path).exists():
            raise InputError(f"{root / path} exists; remove it or choose another name.")
    package = root / f"src/mnemic/memories/{family}/__init__.py"
    if not package.exists():
        files[f"src/mnemic/memories/{family}/__init__.py"] = f'"""Memories of the family "{family}"."""\n'
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
        typer.echo(f"wrote {root / path}")
    typer.echo(f"next: .venv/bin/pytest -k '{module}' tests/memories tests/contract", err=True)
