"""Limits on what is held, what is held when they bite, and bodies that do not arrive."""

import pytest

from extproc.core.exchange import JUDGED_HERE_BYTES
from extproc.errors import BodyTimeout, LoraExtprocError, Overloaded
from extproc.metrics import RouterMetrics
from extproc.router.admission import LEAST_RATE, Admission
from tests.fakes.wait import Clock, turns, until

from .fakes import Gateway, Router, body, chat, headers, serve


class Arriving:
    """A request whose body is arriving; when it is refused, its bytes go."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.held_bytes = 0
        self.arrives_since = self.arrived_last = 0.0
        self.error: LoraExtprocError | None = None

    def refuse(self, error: LoraExtprocError) -> None:
        assert self.error is None
        self.error = error
        self.admission.change_bytes(self, -self.held_bytes)

    def more(self, size: int) -> None:
        self.admission.arrives(self)
        self.admission.change_bytes(self, size)


def admission(*, max_waiting: int = 2, max_waiting_per_adapter: int = 1, max_bytes: int = 10, clock: Clock | None = None) -> Admission:
    return Admission(
        RouterMetrics(),
        max_waiting=max_waiting,
        max_waiting_per_adapter=max_waiting_per_adapter,
        max_bytes=max_bytes,
        body_deadline_s=30.0,
        clock=clock or Clock(),
    )


# ---- places


def test_each_limit_names_itself() -> None:
    """All places, and the places of one adapter; whoever waits for any endpoint takes only one of all."""
    limits = admission()
    with limits.waiting("a"):
        with pytest.raises(Overloaded, match="1 requests wait for a; the limit is 1"), limits.waiting("a"):
            pass
        with limits.waiting("b"), pytest.raises(Overloaded, match="2 requests wait; the limit is 2"), limits.waiting("c"):
            pass
    with limits.waiting(""), limits.waiting(""), pytest.raises(Overloaded, match="2 requests wait; the limit is 2"), limits.waiting(""):
        pass
    with limits.waiting("a"):
        pass


async def test_one_more_than_may_wait_is_429_and_the_others_are_served() -> None:
    """With Retry-After; other adapters still have places."""
    router = Router()
    stager = router.stager_of(router.owner("demo/sql"))
    stager.gate.clear()
    held = [Gateway(router, chat("demo/sql")) for _ in range(3)]
    await until(lambda: router.residency.waiting(router.owner("demo/sql"), "demo/sql") == 3)
    refused = await serve(router, chat("demo/sql"))
    assert (refused.immediate().status.code, refused.immediate().details) == (429, "overloaded")
    assert refused.answer_headers()["retry-after"] == "1"
    stager.gate.set()
    for stream in held:
        await stream.end()
        assert stream.destination()
    assert router.value("lora_extproc_held_requests") == 0


async def test_what_waits_is_given_back_when_the_client_goes() -> None:
    """Place and bytes."""
    router = Router()
    router.stager_of(router.owner("demo/sql")).gate.clear()
    stream = Gateway(router, chat("demo/sql"))
    await until(lambda: router.residency.waiting(router.owner("demo/sql"), "demo/sql") == 1)
    stream.processor.abandon()
    await turns(5)
    assert (router.value("lora_extproc_held_requests"), router.value("lora_extproc_held_bytes")) == (0, 0)
    router.stager_of(router.owner("demo/sql")).gate.set()


# ---- bytes


def test_bytes_that_go_down_are_never_too_many() -> None:
    """Only what adds to them is refused."""
    limits = admission()
    one = Arriving(limits)
    one.more(10)
    limits.change_bytes(one, -5)
    assert (one.error, one.held_bytes) == (None, 5)


def test_over_the_budget_the_oldest_bodies_that_are_not_complete_go() -> None:
    """As many as it takes. The newcomer is served, and so is a body that has ended, however old."""
    limits = admission(max_bytes=100)
    ended, oldest, second, third = (Arriving(limits) for _ in range(4))
    for holder in (ended, oldest, second, third):
        holder.more(25)
    limits.arrived(ended)
    newcomer = Arriving(limits)
    newcomer.more(40)
    assert [bool(holder.error) for holder in (ended, oldest, second, third, newcomer)] == [False, True, True, False, False]
    assert isinstance(oldest.error, Overloaded)
    assert oldest.error.message == "request bodies take over 100 bytes together"
    assert sum(holder.held_bytes for holder in (ended, oldest, second, third, newcomer)) == 90


def test_where_every_other_body_has_ended_the_newcomer_goes() -> None:
    """Nobody's work is thrown away for a body that has only begun."""
    limits = admission(max_bytes=100)
    ended, newcomer = Arriving(limits), Arriving(limits)
    ended.more(90)
    limits.arrived(ended)
    newcomer.more(20)
    assert (ended.error, isinstance(newcomer.error, Overloaded)) == (None, True)


