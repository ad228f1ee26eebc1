"""Finding `model` in a body that still arrives, in any chunking."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.scanner import MAX_TOKENS, Scanner
from extproc.core.verdict import judge
from extproc.errors import InvalidRequest
from tests.core.bodies import FRAGMENTS, bodies, mutated, strict


def verdict(body: bytes) -> str | None:
    try:
        return judge(body).model
    except InvalidRequest:
        return None


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
    """With escaped quotes, brackets and backslashes in them."""
    scanner = Scanner()
    assert scanner.feed(b'{"messages":[{"content":"') is None
    for _ in range(64):
        assert scanner.feed(b'\\"model\\":\\\\ {[,:]} ' * 2000) is None
    assert scanner.feed(b'"}],"model":"a"}') == "a"


@pytest.mark.parametrize("token", [b"[],", b'"",', b'"a":0,', b"{},", b"[[[", b"]]]", b",", b":"])
@pytest.mark.parametrize("step", [1, 3, 16384])
def test_the_scanner_gives_up_after_its_budget(token: bytes, step: int) -> None:
    """A body of brackets would cost seconds: its model is left to the verdict."""
    scanner, fed = Scanner(), 0
    scanner.feed(b"{" if token in (b'"a":0,', b",", b":") else b'{"x":[')
    body = token * (MAX_TOKENS + 1)
    while fed < len(body) and not scanner.done:
        scanner.feed(body[fed : fed + step])
        fed += step
    assert scanner.done
    assert scanner.feed(b'}],"model":"a"}') is None


def test_an_ordinary_conversation_is_within_the_budget() -> None:
    """Two hundred messages before the model."""
    scanner = Scanner()
    message = b'{"role":"user","content":"say \\"no\\", {[,]} and \\\\"},'
    assert scanner.feed(b'{"messages":[' + message * 200 + message[:-1] + b'],"model":"a"}') == "a"


@given(st.text(alphabet='\\"a', max_size=12), cuts)
@settings(deadline=None)
def test_escapes_are_read_alike_in_any_chunking(text: str, cuts: list[int]) -> None:
    """Runs of backslashes, cut anywhere."""
    body = json.dumps({text: text, "x": [text], "model": "a" + text}).encode()
    assert fed(body, cuts) == fed_bytewise(body) == "a" + text


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
    assert fed_bytewise(body.encode()) == fed(body.encode(), [7]) == judge(body.encode()).model == name


def test_a_key_longer_than_any_spelling_of_model_is_passed_over() -> None:
    """It is not kept, and what follows is read as ever."""
    body = b'{"' + b"model" * 1000 + b'":"no","model":"a"}'
    assert fed(body, [50, 3000]) == fed_bytewise(body) == "a"
