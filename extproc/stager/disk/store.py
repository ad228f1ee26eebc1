"""The node's directory, owned by one process at a time: content comes whole, and goes whole.

Publishing: write and fsync the files, fsync the directory, rename it out of .staging, fsync .store, then rename a finished symlink over the
name. Deleting: rename into .staging, then remove. So at any instant a name leads to a whole artifact or to none. All methods block: call
them in a thread.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ...core.artifact import ArtifactId, Manifest, is_adopted
from ...errors import DiskFailed, StageError, StartError
from ..adapter.check import options
from ..syscalls import disk_errors, fsync, hash_open, stamp_of
from ..threads import through
from .layout import MANIFEST_FILE, RETIRED_FILE, Layout
from .recover import NOT_ITS_FAULT, Condition, Scan, condition, look_through

SYNC_THREADS = 4


class Store(Layout):
    """The lock is on `.store` itself: who has removed that directory, or mounted another over it, has taken the lock along."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._lock: int | None = None
        self._syncing = ThreadPoolExecutor(SYNC_THREADS, "fsync")
        self._publishing = threading.Lock()  # between the look at a digest's directory and what follows from it

    # -- the directory

    def open(self, *, keep_unnamed: bool = False) -> Scan:
        """Take the directory, clear what an earlier process left half done, adopt what is whole. Raises StartError if it cannot be used.

        `keep_unnamed`: an engine may still read versions that newer ones have replaced, so they are found and not removed.
        """
        try:
            is_ours = self._take()
        except OSError as error:
            raise StartError(f"stager.dir {self.directory} cannot be used: {error.strerror}") from None
        if not is_ours:
            raise StartError(f"stager.dir {self.directory} is in use by another stager")
        try:
            return look_through(self, keep_unnamed=keep_unnamed)
        except OSError as error:
            raise StartError(f"stager.dir {self.directory} cannot be read: {error.strerror}") from error

    def check(self, *, writing: bool) -> bool:
        """Whether the directory is the one that was taken; False where it was removed, or another is in its place: `take_again`.

        Raises DiskFailed where it cannot be read or, if that is to be tried, `writing` to it fails; NoSpace where it is only full.
        """
        with disk_errors("read"):
            try:
                now = self.content.stat()
                self.staged.directory.stat()
            except FileNotFoundError:
                return False
            held = os.fstat(self._lock) if self._lock is not None else None
            if held is None or (now.st_dev, now.st_ino) != (held.st_dev, held.st_ino):
                return False
            with os.scandir(self.directory) as names:  # with a mode that keeps this process out, a stat may still succeed
                next(names, None)  # not all of them: there may be a hundred thousand
        if self.staged.has_leftovers:
            self.staged.clear_leftovers()
        if writing:
            self.probe()
        return True

    def take_again(self) -> Scan:
        """Take the directory that is there now, made anew if need be; what is in it. What flights fill at the moment is left to them.

        Raises DiskFailed, also where another stager has it.
        """
        with disk_errors():
            self._let_go()
            if not self._take():
                raise DiskFailed("the node's directory was taken by another stager while it was gone")
            return look_through(self, flights_go_on=True)

    def close(self) -> None:
        """Let another process have the directory."""
        self._syncing.shutdown(wait=False)
        self._let_go()

    def _take(self) -> bool:
        """Make what is missing, and lock it; False where another process has the lock."""
        for directory in (self.content, self.staged.directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.content, os.O_RDONLY | os.O_DIRECTORY)
        self.staged.probe()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._let_go()
            return False
        return True

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load_options(self, id_: ArtifactId) -> dict[str, bool]:
        """What an engine's load call must say of an artifact beside its place. Raises StageError, also where one of ours is not what was published, or
        InvalidAdapter where others have broken theirs since.
        """
        if not is_adopted(id_):
            self.check_whole(id_)
            return self.manifest(id_).options
        with disk_errors("read"):
            return through(options(self.path(id_)))

    def show_version(self, name: str, id_: ArtifactId) -> None:
        """`link_version`, for an engine that has not read the artifact yet. Raises DiskFailed where one of ours is not what was published."""
        if not is_adopted(id_):
            self.check_whole(id_)
        self.link_version(name, id_)

    def probe(self) -> None:
        """Write and take back one file. Raises NoSpace or DiskFailed where the disk cannot be written."""
        with disk_errors():
            self.staged.probe()

    @property
    def has_leftovers(self) -> bool:
        """Whether something half done could not be removed when it should have been."""
        return self.staged.has_leftovers

    def room(self, free_share: float) -> int:
        """What the file system has for us beyond what is published, in bytes: what is free and what is being fetched, without the part to be left free."""
        with disk_errors("read"):
            stat = os.statvfs(self.directory)
            free = stat.f_bavail * stat.f_frsize - int(free_share * stat.f_blocks * stat.f_frsize)
            return free + _allotted(self.staged.directory)

    # -- small files of our own

    def read_json(self, name: str) -> object:
        """A small file of our own beside .store; None if it is not there. Raises ValueError where it is damaged, OSError where it cannot be read."""
        try:
            return json.loads((self.directory / name).read_bytes())
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: object) -> None:
        """Replace it, whole or not at all."""
        with disk_errors():
            fresh = self.staged.fresh()
            try:
                with fresh.open("w") as file:
                    json.dump(value, file)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.rename(self.directory / name)
            except OSError:
                self.staged.clear(fresh)
                raise
            fsync(self.directory)

    # -- artifacts

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory to fetch into, gone at the end unless it was published."""
        with contextlib.ExitStack() as stack:
            with disk_errors():
                path = stack.enter_context(self.staged.filling())
            yield path

    def manifest(self, digest: str) -> Manifest:
        """What was published as `digest`. Raises StageError if it cannot be read."""
        try:
            with disk_errors("read"):
                return Manifest.from_json((self.content / digest / MANIFEST_FILE).read_bytes())
        except ValueError as error:
            raise DiskFailed(f"the manifest of {digest} is damaged") from error

    def condition(self, id_: ArtifactId) -> Condition:
        """What a look at one of our artifacts finds, without reading its files. Raises DiskFailed where that cannot be said."""
        with disk_errors("read"):
            return condition(str(self.path(id_)), id_)

    def is_whole(self, id_: ArtifactId) -> bool:
        """Whether every file of one of our artifacts is there, as it was published. Only what was touched is read for it. Raises DiskFailed."""
        found = self.condition(id_)
        return found is Condition.WHOLE or (found is Condition.TOUCHED and not self.differs(id_))

    def check_whole(self, id_: ArtifactId) -> None:
        """Before an engine reads one of our artifacts. Raises DiskFailed where it is not what was published."""
        if not self.is_whole(id_):
            raise DiskFailed(f"{id_[:12]} is not on this node's disk as it was published")

    def differs(self, id_: ArtifactId) -> str:
        """Why one of our artifacts is not what was published, read from end to end; "" if it is, and then it counts as touched no longer.

        The stamp is taken before the file is read: what is written meanwhile gives another. Raises StageError where this process may not read it.
        """
        manifest, stamps = self.manifest(id_), {}
        for file in manifest.files:
            try:
                with (self.path(id_) / file.path).open("rb") as opened:
                    stamps[file.path] = stamp_of(os.fstat(opened.fileno()))
                    if hash_open(opened, file.path) != file:
                        return f"{file.path} is not what was published"
            except OSError as error:
                if error.errno not in NOT_ITS_FAULT:
                    return f"{file.path} cannot be read: {error.strerror}"
                with disk_errors("read"):
                    raise
        if stamps != manifest.stamps:
            self._write_stamps(id_, manifest, replace(manifest, stamps=stamps))
        return ""

    def _write_stamps(self, id_: ArtifactId, old: Manifest, new: Manifest) -> None:
        """Replace its manifest, whole or not at all, and keep the manifest's time, which is when the artifact was last used."""
        path, fresh = self.path(id_) / MANIFEST_FILE, self.staged.fresh()
        try:
            fresh.write_text(new.to_json())
            fsync(fresh)
            with self._publishing:
                if self.manifest(id_) == old:  # else it was published anew meanwhile
                    used = path.stat()
                    os.utime(fresh, ns=(used.st_atime_ns, used.st_mtime_ns))
                    fresh.rename(path)
        except (OSError, StageError):  # a disk that is full, or an eviction: then the next look reads it again
            pass
        finally:
            self.staged.clear(fresh)

    def publish(self, staged: Path, manifest: Manifest) -> ArtifactId:
        """Make `staged` durable and visible as its digest; the digest. Content that is there already is left alone, unless it is not what was published.

        Of files that are links to where an origin has them, whose owner may write to them at any time, the manifest gives the stamps.
        """
        with disk_errors():
            digest = manifest.digest
            own = {file.path: stamp_of((staged / file.path).stat()) for file in manifest.files if not (staged / file.path).is_symlink()}
            (staged / MANIFEST_FILE).write_text(replace(manifest, stamps=manifest.stamps | own).to_json())
            files = [path for path in staged.iterdir() if not path.is_symlink()]
            list(self._syncing.map(fsync, files))  # at once: the disk writes them down together
            fsync(staged)
            was_whole = self.is_whole(digest)  # before the lock, since it may have to be read
            with self._publishing:
                found = self.condition(digest)
                is_new = found is Condition.LOST or (found is Condition.TOUCHED and not was_whole)
                if is_new:
                    self._discard(digest)
                    staged.rename(self.path(digest))
            if is_new:
                fsync(self.content)
            return digest

    def discard_lost(self, id_: ArtifactId) -> None:
        """Remove what is left of an artifact that was lost. One that was published anew meanwhile stays."""
        with disk_errors(), self._publishing:
            if self.condition(id_) is Condition.LOST:
                self._discard(id_)

    def _discard(self, digest: ArtifactId) -> None:
        if self.path(digest).exists():
            self.staged.discard(self.path(digest))

    def retire(self, id_: ArtifactId) -> None:
        """Remember that its name leads elsewhere on purpose: else the next start would take it for a publication that a crash has cut short."""
        with disk_errors(), contextlib.suppress(FileNotFoundError):
            (self.path(id_) / RETIRED_FILE).touch()

    def remove(self, id_: ArtifactId) -> None:
        """Delete an artifact; whole or gone at any instant."""
        with disk_errors():
            self.staged.discard(self._away(id_) if is_adopted(id_) else self.path(id_))


def read_memory(store: Store, name: str) -> object:
    """A small file that only spares work; None where it cannot be read, or is damaged."""
    try:
        return store.read_json(name)
    except (OSError, ValueError, StageError):
        return None


def _allotted(directory: Path) -> int:
    """What the files of the directories below one take on the disk, in bytes."""
    taken = 0
    with os.scandir(directory) as flights:
        for flight in flights:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(flight.path) as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        taken += file.stat(follow_symlinks=False).st_blocks * 512  # the unit of st_blocks, whatever the file system's is
    return taken
