"""What a training job or rsync puts into the node's directory: served when complete, told when it changes, and its owner's."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from extproc.client import Loading
from extproc.core.artifact import adapter_name, content_digest
from extproc.errors import AdapterInUse, InvalidAdapter, ModelNotFound, NoSpace
from extproc.stager import stager as stager_module
from extproc.stager.books.changes import Change
from extproc.stager.disk import adopt as adopt_module
from extproc.stager.disk.adopt import MEMORY_FILE, ORIGIN
from extproc.stager.stager import Stager
from extproc.stager.supply.origins import Origin
from extproc.stager.syscalls import hash_file
from extproc.stager.work import repair as repair_module
from tests.fakes.adapters import CONFIG, WEIGHTS, Files, read_files, sha256, size_of, small_files, write_small
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.gate import Gate
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

from ..conftest import OpenStager

SIZE = size_of(small_files())
MINE = adapter_name("mine")
AT_ONCE_S = 1e-9  # for scan_s: no file need rest


@pytest.fixture
def open_stager(open_stager: OpenStager, monkeypatch: pytest.MonkeyPatch) -> OpenStager:
    """The directory is looked through whenever the clock moves."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)

    async def open_(*origins: Origin, engine_url: str = "", **settings: Any) -> Stager:
        return await open_stager(*origins, engine_url=engine_url, **{"revalidate_s": 0.0, "scan_s": AT_ONCE_S, **settings})

    return open_


def put(directory: Path, files: Files) -> Path:
    """As a training job does."""
    directory.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        (directory / path).write_bytes(data)
    return directory


def digest_of(directory: Path) -> str:
    return content_digest(hash_file(directory / path, path) for path in (CONFIG, WEIGHTS))


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below it, with its time of modification."""
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def told(queue: "asyncio.Queue[Change | None]") -> list[tuple[str, str]]:
    changes = [queue.get_nowait() for _ in range(queue.qsize())]
    return [(change.kind, change.adapter) for change in changes if change is not None and change.adapter]


def balanced(stager: Stager) -> bool:
    index = stager.node.holdings.index
    ids = {named.id for name in stager.node.holdings if (named := stager.node.holdings.get(name)) is not None}
    return ids == {entry.id for entry in index.entries()} and sum(entry.size for entry in index.entries()) == index.used_bytes and not index.reserved_bytes


# -- found


async def test_what_is_there_at_the_start_is_served_from_where_it_is(open_stager: OpenStager, node: Path) -> None:
    """Nothing is moved, written beside it or asked of an origin; it counts as used."""
    put(node / "acme" / "mine", small_files())
    before = snapshot(node / "acme")
    stager = await open_stager()
    held = await stager.ensure("acme/mine")
    assert (held.staged, held.origin) == (False, ORIGIN)
    assert held.digest == digest_of(node / "acme" / "mine")
    assert snapshot(node / "acme") == before
    assert list((node / ".store").iterdir()) == []
    assert stager.node.holdings.index.used_bytes == SIZE
    assert balanced(stager)


async def test_what_comes_later_is_found_by_the_next_look(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """Watchers are told."""
    stager = await open_stager()
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        put(node / "mine", small_files())
        clock.now += 1
        await until(lambda: "mine" in set(stager.node.holdings))
        assert told(queue) == [("published", "mine")]
    assert not (await stager.ensure("mine")).staged


async def test_what_comes_later_is_found_by_a_request(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Before the next look, and before any origin is asked."""
    stager = await open_stager(origin, scan_s=AT_ONCE_S)
    put(node / "mine", small_files())
    origin.add("mine", small_files(seed=1))
    assert (await stager.ensure("mine")).origin == ORIGIN
    assert not origin.resolved


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ({WEIGHTS: None}, "not complete"),
        ({WEIGHTS: b""}, "no safetensors header"),
        ({WEIGHTS: small_files()[WEIGHTS][:-1]}, "cut short"),
        ({WEIGHTS: small_files()[WEIGHTS][:20]}, "header"),
        ({CONFIG: small_files()[CONFIG][:-10]}, "not JSON"),
    ],
    ids=["no weights", "empty weights", "cut weights", "cut header", "cut configuration"],
)
async def test_what_is_not_complete_is_not_served_until_it_is(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock, missing: dict[str, bytes | None], says: str
) -> None:
    """A copy in progress: the request is told why, the look passes over it, and nothing of it is touched."""
    files = small_files()
    partial = {path: data for path, data in {**files, **missing}.items() if data is not None}
    put(node / "mine", partial)
    stager = await open_stager(origin)
    with pytest.raises(InvalidAdapter, match=says):
        await stager.ensure("mine")
    clock.now += 1
    await turns(200)
    assert "mine" not in set(stager.node.holdings)
    assert read_files(node / "mine") == partial
    put(node / "mine", files)
    clock.now += 1
    await until(lambda: "mine" in set(stager.node.holdings))
    assert (await stager.ensure("mine")).digest == digest_of(node / "mine")


