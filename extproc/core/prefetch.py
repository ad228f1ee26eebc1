"""When an adapter that is idle will probably be asked for again, by how long it was idle before and by what it did at this time yesterday.

The policy of "Serverless in the Wild" (Shahrad et al., ATC 2020): each adapter has a histogram of its idle times, COUNTERS of one minute.

| what an adapter's past says | expected |
| --- | --- |
| its idle times repeat | from their HEAD percentile, less a margin, to their TAIL percentile |
| it was active at this time yesterday | from LEAD_S before that time, for half an hour |
| neither | not at all |

An idle time is what lies between two sightings, from FLOOR_S on: an adapter that is asked for again sooner is still leased. The same sightings are what
the next wait is counted from, so that an observer who misses some requests of a burst errs by the same amount on both sides, and predicts well.

Idle times "repeat" where the counters vary by more than chance. The paper wants their coefficient of variation to be 2; but of 240 counters most are zero,
so that any 47 idle times, no two alike, pass. Therefore the counters' variance must be REPEATS times their mean, too: idle times that fall anywhere have a
ratio of 1, however many they are. Three equal ones suffice, ten suffice where they spread over ten minutes.

The second rule is for days: what wakes up after a night was idle for longer than the histogram. Measured on ServeGen's two weeks, 56-66 % of the wake-ups
after an hour are of adapters that were active within ten minutes of that time on one of the two days before, and a quarter to a third of what was active
yesterday wakes up: good enough for a disk, which is cheap, and not for an engine's memory. On the trace of tests/bench/prefetch.py the day before
yesterday would add a tenth to what is found and a third to what is brought, so it is left out.
"""

from dataclasses import dataclass
from enum import Enum

from .maglev import MAX_KEY_CHARS

COUNTERS = 240  # of one minute each, as in the paper
FLOOR_S = 300.0  # `stager.lease_s`: what is idle for less is where it was
MINUTE_S = 60.0
HEAD, TAIL = 0.05, 0.99  # percentiles, as in the paper
MARGIN = 0.1  # of the head, as in the paper,
MARGIN_S = 120.0  # and at least the counter's own width and the minute between two looks at an adapter
REPEATS = 2.0
VARIATION = 2.0  # of the counters, as in the paper
MOST = 200  # idle times in one histogram: then all are halved, so that a counter fits into a byte, and what was long ago counts less
MAX_ADAPTERS = 16_384  # the ones seen last; with all they need 12 MB

BUCKET_S = 600.0  # in which an adapter was active, or was not
DAY = 144  # buckets
REMEMBERED = DAY + 2  # buckets of which that is known
LEAD_S = 600.0
YESTERDAY_S = 1800.0  # the time of yesterday and ten minutes on both sides


class By(Enum):
    """What an expectation rests on."""

    __hash__ = object.__hash__  # members are compared by identity

    IDLE_TIMES = "idle_times"
    YESTERDAY = "yesterday"


@dataclass(frozen=True, slots=True)
class Expected:
    """An adapter that will probably be asked for within `for_s` seconds. `key`: by what its requests are hashed."""

    adapter: str
    key: str
    for_s: float
    by: By


