"""Other nodes as an origin: real stagers that read from each other over gRPC, and one that lies."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from extproc.client import StagerClient
from extproc.config.origins import OriginSettings
from extproc.config.stager import PeerSettings
from extproc.core.artifact import File
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import DEFAULT_TABLE_SIZE, key_hash
from extproc.errors import AdapterInUse, InvalidAdapter, ModelNotFound, OriginFailed
from extproc.pb import stager_pb2 as pb
from extproc.process.grpc import grpc_server
from extproc.stager.api.grpc import Context, StagerService
from extproc.stager.stager import Stager
from extproc.stager.supply import peers as peers_module
from extproc.stager.supply.peers import Peers
from extproc.stager.supply.places import Places
from tests.fakes.adapters import CONFIG, WEIGHTS, Files, sha256, small_files, write_small
from tests.fakes.archives import packed
from tests.fakes.faulty import FaultyS3, FaultyServer, running
from tests.fakes.nodes import node, nothing_half_done, nothing_there, s3_origin, visible, web_origin
from tests.fakes.wait import Clock, until

NAME = "acme/sql"
FILES = small_files()
OTHER = small_files(seed=1)


@dataclass
class Member:
    """One node of the fleet."""

    stager: Stager
    service: Any
    server: grpc.aio.Server
    address: str
    clock: Clock

    @property
    def directory(self) -> Path:
        return self.stager.node.store.directory

    async def die(self) -> None:
        """Its port is closed, and what it was sending breaks off."""
        await self.server.stop(None)


@dataclass
class Fleet:
    """`start` puts one more node on a port; those before it are its peers, unless others are named."""

    root: Path
    origin: Any
    stack: contextlib.AsyncExitStack
    members: list[Member] = field(default_factory=list)

    async def start(
        self,
        *origins: Any,
        mode: str = "on",
        asks: list[str] | None = None,
        service: Callable[..., Any] = StagerService,
        sends: PeerSettings | None = None,
        asking: dict[str, Any] | None = None,
        instance: str = "",
        **settings: Any,
    ) -> Member:
        directory = self.root / f"node-{len(self.members)}"
        instance, clock = instance or directory.name, Clock()
        peers = Peers(PeerSettings.model_validate({"mode": mode, **(asking or {})}), StagerClient, instance, clock)
        peers.follow(asks if asks is not None else [member.address for member in self.members])
        chosen = origins or (self.origin,)
        stager = await self.stack.enter_async_context(node(directory, *chosen, clock=clock, peers=peers, instance=instance, **settings))
        server = grpc_server()
        made = service(stager, sends)
        made.register(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        self.members.append(Member(stager, made, server, address, clock))
        return self.members[-1]


@pytest.fixture
async def web() -> AsyncIterator[FaultyServer]:
    """The origin of all of them."""
    async with running(FaultyServer()) as server:
        server.add(NAME, FILES)
        yield server


@pytest.fixture
async def fleet(tmp_path: Path, web: FaultyServer) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        yield Fleet(tmp_path, web_origin(web.url), stack)


def sent(member: Member) -> int:
    """Bytes that it sent to others."""
    return int(member.stager.node.metrics.sent_bytes._value.get())


async def has(member: Member, files: Files = FILES, name: str = NAME) -> None:
    """After it is asked for, the adapter is there and right, and nothing is left of the ways that led nowhere."""
    await member.stager.ensure(name)
    assert visible(member.directory) == {name: files}
    assert nothing_half_done(member.stager)


# -- whom it comes from


async def test_on_the_origin_says_what_and_a_peer_sends_it(fleet: Fleet, web: FaultyServer) -> None:
    """It is asked with HEAD; of its bytes none is read. What the copy is called is what the origin calls it."""
    first, second = await fleet.start(), await fleet.start()
    await has(first)
    gets = len(web.gets())
    await has(second)
    assert len(web.gets()) == gets
    assert sent(first) == sum(map(len, FILES.values()))
    one, two = (member.stager.node.holdings.get(NAME) for member in (first, second))  # type: ignore[arg-type]
    assert one is not None
    assert two is not None
    assert (two.id, two.origin, two.revision) == (one.id, "http", one.revision)
    assert not await second.stager.refresh(NAME)


async def test_preferred_no_origin_is_asked(fleet: Fleet, web: FaultyServer) -> None:
    """As long as a peer has it; else the origins, as ever."""
    first, second = await fleet.start(), await fleet.start(mode="preferred")
    await has(first)
    asked = len(web.asked)
    await has(second)
    assert len(web.asked) == asked
    web.add("acme/new", OTHER)
    assert (await second.stager.ensure("acme/new")).origin == "http"


async def test_off_no_peer_is_asked(fleet: Fleet, web: FaultyServer) -> None:
    """Not even while the origin is down."""
    first, second = await fleet.start(), await fleet.start(mode="off")
    await has(first)
    await has(second)
    assert sent(first) == 0
    third = await fleet.start(mode="off")
    web.fault("", times=99, method="HEAD", status=500)
    with pytest.raises(OriginFailed):
        await third.stager.ensure(NAME)


async def test_a_copy_of_a_copy_is_one(fleet: Fleet, web: FaultyServer) -> None:
    """Where the first has gone, the second sends what it had from it."""
    first, second = await fleet.start(), await fleet.start()
    await has(first)
    await has(second)
    third = await fleet.start()
    await first.die()
    gets = len(web.gets())
    await has(third)
    assert len(web.gets()) == gets
    assert sent(second) == sent(first)


async def test_an_archive_s_copy_is_not_unpacked_again(fleet: Fleet, web: FaultyServer) -> None:
    """The peer has what was in it; the archive itself is not read."""
    web.files = {f"/{NAME}.tar.gz": packed(".tar.gz", FILES)}
    first, second = await fleet.start(), await fleet.start()
    await has(first)
    await has(second)
    assert len(web.gets()) == 1


async def test_every_origin_is_down_and_a_peer_has_it(fleet: Fleet, web: FaultyServer) -> None:
    """Its copy is served, of whatever revision; when the origin is back, a comparison brings the new one."""
    first, second = await fleet.start(), await fleet.start()
    await has(first)
    fault = web.fault("", times=99, method="HEAD", status=503)
    web.add(NAME, OTHER)
    await has(second)
    fault.times = 0
    second.clock.now += 60
    assert await second.stager.refresh(NAME)
    await has(second, OTHER)


async def test_every_origin_is_down_and_nobody_has_it(fleet: Fleet, web: FaultyServer) -> None:
    """The origin's failure is the answer, and not that there is none."""
    await fleet.start()
    second = await fleet.start()
    web.fault("", times=99, method="HEAD", status=503)
    with pytest.raises(OriginFailed, match="503"):
        await second.stager.ensure(NAME)


