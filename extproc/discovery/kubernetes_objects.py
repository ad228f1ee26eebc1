"""What pods, EndpointSlices and InferencePools say of endpoints. Pure.

| an object | is shown | is leaving |
| --- | --- | --- |
| a pod | it is Running, has an IP address and is Ready | it has a deletionTimestamp |
| an endpoint of a slice | it is ready; or it terminates and is serving | it terminates |

So a pod that terminates is leaving for as long as it answers, and then gone; one that is not ready yet is not there yet. An endpoint is its address and the
pod's UID: a pod that takes over an address has nothing of what the last one had. Its node is the pod.

Each port of a pod is an engine: a data-parallel rank, which knows only the adapters that were loaded into itself. So each has a stager of its own, with a
directory of its own: that of the first port listens on the stager's port, that of the next on the next, 9102, 9103 and so on.
`appProtocol` is not read: it tells the gateway how to talk to a pod. The zone of a pod is its label, which Kubernetes copies from its node since 1.35.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from ..core.endpoint import Endpoint
from ..core.fleet import Found
from ..kubernetes.objects import Object
from .entries import BadEntry, canonical

ZONE = "topology.kubernetes.io/zone"  # a label of a pod
STAGER_PORT = "lora-extproc/stager-port"  # an annotation of a pod: the port of its first stager; 0: nothing is staged there
# annotations by which a pod names those of the pool's targetPorts where it serves; llm-d's, and the Inference Extension's own, which llm-d reads too
ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")

Entry = tuple[str, Found | BadEntry]  # the words by which a complaint names it, and what it says


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""


class _PodStatus(msgspec.Struct):
    phase: str = ""
    ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_Condition] = []


class Pod(Object):
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


class _PoolSelector(msgspec.Struct, rename="camel"):
    match_labels: dict[str, str] = {}


class _TargetPort(msgspec.Struct):
    number: int


class _PoolSpec(msgspec.Struct, rename="camel"):
    selector: _PoolSelector = msgspec.field(default_factory=_PoolSelector)
    target_ports: list[_TargetPort] = []


class InferencePool(Object):
    spec: _PoolSpec = msgspec.field(default_factory=_PoolSpec)

    @property
    def selector(self) -> str:
        """As a list of pods takes it."""
        return ",".join(f"{label}={value}" for label, value in sorted(self.spec.selector.match_labels.items()))

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(port.number for port in self.spec.target_ports)


class _Conditions(msgspec.Struct):
    """One that is absent is unknown, which "should be interpreted as" ready, as serving where it is ready, and as not terminating."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Target(msgspec.Struct):
    name: str = ""
    uid: str = ""


class _SliceEndpoint(msgspec.Struct, rename="camel"):
    addresses: list[str]
    conditions: _Conditions = msgspec.field(default_factory=_Conditions)
    zone: str | None = None
    target_ref: _Target | None = None


