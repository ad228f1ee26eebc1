"""What an endpoint may be given: every row of the module's table."""

from itertools import product

import pytest

from extproc.core.standing import Observed, Stager, Standing

READY, DRAINING, DOWN = Standing.READY, Standing.DRAINING, Standing.DOWN


@pytest.mark.parametrize(
    ("observed", "standing", "why"),
    [
        (Observed(), READY, ""),
        (Observed(Stager.READY, "", engine_answers=True), READY, ""),
        (Observed(Stager.NOT_READY, "the engine is not healthy"), DOWN, "the engine is not healthy"),
        (Observed(Stager.STOPPING, "the stager is stopping"), DRAINING, "the stager is stopping"),
        (Observed(Stager.STOPPING, "the stager is stopping", engine_answers=True), DRAINING, "the stager is stopping"),
        (Observed(Stager.STOPPING, "the stager is stopping", engine_answers=False), DOWN, "the stager is stopping; its engine does not answer either"),
        (Observed(is_silent=True), READY, ""),
        (Observed(is_silent=True, engine_answers=True), READY, ""),
        (Observed(is_silent=True, engine_answers=False), DOWN, "its stager is silent; its engine does not answer either"),
        (Observed(Stager.STOPPING, "the stager is stopping", is_silent=True), DRAINING, "the stager is stopping"),
        (Observed(Stager.STOPPING, "the stager is stopping", is_silent=True, engine_answers=True), DRAINING, "the stager is stopping"),
        (
            Observed(Stager.STOPPING, "the stager is stopping", is_silent=True, engine_answers=False),
            DOWN,
            "the stager is stopping; its engine does not answer either",
        ),
        (Observed(Stager.LOST, "its stream ended"), DRAINING, "its stream ended"),
        (Observed(Stager.LOST, "its stream ended", engine_answers=True), DRAINING, "its stream ended"),
        (Observed(Stager.LOST, "its stream ended", engine_answers=False), DOWN, "its stream ended; its engine does not answer either"),
    ],
)
def test_an_endpoint_stands_as_its_stager_and_its_engine_were_heard(observed: Observed, standing: Standing, why: str) -> None:
    """With the sentence that logs and the control API show."""
    assert observed.standing() == (standing, why)


def test_an_engine_that_its_stager_calls_ill_is_down_whatever_it_answers_to_others() -> None:
    """The stager looks closer: `/health` may answer while loads fail."""
    for silent, answers in product((False, True), (None, False, True)):
        assert Observed(Stager.NOT_READY, "why", silent, answers).standing() == (DOWN, "why")


def test_a_stager_that_speaks_needs_no_witness() -> None:
    """A probe that failed once, and was not repeated since, takes nobody out."""
    assert Observed(Stager.READY, engine_answers=False).standing() == (READY, "")


def test_whoever_is_not_ready_has_a_reason() -> None:
    """Nobody is taken out without a word."""
    for stager, silent, answers in product(Stager, (False, True), (None, False, True)):
        standing, why = Observed(stager, "why" if stager is not Stager.READY else "", silent, answers).standing()
        assert bool(why) == (standing is not READY)
