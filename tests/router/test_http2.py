"""The transport: a real gRPC client on one side, and clients that break the protocol on the other."""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast

import grpc
import grpc.aio
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.router.http2 import frames
from extproc.router.http2.calls import Message, Methods, Sender, joined
from extproc.router.http2.connection import Connection
from extproc.router.http2.frames import frame
from extproc.router.http2.patience import DROP_AFTER_TICKS, MAX_RAPID, MAX_USELESS, PING_AFTER_TICKS
from extproc.router.http2.streams import LARGE_BYTES, STREAM_WINDOW
from extproc.router.transport import Listener

ECHO, HOLD = "/test.Echo/Echo", "/test.Echo/Hold"


class Echo:
    """Sends every message back, and ends when the client does."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def receive(self, message: Message) -> None:
        self._sender.send(joined(message))

    def holds(self, size: int) -> None:
        pass

    def half_close(self) -> None:
        self._sender.finish()

    def drain(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class Hold:
    """Answers nothing; remembers how it ended."""

    open_calls = 0

    def __init__(self, _sender: Sender) -> None:
        Hold.open_calls += 1

    def receive(self, message: Message) -> None:
        pass

    def holds(self, size: int) -> None:
        pass

    def half_close(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def abandon(self) -> None:
        Hold.open_calls -= 1


METHODS: Methods = {ECHO: Echo, HOLD: Hold}


@contextlib.asynccontextmanager
async def serving(max_streams: int = 20_000) -> AsyncIterator[tuple[str, Listener]]:
    Hold.open_calls = 0
    listener = Listener("127.0.0.1:0", METHODS, max_streams)
    await listener.start()
    try:
        yield listener.address, listener
    finally:
        await listener.stop(0)


@contextlib.asynccontextmanager
async def client(address: str) -> AsyncIterator[grpc.aio.Channel]:
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield channel


def open_stream(channel: Any, method: str) -> Any:
    """A bidirectional call of bytes; the stubs want serialisers for it."""
    return channel.stream_stream(method)()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 65_535, 1_048_576, 10_000_000])
async def test_messages_of_any_size_go_both_ways(size: int) -> None:
    """Through every window: the connection's, the stream's, the frame's."""
    async with serving() as (address, _), client(address) as channel:
        call = open_stream(channel, ECHO)
        message = bytes(size)
        for _ in range(3):
            await call.write(message)
            assert await call.read() == message
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
        assert await call.code() is grpc.StatusCode.OK


async def test_a_thousand_streams_at_once() -> None:
    """Each gets its own bytes back."""
    async with serving() as (address, _), client(address) as channel:

        async def one(number: int) -> None:
            call = open_stream(channel, ECHO)
            await call.write(b"%d" % number)
            assert await call.read() == b"%d" % number
            await call.done_writing()

        await asyncio.gather(*(one(number) for number in range(1000)))


async def test_a_client_that_cancels_is_noticed() -> None:
    """The call is told, and the others of the connection go on."""
    async with serving() as (address, _), client(address) as channel:
        held, kept = open_stream(channel, HOLD), open_stream(channel, ECHO)
        await held.write(b"x")
        await until(lambda: Hold.open_calls == 1)
        held.cancel()
        await until(lambda: Hold.open_calls == 0)
        await kept.write(b"y")
        assert await kept.read() == b"y"
        await kept.done_writing()


async def test_a_lost_connection_abandons_its_calls() -> None:
    """All of them."""
    async with serving() as (address, _):
        async with client(address) as channel:
            calls = [open_stream(channel, HOLD) for _ in range(10)]
            await asyncio.gather(*(call.write(b"x") for call in calls))
            await until(lambda: Hold.open_calls == 10)
        await until(lambda: Hold.open_calls == 0)


async def test_unknown_methods_are_unimplemented() -> None:
    """As every gRPC server answers."""
    async with serving() as (address, _), client(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cast("Any", channel).unary_unary("/test.Echo/None")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_slow_reader_stops_its_own_stream_only() -> None:
    """One call writes 20 MB and reads nothing; its sender is stopped; another call of the same connection is served meanwhile."""
    async with serving() as (address, _), client(address) as channel:
        slow, quick = open_stream(channel, ECHO), open_stream(channel, ECHO)
        chunk = bytes(1_000_000)
        writing = asyncio.create_task(_write_many(slow, chunk, 20))
        for _ in range(50):
            await quick.write(b"y")
            assert await quick.read() == b"y"
        received = 0
        while received < 20 * len(chunk):
            received += len(await slow.read())
        await writing
        await asyncio.gather(slow.done_writing(), quick.done_writing())


async def _write_many(call: Any, chunk: bytes, count: int) -> None:
    for _ in range(count):
        await call.write(chunk)


async def test_draining_lets_running_calls_finish() -> None:
    """New streams are refused, the old one is answered to its end."""
    async with serving() as (address, listener), client(address) as channel:
        call = open_stream(channel, ECHO)
        await call.write(b"x")
        assert await call.read() == b"x"
        stopping = asyncio.create_task(listener.stop(30))
        await call.write(b"y")
        assert await call.read() == b"y"
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
        await stopping
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address.split(":"))


