"""How long things take, as a router sees it: a request in an engine, and another copy of an adapter. A wait is worth what it saves."""

import math

WINDOW_S = 30.0  # what is older counts less and less
LEAST = 32.0  # requests must have ended within it: of fewer the mean says little
USUAL_S = 4.0  # the mean time of a chat completion, of some hundred tokens
NEWEST = 0.2  # weight of the newest of what lasts longer or shorter each time


def smoothed(usual: float, newest: float) -> float:
    """How long something usually lasts, now that it has lasted so long once more."""
    return usual + NEWEST * (newest - usual)


class Service:
    """How long engines compute a request, without its time in their queues, by Little's law: what they run together, over what ends per second.

    What ends is what was sent, less what the engines have more than before.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._have = 0.0
        self._ran_s = self._ended = 0.0  # within the window: requests times seconds, and requests

    def look(self, now: float, running: float, have: float, sent: float) -> None:
        """Of all engines together: requests that they run, and that they have with those in their queues; `sent` since the last look, by all routers."""
        if self._at is not None:
            keeps = math.exp((self._at - now) / WINDOW_S)
            self._ran_s = keeps * self._ran_s + (now - self._at) * running
            self._ended = keeps * self._ended + sent - (have - self._have)
        self._at, self._have = now, have

    @property
    def mean_s(self) -> float:
        """Seconds per request; USUAL_S until enough have ended."""
        return self._ran_s / self._ended if self._ended >= LEAST else USUAL_S


class Copying:
    """How long another copy of an adapter takes that some node has: in seconds, until the node answers that its engine knows it."""

    def __init__(self, load_s: float = 0.5, fetch_s: float = 1.0) -> None:
        self.load_s = load_s  # from the node's disk into its engine's memory
        self.fetch_s = fetch_s  # to its disk from another node, and then into memory

    def took(self, seconds: float, *, is_fetch: bool) -> None:
        """One was made."""
        if is_fetch:
            self.fetch_s = smoothed(self.fetch_s, seconds)
        else:
            self.load_s = smoothed(self.load_s, seconds)
