"""The router process: ext_proc and health over gRPC, the control API over HTTP, and the order in which they start and stop."""

import asyncio
import logging

from ..client import StagerClient
from ..config import Settings, build_pools
from ..core.decision import Policy
from ..core.steering import Steering
from ..metrics import RouterMetrics
from ..process import HttpServer
from .control import router_app
from .health import EXT_PROC_SERVICE, Health
from .http2 import Methods
from .listener import Listener
from .membership import Membership
from .processor import Conversation, Processor
from .residency import Residency
from .staging import Staging

log = logging.getLogger(__name__)

PROCESS_METHOD = f"/{EXT_PROC_SERVICE}/Process"


class Server:
    """One router. `start` returns when it serves; `stop` drains."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.router
        self.metrics = RouterMetrics()
        pools = build_pools(settings)
        stagers = sorted({e.stager for pool in pools for e in pool.table.endpoints if e.stager})
        self._clients = {address: StagerClient(address) for address in stagers}
        self._residency = Residency(self._clients, self.metrics)
        self.membership = Membership(pools, self._residency, self.metrics)
        policy = Policy(self._settings.parsed_hash_on(), self._settings.model_header.lower(), self._settings.forbidden_paths)
        cluster_header = self._settings.cluster_header if self._settings.steering == "cluster" else None
        self.processor = Processor(
            membership=self.membership,
            staging=Staging(self._residency, self.metrics, self._settings.stage_deadline_s),
            steering=Steering(cluster_header, self._settings.max_retry_endpoints),
            policy=policy,
            metrics=self.metrics,
            max_body_bytes=self._settings.max_body_bytes,
        )
        self._health = Health()
        self._listeners: list[Listener] = []
        self._http: HttpServer | None = None
        self._draining = False

    async def start(self) -> None:
        """Bind everything, then say SERVING. Raises StartError for an address that cannot be had."""
        if self._settings.http_listen:
            app = router_app(self.metrics, self.membership, self.processor.policy, self._why_not_ready)
            self._http = HttpServer(app, self._settings.http_listen)
        methods: Methods = {PROCESS_METHOD: lambda sender: Conversation(self.processor, sender), **self._health.methods()}
        self._listeners.append(Listener(self._settings.listen, methods, self._settings.max_streams))
        if self._settings.health_listen:
            self._listeners.append(Listener(self._settings.health_listen, self._health.methods(), self._settings.max_streams))
        for listener in self._listeners:
            await listener.start()
        if self._http is not None:
            self._http.start()
        self.membership.start(self._clients)
        self._health.set_serving(True)
        log.info("router serves ext_proc on %s", self._settings.listen)

    async def stop(self) -> None:
        """Turn NOT_SERVING, let running exchanges finish for `drain_s`, then close."""
        self._draining = True
        self._health.set_serving(False)
        await asyncio.gather(*(listener.stop(self._settings.drain_s) for listener in self._listeners))
        await self.membership.stop()
        await self._residency.close()
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        if self._http is not None:
            await self._http.stop()

    def _why_not_ready(self) -> str | None:
        return "draining" if self._draining else None


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run a router until `stop` is set."""
    server = Server(settings)
    try:
        await server.start()
        await stop.wait()
    finally:
        await server.stop()
