"""LM2 on a host: identity at attach, state, gradients, layers, writes inside a segment, configuration."""

from typing import Any

import pytest
import torch

import mnemic
from mnemic import ConfigError, Truncation
from mnemic.core.registry import memory_config
from mnemic.core.state import State
from tests.tiny import random_ids, tiny_host

SEGMENT = 6


def attached(seed: int = 0, host: str = "llama", alpha: float | None = 0.7, segment: int = SEGMENT, **options: Any):
    """A tiny host with LM2 whose weights let every part show, and whose scale is `alpha` where it has one."""
    model = tiny_host(host)
    torch.manual_seed(seed)
    model = mnemic.attach(model, "lm2", segment=segment, **{"num_slots": 4, "num_heads": 2, **options})
    with torch.no_grad():
        for name, p in model.memory.named_parameters():
            if name == "alpha":
                p.fill_(0.0 if alpha is None else alpha)
            elif name.endswith((".weight", ".down", ".up")):
                p.normal_(std=0.25)
    return model


@pytest.mark.parametrize("host", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [4, SEGMENT, 5 * SEGMENT + 2])
def test_attach_preset_is_bit_identical_to_the_base_model(host, tokens):
    ids = random_ids(2, tokens)
    plain = mnemic.attach(tiny_host(host), "none", segment=SEGMENT)
    memory = attached(host=host, alpha=None)
    assert memory.memory.config.identity_start
    with torch.no_grad():
        output = memory(ids)
        assert torch.equal(output.logits, plain(ids).logits)
        if tokens <= SEGMENT:
            assert torch.equal(output.logits, tiny_host(host)(ids).logits)
    if tokens >= SEGMENT:
        assert not output.memory_state.equal(memory.memory.initial_state(2))


def test_a_trained_memory_changes_the_logits_of_later_segments():
    ids = random_ids(1, 3 * SEGMENT)
    model = attached()
    changed = ids.clone()
    changed[0, 1] = (ids[0, 1] + 1) % 58 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert torch.equal(difference[:1], torch.zeros(1))
    assert float(difference[2 * SEGMENT :].min()) > 1e-6


@pytest.mark.parametrize("scope, banks", [("shared", 1), ("per_layer", 2)])
def test_state_bytes_do_not_depend_on_the_tokens_read(scope, banks):
    model = attached(memory_scope=scope)
    with torch.no_grad():
        sizes = {model(random_ids(2, n)).memory_state.nbytes for n in (1, SEGMENT, 9 * SEGMENT + 1)}
    assert sizes == {2 * banks * 4 * 32 * 4}
    stream = model.stream()
    stream.feed(random_ids(1, 3 * SEGMENT + 1))
    carried = stream.cache.nbytes
    stream.feed(random_ids(1, 20 * SEGMENT))
    assert stream.cache.nbytes == carried


def test_reset_of_rows_restores_their_results_exactly():
    model = attached()
    first, second = random_ids(3, 2 * SEGMENT, seed=1), random_ids(3, 2 * SEGMENT, seed=2)
    reset = torch.tensor([False, True, False])
    with torch.no_grad():
        state = model(first).memory_state
        mixed = state.where(reset, model.memory.initial_state(3))
        got = model(second, memory_state=mixed)
        fresh = model(second, memory_state=model.memory.initial_state(3))
        continued = model(second, memory_state=state)
    assert torch.equal(got.logits[1], fresh.logits[1])
    assert torch.equal(got.logits[::2], continued.logits[::2])
    assert got.memory_state.select([1]).equal(fresh.memory_state.select([1]))
    assert got.memory_state.select([0, 2]).equal(continued.memory_state.select([0, 2]))
    assert not torch.equal(fresh.logits[1], continued.logits[1])


# Gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"route": "competitive", "top_k": 2},
        {"memory_scope": "per_layer", "init": "learned"},
        {"rank": 3},
        {"preset": "paper"},
    ],
    ids=["default", "competitive", "per-layer", "low-rank", "paper"],
)
def test_every_parameter_learns_from_two_segments(options):
    model = attached(**{"preset": "attach", **options})
    ids = random_ids(2, 2 * SEGMENT)
    model(ids, labels=ids).loss.backward()
    for name, p in model.memory.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.reshape(len(p), -1).any(-1).all()), name


