"""xDS as a client reads it with upstream's definitions: what it is sent when, what its answers change, and what it cannot do to others."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc.aio
import pytest
from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.service.discovery import v3 as discovery
from envoy_data_plane.google.rpc import Status

from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool, Snapshot
from extproc.core.standing import Standing
from extproc.metrics import RouterMetrics
from extproc.router.http2.calls import Message, joined
from extproc.router.transport import Listener
from extproc.router.xds import ELSEWHERE_S, MAX_HOLD_S, MAX_NAMES, MAX_REQUEST_BYTES, MAX_STREAMS, METHODS, TYPES, Kind, Xds
from tests.fakes.wait import Clock, turns

from .test_http2 import open_stream

ADS, CDS, EDS = METHODS
CLUSTER, ENDPOINTS = TYPES[Kind.CLUSTERS], TYPES[Kind.ENDPOINTS]
A, B, C = (f"10.0.0.{last}:8000" for last in (1, 2, 3))


def snapshot(*addresses: str, **pools: Sequence[str]) -> Snapshot:
    """Of the pool `models` with these endpoints, and of others by name."""
    everything = {"models": addresses, **pools}
    tables = {name: LookupTable([Endpoint(address) for address in members], 1009) for name, members in everything.items()}
    return Snapshot(tuple(Pool(name, frozenset(), ("*",), table) for name, table in tables.items()))


class Fleet:
    """What is served, and to whom."""

    def __init__(self, *addresses: str, **pools: Sequence[str]) -> None:
        self.metrics = RouterMetrics()
        self.clock = Clock()
        clusters = {name: bytes(cluster.Cluster(name=name)) for name in ("models", "other")}
        self.xds = Xds(clusters, self.metrics, self.clock)
        if addresses or pools:
            self.xds.update(snapshot(*addresses, **pools))

    async def becomes(self, *addresses: str, **pools: Sequence[str]) -> None:
        self.xds.update(snapshot(*addresses, **pools))
        await turns()

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"lora_extproc_xds_{name}", labels) or 0.0


class Client:
    """One stream: requests and responses in upstream's types."""

    def __init__(self, fleet: Fleet, method: str = ADS) -> None:
        self.responses: list[discovery.DiscoveryResponse] = []
        self.raw: list[Message] = []
        self.ended: tuple[int, str] | None = None
        self.call = fleet.xds.methods()[method](self)

    # -- the sender of its call

    def send(self, message: Message) -> None:
        assert self.ended is None
        self.raw.append(message)
        self.responses.append(discovery.DiscoveryResponse.parse(joined(message)))

    def finish(self, status: int = 0, text: str = "") -> None:
        self.ended = (status, text)

    # -- what it says

    def say(self, type_url: str, *names: str, nonce: str = "", version: str = "", error: str = "", node: str = "") -> None:
        detail = Status(code=13, message=error) if error else None
        who = core.Node(id=node, user_agent_name="envoy") if node else None
        request = discovery.DiscoveryRequest(
            version_info=version, node=who, resource_names=list(names), type_url=type_url, response_nonce=nonce, error_detail=detail
        )
        self.call.receive(bytes(request))

    def answer(self, *names: str, error: str = "") -> None:
        """To the last response."""
        last = self.responses[-1]
        self.say(last.type_url, *names, nonce=last.nonce, version="" if error else last.version_info, error=error)

    # -- what it was told

    def endpoints(self) -> dict[str, list[str]]:
        """By cluster, of the last response."""
        last = self.responses[-1]
        assert last.type_url == ENDPOINTS
        found: dict[str, list[str]] = {}
        for resource in last.resources:
            assert resource.type_url == ENDPOINTS
            assignment = endpoint.ClusterLoadAssignment.parse(resource.value)
            members = [member for locality in assignment.endpoints for member in locality.lb_endpoints]
            found[assignment.cluster_name] = []
            for member in members:
                assert member.endpoint is not None
                assert member.endpoint.address is not None
                socket = member.endpoint.address.socket_address
                assert socket is not None
                found[assignment.cluster_name].append(f"{socket.address}:{socket.port_value}")
        return found

    def clusters(self) -> list[str]:
        """Of the last response."""
        assert self.responses[-1].type_url == CLUSTER
        return [cluster.Cluster.parse(resource.value).name for resource in self.responses[-1].resources]


