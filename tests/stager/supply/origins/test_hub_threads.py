"""The hub's client blocks: whose threads it holds, and to whom it shows its token."""

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.stager.supply.download import Download
from extproc.stager.supply.listing import Listing, RemoteFile
from extproc.stager.supply.origins.huggingface import HuggingFaceOrigin
from tests.fakes.adapters import WEIGHTS
from tests.fakes.threads import LoopThreads

NAME = adapter_name("acme/sql")
LISTING = Listing(NAME, "a" * 40, (RemoteFile(WEIGHTS, 10, key=WEIGHTS),))


class Hanging(HuggingFaceOrigin):
    """Every file is in Xet storage, and no transfer ends before `go_on`."""

    def __init__(self, settings: OriginSettings) -> None:
        super().__init__(settings)
        self.go_on = threading.Event()
        self.running = 0
        self.location = "http://hub.test/x"

    def _metadata(self, *_: Any) -> Any:
        return SimpleNamespace(xet_file_data=object(), location=self.location)

    def _download_xet(self, _listing: Listing, _file: RemoteFile, work: Path, _abandoned: threading.Event) -> Path:
        self.running += 1
        self.go_on.wait(10)
        work.mkdir(exist_ok=True)
        (work / "file").write_bytes(b"0123456789")
        return work / "file"


async def test_transfers_that_hang_hold_no_other_thread(tmp_path: Path) -> None:
    """Any number of them, also of flights that were given up: calls of the hub, and whatever else uses the loop's threads, go on."""
    origin = Hanging(OriginSettings(type="huggingface", url="http://hub.test", max_fetches=2))
    downloads = [Download(LISTING.files[0], tmp_path / str(number), disk=LoopThreads()) for number in range(40)]
    fetches = [asyncio.create_task(origin.fetch(LISTING, LISTING.files[0], download)) for download in downloads]
    async with asyncio.timeout(10):
        while origin.running < 2:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(int)
        await origin._calls.run(int)
        assert origin.running == 2
        for task in fetches[1:]:
            task.cancel()
        await asyncio.gather(*fetches[1:], return_exceptions=True)
        origin.go_on.set()
        await fetches[0]
    for download in downloads:
        download.close()
    await origin.close()


@pytest.mark.parametrize(
    ("location", "is_shown"),
    [
        ("https://hub.test/x", True),
        ("https://hub.test:443/x", True),
        ("http://hub.test/x", False),
        ("https://hub.test:8443/x", False),
        ("https://cdn.test/x", False),
    ],
)
async def test_the_token_goes_to_the_hub_s_own_origin_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, is_shown: bool) -> None:
    """Scheme, host and port: a redirect to the same host in clear text would have it read on the way."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    origin = Hanging(OriginSettings(type="huggingface", url="https://hub.test"))
    origin.location = location
    shown: list[dict[str, str]] = []

    async def look(_url: str, _file: RemoteFile, _download: Download, headers: dict[str, str]) -> None:
        shown.append(headers)

    monkeypatch.setattr(origin._web, "show_beginning", look)
    origin.go_on.set()
    download = Download(LISTING.files[0], tmp_path / "file", disk=LoopThreads())
    await origin.fetch(LISTING, LISTING.files[0], download)
    download.close()
    assert shown == [{"authorization": "Bearer hf_secret"} if is_shown else {}]
    await origin.close()
