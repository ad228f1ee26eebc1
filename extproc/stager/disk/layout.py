"""Where things lie in the node's directory, and which name leads to which artifact.

    DIR/.staging/<random>/        being fetched, or being deleted; emptied at start
    DIR/.store/<sha256>/          published: the files and their manifest, `.lora-extproc.json`
    DIR/.pins.json                what is held without an end
    DIR/.drain.json               why the node is drained, if it is
    DIR/<adapter name>            symlink into .store; or a directory that others put there, or their link to one elsewhere, which is left as it is
    DIR/<adapter name>/           where other names begin with it, as `acme/sql/checkpoint-500` with `acme/sql`: a folder, in which `.adapter` is the
                                  symlink into .store, and a link per file leads through that one, so that all files change in one step
    DIR/<adapter name>@sha256:..  symlink into .store by which vLLM's resolver finds one version (engine mode `resolver`)

vLLM's resolver joins DIR and the name, and opens `adapter_config.json` and the weights there: both forms give them. All methods block: call them in
a thread.
"""

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...core.artifact import AdapterName, ArtifactId, adapter_name, is_adopted, place_of
from ...errors import InvalidAdapter, InvalidRequest
from ..adapter.files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE
from ..syscalls import disk_errors, exchange, fsync
from .staging import Staging

