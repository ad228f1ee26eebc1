"""xDS for plain Envoys: the pools as clusters, their endpoints as load assignments (CDS and EDS, state of the world, by ADS or each by itself).

`core/subscription.py` has the protocol; here are the streams, and the bytes that they share. What is said:
- Endpoints as the fleet has them, whatever their standing. Draining and even down ones are still sent what is leased there, and standings are one router's
  own observation: with them each replica would say another version. Envoy's health check sees for itself whom it reaches.
- A version is a hash of what it names, so that replicas that know the same fleet say the same, and Envoy may go on with any of them.
- Nothing before the first snapshot, and nothing of a pool of which no endpoint was seen yet: Envoy keeps what it has when a router starts anew.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from ..core.endpoint import Endpoint, is_ip
from ..core.placement import Pool, Snapshot
from ..core.subscription import Heard, Resource, State, Subscription, World
from ..metrics import RouterMetrics
from ..pb import xds_pb2 as pb
from .http2.calls import RESOURCE_EXHAUSTED, UNAVAILABLE, Call, Message, Methods, Sender, joined

log = logging.getLogger(__name__)

MAX_STREAMS = 256  # an Envoy has one with ADS
MAX_REQUEST_BYTES = 256 * 1024  # an Envoy's first, which names all its extensions, has 49 KB with 1.36.4 and 61 KB with 1.40.0
MAX_NAMES, MAX_NAMES_CHARS = 1000, 64 * 1024  # of one request: they are kept for as long as the stream lasts
MAX_SHOWN = 200  # characters of what a client says, in a log line
STREAMS_PER_TURN = 16  # that are sent an update before the loop gets its turn: 1,000 endpoints are 25 KB for each
# How long a new endpoint may be held back. Envoys that follow this router answer within milliseconds, or hang. Where none does, perhaps one follows another
# replica or worker, which learns of the endpoint when it looks at its source the next time, and so much later.
MAX_HOLD_S, ELSEWHERE_S = 5.0, 1.0
TAKEN_OVER_S = 0.1  # an Envoy acknowledges before its worker threads have taken over what they are handed: milliseconds, and more where cores are busy
LOOK_AGAIN_S = 0.01  # at what is known, after something was said: at most so often, however much clients say
_INVALID_ARGUMENT = 3


class Kind(Enum):
    """The types that are served, as logs and metrics call them; in the order in which they are sent: a cluster before its endpoints."""

    __hash__ = object.__hash__

    CLUSTERS = "clusters"
    ENDPOINTS = "endpoints"


TYPES = {
    Kind.CLUSTERS: "type.googleapis.com/envoy.config.cluster.v3.Cluster",
    Kind.ENDPOINTS: "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
}
_KINDS = {url: kind for kind, url in TYPES.items()}
METHODS = {
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources": None,  # all types on one stream
    "/envoy.service.cluster.v3.ClusterDiscoveryService/StreamClusters": Kind.CLUSTERS,
    "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints": Kind.ENDPOINTS,
}


@dataclass(frozen=True, slots=True)
class _New:
    """An endpoint that Envoys may not know yet."""

    pool: str
    since: float


class Xds:
    """The fleet as Envoys are told it. `clusters`: the encoded Cluster of each pool by the pool's name; a pool without one is named to those only that ask for
    its endpoints. `looks_every_s`: how often each pool's sources are looked at; of one that is not named, they tell."""

    def __init__(
        self,
        clusters: Mapping[str, bytes],
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
        looks_every_s: Mapping[str, float] | None = None,
    ) -> None:
        self.worlds: dict[Kind, World] = {}  # none before the first snapshot
        self.metrics = metrics
        self._clusters = {name: _resource(Kind.CLUSTERS, name, encoded) for name, encoded in clusters.items()}
        self._clock = clock
        self._looks_every_s = looks_every_s or {}
        self._pools: tuple[Pool, ...] | None = None  # of the last snapshot
        self._seen: dict[str, tuple[Endpoint, ...]] = {}  # by pool, those of the last snapshot
        self._encoded: dict[str, bytes] = {}  # by address, the same
        self._new: dict[str, _New] = {}  # by address; endpoints of the fleet that some Envoy has not acknowledged yet
        self._known: dict[str, frozenset[str] | None] = {}  # by pool; worked out when asked for, and forgotten when a client says something
        self._streams: dict[_Stream, None] = {}  # in the order in which they came
        self._untold: list[_Stream] = []
        self._telling: asyncio.Handle | None = None
        self._answered = asyncio.Event()  # replaced each time
        self._rejected: dict[Kind, str] = {}  # the version whose rejection was logged last
        self.is_draining = False

    def methods(self) -> Methods:
        """For a transport's table."""
        return {path: partial(_Stream, self, only=kind) for path, kind in METHODS.items()}

    def update(self, snapshot: Snapshot) -> None:
        """Tell everybody what is new in `snapshot`, which is nothing where its pools are those of the one before."""
        if snapshot.pools is self._pools:
            return
        self._pools = snapshot.pools
        served = [pool for pool in snapshot.pools if not pool.is_prefill]  # sidecars connect to the others, and Envoy does not
        worlds = {Kind.CLUSTERS: self._clusters_of(served), Kind.ENDPOINTS: self._endpoints_of(served)}
        changed = [kind for kind, world in worlds.items() if kind not in self.worlds or self.worlds[kind].version != world.version]
        self.worlds = worlds
        for kind in changed:
            log.info("%s are of version %s now; %d streams follow", kind.value, worlds[kind].version, len(self._streams))
        if changed and self._streams:
            self._untold = list(self._streams)
            if self._telling is None:
                self._telling = asyncio.get_running_loop().call_soon(self._tell)

    def is_known(self, address: str) -> bool:
        """Whether a request may be sent to a new endpoint: every Envoy that follows this router has acknowledged it, or that was waited for long enough."""
        new = self._new.get(address)
        if new is None:
            return True
        known = self._known_of(new.pool)
        if known is None or address not in known:
            if self._clock() - new.since < self._limit_s(new):
                return False
            for stream in self._streams:
                stream.complain_if_silent()
        del self._new[address]
        return True

    async def until_known(self, addresses: Iterable[str]) -> None:
        """Wait until `is_known` holds for all of them, MAX_HOLD_S at most after they came, and a moment longer where it did not hold before."""
        waited = False
        while new := [address for address in addresses if not self.is_known(address)]:
            waited = True
            soonest = min(self._new[address].since + self._limit_s(self._new[address]) for address in new)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, soonest - self._clock())):
                    await self._answered.wait()
                    await asyncio.sleep(LOOK_AGAIN_S)
        if waited:
            await asyncio.sleep(TAKEN_OVER_S)

    def drain(self) -> None:
        """End all streams, and those that come: Envoys go to another replica, and keep what they have until then."""
        self.is_draining = True
        for stream in tuple(self._streams):
            stream.drain()

    # -- what there is to say

    def _clusters_of(self, pools: Sequence[Pool]) -> World:
        return _world(self._clusters[pool.name] for pool in pools if pool.name in self._clusters)

    def _endpoints_of(self, pools: Sequence[Pool]) -> World:
        before = self.worlds.get(Kind.ENDPOINTS)
        said = {} if before is None else before.resources
        seen, self._seen = self._seen, {pool.name: pool.table.endpoints for pool in pools}
        encoded, self._encoded = self._encoded, {}
        resources: list[Resource] = []
        for pool in pools:
            endpoints: dict[str, bytes] = {}
            for address in (endpoint.address for endpoint in pool.table.endpoints):
                if address in encoded:
                    endpoints[address] = encoded[address]
                else:
                    endpoints[address] = _endpoint(address)
                    if not endpoints[address]:
                        log.warning("endpoint %s of pool %s is not told to Envoys, which know endpoints by IP address", address, pool.name)
            self._encoded |= endpoints
            if pool.name in said and pool.table.endpoints == seen[pool.name]:
                resources.append(said[pool.name])
            elif pool.name in said or pool.table.endpoints:
                resources.append(_assignment(pool.name, endpoints))
        if before is not None and resources == list(said.values()):
            return before
        self._hold_back(resources, said.values() if before is not None else resources)
        return _world(resources)

    def _hold_back(self, resources: Iterable[Resource], before: Iterable[Resource]) -> None:
        """Those of `resources` that were not in those of `before` are new. What a router finds when it starts is not: nobody would wait for anything else."""
        now, since = {resource.name: resource.members for resource in resources}, self._clock()
        known = {resource.name: resource.members for resource in before}
        self._new = {address: new for address, new in self._new.items() if address in now.get(new.pool, ())}
        for pool, members in now.items():
            self._new |= {address: _New(pool, since) for address in members - known.get(pool, frozenset())}

    # -- who follows

    def admit(self, stream: "_Stream") -> bool:
        """Whether there is room for one more."""
        if len(self._streams) >= MAX_STREAMS:
            return False
        self._streams[stream] = None
        self.metrics.xds_streams.set(len(self._streams))
        return True

    def forget(self, stream: "_Stream") -> None:
        """It has ended."""
        if self._streams.pop(stream, stream) is None:
            self.metrics.xds_streams.set(len(self._streams))
            self.answered()

    def answered(self) -> None:
        """What clients know, or which of them there are, has changed."""
        self._known.clear()
        answered, self._answered = self._answered, asyncio.Event()
        answered.set()

    def rejected(self, kind: Kind, version: str, who: str, why: str) -> None:
        """A client does not take that version. All Envoys of a release reject the same: there is one line for each version."""
        if self._rejected.get(kind) != version:
            self._rejected[kind] = version
            log.warning("%s rejects %s of version %s and keeps those it has: %s", who, kind.value, version, why)

    def _known_of(self, pool: str) -> frozenset[str] | None:
        """What every stream that asks for the pool's endpoints has acknowledged; None if no stream asks."""
        if pool not in self._known:
            accepted = [stream.accepted(pool) for stream in self._streams if stream.follows(pool)]
            distinct = {id(members): members for members in accepted}.values()  # mostly one: streams share what they are sent
            self._known[pool] = frozenset.intersection(*distinct) if accepted else None
        return self._known[pool]

    def _limit_s(self, new: _New) -> float:
        """How long it may be held back."""
        return ELSEWHERE_S + self._looks_every_s.get(new.pool, 0.0) if self._known_of(new.pool) is None else MAX_HOLD_S

    def _tell(self) -> None:
        self._telling = None
        now, self._untold = self._untold[:STREAMS_PER_TURN], self._untold[STREAMS_PER_TURN:]
        for stream in now:
            if stream in self._streams:
                stream.tell()
        if self._untold:
            self._telling = asyncio.get_running_loop().call_soon(self._tell)


