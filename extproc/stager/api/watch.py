"""What a watcher of a node is told: what it missed, the state of the node, what it has, every change, the engine's load, and a heartbeat."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

from ...pb import stager_pb2 as pb
from ..books.changes import Change
from ..engine.meter import Reading
from ..stager import Stager
from ..work.copies import Part

MIN_HEARTBEAT_S, MAX_HEARTBEAT_S = 0.1, 60.0  # whatever a watcher asks for


async def watch_events(
    stager: Stager,
    instance: str = "",
    after: int = 0,
    heartbeat_s: float = 0.0,
    *,
    holder: str = "",
    copies: bool = False,
    load: bool = False,
    wakes: bool = False,
) -> AsyncGenerator[pb.WatchEvent, None]:
    """What was missed since change `after` of that `instance`, the node's state, then every change. Ends for a watcher that is too slow.

    After `heartbeat_s` without a change comes a heartbeat; 0: never. This loop sends it, so that a loop that is stopped is noticed. With `copies` a state
    that is not resumed is followed by all copies, as they were told when it was made; changes come after the last part. With `load` what the engine works
    on comes in between, always the latest, and how many calls of others than `holder` wait here. With `wakes` it is told of each adapter that a request asks
    for and nobody leased.
    """
    beat_s = min(max(heartbeat_s, MIN_HEARTBEAT_S), MAX_HEARTBEAT_S) if heartbeat_s > 0 else 0.0
    changes = stager.node.changes
    with contextlib.ExitStack() as stack:
        queue, complete = stack.enter_context(changes.since(after if instance == stager.instance else -1, wakes=wakes))
        if load:
            stack.enter_context(stager.meter.wanted())
        shown: Reading | None = None
        while not queue.empty():  # what was missed, before the node may count as ready again
            if (change := queue.get_nowait()) is None:
                return
            if _concerns(change, copies=copies):
                yield _event(stager, change)
        whole = stager.copies.whole() if copies and not complete else None
        position = changes.last
        yield _node(stager, 0 if whole is not None else position, resumed=complete, heartbeat_s=beat_s)
        if whole is not None:
            async for part in _inventory(whole, position):
                yield part
        if stager.demand[1]:
            yield _event(stager, Change(position, "demand"))
        loop = asyncio.get_running_loop()
        said_at = loop.time()
        while True:
            event: pb.WatchEvent | None = None
            if load and (reading := stager.meter.told) is not None and reading is not shown:
                shown, event = reading, _load(stager, reading, holder)
            else:
                try:
                    async with asyncio.timeout_at(said_at + beat_s if beat_s else None):
                        change = await queue.get()
                except TimeoutError:
                    event = pb.WatchEvent(heartbeat=pb.Heartbeat())
                else:
                    if change is None:
                        return
                    if _concerns(change, copies=copies):
                        event = _event(stager, change, beat_s)
            if event is not None:  # what does not concern this watcher is no sign of life to it
                said_at = loop.time()
                yield event


def _concerns(change: Change, *, copies: bool) -> bool:
    """Whether a watcher is told the change. What has no number only wakes it, but for a wake-up, which is told to who wants it."""
    return change.kind == "woken" or (bool(change.sequence) and (copies or change.kind not in ("loaded", "unloaded")))


async def _inventory(whole: Iterator[Part], position: int) -> AsyncGenerator[pb.WatchEvent, None]:
    """All copies in parts, with a turn of the event loop between two. Only the last has a sequence: whoever saw less has to begin anew."""
    for part in whole:
        inventory = pb.Inventory(cold=part.cold, warm=part.warm, more=part.more)
        yield pb.WatchEvent(sequence=0 if part.more else position, inventory=inventory)
        await asyncio.sleep(0)


def _event(stager: Stager, change: Change, heartbeat_s: float = 0.0) -> pb.WatchEvent:
    match change.kind:
        case "published" | "refreshed" | "evicted" | "refused" | "loaded" | "unloaded" | "woken" as kind:
            event = pb.WatchEvent(sequence=change.sequence)
            setattr(event, kind, change.adapter)
            return event
        case "space":
            index = stager.node.holdings.index
            space = pb.Space(used_bytes=index.used_bytes, reserved_bytes=index.reserved_bytes, max_bytes=index.max_bytes)
            return pb.WatchEvent(sequence=change.sequence, space=space)
        case "demand":
            adapters, cpu_slots = stager.demand
            return pb.WatchEvent(sequence=change.sequence, demand=pb.Demand(adapters=adapters, cpu_slots=cpu_slots))
        case _:
            return _node(stager, change.sequence, resumed=True, heartbeat_s=heartbeat_s)


def _load(stager: Stager, reading: Reading, holder: str) -> pb.WatchEvent:
    limits, work = stager.node.engine.limits, reading.work
    age_s = asyncio.get_running_loop().time() - reading.at
    load = pb.EngineLoad(slots=limits.max_loras, cpu_slots=limits.max_cpu_loras, age_seconds=age_s, known=work is not None)
    load.every_seconds, load.routers = stager.meter.every_s, stager.meter.wanting
    if work is not None:
        load.running, load.waiting, load.kv_usage = work.running, work.waiting, work.kv_usage
        load.others_held = reading.held_by_others(holder)
    return pb.WatchEvent(load=load)


def _node(stager: Stager, sequence: int, *, resumed: bool, heartbeat_s: float) -> pb.WatchEvent:
    not_ready, drain = stager.not_ready, stager.drain
    node = pb.NodeState(ready=not_ready is None, why=not_ready or drain.why, instance=stager.instance, resumed=resumed, heartbeat_seconds=heartbeat_s)
    node.draining, node.empty = drain.is_on, drain.is_empty
    return pb.WatchEvent(sequence=sequence, node=node)
