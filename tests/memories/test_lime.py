"""LIMe: against loops over layers and heads at the hosts' projections, its parameters, what it refuses, the toy."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mnemic
from mnemic import ConfigError, HostError
from mnemic.core.memory import HostSpec
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.step import Frame
from mnemic.ops import depth_routing
from mnemic.training.optimizer import regroup
from tests.memories.recall import recall_accuracy
from tests.tiny import host_config, random_ids, tiny_host

LAYERS, HEADS, WIDTH = 3, 2, 8


def attached(host: str = "llama", double: bool = False, preset: str = "default", **changes: Any) -> Any:
    model = tiny_host(host, num_hidden_layers=LAYERS, **changes)
    torch.manual_seed(1)
    return mnemic.attach(model.double() if double else model, "lime", segment=16, preset=preset)


def alone(**changes: Any) -> Any:
    """The memory without a host, routers random."""
    given: dict[str, Any] = {
        "hidden_size": 32, "num_layers": LAYERS, "embedding_std": 0.02, "dtype": torch.float64,
        "device": torch.device("cpu"), "num_heads": 4, "num_key_value_heads": HEADS, "head_dim": WIDTH,
    }  # fmt: skip
    torch.manual_seed(1)
    return memory_class("lime")(memory_config("lime"), HostSpec(**{**given, **changes}))


def naive_mix(layers: list[Tensor], router: Tensor) -> Tensor:
    """The card's sum for keys or values (B, T, H, e) of layers 0..l, head by head."""
    heads = []
    for g in range(HEADS):
        mixed = torch.zeros_like(layers[0][:, :, g])
        for j, layer in enumerate(layers):
            for other in range(HEADS):
                mixed = mixed + router[g, j * HEADS + other] * layer[:, :, other]
        heads.append(mixed)
    return torch.stack(heads, dim=2)