def follower(fleet: Fleet, *names: str, node: str = "one") -> Client:
    """A client that has acknowledged the pool's endpoints."""
    client = Client(fleet)
    client.say(ENDPOINTS, *(names or ("models",)), node=node)
    client.answer(*(names or ("models",)))
    return client


# -- what is sent


def test_an_envoy_is_told_clusters_and_then_their_endpoints() -> None:
    """On one stream, by ADS."""
    client = Client(Fleet(A, B, other=[C]))
    client.say(CLUSTER, node="one")
    assert client.clusters() == ["models", "other"]
    client.answer()
    client.say(ENDPOINTS, "models", "other")
    assert client.endpoints() == {"models": [A, B], "other": [C]}
    client.answer("models", "other")
    assert len(client.responses) == 2


@pytest.mark.parametrize(("method", "url"), [(CDS, CLUSTER), (EDS, ENDPOINTS)])
@pytest.mark.parametrize("names_it", [True, False])
def test_each_type_has_a_stream_of_its_own_too(method: str, url: str, names_it: bool) -> None:
    """ "type_url [...] is implicit in requests made via singleton xDS APIs"."""
    client = Client(Fleet(A), method)
    client.say(url if names_it else "", "models")
    assert client.responses[-1].type_url == url


async def test_a_change_is_sent_at_once() -> None:
    """Endpoints that came and went; the clusters are as they were."""
    fleet = Fleet(A, B)
    client = follower(fleet)
    await fleet.becomes(B, C)
    assert client.endpoints() == {"models": [B, C]}
    assert len(client.responses) == 2


async def test_standings_are_not_told() -> None:
    """What is leased at a draining or a down endpoint is still sent there, and standings are one router's observation."""
    fleet = Fleet(A, B)
    client = follower(fleet)
    fleet.xds.update(replace(snapshot(A, B), standings={A: (Standing.DOWN, "x"), B: (Standing.DRAINING, "x")}))
    await turns()
    assert len(client.responses) == 1


def test_replicas_that_know_the_same_fleet_say_the_same_version() -> None:
    """However they came to know it, and in whichever order."""
    one, other = Fleet(A), Fleet(B, A)
    one.xds.update(snapshot(A, B))
    assert {kind: world.version for kind, world in one.xds.worlds.items()} == {kind: world.version for kind, world in other.xds.worlds.items()}
    assert one.xds.worlds[Kind.ENDPOINTS].version != Fleet(A).xds.worlds[Kind.ENDPOINTS].version


async def test_a_pool_comes_and_goes() -> None:
    """Its cluster is named, or missing; then its endpoints are asked for."""
    fleet = Fleet(A)
    client = follower(fleet)
    client.say(CLUSTER)
    client.answer()
    await fleet.becomes(A, other=[B])
    assert client.clusters() == ["models", "other"]
    client.answer()
    client.say(ENDPOINTS, "models", "other", nonce=client.responses[0].nonce)
    assert client.endpoints() == {"models": [A], "other": [B]}
    client.answer("models", "other")
    await fleet.becomes(A)
    assert client.clusters() == ["models"]


async def test_a_pool_that_computes_prompts_is_not_told_and_not_waited_for() -> None:
    """No Envoy sends anything there, so none acknowledges it."""
    fleet = Fleet(A)
    client = follower(fleet, "models")
    decode, prefill = snapshot(A, other=[B]).pools
    fleet.xds.update(Snapshot((decode, replace(prefill, is_prefill=True))))
    await turns()
    assert client.endpoints() == {"models": [A]}
    assert fleet.xds.is_known(B)


def test_endpoints_are_sent_again_for_a_cluster_that_has_changed() -> None:
    """Envoy asks for them by a request no different from an acknowledgement, and does not use the cluster until they come."""
    client = follower(Fleet(A))
    endpoints = client.responses[-1].nonce
    client.say(CLUSTER)
    client.answer()
    client.say(ENDPOINTS, "models", nonce=endpoints)
    assert client.endpoints() == {"models": [A]}


