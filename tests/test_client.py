"""The stager's client against servers that answer as they please."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from extproc.client import ERROR_METADATA, SERVICE, Evicted, NodeState, Published, StagerClient
from extproc.errors import BY_NAME, NoSpace, StagerUnavailable
from extproc.pb import stager_pb2 as pb
from tests.fakes.wait import until

Context = Any
Handler = Callable[[Any, Context], Any]
Start = Callable[..., Awaitable[StagerClient]]
MESSAGES: dict[str, tuple[Any, Any]] = {
    "Ensure": (pb.EnsureRequest, pb.EnsureReply),
    "List": (pb.ListRequest, pb.ListReply),
    "Evict": (pb.EvictRequest, pb.EvictReply),
    "Watch": (pb.WatchRequest, pb.WatchEvent),
}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Serves handlers by method name; the client of that server."""
    servers: list[grpc.aio.Server] = []
    clients: list[StagerClient] = []

    async def serve(**handlers: Handler) -> StagerClient:
        server = grpc.aio.server()
        methods = {}
        for name, handler in handlers.items():
            make = grpc.unary_stream_rpc_method_handler if name == "Watch" else grpc.unary_unary_rpc_method_handler
            asked, answered = MESSAGES[name]
            methods[name] = make(handler, asked.FromString, answered.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        clients.append(StagerClient(f"127.0.0.1:{port}"))
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
    """Evict, List and Watch as Ensure."""
    no_space = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ((ERROR_METADATA, "NoSpace"),))

    async def watch(_: Any, context: Context) -> AsyncIterator[pb.WatchEvent]:
        yield pb.WatchEvent(node=pb.NodeState(ready=True))
        await no_space(_, context)

    client = await start(Ensure=no_space, List=no_space, Evict=no_space, Watch=watch)
    for call in (client.ensure("a"), client.list(), client.evict("a")):
        with pytest.raises(NoSpace, match="full"):
            await call
    watching = client.watch()
    await anext(watching)
    with pytest.raises(NoSpace, match="full"):
        await anext(watching)


async def test_a_method_that_is_not_there_is_an_unavailable_stager(start: Start) -> None:
    """UNIMPLEMENTED: an older stager."""
    client = await start(List=failing(grpc.StatusCode.OK))
    with pytest.raises(StagerUnavailable, match="unimplemented"):
        await client.ensure("a")


async def test_answers_are_values(start: Start) -> None:
    """Each field of Ensure and Evict, and the three kinds of Watch."""

    async def ensure(request: pb.EnsureRequest, _: Context) -> pb.EnsureReply:
        return pb.EnsureReply(digest=request.adapter * 2, staged=True, origin="s3", lease_seconds=1.5, waited_seconds=2.5, bytes=2**40)

    async def evict(_: Any, __: Context) -> pb.EvictReply:
        return pb.EvictReply(bytes=2**41)

    async def watch(_: Any, __: Context) -> AsyncIterator[pb.WatchEvent]:
        yield pb.WatchEvent(node=pb.NodeState(ready=False, why="because", instance="i"))
        yield pb.WatchEvent(published="a")
        yield pb.WatchEvent()
        yield pb.WatchEvent(evicted="a")

    client = await start(Ensure=ensure, Evict=evict, Watch=watch)
    staged = await client.ensure("ab")
    assert (staged.digest, staged.staged, staged.origin, staged.lease_s, staged.waited_s, staged.bytes) == ("abab", True, "s3", 1.5, 2.5, 2**40)
    assert await client.evict("a") == 2**41
    assert [event async for event in client.watch()] == [NodeState(False, "because", "i"), Published("a"), Evicted("a")]


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
