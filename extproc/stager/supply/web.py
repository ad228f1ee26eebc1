"""HTTP as origins use it: bounded redirects that keep the scheme, no private address unless allowed, ranges, one place for errors."""

import asyncio
import base64
import contextlib
import email.utils
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Mapping

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ...errors import OriginChanged, OriginFailed, OriginRefused
from .download import RANGE_BYTES, Download, in_parallel
from .listing import RemoteFile

MAX_REDIRECTS = 5
FIRST_LOOK_BYTES = 2**17  # of a file whose header is wanted alone: that of 32 layers with seven targets has 60 kB
LONGEST_RETRY_AFTER_S = 86_400.0  # a day; what is said beyond it may not even be a number
# IPv6 networks whose last 32 bits are an IPv4 address: NAT64 (RFC 6052), IPv4-compatible (RFC 4291), IPv4-translated (RFC 2765)
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
_NEVER = (
    ipaddress.ip_network("64:ff9b:1::/48"),  # local NAT64 (RFC 8215); where in it the IPv4 address stands, only the network knows
    ipaddress.ip_network("fec0::/10"),  # site-local: deprecated (RFC 3879), and still routed where somebody has it
    ipaddress.ip_network("192.0.0.0/24"),  # IETF protocol assignments (RFC 6890), of which Python counts some as global
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays, deprecated (RFC 7526)
)
_RATE_LIMIT = re.compile(r"r=(?P<left>\d+)\s*;\s*t=(?P<wait>\d+)")  # of the hub's `ratelimit: "api";r=0;t=55`
_REDIRECTS = (301, 302, 303, 307, 308)


