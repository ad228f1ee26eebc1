"""How often a source that is told of every change makes its set: soon after one, and seldom enough where changes never end."""

import asyncio
from collections.abc import Iterable

SHOW_EVERY_S = 0.1  # a set of thousands is not made for every one of thousands of events
SHOW_REST = 20  # times as long as making the set took: a large fleet that never rests takes a twentieth of a core


def rest_s(took_s: float) -> float:
    """How long to rest after a set that took `took_s` to make."""
    return max(SHOW_EVERY_S, SHOW_REST * took_s)


async def next_change(changed: asyncio.Event, tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Wait until something has changed. Raises what one of the tasks that say so ended with."""
    waiting = asyncio.create_task(changed.wait())
    try:
        done, _ = await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    for task in done:
        task.result()
    changed.clear()
