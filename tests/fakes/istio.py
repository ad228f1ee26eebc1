"""A real Istio that follows a real kube-apiserver, and a real Envoy that takes its configuration from it as the proxy of a gateway does.

Istio's own proxy is Envoy with filters, a secret server and an agent of Istio's. An ordinary Envoy has none of them, so Istio is told to leave them out; all else
is as Istio has it. Nobody deploys the Gateway's pods here, so its proxy is deployed by hand, as Istio documents for gateways that somebody else deploys: a
Service that the Gateway names as its address, and a pod behind it. To be used in a network namespace (netns.py): the ports are fixed.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import yaml

from extproc.up.processes import Child, spawn
from extproc.up.stack import envoy_binary

from .assets import asset
from .children import kill, until_answered
from .kubectl import Kubectl

SYSTEM = "istio-system"
VERSION = "1.31.0"  # that the proxy says it is
XDS, HTTP, MONITORING, SECURE, HTTPS = 15010, 15080, 15014, 15012, 15017
READY = f"http://127.0.0.1:{HTTP}/ready"
MESH = {
    "enablePrometheusMerge": False,
    "defaultProviders": {},
    "enableAutoMtls": False,  # clusters would wait for certificates of the agent's
}
ENVIRONMENT = {
    "PILOT_ENABLE_ALPN_FILTER": "false",  # filters that Istio's Envoy alone has
    "PILOT_ENABLE_METADATA_EXCHANGE": "false",
    "ENABLE_GATEWAY_API_INFERENCE_EXTENSION": "true",  # as deploy/kubernetes/inference-pool says that it must be
    "INJECTION_WEBHOOK_CONFIG_NAME": "",
    "VALIDATION_WEBHOOK_CONFIG_NAME": "",
    "POD_NAMESPACE": SYSTEM,
    "POD_NAME": "istiod",
    "REVISION": "default",
}


class Istio:
    """`async with Istio(kubectl, kubeconfig, directory) as istio`: its control plane runs. It and its proxies end with the block."""

    def __init__(self, kubectl: Kubectl, kubeconfig: str, directory: Path) -> None:
        self._kubectl = kubectl
        self._directory = directory
        mesh = directory / "mesh.yaml"
        mesh.write_text(yaml.safe_dump(MESH))
        self._command = [asset("pilot-discovery", directory), "discovery", "--kubeconfig", kubeconfig, "--meshConfig", str(mesh)]
        self._command += [f"--grpcAddr=127.0.0.1:{XDS}", f"--httpAddr=127.0.0.1:{HTTP}", f"--monitoringAddr=127.0.0.1:{MONITORING}"]
        self._command += [f"--secureGRPCAddr=127.0.0.1:{SECURE}", f"--httpsAddr=127.0.0.1:{HTTPS}", "--ctrlz_address=127.0.0.1"]
        self._process: Child | None = None
        self._proxies: dict[str, Child] = {}

    async def __aenter__(self) -> "Istio":
        await asyncio.to_thread(self._kubectl, "create", "namespace", SYSTEM)
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self._proxies):
            await self.remove(name)
        await self.kill()

    async def start(self) -> None:
        """Return when it serves."""
        self._process = await spawn("pilot-discovery", self._command, self._directory, environment={**os.environ, **ENVIRONMENT})
        await until_answered(READY, child=self._process)

    async def kill(self) -> None:
        if self._process is not None:
            await kill(self._process)
            self._process = None

    async def deploy(self, name: str, namespace: str, labels: dict[str, str], ip: str, front: int, admin: str) -> None:
        """Run a gateway's proxy as a pod with these labels and this address. Its Service, of the same name, leads from port 80 to `front`. `admin`: where
        Envoy's administration listens."""
        metadata = {"name": name, "namespace": namespace}
        objects: list[dict[str, Any]] = [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {**metadata, "labels": labels},
                "spec": {"nodeName": "n1", "containers": [{"name": "p", "image": "p"}]},
            },
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata,
                "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": front}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [ip], "conditions": {"ready": True}, "targetRef": {"kind": "Pod", **metadata}}],
                "ports": [{"name": "http", "port": front}],
            },
        ]
        await asyncio.to_thread(self._kubectl, "apply", "-f", "-", stdin=yaml.safe_dump_all(objects))
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]}
        await asyncio.to_thread(self._kubectl.set_status, namespace, "pod", name, status)
        file = self._directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(_bootstrap(name, namespace, labels, ip, admin)))
        command = [str(envoy_binary()), "-c", str(file), "--concurrency", "1", "-l", "warning", "--use-dynamic-base-id"]
        self._proxies[name] = await spawn(f"envoy-{name}", command, self._directory)

    async def remove(self, name: str) -> None:
        """End a proxy; its objects stay."""
        await kill(self._proxies.pop(name))


def _bootstrap(name: str, namespace: str, labels: dict[str, str], ip: str, admin: str) -> dict[str, Any]:
    """What Istio's agent would write, as far as an ordinary Envoy needs it: who it is, by which Istio chooses its gateway, and where Istio is."""
    told = {"ads": {}, "resource_api_version": "V3"}
    options = {"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}
    istio = {
        "name": "xds-grpc",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "load_assignment": {"cluster_name": "xds-grpc", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address("127.0.0.1", XDS)}}]}]},
    }
    about = {"NAMESPACE": namespace, "CLUSTER_ID": "Kubernetes", "ISTIO_VERSION": VERSION, "LABELS": labels, "INSTANCE_IPS": ip}
    ads = {
        "api_type": "GRPC",
        "transport_api_version": "V3",
        "set_node_on_first_message_only": True,
        "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
    }
    host, _, port = admin.rpartition(":")
    return {
        "node": {"id": f"router~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local", "cluster": name, "metadata": about},
        "admin": {"address": _address(host, int(port))},
        "dynamic_resources": {"ads_config": ads, "cds_config": told, "lds_config": told},
        "static_resources": {"clusters": [istio]},
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
