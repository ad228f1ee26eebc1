"""`python -m tests.bench.fleet_real`: a fleet of real processes that moves under load, once with the router's own rule and once with each key at its owner.

Eight simulated engines that run four requests at once, a stager beside each, two routers that follow a file, and an Envoy that follows them by xDS. An open
loop asks for 200 adapters by a Zipf law, at 60 % of what the engines can do. Meanwhile a node appears in the file, one is drained by the command line,
and the engine and the stager of one are killed.

What is looked at, and by whom:
- failed requests: Envoy's access log. The killed engine's own are those that Envoy had sent there and that had begun before it was killed.
- waits: `waited_ms`, as the router tells Envoy of each request. Warm is an adapter of which a request has been let go: one that comes while the first
  is held waits for the same load. After the death, it is one that an engine which takes requests listed just before.
- in flight: of the engines that are meant to take requests: not of a node before the routers call it ready, nor of one that drains. With two or three
  requests at each engine a single look is mostly chance, so that the ratio is of the means over WINDOW_S. They are those of the whole time, by the access log:
  from when the router let a request go to the end of its answer. A mean of twenty looks has a third of chance in it.
"""

import argparse
import asyncio
import bisect
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from extproc.up.stack import Node
from tests.fakes.fleet import Fleet, Layout

from .harness import TICKS, machine

