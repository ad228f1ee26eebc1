"""One flight per key, owned by none of its waiters."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from extproc.flight import SingleFlight, to_the_end
from tests.fakes.wait import turns


class Field:
    """Flights that land when told to."""

    def __init__(self) -> None:
        self.departures: list[str] = []
        self.cleaned: list[str] = []
        self.landing: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def fly(self, key: str) -> Callable[[], Coroutine[Any, Any, str]]:
        async def flight() -> str:
            self.departures.append(key)
            try:
                return await asyncio.shield(self.landing)
            finally:
                self.cleaned.append(key)

        return flight


@pytest.mark.parametrize("end", ["lands", "fails", "is cancelled before it departs"])
async def test_each_flight_is_told_of_once_when_it_starts_and_once_when_it_has_landed(end: str) -> None:
    """However it ends, and however many wait for it."""
    told: list[tuple[str, int]] = []
    field, flights = Field(), SingleFlight[str, str](lambda key, change: told.append((key, change)))
    task = flights.start("a", field.fly("a"))
    assert flights.start("a", field.fly("a")) is task
    assert told == [("a", 1)]
    if end == "lands":
        field.landing.set_result("there")
    elif end == "fails":
        field.landing.set_exception(OSError())
    else:
        task.cancel()
    await turns()
    assert told == [("a", 1), ("a", -1)]


async def test_callers_of_one_key_share_one_flight() -> None:
    """However many wait, one departs, and all get what it brings."""
    field, flights = Field(), SingleFlight[str, str]()
    waiters = [asyncio.create_task(flights.join("a", field.fly("a"))) for _ in range(100)]
    await turns()
    assert "a" in flights
    assert len(flights) == 1
    assert flights.waiters("a") == 100
    field.landing.set_result("there")
    assert await asyncio.gather(*waiters) == ["there"] * 100
    assert field.departures == ["a"]
    assert flights.waiters("a") == 0


async def test_two_keys_fly_side_by_side() -> None:
    """A key waits for its own flight only."""
    field, flights = Field(), SingleFlight[str, str]()
    waiters = [asyncio.create_task(flights.join(key, field.fly(key))) for key in ("a", "b", "a")]
    await turns()
    assert field.departures == ["a", "b"]
    field.landing.set_result("there")
    assert await asyncio.gather(*waiters) == ["there"] * 3


async def test_a_cancelled_waiter_takes_nothing_from_the_others() -> None:
    """A calls and starts the fetch; B waits for A's; A hangs up; the fetch goes on, and B gets the bytes."""
    field, flights = Field(), SingleFlight[str, str]()
    a = asyncio.create_task(flights.join("k", field.fly("k")))
    await turns()
    b = asyncio.create_task(flights.join("k", field.fly("k")))
    await turns()
    a.cancel()
    with pytest.raises(asyncio.CancelledError):
        await a
    assert flights.waiters("k") == 1
    assert field.cleaned == []
    field.landing.set_result("there")
    assert await b == "there"
    assert field.departures == ["k"]


async def test_a_flight_nobody_waits_for_goes_on() -> None:
    """The last waiter leaves; who asks again later joins the same flight."""
    field, flights = Field(), SingleFlight[str, str]()
    only = asyncio.create_task(flights.join("k", field.fly("k")))
    await turns()
    only.cancel()
    await asyncio.wait({only})
    assert "k" in flights
    assert flights.waiters("k") == 0
    later = asyncio.create_task(flights.join("k", field.fly("k")))
    await turns()
    field.landing.set_result("there")
    assert await later == "there"
    assert field.departures == ["k"]


async def test_an_error_reaches_every_waiter() -> None:
    """All that wait for a flight see why it failed."""
    field, flights = Field(), SingleFlight[str, str]()
    waiters = [asyncio.create_task(flights.join("k", field.fly("k"))) for _ in range(3)]
    await turns()
    field.landing.set_exception(LookupError("lost"))
    for result in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(result, LookupError)
    assert len(flights) == 0


async def test_an_error_with_no_waiter_left_is_not_logged_as_lost() -> None:
    """The flight itself has looked at it: asyncio's exception handler stays silent."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    field, flights = Field(), SingleFlight[str, str]()
    only = asyncio.create_task(flights.join("k", field.fly("k")))
    await turns()
    only.cancel()
    await asyncio.wait({only})
    field.landing.set_exception(LookupError("lost"))
    await turns()
    assert len(flights) == 0
    assert complaints == []


@pytest.mark.parametrize("fails", [False, True])
async def test_a_landed_key_flies_again(fails: bool) -> None:
    """Neither success nor failure is kept: that is for the caller to remember."""
    flights = SingleFlight[str, int]()
    departures = 0

    async def fly() -> int:
        nonlocal departures
        departures += 1
        if fails:
            raise LookupError("lost")
        return departures

    for expected in (1, 2):
        if fails:
            with pytest.raises(LookupError):
                await flights.join("k", fly)
        else:
            assert await flights.join("k", fly) == expected
        assert departures == expected
        assert "k" not in flights


async def test_close_cancels_what_flies_and_waits_until_it_has_cleaned_up() -> None:
    """After close nothing is in the air, and every `finally` has run."""
    field, flights = Field(), SingleFlight[str, str]()
    waiters = [asyncio.create_task(flights.join(key, field.fly(key))) for key in ("a", "b")]
    await turns()
    await flights.close()
    assert field.cleaned == ["a", "b"]
    await turns()
    assert len(flights) == 0
    for waiter in waiters:
        with pytest.raises(asyncio.CancelledError):
            await waiter


async def test_close_without_flights_returns() -> None:
    """There is nothing to wait for."""
    await SingleFlight[str, str]().close()


# -- a step that is not left half done


async def test_a_step_ends_before_its_cancelled_caller_does() -> None:
    """Cancelled twice even; then the cancellation goes on."""
    go_on, ended = asyncio.Event(), asyncio.Event()

    async def step() -> None:
        await go_on.wait()
        ended.set()

    caller = asyncio.create_task(to_the_end(step()))
    for _ in range(2):
        await turns()
        caller.cancel()
    await turns()
    assert not caller.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


async def test_a_step_that_fails_says_so_to_its_cancelled_caller() -> None:
    """What it had begun did not come to be; that must not look like an end that went well."""
    go_on = asyncio.Event()

    async def step() -> None:
        await go_on.wait()
        raise LookupError

    caller = asyncio.create_task(to_the_end(step()))
    await turns()
    caller.cancel()
    await turns()
    go_on.set()
    with pytest.raises(LookupError):
        await caller
