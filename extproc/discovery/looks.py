"""Looks at a place that may hang, each in a thread: a file server or a name server that says nothing must not hold up what else the process does in threads,
nor the end of the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")


class Looks(Generic[T]):
    """The same `look` again and again, one at a time, each in a thread that ends with the process."""

    def __init__(self, look: Callable[[], T], name: str) -> None:
        self._look = look
        self._name = name
        self._running: asyncio.Future[T] | None = None

    async def next(self, timeout_s: float | None = None) -> T:
        """What the look brings. Raises TimeoutError if it takes longer: it goes on, since a thread cannot be stopped, and the next call waits for its end."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._run, args=(self._running,), name=self._name, daemon=True).start()
        done, _ = await asyncio.wait({self._running}, timeout=timeout_s)
        if not done:
            raise TimeoutError
        running, self._running = self._running, None
        return running.result()

    def _run(self, running: "asyncio.Future[T]") -> None:
        tell: Callable[[], None]
        try:
            tell = partial(running.set_result, self._look())
        except Exception as error:
            tell = partial(running.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            running.get_loop().call_soon_threadsafe(tell)
