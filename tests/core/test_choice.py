"""Which endpoint serves, where a copy is made, and what is prepared."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.choice import BRIEF, FAR, LONGER, OFTEN, SAMPLED, SELDOM, SOON, At, Balance, Choice, Copy, Rule, Rules, choose, is_below, least_of, of_leased
from extproc.core.durations import USUAL_S, Copying
from extproc.core.endpoint import Endpoint
from extproc.core.load import Engine, Loads

A, B, C, D, E, F = ENDPOINTS = tuple(Endpoint(f"10.0.0.{i}:8000", stager=f"10.0.0.{i}:9102") for i in range(1, 7))
RULE = Rule(lambda count: count - 1)
FAR_ORIGIN = Copying(load_s=0.5, fetch_s=USUAL_S)  # a load is brief beside a request, a fetch is not


def loads_of(*in_flight: float) -> Loads:
    """Of A, B, C, ...; the rest have as much as the mean of those."""
    loads = Loads(endpoint.address for endpoint in ENDPOINTS)
    mean = sum(in_flight) / len(in_flight)
    for place, endpoint in enumerate(ENDPOINTS):
        loads.say(endpoint.address, Engine(running=in_flight[place] if place < len(in_flight) else mean), 0.0)
    return loads


def leased(*endpoints: Endpoint) -> list[Copy]:
    return [Copy(endpoint, At.LEASED) for endpoint in endpoints]


# ---- leased copies


def test_a_copy_below_the_bound_serves() -> None:
    """Most requests: nothing else happens."""
    assert choose(leased(A), ENDPOINTS, loads_of(10, 10), RULE) == Choice(A)


def test_of_several_copies_the_one_with_the_least_in_flight_serves() -> None:
    """Of equals the first in the key's order, which is the same on every router."""
    assert choose(leased(C, A), ENDPOINTS, loads_of(10, 10, 9), RULE).serve == C
    assert choose(leased(C, A), ENDPOINTS, loads_of(10, 10, 10), RULE).serve == A


def test_the_copy_with_the_longest_prefix_serves_while_it_is_below_the_bound() -> None:
    """What it saves is less than what a queue costs."""
    assert choose(leased(A, B), ENDPOINTS, loads_of(11, 9, 10, 10), RULE, preferred=A).serve == A
    assert choose(leased(A, B), ENDPOINTS, loads_of(20, 9, 10, 10), RULE, preferred=A).serve == B
    assert choose(leased(A, B), ENDPOINTS, loads_of(11, 9), RULE, preferred=C).serve == B
    near = loads_of(12.8, 12.6, 9.2, 9.2, 9.2, 9.2)  # 12.96 is the bound
    assert choose(leased(A, B), ENDPOINTS, near, RULE, preferred=A).serve == A


def test_above_the_bound_a_request_waits_for_what_is_brief_beside_its_own_time() -> None:
    """A load of half a second beside a completion of four, and a fetch only if that takes no longer."""
    loads = loads_of(30, 10, 10, 10, 10, 10)
    cold = [*leased(A), Copy(B, At.COLD)]
    assert choose(leased(A), ENDPOINTS, loads, RULE, copying=FAR_ORIGIN) == Choice(A, prepare=B)
    assert choose(cold, ENDPOINTS, loads, RULE, copying=FAR_ORIGIN) == Choice(None, (B, A))
    assert choose(leased(A), ENDPOINTS, loads, RULE) == Choice(None, (B, A))
    for load_s, choice in ((BRIEF * USUAL_S, Choice(None, (B, A))), (BRIEF * USUAL_S + 0.1, Choice(A, prepare=B))):
        assert choose(cold, ENDPOINTS, loads, RULE, copying=Copying(load_s=load_s)) == choice


def test_a_request_waits_for_a_copy_that_comes_before_half_of_the_queue_ends() -> None:
    """The queue is that of a look ago, and gets shorter meanwhile."""
    loads = loads_of(6, 2, 2, 2, 2, 2)
    loads.say(A.address, Engine(running=4, waiting=3), 1.0)
    assert loads[A.address].queue_s(USUAL_S) == 3
    for fetch_s, choice in ((1.4, Choice(None, (B, A))), (1.6, Choice(A, prepare=B))):
        assert choose(leased(A), ENDPOINTS, loads, RULE, copying=Copying(fetch_s=fetch_s)) == choice


