"""Settings that changed are applied to what is on the disk already, and cost nothing where they did not change."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from extproc.config.stager import EngineSettings
from extproc.errors import InvalidAdapter
from extproc.pb import stager_pb2 as pb
from extproc.stager import stager as stager_module
from extproc.stager.adapter import check as check_module
from extproc.stager.adapter.check import Checked
from extproc.stager.adapter.rules import Rules
from extproc.stager.api.replies import models_reply
from extproc.stager.stager import Stager
from extproc.stager.threads import Steps
from extproc.stager.work import kept as kept_module
from extproc.stager.work.kept import RULES_FILE
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import CONFIG, HIDDEN, PICKLE, WEIGHTS, Files, sha256, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.origin import FakeOrigin, origin_of
from tests.fakes.wait import Clock, until

from ..conftest import OpenStager

NAME, OTHER = "acme/sql", "acme/other"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 6832600\n"


@pytest.fixture
def origin() -> FakeOrigin:
    return origin_of(NAME, OTHER)


@pytest.fixture(autouse=True)
def quick_housekeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stager_module, "HOUSEKEEPING_S", 0.01)


def engine_with(**settings: Any) -> EngineSettings:
    return EngineSettings(**{"url": "", "base_model": BASE_MODEL, "max_lora_rank": 8, "quiet_s": 0.0, **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": engine_with(base_model="another/base")}, "base model"),
        ({"engine": engine_with(max_lora_rank=1)}, "rank"),
        ({"digests": {NAME: "0" * 64, OTHER: "0" * 64}}, "SHA-256"),
        ({"max_adapter_bytes": 1000}, "max_adapter_bytes"),
    ],
    ids=["base_model", "max_lora_rank", "digests", "max_adapter_bytes"],
)
async def test_what_new_settings_refuse_is_not_served_after_a_restart(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, settings: dict[str, Any], says: str
) -> None:
    """Its name is gone at once, its files as soon as nobody reads them; whoever asks hears what is wrong."""
    stager = await open_stager(origin)
    for name in (NAME, OTHER):
        await stager.ensure(name)
    await stager.close()
    again = await open_stager(origin, **settings)
    with pytest.raises(InvalidAdapter, match=says):
        await again.ensure(NAME)
    await until(lambda: not set(again.node.holdings))
    assert not [path for path in node.rglob("*") if path.is_symlink()]
    assert not list((node / ".store").iterdir())
    assert not again.node.holdings.index.used_bytes


async def test_a_stated_digest_that_is_right_changes_nothing(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Of the two only the other is refused."""
    stager = await open_stager(origin)
    for name in (NAME, OTHER):
        await stager.ensure(name)
    await stager.close()
    again = await open_stager(origin, digests={NAME: sha256(small_files()[WEIGHTS]), OTHER: "0" * 64})
    assert not (await again.ensure(NAME)).staged
    await until(lambda: set(again.node.holdings) == {NAME})


async def test_with_the_same_settings_nothing_is_checked_again(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file says by which rules all of them were checked; where it is gone or damaged, they are checked once."""
    checked: list[Path] = []
    check = check_module.check

    def note(directory: Path, rules: Rules) -> Steps[Checked]:
        checked.append(directory)
        return check(directory, rules)

    monkeypatch.setattr(kept_module, "check", note)
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.close()
    await (await open_stager(origin)).close()
    assert not checked
    (node / RULES_FILE).write_bytes(b"{")
    await (await open_stager(origin)).close()
    assert len(checked) == 1
    await (await open_stager(origin)).close()
    assert len(checked) == 1


async def test_while_something_refused_is_left_the_next_start_checks_again(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Else a second start would serve it."""
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    await stager.close()
    for _ in range(2):
        again = await open_stager(origin, engine=engine_with(max_lora_rank=1), claim_wait_s=100.0)
        with pytest.raises(InvalidAdapter, match="rank"):
            await again.ensure(NAME)
        assert list((node / ".store").iterdir())
        await again.close()


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node) as engine:
        yield engine


async def test_what_others_put_here_is_held_to_stated_digests(open_stager: OpenStager, node: Path, clock: Clock) -> None:
    """As what comes from an origin is."""
    for seed, name in enumerate(("theirs", "right")):
        (node / name).mkdir(parents=True)
        for path, data in small_files(seed=seed).items():
            (node / name / path).write_bytes(data)
    digests = {"theirs": "0" * 64, "right": sha256(small_files(seed=1)[WEIGHTS])}
    stager = await open_stager(digests=digests, scan_s=1e-9)
    assert set(stager.node.holdings) == {"right"}
    with pytest.raises(InvalidAdapter, match="SHA-256"):
        await stager.ensure("theirs")


