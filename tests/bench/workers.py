"""`python -m tests.bench.workers`: warm requests per second of a router with one worker and with several, and what each request costs.

The port is driven straight with prerecorded ext_proc frames, as Envoy's connections would: a generator that parses nothing but frame heads takes a tenth
of what the router does, so that two cores are enough to see something. All routers live side by side and are measured in turns.

Two ratios stand beside each other. `wall` is requests per second against one worker's, and counts where the machine has a core for each worker and some
for the generator. `by CPU` is the number of workers times what a request costs one worker over what it costs them: what they would do if the generator
took none of their time. Both are below the number of workers by what cores share: caches, memory, and on many machines the cores themselves. How much
that is, shows a row of as many routers with one worker each, which have nothing to do with each other.
"""

import argparse
import asyncio
import collections
import contextlib
import multiprocessing
import selectors
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from extproc.process.cores import cores
from extproc.up.demo import write_adapter
from extproc.up.processes import Child, free_ports, python, spawn, stop

from .harness import ADAPTER, TICKS, machine
from .http2_peer import (
    ACK,
    CALL,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Peer,
    block,
    frame,
    request,
)

CONNECTIONS = 4  # per worker, so that each has the same to do however many there are
WORKERS_PER_GENERATOR = 4  # a generator takes about an eighth of the core that it keeps busy
IN_FLIGHT = 8  # per connection: enough that the router never waits for the generator's turn
TRIALS = 500  # of the spread


class Connection:
    """Keeps IN_FLIGHT exchanges open; counts those that have ended."""

    def __init__(self, address: str) -> None:
        self.address = address
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fields, messages = block(CALL), request(ADAPTER)
        self._parts = (frame(HEADERS, END_HEADERS, 0, fields)[:5], fields + frame(DATA, END_STREAM, 0, messages)[:5], messages)
        self._next = 3
        self._rest = b""
        self._leaves = False
        self.ended = 0
        first = frame(HEADERS, END_HEADERS, 1, b"\x20" + fields) + frame(DATA, END_STREAM, 1, messages)  # the table's size is 0 from here on
        self._send(PREFACE + frame(SETTINGS, 0, 0) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)) + first)
        self._open(IN_FLIGHT - 1)

    def _send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _open(self, count: int) -> None:
        head, middle, end = self._parts
        numbers = [struct.pack(">I", self._next + 2 * n) for n in range(count)]
        self._next += 2 * count
        self._send(b"".join(part for number in numbers for part in (head, number, middle, number, end)))

    @property
    def is_over(self) -> bool:
        """Whether it was told to go away, and has nothing open any more."""
        return self._leaves and self.ended == (self._next - 1) // 2

    def read(self) -> None:
        """Take what has come, and open as many exchanges as have ended."""
        more = self.socket.recv(2**18)
        if not more:
            raise SystemExit("the router closed a connection")
        data = self._rest + more
        at, ended, size = 0, 0, len(data)
        while size - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            kind, flags = data[at + 3], data[at + 4]
            if at + 9 + length > size:
                break
            if kind == HEADERS and flags & END_STREAM:
                ended += 1
            elif kind in (RST_STREAM, GOAWAY):
                first = at + 9 if kind == RST_STREAM else at + 13
                if any(data[first : first + 4]):
                    raise SystemExit("the router reset a stream or the connection")
                self._leaves = self._leaves or kind == GOAWAY
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self._send(frame(kind, ACK, 0, data[at + 9 : at + 9 + length] if kind == PING else b""))
            at += 9 + length
        self._rest = data[at:]
        self.ended += ended
        if ended:
            self._send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(more))))
            if not self._leaves:
                self._open(ended)


def generate(addresses: Sequence[str], seconds: float) -> tuple[int, float, float]:
    """Load these with CONNECTIONS each; exchanges, seconds, and seconds of CPU."""
    ended = 0
    with selectors.DefaultSelector() as selector:

        def connect(address: str) -> None:
            connection = Connection(address)
            selector.register(connection.socket, selectors.EVENT_READ, connection)

        for address in list(addresses) * CONNECTIONS:
            connect(address)
            time.sleep(0.02)  # as Envoy's threads come, one by one
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - began < seconds:
            for key, _ in selector.select(1.0):
                connection = key.data
                ended -= connection.ended
                connection.read()
                ended += connection.ended
                if connection.is_over:
                    selector.unregister(connection.socket)
                    connection.socket.close()
                    connect(connection.address)
        took = time.monotonic() - began
        for key in tuple(selector.get_map().values()):
            key.data.socket.close()
        return ended, took, time.process_time() - cpu


@dataclass(frozen=True)
class Arrangement:
    """One router with workers, or several with one each."""

    name: str
    routers: Sequence[Child]
    addresses: Sequence[str]  # one for each worker


@dataclass(frozen=True)
class Measured:
    """One run."""

    rate: float
    router_us: float  # of CPU per request, of all its processes
    generator_us: float
    busiest: float  # of the CPU of all workers, the part of the busiest


