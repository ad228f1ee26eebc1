"""Pools and snapshots: who serves a model, and who of them is ready."""

from dataclasses import replace

import pytest

from extproc.core import placement
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import FIRST, MAX_KEY_CHARS, LookupTable
from extproc.core.placement import Pool, Snapshot
from extproc.core.standing import Standing

ENDPOINTS = tuple(Endpoint(f"10.0.0.{i}:8000", f"node-{i}") for i in range(1, 5))


def pool(
    name: str = "llama",
    base_models: tuple[str, ...] = ("llama-3",),
    adapters: tuple[str, ...] = ("*",),
    endpoints: tuple[Endpoint, ...] = ENDPOINTS,
    paths: tuple[str, ...] = (),
) -> Pool:
    return Pool(name, frozenset(base_models), adapters, LookupTable(endpoints, 251), paths)


def standing(**others: Standing) -> dict[str, tuple[Standing, str]]:
    """Of node-1 to node-4, as `_1=Standing.DOWN`."""
    return {f"10.0.0.{name[1:]}:8000": (standing, "why") for name, standing in others.items()}


@pytest.mark.parametrize(
    ("pattern", "adapter", "serves"),
    [
        ("*", "org/name", True),
        ("org/*", "org/name", True),
        ("org/*", "org/a/b", True),
        ("org/*", "other/name", False),
        ("*-sql", "org/big-sql", True),
        ("Org/*", "org/name", False),
        ("org/v?", "org/v2", True),
        ("org/[ab]", "org/c", False),
        ("exact", "exact", True),
        ("exact", "exact2", False),
    ],
)
def test_adapters_are_matched_by_shell_pattern(pattern: str, adapter: str, serves: bool) -> None:
    """A star crosses slashes, and case counts on every platform."""
    assert pool(adapters=("never", pattern)).serves(adapter) is serves


def test_a_pool_without_patterns_serves_no_adapter() -> None:
    """It is for its base models only."""
    assert not pool(adapters=()).serves("a")


def test_candidates_of_a_pool_are_those_of_its_table() -> None:
    """The second answer is the remembered first."""
    one = pool()
    assert one.candidates("a") == one.table.first("a", FIRST)
    assert one.candidates("a") is one.candidates("a")
    assert one.order("a") == one.table.order("a")


def test_the_orders_that_are_remembered_are_bounded() -> None:
    """Clients invent names, and headers that are hashed: the memory keeps those used last, and none of a very long key."""
    one = pool(endpoints=ENDPOINTS[:2])
    for i in range(placement._REMEMBERED_KEYS + 10):
        one.candidates(str(i))
    one.candidates("x" * (MAX_KEY_CHARS + 1))
    assert one._first.cache_info().currsize == placement._REMEMBERED_KEYS  # type: ignore[attr-defined]


def test_with_highest_random_weight_the_table_is_not_asked() -> None:
    """Where the setting says so; an endpoint that leaves changes nobody else's place."""
    one = replace(pool(), by_weight=True)
    assert one.order("a") == one.candidates("a", 4) == one.table.by_weight("a")
    fewer = replace(pool(endpoints=ENDPOINTS[1:]), by_weight=True)
    assert fewer.order("a") == tuple(e for e in one.order("a") if e != ENDPOINTS[0])


def test_candidates_are_looked_for_among_all_where_the_first_are_away() -> None:
    """Every endpoint of the pool can take a key whose own first places are down."""
    many = tuple(Endpoint(f"10.0.1.{i}:8000") for i in range(1, 41))
    one = pool(endpoints=many)
    first = one.candidates("a")
    down = Snapshot((one,), {e.address: (Standing.DOWN, "ill") for e in many if e != many[17] and e != many[3]})
    assert set(down.candidates(one, "a")) == {many[17], many[3]}
    assert Snapshot((one,)).candidates(one, "a") == first
    assert Snapshot((one,)).candidates(one, "a", (many[30].address,)) == (many[30],)


def test_the_endpoints_of_a_stager_are_found() -> None:
    """Of one that fills a directory for two engines, both."""
    both = (Endpoint("10.0.0.1:8000", "n", "10.0.0.1:9102"), Endpoint("10.0.0.1:8001", "n", "10.0.0.1:9102"))
    one = pool(endpoints=(*both, ENDPOINTS[3]))
    assert (one.at("10.0.0.1:9102"), one.at(""), one.at("10.0.0.2:9102")) == (both, (), ())


