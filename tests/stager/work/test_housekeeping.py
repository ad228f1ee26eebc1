"""A disk that hangs or cannot be read: the node says so once, and what needs no disk goes on."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from extproc.client import NodeState
from extproc.errors import DiskFailed, StageError
from extproc.stager import stager as stager_module
from extproc.stager.stager import DISK_THREADS
from extproc.stager.work import housekeeping as housekeeping_module
from extproc.stager.work.housekeeping import SCAN_SHARE
from tests.fakes.adapters import small_files
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import PATIENCE_S, Clock, until

from ..conftest import OpenStager, ServeNode, next_of

NAME, COLD = "acme/sql", "acme/cold"


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    for seed, name in enumerate((NAME, *(f"{COLD}-{number}" for number in range(DISK_THREADS + 4)))):
        origin.add(name, small_files(seed=seed))
    return origin


@pytest.fixture(autouse=True)
def quick_housekeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.01)


class Hanging:
    """Every call of these methods of the store waits until `well` is set."""

    def __init__(self, store: object, monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
        self.well = threading.Event()
        for method in methods:
            monkeypatch.setattr(store, method, self._hang(getattr(store, method)))

    def _hang(self, inner: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.well.wait(PATIENCE_S)
            return inner(*arguments, **named)

        return call


@pytest.fixture
def hanging() -> Iterator[list[Hanging]]:
    """Whoever hangs in the end is let go: a thread cannot be stopped."""
    made: list[Hanging] = []
    yield made
    for each in made:
        each.well.set()


async def test_a_disk_that_hangs_holds_its_threads_and_nothing_else(
    serve_node: ServeNode, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch, hanging: list[Hanging]
) -> None:
    """All of its threads are stuck and more wait for one: warm requests, lists, watchers and name look-ups go on; the node says why it is not ready."""
    monkeypatch.setattr(housekeeping_module, "DISK_PATIENCE_S", 0.05)
    node = await serve_node()
    client = node.ask("router")
    await client.ensure(NAME)
    watching = client.watch()
    await next_of(watching, NodeState)
    disk = Hanging(node.stager.node.store, monkeypatch, "check_name", "check", "is_whole")
    hanging.append(disk)
    cold = [asyncio.create_task(client.ensure(f"{COLD}-{number}")) for number in range(DISK_THREADS + 4)]
    async with asyncio.timeout(PATIENCE_S):
        await until(lambda: "has not answered" in (node.stager.not_ready or ""))
        state = await next_of(watching, NodeState)
        assert isinstance(state, NodeState)
        assert not state.ready
        assert not (await client.ensure(NAME)).staged
        assert (await client.list()).used_bytes
        assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    assert not any(task.done() for task in cold)
    disk.well.set()
    assert all(held.staged for held in await asyncio.gather(*cold))
    await until(lambda: node.stager.not_ready is None)


async def test_a_directory_that_cannot_be_read_is_said_once(
    open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In words, without a traceback however many requests come; and the node is ready again by itself."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    check, calls = stager.node.store.check, 0

    def refused(**named: Any) -> bool:
        nonlocal calls
        calls += 1
        raise DiskFailed("the node's disk cannot be read: Permission denied")

    monkeypatch.setattr(stager.node.store, "check", refused)
    with caplog.at_level(logging.WARNING):
        await until(lambda: calls > 5)
    assert stager.not_ready == "the node's disk cannot be read: Permission denied"
    assert [record.getMessage() for record in caplog.records] == [f"node is not ready: {stager.not_ready}"]
    assert not (await stager.ensure(NAME)).staged
    monkeypatch.setattr(stager.node.store, "check", check)
    await until(lambda: stager.not_ready is None)


async def test_a_failure_stays_until_the_disk_was_written(open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that began before the failure, and only read, says nothing of it."""
    stager = await open_stager(origin)
    written: list[bool] = []
    check = stager.node.store.check

    def note(*, writing: bool) -> bool:
        written.append(writing)
        return check(writing=writing)

    monkeypatch.setattr(stager.node.store, "check", note)
    await until(lambda: written)
    stager.node.readiness.set("disk", "it failed")
    await until(lambda: stager.not_ready is None)
    assert written[-1] or written[-2]


async def test_a_look_through_the_directory_that_takes_long_is_made_less_often(
    open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking takes its share of a core, however much is there; what takes no time is looked at every `scan_s`."""
    stager, looked_at, rounds = await open_stager(origin, scan_s=10.0), list[float](), 0
    began = clock.now

    async def scan() -> float:
        looked_at.append(clock.now - began)
        return 0.5 if len(looked_at) < 3 else 0.0

    def keep() -> None:
        nonlocal rounds
        rounds += 1

    monkeypatch.setattr(stager._adopter, "scan", scan)
    monkeypatch.setattr(stager._room, "keep", keep)  # once a round
    for _ in range(14):
        clock.now += 10
        before = rounds
        await until(lambda before=before: rounds > before + 2)  # type: ignore[misc]
    assert looked_at == [10, 60, 110, 120, 130, 140]
    assert 0.5 / SCAN_SHARE == 50


async def test_a_closed_stager_takes_no_more_disk_work(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """Its threads end with it."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.close()
    with pytest.raises((RuntimeError, StageError)):
        await stager.node.disk.run(stager.node.store.probe)
