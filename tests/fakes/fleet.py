"""A fleet of real processes that follows a file: per node a simulated engine and a stager, routers with file discovery, and an Envoy that follows them by xDS.

The file is written as tools write it, by an atomic rename. Nodes beyond `Layout.nodes` run from the start and are in no file until `show` names them.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from extproc import envoyconfig
from extproc.config.read import parse
from extproc.up.demo import BASE_MODEL, write_adapter
from extproc.up.processes import Child, free_ports, kill_family, python, spawn, stop
from extproc.up.stack import Node, Router, envoy_binary

START_S = 90.0  # two dozen Python processes on two busy cores
STOP_S = 5.0
POLL_S = 0.05
POOL = "models"


@dataclass(frozen=True, slots=True)
class Layout:
    """What to start. `engine`: options of the simulated engine; `settings`: by group, over the defaults."""

    nodes: int = 3
    late_nodes: int = 0
    routers: int = 2
    adapters: int = 8
    engine: Mapping[str, str] = field(default_factory=dict)
    cpu_slots: int = 64
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base_model: str = BASE_MODEL
    hosts: Mapping[str, str] = field(default_factory=dict)  # by node: the IP address that the file has, where it is not the engine's own
    bootstrap: Callable[[dict[str, Any]], None] | None = None  # changes Envoy's


class Fleet:
    """`async with Fleet(layout, directory) as fleet`: all serves then, and nothing is left behind. Raises RuntimeError for what does not come about.

    `nodes`: those that somebody else runs, instead of own ones; the first `layout.nodes` of them are in the file.
    """

    def __init__(self, layout: Layout, directory: Path, nodes: Sequence[Node] = ()) -> None:
        self.layout = layout
        self.directory = directory
        self.adapters = [f"team/{number}" for number in range(layout.adapters)]
        local = (f"127.0.0.1:{port}" for port in free_ports(3 * (layout.nodes + layout.late_nodes + layout.routers) + 2))
        names = [f"node-{number}" for number in range(1, layout.nodes + layout.late_nodes + 1)]
        self._runs_nodes = not nodes
        self.nodes = list(nodes) or [Node(name, next(local), next(local), next(local), directory / name) for name in names]
        self.routers = [Router(next(local), next(local), next(local)) for _ in range(layout.routers)]
        self.address, self.admin = next(local), next(local)  # where clients come in; Envoy's own administration
        self.file = directory / "endpoints.json"
        self.children: dict[str, Child] = {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        await self._session.close()
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGCONT)  # one that a test stopped could not end
        for part in ("envoy", "router", "stager", "engine"):  # from the client inwards
            await stop([child for name, child in self.children.items() if part in name], STOP_S)

    # -- the file

    def show(self, nodes: Iterable[Node], **instances: str) -> None:
        """Write the file anew. `instances` by node, with `_` for `-`."""
        self.write([self.entry(node) | {"instance": instances.get(node.name.replace("-", "_"), "")} for node in nodes])

    def entry(self, node: Node) -> dict[str, str]:
        """A node as the file has it."""
        host, _, port = node.engine.rpartition(":")
        return {"address": f"{self.layout.hosts.get(node.name, host)}:{port}", "stager": node.stager, "node": node.name}

    def write(self, entries: Sequence[Mapping[str, str]]) -> None:
        """Write the file anew with these."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps({POOL: list(entries)}))
        fresh.replace(self.file)

    # -- processes

    async def spawn(self, name: str, command: Sequence[str], *, pipe_output: bool = False) -> None:
        """Start a process; again, where one of that name has ended."""
        if name in self.children:
            kill_family(self.children[name])
        self.children[name] = await spawn(name, command, self.directory, pipe_output=pipe_output)

    async def start_again(self, name: str) -> None:
        """Start a process that has ended, with the same command."""
        await self.spawn(name, self.children[name].command)

    async def kill(self, *names: str) -> None:
        """End these at once, as a machine that is gone."""
        for name in names:
            kill_family(self.children[name])
        for name in names:
            await self.children[name].process.wait()

    def signal(self, name: str, number: int) -> None:
        self.children[name].process.send_signal(number)

    async def run(self, *arguments: str) -> str:
        """A command of this package's own, to its end; what it prints. Raises RuntimeError if it fails."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*python(*arguments), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
        output, errors = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: {errors.decode(errors='replace').strip()}")
        return output.decode()

    # -- what they see

    async def standings(self, router: Router) -> dict[str, str]:
        """How each node stands, by its name, as one router says."""
        async with self._session.get(f"http://{router.http}/v1/endpoints") as response:
            return {endpoint["node"]: endpoint["standing"] for endpoint in await response.json()}

    async def until_standing(self, standing: str, *nodes: Node) -> None:
        """Until every router says so of all these nodes; "": that it has no such endpoint."""
        names = [node.name for node in nodes]

        async def holds() -> bool:
            shown = [await self.standings(router) for router in self.routers]
            return all(of.get(name, "") == standing for of in shown for name in names)

        await self.until(holds, f"a router does not see {', '.join(names)} {standing or 'gone'}")

    async def in_flight(self, node: Node) -> float:
        """Requests that run and wait at the node's engine, as it says itself."""
        async with self._session.get(f"http://{node.engine}/metrics") as response:
            text = await response.text()
        return sum(float(value) for value in re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.MULTILINE))

    async def known_at(self, node: Node) -> frozenset[str]:
        """The adapters that the node's engine lists, in whatever version."""
        async with self._session.get(f"http://{node.engine}/v1/models") as response:
            models = (await response.json())["data"]
        return frozenset(model["id"].partition("@")[0] for model in models if model["parent"])

    async def metric(self, address: str, name: str) -> float:
        """The sum of one metric over its labels, of a router's or a stager's HTTP address."""
        async with self._session.get(f"http://{address}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[{{ ]", line))

    async def until(self, holds: Callable[[], Awaitable[bool]], complaint: str) -> None:
        try:
            async with asyncio.timeout(START_S):
                while True:
                    with contextlib.suppress(aiohttp.ClientError, OSError):
                        if await holds():
                            return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise RuntimeError(f"{complaint} after {START_S:g} s") from None

    # -- starting

    async def _start(self) -> None:
        self.show(self.nodes[: self.layout.nodes])
        for seed, name in enumerate(self.adapters if self._runs_nodes else ()):
            write_adapter(self.directory / "origin" / name, seed=seed, rank=2, hidden=64, layers=1)
        for node in self.nodes if self._runs_nodes else ():
            node.directory.mkdir()
            await self.spawn(f"{node.name}-engine", self.engine_command(node))
            await self.spawn(f"{node.name}-stager", python("stager", "--config", self._write(f"{node.name}-stager", self._of_stager(node))))
        for number, router in enumerate(self.routers, 1):
            await self.spawn(f"router-{number}", python("router", "--config", self._write(f"router-{number}", {"router": router.settings()})))
        raw = self._settings({})
        if raw["envoy"].get("endpoints") == "static":
            raw["pools"][0]["endpoints"] = [self.entry(node) for node in self.nodes[: self.layout.nodes]]
        rendered = yaml.safe_load(await asyncio.to_thread(envoyconfig.render, parse(raw, source="envoy")))
        if self.layout.bootstrap is not None:
            self.layout.bootstrap(rendered)
        bootstrap = self.directory / "envoy.yaml"
        bootstrap.write_text(yaml.safe_dump(rendered))
        command = [str(envoy_binary()), "-c", str(bootstrap), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id"]
        await self.spawn("envoy", [*command, "--file-flush-interval-msec", "100"], pipe_output=True)
        urls = [*(f"http://{node.engine}/health" for node in self.nodes), *(f"http://{node.stager_http}/readyz" for node in self.nodes)]
        urls += [*(f"http://{router.http}/readyz" for router in self.routers), f"http://{self.admin}/ready"]
        for url in urls:
            await self.until(lambda url=url: self._answers(url), f"{url} does not answer")  # type: ignore[misc]
        await self.until_standing("ready", *self.nodes[: self.layout.nodes])
        await self.until_envoy_sees(self.routers)

    async def until_envoy_sees(self, routers: Sequence[Router]) -> None:
        """Until Envoy's health check has found these routers well."""
        wanted = {f"{envoyconfig.ROUTER_CLUSTER}::{router.listen}::health_flags::healthy" for router in routers}

        async def sees() -> bool:
            async with self._session.get(f"http://{self.admin}/clusters") as response:
                return wanted <= set((await response.text()).splitlines())

        await self.until(sees, "Envoy does not see every router")

    async def _answers(self, url: str) -> bool:
        async with self._session.get(url) as response:
            return response.status == 200

    def engine_command(self, node: Node) -> list[str]:
        options = {
            "listen": node.engine,
            "dir": str(node.directory),
            "base-model": self.layout.base_model,
            "max-loras": "16",
            "max-cpu-loras": str(self.layout.cpu_slots),
        }
        return python("sim", *(word for name, value in (options | dict(self.layout.engine)).items() for word in (f"--{name}", value)))

    def _of_stager(self, node: Node) -> dict[str, Any]:
        engine = {"url": f"http://{node.engine}", "max_loras": 16, "max_cpu_loras": self.layout.cpu_slots}
        own = {"listen": node.stager, "http_listen": node.stager_http, "dir": str(node.directory), "engine": engine}
        return {"stager": {"origins": [{"type": "file", "path": str(self.directory / "origin")}], "peers": {"mode": "off"}, **own}}

    def _write(self, name: str, own: dict[str, Any]) -> str:
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self._settings(own)))
        return str(path)

    def _settings(self, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        source = {"type": "file", "path": str(self.file), "poll_s": 0.2}
        envoy = {"listen": self.address, "admin": self.admin, "router": ",".join(router.listen for router in self.routers), "health_interval_s": 0.5}
        raw: dict[str, Any] = {"pools": [{"name": POOL, "base_models": [self.layout.base_model], "discovery": [source]}], "envoy": envoy}
        for groups in (self.layout.settings, own):
            for group, values in groups.items():
                raw[group] = {**raw.get(group, {}), **values}
        return raw
