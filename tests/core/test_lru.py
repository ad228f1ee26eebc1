"""The byte-bounded index: what it counts, whom it chooses, and that a sequence of any calls keeps the books right."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from extproc.core.blocks import BLOCK_BYTES, on_disk
from extproc.core.life import ImpossibleMoveError, State
from extproc.core.lru import MAX_HOLDERS, OTHERS, Entry, Hold, Index
from extproc.errors import AdapterTooLarge, NoSpace

B = BLOCK_BYTES


def filled(*ids: str, blocks: int = 10) -> Index[str]:
    """An index of `blocks` blocks with one block under each id, used at 1, 2, 3 ..."""
    index = Index[str](blocks * B)
    for now, id_ in enumerate(ids, 1):
        index.add(id_, B, now)
    return index


def books(index: Index[str]) -> tuple[object, ...]:
    return index.used_bytes, index.reserved_bytes, [(e.id, e.size, e.last_used, e.leased_until, e.pinned, e.leaving) for e in index.entries()]


# ---- counting


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, B), (B - 1, B), (B, B), (B + 1, 2 * B), (10 * B, 10 * B)])
def test_bytes_are_counted_as_the_disk_does(size: int, taken: int) -> None:
    """In whole blocks."""
    assert on_disk(size) == taken


def test_room_is_reserved_then_taken() -> None:
    """Bytes count from the moment they are reserved, once."""
    index = Index[str](10 * B)
    assert index.reserve("flight", 3 * B - 1, 1) == []
    assert (index.used_bytes, index.reserved_bytes) == (0, 3 * B)
    index.commit("flight", "a", 2 * B, 2)
    assert (index.used_bytes, index.reserved_bytes) == (2 * B, 0)
    assert "a" in index
    assert len(index) == 1


def test_an_aborted_reservation_leaves_nothing() -> None:
    """Aborting what is not reserved, or no longer, is no error: the caller aborts on every way out."""
    index = Index[str](10 * B)
    index.reserve("flight", B, 1)
    index.abort("flight")
    index.abort("flight")
    index.abort("never")
    assert books(index) == (0, 0, [])


def test_content_that_was_there_already_is_counted_once() -> None:
    """Two names may lead to equal content."""
    index = filled("a")
    index.reserve("flight", B, 2)
    index.commit("flight", "a", B, 3)
    assert (index.used_bytes, index.reserved_bytes, len(index)) == (B, 0, 1)
    assert index.entries()[0].last_used == 3


def test_removed_bytes_are_free() -> None:
    """And removing what is not there is no error."""
    index = filled("a", "b")
    index.removed("a")
    index.removed("a")
    index.removed("never")
    assert (index.used_bytes, len(index)) == (B, 1)


def test_a_second_reservation_adds_to_the_first_and_may_be_given_back() -> None:
    """An archive, then what is in it: if there is no room for that, the room for the archive is still held."""
    index = Index[str](10 * B)
    index.reserve("flight", B, 1)
    before = index.reserved_by("flight")
    index.reserve("flight", 2 * B - 1, 1)
    assert (index.reserved_by("flight"), index.reserved_bytes) == (3 * B, 3 * B)
    index.give_back("flight", before)
    assert (index.reserved_by("flight"), index.reserved_bytes) == (B, B)
    index.commit("flight", "a", B, 2)
    assert (index.used_bytes, index.reserved_bytes, index.reserved_by("flight")) == (B, 0, 0)


def test_giving_back_all_or_of_nothing_leaves_nothing() -> None:
    """As a flight does whose first reservation came to nothing; another's is not touched."""
    index = Index[str](10 * B)
    index.reserve("other", B, 1)
    index.give_back("flight", 0)
    index.reserve("flight", B, 1)
    index.give_back("flight", 0)
    assert (index.reserved_by("flight"), index.reserved_by("other"), index.reserved_bytes) == (0, B, B)
    index.abort("flight")
    assert index.reserved_bytes == B


def test_what_others_put_there_counts() -> None:
    """As long as it is there."""
    index = filled("a")
    index.add("theirs", 3 * B, 2, keep=True)
    assert index.used_bytes == 4 * B
    index.removed("theirs")
    assert index.used_bytes == B


def test_the_index_shows_its_books() -> None:
    """For logs and debuggers."""
    index = filled("a")
    index.reserve("flight", 2 * B, 1)
    assert repr(index) == "<Index 1 artifacts, 4096 used + 8192 reserved of 40960 bytes>"


# ---- what nobody has asked for yet