class Web:
    """Asks on behalf of the origin `label`. `headers` of a call go to the address asked for and to no other host.

    Cookies are kept from nobody to nobody: one that is set for one tenant's token would be sent with the next one's. With `missing_is_403` the server
    says 403 of what it has not got.
    """

    def __init__(self, label: str, timeout_s: float, *, allow_private: bool, missing_is_403: bool = False) -> None:
        self._label = label
        self._missing_is_403 = missing_is_403
        self._allow_private = allow_private
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def head(self, url: str, headers: Mapping[str, str] = {}) -> aiohttp.ClientResponse | None:
        """The headers of what is at `url`, its body unread; None if nothing is there."""
        what = URL(url).name  # of a query, which may be a signature, nothing is told
        async with self._ask("HEAD", url, headers, what) as response:
            if response.status not in (405, 501):
                return response if self._is_there(response) else None
        async with self._ask("GET", url, headers, what) as response:  # a server that knows no HEAD
            return response if self._is_there(response) else None

    async def probe(self, url: str) -> None:
        """Whether a server answers there at all: with anything but a failure of its own. Raises OriginFailed."""
        with contextlib.suppress(OriginRefused):
            async with self._ask("HEAD", url, {}, "a probe") as response:
                if response.status == 429 or (response.status >= 500 and response.status != 501):
                    raise OriginFailed(f"{self._label} origin: status {response.status}", asked_wait_s(response.headers))

    async def read(self, url: str, file: RemoteFile, download: Download, headers: Mapping[str, str] = {}, *, parallel: int = 1) -> None:
        """What `download` lacks of `url`, by that many requests at once; from the start again where the server sends no ranges."""
        has_gaps = download.on_disk > download.received  # what lies behind them is not asked for again
        missing = download.missing(RANGE_BYTES) if file.size is not None and (parallel > 1 or has_gaps) else []
        first, *others = missing if has_gaps or len(missing) > 1 else [(download.received, None)]
        try:
            await self._read_part(url, file, download, headers, *first)  # shows whether the server knows ranges; one that does not sends all
            if others:
                await in_parallel(download, parallel, lambda begin, end: self._read_part(url, file, download, headers, begin, end, alone=False))
        except OriginChanged:  # every writer has ended
            await download.restart()
            raise

    async def show_beginning(self, url: str, file: RemoteFile, download: Download, headers: Mapping[str, str] = {}) -> None:
        """For a file that is brought by other means: let the download's judge see its beginning, asked for by ranges."""
        count = min(FIRST_LOOK_BYTES, file.size or FIRST_LOOK_BYTES)
        while not download.is_judged:
            async with self._ask("GET", url, {**headers, "range": f"bytes=0-{count - 1}"}, file.path) as response:
                if not self._is_there(response):
                    raise OriginChanged(f"{self._label} origin: {file.path} is gone")
                try:
                    head = await response.content.readexactly(count)
                except asyncio.IncompleteReadError as error:
                    raise OriginFailed(f"{self._label} origin: {file.path} has not the length that was listed") from error
            count = await download.show(head)

    async def _read_part(
        self, url: str, file: RemoteFile, download: Download, headers: Mapping[str, str], begin: int, end: int | None, *, alone: bool = True
    ) -> None:
        """One request from `begin` up to `end` (None: all there is). If no other is under way, the server may send all instead."""
        ranged = {"range": f"bytes={begin}-{'' if end is None else end - 1}"} if begin or end is not None else {}
        async with self._ask("GET", url, {**headers, **ranged}, file.path) as response:
            if response.status == 416:
                raise self._changed(file)
            if not self._is_there(response):
                raise OriginChanged(f"{self._label} origin: {file.path} is gone")
            if file.version and version(response) not in ("", file.version):
                raise self._changed(file)
            if response.headers.get("content-encoding", "identity") != "identity" and not file.path.endswith((".gz", ".tgz")):
                raise OriginFailed(f"{self._label} origin: {file.path} comes compressed, though that was not asked for")
            if response.status == 206:
                if not ranged or not response.headers.get("content-range", "").startswith(f"bytes {begin}-"):
                    raise OriginFailed(f"{self._label} origin: {file.path} comes in another part than was asked for")
                await download.write(_body(response), begin, end)
            elif not alone:
                raise OriginFailed(f"{self._label} origin: {file.path} comes whole, though a part of it was asked for")
            else:
                if download.on_disk:
                    await download.restart()
                await download.write(_body(response))

    def _changed(self, file: RemoteFile) -> OriginChanged:
        return OriginChanged(f"{self._label} origin: {file.path} changed after it was listed")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def _ask(self, method: str, url: str, headers: Mapping[str, str], what: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request and its redirects. The library's errors become ours, also those of reading the body inside the `async with`."""
        at, own = URL(url), URL(url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self._check_literal(at)
                sent = dict(headers) if is_same_origin(at, own) else {k: v for k, v in headers.items() if k == "range"}
                async with self._client().request(method, at, headers=sent, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS or "location" not in response.headers:
                        yield response
                        return
                    target = at.join(URL(response.headers["location"]))
                if target.scheme != at.scheme:
                    raise OriginRefused(f"{self._label} origin: it redirects from {at.scheme} to {target.scheme}")
                at = target
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            reached = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise OriginFailed(f"{self._label} origin: {type(error).__name__} for {what}", reached=reached) from error
        raise OriginFailed(f"{self._label} origin: over {MAX_REDIRECTS} redirects for {what}")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=None if self._allow_private else _PublicOnly(self._label), limit=0)
            headers = {"accept-encoding": "identity"}  # sizes and hashes are of the file, not of its compression
            jar = aiohttp.DummyCookieJar()
            self._session = aiohttp.ClientSession(headers=headers, timeout=self._timeout, connector=connector, auto_decompress=False, cookie_jar=jar)
        return self._session

    def _check_literal(self, url: URL) -> None:
        """An address in the URL itself is looked up by nobody, so it is checked here."""
        if url.scheme not in ("http", "https") or url.host is None:
            raise OriginRefused(f"{self._label} origin: an address that is not http or https")
        with contextlib.suppress(ValueError):
            if not self._allow_private and not _is_public(url.host):
                raise _private(self._label)

    def _is_there(self, response: aiohttp.ClientResponse) -> bool:
        if response.status in (404, 410) or (response.status == 403 and self._missing_is_403):
            return False
        if response.status in (401, 403):
            raise OriginRefused(f"{self._label} origin: status {response.status}: it wants other credentials")
        if response.status not in (200, 206):
            raise OriginFailed(f"{self._label} origin: status {response.status}", asked_wait_s(response.headers))
        return True


class _PublicOnly(AbstractResolver):
    """Names that lead to a private address lead nowhere: checked on what is connected to, so that no later answer of a name server matters."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._inner: AbstractResolver | None = None

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        if self._inner is None:
            self._inner = aiohttp.ThreadedResolver(loop=asyncio.get_running_loop())
        found = await self._inner.resolve(host, port, family)  # type: ignore[arg-type]  # an int is what aiohttp passes
        if not all(_is_public(result["host"]) for result in found):
            raise _private(self._label)
        return found

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()


def _is_public(address: str) -> bool:
    """Raises ValueError for what is no address. An IPv4 address in an IPv6 one counts as itself: a gateway may well take it out again."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) % 2**32) if any(ip in net for net in _EMBEDDING) else None)
        ip = inside or ip
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _NEVER)


def _private(label: str) -> OriginRefused:
    return OriginRefused(f"{label} origin: its address is private, loopback or link-local; allow_private is off")


def is_same_origin(one: URL, other: URL) -> bool:
    """Scheme, host and port: whoever may see the credentials of one may see those of the other (RFC 6454, 5)."""
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def version(response: aiohttp.ClientResponse) -> str:
    """What the server says to tell one content from a later one. A weak ETag counts as the strong one of that name: some servers, and proxies that
    compress, send one on HEAD and the other on GET (RFC 9110, 8.8.3.2: the weak comparison).
    """
    return response.headers.get("etag", "").removeprefix("W/") or response.headers.get("last-modified") or ""


def stated_digests(headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """SHA-256 and MD5 of the whole content, in hex, as far as the server states them: Repr-Digest (RFC 9530), Content-MD5 (RFC 1864)."""
    found = re.search(r"(?:^|[,\s])sha-256=:([A-Za-z0-9+/=]+):", headers.get("repr-digest", ""))
    return _from_base64(found[1] if found else "", 32), _from_base64(headers.get("content-md5", ""), 16)


def _from_base64(text: str, count: int) -> str | None:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data.hex() if len(data) == count else None


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds after which the server wants to be asked again: by Retry-After, else by the rate limits of which nothing is left."""
    if (stated := retry_after_s(headers.get("retry-after"), headers.get("date", ""))) is not None:
        return stated
    waits = [float(limit["wait"]) for limit in _RATE_LIMIT.finditer(headers.get("ratelimit", "")[:1024]) if not int(limit["left"])]
    return min(max(waits), LONGEST_RETRY_AFTER_S) if waits else None


def retry_after_s(value: str | None, date: str = "") -> float | None:
    """Seconds, from either form of Retry-After (RFC 9110, 10.2.3). A moment in it is one of the server's clock, which `date`, its Date, tells; ours may
    be another.
    """
    if value is None:
        return None
    if value.isascii() and value.strip().isdigit():
        return min(float(value), LONGEST_RETRY_AFTER_S)
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    try:
        now = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return min(max(0.0, at - now), LONGEST_RETRY_AFTER_S)


async def _body(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for chunk in response.content.iter_any():
        yield chunk
