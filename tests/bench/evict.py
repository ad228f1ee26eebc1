"""`python -m tests.bench.evict`: room on a node whose engine knows twenty thousand adapters by name, while it is busy.

Three things are asked of the stager. A trim: how long it takes, how often it calls the engine for each victim beside the one unload that each needs, and
whether what was used last is what is left, in its order. The same for a flight that needs room while the engine's queue is never empty, which must end in
"no room" without an unload. And how long the event loop stood still meanwhile, beside an idle one. The engine is the simulated one, in a process of its
own, with the names loaded from the start, requests that run, and a queue.
"""

import argparse
import asyncio
import gc
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web
from rich.console import Console
from rich.table import Table

from extproc.config.stager import EngineSettings, StagerSettings
from extproc.core.artifact import ArtifactId, versioned_name
from extproc.errors import NoSpace
from extproc.metrics import StagerMetrics
from extproc.process.loop import GC_THRESHOLD
from extproc.sim.adapters import Adapters
from extproc.sim.app import SimEngine
from extproc.stager.engine.api import Engine
from extproc.stager.stager import HOUSEKEEPING_S, Stager
from extproc.up.demo import BASE_MODEL
from extproc.up.processes import free_ports

from .harness import machine
from .index import fill

TICK_S = 0.001
IDLE_S = 2.0
RUNNING = 8  # adapters with requests at work, those that were used last
QUEUE_S = 0.07  # that requests wait for, and that none waits after; out of step with the pauses between looks
PATIENCE_S = 120.0  # with a trim that is broken off because they do, and begun again as housekeeping does

LOOKS = ("/v1/models", "/metrics")
UNLOAD = "/v1/unload_lora_adapter"


def names_in(node: Path) -> dict[str, str]:
    """Each artifact's name in the engine, and its directory, least recently used first."""
    links = [path for path in node.glob("*/*") if path.is_symlink()]
    found = {path.resolve(): str(path.relative_to(node)) for path in links}
    return {versioned_name(found[path], path.name): str(path) for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)}  # type: ignore[arg-type]


