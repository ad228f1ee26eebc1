"""Where a cold request goes: the walk over its candidates, the one that is asked beside another, and the wait for room. In virtual time."""

import asyncio
import logging
from collections import Counter
from typing import Any

import pytest

from extproc.core.artifact import AdapterName
from extproc.core.choice import ONCE
from extproc.core.decision import Forward
from extproc.core.endpoint import Endpoint
from extproc.core.load import HELD_S, Engine
from extproc.core.standing import Stager
from extproc.errors import ModelNotFound, NoSpace, OriginDown, StageDeadline, StagerUnavailable
from extproc.router.staging import MAX_CANDIDATES, Placed
from tests.fakes.wait import in_virtual_time, turns, until

from .fakes import Gateway, Router, ScriptedStager, chat, serve


def now() -> float:
    return asyncio.get_running_loop().time()


def router_of(count: int = 3, **settings: Any) -> tuple[Router, list[Endpoint], list[ScriptedStager]]:
    """A router on the loop's time, and the candidates of `a` with their stagers."""
    router = Router(count, clock=now, **settings)
    order = list(router.pool.order("a"))
    return router, order, [router.stager_of(endpoint) for endpoint in order]


def forward(router: Router, wait_s: float = 60.0) -> Forward:
    snapshot = router.membership.snapshot
    return Forward(AdapterName("a"), router.pool, "a", snapshot.candidates(router.pool, "a"), snapshot, None, wait_s)


# ---- a copy that is not where its key belongs


def at_home(router: Router) -> list[Endpoint]:
    """The two where a copy of `a` belongs."""
    return list(router.pool.candidates("a"))[:2]


async def test_a_home_that_comes_back_cold_is_prepared_while_the_warm_copy_serves() -> None:
    """Nobody waits for it, and it has its key again as soon as it is warm."""
    router = Router()
    owner, _, third = router.pool.candidates("a")
    await router.residency.ensure(third, "a")
    router.stager_of(owner).gate.clear()
    for _ in range(2):
        assert (await serve(router, chat("a"))).first_destination() == third.address
        await turns(5)
    assert router.stager_of(owner).asked == ["a"]
    router.stager_of(owner).gate.set()
    await turns()
    stream = await serve(router, chat("a"))
    assert stream.destination() == f"{owner.address},{third.address}"
    assert router.count("hit") == 3


async def test_a_copy_at_the_second_place_is_at_home() -> None:
    """The owner was busier when it was made; no second one is made because of that."""
    router = Router()
    owner, second, _ = router.pool.candidates("a")
    await router.residency.ensure(second, "a")
    assert (await serve(router, chat("a"))).destination() == second.address
    await turns()
    assert router.stager_of(owner).asked == []


async def test_a_preparation_that_failed_is_not_repeated_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A node that lacks room would be asked with every request; ten seconds later it is."""
    router = Router()
    owner, _, third = router.pool.candidates("a")
    await router.residency.ensure(third, "a")
    for endpoint in at_home(router):
        router.stager_of(endpoint).error = NoSpace("full")
    for moment, asked in ((0.0, 1), (1.0, 1), (9.9, 1), (10.0, 2), (19.0, 2), (20.0, 3)):
        router.now = moment
        for _ in range(3):
            assert (await serve(router, chat("a"))).first_destination() == third.address
            await turns(5)
        assert len(router.stager_of(owner).asked) == asked


async def test_a_node_prepares_four_adapters_at_a_time() -> None:
    """Each is a load, which stalls what its engine generates. The others' turn comes with their next request."""
    router = Router(3)
    cold, _, warm = router.pool.table.endpoints
    names = [name for name in (f"a{i}" for i in range(200)) if router.owner(name) is cold and router.pool.candidates(name)[2] is warm][:10]
    for name in names:
        await router.residency.ensure(warm, name)
    router.stager_of(cold).gate.clear()
    for _ in range(2):
        for name in names:
            assert (await serve(router, chat(name))).first_destination() == warm.address
            router.membership.loads["models"].follow(())  # as if it had ended
            router.membership.loads["models"].follow(e.address for e in router.pool.table.endpoints)
        await turns()
    assert router.stager_of(cold).asked == names[:4]
    router.stager_of(cold).gate.set()
    await turns()
    for name in names:
        await serve(router, chat(name))
        router.membership.loads["models"].follow(())
        router.membership.loads["models"].follow(e.address for e in router.pool.table.endpoints)
    await turns()
    assert router.stager_of(cold).asked == names[:8]


