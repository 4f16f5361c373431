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

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mnemic.core.errors import ConfigError, FileFormatError, InputError, MissingExtraError, StateError
from mnemic.core.files import replace_atomically

Embed = Callable[[Tensor, Tensor], Tensor]

FORMAT_VERSION = 1
HEADER = "header.json"
INDEX, INDEX_HEADER = "faiss.bin", "faiss.json"
_KIND, _INDEX_KIND = "chunk database", "chunk database index"
_DTYPES = {"keys": torch.float32, "tokens": torch.int32, "documents": torch.int64}
# Scores held at once while searching: 64 MiB of float32.
_SCORES = 2**24
_QUERIES = 1024
# Scores in float32 may swap near ties; the distances of this many candidates more than asked decide the ranks.
_SLACK = 8
# The best of a row lie in the groups with the best minima, and minima of groups are cheaper than a selection.
_GROUP = 64


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
        find = self._exact if index == "exact" else self._faiss
        parts = [
            self._ranked(q, find(q, k, x), k)
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

    def _blocks(self, rows: int) -> Iterator[slice]:
        for start in range(0, len(self), rows):
            yield slice(start, min(start + rows, len(self)))

    @cached_property
    def _half_squares(self) -> Tensor:
        """(N,) float32, half the squared length of each key."""
        return torch.cat([self.keys[block].square().sum(-1) / 2 for block in self._blocks(65536)])

    def _exact(self, queries: Tensor, k: int, excluded: Tensor) -> Tensor:
        """Candidates (n, c), at least the k nearest, -1 where there are none; |q - x|^2 / 2 = |x|^2 / 2 - qx + ..."""
        wanted = min(k + _SLACK, len(self))
        # The chunks of a document lie together.
        ends = [torch.searchsorted(self.documents, excluded.cpu(), side=side).tolist() for side in ("left", "right")]
        own = list(zip(*ends, strict=True))
        best = queries.new_full((queries.shape[0], wanted), float("inf"))
        found = torch.full(best.shape, -1, dtype=torch.int64, device=queries.device)
        for block in self._blocks(max(_GROUP, _SCORES // max(1, queries.shape[0]) // _GROUP * _GROUP)):
            keys, half = self.keys[block].to(queries.device), self._half_squares[block].to(queries.device)
            scores = torch.addmm(half, queries, keys.T, alpha=-1)
            for row, (start, stop) in enumerate(own):
                if max(start, block.start) < min(stop, block.stop):
                    scores[row, max(start - block.start, 0) : stop - block.start] = float("inf")
            values, at = _smallest(scores, wanted)
            values, at = torch.cat([best, values], dim=1), torch.cat([found, at + block.start], dim=1)
            best, chosen = values.topk(wanted, largest=False)
            found = at.gather(1, chosen)
        return found.masked_fill(best == float("inf"), -1)

    def _faiss(self, queries: Tensor, k: int, excluded: Tensor) -> Tensor:
        """Candidates (n, c) of the index: asks for more until every query has k that are not excluded."""
        ask = 2 * k + _SLACK
        numbers = queries.cpu().numpy()
        while True:
            ask = min(ask, len(self))
            found = torch.from_numpy(self._index.search(numbers, ask)[1]).to(queries.device)
            own = self.documents[found.clamp(min=0).cpu()].to(queries.device) == excluded[:, None]
            left = found.masked_fill(own, -1)
            # -1 from faiss means that the lists it searched hold no more.
            enough = ((left >= 0).sum(-1) >= k) | (found < 0).any(-1)
            if ask == len(self) or bool(enough.all()):
                return left
            ask *= 4

    def _ranked(self, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of the candidates by differences, which do not cancel; ties go to the earlier chunk."""
        candidates = candidates.sort(dim=1).values
        rows = max(1, _SCORES // max(1, candidates.shape[1] * self.width))
        parts = []
        for q, c in zip(queries.split(rows), candidates.split(rows), strict=True):
            keys = self.keys[c.clamp(min=0).cpu()].to(queries.device)
            parts.append((keys - q[:, None]).double().square().sum(-1).sqrt())
        distances = torch.cat(parts).masked_fill(candidates < 0, float("inf"))
        distances, order = distances.sort(dim=1, stable=True)
        indices = candidates.gather(1, order)
        short = max(0, k - indices.shape[1])
        pad = torch.nn.functional.pad
        return pad(indices, (0, short), value=-1)[:, :k], pad(distances, (0, short), value=float("inf"))[:, :k].float()

    @cached_property
    def _index(self) -> Any:
        faiss = _import_faiss()
        way_out = f"delete {INDEX} and {INDEX_HEADER} there and call build_index(folder) again, or search exactly"
        if not (self.folder / INDEX_HEADER).is_file():
            raise FileFormatError(f"{self.folder} has no faiss index; call build_index(folder), or search exactly.")
        header = _read_header(self.folder / INDEX_HEADER, _INDEX_KIND, way_out)
        if header["keys"] != self.keys_checksum:
            raise FileFormatError(f"The faiss index in {self.folder} was made of other keys; {way_out}.")
        path = self.folder / INDEX
        if not path.is_file() or _digest(path) != header["sha256"]:
            raise FileFormatError(f"{path} is missing or damaged: its checksum does not fit; {way_out}.")
        # Lists stay on disk until a search reads them.
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        index.nprobe = header["num_probes"]
        return index


def build(
    folder: str | os.PathLike,
    documents: Iterable[Sequence[int]],
    embed: Embed,
    chunk_length: int,
    tokenizer_fingerprint: str,
    embedder_fingerprint: str,
    batch: int = 256,
    progress: bool = True,
) -> ChunkDatabase:
    """Write a database of all chunks of `documents` and open it.

    Documents are taken one at a time; one document and one batch of chunks are in memory.

    Args:
        folder: where to write; must not exist.
        documents: token ids of each document, from 0 to 2^31 - 1. Documents without tokens are counted, not stored.
        embed: makes keys (n, width) of tokens (n, m) int64 and a mask (n, m) bool that is False (and the token 0)
            after the end of a document; called without gradients, at most `batch` chunks at once.
        chunk_length: m.
        tokenizer_fingerprint, embedder_fingerprint: what made the ids, what makes the keys; checked when opening.
        progress: show a progress bar on stderr.

    Raises:
        InputError: the folder exists or cannot be written, a document is no list of ids, `embed` returns something
            else, or there is no chunk at all. Nothing is left behind.
    """
    folder = Path(folder)
    if chunk_length < 1 or batch < 1:
        raise ConfigError(f"chunk_length and batch must be at least 1, not {chunk_length} and {batch}.")
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; choose another folder or delete it first.")
    try:
        room = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"Cannot write {folder}: {error.strerror}. Choose a folder that can be written.") from error
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[chunks]:,} chunks"))
    total = len(documents) if isinstance(documents, Sequence) else None
    seen = 0
    # The temporary folder is private; the one inside has the permissions that the user's new folders have.
    made = room / folder.name
    try:
        made.mkdir()
        with ExitStack() as stack:
            files = {name: _Array(made / f"{name}.bin") for name in _DTYPES}
            for array in files.values():
                stack.enter_context(array.file)
            bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), disable=not progress))
            task = bar.add_task(f"Building {folder.name}", total=total, chunks=0)

            def counted() -> Iterator[Sequence[int]]:
                nonlocal seen
                for document in documents:
                    yield document
                    seen += 1
                    bar.update(task, completed=seen, chunks=files["tokens"].rows)

            for tokens, numbers in _batches(counted(), chunk_length, batch):
                files["keys"].append(_embedded(embed, tokens, files["keys"].width))
                files["tokens"].append(tokens)
                files["documents"].append(numbers)
            bar.update(task, completed=seen, chunks=files["tokens"].rows)
            arrays = {name: file.finish() for name, file in files.items()}
        if not files["tokens"].rows:
            raise InputError(f"None of the {seen} documents has a token; a database needs at least one chunk.")
        header = {
            "chunk_length": chunk_length,
            "width": files["keys"].width,
            "num_chunks": files["tokens"].rows,
            "num_documents": seen,
            "tokenizer": tokenizer_fingerprint,
            "embedder": embedder_fingerprint,
            "arrays": arrays,
        }
        replace_atomically(made / HEADER, lambda path: path.write_text(_header_text(_KIND, header), encoding="utf-8"))
        try:
            made.rename(folder)
        except OSError as error:
            raise InputError(f"Could not move the finished database to {folder}: {error}.") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return open_database(folder, verify=False)


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
        raise FileFormatError(f"{folder} does not exist or is no folder; expected a {_KIND}. Build it with build().")
    if not (folder / HEADER).is_file():
        what = "holds a build that did not finish" if (folder / "tokens.bin").exists() else f"is no {_KIND}"
        raise FileFormatError(f"{folder} {what}: it has no {HEADER}. Delete it and build it again, or name another.")
    header = _read_header(folder / HEADER, _KIND, way_out)
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
        path, dtype, size = folder / f"{name}.bin", _DTYPES[name], int(np.prod(shape))
        if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
            raise FileFormatError(
                f"{path} is missing or not of {size * dtype.itemsize:,} bytes as the header says; {way_out}."
            )
        if verify and _digest(path) != header["arrays"][name]["sha256"]:
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


def build_index(folder: str | os.PathLike) -> None:
    """Write an approximate faiss index (inverted lists of the full vectors) into a database, once.

    About 4 sqrt(N) lists, of which a search reads one in 16, at least 8. The index is built in memory: as large as
    the keys. It pays from about a million chunks on; below, the exact search of a batch of queries is faster.

    Raises:
        ConfigError: there is an index already. FileFormatError: no intact database. MissingExtraError: no faiss.
        InputError: the folder cannot be written.
    """
    faiss = _import_faiss()
    folder = Path(folder)
    if (folder / INDEX_HEADER).exists():
        raise ConfigError(f"{folder} has a faiss index already; delete {INDEX} and {INDEX_HEADER} to build it again.")
    database = open_database(folder)
    count = len(database)
    # faiss asks for 39 keys for each list it trains, and samples 256.
    num_lists = max(1, min(round(4 * count**0.5), count // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(database.width), database.width, num_lists)
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 256 * num_lists].sort().values
    index.train(database.keys[sample].numpy())
    for block in database._blocks(65536):
        index.add(database.keys[block].numpy())
    replace_atomically(folder / INDEX, lambda path: faiss.write_index(index, str(path)))
    header = {
        "keys": database.keys_checksum,
        "sha256": _digest(folder / INDEX),
        "num_probes": min(num_lists, max(8, num_lists // 16)),
    }
    replace_atomically(
        folder / INDEX_HEADER, lambda path: path.write_text(_header_text(_INDEX_KIND, header), encoding="utf-8")
    )


def overlap(chunk: Tensor, neighbour: Tensor, mask: Tensor | None = None) -> Tensor:
    """Length of the longest run of tokens that both hold, divided by m: the paper's measure of leakage.

    Args:
        chunk: (..., m) int64. neighbour: (..., r) int64, leading dimensions that broadcast.
        mask: (..., r) bool, False for tokens of the neighbour that do not count. None: all count.

    Returns: (...) float32 from 0 (no common token) to 1 (the neighbour holds the chunk).
    """
    same = chunk[..., :, None] == neighbour[..., None, :]
    if mask is not None:
        same = same & mask[..., None, :]
    run = torch.zeros_like(same[..., 0, :], dtype=torch.int64)
    longest = run
    for i in range(chunk.shape[-1]):
        run = (torch.nn.functional.pad(run[..., :-1], (1, 0)) + 1) * same[..., i, :]
        longest = torch.maximum(longest, run)
    return longest.amax(-1) / chunk.shape[-1]


class _Array:
    """A raw file that grows by rows, hashed as it is written."""

    def __init__(self, path: Path):
        self.path, self.rows, self.width = path, 0, 0
        self.file, self.hash = open(path, "wb"), hashlib.sha256()  # noqa: SIM115 - closed by whoever made this

    def append(self, rows: Tensor) -> None:
        data = rows.contiguous().numpy().data
        try:
            self.file.write(data)
        except OSError as error:
            raise InputError(f"Could not write {self.path}: {error}; free some space.") from error
        self.hash.update(data)
        self.rows += rows.shape[0]
        self.width = rows.shape[-1]

    def finish(self) -> dict[str, str]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"sha256": self.hash.hexdigest()}


def _batches(documents: Iterable[Sequence[int]], length: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks (n, m) int32 and their documents (n,) int64, n = batch but for the last."""
    waiting, count = [], 0
    for number, document in enumerate(documents):
        chunks = _chunks(document, number, length)
        waiting.append((chunks, torch.full(chunks.shape[:1], number)))
        count += chunks.shape[0]
        if count >= batch:
            tokens, numbers = torch.cat([t for t, _ in waiting]), torch.cat([n for _, n in waiting])
            full = count // batch * batch
            yield from zip(tokens[:full].split(batch), numbers[:full].split(batch), strict=True)
            waiting, count = [(tokens[full:], numbers[full:])], count - full
    if count:
        yield torch.cat([t for t, _ in waiting]), torch.cat([n for _, n in waiting])


def _chunks(document: Sequence[int], number: int, length: int) -> Tensor:
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31)):
        raise InputError(
            f"Document {number} must be a list of token ids from 0 to 2^31 - 1, not {ids.dtype} {ids.shape}."
        )
    chunks = np.full((-(-ids.size // length), length), -1, dtype=np.int32)
    chunks.reshape(-1)[: ids.size] = ids
    return torch.from_numpy(chunks)


def _embedded(embed: Embed, tokens: Tensor, width: int) -> Tensor:
    with torch.no_grad():
        keys = embed(tokens.clamp(min=0).long(), tokens >= 0)
    if keys.ndim != 2 or keys.shape[0] != tokens.shape[0] or not keys.shape[1] or (width and keys.shape[1] != width):
        raise InputError(
            f"embed must return ({tokens.shape[0]}, {width or 'width'}) for {tokens.shape[0]} chunks, the same width "
            f"each time; it returned {tuple(keys.shape)}."
        )
    keys = keys.detach().float().cpu()
    if not bool(keys.square().sum(-1).isfinite().all()):
        raise InputError("embed returned keys that are not finite, or whose squares are not; scale or mask them.")
    return keys


def _smallest(scores: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `wanted` smallest entries of each row (fewer where there are fewer columns)."""
    columns = scores.shape[1]
    groups = columns // _GROUP
    if groups <= 2 * wanted:
        return scores.topk(min(wanted, columns), largest=False)
    # Group g holds the columns g, g + groups, g + 2 groups ..., so that minima are taken along rows of memory.
    minima = scores[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amin(1)
    best = minima.topk(wanted, largest=False).indices
    steps = torch.arange(_GROUP, device=scores.device) * groups
    rest = torch.arange(groups * _GROUP, columns, device=scores.device).expand(scores.shape[0], -1)
    at = torch.cat([(best[:, :, None] + steps).flatten(1), rest], dim=1)
    values, chosen = scores.gather(1, at).topk(wanted, largest=False)
    return values, at.gather(1, chosen)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_text(kind: str, header: dict[str, Any]) -> str:
    full = {**header, "kind": kind, "format_version": FORMAT_VERSION}
    full["checksum"] = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()
    return json.dumps(full, indent=1, sort_keys=True)


def _read_header(path: Path, kind: str, way_out: str) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        checksum = header.pop("checksum")
        intact = checksum == hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        found, version = header["kind"], int(header["format_version"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged or no header of a {kind} ({error!r}); {way_out}.") from error
    if not intact:
        raise FileFormatError(f"{path} is damaged: its checksum does not fit its content; {way_out}.")
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}. Upgrade mnemic."
        )
    if found != kind:
        raise FileFormatError(f"{path} is the header of a {found}; expected a {kind}.")
    return header


def _import_faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("A faiss index needs the package faiss: pip install faiss-cpu.") from error
    return faiss
