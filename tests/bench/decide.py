"""`python -m tests.bench.decide`: what one decision costs a router of a large fleet, what its index weighs, and for how long a change of the fleet stops its loop.

The router's real parts are filled as they are in service: leases, copies and engine loads of 1,000 endpoints with 100,000 adapters, of which requests ask by
Zipf 1.0. A decision is `decide`, `Staging.now` and the counting of what was sent. Times are of the thread's CPU, so that what else the machine does
is not in them; the stops of the loop are also given as the clock shows them. Beside each decision `json` reads one request's body, which is always the same work:
what its p99 has above its p50 is the machine's.
"""

import argparse
import asyncio
import gc
import json
import random
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from extproc.core.copies import Copies
from extproc.core.decision import Facts, Forward, decide
from extproc.core.endpoint import Endpoint
from extproc.core.fleet import Found
from extproc.core.load import Engine
from extproc.core.maglev import LookupTable
from extproc.core.paths import Paths
from extproc.core.placement import Pool
from tests.router.fakes import Router, ScriptedStager

from .harness import machine

SLOTS = 16
IN_FLIGHT = 19.2  # at each engine on average: 60 % of 32
LEASED = 16_000  # adapters, the hottest: as many as 1,000 engines keep in memory
TICK_S = 0.001
CHANGES = 20
BODY = json.dumps({"model": "tenant/adapter", "messages": [{"role": "user", "content": f"question {n} of a chat"} for n in range(24)]})


def endpoints(count: int) -> list[Endpoint]:
    hosts = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(1, count + 1)]
    return [Endpoint(f"{host}:8000", f"node-{host}", f"{host}:9102", "1") for host in hosts]


def pool_of(places: Sequence[Endpoint]) -> Pool:
    return Pool("models", frozenset({"base"}), ("*",), LookupTable(places))


async def router_of(nodes: int, adapters: int, rng: random.Random) -> Router:
    """A router that knows where everything is."""
    pool = pool_of(endpoints(nodes))
    router = Router(pools=[pool])
    for endpoint in pool.table.endpoints:
        router.stagers[endpoint.stager] = ScriptedStager(endpoint.stager)
        running = max(0.0, rng.gauss(IN_FLIGHT, IN_FLIGHT / 8))
        router.membership.loads["models"].say(endpoint.address, Engine(running, 0, SLOTS, 0.25, 4), 0.0)
        router.membership.loads["models"].demand(endpoint.address, SLOTS, SLOTS)
    for rank in range(adapters):
        name = f"tenant-{rank % 500}/adapter-{rank}"
        first, *others = pool.candidates(name, 8)
        copies = 8 if rank < 10 else 3 if rank < 200 else 1
        if rank < LEASED:
            for endpoint in (first, *others)[:copies]:
                await router.residency.ensure(endpoint, name)
        else:
            router.residency.copies.put(first.stager, name, warm=False)
        if rank % 3 == 0:
            router.residency.copies.put(others[0].stager, name, warm=False)
    return router


async def decisions(nodes: int, adapters: int, count: int, rng: random.Random) -> tuple[list[float], list[float], float]:
    """Microseconds of each, and of each read of a body beside it, both sorted; and the share of requests that were let go at once."""
    router = await router_of(nodes, adapters, rng)
    weights = list(accumulate(1 / (rank + 1) for rank in range(adapters)))
    path, policy, membership, staging = Paths(router.settings.paths).path("/v1/chat/completions"), router.settings.policy(), router.membership, router.staging
    took: list[float] = []
    read: list[float] = []
    at_once = 0
    gc.collect()
    gc.freeze()  # as a router does once it serves
    for _ in range(count):
        rank = bisect_left(weights, rng.random() * weights[-1])
        name = f"tenant-{rank % 500}/adapter-{rank}"
        router.now += 1 / (nodes * IN_FLIGHT / 4)
        began = time.thread_time_ns()
        decision = decide(Facts("POST", path, {}, name, can_rename=True), membership.snapshot, policy)
        assert isinstance(decision, Forward)
        placed = staging.now(decision)
        if placed is not None:
            staging.count(decision, placed)
            membership.send("models", placed.endpoints[0])
        took.append((time.thread_time_ns() - began) / 1000)
        began = time.thread_time_ns()
        json.loads(BODY)
        read.append((time.thread_time_ns() - began) / 1000)
        at_once += placed is not None
        if len(took) % 1000 == 0:
            for loads in membership.loads.values():
                loads.sweep(router.now)
            await asyncio.sleep(0)
    await router.residency.close()
    gc.unfreeze()
    return sorted(took), sorted(read), at_once / count


