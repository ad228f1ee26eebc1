"""Which node has which adapter."""

import random
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from extproc.core.copies import Copies


def test_a_copy_is_where_it_was_put_last() -> None:
    """On disk, then in memory, then on disk alone again, then gone."""
    copies = Copies()
    copies.put("n1", "a", warm=False)
    copies.put("n2", "a", warm=True)
    assert sorted(copies.of("a")) == [("n1", False), ("n2", True)]
    copies.put("n1", "a", warm=True)
    assert sorted(copies.of("a")) == [("n1", True), ("n2", True)]
    copies.drop("n2", "a")
    copies.drop("n1", "a")
    assert (copies.of("a"), len(copies)) == ([], 0)


def test_a_node_that_is_forgotten_has_nothing_at_once() -> None:
    """And what it is heard to have later counts, although the look through everything has not ended."""
    copies = Copies()
    for i in range(1000):
        copies.put("n1", f"a{i}", warm=True)
    copies.put("n2", "a1", warm=False)
    copies.forget("n1")
    assert (copies.of("a0"), copies.of("a1")) == ([], [("n2", False)])
    copies.put("n1", "a0", warm=False)
    assert copies.of("a0") == [("n1", False)]


def test_what_a_forgotten_node_had_goes_with_later_changes() -> None:
    """No adapter stays in the index because of nodes that are gone, and their numbers are used again."""
    copies = Copies()
    for round_ in range(50):
        for i in range(100):
            copies.put(f"n{round_}", f"r{round_}-{i}", warm=True)
        copies.forget(f"n{round_}")
    for i in range(1000):
        copies.put("n", f"a{i % 10}", warm=True)
    assert len(copies) == 10
    assert len(copies._node) < 50


@given(st.lists(st.tuples(st.sampled_from(["cold", "warm", "drop", "forget"]), st.integers(0, 4), st.integers(0, 6)), max_size=200))
def test_it_says_what_a_plain_table_says(changes: list[tuple[str, int, int]]) -> None:
    """Whatever is put, dropped and forgotten in whatever order."""
    copies = Copies()
    plain: dict[tuple[str, str], bool] = {}
    for what, n, a in changes:
        node, adapter = f"n{n}", f"a{a}"
        if what == "forget":
            copies.forget(node)
            plain = {key: warm for key, warm in plain.items() if key[0] != node}
        elif what == "drop":
            copies.drop(node, adapter)
            plain.pop((node, adapter), None)
        else:
            copies.put(node, adapter, warm=what == "warm")
            plain[node, adapter] = what == "warm"
    for a in range(7):
        assert sorted(copies.of(f"a{a}")) == sorted((node, warm) for (node, adapter), warm in plain.items() if adapter == f"a{a}")


def test_a_copy_takes_some_twenty_bytes() -> None:
    """200,000 copies of 20,000 adapters on 100 nodes; names not counted, which others share."""
    rng = random.Random(1)
    names = [f"tenant-{i}/adapter" for i in range(20_000)]
    tracemalloc.start()
    copies = Copies()
    for name in names:
        for node in rng.sample(range(100), 10):
            copies.put(f"10.0.0.{node}:9102", name, warm=True)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 200_000 < 30
