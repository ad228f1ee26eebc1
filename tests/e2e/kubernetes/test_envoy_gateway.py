"""deploy/kubernetes/envoy-gateway on a real Envoy Gateway: what the overlay makes of a cluster, and requests through the Envoy that Envoy Gateway configures.

One site for all: a kube-apiserver, an Envoy Gateway that follows it, the Envoy of its Gateway, two routers with the settings of the overlay's ConfigMap, and
pods whose engines Envoy reaches through relays, so that an engine can be out of the proxy's reach while its stager finds nothing wrong.
"""

import asyncio
import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from extproc.up import demo
from extproc.up.processes import free_ports, spawn, stop
from tests.e2e.client import Answer, Client, weights_of
from tests.e2e.test_modes import _post_with_trailers
from tests.e2e.test_served import MOST_FAILED, asked
from tests.fakes.envoy_gateway import EnvoyGateway
from tests.fakes.kube_apiserver import Admin, Cluster, crds, running_cluster
from tests.fakes.kubectl import Kubectl
from tests.fakes.relay import Relay
from tests.fakes.wait import PATIENCE_S

from .site import ENGINE, ENVOY_ADMIN, FRONT, NAMES, PROXIES, ROUTERS, Site

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("network")]

KUBERNETES = Path(__file__).parents[3] / "deploy" / "kubernetes"
OVERLAY = KUBERNETES / "envoy-gateway"
GATEWAY, ADMIN = f"{PROXIES[0]}:{FRONT}", f"{PROXIES[0]}:{ENVOY_ADMIN}"
MODELS, ONCE = "httproute/llm/vllm/rule/0", "httproute/llm/vllm/rule/1"  # Envoy Gateway's names of the clusters of the route's rules
POLICIES = "backendtrafficpolicies,clienttrafficpolicies,envoyextensionpolicies,envoypatchpolicies"
LARGE_BYTES, TOO_LARGE_BYTES = 20_000_000, 55_000_000  # router.max_body_bytes is 50 MiB
REQUESTS = 200
SERVED = re.compile(r'^lora_extproc_served_total\{\w+="(true|false)"\} (\S+)$', re.MULTILINE)


