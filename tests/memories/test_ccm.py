"""CCM against the paper's recurrence with the host's own cache, in float64; one masked pass against the recurrence."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import mnemic
from mnemic import ConfigError, HostError
from mnemic.core.memory import HostSpec
from mnemic.memories.recurrent.ccm import CCM, CCMConfig
from mnemic.training.parallel_compression import parallel_forward
from tests.memories.facts import SEGMENT as FACT_SEGMENT
from tests.memories.facts import fact_accuracy, small_model, train_facts
from tests.tiny import random_ids, tiny_host

SEGMENT, COMP = 6, 2


class Rotary(torch.nn.Module):
    """A host's rotary positions in float64; its own are rounded to float32, so that a shift changes them."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.frequencies = frequencies.double()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def exact_host(name: str):
    host = tiny_host(name).double()
    for name, frequencies in host.base_model.named_buffers():
        if name == "rotary_emb.inv_freq":
            host.base_model.rotary_emb = Rotary(frequencies)
            break
    return host


def attached(host: str = "llama", exact: bool = True, **options):
    """CCM on a tiny host, its adapters not at zero."""
    model = exact_host(host) if exact else tiny_host(host)
    torch.manual_seed(1)
    given = {"num_tokens": COMP, "rank": 3, "dropout": 0.0, "capacity": 8, **options}
    model = mnemic.attach(model, "ccm", segment=SEGMENT, **given)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.3)
    return model


class Recurrence:
    """A plain Llama, LoRA on its last n tokens by hooks, and a cache of what the <COMP> tokens left."""

    def __init__(self, memory: CCM):
        self.memory, self.host, self.compressing, self.made = memory, exact_host("llama"), False, {}
        for layer, block in enumerate(self.host.model.layers):
            for name, module in block.self_attn.named_children():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(self.hook(f"self_attn-{name}", layer))

    def hook(self, name: str, layer: int):
        def adapt(_, args, out):
            if self.compressing:
                c = self.memory.config
                delta = args[0] @ self.memory.down[name][layer] @ self.memory.up[name][layer] * c.alpha / c.rank
                is_comp = torch.arange(out.shape[1])[:, None] >= out.shape[1] - COMP
                out = out + is_comp * delta
                heads = out[:, -COMP:].unflatten(-1, (-1, self.host.config.head_dim)).transpose(1, 2)
                self.made[layer, name[-6:]] = heads
            return out

        return adapt

    def cache(self, past: list[dict], places: Tensor) -> DynamicCache:
        cache = DynamicCache()
        for layer in range(self.host.config.num_hidden_layers if past else 0):
            keys, values = (torch.cat([h[layer, n] for h in past], dim=2) for n in ("k_proj", "v_proj"))
            cos, sin = self.host.model.rotary_emb(keys, places[None])
            cache.update(apply_rotary_pos_emb(keys, keys, cos, sin)[1], values, layer)
        return cache

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[dict]]:
        """Logits of all segments, and what each left."""
        c, logits, mean = self.memory.config, [], {}
        left: list[dict] = []
        for t, part in enumerate(ids.split(SEGMENT, dim=1)):
            start = t * SEGMENT
            past, places = left[-c.capacity :], []
            for b in range(max(0, t - c.capacity), t):
                places += [(b + 1) * SEGMENT + i for i in range(COMP)]
            if c.update == "merge":
                past, places = [mean] if t else [], [start + i for i in range(COMP)] if t else []
            places = torch.tensor(places, dtype=torch.long)
            own = torch.arange(start, start + part.shape[1] + COMP)
            embeds = self.host.get_input_embeddings()(part)
            embeds = torch.cat([embeds, self.memory.comp.expand(len(ids), -1, -1)], dim=1)
            given = {"inputs_embeds": embeds, "position_ids": own[None].expand(len(ids), -1), "use_cache": True}
            self.compressing = True
            out = self.host(**given, past_key_values=self.cache(past, places)).logits[:, : part.shape[1]]
            self.compressing = False
            made = dict(self.made)
            if not c.recurrent:
                # Once more, with nothing before it.
                self.compressing = True
                self.host(**given, past_key_values=DynamicCache())
                self.compressing, made = False, dict(self.made)
            logits.append(out)
            left.append(made)
            share = (1 / (t + 1) if c.merge_rate is None else c.merge_rate) if t else 1
            mean = {n: (1 - share) * mean.get(n, 0) + share * h for n, h in made.items()}
        return torch.cat(logits, dim=1), [mean] if c.update == "merge" else left


