"""Chunked-FIFO: against a plain model that follows the card token by token, order of its bank, cost, the recall toy."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mnemic
from mnemic import ConfigError, Truncation
from mnemic.core.memory import Segment
from mnemic.core.step import Step
from mnemic.ops.gated_fifo import push
from mnemic.ops.rotary import rotate
from tests.memories.exact_host import exact_host
from tests.memories.segment_recall import accuracy, trained
from tests.tiny import random_ids, tiny_host

SEGMENT, CHUNK, ROWS = 7, 3, 4


def attached(host: Any = None, segment: int = SEGMENT, **options: Any) -> Any:
    """Chunked-FIFO on a tiny host, every weight moved."""
    torch.manual_seed(1)
    given = {"preset": "default", "chunk": CHUNK, "num_rows": ROWS, **options}
    model = mnemic.attach(tiny_host() if host is None else host, "chunked-fifo", segment=segment, **given)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# The card: one row, one head and token at a time


def heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(0, 1)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Query (H, e) over (H, n, e)."""
    found = [torch.softmax(k @ q / len(q) ** 0.5, 0) @ v for q, k, v in zip(query, keys, values, strict=True)]
    return torch.cat(found)


def chunk_path(host: Any, memory: Any, i: int, z: Tensor) -> Tensor:
    q, k, v = (heads(part, memory.host.num_heads) for part in (z @ memory.chunk_qkv[i]).chunk(3, -1))
    cos, sin = host.model.rotary_emb(z, torch.arange(len(z))[None])
    q, k = (rotate(x[None], cos, sin)[0] for x in (q, k))
    rows = []
    for t in range(len(z)):
        first = t // memory.config.chunk * memory.config.chunk
        rows.append(attend(q[:, t], k[:, first : t + 1], v[:, first : t + 1]))
    return torch.stack(rows) @ memory.chunk_out[i]


def memory_path(memory: Any, i: int, z: Tensor, bank: list[Tensor]) -> Tensor:
    if not bank:
        return torch.zeros_like(z)
    rows = torch.stack(bank)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    w_q, w_k, w_v = memory.memory_qkv[i].chunk(3, -1)
    q, k, v = (heads(part, memory.host.num_heads) for part in (z @ w_q, rows @ w_k, rows @ w_v))
    part = torch.stack([attend(q[:, t], k, v) for t in range(len(z))]) @ memory.memory_out[i]
    return part if memory.gate is None else torch.tanh(memory.gate[i]) * part


def host_path(host: Any, layer: Any, z: Tensor, chunk: int | None) -> Tensor:
    parts = []
    for places in torch.arange(len(z)).split(chunk or len(z)):
        turned = host.model.rotary_emb(z, places[None])
        parts.append(layer.self_attn(hidden_states=z[places][None], attention_mask=None, position_embeddings=turned)[0])
    return torch.cat(parts, dim=1)[0]


def write(memory: Any, i: int, bank: list[Tensor], candidates: list[Tensor]) -> list[Tensor]:
    for c in candidates:
        old = bank[-1] if bank else torch.zeros_like(c)
        g = torch.sigmoid(torch.cat([c, old]) @ memory.write[i] + memory.write_bias[i])
        bank = [*bank, g * c + (1 - g) * old][-memory.config.num_rows :]
    return bank


def naive(host: Any, memory: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    config, logits = memory.config, []
    banks: list[list[Tensor]] = [[] for _ in host.model.layers]
    for part in ids.split(SEGMENT):
        x = host.get_input_embeddings()(part)
        for i, layer in enumerate(host.model.layers):
            z = layer.input_layernorm(x)
            y = x + host_path(host, layer, z, config.chunk if config.paths == "linear" else None)
            y = y + chunk_path(host, memory, i, z) if config.paths == "all" else y
            y = y + memory_path(memory, i, z, banks[i])
            x = y + layer.mlp(layer.post_attention_layernorm(y))
            if len(part) == SEGMENT:
                chunks = {
                    "mean": [c.mean(0) for c in x.split(config.chunk)],
                    "last": [c[-1] for c in x.split(config.chunk)],
                    "token": list(x),
                }
                banks[i] = write(memory, i, banks[i], chunks[config.candidate])
        logits.append(host.lm_head(host.model.norm(x)))
    return torch.cat(logits), {f"{i}/bank": torch.stack(bank) for i, bank in enumerate(banks)}


@pytest.mark.parametrize("tokens", [SEGMENT, 3 * SEGMENT + 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"candidate": "last"}, {"paths": "linear"}, {"paths": "memory", "candidate": "token"}],
    ids=["all", "last", "linear", "memory-token"],
)
def test_equals_the_card(options, tokens):
    model, host, ids, grads = attached(exact_host(), **options), exact_host(), random_ids(2, tokens), []
    output = model(ids, use_cache=False)
    rows = [naive(host, model.memory, row) for row in ids]
    expected = torch.stack([logits for logits, _ in rows])
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)
    after = {n: torch.stack([state[n] for _, state in rows]) for n in rows[0][1]}
    stored = {n: output.memory_state[n][:, -t.shape[1] :] for n, t in after.items()}
    for name, tensor in after.items():
        torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-10)
    names, own = zip(*model.memory.named_parameters(), strict=True)
    for one, logits, kept in ((model, output.logits, stored), (host, expected, after)):
        weights = [p for n, p in one.named_parameters() if not n.startswith("memory.")]
        loss = logits.square().mean() + sum(t.square().mean() for t in kept.values())
        grads.append(torch.autograd.grad(loss, [*own, *weights], allow_unused=True, materialize_grads=True))
    for i, (fast, slow) in enumerate(zip(*grads, strict=True)):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
        # An empty bank is not read.
        assert bool(fast.any()) or (tokens == SEGMENT and names[i] in ("memory_qkv", "memory_out", "gate"))


