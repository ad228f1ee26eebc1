"""A router of two real worker processes: what comes to whom, and what becomes of a worker that dies, hangs, leaves, or does not start."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
import pytest_asyncio
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.config.read import parse
from extproc.errors import StartError
from extproc.router.board import State
from extproc.router.server import PROCESS_METHOD
from extproc.router.workers import parent, slot
from extproc.router.workers.parent import Workers
from extproc.up.processes import free_ports
from tests.bench.http2_peer import DATA, END_STREAM, GOAWAY, HEADERS, Peer, frame, request
from tests.router.fakes import body, headers
from tests.router.test_http2 import open_stream

from .test_sums import PASSED, values

Status = health_pb2.HealthCheckResponse
POOLS = [{"name": "models", "base_models": ["base"], "endpoints": [{"address": "127.0.0.1:1"}]}]  # without a stager: always ready
PATIENCE_S = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")  # two workers take two seconds to start


async def until(condition: Callable[[], object]) -> None:
    """Processes bring it about, which need the core that a loop without a pause would take."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def settings_of(pools: Sequence[object] = POOLS, **router: object) -> dict[str, Any]:
    names = ("listen", "health_listen", "http_listen")
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(3), strict=True)}
    return {"pools": pools, "router": {"lameduck_s": 0, "drain_s": 10, "workers": 2, **addresses, **router}}


