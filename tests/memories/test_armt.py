"""ARMT: against a plain model that follows the card segment by segment, invariants, rewriting, the recall toy."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError
from mnemic.core.memory import Segment
from mnemic.core.step import Step
from mnemic.ops import associative_matrix
from tests.tiny import random_ids, tiny_host

SEGMENT, MEMORY, EPS = 6, 3, 1e-5


def attached(host: str = "llama", double: bool = False, moved: bool = True, layers: int = 2, **options: Any) -> Any:
    """ARMT on a tiny host, with weights moved so that every term shows."""
    model = tiny_host(host, num_hidden_layers=layers)
    model = model.double() if double else model
    torch.manual_seed(1)
    given = {"num_tokens": MEMORY, "key_width": 4, **options}
    model = mnemic.attach(model, "armt", segment=SEGMENT, **given)
    if moved:
        with torch.no_grad():
            for parameter in model.memory.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# The card, one vector at a time


def phi(x: Tensor, nu: int) -> Tensor:
    u = torch.stack([*(torch.relu(v) for v in x), *(torch.relu(-v) for v in x)])
    return torch.cat([torch.stack([u[i] * u[i - r] for i in range(len(u))]) for r in range(1, nu + 1)])


def read(x: Tensor, matrix: Tensor, z: Tensor, w_query: Tensor, nu: int) -> Tensor:
    features = phi(x @ w_query, nu)
    return x + matrix @ features / (z @ features + EPS)


def write(outputs: Tensor, matrix: Tensor, z: Tensor, first: bool, memory: Any, i: int) -> tuple[Tensor, Tensor]:
    after, z_after, nu = matrix, z, memory.config.nu
    for m in outputs:
        features, value = phi(m @ memory.key[i], nu), m @ memory.value[i]
        beta = torch.sigmoid(m @ memory.beta[i][:, 0] + memory.beta_bias[i][0, 0])
        known, returned, gamma = z @ features, torch.zeros_like(value), torch.ones(())
        if not first:
            returned = matrix @ features / (known + EPS)
            gamma = (1 - known / (features @ features + EPS)).clamp(0, 1).detach()
        after = after + beta * torch.outer(value - returned, features)
        z_after = z_after + gamma * features
    return after, z_after


def naive(host: Any, memory: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and state of one row (T,): plain forwards over [text ; memory tokens], with hooks at the layers."""
    layers, nu, segment_number = host.model.layers, memory.config.nu, 0
    features = 2 * nu * memory.config.key_width
    new = lambda *shape: torch.zeros(*shape, dtype=memory.first_tokens.dtype)  # noqa: E731
    matrices, zs = [[new(*s) for _ in layers] for s in ((memory.host.hidden_size, features), (features,))]
    carried = list(memory.first_tokens) if memory.config.carry == "tokens" else None
    outputs: dict[int, Tensor] = {}

    def before(i: int, x: Tensor) -> Tensor:
        if carried is not None:
            text = x[:, MEMORY:-MEMORY] if ended else x[:, MEMORY:]
            return torch.cat([carried[i][None], text, *([carried[i][None]] if ended else [])], dim=1)
        if segment_number == 0:
            return x
        return torch.stack([read(v, matrices[i], zs[i], memory.query[i], nu) for v in x[0]])[None]

    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, args, i=i: (before(i, args[0]), *args[1:])))
        hooks.append(layer.register_forward_hook(lambda _, __, out, i=i: outputs.update({i: out})))
    logits = []
    for part in ids.split(SEGMENT):
        ended = len(part) == SEGMENT
        tokens = memory.first_tokens[0] if carried is not None else memory.first_tokens
        embeds = host.get_input_embeddings()(part)
        front = MEMORY if carried is not None else 0
        embeds = torch.cat([tokens[:front], embeds, tokens if ended else tokens[:0]])
        logits.append(host(inputs_embeds=embeds[None], use_cache=False).logits[0, front : front + len(part)])
        if ended:
            written = [outputs[i][0, -MEMORY:] for i in range(len(layers))]
            if carried is not None:
                carried = written
            else:
                made = [
                    write(m, matrices[i], zs[i], segment_number == 0, memory, i) for i, m in enumerate(written)
                ]  # fmt: skip
                matrices, zs = [a for a, _ in made], [z for _, z in made]
            segment_number += 1
    for hook in hooks:
        hook.remove()
    state = {"tokens": carried} if carried is not None else {"matrix": matrices, "normaliser": zs}
    return torch.cat(logits), {n: torch.stack(t) for n, t in state.items()}


