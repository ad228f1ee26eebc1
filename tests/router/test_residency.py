"""Leases: believed while they last, renewed in the background, forgotten when the stager says so."""

import asyncio

import pytest

from extproc.client import Loading
from extproc.core.durations import NEWEST
from extproc.core.endpoint import Endpoint
from extproc.errors import StagerUnavailable
from extproc.router.residency import IN_TRANSIT_S
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


async def test_how_long_a_copy_takes_is_learned_from_those_that_are_made() -> None:
    """Of what some node has. What is nowhere comes from an origin, and what is in memory already costs a call: neither says anything of a copy."""
    router = Router(3)
    first, second, third = router.pool.table.endpoints
    copying = router.residency.copying
    usual = (copying.load_s, copying.fetch_s)

    async def ensure(endpoint: Endpoint, seconds: float) -> None:
        router.stager_of(endpoint).gate.clear()
        call = asyncio.create_task(router.residency.ensure(endpoint, "a"))
        await _settle()
        router.now += seconds
        router.stager_of(endpoint).gate.set()
        await call

    await ensure(first, 50.0)
    await ensure(first, 50.0)
    assert (copying.load_s, copying.fetch_s) == usual
    await ensure(second, 6.0)
    assert (copying.load_s, copying.fetch_s) == (usual[0], usual[1] + NEWEST * (6.0 - usual[1]))
    router.stager_of(third).known.add("a")
    router.residency.copies.put(third.stager, "a", warm=False)
    await ensure(third, 3.0)
    assert copying.load_s == usual[0] + NEWEST * (3.0 - usual[0])


async def test_forgetting_is_by_adapter() -> None:
    """Evicted: one name on one node, under each name that its engine knows."""
    router = Router(2)
    one, two = router.pool.table.endpoints
    for endpoint in (one, two):
        for name in ("a", "b"):
            await router.residency.ensure(endpoint, name)
    await router.residency.ensure(one, "a", plain=True)
    router.residency.forget(one.stager, "a")
    assert [bool(router.residency.lease(e, n)) for e in (one, two) for n in "ab"] == [False, True, True, True]
    assert not router.residency.lease(one, "a", plain=True)


# ---- a new instance of a stager


async def test_a_new_instance_is_told_what_is_relied_on() -> None:
    """Each lease that runs, with its version, the name its engine knows it by, and for how long it still counts; what ended is not claimed."""
    router = Router(1)
    (stager,) = router.stagers.values()
    owner = router.owner("a")
    stager.renames = True
    stager.lease_s = 10.0
    await router.residency.ensure(owner, "ended")
    stager.lease_s = 100.0
    await router.residency.ensure(owner, "a")
    await router.residency.ensure(owner, "a", plain=True)
    router.now = 39.0
    await router.residency.claim(stager.address)
    [claims] = stager.claims
    assert [(claim.adapter, claim.digest, claim.loading, claim.model, claim.remaining_s) for claim in claims] == [
        ("a", "d" * 64, Loading.VERSIONED, "a@sha256:dddddddddddd", 60.0),
        ("a", "d" * 64, Loading.PLAIN, "a", 60.0),
    ]


async def test_what_a_new_instance_does_not_honour_is_forgotten() -> None:
    """The rest counts for as long as it says, and not for longer; leases on other nodes are not concerned."""
    router = Router(2)
    endpoint, other = router.pool.table.endpoints
    stager = router.stager_of(endpoint)
    for name in "abc":
        await router.residency.ensure(endpoint, name)
        await router.residency.ensure(other, name)
    stager.honours = lambda claim: {"a": 0.0, "b": 20.0, "c": 0.9}[claim.adapter]
    router.now = 10.0
    await router.residency.claim(stager.address)
    stager.gate.clear()
    assert [bool(router.residency.lease(endpoint, name)) for name in "abc"] == [False, True, False]
    assert [bool(router.residency.lease(other, name)) for name in "abc"] == [True, True, True]
    router.now = 28.9
    assert router.residency.lease(endpoint, "b")
    router.now = 29.0  # one second before its end: the engine still has to open the files
    assert not router.residency.lease(endpoint, "b")
    stager.gate.set()
    await _settle()


def test_a_claim_that_hangs_or_fails_forgets() -> None:
    """After three seconds, less than a new instance waits before it removes anything: until then the leases count."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        for error in (None, StagerUnavailable("gone")):
            router = Router(1)
            (stager,) = router.stagers.values()
            owner = router.owner("a")
            await router.residency.ensure(owner, "a")
            stager.gate.clear()
            stager.error = error
            began = loop.time()
            claiming = asyncio.create_task(router.residency.claim(stager.address))
            await asyncio.sleep(2.9)
            assert router.residency.lease(owner, "a")
            if error is not None:
                stager.gate.set()
            await claiming
            assert loop.time() - began == pytest.approx(3.0 if error is None else 2.9)
            assert not router.residency.lease(owner, "a")

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


def test_a_lease_that_is_not_believed_is_given_back() -> None:
    """A router finds a node, asks it for an adapter, hears on its first watch which instance it is, and then has the answer, which could be an earlier one's.
    The stager would count that lease for minutes, and a drain would wait for its end."""

    async def main() -> None:
        router = Router(1)
        (stager,) = router.stagers.values()
        owner = router.owner("a")
        stager.gate.clear()
        asking = asyncio.create_task(router.residency.ensure(owner, "a"))
        await asyncio.sleep(0)
        claiming = asyncio.create_task(router.residency.claim(stager.address))
        await asyncio.sleep(0)
        stager.gate.set()
        await asyncio.gather(asking, claiming)
        assert not router.residency.lease(owner, "a")
        assert stager.released == []  # the request that waited for the answer is on its way to the engine
        await asyncio.sleep(IN_TRANSIT_S)
        await asyncio.sleep(0.1)
        assert stager.released == ["a"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_a_claim_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """How many leases are given up, and why."""
    router = Router(1)
    (stager,) = router.stagers.values()
    await router.residency.ensure(router.owner("a"), "a")
    stager.error = StagerUnavailable("gone")
    await router.residency.claim(stager.address)
    assert f"stager {stager.address}: 1 leases are given up, since its new instance cannot be told of them: gone" in caplog.text


async def test_a_lease_that_was_taken_anew_while_it_was_claimed_stays() -> None:
    """The new one is the new instance's own word."""
    router = Router(1)
    (stager,) = router.stagers.values()
    owner = router.owner("a")
    await router.residency.ensure(owner, "a")
    stager.claim_gate.clear()
    stager.honours = lambda _: 0.0
    claiming = asyncio.create_task(router.residency.claim(stager.address))
    await _settle()
    await router.residency.ensure(owner, "a")
    stager.claim_gate.set()
    await claiming
    assert router.residency.lease(owner, "a")


async def test_who_relies_on_nothing_claims_nothing() -> None:
    """As at the router's own start."""
    router = Router(1)
    (stager,) = router.stagers.values()
    await router.residency.claim(stager.address)
    assert stager.claims == []


async def test_a_node_counts_as_asked_from_the_call_to_its_answer() -> None:
    """For this adapter alone, and for the name that the engine must know it by."""
    router = Router(2)
    first, second = router.pool.order("a")
    router.stager_of(first).gate.clear()
    router.residency.prepare(first, "a")
    assert router.residency.asked((first, second), "a") == [first]
    assert router.residency.asked((first, second), "a", plain=True) == router.residency.asked((first, second), "b") == []
    router.stager_of(first).gate.set()
    await _settle()
    assert router.residency.asked((first, second), "a") == []


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
