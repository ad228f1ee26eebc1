"""When an idle adapter is expected, and what knowing that takes."""

import random
import tracemalloc
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.maglev import MAX_KEY_CHARS
from extproc.core.prefetch import (
    BUCKET_S,
    COUNTERS,
    FLOOR_S,
    LEAD_S,
    MARGIN_S,
    MINUTE_S,
    MOST,
    YESTERDAY_S,
    By,
    Expected,
    Histories,
)

BYTES_PER_ADAPTER = 750
DAY_S = 86_400.0
START = 3 * DAY_S


def idle(histories: Histories, minutes: Iterable[float], now: float = START) -> float:
    """`a` is asked for, and again after each of these idle times; when that was the last time."""
    histories.see("a", now)
    for idle_minutes in minutes:
        now += idle_minutes * MINUTE_S
        histories.see("a", now)
    return now


def first_expected(histories: Histories, now: float, within_s: float = 5 * 3600.0) -> tuple[float, Expected] | None:
    """After how many seconds it is expected because of its idle times, looked at once a minute, and how."""
    for minute in range(int(within_s // MINUTE_S)):
        found = histories.look(now + minute * MINUTE_S, 1)
        if found and found[0].by is By.IDLE_TIMES:
            return minute * MINUTE_S, found[0]
    return None


def test_an_adapter_that_wakes_up_every_half_hour_is_expected_before_it_does() -> None:
    """Ahead by the margin, and until the minute of its longest idle time is over."""
    histories = Histories()
    now = idle(histories, [30.5] * 6)
    found = first_expected(histories, now)
    assert found is not None
    after_s, expected = found
    assert 30 * MINUTE_S - MARGIN_S - MINUTE_S <= after_s <= 30 * MINUTE_S - MARGIN_S + MINUTE_S
    assert expected == Expected("a", "a", 31 * MINUTE_S - after_s, By.IDLE_TIMES)


@pytest.mark.parametrize(
    ("minutes", "is_expected"),
    [
        ([], False),
        ([30, 30], False),  # two may be chance
        ([30, 30, 30], True),
        ([10, 70, 130, 190], False),
        ([30, 31, 32, 33, 34, 35], False),
        ([30, 31, 32, 33, 34] * 3, True),  # they agree to five minutes
        ([1, 2, 3, 4] * 50, False),  # asked for again while it is leased
        ([30] * 6 + [300] * 6, True),
        ([30] * 6 + [300] * 7, False),  # most of them are longer than the histogram
        ([300] * 20, False),
        ([30] * MOST + [90] * MOST, True),
    ],
)
def test_idle_times_that_repeat_are_what_is_expected(minutes: Sequence[float], is_expected: bool) -> None:
    """Within a few hours of the last time, by the histogram alone."""
    histories = Histories()
    now = idle(histories, minutes)
    found = first_expected(histories, now)
    assert (found is not None) is is_expected


@pytest.mark.parametrize("seed", range(5))
def test_idle_times_that_fall_anywhere_are_not(seed: int) -> None:
    """However many there are: a few of them never look alike by chance, and many fill the histogram evenly."""
    dice = random.Random(seed)
    for count in (5, 20, 100, 400):
        histories = Histories()
        now = idle(histories, (dice.uniform(FLOOR_S / MINUTE_S, COUNTERS) for _ in range(count)), DAY_S / 2)
        assert first_expected(histories, now) is None


def test_what_was_long_ago_counts_less() -> None:
    """An adapter that has changed its period is expected by the new one."""
    histories = Histories()
    now = idle(histories, [30.5] * MOST + [90.5] * 20 * MOST)
    found = first_expected(histories, now)
    assert found is not None
    assert found[0] > 75 * MINUTE_S


@pytest.mark.parametrize(
    ("days_ago", "after_minutes", "is_expected"), [(1, 0, True), (1, -10, True), (1, -11, False), (1, 19, True), (1, 21, False), (2, 0, False)]
)
def test_what_was_active_at_this_time_yesterday_is_expected(days_ago: int, after_minutes: float, is_expected: bool) -> None:
    """Some minutes ahead, give or take ten minutes, for half an hour."""
    histories = Histories()
    histories.see("a", START)
    now = START + days_ago * DAY_S - LEAD_S + after_minutes * MINUTE_S
    found = histories.look(now, 1)
    assert found == ([Expected("a", "a", YESTERDAY_S, By.YESTERDAY)] if is_expected else [])


def test_what_was_seen_since_yesterday_does_not_hide_it() -> None:
    """Activities of a day are kept, and end with it."""
    histories = Histories()
    for hours in (0, 3, 9):
        histories.see("a", START + hours * 3600)
    times = [START + DAY_S + hours * 3600 for hours in (0, 1, 2, 3, 6, 9, 12)]
    assert [bool(histories.look(now, 1)) for now in times] == [True, False, False, True, False, True, False]


def test_an_expectation_is_said_once_unless_nothing_came_of_it_or_a_better_one_follows() -> None:
    """Until it is over. What the adapter's own idle times say is better than yesterday."""
    histories = Histories()
    now = idle(histories, [30.5] * 6)
    due = now + 29 * MINUTE_S
    assert len(histories.look(due, 1)) == 1
    assert histories.look(due + 30, 1) == []
    histories.not_done("a")
    assert len(histories.look(due + 30, 1)) == 1
    histories.not_done("never seen")
    other = Histories()
    idle(other, [30.5] * 6, now - DAY_S + 15 * MINUTE_S)  # active at about this time yesterday
    idle(other, [31.0], now - 31 * MINUTE_S)
    said = [found.by for minute in range(32) for found in other.look(now + minute * MINUTE_S, 1)]
    assert said == [By.YESTERDAY, By.IDLE_TIMES]


def test_an_adapter_is_looked_for_by_the_key_that_it_was_asked_for_by_last() -> None:
    """Who tells of a request without its key takes nothing away; one that is too long is not kept."""
    histories = Histories()
    for key in ("tenant", "", "x" * (MAX_KEY_CHARS + 1)):
        histories.see("a", START, key)
    (found,) = histories.look(START + DAY_S, 1)
    assert found.key == "tenant"


def test_each_adapter_has_its_turn() -> None:
    """A look is at so many as are asked for, and all are looked at before one is again."""
    histories = Histories()
    for number in range(10):
        histories.see(str(number), START)
    now, seen = START + DAY_S - LEAD_S, []
    for _ in range(4):
        seen += [found.adapter for found in histories.look(now, 3)]
    assert sorted(seen) == [str(number) for number in range(10)]


def test_only_the_adapters_that_were_seen_last_are_kept() -> None:
    """The one that was not seen for longest goes."""
    histories = Histories(max_adapters=3)
    for adapter in ("a", "b", "c", "a", "d"):
        histories.see(adapter, START)
    assert len(histories) == 3
    assert histories.see("b", START + 1) is None
    assert histories.see("a", START + 1) == 1


def test_an_adapter_takes_three_quarters_of_a_kilobyte() -> None:
    """With its name, its histogram and a whole day of activity."""
    count = 200
    tracemalloc.start()
    histories = Histories()
    for number in range(count):
        name = f"tenant-{number % 100}/adapter-{number:06}"
        for bucket in range(0, 300, 7):
            histories.see(name, START + bucket * BUCKET_S)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / count <= BYTES_PER_ADAPTER


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 5 * DAY_S)), max_size=200), st.integers(1, 4))
def test_whatever_is_seen_what_is_expected_is_idle_and_lies_ahead(gaps: list[tuple[str, float]], most: int) -> None:
    """No more adapters are kept than allowed, what is expected was not asked for during FLOOR_S, and ends within four hours."""
    histories, now, seen = Histories(most), 0.0, dict[str, float]()
    for adapter, gap_s in gaps:
        now += gap_s
        for found in histories.look(now, 3):
            assert now - seen[found.adapter] >= FLOOR_S
            assert 0 < found.for_s <= (COUNTERS + 1) * MINUTE_S
        histories.see(adapter, now)
        seen[adapter] = now
        assert len(histories) <= most
