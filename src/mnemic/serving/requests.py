"""What the engine is asked for, and what it answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..core.errors import ConfigError
from ..hosts.stream import Stream
from .errors import InvalidRequest

MAX_TOP = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 512
_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    temperature: 0 for the likeliest token. top_p, top_k: only the likeliest tokens that together have probability
    top_p, and only so many (0 for all); both after temperature, top_k first. seed: the same tokens each time.
    max_tokens: 0 to read only. stop: strings that end the text and are not part of it. logprobs: None, or how many of
    the likeliest tokens to report beside the chosen one's log-probability. logit_bias: token id -> added to its logit.
    presence_penalty, frequency_penalty: taken off the logit of a token made before in this answer, once and per time.

    Raises:
        InvalidRequest: a value of the wrong kind or out of range; `param` names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 256
    stop: Sequence[str] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InvalidRequest("top_p = 0, expected more than 0 and at most 1.", param="top_p")
        _integer("top_k", self.top_k, 0)
        _integer("max_tokens", self.max_tokens, 0)
        if self.seed is not None:
            _integer("seed", self.seed, -_SEEDS, _SEEDS - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_TOP)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
            raise InvalidRequest("stop: expected strings that are not empty.", param="stop")
        if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in stops):
            raise InvalidRequest(
                f"stop: expected at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters.", param="stop"
            )
        object.__setattr__(self, "stop", tuple(stops))
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest("logit_bias: expected an object of token ids and numbers.", param="logit_bias")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _number("logit_bias", bias, -100, 100)


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One request.

    prompt: token ids to read, (n,); may be empty where the stream has read something. stream: one row to go on from,
    which is left as it is; None for a new one. closing: ids read behind the answer (the end of a chat turn); where the
    answer's last token is the first of them, it is not read twice. tenant: whose turn it takes. deadline: seconds from
    submission.
    """

    prompt: Sequence[int] | Tensor
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: Stream | None = None
    closing: Sequence[int] = ()
    tenant: str = ""
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine takes.

    max_rows: works read side by side. prefill_chunk: prompt tokens that a row reads in one step, by default one segment
    while others make answers, else as many as 512 tokens hold, and never more than these; prefill_tokens: of all rows
    together, padding counted. max_waiting, max_waiting_tokens: works and prompt
    tokens in the queue. max_prompt, max_tokens: of one work. deadline: seconds, for works without their own; None for
    no limit.

    Raises:
        ConfigError: a number out of range.
    """

    max_rows: int = 64
    prefill_chunk: int | None = None
    prefill_tokens: int = 2048
    max_waiting: int = 256
    max_waiting_tokens: int = 4_000_000
    max_prompt: int = 2_000_000
    max_tokens: int = 8192
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"limits: {name} = {value!r}, expected a number above 0.")


@dataclass(frozen=True)
class Progress:
    """So much of the prompt has been read."""

    tokens_read: int
    total: int


@dataclass(frozen=True)
class Token:
    """A token of the answer.

    text: what it adds to the text; empty while characters or stop strings are undecided. logprob: natural logarithm of
    its probability under the host's own distribution; top: the likeliest ids with theirs, likeliest first. Both None
    unless asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class Usage:
    """cached_tokens: read before this work began."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, eq=False)
class Finished:
    """The last event. reason: an end token, a stop string, `max_tokens`, or nothing was to be made. stop: the stop
    string found. stream: one row that has read prompt, answer and closing."""

    reason: Literal["end", "stop", "length", "read"]
    usage: Usage
    stream: Stream
    stop: str | None = None


Event = Progress | Token | Finished


def _number(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise InvalidRequest(f"{name} = {value!r}, expected a number from {low} to {high}.", param=name)


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        expected = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequest(f"{name} = {value!r}, expected an integer {expected}.", param=name)
