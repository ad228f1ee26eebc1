"""Requests in flight, by what engines say and by what was sent since."""

import pytest

from extproc.core.durations import USUAL_S
from extproc.core.endpoint import Endpoint
from extproc.core.load import ENDING, FEW, FORGOTTEN_S, MAX_SENT, STALE_S, UNHEARD, Engine, Loads


def test_what_was_sent_after_an_engines_word_is_added_to_it() -> None:
    """A word counts what had arrived when its metrics were read, and nothing that came later."""
    loads = Loads(["a", "b"])
    for at in (1.0, 2.0, 3.0):
        loads.send("a", at)
    loads.say("a", Engine(running=5, waiting=2), taken_at=2.0)
    assert loads["a"].in_flight == 8


def test_what_was_sent_before_the_last_look_is_in_the_number_or_was_replaced() -> None:
    """A stager looks every so often, and its silence says that there was no step until its last look."""
    loads = Loads(["a"])
    loads.say("a", Engine(running=5, every_s=0.5), taken_at=0.0)
    loads.send("a", 0.1)
    loads.send("a", 0.45)
    assert loads["a"].in_flight == 7
    loads.sweep(0.505)
    assert loads["a"].in_flight == 7  # its word of the look at 0.5 may still be on its way
    loads.sweep(0.6)
    assert loads["a"].in_flight == 5
    loads.send("a", 0.9)
    assert loads["a"].in_flight == 6


def test_what_was_sent_counts_once_for_each_router() -> None:
    """The others send as much, of which nothing is heard before the next word."""
    loads = Loads(["a"])
    loads.say("a", Engine(running=5, routers=4), taken_at=0.0)
    loads.send("a", 0.1)
    assert loads["a"].in_flight == 9


def test_a_guess_of_what_others_send_does_not_put_an_endpoint_above_the_bound() -> None:
    """One request of one of four routers is no evidence of four: it counts once, and the bound is lower by what the others send an endpoint on average."""
    loads = Loads(["a", "b"])
    for address in ("a", "b"):
        loads.say(address, Engine(running=20, routers=4), taken_at=0.0)
    loads.send("a", 0.1)
    assert (loads["a"].in_flight, loads["a"].known) == (24, 21)
    assert loads.bound(1.25) == 1.25 * 20 - UNHEARD * 3 / 2
    a, b = Endpoint("a"), Endpoint("b")
    assert loads.below((a, b), 21) == [b]
    loads.stand_one("a", ready=False)
    assert loads.bound(1.25) == 1.25 * 20
    loads.stand_one("a", ready=True)
    loads.say("a", Engine(running=20, routers=1), taken_at=0.2)
    assert loads.bound(1.25) == 1.25 * 20


def test_what_waits_here_for_an_adapter_counts_at_the_endpoint_that_will_have_it() -> None:
    """A hundred requests for cold adapters that come within a fetch's time are spread. They do not raise the mean, and with it the bound of all others."""
    loads = Loads(["a", "b"])
    loads.send("b", 0.0)
    for _ in range(3):
        loads.hold("a")
    loads.release("a")
    assert loads["a"].in_flight == 2
    assert loads.mean() == 0.5
    loads.stand_one("b", ready=False)
    assert loads.mean() == 0
    loads.sweep(1.0)
    assert loads.mean() == 0


def test_what_other_routers_hold_counts_as_what_is_held_here() -> None:
    """Its stager tells it with the engine's load. They call it once for each adapter: of one that many wait for here, as many wait there."""
    loads = Loads(["a", "b"])
    loads.say("a", Engine(running=10, others_held=3, routers=3), 0.0)
    loads.say("b", Engine(running=10), 0.0)
    assert (loads["a"].known, loads["a"].in_flight, loads["a"].gone) == (13, 13, 10)
    assert loads.mean() == 10
    assert loads["a"].awaited == 13
    for _ in range(4):
        loads.hold("a")
    assert loads["a"].awaited == 10 + 4 + 8


def test_how_long_requests_take_follows_from_what_runs_and_what_ends() -> None:
    """What ends is what was sent by all routers, less what the engines have more than before. It takes no time in a queue."""
    loads = Loads(["a", "b"])
    assert loads.service.mean_s == USUAL_S
    for second in range(60):
        have = min(second, 20)
        for address in ("a", "b"):
            loads.say(address, Engine(running=have, waiting=5.0, routers=2), second)
            for _ in range(5):
                loads.send(address, second)
        loads.sweep(second + 0.5)
    assert loads.service.mean_s == pytest.approx(2 * 20 / (2 * 2 * 5), rel=0.1)


