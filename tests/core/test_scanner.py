"""Finding `model` in a body that still arrives, and the verdict on the whole, against a strict reading by the standard library."""

import json
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.core.scanner import Scanner, judge, rename
from extproc.errors import InvalidRequest

# ---- a strict reader of the same text, and writers of many spellings


class _Object(list[tuple[str, Any]]):
    """A JSON object with its repeated keys."""


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, _Object):
        return [text for key, inner in value for text in (key, *_strings(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return []


def strict(body: bytes) -> str | None:
    """The one top-level `model` by the standard library's reader made strict; None where the body must be refused."""
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_Object,
            parse_constant=_refuse,
            parse_int=lambda _: 0,  # any number of digits is JSON
            parse_float=lambda _: 0.0,
        )
        for text in _strings(value):
            text.encode()  # refuses unpaired surrogates
    except ValueError:
        return None
    models = [inner for key, inner in value if key == "model"] if isinstance(value, _Object) else []
    return models[0] if len(models) == 1 and isinstance(models[0], str) else None


def verdict(body: bytes) -> str | None:
    try:
        return judge(body)
    except InvalidRequest:
        return None


def spell_string(text: str, random: Random) -> str:
    out = []
    for char in text:
        choice = random.random()
        if char in '"\\' or ord(char) < 0x20:
            short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}.get(char)
            out.append(short if short and choice < 0.5 else f"\\u{ord(char):04x}")
        elif char == "/" and choice < 0.3:
            out.append("\\/")
        elif choice < 0.2:
            units = char.encode("utf-16-be")
            out.append("".join(f"\\u{units[i]:02{'x' if choice < 0.1 else 'X'}}{units[i + 1]:02x}" for i in range(0, len(units), 2)))
        else:
            out.append(char)
    return '"' + "".join(out) + '"'


def spell(value: Any, random: Random) -> str:
    """`value` as JSON in one of its many spellings: any white space, any escapes."""
    space = "".join(random.choice(" \n\r\t") for _ in range(random.choice((0, 0, 0, 1, 3))))
    if isinstance(value, dict):
        inner = ",".join(f"{space}{spell_string(key, random)}{space}:{spell(item, random)}" for key, item in value.items())
        return f"{space}{{{inner}{space}}}{space}"
    if isinstance(value, list):
        return f"{space}[{','.join(spell(item, random) for item in value)}{space}]{space}"
    return f"{space}{spell_string(value, random) if isinstance(value, str) else json.dumps(value)}{space}"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["model", 'a"model":"b', "\\", '\\"', "}{", "[,]", "a/b", "\x00", "😀"]
)
scalars = texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12)
objects = st.dictionaries(texts, values, max_size=5)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A JSON object, usually with a usable `model` at any place, in any spelling."""
    items = [(key, value) for key, value in draw(objects).items() if key != "model"]
    model = draw(st.one_of(texts, texts, texts, values, st.just(...)))
    if model is not ...:
        items.insert(draw(st.integers(0, len(items))), ("model", model))
    value = dict(items)
    random = draw(st.randoms(use_true_random=False))
    how = draw(st.integers(0, 4))
    if how == 0:
        return json.dumps(value).encode()
    if how == 1:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    if how == 2:
        return json.dumps(value, indent=2, ensure_ascii=False).encode()
    return spell(value, random).encode()


FRAGMENTS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\x00", b"\x0c", b"\x1f", b"\x7f", b"\xc2\xa0", b"0", b"-", b"+1", b"01", b"1.", b".5", b"1e", b"1e5", b"1E+",
    b"NaN", b"Infinity", b"-Infinity", b"nul", b"True", b"null", b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\\ud800", b"\\udc00", b"\\ud83d\\ude00",
    b"\\u12", b"\\u00G0", b"\\x41", b"\\'", b"\\u0000", b"'", b"/**/", b"//", b'"model":"x",', b',"model":"x"', b'"mod\\u0065l":"x",', b'"Model":"x",', b"{}", b"[]", b'""', b"9" * 400, b"1e999",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A JSON object with a few bytes taken, repeated, or replaced by what JSON readers differ on."""
    body = bytearray(draw(bodies()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        until = at + draw(st.sampled_from((0, 0, 0, 1, 1, 2, 5)))
        body[at:until] = draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=2) | st.just(bytes(body[at:until]) * 2))
    return bytes(body)


