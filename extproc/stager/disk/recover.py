"""The look through the whole directory at start, and again when it was taken away and put back: what is whole stays, what a crash left half done goes.

A hundred thousand artifacts are looked at, so only strings and system calls are used for each, and little of each is kept in memory.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from ...core.artifact import AdapterName, ArtifactId, Manifest, adapter_name, split_version
from ...errors import InvalidRequest, StageError
from ..syscalls import HASH_CHUNK_BYTES, stamp_of
from .layout import ADAPTER_LINK, MANIFEST_FILE, RETIRED_FILE, Layout

SCAN_THREADS = 8
SCAN_PART = 200
WAITING_LOOK_S = 120e-6  # one takes 35 us where nothing waits, and over 200 where the disk does
NOT_ITS_FAULT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what cannot be read for these reasons may well be whole


class Condition(Enum):
    """What a look at an artifact finds, without reading its files."""

    WHOLE = "whole"
    TOUCHED = "touched"  # every file is there and as long as it was, and one has another stamp: only reading tells whether it is what was published
    LOST = "lost"  # the manifest or a file is missing, or has another length


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
    touched: list[ArtifactId] = field(default_factory=list)  # of which only reading tells whether they are what was published

    def named(self) -> Iterator[tuple[AdapterName, ArtifactId]]:
        """Every name, and what it leads to."""
        return ((name, found.digest) for found in self.artifacts.values() for name in _all(found.names))

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


def look_through(layout: Layout, *, keep_unnamed: bool = False, flights_go_on: bool = False) -> Scan:
    """What is in the directory; what is not whole is removed. Raises OSError or DiskFailed where the directory cannot be read or written.

    `keep_unnamed`: an engine may still read versions that newer ones have replaced, so they are found and not removed. `flights_go_on`: what has no
    name may be about to get it, so that nothing is concluded from that.
    """
    scan = Scan(removed=[f".staging/{name}" for name in layout.staged.empty()])
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looks = _Looks(pool)
        _scan_store(layout, scan, looks)
        _scan_names(layout, scan, looks)
        if not flights_go_on:
            _name_again(layout, scan)
        _part_with_unnamed(layout, scan, keep=keep_unnamed or flights_go_on)
    return scan


def read_whole(directory: str, digest: str) -> tuple[Manifest, float, bool] | None:
    """The manifest of what was published as `digest`, when it was last used, and whether a file was touched since; None where it is lost.

    Raises OSError where that cannot be said.
    """
    try:
        text, modified = _read_small(f"{directory}/{MANIFEST_FILE}")
        manifest = Manifest.from_json(text)
        is_touched, stamps = False, manifest.stamps
        if manifest.digest != digest:
            return None
        for file in manifest.files:
            stat = os.stat(f"{directory}/{file.path}")  # noqa: PTH116
            if stat.st_size != file.size:
                return None
            if stamps and stamps.get(file.path) != stamp_of(stat):
                is_touched = True
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NOT_ITS_FAULT:
            raise
        return None
    return manifest, modified, is_touched


def condition(directory: str, digest: str) -> Condition:
    """What a look at one artifact finds. Raises OSError where that cannot be said."""
    read = read_whole(directory, digest)
    return Condition.LOST if read is None else Condition.TOUCHED if read[2] else Condition.WHOLE


def _scan_store(layout: Layout, scan: Scan, looks: "_Looks") -> None:
    """In the order of the inodes, in which a disk has them."""
    with os.scandir(layout.content) as entries:
        digests = [entry.name for entry in sorted(entries, key=os.DirEntry.inode)]
    for found in looks.each(partial(_look_at, str(layout.content), scan.touched), digests):
        if isinstance(found, Found):
            scan.artifacts[found.digest] = found
        else:
            scan.removed.append(f".store/{found}")
            layout.staged.discard(layout.content / found)


def _look_at(content: str, touched: list[ArtifactId], digests: Sequence[str]) -> "list[Found | str]":
    """Each as it was found, or only its name where it is lost. What was touched is added to `touched`, by several threads at once."""
    looked: list[Found | str] = []
    for digest in digests:
        read = read_whole(f"{content}/{digest}", digest)
        if read is None:
            looked.append(digest)
            continue
        manifest, modified, is_touched = read
        origin, revision = sys.intern(manifest.origin), manifest.revision.encode().decode()  # a copy without the slack that the JSON reader left
        found = Found(manifest.digest, manifest.disk_bytes, manifest.name, origin, revision, manifest.final, modified)
        looked.append(found)
        if is_touched:
            touched.append(found.digest)
    return looked


def _scan_names(layout: Layout, scan: Scan, looks: "_Looks") -> None:
    """Our links; those that lead nowhere go."""
    root = len(str(layout.directory)) + 1
    for name, path, link in looks.each(_read_links, layout.walk(scan.foreign)):
        ours = "../" * path.count("/", root) + f"{layout.content.name}/"
        if link.startswith(ours):
            _scan_name(layout, scan, name, path, scan.artifacts.get(ArtifactId(link[len(ours) :])))
        elif link.startswith(f"{ADAPTER_LINK}/") and not os.path.lexists(f"{os.path.dirname(path)}/{ADAPTER_LINK}"):  # noqa: PTH120
            os.unlink(path)  # noqa: PTH108  # a crash came while the name was taken out of its folder


def _name_again(layout: Layout, scan: Scan) -> None:
    """A crash between the two renames of a publish has left content without its name."""
    for found in scan.artifacts.values():
        if not found.names and layout.is_free(found.name) and not os.path.lexists(layout.path(found.digest) / RETIRED_FILE):
            with contextlib.suppress(InvalidRequest, StageError):
                called = adapter_name(found.name)
                layout.link(called, found.digest)
                found.names = called


def _part_with_unnamed(layout: Layout, scan: Scan, *, keep: bool) -> None:
    for found in [found for found in scan.artifacts.values() if not found.names]:
        del scan.artifacts[found.digest]  # a version that a newer one replaced
        if keep:
            scan.unnamed[found.digest] = found.disk_bytes
            continue
        scan.removed.append(f".store/{found.digest}")
        layout.staged.discard(layout.content / found.digest)


def _scan_name(layout: Layout, scan: Scan, name: str, path: str, found: Found | None) -> None:
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
    layout.unlink(name)
    if os.path.lexists(path):  # what can be no name of ours
        os.unlink(path)  # noqa: PTH108


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
