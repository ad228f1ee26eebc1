"""The short cases, on a smaller scale: a few seconds of load around each fault. `python -m tests.faults --all` runs all of them, as long as they take."""

import re
from pathlib import Path

import pytest

from .cases import CASES, Case
from .record import Verdict
from .report import text
from .runner import run_apart

SCALE = 0.3


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.is_short])
async def test_short_cases_keep_their_bounds(case: Case) -> None:
    """Counts and statuses, and times by the bounds that are promised, without the machine's own stops."""
    outcome = await run_apart(case, SCALE, None)
    if outcome.verdict is Verdict.SKIPPED:
        pytest.skip(outcome.why)
    assert outcome.verdict is Verdict.PASS, text(case, outcome)


def test_the_readme_has_every_case() -> None:
    """Its table is `--all --markdown`; a case that is added or renamed has to be in it."""
    lines = (Path(__file__).parent / "README.md").read_text().splitlines()
    assert [found[1] for line in lines if (found := re.match(r"\| `(\w+)` \|", line))] == [case.name for case in CASES]
