"""Frames for `python -m tests.fuzz`: sequences that are right, whose messages must arrive as they were sent, and sequences that are wrong in any way.

An input is the seed of a sequence, so that what is printed is enough to repeat it.
"""

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Iterable

import hpack

from extproc.router.http2.calls import Message, Sender, joined
from extproc.router.http2.connection import Connection
from extproc.router.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    RST_STREAM,
    SETTING,
    SETTINGS,
    WINDOW_UPDATE,
    WORD,
    frame,
)

ECHO = "/fuzz/Echo"
MAX_MESSAGE = 100_000
LAST_BYTES = 13  # a WINDOW_UPDATE
SIZES = (0, 1, 4, 5, 100, 8191, 8192, 16_379, 16_384, 40_000)


class FuzzedCall:
    """Echoes, holds, ends or raises, as its random source says; keeps what it is told."""

    def __init__(self, sender: Sender, rng: random.Random, may_fail: bool) -> None:
        self._sender = sender
        self._rng = rng
        self._may_fail = may_fail
        self.got: list[bytes] = []
        self.held = 0
        self.half_closed = False
        self.finished = False
        self.abandoned = 0

    def receive(self, message: Message) -> None:
        assert not self.finished, "a message after finish"
        assert not self.abandoned, "a message after abandon"
        assert not self.held, "a message while bytes of it are still counted"
        data = joined(message)
        self.got.append(data)
        self._sender.send(data if self._rng.random() < 0.5 else (data[:10], memoryview(data)[10:]))
        self._perhaps_fail()
        if self._rng.random() < 0.05:
            self._finish()

    def holds(self, size: int) -> None:
        assert size != self.held, f"told again that it holds {size}"
        self.held = size
        self._perhaps_fail()

    def half_close(self) -> None:
        assert not self.half_closed
        self.half_closed = True
        self._perhaps_fail()
        if self._rng.random() < 0.8:
            self._finish()

    def drain(self) -> None:
        if self._rng.random() < 0.5:
            self._finish()

    def abandon(self) -> None:
        self.abandoned += 1

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self._sender.finish(self._rng.choice((0, 0, 14)), self._rng.choice(("", "why")))

    def _perhaps_fail(self) -> None:
        if self._may_fail and self._rng.random() < 0.02:
            raise RuntimeError("a call that fails")


class Peer(asyncio.Transport):
    """The client's side: what it was sent, checked as it comes."""

    def __init__(self, is_right: bool) -> None:
        super().__init__()
        self._is_right = is_right
        self._buffer = bytearray()
        self.window = DEFAULT_WINDOW
        self.initial_window = DEFAULT_WINDOW
        self.windows: dict[int, int] = {}  # beside the initial one
        self.max_frame = 16_384
        self.data: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.refused = 0
        self.goaway: int | None = None
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed, "written after the end"
        self._buffer += data
        while len(self._buffer) >= 9 and len(self._buffer) >= 9 + (size := int.from_bytes(self._buffer[:3], "big")):
            kind, flags, stream = self._buffer[3], self._buffer[4], int.from_bytes(self._buffer[5:9], "big")
            self._on_frame(kind, flags, stream, bytes(self._buffer[9 : 9 + size]))
            del self._buffer[: 9 + size]

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert len(payload) <= 2**17
        if kind == GOAWAY and int.from_bytes(payload[4:8], "big"):
            self.goaway = int.from_bytes(payload[4:8], "big")
            assert not self._is_right, f"a right sequence was answered {payload[8:]!r}"
        if kind == RST_STREAM:
            assert stream not in self.reset, "reset twice"
            self.reset.add(stream)
        if kind in {HEADERS, DATA}:
            assert stream not in self.ended, "something after the end of a stream"
            assert stream not in self.reset, "something after the reset of a stream"
            assert kind == HEADERS or stream in self.data, "data before headers"
            self.data.setdefault(stream, bytearray())
        if kind == DATA:
            self.data[stream] += payload
            if self._is_right:
                self.window -= len(payload)
                self.windows[stream] = self.windows.get(stream, 0) - len(payload)
                assert self.window >= 0, "more than the connection's window"
                assert not payload or self.windows[stream] + self.initial_window >= 0, "more than the stream's window"
                assert len(payload) <= self.max_frame, "more than MAX_FRAME_SIZE"
        if kind in {HEADERS, DATA} and flags & END_STREAM:
            self.ended.add(stream)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return False


