"""One step of a host with memory: a piece of every row's input, through the host once.

Columns, positions and masks say where the piece stands; a frame carries what the memory reads and what it leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import InputError, UnsupportedError
from ..core.memory import Memory, Segment, Trace
from ..core.state import State
from ..core.step import Frame
from .attention import HostAccess
from .cache import MemoryCache, SegmentKV
from .frame import KEYWORD, Carried, running
from .generation import MemoryGeneration
from .inputs import check_vocabulary
from .layout import Layout, as_attention_mask
from .segments import Piece, columns_of, next_piece
from .sharded import is_sharded, tie
from .sites import Site

Spans = dict[str, tuple[str, int] | None]


@dataclass
class Attachment:
    """What attaching added to a model besides the memory itself.

    stack: the module that runs the blocks. spans: see `layout.host_spans`; companion_spans: those of the memory's
    second model. backend: the attention implementation that the host had. access: what memories may ask of the host.
    replaced: weights that the memory stands in the place of, frozen, and whether they were trained before.
    """

    host_class: type
    layout: Layout
    stack: nn.Module
    spans: Spans
    companion_spans: Spans
    backend: str
    access: HostAccess
    max_positions: int | None
    position_table: bool
    sites: list[Site]
    replaced: list[tuple[nn.Parameter, bool]]
    hooks: list[RemovableHandle]
    step: Callable | None = None


def stand_on(base: Any, mixin: type, memory: Memory, attachment: Attachment) -> None:
    """Make `base` a host with memory: parts, frozen weights, class."""
    base.memory, base.mnemic = memory, attachment
    for parameter, _ in attachment.replaced:
        parameter.requires_grad_(False)
    own = attachment.host_class
    # The subclass keeps the host's name: configs and checkpoints record it.
    base.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})


@dataclass(frozen=True)
class View:
    """Where one piece stands: columns of its tokens, of the keys they see (all up to `limit`), tokens before it.

    hidden: (B,) rows that have no read tokens (`Memory.tokens_there`); shifted: their positions begin without them.
    """

    layout: Layout
    piece: Piece
    columns: Tensor
    limit: int
    origin: Tensor
    batch: int
    hidden: Tensor | None = None
    shifted: bool = False

    def positions(self) -> Tensor | None:
        """Host positions of the tokens, (B, Q); None for the host's own default."""
        layout = self.layout
        inner = self.piece.inner
        if self.piece.fresh and not layout.read and not inner and not layout.continuous and not layout.offset:
            # The only way to the host's mask-free kernels.
            return None
        if layout.continuous:
            positions = self.columns.masked_fill(self.columns == layout.scratch, layout.text) - layout.text
            positions = positions + (0 if self.piece.fresh else self.origin[:, None])
        else:
            positions = layout.position(self.columns.masked_fill(self.columns == layout.scratch, 0)) + layout.offset
            if self.shifted and self.hidden is not None:
                positions = (positions - layout.read * self.hidden[:, None]).clamp_min(0)
        return positions.expand(self.batch, -1)

    def mask(self, spans: Spans, backend: str, dtype: torch.dtype) -> Any:
        """None for plain causal attention, else a 4-D mask, or one for each of the host's layer types."""
        layout, piece = self.layout, self.piece
        if layout.maskless:
            # Four dimensions, so that the host takes it as it is; the memory asks `Step.visible`.
            return self.columns.new_ones(self.batch, 1, 1, 1, dtype=torch.bool)
        narrow = any(span and span[1] < layout.scratch for span in spans.values())
        two_way = piece.inner or (layout.bidirectional and (piece.read or piece.write))
        # Hosts read positions that do not rise as several texts in one row.
        two_way = two_way or (piece.read and not layout.shifting) or self.hidden is not None
        if piece.fresh and not two_way and not layout.window and not (layout.read and narrow):
            return None
        keys = self.keys()

        def mask(span: tuple[str, int] | None) -> Tensor:
            seen = self.visible(self.columns, keys, span)
            # A view: some hosts (XGLM) insist on one mask a row.
            return as_attention_mask(seen, backend, dtype).expand(self.batch, -1, -1, -1)

        if not narrow and not layout.window:
            return mask(None)
        masks = {kind: mask(span) for kind, span in spans.items()}
        return masks.get("", masks)

    def keys(self) -> Tensor:
        """Columns of the keys, (B or 1, K)."""
        if self.piece.fresh or self.layout.own:
            return self.columns
        return torch.arange(self.limit, device=self.columns.device)[None]

    def visible(self, queries: Tensor, keys: Tensor, span: tuple[str, int] | None) -> Tensor:
        """See `Layout.visible`."""
        origin = torch.zeros_like(self.origin[:1]) if self.piece.fresh else self.origin
        seen = self.layout.visible(queries, keys, origin, span)
        if self.hidden is None:
            return seen
        first = self.layout.text
        read = (keys >= first - self.layout.read) & (keys < first)
        return seen & ~(self.hidden[:, None, None] & read[:, None, :] & (queries >= first)[:, :, None])

    def frame(self, memory: Memory, **given: Any) -> Frame:
        """The step's frame, with the tokens' places where the memory takes part inside the blocks."""
        layout, piece = self.layout, self.piece
        frame = Frame(
            memory,
            num_read=layout.read * piece.read,
            num_write=layout.write * piece.write,
            num_inner=layout.inner * piece.inner,
            window=layout.window,
            first=0 if layout.continuous else layout.offset + (layout.text if layout.shifting else 0),
            segment=layout.segment,
            **given,
        )
        if memory.sites - {"tokens"} or memory.uses("fetch"):
            frame.places = layout.places(self.columns, self.origin)
            if not piece.fresh and not layout.own:
                frame.key_places = layout.places(
                    torch.arange(self.limit, device=self.columns.device)[None], self.origin
                )
            text = torch.arange(piece.width) < piece.take[:, None]
            behind = frame.num_inner + frame.num_write
            if frame.num_read or behind:
                text = torch.nn.functional.pad(text, (frame.num_read, behind), value=False)
            if not bool(text.all()):
                frame.real = text.to(self.columns.device)
            if memory.uses("around_block"):
                frame.view = self
        return frame