async def test_an_endpoint_that_is_no_ip_address_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Envoy would reject the whole pool for it; it is named in the log once."""
    fleet = Fleet(A, "vllm-1:8000")
    assert follower(fleet).endpoints() == {"models": [A]}
    await fleet.becomes(A, B, "vllm-1:8000")
    assert caplog.text.count("vllm-1:8000") == 1


def test_addresses_of_version_6_are_without_brackets() -> None:
    """As Envoy reads them; it shows them with brackets, as the router names them."""
    client = Client(Fleet("[fd00::1]:8000"))
    client.say(ENDPOINTS, "models")
    assert client.endpoints() == {"models": ["fd00::1:8000"]}


async def test_nothing_is_said_before_the_fleet_is_known() -> None:
    """Envoy keeps what another router told it; a pool is spoken of once an endpoint of it was seen."""
    fleet = Fleet()
    client = Client(fleet)
    client.say(CLUSTER)
    client.say(ENDPOINTS, "models")
    assert client.responses == []
    await fleet.becomes()
    assert client.clusters() == ["models"]
    await fleet.becomes(A)
    assert client.endpoints() == {"models": [A]}


async def test_a_pool_that_has_become_empty_is_said_to_be() -> None:
    """Its endpoints are gone for good: the membership has waited with that."""
    fleet = Fleet(A)
    client = follower(fleet)
    await fleet.becomes()
    assert client.endpoints() == {"models": []}


# -- answers


async def test_a_rejected_update_is_logged_once_for_each_version(caplog: pytest.LogCaptureFixture) -> None:
    """With who rejects what, and why, however many Envoys do; it is not sent again, and the next version is."""
    fleet = Fleet(A)
    clients = [follower(fleet, node="one"), follower(fleet, node="two")]
    await fleet.becomes(A, B)
    for client in clients:
        client.answer("models", error="malformed" + "x" * 1000)
    rejected = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(rejected) == 1
    assert rejected[0].startswith("Envoy 'one' rejects endpoints of version ")
    assert len(rejected[0]) < 500
    assert (fleet.value("answers_total", type="endpoints", result="nack"), fleet.value("answers_total", type="endpoints", result="ack")) == (2, 2)
    assert [len(client.responses) for client in clients] == [2, 2]
    await fleet.becomes(A, B, C)
    assert clients[0].endpoints() == {"models": [A, B, C]}


async def test_a_client_that_does_not_answer_has_one_update_before_it() -> None:
    """Then it is sent the newest, whatever was between."""
    fleet = Fleet(A)
    client = Client(fleet)
    client.say(ENDPOINTS, "models")
    for address in (B, C, B):
        await fleet.becomes(A, address)
    assert len(client.responses) == 1
    client.answer("models")
    assert client.endpoints() == {"models": [A, B]}


async def test_all_streams_share_the_bytes_of_what_they_are_sent() -> None:
    """A thousand endpoints are encoded once."""
    fleet = Fleet(*(f"10.0.{n // 250}.{n % 250}:8000" for n in range(1000)))
    one, other = follower(fleet), follower(fleet)
    assert isinstance(one.raw[0], tuple)
    assert isinstance(other.raw[0], tuple)
    assert one.raw[0][1] is other.raw[0][1]


async def test_many_streams_are_told_in_turns() -> None:
    """So that an update of a large fleet does not hold up requests."""
    fleet = Fleet(A)
    clients = [follower(fleet) for _ in range(40)]
    fleet.xds.update(snapshot(A, B))
    await asyncio.sleep(0)
    assert 0 < sum(len(client.responses) == 2 for client in clients) < 40
    clients[-1].call.abandon()
    await turns()
    assert [len(client.responses) for client in clients] == [2] * 39 + [1]


# -- new endpoints


async def test_a_new_endpoint_is_known_once_every_envoy_has_acknowledged_it() -> None:
    """A request that names it earlier would find nothing."""
    fleet = Fleet(A)
    one, other = follower(fleet), follower(fleet)
    await fleet.becomes(A, B)
    assert (fleet.xds.is_known(A), fleet.xds.is_known(B)) == (True, False)
    one.answer("models")
    assert not fleet.xds.is_known(B)
    waiting = asyncio.create_task(fleet.xds.until_known([A, B]))
    await turns()
    assert not waiting.done()
    other.answer("models")
    await waiting
    assert fleet.xds.is_known(B)


async def test_an_envoy_that_goes_is_not_waited_for() -> None:
    """Its stream's end counts as its answer."""
    fleet = Fleet(A)
    one, other = follower(fleet), follower(fleet)
    await fleet.becomes(A, B)
    one.answer("models")
    other.call.abandon()
    assert fleet.xds.is_known(B)


