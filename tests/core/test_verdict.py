"""The verdict on a whole JSON body, and where the model stands in it, against a strict reading by the standard library."""

import json
import pickle
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.core import verdict as module
from extproc.core.reading import Reading
from extproc.core.verdict import MAX_KEYS, judge
from extproc.errors import InvalidRequest
from tests.core.bodies import bodies, mutated, strict, values


def verdict(body: bytes) -> str | None:
    try:
        return judge(body).model
    except InvalidRequest:
        return None


@given(bodies())
@settings(max_examples=200, deadline=None)
def test_the_verdict_on_valid_json_is_that_of_a_strict_reader(body: bytes) -> None:
    """Any object, with and without `model`, in any spelling."""
    assert verdict(body) == strict(body)


@given(mutated())
@settings(max_examples=300, deadline=None)
@example(b'{"model":"a"}\x00')
@example(b'\xef\xbb\xbf{"model":"a"}')
@example(b'\xef\xbb\xbf\xef\xbb\xbf{"model":"a"}')
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
        (b'{"model":"' + b"\\u0061" * 256 + b'"}', "a" * 256),
        (b'\xef\xbb\xbf {"model":"a"}', "a"),
    ],
)
def test_the_one_top_level_model_is_found(body: bytes, model: str) -> None:
    """Nested look-alikes, quoted look-alikes and other spellings do not mislead."""
    assert judge(body).model == model
    assert strict(body) == model


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not JSON: it is empty"),
        (b"   ", "not JSON: it is empty"),
        (b"\xef\xbb\xbf", "not JSON: it is empty"),
        (b"model=a", "not JSON"),
        (b"[]", "not an object"),
        (b'"model"', "not an object"),
        (b"7", "not an object"),
        (b"null", "not an object"),
        (b'[{"model":"a"}]', "not an object"),
        (b'{"model":7}', "not a string"),
        (b'{"model":null}', "not a string"),
        (b'{"model":["a"]}', "not a string"),
        (b'{"model":{"model":"a"}}', "not a string"),
        (b'{"model":"a","model":"b"}', "`model` 2 times"),
        (b'{"model":"a","model":"a"}', "`model` 2 times"),
        (b'{"model":"a","mod\\u0065l":"b"}', "`model` 2 times"),
        (b'{"model":"a","x":[{}],"model":7,"model":null}', "`model` 3 times"),
        (b'{"model":"a"', "ends in the middle of a value"),
        (b'{"model":"a","x":tr', "ends in the middle of a value"),
        (b'{"model":"a","x":"cut \\ud83d', "ends in the middle of a value"),
        (b'{"model":"a","x":"no \\\\ud83d"', "ends in the middle of a value"),
        (b'{"model":"a",}', "not JSON"),
        (b'{"model":"a"}}', "not JSON"),
        (b'{"model":"a"}\x00', "not JSON"),
        (b'{"model":"a"}{"model":"b"}', "not JSON"),
        (b"{'model':'a'}", "not JSON"),
        (b'{model:"a"}', "not JSON"),
        (b'{"model":"a","x":NaN}', "not JSON: NaN at byte 17 is not JSON"),
        (b'{"model":"a","x":-Infinity}', "Infinity at byte 18 is not JSON"),
        (b'{"model":"a","x":01}', "not JSON"),
        (b'{"model":"a","x":"\n"}', "not JSON"),
        (b'{"model":"a","x":"\\ud800"}', r"a string holds \\ud800 without its other half"),
        (b'{"model":"a","x":"\\ud800"', r"a string holds \\ud800 without its other half"),
        (b'{"model":"a","x":"cut \\ud83d and more"}', r"a string holds \\ud83d without its other half"),
        (b'{"model":"a","x":"\\uD83D\\u0041"}', r"a string holds \\uD83D without its other half"),
        (b'{"model":"a","\\udc00":1}', r"a string holds \\udc00 without its other half"),
        (b'{"model":"\\ud800"}', r"a string holds \\ud800 without its other half"),
        (b'{"model":"a"/*b*/}', "not JSON"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"model":"a"}', "not JSON"),
        ('{"model":"a"}'.encode("utf-16"), "the body is UTF-16; JSON must be UTF-8"),
        ('{"model":"a"}'.encode("utf-16-be"), "the body is UTF-16; JSON must be UTF-8"),
        ('{"model":"a"}'.encode("utf-32"), "the body is UTF-32; JSON must be UTF-8"),
        (b'{"model":"a","x":"\xff"}', "not UTF-8"),
        (b'{"model":"a","x":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"model":"\xc0\x80"}', "not UTF-8"),
    ],
)
def test_what_is_refused_is_told_why(body: bytes, complaint: str) -> None:
    """One sentence for the client, without the body in it."""
    for buffer in (body, memoryview(body)):
        with pytest.raises(InvalidRequest, match=complaint):
            judge(buffer)
    assert strict(body) is None


