"""What one peer is sent: frames in their order, messages as far as the peer's windows allow, and what waits meanwhile.

A stream that cannot send all it has waits in one of two places: `_starved` for its own window, `_ready` for the connection's window or for the socket.
Those in `_ready` take turns of one frame. A frame of the peer costs what it lets be sent, not what is open: a window update looks only at streams
that wait, and SETTINGS that change the initial window change no stream, since each keeps only what it has beside that (`Stream.credit`).
"""

import asyncio
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from ...core.pieces import Buffer
from .calls import Message
from .frames import DATA, DEFAULT_WINDOW, END_HEADERS, END_STREAM, FLOW_CONTROL_ERROR, HEAD, HEAD_BYTES, HEADERS, MAX_WINDOW, MIN_MAX_FRAME, ConnectionFault
from .streams import LARGE_BYTES, PREFIX, PREFIX_BYTES, Stream

MAX_UNREAD_ANSWERS = 10_000  # control frames that a peer may cause while it reads nothing, before it is cut off
FRAMES_PER_TURN = 1000  # sent to streams that have waited, before the loop gets its turn

# HPACK without a dynamic table: 0x88 is ":status: 200" of the static table; then a literal that is not to be indexed (RFC 7541, 6.2.2)
RESPONSE_HEADERS = b"\x88\x0f\x10\x10application/grpc"
_FIRST_MESSAGE = struct.Struct(f">HBBBI{len(RESPONSE_HEADERS)}sHBBBIBI")  # HEADERS; then the head of DATA and a message's prefix
_NEXT_MESSAGE = struct.Struct(">HBBBIBI")


