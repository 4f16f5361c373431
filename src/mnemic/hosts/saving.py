"""Saving and loading models with memory: small adapters, or everything.

An adapter folder holds `memory.safetensors` (the memory's weights, its config, and which host it belongs to) and,
with PEFT, the LoRA files beside it. A whole folder is the host's own `save_pretrained` with the memory's weights
under `memory.`, and `mnemic.json`. `load` takes either.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..core.errors import FileFormatError, HostError, InputError, StateError
from ..core.files import FORMAT_VERSION, read_file, replace_atomically, write_file
from ..core.registry import config_from_dict
from ..core.state import State
from .attach import attach, base_model, is_attached
from .encoder_step import check_state
from .fingerprint import check_fingerprint, fingerprint
from .kinds import load_host

ADAPTER, HEADER = "memory.safetensors", "mnemic.json"


def save(model: Any, folder: str | os.PathLike, *, whole: bool = False) -> Path:
    """Save an attached model.

    Args:
        whole: the host's weights too; otherwise only the memory (and LoRA), and loading needs the same host.

    Raises:
        HostError: no memory is attached. InputError: the folder cannot be written.
    """
    base = base_model(model)
    if not is_attached(base):
        raise HostError(f"{type(base).__name__} has no memory; save it with save_pretrained.")
    folder = Path(folder)
    is_peft = base is not model
    if whole and is_peft:
        raise HostError("A model under PEFT is saved as an adapter; merge the LoRA weights first to save it whole.")
    if (folder / (ADAPTER if whole else HEADER)).exists():
        kinds = ("an adapter", "a whole model") if whole else ("a whole model", "an adapter")
        raise InputError(f"{folder} holds {kinds[0]}; choose another folder for {kinds[1]}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if whole:
            base.save_pretrained(folder)
        elif is_peft:
            # "auto" would ask the hub whether the vocabulary was resized.
            model.save_pretrained(folder, save_embedding_layers=False)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot write {folder}: {error}. Choose a folder that can be written.") from error
    if not whole:
        write_file(folder / ADAPTER, "adapter", describe(base), dict(base.memory.state_dict()))
    return folder


def load(folder: str | os.PathLike, host: Any = None, *, trainable: bool = False, **options: Any) -> Any:
    """Load what `save` wrote, in one call.

    Args:
        host: for adapters: the host, or where to load it from; by default the name recorded in the adapter.
        trainable: for LoRA: keep training it.
        options: for the host's `from_pretrained` (dtype, device_map, ...).

    Raises:
        FileFormatError: the folder holds neither, or is damaged. HostError: the host cannot be found.
        StateError: the host is another one than the adapter was made on.
    """
    folder = Path(folder)
    if (folder / ADAPTER).is_file() and (folder / HEADER).is_file():
        raise FileFormatError(
            f"{folder} holds an adapter ({ADAPTER}) and a whole model ({HEADER}); move one to a folder of its own."
        )
    if (folder / ADAPTER).is_file():
        return _load_adapter(folder, host, trainable, options)
    if (folder / HEADER).is_file():
        return _load_whole(folder, options)
    raise FileFormatError(f"{folder} holds neither {ADAPTER} nor {HEADER}; expected a folder that mnemic.save wrote.")


def save_state(model: Any, state: State, path: str | os.PathLike) -> None:
    """Write a state alone, without an open segment: what the memory knows, to be handed on or kept.

    Raises:
        HostError: no memory is attached. InputError: the file cannot be written.
    """
    base = base_model(model)
    if not is_attached(base):
        raise HostError(f"{type(base).__name__} has no memory, so no state belongs to it.")
    write_file(path, "state", identity_of(base), dict(state))


def load_state(model: Any, path: str | os.PathLike) -> State:
    """Read what `save_state` wrote; goes into `model(..., memory_state=state)`.

    Raises:
        FileFormatError: the file is damaged or foreign. StateError: it belongs to another memory, host or weights.
    """
    header, tensors = read_file(path, "state")
    base = base_model(model)
    check_owner(base, header, f"The state {path}")
    first = base.memory.initial_state(1)
    state = State({n: t.to(base.device, first[n].dtype if n in first else None) for n, t in tensors.items()})
    check_state(base.memory, state)
    return state


def identity_of(model: Any) -> dict[str, Any]:
    """What the header of a stream or state holds of its model: description and fingerprints, as JSON has them.

    Reading weights from all over the model takes longer than a small stream does. Where the weights do not change
    meanwhile, one identity serves many streams: `Stream.to_bytes`, `Stream.from_bytes`.
    """
    base = base_model(model)
    return json.loads(json.dumps({**describe(base), "memory_fingerprint": fingerprint(base, "memory")}))


def check_owner(base: Any, header: dict[str, Any], what: str, identity: Mapping[str, Any] | None = None) -> None:
    """Raises `StateError` unless a stream or state was written with this model's memory, host and weights.

    identity: the model's, where it is known; see `identity_of`.
    """
    # As the header holds it: JSON has no tuples.
    mine, theirs = json.loads(json.dumps(base.memory.config.to_dict())), header["memory"]
    if theirs != mine:
        differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        detail = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in differing)
        raise StateError(f"{what} was written with another memory ({detail}).")
    if header["segment"] != base.mnemic.layout.segment:
        raise StateError(f"{what} has segments of {header['segment']} tokens, this model {base.mnemic.layout.segment}.")
    host, memory = (
        (None, None) if identity is None else (identity["host"]["fingerprint"], identity["memory_fingerprint"])
    )
    check_fingerprint(base, "host", header["host"]["fingerprint"], what, host)
    check_fingerprint(base, "memory", header["memory_fingerprint"], what, memory)


def describe(base: Any, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What identifies an attached model in the header of a file; weights: see `fingerprint`."""
    return {
        "memory": base.memory.config.to_dict(),
        "segment": base.mnemic.layout.segment,
        "host": {
            "class": base.mnemic.host_class.__name__,
            "name": getattr(base.config, "_name_or_path", "") or "",
            "revision": getattr(base.config, "_commit_hash", None),
            "fingerprint": fingerprint(base, "host", weights),
        },
        "versions": {"transformers": transformers.__version__},
    }


