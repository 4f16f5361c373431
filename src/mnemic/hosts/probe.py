"""Probes: what a host claims is tried on a few tokens before anything relies on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import HostError
from ..core.memory import Memory, MemoryConfig
from .anatomy import Anatomy, token_embeddings

if TYPE_CHECKING:
    from .host import MemoryHost

_TOKENS = 7


class _Nothing(Memory):
    """Reads and writes nothing: what remains is the segment loop and its cache."""

    name = "nothing"


def check_host(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Rows at different places, fed in chunks through the segment loop, must get the logits of a plain forward.

    Raises:
        HostError: the host fails or gives other numbers.
    """
    from .anatomy import host_spec
    from .attach import detach, install

    name = type(model).__name__
    ids = _ids(model)
    try:
        with evaluating(model), torch.no_grad():
            expected = model(ids, use_cache=False).logits[:, -1]
            install(model, _Nothing(MemoryConfig(), host_spec(model)), anatomy, _TOKENS + 1)
            try:
                got = _ragged(model, ids)  # pyright: ignore[reportArgumentType]
            finally:
                detach(model)
    except HostError:
        raise
    except Exception as error:
        raise HostError(
            f"{name} cannot run segments with rows at different places ({type(error).__name__}: {error}). Hosts whose "
            "attention takes 4-D masks, position ids and a custom cache work."
        ) from error
    error = float((got - expected).abs().max())
    scale = float(expected.abs().max())
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= tolerance * max(scale, 1.0):
        raise HostError(
            f"{name} does not honour masks, positions or the cache it is given: its logits differ by {error:.2g} from "
            "a plain forward when rows are read in chunks. Memories need a host that does."
        )


def check_memory(model: "MemoryHost") -> None:
    """The memory's hooks must be reached, in every layer that it uses.

    Raises:
        HostError: the host does not hand keyword arguments down to where they are needed.
    """
    missing, writes = set(model.memory.layers), model.memory.num_write_tokens > 0
    if not missing and not writes:
        return
    with evaluating(model), torch.no_grad():
        segment = model.mnemic.layout.segment
        ids = _ids(model, segment if model.memory.whole_segments else min(_TOKENS, segment))
        reads = model.memory.prepare(model.memory.initial_state(ids.shape[0]))
        _, trace, hidden = model._segment_step(ids, reads, None, None, None, 1)
    if writes and hidden is None:
        raise HostError(
            f"{model.mnemic.host_class.__name__} does not hand keyword arguments down to the module that runs its "
            "layers, so memories at the site 'tokens' cannot read what was written. A sliding window ('window') works."
        )
    missing -= set(trace)
    if missing:
        raise HostError(
            f"{model.mnemic.host_class.__name__} does not hand keyword arguments down to the attention of its layers "
            f"{sorted(missing)}, so the residual site cannot be reached. Memories at the site 'tokens' (rmt) may work."
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in (a part may be frozen in another)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _ragged(model: Any, ids: Tensor) -> Tensor:
    """Row 0 in chunks of 3 and 4 tokens, row 1 in chunks of 5 and 2, both left-padded: last logits (2, V)."""
    cache, logits = None, None
    for first, second in (((0, 3), (0, 5)), ((3, 7), (5, 7))):
        width = max(first[1] - first[0], second[1] - second[0])
        tokens, mask = torch.zeros_like(ids[:, :width]), torch.zeros_like(ids[:, :width])
        for row, (start, stop) in enumerate((first, second)):
            tokens[row, width - (stop - start) :] = ids[row, start:stop]
            mask[row, width - (stop - start) :] = 1
        output = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1]
    assert logits is not None
    return logits


def _ids(model: PreTrainedModel, tokens: int = _TOKENS) -> Tensor:
    embeddings = token_embeddings(model)
    size = embeddings.shape[0]
    ids = torch.arange(2 * tokens).view(2, tokens) * 31 % max(size - 5, 1) + min(3, size - 1)
    return (ids % size).to(embeddings.device)
