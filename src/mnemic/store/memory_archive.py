"""Archive: memories that were written at some point of a text, found again by their likeness to a question's memory.

An entry is a memory (m, d), the level it was written at ("document", "paragraph", "entity") and the tokens of the text
it stands for. Likeness is the cosine between the means of two memories over their m vectors.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import FileFormatError, InputError
from ..core.files import read_file, write_file


@dataclass(frozen=True, eq=False)
class Entry:
    """memory: (m, d) float32 or float64, on the CPU. level: as it was added. span: first token of the text it stands
    for, and the one behind the last."""

    memory: Tensor
    level: str
    span: tuple[int, int]


class MemoryArchive:
    """Entries in the order in which they were added.

    owner: what identifies the model whose memories these are, kept in the file; see `hosts.saving.describe`.
    """

    def __init__(self, owner: Mapping[str, Any] | None = None):
        self.owner = dict(owner or {})
        self.entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        return sum(e.memory.numel() * e.memory.element_size() for e in self.entries)

    def add(self, memory: Tensor, level: str, span: tuple[int, int]) -> Entry:
        """Keep a copy of `memory` (m, d).

        Raises:
            InputError: a memory of another shape or dtype than those that are kept, or a span without tokens.
        """
        kept = memory.detach().to("cpu", copy=True)
        like = self.entries[0].memory if self.entries else kept
        if kept.dim() != 2 or kept.shape != like.shape or kept.dtype != like.dtype:
            expected = f"{tuple(like.shape)} of {like.dtype}" if self.entries else "(m, d)"
            raise InputError(f"A memory of shape {tuple(kept.shape)} and {kept.dtype}, expected {expected}.")
        first, behind = span
        if not 0 <= first < behind:
            raise InputError(f"span = {span}, expected the first token and the one behind the last.")
        self.entries.append(Entry(kept, level, (int(first), int(behind))))
        return self.entries[-1]

    def find(self, memory: Tensor, level: str | None = None, count: int = 1) -> list[tuple[float, Entry]]:
        """The `count` entries of `level` (None: of any) most like `memory` (m, d), best first, each with its cosine.

        Raises:
            InputError: no entry of that level, or a memory of another shape.
        """
        among = [e for e in self.entries if level in (None, e.level)]
        if not among:
            known = ", ".join(sorted({e.level for e in self.entries})) or "none"
            raise InputError(f"The archive has no memory of the level {level!r}; it has {known}.")
        if memory.shape != among[0].memory.shape:
            raise InputError(
                f"A memory of shape {tuple(memory.shape)}, the archive's are {tuple(among[0].memory.shape)}."
            )
        means = torch.stack([e.memory.mean(0) for e in among])
        scores = F.cosine_similarity(means, memory.detach().to(means.device, means.dtype).mean(0), dim=-1)
        best = scores.topk(min(count, len(among)))
        return [(s, among[i]) for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def save(self, path: str | os.PathLike) -> None:
        """Write all entries to one file, atomically; see `core.files`.

        Raises:
            InputError: there is nothing to write, or the file cannot be written.
        """
        if not self.entries:
            raise InputError("This archive is empty; there is nothing to save.")
        header = {
            "owner": self.owner,
            "levels": [e.level for e in self.entries],
            "spans": [list(e.span) for e in self.entries],
        }
        write_file(path, "archive", header, {"memories": torch.stack([e.memory for e in self.entries])})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MemoryArchive":
        """Raises `FileFormatError` where the file is damaged, foreign or too new."""
        header, tensors = read_file(path, "archive")
        try:
            archive = cls(header["owner"])
            rows = zip(tensors["memories"].unbind(), header["levels"], header["spans"], strict=True)
            for memory, level, (first, behind) in rows:
                archive.add(memory, level, (first, behind))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"The archive {path} is incomplete ({error!r}); restore it from a copy.") from error
        return archive
