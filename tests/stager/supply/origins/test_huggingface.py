"""The Hugging Face hub as an origin: its own client against a hub on this machine."""

import asyncio
import dataclasses
import errno
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfFileMetadata, close_session, get_hf_file_metadata
from huggingface_hub.utils import XetFileData  # type: ignore[attr-defined]  # not in its list of exports

from extproc.config.origins import OriginSettings
from extproc.core.artifact import AdapterName, adapter_name
from extproc.errors import DiskFailed, InvalidAdapter, NoSpace, OriginChanged, OriginFailed, OriginRefused
from extproc.stager.supply.job import Job
from extproc.stager.supply.listing import Absent, Listing
from extproc.stager.supply.origins import huggingface
from extproc.stager.supply.origins.huggingface import HuggingFaceOrigin
from extproc.stager.supply.source import Source
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, Files, read_files, sha256, small_files
from tests.fakes.hub import Hub
from tests.fakes.threads import LoopThreads
from tests.fakes.wait import Clock, turns, until
from tests.stager.conftest import OpenStager

from .conftest import fetch, fetch_all

NAME = adapter_name("acme/sql")
OpenOrigin = Callable[..., HuggingFaceOrigin]


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's own waits between attempts
    async with Hub() as hub:
        yield hub
        close_session()


@pytest.fixture
async def open_origin(hub: Hub) -> AsyncIterator[OpenOrigin]:
    opened: list[HuggingFaceOrigin] = []

    def open_(**settings: Any) -> HuggingFaceOrigin:
        opened.append(HuggingFaceOrigin(OriginSettings(type="huggingface", url=hub.url, **{"timeout_s": 5.0, **settings})))
        return opened[-1]

    yield open_
    for origin in opened:
        await origin.close()


async def resolved(origin: HuggingFaceOrigin, name: AdapterName = NAME) -> Listing:
    listing = await origin.resolve(name)
    assert isinstance(listing, Listing)
    return listing


def renamed(files: Files, folder: str) -> Files:
    return {folder + path: data for path, data in files.items()}


