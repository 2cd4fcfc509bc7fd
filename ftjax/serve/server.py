"""Run the application under uvicorn; SIGTERM and SIGINT drain."""

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn

from ftjax.errors import UserError
from ftjax.serve.schedule import EngineThread

log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """On the first signal, refuses new requests with 503 and ends once those that are there have ended; a second one ends at
    once."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread):
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._engine.draining:
            self._engine.cancel(list(self._engine.jobs))
            self.force_exit = self.should_exit = True
            return
        self._engine.drain()
        name = signal.Signals(sig).name
        log.warning("%s: no new requests; ending after the %d that are there", name, self._engine.load)

    async def on_tick(self, counter: int) -> bool:
        if self._engine.draining and not self._engine.load:
            self.should_exit = True
        return await super().on_tick(counter)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that has this address and refuses connections until `run`. Raises UserError if it cannot have it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is longer than 63 characters, or empty
        why = error.strerror if isinstance(error, OSError) else "this is not the name of a host"
        raise UserError(f"--host {host} --port {port}: {why}; choose another, or end the program that listens there") from None
    return found


def run(app: Any, engine: EngineThread, listening: socket.socket) -> None:
    """Serve until a signal comes, and then until all requests have ended. The engine's thread must have been started."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    server = DrainingServer(config, engine)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        engine.stop()