# -- who is not asked, or has not got it


async def test_a_peer_with_another_revision_is_not_used(fleet: Fleet, web: FaultyServer) -> None:
    """The origin has a new version since."""
    first, second = await fleet.start(), await fleet.start()
    await has(first)
    web.add(NAME, OTHER)
    await has(second, OTHER)
    assert sent(first) == 0


async def test_a_copy_from_elsewhere_is_not_used(fleet: Fleet, web: FaultyServer, tmp_path: Path) -> None:
    """The same name and even the same bytes, but another origin's: what its revision says is in another language."""
    first = await fleet.start(web_origin(web.url, name="mirror"))
    second = await fleet.start()
    await has(first)
    await has(second)
    assert sent(first) == 0


async def test_without_a_revision_nothing_can_be_compared(fleet: Fleet, web: FaultyServer) -> None:
    """The origin tells no versions apart, so it sends the bytes itself."""
    web.states_version = False
    first, second = await fleet.start(), await fleet.start()
    await has(first)
    await has(second)
    assert sent(first) == 0


async def test_what_others_put_there_is_not_offered(fleet: Fleet, web: FaultyServer) -> None:
    """Whoever put it there may change it while it is sent."""
    first = await fleet.start(scan_s=1e-6)
    write_small(first.directory / NAME, seed=1)
    await first.stager.ensure(NAME)
    assert first.stager.node.holdings.get(NAME).origin == "adopted"  # type: ignore[arg-type, union-attr]
    second = await fleet.start(mode="preferred")
    await has(second)
    assert sent(first) == 0