def test_endpoints_without_a_stager_are_left_out() -> None:
    """They are for base models only."""
    staged, bare = Endpoint("10.0.0.1:8000", "n", "10.0.0.1:9102"), Endpoint("10.0.0.2:8000")
    assert list(pool(endpoints=(staged, bare)).staged((bare, staged))) == [staged]
    assert list(pool(endpoints=(staged,)).staged((staged,))) == [staged]


def test_the_pool_of_a_base_model_is_found_by_its_exact_name() -> None:
    """Case and suffix count."""
    llama, qwen = pool(), pool("qwen", ("qwen-3", "qwen"))
    snapshot = Snapshot((llama, qwen))
    assert snapshot.base_pool("llama-3") is llama
    assert snapshot.base_pool("qwen") is qwen
    assert snapshot.base_pool("Qwen") is None
    assert snapshot.base_pool("org/adapter") is None


def test_the_first_pool_that_matches_an_adapter_wins() -> None:
    """In the configured order."""
    first, second = pool("first", adapters=("a/*",)), pool("second", adapters=("*",))
    assert Snapshot((first, second)).adapter_pool("a/x") is first
    assert Snapshot((second, first)).adapter_pool("a/x") is second
    assert Snapshot((first, second)).adapter_pool("b/x") is second
    assert Snapshot((first,)).adapter_pool("b/x") is None


def test_a_pool_is_found_by_its_name_and_by_the_paths_it_takes() -> None:
    """For requests that name no model: the first pool, in the configured order, one of whose patterns matches."""
    audio, rest = pool("audio", paths=("/v1/audio/*", "/v1/realtime")), pool("rest", paths=("/v1/*",))
    snapshot = Snapshot((audio, rest))
    assert [snapshot.pool(name) for name in ("rest", "audio", "Audio", "")] == [rest, audio, None, None]
    found = [snapshot.path_pool(path) for path in ("/v1/audio/transcriptions", "/v1/realtime", "/v1/realtimes", "/v1/responses/a/cancel", "/health")]
    assert found == [audio, audio, rest, rest, None]


def test_what_is_down_is_left_out_and_the_order_kept() -> None:
    """Each key of a lost endpoint has one fixed substitute: its next candidate."""
    one = pool()
    order = one.candidates("a")
    down = Snapshot((one,), {order[0].address: (Standing.DOWN, "ill"), order[2].address: (Standing.DOWN, "gone")})
    assert down.usable(order) == down.stageable(down.usable(order)) == (order[1], order[3])
    assert Snapshot((one,)).usable(order) == order


def test_what_drains_is_usable_and_is_given_nothing_new() -> None:
    """What is leased there is served there; nothing is staged."""
    snapshot = Snapshot((pool(),), standing(_1=Standing.DRAINING, _3=Standing.DOWN))
    assert [snapshot.standing(endpoint) for endpoint in ENDPOINTS] == [Standing.DRAINING, Standing.READY, Standing.DOWN, Standing.READY]
    usable = snapshot.usable(ENDPOINTS)
    assert usable == (ENDPOINTS[0], ENDPOINTS[1], ENDPOINTS[3])
    assert snapshot.stageable(usable) == (ENDPOINTS[1], ENDPOINTS[3])


@pytest.mark.parametrize(
    ("subset", "ready"),
    [
        (["10.0.0.2:8000"], [2]),
        (["10.0.0.2"], [2]),
        (["10.0.0.4:8000", "10.0.0.1"], [1, 4]),
        (["10.0.0.2:9999"], []),
        (["10.0.0"], []),
        ([], []),
        (["elsewhere:8000", "10.0.0.3:8000"], [3]),
    ],
)
def test_the_subset_hint_is_an_address_or_an_ip(subset: list[str], ready: list[int]) -> None:
    """An empty hint means that nothing is eligible, as the Endpoint Picker protocol says."""
    assert Snapshot((pool(),)).usable(ENDPOINTS, subset) == tuple(ENDPOINTS[i - 1] for i in ready)


def test_a_subset_does_not_bring_back_what_is_down() -> None:
    """The hint narrows, it never widens."""
    snapshot = Snapshot((pool(),), standing(_2=Standing.DOWN))
    assert snapshot.usable(ENDPOINTS, ["10.0.0.2", "10.0.0.3"]) == (ENDPOINTS[2],)


def test_the_subset_hint_may_name_an_ipv6_address() -> None:
    """As Envoy spells it, with the port."""
    endpoint = Endpoint("[2001:db8::1]:8000")
    assert Snapshot(()).usable([endpoint], ["[2001:db8::1]:8000"]) == (endpoint,)
    assert Snapshot(()).usable([endpoint], ["[2001:db8::1]"]) == (endpoint,)
