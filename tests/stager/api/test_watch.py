"""The Watch stream over a real gRPC server: broken, resumed, too slow; and a router that never believes in what is gone."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from extproc.client import (
    SERVICE,
    Evicted,
    NodeState,
    Published,
    Space,
    StagerClient,
    WatchEvent,
)
from extproc.config.credentials import RpcSettings
from extproc.config.settings import Settings
from extproc.config.stager import EngineSettings, StagerSettings
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.popularity import Popularity
from extproc.core.prefix import Prefixes
from extproc.errors import (
    StagerUnavailable,
)
from extproc.metrics import RouterMetrics
from extproc.pb import stager_pb2 as pb
from extproc.router.membership import Membership
from extproc.router.models import Models
from extproc.router.moving import Moves
from extproc.router.residency import Residency
from extproc.stager.api.watch import watch_events
from extproc.stager.books import changes as changes_module
from extproc.stager.server import Server
from extproc.up.processes import free_ports
from tests.fakes.adapters import size_of, small_files
from tests.fakes.origin import FakeOrigin
from tests.fakes.relay import Relay
from tests.fakes.wait import PATIENCE_S, until
from tests.router.fakes import ScriptedProbe

from ..conftest import ServeNode, labels_of, next_of, until_node_state

SIZE = size_of(small_files())


async def test_a_watch_that_broke_is_told_first_what_it_missed(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """In order, each once, and before the state that makes the node count as ready again."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    node = await serve_node()
    local = node.ask()
    await local.ensure("acme/a")
    async with Relay(node.port) as relay:
        client = node.ask(address=relay.address)
        watching = client.watch()
        assert await until_node_state(watching) == [NodeState(True, "", node.stager.instance, resumed=False)]
        await local.ensure("acme/b")
        assert await next_of(watching, Published) == Published("acme/b")
        relay.cut()
        with pytest.raises(StagerUnavailable):
            await next_of(watching, Published)
        await local.purge("acme/a")
        await local.purge("acme/b")
        await local.ensure("acme/a")
        relay.mend()
        seen = await until_node_state(client.watch())
        assert seen == [Evicted("acme/a"), Evicted("acme/b"), Published("acme/a"), NodeState(True, "", node.stager.instance, resumed=True)]
        assert await until_node_state(client.watch()) == [NodeState(True, "", node.stager.instance, resumed=True)]
        await client.close()


async def test_a_watch_that_breaks_while_it_is_told_what_it_missed_goes_on_there(serve_node: ServeNode) -> None:
    """What was told is not told again, what was not is not lost."""
    node = await serve_node()
    client = node.ask()
    await until_node_state(client.watch())
    for number in range(3):
        node.stager.node.changes.tell("evicted", f"acme/{number}")
    watching = client.watch()
    assert [await next_of(watching, Evicted) for _ in range(2)] == [Evicted("acme/0"), Evicted("acme/1")]
    del watching
    assert await until_node_state(client.watch()) == [Evicted("acme/2"), NodeState(True, "", node.stager.instance, resumed=True)]


async def test_who_missed_too_much_must_start_anew(serve_node: ServeNode) -> None:
    """Nothing of it is told: what would be left out is what counts."""
    node = await serve_node()
    client = node.ask()
    await until_node_state(client.watch())
    for number in range(changes_module.KEPT + 1):
        node.stager.node.changes.tell("evicted", f"acme/{number}")
    assert await until_node_state(client.watch()) == [NodeState(True, "", node.stager.instance, resumed=False)]


@pytest.mark.parametrize(("instance", "after"), [("", 0), ("", 1), ("another", 0), ("another", 10**6), ("the same", 10**6), ("the same", 2**64 - 1)])
async def test_a_position_that_is_not_known_is_not_gone_on_from(serve_node: ServeNode, instance: str, after: int) -> None:
    """Of no instance, of another, or of a future that this one never had."""
    node = await serve_node()
    node.stager.node.changes.tell("evicted", "acme/a")
    request = pb.WatchRequest(instance=node.stager.instance if instance == "the same" else instance, after=after)
    async with grpc.aio.insecure_channel(node.address) as channel:
        watch = channel.unary_stream(f"/{SERVICE}/Watch", pb.WatchRequest.SerializeToString, pb.WatchEvent.FromString)
        first = await anext(aiter(watch(request)))
        assert first.node.instance == node.stager.instance
        assert not first.node.resumed


