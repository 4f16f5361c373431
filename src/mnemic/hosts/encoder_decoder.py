"""Encoder-decoder and memory as one Hugging Face model.

`EncoderDecoderHost` is mixed in front of the host's own class, for one instance. One call reads one turn: the encoder
runs on it, the memory reads and writes there, and the decoder reads what the encoder made and what the memory adds.
A turn is a segment; a longer one is cut into several, right-aligned, and the decoder reads the last of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput

from ..core.errors import InputError, UnsupportedError
from ..core.memory import Memory
from ..core.state import State
from .anatomy import token_embeddings
from .encoder_step import EncodedSegment, encode_segment, first_state
from .inputs import check_tokens
from .right_aligned import right_aligned
from .saved import SavedWithMemory
from .segments import align
from .steps import Attachment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .conversation import Conversation

    class _Base(SavedWithMemory, PreTrainedModel):
        # From the host's own class.
        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Base = SavedWithMemory


@dataclass
class EncodedTurn(BaseModelOutput):
    """What the decoder reads of a turn: `encoder_outputs` of `forward` and `generate`.

    last_hidden_state: (B, n + T, d), the memory's rows first. attention_mask: (B, n + T) int64, 0 for padding.
    memory_state: the state after the turn. memory_loss: what the memory adds to the loss, or None.
    """

    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory_state: State = State()
        self.memory_loss: Tensor | None = None


class TurnOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and, as plain attributes (Trainer gathers fields), what the memory adds.

    memory_state: the state after the turn. memory_loss: what the memory adds to the loss (included in it).
    """

    memory_state: State | None = None
    memory_loss: Tensor | None = None


