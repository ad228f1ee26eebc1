"""The node's directory. Content lies in `.store/<digest>/`, never changed; a symlink per adapter name is what the engine's resolver sees.

    DIR/.staging/<random>/        being fetched, or being deleted; emptied at start
    DIR/.store/<sha256>/          published: the files and their manifest, `.lora-extproc.json`
    DIR/.pins.json                what is held without an end
    DIR/<adapter name>            symlink into .store; or a directory that others put there, which is left as it is
    DIR/<adapter name>@sha256:..  symlink into .store by which vLLM's resolver finds one version (engine mode `resolver`)

Publishing: write and fsync the files, fsync the directory, rename it out of .staging, fsync .store, then rename a finished symlink over the
name. Deleting: rename into .staging, then remove. So at any instant a name leads to a whole artifact or to none. All methods block: call
them in a thread.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from ...core.artifact import AdapterName, ArtifactId, Manifest, adapter_name, split_version
from ...errors import DiskFailed, InvalidAdapter, InvalidRequest, StageError, StartError
from ..adapter.files import CONFIG_FILE
from ..syscalls import HASH_CHUNK_BYTES, disk_errors

log = logging.getLogger(__name__)

MANIFEST_FILE = ".lora-extproc.json"
RETIRED_FILE = ".retired"  # beside the manifest of a version that a newer one has replaced: no name may lead there again by itself
SCAN_THREADS = 8
SCAN_PART = 200
SYNC_THREADS = 4
WAITING_LOOK_S = 120e-6  # one takes 35 us where nothing waits, and over 200 where the disk does
NOT_ITS_FAULT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what cannot be read for these reasons may well be whole


@dataclass(slots=True)
class Found:
    """An artifact as the start found it: what of its manifest is kept in memory. A hundred thousand of these must not weigh."""

    digest: ArtifactId
    disk_bytes: int
    name: str
    origin: str
    revision: str
    final: bool
    modified: float  # seconds since 1970
    names: AdapterName | tuple[AdapterName, ...] = ()  # that lead to it; one, as nearly always, without a tuple


@dataclass(slots=True)
class Scan:
    """What was found at start."""

    artifacts: dict[ArtifactId, Found] = field(default_factory=dict)  # by digest
    removed: list[str] = field(default_factory=list)  # what was not whole
    foreign: list[AdapterName] = field(default_factory=list)  # directories with a configuration that others put there
    versions: dict[str, ArtifactId] = field(default_factory=dict)  # names of versions that are linked -> digest
    unnamed: dict[ArtifactId, int] = field(default_factory=dict)  # digest -> bytes on disk of what no name leads to any more, but an engine may read

    @property
    def names(self) -> dict[AdapterName, ArtifactId]:
        """Adapter name -> digest."""
        return {name: found.digest for found in self.artifacts.values() for name in _all(found.names)}

    def take(self) -> Iterator[tuple[AdapterName, Found]]:
        """Every name with its artifact, which is forgotten then: else all would be held twice."""
        waiting = list(reversed(self.artifacts.values()))
        self.artifacts.clear()
        while waiting:
            found = waiting.pop()
            for name in _all(found.names):
                yield name, found

    def by_age(self) -> list[ArtifactId]:
        """The digests, what was published first coming first."""
        return [found.digest for found in sorted(self.artifacts.values(), key=lambda found: found.modified)]


def _all(names: AdapterName | tuple[AdapterName, ...]) -> tuple[AdapterName, ...]:
    return (names,) if isinstance(names, str) else names


class Store:
    """One process at a time may own the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store = directory / ".store"
        self._staging = directory / ".staging"
        self._lock: int | None = None
        self._left: set[Path] = set()  # in .staging, and the disk would not let it go
        self._syncing = ThreadPoolExecutor(SYNC_THREADS, "fsync")
        self._folders = threading.RLock()  # one thread's new `acme/` must not be another's empty one, which goes

    def open(self, *, keep_unnamed: bool = False) -> Scan:
        """Take the directory, clear what an earlier process left half done, adopt what is whole. Raises StartError if it cannot be used.

        `keep_unnamed`: an engine may still read versions that newer ones have replaced, so they are found and not removed.
        """
        try:
            for directory in (self._store, self._staging):
                directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._store, os.O_RDONLY | os.O_DIRECTORY)
            self._probe()
        except OSError as error:
            raise StartError(f"stager.dir {self.directory} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"stager.dir {self.directory} is in use by another stager") from None
        scan = Scan()
        try:
            for left in self._staging.iterdir():
                scan.removed.append(f".staging/{left.name}")
                self._clear(left)
            with ThreadPoolExecutor(SCAN_THREADS) as pool:
                looks = _Looks(pool)
                self._scan_store(scan, looks)
                self._scan_names(scan, looks, keep_unnamed=keep_unnamed)
        except OSError as error:
            raise StartError(f"stager.dir {self.directory} cannot be read: {error.strerror}") from error
        return scan

    def close(self) -> None:
        """Let another process have the directory."""
        self._syncing.shutdown(wait=False)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, id_: ArtifactId) -> Path:
        """Where the artifact lies: its directory in .store, or, for `digest@name`, where others put it."""
        return self.directory / id_.place if id_.is_adopted else self._store / id_

    def manifest(self, digest: str) -> Manifest:
        """What was published as `digest`. Raises StageError if it cannot be read."""
        try:
            with disk_errors("read"):
                return Manifest.from_json((self._store / digest / MANIFEST_FILE).read_bytes())
        except ValueError as error:
            raise DiskFailed(f"the manifest of {digest} is damaged") from error

    def probe(self) -> None:
        """Write and take back one file. Raises NoSpace or DiskFailed where the disk cannot be written."""
        with disk_errors():
            self._probe()

    def _probe(self) -> None:
        probe = self._staging / f"probe-{os.getpid()}"
        try:
            with probe.open("wb") as file:
                file.write(b"probe")
                os.fsync(file.fileno())
        finally:
            self._clear(probe)

    @property
    def has_leftovers(self) -> bool:
        """Whether something half done could not be removed when it should have been."""
        return bool(self._left)

    def clear_leftovers(self) -> None:
        """Try again."""
        for path in list(self._left):
            self._clear(path)

    def free_bytes(self) -> int:
        """What the file system has left for us."""
        with disk_errors("read"):
            stat = os.statvfs(self.directory)
            return stat.f_bavail * stat.f_frsize

    def read_json(self, name: str) -> object:
        """A small file of our own beside .store; None if it is not there or damaged."""
        try:
            return json.loads((self.directory / name).read_bytes())
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, value: object) -> None:
        """Replace it, whole or not at all."""
        with disk_errors():
            fresh = self._staging / secrets.token_hex(8)
            try:
                with fresh.open("w") as file:
                    json.dump(value, file)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.rename(self.directory / name)
            except OSError:
                self._clear(fresh)
                raise
            _fsync(self.directory)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory to fetch into, gone at the end unless it was published."""
        path = self._staging / secrets.token_hex(8)
        with disk_errors():
            path.mkdir()
        try:
            yield path
        finally:
            self._clear(path)

    def publish(self, staged: Path, manifest: Manifest) -> ArtifactId:
        """Make `staged` durable and visible as its digest; the digest. Content that is there already is left alone."""
        with disk_errors():
            digest = manifest.digest
            (staged / MANIFEST_FILE).write_text(manifest.to_json())
            files = [path for path in staged.iterdir() if not path.is_symlink()]
            list(self._syncing.map(_fsync, files))  # at once: the disk writes them down together
            _fsync(staged)
            if not self.path(digest).exists():
                try:
                    staged.rename(self.path(digest))
                except OSError:  # another flight brought the same content between the look and the rename
                    if not self.path(digest).exists():
                        raise
                _fsync(self._store)
            return digest

    def link(self, name: AdapterName, id_: ArtifactId) -> None:
        """Let the engine see the artifact under `name`, atomically, instead of what it saw there before."""
        target = self.directory / name
        with disk_errors():
            with self._folders:
                if id_.is_adopted:  # `unlink` took it away
                    if (away := self._away(id_)).exists():
                        target.parent.mkdir(parents=True, exist_ok=True)
                        away.rename(target)
                    return
                self.check_name(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._put_link(target, self.path(id_))
                (self.path(id_) / RETIRED_FILE).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # unlinked since
                _fsync(target.parent)

    def link_version(self, name: str, id_: ArtifactId) -> None:
        """Let vLLM's resolver see the artifact under the name of its version, beside the link that clients' name is."""
        target = self.directory / name
        with self._folders, disk_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            self._put_link(target, self.path(id_))

    def shows(self, name: AdapterName, id_: ArtifactId) -> bool:
        """Whether an engine finds the artifact under `name`."""
        target = self.directory / name
        try:
            if id_.is_adopted:
                return target.is_dir()
            return Path(os.path.normpath(target.parent / target.readlink())) == self.path(id_)
        except OSError:
            return False

    def _put_link(self, target: Path, to: Path) -> None:
        fresh = self._staging / secrets.token_hex(8)
        fresh.symlink_to(os.path.relpath(to, target.parent))
        try:
            fresh.rename(target)
        except OSError:
            self._clear(fresh)
            raise

    def check_name(self, name: AdapterName) -> None:
        """Whether `name` can be linked: no part of it may be anything but our folders, its end nothing but our link. Raises InvalidAdapter."""
        target = self.directory / name
        with self._folders, disk_errors():
            for parent in target.parents:
                if self.directory in parent.parents and (parent.is_symlink() or (parent.exists() and not parent.is_dir())):
                    raise InvalidAdapter(f"{name} cannot be served beside an adapter whose name it begins with")
            if target.is_symlink():
                if Path(os.path.normpath(target.parent / target.readlink())).parent != self._store:
                    raise InvalidAdapter(f"{name} cannot be served: something else has that name on this node")
            elif target.is_dir():
                raise InvalidAdapter(f"{name} cannot be served beside adapters whose names begin with {name}/")
            elif target.exists():
                raise InvalidAdapter(f"{name} cannot be served: something else has that name on this node")

    def unlink(self, name: str, id_: ArtifactId | None = None) -> None:
        """Take the name away, and directories that only it needed."""
        target = self.directory / name
        with self._folders, disk_errors():
            if target.is_symlink():
                target.unlink()
            elif id_ is not None and id_.is_adopted and target.is_dir():
                target.rename(self._away(id_))
            for parent in target.parents:
                if parent == self.directory or self.directory not in parent.parents:
                    break
                try:
                    parent.rmdir()
                except OSError:
                    break

    def retire(self, id_: ArtifactId) -> None:
        """Remember that its name leads elsewhere on purpose: else the next start would take it for a publication that a crash has cut short."""
        with disk_errors(), contextlib.suppress(FileNotFoundError):
            (self.path(id_) / RETIRED_FILE).touch()

    def remove(self, id_: ArtifactId) -> None:
        """Delete an artifact; whole or gone at any instant."""
        with disk_errors():
            self._remove(self._away(id_) if id_.is_adopted else self.path(id_))

    def _remove(self, path: Path) -> None:
        gone = self._staging / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
        self._clear(gone)

    def _clear(self, path: Path) -> None:
        """Remove what nobody may find. What a failing disk keeps is remembered."""
        shutil.rmtree(path, ignore_errors=True)
        try:
            with contextlib.suppress(IsADirectoryError):
                path.unlink(missing_ok=True)
            path.lstat()
        except FileNotFoundError:
            self._left.discard(path)
        except OSError:
            self._left.add(path)
        else:
            self._left.add(path)

    def foreign(self) -> list[AdapterName]:
        """Directories with an adapter's configuration that others put here."""
        found: list[AdapterName] = []
        with disk_errors("read"):
            for _ in self._walk(str(self.directory), "", found):
                pass
        return found

    def _away(self, id_: ArtifactId) -> Path:
        return self._staging / ("away-" + hashlib.sha256(id_.encode()).hexdigest())

    def _scan_store(self, scan: Scan, looks: "_Looks") -> None:
        """In the order of the inodes, in which a disk has them."""
        with os.scandir(self._store) as entries:
            digests = [entry.name for entry in sorted(entries, key=os.DirEntry.inode)]
        for found in looks.each(self._look_at, digests):
            if isinstance(found, Found):
                scan.artifacts[found.digest] = found
            else:
                scan.removed.append(f".store/{found}")
                self._remove(self._store / found)

    def _look_at(self, digests: Sequence[str]) -> "list[Found | str]":
        """Each as it was found, or only its name where it is not whole. Strings and system calls: this is done a hundred thousand times."""
        looked: list[Found | str] = []
        for digest in digests:
            directory = f"{self._store}/{digest}"
            try:
                text, modified = _read_small(f"{directory}/{MANIFEST_FILE}")
                manifest = Manifest.from_json(text)
                whole = manifest.digest == digest and all(os.stat(f"{directory}/{f.path}").st_size == f.size for f in manifest.files)  # noqa: PTH116
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in NOT_ITS_FAULT:
                    raise
                whole = False
            if whole:
                origin, revision = sys.intern(manifest.origin), manifest.revision.encode().decode()  # a copy without the slack that the JSON reader left
                looked.append(Found(manifest.digest, manifest.disk_bytes, manifest.name, origin, revision, manifest.final, modified))
            else:
                looked.append(digest)
        return looked

    def _scan_names(self, scan: Scan, looks: "_Looks", *, keep_unnamed: bool) -> None:
        """Our links; those that lead nowhere go. Then content that none leads to: what a crash left without its name gets it, the rest goes."""
        for name, path, link in looks.each(_read_links, self._walk(str(self.directory), "", scan.foreign)):
            ours = "../" * name.count("/") + f"{self._store.name}/"
            if link.startswith(ours):
                self._scan_name(scan, name, path, scan.artifacts.get(ArtifactId(link[len(ours) :])))
        for found in scan.artifacts.values():  # a crash between the two renames of a publish
            if not (found.names or os.path.lexists(self.directory / found.name) or os.path.lexists(self.path(found.digest) / RETIRED_FILE)):
                with contextlib.suppress(InvalidRequest, StageError):
                    called = adapter_name(found.name)
                    self.link(called, found.digest)
                    found.names = called
        for found in [found for found in scan.artifacts.values() if not found.names]:
            del scan.artifacts[found.digest]  # a version that a newer one replaced
            if keep_unnamed:
                scan.unnamed[found.digest] = found.disk_bytes
                continue
            scan.removed.append(f".store/{found.digest}")
            self._remove(self._store / found.digest)

    def _scan_name(self, scan: Scan, name: str, path: str, found: Found | None) -> None:
        version = split_version(name)
        if version is not None and found is not None and found.digest.startswith(version[1]):
            scan.versions[name] = found.digest
            return
        try:
            if found is not None:
                called = adapter_name(found.name if found.name == name else name)
                found.names = (*_all(found.names), called) if found.names else called
                return
        except InvalidRequest:
            pass
        scan.removed.append(name)
        os.unlink(path)  # noqa: PTH108

    def _walk(self, directory: str, prefix: str, foreign: list[AdapterName]) -> Iterator[tuple[str, str]]:
        """Every symbolic link, as name and path; directories of others are added to `foreign`."""
        try:
            with os.scandir(directory) as scanned:
                entries = list(scanned)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if not prefix:
                raise
            return  # others took it away meanwhile, or it is not for us to see
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                yield prefix + entry.name, entry.path
            elif entry.is_dir(follow_symlinks=False):
                yield from self._walk(entry.path, f"{prefix}{entry.name}/", foreign)
            elif entry.name == CONFIG_FILE and prefix:
                with contextlib.suppress(InvalidRequest):
                    foreign.append(adapter_name(prefix[:-1]))


T = TypeVar("T")
R = TypeVar("R")


class _Looks:
    """Looks at many things on the disk: one after the other while its pages are in memory, else side by side, since each look waits.

    In threads always would be slower by half where nothing waits: they then wait for each other.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._is_waiting = False

    def each(self, look: Callable[[Sequence[T]], Sequence[R]], things: Iterable[T]) -> Iterator[R]:
        """What `look` says of all of them, in their order. It is given some at a time."""
        left = iter(things)
        while some := list(islice(left, SCAN_THREADS * SCAN_PART)):
            parts = [some[begin : begin + SCAN_PART] for begin in range(0, len(some), SCAN_PART)]
            began = time.monotonic()
            seen = list((self._pool.map if self._is_waiting else map)(look, parts))
            self._is_waiting = self._is_waiting or time.monotonic() - began > len(some) * WAITING_LOOK_S
            yield from chain.from_iterable(seen)


def _read_small(path: str) -> tuple[bytes, float]:
    """What a file holds, and when it was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        text = b""
        while part := os.read(descriptor, HASH_CHUNK_BYTES):
            text += part
        return text, os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _read_links(links: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(name, path, os.readlink(path)) for name, path in links]  # noqa: PTH115


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
