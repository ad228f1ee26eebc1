"""A site whose gateway is Envoy Gateway's: pods behind relays, the overlay of deploy/kubernetes/envoy-gateway, and what Envoy makes of both.

Envoy reaches each engine through a relay, its stager reaches it directly, and finds nothing wrong when the relay is gone.
"""

import asyncio
import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from extproc.up import demo
from extproc.up.processes import free_ports
from tests.e2e.client import Client
from tests.fakes.envoy_gateway import EnvoyGateway
from tests.fakes.kube_apiserver import Admin
from tests.fakes.kubectl import Kubectl
from tests.fakes.relay import Relay
from tests.fakes.wait import PATIENCE_S

from .site import ENGINE, ENVOY_ADMIN, FRONT, PROXIES, ROUTERS, Pod, Site

OVERLAY = Path(__file__).parents[3] / "deploy" / "kubernetes" / "envoy-gateway"
GATEWAY, ADMIN = f"{PROXIES[0]}:{FRONT}", f"{PROXIES[0]}:{ENVOY_ADMIN}"
MODELS, ONCE = "httproute/llm/vllm/rule/0", "httproute/llm/vllm/rule/1"  # Envoy Gateway's names of the clusters of the route's rules
_SERVED = re.compile(r'^lora_extproc_served_total\{\w+="(true|false)"\} (\S+)$', re.MULTILINE)


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

    async def _engine_at(self, pod: Pod, rank: int) -> str:
        if pod.name in self._relays:  # of a pod that is gone
            await self.cut(pod.name)
        [port] = free_ports(1)
        await self._relay(pod.name, port)
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
        return next(pod.name for pod in self.pods.values() if best["address"] in pod.endpoints)

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

    async def publish_pods(self) -> None:
        """Write the EndpointSlice of the pods again."""
        await self._publish()

    async def publish_routers(self) -> None:
        """Write the EndpointSlice of the routers' Service."""
        endpoints = [{"addresses": [ip], "conditions": {"ready": True, "serving": True}} for ip in ROUTERS]
        await self.admin.slice("lora-extproc-1", "lora-extproc", endpoints, [{"name": "grpc", "port": 9002, "protocol": "TCP"}])

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

    async def until_answered_with(self, status: int) -> None:
        """Until that is what a request for the base model gets, each on a connection of its own."""
        async with asyncio.timeout(PATIENCE_S):
            while await self._status() != status:
                await asyncio.sleep(0.1)

    async def _status(self) -> int:
        client = Client(GATEWAY)
        try:
            return (await client.chat(demo.BASE_MODEL)).status
        except aiohttp.ClientConnectionError:  # Envoy has no listener yet
            return 0
        finally:
            await client.close()

    async def served(self) -> Counter[str]:
        """How many requests the routers were told who served, by whether that was the endpoint that they had named first."""
        found: Counter[str] = Counter()
        async with aiohttp.ClientSession() as session:
            for ip in ROUTERS:
                async with session.get(f"http://{ip}:9090/metrics") as response:
                    found.update({label: int(float(count)) for label, count in _SERVED.findall(await response.text())})
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


def shipped_settings(kubectl: Kubectl, directory: Path) -> Any:
    """Of the router, as the overlay's ConfigMap has them. The engines here are called otherwise, and what it keeps goes into `directory`."""
    deployment, *_ = kubectl.get("deployment", "lora-extproc", "-n", "llm")
    volume = next(volume for volume in deployment["spec"]["template"]["spec"]["volumes"] if volume["name"] == "settings")
    [config] = kubectl.get("configmap", volume["configMap"]["name"], "-n", "llm")
    settings = yaml.safe_load(config["data"]["settings.yaml"])
    settings["pools"][0]["base_models"] = [demo.BASE_MODEL]
    settings["discovery"]["dir"] = str(directory / "kept")
    return settings
