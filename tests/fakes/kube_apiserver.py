"""A real kube-apiserver on a real etcd: objects without anything that acts on them. Where one of the two is missing, what needs them is skipped.

No controller and no kubelet runs, so a test writes the status of its pods and its EndpointSlices itself. The API server refuses loopback addresses in
EndpointSlices, so endpoints have addresses of 10.77.0.0/24: outside a network namespace nobody sends anything there, inside one (netns.py) they are those
of its `lo`, and the cluster that is started there runs there.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.kubernetes.access import Access
from extproc.kubernetes.api import Api
from extproc.kubernetes.failures import KubernetesFailed
from extproc.kubernetes.objects import ENDPOINT_SLICES, INFERENCE_POOLS, PODS, Kind, Object
from extproc.up.processes import free_ports

from .assets import asset
from .certificates import Authority, Pair
from .wait import PATIENCE_S

ADMIN = "admin-of-a-test"
NAMESPACES, SERVICE_ACCOUNTS = Kind("", "v1", "namespaces"), Kind("", "v1", "serviceaccounts")


class KubeApiServer:
    """One of those that share an etcd."""

    def __init__(self, program: str, directory: Path, etcd_url: str, authority: Authority, account: Pair) -> None:
        """`account` signs the tokens of service accounts; those that share an etcd share it, too."""
        self.port = free_ports(1)[0]
        self.url = f"https://127.0.0.1:{self.port}"
        self.ca_file = str(authority.ca_file)
        self._log = directory / f"kube-apiserver-{self.port}.log"
        tokens = directory / "tokens.csv"
        tokens.write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        own = authority.pair("kube-apiserver", "127.0.0.1")
        self._command = [program, "--etcd-servers", etcd_url, "--cert-dir", str(directory / "certs"), "--secure-port", str(self.port)]
        self._command += ["--bind-address", "127.0.0.1", "--advertise-address", "10.77.0.1", "--service-cluster-ip-range", "10.78.0.0/24"]
        self._command += ["--tls-cert-file", str(own.cert), "--tls-private-key-file", str(own.key), "--token-auth-file", str(tokens)]
        self._command += ["--authorization-mode", "RBAC", "--disable-admission-plugins", "ServiceAccount", "--service-account-issuer", "https://localhost"]
        self._command += ["--service-account-key-file", str(account.cert), "--service-account-signing-key-file", str(account.key)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        context = ssl.create_default_context(cafile=self.ca_file)
        request = urllib.request.Request(f"{self.url}/readyz", headers={"Authorization": f"Bearer {ADMIN}"})
        until = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, context=context, timeout=5):
                return
            has_ended = self._process.poll() is not None or time.monotonic() >= until
            assert not has_ended, self._log.read_text()[-2000:]
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # it takes a minute to end in order
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It hangs: its connections stay, and it says nothing, until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def access(self, token: str = ADMIN, namespace: str = "llm") -> Access:
        return Access(self.url, namespace, ca_file=self.ca_file, token=token)

    def kubeconfig(self, path: Path, token: str = ADMIN, url: str = "") -> str:
        """A file by which a process finds it, and is who the token says."""
        cluster = {"server": url or self.url, "certificate-authority": self.ca_file}
        context = {"cluster": "c", "user": "u", "namespace": "llm"}
        raw = {"clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": {"token": token}}]}
        path.write_text(yaml.dump({"current-context": "c", "contexts": [{"name": "c", "context": context}], **raw}))
        return str(path)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Cluster:
    """An etcd, its first API server, and who may do everything there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = Authority(directory)
        self._account = self._authority.pair("service-account")
        self._program = asset("kube-apiserver", directory)
        self._etcd_program = shutil.which("etcd")
        if self._etcd_program is None:
            pytest.skip("there is no etcd here (Debian: apt-get install etcd-server)")
        self._etcd_port, self._peer_port = free_ports(2)
        self.etcd_url = f"http://127.0.0.1:{self._etcd_port}"
        self._etcd: subprocess.Popen[bytes] | None = None
        self.server = self.another()

    def start(self) -> None:
        peer = f"http://127.0.0.1:{self._peer_port}"
        command = [str(self._etcd_program), "--data-dir", str(self._directory / "etcd"), "--listen-client-urls", self.etcd_url, "--advertise-client-urls"]
        command += [self.etcd_url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
        with (self._directory / "etcd.log").open("ab") as log:
            self._etcd = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()

    def another(self) -> KubeApiServer:
        """One more API server, which is not started."""
        return KubeApiServer(self._program, self._directory, self.etcd_url, self._authority, self._account)

    def compact(self) -> None:
        """Have etcd forget all history before now."""
        revision = self._etcd_call("kv/range", {"key": "AA=="})["header"]["revision"]
        self._etcd_call("kv/compaction", {"revision": revision, "physical": True})

    def _etcd_call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.etcd_url}/v3/{method}", data=json.dumps(body).encode(), timeout=5) as answer:
            result: dict[str, Any] = json.load(answer)
            return result


