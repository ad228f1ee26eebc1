"""One client's connection: frames in, calls driven, frames out.

Flow control: bytes of a stream are given back to its sender when its call has taken them, unless the call's own answers pile up: a slow
exchange then stops its own sender and nobody else's. The connection's window is given back at once; what all calls together may hold is the
caller's to limit, and `Call.holds` tells it of bytes that are no whole message yet.

Copies: all connections of a listener read into one buffer, since each read is dealt with before the next. What has to be kept is copied out of it,
and a message that came in several frames is handed over in its pieces, for the call to join what it needs. What is sent goes to the kernel from
where it lies.
"""

import asyncio
import contextlib
import logging
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar, cast

from .calls import OK, UNAVAILABLE, UNIMPLEMENTED, Message, Methods
from .frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEAD,
    HEAD_BYTES,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    INTERNAL_ERROR,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_WINDOW,
    MIN_MAX_FRAME,
    NAMES,
    NO_ERROR,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_BYTES,
    PRIORITY_FLAG,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTING,
    SETTINGS,
    WINDOW_UPDATE,
    WORD,
    ConnectionFault,
    read_settings,
    unpad,
)
from .headers import METHOD_NOT_ALLOWED, UNSUPPORTED_MEDIA_TYPE, Blocks, Request
from .outbox import RESPONSE_HEADERS, Outbox
from .patience import DROP_AFTER_TICKS, MAX_USELESS, TICK_S, Patience, Silence
from .streams import LARGE_BYTES, PREFIX, PREFIX_BYTES, STREAM_WINDOW, VERDICTS, Closed, Refused, State, Stream, Verdict, error_code

log = logging.getLogger(__name__)

MAX_SENT_FRAME = 2**17  # where the peer takes frames so large; what it sends itself is of MIN_MAX_FRAME at most, as Envoy's frames are anyway
READ_BYTES = 2**16  # at once, and then others have their turn: 400 calls that begin, or 7,000 frames of one byte
MAX_HEADER_BLOCK = 64 * 1024  # a gateway's has some hundred bytes
MAX_MESSAGE_BYTES = 64 * 2**20  # of one gRPC message, unless the listener says otherwise
MAX_UNSENT_BYTES = 256 * 1024  # of one stream, above which it is not given window
MAX_LINGER_BYTES = 2**16  # of a request that was answered 405 or 415 already; then its stream is reset

_KEEPALIVE, _LEAVING = b"keepaliv", b"leaving!"  # what the pings say

GOAWAY_WAIT_S = 1.0  # between the two GOAWAYs, where the ping between them is not answered
LINGER_S = 1.0  # after the last word, until the peer closes; closing at once could make its kernel throw that word away


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that is not to be indexed, with a new name; both shorter than 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


_OK_TRAILERS = _literal(b"grpc-status", b"0")
_TEXT = b"\x0f\x10\x0atext/plain"  # content-type
_REFUSALS = {  # header block and body
    METHOD_NOT_ALLOWED: (b"\x08\x03405" + _TEXT + b"\x0f\x07\x04POST", b"405: this port serves gRPC, which is POST only\n"),
    UNSUPPORTED_MEDIA_TYPE: (b"\x08\x03415" + _TEXT, b"415: this port serves gRPC, whose content-type is application/grpc\n"),
}


def _nothing(*_: object) -> None:
    pass


_Rule = tuple[int, int | None, bool | None, Callable[["Connection", int, int, bytes], None]]


