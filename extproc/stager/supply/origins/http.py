"""A plain HTTP(S) server: `<url>/<adapter>/<file>`. A query of the base address, as of a signed one, is put on every request."""

import base64
from urllib.parse import quote

import aiohttp

from ....config.origins import OriginSettings
from ....core.artifact import AdapterName
from ...adapter.files import ARCHIVE_SUFFIXES, CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, wanted
from ..download import Download
from ..listing import Listing, RemoteFile
from ..web import Web, stated_digests, version
from .base import token_for


class HttpOrigin:
    """Asks with HEAD what is there. The revision is the files' ETags (or dates): all of them, since weights can change alone."""

    def __init__(self, settings: OriginSettings) -> None:
        self.label = settings.label
        self._settings = settings
        address, mark, query = settings.url.partition("?")
        self._url, self._query = address.rstrip("/"), mark + query
        self._web = Web(settings.label, settings.timeout_s, allow_private=settings.allow_private, missing_is_403=settings.missing_is_403)

    async def open(self) -> None:
        pass

    async def resolve(self, name: AdapterName) -> Listing | None:
        found: dict[str, RemoteFile] = {}
        for path in (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES):
            head = await self._head(name, f"{name}/{path}")
            if head is not None:
                found[path] = _file(path, f"{name}/{path}", head)
                if path != CONFIG_FILE:
                    break
            elif path == CONFIG_FILE:
                return await self._archive(name) if self._settings.archives else None
        files = [found[path] for path in wanted(found)]
        return Listing(name, " ".join(file.version for file in files), tuple(files))

    async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
        if not file.version and download.on_disk:
            await download.restart()  # nothing would tell the halves of two versions apart
        parallel = self._settings.parallel if file.version and (file.size or 0) > self._settings.parallel_above_bytes else 1
        await self._web.read(self._address(file.key), file, download, self._credentials(listing.name), parallel=parallel)

    async def probe(self) -> None:
        """What stands at the base address does not matter."""
        await self._web.probe(self._address(""))

    async def close(self) -> None:
        await self._web.close()

    async def _archive(self, name: AdapterName) -> Listing | None:
        for suffix in ARCHIVE_SUFFIXES:
            head = await self._head(name, name + suffix)
            if head is not None:
                file = _file(f"archive{suffix}", name + suffix, head)
                return Listing(name, file.version, (file,), archive=True)
        return None

    async def _head(self, name: AdapterName, key: str) -> aiohttp.ClientResponse | None:
        return await self._web.head(self._address(key), self._credentials(name))

    def _address(self, key: str) -> str:
        return f"{self._url}/{quote(key, safe='/')}{self._query}"

    def _credentials(self, name: AdapterName) -> dict[str, str]:
        token = token_for(self._settings, name)
        if self._settings.username:
            pair = base64.b64encode(f"{self._settings.username}:{token}".encode()).decode()
            return {"authorization": f"Basic {pair}"}
        return {"authorization": f"Bearer {token}"} if token else {}


def _file(path: str, key: str, head: aiohttp.ClientResponse) -> RemoteFile:
    """A length of 0 says nothing: some servers state it of every HEAD, and no file of an adapter is empty."""
    length = head.headers.get("content-length", "")
    size = int(length) or None if length.isdigit() and head.status == 200 else None
    sha256, md5 = stated_digests(head.headers)
    return RemoteFile(path, size, sha256, version(head), key, md5=md5)