SLOTS = 4  # requests that an engine runs at once
TOKENS = 16
LATE_MS = 100.0
SHARE = 0.6  # of what the engines can do
WINDOW_S, LOOK_S = 10.0, 0.5
ANSWER_S = 120.0  # a client's own deadline: what queues for longer is as good as failed
LEAD_S = 3.0  # of the load before anything is counted: it begins at once, with routers that have seen an idle fleet
LOG_S = 1.0  # by then Envoy has written what it has answered


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it. The node joins, drains and dies after these parts of `seconds`."""

    seconds: float = 180.0
    per_s: float = 100.0
    nodes: int = 8
    adapters: int = 200
    load_ms: float = 250.0  # what a load into the engine takes: more than LATE_MS, so that a wait for one is seen
    join: float = 1 / 6
    drain: float = 5 / 12
    death: float = 3 / 4

    def layout(self, balance: str) -> Layout:
        token_ms = 1000 * SHARE * self.nodes * SLOTS / self.per_s / TOKENS
        engine = {"max-num-seqs": str(SLOTS), "token-ms": f"{token_ms:g}", "load-ms": f"{self.load_ms:g}"}
        return Layout(self.nodes, 1, 2, self.adapters, engine, settings={"router": {"balance": balance}})


@dataclass(slots=True)
class Seen:
    """What one run showed."""

    records: list[Mapping[str, Any]] = field(default_factory=list)  # Envoy's access log, in the order in which requests began
    refused: Counter[str] = field(default_factory=Counter)  # what clients saw that is no HTTP answer
    took_s: list[float] = field(default_factory=list)  # of those that were answered with 200
    busy: list[tuple[float, dict[str, str]]] = field(default_factory=list)  # since when which engines are meant to take requests: address and node
    looks: list[float] = field(default_factory=list)  # max/mean of single looks at the engines' own counters
    cpu_s: dict[str, float] = field(default_factory=dict)  # by kind of process
    began: float = 0.0  # as access logs tell the time
    seconds: float = 0.0
    victim: str = ""  # the killed engine's address
    killed: float = 0.0
    survives: frozenset[str] = frozenset()  # adapters that engines which go on had in memory then
    steps: dict[str, float] = field(default_factory=dict)  # what was done, and how long it took

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        """Requests that failed although no engine died of them."""
        return [record for record in self.records if record["status"] != 200 and record["at"] >= self.began and not self._is_victims_own(record)]

    @property
    def own(self) -> int:
        """Requests that the killed engine took with it."""
        return sum(record["status"] != 200 and self._is_victims_own(record) for record in self.records)

    def _is_victims_own(self, record: Mapping[str, Any]) -> bool:
        return bool(record["upstream"] == self.victim and record["at"] <= self.killed)

    def waits(self) -> Iterator[tuple[Mapping[str, Any], float, bool]]:
        """Each request that was answered well, the milliseconds that the router held it, and whether its adapter was warm somewhere."""
        warm_since: dict[str, float] = {}  # by adapter: since the first request of it was let go
        is_before = True
        for record in self.records:
            if is_before and 0 < self.killed < record["at"]:
                is_before, warm_since = False, dict.fromkeys(self.survives, 0.0)
            model, waited_ms = record["model"], float(record.get("waited_ms") or 0.0)
            yield record, waited_ms, warm_since.get(model, math.inf) <= record["at"]
            if record["status"] == 200:
                warm_since[model] = min(warm_since.get(model, math.inf), record["at"] + waited_ms / 1000)

    def takes(self, busy: Iterable[Node], at: float | None = None) -> None:
        """From now on, or `at` a time, these nodes are meant to take requests."""
        self.busy.append((time.time() if at is None else at, {node.engine: node.name for node in busy}))

    def windows(self) -> list[tuple[float, dict[str, float]]]:
        """Requests in flight at each busy engine, by node, the mean of WINDOW_S, and when each of these began. Each is of one set of engines."""
        found: list[tuple[float, dict[str, float]]] = []
        for (since, nodes), (until, _) in pairwise(self.busy):
            for number in range(int((until - since) // WINDOW_S)):
                begins = since + number * WINDOW_S
                spent = dict.fromkeys(nodes.values(), 0.0)
                for record in self.records:
                    if node := nodes.get(record["upstream"]):
                        went, ended = (record["at"] + float(record.get(which) or 0.0) / 1000 for which in ("waited_ms", "duration_ms"))
                        spent[node] += max(0.0, min(ended, begins + WINDOW_S) - max(went, begins))
                found.append((begins, {node: seconds / WINDOW_S for node, seconds in spent.items()}))
        return found

    def uneven(self) -> list[float]:
        """Of each of those windows, the most by the mean."""
        return [_most_by_mean(means.values()) for _, means in self.windows() if any(means.values())]

    def late(self) -> list[Mapping[str, Any]]:
        """Requests of warm adapters that were held for longer than LATE_MS."""
        return [record for record, waited_ms, is_warm in self.waits() if is_warm and waited_ms > LATE_MS and record["at"] >= self.began]


def _most_by_mean(counts: Collection[float]) -> float:
    return max(counts) / statistics.mean(counts)


async def measure(size: Size, balance: str, directory: Path, say: Callable[[str], None] = lambda _: None) -> Seen:
    """One run."""
    seen = Seen(seconds=size.seconds)
    async with Fleet(size.layout(balance), directory) as fleet:
        reading = asyncio.create_task(_read_access_log(fleet, seen.records))
        try:
            clients = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S), connector=aiohttp.TCPConnector(limit=0))
            async with clients:
                await _warm_up(fleet, clients)
                say(f"{balance}: {size.adapters} adapters are warm")
                before = _cpu(fleet)
                seen.began = time.time() + LEAD_S
                busy = fleet.nodes[: size.nodes]
                seen.takes(busy, at=seen.began)
                looking = asyncio.create_task(_look(fleet, busy, seen))
                moving = asyncio.create_task(_move(fleet, size, busy, seen, say))
                try:
                    await _load(fleet, clients, size, seen)
                finally:
                    looking.cancel()
                    moving.cancel()
                    results = await asyncio.gather(looking, moving, return_exceptions=True)
                    seen.takes(())
                for result in results:
                    if isinstance(result, Exception):
                        raise result
                after = _cpu(fleet)
                seen.cpu_s = {kind: spent - before.get(kind, 0.0) for kind, spent in after.items()}
            await asyncio.sleep(LOG_S)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    seen.records.sort(key=lambda record: record["at"])
    return seen


# ---- the load


async def _warm_up(fleet: Fleet, clients: aiohttp.ClientSession) -> None:
    """Each adapter once, a few at a time; again what is answered badly."""
    left = list(fleet.adapters)

    async def work() -> None:
        while left:
            name = left.pop()
            if await _ask(fleet, clients, name) != 200:
                left.append(name)
                await asyncio.sleep(0.1)

    await asyncio.gather(*(work() for _ in range(8)))


async def _load(fleet: Fleet, clients: aiohttp.ClientSession, size: Size, seen: Seen) -> None:
    """Requests come by a Poisson process, whatever came of those before. All are waited for."""
    source = random.Random(1)
    totals: list[float] = []
    for rank in range(1, size.adapters + 1):
        totals.append((totals[-1] if totals else 0.0) + 1 / rank)
    names = list(fleet.adapters)
    source.shuffle(names)
    asked: set[asyncio.Task[None]] = set()

    async def ask(name: str) -> None:
        began = time.monotonic()
        try:
            status = await _ask(fleet, clients, name)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            seen.refused[type(error).__name__] += 1
            return
        if status == 200:
            seen.took_s.append(time.monotonic() - began)

    began, due = time.monotonic(), 0.0
    while (due := due + source.expovariate(size.per_s)) < size.seconds:
        if (left_s := began + due - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        task = asyncio.create_task(ask(names[bisect.bisect(totals, source.random() * totals[-1])]))
        asked.add(task)
        task.add_done_callback(asked.discard)
    await asyncio.gather(*asked)


async def _ask(fleet: Fleet, clients: aiohttp.ClientSession, model: str) -> int:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": TOKENS}).encode()
    async with clients.post(f"http://{fleet.address}/v1/chat/completions", data=body, headers={"content-type": "application/json"}) as response:
        await response.read()
        return response.status


# ---- what happens meanwhile


async def _move(fleet: Fleet, size: Size, busy: list[Node], seen: Seen, say: Callable[[str], None]) -> None:
    """A node joins, another drains, a third dies. `busy`: those that are meant to take requests."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def at(part: float) -> float:
        await asyncio.sleep(began + part * size.seconds - loop.time())
        return loop.time()

    late, drained, victim = fleet.nodes[size.nodes], fleet.nodes[1], fleet.nodes[2]
    since = await at(size.join)
    fleet.show(fleet.nodes)
    await fleet.until_standing("ready", late)
    busy.append(late)
    seen.takes(busy)
    seen.steps["join"] = loop.time() - since
    say(f"{late.name} is ready {seen.steps['join']:.1f} s after it came")
    since = await at(size.drain)
    busy.remove(drained)
    seen.takes(busy)
    await fleet.run("drain", drained.stager, "--wait", "--timeout", "120")
    seen.steps["drain"] = loop.time() - since
    say(f"{drained.name} is empty {seen.steps['drain']:.1f} s after it was told to drain")
    since = await at(size.death)
    busy.remove(victim)
    seen.takes(busy)
    seen.victim = victim.engine
    seen.survives = frozenset().union(*await asyncio.gather(*(fleet.known_at(node) for node in busy)))
    await fleet.kill(f"{victim.name}-engine", f"{victim.name}-stager")
    seen.killed = time.time()
    await fleet.until_standing("down", victim)
    seen.steps["death"] = loop.time() - since
    say(f"{victim.name} is down {seen.steps['death']:.2f} s after it was killed")


