"""One file on its way to the disk, whatever fails in between; and who may fetch when, and how fast."""

import asyncio
import contextlib
import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc.errors import AdapterTooLarge, NoSpace, OriginFailed
from extproc.stager.supply.download import WRITE_BYTES, Download, opened
from extproc.stager.supply.job import Job
from extproc.stager.supply.listing import RemoteFile
from extproc.stager.supply.pace import Pace, Slots
from tests.fakes.adapters import WEIGHTS, sha256
from tests.fakes.threads import LoopThreads
from tests.fakes.wait import PATIENCE_S, VirtualLoop, turns, until


async def stream(*chunks: bytes, fails: Exception | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if fails is not None:
        raise fails


def on_disk(path: Path) -> int:
    """Bytes; a file is made when the first of them comes."""
    return path.stat().st_size if path.exists() else 0


def pieces(data: bytes, size: int = 999_983) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def download_of(target: Path, size: int | None = None, *, limit: int | None = None, job: Job | None = None) -> Download:
    return Download(RemoteFile(WEIGHTS, size, limit=limit), target, job=job, disk=LoopThreads())


# -- one attempt


@pytest.mark.parametrize("size", [0, 1, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1, 2 * WRITE_BYTES + 17])
@pytest.mark.parametrize("known", [True, False])
async def test_a_stream_is_written_hashed_and_counted(tmp_path: Path, size: int, known: bool) -> None:
    """In whatever pieces it comes, on either side of the size that is written at a time, and whether or not its length is known."""
    data = os.urandom(size)
    job = Job()
    download = download_of(tmp_path / "file", size if known else None, job=job)
    await download.write(stream(*pieces(data)))
    got = await download.finish()
    download.close()
    assert (got.path, got.size, got.sha256) == (WEIGHTS, size, sha256(data))
    assert (tmp_path / "file").read_bytes() == data
    assert job.done_bytes == download.received == download.on_disk == size


@pytest.mark.parametrize("kernel_takes", [2**30, WRITE_BYTES + 7, 0], ids=["all", "some", "none"])
@pytest.mark.parametrize("had", [0, WRITE_BYTES // 3])
async def test_an_open_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_takes: int, had: int) -> None:
    """From where it stands: by the kernel as far as that goes, which some file systems do not let it, through memory from there on."""
    data = os.urandom(20 * WRITE_BYTES + 5)
    (tmp_path / "original").write_bytes(data)
    by_kernel = os.copy_file_range

    def limited(source: int, target: int, count: int, at: int, to: int) -> int:
        if at >= kernel_takes:
            raise OSError(errno.EXDEV, "between two file systems")
        return by_kernel(source, target, min(count, kernel_takes - at), at, to)

    monkeypatch.setattr(os, "copy_file_range", limited)
    job = Job()
    download = download_of(tmp_path / "file", len(data), job=job)
    with contextlib.suppress(OriginFailed):
        await download.write(stream(data[:had], fails=OriginFailed("broke")))
    with (tmp_path / "original").open("rb") as original:
        original.seek(had)
        await download.copy(original, original.read(WRITE_BYTES), LoopThreads())
    assert (await download.finish()).sha256 == sha256(data)
    download.close()
    assert (tmp_path / "file").read_bytes() == data
    assert job.done_bytes == len(data)


async def test_a_copy_that_is_cancelled_leaves_no_thread_at_its_file(tmp_path: Path) -> None:
    """The descriptor may be another file's at once after the close."""
    data = os.urandom(40 * WRITE_BYTES)
    (tmp_path / "original").write_bytes(data)
    download = download_of(tmp_path / "file", len(data))
    with (tmp_path / "original").open("rb") as original:
        copying = asyncio.create_task(download.copy(original, original.read(WRITE_BYTES), LoopThreads()))
        await until(lambda: download.received > 0)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
    arrived, hashed = download.received, download._hashed
    download.close()
    await asyncio.sleep(0.05)
    assert (download.received, download._hashed) == (arrived, hashed)
    assert (tmp_path / "file").read_bytes()[:arrived] == data[:arrived]


async def test_a_download_replaces_what_lies_there(tmp_path: Path) -> None:
    """The longer remains of an earlier one do not stay at the end."""
    (tmp_path / "file").write_bytes(b"a" * 10)
    download = download_of(tmp_path / "file", 1)
    await download.write(stream(b"b"))
    download.close()
    download.close()
    assert (tmp_path / "file").read_bytes() == b"b"


async def test_a_short_stream_is_a_failure_of_the_origin(tmp_path: Path) -> None:
    """It may be whole the next time."""
    download = download_of(tmp_path / "file", 4)
    with pytest.raises(OriginFailed, match="3 of 4 bytes") as raised:
        await download.write(stream(b"abc"))
    download.close()
    assert raised.value.retryable


async def test_a_long_stream_is_cut_off(tmp_path: Path) -> None:
    """An origin that sends without end fills no disk."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    download = download_of(tmp_path / "file", 2500)
    with pytest.raises(OriginFailed, match="over 2500 bytes"):
        await download.write(endless())
    download.close()
    assert taken == 3
    assert (tmp_path / "file").stat().st_size <= 2500


@pytest.mark.parametrize("limit", [2500, WRITE_BYTES + 2500])
async def test_a_stream_of_unknown_length_ends_at_its_limit(tmp_path: Path, limit: int) -> None:
    """So much room was reserved, and not a byte more. Repeating is useless."""
    download = download_of(tmp_path / "file", limit=limit)
    with pytest.raises(AdapterTooLarge, match=f"over {limit} bytes"):
        await download.write(stream(*pieces(bytes(limit + 1))))
    download.close()
    assert on_disk(tmp_path / "file") <= limit
    exact = download_of(tmp_path / "exact", limit=limit)
    await exact.write(stream(*pieces(bytes(limit))))
    exact.close()
    assert (tmp_path / "exact").stat().st_size == limit


async def test_a_full_disk_is_the_disk_s_failure(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    (tmp_path / "file").symlink_to("/dev/full")
    download = download_of(tmp_path / "file")
    for size in (1, 3 * WRITE_BYTES):
        with pytest.raises(NoSpace):
            await download.write(stream(*pieces(bytes(size))))
    download.close()
    assert download.received == 0


# -- several attempts


@pytest.mark.parametrize("first", [0, 1, WRITE_BYTES, 2 * WRITE_BYTES + 17])
async def test_what_arrived_before_a_failure_is_kept(tmp_path: Path, first: int) -> None:
    """The next attempt asks for what is behind it; the hash is that of the whole."""
    data = os.urandom(3 * WRITE_BYTES)
    job = Job()
    download = download_of(tmp_path / "file", len(data), job=job)
    with pytest.raises(OriginFailed, match="broke"):
        await download.write(stream(*pieces(data[:first]), fails=OriginFailed("broke")))
    assert download.received == job.done_bytes == on_disk(tmp_path / "file") == first
    await download.write(stream(*pieces(data[download.received :])))
    got = await download.finish()
    download.close()
    assert got.sha256 == sha256(data)
    assert (tmp_path / "file").read_bytes() == data
    assert job.done_bytes == len(data)


async def test_what_arrived_before_a_cancellation_is_kept(tmp_path: Path) -> None:
    """Also what was not handed to a thread yet."""
    download = download_of(tmp_path / "file", 10)
    waits = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"abc"
        waits.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(download.write(half()))
    await waits.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert download.received == 3
    download.close()


async def test_a_restart_forgets_everything(tmp_path: Path) -> None:
    """Bytes, gaps, hash and progress: the origin sends from the start again, and perhaps something shorter."""
    job = Job()
    job.done_bytes = 7  # of another file of the same adapter
    download = download_of(tmp_path / "file", job=job)
    await download.write(stream(b"a" * 100))
    await download.write(stream(b"b" * 50), at=200, end=250)
    assert (download.received, download.on_disk, job.done_bytes) == (100, 150, 157)
    await download.restart()
    assert (download.received, download.on_disk, job.done_bytes) == (0, 0, 7)
    await download.write(stream(b"c" * 10))
    got = await download.finish()
    download.close()
    assert (got.size, got.sha256, job.done_bytes) == (10, sha256(b"c" * 10), 17)
    assert (tmp_path / "file").read_bytes() == b"c" * 10


async def test_a_file_of_somebody_else_becomes_the_target(tmp_path: Path) -> None:
    """What a hub's own client wrote: moved, counted, and hashed from the disk. What was there before does not count any more."""
    data = os.urandom(WRITE_BYTES + 3)
    (tmp_path / "theirs").write_bytes(data)
    job = Job()
    download = download_of(tmp_path / "file", 5, job=job)
    await download.write(stream(b"abc"), end=3)
    await download.take(tmp_path / "theirs")
    got = await download.finish()
    download.close()
    assert (got.size, got.sha256, job.done_bytes) == (len(data), sha256(data), len(data))
    assert (tmp_path / "file").read_bytes() == data
    assert not (tmp_path / "theirs").exists()


# -- parts


async def test_parts_may_arrive_out_of_order(tmp_path: Path) -> None:
    """The gap-free front moves when its gap is filled; what is missing is told in parts."""
    data = os.urandom(100)
    download = download_of(tmp_path / "file", 100)
    assert download.missing(40) == [(0, 40), (40, 80), (80, 100)]
    await download.write(stream(data[80:]), at=80, end=100)
    assert (download.received, download.on_disk) == (0, 20)
    await download.write(stream(data[:30]), at=0, end=30)
    assert (download.received, download.on_disk) == (30, 50)
    assert download.missing(40) == [(30, 70), (70, 80)]
    await download.write(stream(data[30:80]), at=30, end=80)
    assert (download.received, download.missing(40)) == (100, [])
    got = await download.finish()
    download.close()
    assert got.sha256 == sha256(data)
    assert (tmp_path / "file").read_bytes() == data


async def test_a_part_that_is_too_long_does_not_reach_into_the_next(tmp_path: Path) -> None:
    """A server that ignores the end of a range."""
    download = download_of(tmp_path / "file", 100)
    await download.write(stream(b"b" * 50), at=50, end=100)
    with pytest.raises(OriginFailed, match="over 50 bytes"):
        await download.write(stream(b"a" * 40, b"a" * 40), at=0, end=50)
    download.close()
    assert (tmp_path / "file").read_bytes()[50:] == b"b" * 50


async def test_a_part_that_is_too_short_leaves_its_rest_missing(tmp_path: Path) -> None:
    """What came of it is kept."""
    download = download_of(tmp_path / "file", 100)
    with pytest.raises(OriginFailed, match="10 of 50 bytes"):
        await download.write(stream(b"b" * 10), at=50, end=100)
    assert download.missing(100) == [(0, 50), (60, 100)]
    download.close()


async def test_large_parts_are_written_side_by_side(tmp_path: Path) -> None:
    """Four writers, each with several writes, none in step with another."""
    data = os.urandom(8 * WRITE_BYTES + 100)
    download = download_of(tmp_path / "file", len(data))
    await asyncio.gather(*(download.write(stream(*pieces(data[begin:end])), begin, end) for begin, end in reversed(download.missing(2 * WRITE_BYTES))))
    got = await download.finish()
    download.close()
    assert got.sha256 == sha256(data)
    assert (tmp_path / "file").read_bytes() == data


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 300), part=st.integers(1, 100), piece=st.integers(1, 50), breaks=st.sets(st.integers(0, 20)), seed=st.integers(0, 2**32))
def test_any_order_of_parts_and_failures_ends_with_the_whole(tmp_path: Path, size: int, part: int, piece: int, breaks: set[int], seed: int) -> None:
    """What is missing after an attempt is all that is asked for in the next; nothing is asked for twice that is on disk."""
    chance = random.Random(seed)
    data = chance.randbytes(size)

    async def arriving(chunks: list[bytes], number: int) -> AsyncIterator[bytes]:
        for count, chunk in enumerate(chunks):
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if number in breaks and count == len(chunks) // 2:
                breaks.discard(number)
                raise OriginFailed("broke")
            yield chunk

    async def main() -> None:
        job = Job()
        download = download_of(tmp_path / "file", size, job=job)
        for _ in range(30):
            parts = download.missing(part)
            chance.shuffle(parts)
            assert sum(end - begin for begin, end in parts) == size - download.on_disk
            writes = (download.write(arriving(pieces(data[b:e], piece), n), b, e) for n, (b, e) in enumerate(parts))
            if not any(await asyncio.gather(*writes, return_exceptions=True)):
                break
        got = await download.finish()
        download.close()
        assert (got.size, got.sha256, job.done_bytes) == (size, sha256(data), size)
        assert (tmp_path / "file").read_bytes() == data

    asyncio.run(main())


