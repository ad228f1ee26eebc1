"""The file source: read as it is written by people, editors, tools and ConfigMaps."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.discovery import FileSourceSettings
from extproc.discovery import file as file_module
from extproc.discovery.file import FileSource
from extproc.discovery.source import Failed, Seen, Shown
from tests.fakes.gate import Gate

from .scripted import addresses, rows


class Reader:
    """What a source says, one by one."""

    def __init__(self, sets: AsyncGenerator[Seen, None]) -> None:
        self._sets = sets

    async def next(self) -> Seen:
        async with asyncio.timeout(10):
            return await anext(self._sets)

    async def failure(self) -> str:
        seen = await self.next()
        assert isinstance(seen, Failed), seen
        return seen.why


@asynccontextmanager
async def reading(path: Path, pool: str = "p") -> AsyncGenerator[Reader, None]:
    sets = FileSource(FileSourceSettings(type="file", path=str(path), poll_s=0.01), pool).sets()
    try:
        yield Reader(sets)
    finally:
        await sets.aclose()


def replace(path: Path, content: str) -> None:
    """As tools do that write atomically."""
    temporary = path.with_name(".new")
    temporary.write_text(content)
    temporary.rename(path)


@pytest.mark.parametrize(("suffix", "write"), [(".json", json.dumps), (".yaml", json.dumps), (".yaml", yaml.safe_dump), ("", yaml.safe_dump)])
async def test_yaml_and_json_are_read_alike(tmp_path: Path, suffix: str, write: Any) -> None:
    """Whatever the file is called, as long as a .json holds JSON."""
    path = tmp_path / f"fleet{suffix}"
    path.write_text(write(["10.0.0.1:8000", {"address": "[2001:DB8::1]:8000", "stager": "one:9102", "node": "one", "instance": "u", "leaving": True}]))
    async with reading(path) as reader:
        assert rows(await reader.next()) == [("10.0.0.1:8000", "", "", "", "", False), ("[2001:db8::1]:8000", "one", "one:9102", "u", "", True)]


async def test_a_mapping_has_a_list_per_pool(tmp_path: Path) -> None:
    """One file for all pools; an empty list says that there are none."""
    path = tmp_path / "fleet.yaml"
    path.write_text("llama: ['10.0.0.1:8000']\nllama2: ['10.0.0.2:8000']\nspare: []\n")
    for pool, expected in (("llama", ["10.0.0.1:8000"]), ("llama2", ["10.0.0.2:8000"]), ("spare", [])):
        async with reading(path, pool) as reader:
            assert addresses(await reader.next()) == expected


async def test_a_pool_that_a_mapping_does_not_name_is_a_failure(tmp_path: Path) -> None:
    """A misspelled name must not take a pool down."""
    path = tmp_path / "fleet.yaml"
    path.write_text("lama: ['10.0.0.1:8000']\n")
    async with reading(path, "llama") as reader:
        assert await reader.failure() == "has no list for pool 'llama', only for 'lama'; [] says that a pool has no endpoints"


async def test_a_file_that_is_replaced_is_read(tmp_path: Path) -> None:
    """Renamed over, again and again."""
    path = tmp_path / "fleet.yaml"
    replace(path, "['10.0.0.1:8000']")
    async with reading(path) as reader:
        assert addresses(await reader.next()) == ["10.0.0.1:8000"]
        for last in range(2, 5):
            replace(path, f"['10.0.0.{last}:8000']")
            assert addresses(await reader.next()) == [f"10.0.0.{last}:8000"]


async def test_a_config_map_that_is_switched_is_read(tmp_path: Path) -> None:
    """The kubelet writes a new directory and renames a link over `..data`; the file itself is a link through it and never changes."""
    for number in (1, 2):
        version = tmp_path / f"..version_{number}"
        version.mkdir()
        (version / "fleet.yaml").write_text(f"['10.0.0.{number}:8000']")
        os.utime(version / "fleet.yaml", (1000, 1000))  # the same time and size in both
    (tmp_path / "..data").symlink_to("..version_1")
    (tmp_path / "fleet.yaml").symlink_to("..data/fleet.yaml")
    async with reading(tmp_path / "fleet.yaml") as reader:
        assert addresses(await reader.next()) == ["10.0.0.1:8000"]
        (tmp_path / "..data_tmp").symlink_to("..version_2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        assert addresses(await reader.next()) == ["10.0.0.2:8000"]


async def test_a_half_written_file_is_told_of_by_its_line(tmp_path: Path) -> None:
    """And read when it is whole."""
    path = tmp_path / "fleet.yaml"
    path.write_text("['10.0.0.1:8000']")
    async with reading(path) as reader:
        await reader.next()
        path.write_text("- 10.0.0.1:8000\n- {address: 10.0.0.2:8000,\n")
        assert (await reader.failure()).startswith("is neither JSON nor YAML at line 3: ")
        path.write_text("- 10.0.0.1:8000\n- {address: 10.0.0.2:8000}\n")
        assert addresses(await reader.next()) == ["10.0.0.1:8000", "10.0.0.2:8000"]


async def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    """The first lines of a list are a list, too."""
    path = tmp_path / "fleet.yaml"
    path.write_text("- 10.0.0.1:8000\n")
    async with reading(path) as reader:
        await reader.next()
        following = asyncio.create_task(reader.next())
        with path.open("w") as file:
            for last in range(1, 6):
                file.write(f"- 10.0.0.{last}:8000\n")
                file.flush()
                await asyncio.sleep(0.02)
        assert len(addresses(await following)) == 5


async def test_a_file_that_never_rests_is_read_all_the_same(tmp_path: Path) -> None:
    """Something touches it all the time, or the file server's clock is ahead."""
    path = tmp_path / "fleet.yaml"
    path.write_text("- 10.0.0.1:8000\n")
    ahead = path.stat().st_mtime + 3600
    os.utime(path, (ahead, ahead))
    async with reading(path) as reader:
        assert addresses(await reader.next()) == ["10.0.0.1:8000"]


