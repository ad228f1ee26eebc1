"""What somebody removed from the disk is noticed where it fails, told, and fetched again."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.client import Loading
from extproc.core.artifact import ArtifactId, adapter_name
from extproc.errors import DiskFailed, InvalidAdapter
from extproc.stager import stager as stager_module
from extproc.stager.disk.store import Store
from extproc.stager.stager import Stager
from extproc.stager.work import repair as repair_module
from tests.fakes.adapters import WEIGHTS, Files, overwrite, read_files, sha256, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin, origin_of
from tests.fakes.wait import Clock, until

from ..conftest import OpenStager, ServeNode

NAME, OTHER = "acme/sql", "acme/other"


@pytest.fixture
def origin() -> FakeOrigin:
    return origin_of(NAME, OTHER)


@pytest.fixture
async def engine(node: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningEngine]:
    monkeypatch.setattr(repair_module, "IN_TRANSIT_S", 0.0)
    async with running_engine(node, max_loras=2, max_cpu_loras=2) as engine:
        yield engine


def visible(node: Path) -> dict[str, Files]:
    return {str(path.relative_to(node)): read_files(path) for path in node.rglob("*") if path.is_symlink()}


def balanced(stager: Stager, node: Path) -> bool:
    index = stager.node.holdings.index
    stored = {path.name for path in (node / ".store").iterdir()}
    return {entry.id for entry in index.entries()} == stored and index.used_bytes == sum(entry.size for entry in index.entries())


async def test_a_load_that_finds_no_files_fetches_them(open_stager: OpenStager, origin: FakeOrigin, node: Path, engine: RunningEngine) -> None:
    """Order of events: rm -rf of one artifact; the engine is restarted and has to read it again; the request that notices it is served all the same."""
    stager = await open_stager(origin, engine_url=engine.url)
    held = await stager.ensure(NAME, loading=Loading.VERSIONED)
    shutil.rmtree(stager.node.store.path(ArtifactId(held.digest)))
    engine.adapters.registry.clear()
    await stager._keeper.compare()
    again = await stager.ensure(NAME, loading=Loading.VERSIONED)
    assert again.staged
    assert (again.digest, again.model) == (held.digest, held.model)
    assert origin.fetched[NAME, WEIGHTS] == 2
    assert visible(node) == {NAME: small_files()}
    assert await engine.ask(again.model)
    assert balanced(stager, node)


async def test_what_the_engine_refuses_is_read_back_once(open_stager: OpenStager, origin: FakeOrigin, node: Path, engine: RunningEngine) -> None:
    """Weights that were spoiled in place are as long as before: what was published is fetched again, and not refused for what it was meanwhile."""
    stager = await open_stager(origin, engine_url=engine.url)
    held = await stager.ensure(NAME)
    weights = stager.node.store.path(ArtifactId(held.digest)) / WEIGHTS
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert (await stager.ensure(NAME, loading=Loading.VERSIONED)).digest == held.digest
    assert origin.fetched[NAME, WEIGHTS] == 2
    assert visible(node) == {NAME: small_files()}


async def test_a_warm_request_makes_a_look_due(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """It is answered at once; the look is made behind it, once in LOOK_S, and what is lost is told as evicted."""
    stager = await open_stager(origin)
    held = await stager.ensure(NAME)
    await stager.ensure(NAME)
    await until(lambda: not stager._repair._waiting)
    shutil.rmtree(stager.node.store.path(ArtifactId(held.digest)))
    await stager.ensure(NAME)
    assert not stager._repair._waiting
    clock.now += repair_module.LOOK_S
    with stager.node.changes.since(stager.node.changes.last) as (told, _):
        assert not (await stager.ensure(NAME)).staged
        await until(lambda: NAME not in set(stager.node.holdings))
        assert "evicted" in {change.kind for change in (told.get_nowait() for _ in range(told.qsize())) if change is not None}
    assert (await stager.ensure(NAME)).staged
    assert balanced(stager, node)


async def test_what_is_lost_leaves_nothing_behind(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """What is left of its files and the link that leads there go, though nobody asks for it again."""
    stager = await open_stager(origin)
    await stager.ensure(OTHER)
    held = await stager.ensure(NAME)
    (stager.node.store.path(ArtifactId(held.digest)) / WEIGHTS).unlink()
    await until(lambda: not stager._repair._waiting)
    stager._repair.look_soon(ArtifactId(held.digest), is_due=True)
    await until(lambda: not (node / NAME).is_symlink() and balanced(stager, node))
    assert set(visible(node)) == {OTHER}
    assert set(stager.node.holdings) == {OTHER}


async def test_the_engine_forgets_what_is_lost(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """It would die of a registered adapter whose files are gone, when it reads that again."""
    stager = await open_stager(origin, engine_url=engine.url)
    lost = await stager.ensure(NAME, loading=Loading.VERSIONED)
    kept = await stager.ensure(OTHER, loading=Loading.VERSIONED)
    shutil.rmtree(stager.node.store.path(ArtifactId(lost.digest)))
    stager._repair.look_soon(ArtifactId(lost.digest), is_due=True)
    await until(lambda: set(engine.adapters.registry) == {kept.model})
    assert engine.deaths == 0


# -- what others write into published files

CHANGED = small_files(seed=5)[WEIGHTS]  # an engine would load them, and answer otherwise


async def test_what_others_changed_is_fetched_again(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """A request makes the look due that notices it, though its length and its time of modification are as they were."""
    stager = await open_stager(origin)
    held = await stager.ensure(NAME)
    await until(lambda: not stager._repair._waiting)
    overwrite(stager.node.store.path(ArtifactId(held.digest)) / WEIGHTS, CHANGED)
    clock.now += repair_module.LOOK_S
    with stager.node.changes.since(stager.node.changes.last) as (told, _):
        await stager.ensure(NAME)
        await until(lambda: NAME not in set(stager.node.holdings))
        assert "evicted" in {change.kind for change in (told.get_nowait() for _ in range(told.qsize())) if change is not None}
    assert (await stager.ensure(NAME)).digest == held.digest
    assert visible(node) == {NAME: small_files()}
    assert balanced(stager, node)


async def test_no_engine_loads_what_others_changed(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """It is noticed before the load, and the request that notices it is served by what is fetched then."""
    stager = await open_stager(origin, engine_url=engine.url)
    held = await stager.ensure(NAME)
    await until(lambda: not stager._repair._waiting)
    overwrite(stager.node.store.path(ArtifactId(held.digest)) / WEIGHTS, CHANGED)
    loaded = await stager.ensure(NAME, loading=Loading.VERSIONED)
    assert loaded.staged
    assert await engine.ask(loaded.model) == sha256(small_files()[WEIGHTS])
    assert engine.calls.count("/v1/load_lora_adapter") == 1
    assert not stager.node.loads.refuses(adapter_name(NAME), ArtifactId(held.digest))


async def test_all_who_wait_for_a_load_are_served(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """Each finds that the files are not what they were; one removal and one fetch are for all of them."""
    stager = await open_stager(origin, engine_url=engine.url)
    held = await stager.ensure(NAME)
    await until(lambda: not stager._repair._waiting)
    overwrite(stager.node.store.path(ArtifactId(held.digest)) / WEIGHTS, CHANGED)
    loaded = await asyncio.gather(*(stager.ensure(NAME, loading=Loading.VERSIONED) for _ in range(5)))
    assert len({one.model for one in loaded}) == 1
    assert origin.fetched[NAME, WEIGHTS] == 2


async def test_what_others_changed_under_a_request_stays_until_it_has_ended(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """The engine answers with what it has read; without the files it would die of the next read."""
    stager = await open_stager(origin, engine_url=engine.url)
    held = await stager.ensure(NAME, loading=Loading.VERSIONED)
    id_ = ArtifactId(held.digest)
    await until(lambda: not stager._repair._waiting)
    async with engine.adapters.use(held.model):
        overwrite(stager.node.store.path(id_) / WEIGHTS, CHANGED)
        stager._repair.look_soon(id_, is_due=True)
        await until(lambda: not stager._repair._waiting)
        assert stager.node.store.path(id_).exists()
        assert (await stager.ensure(NAME, loading=Loading.VERSIONED)).model == held.model
    await until(lambda: not stager._repair._waiting)
    stager._repair.look_soon(id_, is_due=True)
    await until(lambda: not stager._repair._waiting)
    assert NAME not in set(stager.node.holdings)
    assert engine.deaths == 0


@pytest.mark.parametrize("is_changed", [True, False])
async def test_a_start_reads_what_was_touched(open_stager: OpenStager, origin: FakeOrigin, node: Path, is_changed: bool) -> None:
    """Before the node is ready: what is something else is fetched when it is asked for, what is the same is not read at the next start."""
    stager = await open_stager(origin)
    digests = {name: (await stager.ensure(name)).digest for name in (NAME, OTHER)}
    await stager.close()
    overwrite(node / NAME / WEIGHTS, CHANGED if is_changed else small_files()[WEIGHTS])
    stager = await open_stager(origin)
    assert set(stager.node.holdings) == ({OTHER} if is_changed else {NAME, OTHER})
    assert (await stager.ensure(NAME)).staged == is_changed
    assert visible(node)[NAME] == small_files()
    assert balanced(stager, node)
    await stager.close()
    assert Store(node).open().touched == []
    assert digests[OTHER]


async def test_a_start_does_not_wait_for_all_that_was_touched(open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terabytes that were copied back are read while the node serves."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.close()
    overwrite(node / NAME / WEIGHTS, CHANGED)
    go_on = threading.Event()
    differs = Store.differs

    def slow(store: Store, id_: ArtifactId) -> str:
        go_on.wait()
        return differs(store, id_)

    monkeypatch.setattr(Store, "differs", slow)
    monkeypatch.setattr(repair_module, "FIRST_LOOK_S", 0.0)
    stager = await open_stager(origin)
    assert stager.not_ready is None
    go_on.set()
    await until(lambda: NAME not in set(stager.node.holdings))


async def test_what_is_held_is_not_forgotten_under_its_holder(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A flight is at it: the next look comes when it has landed."""
    stager = await open_stager(origin)
    held = await stager.ensure(NAME)
    assert stager.node.holdings.index.hold(ArtifactId(held.digest))
    assert not stager._repair.forget(ArtifactId(held.digest), "it is gone")
    stager.node.holdings.index.let_go(ArtifactId(held.digest))
    assert stager._repair.forget(ArtifactId(held.digest), "it is gone")