# ---- clients that break the protocol


def opening(path: str) -> bytes:
    """The headers of a call, as stream 1."""
    block = hpack.Encoder().encode([(":method", "POST"), (":scheme", "http"), (":path", path), ("te", "trailers"), ("content-type", "application/grpc")])
    return frame(frames.HEADERS, frames.END_HEADERS, 1, block)


GRPC = {":method": "POST", ":scheme": "http", ":path": HOLD, "te": "trailers", "content-type": "application/grpc"}


class Wire:
    """A client that writes frames as it likes, and the frames it got."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> "Wire":
        self._writer.write(frame(kind, flags, stream, payload))
        return self

    def announce(self, kind: int, stream: int, length: int) -> None:
        """The head of a frame that does not come."""
        self._writer.write(struct.pack(">HBBBI", length >> 8, length & 0xFF, kind, 0, stream))

    def open(self, stream: int, path: str = HOLD) -> "Wire":
        return self.ask(stream, GRPC | {":path": path}, 0)

    def ask(self, stream: int, fields: Iterable[tuple[str, str]] | dict[str, str], flags: int = frames.END_STREAM) -> "Wire":
        block = self._encoder.encode(list(fields.items()) if isinstance(fields, dict) else list(fields))
        return self.frame(frames.HEADERS, frames.END_HEADERS | flags, stream, block)

    async def until(self, kind: int, stream: int) -> bytes:
        """The payload of the next frame of this kind on this stream; others are passed over."""
        while True:
            was, of, payload = await self.read()
            if (was, of) == (kind, stream):
                return payload

    def setting(self, name: int, value: int) -> "Wire":
        return self.frame(frames.SETTINGS, 0, 0, struct.pack(">HI", name, value))

    async def drain(self) -> None:
        await self._writer.drain()

    async def read(self) -> tuple[int, int, bytes]:
        head = await self._reader.readexactly(9)
        return head[3], int.from_bytes(head[5:9], "big"), await self._reader.readexactly(int.from_bytes(head[:3], "big"))

    async def goaway(self) -> int:
        """The error code that the server ends the connection with."""
        while True:
            kind, _, payload = await self.read()
            if kind == frames.GOAWAY:
                assert await self._reader.read() == b""
                return cast("int", struct.unpack(">II", payload[:8])[1])

    async def ping(self) -> None:
        """Wait until everything that was sent has been read by the server."""
        self.frame(frames.PING, 0, 0, b"12345678")
        while (await self.read())[0] != frames.PING:
            pass


@contextlib.asynccontextmanager
async def raw(address: str) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(frames.PREFACE)
    wire = Wire(reader, writer)
    wire.frame(frames.SETTINGS, 0, 0)
    try:
        yield wire
    finally:
        writer.close()


BROKEN: dict[str, tuple[int, Callable[[Wire], object]]] = {
    "data of a stream that is not open": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.DATA, 0, 1, b"x")),
    "an even stream": (frames.PROTOCOL_ERROR, lambda w: w.open(2)),
    "a push": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4))),
    "a short ping": (frames.FRAME_SIZE_ERROR, lambda w: w.frame(frames.PING, 0, 0, b"x")),
    "a short reset": (frames.FRAME_SIZE_ERROR, lambda w: w.frame(frames.RST_STREAM, 0, 1, b"x")),
    "broken settings": (frames.FRAME_SIZE_ERROR, lambda w: w.frame(frames.SETTINGS, 0, 0, b"x")),
    "a window of nothing": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.WINDOW_UPDATE, 0, 0, bytes(4))),
    "a window out of range": (frames.FLOW_CONTROL_ERROR, lambda w: w.frame(frames.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")),
    "headers that cannot be decoded": (frames.COMPRESSION_ERROR, lambda w: w.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff\xff\xff")),
    "a continuation of nothing": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.CONTINUATION, 0, 1)),
    "a block that is interrupted": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.HEADERS, 0, 1, b"\x83").frame(frames.PING, 0, 0, bytes(8))),
    "an endless block": (
        frames.ENHANCE_YOUR_CALM,
        lambda w: [w.frame(frames.HEADERS if n == 0 else frames.CONTINUATION, 0, 1, bytes(16_000)) for n in range(5)],
    ),
    "padding longer than the frame": (frames.PROTOCOL_ERROR, lambda w: w.open(1).frame(frames.DATA, frames.PADDED, 1, b"\x05x")),
    "a stream opened after a later one": (frames.PROTOCOL_ERROR, lambda w: w.open(5).open(3)),
    "data on no stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.DATA, 0, 0, b"x")),
    "headers on no stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.HEADERS, frames.END_HEADERS, 0)),
    "a priority on no stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.PRIORITY, 0, 0, bytes(5))),
    "a reset on no stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.RST_STREAM, 0, 0, bytes(4))),
    "settings on a stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.SETTINGS, 0, 1)),
    "a ping on a stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.PING, 0, 1, bytes(8))),
    "a farewell on a stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.GOAWAY, 0, 1, bytes(8))),
    "a reset of an idle stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.RST_STREAM, 0, 1, bytes(4))),
    "a window of an idle stream": (frames.PROTOCOL_ERROR, lambda w: w.frame(frames.WINDOW_UPDATE, 0, 1, b"\0\0\0\1")),
    "trailers of an even stream": (frames.PROTOCOL_ERROR, lambda w: w.open(3).open(2)),
    "headers of a stream that is over": (frames.STREAM_CLOSED, lambda w: w.open(1).frame(frames.RST_STREAM, 0, 1, bytes(4)).open(1)),
    "an acknowledgement with settings": (frames.FRAME_SIZE_ERROR, lambda w: w.frame(frames.SETTINGS, frames.ACK, 0, bytes(6))),
    "a push that is neither on nor off": (frames.PROTOCOL_ERROR, lambda w: w.setting(frames.ENABLE_PUSH, 2)),
    "an initial window over 2^31-1": (frames.FLOW_CONTROL_ERROR, lambda w: w.setting(frames.INITIAL_WINDOW_SIZE, 2**31)),
    "a frame size below 2^14": (frames.PROTOCOL_ERROR, lambda w: w.setting(frames.MAX_FRAME_SIZE, 2**14 - 1)),
    "a frame size over 2^24-1": (frames.PROTOCOL_ERROR, lambda w: w.setting(frames.MAX_FRAME_SIZE, 2**24)),
    "a thousand settings": (frames.ENHANCE_YOUR_CALM, lambda w: w.frame(frames.SETTINGS, 0, 0, bytes(6000))),
    "settings that lift a window over 2^31-1": (
        frames.FLOW_CONTROL_ERROR,
        lambda w: w.open(1).frame(frames.WINDOW_UPDATE, 0, 1, struct.pack(">I", 2**31 - 1 - 65_535)).setting(frames.INITIAL_WINDOW_SIZE, 2**31 - 1),
    ),
    "endless empty data": (frames.ENHANCE_YOUR_CALM, lambda w: [w.open(1), *(w.frame(frames.DATA, 0, 1) for _ in range(MAX_USELESS + 1))]),
    "endless priorities": (frames.ENHANCE_YOUR_CALM, lambda w: [w.frame(frames.PRIORITY, 0, 1, bytes(4) + b"x") for _ in range(MAX_USELESS + 1)]),
    "endless frames of a kind that nobody knows": (frames.ENHANCE_YOUR_CALM, lambda w: [w.frame(99, 0, 1) for _ in range(MAX_USELESS + 1)]),
    "endless settings": (frames.ENHANCE_YOUR_CALM, lambda w: [w.setting(frames.INITIAL_WINDOW_SIZE, n % 2) for n in range(MAX_USELESS // 100 + 1)]),
    "streams that are reset at once": (
        frames.ENHANCE_YOUR_CALM,
        lambda w: [w.open(n).frame(frames.RST_STREAM, 0, n, struct.pack(">I", frames.CANCEL)) for n in range(1, 4 * MAX_RAPID, 2)],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_broken_protocol_ends_the_connection_with_its_code(what: str) -> None:
    """And the server goes on for others."""
    code, break_it = BROKEN[what]
    async with serving() as (address, _):
        async with raw(address) as wire:
            break_it(wire)
            assert await wire.goaway() == code
        async with raw(address) as wire:
            await wire.ping()
        await until(lambda: Hold.open_calls == 0)


async def test_a_sender_that_ignores_its_window_is_cut_off() -> None:
    """A client that takes no answers is given no window for more."""
    async with serving() as (address, _), raw(address) as wire:
        wire.frame(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 0))
        wire.open(1, ECHO)
        answered = b"\x00" + (300_000).to_bytes(4, "big") + bytes(300_000)  # by more than MAX_UNSENT_BYTES
        begun = b"\x00" + (2_000_000).to_bytes(4, "big")
        sent = (answered + begun).ljust(STREAM_WINDOW + 1, b"\x00")  # nothing comes after the byte that is over the window
        for at in range(0, len(sent), frames.MIN_MAX_FRAME):
            wire.frame(frames.DATA, 0, 1, sent[at : at + frames.MIN_MAX_FRAME])
        assert await wire.goaway() == frames.FLOW_CONTROL_ERROR


async def test_streams_over_the_limit_are_refused() -> None:
    """With the code that lets a client try elsewhere; a place that is given back can be had again."""
    async with serving(max_streams=2) as (address, _), raw(address) as wire:
        for stream in (1, 3, 5):
            wire.open(stream)
        while (frame := await wire.read())[0] != frames.RST_STREAM:
            pass
        assert frame[1:] == (5, struct.pack(">I", frames.REFUSED_STREAM))
        wire.frame(frames.RST_STREAM, 0, 1, bytes(4))
        wire.open(7, "/test.Echo/None")
        while (frame := await wire.read())[0] != frames.HEADERS:
            pass
        assert frame[1] == 7


async def test_frames_over_the_limit_are_refused() -> None:
    """By their length alone, before they are read."""
    async with serving() as (address, _), raw(address) as wire:
        wire.announce(frames.DATA, 1, frames.MIN_MAX_FRAME + 1)
        assert await wire.goaway() == frames.FRAME_SIZE_ERROR


async def test_something_else_than_http2_is_closed() -> None:
    """Somebody sends HTTP/1.1 to the port."""
    async with serving() as (address, _):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"not an HTTP/2 client" in await reader.read()
        writer.close()


async def test_settings_must_come_first() -> None:
    """RFC 9113, 3.4."""
    async with serving() as (address, _):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(frames.PREFACE)
        wire = Wire(reader, writer)
        wire.frame(frames.PING, 0, 0, bytes(8))
        assert await wire.goaway() == frames.PROTOCOL_ERROR
        writer.close()


async def test_many_streams_that_are_dropped_leave_nothing_and_may_be() -> None:
    """A busy gateway whose clients hang up, one in eight of them served: it is not taken for an attack."""
    async with serving() as (address, _), raw(address) as wire:
        wire.setting(frames.INITIAL_WINDOW_SIZE, 2**20)
        for number in range(4000):
            wire.open(2 * number + 1, ECHO if number % 8 == 0 else HOLD)
            if number % 8 == 0:
                wire.frame(frames.DATA, frames.END_STREAM, 2 * number + 1, bytes(5))
            else:
                wire.frame(frames.RST_STREAM, 0, 2 * number + 1, struct.pack(">I", frames.CANCEL))
            if number % 100 == 0:
                await wire.drain()
        await wire.ping()
        assert Hold.open_calls == 0


async def test_answers_that_nobody_reads_do_not_fill_the_memory() -> None:
    """A flood of pings from a client that does not read ends its connection."""
    async with serving() as (address, _):
        _reader, writer = await asyncio.open_connection(*address.split(":"), limit=1024)
        writer.write(frames.PREFACE)
        ping = frame(frames.PING, 0, 0, bytes(8))
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(ping * 10_000)
                await writer.drain()
        writer.transport.abort()


# ---- what is not gRPC, and what is malformed


NOT_GRPC: dict[str, tuple[dict[str, str], bytes]] = {
    "GET": ({":method": "GET", ":scheme": "http", ":path": "/"}, b"405"),
    "PUT": (GRPC | {":method": "PUT"}, b"405"),
    "CONNECT": ({":method": "CONNECT", ":authority": "x"}, b"405"),
    "OPTIONS *": ({":method": "OPTIONS", ":scheme": "http", ":path": "*"}, b"405"),
    "no content-type": ({":method": "POST", ":scheme": "http", ":path": HOLD}, b"415"),
    "another content-type": (GRPC | {"content-type": "application/json"}, b"415"),
    "one that only begins like gRPC's": (GRPC | {"content-type": "application/grpc-web"}, b"415"),
}


@pytest.mark.parametrize("what", NOT_GRPC)
@pytest.mark.parametrize("ends", [True, False])
async def test_what_is_not_grpc_is_answered_on_its_own_stream(what: str, ends: bool) -> None:
    """With a status and a line of text, and nobody else notices."""
    fields, status = NOT_GRPC[what]
    async with serving() as (address, _), raw(address) as wire:
        wire.open(1, ECHO)
        wire.ask(3, fields, frames.END_STREAM if ends else 0)
        headers = dict(hpack.Decoder().decode(await wire.until(frames.HEADERS, 3), raw=True))
        assert headers[b":status"] == status
        assert headers.get(b"allow") == (b"POST" if status == b"405" else None)
        assert (await wire.until(frames.DATA, 3)).startswith(status)
        assert await wire.until(frames.DATA, 3) == b""
        wire.frame(frames.DATA, frames.END_STREAM, 1, bytes(5))
        assert await wire.until(frames.DATA, 1) == bytes(5)


async def test_head_has_no_body() -> None:
    """Its headers end the stream."""
    async with serving() as (address, _), raw(address) as wire:
        wire.ask(1, {":method": "HEAD", ":scheme": "http", ":path": "/"})
        wire.ask(3, {":method": "GET", ":scheme": "http", ":path": "/"})
        await wire.until(frames.HEADERS, 1)
        assert (await wire.read())[:2] == (frames.HEADERS, 3)


async def test_the_rest_of_an_answered_request_is_not_kept() -> None:
    """A large upload that was answered 415 is stopped without an error."""
    async with serving() as (address, _), raw(address) as wire:
        wire.ask(1, GRPC | {"content-type": "text/plain"}, 0)
        for _ in range(9):
            wire.frame(frames.DATA, 0, 1, bytes(8192))
        assert await wire.until(frames.RST_STREAM, 1) == struct.pack(">I", frames.NO_ERROR)
        await wire.ping()


GET = [(":method", "GET"), (":scheme", "http"), (":path", "/")]
MALFORMED: dict[str, list[tuple[str, str]]] = {
    "a name with capitals": [*GET, ("X-Test", "x")],
    "a connection header": [*GET, ("connection", "close")],
    "a transfer-encoding": [*GET, ("transfer-encoding", "chunked")],
    "another te": [*GET, ("te", "gzip")],
    "an unknown pseudo-header": [*GET, (":test", "x")],
    "one of answers": [*GET, (":status", "200")],
    "one after other headers": [*GET[:2], ("x-test", "x"), GET[2]],
    "no method": GET[1:],
    "no scheme": [GET[0], GET[2]],
    "no path": GET[:2],
    "an empty path": [*GET[:2], (":path", "")],
    "a path without a slash": [*GET[:2], (":path", "x")],
    "a path with a line break": [*GET[:2], (":path", "/\r\n")],
    "two methods": [GET[0], *GET],
    "two paths": [*GET, GET[2]],
    "a content-length that is no number": [*GET, ("content-length", "x")],
    "two content-lengths": [*GET, ("content-length", "0"), ("content-length", "0")],
    "a content-length without data": [*GET, ("content-length", "1")],
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_a_malformed_request_costs_its_stream_only(what: str) -> None:
    """RFC 9113, 8.1.1: "a stream error of type PROTOCOL_ERROR"."""
    async with serving() as (address, _), raw(address) as wire:
        wire.ask(1, MALFORMED[what])
        assert await wire.until(frames.RST_STREAM, 1) == struct.pack(">I", frames.PROTOCOL_ERROR)
        await wire.ping()


@pytest.mark.parametrize("size", [1, 3])
async def test_data_must_be_as_long_as_its_content_length(size: int) -> None:
    """Neither more nor less; the call is abandoned."""
    async with serving() as (address, _), raw(address) as wire:
        wire.ask(1, GRPC | {"content-length": "2"}, 0)
        wire.frame(frames.DATA, frames.END_STREAM, 1, bytes(size))
        assert await wire.until(frames.RST_STREAM, 1) == struct.pack(">I", frames.PROTOCOL_ERROR)
        await wire.ping()
        assert Hold.open_calls == 0


STREAM_ERRORS: dict[str, tuple[int, Callable[[Wire], object]]] = {
    "headers in the middle": (frames.PROTOCOL_ERROR, lambda w: w.open(1).open(1)),
    "a pseudo-header in trailers": (frames.PROTOCOL_ERROR, lambda w: w.open(1).ask(1, [(":path", "/")])),
    "data after the end": (frames.STREAM_CLOSED, lambda w: w.ask(1, GRPC).frame(frames.DATA, 0, 1, b"x")),
    "headers after the end": (frames.STREAM_CLOSED, lambda w: w.ask(1, GRPC).ask(1, GRPC)),
    "data after a reset": (frames.STREAM_CLOSED, lambda w: w.open(1).frame(frames.RST_STREAM, 0, 1, bytes(4)).frame(frames.DATA, 0, 1, b"x")),
    "a window of nothing": (frames.PROTOCOL_ERROR, lambda w: w.open(1).frame(frames.WINDOW_UPDATE, 0, 1, bytes(4))),
    "a window over 2^31-1": (frames.FLOW_CONTROL_ERROR, lambda w: w.open(1).frame(frames.WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff")),
    "a priority of another size": (frames.FRAME_SIZE_ERROR, lambda w: w.open(1).frame(frames.PRIORITY, 0, 1, b"x")),
    "a stream that depends on itself": (frames.PROTOCOL_ERROR, lambda w: w.open(1).frame(frames.PRIORITY, 0, 1, b"\0\0\0\1\0")),
}


@pytest.mark.parametrize("what", STREAM_ERRORS)
async def test_an_error_of_a_stream_costs_that_stream_only(what: str) -> None:
    """Its call is abandoned, and the connection goes on."""
    code, break_it = STREAM_ERRORS[what]
    async with serving() as (address, _), raw(address) as wire:
        break_it(wire)
        assert await wire.until(frames.RST_STREAM, 1) == struct.pack(">I", code)
        await wire.ping()
        assert Hold.open_calls == 0


async def test_what_was_on_its_way_when_a_stream_was_reset_is_ignored() -> None:
    """The client cannot have known."""
    async with serving(max_streams=1) as (address, _), raw(address) as wire:
        wire.open(1).open(3)
        await wire.until(frames.RST_STREAM, 3)
        wire.frame(frames.DATA, 0, 3, b"x").ask(3, [("x-trailer", "x")]).frame(frames.WINDOW_UPDATE, 0, 3, b"\0\0\0\1").frame(frames.RST_STREAM, 0, 3, bytes(4))
        wire.frame(frames.PING, 0, 0, bytes(8))
        assert (await wire.read())[0] == frames.PING


# ---- what a call is told, and what it may do


class Told(Hold):
    """Writes down what it is told; what it does meanwhile is the test's."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(sender)
        self.sender = sender
        self.log: list[object] = []

    def receive(self, message: Message) -> None:
        self.log.append(len(joined(message)))

    def holds(self, size: int) -> None:
        self.log.append(("holds", size))

    def half_close(self) -> None:
        self.log.append("half_close")

    def drain(self) -> None:
        self.log.append("drain")

    def abandon(self) -> None:
        self.log.append("abandon")


