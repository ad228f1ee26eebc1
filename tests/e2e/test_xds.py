"""A real Envoy that follows the router: endpoints that come and go, routers that do, and what Envoy does not take."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from envoy_data_plane.envoy.config.cluster import v3 as cluster

from extproc.config.read import parse
from extproc.config.settings import Settings, build_pools
from extproc.core.fleet import Found
from extproc.core.placement import Snapshot
from extproc.core.standing import Standing
from extproc.envoyconfig import clusters, render
from extproc.router.server import Server
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.stack import envoy_binary
from tests.fakes.wait import PATIENCE_S

from .client import Client
from .test_rolling import until_envoy_sees


@dataclass
class Rig:
    """Engines that say who they are, and the addresses of everything. Endpoints are the engines' addresses."""

    directory: Path
    engines: list[str]
    front: str
    admin: str
    routers: list[str]
    http: list[str]
    served: Counter[str] = field(default_factory=Counter)  # requests, by engine
    children: dict[str, Child] = field(default_factory=dict)

    def settings(self, *pools: Sequence[str], router: int = 0) -> Settings:
        """Of pools with these endpoints, `base-0` being the first one's model."""
        raw: dict[str, Any] = {
            "pools": [
                {"name": f"pool-{n}", "base_models": [f"base-{n}"], "endpoints": [{"address": address} for address in pool]} for n, pool in enumerate(pools)
            ],
            "router": {
                "listen": self.routers[router],
                "health_listen": "",
                "http_listen": self.http[router],
                "lameduck_s": 0,
                "drain_s": 1,
                "no_endpoint_wait_s": 0,
                "hold_down_s": 0,
                "steering": "endpoint" if len(pools) == 1 else "cluster",
            },
            "envoy": {
                "listen": self.front,
                "admin": self.admin,
                "router": ",".join(self.routers),
                "router_health_interval_s": 0.2,
                "health_interval_s": 0.2,
            },
        }
        return parse(raw, source="test")

    async def start_envoy(self, binary: Path, settings: Settings) -> None:
        file = self.directory / "envoy.yaml"
        file.write_text(await asyncio.to_thread(render, settings))
        command = [str(binary or envoy_binary()), "-c", str(file), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id"]
        self.children["envoy"] = await spawn("envoy", command, self.directory)

    async def start_router(self, number: int, settings: Settings) -> None:
        """As a process of its own."""
        file = self.directory / f"router-{number}.yaml"
        file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        self.children[f"router-{number}"] = await spawn(f"router-{number}", python("router", "--config", str(file)), self.directory)

    async def kill(self, number: int) -> None:
        process = self.children[f"router-{number}"].process
        process.kill()
        await process.wait()

    async def known(self) -> set[str]:
        """The endpoints that Envoy has."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.admin}/clusters") as response:
            lines = (await response.text()).splitlines()
        return {line.split("::")[1] for line in lines if line.startswith("pool-") and "::cx_active::" in line}

    async def until_known(self, *addresses: str) -> None:
        """Wait until Envoy takes clients, and has these endpoints and no others."""
        async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://{self.admin}/ready") as response:
                        is_ready = response.status == 200
                    if is_ready and await self.known() == set(addresses):
                        return
                await asyncio.sleep(0.02)

    async def streams(self, number: int) -> float:
        """xDS streams at a router that is a process."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.http[number]}/metrics") as response:
            return next(float(line.split()[1]) for line in (await response.text()).splitlines() if line.startswith("lora_extproc_xds_streams "))

    async def ask(self, model: str = "base-0", times: int = 1) -> set[tuple[int, str]]:
        """Statuses and who answered."""
        client = Client(self.front)
        try:
            answers = [await client.chat(model) for _ in range(times)]
        finally:
            await client.close()
        return {(answer.status, answer.json.get("engine", "")) for answer in answers}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Three engines, room for two routers and an Envoy; all end with the test."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(9)]
    rig = Rig(tmp_path, addresses[:3], addresses[3], addresses[4], addresses[5:7], addresses[7:9])
    async with contextlib.AsyncExitStack() as stack:
        for address in rig.engines:
            stack.push_async_callback(await _engine(address, rig.served))
        stack.push_async_callback(lambda: stop(list(rig.children.values()), 2.0))
        yield rig


async def _engine(address: str, served: Counter[str]) -> Callable[[], Any]:
    """Answers everything with its address; returns how to stop it."""

    async def anything(request: web.Request) -> web.Response:
        await request.read()
        if request.path != "/health":
            served[address] += 1
        return web.json_response({"engine": address})

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", anything)
    runner = web.AppRunner(app)
    await runner.setup()
    host, _, port = address.rpartition(":")
    await web.TCPSite(runner, host, int(port)).start()
    return runner.cleanup


