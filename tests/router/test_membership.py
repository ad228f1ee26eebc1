"""Who is down, as the Watch streams tell it."""

import asyncio

import pytest

from extproc.client import Evicted, NodeState, Published, Refreshed, Space
from extproc.errors import LoraExtprocError, NoSpace, StagerUnavailable
from tests.fakes.wait import VirtualLoop, turns, until

from .fakes import Router


async def test_an_endpoint_whose_engine_is_ill_loses_its_keys_and_gets_them_back() -> None:
    """Its keys go to their own next candidate meanwhile, and nobody else's move."""
    router = Router()
    router.membership.start(router.stagers)
    owner = router.owner("a")
    events = router.stager_of(owner).events
    events.put_nowait(NodeState(False, "the engine is not healthy", "first"))
    await until(lambda: router.membership.snapshot.down)
    assert router.membership.snapshot.down == {owner.address: "the engine is not healthy"}
    assert router.membership.snapshot.ready(router.pool.candidates("a")) == router.pool.candidates("a")[1:]
    events.put_nowait(NodeState(True, "", "first"))
    await until(lambda: not router.membership.snapshot.down)
    await router.membership.stop()


async def watched(router: Router) -> None:
    """Start, and wait until every stager has said how it is."""
    router.membership.start(router.stagers)
    await until(lambda: all(stager.watched for stager in router.stagers.values()))
    await turns()


async def test_an_evicted_adapter_is_forgotten_a_published_one_is_not_believed() -> None:
    """Only an answer to Ensure is a lease. A new version has another name in the engine: it is asked for."""
    router = Router(1)
    owner = router.owner("a")
    await watched(router)
    await router.residency.ensure(owner, "a")
    await router.residency.ensure(owner, "r")
    for event in (Published("b"), Refreshed("r"), Space(1, 2, 3), Evicted("a")):
        assert router.residency.lease(owner, "a")
        router.stager_of(owner).events.put_nowait(event)
    await until(lambda: not router.residency.lease(owner, "a"))
    assert not router.residency.lease(owner, "b")
    assert not router.residency.lease(owner, "r")
    await router.membership.stop()
    await router.residency.close()


async def test_a_restarted_stager_remembers_no_lease() -> None:
    """Another instance answers on the same stream: what the first promised is void."""
    router = Router(1)
    owner = router.owner("a")
    await watched(router)
    await router.residency.ensure(owner, "a")
    router.stager_of(owner).events.put_nowait(NodeState(True, "", "second", resumed=True))
    await until(lambda: not router.residency.lease(owner, "a"))
    await router.membership.stop()


async def test_another_state_of_the_same_stream_changes_no_lease() -> None:
    """An engine that is ill for a moment has its files still."""
    router = Router(1)
    owner = router.owner("a")
    await watched(router)
    await router.residency.ensure(owner, "a")
    for ready in (False, True):
        router.stager_of(owner).events.put_nowait(NodeState(ready, "", "first", resumed=True))
        await until(lambda: bool(router.membership.snapshot.down) != ready)  # noqa: B023
        assert router.residency.lease(owner, "a")
    await router.membership.stop()


BREAK = (StagerUnavailable("gone"), NoSpace("of another kind"))
MET_AGAIN = [
    (NodeState(True, "", "first", resumed=True), True, True),
    (NodeState(False, "the engine is not healthy", "first", resumed=True), False, True),
    (NodeState(True, "", "first", resumed=False), True, False),  # more went by than it remembers
    (NodeState(True, "", "second", resumed=False), True, False),
    (NodeState(True, "", "second", resumed=True), True, False),
]


@pytest.mark.parametrize("error", BREAK)
@pytest.mark.parametrize(("state", "ready", "kept"), MET_AGAIN)
def test_a_lost_stream_takes_the_node_out_until_it_is_heard_again(error: LoraExtprocError, state: NodeState, ready: bool, kept: bool) -> None:
    """Meanwhile its leases are used by nobody. They are good again if the same instance tells all that went by, else they are forgotten."""

    async def main() -> None:
        router = Router(3)
        owner = router.owner("a")
        stager = router.stager_of(owner)
        router.membership.start(router.stagers)
        await asyncio.sleep(1)
        await router.residency.ensure(owner, "a")
        stager.first_state = None
        stager.events.put_nowait(error)
        await asyncio.sleep(10)
        assert router.membership.snapshot.ready(router.pool.candidates("a")) == router.pool.candidates("a")[1:]
        assert error.message in router.membership.snapshot.down[owner.address]
        assert stager.watched == 2  # it is asked, and says nothing yet
        assert router.residency.lease(owner, "a")
        stager.events.put_nowait(state)
        await asyncio.sleep(1)
        assert (owner.address not in router.membership.snapshot.down) == ready
        assert bool(router.residency.lease(owner, "a")) == kept
        await router.membership.stop()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_what_went_while_the_stream_was_broken_is_forgotten() -> None:
    """It is told before the node's state is, so that nobody is sent there in between."""

    async def main() -> None:
        router = Router(1)
        owner = router.owner("a")
        stager = router.stager_of(owner)
        router.membership.start(router.stagers)
        await asyncio.sleep(1)
        for name in "ab":
            await router.residency.ensure(owner, name)
        stager.first_state = None
        stager.events.put_nowait(StagerUnavailable("gone"))
        stager.events.put_nowait(Evicted("a"))
        await asyncio.sleep(10)
        assert owner.address in router.membership.snapshot.down
        assert [bool(router.residency.lease(owner, name)) for name in "ab"] == [False, True]
        stager.events.put_nowait(NodeState(True, "", "first", resumed=True))
        await asyncio.sleep(1)
        assert not router.membership.snapshot.down
        assert [bool(router.residency.lease(owner, name)) for name in "ab"] == [False, True]
        await router.membership.stop()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_least_loaded_takes_turns_among_equals() -> None:
    """A sequence of equal choices spreads over all."""
    router = Router()
    endpoints = router.pool.table.endpoints
    assert {router.membership.least_loaded(endpoints)[0] for _ in range(3)} == set(endpoints)
    router.membership.begin(endpoints[0])
    router.membership.begin(endpoints[1])
    assert router.membership.least_loaded(endpoints)[0] is endpoints[2]
    router.membership.end(endpoints[0])
    assert router.membership.least_loaded(endpoints)[-1] is endpoints[1]