async def test_a_change_under_the_same_time_and_size_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems count in steps: a young file is read again until its time stamp could not hide a second write."""
    monkeypatch.setattr(file_module, "_signature", lambda state: (0, state.st_ino, state.st_size, state.st_mtime_ns // 10**9, 0))
    path = tmp_path / "fleet.yaml"
    path.write_text("['10.0.0.1:8000']")
    async with reading(path) as reader:
        await reader.next()
        path.write_text("['10.0.0.2:8000']")
        assert addresses(await reader.next()) == ["10.0.0.2:8000"]


async def test_a_file_that_vanishes_is_told_of_once_and_read_when_it_is_back(tmp_path: Path) -> None:
    """Though it says the same as before."""
    path = tmp_path / "fleet.yaml"
    path.write_text("['10.0.0.1:8000']")
    async with reading(path) as reader:
        await reader.next()
        path.unlink()
        assert await reader.failure() == "is not there"
        following = asyncio.create_task(reader.next())
        await asyncio.sleep(0.1)
        assert not following.done()
        path.write_text("['10.0.0.1:8000']")
        assert addresses(await following) == ["10.0.0.1:8000"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("f.yaml", b"", "has no list of endpoints, and no mapping of pools to such lists; [] says that there are none"),
        ("f.yaml", b"# nothing yet\n", "has no list of endpoints"),
        ("f.yaml", b"p:\n", "has no list of endpoints"),
        ("f.yaml", b"10.0.0.1:8000", "has no list of endpoints"),
        ("f.yaml", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("f.yaml", b"- !!python/object/apply:os.system [true]\n", "is neither JSON nor YAML at line 1: could not determine a constructor"),
        ("f.json", b'[\n"10.0.0.1:8000",\n', "is not JSON at line 3: "),
        ("f.json", b"[" * 100_000, "is not JSON: it is nested too deep"),
        ("f.yaml", b"- {adress: 10.0.0.1:8000}\n", "none of its 1 entries can be read: entry 1 has 'adress', which is none of"),
    ],
)
async def test_a_file_that_says_nothing_of_the_set_is_a_failure(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    """Each with what is wrong, in a line."""
    (tmp_path / name).write_bytes(content)
    async with reading(tmp_path / name) as reader:
        why = await reader.failure()
    assert why.startswith(complaint)
    assert len(why) <= 300


async def test_what_is_no_file_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO would hold its reader for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * 100)
    monkeypatch.setattr(file_module, "MAX_FILE_BYTES", 99)
    for name, complaint in (
        ("fifo", "is no regular file"),
        (".", "is no regular file"),
        ("none", "is not there"),
        ("large", "has 100 bytes; 99 is the limit"),
        ("large/x", "cannot be read: Not a directory"),
    ):
        async with reading(tmp_path / name) as reader:
            assert await reader.failure() == complaint


async def test_a_file_system_that_hangs_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look that hangs is not repeated beside itself, and what it brings in the end counts."""
    monkeypatch.setattr(file_module, "HANG_S", 0.05)
    (tmp_path / "fleet.yaml").write_text("['10.0.0.1:8000']")
    source = FileSource(FileSourceSettings(type="file", path=str(tmp_path / "fleet.yaml"), poll_s=0.01), "p")
    gate = Gate(monkeypatch, source, "_look")
    async with aclosing(source.sets()) as sets:
        reader = Reader(sets)
        assert await reader.failure() == "has not been read for 0.05 s: its file system hangs"
        gate.open()
        assert addresses(await reader.next()) == ["10.0.0.1:8000"]


