"""A fleet that changes while other things happen: pools that exchange endpoints, joins without anybody left, drains of what cannot be had elsewhere, requests
that are held meanwhile. In virtual time."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from extproc.client import Inventory, NodeState, Staged, StagerClient
from extproc.core.endpoint import Endpoint
from extproc.core.fleet import Found
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.standing import Stager, Standing
from extproc.errors import ModelNotFound, NoSpace, StagerUnavailable, StartError
from extproc.heartbeat import Heard, Silent
from tests.fakes.wait import in_virtual_time, turns

from .fakes import SLOWLY, Gateway, Router, ScriptedStager, chat, serve
from .test_fleet import DOWN, DRAINING, JOINING, READY, addresses, fifth, fleet, in_time, now, owned_by, standing, started


def at(number: int, *, port: int = 8000, instance: str = "", stager: str = "") -> Endpoint:
    return Endpoint(f"10.0.0.{number}:{port}", f"node-{number}", stager or f"10.0.0.{number}:9102", instance)


def says(router: Router, endpoint: Endpoint, **state: Any) -> None:
    """What the endpoint's stager tells of its node."""
    router.stager_of(endpoint).events.put_nowait(NodeState(**{"ready": True, "why": "", "instance": "first", "resumed": True, **state}))


def lost(router: Router, endpoint: Endpoint) -> None:
    stager = router.stager_of(endpoint)
    stager.first_state = None
    stager.events.put_nowait(StagerUnavailable("connection reset"))


def outcome(stream: Gateway) -> str:
    last = stream.written[-1]
    return str(last.immediate_response.status.code) if last.HasField("immediate_response") else stream.first_destination()


# ---- pools


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("instance", ["", "another"])
def test_an_endpoint_that_goes_to_another_pool_is_there_alone(order: str, instance: str) -> None:
    """Whichever pool the settings name first, and whether a pod keeps its address or another has been given it."""

    async def main() -> None:
        pools = {
            "a": Pool("a", frozenset({"base-a"}), ("a*",), LookupTable([at(1), at(3)], 251)),
            "b": Pool("b", frozenset({"base-b"}), ("*",), LookupTable([at(2)], 251)),
        }
        router = Router(3, clock=now, pools=[pools[name] for name in order])
        router.membership.start()
        await turns()
        moved = {"a": [Found(at(1))], "b": [Found(at(2)), Found(at(3, instance=instance))]}
        if instance:
            await router.membership.apply({"a": [Found(at(1))], "b": [Found(at(2))]})
            assert standing(router, at(3)) is DOWN
        for _ in range(3):
            await router.membership.apply(moved)
            await asyncio.sleep(router.settings.hold_down_s + 1)
            tables = {pool.name: [endpoint.address for endpoint in pool.table.endpoints] for pool in router.membership.snapshot.pools}
            assert tables == {"a": [at(1).address], "b": [at(2).address, at(3).address]}
            assert router.membership.snapshot.standings == {}
        await router.stop()

    in_virtual_time(main)


def test_a_zone_that_is_told_later_counts() -> None:
    """By it copies are spread."""

    async def main() -> None:
        router, old = await started()
        await router.membership.apply(fleet([replace(endpoint, zone="east") for endpoint in old]))
        assert {endpoint.zone for endpoint in router.membership.snapshot.pools[0].table.endpoints} == {"east"}
        await router.stop()

    in_virtual_time(main)


# ---- stagers


@pytest.mark.parametrize(
    ("state", "stands"), [({"why": "drained", "draining": True}, DRAINING), ({"ready": False, "why": "its disk fails"}, DOWN)], ids=["drained", "not ready"]
)
def test_an_endpoint_that_comes_to_a_node_stands_as_its_node_says(state: dict[str, Any], stands: Standing) -> None:
    """Its stager has told the others, and tells nothing twice."""

    async def main() -> None:
        router, old = await started()
        says(router, old[0], **state)
        await turns()
        second = replace(at(1, port=8001), stager=old[0].stager)
        await router.membership.apply(fleet([*old, second]))
        await asyncio.sleep(60)
        assert (standing(router, old[0]), standing(router, second)) == (stands, stands)
        await router.stop()

    in_virtual_time(main)


def test_an_endpoint_whose_stager_is_corrected_stands_as_that_one_says() -> None:
    """Nothing that was heard of the wrong one is left, be there another now or none."""

    async def main() -> None:
        router, old = await started()
        wrong = at(4, port=8001, stager="10.0.0.4:9999")
        router.stagers[wrong.stager] = ScriptedStager(wrong.stager)
        lost(router, wrong)
        await router.membership.apply(fleet([*old, at(4), wrong]))
        await asyncio.sleep(10)
        assert standing(router, wrong) is DRAINING
        for right in (replace(wrong, stager=at(4).stager), replace(wrong, stager="")):
            await router.membership.apply(fleet([*old, at(4), right]))
            await asyncio.sleep(router.settings.join_s + 1)
            assert standing(router, right) is READY
        await router.stop()

    in_virtual_time(main)


