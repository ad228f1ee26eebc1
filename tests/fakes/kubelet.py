"""What a kubelet and a container engine do with one pod, so that a manifest runs as it is shipped, without either.

| taken from the manifest | done with |
| --- | --- |
| init containers, sidecars, containers, and their order at the start and at the end | processes |
| users, groups, capabilities, `readOnlyRootFilesystem` | setpriv; this machine's file system with a layer above it, as the container's root |
| `emptyDir` and ConfigMaps, under the paths of their mounts | directories, bound there |
| probes and `preStop` | HTTP, gRPC, and commands inside the container |

The end of a pod, as kuberuntime_container.go has it: the `preStop` of every container begins at once; a container gets SIGTERM after its own and, if it is a sidecar, when what
started after it has ended; SIGKILL when the pod's grace is over.

Images are not there: of ours there is this Python, where the image has it, and of Envoy's its program. Resources do not count. All pods are in the network
namespace that the caller is in (netns.py). Linux, as root.
"""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import extproc
from extproc.up.stack import envoy_binary

from .wait import PATIENCE_S

ENVIRONMENT = "/opt/lora-extproc"  # where our image has it
SOURCE = "/opt/source"  # this package, which the image has in its environment
ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"  # /var/run is a link to /run, which the shell that mounts would follow out of the root
POLL_S = 0.1
_ROOT = """
set -e
layer=$1 read_only=$2; shift 2
mount -t tmpfs tmpfs "$layer"
mkdir "$layer/upper" "$layer/work" "$layer/root"
root=$layer/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do  # a directory that all may pass through, or a source, a target and the options of its mount
  if [ "$1" = pass ]; then chmod a+x "$root$2"; shift 2; continue; fi
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root$(dirname "$2")"; : >> "$root$2"; fi
  mount --bind "$1" "$root$2"
  mount -o "remount,bind,$3" "$root$2"
  shift 3
done
shift
[ "$read_only" = True ] && mount -o remount,ro "$root"
exec /usr/sbin/chroot "$root" "$@"
"""
_GRPC_PROBE = """
import sys, grpc
from grpc_health.v1 import health_pb2
with grpc.insecure_channel(sys.argv[1]) as channel:
    check = channel.unary_unary("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString)
    sys.exit(check(health_pb2.HealthCheckRequest(service=sys.argv[2]), timeout=float(sys.argv[3])).status != health_pb2.HealthCheckResponse.SERVING)
"""


def skip_unless_able(directory: Path) -> None:
    """Skip the test where no container's root can be made below `directory`."""
    for program in ("unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here, which containers are made with (Debian: apt-get install util-linux)")
    command = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", _ROOT, "sh", str(directory), "True", "--", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no container's root can be made here, which root may where the kernel has overlayfs: {tried.stderr.strip()}")


@dataclass(frozen=True)
class Account:
    """The service account of a pod, and the API server that it is of."""

    token: str
    ca_file: str
    host: str
    port: int


