"""Host and memory as one Hugging Face model.

`MemoryHost` is mixed in front of the host's own class, for one instance: the model stays what it was for
`isinstance`, Trainer, PEFT and the names of its weights. Its `forward` cuts the input into segments, runs the host
on each, and threads the state: in training as a value that enters a segment and leaves it, in generation inside the
cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..core.errors import InputError, StateError, UnsupportedError
from ..core.memory import Segment, Trace
from ..core.state import State
from ..core.truncation import Truncation
from .anatomy import token_embeddings
from .cache import MemoryCache
from .encoder_step import first_state
from .inputs import check_tokens
from .layout import Layout
from .replay import check_replay, read_replayed
from .saved import SavedWithMemory
from .segments import LogitsCollector, Piece, Reading, align, cut, next_piece
from .steps import MemorySteps

if TYPE_CHECKING:
    from .stream import Stream


class MemoryOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and, as plain attributes (Trainer gathers fields), what the memory adds.

    memory_state: the state after the last complete segment. memory_loss: what the memory adds to the loss (included
    in it). memory_diagnostics: means over the commits of this call.
    """

    memory_state: State | None = None
    memory_loss: Tensor | None = None
    memory_diagnostics: dict[str, Tensor] | None = None


class MemoryHost(SavedWithMemory, MemorySteps):
    """The methods a host gains. Use `mnemic.attach` to get one."""

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
        memory_reset: Tensor | None = None,
        truncation: Truncation | None = None,
        replay: bool = False,
        memory_diagnostics: bool = False,
        memory_sink: Callable[["MemoryOutput"], object] | None = None,
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
            memory_reset: (B,) bool; these rows start from a new state all the same.
            truncation: where gradients through the state stop; None for everywhere in this call.
            replay: keep the activations of one segment only and run each again in the backward pass, for the same
                loss and gradients. Needs labels; the output has no logits.
            memory_sink: called with the output: DDP and mixed precision return another one, made of its fields only.

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
        given = check_replay(self, labels, logits_to_keep, persistent) if replay else None
        cache = MemoryCache(self.mnemic.layout) if cache is None else cache
        carried = self._start(cache, tokens.shape[0], memory_state, memory_reset)
        cache.columns_given += tokens.shape[1]

        aligned = align(tokens, attention_mask, cache.finished)
        if self.memory.whole_segments and bool((aligned.lengths % self.mnemic.layout.segment).any()):
            raise InputError(
                f"The memory {self.memory.name!r} reads whole segments of {self.mnemic.layout.segment} tokens in every "
                f"row and cannot decode token by token; got rows of {aligned.lengths.tolist()} tokens."
            )
        layout = self._layout_for(cache, aligned.lengths, persistent)
        call = Reading(
            aligned=aligned,
            layout=layout,
            persistent=persistent,
            carried=carried,
            truncation=truncation,
            checkpointing=self._checkpointing(),
            diagnosing=memory_diagnostics or cache.watch is not None,
            total=-(-(cache.open % layout.every + aligned.lengths) // layout.every),
            commits_due=int(((cache.open % layout.every + aligned.lengths) // layout.every).sum()),
            offset=torch.zeros_like(aligned.lengths),
            commits=torch.zeros_like(aligned.lengths),
        )
        logits = None
        if given is not None:
            loss, memory_loss = read_replayed(self, cache, call, *given, **kwargs)
        else:
            collector = LogitsCollector(aligned, logits_to_keep if isinstance(logits_to_keep, int) else 0)
            while call.unread:
                piece, part = self._read_on(cache, call, collector.first_needed)
                if part is not None:
                    collector.add(part, piece, piece.width - part.shape[1])
            logits, last = collector.result()
            if persistent:
                cache.last_logits = last if cache.last_logits is None else self._keep_last(cache, last, aligned.lengths)
            if not isinstance(logits_to_keep, int):
                logits = logits[:, logits_to_keep]
            loss = None if labels is None else self._loss(logits, labels, **kwargs)
            memory_loss = torch.stack(call.losses).sum() if call.losses else None
        output = MemoryOutput(
            loss=loss if loss is None or memory_loss is None else loss + memory_loss,
            logits=logits,
            past_key_values=cache if persistent else None,
        )
        output.memory_state, output.memory_loss = cache.state, memory_loss
        if memory_diagnostics:
            names, found = sorted({name for one in call.found for name in one}), call.found
            output.memory_diagnostics = {n: torch.stack([one[n] for one in found if n in one]).mean() for n in names}
        if memory_sink is not None:
            memory_sink(output)
        return output if return_dict is not False else output.to_tuple()

    # A step

    def _read_on(
        self, cache: MemoryCache, call: Reading, wanted: Callable[[Piece], int | None]
    ) -> tuple[Piece, Tensor | None]:
        """Read the next piece of every row. Returns it, and its logits from text position `wanted(piece)` on."""
        layout, truncation = call.layout, call.truncation
        piece = next_piece(cache, layout, call.offset, call.aligned.lengths, call.persistent)
        if call.checkpointing and not piece.fresh:
            raise UnsupportedError(
                "Activation checkpointing in training drops the cache that this call needs: it reads on from an "
                "earlier call, or writes within a segment (update_every). Turn checkpointing off, or call eval() "
                "before generating."
            )
        if truncation is not None:
            entering = (piece.take > 0) & (cache.open % layout.every == 0) & (call.carried | (call.commits > 0))
            self._cut(cache, truncation.cuts(call.commits, call.total) & entering)
        logits, segment, losses = self._read(
            cache, layout, piece, cut(call.aligned.tokens, piece), wanted(piece), call.persistent, call.diagnosing
        )
        call.losses += losses.values()
        self._advance(cache, call, piece, segment)
        call.offset, call.commits = call.offset + piece.take, call.commits + piece.done.long()
        return piece, logits

    def _advance(self, cache: MemoryCache, call: Reading, piece: Piece, segment: Segment) -> None:
        """Move the rows on, commit those that reached a commit, close the segments that are complete."""
        assert cache.state is not None
        layout = call.layout
        cache.open, cache.seen = cache.open + piece.take, cache.seen + piece.take
        if bool(piece.done.any()) and not layout.continuous:
            rows = piece.done.nonzero().squeeze(1)
            everyone = bool(piece.done.all())
            if not everyone and self.memory.masked_commits and not self.memory.write_pass:
                # Rows that do not commit are masked out, and no row's state is copied.
                real = piece.done[:, None].expand(-1, layout.every).to(self.device)
                segment, everyone = replace(segment, mask=real), True
            before = cache.state if everyone else cache.state.select(rows)
            segment = segment if everyone else _rows_of(segment, rows)
            if self.memory.write_pass:
                assert segment.start is not None
                assert cache.reads is not None
                reads = cache.reads if everyone else cache.reads.select(rows)
                trace = self._write_pass(before, reads, segment.trace[-1]["embeddings"], segment.start)
                # A stacked memory may have kept things of its own in the first pass.
                joined = {i: {**segment.trace.get(i, {}), **trace.get(i, {})} for i in {**segment.trace, **trace}}
                segment = replace(segment, trace=joined)
            after = self.memory.commit(before, segment)
            call.losses += [loss.sum() / call.commits_due for loss in segment.losses]
            if call.diagnosing:
                with torch.no_grad():
                    call.found.append(self.memory.diagnostics(before, segment))
                if cache.watch is not None:
                    cache.watch(before, segment, after, call.found[-1])
            cache.state = after if everyone else cache.state.put(rows, after)
            cache.reads = None
        if bool(piece.ended.any()):
            cache.open = cache.open.masked_fill(piece.ended, 0)
            if layout.window and not piece.fresh:
                self._slide(cache, layout, piece.ended)
            elif torch.is_grad_enabled() and bool(piece.ended.all()):
                cache.keys_values, cache.trace = {}, {}

    def _slide(self, cache: MemoryCache, layout: Layout, ended: Tensor) -> None:
        """What was kept of the last tokens becomes the window of the next segment; the first tokens become sinks."""
        rows, first, before = ended.nonzero().squeeze(1), layout.sinks, cache.seen - layout.segment
        # A token becomes a sink when it leaves the window; `before` counts the tokens before the ended segment.
        sinks, left = torch.arange(layout.sinks), cache.seen[:, None] - layout.window
        leaving = ended[:, None] & (sinks < left) & (sinks >= left - layout.segment)
        row, sink = leaving.nonzero(as_tuple=True)
        source = layout.text + sink - before[row]
        stored = [t for kv in cache.keys_values.values() for t in (kv.keys, kv.values)] + [*cache.features.values()]
        for tensor in stored:
            here, r, s, c = (index.to(tensor.device) for index in (rows, row, sink, source))
            if len(r):
                tensor[r, s] = tensor[r, c]
            tensor[here, first : first + layout.window] = tensor[
                here, first + layout.segment : first + layout.segment + layout.window
            ]

    def _cut(self, cache: MemoryCache, rows: Tensor) -> None:
        if bool(rows.any()):
            assert cache.state is not None
            cache.state = cache.state.detach(None if bool(rows.all()) else rows)
            cache.reads = None

    # Around the loop

    def _start(self, cache: MemoryCache, batch: int, memory_state: State | None, memory_reset: Tensor | None) -> Tensor:
        """Give a new cache its state. Returns the rows that start from `memory_state`, (B,) bool on the CPU."""
        if not cache.started:
            first, carried = first_state(self.memory, batch, memory_state, memory_reset)
            cache.start(first, batch)
            return carried
        if memory_state is not None or memory_reset is not None:
            raise InputError("Give either past_key_values or memory_state: the cache already holds a state.")
        if cache.batch_size != batch:
            raise InputError(f"The cache holds {cache.batch_size} rows, the input {batch}.")
        if cache.layout is not self.mnemic.layout:
            self._check_cache(cache)
        return torch.zeros(batch, dtype=torch.bool)

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
        if layout.continuous:
            longest = int((cache.seen + lengths).max())
            if self.mnemic.position_table and longest > (self.mnemic.max_positions or longest):
                raise InputError(
                    f"A stream of {longest} tokens does not fit the {self.mnemic.max_positions} positions that "
                    f"{self.mnemic.host_class.__name__} has vectors for; a stream without segments reads on without "
                    "end only on hosts with relative positions (rotary). Use a segment memory or another host."
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


def _rows_of(segment: Segment, rows: Tensor) -> Segment:
    """Some rows of what happened in a segment."""

    def pick(t: Tensor) -> Tensor:
        return t.index_select(0, rows.to(t.device))

    def picked(traces: Mapping[int, Trace]) -> dict[int, Trace]:
        return {i: {n: pick(t) for n, t in layer.items()} for i, layer in traces.items()}

    return replace(
        segment,
        trace=picked(segment.trace),
        written=None if segment.written is None else pick(segment.written),
        written_trace=picked(segment.written_trace),
        start=None if segment.start is None else pick(segment.start),
    )
