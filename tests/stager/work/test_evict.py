"""Room beside an engine that reads the files: what it is asked, what it is told to forget, and in which order adapters go."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.client import Loading
from extproc.core.artifact import ArtifactId
from extproc.core.life import State
from extproc.errors import AdapterInUse, NoSpace
from extproc.stager.stager import Stager
from extproc.stager.work.evict import BATCH
from extproc.stager.work.removal import Stays
from tests.fakes.adapters import size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from ..conftest import OpenStager

SIZE = size_of(small_files())
UNLOAD, MODELS, METRICS = "/v1/unload_lora_adapter", "/v1/models", "/metrics"


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node / "nothing-here", max_loras=1, max_cpu_loras=1) as engine:
        yield engine


async def full_of(stager: Stager, origin: FakeOrigin, clock: Clock, count: int, loading: Loading = Loading.VERSIONED) -> list[ArtifactId]:
    """`count` adapters, all of them known to the engine, whose leases have ended; their ids, least recently used first."""
    for number in range(count):
        origin.add(f"acme/{number}", small_files(seed=number))
        await stager.ensure(f"acme/{number}", holder="router", loading=loading)
        clock.now += 1
    clock.now += 1000
    return order(stager)


def order(stager: Stager) -> list[ArtifactId]:
    return [entry.id for entry in stager.node.holdings.index.entries()]


def states(stager: Stager) -> Counter[State]:
    return Counter(entry.state for entry in stager.node.holdings.index.entries())


def the_next(origin: FakeOrigin) -> str:
    origin.add("acme/next", small_files(seed=1000))
    return "acme/next"


async def test_nothing_is_unloaded_for_room_that_a_busy_engine_cannot_give(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """Any request in its queue may be of any adapter. All stay known to it, in their order, and it is looked at once."""
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=12 * SIZE, high_watermark=1.0, low_watermark=1.0)
    before = await full_of(stager, origin, clock, 12)
    engine.adapters.scheduler.waiting = 1
    engine.calls.clear()
    with pytest.raises(NoSpace):
        await stager.ensure(the_next(origin))
    assert engine.calls.count(UNLOAD) == 0
    assert engine.calls.count(METRICS) == 1
    assert order(stager) == before
    assert states(stager) == {State.LOADED: 12}


async def test_beside_a_busy_engine_room_comes_from_what_it_does_not_know(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """One that was only prefetched goes before others that were used longer ago."""
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=4 * SIZE, high_watermark=1.0, low_watermark=1.0)
    before = await full_of(stager, origin, clock, 3)
    [*_, prefetched] = await full_of(stager, origin, clock, 4, Loading.NONE)
    await stager._remover.notice_empty_queue()
    engine.adapters.scheduler.waiting = 1
    engine.calls.clear()
    assert (await stager.ensure(the_next(origin))).staged
    assert prefetched not in order(stager)
    assert order(stager)[:3] == before
    assert engine.calls.count(UNLOAD) == 0


async def test_a_trim_of_many_shares_its_looks_and_keeps_the_order(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Each victim is unloaded once; the engine is looked at before the first batch, and twice for each."""
    count = BATCH + 12
    stager = await open_stager(origin, engine_url=engine.url)
    before = await full_of(stager, origin, clock, count)
    engine.calls.clear()
    assert await stager._remover.trim(10 * SIZE) is None
    assert order(stager) == before[-10:]
    assert engine.calls.count(UNLOAD) == count - 10
    assert engine.calls.count(METRICS) == 1 + 2 * 2
    assert len(engine.adapters.registry) == 10
    assert engine.deaths == 0


