"""`python -m tests.bench.verify`: what it costs to check an adapter, and what a hostile one costs everybody else. Prints two tables in Markdown.

*Cost.* Adapters of each kind, on a disk's cache: CPU microseconds per MB (10^6 bytes) of the thread that works, for the check without and with the
search for infinities, beside SHA-256 of the same file and `safetensors`' own reader (header, and every tensor into numpy). The best of several runs.

*Hostile.* Every adapter of tests/fakes/hostile_adapters.py at full size goes through the check in the stager's way, step by step in two threads, while
a task of the same event loop asks every millisecond how late it is. *stop*: the longest that it was late; *CPU*: of the process for this adapter.
The best of several runs: the machine's own pauses are in one of them, what the adapter does is in all. Bounds: 20 ms, and 1 s for each 100 MB begun.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.numpy

from extproc.errors import InvalidAdapter
from extproc.stager.adapter.check import check
from extproc.stager.adapter.rules import Rules
from extproc.stager.threads import Threads, through
from extproc.stager.work.stage import MAX_CHECKS
from extproc.up.demo import write_adapter
from tests.fakes.adapters import CONFIG, WEIGHTS
from tests.fakes.hostile_adapters import Hostile, configuration, data, hostile, many_tensors

from .harness import machine

MB = 10**6
MAX_STOP_MS = 20.0
MAX_CPU_S_PER_100_MB = 1.0
TICK_S = 0.001
IDLE_S = 1.0
RUNS = 3


@dataclass(frozen=True)
class Cost:
    """CPU microseconds per MB of one adapter's file."""

    name: str
    megabytes: float
    check_us: float
    finite_us: float
    sha256_us: float
    safetensors_us: float | None  # None: the library's numpy reader knows no such type


@dataclass(frozen=True)
class Row:
    """What one hostile adapter did."""

    name: str
    bytes: int
    stop_ms: float
    cpu_s: float
    message: str  # "": it was taken
    broken: tuple[str, ...]  # bounds, by name


