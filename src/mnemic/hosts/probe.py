"""Probes: what a host claims is tried on a few tokens before anything relies on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import HostError
from ..core.memory import Memory, MemoryConfig
from ..core.stack import Stack
from ..ops.rotary import unrotate
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
    memory, name = model.memory, model.mnemic.host_class.__name__
    inside = memory.sites & {"attention", "residual", "feed_forward"}
    writes = memory.num_write_tokens > 0 or memory.keeps_hidden
    if not inside and not writes:
        return
    segment = model.mnemic.layout.segment
    ids = _ids(model, segment if memory.whole_segments else min(_TOKENS, segment))
    with evaluating(model), torch.no_grad():
        reached, hidden = model._reach(ids)
        if (memory.uses("attention") or memory.uses("keys_values")) and memory.host.rotary:
            _check_rotation(model)
    if writes and hidden is None:
        raise HostError(
            f"{name} does not hand keyword arguments down to the module that runs its layers, so memories at the site "
            "'tokens' cannot read what was written. A sliding window ('window') works."
        )
    wanted = {"attention" if s == "residual" else s for s in inside}
    if memory.uses("attention") or memory.uses("keys_values"):
        wanted.add("function")
    replaced = {i for s, i in memory.claims if s == "attention" and memory.uses("mixer")}
    for what in sorted(wanted):
        missing = sorted(
            i for i in memory.layers if (what, i) not in reached and (what != "function" or i not in replaced)
        )
        if missing and not isinstance(memory, Stack):
            raise HostError(
                f"{name} does not reach the {'attention' if what == 'function' else what} site of its layers "
                f"{missing}: it calls its parts in a way of its own. Memories at the site 'tokens' (rmt) may work."
            )


def _check_rotation(model: "MemoryHost") -> None:
    """Keys must come out free of position when their rotation is undone.

    Raises:
        HostError: the host rotates in another way.
    """
    access, memory = model.mnemic.access, model.memory
    places = torch.arange(5, device=memory.host.device)[None]
    hidden = torch.linspace(-1, 1, 5 * memory.host.hidden_size, device=memory.host.device, dtype=memory.host.dtype)
    hidden = hidden.view(1, 5, -1)
    for layer in memory.layers:
        free, turned, rotation = access.project(hidden, layer)[0], access.project(hidden, layer, places)[0], None
        rotation = access.rotary(places, layer)
        if rotation is None or not torch.allclose(unrotate(turned, *rotation), free, atol=1e-2, rtol=1e-2):
            raise HostError(
                f"{model.mnemic.host_class.__name__} rotates keys in a way that cannot be undone from outside (its "
                "halves are not paired, or its angles move with the length), which memories of keys and values need. "
                "Memories at the sites 'tokens' and 'residual' (rmt, lm2) work."
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
