"""What is brought before anybody asks for it, and everything that goes before it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from extproc.client import Loading
from extproc.config.stager import EngineSettings, StagerPrefetchSettings
from extproc.core.artifact import AdapterName
from extproc.errors import EngineUnreachable, ModelNotFound, NodeDraining, OriginFailed, Overloaded, PrefetchGivenUp
from extproc.stager.books.holdings import Named
from extproc.stager.stager import Ensured, Stager
from extproc.stager.supply.job import Job
from extproc.stager.work import prefetch as module
from extproc.stager.work.prefetch import ATTEMPTS
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import CONFIG, WEIGHTS, size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

from ..conftest import OpenStager, labels_of

SIZE = size_of(small_files())
HOUR_S = 3600.0
LEASE_S = 300.0  # as open_stager sets it


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    for number in range(20):
        origin.add(f"acme/{number}", small_files(seed=number))
    return origin


def adapters(stager: Stager) -> list[str]:
    """What is on disk, in the order of use."""
    holdings = stager.node.holdings
    return [name for entry in holdings.index.entries() for name in holdings.names_of(entry.id)]


async def prefetch(stager: Stager, name: str, keep_s: float = HOUR_S, loading: Loading = Loading.NONE) -> Ensured:
    return await stager.prefetch(name, keep_s=keep_s, loading=loading)


async def used(stager: Stager, clock: Clock, count: int) -> list[str]:
    """So many adapters that were asked for, a second apart, and whose leases have ended."""
    for number in range(count):
        await stager.ensure(f"acme/{number}", holder="router")
        clock.now += 1
    clock.now += LEASE_S
    return [f"acme/{number}" for number in range(count)]


@contextmanager
def told(stager: Stager) -> Iterator[Callable[[], list[str]]]:
    """What watchers are told of adapters from now on, when it is called."""
    with stager.node.changes.since(stager.node.changes.last, wakes=True) as (queue, _):

        def kinds() -> list[str]:
            changes = [queue.get_nowait() for _ in range(queue.qsize())]
            return [change.kind for change in changes if change is not None and change.adapter]

        yield kinds


# ---- it is no demand


async def test_it_is_on_disk_then_and_nobody_leases_it(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """It counts neither for the engine's slots nor as a wake-up, and one who asks finds it there."""
    stager = await open_stager(origin)
    with told(stager) as kinds:
        brought = await prefetch(stager, "acme/0")
        assert (brought.staged, brought.lease_s, brought.origin) == (True, 0.0, "fake")
        assert stager.demand[0] == 0
        assert kinds() == ["published"]
        again = await prefetch(stager, "acme/0")
        assert (again.staged, again.digest) == (False, brought.digest)
        assert not (await stager.ensure("acme/0")).staged
        assert stager.demand[0] == 1
        assert kinds() == ["woken"]
    assert labels_of(stager, "lora_extproc_node_prefetches_total") == {("staged",): 1, ("hit",): 1}
    assert labels_of(stager, "lora_extproc_ensures_total") == {("hit",): 1}


