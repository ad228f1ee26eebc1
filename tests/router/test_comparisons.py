"""One version on all nodes: when one has a new version, the others are asked to compare theirs, and spared until they have."""

import asyncio
import json
from collections.abc import Callable, Coroutine

from extproc.client import Loaded, Refreshed
from extproc.core.endpoint import Endpoint
from extproc.errors import OriginFailed
from extproc.router import comparisons
from tests.fakes.wait import VirtualLoop

from .fakes import Gateway, Router, ScriptedStager, chat

OLD, NEW = "a@sha256:dddddddddddd", "a@sha256:eeeeeeeeeeee"


class Nodes:
    """Three nodes; the key's first two have version OLD, and this router leases both."""

    def __init__(self) -> None:
        self.router = Router(3, clock=lambda: asyncio.get_running_loop().time())
        self.first, self.second, self.third = (self.router.stager_of(endpoint) for endpoint in self.endpoints)
        for stager in self.router.stagers.values():
            stager.renames, stager.has_newer = True, True

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return self.router.pool.candidates("a")

    async def start(self) -> None:
        self.router.membership.start()
        for endpoint in self.endpoints[:2]:
            await self.router.residency.ensure(endpoint, "a")
        await asyncio.sleep(0.1)  # the first word of each stager

    async def renew(self, stager: ScriptedStager) -> None:
        """It has compared by itself, and tells."""
        stager.digest, stager.has_newer = "e" * 64, False
        for event in (Refreshed("a"), Loaded("a")):
            stager.events.put_nowait(event)
        await asyncio.sleep(0.1)

    async def served(self) -> tuple[str, str]:
        """Where a request goes, and by which name."""
        gateway = Gateway(self.router, chat("a"))
        await gateway.end()
        return gateway.first_destination(), str(json.loads(gateway.body())["model"])

    def fill(self, endpoint: Endpoint) -> None:
        """More than the bound is in flight there."""
        for _ in range(20):
            self.router.membership.loads["models"].hold(endpoint.address)

    async def stop(self) -> None:
        await self.router.membership.stop()
        await self.router.residency.close()


def run(scenario: Callable[[Nodes], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        nodes = Nodes()
        await nodes.start()
        try:
            await scenario(nodes)
        finally:
            await nodes.stop()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_a_new_version_on_one_node_has_the_copies_on_others_compared() -> None:
    """And no node that has no copy; nor the one that told."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.renew(nodes.second)
        assert (nodes.first.compared, nodes.second.compared, nodes.third.compared) == (["a"], [], [])

    run(scenario)


def test_a_copy_that_is_made_of_a_new_version_has_the_others_compared() -> None:
    """The first node to have it may be one that had none."""

    async def scenario(nodes: Nodes) -> None:
        nodes.third.digest = "e" * 64
        await nodes.router.residency.ensure(nodes.endpoints[2], "a")
        await asyncio.sleep(0.1)
        assert (nodes.first.compared, nodes.second.compared, nodes.third.compared) == (["a"], ["a"], [])

    run(scenario)


def test_requests_go_to_the_new_version_while_the_old_one_is_compared() -> None:
    """Though what this router leases is the old one."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.renew(nodes.second)
        assert [await nodes.served() for _ in range(2)] == [(nodes.endpoints[1].address, NEW)] * 2

    run(scenario)


def test_above_the_bound_the_old_version_serves_while_it_is_compared() -> None:
    """It waits for nothing: a new version on one node is no reason to send that node all requests for a hot adapter."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.renew(nodes.second)
        await nodes.served()
        nodes.fill(nodes.endpoints[1])
        assert await nodes.served() == (nodes.endpoints[0].address, OLD)

    run(scenario)


def test_a_copy_that_was_compared_serves_its_new_version() -> None:
    """At once, whether its watch tells of it before the comparison ends or after."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.renew(nodes.second)
        nodes.first.comparison.set()
        await asyncio.sleep(0.1)
        nodes.fill(nodes.endpoints[1])
        assert await nodes.served() == (nodes.endpoints[0].address, NEW)
        asked = list(nodes.first.asked)
        nodes.first.events.put_nowait(Loaded("a"))
        await asyncio.sleep(0.1)
        assert await nodes.served() == (nodes.endpoints[0].address, NEW)
        assert nodes.first.asked == asked

    run(scenario)


def test_a_copy_that_could_not_be_compared_serves_as_before() -> None:
    """Its origin fails, or takes longer than COMPARE_S."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.renew(nodes.second)
        nodes.fill(nodes.endpoints[1])
        nodes.first.error = OriginFailed("down")
        nodes.first.comparison.set()
        await asyncio.sleep(0.1)
        assert nodes.router.residency.leased([nodes.first.address], "a")
        nodes.first.comparison.clear()
        await asyncio.sleep(comparisons.PAUSE_S)
        await nodes.renew(nodes.second)
        assert not nodes.router.residency.leased([nodes.first.address], "a")
        await asyncio.sleep(comparisons.COMPARE_S)
        assert not nodes.router.residency.compared("a")

    run(scenario)


def test_a_change_that_all_nodes_tell_of_is_compared_at_most_once_a_second() -> None:
    """Each of them has all others compared again."""

    async def scenario(nodes: Nodes) -> None:
        nodes.first.comparison.set()
        nodes.second.comparison.set()
        await nodes.renew(nodes.second)
        await nodes.renew(nodes.first)
        await nodes.renew(nodes.first)
        assert (nodes.first.compared, nodes.second.compared) == (["a"], [])
        await asyncio.sleep(comparisons.PAUSE_S)
        assert (nodes.first.compared, nodes.second.compared) == (["a"], ["a"])

    run(scenario)


def test_a_copy_that_is_being_compared_is_compared_once_more_when_the_origin_has_changed_again() -> None:
    """What it is about to bring may be the version before."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.renew(nodes.second)
        await nodes.renew(nodes.second)
        await nodes.renew(nodes.second)
        assert nodes.first.compared == ["a"]
        nodes.first.comparison.set()
        await asyncio.sleep(0.1)
        assert nodes.first.compared == ["a", "a"]
        assert not nodes.router.residency.compared("a")

    run(scenario)


def test_comparisons_are_bounded() -> None:
    """What is beyond is compared in its node's own time."""

    async def scenario(nodes: Nodes) -> None:
        residency = nodes.router.residency
        for number in range(comparisons.AT_ONCE + 10):
            residency.copies.put(nodes.first.address, f"b/{number}", warm=True)
            residency.refreshed(nodes.second.address, f"b/{number}")
        await asyncio.sleep(0)
        assert len(nodes.first.compared) == comparisons.AT_ONCE

    run(scenario)
