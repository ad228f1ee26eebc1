"""The `model` of a form, against the reader that engines use; what readers differ on, and what costs too much, is refused by name."""

import contextlib
import re
from collections.abc import Callable, Mapping
from random import Random

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.core import forms
from extproc.core.forms import boundary, read
from extproc.core.reading import Reading
from extproc.errors import InvalidRequest
from tests.core import engine_forms

MODEL = b'Content-Disposition: form-data; name="model"'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'


def form(*parts: tuple[bytes, bytes], bound: bytes = b"xyz", end: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (bound, head, value) for head, value in parts) + b"--" + bound + end


def one(head: bytes, value: bytes = b"a") -> bytes:
    """A form of one part, described by one line."""
    return form((b"Content-Disposition: " + head, value))


def agrees(content_type: str, body: bytes) -> Reading | None:
    """The reading, if there is one, after checking that an engine reads the same."""
    try:
        bound = boundary(content_type)
        reading = read(body, bound)
        assert read(memoryview(body), bound) == reading
    except InvalidRequest:
        return None
    try:
        engine = engine_forms.models(content_type, body)
    except engine_forms.EngineRefuses:
        return reading  # answered 400 by the engine instead of by us
    assert engine == ([] if reading.model is None else [reading.model])
    return reading


# ---- content-type


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("multipart/form-data; boundary=xyz", b"xyz"),
        ("Multipart/Form-Data;BOUNDARY=xyz", b"xyz"),
        ("multipart/form-data ;\tboundary = xyz ", b"xyz"),
        ('multipart/form-data; boundary="a b"; charset=UTF-8', b"a b"),
        ('multipart/form-data; charset="utf-8"; boundary="xyz";', b"xyz"),
        ("multipart/form-data;; boundary=xyz;", b"xyz"),
        ("multipart/form-data; boundary==_?part:1/2@x,y", b"=_?part:1/2@x,y"),
        ("multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW", b"----WebKitFormBoundary7MA4YWxkTrZu0gW"),
        ("multipart/form-data; boundary=b((((", b"b(((("),
        (f"multipart/form-data; boundary={'x' * 256}", b"x" * 256),
    ],
)
def test_usual_and_unusual_boundaries_are_taken_as_engines_take_them(content_type: str, expected: bytes) -> None:
    """More than RFC 2046 allows, since clients send it and python-multipart takes it."""
    assert boundary(content_type) == expected
    body = form((FILE, b"\x00"), (MODEL, b"a"), bound=expected)
    assert agrees(content_type, body) == Reading("a", body.index(b"\r\n\r\na\r\n") + 4, body.index(b"\r\n\r\na\r\n") + 5)
    assert engine_forms.models(content_type, body) == ["a"]


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("", "without a usable boundary of 1 to 256"),
        ("; boundary=", "not understood: 'boundary='"),
        ('; boundary=""', "without a usable boundary"),
        ('; boundary="x "', "without a usable boundary"),
        ('; boundary="a\\\\b"', "without a usable boundary"),
        (f"; boundary={'x' * 257}", "without a usable boundary"),
        ("; boundary=ü", "not ASCII"),
        ("; boundary=x\x00", "not understood"),
        ('; boundary="x', "not understood"),
        ('; boundary="x"y', "not understood"),
        ('; boundary=x"y', "not understood"),
        ("; boundary", "not understood"),
        ("; boundary=x; boundary=y", "the parameter 'boundary' twice"),
        ("; boundary=x; BOUNDARY=x", "the parameter 'boundary' twice"),
        ("; boundary=x; charset=utf-16", "charset 'utf-16'; a form must be UTF-8"),
        ("; boundary=x; charset=us-ascii", "charset 'us-ascii'; a form must be UTF-8"),
        ("; boundary*=utf-8''x", "without a usable boundary"),
        ("; boundary=x; name*", "not understood"),
        ("".join(f"; p{i}=x" for i in range(17)) + "; boundary=x", "over 16 parameters"),
        (";" * 100 + " boundary=x", "over 16 parameters"),
        ("; boundary=b" + "(" * 1000, "without a usable boundary"),
        ("; boundary=x; p=" + "x" * 5000, "5035 bytes; 4096 is the limit"),
        ('; boundary=x; p="' + "\\" * 3000 + '"', "not understood"),
    ],
)
def test_an_unusable_content_type_is_refused_with_what_is_wrong(parameters: str, why: str) -> None:
    """Nothing else is raised, whatever a client sends."""
    with pytest.raises(InvalidRequest, match=re.escape(why)) as raised:
        boundary("multipart/form-data" + parameters)
    assert len(str(raised.value)) <= 300