def test_what_nobody_has_asked_for_goes_first_the_one_whose_time_is_over_first() -> None:
    """However late it came; what somebody has asked for since has its own place."""
    index = filled("a", "b", "c", "d", blocks=4)
    for id_, until in (("b", 90.0), ("c", 70.0), ("d", 80.0)):
        index.expect(id_, until)
    index.lease("b", until=10, now=9)
    assert [index.is_expected(id_) for id_ in "abcd"] == [False, False, True, True]
    assert [entry.id for entry in index.next_to_go(9, 20)] == ["c", "d", "a", "b"]
    assert index.surplus(3 * B, 20) == ["c"]
    index.kept("c")
    assert index.reserve("flight", 3 * B, 20) == ["c", "d", "a"]


def test_it_takes_room_that_is_free_below_a_limit_or_expected_no_longer() -> None:
    """And nothing else: then nothing has changed."""
    index = filled("a", "b", blocks=6)
    assert index.reserve_free("flight", B, 10, 4 * B) == []
    index.commit("flight", "c", B, 10)
    index.expect("c", 20.0)
    assert index.reserve_free("other", B, 10, 4 * B) == []
    before = books(index)
    for now in (15, 20):
        index.pin("c", pinned=now == 20)
        with pytest.raises(NoSpace, match="0 of 16384 are free for what nobody asks for yet"):
            index.reserve_free("third", B, now, 4 * B)
    index.pin("c", pinned=False)
    assert books(index) == before
    assert index.reserve_free("third", B, 20, 4 * B) == ["c"]
    index.removed("c")
    assert not index.is_expected("c")


def test_as_many_as_a_node_brings_in_the_time_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more the first counts as used when it came; what is not there is not expected."""
    monkeypatch.setattr("extproc.core.lru.MAX_EXPECTED", 2)
    index = filled("a", "b", "c")
    for id_ in ("a", "b", "c", "never"):
        index.expect(id_, 10.0)
    assert [index.is_expected(id_) for id_ in ("a", "b", "c", "never")] == [False, True, True, False]


# ---- choosing


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    """A lease and a touch count as use."""
    index = filled("a", "b", "c", "d", blocks=4)
    index.lease("a", until=5, now=5)
    index.touch("b", 6)
    assert index.reserve("flight", 2 * B, 7) == ["c", "d"]
    assert [e.id for e in index.entries() if e.leaving] == ["c", "d"]


def test_free_room_is_used_before_anybody_goes() -> None:
    """What is reserved is not free."""
    index = filled("a", "b", blocks=4)
    assert index.reserve("one", 2 * B, 3) == []
    assert index.reserve("two", B, 4) == ["a"]


@pytest.mark.parametrize("hold", ["lease", "pin", "keep"])
def test_what_is_held_does_not_go(hold: str) -> None:
    """The next in order does."""
    index = Index[str](2 * B)
    index.add("a", B, 1, keep=hold == "keep")
    index.add("b", B, 2)
    if hold == "lease":
        assert index.lease("a", until=100, now=3)
        index.touch("b", 4)
    elif hold == "pin":
        index.pin("a", pinned=True)
    assert index.surplus(B, 5) == ["b"]
    index.kept("b")
    index.touch("a", 6)
    assert index.reserve("flight", B, 7) == ["b"]


def test_a_pin_ends_when_it_is_taken_away() -> None:
    """And pinning what is not there is no error: it is pinned when it comes, by who knows the names."""
    index = filled("a", blocks=1)
    index.pin("never", pinned=True)
    index.pin("a", pinned=True)
    with pytest.raises(NoSpace):
        index.reserve("flight", B, 2)
    index.pin("a", pinned=False)
    assert index.reserve("flight", B, 2) == ["a"]


def test_a_lease_ends_at_its_end() -> None:
    """Until then the artifact stays; at that very moment it may go."""
    index = filled("a", blocks=1)
    index.lease("a", until=100, now=1)
    with pytest.raises(NoSpace):
        index.reserve("flight", B, 99.9)
    assert index.reserve("flight", B, 100) == ["a"]


def test_a_shorter_lease_does_not_shorten_a_longer_one() -> None:
    """Another router was promised the longer one."""
    index = filled("a", blocks=1)
    index.lease("a", until=100, now=1)
    index.lease("a", until=50, now=2)
    assert index.entries()[0].leased_until == 100


def test_each_holder_has_a_lease_of_its_own() -> None:
    """The artifact stays until the last ends; giving one back takes nothing from another."""
    index = filled("a", "b", blocks=2)
    for holder, id_, until in (("one", "a", 100), ("two", "a", 50), ("one", "b", 100)):
        assert index.lease(id_, until, 3, holder)
    assert index.entries()[0].leased_until == 100
    assert index.release("one", "a") == 1
    assert [entry.leased_until for entry in index.entries()] == [50, 100]
    assert index.release("one", "a") == 0
    assert index.release("one") == 1
    assert index.release("two", "never") == 0
    assert index.release("stranger") == 0
    with pytest.raises(NoSpace):
        index.reserve("flight", 2 * B, 49)
    assert index.release("two") == 1
    assert index.reserve("flight", 2 * B, 49) == ["a", "b"]
    assert all(entry.leased_until == float("-inf") for entry in index.entries())


def test_leases_that_ended_are_not_kept_for_ever() -> None:
    """Routers come and go under new names."""
    index = filled("a")
    for number in range(10 * MAX_HOLDERS):
        index.lease("a", until=number + 1, now=number, holder=f"router {number}")
    entry = index.entries()[0]
    assert len(entry.leases or ()) <= MAX_HOLDERS
    assert entry.leased_until == 10 * MAX_HOLDERS


def test_leases_that_end_out_of_order_end_the_demand_each_in_its_time() -> None:
    """A later lease prolongs it, one that is given back shortens it to the next, and what is removed is in nobody's demand."""
    index = filled("a", "b", "c")
    for holder, id_, until in (("one", "a", 100), ("two", "a", 60), ("one", "b", 50), ("one", "c", 200)):
        index.lease(id_, until, 3, holder)
    index.lease("b", 80, 4, "one")
    index.release("one", "a")
    assert [index.in_demand(now) for now in (49, 59, 60, 79, 80)] == [3, 3, 2, 2, 1]
    assert index.leave("c", 81, force=True)
    assert index.in_demand(81) == 1
    index.removed("c")
    assert index.in_demand(82) == 0