def fed(body: bytes, cuts: list[int]) -> str | None:
    """What the scanner knows at the end of `body`, cut at these places."""
    scanner = Scanner()
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in pairwise(places):
        scanner.feed(body[start:end])
    return scanner.model


def fed_bytewise(body: bytes) -> str | None:
    scanner = Scanner()
    for i in range(len(body)):
        scanner.feed(body[i : i + 1])
    return scanner.model


cuts = st.lists(st.integers(0, 10_000), max_size=8)

# ---- the verdict


@given(bodies())
@settings(max_examples=200, deadline=None)
def test_the_verdict_on_valid_json_is_that_of_a_strict_reader(body: bytes) -> None:
    """Any object, with and without `model`, in any spelling."""
    assert verdict(body) == strict(body)


@given(mutated())
@settings(max_examples=300, deadline=None)
@example(b'{"model":"a"}\x00')
@example(b'\xef\xbb\xbf{"model":"a"}')
@example(b'{"model":"a","x":"\xed\xa0\x80"}')
def test_the_verdict_on_damaged_json_is_that_of_a_strict_reader(body: bytes) -> None:
    """Whatever this project takes for JSON, the engine's parser takes for the same JSON."""
    assert verdict(body) == strict(body)


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_the_verdict_on_any_bytes_is_that_of_a_strict_reader(body: bytes) -> None:
    """And nothing but InvalidRequest comes out."""
    assert verdict(body) == strict(body)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"a"}', "a"),
        (b' \n\t\r{ "model" : "a" } \n', "a"),
        (b'{"mod\\u0065l":"a"}', "a"),
        (b'{"\\u006d\\u006f\\u0064\\u0065\\u006c":"a"}', "a"),
        (b'{"model":"org\\/a"}', "org/a"),
        ('{"model":"ünï/ços"}'.encode(), "ünï/ços"),
        (b'{"model":"\\ud83d\\ude00"}', "😀"),
        (b'{"model":""}', ""),
        (b'{"messages":[{"model":"no"}],"model":"a"}', "a"),
        (b'{"model":"a","tools":{"model":"no","x":[{"model":7}]}}', "a"),
        (b'{"x":"\\"model\\":\\"no\\"","model":"a"}', "a"),
        (b'{"Model":"no","models":"no","model ":"no","model":"a"}', "a"),
        (b'{"x":1e99999,"y":' + b"9" * 5000 + b',"model":"a"}', "a"),
        (b'{"model":"' + b"a" * 5000 + b'"}', "a" * 5000),
    ],
)
def test_the_one_top_level_model_is_found(body: bytes, model: str) -> None:
    """Nested look-alikes, quoted look-alikes and other spellings do not mislead."""
    assert judge(body) == model
    assert strict(body) == model


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not JSON"),
        (b"   ", "not JSON"),
        (b"model=a", "not JSON"),
        (b"[]", "not an object"),
        (b'"model"', "not an object"),
        (b"7", "not an object"),
        (b"null", "not an object"),
        (b'[{"model":"a"}]', "not an object"),
        (b"{}", "has no `model`"),
        (b'{"x":{"model":"a"}}', "has no `model`"),
        (b'{"Model":"a"}', "has no `model`"),
        (b'{"model":7}', "not a string"),
        (b'{"model":null}', "not a string"),
        (b'{"model":["a"]}', "not a string"),
        (b'{"model":{"model":"a"}}', "not a string"),
        (b'{"model":"a","model":"b"}', "`model` 2 times"),
        (b'{"model":"a","model":"a"}', "`model` 2 times"),
        (b'{"model":"a","mod\\u0065l":"b"}', "`model` 2 times"),
        (b'{"model":"a","x":[{}],"model":7,"model":null}', "`model` 3 times"),
        (b'{"model":"a"', "not JSON"),
        (b'{"model":"a",}', "not JSON"),
        (b'{"model":"a"}}', "not JSON"),
        (b'{"model":"a"}\x00', "not JSON"),
        (b'{"model":"a"}{"model":"b"}', "not JSON"),
        (b"{'model':'a'}", "not JSON"),
        (b'{model:"a"}', "not JSON"),
        (b'{"model":"a","x":NaN}', "not JSON"),
        (b'{"model":"a","x":-Infinity}', "not JSON"),
        (b'{"model":"a","x":01}', "not JSON"),
        (b'{"model":"a","x":"\n"}', "not JSON"),
        (b'{"model":"a","x":"\\ud800"}', "not JSON"),
        (b'{"model":"a","\\udc00":1}', "not JSON"),
        (b'{"model":"\\ud800"}', "not JSON"),
        (b'{"model":"a"/*b*/}', "not JSON"),
        (b'\xef\xbb\xbf{"model":"a"}', "not JSON"),
        ('{"model":"a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"model":"a","x":"\xff"}', "not UTF-8"),
        (b'{"model":"a","x":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"model":"\xc0\x80"}', "not UTF-8"),
    ],
)
def test_what_is_refused_is_told_why(body: bytes, complaint: str) -> None:
    """One sentence for the client, without the body in it."""
    with pytest.raises(InvalidRequest, match=complaint):
        judge(body)
    assert strict(body) is None


