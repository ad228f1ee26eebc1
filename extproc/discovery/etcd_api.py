"""What is asked of etcd: the keys below a prefix, and their changes, over the JSON gateway that every member serves beside gRPC (etcd 3.4 and later).

The gateway and not gRPC: it takes no generated messages, goes over the HTTP client that is here anyway, and can be looked at with curl. Its answers are
read by msgspec, which takes its numbers in quotes and its Base64 as they are.
"""

import asyncio
import base64
import os
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from ..config.discovery import EtcdSourceSettings
from .entries import MAX_ENTRIES

T = TypeVar("T")

PAGE_KEYS = 1_000  # per call, so that no answer is large
MAX_ANSWER_BYTES = 32 * 2**20  # PAGE_KEYS values, or the events of one transaction, of 24 KB each


class EtcdFailed(Exception):
    """A member could not be asked, or refused. The message says which, and why."""


class Compacted(EtcdFailed):
    """The revision is no longer in the history: the keys have to be listed anew."""


class KeyValue(msgspec.Struct):
    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class Event(msgspec.Struct):
    kv: KeyValue
    type: str = "PUT"  # or DELETE


class _Header(msgspec.Struct):
    revision: int = 0


class _Range(msgspec.Struct):
    header: _Header
    kvs: list[KeyValue] = []
    more: bool = False
    count: int = 0


class _Watched(msgspec.Struct):
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[Event] = []


class _Refusal(msgspec.Struct):
    message: str = ""


class _Line(msgspec.Struct):
    result: _Watched = msgspec.field(default_factory=_Watched)
    error: _Refusal | None = None


class _Token(msgspec.Struct):
    token: str = ""


_range = msgspec.json.Decoder(_Range, strict=False)  # not strict: the gateway writes 64-bit numbers in quotes
_line = msgspec.json.Decoder(_Line, strict=False)
_refusal = msgspec.json.Decoder(_Refusal)
_token = msgspec.json.Decoder(_Token)


