"""How long a request may be held."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.deadline import wait_s
from extproc.errors import InvalidRequest


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (None, 60.0),
        ("30", 30.0),
        ("1.5", 1.5),
        ("30s", 30.0),
        ("500ms", 0.5),
        ("1m", 60.0),
        ("30S", 30.0),
        ("1H", 100.0),
        ("1h", 100.0),
        ("2M", 100.0),
        ("", 60.0),
        ("  ", 60.0),
        ("9999", 100.0),
        (" 5 ", 5.0),
        ("0", 0.0),
    ],
)
def test_what_the_client_asks_within_what_the_operator_allows(asked: str | None, seconds: float) -> None:
    """Without a header the default; never more than the maximum."""
    assert wait_s("x-request-timeout", {} if asked is None else {"x-request-timeout": asked}, 60.0, 100.0) == seconds


@pytest.mark.parametrize("asked", ["soon", "-1", "1e9", "inf", "nan", "5 s", "1h2m", "٣", "30 s", "1d", "0x1", "1.", ".5", "1" * 10])
def test_anything_else_is_refused(asked: str) -> None:
    """With the header's name and the forms that are understood."""
    with pytest.raises(InvalidRequest, match=r"x-wait: .* is no time; 30, 30s, 500ms, 2m and 1h are"):
        wait_s("x-wait", {"x-wait": asked}, 60.0, 100.0)


def test_what_the_client_wrote_is_shown_in_part() -> None:
    """A header may have sixty kilobytes."""
    with pytest.raises(InvalidRequest) as caught:
        wait_s("x-wait", {"x-wait": "9" * 60_000}, 60.0, 100.0)
    assert len(caught.value.message) < 120


def test_the_default_is_within_the_maximum_too() -> None:
    """An operator may set the one without the other."""
    assert wait_s("x-wait", {}, 60.0, 30.0) == 30.0


@given(st.text(max_size=20))
def test_no_text_raises_anything_else(asked: str) -> None:
    """A time within the limits, or InvalidRequest."""
    with contextlib.suppress(InvalidRequest):
        assert 0 <= wait_s("x-wait", {"x-wait": asked}, 60.0, 100.0) <= 100
