"""A directory with one directory per adapter: a shared file system, or what a training job writes."""

import asyncio
import os
from pathlib import Path
from typing import BinaryIO

from ....config import OriginSettings
from ....core.artifact import AdapterName
from ....errors import OriginChanged, OriginFailed
from ...adapter.files import ARCHIVE_SUFFIXES, CONFIG_FILE, wanted
from ..download import WRITE_BYTES, Download, opened
from ..listing import Listing, RemoteFile


class FileOrigin:
    """`<path>/<adapter>/adapter_config.json` and its weights, copied: what is published never changes when the original does.

    With `in_place` the stager links to them instead, and whoever changes them changes them under the engine.
    """

    def __init__(self, settings: OriginSettings) -> None:
        self.label = settings.label
        self.in_place = settings.in_place
        self._root = Path(settings.path).absolute()
        self._archives = settings.archives
        self._probing: asyncio.Future[bool] | None = None

    async def open(self) -> None:
        pass

    async def resolve(self, name: AdapterName) -> Listing | None:
        return await asyncio.to_thread(self._resolve, name)

    async def fetch(self, _listing: Listing, file: RemoteFile, download: Download) -> None:
        first: list[bytes] = []

        def begin() -> BinaryIO:  # a small file is read in the same turn of a thread that opens it
            original = self._open(file)
            original.seek(download.received)
            first.append(original.read(WRITE_BYTES))
            return original

        async with opened(begin) as original:
            try:
                await download.copy(original, first[0])
            except OriginFailed:  # another length than listed
                if _version(os.fstat(original.fileno())) == file.version:
                    raise
            if _version(os.fstat(original.fileno())) != file.version:
                await download.restart()
                raise OriginChanged(f"{self.label} origin: {file.path} changed after it was listed")

    async def probe(self) -> None:
        """Look at its directory. A look that hangs, as at a file server that is gone, keeps its thread: none is begun beside it."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.ensure_future(asyncio.to_thread(self._root.is_dir))
        if not await asyncio.shield(self._probing):
            raise OriginFailed(f"{self.label} origin: its directory is not there", reached=False)

    async def close(self) -> None:
        pass

    def path(self, file: RemoteFile) -> Path:
        """Where the original lies."""
        return self._root / file.key

    def _open(self, file: RemoteFile) -> BinaryIO:
        try:
            return self.path(file).open("rb")
        except OSError as error:
            raise OriginChanged(f"{self.label} origin: {file.path}: {error.strerror}") from error

    def _resolve(self, name: AdapterName) -> Listing | None:
        directory = self._root / name
        try:
            stats = {path.name: path.stat() for path in directory.iterdir() if path.is_file()}
        except (FileNotFoundError, NotADirectoryError) as error:
            if not self._root.is_dir():
                raise OriginFailed(f"{self.label} origin: its directory is not there", reached=False) from error
            stats = {}
        except OSError as error:
            raise OriginFailed(f"{self.label} origin: {name}: {error.strerror}") from error
        if CONFIG_FILE not in stats:
            return self._resolve_archive(name) if self._archives else None
        files = tuple(RemoteFile(path, stats[path].st_size, version=_version(stats[path]), key=f"{name}/{path}") for path in wanted(stats))
        return Listing(name, "-".join(file.version for file in files), files)

    def _resolve_archive(self, name: AdapterName) -> Listing | None:
        for suffix in ARCHIVE_SUFFIXES:
            path = self._root / (name + suffix)
            if path.is_file():
                stat = path.stat()
                file = RemoteFile(f"archive{suffix}", stat.st_size, version=_version(stat), key=name + suffix)
                return Listing(name, file.version, (file,), archive=True)
        return None


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns}.{stat.st_size}"
