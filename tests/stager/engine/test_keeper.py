"""An engine that hangs, dies, answers that it is ill, and comes back: what the node says of it, and what goes on meanwhile."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from extproc.config.stager import EngineSettings
from extproc.stager import stager as stager_module
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from ..conftest import OpenStager

QUICK = 0.2  # seconds for /health


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node) as running:
        yield running


@pytest.fixture
def settings() -> EngineSettings:
    return EngineSettings(base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0, health_timeout_s=QUICK, timeout_s=3600)


async def test_an_engine_that_hangs_is_noticed_and_holds_nothing_else_up(
    open_stager: OpenStager,
    origin: FakeOrigin,
    clock: Clock,
    node: Path,
    settings: EngineSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever call it hangs in. The demand is told, the disk is looked after, and the log says since when and for how long."""
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.001)
    caplog.set_level(logging.INFO, "extproc.stager.engine.keeper")
    origin.add("acme/a", small_files())
    async with running_engine(node) as engine:
        stager = await open_stager(origin, engine=settings.model_copy(update={"url": engine.url}))
        await until(lambda: stager.not_ready is None)
        engine.hold = asyncio.Event()
        asked = engine.healths
        await until(lambda: engine.healths > asked)  # all answers before that have arrived: none comes after the clock has moved
        clock.now += 7
        await until(lambda: stager.not_ready == f"the engine did not answer /health within {QUICK} s")
        with stager.node.changes.since(stager.node.changes.last) as (queue, _):
            await stager.ensure("acme/a", holder="router")
            kinds: set[str] = set()
            while not {"space", "demand"} <= kinds:
                change = await queue.get()
                assert change is not None
                kinds.add(change.kind)
        clock.now += 5
        engine.hold.set()
        await until(lambda: stager.not_ready is None)
    messages = [record.getMessage() for record in caplog.records]
    assert f"the engine did not answer /health within {QUICK} s; it was last well 7.0 s ago" in messages
    assert "the engine is well again after 12.0 s" in messages


async def test_an_engine_that_hangs_in_its_list_does_not_hide_that_its_health_is_gone(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, settings: EngineSettings
) -> None:
    """Order of events: health is good, the list is asked for and never comes, then health is not good any more."""
    async with running_engine(node) as engine:
        listing = asyncio.Event()

        async def step(path: str) -> web.Response | None:
            if path == "/v1/models":
                listing.set()
                await asyncio.Event().wait()
            return None

        engine.step = step
        stager = await open_stager(origin, engine=settings.model_copy(update={"url": engine.url}))
        await listing.wait()
        assert stager.not_ready == "the engine was not asked yet"
        engine.is_sick = True
        await until(lambda: stager.not_ready == "the engine answers 503 to /health")


async def test_an_ill_engine_is_logged_once(open_stager: OpenStager, origin: FakeOrigin, engine: RunningEngine, caplog: pytest.LogCaptureFixture) -> None:
    """However often it is asked meanwhile."""
    stager = await open_stager(origin, engine_url=engine.url)
    await until(lambda: stager.not_ready is None)
    engine.is_sick = True
    await until(lambda: stager.not_ready)
    asked = engine.healths
    await until(lambda: engine.healths > asked + 5)
    assert sum("it was last well" in record.getMessage() for record in caplog.records) == 1
