"""Memformer against loops over slots and tokens; independence, length and forgetting of slots; replay; toy."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mnemic
from benchmarks.replay import LiveBytes
from mnemic import ConfigError, State
from mnemic.benchmarks.recall import RecallTask
from mnemic.core.memory import Segment
from tests.tiny import host_config, random_ids, tiny_host

SEGMENT, SLOTS, WIDTH = 8, 3, 32


def attached(host: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """In float64 and without smallness that would hide a part."""
    model: Any = tiny_host(host).to(dtype)
    torch.manual_seed(1)
    model = mnemic.attach(model, "memformer", segment=SEGMENT, preset="default", **{"num_slots": SLOTS, **options})
    with torch.no_grad():
        model.memory.bias.normal_(std=0.3)
    return model


def written(memory: Any, slots: Tensor, tokens: Tensor) -> Tensor:
    """One row's slots (k, d) after tokens (T, d), slot by slot and token by token."""
    tau, raw, after = memory.config.temperature, memory.config.own_value == "raw", []
    unit = [t / t.square().mean().sqrt() for t in tokens]
    for slot, bias in zip(slots, memory.bias, strict=True):
        query = slot @ memory.write_query
        scores = [query.dot(one @ memory.write_key) / tau for one in (slot, *unit)]
        values = [slot if raw else slot @ memory.write_value, *(t @ memory.write_value for t in unit)]
        total = sum(s.exp() for s in scores)
        new = sum(s.exp() / total * v for s, v in zip(scores, values, strict=True)) + bias
        after.append(new / new.square().sum().sqrt())
    return torch.stack(after)


def read(memory: Any, layer: int, source: Tensor, slots: Tensor) -> Tensor:
    """What one token (d,) reads from slots (k, d), head by head."""
    heads, size = [], WIDTH // memory.config.num_heads
    query, keys, values = (m(t, layer) for m, t in ((memory.query, source), (memory.key, slots), (memory.value, slots)))
    for h in range(memory.config.num_heads):
        part = slice(h * size, (h + 1) * size)
        weights = torch.stack([query[part].dot(k[part]) / size**0.5 for k in keys]).softmax(0)
        heads.append(sum(w * v[part] for w, v in zip(weights, values, strict=True)))
    return memory.out(torch.cat(heads), layer)