async def test_it_lists_and_fetches_an_adapter(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """The revision is the commit; the weights' SHA-256 is the one their LFS pointer states; nothing else is downloaded."""
    files = small_files()
    commit = hub.add(NAME, {**files, "README.md": b"x", "optimizer.pt": b"x"})
    origin = open_origin()
    listing = await resolved(origin)
    assert listing.revision == commit
    stated = {file.path: (file.size, file.sha256) for file in listing.files}
    assert stated == {CONFIG: (len(files[CONFIG]), None), WEIGHTS: (len(files[WEIGHTS]), sha256(files[WEIGHTS]))}
    assert await fetch_all(origin, listing, target) == files
    assert hub.gets() == 2


async def test_what_is_fetched_lies_alone(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """The client's locks and metadata do not get into the artifact."""
    hub.add(NAME, small_files())
    origin = open_origin()
    await fetch_all(origin, await resolved(origin), target)
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]


async def test_files_come_from_the_commit_that_was_listed(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """A push between listing and fetching: the old configuration never meets the new weights."""
    old, new = small_files(seed=1), small_files(seed=2)
    hub.add(NAME, old)
    origin = open_origin()
    listing = await resolved(origin)
    hub.add(NAME, new)
    assert await fetch_all(origin, listing, target) == old
    assert await fetch_all(origin, await resolved(origin), target) == new


async def test_a_push_in_mid_download_changes_nothing(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """The request names the commit."""
    files = small_files()
    hub.add(NAME, files)
    origin = open_origin()
    listing = await resolved(origin)
    hub.fault("change_mid_download", f"*{CONFIG}")
    assert await fetch_all(origin, listing, target) == files


async def test_files_outside_lfs_may_be_redirected(open_origin: OpenOrigin, hub: Hub, target: Path) -> None:
    """The public hub answers them with a path that holds the commit."""
    hub.resolve_cache = True
    hub.add(NAME, small_files())
    origin = open_origin()
    assert await fetch_all(origin, await resolved(origin), target) == small_files()


async def test_a_name_may_go_on_with_a_folder_of_the_repository(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """`org/name/sub/dir`: many adapters in one repository, each listed alone."""
    one, two = small_files(seed=1), small_files(seed=2)
    hub.add("acme/many", {**renamed(one, "sql/v1/"), **renamed(two, "sql/"), "README.md": b"x"})
    origin = open_origin()
    for name, files in (("acme/many/sql/v1", one), ("acme/many/sql", two)):
        assert await fetch_all(origin, await resolved(origin, adapter_name(name)), target) == files
    assert await origin.resolve(adapter_name("acme/many")) == Absent("adapters one folder deeper (sql): name one of them")
    assert await origin.resolve(adapter_name("acme/many/sq")) is None


async def test_a_repository_without_an_organisation_is_one(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """As the hub's oldest ones are."""
    hub.add("flat", small_files())
    origin = open_origin()
    assert await fetch_all(origin, await resolved(origin, adapter_name("flat")), target) == small_files()


@pytest.mark.parametrize("raw", ["acme/none", "none", "acme/with space", "a" * 120 + "/b", "acme/double--dash", "acme/ü", "acme/x.git"])
async def test_what_is_not_there_or_cannot_be_is_not_found(hub: Hub, open_origin: OpenOrigin, raw: str) -> None:
    """Missing, or a name that no repository can have: the next origin is asked."""
    assert await open_origin().resolve(adapter_name(raw)) is None


async def test_a_missing_repository_is_not_found_with_a_token_too(hub: Hub, open_origin: OpenOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub then answers 404, without one 401."""
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    assert await open_origin().resolve(adapter_name("acme/none")) is None
    assert {status for _, _, status in hub.requests} == {404}


async def test_a_repository_without_configuration_is_not_found(hub: Hub, open_origin: OpenOrigin) -> None:
    """A whole model, or a data set's leftovers."""
    hub.add(NAME, {WEIGHTS: b"x", "config.json": b"{}"})
    assert not isinstance(await open_origin().resolve(NAME), Listing)


async def test_pickle_is_listed_only_without_safetensors(hub: Hub, open_origin: OpenOrigin) -> None:
    """Whether it may be used is the stager's to say."""
    files = small_files()
    hub.add(NAME, {CONFIG: files[CONFIG], PICKLE: files[WEIGHTS]})
    assert [file.path for file in (await resolved(open_origin())).files] == [CONFIG, PICKLE]
    hub.add(NAME, {**files, PICKLE: b"x"})
    assert [file.path for file in (await resolved(open_origin())).files] == [CONFIG, WEIGHTS]


# -- refusals and failures


async def test_a_gated_repository_is_a_refusal(hub: Hub, open_origin: OpenOrigin, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its listing is public, its files are not: without a token, with one that is not on the list, and not with one that is."""
    hub.add(NAME, small_files(), gated=True, private_token="hf_in")
    for token in (None, "hf_other"):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        origin = open_origin()
        listing = await resolved(origin)
        with pytest.raises(OriginRefused, match="gated") as raised:
            await fetch_all(origin, listing, target)
        assert not raised.value.retryable
    monkeypatch.setenv("HF_TOKEN", "hf_in")
    origin = open_origin()
    assert await fetch_all(origin, await resolved(origin), target) == small_files()


async def test_a_private_repository_needs_the_token_of_the_settings(hub: Hub, open_origin: OpenOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable is a setting; without access the hub says that there is no such repository."""
    hub.add(NAME, small_files(), private_token="hf_in")
    monkeypatch.setenv("MY_TOKEN", "hf_in")
    assert await open_origin().resolve(NAME) is None
    assert await open_origin(token_env="MY_TOKEN").resolve(NAME) is not None


async def test_a_token_may_be_in_a_file(hub: Hub, open_origin: OpenOrigin, target: Path, tmp_path: Path) -> None:
    """Read anew each time: it may be rotated."""
    hub.add(NAME, small_files(), private_token="hf_new")
    (tmp_path / "token").write_text("hf_old\n")
    origin = open_origin(token_file=str(tmp_path / "token"))
    assert await origin.resolve(NAME) is None
    (tmp_path / "token").write_text("hf_new\n")
    await fetch_all(origin, await resolved(origin), target)
    assert read_files(target) == small_files()


@pytest.fixture
def xet(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub whose files are told to lie in Xet."""

    def is_xet(url: str, **options: Any) -> HfFileMetadata:
        return dataclasses.replace(get_hf_file_metadata(url, **options), xet_file_data=XetFileData("f" * 64, "/refresh"))

    monkeypatch.setattr(huggingface, "get_hf_file_metadata", is_xet)
    return hub


async def test_what_xet_brings_takes_the_file_s_place(xet: Hub, open_origin: OpenOrigin, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client writes a file of its own, beside locks and partial files, of which nothing stays. No server of ours speaks Xet: the client is scripted."""
    files = small_files()
    xet.add(NAME, files)

    def by_xet(_repo: str, path: str, *, local_dir: Path, **_options: Any) -> str:
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / ".cache" / "lock").touch()
        (local_dir / path).write_bytes(files[path])
        return str(local_dir / path)

    monkeypatch.setattr(huggingface, "hf_hub_download", by_xet)
    origin = open_origin()
    listing = await resolved(origin)
    got = {await fetch(origin, listing, file, target / file.path) for file in listing.files}
    assert read_files(target) == files
    assert {(file.path, file.sha256) for file in got} == {(path, sha256(data)) for path, data in files.items()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_disk_that_stops_xet_is_the_disk_s_failure(
    xet: Hub, open_origin: OpenOrigin, target: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Not the origin's, which would be left alone for it."""
    xet.add(NAME, small_files())

    def fails(*_arguments: Any, **_options: Any) -> str:
        raise OSError(number, "as the disk says")

    monkeypatch.setattr(huggingface, "hf_hub_download", fails)
    origin = open_origin()
    with pytest.raises(DiskFailed if number == errno.EIO else NoSpace):
        await fetch_all(origin, await resolved(origin), target)


async def test_an_invalid_token_is_a_refusal(hub: Hub, open_origin: OpenOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expired token must not turn every adapter into a remembered 404."""
    hub.add(NAME, small_files())
    hub.invalid_tokens.add("hf_expired")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(OriginRefused):
        await open_origin().resolve(NAME)


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_server_error_is_a_failure(hub: Hub, open_origin: OpenOrigin, status: int) -> None:
    """Worth repeating, and never "not found"."""
    hub.add(NAME, small_files())
    hub.fault("status", "/api/models/*", times=99, status=status)
    with pytest.raises(OriginFailed, match=str(status)) as raised:
        await open_origin().resolve(NAME)
    assert raised.value.retryable


async def test_a_hub_that_is_down_is_a_failure(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """For the listing and for files; the message names no address."""
    hub.add(NAME, small_files())
    origin = open_origin()
    listing = await resolved(origin)
    await hub.stop()
    for asking in (origin.resolve(NAME), fetch(origin, listing, listing.files[0], target / CONFIG)):
        with pytest.raises(OriginFailed) as raised:
            await asking
        assert hub.url not in str(raised.value)


async def test_a_hub_that_hangs_up_is_a_failure(hub: Hub, open_origin: OpenOrigin) -> None:
    """The client lets its HTTP library's error through."""
    hub.add(NAME, small_files())
    hub.fault("drop", "/api/models/*", times=99)
    with pytest.raises(OriginFailed):
        await open_origin().resolve(NAME)


async def test_a_silent_hub_is_a_failure(hub: Hub, open_origin: OpenOrigin) -> None:
    """timeout_s bounds the wait for the listing."""
    hub.add(NAME, small_files())
    hub.fault("stall", "/api/models/*", times=99)
    with pytest.raises(OriginFailed):
        await open_origin(timeout_s=0.05).resolve(NAME)


@pytest.mark.parametrize("kind", ["truncate", "drop"])
async def test_a_body_that_never_arrives_whole_is_a_failure(hub: Hub, open_origin: OpenOrigin, target: Path, kind: Any) -> None:
    """After the client's own attempts."""
    hub.add(NAME, small_files())
    origin = open_origin()
    listing = await resolved(origin)
    hub.fault(kind, f"*{WEIGHTS}", times=99, method="GET")
    with pytest.raises(OriginFailed):
        await fetch_all(origin, listing, target)


async def test_a_body_that_breaks_once_arrives(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """The second attempt goes on where the first broke: where the hub redirects to, ranges are known."""
    weights = os.urandom(16 * 2**20)
    hub.add(NAME, {**small_files(), WEIGHTS: weights})
    origin = open_origin()
    listing = await resolved(origin)
    hub.fault("truncate", f"*{WEIGHTS}", at=12 * 2**20)
    got = await Source(origin).fetch(listing, listing.files[1], target / WEIGHTS, Job(), LoopThreads())
    assert (got.size, got.sha256) == (len(weights), sha256(weights))
    assert [status for method, path, status in hub.requests if method == "GET" and path.endswith(WEIGHTS)] == [200, 206]


async def test_a_commit_that_is_gone_is_a_failure(hub: Hub, open_origin: OpenOrigin, target: Path) -> None:
    """History was rewritten between listing and fetching."""
    hub.add(NAME, small_files())
    origin = open_origin()
    listing = await resolved(origin)
    gone = Listing(NAME, "f" * 40, listing.files)
    with pytest.raises(OriginChanged, match="is gone"):
        await fetch_all(origin, gone, target)


async def test_bytes_that_are_not_those_of_the_pointer_are_the_stager_s_to_refuse(hub: Hub, open_origin: OpenOrigin, open_stager: OpenStager) -> None:
    """Same length, other bytes: the header tells, or else the SHA-256 of the LFS pointer."""
    hub.add(NAME, small_files())
    hub.fault("wrong_bytes", f"*{WEIGHTS}", times=99)
    stager = await open_stager(open_origin())
    with pytest.raises(InvalidAdapter, match=WEIGHTS):
        await stager.ensure(NAME)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_an_abandoned_download_leaves_nothing_behind(hub: Hub, open_origin: OpenOrigin, open_stager: OpenStager, node: Path, method: str) -> None:
    """The order of events: the flight is given up while the client's thread waits for an answer; .staging is cleared; the answer comes; the
    thread makes its folders anew and writes where .staging was.
    """
    hub.add(NAME, small_files())
    hub.fault("stall", f"*{WEIGHTS}", at=100, method=method)
    stager = await open_stager(open_origin())
    waiting = asyncio.create_task(stager.ensure(NAME))
    await until(lambda: any(asked == method and path.endswith(WEIGHTS) for asked, path, _ in hub.requests))
    closing = asyncio.create_task(stager.close())
    await turns(100)
    hub.release()
    await closing
    await asyncio.wait({waiting})
    await asyncio.get_running_loop().shutdown_default_executor()
    assert list((node / ".staging").iterdir()) == []


# -- revisions, folders and mirrors


def visible(node: Path) -> dict[str, Files]:
    """What an engine finds: adapter name -> its files."""
    return {str(path.relative_to(node)): read_files(path) for path in node.rglob("*") if path.is_symlink()}


async def test_a_name_may_name_a_revision(hub: Hub, open_origin: OpenOrigin, open_stager: OpenStager, node: Path) -> None:
    """A branch, a tag, a commit or none: each is another adapter, beside the others, pinned to the commit that it meant when it was asked for."""
    old, new, other = (small_files(seed=seed) for seed in range(3))
    first = hub.add(NAME, old)
    second = hub.add(NAME, new)
    third = hub.add(NAME, other, revision="v2")
    stager = await open_stager(open_origin())
    for raw, files, commit in (("", new, second), ("@main", new, second), ("@v2", other, third), (f"@{first}", old, first), (f"@{third}", other, third)):
        await stager.ensure(NAME + raw)
        assert visible(node)[NAME + raw] == files
        named = stager.node.holdings.get(adapter_name(NAME + raw))
        assert named is not None
        assert (named.revision, named.final) == (commit, raw in (f"@{first}", f"@{third}"))


async def test_a_revision_and_a_folder_may_be_named_together(hub: Hub, open_origin: OpenOrigin, open_stager: OpenStager, node: Path) -> None:
    """`org/name@revision/sub/dir`."""
    old, new = small_files(seed=1), small_files(seed=2)
    commit = hub.add("acme/many", renamed(old, "sql/v1/"))
    hub.add("acme/many", {**renamed(new, "sql/v1/"), **renamed(old, "legal/")})
    stager = await open_stager(open_origin())
    for raw, files in ((f"acme/many@{commit}/sql/v1", old), ("acme/many@main/sql/v1", new), ("acme/many@main/legal", old), ("acme/many/sql/v1", new)):
        await stager.ensure(raw)
        assert visible(node)[raw] == files
    for raw in (f"acme/many@{commit}/legal", "acme/many@main/sql", "acme/many@main"):
        assert not isinstance(await open_origin().resolve(adapter_name(raw)), Listing)


@pytest.mark.parametrize("raw", ["@nosuch", "@" + "f" * 40, "@main@main", "@refs"])
async def test_a_revision_that_is_not_there_is_not_found(hub: Hub, open_origin: OpenOrigin, raw: str) -> None:
    """The next origin is asked."""
    hub.add(NAME, small_files())
    assert await open_origin().resolve(adapter_name(NAME + raw)) is None


async def test_a_name_that_ends_in_an_at_sign_means_no_revision(hub: Hub, open_origin: OpenOrigin) -> None:
    """It is the branch that the hub itself would take."""
    commit = hub.add(NAME, small_files())
    assert (await resolved(open_origin(), adapter_name(f"{NAME}@"))).revision == commit


async def test_a_commit_is_never_compared_again(hub: Hub, open_origin: OpenOrigin, open_stager: OpenStager, clock: Clock) -> None:
    """What a commit means does not change; what a branch means is looked up after revalidate_s."""
    commit = hub.add(NAME, small_files())
    stager = await open_stager(open_origin(), revalidate_s=10.0)
    for raw in (f"@{commit}", "@main"):
        await stager.ensure(NAME + raw)
    asked = len(hub.requests)
    clock.now += 11
    await stager.ensure(f"{NAME}@{commit}")
    await turns(100)
    assert len(hub.requests) == asked
    await stager.ensure(f"{NAME}@main")
    await until(lambda: len(hub.requests) > asked)


async def test_a_mirror_may_be_named_by_the_environment(hub: Hub) -> None:
    """HF_ENDPOINT, as the client reads it: when the process starts. Where the settings name one, that counts."""
    hub.add(NAME, small_files())
    program = """
import asyncio, sys
from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.stager.supply.origins import build_origin
async def main():
    origin = build_origin(OriginSettings(type="huggingface", url=sys.argv[1]))
    print([file.path for file in (await origin.resolve(adapter_name("acme/sql"))).files])
    await origin.close()
asyncio.run(main())
"""
    for endpoint, url in ((hub.url, ""), ("http://127.0.0.1:1", hub.url)):
        environment = {**os.environ, "HF_ENDPOINT": endpoint}
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, url, stdout=subprocess.PIPE, env=environment)
        printed, _ = await process.communicate()
        assert printed.decode().strip() == str([CONFIG, WEIGHTS])