class Sequence:
    """One connection and what is sent on it."""

    def __init__(self, rng: random.Random, is_right: bool) -> None:
        self.rng = rng
        self.is_right = is_right
        self.peer = Peer(is_right)
        self.calls: list[FuzzedCall] = []
        self.connection = Connection({ECHO: self._call}, 50, max_message_bytes=MAX_MESSAGE)
        self.connection.connection_made(self.peer)
        self.encoder = hpack.Encoder()
        self.out = bytearray(PREFACE + frame(SETTINGS, 0, 0))
        self.next_id = 1
        self.open: dict[int, tuple[bytearray, list[bytes]]] = {}  # stream -> what is still to be sent of its bytes, its messages
        self.call_of: dict[int, FuzzedCall] = {}

    def _call(self, sender: Sender) -> FuzzedCall:
        call = FuzzedCall(sender, self.rng, not self.is_right)
        self.calls.append(call)
        self.call_of[sender.id] = call  # type: ignore[attr-defined]  # a Stream
        return call

    def emit(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.out += frame(kind, flags, stream, payload)

    def feed(self) -> None:
        """All that was emitted, in reads of any size."""
        while self.out and not self.peer.closed:
            room = self.connection.get_buffer(-1)
            size = min(len(self.out), len(room), self.rng.choice((1, 9, 100, 5000, 10**6)))
            room[:size] = self.out[:size]
            del self.out[:size]
            self.connection.buffer_updated(size)

    def pad(self, flags: int, payload: bytes) -> tuple[int, bytes]:
        if self.rng.random() < 0.8:
            return flags, payload
        padding = self.rng.randrange(20)
        return flags | PADDED, bytes((padding,)) + payload + bytes(padding)

    def open_stream(self) -> None:
        stream, self.next_id = self.next_id, self.next_id + 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", ECHO), ("content-type", "application/grpc"), ("te", "trailers")]
        fields += [("traceparent", f"00-{self.rng.getrandbits(128):032x}-01")] * self.rng.randrange(2)
        if self.rng.random() < 0.1:
            fields[0] = (":method", self.rng.choice(("GET", "HEAD", "PUT")))
        if self.rng.random() < 0.05:
            fields[3] = ("content-type", "text/plain")
        block = self.encoder.encode(fields, huffman=self.rng.random() < 0.8)
        flags = END_STREAM if self.rng.random() < 0.05 else 0
        if not flags:
            messages = [self.rng.randbytes(self.rng.choice(SIZES)) for _ in range(self.rng.randrange(4))]
            self.open[stream] = (bytearray(b"".join(b"\0" + len(m).to_bytes(4, "big") + m for m in messages)), messages)
        cut = self.rng.randrange(len(block) + 1) if self.rng.random() < 0.2 else len(block)
        priority = self.rng.random() < 0.1
        padded, payload = self.pad(flags, (WORD.pack(0) + b"\x10" if priority else b"") + block[:cut])
        padded |= PRIORITY_FLAG if priority else 0
        if cut == len(block):
            self.emit(HEADERS, padded | END_HEADERS, stream, payload)
        else:
            self.emit(HEADERS, padded, stream, payload)
            self.emit(CONTINUATION, END_HEADERS, stream, block[cut:])

    def send_data(self) -> None:
        stream = self.rng.choice(list(self.open))
        data, _ = self.open[stream]
        size = min(len(data), self.rng.choice((0, 1, 3, 5, 100, 8192, 16_000)))
        flags = END_STREAM if size == len(data) and self.rng.random() < 0.5 else 0
        if stream in self.peer.ended | self.peer.reset:  # an honest client hears of it and stops
            del self.open[stream]
            return
        padded, payload = self.pad(flags, bytes(data[:size]))
        del data[:size]
        self.emit(DATA, padded, stream, payload)
        if flags:
            del self.open[stream]

    def grow(self) -> None:
        stream = self.rng.choice((0, 0, *self.open, *list(self.peer.data)[-3:]))
        if stream in self.peer.ended:
            return
        increment = self.rng.choice((1, 100, 20_000, 200_000))
        self.emit(WINDOW_UPDATE, 0, stream, WORD.pack(increment))
        self.feed_exactly(lambda: self._grown(stream, increment))

    def _grown(self, stream: int, increment: int) -> None:
        if stream:
            self.peer.windows[stream] = self.peer.windows.get(stream, 0) + increment
        else:
            self.peer.window += increment

    def feed_exactly(self, before: Callable[[], None]) -> None:
        """What was emitted before the last frame is read first: only then may the model of the windows change."""
        last = self.out[-LAST_BYTES:]
        del self.out[-LAST_BYTES:]
        self.feed()
        before()
        self.out += last
        self.feed()

    def change_settings(self) -> None:
        window = self.rng.choice((0, 1, 1000, 65_535, 10**6))
        size = self.rng.choice((16_384, 20_000, 2**17))
        self.feed()
        self.peer.initial_window = max(window, self.peer.initial_window)  # until it is acknowledged either counts
        self.peer.max_frame = max(size, self.peer.max_frame)
        self.emit(
            SETTINGS,
            0,
            0,
            SETTING.pack(INITIAL_WINDOW_SIZE, self.rng.randrange(1000)) + SETTING.pack(INITIAL_WINDOW_SIZE, window) + SETTING.pack(MAX_FRAME_SIZE, size),
        )
        self.feed()
        self.peer.initial_window, self.peer.max_frame = window, size

    def acknowledge(self) -> None:
        self.encoder.header_table_size = 0
        self.emit(SETTINGS, ACK, 0)

    def step(self) -> None:
        rng = self.rng
        match rng.randrange(14):
            case 0 | 1 | 2:
                self.open_stream()
            case 3 | 4 | 5 | 6 if self.open:
                self.send_data()
            case 7:
                self.grow()
            case 8:
                self.change_settings()
            case 9:
                self.emit(rng.choice((PING, 77)), 0, 0, rng.randbytes(8))
                self.emit(PRIORITY, 0, rng.randrange(1, 50) * 2 + 1, WORD.pack(0) + b"\x01")
            case 10 if self.open and rng.random() < 0.5:
                stream = rng.choice(list(self.open))
                del self.open[stream]
                self.emit(RST_STREAM, 0, stream, WORD.pack(8))
            case 11:
                self.acknowledge()
            case 12:
                self.feed()
                self.connection.pause_writing()
                self.feed()
                self.connection.resume_writing()
            case _:
                self.emit(PING, ACK, 0, bytes(8))  # any word counts as an answer
                self.feed()
                if not self.peer.closed:
                    self.connection.tick()

    def spoil(self) -> None:
        """Something that is wrong, or may be."""
        rng = self.rng
        match rng.randrange(8):
            case 0:
                self.emit(
                    rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 3, self.next_id, 2**31 - 1)), rng.randbytes(rng.choice((0, 1, 4, 5, 6, 8, 40)))
                )
            case 1 if self.out:
                self.out[rng.randrange(len(self.out))] = rng.randrange(256)
            case 2 if self.out:
                at = rng.randrange(len(self.out))
                del self.out[at : at + rng.randrange(10)]
            case 3:
                setting = SETTING.pack(
                    rng.choice((HEADER_TABLE_SIZE, 2, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, 99)),
                    rng.choice((0, 1, 2, 2**14, 2**24, 2**31 - 1, 2**31, 2**32 - 1)),
                )
                self.emit(SETTINGS, 0, 0, setting * rng.randrange(1, 40))
            case 4:
                self.emit(WINDOW_UPDATE, 0, rng.randrange(8), WORD.pack(rng.choice((0, 1, 2**31 - 1, 2**31))))
            case 5:
                self.emit(HEADERS, END_HEADERS | rng.randrange(2), self.next_id, rng.randbytes(rng.randrange(30)))
                self.next_id += 2
            case 6:
                for _ in range(rng.randrange(50)):
                    self.emit(DATA, 0, rng.randrange(1, 8), rng.randbytes(rng.randrange(3)))
            case _:
                self.feed()
                if not self.peer.closed and rng.random() < 0.3:
                    self.connection.go_away()

    async def run(self) -> None:
        for _ in range(self.rng.randrange(5, 40)):
            if self.peer.closed:
                break
            self.step()
            if not self.is_right and self.rng.random() < 0.3:
                self.spoil()
            if self.rng.random() < 0.3:
                self.feed()
                self.check_held()
                await asyncio.sleep(0)
        self.feed()
        if self.is_right:
            await self.finish_right()
        elif not self.peer.closed and self.rng.random() < 0.3:
            for stream in self.connection.open_calls():
                self.connection.answer_now(stream)
        self.connection.connection_lost(None)
        assert self.connection.is_idle
        for call in self.calls:
            assert not call.held, f"{call.held} bytes are still counted"
            assert call.abandoned <= 1, "abandoned twice"

    def check_held(self) -> None:
        """What calls were told that they hold is what streams hold."""
        for stream in () if self.peer.closed else self.connection.open_calls():
            call = self.call_of[stream.id]
            if not call.finished and not call.abandoned:
                assert call.held == stream.held == sum(map(len, stream.pieces or ())), f"told {call.held}, held {stream.held}"

    async def finish_right(self) -> None:
        """Let everything through, and compare."""
        expected = {stream: (messages, len(data)) for stream, (data, messages) in self.open.items()}
        while self.open:
            self.send_data()
            self.feed()
        self.peer.window, self.peer.initial_window = self.peer.window + 2**30, 2**20
        self.emit(WINDOW_UPDATE, 0, 0, WORD.pack(2**30))
        self.emit(SETTINGS, 0, 0, SETTING.pack(INITIAL_WINDOW_SIZE, 2**20))
        self.feed()
        for _ in range(5):
            await asyncio.sleep(0)
        for stream, (messages, _) in expected.items():
            call = self.call_of.get(stream)
            if call is not None:
                assert call.got == messages[: len(call.got)], f"stream {stream} got other messages"
                if not call.finished:
                    assert len(call.got) == len(messages), f"stream {stream} got {len(call.got)} of {len(messages)} messages"
        for stream, call in self.call_of.items():
            if not call.abandoned or call.finished:
                echoed = b"".join(b"\0" + len(m).to_bytes(4, "big") + m for m in call.got)
                sent = bytes(self.peer.data.get(stream, b""))
                assert echoed.startswith(sent), f"stream {stream} was sent something else"
                assert sent == echoed or call.abandoned, f"stream {stream} was sent {len(sent)} of {len(echoed)} bytes"


@functools.cache
def _runner() -> asyncio.Runner:
    logging.getLogger("extproc.router.http2").setLevel(logging.CRITICAL)  # it would tell of each connection that is closed
    return asyncio.Runner()


def make_frames(rng: random.Random) -> bytes:
    """The seed of a sequence."""
    return rng.randbytes(8)


def fuzz_frames(_: random.Random, seed: bytes) -> None:
    """One sequence: right if the seed is even, else spoiled."""
    rng = random.Random(seed)
    _runner().run(Sequence(rng, seed[0] % 2 == 0).run())