class EncoderDecoderHost(_Base):
    """The methods an encoder-decoder gains. Use `mnemic.attach` to get one."""

    memory: Memory
    mnemic: Attachment
    # Trainer divides the loss by the number of accumulated batches itself.
    accepts_loss_kwargs = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncodedTurn | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        memory_state: State | None = None,
        memory_reset: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a turn and decode.

        Args:
            input_ids: (B, T) int64, or inputs_embeds: (B, T, d): the turn. Rows without real tokens keep their state,
                and what is decoded in them means nothing.
            attention_mask: (B, T), 0 for padding on either side.
            decoder_input_ids, labels and all else: as the host takes them; the loss is the host's own.
            encoder_outputs: what `read` gave, in place of a turn.
            memory_state: the state that the turns before left; None for a first turn.
            memory_reset: (B,) bool; these rows start from a new state all the same.

        Returns: the host's output, with `memory_state`, whatever was given.

        Raises:
            InputError: shapes, dtypes or ids that cannot be read, or encoder outputs that `read` did not make.
            StateError: a state of another memory or width.
        """
        if kwargs.get("output_attentions") and self.memory.uses("attention"):
            raise UnsupportedError(
                f"output_attentions: the memory {self.memory.name!r} takes part in the encoder's attention, and its "
                "weights are not kept. Leave the option off."
            )
        turn = self._turn(encoder_outputs, input_ids, attention_mask, inputs_embeds, memory_state, memory_reset)
        # The loss is a mean over the tokens of this call.
        kwargs.pop("num_items_in_batch", None)
        if decoder_input_ids is None and labels is None and decoder_inputs_embeds is None:
            # Some hosts then decode from the input's own tokens.
            kwargs["input_ids"] = input_ids
        output = super().forward(
            attention_mask=turn.attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=turn,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        output = TurnOutput(**output)
        output.memory_state, output.memory_loss = turn.memory_state, turn.memory_loss
        if output.loss is not None and turn.memory_loss is not None:
            output.loss = output.loss + turn.memory_loss
        return output if return_dict is not False else output.to_tuple()

    def read(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        memory_state: State | None = None,
        memory_reset: Tensor | None = None,
    ) -> EncodedTurn:
        """Read a turn without decoding. Arguments and errors as for `forward`."""
        tokens = check_tokens(input_ids, inputs_embeds, token_embeddings(self))
        rows, segment = tokens.shape[0], self.mnemic.layout.segment
        state, _ = first_state(self.memory, rows, memory_state, memory_reset)
        aligned = align(tokens, attention_mask, torch.zeros(rows, dtype=torch.bool))
        losses: list[Tensor] = []
        done = None
        for offset, take in right_aligned(aligned.lengths, segment):
            done = self._read_segment(state, aligned.tokens, offset, take)
            state = done.state
            losses += done.frame.losses.values()
        assert done is not None
        hidden = self.memory.encoded(done.hidden, state)
        more = hidden.shape[1] - done.hidden.shape[1]
        mask = torch.nn.functional.pad(done.mask, (more, 0), value=True).long()
        turn = EncodedTurn(last_hidden_state=hidden, attention_mask=mask)
        turn.memory_state, turn.memory_loss = state, torch.stack(losses).sum() if losses else None
        return turn

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Tensor | None = None,
        *args: Any,
        attention_mask: Tensor | None = None,
        encoder_outputs: EncodedTurn | None = None,
        memory_state: State | None = None,
        memory_reset: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's `generate()`, for a turn: read once, before decoding begins. What is decoded is not read: give
        it back as part of a later turn where it matters.

        Returns: as the host's; an output that is a dictionary (`return_dict_in_generate=True`) has `memory_state`.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds = kwargs.pop("inputs_embeds", None)
        turn = self._turn(encoder_outputs, inputs, attention_mask, embeds, memory_state, memory_reset)
        # A copy: beams repeat its rows in place.
        given = EncodedTurn(last_hidden_state=turn.last_hidden_state, attention_mask=turn.attention_mask)
        result = super().generate(inputs, *args, encoder_outputs=given, attention_mask=turn.attention_mask, **kwargs)
        if isinstance(result, ModelOutput):
            vars(result)["memory_state"] = turn.memory_state
        return result

    def conversation(self, batch_size: int = 1, *, tokenizer: Any = None, load: Any = None) -> "Conversation":
        """A new conversation of `batch_size` rows, or one loaded from a file. See `Conversation`."""
        from .conversation import Conversation

        if load is not None:
            return Conversation.load(self, load, tokenizer=tokenizer)
        return Conversation(self, batch_size, tokenizer=tokenizer)

    def _turn(
        self,
        encoded: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        memory_state: State | None,
        memory_reset: Tensor | None,
    ) -> EncodedTurn:
        if encoded is None:
            return self.read(input_ids, attention_mask, inputs_embeds, memory_state, memory_reset)
        if not isinstance(encoded, EncodedTurn):
            raise InputError(
                f"encoder_outputs is a {type(encoded).__name__}, which the memory {self.memory.name!r} did not read; "
                "give input_ids, or what read() returned."
            )
        if memory_state is not None or memory_reset is not None:
            raise InputError("encoder_outputs have been read and carry their state; memory_state goes with input_ids.")
        return encoded

    def _read_segment(self, state: State, tokens: Tensor, offset: Tensor, take: Tensor) -> EncodedSegment:
        inside = torch.arange(int(take.max()))
        columns = (offset[:, None] + inside).clamp_max(tokens.shape[1] - 1).to(tokens.device)
        rows = torch.arange(len(take), device=tokens.device)[:, None]
        piece, stack = tokens[rows, columns], self.mnemic.stack

        def call(inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
            if piece.dim() == 2 and inputs_embeds.shape[1] == piece.shape[1]:
                # Some hosts scale embeddings only where they look them up themselves.
                return stack(input_ids=piece, attention_mask=attention_mask)
            return stack(inputs_embeds=inputs_embeds, attention_mask=attention_mask)

        return encode_segment(
            self.memory,
            state,
            self.mnemic.access,
            call,
            piece if piece.dim() == 3 else self.get_input_embeddings()(piece),
            (inside < take[:, None]).to(tokens.device),
            start=offset,
            segment=self.mnemic.layout.segment,
            training=self.training,
        )
