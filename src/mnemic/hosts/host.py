"""Host and memory as one Hugging Face model.

`MemoryHost` is mixed in front of the host's own class, for one instance: the model stays what it was for
`isinstance`, Trainer, PEFT and the names of its weights. Its `forward` cuts the input into segments, runs the host
on each, and threads the state: in training as a value that enters a segment and leaves it, in generation inside the
cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..core.errors import InputError, StateError, UnsupportedError
from ..core.memory import Memory, Segment, Trace
from ..core.state import State
from ..core.truncation import Truncation
from .anatomy import token_embeddings
from .cache import MemoryCache, SegmentKV
from .frame import KEYWORD, Frame
from .generation import MemoryGeneration
from .inputs import check_tokens
from .layout import Layout, as_attention_mask
from .segments import LogitsCollector, Piece, align, columns_of, cut, next_piece

if TYPE_CHECKING:
    from .stream import Stream


@dataclass
class Attachment:
    """What attaching added to a model besides the memory itself. spans: see `layout.host_spans`."""

    host_class: type
    layout: Layout
    spans: dict[str, tuple[str, int] | None]
    max_positions: int | None
    position_table: bool
    hooks: list[RemovableHandle]
    step: Callable | None = None


class MemoryOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and, as plain attributes (Trainer gathers fields), what the memory adds.

    memory_state: the state after the last complete segment. memory_diagnostics: means over the commits of this call.
    """

    memory_state: State | None = None
    memory_diagnostics: dict[str, Tensor] | None = None


