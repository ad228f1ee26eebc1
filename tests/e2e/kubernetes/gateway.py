"""A site behind a gateway that is configured by what deploy/ ships, and the requests that every such gateway has to answer alike.

Envoy reaches each engine through a relay, and its stager reaches it directly: so an engine can be out of the proxy's reach while its stager finds nothing wrong.
"""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from extproc.up import demo
from extproc.up.processes import free_ports, spawn
from tests.e2e.client import Client, weights_of
from tests.fakes.children import kill, until_answered
from tests.fakes.kube_apiserver import Admin
from tests.fakes.kubectl import Kubectl
from tests.fakes.netns import NETWORK
from tests.fakes.relay import Relay
from tests.fakes.wait import PATIENCE_S

from .site import ENGINE, ENVOY_ADMIN, FRONT, NAMES, PROXIES, ROUTERS, Pod, Site

KUBERNETES = Path(__file__).parents[3] / "deploy" / "kubernetes"
GATEWAY, ADMIN = f"{PROXIES[0]}:{FRONT}", f"{PROXIES[0]}:{ENVOY_ADMIN}"
LARGE_BYTES, TOO_LARGE_BYTES = 20_000_000, 55_000_000  # router.max_body_bytes is 50 MiB
NOBODY = f"{NETWORK}.20"  # an address without a pod
ALONE = "team/deep/d"  # an adapter of the origin that nothing else asks for: one pod has it


