"""How a router follows a fleet: endpoints that come, go, come back, join and drain. In virtual time where time counts."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from extproc.client import Inventory, Loaded, NodeState, Unloaded
from extproc.core.endpoint import Endpoint
from extproc.core.fleet import Fleet, Found
from extproc.core.load import FORGOTTEN_S, Engine
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.standing import MISSED, Standing
from extproc.errors import NodeDraining, NoSpace, StagerUnavailable
from extproc.router import membership as membership_module
from extproc.router import moving
from tests.fakes.wait import in_virtual_time, turns, until

from .fakes import Router, ScriptedStager, chat, serve

READY, JOINING, DRAINING, DOWN = Standing.READY, Standing.JOINING, Standing.DRAINING, Standing.DOWN


def now() -> float:
    return asyncio.get_running_loop().time()


async def in_time(condition: Callable[[], object]) -> None:
    """Let virtual time pass until `condition()` holds."""
    async with asyncio.timeout(1000):
        while not condition():
            await asyncio.sleep(0.01)


def fleet(endpoints: Sequence[Endpoint], leaving: Sequence[Endpoint] = ()) -> Fleet:
    return {"models": [Found(endpoint, endpoint in leaving) for endpoint in endpoints]}


async def started(count: int = 3, **settings: Any) -> tuple[Router, list[Endpoint]]:
    router = Router(count, clock=now, **settings)
    router.membership.start()
    await turns()
    return router, list(router.pool.table.endpoints)


def fifth(instance: str = "") -> Endpoint:
    return Endpoint("10.0.0.5:8000", "node-5", "10.0.0.5:9102", instance)


def standing(router: Router, endpoint: Endpoint) -> Standing:
    return router.membership.snapshot.standing(endpoint)


def addresses(router: Router) -> list[str]:
    (pool,) = router.membership.snapshot.pools
    return [endpoint.address for endpoint in pool.table.endpoints]


def owned_by(router: Router, endpoint: Endpoint, count: int) -> list[str]:
    """Adapters that the endpoint owns, in the table that counts now."""
    (pool,) = router.membership.snapshot.pools
    return [name for name in (f"a{i}" for i in range(1000)) if pool.candidates(name)[0] == endpoint][:count]


# ---- coming


def test_an_endpoint_that_comes_is_given_what_it_will_own_before_it_is_sent_anything() -> None:
    """The hottest first. Meanwhile everything is served where it is warm."""

    async def main() -> None:
        router, old = await started()
        await router.membership.apply(fleet([*old, fifth()]))  # to know what it will own
        names = owned_by(router, fifth(), 3)
        await router.membership.apply(fleet(old))
        await asyncio.sleep(router.settings.hold_down_s + 1)
        assert addresses(router) == [e.address for e in old]
        for times, name in enumerate(names, 1):
            for _ in range(times):
                await serve(router, chat(name))
        stager = router.stagers["10.0.0.5:9102"] = ScriptedStager("10.0.0.5:9102")
        stager.gate.clear()
        await router.membership.apply(fleet([*old, fifth()]))
        await turns()
        assert standing(router, fifth()) is JOINING
        assert stager.asked == names[::-1]
        for name in (*names, "base", "base", "base", "base"):
            assert (await serve(router, chat(name))).first_destination() != fifth().address
        stager.gate.set()
        await in_time(lambda: standing(router, fifth()) is READY)
        for endpoint in old:
            router.membership.engine_says(endpoint.stager, Engine(running=9), 0.0)
        assert (await serve(router, chat(names[0]))).first_destination() == fifth().address
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_an_endpoint_that_cannot_be_given_anything_is_ready_all_the_same(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    """After `join_s` at the latest: what it lacks is staged when it is asked for."""

    async def main() -> None:
        router, old = await started(join_s=20)
        await router.membership.apply(fleet([*old, fifth()]))
        names = owned_by(router, fifth(), 1)
        await in_time(lambda: standing(router, fifth()) is READY)
        await router.membership.apply(fleet(old))
        await asyncio.sleep(router.settings.hold_down_s + 1)
        await serve(router, chat(names[0]))
        stager = router.stagers["10.0.0.5:9102"] = ScriptedStager("10.0.0.5:9102")
        if trouble == "hangs":
            stager.gate.clear()
        else:
            stager.error = NoSpace("full")
        await router.membership.apply(fleet([*old, fifth()]))
        began = now()
        await in_time(lambda: standing(router, fifth()) is READY)
        assert now() - began == pytest.approx(20 if trouble == "hangs" else 0, abs=0.1)
        stager.gate.set()
        await turns()
        await router.stop()

    in_virtual_time(main)
    assert ("and is ready with what it has" in caplog.text) == (trouble == "hangs")


async def leased_and_forgotten() -> tuple[Router, list[Endpoint], Endpoint]:
    """A router, its endpoints, and the one where `a` is leased, for which nobody has asked for a while."""
    router, old = await started()
    await serve(router, chat("a"))
    for _ in range(3):
        router.popularity.roll()
    return router, old, router.owner("a")


def test_where_nobody_else_is_ready_an_endpoint_is_ready_at_once() -> None:
    """A pool that had none, or whose only node restarts, waits for nothing."""

    async def main() -> None:
        router, _ = await started()
        await router.membership.apply(fleet([]))
        await asyncio.sleep(router.settings.hold_down_s + 1)
        await in_time(lambda: addresses(router) == [])  # its table is made in a thread
        await router.membership.apply(fleet([fifth()]))
        assert standing(router, fifth()) is READY
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("others", [True, False])
def test_an_endpoint_is_ready_only_when_those_who_send_know_it(others: bool) -> None:
    """Though it has what it will own, and though nobody else is ready: requests that wait for it would all be sent to where nobody can reach it yet."""

    class Envoys:
        def __init__(self) -> None:
            self.known = asyncio.Event()

        def is_known(self, address: str) -> bool:
            return self.known.is_set()

        async def until_known(self, addresses: Iterable[str]) -> None:
            assert list(addresses) == [fifth().address]
            await self.known.wait()

    async def main() -> None:
        envoys = Envoys()
        router, old = await started(senders=envoys)
        if not others:
            await router.membership.apply(fleet([]))
            await asyncio.sleep(router.settings.hold_down_s + 1)
        await router.membership.apply(fleet([*old, fifth()] if others else [fifth()]))
        await asyncio.sleep(1)
        assert standing(router, fifth()) is JOINING
        envoys.known.set()
        await turns()
        assert standing(router, fifth()) is READY
        await router.stop()

    in_virtual_time(main)


# ---- going, and coming back


def test_an_endpoint_that_vanishes_is_down_at_once_and_a_blip_moves_nothing() -> None:
    """Its place, its leases and its copies are kept for `hold_down_s`."""

    async def main() -> None:
        router, old = await started(hold_down_s=30)
        owner = router.owner("a")
        await serve(router, chat("a"))
        rest = [e for e in old if e != owner]
        await router.membership.apply(fleet(rest))
        assert router.membership.snapshot.standings[owner.address] == (DOWN, "its source of endpoints shows it no longer")
        assert (await serve(router, chat("b"))).first_destination() != owner.address
        await asyncio.sleep(20)
        await router.membership.apply(fleet(old))
        assert standing(router, owner) is READY
        assert (await serve(router, chat("a"))).first_destination() == owner.address
        assert router.stager_of(owner).asked == ["a"]
        await router.stop()

    in_virtual_time(main)


def test_one_that_stays_away_loses_its_place_its_client_and_its_label() -> None:
    """Nothing is left of it, and nobody asks for it."""

    async def main() -> None:
        router, old = await started(hold_down_s=30)
        gone = router.owner("a")
        await serve(router, chat("a"))
        await router.membership.apply(fleet([e for e in old if e != gone]))
        await asyncio.sleep(31)
        assert gone.address not in addresses(router)
        assert gone.stager not in router.stagers
        assert router.residency.lease(gone, "a") is None
        assert router.residency.copies.of("a") == []
        assert router.value("lora_extproc_owner_share", endpoint=gone.address) == 0
        assert gone.address not in router.membership.loads["models"]
        assert (await serve(router, chat("a"))).first_destination() != gone.address
        await router.stop()

    in_virtual_time(main)


def test_another_instance_under_an_old_address_has_nothing() -> None:
    """A pod that was replaced: what was leased at the one before it is not believed, and its stream is another."""

    async def main() -> None:
        router, old = await started()
        owner = router.owner("a")
        await serve(router, chat("a"))
        before = router.stagers[owner.stager]
        new = Endpoint(owner.address, owner.node, owner.stager, "pod-2")
        await router.membership.apply(fleet([*(e for e in old if e != owner), new]))
        await turns()
        assert router.stagers[owner.stager] is not before
        assert before.asked == router.stagers[owner.stager].asked == ["a"]  # the second time by its joining
        assert standing(router, new) is READY
        await router.stop()

    in_virtual_time(main)


async def test_pools_that_are_not_named_keep_their_endpoints() -> None:
    """A source that has not spoken empties nothing."""
    router = Router()
    before = router.membership.snapshot.pools
    await router.membership.apply({"another": [Found(fifth())]})
    assert router.membership.snapshot.pools == before


async def test_of_two_sets_the_last_counts_however_they_arrive() -> None:
    """They are applied one after the other."""
    router = Router()
    router.membership.start()
    old = list(router.pool.table.endpoints)
    await asyncio.gather(*(router.membership.apply(fleet(old[:count])) for count in (3, 2, 3, 2)))
    assert [standing(router, e) for e in old] == [READY, READY, DOWN]
    await router.stop()


# ---- draining


def test_what_drains_serves_until_its_successors_are_warm_and_is_left_empty() -> None:
    """Nobody waits, and its leases are given back."""

    async def main() -> None:
        router, old = await started()
        owner = router.owner("a")
        names = owned_by(router, owner, 6)
        for name in names:
            await serve(router, chat(name))
            await asyncio.sleep(FORGOTTEN_S + membership_module.TICK_S)  # so that none is placed elsewhere because of the others
        for endpoint in old:
            if endpoint != owner:
                router.stager_of(endpoint).gate.clear()
        router.stager_of(owner).events.put_nowait(NodeState(True, "maintenance", "first", resumed=True, draining=True))
        await in_time(lambda: standing(router, owner) is DRAINING)
        for name in names:
            assert (await serve(router, chat(name))).first_destination() == owner.address
        for endpoint in old:
            router.stager_of(endpoint).gate.set()
        await asyncio.sleep(10)
        for name in names:
            assert (await serve(router, chat(name))).first_destination() != owner.address
        assert router.residency.leased_at(owner.stager) == []
        assert sorted(router.stager_of(owner).released) == sorted(names)
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize(
    ("state", "pause_s"),
    [
        pytest.param(NodeState(True, "maintenance", "first", resumed=True, draining=True), 0.0, id="all-drain"),
        pytest.param(NodeState(False, "stopping", "first", resumed=True, draining=True), moving.OTHERS_STAY_S / 3, id="all-end-one-after-another"),
    ],
)
def test_where_nobody_else_is_ready_what_nobody_asks_for_is_kept(state: NodeState, pause_s: float) -> None:
    """As while all stagers are away: the next request for it can be served by that lease alone. Where they are told to end one after another, the first finds
    the others ready, and they are not for long."""

    async def main() -> None:
        router, old, owner = await leased_and_forgotten()
        for endpoint in sorted(old, key=lambda endpoint: endpoint != owner):
            router.stager_of(endpoint).events.put_nowait(state)
            await asyncio.sleep(pause_s)
        await asyncio.sleep(10)
        assert router.residency.leased_at(owner.stager) == [("a", False)]
        assert (await serve(router, chat("a"))).first_destination() == owner.address
        await router.stop()

    in_virtual_time(main)


def test_what_nobody_asks_for_any_more_is_given_back_soon() -> None:
    """A node that drains is not kept by leases that no request has used for a minute, whether others have room for them or not."""

    async def main() -> None:
        router, old, owner = await leased_and_forgotten()
        for endpoint in old:
            if endpoint != owner:
                router.stager_of(endpoint).error = NoSpace("full")
        router.stager_of(owner).events.put_nowait(NodeState(True, "maintenance", "first", resumed=True, draining=True))
        await asyncio.sleep(10)
        assert router.residency.leased_at(owner.stager) == []
        assert router.stager_of(owner).released == ["a"]
        await router.stop()

    in_virtual_time(main)


async def test_a_node_that_drains_and_refuses_an_adapter_is_not_asked_for_it_again() -> None:
    """What it was believed to have in memory it has on its disk alone, where it is of use again after the drain."""
    router = Router(1)
    owner = router.owner("a")
    router.residency.copies.put(owner.stager, "a", warm=True)
    router.stager_of(owner).error = NodeDraining("this node drains")
    with pytest.raises(NodeDraining):
        await router.residency.ensure(owner, "a")
    assert router.residency.copies.of("a") == [(owner.stager, False)]
    await router.stop()


def test_a_source_that_says_so_drains_an_endpoint_and_takes_it_back() -> None:
    """As Kubernetes does of a pod that terminates."""

    async def main() -> None:
        router, old = await started()
        await router.membership.apply(fleet(old, leaving=old[:1]))
        assert standing(router, old[0]) is DRAINING
        await router.membership.apply(fleet(old))
        assert standing(router, old[0]) is READY
        await router.stop()

    in_virtual_time(main)


def test_a_stager_that_is_lost_moves_nothing() -> None:
    """It may be back in a moment, and what is leased there is served meanwhile."""

    async def main() -> None:
        router, _ = await started()
        owner = router.owner("a")
        await serve(router, chat("a"))
        router.stager_of(owner).first_state = None
        router.stager_of(owner).events.put_nowait(None)
        await asyncio.sleep(10)
        assert standing(router, owner) is DRAINING
        assert router.residency.leased_at(owner.stager) == [("a", False)]
        assert sum(len(stager.asked) for stager in router.stagers.values()) == 1
        await router.stop()

    in_virtual_time(main)


def test_an_endpoint_is_let_go_although_its_timer_is_early() -> None:
    """It is looked at again: nobody else would, until the fleet changes once more, and it would stand as down for good."""

    async def main() -> None:
        router = Router(3, clock=lambda: now() * 0.9999, hold_down_s=10.0)
        router.membership.start()
        old = list(router.pool.table.endpoints)
        await router.membership.apply(fleet(old))
        await router.membership.apply(fleet(old[:2]))
        await in_time(lambda: addresses(router) == [e.address for e in old[:2]])
        await router.stop()

    in_virtual_time(main)


def test_a_lease_that_could_not_be_given_back_is_given_back_later() -> None:
    """A stager that hangs while its node drains: it would count as needed until the lease ends by itself."""

    async def main() -> None:
        router, _ = await started()
        owner = router.owner("a")
        await serve(router, chat("a"))
        stager = router.stager_of(owner)
        stager.error = StagerUnavailable("it hangs")
        router.residency.give_back(owner.stager, "a", plain=False)
        await asyncio.sleep(15)
        failed = len(stager.released)
        stager.error = None
        await asyncio.sleep(60)
        assert failed > 1
        assert len(stager.released) == failed + 1  # the one that succeeded was the last
        await router.stop()

    in_virtual_time(main)


def test_a_lease_that_has_ended_is_not_given_back_any_more() -> None:
    """Its stager may be gone for good."""

    async def main() -> None:
        router, _ = await started()
        owner = router.owner("a")
        await serve(router, chat("a"))
        stager = router.stager_of(owner)
        stager.error = StagerUnavailable("it is gone")
        router.residency.give_back(owner.stager, "a", plain=False)
        await asyncio.sleep(stager.lease_s)
        failed = len(stager.released)
        await asyncio.sleep(stager.lease_s)
        assert len(stager.released) == failed
        await router.stop()

    in_virtual_time(main)


# ---- who served


def test_an_endpoint_that_the_proxy_passes_over_is_down_until_it_may_try_again(caplog: pytest.LogCaptureFixture) -> None:
    """Though its stager lives, and this router reaches its engine. One request that went elsewhere proves nothing."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        router, (first, second, _) = await started()
        named = (first, second)
        router.membership.served(named, second.address)
        router.membership.served(named, first.address)
        for _ in range(MISSED - 1):
            router.membership.served(named, second.address)
        assert standing(router, first) is READY
        router.membership.served(named, second.address)
        assert router.membership.snapshot.standings[first.address] == (DOWN, "the proxy could not reach it")
        await asyncio.sleep(membership_module.MISSED_S + 0.1)
        assert standing(router, first) is READY
        router.membership.served(named, second.address)
        assert standing(router, first) is DOWN
        await asyncio.sleep(membership_module.MISSED_S + 0.1)
        router.membership.served(named, first.address)
        router.membership.served(named, second.address)
        assert (standing(router, first), standing(router, second)) == (READY, READY)
        await router.stop()

    in_virtual_time(main)


