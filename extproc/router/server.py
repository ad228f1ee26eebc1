"""The router process: ext_proc and health on grpc.aio, the control API on HTTP, and the order in which they start and stop."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..client import StagerClient
from ..config import Settings, build_pools
from ..core.decision import Policy
from ..core.steering import Steering
from ..metrics import RouterMetrics
from ..process import HttpServer, grpc_server, listen_grpc
from .control import router_app
from .membership import Membership
from .processor import Processor
from .residency import Residency
from .staging import Staging

log = logging.getLogger(__name__)

EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH_NAMES = ("", "liveness", "readiness", "inference-extension", EXT_PROC_SERVICE)


class _GrpcStream:
    """grpc.aio as the processor's Stream. Messages stay bytes: decoding is wire.py's."""

    def __init__(self, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        self._context = context

    async def read(self) -> bytes | None:
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]  # missing in the stubs

    async def write(self, message: bytes) -> None:
        await self._context.write(message)


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
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._grpc: list[grpc.aio.Server] = []
        self._http: HttpServer | None = None
        self._draining = False

    async def start(self) -> None:
        """Bind everything, then say SERVING. Raises StartError for an address that cannot be had."""
        if self._settings.http_listen:
            app = router_app(self.metrics, self.membership, self.processor.policy, self._why_not_ready)
            self._http = HttpServer(app, self._settings.http_listen)
        self._grpc.append(self._serve(self._settings.listen, ext_proc=True))
        if self._settings.health_listen:
            self._grpc.append(self._serve(self._settings.health_listen, ext_proc=False))
        for server in self._grpc:
            await server.start()
        if self._http is not None:
            self._http.start()
        self.membership.start(self._clients)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        log.info("router serves ext_proc on %s", self._settings.listen)

    async def stop(self) -> None:
        """Turn NOT_SERVING, let running exchanges finish for `drain_s`, then close."""
        self._draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.gather(*(server.stop(self._settings.drain_s) for server in self._grpc))
        await self.membership.stop()
        await self._residency.close()
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        if self._http is not None:
            await self._http.stop()

    def _why_not_ready(self) -> str | None:
        return "draining" if self._draining else None

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in HEALTH_NAMES:
            if not (self._draining and name == "liveness"):  # a draining process lives
                await self._health.set(name, status)

    def _serve(self, address: str, *, ext_proc: bool) -> grpc.aio.Server:
        server = grpc_server(self._settings.max_streams)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if ext_proc:
            handler = grpc.stream_stream_rpc_method_handler(self._process)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXT_PROC_SERVICE, {"Process": handler}),))
        listen_grpc(server, address)
        return server

    async def _process(self, _requests: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        await self.processor.run(_GrpcStream(context))


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run a router until `stop` is set."""
    server = Server(settings)
    try:
        await server.start()
        await stop.wait()
    finally:
        await server.stop()
