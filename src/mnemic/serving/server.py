"""What the routes work with: engine, sessions, tenants and settings of one server."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ..core.errors import UnsupportedError
from .auth import Tenant, Tenants
from .chat import ChatTemplate
from .config import Settings
from .control_tokens import ControlTokens
from .draining import Requests
from .engine import Engine, StepRecord
from .errors import InvalidRequest, ServingError, UnknownModel
from .manager import Manager
from .metrics import Metrics
from .store import SessionStore
from .watched_store import watched
from .write_behind import WriteBehind

SWEEP_SECONDS = 60.0
LAST_WORDS = 1.0
"""Seconds in which requests that the server ends may still say so."""

_log = logging.getLogger("mnemic.serving")


class Server:
    """
    Args:
        model: attached; the engine's from `start` to `stop`. tokenizer: None for a model that is given ids alone.
        store: closed by `stop`. settings: see `Settings`.

    observers: called with each step's record, in the engine's thread. feeding: documents that are being read, by tenant
    and session: bytes and tokens so far. requests: those on their way. since: when the server started, seconds since
    1970.

    Raises:
        UnsupportedError: a memory that cannot be served.
    """

    def __init__(self, model: Any, tokenizer: Any, store: SessionStore, settings: Settings):
        self.settings, self.tokenizer = settings, tokenizer
        self.tenants = Tenants(settings.tenants)
        self.metrics, self.requests = Metrics(self), Requests()
        store = watched(store, self.metrics.store_call)
        self.store: SessionStore = WriteBehind(store) if settings.durability == "fast" else store
        self.observers: list[Callable[[StepRecord], object]] = [self.metrics.step]
        self.feeding: dict[tuple[str, str], tuple[int, int]] = {}
        self.engine = Engine(model, tokenizer, settings.limits, observe=self._observe)
        self.manager = Manager(
            model,
            self.store,
            tokenizer=tokenizer,
            wait=settings.wait,
            lease=settings.lease,
            device_bytes=settings.device_bytes,
            host_bytes=settings.host_bytes,
        )
        if isinstance(self.store, WriteBehind):
            self.store.lost = self.manager.forget
        self.template: ChatTemplate | None = None
        self.no_chat = "this model has no tokenizer"
        self.controls: ControlTokens | None = None
        if tokenizer is not None:
            try:
                self.template = ChatTemplate(tokenizer)
            except UnsupportedError as error:
                self.no_chat = str(error)
            self.controls = ControlTokens(tokenizer) if self.template is None else self.template.controls
        self.since = int(time.time())
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.engine.start()
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self, drain: bool = True) -> None:
        """`drain`, or with drain=False end what is running at once; then write everything and close the store."""
        if not drain:
            self.requests.hurry()
        await self.drain()
        if self._sweeping is not None:
            self._sweeping.cancel()
        await self.manager.close()
        await asyncio.to_thread(self.store.close)

    def close(self) -> None:
        """Take no more requests. A signal's handler may call it."""
        self.requests.close(self.settings.shutdown_seconds)

    async def drain(self) -> None:
        """Take no more requests, let those on their way have `shutdown_seconds`, then end them: each session is as it
        was at its last commit."""
        self.close()
        if not await self.requests.over():
            _log.warning("%d requests are ended before they are answered", len(self.requests))
        # Whoever still waits for the engine is told so.
        await self.engine.stop(drain=False)
        await self.requests.end(0.1 if self.requests.hurried else LAST_WORDS)

    def check_model(self, name: str) -> None:
        """Raises `UnknownModel`."""
        if name != self.settings.name:
            raise UnknownModel(f"There is no model {name[:80]!r} here, but {self.settings.name!r}.", param="model")

    def chat_template(self) -> ChatTemplate:
        """Raises `InvalidRequest` where the model cannot chat."""
        if self.template is None:
            raise InvalidRequest(f"There is no chat with this model ({self.no_chat}); use /v1/completions.")
        return self.template

    async def check_room(self, tenant: Tenant, sessions: int = 0) -> None:
        """Raises `QuotaExceeded` where the tenant may not store so many more sessions, or anything more."""
        if tenant.max_bytes is not None or (sessions and tenant.max_sessions is not None):
            tenant.check_room(await self.manager.call(self.store.usage, tenant.name), sessions)

    async def audit(self, tenant: Tenant, action: str, session_id: str | None, detail: str = "") -> None:
        await self.manager.call(self.store.audit, tenant.name, action, session_id, detail)

    def encode(self, text: str, begins: bool, *, document: bool = False) -> list[int]:
        """Ids of a text; special tokens are put before it only where a stream begins. Blocks on long texts.

        document: those that the text itself names are text, see `ControlTokens`.

        Raises:
            InvalidRequest: the tokenizer cannot read it, or there is none.
        """
        if self.tokenizer is None:
            raise InvalidRequest("This model has no tokenizer: give token ids.", param="prompt")
        if not text:
            return []
        try:
            plain = self.controls.plain(text, begins) if document and self.controls is not None else None
            return self.tokenizer(text, add_special_tokens=begins)["input_ids"] if plain is None else plain
        except InvalidRequest:
            raise
        # The tokenizers library raises bare exceptions, for example on a word without a token.
        except Exception as error:
            raise InvalidRequest(f"The tokenizer cannot read this text: {error}", param="prompt") from error

    def _observe(self, record: StepRecord) -> None:
        for observer in self.observers:
            observer(record)

    async def _sweep(self) -> None:
        while True:
            try:
                await self.manager.call(self.store.expire, time.time())
            except ServingError as error:
                _log.warning("expired sessions could not be removed: %s", error)
            await asyncio.sleep(SWEEP_SECONDS)