async def test_an_owner_that_drains_is_not_prepared() -> None:
    """Nothing new may come there."""
    router = Router()
    owner, second, third = router.pool.candidates("a")
    await router.residency.ensure(third, "a")
    router.membership.observe(owner, is_leaving=True)
    router.membership.observe(second, is_leaving=True)
    assert (await serve(router, chat("a"))).first_destination() == third.address
    await turns()
    assert router.stager_of(owner).asked == router.stager_of(second).asked == []
    await router.stop()


# ---- load


def busy(router: Router, endpoint: Endpoint, in_flight: float) -> None:
    """Its engine says so."""
    router.membership.engine_says(endpoint.stager, Engine(running=in_flight), 0.0)


async def test_a_cold_adapter_goes_to_the_less_loaded_of_its_first_two() -> None:
    """And stays there."""
    router = Router()
    owner, second, _ = router.pool.candidates("a")
    busy(router, owner, 3)
    busy(router, second, 2)
    for _ in range(2):
        assert (await serve(router, chat("a"))).first_destination() == second.address
    assert router.stager_of(owner).asked == []


def test_what_is_held_for_long_makes_no_endpoint_look_busy() -> None:
    """Its origin hangs, and harms nobody whose adapters are there. What comes of it at last is sent, and counts once."""

    async def main() -> None:
        router = Router(1, clock=now, max_waiting_per_adapter=4)
        (stager,) = router.stagers.values()
        stager.gate.clear()
        requests = [asyncio.create_task(serve(router, chat("a"))) for _ in range(3)]
        load = router.membership.loads["models"][router.pool.table.endpoints[0].address]
        await asyncio.sleep(HELD_S - 0.1)
        assert load.held == 3
        await asyncio.sleep(0.2)
        assert load.held == 0
        requests.append(asyncio.create_task(serve(router, chat("a"))))
        await asyncio.sleep(0.1)
        assert load.held == 1
        stager.gate.set()
        await asyncio.gather(*requests)
        assert (load.held, load.gone) == (0, 4)
        await router.stop()

    in_virtual_time(main)


async def test_what_is_held_for_an_endpoint_counts_there_before_it_is_sent() -> None:
    """Else all cold requests that come within a fetch's time would choose the same place."""
    router = Router()
    place = router.pool.candidates("a")[0]
    stager = router.stager_of(place)
    stager.gate.clear()
    request = asyncio.create_task(serve(router, chat("a")))
    await until(lambda: stager.asked == ["a"])
    load = router.membership.loads["models"][place.address]
    assert (load.held, load.in_flight) == (1, 1)
    stager.gate.set()
    await request
    assert (load.held, load.in_flight) == (0, 1)


async def test_what_another_router_has_leased_on_a_draining_node_is_leased_there() -> None:
    """The other places would have to fetch it first. Its successor is prepared."""
    router = Router()
    draining, other, *_ = router.pool.candidates("a")
    router.residency.copies.put(draining.stager, "a", warm=True)
    router.membership.observe(draining, stager=Stager.DRAINING, why="maintenance")
    router.stager_of(other).gate.clear()
    assert (await serve(router, chat("a"))).first_destination() == draining.address
    assert router.stager_of(other).asked == ["a"]


async def test_above_the_bound_another_copy_is_made_and_both_serve() -> None:
    """The copy that is there serves while the files of the next are fetched; from then on the one with less in flight does."""
    router = Router(4)
    owner, second, *_ = router.pool.candidates("a")
    router.residency.copying.fetch_s = 4.0
    assert (await serve(router, chat("a"))).first_destination() == owner.address
    busy(router, owner, 20)
    for endpoint in router.pool.candidates("a")[1:]:
        busy(router, endpoint, 10)
    assert (await serve(router, chat("a"))).first_destination() == owner.address
    await until(lambda: router.residency.lease(second, "a"))
    assert (await serve(router, chat("a"))).destination() == f"{second.address},{owner.address}"
    busy(router, owner, 5)
    assert (await serve(router, chat("a"))).destination() == f"{owner.address},{second.address}"


