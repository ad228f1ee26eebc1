"""A fleet of real processes that moves under load: nodes that come, drain, die, hang and are replaced, and a file that loses its content.

`tests/bench/fleet_real.py` has the load that the figures are made with, and says what counts as failed, as warm and as held.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from extproc.client import StagerClient
from extproc.up.stack import Node
from tests.bench.fleet_real import Seen, Size, complaints, measure
from tests.fakes.fleet import POOL, Fleet, Layout
from tests.fakes.wait import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS_PER_S = 40
SHORT = Size(seconds=20.0, per_s=30.0, nodes=4, adapters=40, load_ms=20.0)
MOST_LATE = 0.02  # of all requests: another process of this machine may hold up a load


async def test_a_fleet_that_moves_fails_nobody_and_holds_nothing_that_is_warm(tmp_path: Path) -> None:
    """A join, a drain and a death under Zipf's load. The exact bounds are for the benchmark to judge, which has the machine to itself."""
    seen = await measure(SHORT, "bounded", tmp_path)
    assert seen.steps.keys() == {"join", "drain", "death"}
    assert not seen.failed, "\n".join(complaints(seen))
    assert not seen.refused
    assert len(seen.late()) <= MOST_LATE * len(seen.records), "\n".join(complaints(seen))


async def test_who_comes_while_the_first_request_is_held_waits_for_the_same_load() -> None:
    """And is not held although its adapter is warm. After a death that is what survives alone."""

    def asked(at: float, model: str, waited_ms: float) -> dict[str, Any]:
        return {"at": at, "model": model, "waited_ms": waited_ms, "status": 200, "upstream": "10.0.0.1:8000"}

    before = [asked(1.0, "a", 250.0), asked(1.1, "a", 150.0), asked(2.0, "a", 200.0), asked(2.1, "b", 300.0)]
    after = [asked(3.0, "a", 260.0), asked(3.1, "b", 280.0), asked(3.2, "a", 110.0)]
    seen = Seen(records=[*before, *after], killed=2.5, survives=frozenset({"b"}))
    assert seen.late() == [before[2], after[1]]


async def test_what_is_in_flight_counts_from_when_it_was_let_go_to_the_end_of_its_answer() -> None:
    """A window is of one set of engines, and what a request takes of it counts, whenever it began."""

    def served(at: float, node: int, waited_ms: float, duration_ms: float) -> Mapping[str, Any]:
        return {"at": at, "waited_ms": waited_ms, "duration_ms": duration_ms, "upstream": f"10.0.0.{node}:8000"}

    first, second = ({f"10.0.0.{node}:8000": f"node-{node}" for node in nodes} for nodes in ((1, 2), (2,)))
    records = [served(98.0, 1, 1000.0, 5000.0), served(104.0, 2, 0.0, 1000.0), served(119.0, 2, 0.0, 2000.0), served(101.0, 3, 0.0, 9000.0)]
    seen = Seen(records=records, busy=[(100.0, first), (115.0, second), (125.0, {})])
    assert seen.windows() == [(100.0, {"node-1": 0.3, "node-2": 0.1}), (115.0, {"node-2": 0.2})]
    assert seen.uneven() == [pytest.approx(1.5), 1.0]


# ---- what befalls a fleet