async def test_what_is_there_keeps_its_place_in_the_order_of_use(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """It was not used."""
    stager = await open_stager(origin)
    before = await used(stager, clock, 3)
    last_used = [entry.last_used for entry in stager.node.holdings.index.entries()]
    await prefetch(stager, "acme/0")
    assert adapters(stager) == before
    assert [entry.last_used for entry in stager.node.holdings.index.entries()] == last_used


async def test_a_wake_up_is_told_once_while_somebody_leases_it(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Whoever that is: routers count idle times by it."""
    stager = await open_stager(origin)
    with told(stager) as kinds:
        for router in ("one", "other", "one"):
            await stager.ensure("acme/0", holder=router)
        assert kinds() == ["published", "woken"]
        clock.now += LEASE_S + 1
        await stager.ensure("acme/0", holder="other")
        assert kinds() == ["woken"]


# ---- room


async def test_nothing_goes_for_it(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Not even what nobody has asked for in a long time."""
    stager = await open_stager(origin, max_bytes=3 * SIZE, high_watermark=1.0)
    before = await used(stager, clock, 3)
    with pytest.raises(PrefetchGivenUp, match=r"0 of .* are free"):
        await prefetch(stager, "acme/9")
    assert adapters(stager) == before
    assert stager.node.holdings.index.reserved_bytes == 0
    assert labels_of(stager, "lora_extproc_node_prefetches_total") == {("prefetch_given_up",): 1}


async def test_it_stays_below_the_mark_from_which_on_the_disk_is_emptied(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Else something that was used would go for it in the background."""
    stager = await open_stager(origin, max_bytes=10 * SIZE, high_watermark=0.4, low_watermark=0.4)
    await used(stager, clock, 3)
    await prefetch(stager, "acme/8")
    with pytest.raises(PrefetchGivenUp):
        await prefetch(stager, "acme/9")


async def test_what_was_expected_and_did_not_come_makes_room_for_the_next(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Not before its time is over."""
    stager = await open_stager(origin, max_bytes=3 * SIZE, high_watermark=1.0)
    await used(stager, clock, 1)
    await prefetch(stager, "acme/7", keep_s=100)
    await prefetch(stager, "acme/8", keep_s=50)
    with pytest.raises(PrefetchGivenUp):
        await prefetch(stager, "acme/9")
    clock.now += 51
    await prefetch(stager, "acme/9")
    assert adapters(stager) == ["acme/0", "acme/7", "acme/9"]


async def test_a_request_that_needs_room_takes_that_of_what_nobody_has_asked_for(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """However long ago the others were used. What was asked for since is one of them."""
    stager = await open_stager(origin, max_bytes=4 * SIZE, high_watermark=1.0)
    await used(stager, clock, 2)
    await prefetch(stager, "acme/7")
    await prefetch(stager, "acme/8")
    await stager.ensure("acme/7")
    clock.now += 2 * LEASE_S
    await stager.ensure("acme/9")
    assert adapters(stager) == ["acme/0", "acme/1", "acme/7", "acme/9"]
    await stager.ensure("acme/10")
    assert adapters(stager) == ["acme/1", "acme/7", "acme/9", "acme/10"]


# ---- turns


async def test_a_request_s_flight_cancels_it_and_it_begins_anew_afterwards(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """It holds a place at the origin, bandwidth and room. None begins meanwhile."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    fetching = asyncio.create_task(prefetch(stager, "acme/0"))
    await stall.reached.wait()
    assert stager.node.holdings.index.reserved_bytes
    request_stall = origin.stall("acme/1", WEIGHTS)
    asking = asyncio.create_task(stager.ensure("acme/1"))
    await request_stall.reached.wait()
    other = asyncio.create_task(prefetch(stager, "acme/2"))
    await until(lambda: stager.job("acme/0") is None)
    assert origin.fetched["acme/0", CONFIG] == 1
    assert origin.fetched["acme/2", CONFIG] == 0
    stall.release()
    request_stall.release()
    assert (await asking).staged
    assert (await fetching).staged
    assert (await other).staged
    assert origin.fetched["acme/0", CONFIG] == 2
    assert adapters(stager)[0] == "acme/1"


async def test_one_that_was_cancelled_a_few_times_is_given_up(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Bytes that are fetched again and again help nobody."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    fetching = asyncio.create_task(prefetch(stager, "acme/0"))
    for number in range(1, 1 + ATTEMPTS):
        await stall.reached.wait()
        stall.reached.clear()
        await stager.ensure(f"acme/{number}")
    with pytest.raises(PrefetchGivenUp, match="requests have needed this node's origins"):
        await fetching
    assert origin.fetched["acme/0", WEIGHTS] == ATTEMPTS


async def test_one_is_brought_at_a_time_and_only_so_many_wait(open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the settings say."""
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    first = asyncio.create_task(prefetch(stager, "acme/0"))
    await stall.reached.wait()
    second = asyncio.create_task(prefetch(stager, "acme/1"))
    same = asyncio.create_task(prefetch(stager, "acme/1"))
    await turns()
    assert origin.resolved["acme/1"] == 0
    with pytest.raises(Overloaded, match="acme/2: 2 prefetches wait"):
        await prefetch(stager, "acme/2")
    stall.release()
    assert [(await task).staged for task in (first, second, same)] == [True, True, True]
    assert origin.resolved["acme/1"] == 1


async def test_several_at_once_where_the_settings_say_so(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """The others are there while one is on its way."""
    stager = await open_stager(origin, prefetch=StagerPrefetchSettings(at_once=2))
    stall = origin.stall("acme/0", WEIGHTS)
    first = asyncio.create_task(prefetch(stager, "acme/0"))
    await stall.reached.wait()
    assert (await prefetch(stager, "acme/1")).staged
    stall.release()
    await first


async def test_the_next_waits_until_the_bytes_of_the_last_are_within_the_rate(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """On average no more than that is brought per second."""
    sent = sum(map(len, small_files().values()))
    stager = await open_stager(origin, prefetch=StagerPrefetchSettings(max_bytes_per_s=10 * sent))
    began = asyncio.get_running_loop().time()
    for number in range(3):
        await prefetch(stager, f"acme/{number}")
    assert asyncio.get_running_loop().time() - began >= 0.2


async def test_one_whose_time_is_over_when_its_turn_comes_is_given_up(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """So is one that has come otherwise meanwhile."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    asking = asyncio.create_task(stager.ensure("acme/0"))
    await stall.reached.wait()
    late, overtaken = (asyncio.create_task(prefetch(stager, f"acme/{number}", keep_s=10 * number)) for number in (1, 2))
    await turns()
    assert (await stager.ensure("acme/2")).staged
    clock.now += 15
    stall.release()
    await asking
    with pytest.raises(PrefetchGivenUp, match="acme/1 is expected no longer"):
        await late
    with pytest.raises(PrefetchGivenUp, match="acme/2 has come to this node"):
        await overtaken


async def test_closing_ends_what_is_on_its_way(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """And what waits for its turn; nothing is left behind."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    tasks = [asyncio.create_task(prefetch(stager, f"acme/{number}")) for number in range(2)]
    await stall.reached.wait()
    await stager._prefetches.close()
    assert all(isinstance(result, asyncio.CancelledError) for result in await asyncio.gather(*tasks, return_exceptions=True))
    assert stager._prefetches._on_their_way == {}
    assert stager.node.holdings.index.reserved_bytes == 0


# ---- the same adapter


async def test_a_request_waits_for_what_is_being_prefetched(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Its bytes are fetched once. From then on the flight is a request's, and other requests do not cancel it."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    fetching = asyncio.create_task(prefetch(stager, "acme/0"))
    await stall.reached.wait()
    asking = [asyncio.create_task(stager.ensure("acme/0", holder=holder)) for holder in ("one", "other")]
    await turns()
    assert (await stager.ensure("acme/1")).staged
    stall.release()
    assert [(await task).lease_s for task in asking] == [LEASE_S, LEASE_S]
    assert (await fetching).staged
    assert origin.fetched["acme/0", WEIGHTS] == 1
    assert not stager.node.holdings.index.is_expected(stager.node.holdings.get(AdapterName("acme/0")).id)  # type: ignore[union-attr]


async def test_a_request_evicts_for_an_adapter_whose_prefetch_finds_no_room(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """The order of events: the prefetch reads the configuration, the request joins it, room is needed."""
    stager = await open_stager(origin, max_bytes=2 * SIZE, high_watermark=1.0)
    await used(stager, clock, 2)
    stall = origin.stall("acme/9", CONFIG)
    fetching = asyncio.create_task(prefetch(stager, "acme/9"))
    await stall.reached.wait()
    asking = asyncio.create_task(stager.ensure("acme/9"))
    await turns()
    stall.release()
    assert (await asking).lease_s == LEASE_S
    assert (await fetching).staged
    assert adapters(stager) == ["acme/1", "acme/9"]


async def test_a_request_flies_itself_where_the_prefetch_came_to_nothing(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """What failed for nobody's sake is tried again for somebody's."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", CONFIG)
    fetching = asyncio.create_task(prefetch(stager, "acme/0"))
    await stall.reached.wait()
    asking = asyncio.create_task(stager.ensure("acme/0"))
    await turns()
    (flight,) = stager._prefetches._on_their_way.values()
    assert flight.task is not None
    flight.task.cancel()
    stall.release()
    assert (await asking).staged
    with pytest.raises(PrefetchGivenUp):
        await fetching


async def test_a_request_in_the_same_turn_makes_the_flight_its_own(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """The order of events: the prefetch has its turn, the request joins it before the flight has made its first step."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", CONFIG)
    fetching = asyncio.create_task(prefetch(stager, "acme/0"))
    await until(lambda: any(flight.task for flight in stager._prefetches._on_their_way.values()))
    assert stager.job("acme/0") is None
    asking = asyncio.create_task(stager.ensure("acme/0"))
    await stall.reached.wait()
    job = stager.job("acme/0")
    assert job is not None
    assert job.priority == Job.REQUEST
    stall.release()
    assert (await asking).lease_s == LEASE_S
    await fetching


async def test_a_request_for_what_waits_for_its_turn_brings_it_itself(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """It waits for nothing."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    first = asyncio.create_task(prefetch(stager, "acme/0"))
    await stall.reached.wait()
    second = asyncio.create_task(prefetch(stager, "acme/1"))
    await turns()
    assert (await stager.ensure("acme/1")).staged
    stall.release()
    await first
    with pytest.raises(PrefetchGivenUp):
        await second


# ---- what is not worth it


async def test_what_no_origin_has_is_answered_from_memory(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """As a request is."""
    stager = await open_stager(origin)
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await prefetch(stager, "acme/nowhere")
    assert origin.resolved["acme/nowhere"] == 1


async def test_an_origin_that_fails_fails_it(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Nothing is learned from that for requests."""
    stager = await open_stager(origin)
    origin.down = OriginFailed("down")
    with pytest.raises(OriginFailed):
        await prefetch(stager, "acme/0")
    origin.down = None
    assert (await stager.ensure("acme/0")).staged


async def test_a_node_that_drains_prefetches_nothing(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Nobody will ask it."""
    stager = await open_stager(origin)
    await stager.drain.begin("")
    with pytest.raises(NodeDraining):
        await prefetch(stager, "acme/0")


async def test_what_a_request_is_bringing_needs_no_prefetch(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """It is not waited for, either."""
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    asking = asyncio.create_task(stager.ensure("acme/0"))
    await stall.reached.wait()
    with pytest.raises(PrefetchGivenUp, match="about to be here"):
        await prefetch(stager, "acme/0")
    stall.release()
    await asking


# ---- the engine's memory


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node / "nothing-here", max_loras=2, max_cpu_loras=8) as engine:
        yield engine


def engine_settings(engine: RunningEngine, slots: int = 8) -> EngineSettings:
    return EngineSettings(url=engine.url, base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0, max_cpu_loras=slots)


async def test_it_is_loaded_into_a_slot_that_is_free(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """Also what was on disk alone. It leases nothing there, either, and a request finds it loaded."""
    stager = await open_stager(origin, engine=engine_settings(engine))
    await prefetch(stager, "acme/0")
    assert engine.adapters.registry == {}
    brought = await prefetch(stager, "acme/0", loading=Loading.VERSIONED)
    assert (brought.staged, brought.loaded, brought.model in engine.adapters.registry) == (False, True, True)
    assert stager.demand == (0, 8)
    assert not (await prefetch(stager, "acme/0", loading=Loading.VERSIONED)).loaded
    assert (await stager.ensure("acme/0", loading=Loading.VERSIONED)).model == brought.model
    assert engine.calls.count("/v1/load_lora_adapter") == 1
    assert labels_of(stager, "lora_extproc_node_prefetches_total") == {("staged",): 1, ("loaded",): 1, ("hit",): 1}


@pytest.mark.parametrize("leased", [7, 8])
async def test_it_takes_no_slot_from_what_is_in_demand(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine, leased: int) -> None:
    """It is on disk then, and no further."""
    stager = await open_stager(origin, engine=engine_settings(engine))
    for number in range(leased):
        await stager.ensure(f"acme/{number}", holder="router", loading=Loading.VERSIONED)
    assert (await prefetch(stager, "acme/9", loading=Loading.VERSIONED)).loaded is (leased == 7)


async def test_of_full_slots_it_takes_that_of_an_adapter_nobody_leases(
    open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine, clock: Clock
) -> None:
    """The engine lets go what it used longest ago: where that is leased, nothing is loaded, although others are not."""
    stager = await open_stager(origin, engine=engine_settings(engine, slots=4))
    for number in range(4):
        await stager.ensure(f"acme/{number}", holder="router", loading=Loading.VERSIONED)
    stager.release("router", "acme/1")
    assert not (await prefetch(stager, "acme/8", loading=Loading.VERSIONED)).loaded
    stager.release("router", "acme/0")
    assert (await prefetch(stager, "acme/9", loading=Loading.VERSIONED)).loaded


async def test_a_part_of_the_slots_is_all_that_is_taken(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine, clock: Clock) -> None:
    """A quarter, until what is there is asked for, or expected no longer."""
    stager = await open_stager(origin, engine=engine_settings(engine))
    assert [(await prefetch(stager, f"acme/{number}", loading=Loading.VERSIONED)).loaded for number in range(3)] == [True, True, False]
    await stager.ensure("acme/0", holder="router", loading=Loading.VERSIONED)
    assert [(await prefetch(stager, f"acme/{number}", loading=Loading.VERSIONED)).loaded for number in (3, 4)] == [True, False]
    clock.now += HOUR_S + 1
    assert (await prefetch(stager, "acme/5", loading=Loading.VERSIONED)).loaded


async def test_nothing_is_loaded_beside_a_load_or_a_request_s_flight(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """A load stalls what the engine generates, and cannot be called off."""
    stager = await open_stager(origin, engine=engine_settings(engine))
    await prefetch(stager, "acme/1")
    stall = origin.stall("acme/0", WEIGHTS)
    asking = asyncio.create_task(stager.ensure("acme/0", loading=Loading.VERSIONED))
    await stall.reached.wait()
    assert not (await prefetch(stager, "acme/1", loading=Loading.VERSIONED)).loaded
    stall.release()
    await asking
    assert (await prefetch(stager, "acme/1", loading=Loading.VERSIONED)).loaded


@pytest.mark.parametrize("mode", ["resolver", "none"])
async def test_without_an_engine_that_is_told_to_load_it_goes_to_the_disk_alone(
    open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine, mode: str
) -> None:
    """A resolver loads by itself when a request has come."""
    settings = EngineSettings(url="") if mode == "none" else engine_settings(engine).model_copy(update={"mode": mode})
    stager = await open_stager(origin, engine=settings)
    brought = await prefetch(stager, "acme/0", loading=Loading.VERSIONED)
    assert (brought.staged, brought.loaded, brought.model) == (True, False, "")


async def test_an_engine_that_cannot_load_leaves_it_on_disk(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """The failure is the prefetch's, and the slot counts as free."""
    stager = await open_stager(origin, engine=engine_settings(engine))
    await prefetch(stager, "acme/0")
    await engine.stop()
    with pytest.raises(EngineUnreachable):
        await prefetch(stager, "acme/0", loading=Loading.VERSIONED)
    assert stager._prefetches._loaded == {}
    assert adapters(stager) == ["acme/0"]


# ---- several at once


@pytest.mark.parametrize("at_once", [1, 4])
async def test_all_together_keep_within_the_bytes_per_second(open_stager: OpenStager, origin: FakeOrigin, at_once: int) -> None:
    """What was brought is paid for, whoever ends last. One that begins is not paid for yet."""
    each = sum(map(len, small_files().values()))
    stager = await open_stager(origin, prefetch=StagerPrefetchSettings(max_bytes_per_s=20 * each, at_once=at_once))
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(prefetch(stager, f"acme/{number}") for number in range(13)))
    assert asyncio.get_running_loop().time() - began >= (13 - at_once) / 20


async def test_no_more_wait_than_may_also_if_all_come_at_once(open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first of them has begun."""
    monkeypatch.setattr(module, "MAX_WAITING", 4)
    stager = await open_stager(origin)
    stall = origin.stall("acme/0", WEIGHTS)
    asked = [asyncio.create_task(prefetch(stager, f"acme/{number}")) for number in range(20)]
    await stall.reached.wait()
    assert sum(task.done() and isinstance(task.exception(), Overloaded) for task in asked) == 16
    stall.release()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(result, Ensured) for result in results) == 4


async def test_one_that_has_arrived_when_a_request_begins_is_not_given_up(open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is shown to the end, and who asked for it is told so."""
    stager = await open_stager(origin)
    shows, may_show, show = asyncio.Event(), asyncio.Event(), stager._prefetches._show

    async def slowly(name: AdapterName, named: Named) -> None:
        shows.set()
        await may_show.wait()
        await show(name, named)

    monkeypatch.setattr(stager._prefetches, "_show", slowly)
    task = asyncio.create_task(prefetch(stager, "acme/0"))
    await shows.wait()
    request = asyncio.create_task(stager.ensure("acme/1", holder="router"))
    await until(lambda: stager._prefetches._requests)
    may_show.set()
    assert (await task).staged
    await request