# ---- what clients send


def test_the_model_of_an_audio_transcription() -> None:
    """A file and fields in any order; bytes that look like a boundary within the file."""
    audio = (FILE, b'\r\n--xy name="model"\r\n\r\nno' + bytes(range(256)))
    for parts in ([audio, (MODEL, b"demo/sql"), (b'Content-Disposition: form-data; name="language"', b"en")], [(MODEL, b"demo/sql"), audio]):
        body = form(*parts)
        reading = agrees("multipart/form-data; boundary=xyz", body)
        assert reading is not None
        assert reading.model == "demo/sql"
        assert body[reading.begin : reading.end] == b"demo/sql"
    assert read(form(audio), b"xyz") == Reading(None)
    assert read(form((MODEL, "ü/x".encode())), b"xyz").model == "ü/x"


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\"), max_size=8)  # readers differ on backslashes before quotes


@given(
    st.dictionaries(names, st.text(max_size=20), max_size=4),
    names.filter(lambda name: name != ""),
    st.binary(max_size=200),
    st.text(min_size=1, max_size=30),
)
@settings(deadline=None)
def test_forms_as_the_openai_client_writes_them(fields: Mapping[str, str], filename: str, data: bytes, model: str) -> None:
    """By httpx, with names of fields and files in any script."""
    try:
        request = httpx.Request("POST", "http://x", data={**fields, "model": model}, files={"file": (filename, data)})
        body = request.read()
    except UnicodeEncodeError:
        return
    content_type = request.headers["content-type"]
    engine = engine_forms.models(content_type, body)
    assert engine == [model]
    reading = agrees(content_type, body)
    assert reading is not None
    assert reading.model == model


@pytest.mark.parametrize(
    "head",
    [
        b"form-data; name=model",
        b'FORM-DATA;NAME="model"',
        b'form-data ;\tname = "model" ; ',
        b'form-data;; x="\\"; name=\\"y"; name="model";',
        b'form-data; x="a\\\\b"; name="model"',
        b'form-data; name="model"\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 1\r\nContent-Transfer-Encoding: binary',
        b'form-data; name="model"\r\ncontent-type:text/plain',
    ],
)
def test_one_field_in_many_spellings(head: bytes) -> None:
    """As .NET, Java, Go, curl and browsers write it."""
    reading = agrees("multipart/form-data; boundary=xyz", one(head))
    assert reading is not None
    assert reading.model == "a"


