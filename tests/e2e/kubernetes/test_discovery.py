"""Discovery on a real kube-apiserver: what it hands on as pods come, terminate and go, and while the API server is away."""

import asyncio
import logging
from typing import Any

import pytest

from extproc.core.fleet import Fleet
from extproc.discovery.entries import row
from extproc.kubernetes import reflector as reflector_module
from extproc.kubernetes.objects import INFERENCE_POOLS
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.relay import Relay
from tests.fakes.wait import PATIENCE_S, until

from .conftest import DiscoveryFactory

ONE, TWO, THREE = ("10.77.0.1", "10.77.0.2", "10.77.0.3")


def leaving(fleet: Fleet) -> list[str]:
    return [found.endpoint.address for found in fleet["p"] if found.is_leaving]


async def test_an_inference_pool_is_found_and_followed(admin: Admin, discovering: DiscoveryFactory) -> None:
    """Pods that come, terminate and go; ports that are added."""
    await admin.pool("llama", [8000])
    made = await admin.pod("a", ONE, annotations={"lora-extproc/stager-port": "9200"})
    await admin.pod("other", THREE, labels={"app": "else"})
    async with discovering(inference_pool="llama", stager_port=9102) as taken:
        fleet = await taken.until(f"{ONE}:8000")
        assert row(fleet["p"][0]) == (f"{ONE}:8000", "a", f"{ONE}:9200", made.metadata.uid, "", False)
        await admin.pod("b", TWO, is_ready=False)
        await admin.pod("b", TWO)
        await taken.until(f"{ONE}:8000", f"{TWO}:8000")
        await admin.terminate("a")
        async with asyncio.timeout(PATIENCE_S):
            await until(lambda: leaving(taken.fleets[-1]) == [f"{ONE}:8000"])
        await admin.remove("a")
        await taken.until(f"{TWO}:8000")
        await admin.pool("llama", [8000, 8001])
        await taken.until(f"{TWO}:8000", f"{TWO}:8001")
        await admin.remove("b")
        await taken.until()
    assert f"{THREE}:8000" not in str(taken.fleets)


async def test_a_pod_that_takes_over_a_name_and_an_address_is_another_endpoint(admin: Admin, discovering: DiscoveryFactory) -> None:
    """As a StatefulSet's do: what was known of the last one's disk says nothing of this one's."""
    first = await admin.pod("a", ONE)
    async with discovering(selector="app=vllm", ports=[8000]) as taken:
        await taken.until(f"{ONE}:8000")
        await admin.remove("a")
        second = await admin.pod("a", ONE)
        await until(lambda: [found.endpoint.instance for found in taken.fleets[-1]["p"]] == [second.metadata.uid])
        assert first.metadata.uid != second.metadata.uid


async def test_a_service_is_found_by_its_slices(admin: Admin, discovering: DiscoveryFactory) -> None:
    """With the conditions as the endpoints' controller writes them."""
    ports = [{"name": "http", "port": 8000, "protocol": "TCP"}, {"name": "metrics", "port": 9090, "protocol": "TCP"}]

    def endpoint(ip: str, **conditions: bool) -> dict[str, Any]:
        target = {"kind": "Pod", "name": f"pod-{ip}", "namespace": "llm", "uid": f"uid-{ip}"}
        return {"addresses": [ip], "conditions": conditions, "targetRef": target, "nodeName": "n1"}

    ready, terminating = {"ready": True, "serving": True, "terminating": False}, {"ready": False, "serving": True, "terminating": True}
    await admin.slice("vllm-1", "vllm", [endpoint(ONE, **ready)], ports)
    await admin.slice("else-1", "else", [endpoint(THREE, **ready)], ports)
    async with discovering(service="vllm", port_names=["http"], stager_port=9102) as taken:
        fleet = await taken.until(f"{ONE}:8000")
        assert row(fleet["p"][0]) == (f"{ONE}:8000", f"pod-{ONE}", f"{ONE}:9102", f"uid-{ONE}", "", False)
        await admin.slice("vllm-2", "vllm", [endpoint(TWO, **ready)], ports)
        await taken.until(f"{ONE}:8000", f"{TWO}:8000")
        await admin.slice("vllm-1", "vllm", [endpoint(ONE, **terminating)], ports)
        await until(lambda: leaving(taken.fleets[-1]) == [f"{ONE}:8000"])
        await admin.slice("vllm-1", "vllm", [], ports)
        await taken.until(f"{TWO}:8000")


