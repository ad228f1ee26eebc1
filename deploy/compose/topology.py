"""The services of a compose file as processes of this machine, without a container engine: each in network and mount namespaces of its own.

What is taken from the file: profiles, commands and entrypoints, environment, volumes (a named one is a directory), addresses and names on the network,
shared networks (`network_mode: service:`), health checks, and what waits for what. What is not: images (their programs are those of this machine, see
ENTRYPOINTS), users, capabilities, read-only root file systems, restarts and resources. Mounts must lie below /srv, since nothing else is hidden.

Linux only; no root is needed where the system lets users have namespaces of their own.
"""

import ipaddress
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

START_S = 120.0  # of one service, on a busy machine
STOP_S = 10.0
POLL_S = 0.1
FIRST_FREE = 100  # the host number from which services without an address of their own are counted
ENTRYPOINTS = {"lora-extproc": ["lora-extproc"], "envoyproxy/envoy": ["envoy"], "rclone/rclone": ["rclone"]}  # by image, as the image has it
KEPT_ENVIRONMENT = ("HOME", "PYTHONPATH", "TMPDIR", "LANG")  # of this machine's, for services; the rest is what the file gives them
ISOLATED = "LORA_EXTPROC_ISOLATED"  # in the environment of what runs in namespaces of its own
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_MOUNTS = """
mount -t tmpfs tmpfs /srv
while [ "$1" != -- ]; do  # pairs of a source and a target, then the command
  if [ -d "$1" ]; then mkdir -p "$2"; else mkdir -p "$(dirname "$2")"; : > "$2"; fi
  mount --bind "$1" "$2"
  shift 2
done
shift
exec "$@"
"""


class TopologyError(Exception):
    """The topology cannot be started, or a service of it does not become healthy."""


class Topology:
    """`start` the services of some profiles, `run` a command in one, `stop` all. To be used inside `isolated()` alone."""

    def __init__(self, file: Path, work: Path, programs: Path) -> None:
        self._file = file
        self._work = work
        self._programs = programs
        document = yaml.safe_load(_interpolated(file.read_text(), os.environ))
        self.services: dict[str, dict[str, Any]] = document["services"]
        self._volumes = set(document.get("volumes", {}))
        self._subnet = ipaddress.ip_network(document["networks"]["default"]["ipam"]["config"][0]["subnet"])
        self._holders: dict[str, subprocess.Popen[bytes]] = {}  # what keeps a network namespace, by the service that it is of
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._addresses = self._allot()
        (work / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self._addresses.items()))

    def _allot(self) -> Mapping[str, str]:
        """The address of each service that has a network of its own: the stated one, or the next that is free."""
        own = [name for name, service in self.services.items() if "network_mode" not in service]
        free = (str(address) for number, address in enumerate(self._subnet.hosts(), start=1) if number >= FIRST_FREE)
        return {name: self.services[name].get("networks", {}).get("default", {}).get("ipv4_address") or next(free) for name in own}

    # -- start and stop

    def start(self, profiles: Sequence[str]) -> None:
        """What belongs to no profile or to one of these, in the order of what waits for what, until all are healthy."""
        if not self._holders:
            self._bridge()
        wanted = [name for name, service in self.services.items() if not service.get("profiles") or set(service["profiles"]) & set(profiles)]
        for name in wanted:
            self._start(name)
        for name in wanted:
            self._until_healthy(name)

    def _start(self, name: str) -> None:
        if name in self._running:
            return
        service = self.services[name]
        if shared := _shared_with(service):
            self._start(shared)
        for other, condition in _waits_for(service).items():
            self._start(other)
            if condition == "service_healthy":
                self._until_healthy(other)
        log = (self._work / f"{name}.log").open("ab")
        self._running[name] = subprocess.Popen(self._command(name, _arguments(service)), stdout=log, stderr=log, env=self._environment(service))

    def complete(self, name: str) -> str:
        """Run a service to its end; what it said. Raises TopologyError where it fails."""
        service = self.services[name]
        done = subprocess.run(self._command(name, _arguments(service)), capture_output=True, text=True, env=self._environment(service), check=False)
        if done.returncode:
            raise TopologyError(f"{name} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
        return done.stdout

    def run(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A further command in a running service, with that service's environment."""
        inside = ["nsenter", f"--net=/proc/{self._running[name].pid}/ns/net", f"--mount=/proc/{self._running[name].pid}/ns/mnt", *command]
        return subprocess.run(inside, capture_output=True, text=True, env=self._environment(self.services[name]), timeout=START_S, check=False)

    def publishing(self, port: int) -> str:
        """The service whose `ports` have that port of the machine."""
        for name, service in self.services.items():
            if f"{port}:{port}" in service.get("ports", ()):
                return name
        raise TopologyError(f"no service publishes port {port} under the same number")

    def stop(self) -> None:
        """End every service; what is on their volumes stays until the work directory goes."""
        children = [*reversed(self._running.values()), *self._holders.values()]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + STOP_S
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._running.clear()
        self._holders.clear()

    def _until_healthy(self, name: str) -> None:
        service, deadline = self.services[name], time.monotonic() + START_S
        test = service.get("healthcheck", {}).get("test", ["NONE"])
        while test[0] != "NONE":
            if self._running[name].poll() is not None:
                raise TopologyError(f"{name} ended with code {self._running[name].returncode}: {self.last_words(name)}")
            if self.run(name, test[1:]).returncode == 0:
                return
            if time.monotonic() > deadline:
                raise TopologyError(f"{name} is not healthy after {START_S:g} s: {self.last_words(name)}")
            time.sleep(POLL_S)

    def last_words(self, name: str) -> str:
        """The end of a service's log."""
        return (self._work / f"{name}.log").read_text(errors="replace").strip()[-300:]

    # -- what a container engine does

    def _bridge(self) -> None:
        gateway = next(self._subnet.hosts())
        _ip("link set lo up")
        _ip("link add compose type bridge")
        _ip(f"addr add {gateway}/{self._subnet.prefixlen} dev compose")
        _ip("link set compose up")
        subprocess.run(["mount", "--bind", str(self._work / "hosts"), "/etc/hosts"], check=True)
        for number, (name, address) in enumerate(self._addresses.items()):
            holder = self._holders[name] = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
            mine = Path("/proc/self/ns/net").readlink()
            while Path(f"/proc/{holder.pid}/ns/net").readlink() == mine:  # it is about to leave ours
                time.sleep(POLL_S / 10)
            _ip(f"link add veth{number} master compose type veth peer name eth0 netns {holder.pid}")
            _ip(f"link set veth{number} up")
            inside = f"nsenter --net=/proc/{holder.pid}/ns/net"
            for what in ("link set lo up", f"addr add {address}/{self._subnet.prefixlen} dev eth0", "link set eth0 up"):
                _ip(what, inside)

    def _command(self, name: str, arguments: Sequence[str]) -> Sequence[str]:
        service = self.services[name]
        holder = self._holders[_shared_with(service) or name]
        mounts = [part for volume in service.get("volumes", ()) for part in self._mount(volume)]
        return ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "unshare", "--mount", "sh", "-ec", _MOUNTS, "sh", *mounts, "--", *arguments]

    def _mount(self, volume: str) -> tuple[str, str]:
        source, target = volume.split(":")[:2]
        if not target.startswith("/srv/"):
            raise TopologyError(f"{volume}: only what is mounted below /srv can be mounted here")
        if source in self._volumes:
            where = self._work / "volumes" / source
            where.mkdir(parents=True, exist_ok=True)
            return str(where), target
        return str((self._file.parent / source).resolve()), target

    def _environment(self, service: Mapping[str, Any]) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name in KEPT_ENVIRONMENT}
        environment["PATH"] = f"{self._programs}:{os.environ['PATH']}"
        environment.update(service.get("environment", {}))
        return environment