class Connection(asyncio.BufferedProtocol):
    """One client's connection. `reads` is where it reads to; connections of one event loop may share it.

    Its owner calls `tick` every TICK_S, and hears when the connection is made, when no call is open any more, and when it is lost.
    """

    def __init__(
        self,
        methods: Methods,
        max_streams: int,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        on_made: Callable[["Connection"], None] = _nothing,
        on_idle: Callable[[], None] = _nothing,
        on_lost: Callable[["Connection"], None] = _nothing,
        reads: bytearray | None = None,
    ) -> None:
        self._methods = methods
        self._max_streams = max_streams
        self._max_message_bytes = max_message_bytes
        self._on_made, self._on_idle, self._on_lost = on_made, on_idle, on_lost
        self._transport: asyncio.Transport | None = None
        self._timers: list[asyncio.TimerHandle] = []
        # reading
        self._reads = memoryview(bytearray(READ_BYTES) if reads is None else reads)
        self._rest = b""  # of the last read: a frame that has only begun
        self._awaits_preface = True
        self._blocks = Blocks()
        self._block: tuple[int, bytearray, bool, bool] | None = None  # that continues: stream, bytes, whether it ends it, and whether it depends on itself
        self._streams: dict[int, Stream] = {}
        self._closed = Closed()
        self._last_id = 0
        self._uncredited = 0
        self._changed: dict[int, Stream] = {}  # those whose unfinished message has grown in this read
        self._outbox = Outbox(self._sent, self._cut_off)
        # the end
        self._going_away = False  # said so
        self._refuses = False  # has said which stream is the last
        self._over = False  # nothing is read or written any more
        self._patience = Patience()
        self._now = 0.0  # when the last read was
        self._has_failed = False  # a call
        self._counted_to = 0  # the last stream when they were counted last

    def __repr__(self) -> str:
        return f"<Connection [{len(self._streams)} streams, last {self._last_id}]>"

    @property
    def is_idle(self) -> bool:
        """Whether no call is open."""
        return not self._streams

    @property
    def is_drained(self) -> bool:
        """Whether no call is open, and none will be."""
        return self._over or self._transport is None or (self._refuses and not self._streams)

    def count_opened(self) -> int:
        """Calls that were opened since this was asked last."""
        before, self._counted_to = self._counted_to, self._last_id
        return (self._last_id - before + 1) // 2

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._outbox.transport = cast("asyncio.Transport", transport)
        settings = ((HEADER_TABLE_SIZE, 0), (MAX_CONCURRENT_STREAMS, self._max_streams), (INITIAL_WINDOW_SIZE, STREAM_WINDOW))
        self._frame(SETTINGS, 0, 0, b"".join(SETTING.pack(name, value) for name, value in settings))
        self._frame(WINDOW_UPDATE, 0, 0, WORD.pack(MAX_WINDOW - DEFAULT_WINDOW))
        self._outbox.flush()
        self._on_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        self._reads[: len(self._rest)] = self._rest
        return self._reads[len(self._rest) :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._over:
            return
        self._patience.heard = True
        self._now = time.monotonic()
        before = len(self._rest)
        self._outbox.waits_for_flush = True
        try:
            self._read(self._reads[: len(self._rest) + nbytes])
            if self._changed:
                self._tell_held()
        except ConnectionFault as error:
            self._break_off(error.code, str(error))
        finally:
            self._outbox.waits_for_flush = False
        self._outbox.flush()
        if nbytes == len(self._reads) - before and self._transport is not None and not self._over:
            self._transport.pause_reading()  # there is more, which the loop would go on reading for as long as it fills the buffer
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self._over:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._over = True
        self._transport = None
        for timer in self._timers:
            timer.cancel()
        self._drop_streams()
        self._on_lost(self)

    def eof_received(self) -> None:
        """The client says no more: asyncio closes the connection after this."""

    def pause_writing(self) -> None:
        self._outbox.is_paused = True

    def resume_writing(self) -> None:
        self._outbox.resume()

    # -- for the listener

    def tick(self) -> None:
        """Time has passed: see whether the peer still lives, as far as that matters to anybody."""
        silence = self._patience.tick(bool(self._streams))
        if silence is Silence.PING:
            self._frame(PING, 0, 0, _KEEPALIVE)
            self._outbox.flush()
        elif silence is Silence.DROP:
            self._cut_off(f"nothing was heard for {DROP_AFTER_TICKS * TICK_S:g} s, not even the answer to a ping")

    def go_away(self) -> None:
        """Take no new streams, but those that are on their way; those that run go on.

        "A server that is attempting to gracefully shut down a connection SHOULD send an initial GOAWAY frame with the last stream identifier set to
        2^31-1 [...]. After allowing time for any in-flight stream creation (at least one round-trip time), the server MAY send another GOAWAY frame with an
        updated last stream identifier" (6.8). The answer to a ping shows that the round trip is over.
        """
        if self._going_away or self._transport is None or self._over:
            return
        self._going_away = True
        if self._awaits_preface:
            self._refuse_new()
            return
        self._frame(GOAWAY, 0, 0, struct.pack(">II", MAX_WINDOW, NO_ERROR))
        self._frame(PING, 0, 0, _LEAVING)
        self._outbox.flush()
        self._timers.append(asyncio.get_running_loop().call_later(GOAWAY_WAIT_S, self._refuse_new))

    def open_calls(self) -> tuple[Stream, ...]:
        """Those that may still answer, for `answer_now`."""
        return tuple(stream for stream in self._streams.values() if stream.call is not None)

    def answer_now(self, stream: Stream) -> None:
        """The time for draining is over: have a call answer, and end it if it does not end itself."""
        if stream.call is None:
            return
        self._run(stream, stream.call.drain)
        if stream.id in self._streams and not stream.ended_here:
            self._abandon(stream)
            stream.finish(UNAVAILABLE, "the server stops")

    def close(self) -> None:
        """End the connection when what was written is sent and the peer has closed its side, or after LINGER_S; at once if nobody reads it."""
        if self._transport is None:
            return
        self._outbox.flush()
        self._over = True
        if self._outbox.is_paused:
            self._transport.abort()
            return
        try:
            can_half_close = self._transport.can_write_eof()
        except NotImplementedError:  # asyncio's own TLS transport
            can_half_close = False
        if not can_half_close:
            self._transport.close()
            return
        with contextlib.suppress(OSError):  # the peer has gone already
            self._transport.write_eof()
        self._timers.append(asyncio.get_running_loop().call_later(LINGER_S, self.abort))

    def abort(self) -> None:
        """End the connection now, whatever is unsent."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    # -- the end

    def _refuse_new(self) -> None:
        """The second GOAWAY, with the true last stream: later ones are refused."""
        if self._refuses or self._over:
            return
        self._refuses = True
        self._frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, NO_ERROR))
        for stream in [stream for stream in self._streams.values() if stream.lingers and not stream.ending]:
            self._forget(stream)
            self._reset(stream.id, NO_ERROR)
        self._outbox.flush()
        self._on_idle()

    def _break_off(self, code: int, why: str) -> None:
        """The peer broke the protocol."""
        log.info("closing %r: %s", self, why)
        self._frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, code) + why.encode())
        self._outbox.flush()
        self.close()
        self._drop_streams()

    def _cut_off(self, why: str) -> None:
        """The peer does not even read what is wrong. Raises nothing: this may be reached from inside a call."""
        if not self._over:
            log.info("cutting off %r: %s", self, why)
            self.abort()

    def _drop_streams(self) -> None:
        streams, self._streams = list(self._streams.values()), {}
        self._outbox.shut()
        for stream in streams:
            stream.ended_here = True
            self._abandon(stream)

    # -- reading

    def _read(self, data: memoryview) -> None:
        position, size = 0, len(data)
        if self._awaits_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionFault(PROTOCOL_ERROR, "not an HTTP/2 client")
            if size < len(PREFACE) + HEAD_BYTES:
                self._rest = bytes(data)
                return
            _, _, kind, flags, _ = HEAD.unpack_from(data, len(PREFACE))
            if kind != SETTINGS or flags & ACK:
                raise ConnectionFault(PROTOCOL_ERROR, "SETTINGS do not come first")  # 3.4
            self._awaits_preface = False
            position = len(PREFACE)
        while size - position >= HEAD_BYTES:
            high, low, kind, flags, stream_id = HEAD.unpack_from(data, position)
            length = high << 8 | low
            if length > MIN_MAX_FRAME:
                raise ConnectionFault(FRAME_SIZE_ERROR, f"a frame of {length} bytes; the limit is {MIN_MAX_FRAME}")
            begin = position + HEAD_BYTES
            if begin + length > size:
                break
            position = begin + length
            if self._block is not None and kind != CONTINUATION:
                raise ConnectionFault(PROTOCOL_ERROR, "a header block was not continued")
            if kind == DATA:
                self._on_data(flags, stream_id & MAX_WINDOW, data[begin:position])
            else:
                self._on_other(kind, flags, stream_id & MAX_WINDOW, data[begin:position].tobytes())
            if self._over:
                return
        self._rest = data[position:].tobytes()

    def _on_other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        weight, size, on_stream, handler = self._RULES.get(kind, self._UNKNOWN)
        self._spend(weight)
        if on_stream is not None and on_stream is not bool(stream_id):
            raise ConnectionFault(PROTOCOL_ERROR, f"{NAMES[kind]} on stream {stream_id}")
        if size is not None and len(payload) != size:
            why = f"{NAMES[kind]} of {len(payload)} bytes, not {size}"
            if kind != PRIORITY:
                raise ConnectionFault(FRAME_SIZE_ERROR, why)
            self._stream_fault(stream_id, FRAME_SIZE_ERROR, why)
            return
        handler(self, flags, stream_id, payload)

    def _spend(self, weight: int = 1) -> None:
        patience = self._patience
        patience.useless += weight
        if patience.useless > MAX_USELESS:
            patience.judge(self._outbox.sent)

    def _state(self, stream_id: int) -> State | None:
        """None of a stream below the last that was never open, or so long ago that it is forgotten."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            return State.HALF_CLOSED if stream.ended_there else State.OPEN
        if stream_id > self._last_id or not stream_id % 2:
            return State.IDLE
        return self._closed.state(stream_id)

    def _may(self, kind: int, stream_id: int) -> bool:
        """Whether a frame is to be taken in its stream's state; if it must not come, its error is dealt with here."""
        state = self._state(stream_id)
        if state is None:
            if kind == HEADERS:  # 5.1.1: "MUST be numerically greater than all streams that the initiating endpoint has opened"
                raise ConnectionFault(PROTOCOL_ERROR, f"stream {stream_id} is opened after stream {self._last_id}")
            state = State.RESET_HERE  # perhaps its last frames were long on their way
        verdict = VERDICTS[kind, state]
        if verdict is Verdict.TAKE:
            return True
        why = f"{NAMES[kind]} on stream {stream_id}, which is {state.name.lower()}"
        if verdict is Verdict.CONNECTION_ERROR:
            raise ConnectionFault(error_code(state), why)
        if verdict is Verdict.STREAM_ERROR:
            self._stream_fault(stream_id, error_code(state), why)
        return False

    def _stream_fault(self, stream_id: int, code: int, why: str) -> None:
        """A fault that costs its stream only. An idle stream cannot be reset, so there it costs the connection."""
        state = self._state(stream_id)
        if state is State.IDLE:
            raise ConnectionFault(code, why)
        if state in {State.RESET_HERE, None}:  # "SHOULD NOT send more than one RST_STREAM frame for any stream" (5.4.2)
            return
        log.debug("resetting stream %d of %r: %s", stream_id, self, why)
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            stream.ended_here = True
            self._abandon(stream)
        self._reset(stream_id, code)

    # -- header blocks

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        block = unpad(payload, flags) if flags & PADDED else payload
        depends_on_itself = False
        if flags & PRIORITY_FLAG:
            if len(block) < PRIORITY_BYTES:
                raise ConnectionFault(FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            depends_on_itself = _dependency(block) == stream_id
            block = block[PRIORITY_BYTES:]
        if flags & END_HEADERS:
            self._on_block(stream_id, block, bool(flags & END_STREAM), depends_on_itself)
        else:
            self._continue(stream_id, bytearray(block), bool(flags & END_STREAM), depends_on_itself)

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "a continuation of nothing")
        _, block, end_stream, depends_on_itself = self._block
        block += payload
        self._continue(stream_id, block, end_stream, depends_on_itself)
        if flags & END_HEADERS:
            self._block = None
            self._on_block(stream_id, bytes(block), end_stream, depends_on_itself)

    def _continue(self, stream_id: int, block: bytearray, end_stream: bool, depends_on_itself: bool) -> None:
        if len(block) > MAX_HEADER_BLOCK:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"a header block over {MAX_HEADER_BLOCK} bytes")
        self._block = (stream_id, block, end_stream, depends_on_itself)

    def _on_block(self, stream_id: int, block: bytes, end_stream: bool, depends_on_itself: bool) -> None:
        """The headers or the trailers of a request. Whatever comes of it, the block is read: the peer's compression may depend on it."""
        if len(block) > MAX_HEADER_BLOCK:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"a header block over {MAX_HEADER_BLOCK} bytes")
        if not stream_id % 2:
            raise ConnectionFault(PROTOCOL_ERROR, f"stream {stream_id} is not a client's to open")
        if stream_id > self._last_id:
            request = self._blocks.request(block)
            self._last_id = stream_id
            malformed = request.malformed
            if depends_on_itself:
                malformed = "it depends on itself"
            elif end_stream and request.length > 0:
                malformed = "less data than its content-length"
            if malformed:
                log.debug("resetting stream %d of %r: %s", stream_id, self, malformed)
                self._reset(stream_id, PROTOCOL_ERROR)
            elif len(self._streams) >= self._max_streams or self._refuses:
                self._reset(stream_id, REFUSED_STREAM)
            else:
                self._open(stream_id, request, end_stream)
            return
        malformed = self._blocks.trailers(block)
        if not self._may(HEADERS, stream_id):
            return
        if depends_on_itself or malformed or not end_stream:
            self._stream_fault(stream_id, PROTOCOL_ERROR, malformed or "headers in the middle of a stream")
            return
        self._end_of_client(self._streams[stream_id])

    def _open(self, stream_id: int, request: Request, end_stream: bool) -> None:
        self._patience.useless = 0
        stream = self._streams[stream_id] = Stream(self, self._outbox, stream_id, self._now, request.length)
        stream.ended_there = end_stream
        if request.status:
            self._answer(stream, request)
        else:
            method = self._methods.get(request.path)
            if method is None:
                stream.finish(UNIMPLEMENTED, f"no method {request.path}")
                return
            try:
                stream.call = method(stream)
            except Exception as error:
                self._call_failed(stream, error)
        if end_stream and stream_id in self._streams:
            self._end_of_client(stream)

    def _answer(self, stream: Stream, request: Request) -> None:
        """A request that is not gRPC's: a status and a line that says why. What is left of it is looked at, but not kept."""
        block, text = _REFUSALS[request.status]
        stream.started = stream.ended_here = stream.lingers = True
        if request.is_head:
            stream.ending = (HEADERS, block)
        else:
            self._frame(HEADERS, END_HEADERS, stream.id, block)
            stream.unsent = deque((memoryview(text),))
            stream.unsent_bytes = len(text)
            stream.ending = (DATA, b"")
        self._outbox.proceed(stream)

    # -- the client's bytes

    def _on_data(self, flags: int, stream_id: int, payload: memoryview) -> None:
        if not stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "DATA on stream 0")
        size = len(payload)
        self._uncredited += size
        if self._uncredited >= STREAM_WINDOW:
            self._frame(WINDOW_UPDATE, 0, 0, WORD.pack(self._uncredited))
            self._uncredited = 0
        data = unpad(payload, flags) if flags & PADDED else payload
        stream = self._streams.get(stream_id)
        if stream is None or stream.ended_there:
            self._spend()
            self._may(DATA, stream_id)
            return
        stream.window -= size
        if stream.window < 0:
            raise ConnectionFault(FLOW_CONTROL_ERROR, f"stream {stream_id} sent more than its window")
        if stream.remaining >= 0:
            stream.remaining -= len(data)
            if stream.remaining < 0:
                self._stream_fault(stream_id, PROTOCOL_ERROR, "more data than its content-length")
                return
        end_stream = bool(flags & END_STREAM)
        if data:
            self._patience.useless = 0
        elif not end_stream:
            self._spend()
        if stream.ended_here:
            if stream.lingers and STREAM_WINDOW - stream.window > MAX_LINGER_BYTES and not end_stream:
                self._stream_fault(stream_id, NO_ERROR, f"{MAX_LINGER_BYTES} bytes of a request that was answered")
                return
        else:
            stream.ended_there = end_stream  # so that a call that finishes now need not be reset
            if not self._take(stream, data):
                return
            stream.consumed += size
            self._give_window(stream)
        if end_stream:
            self._end_of_client(stream)

    def _take(self, stream: Stream, data: memoryview) -> bool:
        """Hand over the messages that have become whole. False if the stream is over, before or because of them."""
        size = len(data) - PREFIX_BYTES
        if stream.pieces is None and 0 <= size <= self._max_message_bytes and PREFIX.unpack_from(data) == (0, size):  # one message in one frame, as most
            whole = data[PREFIX_BYTES:]
            return self._hand_over(stream, whole.tobytes() if size < LARGE_BYTES else whole)
        try:
            for message in stream.messages(data, self._max_message_bytes):
                if not self._hand_over(stream, message):
                    return False
        except Refused as refused:
            self._abandon(stream)
            stream.finish(refused.status, str(refused))
            return False
        if stream.held != stream.told:
            self._changed[stream.id] = stream
        return True

    def _hand_over(self, stream: Stream, message: Message) -> bool:
        call = stream.call
        if call is None:
            return False
        try:
            if stream.told:
                stream.told = 0
                call.holds(0)
            call.receive(message)
        except Exception as error:
            self._call_failed(stream, error)
        return not stream.ended_here and not self._over

    def _tell_held(self) -> None:
        """Each call hears how much of an unfinished message is kept for it, once per read."""
        changed, self._changed = self._changed, {}
        for stream in changed.values():
            if stream.call is not None and stream.held != stream.told:
                stream.told = stream.held
                self._run(stream, stream.call.holds, stream.held)

    def _end_of_client(self, stream: Stream) -> None:
        stream.ended_there = True
        if stream.remaining > 0:
            self._stream_fault(stream.id, PROTOCOL_ERROR, "less data than its content-length")
            return
        if stream.call is not None and not stream.ended_here:
            self._run(stream, stream.call.half_close)
        self._forget_if_done(stream)

    # -- calls

    def _run(self, stream: Stream, act: Callable[..., None], *arguments: object) -> None:
        """Call into a call. What it raises costs its own stream only."""
        try:
            act(*arguments)
        except Exception as error:
            self._call_failed(stream, error)

    def _call_failed(self, stream: Stream, error: Exception) -> None:
        """An exception came out of a call. One traceback per connection: whatever a client can make fail, it can make fail again."""
        if not self._has_failed:
            log.error("a call failed; its stream is reset with INTERNAL_ERROR (further ones of this connection are not logged)", exc_info=error)
        self._has_failed = True
        stream.ended_here = True
        self._abandon(stream)
        if stream.id in self._streams:
            self._forget(stream)
            self._reset(stream.id, INTERNAL_ERROR)

    def _abandon(self, stream: Stream) -> None:
        call, stream.call = stream.call, None
        if stream.pieces is not None:
            stream.drop()
        if call is not None:
            if stream.told:
                stream.told = 0
                self._run(stream, call.holds, 0)
            self._run(stream, call.abandon)

    # -- the other frames

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002  # as all handlers
        """RFC 9113, 5.3.2, has done away with priorities; that a stream must not depend on itself is left of RFC 7540 (5.3.1)."""
        if _dependency(payload) == stream_id:
            self._stream_fault(stream_id, PROTOCOL_ERROR, "a stream that depends on itself")

    def _on_reset(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        stream = self._streams.get(stream_id)
        if stream is None:
            self._may(RST_STREAM, stream_id)
            return
        self._forget(stream)
        self._closed.by_client(stream_id)
        stream.ended_here = True
        self._abandon(stream)
        if not stream.started:
            self._patience.reset(self._now, stream.opened_at)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        if flags & ACK:
            if payload:
                raise ConnectionFault(FRAME_SIZE_ERROR, "an acknowledgement with settings in it")
            self._blocks.pin()
            return
        values = read_settings(payload)
        self._outbox.max_frame = min(values.get(MAX_FRAME_SIZE, self._outbox.max_frame), MAX_SENT_FRAME)
        self._outbox.answer(SETTINGS, ACK, 0, b"")
        if INITIAL_WINDOW_SIZE in values:
            self._outbox.begin_with(values[INITIAL_WINDOW_SIZE], self._streams.values())

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        if not flags & ACK:
            self._outbox.answer(PING, ACK, 0, payload)
        elif payload == _LEAVING and self._going_away:
            self._refuse_new()

    def _on_push(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        raise ConnectionFault(PROTOCOL_ERROR, "a client cannot push")

    def _on_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        increment = WORD.unpack(payload)[0] & MAX_WINDOW
        if not stream_id:
            if not increment:
                raise ConnectionFault(PROTOCOL_ERROR, "a window update of nothing")
            self._outbox.grow(increment)
        elif self._may(WINDOW_UPDATE, stream_id):
            if not increment:
                self._stream_fault(stream_id, PROTOCOL_ERROR, "a window update of nothing")
            elif not self._outbox.grow_stream(self._streams[stream_id], increment):
                self._stream_fault(stream_id, FLOW_CONTROL_ERROR, "a stream window over 2^31-1")

    # -- writing

    def send_trailers(self, stream: Stream, status: int, text: str) -> None:
        """The end of the call, after all that was sent before."""
        if self._over:
            return
        stream.drop()
        if stream.told and stream.call is not None:
            stream.told = 0
            self._run(stream, stream.call.holds, 0)
        if stream.id not in self._streams:
            return
        fields = _OK_TRAILERS if status == OK else _literal(b"grpc-status", str(status).encode())
        if text:
            fields += _literal(b"grpc-message", text.encode("ascii", "replace").replace(b"%", b"%25")[:120])
        stream.ending = (HEADERS, fields if stream.started else RESPONSE_HEADERS + fields)
        stream.started = True
        self._outbox.proceed(stream)
        self._outbox.flush_soon()

    def _sent(self, stream: Stream) -> None:
        """A stream has nothing unsent any more."""
        self._give_window(stream)
        self._forget_if_done(stream)

    def _give_window(self, stream: Stream) -> None:
        """Let the client send more, once half of its window was taken and what it is answered does not pile up."""
        if stream.consumed >= STREAM_WINDOW // 2 and stream.unsent_bytes <= MAX_UNSENT_BYTES and not stream.ended_there:
            self._frame(WINDOW_UPDATE, 0, stream.id, WORD.pack(stream.consumed))
            stream.window += stream.consumed
            stream.consumed = 0

    def _forget_if_done(self, stream: Stream) -> None:
        if not stream.ended_here or stream.unsent_bytes or stream.ending is not None or stream.id not in self._streams:
            return
        if stream.ended_there:
            self._forget(stream)
            self._closed.by_client(stream.id)
        elif not stream.lingers:  # "the server can RST_STREAM with NO_ERROR after a complete response" (8.1)
            self._forget(stream)
            self._reset(stream.id, NO_ERROR)
        stream.call = None  # the call knows its stream: without this cut the two would wait for the collector of cycles

    def _forget(self, stream: Stream) -> None:
        """The one way out of the table of streams: whoever drains waits for the last."""
        del self._streams[stream.id]
        self._patience.ended += 1
        self._outbox.forget(stream)
        if not self._streams:
            self._on_idle()

    def _reset(self, stream_id: int, code: int) -> None:
        self._closed.reset_here(stream_id)
        self._outbox.answer(RST_STREAM, 0, stream_id, WORD.pack(code))

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        self._outbox.frame(kind, flags, stream_id, payload)

    def _on_what_is_ignored(self, flags: int, stream_id: int, payload: bytes) -> None:
        """GOAWAY: the client takes no streams of ours, and there are none. Kinds that nobody knows "MUST be ignored" (4.1)."""

    # What each kind weighs on the patience, its size if it has one only, whether it belongs on a stream (None: either way), and who deals with it
    _RULES: ClassVar[dict[int, _Rule]] = {
        HEADERS: (1, None, True, _on_headers),
        PRIORITY: (1, PRIORITY_BYTES, True, _on_priority),
        RST_STREAM: (1, 4, True, _on_reset),
        SETTINGS: (100, None, False, _on_settings),  # each may make all streams try to send again
        PUSH_PROMISE: (1, None, True, _on_push),
        PING: (1, 8, False, _on_ping),
        GOAWAY: (1, None, False, _on_what_is_ignored),
        WINDOW_UPDATE: (1, 4, None, _on_window_update),
        CONTINUATION: (1, None, True, _on_continuation),
    }
    _UNKNOWN: ClassVar[_Rule] = (1, None, None, _on_what_is_ignored)


def _dependency(payload: bytes) -> int:
    """The stream that a priority depends on."""
    return int.from_bytes(payload[:4], "big") & MAX_WINDOW