def test_a_stager_that_could_not_be_connected_to_is_tried_again() -> None:
    """A file of credentials is replaced at the moment in which a node comes. The others are served meanwhile."""

    async def main() -> None:
        router, old = await started()
        connect = router.membership._connect

        def refuse(_: str) -> StagerClient:
            raise StartError("the token's file cannot be read")

        router.membership._connect = refuse
        await router.membership.apply(fleet([*old, fifth()]))
        assert fifth().stager not in router.stagers
        router.membership._connect = connect
        await in_time(lambda: fifth().stager in router.stagers)
        await router.residency.ensure(fifth(), "a")
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_a_node_has_is_known_after_it_was_cut_off_for_a_moment(is_lost: bool) -> None:
    """Neither its stager nor its engine was started again, so that nothing of it is told anew."""

    async def main() -> None:
        router, old = await started()
        node = old[0]
        stager = router.stager_of(node)
        stager.events.put_nowait(NodeState(True, "", "first"))
        stager.events.put_nowait(Inventory(("cold",), ("warm",)))
        stager.first_state = NodeState(True, "", "first", resumed=True)
        await turns()
        router.probe.dead.add(node.address)
        stager.events.put_nowait(Silent(1.0))
        await asyncio.sleep(2)
        assert standing(router, node) is DOWN
        if is_lost:
            stager.events.put_nowait(StagerUnavailable("silent for 3 s"))
            await asyncio.sleep(2)
        router.probe.dead.clear()
        stager.events.put_nowait(Heard())
        await asyncio.sleep(5)
        assert [router.residency.copies.of(name) for name in ("cold", "warm")] == [[(node.stager, False)], [(node.stager, True)]]
        await router.stop()

    in_virtual_time(main)


# ---- joining and draining


@pytest.mark.parametrize("how", ["replaced", "drained", "dead"])
def test_who_joins_serves_at_once_where_nobody_is_ready_any_more(how: str) -> None:
    """It was being given what it will own, which takes minutes."""

    async def main() -> None:
        router, old = await started(2)
        new = [at(5), at(6)]
        for number in range(100):
            router.popularity.count(f"a{number}", f"a{number}")
        for endpoint in new:
            stager = router.stagers[endpoint.stager] = ScriptedStager(endpoint.stager)
            stager.gate.clear()
        if how != "replaced":
            await router.membership.apply(fleet([*old, *new]))
            await asyncio.sleep(1)
            assert {standing(router, endpoint) for endpoint in new} == {JOINING}
        if how == "replaced":
            await router.membership.apply(fleet(new))
        for endpoint in old if how != "replaced" else ():
            says(router, endpoint, **({"draining": True} if how == "drained" else {"ready": False, "why": "its engine fails"}))
        await asyncio.sleep(0.1)
        assert READY in {standing(router, endpoint) for endpoint in new}
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("by", ["its operator", "its source"])
def test_a_node_that_drains_while_its_stager_is_lost_is_emptied(by: str) -> None:
    """It was draining before, but only for that reason, and may have been back in a moment."""

    async def main() -> None:
        router, old = await started(2)
        node = old[0]
        router.stager_of(node).lease_s = 10_000
        await router.residency.ensure(node, "a")
        router.popularity.count("a", "a")
        lost(router, node)
        await asyncio.sleep(2)
        assert standing(router, node) is DRAINING
        assert router.residency.leased_at(node.stager)
        if by == "its source":
            await router.membership.apply(fleet(old, [node]))
        else:
            says(router, node, draining=True)
        await in_time(lambda: not router.residency.leased_at(node.stager))
        assert router.residency.known(old[1], "a")
        await router.stop()

    in_virtual_time(main)


def test_what_nobody_else_can_have_does_not_keep_the_rest_from_leaving() -> None:
    """However hot it is. It is tried again now and then, not all the time."""

    async def main() -> None:
        router, old = await started()
        node = old[0]
        router.stager_of(node).lease_s = 10_000
        names = owned_by(router, node, 12)
        for heat, name in enumerate(reversed(names), start=1):
            for _ in range(heat):
                router.popularity.count(name, name)
            await router.residency.ensure(node, name)
        refused: Counter[str] = Counter()

        async def ensure(adapter: str, **_: Any) -> Staged:
            refused[adapter] += adapter in names[:5]
            if adapter in names[:5]:
                raise ModelNotFound(f"{adapter} has been deleted")
            return Staged("d" * 64, True, "file", 100.0, 0.1, 1000)

        for other in old[1:]:
            router.stager_of(other).ensure = ensure  # type: ignore[assignment]
        says(router, node, draining=True)
        await asyncio.sleep(20)
        assert {adapter for adapter, _ in router.residency.leased_at(node.stager)} == set(names[:5])
        assert max(refused.values()) <= 20
        await router.stop()

    in_virtual_time(main)


