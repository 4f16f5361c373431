"""Inputs: text and token ids in the forms that a caller may give them, as left-padded rows."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from operator import index
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import InputError
from .anatomy import token_embeddings
from .inputs import check_vocabulary

Text = str | Sequence[str]
Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


class Inputs:
    """What a stream or a conversation reads: strings, ids, lists or tensors of them, one row or several."""

    _kind: ClassVar[str]
    base: Any
    batch_size: int
    _tokenizer: Any

    @property
    def tokenizer(self) -> Any:
        """Raises `InputError` where there is none."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            name = getattr(self.base.config, "_name_or_path", "")
            try:
                if not name:
                    raise OSError("the host was built without a name")
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"This {self._kind} has no tokenizer ({error}); pass tokenizer= to {self._kind}(), or use ids "
                    "(and return_ids=True)."
                ) from error
        return self._tokenizer

    def _begins(self) -> bool:
        """Whether the tokenizer's special tokens go with the next text."""
        raise NotImplementedError

    def _encode(self, inputs: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids (B, Q), left-padded, and their mask."""
        if isinstance(inputs, Tensor):
            ids = inputs.cpu() if inputs.dim() == 2 else inputs.cpu()[None]
            mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
            if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or mask.shape != ids.shape:
                raise InputError(
                    f"Ids of shape {tuple(inputs.shape)} and dtype {inputs.dtype} with a mask of shape "
                    f"{tuple(mask.shape)}; expected int64 ids (batch, tokens) and a mask of the same shape."
                )
        else:
            if attention_mask is not None:
                raise InputError("attention_mask goes with a tensor of ids; lists of any lengths need none.")
            ids, mask = self._pad(self._rows(inputs))
        if ids.shape[0] != self.batch_size:
            raise InputError(f"Input of {ids.shape[0]} rows for a {self._kind} of {self.batch_size}.")
        if not ids.numel() or not bool(mask.any()):
            raise InputError("Empty input: expected at least one token.")
        check_vocabulary(ids.long()[mask.bool()], token_embeddings(self.base).shape[0])
        return ids.long().masked_fill(mask == 0, 0), mask

    def _rows(self, inputs: Any) -> list[list[int]]:
        texts: Any = [inputs] if isinstance(inputs, str) else inputs
        try:
            if isinstance(inputs, Mapping):
                raise TypeError("of a tokenizer's output, give the input_ids")
            if all(isinstance(t, str) for t in texts):
                rows = [self._tokens(t, add_special_tokens=self._begins()) for t in texts]
                # Some tokenizers add nothing but special tokens to an empty string.
                return rows if any(texts) else [[]]
            flat = all(isinstance(t, Integral) for t in texts)
            # index() takes the integers of any library and neither floats nor text.
            return [[index(i) for i in row] for row in ([texts] if flat else texts)]
        except TypeError as error:
            raise InputError(
                f"Cannot read input of type {type(inputs).__name__} ({error}); expected text, token ids, or a list of "
                "either."
            ) from error

    def _tokens(self, text: str, **options: Any) -> list[int]:
        tokenizer = self.tokenizer
        try:
            return tokenizer(text, **options)["input_ids"]
        # The tokenizers library raises bare exceptions, for example on a word without a token.
        except Exception as error:
            raise InputError(f"The tokenizer cannot read {text[:60]!r}: {error}") from error

    @staticmethod
    def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[i, longest - len(row) :] = 1
        return ids, mask
