"""An origin that is asked again when that is worth it, and left alone when it is down."""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import stamina
import stamina.instrumentation

from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.core.breaker import Breaker
from extproc.errors import LoraExtprocError, NoSpace, OriginChanged, OriginDown, OriginFailed, OriginRefused, OriginSlow
from extproc.stager.supply.download import Download
from extproc.stager.supply.job import Job
from extproc.stager.supply.listing import Listing, RemoteFile
from extproc.stager.supply.origins import build_origin
from extproc.stager.supply.origins.base import Probed
from extproc.stager.supply.pace import Slots
from extproc.stager.supply.source import ATTEMPTS, LONGEST_WAIT_S, Source, log_repetitions
from tests.fakes.adapters import WEIGHTS, sha256, small_files
from tests.fakes.faulty import FaultyServer, running
from tests.fakes.nodes import hub_origin, s3_origin, web_origin
from tests.fakes.origin import FakeOrigin
from tests.fakes.threads import LoopThreads
from tests.fakes.wait import Clock, VirtualLoop, turns

NAME = adapter_name("acme/sql")
DATA = bytes(range(256))


class FragileOrigin(FakeOrigin):
    """Breaks off after `step` bytes, each time; without `goes_on` each attempt begins at the start."""

    def __init__(self, step: int, *, goes_on: bool = True) -> None:
        super().__init__()
        self.step = step
        self.goes_on = goes_on
        self.attempts = 0
        self.data = DATA

    async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
        self.attempts += 1
        if not self.goes_on:
            await download.restart()
        begin = download.received

        async def chunks() -> AsyncIterator[bytes]:
            for at in range(begin, min(begin + self.step, len(self.data)), 2**20):
                yield self.data[at : min(at + 2**20, begin + self.step)]

        await download.write(chunks())


def file_of(origin: FakeOrigin) -> tuple[Listing, RemoteFile]:
    origin.add(NAME, {WEIGHTS: DATA})
    file = RemoteFile(WEIGHTS, len(DATA))
    return Listing(NAME, "1", (file,)), file


async def test_a_transfer_goes_on_as_long_as_it_gets_further(tmp_path: Path, clock: Clock) -> None:
    """However often the line breaks: each attempt brings something. Nor does that count as an origin that is down, for nobody else may ask it then."""
    origin = FragileOrigin(step=8)
    source = Source(origin, clock=clock)
    got = await source.fetch(*file_of(origin), tmp_path / "file", Job(), LoopThreads())
    assert (got.size, got.sha256) == (len(DATA), sha256(DATA))
    assert origin.attempts == len(DATA) / 8
    assert (source.breaker.state, source.breaker.failures, source.breaker._failed) == ("closed", 0, {})


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_transfer_that_gets_no_further_is_given_up(tmp_path: Path, clock: Clock, goes_on: bool) -> None:
    """Nothing at all, or the same half each time."""
    origin = FragileOrigin(step=0 if goes_on else 128, goes_on=goes_on)
    with pytest.raises(OriginFailed, match=f"of {len(DATA)} bytes"):
        await Source(origin, clock=clock).fetch(*file_of(origin), tmp_path / "file", Job(), LoopThreads())
    assert origin.attempts <= 2 * ATTEMPTS


@pytest.mark.parametrize("error", [OriginRefused("no"), OriginChanged("gone"), NoSpace("full")])
async def test_what_a_repetition_cannot_mend_is_not_repeated(tmp_path: Path, clock: Clock, error: LoraExtprocError) -> None:
    """The same credentials are refused again; what changed is resolved anew; the disk is as full. The origin is up in any case."""
    origin = FakeOrigin()
    listing, file = file_of(origin)
    source = Source(origin, clock=clock)
    for _ in range(10):
        origin.fetch_failures = [error]
        with pytest.raises(type(error)):
            await source.fetch(listing, file, tmp_path / "file", Job(), LoopThreads())
    assert origin.fetched.total() == 10
    assert source.breaker.state == "closed"


async def test_an_origin_that_is_down_is_left_alone(clock: Clock) -> None:
    """After some failures to reach it in a row it is asked no more; then by one caller, whose success lets everybody in again."""
    origin = FakeOrigin()
    origin.add(NAME, small_files())
    origin.down = OriginFailed("down", reached=False)
    source = Source(origin, clock=clock)
    for _ in range(4):
        with pytest.raises(OriginFailed):
            await source.resolve(NAME)
    assert origin.resolved[NAME] == Breaker().threshold
    with pytest.raises(OriginDown, match="is asked again in") as raised:
        await source.resolve(NAME)
    assert raised.value.retry_after_s == 1
    assert not raised.value.shared
    assert origin.resolved[NAME] == Breaker().threshold
    origin.down = None
    clock.now += 0.5
    assert await source.resolve(NAME) is not None
    assert source.breaker.state == "closed"


