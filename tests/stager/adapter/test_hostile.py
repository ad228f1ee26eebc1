"""A hundred hostile adapters: each is refused for what it is, or taken because it is only large."""

import re
from pathlib import Path

import pytest

from extproc.errors import MAX_MESSAGE_CHARACTERS, InvalidAdapter
from extproc.stager.adapter.check import check
from extproc.stager.adapter.rules import Rules
from extproc.stager.threads import through
from tests.fakes.adapters import CONFIG, WEIGHTS
from tests.fakes.hostile_adapters import Hostile, hostile

ALL = list(hostile(scale=32))


def test_there_are_a_hundred_of_them() -> None:
    """With names of their own."""
    assert len({one.name for one in ALL}) == len(ALL) >= 100


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_a_hostile_adapter_is_judged_by_what_it_is(tmp_path: Path, one: Hostile) -> None:
    """With a message for a person: one line, at most so many characters, without control characters of the adapter's."""
    (tmp_path / CONFIG).write_bytes(one.config())
    (tmp_path / WEIGHTS).write_bytes(one.weights())
    if not one.complaint:
        through(check(tmp_path, Rules()))
        return
    with pytest.raises(InvalidAdapter) as raised:
        through(check(tmp_path, Rules()))
    assert re.search(one.complaint, str(raised.value)), str(raised.value)
    assert len(str(raised.value)) <= MAX_MESSAGE_CHARACTERS
    assert str(raised.value).isprintable()
