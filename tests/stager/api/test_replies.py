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

from extproc.client import Loading, Progress
from extproc.core.artifact import ArtifactId, adapter_name
from extproc.errors import InvalidAdapter, NoSpace
from extproc.stager.api import grpc as service_module
from extproc.stager.api import replies as replies_module
from extproc.stager.books.holdings import Holdings, Named
from tests.fakes.adapters import WEIGHTS, size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin

from ..conftest import OpenStager, ServeNode


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


# -- progress


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
