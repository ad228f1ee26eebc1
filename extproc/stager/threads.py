"""Threads for one kind of work, so that other kinds, which may hang, cannot take them all."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """At most `count` threads, which start when there is work for them."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do blocking work. Cancelling ends the wait, not the work. As asyncio.to_thread, with these threads."""
        call = partial(contextvars.copy_context().run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Take no more work, and wait for none."""
        self._pool.shutdown(wait=False, cancel_futures=True)


async def in_thread(threads: Threads | None, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do blocking work in `threads`; None: in those of the event loop, which name look-ups and everything else share."""
    return await (asyncio.to_thread(work, *args, **kwargs) if threads is None else threads.run(work, *args, **kwargs))
