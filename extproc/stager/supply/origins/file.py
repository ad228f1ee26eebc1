"""A directory with one directory per adapter: a shared file system, or what a training job writes."""

import asyncio
import os
from pathlib import Path
from typing import BinaryIO

from ....config import OriginSettings
from ....core.artifact import MAX_NAME_BYTES, AdapterName
from ....errors import OriginChanged, OriginFailed
from ...adapter.files import ARCHIVE_SUFFIXES, CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, wanted
from ...threads import Threads
from ..download import WRITE_BYTES, Download, opened
from ..listing import Listing, RemoteFile
from .names import Names

MAX_PATH_CHARS = MAX_NAME_BYTES + 1 + max(map(len, (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES)))  # of a file in a folder that a name can lead to


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

    async def list_all(self, found: Names, threads: Threads) -> None:
        await threads.run(self._walk, found)

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

    def _walk(self, found: Names) -> None:
        """Every folder that a name can lead to: none that is hidden, none that a link makes its own descendant, and none outside the origin."""
        root = os.path.realpath(self._root)
        pending = [""]
        while pending and not found.is_full():
            folder = pending.pop()
            try:
                with os.scandir(self._root / folder) as entries:
                    for entry in entries:
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if found.is_full():
                            return
                        if entry.name.startswith(".") or len(path) > MAX_PATH_CHARS:
                            continue
                        if entry.is_dir():
                            if not entry.is_symlink() or _leads_elsewhere_below(root, entry.path):
                                pending.append(path)
                        elif entry.is_file():
                            found.add(path)
            except OSError as error:
                if not folder:
                    raise OriginFailed(f"{self.label} origin: its directory cannot be listed: {error.strerror}", reached=False) from error
                # a folder that went meanwhile, or that may not be read, has nothing that could be fetched
            found.add(f"{folder}/")

    def _resolve_archive(self, name: AdapterName) -> Listing | None:
        for suffix in ARCHIVE_SUFFIXES:
            path = self._root / (name + suffix)
            if path.is_file():
                stat = path.stat()
                file = RemoteFile(f"archive{suffix}", stat.st_size, version=_version(stat), key=name + suffix)
                return Listing(name, file.version, (file,), archive=True)
        return None


def _leads_elsewhere_below(root: str, link: str) -> bool:
    """Whether a link to a folder stays below `root` and does not lead to where it comes from, which would have no end."""
    target, here = os.path.realpath(link), os.path.realpath(Path(link).parent)
    return target.startswith(f"{root}/") and not f"{here}/".startswith(f"{target}/")


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns}.{stat.st_size}"
