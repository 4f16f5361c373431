"""HMT against plain forwards and a Python list of vectors; RMT as its simplest case; causality; gradients; toy."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, Truncation
from mnemic.memories.recurrent.hmt import honest_labels
from tests.tiny import random_ids, tiny_host

SEGMENT = 8


def attached(host: str = "llama", **options: Any) -> Any:
    """In float64, with learned vectors as large as everything else."""
    model: Any = tiny_host(host).to(torch.float64)
    torch.manual_seed(1)
    given = {"cache_size": 3, "sensory": 2, "key_width": 16, **options}
    model = mnemic.attach(model, "hmt", segment=SEGMENT, **given)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.5)
    return model


def forward(model: Any, embeds: Tensor, hidden: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of the host alone; hidden: places that nobody sees."""
    seen = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()
    for place in hidden or []:
        seen[place + 1 :, place] = False
    mask = seen.expand(len(embeds), 1, -1, -1)
    places = torch.arange(embeds.shape[1]).expand(len(embeds), -1)
    states = model.mnemic.stack(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False)
    return states.last_hidden_state, model.get_output_embeddings()(states.last_hidden_state)


def naive(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits of one row, every vector made, and every p; segment by segment, with a list for a cache."""
    memory, k = model.memory, options.get("sensory", 2)
    recall, current = options.get("recall", True), options.get("summary_of") == "current"
    j, size = options.get("summary_tokens") or SEGMENT // 2, options.get("cache_size", 3)
    logits, made, prompts, before = [], [], [], None
    for part in ids.split(SEGMENT, dim=1):
        e, cache = model.get_input_embeddings()(part)[0], made[-size:]
        if not made:
            p = memory.first_memory
        elif not recall:
            p = made[-1]
        else:
            assert before is not None
            t, text = memory.summary_token[None], e[:j] if current else before[-j:]
            s = forward(model, torch.cat([t, text, t])[None])[0][0, -1]
            scores = [(s @ memory.query).dot(m @ memory.key) / memory.query.shape[1] ** 0.5 for m in cache]
            total = sum(score.exp() for score in scores)
            p = sum(score.exp() / total * m for score, m in zip(scores, cache, strict=True))
        prompts.append(p)
        # What stands in the place of missing sensory tokens must not matter.
        sensory = before[SEGMENT - k :] if before is not None else torch.full((k, 32), 7.0, dtype=torch.float64)
        written = [p[None]] if part.shape[1] == SEGMENT else []
        joined = torch.cat([p[None], sensory, e, *written])[None]
        states, out = forward(model, joined, hidden=[] if before is not None else list(range(1, 1 + k)))
        logits.append(out[0, 1 + k : 1 + k + len(e)])
        if written:
            made.append(states[0, -1])
        before = e
    return torch.cat(logits)[None], made, prompts


SETTINGS = {
    "default": {},
    "other sizes": {"sensory": 0, "summary_tokens": 7, "cache_size": 2},
    "current": {"summary_of": "current"},
    "current, half": {"summary_of": "current", "sensory": 0, "summary_tokens": 2},
    "last": {"recall": False},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_values_and_gradients_equal_a_list_of_vectors(host, options):
    length = 5 * SEGMENT + (0 if options.get("summary_of") else 3)
    model, ids, found = attached(host, **options), random_ids(1, length), []
    exact = host == "llama"
    for run in (lambda: model(ids, use_cache=False).logits, lambda: naive(model, ids, **options)[0]):
        model.zero_grad(set_to_none=True)
        logits = run()
        logits.square().mean().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-10 if exact else 1e-9)
    for name, grad in found[1][1].items():
        assert grad.any() or "." not in name.removeprefix("memory."), name
        torch.testing.assert_close(found[0][1][name], grad, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_the_cache_holds_the_last_vectors_in_order():
    model, ids = attached(), random_ids(1, 5 * SEGMENT)
    with torch.no_grad():
        state, made = model(ids, use_cache=False).memory_state, naive(model, ids)[1]
        assert state["count"].tolist() == [5]
        torch.testing.assert_close(state["cache"][0], torch.stack(made[2:5]), rtol=0, atol=1e-10)
        early = model(ids[:, : 2 * SEGMENT], use_cache=False).memory_state["cache"][0]
        assert not early[0].any()
        torch.testing.assert_close(early[1:], torch.stack(made[:2]), rtol=0, atol=1e-10)
        torch.testing.assert_close(state["tail"][0], model.get_input_embeddings()(ids)[0, -4:])


@pytest.mark.parametrize("host", ["llama", "gpt2", "gpt_neox"])
def test_without_recall_and_sensory_tokens_it_is_rmt_with_one_vector(host):
    model, ids = attached(host, recall=False, sensory=0), random_ids(2, 3 * SEGMENT + 2)
    rmt: Any = tiny_host(host).to(torch.float64)
    rmt = mnemic.attach(rmt, "rmt", segment=SEGMENT, num_tokens=1)
    with torch.no_grad():
        rmt.memory.first_tokens.copy_(model.memory.first_memory[None])
        got, expected = model(ids, use_cache=False), rmt(ids, use_cache=False)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.memory_state["cache"], expected.memory_state["memory"])


def _moved(model: Any, place: int) -> Tensor:
    """How far each logit of 4 segments moves with the token at `place`."""
    ids = random_ids(1, 4 * SEGMENT)
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % 58 + 3
    with torch.no_grad():
        return (model(ids, use_cache=False).logits - model(other, use_cache=False).logits).abs().amax(-1)[0]


def test_the_papers_summary_leaks_and_ours_does_not():
    """In the third segment a token among the first j moves the logits before it with "current" only."""
    start, place = 2 * SEGMENT, 2 * SEGMENT + 3
    ours, current = _moved(attached(), place), _moved(attached(summary_of="current"), place)
    assert not ours[:place].any()
    assert not current[:start].any()
    assert current[start:place].min() > 1e-6
    assert "causality" in attached(summary_of="current").memory.limits
    assert not attached().memory.limits
    # Behind token j nothing leaks.
    late = _moved(attached(summary_of="current"), start + 5)
    assert not late[: start + 5].any()
    assert late[start + 5] > 1e-4


def test_honest_labels_leave_out_what_is_known():
    labels = torch.arange(3, 15)[None]
    assert honest_labels(labels, 6)[0].tolist() == [-100, -100, -100, 6, 7, 8, -100, -100, -100, 12, 13, 14]
    assert honest_labels(labels, 6, 1)[0].tolist() == [-100, 4, 5, 6, 7, 8, -100, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("segments, trained", [(2, False), (3, True)])
def test_the_search_is_trained_once_there_is_a_choice(segments, trained):
    """With one vector the weights of the search are 1 whatever they are; the last segment then has a second."""
    model = attached()
    model(random_ids(1, segments * SEGMENT)).logits.square().sum().backward()
    assert bool(model.memory.query.grad.abs().max() > 1e-12) is trained
    assert bool(model.memory.key.grad.abs().max() > 1e-12) is trained


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"recall": False}], ids=["recall", "last"])
def test_truncation_cuts_what_is_stored(options, depth):
    model = attached(**options)
    embeds = model.get_input_embeddings()(random_ids(1, 5 * SEGMENT)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, truncation=Truncation("tail", depth)).logits
    logits[:, -SEGMENT:].square().sum().backward()
    felt = [bool(part.any()) for part in embeds.grad[0].split(SEGMENT)]
    assert felt == [s >= 4 - depth for s in range(5)]


def test_the_search_is_trained_with_the_shortest_truncation():
    model = attached()
    model(random_ids(1, 4 * SEGMENT), truncation=Truncation("tail", 0)).logits[:, -1].square().sum().backward()
    assert model.memory.query.grad.abs().max() > 1e-6
    assert model.memory.key.grad.abs().max() > 1e-6


def test_current_reads_whole_segments_only():
    model = attached(summary_of="current")
    with pytest.raises(mnemic.InputError, match="whole segments"):
        model(random_ids(1, SEGMENT + 1))
    with pytest.raises(mnemic.InputError, match="token by token"):
        model.generate(random_ids(1, SEGMENT), max_new_tokens=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sensory": SEGMENT + 1}, "sensory = 9 is more than a segment of 8"),
        ({"summary_tokens": SEGMENT + 1}, "summary_tokens = 9 is more than a segment of 8"),
        ({"cache_size": 0}, "cache_size"),
        ({"summary_of": "next"}, "summary_of"),
        ({"key_width": 0}, "key_width"),
    ],
)
def test_unusable_settings_are_refused(options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message):
        mnemic.attach(host, "hmt", segment=SEGMENT, **{"sensory": 2, **options})
    assert not mnemic.is_attached(host)


def test_in_a_stack():
    """Beside LM2 at its identity nothing changes."""
    ids, config = random_ids(2, 3 * SEGMENT + 3), {"cache_size": 2, "sensory": 2}
    alone, both = (
        mnemic.attach(tiny_host(), memories, segment=SEGMENT)
        for memories in (
            mnemic.memory_config("hmt", **config),
            [mnemic.memory_config("lm2", "attach", num_slots=4), mnemic.memory_config("hmt", **config)],
        )
    )
    with torch.no_grad():
        both.memory.parts["hmt"].load_state_dict(alone.memory.state_dict())
        torch.testing.assert_close(both(ids).logits, alone(ids).logits, rtol=0, atol=1e-6)
