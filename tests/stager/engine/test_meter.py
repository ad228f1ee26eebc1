"""What the engine works on, as it is read and told: when it changes by a step, in time, and once when it is not known."""

import asyncio
import itertools
from collections.abc import Collection, Iterator
from typing import cast

import pytest

from extproc.errors import EngineUnreachable
from extproc.stager.engine.api import Engine, Work
from extproc.stager.engine.meter import BUSY_S, IDLE_S, MAX_S, SHARE, Meter, Reading
from tests.fakes.wait import VirtualLoop


class Scripted:
    """An engine whose load is what the test sets, and that takes `takes_s` to say it."""

    exists = True

    def __init__(self) -> None:
        self.work_now: Work | None = Work(0, 0, 0.0)
        self.takes_s = 0.0
        self.is_gone = False
        self.asked: list[tuple[float, bool]] = []  # when, and whether for names too

    async def work(self, *, adapters: bool = False) -> Work:
        self.asked.append((asyncio.get_running_loop().time(), adapters))
        await asyncio.sleep(self.takes_s)
        if self.work_now is None:
            error = EngineUnreachable("the engine cannot be asked")
            error.is_gone = self.is_gone
            raise error
        return self.work_now


class Metered:
    """A meter on a loop of its own time, and what it tells."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.engine = Scripted()
        self.told: list[tuple[float, Work | None]] = []
        self.names: list[Collection[str]] = []
        self.waits: dict[str, int] = {}
        self.meter = Meter(cast("Engine", self.engine), self._tell, self.names.append, lambda: dict(self.waits))

    def _tell(self) -> None:
        assert self.meter.told is not None
        self.told.append((self.loop.time(), self.meter.told.work))

    def run(self, *spells: tuple[Work | None, float]) -> None:
        """While somebody wants to know: each load for so many seconds."""

        async def run() -> None:
            with self.meter.wanted():
                for work, seconds in spells:
                    self.engine.work_now = work
                    await asyncio.sleep(seconds)
            await self.meter.close()
            await asyncio.sleep(0)

        self.loop.run_until_complete(run())


@pytest.fixture
def metered() -> Iterator[Metered]:
    loop = VirtualLoop()
    yield Metered(loop)
    loop.close()


def busy(running: float, waiting: float = 0) -> Work:
    return Work(running, waiting, 0.5)


def test_nobody_asks_the_engine_unless_somebody_wants_to_know(metered: Metered) -> None:
    """And nothing is kept that would be old by the next time."""
    metered.run((busy(1), 5.0))
    asked = len(metered.engine.asked)
    metered.loop.run_until_complete(asyncio.sleep(60))
    assert len(metered.engine.asked) == asked
    assert metered.meter.reading is None


def test_a_step_is_told_with_the_reading_that_shows_it(metered: Metered) -> None:
    """More than one request or a twentieth, whichever is more; the first and the last that waits."""
    looks = (busy(100), 1.0), (busy(105), 0.5), (busy(106), 0.5), (busy(106, 1), 0.5), (busy(107), 0.5)
    metered.meter.wanting = 1  # another router
    metered.run(*looks)
    shown = [work for _, work in metered.told]
    assert shown == [busy(100), busy(106), busy(106, 1), busy(107)]


def test_a_single_router_is_told_of_every_change(metered: Metered) -> None:
    """It knows what it sends, and lacks only what ends."""
    metered.run((busy(100), 1.0), (busy(101), 0.5), (busy(101), 0.5), (busy(100), 0.5))
    assert [work for _, work in metered.told] == [busy(100), busy(101), busy(100)]


def test_of_several_routers_each_is_told_what_the_others_let_wait(metered: Metered) -> None:
    """A step of it is told as one of the engine's own numbers, and an idle engine that will have it is looked at as a busy one."""
    metered.loop.call_later(1.1, lambda: metered.waits.update(one=1, other=1))
    metered.meter.wanting = 1  # another router
    metered.run((busy(0), 4.0))
    assert metered.meter.every_s == BUSY_S
    assert metered.told[1][0] - metered.told[0][0] == 1.5  # with the look that comes then


def test_a_single_router_is_not_told_what_it_lets_wait_itself(metered: Metered) -> None:
    """It knows."""
    metered.loop.call_later(1.1, lambda: metered.waits.update(one=2))
    metered.run((busy(0), 1.7))
    assert len(metered.told) == 1


def test_how_often_the_engine_is_looked_at_is_said(metered: Metered) -> None:
    """Routers conclude from silence as far as the last look."""
    metered.run((busy(5), 1.0))
    assert metered.meter.every_s == BUSY_S
    metered.run((busy(0), 1.0))
    assert metered.meter.every_s == IDLE_S


def test_a_small_change_is_told_within_two_seconds(metered: Metered) -> None:
    """As is a load that does not change at all."""
    metered.run((busy(1), 0.3), (busy(2), 9.0))
    times = [at for at, _ in metered.told]
    assert all(later - earlier <= MAX_S for earlier, later in itertools.pairwise(times))
    assert len(times) >= 4
    assert metered.told[1][1] == busy(2)


def test_an_engine_that_cannot_be_asked_is_told_once(metered: Metered) -> None:
    """And at once when it can be asked again."""
    metered.run((busy(1), 1.0), (None, 30.0), (busy(1), 0.6))
    assert [work for _, work in metered.told if work is None] == [None]
    assert metered.told[-1][1] == busy(1)


@pytest.mark.parametrize("is_gone", [True, False])
def test_an_engine_that_is_gone_is_told_from_one_that_hangs(metered: Metered, is_gone: bool) -> None:
    """The one has no request any more, the other may have any number."""
    metered.engine.is_gone = is_gone
    seen: list[Reading | None] = []
    metered.loop.call_later(0.5, lambda: seen.append(metered.meter.reading))
    metered.run((None, 1.0))
    assert [reading.is_gone for reading in seen if reading is not None] == [is_gone]


def test_an_idle_engine_is_asked_less_often(metered: Metered) -> None:
    """What it would say is known."""
    metered.run((busy(1), 10.0))
    while_busy = len(metered.engine.asked)
    metered.run((busy(0), 10.0))
    assert while_busy == pytest.approx(10 / BUSY_S, abs=1)
    assert len(metered.engine.asked) - while_busy == pytest.approx(10 / IDLE_S, abs=1)


def test_an_engine_that_is_slow_to_answer_is_asked_less_often(metered: Metered) -> None:
    """So that its answers take no more than their share of its time, and never less often than every two seconds."""
    for takes_s, every_s in ((0.02, 0.02 / SHARE), (0.5, MAX_S)):
        metered.engine.takes_s = takes_s
        metered.engine.asked.clear()
        metered.run((busy(1), 20.0))
        waits = [later - at for (at, adapters), (later, _) in itertools.pairwise(metered.engine.asked) if not adapters]
        assert len(waits) > 5
        assert waits == pytest.approx([every_s] * len(waits))


def test_names_at_work_are_asked_for_with_few_of_the_questions(metered: Metered) -> None:
    """Their series are never removed, so that question costs an engine more."""
    metered.run((Work(1, 0, 0.0, frozenset({"a"})), 10.0))
    assert sum(adapters for _, adapters in metered.engine.asked) == pytest.approx(5, abs=1)
    assert metered.names[0] == {"a"}
