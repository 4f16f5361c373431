"""Chunked-FIFO RMAT: Recurrent Memory-Augmented Transformers with Chunked Attention (2025, arXiv 2507.00453).

A block adds up attention over its segment, attention inside chunks of C tokens, and attention to a bank M of its own:
the last m summaries of chunks, oldest first, written with a gate. x the attention's input, E the block's output:

    read     A_g = causal attention of x;  A_c = the same among tokens i, j with floor(i / C) = floor(j / C)
             A_m = attention(x W_q; LN(M) W_k, LN(M) W_v), without positions; 0 while the bank is empty
             y = residual stream + W_g A_g + W_c A_c + W_m A_m
    write    at the end of a segment, for each chunk j in order, c_j = mean of E over it, m_old the newest row:
             g = sigmoid(W [c_j ; m_old] + b);  m_new = g c_j + (1 - g) m_old;  M <- last m rows of [M ; m_new]

Of the paper only abstract and introduction were at hand, without code or numbers: the banks of each block, the fusion,
the gate's form and all sizes are our reading.

Decisions:
- "Global attention" reaches over the segment: without quadratic growth it can mean nothing else. It is the host's own.
- One matrix on [A_g ; A_c ; A_m] is three on the parts: that of A_g is the host's.
- `paths`: "all"; "linear" has no A_g: the host's own attention is what stays inside chunks, and a segment read at once
  costs T (C + m); "memory" adds A_m alone, times tanh of a gate from 0, to a host that exists (preset "attach").
- `share_qkv`: A_c from the host's queries, keys and values, with an output matrix of its own.
- LN(M) has no weights: the projections have some. b starts at 1, so that new content dominates.
- `candidate`: the chunk's mean, its "last" token, or every "token" of its own (a loop over tokens at each commit).
- Rows reach back m C tokens (m with "token"): a fact older than that is found only as far as gates have passed it on.
- Gradients go through the bank as far as the training's truncation lets them. Cut at every segment (`Truncation("tail",
  0)`, the card's "detached") the gate learns nothing, and recall ends where the rows do.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.attention import attend
from ...ops.gated_fifo import push
from ...ops.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class ChunkedFIFOConfig(MemoryConfig):
    name = "chunked-fifo"
    presets = {"attach": {"paths": "memory"}}

    chunk: int = option(64, "tokens C of a chunk", minimum=1)
    num_rows: int = option(128, "rows m of a block's bank", minimum=0)
    candidate: Literal["mean", "last", "token"] = option(
        "mean", "what is written: the mean of each chunk, its last token, or every token"
    )
    paths: Literal["all", "linear", "memory"] = option(
        "all", "segment, chunk and memory; chunk and memory; or the host's own attention and memory behind a gate"
    )
    share_qkv: bool = option(False, "paths='all': the chunk's attention uses the host's queries, keys and values")
    gate_bias: float = option(1.0, "start of the write gate's bias b")

    def validate(self) -> None:
        if self.share_qkv and self.paths != "all":
            raise ConfigError(f"chunked-fifo: share_qkv is for paths='all'; paths={self.paths!r} has nothing to share.")
        if not self.num_rows and self.paths == "memory":
            raise ConfigError("chunked-fifo: paths='memory' without rows is no memory; give num_rows at least 1.")


class ChunkedFIFO(Memory):
    name = "chunked-fifo"
    config_class = ChunkedFIFOConfig
    paper = "Recurrent Memory-Augmented Transformers with Chunked Attention (2025, arXiv 2507.00453)"
    state_size = "L * num_rows * d"
    config: ChunkedFIFOConfig

    def __init__(self, config: ChunkedFIFOConfig, host: HostSpec):
        super().__init__(config, host)
        factory = {"dtype": host.dtype, "device": host.device}
        layers, width, inner = host.num_layers, host.hidden_size, host.num_heads * host.head_dim
        normal = lambda *s: nn.Parameter(torch.randn(layers, *s, **factory) * s[0] ** -0.5)  # noqa: E731
        self.chunk_qkv = self.chunk_out = self.memory_qkv = self.memory_out = self.write = self.gate = None
        if config.paths == "all":
            self.chunk_qkv = None if config.share_qkv else normal(width, 3 * inner)
            self.chunk_out = normal(inner, width)
        if config.num_rows:
            self.memory_qkv, self.memory_out = normal(width, 3 * inner), normal(inner, width)
            self.write = normal(2 * width, width)
            self.write_bias = nn.Parameter(torch.full((layers, width), config.gate_bias, **factory))
            if config.paths == "memory":
                self.gate = nn.Parameter(torch.zeros(layers, **factory))

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        alone = self.config.paths == "linear"
        return frozenset(("attention", layer) for layer in self.layers) if alone else frozenset()

    @property
    def identity_at_attach(self) -> bool:
        return self.config.paths == "memory"

    def initial_state(self, batch_size: int) -> State:
        """Per layer "<layer>/bank" (B, m, d), newest last; "count" (B,): rows written so far, dropped ones included."""
        if self.memory_qkv is None:
            return State()
        shape = (batch_size, self.config.num_rows, self.host.hidden_size)
        state = {f"{layer}/bank": self.memory_qkv.new_zeros(shape) for layer in self.layers}
        return State({**state, "count": torch.zeros(batch_size, dtype=torch.long, device=self.memory_qkv.device)})

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Per layer keys and values of the bank, (B, H, m, e)."""
        if self.memory_qkv is None:
            return {}
        reads, inner = {}, self.host.num_heads * self.host.head_dim
        for layer in self.layers:
            bank = F.layer_norm(state[f"{layer}/bank"], (self.host.hidden_size,))
            parts = (bank @ self.memory_qkv[layer][:, inner:]).chunk(2, dim=-1)
            reads |= {f"{layer}/{n}": self._heads(p) for n, p in zip(("keys", "values"), parts, strict=True)}
        return reads

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        """The host's own; inside chunks with paths="linear". With share_qkv the chunk's is left for `residual`."""
        if self.config.paths == "linear":
            return self._host_chunks(call, step)
        if self.config.share_qkv:
            step.add_note(chunk=self._host_chunks(call, step))
        return call.plain()

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        layer = step.layer
        if self.chunk_out is not None:
            inside = step.note("chunk", layer) if self.chunk_qkv is None else self._own_chunks(source, step)
            assert inside is not None
            x = x + (inside.flatten(2) @ self.chunk_out[layer]).to(x.dtype)
        if self.memory_qkv is None:
            return x
        assert self.memory_out is not None
        query = self._heads(source @ self.memory_qkv[layer][:, : self.memory_out.shape[1]])
        filled = self._filled(step.state("count"))[:, None, None]
        keys, values = step.read(f"{layer}/keys"), step.read(f"{layer}/values")
        read, _ = attend(query, keys.to(query.dtype), values.to(query.dtype), filled, self.host.head_dim**-0.5)
        part = (read.transpose(1, 2).flatten(2) @ self.memory_out[layer]).to(x.dtype)
        return x + part if self.gate is None else x + torch.tanh(self.gate[layer]) * part

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        if self.config.num_rows:
            step.keep(outputs=x)
        return x

    def commit(self, state: State, segment: Segment) -> State:
        if self.write is None:
            return state
        outputs = torch.stack([segment.trace[layer]["outputs"] for layer in self.layers])
        banks = torch.stack([state[f"{layer}/bank"] for layer in self.layers])
        new = self._candidates(outputs).to(banks.dtype)
        after = push(new, banks, self.write, self.write_bias)
        count = state["count"] + new.shape[2]
        return State({**{f"{layer}/bank": after[layer] for layer in self.layers}, "count": count})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Share of the rows that are filled; per block the norm of a filled row and, with one, the gate."""
        if self.write is None:
            return {}
        after = self.commit(state, segment)
        filled = self._filled(after["count"])
        found = {"filled": filled.float().mean()}
        for layer in self.layers:
            found[f"block{layer}/row_norm"] = after[f"{layer}/bank"].detach().float().norm(dim=-1)[filled].mean()
            if self.gate is not None:
                found[f"block{layer}/gate"] = torch.tanh(self.gate[layer].detach().float())
        return found

    def _candidates(self, outputs: Tensor) -> Tensor:
        """What is written of a segment's outputs (L, B, T, d), oldest first: (L, B, n, d)."""
        if self.config.candidate == "token":
            return outputs
        chunks = outputs.split(self.config.chunk, dim=2)
        picked = [c[:, :, -1] if self.config.candidate == "last" else c.mean(2) for c in chunks]
        return torch.stack(picked, dim=2)

    def _host_chunks(self, call: AttentionCall, step: Step) -> Tensor:
        """The host's attention, (B, T, H, e), among tokens of one chunk; memory tokens stay in sight of all."""
        tokens, chunk = call.query.shape[2], self.config.chunk
        if self._foldable(step):
            number = -(-tokens // chunk)
            mask = torch.ones(chunk, chunk, dtype=torch.bool, device=call.query.device).tril()[None, None]
            if call.mask is not None:
                # Each chunk's part of what the host lets its tokens see; padding sees itself, as all that has a key.
                mask = F.pad(call.bool_mask(), (0, number * chunk - tokens) * 2) | torch.eye(
                    number * chunk, dtype=torch.bool, device=mask.device
                )
                mask = mask.unflatten(3, (number, chunk)).unflatten(2, (number, chunk)).diagonal(dim1=2, dim2=4)
                mask = mask.permute(0, 4, 1, 2, 3).expand(len(call.query), -1, -1, -1, -1).flatten(0, 1)
            folded = [_fold(x, chunk) for x in (call.query, call.keys, call.values)]
            out = call.plain(query=folded[0], keys=folded[1], values=folded[2], mask=mask)
            return out.unflatten(0, (-1, number)).flatten(1, 2)[:, :tokens]
        outside = (step.places < 0)[:, None, :, None] | (call.key_places < 0)[:, None, None]
        return call.plain(mask=call.bool_mask() & (self._together(step) | outside))

    def _own_chunks(self, source: Tensor, step: Step) -> Tensor:
        """Attention among tokens of one chunk by weights of its own, (B, T, H, e), from the attention's input."""
        assert self.chunk_qkv is not None
        parts = (source @ self.chunk_qkv[step.layer]).chunk(3, dim=-1)
        query, keys, values = (self._heads(part) for part in parts)
        places = (step.places - self._start(step)).clamp_min(0)
        rotation = step.host.rotary(places, step.layer)
        if rotation is not None:
            query, keys = rotate(query, *rotation), rotate(keys, *rotation)
        scale = self.host.head_dim**-0.5
        if self._foldable(step):
            tokens, chunk = query.shape[2], self.config.chunk
            q, k, v = (_fold(x, chunk) for x in (query, keys, values))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
            return out.unflatten(0, (len(query), -1)).flatten(1, 2)[:, :tokens]
        keys = step.features("chunk_keys", keys.transpose(1, 2)).transpose(1, 2)
        values = step.features("chunk_values", values.transpose(1, 2)).transpose(1, 2)
        return attend(query, keys, values, self._together(step), scale)[0].transpose(1, 2)

    @staticmethod
    def _foldable(step: Step) -> bool:
        """The step is one segment from its start, so that chunks can be cut off it and stand side by side."""
        return not (step.streaming or step.num_read or step.num_write)

    @staticmethod
    def _start(step: Step) -> Tensor:
        """(B or 1, 1): the number in the stream of the open segment's first token."""
        keys = step.places if step.frame.key_places is None else step.frame.key_places
        return keys.masked_fill(keys < 0, torch.iinfo(keys.dtype).max).amin(1, keepdim=True)

    def _together(self, step: Step) -> Tensor:
        """(B or 1, 1, T, K) bool: a text token, and one of its chunk that is not after it."""
        keys = step.places if step.frame.key_places is None else step.frame.key_places
        start, chunk = self._start(step), self.config.chunk
        query, key = (step.places - start)[:, None, :, None], (keys - start)[:, None, None]
        return (key >= 0) & (key <= query) & (key // chunk == query // chunk)

    def _filled(self, count: Tensor) -> Tensor:
        """(B, m) bool."""
        rows = self.config.num_rows
        return torch.arange(rows, device=count.device) >= rows - count[:, None]

    def _heads(self, x: Tensor) -> Tensor:
        """(B, n, H e) -> (B, H, n, e)."""
        return x.unflatten(-1, (self.host.num_heads, -1)).transpose(1, 2)


def _fold(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, e) -> (B n, H, C, e), chunks as rows; the last is filled up with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(0, 1)
