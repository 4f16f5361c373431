"""Nearest keys of a query: exact search on the device, and approximate search with faiss.

Shapes: B batch, H query heads, Hkv key heads (H a multiple; query head a searches key head a // (H / Hkv)), T queries,
N keys, e width, k results. Scores are larger for nearer keys: q.n for "dot", -|q - n|^2 for "l2". Results come
best first; a missing one has index -1 and score -inf. No gradient flows through a search.
"""

import hashlib
import math
import os
import struct
import tempfile
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["dot", "l2"]
Kind = Literal["flat", "ivf", "hnsw"]

# Scores held at once by an exact search.
_SCORE_BYTES = 64 * 2**20
# Keys per bucket in the first stage of `_top`; 32 to 128 were within 20% of each other.
_BUCKETS = 64


@torch.no_grad()
def exact(
    query: Tensor,
    keys: Tensor,
    valid: Tensor | int | None,
    k: int,
    metric: Metric = "dot",
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best keys of every query by matrix products, in blocks of keys with a running best k.

    Args:
        query: (B, H, T, e). keys: (B, Hkv, N, e).
        valid: which keys there are: (B, N) or (B, Hkv, N) bool, or how many, counted from the first: (B,) integers or
            an int; None: all.
        block: keys scored at once; None: as many as keep the scores near 64 MB.

    Returns: scores (B, H, T, k) float32 or wider, indices (B, H, T, k) int64.
    """
    _check_metric(metric)
    batch, heads, queries, _ = query.shape
    key_heads, stored = keys.shape[1], keys.shape[2]
    if heads % key_heads:
        raise ValueError(f"The number of query heads must be a multiple of the key heads: {heads}, {key_heads}.")
    q = query.to(keys.dtype).reshape(batch, key_heads, heads // key_heads * queries, -1)
    # Blocks of a few thousand keys are where `_top` pays; with many queries, they are taken in parts instead.
    cells = _SCORE_BYTES // max(keys.element_size(), 4)
    block = block or max(8192, k, cells // max(1, math.prod(q.shape[:3])))
    at_once = max(1, cells // max(1, batch * key_heads * min(block, stored)))
    visible = _visible(valid, stored, keys.device)
    found = [_exact(part, keys, visible, k, metric, block) for part in q.split(at_once, dim=2)]
    scores, indices = (torch.cat(parts, dim=2).view(batch, heads, queries, k) for parts in zip(*found, strict=True))
    return scores, indices


def _exact(
    q: Tensor, keys: Tensor, visible: Tensor | None, k: int, metric: Metric, block: int
) -> tuple[Tensor, Tensor]:
    """`exact` for as many query heads as key heads."""
    stored = keys.shape[2]
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    top = torch.empty(*q.shape[:3], 0, dtype=wide, device=q.device)
    best = top, top.long()
    for start in range(0, stored, block):
        part = keys[:, :, start : start + block]
        scores = (q @ part.transpose(-1, -2)).to(wide)
        if metric == "l2":
            scores = scores.mul_(2).sub_(part.to(wide).square().sum(-1)[:, :, None])
        if visible is not None:
            scores.masked_fill_(~visible[:, :, None, start : start + block], float("-inf"))
        top, index = _top(scores, min(k, part.shape[2]))
        best = better(best, (top, index + start), k) if start else (top, index)
    top, index = best
    if metric == "l2":
        top = top - q.to(wide).square().sum(-1, keepdim=True)
    missing = (0, k - top.shape[-1])
    index = index.masked_fill(top == float("-inf"), -1)
    return F.pad(top, missing, value=float("-inf")), F.pad(index, missing, value=-1)


def better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two results (scores, indices) over disjoint keys, best first; all of them if there are fewer."""
    scores = torch.cat([one[0], other[0]], dim=-1)
    top, place = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return top, torch.cat([one[1], other[1]], dim=-1).gather(-1, place)


def recall(found: Tensor, truth: Tensor) -> float:
    """Share of the true indices (..., k) that are among those found (..., any number); -1 counts as no index."""
    real = truth >= 0
    hit = (truth[..., :, None] == found[..., None, :]).any(-1) & real
    return (hit.sum() / real.sum().clamp_min(1)).item() if bool(real.any()) else 1.0


class FaissIndex:
    """An index over vectors (N, e) on the CPU, in memory or in a file. An added vector is found by its place in order.

    Args:
        width: e.
        metric: "dot" or "l2".
        kind: "flat" compares with every vector; "ivf" with those in the `nprobe` nearest of `nlist` cells, which are
            learned from the first vectors added; "hnsw" walks a graph, searching `nprobe` candidates wide.
        nlist: cells of "ivf"; None: 4 sqrt(N) of the first N vectors, with 39 vectors a cell or more.
        nprobe: how thorough a search is ("ivf": cells, "hnsw": candidates, at least k); None: 16, for "hnsw" 64.

    Raises:
        ImportError: faiss is not installed.
    """

    def __init__(
        self,
        width: int,
        metric: Metric = "dot",
        kind: Kind = "flat",
        *,
        nlist: int | None = None,
        nprobe: int | None = None,
    ):
        _check_metric(metric)
        if kind not in ("flat", "ivf", "hnsw"):
            raise ValueError(f"Unknown kind of index {kind!r}: choose 'flat', 'ivf' or 'hnsw'.")
        faiss = import_faiss()
        self.width, self.metric, self.kind = width, metric, kind
        self.nlist, self.nprobe = nlist, nprobe or (64 if kind == "hnsw" else 16)
        self._faiss_metric = faiss.METRIC_INNER_PRODUCT if metric == "dot" else faiss.METRIC_L2
        self._index = None
        if kind == "flat":
            self._index = faiss.IndexFlat(width, self._faiss_metric)
        elif kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(width, 32, self._faiss_metric)

    def __len__(self) -> int:
        return 0 if self._index is None else self._index.ntotal

    def add(self, vectors: Tensor) -> None:
        """Add vectors (N, e); they are copied as float32. The first call decides the cells of "ivf"."""
        vectors = self._checked(vectors)
        if not len(vectors):
            return
        if self._index is None:
            self._index = self._cells(vectors)
        self._index.add(vectors.numpy())  # pyright: ignore[reportCallIssue]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of each query: scores (T, k) float32, indices (T, k) int64, on the CPU; queries (T, e)."""
        queries = self._checked(queries)
        if self._index is None or not len(queries):
            return torch.full((len(queries), k), float("-inf")), torch.full((len(queries), k), -1)
        if self.kind == "ivf":
            self._index.nprobe = self.nprobe
        elif self.kind == "hnsw":
            self._index.hnsw.efSearch = max(self.nprobe, k)
        found = self._index.search(queries.numpy(), k)  # pyright: ignore[reportCallIssue]
        scores, indices = (torch.from_numpy(part) for part in found)
        scores = scores if self.metric == "dot" else scores.neg_()
        return scores.masked_fill_(indices < 0, float("-inf")), indices

    def write(self, path: str | os.PathLike) -> None:
        """Write to one file, in one step: a reader sees the old file or the new one. An empty index is refused."""
        if self._index is None:
            raise ValueError("This index has no vectors yet and nothing to write: call add first.")
        path = Path(path)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
        os.close(handle)
        try:
            import_faiss().write_index(self._index, temporary)
            with open(temporary, "rb+") as file:
                digest = _digest(file, os.path.getsize(temporary))
                name = f"{self.metric}/{self.kind}".encode().ljust(_NAME_BYTES)
                file.write(_TRAILER.pack(digest, name, self.width, self.nprobe, _MAGIC))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | os.PathLike, width: int | None = None) -> "FaissIndex":
        """An index from a file of `write`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, damaged, or its vectors are not `width` wide.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No index at {path}: build one and write it there.")
        size = path.stat().st_size - _TRAILER.size
        with open(path, "rb") as file:
            file.seek(max(size, 0))
            trailer = file.read(_TRAILER.size)
            if size < 0 or not trailer.endswith(_MAGIC):
                raise ValueError(f"{path} is no index of FaissIndex.write, or its end is lost: build it again.")
            digest, name, stored, nprobe, _ = _TRAILER.unpack(trailer)
            file.seek(0)
            if _digest(file, size) != digest:
                raise ValueError(f"{path} is damaged, its checksum does not match: build it again.")
        if width is not None and stored != width:
            raise ValueError(f"{path} holds vectors of width {stored}, not {width}: use the model that filled it.")
        metric, kind = name.decode().strip().split("/")
        index = cls(stored, metric, kind, nprobe=nprobe)
        index._index = import_faiss().read_index(str(path))
        return index

    def _cells(self, vectors: Tensor):
        faiss = import_faiss()
        # Fewer than 39 vectors a cell is where faiss calls its training poor.
        cells = self.nlist or max(1, min(int(4 * math.sqrt(len(vectors))), len(vectors) // 39))
        if cells > len(vectors):
            raise ValueError(f"{cells} cells need as many vectors in the first call of add, not {len(vectors)}.")
        quantizer = faiss.IndexFlat(self.width, self._faiss_metric)
        index = faiss.IndexIVFFlat(quantizer, self.width, cells, self._faiss_metric)
        # faiss prints to stderr about few vectors a cell; who names nlist has decided.
        index.cp.min_points_per_centroid = 1
        # Cells need no more precise centres; faiss's own 25 rounds over 256 vectors a cell take several times longer.
        index.cp.niter, index.cp.max_points_per_centroid = 10, 64
        index.train(vectors.numpy())  # pyright: ignore[reportCallIssue]
        return index

    def _checked(self, vectors: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise ValueError(f"Expected vectors of shape (N, {self.width}), got {tuple(vectors.shape)}.")
        return vectors.detach().to("cpu", torch.float32).contiguous()


def import_faiss():
    """The faiss module, or an ImportError that says how to get it."""
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("faiss is not installed: pip install 'mnemic[knn]'") from error
    return faiss


# After what faiss wrote, which it reads without minding what follows: checksum, metric/kind, width, nprobe, magic.
_MAGIC = b"mnemicNN"
_NAME_BYTES = 16
_TRAILER = struct.Struct(f"<32s{_NAME_BYTES}sqq{len(_MAGIC)}s")


def _digest(file, size: int) -> bytes:
    """Checksum of the next `size` bytes; the file is left behind them."""
    digest = hashlib.blake2b(digest_size=32)
    while size > 0 and (chunk := file.read(min(size, 2**20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk over the last dimension, by way of the k buckets with the largest maxima: they hold the k largest."""
    size = scores.shape[-1]
    whole = size // _BUCKETS * _BUCKETS
    if size < 4 * k * _BUCKETS:
        return scores.topk(k, dim=-1)
    # Bucket j holds every (whole / 64)-th score from j on, so that the maxima are taken over contiguous rows.
    buckets = scores[..., :whole].unflatten(-1, (_BUCKETS, -1))
    chosen = buckets.amax(-2).topk(k, dim=-1).indices
    inside = buckets.gather(-1, chosen[..., None, :].expand(*chosen.shape[:-1], _BUCKETS, k)).flatten(-2)
    offsets = torch.arange(_BUCKETS, device=scores.device) * (whole // _BUCKETS)
    index = (offsets[:, None] + chosen[..., None, :]).flatten(-2)
    rest = torch.arange(whole, size, device=scores.device).expand(*index.shape[:-1], -1)
    top, place = torch.cat([inside, scores[..., whole:]], dim=-1).topk(k, dim=-1)
    return top, torch.cat([index, rest], dim=-1).gather(-1, place)


def _visible(valid: Tensor | int | None, stored: int, device: torch.device) -> Tensor | None:
    """(B or 1, Hkv or 1, N) bool, or None for all."""
    if valid is None or (isinstance(valid, int) and valid >= stored):
        return None
    if isinstance(valid, int):
        return (torch.arange(stored, device=device) < valid)[None, None]
    if valid.dtype == torch.bool:
        return valid[:, None] if valid.ndim == 2 else valid
    return (torch.arange(stored, device=device) < valid[:, None])[:, None]


def _check_metric(metric: str) -> None:
    if metric not in ("dot", "l2"):
        raise ValueError(f"Unknown metric {metric!r}: choose 'dot' or 'l2'.")