MANIFEST_FILE = ".lora-extproc.json"
RETIRED_FILE = ".retired"  # beside the manifest of a version that a newer one has replaced: no name may lead there again by itself
ADAPTER_LINK = ".adapter"
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Layout:
    """Paths and links. Several threads may change links at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content = directory / ".store"
        self.staged = Staging(directory / ".staging")
        self._folders = threading.RLock()  # one thread's new `acme/` must not be another's empty one, which goes

    def path(self, id_: ArtifactId) -> Path:
        """Where the artifact lies: its directory in .store, or, for `digest@name`, where others put it."""
        return self.directory / place_of(id_) if is_adopted(id_) else self.content / id_

    # -- names that lead to ours

    def link(self, name: AdapterName, id_: ArtifactId) -> None:
        """Let the engine see the artifact under `name`, atomically, instead of what it saw there before. Raises InvalidAdapter or a disk's error."""
        target = self.directory / name
        with disk_errors():
            with self._folders:
                if is_adopted(id_):  # `unlink` took it away
                    self._put_back(target, self._away(id_))
                    return
                self.check_name(name)
                self._make_folder(target.parent)
                if target.is_dir() and not target.is_symlink():
                    self._put_into(target, self.path(id_))
                else:
                    self._put_link(target, self.path(id_))
                (self.path(id_) / RETIRED_FILE).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # unlinked since
                fsync(target.parent)

    def link_version(self, name: str, id_: ArtifactId) -> None:
        """Let vLLM's resolver see the artifact under the name of its version, beside the link that clients' name is."""
        target = self.directory / name
        with self._folders, disk_errors():
            self._make_folder(target.parent)
            self._put_link(target, self.path(id_))

    def shows(self, name: AdapterName, id_: ArtifactId) -> bool:
        """Whether an engine finds the artifact under `name`."""
        if is_adopted(id_):
            return (self.directory / name).is_dir()
        return self._leads_to(name) == self.path(id_)

    def check_name(self, name: AdapterName) -> None:
        """Whether `name` can be linked: what others put at it, or in the way to it, is left as it is. Raises InvalidAdapter."""
        target = self.directory / name
        with self._folders, disk_errors("read"):
            for parent in target.parents:
                if self.directory in parent.parents and self._is_in_the_way(parent):
                    raise InvalidAdapter(
                        f"{name} cannot be served: on this node, {parent.relative_to(self.directory)} is something else that is no folder", "taken"
                    )
            is_folder = target.is_dir() and not target.is_symlink()
            if self._is_in_the_way(target) or (is_folder and any(self._is_foreign_file(target / file) for file in _FILES)):
                raise InvalidAdapter(f"{name} cannot be served: something else has that name on this node", "taken")

    def unlink(self, name: str, id_: ArtifactId | None = None) -> None:
        """Take the name away, and directories that only it needed. Only a link of ours goes; of others' directory, the adapter `id_`, if that is theirs."""
        target = self.directory / name
        folders = list(target.parents)
        with self._folders, disk_errors():
            if self._leads_to(name) is not None:
                if target.is_symlink():
                    target.unlink()
                else:
                    self._take_out_of(target)
                    folders.insert(0, target)
            elif id_ is not None and is_adopted(id_) and target.is_dir():
                self._take_away(target, self._away(id_))
            for folder in folders:
                if self.directory not in folder.parents:
                    break
                try:
                    folder.rmdir()
                except OSError:  # it is needed, or gone
                    break

    def is_free(self, name: str) -> bool:
        """Whether nothing is under `name`, but for a folder that other names need."""
        target = self.directory / name
        if target.is_symlink() or not target.is_dir():
            return not os.path.lexists(target)
        return not any(os.path.lexists(target / file) for file in (ADAPTER_LINK, CONFIG_FILE))

    def unlink_dangling(self, name: AdapterName) -> None:
        """Take the name away if it leads to nothing."""
        with self._folders:
            if (to := self._leads_to(name)) is not None and not os.path.lexists(to):
                self.unlink(name)

    def _leads_to(self, name: str) -> Path | None:
        """The directory in .store to which our link under `name` leads; None where there is none of ours."""
        target = self.directory / name
        return self._target(target if target.is_symlink() else target / ADAPTER_LINK)

    def _target(self, link: Path) -> Path | None:
        try:
            to = Path(os.path.normpath(link.parent / link.readlink()))
        except OSError:
            return None
        return to if to.parent == self.content else None

    def _is_in_the_way(self, path: Path) -> bool:
        """Whether it is neither a folder nor a link of ours."""
        if path.is_symlink():
            return self._target(path) is None
        return path.exists() and not path.is_dir()

    def _is_foreign_file(self, path: Path) -> bool:
        """Whether somebody put a file of an adapter where ours would be."""
        return os.path.lexists(path) and not _leads_through(path)

    def _make_folder(self, folder: Path) -> None:
        """A folder for names below it; what is a link of ours on the way becomes a folder that shows the same."""
        for path in (*reversed(folder.parents), folder):
            if self.directory not in path.parents:
                continue
            if path.is_symlink():
                if (to := self._target(path)) is not None:
                    self._turn_into_folder(path, to)
            else:
                path.mkdir(exist_ok=True)

    def _turn_into_folder(self, link: Path, to: Path) -> None:
        """The order matters: the folder is complete before it takes the link's place, in one step where the file system can do that."""
        fresh = self.staged.fresh()
        try:
            fresh.mkdir()
            (fresh / ADAPTER_LINK).symlink_to(os.path.relpath(to, link))
            for file in _files(to):
                (fresh / file).symlink_to(f"{ADAPTER_LINK}/{file}")
            fsync(fresh)
            if not exchange(fresh, link):  # for a moment nothing has the name; after a crash in it, the next start links it again
                link.rename(self.staged.fresh())
                fresh.rename(link)
        finally:
            self.staged.clear(fresh)

    def _put_into(self, folder: Path, to: Path) -> None:
        files = _files(to)
        for file in files:
            if not os.path.lexists(folder / file):
                (folder / file).symlink_to(f"{ADAPTER_LINK}/{file}")
        self._put_link(folder / ADAPTER_LINK, to)
        for path in _links_through(folder):
            if path.name not in files:
                path.unlink()

    def _take_out_of(self, folder: Path) -> None:
        (folder / ADAPTER_LINK).unlink()  # first: all files are gone in one step
        for path in _links_through(folder):
            path.unlink()

    def _put_link(self, target: Path, to: Path) -> None:
        fresh = self.staged.fresh()
        fresh.symlink_to(os.path.relpath(to, target.parent))
        try:
            fresh.rename(target)
        except OSError:
            self.staged.clear(fresh)
            raise

    # -- what others put here

    def has_foreign(self, name: AdapterName) -> bool:
        """Whether others have an adapter's configuration under `name`. Raises DiskFailed where the whole directory cannot be read."""
        path = self.directory / name
        try:
            if not stat.S_ISDIR(path.lstat().st_mode) and not self.is_link_outside(path):
                return False
            return not os.path.lexists(path / ADAPTER_LINK) and stat.S_ISREG((path / CONFIG_FILE).stat().st_mode)
        except OSError as error:
            if error.errno in _GONE:
                return False
            with disk_errors("read"):
                self.directory.stat()
                self.content.stat()
            return False  # this one is not for us to see

    def is_link_of_ours(self, path: Path) -> bool:
        """Whether it leads into .store, or shows one file of an artifact that does."""
        return self._target(path) is not None or _leads_through(path)

    def is_link_outside(self, path: Path) -> bool:
        """Whether it is a link to a directory beyond the node's. What lies within has a name of its own: under a second one, an engine could read it
        when it was evicted under the first. Raises OSError.
        """
        if not path.is_symlink():
            return False
        to = os.path.realpath(path, strict=True)
        return os.path.isdir(to) and not Path(to).is_relative_to(os.path.realpath(self.directory))  # noqa: PTH112

    def walk(self, foreign: list[AdapterName]) -> Iterator[tuple[str, str]]:
        """Every symbolic link, as name and path; the names of others' adapters are added to `foreign`."""
        return self._walk(str(self.directory), "", foreign)

    def _walk(self, directory: str, prefix: str, foreign: list[AdapterName]) -> Iterator[tuple[str, str]]:
        try:
            with os.scandir(directory) as scanned:
                entries = list(scanned)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if not prefix:
                raise
            return  # others took it away meanwhile, or it is not for us to see
        for entry in entries:
            if entry.name.startswith("."):
                if entry.name == ADAPTER_LINK and prefix and entry.is_symlink():
                    yield prefix[:-1], entry.path
            elif entry.is_symlink():
                yield prefix + entry.name, entry.path
            elif entry.is_dir(follow_symlinks=False):
                yield from self._walk(entry.path, f"{prefix}{entry.name}/", foreign)
            elif entry.name == CONFIG_FILE and prefix:
                with contextlib.suppress(InvalidRequest):
                    foreign.append(adapter_name(prefix[:-1]))

    def _away(self, id_: ArtifactId) -> Path:
        return self.staged.directory / ("away-" + hashlib.sha256(id_.encode()).hexdigest())

    def _take_away(self, target: Path, away: Path) -> None:
        """Others' adapter is out of sight, until it is put back or removed. What lies in folders below it has names of its own, and stays; so does all
        that a link leads to.
        """
        entries = list(target.iterdir())
        if target.is_symlink() or not any(entry.is_dir() for entry in entries):
            target.rename(away)
            return
        away.mkdir()
        for entry in entries:
            if not entry.is_dir():
                entry.rename(away / entry.name)

    def _put_back(self, target: Path, away: Path) -> None:
        if not os.path.lexists(away):  # a relative link leads nowhere from there
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            away.rename(target)
            return
        for entry in away.iterdir():
            entry.rename(target / entry.name)
        away.rmdir()


_FILES = (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES)


def _files(content: Path) -> Sequence[str]:
    """What of an artifact an engine opens."""
    return [name for name in os.listdir(content) if not name.startswith(".")] if content.is_dir() else []  # noqa: PTH208  # only the names are wanted


def _leads_through(path: Path) -> bool:
    return path.is_symlink() and str(path.readlink()) == f"{ADAPTER_LINK}/{path.name}"


def _links_through(folder: Path) -> list[Path]:
    """The links of files in a folder that shows an artifact."""
    return [path for path in folder.iterdir() if _leads_through(path)]