def test_a_body_that_grows_when_it_is_decoded_is_the_one_that_goes() -> None:
    """It has ended, and there is no other that has not."""
    limits = admission(max_bytes=100)
    one = Arriving(limits)
    one.more(50)
    limits.arrived(one)
    limits.change_bytes(one, 60)
    assert isinstance(one.error, Overloaded)


async def test_bodies_that_take_too_much_together_are_429() -> None:
    """The oldest: a client that opens bodies and never ends them takes nobody's place. What is held is given back when its stream ends."""
    router = Router(max_body_bytes=1000)
    held = [Gateway(router, [headers(), body(b" " * 900, end=False)]) for _ in range(5)]
    assert held[0].immediate().details == "overloaded"
    assert [stream.written for stream in held[1:]] == [[], [], [], []]
    assert router.value("lora_extproc_held_bytes") == 3600
    assert router.count("rejected", "overloaded") == 0
    for stream in held:
        stream.processor.abandon()
    assert router.value("lora_extproc_held_bytes") == 0
    assert router.count("rejected", "overloaded") == 1


async def test_a_message_that_is_not_whole_counts_from_its_first_byte() -> None:
    """In the transport it takes the same memory: 64 MiB of one would be nobody's otherwise. When it is whole, it is counted once."""
    router = Router(max_body_bytes=1000)
    stream = Gateway(router, [headers()])
    stream.processor.holds(700)
    assert router.value("lora_extproc_held_bytes") == 700
    stream.processor.holds(0)
    stream.show(body(b" " * 700, end=False))
    assert router.value("lora_extproc_held_bytes") == 700
    stream.processor.holds(3900)
    assert stream.immediate().details == "overloaded"
    stream.processor.abandon()
    assert router.value("lora_extproc_held_bytes") == 0


# ---- bodies that do not arrive


def test_a_body_that_stops_arriving_is_refused() -> None:
    """408 after the deadline, counted from its last byte; another that goes on arriving is not."""
    clock = Clock()
    limits = admission(max_bytes=2**30, clock=clock)
    stops, goes_on, ends = (Arriving(limits) for _ in range(3))
    for holder in (stops, goes_on, ends):
        holder.more(10 * LEAST_RATE)
    clock.now += 25
    goes_on.more(100 * LEAST_RATE)
    limits.arrived(ends)
    clock.now += 4.9
    limits.refuse_late()
    assert not [holder for holder in (stops, goes_on, ends) if holder.error]
    clock.now += 0.1
    limits.refuse_late()
    assert isinstance(stops.error, BodyTimeout)
    assert stops.error.message == f"nothing of the body has arrived for 30 s; {10 * LEAST_RATE} bytes are here"
    assert (goes_on.error, ends.error) == (None, None)


