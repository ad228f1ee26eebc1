"""What a request's header block says that a gRPC server must know (RFC 7541; RFC 9113, 8): the path, or why the request is none for it.

The peer is told to keep no dynamic table. From then on a block is references to the static table and literals, and can be walked without a library:
values that nobody asks for are passed over by their length. A gateway that traces puts another `traceparent` into every block, so decoding whole
blocks would cost more than all the rest of a request. Until the peer has given up its table, and where a block changes the table's size, the `hpack`
library reads.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import hpack
from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_FAIL, HUFFMAN_TABLE, decode_huffman
from hpack.table import HeaderTable

from .frames import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, ConnectionFault

MAX_FIELDS = 256  # of one block; a gateway's has a dozen
MAX_KNOWN = 256  # blocks, and strings, that are remembered; then they are forgotten and learned anew
MAX_KNOWN_BYTES = 1024  # longer ones are not remembered

METHOD_NOT_ALLOWED, UNSUPPORTED_MEDIA_TYPE = 405, 415

_STATIC: tuple[tuple[bytes, bytes], ...] = ((b"", b""), *HeaderTable.STATIC_TABLE)  # counted from 1 (RFC 7541, appendix A)
_WANTED = frozenset((b":method", b":path", b":scheme", b":authority", b"content-type", b"content-length", b"te"))
_PSEUDO = frozenset((b":method", b":path", b":scheme", b":authority"))
_OF_CONNECTIONS = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))  # RFC 9113, 8.2.2
_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-z]+").fullmatch  # a token of RFC 9110 without capitals (RFC 9113, 8.2.1)
_PATH = re.compile(rb"/[!-~\x80-\xff]*").fullmatch

Fields = tuple[tuple[bytes, bytes], ...]

_Key = TypeVar("_Key")
_Known = TypeVar("_Known")


@dataclass(frozen=True, slots=True)
class Request:
    """What matters of a request's headers."""

    path: str = ""
    status: int = 0  # what HTTP answers to a request that is no POST of gRPC; 0 for one that is
    is_head: bool = False
    length: int = -1  # the content-length; -1 where none is given
    malformed: str = ""  # why RFC 9113 (8.1.1) forbids it; empty if it does not


