"""The breaker's table, row by row, and that no sequence of calls keeps it open for ever or lets two try at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.breaker import LONGEST_ASKED_S, STATES, Breaker

FIRST, LONGEST = 0.5, 2.5


def opened(now: float = 0.0) -> Breaker:
    """A breaker that its last allowed failure has just opened."""
    breaker = Breaker()
    for _ in range(breaker.threshold):
        assert breaker.allow(now)
        breaker.not_reached(now)
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
    """Only failures in a row count, of either kind."""
    breaker = Breaker(threshold=3, names=3)
    for _ in range(10):
        for name in ("a", "b"):
            breaker.not_reached(0)
            breaker.failed(0, name)
        breaker.succeeded(0)
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_closed_so_many_failures_to_reach_it_in_a_row_open_it() -> None:
    """The one before the last does not."""
    breaker = Breaker(threshold=3)
    for count in (1, 2):
        breaker.not_reached(7)
        assert (breaker.state, breaker.failures) == ("closed", count)
    breaker.not_reached(7)
    assert (breaker.state, breaker.open_until) == ("open", 7 + FIRST)


def test_closed_one_name_alone_never_opens_it() -> None:
    """However often it fails, and though nobody asks for another."""
    breaker = Breaker()
    for now in range(1000):
        breaker.failed(now / 10, "bad")
    assert breaker.state == "closed"


def test_closed_failures_for_several_names_open_it() -> None:
    """As many as `names`, each counted once."""
    breaker = Breaker(names=3)
    for name in ("a", "b", "a", "b"):
        breaker.failed(7, name)
        assert breaker.state == "closed"
    breaker.failed(7, "c")
    assert (breaker.state, breaker.open_until) == ("open", 7 + FIRST)


def test_closed_what_failed_long_ago_does_not_count() -> None:
    """Three names that failed within `window_s` say something of the server, three in a day do not."""
    breaker = Breaker(names=3, window_s=60)
    for now, name in ((0, "a"), (40, "b"), (60, "c"), (101, "d")):
        breaker.failed(now, name)
        assert breaker.state == "closed"
    breaker.failed(101.5, "e")
    assert breaker.state == "open"


def test_closed_no_name_counts_where_none_shall() -> None:
    """`names` 0, and nothing is kept of them."""
    breaker = Breaker(names=0)
    for number in range(100):
        breaker.failed(0, f"{number}")
    assert (breaker.state, breaker._failed) == ("closed", {})


# -- open


def test_open_nobody_may_call_until_its_time_is_over() -> None:
    """It says how long that is."""
    breaker = opened(100)
    for now in (100, 100.2, 100.499):
        assert not breaker.allow(now)
        assert breaker.wait_s(now) == pytest.approx(100.5 - now)
    assert breaker.state == "open"
    assert breaker.allow(100.5)
    assert breaker.state == "half-open"


def test_open_a_success_of_a_call_begun_before_closes_it() -> None:
    """The server is up, whoever noticed."""
    breaker = opened()
    breaker.succeeded(0)
    assert (breaker.state, breaker.failures, breaker.wait_s(0)) == ("closed", 0, 0)
    assert breaker.allow(0)


def test_open_a_failure_of_a_call_begun_before_leaves_it_open_as_long() -> None:
    """A hundred calls that were in flight do not make the pause longer."""
    breaker = opened(0)
    for now in (0.1, 0.2, 0.3):
        breaker.not_reached(now)
        breaker.failed(now, f"{now}")
    assert (breaker.state, breaker.open_until) == ("open", FIRST)


# -- half-open


def test_half_open_one_caller_tries_and_the_others_wait() -> None:
    """Should that one never say what came of it, another may, after the longest pause's time."""
    breaker = half_open(0)
    for now in (FIRST, FIRST + 1, FIRST + LONGEST - 0.001):
        assert not breaker.allow(now)
        assert breaker.wait_s(now) == pytest.approx(FIRST + LONGEST - now)
    assert breaker.allow(FIRST + LONGEST)
    assert not breaker.allow(FIRST + LONGEST)


def test_half_open_a_success_closes_it() -> None:
    """For everybody, and the next pause is a short one again."""
    breaker = half_open(0)
    breaker.succeeded(1)
    assert breaker.state == "closed"
    assert all(breaker.allow(FIRST) for _ in range(3))
    for _ in range(breaker.threshold):
        breaker.not_reached(100)
    assert breaker.open_until == 100 + FIRST


