"""One of several processes holds the Lease."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from extproc.kubernetes import leader as leader_module
from extproc.kubernetes.api import Api
from extproc.kubernetes.leader import LEASE_S, RENEW_S, RETRY_S, Leader, Lease, LeaseSpec, wanted
from tests.fakes.kubernetes import ApiServer, access, api_server
from tests.fakes.wait import until

PATH = "/apis/coordination.k8s.io/v1/namespaces/llm/leases/controller"
NOW = datetime.datetime(2026, 11, 29, 12, 0, tzinfo=datetime.UTC)
TEXT = "2026-11-29T12:00:00.000000Z"


def held_by(holder: str | None, duration: int | None = 15) -> Lease:
    return Lease(spec=LeaseSpec(holder, duration, "then", "then", 4))


# ---- what is written


def test_a_lease_that_nobody_has_is_taken() -> None:
    """Be it new, given up, or without a word of who has it."""
    assert wanted(None, "me", 0, NOW) == LeaseSpec("me", 15, TEXT, TEXT, 0)
    assert wanted(held_by(""), "me", 0, NOW) == LeaseSpec("me", 15, TEXT, TEXT, 5)
    assert wanted(held_by(None), "me", 0, NOW) == LeaseSpec("me", 15, TEXT, TEXT, 5)


def test_the_holder_renews_and_counts_no_transition() -> None:
    """It has the Lease since then."""
    assert wanted(held_by("me"), "me", 0, NOW) == LeaseSpec("me", 15, "then", TEXT, 4)


def test_another_waits_for_the_time_that_the_lease_states() -> None:
    """Counted from when it was seen to change; the times in it are of another clock."""
    assert wanted(held_by("you"), "me", 14.9, NOW) is None
    assert wanted(held_by("you"), "me", 15, NOW) == LeaseSpec("me", 15, TEXT, TEXT, 5)
    assert wanted(held_by("you", 60), "me", 15, NOW) is None
    assert wanted(held_by("you", None), "me", 14.9, NOW) is None


def test_the_numbers_are_client_gos() -> None:
    """So that a holder has stopped before another may begin."""
    assert (LEASE_S, RENEW_S, RETRY_S) == (15, 10, 2)


# ---- who works


class Work:
    def __init__(self) -> None:
        self.begun = 0
        self.is_running = False
        self.may_end = asyncio.Event()

    async def __call__(self) -> None:
        self.begun += 1
        self.is_running = True
        try:
            await self.may_end.wait()
        finally:
            self.is_running = False


@asynccontextmanager
async def leading(server: ApiServer, identity: str) -> AsyncIterator[Work]:
    work = Work()
    async with Api(access(server), 5) as api:
        task = asyncio.create_task(Leader(api, "llm", "controller", identity).lead(work))
        try:
            yield work
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    """With times that are a hundredth, but for the Lease's own, which is in whole seconds."""
    monkeypatch.setattr(leader_module, "LEASE_S", 1.0)
    monkeypatch.setattr(leader_module, "RENEW_S", 0.5)
    monkeypatch.setattr(leader_module, "RETRY_S", 0.02)
    async with api_server() as server:
        yield server


async def test_one_works_and_the_other_waits_until_the_lease_is_given_up(server: ApiServer) -> None:
    """A process that ends in order gives it up, so the next need not wait for its end."""
    async with leading(server, "one") as one:
        await until(lambda: one.is_running)
        async with leading(server, "two") as two:
            await until(lambda: len(server.requests) > 10)
            assert not two.begun
            assert server.objects[PATH]["spec"]["holderIdentity"] == "one"
            one.may_end.set()
            await until(lambda: two.is_running)
    assert server.objects[PATH]["spec"]["holderIdentity"] == ""
    assert server.objects[PATH]["spec"]["leaseTransitions"] == 1


async def test_a_holder_that_vanishes_is_followed_when_its_time_is_over(server: ApiServer) -> None:
    """It has written nothing for the duration that the Lease states."""
    await server.put(PATH, spec={"holderIdentity": "gone", "leaseDurationSeconds": 1, "leaseTransitions": 7})
    async with leading(server, "two") as two:
        began = asyncio.get_running_loop().time()
        await until(lambda: two.is_running)
        assert asyncio.get_running_loop().time() - began >= 1
    assert server.objects[PATH]["spec"]["leaseTransitions"] == 8


async def test_a_holder_that_cannot_renew_stops_its_work(server: ApiServer) -> None:
    """Before anybody else may begin; and begins anew when the API server is back."""
    async with leading(server, "one") as one:
        await until(lambda: one.is_running)
        server.hanging = {"GET"}
        await until(lambda: not one.is_running)
        server.hanging = set()
        await until(lambda: one.begun == 2)


async def test_a_lease_that_another_has_taken_stops_the_work_at_once(server: ApiServer) -> None:
    """As after a pause of the whole process that was longer than the Lease."""
    async with leading(server, "one") as one:
        await until(lambda: one.is_running)
        await server.put(PATH, spec={"holderIdentity": "two", "leaseDurationSeconds": 3600})
        await until(lambda: not one.is_running)
    assert server.objects[PATH]["spec"]["holderIdentity"] == "two"


async def test_of_two_that_take_it_at_once_one_is_refused(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read the same version; the second write names one that is no more."""
    await server.put(PATH, spec={"holderIdentity": ""})
    both_read = asyncio.Barrier(2)
    inner = Leader._write
    met: list[str] = []

    async def write(self: Leader, lease: Lease | None, spec: LeaseSpec) -> Lease:
        if self._identity not in met:
            met.append(self._identity)
            await both_read.wait()
        return await inner(self, lease, spec)

    monkeypatch.setattr(Leader, "_write", write)
    async with leading(server, "one") as one, leading(server, "two") as two:
        await until(lambda: one.is_running or two.is_running)
        await until(lambda: len(server.requests) > 12)
        assert one.begun + two.begun == 1


async def test_work_that_ends_ends_the_leading(server: ApiServer) -> None:
    """With what it ended with."""

    async def work() -> None:
        raise ValueError("no")

    async with Api(access(server), 5) as api:
        with pytest.raises(ValueError, match="no"):
            await Leader(api, "llm", "controller", "one").lead(work)
    assert server.objects[PATH]["spec"]["holderIdentity"] == ""
