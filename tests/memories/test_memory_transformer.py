"""Memory Transformer against loops over queries; what each variant reduces to; cost of the bottleneck; toy."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnemic
from benchmarks.replay import LiveBytes
from mnemic import ConfigError
from tests.tiny import host_config, random_ids, tiny_host

SEGMENT = 8


def attached(host: str = "llama", segment: int = SEGMENT, **options: Any) -> Any:
    """In float64, with memory tokens as large as everything else and a controller of its own."""
    model: Any = tiny_host(host).to(torch.float64)
    torch.manual_seed(1)
    model = mnemic.attach(model, "memory-transformer", segment=segment, **{"num_tokens": 2, **options})
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.3)
    return model


def slots(tokens: int, options: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(kind, which text or memory token, position) of a segment in the order in which they stand."""
    m, every, found = options.get("num_tokens", 2), options.get("every"), []
    front = every is None or options.get("variant") == "bottleneck"
    for i in range(tokens):
        if (i == 0 and front) or (every is not None and i > 0 and i % every == 0):
            found += [(f"group {i}", j, i) for j in range(m)]
        found.append(("text", i, i))
    if options.get("shift_positions"):
        found = [(kind, which, at) for at, (kind, which, _) in enumerate(found)]
    return found


def sees(query: tuple, key: tuple, order: list[tuple]) -> bool:
    return order.index(key) <= order.index(query) or (query[0] == key[0] != "text")


def inputs(model: Any, ids: Tensor, order: list[tuple]) -> Tensor:
    text, memory = model.get_input_embeddings()(ids), model.memory.first_tokens
    return torch.stack([text[:, w] if kind == "text" else memory[w].expand(len(ids), -1) for kind, w, _ in order], 1)


