"""Compressed activations: what autograd saves for the backward pass, in 8 bits a number or fewer.

The forward pass is exact. A saved tensor is cut into groups of consecutive numbers; a group keeps its least value b,
its width a = max - min, and codes c = round((x - b) / a (2^bits - 1)), and comes back as b + a c / (2^bits - 1).
Rounding up or down at random, by how near, makes gradients noisy rather than wrong on average.

Source: Mesa (2021, arXiv 2111.11124). Decisions: the range is the tensor's own and is kept with it (the paper's
running ranges lag behind, and are overwritten before the backward pass reads them), so nothing is clipped. Groups lie
within one token: memory tokens can be far larger than the text beside them. torch's hooks on saved tensors are the
place, so that any host and any memory take part without a layer being rewritten.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ..core.errors import ConfigError

# Beyond this a range is that of a mask, whose zeros would not come back as zeros.
_WIDEST = 1e30
_NORMS = (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm)


@dataclass(frozen=True, eq=False)
class Packed:
    """A flat tensor in few bits: codes (G, g) uint8, low and width (G, 1) float32 or wider; G groups of g numbers."""

    codes: Tensor
    low: Tensor
    width: Tensor
    levels: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.low.nbytes + self.width.nbytes

    def unpack(self, shape: torch.Size) -> Tensor:
        values = self.low + self.codes.to(self.low.dtype) * (self.width / self.levels)
        return values.view(-1)[: shape.numel()].view(shape).to(self.dtype)


def pack(x: Tensor, levels: int = 255, group: int = 256, generator: torch.Generator | None = None) -> Packed | None:
    """`x` in codes from 0 to `levels` (at most 255); None where it holds infinities or a mask's huge numbers.

    Args:
        x: floating point, any shape. group: the most numbers that share a range: the last dimension, or equal parts of
            it where that cuts it evenly into not too small ones. generator: for rounding at random, on the
            device of x; None rounds to the nearest code.
    """
    flat = x.detach().reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    group = _even(x.shape[-1], group)
    if rest := -len(flat) % group:
        flat = torch.cat([flat, flat[-1:].expand(rest)])
    flat = flat.view(-1, group)
    low, high = flat.aminmax(dim=1, keepdim=True)
    width = high - low
    if not bool((width < _WIDEST).all()):
        return None
    codes = (flat - low) * (levels / width.masked_fill(width == 0, 1.0))
    if generator is None:
        codes = codes.round_()
    else:
        codes = codes.add_(torch.rand(codes.shape, generator=generator, device=x.device, dtype=codes.dtype)).floor_()
    return Packed(codes.clamp_(0, levels).to(torch.uint8), low, width, levels, x.dtype)


def _even(length: int, most: int) -> int:
    """The largest part of `length` up to `most`; `most` itself, whatever the length, where that is below a quarter."""
    largest = next(g for g in range(min(length, most), 0, -1) if length % g == 0)
    return largest if largest >= min(length, most) / 4 else most


class CompressedActivations:
    """Saved activations in few bits while it is open, which is around the forward pass::

        with CompressedActivations(model.parameters(), seed=step) as saved:
            loss = model(**batch).loss
        loss.backward()

    Left exact: parameters and all that shares their storage; integers; tensors below `min_numel`; what repeats a
    smaller tensor; masks; and the statistics of norms and of fused attention (means, scales, log-sum-exps). A tensor
    that several operations save is packed once.

    Args:
        parameters: of the model. bits: 2 to 8; each code takes a byte. group: see `pack`.
        rounding: "stochastic", which is unbiased, or "nearest". min_numel: smaller tensors are kept as they are.
        attention: also what fused attention saves; its probabilities then come from rounded queries and keys.
        seed: of the rounding, whose generator is its own: dropout draws what it would have drawn.

    Attributes:
        before, after: bytes of what was packed, and of what is kept of it.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        bits: int = 8,
        group: int = 256,
        rounding: str = "stochastic",
        min_numel: int = 1024,
        attention: bool = True,
        seed: int = 0,
    ):
        if not 2 <= bits <= 8 or group < 2 or min_numel < 1 or rounding not in ("stochastic", "nearest"):
            raise ConfigError(
                f"bits = {bits}, group = {group}, min_numel = {min_numel}, rounding = {rounding!r}; expected 2 to 8 "
                "bits, groups of at least 2, a least size of at least 1, and 'stochastic' or 'nearest'."
            )
        self.parameters, self.levels, self.group = list(parameters), 2**bits - 1, group
        self.stochastic, self.min_numel, self.attention, self.seed = (
            rounding == "stochastic",
            min_numel,
            attention,
            seed,
        )
        self.before = self.after = 0
        self._within = _Within()
        self._open = ExitStack()

    def __enter__(self) -> "CompressedActivations":
        self._own = {p.untyped_storage()._cdata for p in self.parameters}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._packed: dict[tuple, tuple[StorageWeakRef, Packed]] = {}
        self._open.enter_context(self._within)
        self._open.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, _load))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()
        self._packed.clear()

    def _save(self, tensor: Tensor) -> Tensor | tuple[Packed, torch.Size]:
        if self._is_exact(tensor):
            return tensor
        storage = tensor.untyped_storage()
        layout = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
        key = (storage._cdata, tensor.storage_offset(), layout, tensor.dtype, tensor._version)
        # The weak reference keeps the number of a freed storage from being given to another.
        known = self._packed.get(key)
        if known is None:
            packed = pack(tensor, self.levels, self.group, self._generator(tensor.device))
            if packed is None:
                return tensor
            self.before, self.after = self.before + tensor.nbytes, self.after + packed.nbytes
            known = self._packed[key] = (StorageWeakRef(storage), packed)
        return known[1], tensor.shape

    def _is_exact(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.layout != torch.strided:
            return True
        storage = tensor.untyped_storage()
        small = tensor.numel() < self.min_numel or tensor.nbytes > storage.nbytes() or tensor.shape[-1] == 1
        return small or storage._cdata in self._own or self._within.keeps(tensor, self.attention)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if not self.stochastic:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _load(saved: Any) -> Tensor:
    return saved[0].unpack(saved[1]) if isinstance(saved, tuple) else saved


class _Within(TorchFunctionMode):
    """Knows which norm or fused attention is running, and so which of the tensors it saves are statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.size: int | None = None
        self.attending = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMS and func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        before = self.size, self.attending
        given = args[0] if args else kwargs.get("input", kwargs.get("query"))
        self.size, self.attending = given.numel(), func is F.scaled_dot_product_attention
        try:
            return func(*args, **kwargs)
        finally:
            self.size, self.attending = before

    def keeps(self, tensor: Tensor, attention: bool) -> bool:
        if self.size is None:
            return False
        if self.attending:
            return not attention or tensor.dim() != 4
        return tensor.numel() < self.size
