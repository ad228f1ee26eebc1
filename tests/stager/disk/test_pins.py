"""Pins outlive restarts, and a list that cannot be read is neither forgotten nor overwritten."""

import logging
from pathlib import Path

import pytest

from extproc.errors import DiskFailed, StartError
from extproc.stager.disk.pins import PINS_FILE
from tests.fakes.adapters import small_files
from tests.fakes.gate import Gate
from tests.fakes.origin import FakeOrigin

from ..conftest import OpenStager

NAME = "acme/sql"


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    origin.add(NAME, small_files())
    return origin


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"\xff", b'{"acme/sql": 1}', b'{"../x": ""}'])
async def test_a_damaged_list_is_kept_and_told(
    open_stager: OpenStager, origin: FakeOrigin, node: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    """The next pin writes a new list, and the old one is there for whoever repairs it."""
    node.mkdir()
    (node / PINS_FILE).write_bytes(damaged)
    with caplog.at_level(logging.ERROR):
        stager = await open_stager(origin)
    assert not stager.node.holdings.pins
    (told,) = [record.getMessage() for record in caplog.records]
    (aside,) = node.glob(f"{PINS_FILE}.damaged-*")
    assert aside.name in told
    await stager.pin(NAME)
    assert aside.read_bytes() == damaged
    await stager.close()
    assert set((await open_stager(origin)).node.holdings.pins) == {NAME}


async def test_a_list_that_cannot_be_read_stops_the_start(open_stager: OpenStager, node: Path) -> None:
    """Without it, what operators hold would be evicted."""
    (node / PINS_FILE).mkdir(parents=True)
    with pytest.raises(StartError, match=r"\.pins\.json cannot be read"):
        await open_stager()


async def test_an_unpin_that_cannot_be_written_is_none(open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory is what the next start finds."""
    stager = await open_stager(origin)
    await stager.pin(NAME)
    Gate(monkeypatch, stager.node.store, "write_json", fails=DiskFailed("once")).open()
    with pytest.raises(DiskFailed):
        await stager.unpin(NAME)
    assert set(stager.node.holdings.pins) == {NAME}
    await stager.unpin(NAME)
    assert not stager.node.holdings.pins