def test_who_asks_an_origin_that_is_left_alone_is_told_at_once() -> None:
    """The next origin may have it: nobody waits for a breaker, neither while it is open nor while another caller tries."""
    origin = FakeOrigin()
    origin.down = OriginFailed("down")

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        source = Source(origin, clock=loop.time)
        source.breaker.open_for(loop.time(), 60)
        for _ in range(2):
            began = loop.time()
            with pytest.raises(OriginFailed, match="is asked again in"):
                await source.resolve(NAME)
            assert loop.time() == began
            await asyncio.sleep(60)
            assert source.breaker.allow(loop.time())  # somebody tries, and is not answered yet
        assert not origin.resolved

    with stamina.set_testing(False), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


def test_a_transfer_waits_for_an_origin_that_is_left_alone(tmp_path: Path) -> None:
    """It may have gigabytes already."""
    origin = FakeOrigin()
    listing, file = file_of(origin)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        source, began = Source(origin, clock=loop.time), loop.time()
        source.breaker.open_for(loop.time(), 5)
        assert (await source.fetch(listing, file, tmp_path / "file", Job(), LoopThreads())).size == len(DATA)
        assert loop.time() - began == pytest.approx(5)

    with stamina.set_testing(False), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


@pytest.mark.parametrize(("asked", "attempts"), [(0.0, ATTEMPTS), (1.0, ATTEMPTS), (LONGEST_WAIT_S, ATTEMPTS), (LONGEST_WAIT_S + 1, 1)])
async def test_an_origin_that_says_when_to_come_back_is_obeyed(clock: Clock, asked: float, attempts: int) -> None:
    """A short time is waited; a long one is the caller's to know, and until then nobody asks."""
    origin = FakeOrigin()
    origin.down = OriginFailed("429", asked)
    source = Source(origin, clock=clock)
    with pytest.raises(OriginFailed) as raised:
        await source.resolve(NAME)
    assert raised.value.retry_after_s == max(1, asked)
    assert origin.resolved[NAME] == attempts
    assert source.breaker.state == ("open" if attempts == 1 else "closed")


async def test_a_transfer_that_is_told_to_come_back_at_once_goes_on(tmp_path: Path, clock: Clock) -> None:
    """`Retry-After: 0` in mid-transfer, more often than a failure without progress is repeated."""

    class Hasty(FragileOrigin):
        async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
            try:
                await super().fetch(listing, file, download)
            except OriginFailed as error:
                raise OriginFailed(error.message, 0.0) from error

    origin = Hasty(step=16)
    got = await Source(origin, clock=clock).fetch(*file_of(origin), tmp_path / "file", Job(), LoopThreads())
    assert got.sha256 == sha256(DATA)


@pytest.mark.parametrize(("asked", "shortest", "longest"), [(None, 0.2 + 0.4, 0.4 + 0.6), (7.0, 14.0, 14.0), (0.0, 0.0, 0.0)])
def test_who_repeats_waits_first(asked: float | None, shortest: float, longest: float) -> None:
    """Twice as long each time, with some chance in it, so that nodes that failed together do not come back together; or as long as the origin said."""
    origin = FakeOrigin()
    origin.down = OriginFailed("down", asked)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        source, began = Source(origin, clock=loop.time), loop.time()
        with pytest.raises(OriginFailed):
            await source.resolve(NAME)
        assert shortest - 1e-6 <= loop.time() - began <= longest + 1e-6

    with stamina.set_testing(False), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))
    assert origin.resolved[NAME] == ATTEMPTS


