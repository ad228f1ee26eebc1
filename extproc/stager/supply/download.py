"""One file on its way from an origin to the disk: written, hashed and counted once, whatever fails in between.

A `Download` outlives an attempt. What is on disk and hashed stays, and the next attempt goes on behind it, so that a connection that breaks
every minute costs a minute and not the file. A piece is written and hashed by two threads at once, while the next arrives. Parts that arrive out of
order (parallel ranges), or that the kernel has copied, are hashed behind the gap-free front, read back from the page cache.

Nothing here touches the disk in the event loop: while it writes back, an open or a truncation can take a tenth of a second.
"""

import asyncio
import ctypes
import errno
import hashlib
import heapq
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, ParamSpec, TypeVar

from ...core.artifact import File
from ...errors import AdapterDamaged, AdapterTooLarge, OriginFailed, OriginSlow
from ...flight import to_the_end
from ..syscalls import disk_errors
from ..threads import Threads
from .follower import Follower
from .job import Job
from .listing import RemoteFile
from .pace import Pace

RANGE_BYTES = 16 * 2**20  # of one request among parallel ones; AWS advises 8 to 16 MB
MAX_PIECES = 1000  # below IOV_MAX, which is 1024
WRITE_BYTES = 2 * 2**20  # handed to a thread at once: a millisecond of hashing, so that the hand-over costs little beside it
LEAST_WRITE_BYTES = 2**18  # where many streams share PENDING_BYTES
PENDING_BYTES = 12 * 2**20  # of all streams, before it is handed over; as much again is being written
APART_BYTES = 2**18  # from here on two threads are worth it
COPY_BYTES = 8 * 2**20  # by the kernel at once
READ_BACK_BYTES = 2**20  # half of what a core's cache holds; a thread that hashes less at once queues for the interpreter more often than it hashes
RATE_WINDOW_S = 30.0  # over which the least rate of a transfer is measured: a server that pauses for some seconds is not slow

Buffer = bytes | memoryview
Judge = Callable[[bytes], Awaitable[int]]  # looks at a beginning: 0 if that is well, else how many bytes it must see
P = ParamSpec("P")
T = TypeVar("T")

