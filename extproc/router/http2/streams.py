"""One HTTP/2 stream of a client: what its frames may be in each of its states (RFC 9113, 5.1), and how its bytes become gRPC messages."""

import struct
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from typing import Protocol

from ...core.pieces import Buffer
from .calls import OK, RESOURCE_EXHAUSTED, UNIMPLEMENTED, Call, Message
from .frames import (
    CONTINUATION,
    DATA,
    HEADERS,
    PRIORITY,
    PROTOCOL_ERROR,
    RST_STREAM,
    STREAM_CLOSED,
    WINDOW_UPDATE,
)

STREAM_WINDOW = 2**20  # a 1 MB prompt needs no round trip of window updates
LARGE_BYTES = 8192  # what is smaller is cheaper to copy than to keep a view of
SMALL_BYTES = 2048  # smaller pieces of a message are joined as they come: each would cost as much again to keep
JOINED_BYTES = 2**16  # up to so many, so that no byte is copied more than a few times
MAX_CLOSED = 1024  # streams that are remembered after their end; frames of them may be on their way for a round trip

PREFIX = struct.Struct(">BI")  # of a gRPC message: whether it is compressed, its length
PREFIX_BYTES = PREFIX.size


class State(Enum):
    """A stream as its client's frames meet it."""

    IDLE = auto()  # not opened yet
    OPEN = auto()
    HALF_CLOSED = auto()  # the client has ended its side
    RESET_HERE = auto()  # by the server, which the client may not know yet
    CLOSED = auto()  # by the client, or by both


class Verdict(Enum):
    """What a frame means in a state."""

    TAKE = auto()
    IGNORE = auto()
    STREAM_ERROR = auto()
    CONNECTION_ERROR = auto()


_T, _I, _S, _C = Verdict.TAKE, Verdict.IGNORE, Verdict.STREAM_ERROR, Verdict.CONNECTION_ERROR

# Rows: RFC 9113, 5.1 ("either a stream error or a connection error" is the milder of the two where the peer's compression stays readable). The error
# code is PROTOCOL_ERROR for an idle stream and STREAM_CLOSED for the others.
#                IDLE  OPEN  HALF_CLOSED  RESET_HERE  CLOSED
_TABLE = {
    DATA:          (_C,   _T,   _S,          _I,         _S),
    HEADERS:       (_T,   _T,   _S,          _I,         _C),
    PRIORITY:      (_T,   _T,   _T,          _T,         _T),
    RST_STREAM:    (_C,   _T,   _T,          _I,         _I),
    WINDOW_UPDATE: (_C,   _T,   _T,          _I,         _I),
    CONTINUATION:  (_C,   _T,   _T,          _T,         _T),  # follows a HEADERS, which was judged
}  # fmt: skip
VERDICTS = {(kind, state): verdict for kind, row in _TABLE.items() for state, verdict in zip(State, row, strict=True)}


def error_code(state: State) -> int:
    """Of an error that the table demands."""
    return PROTOCOL_ERROR if state is State.IDLE else STREAM_CLOSED


class Closed:
    """The last streams that were closed: those that were reset here, and those that the client closed."""

    def __init__(self) -> None:
        self._reset_here: deque[int] = deque(maxlen=MAX_CLOSED)
        self._by_client: deque[int] = deque(maxlen=MAX_CLOSED)
        self.reset_here = self._reset_here.append
        self.by_client = self._by_client.append

    def state(self, stream_id: int) -> State | None:
        """None of a stream that was never open, or so long ago that it is forgotten."""
        if stream_id in self._reset_here:
            return State.RESET_HERE
        return State.CLOSED if stream_id in self._by_client else None


class Refused(Exception):
    """A message that is not taken, and the gRPC status that says so."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Outbox(Protocol):
    """Where a stream's messages go."""

    def message(self, stream: "Stream", message: Message) -> None:
        """One gRPC message: as much as the windows allow now, the rest when they open."""


class Writer(Protocol):
    """The connection, as a stream needs it."""

    def send_trailers(self, stream: "Stream", status: int, text: str) -> None:
        """The end of the call, after all that was sent before."""