@dataclass
class Load:
    """REQUESTS_PER_S of all adapters in turn, while the block runs."""

    fleet: Fleet
    answers: list[tuple[float, int, str]] = field(default_factory=list)  # when it began, status, and the text of an error

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        requests: list[asyncio.Task[None]] = []
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            for name in self.fleet.adapters:  # all are somewhere before anything happens
                while await self._ask(session, name) != 200:
                    await asyncio.sleep(0.1)
            self.answers.clear()
            loading = asyncio.create_task(self._send(session, requests))
            try:
                await self.more(2 * len(self.fleet.adapters))
                yield self
            finally:
                loading.cancel()
                await asyncio.gather(*requests)

    async def _send(self, session: aiohttp.ClientSession, requests: list[asyncio.Task[None]]) -> None:
        began = time.monotonic()
        while True:
            name = self.fleet.adapters[len(requests) % len(self.fleet.adapters)]
            requests.append(asyncio.create_task(self._note(session, name)))
            await asyncio.sleep(max(0.0, began + len(requests) / REQUESTS_PER_S - time.monotonic()))

    async def _note(self, session: aiohttp.ClientSession, name: str) -> None:
        await self._ask(session, name)

    async def _ask(self, session: aiohttp.ClientSession, name: str) -> int:
        began = time.monotonic()
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hi"}]}).encode()
        async with session.post(f"http://{self.fleet.address}/v1/chat/completions", data=body, headers={"content-type": "application/json"}) as response:
            text = await response.text()
            self.answers.append((began, response.status, "" if response.status == 200 else text))
        return response.status

    async def more(self, count: int) -> None:
        """Until so many more are answered."""
        wanted = len(self.answers) + count
        async with asyncio.timeout(PATIENCE_S):
            while len(self.answers) < wanted:
                await asyncio.sleep(0.02)

    @property
    def failed(self) -> Counter[tuple[int, str]]:
        return Counter((status, text) for _, status, text in self.answers if status != 200)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Three nodes in the file, and two that are in none yet."""
    layout = Layout(3, 2, engine={"token-ms": "2"}, settings={"router": {"hold_down_s": 1.0}})
    async with Fleet(layout, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared: Fleet) -> AsyncIterator[Fleet]:
    """The same for each test: all three are ready, and there is no other."""
    yield shared
    for node in shared.nodes:
        async with StagerClient(node.stager) as client:
            await client.undrain()
    shared.show(shared.nodes[:3])

    async def is_whole() -> bool:
        return all([await shared.standings(router) == dict.fromkeys(("node-1", "node-2", "node-3"), "ready") for router in shared.routers])

    await shared.until(is_whole, "the fleet is not whole again")


async def test_a_file_that_loses_its_content_under_load_costs_nothing(fleet: Fleet) -> None:
    """Emptied, cut short, gone, and a list of none: the last good endpoints count on. What it says afterwards is followed."""
    async with Load(fleet).running() as load:
        whole = fleet.file.read_bytes()
        for damage in (b"", whole[:40], b"{}", b"[]", None):
            if damage is None:
                fleet.file.unlink()
            else:
                fleet.file.write_bytes(damage)
            await load.more(REQUESTS_PER_S)
        assert {standing for router in fleet.routers for standing in (await fleet.standings(router)).values()} == {"ready"}
        fleet.show(fleet.nodes[:4])
        await fleet.until_standing("ready", *fleet.nodes[:4])
        await load.more(REQUESTS_PER_S)
    assert not load.failed


async def test_a_stager_that_hangs_while_it_drains_costs_nothing(fleet: Fleet) -> None:
    """What is leased there is served by its engine meanwhile. Afterwards the drain goes on to its end."""
    async with Load(fleet).running() as load:
        node = fleet.nodes[0]
        await fleet.run("drain", node.stager)
        fleet.signal("node-1-stager", signal.SIGSTOP)
        await load.more(6 * REQUESTS_PER_S)
        fleet.signal("node-1-stager", signal.SIGCONT)
        assert "empty" in await fleet.run("drain", node.stager, "--wait", "--timeout", "60")
        assert {(await fleet.standings(router))["node-1"] for router in fleet.routers} == {"draining"}
        await load.more(REQUESTS_PER_S)
    assert not load.failed


async def test_two_nodes_that_join_while_one_drains_cost_nothing(fleet: Fleet) -> None:
    """All at once; the drained node is empty in the end, and the new ones are ready."""
    async with Load(fleet).running() as load:
        draining = asyncio.create_task(fleet.run("drain", fleet.nodes[0].stager, "--wait", "--timeout", "60"))
        fleet.show(fleet.nodes)
        await fleet.until_standing("ready", *fleet.nodes[1:])
        assert "empty" in await draining
        fleet.show(fleet.nodes[1:])
        await load.more(2 * REQUESTS_PER_S)
    assert not load.failed


async def test_an_endpoint_that_is_replaced_under_its_address_is_a_new_one(fleet: Fleet) -> None:
    """Both processes are killed, others started in their place, and the file names another instance. Only what the dead engine had is lost."""
    async with Load(fleet).running() as load:
        node = fleet.nodes[0]
        await fleet.kill("node-1-engine", "node-1-stager")
        gone = time.monotonic()
        await fleet.start_again("node-1-engine")
        await fleet.start_again("node-1-stager")
        fleet.show(fleet.nodes[:3], node_1="another")
        await load.more(REQUESTS_PER_S)
        await fleet.until_standing("ready", node)
        await load.more(2 * REQUESTS_PER_S)
    late = [answer for answer in load.answers if answer[1] != 200 and answer[0] > gone]
    assert not late, Counter(answer[1:] for answer in late)
    assert len([answer for answer in load.answers if answer[1] != 200]) <= 5, load.failed


async def test_routers_that_are_killed_under_load_find_the_fleet_again(fleet: Fleet) -> None:
    """Each in turn. Envoy keeps its endpoints, follows the other, and loses no more than what the dead router was answering."""
    async with Load(fleet).running() as load:
        for number, router in enumerate(fleet.routers, 1):
            await fleet.kill(f"router-{number}")
            await load.more(REQUESTS_PER_S)
            await fleet.start_again(f"router-{number}")
            await fleet.until_standing("ready", *fleet.nodes[:3])
            await fleet.until_envoy_sees([router])
        fleet.show(fleet.nodes[:4])  # by whichever Envoy follows now
        await fleet.until_standing("ready", fleet.nodes[3])
        await load.more(2 * REQUESTS_PER_S)
    assert load.failed.total() <= 5, load.failed


async def test_workers_that_are_killed_find_the_fleet_again(tmp_path: Path) -> None:
    """Each in turn, the one among them that Envoy follows; a node that joins afterwards is used."""
    layout = Layout(2, 1, 1, engine={"token-ms": "2"}, settings={"router": {"workers": 2}})
    async with Fleet(layout, tmp_path) as fleet, Load(fleet).running() as load:
        pid = fleet.children["router-1"].process.pid
        for worker in _children(pid):
            os.kill(worker, signal.SIGKILL)
            await load.more(2 * REQUESTS_PER_S)
            await fleet.until(lambda: _both_serve(fleet), "a worker was not replaced")
        fleet.show(fleet.nodes)
        await fleet.until_standing("ready", fleet.nodes[2])
        await load.more(2 * REQUESTS_PER_S)
        await fleet.until(lambda: _is_used(fleet, fleet.nodes[2]), "the new node is not used")
    assert load.failed.total() <= 5, load.failed


async def _both_serve(fleet: Fleet) -> bool:
    return await fleet.metric(fleet.routers[0].http, 'lora_extproc_workers{state="serving"}') == 2


async def _is_used(fleet: Fleet, node: Node) -> bool:
    return await fleet.metric(node.engine, "vllm:request_success_total") > 0


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_file_of_a_thousand_endpoints_of_which_three_answer_is_served_by_those(fleet: Fleet) -> None:
    """The dead are down, and nobody is sent there."""
    async with Load(fleet).running() as load:
        dead = [{"address": f"127.9.{n // 250}.{n % 250 + 1}:7", "stager": f"127.9.{n // 250}.{n % 250 + 1}:9", "node": f"dead-{n}"} for n in range(997)]
        fleet.write([*map(fleet.entry, fleet.nodes[:3]), *dead])

        async def all_down() -> bool:
            shown = [await fleet.standings(router) for router in fleet.routers]
            return all(Counter(of.values()) == {"ready": 3, "down": 997} for of in shown)

        await fleet.until(all_down, "not every endpoint is down that does not answer")
        await load.more(4 * REQUESTS_PER_S)
    assert not load.failed


def tells_who_served(bootstrap: dict[str, Any]) -> None:
    """As Istio configures Envoy: the router hears of the response, too, and which endpoint it is from."""
    resources = bootstrap["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    ext_proc = next(f["typed_config"] for f in manager["http_filters"] if f["name"] == "envoy.filters.http.ext_proc")
    ext_proc["processing_mode"]["response_header_mode"] = "SEND"
    ext_proc["metadata_options"]["forwarding_namespaces"] = {"untyped": ["envoy.lb"]}
    pool = next(cluster for cluster in resources["clusters"] if cluster["name"] == POOL)
    policy = pool["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"]
    policy["selected_host_key"] = {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint-served"}]}


@pytest.mark.parametrize("is_silent", [False, True], ids=["refuses", "is silent"])
async def test_an_engine_that_only_the_proxy_cannot_reach_is_down_while_its_stager_lives(tmp_path: Path, is_silent: bool) -> None:
    """Two requests that the proxy sent elsewhere are enough; from then on another endpoint is named first, but for a try every few seconds."""
    layout = Layout(
        nodes=2,
        routers=1,
        engine={"token-ms": "2"},
        hosts={"node-1": "127.0.0.2"},
        settings={"envoy": {"endpoints": "static"}, "router": {"copies": [{"match": "*", "min": 2}]}},
        bootstrap=tells_who_served,
    )
    async with contextlib.AsyncExitStack() as stack:
        fleet = Fleet(layout, tmp_path)
        if is_silent:
            stack.enter_context(taking_no_connection("127.0.0.2", int(fleet.nodes[0].engine.rpartition(":")[2])))
        await stack.enter_async_context(fleet)
        load = await stack.enter_async_context(Load(fleet).running())
        await fleet.until_standing("down", fleet.nodes[0])
        await load.more(8 * REQUESTS_PER_S)
        # Half of all would be, if it counted as ready. A try lasts for as long as Envoy waits for a connection, and everybody takes part in it.
        assert sum([await fleet.metric(router.http, 'lora_extproc_served_total{first="false"}') for router in fleet.routers]) < len(load.answers) / 4
    assert not load.failed


@contextlib.contextmanager
def taking_no_connection(host: str, port: int) -> Iterator[None]:
    """An address at which packets are lost, as far as a client can tell: a queue of connections that is full and that nobody empties."""
    with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
        listening.bind((host, port))
        listening.listen(0)
        for client in (first, second):
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect((host, port))
        yield
