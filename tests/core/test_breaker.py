"""The breaker's table, row by row, and that no sequence of calls keeps it open for ever or lets two try at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.breaker import STATES, Breaker

FIRST, LONGEST = 5.0, 60.0


def opened(now: float = 0.0) -> Breaker:
    """A breaker that its last allowed failure has just opened."""
    breaker = Breaker()
    for _ in range(breaker.threshold):
        assert breaker.allow(now)
        breaker.failed(now)
    assert breaker.state == "open"
    return breaker


def half_open(now: float = 0.0) -> Breaker:
    """One whose first caller after the pause was just let in, at `now` + FIRST."""
    breaker = opened(now)
    assert breaker.allow(now + FIRST)
    assert breaker.state == "half-open"
    return breaker


# -- closed


def test_closed_everybody_may_call() -> None:
    """And there is nothing to wait for."""
    breaker = Breaker()
    assert all(breaker.allow(now) for now in (0, 0, 1e9))
    assert (breaker.state, breaker.wait_s(0)) == ("closed", 0)


def test_closed_a_success_forgets_the_failures() -> None:
    """Only failures in a row count."""
    breaker = Breaker(threshold=3)
    for _ in range(10):
        breaker.failed(0)
        breaker.failed(0)
        breaker.succeeded()
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_closed_so_many_failures_in_a_row_open_it() -> None:
    """The one before the last does not."""
    breaker = Breaker(threshold=3)
    for count in (1, 2):
        breaker.failed(7)
        assert (breaker.state, breaker.failures) == ("closed", count)
    breaker.failed(7)
    assert (breaker.state, breaker.open_until) == ("open", 7 + FIRST)


# -- open


def test_open_nobody_may_call_until_its_time_is_over() -> None:
    """It says how long that is."""
    breaker = opened(100)
    for now in (100, 102, 104.999):
        assert not breaker.allow(now)
        assert breaker.wait_s(now) == pytest.approx(105 - now)
    assert breaker.state == "open"
    assert breaker.allow(105)
    assert breaker.state == "half-open"


def test_open_a_success_of_a_call_begun_before_closes_it() -> None:
    """The server is up, whoever noticed."""
    breaker = opened()
    breaker.succeeded()
    assert (breaker.state, breaker.failures, breaker.wait_s(0)) == ("closed", 0, 0)
    assert breaker.allow(0)


def test_open_a_failure_of_a_call_begun_before_leaves_it_open_as_long() -> None:
    """A hundred calls that were under way do not make the pause longer."""
    breaker = opened(0)
    for now in (1, 2, 3):
        breaker.failed(now)
    assert (breaker.state, breaker.open_until) == ("open", FIRST)


# -- half-open


def test_half_open_one_caller_tries_and_the_others_wait() -> None:
    """Should that one never say what came of it, another may, after the first pause's time."""
    breaker = half_open(0)
    for now in (FIRST, FIRST + 1, 2 * FIRST - 0.001):
        assert not breaker.allow(now)
        assert breaker.wait_s(now) == pytest.approx(2 * FIRST - now)
    assert breaker.allow(2 * FIRST)
    assert not breaker.allow(2 * FIRST)


def test_half_open_a_success_closes_it() -> None:
    """For everybody, and the next pause is a short one again."""
    breaker = half_open(0)
    breaker.succeeded()
    assert breaker.state == "closed"
    assert all(breaker.allow(FIRST) for _ in range(3))
    for _ in range(breaker.threshold):
        breaker.failed(100)
    assert breaker.open_until == 100 + FIRST


def test_half_open_a_failure_opens_it_for_twice_as_long() -> None:
    """Each time, up to the longest."""
    breaker, now = opened(0), 0.0
    pauses = []
    for _ in range(7):
        now = breaker.open_until
        assert breaker.allow(now)
        breaker.failed(now)
        assert breaker.state == "open"
        pauses.append(breaker.open_until - now)
    assert pauses == [10, 20, 40, LONGEST, LONGEST, LONGEST, LONGEST]


# -- when the server itself says when


@pytest.mark.parametrize(("asked", "pause"), [(0.5, 0.5), (30, 30), (LONGEST, LONGEST), (3600, LONGEST)])
@pytest.mark.parametrize("make", [Breaker, opened, half_open])
def test_the_time_that_the_server_asks_for_is_obeyed(make: type[Breaker], asked: float, pause: float) -> None:
    """In every state, up to the longest: an origin cannot switch itself off for a day."""
    breaker = make()
    breaker.open_for(1000, asked)
    assert breaker.state == "open"
    assert not breaker.allow(1000 + pause - 0.001)
    assert breaker.allow(1000 + pause)


# -- any sequence of calls

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("allow", "allow", "allow", "succeeded", "failed", "failed", "failed", "open_for")),
        st.sampled_from((0.0, 0.0, 0.125, 1.0, 4.875, FIRST, 17.0, LONGEST)),  # sums of these are exact
    ),
    max_size=60,
)


def run(breaker: Breaker, event: str, now: float, value: float) -> bool:
    """One event; whether a call was allowed by it."""
    match event:
        case "allow":
            return breaker.allow(now)
        case "succeeded":
            breaker.succeeded()
        case "failed":
            breaker.failed(now)
        case _:
            breaker.open_for(now, 10 * value)
    return False


@given(EVENTS)
def test_it_always_closes_again(events: list[tuple[str, float]]) -> None:
    """Whatever happened: nobody waits longer than the longest pause, then one call is allowed, and its success lets everybody in."""
    breaker, now = Breaker(), 0.0
    for event, passed in events:
        now += passed
        run(breaker, event, now, passed)
        assert breaker.state in STATES
        assert 0 <= breaker.wait_s(now) <= LONGEST
    now += breaker.wait_s(now)
    assert breaker.allow(now)
    breaker.succeeded()
    assert (breaker.state, breaker.failures, breaker.wait_s(now)) == ("closed", 0, 0)
    assert all(breaker.allow(now) for _ in range(3))


@given(EVENTS)
def test_no_two_try_at_once(events: list[tuple[str, float]]) -> None:
    """Between two callers that were let in while it was not closed, there are either `first_s` seconds or word of what came of the first."""
    breaker, now = Breaker(), 0.0
    tried: float | None = None  # when the one was let in whose answer is awaited
    for event, passed in events:
        now += passed
        was = breaker.state
        allowed = run(breaker, event, now, passed)
        if event != "allow":
            tried = None
        elif allowed and was != "closed":
            assert tried is None or now >= tried + FIRST
            assert breaker.state == "half-open"
            tried = now
        assert allowed or event != "allow" or breaker.wait_s(now) > 0


@given(EVENTS)
def test_it_never_opens_before_so_many_failures_in_a_row(events: list[tuple[str, float]]) -> None:
    """Unless the server asks for it."""
    breaker, now, row = Breaker(), 0.0, 0
    for event, passed in events:
        if event == "open_for":
            continue
        now += passed
        run(breaker, event, now, passed)
        row = 0 if event == "succeeded" else row + (event == "failed")
        assert breaker.failures == row
        assert row >= breaker.threshold or breaker.state == "closed"