def test_a_wait_for_another_copy_ends_unless_the_one_that_is_there_is_crowded() -> None:
    """After LONGER times what such a copy takes. Who waits for a call, or because all would flood what is there, goes on."""
    loads, flooded = loads_of(30, 10, 10, 10, 10, 10), loads_of(40, 10, 10, 10, 10, 10)
    for other, has, within_s in ((At.COLD, loads, LONGER * 0.5), (At.COMING, loads, LONGER * 1.0), (At.WARM, loads, math.inf), (At.COLD, flooded, math.inf)):
        for at in (At.LEASED, At.WARM):
            choice = choose([Copy(A, at), Copy(B, other)], ENDPOINTS, has, RULE)
            if at is At.LEASED or other is At.COLD:
                assert (choice.wait_for[:2], choice.within_s) == ((B, A), within_s)


def test_who_is_the_first_to_want_a_fetch_waits_for_it_only_far_above_the_bound() -> None:
    """The second waits for one that is on its way. Who was served where an endpoint drains waits for neither."""
    loads = loads_of(28, 18, 18, 18, 18, 24)
    assert 1 < loads[A.address].known / loads.bound(RULE.factor) < FAR
    assert choose(leased(A), ENDPOINTS, loads, RULE) == Choice(A, prepare=B)
    assert choose([*leased(A), Copy(B, At.COMING)], ENDPOINTS, loads, RULE) == Choice(None, (B, A))
    for at in (At.LEAVING, At.PARTING):
        assert choose([*leased(A), Copy(B, At.COMING), Copy(C, at)], ENDPOINTS, loads, RULE) == Choice(A, prepare=B)


def test_an_excess_that_is_over_before_a_load_would_be_makes_no_copy() -> None:
    """One copy has less than CERTAIN times the bound: chance. Several that have as much are asked for often enough that the next one pays."""
    loads = loads_of(25.9, 25.9, 18.4, 18.4, 18.4, 18.4)  # 26.1 is the bound
    for endpoint in ENDPOINTS:
        loads.demand(endpoint.address, 16, 16)
    assert choose(leased(A), ENDPOINTS, loads, RULE) == Choice(A)
    loads.say(A.address, Engine(running=26.8), 1.0)
    loads.say(B.address, Engine(running=26.8), 1.0)
    assert loads.bound(RULE.factor) < 26.8
    assert choose([*leased(A), Copy(C, At.COLD)], ENDPOINTS, loads, RULE) == Choice(A)
    assert choose([*leased(A), Copy(C, At.WARM)], ENDPOINTS, loads, RULE) == Choice(None, (C, A))
    assert choose([*leased(A, B), Copy(C, At.COLD)], ENDPOINTS, loads, RULE) == Choice(None, (C, A))
    loads.say(A.address, Engine(running=28), 2.0)
    assert choose([*leased(A), Copy(C, At.COLD)], ENDPOINTS, loads, RULE) == Choice(None, (C, A))


def test_a_copy_that_others_had_made_is_used_before_one_is_made() -> None:
    """Its lease costs one call."""
    assert choose([*leased(A), Copy(D, At.WARM)], ENDPOINTS, loads_of(30, 10, 10, 10, 10, 10), RULE) == Choice(None, (D, A))


def test_where_everybody_has_too_much_the_least_loaded_copy_serves() -> None:
    """A copy at an endpoint that is above the bound itself helps nobody."""
    loads = loads_of(30, 30, 30, 1, 1, 1)
    assert choose(leased(A, B), (A, B, C), loads, RULE) == Choice(A)


def test_no_more_copies_are_made_than_the_adapter_may_have() -> None:
    """Those that others had made count."""
    loads = loads_of(30, 30, 10, 10, 10, 10)
    rule = Rule(RULE.draw, max_copies=2)
    assert choose(leased(A, B), ENDPOINTS, loads, rule) == Choice(A)
    assert choose(leased(A), ENDPOINTS, loads, rule, copying=FAR_ORIGIN).prepare == C


