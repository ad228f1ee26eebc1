"""What is on disk is whole or not there, after every kind of end."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from extproc.client import StagerClient
from extproc.core.artifact import AdapterName, ArtifactId, Manifest, adapter_name, versioned_name
from extproc.core.blocks import artifact_bytes
from extproc.errors import DiskFailed, InvalidAdapter, NoSpace, StageError, StagerUnavailable, StartError
from extproc.process.sockets import listen
from extproc.stager.disk import layout as layout_module
from extproc.stager.disk import store as store_module
from extproc.stager.disk.layout import MANIFEST_FILE
from extproc.stager.disk.recover import Condition
from extproc.stager.disk.store import Store
from extproc.stager.syscalls import disk_errors, hash_file
from tests.fakes.adapters import Files, overwrite, read_files, small_files
from tests.fakes.http import FileServer

NAME = adapter_name("acme/sql")


@pytest.fixture
def store(node: Path) -> Iterator[Store]:
    store = Store(node)
    store.open()
    yield store
    store.close()


def put(store: Store, files: Files, name: str = NAME) -> ArtifactId:
    """Publish `files` without a link; the digest."""
    with store.staging() as directory:
        for path, data in files.items():
            (directory / path).write_bytes(data)
        manifest = Manifest(tuple(sorted(hash_file(directory / path, path) for path in files)), name, "fake", "1")
        return store.publish(directory, manifest)


def serve(store: Store, files: Files, name: str = NAME) -> ArtifactId:
    """Publish and link."""
    digest = put(store, files, name)
    store.link(adapter_name(name), digest)
    return digest


def visible(node: Path) -> list[str]:
    """What an engine can see: every path below the directory that does not begin with a dot, as our own do."""
    return sorted(str(path.relative_to(node)) for path in node.rglob("*") if not path.relative_to(node).parts[0].startswith("."))


def reopened(node: Path) -> Store:
    store = Store(node)
    store.open()
    return store


def test_a_published_artifact_is_seen_under_its_name(store: Store, node: Path) -> None:
    """The name is a symlink into .store, relative so that the directory may be mounted elsewhere."""
    files = small_files()
    digest = serve(store, files)
    link = node / "acme" / "sql"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == store.path(digest)
    assert read_files(link) == files
    assert list((node / ".staging").iterdir()) == []


def test_the_directory_works_where_it_is_mounted(store: Store, node: Path, tmp_path: Path) -> None:
    """An engine's container has it at another path."""
    files = small_files()
    serve(store, files)
    node.rename(tmp_path / "elsewhere")
    assert read_files(tmp_path / "elsewhere" / "acme" / "sql") == files


def test_publishing_alone_shows_nothing(store: Store, node: Path) -> None:
    """Until the link is made, no engine finds the name; the content is there with its manifest."""
    digest = put(store, small_files())
    assert visible(node) == []
    assert (store.path(digest) / MANIFEST_FILE).exists()


def test_what_is_staged_and_not_published_goes(store: Store, node: Path) -> None:
    """Whatever ends the staging: return or exception."""

    def fail() -> None:
        with store.staging() as directory:
            (directory / "adapter_config.json").write_text("{}")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert list((node / ".staging").iterdir()) == []
    assert list((node / ".store").iterdir()) == []


def test_equal_content_is_stored_once(store: Store, node: Path) -> None:
    """Two names, one digest, one directory, and nothing left of the second copy."""
    first, second = serve(store, small_files(), "acme/a"), serve(store, small_files(), "acme/b")
    assert first == second
    assert [path.name for path in (node / ".store").iterdir()] == [first]
    assert list((node / ".staging").iterdir()) == []


def test_equal_content_may_be_published_at_the_same_moment(store: Store, node: Path) -> None:
    """Two names of one content in two flights: both look, neither sees it, both rename. One wins and the other finds it there."""
    callers = 8
    for round_ in range(20):
        files = {"adapter_config.json": b"%d" % round_, "adapter_model.safetensors": b"weights"}
        together = threading.Barrier(callers)

        def publish(
            files: Files = files,
            together: threading.Barrier = together,
        ) -> str:
            with store.staging() as directory:
                for path, data in files.items():
                    (directory / path).write_bytes(data)
                manifest = Manifest(tuple(sorted(hash_file(directory / path, path) for path in files)), NAME, "fake", "1")
                together.wait()
                return store.publish(directory, manifest)

        with ThreadPoolExecutor(callers) as pool:
            digests = {future.result() for future in [pool.submit(publish) for _ in range(callers)]}
        assert len(digests) == 1
    assert list((node / ".staging").iterdir()) == []


