"""What a node can answer for, in pages and all at once, while adapters come and go; and how a load is shown while it lasts."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from extproc.client import Catalogue, Loading, Progress, Refused
from extproc.core.artifact import ArtifactId, adapter_name
from extproc.errors import InvalidAdapter, InvalidRequest, ModelNotFound, NoSpace, OriginFailed
from extproc.pb import stager_pb2 as pb
from extproc.stager.api import grpc as service_module
from extproc.stager.api import replies as replies_module
from extproc.stager.books.holdings import Holdings, Named
from tests.fakes.adapters import CONFIG, WEIGHTS, size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin, ListableOrigin
from tests.fakes.wait import Clock

from ..conftest import OpenStager, ServeNode, next_of, until_node_state


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node) as running:
        yield running


def put(holdings: Holdings, name: str) -> None:
    digest = f"{abs(hash(name)):064x}"
    holdings.index.add(ArtifactId(digest), 4096, 0.0)
    holdings.put(adapter_name(name), Named(ArtifactId(digest), "fake", "1"))


@pytest.mark.parametrize("limit", [1, 7, 250, 600, 10**6])
async def test_pages_follow_each_other_without_a_gap(serve_node: ServeNode, limit: int, engine: RunningEngine) -> None:
    """Sorted by id, the base models on the first alone, `more` on all but the last."""
    node = await serve_node(engine_url=engine.url)
    names = sorted({f"acme/{number * 7919 % 1009}" for number in range(600)} | {"acme/ä", "acme/Z"}) if limit > 1 else ["a", "b", "c"]
    for name in reversed(names):
        put(node.stager.node.holdings, name)
    await node.stager.node.engine.known()
    client = node.ask()
    seen, after, pages = [], "", 0
    while True:
        page = await client.models(after, limit)
        assert bool(page.bases) is (pages == 0)
        assert len(page.adapters) <= limit
        seen += [model.id for model in page.adapters]
        pages += 1
        assert page.more is (len(seen) < len(names))
        if not page.more:
            break
        after = seen[-1]
    assert seen == names
    assert pages == -(-len(names) // limit)


async def test_all_at_once_is_made_of_slices(serve_node: ServeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit, and with one above a slice; what goes meanwhile is listed or not, and nothing twice."""
    monkeypatch.setattr(replies_module, "MODELS_SLICE", 10)
    node = await serve_node()
    for number in range(95):
        put(node.stager.node.holdings, f"acme/{number:03d}")
    client = node.ask()
    listing = asyncio.ensure_future(client.models())
    while not listing.done():
        node.stager.node.holdings.drop(adapter_name("acme/050"))
        await asyncio.sleep(0)
    ids = [model.id for model in listing.result().adapters]
    assert ids == sorted(set(ids))
    assert set(ids) | {"acme/050"} == {f"acme/{number:03d}" for number in range(95)}
    page = await client.models(limit=33)
    assert [model.id for model in page.adapters] == ids[:33]
    assert page.more
    assert (await client.models("zzz")).adapters == ()
    assert not (await client.models("zzz")).more