class Fronted(Site):
    """Pods behind relays, routers with the settings that are shipped, and a gateway's Envoy at GATEWAY, whose cluster of the engines is `models`."""

    def __init__(self, kubectl: Kubectl, admin: Admin, origin: Path, directory: Path, models: str) -> None:
        super().__init__(admin, origin, directory, services=["vllm"])
        self.kubectl = kubectl
        self.client = Client(GATEWAY)
        self.origin = origin
        self.models = models
        self._relays: dict[str, Relay] = {}

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()
        for name in list(self._relays):
            await self.cut(name)
        await super().__aexit__(*error)

    # ---- pods

    async def _engine_at(self, pod: Pod, rank: int) -> str:
        if pod.name in self._relays:  # of a pod that is gone
            await self.cut(pod.name)
        [port] = free_ports(1)
        await self.mend(pod.name, port)
        return f"127.0.0.1:{port}"

    async def cut(self, name: str) -> int:
        """Envoy's connections to this pod's engine are refused from now on. Where the engine listens, for `mend`."""
        relay = self._relays.pop(name)
        await relay.__aexit__(None, None, None)
        return relay.port

    async def mend(self, name: str, port: int) -> None:
        self._relays[name] = await Relay(port, listen=ENGINE, host=self.ip(name)).__aenter__()

    async def owner(self, model: str) -> str:
        """The pod that the router would name first."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{ROUTERS[0]}:9090/v1/owner/{model}") as response:
            best = (await response.json())["candidates"][0]
        return self.pod_at(best["address"])

    def pod_at(self, endpoint: str) -> str:
        return next(pod.name for pod in self.pods.values() if endpoint in pod.endpoints)

    async def until_these(self, *names: str) -> None:
        """Until the gateway's Envoy has these pods and no others."""
        await self.until_known(*names, cluster=self.models, envoy_admin=ADMIN)

    # ---- manifests

    async def start_routers(self) -> None:
        """With the settings that are shipped, as the service account that is."""
        settings, token = await asyncio.to_thread(shipped_settings, self.kubectl), await self.admin.token("lora-extproc")
        for ip in ROUTERS:
            await self.start_router(settings, ip, token)
        await until_answered(*(f"http://{ip}:9090/readyz" for ip in ROUTERS))
        await self.publish_routers()

    async def publish_routers(self) -> None:
        """Write the EndpointSlice of the routers' Service."""
        endpoints = [{"addresses": [ip], "conditions": {"ready": True, "serving": True}} for ip in ROUTERS]
        await self.admin.slice("lora-extproc-1", "lora-extproc", endpoints, [{"name": "grpc", "port": 9002, "protocol": "TCP"}])

    async def until_answered_with(self, status: int) -> None:
        """Until that is what a request for the base model gets."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError):  # the listener may not be there yet
                    if (await self.client.chat(demo.BASE_MODEL)).status == status:
                        return
                await asyncio.sleep(0.1)

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

    async def config_dump(self) -> Any:
        """All that Envoy has been told."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{ADMIN}/config_dump") as response:
            return await response.json(content_type=None)

    async def asked_total(self, cluster: str = "") -> Counter[str]:
        """How many requests Envoy has sent to each pod, retries included."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{ADMIN}/clusters") as response:
            lines = [line.split("::") for line in (await response.text()).splitlines()]
        return Counter({line[1]: int(line[3]) for line in lines if line[0] == (cluster or self.models) and line[2] == "rq_total"})


def shipped_settings(kubectl: Kubectl) -> Any:
    """Of the router, from the ConfigMap that its Deployment mounts. The engines here are called otherwise."""
    deployment, *_ = kubectl.get("deployment", "lora-extproc", "-n", "llm")
    volume = next(volume for volume in deployment["spec"]["template"]["spec"]["volumes"] if volume["name"] == "settings")
    [config] = kubectl.get("configmap", volume["configMap"]["name"], "-n", "llm")
    settings = yaml.safe_load(config["data"]["settings.yaml"])
    settings["pools"][0]["base_models"] = [demo.BASE_MODEL]
    return settings


class Requests:
    """What is asked of every gateway; the fixture `site` has three pods that its Envoy knows."""

    async def test_cold_warm_and_streamed_requests_are_answered_by_the_adapter(self, site: Fronted) -> None:
        """Fetched while the request is held, then at once; a stream comes in pieces, and a base model needs nothing."""
        for name in NAMES:
            cold, warm = await site.client.chat(name), await site.client.chat(name)
            assert cold.weights == warm.weights == weights_of(site.origin, name)
        streamed = await site.client.chat("team/a", stream=True)
        assert streamed.text.count("data: ") > 2
        assert weights_of(site.origin, "team/a") in streamed.text
        assert (await site.client.chat(demo.BASE_MODEL)).status == 200

    async def test_what_a_client_forges_steers_nothing(self, site: Fronted) -> None:
        """The destination of each pod, of which one at most has the adapter, and of an address that is of no pod; the mark of requests that must not be sent
        again; and what a conformance test would say."""
        assert (await site.client.chat(ALONE)).status == 200
        for forged in [endpoint for pod in site.pods.values() for endpoint in pod.endpoints] + [f"{NOBODY}:{ENGINE}"]:
            headers = {"x-gateway-destination-endpoint": forged, "x-lora-extproc-no-retry": "1", "test-epp-endpoint-selection": forged}
            assert (await site.client.chat(ALONE, headers)).weights == weights_of(site.origin, ALONE)

    async def test_errors_are_the_routers(self, site: Fronted) -> None:
        """An adapter that no origin has, a path that nobody serves, an engine's administration, a body that is none."""
        assert (await site.client.chat("team/nobody")).code == "model_not_found"
        assert (await site.client.send("GET", "/nowhere")).code == "unknown_path"
        assert (await site.client.send("POST", "/v1/unload_lora_adapter", b"{}")).code == "forbidden"
        assert (await site.client.post(b"{")).code == "invalid_request"

    async def test_a_body_passes_up_to_the_routers_own_limit(self, site: Fronted) -> None:
        """Envoy's buffers are no limit in full duplex; above `router.max_body_bytes` the router answers."""
        assert (await site.client.chat("team/a", padding=LARGE_BYTES)).weights == weights_of(site.origin, "team/a")
        assert (await site.client.chat("team/a", padding=TOO_LARGE_BYTES)).code == "body_too_large"

    async def test_an_engine_that_dies_costs_what_it_was_answering(self, site: Fronted) -> None:
        """Its adapters are served by the others, and by it again when it is back."""
        name = await site.owner("team/a")
        pod = site.pods[name]
        [engine], [endpoint] = pod.engines, pod.endpoints
        async with site.load(GATEWAY) as load:
            await load.more(50)
            await kill(engine)
            port = await site.cut(name)
            died_s = asyncio.get_running_loop().time()
            await load.more(100)
            await site.mend(name, port)
            pod.engines = [await spawn(engine.name, engine.command, site.directory)]
            before = (await site.asked_total())[endpoint]
            async with asyncio.timeout(PATIENCE_S):
                while (await site.asked_total())[endpoint] <= before:
                    await load.more(10)
        assert not load.failed(died_s)
        assert load.failed().total() <= len(NAMES)
