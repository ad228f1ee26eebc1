"""What the stager's tests share: stagers on a temporary directory, alone or behind a port, a clock that the test sets, and no waits between attempts."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import pytest
import stamina

from extproc.client import Demand, NodeState, Space, StagerClient, WatchEvent
from extproc.config.stager import EngineSettings, PeerSettings, StagerSettings
from extproc.metrics import StagerMetrics
from extproc.process.grpc import grpc_server
from extproc.stager.api.grpc import StagerService
from extproc.stager.engine import keeper as keeper_module
from extproc.stager.engine.api import Engine
from extproc.stager.stager import Stager
from extproc.stager.supply.origins import Origin
from extproc.stager.supply.source import Source
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


@pytest.fixture(autouse=True)
def quick_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are asked as often as a test can wait for."""
    monkeypatch.setattr(keeper_module, "HEALTH_S", 0.01)


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
        engine = EngineSettings(url=engine_url, base_model=BASE_MODEL, max_lora_rank=8, quiet_s=0.0)
        chosen = StagerSettings(**{"dir": str(node), "lease_s": 300.0, "negative_ttl_s": 10.0, "claim_wait_s": 0.0, "engine": engine, **settings})
        stager = Stager(chosen, [Source(origin, clock=clock) for origin in origins], Engine(chosen.engine), StagerMetrics(), clock)
        opened.append(stager)
        await stager.open()
        return stager

    yield open_
    for stager in opened:
        await stager.close()


@dataclass
class Node:
    """A stager behind its port. `ask` makes one more client of it."""

    stager: Stager
    port: int
    clients: list[StagerClient]
    server: grpc.aio.Server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(self, holder: str = "", address: str = "") -> StagerClient:
        self.clients.append(StagerClient(address or self.address, holder=holder))
        return self.clients[-1]


ServeNode = Callable[..., Awaitable[Node]]


@pytest.fixture
async def serve_node(open_stager: OpenStager, origin: FakeOrigin) -> AsyncIterator[ServeNode]:
    """Starts a node; keyword arguments are its settings. Its origin is the fake one, unless others are given."""
    nodes: list[Node] = []

    async def start(*origins: Any, stager: Stager | None = None, peers: PeerSettings | None = None, destructive: bool = True, **settings: Any) -> Node:
        stager = stager or await open_stager(*(origins or (origin,)), **settings)
        server = grpc_server()
        StagerService(stager, peers, destructive=destructive).register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        nodes.append(Node(stager, port, [], server))
        return nodes[-1]

    yield start
    for node in nodes:
        for client in node.clients:
            await client.close()
        await node.server.stop(None)


async def next_of(watching: AsyncIterator[WatchEvent], kind: type) -> WatchEvent:
    """The next event of one kind."""
    async for event in watching:
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} came")


async def until_node_state(watching: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    """What comes up to the first state of the node, with it; without the budget and the demand, which change by themselves."""
    seen: list[WatchEvent] = []
    async for event in watching:
        if not isinstance(event, Space | Demand):
            seen.append(event)
        if isinstance(event, NodeState):
            break
    return seen


def labels_of(stager: Stager, name: str) -> Counter[tuple[str, ...]]:
    """A counter's samples as label values -> value."""
    found: Counter[tuple[str, ...]] = Counter()
    for family in stager.node.metrics.registry.collect():
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels.values())] += int(sample.value)
    return found
