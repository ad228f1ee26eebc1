"""Where adapters belong, as routers see it and as they saw it before a node came."""

from extproc.core.endpoint import Endpoint
from extproc.core.maglev import DEFAULT_TABLE_SIZE, FIRST, LookupTable
from extproc.core.placement import Pool
from extproc.stager.supply.places import Places

FLEET = [Endpoint(f"10.0.{number // 200}.{number % 200}:8000", stager=f"10.0.{number // 200}.{number % 200}:9102") for number in range(300)]
NAMES = [f"acme-{number // 7}/adapter-{number}" for number in range(2000)]
NOBODY: set[str] = set()


def stagers(endpoints: tuple[Endpoint, ...]) -> list[str]:
    return [endpoint.stager for endpoint in endpoints]


def test_they_are_the_candidates_of_a_router() -> None:
    """In its order, by either of its rules."""
    table = LookupTable(FLEET)
    for by_weight in (False, True):
        pool = Pool("p", frozenset(), ("*",), table, by_weight=by_weight)
        places = Places([FLEET], NOBODY, DEFAULT_TABLE_SIZE, by_weight=by_weight)
        for name in NAMES[:100]:
            assert places.of(name) == stagers(pool.candidates(name))


def test_a_node_that_has_just_come_asks_who_had_its_keys_before() -> None:
    """The table that has the new node names the old owner of none of them."""
    before, after, own = LookupTable(FLEET[1:]), LookupTable(FLEET), FLEET[0]
    places = Places([FLEET], {own.stager}, DEFAULT_TABLE_SIZE)
    taken = [name for name in NAMES if after.owner(name) == own]
    assert taken
    for name in taken:
        first, *others = places.of(name)
        assert [first] == stagers((before.first(name, 1)[0],))
        assert set(stagers(after.first(name, FIRST))) <= {first, *others}


def test_with_several_pools_the_owners_come_first() -> None:
    """As while it is not known which of them is the own one; what stages nothing is left out."""
    pools = [FLEET[:100], FLEET[100:200], [Endpoint("10.9.9.9:8000")], []]
    places = Places(pools, NOBODY, DEFAULT_TABLE_SIZE)
    for name in NAMES[:50]:
        owners = [LookupTable(pool).first(name, 1)[0].stager for pool in pools[:2]]
        assert places.of(name)[:2] == owners
        assert len(places.of(name)) == 2 * FIRST


def test_a_pool_that_has_outgrown_its_table_names_nobody() -> None:
    """Routers have taken a larger one."""
    assert Places([FLEET], NOBODY, 101).of("acme/sql") == []