@pytest.mark.parametrize("nested", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000])
def test_nesting_without_end_is_refused(nested: bytes) -> None:
    """No body brings the process down."""
    with pytest.raises(InvalidRequest):
        judge(b'{"model":"a","x":' + nested + b"}")


def test_a_verdict_does_not_depend_on_the_one_before() -> None:
    """A refused body leaves no keys behind."""
    for body in (b'{"model":"a","model":"b"}', b'{"model":"a","x":', b"\xff"):
        assert verdict(body) is None
        assert judge(b'{"model":"c"}') == "c"


# ---- while it arrives


@given(bodies(), cuts)
@settings(max_examples=200, deadline=None)
def test_the_scanner_finds_what_the_verdict_says_in_any_chunking(body: bytes, cuts: list[int]) -> None:
    """Whole, cut anywhere, and byte by byte."""
    model = strict(body)
    assert fed(body, []) == model
    assert fed(body, cuts) == model
    assert fed_bytewise(body) == model


@given(mutated(), cuts)
@settings(max_examples=200, deadline=None)
def test_the_scanner_never_contradicts_the_verdict(body: bytes, cuts: list[int]) -> None:
    """Damaged or not: it raises nothing, chunking changes nothing, and where the body is accepted it found the same model."""
    found = fed(body, [])
    assert fed(body, cuts) == found
    assert fed_bytewise(body) == found
    model = verdict(body)
    if model is not None:
        assert found == model


@given(st.lists(st.binary(max_size=20) | st.sampled_from(FRAGMENTS), max_size=10))
@settings(max_examples=200, deadline=None)
def test_the_scanner_raises_nothing_on_any_bytes(chunks: list[bytes]) -> None:
    """It reads what clients send before anything was checked."""
    scanner = Scanner()
    for chunk in chunks:
        known = scanner.model
        found = scanner.feed(chunk)
        assert found == scanner.model
        assert known is None or found == known


def test_the_model_is_known_with_its_last_byte() -> None:
    """Not a byte later: staging starts there."""
    scanner = Scanner()
    assert scanner.feed(b'{"stream":true,"model":"demo/sql') is None
    assert scanner.feed(b'"') == "demo/sql"
    assert scanner.done
    assert scanner.feed(b',"model":"other"}') == "demo/sql"