async def test_a_peer_that_cannot_read_makes_a_look_due(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """The peer takes another; this node forgets what it cannot send."""
    node = await serve_node()
    client = node.ask()
    digest = (await client.ensure(NAME)).digest
    shutil.rmtree(node.stager.node.store.path(ArtifactId(digest)))
    with pytest.raises(DiskFailed):
        async for _ in client.read(digest, WEIGHTS):
            pass
    await until(lambda: NAME not in set(node.stager.node.holdings))
    assert (await client.ensure(NAME)).staged


async def test_what_comes_back_is_not_listed_as_refused(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine) -> None:
    """What the engine said of files that are gone says nothing of those that come."""
    stager = await open_stager(origin, engine_url=engine.url)
    held = await stager.ensure(NAME)
    name, id_ = adapter_name(NAME), ArtifactId(held.digest)
    engine.adapters._max_lora_rank = 1
    with pytest.raises(InvalidAdapter):
        await stager.ensure(NAME, loading=Loading.VERSIONED)
    assert stager.node.loads.refuses(name, id_)
    shutil.rmtree(stager.node.store.path(id_))
    stager._repair.look_soon(id_, is_due=True)
    await until(lambda: NAME not in set(stager.node.holdings))
    assert not stager.node.loads.refuses(name, id_)


# -- the whole directory


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


async def test_a_directory_that_was_emptied_is_taken_again(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rm -rf of all that is in it: routers hear of each adapter, the engine forgets them, and no restart is needed."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.01)
    stager = await open_stager(origin, engine_url=engine.url)
    held = {name: await stager.ensure(name, loading=Loading.VERSIONED) for name in (NAME, OTHER)}
    with stager.node.changes.since(stager.node.changes.last) as (told, _):
        empty(node)
        await until(lambda: not set(stager.node.holdings) and stager.not_ready is None and (node / ".store").exists())
        changes = [change for change in (told.get_nowait() for _ in range(told.qsize())) if change is not None]
    assert {change.adapter for change in changes if change.kind == "evicted"} == {NAME, OTHER}
    assert "node" in {change.kind for change in changes}
    await until(lambda: not engine.adapters.registry)
    for name, before in held.items():
        again = await stager.ensure(name, loading=Loading.VERSIONED)
        assert (again.staged, again.model) == (True, before.model)
    assert balanced(stager, node)
    assert engine.deaths == 0


async def test_a_directory_that_comes_back_is_taken_over_as_it_is(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount is gone and back, with all but one adapter and one link on it: nothing is fetched that is there."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.01)
    stager = await open_stager(origin)
    kept, gone = await stager.ensure(NAME), await stager.ensure(OTHER)
    away = node.with_name("away")
    node.rename(away)
    await until(lambda: not set(stager.node.holdings) and stager.not_ready is None and (node / ".store").exists())
    shutil.rmtree(away / ".store" / gone.digest)
    shutil.rmtree(node)
    away.rename(node)
    await until(lambda: set(stager.node.holdings) == {NAME} and stager.not_ready is None)
    assert not (await stager.ensure(NAME)).staged
    assert (await stager.ensure(OTHER)).staged
    assert origin.fetched[NAME, WEIGHTS] == 1
    assert set(visible(node)) == {NAME, OTHER}
    assert stager.node.store.shows(adapter_name(NAME), ArtifactId(kept.digest))
    assert balanced(stager, node)


async def test_a_directory_that_another_stager_has_taken_is_left_to_it(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node says so, and is ready when the other is gone."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.01)
    stager = await open_stager(origin)
    away = node.with_name("away")
    node.rename(away)
    other = Store(node)
    other.open()
    await until(lambda: "another stager" in (stager.not_ready or ""))
    other.close()
    await until(lambda: stager.not_ready is None)
    assert (await stager.ensure(NAME)).staged