class Broken(Told):
    """Raises in everything."""

    def receive(self, message: Message) -> None:
        raise RuntimeError("receive")

    holds = half_close = drain = abandon = receive  # type: ignore[assignment]


class Local:
    """A connection without a socket, whose calls are of one kind."""

    def __init__(self, call: Callable[[Sender], Any] = Told, **options: Any) -> None:
        self.calls: list[Any] = []

        def method(sender: Sender) -> Any:
            self.calls.append(call(sender))
            return self.calls[-1]

        self.connection = Connection({HOLD: method}, 20_000, **options)
        self.transport = _Recorder()
        self.connection.connection_made(self.transport)
        self.feed(frames.PREFACE + frame(frames.SETTINGS, 0, 0))
        self.encoder = hpack.Encoder()
        self.frames()

    def feed(self, data: bytes) -> None:
        _feed(self.connection, data)

    def open(self, *streams: int) -> None:
        for stream in streams:
            self.feed(frame(frames.HEADERS, frames.END_HEADERS, stream, self.encoder.encode(list(GRPC.items()))))

    def frames(self) -> list[tuple[int, int, bytes]]:
        """What was written since the last look: kind, stream, payload."""
        found, at, written = [], 0, self.transport.written
        while at < len(written):
            high, low, kind, _flags, stream = struct.unpack_from(">HBBBI", written, at)
            size = high << 8 | low
            found.append((kind, stream, bytes(written[at + 9 : at + 9 + size])))
            at += 9 + size
        written.clear()
        return found


