"""The store of engrams against lists and against the released package; its invariants; what use keeps alive."""

import pytest
import torch
from torch import Tensor

from mnemic.ops import engrams
from mnemic.ops.engrams import EMPTY, LONG, SHORT, WORKING, Engrams
from tests.memories.engram_lists import Row

KINDS = {"working": WORKING, "short": SHORT, "long": LONG}
WIDE = torch.float64


def new_store(rows: int = 1, slots: int = 40, width: int = 5) -> Engrams:
    return engrams.empty(rows, slots, width, WIDE, torch.device("cpu"))


def ids_of(store: Engrams, recalled: Tensor, row: int = 0) -> list[int]:
    return [int(store.born[row, slot]) for slot in recalled[row] if slot >= 0]


def assert_same(store: Engrams, lists: Row, row: int = 0) -> None:
    """Same engrams, kinds, lives, data and counts; empty slots hold nothing."""
    slots = {int(b): i for i, b in enumerate(store.born[row]) if b >= 0}
    assert set(slots) == {e.id for e in lists.engrams}
    assert int(store.made[row]) == lists.made
    for e in lists.engrams:
        i = slots[e.id]
        assert int(store.kind[row, i]) == KINDS[e.kind]
        assert float(store.lifespan[row, i]) == pytest.approx(e.life, abs=1e-12)
        assert torch.equal(store.data[row, i], e.data)
        for f in lists.engrams:
            assert int(store.counts[row, i, slots[f.id]]) == lists.count(e.id, f.id)
    free = store.born[row] < 0
    assert torch.equal(free, store.kind[row] == EMPTY)
    assert not store.data[row, free].any()
    assert not store.lifespan[row, free].any()
    assert not store.counts[row, free].any()
    assert not store.counts[row, :, free].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [(3, 6, 2, 3, 2, 60), (2, 3, 3, 2, 0, 60), (4, 5, 2, 9, 20, 60), (3, 4, 2, 2, 1, 9), (3, 50, 2, 2, 3, 60)],
    ids=["usual", "no walk", "far walk", "full", "no long"],
)  # fmt: skip
def test_equals_lists(settings, seed):
    """Two rows of which the second makes a step only every other time; lives are gained at random, and lost."""
    working, capacity, num_short, num_long, depth, room = settings
    make = torch.Generator().manual_seed(seed)
    store, rows, had_long = new_store(2, room), [Row(), Row()], 0
    recalled = torch.full((2, num_short + num_long), -1)
    for step in range(25):
        active = torch.tensor([True, step % 2 == 0])
        gain = (torch.rand(recalled.shape, generator=make, dtype=WIDE) * 4).masked_fill(recalled < 0, 0)
        fresh = torch.randn(2, working, 5, generator=make, dtype=WIDE)
        ages = [dict(zip(ids_of(store, recalled, b), gain[b, recalled[b] >= 0].tolist(), strict=True)) for b in (0, 1)]
        after = engrams.add(engrams.age(store, recalled, gain, capacity), fresh, 4.0)
        found = engrams.recall(after, num_short, num_long, depth)
        after = engrams.fire(after, found)
        keep = lambda new, old, on=active: torch.where(on.view(-1, *[1] * (new.dim() - 1)), new, old)  # noqa: E731
        store, recalled = Engrams(*map(keep, after, store)), keep(found, recalled)
        for b in (0, 1):
            if active[b]:
                rows[b].age(ages[b], capacity)
                rows[b].add(fresh[b], 4.0, room)
                expected = rows[b].recall(num_short, num_long, depth)
                rows[b].fire(expected)
                assert ids_of(store, recalled, b) == expected
            assert_same(store, rows[b], b)
        had_long += len(rows[0].of("long"))
    assert (had_long > 0) is (capacity < 50)


