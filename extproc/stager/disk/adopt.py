"""Adapters that others put into the node's directory: a training job, rsync. Served when complete, never changed, deleted only if that is allowed."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from ...config import StagerSettings
from ...core.artifact import AdapterName, ArtifactId, File, Manifest, content_digest
from ...errors import DiskFailed, InvalidAdapter, LoraExtprocError, NoSpace
from ..adapter.check import check_config, check_files
from ..adapter.files import CONFIG_FILE, wanted
from ..books.changes import Changes
from ..books.holdings import Holdings, Named
from ..syscalls import disk_errors, hash_file
from ..threads import Threads
from .store import Store

log = logging.getLogger(__name__)

ORIGIN = "adopted"
MEMORY_FILE = ".adopted.json"  # hashes by name and stamp: terabytes need not be read again at every start
SAVE_EVERY_S = 10.0  # while many are being hashed: what a crash may cost


class Adopter:
    """Finds them, by a look through the whole directory now and then or when one is asked for, and keeps the holdings true to them."""

    def __init__(
        self,
        settings: StagerSettings,
        store: Store,
        holdings: Holdings,
        changes: Changes,
        disk: Threads,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._store = store
        self._holdings = holdings
        self._changes = changes
        self._disk = disk
        self._clock = clock
        self._wall_clock = wall_clock
        self._hashes: dict[str, dict[str, object]] = {}
        self._adopted: set[AdapterName] = set()
        self._is_saved = True
        self._is_blind = False  # the directory could not be read when it was last looked through
        self._saved_at = clock()

    def open(self) -> None:
        """Read what an earlier process has hashed. Blocks."""
        memory = self._store.read_json(MEMORY_FILE)
        if isinstance(memory, dict):
            self._hashes = {str(name): entry for name, entry in memory.items() if isinstance(entry, dict)}

    def is_there(self, name: AdapterName) -> bool:
        """Whether others have something under `name`."""
        path = self._store.directory / name
        return not os.path.islink(path) and os.path.isfile(path / CONFIG_FILE)  # noqa: PTH113, PTH114  # which say no where they may not look

    async def look(self, name: AdapterName) -> Manifest:
        """Verify and hash it. Raises InvalidAdapter, also where it is not complete yet or still being written."""
        return await self._disk.run(self._look, name)

    async def scan(self) -> None:
        """Look through the directory for what came, changed or went."""
        try:
            there = await self._disk.run(self._store.foreign)
        except LoraExtprocError as error:  # what is known of others' files is kept until somebody may look again
            if not self._is_blind:
                log.warning("what others put into %s is not seen: %s", self._store.directory, error.message)
            self._is_blind = True
            return
        self._is_blind = False
        for name in dict.fromkeys((*there, *self._adopted)):
            named = self._holdings.get(name)
            try:
                if named is None:
                    await self.adopt(name)
                elif named.revision != await self._disk.run(self.revision, name):
                    await self.look_again(name, named)
            except (LoraExtprocError, OSError) as error:
                log.debug("%s: %s", name, error)
            if self._clock() - self._saved_at >= SAVE_EVERY_S:
                await self._save()
        for gone in self._hashes.keys() - set(there):
            del self._hashes[gone]
            self._is_saved = False
        await self._save()

    async def adopt(self, name: AdapterName) -> None:
        """Serve it from where it is. Raises InvalidAdapter."""
        manifest = await self.look(name)
        if self._holdings.get(name) is None:  # the look through the directory and a request may find it at once
            self._take(name, manifest, "published")
            log.info("%s: adopted", name)

    async def look_again(self, name: AdapterName, known: Named) -> bool:
        """Others may have changed it, or taken it away; True if so."""
        if not await self._disk.run(self.is_there, name):
            self._adopted.discard(name)
            if self._holdings.get(name) is not known or self._holdings.index.is_leaving(known.id):
                return False  # it was we
            self._holdings.drop(name)
            self._holdings.index.removed(known.id)
            self._changes.tell("evicted", name)
            log.info("%s: others took it away", name)
            return True
        manifest = await self.look(name)
        if manifest.revision == known.revision or self._holdings.get(name) is not known:
            return False
        named = self._take(name, manifest, "refreshed")
        if named.id != known.id:
            self._holdings.index.inherit(named.id, known.id)
            self._holdings.index.removed(known.id)
        log.warning("%s: others changed it in place; an engine that has it loaded may answer with either version", name)
        return True

    def _take(self, name: AdapterName, manifest: Manifest, kind: str) -> Named:
        named = Named(ArtifactId.adopted(manifest.digest, name), manifest.origin, manifest.revision)
        self._holdings.index.add(named.id, manifest.size, self._clock(), keep=not self._settings.evict_adopted)
        self._holdings.put(name, named)
        self._adopted.add(name)
        self._changes.tell(kind, name)
        return named

    def revision(self, name: AdapterName) -> str:
        """What tells this state of the files from a later one; "" if they are gone."""
        try:
            return _stamp(self._store.directory / name)[0]
        except OSError:
            return ""

    def differs(self, name: AdapterName, known: Named) -> str:
        """Why its files are not what was adopted, read from end to end; "" if they are. Blocks. Raises OSError."""
        directory = self._store.directory / name
        if self.revision(name) != known.revision:
            return "others changed it in place"
        if content_digest(_hash_all(directory)) != known.digest:
            return "its files are not what was adopted, though nobody wrote to them"
        return ""

    def _look(self, name: AdapterName) -> Manifest:
        directory = self._store.directory / name
        with disk_errors("read"):
            try:
                stamp, youngest = _stamp(directory)
                if self._wall_clock() - youngest < self._settings.scan_s:
                    raise InvalidAdapter(f"{name}: others put it on this node, and wrote to it less than {self._settings.scan_s:g} s ago", "incomplete")
                engine = self._settings.engine
                text = (directory / CONFIG_FILE).read_bytes()
                names = engine.base_names if engine.mode == "api" else ()  # what others put here is not changed
                config = check_config(text, base_model=engine.base_model, base_names=names, max_rank=engine.max_lora_rank)
                check_files(directory, config, allow_pickle=self._settings.allow_pickle)
                files = self._hashed(name, directory, stamp)
            except (FileNotFoundError, NotADirectoryError):
                raise InvalidAdapter(f"{name}: others put it on this node, and it is not complete", "incomplete") from None
            except PermissionError:
                raise InvalidAdapter(f"{name}: others put it on this node, and this process may not read it", "incomplete") from None
        if self.revision(name) != stamp:
            raise InvalidAdapter(f"{name}: others write to it", "incomplete")
        return Manifest(files, name, ORIGIN, stamp)

    def _hashed(self, name: AdapterName, directory: Path, stamp: str) -> tuple[File, ...]:
        known = self._hashes.get(name)
        if known is not None and known.get("revision") == stamp:
            files = known.get("files")
            if isinstance(files, list) and all(isinstance(f, list) and len(f) == 3 for f in files):
                return tuple(File(str(path), int(size), str(sha256)) for path, size, sha256 in files)
        hashed = _hash_all(directory)
        self._hashes[name] = {"revision": stamp, "files": [[f.path, f.size, f.sha256] for f in hashed]}
        self._is_saved = False
        return hashed

    async def _save(self) -> None:
        if self._is_saved:
            return
        self._is_saved, self._saved_at = True, self._clock()
        try:
            await self._disk.run(self._store.write_json, MEMORY_FILE, dict(self._hashes))
        except (NoSpace, DiskFailed) as error:  # then they are hashed again at the next start
            self._is_saved = False
            log.debug("%s: %s", MEMORY_FILE, error.message)


def _hash_all(directory: Path) -> tuple[File, ...]:
    return tuple(hash_file(directory / path, path) for path in wanted(entry.name for entry in directory.iterdir() if entry.is_file()))


def _stamp(directory: Path) -> tuple[str, float]:
    """Lengths and times of the files that count, and when one was last changed. Raises FileNotFoundError where one is missing.

    The latter is the kernel's own time of change: the other is whatever rsync or tar brought along, and may be in the future.
    """
    paths = wanted(entry.name for entry in directory.iterdir() if entry.is_file())
    if len(paths) < 2:
        raise FileNotFoundError
    stats = [(directory / path).stat() for path in paths]
    return " ".join(f"{stat.st_size}.{stat.st_mtime_ns}" for stat in stats), max(stat.st_ctime for stat in stats)
