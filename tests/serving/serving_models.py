"""Models, tokenizers and short cuts of the serving tests."""

import asyncio
from typing import Any

import torch

import mnemic
from mnemic.serving.engine import Engine
from mnemic.serving.requests import Finished, Limits, SamplingParams, Token, Work
from tests.tiny import tiny_host

SEGMENT = 8
MEMORIES: dict[str, dict[str, Any]] = {
    "lm2": {"preset": "default", "num_slots": 8},
    "rmt": {"num_tokens": 3},
    "window": {},
    "titans": {"head_dim": 8, "chunk": 4},
    "gated-deltanet": {},
    "dmc": {},
}
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def served_model(memory: str = "lm2", host: Any = None, **options: Any) -> Any:
    """In float64, so that sums in another order do not change which token is the likeliest."""
    host = (tiny_host() if host is None else host).double()
    model = mnemic.attach(host, memory, segment=SEGMENT, **{**MEMORIES[memory], **options})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


async def collect(engine: Engine, work: Work) -> tuple[list[Any], Finished]:
    """The events of a work, and the last of them."""
    async with engine.submit(work) as answer:
        events = [event async for event in answer]
    assert isinstance(events[-1], Finished)
    return events, events[-1]


def ids_of(events: list[Any]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def serve(model: Any, talk: Any, tokenizer: Any = None, limits: Limits | None = None, observe: Any = None) -> Any:
    """`await talk(engine)` with an engine that runs meanwhile."""

    async def run() -> Any:
        engine = Engine(model, tokenizer, limits, observe=observe).start()
        try:
            return await asyncio.wait_for(talk(engine), 60)
        finally:
            await engine.stop(drain=False)

    return asyncio.run(run())
