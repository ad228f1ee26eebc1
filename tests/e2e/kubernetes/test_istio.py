"""deploy/kubernetes/istio and deploy/kubernetes/inference-pool/istio on a real Istio: requests through the Envoy that it configures by what they ship.

One site for all: a kube-apiserver, the control plane that follows it, and pods. For each way in the overlay is applied, with two routers of its settings and a
proxy of its Gateway.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from extproc.up import demo
from extproc.up.processes import spawn, stop
from tests.e2e.client import post_with_trailers, weights_of
from tests.e2e.test_served import MOST_FAILED, asked
from tests.fakes.children import kill
from tests.fakes.istio import SYSTEM, Istio
from tests.fakes.kube_apiserver import Admin, Cluster, crds, running_cluster
from tests.fakes.kubectl import Kubectl
from tests.fakes.wait import PATIENCE_S

from .gateway import ADMIN, GATEWAY, KUBERNETES, NOBODY, Fronted, Requests
from .site import ENGINE, FRONT, NAMES, PROXIES

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("network")]


GOLDEN = Path(__file__).parents[2] / "golden" / "istio_inference_pool.yaml"
GOLDEN_HEAD = """\
# What Istio 1.31 tells a gateway's Envoy of deploy/kubernetes/inference-pool/istio: the filter, the route, and the clusters of the pool and of its picker,
# without names and endpoints. A pool of appProtocol kubernetes.io/h2c has the picker's protocol options, too.
"""
REQUESTS = 400
PICKER = "outbound|9002||lora-extproc.llm.svc.cluster.local"


@dataclass(frozen=True)
class Way:
    """An overlay, and the pods of its gateway."""

    overlay: str
    kinds: str  # that Istio writes a status of
    namespace: str = "llm"
    label: tuple[str, str] = ("gateway.networking.k8s.io/gateway-name", "llm")

    @property
    def proxy(self) -> str:
        """What its pod and its Service are called."""
        return self.overlay.replace("/", "-")


FILTER = Way("istio", "gateways.gateway.networking.k8s.io,httproutes")
POOL = Way("inference-pool/istio", "gateways.gateway.networking.k8s.io,httproutes,inferencepools")
CLASSIC = Way("istio/classic", "", SYSTEM, ("istio", "ingressgateway"))


class Meshed(Fronted):
    """With Istio."""

    def __init__(self, istio: Istio, kubectl: Kubectl, admin: Admin, origin: Path, directory: Path) -> None:
        super().__init__(kubectl, admin, origin, directory, "")
        self.istio = istio
        self.way = FILTER
        self.service = ""  # of the engines, as Envoy has it

    async def enter(self, way: Way) -> None:
        """Apply the overlay and run what its Deployment and its Gateway say."""
        self.way = way
        await asyncio.to_thread(self.kubectl, "apply", "-k", KUBERNETES / way.overlay)
        await self.istio.deploy(way.proxy, way.namespace, dict([way.label]), PROXIES[0], FRONT, ADMIN)
        if way is not CLASSIC:  # Istio deploys a Gateway without addresses itself, and nobody runs Deployments here
            addresses = [{"type": "Hostname", "value": f"{way.proxy}.{way.namespace}.svc.cluster.local"}]
            patch = yaml.safe_dump({"spec": {"addresses": addresses}})
            await asyncio.to_thread(self.kubectl, "-n", "llm", "patch", "gateways.gateway.networking.k8s.io", "llm", "--type=merge", "-p", patch)
        await self.start_routers()
        self.service, port, port_name = "vllm", "8000", "http"
        if way is POOL:
            self.service, port, port_name = await self._shadow(), "54321", "http-0"
        self.services = {"vllm": "http", self.service: port_name}
        self.models = f"outbound|{port}||{self.service}.llm.svc.cluster.local"
        await self._publish()
        await self.until_answered_with(200)

    async def leave(self) -> None:
        """As the overlay's README says, and end what was started by hand."""
        await stop(self.routers, 2.0)
        self.routers.clear()
        await self.istio.remove(self.way.proxy)
        await asyncio.to_thread(self.kubectl, "delete", "-k", KUBERNETES / self.way.overlay)

    async def change_pool(self, ports: list[int]) -> None:
        """Give the InferencePool these target ports, and wait until Istio has taken them over."""
        patch = yaml.safe_dump({"spec": {"targetPorts": [{"number": port} for port in ports]}})
        await asyncio.to_thread(self.kubectl, "-n", "llm", "patch", "inferencepool", "llama", "--type=merge", "-p", patch)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                [service] = await asyncio.to_thread(self.kubectl.get, "service", self.service, "-n", "llm")
                if [port["targetPort"] for port in service["spec"]["ports"]] == ports:
                    return
                await asyncio.sleep(0.1)

    async def _shadow(self) -> str:
        """The Service that Istio makes of the InferencePool."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await asyncio.to_thread(self.kubectl.get, "services", "-n", "llm", "-l", "istio.io/inferencepool-name=llama")
                if found:
                    return str(found[0]["metadata"]["name"])
                await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With the kinds of the Gateway API, its inference extension, and Istio."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), crds("gateway-api", "gaie", "istio")) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(cluster: Cluster, origin: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Meshed]:
    """Istio, and three pods that nothing leads to yet."""
    directory = tmp_path_factory.mktemp("site")
    kubeconfig = cluster.server.kubeconfig(directory / "admin")
    kubectl = Kubectl(kubeconfig)
    async with Admin(cluster.server) as admin, Istio(kubectl, kubeconfig, directory) as istio:
        mesh = Meshed(istio, kubectl, admin, origin, directory)
        async with mesh:
            await asyncio.to_thread(kubectl, "apply", "-f", KUBERNETES / "vllm" / "service.yaml", "-n", "llm")
            await mesh.have("a", "b", "c")
            yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[FILTER, POOL], ids=["filter", "pool"])
async def entered(mesh: Meshed, request: pytest.FixtureRequest) -> AsyncIterator[Meshed]:
    """By each way in turn."""
    await mesh.enter(request.param)
    yield mesh
    await mesh.leave()


@pytest_asyncio.fixture(loop_scope="module")
async def site(entered: Meshed) -> Meshed:
    """With three pods, which Envoy knows, and routers that run."""
    if any(router.process.returncode is not None for router in entered.routers):
        entered.routers = [
            router if router.process.returncode is None else await spawn(router.name, router.command, entered.directory) for router in entered.routers
        ]
        await entered.until_answered_with(200)
    await entered.have("a", "b", "c")
    await entered.until_these("a", "b", "c")
    return entered


async def test_a_gateway_of_istios_own_api_is_configured_alike(mesh: Meshed) -> None:
    """The filter in the namespace of its pods, a VirtualService instead of an HTTPRoute. Where nobody of the list can be reached, no other pod is asked."""
    await mesh.enter(CLASSIC)
    try:
        await mesh.until_these(*mesh.pods)
        before = await mesh.asked_total()
        assert (await mesh.client.chat("flat")).weights == weights_of(mesh.origin, "flat")
        [served] = await mesh.asked_total() - before
        name = mesh.pod_at(served)
        port = await mesh.cut(name)
        before = await mesh.asked_total()
        assert (await mesh.client.chat("flat")).status == 503
        await mesh.mend(name, port)
        assert (await mesh.asked_total() - before).keys() <= {served}
    finally:
        await mesh.leave()


class TestIstio(Requests):
    """What is asked of every gateway, by both ways."""

    async def test_what_is_shipped_is_accepted(self, site: Meshed) -> None:
        """No condition of any object says that something of it is left out, and Envoy refuses nothing that Istio makes of it."""
        await site.until_accepted(site.way.kinds)
        assert "error_state" not in json.dumps(await site.config_dump())

    async def test_pods_and_istio_come_and_go_under_load_without_a_failed_request(self, site: Meshed) -> None:
        """One pod more is found by routers and by Istio, each by itself. Without Istio Envoy goes on with what it has, and one pod that terminates ends in
        order; when Istio is back, Envoy is told of it."""
        async with site.load(GATEWAY) as load:
            await load.more(50)
            await site.add("d")
            await site.until_these(*"abcd")
            await load.more(100)
            await site.istio.kill()
            await site.drain("d")
            await load.more(50)
            await site.istio.start()
            await site.until_these(*"abc")
            await load.more(50)
        assert not load.failed()

    async def test_an_engine_that_only_the_proxy_cannot_reach_costs_a_few_retries_and_no_404(self, site: Meshed) -> None:
        """Its stager finds nothing wrong. Istio's fallback for a pool is any pod, and it says who served: no client sees a 404 of a pod that was not named, and
        what fails is well right afterwards."""
        if site.way is not POOL:
            pytest.skip("the filter's fallback is nobody")
        models = [*NAMES, demo.BASE_MODEL]
        outcomes, _ = await asked(site.client, models)
        assert outcomes == {("first", 200): len(models)}
        name = await site.owner("team/a")
        port = await site.cut(name)
        try:
            outcomes, answers = await asked(site.client, list(islice(cycle(models), REQUESTS)))
        finally:
            await site.mend(name, port)
        failed = outcomes["first", 503]
        assert outcomes == Counter({("first", 200): REQUESTS - failed, ("first", 503): failed, ("again", 200): failed})
        assert failed <= MOST_FAILED
        assert all(answer.weights == weights_of(site.origin, model) for model, answer in answers if model in NAMES)

    async def test_a_body_that_ends_in_trailers_arrives_once(self, site: Meshed) -> None:
        """By the filter's route without retries: with them Envoy would send the body twice."""
        if site.way is POOL:
            pytest.skip("Istio's route to an InferencePool has retries, which only an EnvoyFilter could take away")
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}], "model": "team/a"}).encode()
        status, answer = await post_with_trailers(GATEWAY, body, {})
        assert (status, json.loads(answer)["system_fingerprint"]) == (200, weights_of(site.origin, "team/a"))

    async def test_conformance_is_shown_on_what_istio_configures(self, site: Meshed, update_golden: bool) -> None:
        """tests/e2e/test_conformance.py takes its Envoy's configuration from a file, which is this; --update-golden rewrites it."""
        if site.way is not POOL:
            pytest.skip("there is no pool")
        told = _told(await site.config_dump(), site.models)
        if update_golden:
            GOLDEN.write_text(f"{GOLDEN_HEAD}{yaml.safe_dump(told, sort_keys=False)}")
        assert yaml.safe_load(GOLDEN.read_text()) == told

    async def test_every_rank_behind_a_pods_address_is_an_endpoint_of_a_pool(self, site: Meshed) -> None:
        """Of a Service Istio keeps one endpoint for each address; of an InferencePool one for each of its ports."""
        if site.way is not POOL:
            pytest.skip("there is no pool")
        ports = [ENGINE, ENGINE + 1]
        await site.change_pool(ports)
        try:
            endpoints = [{"addresses": [NOBODY], "conditions": {"ready": True}}]
            named = [{"name": f"http-{rank}", "port": port, "protocol": "TCP"} for rank, port in enumerate(ports)]
            await site.admin.slice("ranks", site.service, endpoints, named)
            async with asyncio.timeout(PATIENCE_S):
                while not {f"{NOBODY}:{port}" for port in ports} <= (await site.asked_total()).keys():
                    await asyncio.sleep(0.05)
        finally:
            await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "endpointslice", "ranks")
            await site.change_pool(ports[:1])

    async def test_a_router_that_dies_costs_what_it_is_answering(self, site: Meshed) -> None:
        """What comes afterwards is asked of the other one."""
        if site.way is POOL:
            pytest.skip("Istio's own filter for a pool does not ask again")
        async with site.load(GATEWAY) as load:
            await load.more(30)
            await kill(site.routers[-1])
            died_s = asyncio.get_running_loop().time()
            await load.more(100)
        assert not load.failed(died_s)
        assert load.failed().total() <= len(NAMES)

    async def test_without_a_router_there_is_an_error(self, site: Meshed) -> None:
        """503 by the filter, which clients repeat; 500 for a pool, which fails closed, since Istio sets no other status."""
        await kill(*site.routers)
        assert (await site.client.chat("team/a")).status == (500 if site.way is POOL else 503)


