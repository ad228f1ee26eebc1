"""Numbers that workers share: each row is its own, and limits are of all rows."""

import contextlib
from collections.abc import Iterator

import pytest

from extproc.errors import LoraExtprocError, Overloaded
from extproc.metrics import RouterMetrics
from extproc.router.admission import Admission
from extproc.router.board import Board, State


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.of(3)
    yield board
    board.close()


def admission(board: Board, worker: int) -> Admission:
    """Of one worker, with room for 3 waits, 2 for one adapter, and 100 bytes."""
    return Admission(RouterMetrics(), max_waiting=3, max_waiting_per_adapter=2, max_bytes=100, body_deadline_s=1.0, row=board.row(worker))


def test_a_child_sees_the_same_numbers(board: Board) -> None:
    """The memory file is what is shared, whoever maps it."""
    board.row(1).become(State.SERVING)
    board.row(1).beat()
    again = Board(board.file)
    assert again.workers == 3
    assert [(again.row(n).state, again.row(n).beats) for n in range(3)] == [(State.STARTING, 0), (State.SERVING, 1), (State.STARTING, 0)]


def test_connections_that_came_after_the_count_are_told_apart(board: Board) -> None:
    """Whoever gives them away adds them to what was counted."""
    row = board.row(0)
    row.take()
    row.count(1, 0)
    row.take()
    assert (row.taken, row.counted, row.connections, row.busy) == (2, 1, 1, 0)


def test_the_limit_of_waits_is_of_all_workers(board: Board) -> None:
    """In all and per adapter; who ends gives its place back."""
    one, other = admission(board, 0), admission(board, 1)
    with one.waiting("a"), other.waiting("a"):
        with pytest.raises(Overloaded, match="2 requests wait for a; the limit is 2"), other.waiting("a"):
            pass
        with one.waiting("b"), pytest.raises(Overloaded, match="3 requests wait; the limit is 3"), other.waiting("c"):
            pass
    with other.waiting("a"), other.waiting("a"):
        pass


def test_a_worker_that_has_ended_holds_nothing(board: Board) -> None:
    """Its row is cleared, and the others have its places."""
    with contextlib.ExitStack() as lost:
        lost.enter_context(admission(board, 0).waiting("a"))
        lost.enter_context(admission(board, 0).waiting("a"))
        board.row(0).hold(90)
        board.clear(0)
        with admission(board, 1).waiting("a"):
            assert board.row(1).all_waiting() == 1
        assert board.row(1).hold(7) == 7


class Body:
    """A holder that is told to let go."""

    def __init__(self, admission: Admission) -> None:
        self.held_bytes = 0
        self.arrives_since = self.arrived_last = 0.0
        self.refused: LoraExtprocError | None = None
        self._admission = admission

    def refuse(self, error: LoraExtprocError) -> None:
        self.refused = error
        self._admission.change_bytes(self, -self.held_bytes)


def test_the_limit_of_bytes_is_of_all_workers(board: Board) -> None:
    """The worker that goes over it refuses the oldest of its own."""
    one, other = admission(board, 0), admission(board, 1)
    elsewhere, old, new = Body(one), Body(other), Body(other)
    one.change_bytes(elsewhere, 60)
    for body in (old, new):
        other.arrives(body)
        other.change_bytes(body, 30)
    assert old.refused is not None
    assert (elsewhere.refused, new.refused) == (None, None)
    assert board.row(2).hold(0) == 90