@contextlib.asynccontextmanager
async def running(pools: Sequence[object] = POOLS, **router: object) -> AsyncIterator[Workers]:
    workers = Workers(parse(settings_of(pools, **router), source="test"), 2)
    try:
        await workers.start()
        yield workers
    finally:
        await workers.stop()


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' workers live shortly, and would be replaced ever later. A busy machine is no worker that hangs."""
    for name in ("SILENT_S", "HUNG_S"):
        monkeypatch.setattr(slot, name, PATIENCE_S)
    monkeypatch.setattr(slot, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(slot, "LAST_PAUSE_S", 0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router() -> AsyncIterator[Workers]:
    async with running() as workers:
        yield workers


class Client:
    """One connection, as each of Envoy's threads has one: a new one where the old one broke, or was told to go away."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._peer: Peer | None = None

    async def ask(self) -> bytes:
        """One request for the base model, which any endpoint has; the messages of the answer. Raises OSError if the connection ends before it has come."""
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> bytes:
        if self._peer is None:
            self._peer = Peer(self._address)
        peer = self._peer
        answer = b""
        try:
            stream = peer.open()
            peer.send(frame(DATA, END_STREAM, stream, request("base")))
            for kind, flags, number, payload in peer.frames(PATIENCE_S):
                if kind == -1:
                    raise ConnectionResetError("the router ended the connection")
                if kind == GOAWAY:
                    self._peer = None  # for the next
                if number == stream and kind == DATA:
                    answer += payload
                if number == stream and kind in (HEADERS, DATA) and flags & END_STREAM:
                    break
        except OSError:
            self._peer = None
            raise
        finally:
            if self._peer is None:
                peer.close()
        return answer

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()


@contextlib.asynccontextmanager
async def connections(address: str, count: int) -> AsyncIterator[list[Client]]:
    """That have been made one after the other."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(address))) for _ in range(count)]
        for client in clients:
            await client.ask()
        yield clients


class Load:
    """Asks on each connection, one request after the other, until `stop`."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.answered = 0
        self.failed: list[OSError] = []
        self._over = False
        self._tasks = [asyncio.create_task(self._ask_on(client)) for client in clients]

    async def _ask_on(self, client: Client) -> None:
        while not self._over:
            try:
                await client.ask()
                self.answered += 1
            except OSError as error:
                self.failed.append(error)

    async def answers(self, more: int) -> None:
        """Wait for so many more."""
        enough = self.answered + more
        await until(lambda: self.answered >= enough)

    async def stop(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def scrape(workers: Workers) -> dict[str, float]:
    return values(await workers.front.render())


def busy(workers: Workers) -> list[int]:
    return [slot.row.busy for slot in workers.slots]


def all_serve(workers: Workers) -> bool:
    return all(slot.state is State.SERVING for slot in workers.slots)


def pid_of(workers: Workers, number: int) -> int:
    pid = workers.slots[number].pid
    assert pid is not None
    return pid


async def ask_health(address: str, name: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        return int(reply.status)


async def test_few_connections_are_spread_evenly(router: Workers) -> None:
    """Four to two workers: two each, whoever is asked."""
    async with connections(router.address, 4):
        await until(lambda: [slot.load[1] for slot in router.slots] == [2, 2])
    await until(lambda: [slot.load[1] for slot in router.slots] == [0, 0])


async def test_one_scrape_counts_the_requests_of_all(router: Workers) -> None:
    """Each has answered some of them, and what each says of the fleet is not doubled."""
    before = (await scrape(router)).get(PASSED, 0)
    async with connections(router.address, 4) as clients:
        for client in clients:
            for _ in range(10):
                await client.ask()
    after = await scrape(router)
    assert after[PASSED] - before == 44
    assert after['lora_extproc_owner_share{endpoint="127.0.0.1:1"}'] == 1
    assert after['lora_extproc_workers{state="serving"}'] == 2


async def test_the_http_side_is_of_the_whole(router: Workers) -> None:
    """Health and metrics are the parent's; the rest is what a worker answers, its documentation included."""
    http = router._settings.router.http_listen
    async with aiohttp.ClientSession(f"http://{http}") as session:
        for path, status, part in (
            ("/healthz", 200, '"ok"'),
            ("/readyz", 200, '"ready"'),
            ("/metrics", 200, "lora_extproc_workers{"),
            ("/v1/endpoints", 200, '"standing":"ready"'),
            ("/v1/owner/base?header=a:%20b", 200, '"pool":"models"'),
            ("/openapi.json", 200, "/v1/owner/{model}"),
            ("/docs", 200, "openapi.json"),
            ("/nothing", 404, "Not Found"),
        ):
            async with session.get(path) as response:
                assert (response.status, part in await response.text()) == (status, True), path
        async with session.post("/v1/endpoints") as response:
            assert response.status == 405


async def test_a_worker_killed_under_load_costs_its_own_calls_alone(router: Workers) -> None:
    """It is replaced, the replacement gets its part of the connections, and no sum of counters goes back meanwhile."""
    async with connections(router.address, 4) as clients:
        load = Load(clients)
        await until(lambda: busy(router) == [2, 2])
        counted = [await scrape(router)]
        os.kill(pid_of(router, 0), signal.SIGKILL)
        lives = router.slots[0].lives
        while router.slots[0].lives == lives or not all_serve(router) or min(busy(router)) < 2:
            counted.append(await scrape(router))
            await asyncio.sleep(0.05)
        await load.answers(100)
        counted.append(await scrape(router))
        await load.stop()
    assert len(load.failed) <= 2
    for name in (PASSED, "lora_extproc_queue_position_count", 'lora_extproc_loop_stall_seconds_bucket{le="+Inf"}'):
        series = [one[name] for one in counted]
        assert series == sorted(series), name
    assert counted[-1]['lora_extproc_workers_ended_total{why="died"}'] >= 1


async def test_a_worker_that_hangs_is_replaced(router: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scrape and the control API go on meanwhile, and new connections come to the other."""
    monkeypatch.setattr(slot, "SILENT_S", 1.0)
    monkeypatch.setattr(slot, "HUNG_S", 2.0)
    await until(lambda: all_serve(router))
    lives = router.slots[1].lives
    os.kill(pid_of(router, 1), signal.SIGSTOP)
    await until(lambda: not router.slots[1].can_take)
    async with connections(router.address, 2):
        assert PASSED in await scrape(router)
        assert len(router._answering()) == 1
    await until(lambda: router.slots[1].lives > lives and all_serve(router))
    assert (await scrape(router))['lora_extproc_workers_ended_total{why="hung"}'] == 1


async def test_a_connection_that_a_dead_worker_had_not_taken_is_served_by_another(router: Workers) -> None:
    """It stood in the queue of a process that was stopped."""
    await until(lambda: all_serve(router) and [slot.load[1] for slot in router.slots] == [0, 0])
    stopped = min(router.slots, key=lambda slot: slot.load)
    given = stopped.given
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    with contextlib.closing(Client(router.address)) as client:
        asked = asyncio.create_task(client.ask())
        await until(lambda: stopped.given > given)
        os.kill(stopped.pid, signal.SIGKILL)
        await asked


async def test_a_worker_that_is_asked_to_leave_costs_nothing(router: Workers) -> None:
    """SIGTERM to one of them: its clients go to the other, and it is replaced when it is done."""
    await until(lambda: all_serve(router))
    lives = router.slots[0].lives
    async with connections(router.address, 4) as clients:
        load = Load(clients)
        await load.answers(50)
        os.kill(pid_of(router, 0), signal.SIGTERM)
        await until(lambda: router.slots[0].lives > lives and all_serve(router))
        await load.answers(50)
        await load.stop()
    assert load.failed == []


async def test_a_worker_that_cannot_start_makes_the_whole_not_ready(router: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, in words, to probes and to gateways; the other serves on; and it is ready again when the worker is back."""
    monkeypatch.setattr(parent, "ABSENT_S", 0.5)
    await until(lambda: all_serve(router))
    begin = router.begin

    def fail_to_begin(slot: slot.Slot, orders: int) -> Sequence[str]:
        begin(slot, orders)
        return ("no-such-command",)

    addresses = router._settings.router
    with monkeypatch.context() as broken:
        broken.setattr(router, "begin", fail_to_begin)
        lives = router.slots[0].lives
        os.kill(pid_of(router, 0), signal.SIGKILL)
        await until(lambda: router._why_not_ready() is not None and router.slots[0].lives > lives + 1)
        async with aiohttp.ClientSession(f"http://{addresses.http_listen}") as session, session.get("/readyz") as response:
            said = await response.json()
        assert response.status == 503
        assert said["why"].startswith("worker 0 has not served for ")
        assert said["why"].endswith(" s: it ended with code 2")
        await until(lambda: router.slots[1]._follows is False)
        for address in (addresses.listen, addresses.health_listen):
            assert await ask_health(address) == Status.NOT_SERVING
            assert await ask_health(address, "liveness") == Status.SERVING
        async with connections(router.address, 1):
            pass
    await until(lambda: all_serve(router) and router._why_not_ready() is None)
    await until(lambda: router.slots[1]._follows)
    for address in (addresses.listen, addresses.health_listen):
        assert await ask_health(address) == Status.SERVING


async def test_a_worker_that_cannot_be_started_for_want_of_descriptors_is_started_later(router: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many may be open that are not the router's own doing."""
    await until(lambda: all_serve(router))
    lives, refused = router.slots[0].lives, 0

    def refuse() -> tuple[socket.socket, socket.socket]:
        nonlocal refused
        refused += 1
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as full:
        full.setattr(socket, "socketpair", refuse)
        os.kill(pid_of(router, 0), signal.SIGKILL)
        await until(lambda: refused)
    await until(lambda: router.slots[0].lives > lives and all_serve(router))


async def test_pauses_between_short_lives_grow_to_a_bound() -> None:
    """So that a worker that dies at each start takes no core."""
    pauses = [slot.pause_s(lives) for lives in range(20)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == slot.LAST_PAUSE_S


async def test_a_drain_is_of_all_workers(caplog: pytest.LogCaptureFixture) -> None:
    """NOT_SERVING at once, held requests of both are answered, no new connection is taken, and every process is gone at the end."""
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with running(drain_s=30) as workers, contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(workers.address, own)) for _ in range(2)]
        held = [open_stream(channel, PROCESS_METHOD) for channel in channels]
        for call in held:
            await call.write(headers().SerializeToString())
        await until(lambda: sum(slot.row.taken for slot in workers.slots) == 2)
        pids = [pid_of(workers, number) for number in range(2)]
        http, health = workers._settings.router.http_listen, workers._settings.router.health_listen
        stopping = asyncio.create_task(workers.stop())
        await until(lambda: [slot.state for slot in workers.slots] == [State.LEAVING] * 2)
        async with aiohttp.ClientSession(f"http://{http}") as session, session.get("/readyz") as response:
            assert (response.status, (await response.json())["why"]) == (503, "draining")
        with pytest.raises(grpc.aio.AioRpcError):
            await ask_health(health)
        for call in held:
            await call.write(body(b'{"model":"base"}').SerializeToString())
            assert await call.read()
            await call.done_writing()
        await stopping
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert "another is started" not in caplog.text


async def test_new_connections_are_taken_until_the_gateways_know() -> None:
    """Lame duck: every worker drains already, and what comes is served."""
    async with running(lameduck_s=1) as workers:
        stopping = asyncio.create_task(workers.stop())
        await until(lambda: [slot.state for slot in workers.slots] == [State.LEAVING] * 2)
        assert await ask_health(workers.address) == Status.NOT_SERVING
        async with connections(workers.address, 2):
            pass
        await stopping


async def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """However it dies, and also one that is stopped; a router that is started at once has the port."""
    settings = settings_of()
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "extproc", "router", "--config", str(config)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = await asyncio.to_thread(subprocess.Popen, command, stderr=file)
    try:
        await until(lambda: "the router is ready" in log.read_text())
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) == 2
        os.kill(children[0], signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()
    await until(lambda: not any(lives(pid) for pid in children))
    socket.create_server(("127.0.0.1", int(settings["router"]["listen"].rpartition(":")[2]))).close()


def lives(pid: int) -> bool:
    """Not as a zombie, which nobody may be there to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_all_workers_show_one_certificate() -> None:
    """Also where it is made at the start."""
    async with running(tls={"mode": "self-signed"}) as workers:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        shown = set()
        for _ in range(2):
            _, writer = await asyncio.open_connection(*workers.address.split(":"), ssl=context)
            shown.add(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            writer.close()
        await until(lambda: [slot.row.taken for slot in workers.slots] == [1, 1])
        assert len(shown) == 1


async def test_a_worker_that_does_not_start_at_first_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole ends as one process would, and leaves nothing."""
    begin = Workers.begin

    def fail_to_begin(self: Workers, slot: slot.Slot, orders: int) -> Sequence[str]:
        return ("no-such-command",) if slot.number else begin(self, slot, orders)

    monkeypatch.setattr(Workers, "begin", fail_to_begin)
    with pytest.raises(StartError, match="worker 1 of the router ended with code 2 before it served"):
        async with running():
            pass


async def test_a_limit_on_waiting_requests_is_of_all_workers() -> None:
    """One waits for any endpoint in one worker; that was the only place, and in the other the next is refused."""
    nobody = [{"name": "models", "base_models": ["base"], "endpoints": [{"address": "127.0.0.1:1", "stager": f"127.0.0.1:{free_ports(1)[0]}"}]}]
    async with running(nobody, max_waiting=1, no_endpoint_wait_s=60, drain_s=0) as workers:
        for api in workers._answering():
            while b'"standing":"down"' not in await (await api.ask("GET", "/v1/endpoints", {}, b"")).read():
                await asyncio.sleep(0.01)
        with contextlib.closing(Client(workers.address)) as one, contextlib.closing(Client(workers.address)) as other:
            waiting = asyncio.create_task(one.ask())
            await until(lambda: workers.slots[0].row.all_waiting() == 1)
            assert b"1 requests wait; the limit is 1" in await other.ask()
            assert [slot.given for slot in workers.slots] == [1, 1]
            assert (await scrape(workers))["lora_extproc_held_requests"] == 1
            await workers.stop()
            assert await waiting  # a drain answers it


async def test_a_busy_port_is_a_start_error(router: Workers) -> None:
    """Named in the sentence, before any worker is started: the port is not shared."""
    with pytest.raises(StartError, match=router.address):
        async with running(listen=router.address):
            pass