async def _look(fleet: Fleet, busy: Sequence[Node], seen: Seen) -> None:
    """Ask the engines how much they have in flight, again and again."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        counts = await asyncio.gather(*map(fleet.in_flight, tuple(busy)), return_exceptions=True)
        found = [count for count in counts if isinstance(count, float)]
        if sum(found):
            seen.looks.append(_most_by_mean(found))
        due += LOOK_S
        await asyncio.sleep(max(0.0, due - loop.time()))


async def _read_access_log(fleet: Fleet, records: list[Mapping[str, Any]]) -> None:
    output = fleet.children["envoy"].process.stdout
    assert output is not None
    async for line in output:
        record = json.loads(line)
        record["at"] = datetime.fromisoformat(record["time"]).timestamp()
        records.append(record)


def _cpu(fleet: Fleet) -> dict[str, float]:
    """CPU seconds so far, by kind of process; of those that live."""
    spent: dict[str, float] = {"load": sum(os.times()[:2])}
    for name, child in fleet.children.items():
        if child.process.returncode is None:
            fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
            kind = name.rpartition("-")[2] if name.startswith("node") else name.partition("-")[0]
            spent[kind] = spent.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / TICKS
    return spent


# ---- what came of it


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure that the router's own rule must keep."""

    what: str
    most: float
    figure: Callable[[Seen], float]
    digits: int = 0


BOUNDS = (
    Bound("failed, beyond the killed engine's own", 0, lambda seen: len(seen.failed) + seen.refused.total()),
    Bound(f"warm requests held over {LATE_MS:g} ms", 0, lambda seen: len(seen.late())),
    Bound(f"in flight, max/mean of {WINDOW_S:g} s, the worst", 1.5, lambda seen: max(seen.uneven(), default=0.0), 2),
)


