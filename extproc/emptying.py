"""Drain one node and follow it until it is empty: what the command line waits for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from .client import Demand, Drained, EngineLoad, NodeState, StagerClient, WatchEvent
from .errors import StagerUnavailable

WATCHED_S = 1.0  # between two heartbeats of the node, and before a stager that is gone is asked again


async def drain(client: StagerClient, why: str, say: Callable[[Drained], None], timeout_s: float | None = None) -> str:
    """Drain the node; with a timeout wait until it is empty. `say` is called with how far it is, at first and whenever that changes.

    Returns why it is not waited for any longer, "" if it is empty or nobody wanted to wait. Raises what the stager answers to the drain itself.
    """
    state = await client.drain(why)
    say(state)
    if timeout_s is None or state.empty:
        return ""
    try:
        async with asyncio.timeout(timeout_s):
            async for event in _events(client):
                before, state = state, _after(state, event)
                if state != before:
                    say(state)
                if state.empty:
                    return ""
                if not state.draining:
                    return "somebody has undrained it"
    except TimeoutError:
        pass
    return f"not empty after {timeout_s:g} s; it is still drained"


async def _events(client: StagerClient) -> AsyncIterator[WatchEvent]:
    """What the node tells, also after its stager was started again: an operator's drain outlives that."""
    while True:
        with contextlib.suppress(StagerUnavailable):
            async for event in client.watch(WATCHED_S, load=True):
                yield event
        await asyncio.sleep(WATCHED_S)


def _after(state: Drained, event: WatchEvent) -> Drained:
    """How far it is by that event."""
    match event:
        case NodeState():
            return replace(state, draining=event.draining, empty=event.empty)
        case Demand(adapters, _):
            return replace(state, leased=adapters)
        case EngineLoad(running, waiting):
            return replace(state, requests=running + waiting)
        case _:
            return state
