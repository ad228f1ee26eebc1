"""A small HTTP/2 server for gRPC calls, on asyncio: the transport of the hot path.

grpc.aio costs ten times what the router itself does per request: a task, two event loops and several context switches for every message. Here a
frame that arrives is a method call, and what is answered leaves in one write. It speaks what a gRPC client needs (RFC 9113, and gRPC over
HTTP/2) and nothing else: no priorities, no push, no compression of messages.

Header blocks are decoded by the `hpack` library. The peer is told to keep no dynamic table; from then on equal blocks mean equal headers, and a
gateway sends the same block for every stream, so it is decoded once.

Flow control: bytes of a stream are given back to its sender when its call has taken them, unless the call's own answers pile up: a slow
exchange then stops its own sender and nobody else's. The connection's window is given back at once; what all calls together may hold is the
caller's to limit.

Copies: all connections of a listener read into one buffer, since each read is dealt with before the next. What has to be kept is copied out of it,
and a message that came in several frames is handed over in its pieces, for the call to join what it needs. What is sent goes to the kernel from
where it lies.
"""

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import hpack

log = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM = 0x0, 0x1, 0x3, 0x5, 0x6, 0x7
CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 0x8, 0x9, 0xB
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 0x1, 0x3, 0x4, 0x5

DEFAULT_WINDOW = 65_535  # RFC 9113, 6.9.2: of a connection, and of streams until SETTINGS say otherwise
MAX_WINDOW = 2**31 - 1
STREAM_WINDOW = 2**20  # a 1 MB prompt needs no round trip of window updates
LARGE_BYTES = 8192  # what is smaller is cheaper to copy than to keep a view of
OUR_MAX_FRAME = 2**17  # fewer, larger frames; a peer that ignores it, as Envoy does, sends 16 KiB ones
READ_BYTES = 2**18  # at once; one whole frame at least
MAX_HEADER_BLOCK = 64 * 1024  # a gateway's has some hundred bytes
MAX_MESSAGE_BYTES = 64 * 2**20  # of one gRPC message; what a body may have is the router's to limit, with an answer that a client understands
MAX_UNSENT_BYTES = 256 * 1024  # of one stream, above which it is not given window
MAX_UNREAD_ANSWERS = 10_000  # control frames that a peer may cause while it reads nothing, before it is cut off
MAX_REMEMBERED_BLOCKS = 256

# gRPC status codes (grpc/status.h) used here
OK, UNIMPLEMENTED, INTERNAL, RESOURCE_EXHAUSTED = 0, 12, 13, 8

_FRAME_HEADER = struct.Struct(">HBBBI")  # a length of three bytes, type, flags, stream
_PREFIX = struct.Struct(">BI")  # of a gRPC message: whether it is compressed, its length

# HPACK without a dynamic table: 0x88 is ":status: 200" of the static table; then literals that are not to be indexed (RFC 7541, 6.2.2)
_RESPONSE_HEADERS = b"\x88\x0f\x10\x10application/grpc"


Buffer = bytes | memoryview
Message = Buffer | tuple[Buffer, ...]  # a large one may be in pieces, so that its body is not copied into it or out of it


_Payload = TypeVar("_Payload", bytes, memoryview)


def joined(message: Message) -> bytes:
    """A message as bytes that may be kept."""
    return b"".join(message) if isinstance(message, tuple) else bytes(message)


class Call(Protocol):
    """One gRPC call, as the transport drives it. Its methods return at once and raise nothing."""

    def receive(self, message: Message) -> None:
        """The next message of the client. Views are to be read before this returns: the next read writes over them."""

    def half_close(self) -> None:
        """The client sends no more."""

    def abandon(self) -> None:
        """The client, or its connection, has gone: nothing can be sent any more."""


class Sender(Protocol):
    """What a call answers with."""

    def send(self, message: Message) -> None:
        """Send one message, when the client's window allows."""

    def finish(self, status: int = OK, text: str = "") -> None:
        """End the call with a gRPC status."""


Methods = dict[str, Callable[[Sender], Call]]  # by ":path"