@pytest.mark.parametrize(
    "head",
    [
        b'form-data; name="file"; filename="a; name=model; name=x"',
        b'form-data; name="file"; filename="a\\"; name=\\"model"',
        b"form-data; name=\"file\"; filename*=utf-8''model",
        b'form-data; name="Model"',
        b"form-data; name=timestamp_granularities[]",
        b'form-data; name=" model"',
        b'form-data; name="mod%65l"',
        b"form-data; name='model'",
        b'form-data; name="model\\\\x"',
        b'form-data; name=""',
        b'form-data; name="a\\"b"',
    ],
)
def test_what_only_looks_like_the_model_is_none(head: bytes) -> None:
    """In quotes, in another case, percent-encoded."""
    assert agrees("multipart/form-data; boundary=xyz", one(head)) == Reading(None)


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the form is empty"),
        (b"\r\n\r\n", "the form is empty"),
        (b"hello", "does not begin with its boundary"),
        (b"preamble\r\n" + form((MODEL, b"a")), "does not begin with its boundary"),
        (b"\r\nx\r\n" + form((MODEL, b"a")), "does not begin with its boundary"),
        (form((MODEL, b"a"), bound=b"xy"), "does not begin with its boundary"),
        (form((MODEL, b"a"))[:-6], "its last boundary is missing"),
        (form((MODEL, b"a"), end=b"-"), "cut short in a boundary"),
        (form((MODEL, b"a"), end=b""), "cut short in a boundary"),
        (form((MODEL, b"a"), end=b"--\r\n" + form((MODEL, b"b"))), "goes on after its last boundary"),
        (form((MODEL, b"a"), end=b"--x"), "goes on after its last boundary"),
        (form((MODEL, b"a\r\n--xyzzy")), "begins with its boundary and goes on"),
        (form((MODEL, b"a\r\n--xyz \t\r\nb")), "begins with its boundary and goes on"),
        (form((MODEL, b"a\r\n--xyz\nb")), "begins with its boundary and goes on"),
        (form((MODEL, b"--xyz--")), "has no value: its boundary"),
        (b"--xyz\r\n\r\n--xyz--", "has no value: its boundary"),
        (b"--xyz\r\nbroken\r\n--xyz--", "headers without an end"),
        (b"--xyz\n" + MODEL + b"\n\na\n--xyz--\n", "begins with its boundary and goes on"),
        (form((MODEL, b"a"), (MODEL, b"a")), "`model` more than once"),
        (form((MODEL, b"a"), (b"content-disposition:form-data;name=model", b"b")), "`model` more than once"),
        (form((MODEL, b"\xff")), "is not UTF-8"),
        (form((MODEL, b"a" * 2049)), "has over 2048 bytes"),
        (form((b"", b"a")), "no `content-disposition: form-data`"),
        (form((b"Content-Type: text/plain", b"a")), "no `content-disposition: form-data`"),
        (one(b'attachment; name="model"'), "no `content-disposition: form-data`"),
        (one(b"form-data"), "has no name"),
        (one(b'form-data; filename="x"'), "has no name"),
        (one(b'form-data; name="model"; filename="x"'), "`model` is a file"),
        (one(b"form-data; name=\"model\"; filename*=utf-8''x"), "`model` is a file"),
        (one(b'form-data; name="x"; name="model"'), "the parameter 'name' twice"),
        (one(b'form-data; NAME="x"; name="model"'), "the parameter 'name' twice"),
        (one(b"form-data; name=\"x\"; name*=utf-8''model"), "in another character set what it is called"),
        (one(b"form-data; name*0=mod; name*1=el"), "in another character set what it is called"),
        (one(b"form-data; name*"), "not understood: 'name*'"),
        (one(b'form-data; name="mode\\l"'), "a name with a backslash"),
        (one(b'form-data; name="model\\\\"'), "not understood"),
        (one(b'form-data; name="model'), "not understood"),
        (one(b'form-data; name="model"x'), "not understood"),
        (one(b"form-data; name=model (x)"), "a name that must be quoted"),
        (one(b"form-data; name=mod=el"), "a name that must be quoted"),
        (one(b'form-data; name="x"\nContent-Disposition: form-data; name="model"'), "a header line that is none"),
        (one(b'form-data; name="x"\r\nContent-Disposition: form-data; name="model"'), "'content-disposition' twice"),
        (one(b'form-data; name="x"\r\n ; filename="y"'), "a header line that is none"),
        (one(b'form-data; name="model"\r\nX y: z'), "a header line that is none"),
        (one(b'form-data; name="model"\r\nContent-Transfer-Encoding: base64'), "content-transfer-encoding"),
        (one(b'form-data; name="model"\r\nContent-Type: text/plain; charset=utf-16'), "charset 'utf-16'; it must be UTF-8"),
        (form((MODEL + b"\r\nX: " + b"x" * 8192, b"a")), "headers of over 8192 bytes"),
        (form((MODEL + b"".join(b"\r\nX%d: y" % i for i in range(16)), b"a")), "over 16 header lines"),
        (one(b'form-data; name="model"' + b"".join(b"; p%d=x" % i for i in range(16))), "over 16 parameters"),
        (one(b'form-data; name="model"' + b"(" * 1000), "not understood"),
        (form(*[(b"Content-Disposition: form-data; name=x", b"")] * 1001), "over 1000 parts"),
        (form(*[(b"Content-Disposition: form-data; name=x", b"")] * 100_000), "over 1000 parts"),
    ],
)
def test_what_readers_differ_on_is_refused_by_name(body: bytes, why: str) -> None:
    """An engine could read another model than was routed for."""
    for buffer in (body, memoryview(body)):
        with pytest.raises(InvalidRequest, match=re.escape(why)) as raised:
            read(buffer, b"xyz")
        assert len(str(raised.value)) <= 300


