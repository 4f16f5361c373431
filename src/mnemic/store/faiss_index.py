"""An approximate index of a chunk database, with faiss: inverted lists of full vectors, in a file beside the keys."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, FileFormatError, MissingExtraError
from ..core.files import replace_atomically
from .chunk_search import SLACK, blocks
from .headers import digest, header_text, read_header

INDEX, INDEX_HEADER = "faiss.bin", "faiss.json"
_INDEX_KIND = "chunk database index"


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
    from .chunk_database import open_database

    database = open_database(folder)
    count = len(database)
    # faiss asks for 39 keys for each list it trains, and samples 256.
    num_lists = max(1, min(round(4 * count**0.5), count // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(database.width), database.width, num_lists)
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 256 * num_lists].sort().values
    index.train(database.keys[sample].numpy())
    for block in blocks(count, 65536):
        index.add(database.keys[block].numpy())
    replace_atomically(folder / INDEX, lambda path: faiss.write_index(index, str(path)))
    header = {
        "keys": database.keys_checksum,
        "sha256": digest(folder / INDEX),
        "num_probes": min(num_lists, max(8, num_lists // 16)),
    }
    replace_atomically(
        folder / INDEX_HEADER, lambda path: path.write_text(header_text(_INDEX_KIND, header), encoding="utf-8")
    )


def open_index(folder: Path, keys_checksum: str) -> Any:
    """The index of the database in `folder`.

    Raises:
        FileFormatError: none, a damaged one, or one of other keys. MissingExtraError: faiss is not installed.
    """
    faiss = _import_faiss()
    way_out = f"delete {INDEX} and {INDEX_HEADER} there and call build_index(folder) again, or search exactly"
    if not (folder / INDEX_HEADER).is_file():
        raise FileFormatError(f"{folder} has no faiss index; call build_index(folder), or search exactly.")
    header = read_header(folder / INDEX_HEADER, _INDEX_KIND, way_out)
    if header["keys"] != keys_checksum:
        raise FileFormatError(f"The faiss index in {folder} was made of other keys; {way_out}.")
    path = folder / INDEX
    if not path.is_file() or digest(path) != header["sha256"]:
        raise FileFormatError(f"{path} is missing or damaged: its checksum does not fit; {way_out}.")
    # Lists stay on disk until a search reads them.
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    index.nprobe = header["num_probes"]
    return index


def search(index: Any, documents: Tensor, queries: Tensor, k: int, excluded: Tensor) -> Tensor:
    """Candidates (n, c) of the index: asks for more until every query has k that are not excluded."""
    ask = 2 * k + SLACK
    numbers = queries.cpu().numpy()
    while True:
        ask = min(ask, len(documents))
        found = torch.from_numpy(index.search(numbers, ask)[1]).to(queries.device)
        own = documents[found.clamp(min=0).cpu()].to(queries.device) == excluded[:, None]
        left = found.masked_fill(own, -1)
        # -1 from faiss means that the lists it searched hold no more.
        enough = ((left >= 0).sum(-1) >= k) | (found < 0).any(-1)
        if ask == len(documents) or bool(enough.all()):
            return left
        ask *= 4


def _import_faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("A faiss index needs the package faiss: pip install faiss-cpu.") from error
    return faiss
