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
        ("9999", 100.0),
        (" 5 ", 5.0),
        ("0", 0.0),
    ],
)
def test_what_the_client_asks_within_what_the_operator_allows(asked: str | None, seconds: float) -> None:
    """Without a header the default; never more than the maximum."""
    assert wait_s(asked, 60.0, 100.0) == seconds


@pytest.mark.parametrize("asked", ["", "soon", "-1", "1e9", "inf", "nan", "5 s", "1h2m", "٣"])
def test_anything_else_is_refused(asked: str) -> None:
    """With the forms that are understood."""
    with pytest.raises(InvalidRequest, match="is no time"):
        wait_s(asked, 60.0, 100.0)


@given(st.text(max_size=20))
def test_no_text_raises_anything_else(asked: str) -> None:
    """A time within the limits, or InvalidRequest."""
    with contextlib.suppress(InvalidRequest):
        assert 0 <= wait_s(asked, 60.0, 100.0) <= 100
