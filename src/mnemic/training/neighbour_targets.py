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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import ConfigError, HostError, InputError, StateError
from ..hosts import is_attached
from ..hosts.anatomy import examine
from ..hosts.fingerprint import check_fingerprint, fingerprint
from ..ops.mixture import sum_by_token
from .neighbour_files import FORMAT_VERSION, checksum, crc32_of, read_header, write_array
from .neighbour_search import QUERIES, Near, approximate, check_faiss, nearest

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")

Search = Literal["exact", "faiss"]


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
            search: exact, N^2 d multiplications on the model's device; or faiss, approximate (inverted lists), on the
                CPU and in memory.
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
            check_faiss()
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
            header["checksum"] = checksum(header)
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
        header = read_header(folder)
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
        """See `neighbour_search.nearest`; queries (Q, d) as `feed_forward_inputs` gives them."""
        return nearest(self.keys, queries, count, exclude)

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
    write_array(room, header, "ids", np.concatenate([np.asarray(d, dtype=np.int32) for d in documents]))
    write_array(room, header, "next_tokens", np.concatenate([np.asarray(d[1:], dtype=np.int32) for d in documents]))
    write_array(room, header, "starts", starts)
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
    near: Near = store.nearest if header["search"] == "exact" else approximate(store.keys)
    task = bar.add_task("neighbours", total=total)
    rows = np.zeros(total + 1, dtype=np.int64)
    with open(room / "tokens.bin", "wb") as token_file, open(room / "probs.bin", "wb") as prob_file:
        for start in range(0, total, QUERIES):
            queries = torch.from_numpy(np.array(store.keys[start : start + QUERIES], dtype=np.float32)).to(device)
            own = torch.arange(start, start + len(queries), device=device)
            tokens, probs = store.distribution(*near(queries, header["neighbours"], own), header["temperature"])
            probs = probs.half()
            kept = probs > 0
            rows[start + 1 : start + 1 + len(queries)] = kept.sum(-1).cpu().numpy()
            tokens[kept].cpu().numpy().astype(np.int32).tofile(token_file)
            probs[kept].cpu().numpy().tofile(prob_file)
            bar.advance(task, len(queries))
    rows = rows.cumsum()
    write_array(room, header, "rows", rows)
    for name, dtype in (("tokens", "int32"), ("probs", "float16")):
        crc32 = crc32_of(room / f"{name}.bin")
        header["arrays"][name] = {"dtype": dtype, "shape": [int(rows[-1])], "crc32": crc32}
