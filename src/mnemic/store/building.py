"""Building a chunk database: documents in, a complete folder out, or nothing at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.files import replace_atomically
from .chunk_database import DTYPES, HEADER, KIND, ChunkDatabase, Embed, open_database
from .headers import header_text


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
            files = {name: _Array(made / f"{name}.bin") for name in DTYPES}
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
        replace_atomically(made / HEADER, lambda path: path.write_text(header_text(KIND, header), encoding="utf-8"))
        try:
            made.rename(folder)
        except OSError as error:
            raise InputError(f"Could not move the finished database to {folder}: {error}.") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return open_database(folder, verify=False)


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