def test_a_name_moves_to_new_content_in_one_step(store: Store, node: Path) -> None:
    """A reader that never stops looking finds one whole version or the other."""
    old, new = small_files(seed=1), small_files(seed=2)
    digests = [serve(store, old), put(store, new)]
    config, weights = node / "acme/sql/adapter_config.json", node / "acme/sql/adapter_model.safetensors"
    stop, seen = threading.Event(), set[bytes]()
    failures: list[OSError] = []

    def read() -> None:
        while not stop.is_set():
            try:
                config.read_bytes()
                seen.add(weights.read_bytes())
            except OSError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(1, 101):
        store.link(NAME, digests[turn % 2])
    stop.set()
    reader.join()
    assert failures == []
    assert seen <= {old["adapter_model.safetensors"], new["adapter_model.safetensors"]}


def test_unlinking_takes_the_name_and_the_folders_only_it_needed(store: Store, node: Path) -> None:
    """`acme/` stays while another name is in it; the content stays in any case."""
    digest = serve(store, small_files(), "acme/team/a")
    serve(store, small_files(), "acme/b")
    store.unlink(adapter_name("acme/team/a"))
    assert visible(node) == ["acme", "acme/b"]
    store.unlink(adapter_name("acme/b"))
    assert visible(node) == []
    assert store.path(digest).is_dir()


def test_unlinking_what_is_not_there_is_fine(store: Store, node: Path) -> None:
    """A second removal, or one after a crash."""
    store.unlink(NAME)
    assert visible(node) == []


def test_removed_content_is_gone_at_once_and_altogether(store: Store, node: Path) -> None:
    """Nothing of it stays in .store or .staging; removing it again is fine."""
    digest = put(store, small_files())
    store.remove(digest)
    store.remove(digest)
    assert list((node / ".store").iterdir()) == []
    assert list((node / ".staging").iterdir()) == []


# -- what a start finds


def test_a_start_adopts_what_is_whole(store: Store, node: Path) -> None:
    """Content, names and manifests of an earlier process are taken over as they are."""
    digest = serve(store, small_files(), "acme/a")
    store.link(adapter_name("acme/b"), digest)
    store.close()
    again = Store(node)
    scan = again.open()
    again.close()
    assert set(scan.artifacts) == {digest}
    found = scan.artifacts[digest]
    assert (found.name, found.origin, found.revision, found.final) == ("acme/a", "fake", "1", False)
    assert found.disk_bytes == artifact_bytes(map(len, small_files().values()))
    assert dict(scan.named()) == {"acme/a": digest, "acme/b": digest}
    assert scan.removed == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / MANIFEST_FILE).unlink(),
        lambda path: (path / MANIFEST_FILE).write_text("{"),
        lambda path: (path / MANIFEST_FILE).write_text("[]"),
        lambda path: (path / MANIFEST_FILE).write_text('{"files": [{"path": 1}]}'),
        lambda path: (path / MANIFEST_FILE).write_bytes(b"\xff\xfe"),
        lambda path: (path / "adapter_config.json").unlink(),
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"short"),
        lambda path: path.rename(path.parent / ("0" * 64)),
    ],
    ids=["no manifest", "cut manifest", "manifest is a list", "odd manifest", "binary manifest", "file gone", "file short", "other digest"],
)
def test_a_start_removes_what_is_not_whole(store: Store, node: Path, damage: object) -> None:
    """A damaged artifact goes, and the name that led to it."""
    assert callable(damage)
    damage(store.path(serve(store, small_files())))
    store.close()
    again = Store(node)
    scan = again.open()
    again.close()
    assert scan.artifacts == {}
    assert dict(scan.named()) == {}
    assert list((node / ".store").iterdir()) == []
    assert not (node / "acme" / "sql").is_symlink()


def test_a_start_empties_staging(store: Store, node: Path) -> None:
    """Partial downloads, finished links and half removed content of a killed process."""
    (node / ".staging" / "ab").mkdir()
    (node / ".staging" / "ab" / "adapter_model.safetensors").write_bytes(b"part")
    (node / ".staging" / "cd").symlink_to("../.store/none")
    store.close()
    reopened(node).close()
    assert list((node / ".staging").iterdir()) == []


