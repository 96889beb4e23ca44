"""The socket and uvicorn around the application."""

from __future__ import annotations

import socket
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette

from k2lite.quant.errors import RequestError

GRACE_S = 5  # what is in progress at the end may take this long


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


def config(app: Starlette) -> uvicorn.Config:
    """uvicorn without an access log (paths may be private), with limits on slow and idle connections."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=512,
    )


def run(app: Starlette, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then answers in progress get GRACE_S seconds."""
    with suppress(KeyboardInterrupt):  # uvicorn raises it once more when all is closed
        uvicorn.Server(config(app)).run(sockets=[listening])
