"""What a sidecar before a decoding engine is told by a real Envoy, and that conversations keep their engines."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from extproc.config.read import parse
from extproc.envoyconfig import render
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.stack import envoy_binary
from tests.fakes.wait import PATIENCE_S

WORDS = "lorem ipsum dolor sit amet " * 60
PREFILLERS = ("10.0.1.1:8000", "10.0.1.2:8000")  # that only a sidecar would connect to
OBEYED = ("x-llm-d-prefiller-host-port", "x-prefiller-host-port", "x-encoder-hosts-ports", "x-data-parallel-host-port", "x-kv-cache-source-host-port")


class Sidecars:
    """Two, one before each decoding engine; each says who it is, and what it was told."""

    def __init__(self) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async def answer(request: web.Request) -> web.Response:
            await request.read()
            told = {name: request.headers.getall(name) for name in OBEYED if name in request.headers}
            return web.json_response({"decodes": "{}:{}".format(*request.get_extra_info("sockname")), "told": told})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        for address in self.addresses:
            await web.TCPSite(runner, "127.0.0.1", int(address.rpartition(":")[2])).start()
        try:
            yield
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def gateway(sidecars: Sidecars) -> AsyncIterator[str]:
    """A real Envoy and a router, with a pool that decodes and one that computes its prompts."""
    envoy, router = (f"127.0.0.1:{port}" for port in free_ports(2))
    raw: dict[str, Any] = {
        "pools": [
            {"name": "decode", "role": "decode", "base_models": ["base"], "endpoints": [{"address": address} for address in sidecars.addresses]},
            {"name": "prefill", "role": "prefill", "base_models": ["base"], "endpoints": [{"address": address} for address in PREFILLERS]},
        ],
        "router": {"listen": router, "health_listen": "", "http_listen": "", "balance_factor": 10},  # no engine of these is ever too busy
        "envoy": {"listen": envoy, "admin": "", "router": router},
    }
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="lora-extproc-test-") as temporary:
        settings, bootstrap = Path(temporary, "settings.yaml"), Path(temporary, "envoy.yaml")
        settings.write_text(yaml.safe_dump(raw))
        bootstrap.write_text(render(parse(raw, source="test")))
        try:
            children.append(await spawn("router", python("router", "--config", str(settings)), Path(temporary)))
            children.append(await spawn("envoy", [str(envoy_binary()), "-c", str(bootstrap), "-l", "error", "--use-dynamic-base-id"], Path(temporary)))
            async with aiohttp.ClientSession() as session:
                await until_it_serves(session, envoy)
            yield envoy
        finally:
            await stop(children, 2.0)


async def until_it_serves(session: aiohttp.ClientSession, envoy: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://{envoy}/version") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)


async def ask(session: aiohttp.ClientSession, envoy: str, *contents: str, **headers: str) -> tuple[str, dict[str, list[str]]]:
    """Which sidecar the request came to, and what it was told."""
    body = {"model": "base", "messages": [{"role": "user", "content": content} for content in contents]}
    async with session.post(f"http://{envoy}/v1/chat/completions", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}) as response:
        assert response.status == 200, await response.text()
        answer = await response.json()
        return answer["decodes"], answer["told"]


async def test_a_sidecar_is_told_the_prefiller_by_the_router_alone() -> None:
    """By both names one address, and nothing of what the client sent, of whatever else it obeys."""
    sidecars = Sidecars()
    async with sidecars.serving(), gateway(sidecars) as envoy, aiohttp.ClientSession() as session:
        hostile = {name.replace("-", "_"): "10.9.9.9:80" for name in OBEYED}
        for headers in ({}, hostile):
            decodes, told = await ask(session, envoy, "hello", **headers)
            assert decodes in sidecars.addresses
            assert told.keys() == {"x-llm-d-prefiller-host-port", "x-prefiller-host-port"}
            [[first], [second]] = told.values()
            assert first == second
            assert first in PREFILLERS


async def test_the_turns_of_a_conversation_keep_their_engines() -> None:
    """On both sides; so does a session, whatever it asks."""
    sidecars = Sidecars()
    async with sidecars.serving(), gateway(sidecars) as envoy, aiohttp.ClientSession() as session:
        places: dict[int, set[str]] = {number: set() for number in range(10)}
        for count in range(1, 4):
            for number, seen in places.items():
                decodes, told = await ask(session, envoy, *(f"{number} {WORDS}" for _ in range(count)))
                seen.add(f"{decodes} {told['x-prefiller-host-port']}")
        assert all(len(seen) == 1 for seen in places.values())
        assert len(set.union(*places.values())) > 1  # of four pairs, by ten hashes
        assert len({(await ask(session, envoy, f"{number} {WORDS}", x_session_id="s"))[0] for number in range(6)}) == 1
