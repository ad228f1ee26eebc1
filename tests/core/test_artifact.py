"""Adapter names through their gate, and manifests."""

import json
import os.path
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.core.artifact import MAX_NAME_BYTES, File, Manifest, adapter_name, content_digest
from extproc.errors import InvalidRequest

# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "org/name",
        "a/b/c",
        "org/name@v2",
        "org/name@0123abcd",
        "org/name with space",
        "org/名前",
        "ünï/ços",
        "a" * 235,
        "a" * 127 + "/" + "b" * 128,
        "org/a..name",
        "org/v1.2.3",
        "a..b",
        "a.",
        "-rf",
        "~",
        "a:b",
        "%2e%2e/a",
        "$HOME",
        "*",
    ],
)
def test_usable_names_pass_unchanged(name: str) -> None:
    """What hubs allow, and what is merely odd: it is a name, never a command."""
    assert adapter_name(name) == name


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is absolute"),
        ("//a", "is absolute"),
        ("/", "is absolute"),
        ("..", "starts with a dot"),
        (".", "starts with a dot"),
        ("../a", "starts with a dot"),
        ("a/../b", "starts with a dot"),
        ("a/..", "starts with a dot"),
        ("a/./b", "starts with a dot"),
        (".store", "starts with a dot"),
        ("org/.hidden", "starts with a dot"),
        ("...", "starts with a dot"),
        ("a//b", "empty part"),
        ("a/", "empty part"),
        ("a\\b", "backslash"),
        ("..\\a", "backslash"),
        ("a\x00b", "non-printable"),
        ("a\nb", "non-printable"),
        ("a\tb", "non-printable"),
        ("a\x7fb", "non-printable"),
        ("a\x85b", "non-printable"),
        ("a\u00a0b", "non-printable"),
        ("a\u200bb", "non-printable"),
        ("a\u202eb", "non-printable"),
        ("a\u2028b", "non-printable"),
        ("\ufeffa", "non-printable"),
        ("a\ue000", "non-printable"),
        ("a\ud800", "surrogate"),
        ("\udcff", "surrogate"),
        ("a/ b", "space"),
        ("a /b", "space"),
        (" a", "space"),
        ("a ", "space"),
        (" ", "space"),
        ("a" * 257, "257 bytes"),
        ("é" * 129, "258 bytes"),
        ("a" * 236, "over 235 bytes"),
        ("é" * 118, "over 235 bytes"),
        ("acme/sql@sha256:0123456789ab", "names one version"),
    ],
)
def test_unusable_names_are_refused_and_told_why(name: str, complaint: str) -> None:
    """Each becomes a 400 whose message can be logged: it is printable itself."""
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        adapter_name(name)
    assert str(caught.value).startswith("model: ")
    assert str(caught.value).isprintable()


pieces = st.sampled_from(["a", "b.c", "..", ".", "", " ", "é", "名", "\\", "\x00", "\n", "~", "@v1", "%2e", "\ud800", "\u202e", "x" * 100, "…"])
names = st.text(max_size=300) | st.lists(st.lists(pieces, max_size=4).map("".join), max_size=6).map("/".join)


@given(names)
@example("a/../../b")
def test_an_accepted_name_never_leaves_its_directory(raw: str) -> None:
    """Joined to a directory it stays below it, names one entry per part, and fits a log line."""
    try:
        name = adapter_name(raw)
    except InvalidRequest:
        return
    assert name == raw
    joined = f"/srv/adapters/{name}"
    assert os.path.normpath(joined) == joined
    assert joined.startswith("/srv/adapters/")
    parts = name.split("/")
    assert all(parts)
    assert not any(part.startswith(".") for part in parts)
    assert all(len(part.encode()) <= 235 for part in parts)
    assert len(name.encode()) <= MAX_NAME_BYTES
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in name)


# ---- manifests

