"""The byte-bounded index: what it counts, whom it chooses, and that a sequence of any calls keeps the books right."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from extproc.core.lru import BLOCK_BYTES, Entry, Index, on_disk
from extproc.errors import AdapterTooLarge, NoSpace

B = BLOCK_BYTES


def filled(*ids: str, blocks: int = 10) -> Index:
    """An index of `blocks` blocks with one block under each id, used at 1, 2, 3 ..."""
    index = Index(blocks * B)
    for now, id_ in enumerate(ids, 1):
        index.add(id_, B, now)
    return index


def books(index: Index) -> tuple[object, ...]:
    return index.used_bytes, index.reserved_bytes, [(e.id, e.size, e.last_used, e.leased_until, e.pinned, e.leaving) for e in index.entries()]


# ---- counting


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, B), (B - 1, B), (B, B), (B + 1, 2 * B), (10 * B, 10 * B)])
def test_bytes_are_counted_as_the_disk_does(size: int, taken: int) -> None:
    """In whole blocks."""
    assert on_disk(size) == taken


def test_room_is_reserved_then_taken() -> None:
    """Bytes count from the moment they are reserved, once."""
    index = Index(10 * B)
    assert index.reserve("flight", 3 * B - 1, 1) == []
    assert (index.used_bytes, index.reserved_bytes) == (0, 3 * B)
    index.commit("flight", "a", 2 * B, 2)
    assert (index.used_bytes, index.reserved_bytes) == (2 * B, 0)
    assert "a" in index
    assert len(index) == 1


def test_an_aborted_reservation_leaves_nothing() -> None:
    """Aborting what is not reserved, or no longer, is no error: the caller aborts on every way out."""
    index = Index(10 * B)
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


def test_the_index_shows_its_books() -> None:
    """For logs and debuggers."""
    index = filled("a")
    index.reserve("flight", 2 * B, 1)
    assert repr(index) == "<Index 1 artifacts, 4096 used + 8192 reserved of 40960 bytes>"


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


@pytest.mark.parametrize("hold", ["lease", "pin"])
def test_what_is_held_does_not_go(hold: str) -> None:
    """The next in order does."""
    index = filled("a", "b", blocks=2)
    if hold == "lease":
        assert index.lease("a", until=100, now=3)
        index.touch("b", 4)
    else:
        index._entries["a"].pinned = True
    assert index.reserve("flight", B, 5) == ["b"]


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
    index = Index(2 * B)
    index.add("a", 2 * B, 1)
    assert index.reserve("one", B, 2) == ["a"]
    assert index.reserve("two", B, 2) == ["a"]


def test_a_victim_that_had_to_stay_is_tried_last() -> None:
    """It counts as most recently used, so the next search begins with another."""
    index = filled("a", "b", blocks=2)
    assert index.reserve("flight", B, 3) == ["a"]
    index.abort("flight")
    index.kept("a", 4)
    assert "a" in index
    assert index.reserve("flight", B, 5) == ["b"]


def test_keeping_what_is_not_there_is_no_error() -> None:
    """It may have been removed by another's wish."""
    index = filled("a")
    index.kept("never", 1)
    assert len(index) == 1


def test_a_victim_by_request_obeys_the_same_holds() -> None:
    """An operator's evict takes nothing that is leased, pinned, leaving or absent."""
    index = filled("a", "b", "c")
    index.lease("a", until=100, now=4)
    index._entries["b"].pinned = True
    assert not index.leave("a", 5)
    assert not index.leave("b", 5)
    assert not index.leave("never", 5)
    assert index.leave("c", 5)
    assert not index.leave("c", 5)
    assert index.leave("a", 100)


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


