"""Which adapters have a copy on this node, cold or warm, as watchers were told: the whole that each is given first, and the changes that follow it.

| told | the adapter's copy, from then on |
| --- | --- |
| published, refreshed | cold |
| loaded | warm |
| unloaded | cold, if there is one |
| evicted, refused | none |

What is told of one adapter is compared with what is, whenever one of both changes. So `loaded` and `unloaded` come once however often an adapter moves
between two turns of the event loop; and what was told as evicted or refused and can be served here all the same (the engine lost its name, a removal
ended in keeping it, only a newer version is refused) is told as published again, and what was published and is refused is told as refused.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from ...core.artifact import AdapterName
from ..node import Node

PART = 1000  # names of one part of the whole: less than a millisecond
SLICE = 500  # adapters that are compared between two turns of the event loop: about a millisecond
LOOK_S = 0.5  # until one that leaves is looked at again: if it has to stay, nothing tells


@dataclass(frozen=True, slots=True)
class Part:
    """A part of all copies."""

    cold: list[AdapterName]
    warm: list[AdapterName]
    more: bool


class Copies:
    """Follows what is told to watchers, and the engine's memory."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._warm: set[AdapterName] = set()  # told so; at most what the engine's memory is taken to hold
        self._withdrawn: set[AdapterName] = set()  # on disk, and told as evicted or refused; at most what is on disk
        self._due: dict[AdapterName, None] = {}  # to be compared; at most what is on disk or in the engine's memory
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        node.changes.follow(self._told)

    def close(self) -> None:
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()

    def moved(self, name: AdapterName) -> None:
        """The engine may have taken it into its memory, or may have it there no longer."""
        self._due[name] = None
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._compare)

    def whole(self) -> Iterator[Part]:
        """All copies as they are told at this moment, whatever changes before the last part is taken: changes from now on go on from here.

        The names are noted at once (a hundred thousand in some 3 ms); what is told of one changes only by an event that follows.
        """
        names, warm, withdrawn = list(self._node.holdings), self._warm.copy(), self._withdrawn.copy()
        suspects = self._node.loads.refused_adapters()

        def parts() -> Iterator[Part]:
            for first in range(0, max(1, len(names)), PART):
                here = [name for name in names[first : first + PART] if name not in withdrawn and not self._is_refused(name, suspects)]
                yield Part([name for name in here if name not in warm], [name for name in here if name in warm], first + PART < len(names))

        return parts()

    def _is_refused(self, name: AdapterName, suspects: set[AdapterName]) -> bool:
        named = self._node.holdings.get(name)
        return named is not None and bool(named.refused or (name in suspects and self._node.loads.refuses(name, named.id)))

    def _told(self, kind: str, adapter: str) -> None:
        """Watchers are told a change just now."""
        name = AdapterName(adapter)
        match kind:
            case "published" | "refreshed":
                self._warm.discard(name)
                self._withdrawn.discard(name)
            case "evicted" | "refused":
                self._warm.discard(name)
                self._withdrawn.add(name)
            case _:
                return
        self.moved(name)

    def _compare(self) -> None:
        self._turn = None
        for name in list(self._due)[:SLICE]:
            del self._due[name]
            self._compare_one(name)
        if self._due:
            self._turn = asyncio.get_running_loop().call_soon(self._compare)

    def _compare_one(self, name: AdapterName) -> None:
        named = self._node.holdings.get(name)
        if named is None:
            self._warm.discard(name)
            self._withdrawn.discard(name)
            return
        if named.id not in self._node.holdings.index:  # it leaves
            if name in self._withdrawn and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look_again)
            return
        if named.refused or self._node.loads.refuses(name, named.id):
            if name not in self._withdrawn:  # the engine was quicker to refuse it than the disk to show it under its name
                self._node.changes.tell("refused", name)
            return
        if name in self._withdrawn:
            self._node.changes.tell("published", name)
        is_warm = self._node.loads.in_memory(name, named.id)
        if is_warm != (name in self._warm):
            (self._warm.add if is_warm else self._warm.discard)(name)
            self._node.changes.tell("loaded" if is_warm else "unloaded", name)

    def _look_again(self) -> None:
        """At all that was withdrawn: it has left meanwhile, or stays."""
        self._timer = None
        for name in self._withdrawn:
            self.moved(name)
