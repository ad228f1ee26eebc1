"""Pods, routers and a proxy in a network namespace, as a cluster would run them: the objects are in a real kube-apiserver, the processes are ours.

| address | who listens there |
| --- | --- |
| 127.0.0.1 | etcd, the API server, and a gateway's control plane |
| PROXIES | an Envoy each: clients at 10080, its administration at 9901 |
| ROUTERS | a router each: ext_proc at 9002, health at 9003, HTTP at 9090 |
| 10.77.0.11 and up | a pod each, `a`, `b`, ...: the engine at 8000, the stager at 9102 and 9190; of a second rank at 8001, 9103 and 9191 |

No controller runs. A site writes what controllers and kubelets would write of its pods: their status, and the EndpointSlices of the Services that select them.
The thread of the test has to be in the namespace (tests/fakes/netns.py), as `network` in conftest.py has it.
"""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from extproc.config.read import parse
from extproc.envoyconfig import render
from extproc.up import demo
from extproc.up.processes import Child, python, spawn, stop
from extproc.up.stack import envoy_binary
from tests.e2e.client import Client, weights_of
from tests.fakes.children import kill, until_answered
from tests.fakes.kube_apiserver import ADMIN, Admin
from tests.fakes.netns import NETWORK
from tests.fakes.wait import PATIENCE_S

NAMES = ("team/a", "team/b", "team/c", "flat")  # adapters of the origin

ROUTERS, PROXIES = (f"{NETWORK}.3", f"{NETWORK}.4"), (f"{NETWORK}.5", f"{NETWORK}.6")
FRONT, ENVOY_ADMIN = 10080, 9901  # ports of a proxy
ENGINE, STAGER, STAGER_HTTP = 8000, 9102, 9190  # ports of a pod's first rank; those of the next are the next
DRAIN_S = 30.0  # what a pod has from SIGTERM on, as terminationGracePeriodSeconds


@dataclass(slots=True)
class Pod:
    """One that runs."""

    name: str
    ip: str
    stagers: list[Child]  # one of each data-parallel rank
    engines: list[Child]
    uid: str = ""  # of its object; "" before there is one
    is_ready: bool = True
    is_leaving: bool = False

    @property
    def endpoints(self) -> list[str]:
        return [f"{self.ip}:{ENGINE + rank}" for rank in range(len(self.engines))]