async def test_another_instance_behind_the_same_address_is_noticed(serve_node: ServeNode, tmp_path: Path) -> None:
    """Restarted, it counts its changes from the beginning: a number that exists in both means nothing."""
    first, second = await serve_node(), await serve_node(dir=str(tmp_path / "second"))
    for node in (first, second):
        for number in range(10):
            node.stager.node.changes.tell("evicted", f"acme/{number}")
    async with Relay(first.port) as relay:
        client = first.ask(address=relay.address)
        await until_node_state(client.watch())
        relay.cut()
        relay.port = second.port
        relay.mend()
        watching = client.watch()
        seen: list[WatchEvent] = []
        while not seen:
            try:
                seen = await until_node_state(watching)
            except StagerUnavailable:  # the channel has not noticed the cut, or waits before it tries again
                watching = client.watch()
        assert seen == [NodeState(True, "", second.stager.instance, resumed=False)]
        await client.close()


async def test_a_watcher_that_does_not_read_is_cut_off_and_comes_back(serve_node: ServeNode) -> None:
    """Its events would fill the memory. Its stream ends, and it learns that it knows nothing any more."""
    node = await serve_node()
    client = node.ask()
    watching = client.watch()
    await until_node_state(watching)
    for number in range(20 * changes_module.KEPT):
        node.stager.node.changes.tell("evicted", f"acme/{number}")
    assert len(node.stager.node.changes._watchers) == 0
    seen = [event async for event in watching]  # what was on its way; the end comes without an error
    assert len(seen) < changes_module.KEPT
    assert await until_node_state(client.watch()) == [NodeState(True, "", node.stager.instance, resumed=False)]


async def test_a_watcher_that_is_cut_off_while_it_is_told_what_it_missed_ends(serve_node: ServeNode) -> None:
    """Its queue is filled by nobody any more: it would wait at it for ever, and be believed to know everything."""
    stager = (await serve_node()).stager
    stager.node.changes.tell("evicted", "acme/a")
    events = watch_events(stager, stager.instance, stager.node.changes.last - 1)
    assert (await anext(events)).evicted == "acme/a"
    stager.node.changes.tell("evicted", "acme/b")
    assert (await anext(events)).evicted == "acme/b"
    for number in range(3 * changes_module.KEPT):
        stager.node.changes.tell("evicted", f"acme/{number}")
    assert [event async for event in events] == []


@pytest.mark.parametrize("kind", ["load", "loaded"])
async def test_what_a_watcher_does_not_want_takes_no_heartbeat_from_it(serve_node: ServeNode, kind: str) -> None:
    """However often others are told of it: a stager that says nothing for two heartbeats is taken for hung."""
    node = await serve_node()
    changes = node.stager.node.changes
    events = watch_events(node.stager, heartbeat_s=0.1)
    assert (await anext(events)).HasField("node")
    beat = asyncio.create_task(anext(events))
    async with asyncio.timeout(PATIENCE_S):
        while not beat.done():
            if kind == "load":
                changes.mention(kind)
            else:
                changes.tell(kind, "acme/a")
            await asyncio.sleep(0.01)
    assert beat.result().HasField("heartbeat")
    await events.aclose()