@pytest.mark.parametrize("body", [b"{}", b'{"x":{"model":"a"}}', b'{"Model":"a"}', b'{"x":"model"}'])
def test_a_body_without_a_model_names_none(body: bytes) -> None:
    """Whether one is needed is the path's to say."""
    assert judge(body) == Reading(None)


@pytest.mark.parametrize("nested", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000])
def test_nesting_without_end_is_refused(nested: bytes) -> None:
    """No body brings the process down."""
    with pytest.raises(InvalidRequest):
        judge(b'{"model":"a","x":' + nested + b"}")


def test_a_verdict_does_not_depend_on_the_one_before() -> None:
    """A refused body leaves no keys behind."""
    for body in (b'{"model":"a","model":"b"}', b'{"model":"a","x":', b"\xff"):
        assert verdict(body) is None
        assert judge(b'{"model":"c"}').model == "c"


# ---- where the model stands


def pairs(body: bytes) -> list[tuple[str, Any]]:
    return list(json.loads(body, object_pairs_hook=lambda items: items))


@given(st.one_of(bodies(), mutated()), st.sampled_from(["b@sha256:00", "", 'é"\\', "a"]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_another_value_in_its_place_changes_the_model_alone(body: bytes, new: str, small: bool) -> None:
    """In any spelling, between any look-alikes, behind any white space, in a body of any size."""
    if not small:
        body += b" " * 2000  # beyond what is looked for by its text
    try:
        reading = judge(body)
    except InvalidRequest:
        return
    assert judge(memoryview(body)) == reading
    if reading.model is None:
        assert "model" not in dict(pairs(body))
        return
    assert json.loads(body[reading.begin : reading.end]) == reading.model
    renamed = body[: reading.begin] + json.dumps(new).encode() + body[reading.end :]
    assert strict(renamed) == new
    assert pairs(renamed) == [(key, new if key == "model" else value) for key, value in pairs(body)]


@pytest.mark.parametrize(
    "marked",
    [
        b'{"model":<"a">}',
        b' {\n"x": {"model": "a"}, "model" : <"a"> , "model2":"a"} ',
        b'{"x":"1","model":<",">,"y":"2","z":"3"}',
        b'{"model":<"a">,"a":1}',
        b'{"a":"a","model":<"a">,"b":"a"}',
        b'{"a\\"b":[",\\"model\\":"],"mod\\u0065l":<"\\u0061">}',
        b'\xef\xbb\xbf{"a":"a","model":<"a">,"b":"a"}',
        b'{"":{"":""},"model":\t<"">,"":""}',
    ],
)
def test_the_place_is_exact_between_look_alikes(marked: bytes) -> None:
    """Equal text elsewhere, as a value, a key, or the end of one string and the beginning of the next."""
    begin, end = marked.index(b"<"), marked.index(b">") - 1
    reading = judge(marked.replace(b"<", b"").replace(b">", b""))
    assert (reading.begin, reading.end) == (begin, end)


def test_a_reading_crosses_processes() -> None:
    """Large bodies are judged in another."""
    assert pickle.loads(pickle.dumps(judge(b'{"model":"a"}'))) == judge(b'{"model":"a"}')


# ---- limits


@pytest.mark.parametrize("keys", [MAX_KEYS, MAX_KEYS + 1, 100_000])
def test_the_number_of_keys_is_limited(keys: int) -> None:
    """To far more than any API has."""
    body = b'{"model":"a",' + b",".join(b'"":0' for _ in range(keys - 1)) + b"}"
    if keys <= MAX_KEYS:
        assert judge(body).model == "a"
    else:
        with pytest.raises(InvalidRequest, match="over 1024 keys"):
            judge(body)


def test_no_more_keys_are_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body with a million keys is refused at the first one too many."""
    made = 0

    class Counted(str):
        __slots__ = ()
        __hash__ = object.__hash__

        def __new__(cls, text: str) -> "Counted":
            nonlocal made
            made += 1
            return super().__new__(cls, text)

    monkeypatch.setattr(module, "_Object", dict[Counted, msgspec.Raw])
    with pytest.raises(InvalidRequest, match="over 1024 keys"):
        judge(b'{"model":"a",' + b'"":0,' * 10**6 + b'"":0}')
    assert made == MAX_KEYS


@pytest.mark.parametrize(("size", "fits"), [(1024, True), (1025, False), (10**6, False)])
def test_the_length_of_a_key_is_limited(size: int, fits: bool) -> None:
    """In characters, however they are written."""
    for letter in ("k", "\\u006b", "日"):
        body = ('{"' + letter * size + '":0,"model":"a"}').encode()
        if fits:
            assert judge(body).model == "a"
        else:
            with pytest.raises(InvalidRequest, match=f"has {size} characters; 1024 is the limit"):
                judge(body)


def test_the_length_of_the_model_is_limited() -> None:
    """What is longer is no name, and is not built."""
    assert judge(b'{"model":"' + b"a" * 2046 + b'"}').model == "a" * 2046
    with pytest.raises(InvalidRequest, match="2049 bytes; 2048 is the limit"):
        judge(b'{"model":"' + b"a" * 2047 + b'"}')


@pytest.mark.parametrize("offset", range(-4, 4))
@pytest.mark.parametrize("text", ["é", "日", "😀"])
def test_a_character_may_lie_across_two_windows(text: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that is not ASCII is checked a window at a time."""
    monkeypatch.setattr(module, "_WINDOW_BYTES", 64)
    body = b'{"x":"' + b"a" * (58 + offset) + text.encode() * 100 + b'","model":"a"}'
    assert judge(body).model == judge(memoryview(body)).model == "a"
    broken = body.replace(text.encode(), text.encode()[:-1], 2).replace(text.encode()[:-1], text.encode(), 1)
    at = broken.index(text.encode()[:-1] + text.encode())
    with pytest.raises(InvalidRequest, match=f"not UTF-8: .* at byte {at}$"):
        judge(broken)


@given(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), min_size=2, max_size=2))
@settings(max_examples=5, deadline=None)
def test_two_threads_judge_at_once(documents: list[dict[str, Any]]) -> None:
    """No verdict sees the keys of another."""
    texts = [json.dumps({**document, "model": f"m{i}", "pad": "x" * 2000 * i}).encode() for i, document in enumerate(documents)]
    wrong: list[Any] = []

    def run(i: int) -> None:
        wrong.extend(reading for _ in range(300) if (reading := judge(texts[i])).model != f"m{i}")

    threads = [threading.Thread(target=run, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the prompt

LONG = "lorem ipsum dolor sit amet " * 60  # 1,620 bytes: three blocks


def blocks(document: dict[str, Any] | bytes) -> tuple[int, ...]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return judge(body, with_blocks=True).blocks


def chat(*contents: str, **rest: Any) -> dict[str, Any]:
    return {"model": "demo/sql", "messages": [{"role": "user", "content": content} for content in contents], **rest}


def test_the_next_turn_of_a_chat_begins_with_the_blocks_of_the_one_before() -> None:
    """Whatever stands beside the messages in the body, and wherever the messages stand in it."""
    first, second = chat(LONG, temperature=0.1), {"stream": True, **chat(LONG, LONG), "temperature": 0.2}
    assert blocks(second)[:3] == blocks(first)
    assert len(blocks(second)) == 6


@pytest.mark.parametrize("key", ["messages", "prompt", "input", "text"])
def test_the_prompt_is_hashed_by_whatever_name_it_has(key: str) -> None:
    """Of chats, completions, responses, and SGLang's own."""
    assert len(blocks({"model": "demo/sql", key: LONG})) == 3
    assert len(blocks({key: LONG})) == 3


@pytest.mark.parametrize("key", ["tools", "documents", "system", "instructions"])
def test_what_templates_put_before_the_messages_comes_first(key: str) -> None:
    """A chat with the same tools and another question shares their blocks, wherever they stand in the body; one with other tools shares none."""
    this, that = {key: [LONG]}, {key: ["other" + LONG]}
    assert blocks({**this, **chat("a" + LONG)})[:4] == blocks({**chat("b" + LONG), **this})[:4]
    assert blocks({**this, **chat(LONG)})[4:] != blocks({**this, **chat("b" + LONG)})[4:]
    assert set(blocks({**this, **chat(LONG)})).isdisjoint(blocks({**that, **chat(LONG)}))


def test_models_and_tenants_share_no_blocks() -> None:
    """Nor does the engine let them."""
    seen = [blocks({**chat(LONG), **rest}) for rest in ({}, {"model": "demo/haiku"}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"model": 'demo/sql "a"'})]
    assert len(set().union(*seen)) == 3 * len(seen)


def test_a_prompt_is_hashed_only_where_that_is_asked_for_and_where_it_is_long_enough() -> None:
    """Two blocks are the least that anybody is preferred for."""
    assert judge(json.dumps(chat(LONG)).encode()).blocks == ()
    assert blocks(chat("short")) == ()
    assert blocks({"model": "demo/sql", "metadata": LONG}) == ()


def test_a_prompt_is_hashed_alike_from_any_buffer_and_behind_a_byte_order_mark() -> None:
    """As the model is found."""
    body = json.dumps(chat(LONG, "日本語")).encode()
    assert blocks(body) == judge(memoryview(body), with_blocks=True).blocks == blocks(b"\xef\xbb\xbf" + body)
    assert blocks(body)
