"""A router in one process: ext_proc and health over gRPC, the control API over HTTP, and the order in which they start and stop.

It is the whole router, or one of its workers (workers/): then it takes connections from its parent, and has a row on the board.
"""

import asyncio
import logging
import random
import secrets
import socket
import sys
from collections.abc import Mapping

from ..client import StagerClient
from ..config.settings import Settings, build_pools
from ..core.conformance import AnyPath
from ..core.paths import Paths
from ..core.popularity import Popularity
from ..core.prefix import Prefixes
from ..discovery.discovery import Discovery
from ..discovery.sources import build_sources
from ..metrics import RouterMetrics
from ..process.http import HttpServer
from .admission import Admission
from .board import Row
from .control import router_app
from .health import EXT_PROC_SERVICE, Health
from .http2.calls import Methods
from .judging import Judges
from .membership import Membership
from .models import Models
from .moving import Moves
from .prefetching import Prefetching
from .probe import Probe
from .processor import Processor, Services
from .residency import Residency
from .servable import Servable
from .staging import Staging
from .tls import Certificate
from .tracing import Tracing
from .transport import Listener
from .watchdog import Watchdog
from .xds import Xds

log = logging.getLogger(__name__)

SWITCH_S = 0.001  # a thread that fills a lookup table or ranks adapters gives way to the event loop this soon; Python's own 5 ms would show in every request
CERTIFICATE_CHECK_S = 10.0  # a renewed one is in use this soon; the old one is valid for days yet
MESSAGE_OVERHEAD_BYTES = 2**20  # of a message beside the body: headers, metadata; a body that is over its limit by less is answered 413
PROCESS_METHOD = f"/{EXT_PROC_SERVICE}/Process"


