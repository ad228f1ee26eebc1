"""The router as a process: what it serves besides ext_proc, and how it stops."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.config.credentials import TlsSettings
from extproc.config.discovery import DiscoverySettings
from extproc.config.read import parse
from extproc.core.endpoint import Endpoint
from extproc.core.standing import Standing
from extproc.discovery.discovery import Discovery
from extproc.errors import StartError
from extproc.pb import xds_pb2 as pb
from extproc.router.health import NAMES
from extproc.router.server import PROCESS_METHOD, Server
from extproc.router.tls import Certificate, self_signed
from extproc.router.xds import METHODS, TYPES, Kind
from extproc.up.processes import free_ports
from tests.discovery.scripted import ScriptedSource
from tests.fakes.wait import until

from .fakes import body, headers
from .test_http2 import open_stream

Status = health_pb2.HealthCheckResponse


@contextlib.asynccontextmanager
async def running(**router: object) -> AsyncIterator[tuple[Server, dict[str, str]]]:
    names = ("listen", "health_listen", "http_listen")
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(3), strict=True)}
    pools = [{"name": "models", "base_models": ["base"], "endpoints": [{"address": "127.0.0.1:1", "stager": f"127.0.0.1:{free_ports(1)[0]}"}]}]
    server = Server(parse({"pools": pools, "router": {"lameduck_s": 0, **addresses, **router}}, source="test"))
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
            "/v1/owner/demo/sql": '"model":"demo/sql"',
            "/v1/owner//x": '"invalid_request"',
            "/v1/endpoints": '"standing":"',
            "/openapi.json": "/v1/owner/{model}",
        }.items():
            async with session.get(path) as response:
                assert (response.status, part in await response.text()) == (200, True), path


async def test_an_endpoint_that_is_gone_is_shown_with_its_reason() -> None:
    """Its stager cannot be reached, and its engine does not answer either: nobody owns a key then."""
    async with running() as (server, addresses), aiohttp.ClientSession(f"http://{addresses['http_listen']}") as session:
        await until(lambda: server.membership.snapshot.standing(Endpoint("127.0.0.1:1")) is Standing.DOWN)
        async with session.get("/v1/endpoints") as response:
            [shown] = await response.json()
        assert (shown["standing"], shown["down"]) == ("down", shown["why"])
        assert shown["why"].endswith("its engine does not answer either")
        async with session.get("/v1/owner/demo/sql") as response:
            assert (await response.json())["error"] == "no_endpoint"


async def test_a_busy_port_is_a_start_error() -> None:
    """Named in the sentence."""
    async with running() as (_, addresses):
        with pytest.raises(StartError, match=addresses["listen"]):
            async with running(listen=addresses["listen"]):
                pass


async def test_new_requests_are_taken_until_the_gateways_know() -> None:
    """Lame duck: NOT_SERVING already, and still serving."""
    async with running(lameduck_s=0.3, drain_s=1) as (server, addresses):
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        assert await ask_health(addresses["listen"], "") == Status.NOT_SERVING
        async with grpc.aio.insecure_channel(addresses["listen"]) as channel:
            call = open_stream(channel, PROCESS_METHOD)
            await call.write(headers().SerializeToString())
            await call.write(body(b'{"model":"base"}').SerializeToString())
            assert await call.read()
            await call.done_writing()
        await stopping


async def test_tls_with_a_certificate_made_at_start() -> None:
    """ALPN h2; what a gateway that does not verify connects to."""
    async with running(tls={"mode": "self-signed"}) as (_, addresses):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection(*addresses["listen"].split(":"), ssl=context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        writer.close()
        assert await ask_health(addresses["health_listen"], "") == Status.SERVING


async def test_tls_with_given_files_that_are_replaced(tmp_path: Path) -> None:
    """The new pair is used for new connections; a broken pair leaves the old one in use."""
    names = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    settings = TlsSettings(mode="files", cert_file=str(names[0]), key_file=str(names[1]))

    def replace(pair: tuple[bytes, bytes], when: int) -> None:
        for name, text in zip(names, pair, strict=True):
            name.write_bytes(text)
            os.utime(name, (when, when))

    first, second = self_signed(("first",)), self_signed(("second",))
    replace(first, 1)
    certificate = Certificate(settings)
    assert not certificate.reload_if_changed()
    replace((second[0], first[1]), 2)
    assert not certificate.reload_if_changed()
    replace(second, 3)
    assert certificate.reload_if_changed()
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=certificate.context)
    context = ssl.create_default_context(cadata=second[0].decode())
    port = server.sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="second")
    writer.close()
    server.close()


def test_tls_files_that_cannot_be_used_are_a_start_error(tmp_path: Path) -> None:
    """Named in the sentence."""
    with pytest.raises(StartError, match=r"cert\.pem"):
        Certificate(TlsSettings(mode="files", cert_file=str(tmp_path / "cert.pem"), key_file=str(tmp_path / "key.pem")))


async def test_envoys_are_told_nothing_before_the_fleet_has_been_found() -> None:
    """One that has followed another replica would lose the endpoints that this one does not know yet."""
    source = ScriptedSource()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    router = {"listen": address, "health_listen": "", "http_listen": "", "lameduck_s": 0}
    server = Server(parse({"pools": [{"name": "models", "endpoints": [{"address": "127.0.0.1:1"}]}], "router": router}, source="test"), clusters={})
    server._discovery = Discovery({"models": [source]}, DiscoverySettings(first_wait_s=60), server.metrics.discovery)
    starting = asyncio.create_task(server.start())
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            call = open_stream(channel, next(iter(METHODS)))
            await call.write(pb.DiscoveryRequest(type_url=TYPES[Kind.ENDPOINTS], resource_names=["models"]).SerializeToString())
            await until(lambda: server.metrics.registry.get_sample_value("lora_extproc_xds_streams"))
            assert not starting.done()
            source.show("127.0.0.1:1", "127.0.0.1:2")
            response = pb.DiscoveryResponse.FromString(await call.read())
            assignment = pb.ClusterLoadAssignment.FromString(response.resources[0].value)
            assert [member.endpoint.address.socket_address.port_value for member in assignment.endpoints[0].lb_endpoints] == [1, 2]
            await starting
    finally:
        await server.stop()


async def test_a_router_is_not_ready_before_the_fleet_has_been_found() -> None:
    """Neither by HTTP nor by gRPC: a gateway that hears NOT_SERVING from one that was called ready may not ask it again for a minute."""
    source = ScriptedSource()
    address, http = (f"127.0.0.1:{port}" for port in free_ports(2))
    router = {"listen": address, "health_listen": "", "http_listen": http, "lameduck_s": 0}
    server = Server(parse({"pools": [{"name": "models", "endpoints": [{"address": "127.0.0.1:1"}]}], "router": router}, source="test"), clusters={})
    server._discovery = Discovery({"models": [source]}, DiscoverySettings(first_wait_s=60), server.metrics.discovery)
    starting = asyncio.create_task(server.start())
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
        async with aiohttp.ClientSession(f"http://{http}") as session:
            for status, serving in ((503, Status.NOT_SERVING), (200, Status.SERVING)):
                async with session.get("/readyz") as response:
                    assert response.status == status
                assert await ask_health(address, "readiness") == serving
                source.show("127.0.0.1:1")
                await starting
    finally:
        await server.stop()
