"""The last good set of every source, on disk: what a start has while a source cannot be asked.

One file, replaced whole. It is a help, not a record: one that is damaged, or of another version, is told of and ignored, and the next write replaces it.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..core.endpoint import Endpoint
from ..core.fleet import Found
from .entries import row

FILE = "fleet.json"
VERSION = 2
MAX_BYTES = 256 * 2**20  # some sources of MAX_ENTRIES each


class Damaged(Exception):
    """The file is not one of ours. The message says why."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One source's last good set, and when it was so last, in seconds since 1970."""

    pool: str
    source: str
    at: float
    endpoints: tuple[Found, ...]


class _Set(msgspec.Struct):
    pool: str
    source: str
    at: float
    endpoints: list[tuple[str, str, str, str, str, bool]]  # `row` of each


class _File(msgspec.Struct):
    version: int
    sets: list[_Set]


def load(directory: Path) -> tuple[Kept, ...]:
    """What is kept there, if anything is. Blocks. Raises Damaged, OSError."""
    path = directory / FILE
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ()
    if len(content) > MAX_BYTES:
        raise Damaged(f"it has more than {MAX_BYTES} bytes")
    try:
        version = msgspec.json.decode(content, type=dict[str, msgspec.Raw]).get("version")
        if version is None or bytes(version) != str(VERSION).encode():
            raise Damaged(f"it is not of version {VERSION}")
        read = msgspec.json.decode(content, type=_File)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Damaged(str(error)) from None
    now = time.time()  # a clock that was set back makes no set younger than one that is good now
    return tuple(Kept(s.pool, s.source, min(s.at, now), tuple(_found(*values) for values in s.endpoints)) for s in read.sets)


def save(directory: Path, sets: Iterable[Kept]) -> None:
    """Replace what is kept there, whole or not at all. Blocks. Raises OSError."""
    content = msgspec.json.encode(_File(VERSION, [_Set(s.pool, s.source, s.at, [row(found) for found in s.endpoints]) for s in sets]))
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{FILE}.{os.getpid()}"  # of each process its own; what a crash leaves is written over by the next of that number
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(directory / FILE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _found(address: str, node: str, stager: str, instance: str, zone: str, is_leaving: bool) -> Found:
    return Found(Endpoint(address, node, stager, instance, zone), is_leaving)
