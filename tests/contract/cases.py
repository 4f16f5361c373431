"""What the contract is checked on: every registered memory, in the settings that change how it runs, on tiny hosts.

A memory that is registered tomorrow is checked tomorrow, with its default settings; settings worth more than that go
into `VARIANTS`.
"""

import importlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mnemic
from mnemic.core.registry import memory_class
from mnemic.core.state import State
from tests.tiny import HOSTS, random_ids, tiny_host

SEGMENT = 8
LENGTH = 29
"""Tokens of the usual sequence: three complete segments and an open one."""
CHUNKINGS = {"single": [1] * LENGTH, "random": [5, 1, 9, 8, 6], "whole": [LENGTH], "border": [16, 13]}


@dataclass(frozen=True)
class Case:
    """A memory with settings; its id is what `pytest -k` sees. usual: checked on its usual hosts by default.

    hosts: those it can be attached to, where not all of `HOSTS`.
    """

    id: str
    memory: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    usual: bool = True
    hosts: tuple[str, ...] = tuple(HOSTS)

    @property
    def kind(self) -> str:
        """What outlives a segment: a state ("segmented"), what is kept in the cache ("continuous"), or nothing."""
        memory = attached(self).memory
        if memory.continuous:
            return "continuous"
        return "segmented" if len(memory.initial_state(1)) else "stateless"

    @property
    def segmented(self) -> bool:
        return self.kind == "segmented"

    @property
    def every(self) -> int:
        """Tokens between two commits."""
        return self.options.get("update_every") or SEGMENT

    def skip_unless(self, *kinds: str) -> None:
        if self.kind not in kinds:
            pytest.skip(f"is {self.kind}")

    def needs(self, rule: str) -> None:
        """Skip where the memory declares that it does not hold a rule of the contract."""
        reason = attached(self).memory.limits.get(rule)
        if reason is not None:
            pytest.skip(f"{rule}: {reason}")

    def attach(self, host: Any, segment: int = SEGMENT) -> Any:
        if self.memory == "stack":
            return mnemic.attach(
                host, [mnemic.memory_config(n, **o) for n, o in self.options["memories"]], segment=segment
            )
        return mnemic.attach(host, self.memory, segment=segment, **self.options)


EXCLUDED = {"lm2-reference": "needs segment = slots = width, and its released code leaks within a chunk: no streaming"}
FIRST = ("lm2", "none", "rmt", "window")
"""Memories whose first case is checked on all hosts by default; the others on three."""
FEW_HOSTS = ("llama", "gpt2", "gemma2")
WITH_SLOW = True
"""Whether slow pairs are there at all; six in seven are slow, and pytest takes long to make and drop them."""


def _first(name: str) -> tuple[str, dict[str, Any]]:
    settings = importlib.import_module(f"tests.contract.variants.{name.replace('-', '_')}")
    return name, next(iter(settings.VARIANTS.values()))


STACKS = {
    "stack_lm2_memorizing_pkm": [_first("lm2"), _first("memorizing-transformers"), _first("pkm")],
    "stack_armt_memory_decoder": [_first("armt"), _first("memory-decoder")],
}


def _cases() -> list[Case]:
    """Every memory in the settings of `variants/<name>.py`: VARIANTS, id -> options, and HOSTS where not all, for every
    variant or by its id."""
    found = []
    for name in mnemic.memory_names():
        if name in EXCLUDED or "decoder" not in memory_class(name).hosts:
            continue
        try:
            settings: Any = importlib.import_module(f"tests.contract.variants.{name.replace('-', '_')}")
        except ModuleNotFoundError as error:
            if error.name != f"tests.contract.variants.{name.replace('-', '_')}":
                raise
            settings = None
        variants = getattr(settings, "VARIANTS", {name.replace("-", "_"): {}})
        given = getattr(settings, "HOSTS", tuple(HOSTS))
        hosts = given if isinstance(given, dict) else dict.fromkeys(variants, given)
        found += [
            Case(id, name, options, i == 0, hosts.get(id, tuple(HOSTS)))
            for i, (id, options) in enumerate(variants.items())
        ]
    for id, parts in STACKS.items():
        hosts = [c.hosts for c in found if (c.memory, c.options) in parts]
        shared = tuple(h for h in HOSTS if all(h in some for some in hosts))
        found.append(Case(id, "stack", {"memories": parts}, True, shared))
    return found


CASES = _cases()


def case(id: str) -> Case:
    return next(c for c in CASES if c.id == id)


def pairs(
    cases: list[Case] = CASES, hosts: tuple[str, ...] = tuple(HOSTS), usual_hosts: tuple[str, ...] = tuple(HOSTS)
) -> Any:
    """Parametrises (case, host). By default run: the first case of a memory on `usual_hosts` (of the later systems on
    three of them), the other cases of the first systems on llama, and those of the later ones there for tests that name
    no hosts. The rest is slow."""
    params, central = [], hosts == usual_hosts == tuple(HOSTS)
    for c in cases:
        first = c.memory in FIRST
        others = ("llama",) * (first or central)
        usual = (usual_hosts if first else FEW_HOSTS) if c.usual else others
        for host in hosts:
            if host in c.hosts:
                slow = host not in usual or (c.usual and host not in usual_hosts)
                if WITH_SLOW or not slow:
                    params.append(pytest.param(c, host, id=f"{c.id}-{host}", marks=pytest.mark.slow if slow else ()))
    return pytest.mark.parametrize("case, host", params)


def build(case: Case, host: str = "llama", *, noise: float = 0.2, segment: int = SEGMENT, **changes: Any) -> Any:
    """A fresh attached model; noise on the memory's weights, so that no part of it is hidden by a zero."""
    torch.manual_seed(2)
    model = case.attach(tiny_host(host, **changes), segment)
    if noise:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.memory.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


@lru_cache(maxsize=256)
def _built(id: str, host: str) -> Any:
    return build(case(id), host)


def attached(case: Case, host: str = "llama") -> Any:
    """A model shared by tests that only read it."""
    return _built(case.id, host)


def declares(case: Case) -> Any:
    """The case's memory, with the abilities it declares."""
    return attached(case).memory


def unused_parameters(model: Any) -> set[str]:
    """Names of the host's weights that a memory stands in the place of."""
    replaced = {id(p) for p, _ in model.mnemic.replaced}
    return {name for name, p in model.named_parameters() if id(p) in replaced}


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


def trimmed(state: Any, like: Any) -> State:
    """`state` without the room that the longest row of its batch gave to an archive that grows."""
    extra = [t[:, like[n].shape[1] :] for n, t in state.items() if n == "archive"]
    assert not any(bool(t.any()) for t in extra)
    return State({n: t[:, : like[n].shape[1]] if n == "archive" else t for n, t in state.items()})


def assert_states_close(got: Any, expected: Any, atol: float = 1e-4) -> None:
    """atol: for associative matrices, whose entries nothing bounds, at entries up to 1; rounding grows with them. So
    too where entries are beyond 100: a gate may double slots at each write."""
    assert set(got) == set(expected)
    got = trimmed(got, expected)
    for name, tensor in expected.items():
        largest = float(tensor.detach().float().abs().max()) if tensor.numel() else 0.0
        unbounded = name.endswith(("matrix", "normaliser")) or largest > 100
        within = atol * max(1.0, largest) if unbounded else atol
        torch.testing.assert_close(got[name], tensor, atol=within, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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
    "trimmed", "unused_parameters",
]  # fmt: skip
