"""Nearest-neighbour targets: a datastore of a corpus on disk, and for each position its kNN distribution over tokens.

One builder for every system that imitates or uses kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172): Memory Decoder
(arXiv 2508.09874), MLP Memory (arXiv 2508.01832). A key is the input of the datastore model's last feed-forward block,
its value the token that comes next. p(y) is the sum over the k nearest keys with value y of exp(-d2 / temperature),
normalised; d2 is the squared distance, and the position's own entry never counts (by place, since duplicates tie).
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import ConfigError, FileFormatError, HostError, InputError, MissingExtraError, StateError
from ..hosts import is_attached
from ..hosts.anatomy import examine
from ..hosts.fingerprint import check_fingerprint, fingerprint
from ..ops.mixture import sum_by_token

FORMAT_VERSION = 1
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
# Queries x keys of one block of distances: 64 MiB in float32.
_QUERIES, _KEYS = 2048, 8192
# The index of the papers: faiss wants 39 points a centroid, and has 256 centroids in each part of a key.
_CENTROIDS, _PROBES, _POINTS, _PARTS = 4096, 32, 39, 64

Search = Literal["exact", "faiss"]
Near = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


class TargetExample(TypedDict):
    """One document of T tokens: input_ids (T,) int64; tokens (T - 1, w) int32 and probs (T - 1, w) float16, the
    distribution of the next token at each position but the last, filled up with token 0 of probability 0."""

    input_ids: Tensor
    tokens: Tensor
    probs: Tensor


class NeighbourTargets(Dataset):
    """An opened folder: a dataset with one `TargetExample` a document.

    Memory-mapped, for N entries in D documents: keys (N, d) float32, or float16 from a model in half precision;
    next_tokens (N,) int32; ids (N + D,) int32, the documents one after another; starts (D + 1,) int64, where each
    begins in ids. Entry n of document i is position n - (starts[i] - i). rows (N + 1,) int64, where the target of
    each entry begins in tokens (int32) and probs (float16); absent without targets.
    """

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder, self.header = folder, header
        for name, array in header["arrays"].items():
            shape = tuple(array["shape"])
            setattr(self, name, np.memmap(folder / f"{name}.bin", dtype=array["dtype"], mode="r", shape=shape))

    keys: np.ndarray
    next_tokens: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    probs: np.ndarray

    @property
    def has_targets(self) -> bool:
        return "rows" in self.header["arrays"]

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        model: Any,
        tokenizer: Any,
        documents: Sequence[Sequence[int]],
        *,
        neighbours: int | None = 1024,
        temperature: float = 16.0,
        search: Search = "exact",
        batch_size: int = 8,
        progress: bool = True,
    ) -> "NeighbourTargets":
        """Run `model` over the documents, find the neighbours, and write `folder` in one step.

        Args:
            folder: must not exist. model: the datastore model, without memory. documents: token ids of each.
            neighbours: k; all others in a smaller corpus; None to store keys and next tokens only.
            search: exact, N^2 d multiplications on the model's device; or faiss, approximate (IVFPQ, 4096 centroids of
                which 32 are probed), also in its distances, on the CPU.
            batch_size: documents the model reads at once.

        Raises:
            InputError: the folder exists or cannot be written; documents too short, too long, or of other ids.
            ConfigError: settings out of range. HostError: no known feed-forward block, or a memory is attached.
            MissingExtraError: search="faiss" without faiss.
        """
        folder = Path(folder)
        if folder.exists():
            raise InputError(f"{folder} exists already; open it, remove it, or choose another folder.")
        if (neighbours is not None and neighbours < 1) or temperature <= 0 or batch_size < 1:
            raise ConfigError(
                f"neighbours {neighbours}, temperature {temperature}, batch_size {batch_size}: all must be positive."
            )
        if search not in ("exact", "faiss"):
            raise ConfigError(f"search is {search!r}; expected 'exact' or 'faiss'.")
        if search == "faiss":
            _faiss()
        _check_documents(model, tokenizer, documents)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            room = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        except OSError as error:
            raise InputError(f"Cannot write {folder}: {error}. Choose a folder that can be written.") from error
        header: dict[str, Any] = {
            "kind": "neighbour targets", "format_version": FORMAT_VERSION, "neighbours": neighbours,
            "temperature": temperature, "search": search, "vocabulary": len(tokenizer),
            "model": fingerprint(model, "host"), "tokenizer": tokenizer_fingerprint(tokenizer), "arrays": {},
        }  # fmt: skip
        try:
            with Progress(console=Console(stderr=True), disable=not progress) as bar:
                _write_entries(room, header, model, documents, batch_size, bar)
                if neighbours is not None:
                    _write_targets(room, header, cls(room, header), model.device, bar)
            header["checksum"] = _checksum(header)
            (room / "header.json").write_text(json.dumps(header))
            for path in room.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            room.rename(folder)
        except OSError as error:
            raise InputError(f"Could not write {folder}: {error}. Free some space or choose another folder.") from error
        finally:
            shutil.rmtree(room, ignore_errors=True)
        return cls.open(folder, model=model, tokenizer=tokenizer)

    @classmethod
    def open(cls, folder: str | os.PathLike, *, model: Any = None, tokenizer: Any = None) -> "NeighbourTargets":
        """Open what `build` wrote. Everything but the keys is read once and compared with its checksum.

        Args:
            model: the datastore model, where queries will come from; None if only the targets are used.
            tokenizer: the one that the targets will be used with.

        Raises:
            FileFormatError: missing, half written, damaged or foreign. StateError: another model or tokenizer.
        """
        folder = Path(folder)
        what = f"The neighbour targets in {folder}"
        if not folder.is_dir():
            raise FileFormatError(f"{folder} is no folder; expected one written by NeighbourTargets.build.")
        if not (folder / "header.json").is_file():
            raise FileFormatError(f"{folder} has no header.json: half written, or no neighbour targets; build it anew.")
        try:
            header = json.loads((folder / "header.json").read_text())
            if header["kind"] != "neighbour targets":
                raise FileFormatError(f"{folder} holds {header['kind']}; expected neighbour targets.")
            version, intact = int(header["format_version"]), header.pop("checksum") == _checksum(header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{folder}/header.json is damaged or foreign ({error}); build it anew.") from error
        if version > FORMAT_VERSION:
            raise FileFormatError(f"{what} have format version {version}; this release reads up to {FORMAT_VERSION}.")
        if not intact:
            raise FileFormatError(f"{folder}/header.json is damaged: its checksum does not fit; build it anew.")
        for name, array in header["arrays"].items():
            path, size = folder / f"{name}.bin", int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise FileFormatError(
                    f"{path} has {found:,} bytes of {size:,}: half written or damaged; build it anew."
                )
            if array["crc32"] is not None and array["crc32"] != _crc32(path):
                raise FileFormatError(f"{path} is damaged: its checksum does not fit; build it anew.")
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != header["tokenizer"]:
            raise StateError(f"{what} were built with another tokenizer; all models must share one. Build them anew.")
        if model is not None:
            width = model.config.get_text_config(decoder=True).hidden_size
            if width != header["arrays"]["keys"]["shape"][1]:
                raise StateError(
                    f"{what} have keys {header['arrays']['keys']['shape'][1]} wide, the model is {width} wide; use the "
                    "model that they were built with."
                )
            check_fingerprint(model, "host", header["model"], what)
        return cls(folder, header)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> TargetExample:
        if not self.has_targets:
            raise InputError(
                f"{self.folder} was built with neighbours=None and has no targets; build it with a number."
            )
        index = range(len(self))[index]
        begin, end = int(self.starts[index]), int(self.starts[index + 1])
        bounds = torch.from_numpy(np.array(self.rows[begin - index : end - index]))
        lengths = bounds.diff()
        place = torch.arange(int(lengths.max())) < lengths[:, None]
        flat = slice(int(bounds[0]), int(bounds[-1]))
        tokens = torch.zeros(place.shape, dtype=torch.int32)
        probs = torch.zeros(place.shape, dtype=torch.float16)
        tokens[place] = torch.from_numpy(np.array(self.tokens[flat]))
        probs[place] = torch.from_numpy(np.array(self.probs[flat]))
        ids = torch.from_numpy(self.ids[begin:end].astype(np.int64))
        return {"input_ids": ids, "tokens": tokens, "probs": probs}

    def nearest(self, queries: Tensor, count: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest keys, exactly up to rounding in float32.

        Args:
            queries: (Q, d), as `feed_forward_inputs` gives them. exclude: (Q,) int64, an entry that does not count.

        Returns: squared distances (Q, c) float32, rising, and entries (Q, c) int64; c is count, or all that there are.
        """
        total = len(self.keys)
        count = min(count, total - (exclude is not None))

        def block(start: int) -> Tensor:
            return torch.from_numpy(np.array(self.keys[start : start + _KEYS], dtype=np.float32)).to(queries.device)

        # |q|^2 + |k|^2 - 2 qk cancels badly where all keys share a large component; distances do not need it.
        shift = block(0).mean(0)
        queries = queries.float() - shift
        best = torch.empty(len(queries), 0, device=queries.device)
        entries = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, total, _KEYS):
            keys = block(start) - shift
            squares = queries.square().sum(-1, keepdim=True) + keys.square().sum(-1)
            distances = torch.addmm(squares, queries, keys.T, alpha=-2)
            if exclude is not None:
                inside = ((exclude >= start) & (exclude < start + len(keys))).nonzero().squeeze(-1)
                distances[inside, exclude[inside] - start] = float("inf")
            near, at = distances.topk(min(count, len(keys)), largest=False)
            best, entries = torch.cat([best, near], -1), torch.cat([entries, at + start], -1)
            best, kept = best.topk(min(count, best.shape[-1]), largest=False)
            entries = entries.gather(-1, kept)
        return best.clamp_min(0), entries

    def distribution(self, distances: Tensor, entries: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Softmax of -distance / temperature summed per next token, from `nearest`; tokens and probabilities (Q, c)."""
        values = torch.from_numpy(self.next_tokens[entries.cpu().numpy()]).to(entries.device)
        return sum_by_token(values, (-distances / temperature).softmax(-1))


def feed_forward_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Input of the last feed-forward block, (B, T, d), for input_ids (B, T): the keys and queries of a datastore.

    Raises:
        HostError: a memory is attached, or the last layer has no child of a known name.
    """
    if is_attached(model):
        raise HostError(f"{type(model).__name__} has a memory; a datastore needs the host alone: mnemic.detach(model).")
    anatomy = examine(model)
    children = dict(anatomy.layers[-1].named_children())
    found = [name for name in _FEED_FORWARD if name in children]
    if len(found) != 1:
        raise HostError(
            f"The layers of {type(model).__name__} have no feed-forward block called {', '.join(_FEED_FORWARD)} "
            f"(children: {', '.join(children)}); use a datastore model such as GPT-2, Llama or Qwen."
        )
    seen: list[Tensor] = []

    def keep(_module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = children[found[0]].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        # The stack without the vocabulary head, which nobody reads.
        anatomy.stack(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    return seen[0].reshape(*input_ids.shape, -1)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of which id each token has."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _check_documents(model: Any, tokenizer: Any, documents: Sequence[Sequence[int]]) -> None:
    longest, size = examine(model).max_positions, model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise InputError(f"The tokenizer has {len(tokenizer)} tokens, the model {size}; use the model's own tokenizer.")
    for i, document in enumerate(documents):
        if len(document) < 2 or (longest is not None and len(document) > longest):
            raise InputError(f"Document {i} has {len(document)} tokens; expected 2 to {longest}. Cut longer ones.")
        if min(document) < 0 or max(document) >= len(tokenizer):
            raise InputError(f"Document {i} has ids outside of the tokenizer's {len(tokenizer)}; encode it with that.")
    if sum(len(d) - 1 for d in documents) < 2:
        raise InputError("Neighbours need at least two positions with a next token.")


def _write_entries(
    room: Path, header: dict[str, Any], model: Any, documents: Sequence[Sequence[int]], batch_size: int, bar: Progress
) -> None:
    starts = np.cumsum([0, *(len(d) for d in documents)], dtype=np.int64)
    _write(room, header, "ids", np.concatenate([np.asarray(d, dtype=np.int32) for d in documents]))
    _write(room, header, "next_tokens", np.concatenate([np.asarray(d[1:], dtype=np.int32) for d in documents]))
    _write(room, header, "starts", starts)
    total, width = int(starts[-1]) - len(documents), model.config.get_text_config(decoder=True).hidden_size
    dtype = np.float32 if model.dtype == torch.float32 else np.float16
    keys = np.memmap(room / "keys.bin", dtype=dtype, mode="w+", shape=(total, width))
    # By length, so that a batch is hardly padded.
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    task, training = bar.add_task("keys", total=total), model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            rows = [torch.tensor(list(documents[i])) for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            lengths = torch.tensor([len(r) for r in rows], device=model.device)
            with torch.no_grad():
                mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
                inputs = feed_forward_inputs(model, ids, mask).float().cpu().numpy()
            if not np.isfinite(inputs.astype(dtype)).all():
                raise HostError(f"Keys of {type(model).__name__} do not fit {np.dtype(dtype)}; load it in float32.")
            for i, found in zip(batch, inputs, strict=True):
                begin, count = int(starts[i]) - i, len(documents[i]) - 1
                keys[begin : begin + count] = found[:count]
                bar.advance(task, count)
    finally:
        model.train(training)
    keys.flush()
    header["arrays"]["keys"] = {"dtype": np.dtype(dtype).name, "shape": [total, width], "crc32": None}


def _write_targets(room: Path, header: dict[str, Any], store: NeighbourTargets, device: Any, bar: Progress) -> None:
    total = len(store.keys)
    near: Near = store.nearest if header["search"] == "exact" else _faiss_search(store)
    task = bar.add_task("neighbours", total=total)
    rows = np.zeros(total + 1, dtype=np.int64)
    with open(room / "tokens.bin", "wb") as token_file, open(room / "probs.bin", "wb") as prob_file:
        for start in range(0, total, _QUERIES):
            queries = torch.from_numpy(np.array(store.keys[start : start + _QUERIES], dtype=np.float32)).to(device)
            own = torch.arange(start, start + len(queries), device=device)
            tokens, probs = store.distribution(*near(queries, header["neighbours"], own), header["temperature"])
            if not bool(probs.isfinite().all()):
                raise ConfigError("faiss found no neighbour for some position; use search='exact'.")
            probs = probs.half()
            kept = probs > 0
            rows[start + 1 : start + 1 + len(queries)] = kept.sum(-1).cpu().numpy()
            tokens[kept].cpu().numpy().astype(np.int32).tofile(token_file)
            probs[kept].cpu().numpy().tofile(prob_file)
            bar.advance(task, len(queries))
    rows = rows.cumsum()
    _write(room, header, "rows", rows)
    for name, dtype in (("tokens", "int32"), ("probs", "float16")):
        crc32 = _crc32(room / f"{name}.bin")
        header["arrays"][name] = {"dtype": dtype, "shape": [int(rows[-1])], "crc32": crc32}


def _faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("search='faiss' needs faiss: pip install 'mnemic[knn]'.") from None
    return faiss


def _faiss_search(store: NeighbourTargets) -> Near:
    """Like `store.nearest`, approximate: an inverted file over product-quantised keys."""
    faiss, (total, width) = _faiss(), store.keys.shape
    if total < _POINTS * 256:
        raise ConfigError(
            f"faiss needs at least {_POINTS * 256} positions to learn its index, got {total}; use 'exact'."
        )
    parts = max(m for m in range(1, _PARTS + 1) if width % m == 0)
    centroids = min(_CENTROIDS, total // _POINTS)
    index = faiss.index_factory(width, f"IVF{centroids},PQ{parts}")
    index.nprobe = min(_PROBES, centroids)
    # A sample spread over the corpus, as large as faiss would use at most.
    step = max(1, total // (256 * centroids))
    index.train(np.array(store.keys[::step], dtype=np.float32))
    for start in range(0, total, _KEYS):
        index.add(np.array(store.keys[start : start + _KEYS], dtype=np.float32))

    def search(queries: Tensor, count: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        found = index.search(queries.cpu().numpy(), count + (exclude is not None))
        distances, entries = (torch.from_numpy(a).to(queries.device) for a in found)
        # Too few neighbours in the probed lists: faiss fills up with -1.
        distances = distances.masked_fill(entries < 0, float("inf"))
        if exclude is not None:
            distances = distances.masked_fill(entries == exclude[:, None], float("inf"))
        distances, kept = distances.topk(min(count, total - (exclude is not None)), largest=False)
        return distances, entries.gather(-1, kept).clamp_min(0)

    return search


def _write(room: Path, header: dict[str, Any], name: str, array: np.ndarray) -> None:
    array.tofile(room / f"{name}.bin")
    crc32 = _crc32(room / f"{name}.bin")
    header["arrays"][name] = {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": crc32}


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value


def _checksum(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
