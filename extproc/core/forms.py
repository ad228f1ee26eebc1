"""The `model` of a multipart/form-data body (RFC 7578), read so strictly that no engine can read another one.

vLLM and SGLang read forms with python-multipart, others with readers of their own, and these differ in what they make of odd input: which of two
names counts, where a quoted string ends, whether a line that only begins with the boundary ends a part. What any two of them read differently
is refused here with a sentence that names it. An OpenAI form (a file and a few fields) has none of it.
"""

import re

from ..errors import InvalidRequest
from .pieces import Buffer
from .reading import MAX_MODEL_BYTES, Reading

MAX_BOUNDARY_BYTES = 256  # as python-multipart; RFC 2046, 5.1.1 says 70, which some clients exceed
MAX_HEADER_BYTES = 4096  # of the request's content-type
MAX_PARTS = 1000  # as Starlette
MAX_HEAD_BYTES = 8192  # of one part's header lines together
MAX_HEADER_LINES = 16
MAX_PARAMETERS = 16
_FIRST_WINDOW_BYTES, _WINDOW_BYTES = 2**12, 2**20  # a body that is no `bytes` is searched through copies of so much at a time

# One parameter and what ends it. Within quotes, one backslash before a quote escapes that quote; several before a quote are refused, since readers
# differ in whether the value ends there. Tabs and spaces may surround all of it (RFC 9110, 5.6.6).
_PARAMETER = re.compile(
    rb'[ \t]*+(?:(?P<name>[!#$%&\'*+\-.^_`|~0-9A-Za-z]++)[ \t]*+=[ \t]*+(?:"(?P<quoted>(?:\\"|\\*+[^"\\\x00\r\n]++)*+)"'
    rb'|(?P<token>[^"; \t\x00-\x1f\x7f](?:[^";\x00-\x08\x0a-\x1f\x7f]*+)))[ \t]*+)?(?:;|\Z)'
)
_HEADER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([^\r\n\x00]*+)")
_BOUNDARY = re.compile(rb"[\x20-\x7e]{0,%d}[\x21-\x7e]" % (MAX_BOUNDARY_BYTES - 1))  # RFC 2046: no space at its end
_PLAIN_NAME = re.compile(rb"[^\x00-\x20\x7f()<>@,;:\\\"/?={}]++")  # RFC 9110's token, and the brackets that names of lists have
_LINE_ENDS = re.compile(rb"[\r\n]*+")
_REST = re.compile(rb"[ \t\r\n]*+\Z")
_UTF8 = (b"utf-8", b"utf8", b"us-ascii", b"ascii")  # of the model's part alone; of the whole form, ASCII would make engines read Latin-1


def boundary(content_type: str) -> bytes:
    """The boundary that a form's `content-type` names. Raises InvalidRequest."""
    try:
        given = content_type.encode("ascii")
    except UnicodeEncodeError:
        raise InvalidRequest("content-type: multipart/form-data with a parameter that is not ASCII") from None
    if len(given) > MAX_HEADER_BYTES:
        raise InvalidRequest(f"content-type: multipart/form-data in {len(given)} bytes; {MAX_HEADER_BYTES} is the limit")
    parameters = _parameters(given.partition(b";")[2], "content-type")
    charset = parameters.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8"):
        raise InvalidRequest(f"content-type: charset {_shown(charset)}; a form must be UTF-8")
    found = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(found) or b"\\" in found:
        raise InvalidRequest(f"content-type: multipart/form-data without a usable boundary of 1 to {MAX_BOUNDARY_BYTES} printable characters")
    return found


def read(body: Buffer, boundary: bytes) -> Reading:
    """Where the one `model` field stands; a Reading without a model if there is none. Raises InvalidRequest."""
    delimiter = b"\r\n--" + boundary
    position = _behind_first(body, delimiter)
    found: Reading | None = None
    for _ in range(MAX_PARTS + 1):
        if position is None:
            return found or Reading(None)
        begin, is_model = _behind_head(body, position, delimiter)
        end = _find(body, delimiter, begin)
        if end < 0:
            raise InvalidRequest("the form has no end: its last boundary is missing")
        if is_model:
            if found is not None:
                raise InvalidRequest("the form has `model` more than once")
            found = Reading(_model(bytes(body[begin : min(end, begin + MAX_MODEL_BYTES + 1)])), begin, end)
        position = _behind_delimiter(body, end + len(delimiter))
    raise InvalidRequest(f"the form has over {MAX_PARTS} parts")


def _behind_first(body: Buffer, delimiter: bytes) -> int | None:
    """Behind the first boundary, which must be the beginning: readers differ in what they make of text before it."""
    found = _LINE_ENDS.match(body)
    start = found.end() if found else 0
    if bytes(body[start : start + len(delimiter) - 2]) != delimiter[2:]:
        raise InvalidRequest("the form does not begin with its boundary" if len(body) > start else "the form is empty")
    return _behind_delimiter(body, start + len(delimiter) - 2)


def _behind_delimiter(body: Buffer, position: int) -> int | None:
    """Where the next part begins, or None at the end of the form, after which nothing but white space may come."""
    after = bytes(body[position : position + 2])
    if after == b"\r\n":
        return position + 2
    if after == b"--":
        if not _REST.match(body, position + 2):
            raise InvalidRequest("the form goes on after its last boundary")
        return None
    raise InvalidRequest("the form has no end: it is cut short in a boundary" if len(after) < 2 else "a line of the form begins with its boundary and goes on")