# ---- spare copies


def test_a_second_copy_of_what_is_hot_is_made_where_there_is_room() -> None:
    """And none where it would take another adapter's place, or where one is enough by the settings."""
    loads = loads_of(10, 10)
    assert choose(leased(A), ENDPOINTS, loads, RULE, is_hot=True) == Choice(A, prepare=B)
    assert choose(leased(A, D), ENDPOINTS, loads, RULE, is_hot=True) == Choice(A)
    assert choose(leased(A), ENDPOINTS, loads, Rule(RULE.draw, max_copies=1), is_hot=True) == Choice(A)
    for endpoint in ENDPOINTS:
        loads.demand(endpoint.address, 16, 16)
    assert choose(leased(A), ENDPOINTS, loads, RULE, is_hot=True) == Choice(A)


def test_a_copy_for_the_case_of_a_death_is_made_in_another_zone() -> None:
    """If the key's first endpoints have one with room; else in the same one."""
    a, b, c = (replace(endpoint, zone=zone) for endpoint, zone in ((A, "x"), (B, "x"), (C, "y")))
    for rule, is_hot in ((RULE, True), (Rule(RULE.draw, min_copies=2), False)):
        assert choose(leased(a), (a, b, c), loads_of(10, 9, 10), rule, is_hot=is_hot).prepare == c
        assert choose(leased(a), (a, b, c), loads_of(10, 9, 30), rule, is_hot=is_hot).prepare == b


def test_the_copies_that_an_adapter_shall_have_are_made_whatever_the_load() -> None:
    """Also where they take another's place: somebody said so."""
    loads = loads_of(0)
    for endpoint in ENDPOINTS:
        loads.demand(endpoint.address, 16, 16)
    rule = Rule(RULE.draw, min_copies=3)
    assert choose(leased(A), ENDPOINTS, loads, rule).prepare == B
    assert choose([*leased(A), Copy(B, At.WARM)], ENDPOINTS, loads, rule).prepare == C
    assert choose([*leased(A, B), Copy(C, At.WARM)], ENDPOINTS, loads, rule).prepare is None


# ---- copies that are not where the key belongs


TWENTY = tuple(Endpoint(f"10.0.1.{i}:8000") for i in range(20))
MANY_LEASED = [TWENTY[4], TWENTY[2], TWENTY[0], TWENTY[1], TWENTY[3]]


def loads_of_twenty(*in_flight: float) -> Loads:
    """Of the first ones; the rest have 10."""
    loads = Loads(endpoint.address for endpoint in TWENTY)
    for place, endpoint in enumerate(TWENTY):
        loads.say(endpoint.address, Engine(running=in_flight[place] if place < len(in_flight) else 10), 0.0)
    return loads


def usable(copies: list[Endpoint], order: tuple[Endpoint, ...], loads: Loads, rule: Rule = RULE) -> Sequence[Endpoint]:
    return of_leased(copies, order, loads, rule, 1)[0]


def looks(copies: list[Endpoint], order: tuple[Endpoint, ...], loads: Loads, count: int, *, is_hot: bool = False) -> int:
    """With how many of `count` requests all copies are looked at, too. Each goes at once."""
    said = [of_leased(copies, order, loads, RULE, look, is_hot=is_hot) for look in range(count)]
    assert all(first for first, _ in said)
    return sum(wants_look for _, wants_look in said)


def test_of_a_few_copies_the_leased_ones_are_enough_while_one_is_at_home_and_one_below_the_bound() -> None:
    """The least loaded first, of equals the first in the key's order. Else a copy may have to be made."""
    assert usable([A], ENDPOINTS, loads_of(10)) == [A]
    assert usable([C, A], ENDPOINTS, loads_of(10, 10, 9)) == (C, A)
    assert usable([C, A], ENDPOINTS, loads_of(10)) == (A, C)
    assert not usable([C, D], ENDPOINTS, loads_of(10))
    assert not usable([A], ENDPOINTS, loads_of(30, 10, 10, 10, 10, 10))
    assert not usable([A], ENDPOINTS, loads_of(10), Rule(RULE.draw, min_copies=2))
    assert not usable([A], ENDPOINTS, loads_of(10), Rule(RULE.draw, "maglev"))
    assert not usable([], ENDPOINTS, loads_of(10))