def test_the_model_is_found_behind_megabytes() -> None:
    """With quotes, brackets and backslashes in them."""
    scanner = Scanner()
    assert scanner.feed(b'{"messages":[{"content":"') is None
    for _ in range(64):
        assert scanner.feed(b'\\"model\\":\\\\ {[,:]} ' * 2000) is None
    assert scanner.feed(b'"}],"model":"a"}') == "a"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":7,"x":"y"}',
        b'{"model":{"a":1}}',
        b'{"model":["a"]}',
        b'["model","a"]',
        b"{}",
        b'{"a":1}',
        b'{"model":null}',
        b'{"model":"\\ud800"}',
        b'{"model":"' + b"a" * 3000 + b'"}',
    ],
)
def test_the_scanner_stops_where_there_is_no_model_to_be_had(body: bytes) -> None:
    """The rest of the body costs nothing."""
    scanner = Scanner()
    assert scanner.feed(body) is None
    assert scanner.done


def test_a_name_spelled_with_escapes_throughout_is_found() -> None:
    """The longest name that can be used, six bytes per character, still fits."""
    name = "a/" * 127 + "aa"
    body = '{"' + "".join(f"\\u{ord(c):04x}" for c in "model") + '":"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"}'
    assert fed_bytewise(body.encode()) == fed(body.encode(), [7]) == judge(body.encode()) == name


def test_a_key_longer_than_any_spelling_of_model_is_passed_over() -> None:
    """It is not kept, and what follows is read as ever."""
    body = b'{"' + b"model" * 1000 + b'":"no","model":"a"}'
    assert fed(body, [50, 3000]) == fed_bytewise(body) == "a"


# -- another model in the same body


@pytest.mark.parametrize(
    ("body", "renamed"),
    [
        (b'{"model":"a"}', b'{"model":"b@sha256:00"}'),
        (b' {\n"x": {"model": "a"}, "model" : "a" , "model2":"a"} ', b' {\n"x": {"model": "a"}, "model" : "b@sha256:00" , "model2":"a"} '),
        (b'{"mod\\u0065l":"\\u0061\\"","y":1}', b'{"mod\\u0065l":"b@sha256:00","y":1}'),
        (b'{"x":"1","model":",","y":"2","z":"3"}', b'{"x":"1","model":"b@sha256:00","y":"2","z":"3"}'),
        (b'{"model":"a","a":1}', b'{"model":"b@sha256:00","a":1}'),
        (b'{"a":"a","model":"a","b":"a"}', b'{"a":"a","model":"b@sha256:00","b":"a"}'),
        ('{"messages":["é\\"model\\":"],"model":"a"}'.encode(), '{"messages":["é\\"model\\":"],"model":"b@sha256:00"}'.encode()),
    ],
)
def test_another_model_changes_its_value_alone(body: bytes, renamed: bytes) -> None:
    """Whitespace, order, escapes and look-alikes stay byte for byte."""
    assert rename(body, judge(body), "b@sha256:00") == renamed


@given(
    st.dictionaries(
        st.text(max_size=8), st.recursive(st.text(max_size=8) | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    ),
    st.text(min_size=1),
    st.text(min_size=1),
    st.integers(0, 5),
    st.booleans(),
)
def test_any_body_reads_as_before_but_for_the_model(others: dict[str, Any], old: str, new: str, place: int, ascii_only: bool) -> None:
    """Wherever it stands, whatever stands around it."""
    others.pop("model", None)
    pairs = list(others.items())
    pairs.insert(min(place, len(pairs)), ("model", old))
    body = json.dumps(dict(pairs), ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        judge(body)
    except InvalidRequest:
        return
    try:
        new.encode()
    except UnicodeEncodeError:
        return
    assert json.loads(rename(body, old, new)) == {**dict(pairs), "model": new}


@given(st.binary(max_size=40), st.lists(st.integers(1, 7), min_size=1))
def test_the_span_does_not_depend_on_the_chunks(filler: bytes, sizes: list[int]) -> None:
    """It is where the value stands in all that was fed."""
    body = json.dumps({"x": filler.hex(), "model": 'a\\"b', "z": 1}).encode()
    whole, piecewise = Scanner(), Scanner()
    whole.feed(body)
    position = 0
    while position < len(body):
        size = sizes[position % len(sizes)]
        piecewise.feed(body[position : position + size])
        position += size
    assert piecewise.span == whole.span
    assert json.loads(body[slice(*whole.span)]) == 'a\\"b'