class _SlicePort(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class EndpointSlice(Object):
    address_type: str = ""
    endpoints: list[_SliceEndpoint] | None = None
    ports: list[_SlicePort] | None = None


@dataclass(frozen=True, slots=True)
class PodReader:
    """Reads pods whose model servers have these ports."""

    ports: tuple[int, ...]
    stager_port: int

    def read(self, pod: Pod) -> tuple[Entry, ...]:
        """Its endpoints; none while it is not ready."""
        status = pod.status
        if status.phase != "Running" or not status.ip or not any(one.type == "Ready" and one.status == "True" for one in status.conditions):
            return ()
        where = f"pod {pod.key}"
        annotations = pod.metadata.annotations
        try:
            stager_port = _port(STAGER_PORT, annotations.get(STAGER_PORT, self.stager_port), lowest=0)
            active = self._active(annotations)
        except BadEntry as error:
            return ((where, error),)
        owner = _Target(pod.metadata.name, pod.metadata.uid)
        is_leaving = bool(pod.metadata.deletion_timestamp)
        zone = pod.metadata.labels.get(ZONE, "")
        ports = [(rank, port) for rank, port in enumerate(self.ports) if port in active]
        return tuple((where, _found(status.ip, port, owner, _next(stager_port, rank), zone, is_leaving=is_leaving)) for rank, port in ports)

    def _active(self, annotations: Mapping[str, str]) -> frozenset[int]:
        name = next((name for name in ACTIVE_PORTS if name in annotations), None)
        if name is None:
            return frozenset(self.ports)
        return frozenset(_port(name, value.strip(), lowest=1) for value in annotations[name].split(",") if value.strip())


@dataclass(frozen=True, slots=True)
class SliceReader:
    """Reads EndpointSlices, of which these ports lead to model servers; the only one where no name is given."""

    port_names: tuple[str, ...]
    stager_port: int

    def read(self, slice_: EndpointSlice) -> tuple[Entry, ...]:
        """The endpoints that are ready, or leaving."""
        where = f"EndpointSlice {slice_.key}"
        try:
            ports = self._ports(slice_)
        except BadEntry as error:
            return ((where, error),)
        return tuple(entry for one in slice_.endpoints or () for entry in self._endpoints(where, one, ports))

    def _ports(self, slice_: EndpointSlice) -> dict[int, int]:
        """By rank."""
        if slice_.address_type not in ("IPv4", "IPv6"):
            raise BadEntry(f"has addresses of type {slice_.address_type}; a source of type dns resolves names")
        ports = {port.name or "": port.port for port in slice_.ports or () if port.port is not None}
        if self.port_names:
            return {rank: ports[name] for rank, name in enumerate(self.port_names) if name in ports}
        if len(ports) > 1:
            raise BadEntry(f"has the ports {', '.join(ports)}; port_names says which of them lead to model servers")
        return dict(enumerate(ports.values()))

    def _endpoints(self, where: str, one: _SliceEndpoint, ports: dict[int, int]) -> Iterator[Entry]:
        conditions = one.conditions
        is_ready = conditions.ready is not False
        if not one.addresses or not (is_ready or (conditions.terminating and conditions.serving)):
            return
        target = one.target_ref or _Target()
        host = one.addresses[0]  # "clients must not assume" that others are the same endpoint; only the first is ever set
        for rank, port in ports.items():
            yield where, _found(host, port, target, _next(self.stager_port, rank), one.zone or "", is_leaving=bool(conditions.terminating))


def of_pods(pods: Iterable[tuple[Pod, tuple[Entry, ...]]]) -> list[Entry]:
    """All entries. Of pods with one address the one at the end counts: one that is not leaving, and of several the one that was made last."""
    in_order = sorted(pods, key=lambda pair: (not pair[0].metadata.deletion_timestamp, pair[0].metadata.creation_timestamp, pair[0].key))
    return [entry for _, entries in in_order for entry in entries]


def of_slices(slices: Iterable[tuple[EndpointSlice, tuple[Entry, ...]]]) -> list[Entry]:
    """All entries. Of a Service with two families the IPv4 slices count, as both list the same pods; an endpoint that is being moved from slice to slice
    stands in both, and the one that is not leaving counts."""
    in_order = sorted(((one, entries) for one, entries in slices if entries), key=lambda pair: pair[0].key)
    if any(one.address_type == "IPv4" for one, _ in in_order):
        in_order = [pair for pair in in_order if pair[0].address_type != "IPv6"]
    return sorted((entry for _, entries in in_order for entry in entries), key=lambda entry: isinstance(entry[1], Found) and not entry[1].is_leaving)


def _found(host: str, port: int, pod: _Target, stager_port: int, zone: str, *, is_leaving: bool) -> Found | BadEntry:
    """The endpoint of one rank."""
    if stager_port > 65535:
        return BadEntry(f"has no stager for port {port}: each port has one, on the port after the last one's, and there is no {stager_port}")
    try:
        stager = _joined(host, stager_port) if stager_port else ""
        return Found(Endpoint(canonical(_joined(host, port)), pod.name, stager, pod.uid, zone), is_leaving)
    except BadEntry as error:
        return error


def _next(stager_port: int, rank: int) -> int:
    """Of the stager of this rank; 0 where there are none."""
    return stager_port + rank if stager_port else 0


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(annotation: str, value: str | int, *, lowest: int) -> int:
    """Raises BadEntry."""
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and lowest <= int(text) <= 65535):
        raise BadEntry(f"has the annotation {annotation} with {text[:80]!a}, which is no port from {lowest} to 65535")
    return int(text)