async def test_watchers_hear_of_the_budget(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Within a second of a change."""
    origin.add("acme/a", small_files())
    client = (await serve_node(max_bytes=10**9)).ask()
    await client.ensure("acme/a")
    assert await next_of(client.watch(), Space) == Space(SIZE, 0, 10**9)


async def test_watchers_hear_that_the_stager_is_stopping(tmp_path: Path) -> None:
    """Before their streams end: the node's keys move while it can still answer."""
    (port,) = free_ports(1)
    stager = StagerSettings(listen=f"127.0.0.1:{port}", http_listen="", dir=str(tmp_path / "node"), engine=EngineSettings(url=""), drain_s=0)
    server = Server(Settings(stager=stager))
    await server.start()
    async with StagerClient(f"127.0.0.1:{port}") as client:
        watching = client.watch()
        assert (await until_node_state(watching))[-1] == NodeState(True, "", server.stager.instance)
        stopping = asyncio.create_task(server.stop())
        last = (await until_node_state(watching))[-1]
        assert last == NodeState(False, "the stager is stopping", server.stager.instance, resumed=True, draining=True)
    await stopping


# -- what a router makes of it


def _never(address: str) -> StagerClient:
    raise AssertionError(f"{address} is connected to")


@dataclass
class Router:
    """What of a router listens to one node, through something that breaks."""

    residency: Residency
    membership: Membership
    endpoint: Endpoint
    client: StagerClient

    @property
    def is_ready(self) -> bool:
        return not self.membership.snapshot.standings

    def would_use(self, adapter: str) -> bool:
        """Whether a request would be sent to the node without asking it."""
        return self.is_ready and self.residency.lease(self.endpoint, adapter) is not None

    @classmethod
    def of(cls, address: str) -> "Router":
        client = StagerClient(address, RpcSettings(), "router")
        endpoint = Endpoint("127.0.0.1:9", "node-1", address)
        metrics = RouterMetrics()
        clients = {address: client}
        residency, popularity = Residency(clients, metrics), Popularity()
        pools = [Pool("models", frozenset(), ("*",), LookupTable([endpoint], 251))]
        models = Models(pools, clients, shows_paths=False)
        moves = Moves(residency, popularity, join_s=60, leave_s=60)
        probe = ScriptedProbe()  # its engine lives
        membership = Membership(pools, residency, models, metrics, probe, moves, popularity, Prefixes(0), clients=clients, connect=_never, heartbeat_s=0.5)
        membership.start()
        return cls(residency, membership, endpoint, client)

    async def until_it_listens(self) -> None:
        """What it was promised before it heard of the node counts for nothing."""
        await until(lambda: self.client._position[0])

    async def stop(self) -> None:
        await self.membership.stop()
        await self.residency.close()
        await self.client.close()


async def test_a_lease_that_ended_behind_a_broken_stream_is_never_used(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Evicted while the router could not hear it: at no moment is the node ready and the lease believed. What stayed is believed again unasked."""
    for seed, name in enumerate(("acme/gone", "acme/kept")):
        origin.add(name, small_files(seed=seed))
    node = await serve_node()
    local = node.ask()
    async with Relay(node.port) as relay:
        router = Router.of(relay.address)
        await router.until_it_listens()
        for name in ("acme/gone", "acme/kept"):
            await router.residency.ensure(router.endpoint, name)
        assert router.would_use("acme/gone")
        relay.cut()
        await until(lambda: not router.is_ready)
        assert await local.purge("acme/gone") == SIZE
        relay.mend()

        def is_back() -> bool:
            assert not router.would_use("acme/gone")
            return router.is_ready

        await until(is_back)
        asked = labels_of(node.stager, "lora_extproc_ensures_total")
        assert router.would_use("acme/kept")
        assert labels_of(node.stager, "lora_extproc_ensures_total") == asked
        assert (await router.residency.ensure(router.endpoint, "acme/gone")).staged
        await router.stop()


async def test_a_restarted_stager_s_leases_are_never_used(serve_node: ServeNode, origin: FakeOrigin, tmp_path: Path) -> None:
    """It remembers none, and may have evicted what they were for."""
    origin.add("acme/a", small_files())
    first, second = await serve_node(), await serve_node(dir=str(tmp_path / "second"))
    async with Relay(first.port) as relay:
        router = Router.of(relay.address)
        await router.until_it_listens()
        await router.residency.ensure(router.endpoint, "acme/a")
        assert router.would_use("acme/a")
        relay.cut()
        await until(lambda: not router.is_ready)
        relay.port = second.port
        relay.mend()

        def is_back() -> bool:
            assert not router.would_use("acme/a")
            return router.is_ready

        await until(is_back)
        await router.stop()


async def test_an_eviction_is_heard_while_the_stream_holds(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """The lease ends with it, not with its time; the node stays in the walk."""
    origin.add("acme/a", small_files())
    node = await serve_node()
    router = Router.of(node.address)
    await router.until_it_listens()
    await router.residency.ensure(router.endpoint, "acme/a")
    await node.ask().purge("acme/a")
    await until(lambda: not router.would_use("acme/a"))
    assert router.is_ready
    await router.stop()
