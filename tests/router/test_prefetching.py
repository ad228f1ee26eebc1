"""What is brought before it is asked for: when, where, how much of it, and whether it was worth it. In virtual time."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from extproc.client import Evicted, Loading, Published, Woken
from extproc.core.endpoint import Endpoint
from extproc.core.load import Engine
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.errors import ModelNotFound, PrefetchGivenUp
from extproc.router.prefetching import LOOK_S, TICK_S
from tests.fakes.wait import in_virtual_time

from .fakes import Router, ScriptedStager, chat, serve

PERIOD_S = 1830.0
DAY_S = 86_400.0


def router_of(**settings: Any) -> Router:
    router = Router(3, clock=lambda: asyncio.get_running_loop().time(), **{"prefetch": "disk", **settings})
    router.membership.start()
    router.prefetching.start()
    return router


def router_of_two() -> Router:
    """One endpoint decodes, and one computes its prompts."""
    decode, prefill = (Endpoint(f"10.0.0.{number}:8000", "", f"10.0.0.{number}:9102") for number in (1, 2))
    pools = [
        Pool("decode", frozenset({"base"}), ("*",), LookupTable([decode], 251), prefill="prefill"),
        Pool("prefill", frozenset(), (), LookupTable([prefill], 251), is_prefill=True),
    ]
    return router_of(pools=pools)


def stager(router: Router, adapter: str = "a") -> ScriptedStager:
    return router.stager_of(router.owner(adapter))


async def leave(router: Router, adapter: str = "a") -> None:
    """It is on no node any more, as the stagers tell."""
    for each in router.stagers.values():
        each.known.discard(adapter)
        each.events.put_nowait(Evicted(adapter))
    await asyncio.sleep(0.01)


async def wake_up(router: Router, times: int = 4, adapter: str = "a") -> None:
    """So many requests, PERIOD_S apart, after each of which the adapter leaves. The last one was just now."""
    for number in range(times):
        await asyncio.sleep(PERIOD_S if number else 0)
        await serve(router, chat(adapter))
        await leave(router, adapter)


def brought(router: Router) -> list[str]:
    return [adapter for each in router.stagers.values() for adapter in each.prefetched]


def test_what_wakes_up_every_half_hour_is_brought_before_it_does() -> None:
    """To the node where the request then goes, which finds it there; once."""

    async def main() -> None:
        router = router_of()
        await wake_up(router)
        assert brought(router) == []
        await asyncio.sleep(PERIOD_S - 300)
        assert brought(router) == []
        await asyncio.sleep(300)
        assert stager(router).prefetched == brought(router) == ["a"]
        assert stager(router).loadings[-1] is Loading.NONE
        assert 60 < stager(router).kept_s[-1] < 300
        assert router.residency.leased_at(stager(router).address) == []
        await serve(router, chat("a"))
        assert router.value("lora_extproc_wakeups_total", idle="short", found="disk") == 1
        assert router.value("lora_extproc_wakeups_total", idle="short", found="nowhere") == 3
        assert router.value("lora_extproc_prefetches_total", by="idle_times", result="staged") == 1
        assert router.value("lora_extproc_prefetches_ended_total", by="idle_times", result="used") == 1
        await router.stop()

    in_virtual_time(main)


def test_what_was_active_at_this_time_yesterday_is_brought_to_the_disk_alone() -> None:
    """In an engine's memory a guess that is wrong three times of four would cost too much."""

    async def main() -> None:
        router = router_of(prefetch="engine")
        await serve(router, chat("a"))
        await leave(router)
        await asyncio.sleep(DAY_S)
        assert stager(router).prefetched == ["a"]
        assert stager(router).loadings[-1] is Loading.NONE
        await serve(router, chat("a"))
        assert router.value("lora_extproc_wakeups_total", idle="long", found="disk") == 1
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("has_slots", [True, False])
def test_what_repeats_is_brought_into_the_engine_too(has_slots: bool) -> None:
    """Also where it is on the disk already. Whether a slot is free is for the node to say."""

    async def main() -> None:
        router = router_of(prefetch="engine")
        await wake_up(router)
        there = stager(router)
        there.has_slots = has_slots
        there.known.add("a")
        there.events.put_nowait(Published("a"))
        await asyncio.sleep(PERIOD_S)
        assert there.prefetched == ["a"]
        assert there.loadings[-1] is Loading.VERSIONED
        assert router.value("lora_extproc_prefetches_total", by="idle_times", result="loaded" if has_slots else "hit") == 1
        await serve(router, chat("a"))
        assert router.value("lora_extproc_prefetches_ended_total", by="idle_times", result="used") == has_slots
        await router.stop()

    in_virtual_time(main)


def test_what_is_on_a_disk_is_not_brought_there() -> None:
    """Nobody would have to wait for it."""

    async def main() -> None:
        router = router_of()
        await wake_up(router)
        stager(router).events.put_nowait(Published("a"))
        await asyncio.sleep(PERIOD_S)
        assert brought(router) == []
        await router.stop()

    in_virtual_time(main)


def test_what_leaves_before_anybody_asks_for_it_was_brought_in_vain() -> None:
    """Precision counts it, when it is looked at the next time."""

    async def main() -> None:
        router = router_of()
        await wake_up(router)
        await asyncio.sleep(PERIOD_S)
        assert brought(router) == ["a"]
        await leave(router)
        await asyncio.sleep(LOOK_S + 2 * TICK_S)
        assert router.value("lora_extproc_prefetches_ended_total", by="idle_times", result="unused") == 1
        await serve(router, chat("a"))
        assert router.value("lora_extproc_prefetches_ended_total", by="idle_times", result="used") == 0
        await router.stop()

    in_virtual_time(main)


