"""The router process: ext_proc and health over gRPC, the control API over HTTP, and the order in which they start and stop."""

import asyncio
import logging
import secrets

from ..client import StagerClient
from ..config import Settings, build_pools
from ..core.decision import Policy
from ..core.steering import Steering
from ..metrics import RouterMetrics
from ..process import HttpServer
from .catalog import Catalog
from .control import router_app
from .health import EXT_PROC_SERVICE, Health
from .holding import Holding
from .http2 import Methods
from .listener import Listener
from .membership import Membership
from .processor import Conversation, Processor
from .residency import Residency
from .staging import Staging
from .tls import Certificate
from .tracing import Tracing

log = logging.getLogger(__name__)

CERTIFICATE_CHECK_S = 10.0  # a renewed one is in use this soon; the old one is valid for days yet
PROCESS_METHOD = f"/{EXT_PROC_SERVICE}/Process"


class Server:
    """One router. `start` returns when it serves; `stop` drains."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.router
        self.metrics = RouterMetrics()
        pools = build_pools(settings)
        stagers = sorted({e.stager for pool in pools for e in pool.table.endpoints if e.stager})
        holder = f"router {secrets.token_hex(4)}"
        self._clients = {address: StagerClient(address, settings.rpc, holder) for address in stagers}
        self._residency = Residency(self._clients, self.metrics)
        self._catalog = Catalog(pools, self._clients)
        self.membership = Membership(pools, self._residency, self._catalog, self.metrics)
        policy = Policy(
            hash_on=self._settings.parsed_hash_on(),
            model_header=self._settings.model_header.lower(),
            forbidden_paths=self._settings.forbidden_paths,
            timeout_header=self._settings.timeout_header.lower(),
            stage_deadline_s=self._settings.stage_deadline_s,
            max_stage_deadline_s=self._settings.max_stage_deadline_s,
            lists_models=self._settings.lists_models,
        )
        holding = Holding(
            self.metrics,
            max_waiting=self._settings.max_waiting,
            max_waiting_per_adapter=self._settings.max_waiting_per_adapter,
            max_bytes=self._settings.max_held_bytes,
        )
        for pool in pools:
            for address, slots in pool.table.slots_per_endpoint().items():
                self.metrics.share.labels(address).set(slots / pool.table.size)
        cluster_header = self._settings.cluster_header if self._settings.steering == "cluster" else None
        self.processor = Processor(
            membership=self.membership,
            catalog=self._catalog,
            staging=Staging(self._residency, holding, self.metrics, self._settings.no_space_wait_s),
            steering=Steering(cluster_header, self._settings.max_retry_endpoints),
            policy=policy,
            metrics=self.metrics,
            holding=holding,
            max_body_bytes=self._settings.max_body_bytes,
            tracing=Tracing() if self._settings.tracing else None,
        )
        self._health = Health()
        self._listeners: list[Listener] = []
        self._http: HttpServer | None = None
        self._draining = False
        self._served = False
        self._reloading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind everything, then say SERVING. Raises StartError for an address that cannot be had."""
        if self._settings.http_listen:
            app = router_app(self.metrics, self.membership, self.processor.policy, self._why_not_ready)
            self._http = HttpServer(app, self._settings.http_listen)
        methods: Methods = {PROCESS_METHOD: lambda sender: Conversation(self.processor, sender), **self._health.methods()}
        tls = None
        if self._settings.tls.mode != "off":
            certificate = Certificate(self._settings.tls)
            tls = certificate.context
            self._reloading = asyncio.create_task(_keep_current(certificate), name="certificate")
        self._listeners.append(Listener(self._settings.listen, methods, self._settings.max_streams, tls))
        if self._settings.health_listen:
            self._listeners.append(Listener(self._settings.health_listen, self._health.methods(), self._settings.max_streams))
        for listener in self._listeners:
            await listener.start()
        if self._http is not None:
            self._http.start()
        self.membership.start(self._clients)
        self._health.set_serving(True)
        self._served = True
        log.info("router serves ext_proc on %s", self._settings.listen)

    async def stop(self) -> None:
        """Turn NOT_SERVING, take what still comes for `lameduck_s`, let running exchanges finish for `drain_s`, then close."""
        self._draining = True
        self._health.set_serving(False)
        if self._served:
            await asyncio.sleep(self._settings.lameduck_s)
        if self._reloading is not None:
            self._reloading.cancel()
        await asyncio.gather(*(listener.stop(self._settings.drain_s) for listener in self._listeners))
        await self.membership.stop()
        await self._catalog.close()
        await self._residency.close()
        await self._residency.release_all()
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        if self._http is not None:
            await self._http.stop()
        if self.processor.tracing is not None:
            await asyncio.to_thread(self.processor.tracing.close)

    def _why_not_ready(self) -> str | None:
        return "draining" if self._draining else None


async def _keep_current(certificate: Certificate) -> None:
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_S)
        certificate.reload_if_changed()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run a router until `stop` is set."""
    server = Server(settings)
    try:
        await server.start()
        await stop.wait()
    finally:
        await server.stop()