def test_a_crash_between_the_two_renames_is_made_good(store: Store, node: Path) -> None:
    """Content was published, its name was not linked yet: the next start links it."""
    digest = put(store, small_files())
    store.close()
    again = Store(node)
    scan = again.open()
    again.close()
    assert dict(scan.named()) == {NAME: digest}
    assert (node / "acme" / "sql").resolve() == store.path(digest)


def test_a_start_removes_the_version_that_a_newer_one_replaced(store: Store, node: Path) -> None:
    """A crash after the name moved on: no name leads to the old content any more, so none could ever ask for it."""
    old = serve(store, small_files(seed=1))
    new = serve(store, small_files(seed=2))
    store.close()
    again = Store(node)
    scan = again.open()
    again.close()
    assert set(scan.artifacts) == {new}
    assert dict(scan.named()) == {NAME: new}
    assert scan.removed == [f".store/{old}"]
    assert [path.name for path in (node / ".store").iterdir()] == [new]


def test_foreign_files_are_left_alone(store: Store, node: Path, tmp_path: Path) -> None:
    """Somebody else's files, folders and links in the directory are neither adopted nor removed."""
    (node / "notes.txt").write_text("mine")
    (node / "mine" / "deep").mkdir(parents=True)
    (node / "mine" / "deep" / "file").write_text("mine")
    (node / "link").symlink_to(tmp_path)
    (node / "dangling").symlink_to(tmp_path / "nowhere")
    before = visible(node)
    store.close()
    again = Store(node)
    scan = again.open()
    again.close()
    assert visible(node) == before
    assert dict(scan.named()) == {}
    assert scan.removed == []


def _foreign_file(path: Path) -> None:
    path.write_text("mine")


