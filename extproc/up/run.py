"""`up` from start to end: start the stack, check it or follow it, stop it on a signal."""

import asyncio
import signal

from rich.console import Console

from . import check as checks
from . import report
from .stack import Plan, Stack


async def run(plan: Plan, *, check: bool) -> bool:
    """Whether it ended well: by a signal, or with every check passed. Raises StartError."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # only once: a second Ctrl-C must not interrupt the stopping
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    console = Console()
    try:
        async with Stack(plan) as stack:
            if check:
                return await checks.check(stack, console)
            report.say_started(console, stack)
            return await _follow(stack, console)
    except asyncio.CancelledError:
        return not check


async def _follow(stack: Stack, console: Console) -> bool:
    """Print requests until a part without which nothing works has ended."""
    exits = asyncio.create_task(_report_exits(stack, console))
    try:
        async for record in stack.access_log():
            report.say_request(console, record)
        return False  # Envoy has ended
    finally:
        exits.cancel()


async def _report_exits(stack: Stack, console: Console) -> None:
    async for child in stack.exits():
        console.print(f"{child.name} ended with code {child.process.returncode}; its log is {child.log}", style="red", highlight=False, soft_wrap=True)
