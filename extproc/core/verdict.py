"""The verdict on a whole JSON body: which model it names and where.

Strict (RFC 8259): UTF-8 only, no NaN, no unpaired surrogates, and one top-level `model`, because a body that the router and the engine read
differently would be routed for one adapter and answered by another. The engine's parser takes the last of two `model` keys, so two are refused.
One thing is taken as engines take it: a UTF-8 byte order mark, which Python's `json.loads` skips.

No state is kept between verdicts, so that any number of threads may judge at once.
"""

import codecs
import json
import re
from collections.abc import Sequence

import msgspec

from ..errors import InvalidRequest
from . import prefix
from .pieces import Buffer
from .reading import MAX_MODEL_BYTES, Reading

MAX_KEYS = 1024  # OpenAI's chat request has 35; a million keys cost two seconds and 300 MB
MAX_KEY_CHARS = 1024
_SMALL_BYTES = MAX_KEY_CHARS  # so small a body can have neither too many keys, of five bytes each at least, nor one too long
_WINDOW_BYTES = 2**20  # a string takes up to four bytes per character: a window of the body is decoded at a time
_BOM = codecs.BOM_UTF8

# What the model reads, in the order in which chat templates put it: tools and documents into the first message, the system's words before the others'.
# `system` is Anthropic's, `instructions` and `input` are of /v1/responses, `text` is SGLang's. A request has few of them.
_PROMPT = ("tools", "documents", "system", "instructions", "messages", "prompt", "input", "text")
_LEAST_BYTES = prefix.MIN_BLOCKS * prefix.BLOCK_BYTES  # a smaller body has too few blocks for anybody to prefer
_CACHE_SALT = "cache_salt"  # vLLM: blocks of requests with another salt are not shared, so that no tenant finds out what others asked

# From behind one value (or the beginning) to the next: white space, comma or brace, the key, the colon. The body is known to be JSON here.
_TO_VALUE = re.compile(rb'[ \t\n\r,{]*+"(?:[^"\\]++|\\.)*+"[ \t\n\r]*+:[ \t\n\r]*+')
_NOT_A_NUMBER = re.compile(rb"-?(?:NaN|Infinity)")
_ESCAPES = re.compile(rb"(?P<surrogate>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\[\x00-\xff]")
_QUOTED_END = re.compile(rb'[^"\\]{0,5}"')
_BLANK = re.compile(rb"[ \t\n\r]*+")
_LOOK_BACK_BYTES = 64  # for the escape that stopped the parser: two of six bytes, and backslashes before them
_AT_BYTE = re.compile(r"\(byte (\d+)\)")


class _Key(str):
    """A top-level key. Each hashes as itself, so that a dict keeps those which read the same apart."""

    __slots__ = ()
    __hash__ = object.__hash__


_Object = dict[_Key, msgspec.Raw]  # Raw: values are checked and skipped, not built
_small_object = msgspec.json.Decoder(_Object, dec_hook=type.__call__)
_string = msgspec.json.Decoder(str)


def judge(body: Buffer, start: int = 0, *, with_blocks: bool = False) -> Reading:
    """The `model` of a whole JSON body, if it has one. Raises InvalidRequest, saying what is wrong, for two, for one that is no string, and for no JSON.

    `start` is where the JSON begins: behind a byte order mark. `with_blocks`: the hashes of the prompt's blocks, too.
    """
    text = memoryview(body)[start:] if start else body
    size = len(text)
    try:
        if not (type(text) is bytes and text.isascii()):
            _check_utf8(text)  # msgspec does not look into the strings that it skips
        fields = (_small_object if size <= _SMALL_BYTES else _counting_decoder()).decode(text)
    except UnicodeDecodeError as error:
        raise InvalidRequest(_why_not_utf8(body, error.reason, error.start + start)) from None
    except msgspec.ValidationError:
        raise InvalidRequest("the body is JSON, but not an object") from None
    except msgspec.DecodeError as error:
        complaint = str(error)
    except RecursionError:
        raise InvalidRequest("the body is not JSON that can be read: nested too deeply") from None
    else:
        is_small, has_blocks = size <= _SMALL_BYTES, with_blocks and size > _LEAST_BYTES
        return _read(body, start, list(fields), list(fields.values()), is_small=is_small, with_blocks=has_blocks)
    if not start and body[:3] == _BOM:
        return judge(body, len(_BOM), with_blocks=with_blocks)
    raise InvalidRequest(_why_not_json(body, start, complaint))


