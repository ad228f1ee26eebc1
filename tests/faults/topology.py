"""The fleet of a case: every part a process of its own, as a deployment has them, which can be ended, started again and asked what it sees.

Settings are the product's defaults, but for what a layout says: bounds are promised for those.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import yaml

from extproc import envoyconfig
from extproc.config.read import parse
from extproc.errors import StartError
from extproc.up.demo import BASE_MODEL
from extproc.up.processes import Child, free_ports, kill_family, python, spawn, stop
from extproc.up.stack import Node, Router, envoy_binary
from tests.fakes.disks import Disk, tmpfs

from .network import LOOPBACK, Host, Network

START_S = 60.0  # eleven Python processes on two busy cores
STOP_S = 5.0
POLL_S = 0.05
ENGINE_SLOTS, ENGINE_CPU_SLOTS = 16, 256  # more adapters than a case has: what the slots do is shown elsewhere
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
OBEYS_PERMISSIONS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")  # root without what lets it read everything
MAX_LOG_BYTES = 4 * 2**20  # of each process, read for the report
_NOTABLE = re.compile(r"^\S+ \S+ (?:[WEC]) (.*)|^(Traceback .*)|^\[[^]]*\]\[\d+\]\[(?:warning|error|critical)\]\[\w+\] (?:\[[^]]*\] )?(.*)")
_VARYING = re.compile(r"\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")


class Credentials(Protocol):
    """What processes show each other, renewed while they run."""

    def settings(self, process: str, address: str) -> dict[str, str]:
        """`rpc` of one process, which listens on `address`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What to start."""

    nodes: int = 3
    late_nodes: int = 0  # further ones that everybody is told of, and that a script starts
    routers: int = 2
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by group, over the defaults
    origin: Mapping[str, Any] = field(default_factory=dict)  # of the origin's settings
    in_namespaces: bool = False  # each node on a host of its own
    disk: str = ""  # mount options of a tmpfs for each node's directory, as `size=2m`
    fakes_clocks: bool = False
    obeys_permissions: bool = False  # for what runs as root
    credentials: Callable[[Path], Credentials] | None = None

    @property
    def needs_root(self) -> bool:
        return self.in_namespaces or bool(self.disk)


@dataclass(frozen=True, slots=True)
class Program:
    """How one process is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str] | None
    ready: str  # the URL that answers 200 when it is


