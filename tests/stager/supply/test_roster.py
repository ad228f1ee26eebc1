"""Who the other stagers are: which of those that the settings and their sources name are asked, and whole stagers that find each other."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from extproc.client import StagerClient
from extproc.config.discovery import DiscoverySettings
from extproc.config.read import parse
from extproc.config.settings import build_pools
from extproc.config.stager import PeerSettings
from extproc.core.fleet import Found
from extproc.discovery.discovery import Discovery
from extproc.metrics import StagerMetrics
from extproc.stager.server import Server
from extproc.stager.supply.peers import Peers
from extproc.stager.supply.places import Places
from extproc.stager.supply.roster import Roster, leads_here, own_pools
from extproc.up.demo import BASE_MODEL
from extproc.up.processes import free_ports
from tests.discovery.scripted import ScriptedSource, found
from tests.fakes.adapters import CONFIG, WEIGHTS, small_files
from tests.fakes.faulty import FaultyServer, running
from tests.fakes.nodes import visible
from tests.fakes.wait import turns, until

NAME = "acme/sql"
FILES = small_files()
LISTEN = "127.0.0.1:9102"


def at(host: str) -> Found:
    """A node, whose stager and engine have the same address."""
    return found(f"{host}:8000", stager=f"{host}:9102")


def known(peers: Peers) -> list[str]:
    return list(peers._peers)


def places_of(peers: Peers) -> Places | None:
    return peers._places


async def until_known(peers: Peers, *hosts: str) -> None:
    await until(lambda: known(peers) == [f"{host}:9102" for host in hosts])


@contextlib.asynccontextmanager
async def roster(sources: Mapping[str, Sequence[ScriptedSource]], listen: str = LISTEN, **discovery: Any) -> AsyncIterator[Peers]:
    """Of a stager whose pools have these sources. What is awaited in it is on time: nothing here waits for a source."""
    settings = parse({"pools": [{"name": pool} for pool in sources], "stager": {"listen": listen}}, source="test")
    peers, metrics = Peers(PeerSettings(), StagerClient, "me"), StagerMetrics()
    kept = Roster(settings, peers, metrics.discovery)
    times = {"debounce_s": 0, "debounce_max_s": 0, "first_wait_s": 0.5, **discovery}
    kept._discovery = Discovery(sources, DiscoverySettings(**times), metrics.discovery)
    await kept.open()
    try:
        yield peers
    finally:
        await kept.close()
        await peers.close()


# -- which of them


def test_those_of_the_own_pools_are_asked() -> None:
    """Of all pools, where none holds an address of its own."""
    first, second, third = pools = [[at("a"), at("b"), found("e:8000")], [at("c"), at("a")], [at("d")]]
    endpoints = [[one.endpoint for one in pool] for pool in pools]
    for own, expected in (
        ({"b:9102"}, [first]),
        ({"a:9102"}, [first, second]),
        (set[str](), [first, second, third]),
        ({"d:9102"}, [third]),
        ({"a:9102", "d:9102"}, [first, second, third]),
    ):
        assert own_pools(endpoints, own) == [[one.endpoint for one in pool] for pool in expected], own


@pytest.mark.parametrize(
    ("address", "listen", "leads"),
    [
        ("10.0.0.7:9102", "10.0.0.7:9102", True),
        ("10.0.0.8:9102", "10.0.0.7:9102", False),
        ("10.0.0.7:9103", "10.0.0.7:9102", False),
        ("[::ffff:10.0.0.7]:9102", "10.0.0.7:09102", True),
        ("[2001:db8:0::7]:9102", "[2001:DB8::7]:9102", True),
        ("node-1:9102", "Node-1:9102", True),
        ("node-2:9102", "node-1:9102", False),
        ("127.0.0.1:9102", "0.0.0.0:9102", True),
        ("[::1]:9102", "[::]:9102", True),
        ("127.0.0.1:9103", "0.0.0.0:9102", False),
        ("198.51.100.7:9102", "0.0.0.0:9102", False),
        ("[2001:db8::7]:9102", "[::]:9102", False),
        (f"{socket.gethostname()}:9102", "0.0.0.0:9102", True),
        ("some-other-host:9102", "0.0.0.0:9102", False),
        ("127.0.0.2:9102", "127.0.0.1:9102", False),
    ],
)
def test_an_address_leads_here_in_whatever_spelling(address: str, listen: str, leads: bool) -> None:
    """Where the stager listens on every address, any of this machine's is its own. No packet is sent."""
    assert leads_here(address, listen) is leads