@pytest.mark.parametrize("named", [False, True])
def test_half_open_a_failure_opens_it_for_twice_as_long(named: bool) -> None:
    """Each time, up to the longest; the jitter makes each shorter, never longer."""
    for jitter in (1.0, 0.5):
        breaker, now = opened(0), 0.0
        breaker.jitter = lambda jitter=jitter: jitter  # type: ignore[misc]
        pauses = []
        for _ in range(5):
            now = breaker.open_until
            assert breaker.allow(now)
            if named:
                breaker.failed(now, "a")
            else:
                breaker.not_reached(now)
            assert breaker.state == "open"
            pauses.append(breaker.open_until - now)
        assert pauses == pytest.approx([jitter * pause for pause in (1, 2, LONGEST, LONGEST, LONGEST)])


# -- when the server itself says when


@pytest.mark.parametrize(("asked", "pause"), [(0.5, 0.5), (30, 30), (LONGEST_ASKED_S, LONGEST_ASKED_S), (86_400, LONGEST_ASKED_S)])
@pytest.mark.parametrize("make", [Breaker, opened, half_open])
def test_the_time_that_the_server_asks_for_is_kept(make: type[Breaker], asked: float, pause: float) -> None:
    """In every state, up to an hour, and whatever comes meanwhile of calls that began before."""
    breaker = make()
    breaker.open_for(1000, asked)
    breaker.open_for(1000, asked / 2)
    for now in (1000, 1000 + pause - 0.001):
        breaker.succeeded(now)
        breaker.not_reached(now)
        breaker.failed(now, "a")
        assert breaker.state == "open"
        assert not breaker.allow(now)
    assert breaker.allow(1000 + pause)
    breaker.succeeded(1000 + pause)
    assert breaker.state == "closed"


# -- any sequence of calls

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("allow", "allow", "allow", "succeeded", "not_reached", "not_reached", "failed a", "failed b", "failed c", "open_for")),
        st.sampled_from((0.0, 0.0, 0.125, FIRST, 1.0, LONGEST, 17.0, 64.0)),  # sums of these are exact
    ),
    max_size=60,
)


def run(breaker: Breaker, event: str, now: float, value: float) -> bool:
    """One event; whether a call was allowed by it."""
    match event.split():
        case ["allow"]:
            return breaker.allow(now)
        case ["succeeded"]:
            breaker.succeeded(now)
        case ["not_reached"]:
            breaker.not_reached(now)
        case ["failed", name]:
            breaker.failed(now, name)
        case _:
            breaker.open_for(now, 100 * value)
    return False


@given(EVENTS)
def test_it_always_closes_again(events: list[tuple[str, float]]) -> None:
    """Whatever happened: nobody waits longer than the longest pause, then one call is allowed, and its success lets everybody in."""
    breaker, now = Breaker(), 0.0
    for event, passed in events:
        now += passed
        run(breaker, event, now, passed)
        assert breaker.state in STATES
        assert 0 <= breaker.wait_s(now) <= LONGEST_ASKED_S
    now += breaker.wait_s(now)
    assert breaker.allow(now)
    breaker.succeeded(now)
    assert (breaker.state, breaker.failures, breaker.wait_s(now)) == ("closed", 0, 0)
    assert all(breaker.allow(now) for _ in range(3))


@given(EVENTS)
def test_no_two_try_at_once(events: list[tuple[str, float]]) -> None:
    """Between two callers that were let in while it was not closed, there are either LONGEST seconds or word of what came of the first."""
    breaker, now = Breaker(), 0.0
    tried: float | None = None  # when the one was let in whose answer is awaited
    for event, passed in events:
        now += passed
        was = breaker.state
        allowed = run(breaker, event, now, passed)
        if event != "allow":
            tried = None
        elif allowed and was != "closed":
            assert tried is None or now >= tried + LONGEST
            assert breaker.state == "half-open"
            tried = now
        assert allowed or event != "allow" or breaker.wait_s(now) > 0


@given(EVENTS)
def test_it_never_opens_before_enough_has_failed(events: list[tuple[str, float]]) -> None:
    """Unless the server asks for it: so many failures to reach it in a row, or so many names."""
    breaker, now, row, names = Breaker(), 0.0, 0, set[str]()
    for event, passed in events:
        if event == "open_for":
            continue
        now += passed
        run(breaker, event, now, passed)
        row = 0 if event == "succeeded" else row + (event == "not_reached")
        names = set() if event == "succeeded" else names | ({event} if event.startswith("failed") else set())
        assert breaker.failures == row
        assert row >= breaker.threshold or len(names) >= breaker.names or breaker.state == "closed"
