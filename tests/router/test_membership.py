"""Who is down, as the Watch streams tell it."""

import asyncio

from extproc.client import Evicted, NodeState, Published
from extproc.errors import StagerUnavailable

from .fakes import Router


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0)


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


async def test_a_lost_stream_takes_the_node_out_and_its_leases_too() -> None:
    """Nobody knows what the node does while it cannot be heard."""
    router = Router()
    owner = router.owner("a")
    await router.residency.ensure(owner, "a")
    router.membership.start(router.stagers)
    router.stager_of(owner).events.put_nowait(StagerUnavailable("gone"))
    await until(lambda: router.membership.snapshot.down)
    assert not router.residency.holds(owner, "a")
    await router.membership.stop()


async def test_an_evicted_adapter_is_forgotten_a_published_one_is_not_believed() -> None:
    """Only an answer to Ensure is a lease."""
    router = Router(1)
    owner = router.owner("a")
    await router.residency.ensure(owner, "a")
    router.membership.start(router.stagers)
    router.stager_of(owner).events.put_nowait(Published("b"))
    router.stager_of(owner).events.put_nowait(Evicted("a"))
    await until(lambda: not router.residency.holds(owner, "a"))
    assert not router.residency.holds(owner, "b")
    await router.membership.stop()


async def test_a_restarted_stager_remembers_no_lease() -> None:
    """Another instance answers on the same stream: what the first promised is void."""
    router = Router(1)
    owner = router.owner("a")
    router.membership.start(router.stagers)
    await router.residency.ensure(owner, "a")
    router.stager_of(owner).events.put_nowait(NodeState(True, "", "second"))
    await until(lambda: not router.residency.holds(owner, "a"))
    await router.membership.stop()


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
