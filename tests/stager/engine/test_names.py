"""What the engine knows by name: one name per version, loaded before a request is released, unloaded and at rest before files go."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from extproc.client import Loading
from extproc.config.stager import EngineSettings
from extproc.core.artifact import ArtifactId, adapter_name, versioned_name
from extproc.errors import AdapterInUse, EngineUnreachable, GatewayProtocolError, InvalidAdapter, NoSpace
from extproc.stager import stager as stager_module
from extproc.stager.engine import names as loads_module
from extproc.stager.stager import Ensured, Stager
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import CONFIG, WEIGHTS, read_files, sha256, size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

from ..conftest import OpenStager

NAME = adapter_name("acme/a")
OLD, NEW = small_files(seed=1), small_files(seed=2)
SIZE = size_of(OLD)


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    origin.add(NAME, dict(OLD))
    return origin


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    """An engine without the resolver: it knows what it was told, and reads nothing else."""
    async with running_engine(node / "nothing-here", max_loras=1, max_cpu_loras=1) as engine:
        yield engine


async def held(stager: Stager, name: str = NAME, loading: Loading = Loading.VERSIONED) -> Ensured:
    return await stager.ensure(name, holder="router", loading=loading)


def renew(origin: FakeOrigin) -> None:
    origin.add(NAME, dict(NEW))
    origin.revisions[NAME] = "2"


async def test_a_version_is_loaded_from_its_own_directory_before_the_answer(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path
) -> None:
    """Under a name that says which, once for all who wait, and the answer says what to ask for."""
    stager = await open_stager(origin, engine_url=engine.url)
    answers = await asyncio.gather(*(held(stager) for _ in range(5)))
    [ensured] = {(answer.digest, answer.model) for answer in answers}
    assert ensured[1] == versioned_name(NAME, ensured[0]) == f"{NAME}@sha256:{ensured[0][:12]}"
    assert engine.adapters.registry == {ensured[1]: str(node / ".store" / ensured[0])}
    assert engine.calls.count("/v1/load_lora_adapter") == 1
    assert await engine.ask(ensured[1]) == sha256(OLD[WEIGHTS])
    assert not (await held(stager)).staged
    assert engine.calls.count("/v1/load_lora_adapter") == 1


async def test_nothing_is_loaded_for_who_only_wants_it_on_disk(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """A prefetch must not take a slot from what is in use."""
    stager = await open_stager(origin, engine_url=engine.url)
    assert (await stager.ensure(NAME)).model == ""
    assert engine.adapters.registry == {}


async def test_what_the_engine_refuses_is_a_422_with_its_reason(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, node: Path
) -> None:
    """Remembered for a while, so that repeated requests do not stall it; no lease stays; no path is told."""
    origin.add(NAME, small_files(rank=8))
    stager = await open_stager(origin, engine_url=engine.url)
    engine.adapters._max_lora_rank = 4
    for _ in range(3):
        with pytest.raises(InvalidAdapter, match="LoRA rank 8 is greater than max_lora_rank 4") as refused:
            await held(stager)
        assert str(node) not in refused.value.message
    assert engine.calls.count("/v1/load_lora_adapter") == 1
    assert await stager.evict(NAME)
    engine.adapters._max_lora_rank = 8
    clock.now += 11.0
    assert (await held(stager)).model in engine.adapters.registry


@pytest.mark.parametrize(("status", "body"), [(500, {"error": {"message": "EngineCore encountered an issue"}}), (503, {}), (401, {"error": "Unauthorized"})])
async def test_an_engine_that_cannot_load_now_is_no_fault_of_the_adapter(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, status: int, body: dict[str, object]
) -> None:
    """A dying one answers 500, too. Another node is asked."""
    stager = await open_stager(origin, engine_url=engine.url)

    async def fail(path: str) -> web.Response | None:
        engine.is_sick = status == 500
        return web.json_response(body, status=status) if path == "/v1/load_lora_adapter" else None

    engine.step = fail
    with pytest.raises(EngineUnreachable) as failed:
        await held(stager)
    assert not failed.value.shared
    assert stager.leased_s(ArtifactId((await stager.ensure(NAME)).digest)) > 0


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize(
    "said",
    [
        "Call to add_lora method failed: CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 79.15 GiB",
        "Call to add_lora method failed: [Errno 13] Permission denied: '<path>/adapter_model.safetensors'",
        "Call to add_lora method failed: Too many open files (os error 24)",
        "Worker failed with error 'NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited'",
    ],
)
async def test_what_the_engine_s_machine_failed_at_is_not_held_against_the_adapter(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, status: int, said: str
) -> None:
    """The engine is well, and has no memory for it at this moment, or may not read it: another node is asked, and the next request tries again."""
    stager = await open_stager(origin, engine_url=engine.url)

    async def fail(path: str) -> web.Response | None:
        return web.json_response({"error": {"message": said}}, status=status) if path == "/v1/load_lora_adapter" else None

    engine.step = fail
    with pytest.raises(EngineUnreachable, match="cannot load the adapter now") as failed:
        await held(stager)
    assert not failed.value.shared
    engine.step = None
    assert (await held(stager)).model in engine.adapters.registry


async def test_an_engine_that_does_not_see_the_directory_says_what_is_missing(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """Two containers with different mounts: the adapter is not to blame."""
    stager = await open_stager(origin, engine_url=engine.url)

    async def not_found(path: str) -> web.Response | None:
        error = {"error": {"message": "Loading lora x failed: No adapter found for /x"}}
        return web.json_response(error, status=404) if path == "/v1/load_lora_adapter" else None

    engine.step = not_found
    with pytest.raises(EngineUnreachable, match="same path"):
        await held(stager)


async def test_two_versions_are_there_at_once_and_the_old_goes_when_nobody_can_be_sent_to_it(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock
) -> None:
    """The new one is loaded before anybody hears of it; a request for the old one is answered by the old one until its leases have ended."""
    stager = await open_stager(origin, engine_url=engine.url)
    old = await held(stager)
    renew(origin)
    assert await stager.refresh(NAME)
    new = await held(stager)
    assert set(engine.adapters.registry) == {old.model, new.model}
    assert await engine.ask(old.model) == sha256(OLD[WEIGHTS])
    assert await engine.ask(new.model) == sha256(NEW[WEIGHTS])
    assert await engine.ask(old.model) == sha256(OLD[WEIGHTS])
    await stager._remover.remove_retired()
    assert old.model in engine.adapters.registry
    stager.release("router", NAME, old.digest)
    await stager._remover.remove_retired()
    assert set(engine.adapters.registry) == {new.model}
    assert [path.name for path in (node / ".store").iterdir()] == [new.digest]
    assert engine.deaths == 0


async def test_a_version_that_the_engine_refuses_never_takes_over(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path) -> None:
    """The refresh fails and says so; the old one serves."""
    stager = await open_stager(origin, engine_url=engine.url)
    old = await held(stager)
    origin.add(NAME, small_files(seed=3, rank=8))
    origin.revisions[NAME] = "2"
    engine.adapters._max_lora_rank = 4
    with pytest.raises(InvalidAdapter, match="rank"):
        await stager.refresh(NAME)
    assert read_files(node / NAME) == OLD
    assert (await held(stager)).model == old.model


async def test_nothing_goes_while_it_is_being_loaded(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Order of events: the engine is told to load; it does not list the adapter yet; an operator purges it; it is loaded, from files that are there."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(NAME)
    loading = asyncio.Event()
    go_on = asyncio.Event()

    async def wait(path: str) -> None:
        if path == "/v1/load_lora_adapter":
            loading.set()
            await go_on.wait()

    engine.step = wait
    coming = asyncio.create_task(held(stager))
    await loading.wait()
    with pytest.raises(AdapterInUse):
        await stager.purge(NAME)
    go_on.set()
    assert await engine.ask((await coming).model) == sha256(OLD[WEIGHTS])


async def test_an_unnamed_version_survives_a_restart_as_long_as_the_engine_may_read_it(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock
) -> None:
    """Order of events: refreshed; the stager is restarted before the old version went; a request of the old one is in the engine."""
    stager = await open_stager(origin, engine_url=engine.url)
    old = await held(stager)
    renew(origin)
    await stager.refresh(NAME)
    new = await held(stager)
    async with engine.adapters.use(old.model):
        await stager.close()
        again = await open_stager(origin, engine_url=engine.url)
        await again._remover.remove_retired()
        assert (node / ".store" / old.digest).is_dir()
    await again._remover.remove_retired()
    assert not (node / ".store" / old.digest).exists()
    assert set(engine.adapters.registry) == {new.model}


async def test_a_running_version_is_recognised_after_a_restart(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock
) -> None:
    """Order of events: acme/a is about to be unloaded; a request of it is queued; it is unloaded, and stays; the stager is restarted; the request runs, and
    nothing waits.
    """
    origin.add("acme/b", small_files(seed=7))
    stager = await open_stager(origin, engine_url=engine.url)
    a, b = await held(stager), await held(stager, "acme/b")
    clock.now += 1000
    running = asyncio.Event()
    done = asyncio.Event()

    async def run() -> None:
        async with engine.adapters.use(a.model):
            running.set()
            await done.wait()

    requests: list[asyncio.Task[None]] = []

    async def queue_up(path: str) -> None:
        if path == "/v1/unload_lora_adapter":
            requests.append(asyncio.create_task(run()))
            await until(lambda: engine.adapters.scheduler.waiting)

    async with engine.adapters.use(b.model):
        engine.step = queue_up
        with pytest.raises(AdapterInUse):
            await stager.evict(NAME)
        engine.step = None
    await running.wait()
    await stager.close()
    again = await open_stager(origin, engine_url=engine.url)
    assert a.model not in engine.adapters.registry
    with pytest.raises(AdapterInUse):
        await again.evict(NAME)
    done.set()
    await asyncio.gather(*requests)
    assert await again.evict(NAME)


async def test_a_failed_reload_is_told_to_routers(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """An engine that dies again while it is told what is in demand: whoever has a lease on it must ask."""
    stager = await open_stager(origin, engine_url=engine.url)
    await held(stager)
    engine.adapters.registry.clear()

    async def fail(path: str) -> web.Response | None:
        return web.Response(status=503) if path == "/v1/load_lora_adapter" else None

    engine.step = fail
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        await stager._keeper.compare()
        told = [change.kind for change in (queue.get_nowait() for _ in range(queue.qsize())) if change is not None and change.adapter]
    assert "evicted" in told


async def test_a_list_from_before_a_load_is_no_loss(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """Order of events: the list is asked for; an adapter is loaded; the list, which lacks it, is answered."""
    stager = await open_stager(origin, engine_url=engine.url)
    await held(stager)
    origin.add("acme/b", small_files(seed=7))
    loaded = False

    async def load_meanwhile(path: str) -> web.Response | None:
        nonlocal loaded
        if path != "/v1/models" or loaded:
            return None
        loaded = True
        listed = [{"id": name, "root": root, "parent": "base"} for name, root in engine.adapters.registry.items()]
        await held(stager, "acme/b")
        return web.json_response({"data": listed})

    engine.step = load_meanwhile
    assert await stager.node.loads.compare() == set()
    assert loaded


async def test_a_replaced_version_does_not_come_back_with_a_restart(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock
) -> None:
    """Order of events: refreshed; the old version cannot go yet; the new one is evicted; restarted. The name leads nowhere, not to the old version."""
    stager = await open_stager(origin, engine_url=engine.url)
    old = await held(stager)
    renew(origin)
    await stager.refresh(NAME)
    async with engine.adapters.use(old.model):
        clock.now += 1000
        assert await stager.evict(NAME)
        await stager.close()
        again = await open_stager(origin, engine_url=engine.url)
        assert list(again.node.holdings) == []
        assert (node / ".store" / old.digest).is_dir()
    assert await engine.ask((await held(again)).model) == sha256(NEW[WEIGHTS])


async def test_an_eviction_waits_until_what_was_queued_is_done(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Order of events: acme/b holds the only slot; a request of acme/a waits for it; acme/a is to go. Nothing is unloaded in vain."""
    origin.add("acme/b", small_files(seed=7))
    stager = await open_stager(origin, engine_url=engine.url)
    a, b = await held(stager), await held(stager, "acme/b")
    clock.now += 1000
    async with engine.adapters.use(b.model):
        waiting = asyncio.create_task(engine.ask(a.model))
        await until(lambda: engine.adapters.scheduler.waiting)
        for _ in range(2):
            with pytest.raises(AdapterInUse):
                await stager.evict(NAME)
        assert set(engine.adapters.registry) == {a.model, b.model}
    assert await waiting == sha256(OLD[WEIGHTS])
    assert await stager.evict(NAME)
    assert engine.deaths == 0


