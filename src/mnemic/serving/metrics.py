"""Figures for Prometheus. Labels are this program's own words, never a client's, a tenant's or a session's."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core.errors import MissingExtraError
from .auth import OPEN
from .calls import METHODS, Call
from .engine import StepRecord
from .errors import ServingError
from .store import SessionStore
from .write_behind import WriteBehind

if TYPE_CHECKING:
    from .server import Server

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingExtraError("The server needs prometheus-client: pip install 'mnemic[serve]'.") from error

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STORED_EVERY = 30.0


class Metrics:
    """Of one server, in a registry of its own. `first_token.observe` and `request` are called in the event loop,
    `step` in the engine's thread, `store_call` in any."""

    def __init__(self, server: "Server"):
        self.server, self.registry = server, CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mnemic_requests", "Requests answered.", ["route", "method", "status"], **own)
        self.request_seconds = Histogram(
            "mnemic_request_seconds", "Until the last byte.", ["route", "method"], buckets=_SECONDS, **own
        )
        self.first_token = Histogram(
            "mnemic_first_token_seconds", "From a request's arrival to its first token.", buckets=_SECONDS, **own
        )
        self.step_seconds = Histogram(
            "mnemic_step_seconds", "Steps of the model.", ["kind"], buckets=_STEP_SECONDS, **own
        )
        self.step_rows = Histogram("mnemic_step_rows", "Rows of a step.", ["kind"], buckets=_ROWS, **own)
        self.tokens_read = Counter("mnemic_tokens_read", "Tokens that the model has read.", ["kind"], **own)
        self.store_seconds = Histogram(
            "mnemic_store_seconds", "Calls of the session store.", ["call"], buckets=_STEP_SECONDS, **own
        )
        self.store_errors = Counter("mnemic_store_errors", "Calls that the session store failed on.", ["call"], **own)
        # There from the start, so that the first failure is a change.
        for call in ("commit", "load", "get", "acquire"):
            self.store_seconds.labels(call)
            self.store_errors.labels(call)
        for kind in ("decode", "prefill"):
            self.tokens_read.labels(kind)
        self.stored: tuple[int, int] | None = None
        self._asked = float("-inf")
        self.registry.register(_Now(self))
        ProcessCollector(registry=self.registry)

    def request(self, call: Call, route: str) -> None:
        method = call.method if call.method in METHODS else "other"
        self.requests.labels(route, method, str(call.status)).inc()
        self.request_seconds.labels(route, method).observe(call.seconds)

    def step(self, record: StepRecord) -> None:
        self.step_seconds.labels(record.kind).observe(record.seconds)
        self.step_rows.labels(record.kind).observe(record.rows)
        self.tokens_read.labels(record.kind).inc(record.tokens)

    def store_call(self, name: str, seconds: float, failed: bool) -> None:
        self.store_seconds.labels(name).observe(seconds)
        if failed:
            self.store_errors.labels(name).inc()

    async def text(self) -> bytes:
        """In Prometheus' format. What is stored is counted at most every 30 seconds: that asks the store."""
        if time.monotonic() - self._asked >= _STORED_EVERY:
            self._asked = time.monotonic()
            try:
                self.stored = await self.server.manager.call(self._stored)
            except ServingError:
                # Counted among the store's errors.
                self.stored = None
        return generate_latest(self.registry)

    def _stored(self) -> tuple[int, int]:
        store: SessionStore = self.server.store
        # What waits to be written is not stored; asking for it would write it.
        store = store.store if isinstance(store, WriteBehind) else store
        usages = [store.usage(tenant) for tenant in self.server.settings.tenants or (OPEN,)]
        return sum(usage.sessions for usage in usages), sum(usage.bytes for usage in usages)


class _Now(Collector):
    """What is read off when it is asked for."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.server = metrics, metrics.server

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        server = self.server
        engine, live = server.engine.stats(), server.manager.stats()
        build = {"version": __version__, "memory": server.engine.base.memory.name}
        yield _gauges("mnemic_build_info", "What runs.", [(build, 1)])
        yield _gauge(
            "mnemic_ready", "Whether requests are taken.", server.engine.running and not server.requests.closed
        )
        yield _gauge("mnemic_requests_running", "Requests on their way.", len(server.requests))
        yield _gauge("mnemic_waiting_works", "Answers and texts in the queue.", engine.waiting)
        yield _gauge("mnemic_waiting_tokens", "Prompt tokens in the queue.", engine.waiting_tokens)
        rows = [({"doing": "prefill"}, engine.prefilling), ({"doing": "decode"}, engine.decoding)]
        yield _gauges("mnemic_active_rows", "Rows in work.", rows)
        yield _gauge("mnemic_documents_running", "Documents that are being read.", len(server.feeding))
        yield CounterMetricFamily("mnemic_tokens_made", "Tokens of answers.", value=engine.tokens_made)
        works = CounterMetricFamily("mnemic_works", "Answers and texts by their end.", labels=["end"])
        for end in ("finished", "failed", "cancelled"):
            works.add_metric([end], getattr(engine, end))
        yield works
        sessions = [({"place": "device"}, live.device), ({"place": "host"}, live.host)]
        yield _gauges("mnemic_live_sessions", "Sessions whose state is kept ready.", sessions)
        held = [({"place": "device"}, live.device_bytes), ({"place": "host"}, live.host_bytes)]
        yield _gauges("mnemic_live_bytes", "Bytes of these states.", held)
        yield CounterMetricFamily("mnemic_states_spilled", "States moved to host memory.", value=live.spilled)
        yield CounterMetricFamily("mnemic_states_dropped", "States let go, to be loaded again.", value=live.dropped)
        if self.metrics.stored is not None:
            yield _gauge("mnemic_stored_sessions", "Sessions of the tenants that there are.", self.metrics.stored[0])
            yield _gauge("mnemic_stored_bytes", "Bytes of all their versions.", self.metrics.stored[1])
        if isinstance(server.store, WriteBehind):
            commits, size = server.store.unwritten
            yield _gauge("mnemic_unwritten_commits", "Commits that a crash would lose.", commits)
            yield _gauge("mnemic_unwritten_bytes", "Bytes of these commits.", size)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _gauges(name: str, text: str, values: Sequence[tuple[dict[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(values[0][0]))
    for labels, value in values:
        family.add_metric(list(labels.values()), value)
    return family