def isolated(arguments: Sequence[str]) -> None:
    """Go on in namespaces of our own, from which nothing survives: this script is started anew there, with the same arguments.

    Raises TopologyError where the system gives its users none.
    """
    if ISOLATED in os.environ:
        return
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise TopologyError(f"this system gives its users no namespaces of their own: {tried.stderr.strip()}")
    os.execvpe(command[0], [*command, sys.executable, *arguments], os.environ | {ISOLATED: "1"})


def programs(directory: Path, found: Mapping[str, str]) -> Path:
    """A directory for the PATH with the programs that images bring, as `name: command`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, command in found.items():
        script = directory / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    return directory


def _interpolated(text: str, environment: Mapping[str, str]) -> str:
    """Compose's `${NAME:-default}`."""
    return _VARIABLE.sub(lambda found: environment.get(found[1]) or found[2] or "", text)


def _arguments(service: Mapping[str, Any]) -> list[str]:
    entrypoint = service.get("entrypoint")
    if entrypoint is None:
        image = service["image"].rpartition(":")[0]
        if image not in ENTRYPOINTS:
            raise TopologyError(f"image {service['image']}: this machine has no such program; it is known to have {', '.join(ENTRYPOINTS)}")
        entrypoint = ENTRYPOINTS[image]
    return [*entrypoint, *service.get("command", ())]


def _shared_with(service: Mapping[str, Any]) -> str:
    """The service whose network this one uses; "": its own."""
    return str(service.get("network_mode", "")).removeprefix("service:")


def _waits_for(service: Mapping[str, Any]) -> Mapping[str, str]:
    return {name: wait["condition"] for name, wait in service.get("depends_on", {}).items()}


def _ip(what: str, inside: str = "") -> None:
    subprocess.run(shlex.split(f"{inside} ip {what}"), check=True)