async def test_an_envoy_that_follows_another_pool_is_not_waited_for() -> None:
    """It never hears of the endpoint."""
    fleet = Fleet(A, other=[C])
    one = follower(fleet)
    follower(fleet, "other")
    await fleet.becomes(A, B, other=[C])
    one.answer("models")
    assert fleet.xds.is_known(B)


async def test_an_envoy_that_hangs_does_not_hold_up_the_fleet(caplog: pytest.LogCaptureFixture) -> None:
    """A new endpoint is used after MAX_HOLD_S all the same, which is logged once until the Envoy answers."""
    fleet = Fleet(A)
    client = follower(fleet)
    await fleet.becomes(A, B, C)
    fleet.clock.now += MAX_HOLD_S - 0.1
    assert not fleet.xds.is_known(B)
    fleet.clock.now += 0.2
    assert fleet.xds.is_known(B)
    assert fleet.xds.is_known(C)
    assert caplog.text.count("'one' has not answered") == 1
    client.answer("models")
    assert fleet.xds.is_known(B)


async def test_without_an_envoy_here_one_elsewhere_is_given_time() -> None:
    """Envoy follows one replica, or one worker of it, and asks them all."""
    fleet = Fleet(A)
    await fleet.becomes(A, B)
    assert (fleet.xds.is_known(A), fleet.xds.is_known(B)) == (True, False)
    fleet.clock.now += ELSEWHERE_S
    await fleet.xds.until_known([A, B])
    assert fleet.xds.is_known(B)


async def test_an_endpoint_of_another_pool_now_is_new_there() -> None:
    """Its clusters are told apart by Envoy."""
    fleet = Fleet(A, other=[B])
    client = follower(fleet, "models", "other")
    await fleet.becomes(A, B, other=[])
    assert not fleet.xds.is_known(B)
    client.answer("models", "other")
    assert fleet.xds.is_known(B)


async def test_an_endpoint_that_has_gone_is_not_waited_for() -> None:
    """Nobody will acknowledge it."""
    fleet = Fleet(A)
    follower(fleet)
    await fleet.becomes(A, B)
    await fleet.becomes(A)
    await fleet.xds.until_known([B])


# -- what a client cannot do


def test_a_nonce_cannot_be_guessed() -> None:
    """A client that does not read could else ask for update after update, and fill the memory."""
    client = Client(Fleet(A))
    client.say(ENDPOINTS, "models")
    nonce = client.responses[-1].nonce
    for guess in ("", "1", "2", nonce[:-1], nonce + "0"):
        client.say(ENDPOINTS, "models", "other", nonce=guess)
    assert len(client.responses) == 1
    assert nonce != follower(Fleet(A)).responses[-1].nonce


@pytest.mark.parametrize("names", [[f"pool-{n}" for n in range(MAX_NAMES + 1)], ["x" * 70_000]])
def test_too_many_names_end_the_stream(names: list[str]) -> None:
    """They would be kept."""
    client = Client(Fleet(A))
    client.say(ENDPOINTS, *names)
    assert client.ended is not None
    assert client.ended[0] == 8
    assert "resource names" in client.ended[1]


def test_too_large_a_request_ends_the_stream() -> None:
    """Whole, or while it arrives."""
    whole, arriving = Client(Fleet(A)), Client(Fleet(A))
    whole.say(ENDPOINTS, "x" * MAX_REQUEST_BYTES)
    arriving.call.holds(MAX_REQUEST_BYTES)
    assert arriving.ended is None
    arriving.call.holds(MAX_REQUEST_BYTES + 1)
    for client in (whole, arriving):
        assert client.ended is not None
        assert client.ended[0] == 8


