"""Run the application under uvicorn; SIGTERM and SIGINT drain."""

import asyncio
import logging
import signal
from types import FrameType
from typing import Any

import uvicorn

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


def run(app: Any, engine: EngineThread, host: str, port: int) -> None:
    """Serve until a signal comes, and then until all requests have ended. The engine's thread must have been started."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, lifespan="off")
    server = DrainingServer(config, engine)
    try:
        asyncio.run(server.serve())
    finally:
        engine.stop()
