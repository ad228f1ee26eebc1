"""What a body is by its headers, and the model it names, plain or compressed, JSON or form."""

import contextlib
import gzip
import zlib
from email.message import EmailMessage

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.content import Content, Kind, decompress, form_model, of_headers
from extproc.errors import BodyTooLarge, InvalidRequest

LIMIT = 2**20
COMPRESS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


def form(*parts: tuple[str, bytes], boundary: str = "xyz") -> bytes:
    body = b"".join(b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode(), value) for head, value in parts)
    return body + b"--%s--\r\n" % boundary.encode()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-type": "application/json"}, Content(Kind.JSON, b"", "")),
        ({"content-type": "Application/JSON; charset=utf-8"}, Content(Kind.JSON, b"", "")),
        ({"content-type": "application/vnd.x+json", "content-encoding": "GZIP"}, Content(Kind.JSON, b"", "gzip")),
        ({"content-type": "application/json", "content-encoding": "identity"}, Content(Kind.JSON, b"", "")),
        ({"content-type": 'multipart/form-data; boundary="a b"'}, Content(Kind.FORM, b"a b", "")),
        ({"content-type": "text/plain"}, None),
        ({"content-type": "application/x-www-form-urlencoded"}, None),
        ({}, None),
    ],
)
def test_headers_say_what_the_body_is(headers: dict[str, str], expected: Content | None) -> None:
    """What names no model passes."""
    assert of_headers(headers) == expected


@pytest.mark.parametrize("given_type", ["multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'x' * 71}"])
def test_a_form_without_usable_boundary_is_refused(given_type: str) -> None:
    """RFC 2046 allows 1 to 70 characters."""
    with pytest.raises(InvalidRequest, match="boundary"):
        of_headers({"content-type": given_type})


@pytest.mark.parametrize("encoding", COMPRESS)
@given(plain=st.binary(max_size=5000))
def test_every_encoding_gives_the_body_back(encoding: str, plain: bytes) -> None:
    """What was compressed is what is judged."""
    assert decompress(COMPRESS[encoding](plain), encoding, LIMIT) == plain


@pytest.mark.parametrize("encoding", COMPRESS)
def test_bombs_are_refused_before_they_unfold(encoding: str) -> None:
    """By size, and by ratio below it."""
    for size, limit in ((50 * 2**20, LIMIT), (50 * 2**20, 2**30)):
        with pytest.raises(BodyTooLarge):
            decompress(COMPRESS[encoding](bytes(size)), encoding, limit)


@pytest.mark.parametrize("encoding", COMPRESS)
def test_broken_streams_are_refused(encoding: str) -> None:
    """Cut short, or something else."""
    whole = COMPRESS[encoding](b'{"model":"a"}' * 1000)
    for body in (whole[: len(whole) // 2], b"no such thing"):
        try:
            got = decompress(body, encoding, LIMIT)
        except InvalidRequest:
            continue
        assert got != b'{"model":"a"}' * 1000  # zstd gives what it has; the verdict on it is the parser's
        with pytest.raises(InvalidRequest):
            Content(Kind.JSON, b"", "").model(got, LIMIT)


def test_unknown_encodings_are_named() -> None:
    """With those that are understood."""
    with pytest.raises(InvalidRequest, match="'compress' is not understood"):
        decompress(b"", "compress", LIMIT)


@pytest.mark.parametrize("encoding", ["", *COMPRESS])
def test_the_model_of_json_in_any_encoding(encoding: str) -> None:
    """The same verdict as on the plain body."""
    plain = b'{"messages":[],"model":"demo/sql"}'
    body = COMPRESS[encoding](plain) if encoding else plain
    assert Content(Kind.JSON, b"", encoding).model(body, LIMIT) == "demo/sql"


def test_the_model_of_a_form() -> None:
    """As an audio transcription sends it: a file and fields in any order."""
    audio = ('name="file"; filename="a.wav"\r\nContent-Type: audio/wav', b'\r\n--xy name="model"\r\n\r\nno' + bytes(range(256)))
    assert form_model(form(audio, ('name="model"', b"demo/sql"), ('name="language"', b"en")), b"xyz") == "demo/sql"
    assert form_model(form(('name="model"', "ü/x".encode())), b"xyz") == "ü/x"
    assert form_model(form(audio), b"xyz") is None


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (form(('name="model"', b"a"), ('name="model"', b"b")), "2 times"),
        (form(('name="model"; filename="x"', b"a")), "is a file"),
        (form(('name="model"', b"\xff")), "not UTF-8"),
        (form(('name="model"', b"a"))[:-6], "no end"),
        (b"", "no end"),
        (b"--xyz\r\nbroken\r\n--xyz--", "no headers"),
    ],
)
def test_broken_forms_are_refused(body: bytes, why: str) -> None:
    """Router and engine must never read different models."""
    with pytest.raises(InvalidRequest, match=why):
        form_model(body, b"xyz")


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    """InvalidRequest or an answer."""
    for kind in Kind:
        with contextlib.suppress(InvalidRequest):
            Content(kind, b"x", "").model(b"--x\r\n" + body + b"\r\n--x--" if kind is Kind.FORM else body, LIMIT)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_forms_as_the_standard_library_writes_them(model: str) -> None:
    """An independent writer."""
    message = EmailMessage()
    message.make_mixed(boundary="xyz")
    part = EmailMessage()
    part.set_content(model.encode(), "application", "octet-stream", cte="binary")
    del part["content-disposition"]
    part["content-disposition"] = 'form-data; name="model"'
    message.attach(part)
    text = message.as_bytes(policy=message.policy.clone(linesep="\r\n", cte_type="8bit", max_line_length=None))
    assert form_model(text.partition(b"\r\n\r\n")[2], b"xyz") == model


