"""Encoder and memory as one Hugging Face model.

`EncoderHost` is mixed in front of the host's own class, for one instance. Its `forward` cuts each row into segments,
right-aligned, runs the encoder on one after another and threads the state. A head that says one thing of a text
(classification) stands on the last segment, one that says something of every token on all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import InputError, UnsupportedError
from ..core.memory import Memory
from ..core.state import State
from ..core.truncation import Truncation
from .anatomy import token_embeddings
from .encoder_step import EncodedSegment, encode_segment, first_state
from .inputs import check_tokens
from .right_aligned import right_aligned, segments_of
from .saved import SavedWithMemory
from .segments import align
from .steps import Attachment


@dataclass
class EncoderAttachment(Attachment):
    """by_token: the head says something of every token."""

    by_token: bool = False


@dataclass(frozen=True)
class Piece:
    """One segment of each row: `take[b]` tokens from `offset[b]` on, (B,)."""

    offset: Tensor
    take: Tensor


@dataclass(frozen=True)
class Text:
    """The text of a call's rows: tokens (B, Q) or (B, Q, d); row b's are columns start[b] .. start[b] + lengths[b] - 1.

    column: (B, Q) int64, where each of these columns stood in the input; None where it stood there.
    """

    tokens: Tensor
    start: Tensor
    lengths: Tensor
    column: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def columns_of(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Columns (B, width) of a piece of each row, and which of them it has; the others are padding of any value."""
        inside = torch.arange(int(piece.take.max()))
        columns = ((self.start + piece.offset)[:, None] + inside).clamp_max(self.tokens.shape[1] - 1)
        return columns, inside < piece.take[:, None]

    def given(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where in the input these columns stood."""
        return columns if self.column is None else self.column[rows, columns]


@dataclass
class Asked:
    """What a head is asked, and what it has said so far.

    call: the host with its head. labels: as the caller gave them. by_token: it says something of every token.
    parts: rows, input columns and logits of the text read. losses: each the mean over `counts` tokens.
    """

    call: Callable[..., Any]
    text: Text
    labels: Tensor | None
    by_token: bool
    given: dict[str, Any]
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def of(self, rows: Tensor, columns: Tensor, real: Tensor, around: tuple, slots: int) -> Callable[..., Any]:
        """The host on one segment, with the labels that belong to it."""
        given = {**self.given, "return_dict": True}
        if self.labels is not None and not self.by_token:
            given["labels"] = self.labels
        elif self.labels is not None:
            device = self.labels.device
            picked = self.labels[rows[:, None].to(device), self.text.given(rows[:, None], columns).to(device)]
            picked = picked.masked_fill(~real.to(device), -100)
            self.counts.append(int((picked != -100).sum()))
            opening, between, closing = (0 if part is None else part.shape[1] for part in around)
            if self.counts[-1]:
                given["labels"] = functional.pad(picked, (opening + slots + between, closing), value=-100)
        return lambda **inputs: self.call(**inputs, **given)

    def keep(self, done: EncodedSegment, rows: Tensor, columns: Tensor, real: Tensor) -> None:
        row, place = real.nonzero(as_tuple=True)
        logits = done.output.logits[:, done.first : done.first + real.shape[1]]
        kept = logits[row.to(logits.device), place.to(logits.device)]
        self.parts.append((rows[row], self.text.given(rows[row], columns[row, place]), kept))
        if self.labels is not None:
            self.losses.append(done.output.loss if self.counts[-1] else logits.sum() * 0)

    def logits(self) -> Tensor:
        """(B, Q, C); zeros where no text stood."""
        rows, columns, values = (torch.cat(part) for part in zip(*self.parts, strict=True))
        out = values.new_zeros(*self.text.shape, values.shape[-1])
        return out.index_put((rows.to(out.device), columns.to(out.device)), values)

    def loss(self) -> Tensor | None:
        """The mean over all tokens with a label."""
        if self.labels is None:
            return None
        total = torch.stack([part * count for part, count in zip(self.losses, self.counts, strict=True)]).sum()
        return total / sum(self.counts)


class EncoderHost(SavedWithMemory):
    """The methods an encoder gains. Use `mnemic.attach` to get one."""

    memory: Memory
    mnemic: EncoderAttachment
    training: bool
    get_input_embeddings: Callable[[], nn.Module]
    # Trainer divides the loss by the number of accumulated batches itself.
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: State | None = None,
        memory_reset: Tensor | None = None,
        truncation: Truncation | None = None,
        progress: bool = False,
        use_cache: bool | None = None,
        memory_diagnostics: bool = False,
        memory_sink: Callable[[Any], object] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read texts, segment by segment.

        Args:
            input_ids: (B, Q) int64, or inputs_embeds: (B, Q, d). The memory's opening token in front of a text and its
                closing token behind it, as tokenizers put them there, are not read as text: every segment has them.
            attention_mask: (B, Q), 0 for padding on either side.
            token_type_ids: zeros; texts of two parts are not supported.
            position_ids: ignored; positions count from the start of each segment.
            labels: as the host takes them: (B,) or (B, C) for one answer a text, (B, Q) with -100 to ignore for one a
                token. The loss is the host's own.
            memory_state: the state to start from instead of a new one. memory_reset: (B,) bool; these rows start from a
                new state all the same.
            truncation: where gradients through the state stop; None for nowhere in this call.
            progress: show a progress bar. use_cache: ignored; an encoder keeps nothing of a segment but the state.
            memory_sink: called with the output, as with other hosts.

        Returns: the host's output for the last segment; with logits (B, Q, C), zeros for padding, for heads that say
            something of every token. `memory_state` is the state behind the last segment, `memory_loss` what the memory
            adds to the loss, `memory_diagnostics` means over the segments where asked for.

        Raises:
            InputError: shapes, dtypes or ids that cannot be read. StateError: a state of another memory or width.
        """
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise UnsupportedError(
                "output_hidden_states and output_attentions are not joined over segments; read them with a forward "
                "hook on the layer of interest."
            )
        if kwargs.pop("replay", False):
            raise UnsupportedError("replay runs on causal language models; on encoders use truncation to save memory.")
        text = self._text(input_ids, inputs_embeds, attention_mask, token_type_ids)
        by_token = self.mnemic.by_token
        if labels is not None and by_token and labels.shape != text.shape:
            raise InputError(f"labels of shape {tuple(labels.shape)}, expected one a token: {text.shape}.")
        # The mean over all segments is taken here.
        kwargs.pop("num_items_in_batch", None)
        asked = Asked(super().forward, text, labels, by_token, kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        state, carried = first_state(self.memory, text.shape[0], memory_state, memory_reset)
        count = segments_of(text.lengths, self.mnemic.layout.segment)
        total, done = int(count.max()), None
        losses: list[Tensor] = []
        found: list[dict[str, Tensor]] = []
        steps = (Piece(*one) for one in right_aligned(text.lengths, self.mnemic.layout.segment))
        for step, piece in enumerate(track(steps, "segments", total=total) if progress else steps):
            if truncation is not None:
                index = count - (total - step)
                cut = truncation.cuts(index, count) & (piece.take > 0) & (carried | (index > 0))
                state = state.detach(cut) if bool(cut.any()) else state
            # A head that answers for the text stands on the last segment only.
            state, done = self._read(state, text, piece, asked if by_token or step + 1 == total else None)
            losses += done.frame.losses.values()
            if memory_diagnostics:
                with torch.no_grad():
                    found.append(self.memory.diagnostics(State(done.frame.state), done.segment))
        assert done is not None
        output = done.output
        if by_token:
            output.logits, output.loss = asked.logits(), asked.loss()
        output.memory_state, output.memory_loss = state, torch.stack(losses).sum() if losses else None
        if losses and output.loss is not None:
            output.loss = output.loss + torch.stack(losses).sum()
        names = {name for one in found for name in one}
        output.memory_diagnostics = {n: torch.stack([one[n] for one in found]).mean() for n in sorted(names)} or None
        if memory_sink is not None:
            memory_sink(output)
        return output if return_dict is not False else output.to_tuple()

    # A step

    def _read(self, state: State, text: Text, piece: "Piece", asked: "Asked | None") -> tuple[State, EncodedSegment]:
        """Read the next segment of the rows that have one; `asked` where the head is to answer."""
        memory, device = self.memory, text.tokens.device
        # A memory that masks its commits keeps what does not read as it is.
        reading = (piece.take > 0) | memory.masked_commits
        rows, everyone = reading.nonzero().squeeze(1), bool(reading.all())
        before = state if everyone else state.select(rows)
        columns, real = (part[rows] for part in text.columns_of(piece))
        opening, closing = self._special(memory.opening_token), self._special(memory.closing_token)
        between = closing if memory.num_read_tokens else None
        around = (opening, between, closing)
        done = encode_segment(
            memory,
            before,
            self.mnemic.access,
            self.mnemic.stack if asked is None else asked.of(rows, columns, real, around, memory.num_read_tokens),
            self._embedded(text.tokens, rows.to(device), columns.to(device)),
            real.to(device),
            before=opening,
            between=between,
            after=closing,
            start=piece.offset[rows],
            segment=self.mnemic.layout.segment,
            training=self.training,
        )
        if asked is not None and asked.by_token:
            asked.keep(done, rows, columns, real)
        return done.state if everyone else state.put(rows, done.state), done

    def _embedded(self, tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        picked = tokens[rows[:, None], columns]
        return picked if tokens.dim() == 3 else self.get_input_embeddings()(picked)

    def _table(self) -> Tensor:
        host: Any = self
        return token_embeddings(host)

    def _special(self, token: int | None) -> Tensor | None:
        if token is None:
            return None
        table = self._table()
        return self.get_input_embeddings()(torch.tensor([[token]], device=table.device))

    # The input

    def _text(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
    ) -> Text:
        tokens = check_tokens(input_ids, inputs_embeds, self._table())
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise InputError(
                "token_type_ids with a second part: a text with memory is one part; join the parts with the closing "
                "token between them."
            )
        rows = torch.arange(len(tokens))
        aligned = align(tokens, attention_mask, torch.zeros(len(tokens), dtype=torch.bool))
        start, lengths = torch.zeros_like(aligned.lengths), aligned.lengths
        column = None
        if aligned.before is not None:
            real = torch.diff(aligned.before, dim=1, prepend=torch.zeros_like(aligned.before[:, :1])) > 0
            column = torch.argsort(~real, dim=1, stable=True)
        if tokens.dim() == 2:
            opening, closing = self.memory.opening_token, self.memory.closing_token
            ids = aligned.tokens
            if opening is not None:
                opened = (ids[:, 0].cpu() == opening) & (lengths > 0)
                start, lengths = start + opened, lengths - opened.long()
            if closing is not None:
                end = (start + lengths - 1).clamp_min(0)
                lengths = (
                    lengths - ((ids[rows.to(ids.device), end.to(ids.device)].cpu() == closing) & (lengths > 0)).long()
                )
        if not bool((lengths > 0).all()):
            empty = (lengths <= 0).nonzero().squeeze(1).tolist()
            raise InputError(f"Rows {empty} have no text, so there is nothing to answer; leave them out of the batch.")
        return Text(aligned.tokens, start, lengths, column)
