"""RETRO: Improving language models by retrieving from trillions of tokens (2021, arXiv 2112.04426).

The text is cut in chunks of m tokens, counted from the start of the stream. Whenever a chunk is complete, its k nearest
chunks in a database, each with its continuation (r = 2m tokens), are encoded in the light of the chunk, and tokens read
them by chunked cross-attention in some blocks. x is what such a block was given, a what its attention made of it:

    search   RET(u) = k nearest neighbours of embed(C_u)
    encode   E_u = Enc(RET(u), H_u),   H_u = x + a of chunk u in the first such block
    read     h = x + a;   token i of chunk u + 1, and the last of chunk u:
             x <- h + W_O softmax(W_Q norm(h) . W_K E_u) W_V E_u      one softmax over all k r tokens

Decisions:
- The distance from a token to a neighbour's token is a rotation of queries and keys by place in the window (m - 1 + i)
  and in the neighbour (i'), on the first 32 coordinates of a head, where the paper has a table of biases.
- `null_kv`: a learned key and value in every set, so that a chunk without neighbours reads something defined.
- The preset "attach" starts W_O at zero, so the host is unchanged; the paper does not say. `reading = False` is
  RETRO[OFF]: nothing is searched, encoded or read, and nothing of the state changes.
- Neighbours from the document that a row reads are left out, where it is known: `reading_documents` gives the state to
  start from. Perplexity is honest only with it, or with a database of other text.
- Hosts that normalise the output of their attention (gemma2, olmo2) normalise the two parts together.
- The state carries the open chunk (its ids, and its H) and the last complete chunk's keys and values of every block,
  so a token costs one read, not an encoding. The database is shared, read only and no part of the state.
- Neighbours are searched with a cheap embedder that needs no other model (see `store.embedding`), where the paper has
  BERT; another is named by the option `embedder`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import store
from ...core.errors import ConfigError, InputError, StateError
from ...core.memory import HostSpec, Memory, MemoryConfig, option
from ...core.state import State
from ...core.step import Step
from ...ops import chunked_cross_attention as cca
from ...ops.neighbour_encoder import NeighbourEncoder
from ...store.embedding import TOKEN_SIGNS, embedder

_ROTATED = 32


@dataclass(frozen=True, kw_only=True)
class RetroConfig(MemoryConfig):
    name = "retro"
    presets = {"attach": {"identity_start": True}}

    database: str | None = option(None, "folder of the chunk database, from `build_database`")
    chunk_length: int = option(64, "tokens m of a chunk, as in the database", minimum=1)
    neighbours: int = option(2, "neighbours k of a chunk", minimum=1)
    memory_layers: tuple | None = option(
        None, "blocks that read; None: every third from the sixth on, in shallow hosts from the middle on"
    )
    num_heads: int | None = option(None, "heads of the cross-attention; None: those of the host", minimum=1)
    encoder_width: int | None = option(None, "width of the neighbour encoder; None: the host's, at most 896", minimum=2)
    encoder_layers: int = option(2, "layers of the neighbour encoder", minimum=1)
    encoder_heads: int | None = option(None, "heads of the neighbour encoder; None: at most 16", minimum=1)
    null_kv: bool = option(True, "a learned key and value that every token may read besides the neighbours")
    identity_start: bool = option(False, "W_O starts at zero: the host is unchanged at first")
    reading: bool = option(True, "False: RETRO[OFF], the same weights without retrieval")
    embedder: str = option(TOKEN_SIGNS, "name of the embedder, as in the database")
    tokenizer: str | None = option(None, "fingerprint of the tokenizer that the database must have; None: not checked")
    index: Literal["exact", "faiss"] = option("exact", "compare all keys, or ask the index of `store.build_index`")


class ChunkReader(nn.Module):
    """Chunked cross-attention of one block, without its softmax."""

    def __init__(self, width: int, heads: int, encoder_width: int, null: bool, zero: bool, **factory):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, **factory)
        self.query = nn.Linear(width, width, bias=False, **factory)
        self.key_value = nn.Linear(encoder_width, 2 * width, bias=False, **factory)
        self.out = nn.Linear(width, width, bias=False, **factory)
        if zero:
            nn.init.zeros_(self.out.weight)
        shape = (2, heads, width // heads)
        self.null = nn.Parameter(torch.randn(shape, **factory) * shape[2] ** -0.5) if null else None

    def queries(self, hidden: Tensor, angles: Tensor) -> Tensor:
        """(B, T, d), (B, T, n) -> (B, T, H, e)."""
        return cca.rotate(self.query(self.norm(hidden)).unflatten(-1, (self.heads, -1)), angles[:, :, None])

    def keys_values(self, encoded: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, S, w), (S, n) -> keys and values (B, C, H, S', e), the null entry first."""
        keys, values = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.key_value(encoded).chunk(2, -1))
        keys = cca.rotate(keys, angles)
        return (keys, values) if self.null is None else cca.add_null(keys, values, None, cca.Null(*self.null))[:2]