# -- cancelled in mid-write


class HeldThreads(ThreadPoolExecutor):
    """Threads that begin their work when they are let go."""

    def __init__(self) -> None:
        super().__init__(4)
        self.go_on = threading.Event()
        self.asked = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def later() -> Any:
            self.go_on.wait()
            return work(*args, **kwargs)

        self.asked += 1
        return super().submit(later)


@pytest.fixture
async def threads() -> AsyncIterator[HeldThreads]:
    threads = HeldThreads()
    asyncio.get_running_loop().set_default_executor(threads)
    yield threads
    threads.go_on.set()


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("tail", [b"", b"tail"])
async def test_a_cancelled_write_ends_before_its_file_may_be_closed(tmp_path: Path, threads: HeldThreads, times: int, tail: bytes) -> None:
    """The order of events this guards against: a thread is about to write; the flight is cancelled, perhaps more than once (a deadline, then the
    end of the process), and closes the descriptor; another flight opens a file and gets the same number; the thread writes into that.
    """
    download = download_of(tmp_path / "file")
    waits = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(WRITE_BYTES)
        if tail:
            yield tail
        waits.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(download.write(chunks()))
    await waits.wait()
    await until(lambda: threads.asked)
    for _ in range(times):
        writing.cancel()
        await turns()
    assert not writing.done()
    assert download.received == 0
    threads.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert (tmp_path / "file").stat().st_size == download.received
    assert download.received in ((WRITE_BYTES + len(tail),) if times == 1 else (WRITE_BYTES, WRITE_BYTES + len(tail)))
    download.close()


