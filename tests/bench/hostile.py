"""`python -m tests.bench.hostile`: one hostile input after another, and what everybody else noticed of it. Prints a table in Markdown.

A router process, a stager and a real Envoy (FULL_DUPLEX_STREAMED) are started; HTTP inputs go through Envoy, HTTP/2 ones straight to the gRPC port.
A bystander (bystander.py) sends a small warm request every 5 ms straight to the router and every 10 ms through Envoy. Each input is sent twice:

- *stop*: how long the router's loop stood still. Where the router measures that itself (`lora_extproc_loop_longest_stall_seconds`), its figure;
  else the longest that the bystander waited on its direct connection.
- *others*: the longest that the bystander waited through Envoy. Of both figures the better of the two runs counts: the machine's own pauses are in
  one of them, what the input does is in both. (For the list of models, which is rendered once, the worse.)
- *peak*: resident memory of the router and its children above the idle level, from /proc/PID/status VmHWM, which is set back before each run. Each
  process counts its own, so a body in a shared map counts in two.
- *lasting*: resident memory after the second run above that after the first; where that is much, the input is sent up to MAX_RUNS times, and the lowest
  after the first counts. An allocator keeps what one run needed and gives it back after another, a leak grows with each.

Bounds: nobody waits longer than 20 ms, or than with no input at all where the machine itself pauses for longer (the first row); the peak is at most
three times the bodies that there are at once plus 32 MiB (for an encoded body what it may decode to counts), and what lasts is at most 8 MiB (arenas of 1 MiB and malloc's thresholds move by a few).
"""

import argparse
import asyncio
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from extproc.config.read import parse
from extproc.envoyconfig import render
from extproc.up.demo import write_adapter
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.stack import envoy_binary

from .harness import ADAPTER, instant_upstream, machine, until_it_serves, without_access_log
from .hostile_bodies import INPUTS as BODIES
from .hostile_bodies import MAX_BODY_BYTES, HttpInput
from .hostile_frames import INPUTS as FRAMES
from .hostile_frames import FrameInput
from .index import fill

MIB = 2**20
MAX_WAIT_MS = 20.0
PEAK_FACTOR, PEAK_MIB = 3, 32
LASTING_MIB = 8.0
QUIET_S = 0.05  # the bystander is answered within that time again
SETTLE_S = 1.0
RUNS, MAX_RUNS = 2, 5
NOTHING, NOTHING_S = "nothing: the machine alone", 5.0


@dataclass(frozen=True)
class Row:
    """What one input did."""

    name: str
    bytes: int
    answer: str
    stop_ms: float
    others_ms: float
    failed: int  # the bystander's requests that were not answered
    peak_mib: float
    lasting_mib: float
    broken: tuple[str, ...]  # bounds, by name


class Bystander:
    """The process that measures what others wait."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, float, bool]]] = {"direct": [], "envoy": []}

    async def run(self, router: str, envoy: str) -> None:
        """Until cancelled."""
        command = [sys.executable, "-m", "tests.bench.bystander", router, envoy, ADAPTER]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                way, due, took, good = line.decode().split()
                self._seen[way].append((float(due), float(took), good == "1"))
            raise SystemExit("the bystander ended")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def forget(self) -> None:
        for seen in self._seen.values():
            seen.clear()

    def worst_ms(self, way: str) -> float:
        return max((took for _, took, _ in self._seen[way]), default=0.0) * 1000

    def failed(self) -> int:
        return sum(not good for seen in self._seen.values() for _, _, good in seen)

    async def is_quiet(self, timeout_s: float = 90.0) -> None:
        """Wait until both ways are answered at once again."""
        since = time.monotonic()
        while time.monotonic() - since < timeout_s:
            recent = [[entry for entry in seen[-3:] if entry[0] > since] for seen in self._seen.values()]
            if all(len(entries) == 3 and all(good and took < QUIET_S for _, took, good in entries) for entries in recent):
                return
            await asyncio.sleep(0.05)
        print(f"others still wait after {timeout_s:g} s", file=sys.stderr)


class Memory:
    """Of one process and all below it, in MiB."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def resident(self) -> float:
        return self._sum("VmRSS")

    def peak(self) -> float:
        return self._sum("VmHWM")

    def reset_peak(self) -> None:
        for pid in self._family():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _family(self) -> list[int]:
        family, new = [], [self._pid]
        while new:
            family += new
            new = [int(child) for pid in new for tasks in _read_all(f"/proc/{pid}/task") for child in tasks.split()]
        return family

    def _sum(self, name: str) -> float:
        total = 0
        for pid in self._family():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith(name))
        return total / 1024