class Retro(Memory):
    name = "retro"
    config_class = RetroConfig
    paper = "Improving language models by retrieving from trillions of tokens (2021, arXiv 2112.04426)"
    state_size = "d * (chunk_length + 2 * len(memory_layers) * (2 * neighbours * chunk_length + null_kv))"
    limits: ClassVar[Mapping[str, str]] = {
        "input embeddings": "chunks are searched by their token ids",
        "memory across segments": "a token reads the neighbours of the last chunk; earlier text asks no more",
    }
    config: RetroConfig

    def __init__(self, config: RetroConfig, host: HostSpec):
        super().__init__(config, host)
        width, factory = host.hidden_size, {"dtype": host.dtype, "device": host.device}
        self._heads = _heads("num_heads", config.num_heads or host.num_heads, width)
        inner = config.encoder_width or min(width, 896)
        fitting = [h for h in (16, 8, 4, 2, 1) if inner % (2 * h) == 0] or [1]
        self._encoder_heads = _heads("encoder_heads", config.encoder_heads or fitting[0], inner)
        self.encoder = NeighbourEncoder(width, inner, self._encoder_heads, config.encoder_layers, **factory)
        self._inner = inner
        self.readers = nn.ModuleDict(
            {
                str(i): ChunkReader(width, self._heads, inner, config.null_kv, config.identity_start, **factory)
                for i in self.layers
            }
        )

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        if chosen is None:
            # The paper counts from 1: 6, 9, 12 of 12 blocks; deeper ones start at 9.
            return tuple(range(8 if total > 12 else min(5, total // 2), total, 3))
        if (
            not chosen
            or any(not isinstance(i, int) or not 0 <= i < total for i in chosen)
            or sorted({*chosen}) != [*chosen]
        ):
            raise ConfigError(f"retro: memory_layers = {chosen!r}, expected increasing block numbers below {total}.")
        return chosen

    @property
    def identity_at_attach(self) -> bool:
        return self.config.identity_start or not self.config.reading

    # State

    def initial_state(self, batch_size: int) -> State:
        """`document` (B,): the database's document that each row reads, -1 for none.

        Of block -1: ids (B, m) of the open chunk, tokens (B,) read so far, mask (B, S') of the last chunk's keys. Of
        the first block: hidden (B, m, d) of the open chunk. Of every block: keys and values (B, H, S', e) of the last
        chunk. S' is k 2m and the null entry.
        """
        m, width, weight = self.config.chunk_length, self.host.hidden_size, self.encoder.norm.weight
        entries = self.config.neighbours * 2 * m + self.config.null_kv
        whole = {"dtype": torch.long, "device": weight.device}
        tensors = {
            "document": torch.full((batch_size,), -1, **whole),
            "-1/ids": torch.zeros(batch_size, m, **whole),
            "-1/tokens": torch.zeros(batch_size, **whole),
            "-1/mask": torch.zeros(batch_size, entries, dtype=torch.bool, device=weight.device),
            f"{self.layers[0]}/hidden": weight.new_zeros(batch_size, m, width),
        }
        for layer in self.layers:
            for name in ("keys", "values"):
                tensors[f"{layer}/{name}"] = weight.new_zeros(batch_size, self._heads, entries, width // self._heads)
        return State({n: t.detach() for n, t in tensors.items()})

    def reading_documents(self, documents: Tensor) -> State:
        """The state of new rows that read documents (B,) int64 of the database (by their order in the build), so that
        their own chunks are not found; -1 for text that is not in it."""
        state = self.initial_state(len(documents))
        return State({**state, "document": documents.to(state["document"])})

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """Neighbours of the chunks that this step completes, C at most in a row, and who reads which chunk.

        A row's sets are the last chunk of before (0) and those completed now (1 .. C); `done` says how many they are.
        """
        if not self.config.reading:
            return {}
        if tokens.dim() != 2:
            raise InputError("retro searches its database by token ids; give input_ids instead of inputs_embeds.")
        m, (batch, width), device = self.config.chunk_length, tokens.shape, tokens.device
        before = step.running("tokens")
        real = None if step.real is None else step.text(step.real)
        take = torch.full_like(before, width) if real is None else real.sum(1)
        held = before % m
        done = (held + take) // m
        most = int(done.max())

        # Columns of [open chunk | new tokens], for the m tokens from each row's `first` on; -1 where there are none.
        def columns(first: Tensor, count: int, end: Tensor) -> Tensor:
            place = first[:, None] + torch.arange(count, device=device)
            column = torch.where(place < held[:, None], place, m + place - held[:, None])
            return column.masked_fill(place >= end[:, None], -1)

        kept = columns(done * m, m, held + take)
        chunks = columns(torch.zeros_like(done), most * m, done * m)
        ids = torch.cat([step.running("ids"), tokens], dim=1)
        step.leave(ids=_picked(ids, kept), tokens=before + take)

        mask = step.running("mask")[:, None]
        asked = (chunks >= 0).view(batch, most, m)[:, :, :1].squeeze(-1)
        found = torch.zeros(batch, most, self.config.neighbours, 2 * m, dtype=torch.long, device=device)
        known = torch.zeros_like(found, dtype=torch.bool)
        if most:
            rows = asked.nonzero()[:, 0]
            found[asked], known[asked] = self._search(
                _picked(ids, chunks).view(batch, most, m)[asked], state["document"][rows]
            )
            new = known.flatten(2)
            new = nn.functional.pad(new, (1, 0), value=True) if self.config.null_kv else new
            mask = torch.cat([mask, new], dim=1)
            step.leave(mask=mask[torch.arange(batch, device=device), done])

        after = held[:, None] + 1 + torch.arange(width, device=device)
        reads = before[:, None] - held[:, None] + after >= m
        reads = reads if real is None else reads & real
        around = (step.num_read, step.num_write)
        layout = cca.lay_out(nn.functional.pad((after // m).masked_fill(~reads, -1), around, value=-1), most + 1)
        # No tensor stands for all sets, and for none: where nothing is read, they are not looked at.
        cells = torch.zeros(0, dtype=torch.long, device=device) if layout.cells is None else layout.cells
        silent = nn.functional.pad(~reads, around, value=True)
        queries, keys, encoder = self._angles(device)
        return {
            "done": done, "kept": kept, "chunks": chunks, "neighbours": found, "known": known, "mask": mask,
            "cells": cells, "source": layout.source, "target": layout.target, "silent": silent,
            "query_angles": queries[nn.functional.pad(after % m, around)], "key_angles": keys,
            "encoder_angles": encoder,
        }  # fmt: skip

    # Sites

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        if self.config.reading:
            step.add_note(input=x)
        return x

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        given = step.note("input", step.layer)
        if given is None:
            return x
        hidden = given + x
        reader = self.readers[str(step.layer)]
        assert isinstance(reader, ChunkReader)
        if step.layer == self.layers[0]:
            self._encode(step.text(hidden), step)
        keys, values, encoded = (
            step.running("keys")[:, None],
            step.running("values")[:, None],
            step.note("encoded", self.layers[0]),
        )
        if encoded is not None:
            new = reader.keys_values(encoded, step.read("key_angles"))
            keys, values = (
                torch.cat([old, n.to(old.dtype)], dim=1) for old, n in zip((keys, values), new, strict=True)
            )
            last = (torch.arange(len(keys), device=keys.device), step.read("done"))
            step.leave(keys=keys[last], values=values[last])
        cells = step.read("cells")
        layout = cca.Layout(
            shape=(hidden.shape[0], hidden.shape[1], keys.shape[1]),
            cells=cells if cells.shape[0] else None,
            source=step.read("source"),
            target=step.read("target"),
            silent=step.read("silent"),
        )
        query = reader.queries(hidden, step.read("query_angles"))
        read = cca.attend(query, keys.to(query.dtype), values.to(query.dtype), layout, step.read("mask"))
        return x + reader.out(read.flatten(-2)).to(x.dtype)

    # Inside

    def _encode(self, hidden: Tensor, step: Step) -> None:
        """Keep H of the open chunk, and note what the neighbours of the completed ones are encoded as, (B, C, S, w)."""
        m, before = self.config.chunk_length, step.running("hidden")
        states = torch.cat([before, hidden.to(before.dtype)], dim=1)
        step.leave(hidden=_picked(states, step.read("kept")))
        chunks, found, known = step.read("chunks"), step.read("neighbours"), step.read("known")
        if not chunks.shape[1]:
            return
        own = _picked(states, chunks).unflatten(1, (-1, m)).flatten(0, 1).to(hidden.dtype)
        embeddings = step.host.embed(found).flatten(0, 1).to(hidden.dtype)
        encoded = self.encoder(embeddings, known.flatten(0, 1), own, step.read("encoder_angles"))
        step.add_note(encoded=encoded.flatten(1, 2).unflatten(0, known.shape[:2]))

    def _search(self, chunks: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours of chunks (n, m), none of `documents` (n,): tokens and mask (n, k, 2m)."""
        database = self.database()
        queries = embedder(self.config.embedder)(chunks, torch.ones_like(chunks, dtype=torch.bool))
        near, _ = database.search(queries, self.config.neighbours, documents.to(queries.device), self.config.index)
        tokens, mask = database.neighbours(near)
        if tokens.numel() and int(tokens.max()) >= self.host.vocab_size:
            raise StateError(
                f"{database.folder} holds token {int(tokens.max())}, the host has {self.host.vocab_size}: it was built "
                "with another tokenizer. Build a database with the host's."
            )
        return tokens.to(chunks.device), mask.to(chunks.device)

    def database(self) -> store.ChunkDatabase:
        """The open database.

        Raises:
            ConfigError: none is named. FileFormatError: it is missing or damaged. StateError: built with another
                chunk length, embedder or tokenizer.
        """
        if self.config.database is None:
            raise ConfigError(
                "retro reads a database of text: give database=FOLDER, made with "
                "mnemic.memories.knowledge.retro.build_database(FOLDER, documents), or reading=False to go without."
            )
        path = Path(self.config.database)
        header = path / store.chunk_database.HEADER
        changed = header.stat().st_mtime_ns if header.is_file() else 0
        expected = (self.config.chunk_length, self.config.embedder, self.config.tokenizer)
        return _opened(path.absolute(), changed, *expected)

    def _angles(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        m, k = self.config.chunk_length, self.config.neighbours
        return _angles(m, k, self.host.hidden_size // self._heads, self._inner // self._encoder_heads, device)


def build_database(
    folder: str | os.PathLike,
    documents: Iterable[Sequence[int]],
    chunk_length: int = 64,
    *,
    embedder_name: str = TOKEN_SIGNS,
    tokenizer: str = "",
    progress: bool = True,
) -> store.ChunkDatabase:
    """Write the database of `documents` (token ids of each) that the option `database` names.

    Args:
        folder: must not exist. chunk_length, embedder_name: as the options chunk_length and embedder will say.
        tokenizer: fingerprint of what made the ids, such as `mnemic.training.neighbour_targets.tokenizer_fingerprint`.

    Raises:
        UnknownNameError: an embedder that is not registered. InputError: see `store.build`.
    """
    return store.build(
        folder, documents, embedder(embedder_name), chunk_length, tokenizer, embedder_name, progress=progress
    )


@lru_cache(maxsize=8)
def _opened(
    path: Path, changed: int, chunk_length: int, embedder_name: str, tokenizer: str | None
) -> store.ChunkDatabase:
    """One open database a process, however many models read it; `changed` tells a rebuilt one."""
    return store.open_database(
        path, chunk_length=chunk_length, embedder=embedder_name, tokenizer=tokenizer, verify=False
    )


@lru_cache(maxsize=8)
def _angles(m: int, k: int, width: int, encoder_width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations of queries (m, n), of keys (k 2m, n), and inside the encoder (2m, n')."""
    queries, keys = cca.rotary(m, 2 * m, k, min(width, _ROTATED))
    _, tokens = cca.rotary(m, 2 * m, 1, min(encoder_width, _ROTATED))
    return queries.to(device), keys.to(device), tokens.to(device)


def _picked(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, n, ...) at columns (B, q), zero where they are -1."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    absent = (columns < 0).view(*columns.shape, *[1] * (x.dim() - 2))
    return x[rows, columns.clamp_min(0)].masked_fill(absent, 0)


def _heads(name: str, heads: int, width: int) -> int:
    if width % heads or width // heads % 2:
        raise ConfigError(f"retro: {name} = {heads} does not cut a width of {width} into heads of even width.")
    return heads