class Site:
    """`async with Site(admin, origin, directory) as site`. Everything that it has started ends with it."""

    def __init__(self, admin: Admin, origin: Path, directory: Path, services: Sequence[str] = ()) -> None:
        """`services`: the names of Services that select all pods, with the engine's port alone."""
        self.admin = admin
        self.pods: dict[str, Pod] = {}
        self.routers: list[Child] = []
        self.others: list[Child] = []  # Envoy, and whatever a test starts beside it; ended in reverse
        self.directory = directory
        self._origin = origin
        self.services = dict.fromkeys(services, "http")  # and what the engine's port is called there
        self._started = 0  # ranks of pods; each has a directory of its own, though a name comes again
        self._publishing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop([*self.others[::-1], *self.routers], 2.0)
        await stop([child for pod in self.pods.values() for child in (*pod.stagers, *pod.engines)], 1.0)

    # ---- routers and proxies

    async def start_router(self, raw: dict[str, Any], ip: str = ROUTERS[0], token: str = ADMIN) -> None:
        """With these settings, in which addresses are replaced, and the way to the API server; `token` is that of its service account."""
        file = self.directory / f"router-{ip}.yaml"
        file.write_text(yaml.safe_dump(self.placed(raw, ip, token)))
        self.routers.append(await spawn(f"router-{ip}", python("router", "--config", str(file)), self.directory))

    def placed(self, raw: dict[str, Any], ip: str, token: str = ADMIN) -> dict[str, Any]:
        """Settings as a pod has them, for a process that has an address and a kubeconfig."""
        kubeconfig = self.admin.server.kubeconfig(self.directory / f"kubeconfig-{ip}", token)
        listen = {"listen": f"{ip}:9002", "health_listen": f"{ip}:9003", "http_listen": f"{ip}:9090"}
        pools = [{**pool, "discovery": [{**source, "kubeconfig": kubeconfig} for source in pool["discovery"]]} for pool in raw["pools"]]
        placed = {**raw, "pools": pools, "router": {**raw.get("router", {}), **listen}}
        if raw.get("discovery", {}).get("dir"):
            placed["discovery"] = {**raw["discovery"], "dir": str(self.directory / f"kept-{ip}")}
        return placed

    async def start_envoy(self, raw: dict[str, Any], router: str = ROUTERS[0], ip: str = PROXIES[0]) -> None:
        """A plain Envoy, which knows of no endpoint but through this router."""
        envoy = {**raw.get("envoy", {}), "listen": f"{ip}:{FRONT}", "admin": f"{ip}:{ENVOY_ADMIN}", "router": f"{router}:9002"}
        bootstrap = self.directory / f"envoy-{ip}.yaml"
        bootstrap.write_text(await asyncio.to_thread(render, parse({**raw, "envoy": envoy}, source="test")))
        await self.spawn(f"envoy-{ip}", [str(envoy_binary()), "-c", str(bootstrap), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id"])

    async def spawn(self, name: str, command: Sequence[str]) -> Child:
        """A program that ends with the site."""
        child = await spawn(name, command, self.directory)
        self.others.append(child)
        return child

    # ---- pods

    async def add(self, name: str, ranks: int = 1, **pod: Any) -> None:
        """A pod that is ready. `pod`: what Admin.pod takes beside."""
        ip = self.ip(name)
        one = self.pods[name] = Pod(name, ip, [], [])
        for rank in range(ranks):
            await self._start_rank(one, rank)
        await until_answered(*(f"http://{ip}:{port + rank}{path}" for rank in range(ranks) for port, path in ((ENGINE, "/health"), (STAGER_HTTP, "/readyz"))))
        one.uid = (await self.admin.pod(name, ip, **pod)).metadata.uid
        await self._publish()

    async def _start_rank(self, pod: Pod, rank: int) -> None:
        self._started += 1
        label = f"{pod.name}-{self._started}"
        directory = self.directory / label
        directory.mkdir()
        address = await self._engine_at(pod, rank)
        engine = {"url": f"http://{address}", "base_model": demo.BASE_MODEL, "max_loras": 4, "max_cpu_loras": 8}
        stager = {"listen": f"{pod.ip}:{STAGER + rank}", "http_listen": f"{pod.ip}:{STAGER_HTTP + rank}", "dir": str(directory), "engine": engine}
        file = self.directory / f"{label}.yaml"
        file.write_text(yaml.safe_dump({"stager": {**stager, "origins": [{"type": "file", "path": str(self._origin)}]}}))
        flags = ("--base-model", demo.BASE_MODEL, "--max-loras", "4", "--max-cpu-loras", "8", "--token-ms", "1")
        pod.stagers.append(await spawn(f"{label}-stager", python("stager", "--config", str(file)), self.directory))
        pod.engines.append(await spawn(f"{label}-engine", python("sim", "--listen", address, "--dir", str(directory), *flags), self.directory))

    async def _engine_at(self, pod: Pod, rank: int) -> str:
        """Where an engine that starts listens, and where its own stager finds it."""
        return f"{pod.ip}:{ENGINE + rank}"

    async def drain(self, name: str) -> None:
        """As `kubectl delete pod`: it is shown to terminate, its processes end in order, then it is gone."""
        pod = self.pods[name]
        await self.admin.terminate(name)
        pod.is_leaving = True
        await self._publish()
        await stop(pod.stagers, DRAIN_S)
        await stop(pod.engines, 5.0)
        await self._forget(name)

    async def kill(self, name: str) -> None:
        """Its node dies; the object goes later."""
        pod = self.pods[name]
        await kill(*pod.stagers, *pod.engines)
        await self._forget(name)

    async def show(self, name: str, *, is_ready: bool) -> None:
        """As the kubelet, after a probe."""
        await self.admin.pod(name, self.ip(name), is_ready=is_ready)
        self.pods[name].is_ready = is_ready
        await self._publish()

    async def have(self, *names: str) -> None:
        """Exactly these pods: others are killed, those that are missing are started together."""
        for name in self.pods.keys() - set(names):
            await self.kill(name)
        await asyncio.gather(*(self.add(name) for name in names if name not in self.pods))

    def ip(self, name: str) -> str:
        """Of the pod `a`, `b`, ..."""
        return f"{NETWORK}.{11 + ord(name) - ord('a')}"

    async def _forget(self, name: str) -> None:
        await self.admin.remove(name)
        del self.pods[name]
        await self._publish()

    async def _publish(self) -> None:
        """Write the EndpointSlices, as their controller does."""
        async with self._publishing:
            for service, port in self.services.items():
                endpoints = [
                    {
                        "addresses": [pod.ip],
                        "conditions": {"ready": pod.is_ready and not pod.is_leaving, "serving": pod.is_ready, "terminating": pod.is_leaving},
                        "targetRef": {"kind": "Pod", "name": pod.name, "namespace": self.admin.namespace, "uid": pod.uid},
                        "nodeName": "n1",
                    }
                    for pod in self.pods.values()
                    if pod.uid
                ]
                await self.admin.slice(f"{service}-1", service, endpoints, [{"name": port, "port": ENGINE, "protocol": "TCP"}])

    # ---- what is seen of it

    async def until_known(self, *names: str, cluster: str = "llama", envoy_admin: str = f"{PROXIES[0]}:{ENVOY_ADMIN}") -> None:
        """Until an Envoy has these pods in its cluster, and no others."""
        wanted = {endpoint for name in names for endpoint in self.pods[name].endpoints}
        async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://{envoy_admin}/clusters") as response:
                        lines = [line.split("::") for line in (await response.text()).splitlines()]
                    if {line[1] for line in lines if line[0] == cluster and line[2] == "cx_active"} == wanted:
                        return
                await asyncio.sleep(0.05)

    async def busy(self, asking: "asyncio.Task[Any]") -> str:
        """The pod whose engine works on what is being asked."""
        while True:
            assert not asking.done(), asking.result()
            for name, pod in self.pods.items():
                if await self.metric(pod.endpoints[0], "num_requests_running"):
                    return name

    async def metric(self, endpoint: str, name: str) -> float:
        """What an engine says of itself."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{endpoint}/metrics") as response:
            found = re.search(rf"^vllm:{name}\S* (\S+)$", await response.text(), re.MULTILINE)
        assert found, name
        return float(found[1])

    @contextlib.asynccontextmanager
    async def load(self, front: str = f"{PROXIES[0]}:{FRONT}") -> AsyncIterator["Load"]:
        """While the block runs."""
        load = Load(front, self._origin)
        tasks = [asyncio.create_task(load.ask(name)) for name in NAMES]
        try:
            yield load
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a load that was answered."""

    began_s: float  # by the loop's clock
    took_s: float
    status: int
    words: str  # of an error; "" where the answer is what the adapter gives


class Load:
    """Requests for all adapters, of each one after another."""

    def __init__(self, front: str, origin: Path) -> None:
        self.asked: list[Asked] = []
        self._front = front
        self._origin = origin

    def failed(self, since_s: float = 0.0) -> Counter[tuple[int, str]]:
        """What went wrong with requests that began after `since_s`."""
        return Counter((one.status, one.words) for one in self.asked if one.began_s > since_s and (one.status, one.words) != (200, ""))

    async def more(self, count: int) -> None:
        """Until so many more are answered."""
        enough = len(self.asked) + count
        async with asyncio.timeout(PATIENCE_S):
            while len(self.asked) < enough:
                await asyncio.sleep(0.01)

    async def ask(self, name: str) -> None:
        """For one adapter, until cancelled."""
        client, weights, now = Client(self._front), weights_of(self._origin, name), asyncio.get_running_loop().time
        try:
            while True:
                began_s = now()
                try:
                    answer = await client.chat(name)
                    is_right = answer.status == 200 and answer.weights == weights
                    status, words = answer.status, "" if is_right else answer.text[:200]
                except aiohttp.ClientError as error:
                    status, words = 0, str(error)
                self.asked.append(Asked(began_s, now() - began_s, status, words))
                await asyncio.sleep(0.01)
        finally:
            await client.close()
