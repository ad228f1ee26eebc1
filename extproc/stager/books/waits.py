"""Whose requests wait here for an adapter: what is fetched or loaded for them is sent to this node's engine when it is there.

A holder waits once for each adapter, however many of its requests do.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping


class Waits:
    """Counts, by holder."""

    def __init__(self) -> None:
        self._of: Counter[str] = Counter()  # without those that wait for nothing

    @contextlib.contextmanager
    def one(self, holder: str) -> Iterator[None]:
        """A call of `holder` waits until the end of the block."""
        self._of[holder] += 1
        try:
            yield
        finally:
            self._of[holder] -= 1
            if not self._of[holder]:
                del self._of[holder]

    def now(self) -> Mapping[str, int]:
        """How many calls wait, by holder."""
        return dict(self._of)
