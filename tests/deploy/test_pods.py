"""The pods of deploy/kubernetes/plain and simulated as they are shipped, with a stand-in for the kubelet: commands, settings, users, volumes, probes and ends.

The API server is real, and the router asks it as the account that the manifests make. Endpoints' controller and DNS are played by the test.
"""

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.kube_apiserver import running_cluster
from tests.fakes.kubelet import POLL_S, Account, RunningPod, pods, skip_unless_able
from tests.fakes.netns import ADDRESSES, network_of_its_own
from tests.fakes.wait import PATIENCE_S

from . import manifests
from .manifests import Manifest, named, read, rendered, run

API_SERVER, ROUTER, ENVOY, ENGINE = ADDRESSES[:4]  # all pods are in one network: the ports of their containers differ
TOKENS = 200  # of a stream that is not over when everything is deleted: 4 s, by simulated/engine.yaml


@dataclass(frozen=True)
class Fleet:
    """One pod of each."""

    router: RunningPod
    engine: RunningPod
    envoy: RunningPod
    kubectl: tuple[str, str]  # the program, and its KUBECONFIG

    def show(self, **conditions: bool) -> None:
        """The Service's EndpointSlice, as the endpoints' controller writes it."""
        target = {"kind": "Pod", "name": "vllm-0", "namespace": "llm", "uid": "1"}
        metadata = {"name": "vllm-1", "namespace": "llm", "labels": {"kubernetes.io/service-name": "vllm"}}
        endpoint = {"addresses": [ENGINE], "conditions": conditions, "targetRef": target}
        ports = [{"name": "http", "port": 8000, "protocol": "TCP"}]
        body = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata,
            "addressType": "IPv4",
            "endpoints": [endpoint],
            "ports": ports,
        }
        program, kubeconfig = self.kubectl
        run([program, "apply", "-f", "-"], yaml.dump(body), KUBECONFIG=kubeconfig)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    with network_of_its_own():
        yield


@pytest.fixture(scope="module")
def fleet(kubectl: str, network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("pods")
    skip_unless_able(tmp_path_factory.mktemp("root"))
    with running_cluster(directory) as cluster:
        kubeconfig = cluster.server.kubeconfig(directory / "kubeconfig")
        run([kubectl, "apply", "-k", str(manifests.KUBERNETES / "plain")], KUBECONFIG=kubeconfig)
        token = run([kubectl, "-n", "llm", "create", "token", "lora-extproc"], KUBECONFIG=kubeconfig).strip()
        account = Account(token, cluster.server.ca_file, "127.0.0.1", cluster.server.port)
        plain, simulated = read(rendered(kubectl, "plain")), read(rendered(kubectl, "simulated"))
        router = _pod(plain, "lora-extproc", directory, ROUTER, account=account)
        envoy = _pod(plain, "envoy", directory, ENVOY, hosts={"lora-extproc-replicas": ROUTER})
        engine = _pod(simulated, "vllm", directory, ENGINE)
        found = Fleet(router, engine, envoy, (kubectl, kubeconfig))
        found.show(ready=True, serving=True, terminating=False)
        with pods(engine, router, envoy):
            yield found


def _pod(found: list[Manifest], name: str, directory: Path, address: str, **more: Any) -> RunningPod:
    config_maps = {one["metadata"]["name"]: one["data"] for one in found if one["kind"] == "ConfigMap"}
    return RunningPod(named(found, "Deployment", name)["spec"]["template"]["spec"], config_maps, directory / name, address, **more)


@contextlib.contextmanager
def asked(model: str, **more: Any) -> Iterator[http.client.HTTPResponse]:
    """A chat request, through Envoy."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    with contextlib.closing(http.client.HTTPConnection(ENVOY, 10000, timeout=30)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        yield connection.getresponse()


def test_a_cold_adapter_is_served_by_the_pods_as_shipped(fleet: Fleet) -> None:
    """Each pod has become ready by its own probes. The router has found the engine by the rights of its account, Envoy by the router."""
    for model, answered in (("llama", "llama"), ("demo/sql", "demo/sql@sha256:")):
        with asked(model) as response:
            body = response.read()
        assert response.status == 200, body
        assert json.loads(body)["model"].startswith(answered)


def test_nothing_is_written_but_to_volumes(fleet: Fleet) -> None:
    """Nor could it be; and an engine cannot change what its stager has put there."""
    for pod, container, may in ((fleet.router, "router", "/tmp"), (fleet.engine, "stager", "/srv/adapters"), (fleet.envoy, "envoy", "/tmp")):
        assert pod.run(container, ["touch", f"{may}/a-file"]) == 0
        assert pod.run(container, ["touch", "/etc/a-file"]) != 0
        assert pod.run(container, ["touch", "/a-file"]) != 0
    assert fleet.engine.run("vllm", ["touch", "/srv/adapters/a-file"]) != 0
    assert fleet.engine.run("vllm", ["test", "-r", "/srv/adapters/demo/sql/adapter_model.safetensors"]) == 0


def test_all_probes_are_answered(fleet: Fleet) -> None:
    """Those of liveness, too, which nothing has waited for."""
    assert fleet.router.probe("router", "livenessProbe")
    assert fleet.engine.probe("stager", "livenessProbe")
    assert fleet.engine.probe("vllm", "livenessProbe")
    assert fleet.envoy.probe("envoy", "livenessProbe")


def test_what_is_deleted_all_at_once_finishes_what_it_does(fleet: Fleet) -> None:
    """The last test of the module: a stream goes on to its end and new requests are answered, whatever ends; an engine gets SIGTERM when its stager has ended,
    which it does by itself when nobody needs the node."""
    with asked("demo/sql", stream=True, max_tokens=TOKENS) as stream, ThreadPoolExecutor(3) as ending:
        first = stream.readline()
        fleet.show(ready=False, serving=True, terminating=True)
        ends = [ending.submit(pod.terminate) for pod in (fleet.engine, fleet.router, fleet.envoy)]
        until = time.monotonic() + PATIENCE_S
        while fleet.router.probe("router", "readinessProbe"):
            assert time.monotonic() < until
            time.sleep(POLL_S)
        with asked("llama") as late:
            assert late.status == 200
            late.read()
        assert fleet.router.probe("router", "livenessProbe")
        rest = stream.read()
        assert "vllm: SIGTERM" not in fleet.engine.events
        for end in ends:
            end.result()
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert rest.count(b"data: ") >= TOKENS
    events = fleet.engine.events
    assert [event for event in events if event.startswith("stager")] == ["stager: preStop ended with 0", "stager: over"]
    assert [event for event in events if event.startswith("vllm")] == ["vllm: preStop ended with 0", "vllm: SIGTERM", "vllm: over"]
    assert events.index("stager: preStop ended with 0") < events.index("vllm: preStop ended with 0")
    assert "the node is empty" in fleet.engine.said("stager")
    assert fleet.router.events == ["router: SIGTERM", "router: over"]
    assert fleet.envoy.events == ["envoy: preStop ended with 0", "envoy: SIGTERM", "envoy: over"]
