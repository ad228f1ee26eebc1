"""Which `model` a JSON body names, found while the body still arrives, so that staging starts before the prompt has ended.

The scanner assumes well-formed JSON and stops at the first top-level `model`. Nothing is forwarded on its word: verdict.py judges the whole body.
Since it only saves time, it gives up on a body that would cost much of it, and leaves the model to the verdict.
"""

import re

import msgspec

from .pieces import Buffer
from .reading import MAX_MODEL_BYTES

MAX_TOKENS = 4096  # strings and brackets looked at, about a microsecond each; a chat of 250 messages has 4,000
MAX_KEY_BYTES = 64  # "model" spelled with six-byte escapes throughout has 32

_STRUCTURAL = re.compile(rb'["{}\[\],:]')
_NESTED = re.compile(rb'["{}\[\]]')  # below the top level commas and colons say nothing
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\[\x00-\xff])*+')
_BACKSLASH, _QUOTE = b"\\", b'"'
_string = msgspec.json.Decoder(str)


class Scanner:
    """Finds the first top-level `model` in a body fed in any chunking. Reads each byte once; holds no more than one key or value."""

    __slots__ = ("_after_colon", "_depth", "_in_string", "_is_model", "_odd_backslashes", "_token", "_tokens_left", "_wants_key", "done", "model")

    def __init__(self) -> None:
        self.model: str | None = None
        self.done = False  # found, or certain that it will not be
        self._tokens_left = MAX_TOKENS
        self._depth = 0
        self._wants_key = False  # at the top level, the next string is a key
        self._after_colon = False  # the next string is a value of the top level
        self._is_model = False  # the last top-level key was "model"
        self._in_string = False
        self._odd_backslashes = False  # the chunk before ended in an escape that is not complete
        self._token: bytearray | None = None  # the key or value being read, if it matters

    def feed(self, chunk: Buffer) -> str | None:
        """Take the next bytes; the model as soon as it is known, else None."""
        if self.done:
            return self.model
        piece = chunk if isinstance(chunk, bytes) else bytes(chunk)
        position, size = 0, len(piece)
        while position < size and not self.done:
            position = self._string(piece, position) if self._in_string else self._structure(piece, position)
        return self.model

    def _structure(self, chunk: bytes, position: int) -> int:
        found = (_STRUCTURAL if self._depth == 1 else _NESTED).search(chunk, position)
        if found is None:
            return len(chunk)
        self._tokens_left -= 1
        if self._tokens_left < 0:
            self.done = True
            return len(chunk)
        token = found.group()
        if token == _QUOTE:
            self._in_string = True
            matters = self._depth == 1 and (self._wants_key or (self._after_colon and self._is_model))
            self._token = bytearray(_QUOTE) if matters else None
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

    def _string(self, chunk: bytes, start: int) -> int:
        """Skip to behind the closing quote, which is one before which no backslash is left over."""
        position = start
        if self._odd_backslashes:  # the first byte here is escaped, whatever it is
            position += 1
            self._odd_backslashes = False
        quote = chunk.find(_QUOTE, position)
        end = len(chunk) if quote < 0 else quote
        if end > position and chunk.endswith(_BACKSLASH, position, end):  # escapes are counted from where they begin
            found = _REST_OF_STRING.match(chunk, position)
            end = found.end() if found else position
        if end < len(chunk) and chunk.startswith(_QUOTE, end):
            self._keep(chunk, start, end + 1)
            self._in_string = False
            self._finish_token()
            return end + 1
        self._odd_backslashes = end < len(chunk)  # the one byte that is left is a backslash
        self._keep(chunk, start, len(chunk))
        return len(chunk)

    def _keep(self, chunk: bytes, start: int, end: int) -> None:
        if self._token is None:
            return
        limit = MAX_KEY_BYTES if self._wants_key else MAX_MODEL_BYTES
        if len(self._token) + end - start > limit:
            self._token = None
            self.done = not self._wants_key  # a model's value too long to be a name: leave it to the verdict
            self._is_model = False
        else:
            self._token += chunk[start:end]

    def _finish_token(self) -> None:
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
            self.model, self.done = text, True