def naive(host: Any, memory: Any, ids: Tensor, keys: str) -> Tensor:
    """Logits of the plain host, with what its layers' modules `keys` and v_proj give mixed by loops."""
    made: dict[str, list[Tensor]] = {keys: [], "v_proj": []}

    def mix(name: str, i: int, out: Tensor) -> Tensor:
        made[name].append(out.reshape(*out.shape[:2], HEADS, WIDTH))
        return out if i == 0 else naive_mix(made[name], memory.routers[i - 1]).reshape(out.shape)

    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(lambda _, __, out, n=name, i=i: mix(n, i, out))
        for i, layer in enumerate(host.model.layers)
        for name in made
    ]
    try:
        return host(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("host, keys", [("llama", "k_proj"), ("qwen3", "k_norm")])
def test_equals_loops_over_layers_and_heads(host, keys):
    model, ids = attached(host, double=True), random_ids(2, 11)
    plain = tiny_host(host, num_hidden_layers=LAYERS).double()
    got, expected = model(ids, use_cache=False).logits, naive(plain, model.memory, ids, keys)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert float((got - plain(ids, use_cache=False).logits).detach().abs().max()) > 1e-2
    names = [n for n, _ in plain.named_parameters()]
    mine, routers = dict(model.named_parameters()), list(model.memory.routers)
    fast = torch.autograd.grad(got.square().mean(), [*(mine[n] for n in names), *routers])
    slow = torch.autograd.grad(expected.square().mean(), [*plain.parameters(), *routers])
    for name, a, b in zip([*names, *(f"router {i}" for i in range(1, LAYERS))], fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_without_gradients_it_is_the_same():
    model, ids = attached(double=True), random_ids(2, 11)
    with torch.no_grad():
        quick = model(ids, use_cache=False).logits
    torch.testing.assert_close(quick, model(ids, use_cache=False).logits, rtol=0, atol=1e-12)


def test_generation_with_the_cache_is_that_of_full_forwards():
    model, ids = attached(), random_ids(2, 5)
    got = model.generate(ids, max_new_tokens=8, do_sample=False)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            best = model(expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, best[:, None]], dim=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("host", ["llama", "qwen3", "gpt2"])
def test_the_identity_leaves_the_host_as_it_is(host):
    model, plain, ids = attached(host, preset="attach"), tiny_host(host, num_hidden_layers=LAYERS), random_ids(2, 11)
    assert model.memory.identity_at_attach
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
        cache, parts = None, []
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)
    assert not attached(host).memory.identity_at_attach


def test_its_parameters_are_the_cards():
    memory = alone(num_layers=16, num_key_value_heads=32)
    count = sum(p.numel() for p in memory.parameters())
    assert count == depth_routing.num_router_parameters(16, 32) == sum((i + 1) * 32**2 for i in range(1, 16))
    assert 137_000 < count < 139_000
    assert [tuple(r.shape) for r in memory.routers] == [(32, (i + 1) * 32) for i in range(1, 16)]
    narrow = alone(dtype=torch.bfloat16)
    assert all(r.dtype == torch.float32 for r in narrow.routers)


def test_gradients_reach_the_first_layer_from_the_last_router():
    memory, frame = alone(), Frame(None)
    make = torch.Generator().manual_seed(0)
    new = lambda: torch.randn(2, HEADS, 5, WIDTH, generator=make, dtype=torch.float64, requires_grad=True)  # noqa: E731
    made, mixed = [(new(), new()) for _ in range(LAYERS)], (torch.empty(0), torch.empty(0))
    for i, (keys, values) in enumerate(made):
        mixed = memory.keys_values(keys, values, frame.at(i))
    for part in (0, 1):
        (grad,) = torch.autograd.grad(mixed[part].sum(), made[0][part], retain_graph=True)
        # Every number of head g' counts with the sum of its weights in all heads g.
        expected = memory.routers[-1][:, :HEADS].sum(0)[None, :, None, None].expand_as(grad)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_the_first_layer_mixes_nothing():
    memory, keys, values = alone(), *torch.randn(2, 1, HEADS, 4, WIDTH, dtype=torch.float64)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            got = memory.keys_values(keys, values, Frame(None).at(0))
        assert got[0] is keys
        assert got[1] is values


def test_a_stack_with_a_memory_over_time_is_that_memory_at_first():
    ids = random_ids(2, 20)
    with torch.no_grad():
        both, one = (
            _seeded(lambda m=m: mnemic.attach(tiny_host(), m, segment=8))(ids, use_cache=False).logits
            for m in (["rmt", "lime:attach"], "rmt")
        )
    torch.testing.assert_close(both, one, rtol=0, atol=1e-5)


def _seeded(make: Any) -> Any:
    torch.manual_seed(4)
    return make()


def test_what_cannot_be_mixed_is_refused():
    keys = torch.randn(1, HEADS, 4, WIDTH, dtype=torch.float64)
    with pytest.raises(HostError, match="expected 2 keys of width 8, layer 0 of the host makes 2 of width 4"):
        alone().keys_values(keys[..., :4], keys, Frame(None).at(0))
    with pytest.raises(HostError, match="values of width"):
        alone().keys_values(keys, keys[:, :1], Frame(None).at(0))
    with pytest.raises(HostError, match="layer 1 of the host runs before layer 0"):
        alone().keys_values(keys, keys, Frame(None).at(1))
    with pytest.raises(HostError, match="this host has 1"):
        mnemic.attach(tiny_host(num_hidden_layers=1), "lime", segment=8)
    with pytest.raises(ConfigError, match="lime: init = 'zero'"):
        mnemic.attach(tiny_host(), "lime", segment=8, init="zero")


def continued(rows: int, make: torch.Generator, vocabulary: int = 32, half: int = 12) -> tuple[Tensor, Tensor]:
    """Induction: different tokens, then the same again from a random place on; what follows a token is asked.

    Returns: ids and labels (rows, 2 half), labels -100 but in the second half, where the first has the answer.
    """
    first = torch.rand(rows, vocabulary, generator=make).argsort(1)[:, :half]
    places = (torch.arange(half) + torch.randint(half, (rows, 1), generator=make)) % half
    ids = torch.cat([first, first.gather(1, places)], dim=1)
    labels = ids.clone()
    # Nothing tells the first asked token, nor what follows the last token of the first half.
    labels[:, : half + 1] = -100
    labels[:, half:][places == 0] = -100
    return ids, labels


def steps_to_learn(memory: str, seed: int, limit: int, goal: float = 0.9, every: int = 20) -> int:
    """Steps until a fresh model of 4 layers and width 64 answers `goal` of new rows; `limit` if it never does."""
    torch.manual_seed(seed)
    config = host_config(
        "llama", num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_key_value_heads=4, head_dim=16,
        vocab_size=32, initializer_range=0.08,
    )  # fmt: skip
    model = mnemic.attach(AutoModelForCausalLM.from_config(config), memory, segment=24, preset="default").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    regroup(optimizer, model.memory)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    make, asked = torch.Generator().manual_seed(seed), continued(256, torch.Generator().manual_seed(seed + 10_000))
    for step in range(1, limit + 1):
        ids, labels = continued(32, make)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        if step % every == 0 and recall_accuracy(model, *asked) >= goal:
            return step
    return limit


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
def test_routing_needs_fewer_steps_to_learn_induction(seed):
    """With the same host and rows; a run that never gets there counts as its limit, so the ratio is at most this."""
    routed = steps_to_learn("lime", seed, 600)
    plain = steps_to_learn("none", seed, 600)
    print(f"steps to 0.9: {routed} with routing, {plain} without (at most 600), ratio {routed / plain:.2f}")
    assert routed < plain
