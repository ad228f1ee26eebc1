"""A directory as an origin."""

import os
import threading
from pathlib import Path

import pytest

from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.errors import InvalidAdapter, NoSpace, OriginChanged, OriginFailed, OriginRefused
from extproc.stager.supply.download import Download
from extproc.stager.supply.listing import Absent, Listing
from extproc.stager.supply.origins.file import FileOrigin
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, small_files, write_small
from tests.fakes.threads import LoopThreads

from .conftest import fetch_all

NAME = adapter_name("acme/sql")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_small(tmp_path / "origin" / NAME)
    return tmp_path / "origin"


@pytest.fixture
def origin(root: Path) -> FileOrigin:
    return FileOrigin(OriginSettings(type="file", path=str(root)))


async def test_it_lists_and_copies_an_adapter(origin: FileOrigin, root: Path, target: Path) -> None:
    """Sizes are stated; the copies are copies, which no later change of the original reaches."""
    (root / NAME / "README.md").write_text("not wanted")
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    assert [(file.path, file.size) for file in listing.files] == [(path, len(data)) for path, data in sorted(small_files().items())]
    assert await fetch_all(origin, listing, target) == small_files()
    assert (target / WEIGHTS).stat().st_ino != (root / NAME / WEIGHTS).stat().st_ino
    await origin.close()


async def test_what_is_not_there_is_not_found(origin: FileOrigin, root: Path) -> None:
    """No directory, a file of that name, a path through a file, a directory without configuration."""
    (root / "plain").write_text("x")
    (root / "empty").mkdir()
    (root / "weights").mkdir()
    (root / "weights" / WEIGHTS).write_bytes(b"x")
    for name in ("nosuch", "acme/other", "plain", "plain/below", "empty"):
        assert await origin.resolve(adapter_name(name)) is None
    assert await origin.resolve(adapter_name("weights")) == Absent(f"files there, but no {CONFIG}")
    assert await origin.resolve(adapter_name("acme")) == Absent("adapters one folder deeper (sql): name one of them")


async def test_a_missing_root_is_a_failure_not_a_not_found(tmp_path: Path) -> None:
    """A file system that is not mounted must not become a remembered 404."""
    origin = FileOrigin(OriginSettings(type="file", path=str(tmp_path / "unmounted")))
    with pytest.raises(OriginFailed, match="is not there") as raised:
        await origin.resolve(NAME)
    assert str(tmp_path) not in str(raised.value)


async def test_a_file_that_is_gone_is_a_failure(origin: FileOrigin, root: Path, target: Path) -> None:
    """Removed between listing and copying."""
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    (root / NAME / WEIGHTS).unlink()
    with pytest.raises(OriginChanged, match=WEIGHTS):
        await fetch_all(origin, listing, target)


async def test_a_file_that_was_truncated_is_a_failure(origin: FileOrigin, root: Path, target: Path) -> None:
    """A training job that writes again while it is copied."""
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    os.truncate(root / NAME / WEIGHTS, 100)
    with pytest.raises(OriginChanged, match="changed after it was listed"):
        await fetch_all(origin, listing, target)


async def test_a_file_that_was_replaced_after_the_listing_is_a_failure(origin: FileOrigin, root: Path, target: Path) -> None:
    """A listing is pinned to one revision: the old configuration and new weights of the same size are no adapter."""
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    weights = root / NAME / WEIGHTS
    was = weights.stat()
    weights.write_bytes(small_files(seed=1)[WEIGHTS])
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns + 1_000_000_000))
    assert weights.stat().st_size == was.st_size
    with pytest.raises(OriginChanged):
        await fetch_all(origin, listing, target)


async def test_new_content_has_a_new_revision(origin: FileOrigin, root: Path) -> None:
    """Weights alone may change."""
    first = await origin.resolve(NAME)
    was = (root / NAME / WEIGHTS).stat()
    os.utime(root / NAME / WEIGHTS, ns=(was.st_atime_ns, was.st_mtime_ns + 1_000_000_000))
    second = await origin.resolve(NAME)
    assert isinstance(first, Listing)
    assert isinstance(second, Listing)
    assert first.revision != second.revision


async def test_pickle_is_listed_only_without_safetensors(origin: FileOrigin, root: Path) -> None:
    """Whether it may be used is the stager's to say."""
    (root / NAME / PICKLE).write_bytes(b"\x80\x04.")
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    assert [file.path for file in listing.files] == [CONFIG, WEIGHTS]
    (root / NAME / WEIGHTS).unlink()
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    assert [file.path for file in listing.files] == [CONFIG, PICKLE]


async def test_links_are_followed_and_copied_whole(origin: FileOrigin, root: Path, target: Path) -> None:
    """A hub cache is made of links into blobs."""
    (root / "blob").write_bytes((root / NAME / WEIGHTS).read_bytes())
    (root / NAME / WEIGHTS).unlink()
    (root / NAME / WEIGHTS).symlink_to(root / "blob")
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    assert await fetch_all(origin, listing, target) == small_files()
    assert not (target / WEIGHTS).is_symlink()


