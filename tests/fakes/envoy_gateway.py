"""A real Envoy Gateway that follows a real kube-apiserver, and a real Envoy started from the bootstrap that Envoy Gateway made for it.

No kubelet runs the Deployment that Envoy Gateway writes for each Gateway, so a test does: the bootstrap is an argument of its container, and what its pod mounts
lies under the same paths. In the bootstrap three addresses are replaced: that of Envoy Gateway, which has no DNS name here, and those of Envoy's administration
and statistics, whose ports Envoy Gateway has itself in the network that both share. To be used in a network namespace (netns.py): the other ports are fixed.

Envoy would wait 15 seconds for the endpoints of the Service that Envoy Gateway wrote for it: its controller would write them, so this does.
"""

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from extproc.up.processes import Child, spawn
from extproc.up.stack import envoy_binary

from .assets import asset
from .children import kill, until_answered
from .kubectl import Kubectl
from .wait import PATIENCE_S

SYSTEM = "envoy-gateway-system"
SECRETS = ("envoy-gateway", "envoy", "envoy-oidc-hmac")  # that `envoy-gateway certgen` would write into the cluster
READY = "http://127.0.0.1:8081/readyz"
SERVER = "envoy-gateway.envoy-gateway-system.svc.cluster.local."  # as a proxy finds it; here it is on this machine
STATISTICS = 19002  # of a proxy, beside 19001 of Envoy Gateway
SETTINGS = {
    "apiVersion": "gateway.envoyproxy.io/v1alpha1",
    "kind": "EnvoyGateway",
    "gateway": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
    "provider": {"type": "Kubernetes", "kubernetes": {"leaderElection": {"disable": True}, "topologyInjector": {"disable": True}}},
    "extensionApis": {"enableEnvoyPatchPolicy": True},
}
_ROOT = """
root=$1; shift
mount -t tmpfs tmpfs "$root"
for entry in /*; do
  if [ -L "$entry" ]; then cp -P "$entry" "$root/"; elif [ -d "$entry" ]; then mkdir "$root$entry"; mount --rbind "$entry" "$root$entry"; fi
done
while [ "$1" != -- ]; do mkdir -p "$root$2"; mount --bind "$1" "$root$2"; shift 2; done  # pairs of a source and a target, then the command
shift
exec chroot "$root" "$@"
"""


class EnvoyGateway:
    """`async with EnvoyGateway(kubectl, kubeconfig, directory) as envoy_gateway`: it runs. It and its proxies end with the block."""

    def __init__(self, kubectl: Kubectl, kubeconfig: str, directory: Path) -> None:
        self._kubectl = kubectl
        self._directory = directory
        self._program = asset("envoy-gateway", directory)
        self._environment = {**os.environ, "KUBECONFIG": kubeconfig, "ENVOY_GATEWAY_NAMESPACE": SYSTEM}
        self._process: Child | None = None
        self._proxies: list[Child] = []

    async def __aenter__(self) -> "EnvoyGateway":
        await asyncio.to_thread(self._install)
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await kill(*self._proxies)
        await self.kill()

    def _install(self) -> None:
        """Its settings, and what its chart and its certificates' job leave in a cluster."""
        (self._directory / "envoy-gateway.yaml").write_text(yaml.safe_dump(SETTINGS))
        subprocess.run([self._program, "certgen", "--local", "--config-home", self._directory], check=True, capture_output=True)
        self._kubectl("create", "namespace", SYSTEM)
        for name in SECRETS:
            self._kubectl("-n", SYSTEM, "create", "secret", "generic", name, f"--from-file={self._directory / 'certs' / name}")

    async def start(self) -> None:
        """Return when it serves."""
        command = [self._program, "server", "--config-path", str(self._directory / "envoy-gateway.yaml")]
        command = _rooted(self._directory / "gateway-root", {"/certs": self._directory / "certs" / "envoy-gateway"}, command)
        self._process = await spawn("envoy-gateway", command, self._directory, environment=self._environment)
        await until_answered(READY, child=self._process)

    async def kill(self) -> None:
        if self._process is not None:
            await kill(self._process)
            self._process = None

    async def deploy(self, gateway: str, ip: str, admin: str) -> None:
        """Run what it deploys for a Gateway, as a pod of this address. `admin`: where Envoy's administration is to listen."""
        deployment = await self._made("deployments", gateway)
        config = await self._made("configmaps", gateway)
        service = await self._made("services", gateway)
        mounted = self._directory / "sds"
        mounted.mkdir(exist_ok=True)
        for name, text in config["data"].items():
            (mounted / name).write_text(text)
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        arguments = [_of_this_pod(argument, gateway, admin) for argument in container["args"]]
        mounts = {"/certs": self._directory / "certs" / "envoy", "/sds": mounted}
        command = _rooted(self._directory / f"{gateway}-root", mounts, [str(envoy_binary()), *arguments, "--use-dynamic-base-id"])
        self._proxies.append(await spawn(f"envoy-{gateway}", command, self._directory))
        await asyncio.to_thread(self._publish, deployment["metadata"]["name"], service, ip)

    def _publish(self, deployment: str, service: dict[str, Any], ip: str) -> None:
        """What the controllers of Deployments, of Services and of a cloud's load balancers would write; the Gateway is programmed then."""
        name = service["metadata"]["name"]
        ports = [{"name": port["name"], "port": port["targetPort"], "protocol": "TCP"} for port in service["spec"]["ports"]]
        metadata = {"name": f"{name}-1", "namespace": SYSTEM, "labels": {"kubernetes.io/service-name": name}}
        endpoints = [{"addresses": [ip], "conditions": {"ready": True}}]
        body = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata,
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": ports,
        }
        self._kubectl("apply", "-f", "-", stdin=yaml.safe_dump(body))
        running = {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1}
        self._kubectl.set_status(SYSTEM, "deployment", deployment, running)
        self._kubectl.set_status(SYSTEM, "service", name, {"loadBalancer": {"ingress": [{"ip": ip}]}})

    async def _made(self, kind: str, gateway: str) -> dict[str, Any]:
        """The one object of this kind that it wrote for a Gateway."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await asyncio.to_thread(self._kubectl.get, kind, "-n", SYSTEM, "-l", f"gateway.envoyproxy.io/owning-gateway-name={gateway}")
                if found:
                    return found[0]
                await asyncio.sleep(0.1)


def _of_this_pod(argument: str, name: str, admin: str) -> str:
    """An argument of the container, with what the kubelet would put in, and with the addresses of this machine."""
    argument = argument.replace("$(ENVOY_POD_NAME)", f"envoy-{name}").replace("$(ENVOY_SERVICE_ZONE)", "").replace(SERVER, "127.0.0.1")
    if "static_resources:" not in argument:
        return argument
    bootstrap = yaml.safe_load(argument)
    host, _, port = admin.rpartition(":")
    bootstrap["admin"]["address"]["socket_address"] = {"address": host, "port_value": int(port)}
    [statistics] = bootstrap["static_resources"]["listeners"]
    statistics["address"]["socket_address"]["port_value"] = STATISTICS
    return yaml.safe_dump(bootstrap)


def _rooted(root: Path, mounts: Mapping[str, Path], command: Sequence[str]) -> list[str]:
    """The command with this machine's files, and with directories mounted that nobody else sees: both programs read from paths that are fixed."""
    root.mkdir(exist_ok=True)
    pairs = [part for target, source in mounts.items() for part in (str(source), target)]
    return ["unshare", "--mount", "sh", "-ec", _ROOT, "sh", str(root), *pairs, "--", *command]
