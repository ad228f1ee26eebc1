"""Bounds as values: what they count, what they let pass, and that none holds for want of evidence."""

import json

import pytest

from .load import Bystander, Kind, Request
from .record import ALWAYS, NOISE_S, Outcome, Record, Verdict, exactly, figure, held_at_most, none_failed, none_failed_twice, only_for, outcome, over_within


def sent(began: float, took: float = 0.01, status: int = 200, kind: Kind = Kind.WARM, again: Request | None = None, *, wrong: bool = False) -> Request:
    return Request(kind, "warm/1", began, began + took, status, "" if status == 200 else "gateway", wrong=wrong, again=again)


def record(*requests: Request, stops: tuple[tuple[float, float], ...] = ()) -> Record:
    return Record(Bystander(list(stops)), list(requests), fault_at=10.0, mended_at=20.0)


def test_a_failed_request_counts_until_its_retry_succeeds() -> None:
    """The first bound sees it, the second only if the retry failed, too."""
    helped, lost = sent(11, status=503, again=sent(12)), sent(11, status=503, again=sent(12, status=503))
    assert not none_failed(Kind.WARM).judge(record(sent(1), helped)).holds
    assert none_failed_twice(Kind.WARM).judge(record(sent(1), helped)).holds
    assert not none_failed_twice(Kind.WARM).judge(record(sent(1), lost)).holds
    assert not none_failed_twice(Kind.WARM).judge(record(sent(11, status=503))).holds


@pytest.mark.parametrize(
    "bound",
    [
        none_failed(Kind.COLD),
        none_failed_twice(Kind.COLD),
        held_at_most(1, Kind.COLD),
        over_within(1, Kind.COLD),
        figure("x", 1, "x"),
        exactly("x", 1, "x"),
        only_for("no_space", Kind.WARM),
    ],
)
def test_a_bound_does_not_hold_for_want_of_evidence(bound: object) -> None:
    """Where no request of its kind was sent, or nothing was noted, nothing is shown."""
    assert not bound.judge(record(sent(11))).holds  # type: ignore[attr-defined]


def test_a_bound_on_all_kinds_wants_each_of_them() -> None:
    """A load without cold requests would prove nothing about them."""
    assert not none_failed().judge(record(sent(1), sent(1, kind=Kind.BASE))).holds
    assert none_failed().judge(record(sent(1), sent(1, kind=Kind.BASE), sent(1, kind=Kind.COLD))).holds


def test_the_machines_own_stops_are_taken_off() -> None:
    """What the bystander saw while a request waited was nobody's fault."""
    slow = sent(11, took=1.0 + NOISE_S + 0.3)
    assert not held_at_most(1.0, Kind.WARM).judge(record(slow)).holds
    assert held_at_most(1.0, Kind.WARM).judge(record(slow, stops=((10.9, 11.4),))).holds


def test_recovery_is_the_start_of_the_last_that_noticed() -> None:
    """Whether it failed or was slow; what came before the fault, and what the case itself sent, does not count."""
    requests = [sent(5, took=3), sent(11, status=503), sent(14, took=2), sent(16), sent(18, took=9, kind=Kind.OWN)]
    judged = over_within(3.0, Kind.WARM).judge(record(*requests))
    assert (judged.measured, judged.holds) == ("4 s", False)
    assert over_within(4.0, Kind.WARM).judge(record(*requests)).holds


def test_wrong_weights_and_deaths_fail_every_case() -> None:
    """Also in what a case itself sends, and in a retry."""
    wrong = sent(11, wrong=True, kind=Kind.OWN)
    retried = sent(11, status=503, again=sent(12, wrong=True))
    for requests, died in (((wrong,), []), ((retried,), []), ((sent(11),), ["node-1-engine ended by itself"])):
        seen = record(*requests)
        seen.died = died
        assert sum(not bound.judge(seen).holds for bound in ALWAYS) == 1


def test_an_outcome_is_the_same_on_the_other_side_of_a_pipe() -> None:
    """A verdict read from JSON is a verdict, and decides the exit code."""
    before = outcome("x", record(sent(11, status=503)), [none_failed(Kind.WARM)], 1.0, known=False)
    after = Outcome.of(json.loads(json.dumps(before.plain())))
    assert after == before
    assert after.verdict is Verdict.FAIL


def test_a_known_case_is_not_held_against_the_suite() -> None:
    """It is reported as known while it fails, and as passed as soon as it does not."""
    seen = record(sent(11, status=503, again=sent(12)))
    assert outcome("x", seen, [none_failed(Kind.WARM)], 1.0, known=True).verdict is Verdict.KNOWN
    assert outcome("x", seen, [none_failed(Kind.WARM)], 1.0, known=False).verdict is Verdict.FAIL
    assert outcome("x", seen, [none_failed_twice(Kind.WARM)], 1.0, known=True).verdict is Verdict.PASS
