"""The last good sets on disk: whole or not at all, and never a reason not to start."""

import json
import os
import time
from pathlib import Path

import pytest

from extproc.discovery.entries import row
from extproc.discovery.kept import FILE, Damaged, Kept, load, save

from .scripted import found

SETS = [
    Kept("a", "file x", 1000.5, (found("10.0.0.1:8000", "one", "10.0.0.1:9102", "uid", "zone-a", leaving=True), found("[2001:db8::1]:8000"))),
    Kept("b", "dns y", 2000.0, ()),
]


def test_sets_are_read_as_they_were_written(tmp_path: Path) -> None:
    """All that sources say of an endpoint, and when it was good."""
    save(tmp_path / "made", SETS)
    read = load(tmp_path / "made")
    assert [(s.pool, s.source, s.at) for s in read] == [("a", "file x", 1000.5), ("b", "dns y", 2000.0)]
    assert [[row(f) for f in s.endpoints] for s in read] == [[row(f) for f in s.endpoints] for s in SETS]


def test_nothing_is_kept_where_nothing_was_written(tmp_path: Path) -> None:
    """A first start."""
    assert load(tmp_path) == ()
    assert load(tmp_path / "not there") == ()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "truncated"),
        (b'{"version": 1, "sets": [{"pool"', "truncated"),
        (b"\0" * 100, "malformed"),
        (b"[]", "Expected `object`"),
        (b"{}", "not of version 2"),
        (b'{"version": 1, "sets": []}', "not of version 2"),
        (b'{"version": 2, "sets": [{"pool": "a", "source": "b", "at": 1, "endpoints": [["10.0.0.1:8000"]]}]}', "Expected `array` of length 6"),
    ],
)
def test_a_damaged_file_is_told_of(tmp_path: Path, content: bytes, complaint: str) -> None:
    """So is one of another version, which a router that was set back finds."""
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(Damaged, match=complaint):
        load(tmp_path)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """And nothing beside it."""
    save(tmp_path, SETS)
    before = (tmp_path / FILE).read_bytes()
    (tmp_path / f".{FILE}.{os.getpid()}").mkdir()  # where it would write
    with pytest.raises(OSError, match="Is a directory"):
        save(tmp_path, [])
    assert (tmp_path / FILE).read_bytes() == before


def test_a_time_to_come_is_now(tmp_path: Path) -> None:
    """A clock that was set back would keep a set for as long as it was ahead."""
    save(tmp_path, [Kept("a", "b", time.time() + 1e6, ())])
    [kept] = load(tmp_path)
    assert kept.at <= time.time()


def test_the_file_says_its_version(tmp_path: Path) -> None:
    """So that the next form can be told apart."""
    save(tmp_path, SETS)
    assert json.loads((tmp_path / FILE).read_text())["version"] == 2