def figures(seen: Seen) -> Iterator[tuple[str, str]]:
    """What has no bound."""
    took = sorted(seen.took_s) or [0.0]
    waits = [waited for record, waited, _ in seen.waits() if record["at"] >= seen.began]
    looks = sorted(seen.looks) or [0.0]
    yield "requests", f"{sum(record['at'] >= seen.began for record in seen.records):,}"
    yield "the killed engine's own", str(seen.own)
    yield "held at all", str(sum(waited > 0 for waited in waits))
    yield "held longest", f"{max(waits, default=0.0):.0f} ms"
    yield "in flight, max/mean of 10 s, median", f"{statistics.median(seen.uneven() or [0.0]):.2f}"
    yield "in flight, max/mean of single looks, median and p99", f"{statistics.median(looks):.2f}, {looks[int(len(looks) * 0.99)]:.2f}"
    yield "to the answer, p50, p99, longest", ", ".join(f"{1000 * at:.0f} ms" for at in (took[len(took) // 2], took[int(len(took) * 0.99)], took[-1]))
    for step, seconds in seen.steps.items():
        yield {"join": "from the file to ready", "drain": "from the drain to empty", "death": "from the kill to down"}[step], f"{seconds:.1f} s"
    for kind, spent in sorted(seen.cpu_s.items()):
        yield f"CPU of {kind}", f"{100 * spent / seen.seconds:.0f} % of a core"


def table(runs: Mapping[str, Seen]) -> Table:
    """Bounds first, each with a verdict of the first run's; then the other figures."""
    shown = Table("", *runs, "bound", "")
    first = next(iter(runs.values()))
    for bound in BOUNDS:
        cells = [f"{bound.figure(seen):.{bound.digits}f}" for seen in runs.values()]
        shown.add_row(bound.what, *cells, f"{bound.most:g}", "kept" if bound.figure(first) <= bound.most else "BROKEN")
    for rows in zip(*(figures(seen) for seen in runs.values()), strict=True):
        shown.add_row(rows[0][0], *(value for _, value in rows), "", "")
    return shown


def complaints(seen: Seen) -> Iterator[str]:
    """The requests that break a bound, as the access log has them."""
    names = ("status", "details", "flags", "upstream", "attempts", "model", "owner", "outcome", "waited_ms", "duration_ms")
    for what, records in (("failed", seen.failed), ("held", seen.late())):
        for record in records:
            yield f"{what} at {record['at'] - seen.began:.2f} s: {' '.join(f'{name}={record.get(name)}' for name in names)}"
    if seen.refused:
        yield f"clients saw {dict(seen.refused)}"


def timeline(seen: Seen) -> Iterator[str]:
    """How long answers took, WINDOW_S after WINDOW_S, and who gave the slowest tenth; then what was in flight where."""
    windows: dict[int, list[Mapping[str, Any]]] = {}
    for record in seen.records:
        if record["at"] >= seen.began:
            windows.setdefault(int((record["at"] - seen.began) // WINDOW_S), []).append(record)
    for number, records in sorted(windows.items()):
        records.sort(key=lambda record: record["duration_ms"])
        slowest = Counter(str(record["owner"]) for record in records[-(len(records) // 10) :])
        took = ", ".join(f"p{100 * part:g} {records[int(part * (len(records) - 1))]['duration_ms']} ms" for part in (0.5, 0.9, 0.99, 1))
        yield f"{number * WINDOW_S:4.0f} s: {len(records)} requests, {took}; the slowest tenth at {dict(slowest.most_common(3))}"
    for begins, means in seen.windows():
        shown = " ".join(f"{node} {mean:.2f}" for node, mean in sorted(means.items()))
        yield f"{begins - seen.began:6.1f} s: max/mean {_most_by_mean(means.values()):.2f}, in flight {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet_real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="of each run")
    parser.add_argument("--per-s", type=float, default=100.0, help="requests; the engines' speed goes with it")
    parser.add_argument("--load-ms", type=float, default=250.0, help="what a load into an engine takes")
    parser.add_argument("--balance", nargs="+", default=["bounded", "maglev"], help="rules, as `router.balance` names them; the first is judged")
    parser.add_argument("--show", action="store_true", help="print the course of the first run, and each request that breaks a bound")
    arguments = parser.parse_args()
    console = Console(width=150)
    console.print(machine())
    runs: dict[str, Seen] = {}
    for balance in arguments.balance:
        with tempfile.TemporaryDirectory(prefix="lora-extproc-fleet-") as temporary:
            runs[balance] = asyncio.run(measure(Size(arguments.seconds, arguments.per_s, load_ms=arguments.load_ms), balance, Path(temporary), console.print))
    console.print(table(runs))
    if arguments.show:
        for line in (*timeline(runs[arguments.balance[0]]), *complaints(runs[arguments.balance[0]])):
            console.print(line, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