def test_a_chunk_as_long_as_the_segment_with_shared_weights_is_the_segment():
    model, ids = attached(share_qkv=True, chunk=SEGMENT), random_ids(2, SEGMENT)
    found: dict[int, list[Tensor]] = {}
    inner = model.memory.residual

    def spy(x: Tensor, source: Tensor, step: Step) -> Tensor:
        chunk = step.note("chunk", step.layer)
        assert chunk is not None
        found[step.layer] = [x, chunk]
        return inner(x, source, step)

    model.memory.residual = spy
    with torch.no_grad():
        model(ids, use_cache=False)
        for layer, (own, chunk) in found.items():
            projected = model.model.layers[layer].self_attn.o_proj(chunk.flatten(2))
            torch.testing.assert_close(own, projected, rtol=0, atol=1e-6)
    assert set(found) == {0, 1}


def test_without_rows_the_memory_is_gone():
    model, ids = attached(num_rows=0, paths="linear"), random_ids(2, 2 * SEGMENT)
    assert len(model.memory.initial_state(2)) == 0
    plain, at = tiny_host(), torch.arange(2 * SEGMENT)
    with torch.no_grad():
        for part, got in zip(ids.split(SEGMENT, 1), model(ids).logits.split(SEGMENT, 1), strict=True):
            seen = at[:SEGMENT, None] // CHUNK == at[:SEGMENT] // CHUNK
            seen = (seen & (at[:SEGMENT] <= at[:SEGMENT, None]))[None, None].expand(2, -1, -1, -1)
            expected = plain(part, attention_mask=seen, use_cache=False).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [60.0, -60.0], ids=["open", "shut"])
def test_the_oldest_row_leaves_first(bias):
    """Ten candidates into four rows: an open gate keeps the last four in order, a shut one repeats the newest row."""
    torch.manual_seed(0)
    candidates, bank = torch.randn(2, 3, 10, 5), torch.randn(2, 3, 4, 5)
    after = push(candidates, bank, torch.zeros(2, 10, 5), torch.full((2, 5), bias))
    expected = candidates[:, :, -4:] if bias > 0 else bank[:, :, -1:].expand(-1, -1, 4, -1)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_fewer_candidates_than_rows_push_the_rest_back():
    memory, state = attached().memory, None
    for count in (3, 6):
        state = memory.initial_state(2) if state is None else state
        trace = {i: {"outputs": torch.randn(2, SEGMENT, 32)} for i in (0, 1)}
        before, state = state, memory.commit(state, Segment(trace=trace))
        assert state["count"].tolist() == [count, count]
        torch.testing.assert_close(state["0/bank"][:, 0], before["0/bank"][:, 3])


def test_a_token_reaches_its_chunk_its_segment_and_later_ones():
    model, ids = attached(paths="linear"), random_ids(1, 2 * SEGMENT)
    other = ids.clone()
    other[0, 1] = (ids[0, 1] + 1) % 58 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert not bool(difference[0])
    assert float(difference[1:CHUNK].min()) > 1e-4
    # Inside its segment nothing leaves the chunk before the bank is written.
    assert not bool(difference[CHUNK:SEGMENT].any())
    assert float(difference[SEGMENT:].min()) > 1e-6


def test_linear_paths_cost_twice_for_twice_the_segment():
    """Counted operations of one segment; the segment's own attention grows faster."""

    def operations(tokens: int, paths: str) -> int:
        # Fused kernels are not counted.
        host = tiny_host(num_hidden_layers=1, max_position_embeddings=4096, attn_implementation="eager")
        model = attached(host, segment=tokens, chunk=64, num_rows=128, paths=paths)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(random_ids(1, tokens), use_cache=False, logits_to_keep=1)
        return counter.get_total_flops()

    assert operations(4096, "linear") / operations(2048, "linear") == pytest.approx(2, abs=0.02)
    assert operations(2048, "all") / operations(1024, "all") > 3


def test_the_gate_learns_through_the_bank_unless_it_is_cut():
    model, ids = attached(), random_ids(2, 3 * SEGMENT)
    for truncation, learns in ((None, True), (Truncation("tail", 0), False)):
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, truncation=truncation).loss.backward()
        grad = model.memory.write.grad
        assert (grad is not None and bool(grad.any())) == learns


def test_diagnostics():
    model, ids = attached(paths="memory"), random_ids(2, SEGMENT)
    found = model(ids, memory_diagnostics=True).memory_diagnostics
    assert set(found) == {"filled", *(f"block{i}/{name}" for i in (0, 1) for name in ("gate", "row_norm"))}
    assert float(found["filled"]) == 0.75
    assert float(found["block1/row_norm"]) > 0
    assert attached(num_rows=0)(ids, memory_diagnostics=True).memory_diagnostics == {}


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 0}, {"num_rows": -1}, {"candidate": "first"}, {"paths": "none"},
        {"paths": "memory", "num_rows": 0}, {"paths": "linear", "share_qkv": True}, {"slots": 3},
    ],
)  # fmt: skip
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="chunked-fifo"):
        mnemic.attach(host, "chunked-fifo", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


@pytest.mark.slow
def test_recall_reaches_as_far_as_the_rows():
    """RMT's toy, 2 to 4 segments: 16 rows of 4 tokens hold 8 segments, so the ninth can ask for the first."""
    model = trained("chunked-fifo", chunk=4, num_rows=16)
    by_segments = {segments: accuracy(model, segments) for segments in (3, 9, 12)}
    assert by_segments[3] > 0.95
    assert by_segments[9] > 0.95
    assert by_segments[12] < by_segments[9]
