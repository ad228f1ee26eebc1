"""What the origins' tests share."""

from pathlib import Path

import pytest

from extproc.stager.origins import Listing, Origin
from tests.fakes.adapters import Files


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a file is fetched to."""
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


async def fetch_all(origin: Origin, listing: Listing, directory: Path) -> Files:
    """Every file of a listing, as it arrived."""
    arrived: Files = {}
    for file in listing.files:
        await origin.fetch(listing, file, directory / file.path)
        arrived[file.path] = (directory / file.path).read_bytes()
    return arrived