class Gateway(Site):
    """Pods behind relays, and what Envoy Gateway makes of them."""

    def __init__(self, kubectl: Kubectl, envoy_gateway: EnvoyGateway, admin: Admin, origin: Path, directory: Path) -> None:
        super().__init__(admin, origin, directory, services=["vllm"])
        self.kubectl = kubectl
        self.envoy_gateway = envoy_gateway
        self._relays: dict[str, Relay] = {}

    async def __aexit__(self, *error: object) -> None:
        for name in list(self._relays):
            await self.cut(name)
        await super().__aexit__(*error)

    # ---- pods

    async def _engine_at(self, name: str) -> str:
        if name in self._relays:  # of a pod that is gone
            await self.cut(name)
        [port] = free_ports(1)
        await self._relay(name, port)
        return f"127.0.0.1:{port}"

    async def _relay(self, name: str, port: int) -> None:
        self._relays[name] = await Relay(port, listen=ENGINE, host=self.ip(name)).__aenter__()

    async def cut(self, name: str) -> int:
        """Envoy's connections to this pod's engine are refused from now on. Where the engine listens, for `mend`."""
        relay = self._relays.pop(name)
        await relay.__aexit__(None, None, None)
        return relay.port

    async def mend(self, name: str, port: int) -> None:
        await self._relay(name, port)

    async def owner(self, model: str) -> str:
        """The pod that the router would name first."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{ROUTERS[0]}:9090/v1/owner/{model}") as response:
            best = (await response.json())["candidates"][0]
        return next(pod.name for pod in self.pods.values() if pod.endpoint == best["address"])

    @contextlib.asynccontextmanager
    async def news_of_endpoints(self) -> AsyncIterator[None]:
        """A pod that is not ready comes, and goes at the end: a changed cluster is used when Envoy has heard of its endpoints anew, or 15 seconds later."""
        name, conditions = "vllm-2", {"ready": False, "serving": False, "terminating": False}
        endpoints = [{"addresses": [self.ip("z")], "conditions": conditions}]
        await self.admin.slice(name, "vllm", endpoints, [{"name": "http", "port": ENGINE, "protocol": "TCP"}])
        try:
            yield
        finally:
            await asyncio.to_thread(self.kubectl, "-n", "llm", "delete", "endpointslice", name)

    # ---- manifests

    async def apply(self, *components: str) -> None:
        """The overlay with these of its components."""
        own = self.directory / "own"
        own.mkdir(exist_ok=True)
        where = os.path.relpath(OVERLAY, own)
        own.joinpath("kustomization.yaml").write_text(yaml.safe_dump({"resources": [where], "components": [f"{where}/{name}" for name in components]}))
        await asyncio.to_thread(self.kubectl, "apply", "--server-side", "--force-conflicts", "-k", own)

    async def change(self, kind: str, name: str, path: str, value: Any) -> None:
        """One field of an object."""
        patch = json.dumps([{"op": "replace", "path": path, "value": value}])
        await asyncio.to_thread(self.kubectl, "-n", "llm", "patch", kind, name, "--type=json", "-p", patch)

    async def until_shown(self, text: str, *, is_gone: bool = False) -> None:
        """Until the configuration that Envoy uses has this text, or has it no longer. What is still warming is not used."""
        async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"http://{ADMIN}/config_dump") as response:
                    used = json.dumps([_used(part) for part in (await response.json())["configs"]])
                if (text in used) is not is_gone:
                    return
                await asyncio.sleep(0.05)

    async def until_accepted(self, kinds: str) -> None:
        """Until every condition of every object of these kinds is true."""
        wrong: list[tuple[str, str, bool]] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while wrong := [condition for condition in await self.conditions(kinds) if not condition[-1]]:
                    await asyncio.sleep(0.1)
        assert not wrong

    async def conditions(self, kinds: str) -> list[tuple[str, str, bool]]:
        """Of each object: its name, a condition, and whether it is true; one without any has not been looked at."""
        found = []
        for one in await asyncio.to_thread(self.kubectl.get, kinds, "-n", "llm"):
            status = one.get("status", {})
            parts = status.get("ancestors") or status.get("parents") or [status]
            conditions = [condition for part in parts for condition in part.get("conditions", [])]
            name = f"{one['kind']} {one['metadata']['name']}"
            found += [(name, f"{c['type']} {c['reason']}: {c['message']}", c["status"] == "True") for c in conditions] or [(name, "no condition", False)]
        return found

    async def until_served(self) -> None:
        """Until a request for the base model is answered, which needs a router that Envoy finds healthy, and a pod."""
        client = Client(GATEWAY)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (await client.chat(demo.BASE_MODEL)).status != 200:
                    await asyncio.sleep(0.1)
        finally:
            await client.close()

    async def served(self) -> Counter[str]:
        """How many requests the routers were told who served, by whether that was the endpoint that they had named first."""
        found: Counter[str] = Counter()
        async with aiohttp.ClientSession() as session:
            for ip in ROUTERS:
                async with session.get(f"http://{ip}:9090/metrics") as response:
                    found.update({label: int(float(count)) for label, count in SERVED.findall(await response.text())})
        return found

    async def asked_total(self, cluster: str = MODELS) -> Counter[str]:
        """How many requests Envoy has sent to each pod, retries included."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{ADMIN}/clusters") as response:
            lines = [line.split("::") for line in (await response.text()).splitlines()]
        return Counter({line[1]: int(line[3]) for line in lines if line[0] == cluster and line[2] == "rq_total"})


def _used(part: dict[str, Any]) -> Any:
    """Of a part of Envoy's configuration: routes, and the active state of clusters and listeners."""
    listeners = [listener.get("active_state") for listener in part.get("dynamic_listeners", [])]
    return listeners, part.get("dynamic_active_clusters"), part.get("dynamic_route_configs")