# -- another model in the same body


@pytest.mark.parametrize("encoding", ["", "gzip", "deflate", "br", "zstd"])
def test_another_model_comes_back_plain(encoding: str) -> None:
    """A compressed body is not compressed again: the engine is on the same network as the gateway."""
    body = b'{"messages": [], "model": "a"}'
    compress = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstandard.compress}[encoding]
    assert Content(Kind.JSON, b"", encoding).with_model(compress(body), "a", "b@sha256:00", 1000) == b'{"messages": [], "model": "b@sha256:00"}'


@pytest.mark.parametrize("first", [True, False])
def test_another_model_in_a_form_changes_that_part_alone(first: bool) -> None:
    """Audio and boundaries stay byte for byte."""
    model = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nacme/a\r\n'
    file = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x.wav"\r\nContent-Type: audio/wav\r\n\r\n\x00\r\nmodel\xff\r\n'
    body = (model + file if first else file + model) + b"--B--\r\n"
    renamed = Content(Kind.FORM, b"B", "").with_model(body, "acme/a", "acme/a@sha256:00", 1000)
    assert renamed == body.replace(b"acme/a", b"acme/a@sha256:00")
    assert form_model(renamed, b"B") == "acme/a@sha256:00"


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="x"; name="model"',
        b'Content-Disposition: form-data; name="model"; name="x"',
        b'Content-Disposition: form-data; name="x"\r\nContent-Disposition: form-data; name="model"',
        b"Content-Disposition: form-data; name*=utf-8''model",
        b'Content-Disposition: form-data; NAME="x"; name="model"',
    ],
)
def test_a_part_that_is_described_twice_is_refused(head: bytes) -> None:
    """The engine's parser takes the last where ours takes the first: it would read another model."""
    body = b"--B\r\n" + head + b"\r\n\r\nother\r\n--B--\r\n"
    with pytest.raises(InvalidRequest, match="twice"):
        form_model(body, b"B")


def test_a_file_name_that_looks_like_a_parameter_is_none() -> None:
    """In quotes."""
    body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a; name=model; name=x"\r\n\r\n1\r\n--B--\r\n'
    assert form_model(body, b"B") is None


@pytest.mark.parametrize("parameter", ["name*", "name*0*"])
def test_a_parameter_that_is_cut_short_is_refused(parameter: str) -> None:
    """The library's parser raises IndexError for it."""
    with pytest.raises(InvalidRequest, match="cut short"):
        form_model(f"--b\r\nContent-Disposition: form-data; {parameter}\r\n\r\nx\r\n--b--".encode(), b"b")
    with pytest.raises(InvalidRequest, match="cut short"):
        of_headers({"content-type": f"multipart/form-data; boundary=b; {parameter}"})
