"""What `model` is in a JSON body: `Scanner` finds it while the body still arrives, `judge` gives the verdict on the whole.

The scanner only says where to start staging; it assumes well-formed JSON and stops at the first top-level `model`. Nothing is forwarded on
its word. The verdict is strict (RFC 8259, UTF-8 only, no byte order mark, no NaN, no unpaired surrogates), because a body that the router
and the engine read differently would be routed for one adapter and answered by another: the engine's parser takes the last of two `model`
keys, so two are refused.
"""

import contextlib
import re

import msgspec

from ..errors import InvalidRequest

MAX_KEY_BYTES = 64  # "model" spelled with six-byte escapes throughout has 32
MAX_VALUE_BYTES = 2048  # a 256-byte name spelled with escapes throughout has 1,536

_STRUCTURAL = re.compile(rb'["{}\[\],:]')
_NESTED = re.compile(rb'["{}\[\]]')  # below the top level commas and colons say nothing
_BACKSLASH, _QUOTE = 0x5C, 0x22


class _Key:
    """A top-level key. msgspec builds one per key it reads, repeated ones included, which a dict of strings would hide."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_seen: list[str] = []  # keys of the body being judged; judge() is synchronous, so there is only ever one


def _note_key(_type: type, text: str) -> _Key:
    _seen.append(text)
    return _Key(text)


_object = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=_note_key)  # Raw: values are checked and skipped, not built
_string = msgspec.json.Decoder(str)


def judge(body: bytes) -> str:
    """The `model` of a whole JSON body. Raises InvalidRequest, saying what is wrong, if there is not exactly one, as a string."""
    _seen.clear()
    try:
        body.isascii() or str(body, "utf-8")  # msgspec does not look into the strings it skips; ASCII needs no copy to be seen as UTF-8
        fields = _object.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except msgspec.ValidationError:
        raise InvalidRequest("the body is JSON, but not an object") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is not JSON that can be read: nested too deeply") from None
    count = _seen.count("model")
    if count != 1:
        raise InvalidRequest("the body has no `model`" if count == 0 else f"the body has `model` {count} times")
    try:
        return _string.decode(next(value for key, value in fields.items() if key.text == "model"))
    except msgspec.ValidationError:
        raise InvalidRequest("the body's `model` is not a string") from None


def rename(body: bytes, old: str, new: str) -> bytes:
    """The body with `new` for `model`, all else byte for byte as it was. `judge` has read `old` in it.

    The value is looked for as text, since walking through a long conversation costs milliseconds: where it stands is then its last occurrence or
    its first, and the verdict on the changed body tells. Written with escapes, or hidden between its likes, it is found by the walk.
    """
    value, changed = msgspec.json.encode(old), msgspec.json.encode(new)
    for begin in dict.fromkeys((body.rfind(value), body.find(value))):
        renamed = _replaced(body, begin, begin + len(value), changed) if begin >= 0 else b""
        with contextlib.suppress(InvalidRequest):  # what looked like the value was the end of one string and the beginning of the next
            if judge(renamed) == new:
                return renamed
    scanner = Scanner()
    scanner.feed(body)
    return _replaced(body, *scanner.span, changed)


def _replaced(body: bytes, begin: int, end: int, value: bytes) -> bytes:
    view = memoryview(body)
    return b"".join((view[:begin], value, view[end:]))


class Scanner:
    """Finds the first top-level `model` in a body fed in any chunking. Reads each byte once; holds no more than one key or value."""

    __slots__ = ("_after_colon", "_begin", "_depth", "_fed", "_in_string", "_is_model", "_odd_backslashes", "_token", "_wants_key", "done", "model", "span")

    def __init__(self) -> None:
        self.model: str | None = None
        self.done = False  # found, or certain that it will not be
        self.span = (0, 0)  # where the model's value stands in what was fed, its quotes included
        self._fed = 0  # bytes before the chunk that is being read
        self._begin = 0  # of the string that is being read, in all that was fed
        self._depth = 0
        self._wants_key = False  # at the top level, the next string is a key
        self._after_colon = False  # the next string is a value of the top level
        self._is_model = False  # the last top-level key was "model"
        self._in_string = False
        self._odd_backslashes = False  # the chunk before ended in an escape that is not complete
        self._token: bytearray | None = None  # the key or value being read, if it matters

    def feed(self, chunk: bytes) -> str | None:
        """Take the next bytes; the model as soon as it is known, else None."""
        position, size = 0, len(chunk)
        while position < size and not self.done:
            position = self._string(chunk, position) if self._in_string else self._structure(chunk, position)
        self._fed += size
        return self.model

    def _structure(self, chunk: bytes, position: int) -> int:
        found = (_STRUCTURAL if self._depth == 1 else _NESTED).search(chunk, position)
        if found is None:
            return len(chunk)
        token = found.group()
        if token == b'"':
            self._in_string = True
            self._begin = self._fed + found.start()
            matters = self._depth == 1 and (self._wants_key or (self._after_colon and self._is_model))
            self._token = bytearray(b'"') if matters else None
        elif token in b"{[":
            self._depth += 1
            self._wants_key = self._depth == 1 and token == b"{"
            self.done = (self._depth == 1 and token == b"[") or (self._is_model and self._after_colon and self._depth == 2)
        elif token in b"}]":
            self._depth -= 1
            self.done = self._depth <= 0
        elif token == b":":
            self._wants_key, self._after_colon = False, True
        else:
            self.done = self._is_model  # the model's value was no string
            self._wants_key, self._after_colon = True, False
        return found.end()

    def _string(self, chunk: bytes, position: int) -> int:
        """Skip to the closing quote; a quote closes if an even number of backslashes stands before it."""
        start = position
        if self._odd_backslashes:  # the first byte here is escaped, whatever it is
            position += 1
            self._odd_backslashes = False
        while True:
            quote = chunk.find(_QUOTE, position)
            end = len(chunk) if quote < 0 else quote
            first = end
            while first > position and chunk[first - 1] == _BACKSLASH:
                first -= 1
            escaped = (end - first) % 2 == 1
            if quote < 0:
                self._odd_backslashes = escaped
                self._keep(chunk, start, end)
                return end
            position = quote + 1
            if not escaped:
                self._keep(chunk, start, position)
                self._in_string = False
                self._finish_token(self._fed + position)
                return position

    def _keep(self, chunk: bytes, start: int, end: int) -> None:
        if self._token is None:
            return
        limit = MAX_KEY_BYTES if self._wants_key else MAX_VALUE_BYTES
        if len(self._token) + end - start > limit:
            self._token = None
            self.done = not self._wants_key  # a model's value too long to be a name: leave it to the verdict
            self._is_model = False
        else:
            self._token += chunk[start:end]

    def _finish_token(self, end: int) -> None:
        token, self._token = self._token, None
        if token is None:
            self._is_model = self._is_model and not self._wants_key
            return
        try:
            text = _string.decode(token)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.done = True  # malformed: leave it to the verdict
            return
        if self._wants_key:
            self._is_model = text == "model"
        else:
            self.model, self.done, self.span = text, True, (self._begin, end)
