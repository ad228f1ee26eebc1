"""When to stop asking a server that is down: closed, open for a while, then one caller (or a probe) tries.

| state | a call is allowed | success | not reached | failed for one name |
| --- | --- | --- | --- | --- |
| closed | yes | counts begin anew | at `threshold` in a row: open | at `names` different names within `window_s`: open |
| open | no, until its time is over; then half-open | closed, unless the server asked for the time | stays open | stays open |
| half-open | one caller at a time | closed | open, for twice as long | open, for twice as long |

A server that answers badly for one object alone is up: whoever asks for that object again and again must not close the way to all others.

Pure: `now` is any clock that does not go back, in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

STATES = ("closed", "half-open", "open")
LONGEST_ASKED_S = 3600.0  # what a server asks for is obeyed up to this: none may switch itself off for a day


def _whole() -> float:
    return 1.0


@dataclass(slots=True)
class Breaker:
    """One server's. `threshold` failures to reach it in a row, or failures for `names` different names within `window_s` without a success in between, open
    it for `first_s`, then twice as long each time, at most `longest_s`; each time is multiplied by `jitter()`, which is above 0 and 1 at most. `names` 0: what it says of one name never opens it.
    """

    threshold: int = 5
    names: int = 3
    window_s: float = 60.0
    first_s: float = 0.5
    longest_s: float = 2.5  # with a probe's own 2 s a server that is well again is used within 5 s
    jitter: Callable[[], float] = field(default=_whole, compare=False)
    failures: int = 0  # to reach it, in a row
    open_until: float = float("-inf")
    state: str = "closed"
    _failed: dict[str, float] = field(default_factory=dict)  # name -> when it failed; `names` at most
    _asked_until: float = float("-inf")  # what the server itself asked for
    _open_s: float = 0.0

    def allow(self, now: float) -> bool:
        """Whether to call now. In half-open the first who asks is the one who tries; the others wait for what comes of that."""
        if self.state == "closed":
            return True
        if now < self.open_until:
            return False
        self.state = "half-open"
        self.open_until = now + self.longest_s  # should the one who tries never report, another may
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until it is worth asking again."""
        return max(0.0, self.open_until - now) if self.state != "closed" else 0.0

    def succeeded(self, now: float) -> None:
        """The server answered, be it with a refusal: it is up. What it asked for itself is kept all the same: the call may have begun before."""
        self.failures = 0
        self._failed.clear()
        if now >= self._asked_until:
            self.state, self._open_s = "closed", 0.0

    def not_reached(self, now: float) -> None:
        """No connection came about."""
        self.failures += 1
        self._count(now, self.failures >= self.threshold)

    def failed(self, now: float, name: str) -> None:
        """It said of `name` that it cannot, or did not finish its answer."""
        self._failed = {other: at for other, at in self._failed.items() if at > now - self.window_s}
        if name in self._failed or len(self._failed) < self.names:
            self._failed[name] = now
        self._count(now, 0 < self.names <= len(self._failed))

    def found_down(self, now: float) -> None:
        """A probe of the whole server failed."""
        self._count(now, opens=True)

    def open_for(self, now: float, seconds: float) -> None:
        """The server itself said when to come back."""
        self.state = "open"
        self.open_until = self._asked_until = max(self._asked_until, now + min(seconds, LONGEST_ASKED_S))

    def _count(self, now: float, opens: bool) -> None:
        if self.state == "half-open" or (self.state == "closed" and opens):
            self._open_s = min(self.longest_s, self._open_s * 2 or self.first_s)
            self.state, self.open_until = "open", now + self._open_s * self.jitter()
