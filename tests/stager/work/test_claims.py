"""A stager that is started again: what routers rely on is heard before anything goes, whatever ended the one before."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from extproc.client import Claimed, Loading, NodeState, Staged, StagerClient
from extproc.core.artifact import ArtifactId
from extproc.errors import AdapterInUse, NoSpace, StagerUnavailable
from extproc.up.processes import Child, free_ports, python, spawn, stop
from tests.fakes.adapters import size_of, small_files, write_small
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, Turns, until

from ..conftest import OpenStager

WAIT_S, LEASE_S = 5.0, 300.0
SIZE = size_of(small_files())


def claimed(name: str, staged: Staged, remaining_s: float = 200.0, loading: Loading = Loading.NONE) -> Claimed:
    return Claimed(name, staged.digest, loading, staged.model or name, remaining_s)


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node) as running:
        yield running


async def staged_before(open_stager: OpenStager, origin: FakeOrigin, *names: str, engine_url: str = "") -> dict[str, Staged]:
    """What an earlier instance had staged, each for `max_bytes` that is full with it."""
    for seed, name in enumerate(("acme/a", "acme/b", "acme/c", "acme/d")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, engine_url=engine_url, claim_wait_s=WAIT_S)
    loading = Loading.VERSIONED if engine_url else Loading.NONE
    staged = {}
    for name in names:
        held = await stager.ensure(name, loading=loading)
        staged[name] = Staged(held.digest, held.staged, held.origin, held.lease_s, held.waited_s, held.size, held.model)
    await stager.close()
    return staged


async def test_what_was_there_stays_until_routers_have_spoken(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Somebody else's new adapter finds no room meanwhile; then what was claimed stays, and the rest goes."""
    staged = await staged_before(open_stager, origin, "acme/a", "acme/b")
    stager = await open_stager(origin, max_bytes=2 * SIZE, claim_wait_s=WAIT_S)
    clock.now += WAIT_S - 0.1
    with pytest.raises(NoSpace):
        await stager.ensure("acme/c")
    with pytest.raises(AdapterInUse, match="kept until routers have said what they rely on"):
        await stager.evict("acme/b")
    assert await stager.claim("router", [claimed("acme/a", staged["acme/a"])]) == [200.0]
    clock.now += 0.1
    assert (await stager.ensure("acme/c")).staged
    assert set(stager.node.holdings) == {"acme/a", "acme/c"}
    clock.now += 200.0 + LEASE_S
    assert (await stager.ensure("acme/d")).staged
    assert "acme/a" not in set(stager.node.holdings)