class _Stream(Call):
    """One stream of one client. `only`: the type that its method is for; None: all."""

    def __init__(self, xds: Xds, sender: Sender, *, only: Kind | None) -> None:
        self._xds = xds
        self._sender = sender
        self._only = only
        self._who = ""  # the client, once it has said so
        self._is_late = False  # and that was logged
        self._versions: dict[Kind, str] = {}  # that it was sent last
        self._subscriptions = {kind: Subscription(is_complete=kind is Kind.CLUSTERS) for kind in Kind}

    def follows(self, pool: str) -> bool:
        """Whether it asks for that pool's endpoints."""
        return self._subscriptions[Kind.ENDPOINTS].asks_for(pool)

    def accepted(self, pool: str) -> frozenset[str]:
        """The endpoints of that pool that its client has acknowledged."""
        resource = self._subscriptions[Kind.ENDPOINTS].accepted.get(pool)
        return frozenset() if resource is None else resource.members

    # -- the transport's side

    def receive(self, message: Message) -> None:
        raw = joined(message)
        if len(raw) > MAX_REQUEST_BYTES:
            self._refuse(RESOURCE_EXHAUSTED, f"a request of {len(raw)} bytes; the limit is {MAX_REQUEST_BYTES}")
            return
        try:
            request = pb.DiscoveryRequest.FromString(raw)
        except DecodeError:
            self._refuse(_INVALID_ARGUMENT, "not a DiscoveryRequest")
            return
        if not self._who:
            if self._xds.is_draining:
                self.drain()
                return
            if not self._xds.admit(self):
                self._refuse(RESOURCE_EXHAUSTED, f"{MAX_STREAMS} xDS streams are open, the limit")
                return
            self._who = f"Envoy {request.node.id[:MAX_SHOWN]!r}"  # "Only the first request on a stream is guaranteed to carry the node identifier"
        self._take(request)

    def _take(self, request: pb.DiscoveryRequest) -> None:
        url = request.type_url or ("" if self._only is None else TYPES[self._only])  # "implicit in requests made via singleton xDS APIs"
        if not url or (self._only is not None and url != TYPES[self._only]):
            self._refuse(_INVALID_ARGUMENT, "the type_url is missing" if not url else "the type_url is not that of the method")
            return
        if len(request.resource_names) > MAX_NAMES or sum(map(len, request.resource_names)) > MAX_NAMES_CHARS:
            self._refuse(
                RESOURCE_EXHAUSTED, f"{len(request.resource_names)} resource names; the limits are {MAX_NAMES} and {MAX_NAMES_CHARS} characters together"
            )
            return
        kind = _KINDS.get(url)
        if kind is None:  # as good as one of which nothing exists, which a client gives up after its initial_fetch_timeout
            log.debug("%s asks for %r, which is not served", self._who, url[:MAX_SHOWN])
            return
        subscription = self._subscriptions[kind]
        names = subscription.names
        heard = subscription.request(request.response_nonce, request.resource_names, is_rejected=request.HasField("error_detail"))
        if heard in (Heard.ACK, Heard.NACK):
            self._is_late = False
            self._xds.metrics.xds_answers.labels(kind.value, heard.value).inc()
        if heard is Heard.ACK:
            log.info("%s has taken %s of version %s", self._who, kind.value, self._versions[kind])
        elif heard is Heard.NACK:
            self._xds.rejected(kind, self._versions[kind], self._who, repr(request.error_detail.message[:MAX_SHOWN]))
        if kind is Kind.ENDPOINTS and (heard is Heard.ACK or subscription.names != names):
            self._xds.answered()
        self.tell()

    def holds(self, size: int) -> None:
        if size > MAX_REQUEST_BYTES:
            self._refuse(RESOURCE_EXHAUSTED, f"a request of over {MAX_REQUEST_BYTES} bytes, the limit")

    def half_close(self) -> None:
        self._xds.forget(self)
        self._sender.finish()

    def drain(self) -> None:
        self._refuse(UNAVAILABLE, "the router stops")

    def abandon(self) -> None:
        self._xds.forget(self)

    def _refuse(self, status: int, why: str) -> None:
        self._xds.forget(self)
        self._sender.finish(status, why)

    # -- what it is sent

    def tell(self) -> None:
        """Send what is due."""
        for kind, world in self._xds.worlds.items():
            subscription = self._subscriptions[kind]
            resources = subscription.due(world)
            if resources is None:
                continue
            nonce = secrets.token_hex(8)
            head = pb.DiscoveryResponse(version_info=world.version, type_url=TYPES[kind], nonce=nonce).SerializeToString()
            # "parsing the concatenation of two encoded messages is the same as parsing them and merging": resources are encoded once for all streams
            self._sender.send((head, *(resource.entry for resource in resources)))
            subscription.sent(nonce, resources)
            self._versions[kind] = world.version
            self._xds.metrics.xds_responses.labels(kind.value).inc()
            if kind is Kind.CLUSTERS:
                self._subscriptions[Kind.ENDPOINTS].answer_next_request()

    def complain_if_silent(self) -> None:
        """Log, once until it answers, that its client does not."""
        if not self._is_late and self._subscriptions[Kind.ENDPOINTS].state is State.WAITING:
            self._is_late = True
            log.warning("%s has not answered an update of endpoints for %g s; new endpoints are used all the same", self._who, MAX_HOLD_S)


