"""The stager's gRPC service and its client, over a real server: what is true on one side is true on the other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from httpx import ASGITransport, AsyncClient

from extproc.client import Evicted, NodeState, Published, Space, StagerClient, WatchEvent
from extproc.core.artifact import adapter_name
from extproc.errors import BY_NAME, AdapterInUse, InvalidRequest, LoraExtprocError, ModelNotFound, StageError, StagerUnavailable
from extproc.process.grpc import grpc_server
from extproc.process.sockets import listen
from extproc.stager.api.grpc import StagerService
from extproc.stager.api.http import stager_app
from extproc.stager.stager import Stager
from tests.fakes.adapters import WEIGHTS, size_of, small_files
from tests.fakes.engine import running_engine
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

from ..conftest import OpenStager

Serve = Callable[..., Awaitable[tuple[Stager, grpc.aio.Server, StagerClient]]]


def below(kind: type[LoraExtprocError]) -> dict[str, type[LoraExtprocError]]:
    """The class and all that is derived from it, in whatever module, by name."""
    found = {kind.__name__: kind}
    for sub in kind.__subclasses__():
        found |= below(sub)
    return found


CROSSING = {**BY_NAME, **below(StageError)}


def digest_of(stager: Stager, name: str) -> str:
    named = stager.node.holdings.get(adapter_name(name))
    assert named is not None
    return named.digest


async def changes(client: StagerClient) -> AsyncIterator[WatchEvent]:
    """A watch without the budget, which is told when the house is kept, once a second."""
    async for event in client.watch():
        if not isinstance(event, Space):
            yield event


@pytest.fixture
async def serve(open_stager: OpenStager, origin: FakeOrigin) -> AsyncIterator[Serve]:
    servers: list[grpc.aio.Server] = []
    clients: list[StagerClient] = []

    async def start(**settings: Any) -> tuple[Stager, grpc.aio.Server, StagerClient]:
        stager = await open_stager(origin, **settings)
        server = grpc_server()
        StagerService(stager).register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        clients.append(StagerClient(f"127.0.0.1:{port}"))
        return stager, server, clients[-1]

    yield start
    for client in clients:
        await client.close()
    for server in servers:
        await server.stop(None)


async def test_ensure_tells_what_was_staged(serve: Serve, origin: FakeOrigin) -> None:
    """Cold, then warm; numbers and words arrive as they were sent."""
    files = small_files()
    origin.add("acme/ü", files)
    stager, _, client = await serve()
    cold, warm = await client.ensure("acme/ü"), await client.ensure("acme/ü")
    assert (cold.staged, warm.staged) == (True, False)
    assert cold.digest == warm.digest == digest_of(stager, "acme/ü")
    assert (cold.origin, cold.bytes, cold.lease_s) == ("fake", size_of(files), 300.0)


async def test_list_is_least_recently_used_first(serve: Serve, origin: FakeOrigin, clock: Clock) -> None:
    """With the budget, the idle time and the lease of each."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    origin.add("acme/same", small_files(seed=0))
    stager, _, client = await serve(max_bytes=10**9)
    for name in ("acme/a", "acme/b", "acme/same"):
        await client.ensure(name)
        clock.now += 10
    clock.now += 285
    reply = await client.list()
    assert [adapter.name for adapter in reply.adapters] == ["acme/b", "acme/a", "acme/same"]
    first = reply.adapters[0]
    assert (first.digest, first.origin, first.revision) == (digest_of(stager, "acme/b"), "fake", "1")
    assert (first.idle_seconds, first.leased_seconds) == (305.0, 0.0)
    assert reply.adapters[1].leased_seconds == pytest.approx(5.0)
    size = size_of(small_files())
    assert (reply.used_bytes, reply.reserved_bytes, reply.max_bytes, first.bytes) == (2 * size, 0, 10**9, size)


async def test_evict_tells_the_bytes(serve: Serve, origin: FakeOrigin, clock: Clock) -> None:
    """Or why not: leased, or not there."""
    origin.add("acme/a", small_files())
    _, _, client = await serve()
    with pytest.raises(ModelNotFound):
        await client.evict("acme/a")
    await client.ensure("acme/a")
    with pytest.raises(AdapterInUse, match="300 s more"):
        await client.evict("acme/a")
    clock.now += 1000
    assert await client.evict("acme/a") == size_of(small_files())
    assert list((await client.list()).adapters) == []


@pytest.mark.parametrize("name", sorted(CROSSING))
async def test_every_error_survives_the_crossing(serve: Serve, origin: FakeOrigin, name: str) -> None:
    """Its class, and with it status, reason, and whether a retry or another node may help; and its text."""
    kind = CROSSING[name]
    origin.add("acme/a", small_files())
    origin.fetch_failures = [kind("why: ü, 5 of 4") for _ in range(10)]
    _, _, client = await serve()
    with pytest.raises(LoraExtprocError) as raised:
        await client.ensure("acme/a")
    assert type(raised.value).__name__ == name
    assert raised.value.message == "why: ü, 5 of 4"
    assert (raised.value.status, raised.value.reason, raised.value.retryable) == (kind.status, kind.reason, kind.retryable)
    assert raised.value.shared == kind.shared


