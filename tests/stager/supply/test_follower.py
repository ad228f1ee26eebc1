"""The search beside a transfer: it goes as far as the bytes have come, begins again with them, and ends with the transfer."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.stager.adapter.finite import Scan, scan_ahead
from extproc.stager.adapter.safetensors import read_header
from extproc.stager.supply.download import WRITE_BYTES, Download
from extproc.stager.supply.follower import LEAST_BYTES, Follower
from extproc.stager.supply.listing import RemoteFile
from extproc.stager.threads import Threads, through
from tests.fakes.adapters import WEIGHTS, safetensors
from tests.fakes.wait import until

BYTES = 3 * LEAST_BYTES
GOOD = safetensors({"x": {"dtype": "BF16", "shape": [BYTES // 2], "data_offsets": [0, BYTES]}}, b"\x80\x3f" * (BYTES // 2))
BAD = GOOD[: BYTES // 2] + b"\xff" * 64 + GOOD[BYTES // 2 + 64 :]


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    threads = Threads(2, "test")
    yield threads
    threads.close()


@pytest.fixture
async def download(tmp_path: Path, threads: Threads) -> AsyncIterator[Download]:
    download = Download(RemoteFile(WEIGHTS, len(GOOD)), tmp_path / WEIGHTS, disk=threads)
    yield download
    download.close()


@pytest.fixture
async def follower(tmp_path: Path, threads: Threads, download: Download) -> AsyncIterator[Follower]:
    async with Follower(tmp_path / WEIGHTS, threads) as follower:
        download.follow(follower)
        yield follower


def new_scan() -> Scan:
    scan = scan_ahead(through(read_header(io.BytesIO(GOOD), len(GOOD))))
    assert scan is not None
    return scan


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), WRITE_BYTES):
        yield data[at : at + WRITE_BYTES]


async def test_weights_are_looked_through_before_the_last_of_them_comes(download: Download, follower: Follower) -> None:
    """The origin sends its last bytes only when all that came before, but for less than a step, was looked through."""
    scan = new_scan()

    async def slow() -> AsyncIterator[bytes]:
        async for piece in pieces(GOOD[:-100]):
            yield piece
        await until(lambda: download.received - scan.reached < LEAST_BYTES)
        yield GOOD[-100:]

    follower.begin(scan)
    await download.write(slow())
    await download.finish()
    assert await follower.end() is scan
    assert scan.reached > len(GOOD) - LEAST_BYTES - WRITE_BYTES


async def test_what_is_found_is_left_to_the_check(download: Download, follower: Follower) -> None:
    """The transfer goes on to its end, where a damaged one is told apart from a bad adapter."""
    follower.begin(new_scan())
    await download.write(pieces(BAD))
    assert (await download.finish()).size == len(BAD)
    assert await follower.end() is None


async def test_a_file_that_cannot_be_read_is_left_to_the_check(tmp_path: Path, download: Download, follower: Follower) -> None:
    """The head start is lost, and nothing else."""
    await download.write(pieces(GOOD))
    (tmp_path / WEIGHTS).unlink()
    follower.begin(new_scan())
    follower.arrived(len(GOOD))
    assert await follower.end() is None


async def test_a_transfer_that_begins_again_is_followed_from_its_start(download: Download, follower: Follower) -> None:
    """What came before says nothing of what comes now."""
    scan = new_scan()
    follower.begin(scan)
    await download.write(pieces(GOOD))
    assert await follower.end() is scan
    await download.restart()
    await download.write(pieces(BAD))
    assert await follower.end() is None


async def test_nothing_is_searched_before_the_header_was_judged(download: Download, follower: Follower) -> None:
    """Nor where nothing is to be searched for."""
    await download.write(pieces(GOOD))
    assert await follower.end() is None
    follower.begin(None)
    follower.arrived(len(GOOD))
    assert await follower.end() is None


async def test_a_transfer_that_ends_early_ends_the_search(tmp_path: Path, threads: Threads) -> None:
    """No task of it is left when the staging directory goes."""
    (tmp_path / WEIGHTS).write_bytes(GOOD)
    before = asyncio.all_tasks()
    async with Follower(tmp_path / WEIGHTS, threads) as follower:
        follower.begin(new_scan())
        follower.arrived(len(GOOD))
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before