def _told(dump: Any, models: str) -> dict[str, Any]:
    """Of all that Envoy was told: the filter, the route, and the clusters of the pool and of its picker, without endpoints and names."""
    by_type = {one["@type"].rpartition(".")[2]: one for one in dump["configs"]}
    clusters = {}
    for one in by_type["ClustersConfigDump"]["dynamic_active_clusters"]:
        cluster = one["cluster"]
        if cluster["name"] in (models, PICKER):
            left_out = ("@type", "name", "type", "eds_cluster_config", "alt_stat_name", "metadata")
            clusters["pool" if cluster["name"] == models else "picker"] = {name: value for name, value in cluster.items() if name not in left_out}
    [listener] = by_type["ListenersConfigDump"]["dynamic_listeners"]
    [manager] = listener["active_state"]["listener"]["filter_chains"][0]["filters"]
    http_filter = next(one for one in manager["typed_config"]["http_filters"] if one["name"] == "envoy.filters.http.ext_proc")
    [routes] = by_type["RoutesConfigDump"]["dynamic_route_configs"]
    [route] = routes["route_config"]["virtual_hosts"][0]["routes"]
    route = {name: value for name, value in route.items() if name not in ("metadata", "decorator", "name")}
    return {"http_filter": http_filter, "route": route, "clusters": clusters}