def shipped_settings(kubectl: Kubectl) -> Any:
    """Of the router, as the overlay's ConfigMap has them. The engines here are called otherwise."""
    deployment, *_ = kubectl.get("deployment", "lora-extproc", "-n", "llm")
    volume = next(volume for volume in deployment["spec"]["template"]["spec"]["volumes"] if volume["name"] == "settings")
    [config] = kubectl.get("configmap", volume["configMap"]["name"], "-n", "llm")
    settings = yaml.safe_load(config["data"]["settings.yaml"])
    settings["pools"][0]["base_models"] = [demo.BASE_MODEL]
    return settings


@pytest.fixture(scope="module")
def cluster(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With the kinds of the Gateway API and of Envoy Gateway."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), crds("gateway-api", "envoy-gateway")) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(cluster: Cluster, origin: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Everything, as a cluster has it some seconds after `kubectl apply`."""
    directory = tmp_path_factory.mktemp("site")
    kubeconfig = cluster.server.kubeconfig(directory / "admin")
    kubectl = Kubectl(kubeconfig)
    async with Admin(cluster.server) as admin, EnvoyGateway(kubectl, kubeconfig, directory) as envoy_gateway:
        async with Gateway(kubectl, envoy_gateway, admin, origin, directory) as site:
            await asyncio.to_thread(kubectl, "apply", "-f", KUBERNETES / "vllm" / "service.yaml", "-n", "llm")
            await site.apply()
            await envoy_gateway.deploy("llm", PROXIES[0], ADMIN)
            settings = shipped_settings(kubectl)
            for ip in ROUTERS:
                await site.start_router(settings, ip)
            endpoints = [{"addresses": [ip], "conditions": {"ready": True, "serving": True}} for ip in ROUTERS]
            await admin.slice("lora-extproc-1", "lora-extproc", endpoints, [{"name": "grpc", "port": 9002, "protocol": "TCP"}])
            await site.have("a", "b", "c")
            await site.until_served()
            yield site


@pytest_asyncio.fixture(loop_scope="module")
async def site(running: Gateway) -> Gateway:
    """With three pods, which Envoy knows, and without a component."""
    await running.have("a", "b", "c")
    await running.until_known("a", "b", "c", cluster=MODELS, envoy_admin=ADMIN)
    return running


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[Client]:
    """On connections of the test's own: one that is older than a change goes on with what was before."""
    client = Client(GATEWAY)
    try:
        yield client
    finally:
        await client.close()


async def test_every_policy_is_accepted_and_the_gateway_is_programmed(site: Gateway) -> None:
    """No condition of any object says that something of it is left out; that one policy takes a rule from another is meant."""
    await site.until_accepted(f"gateways,httproutes,{POLICIES}")
    found = await site.conditions(POLICIES)
    assert {name for name, what, _ in found if what.startswith("Accepted ")} == {
        "BackendTrafficPolicy vllm",
        "BackendTrafficPolicy vllm-once",
        "ClientTrafficPolicy llm",
        "EnvoyExtensionPolicy lora-extproc",
    }


async def test_cold_warm_and_streamed_requests_are_answered_by_the_adapter(site: Gateway, client: Client, origin: Path) -> None:
    """Fetched while the request is held, then at once; a stream comes in pieces, and a base model needs nothing."""
    for name in NAMES:
        cold, warm = await client.chat(name), await client.chat(name)
        assert cold.weights == warm.weights == weights_of(origin, name)
    streamed = await client.chat("team/a", stream=True)
    assert streamed.text.count("data: ") > 2
    assert weights_of(origin, "team/a") in streamed.text
    assert (await client.chat(demo.BASE_MODEL)).status == 200


async def test_what_a_client_forges_steers_nothing(site: Gateway, client: Client, origin: Path) -> None:
    """A destination, and the mark that takes a request to the rule without retries: each request reaches the pod that its router named first."""
    before, once = await site.served(), await site.asked_total(ONCE)
    for pod in site.pods.values():
        forged = {"x-gateway-destination-endpoint": pod.endpoint, "x-lora-extproc-no-retry": "1"}
        assert (await client.chat("team/a", forged)).weights == weights_of(origin, "team/a")
    assert await site.served() - before == {"true": len(site.pods)}
    assert await site.asked_total(ONCE) == once


async def test_errors_are_the_routers(site: Gateway, client: Client) -> None:
    """An adapter that no origin has, a path that nobody serves, an engine's administration, a body that is none."""
    assert (await client.chat("team/nobody")).code == "model_not_found"
    assert (await client.send("GET", "/nowhere")).code == "unknown_path"
    assert (await client.send("POST", "/v1/unload_lora_adapter", b"{}")).code == "forbidden"
    assert (await client.post(b"{")).code == "invalid_request"


async def test_a_body_passes_up_to_the_routers_own_limit(site: Gateway, client: Client, origin: Path) -> None:
    """Envoy's buffers, of 1 MiB each, are no limit in full duplex; above `router.max_body_bytes` the router answers."""
    assert (await client.chat("team/a", padding=LARGE_BYTES)).weights == weights_of(origin, "team/a")
    assert (await client.chat("team/a", padding=TOO_LARGE_BYTES)).code == "body_too_large"


async def test_a_body_that_ends_in_trailers_arrives_once(site: Gateway, origin: Path) -> None:
    """By the route's rule without retries: with them Envoy would send the body twice."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}], "model": "team/a"}).encode()
    status, answer = await _post_with_trailers(GATEWAY, body, {})
    assert (status, json.loads(answer)["system_fingerprint"]) == (200, weights_of(origin, "team/a"))


async def test_pods_come_and_go_under_load_without_a_failed_request(site: Gateway) -> None:
    """One more is found by the router and by Envoy Gateway, each by itself; one that terminates ends in order."""
    async with site.load(GATEWAY) as load:
        await load.more(50)
        await site.add("d")
        await site.until_known(*"abcd", cluster=MODELS, envoy_admin=ADMIN)
        await load.more(200)
        await site.drain("d")
        await site.until_known(*"abc", cluster=MODELS, envoy_admin=ADMIN)
        await load.more(50)
    assert not load.failed()


async def test_policies_change_under_load_without_a_failed_request(site: Gateway) -> None:
    """One that changes the route, one that changes the filter, one that changes the listener, and all of them back."""
    shown = ('"num_retries": 3', '"message_timeout": "331s"', '"per_connection_buffer_limit_bytes": 2097152')
    async with site.load(GATEWAY) as load:
        await load.more(50)
        await site.change("btp", "vllm", "/spec/retry/numRetries", 3)
        await site.change("eep", "lora-extproc", "/spec/extProc/0/messageTimeout", "331s")
        await site.change("ctp", "llm", "/spec/connection/bufferLimit", "2Mi")
        for text in shown:
            await site.until_shown(text)
        await load.more(50)
        await site.apply()
        for text in shown:
            await site.until_shown(text, is_gone=True)
        await load.more(50)
    assert not load.failed()


async def test_envoy_gateway_is_away_and_back_under_load_without_a_failed_request(site: Gateway) -> None:
    """Envoy goes on with what it has; afterwards it is told of what changed meanwhile."""
    async with site.load(GATEWAY) as load:
        await load.more(50)
        await site.envoy_gateway.kill()
        await site.change("btp", "vllm", "/spec/retry/numRetries", 4)
        await load.more(100)
        await site.envoy_gateway.start()
        await site.until_shown('"num_retries": 4')
        await site.apply()
        await site.until_shown('"num_retries": 4', is_gone=True)
        await load.more(50)
    assert not load.failed()


async def test_an_engine_that_dies_costs_what_it_was_answering(site: Gateway) -> None:
    """Its adapters are served by the others, and by it again when it is back."""
    name = await site.owner("team/a")
    pod = site.pods[name]
    async with site.load(GATEWAY) as load:
        await load.more(50)
        pod.engine.process.kill()
        await pod.engine.process.wait()
        port = await site.cut(name)
        died_s = asyncio.get_running_loop().time()
        await load.more(100)
        await site.mend(name, port)
        pod.engine = await spawn(pod.engine.name, pod.engine.command, site.directory)
        before = (await site.asked_total())[pod.endpoint]
        async with asyncio.timeout(PATIENCE_S):
            while (await site.asked_total())[pod.endpoint] <= before:
                await load.more(10)
    assert not load.failed(died_s)
    assert load.failed().total() <= len(NAMES)


async def test_an_engine_that_only_envoy_cannot_reach_costs_a_few_retries_and_no_404(site: Gateway, client: Client, origin: Path) -> None:
    """Its stager finds nothing wrong. Envoy's retry leaves the list for any pod, and says so by `upstream.address`: no client sees that pod's 404."""
    models = [*NAMES, demo.BASE_MODEL]
    outcomes, _ = await asked(client, models)
    assert outcomes == {("first", 200): len(models)}
    name = await site.owner("team/a")
    port = await site.cut(name)
    try:
        outcomes, answers = await asked(client, list(islice(cycle(models), REQUESTS)))
    finally:
        await site.mend(name, port)
    failed = outcomes["first", 503]
    assert outcomes == Counter({("first", 200): REQUESTS - failed, ("first", 503): failed, ("again", 200): failed})
    assert failed <= MOST_FAILED
    assert all(answer.weights == weights_of(origin, model) for model, answer in answers if model in NAMES)


async def test_a_request_that_no_router_has_seen_is_refused_with_the_patch_policy_alone(site: Gateway, client: Client) -> None:
    """Such a request names no pod: the fallback is any pod, and with the policy none."""
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "eep", "lora-extproc")
    await site.until_shown("extproc/0", is_gone=True)
    assert (await client.chat(demo.BASE_MODEL)).status == 200
    await site.apply("refusing")
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "eep", "lora-extproc")
    async with site.news_of_endpoints():
        await site.until_shown("lora_extproc_nowhere")
    await site.until_shown("extproc/0", is_gone=True)
    await site.until_accepted("envoypatchpolicies")
    assert (await client.chat(demo.BASE_MODEL)).status == 503
    await site.apply()
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "envoypatchpolicy", "vllm-refusing")
    await site.until_served()


async def test_buffered_bodies_end_at_envoys_limit(site: Gateway, client: Client, origin: Path) -> None:
    """Up to that they are judged and changed like others."""
    await site.apply("buffered")
    await site.until_shown('"request_body_mode": "BUFFERED"')
    assert (await client.chat("team/a", padding=LARGE_BYTES)).weights == weights_of(origin, "team/a")
    refused = await client.chat("team/a", padding=TOO_LARGE_BYTES)
    assert (refused.status, refused.headers.get("x-lora-extproc-reason")) == (413, None)


async def test_with_headers_only_a_header_names_the_model(site: Gateway, client: Client, origin: Path) -> None:
    """And the engine knows the adapter by the name that the body has."""
    await site.apply("headers-only")
    await site.until_shown('"request_body_mode": "BUFFERED"', is_gone=True)
    answer = await client.chat("team/b", {"x-gateway-model-name": "team/b"})
    assert answer.weights == weights_of(origin, "team/b")
    await site.apply()
    await site.until_shown('"request_body_mode": "FULL_DUPLEX_STREAMED"')


async def test_without_a_router_clients_are_told_to_ask_again(site: Gateway, client: Client) -> None:
    """503, where Envoy Gateway's own default is 500."""
    for router in site.routers:
        router.process.kill()
        await router.process.wait()
    assert (await client.chat("team/a")).status == 503


async def test_with_one_endpoint_a_router_names_one_pod(site: Gateway, client: Client, origin: Path) -> None:
    """By the settings of that component, which differ from the base's by nothing else; the route has no retries."""
    plain = await asyncio.to_thread(shipped_settings, site.kubectl)
    await site.apply("one-endpoint")
    settings = await asyncio.to_thread(shipped_settings, site.kubectl)
    assert settings == {**plain, "router": {**plain["router"], "max_retry_endpoints": 1}}
    await site.until_shown('"base_interval": "0.005s"', is_gone=True)
    await site.start_router(settings, ROUTERS[0])
    await site.until_served()
    assert (await client.chat("team/a")).weights == weights_of(origin, "team/a")