def test_the_only_copy_of_what_is_hot_is_compared_with_other_places_now_and_then() -> None:
    """A second one is for the death of its node, and not urgent; none is made where each engine is full."""
    loads = loads_of(10)
    assert looks([A], ENDPOINTS, loads, 2 * OFTEN) == 0
    assert looks([A], ENDPOINTS, loads, 2 * OFTEN, is_hot=True) == 2
    assert looks([A, C], ENDPOINTS, loads, 2 * OFTEN, is_hot=True) == 0
    for endpoint in ENDPOINTS:
        loads.demand(endpoint.address, 16, 16)
    loads.sweep(0.0)
    assert looks([A], ENDPOINTS, loads, 2 * OFTEN, is_hot=True) == 0
    loads.demand(F.address, 14, 16)  # the last two are for what is nowhere
    loads.sweep(0.0)
    assert looks([A], ENDPOINTS, loads, 2 * OFTEN, is_hot=True) == 0
    loads.demand(F.address, 13, 16)
    loads.sweep(0.0)
    assert looks([A], ENDPOINTS, loads, 2 * OFTEN, is_hot=True) == 2


def test_near_the_bound_the_next_copy_is_prepared_where_engines_have_room() -> None:
    """What costs nothing is there before it is needed; of many copies, when not half of them are less busy."""
    near, half = loads_of_twenty(12, 12, 12, 10, 10), loads_of_twenty(12, 12, 10, 10, 10)  # 12.9 and 12.8 are the bounds
    assert looks([TWENTY[0]], TWENTY, near, 4 * SOON) == 4
    assert looks([TWENTY[3]], TWENTY[3:], near, 4 * SOON) == 0
    assert choose(leased(TWENTY[0]), TWENTY, near, RULE) == Choice(TWENTY[0], prepare=TWENTY[1])
    assert choose(leased(*TWENTY[:2]), TWENTY, near, RULE).prepare == TWENTY[2]
    assert choose(leased(TWENTY[0], TWENTY[3]), TWENTY, near, RULE).prepare is None
    assert [choose(leased(*MANY_LEASED), TWENTY, loads, RULE).prepare for loads in (near, half)] == [TWENTY[5], None]
    for endpoint in TWENTY:
        near.demand(endpoint.address, 16, 16)
    near.sweep(0.0)
    assert looks([TWENTY[0]], TWENTY, near, 4 * SOON) == 0
    assert [choose(leased(*copies), TWENTY, near, RULE).prepare for copies in ([TWENTY[0]], MANY_LEASED)] == [None, None]


def test_of_many_copies_that_are_as_busy_routers_take_different_ones() -> None:
    """Else all would send to the same one what each sends before the engine speaks again."""
    loads = loads_of_twenty()
    assert {of_leased(MANY_LEASED, TWENTY, loads, RULE, look)[0][0] for look in range(5)} == set(MANY_LEASED)


def test_of_many_copies_the_leased_ones_are_enough_even_above_the_bound() -> None:
    """All are looked at now and then, else no copy would be added or come home; and before the request goes where the least loaded one queues."""
    below, above = loads_of_twenty(11, 30, 9, 10, 10), loads_of_twenty(31, 31, 30, 31, 31)
    assert [TWENTY.index(endpoint) for endpoint in usable(MANY_LEASED, TWENTY, below)] == [2, 4, 0, 3]
    assert usable(MANY_LEASED, TWENTY, above) == (TWENTY[2],)
    assert looks(MANY_LEASED, TWENTY, below, 2 * SELDOM) == 2
    assert looks(MANY_LEASED, TWENTY, above, 2 * OFTEN) == 2
    assert looks([*TWENTY[:18]], TWENTY, loads_of_twenty(*[50] * 10), 4 * 18) == 4
    above.say(TWENTY[2].address, Engine(running=20, waiting=10), 1.0)
    assert not usable(MANY_LEASED, TWENTY, above)


