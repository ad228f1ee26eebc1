"""Adapters told from the paths of files."""

import pytest

from extproc.stager.supply.origins import names as names_module
from extproc.stager.supply.origins.names import Names
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS


def told(*paths: str, archives: bool = True, pickle: bool = False) -> list[str]:
    found = Names(archives=archives, pickle=pickle)
    for path in paths:
        found.add(path)
    assert not found.is_full()
    return list(found.sorted())


def folder(name: str, weights: str = WEIGHTS) -> tuple[str, str]:
    return f"{name}/{CONFIG}", f"{name}/{weights}"


def test_a_folder_with_a_configuration_and_weights_is_an_adapter() -> None:
    """At any depth, in any order, sorted by code points; a checkpoint below it is one of its own."""
    paths = [*folder("acme/sql/checkpoint-10"), *reversed(folder("acme/sql")), *folder("flat"), *folder("Z"), *folder("ä/b")]
    assert told(*paths) == ["Z", "acme/sql", "acme/sql/checkpoint-10", "flat", "ä/b"]


def test_what_would_be_refused_unseen_is_no_adapter() -> None:
    """Weights alone, a configuration alone, pickled weights unless they are permitted."""
    paths = [f"a/{CONFIG}", f"b/{WEIGHTS}", *folder("c", PICKLE), "d/README.md", CONFIG, WEIGHTS]
    assert told(*paths) == []
    assert told(*paths, pickle=True) == ["c"]


def test_an_archive_is_an_adapter_where_archives_are_looked_for() -> None:
    """By the name before its suffix; beside a folder with a configuration it is never read."""
    paths = ["acme/a.tar", "acme/b.tar.gz", "c.tgz", "d.v2.zip", "e.7z", ".zip", f"acme/f/{CONFIG}", "acme/f.zip"]
    assert told(*paths) == ["acme/a", "acme/b", "c", "d.v2"]
    assert told(*paths, archives=False) == []


@pytest.mark.parametrize("name", [".hidden", "a/.cache/b", "a//b", "a\nb", "a@sha256:0123456789ab", "x" * 257, " a", "a\\b", "\udce4"])
def test_what_no_request_can_name_is_left_out(name: str) -> None:
    """The one gate for names decides."""
    assert told(*folder(name), *folder("fine")) == ["fine"]


@pytest.mark.parametrize("count", [0, 1, 1001])
def test_any_number_of_names_is_told_once(count: int) -> None:
    """Each folder has two files that show it."""
    assert len(told(*(path for number in range(count) for path in folder(f"acme/{number}")))) == count


def test_names_and_paths_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it is full, and has no more names than the limit whatever it is told after that."""
    monkeypatch.setattr(names_module, "MAX_NAMES", 3)
    found = Names()
    for number in range(9):
        for path in folder(str(number)):
            found.add(path)
        assert found.is_full() is (number >= 3)
    assert found.sorted() == ["0", "1", "2"]
    monkeypatch.setattr(names_module, "MAX_PATHS", 5)
    found = Names()
    for number in range(6):
        assert not found.is_full()
        found.add(f"{number}.txt")
    assert found.is_full()
