"""The table of an artifact's life: complete, and the only way from one state to the next."""

import itertools

import pytest

from extproc.core.life import MOVES, ImpossibleMoveError, State, moved


def test_every_state_has_its_row_and_leads_to_the_end() -> None:
    """Nothing stays on a node for ever, and what is gone does not come back."""
    assert set(MOVES) == set(State)
    assert MOVES[State.GONE] == frozenset()
    for state in set(State) - {State.GONE}:
        assert State.GONE in MOVES[state]


def test_only_moves_of_the_table_are_made() -> None:
    """To stay as it is is always possible."""
    for before, after in itertools.product(State, State):
        if after is before or after in MOVES[before]:
            assert moved(before, after) is after
        else:
            with pytest.raises(ImpossibleMoveError, match=f"{before.value} cannot become {after.value}"):
                moved(before, after)


def test_nothing_is_settled_that_was_not_unloaded_or_chosen() -> None:
    """The engine was told to forget it first, by the remover or by the exchange of a name."""
    assert {state for state in State if State.SETTLED in MOVES[state]} == {State.UNLOADED, State.LEAVING}