def test_a_home_without_a_copy_is_prepared() -> None:
    """Its endpoints have come since the copy was made."""
    assert choose(leased(D), ENDPOINTS, loads_of(10, 9), RULE) == Choice(D, prepare=B)
    assert choose([*leased(D), Copy(A, At.WARM)], ENDPOINTS, loads_of(10, 10), RULE) == Choice(D, prepare=A)
    assert choose(leased(D, B), ENDPOINTS, loads_of(10, 10), RULE).prepare is None
    assert choose(leased(B), ENDPOINTS, loads_of(10, 10), RULE).prepare is None


# ---- no leased copy


def test_a_copy_in_another_engines_memory_is_waited_for() -> None:
    """The next endpoints of the key stand by, in case it makes no progress."""
    assert choose([Copy(D, At.WARM), Copy(E, At.COLD)], ENDPOINTS, loads_of(10), RULE).wait_for[:2] == (D, A)


def test_one_that_has_too_much_is_left_alone_for_another_that_has_the_files() -> None:
    """A load takes half a second. Where it would have to be fetched from afar, it is prepared meanwhile, unless the engine that has it queues for longer."""
    loads = loads_of(30, 10, 10, 10, 10, 10)
    assert choose([Copy(A, At.WARM), Copy(B, At.COLD)], ENDPOINTS, loads, RULE).wait_for[0] == B
    choice = choose([Copy(A, At.WARM)], ENDPOINTS, loads, RULE, copying=FAR_ORIGIN)
    assert (choice.wait_for[0], choice.prepare) == (A, B)
    loads.say(A.address, Engine(running=10, waiting=21), 1.0)
    assert choose([Copy(A, At.WARM)], ENDPOINTS, loads, RULE, copying=FAR_ORIGIN).wait_for[0] == B
    assert choose([Copy(A, At.WARM)], (A,), loads_of(40, 10, 10, 10, 10, 10), RULE).wait_for == (A,)


def test_a_new_copy_is_made_at_the_less_loaded_of_the_keys_first_two() -> None:
    """Then at the first of the next that is below the bound; where none is, at the least loaded."""
    assert choose([], ENDPOINTS, loads_of(10, 9, 1, 10, 10, 10), RULE).wait_for == (B, A, C, D, E, F)
    assert choose([], ENDPOINTS, loads_of(30, 30, 11, 1, 5, 5), RULE).wait_for[0] == C
    assert choose([], (A, B), loads_of(31, 30, 5, 5, 5, 5), RULE).wait_for == (B, A)


def test_room_in_the_engine_goes_before_files_and_files_before_load() -> None:
    """What a full engine is given costs another adapter its place; a fetch takes longer than a load."""
    loads = loads_of(10, 11)
    assert choose([Copy(B, At.COLD)], ENDPOINTS, loads, RULE).wait_for[0] == B
    loads.demand(B.address, 16, 16)
    assert choose([Copy(B, At.COLD)], ENDPOINTS, loads, RULE).wait_for[0] == A


def test_what_drains_serves_what_is_leased_there_until_another_has_it() -> None:
    """Nobody waits for a drain."""
    assert choose([Copy(A, At.LEAVING)], (B, C), loads_of(10), RULE) == Choice(A, prepare=B)
    assert choose([Copy(A, At.LEAVING), Copy(C, At.WARM)], (B, C), loads_of(10), RULE) == Choice(A, prepare=C)
    assert choose([Copy(A, At.LEAVING), *leased(B)], (B, C), loads_of(10), RULE).serve == B
    assert choose([Copy(A, At.LEAVING)], (), loads_of(10), RULE) == Choice(A)


def test_what_only_a_draining_engine_has_is_leased_there_while_another_is_given_it() -> None:
    """A call takes milliseconds, and a fetch seconds: another router had the lease."""
    assert choose([Copy(A, At.PARTING)], (B, C), loads_of(10), RULE) == Choice(None, (A, B, C), prepare=B)
    assert choose([Copy(A, At.PARTING), Copy(C, At.WARM)], (B, C), loads_of(10), RULE).wait_for[0] == C
    assert choose([Copy(A, At.PARTING), *leased(B)], (B, C), loads_of(10), RULE) == Choice(B)


