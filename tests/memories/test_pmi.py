"""PMI as a memory: its sites against the equations of its block, one token and block at a time, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError
from mnemic.core import State, memory_class
from mnemic.core.memory import Segment
from mnemic.core.step import Step
from mnemic.hosts.anatomy import host_spec
from mnemic.ops.perception_memory import PerceptionMemory
from tests.tiny import random_ids, tiny_host

SEGMENT, WIDTH = 6, 32
OPTIONS: dict[str, Any] = {"num_slots": 4, "num_banks": 2, "num_heads": 4, "top_k": 3}
SCOPES = [
    {}, {"memory_scope": "shared"}, {"shared_weights": False}, {"memory_scope": "shared", "shared_weights": False},
    {"num_banks": 0, "shared_weights": False}, {"correction": False},
]  # fmt: skip


def alone(**options: Any) -> Any:
    """The memory without a host, in float64, with weights as large as everything else."""
    torch.manual_seed(0)
    spec = replace(host_spec(tiny_host()), dtype=torch.float64)
    memory = memory_class("pmi")(mnemic.memory_config("pmi", **{**OPTIONS, **options}), spec)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return memory


def read(memory: Any, state: State, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the site of one block adds to zeros, and what it keeps of its tokens."""
    places = torch.arange(x.shape[1])[None]
    step = Step.alone(memory, layer, state=state, reads=memory.prepare(state), places=places)
    return memory.residual(torch.zeros_like(x), x, step), step.frame.trace[layer]["tokens"]


def by_loop(memory: Any, inputs: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """inputs[s][layer] (B, T, d): outputs of all sites, token by token through the encoder's own reading, and the final
    memories."""
    config, states = memory.config, memory.initial_state(len(inputs[0][0]))
    count = memory.num_states
    fast = [states["working"][:, i] for i in range(count)]
    slow = [states["long_term"][:, i] if config.num_banks else None for i in range(count)]
    outputs = []
    for segment in inputs:
        for layer, x in enumerate(segment):
            block: PerceptionMemory = memory.blocks[0 if config.shared_weights else layer]
            at = layer if count > 1 else 0
            banks = slow[at]
            kept = block.keys_values(banks.mean(1)) if banks is not None else None
            seen = []
            for t in range(x.shape[1]):
                tokens = block.input(x[:, : t + 1])
                quick, late = block.readings(tokens, block.keys_values(fast[at]), kept)
                seen.append(block.joined(quick, late, block.keys_values(quick), None)[:, -1])
            outputs.append(memory.gate[layer] * torch.stack(seen, dim=1))
        for layer, x in enumerate(segment):
            block, at = memory.blocks[0 if config.shared_weights else layer], layer if count > 1 else 0
            fast[at], slow[at] = block.write(block.input(x), fast[at], slow[at])
    return outputs, [*fast, *(s for s in slow if s is not None)]


@pytest.mark.parametrize("options", SCOPES, ids=lambda o: "-".join(map(str, o.values())) or "usual")
def test_three_segments_equal_a_loop_forward_and_backward(options):
    memory = alone(**options)
    torch.manual_seed(1)
    inputs = [[torch.randn(2, SEGMENT, WIDTH).double() for _ in range(2)] for _ in range(3)]
    state, outputs = memory.initial_state(2), []
    for segment in inputs:
        trace = {}
        for layer, x in enumerate(segment):
            out, tokens = read(memory, state, layer, x)
            outputs.append(out)
            trace[layer] = {"tokens": tokens}
        state = memory.commit(state, Segment(trace))
    finals = [*state["working"].unbind(1), *(state["long_term"].unbind(1) if "long_term" in state else ())]
    expected, memories = by_loop(memory, inputs)
    for mine, theirs in zip([*outputs, *finals], [*expected, *memories], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    mine, theirs = [*outputs, *finals], [*expected, *memories]
    weights = [torch.randn_like(t) for t in mine]
    named = list(memory.parameters())
    grads = [
        torch.autograd.grad(
            torch.stack([(t * w).sum() for t, w in zip(side, weights, strict=True)]).sum(), named, allow_unused=True
        )
        for side in (mine, theirs)
    ]
    for got, wanted in zip(*grads, strict=True):
        assert got is not None
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8)


def test_the_usual_state_is_one_for_each_block_and_shared_weights_treat_them_alike():
    memory, x = alone(), torch.randn(2, SEGMENT, WIDTH).double()
    state = memory.initial_state(2)
    with torch.no_grad():
        first = memory.commit(state, Segment({0: {"tokens": x}, 1: {"tokens": 2 * x}}))
        other = memory.commit(state, Segment({0: {"tokens": 2 * x}, 1: {"tokens": x}}))
    assert first["working"].shape == (2, 2, 4, WIDTH)
    assert first["long_term"].shape == (2, 2, 2, 4, WIDTH)
    torch.testing.assert_close(first["working"].flip(1), other["working"], rtol=0, atol=1e-12)


def test_a_hundred_segments_leave_a_state_of_the_same_size_and_bounded():
    memory = alone()
    torch.manual_seed(2)
    state = first = memory.initial_state(1)
    with torch.no_grad():
        for _ in range(100):
            tokens = torch.randn(2, 1, SEGMENT, WIDTH).double() * 3
            state = memory.commit(state, Segment({i: {"tokens": t} for i, t in enumerate(tokens)}))
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in first.items()}
    assert all(bool(t.isfinite().all()) for t in state.values())
    assert float(state["working"].abs().max()) < 1e3


