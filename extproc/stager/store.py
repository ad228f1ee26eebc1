"""The node's directory. Content lies in `.store/<digest>/`, never changed; a symlink per adapter name is what the engine's resolver sees.

    DIR/.staging/<random>/        being fetched, or being deleted; emptied at start
    DIR/.store/<sha256>/          published: the files and their manifest, `.lora-extproc.json`
    DIR/<adapter name>            symlink into .store

Publishing: write and fsync the files, fsync the directory, rename it out of .staging, fsync .store, then rename a finished symlink over the
name. Deleting: rename into .staging, then remove. So at any instant a name leads to a whole artifact or to none. All methods block: call
them in a thread.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..core.artifact import AdapterName, File, Manifest, adapter_name
from ..errors import DiskFailed, InvalidAdapter, InvalidRequest, NoSpace, StageError, StartError

log = logging.getLogger(__name__)

MANIFEST_FILE = ".lora-extproc.json"
HASH_CHUNK_BYTES = 2**20


@dataclass(slots=True)
class Scan:
    """What was found at start."""

    artifacts: dict[str, tuple[Manifest, float]] = field(default_factory=dict)  # digest -> manifest, modification time (seconds since 1970)
    names: dict[AdapterName, str] = field(default_factory=dict)  # adapter name -> digest
    removed: list[str] = field(default_factory=list)  # what was not whole


class Store:
    """One process at a time may own the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store = directory / ".store"
        self._staging = directory / ".staging"
        self._lock: int | None = None

    def open(self) -> Scan:
        """Take the directory, clear what an earlier process left half done, adopt what is whole. Raises StartError if it cannot be used."""
        try:
            for directory in (self._store, self._staging):
                directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._store, os.O_RDONLY | os.O_DIRECTORY)
            probe = self._staging / f"probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StartError(f"stager.dir {self.directory} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"stager.dir {self.directory} is in use by another stager") from None
        scan = Scan()
        for left in self._staging.iterdir():
            scan.removed.append(f".staging/{left.name}")
            _remove_tree(left)
        self._scan_store(scan)
        self._scan_names(scan)
        return scan

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, digest: str) -> Path:
        """Where the artifact lies."""
        return self._store / digest

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory to fetch into, gone at the end unless it was published."""
        path = self._staging / secrets.token_hex(8)
        with disk_errors():
            path.mkdir()
        try:
            yield path
        finally:
            _remove_tree(path)

    def publish(self, staged: Path, manifest: Manifest) -> str:
        """Make `staged` durable and visible as its digest; the digest. Content that is there already is left alone."""
        with disk_errors():
            digest = manifest.digest
            (staged / MANIFEST_FILE).write_text(manifest.to_json())
            for directory, _, files in os.walk(staged):
                for name in files:
                    _fsync(Path(directory, name))
                _fsync(Path(directory))
            if not self.path(digest).exists():
                try:
                    staged.rename(self.path(digest))
                except OSError:  # another flight brought the same content between the look and the rename
                    if not self.path(digest).exists():
                        raise
                _fsync(self._store)
            return digest

    def link(self, name: AdapterName, digest: str) -> None:
        """Let the engine see `digest` under `name`, atomically, instead of what it saw there before."""
        target = self.directory / name
        with disk_errors():
            self.check_name(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._staging / secrets.token_hex(8)
            fresh.symlink_to(os.path.relpath(self.path(digest), target.parent))
            fresh.rename(target)
            _fsync(target.parent)

    def check_name(self, name: AdapterName) -> None:
        """Whether `name` can be linked: no part of it may be anything but our folders, its end nothing but our link. Raises InvalidAdapter."""
        target = self.directory / name
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

    def unlink(self, name: AdapterName) -> None:
        """Take the name away, and directories that only it needed."""
        target = self.directory / name
        if target.is_symlink():
            target.unlink()
        for parent in target.parents:
            if parent == self.directory or self.directory not in parent.parents:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def remove(self, digest: str) -> None:
        """Delete an artifact; whole or gone at any instant."""
        with disk_errors():
            gone = self._staging / secrets.token_hex(8)
            with contextlib.suppress(FileNotFoundError):
                self.path(digest).rename(gone)
            _remove_tree(gone)

    def _scan_store(self, scan: Scan) -> None:
        for path in self._store.iterdir():
            try:
                manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
                whole = manifest.digest == path.name and all((path / f.path).stat().st_size == f.size for f in manifest.files)
                modified = path.stat().st_mtime
            except (OSError, ValueError):
                whole = False
            if whole:
                scan.artifacts[path.name] = (manifest, modified)
            else:
                scan.removed.append(f".store/{path.name}")
                _remove_tree(path)

    def _scan_names(self, scan: Scan) -> None:
        for directory, subdirectories, files in os.walk(self.directory):
            if Path(directory) == self.directory:
                subdirectories[:] = [d for d in subdirectories if d not in (".store", ".staging")]
            for entry in (*files, *subdirectories):
                path = Path(directory, entry)
                if not path.is_symlink():
                    continue
                target = Path(os.path.normpath(path.parent / path.readlink()))
                if target.parent != self._store:
                    continue  # not ours
                name = str(path.relative_to(self.directory))
                try:
                    if target.name in scan.artifacts:
                        scan.names[adapter_name(name)] = target.name
                        continue
                except InvalidRequest:
                    pass
                scan.removed.append(name)
                path.unlink()
        for digest, (manifest, _) in scan.artifacts.items():  # a crash between the two renames of a publish
            if digest not in scan.names.values() and not os.path.lexists(self.directory / manifest.name):
                with contextlib.suppress(InvalidRequest, StageError):
                    name = adapter_name(manifest.name)
                    self.link(name, digest)
                    scan.names[name] = digest


def hash_file(path: Path, relative: str) -> File:
    """Size and SHA-256 of a file on disk."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return File(relative, size, digest.hexdigest())


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """The operating system's complaints about the disk, as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the node's disk is full, though its limit is not reached") from error
        raise DiskFailed(f"the node's disk cannot be written: {error.strerror}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
