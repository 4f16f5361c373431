"""A row of engrams as Python lists: what `ops.engrams` must equal."""

from dataclasses import dataclass, field

from torch import Tensor

_WRAP = 1 << 64


def signed(x: int) -> int:
    x %= _WRAP
    return x - _WRAP if x >= _WRAP >> 1 else x


def tie(source: int, target: int, made: int) -> int:
    """The hash by which links of equal counts are ranked, with 64-bit integers that wrap around."""
    x = signed(source * 0x1E3779B97F4A7C15 + target * 0x3F58476D1CE4E5B9 + made * 0x14D049BB133111EB)
    x = signed((x ^ (x >> 29)) * 0x2545F4914F6CDD1D)
    return (x ^ (x >> 31)) & ((1 << 40) - 1)


@dataclass
class Engram:
    id: int
    data: Tensor
    life: float
    kind: str = "working"


@dataclass
class Row:
    """One row's store; ids are the numbers in which engrams were made, as `Engrams.born`."""

    engrams: list[Engram] = field(default_factory=list)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    made: int = 0

    def of(self, *kinds: str) -> list[Engram]:
        return [e for e in self.engrams if e.kind in kinds]

    def count(self, a: int, b: int) -> int:
        return self.counts.get((a, b), 0)

    def add(self, new: Tensor, life: float, room: int | None = None) -> None:
        while room is not None and len(self.engrams) + len(new) > room:
            self.drop(min(self.engrams, key=lambda e: (e.life, e.id)).id)
        for data in new:
            self.engrams.append(Engram(self.made, data.detach().clone(), life))
            self.made += 1

    def near(self, engram: Engram) -> float:
        """Sum over working engrams of minus the squared distance."""
        return -float(sum((w.data - engram.data).square().sum() for w in self.of("working")))

    def recall(self, num_short: int, num_long: int, depth: int) -> list[int]:
        short = sorted(self.of("short"), key=self.near, reverse=True)[:num_short]
        long, seen = [e.id for e in self.of("long")], set()
        walkers = []
        for e in short if long else []:
            best = max(long, key=lambda j, i=e.id: (self.count(i, j), tie(i, j, self.made)))
            walkers.append(best)
        seen |= set(walkers)
        for _ in range(depth):
            left = [j for j in long if j not in seen]
            if not left:
                break
            walkers = [max(left, key=lambda j, i=i: (self.count(i, j), -j)) for i in walkers]
            seen |= set(walkers)
        found = sorted((e for e in self.engrams if e.id in seen), key=self.near, reverse=True)
        return [e.id for e in short] + [e.id for e in found[:num_long]]

    def fire(self, recalled: list[int]) -> None:
        together = {e.id for e in self.of("working")} | set(recalled)
        for i in together:
            for j in together:
                self.counts[i, j] = self.count(i, j) + 1

    def age(self, gains: dict[int, float], capacity: int) -> None:
        for e in self.engrams:
            e.life += gains.get(e.id, 0.0) - 1
            e.kind = "short" if e.kind == "working" else e.kind
        for e in sorted(self.of("short"), key=lambda e: -e.id)[capacity:]:
            e.kind = "long"
        for e in [e for e in self.engrams if e.life <= 0]:
            self.drop(e.id)

    def drop(self, id: int) -> None:
        self.engrams = [e for e in self.engrams if e.id != id]
        self.counts = {pair: n for pair, n in self.counts.items() if id not in pair}