async def test_what_comes_after_the_start_may_go_at_once(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Whoever leased it then is known."""
    await staged_before(open_stager, origin, "acme/a")
    stager = await open_stager(origin, max_bytes=2 * SIZE, claim_wait_s=WAIT_S, lease_s=1.0)
    await stager.ensure("acme/b")
    clock.now += 1.5
    assert (await stager.ensure("acme/c")).staged
    assert set(stager.node.holdings) == {"acme/a", "acme/c"}


async def test_a_claim_is_honoured_as_far_as_it_is_true(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """In the order in which it was made: not for what is gone, is another version, has no time left, or is no name; never longer than a lease."""
    staged = await staged_before(open_stager, origin, "acme/a", "acme/b")
    stager = await open_stager(origin, claim_wait_s=WAIT_S)
    a = claimed("acme/a", staged["acme/a"])
    bad = [
        Claimed("acme/a", "0" * 64, Loading.NONE, "acme/a", 9.0),
        Claimed("acme/c", "0" * 64, Loading.NONE, "acme/c", 9.0),
        Claimed("../a", a.digest, Loading.NONE, "../a", 9.0),
        Claimed("acme/a", f"{a.digest}@acme/a", Loading.NONE, "acme/a", 9.0),
        Claimed("acme/a", "", Loading.NONE, "acme/a", 9.0),
        *(claimed("acme/a", staged["acme/a"], left) for left in (0.0, -1.0, float("nan"), float("inf"))),
    ]
    assert await stager.claim("router", bad) == [0.0] * len(bad)
    assert stager.leased_s(ArtifactId(a.digest)) == 0
    assert await stager.claim("router", [a, bad[0], claimed("acme/b", staged["acme/b"], 10**6)]) == [200.0, 0.0, LEASE_S]
    assert stager.release("router") == 2


async def test_a_claim_for_an_engine_that_was_not_asked_yet_is_believed(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """And what the engine turns out to have lost is loaded again before the node is ready: it is in demand."""
    staged = await staged_before(open_stager, origin, "acme/a", "acme/b", engine_url=engine.url)
    engine.adapters.registry.clear()
    engine.hold = asyncio.Event()
    stager = await open_stager(origin, engine_url=engine.url, claim_wait_s=WAIT_S)
    a = claimed("acme/a", staged["acme/a"], loading=Loading.VERSIONED)
    wrong = Claimed("acme/b", staged["acme/b"].digest, Loading.VERSIONED, "another", 9.0)
    assert await stager.claim("router", [a, wrong]) == [200.0, 0.0]
    engine.hold.set()
    await until(lambda: stager.not_ready is None)
    assert set(engine.adapters.registry) == {a.model}


async def test_a_claim_for_an_engine_that_was_asked_is_compared_with_what_it_said(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """What it has is honoured; what it has not, or as something else, is not."""
    staged = await staged_before(open_stager, origin, "acme/a", "acme/b", engine_url=engine.url)
    a, b = (claimed(name, staged[name], loading=Loading.VERSIONED) for name in ("acme/a", "acme/b"))
    engine.adapters.registry.pop(b.model)
    stager = await open_stager(origin, engine_url=engine.url, claim_wait_s=WAIT_S)
    await until(lambda: stager.not_ready is None)
    plain = claimed("acme/a", staged["acme/a"], loading=Loading.PLAIN)
    assert await stager.claim("router", [a, b, plain]) == [200.0, 0.0, 0.0]
    assert a.model in engine.adapters.registry


async def test_an_engine_keeps_the_names_that_routers_use_over_a_start(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """A version that was replaced before is unloaded when the time for claims is over, unless somebody claims it."""
    staged = await staged_before(open_stager, origin, "acme/a", engine_url=engine.url)
    old = claimed("acme/a", staged["acme/a"], loading=Loading.VERSIONED)
    origin.add("acme/a", small_files(seed=9))
    origin.revisions["acme/a"] = "2"
    middle = await open_stager(origin, engine_url=engine.url)
    await middle.ensure("acme/a", holder="router", loading=Loading.VERSIONED)
    assert await middle.refresh("acme/a")
    assert old.model in engine.adapters.registry
    await middle.close()
    stager = await open_stager(origin, engine_url=engine.url, claim_wait_s=WAIT_S)
    await until(lambda: stager.not_ready is None)
    await stager._remover.remove_retired()
    assert old.model in engine.adapters.registry
    assert await stager.claim("router", [old]) == [200.0]
    clock.now += WAIT_S
    await stager._remover.remove_retired()
    assert old.model in engine.adapters.registry
    clock.now += 200.0
    await stager._remover.remove_retired()
    assert old.model not in engine.adapters.registry


async def test_a_long_claim_does_not_stop_the_loop(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Others have their turn in between."""
    stager = await open_stager(origin)
    with Turns() as turns:
        await stager.claim("router", [Claimed(f"acme/{number}", "0" * 64, Loading.NONE, "", 9.0) for number in range(5000)])
    assert turns.count >= 20


# -- with a real process


@dataclass
class Process:
    """A stager as a process, which can be killed and started again on its directory."""

    directory: Path
    address: str
    max_bytes: int
    child: Child | None = None

    async def start(self) -> None:
        file = self.directory / "stager.yaml"
        stager = {
            "listen": self.address,
            "http_listen": "",
            "dir": str(self.directory / "node"),
            "engine": {"url": ""},
            "origins": [{"type": "file", "path": str(self.directory / "origin")}],
            "max_bytes": self.max_bytes,
            "high_watermark": 1.0,
            "claim_wait_s": 3.0,
            "drain_s": 0,
        }
        file.write_text(yaml.safe_dump({"stager": stager}))
        self.child = await spawn("stager", python("stager", "--config", str(file)), self.directory)

    async def kill(self) -> None:
        assert self.child is not None
        self.child.process.send_signal(signal.SIGKILL)
        await self.child.process.wait()

    def send(self, number: signal.Signals) -> None:
        assert self.child is not None
        os.kill(self.child.process.pid, number)


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    for seed in range(4):
        write_small(tmp_path / "origin" / f"acme/{seed}", seed=seed)
    (port,) = free_ports(1)
    running = Process(tmp_path, f"127.0.0.1:{port}", 3 * SIZE)
    await running.start()
    yield running
    if running.child is not None:
        running.send(signal.SIGCONT)
        await stop([running.child], 5.0)


async def answers(client: StagerClient) -> None:
    """Wait for the process to serve."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.list()
                return
            except StagerUnavailable:
                await asyncio.sleep(0.05)


async def test_a_stager_that_was_killed_evicts_nothing_that_a_router_relies_on(process: Process) -> None:
    """Kill -9 with leases out and a full disk; started again, it is asked for something new before the router has said what it counts on."""
    async with StagerClient(process.address, holder="router") as client:
        await answers(client)
        held = {f"acme/{number}": await client.ensure(f"acme/{number}") for number in range(3)}
        await process.kill()
        await process.start()
        await answers(client)
        with pytest.raises(NoSpace):
            await client.ensure("acme/3")
        relied_on = [claimed(name, held[name]) for name in ("acme/0", "acme/1")]
        assert await client.claim(relied_on) == (200.0, 200.0)
        async with asyncio.timeout(30):
            while True:  # until the time for claims is over
                try:
                    await client.ensure("acme/3")
                    break
                except NoSpace:
                    await asyncio.sleep(0.1)
        assert {adapter.name for adapter in (await client.list()).adapters} == {"acme/0", "acme/1", "acme/3"}


async def test_a_stager_that_is_stopped_is_silent_and_then_gone(process: Process) -> None:
    """SIGSTOP: its connection stays open and nothing comes. It is heard again when it goes on within six heartbeats."""
    async with StagerClient(process.address, holder="router") as client:
        await answers(client)
        watching = client.watch(0.5)
        seen: list[str] = []

        async def watch() -> None:
            async for event in watching:
                seen.append(type(event).__name__)
                if isinstance(event, NodeState):
                    assert event.heartbeat_s == 0.5

        task = asyncio.create_task(watch())
        await until_async(lambda: "NodeState" in seen or task.done())
        process.send(signal.SIGSTOP)
        await until_async(lambda: "Silent" in seen or task.done())
        process.send(signal.SIGCONT)
        await until_async(lambda: "Heard" in seen or task.done())
        process.send(signal.SIGSTOP)
        with pytest.raises(StagerUnavailable):
            await task
        assert seen.count("Silent") == 2


async def until_async(condition: object) -> None:
    """Like `until`, without keeping a processor busy that the other process needs."""
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)
