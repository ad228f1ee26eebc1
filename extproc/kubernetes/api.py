"""One API server: the verbs, a page of a list, and a watch as a stream of events.

Every call has a time of its own, every answer a limit of bytes, and every failure is a `KubernetesFailed` with the API server's own words. Objects that
are read are Structs (objects.py); those that are written are plain mappings, as a manifest has them.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Self, TypeVar

import aiohttp
import msgspec

from .access import Access
from .failures import BY_STATUS, KubernetesFailed
from .objects import Kind, Metadata, Object, T

MAX_ANSWER_BYTES = 64 * 2**20  # a page of 500 objects of 128 KB each; pods have 5 to 20
MAX_LINE_BYTES = 8 * 2**20  # one event of a watch; the API server takes objects of 3 MiB at most
MAX_RETRY_AFTER_S = 30.0  # a longer time than this is not waited for, whatever the API server says

Body = Mapping[str, Any]
S = TypeVar("S")


class ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")  # "" on the last page


class Page(msgspec.Struct, Generic[T]):
    """A part of a list."""

    items: list[T] = []
    metadata: ListMetadata = msgspec.field(default_factory=ListMetadata)


class Event(msgspec.Struct):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK, or ERROR with a Status as its object."""

    type: str
    object: msgspec.Raw


class Status(msgspec.Struct):
    """How the API server says that something failed."""

    message: str = ""
    reason: str = ""
    code: int = 0


_event = msgspec.json.Decoder(Event)
_status = msgspec.json.Decoder(Status)
_versioned = msgspec.json.Decoder(Object)


