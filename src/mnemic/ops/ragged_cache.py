"""A key-value cache whose heads hold different numbers of slots.

Shapes: B batch, Hkv key heads, n capacity, T tokens, e width. Of each (row, head) the first `lengths` slots are in use;
the others are zero and must be masked. A token either opens a slot or overwrites the last one, per head.

Buffers are written in place: one owner, no graph. `tensors` is a flat dict with the batch first, so code that knows no
cache can select rows, clone and save; `RaggedCache(tensors)` takes such a dict back.
"""

from fractions import Fraction

import torch
from torch import Tensor

# Slots are added in blocks, by a quarter at least: about five copies of each slot over the cache's life, and at most a
# quarter of the memory idle, where doubling could waste what compression saved.
_BLOCK = 64


class RaggedCache:
    """Slots per (row, head), of different number.

    `tensors` holds
        keys (B, Hkv, n, e), values (B, Hkv, n, width of v), positions (B, Hkv, n) int64,
        lengths (B, Hkv) int64: slots in use,
        seen (B,) int64: tokens written.
    Growing replaces the first three.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        missing = {"keys", "values", "positions", "lengths", "seen"} - tensors.keys()
        if missing:
            raise KeyError(f"A ragged cache needs the tensors {sorted(missing)}; RaggedCache.empty makes all of them.")
        self.tensors = tensors
        lengths = tensors["lengths"]
        # Reading lengths waits for the device, so the host keeps what it can know without: a bound that only grows,
        # and whether every head has a slot to overwrite, which stays true once it is.
        self._longest = int(lengths.max()) if lengths.numel() else 0
        self._started = bool((lengths > 0).all())

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_heads: int,
        key_width: int,
        value_width: int | None = None,
        capacity: int = _BLOCK,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "RaggedCache":
        """A cache without slots; value_width defaults to key_width."""
        shape = (batch_size, num_heads, capacity)
        value_width = key_width if value_width is None else value_width
        return cls(
            {
                "keys": torch.zeros(*shape, key_width, dtype=dtype, device=device),
                "values": torch.zeros(*shape, value_width, dtype=dtype, device=device),
                "positions": torch.zeros(shape, dtype=torch.int64, device=device),
                "lengths": torch.zeros(shape[:2], dtype=torch.int64, device=device),
                "seen": torch.zeros(batch_size, dtype=torch.int64, device=device),
            }
        )

    @property
    def capacity(self) -> int:
        """n."""
        return self.tensors["keys"].shape[2]

    @torch.no_grad()
    def write(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        opens: Tensor,
        survives: Tensor,
        real: Tensor | None = None,
    ) -> None:
        """Write T new tokens of every row, in place.

        Args:
            keys, values: (B, Hkv, T, e): the slot as it stands after each token. positions: (B, T) int64.
            opens: (B, Hkv, T) bool: the token opens a slot; otherwise it overwrites the last one.
            survives: (B, Hkv, T) bool: the token is the last real one that this call writes into its slot; only
                these are stored (a single token always is).
            real: (B, T) bool, False for tokens that change nothing. None: all are real.

        Raises:
            ValueError: a token overwrites a slot where its head has none.
        """
        tokens = keys.shape[2]
        if tokens == 0:
            return
        if real is not None:
            opens = opens & real[:, None]
        slots = self.tensors["lengths"][..., None] + opens.cumsum(-1) - 1
        if not self._started:
            self._check_started(slots, real)
        self._reserve(tokens)
        if tokens == 1:
            self._write_one(keys, values, positions, slots, real)
        else:
            self._write_many(keys, values, positions, slots, survives)
        self.tensors["lengths"] += opens.sum(-1)
        self.tensors["seen"] += tokens if real is None else real.sum(-1)

    def visible(self) -> Tensor:
        """(B, Hkv, n) bool: the slots in use."""
        lengths = self.tensors["lengths"]
        return torch.arange(self.capacity, device=lengths.device) < lengths[..., None]

    def used_bytes(self) -> int:
        """Bytes of the slots in use (keys, values and positions)."""
        return int(self.tensors["lengths"].sum()) * sum(
            t[:1, :1, :1].numel() * t.element_size() for t in self._slot_tensors()
        )

    def capacity_bytes(self) -> int:
        """Bytes of the slots allocated."""
        return sum(t.numel() * t.element_size() for t in self._slot_tensors())

    def compression_ratio(self) -> Fraction:
        """Tokens seen / slots kept, over all rows and heads, exact; 1 for an empty cache."""
        tokens, slots = int(self.tensors["seen"].sum()), int(self.tensors["lengths"].sum())
        return Fraction(tokens * self.tensors["lengths"].shape[1], slots) if slots else Fraction(1)

    def _slot_tensors(self) -> list[Tensor]:
        return [self.tensors[name] for name in ("keys", "values", "positions")]

    def _write_one(self, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor, real: Tensor | None) -> None:
        """One slot per (row, head), without waiting for the device."""
        new = (keys, values, positions[:, None].expand_as(slots))
        if real is not None:
            # A row that writes nothing writes back what stands in some slot of its own.
            slots = slots.clamp(min=0)
        for buffer, x in zip(self._slot_tensors(), new, strict=True):
            index = _match(slots, x).expand_as(x)
            if real is not None:
                x = torch.where(_match(real[:, None], x), x.to(buffer.dtype), buffer.gather(2, index))
            buffer.scatter_(2, index, x.to(buffer.dtype))

    def _write_many(self, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor, survives: Tensor) -> None:
        """The surviving slots alone are moved."""
        row, head, token = survives.nonzero(as_tuple=True)
        slot = slots[row, head, token]
        new = (keys[row, head, token], values[row, head, token], positions[row, token])
        for buffer, x in zip(self._slot_tensors(), new, strict=True):
            buffer[row, head, slot] = x.to(buffer.dtype)

    def _check_started(self, slots: Tensor, real: Tensor | None) -> None:
        """Every head opens a slot before it overwrites one."""
        nowhere = slots < 0 if real is None else (slots < 0) & real[:, None]
        if bool(nowhere.any()):
            row, head = (int(i) for i in nowhere.any(-1).nonzero()[0])
            raise ValueError(
                f"Row {row}, head {head} has no slot to overwrite: the first token of a row must open one "
                "(set opens for it)."
            )
        self._started = bool((slots[..., -1] >= 0).all())

    def _reserve(self, extra: int) -> None:
        """Room for so many more slots of each head."""
        self._longest += extra
        if self._longest <= self.capacity:
            return
        lengths = self.tensors["lengths"]
        self._longest = (int(lengths.max()) if lengths.numel() else 0) + extra
        if self._longest <= self.capacity:
            return
        wanted = max(self._longest, self.capacity + self.capacity // 4)
        wanted = -(-wanted // _BLOCK) * _BLOCK
        for name, old in zip(("keys", "values", "positions"), self._slot_tensors(), strict=True):
            new = old.new_zeros(*old.shape[:2], wanted, *old.shape[3:])
            new[:, :, : old.shape[2]] = old
            self.tensors[name] = new


def _match(x: Tensor, like: Tensor) -> Tensor:
    """x with as many dimensions as like."""
    return x if x.dim() == like.dim() else x[..., None]