def test_without_any_endpoint_there_is_nothing_to_wait_for() -> None:
    """The caller says so to the client."""
    assert choose([], (), loads_of(10), RULE) == Choice()


def test_who_has_the_files_is_not_filled_up_to_the_bound_because_of_them() -> None:
    """From NEAR the bound on, the key's other endpoint fetches them: later loads have two places to choose from."""
    at = [Copy(B, At.COLD)]
    assert choose(at, ENDPOINTS, loads_of(5, 10, 10, 10, 10, 10), RULE).wait_for[0] == B
    assert choose(at, ENDPOINTS, loads_of(5, 11, 10, 10, 10, 10), RULE).wait_for[0] == A
    assert choose([*at, Copy(A, At.COLD)], ENDPOINTS, loads_of(11, 12, 10, 10, 10, 10), RULE).wait_for[0] == A


STATES = st.sampled_from(At)


def test_a_draining_engine_is_asked_where_another_wait_would_be_for_a_fetch() -> None:
    """The node that has the files is none of the key's places, or has too much."""
    copies = [Copy(A, At.PARTING), Copy(B, At.COLD)]
    assert choose(copies, (), loads_of(10), RULE) == Choice(None, (A,))
    assert choose(copies, (B, C), loads_of(10, 30, 10, 10, 10, 10), RULE) == Choice(None, (A, B, C), C)


@given(
    st.lists(st.tuples(st.sampled_from(ENDPOINTS), STATES), unique_by=lambda pair: pair[0].address),
    st.permutations(ENDPOINTS),
    st.integers(0, 6),
    st.lists(st.integers(0, 60), min_size=6, max_size=6),
    st.booleans(),
)
def test_whatever_is_known_a_choice_can_be_followed(
    known: list[tuple[Endpoint, At]], order: list[Endpoint], count: int, in_flight: list[int], is_hot: bool
) -> None:
    """Only a leased copy serves at once, nothing is made where it is in memory, and a request is refused only if there is nowhere to go."""
    copies = [Copy(endpoint, at) for endpoint, at in known]
    ready = [e for e in order if all(copy.endpoint != e or copy.at not in (At.LEAVING, At.PARTING) for copy in copies)][:count]
    choice = choose(copies, ready, loads_of(*in_flight), RULE, is_hot=is_hot)
    at = dict(known)
    assert choice.serve is None or at[choice.serve] in (At.LEASED, At.LEAVING)
    assert (choice.serve is None) != (not choice.wait_for) or not (copies or ready) or all(copy.at is At.COLD for copy in copies)
    assert choice.prepare is None or at.get(choice.prepare) in (None, At.WARM, At.COLD, At.COMING, At.LOADING)
    assert len(set(choice.wait_for)) == len(choice.wait_for)


# ---- the rules for comparison


@pytest.mark.parametrize(("balance", "first"), [("maglev", A), ("hrw", A), ("random", F), ("least_adapters", C), ("least_latency", B), ("bin_pack", D)])
def test_the_other_rules_put_one_copy_where_their_names_say(balance: Balance, first: Endpoint) -> None:
    """The least adapters; the shortest queue; the most adapters of those with room."""
    loads = loads_of(30, 1, 30, 30, 30, 30)
    for endpoint, adapters in zip(ENDPOINTS, (5, 6, 1, 7, 8, 9), strict=True):
        loads.demand(endpoint.address, adapters, 8)
    rule = Rule(RULE.draw, balance)
    assert choose([], ENDPOINTS, loads, rule).wait_for[0] == first
    assert choose(leased(first), ENDPOINTS, loads, rule) == Choice(first)
    assert choose([Copy(first, At.LEAVING)], (), loads, rule) == Choice(first)


def test_owner_only_waits_for_the_owner_whatever_it_carries() -> None:
    """That is what it is compared for."""
    assert choose(leased(B), ENDPOINTS, loads_of(50, 1), Rule(RULE.draw, "maglev")).wait_for[0] == A


# ---- settings, and base models