@pytest.mark.parametrize("change", ["base_names", "allow_pickle"])
async def test_what_was_permitted_once_is_not_served_when_it_is_no_more(open_stager: OpenStager, origin: FakeOrigin, change: str) -> None:
    """Another name of the base model, and pickled weights."""
    pickled = {CONFIG: small_files()[CONFIG], PICKLE: b"\x80\x04."}
    permitted: dict[str, dict[str, Any]] = {"base_names": {"engine": engine_with(base_names=("other/*",))}, "allow_pickle": {"allow_pickle": True}}
    origin.add(NAME, small_files(base_model="other/base") if change == "base_names" else pickled)
    stager = await open_stager(origin, **permitted[change])
    await stager.ensure(NAME)
    await stager.close()
    again = await open_stager(origin)
    with pytest.raises(InvalidAdapter, match="base model" if change == "base_names" else "pickled weights"):
        await again.ensure(NAME)
    await until(lambda: not set(again.node.holdings))


@pytest.mark.parametrize(
    ("settings", "files", "says"),
    [
        ({"max_adapter_bytes": 1000}, small_files(), "max_adapter_bytes"),
        ({"max_file_bytes": 1000}, small_files(), "max_file_bytes"),
        ({}, {**small_files(), WEIGHTS: small_files()[WEIGHTS][:-2] + b"\xc0\x7f"}, "infinity or a NaN"),
        ({}, {CONFIG: small_files()[CONFIG], PICKLE: b"\x80\x04."}, "pickled weights"),
        ({}, {**small_files(), WEIGHTS: LFS_POINTER}, "Git LFS pointer"),
        ({}, {**small_files(), CONFIG: LFS_POINTER}, "Git LFS pointer"),
    ],
    ids=["size", "size of a file", "NaN", "pickle", "pointer as weights", "pointer as configuration"],
)
async def test_what_others_put_here_is_checked_as_what_is_fetched(
    open_stager: OpenStager, node: Path, settings: dict[str, Any], files: Files, says: str
) -> None:
    """Whoever asks for it hears what is wrong."""
    (node / "theirs").mkdir(parents=True)
    for path, data in files.items():
        (node / "theirs" / path).write_bytes(data)
    stager = await open_stager(scan_s=1e-9, **settings)
    with pytest.raises(InvalidAdapter, match=says):
        await stager.ensure("theirs")
    assert not set(stager.node.holdings)


async def test_what_others_put_here_is_held_to_the_base_model_s_width(open_stager: OpenStager, node: Path, tmp_path: Path) -> None:
    """Which the settings tell before its engine does."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 2 * HIDDEN}))
    (node / "theirs").mkdir(parents=True)
    for path, data in small_files().items():
        (node / "theirs" / path).write_bytes(data)
    stager = await open_stager(scan_s=1e-9, engine=engine_with(base_config=str(tmp_path / "config.json")))
    with pytest.raises(InvalidAdapter, match=f"is {HIDDEN} wide"):
        await stager.ensure("theirs")


async def test_a_configuration_of_megabytes_is_not_read_whole(open_stager: OpenStager, node: Path) -> None:
    """Others may put anything here: a sparse file of a gigabyte costs the limit and one byte."""
    (node / "theirs").mkdir(parents=True)
    for path, data in small_files().items():
        (node / "theirs" / path).write_bytes(data)
    os.truncate(node / "theirs" / "adapter_config.json", 2**30)
    stager = await open_stager(scan_s=1e-9)
    with pytest.raises(InvalidAdapter, match="over 1048576 bytes"):
        await stager.ensure("theirs")


async def test_an_engine_that_has_it_loaded_is_asked_first(open_stager: OpenStager, origin: FakeOrigin, node: Path, engine: RunningEngine) -> None:
    """Order of events: loaded, the stager restarted with other settings; the files stay until the engine has let them go."""
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(NAME)
    await engine.ask(NAME)
    await stager.close()
    async with engine.adapters.use(NAME):
        again = await open_stager(origin, engine=engine_with(url=engine.url, max_lora_rank=1))
        await again._kept.remove_refused()
        assert list((node / ".store").iterdir())
        with pytest.raises(InvalidAdapter, match="rank"):
            await again.ensure(NAME)
        assert not (await models(again))
    await until(lambda: not set(again.node.holdings))
    assert NAME not in engine.adapters.registry
    assert engine.deaths == 0


async def models(stager: Stager) -> list[str]:
    """What the node says that it can answer for."""
    return [adapter.id for adapter in pb.ModelsReply.FromString(await models_reply(stager)).adapters]