async def test_a_bad_entry_is_named_and_left_out(tmp_path: Path) -> None:
    """By its number in the list."""
    path = tmp_path / "fleet.yaml"
    path.write_text("- 10.0.0.1:8000\n- {address: 10.0.0.2:8000, stager: nowhere}\n- 10.0.0.3:8000\n- 10.0.0.3:08000\n")
    async with reading(path) as reader:
        seen = await reader.next()
    assert addresses(seen) == ["10.0.0.1:8000", "10.0.0.3:8000"]
    assert isinstance(seen, Shown)
    assert seen.left_out == ("entry 2 stager 'nowhere' is not host:port",)


async def test_ten_thousand_endpoints_are_read(tmp_path: Path) -> None:
    """All of them, once."""
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps([{"address": f"10.0.{n // 250}.{n % 250 + 1}:8000", "instance": f"uid-{n}"} for n in range(10_000)]))
    async with reading(path) as reader:
        assert len(addresses(await reader.next())) == 10_000


async def test_a_file_that_says_what_it_said_before_its_file_system_hung_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the source would count as failed until somebody changes the file."""
    monkeypatch.setattr(file_module, "HANG_S", 0.05)
    path = tmp_path / "fleet.yaml"
    path.write_text("['10.0.0.1:8000']")
    os.utime(path, (1000, 1000))
    async with reading(path) as reader:
        assert addresses(await reader.next()) == ["10.0.0.1:8000"]
        gate = Gate(monkeypatch, file_module, "_signature")
        assert await reader.failure() == "has not been read for 0.05 s: its file system hangs"
        gate.open()
        assert addresses(await reader.next()) == ["10.0.0.1:8000"]


async def test_a_source_that_is_begun_again_says_what_the_file_has(tmp_path: Path) -> None:
    """As after an error of what takes its sets."""
    path = tmp_path / "fleet.yaml"
    path.write_text("['10.0.0.1:8000']")
    os.utime(path, (1000, 1000))
    source = FileSource(FileSourceSettings(type="file", path=str(path), poll_s=0.01), "p")
    for _ in range(2):
        async with aclosing(source.sets()) as sets:
            assert addresses(await Reader(sets).next()) == ["10.0.0.1:8000"]


@pytest.mark.parametrize("text", ["!!int ''", "!!bool x", "!!timestamp foo", "!!float ''"])
async def test_a_tag_of_yaml_with_a_value_of_another_kind_is_the_files_fault(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(f"- {text}")
    async with reading(path) as reader:
        assert (await reader.failure()).startswith("is neither JSON nor YAML")


async def test_more_yaml_than_can_be_read_in_time_is_refused(tmp_path: Path) -> None:
    """As JSON it may have sixteen times as much."""
    path = tmp_path / "fleet.yaml"
    path.write_text("- \n" * (file_module.MAX_YAML_BYTES // 3 + 1))
    async with reading(path) as reader:
        assert "as YAML 2097152 is the limit" in await reader.failure()