async def test_what_is_still_on_its_way_is_not_offered(fleet: Fleet, web: FaultyServer) -> None:
    """Nor is anybody waited for."""
    first, second = await fleet.start(), await fleet.start()
    web.fault(WEIGHTS, at=100, end="stall")
    waiting = asyncio.create_task(first.stager.ensure(NAME))
    await until(lambda: web.gets(WEIGHTS))
    await has(second)
    assert sent(first) == 0
    waiting.cancel()


async def test_a_node_is_no_peer_of_its_own(fleet: Fleet, web: FaultyServer) -> None:
    """Also where an address leads back to it that does not look like its own: after an eviction it must not wait for itself."""
    first = await fleet.start()
    await has(first)
    await has(await fleet.start(mode="preferred", instance=first.stager.instance))  # as it were the same process
    assert sent(first) == 0


async def test_a_peer_that_is_gone_costs_nothing(fleet: Fleet, web: FaultyServer) -> None:
    """It is asked once, then not for a while; when it is back, it is asked again."""
    first = await fleet.start()
    await has(first)
    second = await fleet.start(asks=["127.0.0.1:1", first.address], asking={"ask_timeout_s": 60.0})
    gets = len(web.gets())
    await has(second)
    assert len(web.gets()) == gets


class Silent(StagerService):
    """Takes questions and does not answer."""

    async def find(self, request: pb.FindRequest, context: Context) -> pb.FindReply:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_peer_that_does_not_answer_is_not_waited_for(fleet: Fleet, web: FaultyServer) -> None:
    """Longer than `ask_timeout_s`, and only once."""
    await fleet.start(service=Silent)
    second = await fleet.start(asking={"ask_timeout_s": 0.1})
    await has(second)
    web.add("acme/next", OTHER)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await second.stager.ensure("acme/next")
    assert loop.time() - began < 60
    assert second.stager.node.holdings.get("acme/next") is not None  # type: ignore[arg-type]


class Stopping(StagerService):
    """Sends so many bytes of the weights, then nothing more, and does not end either."""

    sends = 0

    async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        if request.path == WEIGHTS:
            if self.sends:
                async for chunk in super().read(request, context):
                    yield chunk[: self.sends]
                    break
            await asyncio.Event().wait()
        async for chunk in super().read(request, context):
            yield chunk


@pytest.mark.parametrize("sends", [0, 1000])
async def test_a_peer_that_hangs_in_a_read_is_left_for_the_origin(fleet: Fleet, web: FaultyServer, monkeypatch: pytest.MonkeyPatch, sends: int) -> None:
    """Whether it has sent something or not: it is read once, and for a while nobody asks it again."""
    monkeypatch.setattr(peers_module, "SILENT_S", 0.05)
    first, second = await fleet.start(service=Stopping), await fleet.start()
    first.service.sends = sends
    await has(first)
    await has(second)
    assert len(web.gets(WEIGHTS)) == 2
    web.add("acme/next", OTHER)
    await first.stager.ensure("acme/next")
    monkeypatch.setattr(peers_module, "SILENT_S", 3600.0)
    await second.stager.ensure("acme/next")
    assert len(web.gets(WEIGHTS)) == 4


class Counting(StagerService):
    """Answers when it is no longer silent."""

    asked = 0
    is_silent = True

    async def find(self, request: pb.FindRequest, context: Context) -> pb.FindReply:
        self.asked += 1
        if self.is_silent:
            await asyncio.Event().wait()
        return await super().find(request, context)


async def test_many_cold_requests_do_not_all_wait_for_a_peer_that_hangs(fleet: Fleet, web: FaultyServer) -> None:
    """While one waits for its answer, or has just waited in vain, the others go to the origin at once."""
    first = await fleet.start(service=Counting)
    second = await fleet.start(asking={"ask_timeout_s": 3600.0})
    for number in range(20):
        web.add(f"acme/{number}", small_files(seed=number))
    waiting = asyncio.create_task(second.stager.ensure("acme/0"))
    await until(lambda: first.service.asked)
    await asyncio.sleep(peers_module.LATE_S)
    for number in range(1, 20):
        await second.stager.ensure(f"acme/{number}")
    assert first.service.asked == 1
    waiting.cancel()