class MemorySteps(MemoryGeneration):
    """What runs the host over one piece."""

    def _read(
        self,
        cache: MemoryCache,
        layout: Layout,
        piece: Piece,
        tokens: Tensor,
        first: int | None,
        persistent: bool,
        diagnosing: bool = False,
    ) -> tuple[Tensor | None, Segment, dict[str, Tensor]]:
        """Run the host on one piece. Returns the logits from text position `first` on, what the memory kept for its
        commit, and its losses."""
        assert cache.state is not None
        memory, attached = self.memory, self.mnemic
        view = self._view(cache, layout, piece, tokens)
        kv = None if piece.fresh else self._keys_values(cache, view)
        embedded = tokens
        if (memory.write_pass or memory.keeps_embeddings) and tokens.dim() == 2:
            embedded = self.get_input_embeddings()(tokens)
        frame = self._frame(cache, view, embedded if memory.keeps_embeddings else tokens, kv)
        frame.diagnosing = diagnosing
        keep, skip = _logit_columns(layout, piece, first, tokens.device)
        given = self._with_memory_tokens(frame, piece, embedded)
        if memory.write_pass or memory.keeps_embeddings:
            frame.trace[-1] = {"embeddings": given}
        step = attached.step or self._segment_step
        mask = view.mask(attached.spans, attached.backend, self.dtype)
        logits, frame = step(given, frame, view.positions(), mask, kv, keep)
        if is_sharded(self):
            tie(logits, frame)
        if memory.keeps_hidden and frame.hidden is not None:
            frame.trace.setdefault(-1, {})["hidden"] = frame.hidden
        ahead = frame.num_read
        trace = {
            i: {n: t[:, ahead : ahead + piece.width] for n, t in layer.items()} for i, layer in frame.trace.items()
        }
        hidden = frame.hidden
        written = hidden[:, -layout.write :] if piece.write and hidden is not None else None
        if persistent or bool((piece.done & (piece.take < layout.every)).any()):
            trace = _buffer(cache, layout, piece, trace)
        if frame.left:
            cache.state = State({**cache.state, **frame.left})
        logits = None if first is None else logits[:, skip:]
        if memory.uses("logits") and (logits is not None or memory.companion is not None):
            logits = self._mixed(cache, view, tokens, logits, frame)
        start = (cache.seen - cache.open).to(tokens.device)
        return logits, Segment(trace, written, frame.written_trace, start=start), frame.losses

    def _segment_step(
        self,
        tokens: Tensor,
        frame: Frame,
        position_ids: Tensor | None,
        attention_mask: Any,
        kv: SegmentKV | None,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor, Frame]:
        """The host on one piece. This is what `compile_step` compiles."""
        given = {"input_ids": tokens} if tokens.dim() == 2 else {"inputs_embeds": tokens}
        with running(frame):
            output = super().forward(
                **given,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=kv,
                use_cache=kv is not None,
                logits_to_keep=logits_to_keep,
                **{KEYWORD: Carried(frame)},
            )
        return output.logits, frame

    def compile_step(self, **options: Any) -> None:
        """Compile the segment step with `torch.compile(**options)`; `fullgraph=True` works where the host allows it."""
        self.mnemic.step = torch.compile(self._segment_step, **options)

    def _with_memory_tokens(self, frame: Frame, piece: Piece, tokens: Tensor) -> Tensor:
        if not piece.read and not piece.write and not piece.inner:
            return tokens
        embeds = tokens if tokens.dim() == 3 else self.get_input_embeddings()(tokens)
        state = State({**frame.state, **frame.reads} if self.memory.keeps_embeddings else frame.state)
        read, write = self.memory.tokens(state)
        # A memory without a state does not know the number of rows.
        read, write = (part.to(embeds.dtype).expand(embeds.shape[0], -1, -1) for part in (read, write))
        parts = [read] if piece.read else []
        parts.append(embeds)
        if piece.inner:
            inner = self.memory.inner_tokens(state).to(embeds.dtype).expand(embeds.shape[0], -1, -1)
            parts.append(inner.repeat(1, piece.inner, 1))
        if piece.write:
            parts.append(write)
        return torch.cat(parts, dim=1)

    def _view(self, cache: MemoryCache, layout: Layout, piece: Piece, tokens: Tensor) -> View:
        limit = layout.scratch if piece.write else layout.used(int((cache.open + piece.take).max()))
        columns = columns_of(cache, layout, piece, tokens.device)
        origin = (cache.seen - cache.open).to(tokens.device)
        hidden, shifted = None, self.mnemic.position_table and layout.shifting
        if layout.read and self.memory.uses("tokens_there"):
            assert cache.state is not None
            hidden = ~self.memory.tokens_there(cache.state)
        return View(layout, piece, columns, limit, origin, tokens.shape[0], hidden, shifted)

    def _frame(self, cache: MemoryCache, view: View, tokens: Tensor, kv: SegmentKV | None) -> Frame:
        assert cache.state is not None
        if cache.reads is None:
            cache.reads = self._prepared(cache.state)
        frame = view.frame(
            self.memory,
            state=cache.state,
            reads=cache.reads,
            host=self.mnemic.access,
            columns=kv,
            buffers=None if kv is None else cache.buffers,
            training=self.training,
            slot_factors=cache.slot_factors,
        )
        if self.memory.uses("fetch"):
            frame.reads = {**frame.reads, **self.memory.fetch(cache.state, tokens, frame.at(-1))}
        return frame

    def _reach(self, ids: Tensor) -> tuple[set[tuple[str, int]], Tensor | None]:
        """Which sites a first piece of tokens gets to, as (site, block), and the last hidden state."""
        cache, rows = MemoryCache(self.mnemic.layout), ids.shape[0]
        cache.start(self.memory.initial_state(rows), rows)
        lengths = torch.full((rows,), ids.shape[1])
        piece = next_piece(cache, self.mnemic.layout, torch.zeros_like(lengths), lengths, False)
        ids = ids[:, : piece.width]
        if self.memory.keeps_embeddings:
            ids = self.get_input_embeddings()(ids)
        view = self._view(cache, self.mnemic.layout, piece, ids)
        frame = self._frame(cache, view, ids, None)
        frame.reached = set()
        given = self._with_memory_tokens(frame, piece, ids)
        mask = view.mask(self.mnemic.spans, self.mnemic.backend, self.dtype)
        self._segment_step(given, frame, view.positions(), mask, None, 1)
        return frame.reached, frame.hidden

    def _keys_values(self, cache: MemoryCache, view: View, base: int = 0) -> SegmentKV:
        start = int(view.columns[0, 0]) if view.piece.in_step and not view.piece.inner else None
        return SegmentKV(cache, self.mnemic.layout, view.columns.expand(view.batch, -1), start, view.limit, base)

    def _prepared(self, state: State) -> State:
        with running(Frame(self.memory, state, host=self.mnemic.access, training=self.training)):
            return State(self.memory.prepare(state, self.mnemic.access))

    def _mixed(
        self, cache: MemoryCache, view: View, tokens: Tensor, logits: Tensor | None, frame: Frame
    ) -> Tensor | None:
        """The logits with the memory's part; a companion reads the piece's text even where nobody asks for logits."""
        if (companion := self.memory.companion) is not None:
            if tokens.dim() != 2:
                raise InputError(
                    f"The memory {self.memory.name!r} reads token ids with a second model; give input_ids."
                )
            if tokens.device.type == "cpu":
                check_vocabulary(tokens, companion.get_input_embeddings().weight.shape[0])
            if logits is None and view.piece.fresh:
                return None
            layout = replace(view.layout, read=0, write=0, inner=0, offset=0, bidirectional=False, own=False)
            layout = replace(layout, shifting=True, maskless=False)
            own = self._view(cache, layout, replace(view.piece, read=False, write=False, inner=0), tokens)
            kv = None if own.piece.fresh else self._keys_values(cache, own, base=self.memory.host.num_layers)
            backend = str(companion.config._attn_implementation)
            with running(None):
                frame.companion_logits = companion(
                    input_ids=tokens,
                    attention_mask=own.mask(self.mnemic.companion_spans, backend, companion.dtype),
                    position_ids=own.positions(),
                    past_key_values=kv,
                    use_cache=kv is not None,
                    logits_to_keep=1 if logits is None else logits.shape[1],
                ).logits
        return None if logits is None else self.memory.logits(logits, frame.at(-1))

    def _write_pass(self, state: State, reads: State, embeddings: Tensor, start: Tensor) -> dict[int, Trace]:
        """What the memory keeps when the segment runs a second time, for writing; reads: `Memory.prepare` of state."""
        if is_sharded(self):
            raise UnsupportedError(
                f"The memory {self.memory.name!r} runs the layers a second time, and nothing reads what comes out, "
                "so FSDP2 would not gather their weights for the backward pass. Train replicas (DDP) instead."
            )
        given = self.memory.write_input(state, embeddings)
        count = torch.arange(given.shape[1], device=given.device)[None]
        frame = Frame(self.memory, state, reads, host=self.mnemic.access, writing=True, training=self.training)
        frame.places = start[:, None] + count - (given.shape[1] - embeddings.shape[1])
        own = self.memory.write_positions(embeddings.shape[1])
        positions = count if own is None else own.to(given.device)[None]
        positions = positions + (self.memory.first_position(writing=True) if self.memory.host.rotary else 0)
        # Four dimensions, so that the host takes it as it is.
        mask = None if own is None else count.new_ones(given.shape[0], 1, 1, 1, dtype=torch.bool)
        with running(frame):
            self.mnemic.stack(
                inputs_embeds=given,
                attention_mask=mask,
                position_ids=positions.expand(given.shape[0], -1),
                use_cache=False,
                **{KEYWORD: Carried(frame)},
            )
        return frame.trace