def test_an_answer_from_off_the_list_takes_all_that_were_named_out_at_once() -> None:
    """The proxy has tried each of them; a request that is repeated must not wait for a second proof. Each may be tried again later."""

    async def main() -> None:
        router, (first, second, third) = await started()
        router.membership.served((first, second), third.address)
        router.membership.served((first, second), "10.9.9.9:8000")  # another that was sent before the first was heard of
        assert [standing(router, e) for e in (first, second, third)] == [DOWN, DOWN, READY]
        await asyncio.sleep(membership_module.MISSED_S + 0.1)
        assert [standing(router, e) for e in (first, second)] == [READY, READY]
        await router.stop()

    in_virtual_time(main)


def test_those_before_the_one_that_served_were_passed_over() -> None:
    """Not those behind it, which the proxy had no reason to try."""

    async def main() -> None:
        router, (first, second, third) = await started()
        for _ in range(MISSED):
            router.membership.served((first, second, third), second.address)
        assert [standing(router, e) for e in (first, second, third)] == [DOWN, READY, READY]
        await router.stop()

    in_virtual_time(main)


# ---- what stagers tell


async def test_what_a_node_has_is_known_by_its_inventory_and_its_changes() -> None:
    """Whole after a state that is not resumed, whatever was believed before; in parts."""
    router = Router(1)
    router.membership.start()
    (stager,) = router.stagers.values()
    node = stager.address
    copies = router.residency.copies
    copies.put(node, "old", warm=True)
    for event in (
        NodeState(True, "", "first"),
        Inventory(("c1", "c2"), ("w1",), more=True),
        Inventory((), ("w2",)),
        Loaded("c1"),
        Unloaded("w1"),
    ):
        stager.events.put_nowait(event)
    await until(lambda: copies.of("w1") == [(node, False)])
    assert [copies.of(name) for name in ("c1", "c2", "w2", "old")] == [[(node, True)], [(node, False)], [(node, True)], []]
    stager.events.put_nowait(NodeState(True, "", "first"))
    stager.events.put_nowait(Inventory(("c2",), ()))
    await until(lambda: not copies.of("w2"))
    assert copies.of("c2") == [(node, False)]
    await router.stop()


# ---- size


async def test_a_thousand_endpoints_are_followed_by_one_snapshot_each_change() -> None:
    """However many come at once."""
    router = Router(1, pools=[Pool("models", frozenset(), ("*",), LookupTable([]))])
    many = [Endpoint(f"10.1.{i // 250}.{i % 250}:8000") for i in range(1000)]
    version = router.membership.snapshot.version
    await router.membership.apply(fleet(many))
    assert router.membership.snapshot.version <= version + 3
    await router.membership.apply(fleet(many[:-1]))
    assert standing(router, many[-1]) is DOWN
    await router.stop()
