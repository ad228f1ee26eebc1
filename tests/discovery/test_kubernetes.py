"""The Kubernetes source: an InferencePool, a Service or a selector, and API servers that fail."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.discovery import KubernetesSourceSettings
from extproc.discovery import kubernetes as kubernetes_module
from extproc.discovery.kubernetes import KubernetesSource
from extproc.discovery.kubernetes_objects import PodReader
from extproc.discovery.source import Failed, Shown
from extproc.kubernetes import reflector as reflector_module
from tests.fakes.kubernetes import ApiServer, api_server

from .scripted import Listener, addresses, rows

PODS = "/api/v1/namespaces/llm/pods/"
POOL = "/apis/inference.networking.k8s.io/v1/namespaces/llm/inferencepools/llama"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/llm/endpointslices/"


def pool(*ports: int, **labels: str) -> dict[str, Any]:
    return {"spec": {"selector": {"matchLabels": labels or {"app": "vllm"}}, "targetPorts": [{"number": port} for port in ports or (8000,)]}}


def pod(ip: str, **metadata: Any) -> dict[str, Any]:
    return {"metadata": metadata, "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]}}


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    monkeypatch.setattr(reflector_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(reflector_module, "MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("extproc.discovery.pace.SHOW_EVERY_S", 0.0)
    async with api_server() as server:
        yield server


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> str:
    path = tmp_path / "config"
    context = {"cluster": "c", "user": "u", "namespace": "llm"}
    raw = {"clusters": [{"name": "c", "cluster": {"server": server.url}}], "users": [{"name": "u", "user": {"token": "secret"}}]}
    path.write_text(yaml.dump({"current-context": "c", "contexts": [{"name": "c", "context": context}], **raw}))
    return str(path)


@asynccontextmanager
async def listening(kubeconfig: str, **settings: Any) -> AsyncIterator[Listener]:
    listener = Listener()
    source = KubernetesSource(KubernetesSourceSettings(type="kubernetes", kubeconfig=kubeconfig, **settings))
    task = asyncio.create_task(listener.listen(source.sets()))
    try:
        yield listener
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_pods_of_a_selector_are_followed(server: ApiServer, kubeconfig: str) -> None:
    """In the namespace of the context, unless the settings name one."""
    await server.put(PODS + "a", **pod("10.0.0.1"))
    async with listening(kubeconfig, selector="app=vllm", ports=[8000], stager_port=9102) as listener:
        await listener.until("10.0.0.1:8000")
        await server.put(PODS + "b", **pod("10.0.0.2"))
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        uid = server.objects[PODS + "b"]["metadata"]["uid"]
        await server.put(PODS + "b", **pod("10.0.0.2", deletionTimestamp="now", uid=uid))
        await server.delete(PODS + "a")
        await listener.until("10.0.0.2:8000")
        assert rows(listener.said[-1]) == [("10.0.0.2:8000", "b", "10.0.0.2:9102", uid, "", True)]
    assert server.asked("list")[0]["labelSelector"] == "app=vllm"


async def test_the_endpoints_of_a_service_are_followed(server: ApiServer, kubeconfig: str) -> None:
    """Those of all its slices."""
    for name, ip in (("vllm-a", "10.0.0.1"), ("vllm-b", "10.0.0.2")):
        await server.put(SLICES + name, addressType="IPv4", endpoints=[{"addresses": [ip]}], ports=[{"port": 8000}])
    async with listening(kubeconfig, service="vllm") as listener:
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        await server.delete(SLICES + "vllm-a")
        await listener.until("10.0.0.2:8000")
    assert server.asked("list")[0]["labelSelector"] == "kubernetes.io/service-name=vllm"


async def test_an_inference_pool_says_which_pods_and_ports(server: ApiServer, kubeconfig: str) -> None:
    """Now: with another selector other pods are followed, with other ports the same pods are other endpoints."""
    await server.put(POOL, **pool(8000))
    await server.put(PODS + "a", **pod("10.0.0.1"))
    async with listening(kubeconfig, inference_pool="llama") as listener:
        await listener.until("10.0.0.1:8000")
        await server.put(POOL, **pool(8000, 8001))
        await listener.until("10.0.0.1:8000", "10.0.0.1:8001")
        await server.put(POOL, **pool(8001, app="vllm", tier="gpu"))
        await listener.until("10.0.0.1:8001")
        await server.until_asked("list", 3)
        assert not [seen for seen in listener.said if isinstance(seen, Failed) or not addresses(seen)]
    pools, first, second = server.asked("list")
    assert pools["fieldSelector"] == "metadata.name=llama"
    assert (first["labelSelector"], second["labelSelector"]) == ("app=vllm", "app=vllm,tier=gpu")


async def test_an_inference_pool_that_is_not_there_is_an_empty_set_that_says_why(server: ApiServer, kubeconfig: str) -> None:
    """As a name that does not exist; the pool may be made later, and deleted and made again."""
    await server.put(PODS + "a", **pod("10.0.0.1"))
    async with listening(kubeconfig, inference_pool="llama") as listener:
        await listener.until()
        assert listener.said[-1] == Shown((), note="there is no InferencePool llama in namespace llm")
        await server.put(POOL, **pool(8000))
        await listener.until("10.0.0.1:8000")
        await server.delete(POOL)
        await listener.until()
        await server.put(POOL, **pool(8000))
        await listener.until("10.0.0.1:8000")


async def test_pods_that_swap_addresses_are_other_endpoints(server: ApiServer, kubeconfig: str) -> None:
    """As after a restart of their node. Between the two events both have one address, which is shown once; at the end no address has its old pod."""
    await server.put(PODS + "a", **pod("10.0.0.1", uid="uid-a"))
    await server.put(PODS + "b", **pod("10.0.0.2", uid="uid-b"))
    async with listening(kubeconfig, selector="app=vllm", ports=[8000]) as listener:
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        await server.put(PODS + "a", **pod("10.0.0.2", uid="uid-a"))
        await listener.until("10.0.0.2:8000")
        await server.put(PODS + "b", **pod("10.0.0.1", uid="uid-b"))
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        assert sorted((address, instance) for address, _, _, instance, *_ in rows(listener.said[-1])) == [
            ("10.0.0.1:8000", "uid-b"),
            ("10.0.0.2:8000", "uid-a"),
        ]


async def test_a_pod_that_cannot_be_an_endpoint_is_told_of(server: ApiServer, kubeconfig: str) -> None:
    """The others count."""
    await server.put(PODS + "a", **pod("10.0.0.1"))
    await server.put(PODS + "b", **pod("10.0.0.2", annotations={"lora-extproc/stager-port": "none"}))
    async with listening(kubeconfig, selector="app=vllm", ports=[8000]) as listener:
        await listener.until("10.0.0.1:8000")
        seen = listener.said[-1]
        assert isinstance(seen, Shown)
        assert seen.left_out == ("pod llm/b has the annotation lora-extproc/stager-port with 'none', which is no port from 0 to 65535",)


async def test_a_pod_is_read_once(server: ApiServer, kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often sets are made; and again when it changes, or the ports do."""
    read: list[str] = []
    inner = PodReader.read

    def counted(reader: PodReader, pod: Any) -> Any:
        read.append(pod.metadata.name)
        return inner(reader, pod)

    monkeypatch.setattr(PodReader, "read", counted)
    await server.put(POOL, **pool(8000))
    for name in "abc":
        await server.put(PODS + name, **pod(f"10.0.0.{ord(name)}"))
    async with listening(kubeconfig, inference_pool="llama") as listener:
        await listener.until("10.0.0.97:8000", "10.0.0.98:8000", "10.0.0.99:8000")
        await server.put(PODS + "b", **pod("10.0.0.1"))
        await listener.until("10.0.0.97:8000", "10.0.0.1:8000", "10.0.0.99:8000")
        assert sorted(read) == ["a", "b", "b", "c"]
        await server.put(POOL, **pool(8001))
        await listener.until("10.0.0.97:8001", "10.0.0.1:8001", "10.0.0.99:8001")
        assert len(read) == 7


