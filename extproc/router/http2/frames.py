"""HTTP/2 frames as RFC 9113 (4, 6, 7) numbers them, and the two ways in which a peer's frame can be wrong."""

import struct
from typing import TypeVar

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0x0, 0x1, 0x2, 0x3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 0x5, 0x6, 0x7, 0x8, 0x9, 0xB
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 0x1, 0x2, 0x3, 0x4, 0x5

DEFAULT_WINDOW = 65_535  # 6.9.2: of a connection, and of streams until SETTINGS say otherwise
MAX_WINDOW = 2**31 - 1
MIN_MAX_FRAME, MAX_MAX_FRAME = 2**14, 2**24 - 1
MAX_SETTINGS_BYTES = 6 * 32  # as nghttp2 allows; a dozen settings are registered

HEAD = struct.Struct(">HBBBI")  # a length of three bytes, type, flags, stream
HEAD_BYTES = HEAD.size
SETTING = struct.Struct(">HI")
WORD = struct.Struct(">I")

PRIORITY_BYTES = 5  # the size of a PRIORITY frame, and of the same in HEADERS
NAMES = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE", "CONTINUATION")

_Payload = TypeVar("_Payload", bytes, memoryview)


class ConnectionFault(Exception):
    """The peer broke the protocol; the connection ends with this error code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id) + payload


def unpad(payload: _Payload, flags: int) -> _Payload:
    """The payload of a DATA or HEADERS frame without its padding."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "padding longer than the frame")
    return payload[1 : len(payload) - payload[0]]


def read_settings(payload: bytes) -> dict[int, int]:
    """The settings of one frame, by number; of a setting that is named twice the last value counts (6.5.3). Raises ConnectionFault."""
    if len(payload) % SETTING.size:
        raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS of a size that is no multiple of 6")
    if len(payload) > MAX_SETTINGS_BYTES:
        raise ConnectionFault(ENHANCE_YOUR_CALM, f"SETTINGS of {len(payload)} bytes; the limit is {MAX_SETTINGS_BYTES}")
    values = {}
    for name, value in SETTING.iter_unpack(payload):
        if name == ENABLE_PUSH and value > 1:
            raise ConnectionFault(PROTOCOL_ERROR, f"ENABLE_PUSH is {value}, not 0 or 1")
        if name == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFault(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE over 2^31-1")
        if name == MAX_FRAME_SIZE and not MIN_MAX_FRAME <= value <= MAX_MAX_FRAME:
            raise ConnectionFault(PROTOCOL_ERROR, f"MAX_FRAME_SIZE is {value}, not between 2^14 and 2^24-1")
        values[name] = value
    return values
