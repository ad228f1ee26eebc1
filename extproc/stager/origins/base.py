"""What every origin is: resolve a name to a listing, fetch one file of it. Also the one loop that writes a stream to disk and hashes it."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...core.artifact import AdapterName
from ...errors import AdapterTooLarge, OriginFailed
from ..store import disk_errors
from ..verify import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE

WRITE_BYTES = 4 * 2**20  # written and hashed per turn in a thread: 10 ms of hashing, so that a turn of the event loop costs little beside it


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the origin describes it. `size` in bytes and `sha256` in hex where the origin states them."""

    path: str
    size: int | None = None
    sha256: str | None = None
    version: str = ""  # what tells this content from a later one of the same size
    limit: int | None = None  # the most bytes it may have, where the origin does not state its size


@dataclass(frozen=True, slots=True)
class Listing:
    """What an origin has under a name, pinned to one revision of it."""

    name: AdapterName
    revision: str
    files: tuple[RemoteFile, ...]


class Origin(Protocol):
    """Raises OriginFailed (worth repeating) or OriginRefused (not), nothing else; running out of disk is the disk's error."""

    label: str  # the origin's kind, for logs and metrics

    async def resolve(self, name: AdapterName) -> Listing | None:
        """What the origin has under `name`; None if it has not got it."""

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path) -> str | None:
        """Write one file of the listing to `target`; its SHA-256 in hex if it was hashed on the way."""

    async def close(self) -> None:
        """Give connections back."""


def wanted(paths: Iterable[str]) -> list[str]:
    """Of all the files an origin lists, those an engine reads: the configuration and one file of weights, safetensors before pickle."""
    have = set(paths)
    weights = WEIGHTS_FILE if WEIGHTS_FILE in have else PICKLE_FILE
    return [path for path in (CONFIG_FILE, weights) if path in have]


async def write_stream(chunks: AsyncIterator[bytes], target: Path, expected_size: int | None, limit: int | None = None) -> str:
    """Write `chunks` to `target`, hashing in the same thread turn; the SHA-256 in hex. A length other than the expected one is OriginFailed."""
    digest = hashlib.sha256()
    written = 0
    pending = bytearray()

    def flush(data: bytes) -> None:
        with disk_errors():
            _write_all(descriptor, data)
        digest.update(data)

    with disk_errors():
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        async for chunk in chunks:
            pending += chunk
            written += len(chunk)
            if expected_size is not None and written > expected_size:
                raise OriginFailed(f"{target.name}: the origin sent over {expected_size} bytes, more than it had said")
            if limit is not None and written > limit:
                raise AdapterTooLarge(f"{target.name} has over {limit} bytes, and its origin did not say so")
            if len(pending) >= WRITE_BYTES:
                full, pending = bytes(pending), bytearray()
                await _to_the_end(flush, full)
        if pending:
            await _to_the_end(flush, bytes(pending))
    finally:
        os.close(descriptor)
    if expected_size is not None and written != expected_size:
        raise OriginFailed(f"{target.name}: the origin sent {written} of {expected_size} bytes")
    return digest.hexdigest()


async def _to_the_end(write: Callable[[bytes], None], data: bytes) -> None:
    """In a thread, which is waited for when the caller is cancelled, too: the descriptor must stay open under it."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, data))
    try:
        await asyncio.shield(writing)
    finally:
        if not writing.done():
            await asyncio.wait({writing})


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
