"""New versions beside the old: when they are looked for, how one takes the other's place, and what stays when that fails. Pins, leases, reading back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web

from extproc.core.artifact import ArtifactId, adapter_name
from extproc.errors import (
    AdapterInUse,
    DiskFailed,
    EngineUnreachable,
    InvalidAdapter,
    LoraExtprocError,
    ModelNotFound,
    NoSpace,
    OriginFailed,
    OriginRefused,
)
from extproc.pb import stager_pb2 as pb
from extproc.stager import stager as stager_module
from extproc.stager.api.replies import list_reply
from extproc.stager.books.changes import Change
from extproc.stager.stager import Stager
from extproc.stager.work import room as room_module
from tests.fakes.adapters import CONFIG, WEIGHTS, Files, read_files, sha256, size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.gate import Gate
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

from ..conftest import OpenStager

NAME = adapter_name("acme/a")
OLD, NEW = small_files(seed=1), small_files(seed=2)
SIZE = size_of(OLD)
EVERY_S = 300.0  # revalidate_s by default


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    origin.add(NAME, dict(OLD))
    return origin


def renew(origin: FakeOrigin, files: Files = NEW, revision: str = "2", name: str = NAME) -> None:
    """The adapter has a new version."""
    origin.add(name, dict(files))
    origin.revisions[name] = revision


def told(queue: "asyncio.Queue[Change | None]") -> list[tuple[str, str]]:
    changes = [queue.get_nowait() for _ in range(queue.qsize())]
    return [(change.kind, change.adapter) for change in changes if change is not None and change.adapter]


def stored(node: Path) -> list[str]:
    return sorted(path.name for path in (node / ".store").iterdir())


def shown(node: Path, name: str = NAME) -> Files:
    return read_files(node / name)


async def listed(stager: Stager) -> list[pb.Adapter]:
    """As the list of adapters shows them."""
    return list(pb.ListReply.FromString(await list_reply(stager)).adapters)


async def error_of(stager: Stager, name: str = NAME) -> str:
    return next(adapter.refresh_error for adapter in await listed(stager) if adapter.name == name)


def balanced(stager: Stager) -> bool:
    index = stager.node.holdings.index
    ids = {named.id for name in stager.node.holdings if (named := stager.node.holdings.get(name)) is not None}
    on_disk = {path.name for path in stager.node.store.path(ArtifactId("x")).parent.iterdir()}
    return ids == on_disk == {entry.id for entry in index.entries()} and not index.reserved_bytes and not any(entry.flights for entry in index.entries())


async def settled(stager: Stager) -> None:
    """What a hit has started in the background is over."""
    await turns()
    await until(lambda: len(stager._freshness._refreshes) == 0)


async def hit(stager: Stager, name: str = NAME) -> None:
    """A request that finds it here, and what follows from it."""
    assert not (await stager.ensure(name)).staged
    await settled(stager)


# -- when


async def test_an_adapter_in_use_is_compared_once_a_period(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """By the first request after it; nothing new costs one question and no bytes."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    fetched = dict(origin.fetched)
    for asked, after in ((1, 0), (1, EVERY_S - 1), (2, 1), (2, 0), (2, EVERY_S - 1), (3, 1)):
        clock.now += after
        await hit(stager)
        assert origin.resolved[NAME] == asked
    assert origin.fetched == fetched
    assert (await error_of(stager)) == ""