def test_one_that_leaves_a_node_gives_back_nothing_that_serves_another_one_there() -> None:
    """The leases are the stager's."""

    async def main() -> None:
        router, old = await started()
        second = replace(at(1, port=8001), stager=old[0].stager)
        await router.membership.apply(fleet([*old, second]))
        await router.residency.ensure(second, "a")
        router.popularity.count("a", "a")
        await router.membership.apply(fleet([*old, second], [old[0]]))
        await asyncio.sleep(20)
        assert router.residency.known(second, "a")
        assert router.stager_of(second).released == []
        await router.stop()

    in_virtual_time(main)


# ---- requests


def test_requests_that_are_held_choose_among_the_endpoints_that_are_left() -> None:
    """One that they might have gone to has lost its place while what they wait for is fetched."""

    async def main() -> None:
        router, old = await started(4, max_waiting_per_adapter=100)
        owner, second = router.pool.candidates("a")[:2]
        router.stager_of(owner).progress = SLOWLY
        router.stager_of(owner).gate.clear()
        streams = [Gateway(router, chat("a")) for _ in range(60)]
        await asyncio.sleep(1)
        await router.membership.apply(fleet([endpoint for endpoint in old if endpoint != second]))
        await asyncio.sleep(router.settings.hold_down_s + 1)
        assert second.address not in addresses(router)
        router.stager_of(owner).gate.set()
        for stream in streams:
            await stream.end()
        assert set(map(outcome, streams)) <= {endpoint.address for endpoint in old if endpoint != second}
        await router.stop()

    in_virtual_time(main)


def test_requests_for_which_nobody_had_room_choose_among_the_endpoints_that_are_left() -> None:
    """As those that wait for one fetch."""

    async def main() -> None:
        router, old = await started(hold_down_s=0, no_space_wait_s=10)
        for stager in router.stagers.values():
            stager.error = NoSpace("full")
        streams = [Gateway(router, chat(f"a{number}")) for number in range(6)]
        await asyncio.sleep(1)
        await router.membership.apply(fleet(old[:2]))
        await asyncio.sleep(1)
        for stager in router.stagers.values():
            stager.error = None
        for stream in streams:
            await stream.end()
        assert set(map(outcome, streams)) <= {endpoint.address for endpoint in old[:2]}
        await router.stop()

    in_virtual_time(main)


def test_who_was_waited_for_and_is_down_by_then_is_sent_nothing() -> None:
    """Its stager has answered well; its source shows it no longer."""

    async def main() -> None:
        router, old = await started()
        owner = router.owner("a")
        router.stager_of(owner).progress = SLOWLY
        router.stager_of(owner).gate.clear()
        stream = Gateway(router, chat("a"))
        await asyncio.sleep(1)
        await router.membership.apply(fleet([endpoint for endpoint in old if endpoint != owner]))
        router.stager_of(owner).gate.set()
        await stream.end()
        assert outcome(stream) in {endpoint.address for endpoint in old if endpoint != owner}
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("how", ["drain", "join"])
def test_an_adapter_whose_own_places_can_be_given_nothing_goes_to_those_that_can(how: str) -> None:
    """Of eight endpoints five drain, or of twelve eight are joining: whatever the key's first places are, somebody is ready."""

    async def main() -> None:
        router, old = await started(8 if how == "drain" else 4)
        if how == "drain":
            for endpoint in old[:5]:
                router.membership.observe(endpoint, stager=Stager.DRAINING, why="a rolling update")
        else:
            for number in range(300):  # so that each of them will own some
                router.popularity.count(f"b{number}", f"b{number}")
            new = [at(number) for number in range(10, 18)]
            for endpoint in new:
                stager = router.stagers[endpoint.stager] = ScriptedStager(endpoint.stager)
                stager.gate.clear()
            await router.membership.apply(fleet([*old, *new]))
            assert {standing(router, endpoint) for endpoint in new} == {JOINING}
        began = now()
        ready = {endpoint.address for endpoint in old if standing(router, endpoint) is READY}
        assert {outcome(await serve(router, chat(f"a{number}"))) for number in range(60)} <= ready
        assert now() == began
        await router.stop()

    in_virtual_time(main)


def test_what_is_hashed_by_a_header_does_not_go_to_one_that_joins() -> None:
    """As no other request does."""

    async def main() -> None:
        router, old = await started(4, hash_on="header:x-user")
        for number in range(20):
            router.popularity.count(f"a{number}", f"a{number}")
        for stager in router.stagers.values():
            stager.gate.clear()
        router.membership.engine_is_new(old[0])
        await turns()
        assert standing(router, old[0]) is JOINING
        streams: Sequence[Gateway] = [await serve(router, chat("base", {"x-user": f"user-{number}"})) for number in range(20)]
        assert not any(old[0].address in stream.destination() for stream in streams)
        await router.stop()

    in_virtual_time(main)
