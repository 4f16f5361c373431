"""Ring attention: exact over 2 and 4 processes, in a model, with a memory's keys; what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import mnemic
from mnemic.training.ring import Sharding, ring_attention
from mnemic.training.ring_host import over_ring
from tests.tiny import random_ids, tiny_host
from tests.training.ring_processes import start


def check(found: list[dict[str, dict[str, dict[str, float]]]], layout: str) -> None:
    for process in found:
        errors = process[layout]
        assert set(errors["causal-float32"]) == {"out", "dq", "dk", "dv"}
        for kind in ("causal", "full"):
            assert max(errors[f"{kind}-float32"].values()) <= 2e-6
            assert max(errors[f"{kind}-float64"].values()) <= 1e-13
        assert max(errors["memory"].values()) <= 2e-6
        assert errors["model"]["loss"] <= 1e-6
        assert errors["model"]["gradients"] <= 1e-5


def test_two_processes_equal_one(tmp_path):
    found = start(2, tmp_path)
    for layout in ("contiguous", "zigzag"):
        check(found, layout)


@pytest.mark.slow
def test_four_processes_and_two_rings_equal_one(tmp_path):
    found = start(4, tmp_path)
    for layout in ("contiguous", "zigzag", "pairs"):
        check(found, layout)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_token_is_in_one_shard_with_its_own_label(layout):
    ids, seen = random_ids(2, 24), torch.zeros(24)
    labels = ids.masked_fill(torch.arange(24) % 5 == 0, -100)
    for rank in range(3):
        part = Sharding(rank, 3, layout).shard(ids, labels)
        places = part["position_ids"][0]
        seen[places] += 1
        assert torch.equal(part["input_ids"], ids[:, places])
        for i, place in enumerate(places.tolist()):
            expected = labels[:, place + 1] if place < 23 else torch.full((2,), -100)
            assert torch.equal(part["shift_labels"][:, i], expected)
        assert part["num_items_in_batch"] == (labels[:, 1:] != -100).sum()
    assert torch.equal(seen, torch.ones(24))


def test_zigzag_gives_all_the_same_work():
    def pairs(layout: str, rank: int) -> int:
        places = Sharding(rank, 4, layout).places(64)
        return int((places + 1).sum())

    assert len({pairs("zigzag", rank) for rank in range(4)}) == 1
    assert pairs("contiguous", 3) > 5 * pairs("contiguous", 0)


def test_one_process_needs_no_ring():
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    out, lse = ring_attention(q, k, v, Sharding(0, 1))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6, rtol=0)
    assert lse.shape == (1, 2, 8)


def test_half_precision_is_merged_in_single():
    q, k, v = (torch.randn(1, 2, 8, 4).bfloat16() for _ in range(3))
    out, lse = ring_attention(q, k, v, Sharding(0, 1))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(out.float(), exact, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("settings", [{"rank": 2}, {"rank": -1}, {"layout": "striped"}])
def test_a_sharding_refuses(settings):
    with pytest.raises(mnemic.ConfigError, match="layout"):
        Sharding(**{"rank": 0, "world": 2, **settings})


def test_lengths_and_padding_are_refused():
    ids = random_ids(1, 10)
    with pytest.raises(mnemic.InputError, match="10 tokens"):
        Sharding(0, 4).shard(ids, ids)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(mnemic.UnsupportedError, match="padding"):
        Sharding(0, 1).shard(ids, ids, mask)
    with pytest.raises(mnemic.UnsupportedError, match="padding"), over_ring(host := tiny_host(), Sharding(0, 1)):
        host(ids, attention_mask=mask)


@pytest.mark.parametrize("host, said", [("mistral", "sliding_window"), ("gemma2", "softcap")])
def test_attention_that_is_not_plainly_causal_is_refused(host, said):
    model = tiny_host(host)
    with pytest.raises(mnemic.UnsupportedError, match=said), over_ring(model, Sharding(0, 1)):
        model(random_ids(1, 8))


def test_a_model_with_memory_is_refused():
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    with pytest.raises(mnemic.UnsupportedError, match="shard the batch"), over_ring(model, Sharding(0, 1)):
        pass
