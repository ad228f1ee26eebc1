"""The stager process: the order in which its parts start and stop."""

import asyncio
import logging
import secrets

import grpc.aio

from .. import credentials
from ..client import StagerClient
from ..config.settings import Settings
from ..metrics import StagerMetrics
from ..process.grpc import grpc_server, listen_grpc
from ..process.http import HttpServer
from ..process.loop import leave_to_stay
from .api.grpc import StagerService
from .api.http import stager_app
from .engine import build_engine
from .stager import Stager
from .supply.origins import build_origin
from .supply.peers import Peers
from .supply.roster import Roster
from .supply.source import Source, log_repetitions

log = logging.getLogger(__name__)

STOP_S = 2.0  # waits of routers are ended after this; they ask the next candidate


class Server:
    """One stager. `start` returns when it serves."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.stager
        self._rpc = settings.rpc
        instance = secrets.token_hex(8)
        metrics = StagerMetrics()
        peers = Peers(self._settings.peers, lambda address: StagerClient(address, self._rpc), instance)
        metrics.peers.set_function(lambda: peers.count)
        self._roster = Roster(settings, peers, metrics.discovery)
        sources = [Source(build_origin(origin), origin) for origin in self._settings.origins]
        self.stager = Stager(self._settings, sources, build_engine(self._settings.engine), metrics, peers=peers, instance=instance)
        self._grpc: grpc.aio.Server | None = None
        self._http: HttpServer | None = None

    async def start(self) -> None:
        """Take the directory, then the ports. Raises StartError."""
        tokens = credentials.Tokens(self._rpc)
        tls = credentials.server_credentials(self._rpc)
        log_repetitions()
        await self.stager.open()
        await self._roster.open()
        leave_to_stay()
        self._grpc = grpc_server([credentials.TokenInterceptor(tokens)] if tokens.current else [])
        guarded = credentials.are_configured(self._rpc)
        destructive = guarded or credentials.is_loopback(self._settings.listen)
        StagerService(self.stager, self._settings.peers, destructive=destructive).register(self._grpc)
        listen_grpc(self._grpc, self._settings.listen, tls)
        if self._settings.http_listen:
            destructive = bool(tokens.current) or credentials.is_loopback(self._settings.http_listen)
            app = stager_app(self.stager, tokens.accepts if tokens.current else None, destructive=destructive)
            self._http = HttpServer(app, self._settings.http_listen)
            self._http.start()
        await self._grpc.start()
        log.info("stager serves on %s, fills %s", self._settings.listen, self._settings.dir)

    async def stop(self) -> None:
        """Drain, end waits, give up flights without leaving a trace, let the directory go."""
        self.stager.drain.stop()
        if self._grpc is not None:
            await self.stager.drain.until_empty(self._settings.drain_s)
            await self._grpc.stop(STOP_S)
        await self._roster.close()
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
