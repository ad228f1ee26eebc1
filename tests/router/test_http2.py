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

from extproc.router import http2
from extproc.router.http2 import Connection, Message, Sender, joined
from extproc.router.listener import Listener

ECHO, HOLD = "/test.Echo/Echo", "/test.Echo/Hold"


class Echo:
    """Sends every message back, and ends when the client does."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def receive(self, message: Message) -> None:
        self._sender.send(joined(message))

    def half_close(self) -> None:
        self._sender.finish()

    def abandon(self) -> None:
        pass


class Hold:
    """Answers nothing; remembers how it ended."""

    open_calls = 0

    def __init__(self, _sender: Sender) -> None:
        Hold.open_calls += 1

    def receive(self, message: Message) -> None:
        pass

    def half_close(self) -> None:
        pass

    def abandon(self) -> None:
        Hold.open_calls -= 1


METHODS: http2.Methods = {ECHO: Echo, HOLD: Hold}


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


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def opening(path: str) -> bytes:
    """The headers of a call, as stream 1."""
    block = hpack.Encoder().encode([(":method", "POST"), (":scheme", "http"), (":path", path), ("te", "trailers")])
    return frame(http2.HEADERS, http2.END_HEADERS, 1, block)


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
        block = self._encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", path), ("te", "trailers")])
        return self.frame(http2.HEADERS, http2.END_HEADERS, stream, block)

    async def drain(self) -> None:
        await self._writer.drain()

    async def read(self) -> tuple[int, int, bytes]:
        head = await self._reader.readexactly(9)
        return head[3], int.from_bytes(head[5:9], "big"), await self._reader.readexactly(int.from_bytes(head[:3], "big"))

    async def goaway(self) -> int:
        """The error code that the server ends the connection with."""
        while True:
            kind, _, payload = await self.read()
            if kind == http2.GOAWAY:
                assert await self._reader.read() == b""
                return cast("int", struct.unpack(">II", payload[:8])[1])

    async def ping(self) -> None:
        """Wait until everything that was sent has been read by the server."""
        self.frame(http2.PING, 0, 0, b"12345678")
        while (await self.read())[0] != http2.PING:
            pass


@contextlib.asynccontextmanager
async def raw(address: str) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(http2.PREFACE)
    wire = Wire(reader, writer)
    wire.frame(http2.SETTINGS, 0, 0)
    try:
        yield wire
    finally:
        writer.close()


BROKEN: dict[str, tuple[int, Callable[[Wire], object]]] = {
    "data of a stream that is not open": (http2.PROTOCOL_ERROR, lambda w: w.frame(http2.DATA, 0, 1, b"x")),
    "an even stream": (http2.PROTOCOL_ERROR, lambda w: w.open(2)),
    "a push": (http2.PROTOCOL_ERROR, lambda w: w.frame(http2.PUSH_PROMISE, http2.END_HEADERS, 1, bytes(4))),
    "a short ping": (http2.FRAME_SIZE_ERROR, lambda w: w.frame(http2.PING, 0, 0, b"x")),
    "a short reset": (http2.FRAME_SIZE_ERROR, lambda w: w.frame(http2.RST_STREAM, 0, 1, b"x")),
    "broken settings": (http2.FRAME_SIZE_ERROR, lambda w: w.frame(http2.SETTINGS, 0, 0, b"x")),
    "a window of nothing": (http2.PROTOCOL_ERROR, lambda w: w.frame(http2.WINDOW_UPDATE, 0, 0, bytes(4))),
    "a window out of range": (http2.FLOW_CONTROL_ERROR, lambda w: w.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")),
    "headers that cannot be decoded": (http2.COMPRESSION_ERROR, lambda w: w.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff")),
    "a continuation of nothing": (http2.PROTOCOL_ERROR, lambda w: w.frame(http2.CONTINUATION, 0, 1)),
    "a block that is interrupted": (http2.PROTOCOL_ERROR, lambda w: w.frame(http2.HEADERS, 0, 1, b"\x83").frame(http2.PING, 0, 0, bytes(8))),
    "an endless block": (http2.ENHANCE_YOUR_CALM, lambda w: w.frame(http2.HEADERS, 0, 1, bytes(40_000)).frame(http2.CONTINUATION, 0, 1, bytes(40_000))),
    "padding longer than the frame": (http2.PROTOCOL_ERROR, lambda w: w.open(1).frame(http2.DATA, http2.PADDED, 1, b"\x05x")),
    "headers in the middle": (http2.PROTOCOL_ERROR, lambda w: w.open(1).open(1)),
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
        wire.frame(http2.SETTINGS, 0, 0, struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, 0))
        wire.open(1, ECHO)
        answered = b"\x00" + (300_000).to_bytes(4, "big") + bytes(300_000)  # by more than MAX_UNSENT_BYTES
        begun = b"\x00" + (2_000_000).to_bytes(4, "big")
        sent = (answered + begun).ljust(http2.STREAM_WINDOW + 1, b"\x00")  # nothing comes after the byte that is over the window
        for at in range(0, len(sent), http2.OUR_MAX_FRAME):
            wire.frame(http2.DATA, 0, 1, sent[at : at + http2.OUR_MAX_FRAME])
        assert await wire.goaway() == http2.FLOW_CONTROL_ERROR


async def test_streams_over_the_limit_are_refused() -> None:
    """With the code that lets a client try elsewhere; a place that is given back can be had again."""
    async with serving(max_streams=2) as (address, _), raw(address) as wire:
        for stream in (1, 3, 5):
            wire.open(stream)
        while (frame := await wire.read())[0] != http2.RST_STREAM:
            pass
        assert frame[1:] == (5, struct.pack(">I", http2.REFUSED_STREAM))
        wire.frame(http2.RST_STREAM, 0, 1, bytes(4))
        wire.open(7, "/test.Echo/None")
        while (frame := await wire.read())[0] != http2.HEADERS:
            pass
        assert frame[1] == 7


async def test_frames_over_the_limit_are_refused() -> None:
    """By their length alone, before they are read."""
    async with serving() as (address, _), raw(address) as wire:
        wire.announce(http2.DATA, 1, http2.OUR_MAX_FRAME + 1)
        assert await wire.goaway() == http2.FRAME_SIZE_ERROR


async def test_something_else_than_http2_is_closed() -> None:
    """Somebody sends HTTP/1.1 to the port."""
    async with serving() as (address, _):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"not an HTTP/2 client" in await reader.read()
        writer.close()


async def test_ten_thousand_streams_opened_and_dropped_leave_nothing() -> None:
    """Opened and reset at once, as a hostile client would."""
    async with serving() as (address, _), raw(address) as wire:
        for number in range(10_000):
            wire.open(2 * number + 1)
            wire.frame(http2.RST_STREAM, 0, 2 * number + 1, struct.pack(">I", http2.CANCEL))
            if number % 100 == 0:
                await wire.drain()
        await wire.ping()
        assert Hold.open_calls == 0


async def test_answers_that_nobody_reads_do_not_fill_the_memory() -> None:
    """A flood of pings from a client that does not read ends its connection."""
    async with serving() as (address, _):
        _reader, writer = await asyncio.open_connection(*address.split(":"), limit=1024)
        writer.write(http2.PREFACE)
        ping = frame(http2.PING, 0, 0, bytes(8))
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(ping * 10_000)
                await writer.drain()
        writer.transport.abort()


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
    _feed(connection, http2.PREFACE)
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
    for length in itertools.cycle((*lengths, 20_000)):
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
    st.lists(st.integers(0, 3) | st.sampled_from([100, http2.LARGE_BYTES, 50_000]), max_size=6),
    st.lists(st.integers(1, 20_000), max_size=8),
    st.lists(st.integers(1, 30_000), max_size=8),
)
async def test_messages_are_what_was_sent_however_they_arrive(sizes: list[int], frames: list[int], reads: list[int]) -> None:
    """Cut into frames anywhere, and read in any pieces, each written over by the next."""
    messages = [bytes((number + at) % 251 for at in range(size)) for number, size in enumerate(sizes)]
    data = b"".join(b"\x00" + len(message).to_bytes(4, "big") + message for message in messages)
    sent = http2.PREFACE + opening(ECHO)
    for payload in _cut(data, frames):
        sent += frame(http2.DATA, 0, 1, payload)
    kept: list[bytes] = []
    connection = Connection({ECHO: lambda _: _Keep(kept)}, 100)
    connection.connection_made(_NoTransport())
    for part in _cut(sent, reads):
        _feed(connection, part)
    assert kept == messages
    connection.connection_lost(None)


@settings(max_examples=100)
@given(st.lists(st.lists(st.sampled_from([0, 1, 9, http2.LARGE_BYTES, 40_000]), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 70_000))
async def test_what_is_sent_fills_frames_within_the_windows(messages: list[list[int]], window: int) -> None:
    """Whatever pieces a message has: no frame is empty or too large, and nothing is sent before there is room for it."""
    senders: list[Sender] = []
    connection = Connection({HOLD: lambda sender: senders.append(sender) or Hold(sender)}, 100)  # type: ignore[func-returns-value]
    transport = _Recorder()
    connection.connection_made(transport)
    _feed(connection, http2.PREFACE + frame(http2.SETTINGS, 0, 0, struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, window)) + opening(HOLD))
    expected = b""
    for number, sizes in enumerate(messages):
        parts = tuple(bytes((number,)) * size for size in sizes)
        senders[0].send(parts if len(parts) > 1 else parts[0])
        expected += b"\x00" + sum(sizes).to_bytes(4, "big") + b"".join(parts)
    await asyncio.sleep(0)
    room = min(window, http2.DEFAULT_WINDOW)
    assert b"".join(transport.payloads()) == expected[:room]
    for stream in (0, 1):
        _feed(connection, frame(http2.WINDOW_UPDATE, 0, stream, struct.pack(">I", 2**24)))
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
            if kind == http2.DATA:
                found.append(bytes(self.written[at + 9 : at + 9 + size]))
            at += 9 + size
        return found