def test_the_first_pattern_that_matches_says_how_many_copies() -> None:
    """Other adapters have as many as the load makes."""
    rules = Rules(RULE, [("demo/*", 2, 0), ("demo/big", 3, 4), ("*", 1, 1)])
    assert [(rules.of(name).min_copies, rules.of(name).max_copies) for name in ("demo/big", "other")] == [(2, 0), (1, 1)]
    assert Rules(RULE).of("other") is RULE


def test_a_base_models_request_goes_to_the_least_loaded_of_a_few() -> None:
    """Of those that follow each other from another place each turn."""
    loads = loads_of(5, 4, 3, 4, 5, 5)
    assert {least_of(ENDPOINTS, loads, turn)[0] for turn in range(9)} == {C}
    many = [Endpoint(f"10.1.0.{i}:8000") for i in range(1, 101)]
    chosen = [least_of(many, Loads(e.address for e in many), turn) for turn in range(100)]
    assert {choice[0] for choice in chosen} == set(many)
    assert {len(choice) for choice in chosen} == {SAMPLED}


# ---- copies on their way


def test_who_comes_while_a_copy_is_made_waits_for_that_one() -> None:
    """Though the key's other endpoint has less in flight by now: a second fetch of the same adapter helps nobody."""
    loads = loads_of(0)
    for _ in range(1000):
        loads.hold(A.address)
    assert choose([Copy(A, At.COMING)], ENDPOINTS, loads, RULE).wait_for[0] == A
    assert choose([Copy(A, At.COMING), Copy(D, At.WARM)], ENDPOINTS, loads, RULE).wait_for[0] == D


def test_one_fetch_from_an_origin_is_enough_and_then_copies_are_made_from_it() -> None:
    """Who comes before any node has the files waits for them, however many do; who comes later waits where there is room, or has another copy made."""
    busy = loads_of(40, 10, 10, 10, 10, 10)
    assert choose([Copy(A, At.COMING)], ENDPOINTS, busy, RULE).wait_for[0] == A
    assert choose([Copy(A, At.LOADING)], ENDPOINTS, busy, RULE).wait_for[0] == B
    assert choose([Copy(A, At.LOADING), Copy(B, At.COMING)], ENDPOINTS, busy, RULE).wait_for[0] == B
    assert choose([Copy(A, At.LOADING)], (A,), busy, RULE).wait_for[0] == A


def test_what_others_hold_at_a_copy_on_its_way_counts_as_what_is_held_here() -> None:
    """Of an adapter that all ask for, each router has its part of those who wait."""
    for routers, place in ((1, A), (4, B)):
        loads = loads_of(10)
        loads.say(A.address, Engine(running=9, routers=routers), 0.0)
        loads.hold(A.address)
        assert choose([Copy(A, At.LOADING)], ENDPOINTS, loads, RULE).wait_for[0] == place


def test_as_many_copies_are_on_their_way_as_are_there() -> None:
    """Above the bound each request has the next one prepared, until there are twice as many."""
    loads = loads_of(30, 30, 10, 10, 10, 10)
    assert choose([*leased(A, B), Copy(C, At.COMING)], ENDPOINTS, loads, RULE, copying=FAR_ORIGIN).prepare == D
    assert choose([*leased(A, B), Copy(C, At.COMING), Copy(D, At.COMING)], ENDPOINTS, loads, RULE, copying=FAR_ORIGIN).prepare == C


