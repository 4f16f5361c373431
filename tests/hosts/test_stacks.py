"""Several memories on one host: each does what it does alone, and what cannot stand together is refused.

The contract tests hold two stacks of different kinds to every rule (`STACKS` in tests/contract/cases.py).
"""

import pytest
import torch

import mnemic
from mnemic.core.stack import StackConfig
from tests.tiny import random_ids, tiny_host

LM2 = ("lm2", {"num_slots": 4})


def _config(name, **options):
    return mnemic.memory_config(name, **options)


def _attach(*memories, host="llama"):
    return mnemic.attach(tiny_host(host), [_config(n, **o) for n, o in memories], segment=8)


def test_a_stack_of_one_that_does_nothing_is_the_other():
    ids = random_ids(2, 29)
    torch.manual_seed(0)
    alone = mnemic.attach(tiny_host(), "lm2:default", segment=8, num_slots=4)
    torch.manual_seed(0)
    stacked = _attach(LM2, ("none", {}))
    with torch.no_grad():
        assert torch.equal(stacked(ids, use_cache=False).logits, alone(ids, use_cache=False).logits)
    assert {n.removeprefix("lm2/") for n in stacked.memory.initial_state(1)} == set(alone.memory.initial_state(1))


def test_names_and_lists_say_the_same():
    by_name = mnemic.attach(tiny_host(), "deltanet:attach+rmt", segment=8)
    by_list = mnemic.attach(tiny_host(), ["deltanet:attach", "rmt"], segment=8)
    assert by_name.memory.config == by_list.memory.config
    assert StackConfig.from_dict({k: v for k, v in by_name.memory.config.to_dict().items() if k != "memory"}) == (
        by_name.memory.config
    )
    assert list(by_name.memory.members) == ["deltanet", "rmt"]


def test_the_same_memory_twice_has_two_names():
    model = _attach(("lm2", {"num_slots": 4, "memory_layers": (0,)}), ("lm2", {"num_slots": 4, "memory_layers": (1,)}))
    assert list(model.memory.members) == ["lm2", "lm2-2"]
    assert {n for n in model.memory.initial_state(1)} == {"lm2/bank", "lm2-2/bank"}


def test_all_members_are_trained():
    model = _attach(LM2, ("rmt", {"num_tokens": 2})).train()
    ids = random_ids(2, 24)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    "memories, expected",
    [
        ([("deltanet", {}), ("gated-deltanet", {})], "takes the site 'attention' of blocks \\[0, 1\\] for itself"),
        ([("pkm", {"num_keys": 8, "top_k": 4, "place": "replace"})] * 2, "takes the site 'feed_forward'"),
        ([("rmt", {"num_tokens": 2}), ("armt", {"num_tokens": 2})], "'rmt' and 'armt' each bring memory tokens"),
        ([("window", {}), ("rmt", {"num_tokens": 2})], "'window' reads a stream without segments, 'rmt' writes"),
        ([("lm2", {"num_slots": 4, "update_every": 4}), ("rmt", {"num_tokens": 2})], "commit together"),
        ([LM2, ("lm2", {"num_slots": 4, "num_heads": 5})], "num_heads"),
    ],
    ids=["two mixers", "two tables", "two kinds of tokens", "window and segments", "two rhythms", "a bad member"],
)
def test_what_cannot_stand_together_is_refused(memories, expected):
    host = tiny_host()
    before = {n: t.clone() for n, t in host.state_dict().items()}
    with pytest.raises(mnemic.ConfigError, match=expected):
        mnemic.attach(host, [_config(n, **o) for n, o in memories], segment=8)
    assert not mnemic.is_attached(host)
    assert all(torch.equal(host.state_dict()[n], t) for n, t in before.items())


def test_options_of_a_stack_go_with_its_members():
    with pytest.raises(mnemic.ConfigError, match="each of them"):
        mnemic.attach(tiny_host(), ["lm2", "rmt"], segment=8, num_slots=4)
    with pytest.raises(mnemic.ConfigError, match="at least two"):
        StackConfig(memories=(_config("rmt"),))
    with pytest.raises(mnemic.UnknownNameError, match="lm22"):
        mnemic.attach(tiny_host(), "lm22+rmt", segment=8)


def test_a_stack_is_taken_off_whole():
    host = tiny_host()
    ids = random_ids(1, 20)
    with torch.no_grad():
        expected = host(ids, use_cache=False).logits
        mnemic.detach(mnemic.attach(host, "deltanet:default+pkm:attach", segment=8))
        assert torch.equal(host(ids, use_cache=False).logits, expected)
    assert all(p.requires_grad for p in host.parameters())