def _foreign_directory(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


def _foreign_link(path: Path) -> None:
    (path.parent / "target").mkdir()
    path.symlink_to("target")


@pytest.mark.parametrize("make", [_foreign_file, _foreign_directory, _foreign_link])
def test_a_name_that_is_a_foreign_file_is_refused(store: Store, node: Path, make: object) -> None:
    """An adapter that somebody put there by hand is not replaced by one of ours."""
    assert callable(make)
    make(node / "sql")
    before = visible(node)
    with pytest.raises(InvalidAdapter):
        serve(store, small_files(), "sql")
    assert visible(node) == before
    assert not (node / "sql").is_symlink() or (node / "sql").readlink() == Path("target")


# -- an adapter and its checkpoints


RUN, CHECKPOINT = adapter_name("acme/sql"), adapter_name("acme/sql/checkpoint-500")
SHOWN = {RUN: small_files(seed=1), CHECKPOINT: small_files(seed=2)}


def shown(node: Path) -> dict[str, Files]:
    """What vLLM's resolver reads for each of the names: it joins the directory and the name, and opens the files there."""
    paths = {name: [node / name / path for path in SHOWN[name]] for name in SHOWN}
    return {name: {path.name: path.read_bytes() for path in files} for name, files in paths.items() if all(path.is_file() for path in files)}


@pytest.mark.parametrize("first", [RUN, CHECKPOINT])
def test_an_adapter_and_its_checkpoint_are_both_served(store: Store, node: Path, first: str) -> None:
    """Whichever comes first, and after a restart."""
    ids = {name: serve(store, SHOWN[name], name) for name in sorted(SHOWN, key=lambda name: name != first)}
    assert shown(node) == SHOWN
    store.close()
    again = Store(node)
    scan = again.open()
    assert dict(scan.named()) == ids
    assert not scan.removed
    assert shown(node) == SHOWN
    assert all(again.shows(adapter_name(name), id_) for name, id_ in ids.items())
    again.close()


@pytest.mark.parametrize("gone", [RUN, CHECKPOINT])
def test_of_an_adapter_and_its_checkpoint_one_may_go(store: Store, node: Path, gone: AdapterName) -> None:
    """The other stays, and the first may come back; when both are gone, nothing is left of their folders."""
    for name, files in SHOWN.items():
        serve(store, files, name)
    store.unlink(gone)
    assert shown(node) == {name: files for name, files in SHOWN.items() if name != gone}
    serve(store, SHOWN[gone], gone)
    assert shown(node) == SHOWN
    for name in SHOWN:
        store.unlink(name)
    assert visible(node) == []


def test_an_adapter_with_checkpoints_moves_to_new_content_in_one_step(store: Store, node: Path) -> None:
    """All its files lead through one link, which is replaced; what only the old version had goes."""
    for name, files in SHOWN.items():
        serve(store, files, name)
    pickled = {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}
    new = serve(store, pickled, RUN)
    assert store.shows(RUN, new)
    assert read_files(node / RUN) == pickled
    assert (node / RUN / ".adapter").readlink() == Path("../../.store") / new
    assert shown(node) == {CHECKPOINT: SHOWN[CHECKPOINT]}


def test_versions_of_a_checkpoint_lie_beside_it(store: Store, node: Path) -> None:
    """vLLM's resolver finds them by their own name, below what was a link until then."""
    run, checkpoint = (serve(store, files, name) for name, files in list(SHOWN.items())[:1] * 2)
    version = versioned_name(CHECKPOINT, checkpoint)
    store.link_version(version, checkpoint)
    assert (node / version).resolve() == store.path(checkpoint)
    assert store.shows(RUN, run)
    store.unlink(version)
    assert store.shows(RUN, run)


def test_a_file_system_that_cannot_exchange_takes_two_steps(store: Store, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS: what was a link is a folder in the end, all the same."""
    monkeypatch.setattr(layout_module, "exchange", lambda *_: False)
    for name, files in SHOWN.items():
        serve(store, files, name)
    assert shown(node) == SHOWN


def test_a_crash_in_mid_unlinking_leaves_nothing_in_the_folder(store: Store, node: Path) -> None:
    """The link that all files lead through goes first; a start takes the rest."""
    ids = {name: serve(store, files, name) for name, files in SHOWN.items()}
    store.retire(ids[RUN])
    (node / RUN / ".adapter").unlink()
    store.close()
    again = Store(node)
    assert dict(again.open().named()) == {CHECKPOINT: ids[CHECKPOINT]}
    assert visible(node) == ["acme", RUN, CHECKPOINT]
    again.close()


def test_only_links_of_ours_are_taken_away(store: Store, node: Path, tmp_path: Path) -> None:
    """A link that somebody else has put at the name stays."""
    id_ = serve(store, small_files(), "sql")
    (node / "sql").unlink()
    (node / "sql").symlink_to(tmp_path)
    store.unlink("sql", id_)
    assert (node / "sql").readlink() == tmp_path


def test_what_is_not_whole_is_published_again(store: Store, node: Path) -> None:
    """Content that is there is left alone, unless a file of it is missing."""
    id_ = serve(store, small_files())
    assert store.is_whole(id_)
    (store.path(id_) / "adapter_model.safetensors").unlink()
    assert not store.is_whole(id_)
    store.discard_lost(id_)
    assert not store.path(id_).exists()
    (store.path(id_)).mkdir()
    assert serve(store, small_files()) == id_
    assert store.is_whole(id_)
    assert read_files(node / NAME) == small_files()
    store.discard_lost(id_)
    assert store.is_whole(id_)


# -- what others write into published files

WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = small_files(seed=1)[WEIGHTS]  # as long as those that are published here


def test_what_others_write_is_noticed_by_its_stamp(store: Store) -> None:
    """The length is as it was and the time of modification was put back: the look sees that somebody was there, reading it that it is something else."""
    id_ = serve(store, small_files())
    assert store.condition(id_) is Condition.WHOLE
    overwrite(store.path(id_) / WEIGHTS, OTHER_WEIGHTS)
    assert store.condition(id_) is Condition.TOUCHED
    assert not store.is_whole(id_)
    with pytest.raises(DiskFailed, match="not on this node's disk as it was published"):
        store.load_options(id_)
    with pytest.raises(DiskFailed, match="not on this node's disk as it was published"):
        store.show_version(versioned_name(NAME, id_), id_)


@pytest.mark.parametrize(
    "touch",
    [
        lambda path: path.with_suffix(".link").hardlink_to(path),
        lambda path: path.chmod(0o600),
        lambda path: overwrite(path, path.read_bytes()),
        lambda path: Path(shutil.copy2(path, path.with_suffix(".copy"))).rename(path),
    ],
    ids=["linked", "another mode", "the same again", "another inode"],
)
def test_what_is_the_same_when_it_is_read_is_read_once(store: Store, touch: Callable[[Path], object]) -> None:
    """A link that is made of it, or a copy that comes back from elsewhere, changes its stamp: the next look finds the new one written down."""
    id_ = serve(store, small_files())
    manifest = store.path(id_) / MANIFEST_FILE
    os.utime(manifest, (1000, 2000))
    touch(store.path(id_) / WEIGHTS)
    assert store.condition(id_) is Condition.TOUCHED
    assert store.is_whole(id_)
    assert store.condition(id_) is Condition.WHOLE
    assert manifest.stat().st_mtime == 2000  # when it was last used
    assert list(store.staged.directory.iterdir()) == []


def test_our_own_writes_do_not_touch_it(store: Store) -> None:
    """Names that come and go, the time of its last use, its retirement and a peer that reads it."""
    id_ = serve(store, small_files())
    store.link(adapter_name("acme/other"), id_)
    store.link_version(versioned_name(NAME, id_), id_)
    store.unlink(NAME)
    os.utime(store.path(id_) / MANIFEST_FILE, (1000, 2000))
    store.retire(id_)
    read_files(store.path(id_))
    store.close()
    again = reopened(store.directory)
    assert again.condition(id_) is Condition.WHOLE
    again.close()


def test_a_start_tells_what_was_touched(store: Store) -> None:
    """It reads nothing of it: of terabytes that were copied back, each has another stamp."""
    ids = [serve(store, small_files(seed=seed), f"acme/{seed}") for seed in range(3)]
    overwrite(store.path(ids[1]) / WEIGHTS, OTHER_WEIGHTS[::-1])
    store.close()
    again = Store(store.directory)
    scan = again.open()
    again.close()
    assert scan.touched == [ids[1]]
    assert set(scan.artifacts) == set(ids)


def test_what_was_published_without_stamps_counts_by_its_lengths(store: Store) -> None:
    """As by an earlier version: reading it all would take an hour per terabyte. Who has it read has its stamps from then on."""
    id_ = serve(store, small_files())
    manifest = store.path(id_) / MANIFEST_FILE
    raw = json.loads(manifest.read_text())
    del raw["stamps"]
    manifest.write_text(json.dumps(raw))
    overwrite(store.path(id_) / WEIGHTS, small_files()[WEIGHTS])
    assert store.condition(id_) is Condition.WHOLE
    assert store.differs(id_) == ""
    overwrite(store.path(id_) / WEIGHTS, OTHER_WEIGHTS)
    assert store.condition(id_) is Condition.TOUCHED


def test_what_others_have_changed_is_published_anew(store: Store, node: Path) -> None:
    """Equal content comes, by another name, say: it takes the place of what is not what it was."""
    id_ = serve(store, small_files())
    overwrite(store.path(id_) / WEIGHTS, OTHER_WEIGHTS)
    assert serve(store, small_files(), "acme/other") == id_
    assert store.condition(id_) is Condition.WHOLE
    assert read_files(node / NAME) == small_files()


def test_what_others_have_only_touched_is_not_published_anew(store: Store) -> None:
    """An engine may be reading it."""
    id_ = serve(store, small_files())
    inode = (store.path(id_) / WEIGHTS).stat().st_ino
    (store.path(id_) / WEIGHTS).chmod(0o600)
    assert serve(store, small_files(), "acme/other") == id_
    assert (store.path(id_) / WEIGHTS).stat().st_ino == inode


def test_stamps_that_cannot_be_written_are_found_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk it counts all the same, and is read at each look."""
    id_ = serve(store, small_files())
    (store.path(id_) / WEIGHTS).chmod(0o600)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "fsync", full)
        assert store.is_whole(id_)
    assert store.condition(id_) is Condition.TOUCHED
    assert list(store.staged.directory.iterdir()) == []


# -- the directory


def test_a_second_store_is_refused_until_the_first_closes(store: Store, node: Path) -> None:
    """Two writers would remove each other's staging."""
    with pytest.raises(StartError, match="in use by another stager"):
        Store(node).open()
    store.close()
    reopened(node).close()


def test_a_second_process_is_refused_and_harms_nothing(store: Store, node: Path) -> None:
    """It must notice before it clears .staging of what the first is fetching."""
    code = "import sys, pathlib; from extproc.stager.disk.store import Store; Store(pathlib.Path(sys.argv[1])).open()"
    with store.staging() as directory:
        (directory / "part").write_bytes(b"x")
        second = subprocess.run([sys.executable, "-c", code, str(node)], capture_output=True, text=True, check=False)
        assert (directory / "part").exists()
    assert second.returncode != 0
    assert "in use by another stager" in second.stderr


def test_a_directory_below_a_file_cannot_be_used(tmp_path: Path) -> None:
    """The setting and the path are named, so that the operator knows what to change."""
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"stager\.dir .*cannot be used"):
        Store(tmp_path / "file" / "node").open()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount command")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_read_only_directory_is_refused(small_disk: Path) -> None:
    """It is written to before anything is promised."""
    reopened(small_disk / "node").close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StartError, match="cannot be used"):
        Store(small_disk / "node").open()


