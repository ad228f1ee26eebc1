"""What a peer may cost without getting anywhere, and how long it may be silent, before its connection ends."""

from enum import Enum, auto

from .frames import ENHANCE_YOUR_CALM, ConnectionFault

# Frames that move nothing (empty DATA, WINDOW_UPDATE while nothing waits, PRIORITY, PING, SETTINGS, frames of closed streams). An honest gateway sends
# a few for each message. 10,000 of them within a tick are 2 % of a core at a microsecond each, and no honest gateway's.
MAX_USELESS = 10_000

# Rapid reset (CVE-2023-44487): streams that are opened and reset at once cost their peer nothing, not even one of its MAX_CONCURRENT_STREAMS. Clients of
# an honest gateway hang up after they have waited for a while, and while this process stands still both may arrive in one read, but others are
# served then. So a connection ends when 1,000 streams within 10 s were reset within 50 ms of their opening, unanswered, and were nine in ten of all.
# Who lets every tenth request be answered pays as much for the rest as for honest requests.
RAPID_S = 0.05
MAX_RAPID = 1000
RAPID_WINDOW_S = 10.0
RAPID_SHARE = 0.9

# Keepalive. A peer that has vanished leaves its streams, and the bytes that they hold. Nobody waits for this to be noticed, so being late costs memory
# only, while being wrong costs all requests of a living gateway: it has 2 s to answer, since a loaded machine may well need one. Time is counted in
# ticks and not by a clock: when this process itself stood still, one tick is late, and what the peer said meanwhile is read before the next.
TICK_S = 0.5
PING_AFTER_TICKS = 4  # of silence, while streams are open
DROP_AFTER_TICKS = 8


class Silence(Enum):
    """What to do about it."""

    NONE = auto()
    PING = auto()
    DROP = auto()


class Patience:
    """With one peer. The connection sets `heard`, counts `ended` and `useless`, and takes `useless` back to 0 when the peer sends what is worth a frame."""

    def __init__(self) -> None:
        self.useless = 0  # frames that moved nothing, by their weight
        self._moves = 0  # of the outbox, when that was last looked at
        self._rapid_since = 0.0
        self._rapid = 0  # streams that were reset at once since then
        self.ended = 0  # all streams that ended since then
        self.heard = False  # anything, since the last tick
        self._silent_ticks = 0

    def judge(self, sent: int) -> None:
        """`useless` is over MAX_USELESS. `sent` counts what this peer was sent so far: if that grows, its window updates were worth something."""
        if sent == self._moves:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"more than {MAX_USELESS} frames that move nothing")
        self._moves, self.useless = sent, 0

    def reset(self, now: float, opened_at: float) -> None:
        """A stream was reset by its client, unanswered."""
        if now - opened_at > RAPID_S:
            return
        if now - self._rapid_since > RAPID_WINDOW_S:
            self._rapid_since, self._rapid, self.ended = now, 0, 1
        self._rapid += 1
        if self._rapid >= MAX_RAPID and self._rapid >= RAPID_SHARE * self.ended:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"{self._rapid} of {self.ended} streams were reset as soon as they were opened")

    def tick(self, has_streams: bool) -> Silence:
        """TICK_S have passed."""
        self.useless = 0
        if self.heard or not has_streams:
            self.heard, self._silent_ticks = False, 0
            return Silence.NONE
        self._silent_ticks += 1
        if self._silent_ticks >= DROP_AFTER_TICKS:
            return Silence.DROP
        return Silence.PING if self._silent_ticks == PING_AFTER_TICKS else Silence.NONE