def test_nodes_that_failed_together_do_not_come_back_together() -> None:
    """The waits of twenty callers are twenty different ones."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        async def one() -> float:
            origin = FakeOrigin()
            origin.down = OriginFailed("down")
            with pytest.raises(OriginFailed):
                await Source(origin, clock=loop.time).resolve(NAME)
            return loop.time()

        assert len(set(await asyncio.gather(*(one() for _ in range(20))))) > 15

    with stamina.set_testing(False), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


def test_all_files_of_an_origin_share_its_pace(tmp_path: Path) -> None:
    """Two transfers of eight megabytes at two megabytes per second take eight seconds together, and another origin's are not slowed down."""
    size = 8 * 2**20

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        async def fetch(source: Source, number: int) -> None:
            await source.fetch(Listing(NAME, "1", ()), RemoteFile(WEIGHTS, size), tmp_path / str(number), Job(), LoopThreads())

        origin = FragileOrigin(step=size)
        origin.data = bytes(size)
        paced = Source(origin, OriginSettings(type="http", url="http://nowhere", max_bytes_per_s=2 * 2**20), loop.time)
        await fetch(Source(origin, clock=loop.time), 0)
        began = loop.time()
        await asyncio.gather(fetch(paced, 1), fetch(paced, 2))
        assert 7 <= loop.time() - began <= 8

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


async def test_so_many_files_are_fetched_at_once_and_requests_go_first(tmp_path: Path, clock: Clock) -> None:
    """`max_fetches` of the origin's settings; a prefetch that came first waits."""
    origin = FakeOrigin()
    listing, file = file_of(origin)
    stall = origin.stall(NAME, WEIGHTS)
    source = Source(origin, OriginSettings(type="http", url="http://nowhere", max_fetches=1), clock)
    landed: list[int] = []

    async def fetch(number: int, job: Job) -> None:
        await source.fetch(listing, file, tmp_path / str(number), job, LoopThreads())
        landed.append(number)

    tasks = [asyncio.create_task(fetch(number, Job(priority))) for number, priority in enumerate((Job.REQUEST, Job.PREFETCH, Job.REQUEST))]
    await stall.reached.wait()
    await turns()
    assert origin.fetched.total() == 1
    stall.release()
    await asyncio.gather(*tasks)
    assert landed == [0, 2, 1]


# -- who is down: the origin, or one object


class ProbedOrigin(FakeOrigin):
    """Can be asked whether it is up; `is_up` says what comes of it, and `probes` when it was asked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.is_up = True
        self.hangs = False
        self.probes: list[float] = []
        self.probe_failure: OriginFailed | None = None
        self._clock = clock

    async def probe(self) -> None:
        self.probes.append(self._clock())
        if self.hangs:
            await asyncio.Event().wait()
        if self.probe_failure is not None:
            raise self.probe_failure

    def fall(self, error: OriginFailed) -> None:
        self.down = self.probe_failure = error

    def rise(self) -> None:
        self.down = self.probe_failure = None
        self.hangs = False


def on_a_virtual_loop(main: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, None]]) -> None:
    with stamina.set_testing(False), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(runner.get_loop()))


async def test_one_broken_object_is_nobody_elses_trouble(clock: Clock, tmp_path: Path) -> None:
    """However often it is asked for: it answers 500, has another length than stated, or breaks off in the middle."""
    origin = FragileOrigin(step=0)
    listing, file = file_of(origin)
    source = Source(origin, clock=clock)
    for _ in range(20):
        with pytest.raises(OriginFailed):
            await source.fetch(listing, file, tmp_path / "file", Job(), LoopThreads())
        origin.resolve_failures = [OriginFailed("status 500")] * ATTEMPTS
        with pytest.raises(OriginFailed):
            await source.resolve(NAME)
    assert source.breaker.state == "closed"
    assert await source.resolve(NAME) is not None


async def test_several_broken_objects_are_a_broken_origin(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It is left alone, once said in the log with the reason, and the caller is sent to another node."""
    caplog.set_level(logging.INFO, "extproc")
    origin = FakeOrigin()
    origin.down = OriginFailed("status 500")
    source = Source(origin, clock=clock)
    for number in range(3):
        with pytest.raises(OriginFailed) as raised:
            await source.resolve(adapter_name(f"owner{number}/a"))
        assert raised.value.shared
    for _ in range(3):
        with pytest.raises(OriginDown) as raised:
            await source.resolve(NAME)
        assert not raised.value.shared
    clock.now += 7
    origin.down = None
    await source.resolve(NAME)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "origin" in record.getMessage()]
    assert said == [("WARNING", "the fake origin is left alone: status 500"), ("INFO", "the fake origin is up again after 7.0 s")]


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("down_s", [0.1, 3.0, 60.0, 3600.0])
def test_an_origin_that_is_well_again_is_used_within_five_seconds(down_s: float, hangs: bool) -> None:
    """However long it was down, whether it refused or hung, and though nobody asked for anything."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        origin = ProbedOrigin(loop.time)
        origin.add(NAME, small_files())
        origin.fall(OriginFailed("down", reached=False))
        origin.hangs = hangs
        source = Source(origin, clock=loop.time)
        while source.breaker.state == "closed":
            with pytest.raises(OriginFailed):
                await source.resolve(NAME)
        await asyncio.sleep(down_s)
        asked = origin.resolved[NAME]
        assert len(origin.probes) <= down_s + 2
        origin.rise()
        risen = loop.time()
        while source.breaker.state != "closed":
            await asyncio.sleep(0.1)
        assert loop.time() - risen <= 5.0
        assert origin.resolved[NAME] == asked
        assert await source.resolve(NAME) is not None
        assert source._probing is not None
        await source._probing  # nothing goes on when it is up
        await source.close()

    on_a_virtual_loop(main)


def test_what_an_origin_asks_for_is_kept_by_probes_too() -> None:
    """Also against a transfer that began before and ends well meanwhile, and when the probe itself is told to wait."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        origin = ProbedOrigin(loop.time)
        origin.add(NAME, small_files())
        source = Source(origin, clock=loop.time)
        stall = origin.stall(NAME, WEIGHTS)
        listing = await source.resolve(NAME)
        assert isinstance(listing, Listing)
        file = next(file for file in listing.files if file.path == WEIGHTS)
        with tempfile.TemporaryDirectory() as directory:
            fetching = asyncio.create_task(source.fetch(listing, file, Path(directory) / "file", Job(), LoopThreads()))
            await stall.reached.wait()
            origin.fall(OriginFailed("429", 60.0))
            with pytest.raises(OriginFailed):
                await source.resolve(NAME)
            told = loop.time()
            stall.release()
            origin.down = None
            await fetching
        asked = origin.resolved[NAME]
        while not origin.probes:
            with pytest.raises(OriginDown):
                await source.resolve(NAME)
            await asyncio.sleep(1.0)
        assert origin.probes[0] >= told + 60
        assert all(later - earlier >= 60 for earlier, later in pairwise(origin.probes))  # several: virtual time flies while a thread ends the transfer
        assert origin.resolved[NAME] == asked
        probes = len(origin.probes)
        origin.rise()
        while source.breaker.state != "closed":
            await asyncio.sleep(0.5)
        assert len(origin.probes) == probes + 1
        assert 60 <= loop.time() - origin.probes[-2] <= 65
        assert await source.resolve(NAME) is not None
        await source.close()

    on_a_virtual_loop(main)


