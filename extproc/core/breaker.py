"""When to stop asking a server that is down: closed, open for a while, then one caller tries.

| state | a call is allowed | success | failure |
| --- | --- | --- | --- |
| closed | yes | failures = 0 | failures + 1; at `threshold`: open |
| open | no, until its time is over; then half-open | closed | (of a call begun before) stays open |
| half-open | one caller at a time | closed | open, for twice as long |

Pure: `now` is any clock that does not go back, in seconds.
"""

from dataclasses import dataclass

STATES = ("closed", "half-open", "open")


@dataclass(slots=True)
class Breaker:
    """One server's. `threshold` failures in a row open it for `first_s`, then twice as long each time, at most `longest_s`."""

    threshold: int = 5
    first_s: float = 5.0
    longest_s: float = 60.0
    failures: int = 0
    open_until: float = float("-inf")
    state: str = "closed"
    _open_s: float = 0.0

    def allow(self, now: float) -> bool:
        """Whether to call now. In half-open the first who asks is the one who tries; the others wait for what it says."""
        if self.state == "closed":
            return True
        if now < self.open_until:
            return False
        self.state = "half-open"
        self.open_until = now + self.first_s  # should the one who tries never report, another may
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until it is worth asking again."""
        return max(0.0, self.open_until - now) if self.state != "closed" else 0.0

    def succeeded(self) -> None:
        """The server answered, be it with a refusal: it is up."""
        self.failures, self.state, self._open_s = 0, "closed", 0.0

    def failed(self, now: float) -> None:
        """The server did not answer, or said that it cannot."""
        self.failures += 1
        if self.state == "half-open" or (self.state == "closed" and self.failures >= self.threshold):
            self._open_s = min(self.longest_s, self._open_s * 2 or self.first_s)
            self.open_for(now, self._open_s)

    def open_for(self, now: float, seconds: float) -> None:
        """The server itself said when to come back. Obeyed up to `longest_s`."""
        self.state, self.open_until = "open", now + min(seconds, self.longest_s)
