"""The origin of a case: adapters that exist in memory alone, and which weights ever lay under which name."""

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from aiohttp import web

from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import WEIGHTS, small_files
from tests.fakes.faulty import FaultyServer

BASE_WEIGHTS = "base"  # what the simulated engine says of an answer without an adapter
FOR_EVER = 10**9  # requests


class Origin(FaultyServer):
    """A web server with small adapters. `delay_s` holds back every file before its first byte."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.delay_s = 0.0
        self._versions: dict[str, dict[str, int]] = {BASE_MODEL: {BASE_WEIGHTS: 0}}
        self._seeds = itertools.count(1)

    async def put(self, name: str, files: Mapping[str, bytes] | None = None) -> str:
        """Put new content under `name`, in place of what is there; the digest of its weights."""
        if files is None:
            files = await asyncio.to_thread(small_files, seed=next(self._seeds))
        digest = hashlib.sha256(files[WEIGHTS]).hexdigest()
        versions = self._versions.setdefault(name, {})
        versions[digest] = len(versions)
        self.add(name, files)
        return digest

    def version(self, name: str, weights: str) -> int | None:
        """Whether these weights ever lay under `name`: as which version, from 0."""
        return self._versions.get(name, {}).get(weights)

    def newest(self, name: str) -> int:
        return len(self._versions[name]) - 1

    @contextlib.contextmanager
    def answering(self, path: str = "", methods: tuple[str, ...] = ("HEAD", "GET"), **what: Any) -> Iterator[None]:
        """Misbehave at every request for what ends with `path`, until the block ends; `what` are the fields of Fault."""
        faults = [self.fault(path, method=method, **{"times": FOR_EVER, **what}) for method in methods]
        try:
            yield
        finally:
            for fault in faults:
                self.faults.remove(fault)

    async def _answer(self, request: web.Request, fault: Any) -> web.StreamResponse:
        if self.delay_s and request.method == "GET":
            await asyncio.sleep(self.delay_s)
        return await super()._answer(request, fault)


@contextlib.asynccontextmanager
async def running_origin(host: str) -> AsyncIterator[Origin]:
    """An origin on a free port of `host`."""
    origin = Origin(host)
    await origin.start()
    try:
        yield origin
    finally:
        await origin.stop()