def _logit_columns(layout: Layout, piece: Piece, first: int | None, device) -> tuple[int | Tensor, int]:
    """`logits_to_keep` for the host, and how many of what it returns to skip."""
    if first is None:
        return 1, 0
    if not piece.read and not piece.write and not piece.inner:
        return piece.width - first, 0
    ahead = layout.read if piece.read else 0
    return torch.arange(ahead + first, ahead + piece.width, device=device), 0


def _buffer(cache: MemoryCache, layout: Layout, piece: Piece, trace: dict[int, Trace]) -> dict[int, Trace]:
    """Put the piece's trace behind what the rows traced since their last commit; returns the joined trace."""
    whole = bool((piece.done & (piece.take == layout.every)).all())
    if whole:
        return trace
    offset = cache.open % layout.every
    local = torch.arange(piece.width)
    rows, columns = (local < piece.take[:, None]).nonzero(as_tuple=True)
    places = offset[rows] + columns
    for layer, named in trace.items():
        before = cache.trace.get(layer) or State(
            {n: t.new_zeros(t.shape[0], layout.every, *t.shape[2:]) for n, t in named.items()}
        )
        after = {}
        for name, new in named.items():
            index = tuple(i.to(new.device) for i in (rows, places))
            value = new[rows.to(new.device), columns.to(new.device)]
            grads = torch.is_grad_enabled() and (value.requires_grad or before[name].requires_grad)
            after[name] = before[name].index_put(index, value) if grads else before[name].index_put_(index, value)
        cache.trace[layer] = State(after)
    return {layer: dict(state) for layer, state in cache.trace.items()}
