"""`python -m tests.bench.cold [--vllm-python PATH]`: from a request to its first token, for an adapter that no node has, and for one that is there.

Beside it, in turns: the same adapters asked of an engine directly, with their files already in place (by the engine's own resolver).

What we add is the rest of a cold request when what it cannot do without is taken off: the fetch, the load into the engine, and the time that the engine
takes to the first token of a request sent to it directly. It is spent on two passes through Envoy's filter, one RPC to the stager, four looks at the
origin, two fsyncs of files and directories, one rename and one link.
"""

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from extproc.config.origins import OriginSettings
from extproc.config.read import parse
from extproc.up.demo import write_adapter
from extproc.up.processes import free_ports, python, spawn, stop
from extproc.up.stack import Plan, Stack
from extproc.up.tiny import write_base, write_lora
from extproc.up.vllm import Vllm

from .harness import machine

WARM = 5  # requests of each adapter after the cold one
TOKEN_MS = 1.0  # of the simulated engine
PHASES = ("resolve", "check", "reserve", "fetch", "verify", "publish")
STAGED = re.compile(r"(\S+): staged from \S+ in (\d+) ms, \d+ bytes \((.*)\)")
LOADED = re.compile(r"(\S+): the engine knows it as \S+ after (\d+) ms")


async def main(count: int, vllm_python: Path | None) -> None:
    console = Console(width=150)
    console.print(machine())
    await measure(console, count, None)
    if vllm_python is not None:
        await measure(console, count, Vllm(vllm_python, max_loras=2, max_cpu_loras=4))


async def measure(console: Console, count: int, server: Vllm | None) -> None:
    """One table: medians in milliseconds."""
    names = [f"cold/{number:03}" for number in range(count)]
    with tempfile.TemporaryDirectory(prefix="lora-extproc-bench-") as temporary:
        root = Path(temporary)
        base = root / "tiny-model"
        write_base(base)
        for seed, name in enumerate(names):
            if server is not None:
                write_lora(root / "origin" / name, base_model=str(base), seed=seed)
            else:
                write_adapter(root / "origin" / name, seed=seed, rank=8, hidden=512, layers=2)
        ours: dict[str, list[float]] = defaultdict(list)
        direct: dict[str, list[float]] = defaultdict(list)
        async with arranged(root, server) as (stack, beside, session):
            for name in names:
                for url, took in ((f"http://{stack.address}", ours), (beside, direct)):
                    took["cold"].append(await first_token_ms(session, url, name))
                    warm = [await first_token_ms(session, url, name) for _ in range(WARM)]
                    took["warm"].append(statistics.median(warm))
        phases, loads = read_log(root / "logs" / "node-1-stager.log")
    added = [cold - phases[name]["fetch"] - loads[name] - warm for name, cold, warm in zip(names, ours["cold"], direct["warm"], strict=True)]
    counted = [sum(phases[name].values()) + loads[name] + warm for name, warm in zip(names, direct["warm"], strict=True)]
    table = Table("", "ms", title=f"{'vLLM' if server else 'simulated engine'}: {count} adapters, medians, request to first token")
    rows: list[tuple[str, float]] = [("cold, through Envoy", statistics.median(ours["cold"]))]
    rows += [(f"  {phase}", statistics.median(phases[name][phase] for name in names)) for phase in PHASES]
    rows += [("  load into the engine", statistics.median(loads[name] for name in names)), ("  first token (warm, direct)", statistics.median(direct["warm"]))]
    rows += [
        ("  decide: Envoy, router, RPC, link", statistics.median(cold - known for cold, known in zip(ours["cold"], counted, strict=True))),
        ("  what we add beyond fetch, load and first token", statistics.median(added)),
        ("warm, through Envoy", statistics.median(ours["warm"])),
    ]
    rows += [("cold, engine directly, files in place", statistics.median(direct["cold"])), ("warm, engine directly", statistics.median(direct["warm"]))]
    for what, value in rows:
        table.add_row(what, f"{value:.1f}")
    table.add_row("warm: ratio to direct", f"{statistics.median(ours['warm']) / statistics.median(direct['warm']):.2f}")
    table.add_row("cold: ratio to direct", f"{statistics.median(ours['cold']) / statistics.median(direct['cold']):.2f}")
    console.print(table)


@contextlib.asynccontextmanager
async def arranged(root: Path, server: Vllm | None) -> AsyncIterator[tuple[Stack, str, aiohttp.ClientSession]]:
    """One node behind Envoy, and an engine beside whose resolver reads the origin."""
    port, other = free_ports(2)
    address = f"127.0.0.1:{other}"
    plan = Plan(root, port, 1, (OriginSettings(type="file", path=str(root / "origin")),), vllm=server, settings=parse({}, source="bench"))
    if server is not None:
        resolver = {"VLLM_PLUGINS": "lora_filesystem_resolver", "VLLM_LORA_RESOLVER_CACHE_DIR": str(root / "origin")}
        command: Sequence[str] = server.command(address, str(root / "tiny-model"))
        environment = {**server.environment(), **resolver}
    else:
        command = python("sim", "--listen", address, "--dir", str(root / "origin"), "--token-ms", str(TOKEN_MS))
        environment = None
    beside = await spawn("beside", command, root, environment=environment)
    try:
        async with Stack(plan) as stack, aiohttp.ClientSession() as session:
            await _until_healthy(session, f"http://{address}")
            for url, name in (
                (f"http://{stack.address}", stack.base_model.served_name),
                (f"http://{address}", stack.base_model.served_name if server else "base"),
            ):
                await first_token_ms(session, url, name)
            yield stack, f"http://{address}", session
    finally:
        await stop([beside], 5.0)


async def first_token_ms(session: aiohttp.ClientSession, url: str, model: str) -> float:
    """Milliseconds to the first event of a stream; the rest is read, so that the engine is idle again."""
    body = {"model": model, "prompt": "hi", "max_tokens": 4, "stream": True, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        first = await response.content.readline()
        took = (time.perf_counter() - began) * 1000
        if response.status != 200 or b"error" in first:
            raise SystemExit(f"{url} answers {response.status} for {model}: {(first + await response.read()).decode()}")
        json.loads(first.removeprefix(b"data: "))
        await response.read()
    return took


def read_log(log: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What the stager says of each adapter: milliseconds by phase, and of the load."""
    phases: dict[str, dict[str, float]] = {}
    loads: dict[str, float] = {}
    for line in log.read_text().splitlines():
        if (staged := STAGED.search(line)) is not None:
            phases[staged[1]] = {name: float(value) for name, _, value in (part.partition(" ") for part in staged[3].split(", "))}
        elif (loaded := LOADED.search(line)) is not None:
            loads[loaded[1]] = float(loaded[2])
    return phases, loads


async def _until_healthy(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(300):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="adapters")
    parser.add_argument("--vllm-python", type=Path, help="a Python that has vLLM; without it only the simulated engine is measured")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.count, arguments.vllm_python))