async def test_an_unfinished_message_is_counted_from_its_first_byte() -> None:
    """Once per read, until it is handed over."""
    local = Local()
    local.open(1)
    local.feed(frame(frames.DATA, 0, 1, b"\0"))
    local.feed(frame(frames.DATA, 0, 1, b"\0\0\0\x14") + frame(frames.DATA, 0, 1, bytes(8)))
    local.feed(frame(frames.DATA, 0, 1, bytes(12) + bytes(5) + b"\0\0\0"))
    local.feed(frame(frames.DATA, 0, 1, b"\0\x01x"))
    assert local.calls[0].log == [("holds", 1), ("holds", 13), ("holds", 0), 20, 0, ("holds", 3), ("holds", 0), 1]


@pytest.mark.parametrize("end", ["reset", "finish", "lost", "too large"])
async def test_bytes_of_a_message_that_is_dropped_are_counted_no_more(end: str) -> None:
    """Whoever drops it."""
    local = Local(max_message_bytes=100)
    local.open(1)
    local.feed(frame(frames.DATA, 0, 1, b"\0\0\0\0" if end == "too large" else b"\0\0\0\0\x14x"))
    (call,) = local.calls
    if end == "reset":
        local.feed(frame(frames.RST_STREAM, 0, 1, bytes(4)))
    elif end == "finish":
        call.sender.finish()
    elif end == "lost":
        local.connection.connection_lost(None)
    else:
        local.feed(frame(frames.DATA, 0, 1, b"\xff"))
    assert call.log[-2:] == ([("holds", 6), ("holds", 0)] if end == "finish" else [("holds", 0), "abandon"])


