"""Which pages may read the router's own answers."""

import pytest

from extproc.core.cors import answer_headers


@pytest.mark.parametrize(
    ("origin", "allowed", "expected"),
    [
        ("https://a.test", ("*",), {"access-control-allow-origin": "*"}),
        ("null", ("*",), {"access-control-allow-origin": "*"}),
        ("https://a.test", ("https://a.test", "*"), {"access-control-allow-origin": "*"}),
        ("https://a.test", ("https://a.test", "https://b.test"), {"access-control-allow-origin": "https://a.test", "vary": "Origin"}),
        ("https://c.test", ("https://a.test",), {"vary": "Origin"}),
        ("https://a.test.evil", ("https://a.test",), {"vary": "Origin"}),
        ("HTTPS://A.TEST", ("https://a.test",), {"vary": "Origin"}),
        ("https://a.test", (), {}),
        (None, ("*",), {}),
        ("", ("*",), {}),
        (None, ("https://a.test",), {}),
    ],
)
def test_an_answer_may_be_read_by_the_origins_of_the_settings(origin: str | None, allowed: tuple[str, ...], expected: dict[str, str]) -> None:
    """An origin is compared whole, as browsers spell it; what is not asked for is not said; caches are told what the answer depends on."""
    assert answer_headers(origin, allowed) == expected
