"""An artifact's life on one node, as a table of which state may follow which.

| state | what it means | what begins it | who does that |
| --- | --- | --- | --- |
| reserved | room is set aside for it under its flight's token; there is no artifact yet | `Index.reserve` | work/stage |
| staged | its files are whole, checked and still in .staging; the reservation stands | the check's verdict | work/stage |
| PUBLISHED | it lies under its digest; no name leads to it, and the engine knows none of its names | `Index.add`, `commit` | work/stage, disk/adopt, the start |
| NAMED | an adapter's name leads to it | `Holdings.put` | stager, work/refresh |
| LOADED | the engine knows a name of it, whether or not an adapter's name still leads to it | the engine's answer | engine/names |
| LEAVING | it was chosen to go: nobody can lease it, and its bytes still count | `reserve`, `surplus`, `leave` | work/evict |
| UNLOADED | the engine was told to forget it, and may have requests from before that | `Loads.unload` | engine/names, work/evict |
| SETTLED | the engine was seen without any request that came before the unload: nobody can read it | a look at the engine | work/evict |
| GONE | its directory is deleted, or others took away what they had put there | `Index.removed` | work/evict, disk/adopt |

A reservation ends in PUBLISHED or in nothing, and it is all that the index knows of the first two states. An artifact that leaves is unloaded and
settled on its way; if it has to stay after all, it goes on from the state that it has reached. One that is SETTLED without being chosen is ready to
go: it still may be leased, and is deleted without a question whose answer an engine would have to wait for.
"""

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    """Where in its life an artifact is."""

    PUBLISHED = "published"
    NAMED = "named"
    LOADED = "loaded"
    LEAVING = "leaving"
    UNLOADED = "unloaded"
    SETTLED = "settled"
    GONE = "gone"


MOVES: Mapping[State, frozenset[State]] = {
    State.PUBLISHED: frozenset({State.NAMED, State.LOADED, State.UNLOADED, State.LEAVING, State.GONE}),
    State.NAMED: frozenset({State.PUBLISHED, State.LOADED, State.UNLOADED, State.LEAVING, State.GONE}),
    State.LOADED: frozenset({State.UNLOADED, State.LEAVING, State.GONE}),  # an engine that lost it may have requests of it all the same
    State.UNLOADED: frozenset({State.LOADED, State.SETTLED, State.LEAVING, State.GONE}),
    State.SETTLED: frozenset({State.LOADED, State.UNLOADED, State.LEAVING, State.GONE}),
    State.LEAVING: frozenset({State.PUBLISHED, State.NAMED, State.LOADED, State.UNLOADED, State.SETTLED, State.GONE}),
    State.GONE: frozenset(),
}


class ImpossibleMoveError(Exception):
    """A part of the stager says of an artifact what cannot be: a mistake of ours, never a caller's."""


def moved(before: State, after: State) -> State:
    """`after`, if it may follow `before` or is the same. Raises ImpossibleMoveError."""
    if after is not before and after not in MOVES[before]:
        raise ImpossibleMoveError(f"an artifact that is {before.value} cannot become {after.value}")
    return after
