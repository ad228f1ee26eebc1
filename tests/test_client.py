"""The stager's client against servers that answer as they please."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from extproc.client import (
    ERROR_METADATA,
    MAX_CLAIMED,
    SERVICE,
    Catalogue,
    Claimed,
    Evicted,
    Loading,
    Model,
    Models,
    NodeState,
    PeerArtifact,
    Progress,
    Published,
    Refreshed,
    Space,
    StagerClient,
)
from extproc.config.credentials import RpcSettings
from extproc.core.artifact import File
from extproc.errors import BY_NAME, CredentialsRefused, NoSpace, StagerUnavailable
from extproc.heartbeat import Heard, Silent
from extproc.pb import stager_pb2 as pb
from tests.fakes.relay import Relay
from tests.fakes.wait import until

Context = Any
Handler = Callable[[Any, Context], Any]
Start = Callable[..., Awaitable[StagerClient]]
MESSAGES: dict[str, tuple[Any, Any]] = {
    "Ensure": (pb.EnsureRequest, pb.EnsureReply),
    "Stage": (pb.EnsureRequest, pb.StageProgress),
    "Claim": (pb.ClaimRequest, pb.ClaimReply),
    "Release": (pb.ReleaseRequest, pb.ReleaseReply),
    "Models": (pb.ModelsRequest, pb.ModelsReply),
    "Catalogue": (pb.CatalogueRequest, pb.CatalogueReply),
    "Resolve": (pb.ResolveRequest, pb.ResolveReply),
    "List": (pb.ListRequest, pb.ListReply),
    "Pin": (pb.PinRequest, pb.PinReply),
    "Evict": (pb.EvictRequest, pb.EvictReply),
    "Purge": (pb.EvictRequest, pb.EvictReply),
    "Refresh": (pb.RefreshRequest, pb.RefreshReply),
    "Verify": (pb.VerifyRequest, pb.VerifyResult),
    "Watch": (pb.WatchRequest, pb.WatchEvent),
    "Find": (pb.FindRequest, pb.FindReply),
    "Read": (pb.ReadRequest, pb.ReadChunk),
}
CLAIMED = Claimed("a", "d" * 64, Loading.VERSIONED, "a@sha256:dd", 17.5)
STREAMS = ("Stage", "Verify", "Watch", "Read")


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Serves handlers by method name; the client of that server, whose `rpc` and `holder` may be given."""
    servers: list[grpc.aio.Server] = []
    clients: list[StagerClient] = []

    async def serve(rpc: RpcSettings | None = None, holder: str = "", **handlers: Handler) -> StagerClient:
        server = grpc.aio.server()
        methods = {}
        for name, handler in handlers.items():
            make = grpc.unary_stream_rpc_method_handler if name in STREAMS else grpc.unary_unary_rpc_method_handler
            asked, answered = MESSAGES[name]
            methods[name] = make(handler, asked.FromString, answered.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        clients.append(StagerClient(f"127.0.0.1:{port}", rpc, holder))
        return clients[-1]

    yield serve
    for client in clients:
        await client.close()
    for server in servers:
        await server.stop(None)


def failing(code: grpc.StatusCode, details: str = "", metadata: tuple[tuple[str, str], ...] = ()) -> Handler:
    async def handler(_: Any, context: Context) -> None:
        await context.abort(code, details, metadata)

    return handler


def failing_stream(code: grpc.StatusCode, details: str = "", metadata: tuple[tuple[str, str], ...] = ()) -> Handler:
    async def handler(_: Any, context: Context) -> AsyncIterator[Any]:
        await context.abort(code, details, metadata)
        yield

    return handler


async def collect(stream: AsyncIterator[Any], into: list[Any]) -> None:
    """What comes before an error counts."""
    async for item in stream:
        into.append(item)  # noqa: PERF401


async def all_of(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def all_methods(client: StagerClient) -> list[Awaitable[Any]]:
    """One call of each."""
    unary: list[Awaitable[Any]] = [
        client.ensure("a"),
        client.release(),
        client.list(),
        client.pin("a"),
        client.evict("a"),
        client.purge("a"),
        client.refresh("a"),
        client.find("a"),
    ]
    unary += [client.claim([CLAIMED]), client.models(), client.catalogue(), client.resolve("a"), client.ensure("a", on_progress=print)]
    return [*unary, *map(all_of, (client.stage("a"), client.verify(), client.watch(), client.read("d", "f")))]


@pytest.mark.parametrize("name", list(BY_NAME))
async def test_the_trailing_metadata_names_the_error(start: Start, name: str) -> None:
    """Whatever the code; the text is the stager's."""
    client = await start(Ensure=failing(grpc.StatusCode.INTERNAL, "the text", ((ERROR_METADATA, name),)))
    with pytest.raises(BY_NAME[name], match="the text"):
        await client.ensure("a")


@pytest.mark.parametrize("metadata", [(), ((ERROR_METADATA, "FromTheFuture"),), ((ERROR_METADATA, "ValueError"),), (("other", "NoSpace"),)])
async def test_an_error_without_a_known_name_is_an_unavailable_stager(start: Start, metadata: tuple[tuple[str, str], ...]) -> None:
    """A newer stager, or something that is none: its text is not ours to show."""
    client = await start(Ensure=failing(grpc.StatusCode.INTERNAL, "a secret path", metadata))
    with pytest.raises(StagerUnavailable) as raised:
        await client.ensure("a")
    assert "a secret path" not in str(raised.value)
    assert raised.value.retryable


async def test_every_method_translates(start: Start) -> None:
    """The streams as the single answers, also when they fail after their first message."""
    no_space = (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ((ERROR_METADATA, "NoSpace"),))
    client = await start(**{name: (failing_stream if name in STREAMS else failing)(*no_space) for name in MESSAGES})
    for call in all_methods(client):
        with pytest.raises(NoSpace, match="full"):
            await call

    async def watch(_: Any, context: Context) -> AsyncIterator[pb.WatchEvent]:
        yield pb.WatchEvent(node=pb.NodeState(ready=True))
        await failing(*no_space)(_, context)

    watching = (await start(Watch=watch)).watch()
    await anext(watching)
    with pytest.raises(NoSpace, match="full"):
        await anext(watching)


async def test_a_caller_without_valid_credentials_is_told_so(start: Start) -> None:
    """That is nobody's absence: asking another stager with the same credentials is useless, and the text says what is missing."""
    why = (grpc.StatusCode.UNAUTHENTICATED, "a valid token is needed")
    client = await start(**{name: (failing_stream if name in STREAMS else failing)(*why) for name in MESSAGES})
    for call in all_methods(client):
        with pytest.raises(CredentialsRefused, match="a valid token is needed"):
            await call


async def test_every_call_carries_the_token(start: Start, tmp_path: Path) -> None:
    """Unary or stream."""
    (tmp_path / "token").write_text("secret\n")
    shown: list[str | None] = []

    def note(context: Context) -> None:
        shown.append(dict(context.invocation_metadata()).get("authorization"))

    async def unary(_: Any, context: Context) -> None:
        note(context)
        await context.abort(grpc.StatusCode.INTERNAL, "")

    async def stream(_: Any, context: Context) -> AsyncIterator[Any]:
        note(context)
        await context.abort(grpc.StatusCode.INTERNAL, "")
        yield

    handlers = {name: stream if name in STREAMS else unary for name in MESSAGES}
    for rpc in (RpcSettings(token_file=str(tmp_path / "token")), None):
        client = await start(rpc=rpc, **handlers)
        for call in all_methods(client):
            with pytest.raises(StagerUnavailable):
                await call
    assert shown == ["Bearer secret"] * (len(MESSAGES) + 1) + [None] * (len(MESSAGES) + 1)  # Stage is called in two ways


async def test_what_is_not_there_is_found_nowhere(start: Start) -> None:
    """A peer without it is no error; any other of its failures is."""
    client = await start(Find=failing(grpc.StatusCode.NOT_FOUND, "not on this node", ((ERROR_METADATA, "ModelNotFound"),)))
    assert await client.find("a") is None


async def test_a_method_that_is_not_there_is_an_unavailable_stager(start: Start) -> None:
    """UNIMPLEMENTED: an older stager."""
    client = await start(List=failing(grpc.StatusCode.OK))
    with pytest.raises(StagerUnavailable, match="unimplemented"):
        await client.ensure("a")


async def test_answers_are_values(start: Start) -> None:
    """Each field of Ensure, Evict and Find, and every kind of Watch; what a newer stager may send is passed over."""

    async def ensure(request: pb.EnsureRequest, _: Context) -> pb.EnsureReply:
        return pb.EnsureReply(digest=request.adapter * 2, staged=True, origin="s3", lease_seconds=1.5, waited_seconds=2.5, bytes=2**40)

    async def evict(_: Any, __: Context) -> pb.EvictReply:
        return pb.EvictReply(bytes=2**41)

    async def watch(_: Any, __: Context) -> AsyncIterator[pb.WatchEvent]:
        yield pb.WatchEvent(node=pb.NodeState(ready=False, why="because", instance="i", draining=True))
        yield pb.WatchEvent(published="a")
        yield pb.WatchEvent(refreshed="a")
        yield pb.WatchEvent()
        yield pb.WatchEvent(evicted="a")
        yield pb.WatchEvent(space=pb.Space(used_bytes=2**40, reserved_bytes=2, max_bytes=3))
        yield pb.WatchEvent(node=pb.NodeState(ready=True, instance="i", resumed=True))

    async def find(request: pb.FindRequest, _: Context) -> pb.FindReply:
        file = pb.File(path="f", size=2**40, sha256="s")
        return pb.FindReply(instance="i", digest=request.adapter, revision=request.revision, origin="o", files=[file])

    client = await start(Ensure=ensure, Evict=evict, Watch=watch, Find=find)
    staged = await client.ensure("ab")
    assert (staged.digest, staged.staged, staged.origin, staged.lease_s, staged.waited_s, staged.bytes) == ("abab", True, "s3", 1.5, 2.5, 2**40)
    assert await client.evict("a") == 2**41
    assert await client.find("a", "r") == PeerArtifact("i", "a", "r", "o", (File("f", 2**40, "s"),))
    assert [event async for event in client.watch()] == [
        NodeState(False, "because", "i", draining=True),
        Published("a"),
        Refreshed("a"),
        Evicted("a"),
        Space(2**40, 2, 3),
        NodeState(True, "", "i", resumed=True),
    ]


async def test_an_ensure_says_who_asks_for_what_and_how_urgently(start: Start) -> None:
    """The lease is the holder's; a prefetch waits behind requests."""
    seen: list[pb.EnsureRequest] = []

    async def ensure(request: pb.EnsureRequest, _: Context) -> pb.EnsureReply:
        seen.append(request)
        return pb.EnsureReply()

    async def stage(request: pb.EnsureRequest, _: Context) -> AsyncIterator[pb.StageProgress]:
        seen.append(request)
        yield pb.StageProgress(phase="fetch", origin="s3", done_bytes=1, total_bytes=2)
        yield pb.StageProgress(reply=pb.EnsureReply(digest="d"))

    client = await start(holder="router 1", Ensure=ensure, Stage=stage)
    await client.ensure("a")
    await client.ensure("b", "f" * 64, prefetch=True, keep_s=60.0)
    first, last = await all_of(client.stage("c", "e" * 64))
    assert first == Progress("fetch", "s3", 1, 2)
    assert last.digest == "d"
    assert [(r.adapter, r.holder, r.sha256, r.priority, r.keep_seconds) for r in seen] == [
        ("a", "router 1", "", pb.Priority.REQUEST, 0.0),
        ("b", "router 1", "f" * 64, pb.Priority.PREFETCH, 60.0),
        ("c", "router 1", "e" * 64, pb.Priority.REQUEST, 0.0),
    ]


async def test_a_watch_goes_on_behind_the_last_change_it_was_told(start: Start) -> None:
    """Of the instance that told it: another numbers its changes itself. A change of a kind that is not known here counts as told."""
    asked: list[tuple[str, int]] = []
    streams = [
        [pb.WatchEvent(sequence=4, node=pb.NodeState(instance="i")), pb.WatchEvent(sequence=5, evicted="a"), pb.WatchEvent(sequence=6)],
        [pb.WatchEvent(sequence=7, evicted="b"), pb.WatchEvent(sequence=7, node=pb.NodeState(instance="i", resumed=True))],
        [pb.WatchEvent(sequence=2, node=pb.NodeState(instance="j"))],
        [],
    ]

    async def watch(request: pb.WatchRequest, _: Context) -> AsyncIterator[pb.WatchEvent]:
        asked.append((request.instance, request.after))
        for event in streams[len(asked) - 1]:
            yield event

    client = await start(Watch=watch)
    for _ in streams:
        await all_of(client.watch())
    assert asked == [("", 0), ("i", 6), ("i", 7), ("j", 2)]


async def test_an_ensure_with_progress_reports_it_and_ends_with_the_answer(start: Start) -> None:
    """By Stage, with all that an Ensure says."""
    seen: list[pb.EnsureRequest] = []

    async def stage(request: pb.EnsureRequest, _: Context) -> AsyncIterator[pb.StageProgress]:
        seen.append(request)
        yield pb.StageProgress(phase="resolve")
        yield pb.StageProgress(phase="fetch", origin="s3", done_bytes=1, total_bytes=2)
        yield pb.StageProgress(reply=pb.EnsureReply(digest="d", model="m"))

    client = await start(holder="router 1", Stage=stage)
    said: list[Progress] = []
    staged = await client.ensure("a", "f" * 64, prefetch=True, loading=Loading.PLAIN, on_progress=said.append)
    assert (staged.digest, staged.model) == ("d", "m")
    assert said == [Progress("resolve", "", 0, 0), Progress("fetch", "s3", 1, 2)]
    assert seen == [pb.EnsureRequest(adapter="a", holder="router 1", sha256="f" * 64, priority=pb.Priority.PREFETCH, loading=pb.Loading.PLAIN)]


async def test_a_stage_that_ends_without_its_answer_is_an_unavailable_stager(start: Start) -> None:
    """It ended well, as gRPC sees it."""

    async def stage(_: Any, __: Context) -> AsyncIterator[pb.StageProgress]:
        yield pb.StageProgress(phase="resolve")

    with pytest.raises(StagerUnavailable, match="without an answer"):
        await (await start(Stage=stage)).ensure("a", on_progress=print)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_an_answer_that_cannot_be_read_is_an_unavailable_stager(start: Start, kind: str) -> None:
    """Something listens there that is none."""

    async def unary(_: Any, __: Context) -> pb.ReadChunk:
        return pb.ReadChunk(data=b"\xff\xff\xff")

    async def stream(_: Any, __: Context) -> AsyncIterator[pb.ReadChunk]:
        yield await unary(_, __)

    MESSAGES["Claim"], MESSAGES["Watch"] = (pb.ClaimRequest, pb.ReadChunk), (pb.WatchRequest, pb.ReadChunk)
    try:
        if kind == "unary":
            client = await start(Claim=unary)
            with pytest.raises(StagerUnavailable, match="cannot be read"):
                await client.claim([CLAIMED])
        else:
            client = await start(Watch=stream)
            with pytest.raises(StagerUnavailable, match="cannot be read"):
                await all_of(client.watch())
    finally:
        MESSAGES["Claim"], MESSAGES["Watch"] = (pb.ClaimRequest, pb.ClaimReply), (pb.WatchRequest, pb.WatchEvent)


async def test_a_claim_says_what_is_relied_on_and_is_split_where_it_is_long(start: Start) -> None:
    """The answers come in the order of the claims."""
    asked: list[pb.ClaimRequest] = []

    async def claim(request: pb.ClaimRequest, _: Context) -> pb.ClaimReply:
        asked.append(request)
        return pb.ClaimReply(lease_seconds=[float(lease.adapter) for lease in request.leases])

    client = await start(holder="router 1", Claim=claim)
    assert await client.claim([]) == ()
    leases = [replace(CLAIMED, adapter=f"{number}") for number in range(MAX_CLAIMED + 1)]
    assert await client.claim(leases) == tuple(float(number) for number in range(MAX_CLAIMED + 1))
    assert [len(request.leases) for request in asked] == [MAX_CLAIMED, 1]
    last = pb.ClaimedLease(adapter=f"{MAX_CLAIMED}", digest="d" * 64, loading=pb.Loading.VERSIONED, model="a@sha256:dd", remaining_seconds=17.5)
    assert asked[-1] == pb.ClaimRequest(holder="router 1", leases=[last])


async def test_an_answer_to_a_claim_that_fits_not_is_an_unavailable_stager(start: Start) -> None:
    """What is leased must not be guessed."""

    async def claim(_: Any, __: Context) -> pb.ClaimReply:
        return pb.ClaimReply(lease_seconds=[1.0, 2.0])

    with pytest.raises(StagerUnavailable, match="answers 2 of 1"):
        await (await start(Claim=claim)).claim([CLAIMED])


async def test_what_could_be_served_comes_in_pages_and_by_name(start: Start) -> None:
    """With the version that the caller has, and the origin's label."""
    asked: list[pb.CatalogueRequest] = []

    async def catalogue(request: pb.CatalogueRequest, _: Context) -> pb.CatalogueReply:
        asked.append(request)
        return pb.CatalogueReply(version="2", names=["b"], more=True)

    async def resolve(request: pb.ResolveRequest, _: Context) -> pb.ResolveReply:
        return pb.ResolveReply(origin=f"of {request.adapter}")

    client = await start(Catalogue=catalogue, Resolve=resolve)
    assert await client.catalogue("1", "a", 7) == Catalogue("2", ("b",), more=True)
    assert asked == [pb.CatalogueRequest(version="1", after="a", limit=7)]
    assert await client.resolve("b") == "of b"


async def test_models_come_in_pages(start: Start) -> None:
    """What is asked for, and whether there is more."""
    asked: list[pb.ModelsRequest] = []

    async def models(request: pb.ModelsRequest, _: Context) -> pb.ModelsReply:
        asked.append(request)
        return pb.ModelsReply(adapters=[pb.Model(id="b", root="/b")], more=True)

    client = await start(Models=models)
    assert await client.models() == Models((), (Model("b", "/b"),), more=True)
    await client.models("a", 7)
    assert asked == [pb.ModelsRequest(), pb.ModelsRequest(after="a", limit=7)]


async def test_a_call_on_a_closed_client_is_an_unavailable_stager(start: Start) -> None:
    """Nobody cancelled it, and nobody may take it for that."""
    reached = asyncio.Event()

    async def ensure(_: Any, __: Context) -> pb.EnsureReply:
        reached.set()
        await asyncio.Event().wait()
        return pb.EnsureReply()

    client = await start(Ensure=ensure)
    waiting = asyncio.create_task(client.ensure("a"))
    await reached.wait()
    await client.close()
    with pytest.raises(StagerUnavailable):
        await waiting
    with pytest.raises(StagerUnavailable):
        await client.ensure("a")


# -- heartbeats


async def test_a_watch_asks_for_heartbeats_and_does_not_show_them(start: Start) -> None:
    """Nor do they move the position from which the next one goes on."""
    asked: list[pb.WatchRequest] = []

    async def watch(request: pb.WatchRequest, _: Context) -> AsyncIterator[pb.WatchEvent]:
        asked.append(request)
        yield pb.WatchEvent(sequence=4, node=pb.NodeState(instance="i", heartbeat_seconds=0.5))
        yield pb.WatchEvent(heartbeat=pb.Heartbeat())
        yield pb.WatchEvent(sequence=5, evicted="a")
        yield pb.WatchEvent(heartbeat=pb.Heartbeat())

    client = await start(Watch=watch)
    for _ in range(2):
        assert await all_of(client.watch(0.5)) == [NodeState(False, "", "i", heartbeat_s=0.5), Evicted("a")]
    assert asked == [pb.WatchRequest(heartbeat_seconds=0.5), pb.WatchRequest(instance="i", after=5, heartbeat_seconds=0.5)]


async def test_a_stager_that_falls_silent_is_unavailable_in_the_end(start: Start) -> None:
    """Also one that has said its first word."""
    for words in ([], [pb.WatchEvent(node=pb.NodeState(instance="i", heartbeat_seconds=0.01))]):

        async def watch(_: Any, __: Context, words: list[pb.WatchEvent] = words) -> AsyncIterator[pb.WatchEvent]:
            for word in words:
                yield word
            await asyncio.Event().wait()

        seen: list[Any] = []
        client = await start(Watch=watch)
        with pytest.raises(StagerUnavailable, match=rf"^stager {client.address}: silent for 1\.5 s$"):
            await collect(client.watch(0.01), seen)
        assert [type(event) for event in seen] == [*([NodeState] if words else []), Silent]


async def test_an_older_stager_may_be_silent(start: Start) -> None:
    """It does not say that it would speak."""
    go_on = asyncio.Event()

    async def watch(_: Any, __: Context) -> AsyncIterator[pb.WatchEvent]:
        yield pb.WatchEvent(node=pb.NodeState(instance="i"))
        await go_on.wait()
        yield pb.WatchEvent(evicted="a")

    watching = (await start(Watch=watch)).watch(0.01)
    assert isinstance(await anext(watching), NodeState)
    event = asyncio.ensure_future(anext(watching))
    await asyncio.wait({event}, timeout=0.3)
    assert not event.done()
    go_on.set()
    assert await event == Evicted("a")


async def test_a_stager_that_stops_for_less_than_six_heartbeats_keeps_its_watch(start: Start) -> None:
    """Stopped just when the first event is on its way: gRPC has sent a ping behind it, which is answered only when the process goes on."""

    async def watch(_: Any, __: Context) -> AsyncIterator[pb.WatchEvent]:
        relay.freeze(back=False)
        yield pb.WatchEvent(node=pb.NodeState(instance="i", heartbeat_seconds=0.5))
        await asyncio.sleep(1.5)
        relay.thaw()
        yield pb.WatchEvent(evicted="a")

    server = await start(Watch=watch)
    async with Relay(int(server.address.rpartition(":")[2])) as relay, StagerClient(relay.address) as client:
        seen: list[Any] = []
        await collect(client.watch(0.5), seen)
        assert [type(event) for event in seen] == [NodeState, Silent, Heard, Evicted]


async def test_cancelling_a_wait_ends_the_call(start: Start) -> None:
    """The stager sees it, and the caller gets CancelledError, not an error of ours."""
    reached, ended = asyncio.Event(), asyncio.Event()

    async def ensure(_: Any, __: Context) -> pb.EnsureReply:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return pb.EnsureReply()

    client = await start(Ensure=ensure)
    waiting = asyncio.create_task(client.ensure("a"))
    await reached.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await ended.wait()


async def test_leaving_a_watch_ends_the_call(start: Start) -> None:
    """Cancelled like any task of the router."""
    ended = asyncio.Event()
    seen: list[Any] = []

    async def watch(_: Any, __: Context) -> AsyncIterator[pb.WatchEvent]:
        try:
            yield pb.WatchEvent(published="a")
            await asyncio.Event().wait()
        finally:
            ended.set()

    client = await start(Watch=watch)

    async def collect() -> None:
        async for event in client.watch():
            seen.append(event)  # noqa: PERF401  # what came before the cancellation counts

    task = asyncio.create_task(collect())
    await until(lambda: seen)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await ended.wait()
