"""The engine's memory as it is followed from outside: what was loaded or used last is there, and no more than it has slots for."""

from extproc.stager.engine.resident import Resident


def test_as_many_names_are_in_memory_as_there_are_slots() -> None:
    """The least recently used falls out, and each call says what moved."""
    resident = Resident()
    assert [resident.used(name, 2) for name in "abc"] == [["a"], ["b"], ["c", "a"]]
    assert [name in resident for name in "abc"] == [False, True, True]


def test_a_name_that_is_used_again_stays() -> None:
    """A load is not the only use: a request keeps its adapter in memory."""
    resident = Resident()
    for name in "ab":
        resident.used(name, 2)
    assert resident.used("a", 2) == []
    assert resident.used("c", 2) == ["c", "b"]


def test_without_a_known_number_of_slots_names_are_bounded_all_the_same() -> None:
    """By a limit of our own."""
    resident = Resident(max_names=3)
    for number in range(10):
        resident.used(str(number), 0)
    assert len(resident) == 3
    assert "9" in resident


def test_what_no_slot_is_left_for_falls_out_once_the_number_is_learned() -> None:
    """An engine says how many slots it has after the first adapter has run."""
    resident = Resident()
    for name in "abcd":
        resident.used(name, 0)
    assert resident.trim(0) == []
    assert resident.trim(1) == ["a", "b", "c"]


def test_a_dropped_name_gives_its_place_back() -> None:
    """What an engine has lost takes no slot from what it loads next."""
    resident = Resident()
    for name in "ab":
        resident.used(name, 2)
    resident.drop("b")
    resident.drop("never there")
    assert resident.used("c", 2) == ["c"]


def test_what_falls_out_next_is_what_was_used_longest_ago() -> None:
    """Nothing, while there is room for one more."""
    resident = Resident(max_names=3)
    for name in "ab":
        resident.used(name, 3)
    assert resident.next_out(3) is None
    assert resident.next_out(2) == "a"
    resident.used("a", 3)
    assert resident.next_out(2) == "b"
    resident.used("c", 0)
    assert resident.next_out(0) == "b"
