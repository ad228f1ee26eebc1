"""A directory with one directory per adapter: a shared file system, or what a training job writes."""

import asyncio
import itertools
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ....config.origins import OriginSettings
from ....core.artifact import AdapterName, File
from ....errors import InvalidAdapter, OriginChanged, OriginFailed, OriginRefused
from ...adapter.files import ARCHIVE_SUFFIXES, CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, wanted
from ...syscalls import hash_open
from ...threads import Threads
from ..download import WRITE_BYTES, Download, opened
from ..listing import Absent, Listing, RemoteFile, instead
from .names import Names
from .walk import walk

SPARE_THREADS = 4  # beside one per transfer: looks at what is there, and a probe
LOOKED_AT = 100  # entries of a directory that is no adapter's, to say what is there
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES)


class FileOrigin:
    """`<path>/<adapter>/adapter_config.json` and its weights, copied: what is published never changes when the original does.

    With `in_place` the stager links to them instead, and whoever changes them changes them under the engine.
    Links are followed as long as they stay below `path`: that is looked at on what has been opened, so that no change of a link comes between.
    It is read in threads of its own, since a file server that hangs would hold those of the node's disk.
    """

    def __init__(self, settings: OriginSettings) -> None:
        self.label = settings.label
        self.in_place = settings.in_place
        self._root = Path(settings.path).absolute()
        self._links_outside = settings.links_outside
        self._archives = settings.archives
        self._timeout_s = settings.timeout_s
        self._threads = Threads(settings.max_fetches + SPARE_THREADS, f"{self.label} origin")
        self._hashing = Threads(settings.max_fetches, f"{self.label} originals")  # of `in_place`: as transfers, these leave SPARE_THREADS to looks
        self._probing: asyncio.Future[bool] | None = None

    async def open(self) -> None:
        pass

    async def resolve(self, name: AdapterName) -> Listing | Absent | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._threads.run(self._resolve, name)
        except TimeoutError as error:  # a file server that hangs keeps its thread; whoever asks may hear of it
            raise OriginFailed(f"{self.label} origin: its directory has not answered within {self._timeout_s:g} s", reached=False) from error

    async def fetch(self, _listing: Listing, file: RemoteFile, download: Download) -> None:
        first: list[bytes] = []

        def begin() -> BinaryIO:  # a small file is read in the same turn of a thread that opens it
            original = self.open_original(file)
            original.seek(download.received)
            first.append(original.read(WRITE_BYTES))
            return original

        async with opened(begin, self._threads) as original:
            try:
                await download.copy(original, first[0], self._threads)
            except (OriginFailed, InvalidAdapter):  # another length than listed, or a header that belongs to another file than was listed
                if _version(os.fstat(original.fileno())) == file.version:
                    raise
            if _version(os.fstat(original.fileno())) != file.version:
                await download.restart()
                raise OriginChanged(f"{self.label} origin: {file.path} changed after it was listed")

    async def hash(self, file: RemoteFile) -> File:
        """What an original is, read where it lies. Raises OriginFailed."""

        def read() -> File:
            try:
                with self.open_original(file) as original:
                    return hash_open(original, file.path)
            except OSError as error:
                raise OriginFailed(f"{self.label} origin: {file.path}: {error.strerror}") from error

        return await self._hashing.run(read)

    async def list_all(self, found: Names, threads: Threads) -> None:
        try:
            await threads.run(walk, self._root, found, links_outside=self._links_outside)
        except OSError as error:
            raise OriginFailed(f"{self.label} origin: its directory cannot be listed: {error.strerror}", reached=False) from error

    async def probe(self) -> None:
        """Look at its directory. A look that hangs, as at a file server that is gone, keeps its thread: none is begun beside it."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.ensure_future(self._threads.run(self._root.is_dir))
        if not await asyncio.shield(self._probing):
            raise OriginFailed(f"{self.label} origin: its directory is not there", reached=False)

    async def close(self) -> None:
        self._threads.close()
        self._hashing.close()

    def path(self, file: RemoteFile) -> Path:
        """Where the original lies."""
        return self._root / file.key

    def open_original(self, file: RemoteFile) -> BinaryIO:
        """Raises OriginChanged, or OriginRefused for what a link has led out of the origin to. Blocks."""
        try:
            return open(self._open(self.path(file)), "rb")  # noqa: PTH123  # a descriptor
        except OSError as error:
            raise OriginChanged(f"{self.label} origin: {file.path}: {error.strerror}") from error

    def _open(self, path: Path) -> int:
        """A descriptor of what is at `path`, wherever links lead below the root. Raises OSError or OriginRefused.

        Without O_NONBLOCK the opening of a pipe would wait for its writer.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not self._links_outside and not Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(os.path.realpath(self._root)):  # noqa: PTH115
                raise OriginRefused(f"{self.label} origin: {path.name} is a link that leads out of the origin; links_outside is off")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _stat(self, path: Path) -> os.stat_result | None:
        """Of a regular file; None for anything else."""
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return None
            descriptor = self._open(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def _resolve(self, name: AdapterName) -> Listing | Absent | None:
        directory = self._root / name
        try:
            stats = {path: found for path in _ADAPTER_FILES if (found := self._stat(directory / path)) is not None}
            if CONFIG_FILE in stats:
                files = tuple(RemoteFile(path, stats[path].st_size, version=_version(stats[path]), key=f"{name}/{path}") for path in wanted(stats))
                return Listing(name, "-".join(file.version for file in files), files)
            if not self._root.is_dir():
                raise OriginFailed(f"{self.label} origin: its directory is not there", reached=False)
            return (self._resolve_archive(name) if self._archives else None) or instead(self._entries(directory)) or self._is_one_itself()
        except OSError as error:
            raise OriginFailed(f"{self.label} origin: {name}: {error.strerror}") from error

    def _is_one_itself(self) -> Absent | None:
        return Absent("an adapter in its own path: give it the directory above") if self._stat(self._root / CONFIG_FILE) is not None else None

    def _entries(self, directory: Path) -> list[str]:
        """What is there in place of an adapter: files, folders with a slash, and the configurations of adapters in those."""
        try:
            descriptor = self._open(directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                return []
            with os.scandir(descriptor) as entries:
                found = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in itertools.islice(entries, LOOKED_AT)]
        finally:
            os.close(descriptor)
        configurations = [f"{path}{CONFIG_FILE}" for path in found if path.endswith("/")]
        return found + [path for path in configurations if (directory / path).exists()]

    def _resolve_archive(self, name: AdapterName) -> Listing | None:
        for suffix in ARCHIVE_SUFFIXES:
            found = self._stat(self._root / (name + suffix))
            if found is not None:
                file = RemoteFile(f"archive{suffix}", found.st_size, version=_version(found), key=name + suffix)
                return Listing(name, file.version, (file,), archive=True)
        return None


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}.{found.st_size}"