class _ConnectionError(Exception):
    """The peer broke the protocol; the connection ends."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class _Stream:
    """One call's two directions."""

    __slots__ = (
        "_connection",
        "call",
        "consumed",
        "ended_here",
        "ended_there",
        "id",
        "incoming",
        "missing",
        "send_window",
        "started",
        "trailers",
        "unsent",
        "unsent_bytes",
        "window",
    )

    def __init__(self, connection: "Connection", id_: int, send_window: int) -> None:
        self._connection = connection
        self.id = id_
        self.call: Call | None = None
        self.send_window = send_window
        self.window = STREAM_WINDOW  # what the client may still send
        self.consumed = 0  # taken by the call, not given back yet
        self.incoming: list[bytes] = []  # the beginning of a message
        self.missing = 0  # bytes until it is whole; 0 while its length is not known
        self.unsent: deque[memoryview] = deque()  # none of them empty
        self.unsent_bytes = 0
        self.trailers: bytes | None = None  # to be sent when that has gone
        self.started = False  # the response headers have been sent
        self.ended_there = False
        self.ended_here = False

    def send(self, message: Message) -> None:
        if not self.ended_here:
            self._connection.send_message(self, message)

    def finish(self, status: int = OK, text: str = "") -> None:
        if not self.ended_here:
            self.ended_here = True
            self._connection.send_trailers(self, status, text)


