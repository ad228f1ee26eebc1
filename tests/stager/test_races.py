"""Orders of events between flights, removals and threads, each replayed: a call that blocks is stopped at a gate until the other has happened."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from extproc.core.artifact import ArtifactId, adapter_name
from extproc.errors import AdapterInUse, NoSpace, OriginFailed
from extproc.stager.disk.store import Store
from extproc.stager.stager import Stager
from tests.fakes.adapters import CONFIG, WEIGHTS, read_files, size_of, small_files
from tests.fakes.gate import Gate
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns

from .conftest import OpenStager

SIZE = size_of(small_files())


def on_disk(node: Path) -> tuple[set[str], int, int]:
    """Names that lead to whole files, how many artifacts, how much in staging."""
    links = {str(path.relative_to(node)) for path in node.rglob("*") if path.is_symlink() and CONFIG in read_files(path)}
    return links, len(list((node / ".store").iterdir())), len(list((node / ".staging").iterdir()))


def balanced(stager: Stager) -> bool:
    index = stager.node.holdings.index
    return {entry.id for entry in index.entries()} == {path.name for path in stager.node.store.content.iterdir()} and not index.reserved_bytes


def test_one_names_folder_goes_while_another_name_comes_into_it(node: Path) -> None:
    """Order of events: `acme/` is made for acme/b; acme/a, the only other name in it, is taken away and `acme/` with it; acme/b is linked there."""
    store = Store(node)
    store.open()
    with store.staging() as directory:
        (directory / "x").write_bytes(b"")
        (node / ".store" / "0").mkdir()
    together = threading.Barrier(4)

    def come_and_go(name: str) -> None:
        together.wait()
        for _ in range(300):
            store.check_name(adapter_name(name))
            store.link(adapter_name(name), ArtifactId("0"))
            assert (node / name).is_symlink()
            store.unlink(adapter_name(name))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go, f"acme/team/{n}") for n in range(4)]:
            done.result()
    store.close()
    assert not (node / "acme").exists()


async def test_what_is_published_and_not_linked_yet_is_no_victim(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: acme/a is published; acme/b needs its room, and nobody has leased it yet; acme/a is linked. It must not have gone."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, max_bytes=SIZE)
    linking = Gate(monkeypatch, stager.node.store, "link")
    first = asyncio.create_task(stager.ensure("acme/a"))
    await linking.reached()
    with pytest.raises(NoSpace):
        await stager.ensure("acme/b")
    linking.open()
    assert (await first).staged
    assert on_disk(node) == ({"acme/a"}, 1, 0)


async def test_a_link_that_fails_takes_its_content_along(open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could find it, and it would count."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin)
    linking = Gate(monkeypatch, stager.node.store, "link", fails=NoSpace("full"))
    linking.open()
    with pytest.raises(NoSpace):
        await stager.ensure("acme/a")
    assert on_disk(node) == (set(), 0, 0)
    assert stager.node.holdings.index.used_bytes == 0
    assert (await stager.ensure("acme/a")).staged


async def test_a_link_that_fails_leaves_content_that_another_is_about_to_name(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: acme/a and acme/b have one content; both have found it there; acme/a's link fails; acme/b is linked."""
    for name in ("acme/a", "acme/b"):
        origin.add(name, small_files())
    stager = await open_stager(origin)
    failing = Gate(monkeypatch, stager.node.store, "link", fails=NoSpace("full"))
    first = asyncio.create_task(stager.ensure("acme/a"))
    await failing.reached()
    later = Gate(monkeypatch, stager.node.store, "link")
    second = asyncio.create_task(stager.ensure("acme/b"))
    await later.reached()
    failing.open()
    with pytest.raises(NoSpace):
        await first
    later.open()
    assert (await second).staged
    assert on_disk(node) == ({"acme/b"}, 1, 0)
    assert balanced(stager)


async def test_equal_content_waits_for_its_own_removal(
    open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: acme/a is being removed; acme/b, of the same content, has arrived and would find it there."""
    for name in ("acme/a", "acme/b"):
        origin.add(name, small_files())
    stager = await open_stager(origin)
    await stager.ensure("acme/a")
    clock.now += 1000
    removing = Gate(monkeypatch, stager.node.store, "remove")
    evicting = asyncio.create_task(stager.evict("acme/a"))
    await removing.reached()
    staging = asyncio.create_task(stager.ensure("acme/b"))
    await turns(200)
    assert not staging.done()
    removing.open()
    assert await evicting == SIZE
    assert (await staging).staged
    assert on_disk(node) == ({"acme/b"}, 1, 0)
    assert balanced(stager)


@pytest.mark.parametrize("step", ["publish", "link"])
async def test_a_flight_that_is_given_up_while_the_disk_works_leaves_nothing(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Order of events: the flight's time is over during an fsync; the thread cannot be stopped, and renames what everybody believes to be gone."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin, fetch_timeout_s=0.5)
    stopped = Gate(monkeypatch, stager.node.store, step)
    flight = asyncio.create_task(stager.ensure("acme/a"))
    await stopped.reached()
    await asyncio.sleep(0.6)  # the flight's own timer is real
    assert not flight.done()
    stopped.open()
    with pytest.raises(OriginFailed):
        await flight
    links, artifacts, staging = on_disk(node)
    assert (artifacts, staging) == (len(links), 0)
    assert set(stager.node.holdings) == links
    assert balanced(stager)
    assert (await stager.ensure("acme/a")).digest


async def test_of_two_pins_at_once_both_are_remembered(open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of events: the list with acme/a is about to be written; the list with both is; the first replaces it."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin)
    for name in ("acme/a", "acme/b"):
        await stager.ensure(name)
    writing = Gate(monkeypatch, stager.node.store, "write_json")
    first = asyncio.create_task(stager.pin("acme/a"))
    await writing.reached()
    second = asyncio.create_task(stager.pin("acme/b"))
    await turns(200)
    writing.open()
    await asyncio.gather(first, second)
    await stager.close()
    again = await open_stager(origin)
    assert set(again.node.holdings.pins) == {"acme/a", "acme/b"}


async def test_what_is_being_refreshed_is_not_purged_under_the_exchange(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: the new link is about to be made; a purge takes the name away; the link is made and leads to what the purge took."""
    origin.add("acme/a", small_files(seed=1))
    stager = await open_stager(origin)
    await stager.ensure("acme/a")
    origin.add("acme/a", small_files(seed=2))
    origin.revisions["acme/a"] = "2"
    linking = Gate(monkeypatch, stager.node.store, "link")
    refreshing = asyncio.create_task(stager.refresh("acme/a"))
    await linking.reached()
    with pytest.raises(AdapterInUse, match="refreshed"):
        await stager.purge("acme/a")
    linking.open()
    assert await refreshing
    assert read_files(node / "acme" / "a")[WEIGHTS] == small_files(seed=2)[WEIGHTS]
    assert on_disk(node) == ({"acme/a"}, 1, 0)
    assert await stager.purge("acme/a") == SIZE
    assert on_disk(node) == (set(), 0, 0)