def test_invariants_of_a_long_run():
    make = torch.Generator().manual_seed(0)
    store = new_store(3, 30)
    recalled = torch.full((3, 5), -1)
    for _ in range(200):
        gain = torch.rand(recalled.shape, generator=make, dtype=WIDE) * 2
        store = engrams.age(store, recalled, gain, 7)
        assert ((store.kind == SHORT).sum(1) <= 7).all()
        assert (store.lifespan[store.kind != EMPTY] > 0).all()
        store = engrams.add(store, torch.randn(3, 2, 5, generator=make, dtype=WIDE), 6.0)
        recalled = engrams.recall(store, 3, 2, 4)
        store = engrams.fire(store, recalled)
        assert torch.equal(store.counts, store.counts.mT)
        # Nobody fires more often with another than in all.
        own = store.counts.diagonal(dim1=1, dim2=2)
        assert (store.counts <= torch.minimum(own[:, :, None], own[:, None, :])).all()
        kinds = store.kind.gather(1, recalled.clamp_min(0))
        assert ((kinds == SHORT) | (kinds == LONG) | (recalled < 0)).all()
    assert (store.kind == LONG).any()


@pytest.mark.parametrize("lifespan", [1, 4, 9])
def test_unused_engrams_live_as_long_as_they_are_given(lifespan):
    store, none = new_store(), torch.full((1, 1), -1)
    store = engrams.add(store, torch.ones(1, 2, 5, dtype=WIDE), float(lifespan))
    for step in range(lifespan):
        assert int((store.born[0] < 2).logical_and(store.born[0] >= 0).sum()) == 2, step
        store = engrams.age(store, none, torch.zeros(1, 1, dtype=WIDE), 1)
    assert not (store.kind != EMPTY).any()


def test_ties_depend_on_nothing_outside_the_row():
    """Links of count 0 only: the start is drawn, differently as engrams are made, and alike alone and in a batch."""
    make = torch.Generator().manual_seed(3)
    fresh = torch.randn(2, 12, 1, 5, generator=make, dtype=WIDE)

    def starts(data: Tensor) -> list[list[list[int]]]:
        store, none, found = new_store(len(data)), torch.full((len(data), 1), -1), []
        for step in range(data.shape[1]):
            store = engrams.age(store, none, torch.zeros(len(data), 1, dtype=WIDE), 2)
            store = engrams.add(store, data[:, step], 50.0)
            recalled = engrams.recall(store, 1, 1, 0)
            found.append([ids_of(store, recalled[:, 1:], b) for b in range(len(data))])
        return found

    together = starts(fresh)
    assert together == [[a[0], b[0]] for a, b in zip(starts(fresh[:1]), starts(fresh[1:]), strict=True)]
    drawn = {one[0][0] for one in together if one[0]}
    assert len(drawn) > 3


