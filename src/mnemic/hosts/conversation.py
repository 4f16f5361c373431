"""Conversation: the turns that an encoder-decoder with memory has read; what a session of dialogue saves."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FileFormatError, InputError
from ..core.files import MAX_BYTES, read_file, write_file
from ..core.state import State
from .attach import base_model
from .encoder_decoder import EncodedTurn, EncoderDecoderHost
from .reading import Ids, Inputs, Text
from .saving import check_owner, identity_of


class Conversation(Inputs):
    """Read turn after turn at constant cost, reply to any of them, save and resume.

    Args:
        model: an encoder-decoder with a memory. batch_size: dialogues side by side; a row whose turn is empty waits.
        tokenizer: for text; ids need none. By default the host's own, where it has a name.
    """

    _kind = "conversation"

    def __init__(self, model: Any, batch_size: int = 1, *, tokenizer: Any = None):
        self.model = model
        self.base: EncoderDecoderHost = base_model(model)
        if not isinstance(self.base, EncoderDecoderHost):
            raise InputError(
                f"A conversation is held with an encoder-decoder that has a memory; got {type(self.base).__name__}. "
                "Other models with memory have stream()."
            )
        if batch_size < 1:
            raise InputError(f"A conversation has at least one row; got batch_size={batch_size}.")
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        self.reset()

    @property
    def turns(self) -> int | list[int]:
        """Turns read so far; a list for a batch."""
        return self._turns.tolist()[0] if self.batch_size == 1 else self._turns.tolist()

    @property
    def state_bytes(self) -> int:
        """Bytes carried from turn to turn."""
        return self.state.nbytes

    def turn(self, inputs: Text | Ids, *, attention_mask: Tensor | None = None) -> "Conversation":
        """Read a turn without replying.

        Args:
            inputs: one row: a string, a list of ids, or a tensor (T,) or (1, T); several rows: a list of strings or of
                lists of ids (any lengths; an empty one leaves its row as it is), or a tensor (B, T) with
                `attention_mask`. Text gets the tokenizer's special tokens, every turn anew.

        Raises:
            InputError: empty input, wrong shapes, ids outside the vocabulary, or text without a tokenizer.
        """
        self._read(inputs, attention_mask)
        return self

    def generate(
        self, inputs: Text | Ids, *, attention_mask: Tensor | None = None, return_ids: bool = False, **options: Any
    ) -> Any:
        """Read a turn and reply to it. The reply is not read: give it to `turn`, or in front of the next turn, if the
        memory should have it.

        Args:
            inputs: see `turn`. return_ids: token ids, a list for each row, instead of text.
            options: everything that the host's `generate()` takes (sampling, beams, stopping, ...).

        Returns: the text (or ids); a list for a batch or several sequences.

        Raises: as `turn`.
        """
        # Before anything is read: a conversation without a tokenizer cannot hand out text.
        tokenizer = None if return_ids else self.tokenizer
        turn = self._read(inputs, attention_mask)
        output = self.model.generate(encoder_outputs=turn, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        # The first column is the token that decoders start from.
        rows = [self._ended(row) for row in sequences[:, 1:].tolist()]
        results = rows if tokenizer is None else tokenizer.batch_decode(rows, skip_special_tokens=True)
        return results[0] if len(results) == 1 else results

    def fork(self) -> "Conversation":
        """An independent conversation that has read the same."""
        twin = Conversation(self.model, self.batch_size, tokenizer=self._tokenizer)
        # Tensors of a state are never changed in place.
        twin.state, twin._turns = self.state, self._turns
        return twin

    def reset(self) -> "Conversation":
        """Forget everything read."""
        with torch.no_grad():
            # Its own storage: training goes on to change a learned first state in place.
            self.state: State = self.base.memory.initial_state(self.batch_size).clone()
        self._turns = torch.zeros(self.batch_size, dtype=torch.long)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to one file, atomically; see `core.files`.

        Raises:
            InputError: the file cannot be written.
        """
        header = {**identity_of(self.base), "turns": self._turns.tolist()}
        write_file(path, self._kind, header, dict(self.state))

    @classmethod
    def load(
        cls, model: Any, path: str | os.PathLike, *, tokenizer: Any = None, max_bytes: int = MAX_BYTES
    ) -> "Conversation":
        """Read what `save` wrote, from any device or dtype.

        Raises:
            FileFormatError: the file is damaged, foreign, too large or too new.
            StateError: it belongs to another memory, host, or weights.
        """
        header, tensors = read_file(path, cls._kind, max_bytes=max_bytes)
        what = f"The conversation {path}"
        try:
            check_owner(base_model(model), header, what)
            turns = torch.tensor(header["turns"])
            if turns.dim() != 1 or turns.is_floating_point() or bool((turns < 0).any()):
                raise TypeError("impossible counters")
            one = cls(model, len(turns), tokenizer=tokenizer)
            state = State({n: t.to(one.base.device, one.state[n].dtype) for n, t in tensors.items()})
            if state.batch_size not in (None, len(turns)):
                raise TypeError("the state has another number of rows")
        except (KeyError, TypeError, AttributeError, RuntimeError, InputError) as error:
            raise FileFormatError(f"{what} is incomplete or inconsistent ({error}); restore it from a copy.") from error
        one.state._check_same(state)
        one.state, one._turns = state, turns
        return one

    def _begins(self) -> bool:
        return True

    def _read(self, inputs: Text | Ids, attention_mask: Tensor | None) -> EncodedTurn:
        ids, mask = self._encode(inputs, attention_mask)
        device = self.base.device
        with torch.no_grad():
            turn = self.base.read(ids.to(device), mask.to(device), memory_state=self.state)
        self.state, self._turns = turn.memory_state, self._turns + mask.any(1)
        return turn

    def _ended(self, row: Sequence[int]) -> list[int]:
        """A row up to and including its first end token."""
        ends = self.base.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return list(next((row[: i + 1] for i, token in enumerate(row) if token in ends), row))
