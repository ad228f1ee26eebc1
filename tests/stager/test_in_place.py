"""Adapters that are read where their origin has them: the node links to them, counts nothing, and never deletes what is not its own."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from extproc.client import StagerClient
from extproc.config.origins import OriginSettings
from extproc.core.artifact import ArtifactId, Manifest
from extproc.errors import AdapterTooLarge, InvalidAdapter, ModelNotFound, OriginFailed
from extproc.process.grpc import grpc_server
from extproc.stager.adapter.config import read_limited
from extproc.stager.api.grpc import StagerService
from extproc.stager.disk.recover import Condition
from extproc.stager.disk.store import Store
from extproc.stager.stager import DISK_THREADS
from extproc.stager.supply.origins.file import FileOrigin
from extproc.stager.work import stage as stage_module
from extproc.stager.work.stage import MAX_CHECKS
from tests.fakes.adapters import CONFIG, WEIGHTS, Files, overwrite, read_files, size_of, small_files, write_small
from tests.fakes.archives import packed
from tests.fakes.nodes import node, nothing_half_done, nothing_there, stored, visible
from tests.fakes.wait import Clock, turns, until

NAME = "acme/sql"
FILES = small_files()
OTHER = small_files(seed=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The origin's directory, with one adapter."""
    write_small(tmp_path / "origin" / NAME)
    return tmp_path / "origin"


@pytest.fixture
def in_place(root: Path) -> OriginSettings:
    return OriginSettings(type="file", path=str(root), in_place=True)


def replace(directory: Path, files: Files) -> None:
    """As a careful writer does: beside it, then renamed. Its time is another."""
    for path, data in files.items():
        fresh = directory / f"{path}.new"
        fresh.write_bytes(data)
        os.utime(fresh, ns=(1, (directory / path).stat().st_mtime_ns + 10**9))
        fresh.rename(directory / path)


async def test_the_originals_are_linked_and_take_no_room(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """What the engine opens is the original; the node's budget is untouched, however small."""
    async with node(tmp_path / "node", in_place, max_bytes=1) as stager:
        held = await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}
        for path in FILES:
            assert (tmp_path / "node" / NAME / path).resolve() == (root / NAME / path).resolve()
        assert (held.size, stager.node.holdings.index.used_bytes) == (0, 0)
        assert nothing_half_done(stager)


async def test_linked_files_are_checked_like_fetched_ones(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """Nothing of them was read for a copy, and an engine would read NaNs all the same."""
    weights = root / NAME / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-2] + b"\xc0\x7f")  # BF16's NaN
    async with node(tmp_path / "node", in_place) as stager:
        with pytest.raises(InvalidAdapter, match="holds an infinity or a NaN"):
            await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {}