def test_a_body_that_trickles_is_refused() -> None:
    """A byte per second would hold a place for ever: over the deadline it must come at LEAST_RATE."""
    clock = Clock()
    limits = admission(max_bytes=2**30, clock=clock)
    trickles, is_slow = Arriving(limits), Arriving(limits)
    for second in range(60):
        clock.now = 1000.0 + second
        if trickles.error is None:
            trickles.more(1)
        is_slow.more(LEAST_RATE)
        limits.refuse_late()
        if trickles.error is not None:
            break
    assert second == 31
    assert isinstance(trickles.error, BodyTimeout)
    assert trickles.error.message.startswith(f"the body arrives at less than {LEAST_RATE} bytes per second")
    assert is_slow.error is None


async def test_a_stream_whose_body_stops_is_answered_and_its_bytes_are_given_back() -> None:
    """408 body_timeout; a body that has ended waits for its adapter as long as it likes, and one that needs no verdict as long as its engine does."""
    router = Router()
    router.now = 1000.0
    router.stager_of(router.owner("demo/sql")).gate.clear()
    stops = Gateway(router, [headers(), body(b'{"model":', end=False)])
    unbegun = Gateway(router, [headers()])
    in_the_transport = Gateway(router, [headers()])
    in_the_transport.processor.holds(5)
    waits = Gateway(router, chat("demo/sql"))
    passes = Gateway(router, [headers({":path": "/v1/responses/r/cancel"}), body(b"x", end=False)])
    answered = len(passes.written)
    router.now = 1029.0
    router.admission.refuse_late()
    assert stops.written == []
    router.now = 1030.0
    router.admission.refuse_late()
    for stream in (stops, unbegun, in_the_transport):
        assert (stream.immediate().status.code, stream.immediate().details) == (408, "body_timeout")
    assert (waits.written, len(passes.written)) == ([], answered)
    for stream in (stops, unbegun, in_the_transport, waits, passes):
        stream.processor.abandon()
    assert router.value("lora_extproc_held_bytes") == 0
    assert router.count("rejected", "body_timeout") == 3


async def test_late_bodies_are_looked_for_by_themselves() -> None:
    """And one fault of a request does not end that."""
    router = Router(body_deadline_s=0.001)
    refusals = []

    class Faulty(Arriving):
        def refuse(self, error: LoraExtprocError) -> None:
            refusals.append(error)
            raise RuntimeError

    faulty = Faulty(router.admission)
    router.admission.arrives(faulty)
    router.now = 1.0
    router.admission.start()
    await until(lambda: refusals)
    stops = Gateway(router, [headers()])
    router.now = 2.0
    await until(lambda: stops.written)
    assert stops.immediate().details == "body_timeout"
    await router.admission.stop()


# ---- what clients say of time


async def test_a_clients_own_timeout_ends_its_wait() -> None:
    """Others go on waiting."""
    router = Router()
    router.stager_of(router.owner("demo/sql")).gate.clear()
    patient = Gateway(router, chat("demo/sql"))
    hasty = await serve(router, chat("demo/sql", {"x-request-timeout": "10ms"}))
    assert hasty.immediate().details == "staging"
    assert patient.written == []
    router.stager_of(router.owner("demo/sql")).gate.set()
    await patient.end()
    assert patient.destination()


async def test_a_timeout_that_is_none_is_400() -> None:
    """Rather than a wait of another length than was asked for."""
    stream = await serve(Router(), chat("demo/sql", {"x-request-timeout": "soon"}))
    assert stream.immediate().details == "invalid_request"


async def test_a_body_that_is_given_back_counts_until_its_stream_ends() -> None:
    """The gateway may read slowly; small ones are gone at once."""
    router = Router(max_body_bytes=2**21)
    for size, left in ((10, 0), (JUDGED_HERE_BYTES + 1, JUDGED_HERE_BYTES + 1)):
        text = b'{"model":"base","x":"'
        text += b"x" * (size - len(text) - 2) + b'"}' if size > len(text) else b'"}'
        stream = Gateway(router, [headers(), body(text)])
        await until(lambda: stream.written)  # noqa: B023
        assert router.value("lora_extproc_held_bytes") == left
        await stream.end()
        assert router.value("lora_extproc_held_bytes") == 0