def crds(*projects: str) -> list[Path]:
    """The files of these projects, `envoy-gateway`, `gaie`, `gateway-api`, `istio`, as each ships its CRDs. Where they are missing, the test is skipped."""
    folder = os.environ.get("LORA_EXTPROC_CRDS", "")
    if not folder:
        pytest.skip("LORA_EXTPROC_CRDS names no folder with the CRDs of the gateways")
    files = [file for project in projects for file in sorted(Path(folder).glob(f"{project}-[0-9]*.yaml"))]
    if len(files) != len(projects):
        pytest.skip(f"in {folder}, which LORA_EXTPROC_CRDS names, there is not one file each for {', '.join(projects)}")
    return files


@contextlib.contextmanager
def running_cluster(directory: Path, crds: Sequence[Path] = ()) -> Iterator[Cluster]:
    """With an empty namespace `llm`, and the kinds of these files."""
    cluster = Cluster(directory)
    try:
        cluster.start()
        asyncio.run(_prepare(cluster.server, crds))
        yield cluster
    finally:
        cluster.stop()


async def _prepare(server: KubeApiServer, files: Sequence[Path]) -> None:
    async with Admin(server) as admin, asyncio.TaskGroup() as installing:
        for body in (body for file in files for body in yaml.load_all(file.read_text(), yaml.CSafeLoader) if body):
            installing.create_task(admin.install(body))


class Admin:
    """Writes objects, and what controllers and kubelets would write. `async with Admin(server) as admin`."""

    def __init__(self, server: KubeApiServer, namespace: str = "llm") -> None:
        self.server = server
        self.api = Api(server.access(), 30)
        self.namespace = namespace

    async def __aenter__(self) -> "Admin":
        await self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.api.__aexit__()

    async def apply(self, body: dict[str, Any], subresource: str = "") -> Object:
        """Any object of a manifest."""
        group, _, version = body["apiVersion"].rpartition("/")
        kind = Kind(group, version, _plural(body["kind"]))
        metadata = body["metadata"]
        return await self.api.apply(kind, metadata.get("namespace", ""), metadata["name"], body, "test", Object, subresource=subresource)

    async def install(self, body: dict[str, Any]) -> None:
        """An object that is there before tests begin; a CRD is waited for until the API server serves its kind."""
        await self.apply(body)
        if body["kind"] == "CustomResourceDefinition":
            spec = body["spec"]
            kind = Kind(spec["group"], next(one["name"] for one in spec["versions"] if one["served"]), spec["names"]["plural"])
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    with contextlib.suppress(KubernetesFailed):
                        await self.api.page(kind, "", {"limit": "1"}, Object)
                        return
                    await asyncio.sleep(0.1)

    async def pod(
        self, name: str, ip: str, *, is_ready: bool = True, labels: dict[str, str] | None = None, annotations: dict[str, str] | None = None
    ) -> Object:
        """Make a pod that runs, or change the status of one."""
        metadata = {"name": name, "namespace": self.namespace, "labels": labels or {"app": "vllm"}, "annotations": annotations or {}}
        spec = {"nodeName": "n1", "containers": [{"name": "vllm", "image": "vllm"}]}  # a pod that has no node is deleted at once
        await self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        ready = {"type": "Ready", "status": str(is_ready)}
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [ready]}
        metadata = {"name": name, "namespace": self.namespace}
        return await self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}, "status")

    async def terminate(self, name: str) -> None:
        """As `kubectl delete pod`: it stays until its kubelet has stopped it."""
        await self.api.delete(PODS, self.namespace, name)

    async def remove(self, name: str) -> None:
        """As the kubelet, when the pod has stopped."""
        await self.api._call("DELETE", PODS.path(self.namespace, name), {"gracePeriodSeconds": "0"})

    async def slice(self, name: str, service: str, endpoints: list[dict[str, Any]], ports: list[dict[str, Any]]) -> None:
        metadata = {"name": name, "namespace": self.namespace, "labels": {"kubernetes.io/service-name": service}}
        body = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4"}
        await self.apply({**body, "endpoints": endpoints, "ports": ports})

    async def pool(self, name: str, ports: list[int], **labels: str) -> None:
        spec = {"selector": {"matchLabels": labels or {"app": "vllm"}}, "targetPorts": [{"number": port} for port in ports]}
        picker = {"endpointPickerRef": {"name": "lora-extproc", "port": {"number": 9002}}}
        metadata = {"name": name, "namespace": self.namespace}
        await self.apply({"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": metadata, "spec": {**spec, **picker}})

    async def account(self, manifest: Path, name: str) -> str:
        """The token of the service account that a manifest makes with its rights, all under this name, so that several manifests can be told apart."""
        for body in yaml.safe_load_all(manifest.read_text().replace("lora-extproc", name)):
            await self.apply(body)
        return await self.token(name)

    async def token(self, account: str) -> str:
        """Of a service account, as the kubelet asks for it."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        token: str = json.loads(await self.api._call("POST", SERVICE_ACCOUNTS.path(self.namespace, account, "token"), body=body))["status"]["token"]
        return token

    async def clear(self) -> None:
        """Delete all that discovery looks at."""
        for kind in (PODS, ENDPOINT_SLICES, INFERENCE_POOLS):
            with contextlib.suppress(KubernetesFailed):
                await self.api._call("DELETE", kind.path(self.namespace), {"gracePeriodSeconds": "0"})


def _plural(kind: str) -> str:
    """As the API server's URLs spell a kind."""
    word = kind.lower()
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith("s") else "s")
