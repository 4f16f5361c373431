"""Attaching changes nothing that it need not change; detaching gives the host back, bit for bit."""

import pytest
import torch

import mnemic
from tests.contract.cases import (
    FIRST,
    LENGTH,
    SEGMENT,
    attached,
    build,
    case,
    pairs,
    parallel,
    plain_segments,
    random_ids,
)
from tests.tiny import HOSTS, tiny_host


def _fresh(case, host, **options):
    """A freshly attached model, where the memory says that it is the identity."""
    if not attached(case).memory.identity_at_attach:
        pytest.skip("does not start as the identity")
    return build(case, host, noise=0, **options)


def _assert_host(case, got, expected):
    """Bit for bit, but for memories that take another way to the same numbers inside the attention."""
    if case.memory in FIRST:
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def _snapshot(model):
    """Everything that attaching might leave behind."""
    hooks = {
        name: tuple(len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
        for name, m in model.named_modules()
    }
    return type(model), sorted(vars(model)), hooks, {n: t.clone() for n, t in model.state_dict().items()}


def _assert_same(model, before):
    kind, attributes, hooks, weights = before
    now = _snapshot(model)
    assert now[0] is kind
    assert (now[1], now[2]) == (attributes, hooks)
    assert now[3].keys() == weights.keys()
    assert all(torch.equal(now[3][n], t) for n, t in weights.items())


def test_there_are_identities():
    for id in ("none", "window", "lm2_attach"):
        assert build(case(id), noise=0).memory.identity_at_attach


@pairs()
def test_a_new_memory_is_the_identity(case, host):
    plain = tiny_host(host)
    model = _fresh(case, host)
    ids = random_ids(2, LENGTH)
    if case.kind != "continuous":
        _assert_host(case, parallel(model, ids).logits, plain_segments(plain, ids))
    with torch.no_grad():
        one = plain(ids[:, :SEGMENT], use_cache=False).logits
    _assert_host(case, parallel(model, ids[:, :SEGMENT]).logits, one)


@pairs(hosts=("llama", "gpt2"))
def test_one_long_segment_is_the_host(case, host):
    plain = tiny_host(host)
    model = _fresh(case, host, segment=64)
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
    _assert_host(case, parallel(model, ids).logits, expected)
    cached = [model.generate(ids, max_new_tokens=8, do_sample=False), plain.generate(ids, max_new_tokens=8)]
    assert torch.equal(*cached)


@pairs()
def test_detach_gives_the_host_back(case, host):
    model = tiny_host(host)
    before = _snapshot(model)
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert case.attach(model) is model
    assert isinstance(model, before[0])
    names = set(before[3])
    assert {n for n in model.state_dict() if not n.startswith("memory.")} == names
    model(ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    model.generate(ids[:, :11], max_new_tokens=3, do_sample=False)
    assert mnemic.detach(model) is model
    _assert_same(model, before)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("host", HOSTS)
def test_a_failed_attach_leaves_the_host_alone(host):
    model = tiny_host(host).train()
    before = _snapshot(model)
    with pytest.raises(mnemic.ConfigError):
        mnemic.attach(model, "lm2", segment=8, num_slots=6, num_heads=5)
    with pytest.raises(mnemic.ConfigError):
        mnemic.attach(model, "lm2", segment=1000, num_slots=6)
    _assert_same(model, before)
    assert model.training
    mnemic.attach(model, "none", segment=8)
    with pytest.raises(mnemic.HostError, match="detach"):
        mnemic.attach(model, "none", segment=8)
    mnemic.detach(model)
    with pytest.raises(mnemic.HostError, match="no memory"):
        mnemic.detach(model)
    _assert_same(model, before)


@pairs(hosts=("llama",))
def test_attaching_again_works(case, host):
    model = tiny_host(host)
    ids = random_ids(1, LENGTH)
    for _ in range(2):
        torch.manual_seed(3)
        case.attach(model)
        logits = parallel(model, ids).logits
        mnemic.detach(model)
    torch.manual_seed(3)
    case.attach(model)
    assert torch.equal(parallel(model, ids).logits, logits)
