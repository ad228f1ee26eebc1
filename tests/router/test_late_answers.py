"""Answers that arrive after something that happened after them: served to who waits, never turned into a lease that is not there."""

import asyncio

from extproc.client import Evicted, NodeState
from tests.fakes.wait import turns, until

from .fakes import Router


async def test_an_answer_from_before_the_eviction_makes_no_lease() -> None:
    """The stager grants; somebody purges; the watch tells it; then the answer arrives. The next request asks."""
    router = Router(1)
    owner = router.owner("a")
    stager = router.stager_of(owner)
    router.membership.start()
    await turns()
    stager.gate.clear()
    asking = asyncio.create_task(router.residency.ensure(owner, "a"))
    other = asyncio.create_task(router.residency.ensure(owner, "b"))
    await until(lambda: stager.asked == ["a", "b"])
    stager.events.put_nowait(Evicted("a"))
    await until(stager.events.empty)
    stager.gate.set()
    assert (await asking).staged
    await other
    assert not router.residency.lease(owner, "a")
    assert router.residency.lease(owner, "b")
    await router.residency.ensure(owner, "a")
    assert router.residency.lease(owner, "a")
    await router.membership.stop()


async def test_an_answer_from_before_the_restart_makes_no_lease() -> None:
    """What the first instance promised, the second does not know, and was not told of either: there was no lease yet."""
    router = Router(1)
    owner = router.owner("a")
    stager = router.stager_of(owner)
    router.membership.start()
    await turns()
    stager.gate.clear()
    asking = asyncio.create_task(router.residency.ensure(owner, "a"))
    await until(lambda: stager.asked)
    stager.events.put_nowait(NodeState(True, "", "second"))
    await until(stager.events.empty)
    stager.gate.set()
    await asking
    assert not router.residency.lease(owner, "a")
    await router.membership.stop()


async def test_a_renewal_from_before_the_eviction_does_not_renew() -> None:
    """The lease ended with the eviction; the answer to a renewal begun before it does not bring it back."""
    router = Router(1)
    owner = router.owner("a")
    stager = router.stager_of(owner)
    await router.residency.ensure(owner, "a")
    stager.gate.clear()
    router.now = 60.0
    assert router.residency.lease(owner, "a")
    await until(lambda: len(stager.asked) == 2)
    router.residency.forget(owner.stager, "a")
    stager.gate.set()
    await turns()
    assert not router.residency.lease(owner, "a")


async def test_a_lease_runs_since_it_was_granted_not_since_its_answer_came() -> None:
    """A router that stood still, or a network that did, does not stretch it."""
    router = Router(1)
    owner = router.owner("a")
    stager = router.stager_of(owner)
    stager.gate.clear()
    asking = asyncio.create_task(router.residency.ensure(owner, "a"))
    await until(lambda: stager.asked)
    router.now = 50.0  # the stager says that it took 0.1 s of these
    stager.gate.set()
    await asking
    stager.gate.clear()
    router.now = 99.0
    assert router.residency.lease(owner, "a")
    router.now = 99.2
    assert not router.residency.lease(owner, "a")
    stager.gate.set()
    await turns()
