"""Fields that both kinds of request have, as the OpenAI interface names them."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidRequest
from ..requests import SamplingParams

SEED_STEP = 0x9E3779B97F4A7C15
_SEEDS = 2**63
_LONGEST_ID = 12


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Field(description="No effect.")] = None


class Fields(BaseModel):
    """Only what is listed is taken: what has no effect is said to have none."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    metadata: Annotated[
        dict[str, str] | None, Field(description="`session`: the session to go on with, as the header X-Session-Id.")
    ] = None
    return_token_ids: Annotated[bool | None, Field(description="Add `token_ids` to each choice.")] = None
    user: Annotated[str | None, Field(description="No effect.")] = None

    def sampling(self, most: int, **given: Any) -> SamplingParams:
        """most: tokens that the server makes in one answer. Raises `InvalidRequest`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream = true.", param="stream_options")
        names = ("temperature", "top_p", "top_k", "seed", "max_tokens", "presence_penalty", "frequency_penalty")
        values = {name: getattr(self, name) for name in names}
        values |= {"logit_bias": self._biases(), **given}
        if values["max_tokens"] is None:
            values["max_tokens"] = min(SamplingParams.max_tokens, most)
        sampling = SamplingParams(**{name: value for name, value in values.items() if value is not None})
        if sampling.max_tokens == 0:
            raise InvalidRequest("max_tokens = 0, expected at least 1.", param="max_tokens")
        return sampling

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def choices(self, most: int) -> int:
        """Raises `InvalidRequest`."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= most:
            raise InvalidRequest(f"n = {count}, expected an integer from 1 to {most}.", param="n")
        return count

    def asked(self) -> Any:
        """What the user wrote, for a log that holds it."""
        raise NotImplementedError

    def session(self, header: str | None) -> str | None:
        """The session named by the header or the metadata. Raises `InvalidRequest` where they differ."""
        named = (self.metadata or {}).get("session")
        if named is not None and header is not None and named != header:
            raise InvalidRequest(
                "metadata.session and the header X-Session-Id name different sessions.", param="metadata"
            )
        return header if named is None else named

    def _biases(self) -> dict[int, float]:
        biases = self.logit_bias or {}
        for token in biases:
            if not (token.isascii() and token.isdigit() and len(token) <= _LONGEST_ID):
                raise InvalidRequest(f"logit_bias: {token[:40]!r} is no token id.", param="logit_bias")
        return {int(token): bias for token, bias in biases.items()}


def seeded(seed: int | None, choice: int) -> int | None:
    """Another seed for each choice; the first has the one given."""
    if seed is None:
        return None
    return (seed + choice * SEED_STEP + _SEEDS) % (2 * _SEEDS) - _SEEDS