def _read_all(directory: str) -> list[str]:
    texts = []
    with contextlib.suppress(OSError):
        for task in Path(directory).iterdir():
            with contextlib.suppress(OSError):
                texts.append((task / "children").read_text())
    return texts


@dataclass(frozen=True)
class Rig:
    """What was started."""

    router: Child
    address: str
    envoy: str
    http: str
    memory: Memory
    bystander: Bystander

    async def told_stall_ms(self) -> float | None:
        """The loop's longest stop since it was last asked, if the router measures it."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.http}/metrics") as response:
            found = re.search(r"^lora_extproc_loop_longest_stall_seconds (\S+)$", await response.text(), re.MULTILINE)
        return float(found[1]) * 1000 if found else None


@contextlib.asynccontextmanager
async def rig(models: int) -> AsyncIterator[Rig]:
    """Upstream, stager with so many adapters on its disk, router, Envoy, bystander."""
    with tempfile.TemporaryDirectory(prefix="lora-extproc-bench-") as temporary:
        directory = Path(temporary)
        upstream, listen, router, stager, http = (f"127.0.0.1:{port}" for port in free_ports(5))
        write_adapter(directory / "origin" / ADAPTER, seed=1, rank=8, hidden=512, layers=2)
        if models:
            print(f"publishing {models} adapters", file=sys.stderr)
            await asyncio.to_thread(fill, directory / "node", models)
        raw: dict[str, Any] = {
            "pools": [{"name": "models", "endpoints": [{"address": upstream, "stager": stager, "node": "node-1"}]}],
            "router": {"listen": router, "health_listen": "", "http_listen": http, "max_body_bytes": MAX_BODY_BYTES},
            "stager": {
                "listen": stager,
                "http_listen": "",
                "dir": str(directory / "node"),
                "origins": [{"type": "file", "path": str(directory / "origin")}],
                "engine": {"url": ""},
            },
            "envoy": {"listen": listen, "admin": "", "router": router},
        }
        files = {
            "settings": raw,
            "envoy": without_access_log(yaml.safe_load(render(parse(raw, source="bench")))),
            "upstream": instant_upstream(upstream),
        }
        for name, content in files.items():
            (directory / f"{name}.yaml").write_text(yaml.safe_dump(content))
        envoy = [str(envoy_binary()), "-l", "error", "--use-dynamic-base-id", "-c"]
        commands = {
            "upstream": [*envoy, str(directory / "upstream.yaml"), "--concurrency", "1"],
            "stager": python("stager", "--config", str(directory / "settings.yaml")),
            "router": python("router", "--config", str(directory / "settings.yaml")),
            "envoy": [*envoy, str(directory / "envoy.yaml")],
        }
        children: dict[str, Child] = {}
        bystander = Bystander()
        watching: asyncio.Task[None] | None = None
        try:
            for name, command in commands.items():
                children[name] = await spawn(name, command, directory)
            await until_it_serves(listen, list(children.values()))
            watching = asyncio.create_task(bystander.run(router, listen))
            await bystander.is_quiet()
            yield Rig(children["router"], router, listen, http, Memory(children["router"].process.pid), bystander)
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])
            await stop(list(children.values()), 2.0)


async def show(rig: Rig, hostile: HttpInput | FrameInput | None, nothing: Row | None) -> Row:
    """Send one input, twice or more, and judge what was seen beside the row of `nothing`; None sends nothing."""
    residents: list[float] = []
    stops, waits, peaks, failures = [], [], [], 0
    answers: dict[str, None] = {}
    body = await asyncio.to_thread(hostile.body) if isinstance(hostile, HttpInput) else b""  # made before anything is measured
    sent = len(body)
    idle_mib = rig.memory.resident()
    while len(residents) < RUNS or (len(residents) < MAX_RUNS and min(residents[1:]) - residents[0] > LASTING_MIB):
        rig.memory.reset_peak()
        rig.bystander.forget()
        await rig.told_stall_ms()
        if hostile is None:
            await asyncio.sleep(NOTHING_S)
        elif isinstance(hostile, HttpInput):
            answers[await hostile.run(rig.envoy, body)] = None
        else:
            sent, answer = await asyncio.to_thread(hostile.run, rig.address)
            answers[answer] = None
        await rig.bystander.is_quiet()
        await asyncio.sleep(SETTLE_S)
        if rig.router.process.returncode is not None:
            raise SystemExit(f"{hostile}: the router ended: {rig.router.last_words()}")
        told = await rig.told_stall_ms()
        stops.append(rig.bystander.worst_ms("direct") if told is None else told)
        waits.append(rig.bystander.worst_ms("envoy"))
        failures = rig.bystander.failed() + failures
        peaks.append(rig.memory.peak() - idle_mib)
        residents.append(rig.memory.resident())
    held = hostile.held_bytes(sent) if isinstance(hostile, HttpInput) else sent
    least = max if isinstance(hostile, HttpInput) and hostile.only_once else min
    row = Row(
        name=hostile.name if hostile else NOTHING,
        bytes=sent,
        answer=" / ".join(answers),
        stop_ms=least(stops),
        others_ms=least(waits),
        failed=failures,
        peak_mib=max(peaks),
        lasting_mib=min(residents[1:]) - residents[0],
        broken=(),
    )
    within = {
        "stop": row.stop_ms <= max(MAX_WAIT_MS, nothing.stop_ms if nothing else 0.0),
        "others": row.others_ms <= max(MAX_WAIT_MS, nothing.others_ms if nothing else 0.0) and not row.failed,
        "peak": row.peak_mib <= PEAK_FACTOR * held / MIB + PEAK_MIB,
        "lasting": row.lasting_mib <= LASTING_MIB,
        "answer": hostile is None or _is_expected(hostile, answers),
    }
    return Row(**{**asdict(row), "broken": tuple(name for name, good in within.items() if not good and hostile is not None)})


def _is_expected(hostile: HttpInput | FrameInput, answers: Sequence[str] | dict[str, None]) -> bool:
    if isinstance(hostile, FrameInput):
        return all(hostile.expected in answer for answer in answers)
    return all(word.split()[0] in hostile.expected.split("|") for answer in answers for word in answer.split(" / "))


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["| input | bytes | answer | stop ms | others ms | peak MiB | lasting MiB | verdict |", "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |"]
    for row in rows:
        others = f"{row.others_ms:.1f}" + (f", {row.failed} failed" if row.failed else "")
        verdict = "ok" if not row.broken else "**" + ", ".join(row.broken) + "**"
        name, answer = row.name.replace("|", "\\|"), row.answer.replace("|", "\\|")
        lines.append(f"| {name} | {row.bytes:,} | {answer} | {row.stop_ms:.1f} | {others} | {row.peak_mib:.0f} | {row.lasting_mib:.1f} | {verdict} |")
    return "\n".join(lines)


async def main(only: Sequence[str], models: int, *, as_json: bool) -> int:
    """Run what is wanted; 1 if a bound was broken."""
    wanted: list[HttpInput | FrameInput] = [hostile for hostile in (*BODIES, *FRAMES) if not only or any(word in hostile.name for word in only)]
    if not wanted:
        raise SystemExit(f"no input's name has any of {', '.join(only)}")
    lists_models = any(isinstance(hostile, HttpInput) and hostile.path == "/v1/models" for hostile in wanted)
    rows: list[Row] = []
    async with rig(models if lists_models else 0) as started:
        for hostile in (None, *wanted):
            rows.append(await show(started, hostile, rows[0] if rows else None))
            print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    broken = [row for row in rows[1:] if row.broken]
    if as_json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(f"{machine()}\n\n{markdown(rows)}\n\n{len(broken)} of {len(rows) - 1} inputs break a bound")
    return 1 if broken else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="inputs whose name has this in it; may be repeated")
    parser.add_argument("--models", type=int, default=100_000, help="adapters on the node, for the list of models")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.only, arguments.models, as_json=arguments.json)))