def test_a_router_expects_what_others_are_asked_for() -> None:
    """A stager tells whenever a request, of whichever router, asks for what nobody leased there. Who brought it learns that it was used, too."""

    async def main() -> None:
        router = router_of()
        others = list(router.stagers.values())
        for number in range(4):
            await asyncio.sleep(PERIOD_S if number else 1)
            others[number % 3].events.put_nowait(Woken("a"))
            await asyncio.sleep(0.01)
        assert others[0].wakes
        await asyncio.sleep(PERIOD_S)
        assert stager(router).prefetched == ["a"]
        stager(router).events.put_nowait(Woken("a"))
        await asyncio.sleep(0.01)
        assert router.value("lora_extproc_prefetches_ended_total", by="idle_times", result="used") == 1
        await router.stop()

    in_virtual_time(main)


def test_each_node_is_asked_for_one_at_a_time_and_all_for_so_many_a_second() -> None:
    """What has to wait is looked at again a minute later, as long as it is expected."""

    async def main() -> None:
        router = router_of(prefetch_per_s=0.1)
        adapters = [f"a{number}" for number in range(12)]
        for _ in range(4):
            for adapter in adapters:
                router.prefetching.woken("10.0.0.1:9102", adapter)
            await asyncio.sleep(PERIOD_S if _ < 3 else 0)
        for each in router.stagers.values():
            each.gate.clear()
        await asyncio.sleep(PERIOD_S - 2 * LOOK_S)
        counts: list[int] = []
        for _ in range(6):
            await asyncio.sleep(10)
            counts.append(len(brought(router)))
        assert max(len(each.prefetched) for each in router.stagers.values()) == 1
        for each in router.stagers.values():
            each.gate.set()
        for _ in range(6):
            await asyncio.sleep(10)
            counts.append(len(brought(router)))
        assert counts[-1] > 3
        assert max(after - before for before, after in pairwise(counts)) <= 2
        await router.stop()

    in_virtual_time(main)


def test_what_a_node_gives_up_is_not_asked_for_again() -> None:
    """Its room or its bandwidth is needed: the reason is counted."""

    async def main() -> None:
        router = router_of()
        await wake_up(router)
        stager(router).error = PrefetchGivenUp("no room")
        await asyncio.sleep(PERIOD_S)
        assert brought(router) == ["a"]
        assert router.value("lora_extproc_prefetches_total", by="idle_times", result="prefetch_given_up") == 1
        await router.stop()

    in_virtual_time(main)


def test_where_prompts_are_computed_elsewhere_both_engines_nodes_are_given_it() -> None:
    """A request waits for both."""

    async def main() -> None:
        router = router_of_two()
        for _ in range(4):
            router.prefetching.woken("10.0.0.1:9102", "a")
            await asyncio.sleep(PERIOD_S)
        first, second, _ = router.stagers.values()
        assert (first.prefetched, second.prefetched) == (["a"], ["a"])
        await router.stop()

    in_virtual_time(main)


def test_it_is_brought_where_a_request_would_go_now() -> None:
    """Of the key's first two, to the one whose engine has room."""

    async def main() -> None:
        router = router_of()
        await wake_up(router)
        first, second, *_ = router.pool.order("a")
        router.membership.engine_says(first.stager, Engine(0, 0, 4), 0.0)
        router.membership.in_demand(first.stager, 4, 4)
        await asyncio.sleep(PERIOD_S)
        assert router.stager_of(second).prefetched == brought(router) == ["a"]
        await router.stop()

    in_virtual_time(main)


def test_nothing_is_brought_and_no_wake_up_told_where_it_is_off() -> None:
    """The default."""

    async def main() -> None:
        router = router_of(prefetch="off")
        await wake_up(router)
        await asyncio.sleep(PERIOD_S)
        assert brought(router) == []
        assert not stager(router).wakes
        await router.stop()

    in_virtual_time(main)


# ---- names that are none, and what goes on twice


def test_names_that_no_origin_has_are_not_remembered() -> None:
    """However many are invented: neither do they push out what is known, nor are they expected, nor do they count as asleep."""

    async def main() -> None:
        router = router_of()
        await wake_up(router)
        for each in router.stagers.values():
            each.error = ModelNotFound("no origin has it")
        for number in range(50):
            await serve(router, chat(f"invented/{number}"))
        for _ in range(5):
            await serve(router, chat("invented/again"))
            await asyncio.sleep(300)
        assert len(router.prefetching._histories) == 1
        assert router.value("lora_extproc_wakeups_total", idle="short", found="nowhere") == 3
        assert set(brought(router)) <= {"a"}
        await serve(router, chat("a"))  # it has been deleted
        assert len(router.prefetching._histories) == 0
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("error", [ModelNotFound, PrefetchGivenUp])
def test_of_two_engines_nodes_one_that_fails_is_not_asked_again_for_the_others_sake(error: type[ModelNotFound | PrefetchGivenUp]) -> None:
    """The other's turn comes with the next look, since one prefetch a second is all that may be asked for."""

    async def main() -> None:
        router = router_of_two()
        for _ in range(4):
            await asyncio.sleep(PERIOD_S)
            router.prefetching.woken("10.0.0.1:9102", "a")
        for each in router.stagers.values():
            each.error = error("as its origin says")
        await asyncio.sleep(PERIOD_S + 600)
        assert [len(router.stagers[f"10.0.0.{number}:9102"].prefetched) for number in (1, 2)] == [1, 1]
        await router.stop()

    in_virtual_time(main)
