"""Clients as they are: old protocols, pages in browsers, odd but legal requests, and paths that are nobody's business. One engine, which says what it got."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from extproc.config.read import parse
from extproc.envoyconfig import render
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.stack import envoy_binary

from .client import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "base"
CHAT = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "hi"}]}).encode()
MODES = ("FULL_DUPLEX_STREAMED", "BUFFERED", "NONE")


@dataclass(frozen=True)
class Rig:
    mode: str
    address: str
    client: Client
    seen: list[tuple[str, str, dict[str, str]]]  # what came through to the engine: method, path, headers


def engine(seen: list[tuple[str, str, dict[str, str]]]) -> web.Application:
    """Answers everything with what it got; speaks WebSocket."""

    async def anything(request: web.Request) -> web.StreamResponse:
        seen.append((request.method, request.raw_path, {name.lower(): value for name, value in request.headers.items()}))
        if request.headers.get("upgrade", "").lower() == "websocket":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                await socket.send_str(f"echo {message.data}")
            return socket
        body = await request.read()
        return web.json_response({"method": request.method, "path": request.raw_path, "bytes": len(body)})

    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{rest:.*}", anything)
    return app


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=MODES)
async def rig(request: pytest.FixtureRequest, envoy: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    directory = tmp_path_factory.mktemp("clients")
    server, router, http, front = (f"127.0.0.1:{port}" for port in free_ports(4))
    raw: dict[str, Any] = {
        "pools": [{"name": "models", "base_models": [BASE], "endpoints": [{"address": server}]}],
        "router": {"listen": router, "health_listen": "", "http_listen": http, "lameduck_s": 0},
        "envoy": {"listen": front, "admin": "", "router": router, "processing_mode": request.param, "health_interval_s": 0.2},
    }
    (directory / "settings.yaml").write_text(yaml.safe_dump(raw))
    (directory / "envoy.yaml").write_text(render(parse(raw, source="test")))
    seen: list[tuple[str, str, dict[str, str]]] = []
    children: list[Child] = []
    async with contextlib.AsyncExitStack() as stack:
        runner = web.AppRunner(engine(seen))
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", int(server.rpartition(":")[2])).start()
        stack.push_async_callback(stop, children, 2.0)
        children.append(await spawn("router", python("router", "--config", str(directory / "settings.yaml")), directory))
        command = [str(envoy or envoy_binary()), "-c", str(directory / "envoy.yaml"), "--concurrency", "1", "-l", "error", "--use-dynamic-base-id"]
        children.append(await spawn("envoy", command, directory))
        client = Client(front)
        stack.push_async_callback(client.close)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await client.send("GET", "/health")).status == 200:
                        break
                await asyncio.sleep(0.05)
        yield Rig(request.param, front, client, seen)


async def raw_exchange(address: str, text: bytes) -> bytes:
    """What comes back for these bytes, until the connection ends or nothing more comes."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text)
    try:
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
            return head + await reader.readexactly(length)
    finally:
        writer.close()


async def test_http_1_0_is_spoken(rig: Rig) -> None:
    """As nginx does unless told otherwise."""
    named = b"x-gateway-model-name: base\r\n" if rig.mode == "NONE" else b""
    head = b"POST /v1/chat/completions HTTP/1.0\r\n" + named + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(CHAT)
    assert b" 200 OK\r\n" in await raw_exchange(rig.address, head + CHAT)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
async def test_content_of_a_request_that_needs_none_means_nothing(rig: Rig, method: str) -> None:
    """requests.get(url, json={}) and axios send JSON with a GET."""
    answer = await rig.client.send(method, "/version", b"{}", content_type="application/json")
    assert answer.status == 200
    assert (method, "/version") in [(seen[0], seen[1]) for seen in rig.seen]


@pytest.mark.parametrize("path", ["/v1/responses/resp_1/cancel", "/ping"])
async def test_state_and_health_need_no_model(rig: Rig, path: str) -> None:
    """Whatever stands in their bodies."""
    for body in (b"{}", b"", b"not JSON"):
        assert (await rig.client.send("POST", path, body, content_type="application/json")).status == 200


async def test_engines_own_paths_take_the_base_model_where_none_is_named(rig: Rig) -> None:
    """The OpenAI API's paths want a name."""
    assert (await rig.client.send("POST", "/tokenize", b'{"prompt":"x"}', content_type="application/json")).status == 200
    refused = await rig.client.send("POST", "/v1/completions", b'{"prompt":"x"}', content_type="application/json")
    assert refused.status == (200 if rig.mode == "NONE" else 400)