# ---- API servers that fail


@pytest.mark.parametrize("which", [POOL, PODS])
async def test_either_part_of_a_pool_that_is_refused_is_a_failure(server: ApiServer, kubeconfig: str, which: str) -> None:
    """In the API server's words, which name the right that is missing."""
    await server.put(POOL, **pool(8000))
    await server.put(PODS + "a", **pod("10.0.0.1"))
    server.refused = {which.rpartition("/")[0]: (403, "this is forbidden")}
    async with listening(kubeconfig, inference_pool="llama") as listener:
        await listener.until_failed("answers 403: this is forbidden")
        server.refused = {}
        await listener.until("10.0.0.1:8000")


async def test_a_server_that_stops_is_said_and_followed_again(server: ApiServer, kubeconfig: str) -> None:
    """With what was deleted meanwhile."""
    await server.put(PODS + "a", **pod("10.0.0.1"))
    await server.put(PODS + "b", **pod("10.0.0.2"))
    async with listening(kubeconfig, selector="app=vllm", ports=[8000]) as listener:
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        server.refused = dict.fromkeys(("list", "watch"), (503, "stopping"))
        await server.cut()
        await listener.until_failed("answers 503: stopping")
        await server.delete(PODS + "a")
        server.refused = {}
        await listener.until("10.0.0.2:8000")


async def test_who_asks_is_looked_for_until_it_is_found(server: ApiServer, kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is mounted late."""
    monkeypatch.setattr(kubernetes_module, "RETRY_S", 0.01)
    path = Path(kubeconfig)
    content = path.read_text()
    path.unlink()
    async with listening(kubeconfig, selector="app=vllm", ports=[8000]) as listener:
        await listener.until_failed("cannot be read: No such file")
        path.write_text(content)
        await listener.until()


async def test_an_error_of_our_own_ends_the_sets(server: ApiServer, kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery tells of it and begins anew; a source that says nothing any more would look like a quiet one."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr("extproc.kubernetes.reflector.Reflector._difference", broken)
    source = KubernetesSource(KubernetesSourceSettings(type="kubernetes", kubeconfig=kubeconfig, selector="app=vllm", ports=(8000,)))
    async with aclosing(source.sets()) as sets:
        with pytest.raises(RuntimeError, match="ours"):
            await anext(sets)
