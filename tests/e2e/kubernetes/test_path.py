"""The whole path from a real kube-apiserver's pods: requests go through Envoy and a router to the pods of an InferencePool.

A pod is an object, and an engine and a stager that listen on its address. The addresses are of the loopback interface, which the API server takes in the
status of a pod; only in EndpointSlices it refuses them.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from extproc.config import parse
from extproc.envoyconfig import render
from extproc.up import demo
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.stack import envoy_binary
from tests.e2e.client import Client, weights_of
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.wait import PATIENCE_S

NAMES = ("team/a", "team/b", "team/c", "flat")  # adapters of the origin


class Site:
    """Pods, a router and an Envoy."""

    def __init__(self, cluster: Cluster, admin: Admin, origin: Path, directory: Path) -> None:
        self.cluster = cluster
        self.admin = admin
        self.answers: list[tuple[int, str]] = []  # of the load: status, and what an error says
        self.begun: list[float] = []  # when each of them was asked for, by the loop's clock
        self._origin = origin
        self._directory = directory
        self._ports = dict(zip(("engine", "stager", "stager_http"), free_ports(3), strict=True))  # of every pod
        self._pods: dict[str, list[Child]] = {}  # stager, engine
        self._others: list[Child] = []

    @property
    def front(self) -> str:
        return f"127.0.0.1:{self._ports['front']}"

    def address(self, name: str) -> str:
        """The endpoint of the pod `a`, `b`, ..."""
        return f"{self._ip(name)}:{self._ports['engine']}"

    async def start(self) -> None:
        """The router and Envoy, which know of no endpoint but through the API server."""
        self._ports |= zip(("front", "envoy_admin", "router", "router_http"), free_ports(4), strict=True)  # now, and not before the pods' long start
        kubeconfig = self.cluster.server.kubeconfig(self._directory / "kubeconfig")
        source = {"type": "kubernetes", "inference_pool": "llama", "kubeconfig": kubeconfig, "stager_port": self._ports["stager"]}
        raw: dict[str, Any] = {
            "pools": [{"name": "llama", "base_models": [demo.BASE_MODEL], "discovery": [source]}],
            "router": {
                "listen": f"127.0.0.1:{self._ports['router']}",
                "health_listen": "",
                "http_listen": f"127.0.0.1:{self._ports['router_http']}",
                "lameduck_s": 0,
                "hold_down_s": 1.0,  # a pod that died is not waited for: its object is gone, too
            },
            "envoy": {"listen": self.front, "admin": f"127.0.0.1:{self._ports['envoy_admin']}", "router": f"127.0.0.1:{self._ports['router']}"},
        }
        file = self._directory / "router.yaml"
        file.write_text(yaml.safe_dump(raw))
        self._others.append(await spawn("router", python("router", "--config", str(file)), self._directory))
        bootstrap = self._directory / "envoy.yaml"
        bootstrap.write_text(await asyncio.to_thread(render, parse(raw, source="test")))
        command = [str(envoy_binary()), "-c", str(bootstrap), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id"]
        self._others.append(await spawn("envoy", command, self._directory))

    async def stop(self) -> None:
        await stop(self._others[::-1], 2.0)
        await stop([child for pod in self._pods.values() for child in pod], 0.0)

    async def add(self, name: str) -> None:
        """A pod that is ready."""
        ip, ports = self._ip(name), self._ports
        directory = self._directory / name
        directory.mkdir()
        engine = {"url": f"http://{self.address(name)}", "base_model": demo.BASE_MODEL, "max_loras": 4, "max_cpu_loras": 8}
        stager = {"listen": f"{ip}:{ports['stager']}", "http_listen": f"{ip}:{ports['stager_http']}", "dir": str(directory), "engine": engine}
        file = self._directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"stager": {**stager, "origins": [{"type": "file", "path": str(self._origin)}]}}))
        slots = ("--max-loras", "4", "--max-cpu-loras", "8")
        command = python("sim", "--listen", self.address(name), "--dir", str(directory), "--base-model", demo.BASE_MODEL, *slots)
        self._pods[name] = [
            await spawn(f"{name}-stager", python("stager", "--config", str(file)), self._directory),
            await spawn(f"{name}-engine", command, self._directory),
        ]
        await _until_answered(f"http://{self.address(name)}/health", f"http://{ip}:{ports['stager_http']}/readyz")
        await self.admin.pod(name, ip)

    async def drain(self, name: str) -> None:
        """As `kubectl delete pod`: it is shown to terminate, its processes end in order, then it is gone."""
        await self.admin.terminate(name)
        stager, engine = self._pods.pop(name)
        await stop([stager], 30.0)
        await stop([engine], 5.0)
        await self.admin.remove(name)

    async def kill(self, name: str) -> None:
        """Its node dies; the object goes later."""
        for child in self._pods.pop(name):
            child.process.kill()
            await child.process.wait()
        await self.admin.remove(name)

    async def until_known(self, *names: str) -> None:
        """Until Envoy has these pods and no others."""
        wanted = {self.address(name) for name in names}
        async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://127.0.0.1:{self._ports['envoy_admin']}/clusters") as response:
                        lines = (await response.text()).splitlines()
                    if {line.split("::")[1] for line in lines if line.startswith("llama::") and "::cx_active::" in line} == wanted:
                        return
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Requests for all adapters, a few at a time, and for as long as it lasts."""
        tasks = [asyncio.create_task(self._ask(name)) for name in NAMES]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until_more(self, count: int) -> None:
        enough = len(self.answers) + count
        async with asyncio.timeout(PATIENCE_S):
            while len(self.answers) < enough:
                await asyncio.sleep(0.01)

    async def _ask(self, name: str) -> None:
        client, weights = Client(self.front), weights_of(self._origin, name)
        try:
            while True:
                began = asyncio.get_running_loop().time()
                answer = await client.chat(name)
                self.begun.append(began)
                is_right = answer.status == 200 and answer.weights == weights
                self.answers.append((answer.status, "" if is_right else answer.text[:200]))
                await asyncio.sleep(0.01)
        finally:
            await client.close()

    def _ip(self, name: str) -> str:
        return f"127.0.0.{11 + ord(name) - ord('a')}"


