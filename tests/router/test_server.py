"""The router as a process: what it serves besides ext_proc, and how it stops."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.config import parse
from extproc.errors import StartError
from extproc.router.health import NAMES
from extproc.router.server import PROCESS_METHOD, Server
from extproc.up.processes import free_ports

from .fakes import body, headers
from .test_http2 import open_stream

Status = health_pb2.HealthCheckResponse


@contextlib.asynccontextmanager
async def running(**router: object) -> AsyncIterator[tuple[Server, dict[str, str]]]:
    names = ("listen", "health_listen", "http_listen")
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(3), strict=True)}
    pools = [{"name": "models", "base_models": ["base"], "endpoints": [{"address": "127.0.0.1:1", "stager": f"127.0.0.1:{free_ports(1)[0]}"}]}]
    server = Server(parse({"pools": pools, "router": {**addresses, **router}}, source="test"))
    await server.start()
    try:
        yield server, addresses
    finally:
        await server.stop()


async def ask_health(address: str, name: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        return int(reply.status)


@pytest.mark.parametrize("name", NAMES)
async def test_every_name_gateways_ask_for_is_serving(name: str) -> None:
    """On the ext_proc port and on the port for probes."""
    async with running() as (_, addresses):
        for port in ("listen", "health_listen"):
            assert await ask_health(addresses[port], name) == Status.SERVING


async def test_an_unknown_name_is_not_found() -> None:
    """As the health protocol demands."""
    async with running() as (_, addresses):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask_health(addresses["listen"], "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watch_sees_the_drain() -> None:
    """SERVING, then NOT_SERVING; liveness stays."""
    async with running(drain_s=5) as (server, addresses), grpc.aio.insecure_channel(addresses["health_listen"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        readiness, liveness = (stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("readiness", "liveness"))
        assert [(await call.read()).status for call in (readiness, liveness)] == [Status.SERVING, Status.SERVING]
        stopping = asyncio.create_task(server.stop())
        assert [(await call.read()).status for call in (readiness, liveness)] == [Status.NOT_SERVING, Status.SERVING]
        readiness.cancel()
        liveness.cancel()
        await stopping


async def test_a_held_request_is_answered_while_draining() -> None:
    """Its stream was open; new connections are refused."""
    async with running(drain_s=30) as (server, addresses), grpc.aio.insecure_channel(addresses["listen"]) as channel:
        call = open_stream(channel, PROCESS_METHOD)
        await call.write(headers().SerializeToString())
        await asyncio.sleep(0)
        await ask_health(addresses["listen"], "")  # by now the stream has been read
        stopping = asyncio.create_task(server.stop())
        await call.write(body(b'{"model":"base"}').SerializeToString())
        assert await call.read()
        await call.done_writing()
        await stopping


async def test_the_http_side_says_how_things_are() -> None:
    """Liveness, readiness, metrics, owners, endpoints, and the page that documents them."""
    async with running() as (_, addresses), aiohttp.ClientSession(f"http://{addresses['http_listen']}") as session:
        for path, part in {
            "/healthz": '"ok"',
            "/readyz": '"ready"',
            "/metrics": 'lora_extproc_build_info{version="',
            "/v1/owner/demo/sql": '"no_endpoint"',
            "/v1/owner//x": '"invalid_request"',
            "/v1/endpoints": '"pool":"models"',
            "/openapi.json": "/v1/owner/{model}",
        }.items():
            async with session.get(path) as response:
                assert (response.status, part in await response.text()) == (200, True), path


async def test_a_busy_port_is_a_start_error() -> None:
    """Named in the sentence."""
    async with running() as (_, addresses):
        with pytest.raises(StartError, match=addresses["listen"]):
            async with running(listen=addresses["listen"]):
                pass