async def test_what_nobody_asks_for_is_not_compared(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand idle adapters are no load on their origin."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    clock.now += 10 * EVERY_S
    await turns(500)
    assert origin.resolved[NAME] == 1


async def test_the_request_does_not_wait_for_it(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """It is served what is here while the new version comes; so is the next one, which starts no second comparison."""
    stager = await open_stager(origin)
    old = await stager.ensure(NAME)
    renew(origin)
    stall = origin.stall(NAME, WEIGHTS)
    clock.now += EVERY_S
    assert (await stager.ensure(NAME)).digest == old.digest
    await stall.reached.wait()
    clock.now += EVERY_S
    assert (await stager.ensure(NAME)).digest == old.digest
    assert shown(node) == OLD
    assert origin.resolved[NAME] == 2
    stall.release()
    await settled(stager)
    assert shown(node) == NEW
    assert (await stager.ensure(NAME)).digest != old.digest


async def test_after_a_restart_the_first_request_compares(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Nobody knows how long the stager was away."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.close()
    renew(origin)
    again = await open_stager(origin)
    await hit(again)
    assert shown(node) == NEW


async def test_after_a_restart_the_same_revision_is_not_fetched(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """It is in the manifest."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.close()
    fetched = dict(origin.fetched)
    again = await open_stager(origin)
    await hit(again)
    assert origin.resolved[NAME] == 2
    assert origin.fetched == fetched


async def test_a_final_revision_is_never_compared(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """A commit names its content for ever. Not after a restart either; by hand it may be."""
    origin.final.add(NAME)
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    clock.now += 10 * EVERY_S
    await hit(stager)
    await stager.close()
    again = await open_stager(origin)
    await hit(again)
    assert origin.resolved[NAME] == 1
    assert not await again.refresh(NAME)
    assert origin.resolved[NAME] == 2


async def test_it_may_be_switched_off(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """revalidate_s of 0: by hand only."""
    stager = await open_stager(origin, revalidate_s=0.0)
    await stager.ensure(NAME)
    clock.now += 10 * EVERY_S
    await hit(stager)
    assert origin.resolved[NAME] == 1


async def test_a_node_that_goes_away_compares_nothing_more(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """It would only be cut short."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    clock.now += EVERY_S
    stager.drain.stop()
    await hit(stager)
    assert origin.resolved[NAME] == 1


async def test_requests_go_before_it(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """The origin's places are few, and who waits is waiting."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    renew(origin)
    stall = origin.stall(NAME, WEIGHTS)
    clock.now += EVERY_S
    await stager.ensure(NAME)
    await stall.reached.wait()
    job = stager.job(NAME)
    assert job is not None
    assert job.priority == job.REFRESH
    stall.release()
    await settled(stager)


# -- the exchange


async def test_a_new_version_takes_the_old_ones_place(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """A new digest beside the old one, one rename, then the old one goes. Watchers are told."""
    stager = await open_stager(origin)
    old = await stager.ensure(NAME)
    renew(origin)
    clock.now += EVERY_S
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        await hit(stager)
        assert told(queue) == [("refreshed", NAME)]
    named = stager.node.holdings.get(NAME)
    assert named is not None
    assert named.digest != old.digest
    assert (named.revision, named.origin, named.checked) == ("2", "fake", clock.now)
    assert stored(node) == [named.digest]
    assert shown(node) == NEW
    assert stager.node.holdings.index.used_bytes == SIZE
    assert balanced(stager)


async def test_a_reader_sees_one_version_or_the_other(open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment of the exchange the name leads to a whole artifact."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    renew(origin)
    for step in ("publish", "link", "remove"):
        gate = Gate(monkeypatch, stager.node.store, step)
        refreshing = asyncio.create_task(stager.refresh(NAME))
        await gate.reached()
        assert shown(node) == (NEW if step == "remove" else OLD)
        gate.open()
        assert await refreshing
        assert shown(node) == NEW
        renew(origin, OLD, revision=f"{step} back")
        assert await stager.refresh(NAME)
        renew(origin, NEW, revision=f"{step} again")


async def test_what_routers_hold_they_hold_of_the_new_version(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """A lease promises that the name stays for so long, whatever version it leads to."""
    stager = await open_stager(origin, max_bytes=2 * SIZE)
    origin.add("acme/b", small_files(seed=3))
    origin.add("acme/c", small_files(seed=4))
    await stager.ensure(NAME, holder="router 1")
    clock.now += 100
    await stager.ensure(NAME, holder="router 2")
    renew(origin)
    assert await stager.refresh(NAME)
    named = stager.node.holdings.get(NAME)
    assert named is not None
    assert stager.leased_s(named.id) == 300.0
    await stager.ensure("acme/b")
    with pytest.raises(NoSpace):
        await stager.ensure("acme/c")
    assert stager.release("router 2", NAME) == 1
    assert stager.leased_s(named.id) == 200.0
    assert stager.release("router 1") == 1
    assert stager.leased_s(named.id) == 0.0


async def test_another_name_of_the_old_version_keeps_it(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """One content, two names, of which one moves on."""
    origin.add("acme/b", dict(OLD))
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.ensure("acme/b")
    renew(origin)
    assert await stager.refresh(NAME)
    assert (shown(node), shown(node, "acme/b")) == (NEW, OLD)
    assert len(stored(node)) == 2
    renew(origin, name="acme/b")
    assert await stager.refresh("acme/b")
    assert (shown(node), shown(node, "acme/b")) == (NEW, NEW)
    assert len(stored(node)) == 1
    assert balanced(stager)


async def test_equal_content_under_a_new_revision_changes_nothing(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Uploaded anew: fetched, found equal, and known from then on."""
    stager = await open_stager(origin)
    held = await stager.ensure(NAME)
    renew(origin, OLD)
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        assert not await stager.refresh(NAME)
        assert told(queue) == []
    fetched = dict(origin.fetched)
    assert not await stager.refresh(NAME)
    assert origin.fetched == fetched
    assert stored(node) == [held.digest]
    assert balanced(stager)


async def test_it_survives_a_restart(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """The new version is the one that is found."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    renew(origin)
    assert await stager.refresh(NAME)
    await stager.close()
    again = await open_stager(origin)
    await again.ensure(NAME)
    assert shown(node) == NEW
    assert balanced(again)


async def test_what_is_not_here_is_not_refreshed(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Refreshing stages nothing."""
    stager = await open_stager(origin)
    with pytest.raises(ModelNotFound, match="not on this node"):
        await stager.refresh(NAME)
    assert not origin.resolved


async def test_what_is_being_compared_says_so_to_who_would_evict_it(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """And goes when the comparison is over."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    clock.now += 1000
    renew(origin)
    stall = origin.stall(NAME, WEIGHTS)
    refreshing = asyncio.create_task(stager.refresh(NAME))
    await stall.reached.wait()
    with pytest.raises(AdapterInUse, match="compared with its origin"):
        await stager.evict(NAME)
    stall.release()
    assert await refreshing
    assert await stager.evict(NAME)


async def test_what_is_evicted_meanwhile_does_not_come_back(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """Order of events: the new version is on its way; an operator purges the name; it arrives. Nobody asked for it any more."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    renew(origin)
    stall = origin.stall(NAME, WEIGHTS)
    refreshing = asyncio.create_task(stager.refresh(NAME))
    await stall.reached.wait()
    clock.now += 1000
    with pytest.raises(AdapterInUse):
        await stager.evict(NAME)  # its refresh holds it
    assert await stager.purge(NAME) == SIZE
    stall.release()
    assert not await refreshing
    assert stored(node) == []
    assert not (node / NAME).exists()
    assert balanced(stager)


# -- failures


def _down(origin: FakeOrigin) -> None:
    origin.down = OriginFailed("it is down")


def _refuses(origin: FakeOrigin) -> None:
    origin.down = OriginRefused("not with these credentials")


def _deleted(origin: FakeOrigin) -> None:
    del origin.files[NAME]


def _invalid(origin: FakeOrigin) -> None:
    renew(origin, {**NEW, WEIGHTS: NEW[WEIGHTS][:-1]})


def _other_base(origin: FakeOrigin) -> None:
    renew(origin, small_files(seed=2, base_model="other/base"))


def _pickled(origin: FakeOrigin) -> None:
    renew(origin, {CONFIG: NEW[CONFIG], "adapter_model.bin": b"\x80\x04."})


def _breaks(origin: FakeOrigin) -> None:
    renew(origin)
    origin.fetch_failures = [OriginFailed("broke off")] * 100


FAILURES = [
    (_down, OriginFailed, "origin_failed"),
    (_refuses, OriginRefused, "origin_failed"),
    (_deleted, ModelNotFound, "model_not_found"),
    (_invalid, InvalidAdapter, "invalid_adapter"),
    (_other_base, InvalidAdapter, "invalid_adapter"),
    (_pickled, InvalidAdapter, "invalid_adapter"),
    (_breaks, OriginFailed, "origin_failed"),
]


@pytest.mark.parametrize(("fail", "raises", "reason"), FAILURES)
async def test_a_failed_comparison_keeps_the_old_version_and_says_so(
    open_stager: OpenStager,
    origin: FakeOrigin,
    node: Path,
    clock: Clock,
    fail: Callable[[FakeOrigin], None],
    raises: type[LoraExtprocError],
    reason: str,
) -> None:
    """Deleted at the origin, refused, damaged, unreachable: what is here is served, the list says why, and the next period tries again."""
    stager = await open_stager(origin)
    old = await stager.ensure(NAME)
    fail(origin)
    clock.now += EVERY_S
    await hit(stager)
    assert (await stager.ensure(NAME)).digest == old.digest
    assert shown(node) == OLD
    assert stored(node) == [old.digest]
    assert balanced(stager)
    assert (await error_of(stager)).startswith(f"{reason}: ")
    asked = origin.resolved[NAME]
    clock.now += EVERY_S - 1
    await hit(stager)
    assert origin.resolved[NAME] == asked
    with pytest.raises(raises):
        await stager.refresh(NAME)  # asked for by hand it is told at once
    origin.down = None
    origin.fetch_failures = []
    renew(origin, revision="3")
    clock.now += EVERY_S
    await hit(stager)
    assert shown(node) == NEW
    assert (await error_of(stager)) == ""
    assert stager.not_ready is None


async def test_no_space_for_a_second_version_keeps_the_old(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """Both must fit for a moment. The old one is not sacrificed for the new, though nobody leases it."""
    stager = await open_stager(origin, max_bytes=SIZE)
    await stager.ensure(NAME)
    clock.now += 1000
    renew(origin)
    with pytest.raises(NoSpace):
        await stager.refresh(NAME)
    assert shown(node) == OLD
    assert (await error_of(stager)).startswith("no_space: ")
    assert balanced(stager)
    assert stager.leased_s(ArtifactId(stored(node)[0])) == 0.0


async def test_a_link_that_fails_keeps_the_old_version(open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk failed at the last step: the new content goes, the node is not ready."""
    stager = await open_stager(origin)
    old = await stager.ensure(NAME)
    renew(origin)
    Gate(monkeypatch, stager.node.store, "link", fails=DiskFailed("once")).open()
    with pytest.raises(DiskFailed):
        await stager.refresh(NAME)
    assert shown(node) == OLD
    assert stored(node) == [old.digest]
    assert balanced(stager)


async def test_a_lasting_failure_is_logged_once(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A change, not a poll: the list says how it is."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    del origin.files[NAME]
    for _ in range(5):
        clock.now += EVERY_S
        await hit(stager)
    assert [record.levelname for record in caplog.records if "stays as it is" in record.message] == ["WARNING"]


async def test_a_pinned_digest_lets_no_other_version_in(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """By pin or by setting."""
    stager = await open_stager(origin)
    await stager.pin(NAME, sha256(OLD[WEIGHTS]))
    renew(origin)
    with pytest.raises(InvalidAdapter, match="is pinned"):
        await stager.refresh(NAME)
    assert shown(node) == OLD
    await stager.unpin(NAME)
    assert await stager.refresh(NAME)
    assert shown(node) == NEW


async def test_a_digest_that_is_asked_for_is_looked_for(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """A caller that wants the new version by its digest does not wait for the period."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    renew(origin)
    await stager.ensure(NAME, sha256=sha256(NEW[WEIGHTS]))
    assert shown(node) == NEW
    with pytest.raises(InvalidAdapter, match="is asked for"):
        await stager.ensure(NAME, sha256=sha256(b"neither"))
    assert shown(node) == NEW


# -- beside an engine


@pytest.fixture(params=[True])
async def engine(request: pytest.FixtureRequest, node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node, max_loras=1, max_cpu_loras=1, dev_mode=request.param) as engine:
        yield engine


without_dev_mode = pytest.mark.parametrize("engine", [False], indirect=True)


async def test_the_engine_forgets_the_old_version(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """What it computed is cleared before the exchange and after it, and the name is read anew: the next answer is the new version's."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(NAME)
    assert await engine.ask(NAME) == sha256(OLD[WEIGHTS])
    renew(origin)
    engine.calls.clear()
    assert await stager.refresh(NAME)
    assert [path for path in engine.calls if path not in ("/v1/models", "/is_sleeping")] == [
        "/reset_prefix_cache",
        "/v1/unload_lora_adapter",
        "/reset_prefix_cache",
    ]
    assert await engine.ask(NAME) == sha256(NEW[WEIGHTS])
    assert engine.deaths == 0


async def test_a_request_at_work_ends_with_the_version_it_began_with(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """The engine has it in memory; only later requests see the new one."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(NAME)
    await engine.ask(NAME)
    renew(origin)
    async with engine.adapters.use(NAME) as loaded:
        assert await stager.refresh(NAME)
        assert loaded.sha256 == sha256(OLD[WEIGHTS])
    assert await engine.ask(NAME) == sha256(NEW[WEIGHTS])
    assert engine.deaths == 0


@without_dev_mode
async def test_an_engine_that_cannot_clear_its_cache_keeps_the_old_version(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock
) -> None:
    """Cached blocks of the old version would be continued with the new weights. It is said once, and not downloaded again every period."""
    stager = await open_stager(origin, engine_url=engine.url)
    old = await stager.ensure(NAME)
    await engine.ask(NAME)
    renew(origin)
    clock.now += EVERY_S
    await hit(stager)
    assert shown(node) == OLD
    assert stored(node) == [old.digest]
    assert (await error_of(stager)).startswith("engine: ")
    fetched = dict(origin.fetched)
    for _ in range(3):
        clock.now += EVERY_S
        await hit(stager)
    assert origin.fetched == fetched
    assert "VLLM_SERVER_DEV_MODE" in await error_of(stager)
    with pytest.raises(EngineUnreachable, match="VLLM_SERVER_DEV_MODE"):
        await stager.refresh(NAME)
    assert shown(node) == OLD
    assert balanced(stager)


@without_dev_mode
async def test_an_engine_that_comes_back_with_the_other_setting_is_asked_again(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was away in between, which the health check sees."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(NAME)
    await engine.ask(NAME)
    renew(origin)
    with pytest.raises(EngineUnreachable):
        await stager.refresh(NAME)

    engine.is_sick = True
    await until(lambda: stager.not_ready == "the engine answers 503 to /health")
    engine.is_sick = False

    async def with_dev_mode(path: str) -> web.Response | None:
        return web.Response() if path == "/reset_prefix_cache" else None

    engine.step = with_dev_mode
    assert await stager.refresh(NAME)
    assert shown(node) == NEW


@pytest.mark.parametrize("at", [1, 2])
async def test_an_engine_that_falls_silent_during_the_exchange(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock, at: int
) -> None:
    """Before it: nothing is exchanged. After it: the new version is what the name leads to, and that the engine was not told is logged."""
    stager = await open_stager(origin, engine_url=engine.url)
    old = await stager.ensure(NAME)
    await engine.ask(NAME)
    renew(origin)
    resets = 0

    async def fall_silent(path: str) -> web.Response | None:
        nonlocal resets
        resets += path == "/reset_prefix_cache"
        return web.Response(status=500) if resets >= at else None

    engine.step = fall_silent
    if at == 1:
        with pytest.raises(EngineUnreachable):
            await stager.refresh(NAME)
        assert (shown(node), old.digest in stored(node)) == (OLD, True)
    else:
        assert await stager.refresh(NAME)
        assert shown(node) == NEW
    engine.step = None
    engine.adapters.registry.clear()
    clock.now += 1000
    await stager._remover.remove_retired()
    assert balanced(stager)


# -- pins


async def test_a_pin_holds_without_an_end_and_across_restarts(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """No room is made of it, however long nobody asks; unpinned it goes like any other."""
    origin.add("acme/b", small_files(seed=3))
    stager = await open_stager(origin, max_bytes=SIZE)
    assert await stager.pin(NAME) == stored(node)[0]
    clock.now += 1e9
    with pytest.raises(NoSpace):
        await stager.ensure("acme/b")
    with pytest.raises(AdapterInUse, match="pinned"):
        await stager.evict(NAME)
    await stager.close()
    again = await open_stager(origin, max_bytes=SIZE)
    clock.now += 1e9
    with pytest.raises(NoSpace):
        await again.ensure("acme/b")
    assert [adapter.pinned for adapter in await listed(again)] == [True]
    await again.unpin(NAME)
    assert (await again.ensure("acme/b")).staged
    await again.close()
    assert not (await open_stager(origin)).node.holdings.pins


async def test_a_pin_goes_over_to_the_new_version(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """It is of the name; the old version does not stay for it."""
    stager = await open_stager(origin)
    await stager.pin(NAME)
    renew(origin)
    assert await stager.refresh(NAME)
    clock.now += 1000
    with pytest.raises(AdapterInUse, match="pinned"):
        await stager.evict(NAME)
    assert balanced(stager)


async def test_one_pinned_name_holds_the_content_of_two(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """And lets it go when it is unpinned, not when the other is."""
    origin.add("acme/b", dict(OLD))
    for seed, name in ((3, "acme/c"), (4, "acme/d"), (5, "acme/e")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, max_bytes=2 * SIZE, high_watermark=1.0)
    await stager.pin(NAME)
    await stager.pin("acme/b")
    await stager.unpin("acme/b")
    for name in ("acme/c", "acme/d"):
        clock.now += 1000
        await stager.ensure(name)
        assert set(stager.node.holdings) == {NAME, "acme/b", name}
    await stager.unpin(NAME)
    clock.now += 1000
    await stager.ensure("acme/e")
    assert set(stager.node.holdings) == {"acme/d", "acme/e"}


async def test_a_purge_takes_what_is_leased_and_pinned(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Name, content and pin; it is no error where nothing is, and lets what was not found be looked for again."""
    stager = await open_stager(origin)
    await stager.pin(NAME)
    await stager.ensure(NAME, holder="router")
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        assert await stager.purge(NAME) == SIZE
        assert told(queue) == [("evicted", NAME)]
    assert not stager.node.holdings.pins
    assert stored(node) == []
    assert not (node / "acme").exists()
    assert await stager.purge(NAME) == 0
    with pytest.raises(ModelNotFound):
        await stager.ensure("acme/late")
    origin.add("acme/late", dict(NEW))
    with pytest.raises(ModelNotFound):
        await stager.ensure("acme/late")
    await stager.purge("acme/late")
    assert (await stager.ensure("acme/late")).staged
    await stager.close()
    assert not (await open_stager(origin)).node.holdings.pins


async def test_a_purge_takes_nothing_from_the_engine(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path) -> None:
    """Who runs with it would die of it."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.pin(NAME)
    await engine.ask(NAME)
    async with engine.adapters.use(NAME):
        with pytest.raises(AdapterInUse, match="engine"):
            await stager.purge(NAME)
    assert shown(node) == OLD
    assert set(stager.node.holdings.pins) == {NAME}
    assert await stager.purge(NAME) == SIZE


# -- reading back


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
async def test_a_flipped_bit_is_found_and_fetched_anew(open_stager: OpenStager, origin: FakeOrigin, node: Path, file: str) -> None:
    """Whoever leases or pins it: it is not what was published. The others are left as they are; the pin stays for what comes."""
    origin.add("acme/b", dict(NEW))
    stager = await open_stager(origin)
    await stager.pin(NAME)
    await stager.ensure("acme/b")
    assert [(found.name, found.why) async for found in stager.verify()] == [(NAME, ""), ("acme/b", "")]
    damaged = node / NAME / file
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    found = {found.name: found async for found in stager.verify()}
    assert (found[adapter_name("acme/b")].why, found[adapter_name("acme/b")].removed) == ("", False)
    assert file in found[NAME].why
    assert found[NAME].removed
    assert not (node / NAME).exists()
    assert balanced(stager)
    assert (await stager.ensure(NAME)).staged
    assert shown(node) == OLD
    assert set(stager.node.holdings.pins) == {NAME}
    with pytest.raises(AdapterInUse, match="pinned"):
        await stager.evict(NAME)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes() + b"\0")])
async def test_a_file_that_is_gone_or_of_another_length_is_found(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, damage: Callable[[Path], object]
) -> None:
    """Asked for one name."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    damage(node / NAME / WEIGHTS)
    assert [(found.why != "", found.removed) async for found in stager.verify(NAME)] == [(True, True)]
    assert (await stager.ensure(NAME)).staged


async def test_what_the_engine_may_read_is_reported_and_stays(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path) -> None:
    """Without the files the engine would die; with them one adapter answers nonsense, which is said."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(NAME)
    await engine.ask(NAME)
    (node / NAME / WEIGHTS).write_bytes(b"nonsense")
    async with engine.adapters.use(NAME):
        assert [(found.why != "", found.removed) async for found in stager.verify()] == [(True, False)]
    assert [(found.why != "", found.removed) async for found in stager.verify()] == [(True, True)]


# -- leases and watermarks


async def test_a_lease_is_given_back_by_who_took_it(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """One adapter or all; what another holds stays held."""
    origin.add("acme/b", dict(NEW))
    stager = await open_stager(origin)
    for name in (NAME, "acme/b"):
        for holder in ("router 1", "router 2"):
            await stager.ensure(name, holder=holder)
    assert stager.release("router 1", NAME) == 1
    assert stager.release("router 1", NAME) == 0
    with pytest.raises(AdapterInUse, match="leased"):
        await stager.evict(NAME)
    assert stager.release("router 2") == 2
    assert await stager.evict(NAME) == SIZE
    with pytest.raises(AdapterInUse):
        await stager.evict("acme/b")
    assert stager.release("router 1") == 1
    assert stager.release("nobody") == 0
    assert stager.release("router 1", "acme/none") == 0
    assert await stager.evict("acme/b") == SIZE


async def test_the_watermarks_make_room_in_advance(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the high mark, down to the low one; least recently used first; what is leased or pinned is passed over."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    names = [f"acme/{number}" for number in range(10)]
    for seed, name in enumerate(names):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, max_bytes=10 * SIZE, high_watermark=0.9, low_watermark=0.5, revalidate_s=0.0)
    for name in names[:9]:
        await stager.ensure(name, holder="router")
        clock.now += 1
    await stager.pin(names[1])
    clock.now += 1000
    await stager.ensure(names[0])
    await turns(500)
    assert len(stager.node.holdings) == 9  # at the high mark, not above
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        await stager.ensure(names[9])
        await until(lambda: len(stager.node.holdings) == 5)
        await turns(500)
        gone = [adapter for kind, adapter in told(queue) if kind == "evicted"]
    assert sorted(gone) == names[2:7]
    assert set(stager.node.holdings) == {names[n] for n in (0, 1, 7, 8, 9)}
    assert balanced(stager)


async def test_no_room_is_made_while_the_engine_cannot_be_asked(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would have to stay, and would count as used: the order in which they go would be lost, once a second."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    names = [f"acme/{number}" for number in range(10)]
    for seed, name in enumerate(names):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=10 * SIZE, high_watermark=0.9, low_watermark=0.5, revalidate_s=0.0)
    await engine.stop()
    await until(lambda: stager.not_ready == "the engine refused the connection")
    for name in names:
        await stager.ensure(name)
        clock.now += 1
    clock.now += 1000
    before = [entry.id for entry in stager.node.holdings.index.entries()]
    await turns(2000)
    assert [entry.id for entry in stager.node.holdings.index.entries()] == before
    assert len(stager.node.holdings) == 10


async def test_what_the_engine_keeps_is_not_asked_for_every_second(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that may not unload keeps what it has registered: after one try in vain the next comes a minute later."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    names = [f"acme/{number}" for number in range(4)]
    for seed, name in enumerate(names):
        origin.add(name, small_files(seed=seed))

    async def no_unloading(path: str) -> web.Response | None:
        return web.Response(status=404) if path == "/v1/unload_lora_adapter" else None

    engine.step = no_unloading
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=4 * SIZE, high_watermark=0.9, low_watermark=0.6, revalidate_s=0.0, lease_s=0.001)
    for name in names:
        await stager.ensure(name)
        await engine.ask(name)
    clock.now += 1
    await until(lambda: engine.calls.count("/v1/unload_lora_adapter") >= 2)
    await turns(2000)
    await until(lambda: stager._room._next_round)
    tried = engine.calls.count("/v1/unload_lora_adapter")
    assert tried == 2 + 1  # as many as would have to go, and the question whether it can unload at all
    clock.now += room_module.PAUSE_S
    await until(lambda: engine.calls.count("/v1/unload_lora_adapter") == tried + 2)
    assert len(stager.node.holdings) == 4
