"""Text with agreement over a distance: a bracket is closed by its own kind, more than a segment later."""

import torch
from torch import Tensor

LETTERS, OPEN, CLOSE, KINDS = 8, 8, 9, 2
VOCABULARY = LETTERS + 2 + KINDS


def bracket_text(rows: int, length: int, seed: int | torch.Generator, near: int = 33, far: int = 60) -> Tensor:
    """ids (rows, length): letters that follow one another by chance, and `< kind ... > kind` from near to far apart.

    Kinds are even chances where they open and certain where they close; where brackets close cannot be known.
    """
    make = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=make))  # noqa: E731
    ids = torch.empty(rows, length, dtype=torch.long)
    steps = torch.where(torch.rand(rows, length, generator=make) < 0.9, 1, 3)
    ids[:] = (torch.randint(LETTERS, (rows, 1), generator=make) + steps.cumsum(1)) % LETTERS
    for row in ids:
        at = draw(8)
        while (end := at + near + draw(far - near + 1)) + 1 < length:
            kind = LETTERS + 2 + draw(KINDS)
            row[at], row[at + 1], row[end], row[end + 1] = OPEN, kind, CLOSE, kind
            at = end + 2 + draw(4)
    return ids
