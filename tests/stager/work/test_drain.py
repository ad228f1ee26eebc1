"""A node that is emptied: what it still takes, when it says that nobody needs it, and what a restart and a stop make of it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.client import Drained, Loading, NodeState, StagerClient
from extproc.config.settings import Settings
from extproc.config.stager import EngineSettings, StagerSettings
from extproc.errors import DiskFailed, NodeDraining, NoEndpoint, NotPermitted, StagerUnavailable
from extproc.stager.engine import meter as meter_module
from extproc.stager.server import Server
from extproc.stager.work import drain as drain_module
from extproc.stager.work.drain import DRAIN_FILE, LEASE_S
from extproc.up.demo import BASE_MODEL
from extproc.up.processes import free_ports
from tests.fakes.adapters import write_small
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.gate import Gate
from tests.fakes.origin import FakeOrigin, origin_of
from tests.fakes.wait import Clock, until

from ..conftest import OpenStager, ServeNode, next_of

A, B, C = "acme/a", "acme/b", "acme/c"
WHY = "its disk is replaced"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks as often as a test can wait for."""
    monkeypatch.setattr(drain_module, "LOOK_S", 0.005)
    monkeypatch.setattr(drain_module, "QUIET_S", 0.02)
    for name in ("BUSY_S", "IDLE_S"):
        monkeypatch.setattr(meter_module, name, 0.01)
    monkeypatch.setattr(meter_module, "SHARE", 1.0)


@pytest.fixture
def origin() -> FakeOrigin:
    return origin_of(A, B, C)


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node, max_loras=2, max_cpu_loras=2) as running:
        yield running


def settings(engine: RunningEngine) -> EngineSettings:
    return EngineSettings(url=engine.url, base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0, max_loras=2, max_cpu_loras=2)


async def test_a_node_that_drains_takes_nothing_new(serve_node: ServeNode, engine: RunningEngine, clock: Clock) -> None:
    """What is leased or warm is leased on, for a short time; what is on disk only, or nowhere, is another node's to take."""
    node = await serve_node(engine=settings(engine))
    router, other = node.ask("router"), node.ask("other")
    await router.ensure(A)
    clock.now += 1000  # its lease has ended: it is on disk
    await router.ensure(B)
    await router.ensure(C, loading=Loading.VERSIONED)
    await router.release(C)
    drained = await router.drain(WHY)
    assert drained == Drained(draining=True, empty=False, leased=1, requests=0.0)
    for name in (A, "acme/nowhere"):
        with pytest.raises(NodeDraining, match=f"{name}: this node drains"):
            await router.ensure(name)
        with pytest.raises(NodeDraining):
            await router.ensure(name, prefetch=True)
    assert (await other.ensure(B)).lease_s == LEASE_S
    assert (await router.ensure(C, loading=Loading.VERSIONED)).lease_s == LEASE_S


def test_a_router_asks_the_next_candidate_then() -> None:
    """It says nothing of the adapter, and whoever waits can be served elsewhere."""
    assert not NodeDraining.shared
    assert NodeDraining.retryable
    assert issubclass(NodeDraining, NoEndpoint)


