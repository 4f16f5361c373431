"""A database of text chunks on disk: documents cut in chunks of m tokens, found by the L2 distance of a key.

The external knowledge of RETRO (arXiv 2112.04426). A folder holds three raw arrays and a header:

    keys.bin       (N, width) float32   what `embed` made of the chunk
    tokens.bin     (N, m) int32         the chunk; -1 after the end of a document
    documents.bin  (N,) int64           number of the document, in the order of the build
    header.json    sizes, fingerprints of tokenizer and embedder, SHA-256 of each array and of itself
    faiss.bin, faiss.json               an approximate index, only after `build_index`

Chunks lie in the order of the text, so chunk i + 1 continues chunk i where both are of one document. Arrays are mapped
into memory, read only: files of an open database may be deleted, never cut short. The header is written last and the
folder is moved into place whole, so what can be opened is complete; a build that was killed leaves a folder
`.NAME.tmp-*` beside it, which may be deleted.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, FileFormatError, InputError, StateError
from . import chunk_search, faiss_index
from .headers import digest, read_header

Embed = Callable[[Tensor, Tensor], Tensor]

HEADER = "header.json"
KIND = "chunk database"
DTYPES = {"keys": torch.float32, "tokens": torch.int32, "documents": torch.int64}
_QUERIES = 1024


@dataclass(frozen=True, eq=False)
class ChunkDatabase:
    """An open database; made by `open_database`. The tensors are mapped files: read them, never write."""

    folder: Path
    chunk_length: int
    width: int
    tokenizer: str
    embedder: str
    num_documents: int
    keys_checksum: str
    keys: Tensor = field(repr=False)
    tokens: Tensor = field(repr=False)
    documents: Tensor = field(repr=False)

    def __len__(self) -> int:
        """Number of chunks N."""
        return self.keys.shape[0]

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_document: Tensor | None = None,
        index: Literal["exact", "faiss"] = "exact",
    ) -> tuple[Tensor, Tensor]:
        """The k chunks with the nearest keys.

        Args:
            queries: (n, width), any float dtype and device; an exact search runs there, a faiss search on the CPU.
            k: number of chunks wanted.
            exclude_document: (n,) int64, for each query a document none of whose chunks may be returned; -1 for none.
            index: "exact" compares all keys, block by block; "faiss" asks the index that `build_index` wrote.

        Returns: indices (n, k) int64 and L2 distances (n, k) float32, nearest first, on the device of the queries.
        Where the database (with faiss: the part of it searched) has too few chunks, index -1 and distance inf.

        Raises:
            InputError: queries of another width, not finite, k < 1, or exclude_document of another shape.
            FileFormatError, MissingExtraError: for faiss, no index, a damaged index, or faiss is not installed.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width or not queries.is_floating_point():
            raise InputError(
                f"Queries must be floats (n, {self.width}), the width of {self.folder}; "
                f"got {queries.dtype} {tuple(queries.shape)}."
            )
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}.")
        if index not in ("exact", "faiss"):
            raise ConfigError(f"index must be 'exact' or 'faiss', not {index!r}.")
        excluded = torch.full((queries.shape[0],), -1) if exclude_document is None else exclude_document
        if excluded.shape != queries.shape[:1] or excluded.dtype != torch.int64:
            raise InputError(
                f"exclude_document must be int64 {tuple(queries.shape[:1])}, one document for each query; "
                f"got {excluded.dtype} {tuple(excluded.shape)}."
            )
        queries, excluded = queries.detach().float(), excluded.to(queries.device)
        if not bool(queries.isfinite().all()):
            raise InputError("Queries hold values that are not finite; no distance is defined.")

        def find(q: Tensor, x: Tensor) -> Tensor:
            if index == "exact":
                return chunk_search.exact(self._searched, q, k, x)
            return faiss_index.search(self._index, self.documents, q, k, x)

        parts = [
            chunk_search.ranked(self._searched, q, find(q, x), k)
            for q, x in zip(queries.split(_QUERIES), excluded.split(_QUERIES), strict=True)
        ]
        return torch.cat([i for i, _ in parts]), torch.cat([d for _, d in parts])

    def neighbours(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Each chunk followed by its continuation in the document.

        Args:
            indices: (..., k) int64, chunks as `search` returns them; -1 for none.

        Returns: tokens (..., k, 2m) int64 and mask (..., k, 2m) bool on the device of `indices`. The mask is False,
        and the token 0, where the document ended and for index -1.

        Raises:
            InputError: an index out of range.
        """
        at = indices.cpu()
        if at.dtype != torch.int64 or (at.numel() and (int(at.min()) < -1 or int(at.max()) >= len(self))):
            raise InputError(f"Indices must be int64 from -1 to {len(self) - 1}: {self.folder} has no others.")
        first = at.clamp(min=0)
        second = (first + 1).clamp(max=len(self) - 1)
        follows = (second > first) & (self.documents[second] == self.documents[first])
        pair = torch.stack([self.tokens[first], self.tokens[second].masked_fill(~follows[..., None], -1)], dim=-2)
        tokens = pair.flatten(-2).masked_fill((at < 0)[..., None], -1)
        return tokens.clamp(min=0).long().to(indices.device), (tokens >= 0).to(indices.device)

    @cached_property
    def _searched(self) -> chunk_search.Keys:
        halves = [self.keys[block].square().sum(-1) / 2 for block in chunk_search.blocks(len(self), 65536)]
        return chunk_search.Keys(self.keys, torch.cat(halves), self.documents)

    @cached_property
    def _index(self) -> Any:
        return faiss_index.open_index(self.folder, self.keys_checksum)


def open_database(
    folder: str | os.PathLike,
    *,
    chunk_length: int | None = None,
    width: int | None = None,
    tokenizer: str | None = None,
    embedder: str | None = None,
    verify: bool = True,
) -> ChunkDatabase:
    """Open a database that `build` wrote.

    Args:
        chunk_length, width, tokenizer, embedder: what the reader needs; None: whatever the database has.
        verify: read every byte and compare checksums. Without it only sizes and the header are checked.

    Raises:
        FileFormatError: missing, half written, damaged, foreign, or of a newer format.
        StateError: another chunk length, width, tokenizer or embedder than expected.
    """
    folder = Path(folder)
    way_out = "restore the folder from a copy or build it again"
    if not folder.is_dir():
        raise FileFormatError(f"{folder} does not exist or is no folder; expected a {KIND}. Build it with build().")
    if not (folder / HEADER).is_file():
        what = "holds a build that did not finish" if (folder / "tokens.bin").exists() else f"is no {KIND}"
        raise FileFormatError(f"{folder} {what}: it has no {HEADER}. Delete it and build it again, or name another.")
    header = read_header(folder / HEADER, KIND, way_out)
    found = {name: header[name] for name in ("chunk_length", "width", "tokenizer", "embedder")}
    expected = {"chunk_length": chunk_length, "width": width, "tokenizer": tokenizer, "embedder": embedder}
    for name, value in expected.items():
        if value is not None and value != found[name]:
            raise StateError(
                f"{folder} was built with {name.replace('_', ' ')} {found[name]!r}; {value!r} is expected. Open it "
                f"with what it was built with, or build another database with {value!r}."
            )
    count = header["num_chunks"]
    shapes = {"keys": (count, header["width"]), "tokens": (count, header["chunk_length"]), "documents": (count,)}
    tensors = {}
    for name, shape in shapes.items():
        path, dtype, size = folder / f"{name}.bin", DTYPES[name], int(np.prod(shape))
        if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
            raise FileFormatError(
                f"{path} is missing or not of {size * dtype.itemsize:,} bytes as the header says; {way_out}."
            )
        if verify and digest(path) != header["arrays"][name]["sha256"]:
            raise FileFormatError(f"{path} is damaged: its checksum does not fit its content; {way_out}.")
        # Not shared: the file is opened for reading only, and nothing that is written to the tensor reaches it.
        tensors[name] = torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)
    return ChunkDatabase(
        folder=folder,
        num_documents=header["num_documents"],
        keys_checksum=header["arrays"]["keys"]["sha256"],
        **found,
        **tensors,
    )