async def test_a_late_peer_is_waited_for_no_longer_than_the_others_make_likely(fleet: Fleet, web: FaultyServer) -> None:
    """Two have said no at once: the third, which says nothing, is not waited for."""
    for _ in range(2):
        await fleet.start()
    await fleet.start(service=Silent)
    last = await fleet.start(asking={"ask_timeout_s": 3600.0})
    await has(last)


async def test_a_peer_that_did_not_answer_is_asked_again_at_nobody_s_cost(fleet: Fleet, web: FaultyServer) -> None:
    """In the background; when it has answered, its copies are used again."""
    first = await fleet.start(service=Counting)
    second = await fleet.start(asking={"ask_timeout_s": 0.5})
    await has(first)
    await has(second)
    assert first.service.asked == 1
    for number, files in enumerate((OTHER, small_files(seed=2))):
        web.add(f"acme/{number}", files)
        await first.stager.ensure(f"acme/{number}")
    first.service.is_silent = False
    second.clock.now += peers_module.LONGEST_PAUSE_S
    gets = len(web.gets(WEIGHTS))
    await second.stager.ensure("acme/0")
    assert len(web.gets(WEIGHTS)) == gets + 1
    peers = second.stager._fetcher._peers
    await until(lambda: peers._peers[first.address].answering.state == "closed")
    await second.stager.ensure("acme/1")
    assert len(web.gets(WEIGHTS)) == gets + 1


# -- what goes wrong with one


class Breaking(StagerService):
    """Sends so many bytes of the weights, then calls `then` and breaks off; as often as `times` says."""

    sends = 1000
    times = 99
    then: Callable[[], Any] | None = None

    async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        data = b""
        async for chunk in super().read(request, context):
            data += chunk
        if request.path != WEIGHTS or not self.times:
            yield data
            return
        self.times -= 1
        yield data[: self.sends]
        if self.then is not None:
            self.then()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


@pytest.mark.parametrize("mode", ["on", "preferred"])
async def test_a_peer_that_breaks_off_is_left_for_the_origin(fleet: Fleet, web: FaultyServer, mode: str) -> None:
    """Nobody hears of it; of its bytes nothing is used."""
    first, second = await fleet.start(service=Breaking), await fleet.start(mode=mode)
    await has(first)
    first.service.sends = 0
    await has(second)
    assert [asked.begin for asked in web.gets(WEIGHTS)] == [0, 0]


async def test_a_peer_that_breaks_off_and_comes_back_goes_on(fleet: Fleet, web: FaultyServer) -> None:
    """Like any origin: what is on disk is not sent again."""
    first, second = await fleet.start(service=Breaking), await fleet.start()
    await has(first)
    first.service.times = 1
    await has(second)
    assert len(web.gets(WEIGHTS)) == 1


@pytest.mark.parametrize("mode", ["on", "preferred"])
async def test_a_peer_that_dies_in_mid_transfer_is_left_for_the_origin(fleet: Fleet, web: FaultyServer, mode: str) -> None:
    """Its port is closed while it sends."""
    first, second = await fleet.start(sends=PeerSettings(max_bytes_per_s=1)), await fleet.start(mode=mode)
    await has(first)
    waiting = asyncio.create_task(has(second))
    await until(lambda: first.service._free_reads < PeerSettings().max_reads)
    await first.die()
    await waiting
    assert len(web.gets(WEIGHTS)) == 2


class Lying(StagerService):
    """Sends other bytes than it says. `says` alters what it says."""

    data: Files
    says: Callable[[pb.FindReply], None] | None = None
    read_count = 0

    async def find(self, request: pb.FindRequest, context: Context) -> pb.FindReply:
        reply = await super().find(request, context)
        if self.says is not None:
            self.says(reply)
        return reply

    async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        self.read_count += 1
        yield self.data.get(request.path, b"evil")[request.offset :]