# ---- memory


def memory_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def index_bytes(nodes: int, each: int) -> int:
    """Of `nodes` nodes that have `each` adapters, each of which is on two of them. Names come as text of their own from every stager."""
    before = memory_bytes()
    copies = Copies()
    for node in range(nodes):
        for number in range(each):
            copies.put(f"10.0.0.{node}:9102", f"tenant/adapter-{(node // 2) * each + number}", warm=number < SLOTS)
    used = memory_bytes() - before
    assert len(copies) == nodes * each // 2
    return used


def keys_bytes(nodes: int, keys: int) -> int:
    """Of a fleet that was asked for so many keys, each of which has a copy."""
    before = memory_bytes()
    pool = pool_of(endpoints(nodes))
    copies = Copies()
    for number in range(keys):
        name = f"tenant/adapter-{number}"
        copies.put(pool.candidates(name)[0].stager, name, warm=False)
    used = memory_bytes() - before
    assert len(copies) == keys
    return used


# ---- changes


async def stops(nodes: int, rng: random.Random) -> tuple[list[float], list[float]]:
    """Milliseconds between two turns of the loop while one endpoint is replaced again and again, sorted: of the loop's own CPU, and by the clock."""
    router = await router_of(nodes, 10 * nodes, rng)
    membership = router.membership
    turns: list[tuple[float, float]] = []
    is_over = False

    async def tick() -> None:
        while not is_over:
            turns.append((time.thread_time(), time.perf_counter()))
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    fleet = list(membership.snapshot.pools[0].table.endpoints)
    for change in range(CHANGES):
        place = rng.randrange(nodes)
        old = fleet[place]
        fleet[place] = Endpoint(old.address, old.node, old.stager, f"{change + 2}")
        await membership.apply({"models": [Found(endpoint) for endpoint in fleet]})
        await asyncio.sleep(TICK_S)
    is_over = True
    await ticking
    await membership.stop()
    await router.residency.close()
    cpu, wall = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(turns)), strict=True)
    return sorted(1000 * value for value in cpu), sorted(1000 * value for value in wall)


def main(nodes: int, adapters: int, requests: int, seed: int) -> None:
    rng = random.Random(seed)
    console = Console(width=140)
    console.print(machine())
    index, keys = index_bytes(100, 10_000), keys_bytes(1000, 1_000_000)
    took, read, at_once = asyncio.run(decisions(nodes, adapters, requests, rng))
    cpu, wall = asyncio.run(stops(nodes, rng))
    table = Table("what", "figure", "bound", "verdict")
    for what, figure, unit, bound in (
        (f"a decision, p50, {nodes} endpoints, {adapters} adapters, {at_once:.0%} at once", took[len(took) // 2], "us", None),
        ("a decision, p99", took[len(took) * 99 // 100], "us", 50),
        (f"beside it a read of a body of {len(BODY)} bytes, p50", read[len(read) // 2], "us", None),
        ("the same, p99", read[len(read) * 99 // 100], "us", None),
        ("decision / read, p50", took[len(took) // 2] / read[len(read) // 2], "", None),
        ("index of 100 nodes with 10,000 adapters each", index / 2**20, "MiB", 300),
        ("1,000 endpoints and 1,000,000 keys", keys / 2**20, "MiB", 200),
        (f"longest stop of the loop when one of {nodes} endpoints changes, its own work", cpu[-1], "ms", 5),
        (f"the same by the clock, p99.9 and longest {wall[-1]:.1f}", wall[len(wall) * 999 // 1000], "ms", None),
    ):
        table.add_row(what, f"{figure:.1f} {unit}", f"{bound} {unit}" if bound else "", "" if bound is None else "ok" if figure <= bound else "missed")
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.nodes, arguments.adapters, arguments.requests, arguments.seed)
