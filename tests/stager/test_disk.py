"""A disk that is full, over its quota, read-only or dead, in the middle of each step: the right error, nothing partial, and well again by itself.

Every error here is the kernel's own; `tests/fakes/disks.py` tells how it is brought about.
"""

import asyncio
import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extproc.config.origins import OriginSettings
from extproc.core.blocks import BLOCK_BYTES
from extproc.errors import DiskFailed, LoraExtprocError, NoSpace
from extproc.stager import stager as stager_module
from extproc.stager.adapter import archive
from extproc.stager.books.changes import Change
from extproc.stager.disk.pins import PINS_FILE
from extproc.stager.stager import Stager
from extproc.stager.supply.origins import Origin
from extproc.stager.supply.origins.file import FileOrigin
from tests.fakes.adapters import CONFIG, WEIGHTS, Files, read_files, size_of, small_files
from tests.fakes.disks import ROOM_BYTES, Disk, Ext4, btrfs, ext4, tmpfs
from tests.fakes.gate import Gate
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from .conftest import OpenStager

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # some blocks of weights, so that the second half needs other blocks than the first
KEPT, COMING, OTHER = "acme/kept", "acme/coming", "acme/other"
FILES = {name: small_files(seed=seed, rank=8, modules=MODULES) for seed, name in enumerate((KEPT, COMING, OTHER))}
SIZE = size_of(FILES[KEPT])

Flight = asyncio.Task[object]


@pytest.fixture(autouse=True)
def quick_housekeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.01)


