"""Threads that a test's own event loop has, so that it decides when they work."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from extproc.stager.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")


class LoopThreads(Threads):
    """Those of the event loop, which ends them."""

    def __init__(self) -> None:
        super().__init__(1, "never started")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(work, *args, **kwargs)
