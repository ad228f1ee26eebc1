"""Looks at a place that may hang, each in a thread: a file server or a name server that says nothing must not hold up what else the process does in threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Looks(Generic[T]):
    """One thread of a source's own, which does the same `look` again and again."""

    def __init__(self, look: Callable[[], T], name: str) -> None:
        self._look = look
        self._thread = ThreadPoolExecutor(1, name)
        self._running: asyncio.Future[T] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def next(self, timeout_s: float | None = None) -> T:
        """What the look brings. Raises TimeoutError if it takes longer: it goes on, since a thread cannot be stopped, and the next call waits for its end."""
        if self._running is None:
            self._running = asyncio.get_running_loop().run_in_executor(self._thread, self._look)
        done, _ = await asyncio.wait({self._running}, timeout=timeout_s)
        if not done:
            raise TimeoutError
        running, self._running = self._running, None
        return running.result()
