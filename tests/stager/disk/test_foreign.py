"""What others put into the directory is found by a look that lists only what changed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from extproc.core.artifact import ArtifactId, adapter_name
from extproc.stager.disk.foreign import EVERYTHING_S, SETTLED_S, Foreign
from extproc.stager.disk.store import Store
from tests.fakes.adapters import CONFIG

DIGEST = ArtifactId("0" * 64)
OURS = [f"acme-{folder}/ours-{number}" for folder in range(3) for number in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "node")
    store.open()
    store.path(DIGEST).mkdir()
    for name in OURS:
        store.link(adapter_name(name), DIGEST)
    yield store
    store.close()


class Looks:
    """Looks, and notes which names were listed: each that is listed is asked for whether it is ours."""

    def __init__(self, store: Store, ours: list[str]) -> None:
        self.listed: set[str] = set()
        self._ours = ours
        self._foreign = Foreign(store)

    def at(self, now: float) -> list[str]:
        self.listed.clear()
        return sorted(self._foreign.look(self._is_ours, now))

    def settle(self) -> None:
        for now in (0.0, SETTLED_S):
            self.at(now)

    def _is_ours(self, name: str) -> bool:
        self.listed.add(name)
        return name in self._ours


def theirs(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).touch()


def test_while_nothing_changes_nothing_is_listed(store: Store) -> None:
    """Once when it is found, once when the file system's clock must have moved on, and then no more."""
    looks = Looks(store, OURS)
    seen = []
    for now in (0.0, SETTLED_S, SETTLED_S + 1, SETTLED_S + 100):
        assert looks.at(now) == []
        seen.append(len(looks.listed))
    assert seen == [len(OURS), len(OURS), 0, 0]


def test_what_comes_and_goes_is_found_by_listing_its_directory_alone(store: Store) -> None:
    """The others are as they were."""
    looks = Looks(store, OURS)
    looks.settle()
    theirs(store.directory / "acme-1/theirs/deeper")
    assert looks.at(10) == ["acme-1/theirs/deeper"]
    assert looks.listed == {name for name in OURS if name.startswith("acme-1/")}
    assert looks.at(20) == looks.at(30) == ["acme-1/theirs/deeper"]
    assert not looks.listed
    theirs(store.directory / "acme-1/theirs")
    assert looks.at(40) == ["acme-1/theirs", "acme-1/theirs/deeper"]
    (store.directory / "acme-1/theirs" / CONFIG).unlink()
    (store.directory / "acme-1/theirs/deeper" / CONFIG).unlink()
    assert looks.at(50) == []


def test_a_directory_in_anothers_place_is_listed(store: Store) -> None:
    """With the very times of the one before: as `mv` and `rsync -t` leave them."""
    looks = Looks(store, OURS)
    theirs(store.directory.parent / "other/theirs")
    looks.settle()
    before = (store.directory / "acme-2").stat()
    (store.directory / "acme-2").rename(store.directory.parent / "away")
    (store.directory.parent / "other").rename(store.directory / "acme-2")
    os.utime(store.directory / "acme-2", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert looks.at(10) == ["acme-2/theirs"]


def test_a_link_elsewhere_is_followed_at_every_look(store: Store, tmp_path: Path) -> None:
    """What it leads to may become an adapter while nothing changes in the node's directory. One that leads to ours is read when it is listed, and no more."""
    (store.directory / "theirs").symlink_to(tmp_path / "nfs")
    (store.directory / "second").symlink_to(f".store/{DIGEST}")
    looks = Looks(store, OURS)
    looks.settle()
    assert looks.at(10) == []
    assert looks.listed == {"theirs"}
    theirs(tmp_path / "nfs")
    assert looks.at(20) == ["theirs"]


def test_now_and_then_everything_is_listed(store: Store, tmp_path: Path) -> None:
    """Of a file system that keeps no times of directories, and what had a name of ours when it was listed."""
    theirs(tmp_path / "nfs")
    (store.directory / "was-ours").symlink_to(tmp_path / "nfs")
    ours = [*OURS, "was-ours"]
    looks = Looks(store, ours)
    looks.settle()
    ours.remove("was-ours")
    assert looks.at(EVERYTHING_S - 1) == []
    assert looks.at(EVERYTHING_S) == ["was-ours"]


def test_folders_that_show_an_artifact_of_ours_are_none_of_theirs(store: Store) -> None:
    """Where other names begin with a name, its links of files are not looked at again either."""
    store.path(DIGEST).joinpath(CONFIG).touch()
    store.link(adapter_name("run"), DIGEST)
    store.link(adapter_name("run/checkpoint-1"), DIGEST)
    assert (store.directory / "run" / CONFIG).is_symlink()
    looks = Looks(store, [*OURS, "run", "run/checkpoint-1"])
    looks.settle()
    assert looks.at(10) == []
    assert not looks.listed