FILES = (File("adapter_config.json", 120, "a" * 64), File("adapter_model.safetensors", 4096, "b" * 64), File("sub/tokenizer.json", 7, "c" * 64))
MANIFEST = Manifest(FILES, "org/name", "s3", "v1")

files = st.builds(
    File, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(0, 2**50), st.text("0123456789abcdef", min_size=64, max_size=64)
)
manifests = st.builds(
    Manifest,
    st.lists(files, max_size=5).map(tuple),
    st.text(max_size=20),
    st.text(max_size=10),
    st.text(max_size=10),
    options=st.dictionaries(st.text(max_size=10), st.booleans(), max_size=2),
    stamps=st.dictionaries(st.text(max_size=10), st.tuples(st.integers(0, 2**63), st.integers(0, 2**64 - 1)), max_size=2),
)


@given(manifests)
def test_a_manifest_survives_being_written_and_read(manifest: Manifest) -> None:
    """As text and as bytes."""
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text.encode()) == manifest


@pytest.mark.parametrize("field", ["options", "stamps"])
def test_a_manifest_of_an_earlier_version_lacks_fields(field: str) -> None:
    """It is read all the same, as one of an adapter that needs no options, and of whose files nothing but the length is known."""
    raw = json.loads(MANIFEST.to_json())
    del raw[field]
    assert Manifest.from_json(json.dumps(raw)) == MANIFEST


def test_the_size_is_the_sum_of_the_files() -> None:
    """In bytes, as the files have them."""
    assert MANIFEST.size == 4223
    assert Manifest((), "a", "b", "c").size == 0


def test_the_digest_is_what_it_was() -> None:
    """It names directories on disks that outlive an upgrade."""
    assert MANIFEST.digest == "d79fd9bda499186b515ddd91739d72491359459848b0951440cfa3641ae6a116"


def test_equal_content_has_one_digest() -> None:
    """Whatever it is called, wherever it came from, in whatever order it was listed."""
    other = Manifest((FILES[2], FILES[0], FILES[1]), "other/name", "huggingface", "main")
    assert other.digest == MANIFEST.digest == content_digest(iter(FILES))


@pytest.mark.parametrize("changed", [File("sub/other.json", 7, "c" * 64), File("sub/tokenizer.json", 8, "c" * 64), File("sub/tokenizer.json", 7, "d" * 64)])
def test_every_field_of_every_file_counts_for_the_digest(changed: File) -> None:
    """Path, size and hash."""
    assert content_digest([*FILES[:2], changed]) != MANIFEST.digest
    assert content_digest(FILES[:2]) != MANIFEST.digest
    assert content_digest([*FILES, changed]) != MANIFEST.digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "7",
        '"files"',
        "{}",
        "{",
        b"\xff",
        '{"files": 7, "name": "a", "origin": "b", "revision": "c"}',
        '{"files": "abc", "name": "a", "origin": "b", "revision": "c"}',
        '{"files": [{"path": "p", "size": 1}], "name": "a", "origin": "b", "revision": "c"}',
        '{"files": [{"path": "p", "size": "x", "sha256": ""}], "name": "a", "origin": "b", "revision": "c"}',
        '{"files": [{"path": "p", "size": null, "sha256": ""}], "name": "a", "origin": "b", "revision": "c"}',
        '{"files": [], "name": "a", "origin": "b"}',
    ],
)
def test_what_is_not_a_manifest_is_a_value_error(text: str | bytes) -> None:
    """The store removes a directory whose manifest cannot be read; nothing else may come out of reading it."""
    with pytest.raises(ValueError):
        Manifest.from_json(text)


def test_a_manifest_with_an_endless_size_is_a_value_error() -> None:
    """Python's reader takes `Infinity` for a number."""
    text = json.dumps({"files": [{"path": "p", "size": float("inf"), "sha256": ""}], "name": "a", "origin": "b", "revision": "c"})
    with pytest.raises(ValueError):
        Manifest.from_json(text)