def costs(directory: Path, megabytes: int) -> Iterator[Cost]:
    """One row for each kind of adapter."""
    plain = directory / "plain"
    rank = 64
    layers = max(1, megabytes * MB // (2 * 2 * 4096 * rank * 2))
    write_adapter(plain, seed=1, rank=rank, layers=layers)
    yield cost(f"BF16, {layers * 4} tensors", plain)
    for name, dtype, value, size in (("F16", "F16", b"\0\x3c", 2), ("F32", "F32", b"\0\0\x80\x3f", 4), ("8-bit", "F8_E4M3", b"\x38", 1)):
        half = directory / dtype
        half.mkdir()
        (half / CONFIG).write_bytes(configuration())
        (half / WEIGHTS).write_bytes(data(value, megabytes * MB // (size * 16) * size * 16, dtype))
        yield cost(f"{name}, 2 tensors", half)
    experts = directory / "experts"
    experts.mkdir()
    (experts / CONFIG).write_bytes(configuration(r=1))
    (experts / WEIGHTS).write_bytes(many_tensors(100_000, size=max(1, megabytes * MB // 100_000)))
    yield cost("whole numbers, 100,000 tensors", experts)


def cost(name: str, directory: Path) -> Cost:
    size = (directory / WEIGHTS).stat().st_size / MB

    def per_mb(work: Callable[[], object]) -> float:
        best = min(_cpu_s(work) for _ in range(RUNS))
        return best * 1e6 / size

    def sha256() -> None:
        with (directory / WEIGHTS).open("rb") as file:
            hashlib.file_digest(file, "sha256")

    def library() -> None:
        safetensors.numpy.load_file(directory / WEIGHTS)

    def checked(*, finite: bool) -> Callable[[], object]:
        return lambda: through(check(directory, Rules(finite=finite)))

    own: float | None = None
    with contextlib.suppress(KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        own = per_mb(library)
    return Cost(name, size, per_mb(checked(finite=False)), per_mb(checked(finite=True)), per_mb(sha256), own)


def _cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


class Ticks:
    """How late a task of the event loop is woken, at worst."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self._worst = max(self._worst, time.perf_counter() - due)

    def take(self) -> float:
        """Milliseconds since the last call."""
        worst, self._worst = self._worst, 0.0
        return worst * 1000


async def attack(directory: Path, scale: int) -> list[Row]:
    """Each hostile adapter in turn."""
    threads, ticks = Threads(MAX_CHECKS, "check"), Ticks()
    ticking = asyncio.create_task(ticks.run())
    try:
        await asyncio.sleep(IDLE_S)
        ticks.take()
        await asyncio.sleep(IDLE_S)
        alone = Row("nothing: the machine alone", 0, ticks.take(), 0.0, "", ())
        return [alone, *[await _attacked(threads, ticks, directory, one) for one in hostile(scale)]]
    finally:
        ticking.cancel()
        threads.close()


async def _attacked(threads: Threads, ticks: Ticks, directory: Path, one: Hostile) -> Row:
    config, weights = await asyncio.to_thread(one.config), await asyncio.to_thread(one.weights)
    (directory / CONFIG).write_bytes(config)
    (directory / WEIGHTS).write_bytes(weights)
    size = len(config) + len(weights)
    del config, weights
    stops, times, message = [], [], ""
    for _ in range(RUNS):
        await asyncio.sleep(2 * TICK_S)
        ticks.take()
        began = time.process_time()
        try:
            await threads.walk(check(directory, Rules()))
        except InvalidAdapter as error:
            message = error.bare().message
        await asyncio.sleep(2 * TICK_S)
        times.append(time.process_time() - began)
        stops.append(ticks.take())
    stop_ms, cpu_s = min(stops), min(times)
    broken = []
    if stop_ms > MAX_STOP_MS:
        broken.append("stop")
    if cpu_s > MAX_CPU_S_PER_100_MB * (1 + size // (100 * MB)):
        broken.append("CPU")
    return Row(one.name, size, stop_ms, cpu_s, message, tuple(broken))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=100, help="of each adapter whose cost is measured")
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes of the hostile ones")
    parser.add_argument("--all", action="store_true", help="every hostile adapter, not only the ten worst and those over a bound")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="lora-extproc-bench-") as temporary:
        rows = list(costs(Path(temporary), arguments.mb))
        print("| adapter | MB | check, µs/MB | + finite | sha256sum | safetensors' reader |\n|---|---|---|---|---|---|")
        for row in rows:
            own = "-" if row.safetensors_us is None else f"{row.safetensors_us:.0f}"
            print(f"| {row.name} | {row.megabytes:.0f} | {row.check_us:.0f} | {row.finite_us:.0f} | {row.sha256_us:.0f} | {own} |")
        with contextlib.suppress(OSError):  # before all others where it may, so that it measures itself and not who else wants a core
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        attacks = asyncio.run(attack(Path(temporary), arguments.scale))
    worst = sorted(attacks, key=lambda row: (bool(row.broken), row.stop_ms), reverse=True)
    shown = attacks if arguments.all else [attacks[0], *[row for row in worst if row is not attacks[0]][: max(10, sum(bool(row.broken) for row in worst))]]
    print("\n| hostile adapter | MB | stop, ms | CPU, s | answer | over |\n|---|---|---|---|---|---|")
    for hurt in shown:
        print(f"| {hurt.name} | {hurt.bytes / MB:.1f} | {hurt.stop_ms:.1f} | {hurt.cpu_s:.2f} | {hurt.message[:80] or 'taken'} | {', '.join(hurt.broken)} |")
    over = [row.name for row in attacks if row.broken]
    print(f"\n{len(attacks) - 1} hostile adapters; longest stop {max(row.stop_ms for row in attacks[1:]):.1f} ms; over a bound: {len(over)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cost": [asdict(row) for row in rows], "hostile": [asdict(row) for row in attacks]}, indent=1))
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