class Calls(RuleBasedStateMachine):
    """The stager's use: a flight whose victims are all gone fetches; one of whose victims was kept gives its reservation back."""

    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(LIMIT)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, set[str]] = {}  # flight -> its victims that are still there
        self.reserved: dict[str, int] = {}
        self.leaving: set[str] = set()
        self.sizes: dict[str, int] = {}

    def _id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([*sorted(self.sizes), "absent"]))

    @rule(step=st.integers(0, 10))
    def time_passes(self, step: int) -> None:
        self.now += step

    @rule(target=flights, size=st.sampled_from((0, 1, B, 3 * B, 5 * B, 5 * B, LIMIT, LIMIT + 1)))
    def reserve(self, size: int) -> str:
        self.count += 1
        token = f"flight {self.count}"
        before = books(self.index)
        held = {e.id for e in self.index.entries() if e.pinned or e.leased_until > self.now}
        try:
            victims = self.index.reserve(token, size, self.now)
        except AdapterTooLarge:
            assert on_disk(size) > LIMIT
            assert books(self.index) == before
            return token
        except NoSpace:
            assert on_disk(size) <= LIMIT
            assert books(self.index) == before
            return token
        assert not held & set(victims)
        assert len(set(victims)) == len(victims)
        self.leaving |= set(victims)
        self.waiting[token] = set(victims)
        self.reserved[token] = on_disk(size)
        return token

    @rule(token=consumes(flights), share=st.sampled_from((0.0, 0.4, 1.0, 1.0)), twin=st.integers(0, 9).map(lambda n: n == 0), data=st.data())
    def arrive(self, token: str, share: float, twin: bool, data: st.DataObject) -> None:
        if token not in self.reserved or self.waiting[token]:
            self._give_up(token)
            return
        id_ = self._id(data) if twin else token
        if id_ in self.leaving or id_ == "absent":
            id_ = token
        size = int(self.reserved.pop(token) * share)
        del self.waiting[token]
        self.index.commit(token, id_, size, self.now)
        self.sizes.setdefault(id_, on_disk(size))
        assert self.index.get(id_) is not None

    @rule(token=consumes(flights))
    def fail(self, token: str) -> None:
        self._give_up(token)

    def _give_up(self, token: str) -> None:
        self.index.abort(token)
        self.reserved.pop(token, None)
        self.waiting.pop(token, None)

    @rule(data=st.data(), length=st.integers(0, 20))
    def lease(self, data: st.DataObject, length: int) -> None:
        id_ = self._id(data)
        leased = self.index.lease(id_, self.now + length, self.now)
        assert leased == (id_ in self.sizes and id_ not in self.leaving)
        if leased:
            assert self.index.entries()[-1].id == id_

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        entry = self.index.get(self._id(data))
        if entry is not None:
            entry.pinned = pinned

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        id_ = self._id(data)
        entry = self.index.get(id_)
        may_go = entry is not None and self.index.is_evictable(entry, self.now)
        assert self.index.leave(id_, self.now) == may_go
        if may_go:
            self.leaving.add(id_)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.leaving)))
        self.index.removed(id_)
        self.leaving.discard(id_)
        del self.sizes[id_]
        for victims in self.waiting.values():
            victims.discard(id_)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.leaving)))
        self.index.kept(id_, self.now)
        self.leaving.discard(id_)
        for token in [token for token, victims in self.waiting.items() if id_ in victims]:
            self._give_up(token)

    @invariant()
    def the_books_are_right(self) -> None:
        assert {e.id: e.size for e in self.index.entries()} == self.sizes
        assert self.index.used_bytes == sum(self.sizes.values())
        assert self.index.reserved_bytes == sum(self.reserved.values())

    @invariant()
    def in_or_leaving_never_both(self) -> None:
        assert {e.id for e in self.index.entries() if e.leaving} == self.leaving
        assert {id_ for id_ in self.sizes if id_ in self.index} == set(self.sizes) - self.leaving

    @invariant()
    def no_victim_is_held(self) -> None:
        held: list[Entry] = [e for e in self.index.entries() if e.leaving and not self.index.is_evictable(e, self.now)]
        assert not held

    @invariant()
    def what_stays_and_what_is_promised_fit(self) -> None:
        staying = sum(size for id_, size in self.sizes.items() if id_ not in self.leaving)
        assert staying + self.index.reserved_bytes <= LIMIT

    @invariant()
    def fetches_do_not_overshoot(self) -> None:
        fetching = sum(size for token, size in self.reserved.items() if not self.waiting[token])
        assert self.index.used_bytes + fetching <= LIMIT

    @invariant()
    def the_least_recently_used_stand_first(self) -> None:
        used = [e.last_used for e in self.index.entries()]
        assert used == sorted(used)


TestAnySequenceOfCalls = Calls.TestCase
TestAnySequenceOfCalls.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
