"""Memoria in a host against lists of engrams and loops over tokens; what learns and what does not; bad input."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mnemic
from mnemic import ConfigError, Truncation
from mnemic.ops import engrams
from tests.memories.engram_lists import Row
from tests.tiny import random_ids, tiny_host

SEGMENT, WIDTH, GRAIN = 8, 32, 2.0**16
SMALL: dict[str, Any] = {
    "num_working": 3, "short_capacity": 4, "recall_short": 2, "recall_long": 2, "lifespan": 4, "depth": 2,
    "max_engrams": 30,
}  # fmt: skip


def attached(host: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """In float64 and without smallness that would hide a part."""
    host_model: Any = tiny_host(host)
    torch.manual_seed(1)
    model: Any = mnemic.attach(
        host_model.to(dtype), "memoria", segment=SEGMENT, **{"preset": "default", **SMALL, **options}
    )
    with torch.no_grad():
        model.memory.abstractor.query.normal_()
        for name, parameter in model.memory.named_parameters():
            if name.startswith("norms") or name == "alpha":
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def plain_host() -> Any:
    host: Any = tiny_host()
    return host.to(torch.float64)


def attend(memory: Any, layer: int, x: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What one token (d,) reads of engrams, head by head, and the mean weight of each."""
    heads, weights, size = [], [], WIDTH // memory.config.num_heads
    query = memory.query(x, layer)
    for h in range(memory.config.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = torch.stack([query[part].dot(memory.key(v, layer)[part]) for v in vectors])
        weights.append((scores / size**0.5).softmax(0))
        heads.append(sum(w * memory.value(v, layer)[part] for w, v in zip(weights[-1], vectors, strict=True)))
    return memory.out(torch.cat(heads), layer), torch.stack(weights).mean(0).detach()


def abstracted(memory: Any, hidden: Tensor) -> list[Tensor]:
    a, made = memory.abstractor, []
    for query in a.query:
        weights = torch.stack([query.dot(a.key.weight @ h) for h in hidden]).softmax(0)
        mixed = sum(w * (a.value.weight @ h) for w, h in zip(weights, hidden, strict=True))
        made.append(a.narrow.weight @ (a.widen.weight @ mixed + a.widen.bias) + a.narrow.bias)
    return made


def naive(model: Any, ids: Tensor) -> tuple[Tensor, Row, list[int]]:
    """Logits of one row, its engrams, and what was recalled last, segment by segment."""
    memory, logits, row, recalled, hidden = model.memory, [], Row(), [], None
    c = memory.config
    host = plain_host()
    host.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("memory.")})
    for part in ids.split(SEGMENT, dim=1):
        hooks, used, streams, last = [], [], {}, []
        working = [] if hidden is None else abstracted(memory, hidden)
        data = {e.id: e.data for e in row.engrams}
        found = [data[i] for i in recalled]
        for layer, block in enumerate(host.model.layers):

            def note(module: Any, args: Any, kwargs: Any, layer: int = layer, streams: Any = streams) -> None:
                streams[layer] = args[0] if args else kwargs["hidden_states"]

            def add(
                module: Any, args: Any, kwargs: Any, output: Any, layer: int = layer, streams: Any = streams,
                working: Any = working, found: Any = found, used: Any = used,
            ) -> Any:  # fmt: skip
                more, alpha = [], 1.0 if memory.alpha is None else memory.alpha[layer]
                for x, at in zip(streams[layer][0], output[0][0], strict=True):
                    read = torch.zeros_like(x)
                    for norm, vectors in zip(memory.norms[layer], (working, found), strict=True):
                        if vectors:
                            normed = F.layer_norm(x + at + read, (WIDTH,), norm.weight, norm.bias, norm.eps)
                            got, weights = attend(memory, layer, normed, vectors)
                            read = read + got
                            if vectors is found:
                                used.append(weights)
                    more.append(alpha * read)
                return (output[0] + torch.stack(more), *output[1:])

            hooks.append(block.register_forward_pre_hook(note, with_kwargs=True))
            hooks.append(block.self_attn.register_forward_hook(add, with_kwargs=True))
        hooks.append(host.model.norm.register_forward_hook(lambda m, a, o, last=last: last.append(o[0].detach())))
        logits.append(host(part, use_cache=False).logits)
        for hook in hooks:
            hook.remove()
        if part.shape[1] < SEGMENT:
            continue
        gains = {}
        if found:
            mean = torch.stack(used).mean(0) * len(found) * c.scale
            gains = {i: round(float(g) * GRAIN) / GRAIN for i, g in zip(recalled, mean, strict=True)}
        row.age(gains, c.short_capacity)
        hidden = last[0]
        row.add(torch.stack(abstracted(memory, hidden)), float(c.lifespan), c.max_engrams)
        recalled = row.recall(c.recall_short, c.recall_long, c.depth)
        row.fire(recalled)
    return torch.cat(logits, dim=1), row, recalled


