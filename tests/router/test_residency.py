"""Leases: believed while they last, renewed in the background, forgotten when the stager says so."""

import asyncio

import pytest

from extproc.errors import StagerUnavailable
from tests.fakes.wait import VirtualLoop

from .fakes import Router


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_lease_ends_before_the_stager_forgets_it() -> None:
    """One second early: the engine still has to open the files."""
    router = Router(1)
    owner = router.owner("a")
    await router.residency.ensure(owner, "a")
    router.stager_of(owner).gate.clear()
    router.now = 98.9
    assert router.residency.lease(owner, "a")
    router.now = 99.0
    assert not router.residency.lease(owner, "a")
    router.stager_of(owner).gate.set()
    await _settle()


async def test_a_lease_in_use_is_renewed_once_in_the_background() -> None:
    """Past its half, the next request asks anew and does not wait."""
    router = Router(1)
    owner = router.owner("a")
    await router.residency.ensure(owner, "a")
    router.now = 50.0
    assert all(router.residency.lease(owner, "a") for _ in range(5))
    await _settle()
    assert router.stager_of(owner).asked == ["a", "a"]
    router.now = 120.0
    assert router.residency.lease(owner, "a")


async def test_a_failed_renewal_leaves_the_lease_to_its_end() -> None:
    """The stager may be restarting; what it promised still holds."""
    router = Router(1)
    owner = router.owner("a")
    await router.residency.ensure(owner, "a")
    router.stager_of(owner).error = StagerUnavailable("gone")
    router.now = 60.0
    assert router.residency.lease(owner, "a")
    await _settle()
    assert router.residency.lease(owner, "a")
    router.now = 99.5
    assert not router.residency.lease(owner, "a")


async def test_a_thousand_waiters_are_one_call() -> None:
    """They share the flight to the stager."""
    router = Router(1)
    owner = router.owner("a")
    router.stager_of(owner).gate.clear()
    waits = [asyncio.create_task(router.residency.ensure(owner, "a")) for _ in range(1000)]
    await _settle()
    router.stager_of(owner).gate.set()
    assert len({staged.digest for staged in await asyncio.gather(*waits)}) == 1
    assert router.stager_of(owner).asked == ["a"]


async def test_forgetting_is_by_adapter_or_by_stager() -> None:
    """Evicted: one name. Another instance: everything of that node, nothing of others."""
    router = Router(2)
    one, two = router.pool.table.endpoints
    for endpoint in (one, two):
        for name in ("a", "b"):
            await router.residency.ensure(endpoint, name)
    router.residency.forget(one.stager, "a")
    assert [bool(router.residency.lease(one, n)) for n in "ab"] == [False, True]
    router.residency.forget_stager(one.stager)
    assert [bool(router.residency.lease(e, n)) for e in (one, two) for n in "ab"] == [False, False, True, True]


async def test_leases_that_ended_are_swept() -> None:
    """The table does not grow with every name ever asked for."""
    router = Router(1)
    owner = router.owner("a")
    for i in range(1023):
        await router.residency.ensure(owner, f"a{i}")
    router.now = 1000.0
    await router.residency.ensure(owner, "last")
    assert router.metrics.registry.get_sample_value("lora_extproc_leases") == 1


async def test_an_endpoint_without_stager_cannot_stage() -> None:
    """It is for base models only."""
    router = Router(1)
    with pytest.raises(StagerUnavailable):
        await router.residency.ensure(type(router.owner("a"))("10.9.9.9:8000"), "a")


def test_leases_are_given_back_at_the_end() -> None:
    """By every stager that granted one, at once; one that fails or does not answer holds nobody up for longer than a second."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        router = Router(4)
        unused, good, failing, silent = router.pool.table.endpoints
        for endpoint in (good, failing, silent):
            await router.residency.ensure(endpoint, "a")
            await router.residency.ensure(endpoint, "b")
        router.stager_of(failing).error = StagerUnavailable("gone")
        router.stager_of(silent).gate.clear()
        began = loop.time()
        await router.residency.release_all()
        assert loop.time() - began == 1.0
        assert [router.stager_of(endpoint).released for endpoint in (unused, good, failing, silent)] == [[], [""], [""], [""]]
        assert not router.residency.lease(good, "a")

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))