async def test_a_path_that_is_not_absolute_leads_there_as_well(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links lie deeper than the process stands."""
    monkeypatch.chdir(tmp_path)
    async with node(tmp_path / "node", OriginSettings(type="file", path="origin", in_place=True)) as stager:
        await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}


async def test_a_restart_adopts_the_links(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """Still of no size, and nothing is read again."""
    async with node(tmp_path / "node", in_place) as stager:
        digest = (await stager.ensure(NAME)).digest
    async with node(tmp_path / "node", in_place) as stager:
        held = await stager.ensure(NAME)
        assert (held.staged, held.digest, held.size) == (False, digest, 0)
        assert stager.node.holdings.index.used_bytes == 0
        assert visible(tmp_path / "node") == {NAME: FILES}


@pytest.mark.parametrize("how", ["evict", "purge", "refresh", "restart"])
async def test_the_originals_outlive_the_links(tmp_path: Path, root: Path, in_place: OriginSettings, how: str) -> None:
    """Whatever takes the links away."""
    clock = Clock()
    async with node(tmp_path / "node", in_place, clock=clock) as stager:
        await stager.ensure(NAME)
        if how in ("evict", "purge"):
            clock.now += 1000
            await getattr(stager, how)(NAME)
            assert nothing_there(stager)
        if how == "refresh":
            replace(root / NAME, OTHER)
            assert await stager.refresh(NAME) or (await stager.ensure(NAME)).staged  # a look behind the first request may have been quicker
            assert visible(tmp_path / "node") == {NAME: OTHER}
            assert len(stored(tmp_path / "node")) == 1
    if how == "restart":
        (root / NAME).rename(root / "moved")
        async with node(tmp_path / "node", in_place) as stager:
            assert nothing_there(stager)
            with pytest.raises(ModelNotFound):
                await stager.ensure(NAME)
        (root / "moved").rename(root / NAME)
    assert read_files(root / NAME) == (OTHER if how == "refresh" else FILES)


async def test_room_for_others_is_not_made_of_them(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """Going takes nothing, so that a copy that needs room gets it from copies."""
    write_small(tmp_path / "copied" / "other/one", seed=1)
    write_small(tmp_path / "copied" / "other/two", seed=2)
    copied = OriginSettings(type="file", name="copied", path=str(tmp_path / "copied"))
    clock = Clock()
    async with node(tmp_path / "node", in_place, copied, clock=clock, max_bytes=size_of(FILES), lease_s=1) as stager:
        for name in (NAME, "other/one", "other/two"):
            await stager.ensure(name)
            clock.now += 10
        assert "other/one" not in visible(tmp_path / "node")
        assert visible(tmp_path / "node")["other/two"] == small_files(seed=2)
        assert read_files(root / NAME) == FILES


async def test_an_original_that_changed_under_us_is_found_by_verify(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """Whoever changes it in place changes it under the engine; verify says so, and takes away the link and nothing more."""
    async with node(tmp_path / "node", in_place) as stager:
        await stager.ensure(NAME)
        (root / NAME / WEIGHTS).write_bytes(OTHER[WEIGHTS])
        (found,) = [found async for found in stager.verify(NAME)]
        assert "is not what was published" in found.why
        assert found.removed
        assert nothing_there(stager)
        assert read_files(root / NAME) == OTHER
        await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: OTHER}


async def test_an_original_that_changed_under_us_is_linked_anew(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """A look sees that it was written to, though its length and its time are those that were listed."""
    async with node(tmp_path / "node", in_place) as stager:
        held = await stager.ensure(NAME)
        await until(lambda: not stager._repair._waiting)
        overwrite(root / NAME / WEIGHTS, OTHER[WEIGHTS])
        stager._repair.look_soon(ArtifactId(held.digest), is_due=True)
        await until(lambda: not set(stager.node.holdings))
        assert read_files(root / NAME) == OTHER
        assert (await stager.ensure(NAME)).digest != held.digest


async def test_an_original_that_changes_while_it_is_staged_is_noticed(
    tmp_path: Path, root: Path, in_place: OriginSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was hashed, and is written to before it is published: what is remembered is how it was when it was hashed."""
    publish = Store.publish

    def late(store: Store, staged: Path, manifest: Manifest) -> ArtifactId:
        overwrite(root / NAME / WEIGHTS, OTHER[WEIGHTS])
        return publish(store, staged, manifest)

    monkeypatch.setattr(Store, "publish", late)
    async with node(tmp_path / "node", in_place) as stager:
        held = await stager.ensure(NAME)
        assert stager.node.store.condition(ArtifactId(held.digest)) is Condition.TOUCHED


async def test_what_lies_there_is_verified_before_it_is_linked(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """And stays as it is."""
    (root / NAME / WEIGHTS).write_bytes(b"x")
    async with node(tmp_path / "node", in_place) as stager:
        with pytest.raises(InvalidAdapter):
            await stager.ensure(NAME)
        assert nothing_there(stager)
    assert (root / NAME / WEIGHTS).read_bytes() == b"x"


async def test_limits_of_size_hold(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """The engine has to load it all the same."""
    async with node(tmp_path / "node", in_place, max_adapter_bytes=1000) as stager:
        with pytest.raises(AdapterTooLarge):
            await stager.ensure(NAME)
        assert nothing_there(stager)


async def test_links_of_the_origin_are_followed(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """A hub's cache is made of them."""
    (root / "blob").write_bytes(FILES[WEIGHTS])
    (root / NAME / WEIGHTS).unlink()
    (root / NAME / WEIGHTS).symlink_to("../../blob")
    async with node(tmp_path / "node", in_place) as stager:
        await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}


async def test_an_original_that_cannot_be_opened_is_the_origin_s_failure(tmp_path: Path, root: Path, in_place: OriginSettings) -> None:
    """It was listed, and leads nowhere."""
    (root / NAME / WEIGHTS).unlink()
    (root / NAME / WEIGHTS).symlink_to("/proc/self/mem")  # its first byte cannot be read
    async with node(tmp_path / "node", in_place) as stager:
        with pytest.raises((OriginFailed, InvalidAdapter)):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("where", ["original", "check"])
async def test_a_file_server_that_hangs_holds_no_other_origin_s_adapters(
    tmp_path: Path, root: Path, in_place: OriginSettings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """More adapters wait for it than there are threads for the disk, and for checks: what another origin has is staged all the same."""
    well, waiting = threading.Event(), 0
    slow_ones = [root / f"slow/{number}" for number in range(DISK_THREADS + 4)]
    for directory in slow_ones:
        write_small(directory)
    write_small(tmp_path / "copied" / "other/one", seed=1)
    copied = OriginSettings(type="file", name="copied", path=str(tmp_path / "copied"))

    def hang(inner: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal waiting
            waiting += 1
            well.wait(30)
            return inner(*arguments)

        return call

    if where == "original":
        opens = FileOrigin.open_original
        monkeypatch.setattr(FileOrigin, "open_original", lambda self, file: (hang(opens) if self.in_place else opens)(self, file))
    else:
        monkeypatch.setattr(stage_module, "read_limited", lambda file: hang(read_limited)(file) if Path(file.name).is_symlink() else read_limited(file))
    async with node(tmp_path / "node", in_place, copied) as stager:
        slow = [asyncio.create_task(stager.ensure(f"slow/{number}")) for number in range(len(slow_ones))]
        await until(lambda: waiting >= MAX_CHECKS)
        await turns(50)
        async with asyncio.timeout(10):
            assert (await stager.ensure("other/one")).origin == "copied"
        assert not any(task.done() for task in slow)
        well.set()
        assert all(held.staged for held in await asyncio.gather(*slow))


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
async def test_an_archive_is_unpacked_and_takes_its_room(tmp_path: Path, root: Path, in_place: OriginSettings, suffix: str) -> None:
    """There is nothing to link to: what comes out of it lies on this node's disk, and counts."""
    (root / f"acme/packed{suffix}").write_bytes(packed(suffix, OTHER))
    async with node(tmp_path / "node", in_place) as stager:
        held = await stager.ensure("acme/packed")
        assert visible(tmp_path / "node") == {"acme/packed": OTHER}
        assert held.size == stager.node.holdings.index.used_bytes == size_of(OTHER)
    async with node(tmp_path / "node", in_place) as stager:
        assert stager.node.holdings.index.used_bytes == size_of(OTHER)
    assert (root / f"acme/packed{suffix}").exists()


@pytest.mark.parametrize("first", ["linked", "copied"])
async def test_the_same_content_from_two_origins_is_one(tmp_path: Path, root: Path, in_place: OriginSettings, first: str) -> None:
    """What was there first stays, and counts for what it is."""
    write_small(tmp_path / "copied" / "other/one")
    copied = OriginSettings(type="file", name="copied", path=str(tmp_path / "copied"))
    names = (NAME, "other/one") if first == "linked" else ("other/one", NAME)
    async with node(tmp_path / "node", in_place, copied) as stager:
        for name in names:
            await stager.ensure(name)
        assert visible(tmp_path / "node") == dict.fromkeys(names, FILES)
        assert stager.node.holdings.index.used_bytes == (0 if first == "linked" else size_of(FILES))
        used = stager.node.holdings.index.used_bytes
    async with node(tmp_path / "node", in_place, copied) as stager:
        assert stager.node.holdings.index.used_bytes == used
        assert visible(tmp_path / "node") == dict.fromkeys(names, FILES)


async def test_another_node_can_be_sent_them(tmp_path: Path, in_place: OriginSettings) -> None:
    """The bytes are read through the links."""
    async with node(tmp_path / "node", in_place) as stager:
        await stager.ensure(NAME)
        server = grpc_server()
        StagerService(stager).register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with StagerClient(f"127.0.0.1:{port}") as client:
            held = await client.find(NAME)
            assert held is not None
            for path in (CONFIG, WEIGHTS):
                assert b"".join([chunk async for chunk in client.read(held.digest, path)]) == FILES[path]
        await server.stop(None)
