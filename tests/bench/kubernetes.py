"""`python -m tests.bench.kubernetes`: what following ten thousand pods takes, beside the same bytes read by aiohttp and json alone, and by lightkube where it
is installed (`pip install lightkube`).

Another process is the API server: it has the pods ready as bytes, in pages and as events of a watch, so that what is measured is ours. First the list, until
the source shows its set; then a burst of events, as a reflector takes them in; then changes at a steady rate, with all the sets that the source makes of them.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml
from aiohttp import web
from rich.console import Console
from rich.table import Table

from extproc.config.discovery import KubernetesSourceSettings
from extproc.discovery.kubernetes import KubernetesSource
from extproc.discovery.kubernetes_objects import Pod
from extproc.discovery.source import Shown
from extproc.kubernetes.access import Access
from extproc.kubernetes.api import Api
from extproc.kubernetes.objects import PODS
from extproc.kubernetes.reflector import Changes, Query, Reflector
from extproc.up.processes import free_ports

from .harness import machine

NAMESPACE = "bench"
PATH = PODS.path(NAMESPACE)


@dataclass(frozen=True)
class Took:
    wall_s: float
    cpu_s: float


def pod(n: int, version: int) -> bytes:
    """A vLLM pod of 7 KB, as the API server writes one: most of it is the specification and who manages which field."""
    env = [{"name": f"VLLM_SETTING_{i}", "valueFrom": {"configMapKeyRef": {"name": "vllm", "key": f"setting-{i}"}}} for i in range(25)]
    container = {"name": "vllm", "image": "vllm/vllm-openai:v0.32.0", "args": ["--enable-lora", "--max-loras", "16"] * 4, "env": env}
    labels = {"app": "vllm", "pod-template-hash": "7d9c6b5f8"}
    managed = [{"manager": "kubelet", "fieldsV1": {f"f:field-{i}": {"f:inner": {}, ".": {}} for i in range(60)}}]
    metadata = {"name": f"vllm-{n:05}", "namespace": NAMESPACE, "uid": f"uid-{n}", "resourceVersion": str(version), "labels": labels}
    status = {"phase": "Running", "podIP": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", "conditions": [{"type": "Ready", "status": "True"}] * 4}
    return json.dumps({"metadata": {**metadata, "managedFields": managed}, "spec": {"containers": [container]}, "status": status}).encode()


# ---- the API server


async def serve(port: int, count: int) -> None:
    """Until killed."""
    pods = [pod(n, n) for n in range(1, count + 1)]

    async def answer(request: web.Request) -> web.StreamResponse:
        query = request.query
        if query.get("watch") != "true":
            begin, limit = int(query.get("continue", "0")), int(query["limit"])
            more = str(begin + limit) if begin + limit < count else ""
            metadata = json.dumps({"resourceVersion": str(count), "continue": more}).encode()
            return web.Response(body=b'{"metadata":%s,"items":[%s]}' % (metadata, b",".join(pods[begin : begin + limit])), content_type="application/json")
        response = web.StreamResponse()
        await response.prepare(request)
        await events.wait()
        events.clear()
        number, per_s = int(wanted["events"]), wanted["per_s"]
        with contextlib.suppress(ConnectionError):  # the steady changes are left before their end
            for version in range(count + 1, count + 1 + number):
                await response.write(b'{"type":"MODIFIED","object":%s}\n' % pods[version % count])
                if per_s:
                    await asyncio.sleep(1 / per_s)
        await asyncio.Event().wait()
        return response

    async def begin(request: web.Request) -> web.Response:
        wanted.update(events=float(request.query["events"]), per_s=float(request.query["per_s"]))
        events.set()
        return web.Response()

    events, wanted = asyncio.Event(), {"events": 0.0, "per_s": 0.0}
    app = web.Application()
    app.add_routes([web.get(PATH, answer), web.get("/begin", begin)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serving(count: int) -> AsyncIterator[str]:
    [port] = free_ports(1)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.bench.kubernetes", "--serve", str(port), "--pods", str(count))
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{url}{PATH}?limit=1"):
                        break
                await asyncio.sleep(0.05)
        yield url
    finally:
        process.kill()
        await process.wait()


async def begin(url: str, events: int, per_s: float) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/begin?events={events}&per_s={per_s}"):
        pass


# ---- what is measured


async def took(work: Callable[[], Awaitable[None]]) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


async def list_beside(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        begin = "0"
        while begin:
            async with session.get(f"{url}{PATH}", params={"limit": "500", "continue": begin}) as response:
                begin = json.loads(await response.read())["metadata"]["continue"]


async def events_beside(url: str, events: int, per_s: float = 0.0) -> None:
    async with aiohttp.ClientSession(read_bufsize=2**20) as session, session.get(f"{url}{PATH}?watch=true") as response:
        await begin(url, events, per_s)
        for _ in range(events):
            json.loads(await response.content.readline())


async def lightkube_beside(url: str, count: int, events: int, directory: Path) -> tuple[Took, Took] | None:
    """A list and a burst of events; None where it is not installed."""
    if importlib.util.find_spec("lightkube") is None:
        return None
    lightkube, kind = importlib.import_module("lightkube"), importlib.import_module("lightkube.resources.core_v1").Pod
    client = lightkube.AsyncClient(config=lightkube.KubeConfig.from_file(kubeconfig(directory, url)), namespace=NAMESPACE)

    async def pods() -> None:
        assert len([one async for one in client.list(kind, chunk_size=500)]) == count

    async def burst() -> None:
        await begin(url, events, 0)
        left = events
        async with contextlib.aclosing(client.watch(kind, resource_version=str(count))) as watch:
            async for _ in watch:
                left -= 1
                if not left:
                    return

    return await took(pods), await took(burst)


async def measure(count: int, events: int, per_s: float, seconds: float, directory: Path) -> list[tuple[str, Took, Took, Took | None, int]]:
    """What, ours, the same by aiohttp and json, by lightkube, and of how many."""
    async with serving(count) as url:
        settings: dict[str, Any] = {
            "selector": "app=vllm",
            "ports": [8000],
            "stager_port": 9102,
            "namespace": NAMESPACE,
            "kubeconfig": kubeconfig(directory, url),
        }
        source = KubernetesSource(KubernetesSourceSettings(type="kubernetes", **settings))
        async with contextlib.aclosing(source.sets()) as sets:

            async def first() -> None:
                seen = await anext(sets)
                assert isinstance(seen, Shown)
                assert len(seen.endpoints) == count

            listed = await took(first)
            drain = asyncio.create_task(_drain(sets))
            await begin(url, int(per_s * seconds), per_s)
            steady = await took(lambda: asyncio.sleep(seconds))
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
        async with Api(Access(url), 30) as api:
            changes = Reflector(api, Query(PODS, NAMESPACE), Pod, 3600).changes()
            await anext(changes)

            async def burst() -> None:
                await begin(url, events, 0)
                seen = 0
                while seen < events:
                    news = await anext(changes)
                    assert isinstance(news, Changes)
                    seen += len(news.put)

            burst_took = await took(burst)
            await changes.aclose()
        changes_number = int(per_s * seconds)
        plain = [await took(work) for work in (lambda: list_beside(url), lambda: events_beside(url, events), lambda: events_beside(url, changes_number, per_s))]
        lightkube = await lightkube_beside(url, count, events, directory) or (None, None)
    return [
        ("the list, to the source's set", listed, plain[0], lightkube[0], count),
        ("events in a burst, as a reflector takes them", burst_took, plain[1], lightkube[1], events),
        (f"changes at {per_s:g} per second, with the sets", steady, plain[2], None, changes_number),
    ]


async def _drain(sets: AsyncIterator[Any]) -> None:
    async for _ in sets:
        pass


def kubeconfig(directory: Path, url: str) -> str:
    path = directory / "config"
    context = {"cluster": "c", "user": "u"}
    raw = {"clusters": [{"name": "c", "cluster": {"server": url}}], "users": [{"name": "u", "user": {}}]}
    path.write_text(yaml.dump({"current-context": "c", "contexts": [{"name": "c", "context": context}], **raw}))
    return str(path)


async def report(counts: list[int], events: int, per_s: float, seconds: float) -> None:
    columns = ("pods", "what", "wall s", "CPU s", "CPU ms each", "aiohttp, json: CPU s", "ratio", "lightkube: CPU s", "ratio")
    table = Table(*columns, title=f"{machine()}; a pod is {len(pod(1, 1)):,} bytes")
    for count in counts:
        with tempfile.TemporaryDirectory() as directory:
            for what, ours, plain, lightkube, number in await measure(count, events, per_s, seconds, Path(directory)):
                compared = [
                    cell for other in (plain, lightkube) for cell in (("", "") if other is None else (f"{other.cpu_s:.2f}", f"{ours.cpu_s / other.cpu_s:.2f}"))
                ]
                table.add_row(f"{count:,}", what, f"{ours.wall_s:.2f}", f"{ours.cpu_s:.2f}", f"{ours.cpu_s / number * 1e3:.3f}", *compared)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--per-s", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve, arguments.pods[0]))
    else:
        uvloop.run(report(arguments.pods, arguments.events, arguments.per_s, arguments.seconds))


if __name__ == "__main__":
    main()
