"""Threads for one kind of work, so that other kinds, which may hang, cannot take them all."""

import asyncio
import contextvars
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

Steps = Generator[None, None, T]  # work that yields between pieces of some milliseconds, and returns its result


def through(steps: Steps[T]) -> T:
    """Do all of it here."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Threads:
    """At most `count` threads, which start when there is work for them."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do blocking work. Cancelling ends the wait, not the work. As asyncio.to_thread, with these threads."""
        call = partial(contextvars.copy_context().run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def walk(self, steps: Steps[T]) -> T:
        """Do work step by step: others' work and the event loop get their turns between two of them, and whoever cancels ends the work after one."""
        while True:
            is_over, result = await self.run(_step, steps)
            if is_over:
                return result

    def close(self) -> None:
        """Take no more work, and wait for none."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _step(steps: Steps[T]) -> tuple[bool, T]:
    """One step; whether it was the last, with the result."""
    try:
        next(steps)
    except StopIteration as end:
        return True, end.value
    return False, cast("T", None)