@pytest.mark.parametrize(
    "options",
    [{}, {"max_engrams": 8, "preset": "attach"}, {"recall_long": 0, "num_working": 2, "num_heads": 1}],
    ids=["default", "full, attach", "short-term only"],
)
def test_values_and_gradients_equal_lists(options):
    """Seven segments: long-term memory from the third on, and lives that end."""
    model, ids = attached(**options), random_ids(1, 7 * SEGMENT + 3)
    out = model(ids, use_cache=False)
    out.logits.square().mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits, row, recalled = naive(model, ids)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-10)
    state = out.memory_state
    slots = {int(b): i for i, b in enumerate(state["born"][0]) if b >= 0}
    assert set(slots) == {e.id for e in row.engrams}
    assert [int(state["born"][0, s]) for s in state["recalled"][0] if s >= 0] == recalled
    kinds = {"working": engrams.WORKING, "short": engrams.SHORT, "long": engrams.LONG}
    for e in row.engrams:
        i = slots[e.id]
        assert int(state["kind"][0, i]) == kinds[e.kind]
        torch.testing.assert_close(state["data"][0, i], e.data, rtol=0, atol=1e-10)
        assert float(state["lifespan"][0, i]) == pytest.approx(e.life, abs=1e-9)
        assert [int(n) for n in state["counts"][0, i, list(slots.values())]] == [row.count(e.id, j) for j in slots]
    assert row.of("long")
    if options.get("recall_long") != 0:
        assert row.made > len(row.engrams)

    # The reference's hooks act on a copy of the host: its gradients are those of the memory.
    logits.square().mean().backward()
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        torch.testing.assert_close(
            got[f"memory.{name}"], parameter.grad, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_first_segment_is_the_host():
    model, ids = attached(), random_ids(2, SEGMENT)
    with torch.no_grad():
        expected = plain_host()(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-12)
        both = model(random_ids(2, 2 * SEGMENT), use_cache=False).logits[:, SEGMENT:]
        plain = plain_host()(random_ids(2, 2 * SEGMENT)[:, SEGMENT:], use_cache=False).logits
    assert (both - plain).abs().max() > 1e-2


@pytest.mark.parametrize("truncation", [None, Truncation("tail", 0)], ids=["whole", "shortest"])
def test_nothing_reaches_the_store_and_the_abstractor_learns(truncation):
    model = attached()
    embeds = model.get_input_embeddings()(random_ids(1, 5 * SEGMENT)).detach().requires_grad_()
    out = model(inputs_embeds=embeds, truncation=truncation)
    assert not any(t.requires_grad for t in out.memory_state.values())
    out.logits[:, -SEGMENT:].square().sum().backward()
    assert not embeds.grad[:, :-SEGMENT].any()
    assert embeds.grad[:, -SEGMENT:].any()
    for name, parameter in model.memory.abstractor.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_what_is_used_more_lives_longer():
    """Gains of a segment sum to scale times the number of recalled engrams; an average one gains `scale`."""
    model, ids = attached(), random_ids(2, 6 * SEGMENT)
    found: list[tuple[Any, Tensor]] = []
    original = model.memory.gains
    model.memory.gains = lambda state, segment: found.append((state, original(state, segment))) or found[-1][1]
    with torch.no_grad():
        model(ids, use_cache=False)
    counts = torch.stack([(state["recalled"] >= 0).sum(1) for state, _ in found])
    gains = torch.stack([gain for _, gain in found])
    assert counts.tolist() == [[0, 0], [0, 0], [2, 2], [4, 4], [4, 4], [4, 4]]
    torch.testing.assert_close(gains.sum(2), counts.double() * 8, rtol=0, atol=1e-3)
    assert (gains > 8.1).any()
    assert (gains[-1] < 7.9).any()


def test_without_use_everything_is_forgotten_in_time():
    """With scale 0 an engram lives `lifespan` segments: of 3 a segment, 4 segments' are there."""
    model = attached(scale=0.0)
    with torch.no_grad():
        state = model(random_ids(2, 9 * SEGMENT), use_cache=False).memory_state
    for born in state["born"]:
        assert sorted(born[born >= 0].tolist()) == list(range(27 - 12, 27))
    assert state["made"].tolist() == [27, 27]


def test_diagnostics_count_engrams():
    model = attached()
    with torch.no_grad():
        told = model(random_ids(2, 6 * SEGMENT), use_cache=False, memory_diagnostics=True).memory_diagnostics
    assert set(told) == {"working", "short", "long", "recalled", "lifespan", "largest_gain"}
    assert 0 < float(told["short"]) <= 4
    assert float(told["long"]) > 0


def test_a_state_is_saved_and_taken_up_again(tmp_path):
    model, ids = attached(dtype=torch.float32), random_ids(1, 5 * SEGMENT + 3)
    stream = model.stream()
    stream.feed(ids[:, :-5])
    stream.save(tmp_path / "one.mnemic")
    expected = stream.feed(ids[:, -5:], return_logits=True)
    again = model.stream(load=tmp_path / "one.mnemic")
    assert again.state["counts"].dtype == torch.int32
    assert torch.equal(again.feed(ids[:, -5:], return_logits=True), expected)


def test_in_a_stack():
    """Beside LM2 at its identity nothing changes."""
    ids, config = random_ids(2, 4 * SEGMENT + 3), mnemic.memory_config("memoria", **SMALL)
    lm2 = mnemic.memory_config("lm2", "attach", num_slots=4)
    alone, both = (mnemic.attach(tiny_host(), memories, segment=SEGMENT) for memories in (config, [lm2, config]))
    with torch.no_grad():
        both.memory.parts["memoria"].load_state_dict(alone.memory.state_dict())
        torch.testing.assert_close(both(ids).logits, alone(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_engrams": 6}, "no room for what one segment reads.* = 7"),
        ({"num_heads": 5}, "num_heads = 5 does not divide"),
        ({"lifespan": 0}, "lifespan"),
        ({"scale": float("inf")}, "scale = inf"),
        ({"scale": float("nan")}, "scale"),
        ({"depth": -1}, "depth"),
    ],
)
def test_unusable_settings_are_refused(options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message):
        mnemic.attach(host, "memoria", segment=SEGMENT, **{**SMALL, **options})
    assert not mnemic.is_attached(host)
