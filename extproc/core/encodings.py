"""Content encodings (RFC 9110, 8.4): decode a body for reading, with the size of what comes out bounded before it is made.

A kilobyte of brotli or zstd may stand for gigabytes, so each decoder is asked for pieces of bounded size only, and stopped at the limit.
"""

import zlib
from collections.abc import Callable, Generator, Iterator
from io import BytesIO

import brotli
import zstandard

from ..errors import BodyTooLarge, InvalidRequest
from .pieces import Buffer

MAX_RATIO = 200  # text compresses 3 to 20 times; a bomb 1,000 times
RATIO_FLOOR_BYTES = 1024  # a body below it may decode to as much as one of this size: a few repeated words compress beyond any ratio
MAX_ENCODINGS = 2  # one by the client's library, one by a proxy's; each is a whole pass over the body
MAX_MEMBERS = 64  # gzip members or zstd frames in one body; each sets up a decoder anew
MAX_WINDOW_BYTES = 2**23  # what RFC 8878, 3.1.1.1.2 recommends to support at least

NOTHING = ("", "identity", "utf-8", "none")  # said by clients that mean "not encoded"
_ALIASES = {"x-gzip": "gzip"}  # RFC 9110, 8.4.1.3
_PIECE_BYTES = 64 * 1024  # fed to a decoder, and taken from one, at a time
# A zstd block of 4 bytes may stand for 128 KiB, and its decoder knows no output limit: so much is fed to it at a time that at most 4 MiB come out.
_ZSTD_PIECE_BYTES = 128
_RAW, _ZLIB, _GZIP = -15, 15, 31  # zlib's window bits


def of_header(value: str) -> tuple[str, ...]:
    """The encodings that a `content-encoding` names, in the order in which they were applied. Raises InvalidRequest for unknown ones and too many."""
    if not value:
        return ()
    names = tuple(_ALIASES.get(name, name) for part in value.lower().split(",") if (name := part.strip(" \t")) not in NOTHING)
    for name in names:
        if name not in _DECODERS:
            raise InvalidRequest(f"content-encoding: {name[:40]!r} is not understood; gzip, deflate, br and zstd are")
    if len(names) > MAX_ENCODINGS:
        raise InvalidRequest(f"content-encoding: {len(names)} encodings, one upon another; {MAX_ENCODINGS} is the limit")
    return names


def decode(body: Buffer, encodings: tuple[str, ...], max_bytes: int) -> bytes:
    """The plain body. Raises InvalidRequest for what is broken, BodyTooLarge above `max_bytes` or MAX_RATIO times the body's size, at each step."""
    limit = min(max_bytes, MAX_RATIO * max(len(body), RATIO_FLOOR_BYTES))
    plain = body
    for name in reversed(encodings):
        plain = _bounded(_DECODERS[name](memoryview(plain)), name, limit)
    return bytes(plain)


def _bounded(pieces: Iterator[bytes], name: str, limit: int) -> bytes:
    whole = BytesIO()  # grows in place, and gives what it holds without a copy
    size = 0
    try:
        for piece in pieces:
            size += len(piece)
            if size > limit:
                raise BodyTooLarge(f"the body has over {limit} bytes when decompressed")
            whole.write(piece)
    except (zlib.error, brotli.error, zstandard.ZstdError) as error:
        raise InvalidRequest(f"the body is not {name}: {str(error)[:120]}") from None
    return whole.getvalue()


def _gzip(body: memoryview) -> Iterator[bytes]:
    """One or more members (RFC 1952, 2.2)."""
    position = 0
    for _ in range(MAX_MEMBERS):
        position = yield from _zlib_stream(body, position, _GZIP, "gzip")
        if position == len(body):
            return
    raise InvalidRequest(f"the body has over {MAX_MEMBERS} gzip members")


def _deflate(body: memoryview) -> Iterator[bytes]:
    """zlib's format, as RFC 9110 has it, or a raw deflate stream, as it was long taken for; which, its first two bytes tell (RFC 1950, 2.2)."""
    is_zlib = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] * 256 + body[1]) % 31 == 0
    if (yield from _zlib_stream(body, 0, _ZLIB if is_zlib else _RAW, "deflate")) != len(body):
        raise InvalidRequest("the body is not deflate: it goes on after its end")


def _zlib_stream(body: memoryview, position: int, window_bits: int, name: str) -> Generator[bytes, None, int]:
    """Decode one stream from `position` on; the generator's value is where it ended."""
    decoder = zlib.decompressobj(window_bits)
    while not decoder.eof:
        if position == len(body):
            raise InvalidRequest(f"the body is not {name}: it is cut short")
        piece = body[position : position + _PIECE_BYTES]
        position += len(piece)
        yield decoder.decompress(piece, _PIECE_BYTES)
        while decoder.unconsumed_tail and not decoder.eof:
            yield decoder.decompress(decoder.unconsumed_tail, _PIECE_BYTES)
    return position - len(decoder.unused_data)


def _brotli(body: memoryview) -> Iterator[bytes]:
    decoder = brotli.Decompressor()
    position = 0
    while not decoder.is_finished():
        piece = body[position : position + _PIECE_BYTES] if decoder.can_accept_more_data() else b""
        position += len(piece)
        plain = decoder.process(piece, output_buffer_limit=_PIECE_BYTES)
        if not plain and not piece and position == len(body):
            raise InvalidRequest("the body is not br: it is cut short")
        yield plain
    if position != len(body):
        raise InvalidRequest("the body is not br: it goes on after its end")


def _zstd(body: memoryview) -> Iterator[bytes]:
    """One or more frames (RFC 8878, 3.1), skippable ones included."""
    context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    position = 0
    for _ in range(MAX_MEMBERS):
        decoder = context.decompressobj(write_size=_PIECE_BYTES)
        while not decoder.eof:
            if position == len(body):
                raise InvalidRequest("the body is not zstd: it is cut short")
            piece = body[position : position + _ZSTD_PIECE_BYTES]
            position += len(piece)
            yield decoder.decompress(piece)
        position -= len(decoder.unused_data)
        if position == len(body):
            return
    raise InvalidRequest(f"the body has over {MAX_MEMBERS} zstd frames")


_DECODERS: dict[str, Callable[[memoryview], Iterator[bytes]]] = {"gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd}
