"""SIGKILL at two hundred random instants: what was acknowledged is there, and what is visible is whole."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from extproc.stager.disk.store import Store
from tests.fakes.adapters import read_files, size_of, small_files, write_small
from tests.fakes.doomed import KEPT, MOVING, PACKED, PASSING, ROOM, TWINS

SEED = 20_26
ROUNDS = 200
LONGEST_S, MOST_S = 0.06, 1.0
FOREIGN = "others/one"

Content = frozenset[tuple[str, str]]  # file name and SHA-256 of each file


def content(directory: Path) -> Content:
    """What lies in a directory, read from end to end."""
    return frozenset((name, hashlib.sha256(data).hexdigest()) for name, data in read_files(directory).items())


def name_is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@dataclass
class World:
    """The node, its origin, and what each name may ever show."""

    node: Path
    origin: Path
    may_show: dict[str, set[Content]] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)

    def look(self) -> Counter[str]:
        """Fail unless every visible name leads to a whole artifact of its own; how much was half done. It shares no code with the stager."""
        seen, half_done = set[str](), Counter[str]()
        for top, directories, files in os.walk(self.node):
            hidden = [name for name in (*directories, *files) if Path(top) == self.node and name.startswith(".")]
            directories[:] = [name for name in directories if name not in hidden]
            for path in [Path(top, name) for name in (*directories, *files) if name not in hidden]:
                if name_is_folder(path):
                    continue
                shown = str(path.relative_to(self.node))
                if shown.startswith(FOREIGN):
                    continue
                assert path.is_symlink(), f"{shown} is not a link"
                assert path.exists(), f"{shown} leads nowhere"
                assert path.resolve().parent == self.node / ".store", f"{shown} leads out of the store"
                assert content(path) in self.may_show[shown], f"{shown} shows what it never was"
                seen.add(shown)
        assert content(self.node / FOREIGN) in self.may_show[FOREIGN]
        assert self.pinned <= seen, f"lost: {self.pinned - seen}"
        if self.pinned:
            assert self.pinned <= set(json.loads((self.node / ".pins.json").read_bytes())), "a pin is lost"
        everything = set.union(*self.may_show.values())
        if (self.node / ".store").exists():
            for artifact in (self.node / ".store").iterdir():
                assert content(artifact) in everything, f"{artifact.name} is published and not whole"
            linked = {(self.node / name).resolve().name for name in seen}
            half_done["content without a name"] += len({path.name for path in (self.node / ".store").iterdir()} - linked)
        if (self.node / ".staging").exists():
            half_done["in staging"] += len(list((self.node / ".staging").iterdir()))
        return half_done

    def reopen(self) -> None:
        """Let the next start clear up; then nothing is half done."""
        store = Store(self.node)
        scan = store.open()
        store.close()
        names = dict(scan.named())
        assert not any((self.node / ".staging").iterdir())
        assert {path.name for path in (self.node / ".store").iterdir()} == set(scan.artifacts) == set(names.values())
        for name in names:
            assert (self.node / name).is_symlink()
        assert scan.foreign == [FOREIGN]
        assert self.look().total() == 0


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Adapters of every kind, more than fit; two that move between two versions; one that others put onto the node."""
    world = World(tmp_path / "node", tmp_path / "origin")
    for seed, name in enumerate((*PASSING, "kept/still")):
        world.may_show[name] = {content(write_small(world.origin / name, seed=seed))}
    for name in TWINS:
        world.may_show[name] = {content(write_small(world.origin / name, seed=100))}
    for seed, name in enumerate(MOVING, 200):
        versions = [write_small(tmp_path / "versions" / name / version, seed=seed, rank=rank) for version, rank in (("1", 4), ("2", 6))]
        world.may_show[name] = {content(version) for version in versions}
        (world.origin / name).parent.mkdir(exist_ok=True)
        (world.origin / name).symlink_to(versions[0])
    for seed, name in enumerate(PACKED, 300):
        unpacked = write_small(tmp_path / "unpacked" / name, seed=seed)
        world.may_show[name] = {content(unpacked)}
        (world.origin / name).parent.mkdir(exist_ok=True)
        if name.endswith("tar"):
            with tarfile.open(world.origin / f"{name}.tar.gz", "w:gz") as tar:
                tar.add(unpacked, arcname="adapter")
        else:
            with zipfile.ZipFile(world.origin / f"{name}.zip", "w") as packed:
                for file in unpacked.iterdir():
                    packed.write(file, arcname=file.name)
    world.may_show[FOREIGN] = {content(write_small(world.node / FOREIGN, seed=400))}
    return world


@contextlib.contextmanager
def doomed(world: World) -> Iterator["subprocess.Popen[str]"]:
    """The process that forks stagers."""
    command = [sys.executable, "-m", "tests.fakes.doomed", str(world.node), str(world.origin), str(ROOM * size_of(small_files(rank=6)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.communicate()


def test_kill_9_at_random_instants_loses_nothing_and_shows_nothing_partial(world: World) -> None:
    """Each life takes over what the last one left, does as much as it can of everything, and is killed; then the directory is read as an engine would."""
    chance = random.Random(SEED)
    did, left = Counter[str](), Counter[str]()
    with doomed(world) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        longest_s, pins = LONGEST_S, 0
        for round_ in range(ROUNDS):
            if round_ % 10 == 0:  # lives in which nobody gets as far as a pin are too short for a machine as busy as this
                longest_s, pins = min(longest_s * (1.0 if did["pin"] > pins or not round_ else 1.5), MOST_S), did["pin"]
            life_s, seed = chance.uniform(0, longest_s), chance.randrange(2**32)
            process.stdin.write(f"{life_s} {seed}\n")
            process.stdin.flush()
            said = json.loads(process.stdout.readline())
            note = f"round {round_} of seed {SEED}, killed after {life_s * 1000:.1f} ms: {said[-3:]}"
            did.update(word for word, *_ in said)
            world.pinned |= {name for word, *names in said if word == "pin" for name in names}
            assert "error" not in did, note
            try:
                left.update(world.look())
                if round_ % 20 == 19:  # else the next life finds the leftovers, and may be killed while it clears them
                    world.reopen()
            except AssertionError as error:
                error.add_note(note)
                raise
    print(f"{ROUNDS} lives: {dict(did)}; found after kills: {dict(left)}")
    assert world.pinned == set(KEPT)
    assert all(did[deed] for deed in ("open", "pin", "ensure", "refresh", "remove")), did
    assert left["in staging"], "no instant was in the middle of anything"