def test_reset_gives_unit_vectors_and_the_same_drawn_numbers():
    model = mnemic.attach(tiny_host(), "pmi", segment=SEGMENT, **OPTIONS)
    stream = model.stream()
    first = stream.state
    stream.feed(random_ids(1, 2 * SEGMENT))
    assert not torch.equal(stream.state["working"], first["working"])
    again = stream.reset().state
    assert torch.equal(again["working"][0], torch.eye(4, WIDTH).expand(2, -1, -1))
    assert torch.equal(again["long_term"], first["long_term"])
    assert 0 <= float(again["long_term"].min()) < float(again["long_term"].max()) < 1


def test_the_drawn_numbers_are_saved_with_the_weights(tmp_path):
    model, ids = mnemic.attach(tiny_host(), "pmi", segment=SEGMENT, **OPTIONS), random_ids(1, 3 * SEGMENT)
    with torch.no_grad():
        model.memory.gate.normal_()
    mnemic.save(model, tmp_path)
    torch.manual_seed(99)
    loaded = mnemic.load(tmp_path, tiny_host())
    with torch.no_grad():
        assert torch.equal(loaded.memory.first_long_term, model.memory.first_long_term)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_a_closed_gate_leaves_the_host_and_what_is_read_reaches_later_segments_only(host):
    model, ids = mnemic.attach(tiny_host(host), "pmi", segment=SEGMENT, **OPTIONS), random_ids(1, 3 * SEGMENT)
    with torch.no_grad():
        plain = torch.cat([tiny_host(host)(p, use_cache=False).logits for p in ids.split(SEGMENT, dim=1)], dim=1)
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, rtol=0, atol=1e-6)
        model.memory.gate.normal_()
        other = ids.clone()
        other[0, 2] = (ids[0, 2] + 1) % 58 + 3
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert torch.equal(difference[:2], torch.zeros(2))
    assert float(difference[2:].min()) > 1e-6


def test_beside_memory_tokens_it_reads_as_alone():
    """Read and write tokens of another memory are neither written nor seen by the correction."""
    ids, config = random_ids(2, 2 * SEGMENT + 3), mnemic.memory_config("pmi", **OPTIONS)
    both = mnemic.attach(tiny_host(), [mnemic.memory_config("rmt", num_tokens=2), config], segment=SEGMENT)
    with torch.no_grad():
        for parameter in both.memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        whole, cache, steps = both(ids, use_cache=False), None, []
        for token in ids.split(1, dim=1):
            one = both(token, past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            steps.append(one.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, rtol=0, atol=1e-4)
    assert whole.memory_state["pmi/working"].shape == (2, 2, 4, WIDTH)


def test_some_blocks_only():
    model = mnemic.attach(tiny_host(), "pmi", segment=SEGMENT, **OPTIONS, memory_layers=(1,))
    assert model.memory.layers == (1,)
    assert model.memory.gate.shape == (1, WIDTH)
    with torch.no_grad():
        assert model(random_ids(1, SEGMENT)).memory_state["working"].shape == (1, 1, 4, WIDTH)


def test_diagnostics_tell_gates_and_the_sum_that_moves_the_long_term_memory():
    model = mnemic.attach(tiny_host(), "pmi", segment=SEGMENT, **OPTIONS)
    with torch.no_grad():
        found = model(random_ids(2, 3 * SEGMENT), memory_diagnostics=True).memory_diagnostics
    assert {n.split("/")[1] for n in found} == {"gate_out", "gate_in", "gate_forget", "long_term_sum"}
    assert float(found["block0/gate_out"]) == 0
    assert 0.5 < float(found["block1/gate_forget"]) < 0.9
    # A third of it: the first segment's, of about WIDTH / 2; then the norm makes it zero.
    assert float(found["block0/long_term_sum"]) == pytest.approx(WIDTH / 6, rel=0.2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 5}, "num_heads = 5 does not divide the host's width 32"),
        ({"memory_layers": (2,)}, "increasing block numbers below 2"),
        ({"memory_layers": ()}, "increasing block numbers below 2"),
        ({"memory_layers": (1, 0)}, "increasing block numbers below 2"),
        ({"mixing": 1.5}, "mixing"),
        ({"top_k": 0}, "top_k"),
        ({"num_slots": 0}, "num_slots"),
        ({"memory_scope": "global"}, "memory_scope"),
    ],
)
def test_unusable_settings_are_refused(options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message):
        mnemic.attach(host, "pmi", segment=SEGMENT, **{**OPTIONS, **options})
    assert not mnemic.is_attached(host)