def test_too_many_streams_are_refused() -> None:
    """Until one of them ends."""
    fleet = Fleet(A)
    clients = [follower(fleet) for _ in range(MAX_STREAMS)]
    assert fleet.value("streams") == MAX_STREAMS
    late = Client(fleet)
    late.say(ENDPOINTS, "models")
    assert late.ended == (8, f"{MAX_STREAMS} xDS streams are open, the limit")
    clients[0].call.abandon()
    assert follower(fleet).responses
    assert fleet.value("streams") == MAX_STREAMS


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\x02\xff\xff"])
def test_garbage_ends_its_stream_only(garbage: bytes) -> None:
    """What is no message, or no text."""
    fleet = Fleet(A)
    other, client = follower(fleet), Client(fleet)
    client.call.receive(garbage)
    assert client.ended == (3, "not a DiscoveryRequest")
    assert other.ended is None


def test_a_type_that_is_not_served_is_not_answered() -> None:
    """As one of which nothing exists; the types that are served go on."""
    client = Client(Fleet(A))
    client.say("type.googleapis.com/envoy.config.listener.v3.Listener")
    client.say(ENDPOINTS, "models")
    assert client.endpoints() == {"models": [A]}


@pytest.mark.parametrize(("method", "url"), [(ADS, ""), (CDS, ENDPOINTS), (EDS, CLUSTER)])
def test_a_type_that_does_not_belong_on_the_stream_ends_it(method: str, url: str) -> None:
    """ADS has to be told one, the others have theirs."""
    client = Client(Fleet(A), method)
    client.say(url)
    assert client.ended is not None
    assert client.ended[0] == 3


def test_what_a_client_calls_itself_is_cut_and_quoted(caplog: pytest.LogCaptureFixture) -> None:
    """It stands in log lines."""
    caplog.set_level(logging.INFO)
    follower(Fleet(A), node="x\n" * 1000)
    [line] = [record.getMessage() for record in caplog.records if "has taken" in record.getMessage()]
    assert "\n" not in line
    assert len(line) < 600


# -- on the wire


@asynccontextmanager
async def serving(fleet: Fleet) -> AsyncIterator[Listener]:
    listener = Listener("127.0.0.1:0", fleet.xds.methods(), 100)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.stop(0)


async def test_a_real_client_follows_and_a_drain_ends_its_stream() -> None:
    """At once: an hour of draining is not waited for, and Envoy follows another replica."""
    fleet = Fleet(A)
    async with serving(fleet) as listener, grpc.aio.insecure_channel(listener.address) as channel:
        call = open_stream(channel, ADS)
        await call.write(bytes(discovery.DiscoveryRequest(type_url=ENDPOINTS, resource_names=["models"])))
        first = discovery.DiscoveryResponse.parse(await call.read())
        await call.write(bytes(discovery.DiscoveryRequest(type_url=ENDPOINTS, resource_names=["models"], response_nonce=first.nonce)))
        while not fleet.value("answers_total", type="endpoints", result="ack"):
            await asyncio.sleep(0)
        fleet.xds.update(snapshot(*(f"10.0.{n // 250}.{n % 250}:8000" for n in range(1000))))
        second = discovery.DiscoveryResponse.parse(await call.read())
        [locality] = endpoint.ClusterLoadAssignment.parse(second.resources[0].value).endpoints
        assert len(locality.lb_endpoints) == 1000
        fleet.xds.drain()
        stopping = asyncio.create_task(listener.stop(3600))
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        await stopping
    assert fleet.value("streams") == 0


async def test_a_stream_that_comes_while_draining_is_ended() -> None:
    """It would be the next to wait for."""
    fleet = Fleet(A)
    fleet.xds.drain()
    client = Client(fleet)
    client.say(ENDPOINTS, "models")
    assert client.ended == (14, "the router stops")


async def test_a_client_that_ends_its_side_is_ended() -> None:
    """And follows no more."""
    fleet = Fleet(A)
    client = follower(fleet)
    client.call.half_close()
    assert client.ended == (0, "")
    assert fleet.value("streams") == 0


async def test_without_an_envoy_here_one_elsewhere_is_given_the_time_between_two_looks() -> None:
    """The replica that it follows may have looked at the name just before the endpoint came."""
    fleet = Fleet(A)
    fleet.xds = Xds({}, fleet.metrics, fleet.clock, {"models": 30.0})
    fleet.xds.update(snapshot(A))
    await fleet.becomes(A, B)
    fleet.clock.now += 30.0
    assert not fleet.xds.is_known(B)
    fleet.clock.now += ELSEWHERE_S
    assert fleet.xds.is_known(B)
