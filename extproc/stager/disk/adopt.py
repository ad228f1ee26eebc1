"""Adapters that others put into the node's directory: a training job, rsync. Served when complete, never changed, deleted only if that is allowed."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...config.stager import StagerSettings
from ...core.artifact import AdapterName, ArtifactId, File, Manifest, adopted_id, content_digest, is_adopted
from ...errors import DiskFailed, InvalidAdapter, LoraExtprocError, NoSpace
from ..adapter.check import Checked
from ..adapter.files import wanted
from ..books.changes import Changes
from ..books.holdings import Holdings, Named
from ..syscalls import disk_errors, hash_file
from ..threads import Threads
from .foreign import Foreign
from .store import Store, read_memory

log = logging.getLogger(__name__)

ORIGIN = "adopted"
MEMORY_FILE = ".adopted.json"  # hashes by name and stamp: terabytes need not be read again at every start
FORBIDDEN = ("base_model", "digest", "feature", "rank", "size")  # refusals of what is whole; anything else may be a new version that is half written
SAVE_EVERY_S = 10.0  # while many are being hashed: what a crash may cost


class Adopter:
    """Finds them, by a look through the whole directory now and then or when one is asked for, and keeps the holdings true to them.

    `check(directory)` and, when they are hashed, `check_files(name, files)` say with an InvalidAdapter what is not served here. `replaced(id)` is told
    of an artifact in whose place its owner has put another.
    """

    def __init__(
        self,
        settings: StagerSettings,
        store: Store,
        holdings: Holdings,
        changes: Changes,
        disk: Threads,
        check: Callable[[Path], Checked] = lambda _: Checked(0, {}),
        check_files: Callable[[AdapterName, Sequence[File]], None] = lambda _, __: None,
        replaced: Callable[[ArtifactId], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._store = store
        self._foreign = Foreign(store)
        self._holdings = holdings
        self._changes = changes
        self._disk = disk
        self._check = check
        self._check_files = check_files
        self._replaced = replaced
        self._clock = clock
        self._wall_clock = wall_clock
        self._hashes: dict[str, dict[str, object]] = {}
        self._seen: dict[str, tuple[str, float]] = {}  # what was changed in the future: its stamp, and since when; at most what is there
        self._adopted: set[AdapterName] = set()
        self._is_saved = True
        self._is_blind = False  # the directory could not be read when it was last looked through
        self._saved_at = clock()

    def open(self) -> None:
        """Read what an earlier process has hashed. Blocks."""
        memory = read_memory(self._store, MEMORY_FILE)
        if isinstance(memory, dict):
            self._hashes = {str(name): entry for name, entry in memory.items() if isinstance(entry, dict)}

    async def is_there(self, name: AdapterName) -> bool:
        """Whether others have something under `name`. Raises DiskFailed where this process may not look."""
        return await self._disk.run(self._store.has_foreign, name)

    async def look(self, name: AdapterName) -> Manifest:
        """Verify and hash it. Raises InvalidAdapter, also where it is not complete yet or still being written."""
        return await self._disk.run(self._look, name)

    async def scan(self) -> float:
        """Look through the directory for what came, changed or went; how much of a core's time the look took, in seconds, without what was hashed for it."""
        self._adopted = {name for name in self._adopted if self._holds(name)}  # what was evicted, or came from an origin since, is not theirs
        known = {name: named.revision for name in self._adopted if (named := self._holdings.get(name)) is not None}
        try:
            there, changed, took_s = await self._disk.run(self._look_around, known)
        except LoraExtprocError as error:  # what is known of others' files is kept until somebody may look again
            if not self._is_blind:
                log.warning("what others put into %s is not seen: %s", self._store.directory, error.message)
            self._is_blind = True
            return 0.0
        self._is_blind = False
        for name in dict.fromkeys((*there, *changed)):
            named = self._holdings.get(name)
            try:
                if named is None:
                    await self.adopt(name)
                elif is_adopted(named.id) and name in changed:
                    await self.look_again(name, named)
            except (LoraExtprocError, OSError) as error:
                log.debug("%s: %s", name, error)
            if self._clock() - self._saved_at >= SAVE_EVERY_S:
                await self._save()
        for gone in self._seen.keys() - there:
            del self._seen[gone]
        for gone in self._hashes.keys() - there:
            del self._hashes[gone]
            self._is_saved = False
        await self._save()
        return took_s

    def _look_around(self, known: Mapping[AdapterName, str]) -> tuple[dict[AdapterName, None], set[AdapterName], float]:
        """What others have put here, which of `known` has another revision now, and the CPU seconds that this took."""
        began = time.thread_time()
        there = dict.fromkeys(self._foreign.look(self._is_ours, self._clock()))
        changed = {name for name, revision in known.items() if self.revision(name) != revision}
        return there, changed, time.thread_time() - began

    def _holds(self, name: AdapterName) -> bool:
        named = self._holdings.get(name)
        return named is not None and is_adopted(named.id)

    def _is_ours(self, name: str) -> bool:
        named = self._holdings.get(AdapterName(name))
        return named is not None and not is_adopted(named.id)

    async def adopt(self, name: AdapterName) -> None:
        """Serve it from where it is. Raises InvalidAdapter."""
        manifest = await self.look(name)
        if self._holdings.get(name) is None:  # the look through the directory and a request may find it at once
            self._take(name, manifest, "published")
            log.info("%s: adopted", name)

    async def look_again(self, name: AdapterName, known: Named) -> bool:
        """Others may have changed it, or taken it away; True if so."""
        if not await self.is_there(name):
            if self._holdings.get(name) is not known or self._holdings.index.is_leaving(known.id):
                return False  # it was we
            self._drop(name, known)
            log.info("%s: others took it away", name)
            return True
        try:
            manifest = await self.look(name)
        except InvalidAdapter as error:
            if error.what in FORBIDDEN and self._holdings.get(name) is known:
                self._drop(name, known)
                log.warning("%s: others changed it in place, and it is not served any more: %s", name, error.message)
            raise
        if manifest.revision == known.revision or self._holdings.get(name) is not known:
            return False
        named = self._take(name, manifest, "refreshed")
        if named.id != known.id:
            self._holdings.index.inherit(named.id, known.id)
            self._holdings.index.removed(known.id)
            self._replaced(known.id)
        log.warning("%s: others changed it in place; an engine that has it loaded may answer with either version", name)
        return True

    def _drop(self, name: AdapterName, known: Named) -> None:
        self._adopted.discard(name)
        self._holdings.drop(name)
        self._holdings.index.removed(known.id)
        self._changes.tell("evicted", name)
        self._replaced(known.id)

    def _take(self, name: AdapterName, manifest: Manifest, kind: str) -> Named:
        named = Named(adopted_id(manifest.digest, name), manifest.origin, manifest.revision)
        self._holdings.index.add(named.id, manifest.disk_bytes, self._clock(), keep=not self._settings.evict_adopted)
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
                if not self._rests(name, stamp, youngest):
                    raise InvalidAdapter(f"{name}: others put it on this node, and wrote to it less than {self._settings.scan_s:g} s ago", "incomplete")
                checked = self._check(directory)
                files = self._hashed(name, directory, stamp)
            except (FileNotFoundError, NotADirectoryError):
                raise InvalidAdapter(f"{name}: others put it on this node, and it is not complete", "incomplete") from None
            except PermissionError:
                raise InvalidAdapter(f"{name}: others put it on this node, and this process may not read it", "incomplete") from None
        if self.revision(name) != stamp:
            raise InvalidAdapter(f"{name}: others write to it", "incomplete")
        self._check_files(name, files)
        return Manifest(files, name, ORIGIN, stamp, in_place=directory.is_symlink(), options=checked.options)  # what lies elsewhere takes no room here

    def _rests(self, name: AdapterName, stamp: str, youngest: float) -> bool:
        """Whether nobody has written to it for `scan_s`. A change in the future was dated by a file server's clock, or by ours before it was put back:
        then it counts how long the files were seen as they are.
        """
        if self._hashes.get(name, {}).get("revision") == stamp:  # it rested before it was hashed
            return True
        ago_s = self._wall_clock() - youngest
        if ago_s >= 0:
            return ago_s >= self._settings.scan_s
        seen, since = self._seen.get(name, ("", 0.0))
        if seen != stamp:
            self._seen[name] = (stamp, self._clock())
            return False
        return self._clock() - since >= self._settings.scan_s

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
    """What tells the files that count from what they were before, and when one was last changed. Raises FileNotFoundError where one is missing.

    The kernel's own time of change and the inode belong to it: the time of modification is whatever rsync or tar brought along, may be in the future,
    and may be put back after a change. The moment is the kernel's as well.
    """
    paths = wanted(entry.name for entry in directory.iterdir() if entry.is_file())
    if len(paths) < 2:
        raise FileNotFoundError
    stats = [(directory / path).stat() for path in paths]
    return " ".join(f"{stat.st_size}.{stat.st_mtime_ns}.{stat.st_ctime_ns}.{stat.st_ino}" for stat in stats), max(stat.st_ctime for stat in stats)
