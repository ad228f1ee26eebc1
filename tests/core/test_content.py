"""What a body is by its headers, and the one reading of it, plain or encoded, JSON or form."""

import contextlib
import gzip
import json
import pickle
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.content import Content, Kind, of_headers
from extproc.errors import BodyTooLarge, InvalidRequest

LIMIT = 2**20
ENCODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstandard.compress}
JSON = b'{"messages": [], "model": "a"}'
FORM = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="x.wav"\r\nContent-Type: audio/wav\r\n\r\n\x00\r\nmodel\xff\r\n'
    b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--B--\r\n'
)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-type": "application/json"}, Content(Kind.JSON)),
        ({"content-type": "Application/JSON; charset=utf-8"}, Content(Kind.JSON)),
        ({"content-type": "application/vnd.x+json", "content-encoding": "GZIP"}, Content(Kind.JSON, b"", ("gzip",))),
        ({"content-type": "application/json", "content-encoding": "identity"}, Content(Kind.JSON)),
        ({"content-type": "application/json", "content-encoding": "gzip, br"}, Content(Kind.JSON, b"", ("gzip", "br"))),
        ({"content-type": 'multipart/form-data; boundary="a b"'}, Content(Kind.FORM, b"a b")),
        ({"content-type": "multipart/form-data; boundary=B", "content-encoding": "zstd"}, Content(Kind.FORM, b"B", ("zstd",))),
        ({"content-type": "text/plain", "content-encoding": "compress"}, None),
        ({"content-type": "application/x-www-form-urlencoded"}, None),
        ({}, None),
    ],
)
def test_headers_say_what_the_body_is(headers: dict[str, str], expected: Content | None) -> None:
    """What names no model passes."""
    assert of_headers(headers) == expected


@pytest.mark.parametrize(("encodings", "can"), [((), True), (("gzip",), False)])
def test_only_plain_json_is_scanned_while_it_arrives(encodings: tuple[str, ...], can: bool) -> None:
    """A form's parts may come in any order, and a compressed body is read as a whole."""
    assert Content(Kind.JSON, b"", encodings).can_be_scanned is can
    assert not Content(Kind.FORM, b"B", encodings).can_be_scanned


@pytest.mark.parametrize("encodings", [(), ("gzip",), ("deflate",), ("br",), ("zstd",), ("br", "gzip")])
@pytest.mark.parametrize(("kind", "plain"), [(Kind.JSON, JSON), (Kind.FORM, FORM)])
@pytest.mark.parametrize("buffer", [bytes, memoryview])
def test_one_reading_is_enough_to_name_another_model(
    encodings: tuple[str, ...], kind: Kind, plain: bytes, buffer: Callable[[bytes], bytes | memoryview]
) -> None:
    """The plain body with another value in the place that was found; a compressed one is not compressed again."""
    content = Content(kind, b"B" if kind is Kind.FORM else b"", encodings)
    body = plain
    for name in encodings:
        body = ENCODERS[name](body)
    reading = pickle.loads(pickle.dumps(content.read(buffer(body), LIMIT)))
    assert reading.model == "a"
    assert reading.plain == (plain if encodings else None)
    renamed = plain[: reading.begin] + content.spelled('b"é') + plain[reading.end :]
    assert content.read(_encoded(renamed, encodings), LIMIT).model == 'b"é'
    assert len(renamed) == len(plain) + len(content.spelled('b"é')) - len(content.spelled("a"))


def _encoded(plain: bytes, encodings: tuple[str, ...]) -> bytes:
    for name in encodings:
        plain = ENCODERS[name](plain)
    return plain


def test_a_form_may_name_no_model() -> None:
    """Unlike JSON; the place is empty then."""
    body = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\na\r\n--B--\r\n'
    assert Content(Kind.FORM, b"B").read(body, LIMIT).model is None


def test_the_limit_counts_what_a_body_decodes_to() -> None:
    """And leaves plain bodies to whoever holds them."""
    body = json.dumps({"model": "a", "x": "y" * 5000}).encode()
    assert Content(Kind.JSON).read(body, 10).model == "a"
    with pytest.raises(BodyTooLarge, match="over 1000 bytes"):
        Content(Kind.JSON, b"", ("gzip",)).read(gzip.compress(body), 1000)


@given(st.binary(max_size=300), st.sampled_from(list(Kind)), st.sampled_from([(), *((name,) for name in ENCODERS)]))
def test_no_bytes_raise_anything_else(body: bytes, kind: Kind, encodings: tuple[str, ...]) -> None:
    """A reading or one of our errors."""
    for given_body in (body, _encoded(body, encodings), b"--x\r\n" + body + b"\r\n--x--"):
        with contextlib.suppress(InvalidRequest, BodyTooLarge):
            Content(kind, b"x", encodings).read(given_body, LIMIT)