@pytest.mark.parametrize("is_down", [False, True])
def test_broken_objects_of_several_owners_have_the_origin_probed(is_down: bool) -> None:
    """It is left alone if the probe fails, too, and for no moment if it answers: a tenant can have any number of broken objects."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        origin = ProbedOrigin(loop.time)
        origin.add(NAME, small_files())
        origin.probe_failure = OriginFailed("status 500") if is_down else None
        source = Source(origin, clock=loop.time)
        for number in range(9):
            origin.resolve_failures = [OriginFailed("status 500")] * ATTEMPTS
            with pytest.raises(OriginFailed):
                await source.resolve(adapter_name(f"owner{number}/a"))
            if is_down and number == 2:
                break
            assert source.breaker.state == "closed"
        await asyncio.sleep(0.001)
        assert origin.probes
        assert source.breaker.state == ("open" if is_down else "closed")
        await source.close()

    on_a_virtual_loop(main)


def test_one_owner_s_broken_objects_cost_no_probe() -> None:
    """However many: the others' are served meanwhile."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        origin = ProbedOrigin(loop.time)
        origin.add(NAME, small_files())
        source = Source(origin, clock=loop.time)
        for number in range(9):
            origin.resolve_failures = [OriginFailed("status 500")] * ATTEMPTS
            with pytest.raises(OriginFailed):
                await source.resolve(adapter_name(f"acme/{number}"))
        assert not origin.probes
        assert await source.resolve(NAME) is not None
        await source.close()

    on_a_virtual_loop(main)


def test_one_owner_does_not_hold_every_place() -> None:
    """One place of four is kept for others; and of two who wait, the one who holds fewer goes first."""

    async def main(_: asyncio.AbstractEventLoop) -> None:
        slots, order = Slots(4), []
        go_on = asyncio.Event()

        async def hold(owner: str, number: int) -> None:
            async with slots.take(Job(), owner):
                order.append(f"{owner}{number}")
                await go_on.wait()

        tasks = [asyncio.create_task(hold("busy", number)) for number in range(6)]
        await asyncio.sleep(0)
        assert order == ["busy0", "busy1", "busy2"]
        tasks.append(asyncio.create_task(hold("other", 0)))
        await asyncio.sleep(0)
        assert order[3:] == ["other0"]
        tasks.append(asyncio.create_task(hold("third", 0)))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*tasks)
        assert order[4:] == ["third0", "busy3", "busy4", "busy5"]

    on_a_virtual_loop(main)


