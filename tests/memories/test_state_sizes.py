"""What the table of systems says of a state's size is what the state has."""

import dataclasses

import pytest
import torch

import mnemic
from mnemic.core import State, memory_class
from mnemic.hosts.anatomy import host_spec
from tests.contract.cases import CASES
from tests.tiny import tiny_host

FIRST = {c.memory: c for c in reversed(CASES) if c.memory != "stack"}


@pytest.mark.parametrize("name", FIRST)
def test_the_formula_counts_the_numbers_of_a_state(name):
    case = FIRST[name]
    model = case.attach(tiny_host("llama"), 16)
    memory, host = model.memory, host_spec(tiny_host("llama"))
    options = {f.name: getattr(memory.config, f.name) for f in dataclasses.fields(memory.config)}
    names = {
        "L": host.num_layers, "d": host.hidden_size, "H": host.num_heads, "Hkv": host.num_key_value_heads,
        "e": host.head_dim, "T": 16, "len": len, **options,
    }  # fmt: skip
    formula = memory_class(name).state_size
    expected = eval(formula, {"__builtins__": {}}, names)
    if memory.continuous:
        # Its past stands in the cache, not in the state.
        assert expected > 0
        return
    state: State = memory.initial_state(1)
    # Tables of counts are int32, counters and marks int64 or bool.
    floats = sum(t.numel() for t in state.values() if t.is_floating_point() or t.dtype == torch.int32)
    assert floats == expected, f"{formula} = {expected}, the state has {floats} (counters not counted)"
    assert all(t.dtype in (torch.int32, torch.int64, torch.bool) for t in state.values() if not t.is_floating_point())


def test_every_memory_says_how_large_its_state_is():
    assert [n for n in mnemic.memory_names() if memory_class(n).state_size == "?"] == []