@pytest.mark.parametrize("tokens", [SEGMENT, 3 * SEGMENT, 2 * SEGMENT + 2])
@pytest.mark.parametrize("options", [{}, {"nu": 2}, {"preset": "prmt"}], ids=["nu3", "nu2", "prmt"])
def test_equals_the_card(options, tokens):
    model, ids = attached(double=True, **options), random_ids(2, tokens)
    output = model(ids, use_cache=False)
    host = tiny_host().double()
    names, leaves = zip(*model.memory.named_parameters(), strict=True)
    grads = []
    rows = [naive(host, model.memory, row) for row in ids]
    expected = torch.stack([logits for logits, _ in rows])
    after = {n: torch.stack([state[n] for _, state in rows]) for n in output.memory_state}
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)
    for name, tensor in output.memory_state.items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-10)
    for logits, state in ((output.logits, output.memory_state), (expected, after)):
        loss = logits.square().mean() + sum(t.square().mean() for t in state.values())
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for name, fast, slow in zip(names, *grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        # W_Q of a first segment has nothing to read.
        assert bool(fast.any()) or (name == "query" and tokens == SEGMENT), name


@pytest.mark.parametrize("host", ["llama", "gpt2", "gemma2"])
def test_a_new_memory_leaves_the_host_as_it_is_for_any_number_of_segments(host):
    model, plain, ids = attached(host, moved=False), tiny_host(host, num_hidden_layers=2), random_ids(2, 5 * SEGMENT)
    assert model.memory.identity_at_attach
    assert not bool(model.memory.value.any())
    with torch.no_grad():
        expected = torch.cat([plain(part, use_cache=False).logits for part in ids.split(SEGMENT, dim=1)], dim=1)
        output = model(ids, use_cache=False)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert not bool(output.memory_state["matrix"].any())
    assert bool(output.memory_state["normaliser"].any())


def test_prmt_is_no_identity():
    assert not attached(moved=False, preset="prmt").memory.identity_at_attach


def test_the_first_step_of_training_moves_the_values_only():
    """With W_V = 0 nothing else can be felt yet; after one step everything can."""
    model, ids = attached(moved=False), random_ids(2, 3 * SEGMENT)
    model(ids, labels=ids).loss.backward()
    felt = {name for name, p in model.memory.named_parameters() if bool(p.grad.any())}
    assert felt == {"value"}
    with torch.no_grad():
        model.memory.value -= model.memory.value.grad
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(bool(p.grad.any()) for p in model.memory.parameters())


def test_the_state_is_as_large_after_many_segments():
    model, width = attached(), 2 * 3 * 4
    short, long = (model(random_ids(2, n * SEGMENT)).memory_state for n in (1, 12))
    assert {n: tuple(t.shape) for n, t in long.items()} == {"matrix": (2, 2, 32, width), "normaliser": (2, 2, width)}
    assert short.nbytes == long.nbytes == 2 * 2 * (32 + 1) * width * 4
    assert eval(model.memory.state_size, {"L": 2, "d": 32, "nu": 3, "key_width": 4}) * 2 * 4 == long.nbytes


def test_the_state_stays_wide_under_a_narrow_host():
    model = attached().bfloat16()
    with torch.no_grad():
        output = model(random_ids(1, 3 * SEGMENT), use_cache=False)
    assert output.logits.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in output.memory_state.values())