async def test_of_many_copies_the_least_loaded_one_that_is_leased_and_ready_serves() -> None:
    """Whatever the adapter's other nodes are: busy, draining, or without a lease."""
    router = Router(8)
    draining, busy_one, unleased, first, second, *rest = router.pool.candidates("a", 8)
    for endpoint in (draining, busy_one, first, second):
        await router.residency.ensure(endpoint, "a")
    for endpoint in (unleased, *rest):
        router.residency.copies.put(endpoint.stager, "a", warm=True)
    for endpoint, running in ((draining, 1), (unleased, 1), (busy_one, 30), (first, 10), (second, 5), *((endpoint, 10) for endpoint in rest)):
        busy(router, endpoint, running)
    router.membership.observe(draining, stager=Stager.DRAINING, why="maintenance")
    assert (await serve(router, chat("a"))).first_destination() == second.address
    busy(router, second, 12)
    assert (await serve(router, chat("a"))).first_destination() == first.address
    assert all(stager.asked == [] for stager in (router.stager_of(endpoint) for endpoint in (unleased, *rest)))


async def test_above_the_bound_a_request_waits_for_a_copy_whose_files_are_there() -> None:
    """A load into another engine takes less than what everybody loses at one that has too much."""
    router = Router(4)
    owner, second, *_ = router.pool.candidates("a")
    await serve(router, chat("a"))
    router.residency.copies.put(second.stager, "a", warm=False)
    busy(router, owner, 20)
    assert (await serve(router, chat("a"))).first_destination() == second.address


async def test_a_warm_request_waits_no_longer_for_another_copy_than_that_may_take() -> None:
    """An adapter may be larger than those that were copied before, and its fetch makes progress all the time. Then the copy that is there serves."""
    router = Router(4, clock=asyncio.get_running_loop().time)
    owner, second, *_ = router.pool.candidates("a")
    router.residency.copying.fetch_s = 0.05
    await serve(router, chat("a"))
    busy(router, owner, 30)
    for endpoint in router.pool.candidates("a")[1:]:
        busy(router, endpoint, 10)
    router.stager_of(second).gate.clear()
    assert (await serve(router, chat("a"))).first_destination() == owner.address
    assert router.stager_of(second).asked == ["a"]
    assert router.metrics.hedges._value.get() == 0
    await router.stop()


async def test_a_copy_of_which_a_stager_tells_is_asked_for_before_one_is_made() -> None:
    """Another router had it made; a lease on it costs one call and no load."""
    router = Router(4)
    owner, _, third, _ = router.pool.candidates("a")
    router.residency.copies.put(third.stager, "a", warm=True)
    assert (await serve(router, chat("a"))).first_destination() == third.address
    assert router.stager_of(owner).asked == []
    await router.stop()


async def test_of_all_who_wait_for_the_first_copy_no_more_go_there_at_once_than_an_engine_computes() -> None:
    """The first to come go first. The rest wait for the next copy, which is made now that a node has the files; one fetch was enough until then."""
    router = Router(10, max_waiting_per_adapter=100)
    router.residency.copying.fetch_s = 4.0
    places = router.pool.candidates("a")[:3]
    stagers = [router.stager_of(endpoint) for endpoint in places]
    for stager in stagers:
        stager.gate.clear()
    requests = [asyncio.create_task(serve(router, chat("a"))) for _ in range(2 * ONCE + 1)]
    await turns(20)
    assert [stager.asked for stager in stagers] == [["a"], [], []]
    stagers[0].gate.set()
    await turns(20)
    assert [request.done() for request in requests] == [True] * ONCE + [False] * (ONCE + 1)
    assert [stager.asked for stager in stagers] == [["a"], ["a"], []]
    stagers[1].gate.set()
    stagers[2].gate.set()
    streams = await asyncio.gather(*requests)
    assert Counter(stream.first_destination() for stream in streams) == {
        endpoint.address: count for endpoint, count in zip(places, (ONCE, ONCE, 1), strict=True)
    }
    await router.stop()