_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2): "Start write-out of all dirty pages in the specified range"
_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Download:
    """The target file of one transfer. An origin's `fetch` fills it; called again after a failure, it goes on at `received`.

    Several tasks may `write(at=...)` parts that do not overlap; nothing else is for several at once.
    """

    streams: ClassVar[int] = 0  # that are being written, of all downloads

    def __init__(
        self,
        file: RemoteFile,
        target: Path,
        *,
        disk: Threads,
        pace: Pace | None = None,
        job: Job | None = None,
        least_bytes_per_s: int = 0,
    ) -> None:
        """`disk`: the threads in which the file is written."""
        self.file = file
        self.target = target
        self.received = 0  # bytes from the start on without a gap: all of them are on disk
        self._pace = pace
        self._job = job or Job()
        self._disk = disk
        self._least_bytes_per_s = least_bytes_per_s
        self._follower: Follower | None = None
        self._judge: Judge | None = None
        self._judged = asyncio.Event()
        self._needed = 0  # bytes from the start on that the judge wants to see
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._hashing = asyncio.Lock()
        self._ahead: list[tuple[int, int]] = []  # parts on disk behind a gap, as (begin, end), a heap
        self._descriptor = -1  # until a thread needs it
        self._opening = threading.Lock()

    @property
    def on_disk(self) -> int:
        """Bytes that have arrived, gaps or not."""
        return self.received + sum(end - begin for begin, end in self._ahead)

    def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return self._disk.run(work, *args, **kwargs)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def missing(self, part_bytes: int) -> list[tuple[int, int]]:
        """What is not on disk yet, as (begin, end) of at most `part_bytes` each. Only where the size is known."""
        assert self.file.size is not None
        gaps, at = [], self.received
        for begin, end in sorted(self._ahead):
            gaps.append((at, begin))
            at = end
        gaps.append((at, self.file.size))
        return [(begin, min(begin + part_bytes, end)) for start, end in gaps for begin in range(start, end, part_bytes)]

    async def restart(self) -> None:
        """The origin cannot go on where it broke off: forget what there is."""
        if self._follower is not None:
            await self._follower.restart()
        self._job.done_bytes -= self.on_disk
        self.received, self._ahead = 0, []
        self._forget_hash()
        if self._descriptor >= 0:
            await self._in_thread(self._truncate)

    def follow(self, follower: Follower) -> None:
        """Tell `follower` how far the file is on disk without a gap."""
        self._follower = follower

    def hold_for(self, judge: Judge, first: int) -> None:
        """Show `judge` the beginning of the file, at first so many bytes of it, before anything behind it is taken: what it raises ends the transfer.

        The origin's answer is held back meanwhile. A request of its own for the beginning would cost a round trip, and the sums that S3 keeps of the
        whole: its client compares them with one answer that has all.
        """
        self._judge, self._needed = judge, first

    @property
    def is_judged(self) -> bool:
        return self._judge is None

    async def show(self, head: bytes) -> int:
        """Show the beginning to the judge, if it has not passed yet; how many bytes are needed, 0 if it has."""
        if self._judge is not None and len(head) >= self._needed:
            self._needed = await self._judge(head)
            if not self._needed:
                self._judge = None
                self._judged.set()
        return self._needed

    async def _show_beginning(self, begin: int, pending: list[Buffer]) -> None:
        """`pending` goes on where `begin` bytes on disk end."""

        def read() -> bytes:
            with disk_errors("read"):
                return os.pread(self._open(), begin, 0)

        pending[:] = [b"".join(pending)]
        await self.show(b"".join((await self._in_thread(read) if begin else b"", pending[0])))

    async def write(self, chunks: AsyncIterator[Buffer], at: int | None = None, end: int | None = None) -> None:
        """Write `chunks` from `at` (default: `received`) up to `end` (default: the file's). More bytes than that are OriginFailed; so are fewer.

        What arrived before a failure is kept.
        """
        begin = at = self.received if at is None else at
        end = self.file.size if end is None else end
        rate, clock = _Rate(self.file.path, self._least_bytes_per_s), asyncio.get_running_loop().time
        pending: list[Buffer] = []
        count = 0  # bytes in them
        writing: asyncio.Task[None] | None = None
        Download.streams += 1
        try:
            waiting_since = clock()
            async for chunk in chunks:
                rate.count(len(chunk), clock() - waiting_since)
                if end is not None and at + count + len(chunk) > end:
                    raise OriginFailed(f"{self.file.path}: the origin sent over {end - begin} bytes, more than it had said")
                if self.file.limit is not None and at + count + len(chunk) > self.file.limit:
                    raise AdapterTooLarge(f"{self.file.path} has over {self.file.limit} bytes, and its origin did not say so")
                pending.append(chunk)
                count += len(chunk)
                if not self.is_judged:
                    if begin > self.received:  # of parts that come at once, this is not the first
                        await self._judged.wait()
                    elif begin + count < self._needed:
                        waiting_since = clock()
                        continue
                    else:
                        await self._show_beginning(begin, pending)
                if count >= min(WRITE_BYTES, max(LEAST_WRITE_BYTES, PENDING_BYTES // Download.streams)) or len(pending) >= MAX_PIECES:
                    if writing is not None:
                        await asyncio.wait({writing})
                        writing.result()
                    writing = asyncio.create_task(self._put(pending, at))
                    at, written, pending, count = at + count, count, [], 0
                    if self._pace is not None:
                        await self._pace.spend(written)
                waiting_since = clock()
        finally:  # also for a caller that was cancelled: the descriptor must stay open under the last write
            Download.streams -= 1
            if writing is not None:
                await _end_of(writing)
                writing.result()
            if pending:
                if len(pending) > MAX_PIECES:  # it broke off before there was enough to judge
                    pending = [b"".join(pending)]
                last = asyncio.create_task(self._put(pending, at))
                at += count
                await _end_of(last)
                last.result()
        if end is not None and at != end:
            raise OriginFailed(f"{self.file.path}: the origin sent {at - begin} of {end - begin} bytes")

    async def copy(self, source: Any, first: bytes, threads: Threads) -> None:
        """The same from an open binary file; `first` are the WRITE_BYTES that were read of it already, or fewer, if there are no more.

        It is read in `threads`: a file server that hangs holds those, and none of the node's disk.
        """

        async def chunks(chunk: bytes) -> AsyncIterator[bytes]:
            yield chunk
            while len(chunk) == WRITE_BYTES:
                chunk = await threads.run(source.read, WRITE_BYTES)
                yield chunk

        if not self.received:
            await self.show(first)
        if len(first) == WRITE_BYTES and self.file.size is not None and self.is_judged and await self._copy_in_kernel(source.fileno(), self.file.size, threads):
            await threads.run(source.seek, self.received)
            first = await threads.run(source.read, WRITE_BYTES)
        await self.write(chunks(first))

    async def _copy_in_kernel(self, source: int, size: int, threads: Threads) -> int:
        """As much of the rest as copy_file_range(2) takes, in bytes, with hashing behind it. Where it fails, reading and writing tell whose fault that is."""
        began = self.received
        at_once = COPY_BYTES if self._pace is None else self._pace.portion(COPY_BYTES)
        hashing: asyncio.Task[None] | None = None
        try:
            while self.received < size:
                count = await to_the_end(threads.run(self._copy_range, source, self.received, min(at_once, size - self.received)))
                if not count:
                    break
                self._job.done_bytes += count
                self._arrived(self.received, self.received + count)
                if hashing is not None and hashing.done():
                    hashing.result()  # a disk that cannot be read back is no place for the rest
                    hashing = None
                hashing = hashing or asyncio.create_task(self._hash_up())
                if self._pace is not None:
                    await self._pace.spend(count)
        finally:
            if hashing is not None:
                await _end_of(hashing)
                hashing.result()
        return self.received - began

    def _copy_range(self, source: int, at: int, count: int) -> int:
        descriptor = self._open()
        try:
            copied = os.copy_file_range(source, descriptor, count, at, at)
        except OSError:
            return 0
        _start_writing_back(descriptor, at, copied)
        return copied

    async def take(self, path: Path) -> None:
        """Let a file that somebody else wrote on this file system be the target."""
        await self.restart()

        def replace() -> int:
            with disk_errors():
                os.replace(path, self.target)  # noqa: PTH105  # one system call on one file system
                self.close()
                self._descriptor = os.open(self.target, os.O_RDWR)
                return os.fstat(self._descriptor).st_size

        size = await self._in_thread(replace)
        self._job.done_bytes += size
        self._arrived(0, size)

    async def finish(self) -> File:
        """All is there: its size and SHA-256. Raises AdapterDamaged where it has not the MD5 that its origin states, and nothing stronger is stated."""
        if self._descriptor < 0:
            await self._in_thread(self._open)  # of no bytes
        await self._hash_up()
        if self.file.md5 and not self.file.sha256 and (found := await self._in_thread(self._md5)) != self.file.md5:
            raise AdapterDamaged(f"{self.file.path} has MD5 {found}; its origin states {self.file.md5}", "digest")
        return File(self.file.path, self.received, self._digest.hexdigest())

    def _open(self) -> int:
        """The target's descriptor. Called in threads."""
        with self._opening, disk_errors():
            if self._descriptor < 0:
                self._descriptor = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            return self._descriptor

    def _md5(self) -> str:
        digest, at = hashlib.md5(usedforsecurity=False), 0
        with disk_errors("read"):
            while piece := os.pread(self._descriptor, READ_BACK_BYTES, at):
                digest.update(piece)
                at += len(piece)
        return digest.hexdigest()

    def _truncate(self) -> None:
        with disk_errors():
            os.ftruncate(self._descriptor, 0)

    async def _put(self, pieces: list[Buffer], at: int) -> None:
        """Write, and hash where nothing is missing before it."""
        size = sum(map(len, pieces))
        if at == self._hashed and not self._hashing.locked():
            async with self._hashing:
                await self._write_and_hash(pieces, at, size)
                self._hashed += size
        else:
            await self._in_thread(self._write, pieces, at, size)
        self._job.done_bytes += size
        self._arrived(at, at + size)
        if self._hashed < self.received and not self._hashing.locked():
            await self._hash_up()

    async def _write_and_hash(self, pieces: list[Buffer], at: int, size: int) -> None:
        def hash_all() -> None:
            for piece in pieces:
                self._digest.update(piece)

        def both() -> None:
            self._write(pieces, at, size)
            hash_all()

        if size < APART_BYTES:
            await self._in_thread(both)
            return
        hashing = asyncio.create_task(self._in_thread(hash_all))
        try:
            await self._in_thread(self._write, pieces, at, size)
        except BaseException:
            await _end_of(hashing)
            self._forget_hash()  # it counts what is not on disk
            raise
        await hashing

    def _write(self, pieces: list[Buffer], at: int, size: int) -> None:
        descriptor = self._open()
        with disk_errors():
            _write_all(descriptor, pieces, at)
        if size >= APART_BYTES:  # of less the fsync is no slower for it
            _start_writing_back(descriptor, at, size)

    def _forget_hash(self) -> None:
        self._hashed, self._digest = 0, hashlib.sha256()

    def _arrived(self, begin: int, end: int) -> None:
        heapq.heappush(self._ahead, (begin, end))
        while self._ahead and self._ahead[0][0] == self.received:
            self.received = heapq.heappop(self._ahead)[1]
        if self._follower is not None:
            self._follower.arrived(self.received)

    async def _hash_up(self) -> None:
        """Hash what is on disk without a gap; it is read back from the page cache."""

        def work(begin: int, end: int) -> None:
            buffer = memoryview(bytearray(min(READ_BACK_BYTES, end - begin)))
            with disk_errors("read"):
                while begin < end:
                    count = os.preadv(self._descriptor, [buffer[: end - begin]], begin)
                    if not count:
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                    self._digest.update(buffer[:count])
                    begin += count

        async with self._hashing:
            while self._hashed < self.received:
                end = self.received
                await self._in_thread(work, self._hashed, end)
                self._hashed = end


async def in_parallel(download: Download, count: int, fetch_part: Callable[[int, int], Awaitable[None]]) -> None:
    """Bring what `download` lacks by `count` calls of `fetch_part(begin, end)` at a time. The first failure ends them; what they wrote stays."""
    parts = iter(download.missing(RANGE_BYTES))

    async def worker() -> None:
        for begin, end in parts:
            await fetch_part(begin, end)

    workers: list[asyncio.Task[None]] = []
    try:
        for _ in range(count):
            workers.append(asyncio.create_task(worker()))
            await asyncio.sleep(0)  # a client works for milliseconds before it first waits: the event loop comes round between two of them
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@asynccontextmanager
async def opened(open_: Callable[[], BinaryIO], threads: Threads) -> AsyncIterator[BinaryIO]:
    """What `open_` opens in a thread; closed at the end, also where the caller was cancelled while the thread was at it."""
    opening = asyncio.ensure_future(threads.run(open_))
    try:
        yield await asyncio.shield(opening)
    finally:
        if opening.done():
            _close(opening)
        else:
            opening.add_done_callback(_close)


def _close(opening: asyncio.Future[BinaryIO]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Rate:
    """How fast one stream brings its bytes. Only the time that is spent waiting for the origin counts: not the disk's, and not that of our own limit."""

    def __init__(self, path: str, least_bytes_per_s: int) -> None:
        self._path = path
        self._least = least_bytes_per_s
        self._waited_s = 0.0
        self._bytes = 0

    def count(self, count: int, waited_s: float) -> None:
        """Raises OriginSlow."""
        self._waited_s += waited_s
        self._bytes += count
        if self._waited_s >= RATE_WINDOW_S:
            if self._bytes < self._least * self._waited_s:
                sent = self._bytes / self._waited_s
                raise OriginSlow(f"{self._path}: the origin sent {sent:.0f} bytes a second; min_bytes_per_s is {self._least}")
            self._waited_s, self._bytes = 0.0, 0


def _write_all(descriptor: int, pieces: list[Buffer], at: int) -> None:
    written = os.pwritev(descriptor, pieces, at)
    if written < sum(map(len, pieces)):  # as on a disk that is nearly full
        view = memoryview(b"".join(pieces))[written:]
        while view:
            at, written = at + written, os.pwrite(descriptor, view, at + written)
            view = view[written:]


def _start_writing_back(descriptor: int, at: int, size: int) -> None:
    """Let the disk begin now, so that the fsync before the publication finds little left. Only a hint: what it says is of no interest."""
    _sync_file_range(descriptor, at, size, _SYNC_FILE_RANGE_WRITE)


async def _end_of(task: asyncio.Task[Any]) -> None:
    """Wait until `task` is over, also when the waiter is cancelled meanwhile, however often; then the cancellation goes on."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