async def test_a_message_over_the_limit_ends_its_call() -> None:
    """With RESOURCE_EXHAUSTED, before it is read; one of exactly the limit is taken."""
    local = Local(max_message_bytes=100)
    local.open(1)
    local.feed(frame(frames.DATA, 0, 1, b"\0\0\0\0\x64" + bytes(100)) + frame(frames.DATA, 0, 1, b"\0\0\0\0\x65"))
    assert local.calls[0].log == [100, "abandon"]
    assert b"grpc-status\x018" in local.frames()[0][2]


async def test_small_pieces_of_a_message_are_joined() -> None:
    """A hundred thousand frames of one byte do not become as many objects, and arrive as they were sent."""
    kept: list[bytes] = []
    local = Local(lambda _: _Keep(kept))
    local.open(1)
    body = bytes(n % 251 for n in range(100_000))
    local.feed(frame(frames.DATA, 0, 1, b"\0" + len(body).to_bytes(4, "big")))
    for at in range(0, len(body) - 1, 1000):
        local.feed(b"".join(frame(frames.DATA, 0, 1, body[n : n + 1]) for n in range(at, min(at + 1000, len(body) - 1))))
    (stream,) = local.connection.open_calls()
    assert len(stream.pieces or ()) < 10
    local.feed(frame(frames.DATA, 0, 1, body[-1:]))
    assert kept == [body]


