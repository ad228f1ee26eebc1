"""Child processes of a test: waiting until they serve, and killing them."""

import asyncio
import contextlib

import aiohttp

from extproc.up.processes import Child

from .wait import PATIENCE_S


async def until_answered(*urls: str, child: Child | None = None) -> None:
    """Until each of them answers 200; `child`, if given, must not end meanwhile."""
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        for url in urls:
            while True:
                assert child is None or child.process.returncode is None, child.last_words()
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.05)


async def kill(*children: Child) -> None:
    """As a machine dies, one after the other. Those that have ended already are passed over."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()
