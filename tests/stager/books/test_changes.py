"""What watchers are told, and what is kept for those who come back."""

import pytest

from extproc.stager.books import changes as module


def test_wake_ups_are_told_to_who_follows_them_and_leave_the_changes_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no number, none is kept, and what a watcher does not read is at most half of what it may leave unread."""
    monkeypatch.setattr(module, "KEPT", 3)
    changes = module.Changes()
    with changes.since(0, wakes=True) as (following, _), changes.since(0) as (other, _):
        for number in range(5):
            changes.woken(f"acme/{number}")
        for _ in range(3):
            changes.tell("published", "acme/a")
        assert [following.get_nowait() for _ in range(following.qsize())] == [
            *(module.Change(0, "woken", f"acme/{number}") for number in range(3)),
            *(module.Change(number, "published", "acme/a") for number in (1, 2, 3)),
        ]
        assert other.qsize() == 3
    changes.woken("acme/a")
    assert following.empty()