@pytest.mark.parametrize(("num_short", "depth"), [(6, 2), (3, 60)], ids=["walked", "all are reached"])
def test_equals_the_released_package(num_short, depth):
    """20 steps beside `memoria-pytorch`, batch 1: what is recalled from the first long-term engram on, lives, kinds and
    counts throughout.

    Counts start at numbers of their own, for the package draws among ties at random. It takes the last engram for
    "none" when fewer short-term engrams are recalled than there are, and may start anywhere then: there all of
    long-term memory is reached. It also lets "none", as a vector of zeros, compete among what was found, and fires
    engram 0 while there is nothing in long-term memory. After each comparison ours goes on from what it recalled.
    """
    package = pytest.importorskip("memoria", reason="needs memoria-pytorch, a second witness")
    working, capacity, num_long = 2, 6, 5
    peer = package.Memoria(num_short, capacity, depth, 9, num_long, track_id=True)
    make, extra = torch.Generator().manual_seed(0), torch.randint(100_000, (64, 64), generator=torch.Generator())
    extra = extra + extra.T
    store, compared, displaced = new_store(slots=60), 0, 0
    for _ in range(20):
        fresh = torch.randn(1, working, 5, generator=make)
        store = engrams.add(store, fresh.to(WIDE), 9.0)
        peer.add_working_memory(fresh)
        _add_counts(store.counts[0], store.born[0], store.made[0] - working, extra)
        _add_counts(peer.engrams.induce_counts[0], peer.engrams.engram_ids[0].long(), store.made[0] - working, extra)
        mine = ids_of(store, engrams.recall(store, num_short, num_long, depth))
        has_long = bool((store.kind == LONG).any())
        _, theirs = peer.remind()
        ids = peer.engrams.engram_ids[0].tolist()
        named = [ids[i] for i in theirs[0] if i >= 0]
        if has_long:
            fewer = set(named) == set(mine[:-1]) and bool((theirs < 0).any())
            assert fewer or set(named) == set(mine)
            compared, displaced = compared + 1, displaced + fewer
        slots = {int(b): i for i, b in enumerate(store.born[0]) if b >= 0}
        recalled = torch.tensor([[slots[i] for i in named]])
        store = engrams.fire(store, recalled)
        # Used engrams live longer by a number of their own, in parts that float32 holds exactly.
        gains = {i: ((7 * i) % 16) / 8 for i in named}
        peer.adjust_lifespan_and_memories(theirs, torch.tensor([[gains[ids[i]] if i >= 0 else 0.0 for i in theirs[0]]]))
        store = engrams.age(store, recalled, torch.tensor([[gains[i] for i in named]], dtype=WIDE), capacity)
        left = peer.engrams
        slots = {int(b): i for i, b in enumerate(store.born[0]) if b >= 0}
        assert set(slots) == set(left.engram_ids[0].tolist())
        order = [slots[int(i)] for i in left.engram_ids[0]]
        assert torch.equal(store.lifespan[0, order].float(), left.lifespan[0])
        assert torch.equal(store.kind[0, order], left.engrams_types[0].long())
        assert torch.equal(store.counts[0][order][:, order], left.induce_counts[0])
    assert compared == 16
    # "None" is there only where the walk runs out of engrams.
    assert displaced <= (2 if depth == 2 else 12)


def _add_counts(counts: Tensor, ids: Tensor, first_new: Tensor, extra: Tensor) -> None:
    """To links of new engrams, in place: the numbers that `extra` has for their ids."""
    new = ids >= first_new
    touched = (new[:, None] | new[None]) & (ids >= 0)[:, None] & (ids >= 0)[None]
    counts += (extra[ids.clamp_min(0)][:, ids.clamp_min(0)] * touched).to(counts.dtype)


def _recalled_partners(scale: float) -> float:
    """16 cues in short-term and their partners in long-term memory, each pair fired together once; then 30 steps of two
    noisy cues and a filler, and only engrams of pairs that are recalled live longer. Share of noisy cues, alone, that
    call their partner back, with room for 2 of the 16."""
    make = torch.Generator().manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, 32, generator=make, dtype=WIDE), dim=-1)  # noqa: E731
    near = lambda x: x + 0.05 * torch.randn(x.shape, generator=make, dtype=WIDE)  # noqa: E731
    store, cues = engrams.add(new_store(slots=120, width=32), unit(1, 32), 9.0), None
    cues = store.data[0, store.born[0].argsort()][-16:]
    # Partners are the older half, cue 16 + i belongs to partner i.
    store = engrams.age(store, torch.full((1, 8), -1), torch.zeros(1, 8, dtype=WIDE), 16)
    pair = (store.born[:, :, None] % 16 == store.born[:, None] % 16) & (store.born >= 0)[:, None]
    store = store._replace(counts=pair.to(torch.int32))
    recalled = torch.full((1, 8), -1)
    for step in range(30):
        fresh = torch.cat([near(cues[[2 * step % 16, (2 * step + 1) % 16]]), unit(1)])
        store = engrams.add(store, fresh[None], 9.0)
        recalled = engrams.recall(store, 4, 4, 0)
        store = engrams.fire(store, recalled)
        ids = store.born.gather(1, recalled.clamp_min(0))
        gain = scale * ((recalled >= 0) & (ids < 32)).to(WIDE)
        store = engrams.age(store, recalled, gain, 64)
    right = 0
    for i in range(16):
        asked = engrams.add(store, near(cues[i : i + 1])[None], 9.0)
        right += i in ids_of(asked, engrams.recall(asked, 2, 2, 0)[:, 2:])
    return right / 16


def test_what_is_used_is_remembered():
    assert _recalled_partners(8.0) > 0.9
    assert _recalled_partners(0.0) == 0
