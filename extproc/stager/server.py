"""The stager process: the order in which its parts start and stop."""

import asyncio
import logging

import grpc.aio

from ..config import Settings
from ..metrics import StagerMetrics
from ..process import HttpServer, grpc_server, listen_grpc
from .control import stager_app
from .engine import Engine
from .origins import build_origin
from .service import StagerService
from .stager import Stager

log = logging.getLogger(__name__)

STOP_S = 2.0  # waits of routers are ended after this; they ask the next candidate


class Server:
    """One stager. `start` returns when it serves."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.stager
        self.stager = Stager(self._settings, [build_origin(origin) for origin in self._settings.origins], Engine(self._settings.engine), StagerMetrics())
        self._grpc: grpc.aio.Server | None = None
        self._http: HttpServer | None = None

    async def start(self) -> None:
        """Take the directory, then the ports. Raises StartError."""
        await self.stager.open()
        self._grpc = grpc_server()
        StagerService(self.stager).register(self._grpc)
        listen_grpc(self._grpc, self._settings.listen)
        if self._settings.http_listen:
            self._http = HttpServer(stager_app(self.stager), self._settings.http_listen)
            self._http.start()
        await self._grpc.start()
        log.info("stager serves on %s, fills %s", self._settings.listen, self._settings.dir)

    async def stop(self) -> None:
        """End waits, give up flights without leaving a trace, let the directory go."""
        if self._grpc is not None:
            await self._grpc.stop(STOP_S)
        await self.stager.close()
        if self._http is not None:
            await self._http.stop()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run a stager until `stop` is set."""
    server = Server(settings)
    try:
        await server.start()
        await stop.wait()
    finally:
        await server.stop()