@pytest.mark.parametrize("what", ["weights", "configuration", "directory", "parent"])
async def test_links_that_lead_out_are_not_followed(tmp_path: Path, root: Path, target: Path, what: str) -> None:
    """Who may write one adapter would have any file of the machine read. A setting allows it, for directories that are made of such links."""
    write_small(tmp_path / "outside" / "secret")
    link, leads_to = {
        "weights": (root / NAME / WEIGHTS, tmp_path / "outside" / "secret" / WEIGHTS),
        "configuration": (root / NAME / CONFIG, tmp_path / "outside" / "secret" / CONFIG),
        "directory": (root / NAME, tmp_path / "outside" / "secret"),
        "parent": (root / "acme", tmp_path / "outside"),
    }[what]
    link.rename(tmp_path / "aside")
    link.symlink_to(leads_to)
    name = adapter_name("acme/secret") if what == "parent" else NAME
    with pytest.raises(OriginRefused, match="leads out of the origin") as raised:
        await FileOrigin(OriginSettings(type="file", path=str(root))).resolve(name)
    assert str(tmp_path) not in raised.value.message
    allowed = FileOrigin(OriginSettings(type="file", path=str(root), links_outside=True))
    listing = await allowed.resolve(name)
    assert isinstance(listing, Listing)
    assert await fetch_all(allowed, listing, target) == small_files()


async def test_a_link_that_is_turned_outwards_after_the_listing_is_not_followed(tmp_path: Path, origin: FileOrigin, root: Path, target: Path) -> None:
    """The order of events: listed; the file becomes a link to another of the same length; opened."""
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    (root / NAME / WEIGHTS).rename(tmp_path / "secret")
    (root / NAME / WEIGHTS).symlink_to(tmp_path / "secret")
    with pytest.raises(OriginRefused, match="leads out"):
        await fetch_all(origin, listing, target)


async def test_a_pipe_is_no_file(origin: FileOrigin, root: Path) -> None:
    """Whoever opened it would wait for its writer."""
    (root / NAME / WEIGHTS).unlink()
    os.mkfifo(root / NAME / WEIGHTS)
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    assert [file.path for file in listing.files] == [CONFIG]


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("config.json", "model-00001-of-00002.safetensors"), "a full model there"),
        (("model.Q4_K_M.gguf",), "GGUF files there"),
        (("checkpoint-500/" + CONFIG, "checkpoint-1000/" + CONFIG), "only checkpoints there (checkpoint-1000, checkpoint-500): name one of them"),
        (("one/" + CONFIG, "two/" + CONFIG), "adapters one folder deeper (one, two): name one of them"),
        (("notes.txt",), f"files there, but no {CONFIG}"),
    ],
)
async def test_what_is_there_in_place_of_an_adapter_is_said(origin: FileOrigin, root: Path, paths: tuple[str, ...], said: str) -> None:
    """`no origin has it` alone sends whoever reads it looking for a wrong name."""
    for path in paths:
        (root / "other" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "other" / path).write_text("{}")
    found = await origin.resolve(adapter_name("other"))
    assert isinstance(found, Absent)
    assert found.instead.startswith(said)


async def test_a_file_server_that_hangs_is_a_failure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every request would wait as long as a fetch may take, and the breaker would hear of none."""
    well = threading.Event()
    stat = FileOrigin._stat

    def hang(self: FileOrigin, path: Path) -> os.stat_result | None:
        well.wait(10)
        return stat(self, path)

    monkeypatch.setattr(FileOrigin, "_stat", hang)
    origin = FileOrigin(OriginSettings(type="file", path=str(root), timeout_s=0.05))
    with pytest.raises(OriginFailed, match="has not answered within") as raised:
        await origin.resolve(NAME)
    assert not raised.value.reached
    well.set()
    origin._timeout_s = 10.0
    assert isinstance(await origin.resolve(NAME), Listing)
    await origin.close()


async def test_an_origin_that_is_an_adapter_itself_is_said(root: Path) -> None:
    """`--origin models/acme/sql`: no name below it leads to it."""
    origin = FileOrigin(OriginSettings(type="file", path=str(root / NAME)))
    for name in (NAME, "sql"):
        assert await origin.resolve(adapter_name(name)) == Absent("an adapter in its own path: give it the directory above")
    await origin.close()


async def test_a_full_disk_is_not_the_origin_s_failure(origin: FileOrigin, target: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    (target / CONFIG).symlink_to("/dev/full")
    with pytest.raises(NoSpace):
        await fetch_all(origin, listing, target)


async def test_a_header_of_another_file_than_was_listed_is_a_change_and_no_fault_of_the_adapter(origin: FileOrigin, root: Path, target: Path) -> None:
    """Resolve; the adapter is replaced; the header that arrives contradicts the length that was listed. What is invalid would be remembered as that."""
    listing = await origin.resolve(NAME)
    assert isinstance(listing, Listing)
    weights = next(file for file in listing.files if file.path == WEIGHTS)
    (root / NAME / WEIGHTS).write_bytes(b"another file, and of another length")

    async def judge(_head: bytes) -> int:
        raise InvalidAdapter("its header is of another length")

    download = Download(weights, target / WEIGHTS, disk=LoopThreads())
    download.hold_for(judge, 8)
    with pytest.raises(OriginChanged, match="changed after it was listed"):
        await origin.fetch(listing, weights, download)
    download.close()
    await origin.close()
