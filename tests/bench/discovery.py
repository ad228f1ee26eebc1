"""`python -m tests.bench.discovery`: what following a fleet that changes ten times a second takes from the event loop, beside the same loop at rest.

Another process writes: a tenth of the endpoints is replaced each time. The loop is asked every 5 ms for its turn; how late it gets it is what requests
would notice. First at rest, then while the fleet changes, with the same source.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from extproc.config.discovery import DiscoverySettings
from extproc.config.pools import PoolSettings
from extproc.core.fleet import Fleet
from extproc.discovery.discovery import Discovery
from extproc.discovery.sources import build_sources
from extproc.metrics import RouterMetrics
from tests.fakes.etcd import EtcdServer

from .harness import machine

PERIOD_S = 0.1
TICK_S = 0.005
TEXTS = 8  # that the writer of a file puts there in turn
PREFIX = "/fleet/bench/"


@dataclass(frozen=True)
class Seen:
    """One phase. Shares are of one core."""

    loop_share: float
    process_share: float
    p99_ms: float
    longest_ms: float


def endpoints(count: int, replaced: float = 0) -> list[dict[str, str]]:
    """The fleet, with a new instance for some of it."""
    return [
        {
            "address": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:8000",
            "stager": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:9102",
            "node": f"node-{n}",
            "instance": f"{n}-{random.random() if random.random() < replaced else 0}",
        }
        for n in range(1, count + 1)
    ]


async def write(kind: str, place: str, count: int) -> None:
    """Change the fleet until killed."""
    if kind == "etcd":
        server = EtcdServer(Path("/nonexistent"))
        server.url = place
        while True:
            await server.put_many({PREFIX + one["node"]: one for one in random.sample(endpoints(count, 1), max(1, count // 10))})
            await asyncio.sleep(PERIOD_S)
    texts = [text(kind, endpoints(count, 0.1)) for _ in range(TEXTS)]
    while True:
        for one in texts:
            fresh = Path(place).with_suffix(".new")
            fresh.write_text(one)
            fresh.rename(place)
            await asyncio.sleep(PERIOD_S)


def text(kind: str, values: list[dict[str, str]]) -> str:
    return json.dumps(values) if kind == "json" else yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))


async def watch_loop(seconds: float) -> Seen:
    late: list[float] = []
    process, thread, began = time.process_time(), time.thread_time(), time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        await asyncio.sleep(TICK_S)
        late.append(time.perf_counter() - now - TICK_S)
    took = time.perf_counter() - began
    late.sort()
    return Seen((time.thread_time() - thread) / took, (time.process_time() - process) / took, late[len(late) * 99 // 100] * 1e3, late[-1] * 1e3)


@contextlib.asynccontextmanager
async def place_of(kind: str, count: int, directory: Path) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Where the writer writes, and the source's settings."""
    if kind == "etcd":
        server = EtcdServer(directory)
        await server.start()
        try:
            await server.until_ready()
            await server.put_many({PREFIX + one["node"]: one for one in endpoints(count)})
            yield server.url, {"type": "etcd", "endpoints": [server.url], "prefix": PREFIX}
        finally:
            await server.stop()
    else:
        path = directory / f"fleet.{kind}"
        path.write_text(text(kind, endpoints(count)))
        yield str(path), {"type": "file", "path": str(path)}


async def measure(kind: str, count: int, seconds: float) -> tuple[Seen, Seen, int]:
    fleets = 0

    async def apply(fleet: Fleet) -> None:
        nonlocal fleets
        assert len(fleet["p"]) == count
        fleets += 1

    taker: Callable[[Fleet], Awaitable[None]] = apply
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        async with place_of(kind, count, directory) as (place, source):
            pool = PoolSettings.model_validate({"name": "p", "discovery": [source]})
            discovery = Discovery(build_sources([pool]), DiscoverySettings(dir=str(directory / "kept")), RouterMetrics().discovery)
            await discovery.first()
            discovery.follow(taker)
            rest = await watch_loop(seconds)
            writer = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.bench.discovery", "--write", kind, place, "--endpoints", str(count))
            while not fleets:  # the writer has begun
                await asyncio.sleep(PERIOD_S)
            fleets = 0
            busy = await watch_loop(seconds)
            writer.kill()
            await writer.wait()
            await discovery.stop()
    return rest, busy, fleets


async def compare(kinds: list[str], counts: list[int], seconds: float) -> None:
    table = Table("source", "endpoints", "fleets/s", "loop's share", "process's share", "late p99 ms", "longest ms", title=machine())
    for kind in kinds:
        for count in counts:
            rest, busy, fleets = await measure(kind, count, seconds)
            for what, seen, rate in (("at rest", rest, 0.0), ("changing", busy, fleets / seconds)):
                figures = (f"{seen.loop_share:.1%}", f"{seen.process_share:.1%}", f"{seen.p99_ms:.1f}", f"{seen.longest_ms:.1f}")
                table.add_row(f"{kind}, {what}", str(count), f"{rate:.1f}", *figures)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoints", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--source", nargs="+", default=["json", "yaml", "etcd"], choices=["json", "yaml", "etcd"])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--write", nargs=2, metavar=("SOURCE", "PLACE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.write:
        kind, place = arguments.write
        uvloop.run(write(kind, place, arguments.endpoints[0]))
    else:
        uvloop.run(compare(arguments.source, arguments.endpoints, arguments.seconds))


if __name__ == "__main__":
    main()