def test_limits_are_not_met_by_what_is_below_them() -> None:
    """To the last."""
    assert read(form(*[(b"Content-Disposition: form-data; name=x", b"")] * 999, (MODEL, b"a")), b"xyz").model == "a"
    assert read(form((MODEL + b"".join(b"\r\nX%d: y" % i for i in range(15)), b"a")), b"xyz").model == "a"
    assert read(one(b'form-data; name="model"' + b"".join(b"; p%d=x" % i for i in range(15))), b"xyz").model == "a"
    assert read(form((MODEL, b"a" * 2048)), b"xyz").model == "a" * 2048
    assert read(form((MODEL + b"\r\nX: " + b"x" * (8192 - len(MODEL) - 5), b"a")), b"xyz").model == "a"
    assert read(b"--xyz--", b"xyz") == Reading(None)


@pytest.mark.parametrize("offset", range(-12, 3))
def test_a_boundary_may_lie_across_two_windows(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no `bytes` is searched through a window."""
    monkeypatch.setattr(forms, "_FIRST_WINDOW_BYTES", 64)
    monkeypatch.setattr(forms, "_WINDOW_BYTES", 64)
    body = form((FILE, b"\r" * (64 * 3 + offset)), (MODEL, b"a"))
    assert read(memoryview(body), b"xyz") == read(body, b"xyz")
    with pytest.raises(InvalidRequest, match="its last boundary is missing"):
        read(memoryview(body[:-6]), b"xyz")


# ---- any bytes

PIECES = [
    b"--xyz", b"\r\n--xyz", b"--", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"Content-Disposition:", b"Content-Type:", b" form-data", b";", b'name="model"', b"name=model", b"name=", b"name*=utf-8''model",
    b'filename="', b'"', b"\\", b'\\"', b"\\\\", b" ", b"\t", b"=", b"model", b"x", b"\x00", b"\xff", b": ", b"-", b"multipart/form-data", b"boundary=xyz", b"charset=latin-1",
]  # fmt: skip


def damaged(rng: Random, body: bytes) -> bytes:
    """A few random edits."""
    edited = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(edited))
        edited[at : at + rng.choice((0, 0, 1, 2, 8))] = rng.choice((*PIECES, bytes(edited[at : at + rng.randint(0, 30)])))
    return bytes(edited)


@given(st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None)
def test_no_engine_reads_another_model(rng: Random) -> None:
    """Whatever is accepted, damaged or not."""
    agrees("multipart/form-data; boundary=xyz", damaged(rng, form((FILE, b"\x00\r\n"), (MODEL, b"a"), (b'Content-Disposition: form-data; name="x"', b"y"))))


@given(st.lists(st.sampled_from(PIECES), max_size=12))
@settings(max_examples=500, deadline=None)
@example([b"name=", b"model", b";", b" ", b'name="model"'])
def test_no_engine_reads_another_field_name(pieces: list[bytes]) -> None:
    """However the header that names the field is written."""
    agrees("multipart/form-data; boundary=xyz", one(b"form-data" + b"".join(pieces)))
    with contextlib.suppress(UnicodeDecodeError):
        agrees("multipart/form-data" + b"".join(pieces).decode("ascii"), form((MODEL, b"a")))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: b"--xyz\r\n" + MODEL + b"\r\n\r\n" + b"\r\n--xy" * n,
        lambda n: b"--xyz\r\n" + MODEL + b"\r\n\r\n" + b"\r\n--xyz\r" * n,
        lambda n: b"\r\n" * n,
        lambda n: b"--xyz\r\n" + MODEL + b"\r\n\r\na\r\n--xyz--" + b"\r\n" * n + b"x",
        lambda n: one(b'form-data; name="' + b"\\" * n + b'"'),
        lambda n: one(b'form-data; name="' + b'\\"' * n),
        lambda n: form(*[(b"Content-Disposition: form-data" + b";" * 8000, b"")] * (n // 2000)),
    ],
)
def test_hostile_repetitions_are_refused(make: Callable[[int], bytes]) -> None:
    """Megabytes of what makes a careless search quadratic: done by the time the test runner would notice."""
    with pytest.raises(InvalidRequest):
        read(make(1_000_000), b"xyz")