def test_who_waited_for_an_endpoint_that_has_gone_counts_nowhere() -> None:
    """Another may have come under its address, for which nobody has waited yet."""
    loads = Loads(["a"])
    loads.hold("a")
    loads.follow(["b"])
    loads.release("a")
    loads.release("b")
    assert loads["b"].in_flight == loads.mean() == 0


def test_the_mean_takes_what_was_sent_to_replace_what_ended() -> None:
    """Up to ENDING of what runs; else a router that sends all requests would take the fleet for busier the longer no word came. A burst counts."""
    loads = Loads(["a", "b"])
    loads.say("a", Engine(running=16), taken_at=0.0)
    loads.say("b", Engine(running=16), taken_at=0.0)
    for _ in range(int(ENDING * 32)):
        loads.send("a", 0.1)
    assert loads.mean() == 16
    loads.send("a", 0.1)
    loads.send("b", 0.1)
    assert loads.mean() == 17


def test_a_word_that_is_older_than_the_last_is_ignored() -> None:
    """Two streams of one stager may overlap while its certificates are renewed."""
    loads = Loads(["a"])
    loads.say("a", Engine(running=5), taken_at=2.0)
    loads.say("a", Engine(running=50), taken_at=1.0)
    assert loads["a"].in_flight == 5


def test_without_an_engines_word_what_was_sent_is_forgotten_after_a_while() -> None:
    """Of an endpoint whose engine says nothing no request is known to have ended."""
    loads = Loads(["a"])
    loads.send("a", 0.0)
    loads.send("a", 1.0)
    loads.sweep(FORGOTTEN_S + 0.5)
    assert (loads["a"].in_flight, loads.mean()) == (1, 1)


def test_an_engine_that_falls_silent_is_not_taken_for_as_busy_as_it_was_for_ever() -> None:
    """Its last word counts until STALE_S have passed."""
    loads = Loads(["a"])
    loads.say("a", Engine(running=9, slots=8), taken_at=0.0)
    loads.sweep(STALE_S - 1)
    assert loads.mean() == 9
    loads.sweep(STALE_S + 1)
    assert (loads.mean(), loads["a"].engine.slots) == (0, 8)


def test_the_mean_is_that_of_the_ready_endpoints() -> None:
    """What drains or is down takes no part of what comes."""
    loads = Loads(["a", "b", "c"])
    loads.say("a", Engine(running=4), taken_at=0.0)
    loads.say("c", Engine(running=100), taken_at=0.0)
    loads.stand(ready=["a", "b"])
    assert loads.mean() == 2
    for _ in range(9):
        loads.send("c", 1.0)
    assert loads.mean() == 2


def test_an_endpoint_that_stays_keeps_its_load_when_others_come_and_go() -> None:
    """A change of membership forgets only those that have left."""
    loads = Loads(["a", "b"])
    loads.say("a", Engine(running=4), taken_at=0.0)
    loads.follow(["a", "c"])
    assert (loads["a"].in_flight, loads.mean(), "b" in loads) == (4, 2, False)
    loads.send("b", 1.0)  # decided before it left
    loads.say("b", Engine(running=1), taken_at=1.0)


def test_a_few_requests_are_never_too_many() -> None:
    """An idle fleet does not copy an adapter because two of its requests came at once."""
    assert Loads(["a", "b"]).bound(1.25) == FEW


def test_what_is_remembered_of_an_endpoint_is_bounded() -> None:
    """A router that sends 10,000 requests between two words of an engine counts the last of them."""
    loads = Loads(["a"])
    for i in range(3 * MAX_SENT):
        loads.send("a", i / 1e6)
    assert loads["a"].in_flight == loads.mean() == MAX_SENT


@pytest.mark.parametrize(("running", "waiting", "queues"), [(0, 0, False), (24, 6, False), (24, 7, True), (4, 4, False), (4, 5, True), (0, 5, True)])
def test_a_queue_counts_when_it_is_a_quarter_of_what_runs_and_more_than_four(running: float, waiting: float, *, queues: bool) -> None:
    """A shorter one has gone before it is heard of."""
    loads = Loads(["a"])
    loads.say("a", Engine(running, waiting), taken_at=0.0)
    assert loads["a"].is_queueing is queues