class _Container:
    """One that was started, or will be."""

    def __init__(self, spec: Mapping[str, Any], command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.log = log
        self._command, self._environment = command, environment
        self._outer: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._outer = subprocess.Popen(self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """Of its first process, as this machine counts; 0: it has ended."""
        assert self._outer is not None
        try:
            children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        except OSError:
            return 0
        return int(children[0]) if children else 0

    def is_over(self) -> bool:
        return self._outer is None or self._outer.poll() is not None

    def wait(self, timeout_s: float) -> int:
        assert self._outer is not None
        return self._outer.wait(timeout_s)

    def end(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pid := self.pid:
                os.kill(pid, number)

    def drop(self) -> None:
        """At the end of a test, whatever it does. The kernel ends what else is in the container."""
        if self._outer is not None:
            self.end(signal.SIGKILL)
            self._outer.wait()


class RunningPod:
    """A pod by its template's `spec`. `start` returns when it is ready, `terminate` when it has ended."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        config_maps: Mapping[str, Mapping[str, str]],
        work: Path,
        address: str,
        *,
        hosts: Mapping[str, str] | None = None,
        account: Account | None = None,
    ) -> None:
        """`config_maps` by name, each by file; `hosts` are the names that it can resolve. With an `account` it finds the API server as in a cluster."""
        self._spec, self._work, self._address = spec, work, address
        self._context: Mapping[str, Any] = spec.get("securityContext", {})
        work.mkdir()
        (work / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in (hosts or {}).items()))
        self._volumes = {volume["name"]: self._volume(volume, config_maps) for volume in spec.get("volumes", ())}
        self._account = account
        self._initial = [self._container(one) for one in spec.get("initContainers", ())]
        self._main = [self._container(one) for one in spec["containers"]]
        self.events: list[str] = []  # of its end, as they came

    @property
    def _containers(self) -> list[_Container]:
        return [*self._initial, *self._main]

    def _volume(self, volume: Mapping[str, Any], config_maps: Mapping[str, Mapping[str, str]]) -> Path:
        directory: Path = self._work / "volumes" / volume["name"]
        directory.mkdir(parents=True)
        if "configMap" in volume:
            for name, text in config_maps[volume["configMap"]["name"]].items():
                (directory / name).write_text(text)
        else:
            assert "emptyDir" in volume, volume
            os.chown(directory, 0, self._context.get("fsGroup", 0))
            directory.chmod(0o2777)  # "emptyDir" of the kubelet: 0777, and setgid where there is a fsGroup
        return directory

    def _container(self, spec: Mapping[str, Any]) -> _Container:
        name = spec["name"]
        mounts: list[str] = []
        for mount in spec.get("volumeMounts", ()):
            mounts += [str(self._volumes[mount["name"]]), mount["mountPath"], "ro" if mount.get("readOnly") else "rw"]
        mounts += [str(self._work / "hosts"), "/etc/hosts", "ro"]
        environment = {"PATH": f"{ENVIRONMENT}/bin:/usr/local/bin:/usr/bin:/bin"}
        for variable in spec.get("env", ()):
            if "value" in variable:
                environment[variable["name"]] = variable["value"]
            else:
                assert variable["valueFrom"]["secretKeyRef"]["optional"], variable  # there are no Secrets here
        if self._account is not None:
            mounts += [str(self._secret(self._account)), ACCOUNT, "ro"]
            environment |= {"KUBERNETES_SERVICE_HOST": self._account.host, "KUBERNETES_SERVICE_PORT": str(self._account.port)}
        image = spec["image"].partition(":")[0]
        if image == "envoyproxy/envoy":
            entrypoint, mounts = ["envoy"], [str(envoy_binary()), "/usr/local/bin/envoy", "ro", *mounts]
        else:
            assert image == "lora-extproc", image
            entrypoint = ["python", "-m", "extproc"]
            mounts = [sys.prefix, ENVIRONMENT, "ro", str(Path(extproc.__file__).parent), f"{SOURCE}/extproc", "ro", *mounts]
            environment |= {"HOME": "/tmp", "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
            for directory in reversed(Path(sys.base_prefix).parents):  # root's own may be closed to others
                mounts += ["pass", str(directory)]
        layer = self._work / "layers" / name
        layer.mkdir(parents=True)
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ROOT, "sh"]
        command += [str(layer), str(spec["securityContext"].get("readOnlyRootFilesystem", False)), *mounts, "--", *self._as_its_user(spec)]
        return _Container(spec, [*command, *(spec.get("command") or entrypoint), *spec.get("args", ())], environment, self._work / f"{name}.log")

    def _secret(self, account: Account) -> Path:
        """What the kubelet mounts of a service account."""
        directory = self._work / "account"
        directory.mkdir(exist_ok=True)
        (directory / "token").write_text(account.token)
        (directory / "namespace").write_text("llm")
        shutil.copy(account.ca_file, directory / "ca.crt")
        return directory

    def _as_its_user(self, spec: Mapping[str, Any]) -> list[str]:
        context = {**self._context, **spec["securityContext"]}
        assert context["capabilities"] == {"drop": ["ALL"]}
        groups = ["--groups", str(context["fsGroup"])] if "fsGroup" in context else ["--clear-groups"]
        user = ["--reuid", str(context["runAsUser"]), "--regid", str(context.get("runAsGroup", 0)), *groups]
        return ["setpriv", *user, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--pdeathsig", "KILL"]

    # -- start

    def start(self) -> None:
        for one in self._initial:
            one.start()
            if one.spec.get("restartPolicy") == "Always":
                self._until(one, "startupProbe")
            elif one.wait(PATIENCE_S):
                raise AssertionError(f"{one.name}: {one.log.read_text()[-1000:]}")
        for one in self._main:
            one.start()
        for one in self._main:
            self._until(one, "startupProbe")
            self._until(one, "readinessProbe")

    def _until(self, container: _Container, kind: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not self._asks(container, kind):
            assert not container.is_over(), f"{container.name} has ended: {container.log.read_text()[-1000:]}"
            assert time.monotonic() < until, f"the {kind} of {container.name} fails: {container.log.read_text()[-1000:]}"
            time.sleep(POLL_S)

    def probe(self, name: str, kind: str) -> bool:
        """What `readinessProbe` and the like of that container say."""
        [container] = [one for one in self._containers if one.name == name]
        return self._asks(container, kind)

    def _asks(self, container: _Container, kind: str) -> bool:
        probe = container.spec[kind]
        timeout_s = probe.get("timeoutSeconds", 1)
        ports = {port["name"]: port["containerPort"] for port in container.spec["ports"]}
        if "httpGet" in probe:
            connection = http.client.HTTPConnection(self._address, ports[probe["httpGet"]["port"]], timeout=timeout_s)
            try:
                connection.request("GET", probe["httpGet"]["path"])
                return 200 <= connection.getresponse().status < 400
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()
        if "grpc" in probe:
            asked = [f"{self._address}:{probe['grpc']['port']}", probe["grpc"]["service"], str(timeout_s)]
            return subprocess.run([sys.executable, "-c", _GRPC_PROBE, *asked], capture_output=True, check=False).returncode == 0
        return self._run(container, probe["exec"]["command"]) == 0

    def run(self, name: str, command: Sequence[str]) -> int:
        """A further command in one of its containers; its exit code."""
        [container] = [one for one in self._containers if one.name == name]
        return self._run(container, command)

    def _run(self, container: _Container, command: Sequence[str]) -> int:
        if not (pid := container.pid):
            return 1
        inside = ["nsenter", f"--target={pid}", "--mount", "--pid", "--root", "--wd=/", *self._as_its_user(container.spec), *command]
        return subprocess.run(inside, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False).returncode

    # -- the end

    def terminate(self) -> None:
        """As `kubectl delete pod` has it done. `events` are told as they come."""
        grace_s = self._spec.get("terminationGracePeriodSeconds", 30)
        until = time.monotonic() + min(grace_s, PATIENCE_S)
        over = {one.name: threading.Event() for one in self._containers}
        sidecars = [one.name for one in self._initial if one.spec.get("restartPolicy") == "Always"]
        waits_for: dict[str, list[str]] = {one.name: [] for one in self._main}
        for n, name in enumerate(sidecars):
            waits_for[name] = [*(one.name for one in self._main), *sidecars[n + 1 :]]

        def end(container: _Container) -> None:
            if hook := container.spec.get("lifecycle", {}).get("preStop"):
                code = self._run(container, hook["exec"]["command"])
                self.events.append(f"{container.name}: preStop ended with {code}")
            for other in waits_for[container.name]:
                over[other].wait(max(0.0, until - time.monotonic()))
            if not container.is_over():
                self.events.append(f"{container.name}: SIGTERM")
                container.end(signal.SIGTERM)
            try:
                container.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.events.append(f"{container.name}: SIGKILL")
                container.end(signal.SIGKILL)
            self.events.append(f"{container.name}: over")
            over[container.name].set()

        ending = [one for one in self._containers if one.name in waits_for]
        with ThreadPoolExecutor(len(ending)) as pool:
            list(pool.map(end, ending))

    def drop(self) -> None:
        for one in self._containers:
            one.drop()

    def said(self, name: str) -> str:
        """A container's log."""
        return (self._work / f"{name}.log").read_text(errors="replace")


@contextlib.contextmanager
def pods(*running: RunningPod) -> Iterator[None]:
    """Start them in this order; at the end none is left."""
    try:
        for pod in running:
            pod.start()
        yield
    finally:
        for pod in running:
            pod.drop()
