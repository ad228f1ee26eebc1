"""The one task in progress that all callers of a key wait for, owned by none of them.

The order of events this guards against: A calls and starts the fetch; B calls and waits for A's; A's client hangs up; the fetch is cancelled
with A; B gets A's CancelledError and the bytes are lost. So the task belongs to the flight, and callers wait shielded.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Hashable, Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def to_the_end(step: Coroutine[Any, Any, T]) -> T:
    """Await a step that must not be left half done. Who is cancelled meanwhile waits for its end, and is cancelled if it went well.

    A thread cannot be stopped: what it does to the disk goes on when nobody waits for it any more.
    """
    task = asyncio.create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        task.result()  # its own failure says more
        raise


class SingleFlight(Generic[K, T]):
    """Flights by key. A key whose flight has landed, well or not, may fly again. `on_change` hears of each: 1 when it starts, -1 when it has landed."""

    def __init__(self, on_change: Callable[[K, int], None] | None = None) -> None:
        self._on_change = on_change
        self._tasks: dict[K, asyncio.Task[T]] = {}
        self._waiters: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: K) -> bool:
        return key in self._tasks

    def __iter__(self) -> Iterator[K]:
        return iter(self._tasks)

    def waiters(self, key: K) -> int:
        """How many callers wait for `key` now."""
        return self._waiters.get(key, 0)

    def start(self, key: K, fly: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """The task in flight for `key`; starts `fly()` if there is none."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(fly(), name=f"flight {key}")
            task.add_done_callback(lambda done: self._landed(key, done))
            if self._on_change is not None:
                self._on_change(key, 1)
        return task

    async def join(self, key: K, fly: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for the flight of `key`. Cancelling the wait leaves the flight alone; its error is raised in every waiter."""
        task = self.enter(key, fly)
        try:
            return await asyncio.shield(task)
        finally:
            self.leave(key)

    def enter(self, key: K, fly: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """The flight of `key`, which counts its caller as a waiter until `leave`: for who waits for several at once. Cancelling it cancels it for all."""
        task = self.start(key, fly)
        self._waiters[key] = self._waiters.get(key, 0) + 1
        return task

    def leave(self, key: K) -> None:
        """What follows each `enter`, however the wait ended."""
        self._waiters[key] -= 1
        if not self._waiters[key]:
            del self._waiters[key]

    async def close(self) -> None:
        """Cancel what is in flight and wait until it has cleaned up."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _landed(self, key: K, task: asyncio.Task[T]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
            if self._on_change is not None:
                self._on_change(key, -1)
        if not task.cancelled():
            task.exception()  # seen: with no waiter left, asyncio would log it as never retrieved