@pytest.fixture(params=[tmpfs, ext4, btrfs], ids=["ENOSPC", "ENOSPC on a block device", "EDQUOT"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be filled."""
    with request.param(tmp_path) as disk:
        yield disk


@pytest.fixture(params=[tmpfs, btrfs], ids=["ENOSPC", "EDQUOT"])
def exact(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """One that can be filled to the last byte; ext4 finds room for a small file."""
    with request.param(tmp_path) as disk:
        yield disk


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be made read-only for a while, when nothing is open for writing."""
    with tmpfs(tmp_path) as disk:
        yield disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    """A disk that fails at any moment, until it is replaced."""
    with ext4(tmp_path) as disk:
        yield disk


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    origin.files |= FILES
    return origin


class Step:
    """Starts a flight of acme/coming that stops in the middle of `what`, and lets it go on."""

    def __init__(self, what: str, origin: FakeOrigin, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.what = what
        self._fake = origin
        self._monkeypatch = monkeypatch
        self._go_on: Callable[[], None] = lambda: None
        self.origin: Origin = origin
        if what == "unpack":
            for name, files in FILES.items():
                self._pack(packed, name, files)
            self.origin = FileOrigin(OriginSettings(type="file", path=str(packed)))

    async def begin(self, stager: Stager) -> Flight:
        if self.what == "fetch":
            stall = self._fake.stall(COMING, WEIGHTS)
            flight: Flight = asyncio.create_task(stager.ensure(COMING))
            await stall.reached.wait()
            self._go_on = stall.release
            return flight
        thing: object = archive if self.what == "unpack" else stager.node.store
        gate = Gate(self._monkeypatch, thing, self.what)
        flight = asyncio.create_task(stager.ensure(COMING))
        await gate.reached()
        self._go_on = gate.open
        return flight

    def go_on(self) -> None:
        self._go_on()
        self._fake.stalls.clear()

    @staticmethod
    def _pack(packed: Path, name: str, files: Files) -> None:
        (packed / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(packed / f"{name}.tar.gz", "w:gz") as tar:
            for path, data in files.items():
                (packed / path).write_bytes(data)
                tar.add(packed / path, arcname=f"adapter/{path}")


@pytest.fixture
def step(request: pytest.FixtureRequest, origin: FakeOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Step:
    return Step(request.param, origin, tmp_path / "packed", monkeypatch)


def during(*steps: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("step", steps, indirect=True)


def visible(node: Path) -> dict[str, Files]:
    return {str(path.relative_to(node)): read_files(path) for path in node.rglob("*") if path.is_symlink()}


def whole(stager: Stager, node: Path) -> bool:
    """What is seen, stored and counted is one and the same, and nothing is half done."""
    stored = {path.name for path in (node / ".store").iterdir()}
    return (
        set(visible(node)) == set(stager.node.holdings)
        and {path.resolve().name for path in node.rglob("*") if path.is_symlink()} == stored
        and {entry.id for entry in stager.node.holdings.index.entries()} == stored
        and stager.node.holdings.index.reserved_bytes == 0
        and not any((node / ".staging").iterdir())
    )


# -- full


@during("fetch", "publish", "unpack")
async def test_a_disk_that_fills_up_is_no_space_and_leaves_nothing(small: Disk, open_stager: OpenStager, step: Step) -> None:
    """Somebody else fills it, below our own limit: the flight fails, the node stays ready, hits are served, and when there is room it is staged."""
    stager = await open_stager(step.origin, dir=str(small.node))
    await stager.ensure(KEPT)
    flight = await step.begin(stager)
    small.fill()
    step.go_on()
    with pytest.raises(NoSpace, match="disk is full"):
        await flight
    assert stager.not_ready is None
    assert not (await stager.ensure(KEPT)).staged
    assert visible(small.node) == {KEPT: FILES[KEPT]}
    assert whole(stager, small.node)
    with pytest.raises(NoSpace):
        await stager.ensure(OTHER)
    assert whole(stager, small.node)
    small.empty()
    assert (await stager.ensure(COMING)).staged
    assert (await stager.ensure(OTHER)).staged
    assert visible(small.node) == FILES
    assert whole(stager, small.node)


@during("link")
async def test_a_disk_without_inodes_is_no_space(tmp_path: Path, open_stager: OpenStager, step: Step) -> None:
    """Bytes are free, and not even a link can be made: what was published for it goes again."""
    with tmpfs(tmp_path, f"size={ROOM_BYTES},nr_inodes=100") as disk:
        stager = await open_stager(step.origin, dir=str(disk.node))
        await stager.ensure(KEPT)
        flight = await step.begin(stager)
        use_up = disk.place / "files"
        use_up.mkdir()
        with contextlib.suppress(OSError):
            for number in range(1000):
                (use_up / str(number)).touch()
        step.go_on()
        with pytest.raises(NoSpace):
            await flight
        assert visible(disk.node) == {KEPT: FILES[KEPT]}
        assert whole(stager, disk.node)
        for path in use_up.iterdir():
            path.unlink()
        assert (await stager.ensure(COMING)).staged
        assert whole(stager, disk.node)
        await stager.close()


async def test_what_the_disk_has_no_room_for_is_not_downloaded(memory: Disk, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """The settings would allow it; the file system says how much is free before more than the header of the weights has come."""
    origin.add("acme/large", {CONFIG: FILES[KEPT][CONFIG], WEIGHTS: bytes(2 * ROOM_BYTES)})
    stager = await open_stager(origin, dir=str(memory.node))
    with pytest.raises(NoSpace, match="though its limit is not reached"):
        await stager.ensure("acme/large")
    assert whole(stager, memory.node)
    assert (await stager.ensure(KEPT)).staged


async def test_a_full_disk_takes_no_pin_and_keeps_those_it_has(exact: Disk, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A pin that would not survive a restart is none; the list is replaced whole or not at all."""
    stager = await open_stager(origin, dir=str(exact.node))
    await stager.pin(KEPT)
    await stager.ensure(COMING)
    before = (exact.node / PINS_FILE).read_bytes()
    exact.fill()
    with pytest.raises(NoSpace):
        await stager.pin(COMING)
    assert set(stager.node.holdings.pins) == {KEPT}
    assert (exact.node / PINS_FILE).read_bytes() == before
    assert whole(stager, exact.node)
    exact.empty()
    await stager.pin(COMING)
    await stager.close()
    assert set((await open_stager(origin, dir=str(exact.node))).node.holdings.pins) == {KEPT, COMING}


async def test_room_is_made_on_a_full_disk(memory: Disk, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """What is pinned, too, by who says so: purging writes nothing before it deletes."""
    stager = await open_stager(origin, dir=str(memory.node), free_share=0.0)
    await stager.pin(KEPT)
    memory.fill()
    ballast = memory.place / "ballast"
    os.truncate(ballast, ballast.stat().st_size - BLOCK_BYTES)  # a directory, which is counted, takes no block of a tmpfs
    assert await stager.purge(KEPT) == SIZE
    assert not stager.node.holdings.pins
    assert (await stager.ensure(COMING)).staged
    assert whole(stager, memory.node)


# -- failed


@pytest.mark.parametrize("fail", [Ext4.turn_read_only, Ext4.die], ids=["EROFS", "EIO"])
@during("fetch", "publish", "unpack", "link")
async def test_a_disk_that_fails_takes_the_node_out_until_it_is_mended(disk: Ext4, open_stager: OpenStager, step: Step, fail: Callable[[Ext4], None]) -> None:
    """Order of events: the disk fails, the flight with it; the node is not ready, hits are served; the disk is replaced; the node finds out by itself."""
    stager = await open_stager(step.origin, dir=str(disk.node))
    await stager.ensure(KEPT)
    flight = await step.begin(stager)
    with stager.node.changes.since(stager.node.changes.last) as (told, _):
        fail(disk)
        step.go_on()
        with pytest.raises(DiskFailed):
            await flight
        assert "disk" in (stager.not_ready or "")
        assert "node" in {change.kind for change in _drain(told)}
        assert not (await stager.ensure(KEPT)).staged
        with pytest.raises(DiskFailed) as raised:
            await stager.ensure(OTHER)
        assert raised.value.retryable
        assert not raised.value.shared
        assert stager.node.holdings.index.reserved_bytes == 0
        disk.mend()
        await until(lambda: stager.not_ready is None)
        assert "node" in {change.kind for change in _drain(told)}
    await until(lambda: not any((disk.node / ".staging").iterdir()))
    assert set(visible(disk.node)) == {KEPT}
    assert (await stager.ensure(COMING)).staged
    assert (await stager.ensure(OTHER)).staged
    assert not (await stager.ensure(KEPT)).staged
    assert visible(disk.node) == FILES
    assert whole(stager, disk.node)


@during("publish", "unpack", "link")
async def test_a_disk_that_is_read_only_for_a_while(memory: Disk, open_stager: OpenStager, step: Step) -> None:
    """The same file system comes back, with what could not be removed meanwhile: it goes then."""
    stager = await open_stager(step.origin, dir=str(memory.node))
    await stager.ensure(KEPT)
    flight = await step.begin(stager)
    memory.turn_read_only()
    step.go_on()
    with pytest.raises(DiskFailed):
        await flight
    assert "disk" in (stager.not_ready or "")
    assert visible(memory.node) == {KEPT: FILES[KEPT]}
    assert not (await stager.ensure(KEPT)).staged
    memory.mend()
    await until(lambda: stager.not_ready is None and not any((memory.node / ".staging").iterdir()))
    assert (await stager.ensure(COMING)).staged
    assert whole(stager, memory.node)


async def test_a_disk_that_is_read_only_before_the_fetch(memory: Disk, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Nothing is asked of the origin's bandwidth."""
    stager = await open_stager(origin, dir=str(memory.node))
    memory.turn_read_only()
    with pytest.raises(DiskFailed):
        await stager.ensure(COMING)
    assert not origin.fetched
    memory.mend()
    await until(lambda: stager.not_ready is None)
    assert (await stager.ensure(COMING)).staged


@pytest.mark.parametrize("by", [Stager.evict, Stager.purge])
async def test_what_cannot_be_deleted_stays_and_is_served(
    memory: Disk, open_stager: OpenStager, origin: FakeOrigin, clock: Clock, by: Callable[[Stager, str], "asyncio.Future[int]"]
) -> None:
    """The disk's failure is the answer, not "somebody reads it"."""
    stager = await open_stager(origin, dir=str(memory.node))
    await stager.ensure(KEPT)
    clock.now += 1000
    memory.turn_read_only()
    with pytest.raises(DiskFailed):
        await by(stager, KEPT)
    assert "disk" in (stager.not_ready or "")
    assert not (await stager.ensure(KEPT)).staged
    memory.mend()
    await until(lambda: stager.not_ready is None)
    assert whole(stager, memory.node)
    clock.now += 1000
    assert await by(stager, KEPT) == SIZE
    assert visible(memory.node) == {}
    assert whole(stager, memory.node)


async def test_no_room_is_made_on_a_disk_that_cannot_be_written(
    memory: Disk, open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: acme/coming needs the room of acme/kept; the disk fails before that is deleted. It is the disk's failure, not a lack of room."""
    stager = await open_stager(origin, dir=str(memory.node), max_bytes=SIZE)
    await stager.ensure(KEPT)
    clock.now += 1000
    unlinking = Gate(monkeypatch, stager.node.store, "unlink")
    flight = asyncio.create_task(stager.ensure(COMING))
    await unlinking.reached()
    memory.turn_read_only()
    unlinking.open()
    with pytest.raises(DiskFailed):
        await flight
    assert visible(memory.node) == {KEPT: FILES[KEPT]}
    assert not (await stager.ensure(KEPT)).staged
    clock.now += 1000
    memory.mend()
    await until(lambda: stager.not_ready is None and not stager.node.store.has_leftovers)
    assert (await stager.ensure(COMING)).staged
    assert whole(stager, memory.node)


async def test_a_name_whose_content_could_not_be_deleted_leads_to_it_again(
    memory: Disk, open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: the link is gone; the content's rename fails once. What is still called present must be found by an engine."""
    stager = await open_stager(origin, dir=str(memory.node))
    await stager.ensure(KEPT)
    clock.now += 1000
    Gate(monkeypatch, stager.node.store, "remove", fails=DiskFailed("once")).open()
    with pytest.raises(DiskFailed):
        await stager.evict(KEPT)
    assert visible(memory.node) == {KEPT: FILES[KEPT]}
    assert not (await stager.ensure(KEPT)).staged
    assert whole(stager, memory.node)


async def test_a_name_that_cannot_be_linked_again_is_told_to_be_gone(
    disk: Ext4, open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: the link is gone; the disk dies. Nobody may be sent to this node for it."""
    stager = await open_stager(origin, dir=str(disk.node))
    await stager.ensure(KEPT)
    await stager.ensure(OTHER)
    clock.now += 1000
    removing = Gate(monkeypatch, stager.node.store, "remove")
    with stager.node.changes.since(stager.node.changes.last) as (told, _):
        evicting = asyncio.create_task(stager.evict(KEPT))
        await removing.reached()
        disk.die()
        removing.open()
        with pytest.raises(DiskFailed):
            await evicting
        assert ("evicted", KEPT) in {(change.kind, change.adapter) for change in _drain(told)}
    assert set(stager.node.holdings) == {OTHER}
    disk.mend()
    await until(lambda: stager.not_ready is None)
    await stager.ensure(KEPT)  # from the origin, or from the next disk, if the link is on it
    assert visible(disk.node) == {KEPT: FILES[KEPT], OTHER: FILES[OTHER]}
    assert whole(stager, disk.node)


async def test_reading_back_from_a_dead_disk_removes_nothing(disk: Ext4, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Nothing can be read, and nothing be deleted; on the next disk all of it is there."""
    stager = await open_stager(origin, dir=str(disk.node))
    for name in FILES:
        await stager.ensure(name)
    os.sync()
    disk.die()
    found = [verified async for verified in stager.verify()]
    assert {(verified.name, bool(verified.why), verified.removed) for verified in found} == {(name, True, False) for name in FILES}
    assert "disk" in (stager.not_ready or "")
    disk.mend()
    await until(lambda: stager.not_ready is None)
    found = [verified async for verified in stager.verify()]
    assert not any(verified.why for verified in found)
    assert visible(disk.node) == FILES
    assert whole(stager, disk.node)


async def test_a_start_on_a_dead_disk_is_refused(disk: Ext4, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """With the setting's name; the next start on a new disk takes over what was safe."""
    stager = await open_stager(origin, dir=str(disk.node))
    await stager.ensure(KEPT)
    await stager.close()
    disk.die()
    with pytest.raises(LoraExtprocError, match=r"stager\.dir .* cannot be used: Input/output error"):
        await open_stager(origin, dir=str(disk.node))
    disk.mend()
    again = await open_stager(origin, dir=str(disk.node))
    assert not (await again.ensure(KEPT)).staged
    assert visible(disk.node) == {KEPT: FILES[KEPT]}


def _drain(queue: asyncio.Queue[Change | None]) -> list[Change]:
    return [change for _ in range(queue.qsize()) if (change := queue.get_nowait()) is not None]


async def test_a_disk_that_is_smaller_than_its_budget_evicts_like_one_that_is_full(
    tmp_path: Path, open_stager: OpenStager, origin: FakeOrigin, clock: Clock
) -> None:
    """The file system's own room counts, and a part of it is left free; before that nothing is evicted, and nothing is refused."""
    with tmpfs(tmp_path, "size=400k") as disk:
        stager = await open_stager(origin, dir=str(disk.node), free_share=0.1)
        for number in range(40):
            origin.add(f"acme/{number}", small_files(seed=number))
            assert (await stager.ensure(f"acme/{number}")).staged
            clock.now += 1000
            assert shutil.disk_usage(disk.node).free >= 40 * 2**10
        await until(lambda: set(visible(disk.node)) == {f"acme/{number}" for number in range(40 - len(stager.node.holdings), 40)})  # no trim is going on
        assert len(stager.node.holdings) >= 12
        await stager.close()