def _read(body: Buffer, start: int, keys: Sequence[str], values: Sequence[msgspec.Raw], *, is_small: bool, with_blocks: bool) -> Reading:
    count = keys.count("model")
    if count != 1:
        if not count:
            return Reading(None, blocks=_blocks("", keys, values)) if with_blocks else Reading(None)
        raise InvalidRequest(f"the body has `model` {count} times")
    place = keys.index("model")
    value = memoryview(values[place])
    size = len(value)
    if size > MAX_MODEL_BYTES:
        raise InvalidRequest(f"the body's `model` is written in {size} bytes; {MAX_MODEL_BYTES} is the limit")
    try:
        model = _string.decode(value)
    except msgspec.ValidationError:
        raise InvalidRequest("the body's `model` is not a string") from None
    blocks = _blocks(model, keys, values) if with_blocks else ()
    if is_small and type(body) is bytes:
        begin = body.find(value)
        if begin == body.rfind(value):  # in most bodies it is there once only, and found without a walk
            return Reading(model, begin, begin + size, None, blocks)
    begin = start
    for before in values[:place]:
        begin = _behind_key(body, begin) + memoryview(before).nbytes
    begin = _behind_key(body, begin)
    return Reading(model, begin, begin + size, None, blocks)


def _blocks(model: str, keys: Sequence[str], values: Sequence[msgspec.Raw]) -> tuple[int, ...]:
    """The hashes of the prompt's blocks: its JSON as it stands in the body. The values are views, so nothing is copied or parsed again."""
    salt = values[keys.index(_CACHE_SALT)] if _CACHE_SALT in keys else b""
    prompt = [memoryview(values[keys.index(key)]) for key in _PROMPT if key in keys]
    return prefix.block_hashes(prompt, b"%b %b" % (model.encode(), salt))


def _behind_key(body: Buffer, position: int) -> int:
    found = _TO_VALUE.match(body, position)
    assert found is not None, "msgspec has read a key here"
    return found.end()


def _counting_decoder() -> "msgspec.json.Decoder[_Object]":
    """A decoder for one body, that stops at the first key too many. Made for each (2 us), since the count is its state."""
    count = 0

    def key(kind: type[_Key], text: str) -> _Key:
        nonlocal count
        count += 1
        if count > MAX_KEYS:
            raise InvalidRequest(f"the body has over {MAX_KEYS} keys at its top level")
        if len(text) > MAX_KEY_CHARS:
            raise InvalidRequest(f"a key of the body has {len(text)} characters; {MAX_KEY_CHARS} is the limit")
        return kind(text)

    return msgspec.json.Decoder(_Object, dec_hook=key)


def _check_utf8(text: Buffer) -> None:
    """Raise UnicodeDecodeError, with its place in the whole. Decodes a window at a time."""
    position, size = 0, len(text)
    view = memoryview(text)
    while position < size:
        end = min(size, position + _WINDOW_BYTES)
        try:
            position += codecs.utf_8_decode(view[position:end], "strict", end == size)[1]
        except UnicodeDecodeError as error:
            raise UnicodeDecodeError("utf-8", b"", position + error.start, position + error.end, error.reason) from None


# ---- what to say of a body that is refused


def _other_encoding(body: Buffer) -> str:
    """The Unicode encoding that a body seems to have instead of UTF-8, by its first bytes; "" for none."""
    name = json.detect_encoding(bytes(body[:4]))
    return name[:6].upper() if name.startswith(("utf-16", "utf-32")) else ""


def _why_not_utf8(body: Buffer, reason: str, place: int) -> str:
    other = _other_encoding(body)
    return f"the body is {other}; JSON must be UTF-8" if other else f"the body is not UTF-8: {reason} at byte {place}"


def _why_not_json(body: Buffer, start: int, complaint: str) -> str:
    """The sentence for the client; `complaint` is msgspec's, about the body from `start` on."""
    other = _other_encoding(body)
    if other:
        return f"the body is {other}; JSON must be UTF-8"
    if _BLANK.fullmatch(body, start):
        return "the body is not JSON: it is empty"
    at = _AT_BYTE.search(complaint)
    place = start + int(at.group(1)) if at else len(body)
    number = _NOT_A_NUMBER.match(body, place) or _NOT_A_NUMBER.match(body, max(0, place - 1))
    if at and number:
        return f"the body is not JSON: {bytes(number.group()).decode()} at byte {number.start()} is not JSON"
    surrogate = _unpaired(bytes(body[max(0, place - _LOOK_BACK_BYTES) : place + 1]), ends=not at)
    if surrogate and (not at or "hex escape" in complaint or "surrogate" in complaint):
        return f"the body is not JSON: a string holds {surrogate} without its other half"
    if not at and "truncated" in complaint:
        return "the body is not JSON: it ends in the middle of a value"
    return f"the body is not JSON: {complaint.removeprefix('JSON is malformed: ')}"


def _unpaired(text: bytes, *, ends: bool) -> str:
    """The surrogate that stopped the parser at the end of `text`; "" if it was something else.

    Where the body `ends` there, it was a surrogate only if its string is closed in what is left: the parser wants six bytes more, and has fewer.
    """
    found = [match for match in _ESCAPES.finditer(text) if match["surrogate"] and (not ends or _QUOTED_END.match(text, match.end()))]
    return found[-1]["surrogate"].decode() if found else ""