@contextlib.asynccontextmanager
async def serving(settings: Settings, more: dict[str, bytes] | None = None) -> AsyncIterator[Server]:
    """A router in this process, with `more` clusters than those of its settings."""
    server = Server(settings, clusters(settings) | (more or {}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def becomes(server: Server, settings: Settings) -> None:
    """The fleet is that of other settings, and whatever joins has joined."""
    assert server.xds is not None
    membership = server.membership
    await membership.apply({pool.name: [Found(endpoint) for endpoint in pool.members()] for pool in settings.pools})
    async with asyncio.timeout(PATIENCE_S):
        while any(standing is Standing.JOINING for standing, _ in membership.snapshot.standings.values()):
            await membership.changed(PATIENCE_S)
    await server.xds.until_known([endpoint.address for pool in settings.pools for endpoint in pool.members()])


async def test_an_endpoint_that_comes_is_used_and_one_that_goes_is_not(rig: Rig, envoy: Path) -> None:
    """Without a restart of Envoy or the router; what is gone is not kept until its health check fails."""
    a, b, _ = rig.engines
    async with serving(rig.settings([a])) as server:
        await rig.start_envoy(envoy, rig.settings([a]))
        await rig.until_known(a)
        assert await rig.ask() == {(200, a)}
        await becomes(server, rig.settings([a, b]))
        assert await rig.ask(times=4) == {(200, a), (200, b)}
        assert await rig.known() == {a, b}
        await becomes(server, rig.settings([b]))
        assert await rig.ask(times=4) == {(200, b)}
        await rig.until_known(b)


async def test_no_request_fails_while_endpoints_come_and_go(rig: Rig, envoy: Path) -> None:
    """An endpoint is named in a request when every Envoy has acknowledged it, and forgotten by Envoy when nothing is sent there any more."""
    a, b, c = rig.engines
    statuses: Counter[int] = Counter()

    async def load(client: Client) -> None:
        while True:
            statuses[(await client.chat("base-0")).status] += 1

    async with serving(rig.settings([a])) as server:
        await rig.start_envoy(envoy, rig.settings([a]))
        await rig.until_known(a)
        client = Client(rig.front)
        loads = [asyncio.create_task(load(client)) for _ in range(4)]
        try:
            for pool in ([a, b], [b], [b, c], [c], [a, c], [a]) * 5:
                await becomes(server, rig.settings(pool))
                before = statuses.total()
                while statuses.total() < before + 8:
                    await asyncio.sleep(0)
        finally:
            for task in loads:
                task.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
            await client.close()
    assert statuses.keys() == {200}
    assert all(rig.served[address] for address in rig.engines)


async def test_pools_are_clusters_of_their_own(rig: Rig, envoy: Path) -> None:
    """With steering by cluster. The second has no endpoint at first, which holds up Envoy's start for a moment and nothing else."""
    a, b, c = rig.engines
    async with serving(rig.settings([a], [])) as server:
        await rig.start_envoy(envoy, rig.settings([a], []))
        await rig.until_known(a)
        assert await rig.ask() == {(200, a)}
        assert {status for status, _ in await rig.ask("base-1")} == {503}
        await becomes(server, rig.settings([a], [b, c]))
        assert await rig.ask("base-1", times=4) == {(200, b), (200, c)}
        assert await rig.ask() == {(200, a)}


async def test_envoy_goes_on_without_the_router_it_followed_and_follows_another(rig: Rig, envoy: Path) -> None:
    """One of two is killed: the other says the same version, so nothing changes. With both gone Envoy keeps its endpoints; one that returns is followed."""
    a, b, _ = rig.engines
    for number in (0, 1):
        await rig.start_router(number, rig.settings([a, b], router=number))
    await rig.start_envoy(envoy, rig.settings([a, b]))
    await rig.until_known(a, b)
    await until_envoy_sees(rig.admin, rig.routers)
    assert await rig.ask(times=4) == {(200, a), (200, b)}
    followed = 0 if await rig.streams(0) else 1
    await rig.kill(followed)
    assert await rig.ask(times=20) >= {(200, a), (200, b)}
    async with asyncio.timeout(PATIENCE_S):
        while not await rig.streams(1 - followed):
            await asyncio.sleep(0.02)
    await rig.kill(1 - followed)
    assert {status for status, _ in await rig.ask(times=2)} == {503}
    assert await rig.known() == {a, b}
    await rig.start_router(followed, rig.settings([b], router=followed))
    await rig.until_known(b)
    async with asyncio.timeout(PATIENCE_S):
        while (answers := await rig.ask(times=2)) != {(200, b)}:
            assert {status for status, _ in answers} <= {200, 503}  # until the health check has found it


async def test_what_envoy_rejects_is_logged_and_changes_nothing(rig: Rig, envoy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cluster that is no cluster: Envoy says why, goes on, and takes the next version."""
    a, b, _ = rig.engines
    broken = bytes(cluster.Cluster(name="pool-1", type=cluster.ClusterDiscoveryType.EDS))
    caplog.set_level(logging.INFO, "extproc.router.xds")
    async with serving(rig.settings([a]), {"pool-1": broken}) as server:
        await rig.start_envoy(envoy, rig.settings([a]))
        await rig.until_known(a)
        assert server.xds is not None
        server.xds.update(Snapshot(build_pools(rig.settings([a], [b]))))
        async with asyncio.timeout(PATIENCE_S):
            while "rejects clusters" not in caplog.text:
                await asyncio.sleep(0.02)
        assert "Envoy 'lora-extproc' rejects clusters of version" in caplog.text
        assert "pool-1" in caplog.text.partition("rejects clusters")[2]
        assert await rig.ask() == {(200, a)}
        caplog.clear()
        await becomes(server, rig.settings([a, b]))
        assert await rig.ask(times=4) == {(200, a), (200, b)}
        assert "has taken clusters" in caplog.text
