"""Wait for a condition that another task or thread brings about, without sleeping for a time."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Self

PATIENCE_S = 60.0  # only a test that would hang reaches it
THREAD_S = 0.05  # real seconds after which a loop looks whether its threads are back, should nobody wake it


async def until(condition: Callable[[], object]) -> None:
    """Give up the turn until `condition()` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # the condition belongs to code that sets no event
            await asyncio.sleep(0)


async def turns(count: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


class Turns:
    """How often others have had their turn: `with Turns() as turns: ...; turns.count`."""

    count = 0

    def __enter__(self) -> Self:
        self._counting = asyncio.create_task(self._count())
        return self

    def __exit__(self, *_: object) -> None:
        self._counting.cancel()

    async def _count(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)


class Clock:
    """Time as a value that the test sets; in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time stands still while anything is ready or a thread works for it, and else jumps to the next timer: hours pass at once, and to the
    digit."""

    def __init__(self) -> None:
        self._now = 1000.0
        self.in_threads = 0
        super().__init__(_Jumping(self))

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]  # without their generics
        self.in_threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_is_back)
        return future

    def _thread_is_back(self, _: asyncio.Future[Any]) -> None:
        self.in_threads -= 1

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._loop.in_threads:
            return super().select(timeout if timeout is None else min(timeout, THREAD_S))
        if timeout:
            self._loop.jump(timeout)
        return super().select(None if timeout is None else 0)


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `main` on a VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