class Fleet:
    """`async with Fleet(layout, directory, origin, network) as fleet`: all is ready then, and nothing is left behind. Raises StartError."""

    def __init__(self, layout: Layout, directory: Path, origin: str, network: Network | None) -> None:
        self.layout = layout
        self.directory = directory
        self.nodes: list[Node] = []
        self.routers: list[Router] = []
        self.hosts: dict[str, Host] = {}
        self.hub = network.hub if network is not None else LOOPBACK
        self.disks: dict[str, Disk] = {}
        self.address = self.admin = ""  # where clients come in; Envoy's own administration
        self.credentials = layout.credentials(directory) if layout.credentials is not None else None
        self._origin = origin
        self._network = network
        self._programs: dict[str, Program] = {}
        self._children: dict[str, Child] = {}
        self._ended: set[str] = set()  # by a script
        self._scope = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Fleet":
        try:
            await self._lay_out()
            early = [name for name in self._programs if not any(name.startswith(f"{node.name}-") for node in self.nodes[self.layout.nodes :])]
            for name in early:
                await self._spawn(name)
            for name in early:
                await self.until_ready(name)
            await self.until_seen(*(node.name for node in self.nodes[: self.layout.nodes]))
            await self.until_envoy_sees(*(router.listen for router in self.routers), *(node.engine for node in self.nodes[: self.layout.nodes]))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGCONT)  # one that a case stopped could not end
        for part in ("envoy", "router", "stager", "engine"):  # from the client inwards
            await stop([child for name, child in self._children.items() if part in name], STOP_S)
        await self._scope.aclose()

    # -- processes

    def pid(self, name: str) -> int:
        return self._children[name].process.pid

    @property
    def names(self) -> list[str]:
        """Of all that runs: `envoy`, `router-1`, `node-1-stager`, `node-1-engine`."""
        return [name for name, child in self._children.items() if child.process.returncode is None]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    async def end(self, name: str, signal_number: int) -> float:
        """Send a process a signal that ends it; the seconds that it took."""
        began = time.monotonic()
        self._ended.add(name)
        process = self._children[name].process
        process.send_signal(signal_number)
        await process.wait()
        return time.monotonic() - began

    async def start(self, name: str) -> None:
        """Start a process that a script has ended, or that is late, as it is meant to be."""
        if name in self._children:
            kill_family(self._children[name])
        await self._spawn(name)
        self._ended.discard(name)

    async def _spawn(self, name: str) -> None:
        program = self._programs[name]
        self._children[name] = await spawn(name, program.command, self.directory / "logs", environment=program.environment)

    def died(self) -> list[str]:
        """Which ended by themselves, and what they said last."""
        gone = [child for name, child in self._children.items() if child.process.returncode is not None and name not in self._ended]
        return [f"{child.name} ended by itself with code {child.process.returncode}: {child.last_words()[-200:]}" for child in gone]

    # -- what the parts see

    async def until_ready(self, name: str) -> None:
        """Until the process says so itself."""
        await self._until(lambda session: _answers(session, self._programs[name].ready), f"{name} is not ready", name)

    async def until_seen(self, *nodes: str) -> None:
        """Until every router sees these nodes ready."""

        async def all_see(session: aiohttp.ClientSession) -> bool:
            return all([set(nodes) <= await _ready_nodes(session, router.http) for router in self.routers])

        await self._until(all_see, f"a router does not see {', '.join(nodes)} ready")

    async def seen_by(self, node: str) -> int:
        """How many routers see that node ready."""
        async with aiohttp.ClientSession() as session:
            return sum([node in await _ready_nodes(session, router.http) for router in self.routers])

    async def until_envoy_sees(self, *addresses: str) -> None:
        """Until Envoy's health check has found these routers or engines well."""
        wanted = tuple(f"::{address}::health_flags::healthy" for address in addresses)

        async def sees(session: aiohttp.ClientSession) -> bool:
            async with session.get(f"http://{self.admin}/clusters") as response:
                lines = (await response.text()).splitlines()
            return all(any(line.endswith(end) for line in lines) for end in wanted)

        await self._until(sees, f"Envoy does not see {', '.join(addresses)}")

    async def owner(self, model: str) -> str:
        """The node that the first router would ask first."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.routers[0].http}/v1/owner/{model}") as response:
            return str((await response.json())["candidates"][0]["node"])

    async def metric(self, node: str, name: str) -> float:
        """The sum of one metric of a node's stager, over its labels."""
        return await _metric(self.node(node).stager_http, name)

    async def answered(self) -> list[float]:
        """How many requests each router has answered."""
        return [await _metric(router.http, "lora_extproc_requests_total") for router in self.routers]

    async def _until(self, holds: Callable[[aiohttp.ClientSession], Awaitable[bool]], complaint: str, name: str = "") -> None:
        deadline = time.monotonic() + START_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    if await holds(session):
                        return
                if died := self.died():
                    raise StartError(died[0])
                if time.monotonic() > deadline:
                    raise StartError(f"{complaint} after {START_S:g} s. {self._children[name].last_words() if name else ''}")
                await asyncio.sleep(POLL_S)

    # -- what they said and took

    def sizes(self) -> dict[str, int]:
        """Bytes of each process's log now."""
        return {log.stem: log.stat().st_size for log in (self.directory / "logs").glob("*.log")}

    def notable(self, since: Mapping[str, int]) -> Counter[str]:
        """Warnings, errors and tracebacks since then, without their numbers: how often each was said, by what kind of process."""
        said: Counter[str] = Counter()
        for log in (self.directory / "logs").glob("*.log"):
            with log.open("rb") as file:
                file.seek(since.get(log.stem, 0))
                text = file.read(MAX_LOG_BYTES).decode(errors="replace")
            kind = re.sub(r"(node-)?\d+-?", "", log.stem)
            for line in text.splitlines():
                if (match := _NOTABLE.match(line)) is not None:
                    words = next(group for group in match.groups() if group is not None)
                    said[f"{kind}: {_VARYING.sub('#', words)[:160]}"] += 1
        return said

    def resources(self) -> dict[str, tuple[float, int]]:
        """Resident MiB and open files of every process."""
        found = {}
        for name in self.names:
            status = Path(f"/proc/{self.pid(name)}/status").read_text()
            kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            found[name] = (kib / 1024, len(os.listdir(f"/proc/{self.pid(name)}/fd")))  # noqa: PTH208
        return found

    # -- laying out

    async def _lay_out(self) -> None:
        layout, count = self.layout, self.layout.nodes + self.layout.late_nodes
        for directory in ("logs", "run"):
            (self.directory / directory).mkdir(parents=True, exist_ok=True)
        ports = iter(free_ports(3 * count + 3 * layout.routers + 2))
        for number in range(1, count + 1):
            name = f"node-{number}"
            host = self.hosts[name] = await self._network.add(name) if self._network is not None and layout.in_namespaces else LOOPBACK
            engine, stager, http = (f"{host.address}:{next(ports)}" for _ in range(3))
            self.nodes.append(Node(name, engine, stager, http, self._directory_of(name)))
        self.routers = [Router(*(f"{LOOPBACK.address}:{next(ports)}" for _ in range(3))) for _ in range(layout.routers)]
        self.address, self.admin = (f"{LOOPBACK.address}:{next(ports)}" for _ in range(2))
        for node in self.nodes:
            self._add_node(node)
        for number, router in enumerate(self.routers, 1):
            self._add(f"router-{number}", python("router"), f"http://{router.http}/readyz", {"router": router.settings()}, router.listen)
        bootstrap = self.directory / "run" / "envoy.yaml"
        bootstrap.write_text(await asyncio.to_thread(envoyconfig.render, parse(self._settings({}), source="envoy")))
        command = [str(envoy_binary()), "-c", str(bootstrap), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id", "--drain-time-s", "1"]
        self._programs["envoy"] = Program(tuple(command), None, f"http://{self.admin}/ready")

    def _directory_of(self, name: str) -> Path:
        """On a file system of its own, where the layout says so."""
        place = self.directory / name
        place.mkdir()
        if self.layout.disk:
            self.disks[name] = self._scope.enter_context(tmpfs(place, self.layout.disk))
            place = self.disks[name].node
            place.mkdir()
        return place

    def _add_node(self, node: Node) -> None:
        engine = ["--listen", node.engine, "--dir", str(node.directory), "--base-model", BASE_MODEL]
        slots = ["--max-loras", str(ENGINE_SLOTS), "--max-cpu-loras", str(ENGINE_CPU_SLOTS)]
        prefix = (*self.hosts[node.name].prefix, *(OBEYS_PERMISSIONS if self.layout.obeys_permissions and os.geteuid() == 0 else ()))
        command = (*self.hosts[node.name].prefix, *python("sim", *engine, *slots))
        self._programs[f"{node.name}-engine"] = Program(command, self._environment(), f"http://{node.engine}/health")
        own = {"listen": node.stager, "http_listen": node.stager_http, "dir": str(node.directory)}
        limits = {"url": f"http://{node.engine}", "max_loras": ENGINE_SLOTS, "max_cpu_loras": ENGINE_CPU_SLOTS}
        own_settings = {"stager": {**own, "engine": limits}}
        self._add(f"{node.name}-stager", [*prefix, *python("stager")], f"http://{node.stager_http}/readyz", own_settings, node.stager)

    def _add(self, name: str, command: Sequence[str], ready: str, own: Mapping[str, Mapping[str, Any]], address: str) -> None:
        if self.credentials is not None:
            own = {**own, "rpc": self.credentials.settings(name, address)}
        file = self.directory / "run" / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self._settings(own)))
        self._programs[name] = Program((*command, "--config", str(file)), self._environment(), ready)

    def _settings(self, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        endpoints = [{"address": node.engine, "stager": node.stager, "node": node.name} for node in self.nodes]
        origin = {"type": "http", "url": self._origin, "allow_private": True, **self.layout.origin}
        common: dict[str, Mapping[str, Any]] = {
            "router": self.routers[0].settings(),
            "stager": {"origins": [origin], "drain_s": 0},  # a stager that is told to stop is one that is gone
            "envoy": {"listen": self.address, "admin": self.admin, "router": ",".join(router.listen for router in self.routers)},
        }
        raw: dict[str, Any] = {"pools": [{"name": "models", "base_models": [BASE_MODEL], "endpoints": endpoints}]}
        for groups in (common, self.layout.settings, own):
            for group, values in groups.items():
                raw[group] = {**raw.get(group, {}), **values}
        return raw

    # -- clocks

    def _environment(self) -> dict[str, str] | None:
        """With a clock that `set_clocks` moves, for Python's processes. Timers go on by the machine's own."""
        if not self.layout.fakes_clocks:
            return None
        if not FAKETIME.exists():
            raise StartError(f"there is no {FAKETIME}: apt-get install faketime")
        file = self.directory / "run" / "clock"
        if not file.exists():
            file.write_text("+0\n")
        fake = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_CACHE_DURATION": "1"}
        return {**os.environ, **fake, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}

    def set_clocks(self, offset: str) -> None:
        """As libfaketime writes it: `+1h`, `-2h`."""
        fresh = self.directory / "run" / "clock.new"
        fresh.write_text(f"{offset}\n")
        fresh.replace(self.directory / "run" / "clock")


async def _ready_nodes(session: aiohttp.ClientSession, router: str) -> set[str]:
    async with session.get(f"http://{router}/v1/endpoints") as response:
        return {endpoint["node"] for endpoint in await response.json() if endpoint["standing"] == "ready"}


async def _metric(address: str, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[{{ ]", line))


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    async with session.get(url) as response:
        return response.status == 200


@contextlib.asynccontextmanager
async def network_for(layout: Layout, directory: Path) -> AsyncIterator[Network | None]:
    """The hosts of a layout, where it wants some."""
    if not layout.in_namespaces:
        yield None
        return
    async with Network(directory) as network:
        yield network
