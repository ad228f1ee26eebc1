"""The whole path from a real kube-apiserver's objects: requests go through Envoy and a router to the pods of an InferencePool, and to those of a Service.

One set of pods serves both: a router and an Envoy follow the InferencePool, another router and another Envoy the EndpointSlices of the Service. Each router
has the rights that deploy/kubernetes/rbac gives for its way, and no others.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from extproc.kubernetes.objects import INFERENCE_POOLS
from extproc.up import demo
from tests.e2e.client import Client
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.wait import PATIENCE_S

from .site import ENGINE, ENVOY_ADMIN, FRONT, NAMES, PROXIES, ROUTERS, STAGER, Load, Site

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("network")]

AWAY_S = float(os.environ.get("LORA_EXTPROC_API_SERVER_AWAY_S", "5"))  # for how long the API server is away; each release is to be tried once with 60
RBAC = Path(__file__).parents[3] / "deploy" / "kubernetes" / "rbac"
WAYS = (("inference-pool", {"inference_pool": "llama"}), ("service", {"service": "vllm"}))  # the folder of rights in RBAC, and what the settings say


def settings(way: dict[str, Any]) -> dict[str, Any]:
    """Of a router that follows the API server alone."""
    source = {"type": "kubernetes", "stager_port": STAGER, "watch_s": 2.0, "timeout_s": 2.0, **way}  # an API server that hangs is noticed within a test
    pool = {"name": "llama", "base_models": [demo.BASE_MODEL], "discovery": [source]}
    # a pod that died is not waited for: its object is gone, too
    return {"pools": [pool], "router": {"lameduck_s": 0, "hold_down_s": 1.0}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(network: None, cluster: Cluster, origin: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """Two pods that both ways lead to."""
    async with Admin(cluster.server) as admin, Site(admin, origin, tmp_path_factory.mktemp("site"), services=["vllm"]) as site:
        await admin.pool("llama", [ENGINE])
        for (rights, way), router, proxy in zip(WAYS, ROUTERS, PROXIES, strict=True):
            await site.start_router(settings(way), router, await admin.account(RBAC / rights / "rights.yaml", f"router-{rights}"))
            await site.start_envoy(settings(way), router, proxy)
        await site.have("a", "b")
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def site(running: Site) -> Site:
    """With those two pods and no other."""
    await running.have("a", "b")
    await until_known(running, "a", "b")
    return running


async def until_known(site: Site, *names: str) -> None:
    for proxy in PROXIES:
        await site.until_known(*names, envoy_admin=f"{proxy}:{ENVOY_ADMIN}")


@pytest_asyncio.fixture(loop_scope="module")
async def loads(site: Site) -> AsyncIterator["Loads"]:
    """Requests by both ways, while the test runs."""
    async with AsyncExitStack() as stack:
        yield Loads([await stack.enter_async_context(site.load(f"{proxy}:{FRONT}")) for proxy in PROXIES])


class Loads:
    """One of each way."""

    def __init__(self, loads: list[Load]) -> None:
        self.each = loads

    async def more(self, count: int) -> None:
        await asyncio.gather(*(load.more(count) for load in self.each))

    def failed(self, since_s: float = 0.0) -> list[Any]:
        return [failed for load in self.each for failed in load.failed(since_s).items()]


async def test_pods_come_and_go_under_load_without_a_failed_request(site: Site, loads: Loads) -> None:
    """Two, six, and two again: adapters are cold first, and pods that terminate end in order."""
    await loads.more(50)
    await asyncio.gather(*(site.add(name) for name in "cdef"))
    await until_known(site, *"abcdef")
    await loads.more(50)
    await asyncio.gather(*(site.drain(name) for name in "cdef"))
    await until_known(site, "a", "b")
    await loads.more(50)
    assert not loads.failed()


@pytest.mark.parametrize("way", ["hangs", "is killed"])
async def test_an_api_server_that_is_away_under_load_fails_no_request(site: Site, loads: Loads, way: str) -> None:
    """For AWAY_S; every pod that was known is sent requests meanwhile. When it is back, it is followed again."""
    server = site.admin.server
    await loads.more(20)
    if way == "hangs":
        server.freeze()
    else:
        server.stop()
    await asyncio.sleep(AWAY_S)
    await loads.more(20)
    if way == "hangs":
        server.thaw()
    else:
        await asyncio.to_thread(server.start)
    await site.show("b", is_ready=False)
    await until_known(site, "a")
    await site.show("b", is_ready=True)
    await until_known(site, "a", "b")
    await loads.more(20)
    assert not loads.failed()


async def test_an_inference_pool_that_is_made_again_and_selects_others_fails_no_request(site: Site, loads: Loads) -> None:
    """Its endpoints serve on while it is gone, and those that it selects no longer end what they answer."""
    await loads.more(20)
    await site.admin.api.delete(INFERENCE_POOLS, "llm", "llama")
    async with asyncio.timeout(PATIENCE_S):
        while "there is no InferencePool llama in namespace llm" not in site.routers[0].log.read_text():
            await asyncio.sleep(0.05)
    await loads.more(20)
    await site.admin.pod("b", site.ip("b"), labels={"app": "vllm", "tier": "gpu"})
    await site.admin.pool("llama", [ENGINE], tier="gpu")
    await site.until_known("b")
    await site.admin.pool("llama", [ENGINE])
    await until_known(site, "a", "b")
    await loads.more(20)
    assert not loads.failed()


async def test_a_pod_that_terminates_ends_the_answer_that_it_is_giving(site: Site) -> None:
    """Whoever asks next is answered by another pod."""
    client, body = Client(f"{PROXIES[0]}:{FRONT}"), {"messages": [{"role": "user", "content": "hi"}], "stream": True, "model": "flat"}
    try:
        asking = asyncio.create_task(client.post(json.dumps({**body, "max_tokens": 2000}).encode()))
        await site.drain(await site.busy(asking))
        answer = await asking
        assert (answer.status, answer.text.count('"content"'), answer.text[-14:].strip()) == (200, 2000, "data: [DONE]")
        assert (await client.chat("flat")).status == 200
    finally:
        await client.close()


async def test_the_keys_of_a_pod_that_dies_move_to_another(site: Site, loads: Loads) -> None:
    """What it was answering is lost; after that every adapter is served."""
    await loads.more(50)
    await site.kill("a")
    await until_known(site, "b")
    known_s = asyncio.get_running_loop().time()
    await loads.more(50)
    assert not loads.failed(known_s)
    assert all(load.failed().total() <= len(NAMES) for load in loads.each), loads.failed()


async def test_each_rank_of_a_pod_serves_adapters(running: Site) -> None:
    """Two engines in one pod, at the ports of the InferencePool: each is given adapters by a stager of its own. Another pod says that it has but one."""
    site = running
    await site.have("b")
    await site.admin.pool("llama", [ENGINE, ENGINE + 1])
    await site.admin.pod("b", site.ip("b"), annotations={"llm-d.ai/active-ports": str(ENGINE)})
    await site.add("c", ranks=2)
    await site.until_known("b", "c")
    await site.kill("b")
    await site.until_known("c")
    async with site.load() as load:
        await load.more(50)
    assert not load.failed()
    assert all([await site.metric(endpoint, "request_success_total") for endpoint in site.pods["c"].endpoints])