class Server:
    """One router. `start` returns when it serves; `stop` drains. `clusters`: those that Envoys are told by xDS, encoded, by pool; None: xDS is not served.
    With a `row` it is a worker, and listens on no ext_proc port of its own."""

    def __init__(self, settings: Settings, clusters: Mapping[str, bytes] | None = None, row: Row | None = None) -> None:
        self._row = row
        router = self._settings = settings.router
        self.metrics = RouterMetrics()
        pools = build_pools(settings)
        holder = f"router {secrets.token_hex(4)}"
        known = sorted({endpoint.stager for pool in pools for endpoint in pool.table.endpoints if endpoint.stager})
        self._clients = {address: StagerClient(address, settings.rpc, holder) for address in known}  # so that credentials that are none end it here
        self._residency = Residency(self._clients, self.metrics)
        servable = Servable(pools, self._clients) if router.lists_models and router.models == "servable" else None
        self._models = Models(pools, self._clients, servable, shows_paths=router.shows_paths)
        popularity = Popularity()
        prefixes = Prefixes(router.prefix_blocks)
        looks_every_s = {pool.name: pool.looks_every_s for pool in settings.pools}
        self.xds = Xds(clusters, self.metrics, looks_every_s=looks_every_s) if clusters is not None else None
        self.membership = Membership(
            pools,
            self._residency,
            self._models,
            self.metrics,
            Probe(),
            Moves(
                self._residency,
                popularity,
                join_s=router.join_s,
                leave_s=router.leave_s,
                senders=self.xds,
            ),
            popularity,
            prefixes,
            clients=self._clients,
            connect=lambda address: StagerClient(address, settings.rpc, holder),
            heartbeat_s=router.heartbeat_s,
            hold_down_s=router.hold_down_s,
        )
        rules = router.rules(random.randrange)
        self._prefetching: Prefetching | None = None
        if router.prefetch != "off":
            self._prefetching = Prefetching(
                self.membership,
                self._residency,
                self._clients,
                rules,
                self.metrics,
                into_engine=router.prefetch == "engine",
                per_s=router.prefetch_per_s,
            )
            self.membership.on_woken.append(self._prefetching.woken)
        self._admission = Admission(
            self.metrics,
            max_waiting=router.max_waiting,
            max_waiting_per_adapter=router.max_waiting_per_adapter,
            max_bytes=router.max_held_bytes,
            body_deadline_s=router.body_deadline_s,
            row=row,
        )
        self._judges = Judges(router.judges, router.max_body_bytes, with_blocks=router.prefix_blocks > 0)
        self._watchdog = Watchdog(self.metrics)
        self.services = Services(
            membership=self.membership,
            models=self._models,
            staging=Staging(
                self._residency,
                self._admission,
                self.metrics,
                snapshot=lambda: self.membership.snapshot,
                loads=self.membership.loads,
                popularity=popularity,
                prefixes=prefixes,
                rules=rules,
                no_space_wait_s=router.no_space_wait_s,
                hedge_s=router.hedge_s,
                max_endpoints=router.max_retry_endpoints,
                prefetching=self._prefetching,
            ),
            judges=self._judges,
            admission=self._admission,
            watchdog=self._watchdog,
            steering=router.steers(),
            policy=router.policy(),
            paths=AnyPath() if router.conformance else Paths(router.paths),
            metrics=self.metrics,
            max_body_bytes=router.max_body_bytes,
            no_endpoint_wait_s=router.no_endpoint_wait_s,
            with_blocks=router.prefix_blocks > 0,
            cors_allow_origins=router.cors_allow_origins,
            tracing=Tracing() if router.tracing else None,
        )
        found = any(pool.discovery for pool in settings.pools)
        self._discovery = Discovery(build_sources(settings.pools), settings.discovery, self.metrics.discovery) if found else None
        self._health = Health()
        self._listeners: list[Listener] = []
        self._http: HttpServer | None = None
        self._draining = False
        self._served = False
        self._reloading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind everything, then say SERVING. Raises StartError for an address that cannot be had."""
        sys.setswitchinterval(SWITCH_S)
        if self._settings.http_listen:
            app = router_app(self.services, self._why_not_ready)
            self._http = HttpServer(app, self._settings.http_listen)
        methods: Methods = {PROCESS_METHOD: lambda sender: Processor(self.services, sender), **self._health.methods()}
        if self.xds is not None:
            methods |= self.xds.methods()
        certificate = None if self._settings.tls.mode == "off" else Certificate(self._settings.tls)
        max_message_bytes = self._settings.max_body_bytes + MESSAGE_OVERHEAD_BYTES
        tls = certificate.context if certificate is not None else None
        address = self._settings.listen if self._row is None else None
        self._listeners.append(Listener(address, methods, self._settings.max_streams, tls, max_message_bytes=max_message_bytes))
        if self._settings.health_listen:
            health = self._health.methods()
            self._listeners.append(Listener(self._settings.health_listen, health, self._settings.max_streams, max_message_bytes=MESSAGE_OVERHEAD_BYTES))
        for listener in self._listeners:
            await listener.start()
        if certificate is not None:
            self._reloading = asyncio.create_task(_keep_current(certificate, self._listeners[0]), name="certificate")
        if self._http is not None:
            self._http.start()
        if self._discovery is not None:
            await self.membership.apply(await self._discovery.first())
            self._discovery.follow(self.membership.apply)
        if self.xds is not None:  # not before: an Envoy that has followed another replica would lose what this one has not found yet
            self.xds.update(self.membership.snapshot)
            self.membership.on_change.append(self.xds.update)
        self.membership.start()
        if self._prefetching is not None:
            self._prefetching.start()
        self._admission.start()
        self._judges.start()
        self._watchdog.start()
        self._health.set_serving(True)
        self._served = True
        log.info("router serves ext_proc on %s", self._settings.listen)
        if self._settings.conformance:
            log.warning("this router is a conformance suite's picker (router.conformance): clients say who serves, and no model is known")

    async def stop(self) -> None:
        """Turn NOT_SERVING, take what still comes for `lameduck_s`, let running exchanges finish for `drain_s`, then close."""
        self._draining = True
        self._health.set_serving(False)
        if self._served:
            await asyncio.sleep(self._settings.lameduck_s)
        if self._reloading is not None:
            self._reloading.cancel()
        self._health.drain()
        if self.xds is not None:  # by now Envoys know which replica serves, and follow that one
            self.xds.drain()
        await asyncio.gather(*(listener.stop(self._settings.drain_s) for listener in self._listeners))
        self._watchdog.stop()
        await self._admission.stop()
        await self._judges.stop()
        if self._discovery is not None:
            await self._discovery.stop()
        if self._prefetching is not None:
            await self._prefetching.close()
        await self.membership.stop()
        await self._models.close()
        await self._residency.close()
        await self._residency.release_all()
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        if self._http is not None:
            await self._http.stop()
        if self.services.tracing is not None:
            await asyncio.to_thread(self.services.tracing.close)

    # -- what a worker's parent asks for

    def take(self, accepted: socket.socket) -> None:
        """Serve a connection that the parent has accepted."""
        self._listeners[0].take(accepted)

    def give_one_away(self) -> None:
        """Have one client's next calls come on a new connection, for another worker."""
        self._listeners[0].give_one_away()

    def count_connections(self) -> tuple[int, int]:
        """Connections, and those that carried requests since this was asked last."""
        return self._listeners[0].count() if self._listeners else (0, 0)

    def follow_readiness(self, ready: bool) -> None:
        """Say of the whole router on the ext_proc port whether it is ready. A drain is not called off."""
        if not self._draining:
            self._health.set_serving(ready)

    def _why_not_ready(self) -> str | None:
        if self._draining:
            return "draining"
        return None if self._served else "starting: the fleet has not been found yet"


async def _keep_current(certificate: Certificate, listener: Listener) -> None:
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_S)
        if await asyncio.to_thread(certificate.reload_if_changed):
            await listener.use(certificate.context)


async def serve(settings: Settings, stop: asyncio.Event, clusters: Mapping[str, bytes] | None = None) -> None:
    """Run a router until `stop` is set."""
    server = Server(settings, clusters)
    try:
        await server.start()
        await stop.wait()
    finally:
        await server.stop()