def test_an_address_of_an_interface_leads_here() -> None:
    """As a pod's IP does, which no setting names."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.250", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        own = probe.getsockname()[0]
    assert leads_here(f"{own}:9102", "0.0.0.0:9102")


async def test_named_addresses_are_followed_alone() -> None:
    """No source is, and none is with peers off."""
    pools = [{"name": "p", "discovery": [{"type": "file", "path": "/nowhere"}], "endpoints": [{"address": "10.0.0.1:8000", "stager": "10.0.0.1:9102"}]}]
    for given, expected in (({"addresses": ["10.0.0.9:9102", LISTEN]}, ["10.0.0.9:9102"]), ({"mode": "off"}, [])):
        settings = parse({"pools": pools, "stager": {"peers": given, "listen": LISTEN}}, source="test")
        peers = Peers(settings.stager.peers, StagerClient, "me")
        kept = Roster(settings, peers, StagerMetrics().discovery)
        await kept.open()
        assert kept._discovery is None
        assert known(peers) == expected
        await kept.close()


# -- what is found


async def test_peers_follow_what_is_found() -> None:
    """They come and go; the own address is none of them, and one that leaves is one until it is gone."""
    source = ScriptedSource()
    source.show(at("127.0.0.1"), at("127.0.0.2"))
    async with roster({"p": [source]}) as peers:
        await until_known(peers, "127.0.0.2")
        source.show(at("127.0.0.1"), found("127.0.0.2:8000", stager="127.0.0.2:9102", leaving=True), at("127.0.0.3"), "127.0.0.4:8000")
        await until_known(peers, "127.0.0.2", "127.0.0.3")
        source.show(at("127.0.0.1"), at("127.0.0.3"))
        await until_known(peers, "127.0.0.3")


async def test_the_own_pool_is_known_once_the_own_address_is_found() -> None:
    """Before, all pools count."""
    ours, theirs = ScriptedSource(), ScriptedSource()
    ours.show(at("127.0.0.2"))
    theirs.show(at("127.0.0.3"))
    async with roster({"ours": [ours], "theirs": [theirs]}) as peers:
        await until_known(peers, "127.0.0.2", "127.0.0.3")
        ours.show(at("127.0.0.1"), at("127.0.0.2"))
        await until_known(peers, "127.0.0.2")


async def test_an_address_that_turns_out_to_be_the_own_one_says_which_pool_is() -> None:
    """As where a node is reached through NAT: nothing on the machine tells."""
    ours, theirs = ScriptedSource(), ScriptedSource()
    ours.show(at("198.51.100.1"), at("198.51.100.2"))
    theirs.show(at("198.51.100.3"))
    async with roster({"ours": [ours], "theirs": [theirs]}, "0.0.0.0:9102") as peers:
        await until_known(peers, "198.51.100.1", "198.51.100.2", "198.51.100.3")
        peers._is_self("198.51.100.1:9102")
        await until_known(peers, "198.51.100.2")
        theirs.show(at("198.51.100.3"), at("198.51.100.4"))
        ours.show(at("198.51.100.1"), at("198.51.100.2"), at("198.51.100.5"))
        await until_known(peers, "198.51.100.2", "198.51.100.5")


async def test_a_source_that_fails_keeps_the_peers_that_it_showed_last(caplog: pytest.LogCaptureFixture) -> None:
    """And one that is suddenly empty, which may have lost its data."""
    source = ScriptedSource()
    source.show(at("127.0.0.2"))
    async with roster({"p": [source]}) as peers:
        await until_known(peers, "127.0.0.2")
        source.fail()
        source.show()
        source.meet(RuntimeError("a mistake"))
        for words in ("fails: it is away", "shows no endpoints", "met an error"):
            await until(lambda words=words: words in caplog.text)  # type: ignore[misc]
        await turns()
        assert known(peers) == ["127.0.0.2:9102"]


async def test_a_source_that_cannot_be_asked_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Adapters then come from their origins; when it answers, from peers, too."""
    source = ScriptedSource()
    refusal = "the API server answers 403: pods is forbidden"
    with caplog.at_level(logging.INFO):
        source.fail(refusal)
        async with roster({"p": [source]}) as peers:
            await until(lambda: "no other stager is found; adapters come from their origins alone" in caplog.text)
            source.fail(refusal)
            await until(source._said.empty)
            await turns()
            assert caplog.text.count(refusal) == 1
            source.show(at("127.0.0.2"))
            await until_known(peers, "127.0.0.2")
            await until(lambda: "peers: 1 found" in caplog.text)


