"""The socket and uvicorn around the application."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from k2lite.quant.errors import RequestError

GRACE_S = 5  # what is in progress at the end may take this long
HEAD_S = 20.0  # in which a request's head must be complete
CONNECTIONS = 512  # at a time; what comes then is a 503


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is said before anything else. Raises RequestError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except OSError as error:
        raise RequestError(f"can't listen on {host} port {port}: {error.strerror or error}") from error
    return listening


class _Protocol(H11Protocol):
    """uvicorn's, but a connection on which no request's head is complete in time is closed: it counts against
    CONNECTIONS, so that a few clients who never finish would keep all others out."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._forget()

    def send_400_response(self, msg: str) -> None:
        """What follows a good request on its connection is not HTTP: who works on that request must not answer after
        this, nor this within its answer."""
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
            return
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        if self.cycle.response_started:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._overdue is None:
            self._overdue = self.loop.call_later(HEAD_S, self.transport.close)

    def _forget(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


def config(app: Starlette) -> uvicorn.Config:
    """uvicorn without an access log (paths may be private), with limits on slow and idle connections."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=CONNECTIONS,
    )


def run(app: Starlette, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then answers in progress get GRACE_S seconds."""
    with suppress(KeyboardInterrupt):  # uvicorn raises it once more when all is closed
        uvicorn.Server(config(app)).run(sockets=[listening])