async def test_a_flight_waits_for_an_engine_that_will_be_done(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """All that could go is at work: whoever needs the room is held for `quiet_s`, not refused at once."""
    origin.add("acme/b", small_files(seed=7))
    settings = EngineSettings(url=engine.url, base_model=BASE_MODEL, quiet_s=60.0)
    stager = await open_stager(origin, max_bytes=SIZE, engine=settings)
    a = await held(stager)
    clock.now += 1000
    async with engine.adapters.use(a.model):
        coming = asyncio.create_task(held(stager, "acme/b"))
        await until(lambda: engine.calls.count("/metrics") > 3)
        assert not coming.done()
    assert (await coming).staged


async def test_without_patience_there_is_no_space_at_once(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """And never a dead engine."""
    origin.add("acme/b", small_files(seed=7))
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=SIZE)
    a = await held(stager)
    clock.now += 1000
    async with engine.adapters.use(a.model):
        with pytest.raises(NoSpace):
            await held(stager, "acme/b")
    assert engine.deaths == 0


async def test_a_restarted_engine_is_told_what_is_in_demand(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is leased is loaded again before the node counts as ready; of the rest routers are told that it is not there."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    origin.add("acme/b", small_files(seed=7))
    stager = await open_stager(origin, engine_url=engine.url)
    b = await held(stager, "acme/b")
    clock.now += 1000  # its lease has ended
    a = await held(stager)
    with stager.node.changes.since(stager.node.changes.last) as (queue, _):
        engine.is_sick = True
        await until(lambda: stager.not_ready)
        engine.adapters.registry.clear()
        engine.is_sick = False
        await until(lambda: stager.not_ready is None)
        told = [change for change in (queue.get_nowait() for _ in range(queue.qsize())) if change is not None]
    assert set(engine.adapters.registry) == {a.model}
    assert [change.adapter for change in told if change.kind == "evicted"] == ["acme/b"]
    assert (await held(stager, "acme/b")).model == b.model
    assert set(engine.adapters.registry) == {a.model, b.model}


async def test_a_restarted_stager_finds_what_the_engine_knows(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Nothing is loaded twice, and all of it can be unloaded."""
    stager = await open_stager(origin, engine_url=engine.url)
    model = (await held(stager)).model
    await stager.close()
    again = await open_stager(origin, engine_url=engine.url)
    await again._keeper.compare()
    assert (await held(again)).model == model
    assert engine.calls.count("/v1/load_lora_adapter") == 1
    clock.now += 1000
    assert await again.evict(NAME)
    assert engine.adapters.registry == {}


async def test_a_sleeping_engine_makes_the_node_unready(open_stager: OpenStager, node: Path, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers health with 200 and requests with nothing."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    async with running_engine(node, dev_mode=True) as engine:
        stager = await open_stager(origin, engine_url=engine.url)
        await until(lambda: stager.not_ready is None)
        await stager.node.engine._call("POST", "/sleep")
        await until(lambda: stager.not_ready == "the engine sleeps")
        await stager.node.engine._call("POST", "/wake_up")
        await until(lambda: stager.not_ready is None)


async def test_an_engine_that_takes_no_adapters_says_how_it_must_be_started(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without runtime updating the paths are not there: no request could be served."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)

    async def no_such_path(path: str) -> web.Response | None:
        return web.json_response({"detail": "Not Found"}, status=404) if path.endswith("_lora_adapter") else None

    engine.step = no_such_path
    stager = await open_stager(origin, engine_url=engine.url)
    await until(lambda: "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in (stager.not_ready or ""))


# -- where the body cannot be changed


async def test_a_plain_name_is_exchanged_one_version_after_the_other(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode NONE: the adapter's own name leads to a version's own directory; whoever comes meanwhile is held."""
    monkeypatch.setattr(loads_module, "IN_TRANSIT_S", 0.01)
    stager = await open_stager(origin, engine_url=engine.url)
    old = await held(stager, loading=Loading.PLAIN)
    assert (old.model, engine.adapters.registry) == (NAME, {NAME: str(stager.node.store.path(ArtifactId(old.digest)))})
    renew(origin)
    await stager.refresh(NAME)
    new = await held(stager, loading=Loading.PLAIN)
    assert engine.adapters.registry[NAME] == str(stager.node.store.path(ArtifactId(new.digest)))
    assert await engine.ask(NAME) == sha256(NEW[WEIGHTS])


async def test_a_refused_version_takes_over_no_plain_name(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """It is loaded under its own name first, so that the old one is not unloaded for nothing."""
    stager = await open_stager(origin, engine_url=engine.url)
    await held(stager, loading=Loading.PLAIN)
    origin.add(NAME, small_files(seed=3, rank=8))
    origin.revisions[NAME] = "2"
    engine.adapters._max_lora_rank = 4
    with pytest.raises(InvalidAdapter, match="rank"):
        await stager.refresh(NAME)
    await held(stager, loading=Loading.PLAIN)
    assert await engine.ask(NAME) == sha256(OLD[WEIGHTS])


async def test_a_replaced_version_stays_while_a_plain_name_runs(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of events: a request of the plain name runs on the old version; the name is exchanged; the old version's lease ends. It may be read again."""
    monkeypatch.setattr(loads_module, "IN_TRANSIT_S", 0.01)
    stager = await open_stager(origin, engine_url=engine.url)
    old = await held(stager, loading=Loading.PLAIN)
    async with engine.adapters.use(NAME):
        renew(origin)
        await stager.refresh(NAME)
        await held(stager, loading=Loading.PLAIN)
        clock.now += 1000
        await stager._remover.remove_retired()
        assert (node / ".store" / old.digest).is_dir()
    await stager._remover.remove_retired()
    assert not (node / ".store" / old.digest).exists()


async def test_an_engine_that_wants_another_model_refuses_plain_names(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """An SGLang would answer with the base model, and nobody would notice."""
    stager = await open_stager(origin, engine_url=engine.url)
    stager.node.engine.request_model = lambda name: f"base:{name}"  # type: ignore[method-assign]
    with pytest.raises(GatewayProtocolError):
        await held(stager, loading=Loading.PLAIN)
    assert (await held(stager)).model.startswith("base:acme/a@")


# -- by the engine's own resolver


@pytest.fixture
async def resolving(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node, max_loras=1, max_cpu_loras=1) as engine:
        yield engine


async def test_with_a_resolver_a_version_is_a_link(open_stager: OpenStager, resolving: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """The engine finds each version by its name, and evicting takes link and content along."""
    settings = EngineSettings(url=resolving.url, mode="resolver", base_model=BASE_MODEL)
    stager = await open_stager(origin, engine=settings)
    old = await held(stager)
    assert (node / old.model).resolve() == node / ".store" / old.digest
    assert await resolving.ask(old.model) == sha256(OLD[WEIGHTS])
    renew(origin)
    await stager.refresh(NAME)
    new = await held(stager)
    assert await resolving.ask(new.model) == sha256(NEW[WEIGHTS])
    assert await resolving.ask(old.model) == sha256(OLD[WEIGHTS])
    clock.now += 1000
    await stager._remover.remove_retired()
    assert not (node / old.model).is_symlink()
    assert await stager.evict(NAME)
    assert not (node / "acme").exists()
    assert list((node / ".store").iterdir()) == []
    assert resolving.deaths == 0
    assert "/v1/load_lora_adapter" not in resolving.calls


async def test_links_of_versions_survive_a_restart(open_stager: OpenStager, resolving: RunningEngine, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """They are no adapters of their own, and go with what they lead to."""
    settings = EngineSettings(url=resolving.url, mode="resolver", base_model=BASE_MODEL)
    stager = await open_stager(origin, engine=settings)
    model = (await held(stager)).model
    await stager.close()
    again = await open_stager(origin, engine=settings)
    assert list(again.node.holdings) == [NAME]
    clock.now += 1000
    assert await again.evict(NAME)
    assert not (node / model).is_symlink()


async def test_a_base_model_by_another_name_is_named_as_the_engine_does(
    open_stager: OpenStager, resolving: RunningEngine, origin: FakeOrigin, node: Path
) -> None:
    """vLLM's resolver compares byte for byte. The origin's file is as it was; `api` needs no copy."""
    files = small_files(seed=1, base_model="org/base-8b")
    origin.add(NAME, files)
    names = ("org/base-*",)
    stager = await open_stager(origin, engine=EngineSettings(url=resolving.url, mode="resolver", base_model=BASE_MODEL, base_names=names))
    ensured = await held(stager)
    assert await resolving.ask(ensured.model) == sha256(OLD[WEIGHTS])
    assert read_files(node / NAME)[CONFIG] != files[CONFIG]
    assert [found.why async for found in stager.verify(NAME)] == [""]
    await stager.close()
    other = await open_stager(origin, dir=str(node) + "-2", engine=EngineSettings(url=resolving.url, base_model=BASE_MODEL, base_names=names))
    await other.ensure(NAME)
    assert read_files(Path(str(node) + "-2") / NAME)[CONFIG] == files[CONFIG]


async def test_a_base_model_that_is_another_is_refused(open_stager: OpenStager, resolving: RunningEngine, origin: FakeOrigin) -> None:
    """Whatever the mode."""
    origin.add(NAME, small_files(base_model="other/base"))
    for mode in ("api", "resolver"):
        settings = EngineSettings(url=resolving.url, mode=mode, base_model=BASE_MODEL, base_names=("org/*",))
        stager = await open_stager(origin, engine=settings)
        with pytest.raises(InvalidAdapter, match="base model"):
            await held(stager)
        await stager.close()


# -- slots


async def test_demand_is_what_is_leased_and_is_told(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Of all that is on disk, what routers may send requests to now."""
    origin.add("acme/b", small_files(seed=7))
    settings = EngineSettings(url=engine.url, base_model=BASE_MODEL, max_loras=1, max_cpu_loras=4)
    stager = await open_stager(origin, engine=settings)
    await held(stager)
    await held(stager, "acme/b")
    assert stager.demand == (2, 4)
    clock.now += 200
    await held(stager)
    clock.now += 200
    assert stager.demand == (1, 4)
    await turns()


async def test_the_engine_tells_how_many_run_at_once(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """Where the settings do not."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager._keeper.compare()
    assert stager.node.engine.limits.max_loras == 1


# -- what is in its memory


def in_memory(stager: Stager, *names: str) -> list[bool]:
    """Of each adapter's version that is here."""
    return [(named := stager.node.holdings.get(adapter_name(name))) is not None and stager.node.loads.in_memory(adapter_name(name), named.id) for name in names]


async def test_only_as_many_are_in_memory_as_the_engine_keeps(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """It knows both names; the settings say that it keeps one. Who asks again for the other has it read again."""
    origin.add("acme/b", small_files(seed=7))
    settings = EngineSettings(url=engine.url, base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0, max_cpu_loras=1)
    stager = await open_stager(origin, engine=settings)
    await held(stager)
    await held(stager, "acme/b")
    assert in_memory(stager, NAME, "acme/b") == [False, True]
    await held(stager)
    assert in_memory(stager, NAME, "acme/b") == [True, False]
    assert engine.calls.count("/v1/load_lora_adapter") == 2


async def test_an_unloaded_name_keeps_its_place_in_memory_until_that_is_needed(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock
) -> None:
    """A vLLM forgets the name, not the adapter: what is loaded next pushes out the oldest, not the forgotten one."""
    for seed, name in enumerate(("acme/b", "acme/c"), 7):
        origin.add(name, small_files(seed=seed))
    settings = EngineSettings(url=engine.url, base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0, max_cpu_loras=2)
    stager = await open_stager(origin, engine=settings)
    await held(stager)
    await held(stager, "acme/b")
    clock.now += 1000
    await stager.evict("acme/b")
    await held(stager, "acme/c")
    assert in_memory(stager, NAME, "acme/b", "acme/c") == [False, False, True]


async def test_what_an_engine_has_lost_is_not_in_its_memory(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> None:
    """Only what it was told again is."""
    origin.add("acme/b", small_files(seed=7))
    stager = await open_stager(origin, engine_url=engine.url)
    await held(stager, "acme/b")
    clock.now += 1000  # nobody needs it
    await held(stager)
    engine.adapters.registry.clear()
    await stager._keeper.compare()
    assert in_memory(stager, NAME, "acme/b") == [True, False]


async def test_names_at_work_that_are_not_ours_are_left_alone(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """Somebody else's take places too, but of which adapters only the engine knows."""
    stager = await open_stager(origin, engine_url=engine.url)
    await held(stager)
    stager.node.loads.used(("somebody", "else"))
    assert in_memory(stager, NAME) == [True]
