"""What a watcher of a node is told: what it missed, the state of the node, every change, and a heartbeat."""

import asyncio
from collections.abc import AsyncGenerator

from ...pb import stager_pb2 as pb
from ..books.changes import Change
from ..stager import Stager

MIN_HEARTBEAT_S, MAX_HEARTBEAT_S = 0.1, 60.0  # whatever a watcher asks for


async def watch_events(stager: Stager, instance: str = "", after: int = 0, heartbeat_s: float = 0.0) -> AsyncGenerator[pb.WatchEvent, None]:
    """What was missed since change `after` of that `instance`, the node's state, then every change. Ends for a watcher that is too slow.

    After `heartbeat_s` without a change comes a heartbeat; 0: never. This loop sends it, so that a loop that is stopped is noticed.
    """
    beat_s = min(max(heartbeat_s, MIN_HEARTBEAT_S), MAX_HEARTBEAT_S) if heartbeat_s > 0 else 0.0
    changes = stager.node.changes
    with changes.since(after if instance == stager.instance else -1) as (queue, complete):
        while not queue.empty():  # what was missed, before the node may count as ready again
            if (change := queue.get_nowait()) is None:
                return
            yield _event(stager, change)
        yield _node(stager, changes.last, resumed=complete, heartbeat_s=beat_s)
        if stager.demand[1]:
            yield _event(stager, Change(changes.last, "demand"))
        while True:
            try:
                async with asyncio.timeout(beat_s or None):
                    change = await queue.get()
            except TimeoutError:
                yield pb.WatchEvent(heartbeat=pb.Heartbeat())
                continue
            if change is None:
                return
            yield _event(stager, change, beat_s)


def _event(stager: Stager, change: Change, heartbeat_s: float = 0.0) -> pb.WatchEvent:
    match change.kind:
        case "published":
            return pb.WatchEvent(sequence=change.sequence, published=change.adapter)
        case "refreshed":
            return pb.WatchEvent(sequence=change.sequence, refreshed=change.adapter)
        case "evicted":
            return pb.WatchEvent(sequence=change.sequence, evicted=change.adapter)
        case "refused":
            return pb.WatchEvent(sequence=change.sequence, refused=change.adapter)
        case "space":
            index = stager.node.holdings.index
            space = pb.Space(used_bytes=index.used_bytes, reserved_bytes=index.reserved_bytes, max_bytes=index.max_bytes)
            return pb.WatchEvent(sequence=change.sequence, space=space)
        case "demand":
            adapters, cpu_slots = stager.demand
            return pb.WatchEvent(sequence=change.sequence, demand=pb.Demand(adapters=adapters, cpu_slots=cpu_slots))
        case _:
            return _node(stager, change.sequence, resumed=True, heartbeat_s=heartbeat_s)


def _node(stager: Stager, sequence: int, *, resumed: bool, heartbeat_s: float) -> pb.WatchEvent:
    why = stager.not_ready
    node = pb.NodeState(ready=why is None, why=why or "", instance=stager.instance, resumed=resumed, draining=stager.is_draining, heartbeat_seconds=heartbeat_s)
    return pb.WatchEvent(sequence=sequence, node=node)