def gates_of_writes(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """The mean input gate of each write of a row, found by streaming it alone."""
    found: list[torch.Tensor] = []
    stream = model.eval().stream()

    def watch(before: State, segment: Any, after: State, said: dict[str, torch.Tensor]) -> None:
        found.append(torch.stack([value for name, value in said.items() if name.endswith("gate_in")]).mean())

    stream.cache.watch = watch
    stream.feed(ids[None])
    return found


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("update_every", [None, 2])
def test_what_is_written_joins_the_training_loss(update_every, replay):
    model = attached(write_cost=0.5, update_every=update_every)
    ids, mask = random_ids(2, 3 * SEGMENT), torch.ones(2, 3 * SEGMENT, dtype=torch.long)
    mask[1, 2 * SEGMENT - 1 :] = 0
    with torch.no_grad():
        gates = [g for row, real in zip(ids, mask.bool(), strict=True) for g in gates_of_writes(model, row[real])]
    assert len(gates) == (3 + 1 if update_every is None else 9 + 5)
    labels = ids.masked_fill(mask == 0, -100)
    given = {"attention_mask": mask, "labels": labels, "use_cache": False, "replay": replay}
    output = model.train()(ids, **given)
    torch.testing.assert_close(output.memory_loss.item(), 0.5 * torch.stack(gates).mean().item(), rtol=0, atol=1e-6)
    free = attached(update_every=update_every).train()(ids, **given)
    assert free.memory_loss is None
    torch.testing.assert_close(output.loss, free.loss + output.memory_loss)
    output.memory_loss.backward()
    assert bool(model.memory.bias_in.grad.gt(0).all())
    assert model.eval()(ids, **given).memory_loss is None


def test_the_scale_learns_from_zero():
    model = attached(alpha=None)
    ids = random_ids(2, 2 * SEGMENT)
    model(ids, labels=ids).loss.backward()
    assert bool((model.memory.alpha.grad != 0).all())
    assert not any(bool(p.grad.any()) for p in model.memory.query.parameters())


def reached(model, count: int, last: int, truncation: Truncation | None, state: State | None = None) -> list[bool]:
    """For each of `count` segments, whether the loss of segment `last` has a gradient there; exact zeros otherwise."""
    torch.manual_seed(3)
    embeds = torch.randn(1, count * SEGMENT, 32, requires_grad=True)
    output = model(inputs_embeds=embeds, truncation=truncation, memory_state=state)
    output.logits[:, last * SEGMENT : (last + 1) * SEGMENT].pow(2).sum().backward()
    return [bool(part.any()) for part in embeds.grad[0].split(SEGMENT)]


def test_without_truncation_gradients_reach_the_first_segment():
    assert reached(attached(), 4, 3, None) == [True] * 4


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 7])
def test_tail_reaches_depth_segments_back(depth):
    assert reached(attached(), 4, 3, Truncation("tail", depth)) == [s >= 3 - depth for s in range(4)]


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_chunk_reaches_the_start_of_its_chunk(size, last):
    expected = [last // size * size <= s <= last for s in range(4)]
    assert reached(attached(), 4, last, Truncation("chunk", size)) == expected


def test_truncation_counts_the_segments_of_each_row():
    model = attached()
    torch.manual_seed(3)
    embeds = torch.randn(2, 4 * SEGMENT, 32, requires_grad=True)
    mask = torch.ones(2, 4 * SEGMENT, dtype=torch.long)
    mask[1, 2 * SEGMENT :] = 0
    logits = model(inputs_embeds=embeds, attention_mask=mask, truncation=Truncation("tail", 1)).logits
    (logits[0, 3 * SEGMENT :].pow(2).sum() + logits[1, SEGMENT : 2 * SEGMENT].pow(2).sum()).backward()
    reaches = [[bool(part.any()) for part in row.split(SEGMENT)] for row in embeds.grad]
    assert reaches == [[False, False, True, True], [True, True, False, False]]


def test_truncation_cuts_a_carried_state_but_never_a_learned_first_one():
    model = attached(init="learned")
    for policy in (Truncation("tail", 0), Truncation("chunk", 1)):
        model.zero_grad()
        assert reached(model, 1, 0, policy) == [True]
        assert bool(model.memory.first_slots.grad.any())
    carried = model.memory.initial_state(1).map(lambda t: t.detach().clone().requires_grad_())
    assert reached(model, 2, 1, Truncation("tail", 1), carried) == [True, True]
    assert carried["bank"].grad is None
    assert reached(model, 2, 1, Truncation("tail", 2), carried) == [True, True]
    assert bool(carried["bank"].grad.any())


# Blocks with memory, writes inside a segment


def test_memory_layers_as_count_or_list():
    count, chosen = attached(memory_layers=1), attached(memory_layers=[0])
    ids = random_ids(1, 3 * SEGMENT)
    assert count.memory.layers == chosen.memory.layers == (0,)
    with torch.no_grad():
        assert torch.equal(count(ids).logits, chosen(ids).logits)
        assert not torch.equal(count(ids).logits, attached(memory_layers=[1])(ids).logits)
    assert len(count.memory.query.weight) == len(count.memory.bias_out) == 1
    assert attached(memory_layers=2).memory.layers == attached().memory.layers == (0, 1)


@pytest.mark.parametrize("layers", [0, []], ids=["count", "list"])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_no_memory_layers_is_no_memory(layers, scope):
    ids = random_ids(2, 3 * SEGMENT + 1)
    model = attached(preset="default", memory_layers=layers, memory_scope=scope)
    plain = mnemic.attach(tiny_host(), "none", segment=SEGMENT)
    assert model.memory.identity_at_attach
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_update_every_writes_inside_a_segment(monkeypatch):
    ids = random_ids(2, 2 * SEGMENT + 1)
    whole, often = attached(), attached(update_every=2)
    tokens = []
    commit = often.memory.commit

    def counted(state, segment):
        tokens.append(segment.trace[0]["tokens"].shape[1])
        return commit(state, segment)

    monkeypatch.setattr(often.memory, "commit", counted)
    with torch.no_grad():
        difference = (whole(ids).logits - often(ids).logits).abs().amax((0, 2))
    assert tokens == [2] * 6
    assert float(difference[:2].max()) < 1e-6
    assert float(difference[2:].min()) > 1e-4


@pytest.mark.parametrize("every", [1, 3, SEGMENT])
def test_update_every_reads_the_same_token_by_token(every):
    ids = random_ids(2, 2 * SEGMENT + 2)
    model = attached(update_every=every)
    with torch.no_grad():
        at_once = model(ids, use_cache=False)
        cache, steps = None, []
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(cache.state["bank"], at_once.memory_state["bank"], rtol=0, atol=1e-4)


# Diagnostics


@pytest.mark.parametrize("options", [{}, {"write_scores": "read"}, {"memory_scope": "per_layer", "top_k": 1}])
def test_diagnostics_name_every_block_and_stay_in_range(options):
    ids = random_ids(2, 3 * SEGMENT)
    with torch.no_grad():
        found = attached(**options)(ids, memory_diagnostics=True).memory_diagnostics
    kinds = {"gate_in", "gate_forget", "gate_out", "slot_entropy", "bank_norm"}
    assert set(found) == {f"block{i}/{kind}" for i in range(2) for kind in kinds}
    for name, value in found.items():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert 0 <= float(value) <= (10 if name.endswith("bank_norm") else 1), name
    if options.get("top_k") == 1:
        assert float(found["block0/slot_entropy"]) == 0


def test_diagnostics_tell_a_closed_gate():
    model = attached()
    with torch.no_grad():
        model.memory.bias_in.fill_(-30)
        for p in model.memory.gate_in.parameters():
            p.zero_()
        found = model(random_ids(1, SEGMENT), memory_diagnostics=True).memory_diagnostics
    assert float(found["block0/gate_in"]) < 1e-9
    assert float(found["block0/gate_forget"]) > 0.1


# Configuration


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_slots": 0}, "at least 1"),
        ({"num_slots": 2.5}, "expected int"),
        ({"num_heads": 5}, "does not divide the host's width 32"),
        ({"num_slots": 33}, "init='orthogonal' or 'learned'"),
        ({"retention": 0.0}, "more than 0"),
        ({"retention": 1.0}, "less than 1"),
        ({"retention": 0}, "more than 0"),
        ({"retention": 1}, "less than 1"),
        ({"retention": 1.5}, "between 0 and 1"),
        ({"retention": "none"}, "'paper' or 'code'"),
        ({"route": "hard"}, "'competitive'"),
        ({"top_k": 0}, "at least 1"),
        ({"memory_layers": 3}, "below 2"),
        ({"memory_layers": -1}, "at least 0"),
        ({"memory_layers": [1, 0]}, "increasing"),
        ({"memory_layers": [0, 0]}, "increasing"),
        ({"memory_layers": ["0"]}, "block numbers"),
        ({"update_every": 4}, "does not divide the segment of 6 tokens"),
        ({"route": "identity", "num_slots": 4}, "num_slots = segment"),
        ({"route": "identity", "num_slots": 2, "update_every": 2}, "leave update_every unset"),
        ({"gates": ["out", "forget"], "write_cost": 1.0}, "needs the input gate"),
        ({"norm": False, "norm_scale": 2.0}, "needs the norm"),
        ({"slots": 4}, "num_slots"),
    ],
)
def test_unusable_configurations_are_refused(options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        mnemic.attach(host, "lm2", segment=SEGMENT, **{"num_slots": 4, **options})
    assert not mnemic.is_attached(host)
    assert not any(name.startswith("memory.") for name, _ in host.named_parameters())


def test_with_a_larger_scale_of_the_norm_slots_choose_more_sharply_and_queries_too():
    ids = random_ids(2, 4 * SEGMENT)
    found = []
    for scale in (1.0, 2.0):
        model = attached(norm_scale=scale)
        assert {p.unique().item() for p in (model.memory.query_norm, model.memory.slot_norm)} == {scale}
        found.append(model(ids, memory_diagnostics=True).memory_diagnostics)
    for block in range(2):
        assert found[1][f"block{block}/slot_entropy"] < found[0][f"block{block}/slot_entropy"]


def test_presets():
    paper = {
        "content_write": False, "norm": False, "retention": "paper", "input_bias": 0.0, "query_source": "attention",
    }  # fmt: skip
    assert memory_config("lm2:paper") == memory_config("lm2", **paper)
    assert memory_config("lm2:attach") == memory_config("lm2", identity_start=True)
    reference = memory_config("lm2:reference_compat", num_heads=4)
    assert (reference.name, reference.num_heads) == ("lm2-reference", 4)
    with pytest.raises(mnemic.UnknownNameError, match="'paper'"):
        memory_config("lm2:papr")


@pytest.mark.parametrize("gate", ["out", "in", "forget"])
def test_a_gate_that_is_left_out_is_open_or_keeps_its_retention(gate):
    """As the whole model whose gate is shut by nothing: a bias of its logit, and weights of zero."""
    left = tuple(name for name in ("out", "in", "forget") if name != gate)
    torch.manual_seed(0)
    whole = mnemic.attach(tiny_host("llama"), "lm2", segment=8, num_slots=8, retention=0.9)
    torch.manual_seed(0)
    less = mnemic.attach(tiny_host("llama"), "lm2", segment=8, num_slots=8, retention=0.9, gates=left)
    names = {name for name, _ in whole.named_parameters()} - {name for name, _ in less.named_parameters()}
    assert {name.split(".")[1] for name in names} == {f"gate_{gate}", f"bias_{gate}"}
    weights = {name: weight for name, weight in whole.state_dict().items() if name not in names}
    less.load_state_dict(weights)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if name.startswith(f"memory.gate_{gate}"):
                weight.zero_()
        # A bias of 60 is a gate of 1 in float32; that of the forget gate is as it starts.
        if gate != "forget":
            getattr(whole.memory, f"bias_{gate}").fill_(60.0)
    ids = random_ids(2, 20)
    torch.testing.assert_close(less(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("gates", [("out", "out"), ("write",)])
def test_unknown_gates(gates):
    with pytest.raises(ConfigError, match="once each"):
        mnemic.attach(tiny_host("llama"), "lm2", segment=8, num_slots=8, gates=gates)