async def test_a_start_waits_for_no_source() -> None:
    """It has the peers of the settings; those that are found come when the source answers."""
    silent = ScriptedSource()
    async with asyncio.timeout(30), roster({"p": [silent]}, first_wait_s=3600) as peers:
        assert known(peers) == []
        silent.show(at("127.0.0.2"))
        await until_known(peers, "127.0.0.2")


async def test_a_stop_waits_for_no_source() -> None:
    """Nor does the wait for its first set go on."""
    async with asyncio.timeout(30), roster({"p": [ScriptedSource()]}, first_wait_s=3600):
        await turns()


async def test_a_restart_knows_the_peers_that_were_found_last(tmp_path: Path) -> None:
    """With `discovery.dir`, while the source is down."""
    source = ScriptedSource()
    source.show(at("127.0.0.2"))
    async with roster({"p": [source]}, dir=str(tmp_path)) as peers:
        await until_known(peers, "127.0.0.2")
    async with roster({"p": [ScriptedSource()]}, dir=str(tmp_path), first_wait_s=3600) as peers:
        await until_known(peers, "127.0.0.2")


async def test_of_more_than_are_asked_it_is_known_where_adapters_belong() -> None:
    """By the endpoints of the own pool, this stager's among them; of those that the settings name as peers nothing tells."""
    ours, theirs = ScriptedSource(), ScriptedSource()
    everyone = [at(f"127.0.0.{number + 1}") for number in range(PeerSettings().max_asked + 2)]
    theirs.show(at("127.0.1.1"))
    ours.show(*everyone[:-1])
    async with roster({"ours": [ours], "theirs": [theirs]}) as peers:
        await until(lambda: peers.count == len(everyone) - 2)
        assert places_of(peers) is None
        ours.show(*everyone)
        await until(lambda: peers.count == len(everyone) - 1)
        places = places_of(peers)
        assert places is not None
        router = build_pools(parse({"pools": [{"name": "ours", "endpoints": [{"address": e.endpoint.address} for e in everyone]}]}, source="test"))[0]
        for name in (f"acme/{number}" for number in range(50)):
            assert {e.address.replace("8000", "9102") for e in router.candidates(name)} <= set(places.of(name))
    named = [f"127.0.0.{number + 2}:9102" for number in range(40)]
    settings = parse({"stager": {"peers": {"addresses": named}, "listen": LISTEN}}, source="test")
    kept = Roster(settings, peers, StagerMetrics().discovery)
    await kept.open()
    assert (peers.count, places_of(peers)) == (len(named), None)
    await kept.close()


# -- whole stagers


