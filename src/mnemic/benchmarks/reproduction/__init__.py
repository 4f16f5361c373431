"""A paper's tables and figures, made again at a scale that fits the machine. `mnemic reproduce` runs them."""

from .recipe import SCALES, SYSTEMS, recipe
from .tables import findings, markdown, write

__all__ = ["SCALES", "SYSTEMS", "findings", "markdown", "recipe", "write"]
