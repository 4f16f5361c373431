"""Pages that need nothing but themselves: one frame and one style for all."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def rendered(folder: Path, **values: Any) -> str:
    """`page.html` of the folder, which extends `frame.html`, as HTML; values are escaped unless they are marked."""
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**values) + "\n"