async def test_a_failure_of_the_origin_waits_for_the_write_as_well(tmp_path: Path, threads: HeldThreads) -> None:
    """And an attempt that follows goes on behind it."""
    download = download_of(tmp_path / "file")
    writing = asyncio.create_task(download.write(stream(bytes(WRITE_BYTES), fails=OriginFailed("broke"))))
    await until(lambda: threads.asked)
    await turns()
    assert not writing.done()
    threads.go_on.set()
    with pytest.raises(OriginFailed):
        await writing
    assert download.received == WRITE_BYTES
    download.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_file_that_is_opened_for_nobody_any_more_is_closed(tmp_path: Path, fails: bool) -> None:
    """The order of events: a thread is about to open; who waits for it is cancelled; the file is opened, and nobody has it."""
    go_on, kept = threading.Event(), []

    def open_() -> BinaryIO:
        go_on.wait()
        if fails:
            raise OriginFailed("gone")
        kept.append((tmp_path / "file").open("wb"))
        return kept[0]

    async def use() -> None:
        async with opened(open_, LoopThreads()):
            raise AssertionError

    task = asyncio.create_task(use())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    await turns()
    assert [file.closed for file in kept] == ([] if fails else [True])


async def test_a_file_is_closed_by_who_used_it(tmp_path: Path) -> None:
    """At once, however that ends."""
    (tmp_path / "file").write_bytes(b"x")
    kept: list[BinaryIO] = []

    async def use() -> None:
        async with opened(lambda: (tmp_path / "file").open("rb"), LoopThreads()) as file:
            kept.append(file)
            assert file.read() == b"x"
            raise OriginFailed("broke")

    with pytest.raises(OriginFailed):
        await use()
    assert kept[0].closed


