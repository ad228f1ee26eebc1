"""How long requests and copies take, by what is seen of them."""

import pytest

from extproc.core.durations import LEAST, NEWEST, USUAL_S, WINDOW_S, Copying, Service


def watched(service: Service, seconds: int, *, running: float, per_s: float, begin: int = 0) -> float:
    """Its mean after so many seconds of an even load."""
    for second in range(begin, begin + seconds + 1):
        service.look(second, running, running, per_s)
    return service.mean_s


def test_few_requests_say_nothing() -> None:
    """The usual time counts until LEAST have ended, and again when they are long ago."""
    service = Service()
    assert watched(service, 3, running=2, per_s=LEAST / 4) == USUAL_S
    assert watched(service, 3, running=2, per_s=LEAST / 4, begin=4) == pytest.approx(2 / (LEAST / 4), rel=0.5)
    assert watched(service, int(5 * WINDOW_S), running=0, per_s=0, begin=8) == USUAL_S


def test_a_load_that_begins_is_not_taken_for_short_requests() -> None:
    """A fleet that fills up has ended nothing yet, however much was sent."""
    service = Service()
    for second in range(5):
        service.look(second, 100 * second, 100 * second, 100)
    assert service.mean_s == USUAL_S


def test_another_load_is_known_within_a_minute() -> None:
    """What is long ago counts less and less."""
    service = Service()
    assert watched(service, 120, running=40, per_s=10) == pytest.approx(4)
    assert watched(service, int(2 * WINDOW_S), running=2, per_s=10, begin=121) == pytest.approx(0.2, abs=0.6)


def test_the_newest_copies_say_how_long_the_next_one_takes() -> None:
    """Loads and fetches by themselves, smoothed."""
    copying = Copying(load_s=1.0, fetch_s=10.0)
    copying.took(2.0, is_fetch=False)
    assert (copying.load_s, copying.fetch_s) == (1.0 + NEWEST, 10.0)
    for _ in range(40):
        copying.took(5.0, is_fetch=True)
    assert copying.fetch_s == pytest.approx(5.0, abs=0.01)
