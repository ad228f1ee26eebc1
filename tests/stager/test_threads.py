"""Work in steps: its result, its errors, and what a cancelled wait leaves undone."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from extproc.errors import InvalidAdapter
from extproc.stager.threads import Steps, Threads, through


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    threads = Threads(1, "test")
    yield threads
    threads.close()


def counting(done: list[int], most: int) -> Steps[int]:
    for number in range(most):
        done.append(number)
        yield
    return most


async def test_steps_give_the_same_result_in_threads_and_here(threads: Threads) -> None:
    """One piece of work has one way to be written."""
    assert through(counting([], 5)) == 5
    assert await threads.walk(counting([], 5)) == 5


async def test_an_error_of_a_step_is_the_callers(threads: Threads) -> None:
    """As if it had been raised in place."""

    def failing() -> Steps[None]:
        yield
        raise InvalidAdapter("no")

    with pytest.raises(InvalidAdapter, match="no"):
        await threads.walk(failing())


async def test_two_walks_share_one_thread(threads: Threads) -> None:
    """A small adapter need not wait until the large one before it is checked."""
    large: list[int] = []
    walk = asyncio.create_task(threads.walk(counting(large, 10_000)))
    await threads.walk(counting([], 3))
    assert len(large) < 10_000
    walk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await walk


async def test_a_cancelled_walk_takes_no_further_step(threads: Threads) -> None:
    """A flight that is given up ends its check, and the files that the work holds are closed."""
    done: list[int] = []
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def held() -> Steps[None]:
        try:
            yield from counting(done, 10**6)
        finally:
            loop.call_soon_threadsafe(closed.set)

    walk = asyncio.create_task(threads.walk(held()))
    while not done:
        await asyncio.sleep(0)
    walk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await walk
    del walk
    await threads.run(int)
    taken = len(done)
    await closed.wait()
    await threads.run(int)
    assert len(done) == taken < 10**6