def _behind_head(body: Buffer, start: int, delimiter: bytes) -> tuple[int, bool]:
    """Where the value of the part begins whose headers begin at `start`, and whether it is the model."""
    window = bytes(body[start : start + MAX_HEAD_BYTES + 4])
    size = 0 if window.startswith(b"\r\n") else window.find(b"\r\n\r\n")
    if size < 0:
        why = f"headers of over {MAX_HEAD_BYTES} bytes" if len(window) > MAX_HEAD_BYTES else "headers without an end"
        raise InvalidRequest(f"a part of the form has {why}")
    head = window[:size]
    begin = start + size + (4 if size else 2)
    value_start = bytes(body[begin : begin + len(delimiter) - 2])
    if head.startswith(delimiter[2:]) or delimiter in head or value_start == delimiter[2:]:
        raise InvalidRequest("a part of the form has no value: its boundary stands among its headers")
    return begin, _is_model(_headers(head))


def _headers(head: bytes) -> dict[bytes, bytes]:
    lines = head.split(b"\r\n", MAX_HEADER_LINES) if head else []
    if len(lines) > MAX_HEADER_LINES:
        raise InvalidRequest(f"a part of the form has over {MAX_HEADER_LINES} header lines")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise InvalidRequest(f"a part of the form has a header line that is none: {_shown(line)}")
        name = found.group(1).lower()
        if name in headers:
            raise InvalidRequest(f"a part of the form has {_shown(name)} twice")
        headers[name] = found.group(2).rstrip(b" \t")
    return headers


def _is_model(headers: dict[bytes, bytes]) -> bool:
    """Whether these are the headers of the `model` field. Raises InvalidRequest where readers would differ about it."""
    disposition, _, rest = headers.get(b"content-disposition", b"").partition(b";")
    if disposition.strip(b" \t").lower() != b"form-data":
        raise InvalidRequest("a part of the form has no `content-disposition: form-data`")
    parameters = _parameters(rest, "content-disposition")
    if any(name.startswith(b"name*") for name in parameters):
        raise InvalidRequest("a part of the form says in another character set what it is called (`name*`)")
    name = parameters.get(b"name")
    if name is None:
        raise InvalidRequest("a part of the form has no name")
    if name.replace(b"\\", b"") != b"model":
        return False
    if name != b"model":
        raise InvalidRequest("a part of the form has a name with a backslash")
    if any(parameter.startswith(b"filename") for parameter in parameters):
        raise InvalidRequest("the form's `model` is a file")
    if headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
        raise InvalidRequest("the form's `model` has a content-transfer-encoding, which RFC 7578 does not allow")
    charset = _parameters(headers.get(b"content-type", b"").partition(b";")[2], "content-type").get(b"charset", b"utf-8")
    if charset.lower() not in _UTF8:
        raise InvalidRequest(f"the form's `model` has charset {_shown(charset)}; it must be UTF-8")
    return True


def _parameters(text: bytes, where: str) -> dict[bytes, bytes]:
    """What stands behind the first `;` of a header's value, names in lower case, values without quotes and escaped quotes. Raises InvalidRequest."""
    parameters: dict[bytes, bytes] = {}
    position = 0
    for _ in range(MAX_PARAMETERS + 1):
        if position >= len(text):
            return parameters
        found = _PARAMETER.match(text, position)
        if found is None:
            raise InvalidRequest(f"{where}: a parameter that is not understood: {_shown(text[position:].strip())}")
        position = found.end()
        name = found["name"]
        if name is None:
            continue  # `;;`, or one at the end, as some clients write
        name = name.lower()
        if name in parameters:
            raise InvalidRequest(f"{where}: the parameter {_shown(name)} twice")
        token = found["token"]
        if name == b"name" and token is not None and not _PLAIN_NAME.fullmatch(token.rstrip(b" \t")):
            raise InvalidRequest(f"{where}: a name that must be quoted: {_shown(token)}")  # some readers take `(x)` for a comment
        parameters[name] = found["quoted"].replace(b'\\"', b'"') if token is None else token.rstrip(b" \t")
    raise InvalidRequest(f"{where}: over {MAX_PARAMETERS} parameters")


def _model(value: bytes) -> str:
    if len(value) > MAX_MODEL_BYTES:
        raise InvalidRequest(f"the form's `model` has over {MAX_MODEL_BYTES} bytes")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the form's `model` is not UTF-8") from None


def _shown(text: bytes) -> str:
    """A few characters of what a client sent, in quotes, for the message to that client."""
    return ascii(text[:40].decode("latin-1"))


def _find(body: Buffer, what: bytes, start: int) -> int:
    """Where `what` begins first from `start` on, or -1. Linear: windows grow, so that a short part does not cost a long copy."""
    if isinstance(body, bytes):
        return body.find(what, start)
    size = _FIRST_WINDOW_BYTES
    while start < len(body):
        at = bytes(body[start : start + size]).find(what)
        if at >= 0:
            return start + at
        start += size - len(what) + 1
        size = min(4 * size, _WINDOW_BYTES)
    return -1
