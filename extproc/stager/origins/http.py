"""A plain HTTP(S) server: `<url>/<adapter>/<file>`."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import aiohttp

from ...config import OriginSettings
from ...core.artifact import AdapterName
from ...errors import OriginFailed, OriginRefused
from ..verify import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from .base import WRITE_BYTES, Listing, RemoteFile, wanted, write_stream


class HttpOrigin:
    """Asks with HEAD what is there. The revision is the files' ETags (or dates): all of them, since weights can change alone."""

    label = "http"

    def __init__(self, settings: OriginSettings) -> None:
        self._url = settings.url.rstrip("/")
        token = os.environ.get(settings.token_env, "") if settings.token_env else ""
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.timeout_s, sock_read=settings.timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def resolve(self, name: AdapterName) -> Listing | None:
        found: dict[str, tuple[RemoteFile, str]] = {}
        for path in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE):
            if path == PICKLE_FILE and WEIGHTS_FILE in found:
                continue
            try:
                async with self._client().head(self._address(name, path), allow_redirects=True) as response:
                    if not self._is_there(response):
                        if path == CONFIG_FILE:
                            return None
                        continue
                    length = response.headers.get("content-length")
                    version = _version(response)
                    found[path] = (RemoteFile(path, int(length) if length and length.isdigit() else None, version=version), version)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise OriginFailed(f"http origin: {type(error).__name__} for {path}") from error
        files = wanted(found)
        return Listing(name, " ".join(found[path][1] for path in files), tuple(found[path][0] for path in files))

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path) -> str | None:
        try:
            async with self._client().get(self._address(listing.name, file.path)) as response:
                if not self._is_there(response):
                    raise OriginFailed(f"http origin: {file.path} is gone")
                if file.version and _version(response) != file.version:
                    raise OriginFailed(f"http origin: {file.path} changed after it was listed")
                return await write_stream(_body(response), target, file.size, file.limit)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OriginFailed(f"http origin: {type(error).__name__} while fetching {file.path}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {**self._headers, "accept-encoding": "identity"}  # sizes and hashes are of the file, not of its compression
            self._session = aiohttp.ClientSession(headers=headers, timeout=self._timeout)
        return self._session

    def _address(self, name: AdapterName, path: str) -> str:
        return f"{self._url}/{quote(name, safe='/')}/{quote(path)}"

    def _is_there(self, response: aiohttp.ClientResponse) -> bool:
        if response.status in (404, 410):
            return False
        if response.status in (401, 403):
            raise OriginRefused(f"http origin: status {response.status}: it wants other credentials")
        if response.status != 200:
            raise OriginFailed(f"http origin: status {response.status}")
        return True


def _version(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("etag") or response.headers.get("last-modified") or ""


async def _body(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for chunk in response.content.iter_chunked(WRITE_BYTES):
        yield chunk
