"""JSON bodies in all spellings, whole and damaged, and a strict reader of them made of the standard library."""

import json
from random import Random
from typing import Any

from hypothesis import strategies as st

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
    """The one top-level `model` by the standard library's reader made strict, which skips a byte order mark; None where the body must be refused."""
    try:
        value = json.loads(
            body.decode("utf-8-sig"),
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
