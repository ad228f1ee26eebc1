"""The lookup table: equal shares, few keys moved, and the same answer in every process."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.endpoint import Endpoint
from extproc.core.maglev import DEFAULT_TABLE_SIZE, FIRST, MAX_TABLE_SIZE, LookupTable, is_prime, key_hash

SMALL = 1009  # a prime that fills in a millisecond
KEYS = [f"org-{i % 7}/adapter-{i}" for i in range(3000)]


def fleet(count: int) -> list[Endpoint]:
    return [Endpoint(f"10.0.{i // 250}.{i % 250 + 1}:8000") for i in range(count)]


addresses = st.lists(st.integers(1, 250), min_size=1, max_size=12, unique=True).map(lambda last: [Endpoint(f"10.0.0.{i}:8000") for i in last])
keys = st.text(max_size=40)

# ---- size


@pytest.mark.parametrize("number", [2, 3, 5, 251, 65_537, 5_000_011])
def test_primes_are_recognised(number: int) -> None:
    """The sizes of the paper and of Envoy among them."""
    assert is_prime(number)


@pytest.mark.parametrize("number", [-7, 0, 1, 4, 9, 25, 65_536, 65_539 * 3, 4_999_999 * 2])
def test_composites_are_recognised(number: int) -> None:
    """Squares of primes too."""
    assert not is_prime(number)


@pytest.mark.parametrize("size", [-1, 0, 1, 100, 65_536])
def test_a_size_that_is_not_prime_is_refused(size: int) -> None:
    """With it some permutations would not visit every slot."""
    with pytest.raises(ValueError, match=f"table size {size} is not a prime"):
        LookupTable(fleet(2), size)


def test_a_prime_over_the_limit_is_refused() -> None:
    """Envoy refuses it too."""
    with pytest.raises(ValueError, match="is not a prime up to 5000011"):
        LookupTable(fleet(2), 5_000_077)
    assert is_prime(5_000_077)
    assert is_prime(MAX_TABLE_SIZE)


def test_an_absurd_size_is_refused_before_it_is_factored() -> None:
    """The limit is looked at first: a number of hundreds of digits has no square root as a float, one of twenty digits takes minutes."""
    with pytest.raises(ValueError, match="is not a prime up to 5000011"):
        LookupTable(fleet(2), 10**400 + 1)


def test_more_endpoints_than_slots_are_refused() -> None:
    """Somebody would get nothing."""
    with pytest.raises(ValueError, match="4 endpoints do not fit into 3 slots"):
        LookupTable(fleet(4), 3)


@pytest.mark.parametrize(("count", "size"), [(1, 2), (2, 2), (3, 3), (5, 5), (7, 7)])
def test_as_many_endpoints_as_slots_get_one_each(count: int, size: int) -> None:
    """The smallest table that is allowed."""
    counts = LookupTable(fleet(count), size).slots_per_endpoint()
    assert sum(counts.values()) == size
    assert min(counts.values()) >= 1


# ---- owners


def test_an_empty_table_has_no_owner_and_no_candidates() -> None:
    """A pool may be configured before it has nodes."""
    table = LookupTable([])
    assert table.owner("a") is None
    assert table.order("a") == ()
    assert table.slots_per_endpoint() == {}


def test_one_endpoint_owns_everything() -> None:
    """And is its only candidate."""
    table = LookupTable(fleet(1), SMALL)
    assert table.slots_per_endpoint() == {"10.0.0.1:8000": SMALL}
    assert table.order("any") == tuple(fleet(1))


@pytest.mark.parametrize("count", [2, 7, 100])
def test_shares_are_almost_equal(count: int) -> None:
    """The endpoints take turns, so at the end of filling their numbers of slots differ by at most one."""
    counts = LookupTable(fleet(count)).slots_per_endpoint().values()
    assert sum(counts) == DEFAULT_TABLE_SIZE
    assert max(counts) - min(counts) <= 1


def test_keys_spread_as_the_slots_do() -> None:
    """Of 3,000 keys on ten endpoints, each owns 300 give or take the chance of a fair draw (five standard deviations)."""
    table = LookupTable(fleet(10))
    owned = [sum(table.owner(key) == endpoint for key in KEYS) for endpoint in table.endpoints]
    assert sum(owned) == len(KEYS)
    assert 218 <= min(owned) <= max(owned) <= 382


def test_removing_an_endpoint_moves_only_its_keys() -> None:
    """Every key of a surviving endpoint keeps its owner, except the few the paper allows."""
    before = LookupTable(fleet(20))
    gone = before.endpoints[7]
    after = LookupTable([e for e in before.endpoints if e != gone])
    moved = [key for key in KEYS if before.owner(key) != after.owner(key)]
    of_gone = [key for key in KEYS if before.owner(key) == gone]
    assert set(of_gone) <= set(moved)
    assert len(moved) - len(of_gone) <= 0.03 * len(KEYS)


def test_the_keys_of_a_removed_endpoint_spread_over_the_others() -> None:
    """No survivor takes them all."""
    before = LookupTable(fleet(10))
    gone = before.endpoints[0]
    after = LookupTable(before.endpoints[1:])
    heirs = [after.owner(key) for key in KEYS if before.owner(key) == gone]
    assert len(set(heirs)) == 9


def test_adding_an_endpoint_takes_little_more_than_its_share() -> None:
    """A twentieth of the keys moves to the new one, few between the others."""
    before, after = LookupTable(fleet(19)), LookupTable(fleet(20))
    moved = [key for key in KEYS if before.owner(key) != after.owner(key)]
    to_others = [key for key in moved if after.owner(key) != fleet(20)[-1]]
    assert len(to_others) <= 0.03 * len(KEYS)
    assert len(moved) <= 0.1 * len(KEYS)


@given(addresses, st.randoms(use_true_random=False), keys)
@settings(deadline=None)
def test_order_and_repetition_of_endpoints_do_not_matter(endpoints: list[Endpoint], random: object, key: str) -> None:
    """Replicas learn of endpoints in any order."""
    shuffled = endpoints + endpoints[::2]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = LookupTable(endpoints, SMALL), LookupTable(shuffled, SMALL)
    assert one.endpoints == other.endpoints == tuple(sorted(endpoints))
    assert one.slots_per_endpoint() == other.slots_per_endpoint()
    assert one.order(key) == other.order(key)


# ---- candidates


@given(addresses, keys)
@settings(deadline=None)
def test_candidates_are_all_endpoints_once_owner_first(endpoints: list[Endpoint], key: str) -> None:
    """For any key, any text at all."""
    table = LookupTable(endpoints, SMALL)
    candidates = table.order(key)
    assert candidates[0] == table.owner(key)
    assert sorted(candidates) == sorted(endpoints)


@given(addresses, keys, st.integers(0, 15))
@settings(deadline=None)
def test_what_an_order_begins_with_does_not_depend_on_how_much_of_it_is_asked_for(endpoints: list[Endpoint], key: str, count: int) -> None:
    """However many are asked for: the owner, then others, each once, and all where fewer are there."""
    table = LookupTable(endpoints, SMALL)
    first = table.first(key, count)
    assert len(first) == len(set(first)) == min(count, len(endpoints))
    assert first[:FIRST] == table.order(key)[: min(count, FIRST)]


def test_an_endpoint_that_leaves_moves_few_of_the_later_places() -> None:
    """Every place of a key is the owner of another hash of it, so each moves as owners do: here where the one that leaves had it, and by what the table
    moves needlessly, as the paper says."""
    before = LookupTable(fleet(20))
    gone = before.endpoints[7]
    after = LookupTable([e for e in before.endpoints if e != gone])
    kept = [(before.first(key, 2), after.first(key, 2)) for key in KEYS if gone not in before.first(key, 2)]
    assert sum(old != new for old, new in kept) <= 0.06 * len(KEYS)


def test_keys_of_one_owner_have_different_second_candidates() -> None:
    """When the owner is skipped, its load spreads over all others."""
    table = LookupTable(fleet(6))
    owner = table.endpoints[0]
    seconds = {table.order(key)[1] for key in KEYS if table.owner(key) == owner}
    assert seconds == set(table.endpoints[1:])


def test_equal_keys_have_equal_candidates() -> None:
    """Nothing is remembered from call to call."""
    table = LookupTable(fleet(5), SMALL)
    assert [table.order(key) for key in KEYS[:50]] == [table.order(key) for key in KEYS[:50]]


# ---- the hash

GOLDEN = {  # key -> its hash, and the last byte of its candidates' addresses among 10.0.0.1 ... 10.0.0.5
    "demo/sql": (4970994895293169035, [3, 5, 2, 1, 4]),
    "org/a": (3459422662132703207, [5, 3, 1, 2, 4]),
    "a": (7945653736314733581, [2, 1, 5, 3, 4]),
    "base": (7425536107315728438, [3, 1, 2, 4, 5]),
    "ünï/ços": (15153168160106863144, [5, 2, 4, 3, 1]),
    "tenant-7/demo/sql": (1530763686391823780, [5, 2, 1, 4, 3]),
}


@pytest.mark.parametrize("key", GOLDEN)
def test_owners_are_what_they_were(key: str) -> None:
    """A change of hash moves every adapter of every fleet that is upgraded node by node; this test is where it is noticed."""
    hashed, order = GOLDEN[key]
    assert key_hash(key) == hashed
    assert [e.address for e in LookupTable(fleet(5)).order(key)] == [f"10.0.0.{last}:8000" for last in order]


def test_slots_are_what_they_were() -> None:
    """The filling of the table, pinned on a small one."""
    table = LookupTable(fleet(5), 11)
    owners = [table.endpoints[slot].address.split(":")[0][-1] for slot in table._slots]
    assert "".join(owners) == "14311532425"


_PRINT_OWNERS = """
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
table = LookupTable({Endpoint(f"10.0.0.{i}:8000") for i in range(1, 30)}, 1009)
for i in range(200):
    print(",".join(e.address for e in table.order(f"org/adapter-{i}")))
"""


def test_every_process_gives_the_same_owners() -> None:
    """Python's own hash differs from process to process; nothing here depends on it."""
    outputs = {
        subprocess.run([sys.executable, "-c", _PRINT_OWNERS], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == 200


@given(st.text(alphabet=st.characters()) | st.just("\udcff"))
def test_any_text_has_a_hash(key: str) -> None:
    """Headers that are not UTF-8 reach us as surrogates."""
    assert 0 <= key_hash(key) < 2**64
