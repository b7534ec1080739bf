"""How the server ends: drain on the first signal, stop on the second; and what systemd hears of
it."""

from __future__ import annotations

import os
import signal
import socket
import time
from types import FrameType

import uvicorn

from chunkllama.engine.client import EngineClient
from chunkllama.logger import init_logger
from chunkllama_server.api.common.context import ServerContext

logger = init_logger(__name__)

ENGINE_DIED = 70  # EX_SOFTWARE


class DrainingServer(uvicorn.Server):
    """Uvicorn, except that a signal lets live requests finish before it closes the socket.

    While it drains the socket stays open: health checks and new requests get 503, so a load
    balancer learns of it before connections fail.

    Attributes:
        exit_code: of the process, once ``serve`` has returned.
    """

    def __init__(self, config: uvicorn.Config, engine: EngineClient, drain_seconds: float) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; exit immediately at the second."""
        if self._deadline is not None:
            self.should_exit = self.force_exit = True
            return
        self._deadline = time.monotonic() + self._drain_seconds
        context = self._context()
        context.lifecycle.draining = True
        if self.server_state.tasks:
            logger.info(
                "%s: finishing %d live requests within %g s; send it again to exit immediately",
                signal.Signals(sig).name,
                len(self.server_state.tasks),
                self._drain_seconds,
            )

    def engine_restarting(self, restarting: bool) -> None:
        """Report not ready while there is no engine process; requests wait meanwhile."""
        context = self._context()
        context.lifecycle.restarting = restarting
        if restarting and context.replicas is None:  # a cluster's sums keep what is gone
            context.metrics.restarted()

    def engine_died(self) -> None:
        """End with code 70, so that a supervisor restarts the server: nothing can be served."""
        logger.error("the engine process keeps ending; stopping with exit code %d", ENGINE_DIED)
        self.exit_code = ENGINE_DIED
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is there a reason to stop?"""
        if self._deadline is not None and not self.should_exit:
            if time.monotonic() > self._deadline:
                logger.warning("cutting %d live requests", len(self.server_state.tasks))
                # Their streams end with an error event instead of a closed connection.
                await self._engine.close()
                self.should_exit = True
            elif not self.server_state.tasks and not self._context().background:
                self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Also end what the application has begun at a forced exit, which uvicorn leaves out.

        It would be cancelled with the event loop, with a traceback in the log.
        """
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def _context(self) -> ServerContext:
        context = self.config.app.app.state.context  # type: ignore[union-attr]
        assert isinstance(context, ServerContext)
        return context


def notify_supervisor(state: str) -> None:
    """Tell systemd (``Type=notify``) of a change; nothing happens under other supervisors."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # A leading @ is systemd's spelling of the abstract namespace.
        sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