class Stream:
    """One call's two directions."""

    __slots__ = (
        "_outbox",
        "_writer",
        "call",
        "consumed",
        "credit",
        "ended_here",
        "ended_there",
        "ending",
        "held",
        "id",
        "lingers",
        "missing",
        "opened_at",
        "pieces",
        "remaining",
        "started",
        "told",
        "unsent",
        "unsent_bytes",
        "waits",
        "window",
    )

    def __init__(self, writer: Writer, outbox: Outbox, id_: int, opened_at: float, length: int) -> None:
        self._writer = writer
        self._outbox = outbox
        self.id = id_
        self.opened_at = opened_at
        self.call: Call | None = None
        # what the client sends
        self.window = STREAM_WINDOW  # what it may still send
        self.consumed = 0  # taken by the call, not given back yet
        self.remaining = length  # of its content-length; below 0 where it gave none
        self.pieces: list[bytes | bytearray] | None = None  # the beginning of a message
        self.missing = 0  # bytes until it is whole; 0 while its length is not known
        self.held = 0  # bytes in `pieces`
        self.told = 0  # what the call was last told of it
        self.ended_there = False
        # what it is sent
        self.credit = 0  # what it may be sent, beside the connection's initial window
        self.unsent: deque[memoryview] | None = None  # none of them empty
        self.unsent_bytes = 0
        self.waits = False  # for a window, or for the socket
        self.ending: tuple[int, bytes] | None = None  # the frame that ends the stream when that has gone: its kind and payload
        self.started = False  # the response headers have been sent
        self.ended_here = False
        self.lingers = False  # it was answered without a call, and its client may still send

    def send(self, message: Message) -> None:
        if not self.ended_here:
            self._outbox.message(self, message)

    def finish(self, status: int = OK, text: str = "") -> None:
        if not self.ended_here:
            self.ended_here = True
            self._writer.send_trailers(self, status, text)

    def messages(self, data: memoryview, max_bytes: int) -> Iterator[Message]:
        """The gRPC messages that `data` completes: a flag byte, a length, the message. Raises Refused for one that is compressed or too large.

        The pieces of a message are copied while it is not whole. Views of `data` are good until the next read.
        """
        if len(data) < self.missing:  # as most frames of a large body
            self._keep(data)
            self.missing -= len(data)
            return
        if self.missing:
            message = self._taken(data[: self.missing])
            data = data[self.missing :]
            self.missing = 0
            yield message
        elif self.pieces:  # of so little that its length is not known
            data = memoryview(b"".join((*self.pieces, data)))
            self.pieces, self.held = None, 0
        position, size = 0, len(data)
        while size - position >= PREFIX_BYTES:
            compressed, length = PREFIX.unpack_from(data, position)
            if compressed:
                raise Refused(UNIMPLEMENTED, "compressed messages are not understood")
            if length > max_bytes:
                raise Refused(RESOURCE_EXHAUSTED, f"a message of {length} bytes; the limit is {max_bytes}")
            begin = position + PREFIX_BYTES
            end = begin + length
            if end > size:
                self.missing = end - size
                break
            position = end
            yield bytes(data[begin:end]) if length < LARGE_BYTES else data[begin:end]
        if position < size:
            self._keep(data[position:])

    def drop(self) -> None:
        """Forget the beginning of a message."""
        self.pieces, self.held, self.missing = None, 0, 0

    def _keep(self, data: memoryview) -> None:
        self.held += len(data)
        if self.pieces is None:
            self.pieces = [bytes(data)]
            return
        last = self.pieces[-1]
        if len(data) >= SMALL_BYTES:
            self.pieces.append(bytes(data))
        elif type(last) is bytearray and len(last) < JOINED_BYTES:
            last += data
        elif data:
            self.pieces.append(bytearray(data))

    def _taken(self, rest: memoryview) -> tuple[Buffer, ...]:
        assert self.pieces is not None
        pieces = [memoryview(piece) for piece in self.pieces]
        self.pieces, self.held = None, 0
        pieces[0] = pieces[0][PREFIX_BYTES:]
        return (*pieces, rest)