async def test_an_unusable_name_is_refused(serve: Serve) -> None:
    """Whoever calls; a router has refused it before."""
    _, _, client = await serve()
    for call in (client.ensure("../up"), client.evict("../up")):
        with pytest.raises(InvalidRequest):
            await call


async def test_a_fault_of_the_stager_is_the_stager_s(serve: Serve, origin: FakeOrigin) -> None:
    """An exception nobody thought of: another node may serve."""
    origin.resolve_failures = [RuntimeError("bug")]
    _, _, client = await serve()
    with pytest.raises(StagerUnavailable) as raised:
        await client.ensure("acme/a")
    assert not raised.value.shared


async def test_a_client_that_goes_away_ends_its_wait_not_the_fetch(serve: Serve, origin: FakeOrigin) -> None:
    """The handler of its call ends; the flight goes on."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    stager, _, client = await serve()
    waiting = asyncio.create_task(client.ensure("acme/a"))
    await stall.reached.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    await until(lambda: not stager._in_flight.waiters("acme/a"))  # type: ignore[arg-type]
    stall.release()
    await until(lambda: "acme/a" in set(stager.node.holdings))
    assert not (await client.ensure("acme/a")).staged
    assert set(origin.fetched.values()) == {1}


async def test_watch_gives_the_state_then_every_change(serve: Serve, origin: FakeOrigin, clock: Clock) -> None:
    """Nothing between the two is missed; what was there before is not told."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    stager, _, client = await serve()
    await client.ensure("acme/a")
    watching = changes(client)
    assert await anext(watching) == NodeState(True, "", stager.instance)
    await client.ensure("acme/b")
    assert await anext(watching) == Published("acme/b")
    clock.now += 1000
    await client.evict("acme/a")
    assert await anext(watching) == Evicted("acme/a")


async def test_watch_tells_when_the_node_is_ready(serve: Serve, node: Path) -> None:
    """Not before its engine is."""
    async with running_engine(node) as engine:
        stager, _, client = await serve(engine_url=engine.url)
        seen: list[tuple[bool, str, str]] = []
        async for state in changes(client):
            assert isinstance(state, NodeState)
            seen.append((state.ready, state.why, state.instance))
            if state.ready:
                break
        # the engine may have been asked before the watch came
        assert seen[-2:] in ([(True, "", stager.instance)], [(False, "the engine was not asked yet", stager.instance), (True, "", stager.instance)])


async def test_a_watcher_that_goes_away_is_forgotten(serve: Serve) -> None:
    """Its queue would grow for ever."""
    stager, _, client = await serve()
    watching = client.watch()
    await anext(watching)
    assert len(stager.node.changes._watchers) == 1
    await client.close()
    await until(lambda: not stager.node.changes._watchers)


async def test_a_stager_that_goes_away_is_unavailable(serve: Serve, origin: FakeOrigin) -> None:
    """Both for who waits and for who watches."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    _, server, client = await serve()
    waiting = asyncio.create_task(client.ensure("acme/a"))
    await stall.reached.wait()
    watching = changes(client)
    await anext(watching)
    await server.stop(None)
    with pytest.raises(StagerUnavailable):
        await waiting
    with pytest.raises(StagerUnavailable):
        await anext(watching)
    with pytest.raises(StagerUnavailable):
        await client.ensure("acme/a")


async def test_a_closed_port_is_unavailable() -> None:
    """Noticed at once, not after TCP's minutes."""
    with listen("127.0.0.1:0") as free:
        port = free.getsockname()[1]
    async with StagerClient(f"127.0.0.1:{port}") as client:
        for call in (client.ensure("a"), client.list(), client.evict("a"), anext(client.watch())):
            with pytest.raises(StagerUnavailable):
                await call


async def test_the_control_api_shows_the_same(serve: Serve, origin: FakeOrigin) -> None:
    """What is on disk, whether the node is ready, metrics."""
    origin.add("acme/a", small_files())
    stager, _, client = await serve()
    await client.ensure("acme/a")
    async with AsyncClient(transport=ASGITransport(stager_app(stager)), base_url="http://stager") as http:
        shown = (await http.get("/v1/adapters")).json()
        assert [adapter["name"] for adapter in shown["adapters"]] == ["acme/a"]
        assert int(shown["used_bytes"]) == size_of(small_files())
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        stager.node.readiness.set("engine", "the engine is not healthy")
        unready = await http.get("/readyz")
        assert (unready.status_code, unready.json()["why"]) == (503, "the engine is not healthy")
        assert 'lora_extproc_ensures_total{result="staged"} 1.0' in (await http.get("/metrics")).text
    await turns()