class MemoryHost(MemoryGeneration):
    """The methods a host gains. Use `mnemic.attach` to get one."""

    memory: Memory
    mnemic: Attachment

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory_state: State | None = None,
        truncation: Truncation | None = None,
        memory_diagnostics: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MemoryOutput | tuple:
        """Read tokens, segment by segment.

        Args:
            input_ids: (B, Q) int64, or inputs_embeds: (B, Q, d).
            attention_mask: (B, Q) or longer, its last Q columns count; 0 for padding on either side. Padding columns
                get the logits of the row's last real token before them, or zeros.
            position_ids: ignored; positions count from the start of each row's segment.
            past_key_values: the cache of earlier calls; the rows read on where they stand.
            labels: (B, Q), -100 to ignore; the loss is the host's own, over all segments joined.
            use_cache: return a cache to read on from; by default as the host's config says, never under autograd.
            memory_state: the state to start from instead of a new one (training across calls).
            truncation: where gradients through the state stop; None for everywhere in this call.

        Raises:
            InputError: shapes, dtypes or ids that cannot be read. StateError: a state of another memory or width.
        """
        cache = past_key_values
        if cache is not None and not isinstance(cache, MemoryCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}, expected the MemoryCache of this model.")
        if cache is not None and cache.replay:
            assert cache.last_logits is not None
            cache.replay, cache.columns_given = False, 1
            return MemoryOutput(logits=cache.last_logits[:, None], past_key_values=cache)
        tokens = check_tokens(input_ids, inputs_embeds, token_embeddings(self))
        persistent = cache is not None or self._wants_cache(use_cache)
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise UnsupportedError(
                "output_hidden_states and output_attentions are not joined over segments; read them with a forward "
                "hook on the layer of interest."
            )
        cache = MemoryCache(self.mnemic.layout) if cache is None else cache
        carried = memory_state is not None
        self._start(cache, tokens.shape[0], memory_state)
        cache.columns_given += tokens.shape[1]

        aligned = align(tokens, attention_mask, cache.finished)
        if self.memory.whole_segments and bool((aligned.lengths % self.mnemic.layout.segment).any()):
            raise InputError(
                f"The memory {self.memory.name!r} reads whole segments of {self.mnemic.layout.segment} tokens in every "
                f"row and cannot decode token by token; got rows of {aligned.lengths.tolist()} tokens."
            )
        layout = self._layout_for(cache, aligned.lengths, persistent)
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        collector = LogitsCollector(aligned, keep)
        offset, commits = (torch.zeros_like(aligned.lengths) for _ in range(2))
        total = -(-(cache.open % layout.every + aligned.lengths) // layout.every)
        found: list[dict[str, Tensor]] = []
        checkpointing = self._checkpointing()
        while bool((offset < aligned.lengths).any()):
            piece = next_piece(cache, layout, offset, aligned.lengths, persistent)
            if checkpointing and not piece.fresh:
                raise UnsupportedError(
                    "Activation checkpointing in training drops the cache that this call needs: it reads on from an "
                    "earlier call, or writes within a segment (update_every). Turn checkpointing off, or call eval() "
                    "before generating."
                )
            if truncation is not None and (carried or bool(commits.any())):
                entering = (piece.take > 0) & (cache.open % layout.every == 0) & (carried | (commits > 0))
                self._cut(cache, truncation.cuts(commits, total) & entering)
            logits, segment = self._read(
                cache, layout, piece, cut(aligned.tokens, piece), collector.first_needed(piece), persistent
            )
            if logits is not None:
                collector.add(logits, piece, piece.width - logits.shape[1])
            self._advance(cache, layout, piece, segment, found if memory_diagnostics else None)
            offset, commits = offset + piece.take, commits + piece.done.long()
        logits, last = collector.result()
        if persistent:
            cache.last_logits = last if cache.last_logits is None else self._keep_last(cache, last, aligned.lengths)
        if not isinstance(logits_to_keep, int):
            logits = logits[:, logits_to_keep]
        output = MemoryOutput(
            loss=None if labels is None else self._loss(logits, labels, **kwargs),
            logits=logits,
            past_key_values=cache if persistent else None,
        )
        output.memory_state = cache.state
        if memory_diagnostics:
            names = sorted({name for one in found for name in one})
            output.memory_diagnostics = {n: torch.stack([one[n] for one in found if n in one]).mean() for n in names}
        return output if return_dict is not False else output.to_tuple()

    # One step

    def _read(
        self, cache: MemoryCache, layout: Layout, piece: Piece, tokens: Tensor, first: int | None, persistent: bool
    ) -> tuple[Tensor | None, Segment]:
        """Run the host on one piece. Returns the logits from text position `first` on, and what the memory traced."""
        assert cache.state is not None
        attached, device = self.mnemic, tokens.device
        columns = columns_of(cache, layout, piece, device)
        origin = (cache.seen - cache.open).to(device)
        limit = layout.scratch if piece.write else layout.text + int((cache.open + piece.take).max())
        kv = None
        if not piece.fresh:
            start = int(columns[0, 0]) if piece.in_step else None
            rows = columns.expand(tokens.shape[0], -1)
            kv = SegmentKV(cache.keys_values, layout, rows, start, limit)
        if cache.reads is None:
            cache.reads = State(self.memory.prepare(cache.state))
        keep, skip = self._logit_columns(layout, piece, first, device)
        step = attached.step or self._segment_step
        logits, trace, hidden = step(
            self._with_memory_tokens(cache.state, piece, tokens),
            dict(cache.reads),
            self._positions(layout, piece, columns, origin, tokens.shape[0]),
            self._mask(layout, piece, columns, limit, origin, tokens.shape[0]),
            kv,
            keep,
        )
        ahead = layout.read if piece.read else 0
        trace = {i: {n: t[:, ahead : ahead + piece.width] for n, t in layer.items()} for i, layer in trace.items()}
        written = hidden[:, -layout.write :] if piece.write and hidden is not None else None
        if persistent or bool((piece.done & (piece.take < layout.every)).any()):
            trace = self._buffer(cache, layout, piece, trace)
        return (None if first is None else logits[:, skip:]), Segment(trace=trace, written=written)

    def _segment_step(
        self,
        tokens: Tensor,
        reads: Mapping[str, Tensor],
        position_ids: Tensor | None,
        attention_mask: Any,
        kv: SegmentKV | None,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor, dict[int, Trace], Tensor | None]:
        """The host on one piece: tensors in, tensors out. This is what `compile_step` compiles."""
        frame = Frame(self.memory, reads)
        given = {"input_ids": tokens} if tokens.dim() == 2 else {"inputs_embeds": tokens}
        output = super().forward(
            **given,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=kv,
            use_cache=kv is not None,
            logits_to_keep=logits_to_keep,
            **{KEYWORD: frame},
        )
        return output.logits, frame.trace, frame.hidden

    def compile_step(self, **options: Any) -> None:
        """Compile the segment step with `torch.compile(**options)`; `fullgraph=True` works where the host allows it."""
        self.mnemic.step = torch.compile(self._segment_step, **options)

    def _with_memory_tokens(self, state: State, piece: Piece, tokens: Tensor) -> Tensor:
        if not self.mnemic.layout.read and not self.mnemic.layout.write:
            return tokens
        embeds = tokens if tokens.dim() == 3 else self.get_input_embeddings()(tokens)
        read, write = self.memory.tokens(state)
        parts = [read.to(embeds.dtype)] if piece.read else []
        parts.append(embeds)
        if piece.write:
            parts.append(write.to(embeds.dtype))
        return torch.cat(parts, dim=1)

    def _positions(self, layout: Layout, piece: Piece, columns: Tensor, origin: Tensor, batch: int) -> Tensor | None:
        if piece.fresh and not layout.read and not layout.window:
            # The host's own default, and the only way to its mask-free kernels.
            return None
        positions = columns.masked_fill(columns == layout.scratch, layout.window)
        if layout.window:
            positions = positions - layout.window + (0 if piece.fresh else origin[:, None])
        return positions.expand(batch, -1)

    def _mask(self, layout: Layout, piece: Piece, columns: Tensor, limit: int, origin: Tensor, batch: int) -> Any:
        """None for plain causal attention, else a 4-D mask, or one for each of the host's layer types."""
        spans = self.mnemic.spans
        narrow = any(span and span[1] < layout.scratch for span in spans.values())
        two_way = layout.bidirectional and (piece.read or piece.write)
        if piece.fresh and not two_way and not layout.window and not (layout.read and narrow):
            return None
        keys = columns if piece.fresh else torch.arange(limit, device=columns.device)[None]
        origin = torch.zeros_like(origin[:1]) if piece.fresh else origin

        def mask(span: tuple[str, int] | None) -> Tensor:
            seen = layout.visible(columns, keys, origin, span)
            # A view: some hosts (XGLM) insist on one mask a row.
            one = as_attention_mask(seen, str(self.config._attn_implementation), self.dtype)
            return one.expand(batch, -1, -1, -1)

        if not narrow and not layout.window:
            return mask(None)
        masks = {kind: mask(span) for kind, span in spans.items()}
        return masks.get("", masks)

    def _logit_columns(self, layout: Layout, piece: Piece, first: int | None, device) -> tuple[int | Tensor, int]:
        """`logits_to_keep` for the host, and how many of what it returns to skip."""
        if first is None:
            return 1, 0
        if not piece.read and not piece.write:
            return piece.width - first, 0
        ahead = layout.read if piece.read else 0
        return torch.arange(ahead + first, ahead + piece.width, device=device), 0

    def _buffer(self, cache: MemoryCache, layout: Layout, piece: Piece, trace: dict[int, Trace]) -> dict[int, Trace]:
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

    def _advance(self, cache: MemoryCache, layout: Layout, piece: Piece, segment: Segment, found: list | None) -> None:
        """Move the rows on, commit those that reached a commit, close the segments that are complete."""
        assert cache.state is not None
        cache.open, cache.seen = cache.open + piece.take, cache.seen + piece.take
        if bool(piece.done.any()) and not self.memory.sliding_window:
            rows = piece.done.nonzero().squeeze(1)
            everyone = bool(piece.done.all())
            before = cache.state if everyone else cache.state.select(rows)
            if not everyone:
                pick = lambda t: t.index_select(0, rows.to(t.device))  # noqa: E731
                trace = {i: {n: pick(t) for n, t in layer.items()} for i, layer in segment.trace.items()}
                segment = Segment(trace, None if segment.written is None else pick(segment.written))
            after = self.memory.commit(before, segment)
            if found is not None:
                with torch.no_grad():
                    found.append(self.memory.diagnostics(before, segment))
            cache.state = after if everyone else cache.state.put(rows, after)
            cache.reads = None
        if bool(piece.ended.any()):
            cache.open = cache.open.masked_fill(piece.ended, 0)
            if layout.window and not piece.fresh:
                self._slide(cache, layout, piece.ended)
            elif torch.is_grad_enabled() and bool(piece.ended.all()):
                cache.keys_values, cache.trace = {}, {}

    def _slide(self, cache: MemoryCache, layout: Layout, ended: Tensor) -> None:
        """Keys and values of the last tokens become the window of the next segment."""
        rows = ended.nonzero().squeeze(1)
        for kv in cache.keys_values.values():
            for stored in (kv.keys, kv.values):
                stored[rows.to(stored.device), : layout.window] = stored[
                    rows.to(stored.device), layout.segment : layout.segment + layout.window
                ]

    def _cut(self, cache: MemoryCache, rows: Tensor) -> None:
        if bool(rows.any()):
            assert cache.state is not None
            cache.state = cache.state.detach(None if bool(rows.all()) else rows)
            cache.reads = None

    # Around the loop

    def _start(self, cache: MemoryCache, batch: int, memory_state: State | None) -> None:
        if batch > 1 and not self.memory.batch_safe:
            raise UnsupportedError(f"The memory {self.memory.name!r} reads one row at a time; got {batch}.")
        if not cache.started:
            first = self.memory.initial_state(batch)
            if memory_state is not None:
                first._check_same(memory_state)
                if memory_state.batch_size not in (None, batch):
                    raise InputError(f"memory_state has {memory_state.batch_size} rows, the input {batch}.")
            cache.start(first if memory_state is None else memory_state, batch)
        elif memory_state is not None:
            raise InputError("Give either past_key_values or memory_state: the cache already holds a state.")
        elif cache.batch_size != batch:
            raise InputError(f"The cache holds {cache.batch_size} rows, the input {batch}.")
        elif cache.layout is not self.mnemic.layout:
            self._check_cache(cache)

    def _check_cache(self, cache: MemoryCache) -> None:
        assert cache.state is not None
        same = cache.layout == self.mnemic.layout
        if same and self.memory.constant_size:
            states = (self.memory.initial_state(1), cache.state)
            mine, theirs = ({n: t.shape[1:] for n, t in state.items()} for state in states)
            same = mine == theirs
        if not same:
            raise StateError(
                "past_key_values is the cache of a model with another memory or segment than this one, which has "
                f"{self.memory.name!r} with segments of {self.mnemic.layout.segment} tokens; start a new stream."
            )

    def _layout_for(self, cache: MemoryCache, lengths: Tensor, persistent: bool) -> Layout:
        layout = self.mnemic.layout
        if layout.window:
            longest = int((cache.seen + lengths).max())
            if self.mnemic.position_table and longest > (self.mnemic.max_positions or longest):
                raise InputError(
                    f"A stream of {longest} tokens does not fit the {self.mnemic.max_positions} positions that "
                    f"{self.mnemic.host_class.__name__} has vectors for; a sliding window reads on without end only "
                    "on hosts with relative positions (rotary). Use a segment memory or another host."
                )
            if not persistent:
                return replace(layout, segment=longest, every=longest)
        return layout

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            return bool(getattr(self.config, "use_cache", False)) and not torch.is_grad_enabled()
        return use_cache

    def _checkpointing(self) -> bool:
        """Whether layers will be replayed in the backward pass; refuses the kind that loses the memory's gradients."""
        if not self.training:
            return False
        replayed = [m for m in self.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in replayed:
            replay = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(replay, "keywords", {}).get("use_reentrant"):
                raise UnsupportedError(
                    "Activation checkpointing with use_reentrant=True runs layers without autograd first, so gradients "
                    "through the memory would be lost. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
        return bool(replayed)

    def _keep_last(self, cache: MemoryCache, last: Tensor, lengths: Tensor) -> Tensor:
        assert cache.last_logits is not None
        moved = (lengths > 0).to(last.device)[:, None]
        return torch.where(moved, last, cache.last_logits)

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        labels = labels[:, -logits.shape[1] :]
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    # Streams and files

    def stream(self, batch_size: int = 1, *, tokenizer: Any = None, load: Any = None) -> "Stream":
        """A new stream of `batch_size` rows, or one loaded from a file. See `Stream`."""
        from .stream import Stream

        if load is not None:
            return Stream.load(self, load, tokenizer=tokenizer)
        return Stream(self, batch_size, tokenizer=tokenizer)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the host's, with the memory's weights under `memory.` and `mnemic.json` beside them."""
        from .saving import write_header

        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_header(self, save_directory)
