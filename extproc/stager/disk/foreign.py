"""What others put into the node's directory, found without a look at everything that is there: only directories that changed are listed again.

A directory's stamp (its time of change, its inode) moves whenever a name in it comes, goes or leads elsewhere.

| its stamp | what a look does |
| --- | --- |
| another than at the last look | list it |
| the same for less than SETTLED_S | list it: file systems count time in steps, so that a change just after a listing may leave the stamp as it is |
| the same for longer, and it was listed since | take what that listing gave |
| the same, but the last listing of everything is EVERYTHING_S ago | list it: some network file systems keep no times of directories |

What a listing gives are folders, which have stamps of their own, and the few names that are not ours. Files are not looked at: whoever adopted an
adapter looks whether it changed in place.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...core.artifact import AdapterName, adapter_name
from ...errors import InvalidRequest
from ..adapter.files import CONFIG_FILE
from ..syscalls import disk_errors, stamp_of
from .layout import Layout

SETTLED_S = 2.0  # the coarsest clock of a file system, FAT's
EVERYTHING_S = 600.0


@dataclass(slots=True)
class _Folder:
    """What the last listing gave. A hundred thousand of these must not weigh: no name of ours is kept, and of the stamp only a hash."""

    stamp: int = 0
    since: float = 0.0  # when it was first seen with this stamp
    is_settled: bool = False  # it was listed SETTLED_S after that, or later
    has_config: bool = False  # an adapter's configuration lies in it
    links: tuple[str, ...] = ()  # symbolic links that are not ours
    folders: "dict[str, _Folder] | None" = None  # None: it has none, as most


class Foreign:
    """Not safe for concurrent use. At most one small object for each directory that is there."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._top = _Folder()
        self._listed_at: float | None = None  # when a listing of everything began

    def look(self, is_ours: Callable[[str], bool], now: float) -> list[AdapterName]:
        """Names of directories with an adapter's configuration that others put here, and of links to such elsewhere. Of names that are known to be ours
        no link is read: there may be a hundred thousand. `now` in seconds, of a clock that goes forward only. Blocks. Raises DiskFailed.
        """
        if self._listed_at is None or now - self._listed_at >= EVERYTHING_S:
            self._top, self._listed_at = _Folder(), now
        found: list[AdapterName] = []
        with disk_errors("read"):
            try:
                self._look(self._top, str(self._layout.directory), "", is_ours, now, found)
            except OSError:
                self._listed_at = None
                raise
        return found

    def _look(self, folder: _Folder, directory: str, prefix: str, is_ours: Callable[[str], bool], now: float, found: list[AdapterName]) -> None:
        try:
            self._refresh(folder, directory, prefix, is_ours, now)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if not prefix:
                raise
            return  # others took it away meanwhile, or it is not for us to see
        if folder.has_config and prefix:
            with contextlib.suppress(InvalidRequest):
                found.append(adapter_name(prefix[:-1]))
        for name in folder.links:
            with contextlib.suppress(InvalidRequest):
                if not is_ours(prefix + name) and self._layout.has_foreign(called := adapter_name(prefix + name)):
                    found.append(called)
        for name, inner in (folder.folders or {}).items():
            self._look(inner, f"{directory}/{name}", f"{prefix}{name}/", is_ours, now, found)

    def _refresh(self, folder: _Folder, directory: str, prefix: str, is_ours: Callable[[str], bool], now: float) -> None:
        """List it, unless that would give what the last listing gave."""
        stamp = hash(stamp_of(os.stat(directory)))  # noqa: PTH116  # plain calls: there may be a hundred thousand
        if stamp != folder.stamp:
            folder.stamp, folder.since, folder.is_settled = stamp, now, False
        if not folder.is_settled:
            self._list(folder, directory, prefix, is_ours)
            folder.is_settled = now - folder.since >= SETTLED_S

    def _list(self, folder: _Folder, directory: str, prefix: str, is_ours: Callable[[str], bool]) -> None:
        links, folders, has_config = list[str](), dict[str, _Folder](), False
        known = folder.folders or {}
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    if not is_ours(prefix + entry.name) and not self._layout.is_link_of_ours(Path(entry.path)):
                        links.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders[entry.name] = known.get(entry.name) or _Folder()
                else:
                    has_config = has_config or entry.name == CONFIG_FILE
        folder.links, folder.folders, folder.has_config = tuple(links), folders or None, has_config