class Blocks:
    """Reads the header blocks of one connection, in the order in which they come."""

    def __init__(self) -> None:
        self._library = hpack.Decoder()
        self._is_pinned = False
        self._requests: dict[bytes, Request] = {}  # by block, while there is no table that could change a block's meaning
        self._judged: dict[Fields, Request] = {}  # by fields, where only values differ that nobody asks for
        self._strings: dict[bytes, bytes] = {}  # names, and values that are wanted: as coded, with their length -> decoded

    def pin(self) -> None:
        """The peer has acknowledged that it may keep no table, so it must say at the beginning of its next block that it keeps none (RFC 7541, 4.2).

        From that word on it cannot have one again. A peer that never says it is read with a table as before (of 4,096 bytes at most), which is right
        whether it uses one or not.
        """
        self._is_pinned = True

    def request(self, block: bytes) -> Request:
        """Read the block that opens a stream. Raises ConnectionFault if it cannot be decoded."""
        request = self._requests.get(block)
        if request is not None:
            return request
        stateless = not self._library.header_table_size
        fields = self._fields(block)
        request = self._judged.get(fields)
        if request is None:
            request = _judge(fields)
        if len(block) <= MAX_KNOWN_BYTES:
            _remember(self._judged, fields, request)
            if stateless and not self._library.header_table_size:
                _remember(self._requests, block, request)
        return request

    def trailers(self, block: bytes) -> str:
        """Read the block that ends a request: why it is malformed, or nothing. Raises ConnectionFault if it cannot be decoded."""
        return next((why for name, value in self._fields(block) if (why := _fault_of(name, value, in_trailers=True))), "")

    def _fields(self, block: bytes) -> Fields:
        if not self._library.header_table_size and (not block or block[0] & 0xE0 != 0x20):
            return self._walk(block)
        try:
            fields = self._library.decode(block, raw=True)
        except hpack.OversizedHeaderListError:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"headers of more than {self._library.max_header_list_size} bytes") from None
        except (hpack.HPACKError, IndexError) as error:  # IndexError: a block that ends inside a field
            raise ConnectionFault(COMPRESSION_ERROR, f"a header block that cannot be decoded: {error}") from None
        if self._is_pinned and not self._library.header_table_size:
            self._library.max_allowed_table_size = 0
        return tuple((bytes(name), bytes(value)) for name, value in fields)

    def _walk(self, block: bytes) -> Fields:  # noqa: PLR0915  # one walk, unrolled
        """Cut a block without table into fields (RFC 7541, 6). Values that are not wanted are checked and come out empty.

        Almost every integer is below its prefix's largest value, so `_integer` is called for the others only.
        """
        fields: list[tuple[bytes, bytes]] = []
        strings = self._strings
        position, size = 0, len(block)
        try:
            while position < size:
                if len(fields) >= MAX_FIELDS:
                    raise ConnectionFault(ENHANCE_YOUR_CALM, f"more than {MAX_FIELDS} header fields")
                first = block[position]
                position += 1
                if first & 0x80:
                    index = first & 0x7F
                    if index == 0x7F:
                        index, position = _integer(block, position, index)
                    if not 0 < index < len(_STATIC):
                        raise _undecodable(f"there is no field {index}")
                    fields.append(_STATIC[index])
                    continue
                if first & 0xE0 == 0x20:
                    raise _undecodable("a change of the table's size behind a field")
                mask = 0x3F if first & 0x40 else 0x0F
                index = first & mask
                if index:
                    if index == mask:
                        index, position = _integer(block, position, mask)
                    if index >= len(_STATIC):
                        raise _undecodable(f"there is no name {index}")
                    name = _STATIC[index][0]
                else:
                    begin = position
                    length = block[position] & 0x7F
                    position += 1
                    if length == 0x7F:
                        length, position = _integer(block, position, length)
                    position += length
                    coded = block[begin:position]
                    name = strings.get(coded) or self._string(coded, length)
                begin = position
                length = block[position] & 0x7F
                position += 1
                if length == 0x7F:
                    length, position = _integer(block, position, length)
                position += length
                if name in _WANTED:
                    coded = block[begin:position]
                    value = strings.get(coded)
                    fields.append((name, self._string(coded, length) if value is None else value))
                else:
                    if block[begin] & 0x80:
                        _check_huffman(block[position - length : position])
                    fields.append((name, b""))
        except IndexError:
            raise _undecodable("it ends inside a field") from None
        if position > size:
            raise _undecodable("it ends inside a string")
        return tuple(fields)

    def _string(self, coded: bytes, length: int) -> bytes:
        """A string literal (RFC 7541, 5.2) of `length` bytes, behind its length."""
        text = coded[len(coded) - length :]
        if coded[0] & 0x80:
            _check_huffman(text)
            text = decode_huffman(text)
        if len(coded) <= MAX_KNOWN_BYTES:
            _remember(self._strings, coded, text)
        return text


def _remember(memory: dict[_Key, _Known], key: _Key, value: _Known) -> None:
    if len(memory) >= MAX_KNOWN:
        memory.clear()
    memory[key] = value


def _judge(fields: Fields) -> Request:
    """Whether these are the headers of a POST of gRPC (RFC 9113, 8.2 and 8.3; gRPC over HTTP/2)."""
    found: dict[bytes, bytes] = {}
    malformed = ""
    only_pseudo_so_far = True
    for name, value in fields:
        if name in _PSEUDO:
            if not only_pseudo_so_far:
                malformed = malformed or f"{name.decode()} after other headers"
        else:
            only_pseudo_so_far = False
            malformed = malformed or _fault_of(name, value)
            if name not in _WANTED:
                continue
        if name in found and name != b"te":
            malformed = malformed or f"two of {name.decode()}"
        found[name] = value
    malformed = malformed or _missing(found)
    length = -1
    if b"content-length" in found:
        digits = found[b"content-length"]
        if digits.isdigit() and len(digits) < 20:
            length = int(digits)
        else:
            malformed = malformed or "a content-length that is no number"
    method, status = found.get(b":method", b""), 0
    kind = found.get(b"content-type", b"").lower()
    if method != b"POST":
        status = METHOD_NOT_ALLOWED
    elif not (kind == b"application/grpc" or kind.startswith((b"application/grpc+", b"application/grpc;"))):
        status = UNSUPPORTED_MEDIA_TYPE
    return Request(found.get(b":path", b"").decode("latin-1"), status, method == b"HEAD", length, malformed)