class Etcd:
    """One member, for one prefix. Every call raises EtcdFailed."""

    def __init__(self, settings: EtcdSourceSettings, member: str) -> None:
        self.member = member.rstrip("/")
        self._settings = settings
        self._key = settings.prefix.encode()
        self._token = ""

    async def __aenter__(self) -> Self:
        tls = await asyncio.to_thread(_tls, self._settings) if self.member.startswith("https") else True
        connector = aiohttp.TCPConnector(ssl=tls)
        # without a `total`, since a watch goes on for ever; each call has a time of its own
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def keys(self) -> tuple[int, list[KeyValue]]:
        """All keys below the prefix, and the revision that they are of."""
        found: list[KeyValue] = []
        revision = 0
        begin = self._key
        while True:
            page = await self._range(begin, revision=revision, limit=PAGE_KEYS)
            revision = revision or page.header.revision
            found += page.kvs
            if len(found) > MAX_ENTRIES:
                raise EtcdFailed(f"{self._settings.prefix} has more than {MAX_ENTRIES} keys")
            if not page.more or not page.kvs:
                return revision, found
            begin = page.kvs[-1].key + b"\0"

    async def latest(self) -> tuple[int, int]:
        """How many keys there are, and the revision at which one was written last. The answer is linearizable: a member without a majority gives none."""
        answer = await self._range(self._key, limit=1, keys_only=True, sort_target="MOD", sort_order="DESCEND")
        return answer.count, max((one.mod_revision for one in answer.kvs), default=0)

    async def watch(self, after: int) -> AsyncGenerator[list[Event], None]:
        """The changes since that revision, as they come. Raises Compacted where they are no longer known."""
        create = {"key": _base64(self._key), "range_end": _base64(_end_of(self._key)), "start_revision": after + 1, "fragment": True}
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                response = await self._post("watch", {"create_request": create})
            async with response:
                await self._refuse(response)
                async for line in self._lines(response):
                    if line.error is not None:
                        raise EtcdFailed(f"{self.member} ended the watch: {line.error.message}")
                    if line.result.compact_revision:
                        raise Compacted(f"{self.member} has compacted its history to revision {line.result.compact_revision}")
                    if line.result.canceled:
                        raise EtcdFailed(f"{self.member} ended the watch: {line.result.cancel_reason or 'no reason given'}")
                    if line.result.events:
                        yield line.result.events
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as error:
            raise EtcdFailed(self._why(error)) from error
        raise EtcdFailed(f"{self.member} ended the watch")

    # -- calls

    async def _range(self, begin: bytes, **more: object) -> _Range:
        answer = await self._call("kv/range", {"key": _base64(begin), "range_end": _base64(_end_of(self._key)), **more})
        return self._read(_range, answer)

    async def _call(self, method: str, body: object) -> bytes:
        """One answer. Logs in before the first call, and again when the token has ended."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                if self._settings.username and not self._token:
                    await self._log_in()
                async with self._post(method, body) as response:
                    if response.status != 401 or not self._token:
                        return await self._answer(response)
                await self._log_in()
                async with self._post(method, body) as response:
                    return await self._answer(response)
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as error:
            raise EtcdFailed(self._why(error)) from error

    async def _log_in(self) -> None:
        credentials = {"name": self._settings.username, "password": await asyncio.to_thread(_password, self._settings)}
        self._token = ""
        async with self._post("auth/authenticate", credentials) as response:
            self._token = self._read(_token, await self._answer(response)).token

    def _post(self, method: str, body: object) -> Any:
        """aiohttp's request: to be awaited, or entered. No redirect is followed, since it would take the token elsewhere."""
        headers = {"Authorization": self._token} if self._token else {}
        return self._session.post(f"{self.member}/v3/{method}", json=body, headers=headers, allow_redirects=False)

    async def _answer(self, response: aiohttp.ClientResponse) -> bytes:
        await self._refuse(response)
        return await self._content(response)

    async def _refuse(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200:
            return
        content = await self._content(response)
        try:
            message = _refusal.decode(content).message
        except msgspec.MsgspecError:
            message = ""
        if "has been compacted" in message:
            raise Compacted(f"{self.member}: {message}")
        raise EtcdFailed(f"{self.member} answered {response.status}{': ' if message else ''}{message}")

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            self._check_size(len(content))
        return bytes(content)

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncGenerator[_Line, None]:
        """The messages of a stream: JSON objects, one to a line."""
        rest = bytearray()
        async for chunk in response.content.iter_any():
            *lines, tail = chunk.split(b"\n")
            for line in lines:
                rest += line
                if rest:
                    yield self._read(_line, bytes(rest))
                rest.clear()
            rest += tail
            self._check_size(len(rest))

    def _check_size(self, size: int) -> None:
        if size > MAX_ANSWER_BYTES:
            raise EtcdFailed(f"{self.member} answers with more than {MAX_ANSWER_BYTES} bytes at once")

    def _read(self, decoder: "msgspec.json.Decoder[T]", content: bytes) -> T:
        try:
            return decoder.decode(content)
        except msgspec.MsgspecError as error:
            raise EtcdFailed(f"{self.member} does not answer as etcd does: {error}") from None

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"{self.member} did not answer within {self._settings.timeout_s:g} s"
        return f"{self.member}: {getattr(error, 'strerror', None) or error or type(error).__name__}"


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _end_of(prefix: bytes) -> bytes:
    """The first key behind all that begin with `prefix`, which ends with `/`."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _password(settings: EtcdSourceSettings) -> str:
    """Blocks. Raises EtcdFailed."""
    if not settings.password_file:
        return os.environ.get(settings.password_env, "")
    try:
        return Path(settings.password_file).read_text().strip()
    except (OSError, ValueError) as error:
        raise EtcdFailed(f"password_file cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None


def _tls(settings: EtcdSourceSettings) -> ssl.SSLContext:
    """Blocks. Raises EtcdFailed."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file)
    except (OSError, ssl.SSLError) as error:
        raise EtcdFailed(f"ca_file, cert_file or key_file cannot be used: {error.strerror or error}") from None
    return context
