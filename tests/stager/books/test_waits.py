"""Whose calls wait here, and for how long they count."""

from extproc.core.load import HELD_S
from extproc.stager.books.waits import Waits


def test_calls_are_counted_by_their_holders_until_they_end() -> None:
    """Two of one holder are two: it waits once for each adapter."""
    waits = Waits(lambda: 0.0)
    with waits.one("a"):
        with waits.one("a"), waits.one("b"):
            assert waits.now() == {"a": 2, "b": 1}
        assert waits.now() == {"a": 1}
    assert waits.now() == {}


def test_a_wait_that_lasts_counts_no_longer() -> None:
    """Of an origin that hangs nobody knows when anything will come of it. A later wait counts beside it."""
    now = 0.0
    waits = Waits(lambda: now)
    with waits.one("a"):
        now = HELD_S
        assert waits.now() == {"a": 1}
        with waits.one("b"):
            now = HELD_S + 0.1
            assert waits.now() == {"b": 1}
    assert waits.now() == {}
