"""Endpoints from a file that something else writes: YAML or JSON, a list, or a mapping of pools' names to lists.

The file is looked at by `stat` once a second, not by inotify: that works on every file system (NFS and FUSE report nothing that another machine wrote), and
needs no rule for what a watch loses when a directory, or the link that a ConfigMap's `..data` is, is replaced. `stat` follows links, so a switched link
is another inode. A file is read when it has rested for a moment, since a list that is half written can be valid YAML; one that is still unreadable then
is told of, and the last good set counts on.
"""

import asyncio
import hashlib
import json
import os
import stat
import time
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

import yaml

from ..config.discovery import FileSourceSettings
from ..core.fleet import Found
from ..errors import shortened
from .entries import BadEntry, collect, read_entry
from .looks import Looks
from .source import Failed, Seen

REST_S = 0.1  # without a change to the file, which an ordinary write of a megabyte takes a hundredth of
RESTLESS_LOOKS = 10  # then it is read all the same: something writes all the time, or the file server's clock is ahead
COARSE_NS = 2 * 10**9  # the coarsest time stamp of a file system (FAT): a younger file may change once more under the same stamp
HANG_S = 10.0  # more than any file takes
MAX_FILE_BYTES = 32 * 2**20  # MAX_ENTRIES of 300 bytes
MAX_YAML_BYTES = 2**21  # ten thousand endpoints. At worst, as a list of nothing, it takes 6 s and 360 MB
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it

_Signature = tuple[int, int, int, int, int]


class FileSource:
    """One file, for one pool."""

    is_final = False

    def __init__(self, settings: FileSourceSettings, pool: str) -> None:
        self.name = settings.label
        self._path = Path(settings.path)
        self._poll_s = settings.poll_s
        self._pool = pool
        self._signature: _Signature | None = None  # of what was read last; None: it is to be read again
        self._digest = b""  # of the same
        self._restless = 0  # looks that found it changed just before

    async def sets(self) -> AsyncGenerator[Seen, None]:
        """A set after each change of the file's content."""
        said: Seen | None = None
        hangs = False
        self._forget()
        looks = Looks(self._look, self.name)
        while True:
            try:
                seen = await looks.next(HANG_S)
            except TimeoutError:
                hangs, seen = True, Failed(f"has not been read for {HANG_S:g} s: its file system hangs")
            else:
                was_late, hangs = hangs, False
                if was_late and seen is None:  # it is news that the file says what it said before
                    self._forget()
                    continue
            if seen is not None and not (isinstance(seen, Failed) and seen == said):
                said = seen
                yield seen
            await asyncio.sleep(REST_S if self._restless else self._poll_s)

    def _look(self) -> Seen | None:
        """What the file says, if it may have changed. Blocks."""
        try:
            state = self._path.stat()
            if not stat.S_ISREG(state.st_mode):
                return self._unread("is no regular file")
            if state.st_size > MAX_FILE_BYTES:
                return self._unread(f"has {state.st_size} bytes; {MAX_FILE_BYTES} is the limit")
            if _signature(state) == self._signature:
                return None
            age_ns = time.time_ns() - state.st_mtime_ns
            if age_ns < REST_S * 1e9 and self._restless < RESTLESS_LOOKS:
                self._restless += 1
                return None
            self._restless = 0
            content = self._path.read_bytes()
        except FileNotFoundError:
            return self._unread("is not there")
        except OSError as error:
            return self._unread(f"cannot be read: {error.strerror}")
        self._signature = _signature(state) if age_ns > COARSE_NS else None
        digest = hashlib.sha256(content).digest()
        if digest == self._digest:
            return None
        self._digest = digest
        try:
            return collect(_numbered(self._listed(_parse(content, is_json=self._path.suffix == ".json"))))
        except ValueError as error:
            return Failed(shortened(str(error)))

    def _unread(self, why: str) -> Failed:
        self._forget()
        return Failed(why)

    def _forget(self) -> None:
        """Whatever is there next is read, be it what was there before."""
        self._signature, self._digest, self._restless = None, b"", 0

    def _listed(self, raw: Any) -> list[Any]:
        if isinstance(raw, dict):
            if self._pool not in raw:
                others = ", ".join(ascii(str(name)[:40]) for name in list(raw)[:5])
                raise ValueError(f"has no list for pool {self._pool!r}, only for {others or 'none'}; [] says that a pool has no endpoints")
            raw = raw[self._pool]
        if not isinstance(raw, list):
            raise ValueError("has no list of endpoints, and no mapping of pools to such lists; [] says that there are none")
        return raw


def _signature(state: os.stat_result) -> _Signature:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _parse(content: bytes, *, is_json: bool) -> Any:
    """Raises ValueError, which says the line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if is_json:
            place = f" at line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ": it is nested too deep"
            raise ValueError(f"is not JSON{place}") from None
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"has {len(content)} bytes and is not JSON; as YAML {MAX_YAML_BYTES} is the limit, as JSON {MAX_FILE_BYTES}")
    try:
        return yaml.load(text, _YAML_LOADER)  # noqa: S506  # both are safe loaders
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # a tag of YAML with a value that is none of its kind
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"is neither JSON nor YAML{place}: {getattr(error, 'problem', None) or type(error).__name__}") from None


def _numbered(entries: list[Any]) -> Iterable[tuple[str, Found | BadEntry]]:
    for number, raw in enumerate(entries, start=1):
        entry: Found | BadEntry
        try:
            entry = read_entry(raw)
        except BadEntry as error:
            entry = error
        yield f"entry {number}", entry
