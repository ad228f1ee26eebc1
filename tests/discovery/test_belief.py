"""What is believed of a source: the table, row by row."""

from extproc.discovery.belief import Belief, Keep, State

from .scripted import found

KEEP = Keep(failed_s=100, empty_s=10)
ONE, TWO = (found("10.0.0.1:8000"),), (found("10.0.0.2:8000"),)


def current(*, keep: Keep = KEEP) -> Belief:
    return Belief(keep).shown(ONE, 0)


def test_what_is_shown_counts_at_once() -> None:
    """From every state."""
    for before in (Belief(KEEP), current(), current().failed(1), current().shown((), 1), current().failed(1).at(200)):
        after = before.shown(TWO, 5)
        assert (after.state, after.endpoints, after.until) == (State.CURRENT, TWO, None)


def test_the_last_good_set_outlives_a_failure_for_its_time() -> None:
    """However often the failure is repeated."""
    failing = current().failed(5).failed(50)
    assert (failing.state, failing.endpoints, failing.until) == (State.FAILING, ONE, 105)
    assert failing.at(104.9) is failing
    assert (failing.at(105).state, failing.at(105).endpoints) == (State.LOST, ())
    assert failing.at(105).failed(106).state is State.LOST


def test_a_set_that_is_suddenly_empty_is_believed_after_its_time() -> None:
    """It may be a pool scaled to zero, or a loss."""
    emptied = current().shown((), 5).shown((), 9)
    assert (emptied.state, emptied.endpoints, emptied.until) == (State.EMPTIED, ONE, 15)
    assert (emptied.at(15).state, emptied.at(15).endpoints) == (State.CURRENT, ())


def test_an_empty_set_that_was_announced_is_believed_at_once() -> None:
    """All were leaving: a pool that is scaled to zero in order."""
    leaving = Belief(KEEP).shown((found("10.0.0.1:8000", leaving=True),), 0)
    assert (leaving.shown((), 1).state, leaving.shown((), 1).endpoints) == (State.CURRENT, ())
    mixed = Belief(KEEP).shown((found("10.0.0.1:8000", leaving=True), *TWO), 0)
    assert mixed.shown((), 1).state is State.EMPTIED


def test_a_failure_after_an_empty_set_does_not_prolong_its_time() -> None:
    """The last word was that there are none; a source that flaps would be kept for ever."""
    assert current().shown((), 5).failed(6).shown((), 7).until == 15


def test_an_empty_set_after_a_failure_has_its_own_time() -> None:
    """The source answers again."""
    assert current().failed(5).shown((), 50).until == 60


def test_a_set_of_an_earlier_process_counts_until_the_source_answers() -> None:
    """And not longer than it would have in that process."""
    restored = Belief(KEEP, State.WAITING, ONE, since=-30)
    assert (restored.endpoints, restored.until) == (ONE, 70)
    assert restored.failed(5).until == 70
    assert restored.at(70).state is State.LOST
    assert (restored.shown((), 5).state, restored.shown((), 5).until) == (State.EMPTIED, 15)


def test_with_nothing_known_none_is_believed_at_once() -> None:
    """There is nothing to keep."""
    for before in (Belief(KEEP), Belief(KEEP).failed(1), current().failed(1).at(200)):
        assert (before.shown((), 500).state, before.shown((), 500).until) == (State.CURRENT, None)


def test_a_time_of_zero_keeps_nothing() -> None:
    """Neither over a failure nor over an empty set."""
    assert current(keep=Keep(0, 0)).failed(5).state is State.LOST
    assert current(keep=Keep(0, 0)).shown((), 5).state is State.CURRENT
    assert current(keep=Keep(0, 0)).shown((), 5).endpoints == ()
