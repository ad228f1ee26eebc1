"""Thousands of adapters: what a start makes of them, and that nothing looks at all of them to serve one. `python -m tests.bench.index` measures it."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from extproc.core.artifact import adapter_name
from extproc.stager import stager as stager_module
from extproc.stager.disk.layout import MANIFEST_FILE
from extproc.stager.disk.store import Store
from tests.bench.index import PER_FOLDER, fill, folder, name
from tests.fakes.adapters import CONFIG, WEIGHTS, read_files, size_of, small_files
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from .conftest import OpenStager

COUNT = 2000
SIZE = size_of(small_files())


@pytest.fixture
def full(node: Path) -> Path:
    """A node with thousands of adapters."""
    fill(node, COUNT)
    return node


def content(node: Path, number: int) -> Path:
    return (node / name(number)).resolve()


async def test_a_start_takes_all_of_them_over(full: Path, open_stager: OpenStager) -> None:
    """Names, sizes and revisions; nothing is leased, and nothing is kept in memory of leases."""
    stager = await open_stager(max_bytes=2**40)
    index = stager.node.holdings.index
    assert set(stager.node.holdings) == {name(number) for number in range(COUNT)}
    assert len(index) == COUNT
    assert index.used_bytes == COUNT * SIZE
    assert all(entry.leases is None for entry in index.entries())
    one = stager.node.holdings.get(adapter_name(name(COUNT // 2)))
    assert one is not None
    assert one.id == content(full, COUNT // 2).name
    assert one.origin == "s3"
    assert one.revision
    held = await stager.ensure(name(7))
    assert not held.staged


async def test_names_and_digests_are_kept_once(full: Path, open_stager: OpenStager) -> None:
    """A hundred thousand are to fit into 150 MB with the process: each text is one object, wherever it is used."""
    stager = await open_stager(max_bytes=2**40)
    for called in stager.node.holdings:
        named = stager.node.holdings.get(called)
        assert named is not None
        entry = stager.node.holdings.index.get(named.id)
        assert entry is not None
        assert entry.id is named.id
        assert stager.node.holdings.names_of(named.id)[0] is called


async def test_what_was_published_first_goes_first(full: Path, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Nothing is known of their use before the start; the order in which a directory lists them says nothing."""
    for age, number in enumerate((11, 1500, 3)):
        os.utime(content(full, number) / MANIFEST_FILE, (1000 + age, 1000 + age))
    origin.add("new", small_files())
    stager = await open_stager(origin, max_bytes=(COUNT - 2) * SIZE, high_watermark=1.0)
    assert [entry.id for entry in stager.node.holdings.index.entries()[:3]] == [content(full, number).name for number in (11, 1500, 3)]
    await stager.ensure("new")
    gone = {name(number) for number in range(COUNT)} - set(stager.node.holdings)
    assert gone == {name(11), name(1500), name(3)}


def test_a_start_finds_the_damaged_among_them(full: Path) -> None:
    """A file cut short, a manifest gone, a link to nowhere, content without a name: each is reported, all others stay."""
    os.truncate(content(full, 1) / CONFIG, 3)
    (content(full, 2) / MANIFEST_FILE).unlink()
    shutil.rmtree(content(full, 3))
    nameless = content(full, 4)
    (full / name(4)).unlink()
    (full / name(5)).unlink()
    (full / name(5)).symlink_to(f"../.store/{content(full, 6).name}")  # its own content has no name now, and the name is taken
    replaced = next(path.parent.name for path in (full / ".store").glob(f"*/{MANIFEST_FILE}") if f'"{name(5)}"' in path.read_text())
    store = Store(full)
    scan = store.open()
    store.close()
    assert set(scan.removed) == {name(1), name(2), name(3), f".store/{replaced}"} | {path for path in scan.removed if path.startswith(".store/")}
    assert len([path for path in scan.removed if path.startswith(".store/")]) == 3
    names = dict(scan.named())
    assert set(names) == {name(number) for number in range(COUNT)} - {name(1), name(2), name(3)}
    assert names[adapter_name(name(4))] == nameless.name  # a crash between the two renames: it gets its name
    assert names[adapter_name(name(5))] == names[adapter_name(name(6))]
    assert (full / name(4)).resolve() == nameless


async def test_theirs_are_found_among_ours(full: Path, open_stager: OpenStager, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start and later, without a look at what lies behind our links."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)

    def put(where: str) -> None:
        (full / where).mkdir()
        for path, data in small_files().items():
            (full / where / path).write_bytes(data)

    put(f"{folder(0)}/theirs")
    stager = await open_stager(max_bytes=2**40, scan_s=1e-9)
    assert f"{folder(0)}/theirs" in set(stager.node.holdings)
    read = os.readlink
    followed: list[str] = []

    def readlink(path: str) -> str:
        followed.append(path)
        return read(path)

    monkeypatch.setattr(os, "readlink", readlink)
    put(f"{folder(PER_FOLDER)}/later")
    clock.now += 1
    await until(lambda: f"{folder(PER_FOLDER)}/later" in set(stager.node.holdings))
    assert followed == []


async def test_the_watermark_lets_hundreds_go_at_once(
    full: Path, open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From above the high mark to the low one, and what is leased or pinned stays, however old."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    stager = await open_stager(origin, max_bytes=COUNT * SIZE * 2, high_watermark=0.505, low_watermark=0.4, revalidate_s=0.0)
    oldest = [stager.node.holdings.names_of(entry.id)[0] for entry in stager.node.holdings.index.entries()[:20]]
    for called in oldest[:10]:
        await stager.ensure(called)
    await stager.pin(oldest[10])
    for seed in range(COUNT // 100 + 1):  # the last is one too many
        assert stager.node.holdings.index.used_bytes >= COUNT * SIZE
        origin.add(f"new/{seed}", small_files(seed=seed))
        await stager.ensure(f"new/{seed}")
    low = int(0.4 * COUNT * SIZE * 2)
    await until(lambda: stager.node.holdings.index.used_bytes <= low)
    assert stager.node.holdings.index.used_bytes > low - SIZE
    assert set(oldest[:11]) <= set(stager.node.holdings)
    assert not set(oldest[11:]) & set(stager.node.holdings)
    assert {path.name for path in (full / ".store").iterdir()} == {entry.id for entry in stager.node.holdings.index.entries()}


async def test_many_names_of_one_content(node: Path, open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Stored once, counted once, and all of them are there again after a restart."""
    names = [f"tenant-{number}/same" for number in range(200)]
    for called in names:
        origin.add(called, small_files())
    stager = await open_stager(origin)
    await asyncio.gather(*(stager.ensure(called) for called in names))
    assert stager.node.holdings.index.used_bytes == SIZE
    await stager.close()
    again = await open_stager(origin)
    assert set(again.node.holdings) == set(names)
    assert again.node.holdings.index.used_bytes == SIZE
    assert read_files(node / names[-1])[WEIGHTS] == small_files()[WEIGHTS]