class Outbox:
    """Of one connection. `on_sent` hears of a stream that has nothing unsent any more, `on_overrun` of a peer that reads nothing."""

    def __init__(self, on_sent: Callable[[Stream], None], on_overrun: Callable[[str], None]) -> None:
        self._on_sent = on_sent
        self._on_overrun = on_overrun
        self.transport: asyncio.Transport | None = None  # None: what is written is dropped
        self.waits_for_flush = False  # somebody will call `flush` anyway
        self.is_paused = False  # the socket takes no more
        self.max_frame = MIN_MAX_FRAME
        self.sent = 0  # frames of DATA so far
        self._window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._max_credit = 0  # no stream has more
        self._ready: OrderedDict[int, Stream] = OrderedDict()
        self._starved: dict[int, Stream] = {}
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._flush_is_due = False
        self._unread_answers = 0  # control frames made while the socket took no more

    # -- frames

    def frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """One frame that no window holds back."""
        self._out_bytes += HEAD_BYTES + len(payload)
        self._out.append(HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id) + payload)

    def answer(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """One that the peer has caused. A peer that makes us answer and does not read is cut off before its answers fill the memory."""
        self.frame(kind, flags, stream_id, payload)
        self._unread_answers += self.is_paused
        if self._unread_answers > MAX_UNREAD_ANSWERS:
            self._on_overrun(f"{self._unread_answers} answers were not read")

    def message(self, stream: Stream, message: Message) -> None:
        """One gRPC message: as much as the windows allow now, the rest when they open."""
        pieces = message if isinstance(message, tuple) else (message,)
        length = sum(map(len, pieces)) if len(pieces) > 1 else len(pieces[0])
        size = PREFIX_BYTES + length
        if stream.unsent_bytes or self.is_paused or size > self._window or size > self._initial_window + stream.credit or size > self.max_frame:
            self._queue(stream, length, pieces)
        else:  # in one frame, with nothing to remember
            stream.credit -= size
            self._window -= size
            self.sent += 1
            if stream.started:
                head = _NEXT_MESSAGE.pack(size >> 8, size & 0xFF, DATA, 0, stream.id, 0, length)
            else:
                stream.started = True
                id_ = stream.id
                head = _FIRST_MESSAGE.pack(
                    0, len(RESPONSE_HEADERS), HEADERS, END_HEADERS, id_, RESPONSE_HEADERS, size >> 8, size & 0xFF, DATA, 0, id_, 0, length
                )
            self._out.append(head)
            self._out += pieces
            self._out_bytes += len(head) + length
        if not self.waits_for_flush:
            self.flush_soon()

    def _queue(self, stream: Stream, length: int, pieces: Sequence[Buffer]) -> None:
        if not stream.started:
            stream.started = True
            self.frame(HEADERS, END_HEADERS, stream.id, RESPONSE_HEADERS)
        if stream.unsent is None:
            stream.unsent = deque()
        stream.unsent.append(memoryview(PREFIX.pack(0, length) + pieces[0]))  # views are cut into frames without copying
        stream.unsent.extend(memoryview(part) for part in pieces[1:] if part)
        stream.unsent_bytes += PREFIX_BYTES + length
        self.proceed(stream)

    # -- windows

    def grow(self, increment: int) -> None:
        """The peer takes so many bytes more on the connection. Raises ConnectionFault if that is over 2^31-1."""
        self._window += increment
        if self._window > MAX_WINDOW:
            raise ConnectionFault(FLOW_CONTROL_ERROR, "the connection's window is over 2^31-1")
        self.pump()

    def grow_stream(self, stream: Stream, increment: int) -> bool:
        """The same on a stream. False if its window is over 2^31-1."""
        stream.credit += increment
        if self._initial_window + stream.credit > MAX_WINDOW:
            return False
        self._max_credit = max(self._max_credit, stream.credit)
        if stream.waits and self._starved.pop(stream.id, None) is not None:
            stream.waits = False
            self.proceed(stream)
        return True

    def begin_with(self, initial_window: int, streams: Iterable[Stream]) -> None:
        """The window of each stream is another now, before what it was given and has used. Raises ConnectionFault if one is over 2^31-1 (RFC 9113, 6.9.2)."""
        if initial_window + self._max_credit > MAX_WINDOW:
            self._max_credit = max((stream.credit for stream in streams), default=0)
            if initial_window + self._max_credit > MAX_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE lifts a stream's window over 2^31-1")
        has_grown = initial_window > self._initial_window
        self._initial_window = initial_window
        if has_grown and self._starved:
            self._ready.update(self._starved)
            self._starved.clear()
            self.pump()

    # -- what waits

    def proceed(self, stream: Stream, frames: int = MAX_WINDOW) -> None:
        """Send what is unsent, as far as the windows allow but at most so many frames."""
        if stream.waits:  # for its turn
            return
        while stream.unsent_bytes:
            window = self._initial_window + stream.credit
            if window <= 0:
                stream.waits = True
                self._starved[stream.id] = stream
                return
            if not frames or self._window <= 0 or self.is_paused:
                stream.waits = True
                self._ready[stream.id] = stream
                return
            frames -= 1
            self._fill_frame(stream, min(stream.unsent_bytes, window, self._window, self.max_frame))
        if stream.ending is not None:
            (kind, payload), stream.ending = stream.ending, None
            self.frame(kind, END_HEADERS | END_STREAM if kind == HEADERS else END_STREAM, stream.id, payload)
        self._on_sent(stream)

    def pump(self) -> None:
        """Let the streams in `_ready` send, one frame each in turn."""
        for _ in range(FRAMES_PER_TURN):
            if not self._ready or self._window <= 0 or self.is_paused:
                return
            _, stream = self._ready.popitem(last=False)
            stream.waits = False
            self.proceed(stream, 1)
        asyncio.get_running_loop().call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self.pump()
        self.flush()

    def forget(self, stream: Stream) -> None:
        """A stream that is over waits no more."""
        if stream.waits:
            stream.waits = False
            self._ready.pop(stream.id, None)
            self._starved.pop(stream.id, None)

    def _fill_frame(self, stream: Stream, size: int) -> None:
        """One frame of the next `size` bytes, from as many pieces as that takes."""
        assert stream.unsent is not None
        stream.credit -= size
        stream.unsent_bytes -= size
        self._window -= size
        self.sent += 1
        self._out_bytes += HEAD_BYTES + size
        self._out.append(HEAD.pack(size >> 8, size & 0xFF, DATA, 0, stream.id))
        while size:
            part = stream.unsent[0]
            if len(part) <= size:
                stream.unsent.popleft()
            else:
                part, stream.unsent[0] = part[:size], part[size:]
            self._out.append(part)
            size -= len(part)

    # -- the socket

    def resume(self) -> None:
        """The socket takes more again."""
        self.is_paused = False
        self._unread_answers = 0
        self.pump()
        self.flush()

    def flush_soon(self) -> None:
        """Frames that are made outside of a read leave together at the end of this turn of the loop."""
        if not self.waits_for_flush and not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Hand all frames to the socket, in one write."""
        self._flush_is_due = False
        if self._out:
            if self.transport is None:
                pass
            elif self._out_bytes < LARGE_BYTES:
                self.transport.write(b"".join(self._out))
            else:
                self.transport.writelines(self._out)
            self._out, self._out_bytes = [], 0

    def shut(self) -> None:
        """Nothing is sent any more."""
        self.transport = None
        self._out, self._out_bytes = [], 0
        self._ready.clear()
        self._starved.clear()