def block(model: Any, layer: int, x: Tensor, queries: list[int], among: Any, order: list[tuple], own: bool) -> Tensor:
    """The block of a llama for some of the tokens x, query by query; among(q): the keys that query q sees."""
    module, difference = model.model.layers[layer], model.memory.difference

    def linear(name: str, value: Tensor) -> Tensor:
        weight = module.get_submodule(name).weight.T
        key = name.replace(".", "-")
        return value @ (weight + difference[key][layer] if own and key in difference else weight)

    places = torch.tensor([[at for _, _, at in order]])
    cos, sin = (t.double()[0] for t in model.model.rotary_emb(x, places))

    def turned(t: Tensor, at: int) -> Tensor:
        half = t.shape[-1] // 2
        return t * cos[at] + torch.cat([-t[..., half:], t[..., :half]], -1) * sin[at]

    normed, out = module.input_layernorm(x), []
    for q in queries:
        query = turned(linear("self_attn.q_proj", normed[:, q]).unflatten(-1, (4, 8)), q)
        keys, values = [], []
        for k in among(q):
            keys.append(turned(linear("self_attn.k_proj", normed[:, k]).unflatten(-1, (2, 8)), k))
            values.append(linear("self_attn.v_proj", normed[:, k]).unflatten(-1, (2, 8)))
        heads = [
            torch.einsum(
                "bn,nbe->be",
                torch.stack([(query[:, h] * key[:, h // 2]).sum(-1) / 8**0.5 for key in keys], -1).softmax(-1),
                torch.stack([value[:, h // 2] for value in values]),
            )
            for h in range(4)
        ]
        y = x[:, q] + linear("self_attn.o_proj", torch.cat(heads, -1))
        n = module.post_attention_layernorm(y)
        gated = nn.functional.silu(linear("mlp.gate_proj", n)) * linear("mlp.up_proj", n)
        out.append(y + linear("mlp.down_proj", gated))
    return torch.stack(out, 1)


def naive(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits, segment by segment, as the card says it."""
    variant, logits = options.get("variant", "plain"), []
    for part in ids.split(SEGMENT, dim=1):
        order = slots(part.shape[1], options)
        x = inputs(model, part, order)
        text = [i for i, slot in enumerate(order) if slot[0] == "text"]
        memory = [i for i, slot in enumerate(order) if slot[0] != "text"]

        def among(q: int, order: list[tuple] = order) -> list[int]:
            return [k for k in range(len(order)) if sees(order[q], order[k], order)]

        def only_memory(q: int, memory: list[int] = memory, among: Any = among) -> list[int]:
            return [k for k in among(q) if k in memory]

        for layer in range(2):
            if variant == "plain":
                x = block(model, layer, x, list(range(len(order))), among, order, own=False)
                continue
            updated = x.index_copy(1, torch.tensor(memory), block(model, layer, x, memory, among, order, own=True))
            source = updated if options.get("order", "memory_first") == "memory_first" else x
            seen = only_memory if variant == "bottleneck" else among
            new = block(model, layer, source, text, seen, order, own=False)
            x = updated.index_copy(1, torch.tensor(text), new)
        logits.append(model.lm_head(model.model.norm(x[:, text])))
    return torch.cat(logits, dim=1)


SETTINGS = {
    "front": {},
    "groups": {"every": 3},
    "shifted groups": {"every": 3, "shift_positions": True},
    "controller": {"every": 3, "variant": "controller"},
    "parallel": {"every": 3, "variant": "controller", "order": "parallel"},
    "shared": {"every": 3, "variant": "controller", "share_controller": True},
    "bottleneck": {"every": 3, "variant": "bottleneck"},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_values_and_gradients_equal_loops_over_queries(options):
    model, ids = attached(**options), random_ids(2, SEGMENT + 5)
    got = []
    for logits in (lambda: model(ids, use_cache=False).logits, lambda: naive(model, ids, **options)):
        model.zero_grad(set_to_none=True)
        out = logits()
        assert out.shape == (*ids.shape, 61)
        out.square().mean().backward()
        got.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(got[0][0], got[1][0], rtol=0, atol=1e-10)
    for name, grad in got[1][1].items():
        torch.testing.assert_close(got[0][1][name], grad, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert got[0][1]["memory.first_tokens"].abs().amax(-1).min() > 0


@pytest.mark.parametrize("host", ["gpt2", "opt", "gpt_neox"])
def test_in_front_it_is_the_host_on_the_joined_input(host):
    """With positions of their own memory tokens are an ordinary prefix that sees itself both ways."""
    model, ids = attached(host, num_tokens=3, shift_positions=True), random_ids(2, SEGMENT)
    plain: Any = tiny_host(host).to(torch.float64)
    with torch.no_grad():
        embeds = torch.cat([model.memory.first_tokens.expand(2, -1, -1), plain.get_input_embeddings()(ids)], dim=1)
        seen = torch.ones(11, 11, dtype=torch.bool).tril()
        seen[:3, :3] = True
        mask, places = seen.expand(2, 1, -1, -1), torch.arange(11).expand(2, -1)
        expected = plain(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected[:, 3:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("host", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("every", [None, 3])
def test_tied_and_parallel_the_controller_is_the_plain_variant(host, every):
    ids, logits = random_ids(2, 2 * SEGMENT + 3), []
    for options in ({}, {"variant": "controller", "order": "parallel", "share_controller": True}):
        with torch.no_grad():
            logits.append(attached(host, every=every, **options)(ids, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-12 if host == "llama" else 1e-6)


def test_the_order_of_updates_and_the_weights_matter():
    ids, found = random_ids(1, SEGMENT), []
    for options in (
        {"variant": "controller"},
        {"variant": "controller", "order": "parallel"},
        {"variant": "controller", "share_controller": True},
        {"variant": "bottleneck"},
    ):
        with torch.no_grad():
            found.append(attached(every=3, **options)(ids).logits)
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:i])


@pytest.mark.parametrize("variant", ["plain", "controller", "bottleneck"])
@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_without_memory_tokens_it_is_the_host(host, variant):
    model, ids = attached(host, num_tokens=0, every=3, variant=variant), random_ids(2, SEGMENT)
    plain: Any = tiny_host(host).to(torch.float64)
    assert model.memory.identity_at_attach
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)


def test_memory_tokens_start_apart_and_look_like_token_embeddings():
    host = tiny_host()
    torch.manual_seed(0)
    first = mnemic.attach(host, "memory-transformer", segment=SEGMENT, num_tokens=40).memory.first_tokens.detach()
    assert float(first.std()) == pytest.approx(float(host.get_input_embeddings().weight.detach().std()), rel=0.1)
    assert torch.pdist(first).min() > 0.1


@pytest.mark.parametrize("streamed", [False, True], ids=["one call", "two calls"])
def test_the_bottleneck_costs_memory_linear_in_the_tokens(streamed):
    """One group in the middle, 16 vectors: twice the tokens, twice the bytes, so nothing has T x T entries."""
    peaks = []
    for tokens in (4096, 8192):
        host = tiny_host(max_position_embeddings=8200)
        options = {"num_tokens": 16, "every": tokens // 2, "variant": "bottleneck"}
        model = mnemic.attach(host, "memory-transformer", segment=tokens, **options)
        ids = random_ids(1, tokens)
        with torch.no_grad(), LiveBytes() as counter:
            cache = model(ids[:, : tokens // 4], use_cache=True).past_key_values if streamed else None
            rest = ids[:, tokens // 4 :] if streamed else ids
            model(rest, past_key_values=cache, use_cache=streamed, logits_to_keep=1)
        peaks.append(counter.peak)
    assert peaks[1] / peaks[0] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": SEGMENT}, "every = 8, expected less than the segment of 8"),
        ({"every": 0}, "every"),
        ({"num_tokens": -1}, "num_tokens"),
        ({"variant": "encoder"}, "variant"),
        ({"order": "text_first"}, "order"),
        ({"num_tokens": 60, "every": 2, "shift_positions": True}, "needs 188 positions"),
    ],
)
def test_unusable_settings_are_refused(options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message):
        mnemic.attach(host, "memory-transformer", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_the_usual_segment_leaves_room_for_memory_that_takes_positions():
    model = mnemic.attach(tiny_host(), "memory-transformer", num_tokens=3, every=10, shift_positions=True)
    layout = model.mnemic.layout
    assert layout.positions <= 128 < layout.positions + 4


def test_it_cannot_stand_beside_other_memory_tokens_or_give_up_its_attention():
    host = tiny_host()
    bottleneck = mnemic.memory_config("memory-transformer", every=3, variant="bottleneck")
    with pytest.raises(ConfigError, match="memory tokens around the segment"):
        mnemic.attach(host, [bottleneck, "rmt"], segment=SEGMENT)
    with pytest.raises(ConfigError, match="takes the site 'attention'"):
        mnemic.attach(host, [bottleneck, "memorizing-transformers"], segment=SEGMENT)


@pytest.mark.parametrize("variant", ["plain", "controller"])
def test_in_a_stack(variant):
    """Beside a memory without parameters' effect (LM2 at its identity) nothing changes."""
    ids, config = random_ids(2, 2 * SEGMENT + 3), {"num_tokens": 2, "every": 3, "variant": variant}
    alone, both = (
        mnemic.attach(tiny_host(), memories, segment=SEGMENT)
        for memories in (
            mnemic.memory_config("memory-transformer", **config),
            [mnemic.memory_config("lm2", "attach", num_slots=4), mnemic.memory_config("memory-transformer", **config)],
        )
    )
    with torch.no_grad():
        both.memory.parts["memory-transformer"].load_state_dict(alone.memory.state_dict())
        torch.testing.assert_close(both(ids).logits, alone(ids).logits, rtol=0, atol=1e-6)


REVERSED = 16


def reversal_accuracy(num_tokens: int, steps: int) -> float:
    """16 random symbols of 8, then the same from the last to the first; one group stands between, all else is hidden.

    2 layers of width 64, AdamW 3e-3 with warm-up, batch 32; accuracy over the second half on 512 new rows.
    """
    torch.manual_seed(0)
    config = host_config(
        "llama", vocab_size=16, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4,
        initializer_range=0.04,
    )  # fmt: skip
    options = {"num_tokens": num_tokens, "every": REVERSED, "variant": "bottleneck", "share_controller": True}
    model = mnemic.attach(config, "memory-transformer", segment=2 * REVERSED, **options).train()
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        told = torch.randint(3, 11, (rows, REVERSED), generator=generator)
        # The second half asks by position: its own tokens say nothing.
        ids = torch.cat([told, torch.full_like(told, 11)], dim=1)
        return ids, told.flip(1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * (1 - 0.9 * s / steps))
    for _ in range(steps):
        ids, answer = batch(32)
        logits = model(ids, use_cache=False).logits[:, REVERSED:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ids, answer = batch(512)
    with torch.no_grad():
        best = model.eval()(ids, use_cache=False).logits[:, REVERSED:].argmax(-1)
    return float((best == answer).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reversal_through_the_bottleneck_needs_slots():
    wide, narrow = (reversal_accuracy(m, 300) for m in (8, 1))
    print(f"reversal through 8 slots {wide:.3f}, through 1 {narrow:.3f}")
    assert wide > 0.9
    assert wide - narrow > 0.2