WAYS = {
    "concat": {},
    "capacity": {"capacity": 2},
    "merge": {"update": "merge"},
    "exponential": {"update": "merge", "merge_rate": 0.5},
    "apart": {"recurrent": False},
    "merge_apart": {"recurrent": False, "update": "merge"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_equals_the_papers_recurrence_forward_and_backward(options):
    model, ids = attached(**options), random_ids(2, 4 * SEGMENT + 2)
    reference = Recurrence(model.memory)
    with torch.no_grad():
        output, (logits, left) = model(ids, use_cache=False), reference(ids)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-10)
    # What is left of the four complete segments, newest last.
    if options.get("update") != "merge":
        for layer in range(2):
            kept = torch.cat([h[layer, "v_proj"] for h in left[:4]], dim=2).transpose(1, 2)
            mine = output.memory_state[f"{layer}/values"]
            number = min(kept.shape[1], mine.shape[1])
            torch.testing.assert_close(mine[:, -number:], kept[:, -number:], rtol=0, atol=1e-10)
    weights = list(model.memory.parameters())
    grads = [
        torch.autograd.grad(f(ids).square().mean(), weights)
        for f in (lambda x: model(x).logits, lambda x: reference(x)[0])
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("host", ["llama", "gpt2", "gemma2"])
def test_one_masked_pass_equals_the_recurrence(host, options):
    model, ids = attached(host, **options), random_ids(2, 5 * SEGMENT + 3)
    labels = ids.clone()
    # Without a recurrence only the last segment of one pass reads with the memory in sight.
    first = 0 if options.get("recurrent", True) else 5 * SEGMENT
    labels[:, : first + 1] = -100
    weights = [p for p in model.parameters() if p.requires_grad]
    found = []
    for way in (model, lambda *a, **k: parallel_forward(model, *a, **k)):
        output = way(ids, labels=labels)
        found.append((output.loss, output.logits[:, first:], torch.autograd.grad(output.loss, weights)))
    # Gemma's eager attention takes its softmax in float32.
    within = 1e-5 if host == "gemma2" else 1e-8
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=within)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=within)
    for mine, theirs in zip(found[1][2], found[0][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=within)


def test_in_float32_too():
    for options in ({}, {"update": "merge"}):
        model, ids = attached(exact=False, **options).float(), random_ids(2, 5 * SEGMENT)
        with torch.no_grad():
            torch.testing.assert_close(parallel_forward(model, ids).logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_text_without_a_memory_is_the_hosts_bit_for_bit(host):
    """Whatever the adapters have become: they act on <COMP> tokens only."""
    model, plain, ids = attached(host), exact_host(host), random_ids(2, SEGMENT - 1)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        # A complete segment has <COMP> tokens behind it, which it does not see.
        whole = random_ids(2, SEGMENT)
        torch.testing.assert_close(model(whole).logits, plain(whole).logits, rtol=0, atol=1e-12)


def test_what_is_merged_is_the_mean_of_what_segments_leave():
    model, ids = attached(update="merge", recurrent=False), random_ids(2, 4 * SEGMENT)
    with torch.no_grad():
        merged = model(ids).memory_state
        alone = [model(part).memory_state for part in ids.split(SEGMENT, dim=1)]
    for name in merged:
        if name != "count":
            torch.testing.assert_close(merged[name], sum(a[name] for a in alone) / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("update, sizes", [("concat", [2, 4, 6, 6]), ("merge", [2, 2, 2, 2])])
def test_slots_in_use_grow_by_n_for_each_segment_or_not_at_all(update, sizes):
    model = attached(update=update, capacity=3)
    with torch.no_grad():
        states = [model(random_ids(2, n * SEGMENT)).memory_state for n in (1, 2, 3, 4)]
    assert [model.memory.prepare(s)["0/keys"].shape[2] for s in states] == sizes
    assert len({s.nbytes for s in states}) == 1


def test_unusable_configurations_are_refused():
    unusable: list[tuple[dict[str, Any], str]] = [
        ({"num_tokens": 0}, "num_tokens"),
        ({"capacity": 0}, "capacity"),
        ({"merge_rate": 0.5}, "merge_rate"),
        ({"update": "merge", "merge_rate": 0.0}, "merge_rate"),
        ({"dropout": 1.5}, "dropout"),
    ]
    for options, message in unusable:
        host = tiny_host()
        with pytest.raises(ConfigError, match=message):
            mnemic.attach(host, "ccm", segment=SEGMENT, **options)
        assert not mnemic.is_attached(host)
    bare = HostSpec(32, 2, 0.02, torch.float32, torch.device("cpu"), linears={"mlp.up_proj": (32, 48)})
    with pytest.raises(HostError, match="part of an attention"):
        CCM(CCMConfig(), bare)


def test_unusable_passes_are_refused():
    model = attached()
    with pytest.raises(mnemic.InputError, match="128 positions"):
        parallel_forward(model, random_ids(1, 129))
    with pytest.raises(mnemic.InputError, match="expected"):
        parallel_forward(model, random_ids(5))
    with pytest.raises(ConfigError, match="ccm"):
        parallel_forward(tiny_host(), random_ids(1, 5))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_six_facts_in_six_segments_are_recalled_by_a_frozen_host():
    """Measured: 1.0 from the full context, 1.0 with 2 slots a segment, 0.11 from the last segment alone."""
    model = small_model()
    train_facts(model, model, steps=1500, lr=2e-3)
    assert fact_accuracy(model) > 0.99
    assert fact_accuracy(model, history=False) < 0.2
    torch.manual_seed(2)
    mnemic.freeze_host(mnemic.attach(model, "ccm", segment=FACT_SEGMENT, num_tokens=2, capacity=8))
    train_facts(model, lambda ids, labels: parallel_forward(model, ids, labels), steps=500, lr=5e-3)
    assert fact_accuracy(model) > 0.9