async def test_the_list_is_made_of_slices(serve_node: ServeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn between two of them; what goes meanwhile is listed or not, and nothing twice. Two names of one artifact stand together."""
    monkeypatch.setattr(replies_module, "LIST_SLICE", 10)
    node = await serve_node()
    names = [f"acme/{number:03d}" for number in range(95)]
    for name in names:
        put(node.stager.node.holdings, name)
    first = node.stager.node.holdings.get(adapter_name(names[0]))
    assert first is not None
    node.stager.node.holdings.put(adapter_name("acme/also"), Named(first.id, "fake", "1"))
    listing, turns = asyncio.ensure_future(replies_module.list_reply(node.stager)), 0
    while not listing.done():
        turns += 1
        node.stager.node.holdings.drop(adapter_name("acme/050"))
        await asyncio.sleep(0)
    assert turns > 9
    assert [adapter.name for adapter in pb.ListReply.FromString(listing.result()).adapters] == ["acme/000", "acme/also", *names[1:50], *names[51:]]
    shown = await node.ask().list()
    assert [adapter.name for adapter in shown.adapters] == ["acme/000", "acme/also", *names[1:50], *names[51:]]
    assert shown.used_bytes == 95 * 4096


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([f"{letter}{number}" for letter in "aäZ" for number in range(4)])), max_size=60))
def test_the_sorted_names_are_the_names(steps: list[tuple[bool, str]]) -> None:
    """Whatever came and went, in whatever order, before the order was first asked for and after."""
    holdings = Holdings(10**9)
    for number, (comes, name) in enumerate(steps):
        if comes:
            holdings.put(adapter_name(name), Named(ArtifactId(f"{number:064x}"), "fake", "1"))
        else:
            holdings.drop(adapter_name(name))
        if number >= 5:
            assert holdings.after("", 10**6) == sorted(holdings)


# -- what could be served


async def test_the_catalogue_comes_in_pages(serve_node: ServeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted, `more` on all but the last, and no page of no size."""
    monkeypatch.setattr(replies_module, "CATALOGUE_PAGE", 4)
    names = [f"acme/{number}" for number in range(9)]
    client = (await serve_node(ListableOrigin(names=names))).ask()
    first = await client.catalogue()
    assert (first.names, first.more) == (tuple(names[:4]), True)
    assert await client.catalogue("", "acme/3", 3) == Catalogue(first.version, tuple(names[4:7]), more=True)
    assert await client.catalogue("", "acme/6", 100) == Catalogue(first.version, tuple(names[7:]))
    assert await client.catalogue("", "acme/8") == Catalogue(first.version)


async def test_a_catalogue_that_is_known_is_not_sent_again(serve_node: ServeNode, clock: Clock) -> None:
    """Only its version, until a listing brings other names."""
    origin = ListableOrigin(names=["a"])
    client = (await serve_node(origin)).ask()
    version = (await client.catalogue()).version
    assert await client.catalogue(version) == Catalogue(version)
    origin.names.append("b")
    clock.now += 1000.0
    assert (await client.catalogue(version)).names == ("a", "b")


async def test_one_name_is_looked_for_without_staging_it(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """On disk, or at an origin; what none has is not asked for again at once, nor is what was refused."""
    origin.add("acme/a", small_files())
    origin.add("acme/bare", {CONFIG: small_files()[CONFIG]})
    node = await serve_node()
    client = node.ask()
    for _ in range(2):
        assert await client.resolve("acme/a") == "fake"
        for name, why in (("acme/none", "no origin has it"), ("acme/bare", "cannot be served: acme/bare has no weights file")):
            with pytest.raises(ModelNotFound, match=why):
                await client.resolve(name)
    assert (origin.fetched, origin.resolved["acme/none"], len(node.stager.node.holdings)) == ({}, 1, 0)
    await client.ensure("acme/a")
    asked = origin.resolved["acme/a"]
    assert await client.resolve("acme/a") == "fake"
    assert origin.resolved["acme/a"] == asked
    with pytest.raises(InvalidRequest):
        await client.resolve("../a")


async def test_an_origin_that_fails_is_the_answer_for_one_name(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """As for a request."""
    origin.down = OriginFailed("fake origin: 503")
    with pytest.raises(OriginFailed, match="503"):
        await (await serve_node()).ask().resolve("acme/a")


async def test_what_was_found_invalid_is_told(serve_node: ServeNode, origin: FakeOrigin, clock: Clock) -> None:
    """Beside what is on disk and to watchers, until it is forgotten; whoever looks for it hears why, as long as its origin has the same."""
    origin.add("acme/bad", {**small_files(), WEIGHTS: b"rubbish"})
    node = await serve_node()
    client = node.ask()
    watching = client.watch()
    await until_node_state(watching)
    with pytest.raises(InvalidAdapter) as refused:
        await client.ensure("acme/bad")
    assert await next_of(watching, Refused) == Refused("acme/bad")
    assert (await client.models()).refused == ("acme/bad",)
    assert (await client.models("acme/a")).refused == ()
    for wait_s in (0.0, 20.0):  # while the answer is remembered, and while the verdict is
        clock.now += wait_s
        with pytest.raises(ModelNotFound) as missing:
            await client.resolve("acme/bad")
        assert missing.value.message == f"The model `acme/bad` cannot be served: {refused.value.message}"
    origin.add("acme/bad", small_files())
    origin.revisions["acme/bad"] = "2"
    clock.now += 20.0
    assert await client.resolve("acme/bad") == "fake"
    await client.ensure("acme/bad")
    models = await client.models()
    assert [model.id for model in models.adapters] == ["acme/bad"]


async def test_what_the_engine_refused_is_told(serve_node: ServeNode, origin: FakeOrigin, engine: RunningEngine) -> None:
    """It is on disk, and not listed; watchers hear of it once, and whoever looks for it is told that it cannot be served. No page is without an adapter."""

    async def refuse(path: str) -> web.Response | None:
        return web.Response(status=400) if path == "/v1/load_lora_adapter" else None

    engine.step = refuse
    origin.add("acme/a", small_files())
    node = await serve_node(engine_url=engine.url)
    client = node.ask()
    for _ in range(2):
        with pytest.raises(InvalidAdapter, match="engine refuses"):
            await client.ensure("acme/a", loading=Loading.VERSIONED)
    assert [change.adapter for change in node.stager.node.changes._kept if change.kind == "refused"] == ["acme/a"]
    put(node.stager.node.holdings, "acme/b")
    page = await client.models(limit=1)
    assert ([model.id for model in page.adapters], page.refused, page.more) == (["acme/b"], ("acme/a",), False)
    with pytest.raises(ModelNotFound, match="engine refuses it"):
        await client.resolve("acme/a")


# -- progress


async def test_what_the_engine_refused_is_not_listed(serve_node: ServeNode, origin: FakeOrigin, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that picks from the list would be answered 422. It is listed again when the engine takes it."""
    for seed, name in enumerate(("acme/good", "acme/bad")):
        origin.add(name, small_files(seed=seed))
    node = await serve_node(engine_url=engine.url, negative_ttl_s=0.0)
    client = node.ask()
    for name in ("acme/good", "acme/bad"):
        await client.ensure(name)
    with monkeypatch.context() as patch:
        patch.setattr(engine.adapters, "_max_lora_rank", 1)
        with pytest.raises(InvalidAdapter):
            await client.ensure("acme/bad", loading=Loading.VERSIONED)
    assert [model.id for model in (await client.models()).adapters] == ["acme/good"]
    await client.ensure("acme/bad", loading=Loading.VERSIONED)
    assert [model.id for model in (await client.models()).adapters] == ["acme/bad", "acme/good"]


async def test_a_load_is_shown_as_the_last_phase(serve_node: ServeNode, origin: FakeOrigin, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first progress comes at once, then one per change; the answer is what Ensure would say, with the name in the engine."""
    monkeypatch.setattr(service_module, "PROGRESS_S", 0.01)
    monkeypatch.setattr(service_module, "FIRST_PROGRESS_S", 0.0)
    origin.add("acme/a", small_files())
    stall, go_on = origin.stall("acme/a", WEIGHTS), asyncio.Event()

    async def step(path: str) -> web.Response | None:
        if path == "/v1/load_lora_adapter":
            await go_on.wait()
        return None

    engine.step = step
    node = await serve_node(engine_url=engine.url)
    said: list[Progress] = []

    def note(progress: Progress) -> None:
        said.append(progress)
        if progress.phase == "fetch" and progress.done_bytes:
            stall.release()
        if progress.phase == "load":
            go_on.set()

    staged = await node.ask("router").ensure("acme/a", loading=Loading.VERSIONED, on_progress=note)
    assert staged.model in engine.adapters.registry
    phases = list(dict.fromkeys(progress.phase for progress in said))
    assert phases[-1] == "load"
    assert "fetch" in phases
    assert all(one != other for one, other in itertools.pairwise(said))


async def test_progress_is_not_repeated_while_nothing_changes(serve_node: ServeNode, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it takes the silence for a fetch that stands still."""
    monkeypatch.setattr(service_module, "PROGRESS_S", 0.001)
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    client = (await serve_node()).ask()
    said: list[Progress] = []
    staging = asyncio.create_task(client.ensure("acme/a", on_progress=said.append))
    await stall.reached.wait()
    await client.list()
    while not said or said[-1].done_bytes == 0:
        await client.list()
    count = len(said)
    for _ in range(50):
        await client.list()
    assert len(said) == count
    stall.release()
    assert (await staging).staged


# -- what crosses


@pytest.mark.parametrize("text", ["x" * 100_000, "ü" * 100_000, "\N{PILE OF POO}" * 100_000, "x" * 300, "x" * 301])
async def test_a_long_message_crosses_shortened(serve_node: ServeNode, origin: FakeOrigin, text: str) -> None:
    """A status is a header, which gRPC does not let grow: what arrived was another error."""
    origin.add("acme/a", small_files())
    origin.fetch_failures = [InvalidAdapter(text) for _ in range(9)]
    client = (await serve_node()).ask()
    for call in (client.ensure("acme/a"), client.ensure("acme/a", on_progress=print)):
        with pytest.raises(InvalidAdapter) as raised:
            await call
        assert len(raised.value.message) == 300
        assert ("…" in raised.value.message) is (len(text) > 300)


async def test_a_full_disk_is_a_warning_once(open_stager: OpenStager, origin: FakeOrigin, caplog: pytest.LogCaptureFixture) -> None:
    """And its end is said."""
    caplog.set_level(logging.INFO, "extproc.stager.stager")
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, max_bytes=size_of(small_files()))
    await stager.ensure("acme/a", holder="router")
    for _ in range(3):
        with pytest.raises(NoSpace):
            await stager.ensure("acme/b")
    stager.release("router")
    await stager.ensure("acme/b")
    said = [(record.levelname, record.getMessage()[:20]) for record in caplog.records if "room" in record.getMessage()]
    assert said == [("WARNING", "the node has no room"), ("INFO", "the node has room ag")]
