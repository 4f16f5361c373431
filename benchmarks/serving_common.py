"""What the parts of the serving benchmark share."""

import argparse
import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch

import mnemic
from benchmarks.host import plain_llama
from mnemic.serving.engine import Engine
from mnemic.serving.requests import Token, Work

VOCABULARY = 512
OPTIONS: dict[str, dict[str, Any]] = {"lm2": {"num_slots": 16}, "rmt": {"num_tokens": 8}, "armt": {"num_tokens": 8}}


def plain_host(arguments: argparse.Namespace) -> Any:
    return plain_llama(arguments.width, arguments.layers, vocabulary=VOCABULARY).eval()


def build(arguments: argparse.Namespace) -> Any:
    options = OPTIONS.get(arguments.memory, {})
    return mnemic.attach(
        plain_host(arguments), arguments.memory, segment=arguments.segment, preset="default", **options
    )


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def prompt_of(arguments: argparse.Namespace, seed: int) -> torch.Tensor:
    """Of some tokens more than the shortest."""
    return ids(arguments.prompt + seed % 17, seed)


async def follow(engine: Engine, work: Work) -> tuple[list[float], Any]:
    """Seconds from submission to each token; and the last event."""
    began, times, event = time.perf_counter(), [], None
    async with engine.submit(work) as answer:
        async for event in answer:
            if isinstance(event, Token):
                times.append(time.perf_counter() - began)
    return times, event


def waits(answers: list[list[float]]) -> dict[str, float]:
    """Seconds until each token of each answer -> until the first ones, and between tokens."""
    firsts = [times[0] for times in answers]
    gaps = [b - a for times in answers for a, b in pairwise(times)]
    return {
        "first_token_p50": quantile(firsts, 0.5),
        "first_token_p95": quantile(firsts, 0.95),
        "gap_p50": quantile(gaps, 0.5),
        "gap_p95": quantile(gaps, 0.95),
        "gap_max": max(gaps),
    }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {name: spread([one[name] for one in rounds]) for name in rounds[0]}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 5), "least": round(min(values), 5), "most": round(max(values), 5),
    }  # fmt: skip


def median(values: list[float]) -> dict[str, float]:
    """The median and its 95% interval from the order of the values, which supposes nothing of how they are spread."""
    ordered, n = sorted(values), len(values)
    # Of n values, as many as this below the median or fewer have a chance of at most 2.5%.
    low, chance = 0, 0.5**n
    while (chance := chance + math.comb(n, low + 1) * 0.5**n) <= 0.025:
        low += 1
    return {
        "median": round(statistics.median(ordered), 5), "low": round(ordered[low], 5),
        "high": round(ordered[n - 1 - low], 5), "values": n,
    }  # fmt: skip
