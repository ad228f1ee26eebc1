"""What the stager's tests share: stagers on a temporary directory, a clock that the test sets, and no waits between attempts."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import stamina

from extproc.config import EngineSettings, StagerSettings
from extproc.metrics import StagerMetrics
from extproc.stager.engine import Engine
from extproc.stager.origins import Origin
from extproc.stager.stager import Stager
from extproc.up.demo import BASE_MODEL
from tests.fakes.http import FileServer, file_server
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock


class OpenStager(Protocol):
    """Opens a stager; keyword arguments are its settings."""

    async def __call__(self, *origins: Origin, engine_url: str = "", **settings: Any) -> Stager: ...


@pytest.fixture(autouse=True)
def no_back_off() -> Iterator[None]:
    """As many attempts as ever, without the waits between them."""
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def origin() -> FakeOrigin:
    return FakeOrigin()


@pytest.fixture
async def http_server() -> AsyncIterator[FileServer]:
    async with file_server() as server:
        yield server


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The node's directory."""
    return tmp_path / "node"


@pytest.fixture
async def open_stager(node: Path, clock: Clock) -> AsyncIterator[OpenStager]:
    opened: list[Stager] = []

    async def open_(*origins: Origin, engine_url: str = "", **settings: Any) -> Stager:
        engine = EngineSettings(url=engine_url, base_model=BASE_MODEL, max_lora_rank=8)
        chosen = StagerSettings(**{"dir": str(node), "lease_s": 300.0, "negative_ttl_s": 10.0, "engine": engine, **settings})
        stager = Stager(chosen, origins, Engine(chosen.engine), StagerMetrics(), clock)
        opened.append(stager)
        await stager.open()
        return stager

    yield open_
    for stager in opened:
        await stager.close()