@pytest.mark.parametrize(
    "path",
    [
        "/pause",
        "/load_lora_adapter",
        "/v1/load_lora_adapter",
        "/update_weights_from_disk",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/%70ause",
        "/sleep/",
        "//pause",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
async def test_administration_never_reaches_the_engine(rig: Rig, method: str, path: str) -> None:
    """By no method, no spelling and no body."""
    rig.seen.clear()
    body = gzip.compress(CHAT) if method == "PUT" else CHAT
    answer = await rig.client.send(method, path, body, content_type="application/json", **({"content_encoding": "gzip"} if method == "PUT" else {}))
    assert answer.status == 403
    assert not [path for _, path, _ in rig.seen if path != "/health"]


async def test_unknown_paths_are_404(rig: Rig) -> None:
    """With a reason of their own."""
    answer = await rig.client.send("POST", "/v1/batches", b"{}", content_type="application/json")
    assert (answer.status, answer.code) == (404, "unknown_path")


async def test_pages_may_read_what_the_router_answers(rig: Rig) -> None:
    """The list of models, errors, and the gateway's own errors."""
    for path in ("/v1/models", "/v1/models/base", "/v1/models/none", "/nowhere"):
        assert (await rig.client.send("GET", path, origin="http://page")).headers["access-control-allow-origin"] == "*"


async def test_a_models_card_is_answered_like_the_list(rig: Rig) -> None:
    """openai's client.models.retrieve."""
    card = await rig.client.send("GET", "/v1/models/base")
    assert (card.status, card.json["id"]) == (200, "base")
    assert card.json == (await rig.client.send("GET", "/v1/models")).json["data"][0]
    assert (await rig.client.send("GET", "/v1/models/none")).status == 404


async def test_credentials_stay_in_envoy(rig: Rig) -> None:
    """They reach the engine; that the router is not shown them, its bootstrap's golden file tells."""
    headers = {"authorization": "Bearer secret", "cookie": "a=b", "x_gateway_model_name": BASE}
    assert (await rig.client.post(CHAT, **headers)).status == 200
    assert rig.seen[-1][2]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("encoding", ["identity", "utf-8", "none"])
async def test_encodings_that_are_none(rig: Rig, encoding: str) -> None:
    """As engines take them."""
    assert (await rig.client.post(CHAT, content_encoding=encoding, x_gateway_model_name=BASE)).status == 200


async def test_a_byte_order_mark_is_borne(rig: Rig) -> None:
    """Engines skip it."""
    assert (await rig.client.post(b"\xef\xbb\xbf" + CHAT, x_gateway_model_name=BASE)).status == 200


@pytest.mark.parametrize("time", ["1h", "1H", "", "30", "500ms"])
async def test_times_as_clients_write_them(rig: Rig, time: str) -> None:
    """An empty one says nothing."""
    assert (await rig.client.post(CHAT, x_request_timeout=time, x_gateway_model_name=BASE)).status == 200


async def test_a_bad_time_is_refused_by_name(rig: Rig) -> None:
    """For base models, too."""
    answer = await rig.client.post(CHAT, x_request_timeout="PT30S", x_gateway_model_name=BASE)
    assert answer.status == 400
    assert "x-request-timeout: 'PT30S' is no time" in answer.text


async def test_forty_megabytes_pass(rig: Rig) -> None:
    """An image of 30 MB in base64."""
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x" * 40_000_000}]}).encode()
    answer = await rig.client.post(body, x_gateway_model_name=BASE)
    assert (answer.status, answer.json["bytes"]) == (200, len(body))


async def test_too_large_a_body_is_told_the_limit(rig: Rig) -> None:
    """By the router, or in BUFFERED by Envoy in the router's words."""
    if rig.mode == "NONE":
        return  # no body is shown
    answer = await rig.client.post(CHAT + b" " * 53_000_000)
    assert answer.status == 413
    assert "52428800 bytes" in answer.text
    assert answer.json["error"]["type"] == "invalid_request_error"


async def test_unreadable_media_are_refused_by_name(rig: Rig) -> None:
    """An engine that parses such a body would be sent a model that nobody has looked at."""
    if rig.mode == "NONE":
        return  # no body is shown
    answer = await rig.client.send("POST", "/v1/chat/completions", CHAT, content_type="text/plain")
    assert (answer.status, answer.code) == (415, "unsupported_media")


async def test_websocket_passes_where_no_body_is_shown_and_is_refused_in_words_elsewhere(rig: Rig) -> None:
    """Envoy would wait for a body that never ends."""
    async with aiohttp.ClientSession() as session:
        if rig.mode == "NONE":
            async with session.ws_connect(f"http://{rig.address}/v1/realtime") as socket:
                await socket.send_str("hello")
                assert await socket.receive_str() == "echo hello"
        else:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"http://{rig.address}/v1/realtime")
            assert refused.value.status == 403


async def test_headers_that_are_too_large_are_the_clients_fault(rig: Rig) -> None:
    """Envoy's own answer, worded as such."""
    head = b"GET /health HTTP/1.1\r\nhost: x\r\nx-large: " + b"x" * 70_000 + b"\r\n\r\n"
    answer = await raw_exchange(rig.address, head)
    assert b" 431 " in answer.partition(b"\r\n")[0]
    assert b"invalid_request_error" in answer
