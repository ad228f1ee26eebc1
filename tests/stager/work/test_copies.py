"""What a node has, as a watcher follows it: the whole at first, then changes, and at any moment what is true."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from extproc.client import EngineLoad, Evicted, Inventory, Loaded, Loading, NodeState, Published, Refreshed, Refused, StagerClient, Unloaded, WatchEvent
from extproc.config.stager import EngineSettings
from extproc.core.artifact import AdapterName, ArtifactId
from extproc.errors import AdapterInUse, InvalidAdapter, StagerUnavailable
from extproc.pb import stager_pb2 as pb
from extproc.stager.api.watch import watch_events
from extproc.stager.books import changes as changes_module
from extproc.stager.books.holdings import Named
from extproc.stager.engine import meter as meter_module
from extproc.stager.stager import Stager
from extproc.stager.work import copies as copies_module
from extproc.stager.work.copies import PART
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import WEIGHTS, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin, origin_of
from tests.fakes.relay import Relay
from tests.fakes.wait import Turns, turns, until

from ..conftest import OpenStager, ServeNode, next_of

A, B, C = "acme/a", "acme/b", "acme/c"


@pytest.fixture
def origin() -> FakeOrigin:
    return origin_of(A, B, C)


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node, max_loras=2, max_cpu_loras=2) as running:
        yield running


def settings(engine: RunningEngine) -> EngineSettings:
    return EngineSettings(url=engine.url, base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0, max_loras=2, max_cpu_loras=2)


class Follower:
    """What a router would believe of a node's copies. It reads until the test ends."""

    def __init__(self, client: StagerClient) -> None:
        self.copies: dict[str, bool] = {}  # name -> whether it is warm
        self.events: list[WatchEvent] = []
        self.states: list[NodeState] = []
        self.loads: list[EngineLoad] = []
        self.parts: list[int] = []
        self.is_whole = False
        self._client = client
        self._task: asyncio.Task[None] | None = None

    def start(self) -> "Follower":
        self._task = asyncio.create_task(self._follow())
        return self

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _follow(self) -> None:
        while True:
            try:
                async for event in self._client.watch(copies=True, load=True):
                    self.take(event)
            except StagerUnavailable:
                await asyncio.sleep(0.01)

    def take(self, event: WatchEvent) -> None:
        self.events.append(event)
        match event:
            case NodeState():
                self.states.append(event)
                self.is_whole = event.resumed
                if not event.resumed:
                    self.copies.clear()
            case Inventory(cold, warm, more):
                assert not set(cold + warm) & set(self.copies)
                self.copies |= dict.fromkeys(cold, False) | dict.fromkeys(warm, True)
                self.parts.append(len(cold) + len(warm))
                self.is_whole = not more
            case Published(adapter) | Refreshed(adapter):
                self.copies[adapter] = False
            case Loaded(adapter):
                self.copies[adapter] = True
            case Unloaded(adapter):
                assert adapter in self.copies, "of what is not there nothing is told"
                self.copies[adapter] = False
            case Evicted(adapter) | Refused(adapter):
                self.copies.pop(adapter, None)
            case EngineLoad():
                self.loads.append(event)
            case _:
                pass


async def test_a_watcher_is_given_what_the_node_has_and_then_what_changes(serve_node: ServeNode, engine: RunningEngine) -> None:
    """On disk only; and in the engine's memory, where two have room: the third lets the first fall out. Evicted, it is gone."""
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    await client.ensure(A)
    await client.ensure(B, loading=Loading.VERSIONED)
    follower = Follower(node.ask()).start()
    await until(lambda: follower.is_whole)
    assert follower.copies == {A: False, B: True}
    await client.ensure(A, loading=Loading.VERSIONED)
    await until(lambda: follower.copies == {A: True, B: True})
    await client.ensure(C, loading=Loading.VERSIONED)
    await until(lambda: follower.copies == {A: True, B: False, C: True})
    await client.ensure(B, loading=Loading.VERSIONED)
    await until(lambda: follower.copies == {A: False, B: True, C: True})
    await client.purge(C)
    await until(lambda: follower.copies == {A: False, B: True})
    assert len(follower.states) == 1
    await follower.stop()