def consistently(files: Files) -> Callable[[pb.FindReply], None]:
    """Say of other files exactly what they are."""

    def says(reply: pb.FindReply) -> None:
        del reply.files[:]
        reply.files.extend(pb.File(path=path, size=len(data), sha256=sha256(data)) for path, data in files.items())

    return says


@pytest.mark.parametrize("mode", ["on", "preferred"])
@pytest.mark.parametrize("wrong", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("length", ["the same", "short", "long"])
async def test_a_peer_that_sends_other_bytes_is_found_out(fleet: Fleet, web: FaultyServer, mode: str, wrong: str, length: str) -> None:
    """By the digest that it states itself. The origin is taken, and the caller hears nothing of it."""
    first, second = await fleet.start(service=Lying), await fleet.start(mode=mode)
    await has(first)
    data = bytes(value ^ 1 for value in FILES[wrong])
    first.service.data = {**FILES, wrong: {"the same": data, "short": data[:-1], "long": data + b"x"}[length]}
    await has(second)
    assert first.service.read_count
    assert len(web.gets(WEIGHTS)) == 2


async def test_a_peer_that_lies_of_everything_is_found_out_by_the_origin(fleet: Fleet, tmp_path: Path) -> None:
    """Files and digests fit each other: the origin states a length and, here, a SHA-256. The peer is not even read."""
    longer = small_files(seed=1, modules=("q_proj", "v_proj", "k_proj"))
    async with running(FaultyS3()) as s3:
        s3.add(NAME, FILES)
        s3.state_sha256(f"{NAME}/{WEIGHTS}", FILES[WEIGHTS])
        for lie in (OTHER, longer):
            first = await fleet.start(s3_origin(s3.url), service=Lying, asks=[])
            await has(first)
            first.service.data, first.service.says = lie, consistently(lie)
            second = await fleet.start(s3_origin(s3.url), asks=[first.address])
            await has(second)
            assert first.service.read_count == 0


async def test_a_peer_that_was_found_out_is_not_asked_for_a_while(fleet: Fleet, web: FaultyServer) -> None:
    """Each attempt costs whoever waits."""
    first, second = await fleet.start(service=Lying), await fleet.start()
    first.service.data = dict.fromkeys(FILES, b"evil")
    for number in range(4):
        web.add(f"acme/{number}", small_files(seed=number))
        await first.stager.ensure(f"acme/{number}")
    reads = []
    for number, waited in enumerate((0, 1, 3.9, 0.2)):
        second.clock.now += waited
        await second.stager.ensure(f"acme/{number}")
        reads.append(first.service.read_count)
    assert reads[0] == reads[1] == reads[2] < reads[3]


REST_S = peers_module.LONGEST_REST_S + 1  # after it, any peer is asked again


@pytest.mark.parametrize(("mode", "what"), [("on", "damaged"), ("preferred", "damaged"), ("preferred", "invalid")])
async def test_a_peer_s_refused_copy_is_not_fetched_again(fleet: Fleet, web: FaultyServer, mode: str, what: str) -> None:
    """The peer is asked again after its rest, and what it offers is what was refused."""
    first, second = await fleet.start(service=Lying), await fleet.start(mode=mode, negative_ttl_s=10 * REST_S)
    await has(first)
    bad = {**FILES, WEIGHTS: b"no safetensors"}
    first.service.data, first.service.says = bad, consistently(bad) if what == "invalid" else None
    await has(second)
    reads = first.service.read_count
    assert reads
    for _ in range(2):
        second.clock.now += REST_S
        await second.stager.purge(NAME)
        await has(second)
    assert first.service.read_count == reads
    assert len(web.gets(WEIGHTS)) == 4


async def test_a_peer_whose_copy_was_refused_gives_others(fleet: Fleet, web: FaultyServer) -> None:
    """That it offers the refused one again is no reason for another rest."""
    first, second = await fleet.start(service=Lying), await fleet.start(negative_ttl_s=10 * REST_S)
    await has(first)
    first.service.data = {**FILES, WEIGHTS: FILES[WEIGHTS][::-1]}
    await has(second)
    second.clock.now += REST_S
    await second.stager.purge(NAME)
    await has(second)
    web.add("acme/new", OTHER)
    await first.stager.ensure("acme/new")
    reads, first.service.data = first.service.read_count, OTHER
    await second.stager.ensure("acme/new")
    assert first.service.read_count == reads + 2


async def test_a_pinned_digest_finds_out_a_peer(fleet: Fleet, web: FaultyServer) -> None:
    """Also where no origin is asked."""
    first = await fleet.start(service=Lying)
    await has(first)
    first.service.data, first.service.says = OTHER, consistently(OTHER)
    second = await fleet.start(mode="preferred", digests={NAME: sha256(FILES[WEIGHTS])})
    await has(second)
    assert len(web.gets(WEIGHTS)) == 2


@pytest.mark.parametrize("mode", ["on", "preferred"])
@pytest.mark.parametrize(
    "paths",
    [
        (CONFIG, WEIGHTS, "../../../evil"),
        (CONFIG, "../" + WEIGHTS),
        (CONFIG, "/tmp/evil"),
        (CONFIG, WEIGHTS, "x/y"),
        (CONFIG, WEIGHTS, "evil.py"),
        (CONFIG, CONFIG),
    ],
)
async def test_a_peer_names_no_other_files_than_an_adapter_has(fleet: Fleet, web: FaultyServer, tmp_path: Path, mode: str, paths: tuple[str, ...]) -> None:
    """Least of all some outside the directory; also where nothing is known of what is in an archive."""
    web.files = {f"/{NAME}.tar": packed(".tar", FILES)}
    first, second = await fleet.start(service=Lying), await fleet.start(mode=mode)
    await has(first)

    def says(reply: pb.FindReply) -> None:
        del reply.files[:]
        contents = {path: FILES.get(path, b"evil") for path in paths}
        reply.files.extend(pb.File(path=path, size=len(contents[path]), sha256=sha256(contents[path])) for path in paths)

    first.service.data, first.service.says = FILES, says
    await has(second)
    assert [path for path in tmp_path.rglob("*") if "evil" in path.name] == []
    assert not Path("/tmp/evil").exists()


async def test_a_peer_s_copy_is_verified_like_an_origin_s(fleet: Fleet, web: FaultyServer) -> None:
    """What it states is true, and no adapter; with every origin down there is nothing else, and nothing is to be seen."""
    first, second = await fleet.start(service=Lying), await fleet.start()
    await has(first)
    broken = {**FILES, WEIGHTS: b"no safetensors"}
    first.service.data, first.service.says = broken, consistently(broken)
    web.fault("", times=99, method="HEAD", status=503)
    with pytest.raises((InvalidAdapter, OriginFailed)):
        await second.stager.ensure(NAME)
    assert nothing_there(second.stager)


async def test_a_peer_that_lost_it_meanwhile_is_left_for_the_origin(fleet: Fleet, web: FaultyServer) -> None:
    """Evicted between its answer and the first byte."""

    class Forgetful(StagerService):
        async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
            with contextlib.suppress(ModelNotFound):
                await self._stager.purge(NAME)
            async for chunk in super().read(request, context):
                yield chunk

    first, second = await fleet.start(service=Forgetful), await fleet.start()
    await has(first)
    await has(second)
    assert len(web.gets(WEIGHTS)) == 2


async def test_who_sends_to_others_already_is_left_for_another_peer(fleet: Fleet, web: FaultyServer) -> None:
    """`max_reads`: one that is busy costs the next peer some bytes, not the origin."""
    busy = await fleet.start(sends=PeerSettings(max_reads=1, max_bytes_per_s=1))
    await has(busy)
    free = await fleet.start(asks=[])
    await has(free)
    digest = busy.stager.node.holdings.get(NAME).digest  # type: ignore[arg-type, union-attr]

    async def read() -> None:
        async with StagerClient(busy.address) as client:
            async for _ in client.read(digest, WEIGHTS):
                pass

    reading = asyncio.create_task(read())
    await until(lambda: not busy.service._free_reads)
    for number, mode in enumerate(("on", "preferred")):
        gets = len(web.gets())
        third = await fleet.start(mode=mode, asks=[busy.address, free.address])
        await has(third)
        assert len(web.gets()) == gets
        assert sent(free) == (number + 1) * sum(map(len, FILES.values()))
    reading.cancel()
    await asyncio.wait({reading})


async def test_who_sends_to_others_already_is_left_for_the_origin(fleet: Fleet, web: FaultyServer) -> None:
    """Where there is no other peer."""
    busy = await fleet.start()
    await has(busy)
    busy.service._free_reads = 0
    for mode in ("on", "preferred"):
        gets = len(web.gets(WEIGHTS))
        await has(await fleet.start(mode=mode, asks=[busy.address]))
        assert len(web.gets(WEIGHTS)) == gets + 1


async def test_what_is_read_is_not_evicted(fleet: Fleet, web: FaultyServer) -> None:
    """Neither for room nor because an operator asks; when it has been sent, it may go."""
    gate = asyncio.Event()

    class Slow(StagerService):
        async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
            async for chunk in super().read(request, context):
                yield chunk
                await gate.wait()

    first = await fleet.start(service=Slow, lease_s=1)
    await has(first)
    first.clock.now += 10
    second = await fleet.start()
    waiting = asyncio.create_task(has(second))
    await until(lambda: first.service._free_reads < 4)
    with pytest.raises(AdapterInUse):
        await first.stager.evict(NAME)
    gate.set()
    await waiting
    await until(lambda: first.service._free_reads == 4)
    assert await first.stager.evict(NAME) > 0
    assert nothing_there(first.stager)


async def test_three_nodes_that_want_it_at_once_all_get_it(fleet: Fleet, web: FaultyServer) -> None:
    """They ask each other while none of them has it: nobody waits for anybody."""
    origin = OriginSettings.model_validate({**fleet.origin.model_dump(), "timeout_s": 30})
    members = [await fleet.start(origin) for _ in range(3)]
    await asyncio.wait_for(asyncio.gather(*(has(member) for member in members)), 60)
    assert {member.stager.node.holdings.get(NAME).digest for member in members} == {  # type: ignore[arg-type, union-attr]
        members[0].stager.node.holdings.get(NAME).digest  # type: ignore[arg-type, union-attr]
    }


def test_a_file_is_what_is_offered() -> None:
    """The words of the message are those of the manifest."""
    assert {field.name for field in pb.File.DESCRIPTOR.fields} == set(File.__slots__)


# -- who they are changes


def peers_of(member: Member) -> Peers:
    return member.stager._fetcher._peers


async def test_a_peer_that_comes_is_asked(fleet: Fleet, web: FaultyServer) -> None:
    """From the next adapter on."""
    first, second = await fleet.start(asks=[]), await fleet.start(asks=[])
    await has(first)
    peers_of(second).follow([first.address])
    gets = len(web.gets())
    await has(second)
    assert len(web.gets()) == gets


async def test_a_peer_that_goes_is_asked_no_more(fleet: Fleet, web: FaultyServer) -> None:
    """And its connection is closed."""
    first, second = await fleet.start(service=Counting), await fleet.start()
    first.service.is_silent = False
    await has(second)
    assert first.service.asked == 1
    peers = peers_of(second)
    assert list(peers._connections._open) == [first.address]
    peers.follow([])
    assert (peers.count, peers._connections._open) == (0, {})
    web.add("acme/next", OTHER)
    await second.stager.ensure("acme/next")
    assert first.service.asked == 1


async def test_of_many_peers_those_are_asked_where_the_adapter_belongs(fleet: Fleet, web: FaultyServer) -> None:
    """Only then any others: with a place for one question, the one that has it is asked."""
    members = [await fleet.start(asks=[]) for _ in range(4)]
    asking = await fleet.start(asks=[], asking={"max_asked": 1})
    addresses = [member.address for member in members]
    places = Places([[Endpoint(f"10.0.0.{number}:8000", stager=address) for number, address in enumerate(addresses)]], set(), DEFAULT_TABLE_SIZE)
    others = [peer for peer in addresses if peer != members[0].address]
    name = next(
        name
        for name in (f"acme/{number}" for number in range(1000))
        if places.of(name)[0] == members[0].address and min(addresses, key=lambda peer: key_hash(f"{peer} {name}")) in others
    )
    web.add(name, FILES)
    await has(members[0], name=name)
    gets = len(web.gets())
    peers_of(asking).follow(addresses, places)
    await has(asking, name=name)
    assert len(web.gets()) == gets
    assert sent(members[0]) == sum(map(len, FILES.values()))


class Waiting(StagerService):
    """Sends the first part of the weights, and the rest when it is told to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._read_bytes = 1000
        self.gate = asyncio.Event()
        self.is_read = False

    async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        async for chunk in super().read(request, context):
            yield chunk
            if request.path == WEIGHTS:
                self.is_read = True
                await self.gate.wait()


async def test_a_peer_that_goes_sends_what_it_has_begun_to_the_end(fleet: Fleet, web: FaultyServer) -> None:
    """The origin is asked for nothing more; then the connection is closed."""
    first, second = await fleet.start(service=Waiting), await fleet.start()
    await has(first)
    gets, peers = len(web.gets()), peers_of(second)
    waiting = asyncio.create_task(has(second))
    await until(lambda: first.service.is_read)
    peers.follow([])
    assert list(peers._connections._open) == [first.address]
    first.service.gate.set()
    await waiting
    assert len(web.gets()) == gets
    assert peers._connections._open == {}


@pytest.mark.parametrize("mode", ["on", "preferred"])
async def test_a_peer_that_goes_and_dies_in_mid_transfer_is_left_for_the_origin(fleet: Fleet, web: FaultyServer, mode: str) -> None:
    """What it had sent is in no file."""
    first, second = await fleet.start(service=Waiting), await fleet.start(mode=mode)
    await has(first)
    waiting = asyncio.create_task(has(second))
    await until(lambda: first.service.is_read)
    peers_of(second).follow([])
    await first.die()
    await waiting
    assert [asked.begin for asked in web.gets(WEIGHTS)] == [0, 0]


async def test_what_was_learnt_of_a_peer_that_stays_is_kept(fleet: Fleet, web: FaultyServer) -> None:
    """One that hangs is not waited for again because another one comes."""
    first = await fleet.start(service=Counting)
    second = await fleet.start(asking={"ask_timeout_s": 0.5})
    await has(second)
    assert first.service.asked == 1
    peers_of(second).follow([first.address, "127.0.0.1:1"])
    web.add("acme/next", OTHER)
    await second.stager.ensure("acme/next")
    assert first.service.asked == 1


@pytest.mark.parametrize("mode", ["on", "preferred"])
async def test_a_stager_that_asks_itself_notices(fleet: Fleet, web: FaultyServer, mode: str) -> None:
    """The address is asked no more, until it has been somebody else's meanwhile."""
    only = await fleet.start(service=Counting, mode=mode)
    only.service.is_silent = False
    peers, told = peers_of(only), []
    peers.on_self = lambda: told.append(peers.selves.copy())
    peers.follow([only.address])
    await has(only)
    web.add("acme/next", OTHER)
    await only.stager.ensure("acme/next")
    assert (only.service.asked, peers.count, told) == (1, 0, [{only.address}])
    peers.follow([only.address])
    assert peers.count == 0
    peers.follow([])
    peers.follow([only.address])
    assert peers.count == 1


def test_of_too_many_peers_the_first_are_known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """That is said when it begins to be so."""
    monkeypatch.setattr(peers_module, "MAX_PEERS", 2)
    peers = Peers(PeerSettings(), StagerClient, "me")
    for _ in range(2):
        peers.follow(["c:1", "b:1", "a:1"])
        assert list(peers._peers) == ["a:1", "b:1"]
    assert [record.getMessage() for record in caplog.records] == [
        "there are 3 other stagers, and the first 2 by address are asked: the copies of the rest are not used"
    ]


def test_off_nobody_is_followed() -> None:
    """Whoever finds them."""
    peers = Peers(PeerSettings(mode="off"), StagerClient, "me")
    peers.follow(["a:1"])
    assert peers.count == 0