def naive(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and last slots of one row, segment by segment, with hooks that add what loops read."""
    memory, logits = model.memory, []
    slots = torch.stack([b / b.square().sum().sqrt() for b in memory.bias])
    host: Any = tiny_host().to(torch.float64)
    host.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("memory.")})
    for part in ids.split(SEGMENT, dim=1):
        hooks = []
        for layer, block in enumerate(host.model.layers):

            def add(module: Any, args: Any, kwargs: Any, output: Any, layer: int = layer, slots: Any = slots) -> Any:
                source = (args[0] if args else kwargs["hidden_states"])[0]
                more = torch.stack([read(memory, layer, token, slots) for token in source])
                return (output[0] + more, *output[1:])

            hooks.append(block.self_attn.register_forward_hook(add, with_kwargs=True))
        kept: list[Tensor] = []
        hooks.append(
            host.model.layers[-1].register_forward_hook(
                lambda m, a, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
            )
        )
        logits.append(host(part, use_cache=False).logits)
        for hook in hooks:
            hook.remove()
        if part.shape[1] == SEGMENT:
            slots = written(memory, slots, kept[0].reshape(SEGMENT, WIDTH))
    return torch.cat(logits, dim=1), slots


@pytest.mark.parametrize("own_value", ["projected", "raw"])
def test_values_and_gradients_equal_loops(own_value):
    model, ids = attached(own_value=own_value), random_ids(1, 2 * SEGMENT + 3)
    found = []
    for run in (
        lambda: (lambda out: (out.logits, out.memory_state["slots"][0]))(model(ids, use_cache=False)),
        lambda: naive(model, ids),
    ):
        model.zero_grad(set_to_none=True)
        logits, slots = run()
        (logits.square().mean() + slots.pow(3).sum()).backward()
        found.append((logits, slots, {n: p.grad for n, p in model.memory.named_parameters()}))
    for got, expected in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for name, grad in found[1][2].items():
        assert grad.any(), name
        torch.testing.assert_close(found[0][2][name], grad, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def _unit(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1)


@pytest.mark.parametrize("own_value", ["projected", "raw"])
def test_slots_do_not_see_each_other(own_value):
    memory, slots, tokens = attached(own_value=own_value).memory, _unit(2, SLOTS), 5 * _unit(2, SEGMENT, seed=1)
    other = slots.clone()
    other[:, 1] = _unit(2, seed=2)
    with torch.no_grad():
        difference = (memory.written(slots, tokens)[0] - memory.written(other, tokens)[0]).abs().amax((0, 2))
    assert difference[0] == difference[2] == 0
    assert difference[1] > 1e-3


def test_slots_have_length_one_after_every_write():
    model = attached()
    with torch.no_grad():
        for segments in (0, 1, 5):
            state = model.memory.initial_state(2)
            if segments:
                state = model(random_ids(2, segments * SEGMENT)).memory_state
            lengths = state["slots"].norm(dim=-1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-12)


def test_a_slot_that_takes_nothing_returns_to_its_bias():
    memory = attached().memory
    with torch.no_grad():
        memory.write_value.zero_()
        after = memory.written(_unit(2, SLOTS), _unit(2, SEGMENT, seed=1))[0]
        torch.testing.assert_close(after, F.normalize(memory.bias, dim=-1).expand(2, -1, -1))


def test_an_untouched_slot_fades_towards_its_bias():
    """Attention to itself only and its raw value: the bias alone moves it, closer at every step."""
    memory, tokens = attached(own_value="raw").memory, torch.zeros(1, SEGMENT, WIDTH, dtype=torch.float64)
    slots, home, seen = _unit(1, SLOTS), F.normalize(memory.bias, dim=-1), []
    with torch.no_grad():
        # Scores of a slot with itself far above all others.
        memory.write_query.copy_(1e4 * torch.eye(WIDTH))
        memory.write_key.copy_(torch.eye(WIDTH))
        for _ in range(40):
            slots = memory.written(slots, tokens)[0]
            seen.append((slots * home).sum(-1).min())
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(seen))
    assert seen[-1] > 0.99 > seen[0]


def test_replay_gives_the_gradients_of_full_back_propagation():
    """6 segments, dropout 0.1 in the host: every gradient, that of v_bias included, within 1e-8 of the full one."""
    torch.manual_seed(0)
    host: Any = tiny_host("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).to(torch.float64)
    for module in host.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model = mnemic.attach(host, "memformer", segment=SEGMENT, preset="default", num_slots=SLOTS).train()

    def loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """transformers' causal loss without its rounding to float32."""
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    model.loss_function = loss
    ids, found = random_ids(2, 6 * SEGMENT), []
    for replay in (False, True):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        model(ids, labels=ids, replay=replay).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert found[0]["memory.bias"].any()
    for name, full in found[0].items():
        scale = max(float(full.abs().max()), 1e-6 * max(float(g.abs().max()) for g in found[0].values()))
        assert float((found[1][name] - full).abs().max()) / scale < 1e-8, name


def test_replay_keeps_a_state_for_each_further_segment():
    model, peaks = attached(dtype=torch.float32).train(), []
    for segments in (2, 2, 8):
        model.zero_grad(set_to_none=True)
        ids = random_ids(2, segments * SEGMENT)
        with LiveBytes() as counter:
            model(ids, labels=ids, replay=True).loss.backward()
        peaks.append(counter.peak)
    state = model(random_ids(2, SEGMENT)).memory_state.nbytes
    # Beside states: token ids and where they are predicted.
    assert peaks[2] < peaks[1] + 8 * state + 16 * 1024


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_attached_it_is_the_host_segment_by_segment(host):
    plain, ids = tiny_host(host), random_ids(2, 2 * SEGMENT + 3)
    model = mnemic.attach(tiny_host(host), "memformer", segment=SEGMENT)
    with torch.no_grad():
        expected = torch.cat([plain(part, use_cache=False).logits for part in ids.split(SEGMENT, dim=1)], dim=1)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_diagnostics():
    model = attached()
    with torch.no_grad():
        found = model(random_ids(2, 2 * SEGMENT), memory_diagnostics=True).memory_diagnostics
        assert set(found) == {"block1/kept", "block1/turned"}
        model.memory.write_value.zero_()
        state = State({"slots": F.normalize(model.memory.bias, dim=-1)[None]})
        still = model.memory.diagnostics(state, Segment({1: {"tokens": _unit(1, SEGMENT)}}))
    assert 0 < float(found["block1/kept"]) < 1
    assert float(found["block1/turned"]) > 1e-3
    assert float(still["block1/turned"]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"num_slots": 0}, {"num_heads": 5}, {"temperature": 0.0}, {"forgetting": 0.0}, {"forgetting": float("nan")},
     {"own_value": "none"}, {"slots": 3}],
)  # fmt: skip
def test_unusable_settings_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="memformer"):
        mnemic.attach(host, "memformer", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recall_over_segments():
    """One pair, 8 values, segments of 8 tokens, 2 to 4 of them in training, 250 steps; guessing is right in 0.125."""
    task, generator = RecallTask(segment_length=8), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = host_config(
        "llama", vocab_size=task.vocab_size, intermediate_size=64, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.04,
    )  # fmt: skip
    model = mnemic.attach(config, "memformer", segment=SEGMENT, num_slots=16, own_value="raw").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(250):
        segments = int(torch.randint(2, 5, (), generator=generator))
        rows = task.batch(64, generator, segments=segments)
        optimizer.zero_grad()
        model(rows.input_ids, labels=rows.labels, use_cache=False, logits_to_keep=2).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = {}
    for segments in (3, 12):
        rows = task.batch(1024, torch.Generator().manual_seed(99), segments=segments)
        with torch.no_grad():
            best = model.eval()(rows.input_ids, use_cache=False, logits_to_keep=2).logits[:, 0].argmax(-1)
        found[segments] = float((best == rows.input_ids[:, -1]).float().mean())
    print(f"memformer recalls at {found}")
    assert found[3] > 0.95
    assert found[12] > 0.8
