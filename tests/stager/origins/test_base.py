"""What all origins share: which files are wanted, and the loop that writes and hashes."""

import array
import asyncio
import fcntl
import os
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.config import OriginSettings
from extproc.errors import OriginFailed
from extproc.stager.origins import build_origin
from extproc.stager.origins.base import WRITE_BYTES, wanted, write_stream
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, sha256
from tests.fakes.wait import turns, until


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ([CONFIG, WEIGHTS, PICKLE, "README.md"], [CONFIG, WEIGHTS]),
        ([PICKLE, CONFIG], [CONFIG, PICKLE]),
        ([CONFIG], [CONFIG]),
        ([WEIGHTS], [WEIGHTS]),
        (["sub/" + CONFIG], []),
    ],
)
def test_only_what_an_engine_reads_is_wanted(there: list[str], chosen: list[str]) -> None:
    """The configuration and one file of weights, safetensors before pickle."""
    assert wanted(there) == chosen


@pytest.mark.parametrize("kind", ["file", "http", "s3", "huggingface"])
async def test_every_type_of_the_settings_builds_its_origin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label is the type: metrics and settings use one word. Building asks nothing of the network."""
    settings = OriginSettings.model_validate({"type": kind, "path": "/nowhere", "url": "http://127.0.0.1:1", "bucket": "b"})
    origin = build_origin(settings)
    assert origin.label == kind
    await origin.close()


@pytest.mark.parametrize("size", [0, 1, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1, 2 * WRITE_BYTES + 17])
async def test_a_stream_is_written_and_hashed(tmp_path: Path, size: int) -> None:
    """In whatever pieces it comes, on either side of the size that is written at a time."""
    data = os.urandom(size)
    pieces = [data[at : at + 999_983] for at in range(0, size, 999_983)]
    assert await write_stream(stream(*pieces), tmp_path / "file", size) == sha256(data)
    assert (tmp_path / "file").read_bytes() == data


async def test_a_stream_replaces_what_an_earlier_attempt_wrote(tmp_path: Path) -> None:
    """The longer remains of the first attempt do not stay at the end."""
    with pytest.raises(OriginFailed):
        await write_stream(stream(b"a" * 10), tmp_path / "file", 20)
    await write_stream(stream(b"b"), tmp_path / "file", 1)
    assert (tmp_path / "file").read_bytes() == b"b"


async def test_a_short_stream_is_a_failure_of_the_origin(tmp_path: Path) -> None:
    """It may be whole the next time."""
    with pytest.raises(OriginFailed, match="3 of 4 bytes") as raised:
        await write_stream(stream(b"abc"), tmp_path / "file", 4)
    assert raised.value.retryable


async def test_a_long_stream_is_cut_off(tmp_path: Path) -> None:
    """An origin that sends without end fills no disk."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    with pytest.raises(OriginFailed, match="over 2500 bytes"):
        await write_stream(endless(), tmp_path / "file", 2500)
    assert taken == 3


async def test_a_cancelled_stream_closes_its_file_after_the_last_write(tmp_path: Path) -> None:
    """The order of events this guards against: a thread is about to write; the flight is cancelled and closes the descriptor; another flight
    opens a file and gets the same number; the thread writes into that. So the close waits for the thread. A pipe that nobody reads holds it.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(WRITE_BYTES)

    writing = asyncio.create_task(write_stream(chunks(), pipe, WRITE_BYTES))
    await until(lambda: _waiting_bytes(reader))
    writing.cancel()
    await turns(100)
    still_open = len(os.listdir("/proc/self/fd")) > opened  # noqa: PTH208
    drained = 0
    while drained < WRITE_BYTES:
        try:
            drained += len(os.read(reader, 2**20))
        except BlockingIOError:
            await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await writing
    os.close(reader)
    assert still_open


def _waiting_bytes(descriptor: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]