def _missing(found: dict[bytes, bytes]) -> str:
    """The pseudo-headers that a request must have (RFC 9113, 8.3.1; CONNECT: 8.5)."""
    if not _NAME(found.get(b":method", b"").lower()):
        return "no :method"
    if found[b":method"] == b"CONNECT":
        return "" if b":authority" in found and b":scheme" not in found and b":path" not in found else "CONNECT is of an :authority only"
    if not found.get(b":scheme"):
        return "no :scheme"
    path = found.get(b":path", b"")
    if not _PATH(path) and not (path == b"*" and found[b":method"] == b"OPTIONS"):
        return "no :path" if not path else "a :path that does not begin with a slash or has characters that none may have"
    return ""


def _fault_of(name: bytes, value: bytes, *, in_trailers: bool = False) -> str:
    """What RFC 9113 (8.2) forbids of a field that is no pseudo-header of a request."""
    if not _NAME(name):
        if name.startswith(b":"):
            return "a pseudo-header in trailers" if in_trailers else "an unknown pseudo-header"
        return "a header name with capitals or characters that none may have"
    if name in _OF_CONNECTIONS:
        return f"{name.decode()}, which HTTP/2 has no use for"
    if name == b"te" and value != b"trailers":
        return "te other than trailers"
    return ""


def _undecodable(why: str) -> ConnectionFault:
    return ConnectionFault(COMPRESSION_ERROR, f"a header block that cannot be decoded: {why}")


def _integer(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """An integer (RFC 7541, 5.1) that goes on at `position`, its prefix being full, and the position behind it. Raises IndexError at the block's end."""
    value = mask
    for shift in (0, 7, 14, 21):  # a block has no more than 64 KiB
        more = block[position]
        position += 1
        value += (more & 0x7F) << shift
        if more < 0x80:
            return value, position
    raise _undecodable("an integer that is too large")


def _byte_steps() -> list[list[object]]:
    """The `hpack` library's table of half bytes as a table of whole bytes: each row is a state, and gives the next row for a byte, `_LOST` where no code
    goes on, and behind the 256 whether a string may end here.
    """
    count = len(HUFFMAN_TABLE) // 16
    rows: list[list[object]] = [[] for _ in range(count)]
    ends = [False] * count
    ends[0] = True
    for state, flags, _ in HUFFMAN_TABLE:
        ends[state] |= bool(flags & HUFFMAN_COMPLETE) and not flags & HUFFMAN_FAIL
    for number, row in enumerate(rows):
        for high in HUFFMAN_TABLE[number * 16 : number * 16 + 16]:
            for low in HUFFMAN_TABLE[high[0] * 16 : high[0] * 16 + 16]:
                row.append(_LOST if (high[1] | low[1]) & HUFFMAN_FAIL else rows[low[0]])
        row.append(ends[number])
    return rows


_LOST: list[object] = []
_LOST += [_LOST] * 256 + [False]
_START = _byte_steps()[0]


def _check_huffman(text: bytes) -> None:
    """Raise ConnectionFault unless `text` is a Huffman code with a proper end (RFC 7541, 5.2), without decoding it."""
    row: list[object] = _START
    for byte in text:
        row = row[byte]  # type: ignore[assignment]  # rows give rows
    if not row[256]:
        raise _undecodable("a string that is no Huffman code")