def test_a_full_disk_is_no_space_and_leaves_nothing(small_disk: Path) -> None:
    """ENOSPC while fetching: the partial file goes, and its room is there again."""
    store = reopened(small_disk / "node")

    def fill() -> None:
        with store.staging() as directory, disk_errors():
            (directory / "adapter_model.safetensors").write_bytes(bytes(2 * 2**20))

    with pytest.raises(NoSpace):
        fill()
    assert list((small_disk / "node" / ".staging").iterdir()) == []
    serve(store, {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(500_000)})
    store.close()


def test_a_disk_that_fills_up_while_publishing_leaves_nothing(small_disk: Path) -> None:
    """The manifest is the last file written: without it there is no artifact."""
    store = reopened(small_disk / "node")

    def publish() -> None:
        with store.staging() as directory:
            (directory / "adapter_config.json").write_bytes(b"{}")
            manifest = Manifest((hash_file(directory / "adapter_config.json", "adapter_config.json"),), NAME, "fake", "1")
            with (small_disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            store.publish(directory, manifest)

    with pytest.raises(NoSpace):
        publish()
    (small_disk / "ballast").unlink()
    store.close()
    again = Store(small_disk / "node")
    scan = again.open()
    again.close()
    assert scan.artifacts == {}
    assert visible(small_disk / "node") == []


def test_another_complaint_of_the_disk_is_a_retryable_stage_error() -> None:
    """EIO, EROFS and the like: the router may ask another node."""
    with pytest.raises(StageError) as raised, disk_errors():
        raise OSError(5, os.strerror(5))
    assert raised.value.retryable
    assert not raised.value.shared
    assert raised.value.status == 503


# -- a real process that is killed


async def start_stager(config: Path) -> asyncio.subprocess.Process:
    """`lora-extproc stager`, when it serves."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "extproc", "stager", "--config", str(config), stderr=asyncio.subprocess.PIPE, env={**os.environ}
    )
    assert process.stderr is not None
    while line := await process.stderr.readline():
        if b"stager serves on" in line:
            return process
    raise AssertionError(f"the stager ended with {await process.wait()} before it served")


async def test_kill_9_in_mid_download_leaves_nothing_behind(node: Path, tmp_path: Path, http_server: FileServer) -> None:
    """Order of events: the weights are half fetched; SIGKILL; nobody cleans up; the next start finds the part and clears it."""
    files = small_files()
    http_server.add("acme/sql", files)
    http_server.stall.add("/acme/sql/adapter_model.safetensors")
    with listen("127.0.0.1:0") as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    origin = {"type": "http", "url": http_server.url, "allow_private": True}
    settings = {"listen": address, "http_listen": "", "dir": str(node), "engine": {"url": ""}, "origins": [origin]}
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump({"stager": settings}))

    first = await start_stager(config)
    async with StagerClient(address) as client:
        waiting = asyncio.create_task(client.ensure("acme/sql"))
        await http_server.stalled.wait()
        assert len(list((node / ".staging").iterdir())) == 1
        first.send_signal(signal.SIGKILL)
        await first.wait()
        with pytest.raises(StagerUnavailable):
            await waiting
    assert visible(node) == []
    assert list((node / ".store").iterdir()) == []

    http_server.stall.clear()
    second = await start_stager(config)
    try:
        assert list((node / ".staging").iterdir()) == []
        assert visible(node) == []
        async with StagerClient(address) as client:
            assert (await client.list()).used_bytes == 0
            staged = await client.ensure("acme/sql")
        assert staged.staged
        assert read_files(node / "acme" / "sql") == files
    finally:
        second.send_signal(signal.SIGTERM)
        assert await second.wait() == 0


async def test_a_second_stager_process_says_why_and_exits_2(node: Path, tmp_path: Path, store: Store) -> None:
    """The command line turns StartError into one line and exit code 2."""
    config = tmp_path / "settings.yaml"
    settings = {"listen": "127.0.0.1:0", "http_listen": "", "dir": str(node), "engine": {"url": ""}}
    config.write_text(yaml.safe_dump({"stager": settings}))
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "extproc", "stager", "--config", str(config), stderr=asyncio.subprocess.PIPE)
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"in use by another stager" in stderr