class History:
    """One adapter's. Times are the caller's clock, in seconds, which need not be the time of day."""

    __slots__ = ("_better_than_said", "_bucket", "_counters", "_days", "_longer", "_said_until", "_window", "key", "seen_at")

    def __init__(self, now: float) -> None:
        self.seen_at = now
        self.key = ""  # "": the adapter's name
        self._counters: bytearray | None = None  # none before the first idle time, as most adapters
        self._longer = 0  # idle times beyond the counters
        self._window: tuple[int, int] | None = None  # minutes of idleness between which it is expected
        self._said_until = 0.0  # what was expected last holds until then,
        self._better_than_said: By | None = None  # unless this is expected
        self._bucket = int(now // BUCKET_S)  # of the last sighting
        self._days = 1  # bit k: active k buckets before that

    def see(self, now: float) -> float:
        """It is asked for; seconds since it was the last time."""
        idle_s, self.seen_at = now - self.seen_at, now
        bucket = int(now // BUCKET_S)
        if bucket > self._bucket:
            self._days = (self._days << min(bucket - self._bucket, REMEMBERED) | 1) & ((1 << REMEMBERED) - 1)
            self._bucket = bucket
        self._said_until = 0.0
        if idle_s >= FLOOR_S:
            self._count(int(idle_s // MINUTE_S))
        return idle_s

    def expected(self, now: float) -> tuple[float, By] | None:
        """For how many seconds from now on it will probably be asked for, and why; None: not now, or that was said already."""
        idle_s = now - self.seen_at
        if idle_s < FLOOR_S:
            return None
        for_s, by = self._left_of_window_s(idle_s), By.IDLE_TIMES
        if for_s <= 0:
            if not self._was_active(int((now + LEAD_S) // BUCKET_S) - DAY):
                return None
            for_s, by = YESTERDAY_S, By.YESTERDAY
        if now < self._said_until and by is not self._better_than_said:
            return None
        self._said_until = now + for_s
        self._better_than_said = By.IDLE_TIMES if by is By.YESTERDAY else None
        return for_s, by

    def not_done(self) -> None:
        """Nothing came of what was expected: say so again at the next look."""
        self._said_until = 0.0

    def _count(self, minutes: int) -> None:
        if minutes >= COUNTERS:
            self._longer += 1
        else:
            self._counters = self._counters or bytearray(COUNTERS)
            self._counters[minutes] += 1
        if self._counters is None:
            return
        if sum(self._counters) + self._longer >= MOST:
            self._counters = bytearray(count // 2 for count in self._counters)
            self._longer //= 2
        self._window = self._window_of(self._counters)

    def _window_of(self, counters: bytearray) -> tuple[int, int] | None:
        total = sum(counters)
        if not total or self._longer > total:
            return None
        mean = total / COUNTERS
        variance = sum(count * count for count in counters) / COUNTERS - mean * mean
        if variance < REPEATS * mean or variance < (VARIATION * mean) ** 2:
            return None
        return _percentile(counters, HEAD * total), _percentile(counters, TAIL * total)

    def _left_of_window_s(self, idle_s: float) -> float:
        """For how long an adapter that is idle for so long is expected because of its idle times; not at all at 0 or below."""
        if self._window is None:
            return 0.0
        head_s, tail_s = (minutes * MINUTE_S for minutes in self._window)
        return tail_s + MINUTE_S - idle_s if idle_s >= head_s - max(MARGIN * head_s, MARGIN_S) else 0.0

    def _was_active(self, bucket: int) -> bool:
        """In that bucket, the one before or the one after it."""
        before = self._bucket - bucket
        return before >= -1 and (self._days << 2) >> (before + 1) & 0b111 != 0


class Histories:
    """Of the adapters that were seen last. `look` is to be called often, for a part of them each time."""

    def __init__(self, max_adapters: int = MAX_ADAPTERS) -> None:
        self._max_adapters = max_adapters
        self._of: dict[str, History] = {}  # the one that was seen longest ago first
        self._round: list[str] = []  # adapters that are still to be looked at before any is again

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._of

    def see(self, adapter: str, now: float, key: str = "") -> float | None:
        """It is asked for, hashed by `key` (empty: not known); seconds since it was the last time, None if that is not known."""
        history, idle_s = self._of.pop(adapter, None), None
        if history is None:
            if len(self._of) >= self._max_adapters:
                del self._of[next(iter(self._of))]
            history = History(now)
        else:
            idle_s = history.see(now)
        self._of[adapter] = history
        if key and key != adapter and len(key) <= MAX_KEY_CHARS:
            history.key = key
        return idle_s

    def look(self, now: float, count: int) -> list[Expected]:
        """Look at the next `count` adapters, the one that is idle for longest first; those that are expected from now on."""
        found = []
        for _ in range(min(count, len(self._of))):
            if not self._round:
                self._round = list(reversed(self._of))
            adapter = self._round.pop()
            history = self._of.get(adapter)
            expected = history.expected(now) if history is not None else None
            if history is not None and expected is not None:
                found.append(Expected(adapter, history.key or adapter, *expected))
        return found

    def forget(self, adapter: str) -> None:
        """It is asked for no more, or would be in vain."""
        self._of.pop(adapter, None)

    def not_done(self, adapter: str) -> None:
        """Nothing came of what was expected of it: say so again when it is looked at the next time."""
        history = self._of.get(adapter)
        if history is not None:
            history.not_done()


def _percentile(counters: bytearray, wanted: float) -> int:
    """The first minute by which so many of the idle times are over."""
    below = 0
    for minute, count in enumerate(counters):
        below += count
        if below >= wanted:
            return minute
    return COUNTERS - 1