def test_a_transfer_that_trickles_is_given_up(tmp_path: Path) -> None:
    """A byte a second keeps no connection silent. After three windows its place is free again, and the origin is not down for it."""

    class Trickling(FakeOrigin):
        async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
            async def chunks() -> AsyncIterator[bytes]:
                while True:
                    await asyncio.sleep(1.0)
                    yield b"x"

            self.fetched[listing.name, file.path] += 1
            await download.write(chunks())

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        origin, began = Trickling(), loop.time()
        source = Source(origin, OriginSettings(type="http", url="http://nowhere", min_bytes_per_s=10), loop.time)
        file = RemoteFile(WEIGHTS, 2**20)
        with pytest.raises(OriginSlow, match="min_bytes_per_s is 10"):
            await source.fetch(Listing(NAME, "1", (file,)), file, tmp_path / "file", Job(), LoopThreads())
        assert origin.fetched.total() == ATTEMPTS
        assert loop.time() - began < 100
        assert source.breaker.state == "closed"

    on_a_virtual_loop(main)


def test_a_transfer_that_waits_for_our_own_limit_is_not_slow(tmp_path: Path) -> None:
    """The pace of `max_bytes_per_s`, which all transfers of an origin share, is not the origin's."""
    size = 8 * 2**20

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        origin = FragileOrigin(step=size)
        origin.data = bytes(size)
        settings = OriginSettings(type="http", url="http://nowhere", min_bytes_per_s=200_000, max_bytes_per_s=100_000)
        file, began = RemoteFile(WEIGHTS, size), loop.time()
        await Source(origin, settings, loop.time).fetch(Listing(NAME, "1", (file,)), file, tmp_path / "file", Job(), LoopThreads())
        assert loop.time() - began > 50

    on_a_virtual_loop(main)


async def test_a_repetition_is_logged_with_what_where_and_when(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """In the text itself: no formatter shows a record's other fields."""
    before = stamina.instrumentation.get_on_retry_hooks()
    log_repetitions()
    try:
        caplog.set_level(logging.INFO)
        origin = FakeOrigin()
        origin.resolve_failures = [OriginFailed("status 503", 7.0)]
        await Source(origin, clock=clock).resolve(NAME)
    finally:
        stamina.instrumentation.set_on_retry_hooks(before)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith(("extproc", "stamina"))]
    assert said.startswith(f"{NAME}: status 503; attempt 2 follows in ")


@pytest.mark.parametrize("kind", ["http", "s3", "huggingface", "file"])
async def test_every_origin_can_be_probed(tmp_path: Path, kind: str) -> None:
    """One that refuses us, or has nothing there, is up; one that fails or is not there is not."""
    if kind == "file":
        there, gone = (build_origin(OriginSettings(type="file", path=str(path))) for path in (tmp_path, tmp_path / "gone"))
        await there.probe()  # type: ignore[attr-defined]
        with pytest.raises(OriginFailed) as raised:
            await gone.probe()  # type: ignore[attr-defined]
        assert not raised.value.reached
        return
    makers: dict[str, Callable[..., OriginSettings]] = {"http": web_origin, "s3": s3_origin, "huggingface": hub_origin}
    make = makers[kind]
    async with running(FaultyServer()) as server:
        origin = build_origin(make(server.url))
        assert isinstance(origin, Probed)
        for status in (200, 401, 403, 404):
            server.fault("", method="HEAD", status=status)
            await origin.probe()
        for status, headers in ((500, {}), (503, {"retry-after": "60"}), (429, {})):
            server.fault("", method="HEAD", status=status, headers=headers)
            with pytest.raises(OriginFailed) as raised:
                await origin.probe()
            assert raised.value.reached
            assert raised.value.asked_to_wait_s == (60.0 if headers else None)
        await origin.close()
    gone = build_origin(make("http://127.0.0.1:1"))
    for call in (gone.probe(), gone.resolve(NAME)):  # type: ignore[attr-defined]
        with pytest.raises(OriginFailed) as raised:
            await call
        assert not raised.value.reached
    await gone.close()
