"""What a request body is, by its headers, and the model that it names: JSON or a form, plain or compressed."""

import email.parser
import email.policy
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import brotli
import zstandard

from ..errors import BodyTooLarge, InvalidRequest
from . import scanner

MAX_RATIO = 200  # text compresses 3 to 20 times; a bomb 1,000 times
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's: 16 is added for the gzip wrapper
_STEP_BYTES = 64 * 1024
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_PARAMETER = re.compile(r";\s*([^\s=;]+)\s*=")


class Kind(Enum):
    """How the model is found in it."""

    JSON = "application/json"
    FORM = "multipart/form-data"


@dataclass(frozen=True, slots=True)
class Content:
    """A body that names a model."""

    kind: Kind
    boundary: bytes  # of a form
    encoding: str  # "" = plain

    @property
    def can_be_scanned(self) -> bool:
        """Whether the model can be seen before the body is complete."""
        return self.kind is Kind.JSON and not self.encoding

    def model(self, body: bytes, max_bytes: int) -> str | None:
        """The model that the whole body names; None for a form without one. Raises InvalidRequest or BodyTooLarge."""
        if self.encoding:
            body = decompress(body, self.encoding, max_bytes)
        return scanner.judge(body) if self.kind is Kind.JSON else form_model(body, self.boundary)

    def with_model(self, body: bytes, old: str, new: str, max_bytes: int) -> bytes:
        """The same body, plain, for another model; `model` has read `old` in it."""
        if self.encoding:
            body = decompress(body, self.encoding, max_bytes)
        if self.kind is Kind.JSON:
            return scanner.rename(body, old, new)
        begin, end = _find_in_form(body, self.boundary)[0]
        return b"".join((body[:begin], new.encode(), body[end:]))


def of_headers(headers: Mapping[str, str]) -> Content | None:
    """What the headers announce; None for a body that names no model and passes. Raises InvalidRequest for what cannot be read."""
    given = headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", "").strip().lower()
    encoding = "" if encoding == "identity" else encoding
    if media_type == Kind.JSON.value or media_type.endswith("+json"):
        return Content(Kind.JSON, b"", encoding)
    if media_type == Kind.FORM.value:
        try:
            parsed = email.policy.HTTP.header_factory("content-type", given)
        except IndexError:  # the library's own, for a parameter that ends too soon
            raise InvalidRequest("content-type: multipart/form-data with a parameter that is cut short") from None
        boundary = parsed.params.get("boundary", "")
        if not boundary or len(boundary) > 70 or not boundary.isascii():  # RFC 2046, 5.1.1: 1 to 70 characters
            raise InvalidRequest("content-type: multipart/form-data without a usable boundary")
        return Content(Kind.FORM, boundary.encode(), encoding)
    return None


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The plain body. Raises InvalidRequest for what is broken or unknown, BodyTooLarge above `max_bytes` or MAX_RATIO times its size."""
    limit = min(max_bytes, MAX_RATIO * max(len(body), 1024))
    if encoding not in (*_WINDOW_BITS, "br", "zstd"):
        raise InvalidRequest(f"content-encoding: {encoding!r} is not understood; gzip, deflate, br and zstd are")
    try:
        if encoding == "br":
            return _brotli(body, limit)
        if encoding == "zstd":
            return _bounded(zstandard.ZstdDecompressor(max_window_size=2**23).decompressobj().decompress, body, limit)
        return _zlib(body, _WINDOW_BITS[encoding], limit)
    except (zlib.error, brotli.error, zstandard.ZstdError) as error:
        raise InvalidRequest(f"the body is not {encoding}: {error}") from None


def form_model(body: bytes, boundary: bytes) -> str | None:
    """The one `model` field of a form (RFC 7578). Raises InvalidRequest if it comes twice, is a file, or the form has no end."""
    spans = _find_in_form(body, boundary)
    if len(spans) > 1:
        raise InvalidRequest(f"the form has `model` {len(spans)} times")
    try:
        return body[slice(*spans[0])].decode() if spans else None
    except UnicodeDecodeError:
        raise InvalidRequest("the form's `model` is not UTF-8") from None


def _find_in_form(body: bytes, boundary: bytes) -> list[tuple[int, int]]:
    """Where the values of `model` stand in a form. Raises InvalidRequest."""
    delimiter = b"\r\n--" + boundary
    parts = (b"\r\n" + body).split(delimiter)
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise InvalidRequest("the form has no end")
    found: list[tuple[int, int]] = []
    end = len(parts[0]) - len(b"\r\n")
    for part in parts[1:-1]:
        end += len(delimiter) + len(part)
        head, blank, value = part.partition(b"\r\n\r\n")
        if not blank:
            raise InvalidRequest("a part of the form has no headers")
        headers = email.parser.BytesHeaderParser(policy=email.policy.HTTP).parsebytes(head.lstrip(b" \t\r\n"))
        try:
            disposition = headers["content-disposition"]
        except IndexError:  # as above
            raise InvalidRequest("a part of the form has a parameter that is cut short") from None
        if disposition is not None:
            _check_unambiguous([str(value) for name, value in headers.raw_items() if name.lower() == "content-disposition"])
        if disposition is None or disposition.params.get("name") != "model":
            continue
        if "filename" in disposition.params:
            raise InvalidRequest("the form's `model` is a file")
        found.append((end - len(value), end))
    return found


def _check_unambiguous(dispositions: Sequence[str]) -> None:  # as they came
    """Of a header or a parameter that comes twice, one parser takes the first and another the last: the engine's must read what we do."""
    names = [name.lower() for name in _PARAMETER.findall(_QUOTED.sub('""', dispositions[0]))]
    if len(dispositions) > 1 or len(set(names)) < len(names) or any(name.startswith("name*") for name in names):
        raise InvalidRequest("a part of the form says twice, or in another character set, what it is called")


def _zlib(body: bytes, window_bits: int, limit: int) -> bytes:
    decoder = zlib.decompressobj(window_bits)
    plain = decoder.decompress(body, limit + 1)
    if len(plain) > limit:
        raise _too_large(limit)
    if not decoder.eof or decoder.unused_data:
        raise zlib.error("it is cut short or goes on after its end")
    return plain


def _brotli(body: bytes, limit: int) -> bytes:
    decoder = brotli.Decompressor()
    plain = _bounded(decoder.process, body, limit)
    if not decoder.is_finished():
        raise brotli.error("it is cut short")
    return plain


def _bounded(decode: Callable[[bytes], bytes], body: bytes, limit: int) -> bytes:
    """Feed small pieces, so that a bomb is noticed before it has filled the memory."""
    step = max(64, min(_STEP_BYTES, limit // MAX_RATIO))
    parts: list[bytes] = []
    size = 0
    for start in range(0, len(body), step):
        parts.append(decode(body[start : start + step]))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has over {limit} bytes when decompressed")