def test_of_many_copies_another_is_prepared_while_half_of_them_are_below_the_bound() -> None:
    """What so many requests ask for evens out what others cause, as long as some engine that has it can take more."""
    most, half = loads_of_twenty(30, 30, 30), loads_of_twenty(30, 30)
    assert choose(leased(*MANY_LEASED), TWENTY, most, RULE).prepare == TWENTY[5]
    assert choose(leased(*MANY_LEASED), TWENTY, half, RULE).prepare is None
    assert [looks(MANY_LEASED, TWENTY, loads, SELDOM) for loads in (most, half)] == [SELDOM // OFTEN, 1]


# ---- where all wait for one copy


def test_who_has_waited_with_too_many_others_chooses_again() -> None:
    """What still waits there does not count: the first to come go first. Others' rules know no such thing."""
    loads = loads_of(30, 10, 10, 10, 10, 10)
    assert [is_below(endpoint, loads, RULE) for endpoint in (A, B)] == [False, True]
    for _ in range(30):
        loads.hold(B.address)
    assert is_below(B, loads, RULE)
    assert is_below(A, loads, Rule(RULE.draw, "maglev"))


def test_where_an_engine_is_crowded_a_request_waits_even_for_a_fetch() -> None:
    """32 requests at once are not too many for any; in a fleet that does more, half as much again as the bound."""
    for in_flight, choice in (
        ((31, 10, 10, 10, 10, 10), Choice(A, prepare=B)),
        ((32, 10, 10, 10, 10, 10), Choice(None, (B, A))),
        ((80, 50, 50, 50, 50, 50), Choice(A, prepare=B)),
        ((140, 90, 50, 50, 50, 50), Choice(None, (B, A))),
    ):
        assert choose(leased(A), (A, B), loads_of(*in_flight), RULE, copying=FAR_ORIGIN) == choice


def test_where_few_run_a_request_waits_neither_for_a_load_nor_for_a_fetch_unless_they_queue() -> None:
    """One more of five is hardly noticed. Of requests of a fifth of a second, ten queue for no longer than a load takes twice where four run."""
    few, queue, short = (loads_of(5, 1, 1, 1, 1, 1) for _ in range(3))
    for loads, waiting in ((queue, 11), (short, 10)):
        loads.say(A.address, Engine(running=4, waiting=waiting), 1.0)
        loads.service.look(0.0, 20.0, 20.0, 0)
        loads.service.look(2.0, 20.0, 20.0, 200)
        assert loads.service.mean_s == pytest.approx(0.2)
    for at in (At.LEASED, At.WARM):
        for others in ([], [Copy(B, At.COLD)]):
            copying = Copying(load_s=0.26, fetch_s=0.26)
            assert is_first(A, at, others, few, copying)
            assert is_first(A, at, others, short, copying)
            assert not is_first(A, at, others, queue, copying)


def is_first(place: Endpoint, at: At, others: list[Copy], loads: Loads, copying: Copying) -> bool:
    """Whether a request with a copy there goes there, or waits for that one."""
    choice = choose([Copy(place, at), *others], ENDPOINTS, loads, RULE, copying=copying)
    return (choice.serve or choice.wait_for[0]) == place


def test_a_drain_ends_where_engines_hold_fewer_adapters_than_are_asked_for() -> None:
    """What fell out of a full successor's memory is loaded there again: as long as the draining engine were asked for it, that one would never be empty."""
    assert choose([Copy(A, At.PARTING)], (B, C), loads_of(10), RULE) == Choice(None, (A, B, C), B)
    loads = loads_of(10)
    assert choose([Copy(A, At.PARTING), Copy(B, At.COLD)], (B, C), loads, RULE) == Choice(None, (A, B, C), B)
    assert choose([Copy(A, At.PARTING), Copy(B, At.WARM)], (B, C), loads, RULE).wait_for[0] == B
    for endpoint in (B, C):
        loads.demand(endpoint.address, 16, 16)
    assert choose([Copy(A, At.PARTING), Copy(B, At.COLD)], (B, C), loads, RULE).wait_for[0] == B


# ---- as many copies as there may be


ONE_COPY = replace(RULE, max_copies=1)


def test_no_copy_is_made_at_home_where_there_is_one_elsewhere_and_no_more_may_be() -> None:
    """It would serve in turn with the other."""
    assert choose(leased(D), ENDPOINTS, loads_of(2), ONE_COPY) == Choice(D)
    assert choose(leased(D), ENDPOINTS, loads_of(2), RULE).prepare == A


@pytest.mark.parametrize("at", [At.WARM, At.LOADING])
def test_where_no_more_may_be_the_one_copy_is_waited_for_however_busy_it_is(at: At) -> None:
    """With nobody waiting for it twice."""
    loads = loads_of(40, 2, 2, 2, 2, 2)
    choice = choose([Copy(A, at)], ENDPOINTS, loads, ONE_COPY)
    assert (choice.wait_for[0], choice.prepare) == (A, None)
    other = choose([Copy(A, at)], ENDPOINTS, loads, RULE)
    assert other.wait_for[0] != A or other.prepare is not None