@contextlib.asynccontextmanager
async def arrangements(counts: Sequence[int]) -> AsyncIterator[list[Arrangement]]:
    """One router for each number of workers, and as many single ones as the last number says. All are before one stager, which has the adapter."""
    with tempfile.TemporaryDirectory(prefix="lora-extproc-bench-") as temporary:
        directory = Path(temporary)
        write_adapter(directory / "origin" / ADAPTER, seed=1, rank=8, hidden=512, layers=2)
        stager, *listens = (f"127.0.0.1:{port}" for port in free_ports(1 + len(counts) + counts[-1]))
        children: list[Child] = []
        raw: dict[str, object] = {
            "pools": [{"name": "models", "endpoints": [{"address": "127.0.0.1:1", "stager": stager}]}],
            "stager": {
                "listen": stager,
                "http_listen": "",
                "dir": str(directory / "node"),
                "origins": [{"type": "file", "path": str(directory / "origin")}],
                "engine": {"url": ""},
            },
        }

        async def start(name: str, command: str, **router: object) -> Child:
            path = directory / f"{name}.yaml"
            raw["router"] = {"health_listen": "", "http_listen": "", "lameduck_s": 0, "drain_s": 1, **router}
            path.write_text(yaml.safe_dump(raw))
            children.append(await spawn(name, python(command, "--config", str(path)), directory))
            return children[-1]

        try:
            await start("stager", "stager")
            together = [
                Arrangement(f"{count}", [await start(f"router-{count}", "router", listen=listen, workers=count)], [listen] * count)
                for count, listen in zip(counts, listens, strict=False)
            ]
            alone = listens[len(counts) :]
            singles = [await start(f"single-{number}", "router", listen=listen) for number, listen in enumerate(alone)]
            for listen in listens:
                await asyncio.to_thread(_until_it_answers, listen)
            yield [*together, Arrangement(f"{counts[-1]} routers", singles, alone)]
        finally:
            await stop(children, 5.0)


def _until_it_answers(address: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), contextlib.closing(Peer(address)) as peer:
            if peer.exchange(ADAPTER, 30.0):
                return
        time.sleep(0.2)
    raise SystemExit(f"the router at {address} does not answer")


async def measure(arrangement: Arrangement, seconds: float) -> Measured:
    """Load one arrangement for a while, from processes of their own."""
    addresses = arrangement.addresses
    generators = -(-len(addresses) // WORKERS_PER_GENERATOR)
    before = _cpu(arrangement.routers)
    with multiprocessing.get_context("spawn").Pool(generators) as pool:
        done = await asyncio.to_thread(pool.starmap, generate, [(addresses[n::generators], seconds) for n in range(generators)])
    after = _cpu(arrangement.routers)
    spent = [after[pid] - before.get(pid, 0.0) for pid in after]
    answered = sum(count for count, _, _ in done)
    cpu_s = sum(cpu for _, _, cpu in done)
    return Measured(sum(count / took for count, took, _ in done), sum(spent) * 1e6 / answered, cpu_s * 1e6 / answered, max(spent) / sum(spent))


def _cpu(routers: Sequence[Child]) -> dict[int, float]:
    return {pid: cpu_s for router in routers for pid, cpu_s in _cpu_of_family(router.process.pid)}


def _cpu_of_family(pid: int) -> Iterator[tuple[int, float]]:
    """CPU seconds so far of a process and of all that it has started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    yield pid, (int(fields[11]) + int(fields[12])) / TICKS
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _cpu_of_family(int(child))


def spread(workers: int, connections: int) -> collections.Counter[int]:
    """How many of the connections the busiest of several sockets on one port gets (SO_REUSEPORT), over TRIALS."""
    most: collections.Counter[int] = collections.Counter()
    for _ in range(TRIALS):
        with contextlib.ExitStack() as stack:
            port, sockets = 0, []
            for _ in range(workers):
                listening = stack.enter_context(socket.socket())
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listening.bind(("127.0.0.1", port))
                listening.listen(64)
                listening.setblocking(False)
                port = listening.getsockname()[1]
                sockets.append(listening)
            for _ in range(connections):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            most[max(_accepted(listening) for listening in sockets)] += 1
    return most


def _accepted(listening: socket.socket) -> int:
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listening.accept()[0].close()
            count += 1
    return count


async def main(counts: Sequence[int], seconds: float, rounds: int) -> None:
    """Take turns, print medians and both ratios."""
    async with arrangements(counts) as arranged:
        runs: dict[str, list[Measured]] = {arrangement.name: [] for arrangement in arranged}
        for arrangement in arranged:
            await measure(arrangement, 1.0)  # leases, caches
        for _ in range(rounds):
            for arrangement in arranged:
                runs[arrangement.name].append(await measure(arrangement, seconds))
    names = ("rate", "router_us", "generator_us", "busiest")
    medians = {name: Measured(**{field: statistics.median(getattr(run, field) for run in measured) for field in names}) for name, measured in runs.items()}
    one = medians[arranged[0].name]
    console = Console(width=120)
    table = Table("workers", "req/s", "router us/req", "busiest", "generator us/req", "wall", "by CPU", title=machine(), title_justify="left")
    for arrangement in arranged:
        m = medians[arrangement.name]
        ratios = f"{m.rate / one.rate:.2f}", f"{len(arrangement.addresses) / counts[0] * one.router_us / m.router_us:.2f}"
        table.add_row(arrangement.name, f"{m.rate:.0f}", f"{m.router_us:.1f}", f"{m.busiest:.0%}", f"{m.generator_us:.1f}", *ratios)
    console.print(table)
    console.print(
        f"medians of {rounds} runs of {seconds:g} s, {CONNECTIONS} connections per worker with {IN_FLIGHT} requests each; {cores()} cores for everything"
    )
    console.print(f"\nConnections of the busiest socket where several listen on one port (SO_REUSEPORT), of {TRIALS} trials; the parent gives each its part:")
    for workers, count in ((2, 2), (4, 4), (4, 8), (8, 8)):
        shares = ", ".join(f"{most}: {times / TRIALS:.0%}" for most, times in sorted(spread(workers, count).items()))
        console.print(f"  {count} connections, {workers} workers: {shares} (even: {-(-count // workers)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workers", type=lambda text: [int(count) for count in text.split(",")], default=[1, max(2, cores())], help="numbers, the first to compare with"
    )
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.workers, arguments.seconds, arguments.rounds))