# ---- API servers that are away


async def test_an_api_server_that_is_stopped_takes_nothing_away(cluster: Cluster, admin: Admin, discovering: DiscoveryFactory) -> None:
    """The fleet is as it was, until the API server is back and shows what has changed."""
    for name, ip in (("a", ONE), ("b", TWO)):
        await admin.pod(name, ip)
    async with discovering(selector="app=vllm", ports=[8000]) as taken:
        await taken.until(f"{ONE}:8000", f"{TWO}:8000")
        handed_on = len(taken.fleets)
        cluster.server.stop()
        await asyncio.to_thread(cluster.server.start)
        assert len(taken.fleets) == handed_on
        await admin.remove("a")
        await admin.pod("c", THREE)
        await taken.until(f"{TWO}:8000", f"{THREE}:8000")
        assert all(len(fleet["p"]) >= 1 for fleet in taken.fleets)


async def test_a_watch_that_is_cut_misses_nothing(cluster: Cluster, admin: Admin, discovering: DiscoveryFactory) -> None:
    """What happened meanwhile is shown by the watch that resumes it."""
    await admin.pod("a", ONE)
    async with Relay(cluster.server.port) as relay, discovering(url=f"https://{relay.address}", selector="app=vllm", ports=[8000]) as taken:
        await taken.until(f"{ONE}:8000")
        relay.freeze()
        await admin.pod("b", TWO)
        await admin.remove("a")
        relay.cut()
        relay.mend()
        relay.thaw()
        await taken.until(f"{TWO}:8000")


async def test_a_watch_that_is_slow_misses_nothing(cluster: Cluster, admin: Admin, discovering: DiscoveryFactory) -> None:
    """Every event comes in many pieces, and many events come while one is being read."""
    async with Relay(cluster.server.port) as relay, discovering(url=f"https://{relay.address}", selector="app=vllm", ports=[8000]) as taken:
        await taken.until()
        relay.piece_bytes = 100
        for n in range(1, 6):
            await admin.pod(f"p-{n}", f"10.77.0.{n}")
        await admin.remove("p-3")
        await taken.until(*(f"10.77.0.{n}:8000" for n in (1, 2, 4, 5)))


async def test_after_a_compaction_another_api_server_shows_what_was_deleted(
    cluster: Cluster, admin: Admin, discovering: DiscoveryFactory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch hears nothing; a pod is deleted and the history is compacted; the connection is cut, and the load balancer leads to an API server that was
    started since, which has never seen the version that the watch is to be resumed from: 410."""
    caplog.set_level(logging.INFO)
    for name, ip in (("a", ONE), ("b", TWO)):
        await admin.pod(name, ip)
    other = cluster.another()
    async with Relay(cluster.server.port) as relay, discovering(url=f"https://{relay.address}", selector="app=vllm", ports=[8000]) as taken:
        await taken.until(f"{ONE}:8000", f"{TWO}:8000")
        relay.freeze()
        await admin.remove("a")
        await admin.pod("c", THREE)
        await asyncio.to_thread(cluster.compact)
        try:
            await asyncio.to_thread(other.start)
            relay.port = other.port
            relay.cut()
            relay.mend()
            relay.thaw()
            await taken.until(f"{TWO}:8000", f"{THREE}:8000")
        finally:
            other.stop()
    assert "the API server answers 410" in caplog.text
    assert reflector_module.__name__ in {record.name for record in caplog.records}


async def test_a_pool_that_is_deleted_is_kept_for_a_while(admin: Admin, discovering: DiscoveryFactory, caplog: pytest.LogCaptureFixture) -> None:
    """It may be meant, and it may be a mistake; the log says what is missing."""
    await admin.pool("llama", [8000])
    await admin.pod("a", ONE)
    async with discovering(inference_pool="llama", keep_empty_s=0.3) as taken:
        await taken.until(f"{ONE}:8000")
        await admin.api.delete(INFERENCE_POOLS, "llm", "llama")
        await taken.until()
    assert "there is no InferencePool llama in namespace llm" in caplog.text