async def engine(port: int, node: Path) -> None:
    """What the bench runs in another process. `POST /bench/queue?length=` sets how many requests wait; -1: some, half of the time."""
    adapters = Adapters(base_model="base", root=BASE_MODEL, cache_dir=str(node), max_loras=RUNNING, max_cpu_loras=RUNNING, max_lora_rank=8)
    adapters.registry.update(names_in(node))
    adapters.scheduler.running.update(list(adapters.registry)[-RUNNING:])
    calls: Counter[str] = Counter()
    length = 0

    @web.middleware
    async def count(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        calls[request.path.rstrip("/")] += 1
        adapters.scheduler.waiting = length if length >= 0 else int(time.monotonic() % (2 * QUEUE_S) < QUEUE_S)
        return await handler(request)

    async def queue(request: web.Request) -> web.Response:
        nonlocal length
        length = int(request.query["length"])
        return web.Response()

    async def told(_request: web.Request) -> web.Response:
        return web.json_response(calls)

    app = SimEngine(adapters).app()
    app.middlewares.insert(0, count)
    app.add_routes([web.post("/bench/queue", queue), web.get("/bench/calls", told)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("serves", flush=True)
    await asyncio.Event().wait()


class Stops:
    """How long the loop stood still at most since it was last asked, in seconds."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._task = asyncio.create_task(self._tick())

    def take(self) -> float:
        longest, self._longest = self._longest, 0.0
        return longest

    async def _tick(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self._longest = max(self._longest, time.perf_counter() - began - TICK_S)


class Rig:
    """A stager with a full index in this process, and its engine in another."""

    def __init__(self, stager: Stager, session: aiohttp.ClientSession, url: str) -> None:
        self.stager = stager
        self._session = session
        self._url = url

    async def queue(self, length: int) -> None:
        async with self._session.post(f"{self._url}/bench/queue", params={"length": length}) as response:
            response.raise_for_status()

    async def calls(self) -> Counter[str]:
        async with self._session.get(f"{self._url}/bench/calls") as response:
            return Counter(await response.json())

    def order(self) -> list[ArtifactId]:
        return [entry.id for entry in self.stager.node.holdings.index.entries()]


async def trim(rig: Rig, victims: int) -> tuple[int, bool]:
    """How many went, and whether those that had been used before all that is left."""
    index, before = rig.stager.node.holdings.index, rig.order()
    limit, began = index.used_bytes - victims * (index.used_bytes // len(index)), time.monotonic()
    while await rig.stager._remover.trim(limit) is not None and time.monotonic() - began < PATIENCE_S:
        await asyncio.sleep(HOUSEKEEPING_S)
    after = rig.order()
    return len(before) - len(after), after == before[len(before) - len(after) :]


async def need_room(rig: Rig, _victims: int) -> tuple[int, bool]:
    """A flight on a full disk."""
    index, before = rig.stager.node.holdings.index, rig.order()
    index.max_bytes, limit = index.used_bytes, index.max_bytes
    try:
        await rig.stager._remover.reserve("bench", 4096)
    except NoSpace:
        pass
    finally:
        index.abort("bench")
        index.max_bytes = limit
    after = rig.order()
    return len(before) - len(after), after == before[len(before) - len(after) :]


async def main(count: int, victims: int, directory: str | None) -> None:
    """Print a table with one line for each case."""
    console = Console(width=140)
    console.print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-evict-", dir=directory) as top:
        node, (port,) = Path(top) / "node", free_ports(1)
        fill(node, count)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.evict", "--engine", str(port), "--dir", str(node), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        await child.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        limits = {"max_bytes": 2**50, "revalidate_s": 0.0, "claim_wait_s": 0.0, "free_share": 0.0}
        settings = StagerSettings(dir=str(node), engine=EngineSettings(url=url, base_model=BASE_MODEL), adopt=False, **limits)  # type: ignore[arg-type]
        stager = Stager(settings, [], Engine(settings.engine), StagerMetrics())
        await stager.open()
        try:
            async with aiohttp.ClientSession() as session:
                await measure(console, Rig(stager, session, url), count, victims)
        finally:
            await stager.close()
            child.terminate()
            await child.wait()


async def measure(console: Console, rig: Rig, count: int, victims: int) -> None:
    while len(rig.stager.node.loads) < count:
        await asyncio.sleep(0.1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 50)  # as the stager's process does
    stops = Stops()
    table = Table("case", "s", "gone", "looks", "looks per victim", "unloads", "longest stop ms", "order kept")
    await asyncio.sleep(IDLE_S)
    table.add_row("nothing", f"{IDLE_S:.1f}", "0", "", "", "", f"{stops.take() * 1000:.1f}", "")
    for case, length, work in (
        ("trim, requests run", 0, trim),
        ("trim, a queue half of the time", -1, trim),
        ("a flight, the queue never empty", 1, need_room),
        ("a flight, requests run", 0, need_room),
    ):
        await rig.queue(length)
        calls, began = await rig.calls(), time.perf_counter()
        stops.take()
        gone, in_order = await work(rig, victims)
        took, longest = time.perf_counter() - began, stops.take()
        calls = await rig.calls() - calls
        looks = sum(calls[path] for path in LOOKS)
        figures = f"{took:.1f}", str(gone), str(looks), f"{looks / gone:.3f}" if gone else "", str(calls[UNLOAD]), f"{longest * 1000:.1f}"
        table.add_row(case, *figures, "yes" if in_order else "NO")
    console.print(f"{count} adapters, all of them loaded; {victims} are to go in a trim; {RUNNING} adapters' requests run")
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--trim", type=int, default=1_000)
    parser.add_argument("--dir", help="where to put the node; its file system is measured too")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        uvloop.run(engine(arguments.engine, Path(arguments.dir)))
    else:
        uvloop.run(main(arguments.count, arguments.trim, arguments.dir))
