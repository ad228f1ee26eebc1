"""The event loop of a process: how it starts, and what stops it."""

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from .memory import keep_freed_memory

GC_THRESHOLD = 20_000  # objects; requests leave no cycles, so looking for them after every 700 costs time and finds nothing


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `main(stop)` until it returns; SIGTERM and SIGINT set `stop`."""

    keep_freed_memory()

    async def guarded() -> None:
        leave_to_stay()
        gc.set_threshold(GC_THRESHOLD, 20, 50)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    uvloop.run(guarded())


def leave_to_stay() -> None:
    """Have the collector never look again at what there is now: what is imported, or found at a start, lives nearly as long as the process. A look at a
    hundred thousand adapters stops the loop for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