async def test_a_call_that_raises_costs_its_own_stream(caplog: pytest.LogCaptureFixture) -> None:
    """It is reset with INTERNAL_ERROR, one traceback is logged for the connection, and the other streams go on."""
    local = Local(Broken)
    local.open(1, 3, 5)
    local.feed(frame(frames.DATA, 0, 1, bytes(5)) + frame(frames.DATA, 0, 3, bytes(2)) + frame(frames.DATA, frames.END_STREAM, 5))
    assert [f for f in local.frames() if f[0] == frames.RST_STREAM] == [
        (frames.RST_STREAM, stream, struct.pack(">I", frames.INTERNAL_ERROR)) for stream in (1, 5, 3)
    ]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert not local.transport.closed
    assert local.connection.is_idle


async def test_a_peer_that_reads_nothing_does_not_make_calls_raise() -> None:
    """Ten thousand calls end while the socket takes no more: the connection is cut off, and `finish` returns."""
    local = Local()
    local.open(*range(1, 20_200, 2))
    local.connection.pause_writing()
    for call in local.calls:
        call.sender.finish()
    assert local.transport.closed


async def test_waiting_streams_take_turns() -> None:
    """What the connection's window lets through is shared, and streams without anything to send are not looked at."""
    local = Local()
    local.feed(frame(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 2**20)))
    local.open(1, 3, 5)
    local.calls[0].sender.send(bytes(65_530))  # all of the connection's window
    for call in local.calls[1:]:
        call.sender.send(bytes(40_000))
    await asyncio.sleep(0)
    local.frames()
    local.feed(frame(frames.WINDOW_UPDATE, 0, 0, struct.pack(">I", 4 * 16_384)))
    assert [(stream, len(payload)) for kind, stream, payload in local.frames() if kind == frames.DATA] == [(3, 16_384), (5, 16_384), (3, 16_384), (5, 16_384)]


