"""RETRO: its equations against loops over rows, chunks, tokens and heads; what may be felt where; generation."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import mnemic
from mnemic import store
from mnemic.core.step import Step
from mnemic.memories.knowledge.retro import Retro, RetroConfig, build_database
from mnemic.ops.neighbour_encoder import NeighbourEncoder
from mnemic.store.embedding import TOKEN_SIGNS, embedder, register_embedder, token_signs
from tests.tiny import VOCABULARY, host_config, random_ids, tiny_host

M, K, SEGMENT = 4, 2, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    texts = [random_ids(n, seed=n).tolist() for n in range(5, 40)]
    return str(build_database(tmp_path_factory.mktemp("retro") / "db", texts, M, progress=False).folder)


def attached(folder: str, host: str = "llama", segment: int = SEGMENT, double: bool = False, **options: Any) -> Any:
    settings = {
        "database": folder, "chunk_length": M, "neighbours": K, "encoder_width": 16, "encoder_heads": 2,
        "memory_layers": (0, 1), **options,
    }  # fmt: skip
    torch.manual_seed(1)
    base = tiny_host(host).double() if double else tiny_host(host)
    return mnemic.attach(base, "retro", segment=segment, preset=settings.pop("preset", "default"), **settings)


# The equations, one number at a time where it matters


def rms(x: Tensor, norm: Any) -> Tensor:
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def turned(x: Tensor, place: int, rotated: int) -> Tensor:
    """One vector, pairs (j, j + rotated / 2) turned by place * 10000^(-2j / rotated)."""
    half, out = rotated // 2, list(x)
    for j in range(half):
        # As the op rounds: the product in float64, cosine and sine in float32.
        angle = torch.tensor(place * 10000.0 ** (-2 * j / rotated), dtype=torch.float32)
        c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        out[j], out[j + half] = x[j] * c - x[j + half] * s, x[j + half] * c + x[j] * s
    return torch.stack(out)


def softmax_read(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.stack([(query * k).sum() / math.sqrt(len(query)) for k in keys]).softmax(0)
    return (weights[:, None] * torch.stack(values)).sum(0)


def heads_of(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.view(heads, -1))


def encode_loop(encoder: NeighbourEncoder, heads: int, tokens: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
    """One neighbour: embeddings (r, d), mask (r,), H (m, d) -> (r, w)."""
    x = tokens @ encoder.into.weight.T
    hidden = rms(hidden, encoder.hidden_norm)
    rows = range(len(x))
    real = [i for i in rows if mask[i]] or list(rows)
    rotated = min(x.shape[1] // heads, 32)
    for layer in encoder.layers:
        q, k, v = (rms(x, layer.norms[0]) @ layer.joint.weight.T).chunk(3, -1)
        read = []
        for i in rows:
            parts = []
            for h in range(heads):
                keys = [turned(heads_of(k[s], heads)[h], s, rotated) for s in real]
                parts.append(
                    softmax_read(
                        turned(heads_of(q[i], heads)[h], i, rotated), keys, [heads_of(v[s], heads)[h] for s in real]
                    )
                )
            read.append(torch.cat(parts))
        x = x + torch.stack(read) @ layer.joint_out.weight.T
        q = rms(x, layer.norms[1]) @ layer.query.weight.T
        k, v = (hidden @ layer.key_value.weight.T).chunk(2, -1)
        read = []
        for i in rows:
            parts = [
                softmax_read(
                    heads_of(q[i], heads)[h], [heads_of(s, heads)[h] for s in k], [heads_of(s, heads)[h] for s in v]
                )
                for h in range(heads)
            ]
            read.append(torch.cat(parts))
        x = x + torch.stack(read) @ layer.cross_out.weight.T
        x = (
            x
            + F.gelu(rms(x, layer.norms[2]) @ layer.up.weight.T + layer.up.bias) @ layer.down.weight.T
            + layer.down.bias
        )
    return rms(x, encoder.norm)


def read_loop(memory: Retro, layer: int, hidden: Tensor, encoded: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What block `layer` adds at every position, (n, d), from h (n, d) and per chunk E (k r, w) with its mask."""
    reader, heads = memory.readers[str(layer)], memory._heads
    rotated, out = min(hidden.shape[1] // heads, 32), []
    for i in range(len(hidden)):
        u = (i + 1) // M - 1
        if u < 0:
            out.append(torch.zeros_like(hidden[i]))
            continue
        e, mask = encoded[u]
        query = rms(hidden[i], reader.norm) @ reader.query.weight.T
        k, v = (e @ reader.key_value.weight.T).chunk(2, -1)
        parts = []
        for h in range(heads):
            real = [s for s in range(len(e)) if mask[s]]
            keys = [turned(heads_of(k[s], heads)[h], s % (2 * M), rotated) for s in real]
            values = [heads_of(v[s], heads)[h] for s in real]
            if reader.null is not None:
                keys.append(reader.null[0, h])
                values.append(reader.null[1, h])
            place = M - 1 + i + 1 - (u + 1) * M
            parts.append(
                softmax_read(turned(heads_of(query, heads)[h], place, rotated), keys, values)
                if keys else torch.zeros_like(reader.query.weight[0, : len(query) // heads])
            )  # fmt: skip
        out.append(torch.cat(parts) @ reader.out.weight.T)
    return torch.stack(out)


class Table:
    """A host that has embeddings only."""

    def __init__(self, table: Tensor):
        self.table = table

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def run(memory: Retro, state: Any, ids: Tensor, given: list[Tensor], table: Tensor) -> tuple[list[Tensor], dict]:
    """Both blocks of a host whose attention gives 0.1 of its input; `given` are the blocks' inputs."""
    step = Step.alone(memory, -1, state=state, host=Table(table), places=torch.arange(ids.shape[1])[None])
    step.frame.reads = memory.fetch(state, ids, step)
    out = []
    for layer, x in zip(memory.layers, given, strict=True):
        one = Step(step.frame, layer)
        out.append(memory.residual(0.1 * memory.before_layer(x, one), x, one))
    return out, step.frame.left


@pytest.mark.parametrize("null", [True, False])
def test_the_reading_equals_loops(folder, null):
    """One row of 11 tokens in pieces of 6 and 5, values and gradients, in float64."""
    model = attached(folder, double=True, null_kv=null)
    memory, make = model.memory, torch.Generator().manual_seed(0)
    ids = random_ids(1, 11, seed=3)
    given = [torch.randn(1, 11, 32, generator=make, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    table = torch.randn(VOCABULARY, 32, generator=make, dtype=torch.float64, requires_grad=True)
    state, parts = memory.initial_state(1), []
    for start, stop in ((0, 6), (6, 11)):
        out, left = run(memory, state, ids[:, start:stop], [x[:, start:stop] for x in given], table)
        state = {**state, **left}
        parts.append(out)
    fast = [torch.cat([p[i] for p in parts], 1)[0] for i in range(2)]

    database, signs = store.open_database(folder), embedder(TOKEN_SIGNS)
    first = 1.1 * given[0][0]
    encoded = []
    for u in range(2):
        chunk = ids[:, u * M : (u + 1) * M]
        found, _ = database.search(signs(chunk, torch.ones_like(chunk).bool()), K)
        tokens, mask = (t[0] for t in database.neighbours(found))
        hidden = first[u * M : (u + 1) * M]
        both = [encode_loop(memory.encoder, 2, table[tokens[j]], mask[j], hidden) for j in range(K)]
        encoded.append((torch.cat(both), mask.flatten()))
    slow = [0.1 * x[0] + read_loop(memory, i, 1.1 * x[0], encoded) for i, x in enumerate(given)]
    leaves = [*given, table, *memory.parameters()]
    pull = [torch.randn(11, 32, generator=make, dtype=torch.float64) for _ in range(2)]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    grads = [
        torch.autograd.grad(sum((p * o).sum() for p, o in zip(pull, outs, strict=True)), leaves)
        for outs in (fast, slow)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_gradients_pass_the_border_of_a_call(folder):
    """The loss behind a carried state is felt in the weights as if there were no border."""
    model, ids = attached(folder, double=True), random_ids(2, 24)
    model(ids).logits[:, 16:].square().sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    first = model(ids[:, :16])
    model(ids[:, 16:], memory_state=first.memory_state).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_an_empty_answer_is_read_as_nothing_or_as_null(tmp_path):
    """Every chunk of the database belongs to the document that is read: no neighbour is left."""
    text, ids = random_ids(40).tolist(), random_ids(1, 20)
    folder = str(build_database(tmp_path / "db", [text], M, progress=False).folder)
    for null in (False, True):
        model = attached(folder, null_kv=null, segment=32)
        state = model.memory.reading_documents(torch.tensor([0]))
        with torch.no_grad():
            logits = model(ids, memory_state=state, use_cache=False).logits
            plain = tiny_host()(ids, use_cache=False).logits
        assert bool(logits.isfinite().all())
        same = (logits - plain).abs().amax(-1)[0] == 0
        assert same.tolist() == [True] * 20 if not null else [True] * (M - 1) + [False] * (20 - M + 1)


def test_the_document_that_is_read_is_not_found(folder):
    texts = [random_ids(n, seed=n).tolist() for n in range(5, 40)]
    ids = torch.tensor([texts[30][:16], texts[30][:16]])
    memory = attached(folder).memory
    state = memory.reading_documents(torch.tensor([-1, 30]))
    step = Step.alone(memory, -1, state=state, places=torch.arange(16)[None])
    reads = memory.fetch(state, ids, step)
    found = reads["neighbours"]
    for u in range(4):
        expected = texts[30][u * M : (u + 2) * M]
        assert found[0, u, 0].tolist() == expected
        assert found[1, u, 0].tolist() != expected
    with torch.no_grad():
        model = attached(folder, segment=32)
        logits = model(ids, memory_state=state, use_cache=False).logits
    assert (logits[0] - logits[1]).abs().amax() > 1e-3


def test_other_neighbours_are_felt_from_the_end_of_their_chunk_on(folder, monkeypatch):
    """RET(C_u) changed: logits before position (u + 1) m - 1 are bit-identical, that one differs."""
    model, ids = attached(folder, segment=64), random_ids(1, 20)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    searched = Retro._search
    for u in range(4):

        def changed(self, chunks, documents, u=u):
            tokens, mask = searched(self, chunks, documents)
            tokens = tokens.clone()
            tokens[u] = 3 + (tokens[u] + 5) % (VOCABULARY - 3)
            return tokens, mask

        monkeypatch.setattr(Retro, "_search", changed)
        with torch.no_grad():
            after = model(ids, use_cache=False).logits
        difference = (after - before).abs().amax(-1)[0]
        start = (u + 1) * M - 1
        assert torch.equal(after[:, :start], before[:, :start])
        assert difference[start] > 1e-5
        monkeypatch.undo()


def test_a_token_reaches_no_earlier_one_though_encodings_depend_on_it(folder):
    model, ids = attached(folder, segment=64), random_ids(1, 20)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for t in range(20):
            other = ids.clone()
            other[0, t] = 3 + (ids[0, t] + 5) % (VOCABULARY - 3)
            assert torch.equal(model(other, use_cache=False).logits[:, :t], before[:, :t])


@pytest.mark.parametrize("host", ["llama", "gpt2", "gemma2"])
def test_attached_or_off_it_is_the_host_bit_for_bit(folder, host):
    ids = random_ids(2, 21)
    with torch.no_grad():
        expected = tiny_host(host)(ids, use_cache=False).logits
        for options in ({"preset": "attach"}, {"reading": False}):
            model = attached(folder, host, segment=32, **options)
            assert model.memory.identity_at_attach
            assert torch.equal(model(ids, use_cache=False).logits, expected)
        model = attached(folder, host, segment=32)
        assert not torch.equal(model(ids, use_cache=False).logits, expected)
        model.memory.config = model.memory.config.replace(reading=False)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_generation_equals_recomputing_everything(folder, host):
    """Greedy over more than three chunks and two borders of segments."""
    model, ids = attached(folder, host), random_ids(1, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(15):
            logits = model(expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    got = model.generate(ids, max_new_tokens=15, do_sample=False)
    assert torch.equal(got, expected)


def test_beside_a_memory_with_tokens_of_its_own(folder):
    """Memory tokens around the segment neither count nor read."""
    from mnemic.core import memory_config

    ids = random_ids(2, 21)
    config = attached(folder).memory.config
    torch.manual_seed(2)
    model = mnemic.attach(tiny_host(), [memory_config("rmt", num_tokens=3), config], segment=SEGMENT)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        stream = model.stream(2)
        parts = [stream.feed(p, return_logits=True) for p in ids.split([3, 1, 10, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=0, atol=1e-4)
    assert whole.memory_state["retro/-1/ids"][0].tolist() == [ids[0, 20].item(), 0, 0, 0]
    assert whole.memory_state["retro/-1/tokens"].tolist() == [21, 21]


def test_default_blocks(folder):
    spec = attached(folder).memory.host
    from dataclasses import replace

    for total, expected in [(2, (1,)), (4, (2,)), (6, (3,)), (12, (5, 8, 11)), (24, (8, 11, 14, 17, 20, 23))]:
        assert Retro(RetroConfig(encoder_width=4), replace(spec, num_layers=total)).layers == expected


def test_a_database_is_opened_once_and_again_when_rebuilt(tmp_path):
    first = str(build_database(tmp_path / "db", [random_ids(30).tolist()], M, progress=False).folder)
    models = [attached(first), attached(first)]
    assert models[0].memory.database() is models[1].memory.database()
    assert len(copy.deepcopy(models[0]).memory.database()) == 8
    (tmp_path / "db").rename(tmp_path / "old")
    build_database(tmp_path / "db", [random_ids(50).tolist()], M, progress=False)
    assert len(models[0].memory.database()) == 13


def test_token_signs_are_fixed_and_ignore_padding():
    tokens = torch.tensor([[5, 70000, 5, 0]])
    mask = torch.tensor([[True, True, True, False]])
    signs = token_signs(tokens, mask)
    assert (signs.shape, signs.dtype) == ((1, 128), torch.float32)
    one, two = (token_signs(torch.tensor([[t]]), torch.ones(1, 1).bool())[0] for t in (5, 70000))
    torch.testing.assert_close(signs[0], (2 * one + two) / 3)
    assert set(one.tolist()) == {-1.0, 1.0}
    assert one[:16].tolist() == [float(s) for s in FIRST_SIGNS_OF_5]
    assert not bool(token_signs(tokens, torch.zeros_like(mask)).any())
    # Different tokens are nearly orthogonal, neighbours in number included.
    many = token_signs(torch.arange(500)[:, None], torch.ones(500, 1).bool())
    products = (many @ many.T / 128).fill_diagonal_(0)
    assert products.abs().max() < 0.5
    assert products.mean().abs() < 0.01


FIRST_SIGNS_OF_5 = [-1, -1, -1, -1, 1, -1, -1, 1, -1, -1, 1, 1, 1, 1, -1, 1]


def test_other_embedders_are_registered_by_name(tmp_path):
    def lengths(tokens: Tensor, mask: Tensor) -> Tensor:
        return (tokens * mask).float().sum(1, keepdim=True)

    with pytest.raises(mnemic.UnknownNameError, match="No embedder is called 'sums'"):
        build_database(tmp_path / "db", [[3, 4, 5, 6]], M, embedder_name="sums", progress=False)
    register_embedder("sums", lengths)
    register_embedder("sums", lengths)
    with pytest.raises(mnemic.ConfigError, match="already"):
        register_embedder("sums", token_signs)
    texts = [[3, 4, 5, 6], [40, 40, 40, 40]]
    folder = str(build_database(tmp_path / "db", texts, M, embedder_name="sums", progress=False).folder)
    memory = attached(folder, embedder="sums", neighbours=1).memory
    found, _ = memory._search(torch.tensor([[1, 1, 1, 1], [50, 50, 50, 50]]), torch.tensor([-1, -1]))
    assert found[:, 0, :M].tolist() == texts
    with pytest.raises(mnemic.StateError, match="embedder 'sums'"):
        attached(folder)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    for options, error, message in [
        ({"database": None}, mnemic.ConfigError, "give database=FOLDER"),
        ({"database": str(tmp_path / "none")}, mnemic.FileFormatError, "does not exist"),
        ({"chunk_length": 3}, mnemic.StateError, "built with chunk length 4"),
        ({"tokenizer": "other"}, mnemic.StateError, "built with tokenizer ''"),
        ({"memory_layers": (1, 0)}, mnemic.ConfigError, "increasing block numbers below 2"),
        ({"memory_layers": (2,)}, mnemic.ConfigError, "increasing block numbers below 2"),
        ({"num_heads": 5}, mnemic.ConfigError, "num_heads = 5 does not cut a width of 32"),
        ({"encoder_heads": 16}, mnemic.ConfigError, "encoder_heads = 16 does not cut a width of 16"),
    ]:
        with pytest.raises(error, match=message):
            attached(folder, **options)
    foreign = str(build_database(tmp_path / "db", [[900, 901, 902]], M, progress=False).folder)
    with pytest.raises(mnemic.StateError, match="holds token 902, the host has 61"):
        attached(foreign)
    with pytest.raises(mnemic.InputError, match="input_ids instead of inputs_embeds"):
        attached(folder)(inputs_embeds=torch.zeros(1, 4, 32))


def _accuracy(model: Any, documents: Tensor, m: int) -> float:
    """Share of the values (every second token of the second chunk) that are predicted."""
    with torch.no_grad():
        logits = model.eval()(documents, use_cache=False).logits
    places = torch.arange(m + 1, 2 * m, 2)
    return (logits[:, places - 1].argmax(-1) == documents[:, places]).float().mean().item()


@pytest.mark.slow
def test_values_are_copied_from_the_continuation(tmp_path):
    """A chunk that names a document, then a random table of keys and values, which only the database knows."""
    m, steps = 16, 200
    documents = random_ids(700, 2 * m, seed=11)
    folder = str(build_database(tmp_path / "db", documents.tolist(), m, progress=False).folder)
    learn, test = documents[:600], documents[600:]
    found = {}
    for reading in (True, False):
        torch.manual_seed(0)
        host = AutoModelForCausalLM.from_config(
            host_config("llama", hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
        )
        model = mnemic.attach(
            host, "retro", segment=2 * m, preset="default", database=folder, chunk_length=m, memory_layers=(0, 1),
            neighbours=1, encoder_width=64, encoder_heads=4, encoder_layers=1, reading=reading,
        ).train()  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        make = torch.Generator().manual_seed(0)
        for _ in range(steps):
            ids = learn[torch.randint(600, (16,), generator=make)]
            labels = ids.clone()
            labels[:, :m] = -100
            optimiser.zero_grad()
            model(ids, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        found[reading] = _accuracy(model, test, m)
    print(f"values predicted after {steps} steps: {found[True]:.3f} with retrieval, {found[False]:.3f} without")
    assert found[True] > 0.95
    assert found[False] < 3 / (VOCABULARY - 3)