class Api:
    """`async with Api(access, timeout_s) as api`. Every call raises KubernetesFailed."""

    def __init__(self, access: Access, timeout_s: float) -> None:
        """`timeout_s`: for one answer, or for a watch to begin."""
        self.access = access
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._is_distrusted = False  # the authority of its certificate may have been replaced: it is read again before the next request

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    # -- verbs

    async def get(self, kind: Kind, namespace: str, name: str, type_: type[T]) -> T:
        return _decode(await self._call("GET", kind.path(namespace, name)), type_)

    async def create(self, kind: Kind, namespace: str, body: Body, type_: type[T]) -> T:
        """Raises Conflict where an object of that name is there."""
        return _decode(await self._call("POST", kind.path(namespace), body=body), type_)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Body, type_: type[T]) -> T:
        """Raises Conflict where `metadata.resourceVersion` of the body is not that of the object now."""
        return _decode(await self._call("PUT", kind.path(namespace, name), body=body), type_)

    async def apply(self, kind: Kind, namespace: str, name: str, body: Body, manager: str, type_: type[T], *, subresource: str = "", force: bool = True) -> T:
        """Server-side apply: the fields of the body, and no others, are `manager`'s from now on; those that it had and no longer names are removed.

        Raises Conflict where another manager has one of them and `force` is false.
        """
        params = {"fieldManager": manager, "force": str(force).lower()}
        return _decode(await self._call("PATCH", kind.path(namespace, name, subresource), params, body, "application/apply-patch+yaml"), type_)

    async def delete(self, kind: Kind, namespace: str, name: str) -> None:
        await self._call("DELETE", kind.path(namespace, name))

    async def page(self, kind: Kind, namespace: str, params: Mapping[str, str], type_: type[T]) -> Page[T]:
        """One page of a list; `continue` among the params says which."""
        page: Page[T] = _decode(await self._call("GET", kind.path(namespace), params), Page[type_])  # type: ignore[valid-type]
        return page

    @contextlib.asynccontextmanager
    async def watch(self, kind: Kind, namespace: str, params: Mapping[str, str], silence_s: float) -> AsyncIterator[AsyncGenerator[list[Event], None]]:
        """Entered when the API server has begun it; then the events, those that arrived together as one list. They end when the API server ends the watch,
        the connection breaks, or nothing has come for `silence_s`."""
        async with contextlib.AsyncExitStack() as stack:
            with self._as_ours("watch", kind.path(namespace)):
                async with asyncio.timeout(self._timeout_s):
                    request = await self._request("GET", kind.path(namespace), {**params, "watch": "true"}, silence_s=silence_s)
                    response = await stack.enter_async_context(request)
                    await self._refuse(response)
            stack.callback(_hang_up, response)
            yield await stack.enter_async_context(contextlib.aclosing(_events(response)))

    # -- requests

    async def _call(self, method: str, path: str, params: Mapping[str, str] | None = None, body: Body | None = None, content_type: str = "") -> bytes:
        with self._as_ours(method, path):
            async with asyncio.timeout(self._timeout_s):
                async with await self._request(method, path, params or {}, body, content_type) as response:
                    await self._refuse(response)
                    return await _content(response)

    async def _request(
        self, method: str, path: str, params: Mapping[str, str], body: Body | None = None, content_type: str = "", silence_s: float | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """To be entered for its answer. No redirect is followed, since it would take the token elsewhere."""
        headers = {"Content-Type": content_type or "application/json"} if body is not None else {}
        if bearer := await asyncio.to_thread(self.access.bearer):
            headers["Authorization"] = f"Bearer {bearer}"
        session = await self._connected()
        return session.request(
            method,
            self.access.url + path,
            params=params,
            data=None if body is None else msgspec.json.encode(body),
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_read=silence_s),
        )

    async def _connected(self) -> aiohttp.ClientSession:
        """The session of all requests. Two that find none at once make one: the second looks again after reading the certificates."""
        if self._is_distrusted:
            self._is_distrusted = False
            await self._close()
        if self._session is None:
            tls = await asyncio.to_thread(self.access.tls) if self.access.url.startswith("https") else True
            if self._session is None:
                # identity: the API server compresses large answers, which costs both sides more than the bytes do within a cluster
                headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
                self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), headers=headers)
        return self._session

    async def _refuse(self, response: aiohttp.ClientResponse) -> None:
        if response.status < 300:
            return
        content = await _content(response)
        try:
            status = _status.decode(content)
        except msgspec.MsgspecError:
            status = Status()
        raise failure(response.status, status, _retry_after_s(response))

    @contextlib.contextmanager
    def _as_ours(self, what: str, path: str) -> Iterator[None]:
        """Foreign exceptions become ours here."""
        try:
            yield
        except TimeoutError:
            raise KubernetesFailed(f"{self.access.url} did not answer {what} {path} within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, aiohttp.ClientSSLError):
                self._is_distrusted = True
            raise KubernetesFailed(f"{self.access.url}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def failure(code: int, status: Status, retry_after_s: float = 0.0) -> KubernetesFailed:
    """The API server's refusal, in its own words where it has some."""
    words = status.message or status.reason or "no reason given"
    return BY_STATUS.get(code, KubernetesFailed)(f"the API server answers {code}: {words}", retry_after_s)


def read_event(event: Event, decoder: "msgspec.json.Decoder[T]") -> T:
    """The object of an event. Raises KubernetesFailed, for an ERROR what it says."""
    try:
        if event.type == "ERROR":
            status = _status.decode(event.object)
            raise failure(status.code, status)
        return decoder.decode(event.object)
    except msgspec.MsgspecError as error:
        raise KubernetesFailed(f"the API server sends an event that cannot be read: {error}") from None


def version_of(event: Event) -> Metadata:
    """The metadata of a BOOKMARK, which has nothing else."""
    return read_event(event, _versioned).metadata


def _decode(content: bytes, type_: type[S]) -> S:
    try:
        return msgspec.json.decode(content, type=type_)
    except msgspec.MsgspecError as error:
        raise KubernetesFailed(f"the API server sends an answer that cannot be read: {error}") from None


async def _content(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise KubernetesFailed(f"the API server answers with more than {MAX_ANSWER_BYTES} bytes at once")
    return bytes(content)


def _hang_up(response: aiohttp.ClientResponse) -> None:
    """Cut the connection of a watch. In order it would be closed when the other side has agreed, which one that has gone deaf never does."""
    if (connection := response.connection) is not None and connection.transport is not None:
        connection.transport.abort()


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[list[Event], None]:
    """Until the watch ends, is cut, or is silent for too long: all three lead to the next watch."""
    rest = bytearray()
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
        async for chunk in response.content.iter_any():
            *lines, tail = chunk.split(b"\n")
            events: list[Event] = []
            for line in lines:
                rest += line
                if rest:
                    events.append(_read_line(bytes(rest)))
                rest.clear()
            rest += tail
            if len(rest) > MAX_LINE_BYTES:
                raise KubernetesFailed(f"the API server sends an event of more than {MAX_LINE_BYTES} bytes")
            if events:
                yield events


def _read_line(line: bytes) -> Event:
    try:
        return _event.decode(line)
    except msgspec.MsgspecError as error:
        raise KubernetesFailed(f"the API server sends an event that cannot be read: {error}") from None


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isascii() and value.isdigit() else 0.0
