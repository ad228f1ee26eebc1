"""What benchmarks of the path share: Envoy alone and Envoy with a router before the same instant upstream, loaded by h2load.

Both arrangements live side by side for the whole run and are measured in turns, so that what else the machine does falls on both.
"""

import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from extproc.config.read import parse
from extproc.envoyconfig import render
from extproc.up.demo import write_adapter
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.stack import envoy_binary

ADAPTER = "bench/adapter"
CONNECTIONS = 32
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """One run of h2load. `rps` 0: as fast as it goes."""

    body: bytes
    seconds: float
    rps: int = 0


@dataclass(frozen=True)
class Measured:
    """What one run showed. Latencies in milliseconds, CPU in microseconds per request."""

    rate: float
    p50_ms: float
    p99_ms: float
    errors: int
    envoy_us: float
    router_us: float


@dataclass(frozen=True)
class Arrangement:
    """One way from the client to the upstream."""

    name: str
    address: str
    envoy: Child
    router: Child | None


def machine() -> str:
    """Where the figures come from."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    return f"{os.cpu_count()} cores, {model}, Linux {platform.release()}, Python {platform.python_version()}"


def chat_body(size: int, *, model_first: bool = False) -> bytes:
    """A chat request of about `size` bytes for the benchmark's adapter."""
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]}
    body = {"model": ADAPTER, **fields} if model_first else {**fields, "model": ADAPTER}
    fields["messages"][0]["content"] = "lorem ipsum " * max(1, (size - len(json.dumps(body))) // 12)
    return json.dumps(body).encode()


@contextlib.asynccontextmanager
async def arrangements(
    raw: dict[str, Any] | None = None, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda bootstrap: bootstrap
) -> AsyncIterator[tuple[Arrangement, Arrangement]]:
    """Envoy alone, and the same Envoy configuration with its router, which `change` may change."""
    with tempfile.TemporaryDirectory(prefix="lora-extproc-bench-") as temporary:
        directory = Path(temporary)
        upstream, alone, beside, router, stager, http = (f"127.0.0.1:{port}" for port in free_ports(6))
        write_adapter(directory / "origin" / ADAPTER, seed=1, rank=8, hidden=512, layers=2)
        raw = dict(raw or {})
        raw["pools"] = [{"name": "models", "endpoints": [{"address": upstream, "stager": stager, "node": "node-1"}]}]
        raw["router"] = {**raw.get("router", {}), "listen": router, "health_listen": "", "http_listen": http}
        raw["stager"] = {
            "listen": stager,
            "http_listen": "",
            "dir": str(directory / "node"),
            "origins": [{"type": "file", "path": str(directory / "origin")}],
            "engine": {"url": ""},
        }
        raw["envoy"] = {**raw.get("envoy", {}), "listen": beside, "admin": "", "router": router, "endpoints": "static"}  # so that Envoy alone has them, too
        rendered = yaml.safe_load(render(parse(raw, source="bench")))
        files = {
            "settings": yaml.safe_dump(raw),
            "with": yaml.safe_dump(change(without_access_log(rendered))),
            "alone": yaml.safe_dump(without_router(rendered, alone)),
            "upstream": yaml.safe_dump(instant_upstream(upstream)),
        }
        for name, text in files.items():
            (directory / f"{name}.yaml").write_text(text)
        children: list[Child] = []

        async def start(name: str, command: Sequence[str]) -> Child:
            children.append(await spawn(name, command, directory))
            return children[-1]

        def envoy(name: str, *more: str) -> list[str]:
            return [str(envoy_binary()), "-c", str(directory / f"{name}.yaml"), "-l", "error", "--use-dynamic-base-id", *more]

        try:
            await start("upstream", envoy("upstream", "--concurrency", "1"))
            await start("stager", python("stager", "--config", str(directory / "settings.yaml")))
            router_child = await start("router", python("router", "--config", str(directory / "settings.yaml")))
            pair = (
                Arrangement("Envoy alone", alone, await start("alone", envoy("alone")), None),
                Arrangement("Envoy + router", beside, await start("with", envoy("with")), router_child),
            )
            for arrangement in pair:
                await until_it_serves(arrangement.address, children)
            yield pair
        finally:
            await stop(children, 2.0)


async def measure(arrangement: Arrangement, load: Load) -> Measured:
    """Load one arrangement for a while."""
    with tempfile.TemporaryDirectory() as temporary:
        body, log, script = Path(temporary, "body"), Path(temporary, "log"), Path(temporary, "script")
        body.write_bytes(load.body)
        url = f"http://{arrangement.address}/v1/chat/completions"
        command = ["h2load", "-t", "1", "-d", str(body), "-H", "content-type: application/json", "--log-file", str(log)]
        if load.rps:
            script.write_text("".join(f"{at_ms:.3f}\t{url}\n" for at_ms in arrivals(load)))
            command += ["-c", "1", "-m", "100", "--timing-script-file", str(script)]
        else:
            command += ["--h1", "-c", str(CONNECTIONS), "-D", f"{load.seconds:g}", url]  # no warm-up: its CPU would be counted and its requests not
        before = _cpu(arrangement.envoy), _cpu(arrangement.router)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        output, _ = await process.communicate()
        after = _cpu(arrangement.envoy), _cpu(arrangement.router)
        rows = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    if not rows:
        raise SystemExit(f"h2load measured nothing:\n{output.decode()}")
    took = sorted(int(row[2]) / 1000 for row in rows if row[1] == "200")
    began, ended = int(rows[0][0]), max(int(row[0]) + int(row[2]) for row in rows)
    count = len(rows)
    return Measured(
        rate=len(took) / ((ended - began) / 1e6),
        p50_ms=took[len(took) // 2],
        p99_ms=took[int(len(took) * 0.99)],
        errors=count - len(took),
        envoy_us=(after[0] - before[0]) * 1e6 / count,
        router_us=(after[1] - before[1]) * 1e6 / count,
    )


def arrivals(load: Load) -> Iterator[float]:
    """When an open loop sends, in milliseconds from its start: a Poisson process, the same at every call.

    h2load's own --rps wakes a hundred times a second and sends what is due at once, five requests at 500/s, and each would wait for those before it.
    A script's pauses it rounds up to whole milliseconds: half of one is taken off each, or it would send 390/s.
    """
    source = random.Random(load.rps)
    at_ms = 0.0
    for _ in range(round(load.rps * load.seconds)):
        at_ms += max(0.0, source.expovariate(load.rps) * 1000 - 0.5)
        yield at_ms


def median(runs: Sequence[Measured]) -> Measured:
    """Each figure's median over several runs; errors are added up."""
    figures = {name: statistics.median(getattr(run, name) for run in runs) for name in ("rate", "p50_ms", "p99_ms", "envoy_us", "router_us")}
    return Measured(errors=sum(run.errors for run in runs), **figures)


def need_h2load() -> None:
    if shutil.which("h2load") is None:
        raise SystemExit("h2load is needed: apt-get install nghttp2-client")


def without_access_log(bootstrap: dict[str, Any]) -> dict[str, Any]:
    """A benchmark does not measure the terminal."""
    copy: dict[str, Any] = json.loads(json.dumps(bootstrap))
    _manager(copy).pop("access_log", None)
    return copy


def without_router(bootstrap: dict[str, Any], address: str) -> dict[str, Any]:
    """The same proxy at another address, without ext_proc: what Envoy costs by itself."""
    copy = without_access_log(bootstrap)
    host, _, port = address.rpartition(":")
    copy["static_resources"]["listeners"][0]["address"]["socket_address"] = {"address": host, "port_value": int(port)}
    manager = _manager(copy)
    manager["http_filters"] = [f for f in manager["http_filters"] if f["name"] != "envoy.filters.http.ext_proc"]
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        route["route"].pop("cluster_header", None)
        route["route"]["cluster"] = "models"
    for cluster in copy["static_resources"]["clusters"]:
        cluster.pop("load_balancing_policy", None)
    return copy


def instant_upstream(address: str) -> dict[str, Any]:
    """An Envoy that answers everything at once: what is measured is the way to it."""
    host, _, port = address.rpartition(":")
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "upstream",
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "{}"}}}]}
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.buffer",  # reads the whole body first, as an engine does
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer", "max_request_bytes": 64 * 2**20},
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            },
        ],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    listener = {"name": "upstream", "address": {"socket_address": {"address": host, "port_value": int(port)}}, "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener]}}


def _manager(bootstrap: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def _cpu(child: Child | None) -> float:
    """CPU seconds of a process so far."""
    if child is None:
        return 0.0
    fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mib(child: Child) -> float:
    """Resident memory of a process now."""
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


async def until_it_serves(address: str, children: Sequence[Child]) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            for child in children:
                if child.process.returncode is not None:
                    raise SystemExit(f"{child.name} ended: {child.last_words()}")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(f"http://{address}/v1/chat/completions", json={"model": ADAPTER}) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise SystemExit(f"{address} does not serve")