async def test_the_last_of_several_settings_counts() -> None:
    """And a change of the initial window counts for streams that are open."""
    local = Local()
    local.feed(frame(frames.SETTINGS, 0, 0, b"".join(struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, size) for size in (5, 2**31 - 1, 0))))
    local.open(1)
    local.calls[0].sender.send(bytes(95))
    await asyncio.sleep(0)
    assert not local.transport.payloads()
    local.feed(frame(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 60)))
    local.feed(frame(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 10)))  # now the window is below nothing
    local.feed(frame(frames.WINDOW_UPDATE, 0, 1, struct.pack(">I", 50)))
    local.feed(frame(frames.WINDOW_UPDATE, 0, 1, struct.pack(">I", 7)))
    assert [len(payload) for payload in local.transport.payloads()] == [60, 7]


# ---- keepalive and the end


def ticks(local: Local, count: int) -> list[bytes]:
    """The pings that so many ticks cause."""
    for _ in range(count):
        local.connection.tick()
    return [payload for kind, _, payload in local.frames() if kind == frames.PING]


async def test_a_silent_peer_with_open_streams_is_asked_and_then_dropped() -> None:
    """Its calls hear of it; any word of it counts as an answer."""
    local = Local()
    local.open(1)
    assert ticks(local, 1 + PING_AFTER_TICKS - 1) == []
    (ping,) = ticks(local, 1)
    local.feed(frame(frames.PING, frames.ACK, 0, ping))
    assert len(ticks(local, 1 + PING_AFTER_TICKS)) == 1
    assert ticks(local, DROP_AFTER_TICKS - PING_AFTER_TICKS - 1) == []
    assert not local.transport.closed
    local.connection.tick()
    assert local.transport.closed


async def test_a_silent_peer_without_streams_is_left_alone() -> None:
    """There is nothing to lose."""
    local = Local()
    assert ticks(local, 100) == []
    assert not local.transport.closed


async def test_a_stream_that_is_on_its_way_when_the_server_says_goodbye_is_served() -> None:
    """RFC 9113, 6.8: the first GOAWAY names no last stream, the second comes when a ping shows that the client has seen the first."""
    local = Local()
    local.open(1)
    local.connection.go_away()
    (goaway, ping) = local.frames()
    assert goaway == (frames.GOAWAY, 0, struct.pack(">II", 2**31 - 1, 0))
    local.open(3)
    assert len(local.calls) == 2
    local.feed(frame(frames.PING, frames.ACK, 0, ping[2]))
    assert local.frames() == [(frames.GOAWAY, 0, struct.pack(">II", 3, 0))]
    local.open(5)
    assert local.frames() == [(frames.RST_STREAM, 5, struct.pack(">I", frames.REFUSED_STREAM))]
    drained = [local.connection.is_drained]
    for call in local.calls:
        call.sender.finish()
    drained.append(local.connection.is_drained)
    assert drained == [False, True]
    local.connection.connection_lost(None)


async def test_calls_that_are_open_when_the_time_is_over_answer() -> None:
    """One ends itself, one is ended with UNAVAILABLE; both clients get trailers before the connection closes."""

    class Last(Told):
        def drain(self) -> None:
            self.sender.send(b"now")
            self.sender.finish(7)

    listener = Listener("127.0.0.1:0", {ECHO: Last, HOLD: Told}, 10)
    await listener.start()
    async with raw(listener.address) as wire:
        wire.open(1, ECHO).open(3, HOLD)
        await wire.ping()
        stopping = asyncio.create_task(listener.stop(0))
        assert await wire.until(frames.DATA, 1) == b"\0\0\0\0\x03now"
        assert b"grpc-status\x017" in await wire.until(frames.HEADERS, 1)
        assert b"grpc-status\x0214" in await wire.until(frames.HEADERS, 3)
    await stopping