# -- whose turn it is


class Queue:
    """Tasks that take a place and keep it until they are told to go."""

    def __init__(self, count: int) -> None:
        self.slots = Slots(count)
        self.order: list[str] = []
        self.inside: set[str] = set()
        self._go: dict[str, asyncio.Event] = {}

    async def come(self, name: str, job: Job | None = None) -> asyncio.Task[None]:
        self._go[name] = asyncio.Event()
        task = asyncio.create_task(self._stay(name, job or Job()))
        await turns()
        return task

    def go(self, name: str) -> None:
        self._go[name].set()

    async def leave(self, name: str) -> None:
        self.go(name)
        await turns()

    async def _stay(self, name: str, job: Job) -> None:
        async with self.slots.take(job):
            self.order.append(name)
            self.inside.add(name)
            try:
                await self._go[name].wait()
            finally:
                self.inside.discard(name)


async def finished(*tasks: asyncio.Task[None]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_there_are_so_many_places_and_no_more() -> None:
    """Who comes when all are taken waits for the first that is free."""
    queue = Queue(2)
    tasks = [await queue.come(name) for name in "abcd"]
    assert queue.inside == {"a", "b"}
    await queue.leave("b")
    assert queue.inside == {"a", "c"}
    for name in "acd":
        await queue.leave(name)
    await finished(*tasks)
    assert queue.order == list("abcd")


async def test_requests_go_before_refreshes_before_prefetches() -> None:
    """Among equals who came first."""
    queue = Queue(1)
    tasks = [await queue.come("first")]
    for name, priority in (("p1", Job.PREFETCH), ("f1", Job.REFRESH), ("r1", Job.REQUEST), ("p2", Job.PREFETCH), ("r2", Job.REQUEST)):
        tasks.append(await queue.come(name, Job(priority)))
    for name in ("first", "r1", "r2", "f1", "p1", "p2"):
        await queue.leave(name)
    await finished(*tasks)
    assert queue.order == ["first", "r1", "r2", "f1", "p1", "p2"]


async def test_a_flight_can_be_hurried_while_it_waits() -> None:
    """A request joins a prefetch: from then on it counts as a request that came when the prefetch did. A less urgent one slows nothing down."""
    queue = Queue(1)
    early, late = Job(Job.PREFETCH), Job(Job.REQUEST)
    tasks = [await queue.come("first"), await queue.come("early", early), await queue.come("late", late)]
    early.hurry(Job.REQUEST)
    late.hurry(Job.PREFETCH)
    for name in ("first", "early", "late"):
        await queue.leave(name)
    await finished(*tasks)
    assert queue.order == ["first", "early", "late"]


async def test_a_waiter_that_is_cancelled_is_passed_over() -> None:
    """Its place in the queue is gone, and nobody else's."""
    queue = Queue(1)
    a, b, c = [await queue.come(name) for name in "abc"]
    b.cancel()
    await turns()
    await queue.leave("a")
    assert queue.inside == {"c"}
    await queue.leave("c")
    await finished(a, b, c)
    assert b.cancelled()


async def test_a_place_is_not_lost_when_its_new_holder_is_cancelled_at_that_moment() -> None:
    """Order of events: somebody leaves and the place is handed to b; before b runs, b is cancelled; the place must go on to c, and then be free."""
    queue = Queue(1)
    async with queue.slots.take(Job()):
        b, c = [await queue.come(name) for name in "bc"]
    b.cancel()
    await turns()
    assert queue.order == ["c"]
    await queue.leave("c")
    await finished(b, c)
    again = await queue.come("d")
    assert queue.inside == {"d"}
    await queue.leave("d")
    await finished(again)


async def test_a_free_place_is_taken_though_another_was_handed_over_just_now() -> None:
    """Order of events: two leave in the same turn, c was waiting and is handed one place; before c runs, d comes. There is a place for d."""
    queue = Queue(2)
    async with queue.slots.take(Job()), queue.slots.take(Job()):
        c = await queue.come("c")
    async with asyncio.timeout(PATIENCE_S), queue.slots.take(Job()):
        await turns()
        assert queue.inside == {"c"}
    await queue.leave("c")
    await finished(c)


async def test_a_failure_inside_gives_the_place_back() -> None:
    """Whatever ends the transfer."""
    slots = Slots(1)
    with pytest.raises(LookupError):
        async with slots.take(Job()):
            raise LookupError
    async with slots.take(Job()):
        pass


# -- how fast


def in_virtual_time(main: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


@pytest.mark.parametrize("count", [1, 100, 1000, 5000])
def test_a_pace_is_kept(count: int) -> None:
    """10 000 bytes at 1000 per second take ten seconds, in whatever pieces."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        pace, began = Pace(1000, loop.time), loop.time()
        for _ in range(10_000 // count):
            await pace.spend(count)
        assert loop.time() - began == pytest.approx(10)

    in_virtual_time(main)


def test_all_who_spend_share_one_pace() -> None:
    """Ten transfers side by side are as fast as one."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        pace, began = Pace(1000, loop.time), loop.time()

        async def transfer() -> None:
            for _ in range(10):
                await pace.spend(100)

        await asyncio.gather(*(transfer() for _ in range(10)))
        assert loop.time() - began == pytest.approx(10)

    in_virtual_time(main)


def test_one_second_is_saved_up_at_most() -> None:
    """After an hour of silence 1000 bytes are free, the next cost their time again."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        pace = Pace(1000, loop.time)
        await asyncio.sleep(3600)
        began = loop.time()
        await pace.spend(1000)
        assert loop.time() == began
        await pace.spend(500)
        assert loop.time() - began == pytest.approx(0.5)

    in_virtual_time(main)


def test_a_pace_of_zero_is_none() -> None:
    """Nothing is waited for."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        pace, began = Pace(0, loop.time), loop.time()
        await pace.spend(10**12)
        assert loop.time() == began

    in_virtual_time(main)


def test_a_download_keeps_the_pace(tmp_path: Path) -> None:
    """Four writes of two megabytes at one megabyte per second; the last bytes, which fill no write, are not waited for."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        began = loop.time()
        size = 4 * WRITE_BYTES + 10
        download = Download(RemoteFile(WEIGHTS, size), tmp_path / "file", pace=Pace(WRITE_BYTES // 2, loop.time), disk=LoopThreads())
        await download.write(stream(*(bytes(WRITE_BYTES) for _ in range(4)), bytes(10)))
        download.close()
        assert loop.time() - began == pytest.approx(8)

    in_virtual_time(main)