@pytest.mark.parametrize("gamma", [True, False], ids=["delta", "no-gamma"])
def test_rewriting_a_key_replaces_its_value(gamma, monkeypatch):
    """An isolated memory writes (k, v1), then (k, v2) with beta = 1; read with the same key."""
    if not gamma:
        increment = associative_matrix._increment
        monkeypatch.setattr(
            associative_matrix,
            "_increment",
            lambda features, known, first, _, eps: increment(features, known, first, "one", eps),
        )
    memory = attached(layers=1, moved=False, num_tokens=1, key_width=16).memory
    torch.manual_seed(0)
    key, *values = torch.randn(3, 16)
    with torch.no_grad():
        # The first half of a token is its key, the other its value.
        memory.key.copy_(torch.cat([torch.eye(16), torch.zeros(16, 16)]))
        memory.query.copy_(memory.key)
        memory.value.copy_(torch.diag(torch.cat([torch.zeros(16), torch.ones(16)])))
        memory.beta.zero_()
        memory.beta_bias.fill_(40.0)
        states = [memory.initial_state(1)]
        for value in values:
            segment = Segment(trace={}, written_trace={0: {"outputs": torch.cat([key, value])[None, None]}})
            states.append(memory.commit(states[-1], segment))
        asked = torch.cat([key, torch.zeros(16)])[None, None]
        found = memory.before_layer(asked, Step.alone(memory, reads=memory.prepare(states[-1])))[0, 0, 16:]
    if gamma:
        torch.testing.assert_close(found, values[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(states[2]["normaliser"], states[1]["normaliser"], rtol=0, atol=1e-5)
    else:
        assert float((found - values[1]).abs().max()) > 0.1
        assert float((states[2]["normaliser"] - states[1]["normaliser"]).abs().max()) > 0.1


def test_diagnostics_tell_how_blocks_write():
    model, ids = attached(), random_ids(2, 2 * SEGMENT)
    found = model(ids, memory_diagnostics=True).memory_diagnostics
    assert set(found) == {f"block{i}/{what}" for i in (0, 1) for what in ("beta", "matrix_norm")}
    assert all(0 < float(found[f"block{i}/beta"]) < 1 and float(found[f"block{i}/matrix_norm"]) > 0 for i in (0, 1))


@pytest.mark.parametrize(
    "options", [{"num_tokens": 0}, {"key_width": 1, "nu": 3}, {"nu": 0}, {"carry": "layers"}, {"segments": 3}]
)
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="armt"):
        mnemic.attach(host, "armt", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_a_segment_with_its_memory_must_fit_the_hosts_positions():
    with pytest.raises(ConfigError, match="needs 131 positions"):
        mnemic.attach(tiny_host(), "armt", segment=128, num_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("memory, least", [("armt", 0.99), ("none", None)], ids=["armt", "none"])
def test_recall_at_the_trained_length_and_beyond(tmp_path, memory, least):
    """The toy of RMT's card, 2 to 4 segments: 2 layers of width 32, 8 values, batch 64, AdamW 1e-3, 250 steps."""
    from mnemic.benchmarks.distances import by_distance
    from mnemic.benchmarks.experiment import Experiment
    from mnemic.benchmarks.recall import RecallTask
    from mnemic.benchmarks.runs import run
    from mnemic.benchmarks.token_cell import TokenCell
    from mnemic.hosts import load

    experiment = Experiment(
        task="recall", memory=memory, memory_options={"num_tokens": 4, "key_width": 16} if memory == "armt" else {},
        segment=8, least_segments=2, most_segments=(4,), steps=250, batch_size=64, weight_decay=0.0, log_every=50,
        schedule="constant_with_warmup", warmup_steps=20, fact_segment=0,
        host_options={
            "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
            "initializer_range": 0.04,
        },
    )  # fmt: skip
    run(experiment, tmp_path, progress=False)
    model = load(tmp_path)
    for segments in (3, 12):
        task = RecallTask(segment_length=8, segments=segments)
        scores = by_distance(model, TokenCell("recall", str(segments), 1, task), 1024)
        accuracy = scores[segments - 1].accuracy
        assert accuracy >= least if least else abs(accuracy - task.chance) < 0.05
