"""One HTTP/2 connection that sends whatever frames it is told to, well formed or not, and says what came back. Blocking, without a library's rules."""

import contextlib
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping

import hpack

from extproc.pb import ext_proc_pb2 as pb
from extproc.router.server import PROCESS_METHOD

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
ERRORS = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
]
CALL = {":method": "POST", ":scheme": "http", ":path": PROCESS_METHOD, ":authority": "router", "content-type": "application/grpc", "te": "trailers"}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def block(headers: Mapping[str, str] | Iterable[tuple[str, str]]) -> bytes:
    """A header block of literals alone, none of them to be remembered (RFC 7541, 6.2.2)."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return b"".join(b"\x00" + _text(name.encode()) + _text(value.encode()) for name, value in pairs)


def _text(data: bytes) -> bytes:
    size = len(data)
    if size < 127:
        return bytes([size]) + data
    prefix, size = b"\x7f", size - 127
    while size >= 128:
        prefix, size = prefix + bytes([size % 128 + 128]), size // 128
    return prefix + bytes([size]) + data


def message(data: bytes, *, announced: int | None = None) -> bytes:
    """As gRPC frames it; `announced`: with another length before it."""
    return struct.pack(">BI", 0, len(data) if announced is None else announced) + data


def request(model: str, padding: int = 200) -> bytes:
    """The messages of one full-duplex exchange as Envoy shows it, each with its gRPC prefix."""
    headers = {":method": "POST", ":path": "/v1/chat/completions", "content-type": "application/json", "x-request-id": "0" * 36}
    pairs = [pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()]
    text = b'{"messages":[{"role":"user","content":"%s"}],"model":"%s"}' % (b"x" * padding, model.encode())
    begin = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(headers=pb.HeaderMap(headers=pairs)),
        protocol_config=pb.ProtocolConfiguration(request_body_mode=pb.FULL_DUPLEX_STREAMED),
    )
    body = pb.ProcessingRequest(request_body=pb.HttpBody(body=text, end_of_stream=True))
    return message(begin.SerializeToString()) + message(body.SerializeToString())


class Peer:
    """A connection that has said its preface."""

    def __init__(self, address: str, timeout_s: float = 10.0, settings: bytes = b"") -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_bytes = 0
        self._buffer = b""
        self._decoder = hpack.Decoder()
        self.next_stream = 1
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)
        self.sent_bytes += len(data)

    def open(self, headers: Mapping[str, str] | None = None, *, ends: bool = False) -> int:
        """Send the headers of a new stream; its number."""
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        table = b"\x20" if stream == 1 else b""  # of size 0, as the router's settings want it said once they are acknowledged (RFC 7541, 4.2)
        self.send(frame(HEADERS, END_HEADERS | (END_STREAM if ends else 0), stream, table + block(headers or CALL)))
        return stream

    def frames(self, timeout_s: float) -> Iterator[tuple[int, int, int, bytes]]:
        """What comes until the connection ends or nothing came for so long: kind, flags, stream, payload. Settings and pings are acknowledged."""
        end = time.monotonic() + timeout_s
        while True:
            while len(self._buffer) >= 9:
                size = int.from_bytes(self._buffer[:3], "big")
                if len(self._buffer) < 9 + size:
                    break
                kind, flags, stream = struct.unpack(">BBI", self._buffer[3:9])
                payload, self._buffer = self._buffer[9 : 9 + size], self._buffer[9 + size :]
                if kind in (SETTINGS, PING) and not flags & ACK:
                    with contextlib.suppress(OSError):
                        self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
                yield kind, flags, stream, payload
            left = end - time.monotonic()
            if left <= 0:
                return
            self.socket.settimeout(left)
            try:
                more = self.socket.recv(2**18)
            except TimeoutError:
                return
            if not more:
                yield -1, 0, 0, b""
                return
            self._buffer += more

    def said(self, timeout_s: float, stop_at: int = 0) -> str:
        """In words what came back, each thing once; reads on until the connection ends, time is over, or stream `stop_at` has ended."""
        words: dict[str, None] = {}
        try:
            for kind, flags, stream, payload in self.frames(timeout_s):
                if kind == -1:
                    words["closed"] = None
                elif kind == HEADERS:
                    fields = {str(name): str(value) for name, value in self._decoder.decode(payload)}
                    words[" ".join(f"{name.lstrip(':')} {fields[name]}" for name in (":status", "grpc-status") if name in fields) or "headers"] = None
                elif kind in (RST_STREAM, GOAWAY):
                    code = int.from_bytes(payload[:4] if kind == RST_STREAM else payload[4:8], "big")
                    words[f"{'RST_STREAM' if kind == RST_STREAM else 'GOAWAY'} {ERRORS[code] if code < len(ERRORS) else code}"] = None
                if stop_at and stream == stop_at and (kind == RST_STREAM or flags & END_STREAM):
                    break
        except (OSError, hpack.HPACKError) as error:
            words[type(error).__name__] = None
        return ", ".join(words) or "nothing"

    def exchange(self, model: str, timeout_s: float) -> bool:
        """One whole request; whether it was answered. Raises OSError if the connection is gone."""
        stream = self.open()
        self.send(frame(DATA, END_STREAM, stream, request(model)))
        answered = False
        for kind, flags, number, payload in self.frames(timeout_s):
            if kind in (-1, GOAWAY):
                raise ConnectionResetError("the router ended the connection")
            if number != stream:
                continue
            if kind == DATA and payload:
                answered = True
                self.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
            if kind == RST_STREAM or (flags & END_STREAM and kind in (DATA, HEADERS)):
                return answered
        raise TimeoutError(f"no answer within {timeout_s:g} s")