def test_the_demand_is_counted_by_what_ends_and_not_by_what_is_there() -> None:
    """Two thousand that a start has just found, and half of them leased: while none ends, no artifact is looked at."""
    index = filled(*(f"found {number}" for number in range(2_000)))
    for number in range(0, 2_000, 2):
        index.lease(f"found {number}", until=300, now=1, holder="router")
    looked = 0

    class Counted(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            nonlocal looked
            looked += 1
            return super().__getitem__(key)

        def values(self) -> Any:
            raise AssertionError("all are looked at")

    index._entries = Counted(index._entries)
    assert [index.in_demand(now) for now in (2, 100, 299)] == [1_000] * 3
    assert looked == 0
    assert index.in_demand(300) == 0


def test_holders_beyond_those_that_are_told_apart_share_a_lease_that_none_can_give_back() -> None:
    """Thousands of names that a caller made up take no memory; what each was promised holds."""
    index = filled("a", blocks=1)
    for number in range(3 * MAX_HOLDERS):
        assert index.lease("a", until=100 + number, now=1, holder=f"caller {number}")
    entry = index.entries()[0]
    assert len(entry.leases or ()) == MAX_HOLDERS + 1
    assert sum(index.release(f"caller {number}") for number in range(3 * MAX_HOLDERS)) == MAX_HOLDERS
    assert index.release(OTHERS) == 0
    assert entry.leased_until == 100 + 3 * MAX_HOLDERS - 1


def test_a_lease_without_a_holder_is_given_back_by_nobody() -> None:
    """It may be anybody's: one caller would end what another relies on."""
    index = filled("a")
    index.lease("a", until=100, now=1)
    assert index.release("") == index.release("", "a") == 0
    assert index.is_leased("a", 99)


def test_what_is_read_stays_and_does_not_count_as_used() -> None:
    """A peer's read is no demand: order and demand are as before. Force does not wait for it."""
    index = filled("a", "b", blocks=2)
    index.lease("b", until=100, now=3, holder="router")
    assert index.hold("a", Hold.READ)
    assert not index.hold("never", Hold.READ)
    assert [entry.id for entry in index.entries()] == ["a", "b"]
    assert index.in_demand(4) == 1
    assert not index.leave("a", 4)
    with pytest.raises(NoSpace):
        index.reserve("flight", B, 4)
    index.let_go("a", Hold.READ)
    assert index.reserve("flight", B, 4) == ["a"]
    index.kept("a")
    index.hold("a", Hold.READ)
    assert index.leave("a", 5, force=True)
    index.removed("a")
    index.let_go("a", Hold.READ)


def test_over_a_watermark_the_least_recently_used_go_down_to_the_mark() -> None:
    """Whole artifacts, so a little lower; what is reserved counts like what is there; under the mark nobody goes."""
    index = filled("a", "b", "c", "d", blocks=10)
    assert index.surplus(4 * B, 5) == []
    index.reserve("flight", 2 * B, 5)
    assert index.surplus(5 * B - 1, 5) == ["a", "b"]
    assert index.surplus(5 * B - 1, 5) == []
    assert index.surplus(3 * B, 5) == ["c"]


def test_what_leaves_already_is_counted_before_anybody_else_is_chosen() -> None:
    """Wherever it stands: an operator's evict of one that was just in use."""
    index = filled("a", "b", "c")
    assert index.leave("c", 4)
    assert index.surplus(2 * B, 5) == []
    assert index.surplus(B, 5) == ["a"]


def test_a_surplus_that_is_held_stays() -> None:
    """Less goes if that is all that may go."""
    index = filled("a", "b", "c")
    index.lease("a", until=100, now=4)
    index.pin("b", pinned=True)
    assert index.surplus(0, 5) == ["c"]


def test_too_large_for_the_disk_and_no_room_now_are_different() -> None:
    """The one never fits; the other is worth trying again. Neither changes anything."""
    index = filled("a", "b", blocks=3)
    index.lease("a", until=100, now=3)
    before = books(index)
    with pytest.raises(AdapterTooLarge, match="the limit of this node is 12288"):
        index.reserve("flight", 3 * B + 1, 4)
    assert books(index) == before
    with pytest.raises(NoSpace, match="flight needs 12288 bytes; 8192 of 12288 can be freed now"):
        index.reserve("flight", 3 * B, 4)
    assert books(index) == before


def test_the_room_that_is_told_of_is_never_negative() -> None:
    """A node whose limit was lowered starts with more on disk than it may hold."""
    index = filled("a", "b", "c", blocks=1)
    for entry in index.entries():
        index.lease(entry.id, until=100, now=4)
    with pytest.raises(NoSpace) as caught:
        index.reserve("flight", B, 5)
    assert "-" not in str(caught.value)


def test_a_node_over_its_limit_comes_down_to_it() -> None:
    """The next reservation takes out as many as it needs and as were too many."""
    index = filled("a", "b", "c", "d", blocks=2)
    assert index.reserve("flight", B, 5) == ["a", "b", "c"]


# ---- victims


def test_a_victim_cannot_be_leased_and_its_bytes_still_count() -> None:
    """It is neither in nor gone until the caller says which."""
    index = filled("a", blocks=1)
    index.reserve("flight", B, 2)
    assert not index.lease("a", until=100, now=3)
    assert "a" not in index
    assert index.get("a") is None
    assert index.used_bytes == B
    assert len(index) == 1


def test_a_victim_is_not_chosen_twice_for_new_room() -> None:
    """Its bytes are spoken for."""
    index = filled("a", "b", blocks=2)
    assert index.reserve("one", B, 3) == ["a"]
    assert index.reserve("two", B, 3)[-1] == "b"
    with pytest.raises(NoSpace):
        index.reserve("three", B, 3)


def test_who_relies_on_room_that_is_still_taken_is_told_of_its_victim() -> None:
    """One victim makes room for two: both callers must see it gone, or the second fetches onto a disk that is full."""
    index = Index[str](2 * B)
    index.add("a", 2 * B, 1)
    assert index.reserve("one", B, 2) == ["a"]
    assert index.reserve("two", B, 2) == ["a"]


def test_a_victim_that_had_to_stay_keeps_its_place() -> None:
    """Whoever searches for room now passes it over; the next search begins with it again, since it was not used."""
    index = filled("a", "b", "c", blocks=3)
    assert index.reserve("flight", B, 3) == ["a"]
    index.abort("flight")
    index.kept("a")
    assert [(entry.id, entry.last_used) for entry in index.entries()] == [("a", 1), ("b", 2), ("c", 3)]
    assert index.reserve("flight", B, 5, {"a"}) == ["b"]
    index.abort("flight")
    index.kept("b")
    assert index.reserve("flight", B, 5) == ["a"]


def test_one_reservation_has_a_limited_number_of_victims() -> None:
    """Else one large adapter empties a node of small ones."""
    index = filled("a", "b", "c", blocks=3)
    before = books(index)
    with pytest.raises(NoSpace):
        index.reserve("flight", 3 * B, 4, most=2)
    assert books(index) == before
    assert index.reserve("flight", 2 * B, 4, most=2) == ["a", "b"]


def test_while_the_engine_is_busy_only_what_it_does_not_know_is_chosen() -> None:
    """Also what is ready to go; what is unloaded and not settled is as good as known."""
    index = filled("loaded", "unloaded", "ready", "named", blocks=4)
    for id_ in ("loaded", "unloaded", "ready"):
        index.stands(id_, State.LOADED)
    for id_ in ("unloaded", "ready"):
        index.stands(id_, State.UNLOADED)
    index.stands("ready", State.SETTLED)
    assert index.reserve("flight", 2 * B, 5, unread_only=True) == ["ready", "named"]
    with pytest.raises(NoSpace):
        index.reserve("another", B, 5, {"ready", "named"}, unread_only=True)


def test_a_file_system_that_is_smaller_than_the_budget_is_the_limit() -> None:
    """It evicts like one that is full by its budget; what would never fit there may fit when others have made room."""
    index = filled("a", "b", blocks=100)
    index.disk_bytes = 3 * B
    assert index.limit == 3 * B
    assert index.fits
    assert index.reserve("flight", 2 * B, 3) == ["a"]
    with pytest.raises(NoSpace, match="of 12288"):
        index.reserve("another", 4 * B, 3)
    index.disk_bytes = -B
    assert (index.limit, index.fits) == (0, False)
    index.disk_bytes = 1000 * B
    assert index.limit == 100 * B


def test_a_trim_takes_so_many_at_once_and_passes_over_what_stayed() -> None:
    """The rest of the surplus is chosen when those are gone."""
    index = filled("a", "b", "c", "d")
    assert index.surplus(B, 5, most=2) == ["a", "b"]
    index.removed("a")
    index.kept("b")
    assert index.surplus(B, 5, 2, {"b"}) == ["c", "d"]


def test_the_next_to_go_are_those_that_a_search_would_choose() -> None:
    """In its order; nothing is changed."""
    index = filled("a", "b", "c", "d")
    index.lease("a", until=100, now=5)
    index.leave("b", 5)
    before = books(index)
    assert [entry.id for entry in index.next_to_go(5, 6)] == ["c", "d"]
    assert [entry.id for entry in index.next_to_go(1, 6)] == ["c"]
    assert books(index) == before


def test_keeping_what_is_not_there_is_no_error() -> None:
    """It may have been removed by another's wish."""
    index = filled("a")
    index.kept("never")
    assert len(index) == 1


def test_a_victim_by_request_obeys_the_same_holds() -> None:
    """An operator's evict takes nothing that is leased, pinned, leaving or absent."""
    index = filled("a", "b", "c")
    index.lease("a", until=100, now=4)
    index.pin("b", pinned=True)
    index.add("theirs", B, 4, keep=True)
    assert not index.leave("a", 5)
    assert not index.leave("b", 5)
    assert not index.leave("theirs", 5)
    assert not index.leave("never", 5)
    assert index.leave("c", 5)
    assert not index.leave("c", 5)
    assert index.leave("a", 100)


def test_a_victim_by_force_obeys_no_hold() -> None:
    """Purged or damaged: whoever leased or pinned it. What is absent or leaves already is not chosen again."""
    index = filled("a", "b")
    index.lease("a", until=100, now=4)
    index.pin("b", pinned=True)
    index.add("theirs", B, 4, keep=True)
    for id_ in ("a", "b", "theirs"):
        assert index.leave(id_, 5, force=True)
        assert not index.leave(id_, 5, force=True)
    assert not index.leave("never", 5, force=True)
    assert index.used_bytes == 3 * B


def test_what_a_flight_is_at_goes_not_even_by_force() -> None:
    """It is about to get its name, or to lose it to a new version. Two flights let go of it one by one."""
    index = filled("a", "b", blocks=2)
    assert index.hold("a")
    assert index.hold("a")
    assert not index.hold("never")
    for _ in range(2):
        assert not index.leave("a", 3, force=True)
        assert index.surplus(B, 3) == ["b"]
        index.kept("b")
        index.let_go("a")
    index.let_go("never")
    assert index.leave("a", 3)
    assert not index.hold("a")


def test_a_victim_is_leaving_until_it_is_gone_or_kept() -> None:
    """What is not there is not leaving."""
    index = filled("a", "b")
    assert not index.is_leaving("a")
    for id_ in ("a", "b"):
        index.leave(id_, 3)
        assert index.is_leaving(id_)
    index.kept("a")
    index.removed("b")
    assert not any(index.is_leaving(id_) for id_ in ("a", "b", "never"))


def test_a_new_version_inherits_the_leases_of_the_old() -> None:
    """Each holder's, and none is made shorter; who only reads the old one's files does not hold the new."""
    index = filled("old", "new")
    index.lease("old", until=100, now=3, holder="one")
    index.lease("old", until=50, now=3, holder="two")
    index.hold("old", Hold.READ)
    index.lease("new", until=70, now=3, holder="two")
    index.inherit("new", "old")
    new = next(e for e in index.entries() if e.id == "new")
    assert (new.leases, new.reads) == ({"one": 100, "two": 70}, 0)
    before = books(index)
    for heir, from_id in (("new", "new"), ("new", "never"), ("never", "old"), ("old", "never")):
        index.inherit(heir, from_id)
    assert books(index) == before


# ---- its life


def test_an_artifact_is_named_loaded_unloaded_settled_and_gone() -> None:
    """A name that comes or goes changes nothing of what the engine knows."""
    index = filled("a")
    states = []
    for step in (
        lambda: index.named("a", has_names=True),
        lambda: index.named("a", has_names=False),
        lambda: index.named("a", has_names=True),
        lambda: index.stands("a", State.LOADED),
        lambda: index.named("a", has_names=False),
        lambda: index.stands("a", State.UNLOADED),
        lambda: index.stands("a", State.SETTLED),
        lambda: index.leave("a", 2),
        lambda: index.stands("a", State.LOADED),
    ):
        step()
        states.append(index.entries()[0].state.value)
    assert states == ["named", "published", "named", "loaded", "loaded", "unloaded", "settled", "leaving", "leaving"]
    entry = index.entries()[0]
    index.removed("a")
    assert entry.state is State.GONE


def test_what_stays_after_all_goes_on_from_where_it_came_to() -> None:
    """By default from where it was when it was chosen."""
    index = filled("a")
    index.stands("a", State.LOADED)
    for said, found in ((None, State.LOADED), (State.UNLOADED, State.UNLOADED), (State.SETTLED, State.SETTLED)):
        assert index.leave("a", 2)
        index.kept("a", said)
        assert index.entries()[0].state is found
    index.kept("a", State.LOADED)  # it does not leave
    assert index.entries()[0].state is State.SETTLED


def test_a_move_that_cannot_be_is_a_mistake() -> None:
    """And changes nothing; of what is not there nothing is said."""
    index = filled("a")
    with pytest.raises(ImpossibleMoveError, match="published cannot become settled"):
        index.stands("a", State.SETTLED)
    assert index.entries()[0].state is State.PUBLISHED
    index.stands("never", State.SETTLED)
    index.named("never", has_names=True)


def test_content_published_again_while_it_leaves_stays() -> None:
    """The bytes are on disk, counted once, and may be leased."""
    index = filled("a")
    assert index.leave("a", 2)
    index.add("a", B, 3)
    assert index.lease("a", until=10, now=4)
    assert index.used_bytes == B


def test_leasing_what_is_not_there_says_so() -> None:
    """The caller then stages it."""
    assert not filled().lease("a", until=10, now=1)


# ---- any sequence of calls

LIMIT = 12 * B


HOLDERS = ("", "router 1", "router 2")


class Calls(RuleBasedStateMachine):
    """The stager's use: a flight whose victims are all gone fetches; one of whose victims was kept gives that reservation back. Beside it others
    put things there and change them, routers lease and release, an operator removes by force, and the watermark is watched.
    """

    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        self.index = Index[str](LIMIT)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, set[str]] = {}  # flight -> the victims of its last reservation that are still there
        self.reserved: dict[str, list[int]] = {}  # flight -> its reservations
        self.leaving: set[str] = set()
        self.forced: set[str] = set()  # of those, the ones that may be held
        self.sizes: dict[str, int] = {}
        self.theirs: set[str] = set()
        self.leases: dict[str, dict[str, float]] = {}
        self.at_work: list[str] = []  # what flights are at, once per flight
        self.overfull = False  # others wrote more than there was room for

    def _id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([*sorted(self.sizes), "absent"]))

    def _held(self) -> set[str]:
        leased = {id_ for id_, held in self.leases.items() if max(held.values()) > self.now}
        return {e.id for e in self.index.entries() if e.pinned} | leased | self.theirs | set(self.at_work)

    def _grew(self) -> None:
        self.overfull = self.overfull or self.index.used_bytes + self.index.reserved_bytes > LIMIT

    @rule(step=st.integers(0, 10))
    def time_passes(self, step: int) -> None:
        self.now += step

    def _reserve(self, token: str, size: int) -> None:
        before = books(self.index)
        held = self._held()
        try:
            victims = self.index.reserve(token, size, self.now)
        except AdapterTooLarge:
            assert on_disk(size) > LIMIT
            assert books(self.index) == before
            return
        except NoSpace:
            assert on_disk(size) <= LIMIT
            assert books(self.index) == before
            return
        assert not held & (set(victims) - self.leaving)
        assert len(set(victims)) == len(victims)
        self.leaving |= set(victims)
        self.waiting[token] = set(victims)
        self.reserved.setdefault(token, []).append(on_disk(size))
        assert self._staying() + self.index.reserved_bytes <= LIMIT

    @rule(target=flights, size=st.sampled_from((0, 1, B, 3 * B, 5 * B, 5 * B, LIMIT, LIMIT + 1)))
    def reserve(self, size: int) -> str:
        self.count += 1
        token = f"flight {self.count}"
        self._reserve(token, size)
        return token

    @rule(token=flights, size=st.sampled_from((0, B, 4 * B, 8 * B)))
    def reserve_more(self, token: str, size: int) -> None:
        if token in self.reserved and not self.waiting[token]:
            self._reserve(token, size)

    @rule(token=flights)
    def give_back(self, token: str) -> None:
        if token in self.reserved:
            self.reserved[token].pop()
            self.waiting[token] = set()
            self.index.give_back(token, sum(self.reserved[token]))
            if not self.reserved[token]:
                self._give_up(token)

    @rule(token=consumes(flights), share=st.sampled_from((0.0, 0.4, 1.0, 1.0)), twin=st.integers(0, 9).map(lambda n: n == 0), data=st.data())
    def arrive(self, token: str, share: float, twin: bool, data: st.DataObject) -> None:
        if token not in self.reserved or self.waiting[token]:
            self._give_up(token)
            return
        id_ = self._id(data) if twin else token
        if id_ in self.leaving or id_ == "absent":
            id_ = token
        size = int(sum(self.reserved.pop(token)) * share)
        del self.waiting[token]
        self.index.commit(token, id_, size, self.now)
        self.sizes.setdefault(id_, on_disk(size))
        assert self.index.get(id_) is not None
        assert self.index.reserved_by(token) == 0

    @rule(token=consumes(flights))
    def fail(self, token: str) -> None:
        self._give_up(token)

    def _give_up(self, token: str) -> None:
        self.index.abort(token)
        self.reserved.pop(token, None)
        self.waiting.pop(token, None)

    @rule(size=st.sampled_from((0, B, B, B, 3 * B, 3 * B, 2 * LIMIT)))
    def others_put(self, size: int) -> None:
        self.count += 1
        id_ = f"theirs {self.count}"
        self.index.add(id_, size, self.now, keep=True)
        self.sizes[id_] = on_disk(size)
        self.theirs.add(id_)
        self._grew()

    @precondition(lambda self: self.theirs - set(self.at_work))
    @rule(data=st.data())
    def others_take_away(self, data: st.DataObject) -> None:
        self._removed(data.draw(st.sampled_from(sorted(self.theirs - set(self.at_work)))))

    @rule(data=st.data(), length=st.integers(0, 20), holder=st.sampled_from(HOLDERS))
    def lease(self, data: st.DataObject, length: int, holder: str) -> None:
        id_ = self._id(data)
        leased = self.index.lease(id_, self.now + length, self.now, holder)
        assert leased == (id_ in self.sizes and id_ not in self.leaving)
        if leased:
            assert self.index.entries()[-1].id == id_
            held = self.leases.setdefault(id_, {})
            held[holder] = max(held.get(holder, 0.0), self.now + length)

    @rule(data=st.data(), holder=st.sampled_from(HOLDERS), everything=st.booleans())
    def release(self, data: st.DataObject, holder: str, everything: bool) -> None:
        id_ = None if everything else self._id(data)
        had = [held for at, held in self.leases.items() if holder and id_ in (None, at) and held.pop(holder, None) is not None]
        assert self.index.release(holder, id_) == len(had)
        self.leases = {at: held for at, held in self.leases.items() if held}

    @rule()
    def ask_for_the_demand(self) -> None:
        """Leases that have ended are forgotten with it."""
        self.leases = {id_: held for id_, held in self.leases.items() if max(held.values()) > self.now}
        assert self.index.in_demand(self.now) == len(self.leases)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        id_ = self._id(data)
        held = self.index.hold(id_)
        assert held == (id_ in self.sizes and id_ not in self.leaving)
        if held:
            self.at_work.append(id_)

    @precondition(lambda self: self.at_work)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(self.at_work))
        self.at_work.remove(id_)
        self.index.let_go(id_)

    @rule(data=st.data())
    def inherit(self, data: st.DataObject) -> None:
        heir, from_id = self._id(data), self._id(data)
        if heir in self.leaving:
            return  # a flight is at the heir
        self.index.inherit(heir, from_id)
        if heir in self.sizes and from_id in self.leases:
            held = self.leases.setdefault(heir, {})
            held |= {holder: max(held.get(holder, until), until) for holder, until in self.leases[from_id].items()}

    @rule(data=st.data(), length=st.integers(0, 20))
    def expect(self, data: st.DataObject, length: int) -> None:
        id_ = self._id(data)
        self.index.expect(id_, self.now + length)
        assert self.index.is_expected(id_) == (id_ in self.sizes)

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        id_ = self._id(data)
        self.index.pin(id_, pinned=pinned)
        if id_ in self.leaving:
            self.forced.add(id_)

    @rule(data=st.data(), force=st.booleans())
    def leave(self, data: st.DataObject, force: bool) -> None:
        id_ = self._id(data)
        may_go = id_ in self.sizes and id_ not in self.leaving and id_ not in (set(self.at_work) if force else self._held())
        assert self.index.leave(id_, self.now, force=force) == may_go
        if may_go:
            self.leaving.add(id_)
            if force:
                self.forced.add(id_)

    @rule(share=st.sampled_from((0.0, 0.5, 0.9, 1.0)))
    def watch_the_watermark(self, share: float) -> None:
        mark, held = int(share * LIMIT), self._held()
        victims = self.index.surplus(mark, self.now)
        assert not set(victims) & (held | self.leaving)
        self.leaving |= set(victims)
        left = self._staying() + self.index.reserved_bytes
        may_go = set(self.sizes) - self.leaving - held
        assert left <= mark or not may_go
        if victims:
            assert left + self.sizes[victims[-1]] > mark

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self._removed(data.draw(st.sampled_from(sorted(self.leaving))))

    def _removed(self, id_: str) -> None:
        self.index.removed(id_)
        del self.sizes[id_]
        self.leases.pop(id_, None)
        for group in (self.leaving, self.forced, self.theirs, *self.waiting.values()):
            group.discard(id_)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.leaving)))
        self.index.kept(id_)
        self.leaving.discard(id_)
        self.forced.discard(id_)
        for token in [token for token, victims in self.waiting.items() if id_ in victims]:
            self.give_back(token)

    def _staying(self) -> int:
        return sum(size for id_, size in self.sizes.items() if id_ not in self.leaving)

    @invariant()
    def the_books_are_right(self) -> None:
        assert {e.id: e.size for e in self.index.entries()} == self.sizes
        assert self.index.used_bytes == sum(self.sizes.values())
        assert self.index.reserved_bytes == sum(map(sum, self.reserved.values()))
        assert all(self.index.reserved_by(token) == sum(sizes) for token, sizes in self.reserved.items())

    @invariant()
    def a_hold_lasts_until_its_last_holder_s_end(self) -> None:
        assert {e.id: e.leased_until for e in self.index.entries() if e.leases} == {id_: max(held.values()) for id_, held in self.leases.items()}

    @invariant()
    def in_or_leaving_never_both(self) -> None:
        assert {e.id for e in self.index.entries() if e.leaving} == self.leaving
        assert {id_ for id_ in self.sizes if id_ in self.index} == set(self.sizes) - self.leaving

    @invariant()
    def no_victim_is_held_but_by_force(self) -> None:
        held: list[Entry[str]] = [e for e in self.index.entries() if e.leaving and e.id not in self.forced and not self.index.is_evictable(e, self.now)]
        assert not held

    @invariant()
    def what_stays_and_what_is_promised_fit(self) -> None:
        assert self.overfull or self._staying() + self.index.reserved_bytes <= LIMIT

    @invariant()
    def fetches_do_not_overshoot(self) -> None:
        fetching = sum(sum(sizes) for token, sizes in self.reserved.items() if not self.waiting[token])
        assert self.overfull or self.index.used_bytes + fetching <= LIMIT
        if not self.leaving and not any(self.waiting.values()):
            assert self.overfull or self.index.used_bytes + self.index.reserved_bytes <= self.index.max_bytes
        self.overfull = self.overfull and self.index.used_bytes + self.index.reserved_bytes > LIMIT

    @invariant()
    def the_least_recently_used_stand_first(self) -> None:
        used = [e.last_used for e in self.index.entries()]
        assert used == sorted(used)


TestAnySequenceOfCalls = Calls.TestCase
TestAnySequenceOfCalls.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