@pytest.fixture
async def site(cluster: Cluster, admin: Admin, origin: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """Two pods that serve."""
    site = Site(cluster, admin, origin, tmp_path)
    await admin.pool("llama", [site._ports["engine"]])
    try:
        for name in "ab":
            await site.add(name)
        await site.start()
        await site.until_known("a", "b")
        yield site
    finally:
        await site.stop()


async def test_pods_come_and_go_under_load_without_a_failed_request(site: Site) -> None:
    """Cold adapters, a pod that comes, one that terminates in order, and an API server that is away meanwhile."""
    async with site.load():
        await site.until_more(50)
        await site.add("c")
        await site.until_known("a", "b", "c")
        await site.until_more(50)
        site.cluster.server.stop()
        await site.until_more(50)
        await asyncio.to_thread(site.cluster.server.start)
        await site.drain("a")
        await site.until_known("b", "c")
        await site.until_more(50)
    assert Counter(site.answers).keys() == {(200, "")}


async def test_the_keys_of_a_pod_that_dies_move_to_another(site: Site) -> None:
    """What it was answering is lost; after that every adapter is served."""
    async with site.load():
        await site.until_more(50)
        await site.kill("a")
        await site.until_known("b")
        known_at = asyncio.get_running_loop().time()
        await site.until_more(50)
    assert Counter(answer for began, answer in zip(site.begun, site.answers, strict=True) if began > known_at).keys() == {(200, "")}
    lost = [answer for answer in site.answers if answer != (200, "")]
    assert len(lost) <= len(NAMES), Counter(lost)


async def _until_answered(*urls: str) -> None:
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        for url in urls:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.05)
