"""What the commands share: settings given on the command line, hosts, tokenizers, tables, quiet libraries."""

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TABLES = {"memory": "memory_options", "host": "host_options", "task": "task_options"}
"""Prefixes of --set keys -> tables of an experiment."""

VOCABULARY = 4096
"""Of a fresh host that no task has given one."""

_BARE = re.compile(r"[A-Za-z_][\w:./+-]*")
_LIKELY_TYPO = 0.8


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` pairs; values are TOML, plain words need no quotes; `memory.x`, `host.x`, `task.x` go to tables.

    Raises:
        ConfigError: no key, no value, a value that is no TOML, or a key given twice.
    """
    from ..core.errors import ConfigError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not re.fullmatch(r"\w+(\.\w+)?", key):
            raise ConfigError(f"--set {pair!r}: expected key=value, such as --set memory.num_slots=32.")
        prefix, dot, name = key.partition(".")
        if dot and prefix not in TABLES:
            raise ConfigError(f"--set {pair!r}: keys begin with {', '.join(f'{t}.' for t in TABLES)} or have no dot.")
        table = found.setdefault(TABLES[prefix], {}) if dot else found
        name = name if dot else key
        if name in table:
            raise ConfigError(f"--set {key} is given twice.")
        table[name] = _value(pair, text)
    return found


def _value(pair: str, text: str) -> Any:
    from ..core.errors import ConfigError

    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if _BARE.fullmatch(text):
            return text
        raise ConfigError(
            f"--set {pair!r}: {text!r} is no TOML value ({error}). Write numbers as 8 or 1e-3, truth as true or "
            "false, lists as [1,2], text in double quotes."
        ) from error
    if set(parsed) != {"value"}:
        raise ConfigError(f"--set {pair!r}: expected one value.")
    return parsed["value"]


def check_output(name: str | Path, output: Path | None) -> None:
    """Raises `InputError` where a command would write beside a model that comes with the package."""
    from ..benchmarks.shipped import is_shipped
    from ..core.errors import InputError

    if output is None and is_shipped(name):
        raise InputError(f"{name} comes with the package, where nothing is written; name a place with --output.")


def words(text: str, what: str) -> tuple[str, ...]:
    """Names separated by commas."""
    from ..core.errors import ConfigError

    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise ConfigError(f"{what} is empty; expected names separated by commas.")
    return found


def numbers(text: str, what: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas."""
    from ..core.errors import ConfigError

    if not all(part.isdigit() and int(part) for part in words(text, what)):
        raise ConfigError(f"{what} {text!r}: expected whole numbers of at least 1 separated by commas, such as 1,2,4.")
    return tuple(int(part) for part in words(text, what))


def quiet() -> None:
    """Keep transformers' warnings and progress bars off the terminal, and rich's progress bars off stdout."""
    import rich
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rich.reconfigure(stderr=True)


def console() -> Any:
    """Tables on stdout, wide enough to be read when they go to a file."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(width=width, highlight=False, markup=False, emoji=False)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Any:
    """An empty table; columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def host_config(name: str, changes: dict[str, Any] | None = None) -> Any:
    """The config of a host: of an architecture (small, with `changes`), or of a folder or a model on the hub.

    Raises:
        UnknownNameError: nearly the name of an architecture. HostError: no config can be loaded.
    """
    from transformers import AutoConfig

    from ..benchmarks.building import SMALL_HOST, architectures
    from ..core.errors import ConfigError, HostError, UnknownNameError

    known = architectures()
    if name in known:
        return AutoConfig.for_model(name, **{**SMALL_HOST, "vocab_size": VOCABULARY, **(changes or {})})
    if not Path(name).is_dir() and difflib.get_close_matches(name, known, cutoff=_LIKELY_TYPO):
        raise UnknownNameError.of("host", name, known)
    if changes:
        raise ConfigError(f"host.{min(changes)}: settings of the host are for fresh ones, and {name!r} is pretrained.")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise HostError(
            f"Cannot find the host {name!r}: it is no architecture (such as llama), no folder that transformers saved, "
            f"and no model on the hub that can be reached. {reason}"
        ) from error


def placed(model: Any) -> Any:
    """The model in eval mode, on the GPU if there is one."""
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