class Connection(asyncio.BufferedProtocol):
    """One client's connection. `reads` is where it reads to; connections of one event loop may share it."""

    def __init__(
        self,
        methods: Methods,
        max_streams: int,
        on_closed: Callable[["Connection"], None] = lambda _: None,
        on_idle: Callable[[], None] = lambda: None,
        reads: bytearray | None = None,
    ) -> None:
        self._methods = methods
        self._max_streams = max_streams
        self._on_closed = on_closed
        self._on_idle = on_idle  # no call is open any more
        self._transport: asyncio.Transport | None = None
        self._reads = memoryview(bytearray(READ_BYTES) if reads is None else reads)
        self._rest = b""  # of the last read: a frame that has only begun
        self._awaits_preface = True
        self._decoder = hpack.Decoder()
        self._remembered: dict[bytes, str] = {}  # header block -> path
        self._block: tuple[int, bytearray, bool] | None = None  # a header block that continues: stream, bytes, end of stream
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._send_window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._max_frame = 16_384
        self._uncredited = 0
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._flush_is_due = False
        self._in_read = False
        self._going_away = False
        self._paused = False  # the socket takes no more
        self._unread_answers = 0  # control frames made since then

    def __repr__(self) -> str:
        return f"<Connection [{len(self._streams)} streams, last {self._last_id}, window {self._send_window}]>"

    @property
    def is_idle(self) -> bool:
        """Whether no call is open."""
        return not self._streams

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        settings = ((HEADER_TABLE_SIZE, 0), (MAX_CONCURRENT_STREAMS, self._max_streams), (INITIAL_WINDOW_SIZE, STREAM_WINDOW), (MAX_FRAME_SIZE, OUR_MAX_FRAME))
        self._frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", name, value) for name, value in settings))
        self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW - DEFAULT_WINDOW))
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        self._reads[: len(self._rest)] = self._rest
        return self._reads[len(self._rest) :]

    def buffer_updated(self, nbytes: int) -> None:
        self._in_read = True
        try:
            self._read(self._reads[: len(self._rest) + nbytes])
        except _ConnectionError as error:
            log.info("closing %r: %s", self, error)
            self._frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, error.code) + str(error).encode())
            self._flush()
            self.close()
        finally:
            self._in_read = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._transport = None
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            self._abandon(stream)
        self._on_closed(self)

    def eof_received(self) -> None:
        self.close()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._unread_answers = 0
        self._send_more()
        self._flush()

    # -- for the server

    def go_away(self) -> None:
        """Take no new streams; those that run go on."""
        if not self._going_away:
            self._going_away = True
            self._frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, NO_ERROR))
            self._flush()

    def close(self) -> None:
        """End the connection when what was written is sent; at once if nobody reads it."""
        if self._transport is not None:
            self._transport.abort() if self._paused else self._transport.close()

    # -- reading

    def _read(self, data: memoryview) -> None:
        position, size = 0, len(data)
        if self._awaits_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise _ConnectionError(PROTOCOL_ERROR, "not an HTTP/2 client")
            if size < len(PREFACE):
                self._rest = bytes(data)
                return
            self._awaits_preface = False
            position = len(PREFACE)
        while size - position >= _FRAME_HEADER.size:
            high, low, kind, flags, stream_id = _FRAME_HEADER.unpack_from(data, position)
            length = high << 8 | low
            if length > OUR_MAX_FRAME:
                raise _ConnectionError(FRAME_SIZE_ERROR, f"a frame of {length} bytes; the limit is {OUR_MAX_FRAME}")
            begin = position + _FRAME_HEADER.size
            if begin + length > size:
                break
            position = begin + length
            if self._block is not None and kind != CONTINUATION:
                raise _ConnectionError(PROTOCOL_ERROR, "a header block was not continued")
            if kind == DATA:
                self._on_data(flags, stream_id & MAX_WINDOW, data[begin:position])
            else:
                self._handle(kind, flags, stream_id & MAX_WINDOW, bytes(data[begin:position]))
        self._rest = bytes(data[position:])

    def _handle(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._on_window_update(stream_id, payload)
        elif kind == HEADERS:
            block = _unpad(payload, flags)
            if flags & PRIORITY_FLAG:
                block = block[5:]
            self._on_header_block(stream_id, bytearray(block), bool(flags & END_STREAM), bool(flags & END_HEADERS))
        elif kind == CONTINUATION:
            if self._block is None or self._block[0] != stream_id:
                raise _ConnectionError(PROTOCOL_ERROR, "a continuation of nothing")
            _, begun, end_stream = self._block
            begun += payload
            self._on_header_block(stream_id, begun, end_stream, bool(flags & END_HEADERS))
        elif kind == RST_STREAM:
            self._on_reset(stream_id, payload)
        elif kind == SETTINGS:
            self._on_settings(flags, stream_id, payload)
        elif kind == PING:
            if len(payload) != 8 or stream_id:
                raise _ConnectionError(FRAME_SIZE_ERROR, "a ping of another size than 8")
            if not flags & ACK:
                self._frame(PING, ACK, 0, payload)
                self._check_backlog()
        elif kind == PUSH_PROMISE:
            raise _ConnectionError(PROTOCOL_ERROR, "a client cannot push")
        # GOAWAY: the client takes no streams of ours, and there are none. PRIORITY and unknown kinds: "MUST be ignored" (4.1).

    def _on_header_block(self, stream_id: int, block: bytearray, end_stream: bool, end_headers: bool) -> None:
        if len(block) > MAX_HEADER_BLOCK:
            raise _ConnectionError(ENHANCE_YOUR_CALM, f"a header block over {MAX_HEADER_BLOCK} bytes")
        if not end_headers:
            self._block = (stream_id, block, end_stream)
            return
        self._block = None
        path = self._path(bytes(block))
        stream = self._streams.get(stream_id)
        if stream is not None:  # trailers of the request: gRPC clients send none, and they can only end the stream
            if not end_stream or stream.ended_there:
                raise _ConnectionError(PROTOCOL_ERROR, "headers in the middle of a stream")
            self._end_of_client(stream)
            return
        if not stream_id % 2:
            raise _ConnectionError(PROTOCOL_ERROR, f"stream {stream_id} is not a client's to open")
        if stream_id <= self._last_id:
            return  # of a stream that was reset here, while this was on its way
        self._last_id = stream_id
        if len(self._streams) >= self._max_streams or self._going_away:
            self._reset(stream_id, REFUSED_STREAM)
            return
        stream = self._streams[stream_id] = _Stream(self, stream_id, self._initial_window)
        method = self._methods.get(path)
        if method is None:
            stream.finish(UNIMPLEMENTED, f"no method {path}")
            return
        stream.call = method(stream)
        if end_stream:
            self._end_of_client(stream)

    def _path(self, block: bytes) -> str:
        path = self._remembered.get(block)
        if path is not None:
            return path
        try:
            headers = self._decoder.decode(block, raw=True)
            path = next((value.decode("latin-1") for name, value in headers if name == b":path"), "")
        except hpack.HPACKError as error:
            raise _ConnectionError(COMPRESSION_ERROR, f"a header block that cannot be decoded: {error}") from error
        if self._decoder.header_table_size == 0 and len(self._remembered) < MAX_REMEMBERED_BLOCKS:
            self._remembered[block] = path
        return path

    def _on_data(self, flags: int, stream_id: int, payload: memoryview) -> None:
        size = len(payload)
        self._uncredited += size
        if self._uncredited >= STREAM_WINDOW:
            self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._uncredited))
            self._uncredited = 0
        stream = self._streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id or not stream_id:
                raise _ConnectionError(PROTOCOL_ERROR, f"data of stream {stream_id}, which is not open")
            return  # it was reset here, while this was on its way
        stream.window -= size
        if stream.window < 0:
            raise _ConnectionError(FLOW_CONTROL_ERROR, f"stream {stream_id} sent more than its window")
        if stream.ended_there:
            raise _ConnectionError(STREAM_CLOSED, f"data of stream {stream_id} after its end")
        if stream.call is not None and not self._take_messages(stream, _unpad(payload, flags)):
            return
        stream.consumed += size
        self._give_window(stream)
        if flags & END_STREAM:
            self._end_of_client(stream)

    def _take_messages(self, stream: _Stream, data: memoryview) -> bool:
        """Cut the stream's bytes into gRPC messages: a flag byte, a length, the message. False if that ended the stream."""
        if len(data) < stream.missing:  # as most frames of a large body
            stream.incoming.append(bytes(data))
            stream.missing -= len(data)
            return True
        if stream.missing:
            first, *others = stream.incoming
            message: tuple[Buffer, ...] = (memoryview(first)[_PREFIX.size :], *others, data[: stream.missing])
            data = data[stream.missing :]
            stream.incoming, stream.missing = [], 0
            if not self._hand_over(stream, message):
                return False
        elif stream.incoming:  # of so little that its length is not known
            data = memoryview(b"".join((*stream.incoming, data)))
            stream.incoming = []
        position, size = 0, len(data)
        while size - position >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(data, position)
            if compressed:
                return self._refuse(stream, UNIMPLEMENTED, "compressed messages are not understood")
            if length > MAX_MESSAGE_BYTES:
                return self._refuse(stream, RESOURCE_EXHAUSTED, f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
            begin = position + _PREFIX.size
            end = begin + length
            if end > size:
                stream.missing = end - size
                break
            if not self._hand_over(stream, bytes(data[begin:end]) if length < LARGE_BYTES else data[begin:end]):
                return False
            position = end
        if position < size:
            stream.incoming.append(bytes(data[position:]))
        return True

    def _hand_over(self, stream: _Stream, message: Message) -> bool:
        """False if the stream is over, before or because of it."""
        if stream.call is None:
            return False
        stream.call.receive(message)
        return stream.id in self._streams

    def _refuse(self, stream: _Stream, status: int, text: str) -> bool:
        self._abandon(stream)
        stream.finish(status, text)
        return False

    def _end_of_client(self, stream: _Stream) -> None:
        stream.ended_there = True
        if stream.call is not None:
            stream.call.half_close()
        self._forget_if_done(stream)

    def _on_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionError(FRAME_SIZE_ERROR, "a reset of another size than 4")
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            self._abandon(stream)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) % 6:
            raise _ConnectionError(FRAME_SIZE_ERROR, "broken settings")
        if flags & ACK:
            self._decoder.max_allowed_table_size = 0
            return
        for name, value in struct.iter_unpack(">HI", payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise _ConnectionError(FLOW_CONTROL_ERROR, "an initial window over 2^31-1")
                change, self._initial_window = value - self._initial_window, value
                for stream in self._streams.values():
                    stream.send_window += change
            elif name == MAX_FRAME_SIZE:
                self._max_frame = min(max(value, 16_384), OUR_MAX_FRAME)
        self._frame(SETTINGS, ACK, 0, b"")
        self._check_backlog()
        self._send_more()

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionError(FRAME_SIZE_ERROR, "a window update of another size than 4")
        increment = int.from_bytes(payload, "big") & MAX_WINDOW
        if stream_id:
            stream = self._streams.get(stream_id)
            if stream is None:
                return
            stream.send_window += increment
            if not increment or stream.send_window > MAX_WINDOW:
                self._forget(stream)
                self._abandon(stream)
                self._reset(stream_id, FLOW_CONTROL_ERROR if increment else PROTOCOL_ERROR)
                return
            self._send_unsent(stream)
            return
        self._send_window += increment
        if not increment or self._send_window > MAX_WINDOW:
            raise _ConnectionError(FLOW_CONTROL_ERROR if increment else PROTOCOL_ERROR, "a connection window out of range")
        self._send_more()

    # -- writing

    def send_message(self, stream: _Stream, message: Message) -> None:
        """One gRPC message: as much as the windows allow now, the rest when they open."""
        if not stream.started:
            stream.started = True
            self._frame(HEADERS, END_HEADERS, stream.id, _RESPONSE_HEADERS)
        parts = message if isinstance(message, tuple) else (message,)
        size = sum(map(len, parts))
        stream.unsent.append(memoryview(_PREFIX.pack(0, size) + parts[0]))  # views are cut into frames without copying
        stream.unsent.extend(memoryview(part) for part in parts[1:] if part)
        stream.unsent_bytes += _PREFIX.size + size
        self._send_unsent(stream)
        self._flush_soon()

    def send_trailers(self, stream: _Stream, status: int, text: str) -> None:
        """The end of the call, after all that was sent before."""
        fields = b"" if stream.started else _RESPONSE_HEADERS
        fields += _literal(b"grpc-status", str(status).encode())
        if text:
            fields += _literal(b"grpc-message", text.encode("ascii", "replace").replace(b"%", b"%25")[:120])
        stream.started = True
        stream.trailers = fields
        self._send_unsent(stream)
        self._flush_soon()

    def _send_more(self) -> None:
        for stream in [stream for stream in self._streams.values() if stream.unsent or stream.trailers is not None]:
            self._send_unsent(stream)

    def _send_unsent(self, stream: _Stream) -> None:
        while stream.unsent:
            size = min(stream.unsent_bytes, stream.send_window, self._send_window, self._max_frame)
            if size <= 0 or self._paused:
                return
            self._fill_frame(stream, size)
        if stream.trailers is not None:
            trailers, stream.trailers = stream.trailers, None
            self._frame(HEADERS, END_HEADERS | END_STREAM, stream.id, trailers)
            self._forget_if_done(stream)
            return
        self._give_window(stream)

    def _fill_frame(self, stream: _Stream, size: int) -> None:
        """One frame of the next `size` bytes, from as many pieces as that takes."""
        stream.send_window -= size
        self._send_window -= size
        stream.unsent_bytes -= size
        self._out_bytes += size
        self._out.append(_FRAME_HEADER.pack(size >> 8, size & 0xFF, DATA, 0, stream.id))
        while size:
            part = stream.unsent[0]
            if len(part) <= size:
                stream.unsent.popleft()
            else:
                part, stream.unsent[0] = part[:size], part[size:]
            self._out.append(part)
            size -= len(part)

    def _give_window(self, stream: _Stream) -> None:
        """Let the client send more, once half of its window was taken and what it is answered does not pile up."""
        if stream.consumed >= STREAM_WINDOW // 2 and stream.unsent_bytes <= MAX_UNSENT_BYTES and not stream.ended_there:
            self._frame(WINDOW_UPDATE, 0, stream.id, struct.pack(">I", stream.consumed))
            stream.window += stream.consumed
            stream.consumed = 0

    def _forget_if_done(self, stream: _Stream) -> None:
        if not stream.ended_here or stream.unsent or stream.trailers is not None or stream.id not in self._streams:
            return
        self._forget(stream)
        stream.call = None  # the call knows its stream: without this cut the two would wait for the collector of cycles
        if not stream.ended_there:  # "the server can RST_STREAM with NO_ERROR after a complete response" (RFC 9113, 8.1)
            self._reset(stream.id, NO_ERROR)

    def _forget(self, stream: _Stream) -> None:
        """The one way out of the table of streams: whoever drains waits for the last."""
        del self._streams[stream.id]
        if not self._streams:
            self._on_idle()

    def _abandon(self, stream: _Stream) -> None:
        call, stream.call = stream.call, None
        if call is not None:
            call.abandon()

    def _reset(self, stream_id: int, code: int) -> None:
        self._frame(RST_STREAM, 0, stream_id, struct.pack(">I", code))
        self._check_backlog()

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        self._out_bytes += len(payload)
        self._out.append(_FRAME_HEADER.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id))
        self._out.append(payload)

    def _check_backlog(self) -> None:
        """A peer that makes us answer and does not read is cut off before its answers fill the memory."""
        self._unread_answers += self._paused
        if self._unread_answers > MAX_UNREAD_ANSWERS:
            self._out = []
            raise _ConnectionError(ENHANCE_YOUR_CALM, "answers are not read")

    def _flush_soon(self) -> None:
        """Frames that are made outside of a read leave together at the end of this turn of the loop."""
        if not self._in_read and not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._out and self._transport is not None:
            if self._out_bytes < LARGE_BYTES:
                self._transport.write(b"".join(self._out))
            else:
                self._transport.writelines(self._out)
        self._out, self._out_bytes = [], 0


def _unpad(payload: _Payload, flags: int) -> _Payload:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _ConnectionError(PROTOCOL_ERROR, "padding longer than the frame")
    return payload[1 : len(payload) - payload[0]]


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that is not to be indexed, with a new name; both shorter than 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value