def write_header(base: Any, folder: str | os.PathLike, weights: Mapping[str, Tensor] | None = None) -> None:
    """`mnemic.json`, beside a host saved whole; weights: see `fingerprint`."""
    header = {**describe(base, weights), "kind": "whole", "format_version": FORMAT_VERSION}
    text = json.dumps(header, indent=2)
    replace_atomically(Path(folder) / HEADER, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _load_adapter(folder: Path, host: Any, trainable: bool, options: dict[str, Any]) -> Any:
    header, tensors = read_file(folder / ADAPTER, "adapter")
    known = header["host"]
    if host is None:
        host = known["name"]
        if not host:
            raise HostError(
                f"The adapter {folder} was made on a {known['class']} without a name; pass host=, the model it was "
                "made on."
            )
        options = {"revision": known["revision"], **options} if known["revision"] else options
    if isinstance(host, str | os.PathLike):
        try:
            host = load_host(host, **options)
        except (OSError, ValueError) as error:
            raise HostError(f"The adapter {folder} needs the host {host!r}, which cannot be loaded: {error}") from error
    check_fingerprint(base_model(host), "host", known["fingerprint"], f"The adapter {folder}")
    model = attach(host, config_from_dict(header["memory"]), segment=header["segment"])
    _fill(model, tensors, folder)
    if (folder / "adapter_config.json").is_file():
        import peft

        flags = [p.requires_grad for p in model.memory.parameters()]
        model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        for parameter, flag in zip(base_model(model).memory.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return model


def _load_whole(folder: Path, options: dict[str, Any]) -> Any:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        config, segment = config_from_dict(header["memory"]), header["segment"]
        version = int(header["format_version"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{folder / HEADER} is damaged ({error}); restore it from a copy.") from error
    if version > FORMAT_VERSION:
        raise FileFormatError(f"{folder} has format version {version}; this release reads up to {FORMAT_VERSION}.")
    level = transformers_logging.get_verbosity()
    # The memory's weights in the host's file are expected here; transformers would report them as left over.
    transformers_logging.set_verbosity_error()
    try:
        host = load_host(folder, **options)
    except Exception as error:
        raise FileFormatError(f"{folder} holds no complete host: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    model = attach(host, config, segment=segment)
    _fill(model, _memory_tensors(folder), folder)
    return model


def _memory_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if n.startswith("memory.")]  # noqa: SIM118 - not a dict
            found.update({n.removeprefix("memory."): file.get_tensor(n) for n in names})
    return found


def _fill(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        base_model(model).memory.load_state_dict(tensors)
    except RuntimeError as error:
        raise StateError(f"The weights in {folder} do not fit the memory that its config describes: {error}") from error