async def test_what_the_engine_works_on_is_in_its_memory(serve_node: ServeNode, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm request makes no call to the stager: the engine's metrics show it, and what it pushed out."""
    monkeypatch.setattr(meter_module, "BUSY_S", 0.01)
    monkeypatch.setattr(meter_module, "IDLE_S", 0.01)
    monkeypatch.setattr(meter_module, "NAMES_S", 0.0)
    monkeypatch.setattr(meter_module, "NAMES_SHARE", 1.0)
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    models = [(await client.ensure(name, loading=Loading.VERSIONED)).model for name in (A, B, C)]
    follower = Follower(node.ask()).start()
    await until(lambda: follower.copies == {A: False, B: True, C: True})
    async with engine.adapters.use(models[0]):
        await until(lambda: follower.copies == {A: True, B: False, C: True})
    await follower.stop()


async def test_watchers_hear_what_the_engine_works_on(serve_node: ServeNode, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running, waiting, the use of its cache, its slots. An engine that cannot be asked is no load of nought."""
    monkeypatch.setattr(meter_module, "BUSY_S", 0.01)
    monkeypatch.setattr(meter_module, "IDLE_S", 0.01)
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    models = [(await client.ensure(name, loading=Loading.VERSIONED)).model for name in (A, B, C)]
    follower = Follower(node.ask()).start()
    await until(lambda: follower.loads)
    first = follower.loads[0]
    assert first == EngineLoad(0, 0, 0.0, 2, 2, first.age_s, first.every_s, routers=1)
    async with engine.adapters.use(models[0], tokens=1000), engine.adapters.use(models[1], tokens=1000):
        waiting = asyncio.create_task(engine.ask(models[2]))
        await until(lambda: follower.loads[-1].waiting == 1)
        assert follower.loads[-1].running == 2
        assert 0.02 < follower.loads[-1].kv_usage < 0.04
    await waiting
    await until(lambda: follower.loads[-1].running == 0 and follower.loads[-1].waiting == 0 and follower.loads[-1].kv_usage == 0)
    told = len(follower.loads)
    await engine.stop()
    await until(lambda: node.stager.meter.told is not None and node.stager.meter.told.work is None)
    assert all(load.running == 0 for load in follower.loads[told:])
    await follower.stop()


async def test_watchers_hear_how_many_calls_of_others_wait(
    serve_node: ServeNode, engine: RunningEngine, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each adapter that a router waits for; its own are left out, since it knows them, and who has no name is no router. A wait that is given up
    counts no longer."""
    monkeypatch.setattr(meter_module, "BUSY_S", 0.01)
    monkeypatch.setattr(meter_module, "IDLE_S", 0.01)
    monkeypatch.setattr(meter_module, "STEP", 0.0)
    stalls = [origin.stall(name, WEIGHTS) for name in (A, B)]
    node = await serve_node(engine=settings(engine))
    one, other = node.ask(holder="one"), node.ask(holder="other")
    followers = [Follower(node.ask(holder=holder)).start() for holder in ("one", "other")]
    await until(lambda: all(follower.loads for follower in followers))
    waits = [asyncio.create_task(client.ensure(name)) for client, name in ((one, A), (one, B), (other, B), (node.ask(), A))]
    await until(lambda: [follower.loads[-1].others_held for follower in followers] == [1, 2])
    waits[2].cancel()
    await until(lambda: [follower.loads[-1].others_held for follower in followers] == [0, 2])
    for stall in stalls:
        stall.release()
    await asyncio.gather(*waits[:2], waits[3])
    await until(lambda: [follower.loads[-1].others_held for follower in followers] == [0, 0])
    for follower in followers:
        await follower.stop()


async def test_an_engine_that_cannot_be_asked_is_said_to_be_unknown(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Once: the message says so, and names no figure."""
    stager = await open_stager(origin)
    events = watch_events(stager, load=True, heartbeat_s=0.1)
    loads: list[pb.EngineLoad] = []
    beats = 0
    async for event in events:
        loads += [event.load] if event.HasField("load") else []
        beats += event.HasField("heartbeat")
        if loads and beats > 5:
            break
    await events.aclose()
    assert [(load.known, load.running) for load in loads] == [(False, 0.0)]


# -- the whole beside changes


def put(stager: Stager, name: str) -> None:
    """As the start finds it: on disk, without a word to anybody."""
    stager.node.holdings.index.add(ArtifactId(name), 1000, 0.0)
    stager.node.holdings.put(AdapterName(name), Named(ArtifactId(name), "fake", "1"))


def drop(stager: Stager, name: str) -> None:
    stager.node.holdings.drop(AdapterName(name))
    stager.node.holdings.index.removed(ArtifactId(name))
    stager.node.changes.tell("evicted", name)


async def test_the_whole_comes_in_parts_and_is_what_it_was_when_it_began(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Changes between two parts follow the last of them: none is lost, none is in the whole as well."""
    stager = await open_stager(origin)
    names = [f"acme/{number:05}" for number in range(3 * PART + 10)]
    for name in names:
        put(stager, name)
    position = stager.node.changes.last
    events = watch_events(stager, copies=True)
    parts: list[pb.Inventory] = []
    later: list[tuple[str, str]] = []
    async for event in events:
        kind = event.WhichOneof("event")
        if kind == "inventory":
            parts.append(event.inventory)
            if len(parts) == 1:
                put(stager, "acme/new")
                stager.node.changes.tell("published", "acme/new")
                drop(stager, names[0])
                drop(stager, names[-1])
            assert event.sequence == (0 if event.inventory.more else position)
        elif kind in ("published", "evicted"):
            assert not parts[-1].more
            later.append((kind, getattr(event, kind)))
            if len(later) == 3:
                break
    await events.aclose()
    assert [len(part.cold) for part in parts] == [PART, PART, PART, 10]
    assert [part.more for part in parts] == [True, True, True, False]
    assert [name for part in parts for name in part.cold] == names
    assert later == [("published", "acme/new"), ("evicted", names[0]), ("evicted", names[-1])]


async def test_a_node_that_has_nothing_says_so(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """One part without a name: what was known before is wrong."""
    events = watch_events(await open_stager(origin), copies=True)
    assert (await anext(events)).HasField("node")
    assert (await anext(events)).inventory == pb.Inventory()
    await events.aclose()


async def test_a_large_whole_leaves_the_event_loop_to_others(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Between two of its parts everybody has a turn."""
    stager = await open_stager(origin)
    for number in range(20 * PART):
        put(stager, f"acme/{number:05}")
    events, parts = watch_events(stager, copies=True), 0
    with Turns() as others:
        async for event in events:
            parts += event.HasField("inventory")
            if event.HasField("inventory") and not event.inventory.more:
                break
    await events.aclose()
    assert parts == 20
    assert others.count >= parts - 1


async def test_a_stream_that_breaks_within_the_whole_begins_anew(serve_node: ServeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed after half of it, the watcher would never learn of the other half."""
    monkeypatch.setattr(copies_module, "PART", 2)
    node = await serve_node()
    for number in range(5):
        put(node.stager, f"acme/{number}")
    client = node.ask()
    watching = client.watch(copies=True)
    assert len((await next_of(watching, Inventory)).cold) == 2  # type: ignore[union-attr]
    del watching
    again = client.watch(copies=True)
    assert await next_of(again, NodeState) == NodeState(True, "", node.stager.instance, resumed=False)
    assert [len((await next_of(again, Inventory)).cold) for _ in range(3)] == [2, 2, 1]  # type: ignore[union-attr]
    node.stager.node.changes.tell("published", "acme/new")
    await next_of(again, Published)
    del again
    assert await next_of(client.watch(copies=True), NodeState) == NodeState(True, "", node.stager.instance, resumed=True)


async def test_a_watch_that_is_resumed_is_told_what_it_missed_and_no_whole(serve_node: ServeNode, engine: RunningEngine) -> None:
    """What was loaded and unloaded while it was broken, too."""
    node = await serve_node(engine=settings(engine))
    local = node.ask()
    await local.ensure(A, loading=Loading.VERSIONED)
    async with Relay(node.port) as relay:
        client = node.ask(address=relay.address)
        follower = Follower(client).start()
        await until(lambda: follower.copies == {A: True})
        relay.cut()
        for name in (B, C):
            await local.ensure(name, loading=Loading.VERSIONED)
        await local.purge(B)
        relay.mend()
        await until(lambda: len(follower.states) == 2)
        assert follower.states[-1].resumed
        assert len(follower.parts) == 1
        await until(lambda: follower.copies == {A: False, C: True})
        await follower.stop()
        await client.close()


async def test_a_watcher_that_missed_too_much_is_given_the_whole_again(serve_node: ServeNode) -> None:
    """Nothing of what it knew counts."""
    node = await serve_node()
    put(node.stager, "acme/kept")
    client = node.ask()
    await next_of(client.watch(copies=True), Inventory)
    for number in range(changes_module.KEPT + 1):
        node.stager.node.changes.tell("evicted", f"acme/{number}")
    assert await next_of(client.watch(copies=True), Inventory) == Inventory(("acme/kept",), ())


async def test_who_asks_for_no_copies_hears_of_no_engine(serve_node: ServeNode, engine: RunningEngine) -> None:
    """A router of an earlier version is told what it was told then."""
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    seen: list[WatchEvent] = []
    watching = client.watch()
    await next_of(watching, NodeState)
    for name in (A, B, C):
        await node.ask().ensure(name, loading=Loading.VERSIONED)
    await node.ask().purge(C)
    async for event in watching:
        seen.append(event)
        if event == Evicted(C):
            break
    assert not [event for event in seen if isinstance(event, Inventory | Loaded | Unloaded | EngineLoad)]


# -- what is told of what does not stay so


async def test_what_was_told_as_evicted_and_stays_is_told_as_published_again(serve_node: ServeNode, engine: RunningEngine) -> None:
    """The engine lost its name, and does not take it again: it is on disk all the same."""
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    await client.ensure(A, loading=Loading.VERSIONED)
    follower = Follower(node.ask()).start()
    await until(lambda: follower.copies == {A: True})
    engine.adapters.registry.clear()
    node.stager.node.holdings.index.release("", None)
    node.stager.node.changes.tell("evicted", A)
    await until(lambda: Evicted(A) in follower.events and Published(A) in follower.events)
    await until(lambda: A in follower.copies)
    await follower.stop()


async def test_what_leaves_and_has_to_stay_is_told_again(serve_node: ServeNode, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of events: a purge tells that it is gone; the engine keeps it; the purge ends in keeping it, which nobody tells."""
    monkeypatch.setattr(copies_module, "LOOK_S", 0.01)
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    model = (await client.ensure(A, loading=Loading.VERSIONED)).model
    follower = Follower(node.ask()).start()
    await until(lambda: follower.copies == {A: True})

    async def start_a_request(path: str) -> None:
        if path == "/v1/unload_lora_adapter":
            running.append(engine.adapters.use(model))
            await running[0].__aenter__()
            engine.step = None

    running: list[Any] = []
    engine.step = start_a_request
    with pytest.raises(AdapterInUse):
        await client.purge(A)
    await until(lambda: Evicted(A) in follower.events)
    await until(lambda: follower.copies == {A: False})
    await running[0].__aexit__(None, None, None)
    await follower.stop()


@pytest.mark.parametrize("is_on_disk", [True, False])
async def test_what_the_engine_refuses_is_no_copy(serve_node: ServeNode, engine: RunningEngine, origin: FakeOrigin, is_on_disk: bool) -> None:
    """Neither in the whole nor after a change, whichever comes first: the refusal, or the name on the disk."""
    bad = "acme/bad"
    origin.add(bad, small_files(seed=9))

    async def refuse(path: str) -> web.Response | None:
        return web.json_response({"error": {"message": "it is bad"}}, status=400) if path == "/v1/load_lora_adapter" else None

    node = await serve_node(engine=settings(engine))
    client = node.ask()
    await client.ensure(A)
    if is_on_disk:
        await client.ensure(bad)
    before = Follower(node.ask()).start()
    await until(lambda: before.is_whole)
    engine.step = refuse
    with pytest.raises(InvalidAdapter):
        await client.ensure(bad, loading=Loading.VERSIONED)
    await until(lambda: Refused(bad) in before.events)
    await client.ensure(B)
    await until(lambda: before.copies == {A: False, B: False})
    after = Follower(node.ask()).start()
    await until(lambda: after.is_whole)
    assert after.copies == {A: False, B: False}
    await before.stop()
    await after.stop()


async def test_a_name_that_is_shown_after_its_refusal_is_told_as_refused_again(open_stager: OpenStager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of events: the engine refuses what a flight has published under its digest; then the flight shows it under its name."""
    stager = await open_stager()
    monkeypatch.setattr(stager.node.loads, "refuses", lambda name, _: name == A)
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        stager.node.changes.tell("refused", A)
        put(stager, A)
        stager.node.changes.tell("published", A)
        await turns()
        told = [change for change in (queue.get_nowait() for _ in range(queue.qsize())) if change is not None]
    assert [change.kind for change in told if change.adapter == A] == ["refused", "published", "refused"]


async def test_a_refused_new_version_leaves_the_copy_of_the_old_one(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """The refusal is of what the origin has now; what is here is served."""
    node = await serve_node()
    client = node.ask()
    await client.ensure(A)
    follower = Follower(node.ask()).start()
    await until(lambda: follower.is_whole)
    origin.add(A, small_files() | {"adapter_config.json": b"{"})
    origin.revisions[A] = "2"
    with pytest.raises(InvalidAdapter):
        await client.refresh(A)
    await until(lambda: Refused(A) in follower.events and Published(A) in follower.events)
    assert follower.copies == {A: False}
    await follower.stop()


async def test_a_new_version_is_warm_where_the_old_one_was(serve_node: ServeNode, engine: RunningEngine, origin: FakeOrigin) -> None:
    """It was loaded before anybody is sent there."""
    node = await serve_node(engine=settings(engine))
    client = node.ask()
    await client.ensure(A, loading=Loading.VERSIONED)
    follower = Follower(node.ask()).start()
    await until(lambda: follower.copies == {A: True})
    origin.add(A, small_files(seed=7))
    origin.revisions[A] = "2"
    assert (await client.refresh(A))[0]
    await until(lambda: Refreshed(A) in follower.events)
    await until(lambda: follower.copies == {A: True})
    await follower.stop()