async def test_without_a_configuration_it_is_nobodys_adapter(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """The weights come first, as with many tools. A request that comes then must not put ours over it."""
    put(node / "mine", {WEIGHTS: small_files()[WEIGHTS]})
    origin.add("mine", small_files(seed=1))
    stager = await open_stager(origin)
    with pytest.raises(InvalidAdapter, match="cannot be served"):
        await stager.ensure("mine")
    assert set(read_files(node / "mine")) == {WEIGHTS}
    put(node / "mine", small_files())
    assert (await stager.ensure("mine")).origin == ORIGIN


async def test_what_was_written_to_a_moment_ago_must_rest_first(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """Whole so far is not yet complete: a writer may go on."""
    put(node / "mine", small_files())
    stager = await open_stager(scan_s=3600.0)
    with pytest.raises(InvalidAdapter, match="less than 3600 s ago"):
        await stager.ensure("mine")
    assert "mine" not in set(stager.node.holdings)
    stager._adopter._wall_clock = lambda: time.time() + 3601
    clock.now += 3600
    await until(lambda: "mine" in set(stager.node.holdings))


async def test_a_time_from_the_future_says_nothing(open_stager: OpenStager, node: Path) -> None:
    """Rsync and tar bring times along, from machines whose clock is ahead. When the file was changed here, the kernel knows."""
    put(node / "mine", small_files())
    for path in (CONFIG, WEIGHTS):
        os.utime(node / "mine" / path, (time.time() + 10_000, time.time() + 10_000))
    stager = await open_stager()
    assert "mine" in set(stager.node.holdings)


async def test_where_the_kernel_s_clock_is_ahead_it_counts_how_long_the_files_stay_as_they_are(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """A file server whose clock is an hour ahead, or a node whose clock was put back: the adapter need not wait until that hour is over."""
    put(node / "mine", small_files())
    stager = await open_stager(scan_s=60.0)
    stager._adopter._wall_clock = lambda: time.time() - 3600
    with pytest.raises(InvalidAdapter, match="less than 60 s ago"):
        await stager.ensure("mine")
    clock.now += 50
    put(node / "mine", small_files(seed=1))  # it begins anew
    for wait_s in (0, 50):
        clock.now += wait_s
        with pytest.raises(InvalidAdapter, match="less than 60 s ago"):
            await stager.ensure("mine")
    clock.now += 50
    assert (await stager.ensure("mine")).digest == digest_of(node / "mine")


async def test_what_was_hashed_need_not_rest_again(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """Order of events: adopted; the node's clock is put back; the stager is restarted. Nobody has written to it since."""
    put(node / "mine", small_files())
    stager = await open_stager(scan_s=60.0)
    stager._adopter._wall_clock = lambda: time.time() + 61
    await stager.ensure("mine")
    clock.now += 60
    await until((node / MEMORY_FILE).exists)
    await stager.close()
    again = await open_stager(scan_s=60.0)
    assert "mine" in set(again.node.holdings)


async def test_what_changes_while_it_is_read_is_not_served(open_stager: OpenStager, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of events: verified; the owner writes; hashed. The hash would be of neither version."""
    stager = await open_stager()
    hashing = Gate(monkeypatch, stager._adopter, "_hashed")
    put(node / "mine", small_files(seed=1))
    asking = asyncio.create_task(stager.ensure("mine"))
    await hashing.reached()
    put(node / "mine", small_files(seed=2))
    hashing.open()
    with pytest.raises(InvalidAdapter, match="others write to it"):
        await asking
    assert (await stager.ensure("mine")).digest == digest_of(node / "mine")


async def test_another_base_model_is_refused_and_left_alone(open_stager: OpenStager, node: Path) -> None:
    """The engine would not load it; it is somebody's all the same."""
    put(node / "mine", small_files(base_model="other/base"))
    before = snapshot(node / "mine")
    stager = await open_stager()
    with pytest.raises(InvalidAdapter, match="other/base"):
        await stager.ensure("mine")
    assert len(stager.node.holdings) == 0
    assert snapshot(node / "mine") == before


@pytest.mark.parametrize("how", ["absolute", "relative"])
async def test_a_link_to_an_adapter_elsewhere_is_one(open_stager: OpenStager, node: Path, tmp_path: Path, how: str) -> None:
    """`ln -s /nfs/sql DIR/sql`, as operators do. It takes no room, and is told when it leads elsewhere, or nowhere."""
    for seed, name in enumerate(("old", "new")):
        put(tmp_path / "nfs" / name, small_files(seed=seed))
    there = tmp_path / "nfs" if how == "absolute" else Path("../../nfs")
    (node / "acme").mkdir(parents=True)
    (node / "acme/sql").symlink_to(there / "old")
    stager = await open_stager(max_bytes=1)
    assert set(stager.node.holdings) == {"acme/sql"}
    assert (await stager.ensure("acme/sql")).digest == digest_of(tmp_path / "nfs/old")
    assert stager.node.holdings.index.used_bytes == 0
    (node / "acme/sql").unlink()
    (node / "acme/sql").symlink_to(there / "new")
    await stager._adopter.scan()
    assert (await stager.ensure("acme/sql")).digest == digest_of(tmp_path / "nfs/new")
    (node / "acme/sql").unlink()
    await stager._adopter.scan()
    assert not set(stager.node.holdings)
    assert balanced(stager)


async def test_a_link_that_came_later_is_found_by_a_request(open_stager: OpenStager, origin: FakeOrigin, node: Path, tmp_path: Path) -> None:
    """It goes before what an origin has under its name."""
    origin.add("mine", small_files(seed=1))
    stager = await open_stager(origin)
    put(tmp_path / "nfs", small_files())
    (node / "mine").symlink_to(tmp_path / "nfs")
    assert (await stager.ensure("mine")).origin == ORIGIN
    assert not origin.fetched


async def test_a_link_to_what_has_a_name_already_is_no_adapter(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Order of events: loaded under the second name, evicted under the first: the engine would read files that are gone."""
    origin.add("ours", small_files())
    put(node / "theirs", small_files(seed=1))
    stager = await open_stager(origin)
    await stager.ensure("ours")
    for name, to in (("one", "ours"), ("two", "theirs"), ("three", f".store/{digest_of(node / 'ours')}"), ("four", "four"), ("five", "nowhere"), ("six", ".")):
        (node / name).symlink_to(to)
        with pytest.raises((InvalidAdapter, ModelNotFound)):
            await stager.ensure(name)
    await stager._adopter.scan()
    assert set(stager.node.holdings) == {"ours", "theirs"}


@pytest.mark.parametrize("below", [False, True], ids=["alone", "with checkpoints"])
async def test_of_an_evicted_link_nothing_goes_but_the_link(open_stager: OpenStager, node: Path, tmp_path: Path, clock: Clock, below: bool) -> None:
    """What it leads to is on somebody else's disk."""
    put(tmp_path / "nfs/run", small_files())
    if below:
        put(tmp_path / "nfs/run/checkpoint-10", small_files(seed=1))
    before = snapshot(tmp_path / "nfs")
    node.mkdir()
    (node / "run").symlink_to("../nfs/run")
    stager = await open_stager(evict_adopted=True)
    clock.now += 1000
    await stager.evict("run")
    assert not os.path.lexists(node / "run")
    assert snapshot(tmp_path / "nfs") == before


async def test_names_may_be_nested(open_stager: OpenStager, node: Path) -> None:
    """A run with its checkpoints: each is an adapter, with the path as its name."""
    for seed, name in enumerate(("team/run", "team/run/checkpoint-10", "team/run/checkpoint-20", "solo")):
        put(node / name, small_files(seed=seed))
    stager = await open_stager()
    assert set(stager.node.holdings) == {"team/run", "team/run/checkpoint-10", "team/run/checkpoint-20", "solo"}
    for name in stager.node.holdings:
        assert (await stager.ensure(name)).digest == digest_of(node / name)


async def test_our_own_adapters_may_come_beside_theirs(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """In one folder, above and below a directory of theirs, in which only links are put."""
    put(node / "acme" / "mine", small_files())
    for name in ("acme/ours", "acme", "acme/mine/x"):
        origin.add(name, small_files(seed=1))
    stager = await open_stager(origin)
    assert (await stager.ensure("acme/ours")).staged
    assert (await stager.ensure("acme")).staged
    assert read_files(node / "acme")[WEIGHTS] == small_files(seed=1)[WEIGHTS]
    before = snapshot(node / "acme" / "mine")
    if (node / "acme" / "mine" / "x").exists():
        raise AssertionError
    assert (await stager.ensure("acme/mine/x")).staged  # a link in their folder, which holds nothing of theirs
    assert {path: seen for path, seen in snapshot(node / "acme" / "mine").items() if not path.startswith("x/")} == before


async def test_it_may_be_switched_off(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Then such a directory is in the way of its name, and stays."""
    put(node / "mine", small_files())
    origin.add("mine", small_files(seed=1))
    stager = await open_stager(origin, adopt=False)
    with pytest.raises(InvalidAdapter, match="cannot be served"):
        await stager.ensure("mine")
    assert len(stager.node.holdings) == 0
    assert read_files(node / "mine") == small_files()


async def test_content_that_is_stored_already_is_another_artifact(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """One digest, two places, two entries: removing ours leaves theirs."""
    origin.add("ours", small_files())
    stager = await open_stager(origin)
    ours = await stager.ensure("ours")
    put(node / "mine", small_files())
    theirs = await stager.ensure("mine")
    assert ours.digest == theirs.digest
    assert stager.node.holdings.index.used_bytes == 2 * SIZE
    clock.now += 1000
    assert await stager.evict("ours") == SIZE
    assert read_files(node / "mine") == small_files()
    assert not (await stager.ensure("mine")).staged
    assert balanced(stager)


# -- changed and gone


async def test_a_new_version_in_its_place_is_told(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """With its new digest and size; who leased the name keeps the lease."""
    put(node / "mine", small_files(seed=1))
    stager = await open_stager()
    old = await stager.ensure("mine", holder="router")
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        put(node / "mine", small_files(seed=2, rank=8))
        clock.now += 1
        await until(lambda: (named := stager.node.holdings.get(MINE)) is not None and named.digest != old.digest)
        assert told(queue) == [("refreshed", "mine")]
    named = stager.node.holdings.get(MINE)
    assert named is not None
    assert named.digest == digest_of(node / "mine")
    assert stager.node.holdings.index.used_bytes == size_of(small_files(rank=8))
    assert stager.leased_s(named.id) == 299.0
    assert balanced(stager)


async def test_a_new_version_may_be_asked_for(open_stager: OpenStager, node: Path) -> None:
    """Refresh looks at once; nothing new is no change."""
    put(node / "mine", small_files(seed=1))
    stager = await open_stager()
    assert not await stager.refresh("mine")
    put(node / "mine", small_files(seed=2))
    assert await stager.refresh("mine")
    assert (await stager.ensure("mine")).digest == digest_of(node / "mine")


async def test_a_half_written_new_version_changes_nothing_yet(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """The old files are gone already: all that can be said is that no new version is there."""
    put(node / "mine", small_files(seed=1))
    stager = await open_stager()
    old = await stager.ensure("mine")
    put(node / "mine", {WEIGHTS: small_files(seed=2)[WEIGHTS][:100]})
    with pytest.raises(InvalidAdapter):
        await stager.refresh("mine")
    assert (await stager.ensure("mine")).digest == old.digest
    put(node / "mine", small_files(seed=2))
    assert await stager.refresh("mine")


async def test_what_its_owner_takes_away_is_told(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """After that an origin may have the name."""
    put(node / "mine", small_files())
    stager = await open_stager(origin)
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        shutil.rmtree(node / "mine")
        clock.now += 1
        await until(lambda: "mine" not in set(stager.node.holdings))
        assert told(queue) == [("evicted", "mine")]
    assert stager.node.holdings.index.used_bytes == 0
    assert balanced(stager)
    with pytest.raises(ModelNotFound):
        await stager.ensure("mine")
    clock.now += 100
    origin.add("mine", small_files())
    assert (await stager.ensure("mine")).staged


# -- never deleted


async def test_no_room_is_made_of_it(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """Least recently used or not: it counts, and ours goes. Where only theirs is left, there is no room."""
    put(node / "mine", small_files())
    stager = await open_stager(origin, max_bytes=2 * SIZE)
    for seed, name in enumerate(("a", "b"), 1):
        origin.add(name, small_files(seed=seed))
        await stager.ensure(name)
        clock.now += 1000
    assert set(stager.node.holdings) == {"mine", "b"}
    put(node / "more", small_files(seed=4))
    await stager.ensure("more")
    with pytest.raises(NoSpace):
        await stager.ensure("a")
    clock.now += 1000
    await until(lambda: set(stager.node.holdings) == {"mine", "more"})  # over the high watermark only ours may go
    assert read_files(node / "mine") == small_files()
    assert balanced(stager)


async def test_no_operator_deletes_it_by_our_verbs(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """Whose files they are counts more than who asks, unless the settings say otherwise."""
    put(node / "mine", small_files())
    stager = await open_stager()
    clock.now += 1000
    for verb in (stager.evict, stager.purge):
        with pytest.raises(AdapterInUse, match="evict_adopted is off"):
            await verb("mine")
    assert read_files(node / "mine") == small_files()
    assert not (await stager.ensure("mine")).staged


@pytest.mark.parametrize("evict_adopted", [False, True])
async def test_reading_back_only_reports_it(open_stager: OpenStager, node: Path, evict_adopted: bool) -> None:
    """Changed or damaged: its owner knows which."""
    put(node / "mine", small_files(seed=1))
    stager = await open_stager(scan_s=3600.0, evict_adopted=evict_adopted)
    stager._adopter._wall_clock = lambda: time.time() + 3601
    await stager.ensure("mine")
    assert [(found.why, found.removed) async for found in stager.verify()] == [("", False)]
    weights = node / "mine" / WEIGHTS
    flip(weights)
    assert [(found.why != "", found.removed) async for found in stager.verify()] == [(True, False)]
    put(node / "mine", small_files(seed=2))
    assert [(found.why, found.removed) async for found in stager.verify("mine")] == [("others changed it in place", False)]
    assert read_files(node / "mine") == small_files(seed=2)


def flip(path: Path) -> None:
    """One bit, with the times as they were."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def test_it_may_be_more_than_the_limit(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """All of it is served; ours finds no room."""
    for seed in range(3):
        put(node / f"mine{seed}", small_files(seed=seed))
    origin.add("ours", small_files(seed=9))
    stager = await open_stager(origin, max_bytes=2 * SIZE)
    for seed in range(3):
        assert (await stager.ensure(f"mine{seed}")).origin == ORIGIN
    with pytest.raises(NoSpace):
        await stager.ensure("ours")
    assert len(list(node.glob("mine*"))) == 3


# -- deleted where that is allowed


async def test_with_evict_adopted_it_goes_like_any_other(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """Least recently used first, never while it is leased."""
    put(node / "acme" / "mine", small_files())
    stager = await open_stager(origin, max_bytes=SIZE, evict_adopted=True)
    origin.add("ours", small_files(seed=1))
    await stager.ensure("acme/mine")
    with pytest.raises(NoSpace):
        await stager.ensure("ours")
    clock.now += 1000
    assert (await stager.ensure("ours")).staged
    assert not (node / "acme").exists()
    assert set(stager.node.holdings) == {"ours"}
    assert balanced(stager)
    assert list((node / ".staging").iterdir()) == []


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node, max_loras=1, max_cpu_loras=1) as engine:
        yield engine


async def test_with_evict_adopted_the_engine_is_asked_first(open_stager: OpenStager, engine: RunningEngine, node: Path, clock: Clock) -> None:
    """Registered and idle: unloaded before its files go. While it runs it stays where it is."""
    put(node / "mine", small_files(seed=1))
    put(node / "other", small_files(seed=2))
    stager = await open_stager(engine_url=engine.url, evict_adopted=True)
    clock.now += 1000
    await engine.ask("mine")
    async with engine.adapters.use("mine"):
        with pytest.raises(AdapterInUse, match="engine"):
            await stager.evict("mine")
        assert read_files(node / "mine") == small_files(seed=1)
    assert await stager.evict("mine") == SIZE
    assert not (node / "mine").exists()
    assert "mine" not in engine.adapters.registry
    assert await engine.ask("other") == sha256(small_files(seed=2)[WEIGHTS])
    assert engine.deaths == 0


async def test_with_evict_adopted_it_comes_back_for_a_request_that_slipped_in(open_stager: OpenStager, engine: RunningEngine, node: Path, clock: Clock) -> None:
    """Order of events: the directory is moved away; a request that had resolved it registers it; the look after it sees that; it is moved back."""
    put(node / "mine", small_files())
    before = snapshot(node / "mine")
    stager = await open_stager(engine_url=engine.url, evict_adopted=True)
    clock.now += 1000

    async def slip_in(asked: str) -> None:
        if asked in ("/v1/models", "/metrics") and not (node / "mine").exists():
            engine.step = None
            engine.adapters.registry["mine"] = str(node / "mine")

    engine.step = slip_in
    with pytest.raises(AdapterInUse):
        await stager.evict("mine")
    assert snapshot(node / "mine") == before
    assert await engine.ask("mine") == sha256(small_files()[WEIGHTS])
    assert not (await stager.ensure("mine")).staged
    assert balanced(stager)


# -- across restarts


async def test_a_restart_does_not_read_it_again(open_stager: OpenStager, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hashed is remembered by sizes, times and inodes."""
    put(node / "mine", small_files())
    digest = digest_of(node / "mine")
    stager = await open_stager()
    await stager.close()
    assert (node / MEMORY_FILE).exists()
    read: list[Path] = []
    monkeypatch.setattr(adopt_module, "_hash_all", read.append)
    again = await open_stager()
    assert (await again.ensure("mine")).digest == digest
    assert not read


async def test_a_change_whose_time_was_put_back_is_seen(open_stager: OpenStager, node: Path) -> None:
    """The kernel's own time of change cannot be put back: what a caller states of the weights is compared with what is there now."""
    put(node / "mine", small_files())
    stated = sha256(small_files()[WEIGHTS])
    stager = await open_stager(scan_s=AT_ONCE_S)
    assert not (await stager.ensure("mine", sha256=stated)).staged
    flip(node / "mine" / WEIGHTS)
    with pytest.raises(InvalidAdapter, match="SHA-256"):
        await stager.ensure("mine", sha256=stated)
    await stager.refresh("mine")
    assert (await stager.ensure("mine")).digest == digest_of(node / "mine")


async def test_a_restart_reads_what_has_changed(open_stager: OpenStager, node: Path) -> None:
    """And forgets what is gone."""
    for seed, name in enumerate(("mine", "gone")):
        put(node / name, small_files(seed=seed))
    stager = await open_stager()
    await stager.close()
    put(node / "mine", small_files(seed=2))
    shutil.rmtree(node / "gone")
    again = await open_stager()
    assert set(again.node.holdings) == {"mine"}
    assert (await again.ensure("mine")).digest == digest_of(node / "mine")
    await again.close()
    assert "gone" not in (node / MEMORY_FILE).read_text()


@pytest.mark.parametrize("memory", [b"", b"\xff", b"[]", b'{"mine": 1}', b'{"mine": {"revision": 1, "files": 2}}'])
async def test_a_damaged_memory_costs_one_reading(open_stager: OpenStager, node: Path, memory: bytes) -> None:
    """It is only a memory."""
    put(node / "mine", small_files())
    (node / MEMORY_FILE).write_bytes(memory)
    stager = await open_stager()
    assert (await stager.ensure("mine")).digest == digest_of(node / "mine")


async def test_the_memory_is_written_once_for_many(open_stager: OpenStager, node: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds all of them: written after each, ten thousand would write it ten thousand times."""
    stager = await open_stager()
    writes: list[str] = []
    write = stager.node.store.write_json

    def write_json(name: str, value: object) -> None:
        writes.append(name)
        write(name, value)

    monkeypatch.setattr(stager.node.store, "write_json", write_json)
    for seed in range(20):
        write_small(node / "many" / str(seed), seed=seed)
    clock.now += 1
    await until(lambda: len(stager.node.holdings) == 20 and writes)
    assert len(writes) <= 2  # a look may begin before the last of them is there


def test_a_directory_that_may_not_be_read_stops_nothing(node: Path, tmp_path: Path) -> None:
    """`lost+found` on a file system of its own, root's: a stager that is not root starts, and looks through the rest."""
    if os.geteuid() != 0:
        pytest.skip("only root can put up what another may not read")
    put(node / "mine", small_files())
    put(node / "secret", small_files(seed=1))
    put(node / "half", small_files(seed=2))
    (node / "lost+found").mkdir()
    for hidden in ("lost+found", "secret", f"half/{WEIGHTS}"):
        (node / hidden).chmod(0)
    for directory in (node, *(parent for parent in node.parents if parent.is_relative_to("/tmp") and parent != Path("/tmp"))):
        directory.chmod(0o777)
    code = """
import asyncio, os, sys
from extproc.config.stager import StagerSettings
from extproc.errors import LoraExtprocError
from extproc.metrics import StagerMetrics
from extproc.stager.engine import Engine
from extproc.stager.stager import Stager

async def main(directory):
    settings = StagerSettings(dir=directory, scan_s=1e-9, engine={"url": ""})
    stager = Stager(settings, [], Engine(settings.engine), StagerMetrics())
    await stager.open()
    for name in ("lost+found", "secret", "half"):
        try:
            await stager.ensure(name)
        except LoraExtprocError as error:
            print(name, type(error).__name__)
    print(sorted(stager.node.holdings), stager.not_ready)
    await stager.close()

asyncio.run(main(sys.argv[2]))  # what is imported on the way may not be readable later
os.setgroups([]), os.setgid(65534), os.setuid(65534)
asyncio.run(main(sys.argv[1]))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(node), str(tmp_path / "rehearsal")], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "['mine'] None"
    assert "DiskFailed" not in ran.stdout


LOOKS = """
import asyncio, logging, os, sys
from pathlib import Path
from extproc.config.stager import StagerSettings
from extproc.core.artifact import adapter_name
from extproc.errors import DiskFailed
from extproc.stager.disk.adopt import Adopter
from extproc.stager.books.changes import Changes
from extproc.stager.books.holdings import Holdings
from extproc.stager.disk.store import Store
from extproc.stager.threads import Threads

if os.geteuid() == 0:  # whom no mode keeps out
    os.setgroups([])
    os.setuid(65534)
logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stdout)
adopter = Adopter(StagerSettings(dir=sys.argv[1]), Store(Path(sys.argv[1])), Holdings(10**9), Changes(), Threads(1, "disk"))
try:
    asyncio.run(adopter.is_there(adapter_name("acme/a")))
except DiskFailed as error:
    print(error)
for _ in range(3):
    asyncio.run(adopter.scan())
"""


def test_a_directory_that_may_not_be_looked_at_is_a_failure_of_the_disk(tmp_path: Path) -> None:
    """A request hears of the disk's failure and brings no traceback; however many looks are one line in the log."""
    closed = tmp_path / "node"
    write_small(closed / "acme/a")
    closed.chmod(0)
    command = [sys.executable, "-c", LOOKS, str(closed)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    closed.chmod(0o755)
    assert (ran.returncode, ran.stderr) == (0, "")
    answer, *said = ran.stdout.splitlines()
    assert answer == "the node's disk cannot be read: Permission denied"
    assert said == [f"what others put into {closed} is not seen: the node's disk cannot be read: Permission denied"]


# -- whose it is


async def test_the_look_through_the_directory_forgets_nothing_of_ours(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """Order of events: adopted, evicted, staged again from an origin; the next look takes it neither for theirs nor for gone."""
    put(node / "mine", small_files(seed=1))
    origin.add("mine", small_files(seed=2))
    stager = await open_stager(origin, evict_adopted=True)
    clock.now += 1000
    await stager.evict("mine")
    held = await stager.ensure("mine")
    await stager._adopter.scan()
    assert not (await stager.ensure("mine")).staged
    assert (await stager.ensure("mine")).digest == held.digest
    assert balanced(stager)


async def test_an_older_list_of_the_directory_forgets_nothing_of_ours(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: listed as theirs, taken away, fetched from an origin, and only then looked at, since others had to be hashed before."""
    origin.add("mine", small_files(seed=2))
    stager = await open_stager(origin)
    await stager.ensure("mine")
    monkeypatch.setattr(stager._adopter._foreign, "look", lambda *_: [MINE])
    await stager._adopter.scan()
    assert not (await stager.ensure("mine")).staged
    assert balanced(stager)


async def test_the_engine_forgets_a_version_that_others_have_replaced(
    open_stager: OpenStager, engine: RunningEngine, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name the engine would read the new files."""
    monkeypatch.setattr(repair_module, "IN_TRANSIT_S", 0.0)
    put(node / "mine", small_files(seed=0))
    stager = await open_stager(engine_url=engine.url)
    for seed in (1, 2, 3):
        await stager.ensure("mine", loading=Loading.VERSIONED)
        put(node / "mine", small_files(seed=seed))
        await stager.refresh("mine")
    latest = await stager.ensure("mine", loading=Loading.VERSIONED)
    await until(lambda: set(engine.adapters.registry) == {latest.model})


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"base_model_name_or_path": "another/base"}, "base model"), ({"r": 64}, "rank"), ({"use_dora": True}, "DoRA")],
    ids=["base model", "rank", "feature"],
)
async def test_what_changed_to_something_forbidden_is_served_no_longer(open_stager: OpenStager, node: Path, changed: dict[str, Any], says: str) -> None:
    """Its configuration is whole, and says that this node's engine cannot serve it."""
    files = small_files()
    put(node / "mine", files)
    stager = await open_stager()
    assert await stager.ensure("mine")
    put(node / "mine", {CONFIG: json.dumps({**json.loads(files[CONFIG]), **changed}).encode()})
    with pytest.raises(InvalidAdapter, match=says):
        await stager.refresh("mine")
    assert "mine" not in set(stager.node.holdings)
    with pytest.raises(InvalidAdapter, match=says):
        await stager.ensure("mine")


async def test_a_checkpoint_stays_when_the_run_above_it_is_evicted(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """Only the files of the run itself go."""
    for seed, name in enumerate(("team/run", "team/run/checkpoint-10")):
        put(node / name, small_files(seed=seed))
    stager = await open_stager(evict_adopted=True)
    clock.now += 1000
    await stager.evict("team/run")
    assert read_files(node / "team/run") == {}
    assert read_files(node / "team/run/checkpoint-10") == small_files(seed=1)
    assert set(stager.node.holdings) == {"team/run/checkpoint-10"}
