"""The server as a Ray Serve application.

    serve run deploy.ray_serve:application model=/srv/models/lm2 settings=/etc/mnemic/serve.toml replicas=2

Replicas share sessions through their store, so the settings must name one in PostgreSQL; Ray's proxy can be reached
from elsewhere, so they must have tenants. The model lies at the same place on every machine; the settings are read
where this runs.
"""

from pathlib import Path
from typing import Any

from ray import serve

from mnemic.cli.stream import open_model, tokenizer_for
from mnemic.core.errors import ConfigError
from mnemic.serving.app import create_app
from mnemic.serving.config import Settings
from mnemic.serving.store import open_store


def application(given: dict[str, str]) -> Any:
    """
    Args:
        given: "model", "settings", and "replicas" unless there are to be two.

    Raises:
        ConfigError: settings with which there cannot be several servers.
    """
    ConfigError.check_names("argument", given, ("model", "settings", "replicas"))
    model, settings = Path(given["model"]), Settings.read(given["settings"])
    if not settings.store.startswith(("postgresql://", "postgres://")):
        raise ConfigError(
            f"store = {settings.store!r}, but replicas share sessions: expected postgresql://user@machine/database."
        )
    if not settings.tenants:
        raise ConfigError("Ray's proxy can be reached from elsewhere: give tenants with keys in the settings.")

    def build() -> Any:
        """In each replica."""
        attached = open_model(str(model), None, None)
        words = tokenizer_for(str(model), attached, None)
        return create_app(attached, words, open_store(settings.store, keep=settings.keep, keys=keys), settings)

    keys = settings.encryption_keys()
    limits = settings.limits
    return serve.deployment(
        serve.ingress(build)(),
        name="mnemic",
        num_replicas=int(given.get("replicas", "2")),
        # The server itself answers 429 before Ray lets requests wait.
        max_ongoing_requests=limits.max_rows + limits.max_waiting,
        graceful_shutdown_timeout_s=settings.shutdown_seconds + 30,
        # ray_actor_options={"num_gpus": 1} for a model on a GPU.
    ).bind()