def _world(resources: Iterable[Resource]) -> World:
    by_name = {resource.name: resource for resource in resources}
    digest = hashlib.sha256()
    for name in sorted(by_name):
        digest.update(by_name[name].entry)  # which states its own length
    return World(digest.hexdigest()[:16], by_name)


def _resource(kind: Kind, name: str, encoded: bytes, members: frozenset[str] = frozenset()) -> Resource:
    return Resource(name, pb.DiscoveryResponse(resources=[Any(type_url=TYPES[kind], value=encoded)]).SerializeToString(), members)


def _endpoint(address: str) -> bytes:
    """One endpoint as a locality has it; nothing for one that is no IP address, for which Envoy would reject its whole pool."""
    host, _, port = address.rpartition(":")
    if not is_ip(host):
        return b""
    locality = pb.LocalityLbEndpoints()
    socket = locality.lb_endpoints.add().endpoint.address.socket_address
    socket.address, socket.port_value = host.strip("[]"), int(port)
    return locality.SerializeToString()


def _assignment(pool: str, endpoints: Mapping[str, bytes]) -> Resource:
    """A pool's endpoints, as encoded by address."""
    members = {address: endpoints[address] for address in sorted(endpoints) if endpoints[address]}
    locality = pb.LocalityLbEndpoints.FromString(b"".join(members.values()))  # merged, as the resources of a response are
    assignment = pb.ClusterLoadAssignment(cluster_name=pool, endpoints=[locality])
    return _resource(Kind.ENDPOINTS, pool, assignment.SerializeToString(), frozenset(members))