class _NoTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert data

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        assert list(list_of_data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


def _feed(connection: Connection, data: bytes) -> None:
    connection.get_buffer(-1)[: len(data)] = data
    connection.buffer_updated(len(data))


@settings(max_examples=300)
@given(st.lists(st.one_of(st.binary(max_size=40), st.tuples(st.integers(0, 12), st.integers(0, 255), st.integers(0, 7), st.binary(max_size=30))), max_size=20))
async def test_no_bytes_raise(parts: list[bytes | tuple[int, int, int, bytes]]) -> None:
    """Whatever comes: frames of any kind on any stream, and plain garbage."""
    connection = Connection(METHODS, 100)
    transport = _NoTransport()
    connection.connection_made(transport)
    _feed(connection, frames.PREFACE + frame(frames.SETTINGS, 0, 0))
    for part in parts:
        if transport.closed:
            break
        if isinstance(part, bytes):
            _feed(connection, part)
        else:
            kind, flags, stream, payload = part
            _feed(connection, frame(kind, flags, stream, payload))
    connection.connection_lost(None)
    assert connection.is_idle


def _cut(data: bytes, lengths: list[int]) -> Iterable[bytes]:
    """Pieces of these lengths and a large one, again and again."""
    at = 0
    for length in itertools.cycle((*lengths, 16_000)):
        if at >= len(data):
            return
        yield data[at : at + length]
        at += length


class _Keep(Echo):
    """Keeps what it is sent."""

    def __init__(self, kept: list[bytes]) -> None:
        self._kept = kept

    def receive(self, message: Message) -> None:
        self._kept.append(joined(message))

    def half_close(self) -> None:
        pass


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 3) | st.sampled_from([100, LARGE_BYTES, 50_000]), max_size=6),
    st.lists(st.integers(1, 16_384), max_size=8),
    st.lists(st.integers(1, 30_000), max_size=8),
)
async def test_messages_are_what_was_sent_however_they_arrive(sizes: list[int], lengths: list[int], reads: list[int]) -> None:
    """Cut into frames anywhere, and read in any pieces, each written over by the next."""
    messages = [bytes((number + at) % 251 for at in range(size)) for number, size in enumerate(sizes)]
    data = b"".join(b"\x00" + len(message).to_bytes(4, "big") + message for message in messages)
    sent = frames.PREFACE + frame(frames.SETTINGS, 0, 0) + opening(ECHO)
    for payload in _cut(data, lengths):
        sent += frame(frames.DATA, 0, 1, payload)
    kept: list[bytes] = []
    connection = Connection({ECHO: lambda _: _Keep(kept)}, 100)
    connection.connection_made(_NoTransport())
    for part in _cut(sent, reads):
        _feed(connection, part)
    assert kept == messages
    connection.connection_lost(None)


@settings(max_examples=100)
@given(st.lists(st.lists(st.sampled_from([0, 1, 9, LARGE_BYTES, 40_000]), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 70_000))
async def test_what_is_sent_fills_frames_within_the_windows(messages: list[list[int]], window: int) -> None:
    """Whatever pieces a message has: no frame is empty or too large, and nothing is sent before there is room for it."""
    senders: list[Sender] = []
    connection = Connection({HOLD: lambda sender: senders.append(sender) or Hold(sender)}, 100)  # type: ignore[func-returns-value]
    transport = _Recorder()
    connection.connection_made(transport)
    _feed(connection, frames.PREFACE + frame(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, window)) + opening(HOLD))
    expected = b""
    for number, sizes in enumerate(messages):
        parts = tuple(bytes((number,)) * size for size in sizes)
        senders[0].send(parts if len(parts) > 1 else parts[0])
        expected += b"\x00" + sum(sizes).to_bytes(4, "big") + b"".join(parts)
    await asyncio.sleep(0)
    room = min(window, frames.DEFAULT_WINDOW)
    assert b"".join(transport.payloads()) == expected[:room]
    for stream in (0, 1):
        _feed(connection, frame(frames.WINDOW_UPDATE, 0, stream, struct.pack(">I", 2**24)))
    assert b"".join(transport.payloads()) == expected
    assert all(0 < len(payload) <= 16_384 for payload in transport.payloads())
    connection.connection_lost(None)
    Hold.open_calls = 0


class _Recorder(_NoTransport):
    """What was written, as the payloads of its DATA frames."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.written += data

    def payloads(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.written):
            high, low, kind, _flags, _stream = struct.unpack_from(">HBBBI", self.written, at)
            size = high << 8 | low
            if kind == frames.DATA:
                found.append(bytes(self.written[at + 9 : at + 9 + size]))
            at += 9 + size
        return found
