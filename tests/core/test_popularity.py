"""What is asked for most."""

from extproc.core import popularity as module
from extproc.core.maglev import MAX_KEY_CHARS
from extproc.core.popularity import Popularity


def asked(popularity: Popularity, **times: int) -> None:
    for adapter, count in times.items():
        for _ in range(count):
            popularity.count(adapter, adapter)


def test_the_last_two_windows_count() -> None:
    """What was asked for before is forgotten."""
    popularity = Popularity()
    asked(popularity, a=5, b=1)
    popularity.roll()
    asked(popularity, b=3)
    assert popularity.ranked() == [("a", 5), ("b", 4)]
    popularity.roll()
    assert popularity.ranked() == [("b", 3)]
    popularity.roll()
    assert popularity.ranked() == []
    popularity.roll()
    assert popularity.hottest == frozenset()


def test_a_tenth_is_hot_and_stays_so_while_it_is_near_that() -> None:
    """Noise copies nothing twice."""
    popularity = Popularity()
    asked(popularity, **{f"a{i}": 200 - i for i in range(100)})
    popularity.roll()
    assert popularity.hottest == {f"a{i}" for i in range(10)}
    popularity.roll()
    asked(popularity, **{f"a{i}": 200 - i for i in range(100)} | {"a9": 188, "a12": 191})  # a9 falls to the thirteenth place
    popularity.roll()
    assert popularity.hottest == {f"a{i}" for i in range(10)} | {"a12"}


def test_an_adapter_is_asked_for_by_its_last_key() -> None:
    """Where a header is hashed."""
    popularity = Popularity()
    popularity.count("a", "session-1")
    popularity.count("a", "session-2")
    popularity.count("b", "b")
    assert (popularity.key("a"), popularity.key("b"), popularity.key("c")) == ("session-2", "b", "c")
    popularity.roll()
    assert popularity.key("a") == "session-2"
    popularity.roll()
    assert popularity.key("a") == "a"


def test_what_is_counted_is_bounded() -> None:
    """A client that invents names is counted until the window is full."""
    popularity = Popularity()
    for i in range(module.MAX_COUNTED + 100):
        popularity.count(f"a{i}", f"key-{i}")
    popularity.count("a1", "key-1")
    assert len(popularity) == module.MAX_COUNTED
    assert popularity.ranked(1) == [("a1", 2)]


def test_a_key_that_a_client_made_long_is_not_remembered() -> None:
    """A header that is hashed may have 60 KB, for each of thousands of adapters."""
    popularity = Popularity()
    popularity.count("a", "k" * MAX_KEY_CHARS)
    popularity.count("b", "k" * (MAX_KEY_CHARS + 1))
    assert (len(popularity.key("a")), popularity.key("b")) == (MAX_KEY_CHARS, "b")
