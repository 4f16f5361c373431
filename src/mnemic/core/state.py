"""State: what a memory remembers, as a value.

A state is a fixed set of named tensors, every one with the batch first. Operations return new states and never
change one in place, so a state can be kept, forked or handed to another process while a stream reads on. Code that
moves rows about (beam search, batches of streams, saving) works on any state and knows no memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import StateError

Rows = Tensor | Sequence[int]

GROWING = "archive"
"""A tensor of this name (in a stack "<memory>/archive") grows with what is read, along its second dimension. Rows that
have less of it than others beside them have zeros behind it; how much of it counts is another tensor's to say."""


class State(Mapping[str, Tensor]):
    """Named tensors of shape (B, ...), immutable as a set.

    Raises:
        StateError: where tensors disagree on the batch size.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        self._tensors: dict[str, Tensor] = dict(tensors or {})
        sizes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        if any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) > 1:
            raise StateError(f"Every tensor of a state has the batch as its first dimension; got shapes {sizes}.")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        inside = ", ".join(f"{n}: {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for n, t in self.items())
        return f"State({inside})"

    @property
    def batch_size(self) -> int | None:
        """Number of rows, or None for a state without tensors."""
        return next((t.shape[0] for t in self._tensors.values()), None)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        return State({name: function(t) for name, t in self._tensors.items()})

    def select(self, rows: Rows) -> "State":
        """The rows given, in that order; a row may be repeated. Also reorders (beam search)."""
        return self.map(lambda t: t.index_select(0, _index(rows, t.device)))

    def repeat(self, times: int) -> "State":
        """Each row `times` times, copies of a row next to each other."""
        return self.map(lambda t: t.repeat_interleave(times, dim=0))

    def put(self, rows: Rows, other: "State") -> "State":
        """This state with `rows` replaced by the rows of `other`."""
        mine, other = _levelled([self, other])
        return State({name: t.index_copy(0, _index(rows, t.device), other[name]) for name, t in mine.items()})

    def where(self, rows: Tensor, other: "State") -> "State":
        """`other` in the rows where the boolean mask (B,) is set, this state elsewhere."""
        this, other = _levelled([self, other])

        def pick(name: str, mine: Tensor) -> Tensor:
            mask = rows.to(mine.device).view(-1, *[1] * (mine.dim() - 1))
            return torch.where(mask, other[name], mine)

        return State({name: pick(name, t) for name, t in this.items()})

    def detach(self, rows: Tensor | None = None) -> "State":
        """Cut from the autograd graph: every row, or those set in the boolean mask (B,)."""
        # Tensors outside the graph stay the objects they are: a large store must not be copied for it.
        inside = State({name: t for name, t in self.items() if t.requires_grad})
        detached = inside.map(Tensor.detach)
        return State({**self, **(detached if rows is None else inside.where(rows, detached))})

    def to(self, *args, **kwargs) -> "State":
        """As `Tensor.to`, floating-point tensors only change dtype."""
        return self.map(lambda t: t.to(*args, **kwargs) if t.is_floating_point() else _move(t, *args, **kwargs))

    def clone(self) -> "State":
        return self.map(Tensor.clone)

    def equal(self, other: "State") -> bool:
        """Bit for bit: same names, dtypes, shapes and values."""
        return set(self) == set(other) and all(
            t.dtype == other[n].dtype and t.shape == other[n].shape and torch.equal(t.cpu(), other[n].cpu())
            for n, t in self.items()
        )

    @staticmethod
    def cat(states: Sequence["State"]) -> "State":
        """The rows of all states, one after another."""
        if not states:
            raise StateError("Nothing to concatenate: expected at least one state.")
        level = _levelled(states)
        return State({name: torch.cat([s[name] for s in level]) for name in states[0]})

    def _check_same(self, other: "State") -> None:
        mine, theirs = ({n: (_fixed(n, t), t.dtype) for n, t in state.items()} for state in (self, other))
        if mine != theirs:
            raise StateError(f"States of different memories cannot be mixed: {mine} against {theirs}.")


def _grows(name: str) -> bool:
    return name.rpartition("/")[2] == GROWING


def _fixed(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of a row, without what grows."""
    return tuple(tensor.shape[2 if _grows(name) else 1 :])


def _levelled(states: Sequence[State]) -> Sequence[State]:
    """States of one memory, what has grown as long in each of them. Raises `StateError` if they are of several."""
    for other in states[1:]:
        states[0]._check_same(other)
    most = {name: max(s[name].shape[1] for s in states) for name in states[0] if _grows(name)}

    def longer(name: str, tensor: Tensor) -> Tensor:
        missing = most[name] - tensor.shape[1] if name in most else 0
        return pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing]) if missing else tensor

    return [State({name: longer(name, t) for name, t in s.items()}) for s in states] if most else states


def _index(rows: Rows, device: torch.device) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.long, device=device)


def _move(tensor: Tensor, *args, **kwargs) -> Tensor:
    device = kwargs.get("device") or next((a for a in args if isinstance(a, str | torch.device)), None)
    return tensor if device is None else tensor.to(device)
