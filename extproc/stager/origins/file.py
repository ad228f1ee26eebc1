"""A directory with one directory per adapter: a shared file system, or what a training job writes."""

import asyncio
import os
import shutil
from pathlib import Path

from ...config import OriginSettings
from ...core.artifact import AdapterName
from ...errors import OriginFailed
from ..store import disk_errors
from ..verify import CONFIG_FILE
from .base import Listing, RemoteFile, wanted


class FileOrigin:
    """`<path>/<adapter>/adapter_config.json` and its weights, copied: what is published never changes when the original does."""

    label = "file"

    def __init__(self, settings: OriginSettings) -> None:
        self._root = Path(settings.path)

    async def resolve(self, name: AdapterName) -> Listing | None:
        return await asyncio.to_thread(self._resolve, name)

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path) -> str | None:
        await asyncio.to_thread(self._copy, self._root / listing.name / file.path, target, file)
        return None

    async def close(self) -> None:
        pass

    def _resolve(self, name: AdapterName) -> Listing | None:
        directory = self._root / name
        try:
            stats = {path.name: path.stat() for path in directory.iterdir() if path.is_file()}
        except (FileNotFoundError, NotADirectoryError) as error:
            if not self._root.is_dir():
                raise OriginFailed("file origin: its directory is not there") from error
            return None
        except OSError as error:
            raise OriginFailed(f"file origin: {name}: {error.strerror}") from error
        if CONFIG_FILE not in stats:
            return None
        files = tuple(RemoteFile(path, stats[path].st_size, version=str(stats[path].st_mtime_ns)) for path in wanted(stats))
        revision = "-".join(str(stats[file.path].st_mtime_ns) for file in files)
        return Listing(name, revision, files)

    def _copy(self, source: Path, target: Path, file: RemoteFile) -> None:
        try:
            opened = source.open("rb")
        except OSError as error:
            raise OriginFailed(f"file origin: {file.path}: {error.strerror}") from error
        with opened, disk_errors(), target.open("wb") as copy:
            shutil.copyfileobj(opened, copy, 2**20)
            version = str(os.fstat(opened.fileno()).st_mtime_ns)
        if target.stat().st_size != file.size or version != file.version:
            raise OriginFailed(f"file origin: {file.path} changed while it was copied")
