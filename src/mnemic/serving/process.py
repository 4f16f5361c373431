"""The server as a process: uvicorn, the log, and signals."""

import logging
import logging.config
import signal
from types import FrameType
from typing import Any

from ..core.errors import MissingExtraError
from .logging import config
from .server import Server

try:
    import uvicorn
    from prometheus_client import disable_created_metrics
except ImportError as error:
    raise MissingExtraError("The server needs uvicorn: pip install 'mnemic[serve]'.") from error

_CLOSING_SECONDS = 5
_log = logging.getLogger("mnemic.serving")


def run(app: Any) -> None:
    """Serve an application of `create_app` until the process is told to end; log to stderr."""
    logging.config.dictConfig(config(app.state.server.settings.log_text))
    logging.captureWarnings(True)
    # Else there would be as many times of creation as metrics.
    disable_created_metrics()
    Process(app).run()


class Process(uvicorn.Server):
    """At the address in the application's settings.

    SIGTERM and SIGINT: `Server.drain`; until that is done, clients and balancers get 503 and no closed port. A second
    one ends the requests at once, a third one the process.
    """

    def __init__(self, app: Any):
        self.server: Server = app.state.server
        settings = self.server.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                # Of connections that nothing runs on any more.
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Uvicorn's own raises the signal again when all is done: then the process would not end with 0.
        if not self.should_exit:
            self.should_exit = True
            self.server.close()
            return
        self.server.requests.hurry()
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_DFL)

    async def shutdown(self, sockets: Any = None) -> None:
        _log.info("shutting down, %d requests on their way", len(self.server.requests))
        await self.server.drain()
        await super().shutdown(sockets)
