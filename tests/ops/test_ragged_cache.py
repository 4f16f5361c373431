"""Ragged cache: writes against lists, growth, rows, and the counters."""

from fractions import Fraction

import pytest
import torch

from mnemic.ops.ragged_cache import RaggedCache

ROWS, HEADS = 3, 2


def stream(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens of all rows; the first real token of each row opens."""
    make = torch.Generator().manual_seed(seed)
    real = torch.rand(ROWS, tokens, generator=make) < 0.8
    opens = torch.rand(ROWS, HEADS, tokens, generator=make) < 0.5
    opens |= ((real.cumsum(-1) == 1) & real)[:, None]
    return {
        "keys": torch.randn(ROWS, HEADS, tokens, 4, generator=make),
        "values": torch.randn(ROWS, HEADS, tokens, 5, generator=make),
        "positions": torch.arange(tokens).repeat(ROWS, 1) + 10,
        "opens": opens,
        "real": real,
    }


def slots_of(data: dict, row: int, head: int) -> list[int]:
    """The token that each slot ends with."""
    slots: list[int] = []
    for t in range(data["real"].shape[1]):
        if data["real"][row, t]:
            slots = slots if data["opens"][row, head, t] else slots[:-1]
            slots = [*slots, t]
    return slots


def survivors(data: dict) -> torch.Tensor:
    kept = torch.zeros_like(data["opens"])
    for row in range(ROWS):
        for head in range(HEADS):
            kept[row, head, slots_of(data, row, head)] = True
    return kept


def write(cache: RaggedCache, data: dict, sizes: list[int]) -> None:
    begin = 0
    for size in sizes:
        part = {name: x[:, begin : begin + size] for name, x in data.items() if name in ("positions", "real")}
        part |= {name: data[name][:, :, begin : begin + size] for name in ("keys", "values", "opens")}
        cache.write(**part, survives=survivors({**data, **part}))
        begin += size


def assert_holds(cache: RaggedCache, data: dict) -> None:
    held = cache.tensors
    for row in range(ROWS):
        for head in range(HEADS):
            slots = slots_of(data, row, head)
            n = len(slots)
            assert held["lengths"][row, head] == n
            assert cache.visible()[row, head].tolist() == [True] * n + [False] * (cache.capacity - n)
            assert torch.equal(held["keys"][row, head, :n], data["keys"][row, head, slots])
            assert torch.equal(held["values"][row, head, :n], data["values"][row, head, slots])
            assert held["positions"][row, head, :n].tolist() == [t + 10 for t in slots]
            for name in ("keys", "values", "positions"):
                assert not held[name][row, head, n:].any()
    assert held["seen"].tolist() == data["real"].sum(-1).tolist()


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [2, 1, 1, 20, 6]])
@pytest.mark.parametrize("padded", [False, True])
def test_writes_keep_the_last_token_of_each_slot(sizes, padded):
    data = stream(30)
    if not padded:
        data["real"][:] = True
        data["opens"][..., 0] = True
    cache = RaggedCache.empty(ROWS, HEADS, 4, 5, capacity=2)
    write(cache, data, sizes)
    assert_holds(cache, data)
    if not padded:
        free = RaggedCache.empty(ROWS, HEADS, 4, 5, capacity=2)
        for t in range(30):
            keys, values, opens = (data[name][:, :, t : t + 1] for name in ("keys", "values", "opens"))
            free.write(keys, values, data["positions"][:, t : t + 1], opens, torch.ones_like(opens))
        assert_holds(free, data)


def test_capacity_grows_by_a_quarter_in_blocks_and_keeps_what_is_held():
    cache = RaggedCache.empty(1, 1, 2, capacity=64)
    capacities = []
    for t in range(700):
        x = torch.full((1, 1, 1, 2), float(t))
        yes = torch.ones(1, 1, 1, dtype=torch.bool)
        cache.write(x, x, torch.tensor([[t]]), yes, yes)
        if not capacities or capacities[-1] != cache.capacity:
            capacities.append(cache.capacity)
    assert capacities == [64, 128, 192, 256, 320, 448, 576, 768]
    assert cache.tensors["keys"][0, 0, :700, 0].tolist() == list(range(700))


def test_capacity_does_not_grow_for_tokens_that_merge():
    cache = RaggedCache.empty(1, 1, 2, capacity=4)
    for t in range(100):
        x = torch.full((1, 1, 1, 2), float(t))
        cache.write(x, x, torch.tensor([[t]]), torch.tensor([[[t % 50 == 0]]]), torch.tensor([[[True]]]))
    assert cache.capacity == 4
    assert cache.tensors["positions"][0, 0, :2].tolist() == [49, 99]
    assert cache.compression_ratio() == 50


def test_bytes_and_ratio_are_exact():
    cache = RaggedCache.empty(ROWS, HEADS, 4, 5, dtype=torch.bfloat16, capacity=40)
    assert cache.compression_ratio() == 1
    assert cache.used_bytes() == 0
    data = stream(30, seed=1)
    write(cache, data, [30])
    slots = sum(len(slots_of(data, r, h)) for r in range(ROWS) for h in range(HEADS))
    assert cache.compression_ratio() == Fraction(int(data["real"].sum()) * HEADS, slots)
    # 4 and 5 numbers of 2 bytes, and a position of 8.
    assert cache.used_bytes() == slots * (4 * 2 + 5 * 2 + 8)
    assert cache.capacity_bytes() == ROWS * HEADS * 40 * (4 * 2 + 5 * 2 + 8)


def test_rows_are_selected_from_the_tensors_and_written_on():
    data = stream(30, seed=2)
    first = {n: x[:, :20] if n in ("positions", "real") else x[:, :, :20] for n, x in data.items()}
    last = {n: x[:, 20:] if n in ("positions", "real") else x[:, :, 20:] for n, x in data.items()}
    cache = RaggedCache.empty(ROWS, HEADS, 4, 5, capacity=2)
    write(cache, first, [20])
    order = torch.tensor([2, 0, 1])
    turned = RaggedCache({name: x[order] for name, x in cache.tensors.items()})
    # A stream that goes on may overwrite; the survivors are found as in a stream of its own.
    part = {name: x[order] for name, x in (last | {"survives": survivors(last)}).items()}
    turned.write(**part)
    assert_holds(RaggedCache({name: x[order.argsort()] for name, x in turned.tensors.items()}), data)
    assert_holds(cache, first)


def test_a_head_without_slots_cannot_be_overwritten():
    x = torch.zeros(2, 1, 1, 2)
    places = torch.zeros(2, 1, dtype=torch.int64)
    opens = torch.tensor([[[True]], [[False]]])
    cache = RaggedCache.empty(2, 1, 2)
    with pytest.raises(ValueError, match="Row 1, head 0 has no slot to overwrite"):
        cache.write(x, x, places, opens, torch.ones_like(opens))
    assert not cache.tensors["lengths"].any()
    # A row may start later.
    cache.write(x, x, places, opens, torch.ones_like(opens), torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="Row 1, head 0"):
        cache.write(x, x, places, torch.zeros_like(opens), torch.ones_like(opens))
    cache.write(x, x, places, ~opens, torch.ones_like(opens))
    assert cache.tensors["lengths"].tolist() == [[1], [1]]


def test_missing_tensors_are_named():
    with pytest.raises(KeyError, match="lengths"):
        RaggedCache({name: torch.zeros(1, 1) for name in ("keys", "values", "positions", "seen")})