async def test_base_models_go_to_the_endpoint_with_the_least_in_flight() -> None:
    """The same loads count for them."""
    router = Router(3)
    first, second, third = router.pool.table.endpoints
    busy(router, first, 2)
    busy(router, third, 1)
    assert (await serve(router, chat("base"))).first_destination() == second.address


# ---- a candidate that makes no progress


def test_beside_a_candidate_without_progress_the_next_is_asked_and_the_first_answer_wins(caplog: pytest.LogCaptureFixture) -> None:
    """After `hedge_s`, and after as long again a third. Who loses goes on for those who come."""

    async def main() -> None:
        router, order, stagers = router_of(4, hedge_s=3.0)
        for stager in stagers:
            stager.gate.clear()
        began = now()
        held = Gateway(router, chat("a"))
        asked_at: list[float] = []
        while len(asked_at) < 3:
            await asyncio.sleep(0.01)
            asked_at += [round(now() - began, 1)] * (sum(len(stager.asked) for stager in stagers) - len(asked_at))
        assert asked_at == [0.0, 3.0, 6.0]
        await asyncio.sleep(20)
        assert [len(stager.asked) for stager in stagers] == [1, 1, 1, 0]
        assert held.written == []
        stagers[1].gate.set()
        await held.end()
        assert held.first_destination() == order[1].address
        assert router.value("lora_extproc_hedges_total") == 3  # the third was asked beside two
        assert (stagers[0].cancelled, stagers[2].cancelled) == (0, 0)
        stagers[0].gate.set()
        await turns()
        assert (await serve(router, chat("a"))).first_destination() == order[0].address
        stagers[2].gate.set()
        await turns()

    in_virtual_time(main)
    assert f"no progress for 3.0 s; {_second()} is asked too" in caplog.text


def test_a_stager_that_has_it_in_memory_and_does_not_answer_is_not_waited_for() -> None:
    """Another router had the copy made, and the stager hangs since: a lease on it would be a matter of milliseconds."""

    async def main() -> None:
        router, order, stagers = router_of(3, hedge_s=3.0)
        router.residency.copies.put(stagers[0].address, "a", warm=True)
        stagers[0].gate.clear()
        began = now()
        assert (await serve(router, chat("a"))).first_destination() == order[1].address
        assert now() - began == pytest.approx(0.5, abs=0.1)
        stagers[0].gate.set()
        await turns()

    in_virtual_time(main)


def test_a_request_that_may_go_to_a_leased_copy_by_now_asks_no_stager() -> None:
    """It had to wait for another copy a moment ago. The lease is as good as then, though the stager that gave it hangs since."""

    async def main() -> None:
        router, order, stagers = router_of(3)
        await serve(router, chat("a"))
        stagers[0].gate.clear()
        began = now()
        placed = await router.staging.wait(forward(router))
        assert (placed.endpoints, placed.outcome) == ((order[0],), "hit")
        assert now() - began == 0
        assert stagers[0].asked == ["a"]
        await router.stop()

    in_virtual_time(main)


def test_who_waits_for_another_copy_goes_back_to_the_leased_one_though_both_stagers_hang(caplog: pytest.LogCaptureFixture) -> None:
    """Where a lease counts nobody has to be asked."""

    async def main() -> None:
        router, order, stagers = router_of(3)
        await serve(router, chat("a"))
        router.residency.copies.put(stagers[1].address, "a", warm=True)
        busy(router, order[0], 20)
        for stager in stagers[:2]:
            stager.gate.clear()
        began = now()
        with caplog.at_level(logging.WARNING):
            assert (await serve(router, chat("a"))).first_destination() == order[0].address
        assert now() - began == pytest.approx(0.5, abs=0.1)
        assert [stager.asked for stager in stagers] == [["a"], ["a"], []]
        assert f"a on {stagers[1].address}: no progress for 0.5 s; {stagers[0].address} has it" in caplog.text
        await router.stop()

    in_virtual_time(main)


def _second() -> str:
    return Router(4).pool.candidates("a")[1].stager