async def test_a_trim_passes_over_what_runs_and_stops_at_a_queue(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """What stays keeps its place: it is the first to be tried next time."""
    stager = await open_stager(origin, engine_url=engine.url)
    before = await full_of(stager, origin, clock, 6)
    running = next(name for name, root in engine.adapters.registry.items() if root.endswith(before[0]))
    async with engine.adapters.use(running):
        assert await stager._remover.trim(4 * SIZE) is Stays.READ
        assert order(stager) == [before[0], *before[3:]]
        engine.adapters.scheduler.waiting += 1
        assert await stager._remover.trim(2 * SIZE) is Stays.QUEUED
        assert order(stager) == [before[0], *before[3:]]
        engine.adapters.scheduler.waiting -= 1
    assert await stager._remover.trim(2 * SIZE) is None
    assert order(stager) == before[4:]


async def test_a_batch_waits_for_a_queue_that_comes_and_goes(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Order of events: the names are unloaded; a request waits when the engine is looked at; a moment later none does. Only the figures are asked for
    again, nothing is unloaded twice, and all goes in one trim.
    """
    stager = await open_stager(origin, engine_url=engine.url)
    before = await full_of(stager, origin, clock, 6)
    engine.calls.clear()
    trim = asyncio.create_task(stager._remover.trim(2 * SIZE))
    await until(lambda: engine.calls.count(UNLOAD) == 4)
    looks = engine.calls.count(METRICS)
    engine.adapters.scheduler.waiting = 1
    await until(lambda: engine.calls.count(METRICS) == looks + 2)
    engine.adapters.scheduler.waiting = 0
    assert await trim is None
    assert order(stager) == before[4:]
    assert engine.calls.count(UNLOAD) == 4
    assert engine.deaths == 0


async def test_what_was_made_ready_gives_room_at_once_while_the_queue_is_never_empty(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """It was unloaded and seen at rest when the queue was empty: no request that waits now can be of it."""
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=4 * SIZE, high_watermark=1.0, low_watermark=1.0)
    before = await full_of(stager, origin, clock, 4)
    assert await stager._remover.prepare(2) is None
    assert order(stager) == before
    assert states(stager) == {State.SETTLED: 2, State.LOADED: 2}
    engine.adapters.scheduler.waiting = 1
    engine.calls.clear()
    assert (await stager.ensure(the_next(origin))).staged
    assert engine.calls.count(UNLOAD) == 0
    assert order(stager)[:3] == before[1:]


async def test_what_was_made_ready_is_served_to_who_asks(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """It is on disk, so it is loaded again and not fetched again, and is no longer the first to go."""
    stager = await open_stager(origin, engine_url=engine.url)
    (first, second) = await full_of(stager, origin, clock, 2)
    await stager._remover.prepare(1)
    held = await stager.ensure("acme/0", holder="router", loading=Loading.VERSIONED)
    assert (held.staged, held.model in engine.adapters.registry) == (False, True)
    assert order(stager) == [second, first]
    assert states(stager) == {State.LOADED: 2}


async def test_what_is_next_to_go_is_made_ready_before_it_is_needed(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the low mark; what is leased stays known to the engine."""
    monkeypatch.setattr("extproc.stager.stager.HOUSEKEEPING_S", 0.001)
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=4 * SIZE, high_watermark=1.0, low_watermark=0.5)
    await full_of(stager, origin, clock, 2)
    held = await stager.ensure(the_next(origin), holder="router", loading=Loading.VERSIONED)
    await until(lambda: states(stager)[State.SETTLED] == 2)
    assert set(engine.adapters.registry) == {held.model}


async def test_what_somebody_else_unloaded_goes_when_the_queue_was_empty(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """Order of events: a request is queued; an operator unloads its adapter by hand; the stager sees that the engine has lost it. The request may be of it."""
    stager = await open_stager(origin, engine_url=engine.url)
    await full_of(stager, origin, clock, 1)
    engine.adapters.registry.clear()
    engine.adapters.scheduler.waiting = 1
    await stager._keeper.compare()
    assert states(stager) == {State.UNLOADED: 1}
    with pytest.raises(AdapterInUse):
        await stager.evict("acme/0")
    engine.adapters.scheduler.waiting = 0
    assert await stager.evict("acme/0") == SIZE


async def test_the_order_of_use_survives_a_restart(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """What was published first and used last is the last to go."""
    stager = await open_stager(origin)
    before = await full_of(stager, origin, clock, 4, Loading.NONE)
    clock.now += 1
    await stager.ensure("acme/0")
    await stager.close()
    again = await open_stager(origin)
    assert order(again) == [*before[1:], before[0]]


async def test_the_order_of_use_is_written_hourly(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stager that is killed loses that of the last hour; what was not used since is not written again."""
    monkeypatch.setattr("extproc.stager.stager.HOUSEKEEPING_S", 0.001)
    stager = await open_stager(origin, lease_s=1.0)
    before = await full_of(stager, origin, clock, 3, Loading.NONE)
    clock.now += 1
    await stager.ensure("acme/0")
    manifests = {id_: stager.node.store.path(id_) / ".lora-extproc.json" for id_ in before}
    times = {id_: path.stat().st_mtime for id_, path in manifests.items()}
    clock.now += 3600
    await until(lambda: manifests[before[0]].stat().st_mtime != times[before[0]])
    await until(lambda: max(manifests, key=lambda id_: manifests[id_].stat().st_mtime) == before[0])


async def test_all_that_the_disk_allots_is_counted(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Each file's blocks, the manifest's and the directory's: small adapters take several times their bytes."""
    stager = await open_stager(origin)
    await full_of(stager, origin, clock, 5, Loading.NONE)
    store = stager.node.store.directory / ".store"
    taken = sum(path.lstat().st_blocks * 512 for path in store.rglob("*"))
    assert taken <= stager.node.holdings.index.used_bytes
