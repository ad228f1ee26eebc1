"""What the origins' tests share."""

from pathlib import Path

import pytest

from extproc.core.artifact import File
from extproc.stager.supply.download import Download
from extproc.stager.supply.listing import Listing, RemoteFile
from extproc.stager.supply.origins import Origin
from tests.fakes.adapters import Files
from tests.fakes.threads import LoopThreads


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a file is fetched to."""
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


async def fetch(origin: Origin, listing: Listing, file: RemoteFile, target: Path) -> File:
    """One attempt at one file of a listing."""
    download = Download(file, target, disk=LoopThreads())
    try:
        await origin.fetch(listing, file, download)
        return await download.finish()
    finally:
        download.close()


async def fetch_all(origin: Origin, listing: Listing, directory: Path) -> Files:
    """Every file of a listing, as it arrived."""
    arrived: Files = {}
    for file in listing.files:
        await fetch(origin, listing, file, directory / file.path)
        arrived[file.path] = (directory / file.path).read_bytes()
    return arrived
