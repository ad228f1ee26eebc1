"""Hostile HTTP/2, each by name: what whoever reaches the ext_proc port may send to it. Every number of frames is bounded."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from .harness import ADAPTER
from .http2_peer import (
    CALL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Peer,
    block,
    frame,
    message,
)

MIB = 2**20
PATIENCE_S = 1.0  # how long what comes back is listened for


@dataclass(frozen=True)
class FrameInput:
    """What is done on connections of its own."""

    name: str
    play: Callable[[str], tuple[int, str]]  # address -> bytes sent, what came back
    expected: str = ""  # a word of the answer; empty: any, since the bounds are what counts

    def run(self, address: str) -> tuple[int, str]:
        return self.play(address)


def sends(make: Callable[[Peer], bytes], *, opened: int = 0) -> Callable[[str], tuple[int, str]]:
    """Send what `make` says on a new connection on which `opened` calls wait, and listen."""

    def play(address: str) -> tuple[int, str]:
        peer = Peer(address)
        try:
            for _ in range(opened):
                peer.open()
            data = make(peer)
            with contextlib.suppress(OSError):  # the router may have ended it half way: what it said is still there to be read
                peer.send(data)
            return len(data), peer.said(PATIENCE_S)
        finally:
            peer.close()

    return play


def answers(headers: dict[str, str], *, ends: bool = True) -> Callable[[str], tuple[int, str]]:
    """One request that is no gRPC call, then a good one on the same connection."""

    def play(address: str) -> tuple[int, str]:
        peer = Peer(address)
        try:
            stream = peer.open(headers, ends=ends)
            if not ends:
                peer.send(frame(DATA, END_STREAM, stream, b"x" * 100))
            said = peer.said(PATIENCE_S, stream)
            try:
                after = "the connection serves" if peer.exchange(ADAPTER, 10.0) else "the connection does not serve"
            except OSError as error:
                after = f"then {type(error).__name__}"
            return peer.sent_bytes, f"{said}; {after}"
        finally:
            peer.close()

    return play


def raw(data: bytes) -> Callable[[str], tuple[int, str]]:
    """Bytes that are no HTTP/2."""

    def play(address: str) -> tuple[int, str]:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            try:
                back = connection.recv(4096)
            except TimeoutError:
                return len(data), "nothing"
            except OSError as error:
                return len(data), type(error).__name__
        return len(data), "closed" if not back else f"{len(back)} bytes"

    return play


def unfinished(address: str) -> tuple[int, str]:
    """Eight calls, each with 5 MiB of a message of 60 MiB, kept for two seconds."""
    peer = Peer(address)
    try:
        for _ in range(8):
            stream = peer.open()
            with contextlib.suppress(OSError):
                peer.send(b"".join(frame(DATA, 0, stream, piece) for piece in _sixteenths(message(b"x" * 5 * MIB, announced=60 * MIB))))
        return peer.sent_bytes, peer.said(2.0)
    finally:
        peer.close()


def _sixteenths(data: bytes) -> list[bytes]:
    return [data[start : start + 16384] for start in range(0, len(data), 16384)]


def many_connections(address: str) -> tuple[int, str]:
    """Five hundred that say their preface and stay for two seconds."""
    peers = [Peer(address) for _ in range(500)]
    time.sleep(2.0)
    said = {peer.said(0.01) for peer in peers}
    for peer in peers:
        peer.close()
    return sum(peer.sent_bytes for peer in peers), " / ".join(sorted(said))


def never_reads(address: str) -> tuple[int, str]:
    """A thousand pings and calls that are reset, by one that reads nothing for two seconds."""
    peer = Peer(address, timeout_s=2.0)
    try:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                stream = peer.open({**CALL, ":path": "/none"})
                peer.send(frame(PING, 0, 0, bytes(8)) * 10 + frame(RST_STREAM, 0, stream, bytes(4)))
        time.sleep(2.0)
        return peer.sent_bytes, peer.said(PATIENCE_S)
    finally:
        peer.close()


def reset_calls(peer: Peer) -> bytes:
    header = block(CALL)
    return b"".join(frame(HEADERS, END_HEADERS, number, header) + frame(RST_STREAM, 0, number, struct.pack(">I", 8)) for number in range(1, 20_001, 2))


def one_call(peer: Peer, data: Callable[[int], bytes]) -> bytes:
    return frame(HEADERS, END_HEADERS, 1, block(CALL)) + data(1)


WINDOWS = struct.pack(">HI", INITIAL_WINDOW_SIZE, 1000) * 2730  # what fits into one frame
FLOOD = 10_000

INPUTS = (
    FrameInput("GET to the gRPC port", answers({":method": "GET", ":scheme": "http", ":path": "/", ":authority": "x"}), "the connection serves"),
    FrameInput("HEAD to the gRPC port", answers({":method": "HEAD", ":scheme": "http", ":path": "/", ":authority": "x"}), "the connection serves"),
    FrameInput(
        "POST to the gRPC port that is no gRPC",
        answers({":method": "POST", ":scheme": "http", ":path": "/v1/chat/completions", "content-type": "application/json"}, ends=False),
        "the connection serves",
    ),
    FrameInput("HTTP/1.1 to the gRPC port", raw(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")),
    FrameInput("TLS to a plaintext port", raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))),
    FrameInput("1 MiB of anything", raw(bytes(range(256)) * 4096)),
    FrameInput("10,000 calls, each reset", sends(reset_calls)),
    FrameInput("10,000 calls that wait", sends(lambda _: b"".join(frame(HEADERS, END_HEADERS, n, block(CALL)) for n in range(1, 20_001, 2)))),
    FrameInput("10,000 SETTINGS", sends(lambda _: frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 65535)) * FLOOD)),
    FrameInput("2,730 window sizes beside 1,000 calls", sends(lambda _: frame(SETTINGS, 0, 0, WINDOWS), opened=1000)),
    FrameInput("10 frames of 2,730 window sizes, 1,000 calls", sends(lambda _: frame(SETTINGS, 0, 0, WINDOWS) * 10, opened=1000)),
    FrameInput("10,000 PING", sends(lambda _: frame(PING, 0, 0, bytes(8)) * FLOOD)),
    FrameInput("10,000 WINDOW_UPDATE beside 1,000 calls", sends(lambda _: frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * FLOOD, opened=1000)),
    FrameInput("a window over 2^31-1", sends(lambda _: frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)) * 2), "FLOW_CONTROL_ERROR"),
    FrameInput("10,000 PRIORITY", sends(lambda _: frame(PRIORITY, 0, 1, bytes(5)) * FLOOD)),
    FrameInput("10,000 CONTINUATION without an end", sends(lambda _: frame(HEADERS, 0, 1, block(CALL)) + frame(CONTINUATION, 0, 1, b"") * FLOOD)),
    FrameInput("1 MiB of headers", sends(lambda _: frame(HEADERS, 0, 1, block(CALL)) + frame(CONTINUATION, 0, 1, block({"x": "y" * 16_000})) * 64)),
    FrameInput("a header block that repeats one field", sends(lambda _: frame(HEADERS, END_HEADERS, 1, block(CALL) + b"\x82" * 16_000))),
    FrameInput("100,000 empty DATA", sends(lambda peer: one_call(peer, lambda n: frame(DATA, 0, n) * 100_000))),
    FrameInput("65,000 DATA of one byte", sends(lambda peer: one_call(peer, lambda n: b"".join(frame(DATA, 0, n, b"\x00") for _ in range(65_000))))),
    FrameInput("40 MiB in messages without an end", unfinished),
    FrameInput("a message of 4 GiB, announced", sends(lambda peer: one_call(peer, lambda n: frame(DATA, 0, n, message(b"x" * 100, announced=2**32 - 1))))),
    FrameInput("3,000 messages of nothing", sends(lambda peer: one_call(peer, lambda n: frame(DATA, END_STREAM, n, message(b"") * 3000)))),
    FrameInput("a frame of 16 MiB, announced", sends(lambda _: struct.pack(">HBBBI", 0xFFFF, 0xFF, DATA, 0, 1))),
    FrameInput("500 connections that say nothing", many_connections),
    FrameInput("one that never reads", never_reads),
)
