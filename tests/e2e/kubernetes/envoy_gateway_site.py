"""A site whose gateway is Envoy Gateway's: the overlay of deploy/kubernetes/envoy-gateway, its components, and what Envoy makes of them."""

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

from tests.fakes.envoy_gateway import EnvoyGateway
from tests.fakes.kube_apiserver import Admin
from tests.fakes.kubectl import Kubectl
from tests.fakes.wait import PATIENCE_S

from .gateway import ADMIN, KUBERNETES, Fronted
from .site import ENGINE, ROUTERS

OVERLAY = KUBERNETES / "envoy-gateway"
MODELS, ONCE = "httproute/llm/vllm/rule/0", "httproute/llm/vllm/rule/1"  # Envoy Gateway's names of the clusters of the route's rules
_EJECTED = "outlier_detection.ejections_enforced_consecutive_local_origin_failure"
_SERVED = re.compile(r'^lora_extproc_served_total\{\w+="(true|false)"\} (\S+)$', re.MULTILINE)


class Gateway(Fronted):
    """With Envoy Gateway."""

    def __init__(self, kubectl: Kubectl, envoy_gateway: EnvoyGateway, admin: Admin, origin: Path, directory: Path) -> None:
        super().__init__(kubectl, admin, origin, directory, MODELS)
        self.envoy_gateway = envoy_gateway

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

    async def ejected(self) -> int:
        """How often Envoy has taken a router out because it could not be asked."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{ADMIN}/stats?filter=^cluster.envoyextensionpolicy.*{_EJECTED}") as response:
            return sum(int(line.rpartition(" ")[2]) for line in (await response.text()).splitlines())

    async def served(self) -> Counter[str]:
        """How many requests the routers were told who served, by whether that was the endpoint that they had named first."""
        found: Counter[str] = Counter()
        async with aiohttp.ClientSession() as session:
            for ip in ROUTERS:
                async with session.get(f"http://{ip}:9090/metrics") as response:
                    found.update({label: int(float(count)) for label, count in _SERVED.findall(await response.text())})
        return found


def _used(part: dict[str, Any]) -> Any:
    """Of a part of Envoy's configuration: routes, and the active state of clusters and listeners."""
    listeners = [listener.get("active_state") for listener in part.get("dynamic_listeners", [])]
    return listeners, part.get("dynamic_active_clusters"), part.get("dynamic_route_configs")