async def test_an_adapter_that_is_on_its_way_arrives(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Who asked for it before the drain is served."""
    stall = origin.stall(A, "adapter_model.safetensors")
    node = await serve_node()
    client = node.ask()
    asking = asyncio.create_task(client.ensure(A))
    await stall.reached.wait()
    await client.drain(WHY)
    stall.release()
    assert (await asking).lease_s == LEASE_S


async def test_watchers_hear_that_it_drains_why_and_when_it_is_empty(serve_node: ServeNode, engine: RunningEngine) -> None:
    """Empty once nothing is leased and the engine has no request; no longer, when somebody takes a lease again."""
    node = await serve_node(engine=settings(engine))
    router = node.ask("router")
    model = (await router.ensure(A, loading=Loading.VERSIONED)).model
    watching = node.ask().watch()
    assert await next_of(watching, NodeState) == NodeState(True, "", node.stager.instance)
    await router.drain(WHY)
    state = NodeState(True, f"the node is drained: {WHY}", node.stager.instance, resumed=True, draining=True)
    assert await next_of(watching, NodeState) == state
    async with engine.adapters.use(model):
        await router.release(A)
        while not (at_work := await router.drain(WHY)).requests:
            pass
        assert at_work == Drained(draining=True, empty=False, leased=0, requests=1.0)
    assert (await next_of(watching, NodeState)).empty  # type: ignore[union-attr]
    assert await router.drain(WHY) == Drained(draining=True, empty=True, leased=0, requests=0.0)
    await router.ensure(A)
    assert not (await next_of(watching, NodeState)).empty  # type: ignore[union-attr]


async def test_an_engine_that_does_not_tell_its_requests_makes_no_node_empty(serve_node: ServeNode, engine: RunningEngine) -> None:
    """It may have any number of them, as long as it is well; one that is gone has none."""
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    node.stager.node.engine._chooses_metrics = False

    async def forget_metrics(path: str) -> object:
        raise ConnectionResetError if path == "/metrics" else AssertionError(path)

    await client.drain(WHY)
    await until(lambda: node.stager.drain.is_empty)
    engine.step = forget_metrics  # type: ignore[assignment]
    await until(lambda: not node.stager.drain.is_empty)
    await engine.stop()
    await until(lambda: node.stager.drain.is_empty)


async def test_a_node_that_drains_can_be_ill_as_well(serve_node: ServeNode, engine: RunningEngine) -> None:
    """What it serves it serves no more: routers hear that it is not ready, and why."""
    node = await serve_node(engine=settings(engine))
    await node.ask().drain(WHY)
    watching = node.ask().watch()
    assert (await next_of(watching, NodeState)).ready  # type: ignore[union-attr]
    engine.is_sick = True
    while (state := await next_of(watching, NodeState)).ready:  # type: ignore[union-attr]
        pass
    assert (state.why, state.draining) == ("the engine answers 503 to /health", True)  # type: ignore[union-attr]


async def test_undrain_has_it_take_what_comes(serve_node: ServeNode) -> None:
    """As before: new adapters, and leases of the usual length."""
    node = await serve_node()
    client = node.ask()
    await client.drain(WHY)
    await until(lambda: node.stager.drain.is_empty)
    watching = node.ask().watch()
    assert (await next_of(watching, NodeState)).empty  # type: ignore[union-attr]
    assert await client.undrain() == Drained(draining=False, empty=False, leased=0, requests=0.0)
    assert await next_of(watching, NodeState) == NodeState(True, "", node.stager.instance, resumed=True)
    assert (await client.ensure(A)).lease_s == 300


async def test_an_operator_s_drain_outlives_the_stager(open_stager: OpenStager, node: Path) -> None:
    """Until the operator takes it back, which outlives it as well."""
    first = await open_stager()
    await first.drain.begin(WHY)
    await first.close()
    second = await open_stager()
    assert (second.drain.is_on, second.drain.why) == (True, f"the node is drained: {WHY}")
    await second.drain.end()
    await second.close()
    assert not (await open_stager()).drain.is_on


async def test_a_stop_is_no_drain_of_the_next_stager(open_stager: OpenStager) -> None:
    """It serves what this one has left."""
    first = await open_stager()
    first.drain.stop()
    assert first.not_ready == "the stager is stopping"
    await first.drain.end()
    assert first.drain.is_on, "an operator's undrain does not keep a process that was told to stop"
    await first.close()
    assert not (await open_stager()).drain.is_on


async def test_a_drain_that_cannot_be_written_down_counts(
    open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node whose disk fails is one that operators drain."""
    stager = await open_stager(origin)
    Gate(monkeypatch, stager.node.store, "write_json", fails=DiskFailed("the disk is broken")).open()
    with caplog.at_level(logging.WARNING):
        assert (await stager.drain.begin(WHY)).draining
    assert "after a restart of the stager it may not be known that this node is drained: the disk is broken" in caplog.messages
    with pytest.raises(NodeDraining):
        await stager.ensure(A)


async def test_a_damaged_note_of_a_drain_is_told_and_drains_nothing(open_stager: OpenStager, node: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A node that is left out for good because of a broken file would be found by nobody."""
    node.mkdir()
    (node / DRAIN_FILE).write_bytes(b"{")
    with caplog.at_level(logging.ERROR):
        assert not (await open_stager()).drain.is_on
    assert DRAIN_FILE in caplog.text


async def test_who_may_change_nothing_may_not_drain(serve_node: ServeNode) -> None:
    """Whoever reaches the port could empty the fleet."""
    client = (await serve_node(destructive=False)).ask()
    with pytest.raises(NotPermitted):
        await client.drain(WHY)


async def test_a_reason_is_one_line_of_bounded_length(open_stager: OpenStager) -> None:
    """Routers log it."""
    stager = await open_stager()
    await stager.drain.begin("two\nlines\x1b[31m " + "x" * 1000)
    assert stager.drain.why.isprintable()
    assert len(stager.drain.why) < 300


# -- the end of the process


async def stopping_server(tmp_path: Path, drain_s: float, engine_url: str = "") -> tuple[Server, StagerClient]:
    """A server with an adapter that somebody leases."""
    write_small(tmp_path / "origin" / A)
    (port,) = free_ports(1)
    origins = ({"type": "file", "path": str(tmp_path / "origin")},)
    engine = EngineSettings(url=engine_url, base_model=BASE_MODEL, max_lora_rank=8)
    stager = StagerSettings(
        listen=f"127.0.0.1:{port}",
        http_listen="",
        dir=str(tmp_path / "node"),
        engine=engine,
        drain_s=drain_s,
        origins=origins,  # type: ignore[arg-type]  # as the file has them
    )
    server = Server(Settings(stager=stager))
    await server.start()
    client = StagerClient(f"127.0.0.1:{port}", holder="router")
    await client.ensure(A)
    return server, client


async def test_a_stager_that_is_told_to_stop_waits_until_it_is_empty(tmp_path: Path) -> None:
    """It goes on with what is leased, and stops when the lease is given back."""
    server, client = await stopping_server(tmp_path, 3600.0)
    stopping = asyncio.create_task(server.stop())
    await until(lambda: server.stager.drain.is_on)
    assert (await client.ensure(A)).lease_s == LEASE_S
    assert not stopping.done()
    await client.release(A)
    await stopping
    await client.close()


async def test_a_stager_that_is_told_to_stop_waits_no_longer_than_its_settings_say(tmp_path: Path) -> None:
    """Whoever holds a lease then holds it on: the files stay."""
    server, client = await stopping_server(tmp_path, 0.05)
    await server.stop()
    assert not server.stager.drain.is_empty
    with pytest.raises(StagerUnavailable):
        await client.ensure(A)
    await client.close()


async def test_a_stager_whose_engine_is_gone_waits_for_nobody(tmp_path: Path) -> None:
    """No request can be answered here, whatever is leased."""
    async with running_engine(tmp_path / "node") as engine:
        server, client = await stopping_server(tmp_path, 3600.0, engine.url)
        await engine.stop()
        await server.stop()
    await client.close()
