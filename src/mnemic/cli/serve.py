"""`mnemic serve`: a model with memory behind an OpenAI-compatible interface."""

import ipaddress
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Saved by mnemic; lm2-babilong; or any host, with --memory.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="NAME", help="Attach this memory to the host MODEL.")] = None,
    segment: Annotated[int | None, typer.Option(metavar="N", min=1, help="With --memory: tokens of a segment.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings, in TOML; flags go before.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What clients call the model.")] = None,
    store: Annotated[str | None, typer.Option(metavar="URL", help="Of sessions: a folder or postgresql://...")] = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="By default this machine only.")] = None,
    port: Annotated[int | None, typer.Option(metavar="N", min=0, help="8000 by default; 0 for any free one.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Tokenizer, if MODEL has none.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all by default.")] = None,
    page: Annotated[bool | None, typer.Option("--page/--no-page", help="The web page at /; on by default.")] = None,
    make_key: Annotated[bool, typer.Option("--make-key", help="Print a new key and its hash, and end.")] = False,
) -> None:
    """Serve conversations that are kept: each session has its own memory, which outlives the server.

    The OpenAI clients work unchanged (/v1/chat/completions, /v1/completions, /v1/models). A request with the header
    X-Session-Id, or with `session` in its metadata, goes on with that session; /v1/sessions makes, lists, feeds,
    forks, rolls back, exports, imports and deletes them. An answer ends when its state is stored.

    SIGTERM lets running requests end, for `shutdown_seconds` of the settings. The log goes to stderr, a JSON object a
    line, without what users write.

    On other addresses than this machine's own, tenants with keys are required: a table in the settings such as
    [tenants.alice] with keys = ["HASH"].

    \b
    Examples:
      mnemic serve lm2-babilong
      mnemic serve runs/lm2
      mnemic serve path/to/host --memory lm2 --segment 512 --store /var/lib/mnemic
      mnemic serve runs/lm2 --config server.toml --host 0.0.0.0
      mnemic serve --make-key

    \b
    Reads:   MODEL, --config, the store.
    Writes:  the store: records and the last states of each session.
    """
    from ..core.errors import InputError

    if make_key:
        from ..serving.auth import new_key

        key, hashed = new_key()
        typer.echo(f"key   {key}\nhash  {hashed}")
        return
    if model is None:
        raise InputError("MODEL is missing: name a folder that mnemic saved, or a host with --memory.")
    from ..serving.app import create_app
    from ..serving.config import Settings
    from ..serving.process import run
    from ..serving.store import open_store
    from ._shared import quiet

    settings = Settings.read(config, name=name, store=store, host=host, port=port, page=page)
    if name is None and not _is_named(config):
        settings = replace(settings, name=Path(model).resolve().name if Path(model).is_dir() else model)
    _check_address(settings)
    quiet()
    attached, words = _model(model, memory, segment, tokenizer, threads)
    sessions = open_store(settings.store, keep=settings.keep, keys=settings.encryption_keys())
    try:
        app = create_app(attached, words, sessions, settings)
    except BaseException:
        sessions.close()
        raise
    run(app)


def _is_named(config: Path | None) -> bool:
    """Whether a file of settings, which has been read without error, names the model."""
    return config is not None and "name" in tomllib.loads(config.read_text(encoding="utf-8"))


def _check_address(settings: Any) -> None:
    from ..core.errors import ConfigError

    if settings.tenants or settings.host == "localhost":
        return
    try:
        alone = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        alone = False
    if not alone:
        raise ConfigError(
            f"host {settings.host!r} can be reached from elsewhere, and without tenants everybody may do everything: "
            "give tenants with keys in --config (--make-key makes one), or keep to 127.0.0.1."
        )


def _model(model: str, memory: str | None, segment: int | None, tokenizer: str | None, threads: int | None) -> Any:
    import torch

    from .stream import open_model, tokenizer_for

    if threads is not None:
        torch.set_num_threads(threads)
    attached = open_model(model, memory, segment)
    return attached, tokenizer_for(model, attached, tokenizer)