class Nodes:
    """Stagers on ports of this machine that look for each other in one file."""

    def __init__(self, directory: Path, origin: str, count: int) -> None:
        self.directory = directory
        self.file = directory / "fleet.json"
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self.servers: list[Server] = []
        self._origin = {"type": "http", "url": origin, "allow_private": True}

    async def start(self) -> None:
        for number, address in enumerate(self.addresses):
            engine = {"url": "", "base_model": BASE_MODEL, "max_lora_rank": 8}
            own = {
                "listen": address,
                "http_listen": "",
                "dir": str(self.directory / f"node-{number}"),
                "drain_s": 0,
                "engine": engine,
                "origins": [self._origin],
            }
            pool = {"name": "p", "discovery": [{"type": "file", "path": str(self.file), "poll_s": 0.05}]}
            self.servers.append(Server(parse({"pools": [pool], "stager": own, "discovery": {"debounce_s": 0}}, source="test")))
            await self.servers[-1].start()

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))

    def show(self, *numbers: int) -> None:
        """Those of these numbers are in the file."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps([{"address": f"10.0.0.{number + 1}:8000", "stager": self.addresses[number]} for number in numbers]))
        fresh.replace(self.file)

    async def until_peers(self, number: int, *others: int) -> None:
        peers = self.servers[number].stager._fetcher._peers
        async with asyncio.timeout(60):
            while known(peers) != sorted(self.addresses[other] for other in others):
                await asyncio.sleep(0.02)

    async def stage(self, number: int, name: str = NAME) -> None:
        async with StagerClient(self.addresses[number]) as client:
            await client.ensure(name)

    def sent(self, number: int) -> int:
        return int(self.servers[number].stager.node.metrics.sent_bytes._value.get())


@pytest.fixture
async def web() -> AsyncIterator[FaultyServer]:
    async with running(FaultyServer()) as server:
        server.add(NAME, FILES)
        yield server


@pytest.fixture
async def nodes(tmp_path: Path, web: FaultyServer) -> AsyncIterator[Nodes]:
    nodes = Nodes(tmp_path, web.url, 3)
    try:
        yield nodes
    finally:
        await nodes.stop()


async def test_stagers_that_find_each_other_copy_from_each_other(nodes: Nodes, web: FaultyServer) -> None:
    """The origin sends each adapter once. Then the file has another node instead of the first, which is used from then on."""
    nodes.show(0, 1)
    await nodes.start()
    await nodes.until_peers(1, 0)
    await nodes.until_peers(2, 0, 1)
    await nodes.stage(0)
    await nodes.stage(1)
    assert len(web.gets(WEIGHTS)) == len(web.gets(CONFIG)) == 1
    assert nodes.sent(0) == sum(map(len, FILES.values()))
    nodes.show(1, 2)
    await nodes.until_peers(0, 1, 2)
    await nodes.until_peers(1, 2)
    await nodes.until_peers(2, 1)
    await nodes.stage(2)
    assert len(web.gets(WEIGHTS)) == 1
    assert nodes.sent(0) == nodes.sent(1) == sum(map(len, FILES.values()))
    web.add("acme/next", small_files(seed=1))
    await nodes.stage(2, "acme/next")
    await nodes.stage(1, "acme/next")
    assert len(web.gets(WEIGHTS)) == 2
    assert nodes.sent(2) == sum(map(len, small_files(seed=1).values()))
    assert visible(nodes.directory / "node-1") == {NAME: FILES, "acme/next": small_files(seed=1)}


async def test_stagers_whose_source_is_not_there_serve_from_their_origin(nodes: Nodes, web: FaultyServer) -> None:
    """They are ready as ever; when the file comes, they find each other."""
    await nodes.start()
    await nodes.stage(0)
    assert nodes.servers[0].stager.not_ready is None
    nodes.show(0, 1)
    await nodes.until_peers(1, 0)
    await nodes.stage(1)
    assert len(web.gets(WEIGHTS)) == 1