def test_a_candidate_that_moves_is_not_hedged() -> None:
    """However long it takes: a large adapter comes in a minute, and says so."""

    async def main() -> None:
        router, order, stagers = router_of(hedge_s=3.0)
        stagers[0].gate.clear()
        stagers[0].progress = [float(second) for second in range(1, 55, 2)]
        held = Gateway(router, chat("a"))
        await asyncio.sleep(55)
        stagers[0].gate.set()
        await held.end()
        assert held.first_destination() == order[0].address
        assert [len(stager.asked) for stager in stagers] == [1, 0, 0]

    in_virtual_time(main)


def test_silence_that_is_usual_is_none() -> None:
    """A stager whose flights tell nothing for ten seconds is given three times that."""

    async def main() -> None:
        router, order, stagers = router_of(hedge_s=3.0)
        stagers[0].gate.clear()
        for name in range(20):
            staging = asyncio.create_task(router.residency.ensure(order[0], f"other{name}"))
            await asyncio.sleep(10)
            stagers[0].gate.set()
            await staging
            stagers[0].gate.clear()
        usual = router.residency.usual_gap_s(order[0])
        assert usual == pytest.approx(10, rel=0.05)
        held = Gateway(router, chat("a"))
        await asyncio.sleep(3 * usual - 0.1)
        assert stagers[1].asked == []
        await asyncio.sleep(0.2)
        assert stagers[1].asked == ["a"]
        await held.end()
        assert held.first_destination() == order[1].address
        stagers[0].gate.set()
        await turns()

    in_virtual_time(main)


def test_who_comes_to_a_flight_that_is_stuck_already_does_not_wait_again() -> None:
    """For how long it has told nothing counts, not for how long this request has waited."""

    async def main() -> None:
        router, order, stagers = router_of(hedge_s=3.0)
        stagers[0].gate.clear()
        stuck = asyncio.create_task(router.residency.ensure(order[0], "a"))
        await asyncio.sleep(30)
        began = now()
        assert (await serve(router, chat("a"))).first_destination() == order[1].address
        assert now() == began
        stagers[0].gate.set()
        await stuck

    in_virtual_time(main)


def test_a_hedge_that_fails_leaves_the_first_to_answer() -> None:
    """And one that fails for every node ends the wait."""

    async def main() -> None:
        router, order, stagers = router_of(hedge_s=3.0)
        stagers[0].gate.clear()
        stagers[1].error = stagers[2].error = NoSpace("full")
        held = Gateway(router, chat("a"))
        await asyncio.sleep(10)
        assert [len(stager.asked) for stager in stagers] == [1, 1, 1]
        assert held.written == []
        stagers[0].gate.set()
        await held.end()
        assert held.first_destination() == order[0].address
        stagers[0].gate.clear()
        stagers[1].error = ModelNotFound("no origin has b")
        router, order, stagers = router_of(hedge_s=3.0)
        stagers[0].gate.clear()
        stagers[1].error = ModelNotFound("no origin has a")
        refused = await serve(router, chat("a"))
        assert refused.immediate().details == "model_not_found"
        stagers[0].gate.set()
        await turns()

    in_virtual_time(main)


