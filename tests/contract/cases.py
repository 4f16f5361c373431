"""What the contract is checked on: every registered memory, in the settings that change how it runs, on tiny hosts.

A memory that is registered tomorrow is checked tomorrow, with its default settings; settings worth more than that go
into `VARIANTS`.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mnemic
from mnemic.core import memory_class
from tests.tiny import HOSTS, random_ids, tiny_host

SEGMENT = 8
LENGTH = 29
"""Tokens of the usual sequence: three complete segments and an open one."""
CHUNKINGS = {"single": [1] * LENGTH, "random": [5, 1, 9, 8, 6], "whole": [LENGTH], "border": [16, 13]}


@dataclass(frozen=True)
class Case:
    """A memory with settings; its id is what `pytest -k` sees. usual: checked on all hosts by default."""

    id: str
    memory: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    usual: bool = True

    @property
    def segmented(self) -> bool:
        """Reads a state that earlier segments wrote, and nothing else of them."""
        return self.memory not in ("none", "window")

    @property
    def every(self) -> int:
        """Tokens between two commits."""
        return self.options.get("update_every") or SEGMENT


_LM2 = {"num_slots": 6, "preset": "default"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lm2": {
        "lm2": _LM2,
        "lm2_per_layer": {**_LM2, "memory_scope": "per_layer"},
        "lm2_top_k": {**_LM2, "top_k": 2},
        "lm2_top_k_per_layer": {**_LM2, "top_k": 2, "memory_scope": "per_layer"},
        "lm2_attach": {**_LM2, "preset": "attach"},
        "lm2_paper": {**_LM2, "preset": "paper"},
        "lm2_update_every": {**_LM2, "update_every": 4},
        "lm2_competitive": {**_LM2, "route": "competitive", "top_k": 3, "query_source": "residual", "rank": 8},
        "lm2_one_layer": {**_LM2, "memory_layers": (1,), "init": "learned", "write_scores": "read"},
        "lm2_identity_route": {**_LM2, "num_slots": SEGMENT, "route": "identity"},
    },
    "rmt": {"rmt": {"num_tokens": 3}, "rmt_causal": {"num_tokens": 3, "memory_causal": True}},
}
EXCLUDED = {"lm2-reference": "needs segment = slots = width, and its released code leaks within a chunk: no streaming"}


def _cases() -> list[Case]:
    found = []
    for name in mnemic.memory_names():
        if name not in EXCLUDED:
            variants = VARIANTS.get(name, {name: {}})
            found += [Case(id, name, options, usual=i == 0) for i, (id, options) in enumerate(variants.items())]
    return found


CASES = _cases()


def case(id: str) -> Case:
    return next(c for c in CASES if c.id == id)


def pairs(
    cases: list[Case] = CASES, hosts: tuple[str, ...] = tuple(HOSTS), usual_hosts: tuple[str, ...] = tuple(HOSTS)
) -> Any:
    """Parametrises (case, host). By default run: each memory's first case on `usual_hosts`, the others on two hosts."""
    params = []
    for c in cases:
        for host in hosts:
            usual = host in usual_hosts if c.usual else host in ("llama", "gpt2")
            marks = () if usual else pytest.mark.slow
            params.append(pytest.param(c, host, id=f"{c.id}-{host}", marks=marks))
    return pytest.mark.parametrize("case, host", params)


def build(case: Case, host: str = "llama", *, noise: float = 0.2, segment: int = SEGMENT, **changes: Any) -> Any:
    """A fresh attached model; noise on the memory's weights, so that no part of it is hidden by a zero."""
    model = mnemic.attach(tiny_host(host, **changes), case.memory, segment=segment, **case.options)
    if noise:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.memory.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


@lru_cache(maxsize=256)
def _built(id: str, host: str) -> Any:
    return build(case(id), host)


def attached(case: Case, host: str = "llama") -> Any:
    """A model shared by tests that only read it."""
    return _built(case.id, host)


def declares(case: Case) -> Any:
    """The class of the case's memory, with the abilities it declares."""
    return memory_class(case.memory)


def parallel(model: Any, ids: Tensor, **inputs: Any) -> Any:
    """One call without a cache, as in training."""
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs)


def chunked(model: Any, ids: Tensor, chunks: list[int], mask: Tensor | None = None) -> Any:
    """Several calls with a cache; the logits of all columns and the cache."""
    cache, logits, start = None, [], 0
    with torch.no_grad():
        for size in chunks:
            stop = start + size
            given = None if mask is None else mask[:, :stop]
            output = model(ids[:, start:stop], attention_mask=given, past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, stop
            logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def assert_states_close(got: Any, expected: Any, atol: float = 1e-4) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def checkpointing(model: Any, enabled: bool = True, **options: Any) -> None:
    """Turn activation checkpointing on or off, under the name that this transformers has for it."""
    word = "enable" if enabled else "disable"
    switch = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
        model, f"gradient_checkpointing_{word}"
    )
    switch(*([options] if options else []))


def plain_segments(host: PreTrainedModel, ids: Tensor, segment: int = SEGMENT) -> Tensor:
    """Logits of a host without memory, each segment a fresh context."""
    with torch.no_grad():
        return torch.cat([host(part, use_cache=False).logits for part in ids.split(segment, dim=1)], dim=1)


__all__ = [
    "CASES", "CHUNKINGS", "EXCLUDED", "LENGTH", "SEGMENT", "Case", "assert_states_close", "attached", "build", "case",
    "checkpointing", "chunked", "declares", "pairs", "parallel", "plain_segments", "random_ids",
]  # fmt: skip
