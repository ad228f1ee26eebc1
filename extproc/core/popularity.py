"""Which adapters are asked for most: the order in which copies are prepared, and what is hot enough for a spare one.

Requests are counted in windows; what counts is the last window and the one before it, so that a rank needs no clock and old fame ends. What does not
fit into a window is not counted: by then so many others were asked for that it is not among the hottest.
"""

from heapq import nlargest

from .maglev import MAX_KEY_CHARS

MAX_COUNTED = 32_768  # adapters per window, some 5 MB
HOT_SHARE = 10  # one in so many of the adapters that are asked for is hot: by Zipf 1.0 of 2,000, three quarters of the requests
STAYS_HOT = 1.5  # an adapter that is hot stays so within this many times that rank, so that nothing is copied because of noise


class Popularity:
    """Of one router's requests."""

    def __init__(self) -> None:
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}
        self._keys: dict[str, str] = {}  # adapter -> its key, where that is another text
        self.hottest: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self._now) + len(self._before)

    def count(self, adapter: str, key: str) -> None:
        """One request for it, hashed by `key`."""
        times = self._now.get(adapter)
        if times is None and len(self._now) >= MAX_COUNTED:
            return
        self._now[adapter] = (times or 0) + 1
        if key != adapter and len(key) <= MAX_KEY_CHARS:
            self._keys[adapter] = key

    def roll(self) -> None:
        """Begin the next window, and say anew what is hot. It sorts: some 20 ms for full windows, to be done in a thread."""
        ranked = [adapter for adapter, _ in self.ranked()]
        hot = max(1, len(ranked) // HOT_SHARE) if ranked else 0
        stays = self.hottest.intersection(ranked[: int(STAYS_HOT * hot)])
        self.hottest = stays.union(ranked[:hot])
        self._before, self._now = self._now, {}
        keys = self._keys
        self._keys = {adapter: keys[adapter] for adapter in self._before if adapter in keys}

    def ranked(self, most: int = 2 * MAX_COUNTED) -> list[tuple[str, int]]:
        """The adapters that were asked for most, and how often."""
        counts = dict(self._before)
        for adapter, times in tuple(self._now.items()):
            counts[adapter] = counts.get(adapter, 0) + times
        return nlargest(most, counts.items(), key=lambda item: item[1])

    def key(self, adapter: str) -> str:
        """By what its requests are hashed: the key of the last one."""
        return self._keys.get(adapter, adapter)