@pytest.mark.parametrize("error", [ModelNotFound("no origin has it"), NoSpace("full")])
def test_of_two_that_answer_in_the_same_moment_the_good_answer_counts(error: ModelNotFound | NoSpace, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever is looked at first; and the other's failure is nobody's complaint."""

    async def main() -> None:
        for good in (0, 1):
            router, order, stagers = router_of(hedge_s=3.0)
            for stager in stagers:
                stager.gate.clear()
            wait = asyncio.create_task(router.staging.wait(forward(router)))
            await asyncio.sleep(5)
            stagers[1 - good].error = error
            for stager in stagers:
                stager.gate.set()
            placed = await wait
            assert placed.endpoints[0] is order[good]
            await turns()

    in_virtual_time(main)
    assert "never retrieved" not in caplog.text


# ---- failures


def test_a_failure_that_another_node_may_not_share_goes_on_and_the_last_is_the_answer() -> None:
    """At most three nodes: a fault of three in a row is not theirs."""

    async def main() -> None:
        router, _, stagers = router_of(5)
        for stager, error in zip(stagers, (OriginDown("an origin is down"), StagerUnavailable("gone"), NoSpace("full")), strict=False):
            stager.error = error
        with pytest.raises(NoSpace, match="full"):
            await router.staging.wait(forward(router))
        assert [len(stager.asked) for stager in stagers] == [1, 1, 1, 0, 0]
        assert MAX_CANDIDATES == 3
        assert router.value("lora_extproc_failovers_total") == 3

    in_virtual_time(main)


def test_the_deadline_is_kept_whatever_the_candidates_do() -> None:
    """Stuck, failing or full."""

    async def main() -> None:
        router, _, stagers = router_of(no_space_wait_s=100.0)
        stagers[0].gate.clear()
        stagers[1].error = stagers[2].error = NoSpace("full")
        began = now()
        with pytest.raises(StageDeadline, match=r"a is still being fetched after 7\.5 s"):
            await router.staging.wait(forward(router, 7.5))
        assert now() - began == 7.5
        stagers[0].gate.set()
        stagers[0].error = NoSpace("full")
        await turns()
        began = now()
        with pytest.raises(StageDeadline):
            await router.staging.wait(forward(router, 7.5))
        assert now() - began == 7.5

    in_virtual_time(main)


# ---- no room


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.25, 3.3, 10.0])
def test_the_wait_for_room_is_kept_exactly(seconds: float) -> None:
    """Nobody makes room: after `no_space_wait_s` the request is told so, not after the next walk."""

    async def main() -> None:
        router, _, stagers = router_of(2, no_space_wait_s=seconds)
        for stager in stagers:
            stager.error = NoSpace("full")
        began = now()
        refused = await serve(router, chat("a"))
        assert (refused.immediate().details, refused.answer_headers()["retry-after"]) == ("no_space", "10")
        assert now() - began == pytest.approx(seconds)

    in_virtual_time(main)


def test_the_wait_for_room_counts_what_the_first_walk_took() -> None:
    """A stager that needs eight seconds to say that it is full leaves two of ten."""

    async def main() -> None:
        router, _, stagers = router_of(1, no_space_wait_s=10.0, hedge_s=60.0)
        stagers[0].gate.clear()
        stagers[0].error = NoSpace("full")
        began = now()
        held = Gateway(router, chat("a"))
        await asyncio.sleep(8)
        stagers[0].gate.set()
        await held.end()
        assert held.immediate().details == "no_space"
        assert now() - began == pytest.approx(10.0)

    in_virtual_time(main)


def test_where_no_node_has_room_the_walk_is_repeated_for_a_while() -> None:
    """A lease ends, and the request that was held gets its place; origins are not asked more often than every two seconds."""

    async def main() -> None:
        router, order, stagers = router_of(2, no_space_wait_s=30.0)
        for stager in stagers:
            stager.error = NoSpace("full")
        held = Gateway(router, chat("a"))
        await asyncio.sleep(20)
        assert not held.written
        assert len(stagers[0].asked) <= 14
        stagers[0].error = None
        await held.end()
        assert held.first_destination() == order[0].address

    in_virtual_time(main)


# ---- what was waited for while the body arrived


async def test_a_place_that_was_waited_for_is_kept_while_it_is_one() -> None:
    """Minutes may lie between the model and the body's end: by then its lease may be gone, or another version there."""
    router = Router()
    for stager in router.stagers.values():
        stager.renames = True
    placed = await router.staging.wait(forward(router))
    again = router.staging.again(forward(router), placed)
    assert again == Placed(placed.endpoints, "staged", "file", placed.waited_s, "a@sha256:dddddddddddd", sent=placed.endpoints[:1])
    owner = placed.endpoints[0]
    router.residency.forget(owner.stager, "a")
    assert router.staging.again(forward(router), placed) is None
    router.stager_of(owner).digest = "e" * 64
    await router.residency.ensure(owner, "a")
    again = router.staging.again(forward(router), placed)
    assert again is not None
    assert again.model == "a@sha256:eeeeeeeeeeee"


def test_the_log_says_what_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """One line per candidate that is asked beside it."""

    async def main() -> None:
        router, order, stagers = router_of(hedge_s=3.0)
        stagers[0].gate.clear()
        await serve(router, chat("a"))
        stagers[0].gate.set()
        await turns()
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "extproc.router.staging"]
        assert lines == [f"a on {order[0].stager}: no progress for 3.0 s; {order[1].stager} is asked too"]

    in_virtual_time(main)
